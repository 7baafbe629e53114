"""What every command needs before it touches a weight: checkpoint directory, architecture, tokenizer, mesh."""

import dataclasses
import pathlib

import jax
from jax.sharding import Mesh
import numpy as np
import transformers

from hbpo_jax import validation
from hbpo_jax.config import Config
from hbpo_jax.data.prompts import PromptBuilder
from hbpo_jax.models import architecture, presets, sharding, weights
from hbpo_jax.models.architecture import Architecture
from hbpo_jax.rollout import engine, sampling
from hbpo_jax.rollout.shape import SLOTS_PER_SHARD


@dataclasses.dataclass(frozen=True)
class Model:
  """An opened checkpoint; nothing of its weights is read yet."""
  directory: pathlib.Path
  arch: Architecture
  builder: PromptBuilder
  mesh: Mesh


def open_model(cfg: Config) -> Model:
  """Checks the configuration against the devices and the checkpoint, and opens its tokenizer.

  Raises:
    ValueError, FileNotFoundError: name the field or file, the value and the remedy.
  """
  validation.validate(cfg, n_devices=jax.device_count())
  if not cfg.model.path:
    raise ValueError("model.path='' names no checkpoint; give a Hugging Face directory or hub id.")
  directory = weights.resolve(cfg.model.path, cfg.model.revision)
  arch = architecture.from_hf_config(directory)
  if cfg.model.preset:
    presets.check_preset(cfg.model.preset, arch)
  builder = PromptBuilder(load_tokenizer(directory, arch), cfg, str(directory))
  longest = int(builder.prefix(cfg.rollout.budgets)[1].max())
  validation.validate(cfg, n_devices=jax.device_count(), arch=arch, prefix_tokens=longest)
  return Model(directory, arch, builder, sharding.make_mesh(cfg.mesh))


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(directory: pathlib.Path, arch: Architecture) -> transformers.PreTrainedTokenizerBase:
  """The checkpoint's tokenizer.

  Raises:
    FileNotFoundError: when the directory holds none.
    ValueError: when transformers cannot read it, or it has ids that the embedding has not.
  """
  # Without its files, transformers makes an empty tokenizer and says nothing.
  if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
    raise FileNotFoundError(
        f"model.path={str(directory)!r} holds no tokenizer (one of {', '.join(_TOKENIZER_FILES)}); save it there with "
        "tokenizer.save_pretrained().")
  # AutoTokenizer rebuilds tokenizer.json as the class that it expects of a model type, with other token ids where the
  # checkpoint brought its own tokenizer; the generic class takes the file as it is.
  generic = (directory / "tokenizer.json").is_file()
  loader = transformers.PreTrainedTokenizerFast if generic else transformers.AutoTokenizer
  try:
    tokenizer = loader.from_pretrained(directory)
  except (OSError, ValueError, KeyError) as error:
    raise ValueError(
        f"model.path={str(directory)!r}: transformers cannot read the tokenizer ({error}); save it there again."
    ) from error
  if len(tokenizer) > arch.vocab_size:
    raise ValueError(
        f"model.path={str(directory)!r}: the tokenizer has {len(tokenizer)} tokens, the embedding {arch.vocab_size} "
        "rows; put the tokenizer there that the model was trained with.")
  return tokenizer


def training_engine(cfg: Config, model: Model, *, n_queries: int | None = None) -> engine.Engine:
  """The sampler of the training step: all budgets, J rollouts each; n_queries = None means rollout.queries."""
  n_prefix = tuple(int(n) for n in model.builder.prefix(cfg.rollout.budgets)[1])
  shape = engine.Shape(
      n_queries=n_queries or cfg.rollout.queries, n_prompt_slots=cfg.data.max_prompt_tokens,
      n_rollouts=cfg.rollouts_per_budget, caps=cfg.caps, n_prefix=n_prefix,
      count_prefix=cfg.rollout.count_prefix_tokens, prefix_has_loss=cfg.prompt.prefix_role == "action")
  draws = sampling.make_sampling(
      cfg.rollout.temperature, cfg.rollout.top_p, cfg.rollout.top_k, model.builder.eos_ids)
  return engine.Engine(
      model.arch, model.mesh, shape, draws, compute_dtype=cfg.model.compute_dtype, cfg=cfg.rollout)


def evaluation_engine(cfg: Config, model: Model, n_queries: int) -> engine.Engine:
  """The sampler of `eval.mode`: one subgroup, eval.samples_per_problem responses to each of n_queries problems."""
  shape = engine.Shape(
      n_queries=n_queries, n_prompt_slots=cfg.data.max_prompt_tokens, n_rollouts=cfg.eval.samples_per_problem,
      caps=(cfg.eval.max_new_tokens or cfg.reward.max_response_tokens,),
      n_prefix=tuple(int(n) for n in model.builder.prefix(cfg.eval.mode)[1]), count_prefix=True, prefix_has_loss=True)
  draws = sampling.make_sampling(cfg.eval.temperature, cfg.eval.top_p, cfg.eval.top_k, model.builder.eos_ids)
  # The slots and the list of buckets in the settings are for training's lengths; longer responses get fewer slots, so
  # that the cache is no larger.
  n_shards = model.mesh.size // model.mesh.shape["tensor"]
  slots = cfg.rollout.slots or SLOTS_PER_SHARD * n_shards
  columns = shape.n_prompt_slots + np.array([max(cfg.caps), max(shape.caps)])
  slots = max(n_shards, min(slots, slots * columns[0] // columns[1]))
  rollout = dataclasses.replace(cfg.rollout, slots=int(slots), length_buckets=())
  return engine.Engine(model.arch, model.mesh, shape, draws, compute_dtype=cfg.model.compute_dtype, cfg=rollout)


_CACHE = "~/.cache/hbpo_jax/xla"


def keep_compiled_programs() -> None:
  """Turns on JAX's persistent compilation cache, in $JAX_COMPILATION_CACHE_DIR or else in ~/.cache/hbpo_jax/xla."""
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(_CACHE).expanduser()))
  # A run has dozens of programs that take half a second each.
  if jax.config.jax_persistent_cache_min_compile_time_secs == 1.0:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
