"""The texts of --help: a command's own page, one section of the settings, or all of them."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import difflib
import shutil
import textwrap
from typing import Any

from hbpo_jax import config, validation
from hbpo_jax.commands import COMMON, Command, Option

RUN = "run"  # The section of the settings that stand in none.
_KINDS = {
    int: "an integer", float: "a number", bool: "true or false", str: "text", float | None: "a number or none",
    tuple[int, ...]: "integers such as 512,1024", tuple[str, ...]: "texts such as a,b",
}


def sections() -> dict[str, tuple[str, list[str]]]:
  """(what it is about, its fields) of each section of the settings, by name; nested ones belong to the outer."""
  found = {RUN: ("The run as a whole.", [])}
  for f in dataclasses.fields(config.Config):
    if dataclasses.is_dataclass(f.type):
      found[f.name] = ((f.type.__doc__ or "").splitlines()[0], [])
  for name in config.field_table():
    section, dot, _ = name.partition(".")
    found[section if dot else RUN][1].append(name)
  return found


def page(name: str, command: Command, configs: Sequence[str], value: Callable[[str], Any], whose: str) -> str:
  """The text of --help.

  Args:
    name: how the command is called, such as "hbpo train".
    command: its row.
    configs: names of the shipped configs.
    value: of a setting, by its dotted name.
    whose: says whose values these are.
  """
  lines = [*_summary(command), "", *_usage_line(name, command), "", *_options(command, configs)]
  if not command.settings:
    return "\n".join(lines)
  lines += ["", *_wrap(f"The settings that are changed most, with {whose}:"), ""]
  for field in command.settings:
    lines += _setting(field, value)
  lines += ["", *_wrap(f"All settings: {name} --helpfull. Those of a section: {name} --help=SECTION, with"), ""]
  lines += _columns([(section, about) for section, (about, _) in sections().items()])
  return "\n".join(lines)


def full_page(name: str, command: Command, configs: Sequence[str], value: Callable[[str], Any], whose: str) -> str:
  """The text of --helpfull, with every setting; see `page`."""
  lines = [*_summary(command), "", *_usage_line(name, command), "", *_options(command, configs)]
  if not command.settings:
    return "\n".join(lines)
  lines += ["", *_wrap(
      f"All settings, with {whose}. Several values are written 16,32 or (16, 32); 'none' clears an optional number.")]
  for section in sections():
    lines += ["", *section_lines(section, value)]
  return "\n".join(lines)


def topic_page(topic: str, value: Callable[[str], Any], whose: str) -> str:
  """The text of --help=TOPIC: the settings of a section, or one setting.

  Raises:
    ValueError: when there is no such section or setting; names the nearest.
  """
  topic = topic.removeprefix("--").removeprefix("config.").rstrip(".=")
  table = config.field_table()
  if topic in sections():
    lines = section_lines(topic, value)
  elif fields := [n for n in table if n == topic or n.startswith(topic + ".")]:
    lines = [line for field in fields for line in _setting(field, value)]
  else:
    near = difflib.get_close_matches(topic, [*sections(), *table], n=3) or [
        n for n in table if n.rpartition(".")[2] == topic]
    hint = f"did you mean {' or '.join(near)}?" if near else f"the sections are {', '.join(sections())}."
    raise ValueError(f"--help={topic}: there is no such section or setting; {hint}")
  return "\n".join([*lines, "", *_wrap(f"Values are {whose}.")])


def overview(program: str, table: dict[str, Command], version: str) -> str:
  """The text of `hbpo --help`: every command with its sentence."""
  rows = [(name, command.summary) for name, command in table.items()]
  return "\n".join([
      *_wrap(f"hbpo_jax {version}: Hierarchical Budget Policy Optimization in JAX, which teaches reasoning models how "
             "long to think."), "",
      f"usage: {program} COMMAND [ARGUMENT ...]", "", *_columns(rows), "",
      *_wrap(f"{program} COMMAND --help says more. Also: {program} --version. To begin with: {program} train "
             "--config=quickstart --workdir=runs/quickstart")])


def section_lines(section: str, value: Callable[[str], Any]) -> list[str]:
  """The heading and the settings of a section."""
  about, fields = sections()[section]
  lines = [*_wrap(f"{section}: {about}"), ""]
  for field in fields:
    lines += _setting(field, value)
  return lines


def kind(field: str) -> str:
  """What the value of a setting is, in words: its choices, or its type."""
  choices = validation.CHOICES.get(field)
  return " | ".join(map(str, choices)) if choices else type_words(config.field_table()[field].type)


def type_words(kind: Any) -> str:
  """A type of settings, in words."""
  return _KINDS[kind]


def show(value: Any) -> str:
  """A value as it is written behind --config.FIELD=."""
  if isinstance(value, tuple):
    return ",".join(map(str, value)) or "()"
  return {True: "true", False: "false", None: "none"}[value] if value is None or isinstance(value, bool) else str(value)


def _summary(command: Command) -> list[str]:
  text = command.summary.strip()
  return text.splitlines() if "\n" in text else _wrap(text)


def _usage_line(name: str, command: Command) -> list[str]:
  if not command.settings:
    return [f"usage: {name} {command.arguments}".rstrip()]
  own = " ".join(f"[{_flag(o)}]" for o in command.options)
  workdir = "--workdir=DIR" if command.needs_workdir else "[--workdir=DIR]"
  text = " ".join(filter(None, [
      f"usage: {name}", command.arguments, "--config=NAME_OR_FILE", workdir, own, "[--config.FIELD=VALUE ...]"]))
  return _wrap(text, subsequent_indent=" " * 7)


def _options(command: Command, configs: Sequence[str]) -> list[str]:
  rows = [(_flag(o), o.help) for o in command.options]
  if command.settings:
    common = {o.name: (_flag(o), o.help) for o in COMMON}
    common["config"] = (common["config"][0], f"{common['config'][1]} Shipped: {', '.join(configs)}.")
    if not command.needs_workdir:
      common["workdir"] = (common["workdir"][0], "Directory of the command's files; without it none are written.")
    rows = [
        common["config"], ("--config.FIELD=VALUE", "Override a setting."), *rows,
        *(row for name, row in common.items() if name != "config")]
    rows += [("--help, --help=SECTION", "This text; the settings of a section, or one setting."),
             ("--helpfull", "Every setting. With --config, help shows that config's values.")]
  else:
    rows.append(("--help", "This text."))
  return _columns(rows)


def _flag(option: Option) -> str:
  return f"--{option.name}={option.metavar}" if option.metavar else f"--{option.name}"


def _setting(field: str, value: Callable[[str], Any]) -> Iterator[str]:
  yield from _wrap(
      f"--config.{field}={show(value(field))}  ({kind(field)})", initial_indent=" " * 2, subsequent_indent=" " * 10)
  yield from _wrap(config.field_table()[field].metadata["help"], initial_indent=" " * 6, subsequent_indent=" " * 6)


def _columns(rows: Sequence[tuple[str, str]]) -> list[str]:
  """Two columns; the second is wrapped."""
  room = max(len(left) for left, _ in rows) + 4
  lines = []
  for left, right in rows:
    lines += _wrap(right, initial_indent=f"  {left}".ljust(room), subsequent_indent=" " * room)
  return lines


def _wrap(text: str, initial_indent: str = "", subsequent_indent: str = "") -> list[str]:
  width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)
  return textwrap.wrap(
      text, width, initial_indent=initial_indent, subsequent_indent=subsequent_indent, break_long_words=False,
      break_on_hyphens=False)
