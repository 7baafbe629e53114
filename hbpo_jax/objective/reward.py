"""Rewards of responses under token budgets, and the baseline that A_intra subtracts.

    f1(n, b) = beta * g(n) - w * alpha * L_max * |u(n) - u(b)|        w = cfg.distance_weight
    f2(b)    = beta * g(b)

    curve    cosine                  log
    u(n)     n / L_max               log(1 + n) / log(1 + L_max)
    g(n)     cos(pi * u(n) / 2)      1 - u(n)
"""

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from hbpo_jax.config import RewardConfig
from hbpo_jax.objective import forms, rivals

FORMS = forms.OWN
FORMS_WITH_BASELINE = forms.WITH_BASELINE


def compute(
    n_gen_BGJ: Any,
    correct_BGJ: Any,
    budget_tokens_G: Any,
    *,
    cfg: RewardConfig,
    finished_BGJ: Any = None,
    thinks_BGJ: Any = None,
    step: Any = None,
    memory: Any = None,
) -> jax.Array:
  """Reward of every response.

  For a response with n <= L_max, times its correctness (0 or 1, or a grader's number between); else 0:

      piecewise  f2(b) if n <= b, f1(n, b) if n > b
      min        min(f1(n, b), f2(b))
      length     f1(n, b)
      classic    1
      cosine     beta * g(n)

  plus cfg.bonus, but at least cfg.floor (both times its correctness), if that is set. A response that is unfinished
  and not correct gets cfg.unfinished_reward, whatever its length. The other forms are those of `rivals`; to them a
  response beyond L_max is wrong, and an unfinished one no more than that.

  Args:
    n_gen_BGJ: int [B, G, J], counted tokens of each response.
    correct_BGJ: bool or float [B, G, J], in [0, 1].
    budget_tokens_G: int [G], budget of each subgroup.
    cfg: the reward's settings; alpha None means 1 / L_max.
    finished_BGJ: bool [B, G, J], True = the response reached its answer; None means all did.
    thinks_BGJ, step, memory: for the forms of `rivals` that read them, as in `rivals.Responses`.
  Returns:
    float [B, G, J] in JAX's default float dtype; negative far above the budget.
  Raises:
    ValueError: when cfg.form does not exist, or what it reads is missing.
  Source: Section 3.2, Eqs. 1-3; differs from the release: it uses `min` and unfinished_reward -1. `length`, curve=log,
    distance_weight, bonus and floor are ours.
  """
  _check_form(cfg)
  dtype = jnp.result_type(float)
  n_gen_BGJ = jnp.asarray(n_gen_BGJ)
  correct_BGJ = jnp.asarray(correct_BGJ).astype(dtype)
  chex.assert_rank(n_gen_BGJ, 3)
  chex.assert_equal_shape([n_gen_BGJ, correct_BGJ])
  n = n_gen_BGJ.astype(dtype)
  b = jnp.asarray(budget_tokens_G).astype(dtype)[None, :, None]
  chex.assert_axis_dimension(n, 1, b.shape[1])

  if cfg.form in rivals.REWARDS:
    given = responses(n_gen_BGJ, correct_BGJ, budget_tokens_G, thinks_BGJ, step, memory, cfg=cfg)
    return _floored(rivals.REWARDS[cfg.form](given, cfg), given.score_BGJ, cfg).astype(dtype)
  if cfg.form == "classic":
    earned = jnp.ones_like(n)
  elif cfg.form == "cosine":
    earned = _curve(n, cfg)
  else:
    f1 = _curve(n, cfg) - _alpha(cfg) * cfg.max_response_tokens * jnp.abs(_share(n, cfg) - _share(b, cfg))
    f2 = _curve(b, cfg)
    earned = {"piecewise": jnp.where(n > b, f1, f2), "min": jnp.minimum(f1, f2), "length": f1}[cfg.form]
  # where, not a product: a wrong answer is +0.0 however the earned reward is signed.
  counts = (correct_BGJ > 0) & (n <= cfg.max_response_tokens)
  score = jnp.where(counts, correct_BGJ, 0.0)
  reward = _floored(jnp.where(counts, correct_BGJ * (earned + cfg.bonus), 0.0), score, cfg)
  if finished_BGJ is not None:
    finished_BGJ = jnp.asarray(finished_BGJ)
    chex.assert_equal_shape([n_gen_BGJ, finished_BGJ])
    reward = jnp.where(~finished_BGJ.astype(bool) & (correct_BGJ == 0), cfg.unfinished_reward, reward)
  return reward.astype(dtype)


def baseline(budget_tokens_G: Any, *, cfg: RewardConfig) -> jax.Array:
  """The reward f2(b), cfg.bonus included, that a correct response within its budget earns.

  Args:
    budget_tokens_G: int [G], budget of each subgroup.
    cfg: the reward's settings.
  Returns:
    float [G] in JAX's default float dtype.
  Raises:
    ValueError: when cfg.form has no baseline (classic, cosine) or does not exist.
  Source: Eq. 3.
  """
  _check_form(cfg)
  if cfg.form not in FORMS_WITH_BASELINE:
    raise ValueError(
        f"reward.form={cfg.form!r} has no budget baseline; set advantage.intra_coef=0 and pass no baseline, "
        f"or choose a form of {FORMS_WITH_BASELINE}.")
  budget_G = jnp.asarray(budget_tokens_G).astype(jnp.result_type(float))
  chex.assert_rank(budget_G, 1)
  return _curve(budget_G, cfg) + cfg.bonus


def responses(
    n_gen_BGJ: Any, correct_BGJ: Any, budget_tokens_G: Any, thinks_BGJ: Any, step: Any, memory: Any, *,
    cfg: RewardConfig) -> rivals.Responses:
  """What the forms of `rivals` read, from the arguments of `compute`."""
  dtype = jnp.result_type(float)
  n = jnp.asarray(n_gen_BGJ).astype(dtype)
  score_BGJ = jnp.where(n <= cfg.max_response_tokens, jnp.asarray(correct_BGJ).astype(dtype), 0.0)
  return rivals.Responses(n, score_BGJ, jnp.asarray(budget_tokens_G).astype(dtype), thinks_BGJ, step, memory)


def expected(n_gen_BGJ: Any, correct_BGJ: Any, *, cfg: RewardConfig) -> jax.Array:
  """The reward f2(m) at the mean length m of a query's correct responses, float [B, 1]; 0 where it has none.

  A baseline that follows the query's difficulty, in place of f2(b): of a query that no response solves, nothing is
  expected.

  Args:
    n_gen_BGJ, correct_BGJ, cfg: as in `compute`; cfg.form has a baseline.
  Raises:
    ValueError: when cfg.form has none.
  """
  given = responses(n_gen_BGJ, correct_BGJ, (), None, None, None, cfg=cfg)
  mean_B11, solved_B11 = rivals.mean_correct_length(given.n_BGJ, given.score_BGJ)
  return jnp.where(solved_B11, baseline(mean_B11.reshape(-1), cfg=cfg)[:, None, None], 0.0)[:, :, 0]


def _floored(reward: jax.Array, score: jax.Array, cfg: RewardConfig) -> jax.Array:
  return reward if cfg.floor is None else jnp.where(score > 0, jnp.maximum(reward, score * cfg.floor), reward)


def _curve(n: jax.Array, cfg: RewardConfig) -> jax.Array:
  share = _share(n, cfg)
  return cfg.beta * (1.0 - share if cfg.curve == "log" else jnp.cos(math.pi / 2 * share))


def _share(n: jax.Array, cfg: RewardConfig) -> jax.Array:
  """u(n), the place of a length between 0 and L_max: 0 to 1."""
  if cfg.curve == "log":
    return jnp.log1p(n) / math.log1p(cfg.max_response_tokens)
  return n / cfg.max_response_tokens


def _alpha(cfg: RewardConfig) -> float:
  """w * alpha."""
  return cfg.distance_weight * (1.0 / cfg.max_response_tokens if cfg.alpha is None else cfg.alpha)


def _check_form(cfg: RewardConfig) -> None:
  if cfg.form not in forms.FORMS:
    raise ValueError(f"reward.form={cfg.form!r} does not exist; choose one of {', '.join(forms.FORMS)}.")
