"""Answers benchmarks with the engine of training; every response is graded and stored as it finishes."""

from collections.abc import Callable, Sequence
import pathlib
import time
from typing import Any
import zlib

import jax
import numpy as np

from hbpo_jax import assemble, config, distributed, preemption
from hbpo_jax.config import Config
from hbpo_jax.evaluation.store import Benchmark, Evaluated, Store, open_existing
from hbpo_jax.grading.judge import Judge
from hbpo_jax.reporting.console import Console
from hbpo_jax.reporting.text import duration
from hbpo_jax.rollout.ledger import Ledger

# What decides a response or its verdict; the longest response and the openings are added by what they come to.
_DECIDING = (
    "seed", "eval.temperature", "eval.top_p", "eval.top_k", "prompt.instruction", "prompt.system",
    "prompt.budget_sentence", "prompt.efficiency_sentence", "model.compute_dtype", "reward.grader")

_REPORT_S = 10.0  # Seconds between two lines on how far it is.
Progress = Callable[[int, int], None]
TRAINING = "eval"  # Name of the benchmark that training measures itself on.


class Runner:
  """Answers problems `n_samples` times in each mode, and grades the answers.

  Compiles once; the same object measures any number of params. The modes are subgroups of one engine, so a problem is
  prefilled once for all of them. A problem draws its numbers by the seed, its place in its benchmark, the mode's place
  and the sample: two models are measured with the same numbers.
  """

  def __init__(
      self, cfg: Config, model: assemble.Model, benchmarks: Sequence[Benchmark], judge: Judge, *, modes: Sequence[str],
      n_samples: int, n_new: int, n_prompt_slots: int = 0, context: int | None = None):
    """Encodes the problems.

    Args:
      modes: natural, efficiency, budgets as text, or 'say:TEXT'.
      n_samples: responses per problem and mode.
      n_new: most counted tokens of a response.
      n_prompt_slots: P, which no prompt may exceed (data.max_prompt_tokens); 0 = as many as the longest one needs.
      context: most tokens of prompt and response; a response ends where it is full. None = no such limit.
    Raises:
      ValueError: when a prompt is longer than n_prompt_slots.
    """
    self.benchmarks, self.modes, self.n_samples = list(benchmarks), tuple(modes), n_samples
    self._judge, self._builder = judge, model.builder
    self._tokens = {b.name: [model.builder.encode(p.problem) for p in b.problems] for b in benchmarks}
    self._context = context
    kept = [len(t) for some in self._tokens.values() for t in some if context is None or len(t) < context]
    longest = max(kept, default=1)
    if n_prompt_slots and longest > n_prompt_slots:
      raise ValueError(
          f"an evaluation prompt has {longest} tokens, data.max_prompt_tokens={n_prompt_slots}; raise it.")
    self._n_prompt_slots = n_prompt_slots or longest
    n_problems = sum(len(b.problems) for b in benchmarks)
    self._batch = min(cfg.eval.batch_queries, n_problems)
    self._prefix = model.builder.prefix(self.modes)
    self._engine = assemble.evaluation_engine(
        cfg, model, n_queries=self._batch, n_samples=n_samples, n_prompt_slots=self._n_prompt_slots, n_new=n_new,
        n_prefix=tuple(int(n) for n in self._prefix[1]))
    self.settings = {name: config.get(cfg, name) for name in _DECIDING} | {
        "eval.max_new_tokens": n_new, "eval.max_context": context}
    # Streams 0 and 1 of the seed: training and evaluation.
    self._key = jax.random.fold_in(jax.random.key(cfg.seed), 1)
    self.ledger = Ledger()

  def warm_up(self, progress: Progress) -> None:
    """Compiles the sampler; see `Engine.warm_up`."""
    self._engine.warm_up(progress)

  def open(self, directory: pathlib.Path, model_id: dict[str, Any]) -> Store:
    """The directory of the answers, new or to go on with; see `Store`."""
    return Store(
        directory, self.benchmarks, modes=self.modes, n_samples=self.n_samples, model=model_id, settings=self.settings)

  def measure(
      self, directory: pathlib.Path, model_id: dict[str, Any], load: Callable[[], Any], console: Console, name: str,
      limit: int = 0) -> Evaluated | None:
    """Answers what is missing in the directory, and returns all that is there; None where this is not the writer.

    Args:
      model_id: what identifies the weights, with `path` and `fingerprint`.
      load: gives the params; called only if a response is missing.
      name: what the messages call it.
      limit: first problems of each benchmark that are answered; 0 = all.
    Raises:
      ValueError: when the directory holds an evaluation of something else, or is damaged.
      preemption.Stopped: when the run was asked to stop; what was answered is stored.
    """
    with self.open(directory, model_id) as store:
      if missing := self.missing(store, limit):
        params = load()
        assemble.compile_samplers(console, **{name: self})
        self.answer(params, store, _Progress(console, name, missing), limit)
      else:
        self.grade_stored(store)
    return open_existing(directory) if distributed.is_writer() else None

  def missing(self, store: Store, limit: int = 0) -> int:
    """Responses that are still to be generated.

    Args:
      limit: first problems of each benchmark that count; 0 = all.
    """
    return sum(int(self._wanted(store, b, i).sum()) for b, i in self._places(limit))

  def answer(self, params: Any, store: Store, progress: Progress = lambda done, total: None, limit: int = 0) -> None:
    """Generates, grades and stores what is missing.

    Args:
      params: of the decoder.
      progress: called with (responses stored, responses in all) as they finish.
      limit: first problems of each benchmark that are answered; 0 = all.
    """
    self.grade_stored(store)
    places = [place for place in self._places(limit) if self._wanted(store, *place).any()]
    total = len(self._places(limit)) * len(self.modes) * self.n_samples
    self._total, self._done, self._progress = total, total - self.missing(store, limit), progress
    fitting = []
    for b, i in places:
      if self._room(b, i).min() < 1:
        self._keep(store, b, [self._row(b, i, g, j, [], True) for g, j in np.argwhere(self._wanted(store, b, i))])
      else:
        fitting.append((b, i))
    if fitting:
      params = self._engine.publish(params)
    for first in range(0, len(fitting), self._batch):
      self._answer_batch(params, store, fitting[first:first + self._batch])

  def grade_stored(self, store: Store) -> None:
    """Gives their verdicts to responses that an earlier attempt stored without."""
    for b in self.benchmarks:
      if rows := [*store.ungraded[b.name].values()]:
        store.append(b.name, self._graded(b, rows))

  def _places(self, limit: int) -> list[tuple[Benchmark, int]]:
    return [(b, i) for b in self.benchmarks for i in range(len(b.problems[:limit or None]))]

  def _wanted(self, store: Store, b: Benchmark, i: int) -> np.ndarray:
    """bool [G, J], the responses to a problem that are not stored."""
    return np.array([
        [not store.holds(b.name, (b.problems[i].id, mode, j)) for j in range(self.n_samples)] for mode in self.modes])

  def _room(self, b: Benchmark, i: int) -> np.ndarray:
    """int [G], tokens that the context leaves to sample."""
    context = self._context or self._n_prompt_slots + max(self._engine.shape.widths)
    return context - len(self._tokens[b.name][i]) - np.array(self._engine.shape.n_prefix)

  def _answer_batch(self, params: Any, store: Store, places: list[tuple[Benchmark, int]]) -> None:
    # The engine's shape is static: a batch is filled up with a problem that nothing is wanted of.
    filled = places + places[:1] * (self._batch - len(places))
    wanted_BGJ = np.stack([self._wanted(store, *place) for place in filled])
    wanted_BGJ[len(places):] = False
    prompts = self._builder.batch([self._tokens[b.name][i] for b, i in filled], self._prefix, self._n_prompt_slots)
    prompts = prompts.replace(query_B=np.array([_identity(b.name, i) for b, i in filled], np.int32))
    generation = self._engine.start(
        params, prompts, self._key, wanted_BGJ=wanted_BGJ, limit_BG=np.stack([self._room(*p) for p in filled]))
    rollouts = generation.rollouts
    for finished in generation:
      rows: dict[str, list] = {}
      for q, g, j in finished.tolist():
        b, i = places[q]
        rows.setdefault(b.name, []).append(
            self._row(b, i, g, j, rollouts.response(q, g, j), bool(rollouts.truncated_BGJ[q, g, j])))
      for b in self.benchmarks:
        if b.name in rows:
          self._keep(store, b, rows[b.name])
      preemption.check(f"{self._done:,} of {self._total:,} responses of the evaluation are stored")
    self.ledger.add(generation.ledger)

  def _row(self, b: Benchmark, i: int, g: int, j: int, tokens: Any, truncated: bool) -> dict[str, Any]:
    problem = b.problems[i]
    return {
        "id": problem.id, "mode": self.modes[g], "sample": int(j), "answer": problem.answer, "level": problem.level,
        "response": self._builder.decode(tokens), "n_gen": len(tokens), "n_think": self._builder.n_thinking(tokens),
        "truncated": truncated, "score": None, "reason": None, "given": ""}

  def _keep(self, store: Store, b: Benchmark, rows: list[dict[str, Any]]) -> None:
    """Stores responses with their verdicts; without, where grading fails, so that none is lost."""
    kept = rows
    try:
      kept = self._graded(b, rows)
    finally:
      store.append(b.name, kept)
    self._done += len(rows)
    self._progress(self._done, self._total)

  def _graded(self, b: Benchmark, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    problem_of = {p.id: p for p in b.problems}
    verdicts = self._judge([row["response"] for row in rows], [problem_of[row["id"]] for row in rows])
    return [row | {"score": float(v.score), "reason": v.reason, "given": v.answer} for row, v in zip(rows, verdicts)]


class _Progress:
  """Prints how far an evaluation is, now and then."""

  def __init__(self, console: Console, name: str, missing: int):
    self._console, self._name, self._missing = console, name, missing
    self._start = self._last = time.monotonic()

  def __call__(self, done: int, total: int) -> None:
    now = time.monotonic()
    if done < total and now - self._last < _REPORT_S:
      return
    self._last = now
    made, spent_s = self._missing - (total - done), now - self._start
    left = duration(spent_s * (total - done) / made) if made else "-"
    self._console.message(f"{self._name}: {done:,} of {total:,} responses, {spent_s:.0f} s, left {left}")


def _identity(name: str, place: int) -> int:
  """What a problem's random numbers follow from, below 2^31. Training's own problems start at 0."""
  start = 0 if name == TRAINING else zlib.crc32(name.encode())
  return (start + place) % 2**31
