"""The objective of one step: rewards, advantages, what the reward remembers, and numbers for the log."""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from hbpo_jax.config import Config
from hbpo_jax.objective import advantage as advantage_lib
from hbpo_jax.objective import forms, memory, reward, rivals


@struct.dataclass
class Outcome:
  """What a step's responses are worth.

  reward_BGJ: float [B, G, J].
  advantage: of `advantage.compute`.
  memory: of `memory.update`, for the next step.
  metrics: float32 [] each; which ones depends on the settings only.
  """
  reward_BGJ: jax.Array
  advantage: advantage_lib.Advantage
  memory: dict[str, jax.Array]
  metrics: dict[str, jax.Array]


def compute(
    n_gen_BGJ: Any, score_BGJ: Any, finished_BGJ: Any, *, cfg: Config, thinks_BGJ: Any = None, step: Any = None,
    remembered: Any = None,
) -> Outcome:
  """Rewards and advantages of a step; jit-safe.

  Args:
    n_gen_BGJ: int [B, G, J], counted tokens.
    score_BGJ: float [B, G, J] in [0, 1].
    finished_BGJ: bool [B, G, J].
    cfg: its budgets, reward and advantage are read.
    thinks_BGJ: bool [B, G, J], which responses think; for forms that read it.
    step: int [], rollout batches done before; for forms with stages.
    remembered: `TrainState.memory`; for forms with memory.
  Returns:
    An Outcome. Metrics: penalty (adlp: the one this step used), gate_share (grpo_lambda: share of the queries with
    length penalty), limit (thinkprune), think_share (forms that read modes), intra_gate (its mean, where it is set).
  Raises:
    ValueError: when something that the settings need is missing.
  """
  form = forms.FORMS[cfg.reward.form]
  budget_tokens_G = np.array(cfg.rollout.budgets)
  reward_BGJ = reward.compute(
      n_gen_BGJ, score_BGJ, budget_tokens_G, cfg=cfg.reward, finished_BGJ=finished_BGJ, thinks_BGJ=thinks_BGJ,
      step=step, memory=remembered)
  baseline = None
  if form.has_baseline:
    baseline = reward.baseline(budget_tokens_G, cfg=cfg.reward)
    if cfg.advantage.intra_baseline == "correct_length":
      baseline = reward.expected(n_gen_BGJ, score_BGJ, cfg=cfg.reward)
  solve_rate_B = jnp.mean(jnp.asarray(score_BGJ, reward_BGJ.dtype), axis=(1, 2))
  advantage = advantage_lib.compute(
      reward_BGJ, baseline, cfg=cfg.advantage, solve_rate_B=solve_rate_B, thinks_BGJ=thinks_BGJ)
  metrics = {}
  if cfg.reward.form in rivals.REWARDS:
    metrics |= rivals.metrics(
        reward.responses(n_gen_BGJ, score_BGJ, budget_tokens_G, thinks_BGJ, step, remembered, cfg=cfg.reward),
        cfg.reward)
  if cfg.advantage.intra_gate != "none":
    metrics["intra_gate"] = jnp.mean(
        solve_rate_B if cfg.advantage.intra_gate == "rate" else (solve_rate_B > 0).astype(jnp.float32))
  return Outcome(
      reward_BGJ=reward_BGJ, advantage=advantage, memory=memory.update(remembered or {}, score_BGJ, cfg=cfg.reward),
      metrics={name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()})
