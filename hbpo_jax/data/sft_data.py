"""Rows for the supervised warm start: prompts with worked responses, a share of them opened by a budget sentence."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hbpo_jax.config import Config
from hbpo_jax.data import modes, pipeline, synthetic
from hbpo_jax.data.prompts import PromptBuilder
from hbpo_jax.data.record import Problem
from hbpo_jax.structs import Batch

# Fields of a JSON Lines row that may hold the worked response, in this order.
SOLUTION_FIELDS = ("solution", "response")


class SftData:
  """Batches of worked responses; batch `step` is a function of (cfg.seed, step) alone.

  Synthetic problems get a new verbose trace each time they are drawn; a drawn budget sentence is one of all budgets
  with equal chance, whatever the trace's length: the model must know every sentence before HBPO forces them on it,
  and is not to obey them yet. With data.synthetic.traces=modes, each time in a mode drawn anew (`data.modes`), they get
  any of the budgets that hold the trace. Other problems, which bring their worked response (`SOLUTION_FIELDS`), get the
  smallest that holds it, or the largest.

  n_dropped: problems left out because the prompt or the response has no room.
  """

  def __init__(self, problems: Sequence[Problem], builder: PromptBuilder, cfg: Config):
    """Encodes prompts and, where they are given, responses.

    Args:
      problems: training problems.
      builder: of the model's tokenizer.
      cfg: for `sft`, `data`, `rollout.budgets` (where sft.stated_budgets is empty), `reward.max_response_tokens` and
        `seed`.
    Raises:
      ValueError: when a problem has no worked response, none fits, or L_max has no room for the synthetic task.
    """
    self._cfg = cfg
    self._builder = builder
    self._width = cfg.reward.max_response_tokens
    self._budgets = sorted(cfg.sft.stated_budgets or cfg.rollout.budgets)
    self._budget_rows = {b: builder.budget_tokens(b) for b in self._budgets}
    self._synthetic = all(p.source == "synthetic" for p in problems)
    kept, self.n_dropped = pipeline.keep_short(problems, builder, cfg.data.max_prompt_tokens)
    if self._synthetic:
      self._check_room(max(len(synthetic.steps(p.problem, cfg.data.synthetic.modulus)) for p, _ in kept))
      self._examples = [(p, tokens, []) for p, tokens in kept]
    else:
      examples = [(p, tokens, self._given_response(p)) for p, tokens in kept]
      self._examples = [e for e in examples if len(e[2]) <= self._width]
      self.n_dropped += len(examples) - len(self._examples)
      if not self._examples:
        raise ValueError(f"reward.max_response_tokens={self._width} is shorter than every worked response; raise it.")

  def batch(self, step: int) -> Batch:
    """The rows of one update.

    Args:
      step: from 0.
    Returns:
      Batch of NumPy arrays with tokens_RT, segment_RT, position_RT and completion_mask_RC: R = cfg.sft.rows, prompt
      slots P = data.max_prompt_tokens (left-padded with 0), completion slots C = L_max (right-padded with 0). The
      mask covers response and EOS, and the budget sentence in sft.stated_share of the rows. The other fields are None.
    """
    rng = np.random.default_rng([self._cfg.seed, 2, step])
    R, P, C = self._cfg.sft.rows, self._cfg.data.max_prompt_tokens, self._width
    tokens_RT = np.zeros((R, P + C), np.int32)
    segment_RT = np.zeros((R, P + C), np.int32)
    position_RT = np.zeros((R, P + C), np.int32)
    completion_mask_RC = np.zeros((R, C), bool)
    for r, i in enumerate(rng.integers(len(self._examples), size=R)):
      problem, prompt, given = self._examples[i]
      opening, response = self._completion(problem, given, rng)
      completion = opening + response
      # No draw where there is nothing to decide: it would change the traces.
      stated = self._cfg.sft.stated_share == 1 or rng.random() < self._cfg.sft.stated_share
      first, end = P - len(prompt), P + len(completion)
      tokens_RT[r, first:end] = prompt + completion
      segment_RT[r, first:end] = 1
      position_RT[r, first:end] = np.arange(end - first)
      completion_mask_RC[r, 0 if stated else len(opening):len(completion)] = True
    # The annotation of Batch speaks of device arrays; these become such when they are first used.
    rows: tuple[Any, ...] = (tokens_RT, segment_RT, position_RT, completion_mask_RC)
    return Batch(*rows)

  def _completion(
      self, problem: Problem, given: list[int], rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """(budget sentence or nothing, response with EOS)."""
    opens = rng.random() < self._cfg.sft.budget_share
    if self._synthetic and self._cfg.data.synthetic.traces == "modes":
      given = self._in_some_mode(problem, opens, rng)
      # Any budget that holds the response, so that each is stated, with responses of many lengths.
      least = self._budgets.index(self._holding_budget(len(given)))
      opening = self._budget_rows[self._budgets[rng.integers(least, len(self._budgets))]] if opens else []
    elif self._synthetic:
      opening = self._budget_rows[self._budgets[rng.integers(len(self._budgets))]] if opens else []
      low, high = synthetic.verbose_range(self._width)
      # Drawn anew for every trace and never from the level: the warm start must be long everywhere.
      target = int(rng.integers(low, high + 1)) - len(opening)
      return opening, self._builder.encode_response(synthetic.trace(self._cfg.data.synthetic, problem, rng, target))
    else:
      opening = self._budget_rows[self._holding_budget(len(given))] if opens else []
    # A sentence that has no room is left out, rather than the end of the response.
    return (opening, given) if len(opening) + len(given) <= self._width else ([], given)

  def _in_some_mode(self, problem: Problem, opens: bool, rng: np.random.Generator) -> list[int]:
    task = self._cfg.data.synthetic
    low, high = synthetic.verbose_range(self._width)
    mode, target = modes.draw(task, rng, states_budget=opens), int(rng.integers(low, high + 1))
    return self._builder.encode_response(modes.trace(task, problem, mode, rng, target))

  def _holding_budget(self, n_tokens: int) -> int:
    for budget in self._budgets:
      counted = n_tokens + len(self._budget_rows[budget]) * self._cfg.rollout.count_prefix_tokens
      if counted <= budget:
        return budget
    return self._budgets[-1]

  def _given_response(self, problem: Problem) -> list[int]:
    for field in SOLUTION_FIELDS:
      text = (problem.extra or {}).get(field)
      if isinstance(text, str) and text.strip():
        # The prompt has opened <think> already.
        return self._builder.encode_response(text.removeprefix("<think>").lstrip("\n"))
    raise ValueError(
        f"Problem {problem.id!r} has no worked response; supervised training needs the field 'solution' (or 'response')"
        " in every line of data.source.")

  def _check_room(self, n_operations: int) -> None:
    longest_opening = max(len(row) for row in self._budget_rows.values())
    in_modes = self._cfg.data.synthetic.traces == "modes"
    least = modes.n_tokens("check", n_operations) if in_modes else synthetic.minimal_tokens(n_operations)
    # The nearest whole number of re-checks may overshoot the target by half of one.
    _, high = synthetic.verbose_range(self._width)
    needed = max(least + longest_opening, high + (synthetic.TOKENS_PER_RECHECK + in_modes) // 2)
    if needed > self._width:
      raise ValueError(
          f"reward.max_response_tokens={self._width} has no room for traces of {n_operations} operations with a budget "
          f"sentence, which need {needed} tokens; raise it, or lower data.synthetic.max_level.")
