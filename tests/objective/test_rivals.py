"""The other methods' rewards: values worked out by hand, and what must hold of all of them."""

import functools
import inspect
import math

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from hbpo_jax import validation
from hbpo_jax.config import RewardConfig
from hbpo_jax.objective import advantage, forms, memory, reward, rivals

RIVALS = sorted(rivals.REWARDS)
compute = jax.jit(reward.compute, static_argnames="cfg")
L_MAX = 100
SETTINGS = {"adlp": {"penalty_start": 0.002}, "thinkprune": {"limits": (80, 50), "limit_steps": (3,)},
            "alp": {"alpha": 0.01}, "grpo_lambda": {"gate_share": 0.5}}


def make_cfg(form, **changes):
  return RewardConfig(**({"form": form, "max_response_tokens": L_MAX} | SETTINGS.get(form, {}) | changes))


def rewards(form, n_gen, score, budgets=(40,), thinks=None, step=0, remembered=None, **changes):
  """Rewards [B, G, J] of what may also be given as [J]."""
  cfg = make_cfg(form, **changes)
  three = lambda x: np.asarray(x)[(None,) * (3 - np.ndim(x))]
  given = {}
  if forms.FORMS[form].reads_mode:
    given["thinks_BGJ"] = np.ones(np.shape(three(n_gen)), bool) if thinks is None else three(thinks)
  if forms.FORMS[form].has_stages:
    given["step"] = np.int32(step)
  if forms.FORMS[form].has_memory:
    given["memory"] = memory.init(cfg) if remembered is None else remembered
  return np.asarray(compute(three(n_gen), three(score), np.array(budgets), cfg=cfg, **given))


def close(actual, expected):
  np.testing.assert_allclose(np.ravel(actual), expected, rtol=0, atol=1e-6)


def test_the_table_and_the_functions_name_the_same_forms():
  assert set(forms.FORMS) == set(rivals.REWARDS) | set(forms.OWN)
  assert forms.OWN == ("piecewise", "min", "length", "classic", "cosine")
  assert forms.WITH_BASELINE == ("piecewise", "min", "length")
  assert set(validation.CHOICES["reward.form"]) == set(forms.FORMS)
  assert validation.CHOICES["advantage.form"] == advantage.FORMS
  for field, choices in (("form", advantage.INTRA_FORMS), ("baseline", advantage.INTRA_BASELINES),
                         ("scale", advantage.INTRA_SCALES), ("gate", advantage.INTRA_GATES)):
    assert validation.CHOICES[f"advantage.intra_{field}"] == choices
  for name, function in rivals.REWARDS.items():
    number = forms.FORMS[name].paper.rpartition("arXiv ")[2].rstrip(")")
    assert number in inspect.getdoc(function), name


# Values by hand.

def test_l1_exact():
  # b = 40, alpha 0.0003: 1 - .0003 * |30 - 40|; 1 - .0003 * 20; wrong: 0 - .0003 * 40.
  close(rewards("l1_exact", [30, 60, 80], [1, 1, 0]), [0.997, 0.994, -0.012])


def test_l1_max():
  # alpha 0.0003, delta 0.5: .5 + .0003 * 10; .5 - .0003 * 20; wrong: 0.
  close(rewards("l1_max", [30, 60, 30], [1, 1, 0]), [0.503, 0.494, 0])
  # alpha .05: .5 + .5 = 1 at n = 30; 2 clipped to 1 at n = 10; .5 - .5 = 0 at n = 50; clipped to 0 at 60.
  close(rewards("l1_max", [30, 10, 50, 60], [1, 1, 1, 1], alpha=0.05), [1, 1, 0, 0])
  # Each subgroup has its own budget: .5 + .01 * (b - 40) for b = 30, 60.
  close(rewards("l1_max", [[40], [40]], [[1], [1]], budgets=(30, 60), alpha=0.01), [0.4, 0.7])
  close(rewards("l1_max", [40], [1], delta=0.25), [0.25])


def test_efficient():
  # Correct: n = 10, 30: mean 20, std 10. sigmoid(-1) = .268941, sigmoid(1) = .731059; alpha .2. The wrong one is not in
  # the mean and earns nothing.
  low, high = 1 - 0.2 * 0.2689414, 1 - 0.2 * 0.7310586
  close(rewards("efficient", [10, 30, 90], [1, 1, 0]), [low, high, 0])
  # One correct response, or equal lengths: sigmoid(0) = .5.
  close(rewards("efficient", [10, 30], [1, 0]), [0.9, 0])
  close(rewards("efficient", [33, 33, 33], [1, 1, 1], alpha=0.4), [0.8, 0.8, 0.8])
  # Over all of a query's subgroups: 10 and 30 as before, in two of them.
  close(rewards("efficient", [[10], [30]], [[1], [1]], budgets=(8, 16)), [low, high])


def test_alp():
  # Two of four correct: p = .5, 1/N = .25. 1 - .01 * 20 * .5; 1 - .01 * 40 * .5; wrong: -.01 * 60 * .5, -.01 * 80 * .5.
  close(rewards("alp", [20, 40, 60, 80], [1, 1, 0, 0]), [0.9, 0.8, -0.3, -0.4])
  # None correct: the rate is 1/N = .25.
  close(rewards("alp", [20, 40, 60, 80], [0, 0, 0, 0]), [-0.05, -0.1, -0.15, -0.2])
  # The paper's beta, per token.
  assert rewards("alp", [100, 100], [1, 0], alpha=None)[0, 0, 1] == pytest.approx(-100 * 1e-7 * 0.5)


def test_grpo_lambda():
  # Accuracies 1, 1/2, 1/2, 0. A share of .25 is one query: the first.
  n = np.array([[[10, 30]], [[10, 30]], [[20, 40]], [[10, 30]]])
  score = np.array([[[1, 1]], [[1, 0]], [[0, 1]], [[0, 0]]])
  low, high = 1 - 0.2 * 0.2689414, 1 - 0.2 * 0.7310586
  close(rewards("grpo_lambda", n, score, gate_share=0.25), [low, high, 1, 0, 0, 1, 0, 0])
  # A share of .5 is two queries; the second and the third tie, so both are in: a lone correct response has 1 - .2 / 2.
  close(rewards("grpo_lambda", n, score, gate_share=0.5), [low, high, .9, 0, 0, .9, 0, 0])
  # Least accuracy .6 leaves the first alone; share 0 leaves none; the unsolved query is never in.
  close(rewards("grpo_lambda", n, score, gate_share=1.0, gate_accuracy=0.6), [low, high, 1, 0, 0, 1, 0, 0])
  close(rewards("grpo_lambda", n, score, gate_share=0.0), score.ravel())
  gated = rivals.gate(rivals.Responses(n, score.astype(float), None), make_cfg("grpo_lambda", gate_share=1.0))
  assert gated.tolist() == [True, True, True, False]


def test_adlp():
  # lambda .002: 1 - .002 * 50; 0 - .002 * 20. Then lambda .005.
  close(rewards("adlp", [50, 20], [1, 0]), [0.9, -0.04])
  close(rewards("adlp", [50, 20], [1, 0], remembered={"penalty": np.float32(0.005)}), [0.75, -0.1])


def test_the_memory_of_adlp():
  cfg = make_cfg("adlp", penalty_rate=0.1, target_accuracy=0.5)
  first = memory.init(cfg)
  assert set(first) == {"penalty"} and first["penalty"].dtype == np.float32
  # .002 + .1 * (.75 - .5) = .027; then .027 + .1 * (0 - .5) < 0, so 0; and up again from there.
  second = memory.update(first, np.array([[[1, 1, 1, 0]]]), cfg=cfg)
  assert float(second["penalty"]) == pytest.approx(0.027)
  third = memory.update(second, np.zeros((1, 1, 4)), cfg=cfg)
  assert float(third["penalty"]) == 0
  assert float(memory.update(third, np.ones((1, 1, 4)), cfg=cfg)["penalty"]) == pytest.approx(0.05)
  assert memory.init(make_cfg("alp")) == memory.update({}, np.ones((1, 1, 4)), cfg=make_cfg("alp")) == {}


def test_hmpo():
  # Correct: 20, 40, 60: median 40, and L_max - 40 = 60. 20 and 40: 1. 60: (1 + cos(pi / 3)) / 2 = .75. Wrong: 0.
  close(rewards("hmpo", [20, 40, 60, 5], [1, 1, 1, 0]), [1, 1, 0.75, 0])
  # Correct: 20, 40: median 30; 40: (1 + cos(pi * 10 / 70)) / 2 = .950484.
  close(rewards("hmpo", [20, 40, 5, 90], [1, 1, 0, 0]), [1, 0.9504844, 0, 0])
  # At L_max itself nothing is left: 10, 10, 100 has median 10. A median of L_max leaves every length at 1.
  close(rewards("hmpo", [10, 10, 100], [1, 1, 1]), [1, 1, 0])
  close(rewards("hmpo", [100, 100], [1, 1]), [1, 1])


def test_thinkprune():
  # Limits 80 and, from step 3 on, 50.
  n, score = [50, 51, 80, 81], [1, 1, 1, 1]
  for step, expected in ((0, [1, 1, 1, 0]), (2, [1, 1, 1, 0]), (3, [1, 0, 0, 0]), (99, [1, 0, 0, 0])):
    close(rewards("thinkprune", n, score, step=step), expected)
  close(rewards("thinkprune", [50], [0]), [0])
  three = {"limits": (80, 60, 40), "limit_steps": (2, 5)}
  got = [float(rewards("thinkprune", [[50]], [[1]], step=s, **three)[0, 0, 0]) for s in range(7)]
  assert got == [1, 1, 1, 1, 1, 0, 0]


def test_adaptthink():
  # delta .05: without thinking 1.05 and .05, with it 1 and 0.
  close(rewards("adaptthink", [9, 9, 50, 50], [1, 0, 1, 0], thinks=[0, 0, 1, 1]), [1.05, 0.05, 1, 0])
  close(rewards("adaptthink", [9], [1], thinks=[0], delta=0.2), [1.2])


def test_autothink():
  score = [1, 0, 1, 0]
  # z = .5 is in balance: the table as it is.
  close(rewards("autothink", [9] * 4, score, thinks=[1, 1, 0, 0]), [1, 0, 2, -1])
  # Three of four think: z = .75, d = (.75 - .5) * 2 = .5 for those that do; none for the other.
  close(rewards("autothink", [9] * 4, score, thinks=[1, 1, 1, 0]), [0.5, -0.5, 0.5, -1])
  # One of four thinks: 1 - z = .75, d = .5 for those that do not: 2 -> 1, -1 -> -1.5.
  close(rewards("autothink", [9] * 4, score, thinks=[0, 1, 0, 0]), [1, 0, 1, -1.5])
  # All think: d = 1. Slope 0: never.
  close(rewards("autothink", [9] * 4, score, thinks=[1] * 4), [0, -1, 0, -1])
  close(rewards("autothink", [9] * 4, score, thinks=[1] * 4, balance_slope=0.0), [1, 0, 1, 0])


def test_a_floor_holds_for_correct_answers_of_every_form():
  # piecewise, alpha 1/100, beta 4: at n = 99, b = 10: 4 cos(.99 pi / 2) - .89 = -.827; floor .1, and half of it for .5.
  cfg = RewardConfig(max_response_tokens=L_MAX, floor=0.1)
  n, score = np.array([[[99, 99, 99, 101, 5]]]), np.array([[[1, 0.5, 0, 1, 1]]])
  close(compute(n, score, np.array([10]), cfg=cfg), [0.1, 0.05, 0, 0, 4 * math.cos(math.pi / 20)])
  assert compute(n, score, np.array([10]), cfg=RewardConfig(max_response_tokens=L_MAX))[0, 0, 0] < -0.8
  close(rewards("adlp", [90, 90], [1, 0], penalty_start=0.02, floor=0.25), [0.25, -1.8])
  close(rewards("thinkprune", [90, 90], [1, 0], floor=0.25), [0.25, 0])


def test_the_expected_reward_follows_the_query():
  # Correct lengths 20, 60 and 50: means 40 and 50; the third query is not solved. f2(m) = 4 cos(pi m / 200).
  n, score = np.array([[[20, 60, 99]], [[50, 7, 7]], [[5, 5, 5]]]), np.array([[[1, 1, 0]], [[1, 0, 0]], [[0, 0, 0]]])
  got = reward.expected(n, score, cfg=RewardConfig(max_response_tokens=L_MAX))
  assert got.shape == (3, 1)
  close(got, [4 * math.cos(0.2 * math.pi), 4 * math.cos(0.25 * math.pi), 0])
  # A response beyond L_max is no correct one.
  close(reward.expected([[[20, 101]]], [[[1, 1]]], cfg=RewardConfig(max_response_tokens=L_MAX)),
        [4 * math.cos(0.1 * math.pi)])


# Properties of all of them.

def random_step(seed, shape=(6, 2, 4)):
  rng = np.random.default_rng(seed)
  n = rng.integers(1, L_MAX + 10, shape)
  score = np.where(rng.random(shape) < 0.5, 0.0, rng.choice([0.5, 1.0], shape))
  score[0], score[1] = 0.0, 1.0
  return n, score, rng.random(shape) < 0.6


@pytest.mark.parametrize("form", RIVALS)
@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(st.integers(0, 2**32 - 1))
def test_rewards_are_finite_and_follow_their_responses(form, seed):
  """The order of queries and, within them, of responses says nothing."""
  n, score, thinks = random_step(seed)
  of = functools.partial(rewards, form, budgets=(20, 40))
  before = of(n, score, thinks=thinks)
  assert before.dtype == np.float32 and np.isfinite(before).all()
  rng = np.random.default_rng(seed)
  queries, responses = rng.permutation(len(n)), rng.permutation(n.shape[2])
  moved = of(*(x[queries][:, :, responses] for x in (n, score)), thinks=thinks[queries][:, :, responses])
  np.testing.assert_allclose(moved, before[queries][:, :, responses], atol=1e-6)


@pytest.mark.parametrize("form", RIVALS)
def test_a_query_that_is_all_wrong_has_length_pressure_only_where_the_paper_has_it(form):
  n = np.arange(12, 108, 12).reshape(1, 2, 4)
  got = rewards(form, np.concatenate([n, n]), np.concatenate([np.zeros_like(n), np.ones_like(n)]), budgets=(20, 40))
  inter = np.asarray(advantage.compute(got, None, cfg=advantage.AdvantageConfig(intra_coef=0.0)).inter_BGJ)
  assert np.any(inter[0] != 0) == forms.FORMS[form].wrong_pays
  assert np.any(inter[1] != 0) == (form not in ("adaptthink", "autothink"))


@pytest.mark.parametrize("form", RIVALS)
def test_equal_responses_have_advantage_exactly_zero(form):
  n = np.full((3, 1, 7), 37)
  for score in (0.0, 0.5, 1.0):
    got = rewards(form, n, np.full(n.shape, score), budgets=(40,))
    for kind in ("group", "leave_one_out"):
      cfg = advantage.AdvantageConfig(intra_coef=0.0, form=kind)
      assert not np.any(np.asarray(advantage.compute(got, None, cfg=cfg).total_BGJ)), (score, kind)


@pytest.mark.parametrize("form", ["l1_max", "efficient", "alp", "grpo_lambda", "adlp", "hmpo", "thinkprune"])
def test_of_two_correct_responses_the_longer_earns_no_more(form):
  n = np.array([[[20, 30, 45, 60, 81, 99]]])
  got = rewards(form, n, np.ones(n.shape))[0, 0]
  assert np.all(np.diff(got) <= 1e-6) and got[0] > got[-1]


@pytest.mark.parametrize("form", RIVALS)
def test_a_response_beyond_the_longest_is_a_wrong_one(form):
  beyond, within = np.array([[[30, 101, 40]]]), np.array([[[30, 101, 40]]])
  np.testing.assert_array_equal(rewards(form, beyond, [[[1, 1, 1]]]), rewards(form, within, [[[1, 0, 1]]]))


def test_unfinished_says_nothing_to_them_and_what_they_read_is_asked_for():
  n, finished = np.array([[[30, 40]]]), np.array([[[True, False]]])
  cfg = make_cfg("l1_max")
  np.testing.assert_array_equal(
      reward.compute(n, [[[1, 0]]], [40], cfg=cfg, finished_BGJ=finished), reward.compute(n, [[[1, 0]]], [40], cfg=cfg))
  for form, words in (("adlp", "memory"), ("thinkprune", "step"), ("adaptthink", "thinks_BGJ"),
                      ("autothink", "thinks_BGJ")):
    with pytest.raises(ValueError, match=words):
      reward.compute(n, [[[1, 0]]], [40], cfg=make_cfg(form))
