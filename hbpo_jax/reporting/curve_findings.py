"""Numbers on what a configuration's reward and advantage favour, before anything is trained.

All of them come from calling `objective.reward` and `objective.advantage` with the run's own settings; no formula is
written out again here. `hbpo_jax.reporting.curves` puts them into words.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import statistics
from typing import Any

import jax
import numpy as np

from hbpo_jax.config import Config
from hbpo_jax.objective import advantage as advantage_lib
from hbpo_jax.objective import forms, memory
from hbpo_jax.objective import reward as reward_lib

_CLOSE = 2e-6  # Of the largest reward: what float32 cannot tell apart.
_MOST_GROUPS = 50_000  # Of right and wrong answers that are tried for the largest push.


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Lengths of responses that were measured.

  source: where they come from, in words.
  tokens: float [n] sorted ascending, by budget; the entry None serves budgets without one of their own.
  """
  source: str
  tokens: Mapping[int | None, np.ndarray]

  def share_beyond(self, budget: int, n_gen: int) -> float | None:
    """Share of the responses longer than n_gen tokens; None where nothing was measured for the budget."""
    tokens = self.tokens.get(budget, self.tokens.get(None))
    return None if tokens is None else float(np.mean(tokens > n_gen))


def lengths_of_moments(mean: float, std: float, n: int = 1001) -> np.ndarray:
  """n evenly spaced quantiles of the log-normal distribution with this mean and standard deviation, float [n].

  Lengths are positive and skewed to the right, so it fits them better than a normal distribution.

  Raises:
    ValueError: when the mean is not positive or the deviation is negative.
  """
  if not (mean > 0 and std >= 0):
    raise ValueError(f"mean={mean!r}, std={std!r} are of no length distribution; give mean > 0 and std >= 0.")
  variance = float(np.log1p((std / mean)**2))
  if variance == 0:
    return np.full(n, float(mean))
  normal = statistics.NormalDist(float(np.log(mean)) - variance / 2, variance**0.5)
  return np.exp([normal.inv_cdf((i + 0.5) / n) for i in range(n)])


@dataclasses.dataclass(frozen=True)
class BudgetFindings:
  """What holds under one budget. Lengths are counted tokens (n_gen), from 1 to L_max; ranges include both ends.

  cap: most tokens of a response.
  wrong, unfinished: reward of a finished wrong answer, and of an unfinished one that is not correct.
  highest, lowest: reward of a correct answer, over all lengths up to L_max.
  best_lengths: the lengths from the first that earns `highest` on, over which nothing is gained or lost.
  below_wrong_from: length from which on a correct answer scores below a wrong one; None where none does.
  below_unfinished_from: the same against an unfinished answer.
  beyond_cap: share of the lengths 1..L_max that the cap cuts off; a share of lengths, not of responses.
  forfeits: cut-off lengths at which a correct answer would have scored above an unfinished one; None without.
  forfeited: most reward that a correct answer loses there by being truncated.
  responses_beyond_cap, responses_below_wrong: shares of measured responses longer than the cap, and at least
    `below_wrong_from` long; None where nothing was measured or there is no such length.
  intra_low, intra_high: least and largest A_intra (after centring, before its coefficient).
  push_down, push_up: least and largest total advantage over groups of right answers, as long as their budget, and
    others, each wrong or each unfinished.
  """
  budget: int
  cap: int
  wrong: float
  unfinished: float
  highest: float
  lowest: float
  best_lengths: tuple[int, int]
  below_wrong_from: int | None
  below_unfinished_from: int | None
  beyond_cap: float
  forfeits: tuple[int, int] | None
  forfeited: float
  responses_beyond_cap: float | None
  responses_below_wrong: float | None
  intra_low: float
  intra_high: float
  push_down: float
  push_up: float


@dataclasses.dataclass(frozen=True)
class Switch:
  """n_gen: first length at which `after` is the budget with the best reward, and no longer `before`."""
  n_gen: int
  before: int
  after: int


@dataclasses.dataclass(frozen=True)
class Group:
  """Advantages of one kind of response in one kind of group, by budget; None where the group has no such response.

  intra: A_intra, before its coefficient.  total: intra_coef * A_intra + A_inter.
  """
  name: str
  what: str
  intra: tuple[float | None, ...]
  inter: tuple[float | None, ...]
  total: tuple[float | None, ...]


@dataclasses.dataclass(frozen=True)
class Shape:
  """Findings on rewards and advantages.

  tolerance: differences of rewards up to this are rounding.
  budgets_matter: whether the reward depends on the budget at all.
  switches: where the budget with the best reward changes as a response grows, among those whose cap allows it.
  never_best: budgets whose reward exceeds that of all others at no length.
  groups: `all_wrong`, `all_right`, `half_right` (its right answers), `half_wrong` (its wrong ones).
  """
  tolerance: float
  budgets: tuple[BudgetFindings, ...]
  budgets_matter: bool
  switches: tuple[Switch, ...]
  never_best: tuple[int, ...]
  groups: tuple[Group, ...]


def reward_curves(cfg: Config) -> tuple[np.ndarray, np.ndarray]:
  """(lengths int [N] = 1..L_max, reward of a correct answer of each length under each budget float [G, N])."""
  n_gen_N = np.arange(1, cfg.reward.max_response_tokens + 1)
  return n_gen_N, _reward(cfg, np.broadcast_to(n_gen_N, (cfg.n_subgroups, len(n_gen_N))), 1.0)


def measure(cfg: Config, lengths: Lengths | None = None) -> Shape:
  """The findings on a configuration.

  Args:
    cfg: valid settings (`hbpo_jax.validation`).
    lengths: of responses that were measured, if there are any.
  """
  n_gen_N, reward_GN = reward_curves(cfg)
  tolerance = _CLOSE * max(1.0, float(np.abs(reward_GN).max()))
  budgets = np.array(cfg.rollout.budgets)[:, None]
  wrong_G, unfinished_G = (_reward(cfg, budgets, 0.0, finished)[:, 0] for finished in (True, False))
  right_G = np.array([_reward(cfg, budgets, 1.0)[g, 0] for g in range(len(budgets))])
  push_G2, of_groups_G2 = _push_range(cfg, right_G, [wrong_G, unfinished_G])
  intra_G2 = _intra_range(cfg, reward_GN, wrong_G, unfinished_G) if _is_linear(cfg) else of_groups_G2
  switches, never_best = _best_budgets(cfg, reward_GN, tolerance)
  of_budgets = tuple(
      _of_budget(cfg, g, n_gen_N, reward_GN[g], (float(wrong_G[g]), float(unfinished_G[g])), tolerance, lengths,
                 intra_G2[g], push_G2[g])
      for g in range(cfg.n_subgroups))
  return Shape(
      tolerance=tolerance, budgets=of_budgets, budgets_matter=bool(np.ptp(reward_GN, axis=0).max() > tolerance),
      switches=switches, never_best=never_best, groups=_groups(cfg, right_G, wrong_G))


# Without jit, each of their operations would be compiled alone, for each shape.
_compute_reward = jax.jit(reward_lib.compute, static_argnames="cfg")
_compute_advantage = jax.jit(advantage_lib.compute, static_argnames="cfg")


def _reward(cfg: Config, n_gen_GJ: Any, correct: float, finished: bool = True) -> np.ndarray:
  """Rewards [G, J] of responses that are all correct (1) or not (0), and all finished or not."""
  n_gen_BGJ = np.asarray(n_gen_GJ)[None]
  form, given = forms.FORMS[cfg.reward.form], {}
  if form.reads_mode:
    given["thinks_BGJ"] = np.ones(n_gen_BGJ.shape, bool)
  if form.has_stages:
    given["step"] = np.int32(0)
  if form.has_memory:
    given["memory"] = memory.init(cfg.reward)
  return np.asarray(_compute_reward(
      n_gen_BGJ, np.full(n_gen_BGJ.shape, correct), np.array(cfg.rollout.budgets), cfg=cfg.reward,
      finished_BGJ=np.full(n_gen_BGJ.shape, finished), **given), np.float64)[0]


def _advantage(
    cfg: Config, reward_BGJ: np.ndarray, right_BGJ: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(A_intra [B, G], A_inter [B, G, J], total [B, G, J]) of these rewards.

  Args:
    right_BGJ: which answers are right, each as long as its budget; needed where A_intra is not linear in rewards.
  """
  baseline, solve_rate_B, thinks_BGJ = None, None, None
  if forms.FORMS[cfg.reward.form].has_baseline:
    baseline = reward_lib.baseline(np.array(cfg.rollout.budgets), cfg=cfg.reward)
    if cfg.advantage.intra_baseline == "correct_length" and right_BGJ is not None:
      n_gen_BGJ = np.broadcast_to(np.array(cfg.rollout.budgets)[:, None], right_BGJ.shape)
      baseline = reward_lib.expected(n_gen_BGJ, right_BGJ, cfg=cfg.reward)
  if right_BGJ is not None:
    solve_rate_B = np.mean(right_BGJ, axis=(1, 2), dtype=np.float32)
  if cfg.advantage.form == "reference":
    thinks_BGJ = np.ones(reward_BGJ.shape, bool)
  found = _compute_advantage(
      reward_BGJ.astype(np.float32), baseline, cfg=cfg.advantage, solve_rate_B=solve_rate_B, thinks_BGJ=thinks_BGJ)
  return np.asarray(found.intra_BG), np.asarray(found.inter_BGJ), np.asarray(found.total_BGJ)


def _of_budget(
    cfg: Config, g: int, n_gen_N: np.ndarray, reward_N: np.ndarray, others: tuple[float, float], tolerance: float,
    lengths: Lengths | None, intra: tuple[float, float], push: tuple[float, float]) -> BudgetFindings:
  """Args: others: rewards of a wrong and of an unfinished answer. intra, push: least and largest."""
  budget, cap, longest = cfg.rollout.budgets[g], cfg.caps[g], len(n_gen_N)
  wrong, unfinished = others
  best_N = reward_N >= reward_N.max() - tolerance
  first = int(np.argmax(best_N))
  after = np.flatnonzero(~best_N[first:])
  last = first + int(after[0]) - 1 if len(after) else longest - 1
  lost = np.flatnonzero((n_gen_N > cap) & (reward_N > unfinished + tolerance))
  below_wrong_from = _below_from(reward_N, wrong, tolerance)
  responses_beyond = lambda n_gen: lengths.share_beyond(budget, n_gen) if lengths else None
  return BudgetFindings(
      budget=budget, cap=cap, wrong=wrong, unfinished=unfinished,
      highest=float(reward_N.max()), lowest=float(reward_N.min()),
      best_lengths=(int(n_gen_N[first]), int(n_gen_N[last])),
      below_wrong_from=below_wrong_from, below_unfinished_from=_below_from(reward_N, unfinished, tolerance),
      beyond_cap=(longest - cap) / longest,
      forfeits=(int(n_gen_N[lost[0]]), int(n_gen_N[lost[-1]])) if len(lost) else None,
      forfeited=float(reward_N[lost].max() - unfinished) if len(lost) else 0.0,
      responses_beyond_cap=responses_beyond(cap),
      responses_below_wrong=None if below_wrong_from is None else responses_beyond(below_wrong_from - 1),
      intra_low=intra[0], intra_high=intra[1], push_down=push[0], push_up=push[1])


def _below_from(reward_N: np.ndarray, score: float, tolerance: float) -> int | None:
  """Length from which on, up to L_max, a correct answer scores below `score`."""
  not_below = np.flatnonzero(reward_N >= score - tolerance)
  first = int(not_below[-1]) + 1 if len(not_below) else 0
  return first + 1 if first < len(reward_N) else None


def _best_budgets(
    cfg: Config, reward_GN: np.ndarray, tolerance: float) -> tuple[tuple[Switch, ...], tuple[int, ...]]:
  """(switches of the best budget, budgets never better than all others), among the budgets whose cap allows n."""
  budgets, longest = cfg.rollout.budgets, max(cfg.caps)
  n_gen_N = np.arange(1, longest + 1)
  reward_GN = np.where(n_gen_N <= np.array(cfg.caps)[:, None], reward_GN[:, :longest], -np.inf)
  best_GN = reward_GN >= reward_GN.max(axis=0) - tolerance
  winner_N = best_GN.argmax(axis=0)  # Of equal ones the smallest.
  if len(budgets) == 1 or best_GN.all():
    return (), ()
  switches = tuple(
      Switch(int(n_gen_N[i + 1]), budgets[winner_N[i]], budgets[winner_N[i + 1]])
      for i in np.flatnonzero(np.diff(winner_N)))
  alone_G = (best_GN & (best_GN.sum(axis=0) == 1)).any(axis=1)
  return switches, tuple(b for b, alone in zip(budgets, alone_G, strict=True) if not alone)


def _is_linear(cfg: Config) -> bool:
  """Whether A_intra is linear in the rewards and knows nothing else."""
  a = cfg.advantage
  return a.intra_form == "baseline" and a.intra_baseline == "budget" and a.intra_scale == a.intra_gate == "none"


def _intra_range(
    cfg: Config, reward_GN: np.ndarray, wrong_G: np.ndarray, unfinished_G: np.ndarray) -> list[tuple[float, float]]:
  """(least, largest) A_intra by budget.

  A_intra is linear in the rewards, so the extremes lie where a subgroup has its lowest or highest reward throughout
  and, for centring, all others the opposite.
  """
  within_GN = np.where(np.arange(1, reward_GN.shape[1] + 1) <= np.array(cfg.caps)[:, None], reward_GN, np.nan)
  others = np.stack([wrong_G, unfinished_G])
  low_G = np.minimum(np.nanmin(within_GN, axis=1), others.min(axis=0))
  high_G = np.maximum(np.nanmax(within_GN, axis=1), others.max(axis=0))
  own = np.eye(len(low_G), dtype=bool)
  intra = [_advantage(cfg, np.where(own == high, high_G, low_G)[:, :, None])[0] for high in (False, True)]
  return [(float(intra[0][g, g]), float(intra[1][g, g])) for g in range(len(low_G))]


def _push_range(
    cfg: Config, right_G: np.ndarray, others: Sequence[np.ndarray],
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
  """(least, largest) by budget, of the total advantage and of A_intra.

  Over groups with every number of right answers in each subgroup.
  """
  G, J = cfg.n_subgroups, cfg.rollouts_per_budget
  for choices in (range(J + 1), sorted({0, 1, J - 1, J}), (0, J)):
    if len(choices)**G <= _MOST_GROUPS:
      n_right_SG = np.array(list(itertools.product(choices, repeat=G)))
      break
  else:  # Very many budgets: all subgroups alike but one.
    n_right_SG = np.array([
        [own if g == i else rest for g in range(G)] for i in range(G) for own in range(J + 1) for rest in range(J + 1)])
  right_SGJ = np.arange(J) < n_right_SG[:, :, None]
  found = [_advantage(cfg, np.where(right_SGJ, right_G[:, None], other_G[:, None]), right_SGJ) for other_G in others]
  intra, total = np.stack([f[0] for f in found]), np.stack([f[2] for f in found])
  by_budget = lambda x: [(float(x[:, :, g].min()), float(x[:, :, g].max())) for g in range(G)]
  return by_budget(total), by_budget(intra)


def _groups(cfg: Config, right_G: np.ndarray, wrong_G: np.ndarray) -> tuple[Group, ...]:
  G, J = cfg.n_subgroups, cfg.rollouts_per_budget
  # Half of each subgroup; where J is odd, the larger and the smaller half in turn.
  half_G = np.array([(J + (g % 2 == 0)) // 2 for g in range(G)])
  right_3GJ = np.arange(J) < np.stack([np.zeros(G, int), np.full(G, J), half_G])[:, :, None]
  intra_3G, inter_3GJ, total_3GJ = _advantage(
      cfg, np.where(right_3GJ, right_G[:, None], wrong_G[:, None]), right_3GJ)

  def group(name: str, what: str, row: int, right: bool) -> Group:
    j = 0 if right else J - 1  # The right ones come first.
    pick = lambda values: tuple(float(v) if r == right else None for v, r in zip(values, right_3GJ[row, :, j]))
    return Group(name, what, pick(intra_3G[row]), pick(inter_3GJ[row, :, j]), pick(total_3GJ[row, :, j]))

  return (
      group("all_wrong", "all wrong", 0, False),
      group("all_right", "all right, each as long as its budget", 1, True),
      group("half_right", "half right, as long as their budget: the right ones", 2, True),
      group("half_wrong", "half right, as long as their budget: the wrong ones", 2, False))
