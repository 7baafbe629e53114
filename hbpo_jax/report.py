"""Makes one self-contained page, with Markdown, LaTeX tables and figures, from training runs and evaluations.

  python -m hbpo_jax.report runs/quickstart --out=runs/quickstart/report
  python -m hbpo_jax.report base=eval/base trained=eval/trained --out=report
"""

import argparse
from collections.abc import Sequence
import os
import pathlib
import sys
import traceback
from typing import NoReturn

from hbpo_jax import flags
from hbpo_jax.files import atomic_write_bytes, atomic_write_text
from hbpo_jax.reporting import page, runs, sample_view
from hbpo_jax.studies import writeup


class _Parser(argparse.ArgumentParser):
  """Raises what is wrong with a command line, so that it ends like every other error."""

  def error(self, message: str) -> NoReturn:
    raise ValueError(f"{message}; --help lists all arguments.")


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """The arguments: runs, out, title, samples, traceback.

  Raises:
    ValueError: when they are not understood.
    SystemExit: 0 after --help.
  """
  parser = _Parser(prog="python -m hbpo_jax.report", allow_abbrev=False, description=(
      "Make one self-contained page, with Markdown, LaTeX tables and figures, from training runs and evaluations."))
  parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help=(
      "directory of a training run (with its evaluations), of an evaluation, or of a study; NAME is what the report "
      "calls it"))
  parser.add_argument("--out", required=True, metavar="DIR", help=(
      "where index.html, report.md, tables.tex and plots/ go, or of a study NAME.md, NAME.json and NAME_*.png; what is "
      "there by these names is replaced"))
  parser.add_argument("--title", default="", help="heading of the report (default: the runs' names)")
  parser.add_argument("--samples", type=int, default=sample_view.MOST, metavar="N", help=(
      "most pairs of problem and mode whose responses are on the page (default: %(default)s)"))
  parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
  return parser.parse_args(argv)


def write(arguments: argparse.Namespace) -> list[pathlib.Path]:
  """Writes the report, each file whole or not at all, the page last; returns the paths.

  Raises:
    FileNotFoundError: when a run does not exist.
    ValueError: when a run cannot be read, or DIR is a file or that of a run.
  """
  out = pathlib.Path(arguments.out).expanduser()
  if out.exists() and not out.is_dir():
    raise ValueError(f"--out={arguments.out} is a file; give a directory, which is made if it is missing.")
  if studied := [p for p in arguments.runs if writeup.is_study(pathlib.Path(p.partition("=")[2] or p).expanduser())]:
    return _write_study(studied, out)
  found = runs.read_all(arguments.runs)
  if mine := [run for run in found if run.path.resolve() == out.resolve()]:
    raise ValueError(
        f"--out={arguments.out} is the directory of the run {mine[0].name!r}, whose plots would be replaced; give "
        "another, such as its subdirectory report.")
  report = page.make(found, arguments.title or "Report: " + ", ".join(r.name for r in found), arguments.samples)
  texts = {"report.md": page.to_markdown(report), "tables.tex": page.to_latex(report),
           "index.html": page.to_html(report)}
  written = []
  for picture in report.pictures:
    written.append(out / "plots" / f"{picture.name}.png")
    atomic_write_bytes(written[-1], picture.data)
  for name, text in texts.items():
    written.append(out / name)
    atomic_write_text(written[-1], text)
  print(report.headline)
  print(f"see {written[-1]}")
  return written


def _write_study(arguments: Sequence[str], out: pathlib.Path) -> list[pathlib.Path]:
  """A study is written up alone: OUT/NAME.md, NAME.json and figures."""
  if len(arguments) > 1:
    raise ValueError(f"{arguments[0]} and {arguments[1]} are two studies; write up one at a time.")
  name, equals, path = arguments[0].partition("=")
  root = pathlib.Path(path if equals else name).expanduser()
  written = writeup.write(root, name if equals else root.resolve().name, out)
  print(f"see {written[-1]}")
  return written


def main(argv: Sequence[str] | None = None) -> None:
  """The command.

  Raises:
    SystemExit: 0 after --help, 2 after an error of the user's.
  """
  arguments = list(sys.argv[1:] if argv is None else argv)
  try:
    write(parse(arguments))
  except (ValueError, OSError) as error:
    if not flags.is_meant_for_user(error):
      raise
    if flags.wants_traceback(arguments):
      traceback.print_exc()
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")  # A training run may hold the accelerator; reward curves need none.
  main()
