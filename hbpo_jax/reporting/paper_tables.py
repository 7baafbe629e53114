"""The paper's tables over evaluated runs: accuracy and tokens by benchmark, modes, budgets, ablations, patterns.

Shares are shown in percent, as the columns say; a comparison is relative for tokens and in points for accuracy. What
was not measured is '-'. A '*' marks numbers of an evaluation that is not finished, and '(3 of 4)' an average or a
comparison that covers fewer benchmarks than the table has.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import re
from typing import Any

from hbpo_jax.evaluation import results, statistics
from hbpo_jax.evaluation.patterns import REFLECTION_WORDS
from hbpo_jax.evaluation.statistics import Interval
from hbpo_jax.evaluation.store import Evaluated
from hbpo_jax.reporting.tables import Table, number
from hbpo_jax.reporting.text import plain

MISSING = "-"
_QUANTILE_NAMES = {"0.1": "p10", "0.25": "p25", "0.5": "median", "0.75": "p75", "0.9": "p90", "0.99": "p99"}
_MOST_BUDGETS = 3  # Most stated budgets listed in a cell.

_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "`": r"\textasciigrave{}", "±": r"$\pm$", "−": "$-$",
} | {c: "\\" + c for c in "&%$#_{}"})


@dataclasses.dataclass(frozen=True)
class Measured:
  """A run as the tables see it.

  name: what its rows are called.
  results: what `results.compute` returns.
  evaluated: the responses, for paired comparisons; None leaves comparisons without an interval.
  settings: by dotted name.
  """
  name: str
  results: Mapping[str, Any]
  evaluated: Evaluated | None = None
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What changed from one evaluation to another, averaged over the benchmarks of both.

  accuracy: difference of shares.  tokens: relative change.  n_benchmarks: how many took part; 0 leaves both None.
  """
  accuracy: Interval
  tokens: Interval
  n_benchmarks: int


def main_table(
    runs: Sequence[Measured], *, modes: Sequence[str] | None = None, with_intervals: bool = False) -> Table:
  """Accuracy and tokens of each run and mode: by benchmark, averaged, and compared with the first run.

  Args:
    runs: the first one is compared with, in the same mode.
    modes: in order; None means all that a run was evaluated in.
    with_intervals: whether each number is followed by its 95 % interval.
  Raises:
    ValueError: when there is no run.
  Source: Table 1.
  """
  titles = _titles(runs)
  rows = []
  for mode in _modes(runs) if modes is None else modes:
    for i, run in enumerate(runs):
      against = compare(runs[0], run, mode) if i else None
      rows.append((run.name, mode, *_benchmark_cells(run, mode, titles, with_intervals),
                   *_average_cells(run, mode, titles, with_intervals),
                   *_change_cells(against, len(titles), with_intervals)))
  columns = ("run", "mode", *_benchmark_columns(titles), "average accuracy (%)", "average tokens",
             "accuracy change (points)", "tokens change (%)")
  return _table("Accuracy and tokens by benchmark; changes against the first run in the same mode", columns, rows)


def efficiency_table(runs: Sequence[Measured], *, with_intervals: bool = False) -> Table:
  """The efficiency mode against the natural mode of each run, averaged over benchmarks.

  Args:
    runs, with_intervals: see `main_table`.
  Raises:
    ValueError: when there is no run.
  Source: Table 2.
  """
  titles = _titles(runs)
  rows = [
      (run.name, *_average_cells(run, "natural", titles, with_intervals),
       *_average_cells(run, "efficiency", titles, with_intervals),
       *_change_cells(compare(run, run, "natural", "efficiency"), len(titles), with_intervals)) for run in runs]
  columns = ("run", "natural accuracy (%)", "natural tokens", "efficiency accuracy (%)", "efficiency tokens",
             "accuracy change (points)", "tokens change (%)")
  return _table("Efficiency prompting against the natural mode, average over benchmarks", columns, rows)


def budget_table(runs: Sequence[Measured], *, with_intervals: bool = False) -> Table:
  """Accuracy and tokens of each run where the sentence of a fixed budget opens the response; a row per budget.

  Args:
    runs, with_intervals: see `main_table`.
  Returns:
    A table without rows where no run was evaluated in such a mode.
  Raises:
    ValueError: when there is no run.
  """
  titles = _titles(runs)
  rows = [
      (run.name, mode, *_benchmark_cells(run, mode, titles, with_intervals),
       *_average_cells(run, mode, titles, with_intervals))
      for run in runs for mode in filter(results.is_budget, _modes(runs))]
  columns = ("run", "budget", *_benchmark_columns(titles), "average accuracy (%)", "average tokens")
  return _table("Fixed budgets: the budget asked for, accuracy and tokens used", columns, rows)


def ablation_table(
    runs: Sequence[Measured], *, fields: Sequence[str] = ("reward.form", "rollout.budgets"), mode: str = "natural",
    with_intervals: bool = False) -> Table:
  """Runs that differ in their settings: the settings, average accuracy and tokens, and changes against the first run.

  Args:
    runs: the first one is compared with.
    fields: dotted names of the settings shown.
    mode: of the responses.
    with_intervals: see `main_table`.
  Raises:
    ValueError: when there is no run.
  Source: Tables 3 and 4.
  """
  titles = _titles(runs)
  rows = []
  for i, run in enumerate(runs):
    against = compare(runs[0], run, mode) if i else None
    rows.append((run.name, *(_setting(run.settings, field) for field in fields),
                 *_average_cells(run, mode, titles, with_intervals),
                 *_change_cells(against, len(titles), with_intervals)))
  columns = ("run", *fields, "accuracy (%)", "tokens", "accuracy change (points)", "tokens change (%)")
  return _table(f"Runs by their settings, {mode} mode, average over benchmarks", columns, rows)


def details_table(runs: Sequence[Measured], benchmark: str) -> Table:
  """Everything about one benchmark, a row per run and mode; pass@1 and tokens always with their intervals.

  Args:
    runs: those without this benchmark get '-'.
    benchmark: its name in the results.
  Raises:
    ValueError: when there is no run, or none has the benchmark.
  """
  titles = _titles(runs)
  if benchmark not in titles:
    raise ValueError(f"benchmark={benchmark!r} was not evaluated; choose one of {list(titles)}.")
  keys = [(run, mode, _stats(run, benchmark, mode)) for mode in _modes(runs) for run in runs]
  ks = sorted({int(k) for _, _, stats in keys if stats for k in stats["pass_at_k"]} - {1})
  rows = []
  for run, mode, stats in keys:
    if not stats:
      rows.append((run.name, mode, *[MISSING] * (6 + len(ks) + len(_QUANTILE_NAMES))))
      continue
    n, of = stats["n"], run.results["benchmarks"][benchmark]["n_problems"]
    rows.append((
        run.name, mode, (f"{n:,}" if n == of else f"{n:,} of {of:,}") + _star(stats),
        _cell(stats["accuracy"], _percent, True), *(_plain_cell(stats["pass_at_k"].get(str(k)), _percent) for k in ks),
        _cell(stats["tokens"], number, True),
        *(_plain_cell(stats["tokens"]["quantiles"][q], number) for q in _QUANTILE_NAMES),
        _plain_cell(stats["truncated"], _percent),
        *(_plain_cell(stats["reasons"][reason], _percent) for reason in ("unfinished", "no_answer"))))
  columns = ("run", "mode", "n", "pass@1 (%)", *(f"pass@{k} (%)" for k in ks), "tokens", *_QUANTILE_NAMES.values(),
             "truncated (%)", "unfinished (%)", "no answer (%)")
  return _table(f"{titles[benchmark]}: accuracy and tokens with 95 % intervals", columns, rows)


def patterns_table(runs: Sequence[Measured], *, modes: Sequence[str] | None = None) -> Table:
  """Patterns of reasoning: share of thinking, reflection words per response inside and outside it, budgets stated.

  Args:
    runs: a row per run, benchmark and mode that has responses.
    modes: in order; None means all that a run was evaluated in.
  Raises:
    ValueError: when there is no run.
  Source: Figure 5.
  """
  titles = _titles(runs)
  rows = []
  for name, mode in ((name, mode) for name in titles for mode in (_modes(runs) if modes is None else modes)):
    for run in runs:
      stats = _stats(run, name, mode)
      if not stats:
        continue
      found = stats["patterns"]
      sides = found["reflection_inside"], found["reflection_outside"]
      rows.append((
          run.name, titles[name], mode, _plain_cell(found["think_share"], _percent),
          *(_plain_cell(found[f"reflection_{side}_all"], _count) for side in ("inside", "outside")),
          *(" / ".join(_plain_cell(side[word], _count) for side in sides) for word in REFLECTION_WORDS),
          _plain_cell(found["states_budget"], _percent), _budgets(found["budgets_stated"])))
  columns = ("run", "benchmark", "mode", "thinking (%)", "reflection inside", "outside",
             *(f"{word} (in / out)" for word in REFLECTION_WORDS), "states a budget (%)", "most stated (%)")
  return _table("Patterns of reasoning: reflection words are counts per response", columns, rows)


def compare(before: Measured, after: Measured, mode: str, mode_after: str | None = None) -> Comparison:
  """What changed between two evaluations, averaged over the benchmarks of both.

  With the responses of both it is paired: it takes the problems, equal in id and text, that both have answered. Else
  it takes the values of their results, without an interval.

  Args:
    before, after: may be one run.
    mode: of the responses.
    mode_after: of the responses of `after`; None means the same.
  """
  mode_after = mode if mode_after is None else mode_after
  both = [
      (name, a, b) for name in before.results["benchmarks"]
      if (a := _stats(before, name, mode)) and (b := _stats(after, name, mode_after))]
  if before.evaluated is not None and after.evaluated is not None:
    joined = results.paired(before.evaluated, after.evaluated, mode, mode_after).values()
    return Comparison(
        statistics.average_difference([score for score, _ in joined]),
        statistics.average_relative_change([tokens for _, tokens in joined]), len(joined))
  accuracy, tokens = (
      [([a[field]["value"] for _, a, _ in both], [b[field]["value"] for _, _, b in both])]
      for field in ("accuracy", "tokens"))
  return Comparison(
      _without_bounds(statistics.average_difference(accuracy)),
      _without_bounds(statistics.average_relative_change(tokens)), len(both))


def to_latex(table: Table, caption: str) -> str:
  r"""A LaTeX table for the package booktabs, ending in a newline; nothing in cells or caption is read as LaTeX.

  Characters beyond ASCII stay as they are: text in other scripts needs XeLaTeX or LuaLaTeX.

  Args:
    table: its title is not written.
    caption: plain text of \caption.
  """
  def line(cells: Sequence[str]) -> str:
    text = " & ".join(map(_latex, cells))
    # Behind the \\ of the row before, these would be read as its arguments.
    return "    " + ("{}" if text.startswith(("[", "*")) else "") + text + r" \\"

  return "\n".join([
      r"\begin{table}", r"  \centering", rf"  \caption{{{_latex(caption)}}}",
      rf"  \begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}", r"    \toprule", line(table.columns),
      r"    \midrule", *map(line, table.rows), r"    \bottomrule", r"  \end{tabular}", r"\end{table}"]) + "\n"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
  # Names of runs and benchmarks are the user's, and a line break in one would end a Markdown row.
  def line(cells: Sequence[str]) -> tuple[str, ...]:
    return tuple(" ".join(cell.split()) for cell in cells)

  return Table(line([title])[0], line(columns), tuple(map(line, rows)), has_total=False)


def _titles(runs: Sequence[Measured]) -> dict[str, str]:
  """The benchmarks of all runs, by name, as tables write them."""
  if not runs:
    raise ValueError("runs is empty; give at least one evaluated run.")
  titles: dict[str, str] = {}
  for run in runs:
    for name, about in run.results["benchmarks"].items():
      titles.setdefault(name, about["title"])
  return titles


def _modes(runs: Sequence[Measured]) -> list[str]:
  """The modes of all runs: natural, efficiency, budgets ascending."""
  names = {mode for run in runs for mode in run.results["modes"]}
  return sorted(names, key=lambda m: (m != "natural", results.is_budget(m), int(m) if results.is_budget(m) else 0, m))


def _stats(run: Measured, name: str, mode: str) -> Mapping[str, Any] | None:
  """The numbers of a benchmark in a mode; None where there is no response."""
  stats = run.results["benchmarks"].get(name, {"modes": {}})["modes"].get(mode)
  return stats if stats and stats["n"] else None


def _without_bounds(interval: Interval) -> Interval:
  return {"value": interval["value"], "low": None, "high": None}


def _benchmark_columns(titles: Mapping[str, str]) -> list[str]:
  return [f"{title} {what}" for title in titles.values() for what in ("accuracy (%)", "tokens")]


def _benchmark_cells(run: Measured, mode: str, titles: Mapping[str, str], with_intervals: bool) -> list[str]:
  cells = []
  for name in titles:
    stats = _stats(run, name, mode)
    cells += [MISSING, MISSING] if not stats else [
        _cell(stats["accuracy"], _percent, with_intervals) + _star(stats),
        _cell(stats["tokens"], number, with_intervals) + _star(stats)]
  return cells


def _average_cells(run: Measured, mode: str, titles: Mapping[str, str], with_intervals: bool) -> list[str]:
  found = [stats for name in titles if (stats := _stats(run, name, mode))]
  if not found:
    return [MISSING, MISSING]
  average = run.results["average"][mode]
  suffix = ("*" if any(map(_star, found)) else "") + _of(len(found), len(titles))
  return [_cell(average["accuracy"], _percent, with_intervals) + suffix,
          _cell(average["tokens"], number, with_intervals) + suffix]


def _change_cells(against: Comparison | None, n_benchmarks: int, with_intervals: bool) -> list[str]:
  if against is None or not against.n_benchmarks:
    return [MISSING, MISSING]
  suffix = _of(against.n_benchmarks, n_benchmarks)
  return [_cell(against.accuracy, _signed, with_intervals) + suffix,
          _cell(against.tokens, _signed, with_intervals) + suffix]


def _cell(interval: Interval, form: Callable[[float], str], with_interval: bool) -> str:
  value, low, high = interval["value"], interval["low"], interval["high"]
  if value is None:
    return MISSING
  if not with_interval or low is None or high is None:
    return form(value)
  return f"{form(value)} [{form(low)}, {form(high)}]"


def _plain_cell(value: float | None, form: Callable[[float], str]) -> str:
  return MISSING if value is None else form(value)


def _percent(share: float) -> str:
  return f"{100 * share:.1f}"


def _signed(share: float) -> str:
  return f"{round(100 * share, 1) + 0.0:+.1f}"  # Adding 0 turns -0.0 into 0.0.


def _count(value: float) -> str:
  return f"{value:.2f}"


def _star(stats: Mapping[str, Any]) -> str:
  return "*" if stats["n_responses"] < stats["n_expected"] else ""


def _of(n: int, all_of_them: int) -> str:
  return "" if n == all_of_them else f" ({n} of {all_of_them})"


def _setting(settings: Mapping[str, Any], field: str) -> str:
  if field not in settings:
    return MISSING
  value = settings[field]
  return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _budgets(stated: Mapping[str, float]) -> str:
  most = sorted(stated.items(), key=lambda item: (-item[1], int(item[0])))[:_MOST_BUDGETS]
  return ", ".join(f"{budget}: {_percent(share)}" for budget, share in most) or MISSING


def _latex(text: str) -> str:
  escaped = " ".join(plain(text).split()).translate(_LATEX)
  signs = re.sub(r"(?<![\w.])([+-])(?=\d)", r"$\1$", escaped)
  return re.sub("-(?=-)", "-{}", signs)  # Two in a row would print as one dash.
