"""The doctor: a healthy sampler passes; each fault, put into the sampler or the trainer, is called by its name."""

import dataclasses
import functools
import json
import types

import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
import pytest
from tokenizers import processors

from hbpo_jax import assemble, config, diagnosis, doctor, flags
from hbpo_jax.data.pipeline import Pipeline
from hbpo_jax.data.problems import load_train_and_eval
from hbpo_jax.data.prompts import PromptBuilder
from hbpo_jax.learning.learner import Learner
from hbpo_jax.models import architecture, sharding, weights
from hbpo_jax.structs import make_batch, rows_to_groups
from tests import checkpoints
from tests.system import runs

TEMPERATURE = 0.73  # On no grid.


class Bench:
  """A tiny checkpoint on one device; what is compiled is shared by all tests."""

  def __init__(self, folder):
    runs.make_inputs(folder)
    self.folder = folder
    self.cfg = runs.make_config(runs.settings(folder, rollout__budgets=(8, 16), rollout__caps=(12, 20)))
    directory = folder / "model"
    arch = architecture.from_hf_config(directory)
    self.tokenizer = assemble.load_tokenizer(directory, arch)
    mesh = sharding.make_mesh(self.cfg.mesh, jax.devices()[:1])
    builder = PromptBuilder(self.tokenizer, self.cfg, str(directory))
    self.model = assemble.Model(directory, arch, builder, mesh, mesh)
    self.learner = Learner(arch, self.cfg, mesh)
    self.params = weights.load(directory, arch, mesh, param_dtype="float32")
    problems, _ = load_train_and_eval(self.cfg.data, 0)
    self.problems, self.prompts = next(iter(Pipeline(problems, self.model.builder, self.cfg)))
    self.engine = functools.cache(lambda cfg: assemble.training_engine(cfg, self.model))
    self.rollouts = functools.cache(lambda cfg=self.cfg: self.generate(cfg, self.params))

  def generate(self, cfg, params):
    engine = self.engine(cfg)
    return jax.device_get(engine.generate(engine.publish(params), self.prompts, jax.random.key(0)))

  def scorer(self, kind=diagnosis.Scorer, published=None):
    return kind(self.learner, self.params, self.params if published is None else published, lambda p: p)

  def case(self, rollouts=None, score=None, cfg=None):
    return diagnosis.compare(
        self.prompts, self.rollouts() if rollouts is None else rollouts, score or self.scorer(), cfg or self.cfg)

  def resampled(self, **fields):
    """The rollouts with the log-probabilities that a sampler would give whose rows had these fields."""
    rollouts = self.rollouts()
    batch = jax.device_get(make_batch(self.prompts, rollouts))
    logp_RC = self.scorer()(batch.replace(**{name: make(batch, self.prompts) for name, make in fields.items()}))
    _, G, J = rollouts.n_tokens_BGJ.shape
    widths = tuple(g.shape[-1] for g in rollouts.tokens)
    return rollouts.replace(logp_sampler=tuple(map(np.asarray, rows_to_groups(logp_RC, G, J, widths))))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
  # Engines that differ in temperature or top-p only are one program: compiled once, then read back.
  settings = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
              "jax_persistent_cache_min_compile_time_secs": 0.5}
  before = {name: getattr(jax.config, name) for name in settings}

  def apply(values):
    for name, value in values.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()

  apply(settings)
  yield Bench(tmp_path_factory.mktemp("doctor"))
  apply(before)


def with_rollout(cfg, **changes):
  return dataclasses.replace(cfg, rollout=dataclasses.replace(cfg.rollout, **changes))


def diagnosed(bench, case):
  """(report, names of the findings that explain the gap) of an unhealthy case."""
  report = doctor.examine(case, bench.problems, bench.model)
  assert not report.healthy and "NOT HEALTHY" in report.verdict
  return report, [f.name for f in report.findings if f.verdict == "explains"]


def padded_positions(batch, prompts):
  """Positions of a row whose response starts at P, however short the prompt."""
  P = prompts.tokens_BP.shape[1]
  padding_R = P - np.repeat(prompts.n_prompt_B, len(batch.tokens_RT) // len(prompts.n_prompt_B))
  assert len(set(padding_R)) > 1
  return batch.position_RT + (padding_R[:, None] * (np.arange(batch.tokens_RT.shape[1]) >= P)).astype(np.int32)


def test_a_healthy_sampler_passes(bench):
  report = doctor.examine(bench.case(), bench.problems, bench.model)
  assert report.healthy and report.verdict.startswith("healthy: sampler and trainer agree")
  assert report.case.gap["sampler_gap_max"] < 1e-4 and report.case.gap["sampler_outside_clip"] == 0
  assert not [f for f in report.findings if f.verdict not in ("fine", "note")], "a healthy gap needs no hypothesis"
  assert len(report.rows) == 16 and all(row["first"] is None for row in report.rows)
  assert sum(row["tokens"] for row in report.rows) == report.to_json()["tokens"]


def test_another_temperature_in_the_sampler(bench):
  report, causes = diagnosed(bench, bench.case(bench.rollouts(with_rollout(bench.cfg, temperature=TEMPERATURE))))
  assert causes == ["temperature"]
  assert "the sampler draws at temperature 0.73, the trainer divides" in report.verdict
  # Forced tokens have a temperature too, so the gap begins at the first token.
  worst = report.rows[0]
  assert worst["first"] == 0 and worst["text"] == bench.tokenizer.decode([worst["token"]])
  assert worst["mean"] >= report.case.gap["sampler_gap_mean"] and worst["max"] >= worst["mean"]


def test_a_trainer_that_ignores_the_temperature(bench):
  cfg = with_rollout(bench.cfg, temperature=TEMPERATURE)
  report, causes = diagnosed(bench, bench.case(bench.rollouts(cfg), cfg=cfg))  # The bench's learner divides by 1.
  assert causes == ["temperature"]
  assert "the trainer does not divide its logits by rollout.temperature=0.73" in report.verdict


def test_top_p_in_training_is_said_to_be_on_purpose(bench):
  cfg = with_rollout(bench.cfg, top_p=0.8)
  report, causes = diagnosed(bench, bench.case(bench.rollouts(cfg), cfg=cfg))
  assert causes == ["sampling filter"] and "rollout.top_p=0.8, rollout.top_k=0 make the two differ" in report.verdict


def test_training_with_the_sampling_of_the_evaluation(bench):
  ev = bench.cfg.eval
  rollouts = bench.rollouts(with_rollout(bench.cfg, temperature=ev.temperature, top_p=ev.top_p))
  report, causes = diagnosed(bench, bench.case(rollouts))
  assert causes == ["sampling filter"]
  assert "the evaluation's eval.top_p=0.95, eval.top_k=0 at temperature 0.6" in report.verdict


def test_a_sampler_that_counts_the_padding_in_its_positions(bench):
  report, causes = diagnosed(bench, bench.case(bench.resampled(position_RT=padded_positions)))
  assert causes == ["positions"] and "the sampler counts the prompt's padding in the positions" in report.verdict


def test_a_trainer_that_counts_the_padding_in_its_positions(bench):
  class Faulty(diagnosis.Scorer):
    def __call__(self, batch, **how):
      return super().__call__(batch.replace(position_RT=padded_positions(batch, bench.prompts)), **how)

  report, causes = diagnosed(bench, bench.case(score=bench.scorer(Faulty)))
  assert causes == ["positions"] and "the trainer counts the prompt's padding in the positions" in report.verdict


@pytest.mark.parametrize("off", [1, -1])
def test_positions_off_by_one(bench, off):
  P = bench.prompts.tokens_BP.shape[1]
  shift = lambda batch, _: batch.position_RT + off * (np.arange(batch.tokens_RT.shape[1]) >= P).astype(np.int32)
  report, causes = diagnosed(bench, bench.case(bench.resampled(position_RT=shift)))
  assert causes == ["positions"] and f"off by one {'upwards' if off > 0 else 'downwards'}" in report.verdict


def test_padding_counted_throughout_is_harmless(bench):
  columns = lambda batch, _: np.broadcast_to(np.arange(batch.tokens_RT.shape[1], dtype=np.int32), batch.tokens_RT.shape)
  assert bench.case(bench.resampled(position_RT=columns)).agrees


def test_a_sampler_that_attends_to_the_padding(bench):
  P = bench.prompts.tokens_BP.shape[1]
  seen = lambda batch, _: np.where(np.arange(batch.tokens_RT.shape[1]) < P, 1, batch.segment_RT)
  report, causes = diagnosed(bench, bench.case(bench.resampled(segment_RT=seen)))
  assert causes == ["padding"] and "the sampler attends to the padding before the prompt" in report.verdict


def test_a_batch_that_is_not_as_documented(bench, monkeypatch):
  broken = lambda *args: (batch := make_batch(*args)).replace(position_RT=2 * batch.position_RT)
  monkeypatch.setattr(diagnosis, "make_batch", broken)
  report, causes = diagnosed(bench, bench.case())
  assert causes == ["trainer's batch"] and "look at structs.make_batch" in report.verdict


def test_stale_weights(bench):
  stale = bench.params | {"norm": bench.params["norm"] * 1.1}
  rollouts = bench.generate(bench.cfg, stale)
  report, causes = diagnosed(bench, bench.case(rollouts, bench.scorer(published=stale)))
  # A scaled final norm is the same as another temperature (1 / 1.1), which therefore explains the gap as well.
  assert "weights" in causes and "the sampler's weights are not the trainer's in norm: stale" in report.verdict
  other = bench.params | {"embed": bench.params["embed"] + 0.02}
  logp = bench.scorer(published=other)(bench.case().batch, sampler_weights=True)
  _, G, J = rollouts.n_tokens_BGJ.shape
  groups = rows_to_groups(logp, G, J, tuple(g.shape[-1] for g in rollouts.tokens))
  case = bench.case(bench.rollouts().replace(logp_sampler=groups), bench.scorer(published=other))
  report, causes = diagnosed(bench, case)
  assert causes == ["weights"] and "in embed: stale" in report.verdict


def test_stale_weights_that_leave_no_gap(bench):
  scorer = bench.scorer(published=bench.params | {"norm": bench.params["norm"] * (1 + 1e-6)})
  case = bench.case(score=scorer)
  report = doctor.examine(case, bench.problems, bench.model)
  assert case.agrees and not report.healthy
  assert report.verdict.startswith("NOT HEALTHY: weights: the sampler's weights are not the trainer's in norm")
  assert "The gap is fine" in report.verdict


def test_stale_weights_in_another_layout(bench):
  publish = lambda params: {"all": jax.tree.leaves(params)}
  stale = publish(jax.tree.map(lambda w: 1.01 * w, bench.params))
  scorer = diagnosis.Scorer(bench.learner, bench.params, stale, publish)
  assert not scorer.scores_published() and scorer.changed_weights()[0] == "all.0"
  assert diagnosis.Scorer(bench.learner, bench.params, publish(bench.params), publish).changed_weights() == []


def test_a_bfloat16_sampler(bench):
  cfg = dataclasses.replace(bench.cfg, model=dataclasses.replace(bench.cfg.model, compute_dtype="bfloat16"))
  engine = bench.engine(cfg)
  published = engine.publish(bench.params)
  rollouts = bench.rollouts(cfg)
  scorer = diagnosis.Scorer(bench.learner, bench.params, published, engine.publish)
  report, causes = diagnosed(bench, bench.case(rollouts, scorer))
  assert causes in ([], ["precision"])
  assert "precision: the sampler computes in bfloat16 although model.compute_dtype is float32" in report.verdict
  # The same rollouts are healthy where bfloat16 was asked for.
  case = diagnosis.compare(bench.prompts, rollouts, diagnosis.Scorer(
      Learner(bench.model.arch, cfg, bench.model.mesh), bench.params, published, engine.publish), cfg)
  assert case.agrees and case.gap["sampler_gap_max"] > 1e-4


def test_the_rough_side_is_named(bench):
  """In bfloat16: noise beyond its rounding on the trainer's side, or on the sampler's."""
  cfg = dataclasses.replace(bench.cfg, model=dataclasses.replace(bench.cfg.model, compute_dtype="bfloat16"))
  noise = np.random.default_rng(0).normal(0, 0.3, jax.device_get(bench.case().batch.completion_mask_RC).shape)

  class Rough(diagnosis.Scorer):
    def __call__(self, batch, *, dtype=None, **how):
      return super().__call__(batch, dtype=dtype, **how) + noise * (dtype is None and not how)

  report, _ = diagnosed(bench, bench.case(score=bench.scorer(Rough), cfg=cfg))
  assert "the trainer is the rough side" in report.verdict
  _, G, J = bench.rollouts().n_tokens_BGJ.shape
  own = rows_to_groups(noise, G, J, tuple(g.shape[-1] for g in bench.rollouts().tokens))
  noisy = tuple(a + b for a, b in zip(bench.rollouts().logp_sampler, own, strict=True))
  report, causes = diagnosed(bench, bench.case(bench.rollouts().replace(logp_sampler=noisy), cfg=cfg))
  assert causes == [] and "No hypothesis explains it. Mean |dlogp| is" in report.verdict
  assert any("the sampler is the side that is off" in f.text for f in report.findings)


@pytest.mark.parametrize("side", ["sampler", "trainer"])
def test_numbers_that_are_not_finite(bench, side):
  rollouts, score = bench.rollouts(), bench.scorer()
  if side == "sampler":
    rollouts = rollouts.replace(logp_sampler=tuple(np.full_like(g, np.nan) for g in rollouts.logp_sampler))
  else:
    class Broken(diagnosis.Scorer):
      def __call__(self, batch, **how):
        return np.full_like(super().__call__(batch, **how), np.nan)
    score = bench.scorer(Broken)
  report, causes = diagnosed(bench, bench.case(rollouts, score))
  assert causes == ["not finite"] and f"the {side} gives" in report.verdict
  json.dumps(doctor.json_value(report.to_json()), allow_nan=False)


# ---- Prompts and responses


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
  """make(times) -> (tokenizer that adds a BOS of its own, builder): the template writes BOS `times` times."""
  def make(times):
    tokenizer = checkpoints.make_tokenizer(tmp_path_factory.mktemp("bos"))
    bos = checkpoints.END_OF_TEXT
    tokenizer.add_special_tokens({"bos_token": bos})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    tokenizer.chat_template = times * bos + tokenizer.chat_template
    return tokenizer, PromptBuilder(tokenizer, config.Config())
  return make


def checked(builder, tokenizer, tokens, instruction=config.PromptConfig().instruction):
  prompts = builder.batch(tokens, builder.prefix((8,)), 96)
  return doctor.check_prompts(["Add 2 and 3."] * len(tokens), prompts, builder, tokenizer, instruction)


def test_one_bos_is_fine(with_bos):
  tokenizer, builder = with_bos(1)
  assert [f.verdict for f in checked(builder, tokenizer, [builder.encode("Add 2 and 3.")])] == ["fine"]


def test_a_bos_that_the_tokenizer_adds_to_the_templates(with_bos):
  tokenizer, builder = with_bos(1)
  twice = tokenizer(builder.render("Add 2 and 3."))["input_ids"]
  assert twice[:2] == [tokenizer.bos_token_id] * 2
  bos, template = checked(builder, tokenizer, [builder.encode("Add 2 and 3."), twice])
  assert (bos.name, bos.verdict) == ("BOS", "fault") and "the tokenizer must not add it again" in bos.text
  assert (template.name, template.verdict) == ("template", "fault") and "from token 1 on" in template.text


def test_a_template_that_writes_bos_twice(with_bos):
  tokenizer, builder = with_bos(2)
  (bos,) = checked(builder, tokenizer, [builder.encode("Add 2 and 3.")])
  assert bos.verdict == "fault" and "mend the chat template, which writes both" in bos.text


def test_a_thought_that_is_opened_twice_or_never(with_bos):
  tokenizer, builder = with_bos(1)
  own = builder.encode("Add 2 and 3.")
  again = tokenizer("<think>\n", add_special_tokens=False)["input_ids"]
  for tokens in (own + again, own[:-len(again)]):
    template, thought = checked(builder, tokenizer, [tokens])
    assert (template.name, thought.name) == ("template", "thought") and "must be opened once" in thought.text


def test_responses_that_do_not_end_at_eos(bench):
  rollouts = bench.rollouts()
  finished, _ = doctor.check_responses(rollouts, bench.model.builder, bench.tokenizer)
  assert finished.verdict == "fine" and "'<|im_end|>' (2); generation_config.json names no other" in finished.text
  wrong = rollouts.replace(truncated_BGJ=np.zeros_like(rollouts.truncated_BGJ))
  (fault, _) = doctor.check_responses(wrong, bench.model.builder, bench.tokenizer)
  assert rollouts.truncated_BGJ.any() and fault.verdict == "fault" and "the sampler stops at other ids" in fault.text


def test_eos_ids_of_the_generation_config_are_named(bench):
  builder = types.SimpleNamespace(eos_ids=(0, 2), decode=bench.model.builder.decode)
  rollouts = bench.rollouts()
  rollouts = rollouts.replace(tokens=tuple(np.where(t == 0, 5, t) for t in rollouts.tokens))
  finding, _ = doctor.check_responses(rollouts, builder, bench.tokenizer)
  assert "of generation_config.json, '<|endoftext|>' (0)" in finding.text


# ---- The command


def test_the_command_on_a_healthy_checkpoint(bench, tmp_path):
  settings = runs.settings(bench.folder, rollout__budgets=(8, 16), rollout__caps=(12, 20))
  done = runs.run("doctor", settings, tmp_path / "w")
  assert done.returncode == 0, done.stderr
  assert "\nhealthy: sampler and trainer agree: mean |dlogp|" in done.stdout
  assert "the rollouts that differ most" in done.stdout and "all 16" in done.stdout
  report = json.loads((tmp_path / "w" / "doctor.json").read_text())
  assert report["healthy"] and report["sampler_gap_max"] < 1e-4 and report["tolerance"] == {"mean": 1e-5, "max": 1e-3}
  assert len(report["rows"]) == report["rollouts"] == 16


def test_the_command_ends_with_1_where_something_is_wrong(bench, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(assemble, "open_model", lambda cfg: bench.model)
  hot = with_rollout(bench.cfg, temperature=TEMPERATURE)
  monkeypatch.setattr(assemble, "training_engine", lambda cfg, model, real=assemble.training_engine: real(hot, model))
  with pytest.raises(SystemExit) as end:
    doctor.main(bench.cfg, str(tmp_path))
  assert end.value.code == 1
  out = capsys.readouterr().out
  assert "what would remain of |dlogp| if ..." in out and "\nCause: temperature: the sampler draws at" in out
  report = json.loads((tmp_path / "doctor.json").read_text())
  assert not report["healthy"] and report["findings"][0]["name"] == "temperature"
  assert report["findings"][0]["verdict"] == "explains" and report["findings"][0]["mean"] < report["sampler_gap_mean"]


@pytest.mark.parametrize("overrides, message", [
    ({"rollout.temperature": 0}, "config.rollout.temperature=0.0 is out of range"),
    ({"model.path": ""}, "model.path='' names no checkpoint"),
    ({"rollout.temprature": 1}, "config.rollout.temprature is not a setting; did you mean"),
])
def test_bad_settings_are_refused(bench, tmp_path, capsys, overrides, message):
  settings = runs.settings(bench.folder, mesh__tensor=8) | overrides
  with pytest.raises(SystemExit) as end:
    flags.run(doctor.main, name="doctor", description="", argv=runs.arguments(settings, tmp_path / "w"))
  assert end.value.code == 2
  assert message in capsys.readouterr().err and not (tmp_path / "w").exists()


def test_a_part_of_the_batch_fits_the_mesh(bench):
  for n_shards, wanted, n in ((1, 3, 3), (2, 3, 4), (4, 1, 4), (1, 99, 4)):
    problems, prompts = doctor.part_of_batch(bench.problems, bench.prompts, bench.cfg, n_shards, wanted)
    assert len(problems) == n == len(prompts.tokens_BP) == len(prompts.n_prompt_B) == len(prompts.query_B)
    assert prompts.prefix_GF is bench.prompts.prefix_GF
