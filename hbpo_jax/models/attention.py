"""Rotary positions and grouped-query attention, over a whole row and for one decoded token."""

from collections.abc import Sequence
import functools
import math
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from hbpo_jax.models import kernels
from hbpo_jax.models.architecture import Architecture

# Finite, so that a row with nothing to attend to (padding) averages everything instead of giving NaN.
MASKED = -1e30


# Queries that look at the same keys in XLA's causal attention: what lies behind a block's last column is left out.
_CAUSAL_BLOCK, _MOST_CAUSAL_BLOCKS = 128, 4


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """einsum of two operands of one dtype, accumulated and returned in float32.

  float32 operands are multiplied in full precision, where a TPU would otherwise round them to bfloat16.
  """
  if on_cpu():  # XLA's CPU back end lacks some bfloat16 matmuls; products of two bfloat16 are exact in float32.
    a, b = rounded(a, a.dtype), rounded(b, b.dtype)
  full = a.dtype == jnp.float32
  precision = jax.lax.Precision.HIGHEST if full else jax.lax.Precision.DEFAULT
  return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def linear(x: jax.Array, weight: jax.Array, inputs: str, outputs: str, dtype: Any) -> jax.Array:
  """float32 [..., outputs] of x [..., inputs] and a weight [outputs, inputs], whose axes are named by a letter each.

  Forward and backward, operands are rounded to `dtype` and products summed in float32: the weight's gradient is not
  rounded again, and no matmul has a float32 operand beside a bfloat16 one, which a GPU would run in float32.
  """
  return _linear(x, weight, inputs, outputs, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _linear(x, weight, inputs, outputs, dtype) -> Any:
  return _linear_forward(x, weight, inputs, outputs, dtype)[0]


def _linear_forward(x, weight, inputs, outputs, dtype):
  rounded_x = x.astype(dtype)
  # A plain product, not `_linear` again: a checkpoint's policy that keeps the outputs of matmuls must see one.
  out = product(f"...{inputs},{outputs}{inputs}->...{outputs}", rounded_x, weight.astype(dtype))
  # An empty array carries x's own dtype.
  return out, (rounded_x, weight, jnp.zeros((0,), x.dtype))


def _linear_backward(inputs, outputs, dtype, kept, cotangent):
  x, weight, like = kept
  error, lead = cotangent.astype(dtype), "uvw"[:x.ndim - len(inputs)]
  x_grad = product(f"{lead}{outputs},{outputs}{inputs}->{lead}{inputs}", error, weight.astype(dtype))
  if on_cpu() and math.prod(x.shape[len(lead):]) < math.prod(error.shape[len(lead):]):
    # One operand is transposed on the way into the matmul. Let it be the smaller one: the other is the product of a
    # long chain of elementwise operations, and as a part of that loop the transposition takes longer than the matmul.
    gradient = product(f"{lead}{inputs},{lead}{outputs}->{inputs}{outputs}", x, error)
    gradient = jnp.einsum(f"{inputs}{outputs}->{outputs}{inputs}", jax.lax.optimization_barrier(gradient))
  else:
    gradient = product(f"{lead}{outputs},{lead}{inputs}->{outputs}{inputs}", error, x)
  return x_grad.astype(like.dtype), gradient.astype(weight.dtype)


_linear.defvjp(_linear_forward, _linear_backward)


def rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """float32 of x after rounding to `dtype`; unlike a pair of casts, XLA does not optimise it away."""
  x = x.astype(jnp.float32)
  if jnp.dtype(dtype) == jnp.float32:
    return x
  info = jnp.finfo(dtype)
  return jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)


def on_cpu() -> bool:
  """Whether the code being traced will run on CPU: the ambient mesh decides (it may be of absent devices)."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() == "cpu" if device is None else device.device_kind == "cpu"


def rope_frequencies(arch: Architecture) -> np.ndarray:
  """float32 [E/2], radians per position, after rope scaling.

  theta^(-2i/E). 'linear' divides all by factor. 'llama3' divides those whose wavelength exceeds
  original_context / low_freq_factor, keeps those below original_context / high_freq_factor, and interpolates between.
  """
  E = arch.head_size
  frequency = arch.rope_theta**(-np.arange(0, E, 2, dtype=np.float64) / E)
  scaling = arch.rope_scaling
  if scaling is not None and scaling.kind == "linear":
    frequency = frequency / scaling.factor
  elif scaling is not None:
    turns = scaling.original_context * frequency / (2 * np.pi)  # rotations within the trained context
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    ramp = np.clip(ramp, 0.0, 1.0)
    frequency = ramp * frequency + (1 - ramp) * frequency / scaling.factor
  return frequency.astype(np.float32)


def rope_tables(arch: Architecture, position: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(cos, sin), float32 [..., 1, E/2], for int32 positions [...]; the 1 broadcasts over heads."""
  angle = position[..., None, None].astype(jnp.float32) * rope_frequencies(arch)
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotary embedding of heads [..., heads, E] in float32; dimension i pairs with i + E/2."""
  cos, sin = tables
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(
    query_RTHE: jax.Array, key_RTKE: jax.Array, value_RTKE: jax.Array, segment_RT: jax.Array, *,
    mask_TT: np.ndarray | None = None, kernel: str = "xla", context_RT: jax.Array | None = None,
) -> jax.Array:
  """Causal attention within segments.

  Column t sees columns s <= t of its own segment, and of that which context_RT names; columns of segment 0 (padding)
  see and are seen by nothing real.

  Args:
    query_RTHE, key_RTKE, value_RTKE: compute dtype; query head h uses key/value head h // (H / K).
    segment_RT: int32 [R, T], 0 = padding.
    mask_TT: static bool [T, T] in place of the causal triangle; True = column (second axis) is seen.
    kernel: 'xla', 'splash' (TPU) or 'cudnn' (GPU).
    context_RT: int32 [R, T], or None; 'splash' compares one number per column only.
  Returns:
    [R, T, H, E], compute dtype; finite but meaningless at padding.
  Raises:
    ValueError: when 'splash' is given contexts.
  """
  if kernel == "splash":
    if context_RT is not None:
      raise ValueError("the splash kernel knows no contexts; give every response its prompt in its own segment.")
    return kernels.attend_splash(query_RTHE, key_RTKE, value_RTKE, segment_RT, mask=mask_TT)
  if kernel == "cudnn":
    return kernels.attend_cudnn(query_RTHE, key_RTKE, value_RTKE, segment_RT, mask=mask_TT, context_RT=context_RT)
  R, T, H, E = query_RTHE.shape
  K = key_RTKE.shape[2]
  dtype = query_RTHE.dtype
  grouped = query_RTHE.reshape(R, T, K, H // K, E)
  seen_TT = np.tri(T, dtype=bool) if mask_TT is None else np.asarray(mask_TT)
  same_RTT = kernels.same_segment(segment_RT, context_RT) & (segment_RT[:, None, :] != 0)

  def block(first: int, last: int) -> jax.Array:
    """Columns first <= t < last, which need no keys beyond themselves if the mask is causal."""
    end = last if mask_TT is None else T
    mask = (seen_TT[first:last, :end] & same_RTT[:, first:last, :end])[:, None, None]
    score = product("rtkge,rske->rkgts", grouped[:, first:last], key_RTKE[:, :end])
    weight = jax.nn.softmax(jnp.where(mask, score * E**-0.5, MASKED), axis=-1)
    return product("rkgts,rske->rtkge", weight.astype(dtype), value_RTKE[:, :end])

  size = T if mask_TT is not None else max(_CAUSAL_BLOCK, -(-T // _MOST_CAUSAL_BLOCKS))
  out = [block(first, min(first + size, T)) for first in range(0, T, size)]
  return jnp.concatenate(out, axis=1).reshape(R, T, H, E).astype(dtype)


def attend_decode(
    query_BNHE: jax.Array,
    prompt_key_BKPE: jax.Array,
    prompt_value_BKPE: jax.Array,
    prompt_mask_BP: jax.Array,
    key_BNKSE: jax.Array,
    value_BNKSE: jax.Array,
    slot: jax.Array,
) -> jax.Array:
  """Attention of one new token per rollout to its query's prompt and to its own slots 0..slot.

  One softmax over both parts, without joining them: each part is exponentiated against the common maximum. The
  prompt's keys are shared by the N rollouts, which enter as rows of one matmul.

  Args:
    query_BNHE: compute dtype.
    prompt_mask_BP: bool, True = real prompt token.
    key_BNKSE, value_BNKSE: compute dtype, slot `slot` already written.
    slot: int32 [], the newest slot.
  Returns:
    [B, N, H, E], compute dtype.
  """
  B, N, H, E = query_BNHE.shape
  K = prompt_key_BKPE.shape[1]
  S = key_BNKSE.shape[3]
  dtype = query_BNHE.dtype

  query = query_BNHE.reshape(B, N, K, H // K, E)
  score_p = product("bnkge,bkpe->bnkgp", query, prompt_key_BKPE) * E**-0.5
  score_s = product("bnkge,bnkse->bnkgs", query, key_BNKSE) * E**-0.5
  score_p = jnp.where(prompt_mask_BP[:, None, None, None, :], score_p, MASKED)
  score_s = jnp.where(jnp.arange(S) <= slot, score_s, MASKED)
  top = jnp.maximum(score_p.max(-1, keepdims=True), score_s.max(-1, keepdims=True))
  exp_p, exp_s = jnp.exp(score_p - top), jnp.exp(score_s - top)
  total = exp_p.sum(-1, keepdims=True) + exp_s.sum(-1, keepdims=True)
  out = product("bnkgp,bkpe->bnkge", (exp_p / total).astype(dtype), prompt_value_BKPE)
  out += product("bnkgs,bnkse->bnkge", (exp_s / total).astype(dtype), value_BNKSE)
  return out.reshape(B, N, H, E).astype(dtype)


@struct.dataclass
class Part:
  """Keys and values of one array of every row's columns.

  key: compute dtype [R, K, S, E], or [R, K, E, S] for the kernel 'xla'.  value: [R, K, S, E]. Or all layers': [L, ..].
  intervals: disjoint (first, end), each int32 [R]: a row sees the columns first <= c < end of every interval.
  """
  key: jax.Array
  value: jax.Array
  intervals: tuple[tuple[jax.Array, jax.Array], ...]


def attend_parts(
    query_RKGE: jax.Array, parts: Sequence[Part], *, kernel: str, layer: jax.Array | None = None) -> jax.Array:
  """Attention of one new token per row to keys that lie in several arrays, under one softmax.

  Each part is exponentiated against the common maximum, and the parts are added in order. A column that a row does not
  see adds an exact zero.

  Args:
    query_RKGE: compute dtype, G query heads per key/value head.
    parts: each row sees a column in at least one of them.
    kernel: 'xla', whose keys are [.., E, S] (a CPU reads them twice as fast; GPUs do not mind), or one of
      `kernels.DECODE`, which reads only the blocks that are seen.
    layer: int32 [], which of the layers in `parts`; None = they are of one layer.
  Returns:
    float32 [R, K, G, E].
  """
  if kernel != "xla":
    # The kernels take whole stacks, of which they read what they need; a layer picked beforehand would be a copy.
    ragged = tuple((part.key, part.value, *interval) for part in parts for interval in part.intervals)
    return kernels.decode_parts(query_RKGE, ragged, kernel=kernel, layer=0 if layer is None else layer)
  pick = lambda x: x if layer is None else jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
  scores = []
  for part in parts:
    key = pick(part.key)
    column = jnp.arange(key.shape[-1])
    seen = [(column >= first[:, None]) & (column < end[:, None]) for first, end in part.intervals]
    score = product("rkge,rkes->rkgs", query_RKGE, key) * query_RKGE.shape[-1]**-0.5
    scores.append(jnp.where(functools.reduce(jnp.logical_or, seen)[:, None, None], score, MASKED))
  top = functools.reduce(jnp.maximum, [score.max(-1, keepdims=True) for score in scores])
  total = out = jnp.zeros((), jnp.float32)
  for part, score in zip(parts, scores, strict=True):
    weight = jnp.exp(score - top)
    total += weight.sum(-1, keepdims=True)
    out += product("rkgs,rkse->rkge", weight.astype(query_RKGE.dtype), pick(part.value))
  return out / total
