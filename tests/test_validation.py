"""One case per rule: the field at fault is named with its value and a remedy; its allowed neighbour passes."""

import dataclasses
import re
import types

import pytest

from hbpo_jax import config, flags, validation
from hbpo_jax.objective import forms

ARCH = types.SimpleNamespace(max_context=5120)


def make(**overrides):
  """The paper's config with overrides, dots of the field names written as two underscores."""
  return flags.build(config.new("paper"), {k.replace("__", "."): v for k, v in overrides.items()})


def check(n_devices=1, arch=None, prefix_tokens=0, **overrides):
  validation.validate(make(**overrides), n_devices=n_devices, arch=arch, prefix_tokens=prefix_tokens)


def refuse(field, words, n_devices=1, arch=None, prefix_tokens=0, **overrides):
  with pytest.raises(ValueError, match=rf"config\.{field}") as error:
    check(n_devices, arch, prefix_tokens, **overrides)
  text = str(error.value)
  assert words in text, text
  assert "; " in text and text.endswith("."), f"no remedy: {text}"
  first = field.replace("\\", "")
  if first.replace(".", "__") in overrides:
    assert f"config.{first}={overrides[first.replace('.', '__')]!r}" in text


@pytest.mark.parametrize("n_devices", [1, 2, 4, 8, 16])
def test_defaults_pass(n_devices):
  check(n_devices=n_devices, arch=ARCH)


@pytest.mark.parametrize("profile", sorted(config.PROFILES))
def test_profiles_pass(profile):
  validation.validate(config.from_config_dict(config.new(profile)), n_devices=1, arch=ARCH)


# Each value alone.

CHOICE_CASES = {
    "profile": "best", "model.compute_dtype": "float16", "model.param_dtype": "float16", "model.remat": "some",
    "prompt.prefix_role": "both", "reward.form": "linear", "advantage.std_ddof": 2, "loss.kl_estimator": "k4",
    "advantage.form": "median", "advantage.intra_form": "across", "advantage.intra_baseline": "mean",
    "advantage.intra_scale": "mad", "advantage.intra_gate": "open",
    "optimizer.schedule": "step", "learner.nonfinite": "ignore", "rollout.layers": "looped",
    "rollout.prefill_kernel": "flash", "rollout.decode_kernel": "paged", "pipeline": "async",
    "optimizer.first_moment_dtype": "float16", "optimizer.second_moment": "none", "learner.attention_kernel": "flash",
}  # fmt: skip


@pytest.mark.parametrize("field,value", CHOICE_CASES.items())
def test_choice(field, value):
  cfg = config.Config()
  # Set past the profiles, which would refuse a profile of no such name themselves.
  *parents, leaf = field.split(".")
  section = config.get(cfg, parents[0]) if parents else cfg
  changed = dataclasses.replace(section, **{leaf: value})
  cfg = dataclasses.replace(cfg, **{parents[0]: changed}) if parents else changed
  with pytest.raises(ValueError, match=rf"config\.{field}={value!r} does not exist; choose one of"):
    validation.validate(cfg, n_devices=1)


WHOLE_CASES = [
    ("seed", -1, 0), ("seed", 2**32, 2**32 - 1), ("steps", 0, 1), ("data.n_eval", -1, 0),
    ("learner.max_nonfinite", -1, 0), ("learner.max_dumps", -1, 0),
    ("data.max_prompt_tokens", 0, 1), ("data.limit", -1, 0), ("data.synthetic.min_level", 0, 1),
    ("data.synthetic.modulus", 1, 2),
    ("data.synthetic.n_problems", 0, 1), ("rollout.queries", 0, 4), ("rollout.rollouts_per_query", 0, 4),
    ("rollout.slots", -1, 0), ("rollout.segment_steps", -1, 0),
    ("rollout.top_k", -1, 0), ("reward.max_response_tokens", 0, 2560), ("optimizer.warmup_updates", -1, 0),
    ("learner.row_tokens", -1, 0), ("distributed.num_processes", -1, 0), ("distributed.timeout_s", 0, 1),
    ("distributed.process_id", -2, -1),
    ("learner.minibatches", 0, 1), ("learner.microbatch_rows", -1, 1), ("learner.logprob_chunk", 0, 1),
    ("lora.rank", -1, 0), ("mesh.rollout_tensor", -1, 1), ("mesh.rollout_devices", -1, 0),
    ("mesh.data", 0, 1), ("mesh.tensor", 0, 1), ("grading.workers", -1, 0), ("grading.memory_mib", 255, 256),
    ("checkpoint.save_every", -1, 0), ("checkpoint.max_to_keep", 0, 1), ("log.every", 0, 1),
    ("log.samples_every", -1, 0),
    ("log.n_samples", -1, 0), ("eval.top_k", -1, 0), ("eval.samples_per_problem", 0, 1), ("eval.batch_queries", 0, 1),
    ("eval.max_new_tokens", -1, 0), ("alarms.window", 0, 1), ("alarms.reference", 0, 1),
    ("eval.max_context", 1, 2), ("eval.limit", -1, 0), ("eval.every", -1, 0),
    ("eval.n_during", -1, 0), ("sft.steps", 0, 1), ("sft.rows", 0, 1), ("sft.hidden_size", 0, 8),
    ("sft.n_layers", 0, 1), ("sft.n_heads", 0, 2), ("sft.n_kv_heads", 0, 1), ("sft.mlp_size", 0, 1),
]  # fmt: skip


@pytest.mark.parametrize("field,bad,good", WHOLE_CASES)
def test_whole_number_in_range(field, bad, good):
  key = field.replace(".", "__")
  refuse(field.replace(".", r"\."), "", **{key: bad})
  check(**{key: good})


INF, NAN = float("inf"), float("nan")
REAL_CASES = [
    ("lora.alpha", (0.0, INF, NAN), (1.0,)),
    ("rollout.temperature", (0.0, -1.0, INF, NAN), (0.1,)), ("rollout.top_p", (0.0, 1.1, NAN), (0.1, 1.0)),
    ("reward.alpha", (-0.1, INF, NAN), (0.0, None)), ("reward.beta", (0.0, NAN), (1.0,)),
    ("reward.unfinished_reward", (INF, -INF, NAN), (-1.0,)), ("reward.floor", (INF, NAN), (-1.0, 0.1, None)),
    ("reward.bonus", (-0.1, INF, NAN), (0.0, 8.0)), ("reward.distance_weight", (-0.1, INF, NAN), (0.0, 4.0)),
    ("prompt.prefix_weight", (-0.1, 1.1, NAN), (0.0, 0.5)),
    ("prompt.prefix_weight_negative", (-0.1, 1.1, NAN), (None, 0.0, 0.5)), ("reward.delta", (-0.1, NAN), (0.0, None)),
    ("reward.gate_share", (-0.1, 1.1, NAN), (0.0, 1.0)), ("reward.gate_accuracy", (-0.1, 1.1, NAN), (0.0, 1.0)),
    ("reward.penalty_start", (-1.0, INF, NAN), (0.0,)), ("reward.penalty_rate", (-1.0, INF, NAN), (0.0,)),
    ("reward.target_accuracy", (-0.1, 1.1, NAN), (0.0, 1.0)), ("reward.balance", (-0.1, 1.1, NAN), (0.0, 1.0)),
    ("reward.balance_slope", (-1.0, NAN), (0.0,)), ("advantage.intra_clip", (0.0, -1.0, NAN), (0.1, None)),
    ("advantage.intra_coef", (-1.0, NAN), (0.0, 2.0)),
    ("advantage.std_eps", (0.0, NAN), (1e-9,)), ("loss.clip_low", (0.0, 1.0, NAN), (0.5,)),
    ("loss.clip_high", (0.0, 1.0, NAN), (0.5,)), ("loss.dual_clip", (1.0, NAN), (1.1, None)),
    ("loss.kl_coef", (-1.0, NAN), (0.0, 0.1)), ("loss.importance_cap", (0.0, NAN), (2.0, None)),
    ("optimizer.learning_rate", (0.0, -1.0, NAN), (1e-9,)), ("optimizer.final_fraction", (-0.1, 1.1, NAN), (0.0, 1.0)),
    ("optimizer.b1", (-0.1, 1.0, NAN), (0.0,)), ("optimizer.b2", (-0.1, 1.0, NAN), (0.0,)),
    ("optimizer.eps", (0.0, NAN), (1e-9,)), ("optimizer.weight_decay", (-1.0, NAN), (0.0,)),
    ("optimizer.clip_norm", (0.0, NAN), (0.1,)), ("grading.cpu_seconds", (0.0, NAN), (0.1,)),
    ("alarms.margin", (-0.1, 1.0, NAN), (0.0,)), ("alarms.length_spread", (-0.1, 1.1, NAN), (0.0, 1.0)),
    ("alarms.sentence_drop", (-1.0, NAN), (0.0, 9.0)), ("alarms.solved", (-0.1, 1.1, NAN), (1.0,)),
    ("alarms.entropy_low", (-0.1, 1.1, NAN), (0.0,)), ("alarms.entropy_high", (-1.0, NAN), (0.0, 9.0)),
    ("alarms.clip_share", (-0.1, 1.1, NAN), (0.0,)), ("alarms.truncated", (-0.1, 1.1, NAN), (0.0,)),
    ("alarms.timeouts", (-0.1, 1.1, NAN), (0.0,)), ("alarms.zero_variance", (-0.1, 1.1, NAN), (0.0,)),
    ("alarms.ratio_max", (-1.0, NAN), (0.0, 9.0)), ("alarms.grad_spike", (-1.0, NAN), (0.0, 9.0)),
    ("alarms.sampler_gap", (-0.1, 1.1, NAN), (0.0, 1.0)),
    ("eval.best_max_tokens", (0.0, NAN), (1.0, None)), ("eval.best_min_accuracy", (-0.1, 1.1, NAN), (0.0, 1.0, None)),
    ("eval.temperature", (-1.0, NAN), (0.0,)), ("eval.top_p", (0.0, 1.1, NAN), (1.0,)),
    ("sft.learning_rate", (0.0, NAN), (0.1,)), ("sft.weight_decay", (-1.0, NAN), (0.0,)),
    ("sft.budget_share", (-0.1, 1.1, NAN), (0.0, 1.0)),
    ("sft.stated_share", (-0.1, 1.1, NAN), (0.0, 1.0)),
]  # fmt: skip


@pytest.mark.parametrize("field,bad,good", REAL_CASES)
def test_real_number_in_range(field, bad, good):
  key = field.replace(".", "__")
  for value in bad:
    refuse(field.replace(".", r"\."), "is out of range; give a number in", **{key: value})
  for value in good:
    check(**{key: value})


def test_every_number_has_a_rule():
  # A new setting with numbers needs a line here and in validation.py. Budgets, caps and fsdp have rules of their own.
  own_rules = {"mesh.fsdp", "data.synthetic.max_level", "advantage.std_ddof"}
  numbers = {n for n, f in config.field_table().items() if f.type in (int, float, float | None)}
  assert numbers == {n for n, *_ in WHOLE_CASES} | {n for n, *_ in REAL_CASES} | own_rules


# Budgets, caps, subgroups.

@pytest.mark.parametrize("budgets,words", [
    ((), "is empty"), ((0, 8), "not positive"), ((8, 8), "write 8."), ((16, 8), "write 8,16."),
    ((512, 1024, 2048, 4097), "exceeds config.reward.max_response_tokens=4096"),
])  # fmt: skip
def test_budgets(budgets, words):
  refuse(r"rollout\.budgets", words, rollout__budgets=budgets)


def test_budget_may_equal_the_longest_response():
  check(rollout__budgets=(512, 4096))


@pytest.mark.parametrize("sizes", [(128, 64), (64, 64), (0, 64)])
def test_length_buckets_ascend(sizes):
  refuse(r"rollout\.length_buckets", "ascending order", rollout__length_buckets=sizes)
  check(rollout__length_buckets=(64, 128))


def test_cudnn_needs_16_bits():
  refuse(r"rollout\.prefill_kernel", "bfloat16", rollout__prefill_kernel="cudnn", model__compute_dtype="float32")
  check(rollout__prefill_kernel="cudnn")


def test_rollouts_split_over_budgets():
  refuse(r"rollout\.rollouts_per_query", "not divisible by the 3 budgets of config.rollout.budgets; give 15 or 18",
         rollout__budgets=(8, 16, 32), rollout__rollouts_per_query=16)
  refuse(r"rollout\.rollouts_per_query", "give 4.", rollout__rollouts_per_query=3)
  check(rollout__budgets=(8, 16, 32), rollout__rollouts_per_query=18)


@pytest.mark.parametrize("caps,words", [
    ((4096,), "has 1 caps for 4 budgets"),
    ((511, 4096, 4096, 4096), "has cap 511 below its budget 512"),
    ((512, 1024, 2048, 4097), "has cap 4097 beyond config.reward.max_response_tokens=4096"),
])  # fmt: skip
def test_caps(caps, words):
  refuse(r"rollout\.caps", words, rollout__caps=caps)


def test_caps_may_equal_budgets():
  check(rollout__caps=(512, 1024, 2048, 2560))


# Reward and advantage.

@pytest.mark.parametrize("form", ["classic", "cosine", "l1_max", "alp"])
def test_reward_without_baseline_has_no_intra_term(form):
  refuse(r"advantage\.intra_coef", "needs a budget baseline", reward__form=form, advantage__intra_coef=1.0)
  check(reward__form=form, advantage__intra_coef=0.0)
  check(reward__form=form, advantage__intra_coef=1.0, advantage__intra_form="within")
  refuse(r"advantage\.intra_baseline", "is an expected f2", reward__form=form, advantage__intra_coef=0.0,
         advantage__intra_baseline="correct_length")
  check(advantage__intra_baseline="correct_length")


ADAPT = {"reward__form": "adaptthink", "advantage__intra_coef": 0.0, "rollout__budgets": (512, 4096)}
PRUNE = {"reward__form": "thinkprune", "advantage__intra_coef": 0.0, "steps": 100}
PLAIN = {"prompt__budget_sentence": "", "rollout__budgets": (4096,)}


@pytest.mark.parametrize("form", sorted(set(forms.FORMS) - set(forms.OWN)))
def test_other_methods_pass_without_a_budget_sentence_unless_the_prompt_names_the_budget(form):
  more = {"reward__form": form, "advantage__intra_coef": 0.0}
  if form == "thinkprune":
    more |= {"reward__limits": (4000,)}
  if form == "adaptthink":
    check(**ADAPT, prompt__openings=("natural", "</think>"))
  elif forms.FORMS[form].reads_budget:
    refuse(r"prompt\.budget_sentence", "the model must be told", **more, **PLAIN)
    check(**more)
  else:
    check(**more, **PLAIN)
  refuse(r"reward\.unfinished_reward", "is a wrong one", **more, reward__unfinished_reward=-1.0)
  refuse(r"reward\.bonus=2\.0", "is no part of", **more, reward__bonus=2.0)
  refuse(r"reward\.curve='log'", "is no part of", **more, reward__curve="log")


def test_a_run_without_a_budget_sentence():
  check(**PLAIN)
  refuse(r"prompt\.budget_sentence", "cannot tell the 4 budgets", prompt__budget_sentence="")
  refuse(r"eval\.mode", "asks for a budget sentence", **PLAIN, eval__mode="512")
  refuse(r"eval\.modes", "asks for a budget sentence", **PLAIN, eval__modes=("natural", "budgets"))


def test_openings():
  check(prompt__openings=("a", "b {budget}", "natural", "</think>"), prompt__budget_sentence="")
  refuse(r"prompt\.openings", "has 1 texts for 4 budgets", prompt__openings=("a",))
  refuse(r"prompt\.openings", "write natural", prompt__openings=("a", " ", "b", "c"))
  refuse(r"prompt\.openings", "does not close the thought", **ADAPT)
  refuse(r"prompt\.openings", "does not close the thought", **ADAPT, prompt__openings=("</think>", "</think>"))


def test_the_weight_of_a_prefix_needs_a_prefix_with_loss():
  refuse(r"prompt\.prefix_weight=0\.5", "prefix_role=action", prompt__prefix_weight=0.5, prompt__prefix_role="context")
  check(prompt__prefix_weight=0.5)


@pytest.mark.parametrize("field,words,changes", [
    (r"reward\.limits", "is empty", {}),
    (r"reward\.limits", "descending", {"reward__limits": (2000, 4000), "reward__limit_steps": (9,)}),
    (r"reward\.limits", "exceeds config.reward.max_response_tokens=4096", {"reward__limits": (5000,)}),
    (r"reward\.limit_steps", "has 0 steps for the 1 changes", {"reward__limits": (4000, 2000)}),
    (r"reward\.limit_steps", "ascending", {"reward__limits": (4000, 3000, 2000), "reward__limit_steps": (9, 9)}),
    (r"reward\.limit_steps", "the run's 100 steps", {"reward__limits": (4000, 2000), "reward__limit_steps": (100,)}),
])  # fmt: skip
def test_limits(field, words, changes):
  refuse(field, words, **PRUNE, **changes)
  check(**PRUNE, reward__limits=(4000, 3000, 2000), reward__limit_steps=(1, 99))
  refuse(r"reward\.limits", "is not read", reward__limits=(4000,))


def test_advantage_forms():
  refuse(r"advantage\.form", "which responses think", advantage__form="reference")
  check(**ADAPT, prompt__openings=("natural", "</think>"), advantage__form="reference")
  one = {"rollout__budgets": (512,), "rollout__rollouts_per_query": 1, "advantage__std_ddof": 0}
  refuse(r"advantage\.form", "compares a response", **one, advantage__form="leave_one_out")
  four = {"rollout__rollouts_per_query": 4, "advantage__intra_form": "within"}
  refuse(r"advantage\.std_ddof", "subgroups of 1", **four, advantage__std_ddof=1)
  check(**four, advantage__std_ddof=0)


def test_std_needs_a_degree_of_freedom():
  one = {"rollout__budgets": (512,), "rollout__rollouts_per_query": 1}
  refuse(r"advantage\.std_ddof", "leaves no degree of freedom", advantage__std_ddof=1, **one)
  check(advantage__std_ddof=0, **one)


@pytest.mark.parametrize("path", ["grader", "my.", "a.b()", ".a"])
def test_grader_is_a_dotted_path(path):
  refuse(r"reward\.grader", "is not a dotted path", reward__grader=path)
  check(reward__grader="my_tasks.grading.exact")


# Text.

def test_budget_sentence_has_a_place_for_the_budget():
  refuse(r"prompt\.budget_sentence", "does not contain {budget}", prompt__budget_sentence="within 512 tokens")


@pytest.mark.parametrize("mode", ["fast", "", "0", "-5", "1.5", "²"])
def test_eval_mode(mode):
  refuse(r"eval\.mode", "choose natural, efficiency, a budget", eval__mode=mode)


@pytest.mark.parametrize("mode", ["natural", "efficiency", "1024"])
def test_eval_modes_that_exist(mode):
  check(eval__mode=mode)


def test_data_source_is_named():
  refuse(r"data\.source", "is empty", data__source="")
  refuse(r"data\.source", "names no data set", data__source="tfds:")
  refuse(r"data\.eval_source", "names no data set", data__eval_source="tfds:")


# Batch and mesh.

def test_minibatches_divide_queries():
  refuse(r"learner\.minibatches", "does not divide config.rollout.queries=64; choose one of 1, 2, 4",
         learner__minibatches=3)


def test_microbatches_divide_a_minibatch():
  refuse(r"learner\.microbatch_rows", "does not divide the 256 rows of a minibatch", learner__microbatch_rows=48)
  check(learner__microbatch_rows=64)


def test_mesh_covers_the_devices():
  refuse(r"mesh\.data", "does not divide the 8 devices", n_devices=8, mesh__data=3)
  refuse(r"mesh\.data", "times config.mesh.tensor=3", n_devices=8, mesh__tensor=3)
  refuse(r"mesh\.fsdp", "makes a mesh of 4 devices where there are 8", n_devices=8, mesh__data=2, mesh__fsdp=2)
  refuse(r"mesh\.fsdp", "makes a mesh of 16 devices where there are 8", n_devices=8, mesh__data=8, mesh__fsdp=2)
  refuse(r"mesh\.fsdp", "is not a number of devices", mesh__fsdp=0)
  refuse(r"mesh\.fsdp", "is not a number of devices", mesh__fsdp=-2)
  check(n_devices=8, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)


def test_mesh_divides_the_batch():
  small = {"rollout__queries": 4, "learner__minibatches": 1}
  refuse(r"rollout\.queries", "not divisible by the data x fsdp = 8 shards", n_devices=8, **small)
  check(n_devices=8, mesh__tensor=2, **small)
  refuse(r"learner\.minibatches", "makes minibatches of 4 rows", n_devices=8, rollout__queries=8,
         rollout__rollouts_per_query=4, learner__minibatches=8)
  refuse(r"learner\.microbatch_rows", "not divisible by the data x fsdp = 8 shards", n_devices=8,
         learner__microbatch_rows=4)
  refuse(r"eval\.batch_queries", "not divisible by the data x fsdp = 8 shards", n_devices=8, data__n_eval=8,
         eval__batch_queries=4)
  check(n_devices=8, eval__batch_queries=4)  # no evaluation


# The rest.

def test_synthetic_task():
  refuse(r"data\.synthetic\.max_level", "is below config.data.synthetic.min_level=3", data__synthetic__min_level=3,
         data__synthetic__max_level=2)
  for modulus in (4, 9, 49):
    refuse(r"data\.synthetic\.modulus", "is not a prime", data__synthetic__modulus=modulus)
  check(data__synthetic__modulus=11, data__synthetic__max_level=1)


def test_warmup_fits_the_run():
  refuse(r"optimizer\.warmup_updates", "exceeds the run's 8 updates", steps=2, optimizer__warmup_updates=9)
  check(steps=2, optimizer__warmup_updates=8)


def test_new_model_has_whole_heads():
  refuse(r"sft\.n_kv_heads", "does not divide config.sft.n_heads=4", sft__n_kv_heads=3)
  refuse(r"sft\.hidden_size", "does not split into 4 heads", sft__hidden_size=100)


# The model's context.

def test_prompt_and_response_fit_the_context():
  check(arch=ARCH)  # 1024 + 4096 = 5120
  refuse(r"data\.max_prompt_tokens", "exceeds the model's context of 5120 tokens; lower data.max_prompt_tokens or "
         "reward.max_response_tokens", arch=ARCH, data__max_prompt_tokens=1025)
  caps = {"rollout__caps": (1024, 1024, 2048, 3000), "data__max_prompt_tokens": 2120}
  check(arch=ARCH, **caps)
  refuse(r"data\.max_prompt_tokens", "config.rollout.caps", arch=ARCH, **(caps | {"data__max_prompt_tokens": 2121}))


def test_an_uncounted_prefix_needs_room_too():
  check(arch=ARCH, prefix_tokens=12)
  refuse(r"data\.max_prompt_tokens", "12 of the budget sentence", arch=ARCH, prefix_tokens=12,
         rollout__count_prefix_tokens=False)


def test_evaluation_during_training_needs_problems():
  refuse(r"eval\.every", "config.data.n_eval is 0; set data.n_eval", eval__every=5)
  check(eval__every=5, data__n_eval=64)


EVALUATION = {"eval__benchmarks": ("gsm8k",), "model__path": "m"}


@pytest.mark.parametrize("field,words,overrides", [
    (r"eval\.benchmarks", "give --config.benchmarks=", {"eval__benchmarks": ()}),
    (r"eval\.modes", "is empty", {"eval__modes": ()}),
    (r"eval\.modes", "has the mode '0'", {"eval__modes": ("natural", "0")}),
    (r"eval\.top_p", "out of range", {"eval__top_p": 0.0}),
    (r"mesh\.fsdp", "makes a mesh of 3 devices", {"mesh__fsdp": 3}),
])
def test_an_evaluation_that_cannot_work(field, words, overrides):
  with pytest.raises(ValueError, match=rf"config\.{field}.*{re.escape(words)}"):
    validation.validate_evaluation(make(**EVALUATION | overrides), n_devices=1)


def test_an_evaluation_does_not_ask_training_to_fit():
  cfg = make(**EVALUATION, rollout__queries=7, rollout__budgets=(10_000,), eval__modes=("natural", "budgets", "512"))
  validation.validate_evaluation(cfg, n_devices=4)
  with pytest.raises(ValueError):
    validation.validate(cfg, n_devices=4)


def test_evaluation_fits_the_context():
  refuse(r"data\.max_prompt_tokens", "config.eval.max_new_tokens=4097", arch=ARCH, data__n_eval=64,
         eval__max_new_tokens=4097)
  check(arch=ARCH, eval__max_new_tokens=4097)  # no evaluation


# Rollouts beside updates.

def test_one_step_off_needs_a_correction_and_devices_of_its_own():
  off = {"pipeline": "one_step_off"}
  refuse("pipeline", "set loss.importance_cap", **off)
  off["loss__importance_cap"] = 2.0
  check(**off)
  refuse("pipeline", "which 8 devices cannot do together", n_devices=8, **off)
  check(n_devices=8, mesh__rollout_devices=4, **off)
  refuse("mesh\\.rollout_devices", "leaves none of the 8 devices", n_devices=8, mesh__rollout_devices=8, **off)
  refuse("mesh\\.rollout_tensor", "does not divide the 4 devices", n_devices=8, mesh__rollout_devices=4,
         mesh__rollout_tensor=3, **off)


def test_devices_for_rollouts_alone_would_idle_on_policy():
  refuse("mesh\\.rollout_devices", "would idle", n_devices=8, mesh__rollout_devices=4)
  check(n_devices=8, mesh__rollout_tensor=2)
  refuse("mesh\\.rollout_tensor", "does not divide the 8 devices", n_devices=8, mesh__rollout_tensor=3)


@pytest.mark.parametrize("field", ["rollout.prefill_kernel", "learner.attention_kernel"])
def test_cudnn_needs_sixteen_bits(field):
  name = field.replace(".", "__")
  refuse(field.replace(".", "\\."), "needs 16 bits", model__compute_dtype="float32", **{name: "cudnn"})
  check(model__compute_dtype="bfloat16", **{name: "cudnn"})


def test_a_row_must_hold_the_longest_response_with_its_prompt():
  settings = dict(data__max_prompt_tokens=100, reward__max_response_tokens=2560, arch=ARCH)
  refuse("learner\\.row_tokens", "shorter than a prompt of 100 and a response of 2560", learner__row_tokens=2659,
         **settings)
  check(learner__row_tokens=2660, **settings)
