"""Every program that the sampler runs, compiled for one shape in the background, in the order in which it is needed."""

import atexit
from collections.abc import Callable, Mapping
from concurrent import futures
import functools
import itertools
import os
import threading
from typing import Any
import weakref

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
  """Compiled programs by their static sizes. One that is needed before its turn is compiled at once.

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
      sampling: Any):
    """Starts to compile everything, several programs at a time.

    Args:
      params, sampling: arrays or abstract ones, with shardings.
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

    compiled = self._compiled = self._compile(jobs)
    self._is_complete = False
    self.prefill, self.new_live, self.resize = (_Kind(compiled, kind) for kind in ("prefill", "live", "resize"))
    self.decode, self.compact = _Kind(compiled, "decode"), _Kind(compiled, "compact")

  @property
  def new_pool(self) -> Any:
    """See the class."""
    return self._compiled["pool", ()]

  @property
  def row_keys(self) -> Any:
    """See the class."""
    return self._compiled["keys", ()]

  def wait(self, progress: Progress = lambda done, total: None) -> None:
    """Returns when everything is compiled.

    Args:
      progress: called with (programs done, programs in all), the first time.
    """
    if not self._is_complete:
      self._compiled.wait(progress)
    self._is_complete = True

  def _abstract(self, build: Callable, rows: str) -> Any:
    """Shapes, dtypes and shardings of what `build` makes; `rows` is the logical axis of the rows."""
    def place(path, x):
      in_cache = any(getattr(entry, "name", None) in ("k", "v") for entry in path)
      axes = slots.cache_axes(x.ndim, rows) if in_cache else (rows, "none")[:x.ndim] + ("none",) * (x.ndim - 2)
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(
          self._mesh, sharding.partition_spec(axes, x.shape, self._mesh)))

    with jax.set_mesh(self._mesh):
      return jax.tree_util.tree_map_with_path(place, jax.eval_shape(build))

  def _compile(self, jobs: dict) -> Any:
    """What gives the compiled programs of {name: (function, arguments, consumed arguments, abstract result)}."""
    return _Compiler(self._mesh, jobs)


class _Kind:
  """The compiled programs of one kind, by their sizes."""

  def __init__(self, compiled: Any, kind: str):
    self._compiled, self._kind = compiled, kind

  def __getitem__(self, size: Any) -> Any:
    return self._compiled[self._kind, size]


class _Compiler:
  """Compiles jobs in the background, in their order; what somebody waits for, and whose turn has not come, at once."""

  def __init__(self, mesh: Mesh, jobs: Mapping[tuple[str, Any], tuple]):
    self._mesh, self._jobs = mesh, jobs
    self._programs: dict[tuple[str, Any], futures.Future] = {name: futures.Future() for name in jobs}
    self._begun: set[tuple[str, Any]] = set()
    self._lock, self._stopped = threading.Lock(), threading.Event()
    # Tracing holds the interpreter, so one thread does it for all; XLA compiles in several.
    self._thread = threading.Thread(target=self._run, name="compiler", daemon=True)
    self._thread.start()
    atexit.register(_stop, weakref.ref(self))  # A thread inside XLA when the interpreter ends would crash it.

  def __getitem__(self, name: tuple[str, Any]) -> Any:
    if self._begin(name):
      self._finish(name, lambda: self._lower(name).compile())
    return self._programs[name].result()

  def wait(self, progress: Progress) -> None:
    """Returns when all are compiled."""
    for n_done, future in enumerate(futures.as_completed(self._programs.values()), 1):
      future.result()
      progress(n_done, len(self._programs))

  def stop(self) -> None:
    """Ends the thread after what it has begun."""
    self._stopped.set()
    self._thread.join()

  def _run(self) -> None:
    n_threads = min(8, os.cpu_count() or 1)
    free = threading.Semaphore(n_threads)

    def compile_lowered(name, lowered):
      self._finish(name, lowered.compile)
      free.release()

    with futures.ThreadPoolExecutor(n_threads) as threads:
      for name in self._jobs:
        if self._stopped.is_set():
          return
        if not self._begin(name):
          continue
        free.acquire()
        try:
          threads.submit(compile_lowered, name, self._lower(name))
        except Exception as error:  # Whoever asks for the program gets it.
          free.release()
          self._programs[name].set_exception(error)

  def _begin(self, name: tuple[str, Any]) -> bool:
    """Whether the caller is the one to compile it."""
    with self._lock:
      if name in self._begun:
        return False
      self._begun.add(name)
      return True

  def _lower(self, name: tuple[str, Any]) -> Any:
    function, arguments, consumed, result = self._jobs[name]
    out = jax.tree.map(lambda x: x.sharding, result)
    with jax.set_mesh(self._mesh):
      return jax.jit(function, donate_argnums=consumed, out_shardings=out).lower(*arguments)

  def _finish(self, name: tuple[str, Any], make: Callable[[], Any]) -> None:
    try:
      self._programs[name].set_result(make())
    except Exception as error:
      self._programs[name].set_exception(error)


def _stop(compiler: weakref.ref) -> None:
  if (alive := compiler()) is not None:
    alive.stop()
