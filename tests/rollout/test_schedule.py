"""The host's side of decoding: the order of the queue, refill, compaction and the books. And the lists of buckets."""

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from hbpo_jax.rollout import buckets, schedule


def make_work(limits=(3, 5), n_queries=2, n_rollouts=2):
  return schedule.largest_limit_first(limits, n_queries, n_rollouts)


def test_the_largest_limit_comes_first_and_then_the_larger_budget():
  work = make_work(limits=(3, 5, 5))
  assert work.subgroup.tolist() == [2] * 4 + [1] * 4 + [0] * 4
  assert work.limit.tolist() == [5] * 8 + [3] * 4
  assert list(zip(work.query[:4].tolist(), work.rollout[:4].tolist())) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_work_may_leave_rollouts_out_and_limit_single_queries():
  wanted = np.zeros((2, 2, 2), bool)
  wanted[1, 0, 1] = wanted[0, 1, 0] = wanted[1, 1, 1] = True
  work = schedule.largest_limit_first(
      (3, 5), 2, 2, wanted_BGJ=wanted, limit_BG=np.array([[9, 9], [2, 4]]), stop_BGJ=np.arange(8).reshape(2, 2, 2))
  found = zip(*(x.tolist() for x in (work.query, work.subgroup, work.rollout, work.limit, work.stop)))
  assert list(found) == [(0, 1, 0, 5, 2), (1, 1, 1, 4, 7), (1, 0, 1, 2, 5)]


def test_refill_seats_the_emptiest_shard_first():
  sched = schedule.Schedule(make_work(), 2, (2, 1))
  sched.refill()
  assert sched.item_R.tolist() == [0, 2, 1, 3] and sched.n_waiting == 4
  sched.release(np.array([2, 3]))
  sched.refill()
  assert sched.item_R.tolist() == [0, 2, 4, 5] and sched.age_R.tolist() == [0, 0, 0, 0]


def test_books_of_a_segment():
  sched = schedule.Schedule(make_work(), 1, (4,))
  sched.refill()
  sched.release(np.array([3]))
  sched._next = 8  # nothing waits, so that slot 3 stays empty
  complete = sched.advance(np.array([4, 2, 4, 0]), np.array([False, True, False, False]))
  assert complete.tolist() == [1]
  assert (sched.slot_steps, sched.decided, sched.overrun, sched.idle) == (16, 10, 2, 4)
  assert sched.advance(np.array([1, 0, 1, 0]), np.zeros(4, bool)).tolist() == [0, 2], "the limit of 5 is reached"


def test_shrink_keeps_the_live_rows_in_order():
  sched = schedule.Schedule(make_work(), 2, (4, 2, 1))
  assert sched.shrink() is None, "rollouts wait"
  sched.refill()
  assert sched.shrink() is None, "every slot is taken"
  sched.age_R[:] = np.arange(8)
  kept = {int(item): int(age) for item, age in zip(sched.item_R[[1, 3, 6]], sched.age_R[[1, 3, 6]], strict=True)}
  sched.release(np.array([0, 2, 4, 5, 7]))
  np.testing.assert_array_equal(sched.shrink(), [[1, 3], [0, 2]])
  assert sched.shrink() is None, "one row a shard does not hold two"
  assert {int(i): int(a) for i, a in zip(sched.item_R, sched.age_R, strict=True) if i != schedule.FREE} == kept


@hypothesis.given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**32 - 1))
@hypothesis.settings(deadline=None, max_examples=60)
def test_every_rollout_is_served_once_and_the_ledger_adds_up(n, n_shards, rows, seed):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, 30, n)
  work = schedule.Work(*np.zeros((3, n), np.int32), np.full(n, 20, np.int32), np.full(n, 99, np.int32))
  sched = schedule.Schedule(work, n_shards, buckets.row_buckets(rows))
  sched.refill()
  served, steps = [], 7
  while not sched.done:
    left_R = np.where(sched.live_R, np.minimum(lengths, 20)[sched.item_R] - sched.age_R, 0)
    n_new_R = np.minimum(left_R, steps)
    ended_R = sched.live_R & (n_new_R == left_R) & (lengths[sched.item_R] <= 20)
    complete = sched.advance(n_new_R, ended_R)
    served += sched.item_R[complete].tolist()
    sched.release(complete)
    sched.refill()
    while not sched.done and sched.shrink() is not None:
      pass
  assert sorted(served) == list(range(n))
  assert sched.decided == np.minimum(lengths, 20).sum()
  assert sched.slot_steps == sched.decided + sched.overrun + sched.idle


@pytest.mark.parametrize("longest,steps,expected", [
    (4087, 64, (128, 256, 512, 1024, 2048, 4096)), (256, 8, (64, 128, 256)),
    (2944, 32, (64, 128, 256, 512, 1024, 2048, 2944)), (64, 8, (64,)), (5, 8, (8,)), (65, 8, (64, 72)),
])  # fmt: skip
def test_length_buckets(longest, steps, expected):
  assert buckets.length_buckets(longest, steps) == expected


def test_other_buckets():
  assert [buckets.segment_steps(n) for n in (5, 256, 1024, 4087, 32768)] == [8, 8, 16, 64, 64]
  assert buckets.prompt_buckets(1024) == (128, 256, 512, 1024)
  assert buckets.prompt_buckets(40) == (40,) and buckets.prompt_buckets(100) == (50, 100)
  assert [buckets.row_buckets(n) for n in (64, 16, 3, 2, 1)] == [(64, 32, 16, 8, 4), (16, 8, 4, 2), (3, 2), (2,), (1,)]
  assert [buckets.smallest((4, 8), n) for n in (0, 4, 5, 8)] == [0, 0, 1, 1]
