"""What the compiled programs of scoring and updates hold and compute: counts of the compiler, no clocks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hbpo_jax.learning import learner as learner_lib
from hbpo_jax.learning import packing, scoring
from hbpo_jax.models import decoder
from hbpo_jax.structs import Batch, Prompts, Rollouts
from tests.learning import tiny

V, T = 32768, 128  # So many entries that attention's scores are less than a chunk's logits.
NARROW = dataclasses.replace(tiny.ARCH, hidden_size=8)
CHUNK, MICRO = 32, 2
# What each entry of the vocabulary may cost besides a row of width D: logits of one chunk, and their exponentials.
LOGITS_OF_A_CHUNK = 3


def temporaries(program, *, n_vocab, n_columns, n_rows=8, chunk=CHUNK):
  """Peak bytes of the temporaries of `score` or `update` for packed rows."""
  made = tiny.make_learner(
      arch=dataclasses.replace(NARROW, vocab_size=n_vocab),
      learner=dict(minibatches=1, microbatch_rows=MICRO, logprob_chunk=chunk))
  of = lambda kind, n: jax.ShapeDtypeStruct((n_rows, n), kind)
  forward = (*(of(jnp.int32, n_columns),) * 3, of(jnp.bool_, n_columns - 1))
  losses = dict.fromkeys(("advantage_RC", "logp_sampler_RC"), of(jnp.float32, n_columns - 1))
  with jax.set_mesh(made.mesh):
    if program == "score":
      lowered = made._score.lower(made.abstract_state().params, Batch(*forward), 1.0, None)
    else:
      lowered = made._update.lower(made.abstract_state(), Batch(*forward, **losses), 1.0, None, 0.0)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def per_entry(program, **sizes):
  """Bytes that each further entry of the vocabulary adds, at V entries."""
  return (temporaries(program, n_vocab=2 * V, **sizes) - temporaries(program, n_vocab=V, **sizes)) / V


# Float32 arrays of the head's size: used in the loop; with the gradient, its sums and the optimizer's.
@pytest.mark.parametrize("program, heads", [("score", 1), pytest.param("update", 7, marks=pytest.mark.slow)])
def test_a_vocabulary_costs_one_chunk_of_logits_whatever_the_rows(program, heads):
  found = per_entry(program, n_columns=T)
  at_most = 4 * (LOGITS_OF_A_CHUNK * CHUNK + heads * NARROW.hidden_size)
  assert 4 * CHUNK <= found <= at_most < 4 * MICRO * T, "less than one array of all logits of a micro-batch"
  assert per_entry(program, n_columns=2 * T) == pytest.approx(found, rel=0.02)
  assert per_entry(program, n_columns=T, n_rows=16) == pytest.approx(found, rel=0.02)
  doubled = per_entry(program, n_columns=T, chunk=2 * CHUNK)
  assert 4 * CHUNK <= doubled - found <= 4 * LOGITS_OF_A_CHUNK * CHUNK


B, N, P = 8, 16, 16
# Wide enough that attention is a small part of a token's cost, as it is in a real network; nothing here runs.
WIDE = dataclasses.replace(
    tiny.ARCH, n_layers=1, hidden_size=512, mlp_size=4096, n_heads=4, n_kv_heads=2, head_size=64, vocab_size=512)


CAP = 240


def make_step(length, cap, seed=0):
  """(Prompts, Rollouts, advantage) of responses of `length` tokens on average, log-normal, none above CAP."""
  rng = np.random.default_rng(seed)
  n_BGJ = np.clip(length * np.exp(rng.normal(-0.125, 0.5, (B, 1, N))), 1, CAP).astype(np.int32)
  n_prompt = rng.integers(1, P + 1, B).astype(np.int32)
  real = np.arange(cap) < n_BGJ[:, 0, :, None]
  zero = real.astype(np.float32)
  rollouts = Rollouts(
      (real.astype(np.int32),), (real,), (zero,), n_BGJ, n_BGJ, np.zeros((B, 1, N), bool))
  prompts = Prompts(
      np.ones((B, P), np.int32), n_prompt, np.zeros((1, 1), np.int32), np.zeros(1, np.int32), np.arange(B))
  return prompts, rollouts, np.zeros((B, 1, N), np.float32)


@functools.lru_cache
def micro_batch_flops(n_columns, n_rows):
  """FLOPs of one micro-batch of a row in a compiled gradient; the compiler counts a loop's body once."""
  cfg = tiny.make_cfg(learner=dict(minibatches=1, logprob_chunk=n_columns))
  of = lambda kind, n: jax.ShapeDtypeStruct((n_rows, n), kind)
  batch = Batch(
      *(of(jnp.int32, n_columns),) * 3, of(jnp.bool_, n_columns - 1), advantage_RC=of(jnp.float32, n_columns - 1),
      logp_sampler_RC=of(jnp.float32, n_columns - 1))
  policy = functools.partial(learner_lib.policy_loss, arch=WIDE, cfg=cfg)
  gradient = lambda params, batch: learner_lib.grads(
      lambda p, b, n: policy(p, b, n, 1.0), params, batch, n_micro=n_rows)
  params = jax.eval_shape(lambda key: decoder.init(WIDE, key), jax.random.key(0))
  return jax.jit(gradient).lower(params, batch).compile().cost_analysis()["flops"]


def update_flops(length, cap):
  """(FLOPs of the update's micro-batches that run, real tokens) of a step, packed in rows of its longest response."""
  step = make_step(length, cap)
  batch, _ = packing.pack(*step, n_minibatches=1, micro_rows=1, shards=1)
  rows, n_columns = batch.tokens_RT.shape
  micro = scoring.cut_micro_batches(batch, rows, 1)
  ran = int(scoring.fold_micro_batches(lambda n, i, part: n + 1, jnp.int32(0), micro))
  return ran * micro_batch_flops(n_columns, rows), int((batch.segment_RT != 0).sum())


def test_the_compiler_counts_one_micro_batch():
  n_columns = 128
  weights = 3 * 512 * 4096 + 2 * 512 * (4 + 2) * 64 + 512 * 512  # MLP, attention, head
  assert micro_batch_flops(n_columns, B * N) == pytest.approx(4 * 2 * n_columns * weights, rel=0.1), (
      "forward, again, and the gradients of inputs and weights")


def test_an_update_costs_what_its_tokens_cost():
  flops, tokens = np.array([update_flops(length, CAP) for length in (20, 50, 80, 110, 140)]).T
  slope, start = np.polyfit(tokens, flops, 1)
  left = flops - (slope * tokens + start)
  assert 1 - left.var() / flops.var() > 0.98
  assert abs(start) < 0.1 * flops.max(), "nothing costs where there are no tokens"
  assert flops.max() > 4 * flops.min()


def test_a_longer_cap_costs_nothing():
  flops, tokens = np.array([update_flops(60, cap) for cap in (CAP, 2 * CAP, 4 * CAP)]).T
  assert (tokens == tokens[0]).all()
  # A row for each response would cost more than twice as much each time.
  np.testing.assert_allclose(flops / flops[0], 1, atol=0.15)
  padded = [B * N * micro_batch_flops(P + cap, B * N) for cap in (CAP, 4 * CAP)]
  assert padded[1] > 3.5 * padded[0]
