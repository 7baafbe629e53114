"""What a reward remembers from one step to the next: a few float32 numbers in `TrainState.memory`."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from hbpo_jax.config import RewardConfig


def init(cfg: RewardConfig) -> dict[str, jax.Array]:
  """The memory before the first step; empty for forms without one.

  Returns:
    For `adlp`, penalty: float32 [], lambda_0 per token.
  """
  return {"penalty": jnp.asarray(cfg.penalty_start, jnp.float32)} if cfg.form == "adlp" else {}


def update(memory: Mapping[str, jax.Array], score_BGJ: jax.Array, *, cfg: RewardConfig) -> dict[str, jax.Array]:
  """The memory after a step.

      lambda_t+1 = max(0, lambda_t + penalty_rate * (mean score - target_accuracy))      (adlp)

  Args:
    memory: of the step, of `init` or of the update before.
    score_BGJ: float [B, G, J] in [0, 1], of the step.
    cfg: the reward's settings.
  Source: arXiv 2505.18298. Its defaults could not be checked.
  """
  if cfg.form != "adlp":
    return dict(memory)
  accuracy = jnp.mean(jnp.asarray(score_BGJ, jnp.float32))
  moved = memory["penalty"] + cfg.penalty_rate * (accuracy - cfg.target_accuracy)
  return {"penalty": jnp.maximum(moved, 0.0).astype(jnp.float32)}
