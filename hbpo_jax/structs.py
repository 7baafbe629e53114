"""The pytrees that pass between rooms, and the one reshape pair between groups and rows.

Dimension letters: B queries, G budgets, J rollouts per budget, N = G * J,
R = B * N rows, P prompt slots, F prefix slots, C_g completion slots of subgroup g, C = max C_g.
"""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

# jax.Array on the devices, np.ndarray on the host, or what stands for one in a tree of shapes or shardings.
Array = Any


@struct.dataclass
class Prompts:
  """Prompts of one step, ready for the sampler.

  tokens_BP: int32 [B, P], left-padded: the real tokens are the last n_prompt_B. The pad id is arbitrary;
    only n_prompt_B says what is padding.
  n_prompt_B: int32 [B], real tokens of each prompt, 1..P.
  prefix_GF: int32 [G, F], forced opening of each subgroup (budget sentence), right-padded.
  n_prefix_G: int32 [G], real tokens of each prefix, 0..F.
  query_B: int32 [B], identity of the query within the step, for random keys (its position in the global batch).
  """
  tokens_BP: Array
  n_prompt_B: Array
  prefix_GF: Array
  n_prefix_G: Array
  query_B: Array


@struct.dataclass
class Rollouts:
  """Responses of one step. Completion slot 0 follows the last prompt token.

  tokens: G arrays int32 [B, J, C_g]: prefix, sampled tokens, EOS if finished; then padding of arbitrary id.
  completion_mask: G arrays bool [B, J, C_g], True = token of the response that carries loss (sampled tokens and
    EOS; prefix tokens only when prompt.prefix_role is 'action'). From the sampler's done flags, never from ids.
  logp_sampler: G arrays float32 [B, J, C_g], log-probability of each real token (forced ones too) under the
    distribution it was drawn from (temperature, top-p, top-k applied; forced tokens: temperature only); 0 at padding.
  n_tokens_BGJ: int32 [B, G, J], real tokens in the array: prefix, sampled, EOS.
  n_gen_BGJ: int32 [B, G, J], counted tokens: sampled and EOS, plus the prefix if rollout.count_prefix_tokens.
  truncated_BGJ: bool [B, G, J], True = stopped by the cap, no EOS.
  """
  tokens: tuple[Array, ...]
  completion_mask: tuple[Array, ...]
  logp_sampler: tuple[Array, ...]
  n_tokens_BGJ: Array
  n_gen_BGJ: Array
  truncated_BGJ: Array

  def response(self, b: int, g: int, j: int) -> Array:
    """int32 [n], the real tokens of one response; of rollouts on the host."""
    return self.tokens[g][b, j, :self.n_tokens_BGJ[b, g, j]]


@struct.dataclass
class Batch:
  """Rows for scoring and updating, T = P + C; completion slot c is token column P + c.

  A row is one response: prompt (left-padded), then completion (right-padded). Or it is packed (`learning.packing`):
  whole responses with their prompts one after the other, P = 1; or prompts, each followed by several responses.

  tokens_RT: int32 [R, T].
  segment_RT: int32 [R, T], 0 = padding; tokens of one response share a number from 1 on. Attention stays within a
    segment.
  position_RT: int32 [R, T], rotary position: 0 at the first token of each response's prompt.
  context_RT: int32 [R, T], a second segment that a token attends to: its prompt's, where that is shared; or None, where
    every response has its prompt in its own segment.
  completion_mask_RC: bool [R, C], True = carries loss.
  advantage_RC: float32 [R, C], or [R, 1] where a row is one response.
  logp_old_RC: float32 [R, C], trainer's own log-probabilities before the step's updates.
  logp_ref_RC: float32 [R, C] reference model's, or None when loss.kl_coef is 0.
  logp_sampler_RC: float32 [R, C], the sampler's, or None when loss.importance_cap is None.
  forced_RC: bool [R, C], True = a token of the budget sentence, which nobody drew; None = there are none.
  """
  tokens_RT: Array
  segment_RT: Array
  position_RT: Array
  completion_mask_RC: Array
  context_RT: Array | None = None
  advantage_RC: Array | None = None
  logp_old_RC: Array | None = None
  logp_ref_RC: Array | None = None
  logp_sampler_RC: Array | None = None
  forced_RC: Array | None = None


@struct.dataclass
class TrainState:
  """What training changes.

  step: int32 [], rollout batches done.  update: int32 [], optimizer updates done.
  memory: float32 [] by name, what the reward remembers (`objective.memory`); empty for most.
  """
  step: Array
  update: Array
  params: Any
  opt_state: Any
  memory: Any = struct.field(default_factory=dict)


def groups_to_rows(groups: tuple, width: int, fill: Any = 0) -> jax.Array:
  """One [R, width] array from G arrays [B, J, C_g], R = B * G * J in (query, budget, rollout) order.

  Args:
    groups: G arrays [B, J, C_g].
    width: slots of a row, at least every C_g; shorter subgroups are padded with `fill` on the right.
    fill: value of the padding.
  Returns:
    [B * G * J, width], dtype of the groups.
  """
  padded = [jnp.pad(g, ((0, 0), (0, 0), (0, width - g.shape[-1])), constant_values=fill) for g in groups]
  stacked = jnp.stack(padded, axis=1)  # [B, G, J, width]
  return stacked.reshape(-1, width)


def rows_to_groups(rows: jax.Array, n_subgroups: int, n_rollouts: int, widths: tuple[int, ...]) -> tuple:
  """The inverse of `groups_to_rows`: G arrays [B, J, widths[g]] from [B * G * J, width]."""
  grouped = rows.reshape(-1, n_subgroups, n_rollouts, rows.shape[-1])
  return tuple(grouped[:, g, :, :w] for g, w in enumerate(widths))


def forced_advantage(advantage_BGJ: Any, weights: tuple[float, float]) -> Any:
  """Advantage of the forced tokens: the mean over the subgroup, whose responses all open alike, times a weight.

  Args:
    advantage_BGJ: float [B, G, J], of NumPy or JAX.
    weights: factors where the mean is positive, and where it is negative.
  Returns:
    float [B, G].
  """
  mean_BG = advantage_BGJ.mean(axis=2)
  positive, negative = weights
  return mean_BG * (negative + (positive - negative) * (mean_BG > 0))


def make_batch(
    prompts: Prompts, rollouts: Rollouts, advantage_BGJ: jax.Array | None = None,
    prefix_weights: tuple[float, float] = (1.0, 1.0)) -> Batch:
  """Rows of the step, [R, P + C], by concatenation; jit-safe.

  Args:
    prompts, rollouts: of the step.
    advantage_BGJ: float [B, G, J], or None.
    prefix_weights: of `forced_advantage`; with 1 and 1, forced tokens have their response's advantage.
  Returns:
    A Batch without logp_old_RC and logp_ref_RC; logp_sampler_RC and forced_RC are set.
  """
  n_rollouts = rollouts.n_tokens_BGJ.shape[1] * rollouts.n_tokens_BGJ.shape[2]
  C = max(g.shape[-1] for g in rollouts.tokens)
  P = prompts.tokens_BP.shape[1]
  prompt_RP = jnp.repeat(jnp.asarray(prompts.tokens_BP), n_rollouts, axis=0)
  n_prompt_R = jnp.repeat(jnp.asarray(prompts.n_prompt_B), n_rollouts, axis=0)
  n_tokens_R = rollouts.n_tokens_BGJ.reshape(-1)
  column_T = jnp.arange(P + C)
  first_R = P - n_prompt_R
  real_RT = (column_T >= first_R[:, None]) & (column_T < P + n_tokens_R[:, None])
  advantage_RC = None if advantage_BGJ is None else advantage_BGJ.reshape(-1, 1)
  shape = rollouts.n_tokens_BGJ.shape
  to_rows = lambda x: jnp.broadcast_to(jnp.asarray(x), shape).reshape(-1, 1)
  forced_RC = jnp.arange(C) < to_rows(prompts.n_prefix_G[None, :, None])
  if advantage_RC is not None and prefix_weights != (1, 1):
    forced_R1 = to_rows(forced_advantage(advantage_BGJ, prefix_weights)[:, :, None])
    advantage_RC = jnp.where(forced_RC, forced_R1, advantage_RC)
  return Batch(
      tokens_RT=jnp.where(real_RT, jnp.concatenate([prompt_RP, groups_to_rows(rollouts.tokens, C)], axis=1), 0),
      segment_RT=real_RT.astype(jnp.int32),
      position_RT=jnp.where(real_RT, column_T - first_R[:, None], 0),
      completion_mask_RC=groups_to_rows(rollouts.completion_mask, C, False),
      advantage_RC=advantage_RC,
      logp_sampler_RC=groups_to_rows(rollouts.logp_sampler, C, 0.0),
      forced_RC=forced_RC,
  )
