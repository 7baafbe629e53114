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
from typing import IO, cast
import weakref

from hbpo_jax.config import GradingConfig
from hbpo_jax.grading import equivalence, extraction, worker
from hbpo_jax.grading.verdict import Verdict, cut

_log = logging.getLogger(__name__)

_MAX_WORKERS = 8
# What an idle worker needs; a lower limit would turn every item into a timeout.
_MIN_MEMORY_MIB = 256
# A worker that was killed from outside, crashed or slept is replaced, and its item tried again, this often.
_ATTEMPTS = 3
# Longest wait for a worker to load its modules, on a busy machine.
_START_S = 300.0

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
  only: the limit that decides one is CPU time, kept by the kernel. The wall clock only ends workers that sleep, and
  their items are tried again.
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
  for _ in range(_ATTEMPTS):
    process = workers.acquire()
    reply = process.ask({"answer": given, "truths": truths})
    if reply is not None:
      workers.release(process)
      return reply["correct"]
    status = workers.discard(process)
    if status in (-signal.SIGPROF, worker.EXIT_MEMORY) or workers.stopped:
      return None
    _log.warning("A grading worker ended or slept (status %s) on the answer %r; it is replaced.", status, given[:80])
  _log.warning("The answer %r ended %d grading workers; it counts as a timeout.", given[:80], _ATTEMPTS)
  return None


class _Process:
  """One worker process and the lines that go in and out."""

  def __init__(self, cfg: GradingConfig, wall_s: float):
    path = json.dumps([p for p in sys.path if isinstance(p, str)])
    self._wall_s = wall_s
    self._popen = subprocess.Popen(
        [sys.executable, "-B", "-c", _BOOTSTRAP, path, str(cfg.cpu_seconds), str(cfg.memory_mib)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
        # Set iteration, and so SymPy's order of work, must not differ between runs.
        env=os.environ | {"PYTHONHASHSEED": "0"})
    self._input = cast(IO[bytes], self._popen.stdin)
    self._output = cast(IO[bytes], self._popen.stdout)

  @property
  def pid(self) -> int:
    return self._popen.pid

  def ask(self, item: dict) -> dict | None:
    """The reply to an item, or None: the process ended, or was silent for too long."""
    line = json.dumps(item).encode() + b"\n"
    try:
      while line:
        line = line[self._input.write(line):]
    except BrokenPipeError:
      return None
    return self.read(self._wall_s)

  def read(self, wall_s: float) -> dict | None:
    """The next line of the process, or None as in `ask`."""
    deadline = time.monotonic() + wall_s
    line = b""
    while not line.endswith(b"\n"):
      if not self._poll(max(0.0, deadline - time.monotonic())):
        return None
      chunk = os.read(self._output.fileno(), 4096)
      if not chunk:
        return None
      line += chunk
    return json.loads(line)

  def end(self) -> int:
    """Ends the process and returns its exit status: its own one, if it was ending already."""
    try:
      ending = self._poll(0.0) & select.POLLHUP
      status = self._popen.wait(timeout=5.0 if ending else 0.0)
    except subprocess.TimeoutExpired:
      status = self.kill()
    self.close()
    return status

  def kill(self) -> int:
    self._popen.kill()
    return self._popen.wait()

  def close(self) -> None:
    self._input.close()
    self._output.close()

  def _poll(self, seconds: float) -> int:
    poll = select.poll()
    poll.register(self._output.fileno(), select.POLLIN)
    return sum(event for _, event in poll.poll(seconds * 1000))


class _Workers:
  """The processes: idle ones to take, and all of them to stop. Safe for threads."""

  def __init__(self, cfg: GradingConfig, wall_s: float):
    self._cfg, self._wall_s = cfg, wall_s
    self._lock = threading.Lock()
    self._idle: list[_Process] = []
    self._alive: set[_Process] = set()
    self.stopped = False

  def acquire(self) -> _Process:
    """An idle process, or a new one that has said it is ready."""
    with self._lock:
      if self.stopped:
        raise RuntimeError("the grader is closed; open a new one.")
      if self._idle:
        return self._idle.pop()
      process = _Process(self._cfg, self._wall_s)
      self._alive.add(process)
    if process.read(_START_S) is None:
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
