"""The assumed decoding against the real engine on the same lengths."""

import dataclasses

import jax
import numpy as np
import pytest

from hbpo_jax.planning import decoding
from hbpo_jax.rollout import schedule
from tests.planning.tiny_jobs import make_cfg, make_job
from tests.rollout import tiny

NEVER = (61,)  # Beyond the vocabulary, so that no response ends by itself.


@pytest.mark.parametrize("n_devices", [1, 8])
def test_segments_and_slot_steps_are_the_engines(n_devices):
  mesh = tiny.make_mesh(n_devices)
  made = tiny.make_engine(mesh, eos=NEVER)
  shape = made.shape
  rng = np.random.default_rng(0)
  stop_BGJ = rng.integers(1, np.array(shape.sampled)[None, :, None] + 1, (shape.n_queries, 2, shape.n_rollouts))
  params = made.publish(tiny.make_params(mesh))
  generation = made.start(params, tiny.make_prompts(), jax.random.key(0), stop_BGJ=stop_BGJ)
  for _ in generation:
    pass
  work = schedule.largest_limit_first(shape.sampled, shape.n_queries, shape.n_rollouts)
  length_N = stop_BGJ[work.query, work.subgroup, work.rollout].astype(np.int64)
  counted = decoding.run(shape, made.plan, made.n_shards, work, length_N, 5, False)
  ledger = generation.ledger
  assert (counted.n_segments, counted.row_steps) == (ledger.n_segments, ledger.slot_steps)
  assert counted.n_tokens == ledger.useful + ledger.truncated


def test_lengths_follow_the_assumption():
  job = make_job(make_cfg(rollout=dataclasses.replace(
      make_cfg().rollout, queries=64, budgets=(500, 1000), caps=(4000, 4000), length_buckets=(4000,)),
      reward=dataclasses.replace(make_cfg().reward, max_response_tokens=4000)))
  budgets = decoding.simulate(job, mean_tokens=None, mean_prompt=5)
  assert budgets.mean_tokens == pytest.approx(750, rel=0.1), "each budget's own mean"
  given = decoding.simulate(job, mean_tokens=1500.0, mean_prompt=5)
  assert given.mean_tokens == pytest.approx(1500, rel=0.1) and given.truncated < 0.1
  long = decoding.simulate(job, mean_tokens=20000.0, mean_prompt=5)
  assert long.truncated > 0.95 and long.mean_tokens > 3900
  assert budgets.n_steps < given.n_steps < long.n_steps
  assert budgets == decoding.simulate(job, mean_tokens=None, mean_prompt=5), "the same numbers again"


def test_longer_prompts_are_read_in_every_step():
  job = make_job()
  args = (job.shape, job.plan, 1)
  work = schedule.largest_limit_first(job.shape.sampled, 8, 4)
  length_N = np.full(len(work), 6)
  short, long = (decoding.run(*args, work, length_N, n, True) for n in (5, 505))
  assert long.column_steps - short.column_steps == 256 * 64 * 6, "a block more for each token of each row"
  whole = decoding.run(*args, work, length_N, 5, False)
  # 16 slots, 4 times 6 tokens; contexts of 10 + 3 columns in whole segments of 2, a bucket of 14, the segment.
  assert whole.column_steps == 16 * 24 * (14 + 14 + 2)
