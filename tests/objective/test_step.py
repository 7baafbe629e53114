"""The objective of a step as one program: every form and every option, what it remembers, what it logs."""

import itertools

import jax
import numpy as np
import pytest

from hbpo_jax import config, flags
from hbpo_jax.objective import forms, memory, reward, rivals, step
from tests import oracle

compute = jax.jit(step.compute, static_argnames="cfg")
N_GEN = np.random.default_rng(0).integers(1, 65, (4, 2, 3))
SCORE = np.array([[[0, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 1]], [[1, 0, 0], [1, 1, 0]], [[0, 0, 0], [1, 0, 0]]],
                 np.float32)
THINKS = np.random.default_rng(1).random(N_GEN.shape) < 0.5
FINISHED = np.ones(N_GEN.shape, bool)


def make_cfg(**changes):
  fields = {"rollout.budgets": (16, 32), "rollout.rollouts_per_query": 6, "reward.max_response_tokens": 64} | changes
  return flags.build(config.new("paper"), fields)


def outcome(cfg, remembered=None, at=0):
  form, given = forms.FORMS[cfg.reward.form], {}
  if form.reads_mode:
    given["thinks_BGJ"] = THINKS
  if form.has_stages:
    given["step"] = np.int32(at)
  if form.has_memory:
    given["remembered"] = memory.init(cfg.reward) if remembered is None else remembered
  return compute(N_GEN, SCORE, FINISHED, cfg=cfg, **given)


def rival(form, **changes):
  more = {"reward.limits": (40, 20), "reward.limit_steps": (2,)} if form == "thinkprune" else {}
  return make_cfg(**({"reward.form": form, "advantage.intra_coef": 0.0} | more | changes))


@pytest.mark.parametrize("form", sorted(rivals.REWARDS))
def test_every_form_in_one_program(form):
  cfg = rival(form)
  got = outcome(cfg)
  for x in jax.tree.leaves(got):
    assert np.isfinite(x).all()
  assert got.reward_BGJ.dtype == got.advantage.total_BGJ.dtype == np.float32
  np.testing.assert_array_equal(got.advantage.total_BGJ, got.advantage.inter_BGJ)
  assert set(got.memory) == set(memory.init(cfg.reward))


def test_what_is_logged():
  by_form = {form: set(outcome(rival(form)).metrics) for form in rivals.REWARDS}
  some = {"adlp": {"penalty"}, "grpo_lambda": {"gate_share"}, "thinkprune": {"limit"}, "adaptthink": {"think_share"},
          "autothink": {"think_share"}}
  assert by_form == {form: some.get(form, set()) for form in rivals.REWARDS}
  assert outcome(make_cfg()).metrics == {} and outcome(make_cfg()).memory == {}
  assert float(outcome(rival("autothink")).metrics["think_share"]) == pytest.approx(THINKS.mean())
  assert [float(outcome(rival("thinkprune"), at=t).metrics["limit"]) for t in (0, 1, 2, 3)] == [40, 40, 20, 20]
  # Accuracies 0, 1, 1/2, 1/6: half of four queries are the second and the third.
  assert float(outcome(rival("grpo_lambda", **{"reward.gate_share": 0.5})).metrics["gate_share"]) == 0.5
  # Mean of (0, 1, 1, 1), and of the accuracies.
  for gate, mean in (("solved", 0.75), ("rate", 10 / 24)):
    assert float(outcome(make_cfg(**{"advantage.intra_gate": gate})).metrics["intra_gate"]) == pytest.approx(mean)


def test_the_memory_goes_from_step_to_step():
  cfg = rival("adlp", **{"reward.penalty_start": 0.01, "reward.penalty_rate": 0.1, "reward.target_accuracy": 0.25})
  first = outcome(cfg)
  # The step's accuracy is 10 / 24: .01 + .1 * (.416667 - .25) = .0266667.
  assert float(first.metrics["penalty"]) == pytest.approx(0.01)
  assert float(first.memory["penalty"]) == pytest.approx(0.0266667, abs=1e-7)
  second = outcome(cfg, first.memory)
  assert float(second.metrics["penalty"]) == float(first.memory["penalty"])
  np.testing.assert_allclose(second.reward_BGJ, SCORE - 0.0266667 * N_GEN, atol=1e-5)


OPTIONS = {
    "advantage.center_intra": (False, True), "advantage.intra_coef": (0.5,), "advantage.intra_scale": ("none", "std"),
    "advantage.intra_clip": (None, 0.7), "advantage.intra_gate": ("none", "solved", "rate"),
    "advantage.intra_baseline": ("budget", "correct_length"), "reward.floor": (None, 0.2),
    "reward.bonus": (0.0, 2.0), "reward.curve": ("cosine", "log")}


def test_the_options_of_intra_compose_as_the_equations_say():
  """Against loops over queries and subgroups, for every combination."""
  for values in itertools.islice(itertools.product(*OPTIONS.values()), 0, None, 5):
    cfg = make_cfg(**dict(zip(OPTIONS, values, strict=True)))
    got = outcome(cfg)
    reward_BGJ = np.asarray(got.reward_BGJ, np.float64)
    baseline_G = np.asarray(reward.baseline(np.array([16, 32]), cfg=cfg.reward))
    for b, rewards in enumerate(reward_BGJ):
      expected = baseline_G
      if cfg.advantage.intra_baseline == "correct_length":
        solved = N_GEN[b][SCORE[b] > 0]
        expected = [
            cfg.reward.bonus + 4 * oracle.fall(solved.mean(), 64, cfg.reward.curve) if len(solved) else 0.0] * 2
      intra = rewards.mean(axis=1) - expected
      if cfg.advantage.center_intra:
        intra = intra - intra.mean()
      if cfg.advantage.intra_scale == "std":
        std = rewards.std(ddof=1)
        intra = intra / (std + 1e-6) if std > 0 else 0 * intra
      if cfg.advantage.intra_clip:
        intra = np.clip(intra, -0.7, 0.7)
      rate = SCORE[b].mean()
      intra = intra * {"none": 1, "solved": rate > 0, "rate": rate}[cfg.advantage.intra_gate]
      np.testing.assert_allclose(got.advantage.intra_BG[b], intra, atol=2e-4, err_msg=str(cfg))
    total = 0.5 * np.asarray(got.advantage.intra_BG)[:, :, None] + np.asarray(got.advantage.inter_BGJ)
    np.testing.assert_allclose(got.advantage.total_BGJ, total, atol=1e-6)
