"""The device mesh, and the one table from logical axes to mesh axes."""

from collections.abc import Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from hbpo_jax.config import MeshConfig
from hbpo_jax.models import parameters
from hbpo_jax.models.architecture import Architecture

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Parameters name theirs in hbpo_jax.models.parameters; `batch` leads every activation.
LOGICAL_TO_MESH: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "replica": "data",
    "vocab": "tensor",
    "width": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head_size": None,
    "layers": None,
    "norm": None,
    "none": None,
}


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh with axes data, fsdp, tensor over the given devices (default: all).

  Args:
    cfg: sizes of the axes; fsdp = -1 takes what data and tensor leave.
  Raises:
    ValueError: when the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  for name in AXES:
    size = getattr(cfg, name)
    if size < 1 and not (name == "fsdp" and size == -1):
      allowed = "at least 1, or -1 for the rest" if name == "fsdp" else "at least 1"
      raise ValueError(f"mesh.{name}={size} is not a number of devices; set it to {allowed}.")
  others = cfg.data * cfg.tensor
  if cfg.fsdp == -1:
    if len(devices) % others:
      raise ValueError(
          f"mesh.data={cfg.data} x mesh.tensor={cfg.tensor} does not divide the {len(devices)} devices; "
          "choose sizes whose product divides them.")
    sizes = (cfg.data, len(devices) // others, cfg.tensor)
  else:
    sizes = (cfg.data, cfg.fsdp, cfg.tensor)
  if math.prod(sizes) != len(devices):
    raise ValueError(
        f"mesh.data={cfg.data} x mesh.fsdp={cfg.fsdp} x mesh.tensor={cfg.tensor} = {math.prod(sizes)} devices, but "
        f"there are {len(devices)}; set mesh.fsdp=-1 to use what remains.")
  return jax.make_mesh(sizes, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def make_rollout_mesh(cfg: MeshConfig, mesh: Mesh, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh of the rollouts: `mesh` itself, or the same or other devices split otherwise.

  Args:
    cfg: rollout_tensor and rollout_devices are read.
    mesh: of the updates.
    devices: all devices, of which the last rollout_devices are set aside; None means JAX's.
  Raises:
    ValueError: when rollout_tensor does not divide the devices.
  """
  tensor = cfg.rollout_tensor or cfg.tensor
  if not cfg.rollout_devices and tensor == cfg.tensor:
    return mesh
  # In the order of `mesh`: one program may then read arrays of the one and write arrays of the other.
  own = list(jax.devices() if devices is None else devices)[-cfg.rollout_devices:] if cfg.rollout_devices else list(
      mesh.devices.flat)
  if len(own) % tensor:
    raise ValueError(
        f"mesh.rollout_tensor={tensor} does not divide the {len(own)} devices of the rollouts; choose a divisor.")
  return Mesh(np.array(own).reshape(1, -1, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition_spec(axes: Sequence[str], shape: Sequence[int], mesh: Any) -> PartitionSpec:
  """The PartitionSpec of an array with these logical axes; an axis that its mesh axes do not divide stays whole.

  Args:
    axes: logical name of each dimension.
    shape: size of each dimension.
    mesh: a Mesh or AbstractMesh with the axes data, fsdp, tensor.
  """
  sizes = dict(mesh.shape)
  spec = []
  for name, length in zip(axes, shape, strict=True):
    target = LOGICAL_TO_MESH[name]
    names = (target,) if isinstance(target, str) else target or ()
    size = math.prod(sizes[n] for n in names)
    spec.append(target if size > 1 and length % size == 0 else None)
  # No axes of size 1 and no trailing None: the form that jit gives its outputs, so that equal shardings compare equal.
  while spec and spec[-1] is None:
    spec.pop()
  return PartitionSpec(*spec)


def param_shardings(arch: Architecture, mesh: Mesh) -> dict:
  """NamedSharding of every parameter, in the structure of params."""
  return parameters.nest({
      row.path: NamedSharding(mesh, partition_spec(row.axes, row.shape, mesh)) for row in parameters.table(arch)})


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
  """Leading axis over data and fsdp, the other ndim - 1 axes whole; a scalar is replicated."""
  return NamedSharding(mesh, PartitionSpec(LOGICAL_TO_MESH["batch"]) if ndim else PartitionSpec())


def replicated(mesh: Any) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def put(tree: Any, shardings: Any) -> Any:
  """Moves a pytree of host or device arrays, typed random keys too, to the given shardings.

  Args:
    tree: arrays of which every process holds the whole value, or that span the processes already.
    shardings: one for all, or a pytree of them like `tree`.
  """
  if isinstance(shardings, jax.sharding.Sharding):
    return jax.tree.map(lambda x: _put_one(x, shardings), tree)
  return jax.tree.map(_put_one, tree, shardings)


def _put_one(x: Any, s: jax.sharding.Sharding) -> jax.Array:
  if s.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
    return jax.device_put(x, s)
  if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    return jax.random.wrap_key_data(_put_one(jax.random.key_data(x), s), impl=jax.random.key_impl(x))
  # device_put would compare the value over all processes, through the devices.
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, s, lambda index: x[index])


def constrain(x: jax.Array, *axes: str) -> jax.Array:
  """Pins a traced activation to its logical axes under `with jax.set_mesh(mesh)`; without a mesh, x itself.

  With weights and batch both split over fsdp, the compiler is free to gather activations instead of weights;
  the pin makes it gather weights.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not set(AXES) <= set(mesh.axis_names):
    return x
  return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))
