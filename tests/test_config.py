"""The table of settings, the profiles, and the way from and to a ConfigDict."""

import dataclasses
import json

from ml_collections import config_dict
import pytest

from hbpo_jax import config


def test_every_setting_has_a_help_sentence_and_its_default_has_its_type():
  for name, f in config.field_table().items():
    assert f.metadata["help"].strip(), name
  assert config.from_config_dict(config.to_config_dict(config.Config())) == config.Config()


def test_defaults_are_the_papers():
  cfg = config.Config()
  assert cfg.rollout.budgets == (512, 1024, 2048, 2560) and cfg.rollout.rollouts_per_query == 16
  assert cfg.rollout.queries == 64 and cfg.steps == 629 and cfg.learner.minibatches == 4
  assert cfg.reward == config.RewardConfig(
      form="piecewise", alpha=None, beta=4.0, max_response_tokens=4096, unfinished_reward=0.0)
  assert (cfg.loss.clip_low, cfg.loss.clip_high, cfg.loss.kl_coef) == (0.2, 0.28, 0.0)
  assert (cfg.advantage.intra_coef, cfg.advantage.center_intra) == (1.0, False)


def test_caps_default_to_the_longest_response():
  assert config.Config().caps == (4096,) * 4
  rollout = config.RolloutConfig(budgets=(8, 16), caps=(12, 20))
  assert config.Config(rollout=rollout).caps == (12, 20)


@pytest.mark.parametrize("profile", sorted(config.PROFILES))
def test_profile_sets_its_row_and_nothing_else(profile):
  cfg = config.from_config_dict(config.new(profile))
  changed = {name: new for name, _, new in config.differences(config.Config(), cfg)}
  assert changed == config.PROFILES[profile] | ({} if profile == "paper" else {"profile": profile})


def test_applying_a_profile_resets_the_row_of_the_last_one():
  cd = config.new("released")
  config.apply_profile(cd, "hbpo")
  assert cd == config.new("hbpo")


def test_applying_a_profile_keeps_named_fields():
  cd = config.new("paper")
  cd.reward.form = "cosine"
  config.apply_profile(cd, "released", keep=frozenset({"reward.form"}))
  assert cd.reward.form == "cosine" and cd.loss.dual_clip == 3.0


def test_unknown_profile_is_refused():
  with pytest.raises(ValueError, match="profile='nope' does not exist; choose one of"):
    config.new("nope")


def test_new_config_is_locked():
  cd = config.new()
  with pytest.raises(AttributeError):
    cd.rollout.budget = (1,)


@pytest.mark.parametrize("name,value", [
    ("steps", "3"), ("steps", True), ("steps", 3.0), ("loss.clip_low", "0.2"), ("loss.dual_clip", "3"),
    ("rollout.budgets", (8, 16.0)), ("rollout.budgets", 8), ("log.live", 1), ("model.path", None),
])  # fmt: skip
def test_wrong_type_names_field_value_and_remedy(name, value):
  cd = config_dict.ConfigDict(config.new().to_dict(), convert_dict=True, type_safe=False)
  parent, _, leaf = name.rpartition(".")
  (config.get(cd, parent) if parent else cd)[leaf] = value
  with pytest.raises(ValueError, match=rf"config\.{name}=.*wrong type; give") as error:
    config.from_config_dict(cd)
  assert repr(value) in str(error.value)


def test_whole_numbers_are_accepted_as_reals_and_lists_as_tuples():
  cd = config_dict.ConfigDict(config.new().to_dict(), convert_dict=True, type_safe=False)
  cd.loss.clip_low, cd.loss.dual_clip, cd.rollout.budgets = 0, 3, [8, 16]
  cfg = config.from_config_dict(cd)
  assert (cfg.loss.clip_low, cfg.loss.dual_clip, cfg.rollout.budgets) == (0.0, 3.0, (8, 16))
  assert type(cfg.loss.dual_clip) is float and type(cfg.rollout.budgets) is tuple


def test_unknown_and_missing_fields_are_named():
  cd = config_dict.ConfigDict(config.new().to_dict())
  cd.rollout.budget = 8
  with pytest.raises(ValueError, match=r"config\.rollout\.budget is not a setting"):
    config.from_config_dict(cd)
  cd = config_dict.ConfigDict(config.new().to_dict())
  del cd.rollout.budgets
  with pytest.raises(ValueError, match=r"config\.rollout\.budgets is missing"):
    config.from_config_dict(cd)


def test_config_is_frozen_and_hashable_and_json():
  cfg = config.Config()
  with pytest.raises(dataclasses.FrozenInstanceError):
    cfg.steps = 1
  assert hash(cfg) == hash(config.Config())
  assert json.loads(json.dumps(config.to_json_dict(cfg)))["rollout"]["budgets"] == [512, 1024, 2048, 2560]
