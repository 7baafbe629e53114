"""Responses of different lengths in rows of one length: what the update computes with is tokens, not padding."""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from hbpo_jax.structs import Batch, Prompts, Rollouts


def pack(
    prompts: Prompts, rollouts: Rollouts, advantage_BGJ: Any, *, n_minibatches: int, micro_rows: int, shards: int,
) -> tuple[Batch, float]:
  """The step's responses, each with its prompt, in rows of P + C columns; every minibatch in rows of its own.

  A minibatch is made of consecutive queries. Its responses go to rows by first fit, longest first; the rows are dealt
  out to the shards in turn, and come before the empty rows that are left, so that whole micro-batches are empty and
  are not computed (`scoring.fold_micro_batches`). There are as many rows as there are responses, rounded up to whole
  micro-batches: no step needs more, and all steps have one shape.

  Args:
    prompts, rollouts: of the step, on the host.
    advantage_BGJ: float [B, G, J].
    n_minibatches: divides B.
    micro_rows: rows of a micro-batch over all shards, a multiple of them.
    shards: devices over which rows are split.
  Returns:
    (a Batch of NumPy arrays with P = 1, rows in order of minibatch; logp_sampler_RC is set, logp_old_RC is not; the
    share of real tokens in the micro-batches that are not empty).
  """
  B, G, J = rollouts.n_tokens_BGJ.shape
  width = prompts.tokens_BP.shape[1] + max(t.shape[-1] for t in rollouts.tokens)
  per_minibatch = B // n_minibatches * G * J
  n_rows = math.ceil(per_minibatch / micro_rows) * micro_rows
  shape = (n_minibatches * n_rows, width)
  packed = _Columns(*(np.zeros(shape, kind) for kind in (np.int32, np.int32, np.int32, bool, np.float32, np.float32)))
  n_prompt_B, advantage_BGJ = np.asarray(prompts.n_prompt_B), np.asarray(advantage_BGJ, np.float32)
  length_BN = (n_prompt_B[:, None, None] + rollouts.n_tokens_BGJ).reshape(B, G * J)
  queries, n_computed = B // n_minibatches, 0
  for m in range(n_minibatches):
    first = m * queries
    rows = first_fit(length_BN[first:first + queries].reshape(-1), width)
    n_computed += math.ceil(math.ceil(len(rows) / shards) * shards / micro_rows) * micro_rows * width
    # Where a shard's own rows begin in the minibatch, and how they follow each other.
    place = [m * n_rows + k % shards * (n_rows // shards) + k // shards for k in range(len(rows))]
    for r, members in zip(place, rows):
      start = 0
      for number, item in enumerate(members, start=1):
        b, rest = divmod(item, G * J)
        g, j = divmod(rest, J)
        start = packed.write(r, start, number, prompts, rollouts, advantage_BGJ, (first + b, g, j))
  return packed.to_batch(), float(length_BN.sum()) / n_computed


def first_fit(length_N: Sequence[int] | np.ndarray, width: int) -> list[list[int]]:
  """Items in rows of `width` by first fit, longest first; equal lengths in order of their index.

  Raises:
    ValueError: when an item is longer than a row.
  """
  order = np.argsort(-np.asarray(length_N), kind="stable")
  rows: list[list[int]] = []
  free = np.zeros(0, np.int64)
  for item in order.tolist():
    length = int(length_N[item])
    if length > width:
      raise ValueError(f"an item of {length} tokens does not fit a row of {width}.")
    fits = np.flatnonzero(free >= length)
    if len(fits):
      row = int(fits[0])
    else:
      row = len(rows)
      rows.append([])
      free = np.append(free, width)
    rows[row].append(item)
    free[row] -= length
  return rows


@dataclasses.dataclass(frozen=True)
class _Columns:
  """What belongs to each column of the packed rows, [R, T]; a token's loss belongs to its own column."""
  tokens: np.ndarray
  segment: np.ndarray
  position: np.ndarray
  has_loss: np.ndarray
  advantage: np.ndarray
  logp_sampler: np.ndarray

  def write(
      self, row: int, start: int, number: int, prompts: Prompts, rollouts: Rollouts, advantage_BGJ: np.ndarray,
      index: tuple[int, int, int]) -> int:
    """Puts one response with its prompt into a row from column `start`; returns the column behind it."""
    b, g, j = index
    n_prompt, n_tokens = int(prompts.n_prompt_B[b]), int(rollouts.n_tokens_BGJ[b, g, j])
    middle, end = start + n_prompt, start + n_prompt + n_tokens
    prompt = np.asarray(prompts.tokens_BP)[b]
    self.tokens[row, start:middle] = prompt[len(prompt) - n_prompt:]
    self.tokens[row, middle:end] = rollouts.response(b, g, j)
    self.segment[row, start:end] = number
    self.position[row, start:end] = np.arange(n_prompt + n_tokens)
    self.has_loss[row, middle:end] = rollouts.completion_mask[g][b, j, :n_tokens]
    self.advantage[row, middle:end] = advantage_BGJ[b, g, j]
    self.logp_sampler[row, middle:end] = rollouts.logp_sampler[g][b, j, :n_tokens]
    return end

  def to_batch(self) -> Batch:
    """With P = 1: the first column of a row is no one's target."""
    return Batch(
        self.tokens, self.segment, self.position, self.has_loss[:, 1:], advantage_RC=self.advantage[:, 1:],
        logp_sampler_RC=self.logp_sampler[:, 1:])
