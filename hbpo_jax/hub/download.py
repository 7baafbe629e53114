"""Files of the hub on their way to the cache: resumed where they broke off, checked, and seen by one process at a time.

Why not `huggingface_hub.snapshot_download`: it throws a part away when its process ends, and compares sizes, not
hashes. What is written here is its cache (https://huggingface.co/docs/huggingface_hub/guides/manage-cache), so that
it, transformers and vLLM find the files, and files that they brought are not downloaded again.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import errno
import fcntl
import hashlib
import os
import pathlib
import shutil
import sys
import threading
import time

import requests
import rich.console
import rich.progress

from hbpo_jax.hub import repository
from hbpo_jax.hub.repository import HubError, Interrupted, Remote, Repository, say, shorten

_AT_ONCE = 4  # Files on their way.
_CHUNK_BYTES = 2**16  # What a connection that breaks may lose.
_LINE_S = 5.0  # Between two lines of progress where there is no terminal.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def fetch(source: Repository, commit: str, files: Sequence[Remote], blobs: pathlib.Path) -> None:
  """Brings files to `blobs`, each under its digest, complete and with the digest that the hub names.

  An interrupted download leaves DIGEST.part, which the next one continues.

  Args:
    source: where they are.
    commit: of the source.
    files: those that are there already are left.
    blobs: directory of the cache.
  Raises:
    HubError: when the hub refuses, a connection fails again and again, the disk is full, or a file is not what the hub
      says it is; names the file and the remedy.
  """
  missing = {file.digest: file for file in files if not is_there(blobs, file)}
  if not missing:
    return
  try:
    blobs.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise HubError(f"{source}: the cache {blobs} cannot be made ({error.strerror}); set HF_HOME to another directory."
                   ) from error
  with _alone(blobs / ".lock", f"{source}: another process on this machine downloads it; waiting"):
    missing = [file for file in missing.values() if not is_there(blobs, file)]
    if not missing:
      return
    _check_space(source, missing, blobs)
    _fetch_all(source, commit, missing, blobs)


def is_there(blobs: pathlib.Path, file: Remote) -> bool:
  """Whether the cache holds a file, of the right size."""
  blob = blobs / file.digest
  return blob.is_file() and blob.stat().st_size == file.size


def size_text(n_bytes: int) -> str:
  """A number of bytes for people."""
  for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
    if n_bytes >= size:
      return f"{n_bytes / size:.1f} {unit}"
  return f"{n_bytes} bytes"


def _fetch_all(source: Repository, commit: str, files: list[Remote], blobs: pathlib.Path) -> None:
  stop = threading.Event()
  resumed = sum(_size(_part(blobs, file)) for file in files)
  total = sum(file.size for file in files)
  say(f"downloading {source.name} (commit {commit[:12]}): {len(files)} file{'s' * (len(files) > 1)}, {size_text(total)}"
      + (f", of which {size_text(resumed)} are here" if resumed else ""))
  with _progress(files, blobs) as count, futures.ThreadPoolExecutor(_AT_ONCE) as threads:
    running = [threads.submit(_fetch_one, source, commit, file, blobs, count, stop) for file in files]
    try:
      for done in futures.as_completed(running):
        done.result()
    except BaseException:
      stop.set()  # The others end at their next chunk; their parts stay.
      for waiting in running:
        waiting.cancel()
      raise


def _fetch_one(
    source: Repository, commit: str, file: Remote, blobs: pathlib.Path, count: Callable[[int], None],
    stop: threading.Event) -> None:
  part, failures = _part(blobs, file), 0
  while (here := _size(part)) < file.size:
    try:
      _append(source, source.address(commit, file.path), part, here, count, stop)
      if stop.is_set():
        return
      if _size(part) < file.size:
        raise Interrupted("the connection was closed early")
    except Interrupted as error:
      failures = 0 if _size(part) > here else failures + 1
      if failures > len(repository.WAITS_S):
        raise HubError(
            f"{source}: the download of {file.path} broke off again and again at {size_text(_size(part))} of "
            f"{size_text(file.size)} ({error}); what is here stays: the same command resumes.") from error
      wait_s = repository.WAITS_S[max(0, failures - 1)]
      say(f"{file.path}: connection lost at {size_text(_size(part))} of {size_text(file.size)} ({error}); next try in "
          f"{wait_s:g} s")
      if stop.wait(wait_s):
        return
  if not part.exists():
    part.touch()  # A file of no bytes.
  _check_digest(source, file, part)
  os.replace(part, blobs / file.digest)


def _append(
    source: Repository, url: str, part: pathlib.Path, here: int, count: Callable[[int], None], stop: threading.Event
) -> None:
  """One connection's worth of a file."""
  with source.get(url, first_byte=here, stream=True) as response:
    if response.status_code == 416:
      part.unlink()
      raise Interrupted("the hub does not continue from here")
    continues = response.status_code == 206
    if here and not continues:
      count(-here)
    try:
      with part.open("ab" if continues else "wb") as out:
        for chunk in response.iter_content(_CHUNK_BYTES):
          if stop.is_set():
            return
          out.write(chunk)
          count(len(chunk))
    except requests.RequestException as error:
      raise Interrupted(shorten(error)) from error
    except OSError as error:
      if error.errno in _NO_SPACE:
        raise HubError(_full(source, part.parent, f"{part.parent} is full")) from error
      raise HubError(f"{source}: {part} cannot be written ({error.strerror}); set HF_HOME to another directory."
                     ) from error


def _check_digest(source: Repository, file: Remote, part: pathlib.Path) -> None:
  with part.open("rb") as f:
    # A part that is too long, of this attempt or an earlier one, has another hash, too.
    if len(file.digest) == 64:
      found = hashlib.file_digest(f, "sha256").hexdigest()
    else:
      digest = hashlib.sha1(f"blob {file.size}\0".encode())
      while chunk := f.read(_CHUNK_BYTES):
        digest.update(chunk)
      found = digest.hexdigest()
  if found != file.digest:
    part.unlink()
    raise HubError(
        f"{source}: {file.path} came with another content (hash {found[:12]}...) than {repository.endpoint()} "
        f"promises ({file.digest[:12]}...), and was removed; try again, and if it stays so, mistrust the network or "
        "HF_ENDPOINT.")


def _check_space(source: Repository, files: Sequence[Remote], blobs: pathlib.Path) -> None:
  needed = sum(file.size - min(file.size, _size(_part(blobs, file))) for file in files)
  free = shutil.disk_usage(blobs).free
  if needed > free:
    raise HubError(_full(source, blobs, f"{size_text(needed)} are to come and {blobs} has {size_text(free)} left"))


def _full(source: Repository, blobs: pathlib.Path, what: str) -> str:
  return (f"{source}: {what}; free some space, or set HF_HOME to a directory on a larger disk. What is here stays: the "
          "same command resumes.")


def _part(blobs: pathlib.Path, file: Remote) -> pathlib.Path:
  return blobs / f"{file.digest}.part"


def _size(path: pathlib.Path) -> int:
  return path.stat().st_size if path.exists() else 0


@contextlib.contextmanager
def _alone(path: pathlib.Path, wait_text: str) -> Iterator[None]:
  """Holds a lock that one process of this machine has at a time; a process that dies leaves it."""
  with path.open("a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      say(wait_text)
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
      raise HubError(f"{path} cannot be locked ({error.strerror}); set HF_HOME to a directory on a local disk."
                     ) from error
    yield


@contextlib.contextmanager
def _progress(files: Sequence[Remote], blobs: pathlib.Path) -> Iterator[Callable[[int], None]]:
  """A function to be told of new bytes: it moves a bar on a terminal, and else writes a line every few seconds."""
  total, done = sum(file.size for file in files), sum(_size(_part(blobs, file)) for file in files)
  if sys.stderr.isatty():
    p = rich.progress
    with p.Progress(
        p.TextColumn("{task.description}"), p.BarColumn(), p.DownloadColumn(), p.TransferSpeedColumn(),
        p.TimeRemainingColumn(), console=rich.console.Console(stderr=True)) as bar:
      task = bar.add_task(f"{len(files)} files", total=total, completed=done)
      yield lambda n: bar.advance(task, n)
    return
  lock, started = threading.Lock(), time.monotonic()
  state = {"done": done, "new": 0, "said": started}

  def count(n: int) -> None:
    with lock:
      state["done"] += n
      state["new"] += n
      now = time.monotonic()
      if now - state["said"] < _LINE_S:
        return
      state["said"] = now
      rate = size_text(int(state["new"] / (now - started)))
      say(f"{size_text(state['done'])} of {size_text(total)} ({state['done'] / total:.0%}), {rate} a second")

  yield count
