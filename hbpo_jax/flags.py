"""The front end of every command: --config, overrides, gin, --help, and one clear line per error.

Order of precedence, lowest first: the config file, a profile named by an override, gin, --config.field=value.
"""

import argparse
import ast
from collections.abc import Callable, Iterator, Sequence
import contextlib
import copy
import dataclasses
import difflib
import dis
import functools
import os
import pathlib
import re
import runpy
import select
import sys
import traceback
from typing import Any, NoReturn

from absl import flags as absl_flags
from ml_collections import config_dict, config_flags

from hbpo_jax import bucket, commands, config, files, gin_front, usage
from hbpo_jax.reporting.text import plain

_PACKAGE = pathlib.Path(__file__).resolve().parent
# Settings of `evaluate` that may be written without their section, as its users do in every call.
_SHORT = {"benchmarks": "eval.benchmarks", "max_new_tokens": "eval.max_new_tokens"}
_HELP = re.compile(r"(-h|-\?|--?help|--?helpshort|(?P<full>--?helpfull))(=(?P<topic>.*))?")
_BROKEN_PIPE = 141  # As a shell says of a program that SIGPIPE ended.
# Trouble with files is the reader's to mend wherever it was raised.
_FILE_ERRORS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


@dataclasses.dataclass(frozen=True)
class CommandLine:
  """A parsed command line. `cfg` is typed but not validated against devices or a model."""
  cfg: config.Config
  workdir: str


def run(main: Callable[[config.Config, str], Any], *, name: str, description: str = "",
        argv: Sequence[str] | None = None, needs_workdir: bool = True) -> None:
  """Runs `main(cfg, workdir)` with the settings of the command line.

  A ValueError that this package raises on purpose, a missing or unreadable file and a full disk end the program with
  one line on stderr and exit code 2 (`--traceback` shows where); any other exception is a defect and keeps its
  traceback.

  Where the working directory is a bucket, `main` gets the local directory that is mirrored there (hbpo_jax.bucket).

  Args:
    main: the command, (cfg, workdir) -> anything.
    name: of the command, a row of `commands.COMMANDS`, or how one without a row is called.
    description: what a command without a row does; the text of --help.
    argv: arguments after the program name; None means those of the process.
    needs_workdir: whether a command line without --workdir is refused; else `main` gets ''.
  Raises:
    SystemExit: 0 after --help, 2 after an error of the user's, 141 when whoever read the output has gone.
  """
  arguments = list(sys.argv[1:] if argv is None else argv)
  show_help(name, arguments, description)
  with one_line_errors(arguments):
    line = parse(arguments, name=name, needs_workdir=needs_workdir)
    several = None if name == "regrade" else line.cfg.distributed
    with bucket.opened(line.workdir, several, with_units=name != "regrade") as workdir:
      main(line.cfg, workdir)


@contextlib.contextmanager
def one_line_errors(argv: Sequence[str]) -> Iterator[None]:
  """A context that ends a command as users expect: see `run`.

  Args:
    argv: the command's arguments.
  Raises:
    SystemExit: 2 after an error of the user's, 141 when whoever read the output has gone (`| head`).
  """
  try:
    try:
      yield
    except SystemExit:
      _flush()
      raise
    _flush()
  except BrokenPipeError:
    if not _reader_is_gone():
      raise
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(_BROKEN_PIPE)
  except (ValueError, OSError) as error:
    if not is_meant_for_user(error):
      raise
    if wants_traceback(argv):
      traceback.print_exc()
    # It may quote a file of somebody else's.
    text = plain(files.storage_trouble(error) or str(error)).replace("\n", " ")
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
  """Of the commands without settings: raises what is wrong with a command line, so that it ends like every other error.

  Their help is that of `show_help`.
  """

  def __init__(self, name: str):
    super().__init__(prog=name, allow_abbrev=False, add_help=False)
    self.add_argument("--traceback", action="store_true")

  def error(self, message: str) -> NoReturn:
    """Raises ValueError."""
    raise ValueError(f"{message}; --help lists all arguments.")


def show_help(name: str, argv: Sequence[str] | None = None, description: str = "") -> None:
  """Prints the help that the arguments ask for and ends the program; returns where they ask for none.

  A module that takes seconds to import calls it before its other imports, so that help comes at once.

  Args:
    name, description: as in `run`.
    argv: arguments after the program name; None means those of the process.
  Raises:
    SystemExit: 0 after the help, 2 when it is asked about something that does not exist.
  """
  arguments = list(sys.argv[1:] if argv is None else argv)
  asked = [(i, found) for i, a in enumerate(arguments) if (found := _HELP.fullmatch(a))]
  if not asked:
    return
  at, found = asked[0]
  topic = found["topic"] or next((a for a in arguments[at + 1:at + 2] if not a.startswith("-")), "")
  row = commands.COMMANDS.get(name)
  called = commands.called(name) if row else name
  row = row or commands.Command(description, settings=commands.COMMANDS["train"].settings)
  with one_line_errors(arguments):
    source = _config_source(arguments) if row.settings else None
    values, whose = config.Config(), "the paper's defaults (a config's profile and file may differ)"
    if source is not None:
      values, whose = load_config(source), f"those of --config={source}"
    value = functools.partial(config.get, values)
    if topic and row.settings:
      print(usage.topic_page(topic, value, whose))
    else:
      print((usage.full_page if found["full"] else usage.page)(called, row, config_names(), value, whose))
  sys.exit(0)


def parse(argv: Sequence[str], *, name: str = "hbpo_jax", needs_workdir: bool = True) -> CommandLine:
  """The settings and the working directory that a command line asks for.

  Raises:
    ValueError: when a flag, field, value or config name is not understood; names it and the remedy.
    FileNotFoundError: when the config or gin file does not exist.
  """
  source, cleared, arguments = _normalise(argv)
  values = absl_flags.FlagValues()
  absl_flags.DEFINE_string("workdir", None, "Directory of everything the run writes.", flag_values=values)
  absl_flags.DEFINE_multi_string("gin_file", [], "A gin file.", flag_values=values)
  absl_flags.DEFINE_multi_string("gin_param", [], "A gin binding.", flag_values=values)
  absl_flags.DEFINE_bool("traceback", False, "Show where an error was raised.", flag_values=values)
  base = config.new() if source is None else load_config(source)
  config_flags.DEFINE_config_dict("config", copy.deepcopy(base), flag_values=values, sys_argv=[name, *arguments])
  try:
    positional = values([name, *arguments])[1:]
  except absl_flags.Error as error:
    raise ValueError(_explain(str(error))) from error
  if positional:
    raise ValueError(f"argument {positional[0]!r} is not understood; settings are given as --config.field=value.")
  if source is None and not (values.gin_file or values.gin_param):
    raise ValueError(f"--config is missing; give a file or one of: {', '.join(config_names())}.")
  if needs_workdir and not values.workdir:
    raise ValueError("--workdir is missing; give the directory that the run writes to.")
  from_gin = gin_front.read(values.gin_file, values.gin_param) if values.gin_file or values.gin_param else {}
  overrides = from_gin | config_flags.get_override_values(values["config"]) | cleared
  workdir = str(pathlib.Path(values.workdir).expanduser()) if values.workdir else ""
  if bucket.is_url(values.workdir or ""):  # pathlib would make a local directory of that name.
    bucket.check("--workdir", values.workdir)
    if name not in bucket.COMMANDS:
      raise ValueError(
          f"--workdir={values.workdir} is no directory, and {name} writes to nothing else; give one, or mount the "
          f"bucket (gcsfuse, as launch_tpu.sh does) and give its place. {', '.join(bucket.COMMANDS)} take a bucket.")
    workdir = values.workdir
  return CommandLine(cfg=build(base, overrides), workdir=workdir)


def build(base: config_dict.ConfigDict, overrides: dict[str, Any]) -> config.Config:
  """The Config of a config file's ConfigDict and overrides by dotted field name.

  An override of `profile` sets the fields that profiles govern, except those that the file itself moved away from its
  own profile; other overrides come after it.

  Raises:
    ValueError: when a field or its type is wrong.
  """
  config.from_config_dict(base)  # names what the file itself got wrong
  cd = copy.deepcopy(base)
  profile = overrides.get("profile", cd.profile)
  if not isinstance(profile, str):
    raise ValueError(f"config.profile={profile!r} has the wrong type; give {usage.type_words(str)}.")
  if profile != cd.profile:
    config.apply_profile(cd, profile, keep=edited_from_profile(cd))
  table = config.field_table()
  for name, value in overrides.items():
    parent, _, leaf = name.rpartition(".")
    if isinstance(value, list) and table[name].type in config.TUPLES:
      value = tuple(value)
    try:
      (config.get(cd, parent) if parent else cd)[leaf] = value
    except (TypeError, ValueError) as error:
      raise ValueError(
          f"config.{name}={value!r} has the wrong type; give {usage.type_words(table[name].type)}.") from error
  return config.from_config_dict(cd)


def edited_from_profile(cfg: Any) -> frozenset[str]:
  """The profile-governed fields of a Config or ConfigDict whose value is not its profile's."""
  table = config.field_table()
  if cfg.profile not in config.PROFILES:
    raise ValueError(f"config.profile={cfg.profile!r} does not exist; choose one of {sorted(config.PROFILES)}.")
  expected = config.PROFILES[cfg.profile]
  governed = {name for row in config.PROFILES.values() for name in row}
  return frozenset(n for n in governed if config.get(cfg, n) != expected.get(n, table[n].default))


def configs_dir() -> pathlib.Path:
  """Where the shipped configs lie: inside an installed package, or at the top of a source checkout."""
  inside = _PACKAGE / "configs"
  return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def config_names() -> list[str]:
  """Names that `--config=NAME` finds."""
  return sorted(p.stem for p in configs_dir().glob("*.py") if not p.stem.startswith("_"))


def config_path(source: str, option: str = "--config") -> pathlib.Path:
  """The file of a config's name or path.

  Raises:
    FileNotFoundError: when there is no such file or name; lists the names.
  """
  # A name with a folder is found as well, but not listed: studies bring their own.
  shipped = configs_dir() / f"{source}.py"
  path = shipped if source and not source.startswith(("/", ".")) and shipped.is_file() else pathlib.Path(
      source).expanduser()
  if not path.is_file():
    near = difflib.get_close_matches(path.stem, config_names(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise FileNotFoundError(
        f"{option}={source} is neither a file nor a shipped config; {hint}shipped: {', '.join(config_names())}.")
  return path


def load_config(source: str) -> config_dict.ConfigDict:
  """The ConfigDict of a config file, as its `get_config()` returns it.

  Args:
    source: path of a Python file with `get_config()`, or the name of a shipped config.
  Raises:
    FileNotFoundError: when there is no such file or name; lists the names.
    ValueError: when the file fails or returns something else; names the line.
  """
  path = config_path(source)
  try:
    cd = runpy.run_path(str(path))["get_config"]()
  except (AttributeError, ImportError, KeyError, NameError, SyntaxError, TypeError, ValueError) as error:
    raise ValueError(f"--config={source} fails{_line_in(path, error)}: {_text(error)}; mend the file.") from error
  if not isinstance(cd, config_dict.ConfigDict):
    raise ValueError(
        f"--config={source}: get_config() returned {type(cd).__name__}; return that of hbpo_jax.config.new().")
  return cd


def wants_traceback(argv: Sequence[str]) -> bool:
  """Whether --traceback was given; asked before parsing, so that it also serves errors of parsing."""
  return any(a in ("--traceback", "--traceback=true", "-traceback") for a in argv)


def _normalise(argv: Sequence[str]) -> tuple[str | None, dict[str, None], list[str]]:
  """(config source, optional fields set to none, the other arguments with overrides as --config.field=value)."""
  source, cleared, rest = None, {}, []
  todo = list(argv)
  while todo:
    argument = todo.pop(0)
    flag, equals, text = argument.partition("=")
    if not re.fullmatch(r"--?(no)?config(\..*)?", flag, re.DOTALL):
      rest.append(argument)
      continue
    if (short := flag.lstrip("-").removeprefix("config.")) in _SHORT:
      flag = f"--config.{_SHORT[short]}"
    field = _field(flag)
    if not equals and not _is_switch(field):
      if not todo or todo[0].startswith("--"):
        raise ValueError(f"{flag} has no value; write {flag}=value.")
      text, equals = todo.pop(0), "="
    if not field:
      if source is not None:
        raise ValueError(f"--config is given twice, {source} and {text}; give one.")
      source = text
    elif config.field_table()[field].type == float | None and text.lower() == "none":
      cleared[field] = None
    else:
      cleared.pop(field, None)
      rest.append(f"{flag}{equals}{_tuple_text(field, text)}" if equals else flag)
  return source, cleared, rest


def _config_source(argv: Sequence[str]) -> str | None:
  """What --config names, in arguments that may not be understood otherwise."""
  for argument, after in zip(argv, [*argv[1:], "--"]):
    flag, equals, text = argument.partition("=")
    if flag in ("--config", "-config") and (equals or not after.startswith("-")):
      return text if equals else after
  return None


def _field(flag: str) -> str:
  """The dotted field of --config.FIELD or --noconfig.FIELD; '' for --config itself."""
  negated = flag.lstrip("-").startswith("no")
  field = flag.lstrip("-").removeprefix("no").removeprefix("config").removeprefix(".")
  table = config.field_table()
  if field and field not in table:
    inside = [n for n in table if n.startswith(field + ".")]
    # The last part alone finds budgets under rollout.
    near = inside or difflib.get_close_matches(field, table, n=3, cutoff=0.7) or [
        n for n in table if n.rpartition(".")[2] == field.rpartition(".")[2]]
    hint = f"did you mean {' or '.join('config.' + n for n in near[:3])}?" if near else "--help lists all settings."
    raise ValueError(f"config.{field} is not a setting; {hint}")
  if negated and not _is_switch(field):
    raise ValueError(f"{flag} negates a setting that is not true or false; write --config.{field}=value.")
  return field


def _is_switch(field: str) -> bool:
  return bool(field) and config.field_table()[field].type is bool


def _tuple_text(field: str, text: str) -> str:
  """The text of a value; that of a tuple brought into the one form that config_flags reads as intended."""
  kind = config.field_table()[field].type
  if kind == tuple[str, ...]:
    inner = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
    return repr(tuple(part.strip(" '\"") for part in inner.split(",") if part.strip(" '\"")))
  if kind != tuple[int, ...]:
    return text
  try:
    value = ast.literal_eval(text or "()")
  except (ValueError, SyntaxError) as error:
    raise ValueError(f"config.{field}={text!r} has the wrong type; give {usage.type_words(kind)}.") from error
  return repr(tuple(value) if isinstance(value, (tuple, list)) else (value,))


def _explain(message: str) -> str:
  """absl's message, in our words where a setting's value is at fault."""
  if bad := re.match(r"flag --(?:no)?config\.([\w.]+)=(.*?): ", message, flags=re.DOTALL):
    kind = config.field_table()[bad[1]].type
    return f"config.{bad[1]}={bad[2]!r} has the wrong type; give {usage.type_words(kind)}."
  return f"{message.rstrip('.')}; --help lists all flags."


def _flush() -> None:
  # Before the interpreter does it, which makes a traceback of a reader that has gone.
  if sys.stdout is not None:
    sys.stdout.flush()


def _reader_is_gone() -> bool:
  """Whether nobody reads the standard output any more; a pipe of this program's own may break as well."""
  poll = select.poll()
  poll.register(sys.stdout.fileno(), 0)
  return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _text(error: BaseException) -> str:
  text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
  return f"{type(error).__name__}: {' '.join(text.split())}".rstrip(".")


def _line_in(path: pathlib.Path, error: BaseException) -> str:
  if isinstance(error, SyntaxError):
    return f" at line {error.lineno}"
  numbers = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
  return f" at line {numbers[-1]}" if numbers else ""


def is_meant_for_user(error: BaseException) -> bool:
  """Whether an exception was raised on purpose for the reader, by a `raise` in this package."""
  if isinstance(error, _FILE_ERRORS) or files.storage_trouble(error):
    return True
  last = error.__traceback__
  while last is not None and last.tb_next is not None:
    last = last.tb_next
  if last is None or not pathlib.Path(last.tb_frame.f_code.co_filename).resolve().is_relative_to(_PACKAGE):
    return False
  # A ValueError of int() or of an unpacking in this package is a defect, so the instruction must be a `raise`.
  return last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
