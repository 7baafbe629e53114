"""FLOPs of learning against loops over tokens, and what the metrics divide by what."""

import types

import numpy as np
import pytest

from hbpo_jax import throughput
from hbpo_jax.models import parameters
from tests.learning import tiny

ARCH = tiny.ARCH


def test_flops_by_loops_over_tokens():
  n_prompt_B, n_tokens_BGJ = np.array([3, 5]), np.array([[[2, 7]], [[1, 4]]])
  # Weights that multiply a token: all matrices but the embedding, which is looked up, and is the head here.
  matrices = [row for row in parameters.table(ARCH) if row.stacked and row.n_inputs]
  per_layer = sum(int(np.prod(row.shape[1:])) for row in matrices)
  total = 0
  for b in range(2):
    for n in n_tokens_BGJ[b].reshape(-1):
      for t in range(n_prompt_B[b] + n):
        total += ARCH.n_layers * (2 * per_layer + 2 * 2 * ARCH.n_heads * ARCH.head_size * (t + 1))
      total += n * 2 * ARCH.vocab_size * ARCH.hidden_size
  assert throughput.learning_flops(ARCH, n_prompt_B, n_tokens_BGJ, n_scorings=0) == 3 * total
  assert throughput.learning_flops(ARCH, n_prompt_B, n_tokens_BGJ, n_scorings=2) == 5 * total


@pytest.mark.parametrize("kind, peak", [
    ("TPU v5 lite", 197), ("TPU v5p", 459), ("TPU v5", 459), ("TPU v6 lite", 918), ("TPU v4", 275), ("TPU7x", 1153.5),
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA A100-SXM4-80GB", 312), ("cpu", None)])
def test_peaks(kind, peak):
  assert throughput.peak_tflops(kind) == peak


def device(kind, peak_bytes=None, process=0):
  stats = None if peak_bytes is None else {"peak_bytes_in_use": peak_bytes}
  return types.SimpleNamespace(device_kind=kind, memory_stats=lambda: stats, process_index=process)


def test_metrics_by_hand():
  seconds = {"score_s": 1.0, "update_s": 3.0, "rollout_s": 100.0}
  v5e = "TPU v5 lite"
  devices = [device(v5e, 2**30), device(v5e, 3 * 2**30), device(v5e, 9 * 2**30, process=1)]
  found = throughput.metrics(197e12 * 6, 800, seconds, devices, is_bfloat16=True)
  assert found == pytest.approx({
      "learn/tokens_per_s": 200, "learn/tflops_per_s": 98.5, "learn/mfu": 0.5, "memory/peak_gib": 3.0})
  assert set(throughput.metrics(1e9, 8, seconds, [device("cpu")], is_bfloat16=True)) == {
      "learn/tokens_per_s", "learn/tflops_per_s"}
  assert "learn/mfu" not in throughput.metrics(1e9, 8, seconds, devices, is_bfloat16=False)
