"""From responses to verdicts, as training and evaluation ask for them: built-in grading or the user's function."""

from collections.abc import Sequence
import dataclasses
import os
from typing import Any

from hbpo_jax.config import Config
from hbpo_jax.data.record import Problem
from hbpo_jax.grading.custom import load_custom
from hbpo_jax.grading.journal import Journal, grade_step
from hbpo_jax.grading.pool import Grader
from hbpo_jax.grading.verdict import Verdict


class Judge:
  """A context manager that owns the grader and the journal of verdicts. All prompts are taken to open `<think>`."""

  def __init__(self, cfg: Config, journal_dir: str | os.PathLike):
    """Loads the user's grader, if `reward.grader` names one, which replaces the built-in one.

    Raises:
      ValueError: when reward.grader cannot be imported.
    """
    self._is_custom = bool(cfg.reward.grader)
    self._grader = load_custom(cfg.reward.grader) if self._is_custom else Grader(cfg.grading)
    self._journal = Journal(journal_dir)

  def __enter__(self) -> "Judge":
    return self

  def __exit__(self, *_: Any) -> None:
    self._grader.close()

  def __call__(self, responses: Sequence[str], problems: Sequence[Problem], step: int | None = None) -> list[Verdict]:
    """A verdict per response.

    Args:
      responses: texts that follow the opened `<think>`.
      problems: the problem of each response.
      step: the training step, whose verdicts are journalled so that a resumed run repeats them; None for evaluation.
    """
    # The built-in grader wants the accepted answers, a user's function the whole problem.
    answers = [dataclasses.asdict(p) if self._is_custom else p.answers for p in problems]
    return grade_step(
        self._grader, None if step is None else self._journal, step or 0, responses, answers, thinking_opened=True)

  def forget_before(self, step: int) -> None:
    """Removes the journals of steps that no checkpoint will ask for again."""
    self._journal.prune(step)
