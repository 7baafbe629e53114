"""Reading and writing safetensors files piece by piece, so that no file is ever held in memory.

Layout: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the raw tensors.
"""

from collections.abc import Iterable
import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from hbpo_jax.files import naming, parse_json

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100 * 2**20  # the format's own limit
_MAX_SIZE = 2**48  # bytes or values, far above any file
_AGAIN = "download or export the checkpoint again."


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where one tensor lies: file, first byte, shape, and its safetensors dtype name."""
  file: pathlib.Path
  name: str
  offset: int
  shape: tuple[int, ...]
  dtype_name: str

  @property
  def dtype(self) -> np.dtype:
    """NumPy dtype of the stored values.

    Raises:
      ValueError: when it is not a float of 16 or 32 bits.
    """
    if self.dtype_name not in _DTYPES:
      raise ValueError(
          f"{self.file}: tensor {self.name} has dtype {self.dtype_name}; use a checkpoint in {', '.join(_DTYPES)}.")
    return _DTYPES[self.dtype_name]

  def rows(self, shape: tuple[int, ...], start: int, stop: int) -> np.ndarray:
    """Entries start..stop of axis 0, of the tensor seen as `shape` (same number of values); reads only those bytes.

    Raises:
      ValueError: when the file ends early.
    """
    row = math.prod(shape[1:])
    out = np.empty((stop - start, *shape[1:]), self.dtype)
    with open(self.file, "rb") as f:
      f.seek(self.offset + start * row * self.dtype.itemsize)
      n_read = f.readinto(out.reshape(-1).view(np.uint8).data)
    if n_read != out.nbytes:
      raise ValueError(f"{self.file} is truncated inside tensor {self.name}; {_AGAIN}")
    return out


def read_header(path: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of a safetensors file, by name; checks that the file is whole.

  Raises:
    ValueError: when the file is corrupt or truncated; names the file.
  """
  size = path.stat().st_size
  with open(path, "rb") as f:
    length = int.from_bytes(f.read(8), "little")
    if size < 8 or length > min(_MAX_HEADER, size - 8):
      raise ValueError(f"{path} is corrupt or truncated ({size} bytes do not hold its header); {_AGAIN}")
    raw = f.read(length)
  try:
    header = parse_json(raw)
    entries = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{path} is corrupt (its header is not a safetensors header: {error!r}); {_AGAIN}") from error
  end = 8 + length
  for tensor, stop in sorted(entries.values(), key=lambda entry: (entry[0].offset, entry[1])):
    name = tensor.name
    if tensor.dtype_name in _DTYPES and stop - tensor.offset != math.prod(tensor.shape) * tensor.dtype.itemsize:
      raise ValueError(f"{path} is corrupt: the bytes of tensor {name} do not fit its shape {tensor.shape}; {_AGAIN}")
    if tensor.offset != end:
      raise ValueError(f"{path} is corrupt: tensor {name} does not start where the one before it ends; {_AGAIN}")
    end = stop
  if end != size:
    raise ValueError(f"{path} is corrupt or truncated: it has {size} bytes and its header needs {end}; {_AGAIN}")
  return {name: tensor for name, (tensor, _) in entries.items()}


def _entry(path: pathlib.Path, name: str, entry: dict[str, Any], data: int) -> tuple[Tensor, int]:
  """(tensor, its end in the file) of one entry of a header, whose data start at byte `data`."""
  dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
  if not isinstance(dtype, str):
    raise ValueError(f"the dtype of {name!r} is {dtype!r}")
  if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < _MAX_SIZE for n in shape):
    raise ValueError(f"the shape of {name!r} is not a list of sizes")
  if (not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets)
      or not 0 <= offsets[0] <= offsets[1] < _MAX_SIZE):
    raise ValueError(f"the data_offsets of {name!r} are not a start and an end")
  return Tensor(path, name, data + offsets[0], tuple(shape), dtype), data + offsets[1]


class Writer:
  """Writes one safetensors file: the shapes first, then the values in the same order."""

  def __init__(self, path: pathlib.Path, specs: Iterable[tuple[str, tuple[int, ...], np.dtype]]):
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, dtype in specs:
      end = offset + math.prod(shape) * dtype.itemsize
      header[name] = {"dtype": dtype_name(dtype), "shape": list(shape), "data_offsets": [offset, end]}
      offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    self._path = path
    self._file = open(path, "wb")  # noqa: SIM115 - open until close()
    self._file.write(len(raw).to_bytes(8, "little") + raw)

  def write(self, values: np.ndarray) -> None:
    """Appends the next tensor's values."""
    with naming(self._path):
      self._file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)

  def close(self) -> None:
    """Flushes to the disk, so that a rename that follows cannot outlive the content."""
    with naming(self._path):
      self._file.flush()
      os.fsync(self._file.fileno())
      self._file.close()


def dtype_name(dtype: np.dtype) -> str:
  """safetensors' name of a dtype.

  Raises:
    ValueError: when it is not a float of 16 or 32 bits.
  """
  if np.dtype(dtype) not in _NAMES:
    raise ValueError(f"dtype {np.dtype(dtype).name!r} cannot be exported; choose float32, bfloat16 or float16.")
  return _NAMES[np.dtype(dtype)]
