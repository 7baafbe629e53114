"""A tiny engine with every mechanism at work: refill, several length and prompt buckets, compaction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hbpo_jax import config, structs
from hbpo_jax.models import architecture, decoder, sharding
from hbpo_jax.rollout import engine, plain, sampling

ARCH = architecture.Architecture(
    family="qwen2", n_layers=2, hidden_size=32, mlp_size=64, n_heads=4, n_kv_heads=2, head_size=8, vocab_size=61,
    rope_theta=10000.0, rope_scaling=None, rms_eps=1e-6, tie_embeddings=False, qkv_bias=True, qk_norm=False,
    max_context=256)
EOS = (3, 4, 5)  # Three of 61 tokens end a response, so that lengths vary.
B, P, J, CAPS, N_PREFIX = 8, 10, 4, (8, 14), (2, 3)
# 64 rollouts in 16 slots; at most 6 and 11 sampled tokens in segments of 2. (14: where the prefix is not counted.)
CFG = config.RolloutConfig(slots=16, segment_steps=2, length_buckets=(4, 14))


def make_mesh(n_devices=1):
  return sharding.make_mesh(config.MeshConfig(), jax.devices()[:n_devices])


def make_params(mesh, seed=0):
  params = decoder.init(ARCH, jax.random.key(seed), jnp.float32)
  return jax.device_put(params, sharding.param_shardings(ARCH, mesh))


def make_shape(**changes):
  settings = dict(
      n_queries=B, n_prompt_slots=P, n_rollouts=J, caps=CAPS, n_prefix=N_PREFIX, count_prefix=True,
      prefix_has_loss=True)
  return engine.Shape(**(settings | changes))


def make_engine(mesh, temperature=1.0, eos=EOS, cfg=CFG, dtype="float32", top_p=1.0, top_k=0, **changes):
  return engine.Engine(
      ARCH, mesh, make_shape(**changes), sampling.make_sampling(temperature, top_p, top_k, eos), compute_dtype=dtype,
      cfg=cfg)


def make_prompts(seed=0):
  rng = np.random.default_rng(seed)
  n_prompt = rng.integers(1, P + 1, B).astype(np.int32)
  n_prompt[0] = P  # Whatever the seed, the longest prompt fills the slots.
  return structs.Prompts(
      tokens_BP=rng.integers(6, 61, (B, P)).astype(np.int32), n_prompt_B=n_prompt,
      prefix_GF=np.array([[7, 8, 0], [9, 10, 11]], np.int32), n_prefix_G=np.array(N_PREFIX, np.int32),
      query_B=np.arange(B, dtype=np.int32))


def plain_rollouts(params, prompts, key, temperature=1.0, shape=None, **draws):
  """What the plain sampler makes of the same inputs, on the host."""
  shape = shape or make_shape()
  prefix = np.array(shape.n_prefix, np.int32)
  limits = plain.Limits(
      max_tokens_G=np.array(shape.widths, np.int32), counted_prefix_G=prefix * shape.count_prefix,
      context_prefix_G=prefix * (not shape.prefix_has_loss))
  setting = sampling.make_sampling(temperature, draws.get("top_p", 1.0), draws.get("top_k", 0), EOS)
  return jax.device_get(_plain()(params, prompts, limits, setting, key, widths=shape.widths))


@functools.lru_cache
def _plain():
  return jax.jit(
      functools.partial(plain.generate, arch=ARCH, n_rollouts=J, compute_dtype=jnp.float32),
      static_argnames="widths")


def rows(groups):
  return np.asarray(structs.groups_to_rows(groups, max(g.shape[-1] for g in groups)))
