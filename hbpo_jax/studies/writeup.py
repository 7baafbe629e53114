"""The write-up of a study from its cells: Markdown, JSON and figures."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
import pathlib
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from hbpo_jax.files import atomic_write_bytes, atomic_write_text, json_value
from hbpo_jax.reporting import figures, plots
from hbpo_jax.reporting.tables import Table
from hbpo_jax.studies import cell as cell_lib
from hbpo_jax.studies import outcome
from hbpo_jax.studies.outcome import WARM_START, Cells, Estimate, Outcome, say

FORMAT = 1
DRAWN = ("classic", "cosine", "paper", "released", "hbpo")  # in the figures
_MARGINS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)  # of accuracy, in the table of the best modes
_PANELS = (("mean_tokens", "tokens per response"), ("accuracy", "accuracy of the rollouts"),
           ("length_spread", "spread of tokens within a query"), ("entropy", "nats per token"))
_BUDGET_PANELS = (("tokens_mean", "tokens"), ("sentence_probability", "probability of the sentence"))


def is_study(folder: pathlib.Path) -> bool:
  """Whether a directory is the working directory of a study."""
  return (folder / "cells").is_dir()


def write(root: pathlib.Path, name: str, out: pathlib.Path) -> list[pathlib.Path]:
  """Writes OUT/NAME.json, the figures OUT/NAME_*.png, and OUT/NAME.md last; returns the paths.

  Raises:
    FileNotFoundError, ValueError: as `outcome.read`.
  """
  found = outcome.read(root)
  written = [out / f"{name}.json"]
  atomic_write_text(written[0], json.dumps(to_json(found.cells), indent=1) + "\n")
  for kind, figure in _figures(found.cells).items():
    written.append(out / f"{name}_{kind}.png")
    atomic_write_bytes(written[-1], plots.png(figure))
  written.append(out / f"{name}.md")
  atomic_write_text(written[-1], to_markdown(found, name))
  return written


def to_json(cells: Cells) -> dict[str, Any]:
  """format; methods: a list of {method, accuracy, tokens, accuracy_hardest_third, tokens_by_level (with `level`)}, each
  with mean, low, high, seeds (accuracies 0..1); claims: a list of {claim, verdict, evidence}."""
  def row(method):
    of = lambda measure: outcome.over_seeds(cells, method, measure).to_json()
    return {
        "method": method, "accuracy": of(outcome.natural("accuracy")), "tokens": of(outcome.natural("tokens")),
        "accuracy_hardest_third": of(outcome.hardest_third("accuracy")),
        "tokens_by_level": [
            {"level": k} | of(outcome.at_level(k, "tokens")) for k in outcome.levels_of(cells)]}
  return json_value({
      "format": FORMAT, "methods": [row(m) for m in _methods(cells)],
      "claims": [dataclasses.asdict(c) for c in outcome.claims(cells)]})


def to_markdown(found: Outcome, name: str) -> str:
  """The page. Every number on it is computed from the cells."""
  cells = found.cells
  all_cells = [
      *found.tuning, *found.warm_starts.values(), *(c for m in _trained(cells) for c in cells[m].values())]
  spent_h = sum(c["cpu_s"] for c in all_cells) / 3600
  parts = [
      "# The claims in miniature\n",
      f"Made by `python -m hbpo_jax.report` from {len(all_cells)} cells of a study ({spent_h:.1f} CPU-hours); "
      "`make miniature` runs it again. Means over seeds, each with its own warm start, and 95 % intervals of Student's "
      "t over them; differences are paired by seed. Natural mode: no budget is given.\n",
      "## What holds\n", _claims(cells).to_markdown(),
      "## All methods\n", _main(cells).to_markdown(),
      f"![Accuracy against tokens: the warm start and the main methods]({name}_pareto.png)\n",
      "## Against the warm start and against cosine\n", _differences(cells).to_markdown(),
      "## Seed by seed\n",
      "Accuracy (%) / accuracy on the hardest third (%) / tokens.\n", _by_seed(cells).to_markdown(),
      "## Is the task fair? The warm start in forced modes\n", _forced(cells).to_markdown(),
      "What a warm start would reach that chose its mode by the level alone, and stayed as good as it is in each: at "
      "every level the shortest mode whose accuracy is at most so many points under the best. Training also changes "
      "how good the modes are, so this is no bound, but it tells what a number of tokens asks for.\n",
      _best_modes(cells).to_markdown(),
      "## Tokens by level\n", _by_level(cells, "tokens", 1.0).to_markdown(),
      f"![Tokens against difficulty]({name}_difficulty.png)\n",
      "## Accuracy by level (%)\n", _by_level(cells, "accuracy", 100.0).to_markdown(),
      "## Which mode is chosen\n", _openings(cells).to_markdown(),
      "## Budgets stated, unasked\n", _stated(cells).to_markdown(),
      "## Efficiency and fixed budgets\n", _modes(cells).to_markdown(),
      "## Dynamics\n", f"![Training]({name}_dynamics.png)\n",
      "## Learning rates\n",
      "Chosen on a warm start and problems of their own: of the rates whose accuracy is within "
      f"{100 * cell_lib.TUNE_MARGIN:.0f} point of the best, that with the fewest tokens.\n",
      _rates(found.tuning).to_markdown(),
      "## Warm starts\n", _warm_starts(found).to_markdown(),
      *(["## Methods\n", _settings(found).to_markdown()] if found.about else []),
      *([found.about["notes"]] if found.about.get("notes") else []),
  ]
  return "\n".join(parts)


def _methods(cells: Cells) -> list[str]:
  """Warm start first, then as they are."""
  return sorted(cells, key=lambda m: m != WARM_START)


def _trained(cells: Cells) -> list[str]:
  return [m for m in cells if m != WARM_START]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
  return Table("", tuple(columns), tuple(map(tuple, rows)), has_total=False)


def _claims(cells: Cells) -> Table:
  return _table(("claim", "verdict", "evidence"), [(c.claim, c.verdict, c.evidence) for c in outcome.claims(cells)])


def _main(cells: Cells) -> Table:
  over = lambda m, measure: outcome.over_seeds(cells, m, measure)
  return _table(
      ("method", "accuracy (%)", "tokens", "hardest third: accuracy (%)", "tokens", "seeds"), [(
          m, say(over(m, outcome.natural("accuracy")), 100), say(over(m, outcome.natural("tokens"))),
          say(over(m, outcome.hardest_third("accuracy")), 100), say(over(m, outcome.hardest_third("tokens"))),
          str(len(cells[m]))) for m in _methods(cells)])


def _differences(cells: Cells) -> Table:
  rows = []
  for m in _trained(cells):
    d = lambda other, measure, factor=1.0, m=m: say(outcome.difference(cells, m, other, measure), factor)
    rows.append((
        m, d(WARM_START, outcome.natural("tokens")), d(WARM_START, outcome.natural("accuracy"), 100),
        d("cosine", outcome.natural("tokens")), d("cosine", outcome.natural("accuracy"), 100),
        d("cosine", outcome.hardest_third("accuracy"), 100)))
  return _table(
      ("method", "tokens, minus warm start", "points, minus warm start", "tokens, minus cosine", "points, minus cosine",
       "points on the hardest third, minus cosine"), rows)


def _forced(cells: Cells) -> Table:
  levels, rows = outcome.levels_of(cells), []
  modes = dict.fromkeys(mode for cell in cells.get(WARM_START, {}).values() for mode in cell["modes"])
  for mode in modes:
    def at(level, field, mode=mode):
      return outcome.over_seeds(cells, WARM_START, lambda cell: next(
          (p[field] for p in cell["modes"][mode]["by_level"] if p["level"] == level), None))
    rows.append((mode.removeprefix("say:"), *(
        f"{_mean(at(k, 'accuracy'), 100)} % / {_mean(at(k, 'tokens'))}" for k in levels)))
  return _table(("mode", *(f"level {k}: accuracy / tokens" for k in levels)), rows)


def _by_seed(cells: Cells) -> Table:
  seeds = sorted({s for of in cells.values() for s in of})
  numbers = ((outcome.natural("accuracy"), 100.0), (outcome.hardest_third("accuracy"), 100.0),
             (outcome.natural("tokens"), 1.0))
  def of(method, seed):
    cell = cells[method].get(seed)
    return "-" if cell is None else " / ".join(f"{factor * measure(cell):.1f}" for measure, factor in numbers)
  return _table(("method", *(f"seed {s}" for s in seeds)), [
      (m, *(of(m, s) for s in seeds)) for m in _methods(cells)])


def _best_modes(cells: Cells) -> Table:
  rows = []
  for margin in _MARGINS:
    of = lambda name, margin=margin: outcome.over_seeds(
        cells, WARM_START, lambda cell: outcome.best_modes(cell, margin).get(name))
    tokens, before = of("tokens"), outcome.over_seeds(cells, WARM_START, outcome.natural("tokens"))
    saved = "-" if tokens.mean is None else f"{100 * (1 - tokens.mean / before.value):.0f}"
    rows.append((f"{100 * margin:.0f}", _mean(of("accuracy"), 100), _mean(of("hard"), 100), _mean(tokens), saved))
  columns = ("points under the best", "accuracy (%)", "hardest third: accuracy (%)", "tokens", "% fewer than it spends")
  return _table(columns, rows)


def _warm_starts(found: Outcome) -> Table:
  compared, tuned = set(found.cells[WARM_START]), {c["seed"] for c in found.tuning}
  modes = dict.fromkeys(
      m for c in found.warm_starts.values() for m in c["modes"] if m == "natural" or m.startswith(outcome.FORCED))
  return _table(("seed", "used for", *(m.removeprefix(outcome.FORCED) for m in modes)), [(
      str(seed), "learning rates" if seed in tuned else "comparison" if seed in compared else "left out",
      *(f"{100 * c['modes'][m]['accuracy']:.1f} % / {c['modes'][m]['tokens']:.1f}" if m in c["modes"] else "-"
        for m in modes)) for seed, c in sorted(found.warm_starts.items())])


def _settings(found: Outcome) -> Table:
  return _table(("method", "what it is", "settings"), [(
      m["name"], m["title"], ", ".join(f"{k}={json.dumps(v)}" for k, v in m["overrides"].items()))
      for m in found.about["methods"]])


def _by_level(cells: Cells, field: str, factor: float) -> Table:
  levels = outcome.levels_of(cells)
  return _table(("method", *(f"level {k}" for k in levels)), [
      (m, *(say(outcome.over_seeds(cells, m, outcome.at_level(k, field)), factor) for k in levels))
      for m in _methods(cells)])


def _openings(cells: Cells) -> Table:
  levels, rows = outcome.levels_of(cells), []
  for m in _methods(cells):
    counts = {k: [c["modes"]["natural"]["openings"][str(k)] for c in cells[m].values()] for k in levels}
    shares = []
    for k in levels:
      total = {mode: sum(c[mode] for c in counts[k]) for mode in counts[k][0]}
      n = sum(total.values())
      shares.append(" / ".join(f"{100 * v / n:.0f}" for v in total.values()) if n else "-")
    rows.append((m, *shares, say(outcome.over_seeds(cells, m, outcome.natural("opening_correlation")), digits=2)))
  names = "/".join(next(iter(cells[WARM_START].values()))["modes"]["natural"]["openings"][str(levels[0])])
  return _table(("method", *(f"level {k}: % {names}" for k in levels), "rank correlation with level"), rows)


def _stated(cells: Cells) -> Table:
  return _table(("method", "states a budget (%)", "rank correlation of budget and level"), [(
      m, say(outcome.over_seeds(cells, m, outcome.natural("states_budget")), 100),
      say(outcome.over_seeds(cells, m, outcome.natural("budget_correlation")), digits=2)) for m in _methods(cells)])


def _modes(cells: Cells) -> Table:
  modes = dict.fromkeys(
      mode for m in _trained(cells) for cell in cells[m].values() for mode in cell["modes"] if mode != "natural")
  rows = []
  for m in _trained(cells):
    def of(mode, field, m=m):
      return outcome.over_seeds(
          cells, m, lambda cell: cell["modes"][mode][field] if mode in cell["modes"] else None)
    rows.append((m, *(f"{_mean(of(mode, 'accuracy'), 100)} % / {_mean(of(mode, 'tokens'))}" for mode in modes)))
  return _table(("method", *(f"{mode}: accuracy / tokens" for mode in modes)), rows)


def _rates(tuning: Sequence[Mapping[str, Any]]) -> Table:
  chosen = {m: cell_lib.best_rate([c for c in tuning if c["method"] == m]) for m in {c["method"] for c in tuning}}
  return _table(("method", "learning rate", "accuracy (%)", "tokens", "chosen"), [(
      c["method"], f"{c['learning_rate']:g}", f"{100 * c['modes']['natural']['accuracy']:.1f}",
      f"{c['modes']['natural']['tokens']:.1f}", "yes" if c["learning_rate"] == chosen[c["method"]] else "")
      for c in sorted(tuning, key=lambda c: (c["method"], c["learning_rate"]))])


def _mean(x: Estimate, factor: float = 1.0) -> str:
  return "-" if x.mean is None else f"{factor * x.mean:.1f}"


def _figures(cells: Cells) -> dict[str, Figure]:
  span = lambda x, most=math.inf: None if x.low is None else (max(x.low, 0.0), min(x.high, most))
  points, curves = [], []
  levels = outcome.levels_of(cells)
  for m in _methods(cells):
    tokens, accuracy = (outcome.over_seeds(cells, m, outcome.natural(f)) for f in ("tokens", "accuracy"))
    if m in (WARM_START, *DRAWN):
      points.append(figures.Point(m, "natural", tokens.value, accuracy.value, span(tokens), span(accuracy, 1.0)))
      curves.append(figures.Curve(m, tuple(map(str, levels)), tuple(
          outcome.over_seeds(cells, m, outcome.at_level(k, "tokens")).value for k in levels),
          outcome.over_seeds(cells, m, outcome.natural("level_correlation")).mean))
  found = {"pareto": figures.pareto_figure(points), "difficulty": figures.difficulty_figure(curves)}
  if drawn := [m for m in DRAWN if m in cells]:
    found["dynamics"] = _dynamics(cells, drawn)
  return found


def _dynamics(cells: Cells, methods: Sequence[str]) -> Figure:
  """Metrics of training by step, means over seeds; of the last method also by the budget that was forced."""
  fig, axes = plots.grid(3, 2, (figures.WIDTH, 7.5), sharex=True)
  for ax, (tag, label) in zip(axes.reshape(-1), _PANELS):
    for i, m in enumerate(methods):
      _draw(ax, cells[m], tag, plots.SERIES[i % len(plots.SERIES)], m)
    ax.set_title(label, fontsize=9, loc="left")
  last = methods[-1]
  budgets = plots.logged_budgets([dict.fromkeys(next(iter(cells[last].values()))["training"])])
  for ax, (tag, label) in zip(axes[2], _BUDGET_PANELS):
    for budget, color in zip(budgets, plots.ordered_colors(len(budgets))):
      _draw(ax, cells[last], f"budget_{budget}/{tag}", color, f"budget {budget}")
    ax.set_title(f"{last}: {label}", fontsize=9, loc="left")
    ax.set_xlabel("step")
  for ax in (axes[0, 0], axes[2, 0]):
    if ax.lines:
      ax.legend(frameon=False, fontsize=8)
  return fig


def _draw(ax: Axes, of: Mapping[int, Mapping[str, Any]], tag: str, color: Any, label: str) -> None:
  series = [_series(cell, tag) for cell in of.values()]
  if n := min(map(len, series)):
    ax.plot(np.mean([s[:n] for s in series], axis=0), color=color, linewidth=1.3, label=label)


def _series(cell: Mapping[str, Any], tag: str) -> list[float]:
  values = cell["training"].get(tag) or next(
      (v for k, v in cell["training"].items() if k.rpartition("/")[2] == tag and "budget_" not in k), [])
  return [math.nan if v is None else v for v in values]
