"""Which rollout sits in which slot. Host only; every decision follows from tokens, never from clocks."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from hbpo_jax.rollout import sampler

FREE = -1


@dataclasses.dataclass(frozen=True)
class Work:
  """The rollouts to do, in queue order: longest expected first.

  query, subgroup, rollout: int32 [n], identity within the step.
  limit: int32 [n], most tokens to sample, at least 1.
  stop: int32 [n], the response ends at this many sampled tokens as if the last were EOS; sampler.NEVER = it does not.
  """
  query: np.ndarray
  subgroup: np.ndarray
  rollout: np.ndarray
  limit: np.ndarray
  stop: np.ndarray

  def __len__(self) -> int:
    return len(self.query)


def largest_limit_first(
    limit_G: Sequence[int], n_queries: int, n_rollouts: int, *, stop_BGJ: np.ndarray | None = None,
    wanted_BGJ: np.ndarray | None = None, limit_BG: np.ndarray | None = None) -> Work:
  """Every rollout of a step; subgroups that may run longest come first, and of these the later (larger budgets).

  Args:
    limit_G: most sampled tokens of each subgroup.
    stop_BGJ: imposed lengths, or None.
    wanted_BGJ: bool, False = leave this rollout out; None means all are wanted.
    limit_BG: lower limits of single queries, at least 1, or None.
  """
  G = len(limit_G)
  order_G = sorted(range(G), key=lambda g: (limit_G[g], g), reverse=True)
  subgroup, query, rollout = (
      x.reshape(-1) for x in np.meshgrid(order_G, np.arange(n_queries), np.arange(n_rollouts), indexing="ij"))
  if wanted_BGJ is not None:
    kept = np.flatnonzero(wanted_BGJ[query, subgroup, rollout])
    subgroup, query, rollout = subgroup[kept], query[kept], rollout[kept]
  stop = np.full(len(query), sampler.NEVER) if stop_BGJ is None else np.asarray(stop_BGJ)[query, subgroup, rollout]
  limit = np.asarray(limit_G)[subgroup]
  if limit_BG is not None:
    limit = np.minimum(limit, limit_BG[query, subgroup])
  columns = (query, subgroup, rollout, limit, stop)
  return Work(*(x.astype(np.int32) for x in columns))


class Schedule:
  """A queue of rollouts over slots that are spread evenly over shards.

  Slots [i * rows, (i + 1) * rows) belong to shard i. Finished rows are replaced from the queue; once it is empty,
  `shrink` drops free rows down to the next bucket, in every shard alike.

  Attributes:
    item_R: int [R], index into the work, or FREE.
    age_R: int [R], tokens sampled so far.
    n_segments, slot_steps, decided, overrun, idle: segments, and how many slot-steps so far were what.
  """

  def __init__(self, work: Work, n_shards: int, row_buckets: Sequence[int]):
    """Args:
      work: in queue order.
      n_shards: shards the slots are spread over.
      row_buckets: allowed rows per shard, descending; it starts with the smallest that seats all, else the first.
    """
    self.work = work
    self._next = 0
    self._n_shards, self._buckets = n_shards, tuple(row_buckets)
    wanted = -(-len(work) // n_shards)
    n_rows = n_shards * min((n for n in self._buckets if n >= wanted), default=self._buckets[0])
    self.item_R = np.full(n_rows, FREE)
    self.age_R = np.zeros(n_rows, np.int64)
    self.n_segments = self.slot_steps = self.decided = self.overrun = self.idle = 0

  @property
  def live_R(self) -> np.ndarray:
    """bool [R], True = a rollout sits here."""
    return self.item_R != FREE

  @property
  def n_waiting(self) -> int:
    """Rollouts that no slot has taken up yet."""
    return len(self.work) - self._next

  @property
  def done(self) -> bool:
    """Whether nothing decodes and nothing waits."""
    return not self.n_waiting and not self.live_R.any()

  @property
  def longest(self) -> int:
    """Age of the oldest live row, in tokens; 0 where none lives."""
    return int(self.age_R[self.live_R].max(initial=0))

  def refill(self) -> None:
    """Seats waiting rollouts in free slots, in the emptiest shard first."""
    live_SR = self.live_R.reshape(self._n_shards, -1)
    n_live_S = live_SR.sum(axis=1)
    while self.n_waiting and n_live_S.min() < live_SR.shape[1]:
      shard = int(n_live_S.argmin())
      row = int(live_SR[shard].argmin())
      slot = shard * live_SR.shape[1] + row
      self.item_R[slot], self.age_R[slot] = self._next, 0
      self._next += 1
      live_SR[shard, row] = True
      n_live_S[shard] += 1

  def shrink(self) -> np.ndarray | None:
    """Moves to the next smaller bucket, once the queue is empty, if that holds the live rows; call it again.

    Returns:
      int32 [shards, rows to keep], indices within each shard; None where nothing changes.
    """
    live_SR = self.live_R.reshape(self._n_shards, -1)
    n_kept = max((n for n in self._buckets if n < live_SR.shape[1]), default=0)
    if self.n_waiting or int(live_SR.sum(axis=1).max()) > n_kept:
      return None
    # A stable order keeps the live rows first and as they were.
    local_SR = np.sort(np.argsort(~live_SR, axis=1, kind="stable")[:, :n_kept], axis=1)
    global_R = (local_SR + np.arange(self._n_shards)[:, None] * live_SR.shape[1]).reshape(-1)
    self.item_R, self.age_R = self.item_R[global_R], self.age_R[global_R]
    return local_SR.astype(np.int32)

  def table(self, key_2N: np.ndarray) -> np.ndarray:
    """int32 [8, R], the rows as `sampler.decode` takes them.

    Args:
      key_2N: int32 [2, n], `sampler.row_keys` of the work.
    """
    work, live_R = self.work, self.live_R
    item_R = np.where(live_R, self.item_R, 0)
    return np.stack([
        work.query[item_R], work.subgroup[item_R], np.where(live_R, self.age_R, 0), work.limit[item_R],
        work.stop[item_R], live_R, *key_2N[:, item_R]]).astype(np.int32)

  def advance(self, n_new_R: np.ndarray, ended_R: np.ndarray) -> np.ndarray:
    """Books a segment.

    Args:
      n_new_R: int [R], tokens decided.
      ended_R: bool [R], whether the last of them ends the response.
    Returns:
      int [n], the slots whose rollouts are complete; `item_R` names these until `release`.
    """
    live_R, n_steps = self.live_R, int(n_new_R.max(initial=0))
    self.n_segments += 1
    self.slot_steps += n_steps * len(live_R)
    self.decided += int(n_new_R[live_R].sum())
    self.overrun += int((n_steps - n_new_R[live_R]).sum())
    self.idle += n_steps * int((~live_R).sum())
    self.age_R[live_R] += n_new_R[live_R]
    limit_R = self.work.limit[np.where(live_R, self.item_R, 0)]
    return np.flatnonzero(live_R & (ended_R | (self.age_R >= limit_R)))

  def release(self, slots: np.ndarray) -> None:
    """Frees the slots."""
    self.item_R[slots] = FREE
