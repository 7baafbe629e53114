"""Which knob to turn when a run does not fit, and what each would save."""

from collections.abc import Iterator
import dataclasses
from typing import Any

from hbpo_jax.config import Config
from hbpo_jax.planning import chips, estimate, memory
from hbpo_jax.planning.chips import Topology
from hbpo_jax.planning.estimate import Estimate
from hbpo_jax.planning.job import Job, make_job

_WORTH = 0.01  # Share of a device's memory that a knob must save to be named.
_MOST_CHANGES = 12


@dataclasses.dataclass(frozen=True)
class Knob:
  """A change, and what it would leave.

  change: as it is written on the command line.
  cost: what else it changes.
  program: which it helps, of those that do not fit.
  saved: bytes per device while that program runs.
  total: what would lie there then.
  fits: whether every program would fit.
  """
  change: str
  cost: str
  program: str
  saved: int
  total: int
  fits: bool


def knobs(made: Estimate) -> list[Knob]:
  """Single changes that help the programs that do not fit, most helpful first."""
  found = []
  too_large = [name for name, total in made.totals.items() if total > made.job.topology.hbm_bytes]
  for change, cost, job in _changes(made.job):
    totals = _totals_after(made, job)
    for name in too_large:
      saved = made.totals[name] - totals[name]
      if saved > _WORTH * made.job.topology.hbm_bytes:
        found.append(Knob(change, cost, name, saved, totals[name], _all_fit(job, totals)))
  return sorted(found, key=lambda k: (k.program, -k.saved))


@dataclasses.dataclass(frozen=True)
class Together:
  """Changes that make a run fit by these estimates.

  changes: as they are written on the command line.
  program, total: which needs most then, and the bytes on a device while it runs.
  step_s: predicted seconds of a step then.
  """
  changes: tuple[str, ...]
  program: str
  total: int
  step_s: float


def together(made: Estimate) -> Together | None:
  """Changes of settings that make the run fit, those without effect on the result first; None where none do."""
  job, applied = made.job, {}
  for _ in range(_MOST_CHANGES):
    totals = _totals_after(made, job)
    worst = max(totals, key=lambda name: totals[name])
    if totals[worst] <= job.topology.hbm_bytes:
      changes = tuple(f"{field}={value}" for field, value in applied.items())
      return Together(changes, worst, totals[worst], estimate.estimate(job, made.lengths).step_s)
    for change, _, candidate in _changes(job):
      if change.startswith("--config.") and (
          totals[worst] - _totals_after(made, candidate)[worst] > _WORTH * job.topology.hbm_bytes):
        field, _, value = change.partition("=")
        applied[field], job = value, candidate
        break
    else:
      return None
  return None


def _all_fit(job: Job, totals: dict[str, int]) -> bool:
  return max(totals.values()) <= job.topology.hbm_bytes


def _totals_after(made: Estimate, job: Job) -> dict[str, int]:
  """What would lie on a device while each program runs; what was compiled before, scaled by the estimates."""
  resident = memory.resident(job)
  before, after = memory.temporaries(made.job), memory.temporaries(job)
  scale = lambda name: made.beyond[name] / before[name] if before.get(name) and name in made.beyond else 1.0
  return {name: resident.beside(name) + int(extra * scale(name)) for name, extra in after.items()}


def _changes(job: Job) -> Iterator[tuple[str, str, Job]]:
  """(change, what else it changes, the Job then), those without effect on the result first."""
  for change, cost, fields in _settings(job):
    try:
      yield change, cost, make_job(_with(job.cfg, fields), job.arch, job.topology, job.n_prefix)
    except ValueError:
      continue  # It does not go with the other settings.
  for topology in _larger(job.topology):
    try:
      yield f"--topology={topology}", "more chips", make_job(job.cfg, job.arch, topology, job.n_prefix)
    except ValueError:
      continue


def _settings(job: Job) -> Iterator[tuple[str, str, dict[str, Any]]]:
  cfg, shards = job.cfg, job.shards
  flag = lambda name, value: (f"--config.{name}={value}", {name: value})
  if job.micro_rows > 1:
    change, fields = flag("learner.microbatch_rows", job.micro_rows // 2 * shards)
    yield change, "no effect on the result", fields
  if cfg.model.remat in ("dots", "none"):
    change, fields = flag("model.remat", "full")
    yield change, "a forward pass more per update", fields
  if cfg.model.remat != "offload":
    change, fields = flag("model.remat", "offload")
    yield change, "every layer's input goes to the host and back, which the times leave out", fields
  slots = job.plan.row_buckets[0]
  if slots // 2 >= shards:
    change, fields = flag("rollout.slots", slots // 2)
    yield change, "more steps of decoding", fields
  if cfg.mesh.data > 1:
    yield "--config.mesh.data=1", "weights and their state over all devices", {"mesh.data": 1, "mesh.fsdp": -1}
  if cfg.rollout.gather_weights and job.mesh.shape["fsdp"] > 1:
    yield "--config.rollout.gather_weights=false", "every decoded token fetches the weights", {
        "rollout.gather_weights": False}
  if cfg.data.max_prompt_tokens > 256:
    change, fields = flag("data.max_prompt_tokens", cfg.data.max_prompt_tokens // 2)
    yield change, "longer problems are dropped", fields
  longest = max(cfg.rollout.budgets)
  if max(cfg.caps) > longest:
    caps = tuple(min(cap, longest) for cap in cfg.caps)
    yield f"--config.rollout.caps={','.join(map(str, caps))}", "longer responses are cut off, and earn nothing", {
        "rollout.caps": caps}


def _with(cfg: Config, fields: dict[str, Any]) -> Config:
  for name, value in fields.items():
    section, _, leaf = name.partition(".")
    cfg = dataclasses.replace(cfg, **{section: dataclasses.replace(getattr(cfg, section), **{leaf: value})})
  return cfg


def _larger(topology: Topology) -> Iterator[Topology]:
  """The topology with its shortest side doubled."""
  sides = list(topology.shape)
  sides[sides.index(min(sides))] *= 2
  yield chips.parse_topology(f"{topology.chip.name}:{'x'.join(map(str, sorted(sides)))}")
