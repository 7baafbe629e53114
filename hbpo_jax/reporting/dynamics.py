"""Figures of a training run's metrics: its course, several runs beside each other, and where its time went."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
import numpy as np

from hbpo_jax.reporting import plots
from hbpo_jax.reporting.figures import WIDTH, short
from hbpo_jax.reporting.plots import BLUE, GREEN, GREY, INK, LIGHT, ORANGE, SERIES, column, grid, smooth

Rows = Sequence[Mapping[str, Any]]
Checks = Mapping[int, tuple[float, float]]  # Evaluations in mid-run: step -> (accuracy, tokens).

_WASTE = (("useful", BLUE), ("truncated", "#CC79A7"), ("overrun", ORANGE), ("idle", LIGHT))
_STAGES = (("rollout", BLUE), ("grade", "#E69F00"), ("score", "#CC79A7"), ("update", GREEN))
_CLIPS = (("low", BLUE, "-"), ("high", ORANGE, "--"), ("dual", GREEN, ":"))
_COMPARED = (("reward", 1.0, "mean reward"), ("accuracy", 100.0, "accuracy (%)"),
             ("mean_tokens", 1.0, "response length (tokens)"), ("entropy", 1.0, "entropy (nats per token)"))


def course_figure(rows: Rows, checks: Checks, window: int | None = None) -> Figure:
  """A run over its steps: reward, accuracy, tokens, A_intra and A_inter by budget, entropy, spread, clip share.

  Panels without data are left out. Thin lines are steps, thick ones running means; the diamonds are evaluations.

  Args:
    rows: rows of metrics.jsonl.
    checks: evaluations by step, drawn beside accuracy and tokens.
    window: rows in the running mean, made odd; None means about a fortieth of all.
  Raises:
    ValueError: when there is no row.
  """
  if not rows:
    raise ValueError("metrics have no row; the figure needs at least one step.")
  window = plots.centred_window(rows, window)
  budgets = plots.logged_budgets(rows)
  panels: list[tuple[str, Any]] = []

  def simple(tag: str, scale: float, title: str, color: str, check: int | None = None) -> None:
    if _has(rows, tag):
      panels.append((title, lambda ax: _simple(ax, rows, tag, scale, color, window, check, checks)))

  simple("reward", 1.0, "mean reward", GREEN)
  simple("accuracy", 100.0, "accuracy (%)", ORANGE, 0)
  simple("mean_tokens", 1.0, "response length (tokens)", BLUE, 1)
  for tag, title in (("intra", "A_intra, mean by budget"), ("inter", "A_inter, mean by budget"),
                     ("inter_abs", "|A_inter|, mean by budget")):
    if any(_has(rows, f"budget_{b}/{tag}") for b in budgets):
      panels.append((title, lambda ax, tag=tag: _by_budget(ax, rows, tag, budgets, window)))
  simple("entropy", 1.0, "entropy (nats per sampled token)", "#CC79A7")
  simple("length_spread", 1.0, "spread of lengths within a query (tokens)", GREY)
  if any(_has(rows, f"update/clip_fraction_{name}") for name, _, _ in _CLIPS):
    panels.append(("clipped tokens (%)", lambda ax: _clips(ax, rows, window)))
  n_rows = -(-len(panels) // 2)
  fig, axes = grid(n_rows, 2, (WIDTH, 2.25 * n_rows + 0.5))
  flat = axes.reshape(-1)
  for ax in flat[len(panels):]:
    ax.set_visible(False)
  for i, (ax, (title, draw)) in enumerate(zip(flat, panels)):
    draw(ax)
    ax.set_title(title, fontsize=10, color=INK)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if i + 2 >= len(panels):
      ax.set_xlabel("training step")
  fig.suptitle(plots.smoothing(window).strip(" ()").capitalize(), fontsize=9, color=GREY)
  return fig


def compared_figure(runs: Sequence[tuple[str, Rows]], window: int | None = None) -> Figure:
  """Reward, accuracy, tokens and entropy of several runs, running means; a panel that no run has data for is empty.

  Raises:
    ValueError: when there is no run.
  """
  if not runs:
    raise ValueError("runs is empty; the figure needs at least one run with metrics.")
  shown = [panel for panel in _COMPARED if any(_has(rows, panel[0]) for _, rows in runs)]
  n_rows = -(-len(shown) // 2)
  fig, axes = grid(n_rows, 2, (WIDTH, 2.6 * n_rows + 0.5))
  for ax in axes.reshape(-1)[len(shown):]:
    ax.set_visible(False)
  for ax, (tag, scale, title) in zip(axes.reshape(-1), shown):
    for i, (name, rows) in enumerate(runs):
      values = smooth(scale * column(rows, tag), plots.centred_window(rows, window))
      ax.plot(column(rows, "step"), values, color=SERIES[i % len(SERIES)], linewidth=1.8, label=short(name),
              linestyle=("-", "--", ":")[i // len(SERIES) % 3])
    ax.set_title(title, fontsize=10, color=INK)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set_xlabel("training step")
    ax.yaxis.set_major_formatter(_plain_numbers())
  fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
  return fig


def waste_figure(rows: Rows) -> Figure:
  """Where decoding and time went, stacked over steps: shares of slot-steps, and seconds per stage.

  Returns:
    A Figure with an Axes titled `slot-steps (%)`, one titled `seconds per step`, or both.
  Raises:
    ValueError: when no row has either.
  """
  decoded = [row for row in rows if row.get("rollout/slot_steps")]
  timed = [row for row in rows if all(row.get(f"time/{name}_s") is not None for name, _ in _STAGES)]
  if not decoded and not timed:
    raise ValueError("metrics have no rollout/slot_steps and no time/*_s; the figure needs one of them.")
  n = bool(decoded) + bool(timed)
  fig, axes = grid(1, n, (WIDTH, 3.4))
  todo = list(axes[0])
  if decoded:
    ax, total = todo.pop(0), column(decoded, "rollout/slot_steps")
    _stack(ax, decoded, [(name, color, 100 * column(decoded, f"rollout/{name}") / total) for name, color in _WASTE])
    ax.set_ylim(0, 100)
    ax.set_title("slot-steps (%)", fontsize=10, color=INK)
  if timed:
    ax = todo.pop(0)
    parts = [(name, color, column(timed, f"time/{name}_s")) for name, color in _STAGES]
    _stack(ax, timed, parts)
    ax.set_title("seconds per step", fontsize=10, color=INK)
    total = np.sum([values for _, _, values in parts], axis=0)
    rest = total[1:].max() if len(total) > 1 else total.max()
    if total[0] > 2 * rest:  # The first step compiles; on its scale nothing else could be read.
      ax.set_ylim(0, 1.15 * rest)
      ax.annotate(f"step {timed[0]['step']}: {total[0]:,.0f} s, off the scale", (0, 1), xycoords="axes fraction",
                  xytext=(6, -12), textcoords="offset points", fontsize=8.5, color=INK)
    else:
      ax.set_ylim(0, 1.15 * total.max())
  return fig


def _stack(ax: Axes, rows: Rows, parts: Sequence[tuple[str, str, np.ndarray]]) -> None:
  step = column(rows, "step")
  values = [np.nan_to_num(v) for _, _, v in parts]
  if len(step) == 1:  # An area needs two ends.
    step, values = np.array([step[0], step[0] + 1]), [np.repeat(v, 2) for v in values]
  names, colors, _ = zip(*parts)
  ax.stackplot(step, values, colors=colors, labels=names, linewidth=0)
  ax.set_xlim(step[0], step[-1])
  ax.set_xlabel("training step")
  ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
  ax.legend(frameon=False, fontsize=8.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _simple(ax: Axes, rows: Rows, tag: str, scale: float, color: str, window: int, check: int | None,
            checks: Checks) -> None:
  step, values = column(rows, "step"), scale * column(rows, tag)
  if window > 1:
    ax.plot(step, values, color=color, alpha=0.3, linewidth=0.9, label="step")
  ax.plot(step, smooth(values, window), color=color, linewidth=1.8, label="training",
          marker="o" if len(rows) == 1 else None)
  if check is not None and checks:
    ax.plot(list(checks), [scale * checks[s][check] for s in checks], color=INK, marker="D", markersize=5,
            linewidth=0.8, linestyle=":", label="evaluation")
    ax.legend(*_without(ax, "step"), frameon=False, fontsize=8.5)
  if tag == "mean_tokens":
    ax.set_ylim(bottom=0)
  ax.yaxis.set_major_formatter(_plain_numbers())


def _by_budget(ax: Axes, rows: Rows, tag: str, budgets: Sequence[int], window: int) -> None:
  for b, color in zip(budgets, plots.ordered_colors(len(budgets))):
    ax.plot(column(rows, "step"), smooth(column(rows, f"budget_{b}/{tag}"), window), color=color, linewidth=1.5,
            label=f"{b:,}", marker="o" if len(rows) == 1 else None)
  if tag != "inter_abs":
    ax.axhline(0, color=GREY, linewidth=0.8, linestyle="--")
  ax.legend(frameon=False, fontsize=8, ncols=2, handlelength=1.2, columnspacing=1, labelspacing=0.2)
  low, high = ax.get_ylim()
  ax.set_ylim(low, high + 0.3 * (high - low))  # Room for the legend.


def _clips(ax: Axes, rows: Rows, window: int) -> None:
  for name, color, style in _CLIPS:
    if _has(rows, tag := f"update/clip_fraction_{name}") and (name != "dual" or np.nanmax(column(rows, tag)) > 0):
      ax.plot(column(rows, "step"), smooth(100 * column(rows, tag), window), color=color, linestyle=style,
              linewidth=1.6, label=name, marker="o" if len(rows) == 1 else None)
  ax.set_ylim(bottom=0)
  ax.legend(frameon=False, fontsize=8.5, ncols=3)


def _has(rows: Rows, tag: str) -> bool:
  return any(row.get(tag) is not None for row in rows)


def _plain_numbers() -> FuncFormatter:
  return FuncFormatter(lambda value, _: f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}")


def _without(ax: Axes, label: str) -> tuple[list[Any], list[str]]:
  pairs = [(h, t) for h, t in zip(*ax.get_legend_handles_labels()) if t != label]
  return [h for h, _ in pairs], [t for _, t in pairs]
