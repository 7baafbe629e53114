"""Files of a run: atomic writes, strict JSON, and JSON Lines logs that survive a resume."""

from collections.abc import Iterator, Mapping
import contextlib
import errno
import json
import math
import os
import pathlib
from typing import Any, NoReturn

from absl import logging

# Of a disk that is full, over quota, not writable, or failing: the reader's to mend.
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
  """A context whose OSErrors name a file where they would name none, as a write to a full disk does."""
  try:
    yield
  except OSError as error:
    if error.errno is not None and error.filename is None:
      error.filename = os.fspath(path)
    raise


def storage_trouble(error: BaseException) -> str:
  """The sentence for a full, read-only or failing disk, with the path and the remedy; '' for any other error."""
  if not isinstance(error, OSError) or error.errno not in _STORAGE:
    return ""
  remedy = "make it writable" if error.errno == errno.EROFS else "free space there, or mend the disk"
  return (f"{error.filename or 'a file'}: {error.strerror}; {remedy}, or give another --workdir. What was saved before "
          "is whole: the same command goes on from there.")


def atomic_write_bytes(path: str | os.PathLike, data: bytes) -> None:
  """Writes a file so that a reader, or a crash, finds the old file or the new one and nothing between.

  The bytes go to a file aside in the same directory, reach the disk, and then take the name by `os.replace`.

  Args:
    path: file to write; missing parent directories are made.
    data: contents.
  Raises:
    OSError: when the directory cannot be written; nothing is left behind.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with naming(path), open(aside, "wb") as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
    os.replace(aside, path)
  except OSError as error:
    if error.filename == os.fspath(aside):
      error.filename = os.fspath(path)  # The one that the reader knows.
    raise
  finally:
    aside.unlink(missing_ok=True)


def atomic_write_text(path: str | os.PathLike, text: str) -> None:
  """`atomic_write_bytes` of text in UTF-8; lone surrogates, which UTF-8 cannot hold, become '?'."""
  atomic_write_bytes(path, text.encode("utf-8", "replace"))


def json_value(value: Any) -> Any:
  """The same value as strict JSON knows it.

  NumPy and JAX scalars and arrays become numbers and lists, tuples become lists, a number that is not finite
  becomes None (strict JSON has no NaN), and lone surrogates in text become U+FFFD.

  Raises:
    TypeError: when the value is of a kind that JSON does not hold.
  """
  if value is None or isinstance(value, bool | int):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, str):
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
  if isinstance(value, Mapping):
    return {str(k): json_value(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [json_value(v) for v in value]
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if hasattr(value, "tolist"):  # NumPy's and JAX's; neither is imported here, so that a grading worker stays small.
    return json_value(value.tolist())
  raise TypeError(f"a value of type {type(value).__name__} cannot be written as JSON: {value!r}")


def parse_json(text: str | bytes) -> Any:
  """The value of strict JSON, from a file that anybody may have written.

  Raises:
    ValueError: when it is not JSON or not in UTF-8, holds a number that is not finite or a name twice in one object,
      or is nested too deep to be read.
  """
  if isinstance(text, bytes):
    text = text.decode("utf-8")  # json.loads would guess UTF-16 and UTF-32, too.
  try:
    return json.loads(text, object_pairs_hook=_object, parse_constant=_not_finite, parse_float=_finite)
  except RecursionError as error:
    raise ValueError("it is nested too deep") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
  return found


def _finite(text: str) -> float:
  value = float(text)
  return value if math.isfinite(value) else _not_finite(text)


def _not_finite(text: str) -> NoReturn:
  raise ValueError(f"the number {text[:40]} is not finite")


def json_line(row: Mapping[str, Any]) -> str:
  """One line of strict, pure ASCII JSON with its newline; ASCII so that `cat` cannot reach the terminal's controls."""
  return json.dumps(json_value(row), allow_nan=False) + "\n"


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of a JSON Lines log in order; a last line cut off by a kill is left out.

  Raises:
    FileNotFoundError: when there is no such file.
    ValueError: when another line is not a JSON object with a whole number `step`.
  """
  return [row for _, row in _read_lines(pathlib.Path(path))]


class StepFile:
  """A JSON Lines file with strictly increasing `step`; the rows of a step are on the disk when `write` returns.

  A run that resumes at step k will compute the steps from k on anew; rows of an earlier attempt with step >= k are
  dropped at construction, so the file ends up with every step once.

  Args:
    path: the file; made if missing.
    resume_step: first step that this attempt will run; 0 drops every earlier row.
  """

  def __init__(self, path: str | os.PathLike, resume_step: int = 0):
    self._path = pathlib.Path(path)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    if self._path.exists():
      lines = _read_lines(self._path)
      kept = [(line, row) for line, row in lines if row["step"] < resume_step]
      if dropped := len(lines) - len(kept):
        logging.info("%s: dropped %d rows of an earlier attempt from step %d on.", self._path, dropped, resume_step)
      # Rewritten even when all rows stay: the file may end in half a line.
      atomic_write_bytes(self._path, b"".join(line for line, _ in kept))
    self._last_step = kept[-1][1]["step"] if kept else -1
    self._file = open(self._path, "a", encoding="ascii")  # noqa: SIM115 (open for the run; see close)

  def write(self, step: int, rows: list[Mapping[str, Any]]) -> None:
    """Appends the rows of one step, `step` first in each, and flushes.

    Raises:
      ValueError: when rows of this or a later step are already there, or a row has a `step` of its own.
    """
    if step <= self._last_step:
      raise ValueError(f"step={step} comes after step {self._last_step} in {self._path}; steps must increase.")
    if any("step" in row for row in rows):
      raise ValueError(f"a row for {self._path} has a field 'step' of its own; rename it.")
    with naming(self._path):
      self._file.write("".join(json_line({"step": int(step), **row}) for row in rows))
      self._file.flush()
      os.fsync(self._file.fileno())  # A mounted bucket gets an open file only then; a machine may vanish at any step.
    self._last_step = int(step)

  def amend(self, step: int, more: Mapping[str, Any]) -> None:
    """Adds fields to the last row, which must be the one of `step`; the file is the old or the new one at any time.

    Raises:
      ValueError: when the last row is of another step.
    """
    lines = _read_lines(self._path)
    if not lines or lines[-1][1]["step"] != step:
      raise ValueError(f"{self._path} does not end with step {step}, which was to be completed; restore the file.")
    self._file.close()
    lines[-1] = (json_line({**lines[-1][1], **more}).encode(), {})
    atomic_write_bytes(self._path, b"".join(line for line, _ in lines))
    self._file = open(self._path, "a", encoding="ascii")  # noqa: SIM115

  def close(self) -> None:
    """Closes the file; calling it again does nothing."""
    with naming(self._path):
      self._file.close()


def _read_lines(path: pathlib.Path) -> list[tuple[bytes, dict[str, Any]]]:
  lines = path.read_bytes().splitlines(keepends=True)
  found = []
  for i, line in enumerate(lines):
    if i == len(lines) - 1 and not line.endswith(b"\n"):
      break  # The writer was killed in the middle of this line.
    try:
      row = parse_json(line)
    except ValueError as e:
      raise ValueError(f"{path} line {i + 1} is not JSON ({e}); remove that line or move the file away.") from e
    if not isinstance(row, dict) or type(row.get("step")) is not int:
      raise ValueError(f"{path} line {i + 1} has no whole number 'step'; remove that line or move the file away.")
    found.append((line, row))
  return found
