"""The model card: a header that the hub accepts, the facts of the run, code that compiles, and no private paths."""

import ast
import re

import huggingface_hub
import pytest
import yaml

from hbpo_jax import config
from hbpo_jax.reporting import model_card, tables

SUMMARY = {
    "measured_on": "evaluation", "tokens_change": -0.5, "accuracy_change": 0.05,
    "base": {"accuracy": 0.8, "mean_tokens": 2000.0, "n": 4, "by_level": [
        {"level": 1, "n": 4, "accuracy": 0.8, "tokens": 2000.0}]},
    "trained": {"accuracy": 0.85, "mean_tokens": 1000.0, "n": 4, "by_level": [
        {"level": 1, "n": 4, "accuracy": 0.85, "tokens": 1000.0}]}}
BASE = model_card.Base("org/base", "c" * 40, {"license": "mit"})


def settings(**changes):
  cd = config.new("hbpo")
  for name, value in changes.items():
    section, _, leaf = name.partition("__")
    cd[section][leaf] = value
  return config.to_json_dict(config.from_config_dict(cd))


def header(text, tmp_path):
  (tmp_path / "README.md").write_text(text)
  return huggingface_hub.metadata_load(tmp_path / "README.md")


def python_blocks(text):
  return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_header_names_the_base_and_its_licence(tmp_path):
  found = header(model_card.make(settings(), BASE, steps=629), tmp_path)
  assert found["library_name"] == "transformers" and found["pipeline_tag"] == "text-generation"
  assert found["base_model"] == "org/base" and found["base_model_relation"] == "finetune" and found["license"] == "mit"
  assert "arxiv:2507.15844" in found["tags"] and "hbpo" in found["tags"]
  unknown = header(model_card.make(settings(), model_card.Base(), steps=629), tmp_path)
  assert not unknown.keys() & {"base_model", "license", "base_model_relation"}
  adapter = header(model_card.make(settings(lora__rank=8), BASE, steps=1, adapter=True), tmp_path)
  assert adapter["library_name"] == "peft" and adapter["base_model_relation"] == "adapter"


def test_the_facts_of_the_run_are_there():
  text = model_card.make(
      settings(lora__rank=8), BASE, steps=629, name="me/mine", summary=SUMMARY, git={"commit": "abc", "dirty": True})
  assert "https://arxiv.org/abs/2507.15844" in text and text.count("# mine") == 1
  assert tables.before_after(SUMMARY["base"], SUMMARY["trained"]).to_markdown() in text
  assert "Tokens per response fell by 50.0 % (2,000 to 1,000)" in text
  for fact in ("| base | org/base at commit `" + "c" * 40, "| steps | 629, each 64 queries x 16 responses |",
               "| budgets | 512, 1024, 2048, 2560 tokens |", "| L_max | 4,096 tokens |", "| profile | `hbpo` |",
               "| LoRA | rank 8", "Code at commit `abc` with uncommitted changes",
               "I will answer the question within 512"):
    assert fact in text, fact


@pytest.mark.parametrize("adapter", [False, True])
def test_the_code_compiles_and_uses_the_name_and_the_prompt(adapter):
  awkward = "It's \"quoted\" within \\boxed{}."
  text = model_card.make(
      settings(prompt__instruction=awkward, prompt__system="Be brief."), BASE, steps=1, name="me/mine", adapter=adapter)
  blocks = python_blocks(text)
  assert len(blocks) == (1 if adapter else 2)
  literals = [n.value for n in ast.walk(ast.parse("\n".join(blocks))) if isinstance(n, ast.Constant)]
  for text_of_it in ("me/mine", f" {awkward}", "Be brief.", "<think>", "<think>\n"):
    assert text_of_it in literals
  assert "vllm" in text or adapter


def test_without_an_evaluation_it_says_so():
  training = SUMMARY | {"measured_on": "training"}
  for summary in (None, training):
    assert "This run was not evaluated." in model_card.make(settings(), BASE, steps=1, summary=summary)
  assert "The best step" in model_card.make(settings(), BASE, steps=1, note="The best step.")
  assert "warm start" in model_card.make(settings(), BASE, steps=1, stage="sft")


def test_paths_of_a_machine_stay_there():
  text = model_card.make(settings(data__source="/home/ann/secret/problems.jsonl", model__path="/home/ann/model"),
                         model_card.Base(), steps=1)
  assert "/home" not in text and "problems.jsonl" in text
  assert "| problems | tfds:gsm8k |" in model_card.make(settings(data__source="tfds:gsm8k"), BASE, steps=1)


def test_the_base_is_found_through_an_earlier_export(tmp_path):
  assert model_card.base_of(tmp_path) == model_card.Base()
  (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: x\nbase_model:\n- org/first\n---\ntext")
  assert model_card.base_of(tmp_path) == model_card.Base("org/first", "", {"license": "other", "license_name": "x"})
  (tmp_path / "README.md").write_text("---\nbase_model: /home/ann/model\n---\n")
  assert model_card.base_of(tmp_path).name == ""
  snapshot = tmp_path / "models--org--base" / "snapshots" / ("d" * 40)
  snapshot.mkdir(parents=True)
  (snapshot / "README.md").write_text("---\nlicense: mit\nbase_model: org/grandparent\n---\n")
  assert model_card.base_of(snapshot) == model_card.Base("org/base", "d" * 40, {"license": "mit"})


def test_a_damaged_header_is_named(tmp_path):
  (tmp_path / "README.md").write_text("---\na: [1\n---\n")
  with pytest.raises(ValueError, match=r"README\.md has a header that is not YAML.*mend it"):
    model_card.base_of(tmp_path)
  with pytest.raises(yaml.YAMLError):
    huggingface_hub.metadata_load(tmp_path / "README.md")


def test_a_name_is_put_in_once_it_is_known(tmp_path):
  model_card.update(tmp_path, model_card.make(settings(), BASE, steps=1))
  model_card.put_name(tmp_path, "me/mine")
  text = (tmp_path / "README.md").read_text()
  assert model_card.UNNAMED not in text and 'name = "me/mine"' in text
  (tmp_path / "README.md").write_text("my own words")
  model_card.put_name(tmp_path, "me/other")
  assert (tmp_path / "README.md").read_text() == "my own words"
  model_card.put_name(tmp_path / "nowhere", "me/other")
