"""The parent's side: the workers' processes, the networks and prompts that the scripts share, and the machine."""

from collections.abc import Iterable, Mapping
import contextlib
import json
import os
import pathlib
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent.parent
TUNIX = "google-tunix==0.1.7"
TUNIX_VENV = HERE / ".venv-tunix"
SCORE_TOLERANCE = 1e-3  # float32 networks of one set of weights differ by 1e-6; a wrong bias or mask by 1e-1.

COMMON = dict(head_size=64, vocabulary=4096, rope_theta=10_000.0, rms_eps=1e-6, seed=0)
MODELS = {
    "small": dict(name="small", hidden=256, layers=4, heads=4, kv_heads=2, mlp=1024, **COMMON),
    "medium": dict(name="medium", hidden=512, layers=8, heads=8, kv_heads=4, mlp=2048, **COMMON),
}
EOS, PAD = 1, 0


class Failed(Exception):
  """A contender could not be started, set up or run."""


def make_prompts(n: int, n_tokens: int, seed: int) -> list[list[int]]:
  """n prompts of n_tokens ids each, none of them EOS or PAD."""
  rng = random.Random(seed)
  vocabulary = range(max(EOS, PAD) + 1, COMMON["vocabulary"])
  return [rng.choices(vocabulary, k=n_tokens) for _ in range(n)]


def log(text: str) -> None:
  """Progress, to stderr."""
  print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def tunix_python() -> str:
  """The interpreter that has Tunix; makes its virtual environment on first use.

  Raises:
    Failed: when it cannot be installed.
  """
  if named := os.environ.get("HBPO_TUNIX_PYTHON"):
    return named
  python, done = TUNIX_VENV / "bin" / "python", TUNIX_VENV / "requirement"
  if done.is_file() and done.read_text() == TUNIX:
    return str(python)
  log(f"installing {TUNIX} into {TUNIX_VENV}; takes some minutes, once")
  for command in ([sys.executable, "-m", "venv", "--clear", str(TUNIX_VENV)],
                  [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", TUNIX]):
    result = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if result.returncode:
      sys.stderr.write(result.stderr)
      last = (result.stderr.strip().splitlines() or ["no message"])[-1]
      raise Failed(f"{TUNIX} could not be installed: {last}; or set HBPO_TUNIX_PYTHON to an interpreter that has it.")
  done.write_text(TUNIX)
  return str(python)


class Worker:
  """A contender's process."""

  def __init__(self, system: str, module: str, timeout_s: float, env: Mapping[str, str] | None = None):
    """Args:
      system: 'ours', 'tunix' or 'transformers'; decides the interpreter.
      module: what it runs, which answers as contenders.common.answer does.
      timeout_s: what one answer may take.
      env: more environment variables.
    Raises:
      Failed: when it does not start.
    """
    self.system, self._timeout_s = system, timeout_s
    self.model: str | None = None  # whose cases it holds
    python = tunix_python() if system == "tunix" else sys.executable
    path = {"PYTHONPATH": str(HERE.parent)} if system == "ours" else {}
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    try:
      self._process = subprocess.Popen(
          [python, "-m", module], cwd=HERE, env=clean | path | dict(env or {}), stdin=subprocess.PIPE,
          stdout=subprocess.PIPE, text=True)
    except OSError as error:
      raise Failed(f"{python} does not start: {error}") from error

  def ask(self, cmd: str, **more) -> dict[str, Any]:
    """The answer to one command.

    Raises:
      Failed: when the answer is an error, or none comes.
    """
    timer = threading.Timer(self._timeout_s, self._process.kill)
    timer.start()
    try:
      print(json.dumps({"cmd": cmd, **more}), file=self._process.stdin, flush=True)
      line = self._process.stdout.readline()
    except OSError:
      line = ""
    finally:
      timer.cancel()
    if not line:
      code = self._process.wait()
      raise Failed(f"its process ended with code {code} (timeout: {self._timeout_s:.0f} s); see stderr.")
    answer = json.loads(line)
    if "error" in answer:
      raise Failed(answer["error"])
    return answer

  def close(self) -> None:
    """Ends the process, by itself or else by force."""
    with contextlib.suppress(OSError):  # It may be gone already.
      self._process.stdin.close()
    try:
      self._process.wait(10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()


def machine() -> dict[str, Any]:
  """Processor, number of CPUs we may use, and platform."""
  name = platform.processor()
  info = pathlib.Path("/proc/cpuinfo")
  if info.is_file():
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    name = names[0] if names else name
  cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return {"cpu": name, "cpus": cpus, "platform": platform.platform()}


def wrong_networks(scores: Mapping[str, float]) -> dict[str, str]:
  """{system: error} of those whose network gives a prompt another log-probability than ours, or the first one's."""
  log(f"mean log-probability of the first prompt: {dict(scores)}")
  reference = scores.get("ours", next(iter(scores.values()), 0.0))
  return {
      system: f"it runs another network: mean log-probability {score}, not {reference}."
      for system, score in scores.items() if not abs(score - reference) < SCORE_TOLERANCE}


def rounded(value: float) -> float:
  """To four digits."""
  return float(f"{value:.4g}")


def median(values: Iterable[float]) -> float:
  """Rounded."""
  return rounded(statistics.median(values))


def print_cells(cells: Iterable[Mapping[str, Any]], out: pathlib.Path | None) -> None:
  """One JSON line each, as they become known, on stdout and into a file."""
  with out.open("w") if out else contextlib.nullcontext() as file:
    for cell in cells:
      for stream in filter(None, (sys.stdout, file)):
        print(json.dumps(cell), file=stream, flush=True)
