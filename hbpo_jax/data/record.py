"""The record that every source of problems is turned into."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Problem:
  """One problem with its known answer.

  id: unique within its source.
  problem: the text that is put to the model, without instruction.
  answer: the answer that grading compares with.
  source: where it comes from, for reports.
  level: difficulty, 1 = easiest; None where the source has none.
  answers: every accepted form of the answer; holds at least `answer`.
  extra: the source's other fields (`solution` is used by the supervised warm start), or None.
  """
  id: str
  problem: str
  answer: str
  source: str
  level: int | None = None
  answers: tuple[str, ...] = ()
  extra: dict[str, Any] | None = None

  def __post_init__(self):
    if not self.answers:
      object.__setattr__(self, "answers", (self.answer,))
