"""Evaluation results in numbers, and the before/after table by difficulty level."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np
import rich.table
import rich.text

from hbpo_jax.reporting.text import markdown, plain

# A difficulty level: a number, a name, or None where the problem does not say.
Level = int | float | str | None


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of ready-made text; the first column is aligned left, the others right.

  has_total: whether the last row is the total of the others.
  """
  title: str
  columns: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]
  has_total: bool = True

  def to_rich(self) -> rich.table.Table:
    """For a terminal; text is shown as it is, never read as markup."""
    table = rich.table.Table(title=rich.text.Text(plain(self.title)), title_justify="left")
    for i, column in enumerate(self.columns):
      table.add_column(rich.text.Text(plain(column)), justify="left" if i == 0 else "right")
    for i, row in enumerate(self.rows):
      total = len(self.rows) - 1 if self.has_total else len(self.rows)
      cells = [rich.text.Text(plain(cell)) for cell in row]
      table.add_row(*cells, style="bold" if i == total else "", end_section=i == total - 1)
    return table

  def to_markdown(self) -> str:
    """A Markdown table without the title, ending in a newline."""
    def line(cells: Sequence[str]) -> str:
      return "| " + " | ".join(markdown(cell) for cell in cells) + " |\n"

    rule = "|" + "|".join([":--"] + ["--:"] * (len(self.columns) - 1)) + "|\n"
    return line(self.columns) + rule + "".join(map(line, self.rows))

  def to_text(self) -> str:
    """Aligned plain text with the title, for logs; ends in a newline."""
    lines = [[plain(cell) for cell in row] for row in (self.columns, *self.rows)]
    widths = [max(len(row[i]) for row in lines) for i in range(len(self.columns))]
    text = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in lines]
    rule = "-" * len(text[0])
    return "\n".join([plain(self.title), text[0], rule, *text[1:]]) + "\n"


def evaluation_summary(
    levels: Sequence[Level] | None, correct: Any, n_gen: Any, truncated: Any) -> dict[str, Any]:
  """The numbers of one evaluation.

  Args:
    levels: difficulty of each of the M problems; None when they have none.
    correct: bool or float [M] or [M, S], score of each response (S responses per problem).
    n_gen: int, same shape, counted tokens.
    truncated: bool, same shape, whether the cap stopped the response.
  Returns:
    accuracy (0..1), mean_tokens, n (problems), truncated (share of responses), level_correlation (Spearman's of
    level and the problem's mean tokens; None without two numeric levels), by_level: a list of {level, n, accuracy,
    tokens} in order of level, without level last.
  Raises:
    ValueError: when there is no problem or the shapes differ.
  """
  correct, n_gen, truncated = (np.asarray(a, np.float64) for a in (correct, n_gen, truncated))
  if correct.ndim not in (1, 2) or correct.size == 0 or not correct.shape == n_gen.shape == truncated.shape:
    raise ValueError(
        f"correct, n_gen, truncated have shapes {correct.shape}, {n_gen.shape}, {truncated.shape}; give [M] or [M, S] "
        "with M and S at least 1, the same for all three.")
  M = correct.shape[0]
  if levels is not None and len(levels) != M:
    raise ValueError(f"levels has {len(levels)} entries for {M} problems; give one per problem, or None.")
  level_M = [None] * M if levels is None else [_plain(level) for level in levels]
  accuracy_M = correct.reshape(M, -1).mean(axis=1)
  tokens_M = n_gen.reshape(M, -1).mean(axis=1)
  by_level = []
  for level in sorted(set(level_M), key=_level_order):
    rows = [m for m in range(M) if level_M[m] == level]
    by_level.append({
        "level": level,
        "n": len(rows),
        "accuracy": float(accuracy_M[rows].mean()),
        "tokens": float(tokens_M[rows].mean()),
    })
  numeric = [m for m in range(M) if isinstance(level_M[m], int | float)]
  correlation = rank_correlation([level_M[m] for m in numeric], tokens_M[numeric]) if numeric else math.nan
  return {
      "accuracy": float(accuracy_M.mean()),
      "mean_tokens": float(tokens_M.mean()),
      "n": M,
      "truncated": float(truncated.mean()),
      "level_correlation": None if math.isnan(correlation) else correlation,
      "by_level": by_level,
  }


def rank_correlation(level: Any, tokens: Any) -> float:
  """Spearman's rank correlation of difficulty and length; ties get their mean rank.

  Args:
    level: numbers [M].
    tokens: numbers [M].
  Returns:
    -1..1; NaN when either is constant.
  Raises:
    ValueError: when the lengths differ or are 0.
  """
  level, tokens = np.asarray(level, np.float64), np.asarray(tokens, np.float64)
  if level.ndim != 1 or level.shape != tokens.shape or level.size == 0:
    raise ValueError(f"level and tokens have shapes {level.shape} and {tokens.shape}; give two of [M], M at least 1.")
  a, b = _ranks(level), _ranks(tokens)
  a, b = a - a.mean(), b - b.mean()
  scale = math.sqrt((a @ a) * (b @ b))
  return float(a @ b / scale) if scale > 0 else math.nan


def before_after(base: Mapping[str, Any], trained: Mapping[str, Any]) -> Table:
  """The before/after table by level with a total row.

  Args:
    base: result of `evaluation_summary` before training.
    trained: the same problems after training.
  Raises:
    ValueError: when the two have different levels or numbers of problems.
  """
  of_base, of_trained = ([(row["level"], row["n"]) for row in result["by_level"]] for result in (base, trained))
  if of_base != of_trained:
    raise ValueError(
        f"base and trained were evaluated on different problems: (level, n) is {of_base} and {of_trained}; "
        "evaluate both on the same set.")

  def row(name: str, a: Mapping[str, Any], b: Mapping[str, Any], tokens: str) -> tuple[str, ...]:
    return (name, f"{a['n']:,}", percent(a["accuracy"]), percent(b["accuracy"]), number(a[tokens]), number(b[tokens]),
            signed_percent(change(a[tokens], b[tokens])))

  rows = [
      row(level_name(a["level"]), a, b, "tokens") for a, b in zip(base["by_level"], trained["by_level"], strict=True)
  ] if [level for level, _ in of_base] != [None] else []
  return Table(
      title="Before and after training",
      columns=("level", "n", "accuracy before", "after", "tokens before", "after", "change"),
      rows=(*rows, row("all", base, trained, "mean_tokens")))


def change(before: float, after: float) -> float | None:
  """Relative change after / before - 1; None when before is 0."""
  return after / before - 1 if before else None


def level_name(level: Level) -> str:
  """How a level is shown: `-` for none."""
  return "-" if level is None else str(level)


def number(value: float) -> str:
  """A token count as text: one decimal below 1,000, else none and a comma."""
  return f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(share: float) -> str:
  """A share of 0..1 as text with one decimal."""
  return f"{100 * share:.1f} %"


def signed_percent(share: float | None) -> str:
  """A relative change as text with its sign; `n/a` for None."""
  return "n/a" if share is None else f"{100 * share:+.1f} %"


def _plain(level: Any) -> Level:
  return level.item() if isinstance(level, np.generic) else level


def _level_order(level: Level) -> tuple[int, float, str]:
  if level is None:
    return (2, 0.0, "")
  return (1, 0.0, level) if isinstance(level, str) else (0, float(level), "")


def _ranks(values: np.ndarray) -> np.ndarray:
  _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
  return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
