"""The schedule and the optimizer: hand values, and AdamW against its own formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hbpo_jax.config import OptimizerConfig
from hbpo_jax.learning import optimizer


def rates(total, **settings):
  schedule = optimizer.learning_rate(OptimizerConfig(learning_rate=2.0, **settings), total)
  return [float(schedule(jnp.int32(u))) for u in range(total)]


def test_schedules_by_hand():
  assert rates(3) == [2.0, 2.0, 2.0]
  assert rates(5, schedule="linear") == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])
  assert rates(5, schedule="linear", final_fraction=0.5) == pytest.approx([2.0, 1.75, 1.5, 1.25, 1.0])
  assert rates(3, schedule="cosine", final_fraction=0.1) == pytest.approx([2.0, 1.1, 0.2])


def test_warm_up_starts_above_zero_and_ends_at_the_peak():
  assert rates(6, warmup_updates=3) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
  assert rates(6, warmup_updates=3, schedule="linear") == pytest.approx([0.5, 1.0, 1.5, 2.0, 1.0, 0.0])


def test_an_unknown_schedule_is_refused():
  with pytest.raises(ValueError, match="optimizer.schedule='step'"):
    optimizer.learning_rate(OptimizerConfig(schedule="step"), 1)


def test_updates_follow_adamw_with_clipping():
  cfg = OptimizerConfig(learning_rate=0.1, weight_decay=0.01, clip_norm=1.0)
  tx = optimizer.make(cfg, 10)
  value = np.array([0.5, -2.0, 3.0])
  params, m, v = {"w": jnp.asarray(value, jnp.float32)}, np.zeros(3), np.zeros(3)
  state = tx.init(params)
  for t, gradient in enumerate([np.array([3.0, 4.0, 0.0]), np.array([0.1, -0.2, 0.3])], start=1):
    updates, state = tx.update({"w": jnp.asarray(gradient, jnp.float32)}, state, params)
    params = jax.tree.map(jnp.add, params, updates)
    gradient = gradient / max(1.0, np.linalg.norm(gradient))
    m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
    value = value - 0.1 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + 0.01 * value)
    np.testing.assert_allclose(params["w"], value, rtol=1e-4)
