"""What a grader says about one response."""

import dataclasses
from typing import Literal

Reason = Literal["correct", "wrong", "no_answer", "unfinished", "timeout"]
REASONS = ("correct", "wrong", "no_answer", "unfinished", "timeout")

# Longest answer kept in a verdict; verdicts are logged and journalled for every rollout.
MAX_LOGGED_ANSWER = 160


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The verdict on one response.

  score: in [0, 1]; 1 = right, and it scales the budget reward. The built-in grader gives only 0 and 1.
  reason: 'correct', 'wrong', 'no_answer' (finished, but no filled box), 'unfinished' (thinking never closed), or
    'timeout' (the comparison passed its CPU-time or memory limit, which counts as wrong).
  answer: the answer that was graded, cut to 160 characters; '' where none was found.
  """
  score: float
  reason: Reason
  answer: str = ""

  @property
  def correct(self) -> bool:
    """True = full score."""
    return self.score >= 1.0

  @property
  def finished(self) -> bool:
    """False = no closing '</think>' or no answer: what `reward.unfinished_reward` is about."""
    return self.reason not in ("no_answer", "unfinished")


def cut(answer: str) -> str:
  """The answer as a verdict keeps it, at most `MAX_LOGGED_ANSWER` characters."""
  return answer if len(answer) <= MAX_LOGGED_ANSWER else answer[:MAX_LOGGED_ANSWER - 3] + "..."
