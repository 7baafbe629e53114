"""Hashes of what each step drew, judged and learnt, in WORKDIR/digests.jsonl: two runs that agree there are one run.

A tool for proofs (`hbpo_jax.prove_resume`), turned on by log.digests; the run itself does not read it.
"""

from collections.abc import Mapping, Sequence
import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from hbpo_jax import distributed
from hbpo_jax.files import StepFile
from hbpo_jax.structs import Prompts, Rollouts

FILE = "digests.jsonl"


class DigestLog:
  """Appends a row of hashes per step; on a resume, rows of an earlier attempt from `resume_step` on are dropped.

  Where a job has several processes, only the first keeps it; to the others it does nothing.
  """

  def __init__(self, workdir: str | os.PathLike, resume_step: int):
    self._log = StepFile(pathlib.Path(workdir) / FILE, resume_step) if distributed.is_writer() else None

  def write(
      self, step: int, *, ids: Sequence[str], prompts: Prompts, key: jax.Array, rollouts: Rollouts,
      verdicts: Sequence[Any], advantage: Any, params: Mapping[str, int], optimizer: Mapping[str, int]) -> None:
    """Writes the hashes of a step.

    Args:
      ids: of the problems.
      prompts: of the step.
      key: typed random key that the rollouts were drawn with.
      rollouts: host arrays.
      verdicts: in (query, budget, rollout) order; what `str` shows of them counts.
      advantage: arrays of the step.
      params, optimizer: checksums by name after the step's updates, of `checkpoint.fingerprint`.
    """
    if self._log is None:
      return
    self._log.write(step, [{
        "problems": of_json(list(ids)), "prompts": of_arrays(prompts), "key": of_arrays(jax.random.key_data(key)),
        "tokens": of_arrays((rollouts.tokens, rollouts.completion_mask)),
        "log_probabilities": of_arrays(rollouts.logp_sampler),
        "lengths": of_arrays((rollouts.n_tokens_BGJ, rollouts.n_gen_BGJ, rollouts.truncated_BGJ)),
        "verdicts": of_json([str(v) for v in verdicts]), "advantages": of_arrays(advantage), "params": of_json(params),
        "optimizer": of_json(optimizer)}])

  def close(self) -> None:
    """Closes the file; calling it again does nothing."""
    if self._log is not None:
      self._log.close()


def of_arrays(tree: Any) -> str:
  """SHA-256, hex, of the names, dtypes, shapes and bytes of a tree of arrays."""
  found = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(tree)):
    array = np.ascontiguousarray(leaf)
    found.update(f"{jax.tree_util.keystr(path)} {array.dtype}{array.shape}".encode())
    found.update(array.tobytes())
  return found.hexdigest()


def of_json(value: Any) -> str:
  """SHA-256, hex, of a plain JSON value."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
