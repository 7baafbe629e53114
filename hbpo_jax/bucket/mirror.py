"""Working directories in a bucket (`--workdir=gs://BUCKET/DIR`): a directory on this machine that is mirrored there.

An object store knows no append and no rename. So a run works in a local directory, the scratch, as on any disk, and
passes copy what has changed to the bucket, under the same names. What holds on a disk at any kill holds there, too:

* An object is a whole file, of this pass or of one before.
* A unit is a directory that a rename puts in place: a checkpoint, an export, a dump. It belongs to the mirror once its
  marker is there, DIR/.mirror/units/..., with the size of every file: written last, removed first.
* A pass lists the units, then copies single files as they are by now, then those units: a checkpoint comes after the
  log, verdicts and rollouts that it needs. best.json comes last, as it was before the list. Objects whose files are
  gone are removed after all that.

A run starts from what the bucket holds, whatever the scratch has; only where an upload failed and nobody else has
written since, it goes on from the scratch. DIR/.mirror/owner.json says whose the bucket is: an earlier start that still
lives somewhere writes no more.
"""

from collections.abc import Callable, Iterable
from concurrent import futures
import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
import secrets
import signal
import socket
import sys
import threading
import time
from typing import Any

from hbpo_jax.bucket.objects import BucketError, Entry, Store
from hbpo_jax.files import atomic_write_text, parse_json

PASS_S = 60.0  # Between two passes; a new checkpoint starts one at once.
_LOOK_S = 1.0
_THREADS = 8
_OWN = ".mirror"
_OWNER, _ACCESS, _MARKERS, _SESSION = f"{_OWN}/owner.json", f"{_OWN}/access", f"{_OWN}/units/", f"{_OWN}/session.json"
_LATE = ("best/best.json",)
_CHECKPOINTS = r"(?:checkpoints|best|unfinished)/"
_UNIT = re.compile(
    rf"(?:.*?/)??(?:{_CHECKPOINTS}\d+|(?:checkpoints|best)_damaged/[^/]+|export|adapter|dumps/[^/]+)(?=/)")
_UNDER_WAY = re.compile(rf"(?:.*/)?{_CHECKPOINTS}(?!\d+/)[^/]+/")  # A checkpoint that has not got its name yet.
_log = logging.getLogger(__name__)

Key = tuple[int, int, int]  # Of a file's state: size, time of its last change (ns), inode.


class Mirror:
  """A directory of this machine and its mirror.

  Attributes:
    scratch: the directory.
  """

  def __init__(self, store: Store, scratch: pathlib.Path, is_needed: Callable[[str], bool] = lambda unit: True):
    """Args:
      is_needed: whether a unit is fetched.
    """
    self.scratch = scratch
    self._store, self._is_needed = store, is_needed
    self._session = secrets.token_hex(8)
    self._lock = threading.Lock()  # Held for a pass.
    self._over = threading.Event()
    self._lost: BucketError | None = None
    self._is_failing = False
    self._noted: bool | None = None  # What is noted of the bucket: whether it may lack something.
    self._sent: dict[str, Key] = {}  # Files whose object is equal, as they were when it was written.
    self._remote: set[str] = set()  # Objects that are there.
    self._marked: dict[str, dict[str, Key]] = {}  # Units with a marker; {} of one whose files are not known.

  def begin(self) -> None:
    """Makes sure that the bucket can be written, takes it over, and makes the scratch equal to it."""
    for _ in range(2):  # Whoever may create an object need not be allowed to replace it.
      self._store.write(_ACCESS, b"", once=True)
    before, owner = _json(self._local(_SESSION)), _json(self._store.read(_OWNER))
    goes_on = bool(before.get("unsent")) and before.get("session") == owner.get("session")
    if before.get("unsent") and not goes_on:
      aside = next(p for i in range(1, 10**6) if not (p := self.scratch.with_name(f"{self.scratch.name}.unsent-{i}")
                                                     ).exists())
      self.scratch.rename(aside)
      _say(f"{self._store.url} has been written from elsewhere since an upload from here failed; what that one had is "
           f"in {aside}")
    facts = {"session": self._session, "host": socket.gethostname(), "started": time.strftime(
        "%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    self._store.write(_OWNER, json.dumps(facts).encode())
    self.scratch.mkdir(parents=True, exist_ok=True)
    self._note(unsent=goes_on)
    size = self.fetch(keep_local=goes_on)
    what = "goes on with what could not be uploaded" if goes_on else f"{len(self._sent):,} files ({size / 1e6:,.1f} MB)"
    _say(f"working directory {self._store.url}: {what}, in {self.scratch}")

  def fetch(self, *, keep_local: bool = False, once: bool = False) -> int:
    """Makes the scratch equal to the mirror, by as few downloads as its checksums allow; the bytes that it has then.

    Args:
      keep_local: whether the scratch stays as it is, and only what is equal is noted.
      once: whether a bucket that does not answer at all is given up at once.
    """
    found = self._store.list(once=once)
    marked = {unit for name in found if (unit := _unit_of_marker(name)) and self._is_needed(unit)
              and self._is_complete(name, found)}
    wanted = {name: entry for name, entry in found.items() if _is_mirrored(name) and (
        (unit := _unit(name)) is None or unit in marked)}
    self._remote = {name for name in found if _is_mirrored(name)}
    self._marked = {unit: {} for name in found if (unit := _unit_of_marker(name))}
    if not keep_local:
      self._clear(wanted)

    def one(name: str) -> None:
      path = self.scratch / name
      if not _equal(path, wanted[name]):
        if keep_local:
          return
        self._store.get(name, path)
      self._sent[name] = _key(path)

    self._all(one, wanted)
    units, _ = self._files()
    for unit in marked:
      files = units.get(unit, {})
      if files and all(self._sent.get(name) == key for name, key in files.items()):
        self._marked[unit] = files
    return sum(wanted[name].size for name in self._sent)

  def work(self) -> None:
    """Passes, until the end: one a minute, and one when a checkpoint is complete."""
    due = time.monotonic() + _LOOK_S
    while not self._over.wait(_LOOK_S):
      if time.monotonic() >= due or (not self._is_failing and self._has_new_checkpoint()):
        with contextlib.suppress(OSError):  # Of the disk; the run itself and the last pass meet it, too.
          self.settle(quiet=True)
        due = time.monotonic() + PASS_S

  def settle(self, *, quiet: bool = False) -> None:
    """A pass. See `workdir.settle`; quiet: whether it raises nothing."""
    try:
      self.sync()
    except BucketError as error:
      if self._lost is not None:
        self._over.set()
        if not quiet:
          raise
      elif not self._is_failing:
        _log.warning("%s; the run goes on in %s, and the bucket is tried again.", error.brief, self.scratch)
      self._is_failing = True

  def end(self, thread: threading.Thread, *, failed: bool = False) -> None:
    """The last pass. SIGTERM does not end it; Ctrl-C does.

    Args:
      thread: that runs `work`.
      failed: whether the command ends with an error, which is not to be covered by one from here.
    Raises:
      BucketError: when the bucket lacks something; names the scratch.
    """
    self._over.set()
    before = _deaf()
    try:
      thread.join()
      self.sync()
      _say(f"all is in {self._store.url}")
    except (BucketError, OSError, KeyboardInterrupt) as error:
      if not failed and (self._lost is not None or isinstance(error, OSError)):
        raise
      reason = f"--workdir={self._store.url}: the upload was broken off." if isinstance(error, KeyboardInterrupt) else (
          str(error))
      told = BucketError(
          f"{reason} Nothing is lost: all that was computed is in {self.scratch}",
          "the same command on this machine uploads it")
      if not failed:
        raise told from error
      print(told, file=sys.stderr, flush=True)
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)

  def sync(self) -> None:
    """One pass: the bucket has then what was on the disk when it was called.

    Raises:
      BucketError: when the bucket cannot be written, or is another's by now.
    """
    with self._lock:
      if self._lost is not None:
        raise self._lost
      try:
        self._check_owner()
        late = {name: (_key(path), path.read_bytes()) for name in _LATE if (path := self.scratch / name).exists()}
        units, _ = self._files()
        _, single = self._files()  # After the units: what one of them needs was there before it.
        self._all(lambda name: self._send(name, single[name]), [n for n in single if n not in _LATE])
        for unit in sorted(units, key=_turn):
          self._send_unit(unit, units[unit])
        for name, (key, content) in late.items():
          self._send(name, key, content)
        self._remove_gone()
      except (BucketError, KeyboardInterrupt):
        if self._lost is None:
          self._note(unsent=True)
        raise
      self._note(unsent=False)
      self._is_failing = False

  # ---- the steps of a pass -------------------------------------------------------------------------------------------

  def _check_owner(self) -> None:
    if _json(self._local(_SESSION)).get("session") != self._session:
      self._lost = BucketError(
          f"--workdir={self._store.url}: its local directory {self.scratch} was removed or replaced while the run used "
          "it", "start the same command again", is_final=True)
      raise self._lost
    owner = _json(self._store.read(_OWNER))
    if owner.get("session") != self._session:
      who = f"another start of it, on {owner['host']}, has taken over" if "host" in owner else "it was emptied"
      self._lost = BucketError(
          f"--workdir={self._store.url}: {who}, and this one writes no more", "see to it that only one is started",
          is_final=True)
      raise self._lost

  def _send(self, name: str, key: Key, content: bytes | None = None) -> None:
    """Writes a single file, as it is now; a file that changes goes whole, too, as it was at one moment."""
    if self._sent.get(name) == key:
      return
    content = self._local(name) if content is None else content
    if content is not None:
      self._store.write(name, content)
      self._remote.add(name)
      self._sent[name] = key

  def _send_unit(self, unit: str, files: dict[str, Key]) -> None:
    if self._marked.get(unit) == files:
      return
    if unit in self._marked:
      self._unmark(unit)
    changed = [name for name, key in files.items() if self._sent.get(name) != key]

    def put(name: str) -> None:
      self._sent.pop(name, None)
      self._store.put(name, self.scratch / name)
      self._remote.add(name)
      self._sent[name] = files[name]

    try:
      self._all(put, changed)
      if any(_key(self.scratch / name) != key for name, key in files.items()):
        return  # The next pass sees what it is by then.
    except FileNotFoundError:
      return  # A newer checkpoint has come in its place.
    self._mark(unit, files)

  def _mark(self, unit: str, files: dict[str, Key]) -> None:
    sizes = {name: key[0] for name, key in files.items()}
    self._store.write(_marker(unit), json.dumps({"files": sizes}).encode())
    self._marked[unit] = files

  def _unmark(self, unit: str) -> None:
    self._store.delete([_marker(unit)])
    del self._marked[unit]

  def _remove_gone(self) -> None:
    """Removes from the bucket what is no longer on the disk, and what a pass that was cut off has left."""
    units, single = self._files()
    present = set(single).union(*units.values())
    for unit in [unit for unit in self._marked if unit not in units and self._is_needed(unit)]:
      self._unmark(unit)
    gone = sorted(
        name for name in self._remote - present if not (self.scratch / name).exists() and (
            (unit := _unit(name)) is None or self._is_needed(unit)))

    def delete(name: str) -> None:
      self._store.delete([name])
      self._remote.discard(name)
      self._sent.pop(name, None)

    self._all(delete, gone)

  # ---- what there is -------------------------------------------------------------------------------------------------

  def _files(self) -> tuple[dict[str, dict[str, Key]], dict[str, Key]]:
    """(by unit the files in it, the other files), by their names in the mirror."""
    units: dict[str, dict[str, Key]] = {}
    single: dict[str, Key] = {}
    for folder, _, names in os.walk(self.scratch):
      for file in names:
        path = pathlib.Path(folder, file)
        name = path.relative_to(self.scratch).as_posix()
        if _is_mirrored(name) and path.is_file():
          with contextlib.suppress(FileNotFoundError):  # Files come and go.
            unit = _unit(name)
            (single if unit is None else units.setdefault(unit, {}))[name] = _key(path)
    return units, single

  def _local(self, name: str) -> bytes | None:
    try:
      return (self.scratch / name).read_bytes()
    except FileNotFoundError:
      return None

  def _has_new_checkpoint(self) -> bool:
    folders = (p for p in (self.scratch / "checkpoints").glob("*") if p.name.isdecimal())
    return any(f"checkpoints/{p.name}" not in self._marked for p in folders)

  def _is_complete(self, marker: str, found: dict[str, Entry]) -> bool:
    """Whether a unit's files are those of its marker, which may come from anywhere."""
    sizes = _json(self._store.read(marker)).get("files")
    return isinstance(sizes, dict) and bool(sizes) and all(
        name in found and found[name].size == size for name, size in sizes.items())

  def _clear(self, wanted: dict[str, Entry]) -> None:
    """Removes from the scratch what is not in the mirror."""
    for folder, folders, names in os.walk(self.scratch, topdown=False):
      for file in names:
        name = pathlib.Path(folder, file).relative_to(self.scratch).as_posix()
        if name not in wanted and not name.startswith(f"{_OWN}/"):
          os.unlink(os.path.join(folder, file))
      for inner in folders:
        path = pathlib.Path(folder, inner)
        if path.is_symlink():
          path.unlink()
        elif path.name != _OWN and not any(path.iterdir()):
          path.rmdir()

  def _note(self, *, unsent: bool) -> None:
    """Keeps beside the files whose they are, and whether the bucket may lack some of them."""
    if self._noted != unsent:
      atomic_write_text(self.scratch / _SESSION, json.dumps(
          {"session": self._session, "url": self._store.url, "unsent": unsent}))
      self._noted = unsent

  def _all(self, call: Callable[[str], Any], names: Iterable[str]) -> None:
    """Calls it with every name, some at a time; raises what the first that failed has raised."""
    with futures.ThreadPoolExecutor(_THREADS) as threads:
      running = [threads.submit(call, name) for name in names]
      try:
        for one in running:
          one.result()
      except BaseException:
        threads.shutdown(cancel_futures=True)
        raise


def _unit(name: str) -> str | None:
  found = _UNIT.match(name)
  return found[0] if found else None


def _turn(unit: str) -> tuple[bool, int]:
  """The order of units in a pass: checkpoints last, of those the newest first."""
  number = unit.rpartition("/")[2]
  is_checkpoint = unit.startswith("checkpoints/")
  return is_checkpoint, -int(number) if is_checkpoint else 0


def _marker(unit: str) -> str:
  return f"{_MARKERS}{unit}.json"


def _unit_of_marker(name: str) -> str | None:
  return name.removeprefix(_MARKERS).removesuffix(".json") if name.startswith(_MARKERS) else None


def _is_mirrored(name: str) -> bool:
  """Whether a file has a part in the mirror: not one that is being written, or of the mirror itself."""
  parts = name.split("/")
  return all(part and not part.startswith(".") for part in parts) and not _UNDER_WAY.match(name)


def _key(path: pathlib.Path) -> Key:
  found = path.stat()
  return found.st_size, found.st_mtime_ns, found.st_ino


def _equal(path: pathlib.Path, entry: Entry) -> bool:
  if not entry.md5 or not path.is_file() or path.stat().st_size != entry.size:
    return False
  with open(path, "rb") as file:
    return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == entry.md5


def _json(content: bytes | None) -> dict[str, Any]:
  """The object of a JSON file; {} where there is none, or it is damaged."""
  try:
    found = parse_json(content or b"{}")
  except ValueError:
    return {}
  return found if isinstance(found, dict) else {}


def _say(text: str) -> None:
  print(text, flush=True)


def _deaf() -> dict[int, Any]:
  """Makes this process deaf to whoever asks it to end soon, as it does; returns the handlers before, by signal."""
  if threading.current_thread() is not threading.main_thread():
    return {}
  return {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGHUP)}
