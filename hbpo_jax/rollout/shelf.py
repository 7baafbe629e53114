"""Rollouts on disk: those drawn ahead of a stop (pipeline=one_step_off), from weights that a resumed run lacks."""

from collections.abc import Mapping
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import zipfile

import numpy as np

from hbpo_jax.files import atomic_write_bytes
from hbpo_jax.structs import Rollouts

FOLDER = "ahead"  # of a working directory
_PER_GROUP = ("tokens", "completion_mask", "logp_sampler")


def path_of(root: str | os.PathLike, step: int) -> pathlib.Path:
  """The file of a step's rollouts in a working directory."""
  return pathlib.Path(root) / FOLDER / f"rollouts-{step:08d}.npz"


def forget_before(root: str | os.PathLike, step: int) -> None:
  """Removes the rollouts of all steps before `step`, such as those before the oldest checkpoint."""
  for path in (pathlib.Path(root) / FOLDER).glob("rollouts-*.npz"):
    if path.name < path_of(root, step).name:
      path.unlink()


def save(path: str | os.PathLike, rollouts: Rollouts, ledger: Mapping[str, float]) -> str:
  """Writes rollouts, whole or not at all, and returns the SHA-256 of the file, hex.

  Args:
    rollouts: host arrays.
    ledger: the metrics of their generation.
  """
  arrays = {"ledger": np.array(json.dumps(dict(ledger)))}
  for field in dataclasses.fields(Rollouts):
    value = getattr(rollouts, field.name)
    grouped = enumerate(value) if field.name in _PER_GROUP else [("", value)]
    arrays |= {f"{field.name}{g}": np.asarray(array) for g, array in grouped}
  body = io.BytesIO()
  np.savez_compressed(body, allow_pickle=False, **arrays)
  atomic_write_bytes(path, body.getvalue())
  return hashlib.sha256(body.getvalue()).hexdigest()


def load(path: str | os.PathLike, sha256: str) -> tuple[Rollouts, dict[str, float]]:
  """(rollouts, ledger) as they were saved.

  Raises:
    ValueError: when the file is missing or is not the one that `save` wrote; names it and the remedy.
  """
  path = pathlib.Path(path)
  try:
    body = path.read_bytes()
    if hashlib.sha256(body).hexdigest() != sha256:
      raise ValueError("its checksum does not fit")
    with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
      n_groups = sum(name.startswith("tokens") for name in arrays)
      values = {
          field.name: tuple(arrays[f"{field.name}{g}"] for g in range(n_groups)) if field.name in _PER_GROUP
          else arrays[field.name] for field in dataclasses.fields(Rollouts)}
      return Rollouts(**values), json.loads(str(arrays["ledger"]))
  except (ValueError, KeyError, FileNotFoundError, zipfile.BadZipFile) as error:
    raise ValueError(
        f"{path}, which belongs to the newest checkpoint, is damaged or missing ({error}); restore it, or delete that "
        "checkpoint to go on from the one before.") from error
