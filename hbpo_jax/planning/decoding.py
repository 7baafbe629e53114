"""What a step decodes and learns from: the engine's own schedule and the learner's own packing, on assumed lengths."""

import dataclasses
import functools
import math

import numpy as np

from hbpo_jax.learning import packing
from hbpo_jax.models import kernels, slots
from hbpo_jax.planning.job import Job
from hbpo_jax.rollout import buckets, schedule
from hbpo_jax.rollout.shape import Plan, Shape

SPREAD = 0.5  # Standard deviation of the logarithm of the assumed lengths.


@dataclasses.dataclass(frozen=True)
class Decoding:
  """One step under assumed lengths.

  mean_tokens: sampled tokens of a response, on average, after the caps.
  truncated: share of the responses that reach their cap.
  n_tokens: sampled tokens of all responses.
  n_segments, n_steps: segments, and decoding steps in them; every step runs all slots.
  row_steps: slots x steps, over all devices.
  column_steps: cache columns that attention reads, summed over slots and steps, over all devices.
  utilisation: share of row_steps that decided a token.
  n_micro: micro-batches of all updates of the step that are not empty; scoring has as many.
  real_share: share of real tokens in them.
  """
  mean_tokens: float
  truncated: float
  n_tokens: int
  n_segments: int
  n_steps: int
  row_steps: int
  column_steps: int
  utilisation: float
  n_micro: int = 0
  real_share: float = 1.0


def simulate(job: Job, *, mean_tokens: float | None, mean_prompt: int) -> Decoding:
  """Runs the engine's schedule, and packs rows, on lengths from a log-normal distribution.

  Args:
    mean_tokens: mean sampled tokens of a response before its cap, the same for every budget; None = each budget's own.
    mean_prompt: tokens of a prompt.
  """
  means = tuple(float(b) if mean_tokens is None else mean_tokens for b in job.cfg.rollout.budgets)
  made = _simulate(job.shape, job.plan, job.shards, means, mean_prompt, job.layout.decode_kernel != "xla")
  work, _, length_N = _lengths(job.shape, means)
  length_BN = np.zeros((job.shape.n_queries, job.shape.n_responses // job.shape.n_queries), np.int64)
  length_BN[work.query, work.subgroup * job.shape.n_rollouts + work.rollout] = (
      mean_prompt + np.asarray(job.n_prefix)[work.subgroup] + length_N)
  n_micro = micro_batches(job, length_BN, np.full(len(length_BN), mean_prompt))
  computed = n_micro * job.micro_rows * job.shards * job.n_columns
  return dataclasses.replace(made, n_micro=n_micro, real_share=float(length_BN.sum() / computed))


def micro_batches(job: Job, length_BN: np.ndarray, n_prompt_B: np.ndarray) -> int:
  """Micro-batches of a step's updates that hold a token.

  Args:
    length_BN: int64 [B, G * J], tokens of each prompt and response together, at most a row's.
    n_prompt_B: int [B], of its prompt.
  """
  if not job.cfg.learner.pack:
    return job.n_minibatches * job.most_micro_batches
  used = 0
  n_shared_B = n_prompt_B - 1 if job.shares_prompts else np.zeros_like(n_prompt_B)
  own_BN = length_BN - n_shared_B[:, None]
  for part_BN, part_B in zip(np.split(own_BN, job.n_minibatches), np.split(n_shared_B, job.n_minibatches), strict=True):
    rows = packing.first_fit(part_BN, part_B, job.n_columns)
    used += math.ceil(math.ceil(len(rows) / job.shards) / job.micro_rows)
  return used


@functools.lru_cache(maxsize=256)
def _simulate(
    shape: Shape, plan: Plan, n_shards: int, means: tuple[float, ...], mean_prompt: int, is_ragged: bool) -> Decoding:
  work, drawn_N, length_N = _lengths(shape, means)
  made = run(shape, plan, n_shards, work, length_N, mean_prompt, is_ragged)
  return dataclasses.replace(made, truncated=float((drawn_N >= work.limit).mean()))


def _lengths(shape: Shape, means: tuple[float, ...]) -> tuple[schedule.Work, np.ndarray, np.ndarray]:
  """(the responses in queue order, float [n] lengths without caps, int64 [n] sampled tokens)."""
  work = schedule.largest_limit_first(shape.sampled, shape.n_queries, shape.n_rollouts)
  noise = np.random.default_rng(0).normal(-SPREAD**2 / 2, SPREAD, len(work))
  drawn_N = np.asarray(means)[work.subgroup] * np.exp(noise)
  return work, drawn_N, np.clip(np.rint(drawn_N), 1, work.limit).astype(np.int64)


def run(
    shape: Shape, plan: Plan, n_shards: int, work: schedule.Work, length_N: np.ndarray, mean_prompt: int,
    is_ragged: bool) -> Decoding:
  """The decoding of responses of given lengths.

  Args:
    work: the responses in queue order.
    length_N: int64 [n], sampled tokens of each, at least 1.
    mean_prompt: tokens of each prompt.
    is_ragged: whether attention reads only what a row sees, not whole length buckets.
  """
  sched = schedule.Schedule(work, n_shards, [n // n_shards for n in plan.row_buckets])
  context_G = mean_prompt + np.asarray(shape.n_prefix)
  n_context = slots.context_columns(shape.n_prompt_slots, max(shape.n_prefix), plan.segment_steps)
  n_steps = columns = 0
  sched.refill()
  while not sched.done:
    live_R = sched.live_R
    item_R = np.where(live_R, sched.item_R, 0)
    left_R = np.where(live_R, length_N[item_R] - sched.age_R, 0)
    n_new_R = np.minimum(left_R, plan.segment_steps)
    ran = int(n_new_R.max())
    n_steps += ran
    if is_ragged:  # Whole blocks of the context and of what the row sampled, and the running segment.
      in_blocks = lambda n: -(-n // kernels.DECODE_BLOCK) * kernels.DECODE_BLOCK
      seen_R = in_blocks(context_G[work.subgroup[item_R]]) + in_blocks(sched.age_R) + plan.segment_steps
      columns += ran * int(seen_R[live_R].sum())
    else:
      bucket = plan.length_buckets[buckets.smallest(plan.length_buckets, sched.longest + plan.segment_steps)]
      columns += ran * len(live_R) * (n_context + bucket + plan.segment_steps)
    complete = sched.advance(n_new_R, live_R & (left_R <= plan.segment_steps))
    sched.release(complete)
    sched.refill()
    while not sched.done and sched.shrink() is not None:
      pass
  n_tokens = int(length_N.sum())
  return Decoding(
      mean_tokens=float(length_N.mean()), truncated=0.0, n_tokens=n_tokens, n_segments=sched.n_segments,
      n_steps=n_steps, row_steps=sched.slot_steps, column_steps=columns, utilisation=n_tokens / sched.slot_steps)
