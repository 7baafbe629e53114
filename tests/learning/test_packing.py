"""Packed rows: every response once with all that belongs to it, and the same loss and gradient as a row for each."""

import collections

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hbpo_jax import structs
from hbpo_jax.config import RolloutConfig
from hbpo_jax.learning import learner as learner_lib
from hbpo_jax.learning import packing, scoring
from hbpo_jax.structs import Prompts, Rollouts
from tests.learning import tiny

B, G, J = 8, 2, 3
P, WIDTHS = 6, (7, 12)


def make_step(seed=0):
  """(Prompts, Rollouts, advantage [B, G, J]) of random lengths, on the host."""
  rng = np.random.default_rng(seed)
  n_prompt = rng.integers(1, P + 1, B)
  prompt = np.where(np.arange(P) >= (P - n_prompt)[:, None], rng.integers(0, 61, (B, P)), 0).astype(np.int32)
  n_tokens = np.stack([rng.integers(1, w + 1, (B, J)) for w in WIDTHS], axis=1).astype(np.int32)
  real = [np.arange(w) < n_tokens[:, g, :, None] for g, w in enumerate(WIDTHS)]
  # Some responses open with a forced token that carries no loss.
  mask = [r & ((np.arange(r.shape[-1]) > 0) | (g == 0)) for g, r in enumerate(real)]
  tokens = tuple(np.where(r, rng.integers(0, 61, r.shape), 99).astype(np.int32) for r in real)
  logp = tuple(np.where(r, rng.normal(-2, 1, r.shape), 0).astype(np.float32) for r in real)
  prefix = np.zeros((G, 1), np.int32)
  return (Prompts(prompt, n_prompt.astype(np.int32), prefix, np.zeros(G, np.int32), np.arange(B, dtype=np.int32)),
          Rollouts(tokens, tuple(mask), logp, n_tokens, n_tokens, np.zeros((B, G, J), bool)),
          rng.normal(size=(B, G, J)).astype(np.float32))


def contents(batch, minibatch=slice(None)):
  """How often each response occurs: (tokens, positions from 0, targets with mask, advantage and sampler's logp)."""
  found = collections.Counter()
  width = batch.tokens_RT.shape[1]
  P = width - batch.completion_mask_RC.shape[1]
  advantage = np.broadcast_to(batch.advantage_RC, batch.completion_mask_RC.shape)
  for r in range(len(batch.tokens_RT))[minibatch]:
    segment = batch.segment_RT[r]
    context = segment if batch.context_RT is None else batch.context_RT[r]
    for number in range(1, segment.max(initial=0) + 1):
      own = np.flatnonzero(segment == number)
      if batch.context_RT is not None and (context[own] == number).all():
        assert not batch.completion_mask_RC[r, own[own >= P] - P].any()
        continue  # a shared part of a prompt
      assert (np.diff(own) == 1).all() and len(set(context[own])) == 1
      shared = np.flatnonzero((segment == context[own[0]]) & (segment != number))
      assert (shared < own[0]).all(), "attention is causal by column"
      columns = np.concatenate([shared, own])
      assert batch.position_RT[r, columns].tolist() == list(range(len(columns)))
      targets = [c - P for c in own if c >= P and batch.completion_mask_RC[r, c - P]]
      assert all(segment[c + P - 1] == number for c in targets), "the column before a target predicts it"
      found[tuple(batch.tokens_RT[r, columns]), tuple(c + P - own[0] + len(shared) for c in targets),
            tuple(advantage[r, targets]), tuple(batch.logp_sampler_RC[r, targets])] += 1
  return found


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("n_minibatches,micro_rows,shards", [(1, 1, 1), (2, 5, 1), (4, 8, 4), (2, 16, 8)])
def test_every_response_is_there_once_with_what_belongs_to_it(n_minibatches, micro_rows, shards, share_prompts):
  step = make_step()
  packed, share = packing.pack(
      *step, n_minibatches=n_minibatches, micro_rows=micro_rows, shards=shards, share_prompts=share_prompts)
  plain = jax.device_get(structs.make_batch(*step))
  per = len(packed.tokens_RT) // n_minibatches
  for m in range(n_minibatches):
    queries = slice(m * B // n_minibatches * G * J, (m + 1) * B // n_minibatches * G * J)
    assert contents(packed, slice(m * per, (m + 1) * per)) == contents(plain, queries)
  assert per % micro_rows == 0 and not packed.completion_mask_RC[packed.segment_RT[:, 1:] == 0].any()
  # What is computed: the micro-batches with a real token, counted by the loop that computes them.
  n_used = 0
  for m in range(n_minibatches):
    rows = jax.tree.map(lambda x, m=m: jnp.asarray(x[m * per:(m + 1) * per]), packed)
    micro = scoring.cut_micro_batches(rows, per // micro_rows, shards)
    n_used += int(scoring.fold_micro_batches(lambda count, i, part: count + 1, jnp.int32(0), micro))
  real = (packed.segment_RT != 0).sum()
  assert share == pytest.approx(real / (n_used * micro_rows * packed.segment_RT.shape[1]))
  assert n_used < n_minibatches * (per // micro_rows) or micro_rows == 16, "nothing was left out"


def test_shards_get_like_numbers_of_tokens():
  packed, _ = packing.pack(*make_step(), n_minibatches=1, micro_rows=4, shards=4)
  tokens = (packed.segment_RT != 0).reshape(4, -1).sum(axis=1)
  assert tokens.max() - tokens.min() <= packed.segment_RT.shape[1]


@given(st.lists(st.lists(st.integers(1, 50), min_size=6, max_size=6), min_size=1, max_size=10), st.integers(50, 120))
@settings(deadline=None, max_examples=60)
def test_first_fit_wastes_little(lengths, width):
  rows = packing.first_fit(lengths, [0] * len(lengths), width)
  indices = lambda row: [(b, n) for b, items in row.items() for n in items]
  assert sorted(i for row in rows for i in indices(row)) == [(b, n) for b in range(len(lengths)) for n in range(6)]
  sums = [sum(lengths[b][n] for b, n in indices(row)) for row in rows]
  assert max(sums) <= width
  # Any two rows together hold more than one row could, or first fit would have joined them.
  assert all(a + b > width for i, a in enumerate(sums) for b in sums[:i])
  assert rows == packing.first_fit(np.array(lengths), np.zeros(len(lengths), int), width)


@given(st.lists(st.lists(st.integers(1, 30), min_size=5, max_size=5), min_size=2, max_size=8),
       st.lists(st.integers(0, 20), min_size=8, max_size=8), st.integers(50, 120))
@settings(deadline=None, max_examples=60)
def test_a_context_is_paid_once_in_a_row(lengths, contexts, width):
  rows = packing.first_fit(lengths, contexts[:len(lengths)], width)
  sums = [sum(contexts[b] + sum(lengths[b][n] for n in items) for b, items in row.items()) for row in rows]
  assert max(sums) <= width
  assert sum(map(sum, lengths)) == sum(lengths[b][n] for row in rows for b, items in row.items() for n in items)
  apart = packing.first_fit([[n + c for n in ns] for ns, c in zip(lengths, contexts)], [0] * len(lengths), width)
  # First fit is no optimum: sharing may cost a row by bad luck, not more.
  assert len(rows) <= len(apart) + 1


def test_items_join_their_own_query_first():
  # The last item of query 0 would fit the first row, too.
  assert packing.first_fit([[8, 1], [9, 1]], [1, 1], 12) == [{1: [0, 1]}, {0: [0, 1]}]


def test_an_item_longer_than_a_row_is_refused():
  with pytest.raises(ValueError, match="an item of 9 tokens does not fit a row of 8"):
    packing.first_fit([[3, 7]], [2], 8)


def test_the_loop_visits_used_micro_batches_only_and_in_order():
  segment = np.zeros((5, 2, 3), np.int32)
  segment[[0, 3, 4], 1, 2] = 1
  micro = structs.Batch(segment, segment, segment, segment[..., 1:] > 0)
  visited = scoring.fold_micro_batches(
      lambda seen, i, part: seen.at[jnp.argmax(seen < 0)].set(i + 10 * part.segment_RT.sum()), jnp.full(6, -1), micro)
  assert visited.tolist() == [10, 13, 14, -1, -1, -1]
  assert scoring.fold_micro_batches(lambda n, i, part: n + 1, 0, jax.tree.map(lambda x: 0 * x, micro)) == 0


SETTINGS = dict(
    loss={"dual_clip": 3.0, "kl_coef": 0.1, "importance_cap": 2.0}, rollout=RolloutConfig(
        queries=B, rollouts_per_query=G * J, budgets=(4, 8)))


def losses(learner, params, batch, moved):
  """((gradient, sums, tokens) of each minibatch, sampler's gap) under a policy that has moved away from pi_old."""
  batch = batch.replace(logp_old_RC=learner.score(params, batch), logp_ref_RC=learner.score(moved, batch))

  def loss_of(params, micro, n_tokens):
    return learner_lib.policy_loss(
        params, micro, n_tokens, 1.0, arch=learner.arch, cfg=learner.cfg, shards=learner.shards)

  @jax.jit
  def grads(params, part):
    n_micro = scoring.count_micro_batches(part.tokens_RT.shape[0], learner.micro_rows, learner.shards)
    return learner_lib.grads(loss_of, params, part, n_micro=n_micro, shards=learner.shards)

  with jax.set_mesh(learner.mesh):
    found = [tiny.host(grads(moved, part)) for part in learner.split_minibatches(batch)]
  return found, tiny.host(learner.sampler_gap(batch))


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("n_devices", [1, 4])
def test_loss_and_gradient_are_those_of_a_row_for_each_response(n_devices, share_prompts):
  step = make_step()
  padded = tiny.make_learner(1, learner={"pack": False}, **SETTINGS)
  packed = tiny.make_learner(n_devices, learner={"pack": True}, **SETTINGS)
  batches = [padded.make_batch(*step)[0], packed.place(packing.pack(
      *step, n_minibatches=2, micro_rows=packed.micro_rows, shards=n_devices, share_prompts=share_prompts)[0])]
  results = [losses(learner, tiny.make_params(learner), batch, tiny.make_params(learner, 1))
             for learner, batch in zip((padded, packed), batches)]
  (expected, gap), (found, packed_gap) = results
  for (gradient, sums, n), (packed_gradient, packed_sums, packed_n) in zip(expected, found, strict=True):
    assert n == packed_n
    tiny.assert_trees_close(packed_sums, sums, rtol=2e-5, atol=2e-5)
    tiny.assert_trees_close(packed_gradient, gradient, rtol=1e-4, atol=2e-6)
  tiny.assert_trees_close(packed_gap, gap, rtol=1e-5, atol=1e-6)


def test_packing_computes_fewer_columns():
  step = make_step()
  shares = {}
  for pack in (False, True):
    _, shares[pack] = tiny.make_learner(learner={"pack": pack}, **SETTINGS).make_batch(*step)
  assert shares[True] > 1.4 * shares[False]


def test_shared_prompts_need_fewer_rows():
  step = make_step()
  tokens = [(packing.pack(*step, n_minibatches=1, micro_rows=1, shards=1, share_prompts=share)[0].segment_RT != 0).sum()
            for share in (False, True)]
  # Each response repeats its prompt's last token; sharing saves the rest of it where two of a query meet.
  assert tokens[1] < tokens[0] - B



@pytest.mark.parametrize("share_prompts", [False, True])
def test_the_weight_of_a_prefix(share_prompts):
  """Forced tokens have their subgroup's mean advantage times the weight of its sign; packed or not."""
  prompts, rollouts, advantage = make_step()
  # One forced token in the first subgroup, where it carries loss; two in the second, of which one does.
  prompts = prompts.replace(prefix_GF=np.zeros((G, 2), np.int32), n_prefix_G=np.array([1, 2], np.int32))
  mean = advantage.mean(axis=2)
  assert (mean > 0).any() and (mean < 0).any()
  plain = structs.make_batch(prompts, rollouts, advantage, (0.25, 0.5))
  expected = np.repeat(advantage.reshape(-1, 1), max(WIDTHS), axis=1)
  for r in range(B * G * J):
    b, g = r // J // G, r // J % G
    expected[r, :(1, 2)[g]] = mean[b, g] * (0.25 if mean[b, g] > 0 else 0.5)
  np.testing.assert_allclose(np.where(plain.completion_mask_RC, plain.advantage_RC, 0),
                             np.where(plain.completion_mask_RC, expected, 0), rtol=1e-6)
  packed, _ = packing.pack(
      prompts, rollouts, advantage, n_minibatches=1, micro_rows=4, shards=1, share_prompts=share_prompts,
      prefix_weights=(0.25, 0.5))
  assert contents(packed) == contents(jax.device_get(plain))
  whole, _ = packing.pack(
      prompts, rollouts, advantage, n_minibatches=1, micro_rows=4, shards=1, share_prompts=share_prompts)
  assert contents(packed) != contents(whole)
  # Which tokens were forced is known in both layouts; of those that carry loss, they are what the weight changes.
  for batch in (jax.device_get(plain), packed):
    assert (batch.forced_RC & batch.completion_mask_RC).sum() == B * J + (rollouts.n_tokens_BGJ[:, 1] > 1).sum()
  changed = np.where(packed.completion_mask_RC, packed.advantage_RC != whole.advantage_RC, False)
  assert changed.any() and (packed.forced_RC | ~changed).all()
