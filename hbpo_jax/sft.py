"""Supervised warm start: makes, or starts from, a model and trains it on worked responses.

  python -m hbpo_jax.sft --config=quickstart --workdir=runs/warmstart

Writes a Hugging Face checkpoint to WORKDIR/export, which `hbpo_jax.train` takes as model.path. Where the settings have
no model.path, but a task that brings a model of its own, `train` does all this first, in its WORKDIR/warmstart.
SIGTERM or Ctrl-C stops it with its state saved in WORKDIR/unfinished, and the same command goes on; killed otherwise,
it starts over.
"""

from hbpo_jax import flags

if __name__ == "__main__":
  flags.show_help("sft")  # Before the imports below, which take seconds.

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import functools
import math
import pathlib
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp

from hbpo_jax import assemble, distributed, export, hub, preemption, run_info, validation
from hbpo_jax import config as config_lib
from hbpo_jax.config import CheckpointConfig, Config, LoraConfig
from hbpo_jax.data import problems as problems_lib
from hbpo_jax.data import synthetic
from hbpo_jax.data.prompts import PromptBuilder
from hbpo_jax.data.sft_data import SftData
from hbpo_jax.learning.checkpoint import Checkpointer
from hbpo_jax.learning.guards import check_finite
from hbpo_jax.learning.learner import Learner
from hbpo_jax.models import decoder, lora, sharding, weights
from hbpo_jax.models.architecture import Architecture
from hbpo_jax.reporting.console import Console
from hbpo_jax.reporting.writers import MetricWriter
from hbpo_jax.structs import TrainState

UNFINISHED = "unfinished"  # The folder of what a stopped warm start goes on from; gone when it is done.
_VOCAB_MULTIPLE = 64  # Embedding rows are rounded up to this, so that they divide over devices.


@distributed.on_every_host
@preemption.stoppable
def main(cfg: Config, workdir: str) -> None:
  """Trains cfg.sft.steps updates and exports."""
  assemble.keep_compiled_programs()
  train(cfg, pathlib.Path(workdir))


def with_model(cfg: Config, root: pathlib.Path) -> Config:
  """The settings with a model: their own, or that of a warm start in root/warmstart, which is trained first.

  Only settings without model.path get one, whose task brings a model of its own (data.source='synthetic', sft.path='').
  A warm start that is complete is taken as it is, so that a run that is started again finds the same weights.

  Args:
    root: the working directory of the run.
  Raises:
    ValueError: when the warm start that is there was trained under other settings; names one of them.
  """
  if cfg.model.path or cfg.sft.path or cfg.data.source != "synthetic":
    return cfg
  validation.validate(cfg, n_devices=jax.device_count())
  folder = root / "warmstart"
  if not distributed.from_writer("the warm start", lambda: _is_complete(folder, cfg)):
    # Nothing is trained for a run that would be refused.
    model, _ = new_model(cfg)
    lora.check(cfg.lora, model.arch)
    assemble.training_engine(cfg, model)
    train(cfg, folder, f"model.path is empty: a small model is made and trained first, in {folder}")
    distributed.barrier("the end of the warm start")
  return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, path=str(folder / "export")))


# Settings that decide the weights of a warm start, by dotted prefix.
DECISIVE = (
    "seed", "sft.", "model.compute_dtype", "model.param_dtype", "data.source", "data.limit", "data.max_prompt_tokens",
    "data.synthetic.", "prompt.system", "prompt.instruction", "prompt.budget_sentence", "prompt.openings",
    "prompt.efficiency_sentence", "rollout.budgets", "reward.max_response_tokens", "optimizer.")


def _is_complete(folder: pathlib.Path, cfg: Config) -> bool:
  """Whether a folder holds a finished warm start, which must be one of these settings."""
  if not (folder / "export" / "config.json").is_file():
    return False
  if not (folder / "run.json").is_file():
    return True  # Somebody's own model, put there.
  saved, wanted = config_lib.flatten(run_info.read_config(folder)), supervised_config(cfg)
  for name in config_lib.field_table():
    if not name.startswith(DECISIVE) or name not in saved:
      continue
    here, there = config_lib.get(wanted, name), saved[name]
    if here != (tuple(there) if isinstance(there, list) else there):
      raise ValueError(
          f"config.{name}={here!r}, but the warm start in {folder} was trained with {there!r}; set it back, "
          "remove that folder, or give another --workdir.")
  return True


def train(cfg: Config, root: pathlib.Path, note: str = "") -> None:
  """Trains cfg.sft.steps updates and writes root/export.

  Args:
    note: a line for the top of the output.
  """
  cfg = supervised_config(cfg)
  if cfg.sft.path:
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, path=cfg.sft.path))
    model = assemble.open_model(cfg)
    params = weights.load(model.directory, model.arch, model.mesh, param_dtype=assemble.base_dtype(cfg))
    source = model.directory
  else:
    cfg = dataclasses.replace(cfg, lora=LoraConfig())  # random weights are no base
    model, source = new_model(cfg)
    draw = jax.jit(
        functools.partial(decoder.init, model.arch, param_dtype=jnp.dtype(cfg.model.param_dtype)),
        out_shardings=sharding.param_shardings(model.arch, model.mesh))
    params = draw(jax.random.fold_in(jax.random.key(cfg.seed), 2))
  problems, _ = problems_lib.load_train_and_eval(cfg.data, cfg.seed)
  data = SftData(problems, model.builder, cfg)
  learner = Learner(model.arch, cfg, model.mesh, total_updates=cfg.sft.steps)
  if not cfg.learner.pack and cfg.sft.rows % learner.shards:
    raise ValueError(
        f"sft.rows={cfg.sft.rows} does not divide over mesh.data x mesh.fsdp = {learner.shards} devices; make it a "
        "multiple, or set learner.pack=true.")

  with contextlib.ExitStack() as stack:
    unfinished = stack.enter_context(
        Checkpointer(root / UNFINISHED, CheckpointConfig(save_every=0, max_to_keep=1)))
    state, start = _first_state(cfg, learner, unfinished, params)
    run_info.write_run_json(root, cfg, model.mesh, {
        "architecture": dataclasses.asdict(model.arch), "model_origin": hub.origin(model.directory)})
    console = stack.enter_context(Console(cfg.log, cfg.sft.steps, start, file=distributed.output()))
    console.header([
        *([note] if note else []),
        f"warm start: {len(problems):,} problems ({data.n_dropped:,} dropped), {cfg.sft.steps} updates",
        *([f"resuming: {start} of {cfg.sft.steps} updates are done"] if start else [])])
    writer = None
    if distributed.is_writer():
      writer = stack.enter_context(MetricWriter(root, cfg.log, config_lib.to_json_dict(cfg), start))
    for step in range(start, cfg.sft.steps):
      if preemption.reached():
        _stop(cfg, unfinished, step, state)
      started = time.perf_counter()
      state, metrics = learner.sft_update(state, data.batch(step))
      metrics = jax.device_get(metrics)
      check_finite(metrics, step)
      row = {f"update/{name}": float(value) for name, value in metrics.items()}
      row["tokens_per_s"] = row["update/tokens"] / (time.perf_counter() - started)
      if writer is not None:
        writer.write(step, row)
      if step % max(1, cfg.sft.steps // 20) == 0 or step == cfg.sft.steps - 1:
        console.message(f"update {step + 1} of {cfg.sft.steps}: loss {row['update/loss']:.4f} nats per token")
    card = export.cards_of_run(
        cfg, model.directory if cfg.sft.path else None, cfg.sft.steps, stage="sft", own_tokenizer=not cfg.sft.path)[""]
    weights.export(learner.whole(state.params), model.arch, source, root / "export", card=card)
    console.message(f"exported to {root / 'export'}")
  distributed.barrier("the end of the warm start's updates")
  if distributed.is_writer():
    shutil.rmtree(root / UNFINISHED)


def _first_state(cfg: Config, learner: Learner, unfinished: Checkpointer, params: Any) -> tuple[TrainState, int]:
  """(state, updates done): of a warm start that was stopped, or fresh."""
  def check(meta: Mapping[str, Any]) -> None:
    changes = [c for c in run_info.compare(cfg, meta["config"]) if c.breaking or c.name.startswith("sft.")]
    if changes:
      raise ValueError(
          f"{', '.join(map(str, changes))}: the warm start that was stopped in this workdir began otherwise; set it "
          f"back, or delete {unfinished.directory} to start over.")

  restored = unfinished.restore_latest(learner.abstract_state(), check=check)
  if restored is None:
    return learner.new_state(params), 0
  if cfg.lora.rank:
    learner.freeze(params)
  return restored[0], restored[1]["updates"]


def _stop(cfg: Config, unfinished: Checkpointer, step: int, state: TrainState) -> None:
  if step == 0:
    raise preemption.Stopped("no update was done yet")
  started = time.monotonic()
  unfinished.save(step, state, {"updates": step, "config": config_lib.to_json_dict(cfg)})
  unfinished.wait()
  raise preemption.Stopped(
      f"the state after {step} of {cfg.sft.steps} updates is saved, in {time.monotonic() - started:.1f} s"
      + preemption.age())


def supervised_config(cfg: Config) -> Config:
  """The settings with the optimizer of the warm start: `sft.learning_rate`, cosine decay, 5 % warm-up."""
  optimizer = dataclasses.replace(
      cfg.optimizer, learning_rate=cfg.sft.learning_rate, weight_decay=cfg.sft.weight_decay, schedule="cosine",
      final_fraction=0.0, warmup_updates=math.ceil(0.05 * cfg.sft.steps))
  learner = dataclasses.replace(cfg.learner, microbatch_rows=0)
  return dataclasses.replace(cfg, optimizer=optimizer, learner=learner)


def new_model(cfg: Config) -> tuple[assemble.Model, Any]:
  """(model, tokenizer) of a small decoder for the synthetic task, as long as the run's responses and evaluations need.

  Raises:
    ValueError: when the data are not the synthetic task, whose vocabulary is the only one made here, or the settings do
      not fit the model, the devices or each other.
  """
  if cfg.data.source != "synthetic":
    raise ValueError(
        f"sft.path='' makes a model for the synthetic task only, but data.source={cfg.data.source!r}; "
        "set sft.path to a Hugging Face checkpoint.")
  validation.validate(cfg, n_devices=jax.device_count())
  sentences = (cfg.prompt.budget_sentence, cfg.prompt.efficiency_sentence, cfg.prompt.instruction, cfg.prompt.system,
               *cfg.prompt.openings)
  tokenizer = synthetic.make_tokenizer(cfg.data.synthetic, cfg.sft.stated_budgets or cfg.rollout.budgets, sentences)
  sft, builder = cfg.sft, PromptBuilder(tokenizer, cfg)
  longest_opening = int(builder.training_prefix(cfg.rollout.budgets)[1].max())
  uncounted = 0 if cfg.rollout.count_prefix_tokens else longest_opening
  n_new = max(cfg.reward.max_response_tokens + uncounted, cfg.eval.max_new_tokens if cfg.data.n_eval else 0)
  arch = Architecture(
      family="qwen3", n_layers=sft.n_layers, hidden_size=sft.hidden_size, mlp_size=sft.mlp_size, n_heads=sft.n_heads,
      n_kv_heads=sft.n_kv_heads, head_size=sft.hidden_size // sft.n_heads,
      vocab_size=-(-len(tokenizer) // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE, rope_theta=10000.0, rope_scaling=None,
      rms_eps=1e-6, tie_embeddings=True, qkv_bias=False, qk_norm=True,
      max_context=cfg.data.max_prompt_tokens + n_new)
  validation.validate(cfg, n_devices=jax.device_count(), arch=arch, prefix_tokens=longest_opening)
  return assemble.Model(pathlib.Path(), arch, builder, *assemble.make_meshes(cfg)), tokenizer


def cli(argv: Sequence[str] | None = None) -> None:
  """Runs the command with these arguments; None means the process's."""
  flags.run(main, name="sft", argv=argv)


if __name__ == "__main__":
  cli()
