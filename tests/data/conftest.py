"""Tokenizers with chat templates of several kinds, and small configurations, for the tests of the data room."""

import dataclasses

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
import transformers

from hbpo_jax.config import Config
from hbpo_jax.data import synthetic

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

TEMPLATES = {
    "chatml": CHATML,
    # Writes BOS itself, trims the messages, knows no <think>.
    "llama": (
        "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|tail|>\n\n' + m['content'] | trim }}"
        "{{ '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\n\n' }}{% endif %}"),
    # Opens the thought itself.
    "r1": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% else %}"
        "{{ '<|User|>' + m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"),
    # Adds a closed empty thought unless thinking is on.
    "qwen3": CHATML.replace(
        "assistant\n' }}{% endif %}",
        "assistant\n' }}{% if not enable_thinking is defined or not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
        "{% endif %}{% endif %}"),
    # Forbids thinking in words unless it is on.
    "thinking_switch": (
        "{% if not enable_thinking is defined or not enable_thinking %}{{ 'Answer at once.' }}{% endif %}" + CHATML),
    # Adds it always.
    "never_thinks": CHATML.replace("assistant\n' }}", "assistant\n<think>\n\n</think>\n\n' }}"),
    "opens_without_newline": CHATML.replace("assistant\n' }}", "assistant\n<think>' }}"),
    "own_words": CHATML.replace("assistant\n' }}", "assistant\n<think>Hm</think>' }}"),
    "opens_twice": CHATML.replace("assistant\n' }}", "assistant\n<think><think>' }}"),
    "drops_problem": "{{ 'hello' }}",
    "no_system": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + CHATML),
}
SPECIAL = [
    "<s>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|User|>", "<|Assistant|>", "<|head|>", "<|tail|>", "<|eot|>"]


@pytest.fixture(scope="session")
def make_bpe():
  """make_bpe(template, **kwargs): a small byte-level BPE tokenizer that adds BOS by default, as Llama's does."""
  corpus = [
      "I will answer the question within 512 tokens.", "What is 1 + 1? Let's think step by step.", "\\boxed{42}"] * 8
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
      vocab_size=320, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
  backend.train_from_iterator(corpus, trainer)
  backend.add_tokens([tokenizers.AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
  backend.post_processor = processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
  text = backend.to_str()

  def make(template: str | None = "chatml", **kwargs):
    kwargs = {"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": "<|end|>"} | kwargs
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(text), **kwargs)
    made.chat_template = TEMPLATES[template] if template else None
    return made

  return make


def replace(cfg, **by_section):
  """replace(cfg, seed=1, rollout={"queries": 8}): a Config with fields, or fields of sections, replaced."""
  return dataclasses.replace(cfg, **{
      k: dataclasses.replace(getattr(cfg, k), **v) if isinstance(v, dict) else v for k, v in by_section.items()})


@pytest.fixture(scope="session")
def change():
  return replace


@pytest.fixture(scope="session")
def tiny_cfg():
  """The synthetic task at L_max 64 with four small budgets."""
  return replace(
      Config(),
      rollout={"queries": 8, "budgets": (8, 16, 32, 40)},
      prompt={"instruction": "", "budget_sentence": "within {budget}", "efficiency_sentence": "minimal"},
      data={"max_prompt_tokens": 20},
      reward={"max_response_tokens": 64})


@pytest.fixture(scope="session")
def word_tokenizer(tiny_cfg):
  return synthetic.make_tokenizer(tiny_cfg.data.synthetic, tiny_cfg.rollout.budgets)
