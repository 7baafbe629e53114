"""What the preview finds, against the paper's numbers and the loops of the oracle."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from hbpo_jax import config, flags
from hbpo_jax.reporting import curve_findings, curves
from tests import oracle

PAPER = config.from_config_dict(config.new("paper"))
RELEASED = config.from_config_dict(config.new("released"))


def changed(cfg, **sections):
  """A Config with fields of sections replaced: reward={"form": "min"}."""
  return dataclasses.replace(cfg, **{
      name: dataclasses.replace(getattr(cfg, name), **fields) for name, fields in sections.items()})


SMALL = changed(
    PAPER, reward={"max_response_tokens": 64}, rollout={"budgets": (8, 16, 40), "rollouts_per_query": 6})


CENTRED = changed(PAPER, advantage={"center_intra": True})


def kinds(cfg, lengths=None):
  return [w.kind for w in curves.check(cfg, lengths).warnings]


def text(cfg, kind, lengths=None):
  return {w.kind: w.text for w in curves.check(cfg, lengths).warnings}[kind]


def test_the_papers_settings():
  shape = curves.check(PAPER).shape
  assert [b.below_wrong_from for b in shape.budgets] == [3602, 3673, 3815, 3885]
  assert [b.below_unfinished_from for b in shape.budgets] == [3602, 3673, 3815, 3885]
  assert [b.wrong for b in shape.budgets] == [0.0] * 4
  assert [(s.n_gen, s.before, s.after) for s in shape.switches] == [
      (866, 512, 1024), (1854, 1024, 2048), (2477, 2048, 2560)]
  assert shape.never_best == () and shape.budgets_matter
  f2 = [4 * math.cos(math.pi * b / 8192) for b in (512, 1024, 2048, 2560)]
  all_wrong = shape.groups[0]
  assert all_wrong.name == "all_wrong"
  assert all_wrong.total == pytest.approx([-x for x in f2], rel=1e-6) and all_wrong.inter == (0, 0, 0, 0)
  assert [b.intra_high for b in shape.budgets] == [0.0] * 4
  assert [b.best_lengths for b in shape.budgets] == [(1, 512), (1, 1024), (1, 2048), (1, 2560)]
  assert [b.highest for b in shape.budgets] == pytest.approx(f2)
  assert [b.lowest for b in shape.budgets] == pytest.approx([b / 4096 - 1 for b in (512, 1024, 2048, 2560)], abs=1e-5)
  assert [b.forfeits for b in shape.budgets] == [None] * 4
  assert kinds(PAPER) == ["below_wrong", "only_down", "flat"]


def test_the_papers_warnings_carry_the_numbers_and_a_remedy_that_helps():
  below, down = text(PAPER, "below_wrong"), text(PAPER, "only_down")
  assert "3,602 / 3,673 / 3,815 / 3,885" in below and "wrong or unfinished one, which scores 0" in below
  assert "rollout.caps=3601,3672,3814,3884" in below
  capped = changed(PAPER, rollout={"caps": (3601, 3672, 3814, 3884)})
  assert "below_wrong" not in kinds(capped) and "cut_off" not in kinds(capped)  # Nothing of worth is cut off.
  flatter = changed(PAPER, reward={"alpha": 1 / 8192})
  assert curves.check(flatter).shape.budgets[0].below_wrong_from > 3602
  assert "3.92 / 3.70 / 2.83 / 2.22" in down and "advantage.center_intra=true" in down
  assert "even the right ones are pushed down, by 0.59 to 0.74" in down
  assert "only_down" not in kinds(CENTRED)
  assert "up to 512" not in text(PAPER, "flat") and "From 1 to 512 tokens" in text(PAPER, "flat")


def test_the_releases_settings():
  shape = curves.check(RELEASED).shape
  assert shape.budgets[0].best_lengths == (322, 512)  # min falls below its baseline for n <= 321.
  assert [b.best_lengths[0] for b in shape.budgets[1:]] == [1, 1, 1]
  assert [b.unfinished for b in shape.budgets] == [-1.0] * 4
  assert [b.below_unfinished_from for b in shape.budgets] == [None] * 4
  assert [b.below_wrong_from for b in shape.budgets] == [3602, 3673, 3815, 3885]
  assert kinds(RELEASED) == ["below_wrong", "only_down", "longer_pays", "flat"]
  assert "rollout.caps" not in text(RELEASED, "below_wrong")  # There the truncated answer scores -1.
  assert "7.85 / 7.39 / 5.66 / 4.44" in text(RELEASED, "only_down")  # A_intra counts twice.


def test_centring_takes_the_common_push_away():
  shape = curves.check(CENTRED).shape
  f2 = np.array([4 * math.cos(math.pi * b / 8192) for b in (512, 1024, 2048, 2560)])
  assert shape.groups[0].total == pytest.approx(list(f2.mean() - f2), abs=1e-5)
  assert all(b.intra_low < 0 < b.intra_high for b in shape.budgets)
  one = changed(CENTRED, rollout={"budgets": (1536,)})
  assert "centred_away" in kinds(one) and "centred_away" not in kinds(CENTRED)
  assert "centred_away" not in kinds(changed(one, advantage={"center_intra": False}))


@pytest.mark.parametrize("form", ["piecewise", "min", "length", "cosine", "classic"])
@pytest.mark.parametrize("unfinished", [0.0, -0.3, 0.5])
def test_against_loops(form, unfinished):
  """Every number of a budget, from the oracle's rewards, length by length."""
  L, budgets, caps = 64, (8, 16, 40), (20, 64, 50)
  has_baseline = form in ("piecewise", "min", "length")
  cfg = changed(
      SMALL, reward={"form": form, "alpha": 0.03, "beta": 1.7, "unfinished_reward": unfinished},
      rollout={"caps": caps}, advantage={"intra_coef": 0.7 if has_baseline else 0.0})
  curve = oracle.reward(
      np.tile(np.arange(1, L + 1), (1, 3, 1)), np.ones((1, 3, L)), budgets, form=form, alpha=0.03, beta=1.7, L_max=L)[0]
  shape = curve_findings.measure(cfg)
  for g, found in enumerate(shape.budgets):
    n_below = [n for n in range(1, L + 1) if all(curve[g][m - 1] < -1e-5 for m in range(n, L + 1))]
    assert found.below_wrong_from == (n_below[0] if n_below else None)
    n_below = [n for n in range(1, L + 1) if all(curve[g][m - 1] < unfinished - 1e-5 for m in range(n, L + 1))]
    assert found.below_unfinished_from == (n_below[0] if n_below else None)
    assert (found.highest, found.lowest) == pytest.approx((max(curve[g]), min(curve[g])), abs=1e-5)
    assert found.beyond_cap == pytest.approx((L - caps[g]) / L)
    lost = [n for n in range(caps[g] + 1, L + 1) if curve[g][n - 1] > unfinished + 1e-5]
    assert found.forfeits == ((lost[0], lost[-1]) if lost else None)
    assert found.forfeited == pytest.approx(max((curve[g][n - 1] - unfinished for n in lost), default=0.0), abs=1e-5)
  best = [max((g for g in range(3) if n <= caps[g]), key=lambda g: (round(curve[g][n - 1], 5), -g))
          for n in range(1, max(caps) + 1)]
  expected = [(n + 1, budgets[best[n - 1]], budgets[best[n]]) for n in range(1, len(best)) if best[n] != best[n - 1]]
  assert [(s.n_gen, s.before, s.after) for s in shape.switches] == expected
  assert shape.budgets_matter == has_baseline


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("form", ["piecewise", "classic"])
def test_advantages_against_loops(form, center):
  """Groups, and the extremes of A_intra and of the total over all groups of right and wrong answers."""
  L, budgets, coef = 32, (6, 12), 1.5 if form == "piecewise" else 0.0
  cfg = changed(
      PAPER, reward={"form": form, "max_response_tokens": L, "beta": 2.0, "unfinished_reward": -0.5},
      rollout={"budgets": budgets, "rollouts_per_query": 6}, advantage={"intra_coef": coef, "center_intra": center})
  baseline = oracle.baseline(budgets, beta=2.0, L_max=L) if form == "piecewise" else None
  right = oracle.baseline(budgets, beta=2.0, L_max=L) if form == "piecewise" else np.ones(2)
  of = lambda rewards: oracle.advantage(
      np.array(rewards)[None], baseline, intra_coef=coef, center_intra=center, std_ddof=1, std_eps=1e-6)
  shape = curve_findings.measure(cfg)

  totals = [[], []]
  for other in (0.0, -0.5):
    for counts in itertools.product(range(4), repeat=2):
      total = of([[right[g] if j < counts[g] else other for j in range(3)] for g in range(2)])[2][0]
      for g in range(2):
        totals[g] += list(total[g])
  for g, found in enumerate(shape.budgets):
    assert (found.push_down, found.push_up) == pytest.approx((min(totals[g]), max(totals[g])), abs=1e-4)

  lengths = np.tile(np.arange(1, L + 1), (1, 2, 1))
  curve = oracle.reward(lengths, np.ones((1, 2, L)), budgets, form=form, alpha=1 / L, beta=2.0, L_max=L)[0]
  ends = [(min(min(c), -0.5), max(max(c), 0.0)) for c in curve]
  intra = [of([[ends[0][a]] * 3, [ends[1][b]] * 3])[0][0] for a, b in itertools.product((0, 1), repeat=2)]
  for g, found in enumerate(shape.budgets):
    assert (found.intra_low, found.intra_high) == pytest.approx(
        (min(i[g] for i in intra), max(i[g] for i in intra)), abs=1e-4)

  # J = 3: two right and one wrong in the first subgroup, one right and two wrong in the second.
  half = of([[right[0], right[0], 0.0], [right[1], 0.0, 0.0]])
  groups = {group.name: group for group in shape.groups}
  assert groups["half_right"].total == pytest.approx([half[2][0, 0, 0], half[2][0, 1, 0]], abs=1e-4)
  assert groups["half_wrong"].total == pytest.approx([half[2][0, 0, 2], half[2][0, 1, 2]], abs=1e-4)
  assert groups["half_right"].intra == pytest.approx(list(half[0][0]), abs=1e-4)
  assert groups["half_right"].inter == pytest.approx([half[1][0, 0, 0], half[1][0, 1, 0]], abs=1e-4)
  assert groups["all_right"].total == pytest.approx(
      list(of([[r] * 3 for r in right])[2][0, :, 0]), abs=1e-4)


def test_one_response_per_budget_leaves_gaps():
  cfg = changed(PAPER, rollout={"rollouts_per_query": 4})
  groups = {g.name: g for g in curves.check(cfg).shape.groups}
  assert [v is None for v in groups["half_right"].total] == [False, True, False, True]
  assert [v is None for v in groups["half_wrong"].total] == [True, False, True, False]


def test_many_budgets_and_rollouts_stay_cheap():
  cfg = changed(PAPER, rollout={"budgets": tuple(range(100, 2100, 100)), "rollouts_per_query": 80})
  shape = curve_findings.measure(cfg)
  assert all(b.push_up > 0 > b.push_down for b in shape.budgets)


def test_classic_and_cosine_have_no_budgets_in_them():
  classic = flags.parse(["--config=reward_classic", "--workdir=x"]).cfg
  assert kinds(classic) == ["flat", "same_for_all"]
  assert "at every length" in text(classic, "flat") and "reward.form=piecewise" in text(classic, "flat")
  cosine = flags.parse(["--config=reward_cosine", "--workdir=x"]).cfg
  assert kinds(cosine) == ["same_for_all"]  # A reward of -1.7e-7 at L_max is a rounded 0.
  assert curves.check(cosine).shape.never_best == ()
  assert kinds(changed(cosine, rollout={"budgets": (1536,)})) == []


def test_a_slope_of_zero_leaves_one_budget():
  cfg = changed(PAPER, reward={"alpha": 0.0})
  assert curves.check(cfg).shape.never_best == (1024, 2048, 2560)
  assert "1,024 / 2,048 / 2,560" in text(cfg, "never_best") and "rollout.budgets" in text(cfg, "never_best")
  assert "below_wrong" not in kinds(cfg)


def test_unfinished_rewards():
  assert "unfinished_pays" in kinds(changed(PAPER, reward={"unfinished_reward": 0.1}))
  cfg = changed(PAPER, reward={"unfinished_reward": -0.5})
  assert [b.below_unfinished_from is None for b in curves.check(cfg).shape.budgets] == [False, False, True, True]
  assert "-0.875" in text(cfg, "below_unfinished") and "budgets 512 / 1,024" in text(cfg, "below_unfinished")
  assert "below a wrong one" in text(cfg, "below_wrong")
  assert "below_unfinished" not in kinds(changed(cfg, reward={"unfinished_reward": -0.9}))
  assert "reward.grader" in text(changed(PAPER, reward={"grader": "a.b"}), "below_wrong")


CAPPED = changed(PAPER, rollout={"caps": (512, 1536, 3072, 4096)})


def test_caps():
  shape = curves.check(CAPPED).shape
  assert [b.forfeits for b in shape.budgets] == [(513, 3601), (1537, 3672), (3073, 3814), None]
  assert [b.beyond_cap for b in shape.budgets] == [0.875, 0.625, 0.25, 0.0]
  # A capped budget wins nowhere beyond its cap.
  assert [(s.n_gen, s.after) for s in shape.switches] == [(513, 1024), (1537, 2048), (2477, 2560)]
  assert kinds(CAPPED) == ["below_wrong", "only_down", "cut_off", "no_overrun", "sentence_in_cap", "flat"]
  assert "budget 2,560" in text(CAPPED, "below_wrong")  # The others cannot become that long.
  assert "rollout.caps=512,1536,3072,3884" in text(CAPPED, "below_wrong")
  cut = text(CAPPED, "cut_off")
  assert "not known" in cut and "88 % / 62 % / 25 %, which says nothing on the share of responses" in cut
  assert "rollout.count_prefix_tokens=false" in text(CAPPED, "sentence_in_cap")
  assert "8 words" in text(CAPPED, "sentence_in_cap")
  assert "sentence_in_cap" not in kinds(changed(CAPPED, rollout={"count_prefix_tokens": False}))
  assert "(budget 512)" in text(CAPPED, "no_overrun")


def test_measured_lengths_give_a_share_of_responses():
  lengths = curves.Lengths("a test", {None: np.arange(1, 4001), 512: np.array([100, 500, 600, 5000])})
  shape = curves.check(CAPPED, lengths).shape
  assert [b.responses_beyond_cap for b in shape.budgets] == [0.5, 2464 / 4000, 928 / 4000, 0.0]
  assert [b.responses_below_wrong for b in shape.budgets] == [0.25, 328 / 4000, 186 / 4000, 116 / 4000]
  cut = text(CAPPED, "cut_off", lengths)
  assert "measured responses (a test), 50 % / 62 % / 23 % are longer" in cut and "not known" not in cut
  assert "(a test), 25 % / 8.2 % / 4.7 % / 2.9 % are that long" in text(PAPER, "below_wrong", lengths)
  brief = "\n".join(curves.check(CAPPED, lengths).brief())
  assert "50 % / 62 % / 23 % of the measured responses are longer" in brief
  partly = curves.Lengths("a test", {512: np.array([100])})
  assert "not known" in text(CAPPED, "cut_off", partly)


def test_lengths_of_moments_have_them():
  tokens = curve_findings.lengths_of_moments(1000.0, 600.0, n=20_001)
  assert (tokens.mean(), tokens.std()) == pytest.approx((1000, 600), rel=0.01)
  assert (np.diff(tokens) > 0).all() and tokens[0] > 0
  assert set(curve_findings.lengths_of_moments(7.0, 0.0)) == {7.0}
  for mean, std in ((0.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (math.nan, 1.0)):
    with pytest.raises(ValueError, match="mean="):
      curve_findings.lengths_of_moments(mean, std)


@pytest.mark.parametrize("name, profile", [
    *((name, "") for name in flags.config_names()), ("budgets_8", "released"), ("budgets_1", "hbpo")])
def test_every_config_has_a_brief_of_few_short_lines(name, profile):
  cfg = flags.parse([f"--config={name}", "--workdir=x"] + ([f"--config.profile={profile}"] if profile else [])).cfg
  findings = curves.check(cfg)
  lines = findings.brief()
  assert 1 <= len(lines) <= 6 and all(len(line) <= 140 for line in lines)
  assert all(line.startswith("warning: ") for line in lines[1:])
  for warning in findings.warnings:  # Each names the setting that changes it.
    assert any(field in warning.text for field in config.field_table()), warning.kind


def test_a_brief_counts_what_it_leaves_out():
  lines = curves.brief(CAPPED)
  assert lines == curves.check(CAPPED).brief() and len(lines) == 6 and lines[-1] == "and 2 more"


# Other methods.

PLAIN = changed(PAPER, advantage={"intra_coef": 0.0}, rollout={"budgets": (2048,)})


@pytest.mark.parametrize("form", ["efficient", "alp", "grpo_lambda", "hmpo", "autothink"])
def test_a_form_that_compares_responses_has_no_curve_and_says_so(form):
  findings = curves.check(changed(PLAIN, reward={"form": form}))
  assert findings.shape is None and findings.warnings == () and form in findings.nothing
  [line] = findings.brief()
  assert line.startswith(f"reward {form}, L_max 4,096; there is no reward curve to draw")


@pytest.mark.parametrize("form, at, value", [
    ("l1_exact", 1048, 1 - 3e-4 * 1000), ("l1_max", 1048, 0.5 + 3e-4 * 1000), ("adlp", 100, 0.9),
    ("thinkprune", 3000, 1.0), ("thinkprune", 3001, 0.0), ("adaptthink", 4096, 1.0)])
def test_the_curves_of_other_forms(form, at, value):
  """Of the first step, where they change from step to step, and with all responses thinking."""
  limits = {"limits": (3000, 1000), "limit_steps": (5,)} if form == "thinkprune" else {}
  cfg = changed(PLAIN, reward={"form": form} | limits)
  n_gen_N, reward_GN = curves.reward_curves(cfg)
  assert reward_GN[0, at - 1] == pytest.approx(value, abs=1e-5) and n_gen_N[at - 1] == at
  findings = curves.check(cfg)
  assert findings.nothing == "" and np.isfinite(findings.shape.budgets[0].push_up)
  assert "below_wrong" not in kinds(cfg), "a wrong answer of the same length never earns more"


@pytest.mark.parametrize("fields, all_wrong, half_right", [
    # f2 of 512 and 2048 is 3.9231 and 2.8284. Half right: means of 1.9616 and 1.4142, with as much below f2.
    ({}, (-3.9231, -2.8284), (-1.9616, -1.4142)),
    ({"intra_clip": 1.5}, (-1.5, -1.5), (-1.5, -1.4142)),
    ({"intra_gate": "solved"}, (0, 0), (-1.9616, -1.4142)),
    ({"intra_gate": "rate"}, (0, 0), (-0.9808, -0.7071)),
    # f2 of the mean length 1280 of the right ones is 3.5277; nothing is expected where none is right.
    ({"intra_baseline": "correct_length"}, (0, 0), (-1.5661, -2.1135)),
    # The standard deviation of 3.9231, 3.9231, 2.8284, 2.8284 and four times 0 is 1.8513 (divisor 7).
    ({"intra_scale": "std"}, (0, 0), (-1.0596, -0.7639)),
])
def test_groups_show_what_is_done_to_intra(fields, all_wrong, half_right):
  cfg = changed(PAPER, rollout={"budgets": (512, 2048), "rollouts_per_query": 8}, advantage=fields)
  shape = curves.check(cfg).shape
  assert shape.groups[0].intra == pytest.approx(all_wrong, abs=2e-4)
  assert shape.groups[2].intra == pytest.approx(half_right, abs=2e-4)
  for g, b in enumerate(shape.budgets):
    lowest = min(all_wrong[g], half_right[g])
    assert b.intra_low <= lowest + 1e-4 and b.intra_high >= half_right[g] - 1e-4


def test_no_warning_of_equal_budgets_where_subgroups_differ_in_their_opening():
  cfg = changed(PLAIN, rollout={"budgets": (512, 2048)})
  assert "same_for_all" in kinds(changed(cfg, reward={"form": "classic"}))
  assert "same_for_all" not in kinds(
      changed(cfg, reward={"form": "adaptthink"}, prompt={"openings": ("natural", "</think>")}))


def test_no_warning_of_a_sentence_where_there_is_none():
  cfg = changed(CENTRED, rollout={"budgets": (512,), "caps": (512,)})
  assert "sentence_in_cap" in kinds(cfg) and "sentence_in_cap" not in kinds(
      changed(cfg, prompt={"budget_sentence": ""}))
