"""Several processes of one job: how they start, which of them writes, and how they tell each other what they know.

Every process runs the same program on the same data and holds a part of the devices (JAX's multi-controller model).
What only one of them knows, such as a verdict or what a file holds, goes through the key-value store of JAX's
coordination service, not through the devices: it passes while they are busy, and a process that waits can say for whom.
A process that is alone gets its own value back at once.

The store and its client are not part of JAX's public interface; this is the only file that touches them. JAX is
imported where several processes start, and not above: reports read evaluations without it.
"""

import atexit
from collections.abc import Callable, Iterator
import contextlib
import functools
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from typing import Any, TextIO, TypeVar
import zlib

from hbpo_jax.config import Config, DistributedConfig

_ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_PREFIX = "hbpo_jax/"
_SLICE_S = 2.0  # A wait looks this often whether another process has given up.
_SILENCE_S = 4 * _SLICE_S  # A process that lives shows it within this time.
_PATIENCE_S = 30.0  # After this long, a wait says for whom it is.
_GRACE_S = 10.0  # For a process to find out by itself that another has given up.
_log = logging.getLogger(__name__)
T = TypeVar("T")


class _Job:
  """What this process knows of its job; it is alone until `start` finds otherwise."""
  client: Any = None  # of the coordination service; raises RuntimeError
  n_processes = 1
  index = 0
  hosts: tuple[str, ...] = ()
  timeout_s = 0
  n_exchanges = 0


def on_every_host(main: Callable[[Config, str], None]) -> Callable[[Config, str], None]:
  """A command, (cfg, workdir) -> None, that joins its job first and leaves it together with the others.

  Where it fails, the others learn why and end too, and this process ends without waiting for them.
  """
  @functools.wraps(main)
  def joined(cfg: Config, workdir: str) -> None:
    start(cfg.distributed)
    if _Job.n_processes == 1:
      return main(cfg, workdir)
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(over,), daemon=True)
    watch.start()
    try:
      with _naming_the_lost():
        main(cfg, workdir)
        barrier("the end of the run")
    except BaseException as error:
      _give_up(error)
      raise
    finally:
      over.set()
      watch.join()

  return joined


def start(cfg: DistributedConfig) -> None:
  """Joins the processes of the job, if there are several; before any device is touched.

  The settings count first, then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Without either, the
  workers of a Cloud TPU slice find each other, and anything else runs alone.

  Raises:
    ValueError: when the settings are incomplete or contradict each other.
    RuntimeError: when devices were touched before.
  """
  if _Job.client is not None:
    return
  found = _settings(cfg)
  if found is None:
    return
  import jax
  from jax._src import distributed as jax_distributed

  address, n_processes, index = found
  waiting = threading.Timer(min(_PATIENCE_S, cfg.timeout_s / 2), _say_who_waits, found)
  waiting.daemon = True
  waiting.start()
  try:
    # JAX asks the cluster for what is None.
    jax.distributed.initialize(
        address or None, n_processes, index, initialization_timeout=cfg.timeout_s,
        shutdown_timeout_seconds=cfg.timeout_s)
  finally:
    waiting.cancel()
  state = jax_distributed.global_state
  _Job.client, _Job.timeout_s = state.client, cfg.timeout_s
  _Job.n_processes, _Job.index = state.num_processes, state.process_id
  _Job.hosts = ("?",) * _Job.n_processes
  _Job.hosts = tuple(exchange("the start of the run", socket.gethostname()))


def is_writer() -> bool:
  """Whether this process writes the files of the run and speaks on the terminal: the first of the job."""
  return _Job.index == 0


def n_processes() -> int:
  """The processes of the job."""
  return _Job.n_processes


def reached_preemption(count: int) -> bool:
  """Whether this is the point, the same in all processes, at which they stop because one of them was told to (SIGTERM).

  Args:
    count: 1 at the first call, and one more at each; every process calls it at the same points.
  """
  from jax.experimental import multihost_utils

  return multihost_utils.reached_preemption_sync_point(count)


def describe() -> list[str]:
  """A line on the processes of the job and their hosts; none where there is only one."""
  listed = ", ".join(f"{i} {host}" for i, host in enumerate(_Job.hosts))
  return [f"processes: {_Job.n_processes} ({listed})"] if _Job.n_processes > 1 else []


def output() -> TextIO:
  """The standard output of the writer; the others speak into nothing."""
  return sys.stdout if is_writer() else open(os.devnull, "w")


def is_mine(number: int) -> bool:
  """Whether a piece of work falls to this process; pieces are dealt out in turn, by number."""
  return number % _Job.n_processes == _Job.index


def barrier(what: str) -> None:
  """Returns when every process has called it; see `exchange`."""
  exchange(what, None)


def exchange(what: str, value: Any) -> list[Any]:
  """The values of all processes, in their order; every process calls it, for the same purpose.

  Args:
    what: the purpose, as errors name it.
    value: plain JSON. A process that is alone gets its value back as it is.
  Raises:
    ValueError: when a process has given up, is elsewhere in the program, or is not there after distributed.timeout_s;
      names the process and its host.
  """
  if _Job.n_processes == 1:
    return [value]
  _Job.n_exchanges += 1
  folder = f"{_PREFIX}{_Job.n_exchanges}/"
  body = json.dumps([what, value], default=lambda x: x.item()).encode()
  _Job.client.key_value_set_bytes(f"{folder}{_Job.index}", zlib.compress(body, 1))
  started, values = time.monotonic(), []
  for i in range(_Job.n_processes):
    there, value = json.loads(zlib.decompress(_fetch(folder, i, what, started)))
    if there != what:
      raise ValueError(
          f"process {i} ({_host(i)}) is at {there!r} while process {_Job.index} ({_host(_Job.index)}) is at {what!r}; "
          "start the same command, of the same version, on every host.")
    values.append(value)
  # All are here, so all have read what went before.
  _Job.client.key_value_delete(f"{_PREFIX}{_Job.n_exchanges - 1}/{_Job.index}")
  return values


def from_writer(what: str, make: Callable[[], T]) -> T:
  """What `make` returns on the writer, which alone calls it; every process calls this.

  Args:
    what: the purpose, as errors name it.
    make: returns plain JSON; of tuples the others get lists.
  Raises:
    ValueError: with the text of the writer's own error, which may also be of a file.
  """
  if _Job.n_processes == 1:
    return make()
  if not is_writer():
    value, error = exchange(what, None)[0]
    if error is not None:
      raise ValueError(f"on process 0 ({_host(0)}): {error}")
    return value
  try:
    value = make()
  except (ValueError, OSError) as error:
    exchange(what, [None, str(error)])
    raise
  exchange(what, [value, None])
  return value


def _settings(cfg: DistributedConfig) -> tuple[str, int | None, int | None] | None:
  """(address of the coordinator, number of processes, own index), None for what JAX is to find; None = alone."""
  address, count, index = (os.environ.get(name, "") for name in _ENVIRONMENT)
  address = cfg.coordinator_address or address
  for name, text in zip(_ENVIRONMENT[1:], (count, index)):
    if text and not text.isdecimal():
      raise ValueError(f"{name}={text!r} is no number; set it to one, or unset it.")
  n = cfg.num_processes or int(count or 0)
  own = cfg.process_id if cfg.process_id >= 0 else int(index or -1)
  if cfg.timeout_s < 1:
    raise ValueError(f"distributed.timeout_s={cfg.timeout_s} is no time to wait; give seconds, such as 600.")
  if n == 1:
    return None
  if address:
    if not re.fullmatch(r"\S+:\d+", address):
      raise ValueError(f"distributed.coordinator_address={address!r} has no port; write HOST:PORT.")
    if n and not 0 <= own < n:
      raise ValueError(
          f"distributed.process_id={own} is none of the {n} processes (distributed.num_processes); give each process "
          f"its own, 0 to {n - 1}.")
    return address, n or None, own if own >= 0 else None
  if n or own >= 0:
    raise ValueError(
        f"distributed.num_processes={n} and process_id={own} need distributed.coordinator_address=HOST:PORT, the "
        "address of process 0.")
  return ("", None, None) if _n_tpu_workers() > 1 else None


def _n_tpu_workers() -> int:
  """The hosts of the Cloud TPU slice that this one belongs to; 1 anywhere else."""
  import jax
  from jax._src.clusters import cloud_tpu_cluster
  import requests

  if (jax.config.jax_platforms or "tpu").split(",")[0] != "tpu":
    return 1
  gke, gce = cloud_tpu_cluster.GkeTpuCluster, cloud_tpu_cluster.GceTpuCluster
  if gke.is_env_present():
    # Its own count asks the metadata server for the slices, where the environment says nothing: then there is one.
    return len(gke._get_worker_list_in_slice()) * int(os.environ.get("MEGASCALE_NUM_SLICES") or 1)
  try:
    return gce.get_process_count() if gce.is_env_present() else 1
  except requests.RequestException as error:
    _log.warning("The metadata server does not say how many hosts this slice has (%s); this one runs alone.", error)
    return 1


def _say_who_waits(address: str, n_processes: int | None, index: int | None) -> None:
  # JAX ends the process when the time is over, without a word on what it waited for.
  who = "this process" if index is None else f"process {index} of {n_processes}"
  where = address or "the coordinator of the slice"
  _say(f"{who} (host {socket.gethostname()}) still waits for the others at {where}; start the same command on every "
       "host.")


def _fetch(folder: str, i: int, what: str, started: float) -> bytes:
  """The value of process i, once it is there."""
  warned = False
  while True:
    left_s = started + _Job.timeout_s - time.monotonic()
    try:
      return _Job.client.blocking_key_value_get_bytes(f"{folder}{i}", max(1, int(1000 * min(_SLICE_S, left_s))))
    except RuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise
    for key, note in _Job.client.key_value_dir_get_bytes(f"{_PREFIX}gave_up/"):
      other = int(key.rpartition("/")[2])
      raise ValueError(f"process {other} ({_host(other)}) has ended: {note.decode()}")
    if left_s > _SLICE_S and (warned or time.monotonic() - started < _PATIENCE_S):
      continue
    here = {key.rpartition("/")[2] for key, _ in _Job.client.key_value_dir_get_bytes(folder)}
    missing = ", ".join(f"process {j} ({_host(j)})" for j in range(_Job.n_processes) if str(j) not in here)
    if left_s <= _SLICE_S and missing:
      raise ValueError(
          f"after distributed.timeout_s={_Job.timeout_s} seconds there is no sign of {missing} at {what!r}; see the "
          "output there, and start the command again on every host.")
    if missing:
      warned = True
      _log.warning("Waiting at %r for %s.", what, missing)


def _host(index: int) -> str:
  return f"host {_Job.hosts[index]}"


def _watch(over: threading.Event) -> None:
  """Shows that this process lives, says which other does not, and ends this one once another has given up.

  A device that waits for another's waits for ever and says nothing. Of a process that died without a word, JAX itself
  ends the others, after its own time and without the name of the host.
  """
  seen: dict[int, tuple[bytes, float]] = {}
  silent: set[int] = set()
  beat, ended = 0, None
  while not over.wait(_SLICE_S):
    beat += 1
    try:
      _Job.client.key_value_set_bytes(f"{_PREFIX}alive/{_Job.index}", str(beat).encode(), True)
      alive = _Job.client.key_value_dir_get_bytes(f"{_PREFIX}alive/")
      notes = _Job.client.key_value_dir_get_bytes(f"{_PREFIX}gave_up/")
    except RuntimeError:
      return  # The service has ended, and JAX ends this process.
    now = time.monotonic()
    for key, text in alive:
      i = int(key.rpartition("/")[2])
      if i not in seen or seen[i][0] != text:
        seen[i] = text, now
      elif i not in silent and now - seen[i][1] > _PATIENCE_S:
        silent.add(i)
        _say(f"process {i} ({_host(i)}) has shown no sign of life for {_PATIENCE_S:.0f} seconds; see the output there.")
    if notes and ended is None:
      ended = now
    if ended is not None and now - ended > _GRACE_S:
      i = int(notes[0][0].rpartition("/")[2])
      _say(f"process {i} ({_host(i)}) has ended: {notes[0][1].decode()}")
      os._exit(2)


@contextlib.contextmanager
def _naming_the_lost() -> Iterator[None]:
  """A context in which an error of the devices, that a lost process is the reason of, says so.

  Raises:
    ValueError: instead of a RuntimeError, where another process has ended or shows no sign of life.
  """
  try:
    yield
  except RuntimeError as error:
    if not (lost := _lost()):
      raise
    first_line = str(error).partition("\n")[0]
    raise ValueError(
        f"{lost}, and what was computed together with it failed here ({first_line}); see the output there, and start "
        "the same command again on every host.") from error


def _lost() -> str:
  """Which other process has ended or shows no sign of life, which takes some seconds to see; '' for none."""
  number = lambda key: int(key.rpartition("/")[2])
  beats = lambda: {number(key): text for key, text in _Job.client.key_value_dir_get_bytes(f"{_PREFIX}alive/")}
  try:
    before = beats()
    time.sleep(_SILENCE_S)
    after, notes = beats(), _Job.client.key_value_dir_get_bytes(f"{_PREFIX}gave_up/")
  except RuntimeError:
    return f"process 0 ({_host(0)}), which leads the job, is gone"
  for key, note in notes:
    return f"process {number(key)} ({_host(number(key))}) has ended: {note.decode()}"
  silent = [i for i in range(_Job.n_processes) if i != _Job.index and before.get(i) == after.get(i)]
  who = ", ".join(f"process {i} ({_host(i)})" for i in silent)
  return f"there is no sign of life of {who}" if silent else ""


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _give_up(error: BaseException) -> None:
  """Tells the others why, and makes this process end without the meeting at which JAX would wait for them."""
  text = f"{type(error).__name__}: {error}".strip()[:500]
  try:
    _Job.client.key_value_set_bytes(f"{_PREFIX}gave_up/{_Job.index}", text.encode())
  except RuntimeError as failure:  # The service ends with process 0.
    _log.warning("The other processes cannot be told: %s", failure)
  status = error.code if isinstance(error, SystemExit) else 2 if isinstance(error, (ValueError, OSError)) else 1

  def leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    if _Job.index == 0:
      time.sleep(2 * _SLICE_S)  # The service ends with this process; the others read the note before.
    os._exit(status if isinstance(status, int) else 1)

  atexit.register(leave)  # Called before JAX's own, which was registered earlier.
