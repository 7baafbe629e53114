"""Log-probabilities in chunks: against plain log-softmax, for every chunk, shard and cut; and the micro-batch cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hbpo_jax.learning import scoring
from hbpo_jax.models import decoder
from tests import oracle
from tests.learning import tiny


def problem(R=4, C=6, D=8, V=13, seed=0):
  rng = np.random.default_rng(seed)
  return (jnp.asarray(rng.normal(size=(R, C, D)), jnp.float32), jnp.asarray(rng.normal(size=(V, D)), jnp.float32),
          jnp.asarray(rng.integers(0, V, (R, C)), jnp.int32), jnp.asarray(rng.normal(size=(R, C)), jnp.float32))


@pytest.mark.parametrize("chunk, shards", [(1, 1), (5, 1), (7, 2), (24, 1), (1000, 4)])
def test_chunked_logps_match_the_loops(chunk, shards):
  hidden, head, targets, _ = problem()
  actual = scoring.chunked_logps(hidden, head, targets, temperature=0.7, chunk=chunk, shards=shards)
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, oracle.log_probabilities(hidden, head.T, targets, 0.7), rtol=0, atol=3e-6)


@pytest.mark.parametrize("chunk, shards", [(5, 1), (7, 2)])
def test_gradients_match_autodiff_of_the_whole(chunk, shards):
  hidden, head, targets, weight = problem()

  def whole(hidden, head):
    logp = jax.nn.log_softmax(jnp.einsum("rcd,vd->rcv", hidden, head) / 0.7)
    return jnp.sum(weight * jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0])

  def chunked(hidden, head):
    return jnp.sum(weight * scoring.chunked_logps(hidden, head, targets, temperature=0.7, chunk=chunk, shards=shards))

  actual, expected = (jax.jit(jax.grad(f, (0, 1)))(hidden, head) for f in (chunked, whole))
  tiny.assert_trees_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes, V, D", [
    (dict(), 13, 16), (dict(data=2), 13, 8), (dict(tensor=2), 14, 8), (dict(data=2, tensor=2), 14, 8),
    (dict(data=8), 13, 8), (dict(), 13, 12)])
def test_the_head_s_gradient_is_the_same_on_every_mesh(sizes, V, D):
  hidden, head, targets, weight = problem(R=8, D=D, V=V)
  mesh = tiny.make_mesh(8, **({"fsdp": 1} if sizes == {"data": 8} else {}), **sizes)
  shards = 8 // sizes.get("tensor", 1)

  def total(head, shards):
    return jnp.sum(weight * scoring.chunked_logps(hidden, head, targets, temperature=0.7, chunk=3, shards=shards))

  expected = jax.grad(total)(head, 1)
  with jax.set_mesh(mesh):
    actual = jax.jit(jax.grad(total), static_argnums=1)(head, shards)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
  if sizes != {"data": 8} and D % mesh.shape["fsdp"] == 0:
    assert actual.sharding.shard_shape(actual.shape)[1] == D // mesh.shape["fsdp"], "each device has its share"


def test_the_head_s_gradient_is_summed_in_float32():
  """4096 equal contributions: a bfloat16 sum would stop growing after 256 of them."""
  hidden = jnp.ones((1, 4096, 8), jnp.bfloat16)
  head, targets = jnp.zeros((2, 8), jnp.float32), jnp.zeros((1, 4096), jnp.int32)
  gradient = jax.grad(lambda h: jnp.sum(scoring.chunked_logps(hidden, h, targets, temperature=1.0, chunk=1)))(head)
  np.testing.assert_allclose(gradient, np.outer([2048.0, -2048.0], np.ones(8)), rtol=1e-3)


def test_no_array_holds_all_logits():
  R, C, D, V, chunk = 4, 64, 8, 1009, 16
  hidden, head, targets, weight = problem(R, C, D, V)

  def value(hidden, head):
    return jnp.sum(weight * scoring.chunked_logps(hidden, head, targets, temperature=1.0, chunk=chunk))

  program = str(jax.make_jaxpr(jax.grad(value, (0, 1)))(hidden, head))
  assert f"f32[1,{chunk},{V}]" in program
  for shape in (f"{R},{C},{V}", f"{R * C},{V}", f"{R * C // chunk},1,{chunk},{V}"):
    assert f"[{shape}]" not in program, shape


def test_a_token_is_predicted_by_the_column_before_it():
  learner = tiny.make_learner()
  params, batch = tiny.make_params(learner), tiny.make_batch()
  hidden = decoder.forward(params, tiny.ARCH, batch.tokens_RT, batch.segment_RT, batch.position_RT,
                           compute_dtype=jnp.float32)
  logp_RTV = np.asarray(jax.nn.log_softmax(decoder.logits(params, tiny.ARCH, hidden)))
  score = np.asarray(learner.score(params, batch))
  for r in range(0, tiny.ROWS, 5):
    for c in range(tiny.C):
      column = tiny.P + c
      real = batch.segment_RT[r, column] == 1
      expected = logp_RTV[r, column - 1, batch.tokens_RT[r, column]] if real else 0.0
      assert score[r, c] == pytest.approx(expected, abs=1e-5), (r, c)


def test_temperature_divides_the_logits():
  learner = tiny.make_learner()
  params, batch = tiny.make_params(learner), tiny.make_batch()
  at = {t: np.asarray(scoring.score(params, tiny.ARCH, learner.cfg, batch, t)) for t in (1.0, 50.0)}
  assert not np.allclose(at[1.0], at[50.0], atol=1e-2)
  np.testing.assert_allclose(at[50.0][batch.completion_mask_RC], -np.log(61), atol=0.2)


@pytest.mark.parametrize("rows, n_micro, shards", [(12, 1, 1), (12, 4, 1), (12, 5, 1), (16, 3, 4), (16, 2, 8)])
def test_the_cut_keeps_every_row_once_and_on_its_shard(rows, n_micro, shards):
  x = jnp.arange(1, rows + 1)[:, None] * jnp.ones((1, 3), jnp.int32)
  cut = scoring.cut_micro_batches(x, n_micro, shards)
  assert cut.shape[0] == n_micro
  found = np.asarray(cut[..., 0]).reshape(-1)
  assert sorted(found[found > 0]) == list(range(1, rows + 1))
  by_shard = np.asarray(cut[..., 0]).reshape(n_micro, shards, -1)
  for shard in range(shards):
    found = by_shard[:, shard][by_shard[:, shard] > 0]
    np.testing.assert_array_equal(np.sort(found), np.arange(rows // shards) + 1 + shard * (rows // shards))
  np.testing.assert_array_equal(scoring.join_micro_batches(cut, rows, shards), x)


@pytest.mark.parametrize("rows, microbatch_rows, shards, expected", [
    (32, 0, 1, 1), (32, 32, 1, 1), (32, 8, 1, 4), (32, 5, 1, 7), (32, 1, 8, 4), (32, 8, 8, 4), (32, 1, 1, 32)])
def test_number_of_micro_batches(rows, microbatch_rows, shards, expected):
  assert scoring.count_micro_batches(rows, microbatch_rows, shards) == expected
