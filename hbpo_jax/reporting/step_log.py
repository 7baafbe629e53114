"""What a training step leaves behind for people, written while the next step runs."""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import pathlib
from typing import Any

import jax
import numpy as np

from hbpo_jax import config as config_lib
from hbpo_jax import distributed
from hbpo_jax.config import Config
from hbpo_jax.data.record import Problem
from hbpo_jax.files import read_rows
from hbpo_jax.reporting import alarms
from hbpo_jax.reporting import metrics as metrics_lib
from hbpo_jax.reporting.console import Console
from hbpo_jax.reporting.samples import SampleLog
from hbpo_jax.reporting.writers import METRICS, MetricWriter
from hbpo_jax.structs import Rollouts

# Metrics of minibatches of which a step shows the largest, or the sum; of all others it shows the mean.
_MAXIMA, _TOTALS = ("ratio_max",), ("nonfinite", "tokens")


@dataclasses.dataclass(frozen=True)
class StepRecord:
  """The facts of one step. Arrays may still be on the device.

  problems: B problems.  responses: B * G * J texts in (query, budget, rollout) order.
  reasons: B * G * J verdict reasons.  score_BGJ: float [B, G, J], 0..1.
  rollouts: host copy.  reward_BGJ: [B, G, J].  advantage: of objective.advantage.compute.
  updates: metrics of each minibatch.  extra: further metrics of the step.  seconds: wall time by stage, and of
    the step, step_s.
  ledger: of the rollouts, `Ledger.metrics()`.  objective: metrics of `objective.step.compute`.
  """
  problems: Sequence[Problem]
  responses: Sequence[str]
  reasons: Sequence[str]
  score_BGJ: np.ndarray
  rollouts: Rollouts
  reward_BGJ: Any
  advantage: Any
  updates: Sequence[Mapping[str, Any]]
  extra: Mapping[str, Any]
  seconds: dict[str, float]
  ledger: Mapping[str, float]
  objective: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class StepLog:
  """Metrics, samples and the live view of a run; `defer` a step, `flush` it when the device is busy again.

  Where a job has several processes, only the first keeps a log; to the others it does nothing.
  """

  def __init__(
      self, cfg: Config, workdir: str | os.PathLike, start_step: int, console: Console, n_prefix_G: Sequence[int]):
    self._cfg, self._console, self._n_prefix_G = cfg, console, n_prefix_G
    self._pending: tuple[int, StepRecord] | None = None
    self._further: dict[str, float] = {}
    self._is_open = distributed.is_writer()
    if not self._is_open:
      return
    self._writer = MetricWriter(workdir, cfg.log, config_lib.to_json_dict(cfg), start_step)
    self._samples = SampleLog(workdir, cfg.log, start_step)
    self._watch = alarms.Watch(cfg.alarms, cfg.rollout.budgets)
    self._watch.replay(read_rows(pathlib.Path(workdir) / METRICS))
    console.set_alarms(self._watch.active)

  def defer(self, step: int, record: StepRecord) -> None:
    """Keeps a finished step until `flush`."""
    self.flush()
    if self._is_open:
      self._pending = (step, record)

  def annotate(self, metrics: Mapping[str, float]) -> None:
    """Adds numbers by tag to the row of the step that is deferred."""
    self._further |= metrics

  def amend(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds numbers by tag to the row of the last step that an earlier attempt wrote."""
    if self._is_open:
      self._writer.amend(step, metrics)

  def flush(self) -> None:
    """Writes and shows the step that was deferred, if there is one."""
    if self._pending is None:
      return
    (step, record), self._pending = self._pending, None
    record = dataclasses.replace(
        record, reward_BGJ=np.asarray(record.reward_BGJ), advantage=jax.device_get(record.advantage),
        updates=jax.device_get(record.updates), extra=jax.device_get(record.extra),
        objective=jax.device_get(record.objective))
    metrics, self._further = self._metrics(record) | self._further, {}
    self._writer.write(step, metrics)
    if self._writer.due(step):  # The report finds the same alarms in the same rows.
      for alarm in self._watch.observe(step, metrics):
        self._console.alarm(alarm)
      self._console.set_alarms(self._watch.active)
    self._console.step(step, metrics)
    if self._samples.due(step):
      rows = self._samples.write(
          step, problems=[p.problem for p in record.problems], answers=[p.answer for p in record.problems],
          budgets=self._cfg.rollout.budgets, responses=record.responses, verdicts=record.reasons,
          n_gen_BGJ=record.rollouts.n_gen_BGJ, reward_BGJ=record.reward_BGJ,
          advantage_BGJ=record.advantage.total_BGJ)
      if rows:
        # The budgets take turns in what is shown, too.
        self._console.sample(rows[step // self._cfg.log.samples_every % len(rows)])

  def close(self) -> None:
    """Writes what is pending and closes all files; calling it again does nothing."""
    self.flush()
    if self._is_open:
      self._writer.close()
      self._samples.close()

  def _metrics(self, record: StepRecord) -> dict[str, float]:
    metrics = metrics_lib.step_metrics(
        record.rollouts, budgets=self._cfg.rollout.budgets, n_prefix_G=np.asarray(self._n_prefix_G),
        reward_BGJ=record.reward_BGJ, score_BGJ=record.score_BGJ, advantage=record.advantage, reasons=record.reasons)
    for name in record.updates[0]:
      values = [float(update[name]) for update in record.updates]
      total = max(values) if name in _MAXIMA else sum(values)
      room = "sampler" if name.startswith("sampler_") else "update"
      metrics[f"{room}/{name}"] = total if name in _MAXIMA + _TOTALS else total / len(values)
    metrics |= {f"sampler/{name}": float(value) for name, value in record.extra.items()}
    metrics |= {f"objective/{name}": float(value) for name, value in record.objective.items()}
    metrics |= record.ledger
    metrics |= {f"time/{name}": value for name, value in record.seconds.items()}
    metrics["tokens_per_s"] = float(record.rollouts.n_gen_BGJ.sum()) / record.seconds["step_s"]
    return metrics
