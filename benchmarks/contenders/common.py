"""What the workers share: the conversation with the parent, the random weights, and what a run must deliver.

A worker reads one JSON object a line from stdin and answers with one on stdout:

    {"cmd": "setup", "key": K, "model": {..}, "case": {..}}  -> {"tuned": {..}, "versions": {..}, "threads": n, ..};
                                                                a key that is set up already is not set up again
    {"cmd": "run", "key": K, "seed": n}                      -> {"useful_tokens", "slot_steps", "cpu_s", "wall_s", ..}
    {"cmd": "drop"}                                          -> {}

Any answer may be {"error": text} instead. Only NumPy and the standard library are imported here, because each contender
runs in an interpreter of its own.
"""

from collections.abc import Callable
import dataclasses
import gc
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
import traceback
from typing import Any, TextIO

import numpy as np


@dataclasses.dataclass(frozen=True)
class Model:
  """A Qwen2 decoder, float32, head not tied to the embedding (as in R1-Distill-Qwen)."""
  name: str
  hidden: int
  layers: int
  heads: int
  kv_heads: int
  head_size: int
  mlp: int
  vocabulary: int
  rope_theta: float
  rms_eps: float
  seed: int


@dataclasses.dataclass(frozen=True)
class Case:
  """What to sample.

  prompts: [B][P] token ids, all of one length.
  lengths: [B][J], tokens of each rollout, EOS included: its last token ends it, whatever is drawn, and no other can.
  cap: most new tokens; what a sampler may know of the lengths.
  room: tokens a row of the key/value cache has room for, prompt included.
  slots: rows that decode at a time, where the sampler has such a setting.
  calls: how often a run repeats all this, so that it takes long enough to be timed.
  """
  prompts: list[list[int]]
  lengths: list[list[int]]
  cap: int
  room: int
  slots: int
  eos: int
  pad: int
  calls: int = 1

  @property
  def n_prompt(self) -> int:
    """P, tokens of every prompt."""
    return len(self.prompts[0])

  @property
  def rows(self) -> list[tuple[list[int], int]]:
    """(prompt, length) of all B * J rollouts, those of a prompt together."""
    return [(prompt, n) for prompt, lengths in zip(self.prompts, self.lengths) for n in lengths]


@dataclasses.dataclass
class Output:
  """What one run put on the host.

  tokens, logps: per rollout in the order of Case.rows, the sampled ids and their log-probabilities, as many as the
    contender itself found. The EOS and its log-probability (0, where it was forced) may be left out.
  slot_steps: rows times decode steps that were computed, useful or not.
  """
  tokens: list[np.ndarray]
  logps: list[np.ndarray]
  slot_steps: int


@dataclasses.dataclass
class Prepared:
  """A compiled case.

  run: seed -> Output.
  tuned: the contender's own settings, and the figures by which it chose them.
  """
  run: Callable[[int], Output]
  tuned: dict[str, Any]


def weights(model: Model) -> dict[str, np.ndarray]:
  """Random float32 weights by Hugging Face name, outputs first; the same for every contender."""
  rng = np.random.default_rng(model.seed)
  D, F, V = model.hidden, model.mlp, model.vocabulary
  H, K = model.heads * model.head_size, model.kv_heads * model.head_size

  def normal(*shape):
    return (rng.standard_normal(shape) / math.sqrt(shape[-1])).astype(np.float32)

  table = {"model.embed_tokens.weight": normal(V, D), "model.norm.weight": np.ones(D, np.float32),
           "lm_head.weight": normal(V, D)}
  for i in range(model.layers):
    at = f"model.layers.{i}."
    table |= {
        at + "input_layernorm.weight": np.ones(D, np.float32),
        at + "post_attention_layernorm.weight": np.ones(D, np.float32),
        at + "self_attn.q_proj.weight": normal(H, D), at + "self_attn.q_proj.bias": normal(H),
        at + "self_attn.k_proj.weight": normal(K, D), at + "self_attn.k_proj.bias": normal(K),
        at + "self_attn.v_proj.weight": normal(K, D), at + "self_attn.v_proj.bias": normal(K),
        at + "self_attn.o_proj.weight": normal(D, H),
        at + "mlp.gate_proj.weight": normal(F, D), at + "mlp.up_proj.weight": normal(F, D),
        at + "mlp.down_proj.weight": normal(D, F),
    }
  return table


def mean_logp(logits_TV: np.ndarray, tokens_T: list[int]) -> float:
  """Mean log-probability of a prompt's tokens after the first: equal where two contenders run the same network."""
  logits = np.asarray(logits_TV, np.float64)[:-1]
  chosen = logits[np.arange(len(logits)), tokens_T[1:]]
  top = logits.max(-1)
  return float((chosen - top - np.log(np.exp(logits - top[:, None]).sum(-1))).mean())


def threads() -> int:
  """CPUs in the affinity mask that the parent left us: the thread count of every contender."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(*packages: str) -> dict[str, str]:
  """Python and the given packages."""
  return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def count_compiles() -> Callable[[], int]:
  """Starts counting XLA compilations; returns what reads the count."""
  import jax
  seen = [0]

  def listen(event: str, duration: float, **_):
    del duration
    seen[0] += event == "/jax/core/compile/backend_compile_duration"

  jax.monitoring.register_event_duration_secs_listener(listen)
  return lambda: seen[0]


def measure(prepared: Prepared, case: Case, seed: int) -> dict[str, Any]:
  """Times one run and checks what it delivered.

  Raises:
    ValueError: when a rollout has not its length, or a log-probability is missing, not finite or positive.
  """
  gc.collect()
  cpu, wall = time.process_time(), time.perf_counter()
  outputs = [prepared.run(seed * case.calls + i) for i in range(case.calls)]
  cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
  for output in outputs:
    _check(output, case)
  return {
      "useful_tokens": case.calls * sum(n for _, n in case.rows),
      "slot_steps": sum(output.slot_steps for output in outputs),
      "cpu_s": cpu,
      "wall_s": wall,
      "mean_logp": _mean_drawn(outputs[0], case),
  }


def _mean_drawn(output: Output, case: Case) -> float | None:
  """Mean log-probability of the drawn tokens, the last of each rollout left out because it may be forced."""
  drawn = np.concatenate([logps[:n - 1] for (_, n), logps in zip(case.rows, output.logps)])
  return float(drawn.mean()) if drawn.size else None


def _check(output: Output, case: Case) -> None:
  if len(output.tokens) != len(case.rows):
    raise ValueError(f"{len(output.tokens)} rollouts came back, {len(case.rows)} were asked for.")
  for i, ((_, n), tokens, logps) in enumerate(zip(case.rows, output.tokens, output.logps)):
    if len(tokens) not in (n - 1, n):
      raise ValueError(f"rollout {i} has {len(tokens)} tokens, not {n}, or {n - 1} and EOS.")
    if len(logps) != len(tokens) or not np.all(np.isfinite(logps)) or np.any(np.asarray(logps) > 1e-4):
      raise ValueError(f"rollout {i}: {len(logps)} log-probabilities for {len(tokens)} tokens, or not of [-inf, 0].")


def serve(prepare: Callable[[Model, Case], Prepared], score: Callable[[Model, list[int]], float],
          packages: tuple[str, ...], n_compiles: Callable[[], int] = lambda: 0) -> None:
  """Answers the parent until it closes stdin.

  Args:
    prepare: compiles and warms up a case.
    score: `mean_logp` of a prompt, by the contender's own network.
    packages: whose versions to report.
    n_compiles: compilations so far.
  """
  cases: dict[str, tuple[Prepared, Case]] = {}
  known: dict[str, dict] = {}  # answers to `setup`

  def setup(key: str, model: dict, case: dict) -> dict:
    if key in known:
      return known[key]
    model, case = Model(**model), Case(**case)
    start = time.perf_counter()
    cases[key] = prepare(model, case), case
    known[key] = {
        "tuned": cases[key][0].tuned, "score": score(model, case.prompts[0]), "versions": versions(*packages),
        "threads": threads(), "setup_s": time.perf_counter() - start, "compiles": n_compiles()}
    return known[key]

  def run(key: str, seed: int) -> dict:
    before = n_compiles()
    return measure(*cases[key], seed) | {"compiles": n_compiles() - before}

  def drop() -> dict:
    cases.clear()
    known.clear()
    gc.collect()
    return {}

  answer({"setup": setup, "run": run, "drop": drop})


def answer(commands: dict[str, Callable[..., dict[str, Any]]]) -> None:
  """Answers the parent's commands, by name, until it closes stdin."""
  answers = _take_stdout()
  for line in sys.stdin:
    request = json.loads(line)
    try:
      result = commands[request.pop("cmd")](**request)
    except Exception as error:  # Whatever a contender raises is its result; the others go on.
      traceback.print_exc()
      result = {"error": f"{type(error).__name__}: {error}"[:2000]}
    print(json.dumps(result), file=answers, flush=True)


def _take_stdout() -> TextIO:
  """The parent's pipe; whatever libraries print goes to stderr instead."""
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  return answers


def fastest(candidates: dict[str, Callable[[], Prepared]], case: Case, seed: int) -> Prepared:
  """The candidate with the fewest CPU-seconds in one warm run each; `tuned` lists all of them."""
  if len(candidates) == 1:
    return next(iter(candidates.values()))()
  best, best_s, figures = None, math.inf, {}
  for name, build in candidates.items():
    prepared = build()
    figures[name] = round(measure(prepared, case, seed)["cpu_s"], 3)
    if figures[name] < best_s:
      best, best_s = prepared, figures[name]
  return Prepared(best.run, best.tuned | {"cpu_s_of_candidates": figures})
