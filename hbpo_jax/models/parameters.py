"""One row per weight: where it lives in params, its Hugging Face name, shape, logical axes, and initial value.

Initialisation, sharding, import and export all read this table. Every weight keeps the orientation of its
Hugging Face tensor (outputs first), so import and export only reshape, and never transpose or copy.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from hbpo_jax.models.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One weight; the weights of all layers are one row, stacked on axis 0.

  path: keys into params, such as ("layers", "query").
  hf_name: tensor name in the checkpoint; {layer} stands for the layer's number in a stacked row.
  hf_shape: shape of the checkpoint's tensor, of one layer.
  shape: shape in params, with the leading [L] of a stacked row.
  axes: logical axis name of each dimension of `shape` (hbpo_jax.models.sharding.LOGICAL_TO_MESH).
  init_std: standard deviation of a random initial value (normal, of an adapter uniform); None means the constant
    `init_value`.
  """
  path: tuple[str, ...]
  hf_name: str
  hf_shape: tuple[int, ...]
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  init_std: float | None
  init_value: float = 0.0

  @property
  def n_inputs(self) -> int:
    """How many trailing axes a matmul with it contracts; 0 for a vector."""
    if len(self.hf_shape) == 1:
      return 0
    return 2 if self.path[-1] == "output" else 1  # The attention's output projection takes heads x head_size.

  @property
  def stacked(self) -> bool:
    """Whether axis 0 counts layers."""
    return self.axes[0] == "layers"


@functools.lru_cache
def table(arch: Architecture) -> tuple[Parameter, ...]:
  """All weights of an architecture, in a fixed order (embedding, layers, final norm, head)."""
  D, F, V = arch.hidden_size, arch.mlp_size, arch.vocab_size
  H, K, E = arch.n_heads, arch.n_kv_heads, arch.head_size
  # Unit-variance outputs, and a residual stream whose variance does not grow with depth.
  wide, narrow = D**-0.5, 1.0 / math.sqrt(2 * arch.n_layers)

  def layer(name, hf_name, hf_shape, shape, axes, std, value=0.0):
    return Parameter(("layers", name), "model.layers.{layer}." + hf_name, hf_shape,
                     (arch.n_layers, *shape), ("layers", *axes), std, value)

  def whole(name, hf_name, shape, axes, std, value=0.0):
    return Parameter((name,), hf_name, shape, shape, axes, std, value)

  rows = [
      whole("embed", "model.embed_tokens.weight", (V, D), ("vocab", "width"), wide),
      layer("attention_norm", "input_layernorm.weight", (D,), (D,), ("norm",), None, 1.0),
      layer("query", "self_attn.q_proj.weight", (H * E, D), (H, E, D), ("heads", "head_size", "width"), wide),
      layer("key", "self_attn.k_proj.weight", (K * E, D), (K, E, D), ("kv_heads", "head_size", "width"), wide),
      layer("value", "self_attn.v_proj.weight", (K * E, D), (K, E, D), ("kv_heads", "head_size", "width"), wide),
  ]
  if arch.qkv_bias:
    rows += [
        layer("query_bias", "self_attn.q_proj.bias", (H * E,), (H, E), ("heads", "head_size"), None),
        layer("key_bias", "self_attn.k_proj.bias", (K * E,), (K, E), ("kv_heads", "head_size"), None),
        layer("value_bias", "self_attn.v_proj.bias", (K * E,), (K, E), ("kv_heads", "head_size"), None),
    ]
  if arch.qk_norm:
    rows += [
        layer("query_norm", "self_attn.q_norm.weight", (E,), (E,), ("head_size",), None, 1.0),
        layer("key_norm", "self_attn.k_norm.weight", (E,), (E,), ("head_size",), None, 1.0),
    ]
  rows += [
      layer("output", "self_attn.o_proj.weight", (D, H * E), (D, H, E), ("width", "heads", "head_size"),
            (H * E)**-0.5 * narrow),
      layer("mlp_norm", "post_attention_layernorm.weight", (D,), (D,), ("norm",), None, 1.0),
      layer("gate", "mlp.gate_proj.weight", (F, D), (F, D), ("mlp", "width"), wide),
      layer("up", "mlp.up_proj.weight", (F, D), (F, D), ("mlp", "width"), wide),
      layer("down", "mlp.down_proj.weight", (D, F), (D, F), ("width", "mlp"), F**-0.5 * narrow),
      whole("norm", "model.norm.weight", (D,), ("norm",), None, 1.0),
  ]
  if not arch.tie_embeddings:
    rows.append(whole("head", "lm_head.weight", (V, D), ("vocab", "width"), wide))
  return tuple(rows)


def nest(by_path: dict[tuple[str, ...], object]) -> dict:
  """The nested dict with each value at its path."""
  tree: dict = {}
  for path, value in by_path.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = value
  return tree


def at(params: Any, path: tuple[str, ...]) -> Any:
  """The entry of a nested dict at a path."""
  for key in path:
    params = params[key]
  return params


def initial(arch: Architecture, key: jax.Array, dtype: jnp.dtype) -> dict:
  """Random params; drawn in float32, then rounded to `dtype`.

  One draw serves all weights: a draw per weight would take ten times as long to compile.
  """
  sizes = [math.prod(row.shape) if row.init_std is not None else 0 for row in table(arch)]
  noise = jax.random.normal(key, (sum(sizes),), jnp.float32)
  weights, start = {}, 0
  for row, size in zip(table(arch), sizes):
    if row.init_std is None:
      weights[row.path] = jnp.full(row.shape, row.init_value, dtype)
    else:
      weights[row.path] = (row.init_std * noise[start:start + size]).reshape(row.shape).astype(dtype)
    start += size
  return nest(weights)


def count(arch: Architecture) -> int:
  """Number of parameters, a tied head counted once."""
  return sum(math.prod(row.shape) for row in table(arch))
