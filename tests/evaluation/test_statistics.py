"""Intervals and pass@k against answers that are known otherwise."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from hbpo_jax.evaluation import statistics

NONE = {"value": None, "low": None, "high": None}


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_response(n):
  for correct in range(n + 1):
    answers = [True] * correct + [False] * (n - correct)
    for k in range(1, n + 1):
      subsets = list(itertools.combinations(answers, k))
      assert statistics.pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), rel=1e-14)


def test_pass_at_k_of_many_samples():
  assert statistics.pass_at_k(10**6, 1, 1) == 1e-6
  assert statistics.pass_at_k(5000, 1, 2500) == 0.5
  # C(5000, 2500) overflows a float; the product over the drawn responses does not.
  expected = -math.expm1(sum(math.log1p(-100 / (5000 - j)) for j in range(64)))
  assert statistics.pass_at_k(5000, 100, 64) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n, correct, k, message", [
    (4, 5, 1, "n_correct=5"), (4, -1, 1, "n_correct=-1"), (4, 2, 5, "k=5"), (4, 2, 0, "k=0")])
def test_pass_at_k_refuses_what_cannot_be_drawn(n, correct, k, message):
  with pytest.raises(ValueError, match=message):
    statistics.pass_at_k(n, correct, k)


def test_mean_of_bernoulli_values_has_the_binomial_interval():
  score_M = np.array([1.0] * 300 + [0.0] * 100)
  got = statistics.mean_interval(score_M)
  # The bootstrap of a mean of 0s and 1s is binomial, but for the 2,000 resamples: about a thirtieth of the width.
  low, high = (stats.binom.ppf(q, 400, 0.75) / 400 for q in (0.025, 0.975))
  assert got["value"] == 0.75
  assert got["low"] == pytest.approx(low, abs=0.004) and got["high"] == pytest.approx(high, abs=0.004)


def test_mean_of_numbers_has_the_normal_interval():
  tokens_M = np.random.default_rng(3).gamma(2.0, 500.0, 1319)
  got = statistics.mean_interval(tokens_M)
  half = 1.96 * tokens_M.std() / math.sqrt(1319)
  assert got["value"] == pytest.approx(tokens_M.mean())
  assert got["low"] == pytest.approx(tokens_M.mean() - half, abs=half / 10)
  assert got["high"] == pytest.approx(tokens_M.mean() + half, abs=half / 10)


def test_95_of_100_intervals_hold_the_truth():
  rng = np.random.default_rng(0)
  held = 0
  for _ in range(600):
    got = statistics.mean_interval(rng.normal(5.0, 2.0, 60))
    held += got["low"] <= 5.0 <= got["high"]
  # At M = 60 the percentile bootstrap is 0.8 % short of 95 %: 565 of 600, give or take three times 5.7.
  assert 548 <= held <= 582


def test_95_of_100_paired_intervals_hold_the_truth():
  rng = np.random.default_rng(1)
  held = 0
  for _ in range(600):
    before = rng.normal(1000.0, 300.0, 60)
    got = statistics.difference(before, before - 500.0 + rng.normal(0.0, 30.0, 60))
    held += got["low"] <= -500.0 <= got["high"]
    assert got["high"] - got["low"] < 30  # Unpaired it would be about 200.
  assert 548 <= held <= 582


def test_relative_change_is_paired():
  rng = np.random.default_rng(5)
  before = rng.normal(1000.0, 300.0, 100)
  got = statistics.relative_change(before, 0.5 * before + rng.normal(0.0, 30.0, 100))
  assert got["low"] <= -0.5 <= got["high"]
  # 1.96 * 30 / sqrt(100) tokens on either side, over 1,000; unpaired it would be about 9 %.
  assert got["high"] - got["low"] == pytest.approx(2 * 1.96 * 3 / 1000, rel=0.25)


def test_same_numbers_same_interval():
  values = np.random.default_rng(2).random(50)
  assert statistics.mean_interval(values) == statistics.mean_interval(list(values))
  assert statistics.mean_interval(values, seed=1) != statistics.mean_interval(values)


def test_intervals_are_plain_numbers_in_order():
  got = statistics.accuracy_interval([0, 1, 1, 0.5])
  assert [type(v) for v in got.values()] == [float] * 3
  assert 0 <= got["low"] < got["value"] < got["high"] <= 1


def test_all_wrong_or_all_right_has_the_exact_interval():
  wrong, right = statistics.accuracy_interval([0] * 30), statistics.accuracy_interval([1.0] * 30)
  bound = 1 - 0.025 ** (1 / 30)  # P(0 of 30) = 2.5 %: 11.57 %.
  assert wrong == {"value": 0.0, "low": 0.0, "high": pytest.approx(bound, rel=1e-6)}
  assert right == {"value": 1.0, "low": pytest.approx(1 - bound, rel=1e-6), "high": 1.0}
  assert bound == pytest.approx(0.1157, abs=5e-5)
  # Other equal scores are no counts.
  assert statistics.accuracy_interval([0.5] * 30) == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_accuracy_between_is_the_bootstrap():
  score_M = [1, 0, 1, 1, 0.25]
  assert statistics.accuracy_interval(score_M) == statistics.mean_interval(score_M)


@pytest.mark.parametrize("interval", [statistics.mean_interval, statistics.accuracy_interval])
def test_too_few_problems(interval):
  assert interval([]) == NONE
  assert interval([1.0]) == {"value": 1.0, "low": None, "high": None}


def test_paired_difference_by_hand():
  got = statistics.difference([1, 2, 3], [2, 3, 4])
  assert got == {"value": 1.0, "low": 1.0, "high": 1.0}  # Paired: every problem changes by 1.
  assert statistics.difference([0.25, 1, 0], [0.25, 1, 0]) == {"value": 0.0, "low": 0.0, "high": 0.0}
  assert statistics.difference([3], [1]) == {"value": -2.0, "low": None, "high": None}
  assert statistics.difference([], []) == NONE


def test_relative_change_by_hand():
  assert statistics.relative_change([100, 300], [50, 150]) == {"value": -0.5, "low": -0.5, "high": -0.5}
  assert statistics.relative_change([100, 300], [100, 100])["value"] == -0.5  # Of the means, not the mean of changes.
  assert statistics.relative_change([7], [14]) == {"value": 1.0, "low": None, "high": None}
  assert statistics.relative_change([], []) == NONE


def test_relative_change_from_nothing():
  assert statistics.relative_change([0, 0], [1, 2]) == NONE
  # A resample of the first problem alone would divide by 0.
  assert statistics.relative_change([0, 2], [1, 2]) == {"value": 0.5, "low": None, "high": None}
  with pytest.raises(ValueError, match="-1"):
    statistics.relative_change([-1, 2], [1, 2])


@pytest.mark.parametrize("call", [
    lambda: statistics.mean_interval([[1.0, 2.0]]), lambda: statistics.mean_interval([1.0, math.nan]),
    lambda: statistics.accuracy_interval([0.5, 1.5]), lambda: statistics.difference([1, 2], [1]),
    lambda: statistics.relative_change([1, 2], [1, math.inf])])
def test_refuses_what_is_not_one_number_per_problem(call):
  with pytest.raises(ValueError, match="_M"):
    call()


def test_average_over_benchmarks_is_unweighted():
  large, small = np.repeat([0.0, 1.0], [250, 750]), np.repeat([0.0, 1.0], [20, 10])
  got = statistics.average_interval([large, small])
  assert got["value"] == pytest.approx((0.75 + 1 / 3) / 2)
  # Variances of the two means add; a quarter, as the average halves them.
  half = 1.96 * 0.5 * math.sqrt(large.var() / 1000 + small.var() / 30)
  assert got["low"] == pytest.approx(got["value"] - half, abs=half / 8)
  assert got["high"] == pytest.approx(got["value"] + half, abs=half / 8)
  assert statistics.average_interval([large, []]) == statistics.mean_interval(large)
  assert statistics.average_interval([large, [1.0]])["low"] is None  # One problem cannot be resampled.
  assert statistics.average_interval([]) == NONE


def test_average_accuracy_where_every_benchmark_is_all_or_nothing():
  got = statistics.average_accuracy_interval([[0] * 30, [1] * 20])
  low, high = 0.025 ** (1 / 20) / 2, (1 - 0.025 ** (1 / 30) + 1) / 2
  assert got == {"value": 0.5, "low": pytest.approx(low, rel=1e-6), "high": pytest.approx(high, rel=1e-6)}
  mixed = statistics.average_accuracy_interval([[0] * 30, [1, 0, 1]])
  assert mixed == statistics.average_interval([[0] * 30, [1, 0, 1]])


def test_average_change_is_of_the_averages():
  pairs = [([100, 100], [50, 50]), ([1000, 1000], [900, 900])]
  assert statistics.average_relative_change(pairs)["value"] == pytest.approx(950 / 1100 - 1)
  assert statistics.average_difference(pairs) == {"value": -75.0, "low": -75.0, "high": -75.0}
  # Problems stay paired and benchmarks apart: no resample can change the ratio of proportional counts.
  proportional = [([10, 20, 70], [5, 10, 35]), ([300, 100], [150, 50])]
  assert statistics.average_relative_change(proportional) == {
      name: pytest.approx(-0.5, rel=1e-12) for name in ("value", "low", "high")}
