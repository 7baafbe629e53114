"""FLOPs and bytes of each phase of a step, per device, counted from the architecture and the shapes.

XLA's own count runs every loop body once, so it is of no use for a network of scanned layers. Here a matmul of [m, k]
and [k, n] is 2 m k n FLOPs; norms, activations and sampling are left out. What is split over `tensor` is taken to split
evenly.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from hbpo_jax.models import kernels, parameters, slots
from hbpo_jax.models.architecture import Architecture
from hbpo_jax.planning import memory
from hbpo_jax.planning.decoding import Decoding
from hbpo_jax.planning.job import Job

# Memory traffic that no count from shapes can give; see `ASSUMED`.
SCORE_BYTES = (16, 24)  # per entry of XLA's [T, T] attention scores: forward, backward
SPLASH_ARRAYS = 2  # that the kernel reads once for every block of the other side: keys and values, or their like
ACTIVATION_PASSES = (1, 2)  # float32 activations of a layer written and read once: forward, backward
LOGIT_PASSES = (3, 4)  # float32 logits of a chunk: forward, backward with the gradients
SAMPLING_PASSES = 4  # float32 logits of a decoding step
ACCUMULATE_BYTES = 12  # per parameter and micro-batch: read the gradient, read and write the sum, float32

ASSUMED = (
    f"memory traffic: weights once per pass; in scoring and updates {SCORE_BYTES[0]} bytes per attention score forward "
    f"and {SCORE_BYTES[1]} backward in XLA's attention, {SPLASH_ARRAYS} arrays per block of scores in its kernel, "
    f"activations {ACTIVATION_PASSES[0]} and {ACTIVATION_PASSES[1]} times, a chunk's logits {LOGIT_PASSES[0]} and "
    f"{LOGIT_PASSES[1]} times; in decoding the logits {SAMPLING_PASSES} times")


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one device does in a phase of one step."""
  flops: float = 0.0
  hbm_bytes: float = 0.0
  network_bytes: float = 0.0

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def layer_weights(arch: Architecture) -> int:
  """Weights of one layer that take part in matmuls."""
  return sum(math.prod(row.hf_shape) for row in parameters.table(arch) if row.stacked and row.n_inputs)


def layers_flops(arch: Architecture, n_tokens: float, n_scores: float) -> float:
  """FLOPs of all layers, forward.

  Args:
    n_tokens: tokens that pass through.
    n_scores: pairs of a query's and a key's token that attention multiplies, in each head.
  """
  return arch.n_layers * (2 * layer_weights(arch) * n_tokens + 4 * arch.n_heads * arch.head_size * n_scores)


def head_flops(arch: Architecture, n_tokens: float) -> float:
  """FLOPs of the logits of n_tokens."""
  return 2.0 * arch.vocab_size * arch.hidden_size * n_tokens


def step(job: Job, decoding: Decoding) -> dict[str, Cost]:
  """The cost of each program in a step, in the order of `job.programs`."""
  scoring = learn(job, decoding.n_micro, backward=False)
  costs = {
      "publish": publish(job), "prefill": prefill(job), "decode": decode(job, decoding), "score": scoring,
      "reference": scoring, "update": learn(job, decoding.n_micro, backward=True)}
  return {name: costs[name] for name in job.programs}


def publish(job: Job) -> Cost:
  """The sampler's copy: read the trainer's weights, gather, write."""
  copy = memory.sampler_bytes(job)
  if not copy:
    return Cost()
  fsdp = job.mesh.shape["fsdp"]
  moved = copy * (fsdp - 1) / fsdp if job.cfg.rollout.gather_weights else 0.0
  return Cost(hbm_bytes=memory.of(job.state.params) + copy, network_bytes=moved)


def prefill(job: Job) -> Cost:
  """All prompts of a step, each taken to be in the longest bucket, with the budget sentences behind it."""
  arch, shape, G, F = job.arch, job.shape, len(job.n_prefix), max(job.n_prefix)
  T = shape.n_prompt_slots + G * F
  calls = math.ceil(shape.n_queries / job.plan.prefill_queries)
  rows = job.plan.prefill_queries / job.shards * calls
  scores = T * T
  if job.layout.prefill_kernel == "splash":
    mask = slots.tree_mask(shape.n_prompt_slots, G, F) if F else np.tri(T, dtype=bool)
    scores = _scores_in_blocks(mask)
  flops = layers_flops(arch, rows * T, rows * scores) + head_flops(arch, rows * G * F)
  weights = memory.sampler_bytes(job) or memory.of(job.sampler)
  pool = memory.of(job.pool())
  traffic = calls * weights + 2 * pool + rows * T * _activation_bytes(job)
  moved = pool * (job.shards - 1) / job.shards  # Every device keeps every query.
  if not job.cfg.rollout.gather_weights:
    moved += calls * _gather_bytes(job)
  moved += _tensor_bytes(job, rows * T, passes=1)
  return Cost(flops / job.tensor, traffic, moved)


def decode(job: Job, decoding: Decoding) -> Cost:
  """All segments of a step: every step reads the weights, and attention what each row sees."""
  arch = job.arch
  row_steps, column_steps = decoding.row_steps / job.shards, decoding.column_steps / job.shards
  flops = layers_flops(arch, row_steps, column_steps) + head_flops(arch, row_steps)
  weights = memory.of(job.sampler)
  if not arch.tie_embeddings:  # Of the embedding it reads a few rows only.
    weights -= memory.of(job.sampler["embed"])
  token = cache_token_bytes(job)
  context = slots.context_columns(job.shape.n_prompt_slots, max(job.n_prefix), job.plan.segment_steps)
  rows = job.plan.row_buckets[0] / job.shards
  # A segment begins with all rows' contexts: read from the pool and from the cache, written to the cache.
  seat = decoding.n_segments * rows * context * token * 3
  merge = row_steps * token * 2
  logits = row_steps * arch.vocab_size / job.tensor * 4 * SAMPLING_PASSES
  traffic = decoding.n_steps * weights + column_steps * token + seat + merge + logits
  moved = 0.0 if job.cfg.rollout.gather_weights else decoding.n_steps * _gather_bytes(job)
  moved += _tensor_bytes(job, row_steps, passes=1)
  return Cost(flops / job.tensor, traffic, moved)


def learn(job: Job, n_micro: int, *, backward: bool) -> Cost:
  """Scoring of n_micro micro-batches, or the step's updates from them; their padding is computed like anything else."""
  cfg, arch, T = job.cfg, job.arch, job.n_columns
  rows, is_splash, remat = n_micro * job.micro_rows, job.learner.kernel == "splash", cfg.model.remat
  tokens, targets = rows * T, rows * job.n_targets
  # XLA's attention computes what the mask hides, too; the kernel leaves out what lies above the diagonal's blocks.
  scores = rows * (_scores_in_blocks(np.tri(T, dtype=bool)) if is_splash else T * T)
  forward = layers_flops(arch, tokens, scores)
  attention = layers_flops(arch, 0, scores)
  flops = forward + head_flops(arch, targets)
  passes, weight_passes = 1, 1
  is_whole = remat in ("full", "offload")  # Whether the whole layer is computed again.
  if backward:
    # Of a layer that is computed again, nobody reads the MLP's output.
    down = 2.0 * arch.n_layers * arch.mlp_size * arch.hidden_size * tokens
    again = forward - down if is_whole else attention if remat == "dots" else 0.0
    # Two products forward, four backward; the kernel's two passes backward have seven.
    flops += 2 * forward + attention * 1.5 * is_splash + again + 3 * head_flops(arch, targets)
    passes, weight_passes = 3 + (remat != "none"), 2
  traffic = n_micro * weight_passes * 2 * _compute_bytes(job)
  entries = arch.n_layers * arch.n_heads / job.tensor * scores
  per_score = (SPLASH_ARRAYS * arch.head_size * 2 / kernels.splash_block(T),) * 2 if is_splash else SCORE_BYTES
  traffic += entries * (per_score[0] * (1 + backward * (remat != "none")) + backward * (1 + is_splash) * per_score[1])
  traffic += tokens * _activation_bytes(job) * (
      ACTIVATION_PASSES[0] + backward * (ACTIVATION_PASSES[1] + is_whole * ACTIVATION_PASSES[0]))
  traffic += targets * arch.vocab_size / job.tensor * 4 * (LOGIT_PASSES[0] + backward * LOGIT_PASSES[1])
  moved = n_micro * weight_passes * _gather_bytes(job) + _tensor_bytes(job, tokens, passes=passes)
  if backward:
    own = memory.of(job.state.params) / jnp.dtype(cfg.model.param_dtype).itemsize
    # The optimizer reads and writes weights and moments, and reads the gradient.
    optimizer = 2 * (memory.of(job.state.params) + memory.of(job.state.opt_state)) + 4 * own
    traffic += optimizer * job.n_minibatches + own * ACCUMULATE_BYTES * n_micro
    moved += n_micro * _reduce_bytes(job)
  return Cost(flops / job.tensor, traffic, moved)


def cache_token_bytes(job: Job) -> float:
  """Bytes of a token's keys and values on a device."""
  arch = job.arch
  heads = arch.n_kv_heads / job.tensor if arch.n_kv_heads % job.tensor == 0 else arch.n_kv_heads
  return 2 * arch.n_layers * heads * arch.head_size * jnp.dtype(job.layout.dtype).itemsize


def _scores_in_blocks(mask_TT: np.ndarray) -> int:
  """Scores in the blocks that the splash kernel does not skip."""
  block = kernels.splash_block(mask_TT.shape[0])
  n = -(-mask_TT.shape[0] // block)
  mask = np.pad(mask_TT, (0, n * block - mask_TT.shape[0])).reshape(n, block, n, block)
  return int(mask.any(axis=(1, 3)).sum()) * block * block


def _activation_bytes(job: Job) -> float:
  """Bytes per token of writing and reading the float32 activations of all layers once."""
  arch = job.arch
  split = (2 * arch.n_heads + 2 * arch.n_kv_heads) * arch.head_size + 3 * arch.mlp_size
  return arch.n_layers * 8 * (4 * arch.hidden_size + split / job.tensor)


def _compute_bytes(job: Job) -> float:
  """All weights in the compute dtype, as a device holds them one after the other."""
  return parameters.count(job.arch) * jnp.dtype(job.cfg.model.compute_dtype).itemsize / job.tensor


def _gather_bytes(job: Job) -> float:
  """What reaches a device when every weight is gathered over fsdp once, in the compute dtype."""
  fsdp = job.mesh.shape["fsdp"]
  return _compute_bytes(job) * (fsdp - 1) / fsdp


def _reduce_bytes(job: Job) -> float:
  """What reaches a device when every gradient is summed, float32: scattered over fsdp; over data, all-reduced."""
  fsdp, data = job.mesh.shape["fsdp"], job.mesh.shape["data"]
  whole = parameters.count(job.arch) * 4 / job.tensor
  return whole * (fsdp - 1) / fsdp + 2 * whole / fsdp * (data - 1) / data


def _tensor_bytes(job: Job, n_tokens: float, *, passes: int) -> float:
  """Two sums of the residual stream per layer and pass over `tensor`, float32."""
  n = job.tensor
  return 2 * job.arch.n_layers * passes * n_tokens * job.arch.hidden_size * 4 * 2 * (n - 1) / n

