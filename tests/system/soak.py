"""A run that says every so many steps what it holds: memory, arrays, files, threads, processes, compiled programs.

  python -m tests.system.soak --steps=2000 --every=100 --out=DIR [--graded] [--bare]

With --graded the built-in grading takes the place of a function: every response ends in a box that a worker reads.
With --bare there are steps only, no checkpoint, evaluation or TensorBoard on the way.
"""

import argparse
import ctypes
import gc
import json
import os
import pathlib

import jax

from hbpo_jax import train
from tests.system import faults, runs

_LIBC = ctypes.CDLL(None)


def holdings(n_compiled: int) -> dict[str, int]:
  """What this process holds now; collects garbage first, and gives back what the allocator keeps in reserve."""
  gc.collect()
  if hasattr(_LIBC, "malloc_trim"):
    _LIBC.malloc_trim(0)
  status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
  children = "".join(p.read_text() for p in pathlib.Path("/proc/self/task").glob("*/children")).split()
  resident = lambda pid: int(pathlib.Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])
  arrays = jax.live_arrays()
  return {
      "rss_kib": int(status["VmRSS"].split()[0]), "threads": int(status["Threads"]), "children": len(children),
      "children_kib": sum(map(resident, children)), "files": len(os.listdir("/proc/self/fd")), "arrays": len(arrays),
      "array_bytes": sum(x.nbytes for x in arrays), "objects": len(gc.get_objects()), "compiled": n_compiled}


def settings(folder: pathlib.Path, steps: int, graded: bool, bare: bool) -> dict:
  """Of a run that does all that a long one does, as often as there is time for."""
  grading = {"reward.grader": "", "grading.workers": 2} if graded else {}
  none = {"log.tensorboard": False, "checkpoint.save_every": 0, "data.n_eval": 0, "eval.every": 0} if bare else {}
  return runs.settings(
      folder, steps=steps, rollout__budgets=(8, 12), rollout__caps=(8, 12), reward__max_response_tokens=16,
      prompt__budget_sentence="{budget}", data__max_prompt_tokens=64, optimizer__learning_rate=1e-4,
      checkpoint__save_every=max(1, steps // 20), log__tensorboard=True, log__samples_every=10, data__n_eval=4,
      eval__every=max(1, steps // 20), eval__batch_queries=4, eval__max_new_tokens=8) | grading | none


def main(steps: int, every: int, out: pathlib.Path, graded: bool, bare: bool) -> None:
  """Trains in out/run and writes out/holdings.jsonl, a row every so many steps."""
  out.mkdir(parents=True, exist_ok=True)
  runs.make_inputs(out)
  if graded:
    faults.install("boxed")
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
      lambda event, duration, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None)
  keep = train.Trainer._keep
  with (out / "holdings.jsonl").open("w") as file:

    def watched(self, step, *args):
      keep(self, step, *args)
      if (step + 1) % every == 0:
        self.checkpoints.wait()
        file.write(json.dumps({"step": step + 1, **holdings(len(compiled))}) + "\n")
        file.flush()

    train.Trainer._keep = watched
    train.main(runs.make_config(settings(out, steps, graded, bare)), str(out / "run"))


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("--steps", type=int, default=2000)
  parser.add_argument("--every", type=int, default=100)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--graded", action="store_true")
  parser.add_argument("--bare", action="store_true")
  main(**vars(parser.parse_args()))
