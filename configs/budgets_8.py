"""Ablation of the number of budgets (Table 3): 8 budgets, from DeepScaleR-1.5B-Preview.

Command:  hbpo train --config=budgets_8 --workdir=runs/budgets_8
Time:     that of deepscaler_1p5b; not measured here.
Expect:   the paper's average accuracy over GSM8K, MATH500, Olympiad and AIME25: 62.9 %
          (1, 2, 4, 6, 8 budgets: 59.8, 61.7, 63.7, 62.9, 62.9 %).
          The paper says only that the mean stays 1536; these eight lie symmetrically around it, 2 rollouts each.
"""

from hbpo_jax.flags import load_config


def get_config():
  cfg = load_config("deepscaler_1p5b")
  cfg.rollout.budgets = (256, 512, 1024, 1280, 1792, 2048, 2560, 2816)
  return cfg
