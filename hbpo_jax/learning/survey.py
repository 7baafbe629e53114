"""What arrays hold, in a few numbers each, without moving them: non-finite elements, and a checksum of all bits."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

_NONE = np.uint32(2**32 - 1)


@struct.dataclass
class Survey:
  """Of one array, [] each.

  n_nonfinite: uint32, elements that are NaN or infinite.  first: uint32, the first of them in row-major order.
  largest: float32, the largest absolute value among the others.  checksum: uint32, of `checksum`.
  """
  n_nonfinite: jax.Array
  first: jax.Array
  largest: jax.Array
  checksum: jax.Array


def arrays(tree: Any) -> Any:
  """A Survey in the place of every array; traced."""
  return jax.tree.map(_survey, tree)


def _survey(x: jax.Array) -> Survey:
  bad = jnp.zeros(x.shape, bool) if not jnp.issubdtype(x.dtype, jnp.floating) else ~jnp.isfinite(x)
  return Survey(
      n_nonfinite=jnp.sum(bad, dtype=jnp.uint32),
      first=jnp.min(jnp.where(bad, _position(x.shape), _NONE), initial=_NONE),
      largest=jnp.max(jnp.where(bad, 0, jnp.abs(x.astype(jnp.float32))), initial=0.0), checksum=checksum(x))


def checksum(x: jax.Array) -> jax.Array:
  """uint32 []: a checksum of a traced array that no sharding changes.

      sum_i mix(bits_i + 0x9E3779B9 * (i + 1)) mod 2^32      i = position in row-major order

  `mix` is a bijection of 32-bit words (MurmurHash3's last step), so a change of any single element changes the sum.
  """
  if x.dtype == jnp.bool_:
    bits = x.astype(jnp.uint32)
  else:
    # Types wider than 32 bits gain a trailing axis of 32-bit words.
    width = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
    bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
  return jnp.sum(_mix(bits + np.uint32(0x9E3779B9) * (_position(bits.shape) + 1)), dtype=jnp.uint32)


def _position(shape: tuple[int, ...]) -> jax.Array:
  """uint32 of that shape, modulo 2^32. Summed from one iota per axis: flattening would gather a sharded array."""
  position = jnp.zeros((), jnp.uint32)
  for axis, length in enumerate(shape):
    position = position * np.uint32(length % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
  return position


def _mix(h: jax.Array) -> jax.Array:
  h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
  return h ^ (h >> 16)


@jax.jit
def _count(tree: Any) -> Any:
  return arrays(tree)


@dataclasses.dataclass(frozen=True)
class Entry:
  """The Survey of one named array, on the host.

  n: its elements.  first: index of its first non-finite element, empty without one or of a single number.
  """
  name: str
  n: int
  n_nonfinite: int
  first: tuple[int, ...]
  largest: float
  checksum: int

  def __str__(self) -> str:
    where = f", the first at {list(self.first)}" if self.first else ""
    return f"{self.name} ({self.n_nonfinite:,} of {self.n:,} elements{where})"


def entries(room: str, surveyed: Any, shapes: Any) -> list[Entry]:
  """The host's view of a tree of Surveys, in its order.

  Args:
    room: what the arrays are; the names are `room.path`, or `room` where the tree is one array.
    surveyed: of `arrays`.
    shapes: the surveyed arrays, or anything with their shapes.
  """
  is_one = lambda x: isinstance(x, Survey)
  found = jax.tree_util.tree_leaves_with_path(jax.device_get(surveyed), is_leaf=is_one)
  listed = []
  for (path, one), array in zip(found, jax.tree.leaves(shapes), strict=True):
    name = ".".join(filter(None, (room, jax.tree_util.keystr(path, simple=True, separator="."))))
    first = np.unravel_index(int(one.first), array.shape) if one.n_nonfinite and array.shape else ()
    listed.append(Entry(
        name, int(np.prod(array.shape)), int(one.n_nonfinite), tuple(int(i) for i in first), float(one.largest),
        int(one.checksum)))
  return listed


def take(room: str, tree: Any) -> list[Entry]:
  """`entries` of arrays on the devices, in one small program."""
  return entries(room, _count(tree), tree)


def nonfinite(listed: list[Entry]) -> list[Entry]:
  """Those that hold a non-finite element, in order."""
  return [entry for entry in listed if entry.n_nonfinite]


def to_json(listed: list[Entry]) -> dict[str, Any]:
  """Plain JSON, by name."""
  return {e.name: {k: v for k, v in dataclasses.asdict(e).items() if k != "name"} for e in listed}


def from_json(rows: Mapping[str, Any]) -> list[Entry]:
  """The inverse of `to_json`."""
  return [Entry(name=name, **{**row, "first": tuple(row["first"])}) for name, row in rows.items()]
