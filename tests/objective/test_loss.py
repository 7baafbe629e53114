"""The policy loss: the oracle's loops and numerical gradient, hand-computed values, padding and cut."""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hbpo_jax.config import LossConfig
from hbpo_jax.objective import loss
from tests import oracle

VARIANTS = {
    "paper": {},
    "dual clip": {"dual_clip": 3.0},
    "k1": {"kl_coef": 0.3, "kl_estimator": "k1"},
    "k2": {"kl_coef": 0.3, "kl_estimator": "k2"},
    "k3": {"kl_coef": 0.3, "kl_estimator": "k3"},
    "importance": {"importance_cap": 1.5},
    "everything": {"dual_clip": 1.7, "kl_coef": 0.1, "importance_cap": 2.0, "clip_low": 0.1, "clip_high": 0.4},
}
sums_of = jax.jit(loss.policy_sums, static_argnames="cfg")


def inputs(seed, R=5, C=7):
  """Arguments of policy_sums as float64, ratios from 0.2 to 5 and beyond."""
  rng = np.random.default_rng(seed)
  logp = -rng.exponential(1.0, (R, C))
  mask = np.arange(C) < rng.integers(0, C + 1, R)[:, None]
  mask[0] = True
  return dict(
      logp_RC=logp, logp_old_RC=logp + rng.normal(0, 0.7, (R, C)), advantage_RC=rng.normal(0, 2, (R, 1)), mask_RC=mask,
      logp_ref_RC=logp + rng.normal(0, 0.5, (R, C)), logp_sampler_RC=logp + rng.normal(0, 0.5, (R, C)))


def ask_oracle(function, x, settings):
  return function(x["logp_RC"], x["logp_old_RC"], x["advantage_RC"][:, 0], x["mask_RC"], logp_ref=x["logp_ref_RC"],
                  logp_sampler=x["logp_sampler_RC"], **(dict(clip_low=0.2, clip_high=0.28) | settings))


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_sums_and_gradient_match_the_loops(settings):
  cfg = LossConfig(**settings)
  for seed in range(3):
    x = inputs(seed)
    with jax.enable_x64(True):
      x = jax.tree.map(jnp.asarray, x)
      actual = sums_of(**x, cfg=cfg)
      gradient = jax.jit(jax.grad(lambda logp, x: loss.policy_sums(**(x | {"logp_RC": logp}), cfg=cfg).loss))(
          x["logp_RC"], x)
    x = jax.tree.map(np.asarray, x)
    expected = ask_oracle(oracle.policy_loss, x, settings)
    for name, value in expected.items():
      np.testing.assert_allclose(getattr(actual, name), value, rtol=1e-9, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(
        gradient, ask_oracle(oracle.policy_loss_gradient, x, settings), rtol=1e-5, atol=1e-7)


def one_token(advantage, ratio, **settings):
  """(loss, d loss / d logp) of a single token."""
  def value(logp):
    return loss.policy_sums(logp, jnp.zeros((1, 1)), jnp.array([[advantage]]), jnp.ones((1, 1), bool),
                            cfg=LossConfig(**settings)).loss
  result, gradient = jax.value_and_grad(value)(jnp.full((1, 1), jnp.log(ratio)))
  return float(result), float(gradient[0, 0])


@pytest.mark.parametrize("advantage, ratio, settings, expected, has_gradient", [
    (2.0, 1.0, {}, -2.0, True),
    (2.0, 1.2, {}, -2.4, True),        # inside [0.8, 1.28]
    (2.0, 1.5, {}, -2.56, False),      # good and already likelier by 28 %
    (2.0, 0.5, {}, -1.0, True),        # good and less likely: never clipped
    (-2.0, 0.5, {}, 1.6, False),       # bad and already 20 % less likely
    (-2.0, 1.5, {}, 3.0, True),        # bad and likelier: never clipped ...
    (-2.0, 5.0, {}, 10.0, True),
    (-2.0, 5.0, {"dual_clip": 3.0}, 6.0, False),  # ... but by the dual clip
    (-2.0, 2.9, {"dual_clip": 3.0}, 5.8, True),
    (2.0, 5.0, {"dual_clip": 3.0}, -2.56, False),
])
def test_clipping_by_hand(advantage, ratio, settings, expected, has_gradient):
  value, gradient = one_token(advantage, ratio, **settings)
  assert value == pytest.approx(expected, rel=1e-6)
  assert gradient == pytest.approx(-advantage * ratio if has_gradient else 0.0, rel=1e-6)


def test_kl_estimators_by_hand():
  logp, ref = jnp.log(jnp.array([[0.5]])), jnp.log(jnp.array([[0.25]]))
  k = {name: float(loss.kl_estimate(logp, ref, name)[0, 0]) for name in loss.KL_ESTIMATORS}
  assert k["k1"] == pytest.approx(0.6931472, rel=1e-6)
  assert k["k2"] == pytest.approx(0.2402265, rel=1e-6)
  assert k["k3"] == pytest.approx(0.5 + 0.6931472 - 1, rel=1e-6)


def test_k1_and_k3_estimate_the_same_divergence():
  p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
  exact = np.sum(p * np.log(p / q))
  for name in ("k1", "k3"):
    estimate = loss.kl_estimate(jnp.log(p)[None], jnp.log(q)[None], name)[0]
    assert float(np.sum(p * np.asarray(estimate))) == pytest.approx(exact, rel=1e-5)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(st.integers(0, 2**32 - 1))
def test_padding_is_never_read(seed):
  cfg = LossConfig(**VARIANTS["everything"])
  x = inputs(seed)
  gradient_of = jax.value_and_grad(lambda logp, x: loss.policy_sums(**(x | {"logp_RC": logp}), cfg=cfg).loss)
  as32 = functools.partial(jax.tree.map, lambda a: jnp.asarray(a, bool if a.dtype == bool else jnp.float32))
  value, gradient = gradient_of(as32(x)["logp_RC"], as32(x))
  spoilt = {k: np.where(x["mask_RC"], v, np.nan) if v.shape == x["mask_RC"].shape and k != "mask_RC" else v
            for k, v in x.items()}
  spoilt_value, spoilt_gradient = gradient_of(as32(spoilt)["logp_RC"], as32(spoilt))
  assert float(value) == float(spoilt_value)
  np.testing.assert_array_equal(gradient, spoilt_gradient)
  assert np.all(np.asarray(gradient)[~x["mask_RC"]] == 0)


def test_tokens_that_nobody_drew_are_not_weighed():
  x = {k: jnp.asarray(v, jnp.float32) for k, v in inputs(1).items()} | {"mask_RC": jnp.asarray(inputs(1)["mask_RC"])}
  forced_RC = np.zeros(x["mask_RC"].shape, bool)
  forced_RC[:, :2] = True
  cfg = LossConfig(importance_cap=1.5)
  given = sums_of(**x, forced_RC=forced_RC, cfg=cfg)
  # As if the sampler had drawn those by the trainer's own probabilities.
  drawn = sums_of(**(x | {"logp_sampler_RC": jnp.where(forced_RC, x["logp_old_RC"], x["logp_sampler_RC"])}), cfg=cfg)
  np.testing.assert_allclose(given.loss, drawn.loss, rtol=1e-6)
  np.testing.assert_allclose(given.importance, drawn.importance, rtol=1e-6)
  assert given.loss != sums_of(**x, cfg=cfg).loss


def test_micro_batches_add_up():
  x = inputs(0, R=8)
  cfg = LossConfig(**VARIANTS["everything"])
  whole = sums_of(**x, cfg=cfg)
  added = loss.LossSums.zero()
  for i in range(0, 8, 2):
    added = added.add(sums_of(**{k: v[i:i + 2] for k, v in x.items()}, cfg=cfg))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), added, whole)
  metrics = loss.mean_metrics(whole, jnp.float32(x["mask_RC"].sum()))
  assert float(metrics["ratio_max"]) == float(whole.ratio_max)
  assert float(metrics["loss"]) == pytest.approx(float(whole.loss) / x["mask_RC"].sum(), rel=1e-6)


def test_no_tokens_give_zeros():
  x = inputs(0) | {"mask_RC": np.zeros((5, 7), bool)}
  assert all(float(v) == 0 for v in jax.tree.leaves(sums_of(**x, cfg=LossConfig(**VARIANTS["everything"]))))


def test_extreme_ratios_stay_finite():
  x = dict(logp_old_RC=jnp.full((1, 1), -200.0), advantage_RC=jnp.array([[-1.0]]), mask_RC=jnp.ones((1, 1), bool))
  value, gradient = jax.value_and_grad(
      lambda logp: loss.policy_sums(logp, **x, cfg=LossConfig()).loss)(jnp.zeros((1, 1)))
  assert np.isfinite(float(value)) and np.isfinite(float(gradient[0, 0]))


@pytest.mark.parametrize("settings, message", [
    ({"kl_coef": 0.1}, "loss.kl_coef=0.1 needs logp_ref_RC"),
    ({"importance_cap": 2.0}, "loss.importance_cap=2.0 needs logp_sampler_RC"),
    ({"kl_estimator": "k4"}, "loss.kl_estimator='k4'"),
])
def test_missing_arrays_are_refused(settings, message):
  x = {k: v for k, v in inputs(0).items() if k not in ("logp_ref_RC", "logp_sampler_RC")}
  with pytest.raises(ValueError, match=message):
    loss.policy_sums(**x, cfg=LossConfig(**settings))


def test_cross_entropy_by_hand():
  logp = jnp.log(jnp.array([[0.5, 0.25, 0.1]]))
  mask = jnp.array([[True, True, False]])
  assert float(loss.cross_entropy_sum(logp, mask)) == pytest.approx(np.log(8), rel=1e-6)
