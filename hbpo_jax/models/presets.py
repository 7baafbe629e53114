"""Architectures of public checkpoints, for plans and tests that have no checkpoint; and two tiny ones.

Values are those of each checkpoint's config.json on the Hugging Face hub.
"""

import dataclasses
from typing import Any

from hbpo_jax.models.architecture import Architecture, RopeScaling


def _qwen2(**fields: Any) -> Architecture:
  common: dict[str, Any] = dict(
      family="qwen2", rope_theta=1e6, rope_scaling=None, rms_eps=1e-6, qkv_bias=True, qk_norm=False)
  return Architecture(**(common | fields))


def _qwen3(**fields: Any) -> Architecture:
  common: dict[str, Any] = dict(
      family="qwen3", head_size=128, n_kv_heads=8, vocab_size=151936, rope_theta=1e6, rope_scaling=None, rms_eps=1e-6,
      tie_embeddings=True, qkv_bias=False, qk_norm=True, max_context=40960)
  return Architecture(**(common | fields))


def _llama(**fields: Any) -> Architecture:
  common: dict[str, Any] = dict(
      family="llama", n_kv_heads=8, vocab_size=128256, rope_theta=5e5,
      rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192), rms_eps=1e-5, tie_embeddings=True, qkv_bias=False,
      qk_norm=False, max_context=131072)
  return Architecture(**(common | fields))


_QWEN_1P5B: dict[str, Any] = dict(
    n_layers=28, hidden_size=1536, mlp_size=8960, n_heads=12, n_kv_heads=2, head_size=128, vocab_size=151936)
_TINY: dict[str, Any] = dict(
    n_layers=2, hidden_size=64, mlp_size=160, n_heads=4, n_kv_heads=2, vocab_size=512, max_context=1024)

PRESETS: dict[str, Architecture] = {
    # deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B: from Qwen2.5-Math, hence its rope_theta.
    "r1_distill_qwen_1p5b": _qwen2(**_QWEN_1P5B, rope_theta=1e4, tie_embeddings=False, max_context=131072),
    # agentica-org/DeepScaleR-1.5B-Preview, trained from the one above.
    "deepscaler_1p5b": _qwen2(**_QWEN_1P5B, rope_theta=1e4, tie_embeddings=False, max_context=131072),
    # Qwen/Qwen2.5-0.5B-Instruct
    "qwen2p5_0p5b": _qwen2(
        n_layers=24, hidden_size=896, mlp_size=4864, n_heads=14, n_kv_heads=2, head_size=64, vocab_size=151936,
        tie_embeddings=True, max_context=32768),
    # Qwen/Qwen2.5-1.5B-Instruct
    "qwen2p5_1p5b": _qwen2(**_QWEN_1P5B, tie_embeddings=True, max_context=32768),
    # Qwen/Qwen2.5-Math-1.5B-Instruct
    "qwen2p5_math_1p5b": _qwen2(**_QWEN_1P5B, rope_theta=1e4, tie_embeddings=True, max_context=4096),
    # Qwen/Qwen2.5-7B-Instruct
    "qwen2p5_7b": _qwen2(
        n_layers=28, hidden_size=3584, mlp_size=18944, n_heads=28, n_kv_heads=4, head_size=128, vocab_size=152064,
        tie_embeddings=False, max_context=32768),
    # Qwen/Qwen2.5-14B-Instruct
    "qwen2p5_14b": _qwen2(
        n_layers=48, hidden_size=5120, mlp_size=13824, n_heads=40, n_kv_heads=8, head_size=128, vocab_size=152064,
        tie_embeddings=False, max_context=32768),
    # Qwen/Qwen3-0.6B
    "qwen3_0p6b": _qwen3(n_layers=28, hidden_size=1024, mlp_size=3072, n_heads=16),
    # Qwen/Qwen3-1.7B
    "qwen3_1p7b": _qwen3(n_layers=28, hidden_size=2048, mlp_size=6144, n_heads=16),
    # Qwen/Qwen3-4B
    "qwen3_4b": _qwen3(n_layers=36, hidden_size=2560, mlp_size=9728, n_heads=32),
    # meta-llama/Llama-3.2-1B-Instruct
    "llama3p2_1b": _llama(n_layers=16, hidden_size=2048, mlp_size=8192, n_heads=32, head_size=64),
    # meta-llama/Llama-3.2-3B-Instruct
    "llama3p2_3b": _llama(n_layers=28, hidden_size=3072, mlp_size=8192, n_heads=24, head_size=128),
    "tiny_qwen2": _qwen2(**_TINY, head_size=16, tie_embeddings=False),
    "tiny_qwen3": _qwen3(**_TINY, head_size=32),
    "tiny_llama": _llama(**_TINY, head_size=16),
}

# The preset of a checkpoint by its name on the hub.
CHECKPOINTS = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": "r1_distill_qwen_1p5b",
    "agentica-org/DeepScaleR-1.5B-Preview": "deepscaler_1p5b",
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen2p5_0p5b",
    "Qwen/Qwen2.5-1.5B-Instruct": "qwen2p5_1p5b",
    "Qwen/Qwen2.5-Math-1.5B-Instruct": "qwen2p5_math_1p5b",
    "Qwen/Qwen2.5-7B-Instruct": "qwen2p5_7b",
    "Qwen/Qwen2.5-14B-Instruct": "qwen2p5_14b",
    "Qwen/Qwen3-0.6B": "qwen3_0p6b",
    "Qwen/Qwen3-1.7B": "qwen3_1p7b",
    "Qwen/Qwen3-4B": "qwen3_4b",
    "meta-llama/Llama-3.2-1B-Instruct": "llama3p2_1b",
    "meta-llama/Llama-3.2-3B-Instruct": "llama3p2_3b",
}


def preset(name: str) -> Architecture:
  """The architecture of that name.

  Raises:
    ValueError: when there is none.
  """
  if name not in PRESETS:
    raise ValueError(f"model.preset={name!r} does not exist; choose one of {sorted(PRESETS)}.")
  return PRESETS[name]


def check_preset(name: str, arch: Architecture) -> None:
  """Compares a preset with a checkpoint's architecture.

  Raises:
    ValueError: when they differ; names every differing field with both values.
  """
  expected = preset(name)
  differing = [
      f"{f.name} (preset {getattr(expected, f.name)!r}, checkpoint {getattr(arch, f.name)!r})"
      for f in dataclasses.fields(Architecture) if getattr(expected, f.name) != getattr(arch, f.name)]
  if differing:
    raise ValueError(
        f"model.preset={name!r} does not describe the checkpoint: {', '.join(differing)}; choose the checkpoint's "
        "preset, or set model.preset to ''.")
