"""What the cells of a study say together: means over seeds, paired differences, and which claims they bear out."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np
import scipy.stats

from hbpo_jax.studies import plan

Cells = Mapping[str, Mapping[int, Mapping[str, Any]]]  # by method, then seed: the JSON of a cell
Measure = Callable[[Mapping[str, Any]], float | None]
WARM_START = "warm_start"
FORCED = "say:"
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean over seeds with its 95 % interval of Student's t; low and high are None for one seed, mean for none."""
  mean: float | None
  low: float | None
  high: float | None
  seeds: int

  @property
  def value(self) -> float:
    """The mean, NaN where there is none."""
    return math.nan if self.mean is None else self.mean

  def to_json(self) -> dict[str, Any]:
    """As a dict of plain values."""
    return dataclasses.asdict(self)


def estimate(values: Sequence[float | None]) -> Estimate:
  """The Estimate of one value per seed; None and NaN are left out."""
  x = np.array([v for v in values if v is not None and math.isfinite(v)], float)
  if not len(x):
    return Estimate(None, None, None, 0)
  mean = float(x.mean())
  if len(x) == 1:
    return Estimate(mean, None, None, 1)
  half = float(scipy.stats.t.ppf(0.5 + CONFIDENCE / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
  return Estimate(mean, mean - half, mean + half, len(x))


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a study's directory holds.

  cells: of the comparison, by method, in the order of the study.
  tuning: the cells that tried a learning rate.
  warm_starts: by seed, those that no method was trained from among them.
  about: of `plan.describe`; {} where the directory has none.
  """
  cells: Cells
  tuning: Sequence[Mapping[str, Any]]
  warm_starts: Mapping[int, Mapping[str, Any]]
  about: Mapping[str, Any]


def read(root: pathlib.Path) -> Outcome:
  """The cells of a study's directory and its description.

  Raises:
    FileNotFoundError: when there is no cell.
    ValueError: when a file is damaged; names it.
  """
  by_method: dict[str, dict[int, dict[str, Any]]] = {}
  tuning = []
  for path in sorted((root / "cells").rglob("*.json")):
    content = _parsed(path, ("kind", "method", "seed"))
    if content["kind"] == "tune":
      tuning.append(content)
    else:
      by_method.setdefault(content["method"], {})[content["seed"]] = content
  if not by_method:
    raise FileNotFoundError(f"{root / 'cells'} holds no cell; run python -m hbpo_jax.study first.")
  path = root / plan.DESCRIPTION
  about = _parsed(path, ("methods", "notes")) if path.is_file() else {}
  order = [WARM_START, *(m["name"] for m in about.get("methods", ()))]
  by_method = {m: by_method[m] for m in sorted(by_method, key=lambda m: order.index(m) if m in order else len(order))}
  warm_starts = by_method.get(WARM_START, {})
  # Warm starts of the learning rates' choice, and those left out, are no seeds of the comparison.
  seeds = {s for method, cells in by_method.items() if method != WARM_START for s in cells}
  if seeds:
    by_method[WARM_START] = {s: c for s, c in warm_starts.items() if s in seeds}
  return Outcome(by_method, tuning, warm_starts, about)


def _parsed(path: pathlib.Path, needs: Sequence[str]) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text())
    for key in needs:
      content[key]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is damaged ({error!r}); delete it and run the study again.") from error
  return content


def over_seeds(cells: Cells, method: str, measure: Measure) -> Estimate:
  """A measure of a method."""
  return estimate([measure(cell) for cell in cells.get(method, {}).values()])


def difference(cells: Cells, method: str, other: str, measure: Measure) -> Estimate:
  """method minus other, paired by seed; of the seeds that both have."""
  a, b = cells.get(method, {}), cells.get(other, {})
  pairs = [(measure(a[s]), measure(b[s])) for s in sorted(set(a) & set(b))]
  return estimate([x - y for x, y in pairs if x is not None and y is not None])


def natural(field: str) -> Measure:
  """Measures a field of the natural mode."""
  return lambda cell: cell["modes"]["natural"][field]


def hardest_third(field: str) -> Measure:
  """Measures accuracy or tokens over the hardest third of the levels, in natural mode, each problem alike."""
  def measure(cell):
    levels = cell["modes"]["natural"]["by_level"]
    hard = levels[-math.ceil(len(levels) / 3):]
    return sum(part[field] * part["n"] for part in hard) / sum(part["n"] for part in hard)
  return measure


def at_level(level: int, field: str) -> Measure:
  """Measures a field at one level, in natural mode."""
  return lambda cell: next(p[field] for p in cell["modes"]["natural"]["by_level"] if p["level"] == level)


def levels_of(cells: Cells) -> list[int]:
  """The levels that were evaluated."""
  one = next(iter(next(iter(cells.values())).values()))
  return [part["level"] for part in one["modes"]["natural"]["by_level"]]


def best_modes(cell: Mapping[str, Any], margin: float) -> dict[str, float]:
  """What a warm start would reach if it chose its mode by the level alone, and stayed as good as it is in each.

  Args:
    cell: of a warm start that was measured in forced modes ("say:MODE").
    margin: at each level the shortest mode is taken whose accuracy is at most this much under the best.
  Returns:
    accuracy, hard (accuracy of the hardest third), tokens; levels weigh alike.
  """
  forced = [m["by_level"] for name, m in cell["modes"].items() if name.startswith(FORCED)]
  if not forced:
    return {}
  chosen = []
  for at in zip(*forced, strict=True):
    best = max(p["accuracy"] for p in at)
    chosen.append(min((p for p in at if p["accuracy"] >= best - margin), key=lambda p: p["tokens"]))
  hard = chosen[-math.ceil(len(chosen) / 3):]
  return {
      "accuracy": float(np.mean([p["accuracy"] for p in chosen])),
      "hard": float(np.mean([p["accuracy"] for p in hard])),
      "tokens": float(np.mean([p["tokens"] for p in chosen]))}


def kept_spread(cell: Mapping[str, Any]) -> float | None:
  """Spread of lengths within a query over the last tenth of training, as a share of that over the first tenth."""
  values = next((v for k, v in cell["training"].items() if k.rpartition("/")[2] == "length_spread"), None)
  if not values:
    return None
  n = max(1, len(values) // 10)
  first, last = np.mean(values[:n]), np.mean(values[-n:])
  return float(last / first) if first else None


@dataclasses.dataclass(frozen=True)
class Claim:
  """A claim and what the study says of it.

  verdict: shown, not shown, or open (a method or a second seed is missing).
  """
  claim: str
  verdict: str
  evidence: str


def claims(cells: Cells) -> list[Claim]:
  """The paper's claims and ours, each judged by the interval of a paired difference over seeds.

  A claim that something is higher (lower) is shown where the whole interval is; "no less accuracy" where it lies above
  minus one point.
  """
  hard, accuracy, tokens = hardest_third("accuracy"), natural("accuracy"), natural("tokens")
  correlation = lambda field: over_seeds(cells, "hbpo", natural(field))
  less = difference(cells, "hbpo", WARM_START, tokens)
  no_worse = difference(cells, "hbpo", WARM_START, accuracy)
  follows = correlation("opening_correlation")
  spread = difference(cells, "hbpo", "cosine", kept_spread)
  collapse = difference(cells, "cosine", "classic", hard)
  cosine_spread = over_seeds(cells, "cosine", kept_spread)
  four, eight = (difference(cells, a, b, hard) for a, b in (("budgets_4", "budgets_2"), ("budgets_8", "budgets_4")))
  stated = correlation("budget_correlation")
  better, shorter = difference(cells, "hbpo", "paper", accuracy), difference(cells, "hbpo", "paper", tokens)
  target = difference(cells, "hbpo", "cosine", hard)
  share = estimate([_share_saved(cells, s) for s in cells.get("hbpo", {})])
  return [
      _claim("Fewer tokens than the warm start", below(less), f"{say(less)} tokens ({say(share, 100)} %)"),
      _claim("No less accuracy than the warm start", above(no_worse, -0.01), f"{say(no_worse, 100)} points"),
      _claim("Tokens follow difficulty beyond what the task forces: longer modes are chosen for harder problems",
             above(follows), f"rank correlation of mode and level {say(follows, digits=2)}"),
      _claim("The spread of lengths is kept: more of it than under cosine", above(spread),
             f"share of the first steps' spread that is left, minus cosine's: {say(spread, digits=2)}"),
      _claim("Cosine collapses: it keeps under half of the spread, and is less accurate than classic on the hardest "
             "third", _both(below(collapse), below(cosine_spread, 0.5)),
             f"{say(collapse, 100)} points; spread left {say(cosine_spread, digits=2)}"),
      _claim("Budgets matter: four beat two on the hardest third", above(four), f"{say(four, 100)} points"),
      _claim("Budgets matter: eight beat four on the hardest third", above(eight), f"{say(eight, 100)} points"),
      _claim("Stated budgets follow difficulty: rank correlation of at least 0.5", above(stated, 0.5),
             f"{say(stated, digits=2)}"),
      _claim("`hbpo` beats `paper`: more accurate, and with fewer tokens", _both(above(better), below(shorter)),
             f"{say(better, 100)} points, {say(shorter)} tokens"),
      _claim("`hbpo` saves 60 % of the warm start's tokens and is 3 points more accurate than cosine on the hardest "
             "third", _both(below(share, -0.6), above(target, 0.03)),
             f"{say(share, 100)} % tokens, {say(target, 100)} points"),
  ]


def above(x: Estimate, bound: float = 0.0) -> bool | None:
  """Whether the whole interval lies above the bound; None where there is none."""
  return None if x.low is None else x.low > bound


def below(x: Estimate, bound: float = 0.0) -> bool | None:
  """Whether the whole interval lies below the bound; None where there is none."""
  return None if x.high is None else x.high < bound


def say(x: Estimate, factor: float = 1.0, digits: int = 1) -> str:
  """An Estimate as text: "12.3 (11.0 to 13.6)", "-" where there is none."""
  if x.mean is None:
    return "-"
  text = f"{factor * x.mean:.{digits}f}"
  if x.low is None or x.high is None:
    return text
  return f"{text} ({factor * x.low:.{digits}f} to {factor * x.high:.{digits}f})"


def _share_saved(cells: Cells, seed: int) -> float | None:
  before = cells.get(WARM_START, {}).get(seed)
  of = lambda cell: cell["modes"]["natural"]["tokens"]
  return None if before is None else of(cells["hbpo"][seed]) / of(before) - 1


def _both(a: bool | None, b: bool | None) -> bool | None:
  return None if a is None or b is None else a and b


def _claim(claim: str, holds: bool | None, evidence: str) -> Claim:
  return Claim(claim, "open" if holds is None else "shown" if holds else "not shown", evidence)
