"""The sampler, jitted for one shape and placed on a mesh; what training and evaluation call."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from hbpo_jax.models import sharding
from hbpo_jax.models.architecture import Architecture
from hbpo_jax.rollout import sampler
from hbpo_jax.rollout.sampling import Sampling
from hbpo_jax.structs import Prompts, Rollouts


@dataclasses.dataclass(frozen=True)
class Shape:
  """The static shape of a batch of rollouts.

  n_rollouts: J, responses per query and subgroup.
  caps: [G], most counted tokens (n_gen) of a response.
  n_prefix: [G], forced prefix tokens of each subgroup.
  count_prefix: whether the prefix counts in n_gen and in the cap.
  prefix_has_loss: whether the prefix tokens belong to the response (role 'action').
  """
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

  def limits(self) -> sampler.Limits:
    """The sampler's traced view of this shape."""
    prefix = np.array(self.n_prefix, np.int32)
    return sampler.Limits(
        max_tokens_G=np.array(self.widths, np.int32),
        counted_prefix_G=prefix * self.count_prefix,
        context_prefix_G=prefix * (not self.prefix_has_loss),
    )


class Engine:
  """Generates rollouts of one Shape; compiles once, on the first call.

  The rows of a batch are spread over the mesh axes `data` and `fsdp`, attention heads over `tensor`.
  """

  def __init__(self, arch: Architecture, mesh: Mesh, shape: Shape, sampling: Sampling, *, compute_dtype: Any):
    self.shape = shape
    self.mesh = mesh
    self._sampling = sampling
    self._compute_dtype = jnp.dtype(compute_dtype)
    self._generate = jax.jit(
        functools.partial(
            sampler.generate, arch=arch, n_rollouts=shape.n_rollouts, widths=shape.widths,
            compute_dtype=self._compute_dtype),
        out_shardings=sharding.batch_sharding(mesh, 1))
    self._publish = jax.jit(
        lambda params: jax.tree.map(lambda w: w.astype(self._compute_dtype), params),
        out_shardings=sharding.param_shardings(arch, mesh))

  def publish(self, params: Any) -> Any:
    """The sampler's copy of the weights: cast to the compute dtype once, not at every decoded token."""
    if all(w.dtype == self._compute_dtype for w in jax.tree.leaves(params)):
      return params
    return self._publish(params)

  def generate(self, params: Any, prompts: Prompts, key: jax.Array) -> Rollouts:
    """Responses to the prompts of one step.

    Args:
      params: from `publish`.
      prompts: host arrays; B a multiple of the mesh's data * fsdp.
      key: typed random key of the step.
    Returns:
      Rollouts on the devices, B sharded over data and fsdp. Does not block.
    """
    rows, same = sharding.batch_sharding(self.mesh, 1), sharding.replicated(self.mesh)
    prompts = sharding.put(prompts, Prompts(
        tokens_BP=rows, n_prompt_B=rows, prefix_GF=same, n_prefix_G=same, query_B=rows))
    with jax.set_mesh(self.mesh):
      return self._generate(params, prompts, self.shape.limits(), self._sampling, key)


def fetch(rollouts: Rollouts) -> Rollouts:
  """The rollouts as NumPy arrays on the host; blocks until they are done."""
  return jax.device_get(rollouts)
