"""The program `hbpo`: one sub-command for each module that is a command.

  hbpo train --config=quickstart --workdir=runs/quickstart     is python -m hbpo_jax.train --config=...
  hbpo completion bash                                         prints a script for the shell
"""

from collections.abc import Sequence
import difflib
import importlib
import pathlib
import sys

import hbpo_jax
from hbpo_jax import commands, completion, flags, usage

_COMPLETION = commands.Command(
    f"Print the script with which a shell completes `hbpo`: {', '.join(completion.SHELLS)}.", arguments="SHELL")
_TABLE = commands.COMMANDS | {"completion": _COMPLETION}


def cli(argv: Sequence[str] | None = None) -> None:
  """Runs the sub-command that the arguments name; None means the process's arguments.

  Raises:
    SystemExit: with the exit code of the sub-command, or 2 when there is none of that name.
  """
  arguments = list(sys.argv[1:] if argv is None else argv)
  with flags.one_line_errors(arguments):
    _run(arguments)


def _run(arguments: list[str]) -> None:
  name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
  if name in ("--help", "-h", "-help", "--helpfull"):
    program = "python -m hbpo_jax" if pathlib.Path(sys.argv[0]).name == "__main__.py" else "hbpo"
    print(usage.overview(program, _TABLE, hbpo_jax.__version__))
  elif name == "--version":
    print(f"hbpo_jax {hbpo_jax.__version__}")
  elif name == "completion":
    _print_completion(rest)
  elif name in commands.COMMANDS:
    flags.show_help(name, rest)  # Before the command is imported, which takes seconds.
    importlib.import_module(f"hbpo_jax.{name}").cli(rest)
  else:
    near = difflib.get_close_matches(name, _TABLE, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(_TABLE)}."
    raise ValueError(f"{name!r} is not a command; {hint}")


def _print_completion(arguments: list[str]) -> None:
  if any(a in ("--help", "-h") for a in arguments):
    print("\n".join([_COMPLETION.summary, "", f"usage: {commands.called('completion')} SHELL", "", *completion.HOW_TO]))
    return
  if len(arguments) != 1 or arguments[0] not in completion.SHELLS:
    given = " ".join(arguments) or "nothing"
    raise ValueError(f"completion takes the name of a shell, not {given}; give one of {', '.join(completion.SHELLS)}.")
  print(completion.script(arguments[0]), end="")


if __name__ == "__main__":
  cli()
