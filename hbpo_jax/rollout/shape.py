"""The static sizes of an engine: what is asked of it, and the plan that it compiles for."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from hbpo_jax.config import RolloutConfig
from hbpo_jax.models import kernels, slots
from hbpo_jax.rollout import buckets


@dataclasses.dataclass(frozen=True)
class Shape:
  """The static shape of a batch of rollouts.

  n_queries: B.
  n_prompt_slots: P, most tokens of a prompt.
  n_rollouts: J, responses per query and subgroup.
  caps: [G], most counted tokens (n_gen) of a response.
  n_prefix: [G], forced prefix tokens of each subgroup.
  count_prefix: whether the prefix counts in n_gen and in the cap.
  prefix_has_loss: whether the prefix tokens belong to the response (role 'action').
  """
  n_queries: int
  n_prompt_slots: int
  n_rollouts: int
  caps: tuple[int, ...]
  n_prefix: tuple[int, ...]
  count_prefix: bool
  prefix_has_loss: bool

  def __post_init__(self):
    if len(self.caps) != len(self.n_prefix):
      raise ValueError(f"caps={self.caps!r} and n_prefix={self.n_prefix!r} differ in length; give one per subgroup.")
    if self.count_prefix:
      for cap, n_prefix in zip(self.caps, self.n_prefix):
        if cap <= n_prefix:
          raise ValueError(
              f"a cap of {cap} tokens leaves no room after the budget sentence of {n_prefix} tokens; raise "
              "rollout.caps (or reward.max_response_tokens), or shorten prompt.budget_sentence.")

  @property
  def widths(self) -> tuple[int, ...]:
    """[G], slots of a response: the cap, plus the prefix where it is not counted."""
    return tuple(cap if self.count_prefix else cap + n for cap, n in zip(self.caps, self.n_prefix))

  @property
  def sampled(self) -> tuple[int, ...]:
    """[G], most sampled tokens of a response: its slots without the prefix."""
    return tuple(width - n for width, n in zip(self.widths, self.n_prefix))

  @property
  def n_responses(self) -> int:
    """B * G * J."""
    return self.n_queries * len(self.caps) * self.n_rollouts


@dataclasses.dataclass(frozen=True)
class Plan:
  """The static sizes of an engine; of `make_plan`.

  row_buckets: rows over all shards, descending; the first is the number of slots.
  length_buckets, prompt_buckets: tokens, ascending.
  segment_steps: tokens decoded between two looks of the host.
  prefill_queries: prompts of one prefill.
  """
  row_buckets: tuple[int, ...]
  length_buckets: tuple[int, ...]
  prompt_buckets: tuple[int, ...]
  segment_steps: int
  prefill_queries: int


SLOTS_PER_SHARD = 64
_PREFILL_PER_SHARD = 4


def make_plan(shape: Shape, n_shards: int, cfg: RolloutConfig, layout: slots.Layout) -> Plan:
  """The sizes that the settings ask for; where a setting is 0 or empty, those of `hbpo_jax.rollout.buckets`.

  Raises:
    ValueError: when the settings do not fit the shape or each other.
  """
  longest = max(shape.sampled)
  per_shard = -(-min(cfg.slots or SLOTS_PER_SHARD * n_shards, shape.n_responses) // n_shards)
  steps = cfg.segment_steps or buckets.segment_steps(longest)
  # A kernel that reads only what is seen needs no shorter cache. And as it reads nothing for an empty row, a step of
  # the tail costs its weights, which fewer rows do not make cheaper.
  ragged = layout.decode_kernel != "xla"
  default = buckets.length_buckets(longest, steps)
  lengths = cfg.length_buckets or (default[-1:] if ragged else default)
  if bad := [size for size in lengths if size % steps]:
    raise ValueError(
        f"config.rollout.length_buckets={lengths!r} holds {bad[0]}, which is not a multiple of segment_steps={steps}; "
        "give multiples of it.")
  if lengths[-1] < longest:
    raise ValueError(
        f"config.rollout.length_buckets={lengths!r} ends below the longest response of {longest} sampled tokens; "
        f"end it at {-(-longest // steps) * steps} or more.")
  return Plan(
      row_buckets=tuple(n * n_shards for n in ((per_shard,) if ragged else buckets.row_buckets(per_shard))),
      length_buckets=lengths,
      prompt_buckets=buckets.prompt_buckets(shape.n_prompt_slots),
      segment_steps=steps,
      prefill_queries=-(-min(_PREFILL_PER_SHARD * n_shards, shape.n_queries) // n_shards) * n_shards)


def make_layout(cfg: RolloutConfig, mesh: Mesh, compute_dtype: Any) -> slots.Layout:
  """The layout that the settings ask for; 'auto' is what suits the mesh's platform.

  Raises:
    ValueError: when a kernel does not run on the mesh's platform.
  """
  platform = mesh.devices.flat[0].platform
  return slots.Layout(
      # On TPU a loop over stacked layers compiles five times faster and decodes no slower.
      unrolled=platform != "tpu" if cfg.layers == "auto" else cfg.layers == "unrolled",
      prefill_kernel=kernels.resolve("rollout.prefill_kernel", cfg.prefill_kernel, platform),
      decode_kernel=kernels.resolve("rollout.decode_kernel", cfg.decode_kernel, platform),
      dtype=jnp.dtype(compute_dtype))
