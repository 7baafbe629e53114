"""Sorts words: problems, reward and settings of a task of your own, in one file.

Command:  python -m hbpo_jax.train --config=examples/sort_words.py --workdir=runs/sort_words
Time:     not measured; the lengths are those of qwen3_0p6b_gsm8k, which is sized for one accelerator of 16 GiB.
Expect:   no published figures. The before/after table goes by the number of words: see tokens fall most where few are
          to be sorted.
"""

import random
import re

from hbpo_jax import flags

WORDS = "amber birch cloud delta ember frost grove haven inlet jade knoll lemon maple north olive pearl quill"


def problems():
  draw = random.Random(0)  # The same problems in every process and at every start, or a run could not be resumed.
  for i in range(4000):
    words = draw.sample(WORDS.split(), 2 + i % 9)
    yield {"id": str(i), "problem": f"Sort these words from A to Z: {', '.join(words)}.",
           "answer": " ".join(sorted(words)), "source": "sort_words", "level": len(words)}


def score(responses, problems):
  """The share of words in their places, in the last line of what follows the thinking."""
  texts = [response.rpartition("</think>")[2].strip().rpartition("\n")[2] for response in responses]
  pairs = [(re.findall("[a-z]+", t.lower()), p["answer"].split()) for t, p in zip(texts, problems)]
  return [sum(a == b for a, b in zip(said, right)) / max(len(said), len(right)) for said, right in pairs]


def get_config():
  cfg = flags.load_config("qwen3_0p6b_gsm8k")
  cfg.data.source, cfg.data.eval_source, cfg.reward.grader = f"{__file__}:problems", "", f"{__file__}:score"
  cfg.prompt.instruction = "Think first. Then write the sorted words in one line."
  return cfg
