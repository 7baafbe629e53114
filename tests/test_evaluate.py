"""Evaluation: one row per response in order, whatever the batch; a stored measurement is not made again."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import pytest

from hbpo_jax import assemble, config, evaluate
from hbpo_jax.data import synthetic
from hbpo_jax.data.prompts import PromptBuilder
from hbpo_jax.grading import Verdict
from hbpo_jax.models import decoder, presets, sharding

CFG = dataclasses.replace(
    config.Config(),
    model=config.ModelConfig(compute_dtype="float32"),
    data=config.DataConfig(max_prompt_tokens=16, n_eval=7),
    prompt=config.PromptConfig(instruction="", budget_sentence="within {budget}", efficiency_sentence="minimal"),
    rollout=config.RolloutConfig(budgets=(8, 16)),
    reward=config.RewardConfig(max_response_tokens=12),
    eval=config.EvalConfig(batch_queries=4, samples_per_problem=2))


@pytest.fixture(scope="module")
def model():
  builder = PromptBuilder(synthetic.make_tokenizer(CFG.data.synthetic, CFG.rollout.budgets), CFG)
  mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
  return assemble.Model(pathlib.Path(), presets.preset("tiny_qwen3"), builder, mesh)


@pytest.fixture(scope="module")
def params(model):
  # The tokenizer knows the first ids only; the head's other rows never win.
  drawn = decoder.init(model.arch, jax.random.key(0), jnp.float32)
  known = jnp.arange(model.arch.vocab_size)[:, None] < 40
  return drawn | {name: jnp.where(known, drawn[name], 0.0) for name in ("embed", "head") if name in drawn}


def judge(responses, problems):
  return [Verdict(float("check" in r), "correct" if "check" in r else "wrong") for r in responses]


def problems(n):
  return synthetic.problems(CFG.data.synthetic, 0, "eval", n)


def test_rows_belong_to_their_problems_and_do_not_depend_on_the_rest(model, params):
  summary, rows = evaluate.Evaluation(CFG, model, problems(7), judge).measure(params)
  assert [row["id"] for row in rows] == [p.id for p in problems(7) for _ in range(2)]
  assert summary["n"] == 7 and sum(level["n"] for level in summary["by_level"]) == 7
  assert summary["accuracy"] == pytest.approx(sum(row["score"] for row in rows) / 14)
  assert summary["mean_tokens"] == pytest.approx(sum(row["n_gen"] for row in rows) / 14)
  assert all(row["n_gen"] == 12 for row in rows if row["truncated"])
  # Problem 4 leads the second batch of 7, and of 5, which is filled up with the first problems.
  _, fewer = evaluate.Evaluation(CFG, model, problems(5), judge).measure(params)
  assert fewer == rows[:10]
  assert len({row["response"] for row in rows}) > 10, "problems and samples must draw differently"


@pytest.mark.parametrize("mode,opening", [("natural", ""), ("efficiency", "minimal"), ("16", "within 16")])
def test_modes_force_their_sentence(model, params, mode, opening):
  cfg = dataclasses.replace(CFG, eval=dataclasses.replace(CFG.eval, mode=mode))
  _, rows = evaluate.Evaluation(cfg, model, problems(4), judge).measure(params)
  opens = [row["response"].startswith(("minimal", "within 16")) for row in rows]
  assert not any(opens) if not opening else all(row["response"].startswith(opening) for row in rows)


def test_a_measurement_is_made_once(model, params, tmp_path):
  evaluation = evaluate.Evaluation(CFG, model, problems(4), judge)
  progress = []
  first = evaluate.measure_once(tmp_path / "base", evaluation, params, lambda *a: progress.append(a))
  assert progress == [(4, 4)] and len((tmp_path / "base.jsonl").read_text().splitlines()) == 8
  assert evaluate.measure_once(tmp_path / "base", evaluation, None, lambda *a: progress.append(a)) == first
  assert progress == [(4, 4)]


def test_an_over_long_evaluation_prompt_is_refused(model):
  cfg = dataclasses.replace(CFG, data=config.DataConfig(max_prompt_tokens=4))
  with pytest.raises(ValueError, match="data.max_prompt_tokens=4"):
    evaluate.Evaluation(cfg, model, problems(3), judge)
