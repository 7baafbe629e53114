"""Ablation of the reward (Table 4): cosine reward, from DeepScaleR-1.5B-Preview.

Command:  hbpo train --config=reward_cosine --workdir=runs/reward_cosine
Time:     that of deepscaler_1p5b; not measured here.
Expect:   compare with reward_budget_aware (63.7 % / 2,364 tokens on average); the paper's Table 4 has the figures.
Reward:   beta cos(pi n / 2 L_max) for a correct answer: shorter is better, at every budget. There is no
          budget baseline, so A_intra is off.
"""

from hbpo_jax.flags import load_config


def get_config():
  cfg = load_config("deepscaler_1p5b")
  cfg.reward.form = "cosine"
  cfg.advantage.intra_coef = 0.0
  return cfg
