"""The paper's run from DeepScaleR-1.5B-Preview (Section 4, Table 1), and the base of its ablations.

Command:  hbpo train --config=deepscaler_1p5b --workdir=runs/deepscaler_1p5b
          The profile is the paper's; --config.profile=released or hbpo runs the others.
Time:     629 steps; not measured here. Memory as in r1_distill_qwen_1p5b.py: 16 chips of 16 GiB.
Expect:   the paper's accuracy in % / mean tokens, natural mode, T 0.6, top-p 0.95:

              |        | GSM8K        | MATH500      | Olympiad     | AIME25       | average      |
              | before | 86.1 / 1,684 | 87.0 / 2,938 | 51.6 / 5,330 | 30.0 / 9,023 | 63.7 / 4,744 |
              | after  | 87.6 /   790 | 86.2 / 1,818 | 50.0 / 2,861 | 31.1 / 3,988 | 63.7 / 2,364 |
"""

from hbpo_jax.flags import load_config


def get_config():
  cfg = load_config("r1_distill_qwen_1p5b")
  cfg.model.path = "agentica-org/DeepScaleR-1.5B-Preview"
  return cfg
