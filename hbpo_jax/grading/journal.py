"""Verdicts on disk, one file per step, so that a resumed run repeats them instead of grading anew."""

from collections.abc import Callable, Hashable, Mapping, Sequence
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
from typing import Any, Protocol

from hbpo_jax.files import atomic_write_text
from hbpo_jax.grading.verdict import REASONS, Verdict

_log = logging.getLogger(__name__)


class StepGrader(Protocol):
  """What grades: `Grader` and `CustomGrader`. `identity` tells verdicts of one grader from those of another."""
  identity: str

  def submit(self, key: Hashable, response: str, answer: Any, *, thinking_opened: bool) -> None: ...

  def collect(self) -> dict[Hashable, Verdict]: ...


def digest(identity: str, response: str, answer: Any, thinking_opened: bool) -> str:
  """The name of an item in the journal, hex: SHA-256 of the grader, response, answer and whether thinking was open.

  Args:
    identity: name of the grader.
    response: text of the response.
    answer: what it is graded against: a text, a list of texts, or a problem (a dict or dataclass) that JSON can hold.
    thinking_opened: whether the prompt ended inside '<think>'.
  """
  item = json.dumps([identity, response, answer, bool(thinking_opened)], sort_keys=True, default=dataclasses.asdict)
  return hashlib.sha256(item.encode()).hexdigest()


class Journal:
  """The verdicts of each step in a directory, which is made when the first step is written."""

  def __init__(self, directory: str | os.PathLike):
    self._dir = pathlib.Path(directory)

  def path(self, step: int) -> pathlib.Path:
    """The file of a step."""
    return self._dir / f"verdicts-{step:08d}.json"

  def read(self, step: int) -> dict[str, Verdict] | None:
    """The verdicts of a step by digest, or None where there are none. A damaged file is reported and left aside."""
    path = self.path(step)
    try:
      body = json.loads(path.read_bytes())
      if not isinstance(body, dict) or body.get("sum") != _checksum(body.get("verdicts")):
        raise ValueError("the checksum does not fit")
      verdicts = {}
      for name, (score, reason, answer) in body["verdicts"].items():
        if reason not in REASONS or not 0 <= score <= 1:
          raise ValueError(f"reason {reason!r} or score {score!r} is unknown")
        verdicts[name] = Verdict(float(score), reason, answer)
    except FileNotFoundError:
      return None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
      _log.warning("The verdicts of step %d in %s are damaged (%s); the step is graded again.", step, path, error)
      return None
    return verdicts

  def write(self, step: int, verdicts: Mapping[str, Verdict]) -> None:
    """Writes the verdicts of a step, by digest; the file is either the old one or the new one, whole, at any time."""
    rows = {name: [v.score, v.reason, v.answer] for name, v in sorted(verdicts.items())}
    atomic_write_text(self.path(step), json.dumps({"sum": _checksum(rows), "verdicts": rows}))
    directory = os.open(self._dir, os.O_RDONLY)
    try:
      os.fsync(directory)  # The new name, too, must outlast a crash.
    finally:
      os.close(directory)

  def prune(self, before_step: int) -> None:
    """Removes the verdicts of all steps before `before_step`, such as those before the oldest checkpoint."""
    for path in self._dir.glob("verdicts-*.json"):
      number = path.stem.removeprefix("verdicts-")
      if number.isdecimal() and int(number) < before_step:
        path.unlink()


class StepGrading:
  """Grading of one step with a journal: verdicts found there are reused, the others graded, and all written.

  `submit` each response when it is finished, `collect` at the end of the step.
  """

  def __init__(self, grader: StepGrader, journal: Journal | None, step: int, *, thinking_opened: bool):
    """Args:
      grader: a Grader or a CustomGrader.
      journal: None = keep no journal.
      step: number of the rollout batch.
      thinking_opened: whether the prompts ended inside '<think>'.
    """
    self._grader, self._journal, self._step, self._opened = grader, journal, step, thinking_opened
    self._known = (journal.read(step) if journal else None) or {}
    self._names: dict[Hashable, str] = {}

  def submit(self, key: Hashable, response: str, answer: Any, *, here: bool = True) -> None:
    """Starts grading one response, unless the journal has its verdict or (here=False) another process grades it.

    `answer`: see the grader.
    """
    if key in self._names:
      raise ValueError(f"key={key!r} was submitted already in step {self._step}; use each key once.")
    name = digest(self._grader.identity, response, answer, self._opened)
    if here and name not in self._known:
      self._grader.submit(key, response, answer, thinking_opened=self._opened)
    self._names[key] = name

  def collect(self, join: Callable[[dict[Hashable, Verdict]], dict[Hashable, Verdict]] = dict
              ) -> dict[Hashable, Verdict]:
    """The verdicts of the step by key, in order of submission. The journal holds them when this returns.

    Args:
      join: adds to the verdicts that were graded here those that were graded elsewhere.
    """
    graded = join(self._grader.collect())
    verdicts = {key: graded[key] if key in graded else self._known[name] for key, name in self._names.items()}
    if self._journal and graded:
      self._journal.write(self._step, {self._names[key]: v for key, v in verdicts.items()})
    return verdicts


def grade_step(
    grader: StepGrader,
    journal: Journal | None,
    step: int,
    responses: Sequence[str],
    answers: Sequence[Any],
    thinking_opened: bool,
) -> list[Verdict]:
  """The verdicts of a whole step, in order, by way of the journal; see `StepGrading`.

  Raises:
    ValueError: when there is not one answer per response.
  """
  if len(responses) != len(answers):
    raise ValueError(f"{len(responses)} responses but {len(answers)} answers; give one answer per response.")
  grading = StepGrading(grader, journal, step, thinking_opened=thinking_opened)
  for i, (response, answer) in enumerate(zip(responses, answers, strict=True)):
    grading.submit(i, response, answer)
  return list(grading.collect().values())


def _checksum(rows: Any) -> str:
  return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
