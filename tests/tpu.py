"""TPU's compiler for tests, without a TPU: scripts run in another process, which imagines 8 chips of v5e."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

REPO_ROOT = pathlib.Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "PYTHONPATH": str(REPO_ROOT),
}

# Of tests that take seconds; `make test` runs them where libtpu is.
quick = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs libtpu, TPU's compiler: pip install -e '.[tpu-aot]'"),
]
marks = [pytest.mark.slow, *quick]


def reports(script: str, timeout: int) -> list[dict]:
  """The JSON lines that a script prints there."""
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | ENVIRONMENT
  done = subprocess.run(
      [sys.executable, script], env=environment, capture_output=True, text=True, timeout=timeout, check=False)
  assert done.returncode == 0, done.stderr[-4000:]
  return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
