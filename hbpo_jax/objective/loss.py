"""The clipped policy loss and the supervised loss, as sums over tokens.

Everything here is a sum (or a maximum), so that micro-batches and devices add up to the same number however the
batch is cut; the one division by the minibatch's token count happens in `mean_metrics` and in the learner.
"""

import math
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from hbpo_jax.config import LossConfig

KL_ESTIMATORS = ("k1", "k2", "k3")
# Bound on log-ratios before exp: e^20 = 5e8 still squares within float32. Only tokens whose probability moved by
# that factor reach it; their gradient is then 0 and the largest ratio is reported in the metrics.
MAX_LOG_RATIO = 20.0


@struct.dataclass
class GapSums:
  """How far the trainer's log-probabilities lie from the sampler's: sums over tokens, [] float32; `largest` a maximum.

  distance: |d|, d = logp_old - logp_sampler.  largest: of |d|.
  kl: exp(d) - 1 - d, the k3 estimate of KL(sampler || trainer).
  outside: tokens with exp(d) outside [1 - clip_low, 1 + clip_high].
  """
  distance: jax.Array
  largest: jax.Array
  kl: jax.Array
  outside: jax.Array

  @classmethod
  def zero(cls) -> "GapSums":
    """The neutral element of `add`."""
    return cls(**dict.fromkeys(cls.__dataclass_fields__, jnp.zeros((), jnp.float32)))

  def add(self, other: "GapSums") -> "GapSums":
    """The sums of both micro-batches together."""
    return jax.tree.map(jnp.add, self, other).replace(largest=jnp.maximum(self.largest, other.largest))

  def metrics(self, n_tokens: jax.Array) -> dict[str, jax.Array]:
    """float32 [] each, over n_tokens: sampler_gap_mean, sampler_gap_max, sampler_kl and sampler_outside_clip."""
    return {
        "sampler_gap_mean": self.distance / n_tokens, "sampler_gap_max": self.largest,
        "sampler_kl": self.kl / n_tokens, "sampler_outside_clip": self.outside / n_tokens}


def gap_sums(logp_old_RC: jax.Array, logp_sampler_RC: jax.Array, mask_RC: jax.Array, cfg: LossConfig) -> GapSums:
  """The GapSums over the tokens of `mask_RC`; all 0 without tokens.

  With top-p or top-k the two distributions differ on purpose. Forced tokens that carry loss count as well, although
  the sampler did not draw them.

  Args:
    logp_old_RC, logp_sampler_RC: float32 [R, C]; values outside the mask are never used.
    mask_RC: bool [R, C].
    cfg: its clip bounds are read.
  """
  old_RC, sampler_RC = (jax.lax.stop_gradient(jnp.where(mask_RC, x, 0.0)) for x in (logp_old_RC, logp_sampler_RC))
  log_ratio_RC = old_RC - sampler_RC
  # The bounds in logarithms: exp would overflow where the two have nothing in common.
  outside_RC = (log_ratio_RC < math.log1p(-cfg.clip_low)) | (log_ratio_RC > math.log1p(cfg.clip_high))
  distance_RC = jnp.abs(log_ratio_RC)
  return GapSums(
      distance=jnp.sum(distance_RC), largest=jnp.max(distance_RC, initial=0.0),
      kl=jnp.sum(kl_estimate(sampler_RC, old_RC, "k3")), outside=jnp.sum(outside_RC, dtype=jnp.float32))


@struct.dataclass
class LossSums:
  """Sums over the tokens that carry loss, [] each in the dtype of logp; `ratio_max` is a maximum.

  loss: what is minimised: policy + kl_coef * kl.
  policy: clipped policy loss.  kl: KL estimate against the reference model.
  clipped_low, clipped_high, dual_clipped: tokens whose gradient that bound removed.
  ratio: pi / pi_old.  ratio_max: its maximum, 0 without tokens.
  approx_kl: k3 estimate of KL(pi_old || pi).
  importance: the truncated weight pi_old / pi_sampler.
  gap: pi_old against pi_sampler, 0 where the sampler's log-probabilities are not given.
  """
  loss: jax.Array
  policy: jax.Array
  kl: jax.Array
  clipped_low: jax.Array
  clipped_high: jax.Array
  dual_clipped: jax.Array
  ratio: jax.Array
  ratio_max: jax.Array
  approx_kl: jax.Array
  importance: jax.Array
  gap: GapSums

  @classmethod
  def zero(cls) -> "LossSums":
    """The neutral element of `add`."""
    values: dict[str, Any] = dict.fromkeys(cls.__dataclass_fields__, jnp.zeros((), jnp.float32))
    values["gap"] = GapSums.zero()
    return cls(**values)

  def add(self, other: "LossSums") -> "LossSums":
    """The sums of both micro-batches together."""
    return jax.tree.map(jnp.add, self, other).replace(
        ratio_max=jnp.maximum(self.ratio_max, other.ratio_max), gap=self.gap.add(other.gap))


def policy_sums(
    logp_RC: jax.Array,
    logp_old_RC: jax.Array | None,
    advantage_RC: jax.Array,
    mask_RC: jax.Array,
    *,
    cfg: LossConfig,
    logp_ref_RC: jax.Array | None = None,
    logp_sampler_RC: jax.Array | None = None,
    forced_RC: jax.Array | None = None,
) -> LossSums:
  """Sums of the clipped policy loss and its metrics over the tokens of `mask_RC`.

  Per token, with r = exp(logp - logp_old) and the response's advantage A:

      policy = -w * min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A)
      policy = -w * max(that min, dual_clip * A)                  for A < 0, if dual_clip is set
      w      = min(exp(logp_old - logp_sampler), importance_cap)  constant, 1 if importance_cap is None
      loss   = policy + kl_coef * kl
      k1 = -d,  k2 = d^2 / 2,  k3 = exp(d) - d - 1                with d = logp_ref - logp

  Forced tokens, which nobody drew, have w = 1. They have a kl like all others, which holds a sentence to the
  probability that the reference gives it, but estimates no divergence there.

  Log-ratios are clamped to +-20 before exp. The gradient is taken of the estimate itself: k1's vanishes in
  expectation on policy, so it reports a KL but hardly applies one.

  Args:
    logp_RC: float32 [R, C], of the policy being trained.
    logp_old_RC: float32 [R, C], of the policy before the step's updates, by the trainer; None where that is the policy
      being trained, in the step's only update: logp itself without its gradient.
    advantage_RC: float32 [R, C], or [R, 1].
    mask_RC: bool [R, C], True = carries loss. Values elsewhere are never used, not even if NaN.
    cfg: the loss's settings.
    logp_ref_RC: float32 [R, C] of the reference model; needed when kl_coef is not 0.
    logp_sampler_RC: float32 [R, C] of the sampler, for the gap; needed when importance_cap is set.
    forced_RC: bool [R, C], True = nobody drew this token; None = all were drawn.
  Returns:
    LossSums; all 0 without tokens.
  Raises:
    ValueError: when an array that the settings need is None, or kl_estimator does not exist.
  Source: Eq. 6; clip bounds of DAPO; dual clip is the release's.
  """
  if cfg.kl_estimator not in KL_ESTIMATORS:
    raise ValueError(f"loss.kl_estimator={cfg.kl_estimator!r} does not exist; choose one of {KL_ESTIMATORS}.")
  logp_RC = jnp.where(mask_RC, logp_RC, 0.0)
  old_RC = jax.lax.stop_gradient(logp_RC) if logp_old_RC is None else jnp.where(mask_RC, logp_old_RC, 0.0)
  log_ratio_RC = _clamp(logp_RC - old_RC)
  ratio_RC = jnp.exp(log_ratio_RC)

  kept_RC, (is_low_RC, is_high_RC, is_dual_RC) = _clip(ratio_RC, advantage_RC, mask_RC, cfg)
  weight_RC = jnp.ones_like(old_RC)
  if cfg.importance_cap is not None:
    if logp_sampler_RC is None:
      raise ValueError(f"loss.importance_cap={cfg.importance_cap!r} needs logp_sampler_RC; keep it in the batch.")
    sampler_RC = jnp.where(mask_RC, logp_sampler_RC, 0.0)
    weight_RC = jax.lax.stop_gradient(jnp.minimum(jnp.exp(_clamp(old_RC - sampler_RC)), cfg.importance_cap))
    weight_RC = weight_RC if forced_RC is None else jnp.where(forced_RC, 1.0, weight_RC)
  policy_RC = -weight_RC * kept_RC * advantage_RC

  kl_RC = jnp.zeros_like(logp_RC)
  if cfg.kl_coef != 0:
    if logp_ref_RC is None:
      raise ValueError(f"loss.kl_coef={cfg.kl_coef!r} needs logp_ref_RC; score the batch with the reference model.")
    kl_RC = kl_estimate(logp_RC, jnp.where(mask_RC, logp_ref_RC, 0.0), cfg.kl_estimator)

  def total(values_RC):
    return jnp.sum(jnp.where(mask_RC, values_RC, 0).astype(logp_RC.dtype))

  policy, kl = total(policy_RC), total(kl_RC)
  fixed = jax.lax.stop_gradient
  return LossSums(
      loss=policy + cfg.kl_coef * kl,
      policy=fixed(policy),
      kl=fixed(kl),
      clipped_low=total(is_low_RC),
      clipped_high=total(is_high_RC),
      dual_clipped=total(is_dual_RC),
      ratio=fixed(total(ratio_RC)),
      ratio_max=fixed(jnp.max(jnp.where(mask_RC, ratio_RC, 0.0), initial=0.0)),
      approx_kl=fixed(total(ratio_RC - 1 - log_ratio_RC)),
      importance=total(weight_RC),
      gap=GapSums.zero() if logp_sampler_RC is None else gap_sums(old_RC, logp_sampler_RC, mask_RC, cfg),
  )


def _clip(ratio_RC: jax.Array, advantage_RC: jax.Array, mask_RC: jax.Array, cfg: LossConfig):
  """The ratio with its bounds put in where they win, and where the low, the high and the dual bound did, [R, C].

  The bound of clip that can win the minimum depends on the sign of the advantage. `where` instead of
  min(r * A, clip(r) * A) gives a kept token its whole gradient: minimum would halve it at ties.
  """
  is_low_RC = mask_RC & (advantage_RC < 0) & (ratio_RC < 1 - cfg.clip_low)
  is_high_RC = mask_RC & (advantage_RC > 0) & (ratio_RC > 1 + cfg.clip_high)
  kept_RC = jnp.where(is_low_RC, 1 - cfg.clip_low, jnp.where(is_high_RC, 1 + cfg.clip_high, ratio_RC))
  is_dual_RC = jnp.zeros_like(mask_RC)
  if cfg.dual_clip is not None:
    is_dual_RC = mask_RC & (advantage_RC < 0) & (ratio_RC > cfg.dual_clip)
    kept_RC = jnp.where(is_dual_RC, cfg.dual_clip, kept_RC)
  return kept_RC, (is_low_RC, is_high_RC, is_dual_RC)


def kl_estimate(logp_RC: jax.Array, logp_ref_RC: jax.Array, estimator: str) -> jax.Array:
  """Per-token estimate of KL(pi || pi_ref) from tokens of pi: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1.

  Args:
    logp_RC: float [R, C].
    logp_ref_RC: float [R, C]; d = clamp(logp_ref - logp, -20, 20).
    estimator: k1, k2 or k3.
  Returns:
    float [R, C]; k2 and k3 are at least 0.
  Raises:
    ValueError: when the estimator does not exist.
  Source: Schulman, "Approximating KL Divergence", 2020.
  """
  d_RC = _clamp(logp_ref_RC - logp_RC)
  if estimator == "k1":
    return -d_RC
  if estimator == "k2":
    return jnp.square(d_RC) / 2
  if estimator == "k3":
    return jnp.expm1(d_RC) - d_RC
  raise ValueError(f"loss.kl_estimator={estimator!r} does not exist; choose one of {KL_ESTIMATORS}.")


def cross_entropy_sum(logp_RC: jax.Array, mask_RC: jax.Array) -> jax.Array:
  """The supervised loss: minus the sum of logp over the tokens of the mask, float32 [].

  Args:
    logp_RC: float32 [R, C].
    mask_RC: bool [R, C], True = carries loss.
  """
  return -jnp.sum(jnp.where(mask_RC, logp_RC, 0.0))


def mean_metrics(sums: LossSums, n_tokens: jax.Array) -> dict[str, jax.Array]:
  """Token means of the sums of a whole minibatch, by metric name, float32 [].

  Args:
    sums: added over all micro-batches.
    n_tokens: float32 [], tokens that carry loss in the whole minibatch, at least 1.
  """
  names = {
      "loss": sums.loss, "policy_loss": sums.policy, "kl_ref": sums.kl, "clip_fraction_low": sums.clipped_low,
      "clip_fraction_high": sums.clipped_high, "clip_fraction_dual": sums.dual_clipped, "ratio_mean": sums.ratio,
      "approx_kl": sums.approx_kl, "importance_mean": sums.importance,
  }
  return {name: value / n_tokens for name, value in names.items()} | {"ratio_max": sums.ratio_max}


def _clamp(log_ratio: jax.Array) -> jax.Array:
  return jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
