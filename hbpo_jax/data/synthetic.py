"""A synthetic arithmetic-reasoning task with graded difficulty, its worked responses and its tokenizer.

A problem of level K is a start value and K operations, "3 +4 *2", to be carried out from left to right modulo a
prime (default 7): 3 + 4 = 0, 0 * 2 = 0. A worked response states one operation and its result after the other, then
closes the thinking and boxes the last result:

    +4 = 0 *2 = 0 </think> \\boxed{0}

which is 3 K + 3 tokens with EOS, the least that shows all the work. The *verbose* responses of the supervised warm
start repeat finished steps word for word ("wait +4 = 0", "check +4 = 0") until a target length that has nothing to
do with K, so a model trained on them is long everywhere, and budget training has something to shorten.

Three choices keep the task learnable by a very small model: an operation is one token, and none occurs twice in a
problem, so one token says where in the problem one stands; and every operation is a bijection (no "*0"), so no step
can be skipped.
"""

from collections.abc import Sequence
import hashlib

import numpy as np
import tokenizers
from tokenizers import models as tokenizer_models
from tokenizers import pre_tokenizers
import transformers

from hbpo_jax.config import SyntheticConfig
from hbpo_jax.data.record import Problem

SPLITS = ("train", "eval")
PAD, EOS, USER, ASSISTANT, SYSTEM = "<pad>", "<eos>", "<user>", "<assistant>", "<system>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
RECHECK_WORDS = ("wait", "check")  # "check" is also the name of a mode (hbpo_jax.data.modes)
MODE_WORDS = ("guess", "skim", "work")
TOKENS_PER_STEP = 3  # operation, "=", result
TOKENS_PER_RECHECK = TOKENS_PER_STEP + 1
TOKENS_OF_ENDING = 3  # </think>, the boxed answer, EOS

# One message is a role token and its text; the generation prompt is the assistant's role token alone.
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}")


def problems(cfg: SyntheticConfig, seed: int, split: str, n: int) -> list[Problem]:
  """`n` problems of one split, levels uniform in cfg.min_level..cfg.max_level.

  A problem's text decides its split (a quarter of all texts are evaluation problems), so the splits are disjoint
  whatever their seeds and sizes. Problem i is the same for every n > i. Short levels have few texts (119 of level 1
  modulo 7), so texts repeat in large sets; ids do not.

  Args:
    cfg: levels and modulus.
    seed: decides the problems, together with `split`.
    split: 'train' or 'eval'.
    n: how many.
  Returns:
    Problems with `level` set; it decides the number of operations.
  Raises:
    ValueError: when the split is unknown or the settings are impossible.
  """
  check_settings(cfg)
  if split not in SPLITS:
    raise ValueError(f"split={split!r} of the synthetic task does not exist; choose one of {SPLITS}.")
  rng = np.random.default_rng([seed, SPLITS.index(split)])
  pool = operations(cfg.modulus)
  made = []
  while len(made) < n:
    level = int(rng.integers(cfg.min_level, cfg.max_level + 1))
    text = _draw_text(rng, n_operations(cfg, level), cfg.modulus, pool, split)
    answer = str(steps(text, cfg.modulus)[-1][2])
    made.append(Problem(f"synthetic/{split}/{len(made)}", text, answer, "synthetic", level))
  return made


def n_operations(cfg: SyntheticConfig, level: int) -> int:
  """Operations of the problems of a level: cfg.operations, or where that is empty, as many as its number."""
  return cfg.operations[level - 1] if cfg.operations else level


def trace(cfg: SyntheticConfig, problem: Problem, rng: np.random.Generator, target_tokens: int) -> str:
  """A worked response of about `target_tokens` tokens, EOS counted but not written.

  Re-checks are spread over the steps at random, each right after the step that it repeats; their number is the one
  that brings the length nearest to the target, and none if the target is below the minimum of `minimal_tokens`.

  Args:
    cfg: for the modulus.
    problem: a synthetic problem.
    rng: decides where the re-checks stand and which word opens them.
    target_tokens: wanted length in tokens of the synthetic tokenizer.
  Returns:
    The text that follows the opening `<think>`: steps, `</think>`, boxed answer.
  """
  worked = steps(problem.problem, cfg.modulus)
  spare = target_tokens - minimal_tokens(len(worked))
  n_rechecks = max(0, round(spare / TOKENS_PER_RECHECK))
  rechecks_per_step = rng.multinomial(n_rechecks, [1 / len(worked)] * len(worked))
  words = []
  for (operator, operand, result), n in zip(worked, rechecks_per_step, strict=True):
    statement = f"{operator}{operand} = {result}"
    words.append(statement)
    words += [f"{RECHECK_WORDS[rng.integers(len(RECHECK_WORDS))]} {statement}" for _ in range(n)]
  return " ".join([*words, THINK_CLOSE, f"\\boxed{{{worked[-1][2]}}}"])


def verbose_range(max_response_tokens: int) -> tuple[int, int]:
  """The range (both ends included) from which the warm start draws target lengths: 60 to 80 % of the maximum."""
  return int(0.6 * max_response_tokens), int(0.8 * max_response_tokens)


def minimal_tokens(level: int) -> int:
  """Tokens of the shortest response that shows all steps, EOS included: 3 K + 3."""
  return TOKENS_PER_STEP * level + TOKENS_OF_ENDING


def count_tokens(text: str) -> int:
  """Tokens of a response text in the synthetic tokenizer, EOS included."""
  return len(text.split()) + 1


def operations(modulus: int) -> list[tuple[str, int]]:
  """All operations that change a value without losing it: + a, - a (a > 0) and * a (a > 1)."""
  return ([("+", a) for a in range(1, modulus)] + [("-", a) for a in range(1, modulus)]
          + [("*", a) for a in range(2, modulus)])


def steps(text: str, modulus: int) -> list[tuple[str, int, int]]:
  """(operator, operand, result) of every operation of a problem, from left to right.

  Raises:
    ValueError: when the text is not a synthetic problem.
  """
  words = text.split()
  if len(words) < 2 or not words[0].isdecimal() or not all(w[1:].isdecimal() for w in words[1:]):
    raise ValueError(f"problem={text!r} is not of the synthetic task; give a start value and operations, '3 +4 *2'.")
  value = int(words[0])
  worked = []
  for word in words[1:]:
    operator, operand = word[0], int(word[1:])
    match operator:
      case "+":
        value += operand
      case "-":
        value -= operand
      case "*":
        value *= operand
      case _:
        raise ValueError(f"problem={text!r} holds the operator {operator!r}; the synthetic task knows + - *.")
    value %= modulus
    worked.append((operator, operand, value))
  return worked


def make_tokenizer(
    cfg: SyntheticConfig, budgets: Sequence[int], sentences: Sequence[str] = ("within {budget}", "minimal"),
) -> transformers.PreTrainedTokenizerFast:
  """A word-level tokenizer with a chat template for the synthetic task.

  Texts are split at white space only. Digits, operations, boxed answers, budgets and every word of `sentences` are one
  token each; another word is an error, not an unknown token. Decoding puts one blank between tokens. The template
  does not open `<think>`; `hbpo_jax.data.prompts` does.

  Args:
    cfg: for the modulus.
    budgets: numbers that must be one token each.
    sentences: texts that prompts are made of (instruction, system message, prefixes); `{budget}` stands for a budget.
  Returns:
    A tokenizer with distinct pad and EOS tokens that `save_pretrained` writes in full.
  """
  check_settings(cfg)
  words = [PAD, EOS, SYSTEM, USER, ASSISTANT, THINK_OPEN, THINK_CLOSE]
  words += [str(d) for d in range(cfg.modulus)] + ["=", *RECHECK_WORDS, *(MODE_WORDS if cfg.traces == "modes" else ())]
  words += [f"{operator}{operand}" for operator, operand in operations(cfg.modulus)]
  words += [f"\\boxed{{{d}}}" for d in range(cfg.modulus)] + [str(b) for b in budgets]
  for sentence in sentences:
    for budget in budgets or ("",):
      words += sentence.replace("{budget}", str(budget)).split()
  vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
  backend = tokenizers.Tokenizer(tokenizer_models.WordLevel(vocab))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  # Not 'special': decoding must keep these two, because grading reads them.
  backend.add_tokens([tokenizers.AddedToken(t, special=False, normalized=False) for t in (THINK_OPEN, THINK_CLOSE)])
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, pad_token=PAD, eos_token=EOS,
      chat_template=_CHAT_TEMPLATE, clean_up_tokenization_spaces=False)


def check_settings(cfg: SyntheticConfig) -> None:
  """Raises ValueError when the task cannot be made: modulus not a prime above 2, or levels out of range."""
  m = cfg.modulus
  if m < 3 or any(m % d == 0 for d in range(2, int(m**0.5) + 1)):
    raise ValueError(f"data.synthetic.modulus={m} must be a prime above 2, such as 7.")
  most = len(operations(m))
  if any(not 1 <= k <= most for k in cfg.operations):
    raise ValueError(
        f"data.synthetic.operations={cfg.operations} must lie in 1..{most} (the number of distinct operations modulo "
        f"{m}).")
  levels = len(cfg.operations) or most
  if not 1 <= cfg.min_level <= cfg.max_level <= levels:
    meaning = "entries of data.synthetic.operations" if cfg.operations else f"number of distinct operations modulo {m}"
    raise ValueError(
        f"data.synthetic.min_level={cfg.min_level}, max_level={cfg.max_level} must satisfy 1 <= min_level <= max_level"
        f" <= {levels} (the {meaning}).")


def _draw_text(rng: np.random.Generator, level: int, modulus: int, pool: list[tuple[str, int]], split: str) -> str:
  while True:
    picked = rng.choice(len(pool), size=level, replace=False)
    text = " ".join([str(rng.integers(modulus)), *(f"{pool[i][0]}{pool[i][1]}" for i in picked)])
    is_eval = hashlib.sha256(text.encode()).digest()[0] < 64
    if is_eval == (split == "eval"):
      return text
