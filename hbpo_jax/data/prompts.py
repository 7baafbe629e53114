"""From problem texts to the sampler's token arrays: chat template, `<think>` exactly once, budget sentence."""

from collections.abc import Sequence
import pathlib
import re
from typing import Any

import jinja2
import numpy as np
import transformers

from hbpo_jax.config import Config
from hbpo_jax.files import parse_json
from hbpo_jax.structs import Prompts

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
NATURAL, EFFICIENCY = "natural", "efficiency"
SAY = "say:"  # opens a mode that is any text

# What a template's own expressions raise: it is a small program that came with the checkpoint.
_TEMPLATE_FAULTS = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)
# Some templates ask for the date (Llama 3.2), and a run must have the same prompts whenever it is started again. This
# is the day that those of Llama 3 take where they know no other.
_FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
_EMPTY_THOUGHT = re.compile(rf"{THINK_OPEN}\s*{THINK_CLOSE}\s*\Z")


class PromptBuilder:
  """Builds prompts and forced openings for one tokenizer, and reads responses back.

  eos_ids: sorted ids that end a response, of the tokenizer and of the checkpoint's generation_config.json.
  thinking_opened: always True: a prompt ends inside `<think>`, so a response without `</think>` is unfinished.
  """

  thinking_opened = True

  def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, cfg: Config, checkpoint_dir: str = ""):
    """Checks the tokenizer.

    Args:
      tokenizer: of the model that is trained.
      cfg: for `prompt` and `model.path`.
      checkpoint_dir: where generation_config.json is looked for; empty means cfg.model.path where that is a directory.
    Raises:
      ValueError: when the tokenizer has no chat template or no EOS, or the budget sentence has no place for a budget.
    """
    name = tokenizer.name_or_path or cfg.model.path
    if not tokenizer.chat_template:
      raise ValueError(
          f"The tokenizer of model.path={name!r} has no chat template; use an instruction-tuned checkpoint, or set"
          " `chat_template` in its tokenizer_config.json.")
    if tokenizer.eos_token_id is None:
      raise ValueError(
          f"The tokenizer of model.path={name!r} has no end-of-sequence token; set `eos_token` in its"
          " tokenizer_config.json.")
    if cfg.prompt.budget_sentence and "{budget}" not in cfg.prompt.budget_sentence:
      raise ValueError(
          f"prompt.budget_sentence={cfg.prompt.budget_sentence!r} does not say where the budget goes; put {{budget}} in"
          " it, or force none with ''.")
    self.eos_ids = eos_ids(tokenizer, checkpoint_dir or cfg.model.path)
    self._own_eos = _int(tokenizer.eos_token_id)
    self._tokenizer = tokenizer
    template = tokenizer.get_chat_template()
    self._template = _FIXED_DATE + template if "strftime_now" in template else template
    self._cfg = cfg.prompt

  def render(self, problem: str) -> str:
    """The prompt's text, ending inside one opened `<think>`.

    Templates differ in what they put behind the assistant's header: nothing, an opened `<think>`, or a closed empty
    thought (thinking turned off); all three come out the same.

    Raises:
      ValueError: when the template fails, drops the problem, or puts words of its own into the thought.
    """
    content = f"{problem.strip()} {self._cfg.instruction}".strip()
    messages = [{"role": "system", "content": self._cfg.system}] if self._cfg.system else []
    messages.append({"role": "user", "content": content})
    try:
      # Templates without the switch ignore enable_thinking.
      text = str(self._tokenizer.apply_chat_template(
          messages, chat_template=self._template, tokenize=False, add_generation_prompt=True, enable_thinking=True))
    except (jinja2.TemplateError, *_TEMPLATE_FAULTS) as error:
      remedy = "set prompt.system='' if it takes no system message" if self._cfg.system else "mend the template"
      raise ValueError(f"The chat template refuses the prompt ({error}); {remedy}.") from error
    start = text.rfind(content)
    if start < 0:
      raise ValueError(f"The chat template does not keep the problem {content[:80]!r} as it is; mend the template.")
    head, tail = text[:start + len(content)], text[start + len(content):]
    tail = _EMPTY_THOUGHT.sub("", tail)
    match tail.count(THINK_OPEN), tail.count(THINK_CLOSE):
      case 0, 0:
        tail += THINK_OPEN + "\n"
      case 1, 0:
        pass
      case _:
        raise ValueError(
            f"The chat template ends with {tail[-80:]!r}; it must open {THINK_OPEN} at most once, with nothing in it.")
    return head + tail

  def encode(self, problem: str) -> list[int]:
    """Token ids of the prompt of one problem; no token is added to what the template writes (no second BOS)."""
    return self._encode_plain(self.render(problem))

  def prefix(self, what: str | int | Sequence[str | int]) -> tuple[np.ndarray, np.ndarray]:
    """The forced opening that follows `<think>`, one row per subgroup.

    Args:
      what: one mode or several, a subgroup each: 'natural' (nothing), 'efficiency', a budget as a number or a string
        of digits, or 'say:TEXT' for any other opening.
    Returns:
      (prefix_GF int32 [G, F] right-padded with 0, n_prefix_G int32 [G]); F is 0 for 'natural' alone.
    Raises:
      ValueError: when a mode does not exist, or there is none.
    """
    return _padded([self._opening(mode) for mode in ([what] if isinstance(what, str | int) else what)])

  def training_prefix(self, budgets: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """As `prefix` of the budgets, but with the texts of prompt.openings, where these are given.

    Raises:
      ValueError: when there is no budget.
    """
    if not self._cfg.openings:
      return self.prefix(budgets)
    return _padded([self._encode_plain(self._cfg.opening(g, b)) for g, b in enumerate(budgets)])

  def which_think(self, responses: Sequence[str], shape: tuple[int, ...], budgets: Sequence[int]) -> np.ndarray:
    """Which responses think, bool `shape`: something but the forced opening stands before the first `</think>`.

    Args:
      responses: texts in (query, budget, rollout) order, forced openings included.
      shape: (B, G, J).
      budgets: G of them.
    """
    openings = [self._cfg.opening(g, b).partition(THINK_CLOSE)[0].strip() for g, b in enumerate(budgets)]
    inside = [text.partition(THINK_CLOSE)[0].strip() for text in responses]
    subgroup = np.broadcast_to(np.arange(shape[1])[:, None], shape).reshape(-1)
    return np.array([text not in ("", openings[g]) for text, g in zip(inside, subgroup, strict=True)]).reshape(shape)

  def _opening(self, mode: str | int) -> list[int]:
    if mode == NATURAL:
      return []
    if mode == EFFICIENCY:
      return self._encode_plain(self._cfg.efficiency_sentence)
    if isinstance(mode, str) and mode.startswith(SAY):
      return self._encode_plain(mode.removeprefix(SAY))
    if isinstance(mode, str) and not mode.isdecimal():
      raise ValueError(
          f"eval.mode={mode!r} does not exist; choose natural, efficiency, a budget such as 512, or say:TEXT.")
    return self.budget_tokens(int(mode))

  def budget_tokens(self, budget: int) -> list[int]:
    """Token ids of the budget sentence of one budget."""
    return self._encode_plain(self._cfg.budget_sentence.replace("{budget}", str(budget)))

  def encode_response(self, text: str) -> list[int]:
    """Token ids of a worked response (for supervised training), the tokenizer's EOS at the end."""
    return [*self._encode_plain(text), self._own_eos]

  def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
    """Text of one response without its end-of-sequence token; other special tokens stay, grading reads some of them.

    Args:
      tokens: real tokens of one response, int [n], padding cut off.
    """
    ids = [int(t) for t in tokens]
    while ids and ids[-1] in self.eos_ids:
      ids.pop()
    return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

  def n_thinking(self, tokens: Sequence[int] | np.ndarray) -> int:
    """Tokens of a response up to and including its first `</think>`; all of them where it is never closed.

    Args:
      tokens: real tokens of one response, int [n], padding cut off.
    """
    if THINK_CLOSE not in self.decode(tokens):
      return len(tokens)
    # The tag may be one token or several, and its last one may bring more text; the first prefix that holds it is
    # found by halving, for a longer prefix holds it, too.
    low, high = 0, len(tokens)
    while high - low > 1:
      middle = (low + high) // 2
      low, high = (low, middle) if THINK_CLOSE in self.decode(tokens[:middle]) else (middle, high)
    return high

  def batch(
      self, problem_tokens: Sequence[Sequence[int]], prefix: tuple[np.ndarray, np.ndarray], max_prompt_tokens: int, *,
      first_query: int = 0,
  ) -> Prompts:
    """The sampler's input for some prompts.

    Args:
      problem_tokens: B prompts as `encode` returns them.
      prefix: as `prefix` returns it.
      max_prompt_tokens: P.
      first_query: position of the first prompt in the global batch (processes hold consecutive parts of it).
    Returns:
      Prompts of NumPy arrays, tokens left-padded to P, query_B = first_query + 0..B-1.
    Raises:
      ValueError: when a prompt is empty or longer than P.
    """
    n_prompt_B = np.array([len(t) for t in problem_tokens], np.int32)
    tokens_BP = np.zeros((len(problem_tokens), max_prompt_tokens), np.int32)
    for row, tokens in zip(tokens_BP, problem_tokens, strict=True):
      if not 0 < len(tokens) <= max_prompt_tokens:
        raise ValueError(
            f"A prompt has {len(tokens)} tokens, data.max_prompt_tokens={max_prompt_tokens}; raise it or drop the"
            " problem.")
      row[max_prompt_tokens - len(tokens):] = tokens
    query_B = np.arange(first_query, first_query + len(problem_tokens), dtype=np.int32)
    return Prompts(tokens_BP, n_prompt_B, *prefix, query_B)

  def _encode_plain(self, text: str) -> list[int]:
    return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
  if not rows:
    raise ValueError("rollout.budgets=() is empty; give at least one budget.")
  n_prefix_G = np.array([len(r) for r in rows], np.int32)
  prefix_GF = np.zeros((len(rows), n_prefix_G.max()), np.int32)
  for g, row in enumerate(rows):
    prefix_GF[g, :len(row)] = row
  return prefix_GF, n_prefix_G


def eos_ids(tokenizer: transformers.PreTrainedTokenizerBase, checkpoint_dir: str = "") -> tuple[int, ...]:
  """Sorted ids that end a response: the tokenizer's EOS and those of DIR/generation_config.json, if there is one.

  Chat checkpoints often end a turn with another token than the tokenizer's EOS, and say so only in that file.

  Raises:
    ValueError: when the file cannot be read, or its eos_token_id is not an integer or a list of integers.
  """
  ids = {_int(tokenizer.eos_token_id)}
  path = pathlib.Path(checkpoint_dir, "generation_config.json")
  if checkpoint_dir and path.is_file():
    try:
      content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
      raise ValueError(f"{path} cannot be read ({error}); copy it from the checkpoint again, or remove it.") from error
    if not isinstance(content, dict):
      raise ValueError(f"{path} holds a {type(content).__name__}; copy it from the checkpoint again, or remove it.")
    listed = content.get("eos_token_id")  # The file need not name one.
    listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if not all(type(i) is int for i in listed):
      raise ValueError(f"{path}: eos_token_id={listed!r} must be an integer or a list of integers; correct the file.")
    ids |= set(listed)
  return tuple(sorted(ids))


def _int(token_id: Any) -> int:
  return int(token_id)
