"""The sampler: what it returns, what it must not depend on, and its agreement with the trainer's forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hbpo_jax import config, structs
from hbpo_jax.models import architecture, decoder, sharding
from hbpo_jax.rollout import engine, sampling

ARCH = architecture.Architecture(
    family="qwen2", n_layers=2, hidden_size=32, mlp_size=64, n_heads=4, n_kv_heads=2, head_size=8, vocab_size=61,
    rope_theta=10000.0, rope_scaling=None, rms_eps=1e-6, tie_embeddings=False, qkv_bias=True, qk_norm=False,
    max_context=256)
EOS = (3, 4, 5)  # Three of 61 tokens end a response, so that lengths vary.
P, J, CAPS = 10, 4, (8, 14)


def make_mesh(n_devices=1):
  return sharding.make_mesh(config.MeshConfig(), jax.devices()[:n_devices])


def make_params(mesh, seed=0):
  params = decoder.init(ARCH, jax.random.key(seed), jnp.float32)
  return jax.device_put(params, sharding.param_shardings(ARCH, mesh))


def make_shape(**changes):
  settings = dict(n_rollouts=J, caps=CAPS, n_prefix=(2, 3), count_prefix=True, prefix_has_loss=True)
  return engine.Shape(**(settings | changes))


def make_engine(mesh, temperature=1.0, eos=EOS, **changes):
  return engine.Engine(
      ARCH, mesh, make_shape(**changes), sampling.make_sampling(temperature, 1.0, 0, eos), compute_dtype="float32")


def make_prompts(B=8, seed=0):
  rng = np.random.default_rng(seed)
  n_prompt = rng.integers(1, P + 1, B).astype(np.int32)
  return structs.Prompts(
      tokens_BP=rng.integers(6, 61, (B, P)).astype(np.int32), n_prompt_B=n_prompt,
      prefix_GF=np.array([[7, 8, 0], [9, 10, 11]], np.int32), n_prefix_G=np.array([2, 3], np.int32),
      query_B=np.arange(B, dtype=np.int32))


@pytest.fixture(scope="module")
def run():
  mesh = make_mesh()
  params = make_params(mesh)
  prompts = make_prompts()
  eng = make_engine(mesh)
  return params, prompts, eng, engine.fetch(eng.generate(params, prompts, jax.random.key(1)))


def rows(groups):
  return np.asarray(structs.groups_to_rows(groups, max(CAPS)))


def test_shapes_are_the_subgroups_caps(run):
  rollouts = run[-1]
  assert [t.shape for t in rollouts.tokens] == [(8, J, cap) for cap in CAPS]
  assert rollouts.n_gen_BGJ.shape == rollouts.truncated_BGJ.shape == (8, 2, J)


def test_responses_open_with_their_prefix_and_end_with_eos_or_at_the_cap(run):
  rollouts = run[-1]
  finished = 0
  for g, (prefix, cap) in enumerate([((7, 8), 8), ((9, 10, 11), 14)]):
    for b, j in np.ndindex(8, J):
      n = rollouts.n_tokens_BGJ[b, g, j]
      real = rollouts.tokens[g][b, j, :n]
      assert tuple(real[: len(prefix)]) == prefix
      assert not set(real[:-1]) & set(EOS), "nothing follows an EOS"
      if rollouts.truncated_BGJ[b, g, j]:
        assert n == cap and real[-1] not in EOS
      else:
        assert real[-1] in EOS
        finished += 1
      assert rollouts.n_gen_BGJ[b, g, j] == n
      np.testing.assert_array_equal(rollouts.completion_mask[g][b, j], np.arange(cap) < n)
  assert 8 < finished < 8 * 2 * J, "the test must see both finished and truncated responses"


def test_forced_eos_in_a_prefix_does_not_finish_a_response():
  mesh = make_mesh()
  prompts = make_prompts().replace(prefix_GF=np.array([[3, 8, 0], [9, 4, 11]], np.int32))
  rollouts = engine.fetch(make_engine(mesh).generate(make_params(mesh), prompts, jax.random.key(1)))
  assert np.all(rollouts.n_tokens_BGJ[:, 0] > 2) and np.all(rollouts.n_tokens_BGJ[:, 1] > 3)


@pytest.mark.parametrize("count,action", [(False, True), (True, False), (False, False)])
def test_prefix_roles(run, count, action):
  params, prompts, _, counted = run
  eng = make_engine(make_mesh(), count_prefix=count, prefix_has_loss=action)
  got = engine.fetch(eng.generate(params, prompts, jax.random.key(1)))
  for g, n_prefix in enumerate((2, 3)):
    uncounted = 0 if count else n_prefix
    assert got.tokens[g].shape[-1] == CAPS[g] + uncounted
    np.testing.assert_array_equal(got.n_gen_BGJ[:, g], got.n_tokens_BGJ[:, g] - uncounted)
    assert got.n_gen_BGJ[:, g].max() <= CAPS[g]
    slot = np.arange(CAPS[g] + uncounted)
    expected = (slot < got.n_tokens_BGJ[:, g, :, None]) & (slot >= (0 if action else n_prefix))
    np.testing.assert_array_equal(got.completion_mask[g], expected)
    # The same tokens, whatever the prefix counts as, up to the shorter cap.
    np.testing.assert_array_equal(got.tokens[g][..., : CAPS[g]], counted.tokens[g])


def test_log_probabilities_agree_with_the_trainers(run):
  params, prompts, _, rollouts = run
  batch = structs.make_batch(prompts, rollouts)
  hidden = decoder.forward(
      params, ARCH, batch.tokens_RT, batch.segment_RT, batch.position_RT, compute_dtype=jnp.float32, remat="none")
  logp = jax.nn.log_softmax(decoder.logits(params, ARCH, hidden))[:, P - 1 : -1]
  trainer = jnp.take_along_axis(logp, batch.tokens_RT[:, P:, None], axis=-1)[..., 0]
  mask = np.asarray(batch.completion_mask_RC)
  np.testing.assert_allclose(np.asarray(trainer)[mask], rows(rollouts.logp_sampler)[mask], atol=1e-4)
  assert np.all(rows(rollouts.logp_sampler)[~mask] == 0)


def test_a_rollout_depends_on_its_identity_only(run):
  params, prompts, eng, rollouts = run
  order = np.array([5, 0, 7, 2, 1, 6, 3, 4])
  moved = prompts.replace(
      tokens_BP=prompts.tokens_BP[order], n_prompt_B=prompts.n_prompt_B[order], query_B=prompts.query_B[order])
  got = engine.fetch(eng.generate(params, moved, jax.random.key(1)))
  for g in range(2):
    np.testing.assert_array_equal(got.tokens[g], rollouts.tokens[g][order])
    np.testing.assert_array_equal(got.logp_sampler[g], rollouts.logp_sampler[g][order])

  neighbours = make_prompts(seed=9)
  alone = neighbours.replace(
      tokens_BP=np.concatenate([prompts.tokens_BP[:1], neighbours.tokens_BP[1:]]),
      n_prompt_B=np.concatenate([prompts.n_prompt_B[:1], neighbours.n_prompt_B[1:]]))
  got = engine.fetch(eng.generate(params, alone, jax.random.key(1)))
  for g in range(2):
    np.testing.assert_array_equal(got.tokens[g][0], rollouts.tokens[g][0])
    np.testing.assert_array_equal(got.logp_sampler[g][0], rollouts.logp_sampler[g][0])


def test_padding_ids_of_the_prompt_do_not_matter(run):
  params, prompts, eng, rollouts = run
  padding = np.arange(P) < P - prompts.n_prompt_B[:, None]
  other = prompts.replace(tokens_BP=np.where(padding, EOS[0], prompts.tokens_BP))
  got = engine.fetch(eng.generate(params, other, jax.random.key(1)))
  np.testing.assert_array_equal(rows(got.tokens), rows(rollouts.tokens))


def test_steps_and_rollouts_draw_differently(run):
  params, prompts, eng, rollouts = run
  again = engine.fetch(eng.generate(params, prompts, jax.random.key(1)))
  other = engine.fetch(eng.generate(params, prompts, jax.random.key(2)))
  np.testing.assert_array_equal(rows(again.tokens), rows(rollouts.tokens))
  assert (rows(other.tokens) != rows(rollouts.tokens)).any(axis=1).mean() > 0.9
  first = rollouts.tokens[1].reshape(-1, CAPS[1])
  assert len({tuple(row) for row in first}) > 0.9 * len(first), "rollouts of a query must differ"


def test_new_settings_compile_nothing():
  mesh = make_mesh()
  params, prompts = make_params(mesh), make_prompts()
  eng = make_engine(mesh)
  eng.generate(params, prompts, jax.random.key(0)).n_gen_BGJ.block_until_ready()
  for temperature, eos in [(0.5, (3,)), (0.0, (3, 9, 11, 12))]:
    eng._sampling = sampling.make_sampling(temperature, 0.9, 5, eos)
    eng.generate(params, make_prompts(seed=3), jax.random.key(4)).n_gen_BGJ.block_until_ready()
  assert eng._generate._cache_size() == 1


def test_eight_devices_give_the_same_rollouts(run):
  _, prompts, _, rollouts = run
  mesh = make_mesh(8)
  sharded = make_engine(mesh)
  got = engine.fetch(sharded.generate(make_params(mesh), prompts, jax.random.key(1)))
  same = (rows(got.tokens) == rows(rollouts.tokens)).all(axis=1)
  assert same.mean() >= 0.95
  np.testing.assert_allclose(
      rows(got.logp_sampler)[same], rows(rollouts.logp_sampler)[same], atol=1e-4)


def test_publish_casts_once_and_passes_through():
  mesh = make_mesh()
  params = make_params(mesh)
  eng = make_engine(mesh)
  assert eng.publish(params) is params
  low = engine.Engine(ARCH, mesh, make_shape(), sampling.make_sampling(1.0, 1.0, 0, EOS), compute_dtype="bfloat16")
  assert {w.dtype for w in jax.tree.leaves(low.publish(params))} == {jnp.dtype("bfloat16")}


def test_a_cap_without_room_for_the_sentence_is_refused():
  with pytest.raises(ValueError, match=r"cap of 3 tokens.*budget_sentence"):
    make_shape(caps=(3, 14), n_prefix=(3, 3))
