"""Which settings of the objective cannot work together; `hbpo_jax.validation` calls it. No JAX."""

from hbpo_jax import config
from hbpo_jax.objective import forms
from hbpo_jax.requirements import increasing, require


def check(cfg: config.Config) -> None:
  """Raises unless prompt openings, reward and advantage fit together.

  Args:
    cfg: settings whose values are each allowed, with at least one budget.
  Raises:
    ValueError: on the first setting at fault; names the field, its value and the remedy.
  """
  _check_openings(cfg)
  _check_form(cfg)
  _check_limits(cfg)
  _check_advantage(cfg)


def _check_openings(cfg: config.Config) -> None:
  openings, sentence, n_groups = cfg.prompt.openings, cfg.prompt.budget_sentence, cfg.n_subgroups
  if openings:
    require(len(openings) == n_groups, cfg, "prompt.openings", f"has {len(openings)} texts for {n_groups} budgets",
            "give one per budget ('natural' for nothing), or ()")
    require(all(text.strip() for text in openings), cfg, "prompt.openings", "has an empty text",
             "write natural where nothing is to be forced")
    return
  require(bool(sentence) or n_groups == 1, cfg, "prompt.budget_sentence",
          f"is empty, so that the model cannot tell the {n_groups} budgets of config.rollout.budgets apart",
          "give one budget, or a sentence")
  form = forms.FORMS[cfg.reward.form]
  require(bool(sentence) or cfg.reward.form in forms.OWN or not form.reads_budget, cfg, "prompt.budget_sentence",
          f"is empty, but config.reward.form={cfg.reward.form!r} rewards by a budget that the model must be told",
          "write a sentence with {budget}, or choose another form")


def _check_form(cfg: config.Config) -> None:
  form = forms.FORMS[cfg.reward.form]
  of_form = f"config.reward.form={cfg.reward.form!r}"
  if not form.has_baseline:
    require(cfg.advantage.intra_coef == 0 or cfg.advantage.intra_form == "within", cfg, "advantage.intra_coef",
            f"needs a budget baseline, which {of_form} has not",
            "set advantage.intra_coef=0 or choose reward.form piecewise or min")
  if cfg.reward.form not in forms.OWN:
    require(cfg.reward.unfinished_reward == 0, cfg, "reward.unfinished_reward",
            f"is no part of {of_form}, to which an unfinished answer is a wrong one", "set it to 0")
    require(cfg.reward.bonus == 0, cfg, "reward.bonus", f"is no part of {of_form}",
            "set it to 0, or start from profile=paper")
    require(cfg.reward.curve == "cosine", cfg, "reward.curve", f"is no part of {of_form}",
            "set it to cosine, or start from profile=paper")
  if form.reads_mode:
    closes = ["</think>" in cfg.prompt.opening(g, b) for g, b in enumerate(cfg.rollout.budgets)]
    require(cfg.reward.form != "adaptthink" or (any(closes) and not all(closes)), cfg, "prompt.openings",
            f"does not close the thought of some responses and leave that of others, as {of_form} needs",
            "set rollout.budgets to two numbers and prompt.openings=natural,</think>")
  # prefix_weight_negative is not asked: a profile sets it, whatever the role.
  require(cfg.prompt.prefix_weight == 1 or cfg.prompt.prefix_role == "action", cfg, "prompt.prefix_weight",
          "weighs forced tokens that carry no loss with config.prompt.prefix_role='context'",
          "set it to 1, or prefix_role=action")


def _check_limits(cfg: config.Config) -> None:
  of_form = f"config.reward.form={cfg.reward.form!r}"
  limits, steps = cfg.reward.limits, cfg.reward.limit_steps
  if cfg.reward.form != "thinkprune":
    for field in ("reward.limits", "reward.limit_steps"):
      require(not config.get(cfg, field), cfg, field, f"is not read by {of_form}",
              "set it to (), or reward.form=thinkprune")
    return
  require(bool(limits), cfg, "reward.limits", f"is empty, but {of_form} cuts at them", "give some, such as 4000,3000")
  require(increasing(limits[::-1]) and limits[-1] > 0, cfg, "reward.limits",
          "is not strictly descending to at least 1", "write the longest first")
  require(limits[0] <= cfg.reward.max_response_tokens, cfg, "reward.limits",
          f"exceeds config.reward.max_response_tokens={cfg.reward.max_response_tokens}", "lower its first")
  require(len(steps) == len(limits) - 1, cfg, "reward.limit_steps",
          f"has {len(steps)} steps for the {max(len(limits) - 1, 0)} changes of config.reward.limits",
          "give the step of each change")
  require(increasing((0, *steps)), cfg, "reward.limit_steps", "is not strictly ascending from at least 1",
          "write the earliest first")
  require(not steps or steps[-1] < cfg.steps, cfg, "reward.limit_steps",
          f"has a change after the run's {cfg.steps} steps", "lower it, or raise steps")


def _check_advantage(cfg: config.Config) -> None:
  form = forms.FORMS[cfg.reward.form]
  of_form = f"config.reward.form={cfg.reward.form!r}"
  require(form.reads_mode or cfg.advantage.form != "reference", cfg, "advantage.form",
          f"needs to know which responses think, which {of_form} does not ask", "choose group or leave_one_out")
  require(cfg.rollout.rollouts_per_query > 1 or cfg.advantage.form != "leave_one_out", cfg, "advantage.form",
          "compares a response with the others, and config.rollout.rollouts_per_query=1 makes none", "take 2 or more")
  if cfg.advantage.intra_form == "within":
    require(cfg.rollouts_per_budget > cfg.advantage.std_ddof, cfg, "advantage.std_ddof",
            f"leaves no degree of freedom in subgroups of {cfg.rollouts_per_budget} (config.advantage.intra_form="
            "'within')", "take more rollouts per query or set std_ddof=0")
    return
  require(cfg.advantage.intra_baseline == "budget" or form.has_baseline, cfg, "advantage.intra_baseline",
          f"is an expected f2, which {of_form} has not", "set it to budget")
