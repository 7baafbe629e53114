"""The process that compares answers for the pool: one JSON line in, one word out, under hard limits.

It is started as a fresh interpreter (never forked, and without importing the parent's main module), ends when its
standard input does or its parent is gone, and may neither write files, start processes nor open sockets.
"""

from collections.abc import Iterator
import json
import os
import resource
import select
import signal
import sys

from hbpo_jax.grading import equivalence

# Exit status after an item that ran out of memory or nested too deep; the parent reads it as a limit reached.
EXIT_LIMIT = 77
# All that a worker ever says, so that the parent has nothing to parse.
READY = b"ready\n"
REPLIES = {b"correct\n": True, b"wrong\n": False}
MAX_REPLY = 16
# Files that may be open at once: modules are loaded late.
_OPEN_FILES = 16
# Seconds between looks at whether the parent still lives, while there is nothing to do.
_PARENT_CHECK_S = 5.0
# Compared before the first item, so that loading modules and building parser tables is not charged to an item.
_WARM_UP = [
    (r"\frac{1}{2} + \sqrt{3}i", r"\frac{1+2\sqrt{3}i}{2}"), (r"(x+1)^2 \sin(2x)", r"(x^2+2x+1) 2\sin x\cos x"),
    (r"\ln(4) + e^{2\pi}", r"2\ln 2 + e^{2\pi}"), (r"x^2 + y^2 = 4", r"x^2 + y^2 - 4 = 0"), (r"\sqrt{x^2}", "|x|"),
    (r"\mathbb{R} \setminus \{0\}", r"(-\infty,0) \cup (0,\infty)"), (r"\binom{n}{2} + n!", r"n! + \frac{n(n-1)}{2}"),
    (r"\begin{pmatrix} a & b \end{pmatrix}", r"\begin{pmatrix} b & a \end{pmatrix}"), (r"\log_2 9", r"2\log_2 3"),
]
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.remove", "os.rename", "os.mkdir", "os.rmdir",
    "os.truncate", "os.link", "os.symlink", "os.chmod", "os.chown", "os.kill", "subprocess.", "socket.", "shutil.",
    "pty.", "ctypes.", "resource.", "fcntl.", "sqlite3.", "tempfile.")


def main(cpu_seconds: float, memory_mib: int) -> None:
  """Answers items until the input ends.

  An item is {"answer": text, "truths": [texts]}, its answer one of `REPLIES`. The kernel ends the process (SIGPROF)
  when one item has used `cpu_seconds` of CPU time, also inside one long operation on integers.

  Args:
    cpu_seconds: CPU time of one item.
    memory_mib: address space of the process in MiB.
  """
  parent = os.getppid()
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the input.
  signal.signal(signal.SIGPROF, signal.SIG_DFL)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
  replies = os.dup(1)
  os.dup2(2, 1)  # Nothing that a library prints may end up among the replies.
  for answer, truth in _WARM_UP:
    equivalence.equal(answer, truth)
  _restrict(memory_mib)
  os.write(replies, READY)
  for item in _items(parent):
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
      correct = any(equivalence.equal(item["answer"], truth) for truth in item["truths"])
    except (MemoryError, RecursionError):
      os._exit(EXIT_LIMIT)
    signal.setitimer(signal.ITIMER_PROF, 0)
    os.write(replies, b"correct\n" if correct else b"wrong\n")


def _restrict(memory_mib: int) -> None:
  memory = memory_mib << 20
  resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # No process and no thread; root is exempt, the hook is not.
  resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))
  sys.addaudithook(_refuse)


def _refuse(event: str, args: tuple) -> None:
  if event.startswith(_FORBIDDEN) or (event == "open" and isinstance(args[2], int) and args[2] & _WRITING):
    raise PermissionError(f"a grading worker may not do {event}")


def _items(parent: int) -> Iterator[dict]:
  buffer = b""
  while True:
    line, newline, rest = buffer.partition(b"\n")
    if newline:
      buffer = rest
      yield json.loads(line)
      continue
    if not select.select([0], [], [], _PARENT_CHECK_S)[0]:
      if os.getppid() != parent:
        return
      continue
    chunk = os.read(0, 1 << 16)
    if not chunk:
      return
    buffer += chunk
