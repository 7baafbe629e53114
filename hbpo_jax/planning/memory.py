"""What lies in a device's memory: sizes from shapes and shardings, and estimates of what programs need besides."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from hbpo_jax.planning.job import Job

# The programs of a step, and in which phase they run.
ROLLOUT, UPDATE = "rollout", "update"
PHASE_OF = {
    "publish": ROLLOUT, "prefill": ROLLOUT, "decode": ROLLOUT, "score": UPDATE, "reference": UPDATE, "update": UPDATE}


@dataclasses.dataclass(frozen=True)
class Resident:
  """Arrays on a device between programs, bytes.

  params, optimizer: of the trainer, throughout.
  sampler: its copy of the weights, during rollouts.
  pool: prompts and budget sentences, on every device; during rollouts.
  cache: of the slots, during rollouts.
  batch: rows of the step, while it learns.
  reference: the frozen model's weights, while it scores (else in the host's memory).
  """
  params: int
  optimizer: int
  sampler: int
  pool: int
  cache: int
  batch: int
  reference: int

  def beside(self, program: str) -> int:
    """What lies there while a program runs, its own arguments included, new results not."""
    if program == "publish":
      return self.params + self.optimizer
    if program == "prefill":
      return self.params + self.optimizer + self.sampler + self.pool
    if program == "decode":
      return self.params + self.optimizer + self.sampler + self.pool + self.cache
    reference = self.reference if program == "reference" else 0
    return self.params + self.optimizer + self.batch + reference


def of(tree: Any) -> int:
  """Bytes per device of a tree of arrays or ShapeDtypeStructs with shardings."""
  return sum(
      math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def sampler_bytes(job: Job) -> int:
  """The sampler's copy; 0 where the trainer's own weights serve."""
  copy = job.sampler
  own = job.state.params
  form = lambda x: (x.dtype, x.sharding)
  if not job.layout.unrolled and jax.tree.map(form, own) == jax.tree.map(form, copy):
    return 0
  return of(copy)


def resident(job: Job) -> Resident:
  """The sizes of everything that stays between programs."""
  state = job.state
  compute = jnp.dtype(job.cfg.model.compute_dtype).itemsize
  itemsize = jnp.dtype(job.cfg.model.param_dtype).itemsize
  params = of(state.params)
  return Resident(
      params=params, optimizer=of(state.opt_state), sampler=sampler_bytes(job), pool=of(job.pool()),
      # The step's rows twice: as scored, and cut into minibatches.
      cache=of(job.live()), batch=2 * of(job.batch(job.minibatch_rows * job.n_minibatches, scored=True)),
      reference=params * compute // itemsize if job.cfg.loss.kl_coef else 0)


def arguments(job: Job, name: str) -> int:
  """Bytes per device of a program's arguments, without the padding of tiles."""
  kept = resident(job)
  if name == "update":
    return kept.params + kept.optimizer + of(job.batch(job.minibatch_rows, scored=True))
  if name in ("score", "reference"):
    weights = kept.params if name == "score" else kept.reference
    return weights + of(job.batch(job.minibatch_rows * job.n_minibatches, scored=False))
  if name == "publish":
    return kept.params
  sampler = kept.sampler or kept.params
  return sampler + kept.pool + (kept.cache if name == "decode" else 0)


def temporaries(job: Job) -> dict[str, int]:
  """Estimates of what each program needs besides its arguments, bytes per device; compiling it gives the true ones.

  The largest of a layer's activations, attention scores, saved inputs of layers, gradients and logits. Of what was
  compiled for 1.5B and 7B models, scoring and updates over fsdp alone were estimated at 0.9 to 1.1 of it, updates split
  over tensor at 0.7 to 1.3.
  """
  # The copy, and most of it once more in the order in which it was gathered.
  scoring = _learn(job, backward=False)
  sizes = {
      "publish": 2 * sampler_bytes(job), "prefill": _prefill(job), "decode": _decode(job), "score": scoring,
      "reference": scoring, "update": _learn(job, backward=True)}
  return {name: sizes[name] for name in job.programs}


def _decode(job: Job) -> int:
  arch = job.arch
  rows = job.plan.row_buckets[0] // job.shards
  logits = 3 * rows * arch.vocab_size * 4 // job.tensor
  segment = 2 * of(job.live()[0]) * job.plan.segment_steps // _cache_columns(job)
  return logits + segment + _gathered(job)


def _prefill(job: Job) -> int:
  arch, G, F = job.arch, len(job.n_prefix), max(job.n_prefix)
  T = job.shape.n_prompt_slots + G * F
  rows = job.plan.prefill_queries // job.shards
  token = 2 * arch.n_layers * arch.n_kv_heads * arch.head_size * jnp.dtype(job.layout.dtype).itemsize
  columns = 2 * rows * T * token  # The new ones, in the order of the network and in that of the pool.
  return columns + rows * T * _layer_bytes(job) + 2 * rows * G * F * arch.vocab_size * 4 // job.tensor + _gathered(job)


def _learn(job: Job, *, backward: bool) -> int:
  arch, cfg, T = job.arch, job.cfg, job.n_columns
  rows = job.micro_rows
  compute = jnp.dtype(cfg.model.compute_dtype).itemsize
  head = arch.vocab_size * arch.hidden_size // job.tensor
  is_splash = job.learner.kernel == "splash"
  scores = 0 if is_splash else rows * arch.n_heads * T * T // job.tensor
  layer = rows * T * _layer_bytes(job) + scores * (4 + compute)
  logits = 3 * cfg.learner.logprob_chunk * arch.vocab_size * 4 // job.tensor
  total = head * compute + layer + logits + 2 * rows * T * arch.hidden_size * 4
  if backward:
    # A layer's input; offloaded, it waits in the host's memory.
    saved = 0 if cfg.model.remat == "offload" else rows * T * arch.hidden_size * 4
    if cfg.model.remat in ("dots", "none"):
      # With everything kept, roundings to 16 bits and what attention keeps come to three quarters more.
      saved += rows * T * _layer_bytes(job) * (1.75 if cfg.model.remat == "none" else 1)
    if cfg.model.remat == "none":
      saved += scores * (4 + compute)
    # Beside a layer's activations lie their gradients, and roundings of both to 16 bits.
    total += 1.5 * rows * T * _layer_bytes(job)
    params = of(job.state.params) * 4 // jnp.dtype(cfg.model.param_dtype).itemsize
    total += arch.n_layers * saved + 2 * params + 2 * head * 4
  return int(total)


def _gathered(job: Job) -> int:
  """Weights of the sampler that are whole for as long as a layer, where they are split over fsdp."""
  if job.cfg.rollout.gather_weights or job.mesh.shape["fsdp"] == 1:
    return 0
  head = job.arch.vocab_size * job.arch.hidden_size // job.tensor
  return head * jnp.dtype(job.layout.dtype).itemsize


def _layer_bytes(job: Job) -> int:
  """Bytes per token of a layer's largest activations: the MLP's two branches in float32, and their product."""
  arch = job.arch
  return (3 * arch.mlp_size * 4 + (arch.n_heads + 2 * arch.n_kv_heads) * arch.head_size * 6) // job.tensor + (
      4 * arch.hidden_size * 4)


def _cache_columns(job: Job) -> int:
  return jax.tree.leaves(job.live()[0].v)[0].shape[-2]
