"""What a report reads: training runs with their evaluations, and evaluations on their own."""

from collections.abc import Sequence
import dataclasses
import os
import pathlib
import re
from typing import Any

from hbpo_jax import config, run_info
from hbpo_jax.evaluation import results as results_lib
from hbpo_jax.evaluation import store
from hbpo_jax.evaluation.store import Evaluated
from hbpo_jax.files import parse_json, read_rows

_STEP = re.compile(r"step_(\d+)")
_LARGEST = 1e300  # of a metric
_TRAINED_STEP = 10**9  # After every step.


@dataclasses.dataclass(frozen=True)
class Assessed:
  """An evaluation with its numbers.

  name: as tables and legends call it.  stage: base, trained, step, or alone.  step: of a `step`, else None.
  results: what `evaluation.results.compute` returns.
  """
  name: str
  stage: str
  step: int | None
  evaluated: Evaluated
  results: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
  """A training run, or an evaluation on its own.

  info: run.json, None for an evaluation.  metrics, samples: rows of metrics.jsonl and samples.jsonl, maybe none.
  evaluations: base, mid-run by step, trained; or the one.  notes: sentences on what was left out.
  """
  name: str
  path: pathlib.Path
  info: dict[str, Any] | None
  metrics: list[dict[str, Any]]
  samples: list[dict[str, Any]]
  evaluations: tuple[Assessed, ...]
  notes: tuple[str, ...] = ()

  @property
  def settings(self) -> dict[str, Any]:
    """All settings by dotted name."""
    if self.info is not None:
      return config.flatten(self.info["config"])
    return config.flatten(self.evaluations[0].evaluated.manifest["settings"])

  @property
  def main(self) -> tuple[Assessed, ...]:
    """The evaluations that stand for the run: before and after training, or the one."""
    return tuple(e for e in self.evaluations if e.stage != "step")


def read_all(arguments: Sequence[str]) -> list[Run]:
  """The runs that a command line names, each `PATH` or `NAME=PATH`, with unique names.

  Raises:
    FileNotFoundError: when a directory does not exist.
    ValueError: when a directory holds no run, or a file of it is damaged or of another format.
  """
  if not arguments:
    raise ValueError("no run is given; name at least one directory of a training run or an evaluation.")
  named = [_split(argument) for argument in arguments]
  given = [name for name, _ in named if name]
  if repeated := [name for name in given if given.count(name) > 1]:
    raise ValueError(f"the name {repeated[0]!r} is given to two runs; name them apart.")
  taken = set(given)
  found = []
  for name, path in named:
    if name is None:
      name = _unique(path.resolve().name or "run", taken)
      taken.add(name)
    found.append(read(path, name, alone=len(named) == 1))
  return found


def read(path: str | os.PathLike, name: str, *, alone: bool = False) -> Run:
  """The run in a directory.

  A last line of a log that a kill cut in half is left out, and a note says so.

  Args:
    path: of a training run (run.json or metrics.jsonl) or of an evaluation (eval.json).
    name: of the run.
    alone: whether no other run is read, so that its evaluations need not carry its name.
  Raises:
    FileNotFoundError: when there is no such directory.
    ValueError: when it holds no run, or a file is damaged or of another format; names file, line and remedy.
  """
  root = pathlib.Path(path).expanduser()
  if not root.is_dir():
    raise FileNotFoundError(
        f"{root} is not a directory; give that of a training run (--workdir of hbpo_jax.train) or of an evaluation "
        "(--workdir of hbpo_jax.evaluate).")
  if store.is_evaluation(root):
    one = _assess(root, name, "alone", None)
    return Run(name, root, None, [], [], (one,), one.evaluated.notes)
  info = _read_info(root / "run.json")
  metrics, samples = root / "metrics.jsonl", root / "samples.jsonl"
  evaluations = _read_evaluations(root, "" if alone else f"{name}: ")
  if info is None and not metrics.is_file() and not evaluations:
    raise ValueError(
        f"{root} holds no run: there is no run.json, metrics.jsonl or eval/*/eval.json of a training run, and no "
        "eval.json of an evaluation. Give the --workdir of hbpo_jax.train or hbpo_jax.evaluate.")
  notes = [note for e in evaluations for note in e.evaluated.notes]
  if info is None:
    notes.append(f"{root / 'run.json'} is missing, so the settings are not known.")
  notes += [f"{log} ends in half a line; that line is left out." for log in (metrics, samples) if _is_cut(log)]
  notes += [
      f"{old} is an evaluation of an older version, without its problems and modes; it is left out. Evaluate again."
      for old in sorted((root / "eval").glob("*.jsonl"))]
  return Run(
      name, root, info or {"config": {}}, _read_metrics(metrics) if metrics.is_file() else [],
      read_rows(samples) if samples.is_file() else [], tuple(evaluations), tuple(notes))


def different_settings(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
  """(setting, its value in each run, None where a run lacks it) where the runs that have it differ."""
  settings = [run.settings for run in runs]
  found = []
  for name in dict.fromkeys(name for of_run in settings for name in of_run):
    known = [of_run[name] for of_run in settings if name in of_run]
    if any(value != known[0] for value in known):
      found.append((name, [of_run.get(name) for of_run in settings]))
  return found


def _split(argument: str) -> tuple[str | None, pathlib.Path]:
  """(name or None, path); a path that exists as it is written may hold an equals sign."""
  name, equals, path = argument.partition("=")
  if not equals or pathlib.Path(argument).expanduser().exists():
    return None, pathlib.Path(argument).expanduser()
  if not name or not path:
    raise ValueError(f"{argument!r} has no {'name' if not name else 'path'}; write NAME=PATH or PATH.")
  return name, pathlib.Path(path).expanduser()


def _unique(name: str, taken: set[str]) -> str:
  if name not in taken:
    return name
  return next(f"{name} ({i})" for i in range(2, len(taken) + 3) if f"{name} ({i})" not in taken)


def _read_evaluations(root: pathlib.Path, prefix: str) -> list[Assessed]:
  found = []
  for folder in sorted((root / "eval").glob("*")):
    if not store.is_evaluation(folder) or store.ASIDE in folder.name:
      continue
    if folder.name in ("base", "trained"):
      step, stage, name = None, folder.name, "before" if folder.name == "base" else "after"
    elif match := _STEP.fullmatch(folder.name):
      step, stage = int(match[1]), "step"
      name = f"step {step}"
    else:
      step, stage, name = None, "alone", folder.name
    found.append(_assess(folder, prefix + name, stage, step))
  place = {"base": -1, "trained": _TRAINED_STEP, "alone": _TRAINED_STEP + 1}
  return sorted(found, key=lambda e: (e.step if e.step is not None else place[e.stage], e.name))


def _assess(folder: pathlib.Path, name: str, stage: str, step: int | None) -> Assessed:
  evaluated = store.open_existing(folder)
  sentence = config.flatten(evaluated.manifest["settings"]).get("prompt.budget_sentence")
  if not isinstance(sentence, str):
    raise ValueError(
        f"{folder / store.MANIFEST} has no setting prompt.budget_sentence; restore it, or evaluate again in another "
        "directory.")
  # Computed anew rather than read from results.json: responses may have been added since, and versions may differ.
  return Assessed(name, stage, step, evaluated, results_lib.compute(evaluated, budget_sentence=sentence))


def _read_info(path: pathlib.Path) -> dict[str, Any] | None:
  if not path.is_file():
    return None
  try:
    info = parse_json(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON ({error}); restore it, or start the run again to have it written.") from error
  if not isinstance(info, dict) or not isinstance(info.get("config"), dict):
    raise ValueError(f"{path} is not a run.json of this program; it needs the entry 'config'. Restore it.")
  if info.get("format", 1) != run_info.FORMAT:  # The first format had no such entry.
    raise ValueError(
        f"{path} is of format {info['format']!r}, written by hbpo_jax {info.get('hbpo_jax', '?')}; this version reads "
        f"format {run_info.FORMAT}. Use that version.")
  return info


def _read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  rows = read_rows(path)
  for row in rows:
    for tag, value in row.items():
      if value is not None and (type(value) not in (int, float) or abs(value) > _LARGEST):
        raise ValueError(f"{path}, step {row['step']}: {tag}={str(value)[:40]!r} is no number; remove that line.")
  return rows


def _is_cut(path: pathlib.Path) -> bool:
  """Whether a log ends in the middle of a line."""
  if not path.is_file() or not path.stat().st_size:
    return False
  with open(path, "rb") as f:
    f.seek(-1, os.SEEK_END)
    return f.read() != b"\n"
