"""metrics.jsonl, TensorBoard and W&B hold the same rows, also after a resume."""

import json
import math
import pathlib
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from hbpo_jax import files
from hbpo_jax.config import LogConfig
from hbpo_jax.reporting import writers

NO_BOARD = LogConfig(tensorboard=False)


def events(directory):
  """Events of all files in a TensorBoard directory, in order of the files."""
  for path in sorted(directory.iterdir(), key=lambda p: p.stat().st_mtime_ns):
    data, at = path.read_bytes(), 0
    while at < len(data):
      size, = struct.unpack_from("<Q", data, at)
      yield Event.FromString(data[at + 12:at + 12 + size])
      at += size + 16


def scalars(directory):
  """{tag: {step: value}} as TensorBoard shows them: a restart hides points from its step on."""
  shown = {}
  for event in events(directory):
    if event.session_log.status == SessionLog.START:
      shown = {tag: {s: v for s, v in points.items() if s < event.step} for tag, points in shown.items()}
    for value in event.summary.value:
      shown.setdefault(value.tag, {})[event.step] = value.simple_value
  return shown


def test_same_tags_in_both_and_no_gap_or_repeat_after_a_resume(tmp_path):
  with writers.MetricWriter(tmp_path, LogConfig(), {}) as writer:
    for step in range(5):
      writer.write(step, {"reward": 10.0 + step, "budget_512/accuracy": jnp.float32(0.5)})
  with writers.MetricWriter(tmp_path, LogConfig(), {}, resume_step=3) as writer:
    for step in range(3, 6):
      writer.write(step, {"reward": np.float64(20 + step), "budget_512/accuracy": 0.25})
  rows = files.read_rows(tmp_path / "metrics.jsonl")
  reward = {0: 10.0, 1: 11.0, 2: 12.0, 3: 23.0, 4: 24.0, 5: 25.0}
  assert [row["step"] for row in rows] == list(range(6))
  assert {row["step"]: row["reward"] for row in rows} == reward
  board = scalars(tmp_path / "tensorboard")
  assert board["reward"] == reward
  assert set(board) == set(rows[0]) - {"step"}


def test_a_resume_hides_steps_it_has_not_reached_again(tmp_path):
  for resume_step, last in ((0, 5), (2, 3)):
    with writers.MetricWriter(tmp_path, LogConfig(), {}, resume_step=resume_step) as writer:
      for step in range(resume_step, last + 1):
        writer.write(step, {"a": step})
  assert list(scalars(tmp_path / "tensorboard")["a"]) == [0, 1, 2, 3]
  assert [row["step"] for row in files.read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_not_a_number_is_null_in_strict_json(tmp_path):
  with writers.MetricWriter(tmp_path, LogConfig(), {}) as writer:
    writer.write(0, {"a": math.nan, "b": -math.inf, "c": 1})
  assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "a": null, "b": null, "c": 1.0}\n'
  assert math.isnan(scalars(tmp_path / "tensorboard")["a"][0])


def test_a_row_that_was_left_open_is_completed_everywhere(tmp_path, monkeypatch):
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", fake)
  with writers.MetricWriter(tmp_path, LogConfig(wandb_project="p"), {}) as writer:
    writer.write(0, {"a": 1})
  with writers.MetricWriter(tmp_path, LogConfig(wandb_project="p"), {}, resume_step=1) as writer:
    writer.amend(0, {"eval/accuracy": np.float32(0.5)})
    writer.write(1, {"a": 2})
  with writers.MetricWriter(tmp_path, LogConfig(every=2, tensorboard=False), {}, resume_step=2) as writer:
    writer.amend(1, {"eval/accuracy": 1.0})  # That row is not one of those that are logged.
  rows = files.read_rows(tmp_path / "metrics.jsonl")
  assert rows == [{"step": 0, "a": 1.0, "eval/accuracy": 0.5}, {"step": 1, "a": 2.0}]
  assert scalars(tmp_path / "tensorboard") == {"a": {0: 1.0, 1: 2.0}, "eval/accuracy": {0: 0.5}}
  assert fake.logged == [(0, {"a": 1.0}), (0, {"eval/accuracy": 0.5}), (1, {"a": 2.0})]


@pytest.mark.parametrize("fails_at", [0, 1, 3, 5])
def test_tensorboard_lost_disk_never_stops_the_run(tmp_path, monkeypatch, fails_at):
  """Events 0 to 2 open the file."""
  warnings, left = [], [fails_at]
  write = writers.event_file_writer.EventsWriter.write_event

  def failing(self, event):
    left[0] -= 1
    if left[0] < 0:
      raise OSError(107, "Transport endpoint is not connected")
    return write(self, event)

  monkeypatch.setattr(writers.event_file_writer.EventsWriter, "write_event", failing)
  monkeypatch.setattr(writers.logging, "warning", lambda *args: warnings.append(args))
  with writers.MetricWriter(tmp_path, LogConfig(), {}) as writer:
    for step in range(40):
      writer.write(step, {"a": step, "b": step})
  assert len(files.read_rows(tmp_path / "metrics.jsonl")) == 40
  assert len(warnings) == 1 and left == [-1], "left alone after the failure"


def test_log_every(tmp_path):
  with writers.MetricWriter(tmp_path, LogConfig(every=3, tensorboard=False), {}) as writer:
    for step in range(7):
      writer.write(step, {"a": step})
  assert [row["step"] for row in files.read_rows(tmp_path / "metrics.jsonl")] == [0, 3, 6]
  assert not (tmp_path / "tensorboard").exists()


def test_refusals(tmp_path):
  writer = writers.MetricWriter(tmp_path, NO_BOARD, {})
  writer.write(1, {"a": 1})
  with pytest.raises(ValueError, match="step=1"):
    writer.write(1, {"a": 1})
  with pytest.raises(ValueError, match="'a b'"):
    writer.write(2, {"a b": 1})
  writer.close()
  writer.close()
  with pytest.raises(ValueError, match="close"):
    writer.write(3, {"a": 1})


class FakeWandb(types.ModuleType):
  """Records what is logged; fails from the call number `fails_at` on."""

  def __init__(self, *, error=None, fails_at=None):
    super().__init__("wandb")
    self.errors = types.SimpleNamespace(
        Error=type("Error", (Exception,), {}))
    self.errors.CommError = type("CommError", (self.errors.Error,), {})
    self.errors.AuthenticationError = type("AuthenticationError", (self.errors.CommError,), {})
    self.errors.UsageError = type("UsageError", (self.errors.Error,), {})
    self.logged, self.inits, self.calls, self.finished = [], [], 0, 0
    self._error, self._fails_at = error, fails_at

  def _call(self):
    self.calls += 1
    if self._fails_at is not None and self.calls > self._fails_at:
      raise getattr(self.errors, self._error)("lost") if isinstance(self._error, str) else self._error

  def init(self, **kwargs):
    self.inits.append(kwargs)
    self._call()
    return self

  def log(self, metrics, step):
    self._call()
    self.logged.append((step, metrics))

  def finish(self):
    self._call()
    self.finished += 1


def wandb_log():
  return LogConfig(tensorboard=False, wandb_project="p")


def test_wandb_gets_the_same_rows_and_a_resume_continues_the_run(tmp_path, monkeypatch):
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", fake)
  with writers.MetricWriter(tmp_path, wandb_log(), {"seed": 3}) as writer:
    writer.write(0, {"a": 1})
  with writers.MetricWriter(tmp_path, wandb_log(), {"seed": 3}, resume_step=1) as writer:
    writer.write(1, {"a": 2})
  with writers.MetricWriter(tmp_path, wandb_log(), {"seed": 3}) as writer:
    pass
  assert fake.logged == [(0, {"a": 1.0}), (1, {"a": 2.0})]
  assert fake.finished == 3
  ids = [kwargs["id"] for kwargs in fake.inits]
  assert ids[0] == ids[1] != ids[2]
  assert fake.inits[0]["config"] == {"seed": 3} and fake.inits[0]["project"] == "p"


@pytest.mark.parametrize("error", ["CommError", ConnectionResetError("gone"), TimeoutError("slow")])
@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_wandb_lost_connection_never_stops_the_run(tmp_path, monkeypatch, error, fails_at):
  fake = FakeWandb(error=error, fails_at=fails_at)
  warnings = []
  monkeypatch.setitem(sys.modules, "wandb", fake)
  monkeypatch.setattr(writers.logging, "warning", lambda *args: warnings.append(args))
  with writers.MetricWriter(tmp_path, wandb_log(), {}) as writer:
    for step in range(4):
      writer.write(step, {"a": step})
  assert len(files.read_rows(tmp_path / "metrics.jsonl")) == 4
  assert len(warnings) == 1
  assert fake.calls == fails_at + 1  # Left alone after the failure.


def test_wandb_mistakes_of_ours_surface(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", FakeWandb(error=TypeError("bug"), fails_at=1))
  writer = writers.MetricWriter(tmp_path, wandb_log(), {})
  with pytest.raises(TypeError, match="bug"):
    writer.write(0, {"a": 1})


@pytest.mark.parametrize("error", ["UsageError", "AuthenticationError"])
def test_wandb_without_login_is_refused_before_a_row_is_dropped(tmp_path, monkeypatch, error):
  pathlib.Path(tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
  monkeypatch.setitem(sys.modules, "wandb", FakeWandb(error=error, fails_at=0))
  with pytest.raises(ValueError, match="wandb login"):
    writers.MetricWriter(tmp_path, wandb_log(), {})
  assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 0}


def test_wandb_not_installed_names_the_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ValueError, match=r"hbpo_jax\[wandb\]"):
    writers.MetricWriter(tmp_path, wandb_log(), {})
