"""Advantages: the loops of the oracle, zero sums, equivariance, equal rewards, refusals."""

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
