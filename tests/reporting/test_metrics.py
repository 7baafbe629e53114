"""step_metrics against numbers worked out by hand."""

import types

import numpy as np
import pytest

from hbpo_jax.reporting import metrics
from hbpo_jax.structs import Rollouts

BUDGETS = (4, 8)


def case():
  """B = 2 queries, G = 2 budgets, J = 2 rollouts."""
  n_gen = np.array([[[3, 6], [8, 9]], [[4, 5], [2, 12]]], np.int32)
  p = np.log(np.array([[[0.5, 0.5, 0.9], [0.5, 0.25, 0.9]], [[1.0, 0.5, 0.9], [0.5, 1.0, 0.9]]], np.float32))
  rollouts = Rollouts(
      tokens=(np.zeros((2, 2, 3), np.int32), np.zeros((2, 2, 4), np.int32)),
      completion_mask=(np.ones((2, 2, 3), bool), np.ones((2, 2, 4), bool)),
      logp_sampler=(p, np.full((2, 2, 4), np.log(0.1), np.float32)),
      n_tokens_BGJ=n_gen, n_gen_BGJ=n_gen,
      truncated_BGJ=np.array([[[0, 0], [0, 1]], [[0, 0], [0, 1]]], bool))
  advantage = types.SimpleNamespace(
      intra_BG=np.array([[-1.0, -0.5], [-2.0, 0.0]]), inter_BGJ=np.zeros((2, 2, 2)),
      total_BGJ=np.array([[[-1.0, 1.0], [0.0, -2.0]], [[-1.0, -3.0], [4.0, 0.5]]]))
  return {
      "rollouts": rollouts, "budgets": BUDGETS, "n_prefix_G": np.array([2, 0]),
      "reward_BGJ": np.array([[[4.0, 4.0], [3.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]]),
      "score_BGJ": np.array([[[1, 1], [1, 0]], [[1, 0], [1, 0]]], bool), "advantage": advantage,
      "reasons": ["correct", "correct", "correct", "unfinished", "correct", "no_answer", "correct", "unfinished"]}


EXPECTED = {
    "reward": 15 / 8, "accuracy": 5 / 8, "mean_tokens": 49 / 8,
    "tokens_std": (379 / 8 - (49 / 8)**2)**0.5,
    "truncated": 2 / 8, "negative_advantage": 4 / 8, "zero_variance": 1 / 2,
    "unfinished": 2 / 8, "no_answer": 1 / 8, "timeout": 0.0,
    "budget_4/reward": 2.5, "budget_4/accuracy": 3 / 4, "budget_4/tokens_mean": 4.5,
    "budget_4/tokens_std": 1.25**0.5, "budget_4/overrun": 2 / 4, "budget_4/overrun_tokens": 3 / 4,
    "budget_4/truncated": 0.0, "budget_4/intra": -1.5, "budget_4/negative_advantage": 3 / 4,
    "budget_4/sentence_probability": (0.25 + 0.125 + 0.5 + 0.5) / 4,
    "budget_4/sentence_logp": np.log([0.25, 0.125, 0.5, 0.5]).mean(),
    "budget_8/reward": 1.25, "budget_8/accuracy": 2 / 4, "budget_8/tokens_mean": 31 / 4,
    "budget_8/tokens_std": (293 / 4 - (31 / 4)**2)**0.5, "budget_8/overrun": 2 / 4, "budget_8/overrun_tokens": 5 / 4,
    "budget_8/truncated": 2 / 4, "budget_8/intra": -0.25, "budget_8/negative_advantage": 1 / 4,
}


def test_every_number_by_hand():
  got = metrics.step_metrics(**case())
  assert got == pytest.approx(EXPECTED, rel=1e-6)
  assert all(type(value) is float for value in got.values())


def test_reasons_are_optional_and_may_be_an_array():
  kwargs = case()
  kwargs["reasons"] = np.array(kwargs["reasons"]).reshape(2, 2, 2)
  assert metrics.step_metrics(**kwargs) == pytest.approx(EXPECTED, rel=1e-6)
  kwargs["reasons"] = None
  got = metrics.step_metrics(**kwargs)
  assert set(EXPECTED) - set(got) == {"unfinished", "no_answer", "timeout"}


def test_scores_between_0_and_1():
  kwargs = case()
  kwargs["score_BGJ"] = np.full((2, 2, 2), 0.25)
  assert metrics.step_metrics(**kwargs)["budget_8/accuracy"] == 0.25


def test_tags_can_be_written():
  from hbpo_jax.reporting import writers
  assert all(writers._TAG.fullmatch(tag) for tag in EXPECTED)


@pytest.mark.parametrize("name, value", [
    ("budgets", (4, 8, 16)), ("reward_BGJ", np.zeros((2, 4))), ("score_BGJ", np.zeros((2, 2, 1))),
    ("n_prefix_G", np.zeros(3)), ("reasons", ["correct"] * 7)
])
def test_wrong_shapes_are_refused(name, value):
  with pytest.raises(ValueError, match=name):
    metrics.step_metrics(**(case() | {name: value}))
