"""Does a run fit, how long does a step take at least, how long probably, and what would make it fit."""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

from hbpo_jax.planning import counts, decoding, memory
from hbpo_jax.planning.compile import Compiled
from hbpo_jax.planning.counts import Cost
from hbpo_jax.planning.decoding import Decoding
from hbpo_jax.planning.job import Job
from hbpo_jax.planning.memory import Resident

# Shares of the peaks that a phase is taken to reach. Nothing here was measured on a TPU: they are round numbers in the
# range that well-tuned programs of this kind reach, and a prediction is no better than they are.
EFFICIENCY = {"compute": 0.5, "memory": 0.7, "network": 0.7}
SEGMENT_S = 0.005  # Assumed time of the host between two segments of decoding, which no device works in.


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Assumed lengths: sampled tokens of a response before its cap (None: each budget's own), tokens of a prompt."""
  mean_tokens: float | None
  mean_prompt: int


@dataclasses.dataclass(frozen=True)
class Estimate:
  """The plan of one Job; sizes in bytes per device, times in seconds.

  resident: what stays between programs.
  beyond: what each program needs besides its arguments; from the compiler where it ran, else estimated.
  costs: of a step, by phase.
  compiled: by program; empty where nothing was compiled.
  """
  job: Job
  decoding: Decoding
  lengths: Lengths
  resident: Resident
  beyond: Mapping[str, int]
  costs: Mapping[str, Cost]
  compiled: Mapping[str, Compiled]

  @functools.cached_property
  def totals(self) -> dict[str, int]:
    """What lies on a device while each program runs."""
    return {name: self.resident.beside(name) + extra for name, extra in self.beyond.items()}

  @property
  def peak(self) -> tuple[str, int]:
    """(the program that needs most, what lies on a device while it runs)."""
    return max(self.totals.items(), key=lambda item: item[1])

  @property
  def phase_peaks(self) -> dict[str, int]:
    """The most that lies on a device in each phase."""
    return {
        phase: max(total for name, total in self.totals.items() if memory.PHASE_OF[name] == phase)
        for phase in (memory.ROLLOUT, memory.UPDATE)}

  @property
  def failed(self) -> list[Compiled]:
    """Programs that the compiler refused for another reason than memory."""
    return [c for c in self.compiled.values() if c.error]

  @property
  def fits(self) -> bool:
    """Whether every program leaves no more on a device than it holds, and compiles where that was tried."""
    return self.peak[1] <= self.job.topology.hbm_bytes and all(c.ok for c in self.compiled.values())

  def bounds(self, phase: str) -> dict[str, float]:
    """Seconds that the phase takes at least, by compute, memory and network, each alone and at its peak."""
    cost, topology = self.costs[phase], self.job.topology
    return {
        "compute": cost.flops / topology.flops_s, "memory": cost.hbm_bytes / topology.hbm_bytes_s,
        "network": cost.network_bytes / topology.network_bytes_s}

  def bound_s(self, phase: str) -> float:
    """Seconds that the phase takes at least, if the three overlap in full."""
    return max(self.bounds(phase).values())

  def predicted_s(self, phase: str) -> float:
    """Seconds of the phase at the assumed efficiencies, the three overlapping in full."""
    seconds = max(bound / EFFICIENCY[name] for name, bound in self.bounds(phase).items())
    return seconds + (self.decoding.n_segments * SEGMENT_S if phase == "decode" else 0.0)

  @property
  def step_s(self) -> float:
    """Predicted seconds of a step, without grading and data, which the host does meanwhile."""
    return sum(map(self.predicted_s, self.costs))

  @property
  def step_bound_s(self) -> float:
    """Seconds that a step takes at least."""
    return sum(map(self.bound_s, self.costs))

  def tpu_hours(self, step_s: float) -> float:
    """Chips x hours of the whole run at this duration of a step."""
    return self.job.topology.n_chips * self.job.cfg.steps * step_s / 3600

  def to_json(self) -> dict[str, Any]:
    """The contents of plan.json; FLOPs, bytes and seconds are of one device."""
    job = self.job
    return {
        "topology": str(job.topology), "devices": job.topology.n_devices, "mesh": dict(job.mesh.shape),
        "architecture": dataclasses.asdict(job.arch), "n_prefix": job.n_prefix, "fits": self.fits,
        "hbm_bytes": job.topology.hbm_bytes, "resident_bytes": self.resident.params + self.resident.optimizer,
        "arrays_bytes": dataclasses.asdict(self.resident),
        "peak_bytes": self.phase_peaks, "programs": [self._program(name) for name in self.beyond],
        "decoding": dataclasses.asdict(self.decoding), "efficiency": EFFICIENCY, "segment_s": SEGMENT_S,
        "step_bound_s": self.step_bound_s, "step_s": self.step_s, "steps": job.cfg.steps,
        "tpu_hours_bound": self.tpu_hours(self.step_bound_s), "tpu_hours": self.tpu_hours(self.step_s)}

  def _program(self, name: str) -> dict[str, Any]:
    """An entry of `programs`: memory of the largest of its kind, the work of a step, collectives of one execution."""
    cost, compiled = self.costs[name], self.compiled.get(name)
    kinds: dict[str, dict[str, int]] = {}
    for c in compiled.collectives if compiled else ():
      kind = kinds.setdefault(c.kind, {"times": 0, "bytes": 0})
      kind["times"] += c.times
      kind["bytes"] += c.total_bytes
    return {
        "name": name, "peak_bytes": self.totals[name], "resident_bytes": self.resident.beside(name),
        "temporary_bytes": self.beyond[name], "flops": cost.flops, "bytes": cost.hbm_bytes,
        "network_bytes": cost.network_bytes, "bounds_s": self.bounds(name), "bound_s": self.bound_s(name),
        "predicted_s": self.predicted_s(name), "collectives": kinds,
        "compiled": dataclasses.asdict(compiled) if compiled else None}


def estimate(job: Job, lengths: Lengths, compiled: Mapping[str, Compiled] | None = None) -> Estimate:
  """The Estimate of a Job, with what the compiler said of its programs, if anything."""
  compiled = compiled or {}
  resident = memory.resident(job)
  decoded = decoding.simulate(job, mean_tokens=lengths.mean_tokens, mean_prompt=lengths.mean_prompt)
  costs = counts.step(job, decoded)
  beyond = memory.temporaries(job)
  runs = {
      "prefill": -(-job.shape.n_queries // job.plan.prefill_queries), "decode": decoded.n_segments,
      "update": job.cfg.learner.minibatches}
  for name, c in compiled.items():
    if c.ok:
      # The compiler's arguments are larger where tiles are padded.
      beyond[name] = c.beyond_arguments + max(0, c.argument - memory.arguments(job, name))
      moved = sum(x.total_bytes for x in c.collectives) * runs.get(name, 1)
      costs[name] = dataclasses.replace(costs[name], network_bytes=float(moved))
    elif c.needed:  # The compiler stops at a lower bound.
      beyond[name] = max(c.needed, beyond[name])
  return Estimate(job, decoded, lengths, resident, beyond, costs, compiled)

