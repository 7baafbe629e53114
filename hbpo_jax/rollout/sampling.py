"""One token per row from logits: temperature, top-k, top-p, by inverse CDF."""

import chex
from flax import struct
import jax
import jax.numpy as jnp

BLOCK = 128  # Vocabulary entries per block of the two-level CDF.
MAX_EOS = 16  # Slots for end-of-sequence ids; a fixed size, so that another EOS set compiles nothing.


@struct.dataclass
class Sampling:
  """How tokens are drawn: inputs of the sampler, never compile-time constants.

  temperature: float32 [], >= 0; 0 takes the likeliest token, with log-probability 0.
  top_p: float32 [], in (0, 1]; 1 turns it off.
  top_k: int32 [], 0 turns it off.
  eos_ids: int32 [MAX_EOS], ids that end a response, padded with -1.
  """
  temperature: jax.Array
  top_p: jax.Array
  top_k: jax.Array
  eos_ids: jax.Array


def make_sampling(temperature: float, top_p: float, top_k: int, eos_ids: tuple[int, ...]) -> Sampling:
  """The Sampling of plain numbers.

  Raises:
    ValueError: when there is no EOS id or there are more than MAX_EOS.
  """
  if not 1 <= len(eos_ids) <= MAX_EOS:
    raise ValueError(f"eos_ids={eos_ids!r} holds {len(eos_ids)} ids; give between 1 and {MAX_EOS}.")
  return Sampling(
      temperature=jnp.float32(temperature),
      top_p=jnp.float32(top_p),
      top_k=jnp.int32(top_k),
      eos_ids=jnp.array(list(eos_ids) + [-1] * (MAX_EOS - len(eos_ids)), jnp.int32),
  )


def filter_logits(logits_RV: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
  """Logits with -inf outside the top-k tokens and, of those, outside the nucleus.

  The nucleus is the smallest set of likeliest tokens whose probability, renormalised after top-k, reaches
  top_p. Tokens tied with the last one kept are kept. The sort runs only when a filter is on.

  Args:
    logits_RV: float32 [R, V], already divided by the temperature.
    top_p: float32 [].
    top_k: int32 [].
  Returns:
    float32 [R, V].
  """
  V = logits_RV.shape[-1]

  def cut(logits_RV):
    sorted_RV = -jnp.sort(-logits_RV, axis=-1)
    n_kept = jnp.where(top_k > 0, jnp.minimum(top_k, V), V)
    in_top_k_V = jnp.arange(V) < n_kept
    prob_RV = jax.nn.softmax(jnp.where(in_top_k_V, sorted_RV, -jnp.inf), axis=-1)
    mass_before_RV = jnp.cumsum(prob_RV, axis=-1) - prob_RV
    kept_RV = in_top_k_V & (mass_before_RV < top_p)
    threshold_R1 = jnp.min(jnp.where(kept_RV, sorted_RV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_RV >= threshold_R1, logits_RV, -jnp.inf)

  return jax.lax.cond((top_p < 1) | (top_k > 0), cut, lambda x: x, logits_RV)


def inverse_cdf(uniform_R: jax.Array, weight_RV: jax.Array) -> jax.Array:
  """The token at which the running sum of the weights passes `uniform` times their total.

  A sum over blocks finds the block, a sum within it the token, so no [R, V] running sum is made.

  Args:
    uniform_R: float32 [R], in [0, 1).
    weight_RV: float32 [R, V], at least 0, a positive total.
  Returns:
    int32 [R], always of a token with positive weight.
  """
  R, V = weight_RV.shape
  n_blocks = -(-V // BLOCK)
  weight = jnp.pad(weight_RV, ((0, 0), (0, n_blocks * BLOCK - V))).reshape(R, n_blocks, BLOCK)
  block_sum = weight.sum(-1)
  block_cdf = jnp.cumsum(block_sum, axis=-1)
  target_R = uniform_R * block_cdf[:, -1]
  block_R = _first_above(block_cdf, block_sum, target_R)
  before_R = jnp.take_along_axis(block_cdf - block_sum, block_R[:, None], axis=1)[:, 0]
  inside = jnp.take_along_axis(weight, block_R[:, None, None], axis=1)[:, 0]
  token_R = _first_above(jnp.cumsum(inside, axis=-1), inside, target_R - before_R)
  return block_R * BLOCK + token_R


def _first_above(cdf: jax.Array, weight: jax.Array, target_R: jax.Array) -> jax.Array:
  """First index with cdf > target; rounding may leave none, then the last index of positive weight."""
  index = jnp.sum(cdf <= target_R[:, None], axis=-1, dtype=jnp.int32)
  size = cdf.shape[-1]
  last_positive = size - 1 - jnp.argmax((weight > 0)[:, ::-1], axis=-1).astype(jnp.int32)
  first_positive = jnp.argmax(weight > 0, axis=-1).astype(jnp.int32)
  return jnp.clip(index, first_positive, last_positive)


def draw(uniform_R: jax.Array, logits_RV: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
  """One token per row, and its log-probability under the distribution it was drawn from.

  Args:
    uniform_R: float32 [R], in [0, 1), one number per row.
    logits_RV: float32 [R, V].
    sampling: temperature, top_p and top_k apply in this order: temperature, top-k, top-p.
  Returns:
    int32 [R] tokens; float32 [R] log-probabilities (0 at temperature 0).
  """
  chex.assert_rank([uniform_R, logits_RV], [1, 2])
  greedy = sampling.temperature <= 0
  scaled_RV = logits_RV / jnp.where(greedy, 1.0, sampling.temperature)
  scaled_RV = filter_logits(scaled_RV, sampling.top_p, sampling.top_k)
  weight_RV = jnp.exp(scaled_RV - scaled_RV.max(-1, keepdims=True))
  drawn_R = inverse_cdf(uniform_R, weight_RV)
  token_R = jnp.where(greedy, jnp.argmax(logits_RV, axis=-1).astype(jnp.int32), drawn_R)
  logp_R = token_logp(scaled_RV, token_R)
  return token_R, jnp.where(greedy, 0.0, logp_R)


def token_logp(logits_RV: jax.Array, token_R: jax.Array) -> jax.Array:
  """Log-probability of each row's token: its logit minus the log-sum-exp. float32 [R]."""
  chosen_R = jnp.take_along_axis(logits_RV, token_R[:, None], axis=-1)[:, 0]
  return chosen_R - jax.nn.logsumexp(logits_RV, axis=-1)
