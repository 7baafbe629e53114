"""The decoder for slots: rows of different ages, each with a copy of a prefilled context and its own tokens.

A row of the cache has columns for its context (prompt and forced prefix, P + F, rounded up to whole segments), and then
one column for each token that it sampled, by age. What it reads besides are the `newest` columns, of the running
segment, into which all rows write at the same place; `merge` moves them into the cache when the segment is over. A
row's tokens lie where its own age says, so no number it computes depends on when it started or on who sits beside it.

Values are [.., R, K, S, E]. Keys are [.., R, K, E, S] for the attention kernel 'xla' and [.., R, K, S, E] for the
others. The leading axis `..` is [L], or absent in a tuple of L arrays where the layers are unrolled.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import nnx, struct
import jax
import jax.numpy as jnp
import numpy as np

from hbpo_jax.models import attention, decoder
from hbpo_jax.models.architecture import Architecture
from hbpo_jax.models.decoder import Cache
from hbpo_jax.models.sharding import constrain, partition_spec


@dataclasses.dataclass(frozen=True)
class Layout:
  """How weights and caches are laid out, and which attention kernels run; hashable, static in jit.

  unrolled: tuples of L arrays instead of stacked ones.
  prefill_kernel: one of `kernels.PREFILL`.  decode_kernel: one of `kernels.DECODE`.
  dtype: of activations and caches.
  """
  unrolled: bool
  prefill_kernel: str
  decode_kernel: str
  dtype: jnp.dtype

  @property
  def keys_last(self) -> bool:
    """Whether the columns of a key array are its last axis."""
    return self.decode_kernel == "xla"


@struct.dataclass
class Pool:
  """The contexts of B queries under G prefixes.

  prompt: Cache of P columns, rows are queries; left-padded.
  prefix: Cache of F columns, rows are query * G + subgroup; right-padded.
  hidden_XD: compute dtype [B * G, D], the hidden state that predicts the first sampled token.
  logp_BGF: float32 [B, G, F], log-probability of each forced token, meaningless at padding.
  n_prompt_B: int32 [B].  n_prefix_G: int32 [G].
  """
  prompt: Cache
  prefix: Cache
  hidden_XD: jax.Array
  logp_BGF: jax.Array
  n_prompt_B: jax.Array
  n_prefix_G: jax.Array


def new_cache(arch: Architecture, layout: Layout, n_rows: int, n_columns: int, rows: str = "batch") -> Cache:
  """A cache of zeros; its rows lie over the mesh axes of the logical axis `rows`."""
  def zeros(columns_last):
    shape = (n_rows, arch.n_kv_heads, n_columns, arch.head_size)
    if columns_last:
      shape = (*shape[:2], arch.head_size, n_columns)
    if layout.unrolled:
      return tuple(constrain(jnp.zeros(shape, layout.dtype), *cache_axes(4, rows)) for _ in range(arch.n_layers))
    return constrain(jnp.zeros((arch.n_layers, *shape), layout.dtype), *cache_axes(5, rows))

  return Cache(zeros(layout.keys_last), zeros(False))


def n_columns(cache: Cache) -> int:
  """S, the columns of a cache."""
  return jax.tree.leaves(cache.v)[0].shape[-2]


def context_columns(n_prompt_slots: int, n_prefix_slots: int, n_steps: int) -> int:
  """The columns of a row before its own tokens: P + F, rounded up to whole segments of n_steps."""
  return -(-(n_prompt_slots + n_prefix_slots) // n_steps) * n_steps


def cache_axes(ndim: int, rows: str = "batch") -> tuple[str, ...]:
  """Logical axes of a cache's array, with or without the leading [L]."""
  return ("none",) * (ndim - 4) + (rows, "kv_heads", "none", "none")


def new_pool(arch: Architecture, layout: Layout, n_queries: int, n_prompt_slots: int, n_prefixes: int,
             n_prefix_slots: int) -> Pool:
  """A Pool without contents; on every device of the mesh, for a row of any shard may take any query."""
  return Pool(
      prompt=new_cache(arch, layout, n_queries, n_prompt_slots, "none"),
      prefix=new_cache(arch, layout, n_queries * n_prefixes, n_prefix_slots, "none"),
      hidden_XD=jnp.zeros((n_queries * n_prefixes, arch.hidden_size), layout.dtype),
      logp_BGF=jnp.zeros((n_queries, n_prefixes, n_prefix_slots), jnp.float32),
      n_prompt_B=jnp.zeros(n_queries, jnp.int32), n_prefix_G=jnp.zeros(n_prefixes, jnp.int32))


def tree_mask(n_prompt_slots: int, n_prefixes: int, n_prefix_slots: int) -> np.ndarray:
  """bool [T, T], T = P + G * F, of a row [prompt | prefix 1 | ... | prefix G]: a prefix sees the prompt and itself."""
  branch_T = np.concatenate([np.zeros(n_prompt_slots, int), 1 + np.repeat(np.arange(n_prefixes), n_prefix_slots)])
  column_T = np.arange(branch_T.size)
  seen = (branch_T[None, :] == 0) | (branch_T[:, None] == branch_T[None, :])
  return seen & (column_T[None, :] <= column_T[:, None])


def prefill(
    params: dict,
    pool: Pool,
    tokens_bP: jax.Array,
    n_prompt_b: jax.Array,
    where_b: jax.Array,
    prefix_GF: jax.Array,
    n_prefix_G: jax.Array,
    temperature: jax.Array,
    *,
    arch: Architecture,
    layout: Layout,
) -> Pool:
  """The pool with some queries' contexts: each prompt in one pass, whatever the number of prefixes and rollouts.

  Logits are computed for the forced tokens only.

  Args:
    params: stacked or unrolled, as the layout says.
    pool: consumed.
    tokens_bP: int32 [b, p], left-padded; p may be less than the pool's P.
    n_prompt_b: int32 [b], at least 1.
    where_b: int32 [b], which query of the pool each is; one beyond the last is dropped.
    prefix_GF: int32 [G, F], right-padded; F = 0 where no subgroup has a prefix.
    n_prefix_G: int32 [G].
    temperature: float32 [], divides the logits of the forced tokens' log-probabilities.
  """
  b, P = tokens_bP.shape
  G, F = prefix_GF.shape
  column_P = jnp.arange(P) - (P - n_prompt_b[:, None])
  flat = lambda x_GF: jnp.broadcast_to(x_GF.reshape(-1), (b, G * F))
  tokens = jnp.concatenate([tokens_bP, flat(prefix_GF)], axis=1)
  real = jnp.concatenate([column_P >= 0, flat(jnp.arange(F) < n_prefix_G[:, None])], axis=1)
  prefix_position = n_prompt_b[:, None] + jnp.tile(jnp.arange(F), G)
  position = jnp.concatenate([jnp.maximum(column_P, 0), prefix_position], axis=1)
  hidden, cache = decoder.run(
      params, arch, jnp.where(real, tokens, 0), real.astype(jnp.int32), position, compute_dtype=layout.dtype,
      keep_cache=True, mask_TT=tree_mask(P, G, F) if F else None, kernel=layout.prefill_kernel)

  logp = jnp.zeros((b, G, 0), jnp.float32)
  if F:
    # The column that predicts forced token i: the prompt's last for the first, else the token before it.
    before_GF = np.where(np.arange(F) == 0, P - 1, P + np.arange(G)[:, None] * F + np.arange(F) - 1)
    logits = decoder.logits(params, arch, hidden[:, before_GF.reshape(-1)]) / temperature
    chosen = jnp.take_along_axis(logits, flat(prefix_GF)[..., None], axis=-1, mode="clip")[..., 0]
    logp = (chosen - jax.nn.logsumexp(logits, axis=-1)).reshape(b, G, F)
  last_G = jnp.where(n_prefix_G > 0, P + jnp.arange(G) * F + n_prefix_G - 1, P - 1)
  row_bG = where_b[:, None] * G + jnp.arange(G)

  # [.., b, K, G * F, E] -> [.., b * G, K, F, E]
  branches = lambda a: a[..., P:, :].reshape(*a.shape[:-2], G, F, a.shape[-1]).swapaxes(-4, -3).reshape(
      *a.shape[:-4], b * G, a.shape[-3], F, a.shape[-1])
  store = functools.partial(_store, keys_last=layout.keys_last)
  return Pool(
      prompt=store(pool.prompt, jax.tree.map(lambda a: a[..., :P, :], cache), where_b),
      prefix=store(pool.prefix, jax.tree.map(branches, cache), row_bG.reshape(-1)),
      hidden_XD=pool.hidden_XD.at[row_bG].set(hidden[:, last_G], mode="drop"),
      logp_BGF=pool.logp_BGF.at[where_b].set(logp, mode="drop"),
      n_prompt_B=pool.n_prompt_B.at[where_b].set(n_prompt_b, mode="drop"),
      n_prefix_G=n_prefix_G)


def _store(cache: Cache, new: Cache, rows: jax.Array, *, keys_last: bool) -> Cache:
  """The cache with `new` ([.., b, K, s, E], keys too) in the last s columns of the given rows."""
  def one(array, new, columns_last):
    new = constrain(new.swapaxes(-1, -2) if columns_last else new, *cache_axes(new.ndim, "none"))
    if columns_last:
      return array.at[rows, :, :, array.shape[-1] - new.shape[-1]:].set(new, mode="drop")
    return array.at[rows, :, array.shape[-2] - new.shape[-2]:].set(new, mode="drop")

  def each(array, new, columns_last):
    put = functools.partial(one, columns_last=columns_last)
    return jax.vmap(put)(array, new) if array.ndim == 5 else put(array, new)

  return Cache(jax.tree.map(lambda a, n: each(a, n, keys_last), cache.k, new.k),
               jax.tree.map(lambda a, n: each(a, n, False), cache.v, new.v))


def seat(
    cache: Cache, pool: Pool, query_R: jax.Array, subgroup_R: jax.Array, new_R: jax.Array, layout: Layout) -> Cache:
  """The cache with the contexts of the rows `new_R` (bool [R]) in their first P + F columns."""
  row_R = query_R * pool.n_prefix_G.shape[0] + subgroup_R
  take = functools.partial(jnp.take, axis=0, mode="clip")  # The default mode checks every index.

  def one(array, prompt, prefix, columns_last, index):
    context = jnp.concatenate([take(prompt, query_R), take(prefix, row_R)], axis=3 if columns_last else 2)
    context = constrain(context, *cache_axes(4))
    if index is not None:
      context = context[None]
    start = [*([] if index is None else [index]), 0, 0, 0, 0]
    is_new = new_R.reshape(-1, 1, 1, 1)
    there = jax.lax.dynamic_slice(array, start, context.shape)
    return jax.lax.dynamic_update_slice(array, jnp.where(is_new, context, there), start)

  def one_layer(cache, prompt, prefix, index=None):
    return Cache(
        one(cache.k, prompt.k, prefix.k, layout.keys_last, index), one(cache.v, prompt.v, prefix.v, False, index))

  if layout.unrolled:
    layers = [one_layer(Cache(*arrays[:2]), Cache(*arrays[2:4]), Cache(*arrays[4:])) for arrays in zip(
        cache.k, cache.v, pool.prompt.k, pool.prompt.v, pool.prefix.k, pool.prefix.v, strict=True)]
    return Cache(tuple(layer.k for layer in layers), tuple(layer.v for layer in layers))

  def body(index, cache):  # Layer by layer, because the contexts of all rows in all layers may be gigabytes.
    pick = lambda tree: jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), tree)
    return one_layer(cache, pick(pool.prompt), pick(pool.prefix), index)

  return jax.lax.fori_loop(0, pool.prompt.v.shape[0], body, cache)


@struct.dataclass
class Seen:
  """Which columns of the cache a row sees: its context, and its own tokens so far.

  first_R, context_R: int32 [R]; context columns first <= c < context are real.
  age_R: int32 [R], its tokens, whole segments of them, from column `start` on.
  """
  first_R: jax.Array
  context_R: jax.Array
  age_R: jax.Array
  start: int = struct.field(pytree_node=False)


def step(
    params: dict,
    token_R: jax.Array,
    position_R: jax.Array,
    cache: Cache,
    seen: Seen,
    newest: Cache,
    slot: jax.Array,
    *,
    arch: Architecture,
    layout: Layout,
) -> tuple[jax.Array, Cache]:
  """Feeds one token per row; returns the hidden states that predict the next ones, and `newest` with `slot` written.

  Args:
    token_R, position_R: int32 [R], the token and its rotary position.
    cache: read only.
    newest: as many columns as the segment has steps.
    slot: int32 [], where in the running segment.
  Returns:
    compute dtype [R, D], and the cache of the segment.
  """
  model, graph, layers = decoder.open_layers(arch, params)
  rope = attention.rope_tables(arch, position_R)
  R, K, H, E = token_R.shape[0], arch.n_kv_heads, arch.n_heads, arch.head_size
  in_cache = ((seen.first_R, seen.context_R), (jnp.full_like(seen.age_R, seen.start), seen.start + seen.age_R))
  in_newest = ((jnp.zeros_like(seen.age_R), jnp.broadcast_to(slot + 1, (R,))),)

  def one_layer(x, weights, cache_l, newest_l, index):
    layer = nnx.merge(graph, weights)
    query, key, value = layer.project(x, rope, layout.dtype)
    newest_l = Cache(
        _put_token(newest_l.k, key, slot, index, layout.keys_last), _put_token(newest_l.v, value, slot, index, False))
    parts = (attention.Part(cache_l.k, cache_l.v, in_cache), attention.Part(newest_l.k, newest_l.v, in_newest))
    attended = attention.attend_parts(
        query.reshape(R, K, H // K, E), parts, layer=index, kernel=layout.decode_kernel)
    x = layer.finish(x, attended.reshape(R, H, E).astype(layout.dtype), layout.dtype)
    return constrain(x, "batch", "none"), newest_l

  x = constrain(model.embed_tokens(token_R, layout.dtype), "batch", "none")
  if layout.unrolled:
    written = []
    traced_once = jax.jit(functools.partial(one_layer, index=None))  # Tracing takes longer than compiling it again.
    for weights, *arrays in zip(layers, cache.k, cache.v, newest.k, newest.v, strict=True):
      x, new = traced_once(x, weights, Cache(*arrays[:2]), Cache(*arrays[2:]))
      written.append(new)
    newest = Cache(tuple(c.k for c in written), tuple(c.v for c in written))
  else:
    def body(index, carry):
      weights = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), layers)
      return one_layer(carry[0], weights, cache, carry[1], index)

    x, newest = jax.lax.fori_loop(0, arch.n_layers, body, (x, newest))
  return model.final_norm(x, layout.dtype), newest


def _put_token(array: jax.Array, new_RKE: jax.Array, slot: jax.Array, layer: Any, columns_last: bool) -> jax.Array:
  """The array ([R, K, s, E] or [R, K, E, s], stacked where `layer` is an index) with one column written."""
  new = jnp.expand_dims(new_RKE, 3 if columns_last else 2).astype(array.dtype)
  start = [0, 0, 0, slot] if columns_last else [0, 0, slot, 0]
  return jax.lax.dynamic_update_slice(array, new, start) if layer is None else jax.lax.dynamic_update_slice(
      array, new[None], [layer, *start])


def merge(cache: Cache, newest: Cache, seen: Seen, layout: Layout) -> Cache:
  """The cache with the segment's columns after the tokens that each row had.

  Rows in which nothing sits get some too, in columns that their next rollout does not see before it has written them.
  """
  n_lead, n_steps = 0 if layout.unrolled else 1, n_columns(newest)

  def on_shard(cache, newest, age_R):
    # One slice after the other, in place: as a scatter, a TPU would hold the cache three times. In blocks of a segment,
    # because a slice that might begin anywhere makes it copy the cache into another layout first.
    def put(row, age, array, new, columns_last):
      axis = n_lead + (3 if columns_last else 2)
      blocks = array.reshape(*array.shape[:axis], -1, n_steps, *array.shape[axis + 1:])
      new = jnp.expand_dims(jax.lax.dynamic_slice_in_dim(new, row, 1, axis=n_lead), axis)
      start = [0] * blocks.ndim
      start[n_lead], start[axis] = row, (seen.start + age) // n_steps
      return jax.lax.dynamic_update_slice(blocks, new, start).reshape(array.shape)

    def body(row, cache):
      put_row = functools.partial(put, row, age_R[row])
      return Cache(
          jax.tree.map(functools.partial(put_row, columns_last=layout.keys_last), cache.k, newest.k),
          jax.tree.map(functools.partial(put_row, columns_last=False), cache.v, newest.v))

    if layout.unrolled:
      return jax.lax.fori_loop(0, age_R.shape[0], body, cache)
    for row in range(age_R.shape[0]):  # libtpu 0.0.42 does not compile the loop.
      cache = body(row, cache)
    return cache

  return on_row_shards(on_shard, cache, newest, seen.age_R)


def on_row_shards(function: Callable, *trees: Any) -> Any:
  """`function` of caches ([.., R, K, ..]) and row vectors ([R]) on each shard's own rows; it returns like its first."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function(*trees)
  spec = lambda x: partition_spec(cache_axes(x.ndim) if x.ndim > 1 else ("batch",), x.shape, mesh)
  specs = jax.tree.map(spec, trees)
  return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*trees)


def resize(cache: Cache, size: int, layout: Layout) -> Cache:
  """The first `size` columns of the cache, or the cache and zeros behind it."""
  def one(array, axis):
    have = array.shape[axis]
    if size <= have:
      return jax.lax.slice_in_dim(array, 0, size, axis=axis)
    width = [(0, 0)] * array.ndim
    width[axis] = (0, size - have)
    return jnp.pad(array, width)

  return Cache(
      jax.tree.map(functools.partial(one, axis=-1 if layout.keys_last else -2), cache.k),
      jax.tree.map(functools.partial(one, axis=-2), cache.v))
