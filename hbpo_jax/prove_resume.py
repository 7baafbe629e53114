"""Proves that a run that is killed and started again ends as one that was not: bit for bit, item by item.

  python -m hbpo_jax.prove_resume --config=smoke --workdir=/tmp/proof --steps=6 --cut=2,4 --at=update

Runs the training command to --steps in WORKDIR/uninterrupted, and in WORKDIR/cut once more, killed (SIGKILL) when as
many steps were done as --cut says, at the point that --at names, and started again. Then it compares hashes of
everything that decides how a run goes on, and of everything that it leaves. Exit code 0: all are equal. 1: the first
difference is named. 2: there was no comparison.
"""

from hbpo_jax import flags

if __name__ == "__main__":
  flags.show_help("prove_resume")  # Before the imports below, which take seconds.

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from hbpo_jax import config
from hbpo_jax.config import Config
from hbpo_jax.evaluation import store
from hbpo_jax.files import atomic_write_text, read_rows
from hbpo_jax.learning.checkpoint import FOLDERS, ITEMS
from hbpo_jax.reporting import digests, samples, writers
from hbpo_jax.reporting.tables import Table

PLACES = ("rollout", "update", "grading", "checkpoint")
# Wall time is not a part of what is computed, nor are rates and memory.
VOLATILE = ("time/", "tokens_per_s", "learn/", "memory/")
_SIDES = ("uninterrupted", "cut")
# What each column of digests.jsonl shows, as the table has it.
_DIGESTS = {
    "data": ("problems", "prompts"), "random keys": ("key",), "rollouts: tokens": ("tokens", "lengths"),
    "rollouts: log-probabilities": ("log_probabilities",), "verdicts": ("verdicts",), "advantages": ("advantages",),
    "params after each step": ("params",), "optimizer after each step": ("optimizer",)}
# Fields of TrainState, as the table has them.
_STATE = {
    "params": ("params",), "optimizer state": ("opt_state",), "reward's memory": ("memory",),
    "steps and updates done": ("step", "update")}


@dataclasses.dataclass(frozen=True)
class Item:
  """One line of the proof.

  name: what is compared.  count: of how many things.  hashes: SHA-256, hex, of each side; '' where it is missing.
  difference: the first thing that differs, in words; '' where the sides are equal.
  """
  name: str
  count: int
  hashes: tuple[str, str]
  difference: str = ""


def compare(one: str | os.PathLike, other: str | os.PathLike) -> list[Item]:
  """The items of two working directories of training, in the order in which a difference would spread.

  Raises:
    FileNotFoundError: when a run has no checkpoint.
  """
  roots = pathlib.Path(one), pathlib.Path(other)
  items = []
  tables = [_by_step(root / digests.FILE) for root in roots]
  for name, columns in _DIGESTS.items():
    items.append(_item(name, *({
        f"{column} of step {step}": row.get(column) for step, row in table.items() for column in columns}
        for table in tables)))
  saved = [_checkpoint(root) for root in roots]
  for name, parts in _STATE.items():
    items.append(_item(name, *({k: v for k, v in arrays.items() if k.split("/")[0] in parts} for arrays, _ in saved)))
  items.append(_item("data position", *({"data state": meta["data_state"]} for _, meta in saved)))
  stable = lambda row: {k: v for k, v in row.items() if not k.startswith(VOLATILE)}
  for name, file, keep in (("metrics", writers.METRICS, stable), ("samples", samples.FILE, dict)):
    items.append(_item(name, *({
        f"{tag} of step {row['step']}, row {i}": value for i, row in enumerate(_rows(root / file))
        for tag, value in keep(row).items()} for root in roots)))
  items.append(_item("evaluations", *(dict(_evaluations(root)) for root in roots)))
  items.append(_item("best checkpoint", *(_best(root) for root in roots)))
  items.append(_item("export", *(_files(root / "export") for root in roots)))
  return items


def show(items: Sequence[Item]) -> str:
  """The table of a proof."""
  verdict = lambda item: "DIFFERS" if item.difference else "equal" if item.count else "none"
  rows = tuple(
      (item.name, f"{item.count:,}", *((h[:12] or "-") for h in item.hashes), verdict(item)) for item in items)
  return Table("", ("item", "things", *_SIDES, ""), rows, has_total=False).to_text().lstrip()


def _item(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> Item:
  difference = ""
  for key in [*one, *(k for k in other if k not in one)]:
    a, b = (side.get(key, "nothing") for side in (one, other))
    if a != b:
      difference = f"{key}: {_short(a)} in the uninterrupted run, {_short(b)} in the one that was cut"
      break
  return Item(name, max(len(one), len(other)), (_hash(one), _hash(other)), difference)


def _short(value: Any) -> str:
  text = value if isinstance(value, str) else json.dumps(value)
  return text if len(text) <= 80 else text[:77] + "..."


def _hash(side: Mapping[str, Any]) -> str:
  return digests.of_json(dict(side)) if side else ""


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
  return read_rows(path) if path.exists() else []


def _by_step(path: pathlib.Path) -> dict[int, dict[str, Any]]:
  return {row["step"]: row for row in _rows(path)}


def _checkpoint(root: pathlib.Path) -> tuple[dict[str, str], dict[str, Any]]:
  """(SHA-256 of every array by its name, meta) of the newest checkpoint of a run."""
  steps = [int(p.name) for p in (root / FOLDERS[0]).glob("*") if p.name.isdecimal()]
  if not steps:
    raise FileNotFoundError(f"{root / FOLDERS[0]} holds no checkpoint; a proof compares those of finished runs.")
  folder = root / FOLDERS[0] / str(max(steps))
  reader = ocp.PyTreeCheckpointHandler()
  # As NumPy arrays: on which devices they were does not matter here, nor whether these are free.
  arrays = reader.restore(folder / ITEMS[0], args=ocp.args.PyTreeRestore(restore_args=jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(folder / ITEMS[0]).tree)))
  reader.close()
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
    array, name = np.ascontiguousarray(leaf), jax.tree_util.keystr(path, simple=True, separator="/")
    found[name] = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
  return found, json.loads((folder / ITEMS[1] / "metadata").read_text())["meta"]


def _evaluations(root: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """(name, response and verdict) of all that the evaluations of a run hold, in a fixed order."""
  for folder in sorted((root / "eval").glob("*")):
    if store.is_evaluation(folder):
      for name, rows in store.open_existing(folder).rows.items():
        for row in rows:
          yield f"{folder.name} {name} {row['id']} {row['mode']} {row['sample']}", digests.of_json(row)


def _best(root: pathlib.Path) -> dict[str, Any]:
  path = root / "best" / "best.json"
  return {"best step": json.loads(path.read_text())} if path.exists() else {}


def _files(folder: pathlib.Path) -> dict[str, str]:
  """SHA-256 of every file; of the card without the line that says which commit it was made with."""
  content = lambda p: b"".join(
      line for line in p.read_bytes().splitlines(True) if p.suffix != ".md" or not line.startswith(b"Made with"))
  return {p.relative_to(folder).as_posix(): hashlib.sha256(content(p)).hexdigest()
          for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- the runs --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a command line asks for.  arguments: of the training command, without its workdir.  cfg: what they come to."""
  steps: int
  cuts: tuple[int, ...]
  at: str
  stop: bool
  arguments: tuple[str, ...]
  cfg: Config
  workdir: pathlib.Path


def parse(argv: Sequence[str]) -> Plan:
  """The plan of a command line.

  Raises:
    ValueError: when a flag is missing or not understood, or a cut lies outside of the run.
  """
  own, rest = {"at": "rollout"}, []
  for argument in argv:
    name, equals, value = argument.partition("=")
    if name in ("--steps", "--cut", "--at") and equals:
      own[name[2:]] = value
    elif argument != "--stop":
      rest.append(argument)
  for name, example in (("steps", "6"), ("cut", "3 or 2,4")):
    if not all(part.isdecimal() for part in own.get(name, "").split(",")):
      raise ValueError(f"--{name}={own.get(name, '')} is no number; give --{name}={example}.")
  steps, cuts = int(own["steps"]), tuple(int(k) for k in own["cut"].split(","))
  if not all(a < b for a, b in zip((0, *cuts), (*cuts, steps), strict=True)):
    raise ValueError(f"--cut={own['cut']} does not lie within the run, ascending; give numbers from 1 to {steps - 1}.")
  if own["at"] not in PLACES:
    raise ValueError(f"--at={own['at']} is not a place; choose one of {', '.join(PLACES)}.")
  # A cut between two checkpoints proves more than one right after one: steps are then computed again.
  every = max(1, cuts[0] // 2)
  if not any(a.startswith("--config.checkpoint.save_every") for a in rest):
    rest.append(f"--config.checkpoint.save_every={every}")
  rest += [f"--config.steps={steps}", "--config.log.digests=true", "--config.log.live=false"]
  line = flags.parse(rest, name="prove_resume")
  arguments = tuple(a for a in rest if not a.startswith("--workdir"))
  return Plan(steps, cuts, own["at"], "--stop" in argv, arguments, line.cfg, pathlib.Path(line.workdir))


def prove(plan: Plan, say: Callable[[str], None] = print) -> list[Item]:
  """Runs everything in child processes, and compares.

  Raises:
    ValueError: when the working directory holds something, or a run does not end as it should.
  """
  one, other = (plan.workdir / side for side in _SIDES)
  for folder in (one, other):
    if folder.exists():
      raise ValueError(f"--workdir={plan.workdir} holds an earlier proof ({folder.name}); give an empty one.")
  plan.workdir.mkdir(parents=True, exist_ok=True)
  say(f"uninterrupted: {plan.steps} steps in {one}")
  _run(plan, one, "", 0)
  for cut in plan.cuts:
    point = _point(plan, cut)
    say(f"cut: {'stopped' if plan.stop else 'killed'} at {point} in {other}")
    _run(plan, other, point, 0 if plan.stop else -9)
  say(f"cut: started again to the end, step {plan.steps}")
  _run(plan, other, "", 0)
  items = compare(one, other)
  facts = {
      "steps": plan.steps, "cuts": plan.cuts, "at": plan.at, "stop": plan.stop,
      "config": config.to_json_dict(plan.cfg), "items": [dataclasses.asdict(item) for item in items]}
  atomic_write_text(plan.workdir / "proof.json", json.dumps(facts, indent=2) + "\n")
  return items


def _point(plan: Plan, cut: int) -> str:
  """Where the run ends when `cut` steps are done, as hbpo_jax.killpoints names it."""
  action = "term" if plan.stop else "kill"
  if plan.at == "checkpoint":
    every = plan.cfg.checkpoint.save_every
    due = [s for s in range(cut, plan.steps + 1) if s == plan.steps or (every and s % every == 0)]
    return f"checkpoint_written:{due[0]}:0:{action}"
  between = int(plan.at == "update" and plan.cfg.learner.minibatches > 1)
  return f"{plan.at}:{cut}:{between}:{action}"


def _run(plan: Plan, workdir: pathlib.Path, point: str, expected: int) -> None:
  module = ["hbpo_jax.killpoints", point, "train"] if point else ["hbpo_jax.train"]
  command = [sys.executable, "-m", *module, *plan.arguments, f"--workdir={workdir}"]
  with tempfile.TemporaryFile("w+", errors="replace") as output:
    done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    output.seek(0)
    last = "".join(output.readlines()[-20:])
  if done.returncode != expected:
    reason = f"was not ended at {point}" if point and not done.returncode else f"ended with code {done.returncode}"
    raise ValueError(f"the run in {workdir} {reason}, not {expected}; its last words were:\n{last}")


def main(argv: Sequence[str]) -> int:
  """The exit code: 0 if all is equal, 1 if not."""
  plan = parse(argv)
  items = prove(plan, lambda text: print(text, flush=True))
  print(show(items))
  wrong = [item for item in items if item.difference]
  if wrong:
    print(f"NOT the same run: {wrong[0].name}, {wrong[0].difference}")
    return 1
  print(f"the same run, bit for bit: {sum(item.count for item in items):,} things equal after {len(plan.cuts)} cut(s)")
  return 0


def cli(argv: Sequence[str] | None = None) -> None:
  """Runs the command with these arguments; None means the process's."""
  arguments = list(sys.argv[1:] if argv is None else argv)
  flags.show_help("prove_resume", arguments)
  with flags.one_line_errors(arguments):
    sys.exit(main(arguments))


if __name__ == "__main__":
  cli()
