"""Metrics of a run to metrics.jsonl, TensorBoard and, if asked for, Weights & Biases: the same tags everywhere."""

from collections.abc import Mapping
import os
import pathlib
import re
import secrets
import time
from typing import Any, Protocol

from absl import logging
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from hbpo_jax.config import LogConfig
from hbpo_jax.files import StepFile, atomic_write_text

# What TensorBoard leaves as it is; any other character it would replace, and the tags would differ between writers.
_TAG = re.compile(r"[A-Za-z0-9_.\-]+(/[A-Za-z0-9_.\-]+)*")


METRICS = "metrics.jsonl"


class _Sink(Protocol):
  def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

  def amend(self, step: int, metrics: Mapping[str, float]) -> None: ...

  def close(self) -> None: ...


class MetricWriter:
  """Writes the metrics of each step; made on the first process only.

  `WORKDIR/metrics.jsonl` holds one JSON object per row, `{"step": k, tag: number, ...}`, null where a number is not
  finite, flushed at once; `WORKDIR/tensorboard` holds event files. Steps that are no multiple of `log.every` are
  skipped.

  Args:
    workdir: directory of the run; made if missing.
    log: settings of the logs.
    run_config: settings of the run as plain JSON values, shown by W&B.
    resume_step: first step this attempt will run. Rows of an earlier attempt from there on are dropped.
  Raises:
    ValueError: when log.wandb_project is set and wandb is not installed or not usable, or metrics.jsonl is damaged.
  """

  def __init__(self, workdir: str | os.PathLike, log: LogConfig, run_config: Mapping[str, Any], resume_step: int = 0):
    workdir = pathlib.Path(workdir)
    self._every = log.every
    self._closed = False
    # W&B first: it is the one that can refuse, and nothing of an earlier run should be dropped before.
    self._sinks: list[_Sink] = []
    wandb_sink = _Wandb(workdir, log.wandb_project, run_config, resume_step) if log.wandb_project else None
    self._sinks.append(_JsonLines(workdir, resume_step))
    if log.tensorboard:
      self._sinks.append(_TensorBoard(workdir, resume_step))
    if wandb_sink:
      self._sinks.append(wandb_sink)

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes one row.

    Args:
      step: rollout batches done before this one, from 0; above that of the last row.
      metrics: numbers (Python, NumPy or JAX scalars) by tag.
    Raises:
      ValueError: when the step does not increase, a tag has characters outside [A-Za-z0-9_.-/], or the writer is
        closed.
    """
    if self._closed:
      raise ValueError(f"step={step} written after close(); close the writer when the run is over.")
    if not self.due(step):
      return
    if bad := [tag for tag in metrics if not _TAG.fullmatch(tag)]:
      raise ValueError(f"metric tag {bad[0]!r} has characters outside [A-Za-z0-9_.-/]; rename it.")
    numbers = {tag: float(value) for tag, value in metrics.items()}
    for sink in self._sinks:
      sink.write(step, numbers)

  def amend(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Adds numbers by tag to the row of the last step, which an earlier attempt wrote without them.

    Raises:
      ValueError: when the last row is of another step.
    """
    if self.due(step):
      numbers = {tag: float(value) for tag, value in metrics.items()}
      for sink in self._sinks:
        sink.amend(step, numbers)

  def due(self, step: int) -> bool:
    """Whether the row of this step is written: every `log.every` steps."""
    return step % self._every == 0

  def close(self) -> None:
    """Flushes and closes all writers; calling it again does nothing."""
    if self._closed:
      return
    self._closed = True
    for sink in self._sinks:
      sink.close()

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *exc: object) -> None:
    self.close()


class _JsonLines:

  def __init__(self, workdir: pathlib.Path, resume_step: int):
    self._log = StepFile(workdir / METRICS, resume_step)

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    self._log.write(step, [metrics])

  def amend(self, step: int, metrics: Mapping[str, float]) -> None:
    self._log.amend(step, metrics)

  def close(self) -> None:
    self._log.close()


class _TensorBoard:
  """Event files, which may fail at any time without hurting the run: after the first failure they are left alone."""
  # clu.metric_writers, the usual choice beside Flax, imports TensorFlow, which this package does not install;
  # tensorboardX writes the same event files without it. Not by its SummaryWriter: that writes in a thread of its own,
  # and once the thread has met a full disk, the next rows would wait for it for ever.

  def __init__(self, workdir: pathlib.Path, resume_step: int):
    self._file: event_file_writer.EventsWriter | None = None
    try:
      (workdir / "tensorboard").mkdir(parents=True, exist_ok=True)
      # The suffix keeps a resume within the same second from overwriting the earlier file, whose name otherwise holds
      # the second and the host only.
      self._file = event_file_writer.EventsWriter(str(workdir / "tensorboard" / "events"), f".{resume_step:08d}")
      # Hides the points of earlier attempts from this step on.
      self._add(event_pb2.Event(step=resume_step, file_version="brain.Event:2"))
      self._add(event_pb2.Event(
          step=resume_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START)))
    except OSError as e:
      self._give_up(e)

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    try:
      for tag, value in metrics.items():
        self._add(event_pb2.Event(step=step, summary=summary.scalar(tag, value)))
      if self._file is not None:
        self._file.flush()
    except OSError as e:
      self._give_up(e)

  def amend(self, step: int, metrics: Mapping[str, float]) -> None:
    self.write(step, metrics)

  def close(self) -> None:
    try:
      if self._file is not None:
        self._file.close()
    except OSError as e:
      self._give_up(e)

  def _add(self, event: Any) -> None:
    if self._file is not None:
      event.wall_time = time.time()
      self._file.write_event(event)

  def _give_up(self, error: OSError) -> None:
    self._file = None
    logging.warning(
        "TensorBoard's files failed (%s: %s); the run goes on without them, and metrics.jsonl has all numbers.",
        type(error).__name__, error)


class _Wandb:
  """W&B, which may fail at any time without hurting the run: after the first failure it is left alone.

  The run's id is kept in WORKDIR/wandb_run_id.txt, so that a resumed run continues the same W&B run. W&B ignores
  steps it already has; a resumed run repeats them with the same numbers.
  """

  def __init__(self, workdir: pathlib.Path, project: str, run_config: Mapping[str, Any], resume_step: int):
    try:
      import wandb
    except ImportError as e:
      raise ValueError(
          f"config.log.wandb_project={project!r} needs wandb; install hbpo_jax[wandb] or leave the field empty.") from e
    errors = wandb.errors
    # What a lost or refused connection raises; a mistake of ours (TypeError, ...) still surfaces.
    self._failures = (errors.Error, OSError)
    self._run = None
    id_path = workdir / "wandb_run_id.txt"
    run_id = id_path.read_text().strip() if resume_step and id_path.exists() else secrets.token_hex(4)
    atomic_write_text(id_path, run_id + "\n")
    try:
      self._run = wandb.init(
          project=project, name=workdir.resolve().name, id=run_id, resume="allow", dir=str(workdir),
          config=dict(run_config))
    except (errors.UsageError, errors.AuthenticationError) as e:
      raise ValueError(
          f"config.log.wandb_project={project!r}: W&B refused ({e}); run `wandb login`, set WANDB_MODE=offline, or "
          "leave the field empty.") from e
    except self._failures as e:
      self._give_up(e)

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    if self._run is None:
      return
    try:
      self._run.log(dict(metrics), step=step)
    except self._failures as e:
      self._give_up(e)

  def amend(self, step: int, metrics: Mapping[str, float]) -> None:
    self.write(step, metrics)  # W&B merges what one step is given.

  def close(self) -> None:
    if self._run is None:
      return
    try:
      self._run.finish()
    except self._failures as e:
      self._give_up(e)

  def _give_up(self, error: Exception) -> None:
    self._run = None
    logging.warning("W&B failed (%s: %s); the run goes on without it.", type(error).__name__, error)
