"""A study: methods compared at equal compute over seeds, and the cells it is cut into.

A cell is one warm start, or one run of a method with its evaluations; it ends in one JSON file, so that a study can be
run in several sittings. Cells need each other only as their `after` says.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import runpy
from typing import Any

from hbpo_jax import config, flags
from hbpo_jax.files import json_value

DESCRIPTION = "study.json"  # in a study's working directory


@dataclasses.dataclass(frozen=True)
class Method:
  """One way to train.

  name: of its cells.  title: in tables.  overrides: settings by dotted name, on top of the study's configuration.
  rate_of: the method whose learning rate is chosen for it; '' means its own.
  group: main (every seed), ablation (every seed) or rival (the study's rival_seeds).
  """
  name: str
  title: str
  overrides: Mapping[str, Any]
  rate_of: str = ""
  group: str = "main"


@dataclasses.dataclass(frozen=True)
class Study:
  """What is compared, and how.

  config: file or name of the configuration that all cells start from.
  methods: in the order of the tables.
  seeds: each has a warm start of its own, which all methods share.  rival_seeds: of the rivals, some of `seeds`.
  left_out: seeds whose warm start turned out too weak to compare from; it is measured and reported, no more.
  notes: Markdown at the end of the write-up, for what no number says.
  tune_seed: of the warm start and the problems on which learning rates are chosen; none of `seeds`.
  rates: learning rates to choose from; a method without choice takes optimizer.learning_rate.  rival_rates: of the
    rivals; () means rates.
  n_eval: fresh problems of a method's evaluation in natural mode.  n_modes: problems in every other mode.  n_tune: of a
    learning rate's evaluation.
  forced: modes (as in eval.modes) in which the warm start is measured besides natural.
  modes: other modes in which every method is measured.
  """
  config: str
  methods: tuple[Method, ...]
  seeds: tuple[int, ...]
  rival_seeds: tuple[int, ...]
  tune_seed: int
  rates: tuple[float, ...]
  n_eval: int
  n_modes: int
  n_tune: int
  forced: tuple[str, ...]
  modes: tuple[str, ...]
  rival_rates: tuple[float, ...] = ()
  left_out: tuple[int, ...] = ()
  notes: str = ""

  def rates_of(self, method: str) -> tuple[float, ...]:
    """The learning rates that are tried for a method."""
    group = next(m.group for m in self.methods if m.name == method)
    return self.rival_rates if group == "rival" and self.rival_rates else self.rates


@dataclasses.dataclass(frozen=True)
class Cell:
  """One piece of work.

  name: unique, and its JSON file's.  after: names of the cells that it needs.  rate: learning rate; None = of the
  configuration, or chosen from the cells of kind `tune`.
  """
  name: str
  kind: str
  method: str
  seed: int
  rate: float | None = None
  after: tuple[str, ...] = ()


def load(source: str) -> Study:
  """The Study that a file's `get_study()` returns.

  Args:
    source: path of a Python file, or the name of a shipped one.
  Raises:
    FileNotFoundError: when there is no such file.
    ValueError: when the file fails, or the study contradicts itself; names what and the remedy.
  """
  path = flags.config_path(source, "--study")
  study = runpy.run_path(str(path)).get("get_study", lambda: None)()
  if not isinstance(study, Study):
    raise ValueError(f"--study={source} has no get_study() that returns a Study; give the file of a study.")
  check(study)
  return study


def check(study: Study) -> None:
  """Raises ValueError when two methods share a name, a setting does not exist, or the seeds overlap."""
  names = [m.name for m in study.methods]
  if twice := [n for n in names if names.count(n) > 1]:
    raise ValueError(f"methods: {twice[0]!r} occurs twice; names are unique.")
  fields = config.field_table()
  for m in study.methods:
    if unknown := sorted(set(m.overrides) - set(fields)):
      raise ValueError(f"methods: {m.name!r} sets {unknown[0]!r}, which is no setting; see --help.")
    if m.rate_of and m.rate_of not in names:
      raise ValueError(f"methods: {m.name!r} takes the learning rate of {m.rate_of!r}, which is no method.")
    if m.group not in ("main", "ablation", "rival"):
      raise ValueError(f"methods: {m.name!r} is of group {m.group!r}; choose main, ablation or rival.")
  if study.tune_seed in study.seeds:
    raise ValueError(f"tune_seed={study.tune_seed} is also one of the seeds {study.seeds}; choose another.")
  if both := sorted({study.tune_seed, *study.seeds} & set(study.left_out)):
    raise ValueError(f"left_out={study.left_out} holds seed {both[0]}, which the study uses; remove it from one.")
  if study.rival_rates and not study.rates:
    raise ValueError(f"rival_rates={study.rival_rates}, but no rates of the other methods; give both or neither.")
  if not set(study.rival_seeds) <= set(study.seeds):
    raise ValueError(f"rival_seeds={study.rival_seeds} are not all among seeds={study.seeds}.")


def quick(study: Study) -> Study:
  """The study's main methods alone, with one seed and no choice of learning rates."""
  return dataclasses.replace(
      study, methods=tuple(dataclasses.replace(m, rate_of="") for m in study.methods if m.group == "main"),
      seeds=study.seeds[:1], left_out=(), rival_seeds=(), rates=(), rival_rates=(), n_eval=study.n_eval // 3,
      n_modes=study.n_modes // 3)


def describe(study: Study) -> dict[str, Any]:
  """What the write-up of a study tells besides its cells, as JSON: config, methods (in order), tune_seed, left_out and
  notes."""
  return json_value({
      "config": study.config, "methods": [dataclasses.asdict(m) for m in study.methods], "tune_seed": study.tune_seed,
      "left_out": study.left_out, "notes": study.notes})


def cells(study: Study, only: Sequence[str] = ()) -> list[Cell]:
  """Every cell, those that others need first.

  Args:
    only: names of methods; () means all. Warm starts and the choice of their learning rates come along.
  Raises:
    ValueError: when `only` names no method.
  """
  by_name = {m.name: m for m in study.methods}
  if unknown := sorted(set(only) - set(by_name)):
    raise ValueError(f"--only={unknown[0]} is no method of the study; choose among {', '.join(by_name)}.")
  methods = [m for m in study.methods if not only or m.name in only]
  chosen = list(dict.fromkeys(m.rate_of or m.name for m in methods)) if study.rates else []
  seeds = [study.tune_seed] * bool(chosen) + list(study.seeds)
  found = [Cell(f"warm_start/seed_{seed}", "warm_start", "warm_start", seed) for seed in (*seeds, *study.left_out)]
  for name in chosen:
    found += [
        Cell(f"tune/{name}/{rate:g}", "tune", name, study.tune_seed, rate, (f"warm_start/seed_{study.tune_seed}",))
        for rate in study.rates_of(name)]
  for seed in study.seeds:
    for m in methods:
      if m.group == "rival" and seed not in study.rival_seeds:
        continue
      tuned = tuple(f"tune/{m.rate_of or m.name}/{rate:g}" for rate in study.rates_of(m.rate_of or m.name))
      found.append(Cell(f"{m.name}/seed_{seed}", "method", m.name, seed, None, (f"warm_start/seed_{seed}", *tuned)))
  return found


def model_of(root: pathlib.Path, name: str) -> pathlib.Path:
  """The checkpoint that a cell trains."""
  return root / "runs" / name / "export"


def settings(study: Study, cell: Cell, root: pathlib.Path, rate: float | None = None) -> config.Config:
  """The settings that a cell trains with: the study's, its method's, its seed, its warm start and its learning rate."""
  overrides: dict[str, Any] = {"seed": cell.seed}
  if cell.kind != "warm_start":
    overrides |= next(m for m in study.methods if m.name == cell.method).overrides
    overrides["model.path"] = str(model_of(root, f"warm_start/seed_{cell.seed}"))
    if rate is not None:
      overrides["optimizer.learning_rate"] = rate
  return flags.build(flags.load_config(study.config), overrides)
