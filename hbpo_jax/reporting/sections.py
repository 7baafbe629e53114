"""The sections of a report that show evaluations."""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

from hbpo_jax.evaluation import results as results_lib
from hbpo_jax.reporting import comparison, figures, paper_tables
from hbpo_jax.reporting.blocks import Block, Heading, Picture, Section, Sheet, Words, picture
from hbpo_jax.reporting.figures import Curve, Point
from hbpo_jax.reporting.paper_tables import Measured
from hbpo_jax.reporting.runs import Assessed, Run
from hbpo_jax.reporting.tables import Table, level_name

_NO_EVALUATION = "no run has an evaluation"
_ABLATED = ("reward.form", "rollout.budgets")
_INTERVALS = "Brackets are 95 % bootstrap intervals over problems."


def of_evaluations(runs: Sequence[Run]) -> list[Section | tuple[str, str]]:
  """The sections on the evaluations before and after training, in order; for one without data (title, why)."""
  makers: list[tuple[str, Callable[[Sequence[Run]], Section | str]]] = [
      ("Results", results), ("Each benchmark", benchmarks), ("Accuracy against tokens", front),
      ("Tokens against difficulty", difficulty), ("Reasoning patterns", patterns)]
  found = []
  for title, make in makers:
    section = make(runs)
    found.append((title, section) if isinstance(section, str) else section)
  return found


def measured(runs: Sequence[Run]) -> list[Measured]:
  """The evaluations as the tables take them; settings of training belong to what came out of it."""
  return [
      Measured(e.name, e.results, e.evaluated, {} if e.stage == "base" else run.settings)
      for run in runs for e in run.main]


def results(runs: Sequence[Run]) -> Section | str:
  """The tables in the shape of the paper's Tables 1 to 4, as far as there are modes and runs for them."""
  shown = measured(runs)
  if not shown:
    return _NO_EVALUATION
  blocks: list[Block] = []
  changes = [c for pair in comparison.pairs(runs) if (c := comparison.compare(*pair))]
  if len(changes) > 1:
    blocks += [Words(f"{c.before.name} against {c.after.name}: {comparison.sentence(c)}") for c in changes[1:]]
  groups = _overlapping(shown)
  for members in groups:
    blocks += [Heading(", ".join(_titles(members).values()))] if len(groups) > 1 else []
    blocks += _tables(members)
  return Section("results", "Results", blocks)


def _tables(shown: Sequence[Measured]) -> list[Block]:
  """The tables of evaluations that share benchmarks."""
  found: list[Block] = [Sheet(_filled(paper_tables.main_table(shown)), "As Table 1 of the paper, without intervals.")]
  if both := [m for m in shown if {"natural", "efficiency"} <= set(m.results["modes"])]:
    found.append(Sheet(paper_tables.efficiency_table(both, with_intervals=True), f"As Table 2. {_INTERVALS}"))
  trained = [m for m in shown if any(field in m.settings for field in _ABLATED)]
  if len({str([m.settings.get(f) for f in _ABLATED]) for m in trained}) > 1:
    mode = comparison.first_mode([m.results for m in shown])
    table = paper_tables.ablation_table(shown, fields=_ABLATED, mode=mode, with_intervals=True)
    found.append(Sheet(table, f"As Tables 3 and 4. {_INTERVALS}"))
  budgets = _filled(paper_tables.budget_table(shown))
  return [*found, Sheet(budgets)] if budgets.rows else found


def benchmarks(runs: Sequence[Run]) -> Section | str:
  """One table per benchmark with all its numbers."""
  shown = measured(runs)
  if not shown:
    return _NO_EVALUATION
  note = ("pass@1 is the mean over problems of the mean score, pass@k the unbiased estimate; median and p10 to p99 are "
          f"quantiles of tokens over responses. {_INTERVALS}")
  tables = [
      _filled(paper_tables.details_table([m for m in shown if name in m.results["benchmarks"]], name))
      for name in _titles(shown)]
  return Section("benchmarks", "Each benchmark", [Words(note), *map(Sheet, tables)])


def front(runs: Sequence[Run]) -> Section | str:
  """Accuracy against tokens of all modes; a figure for the evaluations that share their benchmarks."""
  shown = measured(runs)
  if not shown:
    return _NO_EVALUATION
  groups: dict[tuple[str, ...], list[Measured]] = {}
  for m in shown:
    groups.setdefault(tuple(sorted(m.results["benchmarks"])), []).append(m)
  blocks: list[Block] = []
  for members in groups.values():
    titles = _titles(members)
    points = [p for m in members for mode in m.results["modes"] if (p := _point(m, mode, list(titles)))]
    if points:
      blocks += [Heading(", ".join(titles.values()))] if len(groups) > 1 else []
      blocks.append(_front(points, list(titles.values()), f"front_{'_'.join(titles)}" if len(groups) > 1 else "front"))
  if not blocks:
    return "no mode of an evaluation has responses on all of its benchmarks"
  return Section("front", "Accuracy against tokens", blocks)


def _front(points: Sequence[Point], titles: Sequence[str], name: str) -> Picture:
  most = max(p.tokens for p in points)
  runs = list(dict.fromkeys(p.run for p in points))
  of_run = {run: [p for p in points if p.run == run] for run in runs}
  areas = ""
  # Alone at its upper end, a point has no area.
  if len(runs) > 1 and all(len(own) > 1 for own in of_run.values()):
    areas = "; by evaluation: " + ", ".join(
        f"{run} {figures.front_area(own, most):.3f}" for run, own in of_run.items())
  over = f"unweighted mean over {', '.join(titles)}" if len(titles) > 1 else titles[0]
  caption = (
      f"Accuracy against mean tokens, {over}; thin bars are 95 % intervals, the dotted line is the Pareto front of all "
      f"points. The area under it, from 0 to {most:,.0f} tokens and divided by that width, is "
      f"{figures.front_area(points):.3f} (1 would be full accuracy for no tokens){areas}. The accuracy axis does not "
      "start at 0.")
  alt = "Scatter plot: " + "; ".join(
      f"{p.run}, {p.mode}: {p.tokens:,.0f} tokens, {100 * p.accuracy:.1f} %" for p in points)
  return picture(name[:80], figures.pareto_figure(points), alt, caption)


def difficulty(runs: Sequence[Run]) -> Section | str:
  """Tokens by level and by the pass rate of the base, a figure per benchmark, and the rank correlations."""
  shown = [(e, _reference(run, runs)) for run in runs for e in run.main]
  if not shown:
    return _NO_EVALUATION
  mode = comparison.first_mode([e.results for e, _ in shown])
  blocks: list[Block] = []
  rows = []
  for name, title in _titles([e for e, _ in shown]).items():
    having = [(e, base) for e, base in shown if _stats(e, name, mode)]
    levels = _by_level([e for e, _ in having], name, mode)
    rates = _by_pass_rate(having, name, mode)
    if not levels and not rates:
      continue
    blocks.append(picture(
        f"difficulty_{name}", figures.difficulty_figure(levels, rates),
        f"{title}: line plot of mean tokens per response against difficulty, one line per evaluation.",
        f"{title}, mode {mode}. ρ is Spearman's rank correlation of a problem's difficulty and its mean tokens, in the "
        "order of the legend: 1 where every harder problem gets more tokens. The pass rate is that of the evaluation "
        "before training, or of the first one."))
    of_levels, of_rates = ({c.run: c.correlation for c in curves} for curves in (levels, rates))
    rows += [(e.name, title, _signed(of_levels.get(e.name)), _signed(of_rates.get(e.name))) for e, _ in having]
  if not blocks:
    return "no benchmark has problems of at least two levels, or with different pass rates"
  table = Table("Spearman's rank correlation of tokens with difficulty",
                ("evaluation", "benchmark", "by level", "by pass rate"), tuple(rows))
  return Section("difficulty", "Tokens against difficulty", [*blocks, Sheet(table)])


def patterns(runs: Sequence[Run]) -> Section | str:
  """How much is thinking, which words reflect, which budgets are stated; as the paper's Figure 5."""
  shown = measured(runs)
  if not shown:
    return _NO_EVALUATION
  blocks: list[Block] = []
  titles = _titles(shown)
  for name, title in titles.items():
    bars = [(f"{m.name}, {mode}", stats["patterns"]) for m in shown for mode in m.results["modes"]
            if (stats := _stats(m, name, mode)) and stats["patterns"]["think_share"] is not None]
    if not bars:
      continue
    if len(titles) > 1:
      blocks.append(Heading(title))
    blocks.append(picture(
        f"patterns_{name}", figures.patterns_figure(bars),
        f"{title}: bars of the share of tokens inside <think> and of reflection words per response.",
        f"{title}: share of tokens inside <think>, and reflection words per response, by evaluation and mode."))
    mode = comparison.first_mode([m.results for m in shown])
    lines = [(m.name, stats["patterns"]["by_level"]) for m in shown if (stats := _stats(m, name, mode))
             and len([row for row in stats["patterns"]["by_level"] if row["level"] is not None]) > 1]
    if lines:
      blocks.append(picture(
          f"patterns_by_level_{name}", figures.patterns_by_level_figure(lines),
          f"{title}: line plots of the share of thinking and of reflection words against difficulty level.",
          f"{title}, mode {mode}, by difficulty level."))
  if not blocks:
    return "no evaluation has responses"
  blocks.append(Sheet(paper_tables.patterns_table(shown)))
  return Section("patterns", "Reasoning patterns", blocks)


def _overlapping(shown: Sequence[Measured]) -> list[list[Measured]]:
  """The evaluations, those together that share a benchmark, directly or over others."""
  groups: list[list[Measured]] = []
  for m in shown:
    linked = [g for g in groups if set(_titles(g)) & set(m.results["benchmarks"])]
    groups = [g for g in groups if g not in linked] + [[*(other for g in linked for other in g), m]]
  return groups


def _filled(table: Table) -> Table:
  """The table without rows of a run in a mode that it was not evaluated in."""
  rows = tuple(row for row in table.rows if any(cell != paper_tables.MISSING for cell in row[2:]))
  return dataclasses.replace(table, rows=rows)


def _point(m: Measured, mode: str, names: Sequence[str]) -> Point | None:
  """A mode's point over all benchmarks; None where one of them has no response."""
  average = m.results["average"][mode]
  if set(names) != set(average["benchmarks"]):
    return None
  spans = [(i["low"], i["high"]) if i["low"] is not None else None for i in (average["tokens"], average["accuracy"])]
  return Point(m.name, mode, average["tokens"]["value"], average["accuracy"]["value"], *spans)


def _stats(e: Assessed | Measured, name: str, mode: str) -> dict[str, Any] | None:
  stats = e.results["benchmarks"].get(name, {"modes": {}})["modes"].get(mode)
  return stats if stats and stats["n"] else None


def _titles(shown: Sequence[Assessed | Measured]) -> dict[str, str]:
  """The benchmarks by name, as tables write them."""
  return {name: about["title"] for e in shown for name, about in e.results["benchmarks"].items()}


def _reference(run: Run, runs: Sequence[Run]) -> Assessed:
  """The evaluation whose pass rate says how hard a problem is: the run's own before training, or the first of all."""
  if run.main[0].stage == "base":
    return run.main[0]
  return next(e for r in runs for e in r.main)


def _by_level(evaluations: Sequence[Assessed], name: str, mode: str) -> list[Curve]:
  rows = [(e, stats) for e in evaluations if (stats := _stats(e, name, mode))]
  known = [[r["level"] for r in s["by_level"] if r["level"] is not None] for _, s in rows]
  levels = max(known, key=len, default=[])
  if len(levels) < 2:
    return []
  tokens = [{r["level"]: r["tokens"] for r in s["by_level"]} for _, s in rows]
  return [
      Curve(e.name, tuple(map(level_name, levels)), tuple(of.get(level, math.nan) for level in levels),
            s["level_correlation"]) for (e, s), of in zip(rows, tokens)]


def _by_pass_rate(having: Sequence[tuple[Assessed, Assessed]], name: str, mode: str) -> list[Curve]:
  found = []
  for e, base in having:
    rows, of_base = e.evaluated.rows[name], base.evaluated.rows.get(name, [])
    bins = results_lib.by_pass_rate(of_base, rows, mode)[::-1]  # From easy to hard, as levels run.
    if sum(b["n"] > 0 for b in bins) > 1:
      found.append((e.name, bins, results_lib.difficulty_correlation(of_base, rows, mode)))
  filled = [i for i in range(len(found[0][1])) if any(bins[i]["n"] for _, bins, _ in found)] if found else []
  return [
      Curve(run, tuple(f"{100 * bins[i]['low']:.0f}–{100 * bins[i]['high']:.0f} %" for i in filled),
            tuple(math.nan if bins[i]["tokens"] is None else bins[i]["tokens"] for i in filled), correlation)
      for run, bins, correlation in found]


def _signed(value: float | None) -> str:
  return "-" if value is None else f"{value:+.2f}"
