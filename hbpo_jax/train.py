"""Trains a Hugging Face checkpoint with Hierarchical Budget Policy Optimization.

  python -m hbpo_jax.train --config=quickstart --workdir=runs/quickstart

Running the same command again continues from the newest good checkpoint in WORKDIR. SIGTERM or Ctrl-C stops a run at
its next safe point, with its state saved (hbpo_jax.preemption). With --replay=WORKDIR/dumps/NAME the command repeats
an update that was not finite instead (hbpo_jax.replay).
"""

from hbpo_jax import flags

if __name__ == "__main__":
  flags.show_help("train")  # Before the imports below, which take seconds.

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import contextlib
import dataclasses
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hbpo_jax import assemble, distributed, export, hub, preemption, preview, replay, run_info, sft, throughput
from hbpo_jax import config as config_lib
from hbpo_jax.clocks import Stopwatch, WallClock
from hbpo_jax.config import Config
from hbpo_jax.data import problems as problems_lib
from hbpo_jax.data.pipeline import Pipeline, PipelineIterator
from hbpo_jax.data.record import Problem
from hbpo_jax.evaluation.during import Evaluations
from hbpo_jax.grading.judge import Judge, try_custom
from hbpo_jax.grading.verdict import Verdict
from hbpo_jax.keeping import Keeper
from hbpo_jax.learning import dumps, guards
from hbpo_jax.learning.checkpoint import Checkpointer, fingerprint
from hbpo_jax.learning.learner import Learner
from hbpo_jax.learning.reference import Reference
from hbpo_jax.models import lora, weights
from hbpo_jax.objective import forms
from hbpo_jax.objective import step as objective
from hbpo_jax.reporting import plots, tables
from hbpo_jax.reporting import summary as summary_lib
from hbpo_jax.reporting.console import Console
from hbpo_jax.reporting.digests import DigestLog
from hbpo_jax.reporting.step_log import StepLog, StepRecord
from hbpo_jax.rollout import engine as engine_lib
from hbpo_jax.rollout import shelf
from hbpo_jax.structs import Prompts, Rollouts, TrainState


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
  guard: guards.Guard
  evaluations: Evaluations
  keeper: Keeper
  log: StepLog
  digests: DigestLog | None
  console: Console

  def train(self, state: TrainState, start: int, meta: Mapping[str, Any]) -> TrainState:
    """Algorithm 1 from step `start` to the last; every step is in a checkpoint or will be computed again.

    Args:
      meta: of the checkpoint that the run goes on from; it says what was left open when that was saved.
    Raises:
      preemption.Stopped: when the run was asked to stop; what a resumed run needs is on disk then.
    """
    self.keeper.catch_up(start, state, meta)
    data_state = self.batches.get_state()
    generated = self._from_shelf(start, meta["ahead"]) if meta.get("ahead") else None
    with futures.ThreadPoolExecutor(1) as ahead:
      for step in range(start, self.cfg.steps):
        clock = Stopwatch()
        try:
          if generated is None:
            generated = self._generate(step, self._publish(state), self.log.flush, preemption.check)
          else:
            preemption.check()
        except preemption.Stopped:
          self.keeper.stop(
              step, state, data_state, generated and generated.rollouts, generated.ledger if generated else {})
        following = None
        if self._runs_ahead(step):
          # From the weights as they are before this step's updates.
          following = ahead.submit(self._generate, step + 1, self._publish(state))
          self.log.flush()
        state, record = self._learn(step, state, generated)
        data_state = generated.data_state
        if self.digests is not None:
          self._digest(self.digests, step, state, generated, record)
        if step == start:
          assemble.compile_samplers(self.console, training=self.engine)
        waited = Stopwatch()
        generated = following.result() if following is not None else None
        waited.lap("idle_s")
        clock.lap("step_s")
        self.log.defer(step, dataclasses.replace(record, seconds=record.seconds | waited.laps | clock.laps))
        self._keep(step, state, data_state)
    self.log.flush()
    return state

  def _runs_ahead(self, step: int) -> bool:
    """Whether the next step's rollouts start before this step's updates.

    Not where the state is saved or measured after the step: a resumed run knows no older weights than the saved ones.
    """
    return (
        self.cfg.pipeline == "one_step_off" and step + 1 < self.cfg.steps and not self.evaluations.due(step + 1)
        and not self.checkpoints.due(step + 1, last=self.cfg.steps))

  def _keep(self, step: int, state: TrainState, data_state: dict[str, Any]) -> None:
    """What is due after a step."""
    self.keeper.after(step, state, data_state)

  def _publish(self, state: TrainState) -> Any:
    """The sampler's weights, in buffers that no update consumes while rollouts run beside it."""
    params = self.engine.publish(self.learner.whole(state.params))
    if params is state.params and self.cfg.pipeline == "one_step_off":
      params = jax.tree.map(jnp.copy, params)
    return params

  def _generate(
      self, step: int, params: Any, meanwhile: Callable[[], None] = lambda: None,
      safe_point: Callable[[], None] = lambda: None) -> "Generated":
    """Rollouts and their verdicts.

    Args:
      params: of the sampler.
      meanwhile: called once the devices are at work.
      safe_point: called wherever the step may be given up; by raising it does.
    """
    safe_point()
    clock = Stopwatch()
    problems, prompts = next(self.batches)
    data_state = self.batches.get_state()
    jax.block_until_ready(params)
    clock.lap("publish_s")

    # Rollouts: J responses per query and budget. Each response is graded while others still decode.
    key = jax.random.fold_in(training_key(self.cfg.seed), step)
    generation = self.engine.start(params, prompts, key)
    meanwhile()
    rollouts, grading = generation.rollouts, self.judge.begin(step)
    responses = {}
    for finished in generation:
      for index in map(tuple, finished.tolist()):
        responses[index] = self.model.builder.decode(rollouts.response(*index))
        grading.submit(index, responses[index], problems[index[0]])
      safe_point()
    clock.lap("rollout_s")

    # Verdicts: a score in [0, 1] for each response.
    verdicts = grading.collect()
    indices = list(np.ndindex(rollouts.n_gen_BGJ.shape))
    clock.lap("grade_s")
    safe_point()
    return Generated(
        problems, prompts, rollouts, [responses[i] for i in indices], [verdicts[i] for i in indices],
        generation.ledger.metrics(), clock.laps, data_state)

  def _from_shelf(self, step: int, sha256: str) -> "Generated":
    """The rollouts of a step that a stopped run had drawn ahead, and their verdicts."""
    clock = Stopwatch()
    rollouts, ledger = shelf.load(shelf.path_of(self.keeper.root, step), sha256)
    problems, prompts = next(self.batches)
    indices = list(np.ndindex(rollouts.n_gen_BGJ.shape))
    responses = [self.model.builder.decode(rollouts.response(*index)) for index in indices]
    grading = self.judge.begin(step)
    for index, response in zip(indices, responses):
      grading.submit(index, response, problems[index[0]])
    verdicts = grading.collect()
    clock.lap("grade_s")
    return Generated(
        problems, prompts, rollouts, responses, [verdicts[i] for i in indices], ledger, clock.laps,
        self.batches.get_state())

  def _digest(
      self, log: DigestLog, step: int, state: TrainState, generated: "Generated", record: StepRecord) -> None:
    log.write(
        step, ids=[p.id for p in generated.problems], prompts=generated.prompts,
        key=jax.random.fold_in(training_key(self.cfg.seed), step), rollouts=generated.rollouts,
        verdicts=generated.verdicts, advantage=record.advantage, params=fingerprint(state.params),
        optimizer=fingerprint((state.step, state.update, state.opt_state)))

  def _learn(self, step: int, state: TrainState, generated: "Generated") -> tuple[TrainState, StepRecord]:
    """The updates of a step."""
    cfg, clock, learner = self.cfg, Stopwatch(), self.learner
    prompts, rollouts = generated.prompts, generated.rollouts
    shape = rollouts.n_gen_BGJ.shape
    score_BGJ = scores(generated.verdicts, rollouts.truncated_BGJ, is_custom=bool(cfg.reward.grader))
    finished_BGJ = np.array([v.finished for v in generated.verdicts]).reshape(shape)

    # Rewards and advantages within and across budgets, and what the reward remembers for the next step.
    outcome = self._outcome(step, state, generated, score_BGJ, finished_BGJ)
    state = state.replace(memory=learner.place_memory(outcome.memory))

    # pi_old (and pi_ref) by the trainer's own forward pass, then one update per minibatch. If there is only one, its
    # forward pass gives pi_old.
    on_host = jax.device_get((outcome.reward_BGJ, outcome.advantage.total_BGJ))
    batch, real_share = learner.make_batch(prompts, rollouts, on_host[1])
    batch, gap = learner.score_old(state.params, batch)
    if self.reference is not None:
      batch = batch.replace(logp_ref_RC=self.reference.score(batch))
    jax.block_until_ready(batch)
    clock.lap("score_s")
    state, updates, restored = self.guard.update(
        step, state, learner.split_minibatches(batch), guards.suspects(rollouts, *on_host))
    state = state.replace(step=state.step + 1)
    clock.lap("update_s")

    speed = throughput.metrics(
        throughput.learning_flops(
            self.model.arch, prompts.n_prompt_B, rollouts.n_tokens_BGJ,
            n_scorings=(cfg.learner.minibatches > 1) + (self.reference is not None)),
        int((np.asarray(prompts.n_prompt_B)[:, None, None] + rollouts.n_tokens_BGJ).sum()), clock.laps,
        list(self.model.mesh.devices.flat), is_bfloat16=cfg.model.compute_dtype == "bfloat16")
    return state, StepRecord(
        problems=generated.problems, responses=generated.responses, reasons=[v.reason for v in generated.verdicts],
        score_BGJ=score_BGJ, rollouts=rollouts, reward_BGJ=outcome.reward_BGJ, advantage=outcome.advantage,
        updates=updates, extra=gap, objective=outcome.metrics, seconds=generated.seconds | clock.laps,
        ledger=generated.ledger | speed | restored | {"update/real_share": real_share})

  def _outcome(
      self, step: int, state: TrainState, generated: "Generated", score_BGJ: np.ndarray, finished_BGJ: np.ndarray,
  ) -> objective.Outcome:
    form, given = forms.FORMS[self.cfg.reward.form], {}
    if form.reads_mode:
      given["thinks_BGJ"] = np.reshape(
          self.model.builder.which_think(generated.responses, score_BGJ.shape, self.cfg.rollout.budgets),
          score_BGJ.shape)
    if form.has_stages:
      given["step"] = np.int32(step)
    if form.has_memory:
      given["remembered"] = jax.device_get(state.memory)
    return compute_objective(generated.rollouts.n_gen_BGJ, score_BGJ, finished_BGJ, cfg=self.cfg, **given)


@dataclasses.dataclass(frozen=True)
class Generated:
  """The rollouts of a step with their verdicts; lists in (query, budget, rollout) order.

  ledger: metrics of the rollouts.  seconds: wall time by stage.  data_state: of the data, once these were drawn.
  """
  problems: Sequence[Problem]
  prompts: Prompts
  rollouts: Rollouts
  responses: Sequence[str]
  verdicts: Sequence[Verdict]
  ledger: dict[str, float]
  seconds: dict[str, float]
  data_state: dict[str, Any]


def scores(verdicts: Sequence[Verdict], truncated_BGJ: np.ndarray, *, is_custom: bool) -> np.ndarray:
  """float32 [B, G, J], the correctness that is rewarded: 0 for what was cut off, whatever answer stands there.

  Args:
    verdicts: in (query, budget, rollout) order.
    truncated_BGJ: bool [B, G, J].
    is_custom: whether the user's own grader gave them, which decides itself what a text is worth that is cut off.
  Source: Section 3.1.
  """
  score_BGJ = np.array([v.score for v in verdicts], np.float32).reshape(truncated_BGJ.shape)
  return score_BGJ if is_custom else np.where(truncated_BGJ, np.float32(0), score_BGJ)


compute_objective = jax.jit(objective.compute, static_argnames="cfg")


def rewards_and_advantages(n_gen_BGJ, score_BGJ, finished_BGJ, *, cfg: Config):
  """(reward [B, G, J], Advantage) of a step, in one program; of forms that read no more than this."""
  outcome = compute_objective(n_gen_BGJ, score_BGJ, finished_BGJ, cfg=cfg)
  return outcome.reward_BGJ, outcome.advantage


def training_key(seed: int) -> jax.Array:
  """Stream 0 of the seed; evaluation draws from stream 1."""
  return jax.random.fold_in(jax.random.key(seed), 0)


def first_state(
    cfg: Config, learner: Learner, checkpoints: Checkpointer, batches: PipelineIterator, load: Callable[[], Any],
    check: Callable[[Mapping[str, Any], Mapping[str, str]], None]) -> tuple[TrainState, int, dict[str, Any]]:
  """(state, first step to do, meta): from the newest good checkpoint, which also moves `batches`, or fresh.

  Args:
    load: reads the base model's weights.
    check: called with the settings and the `run_info.Changes.contents` that a checkpoint was saved under; may raise to
      refuse it.
  """
  restored = checkpoints.restore_latest(
      learner.abstract_state(), check=lambda meta: check(meta["config"], meta.get("contents", {})))
  if restored is None:
    return learner.new_state(load()), 0, {"wall_s": 0.0}
  state, meta = restored
  if cfg.lora.rank:
    learner.freeze(load())
  batches.set_state(meta["data_state"])
  return state, int(state.step), meta


@distributed.on_every_host
@preemption.stoppable
def main(cfg: Config, workdir: str) -> None:
  """Trains, evaluates before and after, exports, and writes the summary."""
  root = pathlib.Path(workdir)
  assemble.keep_compiled_programs()
  export.check_push(cfg)
  problems, eval_problems = problems_lib.load_train_and_eval(cfg.data, cfg.seed)
  try_custom(cfg, problems[0])
  cfg, wall_s = sft.with_model(cfg, root), WallClock()
  # Everything else that can be refused is refused here, before a weight is read.
  model = assemble.open_model(cfg, root)
  data = Pipeline(problems, model.builder, cfg)
  engine = assemble.training_engine(cfg, model)
  learner = Learner(model.arch, cfg, model.mesh)

  with contextlib.ExitStack() as stack:
    judge = stack.enter_context(Judge(cfg, root / "verdicts"))
    checkpoints = stack.enter_context(Checkpointer(root / "checkpoints", cfg.checkpoint))
    batches = iter(data)
    load = lambda: weights.load(model.directory, model.arch, model.mesh, param_dtype=assemble.base_dtype(cfg))
    changes = run_info.Changes(cfg, _contents(cfg, model, data))
    state, start, meta = first_state(cfg, learner, checkpoints, batches, load, changes.check)
    wall_s.earlier_s = meta["wall_s"]
    run_info.write_run_json(root, cfg, model.mesh, {
        "architecture": dataclasses.asdict(model.arch), "model_origin": hub.origin(model.directory)},
        changes.at(start))
    reference = None
    if cfg.loss.kl_coef:
      reference = Reference(learner, _reference_params(cfg, model, learner))

    console = stack.enter_context(Console(cfg.log, cfg.steps, start, file=distributed.output()))
    warnings = preview.write(cfg, root / "preview").brief() if distributed.is_writer() else []
    console.header([*_header(cfg, model, data, len(eval_problems), start), *changes.lines(), *warnings])
    log = stack.enter_context(contextlib.closing(StepLog(cfg, root, start, console, engine.shape.n_prefix)))

    guard = stack.enter_context(contextlib.closing(guards.Guard(
        cfg, learner, checkpoints, dumps.Dumps(root / "dumps", cfg.learner.max_dumps, replay.facts(cfg, model)),
        lambda: learner.new_state(load()), console.message, root, start)))
    guard.in_a_row = meta.get("nonfinite_in_a_row", 0)  # Checkpoints of older versions do not count them.

    digests = stack.enter_context(contextlib.closing(DigestLog(root, start))) if cfg.log.digests else None
    evaluations = stack.enter_context(Evaluations(cfg, model, learner.whole, eval_problems, judge, root, console))
    assemble.compile_samplers(console, evaluation=evaluations.runner)
    engine.prepare()  # In the background: the first step waits only for the programs that it needs.
    base = evaluations.before(start, state)
    keeper = Keeper(cfg, root, checkpoints, evaluations, judge, guard, log, wall_s, changes.contents)
    trainer = Trainer(
        cfg, model, batches, engine, judge, learner, reference, checkpoints, guard, evaluations, keeper, log, digests,
        console)
    state = trainer.train(state, start, meta)
    checkpoints.wait()
    if cfg.checkpoint.export:
      cards = export.cards_of_run(cfg, model.directory, int(state.step))
      weights.export(learner.whole(state.params), model.arch, model.directory, root / "export", card=cards[""])
      if cfg.lora.rank:
        lora.export(state.params, model.arch, cfg.lora, cfg.model.path, root / export.ADAPTER,
                    card=cards[export.ADAPTER])
    trained = evaluations.after(state)
    log.close()
    if distributed.is_writer():
      plots.write_plots(root, base, trained)
      summary = summary_lib.write_summary(root, base, trained, config_lib.to_json_dict(cfg), wall_s())
      if base and trained:
        console.table(tables.before_after(base, trained))
      console.message(summary_lib.headline(summary))
      console.message(f"see {root / 'summary.md'} and {root / 'plots'}")
      if cfg.checkpoint.export:
        export.update_cards(root, export.cards_of_run(cfg, model.directory, int(state.step), summary=summary))
    export.push_run(cfg, root, console)


def _contents(cfg: Config, model: assemble.Model, data: Pipeline) -> dict[str, str]:
  """What a run that goes on must find as it was: the training problems, and the base where it is more than a start."""
  needs_base = cfg.lora.rank > 0 or cfg.loss.kl_coef != 0
  return {"data.source": data.digest} | ({"model.path": model.identity["fingerprint"][:16]} if needs_base else {})


def _reference_params(cfg: Config, model: assemble.Model, learner: Learner) -> Any:
  """What pi_ref is scored with: the base model's weights, or beside a frozen base, adapters that change nothing."""
  if cfg.lora.rank:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), learner.abstract_state().params)
  return weights.load(model.directory, model.arch, model.mesh, param_dtype=cfg.model.compute_dtype)


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


def cli(argv: Sequence[str] | None = None) -> None:
  """Runs the command with these arguments; None means the process's. With --replay it is `hbpo_jax.replay`."""
  arguments = list(sys.argv[1:] if argv is None else argv)
  if replay.is_asked(arguments):
    replay.cli(arguments)
  else:
    flags.run(main, name="train", argv=arguments)


if __name__ == "__main__":
  cli()
