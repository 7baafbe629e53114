"""What will this configuration reward? The curves, the traps on them and what to change, before anything is trained.

  python -m hbpo_jax.preview --config=deepscaler_1p5b --workdir=runs/preview

Reads no model and no data, and asks for no accelerator. Writes DIR/preview/: preview.md, preview.json,
reward_curves.png, advantages.png. Where DIR is an evaluation, or a run with a metrics.jsonl, the lengths measured there
tell which share of responses is concerned.
"""

from hbpo_jax import flags

if __name__ == "__main__":
  flags.show_help("preview")  # Before the imports below, which take seconds.

from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib

import jax
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
import numpy as np

from hbpo_jax import run_info, validation
from hbpo_jax.config import Config
from hbpo_jax.evaluation import store
from hbpo_jax.files import atomic_write_text, json_value, read_rows
from hbpo_jax.objective.forms import FORMS
from hbpo_jax.reporting import curves, plots, tables
from hbpo_jax.reporting.console import Console
from hbpo_jax.reporting.curve_findings import lengths_of_moments
from hbpo_jax.reporting.curves import Findings, Lengths, Shape

FIRST_ROWS = 20  # Of a metrics.jsonl: the lengths that training starts with, when caps cut most.


def write(cfg: Config, folder: str | os.PathLike, lengths: Lengths | None = None) -> Findings:
  """Checks a configuration and writes preview.md, preview.json and, where there is one, two figures into `folder`.

  Args:
    cfg: valid settings.
    folder: made if missing.
    lengths: of responses that were measured, if there are any.
  """
  folder = pathlib.Path(folder)
  findings = curves.check(cfg, lengths)
  if findings.shape is not None:
    _save_figures(cfg, findings.shape, folder)
  atomic_write_text(
      folder / "preview.json", json.dumps(json_value(dataclasses.asdict(findings)), indent=2, allow_nan=False) + "\n")
  atomic_write_text(folder / "preview.md", _markdown(cfg, findings))
  return findings


def _save_figures(cfg: Config, shape: Shape, folder: pathlib.Path) -> None:
  plots.save(reward_figure(cfg, shape), folder / "reward_curves.png")
  plots.save(advantages_figure(cfg, shape), folder / "advantages.png")


def measured_lengths(directory: str | os.PathLike, budgets: Sequence[int]) -> Lengths | None:
  """Lengths of the responses of an evaluation, or of the first steps of a run; None where the directory has neither.

  From a run, each budget has the log-normal distribution with the mean and standard deviation that were logged.

  Raises:
    ValueError: when the evaluation or the log is damaged.
  """
  directory = pathlib.Path(directory)
  if store.is_evaluation(directory):
    return _evaluated_lengths(directory, budgets)
  metrics = directory / "metrics.jsonl"
  rows = read_rows(metrics)[:FIRST_ROWS] if metrics.exists() else []
  tokens: dict[int | None, np.ndarray] = {}
  panels = ((b, f"budget_{b}/tokens_mean", f"budget_{b}/tokens_std") for b in budgets)
  for budget, mean, std in ((None, "mean_tokens", "tokens_std"), *panels):
    pairs = [(row[mean], row[std]) for row in rows if row.get(mean) and row.get(std) is not None]
    if pairs:
      tokens[budget] = lengths_of_moments(*np.mean(pairs, axis=0))
  if not tokens:
    return None
  return Lengths(f"as logged in the first {len(rows)} rows of {metrics}, taken to be log-normal", tokens)


def _evaluated_lengths(directory: pathlib.Path, budgets: Sequence[int]) -> Lengths | None:
  by_mode: dict[str, list[int]] = {}
  for rows in store.open_existing(directory).rows.values():
    for row in rows:
      by_mode.setdefault(row["mode"], []).append(row["n_gen"])
  tokens: dict[int | None, np.ndarray] = {b: np.sort(by_mode[str(b)]) for b in budgets if str(b) in by_mode}
  if "natural" in by_mode:
    tokens[None] = np.sort(by_mode["natural"])
  if not tokens:
    return None
  return Lengths(f"evaluation in {directory}, {sum(map(len, tokens.values())):,} responses", tokens)


def reward_figure(cfg: Config, shape: Shape) -> Figure:
  """`plots.reward_curves_figure` with caps, the lengths at which the best budget changes, and the falls below zero.

  Returns:
    A Figure with one Axes: a curve per budget, dotted beyond its cap; a vertical line at each switch, labelled with
    its length; a cross where a correct answer begins to score below a wrong one, its length in the legend.
  """
  n_gen_N, reward_GN = curves.reward_curves(cfg)
  within_GN = n_gen_N <= np.array(cfg.caps)[:, None]
  fig = plots.reward_curves_figure(n_gen_N, np.where(within_GN, reward_GN, np.nan), cfg.rollout.budgets)
  fig.set_size_inches(9, 5)
  ax = fig.axes[0]
  lines = [line for line in ax.lines if not str(line.get_label()).startswith("_")]
  handles = []
  for line, b, reward_N in zip(lines, shape.budgets, reward_GN, strict=True):
    label = f"{b.budget:,}"
    if b.cap < len(n_gen_N):
      ax.plot(n_gen_N[b.cap - 1:], reward_N[b.cap - 1:], ":", color=line.get_color(), linewidth=1.2)
      label += f", cap {b.cap:,}"
    if b.below_wrong_from is not None:
      ax.plot([b.below_wrong_from], [reward_N[b.below_wrong_from - 1]], "x", color=line.get_color(), markersize=7)
      label += f", × from {b.below_wrong_from:,}"
    handles.append(Line2D([], [], color=line.get_color(), linewidth=1.8, label=label))
  low, high = float(min(reward_GN.min(), shape.budgets[0].unfinished, 0.0)), float(reward_GN.max())
  room = 0.16 * (high - low)  # For the labels of the switches.
  ax.set_ylim(low - 0.06 * (high - low), high + (room if shape.switches else 0.3 * room))
  for switch in shape.switches:
    ax.axvline(switch.n_gen, color=plots.GREY, linestyle=":", linewidth=1, zorder=0)
    ax.annotate(
        f"{switch.n_gen:,}", (switch.n_gen, 1), xycoords=("data", "axes fraction"), xytext=(-2, -3),
        textcoords="offset points", rotation=90, ha="right", va="top", fontsize=8, color=plots.INK)
  unfinished = shape.budgets[0].unfinished
  if abs(unfinished - shape.budgets[0].wrong) > shape.tolerance:
    ax.axhline(unfinished, color=plots.GREY, linestyle="-.", linewidth=1)
    ax.annotate("unfinished answer", (1, unfinished), xytext=(4, 4), textcoords="offset points", fontsize=9,
                color=plots.GREY)
  for text in ax.texts:  # No line runs through a word.
    text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
  if (inner := ax.get_legend()) is not None:
    inner.remove()
  crossed = any(b.below_wrong_from is not None for b in shape.budgets)
  fig.legend(
      handles=handles, title="budget" + (" (×: below a wrong answer)" if crossed else ""), frameon=False, fontsize=9,
      loc="outside lower center", ncols=min(4 if max(len(h.get_label()) for h in handles) < 24 else 2, len(handles)))
  title = f"Reward of a correct answer, form {cfg.reward.form}"
  ax.set_title(title + ("; lines: the best budget changes" if shape.switches else ""), fontsize=11, color=plots.INK)
  return fig


def advantages_figure(cfg: Config, shape: Shape) -> Figure:
  """Advantages by budget, one panel per group of `shape.groups`.

  Returns:
    A Figure with four Axes; in each, bars of the weighted A_intra and of A_inter, and a marker at their sum.
  """
  fig, axes = plots.grid(2, 2, (10, 6.6), sharey=True)
  x = np.arange(len(shape.budgets))
  number = lambda values: np.array([np.nan if v is None else v for v in values], float)
  titles = ("All wrong", "All right, each as long as its budget", "Half right: the right ones",
            "Half right: the wrong ones")
  for ax, group, title in zip(axes.reshape(-1), shape.groups, titles, strict=True):
    intra, inter = cfg.advantage.intra_coef * number(group.intra), number(group.inter)
    ax.bar(x - 0.19, intra, 0.36, color=plots.ORANGE, label="weighted A_intra")
    ax.bar(x + 0.19, inter, 0.36, color=plots.BLUE, label="A_inter")
    ax.plot(x, number(group.total), "D", color=plots.INK, markersize=6, markeredgecolor="white", label="total")
    ax.axhline(0, color=plots.GREY, linewidth=1)
    ax.set_xticks(x, [f"{b.budget:,}" for b in shape.budgets], rotation=45 if len(x) > 8 else 0)
    ax.set_xlim(-0.6, len(x) - 0.4)
    ax.tick_params(labelleft=True)
    ax.set_title(title, fontsize=11, color=plots.INK)
  for ax in axes[1]:
    ax.set_xlabel("budget (tokens)")
  for ax in axes[:, 0]:
    ax.set_ylabel("advantage")
  handles, labels = axes[0, 0].get_legend_handles_labels()
  fig.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
  return fig


def budget_table(shape: Shape) -> tables.Table:
  """Rewards and traps by budget."""
  number = lambda n: "-" if n is None else f"{n:,}"
  rows = [(
      f"{b.budget:,}", f"{b.cap:,}", f"{b.highest:z.3f}", "{:,} to {:,}".format(*b.best_lengths), f"{b.lowest:z.3f}",
      number(b.below_wrong_from), f"{b.intra_low:+z.2f} to {b.intra_high:+z.2f}",
      f"{b.push_down:+z.2f} to {b.push_up:+z.2f}") for b in shape.budgets]
  return tables.Table(
      title="Reward of a correct answer, and advantages",
      columns=("budget", "cap", "highest", "at tokens", "lowest", "below wrong from", "A_intra", "total advantage"),
      rows=tuple(rows))


def group_table(shape: Shape) -> tables.Table:
  """Total advantage by group and budget."""
  number = lambda v: "-" if v is None else f"{v:+z.2f}"
  return tables.Table(
      title="Total advantage of each response, by budget",
      columns=("group", *(f"{b.budget:,}" for b in shape.budgets)),
      rows=tuple((group.what, *map(number, group.total)) for group in shape.groups))


def _switch_lines(shape: Shape) -> list[str]:
  lines = [f"From {s.n_gen:,} tokens on, budget {s.after:,} has the best reward, no longer {s.before:,}."
           for s in shape.switches]
  return lines or (["No budget takes over from another as a response grows."] if len(shape.budgets) > 1 else [])


def _markdown(cfg: Config, findings: Findings) -> str:
  shape = findings.shape
  if shape is None:
    return f"# Preview of rewards and advantages\n\nForm `{findings.form}`: {findings.nothing}\n"
  default = FORMS[findings.form].alpha
  alpha = ("1 / L_max" if default is None else f"{default:g}") if cfg.reward.alpha is None else f"{cfg.reward.alpha:g}"
  weighed = f" x {cfg.reward.distance_weight:g}" if cfg.reward.distance_weight != 1 else ""
  parts = [
      "# Preview of rewards and advantages\n",
      f"Form `{findings.form}`, alpha {alpha}{weighed}, beta {cfg.reward.beta:g}, "
      f"L_max {findings.max_response_tokens:,}; intra_coef {findings.intra_coef:g}, "
      f"center_intra {'true' if findings.center_intra else 'false'}; {cfg.rollouts_per_budget} responses per budget.\n",
      "## Warnings\n"]
  parts += [f"- **{w.kind}**: {w.text}" for w in findings.warnings] or ["None."]
  parts += [
      "\n## Rewards\n", "![Reward of a correct answer against its length](reward_curves.png)\n",
      budget_table(shape).to_markdown(), *(f"- {line}" for line in _switch_lines(shape)),
      "\n\"at tokens\": the lengths over which the highest reward is earned. \"A_intra\" and \"total advantage\": the "
      "least and the largest that can occur, the latter in groups of wrong and of right answers as long as their "
      "budget.\n",
      "## Advantages\n", "![Advantages by budget in four kinds of groups](advantages.png)\n",
      group_table(shape).to_markdown()]
  return "\n".join(parts)


def main(cfg: Config, workdir: str) -> None:
  """Checks, prints, and writes WORKDIR/preview."""
  jax.config.update("jax_platforms", "cpu")  # An accelerator may be busy with a run.
  # Devices are not looked at: as many as the mesh names.
  mesh = cfg.mesh
  validation.validate(cfg, n_devices=mesh.data * mesh.tensor * max(mesh.fsdp, 1))
  findings = write(cfg, pathlib.Path(workdir) / "preview", measured_lengths(workdir, cfg.rollout.budgets))
  shape = findings.shape
  with Console(dataclasses.replace(cfg.log, live=False), 1) as console:
    console.header([*run_info.describe_profile(cfg), ""])
    if shape is None:
      console.message(findings.nothing)
      return
    console.table(budget_table(shape))
    console.table(group_table(shape))
    for line in _switch_lines(shape):
      console.message(line)
    for warning in findings.warnings:
      console.message(f"\nwarning: {warning.kind}: {warning.text}")
    console.message(f"\nsee {pathlib.Path(workdir) / 'preview' / 'preview.md'}")


def cli(argv: Sequence[str] | None = None) -> None:
  """Runs the command with these arguments; None means the process's."""
  flags.run(main, name="preview", argv=argv)


if __name__ == "__main__":
  cli()
