"""Exercises every stage of a run on a tiny model: does this installation work?

Command:  hbpo train --config=smoke --workdir=runs/smoke
Time:     under a minute on two CPU cores, most of it compilation.
Expect:   the command ends with exit code 0, and runs/smoke/summary.json exists; nothing is learnt in 3 steps.
"""

from hbpo_jax import config


def get_config():
  cfg = config.new("hbpo")
  cfg.steps = 3

  cfg.model.compute_dtype = "float32"
  cfg.model.remat = "none"
  cfg.sft.steps = 10
  cfg.sft.rows = 16
  cfg.sft.hidden_size = 32
  cfg.sft.mlp_size = 64
  cfg.sft.n_heads = 2
  cfg.sft.n_kv_heads = 1

  cfg.data.source = "synthetic"
  cfg.data.synthetic.max_level = 2
  cfg.data.synthetic.n_problems = 64
  cfg.data.n_eval = 16
  cfg.data.max_prompt_tokens = 32
  cfg.prompt.instruction = ""
  cfg.prompt.budget_sentence = "within {budget}"

  cfg.rollout.queries = 8
  cfg.rollout.rollouts_per_query = 4
  cfg.rollout.budgets = (8, 16)
  cfg.reward.max_response_tokens = 24

  cfg.learner.minibatches = 2
  cfg.checkpoint.save_every = 2
  cfg.log.samples_every = 2
  cfg.eval.batch_queries = 16
  return cfg
