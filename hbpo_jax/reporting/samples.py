"""Sample responses of a run: WORKDIR/samples.jsonl."""

from collections.abc import Mapping, Sequence
import os
import pathlib
from typing import Any

import numpy as np

from hbpo_jax.config import LogConfig
from hbpo_jax.files import StepFile

FILE = "samples.jsonl"


def choose(step: int, shape: tuple[int, int, int], n_samples: int) -> list[tuple[int, int, int]]:
  """(query, budget, rollout) of the responses to show: a function of its arguments only.

  The budgets take turns, so that the first G samples are one query under each budget; the query and the rollout
  move with the step.

  Args:
    step: the training step.
    shape: (B, G, J).
    n_samples: how many, at most B * G * J.
  Returns:
    min(n_samples, B * G * J) different indices.
  """
  B, G, J = shape
  found = []
  for i in range(min(n_samples, B * G * J)):
    turn, g = divmod(i, G)
    found.append(((step + turn) % B, g, (step + turn // B) % J))
  return found


class SampleLog:
  """Appends sample responses to WORKDIR/samples.jsonl every `log.samples_every` steps.

  A row has step, problem, answer, budget, response, n_gen, verdict, reward, advantage. On a resume, rows of an
  earlier attempt from `resume_step` on are dropped, as in `MetricWriter`.
  """

  def __init__(self, workdir: str | os.PathLike, log: LogConfig, resume_step: int = 0):
    self._every = log.samples_every
    self._n_samples = log.n_samples
    self._log = StepFile(pathlib.Path(workdir) / FILE, resume_step)

  def due(self, step: int) -> bool:
    """Whether samples of this step are logged."""
    return self._every > 0 and step % self._every == 0

  def write(
      self, step: int, *, problems: Sequence[str], answers: Sequence[str], budgets: Sequence[int],
      responses: Sequence[str], verdicts: Sequence[str], n_gen_BGJ: Any, reward_BGJ: Any,
      advantage_BGJ: Any) -> list[Mapping[str, Any]]:
    """Logs the chosen responses if the step is due.

    Args:
      step: the training step.
      problems: B problem texts.
      answers: B true answers.
      budgets: G token budgets.
      responses: B * G * J texts in (query, budget, rollout) order.
      verdicts: B * G * J verdict reasons (or a user's score as text), same order.
      n_gen_BGJ: int [B, G, J], counted tokens.
      reward_BGJ: float [B, G, J].
      advantage_BGJ: float [B, G, J], total advantage.
    Returns:
      The rows written, without their step; empty when the step is not due.
    Raises:
      ValueError: when the number of texts does not fit n_gen_BGJ.
    """
    if not self.due(step):
      return []
    n_gen_BGJ, reward_BGJ, advantage_BGJ = (np.asarray(a) for a in (n_gen_BGJ, reward_BGJ, advantage_BGJ))
    shape = B, G, J = n_gen_BGJ.shape
    sizes = {"problems": B, "answers": B, "budgets": G, "responses": B * G * J, "verdicts": B * G * J}
    given = {"problems": problems, "answers": answers, "budgets": budgets, "responses": responses, "verdicts": verdicts}
    for name, size in sizes.items():
      if len(given[name]) != size:
        raise ValueError(f"{name} has {len(given[name])} entries; n_gen_BGJ of shape {shape} asks for {size}.")
    rows = []
    for b, g, j in choose(step, shape, self._n_samples):
      r = (b * G + g) * J + j
      rows.append({
          "problem": problems[b], "answer": answers[b], "budget": int(budgets[g]), "response": responses[r],
          "n_gen": int(n_gen_BGJ[b, g, j]), "verdict": str(verdicts[r]), "reward": float(reward_BGJ[b, g, j]),
          "advantage": float(advantage_BGJ[b, g, j]),
      })
    self._log.write(step, rows)
    return rows

  def close(self) -> None:
    """Closes the file; calling it again does nothing."""
    self._log.close()
