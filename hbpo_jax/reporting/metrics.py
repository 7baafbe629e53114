"""What one training step shows: numbers by tag, over all responses and per budget. NumPy on the host, no JAX calls."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from hbpo_jax.structs import Rollouts

REASONS = ("unfinished", "no_answer", "timeout")  # Verdict reasons whose share is shown; correct and wrong follow.


class AdvantageArrays(Protocol):
  """What `hbpo_jax.objective.advantage.compute` returns. intra_BG: [B, G]; inter_BGJ, total_BGJ: [B, G, J]."""
  intra_BG: Any
  inter_BGJ: Any
  total_BGJ: Any


def step_metrics(
    rollouts: Rollouts, *, budgets: Sequence[int], n_prefix_G: Any, reward_BGJ: Any, score_BGJ: Any,
    advantage: AdvantageArrays, reasons: Any = None) -> dict[str, float]:
  """The metrics of one step by tag.

  Over all responses: `reward`, `accuracy` (mean score), `mean_tokens` and `tokens_std` (of n_gen; divisor n),
  `truncated` (share stopped by the cap), `unfinished`, `no_answer`, `timeout` (shares by verdict; only with
  `reasons`), `negative_advantage` (share with total advantage below 0), `zero_variance` (share of queries whose
  responses all earn the same reward, so that A_inter is 0), `length_spread` (standard deviation of n_gen over the N
  responses of a query, divisor N, averaged over queries: how many lengths are still being explored), `entropy` (nats
  per token: minus the mean log-probability, under the distribution drawn from, of all tokens that were sampled; forced
  tokens are left out).

  Per budget b, under `budget_{b}/`: `reward`, `accuracy`, `tokens_mean`, `tokens_std`, `overrun` (share with
  n_gen > b), `overrun_tokens` (mean of max(n_gen - b, 0) over all responses of the panel), `truncated`, `intra`
  (mean A_intra), `inter` (mean A_inter), `inter_abs` (mean |A_inter|), `negative_advantage`, `sentence_probability`
  (exp of the summed log-probability of the forced budget sentence, averaged over responses) and `sentence_logp` (mean
  of that sum, nats; readable where the probability is nearly 0). The last two are absent for a budget without a
  sentence.

  Args:
    rollouts: host copy (NumPy leaves) of the step's rollouts.
    budgets: G token budgets.
    n_prefix_G: int [G], forced tokens at the start of each subgroup's responses.
    reward_BGJ: float [B, G, J].
    score_BGJ: bool or float [B, G, J] in [0, 1], verdict or user's score.
    advantage: its arrays, on host or device.
    reasons: str [B, G, J], or B * G * J of them in (query, budget, rollout) order; None with a user's grader.
  Returns:
    Finite floats unless an input is not finite; every tag in every call with the same budgets and prefixes.
  Raises:
    ValueError: when an array does not have the shape that rollouts and budgets ask for.
  """
  n_gen_BGJ = np.asarray(rollouts.n_gen_BGJ, np.float64)
  shape = n_gen_BGJ.shape
  if len(shape) != 3 or shape[1] != len(budgets) or 0 in shape:
    raise ValueError(f"n_gen_BGJ has shape {shape}, budgets={tuple(budgets)}; give [B, G, J] with a G per budget.")
  reward_BGJ = _shaped("reward_BGJ", reward_BGJ, shape)
  score_BGJ = _shaped("score_BGJ", score_BGJ, shape)
  total_BGJ = _shaped("advantage.total_BGJ", advantage.total_BGJ, shape)
  intra_BG = _shaped("advantage.intra_BG", advantage.intra_BG, shape[:2])
  inter_BGJ = _shaped("advantage.inter_BGJ", advantage.inter_BGJ, shape)
  truncated_BGJ = _shaped("truncated_BGJ", rollouts.truncated_BGJ, shape)
  n_prefix_G = _shaped("n_prefix_G", n_prefix_G, shape[1:2]).astype(int)

  metrics = {
      "reward": reward_BGJ.mean(),
      "accuracy": score_BGJ.mean(),
      "mean_tokens": n_gen_BGJ.mean(),
      "tokens_std": n_gen_BGJ.std(),
      "truncated": truncated_BGJ.mean(),
      "negative_advantage": (total_BGJ < 0).mean(),
      "zero_variance": (reward_BGJ == reward_BGJ[:, :1, :1]).all(axis=(1, 2)).mean(),
      "length_spread": n_gen_BGJ.std(axis=(1, 2)).mean(),
      "entropy": _entropy(rollouts, n_prefix_G),
  }
  if reasons is not None:
    reason_R = np.asarray(reasons, dtype=str).reshape(-1)
    if reason_R.size != n_gen_BGJ.size:
      raise ValueError(f"reasons has {reason_R.size} entries, rollouts have {n_gen_BGJ.size}; give one per response.")
    metrics |= {reason: (reason_R == reason).mean() for reason in REASONS}

  for g, budget in enumerate(budgets):
    n_gen_BJ = n_gen_BGJ[:, g]
    panel = {
        "reward": reward_BGJ[:, g].mean(),
        "accuracy": score_BGJ[:, g].mean(),
        "tokens_mean": n_gen_BJ.mean(),
        "tokens_std": n_gen_BJ.std(),
        "overrun": (n_gen_BJ > budget).mean(),
        "overrun_tokens": np.maximum(n_gen_BJ - budget, 0).mean(),
        "truncated": truncated_BGJ[:, g].mean(),
        "intra": intra_BG[:, g].mean(),
        "inter": inter_BGJ[:, g].mean(),
        "inter_abs": np.abs(inter_BGJ[:, g]).mean(),
        "negative_advantage": (total_BGJ[:, g] < 0).mean(),
    } | _sentence(rollouts.logp_sampler[g], n_prefix_G[g])
    metrics |= {f"budget_{budget}/{name}": value for name, value in panel.items()}
  return {tag: float(value) for tag, value in metrics.items()}


def _entropy(rollouts: Rollouts, n_prefix_G: np.ndarray) -> float:
  """Minus the mean log-probability of the sampled tokens, nats; 0 where none was sampled."""
  total, count = 0.0, 0
  for g, logp_BJC in enumerate(rollouts.logp_sampler):
    slot_C = np.arange(logp_BJC.shape[-1])
    # From what the sampler counted: a completion mask leaves forced tokens in where they carry loss.
    sampled_BJC = (slot_C >= n_prefix_G[g]) & (slot_C < np.asarray(rollouts.n_tokens_BGJ)[:, g, :, None])
    total += np.where(sampled_BJC, np.asarray(logp_BJC, np.float64), 0.0).sum()
    count += int(sampled_BJC.sum())
  return -total / count if count else 0.0


def _sentence(logp_BJC: Any, n_prefix: int) -> dict[str, Any]:
  """How likely the forced sentence was, over a subgroup's responses; nothing where there is none."""
  if not n_prefix:
    return {}
  sentence_logp_BJ = np.asarray(logp_BJC, np.float64)[..., :n_prefix].sum(axis=-1)
  return {"sentence_probability": np.exp(sentence_logp_BJ).mean(), "sentence_logp": sentence_logp_BJ.mean()}


def _shaped(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
  array = np.asarray(value, np.float64)
  if array.shape != shape:
    raise ValueError(f"{name} has shape {array.shape}; rollouts and budgets ask for {shape}.")
  return array
