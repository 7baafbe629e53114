"""Advantages of responses: against their budget's baseline, and against the query's other responses."""

from typing import Any

import chex
from flax import struct
import jax
import jax.numpy as jnp

from hbpo_jax.config import AdvantageConfig


@struct.dataclass
class Advantage:
  """Advantages of one batch of rollouts, float.

  intra_BG: [B, G], A_intra after centring (if configured), before its coefficient; 0 where there is no baseline.
  inter_BGJ: [B, G, J], A_inter; sums to 0 over a query; exactly 0 where a query's rewards are all equal.
  total_BGJ: [B, G, J], intra_coef * A_intra + A_inter.
  """
  intra_BG: jax.Array
  inter_BGJ: jax.Array
  total_BGJ: jax.Array


def compute(reward_BGJ: Any, baseline_G: Any, *, cfg: AdvantageConfig) -> Advantage:
  """Both advantages of every response and their sum.

      A_intra_i  = mean_j R_ij - f2(b_i)             (minus its mean over i, if center_intra)
      A_inter_ij = (R_ij - mean R) / (std R + eps)   over the query's N = G * J responses
      A_ij       = intra_coef * A_intra_i + A_inter_ij

  Args:
    reward_BGJ: float [B, G, J].
    baseline_G: float [G], `reward.baseline`; None for the reward forms that have none.
    cfg: the advantage's settings.
  Returns:
    An Advantage, all finite for finite rewards.
  Raises:
    ValueError: when there is no baseline but intra_coef is not 0, or std_ddof is neither 0 nor 1.
  Source: Section 3.3; std_ddof and std_eps are the release's, which also adds A_intra twice (intra_coef 2).
  """
  if cfg.std_ddof not in (0, 1):
    raise ValueError(f"advantage.std_ddof={cfg.std_ddof!r} is not a choice; give 0 or 1.")
  if baseline_G is None and cfg.intra_coef != 0:
    raise ValueError(
        f"advantage.intra_coef={cfg.intra_coef!r} needs a budget baseline; set it to 0 "
        "or choose reward.form 'piecewise' or 'min'.")
  reward_BGJ = jnp.asarray(reward_BGJ)
  reward_BGJ = reward_BGJ.astype(jnp.result_type(float, reward_BGJ.dtype))
  chex.assert_rank(reward_BGJ, 3)
  n = reward_BGJ.shape[1] * reward_BGJ.shape[2]

  # Differences to one of the query's own rewards come first: equal rewards then give exact zeros, where a
  # rounded mean would leave a residue for the tiny std to blow up.
  shift_BGJ = reward_BGJ - reward_BGJ[:, :1, :1]
  shift_BGJ = shift_BGJ - jnp.mean(shift_BGJ, axis=(1, 2), keepdims=True)
  variance_B11 = jnp.sum(jnp.square(shift_BGJ), axis=(1, 2), keepdims=True) / max(n - cfg.std_ddof, 1)
  std_B11 = jnp.sqrt(variance_B11)
  varies_B11 = std_B11 > 0
  inter_BGJ = jnp.where(varies_B11, shift_BGJ / jnp.where(varies_B11, std_B11 + cfg.std_eps, 1.0), 0.0)

  intra_BG = _intra(reward_BGJ, baseline_G, cfg)
  total_BGJ = cfg.intra_coef * intra_BG[:, :, None] + inter_BGJ
  return Advantage(intra_BG=intra_BG, inter_BGJ=inter_BGJ, total_BGJ=total_BGJ)


def _intra(reward_BGJ: jax.Array, baseline_G: Any, cfg: AdvantageConfig) -> jax.Array:
  if baseline_G is None:
    return jnp.zeros_like(reward_BGJ[:, :, 0])
  baseline_G = jnp.asarray(baseline_G).astype(reward_BGJ.dtype)
  chex.assert_shape(baseline_G, (reward_BGJ.shape[1],))
  # The mean of differences, for the same reason: a subgroup that earns its baseline has A_intra exactly 0.
  intra_BG = jnp.mean(reward_BGJ - baseline_G[:, None], axis=2)
  return intra_BG - jnp.mean(intra_BG, axis=1, keepdims=True) if cfg.center_intra else intra_BG
