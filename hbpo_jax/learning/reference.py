"""The frozen reference model of the KL term: in host memory between uses, where the platform has one."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from hbpo_jax.learning.learner import Learner
from hbpo_jax.models import sharding
from hbpo_jax.structs import Batch

HOST_MEMORY = "pinned_host"
_log = logging.getLogger(__name__)


class Reference:
  """A copy of the params that nothing changes; make one only when loss.kl_coef is above 0.

  Attributes:
    memory_kind: where the copy rests between uses: 'pinned_host' or the devices' default memory.
  """

  def __init__(self, learner: Learner, params: Any):
    """Copies `params`, which stay the caller's.

    Args:
      learner: scores the batches.
      params: on the learner's shardings, not yet consumed by an update.
    """
    self._learner = learner
    # jit returns fresh buffers: the trainer donates its own.
    copy = jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=learner.param_shardings)(params)
    if host_memory_works(learner.mesh):
      self.memory_kind = HOST_MEMORY
      resting = jax.tree.map(lambda s: s.with_memory_kind(HOST_MEMORY), learner.param_shardings)
      copy = jax.device_put(copy, resting)
    else:
      self.memory_kind = learner.mesh.devices.flat[0].default_memory().kind
    self._params = copy

  def score(self, batch: Batch) -> jax.Array:
    """float32 [R, C], as `Learner.score`; the copy visits the devices for the duration of the call."""
    return self._learner.score(jax.device_put(self._params, self._learner.param_shardings), batch)


def host_memory_works(mesh: Mesh) -> bool:
  """Whether arrays on this mesh can rest in pinned host memory and come back unchanged; tried once with a small one."""
  devices = mesh.local_devices
  if not all(HOST_MEMORY in {memory.kind for memory in device.addressable_memories()} for device in devices):
    return False
  probe = NamedSharding(mesh, PartitionSpec())
  try:
    there = sharding.put(jnp.arange(8.0), probe.with_memory_kind(HOST_MEMORY))
    back = jax.device_put(there, probe)
    return bool(np.array_equal(np.asarray(back), np.arange(8.0)))
  except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
    _log.warning("this platform lists %s memory but does not use it (%s); the reference model stays on the devices.",
                 HOST_MEMORY, error)
    return False
