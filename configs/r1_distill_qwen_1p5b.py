"""The paper's run from DeepSeek-R1-Distill-Qwen-1.5B (Section 4, Table 1): one epoch of DeepScaleR-Preview.

Command:  hbpo train --config=r1_distill_qwen_1p5b --workdir=runs/r1_distill_qwen_1p5b
          The profile is the paper's; --config.profile=released or hbpo runs the others.
Time:     629 steps; not measured. Compiled ahead of time for a v5e:4x4 (16 chips) it needs 10.9 of 15.75 GiB a chip, in
          decoding: the sampler's weights 3.3, the prompts of a step 1.8, the cache of 32 responses 4.4. A step takes 37
          s by the chips' bandwidth and FLOPs, 60 s by the rough efficiencies of
          hbpo plan --config=r1_distill_qwen_1p5b --topology=v5e:4x4
Expect:   the paper's accuracy in % / mean tokens, natural mode, T 0.6, top-p 0.95:

              |        | GSM8K        | MATH500      | Olympiad      | AIME25        | average      |
              | before | 82.3 / 1,111 | 81.6 / 4,696 | 42.3 / 10,225 | 18.9 / 15,651 | 56.3 / 7,921 |
              | after  | 84.5 /   670 | 80.4 / 2,147 | 45.0 /  4,058 | 27.8 /  5,606 | 59.4 / 3,120 |

          The before/after table of the run itself is MATH500; --config.data.eval_source=tfds:aime25 with
          --config.data.n_eval=30 (or tfds:olympiadbench, tfds:gsm8k) measures another.
"""

from hbpo_jax import config


def get_config():
  cfg = config.new("paper")  # 64 queries x 16 rollouts, budgets 512/1024/2048/2560, L_max 4096: the defaults
  cfg.steps = 629

  cfg.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
  cfg.data.source = "tfds:deepscaler_preview"
  cfg.data.eval_source = "tfds:math500"
  cfg.data.n_eval = 500

  # 32 responses at once on each of 16 chips: a row of 1,024 + 4,096 tokens of cache is 140 MiB.
  cfg.rollout.slots = 512
  cfg.learner.microbatch_rows = 16  # Of packed rows; 64 do not fit.
  cfg.eval.max_new_tokens = 32_768 - cfg.data.max_prompt_tokens
  return cfg
