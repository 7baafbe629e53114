"""Responses to the synthetic task in four modes, each longer and more often right than the one before it.

The first word of a response names its mode, so one token decides how long to think:

    guess   "guess </think> \\boxed{0}"                          no work shown
    skim    "skim +4 *2 = 0 -1 = 6 </think> \\boxed{6}"          two operations to a statement
    work    "work 3 +4 = 0 0 *2 = 0 0 -1 = 6 ..."               one operation to a statement
    check   as work, with steps stated again ("wait 3 +4 = 0") up to a target length that the level does not decide;
            a step stated wrongly is always stated again, rightly

A small model carries out one operation of a written statement almost without fault, two at once less surely, and a whole
chain only where it is short. So what a mode costs in accuracy grows with the level, and which mode is the cheapest that
will do depends on the problem: length buys accuracy where problems are hard, and nothing where they are easy.
"""

import numpy as np

from hbpo_jax.config import SyntheticConfig
from hbpo_jax.data import synthetic
from hbpo_jax.data.record import Problem

MODES = ("guess", "skim", "work", "check")
RECHECK = synthetic.RECHECK_WORDS[0]
PER_SKIM = 2  # operations in a statement of `skim`
ERROR_SHARE = 0.05  # of the steps that `check` states again, those stated wrongly at first
_TOKENS_OF_STEP = 4  # value, operation, "=", result


def draw(cfg: SyntheticConfig, rng: np.random.Generator) -> str:
  """A mode, drawn with cfg.mode_shares; never from the problem."""
  return MODES[rng.choice(len(MODES), p=np.array(cfg.mode_shares) / sum(cfg.mode_shares))]


def trace(cfg: SyntheticConfig, problem: Problem, mode: str, rng: np.random.Generator, target_tokens: int) -> str:
  """A worked response in one mode.

  Args:
    cfg: for the modulus.
    problem: a synthetic problem.
    mode: one of MODES.
    rng: decides which steps `check` states again, and its errors.
    target_tokens: length that `check` comes nearest to, EOS included; the other modes have one length.
  Returns:
    The text that follows the opening `<think>`: the mode's name, statements, `</think>`, boxed answer.
  Raises:
    ValueError: when the mode does not exist.
  """
  worked = synthetic.steps(problem.problem, cfg.modulus)
  match mode:
    case "guess":
      statements = []
    case "skim":
      statements = [
          " ".join([*(f"{operator}{operand}" for operator, operand, _ in part), "=", str(part[-1][2])])
          for part in (worked[i:i + PER_SKIM] for i in range(0, len(worked), PER_SKIM))]
    case "work":
      statements = [_step(*step) for step in _with_values(problem, worked)]
    case "check":
      statements = _checked(cfg, _with_values(problem, worked), rng, target_tokens)
    case _:
      raise ValueError(f"mode={mode!r} of the synthetic task does not exist; choose one of {MODES}.")
  return " ".join([mode, *statements, synthetic.THINK_CLOSE, f"\\boxed{{{worked[-1][2]}}}"])


def n_tokens(mode: str, n_operations: int) -> int:
  """Tokens of a response, EOS included; of `check` the fewest, which states every step once.

  Raises:
    ValueError: when the mode does not exist.
  """
  if mode not in MODES:
    raise ValueError(f"mode={mode!r} of the synthetic task does not exist; choose one of {MODES}.")
  skimmed = n_operations + 2 * -(-n_operations // PER_SKIM)
  body = {"guess": 0, "skim": skimmed}.get(mode, _TOKENS_OF_STEP * n_operations)
  return 1 + body + synthetic.TOKENS_OF_ENDING


def _with_values(problem: Problem, worked: list[tuple[str, int, int]]) -> list[tuple[int, str, int, int]]:
  """(value before, operator, operand, result) of every step."""
  before = [int(problem.problem.split()[0]), *(result for _, _, result in worked)]
  return [(value, *step) for value, step in zip(before, worked)]


def _step(value: int, operator: str, operand: int, result: int) -> str:
  return f"{value} {operator}{operand} = {result}"


def _checked(
    cfg: SyntheticConfig, steps: list[tuple[int, str, int, int]], rng: np.random.Generator, target_tokens: int,
) -> list[str]:
  spare = target_tokens - n_tokens("check", len(steps))
  n_rechecks = max(0, round(spare / (_TOKENS_OF_STEP + 1)))
  statements = []
  for (value, operator, operand, result), n in zip(
      steps, rng.multinomial(n_rechecks, [1 / len(steps)] * len(steps)), strict=True):
    right = _step(value, operator, operand, result)
    errs = n > 0 and rng.random() < ERROR_SHARE
    wrong = (result + int(rng.integers(1, cfg.modulus))) % cfg.modulus
    statements += [_step(value, operator, operand, wrong) if errs else right, *[f"{RECHECK} {right}"] * n]
  return statements
