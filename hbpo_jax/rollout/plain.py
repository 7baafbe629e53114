"""The sampler in its plainest form: one while_loop over a cache as long as the longest response.

What `hbpo_jax.rollout.engine` must agree with; only tests run it. A prompt is prefilled once, then all rollouts decode
together until each is done. Caps, temperature, top-p, top-k, EOS ids and random keys are inputs.
"""

import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from hbpo_jax.models import decoder
from hbpo_jax.models.architecture import Architecture
from hbpo_jax.rollout import sampling as sampling_lib
from hbpo_jax.rollout.sampler import row_key
from hbpo_jax.rollout.sampling import Sampling
from hbpo_jax.structs import Array, Prompts, Rollouts


@struct.dataclass
class Limits:
  """What ends and what counts in each subgroup.

  max_tokens_G: int32 [G], most real tokens of a response (prefix, sampled, EOS); at most the array's slots.
  counted_prefix_G: int32 [G], prefix tokens that count in n_gen.
  context_prefix_G: int32 [G], prefix tokens without loss.
  """
  max_tokens_G: Array
  counted_prefix_G: Array
  context_prefix_G: Array


@struct.dataclass
class _Fixed:
  """What every iteration reads. Rows are [B, N], N = G * J."""
  prompt_cache: Any
  prompt_mask_BP: jax.Array
  n_prompt_B: jax.Array
  keys_BN: jax.Array
  forced_NC: jax.Array  # prefix tokens by slot; slots past the prefix are never read
  n_prefix_N: jax.Array
  max_tokens_N: jax.Array


@struct.dataclass
class _Loop:
  """The while_loop's carry; slot c of a response is decided in iteration c."""
  slot: jax.Array  # int32 []
  hidden_BND: jax.Array  # final hidden state that predicts slot `slot`
  cache: Any
  tokens_BNC: jax.Array
  logp_BNC: jax.Array
  n_tokens_BN: jax.Array
  finished_BN: jax.Array


def row_keys(key: jax.Array, query_B: jax.Array, n_subgroups: int, n_rollouts: int) -> jax.Array:
  """One key per rollout from (query, budget, rollout): key [B, G * J]."""
  over_j = jax.vmap(functools.partial(row_key, key), (None, None, 0))
  over_gj = jax.vmap(over_j, (None, 0, None))
  over_bgj = jax.vmap(over_gj, (0, None, None))
  keys_BGJ = over_bgj(query_B, jnp.arange(n_subgroups), jnp.arange(n_rollouts))
  return keys_BGJ.reshape(query_B.shape[0], -1)


def generate(
    params: Any,
    prompts: Prompts,
    limits: Limits,
    sampling: Sampling,
    key: jax.Array,
    *,
    arch: Architecture,
    n_rollouts: int,
    widths: tuple[int, ...],
    compute_dtype: Any,
) -> Rollouts:
  """Samples J responses per query and budget.

  Args:
    params: pytree of the decoder.
    prompts: left-padded prompts and the subgroups' forced prefixes.
    limits: per-subgroup limits, traced.
    sampling: distribution and EOS ids, traced.
    key: one typed random key, of the step.
    arch: static.
    n_rollouts: J, static.
    widths: G array lengths C_g, static; at least limits.max_tokens_G.
    compute_dtype: dtype of activations and of the cache, static.
  Returns:
    Rollouts. At equal shapes the tokens of a rollout depend on the key, its prompt, and its
    (query, budget, rollout) identity only.
  """
  B, P = prompts.tokens_BP.shape
  G, J, C = len(widths), n_rollouts, max(widths)
  N = G * J
  column_P = jnp.arange(P)
  prompt_mask_BP = column_P >= P - prompts.n_prompt_B[:, None]
  position_BP = jnp.where(prompt_mask_BP, column_P - (P - prompts.n_prompt_B[:, None]), 0)
  hidden_BD, prompt_cache = decoder.prefill(
      params, arch, prompts.tokens_BP, prompt_mask_BP.astype(jnp.int32), position_BP, compute_dtype=compute_dtype)

  by_row = lambda x_G: jnp.repeat(x_G, J, axis=0)  # [G, ...] -> [N, ...]
  prefix_GC = jnp.pad(prompts.prefix_GF, ((0, 0), (0, max(0, C - prompts.prefix_GF.shape[1]))))[:, :C]
  fixed = _Fixed(
      prompt_cache=prompt_cache, prompt_mask_BP=prompt_mask_BP, n_prompt_B=prompts.n_prompt_B,
      keys_BN=row_keys(key, prompts.query_B, G, J), forced_NC=by_row(prefix_GC),
      n_prefix_N=by_row(prompts.n_prefix_G), max_tokens_N=by_row(limits.max_tokens_G))
  start = _Loop(
      slot=jnp.int32(0),
      hidden_BND=jnp.broadcast_to(hidden_BD[:, None], (B, N, hidden_BD.shape[-1])),
      cache=decoder.new_cache(arch, B, N, C, compute_dtype),
      tokens_BNC=jnp.zeros((B, N, C), jnp.int32),
      logp_BNC=jnp.zeros((B, N, C), jnp.float32),
      n_tokens_BN=jnp.zeros((B, N), jnp.int32),
      finished_BN=jnp.zeros((B, N), bool),
  )
  end = jax.lax.while_loop(
      lambda loop: (loop.slot < C) & _alive(fixed, loop).any(),
      lambda loop: _decode(params, arch, fixed, loop, sampling, compute_dtype),
      start)
  return _pack(end, limits, prompts.n_prefix_G, J, widths)


def _alive(fixed: _Fixed, loop: _Loop) -> jax.Array:
  """bool [B, N]: neither ended by EOS nor stopped by its limit."""
  return ~loop.finished_BN & (loop.n_tokens_BN < fixed.max_tokens_N)


def _decode(
    params: Any, arch: Architecture, fixed: _Fixed, loop: _Loop, sampling: Sampling, compute_dtype: Any,
) -> _Loop:
  """Decides slot `loop.slot` of every row that is alive, and feeds it to the decoder."""
  alive_BN = _alive(fixed, loop)
  token_BN, logp_BN, is_forced_BN = _next_token(params, arch, fixed, loop, sampling)
  token_BN = jnp.where(alive_BN, token_BN, 0)
  is_eos_BN = (token_BN[..., None] == sampling.eos_ids).any(-1) & ~is_forced_BN
  hidden_BND, cache = decoder.decode_step(
      params, arch, token_BN, fixed.n_prompt_B[:, None] + loop.slot, fixed.prompt_cache, fixed.prompt_mask_BP,
      loop.cache, loop.slot, compute_dtype=compute_dtype)
  write = lambda array, value: jax.lax.dynamic_update_index_in_dim(array, value, loop.slot, axis=2)
  return _Loop(
      slot=loop.slot + 1,
      hidden_BND=hidden_BND,
      cache=cache,
      tokens_BNC=write(loop.tokens_BNC, token_BN),
      logp_BNC=write(loop.logp_BNC, jnp.where(alive_BN, logp_BN, 0.0)),
      n_tokens_BN=loop.n_tokens_BN + alive_BN,
      finished_BN=loop.finished_BN | (alive_BN & is_eos_BN),
  )


def _next_token(
    params: Any, arch: Architecture, fixed: _Fixed, loop: _Loop, sampling: Sampling,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(token, log-probability, whether it is forced), [B, N] each: from the prefix while it lasts, then drawn."""
  B, N = loop.n_tokens_BN.shape
  logits_RV = decoder.logits(params, arch, loop.hidden_BND).reshape(B * N, -1)
  uniform_BN = jax.vmap(jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, loop.slot))))(fixed.keys_BN)
  drawn_R, drawn_logp_R = sampling_lib.draw(uniform_BN.reshape(-1), logits_RV, sampling)
  forced_N = jax.lax.dynamic_index_in_dim(fixed.forced_NC, loop.slot, axis=1, keepdims=False)
  forced_R = jnp.broadcast_to(forced_N, (B, N)).reshape(-1)
  temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
  forced_logp_R = sampling_lib.token_logp(logits_RV / temperature, forced_R)
  is_forced_BN = jnp.broadcast_to(loop.slot < fixed.n_prefix_N, (B, N))
  choose = lambda forced_R, drawn_R: jnp.where(is_forced_BN, forced_R.reshape(B, N), drawn_R.reshape(B, N))
  return choose(forced_R, drawn_R), choose(forced_logp_R, drawn_logp_R), is_forced_BN


def _pack(end: _Loop, limits: Limits, n_prefix_G: jax.Array, n_rollouts: int, widths: tuple[int, ...]) -> Rollouts:
  """The loop's outputs as Rollouts, each subgroup cut to its own width."""
  B, _, C = end.tokens_BNC.shape
  G = len(widths)
  grouped = lambda x: x.reshape(B, G, n_rollouts, *x.shape[2:])
  n_tokens_BGJ = grouped(end.n_tokens_BN)
  slot_C = jnp.arange(C)
  context_BGJ = jnp.broadcast_to(limits.context_prefix_G[None, :, None], n_tokens_BGJ.shape)
  mask_BGJC = (slot_C < n_tokens_BGJ[..., None]) & (slot_C >= context_BGJ[..., None])
  cut = lambda x_BGJC: tuple(x_BGJC[:, g, :, :w] for g, w in enumerate(widths))
  uncounted_G = n_prefix_G - limits.counted_prefix_G
  return Rollouts(
      tokens=cut(grouped(end.tokens_BNC)),
      completion_mask=cut(mask_BGJC),
      logp_sampler=cut(grouped(end.logp_BNC)),
      n_tokens_BGJ=n_tokens_BGJ,
      n_gen_BGJ=n_tokens_BGJ - uncounted_G[None, :, None],
      truncated_BGJ=~grouped(end.finished_BN),
  )
