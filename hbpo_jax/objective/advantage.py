"""Advantages of responses: against their budget's baseline, and against the query's other responses."""

import math
from typing import Any

import chex
from flax import struct
import jax
import jax.numpy as jnp

from hbpo_jax.config import AdvantageConfig

FORMS = ("group", "leave_one_out", "reference")
INTRA_FORMS = ("baseline", "within")
INTRA_BASELINES = ("budget", "correct_length")
INTRA_SCALES = ("none", "std")
INTRA_GATES = ("none", "solved", "rate")


@struct.dataclass
class Advantage:
  """Advantages of one batch of rollouts, float.

  intra_BG: [B, G], A_intra after all that is configured, before its coefficient; 0 where there is no baseline. With
    intra_form=within, its mean over the subgroup: 0 but for rounding.
  inter_BGJ: [B, G, J], A_inter; sums to 0 over a query (not with form=reference); exactly 0 where a query's rewards
    are all equal.
  total_BGJ: [B, G, J], intra_coef * A_intra + A_inter.
  """
  intra_BG: jax.Array
  inter_BGJ: jax.Array
  total_BGJ: jax.Array


def compute(
    reward_BGJ: Any, baseline_G: Any, *, cfg: AdvantageConfig, solve_rate_B: Any = None, thinks_BGJ: Any = None,
) -> Advantage:
  """Both advantages of every response and their sum.

      A_intra_i  = mean_j R_ij - f2(b_i)             (minus its mean over i, if center_intra)
      A_inter_ij = (R_ij - mean R) / (std R + eps)   over the query's N = G * J responses
      A_ij       = intra_coef * A_intra_i + A_inter_ij

  Other forms of A_inter:

      leave_one_out   R_ij - mean of the query's N - 1 other R
      reference       R_ij - mean of the R of the query's responses that think (of all, where none does)

  What else may be done to A_intra, in this order:

      intra_form=within    (R_ij - mean_j R_ij) / (std_j R_ij + eps) in its place; exactly 0 where R_ij = R_i1
      center_intra         minus its mean over i
      intra_scale=std      divided by std R + eps; exactly 0 where the query's rewards are all equal
      intra_clip=c         clipped to [-c, c]
      intra_gate=solved    times 1(the query has a correct response)
      intra_gate=rate      times the query's solve rate

  Args:
    reward_BGJ: float [B, G, J].
    baseline_G: float [G], `reward.baseline`, or [B, 1], `reward.expected`; None for the reward forms that have none.
    cfg: the advantage's settings.
    solve_rate_B: float [B], mean score of each query; needed for intra_gate.
    thinks_BGJ: bool [B, G, J], which responses think; needed for form=reference.
  Returns:
    An Advantage, all finite for finite rewards.
  Raises:
    ValueError: when there is no baseline but intra_coef is not 0, std_ddof is neither 0 nor 1, or what the settings
      need is missing.
  Source: Section 3.3; std_ddof and std_eps are the release's, which also adds A_intra twice (intra_coef 2).
    leave_one_out: arXiv 2502.04463; reference: arXiv 2505.13417; the changes of A_intra are ours.
  """
  if cfg.std_ddof not in (0, 1):
    raise ValueError(f"advantage.std_ddof={cfg.std_ddof!r} is not a choice; give 0 or 1.")
  if baseline_G is None and cfg.intra_coef != 0 and cfg.intra_form == "baseline":
    raise ValueError(
        f"advantage.intra_coef={cfg.intra_coef!r} needs a budget baseline; set it to 0 "
        "or choose reward.form 'piecewise' or 'min'.")
  reward_BGJ = jnp.asarray(reward_BGJ)
  reward_BGJ = reward_BGJ.astype(jnp.result_type(float, reward_BGJ.dtype))
  chex.assert_rank(reward_BGJ, 3)

  shift_BGJ, std_B11 = _centred(reward_BGJ, (1, 2), cfg.std_ddof)
  inter_BGJ = _over_std(shift_BGJ, std_B11, cfg.std_eps)
  if cfg.form == "leave_one_out":
    n = reward_BGJ.shape[1] * reward_BGJ.shape[2]
    inter_BGJ = shift_BGJ * (n / max(n - 1, 1))
  elif cfg.form == "reference":
    inter_BGJ = _over_reference(shift_BGJ, thinks_BGJ)
  elif cfg.form != "group":
    raise ValueError(f"advantage.form={cfg.form!r} does not exist; choose one of {FORMS}.")

  if cfg.intra_form == "within":
    intra_BGJ = _over_std(*_centred(reward_BGJ, (2,), cfg.std_ddof), cfg.std_eps)
    intra_BGJ = _changed(intra_BGJ, std_B11, solve_rate_B, cfg)
    intra_BG = jnp.mean(intra_BGJ, axis=2)
    return Advantage(intra_BG=intra_BG, inter_BGJ=inter_BGJ, total_BGJ=cfg.intra_coef * intra_BGJ + inter_BGJ)
  intra_BG = _intra(reward_BGJ, baseline_G, cfg)
  intra_BG = _changed(intra_BG[:, :, None], std_B11, solve_rate_B, cfg)[:, :, 0]
  total_BGJ = cfg.intra_coef * intra_BG[:, :, None] + inter_BGJ
  return Advantage(intra_BG=intra_BG, inter_BGJ=inter_BGJ, total_BGJ=total_BGJ)


def _centred(reward_BGJ: jax.Array, axes: tuple[int, ...], ddof: int) -> tuple[jax.Array, jax.Array]:
  """(rewards minus their mean over the axes, their standard deviation), the latter with axes of length 1."""
  # Differences to one of the own rewards come first: equal rewards then give exact zeros, where a
  # rounded mean would leave a residue for the tiny std to blow up.
  first = reward_BGJ[:, :, :1] if axes == (2,) else reward_BGJ[:, :1, :1]
  shift_BGJ = reward_BGJ - first
  shift_BGJ = shift_BGJ - jnp.mean(shift_BGJ, axis=axes, keepdims=True)
  n = math.prod(reward_BGJ.shape[axis] for axis in axes)
  return shift_BGJ, jnp.sqrt(jnp.sum(jnp.square(shift_BGJ), axis=axes, keepdims=True) / max(n - ddof, 1))


def _over_std(values: jax.Array, std: jax.Array, eps: float) -> jax.Array:
  """values / (std + eps), and exactly 0 where the standard deviation is 0."""
  varies = std > 0
  return jnp.where(varies, values / jnp.where(varies, std + eps, 1.0), 0.0)


def _over_reference(shift_BGJ: jax.Array, thinks_BGJ: Any) -> jax.Array:
  if thinks_BGJ is None:
    raise ValueError("advantage.form='reference' needs to know which responses think; pass thinks_BGJ.")
  thinks_BGJ = jnp.asarray(thinks_BGJ, bool)
  chex.assert_equal_shape([shift_BGJ, thinks_BGJ])
  counts_BGJ = thinks_BGJ | ~jnp.any(thinks_BGJ, axis=(1, 2), keepdims=True)
  mean_B11 = jnp.mean(shift_BGJ, axis=(1, 2), keepdims=True, where=counts_BGJ)
  return shift_BGJ - mean_B11


def _changed(intra_BGX: jax.Array, std_B11: jax.Array, solve_rate_B: Any, cfg: AdvantageConfig) -> jax.Array:
  """A_intra scaled, clipped and gated; X is J or 1."""
  if cfg.intra_scale == "std":
    intra_BGX = _over_std(intra_BGX, std_B11, cfg.std_eps)
  if cfg.intra_clip is not None:
    intra_BGX = jnp.clip(intra_BGX, -cfg.intra_clip, cfg.intra_clip)
  if cfg.intra_gate == "none":
    return intra_BGX
  if solve_rate_B is None:
    raise ValueError(f"advantage.intra_gate={cfg.intra_gate!r} needs the solve rates; pass solve_rate_B.")
  rate_B11 = jnp.asarray(solve_rate_B).astype(intra_BGX.dtype)[:, None, None]
  return intra_BGX * ((rate_B11 > 0) if cfg.intra_gate == "solved" else rate_B11)


def _intra(reward_BGJ: jax.Array, baseline_G: Any, cfg: AdvantageConfig) -> jax.Array:
  if baseline_G is None:
    return jnp.zeros_like(reward_BGJ[:, :, 0])
  baseline_G = jnp.asarray(baseline_G).astype(reward_BGJ.dtype)
  B, G = reward_BGJ.shape[:2]
  chex.assert_shape(baseline_G, (B, 1) if baseline_G.ndim == 2 else (G,))
  # The mean of differences, for the same reason: a subgroup that earns its baseline has A_intra exactly 0.
  intra_BG = jnp.mean(reward_BGJ - baseline_G[..., None], axis=2)
  return intra_BG - jnp.mean(intra_BG, axis=1, keepdims=True) if cfg.center_intra else intra_BG
