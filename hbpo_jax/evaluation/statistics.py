"""Means over problems with their 95 % intervals, paired comparisons, and pass@k. NumPy and SciPy on the host.

A problem is the unit: responses to one problem are averaged first, then problems are resampled. An interval is a dict
{"value", "low", "high"}; low and high are None where a set has fewer than two problems, which leaves nothing to
resample, and value is None where there is no problem at all. The same numbers and seed give the same interval.

The `average_*` functions take several benchmarks and return the unweighted mean over them. Benchmarks are fixed:
problems are resampled within each, so the interval tells what other problems of the same kind would have given.
"""

from collections.abc import Callable, Sequence
import inspect
import math
from typing import Any

import numpy as np
from scipy import stats

Interval = dict[str, float | None]

LEVEL = 0.95
N_RESAMPLES = 2000

# Problem indices drawn at once: few enough to stay in the processor's cache, whatever the size of the benchmark.
_BATCH_INDICES = 1 << 18
# SciPy renamed the argument in 1.15; before, `random_state` took the same Generator.
_GENERATOR = "rng" if "rng" in inspect.signature(stats.bootstrap).parameters else "random_state"

Pair = tuple[Any, Any]  # Two float [M] of the same problems in the same order.


def pass_at_k(n_samples: int, n_correct: int, k: int) -> float:
  """The chance that k of the n responses, drawn without replacement, hold at least one that is correct.

  1 - C(n - c, k) / C(n, k), the unbiased estimate of pass@k; in whole numbers up to the last division.

  Args:
    n_samples: responses to the problem, n.
    n_correct: how many of them are correct, c in 0..n.
    k: responses drawn, 1..n.
  Returns:
    0..1.
  Raises:
    ValueError: when n_correct or k is out of range.
  Source: arXiv 2107.03374, Eq. 1.
  """
  if not 0 <= n_correct <= n_samples:
    raise ValueError(f"n_correct={n_correct} of n_samples={n_samples} is not possible; give 0 to n_samples.")
  if not 1 <= k <= n_samples:
    raise ValueError(f"k={k} responses cannot be drawn from n_samples={n_samples}; give 1 to n_samples.")
  everything = math.comb(n_samples, k)
  return (everything - math.comb(n_samples - n_correct, k)) / everything


def mean_interval(values_M: Any, seed: int = 0) -> Interval:
  """The mean over problems with its percentile bootstrap interval.

  Args:
    values_M: float [M], one number per problem.
    seed: of the resampling.
  Raises:
    ValueError: when the values are not [M] or not finite.
  """
  return average_interval([values_M], seed)


def accuracy_interval(score_M: Any, seed: int = 0) -> Interval:
  """As `mean_interval`, but the exact (Clopper-Pearson) interval where all scores are 0 or all are 1.

  Resampling such scores has no width.

  Args:
    score_M: float [M] in 0..1, mean score per problem.
    seed: of the resampling.
  Raises:
    ValueError: when the scores are not [M] or not in 0..1.
  """
  return average_accuracy_interval([score_M], seed)


def difference(before_M: Any, after_M: Any, seed: int = 0) -> Interval:
  """mean(after) - mean(before), paired by problem.

  Args:
    before_M: float [M], one number per problem.
    after_M: float [M], the same problems in the same order.
    seed: of the resampling.
  Raises:
    ValueError: when the two are not [M] of one length or not finite.
  """
  return average_difference([(before_M, after_M)], seed)


def relative_change(before_M: Any, after_M: Any, seed: int = 0) -> Interval:
  """mean(after) / mean(before) - 1, paired by problem; -0.5 is half.

  Args:
    before_M: float [M], at least 0, one number per problem.
    after_M: float [M], the same problems in the same order.
    seed: of the resampling.
  Returns:
    value is None where mean(before) is 0; low and high are None where a resample could have a mean of 0.
  Raises:
    ValueError: when the two are not [M] of one length or not finite, or a number before is negative.
  """
  return average_relative_change([(before_M, after_M)], seed)


def average_interval(groups: Sequence[Any], seed: int = 0) -> Interval:
  """The unweighted mean over benchmarks of `mean_interval`'s mean.

  Args:
    groups: per benchmark, float [M], one number per problem; benchmarks without problems do not count.
    seed: of the resampling.
  Raises:
    ValueError: when the values are not [M] or not finite.
  """
  arrays = [a for a in (_finite("values_M", g) for g in groups) if a.size]
  return _interval([a.size for a in arrays], lambda indices: _mean_of_means(arrays, indices), seed)


def average_accuracy_interval(groups: Sequence[Any], seed: int = 0) -> Interval:
  """As `average_interval`; where every benchmark is all 0 or all 1, the mean of the exact bounds.

  That mean is wider than need be. Where only some benchmarks are all 0 or all 1, these add no width.

  Args:
    groups: per benchmark, float [M] in 0..1, mean score per problem; benchmarks without problems do not count.
    seed: of the resampling.
  Raises:
    ValueError: when the scores are not [M] or not in 0..1.
  """
  arrays = [a for a in (_finite("score_M", g) for g in groups) if a.size]
  for a in arrays:
    if a.min() < 0 or a.max() > 1:
      raise ValueError(f"score_M has values from {a.min():g} to {a.max():g}; give scores in 0 to 1.")
  if not arrays or any(a.size < 2 or a.min() != a.max() or a[0] not in (0.0, 1.0) for a in arrays):
    return average_interval(arrays, seed)
  exact = [stats.binomtest(int(a.sum()), a.size).proportion_ci(LEVEL, method="exact") for a in arrays]
  value, low, high = (float(np.mean(x)) for x in (
      [a[0] for a in arrays], [ci.low for ci in exact], [ci.high for ci in exact]))
  return {"value": value, "low": low, "high": high}


def average_difference(pairs: Sequence[Pair], seed: int = 0) -> Interval:
  """The unweighted mean over benchmarks of `difference`.

  Args:
    pairs: per benchmark, (before_M, after_M), the same problems in the same order.
    seed: of the resampling.
  Raises:
    ValueError: when a pair is not [M] of one length or not finite.
  """
  return average_interval([after - before for before, after in map(_paired, pairs)], seed)


def average_relative_change(pairs: Sequence[Pair], seed: int = 0) -> Interval:
  """The relative change of the unweighted mean over benchmarks: not the mean of relative changes.

  Args:
    pairs: per benchmark, (before_M, after_M), the same problems in the same order; before is at least 0.
    seed: of the resampling.
  Returns:
    As `relative_change`.
  Raises:
    ValueError: when a pair is not [M] of one length or not finite, or a number before is negative.
  """
  both = [(before, after) for before, after in map(_paired, pairs) if before.size]
  befores, afters = [b for b, _ in both], [a for _, a in both]
  for before in befores:
    if before.min() < 0:
      raise ValueError(f"before_M has the value {before.min():g}; a relative change needs numbers of at least 0.")
  if not any(before.any() for before in befores):
    return {"value": None, "low": None, "high": None}

  def ratio(indices: Sequence[np.ndarray]) -> np.ndarray:
    return _mean_of_means(afters, indices) / _mean_of_means(befores, indices) - 1

  may_be_zero = all(before.min() == 0 for before in befores)
  return _interval([b.size for b in befores], ratio, seed, resample=not may_be_zero)


def _interval(
    sizes: Sequence[int], statistic: Callable[[Sequence[np.ndarray]], np.ndarray], seed: int,
    resample: bool = True) -> Interval:
  """The bootstrap of a statistic of problem indices, so that whatever belongs to a problem is drawn together.

  Args:
    sizes: problems per benchmark, each at least 1.
    statistic: indices, one [..., M] per benchmark -> [...].
    resample: False gives the value alone.
  """
  if not sizes:
    return {"value": None, "low": None, "high": None}
  everything = [np.arange(size) for size in sizes]
  value = float(statistic(everything))
  if not resample or min(sizes) < 2:
    return {"value": value, "low": None, "high": None}
  generator: dict[str, Any] = {_GENERATOR: np.random.default_rng(seed)}
  found = stats.bootstrap(
      everything, lambda *indices, axis: statistic(indices), n_resamples=N_RESAMPLES, vectorized=True, axis=-1,
      batch=max(1, _BATCH_INDICES // sum(sizes)), confidence_level=LEVEL, method="percentile", **generator)
  low, high = found.confidence_interval
  return {"value": value, "low": float(low), "high": float(high)}


def _mean_of_means(arrays: Sequence[np.ndarray], indices: Sequence[np.ndarray]) -> np.ndarray:
  return np.mean([a[i].mean(axis=-1) for a, i in zip(arrays, indices, strict=True)], axis=0)


def _paired(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
  before, after = _finite("before_M", pair[0]), _finite("after_M", pair[1])
  if before.shape != after.shape:
    raise ValueError(
        f"before_M and after_M have {before.size} and {after.size} problems; give the same problems in the same order.")
  return before, after


def _finite(name: str, values: Any) -> np.ndarray:
  array = np.asarray(values, np.float64)
  if array.ndim != 1:
    raise ValueError(f"{name} has shape {array.shape}; give one number per problem, [M].")
  if not np.isfinite(array).all():
    raise ValueError(f"{name} has a value that is not finite; give one finite number per problem.")
  return array
