"""Commands that outlive whoever started them: started once, found again, ended on purpose.

A job is a session of its own, so that neither an interrupt of a notebook's cell nor a new kernel reaches it. What is
known of it lies in a folder of this machine, not in the working directory, which may be on storage that other machines
see. A job holds a lock for as long as it lives; so there is no doubt whether it runs, and its process id is its own.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import tempfile
import time

from hbpo_jax.files import atomic_write_text

# The shell keeps the exit code, which a later reader could not ask the system for.
_KEEP_EXIT_CODE = 'exit_code=$0; "$@"; echo $? > "$exit_code.new"; mv "$exit_code.new" "$exit_code"'
_STARTED: list[subprocess.Popen] = []  # Of this process; kept so that they are reaped and not warned of.


@dataclasses.dataclass(frozen=True)
class Job:
  """A command that runs, or ran, on this machine.

  folder: what is known of it.  log: file that its output is appended to.  log_start: bytes of the log before it.
  argv: what was started.
  """
  folder: pathlib.Path
  log: pathlib.Path
  log_start: int
  argv: tuple[str, ...]

  @property
  def is_running(self) -> bool:
    """Whether it runs at this moment."""
    for process in _STARTED:
      process.poll()
    return _is_locked(self.folder)

  @property
  def exit_code(self) -> int | None:
    """How it ended; None while it runs, and where it was killed."""
    path = self.folder / "exit_code"
    return int(path.read_text()) if not self.is_running and path.is_file() else None

  @property
  def age_s(self) -> float:
    """Seconds since it was started."""
    return time.time() - (self.folder / "job.json").stat().st_mtime

  def output(self) -> str:
    """What it has written since it was started."""
    if not self.log.is_file():
      return ""
    with open(self.log, "rb") as f:
      f.seek(self.log_start)
      return f.read().decode("utf-8", "replace")

  def stop(self, grace_s: float = 60.0) -> None:
    """Ends it: SIGTERM to its whole session, and SIGKILL if it is still there after `grace_s` seconds."""
    pid = int((self.folder / "pid").read_text())
    for sign, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
      if not self.is_running:
        return
      with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, sign)
      deadline = time.monotonic() + wait_s
      while self.is_running and time.monotonic() < deadline:
        time.sleep(0.05)
    if self.is_running:
      raise RuntimeError(f"process {pid} ({shlex.join(self.argv[:3])} ...) does not end; end it by hand.")


def start(
    argv: Sequence[str], workdir: str | os.PathLike, name: str, environment: Mapping[str, str] | None = None) -> Job:
  """The job of this name in a working directory: started now, or the one that runs already.

  Args:
    argv: program and arguments.
    workdir: the output goes to WORKDIR/logs/NAME.log.
    name: tells the jobs of a working directory apart; fit for a file name.
    environment: variables that the job gets beside this process's.
  Raises:
    ValueError: when the job that runs was started with other arguments.
  """
  workdir, argv = pathlib.Path(workdir).absolute(), tuple(argv)
  folder = _folder(workdir, name)
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / "lock", "a") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return _same(find(workdir, name), argv)
    log = workdir / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    for file in ("exit_code", "pid"):
      (folder / file).unlink(missing_ok=True)
    size = log.stat().st_size if log.is_file() else 0
    atomic_write_text(folder / "job.json", json.dumps({"log": str(log), "log_start": size, "argv": argv}))
    with open(log, "ab") as output:
      # The lock goes with the file description, which this process closes and the job keeps.
      process = subprocess.Popen(
          ["/bin/sh", "-c", _KEEP_EXIT_CODE, str(folder / "exit_code"), *argv], stdin=subprocess.DEVNULL,
          stdout=output, stderr=subprocess.STDOUT, env=os.environ | dict(environment or {}), start_new_session=True,
          pass_fds=(lock.fileno(),))
    atomic_write_text(folder / "pid", str(process.pid))
    _STARTED.append(process)
  return Job(folder, log, size, argv)


def find(workdir: str | os.PathLike, name: str) -> Job:
  """The newest job of this name in a working directory on this machine, running or not.

  Raises:
    FileNotFoundError: when this machine started none.
  """
  folder = _folder(pathlib.Path(workdir).absolute(), name)
  path = folder / "job.json"
  if not path.is_file():
    raise FileNotFoundError(f"this machine started no {name} in {workdir}; start it, or give its working directory.")
  facts = json.loads(path.read_text(encoding="utf-8"))
  return Job(folder, pathlib.Path(facts["log"]), facts["log_start"], tuple(facts["argv"]))


def _same(job: Job, argv: tuple[str, ...]) -> Job:
  if job.argv != argv:
    other = [a for a in job.argv if a not in argv] + [f"without {a}" for a in argv if a not in job.argv]
    raise ValueError(
        f"it runs already in this working directory, with other arguments ({', '.join(other) or 'in another order'}); "
        "stop it first, or give another working directory.")
  return job


def _folder(workdir: pathlib.Path, name: str) -> pathlib.Path:
  key = hashlib.sha256(f"{workdir}\0{name}".encode()).hexdigest()[:16]
  return pathlib.Path(tempfile.gettempdir()) / f"hbpo_jax_jobs_{os.getuid()}" / key


def _is_locked(folder: pathlib.Path) -> bool:
  with open(folder / "lock", "a") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return True
  return False
