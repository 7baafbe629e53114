"""Answering benchmarks: each response is stored once, whatever the batch, the other modes, and where it was stopped."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from hbpo_jax import assemble, config
from hbpo_jax.config import LogConfig
from hbpo_jax.data import synthetic
from hbpo_jax.data.prompts import PromptBuilder
from hbpo_jax.evaluation import results
from hbpo_jax.evaluation.runner import Runner
from hbpo_jax.evaluation.store import Benchmark, open_existing
from hbpo_jax.grading import Verdict
from hbpo_jax.models import decoder, presets, sharding
from hbpo_jax.reporting.console import Console

CFG = dataclasses.replace(
    config.Config(),
    model=config.ModelConfig(compute_dtype="float32"),
    data=config.DataConfig(max_prompt_tokens=16),
    prompt=config.PromptConfig(instruction="", budget_sentence="within {budget}", efficiency_sentence="minimal"),
    rollout=config.RolloutConfig(budgets=(8, 16)),
    eval=config.EvalConfig(batch_queries=4, samples_per_problem=2))
MODES = ("natural", "efficiency", "16")
MODEL_ID = {"path": "somewhere", "fingerprint": "abc"}


@pytest.fixture(scope="module")
def model():
  tokenizer = synthetic.make_tokenizer(CFG.data.synthetic, CFG.rollout.budgets)
  mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
  arch = dataclasses.replace(presets.preset("tiny_qwen3"), vocab_size=len(tokenizer))
  return assemble.Model(pathlib.Path(), arch, PromptBuilder(tokenizer, CFG), mesh, mesh)


@pytest.fixture(scope="module")
def params(model):
  return decoder.init(model.arch, jax.random.key(0), jnp.float32)


def judge(responses, problems):
  return [Verdict(float("check" in r), "correct" if "check" in r else "wrong") for r in responses]


def benchmark(n, name="eval"):
  return Benchmark(name, "Evaluation", tuple(synthetic.problems(CFG.data.synthetic, 0, "eval", n)))


def make_runner(model, benchmarks, *, grade=judge, modes=("natural",), n_samples=2, **more):
  options = {"n_new": 12, "n_prompt_slots": 16} | more
  return Runner(CFG, model, benchmarks, grade, modes=modes, n_samples=n_samples, **options)


@pytest.fixture
def console(tmp_path):
  with open(tmp_path / "console.txt", "w") as file, Console(LogConfig(live=False), 1, file=file) as console:
    yield console


def measure(runner, folder, params, console, **more):
  return runner.measure(folder, MODEL_ID, lambda: params, console, "evaluation", **more)


def lines(folder, name="eval"):
  return (folder / "responses" / f"{name}.jsonl").read_text().splitlines()


def test_rows_belong_to_their_problems_and_do_not_depend_on_the_rest(model, params, tmp_path, console):
  found = measure(make_runner(model, [benchmark(7)]), tmp_path / "seven", params, console)
  rows = found.rows["eval"]
  assert [(r["id"], r["sample"]) for r in rows] == [(p.id, j) for p in benchmark(7).problems for j in range(2)]
  summary = results.summary(rows)
  assert summary["n"] == 7 and sum(level["n"] for level in summary["by_level"]) == 7
  assert summary["accuracy"] == pytest.approx(sum(row["score"] for row in rows) / 14)
  assert summary["mean_tokens"] == pytest.approx(sum(row["n_gen"] for row in rows) / 14)
  assert all(row["n_gen"] == 12 for row in rows if row["truncated"])
  # Problem 4 leads the second batch of 7, and of 5, which is filled up.
  fewer = measure(make_runner(model, [benchmark(5)]), tmp_path / "five", params, console).rows["eval"]
  assert fewer == rows[:10]
  assert len({row["response"] for row in rows}) > 10, "problems and samples must draw differently"


def test_token_counts_are_the_tokenizers(model, params, tmp_path, console):
  for row in measure(make_runner(model, [benchmark(6)], modes=MODES), tmp_path / "e", params, console).rows["eval"]:
    n_text = len(model.builder._encode_plain(row["response"]))  # This tokenizer gives back what it was given.
    assert row["n_gen"] == n_text + (not row["truncated"])  # and the EOS that ended it
    opened = row["response"].partition("</think>")
    assert row["n_think"] == (len(model.builder._encode_plain(opened[0] + opened[1])) if opened[1] else row["n_gen"])


def test_modes_force_their_sentence_and_do_not_disturb_each_other(model, params, tmp_path, console):
  rows = measure(make_runner(model, [benchmark(4)], modes=MODES), tmp_path / "all", params, console).rows["eval"]
  by_mode = {mode: [r for r in rows if r["mode"] == mode] for mode in MODES}
  assert [len(part) for part in by_mode.values()] == [8, 8, 8]
  assert all(r["response"].startswith("minimal") for r in by_mode["efficiency"])
  assert all(r["response"].startswith("within 16") for r in by_mode["16"])
  assert sum(r["response"].startswith(("minimal", "within 16")) for r in by_mode["natural"]) < 3  # by chance
  # Natural is the first subgroup here and there, so it draws the same numbers.
  alone = measure(make_runner(model, [benchmark(4)]), tmp_path / "one", params, console).rows["eval"]
  assert [r["response"] for r in alone] == [r["response"] for r in by_mode["natural"]]


def test_nothing_stored_is_made_again(model, params, tmp_path, console):
  whole = measure(make_runner(model, [benchmark(7)], modes=MODES), tmp_path / "whole", params, console)
  cut = tmp_path / "cut"
  measure(make_runner(model, [benchmark(7)], modes=MODES), cut, params, console)
  file = cut / "responses" / "eval.jsonl"
  kept = file.read_text().splitlines(keepends=True)[:17]
  file.write_text("".join(kept) + '{"id": "half a li')  # as a kill leaves it
  runner = make_runner(model, [benchmark(7)], modes=MODES)
  with runner.open(cut, MODEL_ID) as store:
    assert runner.missing(store) == 7 * 3 * 2 - 17
  again = measure(runner, cut, params, console)
  assert again.rows == whole.rows and file.read_text().startswith("".join(kept))
  assert len(lines(cut)) == 7 * 3 * 2 and runner.ledger.useful + runner.ledger.truncated > 0

  def refuse():
    raise AssertionError("the weights are not needed")

  done = make_runner(model, [benchmark(7)], modes=MODES)
  assert done.measure(cut, MODEL_ID, refuse, console, "evaluation").rows == whole.rows


def test_more_modes_samples_and_problems_may_be_added(model, params, tmp_path, console):
  folder = tmp_path / "e"
  first = measure(make_runner(model, [benchmark(3)], n_samples=1), folder, params, console).rows["eval"]
  later = measure(make_runner(model, [benchmark(5)], modes=MODES[:2]), folder, params, console).rows["eval"]
  assert len(later) == 5 * 2 * 2 and all(row in later for row in first)
  assert {json.dumps(row) for row in first} == set(lines(folder)[:3])
  assert open_existing(folder).manifest["samples_per_problem"] == 2


def test_a_response_outlives_a_grader_that_fails(model, params, tmp_path, console):
  calls = []

  def failing(responses, problems):
    calls.append(len(responses))
    raise RuntimeError("no grader")

  folder = tmp_path / "e"
  with pytest.raises(RuntimeError, match="no grader"):
    measure(make_runner(model, [benchmark(4)], grade=failing), folder, params, console)
  stored = [json.loads(line) for line in lines(folder)]
  assert len(stored) == calls[0] and all(row["score"] is None for row in stored)
  assert open_existing(folder).rows["eval"] == [] and "without a verdict" in open_existing(folder).notes[0]
  found = measure(make_runner(model, [benchmark(4)]), folder, params, console).rows["eval"]
  assert len(found) == 8 and all(row["reason"] in ("correct", "wrong") for row in found)
  texts = {(row["id"], row["sample"]): row["response"] for row in found}
  assert all(texts[row["id"], row["sample"]] == row["response"] for row in stored), "generated again"


def test_a_response_ends_where_the_context_is_full(model, params, tmp_path, console):
  lengths = [len(model.builder.encode(p.problem)) for p in benchmark(6).problems]
  context = max(lengths) + 3  # The longest prompt leaves 3 tokens, the others more.
  runner = make_runner(model, [benchmark(6)], n_samples=4, n_prompt_slots=0, context=context)
  for row in measure(runner, tmp_path / "e", params, console).rows["eval"]:
    room = context - lengths[[p.id for p in benchmark(6).problems].index(row["id"])]
    assert row["n_gen"] == min(room, 12) if row["truncated"] else row["n_gen"] <= min(room, 12)
  # A prompt that fills it is answered with nothing, which is wrong.
  small = make_runner(model, [benchmark(6)], n_prompt_slots=0, context=max(lengths))
  longest = benchmark(6).problems[lengths.index(max(lengths))].id
  rows = measure(small, tmp_path / "small", params, console).rows["eval"]
  assert {(r["n_gen"], r["response"], r["truncated"]) for r in rows if r["id"] == longest} == {(0, "", True)}
  assert len(rows) == 12


def test_benchmarks_share_batches_and_keep_their_files(model, params, tmp_path, console):
  a, b = benchmark(3, "a"), Benchmark("b", "B", tuple(synthetic.problems(CFG.data.synthetic, 5, "eval", 3)))
  found = measure(make_runner(model, [a, b]), tmp_path / "e", params, console)
  assert [r["id"] for r in found.rows["a"][::2]] == [p.id for p in a.problems]
  assert [r["id"] for r in found.rows["b"][::2]] == [p.id for p in b.problems]
  alone = measure(make_runner(model, [b]), tmp_path / "b", params, console)
  assert alone.rows["b"] == found.rows["b"], "a benchmark's answers do not depend on the others"


def test_the_first_problems_only(model, params, tmp_path, console):
  runner = make_runner(model, [benchmark(7)])
  assert len(measure(runner, tmp_path / "e", params, console, limit=2).rows["eval"]) == 4
  assert len(measure(runner, tmp_path / "e", params, console).rows["eval"]) == 14


def test_an_over_long_evaluation_prompt_is_refused(model):
  with pytest.raises(ValueError, match="data.max_prompt_tokens=4"):
    make_runner(model, [benchmark(3)], n_prompt_slots=4)
