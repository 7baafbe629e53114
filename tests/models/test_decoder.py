"""The decoder against transformers, against itself in other shapes, and on other meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from hbpo_jax.config import MeshConfig
from hbpo_jax.models import architecture, attention, decoder, presets, sharding, weights
from tests.checkpoints import make_checkpoint

CASES = {
    "qwen2": dict(family="qwen2", tie=False),
    "qwen2_tied_linear": dict(family="qwen2", tie=True, rope={"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}),
    "qwen3": dict(family="qwen3", tie=False, head_size=32, rope={"rope_type": "default", "rope_theta": 1e6}),
    "qwen3_tied": dict(family="qwen3", tie=True),
    "llama3": dict(family="llama", tie=False),
    "llama3_tied": dict(family="llama", tie=True, n_kv_heads=4),
}
forward = jax.jit(decoder.forward, static_argnames=("arch", "compute_dtype", "remat"))
prefill = jax.jit(decoder.prefill, static_argnames=("arch", "compute_dtype"))
step = jax.jit(decoder.decode_step, static_argnames=("arch", "compute_dtype"), donate_argnames=("cache",))
logits = jax.jit(decoder.logits, static_argnames=("arch",))


@functools.lru_cache
def one_device():
  return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """(directory, arch, params on one device) of a case, made once."""
  made = {}

  def get(case):
    if case not in made:
      directory = make_checkpoint(tmp_path_factory.mktemp(case), **CASES[case])
      arch = architecture.from_hf_config(directory)
      made[case] = directory, arch, weights.load(directory, arch, one_device(), param_dtype="float32")
    return made[case]

  return get


def rows(n_real, width, vocab=512, seed=0):
  """Left-padded random rows: tokens, segment, position, each int32 [R, width]."""
  n_real = np.asarray(n_real)
  column = np.arange(width)
  real = column >= (width - n_real)[:, None]
  tokens = np.random.default_rng(seed).integers(0, vocab, real.shape)
  position = np.where(real, column - (width - n_real)[:, None], 0)
  return tokens.astype(np.int32), real.astype(np.int32), position.astype(np.int32)


@pytest.mark.parametrize("case", CASES)
def test_logits_match_transformers(case, checkpoint):
  directory, arch, params = checkpoint(case)
  model = transformers.AutoModelForCausalLM.from_pretrained(directory)
  tokens, segment, position = rows([160, 160], 160)
  with torch.no_grad():
    expected = model(torch.tensor(tokens.astype(np.int64))).logits.numpy()
  hidden = forward(params, arch, tokens, segment, position, compute_dtype="float32")
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(logits(params, arch, hidden), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["qwen2", "qwen3_tied", "llama3"])
def test_greedy_tokens_match_transformers(case, checkpoint):
  directory, arch, params = checkpoint(case)
  model = transformers.AutoModelForCausalLM.from_pretrained(directory)
  B, P, S = 3, 12, 16
  tokens, segment, position = rows([12, 5, 9], P)
  with torch.no_grad():
    expected = model.generate(
        torch.tensor(tokens.astype(np.int64)), attention_mask=torch.tensor(segment.astype(np.int64)), do_sample=False,
        max_new_tokens=S, min_new_tokens=S, eos_token_id=None, pad_token_id=0)[:, P:].numpy()
  hidden, prompt_cache = prefill(params, arch, tokens, segment, position, compute_dtype="float32")
  hidden = hidden[:, None]
  cache = decoder.new_cache(arch, B, 1, S, "float32")
  chosen = []
  for slot in range(S):
    token = jnp.argmax(logits(params, arch, hidden), axis=-1).astype(jnp.int32)
    chosen.append(np.asarray(token[:, 0]))
    hidden, cache = step(params, arch, token, segment.sum(1)[:, None] + slot, prompt_cache, segment == 1, cache,
                         np.int32(slot), compute_dtype="float32")
  np.testing.assert_array_equal(np.stack(chosen, axis=1), expected)


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "llama3"])
def test_decoding_equals_forward(case, checkpoint):
  _, arch, params = checkpoint(case)
  B, N, P, S = 3, 2, 9, 6
  n_prompt = np.array([9, 1, 5])
  tokens, segment, position = rows(np.repeat(n_prompt + S, N), P + S)
  tokens = tokens.reshape(B, N, -1)
  tokens[:, :, :P] = tokens[:, :1, :P]
  full = forward(params, arch, tokens.reshape(B * N, -1), segment, position, compute_dtype="float32")
  full = np.asarray(full).reshape(B, N, P + S, -1)
  mask = segment[::N, :P] == 1
  hidden, prompt_cache = prefill(params, arch, tokens[:, 0, :P], segment[::N, :P], position[::N, :P],
                                 compute_dtype="float32")
  assert prompt_cache.k.shape == (arch.n_layers, B, arch.n_kv_heads, P, arch.head_size)
  np.testing.assert_allclose(hidden, full[:, 0, P - 1], atol=1e-5)
  # Slots not yet written must not matter: fill them with something large.
  cache = jax.tree.map(lambda x: x + 1e3, decoder.new_cache(arch, B, N, S, "float32"))
  for slot in range(S):
    hidden, cache = step(params, arch, tokens[:, :, P + slot], n_prompt[:, None] + slot, prompt_cache, mask, cache,
                         np.int32(slot), compute_dtype="float32")
    np.testing.assert_allclose(hidden, full[:, :, P + slot], atol=1e-5)


def test_left_padding_and_other_segments_change_nothing(checkpoint):
  _, arch, params = checkpoint("qwen3")
  tokens, segment, position = rows([10], 10)
  plain = forward(params, arch, tokens, segment, position, compute_dtype="float32")[0]
  # The same row behind padding, and between the tokens of another segment.
  packed_tokens, _, _ = rows([24], 24, seed=1)
  packed_tokens[0, 9:19] = tokens[0]
  segment = np.array([[0] * 5 + [1] * 4 + [2] * 10 + [3] * 5], np.int32)
  position = np.array([[0] * 5 + list(range(4)) + list(range(10)) + list(range(5))], np.int32)
  packed = forward(params, arch, packed_tokens, segment, position, compute_dtype="float32")[0]
  np.testing.assert_allclose(packed[9:19], plain, atol=1e-5)
  shifted = forward(params, arch, packed_tokens, np.where(segment == 2, 1, 0), position, compute_dtype="float32")[0]
  np.testing.assert_allclose(shifted[9:19], plain, atol=1e-5)


def test_attention_mask_drawn_by_hand():
  segment = jnp.array([[0, 1, 1, 2, 2]])
  same = jnp.ones((1, 5, 1, 2))  # equal scores: each output is the mean of the values it sees
  value = jnp.arange(5.0)[None, :, None, None] * jnp.ones((1, 5, 1, 2))
  out = attention.attend(same, same, value, segment)[0, :, 0, 0]
  np.testing.assert_allclose(out[1:], [1, 1.5, 3, 3.5], rtol=1e-6)
  assert np.isfinite(out[0])


@functools.partial(jax.jit, static_argnames=("arch", "compute_dtype", "remat"))
def loss_and_grad(params, arch, tokens, segment, position, compute_dtype="float32", remat="none"):
  def loss(params):
    hidden = decoder.forward(params, arch, tokens, segment, position, compute_dtype=compute_dtype, remat=remat)
    score = jax.nn.log_softmax(decoder.logits(params, arch, hidden[:, :-1]))
    chosen = jnp.take_along_axis(score, tokens[:, 1:, None], axis=-1)[..., 0]
    weight = segment[:, :-1] * segment[:, 1:]
    return -(chosen * weight).sum() / weight.sum()

  return jax.value_and_grad(loss)(params)


def test_gradients_are_finite_with_an_empty_row_and_equal_under_every_remat(checkpoint):
  _, arch, params = checkpoint("qwen2")
  batch = rows([12, 0, 5], 12)
  loss, grad = loss_and_grad(params, arch, *batch)
  assert all(bool(jnp.isfinite(g).all()) and bool((g != 0).any()) for g in jax.tree.leaves(grad))
  for remat in ("dots", "full", "offload"):
    other_loss, other_grad = loss_and_grad(params, arch, *batch, remat=remat)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), other_grad, grad)
  with pytest.raises(ValueError, match=r"model\.remat='most'"):
    decoder.forward(params, arch, *batch, remat="most")


@pytest.mark.parametrize("case", ["qwen2", "qwen3_tied"])
def test_bfloat16_is_near_float32_and_casting_weights_ahead_changes_nothing(case, checkpoint):
  _, arch, params = checkpoint(case)
  batch = rows([20, 7], 20)
  exact = forward(params, arch, *batch, compute_dtype="float32")
  rough = forward(params, arch, *batch, compute_dtype="bfloat16")
  assert rough.dtype == jnp.bfloat16 and decoder.logits(params, arch, rough).dtype == jnp.float32
  real = batch[1] == 1
  gap = np.abs(np.asarray(rough, np.float32) - np.asarray(exact))[real]
  assert 1e-3 < gap.mean() < 0.03
  cast = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
  np.testing.assert_array_equal(np.asarray(forward(cast, arch, *batch, compute_dtype="bfloat16"))[real],
                                np.asarray(rough)[real])


@pytest.mark.parametrize("mesh_cfg, ambient", [
    (MeshConfig(fsdp=4, tensor=2), True), (MeshConfig(data=2, fsdp=1, tensor=4), False)], ids=str)
def test_eight_devices_give_the_losses_and_gradients_of_one(mesh_cfg, ambient, checkpoint):
  directory, arch, params = checkpoint("qwen2")
  batch = rows([12, 0, 5, 12, 7, 9, 3, 2], 12)
  loss, grad = loss_and_grad(params, arch, *batch)
  mesh = sharding.make_mesh(mesh_cfg)
  sharded = weights.load(directory, arch, mesh, param_dtype="float32")
  assert jax.tree.map(lambda x: x.sharding, sharded) == sharding.param_shardings(arch, mesh)
  placed = jax.device_put(batch, sharding.batch_sharding(mesh, 2))
  if ambient:
    with jax.set_mesh(mesh):
      other_loss, other_grad = loss_and_grad(sharded, arch, *placed)
  else:
    other_loss, other_grad = loss_and_grad(sharded, arch, *placed)
  np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5), other_grad, grad)


def test_init_is_reproducible_and_of_unit_scale():
  arch = presets.preset("tiny_qwen2")
  make = jax.jit(decoder.init, static_argnums=(0, 2))
  params = make(arch, jax.random.key(3), jnp.float32)
  jax.tree.map(np.testing.assert_array_equal, params, make(arch, jax.random.key(3), jnp.float32))
  assert not np.array_equal(params["embed"], make(arch, jax.random.key(4), jnp.float32)["embed"])
  np.testing.assert_allclose(np.std(params["layers"]["gate"]), 64**-0.5, rtol=0.05)
  batch = rows([16], 16)
  scores = logits(params, arch, forward(params, arch, *batch, compute_dtype="float32"))
  assert 0.5 < np.std(scores) < 2
