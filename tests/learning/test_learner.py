"""Updates: independent of the cut, of padding and of the mesh; skipped when not finite; compiled once."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hbpo_jax.learning import guards
from hbpo_jax.learning import learner as learner_lib
from hbpo_jax.learning.reference import Reference, host_memory_works
from hbpo_jax.models import decoder
from hbpo_jax.structs import Batch
from tests import oracle
from tests.learning import tiny

EVERYTHING = {"dual_clip": 3.0, "kl_coef": 0.1, "importance_cap": 2.0}


@functools.lru_cache
def gradient_program(learner, n_micro, shards):
  def run(params, batch):
    def fn(p, b, n):
      return learner_lib.policy_loss(p, b, n, 1.0, arch=learner.arch, cfg=learner.cfg, shards=shards)

    gradient, sums, n_tokens = learner_lib.grads(fn, params, batch, n_micro=n_micro, shards=shards)
    return sums.loss / n_tokens, gradient

  return jax.jit(run)


def gradient_of(learner, params, batch, n_micro=1):
  """(loss, gradients) of the policy loss, on the host."""
  with jax.set_mesh(learner.mesh):
    loss, gradient = gradient_program(learner, n_micro, learner.shards)(params, learner.place(batch))
  return float(loss), tiny.host(gradient)


@pytest.fixture(scope="module")
def one():
  """A learner on one device, its params and a batch."""
  learner = tiny.make_learner(loss=EVERYTHING)
  params = tiny.make_params(learner)
  return learner, params, tiny.with_own_logps(learner, params, tiny.make_batch())


def test_the_loss_is_the_token_mean_of_the_loops(one):
  learner, params, batch = one
  logp = np.asarray(learner.score(params, batch))
  mask = batch.completion_mask_RC
  sums = oracle.policy_loss(
      logp, batch.logp_old_RC, batch.advantage_RC[:, 0], mask, clip_low=0.2, clip_high=0.28, dual_clip=3.0, kl_coef=0.1,
      importance_cap=2.0, logp_ref=batch.logp_ref_RC, logp_sampler=batch.logp_sampler_RC)
  state, metrics = learner.update(learner.new_state(jax.tree.map(jnp.copy, params)), batch)
  n = mask.sum()
  for name, key in [("loss", "loss"), ("policy_loss", "policy"), ("kl_ref", "kl"), ("approx_kl", "approx_kl"),
                    ("clip_fraction_low", "clipped_low"), ("clip_fraction_high", "clipped_high"),
                    ("ratio_mean", "ratio"), ("importance_mean", "importance")]:
    assert float(metrics[name]) == pytest.approx(sums[key] / n, rel=1e-4, abs=1e-6), name
  assert float(metrics["ratio_max"]) == pytest.approx(sums["ratio_max"], rel=1e-4)
  assert float(metrics["tokens"]) == n
  assert float(metrics["lr"]) == pytest.approx(1e-3)
  assert float(metrics["clip_fraction_low"]) > 0 and float(metrics["clip_fraction_high"]) > 0
  assert (int(state.update), int(state.step)) == (1, 0)


def test_the_gradient_is_that_of_an_unchunked_loss(one):
  """The whole path against autodiff through plain log-softmax, with the surrogate written as a minimum."""
  _, params, batch = one
  simple = tiny.make_learner()

  def plain(params):
    hidden = decoder.forward(params, tiny.ARCH, batch.tokens_RT, batch.segment_RT, batch.position_RT,
                             compute_dtype=jnp.float32)
    logp_RTV = jax.nn.log_softmax(decoder.logits(params, tiny.ARCH, hidden[:, tiny.P - 1:-1]))
    logp = jnp.take_along_axis(logp_RTV, batch.tokens_RT[:, tiny.P:, None], axis=-1)[..., 0]
    ratio = jnp.exp(logp - batch.logp_old_RC)
    a = batch.advantage_RC
    surrogate = jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.28) * a)
    return -jnp.sum(jnp.where(batch.completion_mask_RC, surrogate, 0)) / batch.completion_mask_RC.sum()

  loss, gradient = jax.jit(jax.value_and_grad(plain))(params)
  actual_loss, actual = gradient_of(simple, params, batch)
  assert actual_loss == pytest.approx(float(loss), rel=1e-5)
  tiny.assert_trees_close(actual, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n_micro", [8, 5])
def test_one_micro_batch_or_many(one, n_micro):
  learner, params, batch = one
  loss, gradient = gradient_of(learner, params, batch)
  cut_loss, cut_gradient = gradient_of(learner, params, batch, n_micro=n_micro)
  assert cut_loss == pytest.approx(loss, rel=1e-5)
  tiny.assert_trees_close(cut_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_micro_batches_in_a_whole_update(one):
  learner, params, batch = one
  cut = tiny.make_learner(loss=EVERYTHING, learner={"microbatch_rows": 4})
  _, whole_metrics = learner.update(learner.new_state(jax.tree.map(jnp.copy, params)), batch)
  _, cut_metrics = cut.update(cut.new_state(jax.tree.map(jnp.copy, params)), batch)
  tiny.assert_trees_close(cut_metrics, whole_metrics, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(cut.score(params, batch), learner.score(params, batch), atol=1e-5)


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["fsdp 8", "2 x 2 x 2"])
def test_one_device_or_eight(one, sizes):
  learner, params, batch = one
  eight = tiny.make_learner(8, mesh_sizes=sizes, loss=EVERYTHING, learner={"microbatch_rows": 8})
  eight_params = tiny.make_params(eight)
  np.testing.assert_allclose(eight.score(eight_params, batch), learner.score(params, batch), atol=1e-5)
  loss, gradient = gradient_of(learner, params, batch)
  eight_loss, eight_gradient = gradient_of(eight, eight_params, batch, n_micro=2)
  assert eight_loss == pytest.approx(loss, rel=1e-5)
  tiny.assert_trees_close(eight_gradient, gradient, rtol=1e-4, atol=1e-6)

  if sizes:
    return  # a whole update on one eight-device mesh is enough
  state, metrics = learner.update(learner.new_state(jax.tree.map(jnp.copy, params)), batch)
  eight_state, eight_metrics = eight.update(eight.new_state(eight_params), batch)
  tiny.assert_trees_close(eight_metrics, metrics, rtol=1e-4, atol=1e-5)
  assert jax.tree.map(lambda x: x.sharding, eight_state.params) == eight.param_shardings
  # Adam divides by the root of tiny second moments, so equal gradients give only nearly equal first updates.
  tiny.assert_trees_close(eight_state.params, state.params, rtol=0, atol=2.1e-3)


def test_padding_changes_nothing(one):
  """More prompt slots, more completion slots, and other ids in the padding: the same loss and gradient."""
  learner, params, batch = one
  more_p, more_c = 3, 4

  def pad_T(x):
    return np.pad(x, ((0, 0), (more_p, more_c)))

  def pad_C(x):
    return np.pad(x, ((0, 0), (0, more_c)))

  rng = np.random.default_rng(1)
  segment = pad_T(batch.segment_RT)
  wide = Batch(
      tokens_RT=np.where(segment == 1, pad_T(batch.tokens_RT), rng.integers(0, 61, segment.shape)).astype(np.int32),
      segment_RT=segment, position_RT=pad_T(batch.position_RT), advantage_RC=batch.advantage_RC,
      completion_mask_RC=pad_C(batch.completion_mask_RC), logp_old_RC=pad_C(batch.logp_old_RC),
      logp_ref_RC=pad_C(batch.logp_ref_RC), logp_sampler_RC=pad_C(batch.logp_sampler_RC))
  loss, gradient = gradient_of(learner, params, batch)
  wide_loss, wide_gradient = gradient_of(learner, params, wide)
  assert wide_loss == pytest.approx(loss, rel=1e-5)
  tiny.assert_trees_close(wide_gradient, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spoil", ["loss", "gradient"])
def test_a_non_finite_update_leaves_the_state_bit_for_bit(spoil):
  learner = tiny.make_learner(loss=EVERYTHING)
  state = learner.new_state(tiny.make_params(learner))
  batch = learner.place(tiny.with_own_logps(learner, state.params, tiny.make_batch()))
  state, metrics = learner.update(state, batch)
  assert float(metrics["nonfinite"]) == 0
  before = tiny.host(state)
  advantage = batch.advantage_RC.at[0].set(jnp.nan if spoil == "loss" else 3e38)
  state, metrics = learner.update(state, batch.replace(advantage_RC=advantage))
  assert float(metrics["nonfinite"]) == 1
  tiny.assert_trees_equal(state, before)
  with pytest.raises(FloatingPointError, match="step 17: (loss|grad_norm) is (nan|inf|-inf).*learning_rate"):
    guards.check_finite(metrics, 17)
  state, metrics = learner.update(state, batch)
  guards.check_finite(metrics, 18)
  assert int(state.update) == 2
  assert not np.array_equal(tiny.host(state.params)["embed"], before.params["embed"])


def run_step(learner, state, batch):
  """A whole training step, as `train` does it."""
  batch = learner.place(batch)
  batch = batch.replace(logp_old_RC=learner.score(state.params, batch))
  jax.device_get(learner.sampler_gap(batch))
  for minibatch in learner.split_minibatches(batch):
    state, metrics = learner.update(state, minibatch)
    jax.device_get(metrics)
  return state.replace(step=state.step + 1)


@pytest.mark.parametrize("n_devices", [1, 8])
def test_a_second_step_compiles_nothing(n_devices, caplog):
  learner = tiny.make_learner(n_devices, learner={"microbatch_rows": 8})
  state = learner.new_state(tiny.make_params(learner))
  batches = [tiny.make_batch(seed) for seed in (0, 1, 2)]
  with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
    state = run_step(learner, state, batches[0])
    assert any("Compiling" in r.getMessage() for r in caplog.records)  # the log does report compilations
    caplog.clear()
    for batch in batches[1:]:
      state = run_step(learner, state, batch)
    assert [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()] == []
  assert (int(state.step), int(state.update)) == (3, 6)


def test_the_state_is_donated():
  learner = tiny.make_learner(loss=EVERYTHING)
  old = learner.new_state(tiny.make_params(learner))
  learner.update(old, tiny.with_own_logps(learner, old.params, tiny.make_batch()))
  assert all(x.is_deleted() for x in jax.tree.leaves((old.params, old.opt_state)))


def test_minibatches_are_the_rows_in_order():
  learner = tiny.make_learner(8, learner={"minibatches": 4})
  batch = tiny.make_batch()
  parts = learner.split_minibatches(batch)
  assert len(parts) == 4
  tiny.assert_trees_equal(jax.tree.map(lambda *x: np.concatenate([np.asarray(a) for a in x]), *parts), batch)


def test_rows_that_do_not_divide_are_refused():
  learner = tiny.make_learner(8)
  with pytest.raises(ValueError, match="12 rows does not divide.*8 devices.*rollout.queries"):
    learner.place(tiny.make_batch(rows=12))
  with pytest.raises(ValueError, match="learner.minibatches=2 does not cut 24 rows"):
    learner.split_minibatches(tiny.make_batch(rows=24))


def test_a_batch_without_scores_is_refused(one):
  learner, params, batch = one
  for name in ("logp_old_RC", "advantage_RC"):
    with pytest.raises(ValueError, match=f"batch.{name} is None"):
      learner.update(learner.new_state(params), batch.replace(**{name: None}))
  with pytest.raises(ValueError, match="logp_sampler_RC is None"):
    learner.sampler_gap(batch.replace(logp_sampler_RC=None))


def test_sampler_gap_by_hand():
  learner = tiny.make_learner()
  batch = tiny.make_batch()
  mask = batch.completion_mask_RC
  gap = learner.sampler_gap(batch.replace(logp_sampler_RC=np.where(mask, batch.logp_old_RC, np.nan)))
  assert {name: float(value) for name, value in gap.items()} == {
      "sampler_gap_mean": 0.0, "sampler_gap_max": 0.0, "sampler_kl": 0.0, "sampler_outside_clip": 0.0}
  moved = batch.logp_old_RC.copy()
  r, c = np.argwhere(mask)[3]
  moved[r, c] += 0.5
  gap = learner.sampler_gap(batch.replace(logp_sampler_RC=moved))
  assert float(gap["sampler_gap_max"]) == pytest.approx(0.5, rel=1e-5)
  assert float(gap["sampler_gap_mean"]) == pytest.approx(0.5 / mask.sum(), rel=1e-4)
  # log(trainer / sampler) = -0.5 at one token; the sampler's distribution is the one the KL is taken over.
  assert float(gap["sampler_kl"]) == pytest.approx((np.exp(-0.5) - 1 + 0.5) / mask.sum(), rel=1e-4)
  assert float(gap["sampler_outside_clip"]) == pytest.approx(1 / mask.sum())


@pytest.mark.parametrize("bounds", [{}, {"clip_low": 0.05, "clip_high": 0.4}])
def test_sampler_outside_clip_takes_the_bounds_of_the_loss(bounds):
  learner = tiny.make_learner(loss=bounds)
  low, high = 1 - learner.cfg.loss.clip_low, 1 + learner.cfg.loss.clip_high
  batch = tiny.make_batch()
  mask = batch.completion_mask_RC
  ratios = np.resize([low - 0.01, low + 0.01, 1.0, high - 0.01, high + 0.01], mask.shape)  # trainer / sampler
  gap = learner.sampler_gap(batch.replace(logp_sampler_RC=np.where(mask, batch.logp_old_RC - np.log(ratios), np.nan)))
  expected = ((ratios < low) | (ratios > high))[mask].mean()
  assert 0.3 < expected < 0.5 and float(gap["sampler_outside_clip"]) == pytest.approx(expected)
  assert float(gap["sampler_kl"]) == pytest.approx((ratios - 1 - np.log(ratios))[mask].mean(), rel=1e-4)


def test_sampler_kl_estimates_the_kl_of_the_sampler_to_the_trainer():
  """Tokens drawn from a known distribution: the mean is KL(sampler || trainer), not the other direction."""
  sampler, trainer = np.array([0.9, 0.09, 0.01]), np.array([0.5, 0.3, 0.2])
  tokens = np.random.default_rng(0).choice(3, size=(400, 50), p=sampler)
  batch = Batch(None, None, None, np.ones(tokens.shape, bool), logp_old_RC=np.log(trainer)[tokens].astype(np.float32),
                logp_sampler_RC=np.log(sampler)[tokens].astype(np.float32))
  gap = learner_lib.sampler_gap(batch, tiny.make_cfg().loss)
  forward, reverse = (np.sum(p * np.log(p / q)) for p, q in ((sampler, trainer), (trainer, sampler)))
  assert abs(forward - reverse) > 0.1
  assert float(gap["sampler_kl"]) == pytest.approx(forward, rel=0.03)


def test_a_gap_beyond_all_measure_stays_finite():
  batch = tiny.make_batch()
  gap = tiny.make_learner().sampler_gap(batch.replace(logp_sampler_RC=batch.logp_old_RC - 200))
  assert all(np.isfinite(float(value)) for value in gap.values()) and float(gap["sampler_outside_clip"]) == 1


def test_the_importance_cap_truncates_through_a_whole_update(one):
  """Weights min(pi_old / pi_sampler, 2), one per row here: the same update as that of advantages times the weight."""
  learner, params, batch = one
  ratio_R = np.resize([0.25, 1.0, 1.9, 2.5, 30.0], len(batch.advantage_RC)).astype(np.float32)
  old = np.asarray(learner.score(params, batch))
  batch = batch.replace(logp_old_RC=old, logp_ref_RC=old, logp_sampler_RC=old)  # On policy: all weights 1, no KL.
  weight_R = np.minimum(ratio_R, learner.cfg.loss.importance_cap)
  update = lambda batch: learner.update(learner.new_state(jax.tree.map(jnp.copy, params)), batch)

  state, metrics = update(batch.replace(logp_sampler_RC=old - np.log(ratio_R)[:, None]))
  expected_state, expected = update(batch.replace(advantage_RC=weight_R[:, None] * batch.advantage_RC))
  _, unweighted = update(batch)
  n_tokens_R = batch.completion_mask_RC.sum(axis=1)
  assert float(metrics["importance_mean"]) == pytest.approx((weight_R * n_tokens_R).sum() / n_tokens_R.sum(), rel=1e-5)
  for name in ("loss", "grad_norm"):
    assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=1e-4), name
    assert float(metrics[name]) != pytest.approx(float(unweighted[name]), rel=0.01), name
  # Adam divides by the root of tiny second moments, so equal gradients give only nearly equal first updates.
  tiny.assert_trees_close(state.params, expected_state.params, rtol=0, atol=2.1e-3)


@pytest.mark.parametrize("pack", [True, False])
def test_supervised_updates_learn_and_start_at_the_mean_cross_entropy(pack):
  learner = tiny.make_learner(optimizer={"learning_rate": 3e-2}, learner={"pack": pack})
  state = learner.new_state(tiny.make_params(learner))
  batch = tiny.make_batch()
  expected = -np.asarray(learner.score(state.params, batch))[batch.completion_mask_RC].mean()
  losses = []
  for _ in range(20):
    state, metrics = learner.sft_update(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses[0] == pytest.approx(expected, rel=1e-5)
  assert losses[-1] < 0.6 * losses[0]
  assert set(metrics) == {"loss", "grad_norm", "lr", "tokens", "nonfinite"}


def test_supervised_updates_are_the_same_in_packed_rows():
  found = []
  for pack in (True, False):
    learner = tiny.make_learner(learner={"pack": pack})
    found.append(learner.sft_update(learner.new_state(tiny.make_params(learner)), tiny.make_batch())[1])
  for name in ("loss", "grad_norm", "tokens"):
    assert float(found[0][name]) == pytest.approx(float(found[1][name]), rel=1e-5), name


def test_bfloat16_weights_keep_their_dtype_and_float32_moments():
  learner = tiny.make_learner()
  params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), tiny.make_params(learner))
  state = learner.new_state(params)
  for _ in range(2):
    state, metrics = learner.sft_update(state, tiny.make_batch())
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
  assert {x.dtype for x in jax.tree.leaves(state.opt_state)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
  assert float(metrics["nonfinite"]) == 0


def test_abstract_state_describes_the_state():
  learner = tiny.make_learner(8)
  state = learner.new_state(tiny.make_params(learner))

  def describe(x):
    return x.shape, x.dtype, x.sharding

  assert jax.tree.map(describe, learner.abstract_state()) == jax.tree.map(describe, state)


@pytest.mark.parametrize("n_devices", [1, 8])
def test_the_reference_survives_the_updates(n_devices):
  learner = tiny.make_learner(n_devices, loss=EVERYTHING, learner={"microbatch_rows": 8} if n_devices == 8 else None)
  params = tiny.make_params(learner)
  reference = Reference(learner, params)
  assert reference.memory_kind == ("pinned_host" if host_memory_works(learner.mesh) else "device")
  state = learner.new_state(params)
  batch = learner.place(tiny.with_own_logps(learner, params, tiny.make_batch()))
  before = np.asarray(learner.score(params, batch))
  np.testing.assert_array_equal(reference.score(batch), before)
  state, _ = learner.update(state, batch)
  np.testing.assert_array_equal(reference.score(batch), before)
  assert not np.allclose(learner.score(state.params, batch), before)


def test_without_host_memory_the_reference_stays_on_the_devices(monkeypatch):
  learner = tiny.make_learner()
  monkeypatch.setattr("hbpo_jax.learning.reference.HOST_MEMORY", "no such memory")
  reference = Reference(learner, tiny.make_params(learner))
  assert reference.memory_kind == jax.devices()[0].default_memory().kind
  assert np.isfinite(reference.score(learner.place(tiny.make_batch()))).all()


def test_the_only_update_of_a_batch_scores_it_itself():
  """The same update as from pi_old of a pass of its own, with the sampler's gap among its metrics."""
  learner = tiny.make_learner(loss=EVERYTHING, learner={"minibatches": 1, "microbatch_rows": 8})
  params = tiny.make_params(learner)
  batch = tiny.with_own_logps(learner, params, tiny.make_batch())
  unscored, nothing = learner.score_old(params, batch.replace(logp_old_RC=None))
  assert unscored.logp_old_RC is None and nothing == {}
  old = np.asarray(learner.score(params, batch))
  update = lambda batch: learner.update(learner.new_state(jax.tree.map(jnp.copy, params)), batch)
  expected_state, expected = update(batch.replace(logp_old_RC=old))
  state, metrics = update(unscored)
  gap = tiny.host(learner.sampler_gap(batch.replace(logp_old_RC=old)))
  assert 0.1 < gap["sampler_gap_mean"] < gap["sampler_gap_max"]
  tiny.assert_trees_close(metrics, expected | gap, rtol=1e-4, atol=1e-5)
  assert float(metrics["ratio_max"]) == 1
  tiny.assert_trees_close(state.params, expected_state.params, rtol=0, atol=2.1e-3)


def test_several_updates_of_a_batch_are_scored_before_the_first(one):
  learner, params, batch = one
  scored, gap = learner.score_old(params, batch.replace(logp_old_RC=None))
  np.testing.assert_array_equal(scored.logp_old_RC, learner.score(params, batch))
  assert set(gap) == {"sampler_gap_mean", "sampler_gap_max", "sampler_kl", "sampler_outside_clip"}
  with pytest.raises(ValueError, match="logp_old_RC is None; score the batch"):
    learner.update(learner.new_state(params), batch.replace(logp_old_RC=None))


def test_smaller_moments_in_a_whole_update(one):
  """The learner accepts every form of the optimizer's state, on eight devices too."""
  _, _, batch = one
  smaller = {"first_moment_dtype": "bfloat16", "second_moment": "factored"}
  eight, plain = (tiny.make_learner(8, loss=EVERYTHING, optimizer=o) for o in (smaller, {}))
  state, metrics = eight.update(eight.new_state(tiny.make_params(eight)), batch)
  _, expected = plain.update(plain.new_state(tiny.make_params(plain)), batch)
  assert float(metrics["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=1e-5)
  assert {str(x.dtype) for x in jax.tree.leaves(state.opt_state)} == {"bfloat16", "float32", "int32"}


def test_a_kernel_of_another_platform_is_refused():
  with pytest.raises(ValueError, match="config.learner.attention_kernel='splash' runs on TPU only"):
    tiny.make_learner(learner={"attention_kernel": "splash"})
