"""One token per row from logits: temperature, top-k, top-p, by inverse CDF."""

import chex
from flax import struct
import jax
import jax.numpy as jnp

BLOCK = 128  # Vocabulary entries per block of the two-level CDF.
CANDIDATES = 128  # Likeliest tokens among which top-k and top-p look first; nearly always enough.
MAX_EOS = 16  # Slots for end-of-sequence ids; a fixed size, so that another EOS set compiles nothing.


@struct.dataclass
class Sampling:
  """How tokens are drawn: inputs of the sampler, not compile-time constants, but for `filtered`.

  temperature: float32 [], >= 0; 0 takes the likeliest token, with log-probability 0.
  top_p: float32 [], in (0, 1]; 1 turns it off.
  top_k: int32 [], 0 turns it off.
  eos_ids: int32 [MAX_EOS], ids that end a response, padded with -1.
  filtered: whether top_p or top_k may be on; static, because the sort behind them takes long to compile.
  """
  temperature: jax.Array
  top_p: jax.Array
  top_k: jax.Array
  eos_ids: jax.Array
  filtered: bool = struct.field(pytree_node=False)


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
      filtered=top_p < 1 or top_k > 0,
  )


def filter_logits(logits_RV: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
  """Logits with -inf outside the top-k tokens and, of those, outside the nucleus, by a full sort.

  The nucleus is the smallest set of likeliest tokens whose probability, renormalised after top-k, reaches
  top_p. Tokens tied with the last one kept are kept.

  Args:
    logits_RV: float32 [R, V], already divided by the temperature.
    top_p: float32 [].
    top_k: int32 [], 0 turns it off.
  Returns:
    float32 [R, V].
  """
  sorted_RV = -jnp.sort(-logits_RV, axis=-1)
  total_R = jnp.exp(logits_RV - sorted_RV[:, :1]).sum(-1)
  threshold_R = _threshold(sorted_RV, total_R, top_p, top_k)
  return jnp.where(logits_RV >= threshold_R[:, None], logits_RV, -jnp.inf)


def _threshold(sorted_RM: jax.Array, total_R: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
  """float32 [R], the least logit kept, of the likeliest M logits in descending order.

  Args:
    total_R: sum over the whole vocabulary of exp(logit - the greatest logit); used where top-k is off.
  """
  M = sorted_RM.shape[-1]
  in_top_k_M = (jnp.arange(M) < top_k) | (top_k == 0)
  weight_RM = jnp.where(in_top_k_M, jnp.exp(sorted_RM - sorted_RM[:, :1]), 0.0)
  normaliser_R = jnp.where(top_k == 0, total_R, weight_RM.sum(-1))
  mass_before_RM = jnp.cumsum(weight_RM, axis=-1) - weight_RM
  kept_RM = in_top_k_M & (mass_before_RM < top_p * normaliser_R[:, None])
  return jnp.min(jnp.where(kept_RM, sorted_RM, jnp.inf), axis=-1)


def inverse_cdf(uniform_R: jax.Array, weight_RV: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The token at which the running sum of the weights passes `uniform` times their total.

  A sum over blocks finds the block, a sum within it the token, so no [R, V] running sum is made.

  Args:
    uniform_R: float32 [R], in [0, 1).
    weight_RV: float32 [R, V], at least 0, a positive total.
  Returns:
    (int32 [R], always of a token with positive weight; float32 [R], the total of the weights).
  """
  R, V = weight_RV.shape
  n_blocks = -(-V // BLOCK)
  weight = jnp.pad(weight_RV, ((0, 0), (0, n_blocks * BLOCK - V))).reshape(R, n_blocks, BLOCK)
  block_sum = weight.sum(-1)
  block_cdf = jnp.cumsum(block_sum, axis=-1)
  target_R = uniform_R * block_cdf[:, -1]
  block_R = _first_above(block_cdf, block_sum, target_R)
  before_R = jnp.take_along_axis(block_cdf - block_sum, block_R[:, None], axis=1, mode="clip")[:, 0]
  inside = jnp.take_along_axis(weight, block_R[:, None, None], axis=1, mode="clip")[:, 0]
  token_R = _first_above(jnp.cumsum(inside, axis=-1), inside, target_R - before_R)
  return block_R * BLOCK + token_R, block_cdf[:, -1]


def _first_above(cdf: jax.Array, weight: jax.Array, target_R: jax.Array) -> jax.Array:
  """First index with cdf > target; rounding may leave none, then the last index of positive weight."""
  index = jnp.sum(cdf <= target_R[:, None], axis=-1, dtype=jnp.int32)
  size = cdf.shape[-1]
  last_positive = size - 1 - jnp.argmax((weight > 0)[:, ::-1], axis=-1).astype(jnp.int32)
  first_positive = jnp.argmax(weight > 0, axis=-1).astype(jnp.int32)
  return jnp.clip(index, first_positive, last_positive)


def draw(uniform_R: jax.Array, logits_RV: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
  """One token per row, and its log-probability under the distribution it was drawn from.

  Without a filter, by the inverse CDF of all tokens. With one, by that of the filtered CANDIDATES likeliest tokens; the
  rows whose filter may reach beyond these are sorted as a whole. A row's result does not depend on its neighbours.

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
  top_R1 = scaled_RV.max(-1, keepdims=True)
  # Greedily, only the likeliest are left, and of equals the first is taken.
  scaled_RV = jnp.where(greedy & (scaled_RV < top_R1), -jnp.inf, scaled_RV)
  uniform_R = jnp.where(greedy, 0.0, uniform_R)
  if sampling.filtered:
    token_R, logp_R = _draw_filtered(uniform_R, scaled_RV, top_R1, sampling.top_p, sampling.top_k)
  else:
    token_R, logp_R = _draw_all(uniform_R, scaled_RV, top_R1)
  return token_R, jnp.where(greedy, 0.0, logp_R)


def _draw_all(uniform_R: jax.Array, scaled_RV: jax.Array, top_R1: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`draw` from all tokens whose logit is finite."""
  token_R, total_R = inverse_cdf(uniform_R, jnp.exp(scaled_RV - top_R1))
  chosen_R = jnp.take_along_axis(scaled_RV, token_R[:, None], axis=-1, mode="clip")[:, 0]
  return token_R, chosen_R - top_R1[:, 0] - jnp.log(total_R)


def _draw_filtered(
    uniform_R: jax.Array, scaled_RV: jax.Array, top_R1: jax.Array, top_p: jax.Array, top_k: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """`draw` under top-k and top-p."""
  V = scaled_RV.shape[-1]
  total_R = jnp.exp(scaled_RV - top_R1).sum(-1)
  best_RM, index_RM = jax.lax.top_k(scaled_RV, min(CANDIDATES, V))
  threshold_R = _threshold(best_RM, total_R, top_p, top_k)
  # A token as likely as the last candidate may lie outside; with a larger top-k, so does part of what it renormalises.
  exact_R = ((threshold_R > best_RM[:, -1]) & (top_k <= CANDIDATES)) | (CANDIDATES >= V)
  kept_RM = jnp.where(best_RM >= threshold_R[:, None], best_RM, -jnp.inf)
  place_R, logp_R = _draw_all(uniform_R, kept_RM, top_R1)
  token_R = jnp.take_along_axis(index_RM, place_R[:, None], axis=-1, mode="clip")[:, 0].astype(jnp.int32)

  def sort():
    sorted_token_R, sorted_logp_R = _draw_all(uniform_R, filter_logits(scaled_RV, top_p, top_k), top_R1)
    return jnp.where(exact_R, token_R, sorted_token_R), jnp.where(exact_R, logp_R, sorted_logp_R)

  return jax.lax.cond(exact_R.all(), lambda: (token_R, logp_R), sort)


def token_logp(logits_RV: jax.Array, token_R: jax.Array) -> jax.Array:
  """Log-probability of each row's token: its logit minus the log-sum-exp. float32 [R]."""
  chosen_R = jnp.take_along_axis(logits_RV, token_R[:, None], axis=-1, mode="clip")[:, 0]
  return chosen_R - jax.nn.logsumexp(logits_RV, axis=-1)
