"""What a training run keeps: evaluations, checkpoints, and on a stop all that a resumed run needs."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import pathlib
import time
from typing import Any, NoReturn

from hbpo_jax import bucket, distributed, preemption
from hbpo_jax import config as config_lib
from hbpo_jax.clocks import WallClock
from hbpo_jax.config import Config
from hbpo_jax.evaluation.during import Evaluations
from hbpo_jax.grading.judge import Judge
from hbpo_jax.learning import guards
from hbpo_jax.learning.checkpoint import Checkpointer
from hbpo_jax.reporting.step_log import StepLog
from hbpo_jax.rollout import shelf
from hbpo_jax.structs import Rollouts, TrainState


@dataclasses.dataclass(frozen=True)
class Keeper:
  """Saves and measures. `data_state` is always that of the data once the batches of the steps done were drawn."""
  cfg: Config
  root: pathlib.Path
  checkpoints: Checkpointer
  evaluations: Evaluations
  judge: Judge
  guard: guards.Guard
  log: StepLog
  wall_s: WallClock
  contents: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of `run_info.Changes`

  def after(self, step: int, state: TrainState, data_state: dict[str, Any]) -> None:
    """Does what is due after a step: an evaluation, a checkpoint, the end of a run that no longer learns.

    Raises:
      preemption.Stopped: when the run was asked to stop during the evaluation, which a resumed run does first then.
    """
    meta = lambda: self._meta(data_state)
    if self.evaluations.due(step + 1):
      try:
        self.log.annotate(self.evaluations.during(step + 1, state, meta))
      except preemption.Stopped:
        self._save_and_stop(step + 1, state, lambda: meta() | {"unmeasured": True})
    due = self.checkpoints.due(step + 1, last=self.cfg.steps) or self.guard.limit_reached
    if due and self.guard.check_save(step + 1, state, last=step + 1 == self.cfg.steps):
      bucket.settle()  # The checkpoint before this one, too, is where it outlasts the machine.
      self._save(step + 1, state, meta())
    if self.guard.limit_reached:
      self.checkpoints.wait()
      self.guard.check_limit(step)

  def catch_up(self, start: int, state: TrainState, meta: Mapping[str, Any]) -> None:
    """Does the evaluation that a stop has left open, and completes the log's last row by it.

    Args:
      meta: of the checkpoint that the run goes on from.
    """
    if meta.get("unmeasured"):
      self.log.amend(start - 1, self.evaluations.during(start, state, lambda: self._meta(meta["data_state"])))

  def stop(
      self, step: int, state: TrainState, data_state: dict[str, Any], ahead: Rollouts | None,
      ledger: Mapping[str, float]) -> NoReturn:
    """Saves the state before a step.

    Args:
      ahead: the rollouts of the step, where they come from older weights than the state's.
      ledger: of those.
    Raises:
      preemption.Stopped: always.
    """
    if step == 0:
      raise preemption.Stopped("no step was done yet")

    def meta():
      found = self._meta(data_state)
      if ahead is not None and step not in self.checkpoints.steps():
        found["ahead"] = distributed.from_writer("the rollouts ahead", functools.partial(
            shelf.save, shelf.path_of(self.root, step), ahead, ledger))
      return found

    self._save_and_stop(step, state, meta)

  def _meta(self, data_state: dict[str, Any]) -> dict[str, Any]:
    return {
        "data_state": data_state, "config": config_lib.to_json_dict(self.cfg), "wall_s": self.wall_s(),
        "nonfinite_in_a_row": self.guard.in_a_row, "contents": dict(self.contents)}

  def _save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
    self.log.flush()  # A saved step is a logged step: a resumed run leaves no gap.
    self.checkpoints.wait()
    oldest = min(self.checkpoints.steps(), default=0)
    self.judge.forget_before(oldest)
    if distributed.is_writer():
      shelf.forget_before(self.root, oldest)
    self.checkpoints.save(step, state, meta)

  def _save_and_stop(self, step: int, state: TrainState, meta: Callable[[], dict[str, Any]]) -> NoReturn:
    started = time.monotonic()
    if not self.guard.check_save(step, state, last=False):
      raise preemption.Stopped(f"the state after step {step - 1} is not finite and was not saved")
    self._save(step, state, meta())
    self.checkpoints.wait()
    raise preemption.Stopped(
        f"the state after {step} of {self.cfg.steps} steps is saved, in {time.monotonic() - started:.1f} s"
        + preemption.age())
