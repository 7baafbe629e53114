"""Rollout throughput of hbpo_jax, Tunix and transformers on the same network and the same rollouts.

    python benchmarks/rollout.py --quick     # the small model: about 8 minutes on two CPU cores
    python benchmarks/rollout.py             # both models

Prints one JSON line per system, model and case; progress goes to stderr. See benchmarks/README.md. Tunix gets a virtual
environment of its own, benchmarks/.venv-tunix, on first use; HBPO_TUNIX_PYTHON names an existing interpreter instead.
Fails only if hbpo_jax fails.
"""

import argparse
from collections.abc import Iterator, Sequence
import dataclasses
import math
import pathlib
import random
import sys
from typing import Any

from contenders import parent
from contenders.parent import EOS, MODELS, PAD, Failed, Worker, log, median, rounded

WORKERS = {"ours": "contenders.ours", "tunix": "contenders.tunix", "transformers": "contenders.hf"}
SYSTEMS = tuple(WORKERS)
N_PROMPT, CAP, GROUP, QUERIES = 64, 256, 16, 4
LONG_ROOM = 3072
MEAN_SHARE, SIGMA = 0.35, 0.8  # of `mix`: mean length as a share of the cap, standard deviation of its logarithm
LONG_PROMPT, PREFILL_CALLS = 512, 5
CASES = ("full_tight", "full_room3072", "mix", "room_ratio", "prefill_ratio")


def mixed_lengths(n: int, seed: int) -> list[int]:
  """n log-normal lengths, mean MEAN_SHARE * CAP before they are clipped to [1, CAP]."""
  rng = random.Random(seed)
  mu = math.log(MEAN_SHARE * CAP) - SIGMA**2 / 2
  return [min(CAP, max(1, round(rng.lognormvariate(mu, SIGMA)))) for _ in range(n)]


def make_cases(seed: int) -> dict[str, dict[str, Any]]:
  """Keyword arguments of contenders.common.Case, by name."""
  def case(queries, group, lengths, room, n_prompt=N_PROMPT, **more):
    rows = iter(lengths)
    return dict(prompts=parent.make_prompts(queries, n_prompt, seed), lengths=[[next(rows) for _ in range(group)]
                for _ in range(queries)], cap=max(lengths), room=room, slots=GROUP, eos=EOS, pad=PAD) | more

  full = [CAP] * GROUP
  return {
      "full_tight": case(1, GROUP, full, N_PROMPT + CAP),
      "full_room3072": case(1, GROUP, full, LONG_ROOM),
      "mix": case(QUERIES, GROUP, mixed_lengths(QUERIES * GROUP, seed), N_PROMPT + CAP, cap=CAP),
      "prefill_1": case(1, 1, [1], LONG_PROMPT + 1, LONG_PROMPT, calls=PREFILL_CALLS),
      "prefill_16": case(1, GROUP, [1] * GROUP, LONG_PROMPT + 1, LONG_PROMPT, calls=PREFILL_CALLS),
  }


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
    seeds = {"lengths_and_prompts": self.seed, "weights": parent.COMMON["seed"]}
    self._common = {"seeds": seeds, "machine": parent.machine()}

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
          "useful_tokens_per_s": median(r["useful_tokens"] / r["wall_s"] for r in mine),
          "tokens_per_cpu_s": median(1 / _cpu_per_token(r) for r in mine),
          "tokens_per_cpu_s_min": rounded(min(1 / _cpu_per_token(r) for r in mine)),
          "tokens_per_cpu_s_max": rounded(max(1 / _cpu_per_token(r) for r in mine)),
          "slot_utilisation": median(r["useful_tokens"] / r["slot_steps"] for r in mine),
          "ratio_to_tunix": median(ratios) if ratios else None,
          "ratio_to_tunix_min": rounded(min(ratios)) if ratios else None,
          "ratio_to_tunix_max": rounded(max(ratios)) if ratios else None,
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
        "ratio": median(cpu), "ratio_min": rounded(min(cpu)), "ratio_max": rounded(max(cpu)),
        "ratio_wall": median(a["wall_s"] / b["wall_s"] for a, b in both),
        "cpu_s": {over: median(a["cpu_s"] for a, _ in both), under: median(b["cpu_s"] for _, b in both)},
        **more, **self._about(runs["ours", over] + runs["ours", under], ready["ours"][over]),
    }

  def _worker(self, system: str) -> Worker:
    if system in self._unavailable:
      raise Failed(self._unavailable[system])
    if system not in self.workers:
      try:
        self.workers[system] = Worker(system, WORKERS[system], self.timeout_s)
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
    for system, error in parent.wrong_networks(scores).items():
      self._note(system, error, ready, errors)

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
  try:
    models = args.models or (("small",) if args.quick else tuple(MODELS))
    parent.print_cells(cells(contest, models, args.cases), args.out)
  finally:
    contest.close()
  return int("ours" in contest.failures)


if __name__ == "__main__":
  sys.exit(main())
