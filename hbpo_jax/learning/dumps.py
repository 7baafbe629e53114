"""Minibatches whose update was not finite, on disk with the state they met, so that the update can be repeated.

    WORKDIR/dumps/step_000012_m1/   step 12, minibatch 1, both from 0
      meta.json                     schema, settings, versions, the update's metrics, what was found in every array
      batch.npz                     the minibatch's arrays
      state/12/                     the training state before the update, a checkpoint like all others

A dump is written aside and then renamed, so that one with its final name is whole. No dump ends a run.
"""

from collections.abc import Mapping
import dataclasses
import io
import json
import logging
import os
import pathlib
import shutil
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from hbpo_jax import distributed
from hbpo_jax.config import CheckpointConfig
from hbpo_jax.files import atomic_write_bytes
from hbpo_jax.learning import survey
from hbpo_jax.learning.checkpoint import Checkpointer
from hbpo_jax.structs import Batch, TrainState

SCHEMA = 1
_META, _BATCH, _STATE = "meta.json", "batch.npz", "state"
# Free space that a dump leaves behind, in sizes of the state: a checkpoint may be due, and Orbax writes it whole
# before it removes an old one.
_SPARE = 2
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Bad:
  """An update that was not applied.

  step, minibatch: both from 0.  batch: its minibatch, on the devices.  forced: whether it was skipped for data that
  were not finite before it, whatever its loss.  metrics: of `Learner.update`, on the host.  entries: of every array
  that has a part in it, in the order in which one leads to the next.
  """
  step: int
  minibatch: int
  batch: Batch
  forced: bool
  metrics: Mapping[str, Any]
  entries: list[survey.Entry]


@dataclasses.dataclass(frozen=True)
class Dump:
  """A dump that was read back. metrics: float by name.  meta: all of meta.json."""
  path: pathlib.Path
  step: int
  minibatch: int
  forced: bool
  batch: Batch
  metrics: dict[str, float]
  entries: list[survey.Entry]
  meta: dict[str, Any]

  def state(self, abstract_state: TrainState) -> TrainState:
    """The state before the update.

    Args:
      abstract_state: `Learner.abstract_state()` of the dump's settings, on any mesh.
    Raises:
      FileNotFoundError, ValueError: when it is missing, damaged, or does not fit.
    """
    with Checkpointer(self.path / _STATE, CheckpointConfig(max_to_keep=1), must_exist=True) as checkpoints:
      found = checkpoints.restore_latest(abstract_state)
    if found is None:
      raise FileNotFoundError(f"{self.path / _STATE} holds no checkpoint; copy the whole directory of the dump.")
    return found[0]


class Dumps:
  """The dumps of one run."""

  def __init__(self, directory: str | os.PathLike, most: int, facts: Mapping[str, Any]):
    """Args:
      directory: of the dumps; made with the first.
      most: dumps that the directory may hold.
      facts: what meta.json holds of the run, plain JSON: config, architecture, mesh, git, versions and so on.
    """
    self._directory, self._most, self._facts = pathlib.Path(directory), most, dict(facts)

  def has_room(self, step: int, minibatch: int) -> bool:
    """Whether `write` would write; every process calls it."""
    def found() -> bool:
      there = [p.name for p in self._directory.glob("step_*")]
      return _name(step, minibatch) not in there and len(there) < self._most

    return distributed.from_writer("the number of dumps", found)

  def path(self, step: int, minibatch: int) -> pathlib.Path | None:
    """The dump of a minibatch, or None where there is none."""
    path = self._directory / _name(step, minibatch)
    return path if path.is_dir() else None

  def write(self, bad: Bad, state: TrainState) -> pathlib.Path | None:
    """The new dump; None where there are enough, or it could not be written, which a warning then says.

    Args:
      bad: the update.
      state: before it, which is also that after it.
    """
    if not self.has_room(bad.step, bad.minibatch):
      return None
    target = self._directory / _name(bad.step, bad.minibatch)
    aside = target.with_name(f".{target.name}.tmp")
    try:
      distributed.from_writer("a directory for a dump", lambda: self._make(aside, state))
      with Checkpointer(aside / _STATE, CheckpointConfig(max_to_keep=1)) as checkpoints:
        checkpoints.save(bad.step, state, {})
        checkpoints.wait()
      arrays = _to_host(bad.batch)
      distributed.from_writer("a dump", lambda: self._finish(aside, target, bad, arrays))
    # Orbax's storage reports a full disk as a ValueError or a RuntimeError.
    except (OSError, ValueError, RuntimeError) as error:
      _log.warning("%s could not be written (%s); the run goes on without it.", target, str(error).split("\n")[0])
      if distributed.is_writer():
        shutil.rmtree(aside, ignore_errors=True)
      return None
    return target

  def _make(self, aside: pathlib.Path, state: TrainState) -> None:
    aside.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)  # Of a run that was killed while it wrote.
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    free = shutil.disk_usage(aside.parent).free
    if free < (1 + _SPARE) * size:
      raise OSError(
          f"{free / 2**30:.1f} GiB are free, and a dump of {size / 2**30:.1f} GiB is to leave room for checkpoints")
    aside.mkdir()

  def _finish(self, aside: pathlib.Path, target: pathlib.Path, bad: Bad, arrays: dict[str, np.ndarray]) -> None:
    body = io.BytesIO()
    np.savez(body, allow_pickle=False, **arrays)  # pyright: ignore[reportArgumentType]
    atomic_write_bytes(aside / _BATCH, body.getvalue())
    meta = {
        "schema": SCHEMA, "step": bad.step, "minibatch": bad.minibatch, "forced": bad.forced,
        # As text, for JSON has no word for what these numbers are.
        "metrics": {name: repr(float(value)) for name, value in bad.metrics.items()},
        "entries": survey.to_json(bad.entries), **self._facts}
    atomic_write_bytes(aside / _META, (json.dumps(meta, indent=1, allow_nan=False) + "\n").encode())
    os.replace(aside, target)


def read(path: str | os.PathLike) -> Dump:
  """A dump without its state, which `Dump.state` reads.

  Raises:
    FileNotFoundError: when it is missing or not whole.
    ValueError: when it is damaged, or of a newer version of this package.
  """
  folder = pathlib.Path(path).expanduser()
  for name in (_META, _BATCH, _STATE):
    if not (folder / name).exists():
      raise FileNotFoundError(f"{folder / name} does not exist; give a directory such as RUN/dumps/step_000012_m1.")
  try:
    meta = json.loads((folder / _META).read_text(encoding="utf-8"))
    schema = meta["schema"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{folder / _META} is damaged ({error!r}); restore it from a copy.") from error
  if schema != SCHEMA:
    raise ValueError(
        f"{folder} has schema {schema!r}, and this version of hbpo_jax reads schema {SCHEMA}; use the version that "
        f"wrote it, {meta.get('versions', {}).get('hbpo_jax', 'which is not recorded')}.")
  try:
    with np.load(folder / _BATCH, allow_pickle=False) as arrays:
      batch = Batch(**{name: arrays[name] for name in arrays.files})
    return Dump(
        folder, meta["step"], meta["minibatch"], meta["forced"], batch,
        {name: float(text) for name, text in meta["metrics"].items()}, survey.from_json(meta["entries"]), meta)
  except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{folder} is damaged ({error!r}); restore it from a copy.") from error


def _name(step: int, minibatch: int) -> str:
  return f"step_{step:06d}_m{minibatch}"


def _to_host(batch: Batch) -> dict[str, np.ndarray]:
  """The arrays that are set, by field; every process calls it."""
  given = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if getattr(batch, f.name) is not None}
  whole = lambda x: x if getattr(x, "is_fully_addressable", True) else multihost_utils.process_allgather(x, tiled=True)
  return {name: np.asarray(whole(x)) for name, x in given.items()}
