"""Every field of every golden case, in float32 and in float64."""

import json

import jax
import numpy as np
import pytest

from hbpo_jax.config import AdvantageConfig, RewardConfig
from hbpo_jax.objective import advantage, reward

FORM_OF_FIELD = {"reward_paper": "piecewise", "reward_released": "min", "reward_classic": "classic",
                 "reward_cosine": "cosine"}
MODES = pytest.mark.parametrize("x64, tolerance", [(False, 2e-5), (True, 1e-9)], ids=["float32", "float64"])

compute_reward = jax.jit(reward.compute, static_argnames="cfg")
compute_advantage = jax.jit(advantage.compute, static_argnames="cfg")


@pytest.fixture(scope="module")
def cases(shared_dir):
  path = shared_dir / "golden" / "hbpo_golden_public.json"
  found = json.loads(path.read_text())["cases"]
  assert len(found) >= 10
  return [Case(case) for case in found]


class Case:
  """One query: its list of responses regrouped to [1, G, J], subgroups in order of their budget."""

  def __init__(self, fields):
    self.fields = fields
    self.id = fields["id"]
    budgets = np.asarray(fields["budget"])
    self.budgets = np.unique(budgets)
    self.order = np.stack([np.flatnonzero(budgets == b) for b in self.budgets])  # fails if sizes differ
    self.n_gen, self.correct = self.group("n_gen"), self.group("correct")

  def group(self, name):
    return np.asarray(self.fields[name])[self.order][None]

  def reward_cfg(self, form):
    f = self.fields
    return RewardConfig(form=form, alpha=f["alpha"], beta=f["beta"], max_response_tokens=f["L_max"])

  def reward(self, form):
    return compute_reward(self.n_gen, self.correct, self.budgets, cfg=self.reward_cfg(form))

  def advantage(self, rewards, **settings):
    baseline_G = reward.baseline(self.budgets, cfg=self.reward_cfg("piecewise"))
    cfg = AdvantageConfig(std_eps=self.fields["eps"], **settings)
    return compute_advantage(rewards, baseline_G, cfg=cfg)


def close(actual, expected, tolerance, where):
  np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance, err_msg=where)


@MODES
def test_rewards(cases, x64, tolerance):
  with jax.enable_x64(x64):
    for case in cases:
      for field, form in FORM_OF_FIELD.items():
        actual = case.reward(form)
        assert actual.dtype == (np.float64 if x64 else np.float32)
        close(actual, case.group(field), tolerance, f"{case.id} {field}")


@MODES
def test_default_alpha_is_one_over_the_longest_response(cases, x64, tolerance):
  with jax.enable_x64(x64):
    case = cases[0]
    cfg = RewardConfig(form="piecewise", alpha=None, beta=4.0, max_response_tokens=4096)
    actual = reward.compute(case.n_gen, case.correct, case.budgets, cfg=cfg)
    close(actual, case.group("reward_paper"), tolerance, case.id)


@MODES
def test_advantages(cases, x64, tolerance):
  with jax.enable_x64(x64):
    for case in cases:
      ddof0 = case.advantage(case.reward("piecewise"), std_ddof=0)
      ddof1 = case.advantage(case.reward("piecewise"), std_ddof=1)
      released = case.advantage(case.reward("min"), std_ddof=1)
      intra_BGJ = np.broadcast_to(np.asarray(ddof1.intra_BG)[:, :, None], case.n_gen.shape)
      for actual, field in [
          (intra_BGJ, "adv_intra"), (ddof0.inter_BGJ, "adv_inter_ddof0"), (ddof1.inter_BGJ, "adv_inter_ddof1"),
          (ddof1.total_BGJ, "adv_total_paper"), (ddof0.total_BGJ, "adv_total_paper_ddof0"),
          (released.total_BGJ, "adv_total_reward_released"),
      ]:
        close(actual, case.group(field), tolerance, f"{case.id} {field}")
      if case.fields["zero_variance"]:
        assert np.all(np.asarray(ddof1.inter_BGJ) == 0), case.id
        assert np.all(np.asarray(ddof0.inter_BGJ) == 0), case.id


@MODES
def test_outputs_of_the_published_code(cases, x64, tolerance):
  """The authors' code in float32 with pi = 3.1416; where its rounding blows up, its own formula in float64."""
  n_seen = 0
  with jax.enable_x64(x64):
    for case in cases:
      if case.fields["reward_released_exact"] is None:
        assert case.fields["adv_released_exact"] is None
        continue
      n_seen += 1
      close(case.reward("min"), case.group("reward_released_exact"), 2e-5, case.id)
      noisy = case.fields["released_float32_noise"] > 1e-5
      expected = case.group("adv_released_model_f64" if noisy else "adv_released_exact")
      close(case.advantage(case.reward("min"), intra_coef=2.0, std_ddof=1).total_BGJ, expected, 2e-5, case.id)
      if noisy:
        assert case.fields["zero_variance"], case.id
  assert n_seen >= 8
