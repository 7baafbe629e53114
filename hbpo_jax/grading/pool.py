"""Grading in parallel: a pool of worker processes under hard limits, and `grade` for one batch."""

from collections.abc import Hashable, Sequence
import concurrent.futures
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from typing import IO, NamedTuple, cast
import weakref

from hbpo_jax.config import GradingConfig
from hbpo_jax.grading import equivalence, extraction, worker
from hbpo_jax.grading.verdict import Verdict, cut

_log = logging.getLogger(__name__)

_MAX_WORKERS = 8
# What an idle worker needs; a lower limit would turn every item into a timeout.
_MIN_MEMORY_MIB = 256
# A worker that was killed from outside, crashed, slept or talked nonsense is replaced, and its item tried again, this
# often.
_ATTEMPTS = 3
# Longest wait for a worker to load its modules, on a busy machine.
_START_S = 300.0
# Seconds between looks at what a busy worker has used, and how far it may pass its CPU time before the parent ends it:
# the worker's own timer decides first, unless the worker has lost it.
_LOOK_S = 0.25
_GRACE = 2.0
# All that a worker needs of the environment; it gets no tokens and keys.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PYTHONHOME")

# A fresh interpreter instead of multiprocessing's spawn: that one imports the parent's main module (and so JAX) in
# every worker, and keeps a tracker process. -B: no bytecode files.
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from hbpo_jax.grading import worker; "
    "worker.main(float(sys.argv[2]), int(sys.argv[3]))")


def grade(
    responses: Sequence[str],
    answers: Sequence[str | Sequence[str]],
    *,
    thinking_opened: bool,
    cfg: GradingConfig | None = None,
) -> list[Verdict]:
  """The verdicts on a batch of responses. Starts worker processes where it needs any, and ends them.

  The answer of a response is its last complete \\boxed{...} after the last '</think>'. For many batches keep a
  `Grader`.

  Args:
    responses: texts of the responses, without the prompts.
    answers: for each response the true answer, or a list of accepted ones of which any counts.
    thinking_opened: whether the prompt ended inside '<think>'; then a response without '</think>' is unfinished.
    cfg: workers and limits; the defaults of GradingConfig if None.
  Returns:
    One Verdict per response, in order.
  Raises:
    ValueError: when the lengths differ or an answer is no text.
    RuntimeError: when a worker process cannot start.
  """
  with Grader(cfg) as grader:
    return grader.grade_batch(responses, answers, thinking_opened=thinking_opened)


class Grader:
  """A pool of grading workers, for use as a context manager.

  Items are handed in by `submit` as they come, and fetched by `collect`; or all at once by `grade_batch`. Workers start
  when items need them: exact texts and exact numbers are decided at once, in the caller. A verdict depends on the item
  only: the limit that decides one is CPU time, kept by the kernel. The parent trusts no worker to keep it: one that has
  used twice its CPU time or more than its memory is killed with all that it started, and the item is a timeout. The
  wall clock only ends workers that sleep, and their items are tried again.
  """

  identity = "math"

  def __init__(self, cfg: GradingConfig | None = None, *, wall_seconds: float = 120.0):
    """Args:
      cfg: workers and limits.
      wall_seconds: after this long without a reply a worker is replaced and its item tried again.
    Raises:
      ValueError: when a limit is out of range.
    """
    self._cfg = cfg or GradingConfig()
    if self._cfg.workers < 0:
      raise ValueError(f"grading.workers={self._cfg.workers} is negative; give a count, or 0 for one per core.")
    if not self._cfg.cpu_seconds > 0:
      raise ValueError(f"grading.cpu_seconds={self._cfg.cpu_seconds} is not above 0; give seconds, such as 1.0.")
    if self._cfg.memory_mib < _MIN_MEMORY_MIB:
      raise ValueError(
          f"grading.memory_mib={self._cfg.memory_mib} is less than a worker needs; give at least {_MIN_MEMORY_MIB}.")
    self._workers = _Workers(self._cfg, wall_seconds)
    count = self._cfg.workers or min(_cores(), _MAX_WORKERS)
    self._threads = concurrent.futures.ThreadPoolExecutor(count, thread_name_prefix="grading")
    self._waiting: dict[Hashable, Verdict | tuple[str, concurrent.futures.Future]] = {}
    self._asked: dict[tuple, concurrent.futures.Future] = {}
    # Also when the grader is dropped or the program ends without close().
    self._finalizer = weakref.finalize(self, self._workers.stop)

  def __enter__(self) -> "Grader":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    """Ends all worker processes; what was not collected is lost."""
    self._workers.stop()
    self._threads.shutdown(cancel_futures=True)
    self._workers.close()
    self._waiting, self._asked = {}, {}
    self._finalizer.detach()

  def worker_pids(self) -> list[int]:
    """The process ids of the workers that run now."""
    return self._workers.pids()

  def submit(self, key: Hashable, response: str, answer: str | Sequence[str], *, thinking_opened: bool) -> None:
    """Starts grading one response and returns at once.

    Args:
      key: names the response in what `collect` returns.
      response: its text, without the prompt.
      answer: the true answer, or several accepted ones.
      thinking_opened: whether the prompt ended inside '<think>'.
    Raises:
      ValueError: when the key is waiting already, or the answer is neither a text nor a non-empty list of texts.
      RuntimeError: when the grader is closed.
    """
    if self._workers.stopped:
      raise RuntimeError("the grader is closed; open a new one.")
    if key in self._waiting:
      raise ValueError(f"key={key!r} was submitted already; collect() before you use it again.")
    given_truths = tuple(answer) if isinstance(answer, (list, tuple)) else (answer,)
    truths = tuple(t for t in given_truths if isinstance(t, str))
    if not truths or len(truths) < len(given_truths):
      raise ValueError(f"answer={answer!r} of item {key!r} is not a text; give a str or a non-empty list of str.")
    text = extraction.visible(response, thinking_opened=thinking_opened)
    if text is None:
      self._waiting[key] = Verdict(0.0, "unfinished")
      return
    given = extraction.last_box(text)
    if not given:
      self._waiting[key] = Verdict(0.0, "no_answer")
      return
    first = [equivalence.quick(given, t) for t in truths]
    if True in first:
      self._waiting[key] = _verdict(True, given)
    elif None not in first:
      self._waiting[key] = _verdict(False, given)
    else:
      open_truths = tuple(t for t, decided in zip(truths, first, strict=True) if decided is None)
      # The rollouts of one query often agree; equal items are compared once.
      asked = (given, open_truths)
      if asked not in self._asked:
        self._asked[asked] = self._threads.submit(_compare, self._workers, given, open_truths)
      self._waiting[key] = (given, self._asked[asked])

  def collect(self) -> dict[Hashable, Verdict]:
    """Waits for everything submitted since the last call and returns the verdicts by key, in order of submission.

    Raises:
      RuntimeError: when a worker process cannot start.
    """
    waiting, self._waiting, self._asked = self._waiting, {}, {}
    verdicts = {}
    for key, item in waiting.items():
      if isinstance(item, Verdict):
        verdicts[key] = item
        continue
      given, future = item
      correct = future.result()
      verdicts[key] = Verdict(0.0, "timeout", cut(given)) if correct is None else _verdict(correct, given)
    return verdicts

  def grade_batch(
      self, responses: Sequence[str], answers: Sequence[str | Sequence[str]], *, thinking_opened: bool
  ) -> list[Verdict]:
    """The verdicts on a batch, in order; see `grade`. Nothing else may be waiting.

    Raises:
      ValueError: when the lengths differ or items are waiting.
    """
    check_lengths(responses, answers)
    if self._waiting:
      raise ValueError(f"{len(self._waiting)} submitted items wait; collect() them before grade_batch().")
    for i, (response, answer) in enumerate(zip(responses, answers, strict=True)):
      self.submit(i, response, answer, thinking_opened=thinking_opened)
    verdicts = self.collect()
    return [verdicts[i] for i in range(len(responses))]


def check_lengths(responses: Sequence, answers: Sequence) -> None:
  """Raises ValueError unless both have the same length, or where one is a bare text."""
  if isinstance(responses, str) or isinstance(answers, str):
    raise ValueError("responses and answers must be lists of texts, not one text; wrap it in a list.")
  if len(responses) != len(answers):
    raise ValueError(f"{len(responses)} responses but {len(answers)} answers; give one answer per response.")


def _verdict(correct: bool, given: str) -> Verdict:
  return Verdict(1.0, "correct", cut(given)) if correct else Verdict(0.0, "wrong", cut(given))


def _cores() -> int:
  # Only Linux tells which cores this process may use.
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compare(workers: "_Workers", given: str, truths: tuple[str, ...]) -> bool | None:
  """Whether the answer equals one of the true ones; None = a limit was reached. Runs in a thread of the pool."""
  fresh = False
  for _ in range(_ATTEMPTS):
    process = workers.acquire(fresh)
    reply = process.ask({"answer": given, "truths": truths})
    if reply is not None and reply in worker.REPLIES:
      workers.release(process)
      return worker.REPLIES[reply]
    status = workers.discard(process)
    if process.passed_limit or status == -signal.SIGPROF or workers.stopped:
      return None
    if status == worker.EXIT_LIMIT and process.n_asked == 1:
      return None
    # What earlier items have left in a worker's memory must not decide this one.
    fresh = True
    if status != worker.EXIT_LIMIT:
      _log.warning("A grading worker ended, slept or sent %r (status %s) on the answer %r; it is replaced.",
                   reply, status, given[:80])
  _log.warning("The answer %r ended %d grading workers; it counts as a timeout.", given[:80], _ATTEMPTS)
  return None


class _Process:
  """One worker process and the lines that go in and out.

  n_asked: items it was given.  passed_limit: whether the parent saw it use more than it may.
  """

  def __init__(self, cfg: GradingConfig, wall_s: float):
    # Absolute, for it works in a directory of no interest.
    path = json.dumps([os.path.abspath(p) for p in sys.path if isinstance(p, str)])
    self._cfg, self._wall_s = cfg, wall_s
    self.n_asked, self.passed_limit = 0, False
    self._popen = subprocess.Popen(
        [sys.executable, "-B", "-c", _BOOTSTRAP, path, str(cfg.cpu_seconds), str(cfg.memory_mib)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd="/",
        start_new_session=True,  # A group of its own, so that whatever it starts ends with it.
        # Set iteration, and so SymPy's order of work, must not differ between runs.
        env={k: os.environ[k] for k in _ENVIRONMENT if k in os.environ} | {"PYTHONHASHSEED": "0"})
    self._input = cast(IO[bytes], self._popen.stdin)
    self._output = cast(IO[bytes], self._popen.stdout)
    os.set_blocking(self._input.fileno(), False)

  @property
  def pid(self) -> int:
    return self._popen.pid

  def ask(self, item: dict) -> bytes | None:
    """The line that answers an item, or None: the process ended, was silent for too long, or passed a limit."""
    self.n_asked += 1
    if _wait_for(self._output.fileno(), select.POLLIN, 0.0):
      return None  # It speaks unasked, or has ended: what it says next would be taken for an answer to this item.
    deadline = time.monotonic() + self._wall_s
    before = self._usage()
    cpu_limit = _GRACE * self._cfg.cpu_seconds + (before.cpu_s if before else 0.0)
    line = json.dumps(item).encode() + b"\n"
    while line:
      # A long item does not fit into the pipe before the worker reads it.
      if not _wait_for(self._input.fileno(), select.POLLOUT, deadline - time.monotonic()):
        return None
      try:
        line = line[os.write(self._input.fileno(), line):]
      except BrokenPipeError:
        return None
    return self.read(deadline, cpu_limit)

  def read(self, deadline: float, cpu_limit: float = float("inf")) -> bytes | None:
    """The next line of the process, at most `worker.MAX_REPLY` bytes of it, or None as in `ask`."""
    line = b""
    while not line.endswith(b"\n") and len(line) < worker.MAX_REPLY:
      left = deadline - time.monotonic()
      if left <= 0:
        return None
      if _wait_for(self._output.fileno(), select.POLLIN, min(left, _LOOK_S)):
        chunk = os.read(self._output.fileno(), worker.MAX_REPLY)
        if not chunk:
          return None
        line += chunk
      elif usage := self._usage():
        if usage.has_ended:  # Something that it started holds the pipe open.
          return None
        if usage.cpu_s > cpu_limit or (cpu_limit < float("inf") and usage.memory > self._cfg.memory_mib << 20):
          self.passed_limit = True
          return None
    return line

  def end(self) -> int:
    """Ends the process and all that it started; its own exit status, if it was ending already."""
    status = self.kill()
    self.close()
    return status

  def kill(self) -> int:
    """`end` without closing the pipes, which another thread may read."""
    if self._popen.returncode is None:
      try:
        # A process that has closed its pipes by ending keeps its status.
        os.killpg(self._popen.pid, signal.SIGKILL)
      except (ProcessLookupError, PermissionError):  # macOS refuses where only a zombie is left.
        self._popen.kill()
    return self._popen.wait()

  def close(self) -> None:
    self._input.close()
    self._output.close()

  def _usage(self) -> "_Usage | None":
    """What the process has used, as Linux tells; None elsewhere."""
    try:
      with open(f"/proc/{self._popen.pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    except OSError:
      return None
    ticks = int(fields[11]) + int(fields[12])
    return _Usage(ticks / os.sysconf("SC_CLK_TCK"), int(fields[20]), fields[0] in (b"Z", b"X"))


class _Usage(NamedTuple):
  """cpu_s: CPU seconds.  memory: bytes of address space.  has_ended: it waits to be reaped."""
  cpu_s: float
  memory: int
  has_ended: bool


def _wait_for(fd: int, event: int, seconds: float) -> int:
  poll = select.poll()
  poll.register(fd, event)
  return sum(found for _, found in poll.poll(max(0.0, seconds) * 1000))


class _Workers:
  """The processes: idle ones to take, and all of them to stop. Safe for threads."""

  def __init__(self, cfg: GradingConfig, wall_s: float):
    self._cfg, self._wall_s = cfg, wall_s
    self._lock = threading.Lock()
    self._idle: list[_Process] = []
    self._alive: set[_Process] = set()
    self.stopped = False

  def acquire(self, fresh: bool = False) -> _Process:
    """An idle process, or a new one that has said it is ready; if `fresh`, a new one in place of an idle one."""
    with self._lock:
      if self.stopped:
        raise RuntimeError("the grader is closed; open a new one.")
      idle = self._idle.pop() if self._idle else None
      if idle is not None and not fresh:
        return idle
      process = _Process(self._cfg, self._wall_s)
      self._alive.add(process)
    if idle is not None:
      self.discard(idle)
    if process.read(time.monotonic() + _START_S) != worker.READY:
      status = self.discard(process)
      raise RuntimeError(
          f"a grading worker ended at its start with status {status}; see its error output "
          f"(is math-verify installed, and grading.memory_mib={self._cfg.memory_mib} enough?).")
    return process

  def release(self, process: _Process) -> None:
    with self._lock:
      self._idle.append(process)

  def discard(self, process: _Process) -> int:
    """Ends one process and returns its exit status."""
    status = process.end()
    with self._lock:
      self._alive.discard(process)
    return status

  def pids(self) -> list[int]:
    """The process ids of all workers."""
    with self._lock:
      return [p.pid for p in self._alive]

  def stop(self) -> None:
    """Ends all processes; from now on none starts."""
    with self._lock:
      self.stopped = True
      processes = list(self._alive)
    for process in processes:
      process.kill()

  def close(self) -> None:
    """Closes the pipes of the processes that `stop` ended, when no thread reads them any more."""
    with self._lock:
      for process in self._alive:
        process.close()
      self._alive.clear()
