"""Graders of the user's own, named in `reward.grader`."""

from collections.abc import Callable, Hashable, Mapping, Sequence
import dataclasses
from typing import Any

from hbpo_jax import user_code
from hbpo_jax.grading.pool import check_lengths
from hbpo_jax.grading.verdict import Verdict

_FIRST = "A first try.\n</think>\n\n\\boxed{0}"
CustomFunction = Callable[[list[str], list[dict]], Sequence[float]]


def load_custom(dotted_path: str) -> "CustomGrader":
  """The grader of a dotted path, such as 'my_task.grading.score', or of a file's function, 'my_task.py:score'.

  It names a function (responses: list[str], problems: list[dict]) -> one number in [0, 1] for each response. A problem
  has the fields of its source: id, problem, answer, source and so on. The number scales the budget reward, in place of
  the built-in verdict; every response counts as finished. The function runs in the training process, once per step,
  on all responses of the step; limits on time are its own affair.

  Raises:
    ValueError: when there is no such module, file or function; names the path.
  """
  return CustomGrader(user_code.load(dotted_path, "reward.grader"), dotted_path)


class CustomGrader:
  """A user's function behind the interface of `Grader`. The `answer` of an item is its whole problem.

  Also callable: grader(responses, problems) -> verdicts.
  """

  def __init__(self, function: CustomFunction, name: str):
    """Args:
      function: see `load_custom`.
      name: what errors and the journal call it.
    """
    self._function = function
    self.identity = name
    self._waiting: dict[Hashable, tuple[str, dict]] = {}

  def __enter__(self) -> "CustomGrader":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    """Forgets what was not collected."""
    self._waiting = {}

  def try_on(self, problem: Mapping[str, Any]) -> None:
    """Calls the function once, with a made-up response, so that a mistake in it shows before anything is computed.

    Raises:
      ValueError: when it fails, or returns what it must not; names the error and what the function is given.
    """
    try:
      scores = self._function([_FIRST], [dict(problem)])
    except Exception as error:
      raise ValueError(
          f"reward.grader={self.identity!r} failed when it was tried on one response: {type(error).__name__}: {error}; "
          f"it gets a list of texts and a list of dicts with {', '.join(problem)} (see --traceback).") from error
    self._verdicts(scores, 1)

  def submit(self, key: Hashable, response: str, answer: Any, *, thinking_opened: bool) -> None:
    """Keeps one response and its problem (a mapping or a dataclass) until `collect`.

    `thinking_opened` is not used: the function sees whole texts.
    """
    del thinking_opened
    if key in self._waiting:
      raise ValueError(f"key={key!r} was submitted already; collect() before you use it again.")
    if dataclasses.is_dataclass(answer) and not isinstance(answer, type):
      problem = dataclasses.asdict(answer)
    elif isinstance(answer, Mapping):
      problem = dict(answer)
    else:
      raise ValueError(f"item {key!r}: a grader of your own gets whole problems; give a dict, not {answer!r}.")
    self._waiting[key] = (response, problem)

  def collect(self) -> dict[Hashable, Verdict]:
    """Calls the function on everything submitted and returns the verdicts by key.

    Raises:
      ValueError: when it returns another count of numbers, or one outside [0, 1].
    """
    waiting, self._waiting = self._waiting, {}
    if not waiting:
      return {}
    scores = self._function([r for r, _ in waiting.values()], [p for _, p in waiting.values()])
    return dict(zip(waiting, self._verdicts(scores, len(waiting)), strict=True))

  def grade_batch(self, responses: Sequence[str], answers: Sequence[Any], *, thinking_opened: bool) -> list[Verdict]:
    """The verdicts on a batch, in order; `answers` are the problems.

    Raises:
      ValueError: when the lengths differ, or the function returns what it must not.
    """
    check_lengths(responses, answers)
    for i, (response, problem) in enumerate(zip(responses, answers, strict=True)):
      self.submit(i, response, problem, thinking_opened=thinking_opened)
    return list(self.collect().values())

  def _verdicts(self, scores: Any, count: int) -> list[Verdict]:
    where = f"reward.grader={self.identity!r}"
    if isinstance(scores, (str, bytes)) or not hasattr(scores, "__len__") or not hasattr(scores, "__getitem__"):
      raise ValueError(f"{where} returned {type(scores).__name__}; return a list of {count} numbers.")
    if len(scores) != count:
      raise ValueError(f"{where} returned {len(scores)} numbers for {count} responses; return one for each, in order.")
    verdicts = []
    for i in range(count):
      value = scores[i].item() if hasattr(scores[i], "item") else scores[i]
      # Written so that NaN is refused too.
      if not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{where} returned {value!r} for response {i}; return a number from 0 to 1.")
      verdicts.append(Verdict(float(value), "correct" if value == 1 else "wrong"))
    return verdicts
