"""What a checkpoint's config.json says about the network, as one hashable value."""

import dataclasses
import math
import os
import pathlib
from typing import Any

from hbpo_jax.files import parse_json

FAMILIES = ("qwen2", "qwen3", "llama")
# Far above any model that there is: a larger number is a mistake, and tables as long as it would fill the memory.
_MOST_LAYERS, _MOST = 4096, 2**31 - 1
_SIZES = ("n_layers", "hidden_size", "mlp_size", "n_heads", "n_kv_heads", "head_size", "vocab_size", "max_context")
_CLASS_NAMES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
# What transformers assumes where a file of that family leaves the key out.
_HEAD_SIZE_IF_ABSENT = {"qwen2": None, "qwen3": 128, "llama": None}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched beyond the trained context.

  kind: 'linear' (all frequencies divided by `factor`) or 'llama3' (only the slow ones, by a ramp).
  low_freq_factor, high_freq_factor, original_context: the ramp of 'llama3'; 0 for 'linear'.
  """
  kind: str
  factor: float
  low_freq_factor: float = 0.0
  high_freq_factor: float = 0.0
  original_context: int = 0


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Shape and variant of one decoder; hashable, so that it can be a static argument of jit.

  hidden_size D, mlp_size F, n_heads H, n_kv_heads K, head_size E, vocab_size V (rows of the embedding, padding
  rows included), n_layers L. qkv_bias: biases on query, key and value. qk_norm: RMS norm of each query and key
  head. max_context: most tokens of prompt and response together.
  """
  family: str
  n_layers: int
  hidden_size: int
  mlp_size: int
  n_heads: int
  n_kv_heads: int
  head_size: int
  vocab_size: int
  rope_theta: float
  rope_scaling: RopeScaling | None
  rms_eps: float
  tie_embeddings: bool
  qkv_bias: bool
  qk_norm: bool
  max_context: int

  def __post_init__(self):
    if self.family not in FAMILIES:
      raise ValueError(f"model family {self.family!r} is not supported; use a checkpoint of one of {FAMILIES}.")
    for name in _SIZES:
      value = getattr(self, name)
      if type(value) is not int or value < 1:
        raise ValueError(f"architecture.{name}={value!r} must be a positive integer; correct the model's config.json.")
      if value > (most := _MOST_LAYERS if name == "n_layers" else _MOST):
        raise ValueError(f"architecture.{name}={value:.6g} is above {most}; correct the model's config.json.")
    for name in ("rope_theta", "rms_eps"):
      if not 0.0 < getattr(self, name) < math.inf:
        raise ValueError(
            f"architecture.{name}={getattr(self, name)!r} is not above 0; correct the model's config.json.")
    if self.n_heads % self.n_kv_heads:
      raise ValueError(
          f"architecture.n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}; "
          "correct the model's config.json.")
    if self.head_size % 2:
      raise ValueError(f"architecture.head_size={self.head_size} must be even (rotary positions); correct config.json.")

  @property
  def n_query_groups(self) -> int:
    """Query heads that share one key/value head, H / K."""
    return self.n_heads // self.n_kv_heads


def from_hf_config(source: str | os.PathLike | dict[str, Any]) -> Architecture:
  """The Architecture of a Hugging Face config.json.

  Args:
    source: a checkpoint directory, the path of a config.json, or its parsed content.
  Raises:
    FileNotFoundError: when there is no config.json.
    ValueError: when the file is not JSON or asks for something this decoder does not do.
  """
  if isinstance(source, dict):
    return _parse(source, "config.json")
  path = pathlib.Path(source)
  path = path / "config.json" if path.is_dir() else path
  if not path.is_file():
    raise FileNotFoundError(
        f"model.path: {path} does not exist; point model.path at a Hugging Face checkpoint directory.")
  return _parse(read_json(path), str(path))


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    ValueError: when the file is not a JSON object; names the file.
  """
  try:
    content = parse_json(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path} is not valid JSON ({error}); download or export the checkpoint again.") from error
  if not isinstance(content, dict):
    raise ValueError(
        f"{path} holds {type(content).__name__}, not a JSON object; download or export the checkpoint again.")
  return content


def to_hf_config(arch: Architecture, dtype: str) -> dict[str, Any]:
  """The content of a config.json that transformers reads as this Architecture; `dtype` is that of the weights."""
  config = {
      "architectures": [_CLASS_NAMES[arch.family]],
      "model_type": arch.family,
      "hidden_act": "silu",
      "hidden_size": arch.hidden_size,
      "intermediate_size": arch.mlp_size,
      "num_hidden_layers": arch.n_layers,
      "num_attention_heads": arch.n_heads,
      "num_key_value_heads": arch.n_kv_heads,
      "head_dim": arch.head_size,
      "vocab_size": arch.vocab_size,
      "max_position_embeddings": arch.max_context,
      "rms_norm_eps": arch.rms_eps,
      "rope_theta": arch.rope_theta,
      "tie_word_embeddings": arch.tie_embeddings,
      "attention_dropout": 0.0,
      "use_cache": True,
      "dtype": dtype,
      "torch_dtype": dtype,
  }
  if arch.family == "qwen2":
    config["use_sliding_window"] = False
  else:
    config["attention_bias"] = False
  scaling = arch.rope_scaling
  if scaling is not None:
    config["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
      config["rope_scaling"] |= {
          "low_freq_factor": scaling.low_freq_factor,
          "high_freq_factor": scaling.high_freq_factor,
          "original_max_position_embeddings": scaling.original_context,
      }
  return config


def _parse(config: dict[str, Any], where: str) -> Architecture:
  family = _required(config, "model_type", where)
  if family not in FAMILIES:
    raise ValueError(f"{where}: model_type={family!r} is not supported; use a checkpoint of one of {FAMILIES}.")
  _refuse_variants(config, where)
  n_heads = _integer(config, "num_attention_heads", where)
  hidden = _integer(config, "hidden_size", where)
  head_size = config["head_dim"] if config.get("head_dim") is not None else _HEAD_SIZE_IF_ABSENT[family]
  if head_size is None:
    if hidden % n_heads:
      raise ValueError(
          f"{where}: hidden_size={hidden} is not a multiple of num_attention_heads={n_heads}; set head_dim.")
    head_size = hidden // n_heads
  kv_heads = config.get("num_key_value_heads")
  theta, scaling = _rope(config, where)
  return Architecture(
      family=family,
      n_layers=_required(config, "num_hidden_layers", where),
      hidden_size=hidden,
      mlp_size=_required(config, "intermediate_size", where),
      n_heads=n_heads,
      n_kv_heads=n_heads if kv_heads is None else kv_heads,
      head_size=head_size,
      vocab_size=_required(config, "vocab_size", where),
      rope_theta=theta,
      rope_scaling=scaling,
      rms_eps=_number(config, "rms_norm_eps", where),
      # transformers leaves the key out of files in which it equals the default of all three families.
      tie_embeddings=_switch(config, "tie_word_embeddings", where),
      qkv_bias=family == "qwen2",
      qk_norm=family == "qwen3",
      max_context=_required(config, "max_position_embeddings", where),
  )


def _required(config: dict[str, Any], key: str, where: str) -> Any:
  if config.get(key) is None:
    raise ValueError(f"{where}: {key} is missing; download or export the checkpoint again.")
  return config[key]


def _integer(config: dict[str, Any], key: str, where: str) -> int:
  value = _required(config, key, where)
  if type(value) is not int or value < 1:
    raise ValueError(f"{where}: {key}={value!r} must be a positive integer; correct the file.")
  return value


def _number(config: dict[str, Any], key: str, where: str) -> float:
  value = _required(config, key, where)
  if type(value) not in (int, float) or not 0 < value < 1e30:
    raise ValueError(f"{where}: {key}={value!r} must be a number above 0; correct the file.")
  return float(value)


def _switch(config: dict[str, Any], key: str, where: str) -> bool:
  # The text "false" would count as true.
  if config.get(key) not in (None, True, False):
    raise ValueError(f"{where}: {key}={config[key]!r} must be true or false; correct the file.")
  return bool(config.get(key))


def _refuse_variants(config: dict[str, Any], where: str) -> None:
  """Raises for every option that would change the arithmetic and that the decoder does not implement."""

  def refuse(key: str, remedy: str):
    raise ValueError(f"{where}: {key}={config[key]!r} is not supported; {remedy}.")

  if not isinstance(config.get("layer_types") or [], list):
    refuse("layer_types", "use a checkpoint that lists the type of every layer")
  if config.get("hidden_act") not in (None, "silu"):
    refuse("hidden_act", "use a checkpoint with hidden_act 'silu'")
  if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
    key = "use_sliding_window" if config.get("use_sliding_window") else "layer_types"
    refuse(key, "use a checkpoint with full attention in every layer")
  if config.get("attention_bias") and config["model_type"] != "qwen2":
    refuse("attention_bias", "use a checkpoint without attention biases")
  if config.get("attention_bias") is False and config["model_type"] == "qwen2":
    refuse("attention_bias", "Qwen2 has biases on query, key and value")
  if config.get("mlp_bias"):
    refuse("mlp_bias", "use a checkpoint without MLP biases")
  if config.get("quantization_config"):
    refuse("quantization_config", "use the unquantised checkpoint")


def _rope(config: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
  """(theta, scaling), from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
  options = {}
  for key in ("rope_scaling", "rope_parameters"):
    if config.get(key) is not None:
      if not isinstance(config[key], dict) or any(isinstance(v, dict) for v in config[key].values()):
        raise ValueError(
            f"{where}: {key}={config[key]!r} is not supported; use one set of rotary options for all layers.")
      options |= config[key]
  theta = options.get("rope_theta", config.get("rope_theta"))
  if theta is None:
    raise ValueError(
        f"{where}: rope_theta is missing (also in rope_parameters); add the value the model was trained with.")
  theta = _number({"rope_theta": theta}, "rope_theta", where)
  partial = options.get("partial_rotary_factor", config.get("partial_rotary_factor"))
  if partial not in (None, 1, 1.0):
    raise ValueError(f"{where}: partial_rotary_factor={partial!r} is not supported; use a fully rotary checkpoint.")
  kind = options.get("rope_type", options.get("type", "default"))
  if kind == "default":
    return theta, None

  def read(key: str) -> float:
    return _number(options, key, f"{where}, rope scaling")

  if kind == "linear":
    return theta, RopeScaling("linear", read("factor"))
  if kind == "llama3":
    return theta, RopeScaling(
        "llama3", read("factor"), read("low_freq_factor"), read("high_freq_factor"),
        int(read("original_max_position_embeddings")))
  raise ValueError(
      f"{where}: rope scaling type {kind!r} is not supported; use a checkpoint with 'default', 'linear' or 'llama3'.")
