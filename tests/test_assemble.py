"""Opening a checkpoint: its tokenizer is taken as it is, and the model that a run began with is found."""

import json

import pytest
import tokenizers

from hbpo_jax import assemble
from hbpo_jax.config import SyntheticConfig
from hbpo_jax.data import synthetic
from hbpo_jax.models import presets
from tests import checkpoints


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_a_word_level_tokenizer_keeps_its_ids(tmp_path, family):
  """Whatever the model type: a rebuilt tokenizer would give other ids, and nothing would say so."""
  synthetic.make_tokenizer(SyntheticConfig(), (8, 16)).save_pretrained(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
  tokenizer = assemble.load_tokenizer(tmp_path, presets.preset("tiny_qwen2"))
  text = "3 +4 *2 <think> within 16 +4 = 0 </think> \\boxed{0}"
  expected = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text, add_special_tokens=False).ids
  assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
  assert len(set(expected)) > 8


def test_a_byte_level_tokenizer_keeps_its_ids(tmp_path):
  checkpoints.make_tokenizer(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
  tokenizer = assemble.load_tokenizer(tmp_path, presets.preset("tiny_qwen2"))
  text = "What is 12 + 7?\n<think>\nIt's 19."
  expected = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text, add_special_tokens=False).ids
  assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected


def test_a_directory_without_tokenizer_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
    assemble.load_tokenizer(tmp_path, presets.preset("tiny_qwen2"))


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
  checkpoints.make_tokenizer(tmp_path, vocab_size=700, texts=[str(i) * 3 for i in range(1000)])
  with pytest.raises(ValueError, match="the embedding 512 rows"):
    assemble.load_tokenizer(tmp_path, presets.preset("tiny_qwen2"))


def test_the_base_of_a_run_that_was_moved_is_the_model_that_it_made(tmp_path):
  def make(path, made=True):
    if made:
      (tmp_path / "run" / "warmstart" / "export").mkdir(parents=True, exist_ok=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"config": {"model": {"path": path, "revision": "r"}}}))
    return assemble.base_of(tmp_path / "run")

  (tmp_path / "run").mkdir()
  assert make("/gone/warmstart/export", made=False) == ("/gone/warmstart/export", "r")
  assert make("/gone/warmstart/export") == (str(tmp_path / "run" / "warmstart" / "export"), "r")
  assert make("org/model") == ("org/model", "r")
  (tmp_path / "other" / "warmstart" / "export").mkdir(parents=True)
  assert make(str(tmp_path / "other" / "warmstart" / "export"))[0] == str(tmp_path / "other" / "warmstart" / "export")
