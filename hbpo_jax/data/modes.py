"""Responses to the synthetic task in four modes, each longer and more often right than the one before it.

The first word of a response names its mode, so one token decides how long to think:

    guess   "guess </think> \\boxed{0}"                          no work shown
    skim    "skim +4 *2 = 0 -1 = 6 </think> \\boxed{6}"          two operations to a statement
    work    "work 3 +4 = 0 0 *2 = 0 0 -1 = 6 ..."               one operation to a statement
    check   as work, with steps stated again ("wait 3 +4 = 0") up to a target length that the level does not decide

What a mode costs in accuracy grows with the level, so that length buys accuracy where problems are hard, and nothing
where they are easy. A small model's guesses are right by chance. Who skims has a misconception: of two multiplications
in one statement, the second alone is carried out (`is_misread`). That is a rule, so that what is right has next to no
probability there, and practice seldom comes upon it. Who works slips now and then (`SLIPS`), at any step, and goes on
from the wrong value; who checks slips as often, but has stated that step again rightly before the next.
"""

from collections.abc import Sequence

import numpy as np

from hbpo_jax.config import SyntheticConfig
from hbpo_jax.data import synthetic
from hbpo_jax.data.record import Problem

MODES = ("guess", "skim", "work", "check")
RECHECK = synthetic.RECHECK_WORDS[0]
PER_SKIM = 2  # operations in a statement of `skim`
SLIPS = 0.01  # share of the steps of `work`, and of those that `check` states again, that are wrong at first
_TOKENS_OF_STEP = 4  # value, operation, "=", result


def draw(cfg: SyntheticConfig, rng: np.random.Generator, *, states_budget: bool) -> str:
  """A mode, drawn with cfg.budget_mode_shares where the response states a budget, else mode_shares; never from the
  problem."""
  shares = np.array(cfg.budget_mode_shares if states_budget else cfg.mode_shares)
  return MODES[rng.choice(len(MODES), p=shares / shares.sum())]


def trace(cfg: SyntheticConfig, problem: Problem, mode: str, rng: np.random.Generator, target_tokens: int) -> str:
  """A worked response in one mode.

  Args:
    cfg: for the modulus.
    problem: a synthetic problem.
    mode: one of MODES.
    rng: decides which steps `check` states again, and the slips.
    target_tokens: length that `check` comes nearest to, EOS included; the other modes have one length.
  Returns:
    The text that follows the opening `<think>`: the mode's name, statements, `</think>`, and the boxed answer that they
    lead to, which a skimmed pair or a slip may have made wrong.
  Raises:
    ValueError: when the mode does not exist.
  """
  start, *operations = problem.problem.split()
  match mode:
    case "guess":
      statements, answer = [], synthetic.steps(problem.problem, cfg.modulus)[-1][2]
    case "skim":
      statements, answer = _skimmed(int(start), operations, cfg.modulus)
    case "work":
      statements, answer = _worked(int(start), operations, cfg.modulus, rng)
    case "check":
      statements, answer = _checked(int(start), operations, cfg.modulus, rng, target_tokens)
    case _:
      raise ValueError(f"mode={mode!r} of the synthetic task does not exist; choose one of {MODES}.")
  return " ".join([mode, *statements, synthetic.THINK_CLOSE, f"\\boxed{{{answer}}}"])


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


def is_misread(value: int, operations: Sequence[str]) -> bool:
  """Whether skimming gets this pair of operations wrong: two multiplications, of a value that is not 0."""
  return value != 0 and len(operations) == PER_SKIM and all(op.startswith("*") for op in operations)


def _result(value: int, operations: Sequence[str], modulus: int) -> int:
  return synthetic.steps(" ".join([str(value), *operations]), modulus)[-1][2]


def _other(value: int, offset: int, modulus: int) -> int:
  """A value that is not `value`."""
  return (value + 1 + offset % (modulus - 1)) % modulus


def _skimmed(value: int, operations: Sequence[str], modulus: int) -> tuple[list[str], int]:
  statements = []
  for i in range(0, len(operations), PER_SKIM):
    part = operations[i:i + PER_SKIM]
    before, value = value, _result(value, part, modulus)
    if is_misread(before, part):
      value = _result(before, part[1:], modulus)
    statements.append(f"{' '.join(part)} = {value}")
  return statements, value


def _worked(value: int, operations: Sequence[str], modulus: int, rng: np.random.Generator) -> tuple[list[str], int]:
  statements = []
  for operation in operations:
    before, value = value, _result(value, [operation], modulus)
    if rng.random() < SLIPS:
      value = _other(value, int(rng.integers(modulus)), modulus)
    statements.append(f"{before} {operation} = {value}")
  return statements, value


def _checked(
    value: int, operations: Sequence[str], modulus: int, rng: np.random.Generator, target_tokens: int,
) -> tuple[list[str], int]:
  spare = target_tokens - n_tokens("check", len(operations))
  n_rechecks = max(0, round(spare / (_TOKENS_OF_STEP + 1)))
  statements = []
  n_steps = len(operations)
  for operation, n in zip(operations, rng.multinomial(n_rechecks, [1 / n_steps] * n_steps), strict=True):
    before, value = value, _result(value, [operation], modulus)
    slips = n > 0 and rng.random() < SLIPS
    stated = _other(value, int(rng.integers(modulus)), modulus) if slips else value
    statements += [f"{before} {operation} = {stated}", *[f"{RECHECK} {before} {operation} = {value}"] * n]
  return statements, value
