"""Made-up directories of runs and evaluations, as training and evaluation leave them. NumPy only, no model."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from hbpo_jax import config
from hbpo_jax.data.record import Problem
from hbpo_jax.files import json_line

BUDGETS = (512, 1024, 2048, 2560)
MODES = ("natural", "efficiency", "512")
BENCHMARKS = {"math500": "MATH500", "gsm8k": "GSM8K"}
SENTENCE = "I will answer the question within {budget} tokens."
STEPS = 60
_PIECES = ("Let me think. The sum is {x}. ", "Wait, I should check {x} again. ", "Alternatively, take {x} first. ",
           "So we get {x}, but remember the sign. ", "That gives {x}. ")


def make_evaluation(
    folder: pathlib.Path, *, skill: float = 0.6, tokens: float = 1500.0, seed: int = 0,
    benchmarks: Mapping[str, str] = BENCHMARKS, modes: Sequence[str] = MODES, n_problems: int = 40, k: int = 2,
    texts: Sequence[str] = (), problem_texts: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None) -> pathlib.Path:
  """An evaluation's directory: `skill` is its pass rate, `tokens` its mean length, both bent by difficulty.

  Args:
    texts: replace the first responses of the first benchmark and mode.
    problem_texts: replace the first problems of every benchmark.
    settings: replace entries of the manifest's settings.
  """
  draw = np.random.default_rng(seed)
  for name in ("problems", "responses"):
    (folder / name).mkdir(parents=True, exist_ok=True)
  manifest = {
      "format": 1, "hbpo_jax": "0.1.0", "model": {"path": "models/tiny", "fingerprint": f"f{seed}"},
      "modes": list(modes), "samples_per_problem": k,
      "benchmarks": {name: {"title": title, "n_problems": n_problems} for name, title in benchmarks.items()},
      "settings": {"seed": seed, "eval.temperature": 0.6, "prompt.budget_sentence": SENTENCE} | dict(settings or {})}
  (folder / "eval.json").write_text(json.dumps(manifest, indent=2))
  for place, name in enumerate(benchmarks):
    problems = [
        Problem(id=f"{name}/{i}", problem=problem_texts[i] if i < len(problem_texts) else f"What is {i} + {i % 7}?",
                answer=str(i + i % 7), source="made up", level=i % 5 + 1 if place == 0 else None)
        for i in range(n_problems)]
    (folder / "problems" / f"{name}.jsonl").write_text("".join(json_line(dataclasses.asdict(p)) for p in problems))
    rows = [
        _response(draw, problem, mode, sample, skill, tokens)
        for mode in modes for problem in problems for sample in range(k)]
    if place == 0:
      for row, text in zip(rows, texts):
        row["response"] = text
    # Not json_line, which replaces lone surrogates: a file may come from elsewhere.
    (folder / "responses" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return folder


def make_training_run(folder: pathlib.Path, *, evaluate: bool = True, seed: int = 0, steps: int = STEPS,
                      budgets: Sequence[int] = BUDGETS, changes: Mapping[str, Any] | None = None) -> pathlib.Path:
  """A training run's directory: run.json, metrics.jsonl, samples.jsonl, and evaluations before, within and after.

  Args:
    changes: settings by dotted name that differ from the hbpo profile's.
  """
  draw = np.random.default_rng(seed)
  folder.mkdir(parents=True, exist_ok=True)
  cd = config.new("hbpo")
  for name, value in {"steps": steps, "rollout.budgets": tuple(budgets), "seed": seed, **(changes or {})}.items():
    parent, _, leaf = name.rpartition(".")
    (config.get(cd, parent) if parent else cd)[leaf] = value
  (folder / "run.json").write_text(json.dumps({
      "hbpo_jax": "0.1.0", "started": "2026-01-02T03:04:05+00:00", "command": "train.py --config=made_up",
      "earlier_starts": [], "git": {"commit": "0123456789abcdef", "dirty": False},
      "profile_differences": ["profile hbpo, differing from the paper in:", "  advantage.center_intra = True"],
      "config": config.to_json_dict(config.from_config_dict(cd)), "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
      "devices": {"platform": "cpu", "kind": "cpu", "used": 1, "present": 1, "processes": 1},
      "platform": "Linux", "versions": {"python": "3.11.7", "jax": "0.10.0", "hbpo_jax": "0.1.0"}}, indent=2))
  with open(folder / "metrics.jsonl", "w") as f:
    f.writelines(json_line(metrics_row(draw, step, steps, budgets)) for step in range(steps))
  with open(folder / "samples.jsonl", "w") as f:
    for step in range(0, steps, 10):
      f.writelines(json_line({
          "step": step, "problem": f"What is {step} + 1?", "answer": str(step + 1), "budget": b,
          "response": f"{SENTENCE.format(budget=b)} It is {step + 1}.</think> \\boxed{{{step + 1}}}", "n_gen": b - 100,
          "verdict": "correct", "reward": 3.5, "advantage": 0.25}) for b in budgets)
  if evaluate:
    for name, skill, tokens in (("base", 0.55, 2400.0), ("step_000030", 0.6, 1500.0), ("trained", 0.68, 900.0)):
      make_evaluation(folder / "eval" / name, skill=skill, tokens=tokens, seed=seed, benchmarks={"eval": "held out"},
                      modes=("natural",), k=1)
  return folder


def metrics_row(draw: np.random.Generator, step: int, steps: int, budgets: Sequence[int] = BUDGETS) -> dict[str, Any]:
  """One row of metrics.jsonl, with every tag that the report draws."""
  done = step / max(steps - 1, 1)
  noise = lambda scale: float(draw.normal(0, scale))
  row: dict[str, Any] = {
      "step": step, "reward": 2.0 + done + noise(0.1), "accuracy": min(1.0, 0.55 + 0.12 * done + noise(0.02)),
      "mean_tokens": 2400 - 1500 * done + noise(40), "tokens_std": 600 - 200 * done, "truncated": 0.05 * (1 - done),
      "negative_advantage": 0.45, "zero_variance": 0.02,
      "timeout": 0.04 if 20 <= step < 35 else 0.0, "entropy": 0.6 - 0.25 * done + noise(0.01),
      "length_spread": 500 - 150 * done + noise(10)}
  for i, b in enumerate(budgets):
    mean = (2400 - 1500 * done) * (0.9 + 0.08 * i) + noise(40)
    row |= {
        f"budget_{b}/reward": 2.0 + done, f"budget_{b}/accuracy": 0.6 + 0.1 * done, f"budget_{b}/tokens_mean": mean,
        f"budget_{b}/tokens_std": 500 - 150 * done, f"budget_{b}/overrun": 0.5, f"budget_{b}/truncated": 0.02,
        f"budget_{b}/intra": -1.2 + 0.15 * i + 0.6 * done + noise(0.05),
        f"budget_{b}/inter": 0.1 * (1.5 - i) + noise(0.02),
        f"budget_{b}/inter_abs": 0.75 - 0.1 * done + noise(0.02), f"budget_{b}/sentence_logp": -2.0}
  slot_steps = 60000.0
  share = {"useful": 0.62 + 0.2 * done, "truncated": 0.05 * (1 - done), "overrun": 0.05}
  row |= {"rollout/slot_steps": slot_steps, "rollout/idle": slot_steps * (1 - sum(share.values())),
          "rollout/utilisation": share["useful"]} | {f"rollout/{n}": slot_steps * s for n, s in share.items()}
  row |= {"time/rollout_s": 30 - 14 * done + noise(0.5), "time/grade_s": 2.0 + abs(noise(0.2)),
          "time/score_s": 4 + noise(0.1), "time/update_s": (51 if step == 0 else 12) + noise(0.4)}
  row["time/step_s"] = sum(row[f"time/{n}_s"] for n in ("rollout", "grade", "score", "update"))
  row |= {"update/clip_fraction_low": 0.004 + 0.002 * done, "update/clip_fraction_high": 0.01 + abs(noise(0.001)),
          "update/clip_fraction_dual": 0.0, "update/approx_kl": 0.003, "update/grad_norm": 0.4 + noise(0.02),
          "update/nonfinite": 0.0, "sampler/mean": 1e-5, "sampler/max": 1e-3, "sampler/kl": 1e-6,
          "sampler/outside_clip": 0.0, "tokens_per_s": 2000.0}
  if step and step % 20 == 0:
    row |= {"eval/accuracy": 0.55 + 0.12 * done, "eval/tokens": 2400 - 1500 * done, "eval/truncated": 0.0}
  return row


def _response(draw, problem: Problem, mode: str, sample: int, skill: float, tokens: float) -> dict[str, Any]:
  level = problem.level or 2
  short = {"natural": 1.0, "efficiency": 0.55}.get(mode)
  mean = tokens * (0.5 + 0.25 * level) * short if short else min(float(mode), tokens) * 0.9
  n_gen = int(max(20, mean * draw.lognormal(0, 0.25)))
  correct = bool(draw.random() < skill + 0.12 * (2.5 - level) - (0.04 if mode != "natural" else 0.0))
  reason = "correct" if correct else str(draw.choice(["wrong", "wrong", "no_answer", "unfinished"]))
  given = problem.answer if correct else "" if reason in ("no_answer", "unfinished") else "17"
  chosen = draw.integers(len(_PIECES), size=n_gen // 150 + 1)
  pieces = [_PIECES[int(i)].format(x=int(draw.integers(99))) for i in chosen]
  opening = SENTENCE.format(budget=int(draw.choice(BUDGETS))) + " " if draw.random() < 0.3 and mode == "natural" else ""
  if mode.isdigit():
    opening = SENTENCE.format(budget=mode) + " "
  text = opening + "".join(pieces)
  if reason != "unfinished":
    text += f"\n</think>\n\nWe check: the answer is \\boxed{{{given}}}."
  return {
      "id": problem.id, "mode": mode, "sample": sample, "answer": problem.answer, "level": problem.level,
      "response": text, "n_gen": n_gen, "n_think": n_gen if reason == "unfinished" else int(0.85 * n_gen),
      "truncated": reason == "unfinished", "score": float(correct), "reason": reason, "given": given}
