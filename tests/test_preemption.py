"""Signals ask a command to stop at its next safe point, and leave no trace when it is over."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from hbpo_jax import config, distributed, preemption
from tests.system import runs

CFG = config.Config()


@pytest.fixture(autouse=True)
def signals_of_a_terminal():
  """SIGHUP ends a process; under nohup it is ignored, and commands leave that as it is."""
  given = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGHUP, given)


def told(*signals):
  """A command that gets signals and then passes three safe points; what it came to."""
  passed = []

  @preemption.stoppable
  def main(cfg, workdir):
    preemption.check()
    passed.append("started")
    for number in signals:
      os.kill(os.getpid(), number)
    passed.append("told")
    preemption.check("all is saved")
    passed.append("not stopped")

  return main, passed


@pytest.mark.parametrize("signals", [
    (signal.SIGTERM,), (signal.SIGINT,), (signal.SIGHUP,), (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP)])
def test_a_signal_stops_at_the_next_safe_point_and_nowhere_else(tmp_path, capfd, signals):
  before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
  main, passed = told(*signals)
  main(CFG, str(tmp_path))
  assert passed == ["started", "told"]
  out, err = capfd.readouterr()
  name = signals[0].name
  assert out == f"stopped by {name}: all is saved. The same command goes on from there.\n"
  assert err.count("stops at the next safe point") == 1 and name in err
  note = json.loads((tmp_path / "stopped.json").read_text())
  assert (note["by"], note["what"]) == (name, "all is saved")
  assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before


def test_the_next_start_takes_the_note_away_and_is_not_stopped(tmp_path):
  told(signal.SIGTERM)[0](CFG, str(tmp_path))
  main, passed = told()
  main(CFG, str(tmp_path))
  assert passed == ["started", "told", "not stopped"] and list(tmp_path.iterdir()) == []


def test_a_second_interrupt_ends_at_once(tmp_path):
  program = """
import os, signal, sys, time
from hbpo_jax import config, preemption

@preemption.stoppable
def main(cfg, workdir):
  for number in map(int, sys.argv[2:]):
    os.kill(os.getpid(), number)
    time.sleep(0.01)
  print("still here", flush=True)

main(config.Config(), sys.argv[1])
"""
  def run(*signals):
    return subprocess.run([sys.executable, "-c", program, tmp_path, *(str(int(s)) for s in signals)],
                          env=runs.environment(), capture_output=True, text=True, timeout=60)

  for first in (signal.SIGINT, signal.SIGTERM):
    done = run(first, signal.SIGINT)
    assert done.returncode == -signal.SIGINT and done.stdout == "" and "Traceback" not in done.stderr
  assert run(signal.SIGINT, signal.SIGTERM).stdout == "still here\n"


def test_one_of_several_processes_stops_where_all_do(tmp_path, monkeypatch):
  """Another was told to stop, and JAX's service has found the third safe point for all of them."""
  monkeypatch.setattr(distributed, "n_processes", lambda: 2)
  monkeypatch.setattr(distributed, "reached_preemption", lambda count: count == 3)
  passed = []

  @preemption.stoppable
  def main(cfg, workdir):
    for i in range(5):
      preemption.check("all is saved")
      passed.append(i)

  main(CFG, str(tmp_path))
  assert passed == [0, 1] and preemption.is_stopping()
  assert json.loads((tmp_path / "stopped.json").read_text())["by"] == "SIGTERM to one of its processes"


def test_a_program_started_by_nohup_stays_deaf_to_hangups(tmp_path):
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    main, passed = told(signal.SIGHUP)
    main(CFG, str(tmp_path))
  finally:
    signal.signal(signal.SIGHUP, before)
  assert passed[-1] == "not stopped"


def test_an_error_passes_through_and_leaves_no_note(tmp_path):
  @preemption.stoppable
  def main(cfg, workdir):
    raise ValueError("wrong")

  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(ValueError, match="wrong"):
    main(CFG, str(tmp_path))
  assert signal.getsignal(signal.SIGTERM) == before and not list(tmp_path.iterdir())


def test_beside_the_main_thread_no_handler_is_touched(tmp_path):
  main, passed = told()
  thread = threading.Thread(target=main, args=(CFG, str(tmp_path)))
  thread.start()
  thread.join()
  assert passed[-1] == "not stopped"
