"""AdamW with gradient clipping and a learning-rate schedule, from the configuration."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
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

  Args:
    cfg: the optimizer's settings.
    total_updates: updates of the whole run, for the schedule.
  Raises:
    ValueError: when the schedule does not exist.
  Source: the release's optimizer: AdamW (0.9, 0.999), weight decay 0.01 on all parameters, clip norm 1.
  """
  return optax.chain(
      optax.clip_by_global_norm(cfg.clip_norm),
      optax.adamw(
          learning_rate(cfg, total_updates), b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay),
  )
