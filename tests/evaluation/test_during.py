"""Which step of a training run is kept as its best."""

import dataclasses

import pytest

from hbpo_jax import config
from hbpo_jax.evaluation.during import Limits


def limits(**settings):
  return Limits.of(dataclasses.replace(config.Config(), eval=config.EvalConfig(**settings)), 0.8, 100.0)


def test_by_default_the_most_accurate_step_with_no_more_tokens_than_the_base_model():
  rule = limits()
  assert rule.better(0.5, 100.0, None) and not rule.better(0.9, 100.1, None)
  best = {"accuracy": 0.7, "tokens": 50.0}
  assert rule.better(0.71, 99.0, best) and not rule.better(0.69, 10.0, best) and not rule.better(0.9, 101.0, best)
  assert rule.better(0.7, 49.0, best) and not rule.better(0.7, 50.0, best), "a tie goes to fewer tokens"


def test_or_the_fewest_tokens_at_no_less_accuracy():
  rule = limits(best="tokens")
  assert rule.better(0.8, 400.0, None) and not rule.better(0.79, 1.0, None)
  best = {"accuracy": 0.8, "tokens": 50.0}
  assert rule.better(0.8, 49.0, best) and not rule.better(0.9, 51.0, best)
  assert rule.better(0.81, 50.0, best), "a tie goes to accuracy"


@pytest.mark.parametrize("settings,accuracy,tokens,admitted", [
    ({"best_max_tokens": 40.0}, 0.9, 41.0, False), ({"best_max_tokens": 400.0}, 0.9, 390.0, True),
    ({"best": "tokens", "best_min_accuracy": 0.5}, 0.51, 90.0, True),
    ({"best": "tokens", "best_min_accuracy": 0.95}, 0.94, 90.0, False)])
def test_the_limits_can_be_set(settings, accuracy, tokens, admitted):
  assert limits(**settings).better(accuracy, tokens, None) == admitted
