"""Tries splits of the mesh, micro-batches, slots and model.remat: all by counting, the best few by compiling."""

from collections.abc import Callable, Iterator
import dataclasses
import itertools
from typing import Any

from hbpo_jax.config import Config
from hbpo_jax.planning import compile as compile_lib
from hbpo_jax.planning import estimate, programs
from hbpo_jax.planning.chips import Topology
from hbpo_jax.planning.compile import Compiled
from hbpo_jax.planning.estimate import Estimate, Lengths
from hbpo_jax.planning.job import Job, make_job

ROWS_PER_DEVICE = (1, 2, 4, 8)
SLOTS_PER_DEVICE = (16, 32, 64, 128)
REMAT = ("full", "dots", "none")  # Not offload: how fast a host takes and gives back is nowhere said.
MOST_COMPILED = 3


def candidates(job: Job) -> Iterator[Job]:
  """The Jobs of a small grid around a configuration: those that its settings allow."""
  cfg, topology = job.cfg, job.topology
  rows = job.shape.n_responses // cfg.learner.minibatches
  for (data, fsdp, tensor), remat in itertools.product(_splits(topology, job), REMAT):
    shards = data * fsdp
    for micro in sorted({min(n * shards, rows) for n in ROWS_PER_DEVICE}):
      for slots in sorted({min(n * shards, -(-job.shape.n_responses // shards) * shards) for n in SLOTS_PER_DEVICE}):
        try:
          changed = _settings(cfg, data, fsdp, tensor, micro, slots, remat)
          yield make_job(changed, job.arch, topology, job.n_prefix)
        except ValueError:
          continue  # The batch does not divide over these shards, or the like.


def rank(job: Job, lengths: Lengths) -> list[Estimate]:
  """Every candidate by counting: those that fit first, fastest first."""
  found = [estimate.estimate(candidate, lengths) for candidate in candidates(job)]
  return sorted(found, key=lambda e: (not e.fits, e.step_s if e.fits else e.peak[1]))


def compile_best(
    ranked: list[Estimate], *, n_processes: int, progress: Callable[[Job, Compiled], Any] = lambda job, c: None,
) -> list[Estimate]:
  """The ranking with its first few compiled, and sorted again."""
  best = []
  for made in ranked[:MOST_COMPILED]:
    said = compile_lib.compile_all(
        made.job, programs.turns(made.job, made.decoding), n_processes=n_processes,
        progress=lambda c, job=made.job: progress(job, c))
    best.append(estimate.estimate(made.job, made.lengths, said))
  found = [*best, *ranked[MOST_COMPILED:]]
  return sorted(found, key=lambda e: (not e.fits, not e.compiled, e.step_s if e.fits else e.peak[1]))


def _splits(topology: Topology, job: Job) -> Iterator[tuple[int, int, int]]:
  """(data, fsdp, tensor) with the product of the topology's devices; tensor divides the key/value heads."""
  n = topology.n_devices
  for tensor in (t for t in range(1, n + 1) if n % t == 0 and job.arch.n_kv_heads % t == 0):
    for data in (d for d in range(1, n // tensor + 1) if n // tensor % d == 0):
      yield data, n // tensor // data, tensor


def _settings(cfg: Config, data: int, fsdp: int, tensor: int, micro: int, slots: int, remat: str) -> Config:
  return dataclasses.replace(
      cfg, mesh=dataclasses.replace(cfg.mesh, data=data, fsdp=fsdp, tensor=tensor),
      model=dataclasses.replace(cfg.model, remat=remat),
      learner=dataclasses.replace(cfg.learner, microbatch_rows=micro),
      rollout=dataclasses.replace(cfg.rollout, slots=slots))
