"""The jitted pieces of the sampler: one segment of decoding, and compaction of the rows.

Caps, temperature, top-p, top-k, EOS ids and random keys are inputs; what compiles depends on the number of rows and of
columns only.
"""

import functools

from flax import struct
import jax
import jax.numpy as jnp

from hbpo_jax.models import decoder, slots
from hbpo_jax.models.architecture import Architecture
from hbpo_jax.models.decoder import Cache
from hbpo_jax.models.sharding import constrain
from hbpo_jax.rollout import sampling as sampling_lib
from hbpo_jax.rollout.sampling import Sampling

# Rows of the table that the host sends with every segment, int32 [8, R].
QUERY, SUBGROUP, AGE, LIMIT, STOP, ALIVE, KEY_0, KEY_1 = range(8)
NEVER = 2**30  # A STOP that no response reaches.


@struct.dataclass
class Live:
  """What stays on the devices between segments. Donated to each and returned.

  cache: of `slots`; its columns are those of a context and a length bucket.
  hidden_RD: compute dtype [R, D], predicts each row's next token.
  """
  cache: Cache
  hidden_RD: jax.Array


def row_key(key: jax.Array, query: jax.Array, subgroup: jax.Array, rollout: jax.Array) -> jax.Array:
  """The random key of one rollout: of its identity, whatever slot it sits in."""
  return functools.reduce(jax.random.fold_in, (query, subgroup, rollout), key)


def row_keys(key: jax.Array, identity_3N: jax.Array) -> jax.Array:
  """The data of `row_key` of N rollouts, as the table holds it: int32 [2, N].

  Args:
    key: typed random key of the step.
    identity_3N: int32 [3, N]: query, subgroup, rollout.
  """
  data_N2 = jax.random.key_data(jax.vmap(functools.partial(row_key, key))(*identity_3N))
  return jax.lax.bitcast_convert_type(data_N2, jnp.int32).T


def decode(
    params: dict,
    pool: slots.Pool,
    live: Live,
    table_8R: jax.Array,
    sampling: Sampling,
    *,
    arch: Architecture,
    layout: slots.Layout,
    n_steps: int,
) -> tuple[Live, jax.Array]:
  """Decodes up to n_steps tokens in every row, and stores their keys and values.

  Args:
    params: of the sampler, as the layout says.
    live: consumed.
    table_8R: int32 [8, R] by QUERY (index into the pool), SUBGROUP, AGE (tokens sampled before, a multiple of n_steps),
      LIMIT (most tokens to sample), STOP (a response of this many sampled tokens ends as if the last were EOS), ALIVE
      (0 = nothing sits here), KEY_0 and KEY_1 (of `row_keys`). At age 0 a row takes up its context.
  Returns:
    (Live, int32 [R, 2 n_steps + 2]): tokens, the bits of their float32 log-probabilities, the number of tokens
    decided, and whether the last is EOS. Packed, so that the host fetches one array.
  """
  query_R, subgroup_R, age_R, limit_R, stop_R, alive_R, *key_data = table_8R
  R = query_R.shape[0]
  alive_R = alive_R > 0
  P, F = slots.n_columns(pool.prompt), slots.n_columns(pool.prefix)
  cache = slots.seat(live.cache, pool, query_R, subgroup_R, age_R == 0, layout)
  n_prompt_R, n_prefix_R = pool.n_prompt_B[query_R], pool.n_prefix_G[subgroup_R]
  first_hidden_RD = pool.hidden_XD[query_R * pool.n_prefix_G.shape[0] + subgroup_R]
  # An empty row sees no context, so that nothing is read for it.
  context_R = jnp.where(alive_R, P + n_prefix_R, 0)
  seen = slots.Seen(P - n_prompt_R, context_R, age_R, start=slots.context_columns(P, F, n_steps))
  hidden_RD = constrain(jnp.where(age_R[:, None] == 0, first_hidden_RD, live.hidden_RD), "batch", "none")
  key_R = jax.random.wrap_key_data(jax.lax.bitcast_convert_type(jnp.stack(key_data, axis=1), jnp.uint32))
  # A token's number in its response counts the forced prefix.
  number_Rs = (n_prefix_R + age_R)[:, None] + jnp.arange(n_steps)
  uniform_Rs = jax.vmap(lambda k, n_s: jax.vmap(lambda n: jax.random.uniform(jax.random.fold_in(k, n)))(n_s))(
      key_R, number_Rs)

  def going(carry):
    slot, _, _, _, _, n_new_R, ended_R = carry
    return (slot < n_steps) & (alive_R & ~ended_R & (age_R + n_new_R < limit_R)).any()

  def one(carry):
    slot, hidden_RD, newest, token_Rs, logp_Rs, n_new_R, ended_R = carry
    running_R = alive_R & ~ended_R & (age_R + n_new_R < limit_R)
    uniform_R = jax.lax.dynamic_index_in_dim(uniform_Rs, slot, axis=1, keepdims=False)
    token_R, logp_R = sampling_lib.draw(uniform_R, decoder.logits(params, arch, hidden_RD), sampling)
    token_R = jnp.where(running_R, token_R, 0)
    n_new_R = n_new_R + running_R
    is_last_R = (token_R[:, None] == sampling.eos_ids).any(-1) | (age_R + n_new_R >= stop_R)
    hidden_RD, newest = slots.step(
        params, token_R, n_prompt_R + n_prefix_R + age_R + slot, cache, seen, newest, slot, arch=arch, layout=layout)
    write = lambda array, value: jax.lax.dynamic_update_index_in_dim(array, value, slot, axis=1)
    return (slot + 1, hidden_RD, newest, write(token_Rs, token_R), write(logp_Rs, jnp.where(running_R, logp_R, 0.0)),
            n_new_R, ended_R | (running_R & is_last_R))

  start = (
      jnp.int32(0), hidden_RD, slots.new_cache(arch, layout, R, n_steps), jnp.zeros((R, n_steps), jnp.int32),
      jnp.zeros((R, n_steps), jnp.float32), jnp.zeros(R, jnp.int32), jnp.zeros(R, bool))
  _, hidden_RD, newest, token_Rs, logp_Rs, n_new_R, ended_R = jax.lax.while_loop(going, one, start)
  packed = jnp.concatenate([
      token_Rs, jax.lax.bitcast_convert_type(logp_Rs, jnp.int32), n_new_R[:, None], ended_R[:, None].astype(jnp.int32),
  ], axis=1)
  return Live(slots.merge(cache, newest, seen, layout), hidden_RD), packed


def compact(live: Live, local_SR: jax.Array) -> Live:
  """Keeps the rows `local_SR` (int32 [shards, rows that stay per shard], indices within the shard) of each shard."""
  n_shards, n_kept = local_SR.shape

  def one(a, axes):
    axis = axes.index("batch")
    split = a.reshape(*a.shape[:axis], n_shards, -1, *a.shape[axis + 1:])
    kept = jax.vmap(lambda x, i: jnp.take(x, i, axis=axis), (axis, 0), axis)(split, local_SR)
    return constrain(kept.reshape(*a.shape[:axis], n_shards * n_kept, *a.shape[axis + 1:]), *axes)

  return Live(
      jax.tree.map(lambda a: one(a, slots.cache_axes(a.ndim)), live.cache), one(live.hidden_RD, ("batch", "none")))
