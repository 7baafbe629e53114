"""config.json of both transformers generations becomes the right Architecture, or one clear error."""

import dataclasses
import json

import pytest
import transformers

from hbpo_jax.models import architecture, presets
from hbpo_jax.models.architecture import RopeScaling

R1_DISTILL = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02, "intermediate_size": 8960,
    "max_position_embeddings": 131072, "max_window_layers": 21, "model_type": "qwen2",
    "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 10000, "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
}
LLAMA = {
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "head_dim": 64, "rms_norm_eps": 1e-05, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
    "vocab_size": 128256,
    "rope_theta": 500000.0, "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3"},
}


def test_published_configs_match_their_presets():
  presets.check_preset("r1_distill_qwen_1p5b", architecture.from_hf_config(R1_DISTILL))
  presets.check_preset("llama3p2_1b", architecture.from_hf_config(LLAMA))


def test_rope_of_both_transformers_generations():
  new = {k: v for k, v in LLAMA.items() if k not in ("rope_theta", "rope_scaling")}
  new["rope_parameters"] = LLAMA["rope_scaling"] | {"rope_theta": 500000.0}
  assert architecture.from_hf_config(new) == architecture.from_hf_config(LLAMA)
  old_linear = R1_DISTILL | {"rope_scaling": {"type": "linear", "factor": 2.0}}
  assert architecture.from_hf_config(old_linear).rope_scaling == RopeScaling("linear", 2.0)


def test_head_size_is_explicit_or_derived():
  assert architecture.from_hf_config(R1_DISTILL).head_size == 128
  assert architecture.from_hf_config(R1_DISTILL | {"head_dim": 64}).head_size == 64


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_written_config_is_read_back_by_us_and_by_transformers(name, tmp_path):
  arch = presets.preset(name)
  config = architecture.to_hf_config(arch, "bfloat16")
  assert architecture.from_hf_config(config) == arch
  (tmp_path / "config.json").write_text(json.dumps(config))
  theirs = transformers.AutoConfig.from_pretrained(tmp_path)
  theirs.save_pretrained(tmp_path)
  assert architecture.from_hf_config(tmp_path) == arch


@pytest.mark.parametrize("change, message", [
    ({"model_type": "mistral"}, "model_type='mistral'"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"use_sliding_window": True}, "use_sliding_window=True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"attention_bias": False}, "attention_bias=False"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic'"),
    ({"rope_theta": None}, "rope_theta is missing"),
    ({"vocab_size": None}, "vocab_size is missing"),
    ({"num_key_value_heads": 5}, "multiple of n_kv_heads=5"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
])
def test_unsupported_configs_are_refused_by_name(change, message):
  with pytest.raises(ValueError, match=message):
    architecture.from_hf_config(R1_DISTILL | change)


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_llama_biases_are_refused(key):
  with pytest.raises(ValueError, match=f"{key}=True"):
    architecture.from_hf_config(LLAMA | {key: True})


def test_missing_and_broken_config_files(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"model\.path.*config\.json"):
    architecture.from_hf_config(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
    architecture.from_hf_config(tmp_path)


def test_a_wrong_preset_names_the_differing_fields():
  arch = dataclasses.replace(presets.preset("qwen3_0p6b"), n_layers=27, rope_theta=1e4)
  with pytest.raises(ValueError, match=r"n_layers \(preset 28, checkpoint 27\), rope_theta"):
    presets.check_preset("qwen3_0p6b", arch)
  with pytest.raises(ValueError, match=r"model\.preset='nope'"):
    presets.preset("nope")
