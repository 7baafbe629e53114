"""A run that is asked to stop does so where nothing is lost: SIGTERM, Ctrl-C, a machine that is about to be taken away.

The first SIGTERM, SIGHUP or SIGINT only asks; the run looks at its safe points whether it was asked (`check`), saves
what a resumed run needs, and ends with exit code 0. A SIGINT after that ends it at once. Where a job has several
processes, JAX's preemption service passes the SIGTERM of any of them on and finds the point at which all of them stop.

Every process passes the same safe points in the same order: they belong in the thread of `main` alone.
"""

from collections.abc import Callable
import functools
import json
import os
import pathlib
import signal
import sys
import threading
import time
from typing import Any

from hbpo_jax import distributed
from hbpo_jax.config import Config
from hbpo_jax.files import atomic_write_text

STOPPED = "stopped.json"  # In the working directory of a run that stopped before its end; tpu/worker.sh looks for it.
_ASK = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Stopped(Exception):
  """The run ends here, as it was asked to. Its text says what was saved."""


class _Request:
  """What this process was asked; nothing until a signal comes."""
  by = ""  # Name of the signal.
  at_s = 0.0
  n_checks = 0
  is_agreed = False  # All processes have reached the point at which they stop.


def stoppable(main: Callable[[Config, str], None]) -> Callable[[Config, str], None]:
  """A command, (cfg, workdir) -> None, that stops when it is asked to; see the module.

  It returns then, says so on the terminal, and leaves WORKDIR/stopped.json, which the next start removes. Put it below
  `distributed.on_every_host`.
  """
  @functools.wraps(main)
  def stopping(cfg: Config, workdir: str) -> None:
    _Request.by, _Request.n_checks, _Request.is_agreed = "", 0, False
    note = pathlib.Path(workdir) / STOPPED
    if distributed.is_writer() and note.exists():
      note.unlink()
    before = _listen()
    try:
      main(cfg, workdir)
    except Stopped as stop:
      reason = _Request.by or "SIGTERM to one of its processes"
      if distributed.is_writer():
        facts = {"by": reason, "stopped": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "what": str(stop)}
        atomic_write_text(note, json.dumps(facts) + "\n")
        print(f"stopped by {reason}: {stop}. The same command goes on from there.", flush=True)
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)

  return stopping


def check(what: str = "what was done so far is on disk") -> None:
  """A safe point: raises where the run has to stop.

  Args:
    what: what is saved here, as the last line of the run says it.
  Raises:
    Stopped: when the run was asked to stop; in a job of several processes in all of them at the same safe point.
  """
  if reached():
    raise Stopped(what)


def reached() -> bool:
  """As `check`, for a safe point that has something to do before it raises `Stopped` itself."""
  _Request.n_checks += 1
  if not _Request.is_agreed:
    alone = distributed.n_processes() == 1
    _Request.is_agreed = bool(_Request.by) if alone else distributed.reached_preemption(_Request.n_checks)
  return _Request.is_agreed


def is_stopping() -> bool:
  """Whether a safe point was reached at which the run stops; for threads beside that of `main`."""
  return _Request.is_agreed


def age() -> str:
  """How long ago the run was asked to stop, as part of a message; '' where another process was."""
  return f", {time.monotonic() - _Request.at_s:.1f} s after {_Request.by}" if _Request.by else ""


def _listen() -> dict[int, Any]:
  """Installs the handlers and returns those before, by signal."""
  if threading.current_thread() is not threading.main_thread():
    return {}  # Only the main thread may; whoever runs a command elsewhere handles signals.
  before = {}
  for number in _ASK:
    if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
      continue  # Started by nohup.
    if number == signal.SIGTERM and distributed.n_processes() > 1:
      continue  # The preemption service listens to it.
    before[number] = signal.signal(number, _asked)
  return before


def _asked(number: int, _: Any) -> None:
  if _Request.by and number == signal.SIGINT:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)  # Ends the process as one without a handler, without clean-up.
    return
  if _Request.by:
    return  # Supervisors repeat themselves.
  _Request.by, _Request.at_s = signal.Signals(number).name, time.monotonic()
  # Not print: a handler may run in the middle of another print.
  text = f"\n{_Request.by}: the run stops at the next safe point and saves its state; Ctrl-C ends it at once.\n"
  os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, text.encode())
  if distributed.n_processes() > 1:
    os.kill(os.getpid(), signal.SIGTERM)  # To the preemption service, which tells the others.
