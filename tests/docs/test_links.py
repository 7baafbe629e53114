"""Links between pages, the site's navigation, and what pages repeat from elsewhere."""

import ast
import datetime
import pathlib
import re
import runpy

import pytest
import yaml

import hbpo_jax
from hbpo_jax import commands
from tests.docs import markdown

generate = runpy.run_path(str(markdown.ROOT / "docs" / "generate.py"))
MADE = {f"docs/{name}" for name in generate["PAGES"]}


def anchors(target: str) -> set[str] | None:
  """The anchors of a file, of the repository or made for the site; None where there is no such file."""
  if target == "docs/configuration.md":
    return markdown.anchors(generate["configuration"]())
  if target == "docs/commands.md":
    return set(commands.COMMANDS)
  path = markdown.ROOT / ("benchmarks/README.md" if target == "docs/benchmarks.md" else target)
  if not path.exists():
    return None
  return markdown.anchors(path.read_text(encoding="utf-8")) if path.suffix == ".md" else set()


@pytest.mark.parametrize("path", markdown.files(), ids=markdown.relative)
def test_links_lead_somewhere(path):
  for link in markdown.links(path):
    if re.match(r"(https?|mailto):", link):
      continue
    file, _, anchor = link.partition("#")
    target = (path.parent / file).resolve().relative_to(markdown.ROOT).as_posix() if file else markdown.relative(path)
    there = anchors(target)
    assert there is not None, f"{link}: there is no {target}"
    assert not anchor or anchor in there, f"{link}: {target} has no such heading"


def test_every_page_is_in_the_navigation_and_the_other_way_round():
  site = yaml.safe_load((markdown.ROOT / "mkdocs.yml").read_text())
  flat = [page for entry in site["nav"] for page in (
      [entry] if isinstance(entry, str) else next(iter(entry.values())))]
  pages = {p.relative_to(markdown.ROOT / "docs").as_posix() for p in (markdown.ROOT / "docs").glob("**/*.md")}
  assert len(flat) == len(set(flat)) and set(flat) == pages | set(generate["PAGES"])
  assert site["strict"] and site["theme"]["font"] is False and site["hooks"] == ["docs/generate.py"]


def test_the_first_page_shows_the_table_of_the_readme(repo_root):
  tables = [next(b.text for b in markdown.blocks(repo_root / f) if b.text.startswith("level"))
            for f in ("README.md", "docs/index.md")]
  assert tables[0].startswith(tables[1])


def test_the_example_is_shown_as_it_is(repo_root):
  code = (repo_root / "examples" / "sort_words.py").read_text()
  shown = [b.text for b in markdown.blocks(repo_root / "docs" / "own-task.md") if b.lang == "python"]
  assert len(shown) == 3 and all(text in code for text in shown)


def test_code_in_python_parses():
  for path in markdown.files():
    for block in markdown.blocks(path):
      if block.lang == "python":
        ast.parse(block.text)


def test_messages_are_the_programs_own(repo_root):
  """Each heading of the page on messages is text of the package, '…' standing for what varies."""
  texts = []
  for file in (repo_root / "hbpo_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
      if isinstance(node, ast.JoinedStr):
        texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        texts.append(node.value)
  page = (repo_root / "docs" / "troubleshooting.md").read_text()
  headings = re.findall(r"(?m)^### `(.+)`$", page)
  assert len(headings) > 15
  for heading in headings:
    parts = [part for part in heading.split("…") if len(part) > 8]
    assert parts and all(any(part in text for text in texts) for part in parts), heading


def test_citation_is_of_this_version(repo_root):
  cited = yaml.safe_load((repo_root / "CITATION.cff").read_text())
  assert cited["cff-version"] == "1.2.0" and cited["version"] == hbpo_jax.__version__
  assert cited["license"] == "Apache-2.0" and cited["preferred-citation"]["url"].endswith("2507.15844")
  assert cited["preferred-citation"]["year"] <= datetime.date.today().year


def test_files_that_pages_name_exist(repo_root):
  for path in markdown.files():
    for span in markdown.spans(path):
      if re.fullmatch(r"(configs|examples|colab|benchmarks|tests|hbpo_jax|docs|tpu)/[\w./-]+\.\w+", span) and (
          (repo_root / span.partition("/")[0]).is_dir() and not pathlib.PurePath(span).name.startswith("NAME")):
        made = span.startswith("docs/") and span in MADE
        assert made or (repo_root / span).exists(), f"{markdown.relative(path)}: {span}"
