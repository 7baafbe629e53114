"""AdamW with gradient clipping and a learning-rate schedule, from the configuration."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike
import optax

from hbpo_jax.config import OptimizerConfig

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate(cfg: OptimizerConfig, total_updates: int) -> Callable[[ArrayLike], jax.Array]:
  """The schedule: learning rate, float32 [], of update u = 0, 1, ... (int32 []).

      warm-up  peak * (u + 1) / (W + 1)          for u < W = warmup_updates: never 0, reaches the peak at u = W
      constant peak
      linear   peak * (1 - (1 - f) * x)          x = (u - W) / (total - 1 - W), f = final_fraction
      cosine   peak * (f + (1 - f) * (1 + cos(pi x)) / 2)

  The last update runs at f * peak, and so does any beyond it.

  Raises:
    ValueError: when the schedule does not exist.
  Source: the release runs constant 1e-6; differs from it: its first update has rate 0.
  """
  if cfg.schedule not in SCHEDULES:
    raise ValueError(f"optimizer.schedule={cfg.schedule!r} does not exist; choose one of {SCHEDULES}.")
  warmup, floor = cfg.warmup_updates, cfg.final_fraction

  def rate(update: ArrayLike) -> jax.Array:
    u = jnp.asarray(update, jnp.float32)
    x = jnp.clip((u - warmup) / max(total_updates - 1 - warmup, 1), 0.0, 1.0)
    if cfg.schedule == "constant":
      factor = jnp.ones_like(x)
    elif cfg.schedule == "linear":
      factor = 1 - (1 - floor) * x
    else:
      factor = floor + (1 - floor) * (1 + jnp.cos(jnp.pi * x)) / 2
    return cfg.learning_rate * jnp.minimum(factor, (u + 1) / (warmup + 1))

  return rate


def make(cfg: OptimizerConfig, total_updates: int) -> optax.GradientTransformation:
  """Global-norm clipping, then AdamW with decoupled weight decay on every parameter.

  With second_moment='factored', Adam's second moment is the outer product of its row and column means (Adafactor), over
  the two largest axes of a parameter if both have at least 128 entries; and the first moment is that of the scaled
  gradients, as in Adafactor, so that eps has no part in it.

  Args:
    cfg: the optimizer's settings.
    total_updates: updates of the whole run, for the schedule.
  Raises:
    ValueError: when the schedule does not exist.
  Source: the release's optimizer: AdamW (0.9, 0.999), weight decay 0.01 on all parameters, clip norm 1. Factored
    moments: Shazeer & Stern, "Adafactor", 2018.
  """
  rate, dtype = learning_rate(cfg, total_updates), jnp.dtype(cfg.first_moment_dtype)
  clip = optax.clip_by_global_norm(cfg.clip_norm)
  if cfg.second_moment == "full":
    return optax.chain(clip, optax.adamw(
        rate, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay, mu_dtype=dtype))

  def corrected(update: ArrayLike, decay: ArrayLike) -> jax.Array:
    # As a decay, what Adam divides out: the mean of t + 1 squares with weights b2^i.
    t, b2 = jnp.asarray(update, jnp.float32), jnp.asarray(decay, jnp.float32)
    return b2 * (1 - b2**t) / (1 - b2**(t + 1))

  return optax.chain(
      clip,
      optax.scale_by_factored_rms(decay_rate=cfg.b2, decay_rate_fn=corrected),
      optax.ema(cfg.b1, debias=True, accumulator_dtype=dtype),
      optax.add_decayed_weights(cfg.weight_decay),
      optax.scale_by_learning_rate(rate),
  )


def state_shardings(tx: optax.GradientTransformation, params: Any, shardings: Any, whole: Any) -> Any:
  """Shardings of the optimizer's state: a moment lies like its parameter, a factored one like the axes it has left.

  Args:
    params: ShapeDtypeStructs.
    shardings: NamedShardings, like params.
    whole: of what belongs to no parameter.
  """
  def place(moment, parameter):
    shape, sharding = parameter.shape, parameter.sharding
    if moment.shape == shape:
      return sharding
    spec = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    for axis in range(len(shape)):
      if moment.shape == shape[:axis] + shape[axis + 1:]:
        left = spec[:axis] + spec[axis + 1:]
        while left and left[-1] is None:
          left = left[:-1]
        return NamedSharding(sharding.mesh, PartitionSpec(*left))
    return whole  # the placeholder of a moment that is kept in the other form

  placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)
  return optax.tree_map_params(
      tx, place, jax.eval_shape(tx.init, params), placed, transform_non_params=lambda _: whole)
