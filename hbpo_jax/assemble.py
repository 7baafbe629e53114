"""What every command needs before it touches a weight: checkpoint directory, architecture, tokenizer, mesh."""

import dataclasses
import pathlib
import time
from typing import Any

import jax
from jax.sharding import Mesh
import transformers

from hbpo_jax import hub, run_info, validation
from hbpo_jax.config import Config, LoraConfig
from hbpo_jax.data.prompts import PromptBuilder
from hbpo_jax.learning import checkpoint
from hbpo_jax.learning.learner import Learner
from hbpo_jax.models import architecture, lora, presets, sharding, weights
from hbpo_jax.models.architecture import Architecture
from hbpo_jax.reporting.console import Console
from hbpo_jax.rollout import engine, sampling
from hbpo_jax.rollout.shape import SLOTS_PER_SHARD


@dataclasses.dataclass(frozen=True)
class Model:
  """An opened checkpoint; nothing of its weights is read yet.

  directory: of the Hugging Face files.
  mesh: of weights, scoring and updates.  rollout_mesh: of the samplers.
  trained: the folder of a training run's checkpoint, whose weights take the place of the directory's; or None.
  """
  directory: pathlib.Path
  arch: Architecture
  builder: PromptBuilder
  mesh: Mesh
  rollout_mesh: Mesh
  trained: pathlib.Path | None = None

  @property
  def identity(self) -> dict[str, str]:
    """What tells its weights from others: path, and a fingerprint that reads a part of the files."""
    path = self.trained or self.directory
    files = checkpoint.fingerprint_files(path) if self.trained else weights.fingerprint(path)
    return {"path": str(path), "fingerprint": files}


def open_model(cfg: Config, run: pathlib.Path | None = None) -> Model:
  """Checks the configuration against the devices and the checkpoint, and opens its tokenizer.

  Args:
    run: directory of a run that may have begun earlier: it keeps the commit of the hub that it began with.
  Raises:
    ValueError, FileNotFoundError: name the field or file, the value and the remedy.
  """
  validation.validate(cfg, n_devices=jax.device_count())
  if not cfg.model.path:
    raise ValueError(
        "model.path='' names no checkpoint; give a Hugging Face directory or hub id (`train` leaves the model that it "
        "makes for the synthetic task in WORKDIR/warmstart/export).")
  revision = cfg.model.revision if run is None else run_info.first_revision(run, cfg)
  directory = hub.checkpoint(cfg.model.path, revision)
  arch = architecture.from_hf_config(directory)
  if cfg.model.preset:
    presets.check_preset(cfg.model.preset, arch)
  builder = PromptBuilder(load_tokenizer(directory, arch), cfg, str(directory))
  longest = int(builder.training_prefix(cfg.rollout.budgets)[1].max())
  validation.validate(cfg, n_devices=jax.device_count(), arch=arch, prefix_tokens=longest)
  lora.check(cfg.lora, arch)
  return Model(directory, arch, builder, *make_meshes(cfg))


def open_for_evaluation(cfg: Config) -> Model:
  """As `open_model`, for a checkpoint that is only to be evaluated, which may also be one of a training run.

  Raises:
    ValueError, FileNotFoundError: name the field or file, the value and the remedy.
  """
  validation.validate_evaluation(cfg, n_devices=jax.device_count())
  if not cfg.model.path:
    raise ValueError(
        "model.path='' names no checkpoint; give a Hugging Face directory, a hub id, or RUN/checkpoints/STEP.")
  found = checkpoint.locate(cfg.model.path)
  source, revision = cfg.model.path, cfg.model.revision
  if found is not None:
    source, revision = base_of(found[0])
  directory = hub.checkpoint(source, revision)
  arch = architecture.from_hf_config(directory)
  builder = PromptBuilder(load_tokenizer(directory, arch), cfg, str(directory))
  trained = pathlib.Path(cfg.model.path).expanduser() if found else None
  return Model(directory, arch, builder, *make_meshes(cfg), trained)


def base_of(run: pathlib.Path) -> tuple[str, str]:
  """(path or hub id, revision) of the model that a run began with: of the hub, the very commit.

  Raises:
    FileNotFoundError, ValueError: when run.json is missing or damaged.
  """
  settings, origin = run_info.read_config(run)["model"], run_info.read_origin(run)
  path, made = pathlib.PurePath(settings["path"]), run / "warmstart" / "export"
  if path.parts[-2:] == made.parts[-2:] and not pathlib.Path(path).exists() and made.is_dir():
    return str(made), settings["revision"]  # Made by the run itself, which was moved since, or fetched from a bucket.
  return settings["path"], origin["commit"] if origin else settings["revision"]


def make_meshes(cfg: Config) -> tuple[Mesh, Mesh]:
  """The meshes of updates and of rollouts, of this process's settings.

  Raises:
    ValueError: when the settings do not fit the devices; names the field.
  """
  devices = jax.devices()
  if cfg.mesh.rollout_devices and jax.process_count() > 1:
    raise ValueError(
        f"mesh.rollout_devices={cfg.mesh.rollout_devices} is for one process, and this job has {jax.process_count()}: "
        "two threads of each would meet the others' in no fixed order. Set it to 0, and pipeline=on_policy.")
  mesh = sharding.make_mesh(cfg.mesh, devices[:len(devices) - cfg.mesh.rollout_devices])
  return mesh, sharding.make_rollout_mesh(cfg.mesh, mesh, devices)


def load_params(cfg: Config, model: Model) -> dict:
  """The params of an opened checkpoint, in model.compute_dtype, or as a training run saved them.

  Raises:
    ValueError, FileNotFoundError: when a file is missing or damaged; names it.
  """
  if model.trained is None:
    return weights.load(model.directory, model.arch, model.mesh, param_dtype=cfg.model.compute_dtype)
  learner, params = load_trained(cfg, model.trained, model.directory, model.arch, model.mesh)
  return learner.whole(params)


def load_trained(
    cfg: Config, folder: pathlib.Path, directory: pathlib.Path, arch: Architecture, mesh: Mesh) -> tuple[Learner, Any]:
  """(what knows the params, what a training run saved: the params, or with `lora.rank` the adapters).

  Args:
    cfg: model.compute_dtype is that of weights that were not trained.
    folder: RUN/checkpoints/STEP or RUN/best/STEP.
    directory: of the model that the run began with.
  Raises:
    ValueError, FileNotFoundError: when a file is missing or damaged; names it.
  """
  run, step = folder.parent.parent, int(folder.name)
  saved = run_info.read_config(run)
  of_adapters: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.get("lora", {}).items()}
  adapters = LoraConfig(**of_adapters)
  # A run with adapters saves nothing else.
  learner = Learner(arch, dataclasses.replace(cfg, lora=adapters, model=dataclasses.replace(
      cfg.model, param_dtype=saved["model"]["param_dtype"])), mesh)
  with checkpoint.Checkpointer(folder.parent, cfg.checkpoint, must_exist=True) as checkpoints:
    params = checkpoints.restore_params(step, learner.abstract_state().params)
  if adapters.rank:
    learner.freeze(weights.load(directory, arch, mesh, param_dtype=cfg.model.compute_dtype))
  return learner, params


def base_dtype(cfg: Config) -> str:
  """The dtype in which training keeps the network's own weights: frozen ones need no more than their use."""
  return cfg.model.compute_dtype if cfg.lora.rank else cfg.model.param_dtype


def compile_samplers(console: Console, **samplers) -> None:
  """Compiles every program that the samplers can need, so that none is compiled in mid-run; says how far it is."""
  for name, sampler in samplers.items():
    if sampler is not None:
      started = time.perf_counter()

      def progress(done: int, total: int, name=name, started=started) -> None:
        if done in (1, total) or done % max(1, total // 4) == 0:
          spent_s = time.perf_counter() - started
          console.message(f"compiling the sampler for {name}: {done} of {total} programs, {spent_s:.0f} s")

      sampler.warm_up(progress)


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
    # A checkpoint may name Python files of its own (auto_map); they never run, and nobody is asked whether they may.
    tokenizer = loader.from_pretrained(directory, trust_remote_code=False)
  except Exception as error:  # The tokenizers library raises nothing narrower.
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
  n_prefix = tuple(int(n) for n in model.builder.training_prefix(cfg.rollout.budgets)[1])
  shape = engine.Shape(
      n_queries=n_queries or cfg.rollout.queries, n_prompt_slots=cfg.data.max_prompt_tokens,
      n_rollouts=cfg.rollouts_per_budget, caps=cfg.caps, n_prefix=n_prefix,
      count_prefix=cfg.rollout.count_prefix_tokens, prefix_has_loss=cfg.prompt.prefix_role == "action")
  draws = sampling.make_sampling(
      cfg.rollout.temperature, cfg.rollout.top_p, cfg.rollout.top_k, model.builder.eos_ids)
  return engine.Engine(
      model.arch, model.rollout_mesh, shape, draws, compute_dtype=cfg.model.compute_dtype, cfg=cfg.rollout)


def evaluation_engine(
    cfg: Config, model: Model, *, n_queries: int, n_samples: int, n_prompt_slots: int, n_new: int,
    n_prefix: tuple[int, ...]) -> engine.Engine:
  """The sampler of an evaluation: one subgroup per mode, n_samples responses of at most n_new tokens in each."""
  shape = engine.Shape(
      n_queries=n_queries, n_prompt_slots=n_prompt_slots, n_rollouts=n_samples, caps=(n_new,) * len(n_prefix),
      n_prefix=n_prefix, count_prefix=True, prefix_has_loss=True)
  draws = sampling.make_sampling(cfg.eval.temperature, cfg.eval.top_p, cfg.eval.top_k, model.builder.eos_ids)
  # The slots and the list of buckets in the settings are for training's lengths; longer responses get fewer slots, so
  # that the cache is no larger.
  mesh = model.rollout_mesh
  n_shards = mesh.size // mesh.shape["tensor"]
  slots = cfg.rollout.slots or SLOTS_PER_SHARD * n_shards
  columns = (cfg.data.max_prompt_tokens + max(cfg.caps), n_prompt_slots + n_new)
  slots = max(n_shards, min(slots, slots * columns[0] // columns[1]))
  rollout = dataclasses.replace(cfg.rollout, slots=int(slots), length_buckets=())
  return engine.Engine(model.arch, mesh, shape, draws, compute_dtype=cfg.model.compute_dtype, cfg=rollout)


_CACHE = "~/.cache/hbpo_jax/xla"


def keep_compiled_programs() -> None:
  """Turns on JAX's persistent compilation cache, in $JAX_COMPILATION_CACHE_DIR or else in ~/.cache/hbpo_jax/xla."""
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(_CACHE).expanduser()))
  # A run has dozens of programs that take half a second each.
  if jax.config.jax_persistent_cache_min_compile_time_secs == 1.0:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
