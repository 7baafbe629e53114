"""Attention kernels for accelerators, behind `attention.attend` and `attention.attend_parts`.

Whole rows ('splash', 'cudnn') come from JAX. One new token per row is ours: rows have different ages and left-padded
prompts, so most of a cache is not seen, and the kernels read only the blocks that are.

The compiler cannot partition a kernel, so each runs under `jax.shard_map` where the ambient mesh has several devices:
rows over data and fsdp, key/value heads over tensor; what its axes do not divide stays whole on every device.

`interpret=True` runs a kernel on CPU, slowly, for the tests.
"""

from collections.abc import Callable, Sequence
import contextlib
import functools
from typing import Literal, cast

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
import numpy as np

from hbpo_jax.models import sharding

PREFILL = ("xla", "splash", "cudnn")
DECODE = ("xla", "pallas_tpu", "pallas_gpu")

# The running maximum of a row that has seen nothing: finite, so that the difference of two of them is 0, not NaN.
MASKED = -1e30

State = tuple[jax.Array, jax.Array, jax.Array]  # out, top, total of `decode_state`

LANES, SUBLANES = 128, 8  # of a TPU register
SPLASH_BLOCKS = (512, 384, 256, 128)
DECODE_BLOCK = 256  # cache columns per step
DECODE_TILE_BYTES = 256 * 1024  # keys per step: enough that the transfer outlasts a step's overhead of about 0.35 us
DECODE_TILE_ROWS = 16  # the kernel's code is unrolled over them
GPU_QUERIES = 16  # the fewest rows of a tensor core's product
GPU_BLOCK = 64


def choose(platform: str) -> tuple[str, str]:
  """(prefill, decode) kernels for `auto`, by the name of JAX's platform.

  TPU: the Pallas kernels, whose compiler is part of libtpu. GPU: plain XLA, since a default must work everywhere:
  cuDNN's attention takes 16-bit operands only and depends on the card and on the cuDNN found at run time, and the
  Triton kernel has been compiled for one card but not run on any. CPU: XLA; the kernels would be interpreted.
  """
  return ("splash", "pallas_tpu") if platform == "tpu" else ("xla", "xla")


# The platforms of the kernels that do not run everywhere.
_PLATFORMS = {"splash": ("tpu",), "pallas_tpu": ("tpu",), "cudnn": ("gpu", "cuda"), "pallas_gpu": ("gpu", "cuda")}


def resolve(field: str, kernel: str, platform: str) -> str:
  """The kernel that a setting asks for on a platform; 'auto' is what suits it.

  Args:
    field: of the setting, such as 'rollout.decode_kernel'.
    kernel: its value.
    platform: of the devices, by JAX's name.
  Raises:
    ValueError: when the kernel does not run there.
  """
  if platform not in _PLATFORMS.get(kernel, (platform,)):
    raise ValueError(
        f"config.{field}={kernel!r} runs on {_PLATFORMS[kernel][0].upper()} only, and these devices are "
        f"{platform.upper()}; set it to auto.")
  if kernel != "auto":
    return kernel
  prefill, decode = choose(platform)
  return decode if field == "rollout.decode_kernel" else prefill


def _on_shards(
    function: Callable, dims: Sequence[str], out_dims: str, n_rows: int, n_kv_heads: int, *arrays) -> jax.Array:
  """function(*arrays), on each device's share under an ambient mesh of several.

  Args:
    dims: one letter per axis of each array: R rows, K heads (query heads lie grouped by key/value head), '.' whole.
    out_dims: the same of the result.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if (mesh.empty or mesh.size == 1 or not set(sharding.AXES) <= set(mesh.axis_names)
      or AxisType.Manual in mesh.axis_types):  # manual: the caller is inside a shard_map already
    return function(*arrays)
  rows, heads = (*sharding.partition_spec(("batch", "kv_heads"), (n_rows, n_kv_heads), mesh), None, None)[:2]
  spec = lambda letters: PartitionSpec(*({"R": rows, "K": heads}.get(letter) for letter in letters))
  return jax.shard_map(
      function, in_specs=tuple(spec(d) for d in dims), out_specs=spec(out_dims), check_vma=False)(*arrays)


def _dot(a: jax.Array, b: jax.Array, dims: tuple, interpret: bool) -> jax.Array:
  """float32 product of two operands of one dtype, contracting a's and b's axes `dims`; float32 in full precision."""
  if interpret:  # XLA's CPU back end lacks some bfloat16 matmuls; products of two bfloat16 are exact in float32.
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  contracted = (dims[:1], dims[1:]), ((), ())
  return jax.lax.dot_general(a, b, contracted, precision=precision, preferred_element_type=jnp.float32)


def _seen_somewhere(mask_TT: np.ndarray) -> np.ndarray:
  """The mask, in which a column that saw nothing sees itself, so that its softmax is finite."""
  return mask_TT | (np.eye(mask_TT.shape[0], dtype=bool) & ~mask_TT.any(axis=1, keepdims=True))


def splash_block(T: int) -> int:
  """The largest block whose padding of T is within an eighth of the least."""
  least = -(-T // LANES) * LANES
  return next(b for b in SPLASH_BLOCKS if -(-T // b) * b <= least * 9 // 8)


def attend_splash(
    query_RTHE: jax.Array, key_RTKE: jax.Array, value_RTKE: jax.Array, segment_RT: jax.Array, *,
    mask: np.ndarray | None = None, interpret: bool = False,
) -> jax.Array:
  """`attention.attend` by the TPU's splash attention: no [T, T] scores in memory, and masked blocks are skipped.

  The scale multiplies the query before it is rounded to the compute dtype again, where 'xla' scales the scores.

  Args:
    query_RTHE, key_RTKE, value_RTKE, segment_RT: as in `attention.attend`.
    mask: static bool [T, T] in place of the causal triangle.
  Returns:
    [R, T, H, E], the query's dtype; differentiable in query, key and value.
  """
  R, T, _, E = query_RTHE.shape
  K = key_RTKE.shape[2]
  block = splash_block(T)
  n_pad = -T % block
  dtype = query_RTHE.dtype
  if mask is None:
    padded = splash_attention_mask.CausalMask((T + n_pad, T + n_pad))
  else:
    padded = splash_attention_mask.NumpyMask(_seen_somewhere(np.pad(np.asarray(mask, bool), (0, n_pad))))
  sizes = splash_attention_kernel.BlockSizes(
      block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
      block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block)

  def on_shard(query, key, value, segment):
    to_heads = lambda x: jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, n_pad), (0, 0)))
    segment = jnp.pad(segment, ((0, 0), (0, n_pad)))
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([padded] * query.shape[2]), block_sizes=sizes, head_shards=1,
        q_seq_shards=1, interpret=interpret)
    # The kernel has no argument for the precision of its products.
    full = jax.default_matmul_precision("highest") if dtype == jnp.float32 else contextlib.nullcontext()
    with full:
      out = jax.vmap(cast(Callable[..., jax.Array], kernel))(
          to_heads(query), to_heads(key), to_heads(value), splash_attention_kernel.SegmentIds(segment, segment))
    return out[:, :, :T].swapaxes(1, 2)

  scaled = (query_RTHE.astype(jnp.float32) * E**-0.5).astype(dtype)
  return _on_shards(
      on_shard, ("R.K.", "R.K.", "R.K.", "R."), "R.K.", R, K, scaled, key_RTKE, value_RTKE, segment_RT)


def attend_cudnn(
    query_RTHE: jax.Array, key_RTKE: jax.Array, value_RTKE: jax.Array, segment_RT: jax.Array, *,
    mask: np.ndarray | None = None, implementation: Literal["cudnn", "xla"] = "cudnn",
    context_RT: jax.Array | None = None,
) -> jax.Array:
  """`attention.attend` by cuDNN's flash attention, for bfloat16 or float16 on an Ampere card or later.

  cuDNN's own causal mask and lengths need rows that are padded on the right and hold one segment. Prompts are padded
  on the left, so the mask is an array [R, 1, T, T] instead; only that, and not the H times larger scores, is in memory.

  Args:
    query_RTHE, key_RTKE, value_RTKE, segment_RT: as in `attention.attend`.
    mask: static bool [T, T] in place of the causal triangle.
    implementation: of `jax.nn.dot_product_attention`; 'xla' for tests.
    context_RT: as in `attention.attend`.
  Returns:
    [R, T, H, E], the query's dtype.
  """
  R, T, _, _ = query_RTHE.shape
  K = key_RTKE.shape[2]
  n_pad = T % 2  # the backward pass wants an even T
  seen_TT = np.tril(np.ones((T, T), bool)) if mask is None else np.asarray(mask, bool)
  seen_TT = _seen_somewhere(np.pad(seen_TT, (0, n_pad)))

  def on_shard(query, key, value, segment, context):
    to_even = lambda x: jnp.pad(x, ((0, 0), (0, n_pad)) + ((0, 0),) * (x.ndim - 2))
    segment, context = to_even(segment), to_even(context)
    # Padding sees padding, as each column must see something.
    seen = seen_TT & same_segment(segment, context)
    out = jax.nn.dot_product_attention(
        to_even(query), to_even(key), to_even(value), mask=seen[:, None], implementation=implementation)
    return out[:, :T]

  context_RT = segment_RT if context_RT is None else context_RT
  return _on_shards(
      on_shard, ("R.K.", "R.K.", "R.K.", "R.", "R."), "R.K.", R, K, query_RTHE, key_RTKE, value_RTKE, segment_RT,
      context_RT)


def same_segment(segment_RT: jax.Array, context_RT: jax.Array | None) -> jax.Array:
  """bool [R, T, T]: whether the column of the last axis lies in the other's segment, or in its context."""
  same_RTT = segment_RT[:, :, None] == segment_RT[:, None, :]
  return same_RTT if context_RT is None else same_RTT | (context_RT[:, :, None] == segment_RT[:, None, :])


def _tiles(first_X: jax.Array, length_X: jax.Array, n_rows: int, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Which blocks each tile of n_rows rows reads: (tile to fetch, first block, number of blocks), int32 [X / n_rows].

  A tile that reads nothing fetches what the one before it has fetched, which costs nothing.
  """
  empty = length_X <= first_X
  low = jnp.where(empty, jnp.iinfo(jnp.int32).max, first_X // block).reshape(-1, n_rows).min(axis=1)
  high = jnp.where(empty, 0, (length_X + block - 1) // block).reshape(-1, n_rows).max(axis=1)
  low = jnp.where(high > 0, low, 0)
  count = high - low
  at = jax.lax.cummax(jnp.where(count > 0, jnp.arange(count.size, dtype=jnp.int32), 0))
  return at, low, count


def _fold(query_RKGE: jax.Array, n_least: int) -> jax.Array:
  """[X, G', E], X = R * K: each head of each row is a row by itself, its G queries padded to a multiple of n_least."""
  R, K, G, E = query_RKGE.shape
  return jnp.pad(query_RKGE.reshape(R * K, G, E), ((0, 0), (0, -G % n_least), (0, 0)))


def _empty(query: jax.Array) -> State:
  """The state of rows that have seen nothing."""
  X, n_queries, E = query.shape
  one = jnp.zeros((X, n_queries, 1), jnp.float32)
  return jnp.zeros((X, n_queries, E), jnp.float32), jnp.full_like(one, MASKED), one


def _ends(part: tuple, n_rows: int) -> tuple[jax.Array, jax.Array]:
  """int32 [X], the first column that each row sees and the one after its last, within the array."""
  key, _, first_R, length_R = part
  each = lambda x_R: jnp.repeat(jnp.clip(x_R, 0, key.shape[-2]).astype(jnp.int32), n_rows // x_R.shape[0])
  return each(first_R), each(length_R)


def _extend(state: State, query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array, along: int,
            interpret: bool) -> State:
  """The state of one row after a block of columns, which axis `along` of key and value holds. Inside the kernels.

  Columns that are not seen change no bit: exp(top - top) is 1, and what is added is 0.
  """
  out, top, total = state
  score = _dot(query, key, (1, 1 - along), interpret) * query.shape[-1]**-0.5
  new_top = jnp.maximum(top, jnp.where(seen, score, MASKED).max(axis=1, keepdims=True))
  weight = jnp.where(seen, jnp.exp(score - new_top), 0.0)
  decay = jnp.exp(top - new_top)
  out = out * decay + _dot(weight.astype(value.dtype), value, (1, along), interpret)
  return out, new_top, total * decay + weight.sum(axis=1, keepdims=True)


def _kernel_tpu(
    layer_ref, at_ref, low_ref, count_ref, first_ref, length_ref, query_ref, key_ref, value_ref, *state_refs,
    n_columns: int, along: int, interpret: bool,
):
  """One block of columns of one tile of rows; the new state stays in fast memory over the steps of a tile."""
  del layer_ref, at_ref  # for the index maps
  old_refs, new_refs = state_refs[:3], state_refs[3:]
  tile, step = pl.program_id(0), pl.program_id(1)
  n_rows, n_queries, _ = query_ref.shape
  block = key_ref.shape[1 + along]

  @pl.when(step == 0)
  def _():
    for old_ref, new_ref in zip(old_refs, new_refs, strict=True):
      new_ref[...] = old_ref[...]

  @pl.when(step < count_ref[tile])
  def _():
    start = (low_ref[tile] + step) * block
    column = start + jax.lax.broadcasted_iota(jnp.int32, (n_queries, block), 1)
    states = []
    for r in range(n_rows):  # unrolled, and written at the end, so that the rows' chains of operations overlap
      row = tile * n_rows + r
      seen = (column >= first_ref[row]) & (column < length_ref[row])
      value = value_ref[r]
      if n_columns % block:  # past the array's end lies anything, NaN included
        inside = start + jax.lax.broadcasted_iota(jnp.int32, value.shape, along) < n_columns
        value = jnp.where(inside, value.astype(jnp.float32), 0.0).astype(value.dtype)
      state = tuple(ref[r] for ref in new_refs)
      states.append(_extend(state, query_ref[r], key_ref[r], value, seen, along, interpret))
    for r, state in enumerate(states):
      for ref, x in zip(new_refs, state, strict=True):
        ref[r] = x


def _see_tpu(state: State, query: jax.Array, part: tuple, layer: jax.Array, interpret: bool) -> State:
  """The state after one part."""
  X, n_queries, E = query.shape
  S = part[0].shape[-2]
  cache = [a.reshape(-1, X, S, E) for a in part[:2]]  # moves nothing
  first, length = _ends(part, X)
  block = min(S, DECODE_BLOCK)
  most = min(DECODE_TILE_ROWS, max(1, DECODE_TILE_BYTES // (block * E * query.dtype.itemsize)))
  n_rows = max(n for n in range(1, most + 1) if X % n == 0)
  at, low, count = _tiles(first, length, n_rows, block)
  # Where heads are narrow, the TPU's default layout has the columns along the lanes. The kernel takes it as it lies.
  full = lambda n: -(-n // LANES) * LANES
  along = int(full(S) * E < S * full(E))
  if along:
    cache = [a.swapaxes(-1, -2) for a in cache]

  def cache_map(i, j, layer, at, low, count, *_):
    own = at[i]
    last = count[own] - 1  # an index that does not change fetches nothing
    column = low[own] + jnp.maximum(jnp.where(own == i, jnp.minimum(j, last), last), 0)
    return (layer[0], own, 0, column) if along else (layer[0], own, column, 0)

  cache_spec = pl.BlockSpec((None, n_rows, E, block) if along else (None, n_rows, block, E), cache_map)
  row_spec = lambda width: pl.BlockSpec((n_rows, n_queries, width), lambda i, j, *_: (i, 0, 0))
  state_specs = [row_spec(E), row_spec(1), row_spec(1)]
  return pl.pallas_call(
      functools.partial(_kernel_tpu, n_columns=S, along=along, interpret=interpret),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=6,
          grid=(X // n_rows, jnp.maximum(count.max(), 1)),
          in_specs=[row_spec(E), cache_spec, cache_spec, *state_specs],
          out_specs=state_specs),
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in state],
      compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
      interpret=interpret,
      name="decode_part",
  )(layer, at, low, count, first, length, query, *cache, *state)


def _kernel_gpu(
    layer_ref, first_ref, length_ref, query_ref, key_ref, value_ref, *state_refs, block: int, interpret: bool,
):
  """All seen columns of one row."""
  layer, first, length = layer_ref[0], first_ref[0], length_ref[0]
  query = query_ref[...]

  def body(index, state):
    column = index * block + jnp.arange(block)
    seen = (column >= first) & (column < length)
    key, value = (
        plgpu.load(ref.at[layer, pl.ds(index * block, block), :], mask=seen[:, None], other=0.0)
        for ref in (key_ref, value_ref))
    return _extend(state, query, key, value, seen[None, :], 0, interpret)

  state = jax.lax.fori_loop(
      first // block, (length + block - 1) // block, body, tuple(ref[...] for ref in state_refs[:3]))
  for ref, x in zip(state_refs[3:], state, strict=True):
    ref[...] = x


def _see_gpu(state: State, query: jax.Array, part: tuple, layer: jax.Array, interpret: bool) -> State:
  """The state after one part; one program per row.

  Not JAX's decode_attention.mqa: that rounds the unnormalised sum to the query's dtype before the next part can be
  added, reads from column 0 instead of `first`, and needs S to be a multiple of its blocks.
  """
  X, n_queries, E = query.shape
  S = part[0].shape[-2]
  cache = [a.reshape(-1, X, S, E) for a in part[:2]]
  whole, one = pl.BlockSpec((1,), lambda i: (0,)), pl.BlockSpec((1,), lambda i: (i,))
  row_spec = lambda width: pl.BlockSpec((None, n_queries, width), lambda i: (i, 0, 0))
  cache_spec = pl.BlockSpec((cache[0].shape[0], None, S, E), lambda i: (0, i, 0, 0))
  state_specs = [row_spec(E), row_spec(1), row_spec(1)]
  return pl.pallas_call(
      functools.partial(_kernel_gpu, block=min(GPU_BLOCK, max(16, pl.next_power_of_2(S))), interpret=interpret),
      grid=(X,),
      in_specs=[whole, one, one, row_spec(E), cache_spec, cache_spec, *state_specs],
      out_specs=state_specs,
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in state],
      compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
      interpret=interpret,
      name="decode_part",
  )(layer, *_ends(part, X), query, *cache, *state)


def decode_state(
    query_RKGE: jax.Array, parts: Sequence[tuple], *, kernel: str, layer: jax.Array | int = 0, interpret: bool = False,
) -> State:
  """Attention of one new token per row before normalisation; `decode_parts` explains the arguments.

    score = query . key / sqrt(E) at columns first <= c < length;  top = max score;  total = sum exp(score - top)
    out = sum exp(score - top) value

  Returns:
    (out float32 [R, K, G, E], top [R, K, G], total [R, K, G]); a row that sees nothing has out 0, top MASKED, total 0.
  """
  if kernel not in DECODE[1:]:
    raise ValueError(f"kernel={kernel!r} is not a decode kernel; choose one of {DECODE[1:]}.")
  R, K, G, _ = query_RKGE.shape
  see, n_least = (_see_tpu, SUBLANES) if kernel == "pallas_tpu" else (_see_gpu, GPU_QUERIES)
  query = _fold(query_RKGE, n_least)
  layer = jnp.asarray(layer, jnp.int32).reshape(1)
  state = _empty(query)
  for part in parts:
    state = see(state, query, part, layer if part[0].ndim == 5 else jnp.zeros_like(layer), interpret)
  out, top, total = (x[:, :G].reshape(R, K, G, -1) for x in state)
  return out, top[..., 0], total[..., 0]


def decode_parts(
    query_RKGE: jax.Array, parts: Sequence[tuple], *, kernel: str, layer: jax.Array | int = 0, interpret: bool = False,
) -> jax.Array:
  """Attention of one new token per row to keys in several arrays, under one softmax, reading only what is seen.

  One part after the other extends the running sums. A part of which a row sees nothing leaves its bits alone, and a
  row's columns are summed in the same blocks whoever sits beside it.

  Args:
    query_RKGE: compute dtype, G query heads per key/value head.
    parts: of (key, value, first_R, length_R). Key and value have the query's dtype and [R, K, S, E], or [L, R, K, S, E]
      with `layer`. int32 [R]; columns first <= c < length are seen; either may lie outside [0, S].
    kernel: 'pallas_tpu' or 'pallas_gpu'.
    layer: int32 [], which layer of parts that are stacks. A kernel's operand is a whole array: a layer that the caller
      picks out of a stack is first copied, seen or not.
  Returns:
    float32 [R, K, G, E]; 0 where a row sees nothing at all.
  Raises:
    ValueError: when the kernel is not one of these.
  """
  dims, flat = ["RK..", ""], []
  for part in parts:
    dims += [*("RK.." if a.ndim == 4 else ".RK.." for a in part[:2]), "R", "R"]
    flat += part

  def on_shard(query, layer, *flat):
    parts = [flat[i:i + 4] for i in range(0, len(flat), 4)]
    out, _, total = decode_state(query, parts, kernel=kernel, layer=layer, interpret=interpret)
    return out / jnp.where(total > 0, total, 1.0)[..., None]

  R, K = query_RKGE.shape[:2]
  return _on_shards(on_shard, dims, "RK..", R, K, query_RKGE, jnp.asarray(layer, jnp.int32), *flat)
