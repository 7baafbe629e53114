"""The sampler's copy of the weights: cast once, laid out for decoding, and whole on every data-parallel device."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from hbpo_jax.models import decoder, parameters, sharding
from hbpo_jax.models.architecture import Architecture
from hbpo_jax.models.slots import Layout


class Publisher:
  """Makes the sampler's params from the trainer's, in one jitted program.

  Attributes:
    shardings: NamedSharding of every array that it returns.
  """

  def __init__(self, arch: Architecture, mesh: Mesh, layout: Layout, *, gather: bool):
    """Args:
      arch: the network.
      mesh: of the sampler, axes data, fsdp, tensor; the trainer's may have another split or other devices.
      layout: stacked or unrolled, and the dtype.
      gather: whether each device holds whole weights (but for the split over `tensor`), so that decoding a token
        moves none; else they stay split over fsdp.
    """
    self._arch, self._mesh, self._layout = arch, mesh, layout
    self.shardings = _shardings(arch, mesh, layout.unrolled, gather)
    self._program = jax.jit(self._traced, out_shardings=self.shardings)
    self._cast = jax.jit(lambda params: jax.tree.map(lambda w: w.astype(layout.dtype), params))

  def __call__(self, params: Any) -> Any:
    """The sampler's params; `params` themselves where nothing has to change."""
    if not self._layout.unrolled and jax.tree.map(_form, params) == jax.tree.map(
        lambda s: (self._layout.dtype, s), self.shardings):
      return params
    source = jax.tree.leaves(params)[0].sharding
    if source.device_set != set(self._mesh.devices.flat):
      # To other devices in the sampler's dtype, split as there; the program then lays it out.
      params = jax.device_put(self._cast(params), sharding.param_shardings(self._arch, self._mesh))
    return self._program(params)

  def abstract(self) -> Any:
    """Shapes, dtypes and shardings of what it returns."""
    params = jax.eval_shape(lambda key: decoder.init(self._arch, key), jax.random.key(0))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(self._traced, params),
        self.shardings)

  def _traced(self, params):
    params = jax.tree.map(lambda w: w.astype(self._layout.dtype), params)
    return decoder.unroll(params, self._arch) if self._layout.unrolled else params


def _form(x: jax.Array) -> tuple[Any, Any]:
  return x.dtype, x.sharding


def _shardings(arch: Architecture, mesh: Mesh, unrolled: bool, gather: bool) -> dict:
  def place(axes, shape):
    axes = tuple("none" if gather and axis == "width" else axis for axis in axes)
    return NamedSharding(mesh, sharding.partition_spec(axes, shape, mesh))

  rows = {row.path: row for row in parameters.table(arch)}
  if not unrolled:
    return parameters.nest({path: place(row.axes, row.shape) for path, row in rows.items()})

  def inputs_first(row):
    axes, shape, n = row.axes[1:], row.shape[1:], len(row.shape) - 1 - row.n_inputs
    return place(axes[n:] + axes[:n], shape[n:] + shape[:n])

  layer = {path[-1]: inputs_first(row) for path, row in rows.items() if row.stacked}
  embed, norm = rows["embed",], rows["norm",]
  return {
      "embed": place(embed.axes, embed.shape), "norm": place(norm.axes, norm.shape), "layers": (layer,) * arch.n_layers,
      "lm_head": place(embed.axes[::-1], embed.shape[::-1])}
