"""Rows of the supervised warm start."""

import dataclasses
import re

import numpy as np
import pytest

from hbpo_jax.data import synthetic
from hbpo_jax.data.problems import Problem
from hbpo_jax.data.prompts import PromptBuilder
from hbpo_jax.data.sft_data import SftData


@pytest.fixture(scope="module")
def builder(word_tokenizer, tiny_cfg):
  return PromptBuilder(word_tokenizer, tiny_cfg)


@pytest.fixture(scope="module")
def data(builder, tiny_cfg):
  return SftData(synthetic.problems(tiny_cfg.data.synthetic, 0, "train", 200), builder, tiny_cfg)


def completions(batch):
  P = batch.tokens_RT.shape[1] - batch.completion_mask_RC.shape[1]
  return [row[P:][mask] for row, mask in zip(batch.tokens_RT, batch.completion_mask_RC, strict=True)]


def test_rows_are_laid_out_as_batch_says(data, builder, word_tokenizer):
  batch = data.batch(0)
  assert batch.tokens_RT.shape == batch.segment_RT.shape == batch.position_RT.shape == (64, 20 + 64)
  assert batch.completion_mask_RC.shape == (64, 64) and batch.completion_mask_RC.dtype == bool
  assert batch.advantage_RC is None
  for r in range(64):
    real = np.flatnonzero(batch.segment_RT[r])
    assert (np.diff(real) == 1).all() and real[0] <= 19
    assert batch.position_RT[r, real].tolist() == list(range(len(real)))
    assert not batch.tokens_RT[r, batch.segment_RT[r] == 0].any()
    completion_slots = np.flatnonzero(batch.completion_mask_RC[r])
    assert completion_slots.tolist() == list(range(real[-1] + 1 - 20))
    prompt = word_tokenizer.decode(batch.tokens_RT[r, real[0]:20])
    assert prompt.startswith("<user> ") and prompt.endswith(" <assistant> <think>")
    assert batch.tokens_RT[r, real[-1]] == word_tokenizer.eos_token_id


def test_traces_solve_their_problem_at_verbose_length(data, word_tokenizer):
  lengths, levels = [], []
  for step in range(5):
    batch = data.batch(step)
    for row, tokens in zip(batch.tokens_RT, completions(batch), strict=True):
      problem = re.search(r"<user> (.*) <assistant>", word_tokenizer.decode(row)).group(1)
      worked = synthetic.steps(problem, 7)
      assert word_tokenizer.decode(tokens).endswith(f"</think> \\boxed{{{worked[-1][2]}}} <eos>")
      lengths.append(len(tokens))
      levels.append(len(worked))
  assert 42 < np.mean(lengths) < 47 and max(lengths) <= 64
  assert abs(np.corrcoef(lengths, levels)[0, 1]) < 0.2


def test_a_share_opens_with_a_sentence_of_any_budget(data, builder, word_tokenizer, tiny_cfg, change):
  stated = [m.group(1) if (m := re.match(r"within (\d+) ", word_tokenizer.decode(c))) else ""
            for step in range(5) for c in completions(data.batch(step))]
  assert 0.4 < np.mean([s != "" for s in stated]) < 0.6
  for budget in ("8", "16", "32", "40"):
    assert stated.count(budget) > 20
  for share, expected in ((0.0, 0), (1.0, 64)):
    cfg = change(tiny_cfg, sft={"budget_share": share})
    some_data = SftData(synthetic.problems(cfg.data.synthetic, 0, "train", 50), builder, cfg)
    some = some_data.batch(0)
    assert sum(word_tokenizer.decode(c).startswith("within") for c in completions(some)) == expected
    # The sentence is part of the target length: at most 51, and 2 by rounding to whole re-checks.
    assert max(len(c) for step in range(5) for c in completions(some_data.batch(step))) <= 53


def test_a_batch_is_a_function_of_seed_and_step(data, builder, tiny_cfg, change):
  problems = synthetic.problems(tiny_cfg.data.synthetic, 0, "train", 200)
  again = SftData(problems, builder, tiny_cfg)
  again.batch(7)
  np.testing.assert_array_equal(again.batch(3).tokens_RT, data.batch(3).tokens_RT)
  assert (data.batch(3).tokens_RT != data.batch(4).tokens_RT).any()
  other = SftData(problems, builder, change(tiny_cfg, seed=1))
  assert (other.batch(3).tokens_RT != data.batch(3).tokens_RT).any()


def given_problem(i, solution, field="solution"):
  return Problem(str(i), "3 +4", "0", "mine", extra={field: solution})


def test_given_responses_get_the_smallest_budget_that_holds_them(builder, word_tokenizer, tiny_cfg, change):
  cfg = change(tiny_cfg, sft={"budget_share": 1.0})
  # n words and EOS; the sentence adds two counted tokens.
  cases = {5: "8", 6: "16", 13: "16", 14: "32", 29: "32", 30: "40", 37: "40", 38: "40", 61: "40"}
  problems = [given_problem(n, " ".join(["wait"] * n), "response" if n % 2 else "solution") for n in cases]
  data = SftData(problems, builder, cfg)
  for tokens in completions(data.batch(0)):
    text = word_tokenizer.decode(tokens)
    assert text.startswith(f"within {cases[text.count('wait')]} wait")
  free = SftData(problems, builder, change(cfg, rollout={"count_prefix_tokens": False}))
  assert any(word_tokenizer.decode(c).startswith("within 8 wait") and len(c) == 9 for c in completions(free.batch(0)))


def test_a_sentence_without_room_is_left_out_and_long_responses_are_dropped(builder, word_tokenizer, tiny_cfg, change):
  cfg = change(tiny_cfg, sft={"budget_share": 1.0})
  problems = [given_problem(63, " ".join(["wait"] * 63)), given_problem(64, " ".join(["wait"] * 64))]
  data = SftData(problems, builder, cfg)
  assert data.n_dropped == 1
  for tokens in completions(data.batch(0)):
    assert len(tokens) == 64 and word_tokenizer.decode(tokens).startswith("wait")
  with pytest.raises(ValueError, match=r"reward.max_response_tokens=64 is shorter than every worked response"):
    SftData(problems[1:], builder, cfg)


def test_an_opened_think_of_the_response_is_not_repeated(builder, word_tokenizer, tiny_cfg, change):
  problem = given_problem(0, "<think>\nwait </think> \\boxed{0}")
  data = SftData([problem], builder, change(tiny_cfg, sft={"budget_share": 0.0}))
  assert word_tokenizer.decode(completions(data.batch(0))[0]) == "wait </think> \\boxed{0} <eos>"


def test_problems_without_response_and_tasks_without_room_are_refused(builder, tiny_cfg, change):
  with pytest.raises(ValueError, match=r"Problem 'a' has no worked response"):
    SftData([Problem("a", "3 +4", "0", "mine")], builder, tiny_cfg)
  with pytest.raises(ValueError, match=r"reward.max_response_tokens=28 has no room for traces of 8 op.*29 tokens"):
    SftData(synthetic.problems(tiny_cfg.data.synthetic, 0, "train", 50), builder,
            change(tiny_cfg, reward={"max_response_tokens": 28}))


def test_the_budget_sentence_carries_loss_in_a_share_of_the_rows(builder, tiny_cfg):
  task = dataclasses.replace(tiny_cfg.data.synthetic, traces="modes")
  cfg = dataclasses.replace(
      tiny_cfg, data=dataclasses.replace(tiny_cfg.data, synthetic=task),
      reward=dataclasses.replace(tiny_cfg.reward, max_response_tokens=64),
      sft=dataclasses.replace(tiny_cfg.sft, budget_share=1.0, stated_share=0.25, rows=400))
  builder = PromptBuilder(synthetic.make_tokenizer(task, cfg.rollout.budgets, (cfg.prompt.budget_sentence,)), cfg)
  batch = SftData(synthetic.problems(task, 0, "train", 60), builder, cfg).batch(0)
  n_opening = len(builder.budget_tokens(cfg.rollout.budgets[0]))
  has_loss = np.asarray(batch.completion_mask_RC)
  assert has_loss[:, n_opening].all()
  assert (has_loss[:, :n_opening].all(axis=1) == has_loss[:, 0]).all()
  assert has_loss[:, 0].mean() == pytest.approx(0.25, abs=0.08)


def test_traces_state_budgets_of_their_own(tiny_cfg):
  task = dataclasses.replace(tiny_cfg.data.synthetic, traces="modes")
  cfg = dataclasses.replace(
      tiny_cfg, data=dataclasses.replace(tiny_cfg.data, synthetic=task),
      reward=dataclasses.replace(tiny_cfg.reward, max_response_tokens=64),
      sft=dataclasses.replace(tiny_cfg.sft, budget_share=1.0, stated_budgets=(7, 33), rows=100))
  builder = PromptBuilder(synthetic.make_tokenizer(task, (7, 33), (cfg.prompt.budget_sentence,)), cfg)
  batch = SftData(synthetic.problems(task, 0, "train", 60), builder, cfg).batch(0)
  openings = {b: builder.budget_tokens(b) for b in (7, 33)}
  stated = [next(b for b, tokens in openings.items() if row[:len(tokens)].tolist() == tokens)
            for row in completions(batch)]
  assert set(stated) == {7, 33}
  # Each in the traces that it holds, and also in such as a smaller one would hold.
  n_response = np.asarray(batch.completion_mask_RC).sum(axis=1)
  by_budget = {b: [n for n, s in zip(n_response, stated, strict=True) if s == b] for b in (7, 33)}
  assert min(by_budget[33]) < 7 < max(by_budget[33])
