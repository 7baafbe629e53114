"""Workers that went bad: the parent ends each in time, the other items keep their verdicts, and nothing is left."""

import os
import pathlib
import select
import signal
import subprocess
import sys
import time

import pytest

from hbpo_jax.config import GradingConfig
from hbpo_jax.grading import Grader
from hbpo_jax.grading import pool as pool_module

# Needs a worker: neither exact texts nor exact numbers decide these.
GOOD, BAD, TRUTH = r"\boxed{\sqrt{12}}", r"\boxed{\sqrt{666}}", r"2\sqrt{3}"

# A worker that does `body` on the bad item, and says what is expected on others.
_WORKER = """
import json, os, signal, sys, time
os.write(1, b"ready\\n")
buffer = b""
while True:
  while b"\\n" not in buffer:
    chunk = os.read(0, 65536)
    if not chunk: sys.exit()
    buffer += chunk
  line, _, buffer = buffer.partition(b"\\n")
  if "666" in json.loads(line)["answer"]:
    {body}
  else:
    os.write(1, b"correct\\n")
"""

BODIES = {
    "spins and ignores every signal": (
        "[signal.signal(n, signal.SIG_IGN) for n in range(1, 32) if n not in (9, 17, 19)]\n    while True: pass"),
    "sleeps": "time.sleep(1000)",
    "stops itself": "os.kill(os.getpid(), signal.SIGSTOP)",
    "takes memory without a limit": "kept = bytearray(3 << 30); time.sleep(1000)",
    "ends": "os._exit(3)",
    "crashes": "os.abort()",
    "closes its output and lives on": "os.close(1); time.sleep(1000)",
    "closes its input and lives on": "os.close(0); os.write(1, b'what'); time.sleep(1000)",
    "starts a process that keeps the pipe": "(os.fork() and os._exit(0)); time.sleep(1000)",
    "starts many processes": "[os.fork() for _ in range(4)]; time.sleep(1000)",
    "sends garbage": "os.write(1, b'\\xff\\x00{]\\n')",
    "sends deep JSON": "os.write(1, b'[' * 100000 + b'\\n')",
    "sends a reply without an end": "\n    while True: os.write(1, b'x' * 65536)",
    "sends its reply byte by byte": "\n    while True: os.write(1, b'c'); time.sleep(0.1)",
    "sends two replies": "os.write(1, b'correct\\ncorrect\\n')",
    "prints before its reply": "os.write(1, b'warning: correct\\n')",
}


def _left_over(pids):
  """Living processes of the sessions that the workers opened; a killed one may take a moment to be gone."""
  deadline = time.monotonic() + 10
  while (found := _in_sessions(pids)) and time.monotonic() < deadline:
    time.sleep(0.02)
  return found


def _in_sessions(pids):
  found = []
  for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      fields = stat.read_text().rpartition(")")[2].split()
    except OSError:
      continue
    if int(fields[3]) in pids and fields[0] not in "ZX":
      found.append(int(stat.parent.name))
  return found


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_worker_costs_its_item_only(name, monkeypatch):
  monkeypatch.setattr(pool_module, "_BOOTSTRAP", _WORKER.replace("{body}", BODIES[name]))
  started = []
  new = pool_module._Process.__init__

  def noted(self, *args):
    new(self, *args)
    started.append(self.pid)

  monkeypatch.setattr(pool_module._Process, "__init__", noted)
  open_before = len(os.listdir("/proc/self/fd"))
  start = time.monotonic()
  try:
    with Grader(GradingConfig(workers=2, cpu_seconds=0.3), wall_seconds=0.6) as grader:
      for key in range(8):
        grader.submit(key, BAD if key == 3 else GOOD.replace("12", f"12{key}"), TRUTH, thinking_opened=False)
      verdicts = grader.collect()
      assert [v.reason for v in verdicts.values()] == ["timeout" if key == 3 else "correct" for key in range(8)]
      assert time.monotonic() - start < 30
      living = set(grader.worker_pids())
      assert not _left_over(set(started) - living)
    assert started and not _left_over(set(started))
  finally:
    for pid in _in_sessions(set(started)):  # Where the test fails.
      os.kill(pid, signal.SIGKILL)
  assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_reply_that_was_not_asked_for_is_not_taken(monkeypatch):
  body = "os.write(1, b'wrong\\n'); time.sleep(0.2); os.write(1, b'correct\\n')"
  monkeypatch.setattr(pool_module, "_BOOTSTRAP", _WORKER.replace("{body}", body).replace(
      'os.write(1, b"correct\\n")', 'time.sleep(0.5); os.write(1, b"wrong\\n")'))
  with Grader(GradingConfig(workers=1)) as grader:
    assert grader.grade_batch([BAD], [TRUTH], thinking_opened=False)[0].reason == "wrong"
    idle, = grader._workers._idle
    assert pool_module._wait_for(idle._output.fileno(), select.POLLIN, 60.0)
    assert grader.grade_batch([GOOD], [TRUTH], thinking_opened=False)[0].reason == "wrong"


def test_a_long_item_does_not_wait_for_a_worker_that_reads_nothing(monkeypatch):
  monkeypatch.setattr(pool_module, "_BOOTSTRAP", 'import os, time; os.write(1, b"ready\\n"); time.sleep(1000)')
  truths = [rf"\sqrt{{{n}}}" + "+x" * 400 for n in range(100)]
  start = time.monotonic()
  with Grader(GradingConfig(workers=1), wall_seconds=0.5) as grader:
    assert grader.grade_batch([GOOD], [truths], thinking_opened=False)[0].reason == "timeout"
  assert time.monotonic() - start < 20


@pytest.mark.parametrize("name", ["spins and ignores every signal", "takes memory without a limit"])
def test_a_limit_is_kept_long_before_the_wall_clock_and_decides_at_once(name, monkeypatch, caplog):
  monkeypatch.setattr(pool_module, "_BOOTSTRAP", _WORKER.replace("{body}", BODIES[name]))
  start = time.monotonic()
  with Grader(GradingConfig(workers=1, cpu_seconds=0.3), wall_seconds=60.0) as grader:
    assert grader.grade_batch([BAD], [TRUTH], thinking_opened=False)[0].reason == "timeout"
  assert time.monotonic() - start < 40 and "is replaced" not in caplog.text


# Workers that have served items and then run out of memory are not believed: a new one decides.
_TIRED = _WORKER.replace("{body}", "os._exit(77) if served else os.write(1, b'correct\\n')").replace(
    'buffer = b""', 'buffer, served = b"", 0').replace(
        '    os.write(1, b"correct\\n")', '    time.sleep(0.5); os.write(1, b"wrong\\n"); served += 1')


def test_what_earlier_items_left_does_not_decide(monkeypatch):
  monkeypatch.setattr(pool_module, "_BOOTSTRAP", _TIRED)
  with Grader(GradingConfig(workers=3)) as grader:
    good = [GOOD.replace("12", f"12{key}") for key in range(3)]
    verdicts = grader.grade_batch(good, [TRUTH] * 3, thinking_opened=False)
    assert [v.reason for v in verdicts] == ["wrong"] * 3 and len(grader.worker_pids()) == 3
    assert grader.grade_batch([BAD], [TRUTH], thinking_opened=False)[0].correct


def test_workers_get_no_secrets_and_work_nowhere(monkeypatch, tmp_path):
  monkeypatch.setenv("HF_TOKEN", "hf_secret")
  monkeypatch.chdir(tmp_path)
  with Grader(GradingConfig(workers=1)) as grader:
    assert grader.grade_batch([GOOD], [TRUTH], thinking_opened=False)[0].correct
    process = pathlib.Path(f"/proc/{grader.worker_pids()[0]}")
    assert b"hf_secret" not in (process / "environ").read_bytes()
    assert os.readlink(process / "cwd") == "/"
    limits = (process / "limits").read_text()
    descriptors = {os.readlink(fd).partition(":")[0] for fd in (process / "fd").iterdir() if fd.name not in ("1", "2")}
  for line in ("Max file size             0                    0", "Max core file size        0                    0",
               "Max processes             0                    0", f"Max address space         {1024 << 20}"):
    assert line in limits
  assert descriptors == {"pipe"}  # 1 and 2 are the error output.


@pytest.mark.parametrize("body", [
    "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "import ctypes; ctypes.CDLL(None).fork()",
    "import socket; socket.getaddrinfo('localhost', 80)",
    "import os; os.open('canary', os.O_RDWR | os.O_CREAT)",
    "import tempfile; tempfile.mkstemp(dir='.')",
    "import os; os.symlink('a', 'canary')",
    "import os; os.kill(os.getppid(), 15)",
])
def test_more_that_a_worker_may_not_do(repo_root, tmp_path, body):
  script = f"from hbpo_jax.grading import worker\nworker._restrict(1024)\n{body}"
  done = subprocess.run([sys.executable, "-B", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False,
                        env=os.environ | {"PYTHONPATH": str(repo_root)})
  assert "PermissionError: a grading worker may not do" in done.stderr
  assert not list(tmp_path.iterdir())


def test_a_deep_item_is_a_limit_reached_at_once(caplog):
  deep = "{" * 200 + "x" + "}" * 200 + "+1"
  with Grader(GradingConfig(workers=1)) as grader:
    verdict, = grader.grade_batch([rf"\boxed{{{deep}}}"], [TRUTH], thinking_opened=False)
  assert not verdict.correct and "is replaced" not in caplog.text
