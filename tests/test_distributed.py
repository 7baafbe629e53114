"""What processes of one job tell each other, and what they say when one is missing; two real processes, no devices."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import jax
from jax._src.clusters import cloud_tpu_cluster
import pytest

from hbpo_jax import distributed
from hbpo_jax.config import Config, DistributedConfig
from hbpo_jax.grading import Journal
from tests.system import runs

_PROGRAM = """
import dataclasses, json, os, signal, sys, time
from hbpo_jax import distributed
from hbpo_jax.config import Config, DistributedConfig
from hbpo_jax.data.record import Problem
from hbpo_jax.grading.judge import Judge
from hbpo_jax.grading.pool import Grader

index, port, timeout_s, case = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
cfg = dataclasses.replace(Config(), distributed=DistributedConfig(f"127.0.0.1:{port}", 2, index, timeout_s))


def refuse():
  raise FileNotFoundError("there is no manifest")


def grade():
  submitted, submit = [], Grader.submit
  Grader.submit = lambda self, key, *args, **kw: submitted.append(key) or submit(self, key, *args, **kw)
  problem = Problem("p", "1 + 1?", "2", "test")
  responses = ["</think> \\\\boxed{2}", "</think> \\\\boxed{3}", "</think> none", "thinking", "</think> \\\\boxed{2.0}"]
  found = {}
  with Judge(cfg, sys.argv[5]) as judge:
    for name in ("first", "again"):
      grading = judge.begin(7)
      for i, response in enumerate(responses):
        grading.submit((i, 0), response, problem)
      verdicts = grading.collect()
      found[name] = [[*key, v.score, v.reason, v.answer] for key, v in sorted(verdicts.items())]
      found[name + " here"] = [key[0] for key in submitted]
      submitted.clear()
    found["evaluation"] = [v.reason for v in judge(responses, [problem] * 5)]
  return found


@distributed.on_every_host
def main(cfg, workdir):
  found = {}
  if case == "talk":
    found["values"] = distributed.exchange("numbers", [index, 0.1, None, "\\ud800é"])
    found["writer"] = distributed.from_writer("a file", lambda: {"read by": index})
    found["mine"] = [n for n in range(5) if distributed.is_mine(n)]
    found["writes"] = distributed.is_writer()
  elif case == "grade":
    found = grade()
  elif case == "late" and index == 1:
    time.sleep(3600)
  elif case in ("fails", "stuck") and index == 1:
    raise ValueError("this host has no model")
  elif case == "stuck":
    time.sleep(3600)  # As one would be that waits for a device.
  elif case == "dies":
    pid = distributed.exchange("pid", os.getpid())[1]
    if index == 1:
      os.kill(pid, signal.SIGKILL)
    while open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z":
      time.sleep(0.1)
    raise RuntimeError("Connection reset by peer\\nwhere")  # As the devices say it.
  elif case == "breaks" and index == 0:
    raise RuntimeError("Connection reset by peer")
  elif case == "elsewhere":
    distributed.barrier(f"place {index}")
  elif case == "writer fails":
    distributed.from_writer("a file", refuse)
  distributed.barrier("the meeting")
  print(json.dumps(found))
  print("from", index, file=distributed.output())


try:
  main(cfg, "")
except (ValueError, OSError) as error:
  print(f"{type(error).__name__}: {error}")
"""


def run_two(case, timeout_s=60, folder=""):
  """[(exit status, lines of output, errors)] of both; the second is ended once the first is done, if it is late."""
  port = runs.free_port()
  processes = [
      subprocess.Popen(
          [sys.executable, "-c", _PROGRAM, str(i), str(port), str(timeout_s), case, str(folder)],
          env=runs.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
      for i in range(2)]
  found = []
  for process in processes:
    if case == "late" and found:
      process.kill()
    text, errors = process.communicate(timeout=120)
    found.append((process.returncode, text.splitlines(), errors))
  return found


def test_they_exchange_values_and_only_the_first_speaks():
  (status_0, lines_0, _), (status_1, lines_1, _) = run_two("talk")
  assert status_0 == status_1 == 0
  first, second = json.loads(lines_0[0]), json.loads(lines_1[0])
  assert first["values"] == second["values"] == [[i, 0.1, None, "\ud800é"] for i in range(2)]
  assert first["writer"] == second["writer"] == {"read by": 0}
  assert (first["mine"], second["mine"]) == ([0, 2, 4], [1, 3])
  assert (first["writes"], second["writes"]) == (True, False)
  assert lines_0[1:] == ["from 0"] and lines_1[1:] == []


def test_each_grades_its_share_and_all_get_all_verdicts(tmp_path):
  (status_0, lines_0, _), (status_1, lines_1, _) = run_two("grade", folder=tmp_path)
  assert status_0 == status_1 == 0
  first, second = json.loads(lines_0[0]), json.loads(lines_1[0])
  assert (first.pop("first here"), second.pop("first here")) == ([0, 2, 4], [1, 3])
  assert (first.pop("again here"), second.pop("again here")) == ([], []), "the journal has them"
  assert first == second and first["first"] == first["again"]
  assert [row[3] for row in first["first"]] == ["correct", "wrong", "no_answer", "unfinished", "correct"]
  assert first["evaluation"] == [row[3] for row in first["first"]]
  assert len(list(tmp_path.iterdir())) == 1 and len(Journal(tmp_path).read(7)) == 5


def test_a_missing_process_is_named_with_its_host():
  status, lines, _ = run_two("late", timeout_s=4)[0]
  assert status == 2
  assert f"process 1 (host {os.uname().nodename})" in lines[0] and "'the meeting'" in lines[0]
  assert "distributed.timeout_s=4" in lines[0] and "process 0" not in lines[0]


@pytest.mark.parametrize("case,first,second", [
    ("fails", "process 1 (host", "ValueError: this host has no model"),
    ("elsewhere", "process 1 (host", "process 0 (host"),
    ("writer fails", "FileNotFoundError: there is no manifest", "on process 0 (host"),
])
def test_one_that_fails_ends_the_other_with_the_reason(case, first, second):
  (status_0, lines_0, _), (status_1, lines_1, _) = run_two(case)
  assert status_0 == status_1 == 2
  assert first in lines_0[0] and second in lines_1[0]
  if case == "fails":
    assert "this host has no model" in lines_0[0]
  if case == "writer fails":
    assert "there is no manifest" in lines_1[0]


def test_where_devices_fail_the_process_that_died_is_named():
  (status_0, lines_0, _), (status_1, _, _) = run_two("dies")
  assert status_1 == -signal.SIGKILL and status_0 == 2
  assert lines_0[0].startswith(f"ValueError: there is no sign of life of process 1 (host {os.uname().nodename}), and")
  assert "failed here (Connection reset by peer); see the output there" in lines_0[0]


def test_an_error_of_the_devices_alone_stays_what_it_is():
  (status_0, lines_0, errors_0), (status_1, lines_1, _) = run_two("breaks")
  assert status_0 == 1 and lines_0 == [] and "RuntimeError: Connection reset by peer" in errors_0
  assert status_1 == 2 and "process 0 (host" in lines_1[0] and "has ended: RuntimeError: Connection reset" in lines_1[0]


def test_one_that_fails_ends_another_that_waits_for_a_device():
  (status_0, lines_0, errors_0), (status_1, _, _) = run_two("stuck")
  assert status_0 == status_1 == 2 and lines_0 == []
  assert "process 1 (host" in errors_0 and "has ended: ValueError: this host has no model" in errors_0


def test_a_process_alone_gets_its_own_value_back():
  value = object()
  assert distributed.exchange("x", value) == [value] and distributed.from_writer("x", lambda: value) is value
  assert distributed.is_writer() and all(map(distributed.is_mine, range(3))) and distributed.describe() == []
  assert distributed.output() is sys.stdout


@pytest.fixture
def joined(monkeypatch):
  """Arguments of what would have been jax.distributed.initialize."""
  calls = []

  def initialize(*args, **options):
    calls.append((args, options))
    raise RuntimeError("not in a test")

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
    monkeypatch.delenv(name, raising=False)
  return calls


def start(**settings):
  with pytest.raises(RuntimeError, match="not in a test"):
    distributed.start(DistributedConfig(**settings))


def test_settings_count_before_the_environment(joined, monkeypatch):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
  monkeypatch.setenv("JAX_PROCESS_ID", "3")
  start(timeout_s=7)
  start(coordinator_address="b:2", num_processes=2, process_id=0)
  assert [args for args, _ in joined] == [("a:1", 4, 3), ("b:2", 2, 0)]
  assert joined[0][1] == {"initialization_timeout": 7, "shutdown_timeout_seconds": 7}


@pytest.fixture
def no_platform_is_forced():
  """Call it, and JAX_PLATFORMS is as if unset, until the test is over."""
  before = jax.config.jax_platforms
  yield lambda: jax.config.update("jax_platforms", None)
  jax.config.update("jax_platforms", before)


def test_the_workers_of_a_slice_find_each_other_and_nothing_else_does(joined, monkeypatch, no_platform_is_forced):
  monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "w0,w1")
  distributed.start(DistributedConfig())  # The tests' platform is the CPU.
  assert not joined
  no_platform_is_forced()
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "w0")
  distributed.start(DistributedConfig())
  assert not joined
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "w0,w1")
  distributed.start(DistributedConfig(num_processes=1))
  assert not joined
  start()
  assert [args for args, _ in joined] == [(None, None, None)]


@pytest.mark.parametrize("settings,message", [
    ({"num_processes": 2, "process_id": 0}, "coordinator_address=HOST:PORT"),
    ({"coordinator_address": "a:1", "num_processes": 2}, "distributed.process_id=-1"),
    ({"coordinator_address": "a:1", "num_processes": 2, "process_id": 2}, "distributed.process_id=2"),
    ({"coordinator_address": "a", "num_processes": 2, "process_id": 1}, "distributed.coordinator_address='a'"),
    ({"timeout_s": 0}, "distributed.timeout_s=0"),
])
def test_contradictory_settings_are_refused(joined, settings, message):
  with pytest.raises(ValueError) as refused:
    distributed.start(dataclasses.replace(Config().distributed, **settings))
  assert message in str(refused.value) and not joined


def test_a_number_in_the_environment_must_be_one(joined, monkeypatch):
  monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
  with pytest.raises(ValueError, match="JAX_NUM_PROCESSES='two'"):
    distributed.start(DistributedConfig())
