"""Grading a step whose responses come one by one."""

import dataclasses
import sys

import pytest

from hbpo_jax.config import Config, GradingConfig, RewardConfig
from hbpo_jax.data.record import Problem
from hbpo_jax.grading.journal import Journal
from hbpo_jax.grading.judge import Judge

PROBLEMS = [Problem("p1", "1 + 1?", "2", "test"), Problem("p2", "1 + 2?", "3", "test")]
RESPONSES = {(0, 0, 0): "</think> \\boxed{2}", (0, 0, 1): "</think> \\boxed{\\frac{6}{3}}", (1, 0, 0): "</think> 3",
             (1, 0, 1): "thinking"}
FINISHED = [(1, 0, 1), (0, 0, 1), (1, 0, 0), (0, 0, 0)]


def judge_one_by_one(judge, step):
  grading = judge.begin(step)
  for key in FINISHED:
    grading.submit(key, RESPONSES[key], PROBLEMS[key[0]])
  return grading.collect()


def test_one_by_one_is_as_all_at_once_and_journalled(tmp_path):
  cfg = Config(grading=GradingConfig(workers=1))
  with Judge(cfg, tmp_path) as judge:
    verdicts = judge_one_by_one(judge, 7)
    whole = judge(list(RESPONSES.values()), [PROBLEMS[key[0]] for key in RESPONSES])
  assert [verdicts[key] for key in RESPONSES] == whole
  assert [v.reason for v in whole] == ["correct", "correct", "no_answer", "unfinished"]
  kept = Journal(tmp_path).read(7)
  assert sorted(v.reason for v in kept.values()) == sorted(v.reason for v in whole)


@pytest.fixture
def module(tmp_path, monkeypatch):
  (tmp_path / "ordered_for_test.py").write_text(
      "def score(responses, problems):\n"
      "  return [i / 4 for i in range(len(responses))]\n")
  monkeypatch.syspath_prepend(str(tmp_path))
  yield "ordered_for_test.score"
  sys.modules.pop("ordered_for_test", None)


def test_a_users_function_does_not_see_which_came_first(module, tmp_path):
  cfg = dataclasses.replace(Config(), reward=RewardConfig(grader=module))
  with Judge(cfg, tmp_path) as judge:
    verdicts = judge_one_by_one(judge, 0)
  assert [verdicts[key].score for key in sorted(RESPONSES)] == [0.0, 0.25, 0.5, 0.75]
