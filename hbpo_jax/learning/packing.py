"""Responses of different lengths in rows of one length: what the update computes with is tokens, not padding."""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from hbpo_jax.structs import Batch, Prompts, Rollouts, forced_advantage

_LONG = 512  # tokens


def pack(
    prompts: Prompts, rollouts: Rollouts, advantage_BGJ: Any, *, n_minibatches: int, micro_rows: int, shards: int,
    row_tokens: int = 0, share_prompts: bool = False, prefix_weights: tuple[float, float] = (1.0, 1.0),
) -> tuple[Batch, float]:
  """The step's responses, each with its prompt, in rows of one length; every minibatch in rows of its own.

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
    row_tokens: columns of a row; 0 means those of `row_width`.
    share_prompts: whether responses to one query in one row share its prompt. The last token of the prompt, which
      predicts a response's first, is each response's own.
    prefix_weights: as in `structs.make_batch`.
  Returns:
    (a Batch of NumPy arrays with P = 1, rows in order of minibatch, all set but logp_old_RC and logp_ref_RC; the
    share of real tokens in the micro-batches that are not empty).
  """
  B, G, J = rollouts.n_tokens_BGJ.shape
  P, C = prompts.tokens_BP.shape[1], max(t.shape[-1] for t in rollouts.tokens)
  width = row_tokens or row_width(P, C, share_prompts)
  per_minibatch = B // n_minibatches * G * J
  n_rows = math.ceil(per_minibatch / micro_rows) * micro_rows
  packed = _Columns.empty((n_minibatches * n_rows, width), share_prompts)
  advantage_BGJ = np.asarray(advantage_BGJ, np.float32)
  forced_BG = None if prefix_weights == (1, 1) else forced_advantage(advantage_BGJ, prefix_weights)
  n_shared_B = np.asarray(prompts.n_prompt_B) - 1 if share_prompts else np.zeros(B, np.int64)
  own_BN = ((np.asarray(prompts.n_prompt_B) - n_shared_B)[:, None, None] + rollouts.n_tokens_BGJ).reshape(B, G * J)
  queries, n_computed = B // n_minibatches, 0
  for m in range(n_minibatches):
    of_minibatch = slice(m * queries, (m + 1) * queries)
    rows = first_fit(own_BN[of_minibatch], n_shared_B[of_minibatch], width)
    n_computed += math.ceil(math.ceil(len(rows) / shards) * shards / micro_rows) * micro_rows * width
    # Where a shard's own rows begin in the minibatch, and how they follow each other.
    place = [m * n_rows + k % shards * (n_rows // shards) + k // shards for k in range(len(rows))]
    for r, members in zip(place, rows):
      packed.write(r, prompts, rollouts, advantage_BGJ, [
          (m * queries + q, [divmod(n, J) for n in responses]) for q, responses in members.items()], forced_BG)
  return packed.to_batch(), float((packed.segment != 0).sum()) / n_computed


def pack_rows(batch: Batch, *, micro_rows: int, shards: int, row_tokens: int = 0) -> Batch:
  """A batch of one response to a row, as `SftData` makes it, in packed rows as those of `pack`.

  Args:
    batch: NumPy arrays; tokens_RT, segment_RT and completion_mask_RC are read.
    micro_rows, shards, row_tokens: as of `pack`.
  Returns:
    A Batch of NumPy arrays with P = 1.
  """
  C = batch.completion_mask_RC.shape[1]
  P = batch.tokens_RT.shape[1] - C
  of_groups = lambda x_RC: (x_RC[:, None],)  # R queries of one response each
  n_prompt_R, n_tokens_R = (np.asarray(part, bool).sum(axis=1) for part in np.split(batch.segment_RT, [P], axis=1))
  prompts = Prompts(
      batch.tokens_RT[:, :P], n_prompt_R, prefix_GF=np.zeros((1, 0), np.int32), n_prefix_G=np.zeros(1, np.int32),
      query_B=np.arange(len(n_prompt_R)))
  rollouts = Rollouts(
      tokens=of_groups(batch.tokens_RT[:, P:]), completion_mask=of_groups(batch.completion_mask_RC),
      logp_sampler=of_groups(np.zeros(batch.completion_mask_RC.shape, np.float32)),
      n_tokens_BGJ=n_tokens_R[:, None, None], n_gen_BGJ=n_tokens_R[:, None, None],
      truncated_BGJ=np.zeros((len(n_tokens_R), 1, 1), bool))
  return pack(
      prompts, rollouts, np.zeros((len(n_tokens_R), 1, 1)), n_minibatches=1, micro_rows=micro_rows, shards=shards,
      row_tokens=row_tokens)[0]


def row_width(P: int, C: int, share_prompts: bool) -> int:
  """Columns of a row for prompts of at most P and responses of at most C tokens.

  Short rows hold two of the longest responses to a query: less is left over at their ends, and matmuls are larger. The
  attention of long rows would cost more than that saves.
  """
  if P + C > _LONG:
    return P + C
  return P + 1 + 2 * C if share_prompts else 2 * (P + C)


def first_fit(
    length_BN: np.ndarray | Sequence[Sequence[int]], context_B: np.ndarray | Sequence[int], width: int,
) -> list[dict[int, list[int]]]:
  """Items in rows of `width` by first fit, longest first; equal lengths in order of their index.

  The items of a query share a context, which takes its length once in every row that holds one of them; an item goes
  to the first row that has its query's, if it fits there, or else to the first that it fits.

  Args:
    length_BN: int [B, N], of each item, without context.
    context_B: int [B], of each query's context.
  Returns:
    For each row the items n in it by query b.
  Raises:
    ValueError: when an item is longer than a row.
  """
  length_BN, context_B = np.asarray(length_BN), np.asarray(context_B)
  B, N = length_BN.shape
  rows: list[dict[int, list[int]]] = []
  free_R, here_BR = np.zeros(B * N, np.int64), np.zeros((B, B * N), bool)
  for item in np.argsort(-length_BN.reshape(-1), kind="stable").tolist():
    b, n = divmod(item, N)
    length, context = int(length_BN[b, n]), int(context_B[b])
    if length + context > width:
      raise ValueError(f"an item of {length + context} tokens does not fit a row of {width}.")
    here_R = here_BR[b, :len(rows)]
    fits_R = free_R[:len(rows)] >= length + context * ~here_R
    shared = np.flatnonzero(fits_R & here_R & (context > 0))
    found = shared if len(shared) else np.flatnonzero(fits_R)
    if len(found):
      row = int(found[0])
    else:
      row = len(rows)
      rows.append({})
      free_R[row] = width
    free_R[row] -= length + context * (not here_BR[b, row])
    here_BR[b, row] = True
    rows[row].setdefault(b, []).append(n)
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
  forced: np.ndarray
  context: np.ndarray | None

  @classmethod
  def empty(cls, shape: tuple[int, int], share_prompts: bool) -> "_Columns":
    """Padding only."""
    of = lambda kind: np.zeros(shape, kind)
    return cls(
        tokens=of(np.int32), segment=of(np.int32), position=of(np.int32), has_loss=of(bool), advantage=of(np.float32),
        logp_sampler=of(np.float32), forced=of(bool), context=of(np.int32) if share_prompts else None)

  def write(
      self, row: int, prompts: Prompts, rollouts: Rollouts, advantage_BGJ: np.ndarray,
      members: Sequence[tuple[int, Sequence[tuple[int, int]]]], forced_BG: np.ndarray | None) -> None:
    """Fills a row with responses (subgroup, rollout) by query; forced_BG: advantage of forced tokens, if another."""
    start = number = 0
    for b, responses in members:
      n_prompt = int(prompts.n_prompt_B[b])
      prompt = np.asarray(prompts.tokens_BP)[b, prompts.tokens_BP.shape[1] - n_prompt:]
      n_shared, context = 0, None
      if self.context is not None:
        n_shared, number = n_prompt - 1, number + 1
        start, context = self._tokens(row, start, prompt[:n_shared], number, 0, number), number
      for g, j in responses:
        number += 1
        n_tokens = int(rollouts.n_tokens_BGJ[b, g, j])
        start = self._tokens(row, start, prompt[n_shared:], number, n_shared, context)
        end = self._tokens(row, start, rollouts.response(b, g, j), number, n_prompt, context)
        self.has_loss[row, start:end] = rollouts.completion_mask[g][b, j, :n_tokens]
        self.advantage[row, start:end] = advantage_BGJ[b, g, j]
        forced = slice(start, min(start + int(prompts.n_prefix_G[g]), end))
        self.forced[row, forced] = True
        if forced_BG is not None:
          self.advantage[row, forced] = forced_BG[b, g]
        self.logp_sampler[row, start:end] = rollouts.logp_sampler[g][b, j, :n_tokens]
        start = end

  def _tokens(
      self, row: int, start: int, tokens: np.ndarray, number: int, position: int, context: int | None) -> int:
    """Puts tokens into a row from column `start`; returns the column behind them."""
    end = start + len(tokens)
    self.tokens[row, start:end] = tokens
    self.segment[row, start:end] = number
    self.position[row, start:end] = position + np.arange(len(tokens))
    if self.context is not None:
      self.context[row, start:end] = context
    return end

  def to_batch(self) -> Batch:
    """With P = 1: the first column of a row is no one's target."""
    return Batch(
        self.tokens, self.segment, self.position, self.has_loss[:, 1:], context_RT=self.context,
        advantage_RC=self.advantage[:, 1:], logp_sampler_RC=self.logp_sampler[:, 1:], forced_RC=self.forced[:, 1:])
