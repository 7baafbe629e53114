"""Commands with a fault in them: a nursery of child processes, the faults by name, and what must be equal afterwards.

A fault is text: a point of hbpo_jax.killpoints, such as 'rollout:3:1:kill', or one of FAULTS with its arguments after
colons. The nursery imports the package once and forks for every command, so that an attempt costs no imports.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import types

from tests.system import runs


@dataclasses.dataclass(frozen=True)
class Ended:
  """A command that is over: its exit code (minus the number of the signal that ended it), and all that it said."""
  code: int
  text: str

  @property
  def error(self) -> str:
    """The last line."""
    return self.text.strip().splitlines()[-1]


class Nursery:
  """Runs commands one after the other; a context manager."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self._n = 0

  def __enter__(self) -> "Nursery":
    self._process = subprocess.Popen(
        [sys.executable, "-m", "tests.system.faults"], env=runs.environment(), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True)
    return self

  def __exit__(self, *_) -> None:
    self._process.stdin.close()
    self._process.wait(timeout=60)

  def run(self, module: str, overrides: dict, workdir: pathlib.Path, *faults: str, at: pathlib.Path | None = None,
          url: str = "") -> Ended:
    """A command to its end.

    Args:
      at: where its config file goes; None means beside the working directory.
      url: of a bucket, in the place of the working directory.
    """
    self._n += 1
    log = self._folder / f"{self._n}.log"
    argv = [a for a in runs.arguments(overrides, (at or workdir.parent) / workdir.name) if "--workdir" not in a]
    order = {"faults": faults, "module": module, "argv": [*argv, f"--workdir={url or workdir}"], "log": str(log)}
    self._process.stdin.write(json.dumps(order) + "\n")
    self._process.stdin.flush()
    code = int(self._process.stdout.readline())
    return Ended(code, log.read_text(errors="replace"))


def _serve() -> None:
  """Reads orders from stdin, and answers each with an exit code."""
  import hbpo_jax.evaluate
  import hbpo_jax.killpoints
  import hbpo_jax.sft
  import hbpo_jax.train

  assert hbpo_jax.evaluate and hbpo_jax.sft and hbpo_jax.train
  answers = os.fdopen(os.dup(1), "w")
  for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
      log = os.open(order["log"], os.O_WRONLY | os.O_CREAT)
      os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
      os.dup2(log, 1)
      os.dup2(log, 2)
      sys.argv = [f"hbpo_jax.{order['module']}", *order["argv"]]
      for fault in order["faults"]:
        install(fault)
      sys.modules[f"hbpo_jax.{order['module']}"].cli(order["argv"])
      return  # And ends as a program does, by what it has registered for its end.
    answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
    answers.flush()


# ---- faults ----------------------------------------------------------------------------------------------------------


def install(text: str) -> None:
  """Puts a fault into this process."""
  from hbpo_jax import killpoints

  name, *arguments = text.split(":")
  if name in FAULTS:
    FAULTS[name](*arguments)
  else:
    killpoints.arm(text)


def _full(part: str, count: str, code: str) -> None:
  """From the count-th write that reaches the disk of a file with `part` in its path: all such writes fail.

  code: name of the error, or TERM, with which nothing fails and SIGTERM comes once.
  """
  fsync, left = os.fsync, [int(count)]

  def failing(fd):
    path = os.readlink(f"/proc/self/fd/{fd}")
    if part in path:
      left[0] -= 1
      if code == "TERM":
        if left[0] == 0:
          os.kill(os.getpid(), signal.SIGTERM)
      elif left[0] < 0:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
    fsync(fd)

  os.fsync = failing


def _boxed() -> None:
  """Responses end in a box whose comparison needs a grading worker, and none counts as cut off; tokens stay."""
  from hbpo_jax import train
  from hbpo_jax.data import prompts

  def decode(self, tokens):
    n = int(sum(map(int, tokens))) % 12
    return f"{n} tokens</think> \\boxed{{\\sqrt{{{n * n}}} + y - y}}"

  scores = train.scores
  prompts.PromptBuilder.decode = decode
  train.scores = lambda verdicts, truncated_BGJ, **options: scores(verdicts, truncated_BGJ & False, **options)


def _workers(count: str, number: str) -> None:
  """After the count-th response is submitted, all grading workers get a signal; one that sleeps is given 3 seconds."""
  from hbpo_jax.grading import pool

  init, submit, left = pool.Grader.__init__, pool.Grader.submit, [int(count)]

  def start(self, *args, **kwargs):
    init(self, *args, **kwargs | {"wall_seconds": 3.0})

  def submitted(self, *args, **kwargs):
    submit(self, *args, **kwargs)
    left[0] -= 1
    if left[0] <= 0 and self.worker_pids():
      left[0] = 10**9
      for pid in self.worker_pids():
        os.kill(pid, getattr(signal, number))
      print(f"{number} to {len(self.worker_pids())} grading workers", flush=True)

  pool.Grader.__init__, pool.Grader.submit = start, submitted


def _clock(count: str) -> None:
  """At the count-th look, the date goes back by a day, and the machine has slept for an hour."""
  import time

  for name, jump in (("time", -86400.0), ("monotonic", 3600.0), ("perf_counter", 3600.0)):
    left = [int(count)]

    def jumping(real=getattr(time, name), jump=jump, left=left):
      left[0] -= 1
      return real() + (jump if left[0] < 0 else 0.0)

    setattr(time, name, jumping)


def _tensorboard(count: str) -> None:
  """The count-th event cannot be written."""
  from tensorboardX import event_file_writer

  left = [int(count)]
  write = event_file_writer.EventsWriter.write_event

  def failing(self, event):
    left[0] -= 1
    if left[0] < 0:
      raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
    return write(self, event)

  event_file_writer.EventsWriter.write_event = failing


def _wandb(count: str) -> None:
  """Weights & Biases is lost after `count` rows."""
  left = [int(count)]

  class Run:
    def log(self, metrics, step):
      left[0] -= 1
      if left[0] < 0:
        raise ConnectionError("the host is not reachable")

    def finish(self):
      raise ConnectionError("the host is not reachable")

  fake = types.ModuleType("wandb")
  error = type("Error", (Exception,), {})
  fake.errors = types.SimpleNamespace(
      Error=error, UsageError=type("U", (error,), {}), AuthenticationError=type("A", (error,), {}))
  fake.init = lambda **kwargs: Run()
  sys.modules["wandb"] = fake


FAULTS: dict[str, Callable[..., None]] = {
    "full": _full, "boxed": _boxed, "workers": _workers, "clock": _clock, "tensorboard": _tensorboard, "wandb": _wandb}


# ---- damage on disk --------------------------------------------------------------------------------------------------


def checkpoints(workdir: pathlib.Path) -> list[int]:
  """The steps of the finished checkpoints of a run, ascending."""
  return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal())


def damage_newest(workdir: pathlib.Path, how: str) -> int:
  """Cuts the biggest file of the newest checkpoint in half, or flips one of its bits; the checkpoint's step."""
  step = checkpoints(workdir)[-1]
  files = [p for p in (workdir / "checkpoints" / str(step) / "state").rglob("*") if p.is_file()]
  victim = max(files, key=lambda p: p.stat().st_size)
  content = bytearray(victim.read_bytes())
  if how == "flip":
    content[len(content) // 2] ^= 1
  victim.write_bytes(content[:len(content) // 2] if how == "truncate" else content)
  return step


def random_points(seed: int, n: int, steps: int, save_every: int) -> list[str]:
  """Points to be killed at one after the other, a function of the seed; each is reached, if the run goes on in between.

  Args:
    steps: of the run; the points spread over them.
    save_every: steps between its checkpoints.
  """
  names = ("rollout", "grading", "verdicts", "update", "log", "checkpoint", "checkpoint_writing", "checkpoint_written",
           "checkpoint_summed", "checkpoint_done")
  draw, points, done = random.Random(seed), [], 0
  for i in range(n):
    while True:
      name, step = draw.choice(names), max(done, 1 + i * (steps - 2) // n)
      if name.startswith("checkpoint"):
        step = -(-max(step, done + 1) // save_every) * save_every  # That of `done` may be there already.
      # Verdicts that are on disk are not written again.
      if step < steps and not (name == "verdicts" and step == done):
        break
    points.append(f"{name}:{step}:{draw.randrange(2) if name in ('rollout', 'update') else 0}")
    done = step
  return points


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
  """What is not equal in two finished runs, but for times; see `prove_resume.compare`."""
  from hbpo_jax import prove_resume

  return [f"{item.name}: {item.difference}" for item in prove_resume.compare(one, other) if item.difference]


if __name__ == "__main__":
  with contextlib.suppress(KeyboardInterrupt):
    _serve()
