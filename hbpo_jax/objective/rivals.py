"""Rewards of other published ways to shorten reasoning, so that one trainer compares them with HBPO.

Each function returns the reward [B, G, J] of one step's responses as its paper gives it; `forms.FORMS` says what each
reads. A group is a query's N = G * J responses: papers without budgets have G = 1 (`prompt.budget_sentence=''`).
"Correct" is a score above 0; a grader's score between 0 and 1 stands where a paper has the indicator 1(correct).

Of the papers, only openings and some of their authors' code could be read when this was written: compare an equation,
its number and a default with the paper before a result is published under its name.
"""

from collections.abc import Callable
import math

import chex
from flax import struct
import jax
import jax.numpy as jnp

from hbpo_jax.config import RewardConfig
from hbpo_jax.objective.forms import FORMS

_GROUP = (1, 2)  # Axes of a query's responses.


@struct.dataclass
class Responses:
  """What rewards are made of.

  n_BGJ: float [B, G, J], counted tokens.
  score_BGJ: float [B, G, J] in [0, 1]; 0 beyond L_max.
  budget_G: float [G].
  thinks_BGJ: bool [B, G, J], False = the thought was closed before it began; None where no form asks.
  step: int [], rollout batches done before this one; None where no form asks.
  memory: of `memory.init`; None where no form asks.
  """
  n_BGJ: jax.Array
  score_BGJ: jax.Array
  budget_G: jax.Array
  thinks_BGJ: jax.Array | None = None
  step: jax.Array | None = None
  memory: dict[str, jax.Array] | None = None


def l1_exact(r: Responses, cfg: RewardConfig) -> jax.Array:
  """R = 1(correct) - alpha * |n - b|: as many tokens as the prompt asks for. Wrong answers, too, pay for their length.

  Source: arXiv 2503.04697, Eq. 1; alpha 0.0003.
  """
  return r.score_BGJ - _alpha(cfg) * jnp.abs(r.n_BGJ - r.budget_G[:, None])


def l1_max(r: Responses, cfg: RewardConfig) -> jax.Array:
  """R = 1(correct) * clip(alpha * (b - n) + delta, 0, 1): at most as many tokens as the prompt asks for.

  Source: arXiv 2503.04697, Eq. 2; alpha 0.0003, delta 0.5. The paper starts from an L1-Exact model; here any.
  """
  return r.score_BGJ * jnp.clip(_alpha(cfg) * (r.budget_G[:, None] - r.n_BGJ) + _delta(cfg), 0.0, 1.0)


def efficient(r: Responses, cfg: RewardConfig) -> jax.Array:
  """R = 1(correct) * (1 - alpha * sigmoid((n - mean n) / std n)), mean and std over the query's correct responses.

  The std has divisor n; where it is 0 (one correct response, or equal lengths) the sigmoid is 1/2.

  Source: arXiv 2502.04463, Eqs. 2-4; alpha 0.2 of its 0.05 to 0.4. The paper's leave-one-out advantage is
  `advantage.form=leave_one_out`; mean and std include the response itself.
  """
  return r.score_BGJ * (1.0 - _alpha(cfg) * jax.nn.sigmoid(_relative_length(r)))


def alp(r: Responses, cfg: RewardConfig) -> jax.Array:
  """R = 1(correct) - alpha * n * max(p, 1 / N), p the query's share of correct responses in this step.

  This is the solve-rate-scaled length penalty. Wrong answers pay as well, at the least rate where all are wrong.

  Source: arXiv 2506.05256. Its length term is written as a normalised length times beta; which constant it divides by
  could not be told, so alpha is per token: beta over that constant. 1e-7 is its beta.
  """
  N = r.n_BGJ.shape[1] * r.n_BGJ.shape[2]
  return r.score_BGJ - _alpha(cfg) * r.n_BGJ * jnp.maximum(_solve_rate(r), 1.0 / N)


def grpo_lambda(r: Responses, cfg: RewardConfig) -> jax.Array:
  """`efficient` for the queries that are mostly solved, 1(correct) for the others.

  Gated are the gate_share * B queries of the step with the highest accuracy (rounded up; ties all together), of these
  the ones with accuracy of at least gate_accuracy and above 0.

  Source: arXiv 2505.18086. The text says that the top share of a batch's groups keeps the length penalty; its default
  (0.2) and the weight of the penalty (0.2) could not be checked, gate_accuracy is ours.
  """
  return jnp.where(gate(r, cfg)[:, None, None], efficient(r, cfg), r.score_BGJ)


def gate(r: Responses, cfg: RewardConfig) -> jax.Array:
  """Which queries have length pressure in `grpo_lambda`, bool [B]."""
  accuracy_B = jnp.mean(r.score_BGJ, axis=_GROUP)
  n_gated = math.ceil(cfg.gate_share * accuracy_B.shape[0])
  if n_gated == 0:
    return jnp.zeros_like(accuracy_B, bool)
  least = jnp.sort(accuracy_B)[-n_gated]
  return (accuracy_B >= jnp.maximum(least, cfg.gate_accuracy)) & (accuracy_B > 0)


def adlp(r: Responses, cfg: RewardConfig) -> jax.Array:
  """R = 1(correct) - lambda_t * n, right or wrong; `memory.update` moves lambda after every step.

  Source: arXiv 2505.18298.
  """
  if r.memory is None:
    raise ValueError("reward.form='adlp' needs its memory; start from objective.memory.init.")
  return r.score_BGJ - r.memory["penalty"] * r.n_BGJ


def hmpo(r: Responses, cfg: RewardConfig) -> jax.Array:
  """R = 1(correct) * (1 if n <= b, else (1 + cos(pi * (n - b) / (L_max - b))) / 2), b the query's median length.

  The median is that of the query's correct responses, the mean of the middle two where their number is even.

  Source: arXiv 2606.01934 (Hybrid Median-length Policy Optimization): budget from the median length of the correct
  responses, cosine decay, product with correctness. The decay's exact form could not be read; taken is half a cosine
  from 1 at the budget to 0 at L_max.
  """
  budget_B11 = _median_correct(r)
  room_B11 = jnp.maximum(cfg.max_response_tokens - budget_B11, 1.0)
  beyond_BGJ = jnp.clip((r.n_BGJ - budget_B11) / room_B11, 0.0, 1.0)
  return r.score_BGJ * 0.5 * (1.0 + jnp.cos(math.pi * beyond_BGJ))


def thinkprune(r: Responses, cfg: RewardConfig) -> jax.Array:
  """R = 1(correct) where n <= limit, else 0; the limit shrinks in stages.

  limits[i] holds from step limit_steps[i - 1] on, limits[0] before. Responses still decode up to rollout.caps, where
  the paper stops them at the limit: an answer beyond it earns nothing in both.

  Source: arXiv 2504.01296, which trains 4000, 3000, 2000 one after the other.
  """
  return jnp.where(r.n_BGJ <= limit(r, cfg), r.score_BGJ, 0.0)


def limit(r: Responses, cfg: RewardConfig) -> jax.Array:
  """The length limit of `thinkprune` at this step, float []."""
  if r.step is None:
    raise ValueError("reward.form='thinkprune' needs the step; pass it to reward.compute.")
  stage = jnp.sum(jnp.asarray(r.step) >= jnp.asarray(cfg.limit_steps, jnp.int32))
  return jnp.asarray(cfg.limits, r.n_BGJ.dtype)[stage]


def adaptthink(r: Responses, cfg: RewardConfig) -> jax.Array:
  """R = 1(correct) + delta * 1(no thinking); with `advantage.form=reference`, A = R - R_ref(x).

  Source: arXiv 2505.13417, Eqs. 5-6; delta 0.05. Half of a query's responses open with `</think>` there: here a
  subgroup whose prompt.openings closes the thought. What one run does otherwise: R_ref is the accuracy of this step's
  thinking responses to the query, where the paper has stored that of the first model; the other half is not forced to
  think; and the forced token's old probability is the trainer's own, not 1/2.
  """
  return r.score_BGJ + _delta(cfg) * ~_thinks(r)


def autothink(r: Responses, cfg: RewardConfig) -> jax.Array:
  """The reward of thinking or not, correct or not, kept in balance by the step's share z of responses that think.

                        d = 0    d = 1
      thinks   correct     1        0
               wrong       0       -1
      does not correct     2        0
               wrong      -1       -2

      d = clip((z - balance) * balance_slope, 0, 1)      of responses that think
      d = clip((1 - z - balance) * balance_slope, 0, 1)  of those that do not

  Between the columns the reward is linear in d, and in a score between 0 and 1.

  Source: arXiv 2505.10832, stage 1; balance_slope 0 is stage 2. Stage 3, which prunes lengths after that, is a run of
  its own with another form. The defaults (0.5 and 2) could not be checked.
  """
  thinks_BGJ = _thinks(r)
  share = jnp.mean(thinks_BGJ.astype(r.n_BGJ.dtype))
  d_think, d_not = (
      jnp.clip((z - cfg.balance) * cfg.balance_slope, 0.0, 1.0) for z in (share, 1.0 - share))
  right_BGJ = jnp.where(thinks_BGJ, 1.0 - d_think, 2.0 - 2.0 * d_not)
  wrong_BGJ = jnp.where(thinks_BGJ, -d_think, -1.0 - d_not)
  return wrong_BGJ + r.score_BGJ * (right_BGJ - wrong_BGJ)


REWARDS: dict[str, Callable[[Responses, RewardConfig], jax.Array]] = {
    f.__name__: f for f in (
        l1_exact, l1_max, efficient, alp, grpo_lambda, adlp, hmpo, thinkprune, adaptthink, autothink)}


def metrics(r: Responses, cfg: RewardConfig) -> dict[str, jax.Array]:
  """Numbers for the log by name, float [] each: what moved a form's reward in this step."""
  found: dict[str, jax.Array] = {}
  if cfg.form == "adlp" and r.memory is not None:
    found["penalty"] = r.memory["penalty"]
  if cfg.form == "grpo_lambda":
    found["gate_share"] = jnp.mean(gate(r, cfg).astype(jnp.float32))
  if cfg.form == "thinkprune":
    found["limit"] = limit(r, cfg)
  if FORMS[cfg.form].reads_mode:
    found["think_share"] = jnp.mean(_thinks(r).astype(jnp.float32))
  return found


def _alpha(cfg: RewardConfig) -> float:
  default = FORMS[cfg.form].alpha
  if cfg.alpha is not None:
    return cfg.alpha
  return 1.0 / cfg.max_response_tokens if default is None else default


def _delta(cfg: RewardConfig) -> float:
  return FORMS[cfg.form].delta if cfg.delta is None else cfg.delta


def _thinks(r: Responses) -> jax.Array:
  if r.thinks_BGJ is None:
    raise ValueError("this reward.form needs to know which responses think; pass thinks_BGJ to reward.compute.")
  chex.assert_equal_shape([r.n_BGJ, r.thinks_BGJ])
  return jnp.asarray(r.thinks_BGJ, bool)


def _solve_rate(r: Responses) -> jax.Array:
  """[B, 1, 1], the share of a query's responses that are correct (the mean of a grader's scores)."""
  return jnp.mean(r.score_BGJ, axis=_GROUP, keepdims=True)


def mean_correct_length(n_BGJ: jax.Array, score_BGJ: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(mean length of a query's correct responses, whether it has any), [B, 1, 1] both; 0 where it has none."""
  correct_BGJ = score_BGJ > 0
  n_correct_B11 = jnp.sum(correct_BGJ, axis=_GROUP, keepdims=True)
  total_B11 = jnp.sum(jnp.where(correct_BGJ, n_BGJ, 0.0), axis=_GROUP, keepdims=True)
  return total_B11 / jnp.maximum(n_correct_B11, 1), n_correct_B11 > 0


def _relative_length(r: Responses) -> jax.Array:
  """(n - mean) / std over a query's correct responses, [B, G, J]; 0 where their lengths are all equal."""
  correct_BGJ = r.score_BGJ > 0
  mean_B11, _ = mean_correct_length(r.n_BGJ, r.score_BGJ)
  distance_BGJ = r.n_BGJ - mean_B11
  n_correct_B11 = jnp.maximum(jnp.sum(correct_BGJ, axis=_GROUP, keepdims=True), 1)
  squares_B11 = jnp.sum(jnp.where(correct_BGJ, jnp.square(distance_BGJ), 0.0), axis=_GROUP, keepdims=True)
  # From the extremes, not from the squares: a rounded mean of equal lengths need not be their length.
  shortest_B11 = jnp.min(jnp.where(correct_BGJ, r.n_BGJ, jnp.inf), axis=_GROUP, keepdims=True)
  longest_B11 = jnp.max(jnp.where(correct_BGJ, r.n_BGJ, -jnp.inf), axis=_GROUP, keepdims=True)
  varies_B11 = longest_B11 > shortest_B11
  std_B11 = jnp.sqrt(jnp.where(varies_B11, squares_B11, 1.0) / n_correct_B11)
  return jnp.where(varies_B11, distance_BGJ / std_B11, 0.0)


def _median_correct(r: Responses) -> jax.Array:
  """[B, 1, 1], the median length of a query's correct responses; 0 where there is none."""
  B = r.n_BGJ.shape[0]
  n_BN, correct_BN = r.n_BGJ.reshape(B, -1), r.score_BGJ.reshape(B, -1) > 0
  sorted_BN = jnp.sort(jnp.where(correct_BN, n_BN, jnp.inf), axis=1)
  n_correct_B1 = jnp.sum(correct_BN, axis=1, keepdims=True)
  low_B1, high_B1 = (jnp.maximum(n_correct_B1 - 1, 0) // 2, jnp.minimum(n_correct_B1 // 2, n_BN.shape[1] - 1))
  middle_B1 = 0.5 * (
      jnp.take_along_axis(sorted_BN, low_B1, axis=1) + jnp.take_along_axis(sorted_BN, high_B1, axis=1))
  return jnp.where(n_correct_B1 > 0, middle_B1, 0.0)[:, :, None]
