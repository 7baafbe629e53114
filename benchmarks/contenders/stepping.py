"""What the workers of step.py share: settings of the update, the conversation with the parent, the checks of a step.

    {"cmd": "build", "model": {..}, "case": {..}}          -> {"build_s"}: the network with the common weights
    {"cmd": "first", "lengths": [..], "seed": n}           -> {"first_step_s", ..}: everything else, and the first step
    {"cmd": "step", "lengths": [..], "seed": n}            -> {"step_s", "cpu_s", "rollout_s", "update_s", ..}
    {"cmd": "about"}                                       -> {"score", "versions", "threads", "tuned"}

`lengths` are the tokens of each response; one as long as the cap is not stopped.
"""

from collections.abc import Callable
import dataclasses
import gc
import math
import time
from typing import Any, Protocol

import numpy as np

from contenders import common
from contenders.common import Case, Model

# AdamW as in both systems, behind a clip of the global norm.
LEARNING_RATE, B1, B2, EPS, WEIGHT_DECAY, CLIP_NORM = 1e-6, 0.9, 0.999, 1e-8, 0.01, 1.0
CLIP = 0.2  # of the ratio, to both sides


def rewards(n: int) -> list[float]:
  """The score of each response: every other one is right, so that the advantages are not 0."""
  return [float(i % 2) for i in range(n)]


@dataclasses.dataclass
class Step:
  """What a step did.

  n_tokens: sampled tokens of each response; the EOS may be left out.
  n_loss: tokens that the update's loss is over.
  loss, grad_norm: of the update.
  rollout_s, update_s: wall seconds; reward, advantage and log-probabilities belong to the update.
  """
  n_tokens: list[int]
  n_loss: int
  loss: float
  grad_norm: float
  rollout_s: float
  update_s: float


class Trainer(Protocol):
  """A system that trains."""
  tuned: dict[str, Any]

  def prepare(self, lengths: list[int], seed: int) -> None:
    """Sets what the next step is to do; not timed."""

  def step(self) -> None:
    """One step, to the point where the next one may begin and its weights are there."""

  def last(self) -> Step:
    """What the step did; not timed."""

  def weights(self) -> np.ndarray:
    """float32 [n], a copy of some of the weights that the next step samples with."""

  def close(self) -> None:
    """Ends its threads."""


def serve(build: Callable[[Model, Case], Any], start: Callable[[Model, Case, Any], Trainer],
          score: Callable[[Model, list[int]], float], packages: tuple[str, ...]) -> None:
  """Answers the parent until it closes stdin.

  Args:
    build: the network with the common weights.
    start: the trainer of a network.
    score: `mean_logp` of a prompt, by the contender's own network.
    packages: whose versions to report.
  """
  n_compiles = common.count_compiles()
  made: dict[str, Any] = {}

  def build_network(model: dict, case: dict) -> dict:
    made.update(model=Model(**model), case=Case(**case))
    start_s = time.perf_counter()
    made["network"] = build(made["model"], made["case"])
    return {"build_s": time.perf_counter() - start_s}

  def first(lengths: list[int], seed: int) -> dict:
    gc.collect()
    before, start_s, cpu_s = n_compiles(), time.perf_counter(), time.process_time()
    trainer = made["trainer"] = start(made["model"], made["case"], made.pop("network"))
    old = trainer.weights()
    trainer.prepare(lengths, seed)
    trainer.step()
    times = {"first_step_s": time.perf_counter() - start_s, "first_step_cpu_s": time.process_time() - cpu_s}
    return times | _checked(trainer, lengths, old) | {"compiles": n_compiles() - before}

  def step(lengths: list[int], seed: int) -> dict:
    trainer = made["trainer"]
    old, before = trainer.weights(), n_compiles()
    trainer.prepare(lengths, seed)
    gc.collect()
    start_s, cpu_s = time.perf_counter(), time.process_time()
    trainer.step()
    times = {"step_s": time.perf_counter() - start_s, "cpu_s": time.process_time() - cpu_s}
    return times | _checked(trainer, lengths, old) | {"compiles": n_compiles() - before}

  def about() -> dict:
    return {"score": score(made["model"], made["case"].prompts[0]), "versions": common.versions(*packages),
            "threads": common.threads(), "tuned": made["trainer"].tuned}

  try:
    common.answer({"build": build_network, "first": first, "step": step, "about": about})
  finally:
    if "trainer" in made:
      made["trainer"].close()


def _checked(trainer: Trainer, lengths: list[int], old: np.ndarray) -> dict[str, Any]:
  """The step's account.

  Raises:
    ValueError: when a response has not its length, a token is missing from the loss, the loss is not finite, nothing
      was learned, or the weights of the sampler are still the old ones.
  """
  done, new = trainer.last(), trainer.weights()
  if len(done.n_tokens) != len(lengths):
    raise ValueError(f"{len(done.n_tokens)} responses, not {len(lengths)}.")
  for i, (n, wanted) in enumerate(zip(done.n_tokens, lengths)):
    if n not in (wanted - 1, wanted):
      raise ValueError(f"response {i} has {n} tokens, not {wanted}, or {wanted - 1} and EOS.")
  # A drawn PAD has no loss in Tunix; one in 4,096 tokens.
  if not 0.99 * sum(done.n_tokens) <= done.n_loss <= sum(done.n_tokens):
    raise ValueError(f"the loss is over {done.n_loss} tokens of {sum(done.n_tokens)}.")
  if not math.isfinite(done.loss) or not 0 < done.grad_norm < math.inf:
    raise ValueError(f"loss {done.loss}, gradient norm {done.grad_norm}.")
  change = float(np.abs(new - old).max())
  if not 0 < change < 2 * LEARNING_RATE:
    raise ValueError(f"the weights changed by {change}, not by a part of the learning rate {LEARNING_RATE}.")
  return dataclasses.asdict(done) | {"n_tokens": sum(done.n_tokens), "useful_tokens": sum(lengths), "change": change}
