"""Ablation of the number of budgets (Table 3): 6 budgets, from DeepScaleR-1.5B-Preview.

Command:  hbpo train --config=budgets_6 --workdir=runs/budgets_6
Time:     that of deepscaler_1p5b; not measured here.
Expect:   the paper's average accuracy over GSM8K, MATH500, Olympiad and AIME25: 62.9 %
          (1, 2, 4, 6, 8 budgets: 59.8, 61.7, 63.7, 62.9, 62.9 %).
          The paper says only that the mean stays 1536; these six lie symmetrically around it. 16 rollouts do not
          split over 6 budgets, so a query has 18 (3 each): 12 % more samples a step than the other rows.
"""

from hbpo_jax.flags import load_config


def get_config():
  cfg = load_config("deepscaler_1p5b")
  cfg.rollout.rollouts_per_query = 18
  cfg.rollout.budgets = (256, 512, 1024, 2048, 2560, 2816)
  return cfg
