"""Accuracy and tokens of a model on a fixed set of problems, by difficulty."""

from collections.abc import Callable, Sequence
import json
import pathlib
from typing import Any

import jax
import numpy as np

from hbpo_jax import assemble
from hbpo_jax.assemble import Model
from hbpo_jax.config import Config
from hbpo_jax.data.record import Problem
from hbpo_jax.files import atomic_write_text, json_line, json_value
from hbpo_jax.grading import Verdict
from hbpo_jax.reporting import tables

Judge = Callable[[Sequence[str], Sequence[Problem]], Sequence[Verdict]]


class Evaluation:
  """Answers every problem `eval.samples_per_problem` times in the mode `eval.mode` and grades the answers.

  Compiles once; the same object measures a model before and after training. A problem's random key depends on
  the seed and its place in the list only, so both measurements draw with the same numbers.
  """

  def __init__(self, cfg: Config, model: Model, problems: Sequence[Problem], judge: Judge):
    """Encodes the problems.

    Raises:
      ValueError: when a prompt is longer than data.max_prompt_tokens.
    """
    self.problems = list(problems)
    self._cfg, self._judge, self._builder = cfg, judge, model.builder
    self._tokens = [model.builder.encode(p.problem) for p in problems]
    longest = max(len(t) for t in self._tokens)
    if longest > cfg.data.max_prompt_tokens:
      raise ValueError(
          f"an evaluation prompt has {longest} tokens, data.max_prompt_tokens={cfg.data.max_prompt_tokens}; raise it.")
    self._batch = min(cfg.eval.batch_queries, len(problems))
    self._prefix = model.builder.prefix(cfg.eval.mode)
    self._engine = assemble.evaluation_engine(cfg, model, self._batch)
    # Streams 0 and 1 of the seed: training and evaluation.
    self._key = jax.random.fold_in(jax.random.key(cfg.seed), 1)

  def warm_up(self, progress: Callable[[int, int], None]) -> None:
    """Compiles the sampler; see `Engine.warm_up`."""
    self._engine.warm_up(progress)

  def measure(self, params: Any, progress: Callable[[int, int], None] = lambda done, total: None) -> tuple[dict, list]:
    """Generates and grades.

    Args:
      params: of the decoder.
      progress: called with (problems done, problems in all) after each batch.
    Returns:
      (summary as `reporting.tables.evaluation_summary`, one row per response: id, level, response, n_gen, ...).
    """
    params = self._engine.publish(params)
    rows = []
    for first in range(0, len(self.problems), self._batch):
      problems = self.problems[first:first + self._batch]
      rows += self._measure_batch(params, first, problems)
      progress(len(rows) // self._cfg.eval.samples_per_problem, len(self.problems))
    columns = {name: np.array([row[name] for row in rows]).reshape(len(self.problems), -1)
               for name in ("score", "n_gen", "truncated")}
    levels = [p.level for p in self.problems]
    summary = tables.evaluation_summary(levels, columns["score"], columns["n_gen"], columns["truncated"])
    return summary, rows

  def _measure_batch(self, params: Any, first: int, problems: Sequence[Problem]) -> list[dict]:
    # The last batch is filled up with the first problems, whose answers there are dropped.
    index = [(first + i) % len(self.problems) for i in range(self._batch)]
    prompts = self._builder.batch(
        [self._tokens[i] for i in index], self._prefix, self._cfg.data.max_prompt_tokens, first_query=first)
    rollouts = self._engine.generate(params, prompts, self._key)
    n = len(problems)
    responses = decode_responses(self._builder, rollouts)[:n * self._cfg.eval.samples_per_problem]
    owners = [p for p in problems for _ in range(self._cfg.eval.samples_per_problem)]
    verdicts = self._judge(responses, owners)
    n_gen, truncated = rollouts.n_gen_BGJ[:n].ravel(), rollouts.truncated_BGJ[:n].ravel()
    flat = zip(owners, responses, verdicts, n_gen, truncated, strict=True)
    return [{
        "id": problem.id, "level": problem.level, "answer": problem.answer, "response": response, "n_gen": int(n_gen),
        "truncated": bool(truncated), "score": float(verdict.score), "reason": verdict.reason,
    } for problem, response, verdict, n_gen, truncated in flat]


def decode_responses(builder: Any, rollouts: Any) -> list[str]:
  """Text of every response, in (query, budget, rollout) order; rollouts on the host."""
  return [decode_response(builder, rollouts, index) for index in np.ndindex(rollouts.n_tokens_BGJ.shape)]


def decode_response(builder: Any, rollouts: Any, index: tuple[int, int, int]) -> str:
  """Text of the response at (query, budget, rollout); rollouts on the host."""
  b, g, j = index
  return builder.decode(rollouts.tokens[g][b, j, :rollouts.n_tokens_BGJ[b, g, j]])


def measure_once(path: pathlib.Path, evaluation: Evaluation, params: Any, progress: Any) -> dict:
  """`evaluation.measure`, unless PATH.json holds its summary from an earlier attempt of the run.

  Writes the responses to PATH.jsonl, then the summary to PATH.json, each whole or not at all.
  """
  done = path.with_suffix(".json")
  if done.exists():
    return json.loads(done.read_text(encoding="utf-8"))
  summary, rows = evaluation.measure(params, progress)
  atomic_write_text(path.with_suffix(".jsonl"), "".join(json_line(row) for row in rows))
  atomic_write_text(done, json.dumps(json_value(summary), indent=2) + "\n")
  return summary
