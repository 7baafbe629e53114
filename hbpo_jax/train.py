"""Trains a Hugging Face checkpoint with Hierarchical Budget Policy Optimization.

  python -m hbpo_jax.train --config=quickstart --workdir=runs/quickstart

Running the same command again continues from the newest good checkpoint in WORKDIR.
"""

import contextlib
import dataclasses
import functools
import pathlib
import time

import jax
import numpy as np

from hbpo_jax import assemble, distributed, flags, preview, run_info
from hbpo_jax import config as config_lib
from hbpo_jax.config import Config
from hbpo_jax.data import problems as problems_lib
from hbpo_jax.data.pipeline import Pipeline, PipelineIterator
from hbpo_jax.evaluation.during import Evaluations
from hbpo_jax.grading.judge import Judge
from hbpo_jax.learning.checkpoint import Checkpointer
from hbpo_jax.learning.learner import Learner, check_finite
from hbpo_jax.learning.reference import Reference
from hbpo_jax.models import weights
from hbpo_jax.objective import advantage as advantage_lib
from hbpo_jax.objective import reward as reward_lib
from hbpo_jax.reporting import plots, tables
from hbpo_jax.reporting import summary as summary_lib
from hbpo_jax.reporting.console import Console
from hbpo_jax.reporting.step_log import StepLog, StepRecord
from hbpo_jax.rollout import engine as engine_lib
from hbpo_jax.structs import TrainState


@dataclasses.dataclass(frozen=True)
class Trainer:
  """The parts of a run, each from its own room."""
  cfg: Config
  model: assemble.Model
  batches: PipelineIterator
  engine: engine_lib.Engine
  judge: Judge
  learner: Learner
  reference: Reference | None
  checkpoints: Checkpointer
  evaluations: Evaluations
  log: StepLog

  def train(self, state: TrainState, start: int, wall_s: "WallClock") -> TrainState:
    """Algorithm 1 from step `start` to the last; every step is in a checkpoint or will be computed again."""
    for step in range(start, self.cfg.steps):
      state = self._step(step, state)
      meta = lambda: {
          "data_state": self.batches.get_state(), "config": config_lib.to_json_dict(self.cfg), "wall_s": wall_s()}
      if self.evaluations.due(step + 1):
        self.log.annotate(self.evaluations.during(step + 1, state, meta))
      if self.checkpoints.due(step + 1, last=self.cfg.steps):
        self.log.flush()  # A saved step is a logged step: a resumed run leaves no gap.
        self.checkpoints.wait()
        self.judge.forget_before(min(self.checkpoints.steps(), default=0))
        self.checkpoints.save(step + 1, state, meta())
    self.log.flush()
    return state

  def _step(self, step: int, state: TrainState) -> TrainState:
    cfg, clock = self.cfg, Stopwatch()
    problems, prompts = next(self.batches)

    # Rollouts: J responses per query and budget. The previous step is logged while they decode, and each response is
    # graded while others still decode.
    key = jax.random.fold_in(training_key(cfg.seed), step)
    generation = self.engine.start(self.engine.publish(state.params), prompts, key)
    self.log.flush()
    rollouts, grading = generation.rollouts, self.judge.begin(step)
    responses = {}
    for finished in generation:
      for index in map(tuple, finished.tolist()):
        responses[index] = self.model.builder.decode(rollouts.response(*index))
        grading.submit(index, responses[index], problems[index[0]])
    clock.lap("rollout_s")

    # Verdicts: a score in [0, 1] for each response.
    verdicts = grading.collect()
    shape = rollouts.n_gen_BGJ.shape
    verdict_R = [verdicts[index] for index in np.ndindex(shape)]
    score_BGJ = np.array([v.score for v in verdict_R], np.float32).reshape(shape)
    finished_BGJ = np.array([v.finished for v in verdict_R]).reshape(shape)
    clock.lap("grade_s")

    # Rewards and advantages within and across budgets.
    reward_BGJ, advantage = rewards_and_advantages(rollouts.n_gen_BGJ, score_BGJ, finished_BGJ, cfg=cfg)

    # pi_old (and pi_ref) by the trainer's own forward pass, then one update per minibatch. If there is only one, its
    # forward pass gives pi_old.
    batch, real_share = self.learner.make_batch(prompts, rollouts, advantage.total_BGJ)
    batch, gap = self.learner.score_old(state.params, batch)
    if self.reference is not None:
      batch = batch.replace(logp_ref_RC=self.reference.score(batch))
    updates = []
    for minibatch in self.learner.split_minibatches(batch):
      state, metrics = self.learner.update(state, minibatch)
      if jax.default_backend() == "cpu":
        jax.block_until_ready(metrics)  # On few cores, queued programs can starve each other's collectives.
      updates.append(metrics)
    state = state.replace(step=state.step + 1)
    updates = jax.device_get(updates)
    if cfg.learner.nonfinite == "stop":
      for metrics in updates:
        check_finite(metrics, step)
    clock.lap("learn_s")

    self.log.defer(step, StepRecord(
        problems=problems, responses=[responses[index] for index in np.ndindex(shape)],
        reasons=[v.reason for v in verdict_R], score_BGJ=score_BGJ, rollouts=rollouts, reward_BGJ=reward_BGJ,
        advantage=advantage, updates=updates, extra=gap, seconds=clock.laps,
        ledger=generation.ledger.metrics() | {"update/real_share": real_share}))
    return state


@functools.partial(jax.jit, static_argnames="cfg")
def rewards_and_advantages(n_gen_BGJ, score_BGJ, finished_BGJ, *, cfg: Config):
  """(reward [B, G, J], Advantage) of a step, in one program."""
  budget_tokens_G = np.array(cfg.rollout.budgets)
  reward_BGJ = reward_lib.compute(
      n_gen_BGJ, score_BGJ, budget_tokens_G, cfg=cfg.reward, finished_BGJ=finished_BGJ)
  has_baseline = cfg.reward.form in reward_lib.FORMS_WITH_BASELINE
  baseline_G = reward_lib.baseline(budget_tokens_G, cfg=cfg.reward) if has_baseline else None
  return reward_BGJ, advantage_lib.compute(reward_BGJ, baseline_G, cfg=cfg.advantage)


def training_key(seed: int) -> jax.Array:
  """Stream 0 of the seed; evaluation draws from stream 1."""
  return jax.random.fold_in(jax.random.key(seed), 0)


class Stopwatch:
  """Wall seconds between laps, by name."""

  def __init__(self):
    self.laps: dict[str, float] = {}
    self._last = time.perf_counter()

  def lap(self, name: str) -> None:
    """Ends the stage `name`."""
    now = time.perf_counter()
    self.laps[name], self._last = now - self._last, now


class WallClock:
  """Seconds that the run took so far, earlier attempts included."""

  def __init__(self):
    self.earlier_s, self._start = 0.0, time.monotonic()

  def __call__(self) -> float:
    return self.earlier_s + time.monotonic() - self._start


def first_state(
    cfg: Config, model: assemble.Model, learner: Learner, checkpoints: Checkpointer, batches: PipelineIterator,
) -> tuple[TrainState, int, float]:
  """(state, first step to do, seconds spent): from the newest good checkpoint, which also moves `batches`, or fresh."""
  restored = checkpoints.restore_latest(
      learner.abstract_state(), check=lambda meta: run_info.check_resume(cfg, meta["config"]))
  if restored is not None:
    state, meta = restored
    batches.set_state(meta["data_state"])
    return state, int(state.step), meta["wall_s"]
  params = weights.load(model.directory, model.arch, model.mesh, param_dtype=cfg.model.param_dtype)
  return learner.new_state(params), 0, 0.0


@distributed.on_every_host
def main(cfg: Config, workdir: str) -> None:
  """Trains, evaluates before and after, exports, and writes the summary."""
  wall_s, root = WallClock(), pathlib.Path(workdir)
  assemble.keep_compiled_programs()
  # Everything that can be refused is refused here, before a weight is read.
  model = assemble.open_model(cfg)
  problems, eval_problems = problems_lib.load_train_and_eval(cfg.data, cfg.seed)
  data = Pipeline(problems, model.builder, cfg)
  engine = assemble.training_engine(cfg, model)
  learner = Learner(model.arch, cfg, model.mesh)

  with contextlib.ExitStack() as stack:
    judge = stack.enter_context(Judge(cfg, root / "verdicts"))
    checkpoints = stack.enter_context(Checkpointer(root / "checkpoints", cfg.checkpoint))
    batches = iter(data)
    state, start, wall_s.earlier_s = first_state(cfg, model, learner, checkpoints, batches)
    run_info.write_run_json(root, cfg, model.mesh, {"architecture": dataclasses.asdict(model.arch)})
    reference = None
    if cfg.loss.kl_coef:
      reference = Reference(learner, weights.load(
          model.directory, model.arch, model.mesh, param_dtype=cfg.model.compute_dtype))

    console = stack.enter_context(Console(cfg.log, cfg.steps, start, file=distributed.output()))
    warnings = preview.write(cfg, root / "preview").brief() if distributed.is_writer() else []
    console.header([*_header(cfg, model, data, len(eval_problems), start), *warnings])
    log = stack.enter_context(contextlib.closing(StepLog(cfg, root, start, console, engine.shape.n_prefix)))

    evaluations = stack.enter_context(Evaluations(cfg, model, eval_problems, judge, root, console))
    assemble.compile_samplers(console, training=engine, evaluation=evaluations.runner)
    base = evaluations.before(start, state)
    trainer = Trainer(cfg, model, batches, engine, judge, learner, reference, checkpoints, evaluations, log)
    state = trainer.train(state, start, wall_s)
    checkpoints.wait()
    if cfg.checkpoint.export:
      weights.export(state.params, model.arch, model.directory, root / "export")
    trained = evaluations.after(state)
    log.close()
    if distributed.is_writer():
      plots.write_plots(root, base, trained)
      summary = summary_lib.write_summary(root, base, trained, config_lib.to_json_dict(cfg), wall_s())
      if base and trained:
        console.table(tables.before_after(base, trained))
      console.message(summary_lib.headline(summary))
      console.message(f"see {root / 'summary.md'} and {root / 'plots'}")


def _header(cfg: Config, model: assemble.Model, data: Pipeline, n_eval: int, start: int) -> list[str]:
  lines = [
      *run_info.describe_profile(cfg),
      f"model: {model.directory} ({model.arch.family}, {model.arch.n_layers} layers, width {model.arch.hidden_size})",
      f"devices: {jax.device_count()} x {jax.devices()[0].device_kind}, mesh {dict(model.mesh.shape)}",
      *distributed.describe(),
      f"problems: {len(data.problems):,} for training ({data.n_dropped:,} over-long dropped), {n_eval:,} for "
      "evaluation",
  ]
  return lines + ([f"resuming: {start} of {cfg.steps} steps are done"] if start else [])


if __name__ == "__main__":
  flags.run(main, name="python -m hbpo_jax.train", description="Train a Hugging Face checkpoint with HBPO.")
