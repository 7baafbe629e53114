"""The numbers of an evaluation, from its responses: what results.json holds."""

from collections.abc import Mapping, Sequence
import math
import re
from typing import Any

import numpy as np

import hbpo_jax
from hbpo_jax.evaluation import patterns, statistics
from hbpo_jax.evaluation.store import Evaluated
from hbpo_jax.grading.verdict import REASONS
from hbpo_jax.reporting import tables

FORMAT = 1
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)

Rows = Sequence[Mapping[str, Any]]


def compute(evaluated: Evaluated, *, budget_sentence: str) -> dict[str, Any]:
  """Everything that the tables show, as plain JSON values; the same responses give the same numbers.

  An unfinished evaluation gives the statistics of what there is: `n_responses` falls short of `n_expected`, and a
  benchmark without a response has n = 0 and None for every number.

  Args:
    evaluated: manifest, problems and rows of the evaluation.
    budget_sentence: setting `prompt.budget_sentence`, to find responses that state a budget; empty for none.
  Returns:
    format, hbpo_jax, model, modes, samples_per_problem; benchmarks: by name {title, n_problems, modes: by mode the
    numbers of `mode_statistics` and n_expected}; average: by mode {accuracy, tokens: intervals of the unweighted mean
    over benchmarks, benchmarks: the names that it covers}.
  Raises:
    ValueError: when the budget sentence has no place for the budget.
  """
  manifest, rows = evaluated.manifest, evaluated.rows
  modes, n_samples = list(manifest["modes"]), manifest["samples_per_problem"]
  pattern = patterns.budget_pattern(budget_sentence) if budget_sentence else None
  benchmarks = {}
  for name, about in manifest["benchmarks"].items():
    expected = {"n_expected": about["n_problems"] * n_samples}
    benchmarks[name] = {
        "title": about["title"],
        "n_problems": about["n_problems"],
        "modes": {
            mode: mode_statistics(_of_mode(rows[name], mode), None if is_budget(mode) else pattern) | expected
            for mode in modes},
    }
  return {
      "format": FORMAT,
      "hbpo_jax": hbpo_jax.__version__,
      "model": dict(manifest["model"]),
      "modes": modes,
      "samples_per_problem": n_samples,
      "benchmarks": benchmarks,
      "average": {mode: _average({name: rows[name] for name in benchmarks}, mode) for mode in modes},
  }


def mode_statistics(rows: Rows, pattern: re.Pattern[str] | None) -> dict[str, Any]:
  """The numbers of one benchmark in one mode.

  Args:
    rows: its responses.
    pattern: of `patterns.budget_pattern`; None where the mode forces a budget sentence.
  Returns:
    n (problems with a response), n_responses, accuracy (pass@1, over problems: mean over responses of the score),
    pass_at_k (by k: powers of two up to the fewest responses of any problem, and that number; a response counts as
    correct with the full score), tokens (over problems, with quantiles over responses), truncated and reasons (shares
    of responses), by_level and level_correlation (see `tables.evaluation_summary`), patterns (see
    `patterns.summarise`).
  """
  by_problem = _by_problem(rows)
  score_M, tokens_M = (_means(by_problem, field) for field in ("score", "n_gen"))
  found = summary(rows) if rows else {"by_level": [], "level_correlation": None}
  by_level = found["by_level"]
  return {
      "n": len(by_problem),
      "n_responses": len(rows),
      "accuracy": statistics.accuracy_interval(score_M),
      "pass_at_k": _pass_at_k(by_problem),
      "tokens": statistics.mean_interval(tokens_M) | {"quantiles": _quantiles([row["n_gen"] for row in rows])},
      "truncated": _mean([row["truncated"] for row in rows]),
      "reasons": {reason: _mean([row["reason"] == reason for row in rows]) for reason in REASONS},
      "by_level": by_level,
      "level_correlation": found["level_correlation"],
      "patterns": patterns.summarise(rows, pattern, [part["level"] for part in by_level]),
  }


def summary(rows: Rows) -> dict[str, Any]:
  """`tables.evaluation_summary` of the responses of one benchmark in one mode, at least one."""
  by_problem = _by_problem(rows)
  return tables.evaluation_summary(
      [part[0]["level"] for part in by_problem],
      *(_means(by_problem, field) for field in ("score", "n_gen", "truncated")))


def paired(
    before: Evaluated, after: Evaluated, mode: str, mode_after: str | None = None
) -> dict[str, tuple[statistics.Pair, statistics.Pair]]:
  """(scores, tokens), each (before, after), of the problems that two evaluations have both answered, by benchmark.

  Args:
    mode: of the responses.
    mode_after: of the responses of `after`; None means the same.
  """
  found = {}
  for name, rows in before.rows.items():
    a = per_problem(rows, mode)
    b = per_problem(after.rows.get(name, []), mode if mode_after is None else mode_after)
    # Ids alone do not tell: generated problems of two seeds share them.
    text_a, text_b = ({p.id: p.problem for p in side.problems.get(name, [])} for side in (before, after))
    if both := [(a[key], b[key]) for key in a if key in b and text_a[key] == text_b[key]]:
      found[name] = tuple(([x[field] for x, _ in both], [y[field] for _, y in both]) for field in (0, 1))
  return found


def per_problem(rows: Rows, mode: str) -> dict[str, tuple[float, float]]:
  """(mean score, mean n_gen in tokens) by problem id, over the responses of one mode; in order of appearance."""
  return {
      part[0]["id"]: (float(np.mean([row["score"] for row in part])), float(np.mean([row["n_gen"] for row in part])))
      for part in _by_problem(_of_mode(rows, mode))}


def by_pass_rate(rows_base: Rows, rows_other: Rows | None, mode: str, n_bins: int = 5) -> list[dict[str, Any]]:
  """Tokens and accuracy by difficulty, measured as the share of right answers that the base model gives.

  A model's own accuracy rises over its own bins by construction; read tokens there, or the accuracy of another model.

  Args:
    rows_base: responses of the model that measures difficulty, one benchmark.
    rows_other: responses of the model to describe; None means the same.
    mode: of the responses.
    n_bins: bins of equal width over 0..1; the last includes 1.
  Returns:
    Per bin from the hardest: low and high (pass rate), n (problems answered by both), tokens and accuracy (means over
    problems; None in an empty bin).
  Raises:
    ValueError: when n_bins is below 1.
  """
  if n_bins < 1:
    raise ValueError(f"n_bins={n_bins} makes no bin; give at least 1.")
  joined = _join(rows_base, rows_other, mode)
  bins: list[list[tuple[float, float]]] = [[] for _ in range(n_bins)]
  for rate, score, tokens in joined:
    # A rate on an edge, such as 3 / 5, belongs to the bin above it even where the product is rounded down.
    bins[min(int(rate * n_bins + 1e-9), n_bins - 1)].append((score, tokens))
  return [{
      "low": i / n_bins,
      "high": (i + 1) / n_bins,
      "n": len(part),
      "tokens": _mean([tokens for _, tokens in part]),
      "accuracy": _mean([score for score, _ in part]),
  } for i, part in enumerate(bins)]


def difficulty_correlation(rows_base: Rows, rows_other: Rows | None, mode: str) -> float | None:
  """Spearman's rank correlation of a problem's difficulty (1 - the base model's pass rate) and its mean tokens.

  Args:
    rows_base, rows_other, mode: see `by_pass_rate`.
  Returns:
    -1..1; None when there is no problem, or difficulty or tokens are all the same.
  """
  joined = _join(rows_base, rows_other, mode)
  if not joined:
    return None
  found = tables.rank_correlation([1 - rate for rate, _, _ in joined], [tokens for _, _, tokens in joined])
  return None if math.isnan(found) else found


def is_budget(mode: str) -> bool:
  """Whether the mode forces the sentence of a fixed budget, such as '512'."""
  return mode.isdecimal()


def _average(rows: Mapping[str, Rows], mode: str) -> dict[str, Any]:
  found = {name: list(per_problem(part, mode).values()) for name, part in rows.items()}
  found = {name: part for name, part in found.items() if part}
  return {
      "accuracy": statistics.average_accuracy_interval([[score for score, _ in part] for part in found.values()]),
      "tokens": statistics.average_interval([[tokens for _, tokens in part] for part in found.values()]),
      "benchmarks": list(found),
  }


def _of_mode(rows: Rows, mode: str) -> Rows:
  return [row for row in rows if row["mode"] == mode]


def _by_problem(rows: Rows) -> list[list[Mapping[str, Any]]]:
  found: dict[str, list[Mapping[str, Any]]] = {}
  for row in rows:
    found.setdefault(row["id"], []).append(row)
  return list(found.values())


def _join(rows_base: Rows, rows_other: Rows | None, mode: str) -> list[tuple[float, float, float]]:
  """(base pass rate, score, tokens) of every problem that both have answered."""
  base = per_problem(rows_base, mode)
  other = base if rows_other is None else per_problem(rows_other, mode)
  return [(rate, *other[key]) for key, (rate, _) in base.items() if key in other]


def _means(by_problem: Sequence[Rows], field: str) -> list[float]:
  """Per problem, the mean of a field over its responses."""
  return [float(np.mean([row[field] for row in part])) for part in by_problem]


def _pass_at_k(by_problem: Sequence[Rows]) -> dict[str, float]:
  if not by_problem:
    return {}
  counts = [(len(part), sum(row["score"] >= 1 for row in part)) for part in by_problem]
  most = min(n for n, _ in counts)
  ks = sorted({2**i for i in range(most.bit_length())} | {most})
  return {str(k): float(np.mean([statistics.pass_at_k(n, c, k) for n, c in counts])) for k in ks}


def _quantiles(n_gen: Sequence[int]) -> dict[str, float | None]:
  if not n_gen:
    return {str(q): None for q in QUANTILES}
  return {str(q): float(value) for q, value in zip(QUANTILES, np.quantile(n_gen, QUANTILES), strict=True)}


def _mean(values: Sequence[Any]) -> float | None:
  return float(np.mean(values)) if values else None
