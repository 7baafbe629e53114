"""Qwen3-0.6B on GSM8K, cut to fit one Colab TPU of 16 GiB.

Command:  hbpo train --config=qwen3_0p6b_gsm8k --workdir=runs/qwen3_0p6b_gsm8k
Time:     not measured; by arithmetic on a v5e chip about 12 s a step (5 s to decode, the rest to score and update),
          so 40 minutes for 200 steps, and a few more for the evaluations before and after.
Expect:   no published figures. Look for mean tokens falling and accuracy not; 200 steps of 4 queries are few and noisy.

Memory, computed and not measured: 0.596 billion parameters are 2.2 GiB in float32. The master weights stay float32,
because in bfloat16 a step of 1e-6 is rounded away. A token of cache is 28 layers x 8 heads x 128 x (k, v) x 2 bytes
= 112 KiB.
  decoding  weights 2.2 + AdamW moments 4.4 + bfloat16 copy 1.1 + cache of 32 responses x 1,056 slots 3.6 = 11.4 GiB
  update    weights 2.2 + AdamW moments 4.4 + gradients 2.2, and as much again while they accumulate, + layer inputs of
            4 rows x 1,312 tokens 0.6 + logits of 4 x 64 tokens and their gradient 0.3 + one layer 0.6 = 12.5 GiB
"""

from hbpo_jax import config


def get_config():
  cfg = config.new("hbpo")
  cfg.steps = 200

  cfg.model.path = "Qwen/Qwen3-0.6B"
  cfg.data.source = "tfds:gsm8k"
  cfg.data.eval_source = "tfds:gsm8k"
  cfg.data.n_eval = 256
  cfg.data.max_prompt_tokens = 256

  cfg.rollout.queries = 4
  cfg.rollout.rollouts_per_query = 8
  cfg.rollout.budgets = (128, 256, 512, 768)
  cfg.reward.max_response_tokens = 1024

  cfg.learner.minibatches = 1
  cfg.learner.microbatch_rows = 4
  cfg.learner.logprob_chunk = 64
  cfg.eval.batch_queries = 32
  cfg.checkpoint.max_to_keep = 1
  return cfg
