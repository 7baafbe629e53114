"""Jobs: started once, found again by another process, out of an interrupt's reach, ended on purpose."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from hbpo_jax import jobs

WAITS = (sys.executable, "-c", "import time; print('waiting', flush=True); time.sleep(600)")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "jobs"))


@pytest.fixture
def waiting(tmp_path):
  job = jobs.start(WAITS, tmp_path / "run", "train")
  until(lambda: "waiting" in job.output())
  yield job
  job.stop(grace_s=10)


def until(condition, limit_s: float = 60.0) -> None:
  deadline = time.monotonic() + limit_s
  while not condition():
    assert time.monotonic() < deadline, "it did not come"
    time.sleep(0.01)


def finished(tmp_path, code: str, name: str = "job") -> jobs.Job:
  job = jobs.start([sys.executable, "-c", code], tmp_path, name)
  until(lambda: not job.is_running)
  return job


@pytest.mark.parametrize("code", [0, 1, 2, 37])
def test_the_exit_code_and_both_outputs_are_kept(tmp_path, code):
  job = finished(tmp_path, f"import sys; print('to out'); print('to err', file=sys.stderr); sys.exit({code})")
  assert job.exit_code == code
  assert sorted(job.output().splitlines()) == ["to err", "to out"]
  assert job.log == tmp_path / "logs" / "job.log"
  assert jobs.find(tmp_path, "job") == job


def test_arguments_and_environment_arrive_as_they_are(tmp_path):
  odd = "it's $HOME \"and\" *; \\"
  job = jobs.start(
      [sys.executable, "-c", "import os, sys; print(sys.argv[1], os.environ['ODD'])", odd], tmp_path, "job",
      {"ODD": odd})
  until(lambda: not job.is_running)
  assert job.output() == f"{odd} {odd}\n"


def test_the_same_is_not_started_twice(waiting, tmp_path):
  again = jobs.start(WAITS, tmp_path / "run", "train")
  assert again == waiting and waiting.output() == "waiting\n"
  assert waiting.exit_code is None
  with pytest.raises(ValueError, match="with other arguments.*--config.seed=1.*stop it first"):
    jobs.start([*WAITS, "--config.seed=1"], tmp_path / "run", "train")
  assert finished(tmp_path / "run", "print('beside')", "doctor").exit_code == 0, "another name is another job"


def test_another_process_finds_it_running_and_ends_it(waiting, tmp_path):
  code = (
      "import sys, tempfile; tempfile.tempdir = sys.argv[1]\nfrom hbpo_jax import jobs\n"
      "job = jobs.find(sys.argv[2], 'train'); print(job.is_running, job.output().strip()); job.stop(); "
      "print(job.is_running, job.exit_code)")
  done = subprocess.run(
      [sys.executable, "-c", code, str(tmp_path / "jobs"), str(tmp_path / "run")], capture_output=True, text=True,
      env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])})
  assert done.stdout.splitlines() == ["True waiting", "False None"], done.stderr
  assert not waiting.is_running and waiting.exit_code is None


def test_it_is_in_no_group_of_its_starter(waiting):
  pid = int((waiting.folder / "pid").read_text())
  assert os.getpgid(pid) == os.getsid(pid) == pid != os.getpgid(0)


def test_one_that_ignores_the_request_is_killed(tmp_path):
  code = ("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); "
          "time.sleep(600)")
  job = jobs.start([sys.executable, "-c", code], tmp_path, "job")
  until(lambda: "deaf" in job.output())
  job.stop(grace_s=0.2)
  assert not job.is_running and job.exit_code is None
  job.stop()  # Once more does nothing.


def test_what_a_stop_gives_up_is_not_taken_for_running(tmp_path):
  """A child that outlives its parent keeps the lock: the job runs as long as anything of it does."""
  job = jobs.start(WAITS, tmp_path, "job")
  until(lambda: "waiting" in job.output())
  os.kill(int((job.folder / "pid").read_text()), signal.SIGKILL)  # The shell alone.
  time.sleep(0.1)
  assert job.is_running
  job.stop(grace_s=10)
  assert not job.is_running


def test_a_second_start_appends_to_the_log_and_shows_its_own_part(tmp_path):
  first, second = finished(tmp_path, "print('one')"), finished(tmp_path, "print('two')")
  assert first.log.read_text() == "one\ntwo\n" and second.output() == "two\n"
  assert finished(tmp_path, "import sys; sys.exit(3)").exit_code == 3
  assert finished(tmp_path, "pass").exit_code == 0, "not that of the one before"


def test_a_killed_job_has_no_exit_code_of_the_one_before(tmp_path):
  assert finished(tmp_path, "pass").exit_code == 0
  job = jobs.start(WAITS, tmp_path, "job")
  until(lambda: "waiting" in job.output())
  job.stop(grace_s=10)
  assert job.exit_code is None


def test_a_job_that_was_never_started_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="started no train in .*start it"):
    jobs.find(tmp_path, "train")
