"""Runs one cell of a study in this process, and writes its JSON file.

  python -m hbpo_jax.studies.cell STUDY CELL DIR [--quick]
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import pathlib
import resource
import shutil
import sys
import time
from typing import Any

import numpy as np
import scipy.stats

from hbpo_jax import config, evaluate, preemption, run_info, sft, train
from hbpo_jax.config import Config
from hbpo_jax.data.modes import MODES
from hbpo_jax.evaluation import patterns, store
from hbpo_jax.files import atomic_write_text, json_value, read_rows
from hbpo_jax.studies import plan
from hbpo_jax.studies.plan import Cell, Study

FORMAT = 1
BENCHMARK = "synthetic"
EVAL_SEED = 1_000  # Evaluation problems are drawn from this seed and the cell's, in a split of their own.
TUNE_MARGIN = 0.01  # Learning rates within this much of the best accuracy are told apart by tokens.
# Metrics of training that the write-up draws, by their name in metrics.jsonl.
DYNAMICS = (
    "accuracy", "mean_tokens", "length_spread", "entropy", "reward", "zero_variance", "tokens_mean",
    "sentence_probability")


def path_of(root: pathlib.Path, name: str) -> pathlib.Path:
  """Where the JSON file of a cell is."""
  return root / "cells" / f"{name}.json"


def read(root: pathlib.Path, name: str) -> dict[str, Any]:
  """The JSON of a finished cell.

  Raises:
    FileNotFoundError: when the cell has not ended.
  """
  path = path_of(root, name)
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist: the cell has not been run.")
  return json.loads(path.read_text())


def run(study: Study, cell: Cell, root: pathlib.Path) -> dict[str, Any]:
  """Trains and evaluates as the cell says; returns what its JSON file holds.

  A cell that was killed starts its evaluation or training where it stopped.
  """
  started = time.perf_counter()
  cfg = settings(study, cell, root)
  asked = as_asked(study, cell, cfg)
  folder, model = root / "runs" / cell.name, plan.model_of(root, cell.name)
  if cell.kind == "warm_start":
    if not (model / "config.json").is_file():
      _finish(sft.main, cfg, folder)
    training = {}
  else:
    _finish(train.main, cfg, folder)
    training = _dynamics(folder)
  n = _n_problems(study, cell)
  modes = {"warm_start": study.forced + study.modes, "method": study.modes}.get(cell.kind, ())
  # Every method is measured with the same prompt and the same budgets, whatever it trained with.
  base = plan.settings(study, dataclasses.replace(cell, kind="warm_start"), root)
  cfg = dataclasses.replace(cfg, prompt=base.prompt, rollout=base.rollout)
  measured = _evaluate(cfg, model, folder / "natural", ("natural",), n, cell.seed)
  if modes:
    measured |= _evaluate(cfg, model, folder / "modes", modes, study.n_modes, cell.seed)
  for heavy in ("checkpoints", "verdicts", "tensorboard", "best"):
    shutil.rmtree(folder / heavy, ignore_errors=True)
  usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
  return {
      "format": FORMAT, "cell": cell.name, "kind": cell.kind, "method": cell.method, "seed": cell.seed,
      "learning_rate": cfg.optimizer.learning_rate, "steps": cfg.steps,
      "settings": asked, "modes": measured, "training": training,
      "cpu_s": sum(u.ru_utime + u.ru_stime for u in usage), "wall_s": time.perf_counter() - started,
      "git": run_info.git_state(pathlib.Path(__file__).resolve().parent)}


def _finish(command: Callable[[Config, str], None], cfg: Config, folder: pathlib.Path) -> None:
  """Runs a command; ends the process with its state saved, where it was asked to stop."""
  command(cfg, str(folder))
  if (folder / preemption.STOPPED).exists():
    sys.exit(f"stopped; running the cell again goes on from {folder}.")


def settings(study: Study, cell: Cell, root: pathlib.Path) -> Config:
  """What a cell trains with, its learning rate chosen.

  Raises:
    FileNotFoundError: when a learning rate has not been tried yet.
  """
  rate = choose_rate(study, cell, root) if cell.kind == "method" and study.rates else cell.rate
  return plan.settings(study, cell, root, rate)


def as_asked(study: Study, cell: Cell, cfg: Config) -> dict[str, Any]:
  """What decides a cell's numbers: its settings other than the defaults, by dotted name, and `n_eval`; JSON values."""
  decides = (*sft.DECISIVE, "eval.") if cell.kind == "warm_start" else ""
  return json_value({"n_eval": _n_problems(study, cell)} | {
      name: value for name, value, _ in config.differences(cfg, Config())
      if name.startswith(decides) and name != "model.path"})


def check(study: Study, cell: Cell, root: pathlib.Path) -> None:
  """Refuses a finished cell that the study would not make so any more.

  Raises:
    ValueError: names the file, what differs with both values, and the remedy.
  """
  if not path_of(root, cell.name).is_file():
    return
  made = read(root, cell.name).get("settings", {})
  try:
    cfg = settings(study, cell, root)
  except FileNotFoundError:
    return  # Its learning rate is not known before those that are left have been tried.
  wanted = as_asked(study, cell, cfg)
  if made == wanted:
    return
  of = lambda found, name: repr(found[name]) if name in found else "the default"
  differs = [f"{n} was {of(made, n)}, now {of(wanted, n)}" for n in sorted(made.keys() | wanted.keys())
             if n not in made or n not in wanted or made[n] != wanted[n]]
  raise ValueError(
      f"{path_of(root, cell.name)} was made otherwise ({', '.join(differs)}); delete it and {root / 'runs' / cell.name}"
      " to have it made again, or give another --workdir.")


def _n_problems(study: Study, cell: Cell) -> int:
  return study.n_tune if cell.kind == "tune" else study.n_eval


def choose_rate(study: Study, cell: Cell, root: pathlib.Path) -> float:
  """The `best_rate` of those tried for a cell.

  Raises:
    FileNotFoundError: when one has not been tried.
  """
  return best_rate([read(root, name) for name in cell.after if name.startswith("tune/")])


def best_rate(tried: Sequence[Mapping[str, Any]]) -> float:
  """Of cells that tried a learning rate, the rate of that with the fewest tokens among those within TUNE_MARGIN of the
  best accuracy."""
  best = max(t["modes"]["natural"]["accuracy"] for t in tried)
  near = [t for t in tried if t["modes"]["natural"]["accuracy"] >= best - TUNE_MARGIN]
  return min(near, key=lambda t: t["modes"]["natural"]["tokens"])["learning_rate"]


def _evaluate(
    cfg: Config, model: pathlib.Path, folder: pathlib.Path, modes: tuple[str, ...], n: int, seed: int,
) -> dict[str, Any]:
  """The numbers of each mode on `n` fresh problems."""
  cfg = dataclasses.replace(
      cfg, seed=EVAL_SEED + seed, model=dataclasses.replace(cfg.model, path=str(model)),
      data=dataclasses.replace(cfg.data, n_eval=n),
      eval=dataclasses.replace(cfg.eval, modes=modes, benchmarks=(BENCHMARK,)))
  _finish(evaluate.main, cfg, folder)
  rows = store.open_existing(folder).rows[BENCHMARK]
  pattern = patterns.budget_pattern(cfg.prompt.budget_sentence)
  return {
      mode: numbers([row for row in rows if row["mode"] == mode], pattern if mode == "natural" else None)
      for mode in dict.fromkeys(row["mode"] for row in rows)}


def numbers(rows: list[Mapping[str, Any]], pattern: Any) -> dict[str, Any]:
  """What a cell keeps of the responses of one mode.

  Args:
    rows: of the evaluation's store: score, n_gen, truncated, level, response.
    pattern: of `patterns.budget_pattern`; None where no stated budget is looked for.
  Returns:
    accuracy, tokens, truncated (means), n, by_level: {level, n, accuracy, tokens, spread (standard deviation of
    tokens)}, level_correlation (Spearman, tokens and level), states_budget (share), budget_correlation (Spearman,
    stated budget and level; None where fewer than two budgets are stated), budgets (by level, count of each budget),
    openings (by level, count of each mode of `data.modes` that responses name first), opening_correlation (Spearman of
    its place in MODES and level).
  """
  level, score, tokens = (np.array([row[k] for row in rows], float) for k in ("level", "score", "n_gen"))
  stated = [patterns.read(row["response"], pattern).budget for row in rows]
  says = np.array([b is not None for b in stated])
  budget = np.array([b or 0 for b in stated], float)
  opening = np.array([_opening(row["response"]) for row in rows])
  levels = sorted(set(level.tolist()))
  return {
      "n": len(rows), "accuracy": float(score.mean()), "tokens": float(tokens.mean()),
      "truncated": float(np.mean([bool(row["truncated"]) for row in rows])),
      "by_level": [{
          "level": int(k), "n": int((level == k).sum()), "accuracy": float(score[level == k].mean()),
          "tokens": float(tokens[level == k].mean()), "spread": float(tokens[level == k].std())} for k in levels],
      "level_correlation": _spearman(tokens, level),
      "states_budget": float(says.mean()), "budget_correlation": _spearman(budget[says], level[says]),
      "budgets": {str(int(k)): _counts(budget[says & (level == k)]) for k in levels},
      "openings": {
          str(int(k)): {m: int(((opening == i) & (level == k)).sum()) for i, m in enumerate(MODES)} for k in levels},
      "opening_correlation": _spearman(opening[opening >= 0], level[opening >= 0])}


def _opening(response: str) -> int:
  """The place in MODES of the mode that a response names first; -1 where it names none."""
  return next((MODES.index(word) for word in response.split() if word in MODES), -1)


def _spearman(x: np.ndarray, y: np.ndarray) -> float | None:
  if len(set(x.tolist())) < 2 or len(set(y.tolist())) < 2:
    return None
  return float(scipy.stats.spearmanr(x, y).statistic)


def _counts(values: np.ndarray) -> dict[str, int]:
  return {str(int(v)): int((values == v).sum()) for v in np.unique(values)}


def _dynamics(folder: pathlib.Path) -> dict[str, list[float | None]]:
  rows = read_rows(folder / "metrics.jsonl")
  names = [n for n in rows[0] if n.rpartition("/")[2] in DYNAMICS and not n.startswith("eval/")] if rows else []
  return {name: [_short(row.get(name)) for row in rows] for name in ["step", *names]}


def _short(value: float | None) -> float | None:
  """To five digits, which is what a figure shows: a study has more than a hundred cells."""
  return value if value is None else float(f"{value:.5g}")


def main() -> None:
  """The cell of the command line."""
  source, name, root = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
  study = plan.load(source)
  if "--quick" in sys.argv[4:]:
    study = plan.quick(study)
  cell = next(c for c in plan.cells(study) if c.name == name)
  atomic_write_text(path_of(root, name), json.dumps(json_value(run(study, cell, root))) + "\n")


if __name__ == "__main__":
  main()
