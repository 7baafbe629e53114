"""Every program that the sampler runs, compiled ahead of time for one shape, so that nothing compiles in mid-run."""

from collections.abc import Callable
import concurrent.futures
import functools
import itertools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from hbpo_jax.models import sharding, slots
from hbpo_jax.models.architecture import Architecture
from hbpo_jax.rollout import sampler
from hbpo_jax.rollout.sampler import Live
from hbpo_jax.rollout.shape import Plan, Shape

Progress = Callable[[int, int], None]


class Programs:
  """Compiled programs by their static sizes.

  new_pool()                                        an empty slots.Pool
  row_keys(key, identity)                           of all rollouts
  prefill[p](params, pool, tokens, n_prompt, where, prefix, n_prefix, temperature)      of prompts of up to p tokens
  new_live[rows]()                                  Live of the first length bucket
  resize[rows, i, j](live)                          from length bucket i to j, one above or below
  decode[rows, i](params, pool, live, table, sampling)
  compact[rows, i](live, local)                     from `rows` to the next smaller row bucket
  Rows are counted over all shards; `prefill` consumes the pool, `decode` the live arrays that it is given.
  """

  def __init__(
      self, arch: Architecture, mesh: Mesh, layout: slots.Layout, shape: Shape, plan: Plan, *, params: Any,
      sampling: Any, progress: Progress = lambda done, total: None):
    """Compiles everything, several programs at a time.

    Args:
      params, sampling: arrays or abstract ones, with shardings.
      progress: called with (programs done, programs in all).
    """
    self._arch, self._mesh, self._layout = arch, mesh, layout
    whole = sharding.replicated(mesh)
    spec = lambda shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
    n_shards = mesh.size // mesh.shape["tensor"]
    lengths, n_prefixes, n_prefix_slots = plan.length_buckets, len(shape.n_prefix), max(shape.n_prefix)
    n_context = slots.context_columns(shape.n_prompt_slots, n_prefix_slots, plan.segment_steps)

    def new_live(rows, i=0):
      cache = slots.new_cache(arch, layout, rows, n_context + lengths[i])
      return Live(cache, jnp.zeros((rows, arch.hidden_size), layout.dtype))

    def live(rows, i):
      return self._abstract(functools.partial(new_live, rows, i), "batch")

    def resize(i, live):
      return live.replace(cache=slots.resize(live.cache, n_context + lengths[i], layout))

    new_pool = functools.partial(
        slots.new_pool, arch, layout, shape.n_queries, shape.n_prompt_slots, n_prefixes, n_prefix_slots)
    pool = self._abstract(new_pool, "none")
    prefix = (spec((n_prefixes, n_prefix_slots)), spec((n_prefixes,)), spec((), jnp.float32))
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole)
    packed = spec((plan.row_buckets[0], 2))
    smaller = dict(itertools.pairwise(plan.row_buckets))
    static = dict(arch=arch, layout=layout)

    # {(kind, sizes): (function, arguments, which of them it consumes, what it returns)}
    jobs: dict[tuple[str, Any], tuple] = {
        ("pool", ()): (new_pool, (), (), pool),
        ("keys", ()): (sampler.row_keys, (key, spec((3, shape.n_responses))), (), spec((2, shape.n_responses)))}
    for p in plan.prompt_buckets:
      queries = (spec((plan.prefill_queries, p)), *(spec((plan.prefill_queries,)),) * 2)
      jobs["prefill", p] = (functools.partial(slots.prefill, **static), (params, pool, *queries, *prefix), (1,), pool)
    decode = functools.partial(sampler.decode, n_steps=plan.segment_steps, **static)
    for rows in plan.row_buckets:
      jobs["live", rows] = (functools.partial(new_live, rows), (), (), live(rows, 0))
      for i in range(len(lengths)):
        jobs["decode", (rows, i)] = (
            decode, (params, pool, live(rows, i), spec((8, rows)), sampling), (2,), (live(rows, i), packed))
        for j in {i - 1, i + 1} & set(range(len(lengths))):
          jobs["resize", (rows, i, j)] = (functools.partial(resize, j), (live(rows, i),), (), live(rows, j))
        if rows in smaller:
          local = spec((n_shards, smaller[rows] // n_shards))
          jobs["compact", (rows, i)] = (sampler.compact, (live(rows, i), local), (), live(smaller[rows], i))

    compiled = self._compile(jobs, progress)
    of = lambda kind: {size: program for (k, size), program in compiled.items() if k == kind}
    self.new_pool, self.row_keys, self.prefill = compiled["pool", ()], compiled["keys", ()], of("prefill")
    self.new_live, self.resize = of("live"), of("resize")
    self.decode, self.compact = of("decode"), of("compact")

  def _abstract(self, build: Callable, rows: str) -> Any:
    """Shapes, dtypes and shardings of what `build` makes; `rows` is the logical axis of the rows."""
    def place(path, x):
      in_cache = any(getattr(entry, "name", None) in ("k", "v") for entry in path)
      axes = slots.cache_axes(x.ndim, rows) if in_cache else (rows, "none")[:x.ndim] + ("none",) * (x.ndim - 2)
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(
          self._mesh, sharding.partition_spec(axes, x.shape, self._mesh)))

    with jax.set_mesh(self._mesh):
      return jax.tree_util.tree_map_with_path(place, jax.eval_shape(build))

  def _compile(self, jobs: dict, progress: Progress) -> dict:
    """The compiled programs of {name: (function, arguments, consumed arguments, abstract result)}."""
    def lower(function, arguments, consumed, result):
      out = jax.tree.map(lambda x: x.sharding, result)
      # Tracing holds the interpreter, so only compilation runs in threads.
      with jax.set_mesh(self._mesh):
        return jax.jit(function, donate_argnums=consumed, out_shardings=out).lower(*arguments)

    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
      running = {threads.submit(lower(*job).compile): name for name, job in jobs.items()}
      for n_done, future in enumerate(concurrent.futures.as_completed(running), 1):
        future.result()
        progress(n_done, len(jobs))
    return {name: future.result() for future, name in running.items()}
