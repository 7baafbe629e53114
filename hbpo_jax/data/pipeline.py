"""The endless stream of training batches: a Grain pipeline over the problems, exactly resumable."""

from collections.abc import Callable, Iterator, Sequence
import hashlib
from typing import Any

import grain.python as grain

from hbpo_jax.config import Config
from hbpo_jax.data.prompts import PromptBuilder
from hbpo_jax.data.record import Problem
from hbpo_jax.structs import Prompts


class Pipeline:
  """Batches of `rollout.queries / process_count` prompts for one process, for ever.

  Every epoch passes over all kept problems in an order of its own, decided by (seed, epoch). All processes walk the
  same global order: global batch i is its i-th run of `rollout.queries` problems, and process p takes the p-th
  part of it. A batch may reach over the end of an epoch, so that no problem is left out.

  problems: the problems that are kept, in the order given.
  n_dropped: problems left out because their prompt is longer than data.max_prompt_tokens.
  digest: of `problems`, their answers included; the iterator's state means the same only where it is the same.
  """

  def __init__(
      self, problems: Sequence[Problem], builder: PromptBuilder, cfg: Config, *, process_index: int = 0,
      process_count: int = 1,
  ):
    """Encodes all prompts.

    Args:
      problems: training problems; data.limit has been applied by `problems.load_train_and_eval`.
      builder: of the model's tokenizer.
      cfg: for `rollout`, `data`, `prompt` and `seed`.
      process_index: of this host.
      process_count: hosts in the run.
    Raises:
      ValueError: when no prompt fits, or the batch does not divide over the processes.
    """
    queries = cfg.rollout.queries
    if queries % process_count:
      raise ValueError(f"rollout.queries={queries} does not divide over {process_count} processes; make it a multiple.")
    if not 0 <= process_index < process_count:
      raise ValueError(f"process_index={process_index} must lie in 0..{process_count - 1}.")
    kept, self.n_dropped = keep_short(problems, builder, cfg.data.max_prompt_tokens)
    self.problems = [p for p, _ in kept]
    self.digest = _digest(self.problems)
    self._builder = builder
    self._prefix = builder.training_prefix(cfg.rollout.budgets)
    self._max_prompt_tokens = cfg.data.max_prompt_tokens
    per_process = queries // process_count
    self._first_query = process_index * per_process
    self._dataset = (
        grain.MapDataset.source(kept)
        .shuffle(seed=cfg.seed)  # Another order in every epoch, for `repeat` comes after it.
        .repeat()
        .batch(queries, batch_fn=list)
        .map(lambda batch: batch[self._first_query:self._first_query + per_process]))

  def __iter__(self) -> "PipelineIterator":
    """A new iterator, at the beginning."""
    return PipelineIterator(iter(self._dataset.to_iter_dataset(grain.ReadOptions(num_threads=0))), self._collate)

  def _collate(self, batch: list[tuple[Problem, list[int]]]) -> tuple[list[Problem], Prompts]:
    problems = [p for p, _ in batch]
    tokens = [t for _, t in batch]
    return problems, self._builder.batch(
        tokens, self._prefix, self._max_prompt_tokens, first_query=self._first_query)


def _digest(problems: Sequence[Problem]) -> str:
  whole = hashlib.sha256()
  for p in problems:
    whole.update(repr((p.id, p.problem, p.answer, p.answers)).encode())
  return whole.hexdigest()[:16]


def keep_short(
    problems: Sequence[Problem], builder: PromptBuilder, max_prompt_tokens: int,
) -> tuple[list[tuple[Problem, list[int]]], int]:
  """(problems with their prompt tokens, number dropped because the prompt is longer than max_prompt_tokens).

  Raises:
    ValueError: when none is left.
  """
  encoded = [(p, builder.encode(p.problem)) for p in problems]
  kept = [(p, tokens) for p, tokens in encoded if len(tokens) <= max_prompt_tokens]
  if not kept:
    shortest = min((len(tokens) for _, tokens in encoded), default=0)
    raise ValueError(
        f"data.max_prompt_tokens={max_prompt_tokens} drops all {len(encoded)} problems (the shortest prompt has"
        f" {shortest} tokens); raise it.")
  return kept, len(encoded) - len(kept)


class PipelineIterator(Iterator):
  """Yields (problems of the batch, Prompts); its state is a small JSON-serialisable dictionary."""

  def __init__(self, inner: grain.DatasetIterator, collate: Callable):
    self._inner = inner
    self._collate = collate

  def __next__(self) -> tuple[list[Problem], Prompts]:
    return self._collate(next(self._inner))

  def get_state(self) -> dict[str, Any]:
    """Where the iterator stands: what it yields next is decided by this and by the Pipeline."""
    return self._inner.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues exactly where `get_state` was called, also in another process."""
    self._inner.set_state(state)
