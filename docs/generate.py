"""The pages that are made from the code when the site is built: configuration, commands, benchmarks. A hook of mkdocs.

    python docs/generate.py configuration.md      prints one
"""

from collections.abc import Callable, Iterable
from concurrent import futures
import functools
import os
import pathlib
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
  sys.path.insert(0, str(ROOT))

from hbpo_jax import commands as table_of_commands  # noqa: E402
from hbpo_jax import config, flags, usage  # noqa: E402 (mkdocs runs this file where the package may not be installed)

_CONFIGURATION = """# Configuration

Every setting, from the table that the command line, gin and the checks read. `--config.rollout.queries=8` sets one for
a run. A config file is a Python file whose `get_config()` starts from `hbpo_jax.config.new(PROFILE)` or, as
`examples/sort_words.py` does, from a shipped one. What comes later wins: config file, profile named by an override, gin
(`--gin_param='RolloutConfig.queries = 8'`), `--config.field=value`.

Tuples are written `512,1024` or `(512, 1024)`; `none` clears an optional number; `--config.lora.rank 8` and
`--noconfig.log.live` work as well. An impossible value or combination is refused before anything is loaded.
"""
_COMMANDS = """`hbpo NAME` is `python -m hbpo_jax.NAME`; below is what `--help` prints. `--helpfull` adds all settings,
`--help=SECTION` those of a section; [Configuration](configuration.md) has them on a page. `hbpo completion bash` (or
zsh, fish) prints the script with which a shell completes names, settings and values.
"""


def configuration() -> str:
  """The page of all settings: by section with type, default and meaning, profiles, shipped configurations."""
  table = config.field_table()
  sections: dict[str, list[str]] = {}
  for name in table:
    sections.setdefault(name.rpartition(".")[0], []).append(name)
  parts = [_CONFIGURATION, "## Profiles\n", _profiles()]
  for section, names in sections.items():
    parts += [f"## {section or 'The run'}\n", f"{_cell(_section_text(section))}\n"]
    parts.append(_table(("setting", "type", "default", "meaning"), ([
        f'<a id="{name}"></a>`{name}`', _cell(usage.kind(name)), _value(table[name].default), _meaning(name)]
        for name in names)))
  parts += ["## Shipped configurations\n", "What each sets that its profile does not.\n"]
  for name in flags.config_names():
    parts += [f"### {name}\n", _shipped(name)]
  return "\n".join(parts)


def commands() -> str:
  """The page of all commands, each with what its --help prints."""
  names = list(table_of_commands.COMMANDS)
  with futures.ThreadPoolExecutor(2) as threads:
    helps = list(threads.map(help_text, names))
  parts = ["# Commands\n", _COMMANDS]
  for name, text in zip(names, helps):
    parts += [f"## {name}\n", f"```text\n{text}\n```\n"]
  return "\n".join(parts)


def benchmarks() -> str:
  """benchmarks/README.md, with links that hold where the page lies."""
  return (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration, "commands.md": commands, "benchmarks.md": benchmarks}


def on_files(files: Any, config: Any) -> Any:
  """Called by mkdocs: adds the pages to those it found."""
  from mkdocs.structure.files import File

  for name, make in PAGES.items():
    files.append(File.generated(config, name, content=make()))
  return files


@functools.cache
def help_text(name: str) -> str:
  """What `python -m hbpo_jax.NAME --help` prints.

  Raises:
    CalledProcessError: when the command fails.
  """
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "100", "PYTHONPATH": os.pathsep.join(
      [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
  done = subprocess.run(
      [sys.executable, "-m", f"hbpo_jax.{name}", "--help"], env=environment, check=True, capture_output=True, text=True)
  return done.stdout.rstrip()


def _profiles() -> str:
  table = config.field_table()
  governed = [n for n in table if any(n in row for row in config.PROFILES.values())]
  rows = ([f"[`{name}`](#{name})", *(
      _value(row.get(name, table[name].default)) for row in config.PROFILES.values())] for name in governed)
  lines = [
      "The paper and its authors' release differ in places; a profile sets all of these at once",
      "(`--config.profile=released`). A run prints what differs from the paper; [The method](method.md) says why.", ""]
  return "\n".join(lines) + "\n" + _table(("setting", *(f"`{name}`" for name in config.PROFILES)), rows)


def _section_text(section: str) -> str:
  cls: Any = config.Config
  for part in filter(None, section.split(".")):
    cls = cls.__dataclass_fields__[part].type
  return cls.__doc__.strip() if section else "Settings of the whole run."


def _meaning(name: str) -> str:
  text = _cell(config.field_table()[name].metadata["help"])
  sets = [f"`{p}` sets {_value(row[name])}" for p, row in config.PROFILES.items() if name in row]
  return f"{text} Profile {', '.join(sets)}." if sets else text


def _shipped(name: str) -> str:
  cd = flags.load_config(name)
  text = (flags.configs_dir() / f"{name}.py").read_text(encoding="utf-8").split('"""')[1].splitlines()[0]
  rows = [[f"[`{n}`](#{n})", _value(there)] for n, _, there in config.differences(config.new(cd.profile), cd)]
  return f"{_cell(text)} Profile `{cd.profile}`.\n\n" + (_table(("setting", "value"), rows) if rows else "")


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  head = list(head)
  lines = [head, ["---"] * len(head), *rows]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _value(value: Any) -> str:
  text = usage.show(value)
  return f"`{text}`".replace("|", "\\|") if text else "empty"


def _cell(text: str) -> str:
  """A sentence as a cell of a Markdown table."""
  for sign, written in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("*", "\\*")):
    text = text.replace(sign, written)
  return " ".join(text.split())


if __name__ == "__main__":
  print(PAGES[sys.argv[1]]())
