"""The result of a run: WORKDIR/summary.json for programs and WORKDIR/summary.md for people."""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
from typing import Any

import numpy as np

from hbpo_jax import versions
from hbpo_jax.files import atomic_write_text, json_value, read_rows
from hbpo_jax.reporting import tables
from hbpo_jax.reporting.text import duration

_PLOTS = (
    ("length_by_budget", "Response length by budget over training"),
    ("difficulty", "Tokens and accuracy against difficulty, before and after"),
    ("training", "Reward, accuracy and length over training"),
)
_ENDS = 10  # Most rows of the training curve that stand for its start, and for its end.


def write_summary(
    workdir: str | os.PathLike, base: Mapping[str, Any] | None, trained: Mapping[str, Any] | None,
    config_dict: Mapping[str, Any], wall_s: float, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """Writes summary.json and summary.md, each atomically.

  summary.json: `base` and `trained` (accuracy, mean_tokens, by_level: list of {level, n, accuracy, tokens}, ...),
  `measured_on` ('evaluation', or 'training': the first and last steps of metrics.jsonl, for a run without an
  evaluation; 'nothing' where there is neither), `tokens_change` (relative: -0.5 is half the tokens),
  `accuracy_change` (difference of shares), `wall_s`, `profile`, `steps`, `versions`, and the entries of `extra`.

  Args:
    workdir: directory of the run, with its metrics.jsonl and plots if there are any.
    base: result of `tables.evaluation_summary` before training, or None without an evaluation.
    trained: the same after training, or None.
    config_dict: the run's settings as plain values (`config.to_json_dict`); `profile` and `steps` are read.
    wall_s: seconds that the run took.
    extra: more top-level entries, such as the path of the export.
  Returns:
    What summary.json holds.
  Raises:
    ValueError: when only one of base and trained is given, they were measured on different problems, or `extra` has
      an entry of the same name as a field above.
  """
  if (base is None) != (trained is None):
    raise ValueError("only one of base and trained is given; evaluate before and after training, or neither.")
  workdir = pathlib.Path(workdir)
  measured_on, spans = "evaluation", None
  if base is None or trained is None:
    base, trained, spans = _training_ends(workdir / "metrics.jsonl")
    measured_on = "training" if spans else "nothing"
  summary: dict[str, Any] = {
      "base": base,
      "trained": trained,
      "measured_on": measured_on,
      "tokens_change": tables.change(base["mean_tokens"], trained["mean_tokens"]) if base and trained else None,
      "accuracy_change": trained["accuracy"] - base["accuracy"] if base and trained else None,
      "wall_s": round(wall_s, 3),
      "profile": config_dict["profile"],
      "steps": config_dict["steps"],
      "versions": versions.installed(),
  }
  if clash := sorted(set(extra or {}) & set(summary)):
    raise ValueError(f"extra has an entry {clash[0]!r}, which the summary writes itself; rename it.")
  summary = json_value(summary | dict(extra or {}))
  plots = [(name, title) for name, title in _PLOTS if (workdir / "plots" / f"{name}.png").exists()]
  text = _markdown(summary, spans, plots)  # Before any file: if this refuses, neither is written.
  atomic_write_text(workdir / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
  atomic_write_text(workdir / "summary.md", text)
  return summary


def headline(summary: Mapping[str, Any]) -> str:
  """One sentence on what training changed.

  Args:
    summary: what `write_summary` returns.
  """
  base, trained = summary["base"], summary["trained"]
  if base is None:
    return "Nothing was measured: the run had no evaluation and logged no training step."
  tokens, accuracy = summary["tokens_change"], summary["accuracy_change"]
  if tokens is None:
    first = "Tokens per response cannot be compared"
  elif abs(tokens) < 5e-4:
    first = f"Tokens per response stayed at {tables.number(trained['mean_tokens'])}"
  else:
    first = (f"Tokens per response {'fell' if tokens < 0 else 'rose'} by {tables.percent(abs(tokens))} "
             f"({tables.number(base['mean_tokens'])} to {tables.number(trained['mean_tokens'])})")
  if abs(accuracy) < 5e-4:
    second = f"accuracy stayed at {tables.percent(trained['accuracy'])}"
  else:
    second = (f"accuracy {'fell' if accuracy < 0 else 'rose'} from {tables.percent(base['accuracy'])} "
              f"to {tables.percent(trained['accuracy'])}")
  return f"{first}; {second}."


def _training_ends(metrics: pathlib.Path) -> tuple[dict | None, dict | None, tuple[str, str] | None]:
  """Means over the first and the last rows of the training curve, and the steps they cover; None without rows."""
  rows = [row for row in (read_rows(metrics) if metrics.exists() else [])
          if row.get("accuracy") is not None and row.get("mean_tokens") is not None]
  if not rows:
    return None, None, None
  n = min(_ENDS, max(1, len(rows) // 5))

  def mean(part: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "accuracy": float(np.mean([row["accuracy"] for row in part])),
        "mean_tokens": float(np.mean([row["mean_tokens"] for row in part])),
        "by_level": [],
    }

  def steps(part: Sequence[Mapping[str, Any]]) -> str:
    first, last = part[0]["step"], part[-1]["step"]
    return f"step {first}" if first == last else f"steps {first} to {last}"

  return mean(rows[:n]), mean(rows[-n:]), (steps(rows[:n]), steps(rows[-n:]))


def _markdown(summary: Mapping[str, Any], spans: tuple[str, str] | None, plots: Sequence[tuple[str, str]]) -> str:
  parts = ["# Result of the run\n", f"**{headline(summary)}**\n"]
  if summary["measured_on"] == "evaluation":
    parts.append(tables.before_after(summary["base"], summary["trained"]).to_markdown())
  elif spans:
    parts.append(
        f"There was no evaluation (`data.n_eval` is 0). These are means over training responses, {spans[0]} against "
        f"{spans[1]}: other problems at the start than at the end, and every response opened with a budget sentence.\n")
  versions_text = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
  parts.append(
      f"{summary['steps']} steps, profile `{summary['profile']}`, wall time {duration(summary['wall_s'])} (h:mm:ss).\n"
      f"Versions: {versions_text}.\n")
  parts += [f"![{title}](plots/{name}.png)\n" for name, title in plots]
  return "\n".join(parts)
