"""Ends a command at a named point, to prove that nothing is lost there; no other module knows of this one.

  python -m hbpo_jax.killpoints rollout:3:1:kill train --config=quickstart --workdir=runs/killed

runs `train` and kills it in its step 3, after the second segment of the rollouts. A point is NAME:STEP:COUNT:ACTION;
COUNT (how often the point is passed before, 0 if left out) and ACTION ('kill' if left out) are optional. The points
are reached by wrapping functions; see POINTS and ACTIONS.
"""

from collections.abc import Callable, Sequence
import dataclasses
import errno
import functools
import importlib
import os
import signal
import sys
import threading
from typing import Any

from hbpo_jax import files, train
from hbpo_jax.bucket import mirror
from hbpo_jax.evaluation import store
from hbpo_jax.grading import journal
from hbpo_jax.learning import checkpoint, learner
from hbpo_jax.models import tensorfile
from hbpo_jax.reporting import writers
from hbpo_jax.rollout import engine


@dataclasses.dataclass
class Fuse:
  """Burns down to the point at which the action is taken, once.

  step: the training step, from 0; of checkpoints, the steps done; of export and evaluation it does not matter.
  count: how often the point is passed before.
  action: called there.
  """
  step: int
  count: int
  action: Callable[[], None]
  burnt: bool = False

  def __post_init__(self):
    self._lock = threading.Lock()  # Rollouts may run beside updates, and checkpoints are written in the background.

  def at(self, step: int | None = None) -> None:
    """The point is passed; step None means that of every step."""
    with self._lock:
      if self.burnt or step not in (None, self.step):
        return
      self.count -= 1
      self.burnt = self.count < 0
    if self.burnt:
      self.action()


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
  """Replaces the method owner.name by around(original, self, *arguments)."""
  original = getattr(owner, name)

  @functools.wraps(original)
  def wrapped(self, *args, **kwargs):
    return around(original, self, *args, **kwargs)

  setattr(owner, name, wrapped)


def _of_step(name: str) -> dict[str, Any]:
  """A box with the step that `Trainer.name` is in, under 'step'."""
  box: dict[str, Any] = {"step": None}

  def around(original, self, step, *args, **kwargs):
    box["step"] = step
    try:
      return original(self, step, *args, **kwargs)
    finally:
      box["step"] = None

  _wrap(train.Trainer, name, around)
  return box


def _rollout(fuse: Fuse) -> None:
  """After a segment of the rollouts of a step."""
  box = _of_step("_generate")

  def around(original, self):
    for finished in original(self):
      if box["step"] is not None:
        fuse.at(box["step"])
      yield finished

  _wrap(engine.Generation, "__iter__", around)


def _grading(fuse: Fuse) -> None:
  """When all responses of a step are submitted, before their verdicts are collected."""
  def around(original, self, *args, **kwargs):
    if self._journal is not None:
      fuse.at(self._step)
    return original(self, *args, **kwargs)

  _wrap(journal.StepGrading, "collect", around)


def _verdicts(fuse: Fuse) -> None:
  """When the verdicts of a step are on disk, before it is learnt from."""
  def around(original, self, step, verdicts):
    original(self, step, verdicts)
    fuse.at(step)

  _wrap(journal.Journal, "write", around)


def _update(fuse: Fuse) -> None:
  """Before an update of a step."""
  box = _of_step("_learn")

  def around(original, self, *args, **kwargs):
    fuse.at(box["step"])
    return original(self, *args, **kwargs)

  _wrap(learner.Learner, "update", around)


def _saving(when: str) -> Callable[[Fuse], None]:
  def install(fuse: Fuse) -> None:
    def around(original, self, step, state, meta):
      if when == "before":
        fuse.at(step)
      done = original(self, step, state, meta)
      if when == "after":
        self.wait()
      if when != "before":
        fuse.at(step)
      return done

    _wrap(checkpoint.Checkpointer, "save", around)

  return install


def _checksums(after: bool) -> Callable[[Fuse], None]:
  def install(fuse: Fuse) -> None:
    def around(original, self):
      if not after:
        fuse.at(self._saving)
      original(self)
      if after:
        fuse.at(self._saving)

    _wrap(checkpoint.Checkpointer, "_write_checksums", around)

  return install


def _log(fuse: Fuse) -> None:
  """In the middle of a step's line in metrics.jsonl."""
  def around(original, self, step, rows):
    if self._path.name == writers.METRICS and step == fuse.step and not fuse.burnt:
      line, size = files.json_line({"step": step, **rows[0]}), os.fstat(self._file.fileno()).st_size
      self._file.write(line[:len(line) // 2])
      self._file.flush()
      fuse.at(step)
      os.ftruncate(self._file.fileno(), size)  # The action may leave the run alive.
    original(self, step, rows)

  _wrap(files.StepFile, "write", around)


def _export(fuse: Fuse) -> None:
  """Before a tensor of the export is written."""
  def around(original, self, *args):
    with files.naming(self._path):
      fuse.at()
    return original(self, *args)

  _wrap(tensorfile.Writer, "write", around)


def _evaluation(fuse: Fuse) -> None:
  """After responses of an evaluation were stored."""
  def around(original, self, *args):
    original(self, *args)
    fuse.at()

  _wrap(store.Store, "append", around)


def _bucket_file(fuse: Fuse) -> None:
  """After a single file was looked at and, if need be, written to the bucket."""
  def around(original, self, *args):
    original(self, *args)
    fuse.at()

  _wrap(mirror.Mirror, "_send", around)


def _bucket_unit(marked: bool) -> Callable[[Fuse], None]:
  """When the files of a checkpoint are in the bucket, before or after its marker."""
  def install(fuse: Fuse) -> None:
    def around(original, self, unit, files):
      step = int(unit.rpartition("/")[2]) if unit.startswith("checkpoints/") else -1
      if not marked:
        fuse.at(step)
      original(self, unit, files)
      if marked:
        fuse.at(step)

    _wrap(mirror.Mirror, "_mark", around)

  return install


POINTS: dict[str, Callable[[Fuse], None]] = {
    "rollout": _rollout, "grading": _grading, "verdicts": _verdicts, "update": _update,
    "checkpoint": _saving("before"), "checkpoint_writing": _saving("during"), "checkpoint_written": _checksums(False),
    "checkpoint_summed": _checksums(True), "checkpoint_done": _saving("after"), "log": _log, "export": _export,
    "evaluation": _evaluation, "bucket_file": _bucket_file, "bucket_unit": _bucket_unit(False),
    "bucket_marker": _bucket_unit(True),
}


def _signal(number: int) -> Callable[[], None]:
  return lambda: os.kill(os.getpid(), number)


def _fail(code: int) -> Callable[[], None]:
  def action():
    raise OSError(code, os.strerror(code))

  return action


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": _signal(signal.SIGKILL), "term": _signal(signal.SIGTERM), "int": _signal(signal.SIGINT),
    "full": _fail(errno.ENOSPC), "readonly": _fail(errno.EROFS),
}


def arm(text: str) -> None:
  """Prepares NAME:STEP[:COUNT][:ACTION], in this process.

  Raises:
    ValueError: when it is not understood; lists what is.
  """
  words = [*text.split(":")]
  action = words.pop() if words[-1] in ACTIONS else "kill"
  if len(words) not in (2, 3) or words[0] not in POINTS or not all(w.isdecimal() for w in words[1:]):
    raise ValueError(
        f"the point {text!r} is not understood; write NAME:STEP[:COUNT][:ACTION] with a name of {', '.join(POINTS)} "
        f"and an action of {', '.join(ACTIONS)}.")
  POINTS[words[0]](Fuse(int(words[1]), int((words + ["0"])[2]), ACTIONS[action]))


def main(argv: Sequence[str] | None = None) -> None:
  """Arms the point and runs the command: POINT COMMAND ARGUMENT ...; None means the process's arguments."""
  arguments = list(sys.argv[1:] if argv is None else argv)
  if len(arguments) < 2 or arguments[1] not in ("train", "sft", "evaluate"):
    sys.exit("usage: python -m hbpo_jax.killpoints NAME:STEP[:COUNT][:ACTION] train|sft|evaluate ARGUMENT ...")
  try:
    arm(arguments[0])
  except ValueError as error:
    sys.exit(f"error: {error}")
  importlib.import_module(f"hbpo_jax.{arguments[1]}").cli(arguments[2:])


if __name__ == "__main__":
  main()
