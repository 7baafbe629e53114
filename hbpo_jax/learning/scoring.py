"""Log-probabilities of the completions' tokens, without ever holding an [R, T, V] array, and the micro-batch cut."""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hbpo_jax.config import Config
from hbpo_jax.models import decoder, sharding
from hbpo_jax.models.architecture import Architecture
from hbpo_jax.models.attention import product
from hbpo_jax.models.sharding import constrain
from hbpo_jax.structs import Batch


def chunked_logps(
    hidden_RCD: jax.Array,
    head_VD: jax.Array,
    targets_RC: jax.Array,
    *,
    temperature: jax.Array | float,
    chunk: int,
    shards: int = 1,
    wanted_RC: jax.Array | None = None,
) -> jax.Array:
  """Log-probability of each target, from the hidden state that predicts it.

      logp = z[target] - logsumexp(z),   z = hidden @ head.T / temperature

  A loop over chunks of tokens; the backward pass computes a chunk's logits again instead of keeping them. Of the tokens
  that are not wanted no logits are computed, but for those that fill up a shard's last chunk.

  Args:
    hidden_RCD: float [R, C, D]; matmul operands take its dtype, sums are float32.
    head_VD: float [V, D], the output head.
    targets_RC: int32 [R, C].
    temperature: float [], above 0; gets no gradient.
    chunk: tokens per chunk and shard; need not divide R * C.
    shards: devices over which the rows are split in contiguous blocks; divides R. Every chunk then holds tokens of
      all of them, and the head's gradient crosses devices once instead of once per chunk.
    wanted_RC: bool [R, C]; None means all.
  Returns:
    float32 [R, C]; 0 where not wanted.
  """
  R, C = targets_RC.shape
  local = R // shards * C
  n_chunks = math.ceil(local / min(chunk, local))
  size = math.ceil(local / n_chunks)
  by_shard = lambda x: x.reshape(shards, local, *x.shape[2:])
  wanted = jnp.ones((shards, local), bool) if wanted_RC is None else by_shard(wanted_RC)
  order = jnp.argsort(~wanted, axis=1, stable=True)  # the wanted ones first
  n_used = (jnp.max(jnp.sum(wanted, axis=1, dtype=jnp.int32)) + size - 1) // size

  def cut(x):
    x = by_shard(x)
    x = jnp.take_along_axis(x, order.reshape(shards, local, *(1,) * (x.ndim - 2)), axis=1)
    x = jnp.pad(x, ((0, 0), (0, n_chunks * size - local)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(shards, n_chunks, size, *x.shape[2:]).swapaxes(0, 1)

  logp = _chunk_loop(cut(hidden_RCD), head_VD, cut(targets_RC), jnp.asarray(temperature, jnp.float32), n_used)
  logp = logp.swapaxes(0, 1).reshape(shards, n_chunks * size)[:, :local]
  logp = jnp.take_along_axis(logp, jnp.argsort(order, axis=1), axis=1)
  return jnp.where(wanted, logp, 0.0).reshape(R, C)


def _logits(hidden: jax.Array, head: jax.Array, temperature: jax.Array) -> jax.Array:
  """float32 [shards, chunk, V]."""
  return constrain(product("scd,vd->scv", hidden, head), "batch", "none", "vocab") / temperature


def _one_hot(targets: jax.Array, n_vocab: int) -> jax.Array:
  # A comparison, not a gather: it fuses into the reductions, and a vocabulary split over devices stays split.
  return targets[..., None] == jnp.arange(n_vocab, dtype=targets.dtype)


def _gathered(head_VD: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """The head in the compute dtype, whole in D, so that no chunk has to fetch it again."""
  return constrain(head_VD.astype(dtype), "vocab", "none")


def _sum_shards(x_SVD: jax.Array) -> jax.Array:
  """[V, D]: the sum over shards, which lies like the head's gradient: each device has its share of the width.

  Around a ring, in both directions: TPU's compiler makes most scattered sums of this size whole on every device and
  cuts them afterwards, which is twice the traffic, or adds up whole ones until a loop ends, which is twice the memory.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not set(sharding.AXES) <= set(mesh.axis_names):
    return jnp.sum(x_SVD, axis=0)
  rows, vocab, width = (*sharding.partition_spec(("batch", "vocab", "width"), x_SVD.shape, mesh), None, None, None)[:3]
  if rows is None or width is None:
    return constrain(jnp.sum(x_SVD, axis=0), "vocab", "width")
  n = mesh.shape["fsdp"]

  def around(x_VD, step):
    """What has come around the ring: every device adds its own to the share that it passes on, and keeps the last."""
    own, share = jax.lax.axis_index("fsdp"), x_VD.shape[1] // n
    part = lambda k: jax.lax.dynamic_slice_in_dim(x_VD, (own - k * step) % n * share, share, axis=1)
    to_next = [(i, (i + step) % n) for i in range(n)]
    return jax.lax.fori_loop(2, n + 1, lambda k, total: jax.lax.ppermute(total, "fsdp", to_next) + part(k), part(1))

  def on_shard(x_SVD):
    x_VD = jnp.sum(x_SVD, axis=0)
    half = x_VD.shape[0] // 2
    return jax.lax.psum(jnp.concatenate([around(x_VD[:half], 1), around(x_VD[half:], -1)]), "data")

  return jax.shard_map(
      on_shard, in_specs=PartitionSpec(rows, vocab), out_specs=PartitionSpec(vocab, width), check_vma=False)(x_SVD)


@jax.custom_vjp
def _chunk_loop(hidden, head, targets, temperature, n_used):
  """logp [n, shards, chunk] of hidden [n, shards, chunk, D], head [V, D] and targets like logp; 0 from n_used on."""
  return _forward(hidden, head, targets, temperature, n_used)[0]


def _forward(hidden, head, targets, temperature, n_used):
  used = _gathered(head, hidden.dtype)

  def body(i, results):
    logits = _logits(hidden[i], used, temperature)
    total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.sum(jnp.where(_one_hot(targets[i], logits.shape[-1]), logits, 0.0), axis=-1)
    return tuple(x.at[i].set(new) for x, new in zip(results, (chosen - total, total)))

  zeros = constrain(jnp.zeros(targets.shape, jnp.float32), "none", "batch", "none")
  logp, total = jax.lax.fori_loop(0, n_used, body, (zeros, zeros))
  return logp, (hidden, head, targets, temperature, n_used, total)


def _backward(kept, cotangent):
  hidden, head, targets, temperature, n_used, total = kept
  used = _gathered(head, hidden.dtype)
  # One head gradient per shard: summing over shards inside the loop would be an all-reduce per chunk.
  shards_VD = constrain(jnp.zeros((hidden.shape[1], *head.shape), jnp.float32), "batch", "vocab", "none")

  def body(i, gradients):
    head_grad, hidden_grad = gradients
    logits = _logits(hidden[i], used, temperature)
    error = _one_hot(targets[i], logits.shape[-1]) - jnp.exp(logits - total[i][..., None])
    error = (error * (cotangent[i] / temperature)[..., None]).astype(hidden.dtype)
    head_grad = head_grad + product("scv,scd->svd", error, hidden[i])
    hidden_grad = hidden_grad.at[i].set(product("scv,vd->scd", error, used).astype(hidden.dtype))
    return constrain(head_grad, "batch", "vocab", "none"), hidden_grad

  hidden_zero = constrain(jnp.zeros_like(hidden), "none", "batch", "none", "none")
  head_grad, hidden_grad = jax.lax.fori_loop(0, n_used, body, (shards_VD, hidden_zero))
  return hidden_grad, _sum_shards(head_grad).astype(head.dtype), None, jnp.zeros_like(temperature), None


_chunk_loop.defvjp(_forward, _backward)


def batch_logps(
    params: Any, arch: Architecture, cfg: Config, batch: Batch, temperature: jax.Array | float, *, shards: int = 1,
    kernel: str = "xla",
) -> jax.Array:
  """Log-probability of every token that carries loss under `params`, in one forward pass over all rows.

  Completion slot c is token column P + c and is predicted by the hidden state of column P + c - 1.

  Args:
    params: of `decoder.init`.
    arch: the network.
    cfg: model.compute_dtype, model.remat and learner.logprob_chunk are read.
    batch: its tokens, segments, contexts, positions and completion mask are read.
    temperature: float [], divides the logits.
    shards: as in `chunked_logps`.
    kernel: of the attention, as in `decoder.forward`.
  Returns:
    float32 [R, C], 0 elsewhere.
  """
  C = batch.completion_mask_RC.shape[1]
  P = batch.tokens_RT.shape[1] - C
  hidden_RTD = decoder.forward(
      params, arch, batch.tokens_RT, batch.segment_RT, batch.position_RT,
      compute_dtype=jnp.dtype(cfg.model.compute_dtype), remat=cfg.model.remat, kernel=kernel,
      context_RT=batch.context_RT)
  return chunked_logps(
      hidden_RTD[:, P - 1:P + C - 1], decoder.head_matrix(params, arch), batch.tokens_RT[:, P:],
      temperature=temperature, chunk=cfg.learner.logprob_chunk, shards=shards, wanted_RC=batch.completion_mask_RC)


def score(
    params: Any,
    arch: Architecture,
    cfg: Config,
    batch: Batch,
    temperature: jax.Array | float,
    *,
    shards: int = 1,
    n_micro: int = 1,
    kernel: str = "xla",
) -> jax.Array:
  """`batch_logps`, one micro-batch after the other; float32 [R, C], 0 where no loss is.

  Args:
    n_micro: micro-batches, which bounds the memory and has no other effect.
  """
  rows = batch.tokens_RT.shape[0]
  micro = cut_micro_batches(forward_fields(batch), n_micro, shards)

  def one(logp, i, part):
    return jax.lax.dynamic_update_index_in_dim(
        logp, batch_logps(params, arch, cfg, part, temperature, shards=shards, kernel=kernel), i, axis=0)

  mask = micro.completion_mask_RC
  empty = constrain(jnp.zeros(mask.shape, jnp.float32), "none", "batch", "none")
  return join_micro_batches(fold_micro_batches(one, empty, micro), rows, shards)


def forward_fields(batch: Batch) -> Batch:
  """The batch with only what a forward pass reads."""
  return Batch(
      batch.tokens_RT, batch.segment_RT, batch.position_RT, batch.completion_mask_RC, context_RT=batch.context_RT)


def count_micro_batches(rows: int, microbatch_rows: int, shards: int) -> int:
  """Micro-batches of about `microbatch_rows` rows, rounded up to the same number of rows per shard; 0 means one."""
  if microbatch_rows == 0:
    return 1
  return math.ceil(rows // shards / math.ceil(microbatch_rows / shards))


def cut_micro_batches(tree: Any, n_micro: int, shards: int) -> Any:
  """Arrays [R, ...] as [n_micro, rows, ...]; every shard gives its own next rows, so none moves between devices.

  Where the rows do not come out even, empty ones are added: no mask, no segment, zeros elsewhere.

  Args:
    tree: arrays [R, ...], rows split over `shards` devices in contiguous blocks; `shards` divides R.
  """
  def cut(x):
    local = x.shape[0] // shards
    size = math.ceil(local / n_micro)
    x = x.reshape(shards, local, *x.shape[1:])
    x = jnp.pad(x, ((0, 0), (0, n_micro * size - local)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(shards, n_micro, size, *x.shape[2:]).swapaxes(0, 1)
    x = x.reshape(n_micro, shards * size, *x.shape[3:])
    return constrain(x, "none", "batch", *["none"] * (x.ndim - 2))

  return jax.tree.map(cut, tree)


def fold_micro_batches(function: Callable[[Any, jax.Array, Batch], Any], carry: Any, micro: Batch) -> Any:
  """Folds `function` over the micro-batches that hold a real token, in order; the others cost nothing.

  How many there are is a number of the loop, not of its shape: any amount of padding runs one compiled program.

  Args:
    function: (carry, index int32 [], one micro-batch) -> carry.
    micro: arrays [n_micro, ...], of `cut_micro_batches`.
  """
  used_n = jnp.any(micro.segment_RT != 0, axis=tuple(range(1, micro.segment_RT.ndim)))
  order_n = jnp.argsort(~used_n, stable=True).astype(jnp.int32)

  def body(turn, carry):
    i = order_n[turn]
    part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, axis=0, keepdims=False), micro)
    return function(carry, i, part)

  return jax.lax.fori_loop(0, jnp.sum(used_n, dtype=jnp.int32), body, carry)


def join_micro_batches(x: jax.Array, rows: int, shards: int) -> jax.Array:
  """The inverse of `cut_micro_batches` for one array: [rows, ...], without the added rows."""
  n_micro, per_micro = x.shape[:2]
  x = x.reshape(n_micro, shards, per_micro // shards, *x.shape[2:]).swapaxes(0, 1)
  x = x.reshape(shards, n_micro * (per_micro // shards), *x.shape[3:])
  return constrain(x[:, :rows // shards].reshape(rows, *x.shape[2:]), "batch", *["none"] * (x.ndim - 2))
