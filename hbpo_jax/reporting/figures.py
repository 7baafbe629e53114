"""Figures that compare evaluations: accuracy against tokens, difficulty, reasoning patterns, budgets and lengths."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
import numpy as np

from hbpo_jax.reporting.plots import GREY, INK, SERIES, grid
from hbpo_jax.reporting.tables import level_name

WIDTH = 7.2  # Inches of a figure that fills the page's column.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_SHORTENED = 34  # Most characters of a name in a legend.
_COMMA = FuncFormatter(lambda value, _: f"{value:,.0f}")


@dataclasses.dataclass(frozen=True)
class Point:
  """An evaluation in one mode. tokens: mean per response.  accuracy: 0..1.  spans: (low, high), or None if unknown."""
  run: str
  mode: str
  tokens: float
  accuracy: float
  tokens_span: tuple[float, float] | None = None
  accuracy_span: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Curve:
  """Mean tokens over ordered groups of problems.

  groups: names, such as levels.  tokens: mean of each, NaN where there is none.  correlation: Spearman's, or None.
  """
  run: str
  groups: tuple[str, ...]
  tokens: tuple[float, ...]
  correlation: float | None = None


def pareto_front(points: Sequence[Point]) -> list[Point]:
  """The points that no other beats with at most as many tokens and at least as much accuracy, by rising tokens."""
  front: list[Point] = []
  for point in sorted(points, key=lambda p: (p.tokens, -p.accuracy)):
    if not front or point.accuracy > front[-1].accuracy:
      front.append(point)
  return front


def front_area(points: Sequence[Point], most_tokens: float | None = None) -> float:
  """The mean, over 0 to `most_tokens`, of the best accuracy to be had with at most that many tokens.

  Below the cheapest point that accuracy is 0, so more accuracy and fewer tokens both raise the area.

  Args:
    most_tokens: upper end; None means that of the points.
  Returns:
    0..1.
  Raises:
    ValueError: when there is no point, or the upper end is not above 0.
  """
  if not points:
    raise ValueError("points is empty; the area under the front needs at least one evaluation.")
  end = max(p.tokens for p in points) if most_tokens is None else most_tokens
  if not end > 0:
    raise ValueError(f"most_tokens={end} is not above 0; responses have at least one token.")
  front = [p for p in pareto_front(points) if p.tokens <= end]
  ends = [*(p.tokens for p in front[1:]), end]
  return sum(p.accuracy * (until - p.tokens) for p, until in zip(front, ends)) / end


def pareto_figure(points: Sequence[Point]) -> Figure:
  """Accuracy against tokens: a colour per run, a marker per mode, and the front of all.

  Returns:
    A Figure with one Axes; the line labelled `front` holds the Pareto front as steps.
  Raises:
    ValueError: when there is no point.
  """
  if not points:
    raise ValueError("points is empty; the figure needs at least one evaluation.")
  runs = list(dict.fromkeys(p.run for p in points))
  named = list(dict.fromkeys(p.mode for p in points if not p.mode.isdigit()))
  marker = {mode: MARKERS[i % len(MARKERS)] for i, mode in enumerate(named)}
  fig, axes = grid(1, 1, (WIDTH, 4.4))
  ax = axes[0, 0]
  front = pareto_front(points)
  most = max(p.tokens for p in points)
  ax.step([*(p.tokens for p in front), most], [100 * p.accuracy for p in (*front, front[-1])], where="post",
          color=GREY, linewidth=1.2, linestyle=":", label="front", zorder=1)
  for i, run in enumerate(runs):
    color = SERIES[i % len(SERIES)]
    fixed = sorted((p for p in points if p.run == run and p.mode.isdigit()), key=lambda p: int(p.mode))
    ax.plot([p.tokens for p in fixed], [100 * p.accuracy for p in fixed], color=color, linewidth=1, alpha=0.6, zorder=2)
    for p in (q for q in points if q.run == run):
      _cross(ax, p, color)
      budget = p.mode.isdigit()
      ax.plot([p.tokens], [100 * p.accuracy], color=color, marker="." if budget else marker[p.mode], markersize=8,
              markeredgecolor="white", markeredgewidth=0.8, linestyle="none", zorder=4)
      if budget:
        ax.annotate(f"{int(p.mode):,}", (p.tokens, 100 * p.accuracy), xytext=(5, -10), textcoords="offset points",
                    fontsize=8, color=color)
  ax.set_xlim(0, 1.05 * max((p.tokens_span or (0, p.tokens))[1] for p in points))
  ax.set_xlabel("mean tokens per response")
  ax.set_ylabel("accuracy (%)")
  ax.xaxis.set_major_formatter(_COMMA)
  handles = [
      Line2D([], [], color=SERIES[i % len(SERIES)], linewidth=3, label=short(run)) for i, run in enumerate(runs)]
  handles += [Line2D([], [], color=INK, marker=marker[m], linestyle="none", markersize=6, label=m) for m in named]
  if any(p.mode.isdigit() for p in points):
    handles.append(Line2D([], [], color=INK, marker=".", linestyle="none", markersize=8, label="fixed budget (number)"))
  handles.append(ax.lines[0])
  _legend(fig, handles)
  return fig


def difficulty_figure(by_level: Sequence[Curve], by_pass_rate: Sequence[Curve] = ()) -> Figure:
  """Tokens against difficulty: by level, and by the first evaluation's pass rate, each where there is any.

  Raises:
    ValueError: when there is no curve.
  """
  panels = [(curves, label) for curves, label in (
      (by_level, "difficulty level"), (by_pass_rate, "pass rate before training, easy to hard")) if curves]
  if not panels:
    raise ValueError("there is no curve; the figure needs problems with a level or with a pass rate.")
  fig, axes = grid(1, len(panels), (WIDTH, 3.6), sharey=True)
  for ax, (curves, label) in zip(axes[0], panels):
    _curves(ax, curves)
    ax.set_xlabel(label)
    lines = [f"ρ = {c.correlation:+.2f}" if c.correlation is not None else "ρ: n/a" for c in curves]
    in_row = 3 if len(panels) > 1 else 6
    for i, (text, color) in enumerate(zip(lines, SERIES * len(lines))):
      ax.annotate(text, (0, 1), xycoords="axes fraction", xytext=(4 + 62 * (i % in_row), 4 + 12 * (i // in_row)),
                  textcoords="offset points", fontsize=9, color=color)
  axes[0, 0].set_ylabel("mean tokens per response")
  axes[0, 0].set_ylim(bottom=0)
  axes[0, 0].yaxis.set_major_formatter(_COMMA)
  longest = max((curves for curves, _ in panels), key=len)
  _legend(fig, [_handle(i, c.run) for i, c in enumerate(longest)])
  return fig


def patterns_figure(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Figure:
  """Share of thinking, and reflection words per response inside and outside it: a bar per evaluation and mode.

  Args:
    rows: (name, patterns as `results.compute` returns them), top to bottom.
  Raises:
    ValueError: when there is no row.
  """
  if not rows:
    raise ValueError("rows is empty; the figure needs at least one evaluation.")
  y = np.arange(len(rows))
  fig, axes = grid(1, 2, (WIDTH, 1.5 + 0.3 * len(rows)), sharey=True)
  thinking, words = axes[0]
  thinking.barh(y, [100 * p["think_share"] for _, p in rows], color=SERIES[0], height=0.6)
  thinking.set_xlim(0, 100)
  thinking.set_xlabel("tokens inside <think> (%)")
  thinking.set_yticks(y, [short(name) for name, _ in rows])
  thinking.invert_yaxis()
  inside = np.array([p["reflection_inside_all"] for _, p in rows])
  outside = np.array([p["reflection_outside_all"] for _, p in rows])
  words.barh(y, inside, color=SERIES[0], height=0.6, label="inside <think>")
  words.barh(y, outside, left=inside, color=SERIES[4], height=0.6, label="outside")
  words.set_xlabel("reflection words per response")
  for ax in axes[0]:
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", color="#EBEBEB", linewidth=0.8)
  words.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
  return fig


def patterns_by_level_figure(rows: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> Figure:
  """Share of thinking and reflection words by difficulty level, a line per evaluation.

  Args:
    rows: (name, `by_level` of its patterns).
  Raises:
    ValueError: when there is no row.
  """
  if not rows:
    raise ValueError("rows is empty; the figure needs at least one evaluation with levels.")
  fig, axes = grid(1, 2, (WIDTH, 3.3))
  panels = (("think_share", 100, "tokens inside <think> (%)"),
            ("reflection_inside_all", 1, "reflection words inside <think>"))
  for ax, (field, scale, label) in zip(axes[0], panels):
    _curves(ax, [Curve(name, tuple(level_name(r["level"]) for r in by_level),
                       tuple(scale * r[field] for r in by_level)) for name, by_level in rows])
    ax.set_xlabel("difficulty level")
    ax.set_ylabel(label)
    ax.set_ylim(0, 104 if field == "think_share" else None)
  _legend(fig, [_handle(i, name) for i, (name, _) in enumerate(rows)])
  return fig


def length_bins(lengths: Sequence[float], n_bins: int = 12) -> np.ndarray:
  """Edges [n_bins + 1] of equal bins from 0 that hold all lengths, at a round width."""
  most = max(max(lengths, default=1.0), 1.0)
  raw = most / n_bins
  scale = 10 ** math.floor(math.log10(raw))
  width = max(1.0, next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= raw))
  return width * np.arange(math.floor(most / width) + 2)


def shares(lengths: Sequence[float], edges: np.ndarray) -> np.ndarray:
  """The share of lengths in each bin, [bins]; they sum to 1.

  Raises:
    ValueError: when there is none.
  """
  if not len(lengths):
    raise ValueError("lengths is empty; a share needs at least one response.")
  return np.histogram(lengths, edges)[0] / len(lengths)


def budget_heatmap(rows: Sequence[tuple[str, int, np.ndarray]], edges: np.ndarray) -> Figure:
  """Length bins against budgets: the share of a budget's responses, as a colour and, from 1 %, a number.

  Args:
    rows: (name of the run, budget, shares [bins]), top to bottom; a black line marks the budget.
    edges: [bins + 1], tokens.
  Raises:
    ValueError: when there is no row or a shape does not fit.
  """
  if not rows or any(len(s) != len(edges) - 1 for _, _, s in rows):
    raise ValueError("rows is empty or does not fit edges; give the shares of at least one budget, one per bin.")
  table = 100 * np.array([s for _, _, s in rows])
  fig, axes = grid(1, 1, (WIDTH, 1.3 + 0.36 * len(rows)))
  ax = axes[0, 0]
  ax.grid(visible=False)
  image = ax.pcolormesh(edges, np.arange(len(rows) + 1), table, cmap="Blues", vmin=0, vmax=max(table.max(), 1.0),
                        edgecolors="white", linewidth=0.6)
  if table.shape[1] <= 16:
    for (r, c), share in np.ndenumerate(table):
      if share >= 1:
        ax.annotate(f"{share:.0f}", ((edges[c] + edges[c + 1]) / 2, r + 0.5), ha="center", va="center", fontsize=7.5,
                    color="white" if share > 0.6 * table.max() else INK)
  for r, (_, budget, _) in enumerate(rows):
    if budget <= edges[-1]:
      # A gap in the middle leaves the number readable.
      ax.plot([budget] * 5, [r, r + 0.22, math.nan, r + 0.78, r + 1], color="black", linewidth=2)
  several = len({name for name, _, _ in rows}) > 1
  ax.set_yticks(np.arange(len(rows)) + 0.5,
                [f"{short(name)}, {budget:,}" if several else f"{budget:,}" for name, budget, _ in rows])
  ax.invert_yaxis()
  ax.set_ylabel("budget (tokens)")
  ax.set_xlabel("response length (tokens)")
  ax.xaxis.set_major_formatter(_COMMA)
  bar = fig.colorbar(image, ax=ax, pad=0.015, aspect=12)
  bar.set_label("responses (%)", fontsize=9)
  bar.outline.set_visible(False)  # type: ignore[operator]
  bar.ax.tick_params(labelsize=8, colors=GREY)
  return fig


def short(name: str) -> str:
  """A name cut to what fits a legend, safe from matplotlib's mathematics."""
  name = name.replace("$", r"\$")
  return name if len(name) <= _SHORTENED else name[:_SHORTENED - 1] + "…"


def _curves(ax: Axes, curves: Sequence[Curve]) -> None:
  groups = list(dict.fromkeys(group for c in curves for group in c.groups))
  for i, c in enumerate(curves):
    at = [groups.index(group) for group in c.groups]
    ax.plot(at, c.tokens, color=SERIES[i % len(SERIES)], marker=MARKERS[i % len(MARKERS)], linewidth=2, markersize=5,
            label=c.run)
  ax.set_xticks(range(len(groups)), groups)
  ax.set_xlim(-0.3, len(groups) - 0.7)


def _cross(ax: Axes, p: Point, color: str) -> None:
  """The intervals of a point as thin bars."""
  style: dict[str, Any] = dict(color=color, linewidth=1, alpha=0.45, zorder=3)
  if p.tokens_span:
    ax.plot(p.tokens_span, [100 * p.accuracy] * 2, **style)
  if p.accuracy_span:
    ax.plot([p.tokens] * 2, [100 * a for a in p.accuracy_span], **style)


def _handle(i: int, name: str) -> Line2D:
  return Line2D([], [], color=SERIES[i % len(SERIES)], marker=MARKERS[i % len(MARKERS)], linewidth=2, markersize=5,
                label=short(name))


def _legend(fig: Figure, handles: Sequence[Any]) -> None:
  longest = max(len(str(h.get_label())) for h in handles)
  n_columns = max(1, min(4, 88 // (longest + 8)))
  fig.legend(handles=list(handles), loc="outside lower center", ncols=n_columns, frameon=False, fontsize=9)
