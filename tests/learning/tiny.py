"""A tiny learner and random batches for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hbpo_jax.config import Config, LearnerConfig, LossConfig, MeshConfig, ModelConfig, OptimizerConfig
from hbpo_jax.learning.learner import Learner
from hbpo_jax.models import decoder, sharding
from hbpo_jax.models.architecture import Architecture
from hbpo_jax.structs import Batch

ARCH = Architecture(
    family="qwen2", n_layers=2, hidden_size=32, mlp_size=48, n_heads=4, n_kv_heads=2, head_size=8, vocab_size=61,
    rope_theta=10000.0, rope_scaling=None, rms_eps=1e-6, tie_embeddings=True, qkv_bias=True, qk_norm=False,
    max_context=128)
ROWS, P, C = 32, 5, 9


def make_cfg(*, loss=None, optimizer=None, learner=None, **changes):
  return Config(**dict(
      steps=10, model=ModelConfig(compute_dtype="float32"), loss=LossConfig(**(loss or {})),
      optimizer=OptimizerConfig(**({"learning_rate": 1e-3} | (optimizer or {}))),
      learner=LearnerConfig(**({"minibatches": 2, "logprob_chunk": 16} | (learner or {})))) | changes)


def make_mesh(n_devices=1, **sizes):
  return sharding.make_mesh(MeshConfig(**sizes), jax.devices()[:n_devices])


def make_learner(n_devices=1, arch=ARCH, mesh_sizes=None, **changes):
  """A Learner; the same one for the same settings, so that tests share what it has compiled."""
  return _learner(arch, make_cfg(**changes), n_devices, tuple(sorted((mesh_sizes or {}).items())))


@functools.lru_cache
def _learner(arch, cfg, n_devices, mesh_sizes):
  return Learner(arch, cfg, make_mesh(n_devices, **dict(mesh_sizes)))


def make_params(learner, seed=0):
  """The same numbers on any mesh."""
  return jax.device_put(decoder.init(learner.arch, jax.random.key(seed), jnp.float32), learner.param_shardings)


def make_batch(seed=0, rows=ROWS, P=P, C=C):
  """Rows of random prompt and completion lengths with everything that a loss may ask for, on the host."""
  rng = np.random.default_rng(seed)
  n_prompt, n_tokens = rng.integers(1, P + 1, rows), rng.integers(1, C + 1, rows)
  column = np.arange(P + C)
  real = (column >= (P - n_prompt)[:, None]) & (column < (P + n_tokens)[:, None])
  logp = np.where(real[:, P:], -rng.exponential(4.0, (rows, C)), 0).astype(np.float32)

  def noise():
    return np.where(real[:, P:], rng.normal(0, 0.2, (rows, C)), 0).astype(np.float32)

  return Batch(
      tokens_RT=np.where(real, rng.integers(0, ARCH.vocab_size, (rows, P + C)), 0).astype(np.int32),
      segment_RT=real.astype(np.int32),
      position_RT=np.where(real, column - (P - n_prompt)[:, None], 0).astype(np.int32),
      completion_mask_RC=real[:, P:], advantage_RC=rng.normal(size=(rows, 1)).astype(np.float32),
      logp_old_RC=logp, logp_ref_RC=logp + noise(), logp_sampler_RC=logp + noise())


def with_own_logps(learner, params, batch, seed=0):
  """The batch with pi_old near the policy of `params`, so that ratios are neither 1 nor wild."""
  logp = np.asarray(learner.score(params, batch))
  rng = np.random.default_rng(seed)

  def noise():
    return np.where(batch.completion_mask_RC, rng.normal(0, 0.2, logp.shape), 0).astype(np.float32)

  return batch.replace(logp_old_RC=logp + noise(), logp_ref_RC=logp + noise(), logp_sampler_RC=logp + noise())


def host(tree):
  """The tree as NumPy arrays of their own memory."""
  return jax.tree.map(lambda x: np.array(jax.device_get(x)), tree)


def assert_trees_close(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), host(a), host(b))


def assert_trees_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, host(a), host(b))


