"""Rollout throughput of hbpo_jax, Tunix and transformers on the same network and the same rollouts.

    python benchmarks/rollout.py --quick     # the small model: about 8 minutes on two CPU cores
    python benchmarks/rollout.py             # both models

Prints one JSON line per system, model and case; progress goes to stderr. See benchmarks/README.md. Tunix gets a virtual
environment of its own, benchmarks/.venv-tunix, on first use; HBPO_TUNIX_PYTHON names an existing interpreter instead.
Fails only if hbpo_jax fails.
"""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
TUNIX = "google-tunix==0.1.7"
TUNIX_VENV = HERE / ".venv-tunix"
WORKERS = {"ours": "contenders.ours", "tunix": "contenders.tunix", "transformers": "contenders.hf"}
SYSTEMS = tuple(WORKERS)
SCORE_TOLERANCE = 1e-3  # float32 networks of one set of weights differ by 1e-6; a wrong bias or mask by 1e-1.

_COMMON = dict(head_size=64, vocabulary=4096, rope_theta=10_000.0, rms_eps=1e-6, seed=0)
MODELS = {
    "small": dict(name="small", hidden=256, layers=4, heads=4, kv_heads=2, mlp=1024, **_COMMON),
    "medium": dict(name="medium", hidden=512, layers=8, heads=8, kv_heads=4, mlp=2048, **_COMMON),
}
N_PROMPT, CAP, GROUP, QUERIES = 64, 256, 16, 4
LONG_ROOM = 3072
MEAN_SHARE, SIGMA = 0.35, 0.8  # of `mix`: mean length as a share of the cap, standard deviation of its logarithm
LONG_PROMPT, PREFILL_CALLS = 512, 5
EOS, PAD = 1, 0
CASES = ("full_tight", "full_room3072", "mix", "room_ratio", "prefill_ratio")


class Failed(Exception):
  """A contender could not be started, set up or run."""


def make_prompts(n: int, n_tokens: int, seed: int) -> list[list[int]]:
  """n prompts of n_tokens ids each, none of them EOS or PAD."""
  rng = random.Random(seed)
  vocabulary = range(max(EOS, PAD) + 1, _COMMON["vocabulary"])
  return [rng.choices(vocabulary, k=n_tokens) for _ in range(n)]


def mixed_lengths(n: int, seed: int) -> list[int]:
  """n log-normal lengths, mean MEAN_SHARE * CAP before they are clipped to [1, CAP]."""
  rng = random.Random(seed)
  mu = math.log(MEAN_SHARE * CAP) - SIGMA**2 / 2
  return [min(CAP, max(1, round(rng.lognormvariate(mu, SIGMA)))) for _ in range(n)]


def make_cases(seed: int) -> dict[str, dict[str, Any]]:
  """Keyword arguments of contenders.common.Case, by name."""
  def case(queries, group, lengths, room, n_prompt=N_PROMPT, **more):
    rows = iter(lengths)
    return dict(prompts=make_prompts(queries, n_prompt, seed), lengths=[[next(rows) for _ in range(group)]
                for _ in range(queries)], cap=max(lengths), room=room, slots=GROUP, eos=EOS, pad=PAD) | more

  full = [CAP] * GROUP
  return {
      "full_tight": case(1, GROUP, full, N_PROMPT + CAP),
      "full_room3072": case(1, GROUP, full, LONG_ROOM),
      "mix": case(QUERIES, GROUP, mixed_lengths(QUERIES * GROUP, seed), N_PROMPT + CAP, cap=CAP),
      "prefill_1": case(1, 1, [1], LONG_PROMPT + 1, LONG_PROMPT, calls=PREFILL_CALLS),
      "prefill_16": case(1, GROUP, [1] * GROUP, LONG_PROMPT + 1, LONG_PROMPT, calls=PREFILL_CALLS),
  }


def log(text: str) -> None:
  """Progress, to stderr."""
  print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def tunix_python() -> str:
  """The interpreter that has Tunix; makes its virtual environment on first use.

  Raises:
    Failed: when it cannot be installed.
  """
  if named := os.environ.get("HBPO_TUNIX_PYTHON"):
    return named
  python, done = TUNIX_VENV / "bin" / "python", TUNIX_VENV / "requirement"
  if done.is_file() and done.read_text() == TUNIX:
    return str(python)
  log(f"installing {TUNIX} into {TUNIX_VENV}; takes some minutes, once")
  for command in ([sys.executable, "-m", "venv", "--clear", str(TUNIX_VENV)],
                  [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", TUNIX]):
    result = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if result.returncode:
      sys.stderr.write(result.stderr)
      last = (result.stderr.strip().splitlines() or ["no message"])[-1]
      raise Failed(f"{TUNIX} could not be installed: {last}; or set HBPO_TUNIX_PYTHON to an interpreter that has it.")
  done.write_text(TUNIX)
  return str(python)


class Worker:
  """A contender's process."""

  def __init__(self, system: str, timeout_s: float):
    self.system, self._timeout_s = system, timeout_s
    self.model: str | None = None  # whose cases it holds
    python = tunix_python() if system == "tunix" else sys.executable
    path = {"PYTHONPATH": str(HERE.parent)} if system == "ours" else {}
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"} | path
    try:
      self._process = subprocess.Popen(
          [python, "-m", WORKERS[system]], cwd=HERE, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    except OSError as error:
      raise Failed(f"{python} does not start: {error}") from error

  def ask(self, cmd: str, **more) -> dict[str, Any]:
    """The answer to one command.

    Raises:
      Failed: when the answer is an error, or none comes.
    """
    timer = threading.Timer(self._timeout_s, self._process.kill)
    timer.start()
    try:
      print(json.dumps({"cmd": cmd, **more}), file=self._process.stdin, flush=True)
      line = self._process.stdout.readline()
    except OSError:
      line = ""
    finally:
      timer.cancel()
    if not line:
      code = self._process.wait()
      raise Failed(f"its process ended with code {code} (timeout: {self._timeout_s:.0f} s); see stderr.")
    answer = json.loads(line)
    if "error" in answer:
      raise Failed(answer["error"])
    return answer

  def close(self) -> None:
    """Ends the process, by itself or else by force."""
    with contextlib.suppress(OSError):  # It may be gone already.
      self._process.stdin.close()
    try:
      self._process.wait(10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()


@dataclasses.dataclass
class Contest:
  """Runs cells with the workers it keeps, one of which works at a time."""
  systems: Sequence[str]
  repeats: int
  seed: int
  timeout_s: float

  def __post_init__(self):
    self.workers: dict[str, Worker] = {}
    self.failures: list[str] = []
    self._unavailable: dict[str, str] = {}
    self._cases = make_cases(self.seed)
    self._common = {"seeds": {"lengths_and_prompts": self.seed, "weights": _COMMON["seed"]}, "machine": machine()}

  def close(self) -> None:
    """Ends all workers."""
    for worker in self.workers.values():
      worker.close()

  def compare(self, model: str, name: str) -> Iterator[dict[str, Any]]:
    """One cell per system: alternating runs of one case."""
    ready, errors = self._set_up({system: [name] for system in self.systems}, model)
    self._check_scores(ready, errors)
    runs = self._alternate([(system, name) for system in ready], errors)
    for system in self.systems:
      cell = {"system": system, "model": model, "case": name}
      if system in errors:
        yield cell | self._fail(system, errors[system])
        continue
      mine, peer = runs[system, name], runs.get(("tunix", name)) if "tunix" not in errors else None
      ratios = [_cpu_per_token(p) / _cpu_per_token(r) for p, r in zip(peer, mine)] if peer else []
      yield cell | {
          "useful_tokens_per_s": _median(r["useful_tokens"] / r["wall_s"] for r in mine),
          "tokens_per_cpu_s": _median(1 / _cpu_per_token(r) for r in mine),
          "tokens_per_cpu_s_min": _round(min(1 / _cpu_per_token(r) for r in mine)),
          "tokens_per_cpu_s_max": _round(max(1 / _cpu_per_token(r) for r in mine)),
          "slot_utilisation": _median(r["useful_tokens"] / r["slot_steps"] for r in mine),
          "ratio_to_tunix": _median(ratios) if ratios else None,
          "ratio_to_tunix_min": _round(min(ratios)) if ratios else None,
          "ratio_to_tunix_max": _round(max(ratios)) if ratios else None,
          "useful_tokens": mine[0]["useful_tokens"],
          **self._about(mine, ready[system][name]),
      }

  def ratio(self, model: str, name: str, over: str, under: str, **more) -> Iterator[dict[str, Any]]:
    """One cell: cost of case `over` in units of case `under`, in alternating runs of ours."""
    cell = {"system": "ours", "model": model, "case": name}
    ready, errors = self._set_up({"ours": [under, over]}, model)
    runs = self._alternate([("ours", under), ("ours", over)], errors) if not errors else {}
    if errors:
      yield cell | self._fail("ours", errors["ours"])
      return
    both = list(zip(runs["ours", over], runs["ours", under]))
    cpu = [a["cpu_s"] / b["cpu_s"] for a, b in both]
    yield cell | {
        "ratio": _median(cpu), "ratio_min": _round(min(cpu)), "ratio_max": _round(max(cpu)),
        "ratio_wall": _median(a["wall_s"] / b["wall_s"] for a, b in both),
        "cpu_s": {over: _median(a["cpu_s"] for a, _ in both), under: _median(b["cpu_s"] for _, b in both)},
        **more, **self._about(runs["ours", over] + runs["ours", under], ready["ours"][over]),
    }

  def _worker(self, system: str) -> Worker:
    if system in self._unavailable:
      raise Failed(self._unavailable[system])
    if system not in self.workers:
      try:
        self.workers[system] = Worker(system, self.timeout_s)
      except Failed as error:  # An installation that failed is not tried again at every case.
        self._unavailable[system] = str(error)
        raise
    return self.workers[system]

  def _set_up(self, wanted: dict[str, list[str]], model: str) -> tuple[dict, dict[str, str]]:
    """({system: {case: answer}}, {system: error}) of all cases set up, those of another model dropped."""
    ready: dict[str, dict[str, dict]] = {}
    errors: dict[str, str] = {}
    for system, names in wanted.items():
      log(f"{system}: setting up {' and '.join(names)}, model {model}")
      try:
        worker = self._worker(system)
        if worker.model != model:
          worker.ask("drop")
          worker.model = model
        ready[system] = {
            name: worker.ask("setup", key=name, model=MODELS[model], case=self._cases[name]) for name in names}
        log(f"{system}: " + "; ".join(f"{a['setup_s']:.0f} s, {a['tuned']}" for a in ready[system].values()))
      except Failed as error:
        self._note(system, str(error), ready, errors)
    return ready, errors

  def _alternate(self, turns: list[tuple[str, str]], errors: dict[str, str]) -> dict[tuple[str, str], list[dict]]:
    """The runs of each (system, case): A B C A B C ..."""
    runs: dict[tuple[str, str], list[dict]] = {turn: [] for turn in turns}
    for repeat in range(self.repeats):
      for system, name in turns:
        if system in errors:
          continue
        try:
          run = self.workers[system].ask("run", key=name, seed=repeat + 1)
        except Failed as error:
          self._note(system, str(error), {}, errors)
          continue
        runs[system, name].append(run)
        log(f"{system} {name} {repeat + 1}/{self.repeats}: {run['cpu_s']:.2f} CPU-s, {run['wall_s']:.2f} s, "
            f"{1 / _cpu_per_token(run):.0f} tokens/CPU-s" + (", COMPILED" if run["compiles"] else ""))
    return runs

  def _check_scores(self, ready: dict, errors: dict[str, str]) -> None:
    """Fails a system whose network gives another log-probability to the prompt than the first one's does."""
    scores = {system: next(iter(answers.values()))["score"] for system, answers in ready.items()}
    log(f"mean log-probability of the first prompt: {scores}")
    reference = scores.get("ours", next(iter(scores.values()), 0.0))
    for system, score in scores.items():
      if not abs(score - reference) < SCORE_TOLERANCE:
        self._note(system, f"it runs another network: mean log-probability {score}, not {reference}.", ready, errors)

  def _note(self, system: str, error: str, ready: dict, errors: dict[str, str]) -> None:
    log(f"{system} failed: {error}")
    errors[system] = error
    ready.pop(system, None)
    if system in self.workers:  # The next case gets a fresh process.
      self.workers.pop(system).close()

  def _fail(self, system: str, error: str) -> dict[str, Any]:
    self.failures.append(system)
    return {"error": error, **self._common}

  def _about(self, runs: list[dict], answer: dict) -> dict[str, Any]:
    return {
        "runs": len(runs), "compiles_in_runs": sum(r["compiles"] for r in runs), "tuned": answer["tuned"],
        "mean_logp": runs[0]["mean_logp"], "threads": answer["threads"], "versions": answer["versions"],
        **self._common}


def _cpu_per_token(run: dict[str, Any]) -> float:
  return run["cpu_s"] / run["useful_tokens"]


def _round(value: float) -> float:
  return float(f"{value:.4g}")


def _median(values) -> float:
  return _round(statistics.median(values))


def machine() -> dict[str, Any]:
  """Processor, number of CPUs we may use, and platform."""
  name = platform.processor()
  info = pathlib.Path("/proc/cpuinfo")
  if info.is_file():
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    name = names[0] if names else name
  cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return {"cpu": name, "cpus": cpus, "platform": platform.platform()}


def cells(contest: Contest, models: Sequence[str], names: Sequence[str]) -> Iterator[dict[str, Any]]:
  """All cells, as they become known."""
  for model in models:
    for name in names:
      if name == "room_ratio":
        if "ours" in contest.systems:
          yield from contest.ratio(model, name, "full_room3072", "full_tight", rooms=[LONG_ROOM, N_PROMPT + CAP])
      elif name == "prefill_ratio":
        if "ours" in contest.systems:
          yield from contest.ratio(model, name, "prefill_16", "prefill_1", prompt_tokens=LONG_PROMPT, rows=[GROUP, 1])
      else:
        yield from contest.compare(model, name)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the cells; the exit code is 1 if a cell of hbpo_jax failed."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--quick", action="store_true", help="the small model, 3 repeats")
  parser.add_argument("--repeats", type=int, help="runs of each system per case (default 7, quick 3)")
  parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
  parser.add_argument("--models", nargs="+", choices=MODELS, help="default: all, quick: small")
  parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
  parser.add_argument("--seed", type=int, default=0, help="of the prompts and of the lengths of `mix`")
  parser.add_argument("--timeout", type=float, default=1200, help="seconds a set-up or run may take")
  parser.add_argument("--out", type=pathlib.Path, help="also write the lines to this file")
  args = parser.parse_args(argv)
  contest = Contest(args.systems, args.repeats or (3 if args.quick else 7), args.seed, args.timeout)
  out = args.out.open("w") if args.out else None
  try:
    for cell in cells(contest, args.models or (("small",) if args.quick else tuple(MODELS)), args.cases):
      for stream in filter(None, (sys.stdout, out)):
        print(json.dumps(cell), file=stream, flush=True)
  finally:
    contest.close()
    if out:
      out.close()
  return int("ours" in contest.failures)


if __name__ == "__main__":
  sys.exit(main())
