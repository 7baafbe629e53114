"""What changed between two evaluations, in numbers and in one sentence."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from hbpo_jax.evaluation import results as results_lib
from hbpo_jax.evaluation import statistics
from hbpo_jax.evaluation.statistics import Interval
from hbpo_jax.reporting.runs import Assessed, Run
from hbpo_jax.reporting.tables import number, percent


@dataclasses.dataclass(frozen=True)
class Change:
  """Two evaluations on the problems that both answered in one mode; means over benchmarks.

  tokens, accuracy: (before, after).  tokens_change: relative.  accuracy_change: difference of shares.
  """
  before: Assessed
  after: Assessed
  mode: str
  titles: tuple[str, ...]
  n_problems: int
  tokens: tuple[float, float]
  accuracy: tuple[float, float]
  tokens_change: Interval
  accuracy_change: Interval


def pairs(runs: Sequence[Run]) -> list[tuple[Assessed, Assessed]]:
  """The evaluations to compare: of each training run before and after; of those on their own, the first and each other.

  Where neither gives a pair, the first evaluation of all and the first of each other run.
  """
  found, first = [], None
  for run in runs:
    stages = {e.stage: e for e in run.evaluations}
    if "base" in stages and "trained" in stages:
      found.append((stages["base"], stages["trained"]))
    elif run.info is None and first is None:
      first = run.evaluations[0]
    elif run.info is None and first is not None:
      found.append((first, run.evaluations[0]))
  if not found:
    mains = [run.main[0] for run in runs if run.main]
    found = [(mains[0], other) for other in mains[1:]]
  return found


def compare(before: Assessed, after: Assessed) -> Change | None:
  """The comparison of two evaluations; None where they have no mode or no problem in common."""
  modes = [m for m in before.results["modes"] if m in after.results["modes"]]
  for mode in sorted(modes, key=lambda m: m != "natural"):
    joined = results_lib.paired(before.evaluated, after.evaluated, mode)
    if joined:
      scores, tokens = ([pair[i] for pair in joined.values()] for i in (0, 1))
      titles = tuple(before.results["benchmarks"][name]["title"] for name in joined)
      mean = lambda groups, side: sum(sum(g[side]) / len(g[side]) for g in groups) / len(groups)
      return Change(
          before, after, mode, titles, sum(len(a) for a, _ in scores),
          (mean(tokens, 0), mean(tokens, 1)), (mean(scores, 0), mean(scores, 1)),
          statistics.average_relative_change(tokens), statistics.average_difference(scores))
  return None


def sentence(c: Change) -> str:
  """What changed, with 95 % intervals; says so where a change may be chance."""
  (before, after), change = c.tokens, c.tokens_change
  value, low, high = change["value"], change["low"], change["high"]
  if value is None or low is None or high is None or low <= 0 <= high:
    by = f" ({100 * value:+.1f} %{_span(change)}{_doubt(change)})" if value is not None else ""
    first = f"Tokens per response went from {number(before)} to {number(after)}{by}"
  else:
    ends = sorted(100 * abs(end) for end in (low, high))
    first = (f"Tokens per response {'fell' if value < 0 else 'rose'} by {percent(abs(value))} [{ends[0]:.1f}, "
             f"{ends[1]:.1f}], from {number(before)} to {number(after)}")
  points = f"{100 * (c.accuracy[1] - c.accuracy[0]):+.1f} points{_span(c.accuracy_change)}"
  second = f"accuracy went from {percent(c.accuracy[0])} to {percent(c.accuracy[1])}"
  return f"{first}; {second} ({points}{_doubt(c.accuracy_change)})."


def basis(c: Change) -> str:
  """What a comparison rests on."""
  many = len(c.titles) > 1
  average = f"unweighted mean over {', '.join(c.titles)}" if many else c.titles[0]
  return (f"{c.before.name} against {c.after.name}; {average}; {c.n_problems:,} problems that both answered, mode "
          f"{c.mode}. Brackets: 95 % bootstrap intervals, paired by problem.")


def _span(interval: Interval) -> str:
  if interval["low"] is None or interval["high"] is None:
    return ""
  return f" [{100 * interval['low']:+.1f}, {100 * interval['high']:+.1f}]"


def _doubt(interval: Interval) -> str:
  low, high = interval["low"], interval["high"]
  return ": no clear change" if low is not None and high is not None and low <= 0 <= high else ""


def first_mode(results: Sequence[Mapping[str, Any]]) -> str:
  """The mode to show where only one can be: natural, or the first that all have, or the first of all."""
  modes = [m for m in results[0]["modes"] if all(m in r["modes"] for r in results)] or results[0]["modes"]
  return "natural" if "natural" in modes else modes[0]
