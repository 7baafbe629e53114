"""Ablation of the number of budgets (Table 3): 2 budgets, from DeepScaleR-1.5B-Preview.

Command:  hbpo train --config=budgets_2 --workdir=runs/budgets_2
Time:     that of deepscaler_1p5b; not measured here.
Expect:   the paper's average accuracy over GSM8K, MATH500, Olympiad and AIME25: 61.7 %
          (1, 2, 4, 6, 8 budgets: 59.8, 61.7, 63.7, 62.9, 62.9 %).
"""

from hbpo_jax.flags import load_config


def get_config():
  cfg = load_config("deepscaler_1p5b")
  cfg.rollout.budgets = (512, 2560)
  return cfg
