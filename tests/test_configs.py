"""The shipped configs: each loads, can work, and says what it is for."""

import dataclasses
import types

import pytest

from hbpo_jax import config, flags, run_info, validation

NAMES = flags.config_names()
PAPER_BASE = "deepscaler_1p5b"


def load(name, **overrides):
  return flags.build(flags.load_config(name), overrides)


def test_the_promised_configs_are_there():
  assert set(NAMES) >= {
      "quickstart", "smoke", "r1_distill_qwen_1p5b", "deepscaler_1p5b", "qwen3_0p6b_gsm8k", "budgets_1", "budgets_2",
      "budgets_4", "budgets_6", "budgets_8", "reward_classic", "reward_cosine", "reward_budget_aware"}


@pytest.mark.parametrize("name", NAMES)
def test_config_can_work(name):
  arch = types.SimpleNamespace(max_context=40_960)  # Qwen3-0.6B's; the smallest of the models meant
  for n_devices in (1, 4):
    validation.validate(load(name), n_devices=n_devices, arch=arch)


@pytest.mark.parametrize("name", [n for n in NAMES if load(n).rollout.queries == 64])
def test_paper_sized_config_fits_its_16_chips(name):
  validation.validate(load(name), n_devices=16)


@pytest.mark.parametrize("name", NAMES)
def test_config_opens_with_command_time_and_expectation(name, repo_root):
  text = (repo_root / "configs" / f"{name}.py").read_text()
  head = text.split('"""')[1]
  assert f"--config={name} " in head
  assert "\nTime: " in head and "\nExpect: " in head


def test_paper_runs_are_the_paper():
  for name in ("r1_distill_qwen_1p5b", PAPER_BASE):
    cfg = load(name)
    assert cfg.profile == "paper" and not flags.edited_from_profile(cfg)
    # How many responses decode at once is a matter of memory, and changes none of them.
    cfg = dataclasses.replace(cfg, rollout=dataclasses.replace(cfg.rollout, slots=0))
    for section in ("prompt", "rollout", "reward", "advantage", "loss", "optimizer"):
      assert getattr(cfg, section) == getattr(config.Config(), section), section
    assert (cfg.steps, cfg.learner.minibatches, cfg.data.source) == (629, 4, "tfds:deepscaler_preview")
    assert cfg.eval.max_new_tokens + cfg.data.max_prompt_tokens == 32_768


@pytest.mark.parametrize("n_budgets", [1, 2, 4, 6, 8])
def test_budget_ablations_change_the_budgets_only(n_budgets):
  cfg = load(f"budgets_{n_budgets}")
  assert len(cfg.rollout.budgets) == n_budgets and sum(cfg.rollout.budgets) == 1536 * n_budgets
  changed = {n for n, *_ in config.differences(load(PAPER_BASE), cfg)}
  six = {"rollout.rollouts_per_query"} if n_budgets == 6 else set()
  assert changed == ({"rollout.budgets"} | six if n_budgets != 4 else set())


@pytest.mark.parametrize("form,name", [("classic", "classic"), ("cosine", "cosine"), ("piecewise", "budget_aware")])
def test_reward_ablations_change_the_reward_only(form, name):
  cfg = load(f"reward_{name}")
  changed = {n for n, *_ in config.differences(load(PAPER_BASE), cfg)}
  assert cfg.reward.form == form
  assert changed == (set() if form == "piecewise" else {"reward.form", "advantage.intra_coef"})


def test_profile_lines_name_what_leaves_the_paper():
  assert run_info.describe_profile(load(PAPER_BASE)) == ["profile paper: the paper's settings"]
  hbpo = run_info.describe_profile(load(PAPER_BASE, profile="hbpo"))
  assert hbpo[0] == "profile hbpo, differing from the paper in:" and len(hbpo) == 1 + len(config.PROFILES["hbpo"])
  assert "  reward.curve = 'log' (paper: 'cosine')" in hbpo
  released = run_info.describe_profile(load(PAPER_BASE, profile="released", **{"loss.dual_clip": None}))
  assert len(released) == 1 + len(config.PROFILES["released"])
  assert "  advantage.intra_coef = 2.0 (paper: 1.0)" in released
  assert "  loss.dual_clip = None (paper: None, profile released: 3.0)" in released
