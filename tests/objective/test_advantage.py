"""Advantages: the loops of the oracle, zero sums, equivariance, equal rewards, refusals."""

import dataclasses

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from hbpo_jax.config import AdvantageConfig
from hbpo_jax.objective import advantage
from tests import oracle

BASELINE = np.array([3.9, 3.7, 2.8], np.float32)
compute = jax.jit(advantage.compute, static_argnames="cfg")


def random_rewards(seed, shape=(4, 3, 4)):
  rng = np.random.default_rng(seed)
  return (rng.uniform(-1, 4, shape) * (rng.random(shape) < 0.6)).astype(np.float32)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("coef", [0.0, 1.0, 2.0])
def test_matches_the_loops(ddof, center, coef):
  cfg = AdvantageConfig(intra_coef=coef, center_intra=center, std_ddof=ddof)
  rewards = random_rewards(ddof + 2 * center)
  rewards[1] = 0.0
  rewards[2] = 2.2222223
  actual = compute(rewards, BASELINE, cfg=cfg)
  expected = oracle.advantage(
      rewards, BASELINE, intra_coef=coef, center_intra=center, std_ddof=ddof, std_eps=cfg.std_eps)
  for value, wanted in zip((actual.intra_BG, actual.inter_BGJ, actual.total_BGJ), expected, strict=True):
    np.testing.assert_allclose(value, wanted, rtol=0, atol=2e-5)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1]))
def test_inter_sums_to_zero_and_both_permute_with_the_responses(seed, ddof):
  cfg = AdvantageConfig(std_ddof=ddof)
  rewards = random_rewards(seed)
  actual = compute(rewards, BASELINE, cfg=cfg)
  np.testing.assert_allclose(np.sum(actual.inter_BGJ, axis=(1, 2)), 0, atol=2e-5)

  rng = np.random.default_rng(seed)
  queries, budgets, responses = (rng.permutation(n) for n in rewards.shape)
  moved = compute(rewards[queries][:, budgets][:, :, responses], BASELINE[budgets], cfg=cfg)
  np.testing.assert_allclose(moved.intra_BG, actual.intra_BG[queries][:, budgets], atol=1e-5)
  np.testing.assert_allclose(
      moved.total_BGJ, np.asarray(actual.total_BGJ)[queries][:, budgets][:, :, responses], atol=2e-5)


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.floats(-5, 5, width=32), st.sampled_from([0, 1]), st.sampled_from([0.0, 1e-6]))
def test_equal_rewards_give_exactly_zero(value, ddof, eps):
  """A float32 mean of 12 equal numbers is often an ulp off; divided by eps that would be a big advantage."""
  cfg = AdvantageConfig(std_ddof=ddof, std_eps=eps)
  inter = np.asarray(compute(np.full((1, 3, 4), value, np.float32), BASELINE, cfg=cfg).inter_BGJ)
  assert np.all(inter == 0)


@pytest.mark.parametrize("ddof", [0, 1])
def test_a_single_response_has_no_inter_advantage(ddof):
  actual = advantage.compute(np.full((2, 1, 1), 3.0), BASELINE[:1], cfg=AdvantageConfig(std_ddof=ddof))
  np.testing.assert_array_equal(actual.inter_BGJ, np.zeros((2, 1, 1)))
  np.testing.assert_allclose(actual.total_BGJ, np.full((2, 1, 1), 3.0 - 3.9), rtol=1e-5)


def test_intra_is_never_positive_for_budget_rewards_and_centred_has_mean_zero():
  rewards = np.minimum(random_rewards(3), BASELINE[:, None])
  assert np.all(np.asarray(compute(rewards, BASELINE, cfg=AdvantageConfig()).intra_BG) <= 0)
  centred = compute(rewards, BASELINE, cfg=AdvantageConfig(center_intra=True)).intra_BG
  np.testing.assert_allclose(np.mean(centred, axis=1), 0, atol=1e-6)
  assert np.any(np.asarray(centred) > 0)


def test_without_baseline_only_inter_counts():
  cfg = AdvantageConfig(intra_coef=0.0)
  actual = advantage.compute(random_rewards(1), None, cfg=cfg)
  assert np.all(np.asarray(actual.intra_BG) == 0)
  np.testing.assert_array_equal(actual.total_BGJ, actual.inter_BGJ)


def test_a_coefficient_without_baseline_is_refused():
  with pytest.raises(ValueError, match="advantage.intra_coef=1.0.*set it to 0"):
    advantage.compute(random_rewards(1), None, cfg=AdvantageConfig())


def test_an_unknown_ddof_is_refused():
  with pytest.raises(ValueError, match="advantage.std_ddof=2"):
    advantage.compute(random_rewards(1), BASELINE, cfg=AdvantageConfig(std_ddof=2))


# Other forms of A_inter, by hand.

def query(*rewards):
  """One query in one subgroup."""
  return np.array(rewards, np.float32)[None, None]


def settings(**changes):
  return AdvantageConfig(**({"intra_coef": 0.0} | changes))


def close(actual, expected):
  np.testing.assert_allclose(np.ravel(actual), expected, rtol=0, atol=1e-5)


def test_leave_one_out():
  # 1, 0, 0: 1 - 0; 0 - (1 + 0) / 2.
  close(compute(query(1, 0, 0), None, cfg=settings(form="leave_one_out")).total_BGJ, [1, -0.5, -0.5])


def test_reference():
  # The thinking ones earn 1 and 0, so .5 is expected of all: 1.05 - .5, .05 - .5, 1 - .5, 0 - .5.
  thinks = np.array([[[False, False, True, True]]])
  got = compute(query(1.05, 0.05, 1, 0), None, cfg=settings(form="reference"), thinks_BGJ=thinks)
  close(got.total_BGJ, [0.55, -0.45, 0.5, -0.5])
  # None thinks: the mean of all, .55.
  got = compute(query(1.05, 0.05), None, cfg=settings(form="reference"), thinks_BGJ=np.zeros((1, 1, 2), bool))
  close(got.total_BGJ, [0.5, -0.5])
  with pytest.raises(ValueError, match="pass thinks_BGJ"):
    compute(query(1, 0), None, cfg=settings(form="reference"))
  with pytest.raises(ValueError, match="advantage.form='median'"):
    compute(query(1, 0), None, cfg=settings(form="median"))


# What may be done to A_intra: R_1 = 1, 3 and R_2 = 0, 0 under baselines 4 and 2, so that A_intra = -2, -2; and a second
# query that earns R_1 = 4, 4 and R_2 = 2, 0: 0, -1. Standard deviations with divisor 4: sqrt(1.5), sqrt(2.75).

TWO = np.array([[[1, 3], [0, 0]], [[4, 4], [2, 0]]], np.float32)
BOUNDS = np.array([4, 2], np.float32)


def intra(rate=(0.5, 0.0), rewards=TWO, **changes):
  cfg = AdvantageConfig(**({"std_ddof": 0, "std_eps": 1e-12} | changes))
  return compute(rewards, BOUNDS, cfg=cfg, solve_rate_B=np.array(rate, np.float32)).intra_BG


def test_intra_as_it_is():
  close(intra(), [-2, -2, 0, -1])


def test_intra_scaled():
  close(intra(intra_scale="std"), [-2 / 1.5**0.5, -2 / 1.5**0.5, 0, -1 / 2.75**0.5])
  # A query that earns the same throughout has no scale: exactly 0 instead of -4 / 1e-12.
  assert not np.any(intra(intra_scale="std", rewards=np.zeros((2, 2, 2), np.float32)))


def test_intra_clipped():
  close(intra(intra_clip=1.5), [-1.5, -1.5, 0, -1])
  close(intra(intra_clip=1.5, rewards=10 + TWO), [1.5] * 4)


def test_intra_gated():
  close(intra(intra_gate="solved"), [-2, -2, 0, 0])
  close(intra(intra_gate="rate"), [-1, -1, 0, 0])
  close(intra(rate=(0.5, 1.0), intra_gate="rate"), [-1, -1, 0, -1])
  with pytest.raises(ValueError, match="pass solve_rate_B"):
    compute(TWO, BOUNDS, cfg=AdvantageConfig(intra_gate="rate"))


def test_intra_options_compose_with_centring_and_each_other_in_order():
  # Centred: 0, 0 and .5, -.5; over sqrt(2.75) = 1.658312: .301511; clipped at .2; times the rates .5 and 1.
  got = intra(rate=(0.5, 1.0), center_intra=True, intra_scale="std", intra_clip=0.2, intra_gate="rate")
  close(got, [0, 0, 0.2, -0.2])
  close(intra(rate=(0.5, 0.5), center_intra=True, intra_scale="std", intra_gate="rate"), [0, 0, 0.150756, -0.150756])


def test_intra_baseline_by_query():
  # Expected 2 of the first query, 0 of the second: means 2, 0 and 4, 1 minus that.
  got = compute(TWO, np.array([[2.0], [0.0]]), cfg=AdvantageConfig())
  close(got.intra_BG, [0, -2, 4, 1])


def test_within_a_subgroup():
  # 1, 3: -1, 1 with divisor 2. Equal rewards: 0. The mean of a subgroup is 0.
  cfg = AdvantageConfig(intra_form="within", std_ddof=0, std_eps=1e-12)
  got = compute(TWO, None, cfg=cfg)
  close(got.total_BGJ - got.inter_BGJ, [-1, 1, 0, 0, 0, 0, 1, -1])
  assert got.intra_BG.shape == (2, 2) and not np.any(np.abs(got.intra_BG) > 1e-6)
  doubled = compute(TWO, None, cfg=AdvantageConfig(intra_form="within", std_ddof=0, std_eps=1e-12, intra_coef=2.0))
  close(doubled.total_BGJ - doubled.inter_BGJ, [-2, 2, 0, 0, 0, 0, 2, -2])
  gated = compute(TWO, None, cfg=dataclasses.replace(cfg, intra_gate="rate"), solve_rate_B=np.array([0.5, 0.0]))
  close(gated.total_BGJ - gated.inter_BGJ, [-0.5, 0.5, 0, 0, 0, 0, 0, 0])


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.floats(-5, 5, width=32), st.sampled_from(["leave_one_out", "reference"]))
def test_equal_rewards_give_exactly_zero_in_every_form(value, form):
  cfg = settings(form=form, intra_form="within", intra_coef=1.0, std_eps=0.0)
  got = compute(np.full((1, 3, 5), value, np.float32), None, cfg=cfg, thinks_BGJ=np.eye(3, 5, dtype=bool)[None])
  assert not np.any(got.total_BGJ)


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3))
def test_within_a_subgroup_of_equal_rewards_is_exactly_zero_whatever_the_others_earn(values):
  rewards = np.repeat(np.array(values, np.float32)[None, :, None], 7, axis=2)
  cfg = AdvantageConfig(intra_form="within", std_eps=1e-12)
  got = compute(rewards, None, cfg=cfg)
  np.testing.assert_array_equal(got.total_BGJ, got.inter_BGJ)
