"""The schedule and the optimizer: hand values, and AdamW against its own formula."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
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


def test_a_first_moment_in_bfloat16_is_rounded_and_nothing_else():
  cfg = OptimizerConfig(learning_rate=0.1, first_moment_dtype="bfloat16")
  params = {"w": jnp.linspace(-1.0, 1.0, 7)}
  whole, half = (optimizer.make(c, 10) for c in (OptimizerConfig(learning_rate=0.1), cfg))
  states = [whole.init(params), half.init(params)]
  dtypes = lambda state: sorted({str(x.dtype) for x in jax.tree.leaves(state) if x.ndim})
  assert dtypes(states[0]) == ["float32"] and dtypes(states[1]) == ["bfloat16", "float32"]
  for seed in range(5):
    gradient = {"w": jax.random.normal(jax.random.key(seed), (7,))}
    updates = [tx.update(gradient, state, params) for tx, state in zip((whole, half), states)]
    states = [state for _, state in updates]
    np.testing.assert_allclose(updates[1][0]["w"], updates[0][0]["w"], rtol=0.02, atol=1e-3)


def test_a_factored_second_moment_follows_its_formula():
  """Two updates of a [3, 128, 160] stack, by loops over matrices: v = row mean x column mean / mean."""
  cfg = OptimizerConfig(learning_rate=0.1, weight_decay=0.01, clip_norm=1e9, second_moment="factored", b2=0.9)
  tx, rng = optimizer.make(cfg, 10), np.random.default_rng(0)
  value = rng.normal(size=(3, 128, 160))
  params = {"w": jnp.asarray(value, jnp.float32), "small": jnp.ones(5)}
  state = tx.init(params)
  assert max(x.size for x in jax.tree.leaves(state) if x.shape != value.shape) == 3 * 160
  squares, m, small_v, small_m, small = np.zeros_like(value), np.zeros_like(value), 0.0, 0.0, 1.0
  for t in (1, 2):
    gradient = rng.normal(size=value.shape)
    updates, state = tx.update({"w": jnp.asarray(gradient, jnp.float32), "small": jnp.full(5, 0.5 * t)}, state, params)
    params = jax.tree.map(jnp.add, params, updates)
    squares = 0.9 * squares + 0.1 * gradient**2
    v = squares / (1 - 0.9**t)
    row, column = v.mean(axis=2, keepdims=True), v.mean(axis=1, keepdims=True)
    m = 0.9 * m + 0.1 * gradient / np.sqrt(row * column / row.mean(axis=1, keepdims=True))
    value = value - 0.1 * (m / (1 - 0.9**t) + 0.01 * value)
    np.testing.assert_allclose(params["w"], value, rtol=1e-4, atol=1e-5)
    small_v = 0.9 * small_v + 0.1 * (0.5 * t)**2
    small_m = 0.9 * small_m + 0.1 * 0.5 * t / np.sqrt(small_v / (1 - 0.9**t))
    small = small - 0.1 * (small_m / (1 - 0.9**t) + 0.01 * small)
    np.testing.assert_allclose(params["small"], small, rtol=1e-4)


@pytest.mark.parametrize("second_moment", ["full", "factored"])
def test_moments_lie_like_their_parameters(second_moment):
  mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
  placed = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
  params = {"w": jax.ShapeDtypeStruct((3, 128, 160), jnp.float32), "b": jax.ShapeDtypeStruct((8,), jnp.float32)}
  tx = optimizer.make(OptimizerConfig(second_moment=second_moment), 10)
  found = optimizer.state_shardings(
      tx, params, {"w": placed(None, "tensor", "fsdp"), "b": placed("fsdp")}, placed())
  shapes = jax.eval_shape(tx.init, params)
  by_shape = {x.shape: s.spec for x, s in zip(jax.tree.leaves(shapes), jax.tree.leaves(found), strict=True)}
  expected = {(3, 128, 160): PartitionSpec(None, "tensor", "fsdp"), (8,): PartitionSpec("fsdp"), (): PartitionSpec()}
  if second_moment == "factored":
    expected |= {(3, 128): PartitionSpec(None, "tensor"), (3, 160): PartitionSpec(None, "fsdp"), (1,): PartitionSpec()}
  assert by_shape == expected
  state = jax.jit(tx.init, out_shardings=found)(jax.tree.map(lambda x: jnp.zeros(x.shape), params))
  assert jax.tree.map(lambda x: x.sharding, state) == found
