"""Figures of a run, drawn without a display and without pyplot's global state.

The `*_figure` functions return a Figure; `write_plots` saves all that a run has data for.
"""

from collections.abc import Callable, Mapping, Sequence
import io
import math
import os
import pathlib
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
import numpy as np

from hbpo_jax.files import atomic_write_bytes, read_rows
from hbpo_jax.reporting.tables import change, level_name, number, percent, signed_percent

# Okabe and Ito's palette, told apart with any colour vision; each series also has a marker or a label of its own.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
GREY, LIGHT, INK = "#767676", "#D0D0D0", "#222222"
SERIES = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DPI = 150


def length_by_budget_figure(
    rows: Sequence[Mapping[str, Any]], window: int | None = None, *, n_columns: int | None = None) -> Figure:
  """Response length over steps, one panel per budget: mean, a band of one standard deviation, and the budget.

  Args:
    rows: rows of metrics.jsonl with `budget_{b}/tokens_mean` and `budget_{b}/tokens_std`.
    window: rows in the running mean that is drawn, made odd; None means about a fortieth of all.
    n_columns: panels in a row; None means up to four, or two rows of them.
  Returns:
    A Figure with one Axes per budget. In each, the lines labelled `mean` and `budget`, and grey lines: the means of the
    other budgets.
  Raises:
    ValueError: when no row has a budget.
  """
  budgets = logged_budgets(rows)
  if not budgets:
    raise ValueError("metrics have no tag budget_*/tokens_mean; the length plot needs at least one row of training.")
  window = centred_window(rows, window)
  step = column(rows, "step")
  mean = {b: smooth(column(rows, f"budget_{b}/tokens_mean"), window) for b in budgets}
  std = {b: smooth(column(rows, f"budget_{b}/tokens_std"), window) for b in budgets}
  if n_columns is None:
    n_columns = len(budgets) if len(budgets) <= 4 else math.ceil(len(budgets) / 2)
  n_rows = math.ceil(len(budgets) / n_columns)
  fig, axes = grid(n_rows, n_columns, (max(2.6 * n_columns, 7.2), 2.9 * n_rows + 0.6), sharex=True, sharey=True)
  flat = axes.reshape(-1)
  for ax in flat[len(budgets):]:
    ax.set_visible(False)
  for ax, b in zip(flat, budgets):
    for other in budgets:
      if other != b:
        ax.plot(step, mean[other], color=LIGHT, linewidth=1, zorder=1)
    ax.fill_between(step, np.maximum(mean[b] - std[b], 0), mean[b] + std[b], color=BLUE, alpha=0.18, linewidth=0)
    ax.plot(step, mean[b], color=BLUE, linewidth=2, label="mean", marker="o" if len(rows) == 1 else None)
    ax.axhline(b, color=ORANGE, linestyle="--", linewidth=1.3, label="budget")
    ax.set_title(f"budget {b:,}", fontsize=10, color=INK)
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
  for ax in axes[:, 0]:
    ax.set_ylabel("response length (tokens)")
  for i, ax in enumerate(flat[:len(budgets)]):
    if i + n_columns >= len(budgets):  # Nothing below it.
      ax.tick_params(labelbottom=True)
      ax.set_xlabel("training step")
  top = max(float(np.nanmax(np.append(mean[b] + std[b], b))) for b in budgets)
  flat[0].set_ylim(0, 1.06 * top)
  flat[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
  handles, _ = flat[0].get_legend_handles_labels()
  others = [line for line in flat[0].lines if line.get_color() == LIGHT][:1]
  fig.legend(
      [*handles, flat[0].collections[0], *others],
      ["mean", "budget", "± 1 standard deviation", "other budgets"][:3 + len(others)],
      loc="outside lower center", ncols=4, frameon=False, fontsize=9)
  fig.suptitle("Response length by budget" + smoothing(window), fontsize=12, color=INK)
  return fig


def difficulty_figure(base: Mapping[str, Any], trained: Mapping[str, Any]) -> Figure:
  """Tokens and accuracy against difficulty level, before and after training.

  Args:
    base: result of `tables.evaluation_summary` before training.
    trained: after training.
  Returns:
    A Figure with two Axes, tokens and accuracy (per cent), each with the lines labelled `before` and `after`.
  Raises:
    ValueError: when the levels differ.
  """
  levels = [row["level"] for row in base["by_level"]]
  if levels != [row["level"] for row in trained["by_level"]]:
    raise ValueError("base and trained have different levels; evaluate both on the same problems.")
  positions = np.arange(len(levels))
  fig, axes = grid(1, 2, (9, 3.9))
  total = signed_percent(change(base["mean_tokens"], trained["mean_tokens"]))
  panels = (
      ("tokens", 1.0, "response length (tokens)",
       f"Tokens: {number(base['mean_tokens'])} → {number(trained['mean_tokens'])} ({total})"),
      ("accuracy", 100.0, "accuracy (%)",
       f"Accuracy: {percent(base['accuracy'])} → {percent(trained['accuracy'])}"))
  apart = 0.1 if len(levels) == 1 else 0.0  # Two single points would cover each other.
  for ax, (field, scale, label, title) in zip(axes[0], panels):
    for result, name, shift, color, marker, face in (
        (base, "before", -apart, GREY, "s", "white"), (trained, "after", apart, BLUE, "o", BLUE)):
      values = [scale * row[field] for row in result["by_level"]]
      ax.plot(
          positions + shift, values, color=color, marker=marker, markersize=6, markerfacecolor=face, linewidth=2,
          label=name)
    ax.set_xticks(positions, ["all" if levels == [None] else level_name(level) for level in levels])
    ax.set_xlim(-0.4, len(levels) - 0.6)
    ax.set_xlabel("" if levels == [None] else "difficulty level")
    ax.set_ylabel(label)
    ax.set_title(title, fontsize=11, color=INK)
  axes[0, 0].set_ylim(bottom=0)
  axes[0, 0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
  axes[0, 1].set_ylim(0, 104)
  axes[0, 0].legend(frameon=False, fontsize=10)
  return fig


def training_figure(rows: Sequence[Mapping[str, Any]], window: int | None = None) -> Figure:
  """Reward, accuracy and mean tokens over training steps: thin, as measured; thick, a running mean.

  Args:
    rows: rows of metrics.jsonl with `reward`, `accuracy` and `mean_tokens`.
    window: rows in the running mean, made odd; None means about a fortieth of all.
  Returns:
    A Figure with three Axes; in each the line labelled `mean` and, where the window is above 1, `step`.
  Raises:
    ValueError: when there is no row.
  """
  if not rows:
    raise ValueError("metrics have no row; the training plot needs at least one step.")
  window = centred_window(rows, window)
  step = column(rows, "step")
  fig, axes = grid(1, 3, (11, 3.5), sharex=True)
  panels = (("reward", 1.0, "mean reward", GREEN), ("accuracy", 100.0, "accuracy (%)", ORANGE),
            ("mean_tokens", 1.0, "response length (tokens)", BLUE))
  for ax, (tag, scale, label, color) in zip(axes[0], panels):
    values = scale * column(rows, tag)
    if window > 1:
      ax.plot(step, values, color=color, alpha=0.3, linewidth=0.9, label="step")
    marker = "o" if len(rows) == 1 else None
    ax.plot(step, smooth(values, window), color=color, linewidth=2, label="mean", marker=marker)
    ax.set_title(label, fontsize=11, color=INK)
    ax.set_xlabel("training step")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
  axes[0, 1].set_ylim(0, 104)
  axes[0, 2].set_ylim(bottom=0)
  axes[0, 2].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
  fig.suptitle("Training" + smoothing(window), fontsize=12, color=INK)
  return fig


def reward_curves_figure(n_gen_N: Any, reward_GN: Any, budgets: Sequence[int]) -> Figure:
  """The reward of a correct answer against its length, one curve per budget; a wrong answer's reward, 0, is dashed.

  Args:
    n_gen_N: int [N], lengths in tokens, increasing.
    reward_GN: float [G, N], reward of a correct answer of that length under each budget.
    budgets: G budgets; a dot marks each on its curve.
  Raises:
    ValueError: when the shapes do not fit.
  """
  n_gen_N, reward_GN = np.asarray(n_gen_N, np.float64), np.asarray(reward_GN, np.float64)
  if reward_GN.shape != (len(budgets), len(n_gen_N)):
    raise ValueError(
        f"reward_GN has shape {reward_GN.shape}; {len(budgets)} budgets and {len(n_gen_N)} lengths ask for [G, N].")
  fig, axes = grid(1, 1, (7, 4))
  ax = axes[0, 0]
  for color, budget, reward_N in zip(ordered_colors(len(budgets)), budgets, reward_GN):
    ax.plot(n_gen_N, reward_N, color=color, linewidth=1.8, label=f"{budget:,}")
    ax.plot([budget], [np.interp(budget, n_gen_N, reward_N)], "o", color=color, markersize=6)
  ax.axhline(0, color=GREY, linestyle="--", linewidth=1)
  ax.annotate("wrong answer", (n_gen_N[0], 0), xytext=(4, 4), textcoords="offset points", fontsize=9, color=GREY)
  ax.set_xlabel("response length (tokens)")
  ax.set_ylabel("reward of a correct answer")
  ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
  ax.legend(title="budget (tokens)", frameon=False, fontsize=9)
  return fig


def png(fig: Figure) -> bytes:
  """A figure as PNG; the same figure gives the same bytes."""
  buffer = io.BytesIO()
  fig.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
  return buffer.getvalue()


def save(fig: Figure, path: str | os.PathLike) -> None:
  """Writes a figure as PNG, atomically."""
  atomic_write_bytes(path, png(fig))


def write_plots(
    workdir: str | os.PathLike, base: Mapping[str, Any] | None,
    trained: Mapping[str, Any] | None) -> list[pathlib.Path]:
  """Draws what the run has data for, from WORKDIR/metrics.jsonl and the two evaluations.

  Args:
    workdir: directory of the run.
    base: result of `tables.evaluation_summary` before training, or None without an evaluation.
    trained: after training, or None.
  Returns:
    Paths written: plots/length_by_budget.png, plots/training.png (with metric rows), plots/difficulty.png (with
    both evaluations).
  Raises:
    ValueError: when metrics.jsonl is damaged or the evaluations do not fit together.
  """
  workdir = pathlib.Path(workdir)
  metrics = workdir / "metrics.jsonl"
  rows = read_rows(metrics) if metrics.exists() else []
  todo: list[tuple[str, Callable[[], Figure]]] = []
  if logged_budgets(rows):
    todo.append(("length_by_budget", lambda: length_by_budget_figure(rows)))
  if base is not None and trained is not None:
    todo.append(("difficulty", lambda: difficulty_figure(base, trained)))
  if rows:
    todo.append(("training", lambda: training_figure(rows)))
  written = []
  for name, draw in todo:
    written.append(workdir / "plots" / f"{name}.png")
    save(draw(), written[-1])
  return written


def grid(n_rows: int, n_columns: int, size: tuple[float, float], *, sharex: bool = False,
         sharey: bool = False) -> tuple[Figure, np.ndarray]:
  """(Figure of a size in inches, its Axes [n_rows, n_columns]) in the house style."""
  fig = Figure(figsize=size, layout="constrained")
  FigureCanvasAgg(fig)
  axes = fig.subplots(n_rows, n_columns, squeeze=False, sharex=sharex, sharey=sharey)
  for ax in axes.reshape(-1):
    tidy(ax)
  return fig, axes


def tidy(ax: Axes) -> None:
  """Puts an Axes in the house style: two spines, thin horizontal rules, small ticks."""
  for side in ("top", "right"):
    ax.spines[side].set_visible(False)
  for side in ("left", "bottom"):
    ax.spines[side].set_color(GREY)
  ax.tick_params(colors=GREY, labelcolor=INK, labelsize=9)
  ax.grid(axis="y", color="#EBEBEB", linewidth=0.8)
  ax.set_axisbelow(True)


def logged_budgets(rows: Sequence[Mapping[str, Any]]) -> list[int]:
  """The budgets whose lengths the rows log, ascending."""
  tags = {tag for row in rows for tag in row if tag.startswith("budget_") and tag.endswith("/tokens_mean")}
  return sorted(int(tag.removeprefix("budget_").removesuffix("/tokens_mean")) for tag in tags)


def column(rows: Sequence[Mapping[str, Any]], tag: str) -> np.ndarray:
  """The values of a tag, one per row; NaN, a gap in a line, where a row lacks it or holds null."""
  return np.asarray([math.nan if row.get(tag) is None else row[tag] for row in rows], np.float64)


def centred_window(rows: Sequence[Mapping[str, Any]], window: int | None) -> int:
  """The rows of a running mean, made odd so that it is centred; None means about a fortieth of all."""
  return 2 * ((max(1, round(len(rows) / 40)) if window is None else window) // 2) + 1


def smooth(values: np.ndarray, window: int) -> np.ndarray:
  """Centred running mean over `window` values; over fewer at the ends, and where values are missing."""
  half = window // 2
  means = np.full_like(values, math.nan)
  for i in range(len(values)):
    near = values[max(0, i - half):i + half + 1]
    if not math.isnan(values[i]):
      means[i] = np.nanmean(near)
  return means


def smoothing(window: int) -> str:
  """What a title says of the running mean; empty for none."""
  return f" (running mean over {window} rows)" if window > 1 else ""


def ordered_colors(n: int) -> list[tuple[float, ...]]:
  """n colours for ordered budgets; viridis stays distinct with any colour vision, and its pale end is left off."""
  return [tuple(colormaps["viridis"](x)) for x in np.linspace(0, 0.82, n)]
