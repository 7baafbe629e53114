"""Rewards: the loops of the oracle, their shape over length, edges and refusals."""

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hbpo_jax.config import RewardConfig
from hbpo_jax.objective import reward
from tests import oracle

L_MAX = 64
BUDGETS = np.array([8, 16, 32, 40])
compute = jax.jit(reward.compute, static_argnames="cfg")


def make_cfg(form="piecewise", **changes):
  return RewardConfig(**(dict(form=form, alpha=0.02, beta=2.5, max_response_tokens=L_MAX) | changes))


def at_lengths(lengths, form="piecewise", budgets=BUDGETS, correct=None):
  """Rewards [G, lengths] of correct responses of these lengths."""
  n_gen = np.broadcast_to(np.asarray(lengths), (1, len(budgets), len(lengths)))
  correct = np.ones(n_gen.shape, bool) if correct is None else correct
  return np.asarray(compute(n_gen, correct, budgets, cfg=make_cfg(form)))[0]


@pytest.mark.parametrize("form", reward.FORMS)
@pytest.mark.parametrize("curve", ["cosine", "log"])
@pytest.mark.parametrize("x64, tolerance", [(False, 2e-6), (True, 1e-12)], ids=["float32", "float64"])
def test_matches_the_loops(form, curve, x64, tolerance):
  rng = np.random.default_rng(7)
  n_gen = rng.integers(1, L_MAX + 20, (5, 4, 6))
  n_gen[0] = BUDGETS[:, None] + np.array([-1, 0, 1, 2, 3, 4])
  n_gen[1, :, :3] = [L_MAX - 1, L_MAX, L_MAX + 1]
  score = np.where(rng.random(n_gen.shape) < 0.3, 0.0, rng.choice([0.25, 0.5, 1.0], n_gen.shape))
  finished = rng.random(n_gen.shape) < 0.7
  with jax.enable_x64(x64):
    actual = compute(
        n_gen, score, BUDGETS, cfg=make_cfg(form, unfinished_reward=-1.0, curve=curve), finished_BGJ=finished)
    assert actual.dtype == (jnp.float64 if x64 else jnp.float32)
  expected = oracle.reward(n_gen, score, BUDGETS, form=form, alpha=0.02, beta=2.5, L_max=L_MAX,
                           unfinished_reward=-1.0, finished=finished, curve=curve)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_the_weight_of_the_distance_multiplies_alpha():
  n_gen = np.array([[[10, 60], [10, 60]]])
  of = lambda **changes: np.asarray(compute(
      n_gen, np.ones(n_gen.shape), (20, 40), cfg=make_cfg("length", curve="log", **changes)))
  np.testing.assert_allclose(of(alpha=0.005, distance_weight=4.0), of(alpha=0.02), rtol=1e-6)
  np.testing.assert_allclose(of(alpha=None, distance_weight=4.0), of(alpha=4 / L_MAX), rtol=1e-6)
  np.testing.assert_array_equal(of(alpha=0.02, distance_weight=0.0), of(alpha=0.0))


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.lists(st.integers(1, L_MAX), min_size=4, max_size=4, unique=True))
def test_piecewise_is_flat_up_to_the_budget_and_falls_after(budgets):
  budgets = np.sort(budgets)
  lengths = np.arange(1, L_MAX + 10)
  rewards = at_lengths(lengths, budgets=budgets)
  for b, curve in zip(budgets, rewards, strict=True):
    assert np.all(curve[lengths <= b] == curve[0])
    after = curve[(lengths >= b) & (lengths <= L_MAX)]
    assert np.all(np.diff(after) < 0)
    assert np.all(curve[lengths > L_MAX] == 0)
    assert np.all(curve[lengths <= L_MAX] <= oracle.baseline([b], beta=2.5, L_max=L_MAX)[0] + 1e-6)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from(reward.FORMS))
def test_wrong_or_over_long_earns_nothing(seed, form):
  rng = np.random.default_rng(seed)
  n_gen = rng.integers(1, 2 * L_MAX, (2, 4, 3))
  correct = rng.random(n_gen.shape) < 0.5
  rewards = np.asarray(compute(n_gen, correct, BUDGETS, cfg=make_cfg(form)))
  assert np.all(rewards[~correct | (n_gen > L_MAX)] == 0)
  assert not np.any(np.signbit(rewards[~correct]))


def test_min_and_piecewise_differ_only_for_short_answers():
  lengths = np.arange(1, L_MAX + 1)
  difference = at_lengths(lengths) - at_lengths(lengths, "min")
  assert np.all(difference >= -1e-6)
  assert np.all(difference[:, lengths > 40] == 0)


def test_a_grader_s_number_scales_the_reward():
  correct = np.full((1, 4, 2), 0.25)
  np.testing.assert_allclose(at_lengths([4, 50], correct=correct), 0.25 * at_lengths([4, 50]), rtol=1e-6)


def test_unfinished_reward_is_for_wrong_answers_only():
  n_gen = np.array([[[5, 5, 5, 99]]])
  correct = np.array([[[True, False, False, False]]])
  finished = np.array([[[False, False, True, False]]])
  cfg = make_cfg("classic", unfinished_reward=-1.0)
  told = reward.compute(n_gen, correct, [8], cfg=cfg, finished_BGJ=finished)
  np.testing.assert_array_equal(told[0, 0], [1, -1, 0, -1])
  np.testing.assert_array_equal(reward.compute(n_gen, correct, [8], cfg=cfg)[0, 0], [1, 0, 0, 0])


@pytest.mark.parametrize("curve", ["cosine", "log"])
def test_baseline_is_f2(curve):
  baseline = reward.baseline(BUDGETS, cfg=make_cfg(curve=curve))
  np.testing.assert_allclose(baseline, oracle.baseline(BUDGETS, beta=2.5, L_max=L_MAX, curve=curve), rtol=1e-6)
  one = np.ones((1, len(BUDGETS), 1), int)
  np.testing.assert_array_equal(baseline, reward.compute(one, one, BUDGETS, cfg=make_cfg(curve=curve))[0, :, 0])


def test_on_the_log_curve_a_doubled_length_costs_the_same_everywhere():
  """1 + n = 2, 4, .. 64, and L_max 63: of 6 doublings, each costs a sixth of beta."""
  cfg = make_cfg("cosine", curve="log", max_response_tokens=63)
  n_gen = np.array([[[0, 1, 3, 7, 15, 31, 63]]])
  told = compute(n_gen, np.ones(n_gen.shape), [8], cfg=cfg)
  np.testing.assert_allclose(told[0, 0], 2.5 * np.arange(6, -1, -1) / 6, atol=1e-6)


def test_length_pays_for_unused_budget_too():
  """16 tokens under budgets of 8, 16 and 32: f1 on both sides, by hand."""
  told = at_lengths([16], "length", np.array([8, 16, 32]))[:, 0]
  np.testing.assert_allclose(told, 2.5 * np.cos(np.pi / 8) - 0.02 * np.array([8, 0, 16]), rtol=1e-6)


@pytest.mark.parametrize("form", reward.FORMS)
def test_the_bonus_is_earned_by_what_is_right_and_expected_of_a_budget(form):
  n_gen = np.array([[[5, 20, L_MAX, L_MAX + 1]] * 4])
  score = np.array([[[1, 0.5, 1, 1]] * 3 + [[0] * 4]])
  plain, more = make_cfg(form, unfinished_reward=-1.0), make_cfg(form, unfinished_reward=-1.0, bonus=3.0)
  finished = np.ones(n_gen.shape, bool)
  finished[:, 3, 0] = False
  gain = compute(n_gen, score, BUDGETS, cfg=more, finished_BGJ=finished) - compute(
      n_gen, score, BUDGETS, cfg=plain, finished_BGJ=finished)
  np.testing.assert_allclose(gain[0, :3], [[3, 1.5, 3, 0]] * 3, atol=1e-6)
  np.testing.assert_array_equal(gain[0, 3], 0)
  if form in reward.FORMS_WITH_BASELINE:
    np.testing.assert_allclose(
        reward.baseline(BUDGETS, cfg=more) - reward.baseline(BUDGETS, cfg=plain), [3] * 4, atol=1e-6)


@pytest.mark.parametrize("form", ["classic", "cosine"])
def test_forms_without_baseline_refuse_one(form):
  with pytest.raises(ValueError, match=f"reward.form='{form}'.*intra_coef"):
    reward.baseline(BUDGETS, cfg=make_cfg(form))


def test_unknown_form_is_refused():
  with pytest.raises(ValueError, match="reward.form='linear'.*piecewise"):
    reward.compute(np.ones((1, 1, 1)), np.ones((1, 1, 1)), [8], cfg=make_cfg("linear"))
