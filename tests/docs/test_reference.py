"""The pages that are made from the code."""

import runpy
import subprocess
import sys

import pytest

from hbpo_jax import commands, config, flags
from tests.docs import markdown

generate = runpy.run_path(str(markdown.ROOT / "docs" / "generate.py"))


@pytest.fixture(scope="module")
def configuration():
  return generate["configuration"]()


@pytest.mark.parametrize("name", list(config.field_table()))
def test_a_setting_has_its_row(configuration, name):
  field = config.field_table()[name]
  (row,) = [line for line in configuration.splitlines() if line.startswith(f'| <a id="{name}"></a>`{name}` |')]
  cells = [c.strip() for c in row.replace("\\|", "/").strip("|").split("|")]
  assert len(cells) == 4 and all(cells)
  meaning = field.metadata["help"].replace("&", "&amp;").replace("<", "&lt;").replace("*", "\\*")
  assert cells[3].startswith(" ".join(meaning.split()).replace("|", "/"))
  if isinstance(field.default, int | float) and not isinstance(field.default, bool):
    assert cells[2] == f"`{field.default}`"
  for profile, row in config.PROFILES.items():
    assert (f"`{profile}` sets" in cells[3]) == (name in row)


def test_profiles_and_shipped_configurations_are_listed(configuration):
  for name in flags.config_names():
    assert f"\n### {name}\n" in configuration
  assert "| [`loss.dual_clip`](#loss.dual_clip) | `none` | `3.0` | `none` |" in configuration
  quickstart = configuration.split("\n### quickstart\n")[1].split("\n### ")[0]
  assert "| [`rollout.budgets`](#rollout.budgets) | `8,16,24,32` |" in quickstart
  assert "optimizer.weight_decay" not in quickstart, "only what differs"


def test_every_command_is_listed_with_its_help():
  page = generate["commands"]()
  for name in commands.COMMANDS:
    text = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
    assert "--" in text and len(text.splitlines()) > 5, text
    assert commands.COMMANDS[name].summary.split(",")[0] in " ".join(text.split())
  assert "--config.optimizer.eps" not in page, "settings have a page of their own"


def test_a_page_prints():
  done = subprocess.run([sys.executable, markdown.ROOT / "docs" / "generate.py", "benchmarks.md"], capture_output=True,
                        text=True, timeout=60, check=True)
  assert done.stdout.strip() == (markdown.ROOT / "benchmarks" / "README.md").read_text().strip()


def test_the_site_builds(tmp_path):
  """As `make docs` does: strict, so that links and navigation are checked by mkdocs as well."""
  pytest.importorskip("mkdocs")
  pytest.importorskip("material")
  done = subprocess.run(
      [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", tmp_path / "site"], cwd=markdown.ROOT,
      capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  pages = list((tmp_path / "site").glob("*.html"))
  assert len(pages) >= len(list((markdown.ROOT / "docs").glob("*.md")))
  for page in pages:  # Nothing that a reader's browser would fetch from elsewhere.
    text = page.read_text()
    assert "src=\"http" not in text and "fonts.g" not in text and "unpkg" not in text, page.name
