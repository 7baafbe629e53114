"""Makes one self-contained page, with Markdown, LaTeX tables and figures, from training runs and evaluations.

  python -m hbpo_jax.report runs/quickstart --out=runs/quickstart/report
  python -m hbpo_jax.report base=eval/base trained=eval/trained --out=report
"""

from hbpo_jax import flags

if __name__ == "__main__":
  flags.show_help("report")  # Before the imports below, which take seconds.

import argparse
from collections.abc import Sequence
import contextlib
import os
import pathlib
import sys

from hbpo_jax import bucket
from hbpo_jax.files import atomic_write_bytes, atomic_write_text
from hbpo_jax.reporting import page, runs, sample_view
from hbpo_jax.studies import writeup


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """The arguments: runs, out, title, samples, traceback; what they mean is in `commands.COMMANDS`.

  Raises:
    ValueError: when they are not understood.
  """
  parser = flags.Parser("report")
  parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN")
  parser.add_argument("--out", required=True, metavar="DIR")
  parser.add_argument("--title", default="")
  parser.add_argument("--samples", type=int, default=sample_view.MOST, metavar="N")
  return parser.parse_args(argv)


def write(arguments: argparse.Namespace) -> list[pathlib.Path]:
  """Writes the report, each file whole or not at all, the page last; returns the paths.

  Raises:
    FileNotFoundError: when a run does not exist.
    ValueError: when a run cannot be read, or DIR is a file or that of a run.
  """
  out = pathlib.Path(arguments.out).expanduser()
  if bucket.is_url(arguments.out):
    raise ValueError(f"--out={arguments.out} is no directory; give one, and copy it to the bucket.")
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


def _on_disk(run: str, stack: contextlib.ExitStack) -> str:
  """[NAME=]PATH of a run that may lie in a bucket, with the path of a copy in its place."""
  name, equals, path = run.partition("=") if "=" in run.partition("://")[0] else ("", "", run)
  return f"{name}{equals}{stack.enter_context(bucket.reading(path, 'RUN'))}"


def main(argv: Sequence[str] | None = None) -> None:
  """The command.

  Raises:
    SystemExit: 0 after --help, 2 after an error of the user's.
  """
  arguments = list(sys.argv[1:] if argv is None else argv)
  flags.show_help("report", arguments)
  with flags.one_line_errors(arguments), contextlib.ExitStack() as stack:
    parsed = parse(arguments)
    parsed.runs = [_on_disk(run, stack) for run in parsed.runs]
    write(parsed)


def cli(argv: Sequence[str] | None = None) -> None:
  """Runs the command with these arguments; None means the process's."""
  os.environ.setdefault("JAX_PLATFORMS", "cpu")  # A training run may hold the accelerator; reward curves need none.
  main(argv)


if __name__ == "__main__":
  cli()
