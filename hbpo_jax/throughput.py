"""How fast a step learns: tokens and model FLOPs per second, and the devices' memory at its highest."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from hbpo_jax.models.architecture import Architecture
from hbpo_jax.planning import chips, counts

GIB = 2**30

# Peak of dense bfloat16 matmuls, 10^12 FLOP/s, by a part of JAX's name of the device; the first that fits counts. GPUs:
# NVIDIA's data sheets, without sparsity. TPUs: `planning.chips`, per device.
_TPU = (("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6", "v6e"), ("TPU7x", "tpu7x"))
PEAK_TFLOPS = (
    *((part, chips.CHIPS[name].tflops / chips.CHIPS[name].devices) for part, name in _TPU),
    ("H100 PCIe", 756.0), ("H100", 989.0), ("H200", 989.0), ("B200", 2250.0), ("A100", 312.0), ("L4", 121.0),
)


def peak_tflops(device_kind: str) -> float | None:
  """Peak bfloat16 of one device, 10^12 FLOP/s; None where it is not known, as for CPUs."""
  return next((peak for part, peak in PEAK_TFLOPS if part in device_kind), None)


def learning_flops(
    arch: Architecture, n_prompt_B: Any, n_tokens_BGJ: Any, *, n_scorings: int) -> float:
  """Model FLOPs of a step's scoring and updates: real tokens only, each response with its prompt, nothing twice.

  A forward pass counts once, an update three times. Attention is causal: a token meets itself and those before it.

  Args:
    n_prompt_B: int [B], tokens of each prompt.
    n_tokens_BGJ: int [B, G, J], tokens of each response.
    n_scorings: forward passes besides the update's: 1 for pi_old if it has a pass of its own, 1 for a reference.
  """
  n_tokens_BGJ = np.asarray(n_tokens_BGJ, np.float64)
  length_BGJ = np.asarray(n_prompt_B, np.float64)[:, None, None] + n_tokens_BGJ
  pairs = (length_BGJ * (length_BGJ + 1) / 2).sum()
  forward = counts.layers_flops(arch, length_BGJ.sum(), pairs) + counts.head_flops(arch, n_tokens_BGJ.sum())
  return float(forward) * (3 + n_scorings)


def metrics(
    flops: float, n_tokens: int, seconds: Mapping[str, float], devices: list[Any], *, is_bfloat16: bool,
) -> dict[str, float]:
  """Numbers of a step by tag: `learn/tokens_per_s`, `learn/tflops_per_s` per device, `learn/mfu`, `memory/peak_gib`.

  `mfu`, the share of the peak, is there for bfloat16 on devices whose peak is known; memory, where devices report it,
  is the most of any of this process.

  Args:
    flops: of `learning_flops`.
    n_tokens: tokens of prompts and responses that were learnt from.
    seconds: by stage; score_s and update_s are read.
    devices: that learn, of all processes.
  """
  spent_s = max(seconds["score_s"] + seconds["update_s"], 1e-9)
  tflops = flops / spent_s / len(devices) / 1e12
  found = {"learn/tokens_per_s": n_tokens / spent_s, "learn/tflops_per_s": tflops}
  if is_bfloat16 and (peak := peak_tflops(devices[0].device_kind)):
    found["learn/mfu"] = tflops / peak
  reported = [device.memory_stats() or {} for device in devices if device.process_index == jax.process_index()]
  if peaks := [stats["peak_bytes_in_use"] for stats in reported if "peak_bytes_in_use" in stats]:
    found["memory/peak_gib"] = max(peaks) / GIB
  return found
