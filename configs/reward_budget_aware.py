"""Ablation of the reward (Table 4): budget-aware reward, from DeepScaleR-1.5B-Preview.

Command:  hbpo train --config=reward_budget_aware --workdir=runs/reward_budget_aware
Time:     that of deepscaler_1p5b; not measured here.
Expect:   the paper's average over GSM8K, MATH500, Olympiad and AIME25: 63.7 % / 2,364 tokens.
Reward:   the piecewise reward of Eq. 1, as in deepscaler_1p5b; this file only keeps the ablation complete.
"""

from hbpo_jax.flags import load_config


def get_config():
  cfg = load_config("deepscaler_1p5b")
  cfg.reward.form = "piecewise"
  return cfg
