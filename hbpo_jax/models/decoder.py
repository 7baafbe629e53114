"""The decoder of Qwen2, Qwen3 and Llama 3, as pure functions over `params`.

The network is an NNX module; `nnx.merge` and `nnx.split` happen here and nowhere else. Everyone else sees
`params`, a nested dict of arrays with the layers stacked on axis 0:

    embed [V, D]   layers.{attention_norm [L, D], query [L, H, E, D], key/value [L, K, E, D], query_bias [L, H, E], ...,
    output [L, D, H, E], mlp_norm [L, D], gate/up [L, F, D], down [L, D, F]}   norm [D]   head [V, D] (absent if tied)

The sampler's copy may hold the layers unrolled instead (`unroll`): every function but `init` takes both. Stacked
layers may also hold low-rank adapters beside their weights (`hbpo_jax.models.lora.attach`).

The residual stream, norms, softmax and logits are float32; matmuls take `compute_dtype` operands. Every weight is
rounded to `compute_dtype` at use, so params that were cast beforehand give the same result.
"""

import dataclasses
import functools
import math
from typing import Any

from flax import nnx, struct
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from hbpo_jax.models import attention, parameters
from hbpo_jax.models.architecture import Architecture
from hbpo_jax.models.sharding import constrain

REMAT = ("none", "dots", "full", "offload")
_LAYER_INPUT, _PROJECTION = "layer_input", "projection"
_MOST_UNROLLED = 8  # on CPU, where more layers take long to compile
# What follows a weight's name in the names of its adapter's two factors.
LORA_A, LORA_B = "_lora_a", "_lora_b"


@struct.dataclass
class Cache:
  """Keys and values, compute dtype.

  Of prompts: [L, B, K, P, E]. Of rollouts: [L, B, N, K, S, E], slot c = response token c. Where the layers are
  unrolled, a tuple of L such arrays without the first axis.
  """
  k: Any
  v: Any


def _matmul(spec: str, x: jax.Array, weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """float32 einsum of operands that are first cast to `dtype`."""
  return attention.product(spec, x.astype(dtype), weight.astype(dtype))


def _rms_norm(x: jax.Array, scale: jax.Array, eps: float, dtype: jnp.dtype) -> jax.Array:
  """x / rms(x) * scale over the last axis, in float32; the scale first rounded to `dtype`."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * attention.rounded(scale, dtype)


class Layer(nnx.Module):
  """One decoder layer. Inside `Decoder` its weights carry a leading [L], which the scan takes off.

  inputs_first: whether the weights' input axes come before their output axes, as `unroll` leaves them.
  """

  def __init__(self, arch: Architecture, weights: dict[str, Any], inputs_first: bool = False):
    self.arch, self.inputs_first = arch, inputs_first
    for name, value in weights.items():
      setattr(self, name, nnx.Param(value))

  def project(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], dtype: jnp.dtype):
    """Rotated queries [..., H, E], rotated keys and values [..., K, E] of the residual stream x [..., D]."""
    arch = self.arch
    normed = _rms_norm(x, self.attention_norm[...], arch.rms_eps, dtype)
    query, key, value = (self._linear(normed, "d", name, "he", dtype) for name in ("query", "key", "value"))
    if arch.qkv_bias:
      query, key, value = (
          y + attention.rounded(bias[...], dtype)
          for y, bias in ((query, self.query_bias), (key, self.key_bias), (value, self.value_bias)))
    if arch.qk_norm:
      query = _rms_norm(query, self.query_norm[...], arch.rms_eps, dtype)
      key = _rms_norm(key, self.key_norm[...], arch.rms_eps, dtype)
    query, key = attention.rotate(query, rope), attention.rotate(key, rope)
    return query.astype(dtype), key.astype(dtype), value.astype(dtype)

  def finish(self, x: jax.Array, attended: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The residual stream after the attention's output projection and the MLP."""
    x = x + self._linear(attended, "he", "output", "d", dtype)
    normed = _rms_norm(x, self.mlp_norm[...], self.arch.rms_eps, dtype)
    gate, up = (self._linear(normed, "d", name, "f", dtype) for name in ("gate", "up"))
    return x + self._linear(jax.nn.silu(gate) * up, "f", "down", "d", dtype)

  def _linear(self, x: jax.Array, inputs: str, name: str, outputs: str, dtype: jnp.dtype) -> jax.Array:
    """float32 [..., outputs] of x [..., inputs], by a weight and its adapter; axes are named by a letter each."""
    w = getattr(self, name)[...]
    if not self.inputs_first:
      out = attention.linear(x, w, inputs, outputs, dtype)
      if hasattr(self, name + LORA_A):
        low = attention.linear(x, getattr(self, name + LORA_A)[...], inputs, "r", dtype)
        out += attention.linear(low, getattr(self, name + LORA_B)[...], "r", outputs, dtype)
      return checkpoint_name(out, _PROJECTION)  # what remat "dots" keeps
    # As one plain matmul: of several contracted axes, XLA on CPU would transpose the weight at every use.
    lead = x.shape[:x.ndim - len(inputs)]
    out = _matmul("...i,io->...o", x.reshape(*lead, -1), w.reshape(-1, math.prod(w.shape[len(inputs):])), dtype)
    return out.reshape(*lead, *w.shape[len(inputs):])


class Decoder(nnx.Module):
  """Embedding, stacked layers, final norm and head."""

  def __init__(self, arch: Architecture, weights: dict[str, Any], inputs_first: bool = False):
    self.arch = arch
    self.embed = nnx.Param(weights["embed"])
    self.layers = Layer(arch, weights["layers"], inputs_first)
    self.norm = nnx.Param(weights["norm"])
    if not arch.tie_embeddings:
      self.head = nnx.Param(weights["head"])

  def embed_tokens(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32 [..., D] of int32 tokens [...], rounded to `dtype`."""
    return attention.rounded(jnp.take(self.embed[...], tokens, axis=0, mode="clip"), dtype)

  def final_norm(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The normalised residual stream in the compute dtype."""
    return _rms_norm(x, self.norm[...], self.arch.rms_eps, dtype).astype(dtype)


@functools.lru_cache
def _graph(arch: Architecture, inputs_first: bool, factors: tuple[str, ...]) -> nnx.GraphDef:
  """factors: the names of the adapters' factors in the layers, sorted."""
  def build():
    weights = parameters.initial(arch, jax.random.key(0), jnp.float32)
    weights["layers"] |= dict.fromkeys(factors, jnp.zeros(()))  # A graph knows no shapes.
    return Decoder(arch, weights, inputs_first)

  return nnx.split(nnx.eval_shape(build))[0]


def is_unrolled(params: dict) -> bool:
  """Whether the layers are a tuple, as `unroll` leaves them, not stacked."""
  return isinstance(params["layers"], tuple)


def _factors(layers: dict[str, Any]) -> tuple[str, ...]:
  """The names of the adapters' factors, sorted; none without adapters."""
  return tuple(sorted(name for name in layers if name.endswith((LORA_A, LORA_B))))


def unroll(params: dict, arch: Architecture) -> dict:
  """The same weights laid out for decoding without a loop over the layers; jit it.

  The layers are a tuple of L dicts; input axes come before output axes; `lm_head` [D, V] is the head. On CPU, a weight
  that is picked out of a stack inside a loop is copied at every use, and a few rows times [inputs, outputs] run at the
  speed of the hardware where [outputs, inputs] reach two thirds of it.

  Raises:
    ValueError: when adapters are attached.
  """
  def one(row: parameters.Parameter, weight: jax.Array) -> jax.Array:
    n_in = row.n_inputs
    return jnp.moveaxis(weight, range(weight.ndim - n_in, weight.ndim), range(n_in))

  if factors := _factors(params["layers"]):
    raise ValueError(f"params hold {factors[0]}, which unrolled layers cannot; use lora.merge in place of lora.attach.")
  rows = [row for row in parameters.table(arch) if row.stacked]
  layers = tuple({row.path[-1]: one(row, parameters.at(params, row.path)[i]) for row in rows}
                 for i in range(arch.n_layers))
  return {"embed": params["embed"], "layers": layers, "norm": params["norm"], "lm_head": head_matrix(params, arch).T}


def open_layers(arch: Architecture, params: dict) -> tuple[Decoder, nnx.GraphDef, Any]:
  """(decoder for embedding and norm; graph of one layer; weights of the layers: one stacked State, or a tuple)."""
  unrolled = is_unrolled(params)
  first, factors = params, () if unrolled else _factors(params["layers"])
  if unrolled:
    first = {"embed": params["embed"], "layers": params["layers"][0], "norm": params["norm"]}
    arch = dataclasses.replace(arch, tie_embeddings=True)  # The head is not part of this module.
  model = nnx.merge(_graph(arch, unrolled, factors), nnx.State(first))
  graph, stacked = nnx.split(model.layers)
  return model, graph, tuple(nnx.State(w) for w in params["layers"]) if unrolled else stacked


def init(arch: Architecture, key: jax.Array, param_dtype: jnp.dtype = jnp.float32) -> dict:
  """Random params; jit it (arch static), then `sharding.put` them on the mesh.

  Normal with standard deviation 1/sqrt(inputs), the two projections into the residual stream also divided by
  sqrt(2 L); norms 1, biases 0.
  """
  return nnx.to_pure_dict(nnx.split(Decoder(arch, parameters.initial(arch, key, param_dtype)))[1])


def run(
    params: dict, arch: Architecture, tokens_RT: jax.Array, segment_RT: jax.Array, position_RT: jax.Array, *,
    compute_dtype: Any, remat: str = "none", keep_cache: bool = False, mask_TT: Any = None, kernel: str = "xla",
    context_RT: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
  """(hidden states [R, T, D] after the final norm, Cache [L, R, K, T, E] or None); see `forward`.

  Args:
    keep_cache: whether to return the keys and values.
    mask_TT: static bool [T, T] in place of the causal triangle; row = column that looks, True = sees.
  """
  if remat not in REMAT:
    raise ValueError(f"model.remat={remat!r} is unknown; choose one of {REMAT}.")
  dtype = jnp.dtype(compute_dtype)
  model, graph, layers = open_layers(arch, params)
  rope = attention.rope_tables(arch, position_RT)

  def body(x, weights):
    x = checkpoint_name(x, _LAYER_INPUT)
    layer = nnx.merge(graph, weights)
    query, key, value = layer.project(x, rope, dtype)
    query = constrain(query, "batch", "none", "heads", "none")
    attended = attention.attend(
        query, key, value, segment_RT, mask_TT=mask_TT, kernel=kernel, context_RT=context_RT)
    x = constrain(layer.finish(x, attended, dtype), "batch", "none", "none")
    return x, Cache(key.swapaxes(1, 2), value.swapaxes(1, 2)) if keep_cache else None

  if remat == "dots":
    body = jax.checkpoint(body, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(_PROJECTION))
  elif remat == "full":
    body = jax.checkpoint(body, prevent_cse=False)
  elif remat == "offload":
    body = jax.checkpoint(body, prevent_cse=False, policy=jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[_LAYER_INPUT], offload_src="device",
        offload_dst="pinned_host"))
  # Each device looks up its share of the width for all rows, and keeps its rows: backward, every share of the gradient
  # is summed where it lies. Else the compiler of JAX 0.11 sums half of a vocabulary split over tensor on all devices.
  x = constrain(model.embed_tokens(tokens_RT, dtype), "replica", "none", "width")
  x = constrain(x, "batch", "none", "none")
  if not keep_cache and not isinstance(layers, tuple) and attention.on_cpu() and arch.n_layers <= _MOST_UNROLLED:
    # A loop keeps what its backward pass needs in stacks, which a CPU spends a tenth of an update on filling.
    traced_once = jax.jit(body)
    for i in range(arch.n_layers):
      x, cache = traced_once(x, jax.tree.map(lambda w, i=i: w[i], layers))
  elif isinstance(layers, tuple):
    caches = []
    for weights in layers:
      x, cache = body(x, weights)
      caches.append(cache)
    cache = Cache(tuple(c.k for c in caches), tuple(c.v for c in caches)) if keep_cache else None
  else:
    x, cache = jax.lax.scan(body, x, layers)
  return model.final_norm(x, dtype), cache


def forward(
    params: dict,
    arch: Architecture,
    tokens_RT: jax.Array,
    segment_RT: jax.Array,
    position_RT: jax.Array,
    *,
    compute_dtype: Any = jnp.bfloat16,
    remat: str = "none",
    kernel: str = "xla",
    context_RT: jax.Array | None = None,
) -> jax.Array:
  """Hidden states after the final norm; `logits` turns them into scores.

  Args:
    params: as `init` returns.
    tokens_RT: int32 [R, T].
    segment_RT: int32 [R, T], 0 = padding; attention is causal by column and stays within a segment.
    position_RT: int32 [R, T], rotary positions; any value at padding.
    compute_dtype: dtype of matmul operands: bfloat16 or float32.
    remat: what the backward pass keeps of each layer: 'none' = everything, 'dots' = its projections' outputs (with
      their adapters' share added, not apart), 'full' = its input, 'offload' = its input, in the host's memory.
    kernel: attention: 'xla', 'splash' (TPU) or 'cudnn' (GPU).
    context_RT: int32 [R, T], a second segment that each token sees; None = none. Not for 'splash'.
  Returns:
    compute_dtype [R, T, D]; finite but meaningless at padding.
  """
  return run(
      params, arch, tokens_RT, segment_RT, position_RT, compute_dtype=compute_dtype, remat=remat, kernel=kernel,
      context_RT=context_RT)[0]


def prefill(
    params: dict,
    arch: Architecture,
    tokens_BP: jax.Array,
    segment_BP: jax.Array,
    position_BP: jax.Array,
    *,
    compute_dtype: Any = jnp.bfloat16,
) -> tuple[jax.Array, Cache]:
  """Hidden state of each prompt's last token, and the prompt's keys and values.

  Args:
    tokens_BP: int32 [B, P], left-padded, so that column P - 1 holds the last real token.
    segment_BP, position_BP: as in `forward`.
  Returns:
    compute_dtype [B, D], and a Cache with k and v of compute_dtype [L, B, K, P, E].
  """
  hidden, cache = run(
      params, arch, tokens_BP, segment_BP, position_BP, compute_dtype=compute_dtype, keep_cache=True)
  return hidden[:, -1], cache


def new_cache(arch: Architecture, n_queries: int, n_rollouts: int, n_slots: int, dtype: Any = jnp.bfloat16) -> Cache:
  """An empty rollout cache: k and v of [L, B, N, K, S, E]; `dtype` must be decode_step's compute_dtype."""
  shape = (arch.n_layers, n_queries, n_rollouts, arch.n_kv_heads, n_slots, arch.head_size)
  axes = ("none", "batch", "none", "kv_heads", "none", "none")
  return Cache(constrain(jnp.zeros(shape, dtype), *axes), constrain(jnp.zeros(shape, dtype), *axes))


def decode_step(
    params: dict,
    arch: Architecture,
    token_BN: jax.Array,
    position_BN: jax.Array,
    prompt_cache: Cache,
    prompt_mask_BP: jax.Array,
    cache: Cache,
    slot: jax.Array,
    *,
    compute_dtype: Any = jnp.bfloat16,
) -> tuple[jax.Array, Cache]:
  """Feeds one token per rollout, and returns the hidden states that predict the next ones.

  All rows write the same slot; each attends to its query's prompt and to its own slots 0..slot.

  Args:
    token_BN: int32 [B, N], the token at `slot`.
    position_BN: int32 [B, N], its rotary position: n_prompt + slot.
    prompt_cache: of `prefill`, [L, B, K, P, E].
    prompt_mask_BP: bool [B, P], True = real prompt token.
    cache: of `new_cache` or the previous step; donate it, or carry it in a loop, so that it is updated in place.
    slot: int32 [], 0 <= slot < S.
  Returns:
    compute_dtype [B, N, D], and the cache with `slot` written.
  """
  dtype = jnp.dtype(compute_dtype)
  model, graph, stacked = open_layers(arch, params)
  rope = attention.rope_tables(arch, position_BN)

  def body(index, carry):
    x, k, v = carry
    layer, prompt_k, prompt_v = jax.tree.map(
        lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), (stacked, prompt_cache.k, prompt_cache.v))
    layer = nnx.merge(graph, layer)
    query, key, value = layer.project(x, rope, dtype)
    start = (index, 0, 0, 0, slot, 0)
    k = jax.lax.dynamic_update_slice(k, key[None, :, :, :, None].astype(k.dtype), start)
    v = jax.lax.dynamic_update_slice(v, value[None, :, :, :, None].astype(v.dtype), start)
    attended = attention.attend_decode(
        query, prompt_k, prompt_v, prompt_mask_BP, jax.lax.dynamic_index_in_dim(k, index, keepdims=False),
        jax.lax.dynamic_index_in_dim(v, index, keepdims=False), slot)
    return constrain(layer.finish(x, attended, dtype), "batch", "none", "none"), k, v

  x = constrain(model.embed_tokens(token_BN, dtype), "batch", "none", "none")
  x, k, v = jax.lax.fori_loop(0, arch.n_layers, body, (x, cache.k, cache.v))
  return model.final_norm(x, dtype), Cache(k, v)


def head_matrix(params: dict, arch: Architecture) -> jax.Array:
  """[V, D], param dtype: the output head, or the embedding where they are tied. Logits are hidden @ head.T."""
  return params["embed"] if arch.tie_embeddings else params["head"]


def logits(params: dict, arch: Architecture, hidden: jax.Array) -> jax.Array:
  """float32 [..., V] of hidden states [..., D]; operands in the hidden states' dtype, accumulated in float32."""
  if is_unrolled(params):
    return _matmul("...d,dv->...v", hidden, params["lm_head"], hidden.dtype)
  return _matmul("...d,vd->...v", hidden, head_matrix(params, arch), hidden.dtype)
