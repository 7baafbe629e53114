"""The task of the miniature study: chains of operations that can be guessed, skimmed, worked or checked.

Command:  make miniature, or one run:
          python -m hbpo_jax.sft --config=miniature/task --workdir=runs/miniature_1/warmstart
          python -m hbpo_jax.train --config=miniature/task --workdir=runs/miniature_1 \
            --config.model.path=runs/miniature_1/warmstart/export
Expect:   see docs/miniature.md.

Levels 1 to 6 are 1, 2, 3, 5, 7 and 10 operations modulo 5. `hbpo_jax.data.modes` describes the modes; L_max is 1.8
times the longest response that works out every step once. Unasked, the warm start checks everything; where it states a
budget, or is given one, it also knows the shorter modes.
"""

from hbpo_jax import config


def get_config():
  cfg = config.new("hbpo")
  cfg.steps = 60

  cfg.model.compute_dtype = "float32"
  cfg.model.remat = "none"

  cfg.data.source = "synthetic"
  cfg.data.synthetic.modulus = 5
  cfg.data.synthetic.operations = (1, 2, 3, 5, 7, 10)
  cfg.data.synthetic.min_level = 1
  cfg.data.synthetic.max_level = 6
  cfg.data.synthetic.traces = "modes"
  cfg.data.synthetic.mode_shares = (4, 6, 10, 80)
  cfg.data.synthetic.budget_mode_shares = (5, 60, 20, 15)
  cfg.data.synthetic.n_problems = 65536
  cfg.data.max_prompt_tokens = 16
  cfg.prompt.instruction = ""
  cfg.prompt.budget_sentence = "budget:{budget}"
  cfg.prompt.efficiency_sentence = "minimal"

  cfg.sft.steps = 2200
  cfg.sft.rows = 32
  cfg.sft.learning_rate = 3e-3
  cfg.sft.budget_share = 0.75
  cfg.sft.stated_share = 0.07
  cfg.sft.stated_budgets = (6, 8, 10, 16, 24, 30, 32, 40, 44, 48, 60, 64)  # those of all methods of the study
  cfg.sft.n_layers = 2

  cfg.rollout.queries = 32
  cfg.rollout.rollouts_per_query = 16
  cfg.rollout.budgets = (8, 16, 32, 64)
  cfg.rollout.length_buckets = (80,)
  cfg.reward.max_response_tokens = 80

  cfg.optimizer.learning_rate = 4.5e-4
  cfg.optimizer.schedule = "linear"
  cfg.optimizer.final_fraction = 0.1
  cfg.optimizer.b2 = 0.98
  cfg.learner.minibatches = 4
  cfg.checkpoint.save_every = 30
  cfg.log.samples_every = 0
  cfg.log.tensorboard = False
  cfg.eval.temperature = 1.0
  cfg.eval.top_p = 1.0
  cfg.eval.batch_queries = 128
  return cfg
