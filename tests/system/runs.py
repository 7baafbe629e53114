"""Helpers of the whole-run tests: a tiny checkpoint, a problem file, and the command line that trains on them."""

import concurrent.futures
import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
from safetensors import numpy as safetensors_numpy

from hbpo_jax import config
from tests import checkpoints

PROBLEMS = [("Add 2 and 3.", "5"), ("What is 7 times 6?", "42"), ("Halve 18.", "9"), ("Ten minus four.", "6"),
            ("1 + 1", "2"), ("What is 3 squared?", "9")]


def make_inputs(folder: pathlib.Path) -> None:
  """folder/model: a random Qwen2 with a BPE tokenizer and chat template. folder/problems.jsonl: six problems."""
  checkpoints.make_checkpoint(folder / "model", "qwen2", hidden=32)
  rows = [{"id": f"p{i}", "problem": p, "answer": a, "source": "test"} for i, (p, a) in enumerate(PROBLEMS)]
  (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(overrides: dict, workdir: pathlib.Path) -> list[str]:
  """Command-line arguments: the defaults of the hbpo profile, these overrides, and the working directory."""
  file = workdir.parent / f"{workdir.name}_config.py"
  file.write_text("from hbpo_jax import config\n\n\ndef get_config():\n  return config.new('hbpo')\n")
  return [f"--config={file}", *(f"--config.{k}={v}" for k, v in overrides.items()), f"--workdir={workdir}"]


def settings(folder: pathlib.Path, **changes) -> dict:
  """Settings of a run of a few seconds, by dotted name."""
  return {
      "steps": 4, "model.path": str(folder / "model"), "model.compute_dtype": "float32", "model.remat": "none",
      "data.source": str(folder / "problems.jsonl"), "data.max_prompt_tokens": 96,
      # Two rewards per query differ, whatever the random model writes: a prefix of the response decides its score.
      "reward.grader": "tests.system.runs.score_by_length", "reward.max_response_tokens": 64,
      "prompt.instruction": "", "prompt.budget_sentence": "within {budget} tokens",
      "rollout.queries": 4, "rollout.rollouts_per_query": 4, "rollout.budgets": (24, 48), "rollout.caps": (32, 48),
      "learner.minibatches": 2, "optimizer.learning_rate": 1e-3, "mesh.data": 1, "grading.workers": 1,
      "checkpoint.save_every": 1, "log.samples_every": 2, "log.tensorboard": False,
  } | {name.replace("__", "."): value for name, value in changes.items()}


def make_config(overrides: dict) -> config.Config:
  """The hbpo profile with overrides by dotted name."""
  cd = config.new("hbpo")
  for name, value in overrides.items():
    parent, _, leaf = name.rpartition(".")
    (config.get(cd, parent) if parent else cd)[leaf] = value
  return config.from_config_dict(cd)


def score_by_length(responses, problems):
  """A grader that needs no able model: parity of the length. Deterministic, and mixed within a query."""
  return [float(len(response) % 2) for response in responses]


def command(module: str, overrides: dict, workdir: pathlib.Path) -> list[str]:
  """argv of a command."""
  return [sys.executable, "-m", f"hbpo_jax.{module}", *arguments(overrides, workdir)]


def environment(n_devices: int = 1) -> dict[str, str]:
  """The environment of a fresh process on n simulated devices."""
  root = pathlib.Path(__file__).resolve().parents[2]
  return os.environ | {
      "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={n_devices}",
      "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}


def run(module: str, overrides: dict, workdir: pathlib.Path, n_devices: int = 1) -> subprocess.CompletedProcess:
  """The finished process of a command."""
  return subprocess.run(
      command(module, overrides, workdir), env=environment(n_devices), capture_output=True, text=True, timeout=600)


def free_port() -> int:
  """A port of this machine that nothing listens on."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def run_hosts(
    module: str, overrides: dict, workdir: pathlib.Path, n_processes: int, n_devices: int,
) -> list[subprocess.CompletedProcess]:
  """The finished processes of a command that runs as one job of several, each with n simulated devices."""
  job = {"distributed.coordinator_address": f"127.0.0.1:{free_port()}", "distributed.num_processes": n_processes}
  running = [
      subprocess.Popen(
          command(module, overrides | job | {"distributed.process_id": i}, workdir), env=environment(n_devices),
          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
      for i in range(n_processes)]
  # All at once: a process whose pipe is full would keep the others waiting.
  with concurrent.futures.ThreadPoolExecutor(n_processes) as threads:
    outputs = list(threads.map(lambda p: p.communicate(timeout=600), running))
  return [subprocess.CompletedProcess(p.args, p.returncode, *texts) for p, texts in zip(running, outputs)]


def exported(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """All tensors of WORKDIR/export by name."""
  tensors = {}
  for file in sorted((workdir / "export").glob("*.safetensors")):
    tensors |= safetensors_numpy.load_file(file)
  return tensors


def rows(path: pathlib.Path) -> list[dict]:
  """The rows of a JSON Lines file."""
  return [json.loads(line) for line in path.read_text().splitlines()]
