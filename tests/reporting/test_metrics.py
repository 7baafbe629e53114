"""step_metrics against numbers worked out by hand."""

import types

import numpy as np
import pytest

from hbpo_jax.reporting import metrics
from hbpo_jax.structs import Rollouts

BUDGETS = (4, 8)
INTER = np.array([[[0.5, 1.5], [-1.0, -1.0]], [[0.25, -0.25], [0.0, 0.0]]])


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
      intra_BG=np.array([[-1.0, -0.5], [-2.0, 0.0]]), inter_BGJ=INTER,
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
    "length_spread": (5.25**0.5 + 14.1875**0.5) / 2,
    "entropy": -(4 * np.log(0.9) + 14 * np.log(0.1)) / 18,  # Slots 2 of 0..2 without the prefix, and 4 + 4 + 2 + 4.
    "unfinished": 2 / 8, "no_answer": 1 / 8, "timeout": 0.0,
    "budget_4/reward": 2.5, "budget_4/accuracy": 3 / 4, "budget_4/tokens_mean": 4.5,
    "budget_4/tokens_std": 1.25**0.5, "budget_4/overrun": 2 / 4, "budget_4/overrun_tokens": 3 / 4,
    "budget_4/inter": 0.5, "budget_4/inter_abs": 2.5 / 4, "budget_8/inter": -0.5, "budget_8/inter_abs": 0.5,
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


def loops(rollouts, n_prefix, inter):
  """entropy, length_spread and the means of A_inter, one response at a time."""
  B, G, J = rollouts.n_gen_BGJ.shape
  logps, spreads, expected = [], [], {}
  for b in range(B):
    lengths = [int(rollouts.n_gen_BGJ[b, g, j]) for g in range(G) for j in range(J)]
    mean = sum(lengths) / len(lengths)
    spreads.append((sum((n - mean)**2 for n in lengths) / len(lengths))**0.5)
    for g in range(G):
      for j in range(J):
        for slot in range(n_prefix[g], int(rollouts.n_tokens_BGJ[b, g, j])):
          logps.append(float(rollouts.logp_sampler[g][b, j, slot]))
  for g in range(G):
    values = [float(inter[b, g, j]) for b in range(B) for j in range(J)]
    expected[f"budget_{2**g}/inter"] = sum(values) / len(values)
    expected[f"budget_{2**g}/inter_abs"] = sum(map(abs, values)) / len(values)
  return expected | {"entropy": -sum(logps) / len(logps), "length_spread": sum(spreads) / B}


@pytest.mark.parametrize("counted", [True, False], ids=["prefix counted", "prefix not counted"])
def test_entropy_spread_and_inter_against_loops(counted):
  rng = np.random.default_rng(3)
  B, G, J, widths, n_prefix = 3, 3, 2, (5, 7, 9), np.array([2, 3, 0])
  n_tokens = np.stack([rng.integers(n + 1, w + 1, (B, J)) for n, w in zip(n_prefix, widths)], axis=1)
  logp = []
  for g, w in enumerate(widths):
    real = np.arange(w) < n_tokens[:, g, :, None]
    logp.append(np.where(real, np.log(rng.uniform(0.05, 1, (B, J, w))), 0.0).astype(np.float32))
  inter = rng.normal(size=(B, G, J))
  rollouts = Rollouts(
      tokens=tuple(np.zeros((B, J, w), np.int32) for w in widths),
      # The prefix carries loss here; it is still no sampled token.
      completion_mask=tuple(np.arange(w) < n_tokens[:, g, :, None] for g, w in enumerate(widths)),
      logp_sampler=tuple(logp), n_tokens_BGJ=n_tokens, n_gen_BGJ=n_tokens - (0 if counted else n_prefix[:, None]),
      truncated_BGJ=np.zeros((B, G, J), bool))
  advantage = types.SimpleNamespace(intra_BG=np.zeros((B, G)), inter_BGJ=inter, total_BGJ=inter)
  got = metrics.step_metrics(
      rollouts, budgets=(1, 2, 4), n_prefix_G=n_prefix, reward_BGJ=np.zeros((B, G, J)),
      score_BGJ=np.zeros((B, G, J)), advantage=advantage)
  expected = loops(rollouts, n_prefix, inter)
  assert {tag: got[tag] for tag in expected} == pytest.approx(expected, rel=1e-9)


def test_nothing_sampled_has_no_entropy():
  kwargs = case()
  kwargs["rollouts"] = kwargs["rollouts"].replace(n_tokens_BGJ=np.zeros((2, 2, 2), np.int32))
  assert metrics.step_metrics(**kwargs)["entropy"] == 0.0


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
    ("n_prefix_G", np.zeros(3)),
    ("inter_BGJ", types.SimpleNamespace(
        intra_BG=np.zeros((2, 2)), inter_BGJ=np.zeros((2, 2)), total_BGJ=np.zeros((2, 2, 2)))),
    ("reasons", ["correct"] * 7),
])
def test_wrong_shapes_are_refused(name, value):
  with pytest.raises(ValueError, match=name):
    metrics.step_metrics(**(case() | {"advantage" if name == "inter_BGJ" else name: value}))
