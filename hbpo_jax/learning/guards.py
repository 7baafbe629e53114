"""What stands between numbers that are not finite and the weights: notices them, names them, and answers.

In compiled programs, an update whose loss or gradient norm is not finite leaves the state as it was, and so do the
updates after it, up to the host's next look, which comes at the end of the step as in a healthy run. The host then
knows the state that the bad minibatch met. It says which tensor was the first to be non-finite (another program, which
compiles only now), writes a dump for `hbpo_jax.replay`, answers as `learner.nonfinite` says, and does the updates that
were left out.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import logging
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hbpo_jax import distributed
from hbpo_jax.config import Config
from hbpo_jax.files import StepFile
from hbpo_jax.learning import dumps as dumps_lib
from hbpo_jax.learning import survey
from hbpo_jax.learning.checkpoint import Checkpointer
from hbpo_jax.learning.learner import Learner
from hbpo_jax.models import sharding
from hbpo_jax.structs import Batch, Rollouts, TrainState

INCIDENTS = "incidents.jsonl"
OF_THE_HOST = ("sampler's log-probability", "reward", "advantage")  # of whole responses, looked at before the updates
_REMEDY = "lower optimizer.learning_rate, or set model.compute_dtype=float32 to see whether precision is the cause"
_YES, _NO = np.float32(1), np.float32(0)
_log = logging.getLogger(__name__)


class NonfiniteError(FloatingPointError, ValueError):
  """Ends a run whose numbers are not finite; as a ValueError, with its sentence and no traceback."""


def check_finite(metrics: dict[str, Any], step: int) -> None:
  """Raises for an update that was skipped, on the host, once the metrics are there.

  Args:
    metrics: of `Learner.update` or `sft_update`.
    step: the batch they belong to.
  Raises:
    NonfiniteError: when the loss or the gradient norm is not finite; names the step and the metric.
  """
  for name in ("loss", "grad_norm"):
    if not math.isfinite(value := float(metrics[name])):
      raise NonfiniteError(f"step {step}: {name} is {value}; the update was not applied. {_sentence(_REMEDY)}")


def suspects(rollouts: Rollouts, reward_BGJ: Any, advantage_BGJ: Any) -> dict[str, np.ndarray]:
  """Where what the updates are made of is not finite, bool [B, G, J] by the tensor's name; empty where all of it is.

  Args:
    rollouts, reward_BGJ, advantage_BGJ: on the host.
  """
  logp_BGJ = np.stack([~np.isfinite(logp).all(axis=2) for logp in rollouts.logp_sampler], axis=1)
  found = dict(zip(OF_THE_HOST, (logp_BGJ, ~np.isfinite(reward_BGJ), ~np.isfinite(advantage_BGJ)), strict=True))
  return {name: bad for name, bad in found.items() if bad.any()}


class Guard:
  """The updates of a run. `in_a_row`: updates up to now that were not applied, without one between that was."""

  def __init__(
      self, cfg: Config, learner: Learner, checkpoints: Checkpointer, dumps: dumps_lib.Dumps,
      fresh: Callable[[], TrainState], say: Callable[[str], None], workdir: str | os.PathLike, start_step: int = 0):
    """Args:
      cfg: learner.nonfinite, max_nonfinite and minibatches are read.
      checkpoints: where a rollback finds weights.
      dumps: of the run.
      fresh: makes the state of step 0, for a rollback before the first checkpoint.
      say: prints a line.
      workdir: where incidents.jsonl goes, once there is one to tell.
      start_step: first step of this attempt.
    """
    self._cfg, self._learner, self._checkpoints, self._dumps = cfg, learner, checkpoints, dumps
    self._fresh, self._say = fresh, say
    self.in_a_row = 0
    self._last = ""  # The last bad update, in words.
    self._limit_reached = False
    self._incidents = _Incidents(pathlib.Path(workdir) / INCIDENTS, start_step)

  def update(
      self, step: int, state: TrainState, minibatches: Sequence[Batch], bad_data: dict[str, np.ndarray],
  ) -> tuple[TrainState, list[dict[str, Any]], dict[str, float]]:
    """The updates of a step.

    Args:
      state: consumed.
      bad_data: of `suspects`; the updates of those queries are skipped.
    Returns:
      (state, metrics of each update on the host, metrics of the step: guard/restored_step where it was rolled back).
    Raises:
      NonfiniteError: on a non-finite update with learner.nonfinite='stop', or when the weights are not finite.
    """
    try:
      return self._update(step, state, minibatches, bad_data)
    finally:
      self._incidents.write(step)

  def _update(self, step, state, minibatches, bad_data):
    forced = self._forced(bad_data, len(minibatches))
    todo, updates, one_by_one = list(enumerate(minibatches)), [], False
    while todo:
      part = todo[:1] if one_by_one else todo
      state, metrics = self._run(state, part, forced)
      n = next((i + 1 for i, update in enumerate(metrics) if update["nonfinite"]), len(part))
      updates += metrics[:n]
      if not metrics[n - 1]["nonfinite"]:
        self.in_a_row, todo = 0, todo[n:]
        continue
      self.in_a_row = 1 if n > 1 else self.in_a_row + 1
      (m, batch), todo, one_by_one = todo[n - 1], todo[n:], True
      bad, first = self._examine(step, m, state, batch, metrics[n - 1], forced[m], bad_data)
      state, restored = self._answer(bad, state, first)
      if restored is not None:
        return state, updates, {"guard/restored_step": float(restored)}
    return state, updates, {}

  def check_save(self, step: int, state: TrainState, *, last: bool) -> bool:
    """Whether the state may become a checkpoint: one that is not finite must not push out those that are.

    Args:
      step: steps done.
      last: whether no step follows, which could roll back.
    Raises:
      NonfiniteError: when the state is not finite and no rollback will mend that.
    """
    spoilt = _spoilt(state)
    if not spoilt:
      return True
    newest = max(self._checkpoints.steps(), default=0)
    words = f"after step {step - 1}, {spoilt[0]} is not finite, so that nothing was saved"
    if self._cfg.learner.nonfinite == "rollback" and not last:
      self._say(f"! nonfinite: {words}; the next step will go back to an earlier state.")
      return False
    raise NonfiniteError(f"{words}; the newest good state is that of step {newest}. {_sentence(_remedy_for(spoilt))}")

  def check_limit(self, step: int) -> None:
    """Ends the run when this step has seen learner.max_nonfinite bad updates in a row; call it with the state saved.

    Raises:
      NonfiniteError: then.
    """
    if self._limit_reached:
      raise NonfiniteError(
          f"learner.max_nonfinite={self._cfg.learner.max_nonfinite} updates in a row were not finite, the last in "
          f"{self._last} The state after step {step} is saved, and the same command continues from it; to do better, "
          f"{_REMEDY}.")

  @property
  def limit_reached(self) -> bool:
    """Whether `check_limit` will raise."""
    return self._limit_reached

  def close(self) -> None:
    """Closes the files."""
    self._incidents.close()

  def _forced(self, bad_data: dict[str, np.ndarray], n: int) -> list[bool]:
    bad_B = np.any([bad.reshape(len(bad), -1).any(axis=1) for bad in bad_data.values()], axis=0) if bad_data else None
    return [False] * n if bad_B is None else bad_B.reshape(n, -1).any(axis=1).tolist()

  def _run(self, state, part, forced):
    """(state, metrics on the host); with the first update that is not finite, those after it are skipped as well."""
    skip, done = _NO, []
    for m, batch in part:
      state, metrics = self._learner.update(state, batch, _YES if forced[m] else skip)
      if jax.default_backend() == "cpu":
        jax.block_until_ready(metrics)  # On few cores, queued programs can starve each other's collectives.
      skip = metrics["nonfinite"]
      done.append(metrics)
    return state, jax.device_get(done)

  def _examine(self, step, m, state, batch, metrics, forced, bad_data) -> tuple[dumps_lib.Bad, survey.Entry | None]:
    """(the update, the first tensor that is not finite); only the first in a row, and what is dumped, is looked at."""
    entries = []
    if self.in_a_row == 1 or self._dumps.has_room(step, m):
      queries = next(iter(bad_data.values())).shape[0] // self._cfg.learner.minibatches if bad_data else 0
      own = {name: bad[m * queries:(m + 1) * queries] for name, bad in bad_data.items()}
      entries = examine(self._learner, state, batch, own)
    spoilt = survey.nonfinite(entries)
    return dumps_lib.Bad(step, m, batch, forced, metrics, entries), spoilt[0] if spoilt else None

  def _answer(self, bad: dumps_lib.Bad, state, first) -> tuple[TrainState, int | None]:
    """(the state to go on with, the step that it was rolled back to or None)."""
    mode = self._cfg.learner.nonfinite
    dump = self._dumps.write(bad, state) if bad.entries else None
    dump = dump or self._dumps.path(bad.step, bad.minibatch)
    self._last = _describe(bad, first)
    say = lambda action: self._report(bad, first, dump, action)
    self._limit_reached |= 0 < self._cfg.learner.max_nonfinite <= self.in_a_row
    if mode == "rollback":
      state, at = self._roll_back(bad.step, state)
      say(f"went back to the state of step {at}")
      return state, at
    weights = [e for e in survey.nonfinite(bad.entries) if e.name.startswith(("params", "opt_state"))]
    if mode == "stop" or weights:
      say("stopped")
      see = f" Dump: {dump}." if dump else ""
      raise NonfiniteError(f"{self._last}{see} {_sentence(_remedy_for(weights))}")
    say("skipped")
    return state, None

  def _report(self, bad, first, dump, action) -> None:
    see = f" Repeat it with: python -m hbpo_jax.replay {dump}" if dump else ""
    self._say(f"! nonfinite: {self._last} Answer: {action}.{see}")
    self._incidents.note({
        "minibatch": bad.minibatch, "action": action, "in_a_row": self.in_a_row,
        "first": first.name if first else None,
        "nonfinite": {e.name: e.n_nonfinite for e in survey.nonfinite(bad.entries)},
        "loss": repr(float(bad.metrics["loss"])), "grad_norm": repr(float(bad.metrics["grad_norm"])),
        "dump": str(dump) if dump else None})

  def _roll_back(self, step: int, state: TrainState) -> tuple[TrainState, int]:
    """(the newest good state, of which step it is); `step` counts on, so that the data of this step do not return.

    A checkpoint that is due by schedule goes before one that an interruption left, which a run without the
    interruption would not have.
    """
    self._checkpoints.wait()
    for array in jax.tree.leaves(state):
      array.delete()  # Two states may not fit.
    found = self._checkpoints.restore_latest(self._learner.abstract_state(), scheduled_first=True)
    state, at = (found[0], int(found[0].step)) if found else (self._fresh(), 0)
    if spoilt := _spoilt(state):
      raise NonfiniteError(
          f"step {step}: learner.nonfinite='rollback' goes back to the state of step {at}, which is not finite itself: "
          f"{spoilt[0]}; check the weights in model.path, or start over in another --workdir.")
    whole = sharding.replicated(self._learner.mesh)
    return state.replace(step=sharding.put(jnp.asarray(step, jnp.int32), whole)), at


def examine(
    learner: Learner, state: TrainState, batch: Batch, bad_data: dict[str, np.ndarray] | None = None,
) -> list[survey.Entry]:
  """Every array that has a part in an update, in the order in which one leads to the next.

  Args:
    state: before the update.
    batch: the minibatch.
    bad_data: of `suspects`, the minibatch's queries.
  """
  found = []
  for name, bad in (bad_data or {}).items():
    at = tuple(int(i) for i in np.argwhere(bad)[0]) if bad.any() else ()
    found.append(survey.Entry(name, bad.size, int(bad.sum()), at, 0.0, 0))
  found += survey.take("batch", _of_tokens(batch))
  found += survey.take("params", state.params) + survey.take("opt_state", state.opt_state)
  found += survey.take("logp", learner.score(state.params, batch))
  return found + survey.entries("gradient", learner.survey_gradient(state.params, batch), state.params)


@jax.jit
def _of_tokens(batch: Batch) -> dict[str, jax.Array]:
  """The numbers that tokens with loss bring along, [R, C] by field; 0 elsewhere, where nothing is read."""
  mask_RC = batch.completion_mask_RC
  fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
  return {
      name: jnp.where(mask_RC, x, 0) for name, x in fields.items()
      if x is not None and jnp.issubdtype(x.dtype, jnp.floating)}


def _spoilt(state: TrainState) -> list[survey.Entry]:
  return survey.nonfinite(survey.take("params", state.params) + survey.take("opt_state", state.opt_state))


def _describe(bad: dumps_lib.Bad, first: survey.Entry | None) -> str:
  where = f"step {bad.step}, minibatch {bad.minibatch}: "
  values = f"loss {float(bad.metrics['loss']):g}, gradient norm {float(bad.metrics['grad_norm']):g}"
  if first is not None:
    return f"{where}{values}; the first tensor that is not finite is {first}, and the update was not applied."
  if not bad.entries:
    return f"{where}{values}; the update was not applied."
  steepest = max((e for e in bad.entries if e.name.startswith("gradient")), key=lambda e: e.largest)
  return (f"{where}{values}; every tensor is finite, but sums of them are not (the largest gradient is "
          f"{steepest.largest:g}, in {steepest.name}), and the update was not applied.")


def _remedy_for(weights: list[survey.Entry]) -> str:
  back = "set learner.nonfinite='rollback' to go back to the newest good state, and " if weights else ""
  return f"{back}{_REMEDY}"


def _sentence(remedy: str) -> str:
  return remedy[0].upper() + remedy[1:] + "."


class _Incidents:
  """WORKDIR/incidents.jsonl, a row for each bad update, made with the first."""

  def __init__(self, path: pathlib.Path, start_step: int):
    self._path, self._start = path, start_step
    self._file = StepFile(path, start_step) if path.exists() and distributed.is_writer() else None
    self._rows: list[Mapping[str, Any]] = []

  def note(self, row: Mapping[str, Any]) -> None:
    """Keeps a row until `write`."""
    self._rows.append(row)

  def write(self, step: int) -> None:
    """Appends the rows of a step; a disk that is full is reported and does no harm."""
    rows, self._rows = self._rows, []
    if not rows or not distributed.is_writer():
      return
    try:
      self._file = self._file or StepFile(self._path, self._start)
      self._file.write(step, rows)
    except OSError as error:
      _log.warning("%s could not be written (%s); the run goes on without it.", self._path, error)

  def close(self) -> None:
    """Closes the file."""
    if self._file is not None:
      self._file.close()
