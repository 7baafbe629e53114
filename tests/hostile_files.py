"""Values that a damaged or hostile file may hold, and what a refusal must look like."""

from collections.abc import Callable, Iterator
import copy
from typing import Any

from hbpo_jax import flags

# In place of any value of a JSON file; `...` leaves it out.
JUNK = (None, True, -1, 0, 10**30, 1.5, -1e300, "", "x", "../../x", "\u001b[31m\u202e", "a\nb", [], {}, [1], {"a": 1},
    "9" * 50, ...)


def refusal(call: Callable[[], Any]) -> str | None:
  """The sentence by which a call refuses, None where it works; any other exception is a defect and goes through."""
  try:
    call()
  except (ValueError, FileNotFoundError) as error:
    if not flags.is_meant_for_user(error):
      raise
    return str(error)
  return None


def places(value: Any, above: tuple = ()) -> Iterator[tuple]:
  """The paths of all values within a JSON value, of lists the first two entries."""
  yield above
  if isinstance(value, dict):
    for key in value:
      yield from places(value[key], (*above, key))
  elif isinstance(value, list):
    for i in range(min(2, len(value))):
      yield from places(value[i], (*above, i))


def replaced(value: Any, place: tuple, new: Any) -> Any:
  """A copy with another value at a place; `...` removes it."""
  if not place:
    return new
  value = copy.deepcopy(value)
  at = value
  for key in place[:-1]:
    at = at[key]
  if new is ...:
    del at[place[-1]]
  else:
    at[place[-1]] = new
  return value
