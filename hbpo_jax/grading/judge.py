"""From responses to verdicts, as training and evaluation ask for them: built-in grading or the user's function.

Where a job has several processes, each grades its share of the responses, and all get all verdicts; a user's function
and the journal are the first process's alone.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
import dataclasses
import os
from typing import Any

from hbpo_jax import distributed
from hbpo_jax.config import Config
from hbpo_jax.data.record import Problem
from hbpo_jax.grading.custom import load_custom
from hbpo_jax.grading.journal import Journal, StepGrading
from hbpo_jax.grading.pool import Grader
from hbpo_jax.grading.verdict import Verdict


def try_custom(cfg: Config, problem: Problem) -> None:
  """Calls the user's function once, if `reward.grader` names one, before anything is computed.

  Raises:
    ValueError: when it cannot be imported, fails, or returns what it must not.
  """
  if cfg.reward.grader:
    grader = load_custom(cfg.reward.grader)
    distributed.from_writer("a trial of reward.grader", lambda: grader.try_on(dataclasses.asdict(problem)))


class Judge:
  """A context manager that owns the grader and the journal of verdicts. All prompts are taken to open `<think>`."""

  def __init__(self, cfg: Config, journal_dir: str | os.PathLike):
    """Loads the user's grader, if `reward.grader` names one, which replaces the built-in one.

    Raises:
      ValueError: when reward.grader cannot be imported.
    """
    self._is_custom = bool(cfg.reward.grader)
    self._grader = load_custom(cfg.reward.grader) if self._is_custom else Grader(cfg.grading)
    self._journal = _WritersJournal(journal_dir)

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
    grading = self.begin(step)
    for i, (response, problem) in enumerate(zip(responses, problems, strict=True)):
      grading.submit((i,), response, problem)
    verdicts = grading.collect()
    return [verdicts[i,] for i in range(len(responses))]

  def begin(self, step: int | None) -> "StepJudge":
    """Grading of a training step (None: of an evaluation, without a journal) whose responses come one by one."""
    grading = StepGrading(self._grader, None if step is None else self._journal, step or 0, thinking_opened=True)
    return StepJudge(grading, self._answer, in_order=self._is_custom)

  def _answer(self, problem: Problem) -> Any:
    # The built-in grader wants the accepted answers, a user's function the whole problem.
    return dataclasses.asdict(problem) if self._is_custom else problem.answers

  def forget_before(self, step: int) -> None:
    """Removes the journals of steps that no checkpoint will ask for again."""
    self._journal.prune(step)


class StepJudge:
  """Verdicts on the responses of one step, graded while others are still being written."""

  def __init__(self, grading: StepGrading, answer: Callable[[Problem], Any], *, in_order: bool):
    """Args:
      grading: of the step.
      answer: what a problem's responses are graded against.
      in_order: whether responses wait for `collect`, to be graded in the order of their keys: a user's function must
        not see which came first.
    """
    self._grading, self._answer, self._in_order = grading, answer, in_order
    self._held: dict[Any, tuple[str, Any]] = {}
    self._n_submitted = 0

  def submit(self, key: tuple[int, ...], response: str, problem: Problem) -> None:
    """Starts grading a response that follows the opened `<think>`; each key once."""
    if self._in_order:
      self._held[key] = response, self._answer(problem)
    else:
      # The order is the same in all processes, and nearly that of the response lengths: the shares are alike.
      self._grading.submit(key, response, self._answer(problem), here=distributed.is_mine(self._n_submitted))
      self._n_submitted += 1

  def collect(self) -> dict[Any, Verdict]:
    """Waits for all verdicts, writes them to the journal and returns them by key."""
    for key in sorted(self._held):
      self._grading.submit(key, *self._held[key], here=distributed.is_writer())
    self._held = {}
    return self._grading.collect(_join)


class _WritersJournal(Journal):
  """A journal that the writer reads for all processes, and alone writes."""

  def read(self, step: int) -> dict[str, Verdict] | None:
    """As `Journal.read`."""
    def found():
      verdicts = super(_WritersJournal, self).read(step)
      return None if verdicts is None else {name: dataclasses.astuple(v) for name, v in verdicts.items()}

    rows = distributed.from_writer(f"the verdicts stored of step {step}", found)
    return None if rows is None else {name: Verdict(*row) for name, row in rows.items()}

  def write(self, step: int, verdicts: Mapping[str, Verdict]) -> None:
    """As `Journal.write`."""
    if distributed.is_writer():
      super().write(step, verdicts)

  def prune(self, before_step: int) -> None:
    """As `Journal.prune`."""
    if distributed.is_writer():
      super().prune(before_step)


def _join(graded: dict[Hashable, Verdict]) -> dict[Hashable, Verdict]:
  """The verdicts of all processes, by key."""
  rows = [[key, *dataclasses.astuple(v)] for key, v in graded.items()]
  return {tuple(key): Verdict(*row) for share in distributed.exchange("verdicts", rows) for key, *row in share}
