"""The assumed decoding against the real engine on the same lengths."""

import dataclasses

import jax
import numpy as np
import pytest

from hbpo_jax.config import LearnerConfig
from hbpo_jax.learning import packing
from hbpo_jax.planning import decoding
from hbpo_jax.rollout import schedule
from hbpo_jax.structs import Rollouts
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


@pytest.mark.parametrize("n_devices", [1, 8])
def test_micro_batches_are_those_that_packing_fills(n_devices):
  job = make_job(make_cfg(learner=LearnerConfig(minibatches=2, microbatch_rows=8)), n_devices=n_devices)
  prompts, rng = tiny.make_prompts(), np.random.default_rng(0)
  n_BGJ = rng.integers(3, np.array(job.shape.widths)[None, :, None] + 1, (8, 2, 4))
  per_group = lambda dtype: tuple(np.zeros((8, 4, width), dtype) for width in job.shape.widths)
  rollouts = Rollouts(
      tokens=per_group(np.int32), completion_mask=per_group(bool), logp_sampler=per_group(np.float32),
      n_tokens_BGJ=n_BGJ, n_gen_BGJ=n_BGJ, truncated_BGJ=n_BGJ < 0)
  batch, share = packing.pack(
      prompts, rollouts, np.ones((8, 2, 4)), n_minibatches=2, micro_rows=8, shards=job.shards,
      share_prompts=job.shares_prompts)
  length_BN = (prompts.n_prompt_B[:, None, None] + n_BGJ).reshape(8, 8)
  counted = decoding.micro_batches(job, length_BN, prompts.n_prompt_B)
  assert counted * 8 * job.n_columns == round((batch.segment_RT != 0).sum() / share)
  assert batch.tokens_RT.shape == (2 * job.minibatch_rows, job.n_columns)
  assert batch.completion_mask_RC.shape == (2 * job.minibatch_rows, job.n_targets)
  planned = job.batch(2 * job.minibatch_rows, scored=False)
  assert planned.segment_RT.shape == batch.segment_RT.shape
  simulated = decoding.simulate(job, mean_tokens=None, mean_prompt=5)
  assert 0.4 < simulated.real_share <= 1 and 2 <= simulated.n_micro <= 2 * job.most_micro_batches


def test_without_packing_every_row_is_computed():
  job = make_job(make_cfg(learner=LearnerConfig(minibatches=2, microbatch_rows=8, pack=False)))
  made = decoding.simulate(job, mean_tokens=None, mean_prompt=5)
  assert (made.n_micro, job.n_targets) == (8, 14)
  # 5 of the prompt, 2 or 3 of the sentence, and what was sampled, of 24 columns.
  assert made.real_share == pytest.approx((5 + 2.5 + made.mean_tokens) / 24)


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
