"""Refuses settings that cannot work together, before anything is loaded.

Types are checked when the config is read (`hbpo_jax.config.from_config_dict`); this checks values and combinations.
"""

import math
from typing import Any

from hbpo_jax import config, user_code
from hbpo_jax.objective import checks, forms
from hbpo_jax.requirements import increasing as _increasing
from hbpo_jax.requirements import require as _require

CHOICES = {
    "profile": tuple(config.PROFILES),
    "pipeline": ("on_policy", "one_step_off"),
    "model.compute_dtype": ("bfloat16", "float32"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "full", "offload"),
    "prompt.prefix_role": ("action", "context"),
    "rollout.layers": ("auto", "stacked", "unrolled"),
    "rollout.prefill_kernel": ("auto", "xla", "splash", "cudnn"),
    "rollout.decode_kernel": ("auto", "xla", "pallas_tpu", "pallas_gpu"),
    "reward.form": tuple(forms.FORMS),
    "reward.curve": ("cosine", "log"),
    "advantage.form": ("group", "leave_one_out", "reference"),
    "advantage.std_ddof": (0, 1),
    "advantage.intra_form": ("baseline", "within"),
    "advantage.intra_baseline": ("budget", "correct_length"),
    "advantage.intra_scale": ("none", "std"),
    "advantage.intra_gate": ("none", "solved", "rate"),
    "loss.kl_estimator": ("k1", "k2", "k3"),
    "data.synthetic.traces": ("verbose", "modes"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
    "optimizer.first_moment_dtype": ("float32", "bfloat16"),
    "optimizer.second_moment": ("full", "factored"),
    "learner.attention_kernel": ("auto", "xla", "splash", "cudnn"),
    "learner.nonfinite": ("skip", "rollback", "stop"),
    "eval.best": ("accuracy", "tokens", "none"),
}

# Smallest value of whole-number settings.
_AT_LEAST = {
    "seed": 0, "steps": 1,
    "data.n_eval": 0, "data.max_prompt_tokens": 1, "data.limit": 0,
    "data.synthetic.min_level": 1, "data.synthetic.modulus": 2, "data.synthetic.n_problems": 1,
    "rollout.queries": 1, "rollout.rollouts_per_query": 1, "rollout.top_k": 0,
    "rollout.slots": 0, "rollout.segment_steps": 0,
    "reward.max_response_tokens": 1,
    "optimizer.warmup_updates": 0,
    "learner.minibatches": 1, "learner.microbatch_rows": 0, "learner.row_tokens": 0, "learner.logprob_chunk": 1,
    "learner.max_nonfinite": 0, "learner.max_dumps": 0,
    "lora.rank": 0, "distributed.num_processes": 0, "distributed.process_id": -1, "distributed.timeout_s": 1,
    "mesh.data": 1, "mesh.tensor": 1, "mesh.rollout_tensor": 0, "mesh.rollout_devices": 0,
    "grading.workers": 0, "grading.memory_mib": 256,
    "checkpoint.save_every": 0, "checkpoint.max_to_keep": 1,
    "log.every": 1, "log.samples_every": 0, "log.n_samples": 0,
    "eval.top_k": 0, "eval.samples_per_problem": 1, "eval.batch_queries": 1, "eval.max_new_tokens": 0,
    "alarms.window": 1, "alarms.reference": 1,
    "eval.max_context": 2, "eval.limit": 0, "eval.every": 0, "eval.n_during": 0,
    "sft.steps": 1, "sft.rows": 1, "sft.hidden_size": 1, "sft.n_layers": 1, "sft.n_heads": 1, "sft.n_kv_heads": 1,
    "sft.mlp_size": 1,
}  # fmt: skip

# Intervals of real settings: (low, low included, high, high included).
_POSITIVE = (0.0, False, math.inf, False)
_NOT_NEGATIVE = (0.0, True, math.inf, False)
_FRACTION = (0.0, True, 1.0, True)
_INTERVALS = {
    "lora.alpha": _POSITIVE,
    "rollout.temperature": _POSITIVE,
    "rollout.top_p": (0.0, False, 1.0, True),
    "reward.alpha": _NOT_NEGATIVE,
    "reward.distance_weight": _NOT_NEGATIVE,
    "reward.beta": _POSITIVE,
    "prompt.prefix_weight": _FRACTION,
    "prompt.prefix_weight_negative": _FRACTION,
    "reward.unfinished_reward": (-math.inf, False, math.inf, False),
    "reward.floor": (-math.inf, False, math.inf, False),
    "reward.bonus": _NOT_NEGATIVE,
    "reward.delta": _NOT_NEGATIVE,
    "reward.gate_share": _FRACTION,
    "reward.gate_accuracy": _FRACTION,
    "reward.penalty_start": _NOT_NEGATIVE,
    "reward.penalty_rate": _NOT_NEGATIVE,
    "reward.target_accuracy": _FRACTION,
    "reward.balance": _FRACTION,
    "reward.balance_slope": _NOT_NEGATIVE,
    "advantage.intra_clip": _POSITIVE,
    "advantage.intra_coef": _NOT_NEGATIVE,
    "advantage.std_eps": _POSITIVE,
    "loss.clip_low": (0.0, False, 1.0, False),
    "loss.clip_high": (0.0, False, 1.0, False),
    "loss.dual_clip": (1.0, False, math.inf, False),
    "loss.kl_coef": _NOT_NEGATIVE,
    "loss.importance_cap": _POSITIVE,
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.final_fraction": _FRACTION,
    "optimizer.b1": (0.0, True, 1.0, False),
    "optimizer.b2": (0.0, True, 1.0, False),
    "optimizer.eps": _POSITIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.clip_norm": _POSITIVE,
    "grading.cpu_seconds": _POSITIVE,
    "eval.temperature": _NOT_NEGATIVE,
    "eval.top_p": (0.0, False, 1.0, True),
    "alarms.margin": (0.0, True, 1.0, False),
    "alarms.length_spread": _FRACTION,
    "alarms.sentence_drop": _NOT_NEGATIVE,
    "alarms.solved": _FRACTION,
    "alarms.entropy_low": _FRACTION,
    "alarms.entropy_high": _NOT_NEGATIVE,
    "alarms.clip_share": _FRACTION,
    "alarms.truncated": _FRACTION,
    "alarms.timeouts": _FRACTION,
    "alarms.zero_variance": _FRACTION,
    "alarms.ratio_max": _NOT_NEGATIVE,
    "alarms.grad_spike": _NOT_NEGATIVE,
    "alarms.sampler_gap": _FRACTION,
    "eval.best_max_tokens": _POSITIVE,
    "eval.best_min_accuracy": _FRACTION,
    "sft.learning_rate": _POSITIVE,
    "sft.weight_decay": _NOT_NEGATIVE,
    "sft.budget_share": _FRACTION, "sft.stated_share": _FRACTION,
}


def validate(cfg: config.Config, *, n_devices: int, arch: Any = None, prefix_tokens: int = 0) -> None:
  """Raises unless the settings make a run that can work.

  Args:
    cfg: the settings.
    n_devices: devices that the run will see (all processes).
    arch: the model's Architecture once its config.json is read; None leaves out what depends on it.
    prefix_tokens: tokens of the longest budget sentence, once a tokenizer is loaded.
  Raises:
    ValueError: on the first setting at fault; names the field, its value and the remedy.
  """
  _check_each_alone(cfg)
  _check_budgets(cfg)
  checks.check(cfg)
  _check_sampler(cfg)
  _check_reward(cfg)
  _check_text(cfg)
  _check_batch(cfg)
  _check_mesh(cfg, n_devices)
  _check_rest(cfg)
  _check_evaluation(cfg)
  if arch is not None:
    _check_model(cfg, arch, prefix_tokens)


def validate_evaluation(cfg: config.Config, *, n_devices: int) -> None:
  """Raises unless the settings make an evaluation that can work; those of training need not fit together.

  Args:
    cfg: the settings.
    n_devices: devices that the evaluation will see.
  Raises:
    ValueError: on the first setting at fault; names the field, its value and the remedy.
  """
  _check_each_alone(cfg)
  _check_sampler(cfg)
  _check_text(cfg)
  _check_devices(cfg, n_devices)
  _require(bool(cfg.eval.benchmarks), cfg, "eval.benchmarks", "names nothing to evaluate on",
           "give --config.benchmarks=gsm8k,math500 or JSON Lines files")
  _require(bool(cfg.eval.modes), cfg, "eval.modes", "is empty",
           "give natural, efficiency, budgets, numbers, or say:TEXT")
  for mode in cfg.eval.modes:
    _require(mode == "budgets" or _is_mode(mode), cfg, "eval.modes", f"has the mode {mode!r}, which does not exist",
             "choose natural, efficiency, budgets, budgets as numbers such as 1024, or say:TEXT")


def _is_mode(mode: str) -> bool:
  says = mode.startswith("say:") and mode != "say:"
  return mode in ("natural", "efficiency") or says or (mode.isascii() and mode.isdigit() and int(mode) > 0)


def _check_each_alone(cfg: config.Config) -> None:
  for field, choices in CHOICES.items():
    _require(config.get(cfg, field) in choices, cfg, field, "does not exist",
             f"choose one of {', '.join(map(str, choices))}")
  for field, least in _AT_LEAST.items():
    _require(config.get(cfg, field) >= least, cfg, field, "is too small", f"give at least {least}")
  for field, (low, low_in, high, high_in) in _INTERVALS.items():
    value = config.get(cfg, field)
    if value is None:
      continue
    above = value >= low if low_in else value > low
    below = value <= high if high_in else value < high
    interval = f"{'[' if low_in else '('}{low:g}, {high:g}{']' if high_in else ')'}"
    _require(above and below, cfg, field, "is out of range", f"give a number in {interval}")
  _require(cfg.seed < 2**32, cfg, "seed", "is too large", "give a number below 2**32")


def _check_budgets(cfg: config.Config) -> None:
  budgets, longest = cfg.rollout.budgets, cfg.reward.max_response_tokens
  n_groups, n_rollouts = len(budgets), cfg.rollout.rollouts_per_query
  _require(n_groups > 0, cfg, "rollout.budgets", "is empty", "give at least one budget, such as 512,1024")
  _require(budgets[0] > 0, cfg, "rollout.budgets", "has a budget that is not positive", "give budgets of at least 1")
  _require(_increasing(budgets), cfg, "rollout.budgets", "is not strictly increasing",
           f"write {','.join(map(str, sorted(set(budgets))))}")
  _require(budgets[-1] <= longest, cfg, "rollout.budgets",
           f"exceeds config.reward.max_response_tokens={longest}, beyond which nothing is earned",
           "lower the budgets or raise reward.max_response_tokens")
  below, above = n_rollouts // n_groups * n_groups, -(-n_rollouts // n_groups) * n_groups
  _require(n_rollouts % n_groups == 0, cfg, "rollout.rollouts_per_query",
           f"is not divisible by the {n_groups} budgets of config.rollout.budgets",
           f"give {f'{below} or ' if below else ''}{above}")
  if cfg.rollout.caps:
    _require(len(cfg.rollout.caps) == n_groups, cfg, "rollout.caps",
             f"has {len(cfg.rollout.caps)} caps for {n_groups} budgets", "give one cap per budget, or ()")
    for cap, budget in zip(cfg.rollout.caps, budgets, strict=True):
      _require(cap >= budget, cfg, "rollout.caps", f"has cap {cap} below its budget {budget}",
               "raise the cap to the budget or more")
      _require(cap <= longest, cfg, "rollout.caps",
               f"has cap {cap} beyond config.reward.max_response_tokens={longest}, where nothing is earned",
               f"give caps of at most {longest}")


def _check_sampler(cfg: config.Config) -> None:
  sizes = cfg.rollout.length_buckets
  _require(not sizes or (_increasing(sizes) and sizes[0] > 0), cfg, "rollout.length_buckets",
           "is not strictly increasing from at least 1", "write the sizes in ascending order, or () for powers of two")
  for field in ("rollout.prefill_kernel", "learner.attention_kernel"):
    _require(config.get(cfg, field) != "cudnn" or cfg.model.compute_dtype == "bfloat16", cfg, field,
             f"needs 16 bits, but config.model.compute_dtype={cfg.model.compute_dtype!r}",
             f"set model.compute_dtype=bfloat16, or {field}=xla")


def _check_reward(cfg: config.Config) -> None:
  _require(cfg.rollout.rollouts_per_query > cfg.advantage.std_ddof, cfg, "advantage.std_ddof",
           f"leaves no degree of freedom with config.rollout.rollouts_per_query={cfg.rollout.rollouts_per_query}",
           "take more rollouts per query or set std_ddof=0")
  _require(not cfg.reward.grader or user_code.is_name(cfg.reward.grader), cfg, "reward.grader",
           "is not a dotted path",
           "write package.module.function, FILE.py:function, or nothing for the built-in grading")


def _check_text(cfg: config.Config) -> None:
  sentence = cfg.prompt.budget_sentence
  _require(not sentence or "{budget}" in sentence, cfg, "prompt.budget_sentence", "does not contain {budget}",
           "write {budget} where the number of tokens goes, or nothing to force none")
  for field, modes in (("eval.mode", (cfg.eval.mode,)), ("eval.modes", cfg.eval.modes)):
    _require(bool(sentence) or not any(m == "budgets" or m.isdigit() for m in modes), cfg, field,
             "asks for a budget sentence, and config.prompt.budget_sentence is empty", "choose natural or efficiency")
  _require(_is_mode(cfg.eval.mode), cfg, "eval.mode", "does not exist",
           "choose natural, efficiency, a budget such as 1024, or say:TEXT")
  _require(cfg.data.source != "", cfg, "data.source", "is empty",
           "give 'synthetic', a JSON Lines file, or tfds:NAME")
  for field in ("data.source", "data.eval_source"):
    _require(config.get(cfg, field) != "tfds:", cfg, field, "names no data set", "write tfds:NAME")


def _check_batch(cfg: config.Config) -> None:
  queries, n_rollouts = cfg.rollout.queries, cfg.rollout.rollouts_per_query
  minibatches, micro = cfg.learner.minibatches, cfg.learner.microbatch_rows
  _require(queries % minibatches == 0, cfg, "learner.minibatches", f"does not divide config.rollout.queries={queries}",
           f"choose one of {_divisors(queries)}")
  rows = queries // minibatches * n_rollouts
  _require(micro == 0 or rows % micro == 0, cfg, "learner.microbatch_rows",
           f"does not divide the {rows} rows of a minibatch", f"choose one of {_divisors(rows)}, or 0 for the whole")


def _divisors(n: int) -> str:
  return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def _check_devices(cfg: config.Config, n_devices: int) -> int:
  """data x fsdp, the shards of a batch."""
  mesh = cfg.mesh
  _require(mesh.rollout_devices < n_devices, cfg, "mesh.rollout_devices",
           f"leaves none of the {n_devices} devices for the updates", "lower it")
  if mesh.rollout_devices or mesh.rollout_tensor:
    n_sampling = mesh.rollout_devices or n_devices
    _require(n_sampling % (mesh.rollout_tensor or mesh.tensor) == 0, cfg, "mesh.rollout_tensor",
             f"(0 means config.mesh.tensor={mesh.tensor}) does not divide the {n_sampling} devices of the rollouts",
             f"choose one of {_divisors(n_sampling)}")
  n_devices -= mesh.rollout_devices
  fixed = mesh.data * mesh.tensor
  _require(mesh.fsdp == -1 or mesh.fsdp >= 1, cfg, "mesh.fsdp", "is not a number of devices",
           "give at least 1, or -1 for all that remain")
  if mesh.fsdp == -1:
    _require(n_devices % fixed == 0, cfg, "mesh.data",
             f"times config.mesh.tensor={mesh.tensor} does not divide the {n_devices} devices",
             f"make mesh.data x mesh.tensor one of {_divisors(n_devices)}")
    fsdp = n_devices // fixed
  else:
    fsdp = mesh.fsdp
    _require(fixed * fsdp == n_devices, cfg, "mesh.fsdp",
             f"makes a mesh of {fixed * fsdp} devices where there are {n_devices}",
             "make data x fsdp x tensor the number of devices, or set mesh.fsdp=-1 for all that remain")
  return mesh.data * fsdp


def _check_pipeline(cfg: config.Config, n_devices: int) -> None:
  if cfg.pipeline == "on_policy":
    _require(cfg.mesh.rollout_devices == 0, cfg, "mesh.rollout_devices",
             "would idle during updates, and the others during rollouts", "set it to 0, or pipeline=one_step_off")
    return
  _require(cfg.loss.importance_cap is not None, cfg, "pipeline",
           "learns from rollouts of older weights without correcting for it", "set loss.importance_cap, such as 2.0")
  # Two threads that start programs on the same devices may start them in another order on each, and collectives wait
  # for each other.
  _require(n_devices == 1 or cfg.mesh.rollout_devices > 0, cfg, "pipeline",
           f"decodes and learns at once, which {n_devices} devices cannot do together",
           "set aside some of them with mesh.rollout_devices")


def _check_mesh(cfg: config.Config, n_devices: int) -> None:
  _check_pipeline(cfg, n_devices)
  shards = _check_devices(cfg, n_devices)
  rows = cfg.rollout.queries // cfg.learner.minibatches * cfg.rollout.rollouts_per_query
  less = "raise it to a multiple, or put more devices on mesh.tensor or fewer on mesh.data and mesh.fsdp"
  split = f"data x fsdp = {shards} shards of the mesh"
  _require(cfg.rollout.queries % shards == 0, cfg, "rollout.queries", f"is not divisible by the {split}", less)
  _require(rows % shards == 0, cfg, "learner.minibatches",
           f"makes minibatches of {rows} rows, which are not divisible by the {split}", "lower it")
  _require(cfg.learner.microbatch_rows % shards == 0, cfg, "learner.microbatch_rows",
           f"is not divisible by the {split}", less)
  _require(cfg.data.n_eval == 0 or cfg.eval.batch_queries % shards == 0, cfg, "eval.batch_queries",
           f"is not divisible by the {split}", less)


def _check_rest(cfg: config.Config) -> None:
  unknown = [name for name in cfg.checkpoint.allow_changes if name != "all" and name not in config.field_table()]
  _require(not unknown, cfg, "checkpoint.allow_changes", f"names {unknown[:1]}, which is no setting",
           "give dotted names such as loss.clip_high, or all")
  _require(cfg.checkpoint.export or not cfg.checkpoint.push, cfg, "checkpoint.export",
           f"leaves nothing to push to config.checkpoint.push={cfg.checkpoint.push!r}",
           "set it to true, or checkpoint.push=''")
  synthetic = cfg.data.synthetic
  _require(synthetic.max_level >= synthetic.min_level, cfg, "data.synthetic.max_level",
           f"is below config.data.synthetic.min_level={synthetic.min_level}", "raise it")
  prime = all(synthetic.modulus % d for d in range(2, math.isqrt(synthetic.modulus) + 1))
  _require(prime, cfg, "data.synthetic.modulus", "is not a prime", "choose a prime such as 7")
  for field in ("mode_shares", "budget_mode_shares"):
    shares = getattr(synthetic, field)
    _require(len(shares) == 4 and min(shares) >= 0 and sum(shares) > 0, cfg, f"data.synthetic.{field}",
             "does not give each of the four modes its share", "give four percentages such as 10,30,30,30")
  _require(all(b > 0 for b in cfg.sft.stated_budgets), cfg, "sft.stated_budgets", "has a budget that is not positive",
           "give budgets such as 512,1024")
  updates = cfg.steps * cfg.learner.minibatches
  _require(cfg.optimizer.warmup_updates <= updates, cfg, "optimizer.warmup_updates",
           f"exceeds the run's {updates} updates", "lower it")
  _require(cfg.sft.n_heads % cfg.sft.n_kv_heads == 0, cfg, "sft.n_kv_heads",
           f"does not divide config.sft.n_heads={cfg.sft.n_heads}", f"choose one of {_divisors(cfg.sft.n_heads)}")
  _require(cfg.sft.hidden_size % (2 * cfg.sft.n_heads) == 0, cfg, "sft.hidden_size",
           f"does not split into {cfg.sft.n_heads} heads of even size", f"give a multiple of {2 * cfg.sft.n_heads}")


def _check_evaluation(cfg: config.Config) -> None:
  _require(cfg.eval.every == 0 or cfg.data.n_eval > 0, cfg, "eval.every",
           "asks for evaluations without problems, for config.data.n_eval is 0", "set data.n_eval, or eval.every=0")


def _check_model(cfg: config.Config, arch: Any, prefix_tokens: int) -> None:
  context = arch.max_context
  uncounted = 0 if cfg.rollout.count_prefix_tokens else prefix_tokens
  prompt, cap = cfg.data.max_prompt_tokens, max(cfg.caps)
  what = f"config.data.max_prompt_tokens={prompt} + {{}} exceeds the model's context of {context} tokens"
  if prompt + cap + uncounted > context:
    field = "rollout.caps" if cfg.rollout.caps else "reward.max_response_tokens"
    prefix = f" + {uncounted} of the budget sentence" if uncounted else ""
    raise ValueError(f"{what.format(f'a longest response of {cap} (config.{field})' + prefix)}; "
                     f"lower data.max_prompt_tokens or {field}.")
  _require(cfg.learner.row_tokens in (0, max(cfg.learner.row_tokens, prompt + cap + uncounted)), cfg,
           "learner.row_tokens", f"is shorter than a prompt of {prompt} and a response of {cap + uncounted} tokens",
           "raise it, or set it to 0")
  longest = cfg.eval.max_new_tokens or cfg.reward.max_response_tokens
  if cfg.data.n_eval and prompt + longest > context:
    raise ValueError(f"{what.format(f'config.eval.max_new_tokens={longest}')}; lower eval.max_new_tokens.")
