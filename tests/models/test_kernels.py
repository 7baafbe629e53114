"""The accelerator kernels on CPU, interpreted, against plain JAX and NumPy."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

from hbpo_jax.models import kernels

both = pytest.mark.parametrize("kernel", kernels.DECODE[1:])


def normal(seed: int, *shapes, dtype="float32"):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def make_mesh(*sizes):
  return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)


# Whole rows.


def reference_attend(query, key, value, segment, mask=None):
  T, H, E = query.shape[1:]
  key, value = (jnp.repeat(x.astype(jnp.float32), H // x.shape[2], axis=2) for x in (key, value))
  score = jnp.einsum("rthe,rshe->rhts", query.astype(jnp.float32), key) / np.sqrt(E)
  mask = np.tril(np.ones((T, T), bool)) if mask is None else mask
  seen = mask & (segment[:, :, None] == segment[:, None, :])
  weight = jax.nn.softmax(jnp.where(seen[:, None], score, -1e30), axis=-1)
  return jnp.einsum("rhts,rshe->rthe", weight, value)


def segments(T: int) -> np.ndarray:
  """Rows of left padding, of two segments and right padding, of no padding, and of nothing else."""
  column = np.arange(T)
  left = column >= T // 3
  several = np.where(column < T // 4, 1, 2) * (column < T - 5)
  return np.stack([left, several, np.ones(T), np.zeros(T)]).astype(np.int32)


def tree(n_trunk: int, n_branches: int, n_leaf: int) -> np.ndarray:
  branch = np.concatenate([np.zeros(n_trunk), 1 + np.repeat(np.arange(n_branches), n_leaf)])
  return np.tril((branch[None] == 0) | (branch[:, None] == branch[None]))


PREFILL = {
    "splash": functools.partial(kernels.attend_splash, interpret=True),
    "cudnn": functools.partial(kernels.attend_cudnn, implementation="xla"),
}


@pytest.mark.parametrize("H, K, E, dtype, mask", [
    (4, 2, 64, "float32", None),
    (2, 2, 128, "float32", tree(150, 3, 37)),  # 261 columns
    (6, 1, 64, "bfloat16", tree(20, 2, 9)),
])
@pytest.mark.parametrize("kernel", PREFILL)
def test_attend(kernel, H, K, E, dtype, mask):
  T = 45 if mask is None else mask.shape[0]
  segment = segments(T)
  R = segment.shape[0]
  query, key, value = normal(0, (R, T, H, E), (R, T, K, E), (R, T, K, E), dtype=dtype)
  got = jax.jit(functools.partial(PREFILL[kernel], mask=mask))(query, key, value, segment)
  assert got.dtype == query.dtype and got.shape == query.shape
  got = np.asarray(got, np.float32)
  assert np.isfinite(got).all()
  expected = np.asarray(reference_attend(query, key, value, segment, mask))
  real = segment != 0
  np.testing.assert_allclose(got[real], expected[real], atol=2e-5 if dtype == "float32" else 3e-2)


def test_splash_over_several_blocks():
  T = 5 * 128  # a length that only the smallest block divides
  assert kernels.splash_block(T) == 128
  query, key, value = normal(1, (1, T, 1, 64), (1, T, 1, 64), (1, T, 1, 64))
  segment = np.where(np.arange(T) < 200, 0, np.where(np.arange(T) < 500, 1, 2))[None].astype(np.int32)
  got = jax.jit(PREFILL["splash"])(query, key, value, segment)
  expected = reference_attend(query, key, value, segment)
  np.testing.assert_allclose(got[:, 200:], expected[:, 200:], atol=2e-5)


@pytest.mark.parametrize("T", [1, 128, 129, 300, 512, 576, 640, 1000, 1025, 2624])
def test_splash_pads_little(T):
  block = kernels.splash_block(T)
  assert -T % block <= -T % 128 + (T + -T % 128) / 8


@pytest.mark.parametrize("kernel", PREFILL)
def test_columns_that_see_nothing_are_finite(kernel):
  """Also where all columns of a block see nothing, so that the kernel would skip it."""
  mask = np.tril(np.ones((640, 640), bool))  # blocks of 128
  mask[3], mask[128:] = False, False
  query, = normal(2, (1, 640, 1, 64))
  segment = np.ones((1, 640), np.int32)
  got = np.asarray(jax.jit(functools.partial(PREFILL[kernel], mask=mask))(query, query, query, segment))
  assert np.isfinite(got).all()
  expected = reference_attend(query, query, query, segment, mask)
  sees = mask.any(axis=1)
  np.testing.assert_allclose(got[:, sees], expected[:, sees], atol=2e-5)


def gradients(function, segment, mask, weight):
  real = (segment != 0)[..., None, None]
  return jax.jit(jax.grad(
      lambda query, key, value: (function(query, key, value, segment, mask=mask) * weight * real).sum(), (0, 1, 2)))


@pytest.mark.parametrize("mask", [None, tree(20, 2, 9)])
def test_gradient_of_splash(mask):
  T = 38
  segment = segments(T)[:3]
  query, key, value, weight = normal(3, (3, T, 4, 64), (3, T, 2, 64), (3, T, 2, 64), (3, T, 4, 64))
  expected = gradients(reference_attend, segment, mask, weight)(query, key, value)
  for got, want in zip(gradients(PREFILL["splash"], segment, mask, weight)(query, key, value), expected, strict=True):
    np.testing.assert_allclose(got, want, atol=2e-4)


@pytest.mark.parametrize("kernel, K", [("splash", 2), ("splash", 1), ("cudnn", 2)])
def test_attend_on_a_mesh(kernel, K):
  """Each device computes its rows and heads; one key/value head is not divided."""
  R, T, H, E = 4, 20, 4, 64
  segment = segments(T)
  query, key, value = normal(4, (R, T, H, E), (R, T, K, E), (R, T, K, E))
  expected = reference_attend(query, key, value, segment)
  with jax.set_mesh(make_mesh(2, 2, 2)):
    got = jax.jit(PREFILL[kernel])(query, key, value, segment)
  assert got.sharding.shard_shape(got.shape) == (1, T, H // K, E) if K == 2 else (1, T, H, E)
  np.testing.assert_allclose(got[segment != 0], expected[segment != 0], atol=2e-5)


def test_gradient_of_splash_on_a_mesh():
  """Where heads stay whole, several devices compute the same part of the gradient; it counts once."""
  T = 20
  segment = segments(T)
  query, key, value, weight = normal(5, (4, T, 2, 64), (4, T, 1, 64), (4, T, 1, 64), (4, T, 2, 64))
  expected = gradients(reference_attend, segment, None, weight)(query, key, value)
  with jax.set_mesh(make_mesh(1, 4, 2)):
    got = gradients(PREFILL["splash"], segment, None, weight)(query, key, value)
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)


# One new token per row.


def reference_part(query, key, value, first, length):
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  column = np.arange(key.shape[2])
  seen = ((column >= first[:, None]) & (column < length[:, None]))[:, None, None]
  score = np.einsum("rkge,rkse->rkgs", query, key) / np.sqrt(query.shape[-1])
  top = np.where(seen, score, kernels.MASKED).max(-1)
  weight = np.exp(np.where(seen, score - top[..., None], -np.inf))
  return np.einsum("rkgs,rkse->rkge", weight, value), top, weight.sum(-1)


def make_part(seed, R, K, G, E, S, dtype="float32"):
  return normal(seed, (R, K, G, E), (R, K, S, E), (R, K, S, E), dtype=dtype)


def run_part(kernel, query, *part, layer=0):
  run = jax.jit(functools.partial(kernels.decode_state, kernel=kernel, interpret=True))
  return run(query, [part], layer=layer)


def i32(*values):
  return np.asarray(values, np.int32)


@pytest.mark.parametrize("shape, dtype, first, length", [
    # Three blocks, the last cut; two tiles of four heads, the first of which sees nothing.
    ((4, 2, 1, 64, 576), "float32", i32(0, 30, 0, 300), i32(0, 7, 576, 301)),
    ((3, 1, 6, 128, 96), "float32", i32(0, 40, 95), i32(96, 77, 200)),
    ((3, 1, 2, 128, 300), "float32", i32(299, 0, 256), i32(300, -64, 270)),
    ((2, 2, 2, 64, 32), "bfloat16", i32(0, 5), i32(1, 32)),
    ((1, 1, 2, 64, 512), "bfloat16", i32(10), i32(300)),
])
@both
def test_decode_part(kernel, shape, dtype, first, length):
  query, key, value = make_part(0, *shape, dtype)
  got = run_part(kernel, query, key, value, first, length)
  expected = reference_part(query, key, value, np.maximum(first, 0), length)
  assert [x.dtype for x in got] == [jnp.float32] * 3
  tolerance = 1e-4 if dtype == "float32" else 5e-2  # of a sum of up to 512 terms
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=tolerance)
  empty = length <= first
  assert not np.any(got[0][empty]) and not np.any(got[2][empty])


@both
def test_decode_part_of_a_stack(kernel):
  query, key, value = make_part(1, 2, 1, 2, 64, 64)
  stack = lambda x: jnp.stack([jnp.full_like(x, jnp.nan), x, jnp.full_like(x, jnp.nan)])
  ends = i32(0, 3), i32(64, 50)
  got = run_part(kernel, query, stack(key), stack(value), *ends, layer=1)
  for a, b in zip(got, reference_part(query, key, value, *ends), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@both
def test_blocks_that_are_not_seen_are_not_read(kernel):
  S, block = 1024, kernels.DECODE_BLOCK
  query, key, value = make_part(2, 1, 2, 1, 64, S)
  hidden = (np.arange(S) < block) | (np.arange(S) >= 2 * block)
  spoilt = [jnp.where(hidden[:, None], jnp.nan, x) for x in (key, value)]
  first, length = i32(block + 10), i32(2 * block - 10)
  got = run_part(kernel, query, *spoilt, first, length)
  for a, b in zip(got, reference_part(query, key, value, first, length), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_a_tile_that_sees_nothing_fetches_nothing_new():
  first, length = i32(0, 0, 9, 600, 5, 5), i32(0, 0, 600, 700, 5, 0)
  at, low, count = kernels._tiles(first, length, 2, 256)
  np.testing.assert_array_equal(at, [0, 1, 1])  # the tile whose blocks are fetched
  np.testing.assert_array_equal(low, [0, 0, 0])
  np.testing.assert_array_equal(count, [0, 3, 0])
  at, low, count = kernels._tiles(i32(600, 256), i32(700, 257), 1, 256)
  np.testing.assert_array_equal(low, [2, 1])
  np.testing.assert_array_equal(count, [1, 1])


def three_parts(R, K, G, E):
  """Query, and parts of which the first row sees one, two and none; the second none, all and one column."""
  query = make_part(3, R, K, G, E, 32)[0]
  ends = [(i32(*[4, 0] * (R // 2)), i32(*[40, 0] * (R // 2))), (i32(*[0] * R), i32(*[7, 32] * (R // 2))),
          (i32(*[0] * R), i32(*[-32, 1] * (R // 2)))]
  parts = []
  for i, n_columns in enumerate((40, 32, 32)):
    _, key, value = make_part(4 + i, R, K, G, E, n_columns)
    parts.append((key * (1 + i), value, *ends[i]))  # later parts hold greater scores, so that the maximum moves
  return query, tuple(parts)


def reference_parts(query, parts):
  """One softmax over the concatenation."""
  key, value = (np.concatenate([np.asarray(part[i], np.float64) for part in parts], axis=2) for i in (0, 1))
  seen = np.concatenate([
      (np.arange(k.shape[2]) >= first[:, None]) & (np.arange(k.shape[2]) < length[:, None])
      for k, _, first, length in parts], axis=1)[:, None, None]
  score = np.einsum("rkge,rkse->rkgs", np.asarray(query, np.float64), key) / np.sqrt(query.shape[-1])
  weight = np.where(seen, np.exp(score), 0)
  return np.einsum("rkgs,rkse->rkge", weight / weight.sum(-1, keepdims=True), value)


@both
def test_parts_are_one_softmax(kernel):
  query, parts = three_parts(2, 1, 6, 64)
  run = jax.jit(functools.partial(kernels.decode_parts, kernel=kernel, interpret=True))
  got = run(query, parts)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, reference_parts(query, parts), atol=1e-5)
  unseen = (*parts[1][:2], i32(0, 9), i32(0, 9))
  np.testing.assert_array_equal(run(query, (unseen, *parts, unseen)), got)  # to the last bit


@both
def test_a_row_does_not_feel_its_neighbours(kernel):
  query, parts = three_parts(4, 1, 2, 64)
  parts = parts[:2]
  run = jax.jit(functools.partial(kernels.decode_parts, kernel=kernel, interpret=True))
  together = run(query, parts)
  alone = run(query[2:3], tuple(tuple(x[2:3] for x in part) for part in parts))
  np.testing.assert_array_equal(together[2:3], alone)


def test_a_row_that_sees_nothing_is_zero():
  query, key, value = make_part(6, 2, 1, 1, 64, 32)
  got = jax.jit(functools.partial(kernels.decode_parts, kernel="pallas_gpu", interpret=True))(
      query, [(key, value, i32(0, 3), i32(32, 3))])
  assert np.all(got[0]) and not np.any(got[1])


@pytest.mark.parametrize("kernel, K", [("pallas_tpu", 2), ("pallas_gpu", 1)])
def test_parts_on_a_mesh(kernel, K):
  R, G, E = 4, 2, 64
  query, parts = three_parts(R, K, G, E)
  stack = lambda x: jnp.stack([jnp.zeros_like(x), x])
  stacked = (parts[0], (stack(parts[1][0]), stack(parts[1][1]), *parts[1][2:]), parts[2])
  with jax.set_mesh(make_mesh(2, 2, 2)):
    got = jax.jit(lambda query, parts, layer: kernels.decode_parts(
        query, parts, kernel=kernel, layer=layer, interpret=True))(query, stacked, 1)
  assert got.sharding.shard_shape(got.shape) == (1, 1, G, E)
  np.testing.assert_allclose(got, reference_parts(query, parts), atol=1e-5)


def test_choice():
  for platform in ("cpu", "gpu", "cuda", "tpu"):
    prefill, decode = kernels.choose(platform)
    assert prefill in kernels.PREFILL and decode in kernels.DECODE
  assert kernels.choose("tpu") == ("splash", "pallas_tpu")
  assert kernels.choose("cpu") == ("xla", "xla")
  with pytest.raises(ValueError, match="'xla' is not a decode kernel"):
    kernels.decode_parts(jnp.zeros((1, 1, 1, 64)), (), kernel="xla")
