"""Patterns of reasoning: how much of a response is thinking, which words reflect, and the budget that it states."""

from collections import Counter
from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any

import numpy as np

from hbpo_jax.reporting.tables import Level

THINK_CLOSE = "</think>"
REFLECTION_WORDS = ("wait", "alternatively", "but", "remember", "check", "verify")

# For text in lower case: ignoring case takes twice as long, on texts of many thousand words.
_WORD = re.compile(rf"\b(?:{'|'.join(REFLECTION_WORDS)})\b")
# Models write the text that this reads. A bound on the digits keeps int() from refusing thousands of them.
_NUMBER = r"(?P<budget>[0-9]{1,3}(?:,[0-9]{3}){1,5}|[0-9]{1,18})(?![0-9])"


@dataclasses.dataclass(frozen=True)
class ResponsePatterns:
  """What one response shows.

  closed: whether it ends its thinking.
  inside: how often each of REFLECTION_WORDS occurs up to the first '</think>', or anywhere where that never comes.
  outside: how often after it.
  budget: the budget that it states in its opening, tokens; None where it states none.
  """
  closed: bool
  inside: tuple[int, ...]
  outside: tuple[int, ...]
  budget: int | None = None


def budget_pattern(sentence: str) -> re.Pattern[str]:
  """What finds a budget sentence at the start of a response; its group `budget` is the number.

  Any white space stands for any other, and the number may have commas between its thousands.

  Args:
    sentence: setting `prompt.budget_sentence`, such as 'I will answer within {budget} tokens.'.
  Raises:
    ValueError: when the sentence has no place for the budget.
  """
  first, *others = sentence.strip().split("{budget}")
  if not others:
    raise ValueError(
        f"prompt.budget_sentence={sentence!r} does not contain {{budget}}; write it where the number goes.")
  # Only the first number is read; every other place must repeat it.
  text = _flexible(first) + _NUMBER + "(?P=budget)".join(map(_flexible, others))
  return re.compile(r"\s*" + text)


def read(response: str, pattern: re.Pattern[str] | None) -> ResponsePatterns:
  """The patterns of one response.

  Args:
    response: text that follows the opened '<think>'.
    pattern: of `budget_pattern`; None where the opening was forced, so that it says nothing about the model.
  """
  inside, close, outside = response.partition(THINK_CLOSE)
  found = pattern.match(response) if pattern else None
  budget = int(found["budget"].replace(",", "")) if found else None
  return ResponsePatterns(bool(close), _count(inside), _count(outside), budget)


def summarise(
    rows: Sequence[Mapping[str, Any]], pattern: re.Pattern[str] | None, levels: Sequence[Level]) -> dict[str, Any]:
  """Means over the responses of one benchmark and mode.

  Args:
    rows: one per response: id, level, response, n_gen, n_think.
    pattern: of `budget_pattern`, or None where the mode forces a budget sentence.
    levels: the levels of the rows, in the order wanted.
  Returns:
    think_share (mean of n_think / n_gen over responses with tokens), reflection_inside and reflection_outside (mean
    count per response by word), reflection_inside_all and reflection_outside_all (of all words), states_budget (share
    of responses that open with a budget sentence; None without `pattern`), budgets_stated (share of all responses by
    budget, ascending), by_level: a list of {level, n (problems), think_share, reflection_inside_all, states_budget,
    budget_mean (of the budgets stated; None where there is none)}. Without rows every mean is None.
  """
  found = [read(row["response"], pattern) for row in rows]
  inside, outside = ([getattr(f, side) for f in found] for side in ("inside", "outside"))
  stated = Counter(f.budget for f in found if f.budget is not None)
  parts = [(level, [i for i, row in enumerate(rows) if row["level"] == level]) for level in levels]
  return {
      "think_share": _think_share(rows),
      "reflection_inside": _by_word(inside),
      "reflection_outside": _by_word(outside),
      "reflection_inside_all": _mean([sum(counts) for counts in inside]),
      "reflection_outside_all": _mean([sum(counts) for counts in outside]),
      "states_budget": _mean([f.budget is not None for f in found]) if pattern else None,
      "budgets_stated": {str(budget): stated[budget] / len(rows) for budget in sorted(stated)},
      "by_level": [{
          "level": level,
          "n": len({rows[i]["id"] for i in part}),
          "think_share": _think_share([rows[i] for i in part]),
          "reflection_inside_all": _mean([sum(inside[i]) for i in part]),
          "states_budget": _mean([found[i].budget is not None for i in part]) if pattern else None,
          "budget_mean": _mean([found[i].budget for i in part if found[i].budget is not None]),
      } for level, part in parts],
  }


def _flexible(text: str) -> str:
  """A pattern of the text in which any white space stands for any other, at its ends too."""
  words = r"\s+".join(map(re.escape, text.split()))
  before, after = (r"\s+" if part != text else "" for part in (text.lstrip(), text.rstrip()))
  return before + words + after if words else before


def _count(text: str) -> tuple[int, ...]:
  counts = Counter(_WORD.findall(text.lower()))
  return tuple(counts[word] for word in REFLECTION_WORDS)


def _by_word(counts: Sequence[tuple[int, ...]]) -> dict[str, float | None]:
  return {word: _mean([c[i] for c in counts]) for i, word in enumerate(REFLECTION_WORDS)}


def _think_share(rows: Sequence[Mapping[str, Any]]) -> float | None:
  return _mean([row["n_think"] / row["n_gen"] for row in rows if row["n_gen"]])


def _mean(values: Sequence[Any]) -> float | None:
  return float(np.mean(values)) if len(values) else None
