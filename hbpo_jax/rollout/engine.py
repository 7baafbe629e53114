"""The sampler for one shape on a mesh: what training and evaluation call.

Rollouts sit in a fixed number of slots, which decode in jitted segments. Between segments the host looks at one small
array, replaces finished rollouts by waiting ones, and starts the next segment before anyone looks at the finished.
"""

from collections.abc import Iterator
import time
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from hbpo_jax.config import RolloutConfig
from hbpo_jax.models import sharding, slots
from hbpo_jax.models.architecture import Architecture
from hbpo_jax.models.publish import Publisher
from hbpo_jax.rollout import buckets, schedule
from hbpo_jax.rollout.ledger import Ledger
from hbpo_jax.rollout.programs import Programs, Progress
from hbpo_jax.rollout.sampling import Sampling
from hbpo_jax.rollout.shape import Shape, make_layout, make_plan
from hbpo_jax.structs import Prompts, Rollouts


class Engine:
  """Generates rollouts of one Shape; compiles everything in `warm_up`, or from the first call on in the background.

  Slots are spread over the mesh axes `data` and `fsdp`, attention heads over `tensor`.
  """

  def __init__(
      self, arch: Architecture, mesh: Mesh, shape: Shape, sampling: Sampling, *, compute_dtype: Any,
      cfg: RolloutConfig = RolloutConfig()):
    """Args:
      cfg: slots, segment_steps, length_buckets, layers, gather_weights and the attention kernels are read.
    Raises:
      ValueError: when the sizes do not fit.
    """
    self.shape, self.mesh = shape, mesh
    self.n_shards = mesh.size // mesh.shape["tensor"]
    self.layout = make_layout(cfg, mesh, compute_dtype)
    self.plan = make_plan(shape, self.n_shards, cfg, self.layout)
    self._arch = arch
    self._whole = sharding.replicated(mesh)
    self.sampling = sharding.put(sampling, self._whole)
    self.publish = Publisher(arch, mesh, self.layout, gather=cfg.gather_weights)
    self._programs: Programs | None = None

  def prepare(self) -> Programs:
    """Every program that `generate` can need; the first time, they start to compile in the background."""
    if self._programs is None:
      self._programs = Programs(
          self._arch, self.mesh, self.layout, self.shape, self.plan, params=self.publish.abstract(),
          sampling=self.sampling)
    return self._programs

  def warm_up(self, progress: Progress = lambda done, total: None) -> Programs:
    """As `prepare`, and returns when all are compiled: from then on nothing compiles.

    Args:
      progress: called with (programs done, programs in all).
    """
    programs = self.prepare()
    programs.wait(progress)
    return programs

  def start(
      self, params: Any, prompts: Prompts, key: jax.Array, *, stop_BGJ: np.ndarray | None = None,
      wanted_BGJ: np.ndarray | None = None, limit_BG: np.ndarray | None = None) -> "Generation":
    """Begins the rollouts of a step; the devices are at work when it returns.

    Args:
      params: from `publish`.
      prompts: host arrays.
      key: typed random key of the step.
      stop_BGJ: int [B, G, J], sampled tokens after which a response ends as if the last were EOS; to compare samplers
        on equal lengths.
      wanted_BGJ: bool [B, G, J], False = leave this rollout out: its entries stay those of an empty response. None
        means all.
      limit_BG: int [B, G], lower limits on the sampled tokens of single queries, at least 1; None means none.
    Returns:
      The Generation, to be iterated to its end.
    Raises:
      ValueError: when the prompts do not have the engine's shape, or no rollout is wanted.
    """
    shape = self.shape
    n_queries, F = prompts.tokens_BP.shape[0], prompts.prefix_GF.shape[1]
    if n_queries != shape.n_queries or max(shape.n_prefix) != F or tuple(prompts.n_prefix_G) != shape.n_prefix:
      raise ValueError(
          f"{n_queries} prompts with prefixes of {tuple(prompts.n_prefix_G)} tokens do not fit an engine for "
          f"{shape.n_queries} with {shape.n_prefix}; make an engine of their shape.")
    if (longest := int(prompts.n_prompt_B.max())) > shape.n_prompt_slots:
      raise ValueError(f"a prompt has {longest} tokens, the engine {shape.n_prompt_slots} slots; raise n_prompt_slots.")
    work = schedule.largest_limit_first(
        shape.sampled, n_queries, shape.n_rollouts, stop_BGJ=stop_BGJ, wanted_BGJ=wanted_BGJ, limit_BG=limit_BG)
    if not len(work):
      raise ValueError("wanted_BGJ leaves no rollout; skip the call.")
    return Generation(self, params, prompts, sharding.put(key, self._whole), work)

  def generate(self, params: Any, prompts: Prompts, key: jax.Array, **options: np.ndarray | None) -> Rollouts:
    """The rollouts of a step on the host, complete; see `start`, also for the options."""
    generation = self.start(params, prompts, key, **options)
    for _ in generation:
      pass
    return generation.rollouts


class Generation:
  """A step's rollouts in the making.

  Iterate to drive it. Each turn is a segment, and yields the rollouts that it completed, none or more, as indices int
  [n, 3] (query, subgroup, rollout) into `rollouts`, while the devices decode the next one.

  Attributes:
    rollouts: NumPy arrays; a response is final once its index was yielded.
    ledger: of the rollouts so far.
  """

  def __init__(self, engine: Engine, params: Any, prompts: Prompts, key: jax.Array, work: schedule.Work):
    """Prefills, and starts the first segment."""
    shape = engine.shape
    self._engine, self._programs, self._params, self._prompts = engine, engine.prepare(), params, prompts
    self.ledger = Ledger()
    self._schedule = schedule.Schedule(
        work, engine.n_shards, [n // engine.n_shards for n in engine.plan.row_buckets])
    # One program whatever is wanted.
    identity_3N = np.zeros((3, shape.n_responses), np.int32)
    identity_3N[:, :len(work)] = prompts.query_B[work.query], work.subgroup, work.rollout
    started = time.perf_counter()
    self._key_2N = jax.device_get(self._programs.row_keys(key, identity_3N))
    self._pool = self._prefill()
    self._live, self._bucket = self._programs.new_live[self._n_rows](), 0
    forced_logp_BGF = jax.device_get(self._pool.logp_BGF)
    self._since = time.perf_counter()
    self.ledger.prefill_s = self._since - started
    self.rollouts = _empty(shape, prompts, forced_logp_BGF)
    self._schedule.refill()
    self._running: jax.Array | None = self._dispatch()
    self._lap("host_s")

  def __iter__(self) -> Iterator[np.ndarray]:
    while self._running is not None:
      packed = jax.device_get(self._running)
      self._lap("decode_s")
      # First the next segment, then what this one brought.
      item_R, age_R = self._schedule.item_R.copy(), self._schedule.age_R.copy()
      complete = self._advance(packed)
      self._running = None if self._schedule.done else self._dispatch()
      self._lap("host_s")
      if self._running is None:
        self._pool = self._params = self._live = None  # The memory is the learner's now.
      self._store(packed, item_R, age_R)
      yield self._book(packed, item_R, age_R, complete)

  def _lap(self, name: str) -> None:
    """Adds the time since the last lap to a field of the ledger."""
    now = time.perf_counter()
    setattr(self.ledger, name, getattr(self.ledger, name) + now - self._since)
    self._since = now

  @property
  def _n_rows(self) -> int:
    return len(self._schedule.item_R)

  def _prefill(self) -> slots.Pool:
    """The pool with every query's context; a query's bucket is that of its own length."""
    prompts, plan = self._prompts, self._engine.plan
    temperature = np.float32(self._engine.sampling.temperature)
    temperature = temperature if temperature > 0 else np.float32(1)
    pool = self._programs.new_pool()
    bucket_B = np.searchsorted(plan.prompt_buckets, prompts.n_prompt_B)
    wanted = np.unique(self._schedule.work.query)
    for i, p in enumerate(plan.prompt_buckets):
      queries = wanted[bucket_B[wanted] == i]
      for first in range(0, len(queries), plan.prefill_queries):
        some = queries[first:first + plan.prefill_queries]
        # A batch is filled up with queries beyond the last, which the pool drops.
        where = np.full(plan.prefill_queries, len(bucket_B), np.int32)
        where[:len(some)] = some
        source = np.minimum(where, len(bucket_B) - 1)
        tokens = _last_columns(np.asarray(prompts.tokens_BP)[source], p)
        pool = self._programs.prefill[p](
            self._params, pool, tokens, np.minimum(prompts.n_prompt_B[source], p).astype(np.int32), where,
            np.asarray(prompts.prefix_GF, np.int32), np.asarray(prompts.n_prefix_G, np.int32), temperature)
    return pool

  def _dispatch(self) -> jax.Array:
    """Starts the next segment, in the smallest length bucket that holds it; returns its packed result."""
    plan, rows = self._engine.plan, self._n_rows
    wanted = buckets.smallest(plan.length_buckets, self._schedule.longest + plan.segment_steps)
    while self._bucket != wanted:
      towards = self._bucket + (1 if wanted > self._bucket else -1)
      self._live = self._programs.resize[rows, self._bucket, towards](self._live)
      self._bucket = towards
    self._live, packed = self._programs.decode[rows, self._bucket](
        self._params, self._pool, self._live, self._schedule.table(self._key_2N), self._engine.sampling)
    return packed

  def _advance(self, packed: np.ndarray) -> np.ndarray:
    """Moves the schedule past a segment, and compacts the rows in its tail; int [n], slots that completed."""
    sched = self._schedule
    complete = sched.advance(packed[:, -2], packed[:, -1] > 0)
    sched.release(complete)
    sched.refill()
    rows = self._n_rows
    while not sched.done and (local_SR := sched.shrink()) is not None:
      self._live = self._programs.compact[rows, self._bucket](self._live, local_SR)
      rows = self._n_rows
    return complete

  def _store(self, packed: np.ndarray, item_R: np.ndarray, age_R: np.ndarray) -> None:
    """Enters a segment's tokens; the rows as they were while it ran."""
    s, work, n_prefix_G = self._engine.plan.segment_steps, self._schedule.work, self._engine.shape.n_prefix
    token_Rs, logp_Rs, n_new_R = packed[:, :s], packed[:, s:2 * s].view(np.float32), packed[:, -2]
    for slot in np.flatnonzero(item_R != schedule.FREE):
      item, n = item_R[slot], n_new_R[slot]
      g = work.subgroup[item]
      first = age_R[slot] + n_prefix_G[g]
      at = (work.query[item], work.rollout[item], slice(first, first + n))
      self.rollouts.tokens[g][at] = token_Rs[slot, :n]
      self.rollouts.logp_sampler[g][at] = logp_Rs[slot, :n]

  def _book(self, packed: np.ndarray, item_R: np.ndarray, age_R: np.ndarray, complete: np.ndarray) -> np.ndarray:
    """Enters the lengths of completed rollouts, and the ledger; int [n, 3], which rollouts they are."""
    shape, ledger, sched = self._engine.shape, self.ledger, self._schedule
    items, ended = item_R[complete], packed[complete, -1] > 0
    n_sampled = age_R[complete] + packed[complete, -2]
    index = np.stack([sched.work.query[items], sched.work.subgroup[items], sched.work.rollout[items]], axis=1)
    n_prefix = np.asarray(shape.n_prefix)[index[:, 1]]
    at = tuple(index.T)
    self.rollouts.n_tokens_BGJ[at] = n_sampled + n_prefix
    self.rollouts.n_gen_BGJ[at] = n_sampled + n_prefix * shape.count_prefix
    self.rollouts.truncated_BGJ[at] = ~ended
    for (b, g, j), n, skip in zip(index, n_sampled + n_prefix, n_prefix * (not shape.prefix_has_loss), strict=True):
      self.rollouts.completion_mask[g][b, j, skip:n] = True
    ledger.useful += int(n_sampled[ended].sum())
    ledger.truncated += int(n_sampled[~ended].sum())
    ledger.slot_steps, ledger.overrun, ledger.idle = sched.slot_steps, sched.overrun, sched.idle
    ledger.n_segments = sched.n_segments
    return index


def _last_columns(tokens_BP: np.ndarray, n_columns: int) -> np.ndarray:
  """int32 [B, n_columns]: the last columns, filled up on the left where there are fewer."""
  missing = max(0, n_columns - tokens_BP.shape[1])
  return np.pad(tokens_BP[:, -n_columns:], ((0, 0), (missing, 0))).astype(np.int32)


def _empty(shape: Shape, prompts: Prompts, forced_logp_BGF: np.ndarray) -> Rollouts:
  """Rollouts that hold their forced prefixes only."""
  B, J, G = shape.n_queries, shape.n_rollouts, len(shape.caps)
  per_group = lambda dtype: tuple(np.zeros((B, J, width), dtype) for width in shape.widths)
  rollouts = Rollouts(
      tokens=per_group(np.int32), completion_mask=per_group(bool), logp_sampler=per_group(np.float32),
      n_tokens_BGJ=np.zeros((B, G, J), np.int32), n_gen_BGJ=np.zeros((B, G, J), np.int32),
      truncated_BGJ=np.zeros((B, G, J), bool))
  for g, n in enumerate(shape.n_prefix):
    rollouts.tokens[g][:, :, :n] = prompts.prefix_GF[g, :n]
    rollouts.logp_sampler[g][:, :, :n] = forced_logp_BGF[:, g, None, :n]
  return rollouts
