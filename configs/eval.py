"""Evaluates a checkpoint as the paper does: temperature 0.6, top-p 0.95, contexts up to 32,768 tokens.

Command:  hbpo evaluate --config=eval --workdir=runs/eval_r1 \\
            --config.model.path=deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B \\
            --config.benchmarks=gsm8k,math500,olympiadbench,aime25
Time:     decided by the tokens. By the paper's lengths, R1-Distill-Qwen-1.5B writes about 11 million tokens in natural
          mode on the 2,524 problems of these four. On a CPU, which emulates bfloat16, add
          --config.model.compute_dtype=float32.
Expect:   the paper's Table 1, natural mode: 82.3 / 81.6 / 42.3 / 18.9 % with 1,111 / 4,696 / 10,225 / 15,651 tokens.

Stopped? The same command goes on where it was. Another model with the same seed draws the same random numbers, so give
each its own --workdir and compare them with `python -m hbpo_jax.report`.
"""

from hbpo_jax import config


def get_config():
  cfg = config.new("paper")
  cfg.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
  cfg.eval.benchmarks = ("gsm8k", "math500", "olympiadbench", "aime25")
  cfg.eval.modes = ("natural", "efficiency", "budgets")
  cfg.eval.max_context = 32768
  cfg.eval.max_new_tokens = 32768  # A response ends where prompt and response fill the context.
  return cfg
