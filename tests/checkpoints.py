"""Makes small Hugging Face checkpoint directories: random weights, and a real byte-level BPE tokenizer.

    python tests/checkpoints.py OUT --family qwen2

Tests import `make_checkpoint` and `make_tokenizer`; the same seed gives the same files.
"""

import argparse
from collections.abc import Iterable
import pathlib
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
import torch
import transformers

FAMILIES = ("qwen2", "qwen3", "llama")
END_OF_TEXT, OPEN, CLOSE = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

_TEXTS = (
    "What is 12 + 7? Let's think step by step and output the final answer within \\boxed{}.",
    "I will answer the question within 512 tokens. I will answer the question with minimal tokens.",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "How many clips did Natalia sell altogether in April and May? The answer is \\boxed{72}.",
    "Wait, let me check: 48 / 2 = 24, and 48 + 24 = 72. Alternatively, 48 * 3 / 2 = 72.",
    "Janet's ducks lay 16 eggs per day. She eats three for breakfast and bakes muffins with four.",
    "If x^2 - 5x + 6 = 0, then (x - 2)(x - 3) = 0, so x = 2 or x = 3; \\frac{1}{2} of 10 is 5.",
    "<think>\nFirst, compute 3 * 4 mod 7 = 5. Then 5 + 6 mod 7 = 4.\n</think>\nThe answer is \\boxed{4}.",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 32 64 96 128 256 512 1024 2048 2560 4096",
)
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}THINK{% endif %}")
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64}


def make_tokenizer(
    out_dir: str | pathlib.Path,
    *,
    texts: Iterable[str] = _TEXTS,
    vocab_size: int = 512,
    pad_is_eos: bool = False,
    opens_think: bool = False,
    chat_template: bool = True,
) -> transformers.PreTrainedTokenizerFast:
  """Trains a byte-level BPE tokenizer with a ChatML template, and saves it.

  Args:
    out_dir: directory to save into; made if absent.
    texts: training texts.
    vocab_size: most tokens, special ones included; the few texts may give fewer.
    pad_is_eos: use <|im_end|> for padding too.
    opens_think: the template's generation prompt ends with "<think>\\n".
    chat_template: False leaves the template out.
  """
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
      vocab_size=vocab_size, special_tokens=[END_OF_TEXT, OPEN, CLOSE], show_progress=False,
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
  tokenizer.train_from_iterator(list(texts), trainer)
  fast = transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizer, eos_token=CLOSE, pad_token=CLOSE if pad_is_eos else END_OF_TEXT,
      additional_special_tokens=[OPEN], clean_up_tokenization_spaces=False)
  if chat_template:
    fast.chat_template = _TEMPLATE.replace("THINK", "{{ '<think>\n' }}" if opens_think else "")
  fast.save_pretrained(str(out_dir))
  return fast


def make_checkpoint(
    out_dir: str | pathlib.Path,
    family: str = "qwen2",
    seed: int = 0,
    *,
    n_layers: int = 2,
    hidden: int = 64,
    mlp: int = 160,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_size: int = 16,
    vocab_size: int = 512,
    max_context: int = 1024,
    tie: bool = False,
    rope: dict[str, Any] | None = None,
    dtype: str = "float32",
    max_shard_size: str | int | None = None,
    weight_std: float = 0.08,
    tokenizer: bool = True,
    **tokenizer_options: Any,
) -> pathlib.Path:
  """Writes a checkpoint with random weights, config, generation config and tokenizer; returns its directory.

  Norm scales and biases are random too, so that a test notices one that is dropped.

  Args:
    family: qwen2, qwen3 or llama.
    vocab_size: rows of the embedding; the tokenizer may have fewer tokens, as in real checkpoints.
    rope: rope parameters in transformers 5 form; None means 'default' with theta 10000, for llama a llama3 scaling.
    dtype: of the saved weights.
    max_shard_size: as in save_pretrained; None means one file.
    tokenizer_options: of `make_tokenizer`.
  """
  out_dir = pathlib.Path(out_dir)
  if rope is None:
    rope = _LLAMA3_ROPE if family == "llama" else {"rope_type": "default", "rope_theta": 10000.0}
  config = transformers.AutoConfig.for_model(
      family, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=n_layers, num_attention_heads=n_heads,
      num_key_value_heads=n_kv_heads, head_dim=head_size, vocab_size=vocab_size, max_position_embeddings=max_context,
      rms_norm_eps=1e-6, rope_parameters=dict(rope), tie_word_embeddings=tie, bos_token_id=None, eos_token_id=2,
      pad_token_id=None)
  model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      noise = torch.randn(weight.shape, generator=generator)
      weight.copy_(1 + 0.2 * noise if "norm" in name else weight_std * noise)
  model = model.to(getattr(torch, dtype))
  options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
  model.save_pretrained(str(out_dir), **options)
  if tokenizer:
    make_tokenizer(out_dir, vocab_size=vocab_size, **tokenizer_options)
  return out_dir


def main() -> None:
  parser = argparse.ArgumentParser(description="Writes a small random Hugging Face checkpoint with a tokenizer.")
  parser.add_argument("out", type=pathlib.Path)
  parser.add_argument("--family", choices=FAMILIES, default="qwen2")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--layers", type=int, default=2)
  parser.add_argument("--hidden", type=int, default=64)
  parser.add_argument("--vocab", type=int, default=512)
  parser.add_argument("--opens-think", action="store_true")
  parser.add_argument("--tie", action="store_true")
  args = parser.parse_args()
  make_checkpoint(
      args.out, args.family, args.seed, n_layers=args.layers, hidden=args.hidden, mlp=5 * args.hidden // 2,
      vocab_size=args.vocab, tie=args.tie, opens_think=args.opens_think)
  print(args.out)


if __name__ == "__main__":
  main()
