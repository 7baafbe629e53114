"""A whole GRPO step of hbpo_jax and of Tunix: rollout, reward, advantage, log-probabilities, update.

    python benchmarks/step.py --quick     # about 6 minutes on two CPU cores
    python benchmarks/step.py             # more turns, and three first steps for each case

Prints one JSON line per system and case, then one with the targets; progress goes to stderr. See benchmarks/README.md.
Tunix gets a virtual environment of its own, as in rollout.py. Fails only if hbpo_jax fails; a missed target is no
failure.
"""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import math
import pathlib
import random
import sys
import tempfile
from typing import Any

from contenders import parent
from contenders.parent import EOS, MODELS, PAD, Failed, Worker, log, median, rounded

WORKERS = {"ours": "contenders.step_ours", "tunix": "contenders.step_tunix"}
SYSTEMS = tuple(WORKERS)
CASES = ("full", "mix")
N_PROMPT, CAP, GROUP = 64, 256, 16
MEAN_SHARE, SIGMA = 0.4, 0.8  # of `mix`: mean length as a share of the cap, standard deviation of its logarithm
WARM_UP = 2  # steps after the first that are not counted; Tunix's second compiles once more
# Least Tunix step over ours, by case; most of our first step over Tunix's.
STEP_TARGETS, FIRST_TARGETS = {"full": 1.5, "mix": 3.0}, {"first_step": 3.0, "first_step_warm": 0.5}


def mixed_lengths(n: int, seed: int) -> list[int]:
  """n log-normal lengths, clipped to [1, CAP], scaled so that their mean after clipping is MEAN_SHARE * CAP."""
  rng = random.Random(seed)
  draws = [math.exp(SIGMA * rng.gauss(0.0, 1.0)) for _ in range(n)]
  clipped = lambda scale: [min(CAP, max(1, round(scale * x))) for x in draws]
  wanted = round(MEAN_SHARE * CAP * n)
  low, high = 1.0, CAP / min(draws)
  while high - low > 1e-3:
    middle = (low + high) / 2
    low, high = (middle, high) if sum(clipped(middle)) <= wanted else (low, middle)
  return clipped(low)


def make_lengths(case: str, seed: int, turn: int) -> list[int]:
  """Tokens of each response in that turn, the same for all systems."""
  return [CAP] * GROUP if case == "full" else mixed_lengths(GROUP, 1000 * seed + turn)


def make_case(seed: int) -> dict[str, Any]:
  """Keyword arguments of contenders.common.Case; both cases run on it."""
  return dict(prompts=parent.make_prompts(1, N_PROMPT, seed), lengths=[[CAP] * GROUP], cap=CAP, room=N_PROMPT + CAP,
              slots=GROUP, eos=EOS, pad=PAD)


@dataclasses.dataclass
class Contest:
  """Runs the cases with workers of which one works at a time.

  systems: who takes part.
  repeats: turns of each system per case.
  firsts: cold and warm first steps of each system per case.
  one_process: whether a system keeps its process from one case to the next, which then has no first step.
  caches: an empty folder for compilation caches.
  """
  systems: Sequence[str]
  repeats: int
  firsts: int
  one_process: bool
  seed: int
  timeout_s: float
  caches: str

  def __post_init__(self):
    self.workers: dict[str, Worker] = {}
    self.errors: dict[str, str] = {}  # of systems that are out
    seeds = {"lengths_and_prompts": self.seed, "weights": parent.COMMON["seed"]}
    self._common = {"model": "small", "seeds": seeds, "machine": parent.machine()}

  def close(self) -> None:
    """Ends all workers."""
    for worker in self.workers.values():
      worker.close()
    self.workers.clear()

  def cells(self, cases: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One line per system and case, then the one with the targets."""
    lines: list[dict[str, Any]] = []
    for case in cases:
      if not self.one_process:
        self.close()
      firsts = {} if self.workers else self._first_steps(case)
      about, runs = self._about(), self._turns(case)
      for system in self.systems:
        cell = {"system": system, "case": case}
        if system in self.errors:
          cell |= {"error": self.errors[system]}
        else:
          cell |= account(runs[system], runs.get("tunix"), firsts.get(system, [])) | about[system]
        lines.append(cell)
        yield cell | self._common
    yield {"targets": targets(lines), "common": self._common}

  def _first_steps(self, case: str) -> dict[str, list[dict[str, dict]]]:
    """By system: first steps with an empty compilation cache and, in a second process, with what that left.

    The process of the last cold one stays: it takes the turns.
    """
    firsts: dict[str, list[dict]] = {system: [] for system in self.systems}
    for repeat in range(self.firsts):
      for system in in_turn([s for s in self.systems if s not in self.errors], repeat):
        with self._noting(system):
          cache = tempfile.mkdtemp(dir=self.caches)
          if system in self.workers:
            self.workers.pop(system).close()
          self.workers[system], cold = self._first_step(system, case, repeat, cache)
          worker, warm = self._first_step(system, case, repeat, cache)
          worker.close()
          firsts[system].append({"cold": cold, "warm": warm})
          log(f"{system} {case}: first step " + ", ".join(
              f"{name} {a['first_step_s']:.1f} s ({a['first_step_cpu_s']:.1f} CPU-s, {a['compiles']} programs)"
              for name, a in firsts[system][-1].items()))
    return firsts

  def _first_step(self, system: str, case: str, turn: int, cache: str) -> tuple[Worker, dict[str, Any]]:
    """A new process that has done one step, and what it says of it."""
    # The same for both, with the threshold that hbpo_jax sets itself.
    env = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    worker = Worker(system, WORKERS[system], self.timeout_s, env)
    try:
      worker.ask("build", model=MODELS["small"], case=make_case(self.seed))
      return worker, worker.ask("first", lengths=make_lengths(case, self.seed, turn), seed=turn)
    except Failed:
      worker.close()
      raise

  def _about(self) -> dict[str, dict[str, Any]]:
    """What each system says of itself; one with another network is out."""
    answers = {}
    for system in list(self.workers):
      with self._noting(system):
        answers[system] = self.workers[system].ask("about")
    for system, error in parent.wrong_networks({s: a.pop("score") for s, a in answers.items()}).items():
      with self._noting(system):
        raise Failed(error)
    return answers

  def _turns(self, case: str) -> dict[str, list[dict[str, Any]]]:
    """The steps that count, by system: A B B A A B ..."""
    runs: dict[str, list[dict]] = {system: [] for system in self.systems}
    for turn in range(-WARM_UP, self.repeats):
      number = self.firsts + WARM_UP + turn  # The first steps had the numbers before.
      for system in in_turn([s for s in self.systems if s in self.workers], turn):
        with self._noting(system):
          run = self.workers[system].ask("step", lengths=make_lengths(case, self.seed, number), seed=number)
          log(f"{system} {case} {max(0, turn + 1)}/{self.repeats}: {run['step_s']:.2f} s (rollout "
              f"{run['rollout_s']:.2f}, update {run['update_s']:.2f}), {run['cpu_s']:.2f} CPU-s"
              + (", COMPILED" if run["compiles"] else ""))
          if turn >= 0:
            runs[system].append(run)
    return {system: steps for system, steps in runs.items() if system not in self.errors}

  @contextlib.contextmanager
  def _noting(self, system: str) -> Iterator[None]:
    """Takes out a system that fails."""
    try:
      yield
    except Failed as error:
      log(f"{system} failed: {error}")
      self.errors[system] = str(error)
      if system in self.workers:
        self.workers.pop(system).close()


def in_turn(systems: Sequence[str], turn: int) -> Sequence[str]:
  """The systems, in the other direction in every other turn."""
  return systems if turn % 2 == 0 else systems[::-1]


def account(mine: list[dict], tunix: list[dict] | None, firsts: list[dict[str, dict]]) -> dict[str, Any]:
  """The figures of one system and case; those that were not measured are None.

  Args:
    mine, tunix: the steps of this system and of Tunix, turn by turn.
    firsts: cold and warm first steps.
  """
  first = lambda kind, name: median(f[kind][name] for f in firsts) if firsts else None
  ratios = [p["step_s"] / r["step_s"] for p, r in zip(tunix or [], mine)]
  cpu = [p["cpu_s"] / r["cpu_s"] for p, r in zip(tunix or [], mine)]
  return {
      "step_s": median(r["step_s"] for r in mine), "step_cpu_s": median(r["cpu_s"] for r in mine),
      "rollout_s": median(r["rollout_s"] for r in mine), "update_s": median(r["update_s"] for r in mine),
      "first_step_s": first("cold", "first_step_s"), "first_step_cpu_s": first("cold", "first_step_cpu_s"),
      "first_step_warm_s": first("warm", "first_step_s"), "first_step_warm_cpu_s": first("warm", "first_step_cpu_s"),
      "ratio_to_tunix": median(ratios) if ratios else None,
      "ratio_to_tunix_min": rounded(min(ratios)) if ratios else None,
      "ratio_to_tunix_max": rounded(max(ratios)) if ratios else None,
      "ratio_to_tunix_cpu": median(cpu) if cpu else None,
      "useful_tokens": rounded(sum(r["useful_tokens"] for r in mine) / len(mine)),
      "runs": len(mine), "compiles_in_runs": sum(r["compiles"] for r in mine), "first_steps": len(firsts),
  }


def targets(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """What was to be reached, what was, and whether: by wall time, which is what `met` judges, and by CPU time.

  Args:
    cells: of all systems and cases; a target whose figures are missing is left out.
  """
  found = {(cell["system"], cell["case"]): cell for cell in cells}
  result = []
  for case in CASES:
    ours, tunix = (found.get((system, case), {}) for system in ("ours", "tunix"))
    if (ratio := ours.get("ratio_to_tunix")) is not None:
      least = STEP_TARGETS[case]
      result.append({"case": case, "what": "step_s, Tunix / ours", "at_least": least, "measured": ratio,
                     "measured_cpu": ours["ratio_to_tunix_cpu"], "met": ratio >= least})
    for name, most in FIRST_TARGETS.items():
      # Tunix by itself keeps no cache: its first step is a cold one.
      if ours.get(f"{name}_s") is not None and tunix.get("first_step_s") is not None:
        ratio, cpu = (ours[f"{name}_{unit}"] / tunix[f"first_step_{unit}"] for unit in ("s", "cpu_s"))
        result.append({"case": case, "what": f"{name}_s, ours / first_step_s, Tunix", "at_most": most,
                       "measured": rounded(ratio), "measured_cpu": rounded(cpu), "met": ratio <= most})
  return result


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the cases; the exit code is 1 if hbpo_jax failed."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--quick", action="store_true", help="5 turns; first steps once, for the first case only")
  parser.add_argument("--repeats", type=int, help="steps of each system per case (default 11, quick 5)")
  parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
  parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
  parser.add_argument("--seed", type=int, default=0, help="of the prompt and of the lengths of `mix`")
  parser.add_argument("--timeout", type=float, default=1200, help="seconds a first step may take")
  parser.add_argument("--out", type=pathlib.Path, help="also write the lines to this file")
  args = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as caches:
    contest = Contest(
        systems=args.systems, repeats=args.repeats or (5 if args.quick else 11), firsts=1 if args.quick else 3,
        one_process=args.quick, seed=args.seed, timeout_s=args.timeout, caches=caches)
    try:
      parent.print_cells(contest.cells(args.cases), args.out)
    finally:
      contest.close()
  return int("ours" in contest.errors)


if __name__ == "__main__":
  sys.exit(main())
