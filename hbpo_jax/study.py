"""Compares methods over seeds at equal compute: warm starts, choice of learning rates, runs, evaluations.

  python -m hbpo_jax.study --study=miniature/study --workdir=runs/miniature --jobs=2

Each cell runs in a process of its own and ends in WORKDIR/cells/NAME.json. Running the same command again does what is
left; `python -m hbpo_jax.report WORKDIR --out=DIR` writes up what is there.
"""

from hbpo_jax import flags

if __name__ == "__main__":
  flags.show_help("study")  # Before the imports below, which take seconds.

import argparse
from collections.abc import Sequence
import json
import os
import pathlib
import subprocess
import sys
import time

from hbpo_jax.files import atomic_write_text
from hbpo_jax.studies import cell as cell_lib
from hbpo_jax.studies import plan
from hbpo_jax.studies.plan import Cell, Study

_POLL_S = 0.5


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """The arguments: study, workdir, jobs, only, quick, list, traceback; what they mean is in `commands.COMMANDS`.

  Raises:
    ValueError: when they are not understood.
  """
  parser = flags.Parser("study")
  parser.add_argument("--study", default="miniature/study")
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
  parser.add_argument("--only", default="")
  parser.add_argument("--quick", action="store_true")
  parser.add_argument("--list", action="store_true")
  return parser.parse_args(argv)


def run(study: Study, cells: Sequence[Cell], root: pathlib.Path, arguments: argparse.Namespace) -> list[str]:
  """Runs what is left of the cells, `jobs` at a time; returns the names of those that failed or could not start."""
  left = to_do(cells, root)
  n_left, failed = len(left), []
  print(f"{len(cells)} cells, {len(cells) - n_left} done before", flush=True)
  running: dict[int, tuple[Cell, subprocess.Popen, float]] = {}
  while left or running:
    for slot in range(arguments.jobs):
      missing = {*failed, *(c.name for c in left), *(c.name for c, _, _ in running.values())}
      ready = next((c for c in left if missing.isdisjoint(c.after)), None)
      if slot not in running and ready is not None:
        left.remove(ready)
        running[slot] = (ready, _start(ready, root, arguments, slot), time.monotonic())
    if not running:
      break  # What is left needs a cell that failed.
    time.sleep(_POLL_S)
    for slot, (cell, process, since) in list(running.items()):
      if process.poll() is None:
        continue
      del running[slot]
      done = process.returncode == 0 and cell_lib.path_of(root, cell.name).is_file()
      if not done:
        failed.append(cell.name)
      print(f"{cell.name}: {_say(root, cell) if done else f'failed, see {_log(root, cell)}'} "
            f"({time.monotonic() - since:.0f} s; {len(left) + len(running)} cells left)", flush=True)
  return failed + [c.name for c in left]


def to_do(cells: Sequence[Cell], root: pathlib.Path) -> list[Cell]:
  """The cells that have no JSON file, and the warm starts that these need and whose models are gone."""
  missing = [c for c in cells if not cell_lib.path_of(root, c.name).is_file()]
  needed = {name for c in missing for name in c.after}
  gone = [c for c in cells if c.kind == "warm_start" and c.name in needed and not plan.model_of(root, c.name).exists()]
  return [c for c in cells if c in missing or c in gone]


def _start(cell: Cell, root: pathlib.Path, arguments: argparse.Namespace, slot: int) -> subprocess.Popen:
  cores = sorted(os.sched_getaffinity(0))
  share = cores[slot % len(cores)::arguments.jobs] or [cores[slot % len(cores)]]
  log = _log(root, cell)
  log.parent.mkdir(parents=True, exist_ok=True)
  command = [sys.executable, "-m", "hbpo_jax.studies.cell", arguments.study, cell.name, str(root)]
  with log.open("ab") as output:
    return subprocess.Popen(
        command + ["--quick"] * arguments.quick, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        env={"JAX_PLATFORMS": "cpu", **os.environ}, preexec_fn=lambda: os.sched_setaffinity(0, share))


def _log(root: pathlib.Path, cell: Cell) -> pathlib.Path:
  return root / "logs" / f"{cell.name}.txt"


def _say(root: pathlib.Path, cell: Cell) -> str:
  content = cell_lib.read(root, cell.name)
  natural = content["modes"]["natural"]
  return (f"accuracy {100 * natural['accuracy']:.1f} %, {natural['tokens']:.1f} tokens, learning rate "
          f"{content['learning_rate']:g}, {content['cpu_s'] / 60:.1f} CPU-minutes")


def main(argv: Sequence[str]) -> None:
  """Runs the study that the arguments ask for.

  Raises:
    SystemExit: 1 when a cell failed.
    ValueError: when an argument or a setting is wrong, before anything runs.
  """
  arguments = parse(argv)
  if arguments.jobs < 1:
    raise ValueError(f"--jobs={arguments.jobs} runs nothing; give at least 1.")
  root = pathlib.Path(arguments.workdir).expanduser()
  study = plan.load(arguments.study)
  study = plan.quick(study) if arguments.quick else study
  cells = plan.cells(study, [name for name in arguments.only.split(",") if name])
  if arguments.list:
    for c in cells:
      print(f"{'done' if cell_lib.path_of(root, c.name).is_file() else 'to do'}\t{c.name}")
    return
  for c in cells:  # Every setting is refused here, before any time is spent.
    plan.settings(study, c, root, c.rate)
    cell_lib.check(study, c, root)
  atomic_write_text(root / plan.DESCRIPTION, json.dumps(plan.describe(study), indent=1) + "\n")
  if failed := run(study, cells, root, arguments):
    print(f"error: {len(failed)} cells are missing: {', '.join(failed)}; mend what their logs say and run this again.",
          file=sys.stderr)
    sys.exit(1)


def cli(argv: Sequence[str] | None = None) -> None:
  """Runs the command with these arguments; None means the process's."""
  arguments = list(sys.argv[1:] if argv is None else argv)
  flags.show_help("study", arguments)
  with flags.one_line_errors(arguments):
    main(arguments)


if __name__ == "__main__":
  cli()
