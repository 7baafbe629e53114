"""The programs of a step, lowered for devices that are not there."""

from typing import Any

import jax

from hbpo_jax.models import sharding
from hbpo_jax.planning.decoding import Decoding
from hbpo_jax.planning.job import Job
from hbpo_jax.rollout import sampling as sampling_lib
from hbpo_jax.rollout.programs import Programs


def turns(job: Job, decoding: Decoding) -> dict[str, int]:
  """By program, the turns of its loop whose number the run decides: over a segment's tokens, or over micro-batches."""
  counted = {
      "decode": job.plan.segment_steps, "score": decoding.n_micro, "reference": decoding.n_micro,
      "update": max(1, round(decoding.n_micro / job.n_minibatches))}
  return {name: counted.get(name, 1) for name in job.programs}


def lower(job: Job, name: str) -> Any:
  """The lowered program; of the sampler's the largest of its kind.

  Args:
    job: with a Mesh of the devices to compile for.
  """
  if name in ("prefill", "decode"):
    return _of_the_sampler(job, name)
  learner, state = job.learner, job.state
  if name == "publish":
    with jax.set_mesh(job.mesh):
      return job.publisher._program.lower(state.params)
  temperature = job.cfg.rollout.temperature
  rows = job.minibatch_rows * (1 if name == "update" else job.n_minibatches)
  batch = job.batch(rows, scored=name == "update")
  params = state.params
  if name == "reference":
    compute = jax.numpy.dtype(job.cfg.model.compute_dtype)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, compute, sharding=x.sharding), params)
  with jax.set_mesh(job.mesh):
    if name == "update":
      return learner._update.lower(state, batch, temperature, None, 0.0)
    return learner._score.lower(params, batch, temperature, None)


class _Lowered(Programs):
  """The engine's programs, of which one is lowered and none compiled."""

  def __init__(self, job: Job, wanted: tuple[str, Any]):
    whole = sharding.replicated(job.mesh)
    r = job.cfg.rollout
    sampling = jax.eval_shape(lambda: sampling_lib.make_sampling(r.temperature, r.top_p, r.top_k, (0,)))
    sampling = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), sampling)
    self._wanted = wanted
    super().__init__(job.arch, job.mesh, job.layout, job.shape, job.plan, params=job.sampler, sampling=sampling)

  def _compile(self, jobs: dict) -> dict:
    function, arguments, consumed, result = jobs[self._wanted]
    with jax.set_mesh(self._mesh):
      self.lowered = jax.jit(
          function, donate_argnums=consumed, out_shardings=jax.tree.map(lambda x: x.sharding, result)).lower(*arguments)
    return dict.fromkeys(jobs)


def _of_the_sampler(job: Job, name: str) -> Any:
  plan = job.plan
  size = plan.prompt_buckets[-1] if name == "prefill" else (plan.row_buckets[0], len(plan.length_buckets) - 1)
  return _Lowered(job, (name, size)).lowered
