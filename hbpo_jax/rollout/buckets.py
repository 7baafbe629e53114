"""The short lists of static sizes that the sampler compiles for, chosen from the longest response and prompt."""

from collections.abc import Sequence

_SHORTEST_LENGTH = 64
_LENGTHS = 5  # Most doublings between the first length bucket and the longest response.
_SHORTEST_PROMPT = 32
_PROMPTS = 3
_ROWS = 4  # Most halvings of the rows as the queue's tail runs out.
_FEWEST_ROWS = 2  # One row costs as much: what it reads is the weights.


def segment_steps(longest: int) -> int:
  """Tokens decoded between two looks of the host: 8 to 64, a 64th of the longest response.

  Half a segment is lost for each response, and each segment costs a transfer.
  """
  return min(64, max(8, _power_of_two(-(-longest // 64))))


def length_buckets(longest: int, steps: int) -> tuple[int, ...]:
  """Powers of two and, last, what holds the longest response; all multiples of `steps`, ascending.

  Args:
    longest: most sampled tokens of a response.
    steps: tokens of a segment.
  """
  last = -(-longest // steps) * steps
  first = max(_SHORTEST_LENGTH, _power_of_two(-(-longest // 2**_LENGTHS)), steps)
  sizes = []
  while first < last:
    sizes.append(first)
    first *= 2
  return (*sizes, last)


def prompt_buckets(longest: int) -> tuple[int, ...]:
  """The longest prompt and up to three halvings of it, ascending."""
  sizes = [longest]
  while len(sizes) <= _PROMPTS and sizes[-1] // 2 >= _SHORTEST_PROMPT:
    sizes.append(-(-sizes[-1] // 2))
  return tuple(reversed(sizes))


def row_buckets(n_rows: int) -> tuple[int, ...]:
  """The rows and up to four halvings of them, not below two, descending."""
  sizes = [n_rows]
  while len(sizes) <= _ROWS and sizes[-1] > _FEWEST_ROWS:
    sizes.append(-(-sizes[-1] // 2))
  return tuple(sizes)


def smallest(buckets: Sequence[int], size: int) -> int:
  """Index of the first of the ascending buckets that holds `size`."""
  return next(i for i, bucket in enumerate(buckets) if bucket >= size)


def _power_of_two(n: int) -> int:
  """The greatest power of two that is at most n; 1 for n < 1."""
  return 1 << max(n, 1).bit_length() - 1
