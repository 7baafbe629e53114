"""What is planned: a configuration, its network, and the static sizes that the run would have on a topology."""

import dataclasses
import functools
import math
import pathlib
import re
import types
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
import numpy as np

from hbpo_jax import config, hub, validation
from hbpo_jax.config import Config
from hbpo_jax.learning import packing, scoring
from hbpo_jax.learning.learner import Learner
from hbpo_jax.models import architecture, presets, sharding, slots
from hbpo_jax.models.architecture import Architecture
from hbpo_jax.models.publish import Publisher
from hbpo_jax.planning.chips import Topology
from hbpo_jax.rollout.shape import Plan, Shape, make_layout, make_plan
from hbpo_jax.structs import Batch, TrainState


@dataclasses.dataclass(frozen=True)
class Job:
  """One run on one topology; no weights, no devices.

  mesh: of absent devices (an AbstractMesh), or a Mesh.
  n_prefix: [G], tokens of each budget sentence.
  layout, shape, plan: of the training engine.
  """
  cfg: Config
  arch: Architecture
  topology: Topology
  mesh: Any
  n_prefix: tuple[int, ...]
  layout: slots.Layout
  shape: Shape
  plan: Plan

  @property
  def shards(self) -> int:
    """Devices over which rows are split, data x fsdp."""
    return self.mesh.size // self.tensor

  @property
  def tensor(self) -> int:
    """Devices over which heads, MLP and vocabulary are split."""
    return self.mesh.shape["tensor"]

  @property
  def n_minibatches(self) -> int:
    """Updates of a step."""
    return self.cfg.learner.minibatches

  @property
  def programs(self) -> tuple[str, ...]:
    """The programs that matter, in the order in which a step runs them."""
    own = self.n_minibatches == 1  # The only update's own forward pass gives pi_old.
    return (
        "publish", "prefill", "decode", *([] if own else ["score"]), *(["reference"] if self.cfg.loss.kl_coef else []),
        "update")

  @property
  def minibatch_rows(self) -> int:
    """Rows of an update, over all devices, empty ones included: as many as responses, packed or not."""
    rows, micro = self.shape.n_responses // self.n_minibatches, self.learner.micro_rows
    return math.ceil(rows / micro) * micro if self.cfg.learner.pack else rows

  @property
  def n_columns(self) -> int:
    """T, token columns of a row in scoring and updates."""
    P, C, learner = self.shape.n_prompt_slots, max(self.shape.widths), self.cfg.learner
    if not learner.pack:
      return P + C
    return learner.row_tokens or packing.row_width(P, C, self.shares_prompts)

  @property
  def shares_prompts(self) -> bool:
    """Whether responses to one query share its prompt in a packed row."""
    return self.learner.kernel != "splash"

  @property
  def n_targets(self) -> int:
    """C, columns of a row whose log-probabilities are computed."""
    return self.n_columns - 1 if self.cfg.learner.pack else max(self.shape.widths)

  @property
  def micro_rows(self) -> int:
    """Rows of a micro-batch on one device, in scoring as in updates."""
    local = self.minibatch_rows // self.shards
    return math.ceil(local / self.most_micro_batches)

  @property
  def most_micro_batches(self) -> int:
    """Micro-batches of an update if none is empty."""
    return scoring.count_micro_batches(self.minibatch_rows, self.learner.micro_rows, self.shards)

  @functools.cached_property
  def learner(self) -> Learner:
    """The trainer, of which nothing is compiled here."""
    return Learner(self.arch, self.cfg, self.mesh, platform=None if isinstance(self.mesh, Mesh) else "tpu")

  @functools.cached_property
  def state(self) -> TrainState:
    """Shapes and shardings of the trainer's state."""
    return self.learner.abstract_state()

  @functools.cached_property
  def sampler(self) -> Any:
    """Shapes and shardings of the sampler's weights."""
    return self.publisher.abstract()

  @functools.cached_property
  def publisher(self) -> Publisher:
    """What makes the sampler's copy of the weights."""
    return Publisher(self.arch, self.mesh, self.layout, gather=self.cfg.rollout.gather_weights)

  def batch(self, n_rows: int, *, scored: bool) -> Batch:
    """Shapes and shardings of a batch of rows; with what an update reads, if `scored`."""
    T, C = self.n_columns, self.n_targets
    rows = sharding.batch_sharding(self.mesh, 1)
    of = lambda dtype, *shape: jax.ShapeDtypeStruct((n_rows, *shape), dtype, sharding=rows)
    loss, advantages = self.cfg.loss, C if self.cfg.learner.pack else 1
    own = self.n_minibatches == 1  # the update's forward pass gives pi_old
    return Batch(
        tokens_RT=of(jnp.int32, T), segment_RT=of(jnp.int32, T), position_RT=of(jnp.int32, T),
        completion_mask_RC=of(jnp.bool_, C), advantage_RC=of(jnp.float32, advantages) if scored else None,
        logp_old_RC=of(jnp.float32, C) if scored and not own else None,
        logp_ref_RC=of(jnp.float32, C) if scored and loss.kl_coef != 0 else None,
        logp_sampler_RC=of(jnp.float32, C) if scored and (own or loss.importance_cap is not None) else None,
        forced_RC=of(jnp.bool_, C) if scored and loss.importance_cap is not None else None)

  def live(self) -> tuple[Any, Any]:
    """(shapes and shardings of the engine's cache at its largest, and of its hidden states)."""
    columns = slots.context_columns(
        self.shape.n_prompt_slots, max(self.n_prefix), self.plan.segment_steps) + self.plan.length_buckets[-1]
    rows = self.plan.row_buckets[0]
    cache = jax.eval_shape(lambda: slots.new_cache(self.arch, self.layout, rows, columns))
    hidden = jax.ShapeDtypeStruct((rows, self.arch.hidden_size), self.layout.dtype)
    return self._place(cache, "batch"), self._place(hidden, "batch")

  def pool(self) -> Any:
    """Shapes and shardings of the pool of prompts and budget sentences."""
    pool = jax.eval_shape(lambda: slots.new_pool(
        self.arch, self.layout, self.shape.n_queries, self.shape.n_prompt_slots, len(self.n_prefix),
        max(self.n_prefix)))
    return pool.replace(**{
        f.name: self._place(getattr(pool, f.name), "none") for f in dataclasses.fields(pool)})

  def _place(self, tree: Any, rows: str) -> Any:
    def one(x):
      axes = slots.cache_axes(x.ndim, rows) if x.ndim > 3 else (rows, *("none",) * (x.ndim - 1))
      spec = sharding.partition_spec(axes, x.shape, self.mesh)
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, spec))

    return jax.tree.map(one, tree)


def make_job(cfg: Config, arch: Architecture, topology: Topology, n_prefix: tuple[int, ...], mesh: Any = None) -> Job:
  """The Job of a configuration on a topology.

  Args:
    mesh: of the topology's devices; None stands for absent ones.
  Raises:
    ValueError: when the settings do not fit the devices, the network or each other.
  """
  validation.validate(cfg, n_devices=topology.n_devices, arch=arch, prefix_tokens=max(n_prefix))
  for field in ("lora.rank", "mesh.rollout_tensor", "mesh.rollout_devices"):
    if value := config.get(cfg, field):
      raise ValueError(f"config.{field}={value} cannot be planned; set it to 0, which needs at least as much memory.")
  if mesh is None:
    m = cfg.mesh
    fsdp = topology.n_devices // (m.data * m.tensor) if m.fsdp == -1 else m.fsdp
    mesh = AbstractMesh((m.data, fsdp, m.tensor), sharding.AXES, (AxisType.Auto,) * len(sharding.AXES))
  shape = Shape(
      n_queries=cfg.rollout.queries, n_prompt_slots=cfg.data.max_prompt_tokens, n_rollouts=cfg.rollouts_per_budget,
      caps=cfg.caps, n_prefix=n_prefix, count_prefix=cfg.rollout.count_prefix_tokens,
      prefix_has_loss=cfg.prompt.prefix_role == "action")
  # Only the platform of its devices is read.
  tpu = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform="tpu")]))
  layout = make_layout(cfg.rollout, cast(Any, tpu), cfg.model.compute_dtype)
  n_shards = mesh.size // mesh.shape["tensor"]
  return Job(cfg, arch, topology, mesh, n_prefix, layout, shape, make_plan(shape, n_shards, cfg.rollout, layout))


def find_architecture(cfg: Config) -> tuple[Architecture, str, pathlib.Path | None]:
  """(the network, where it was read, the checkpoint's directory or None), without fetching anything.

  Raises:
    ValueError: when model.path's config.json is not at hand and there is no preset of it either, or they differ.
  """
  directory = _local_directory(cfg.model.path, cfg.model.revision)
  if directory is not None:
    arch = architecture.from_hf_config(directory)
    if cfg.model.preset:
      presets.check_preset(cfg.model.preset, arch)
    return arch, f"{directory / 'config.json'}", directory
  if name := cfg.model.preset or presets.CHECKPOINTS.get(cfg.model.path, ""):
    return presets.preset(name), f"preset {name}", None
  raise ValueError(
      f"model.path={cfg.model.path!r} has no config.json on this machine, and model.preset='' names no architecture; "
      f"download the checkpoint, or give --config.model.preset, one of {', '.join(sorted(presets.PRESETS))}.")


def _local_directory(path: str, revision: str) -> pathlib.Path | None:
  """Where a checkpoint's config.json lies: the path itself, or the hub's cache on this machine."""
  if not path:
    return None
  directory = pathlib.Path(path).expanduser()
  if (directory / "config.json").is_file():
    return directory
  if directory.exists() or not hub.is_hub_id(path):
    return None
  return hub.find_cached(path, revision, whole=False)


def find_prefix(cfg: Config, arch: Architecture, directory: pathlib.Path | None) -> tuple[tuple[int, ...], str]:
  """([G] tokens of each budget sentence, how they were found): the tokenizer's, or an estimate without one."""
  if directory is not None and (directory / "tokenizer.json").is_file():
    from hbpo_jax import assemble
    from hbpo_jax.data.prompts import PromptBuilder
    builder = PromptBuilder(assemble.load_tokenizer(directory, arch), cfg, str(directory))
    n_prefix_G = builder.training_prefix(cfg.rollout.budgets)[1]
    return tuple(map(int, n_prefix_G)), "counted with the checkpoint's tokenizer"
  # A token for each word, digit and mark, and one for what may lie between.
  texts = [cfg.prompt.opening(g, budget) for g, budget in enumerate(cfg.rollout.budgets)]
  n_tokens = lambda text: 1 + len(re.findall(r"[^\W\d]+|\d|[^\w\s]", text)) if text else 0
  return tuple(map(n_tokens, texts)), "assumed, a token per word, digit and mark: no tokenizer at hand"
