"""The synthetic task: problems, worked responses, tokenizer."""

import collections

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import transformers

from hbpo_jax.config import SyntheticConfig
from hbpo_jax.data import synthetic

CFG = SyntheticConfig()


def value_of(text, modulus):
  """The answer by Python's own arithmetic: brackets from left to right, one modulo at the end."""
  words = text.split()
  expression = words[0]
  for operation in words[1:]:
    expression = f"({expression}) {operation}"
  return eval(expression) % modulus  # The text is our own.


@given(st.integers(0, 10**6), st.sampled_from(synthetic.SPLITS), st.sampled_from([3, 5, 7, 11]), st.data())
@settings(max_examples=30, deadline=None)
def test_answers_are_right_and_levels_in_range(seed, split, modulus, data):
  most = data.draw(st.integers(1, len(synthetic.operations(modulus))))
  least = data.draw(st.integers(1, most))
  cfg = SyntheticConfig(min_level=least, max_level=most, modulus=modulus)
  for p in synthetic.problems(cfg, seed, split, 20):
    assert p.answer == str(value_of(p.problem, modulus))
    assert p.level == p.problem.count(" ") and least <= p.level <= most
    operations = p.problem.split()[1:]
    assert len(set(operations)) == len(operations)


def test_by_hand():
  assert synthetic.steps("3 +4 *2 -5", 7) == [("+", 4, 0), ("*", 2, 0), ("-", 5, 2)]
  assert synthetic.steps("6 *6", 7) == [("*", 6, 1)]
  for bad in ("3", "3 +", "a +4", "3 /4", "", "3 +x", "3 + 4", "3 4"):
    with pytest.raises(ValueError, match=r"problem="):
      synthetic.steps(bad, 7)


def test_every_operation_is_a_bijection():
  for operator, operand in synthetic.operations(7):
    results = {synthetic.steps(f"{v} {operator}{operand}", 7)[0][2] for v in range(7)}
    assert len(results) == 7
    assert any(synthetic.steps(f"{v} {operator}{operand}", 7)[0][2] != v for v in range(7))


def test_splits_are_disjoint_for_any_seed():
  train = {p.problem for s in range(3) for p in synthetic.problems(CFG, s, "train", 700)}
  held_out = {p.problem for s in range(3) for p in synthetic.problems(CFG, s, "eval", 700)}
  assert not train & held_out


def test_problems_are_a_function_of_seed_and_split():
  made = synthetic.problems(CFG, 5, "train", 60)
  assert synthetic.problems(CFG, 5, "train", 40) == made[:40]
  assert synthetic.problems(CFG, 6, "train", 40) != made[:40]
  assert len({p.id for p in made}) == 60


def test_levels_are_uniform():
  n_of_level = collections.Counter(p.level for p in synthetic.problems(CFG, 0, "train", 1600))
  assert set(n_of_level) == set(range(1, 9))
  assert all(150 < n < 250 for n in n_of_level.values())


@pytest.mark.parametrize("cfg, message", [
    (SyntheticConfig(modulus=6), "modulus=6 must be a prime"),
    (SyntheticConfig(modulus=2), "modulus=2 must be a prime"),
    (SyntheticConfig(min_level=0), "min_level=0"),
    (SyntheticConfig(min_level=5, max_level=4), "min_level=5, max_level=4"),
    (SyntheticConfig(max_level=18), "<= 17"),
])
def test_impossible_settings_are_refused(cfg, message):
  with pytest.raises(ValueError, match=message):
    synthetic.problems(cfg, 0, "train", 1)


def test_unknown_split_is_refused():
  with pytest.raises(ValueError, match=r"split='test' of the synthetic task"):
    synthetic.problems(CFG, 0, "test", 1)


def test_trace_by_hand():
  problem = synthetic.problems(SyntheticConfig(min_level=2, max_level=2), 0, "train", 1)[0]
  (op1, a1, r1), (op2, a2, r2) = synthetic.steps(problem.problem, 7)
  rng = np.random.default_rng(0)
  shortest = f"{op1}{a1} = {r1} {op2}{a2} = {r2} </think> \\boxed{{{r2}}}"
  assert synthetic.trace(CFG, problem, rng, 0) == shortest
  assert synthetic.count_tokens(shortest) == 9 == synthetic.minimal_tokens(2)
  assert synthetic.trace(CFG, problem, rng, 10) == shortest  # A re-check would overshoot by more than this falls short.
  assert synthetic.count_tokens(synthetic.trace(CFG, problem, rng, 12)) == 13  # 9 would fall short by more.


def test_traces_repeat_steps_word_for_word_and_end_in_the_answer():
  rng = np.random.default_rng(1)
  for problem in synthetic.problems(CFG, 1, "train", 100):
    text = synthetic.trace(CFG, problem, rng, 45)
    thought, _, ending = text.partition(" </think> ")
    assert ending == f"\\boxed{{{problem.answer}}}"
    stated = [f"{o}{a} = {r}" for o, a, r in synthetic.steps(problem.problem, 7)]
    seen = []
    words = thought.split()
    while words:
      if words[0] in synthetic.RECHECK_WORDS:
        assert " ".join(words[1:4]) == seen[-1]
        words = words[4:]
      else:
        seen.append(" ".join(words[:3]))
        words = words[3:]
    assert seen == stated


def test_trace_length_is_the_target_and_does_not_depend_on_the_level():
  rng = np.random.default_rng(2)
  low, high = synthetic.verbose_range(64)
  assert (low, high) == (38, 51)
  lengths = collections.defaultdict(list)
  for problem in synthetic.problems(CFG, 2, "train", 1600):
    target = int(rng.integers(low, high + 1))
    n = synthetic.count_tokens(synthetic.trace(CFG, problem, rng, target))
    assert abs(n - target) <= 2
    lengths[problem.level].append(n)
  means = [np.mean(v) for v in lengths.values()]
  assert min(means) > 43 and max(means) < 46
  assert synthetic.minimal_tokens(1) == 6 and synthetic.minimal_tokens(8) == 27


def test_tokenizer_reads_and_writes_its_texts(word_tokenizer, tiny_cfg, tmp_path):
  tokenizer = word_tokenizer
  assert len(tokenizer) < 64
  assert tokenizer.pad_token_id != tokenizer.eos_token_id
  word_tokenizer.save_pretrained(tmp_path)
  again = transformers.AutoTokenizer.from_pretrained(tmp_path)
  rng = np.random.default_rng(3)
  for problem in synthetic.problems(CFG, 3, "train", 30):
    text = synthetic.trace(CFG, problem, rng, 45)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) + 1 == synthetic.count_tokens(text)
    assert tokenizer.decode(ids) == text
    assert again(text, add_special_tokens=False)["input_ids"] == ids
    assert again.decode(ids) == text
    assert "</think>" in again.decode(ids, skip_special_tokens=True)
  prompt = [{"role": "user", "content": "3 +4"}]
  rendered = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
  assert rendered == "<user> 3 +4 <assistant> "
  assert again.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) == rendered


def test_budgets_and_words_are_single_tokens(word_tokenizer):
  for budget in (8, 16, 32, 40):
    assert len(word_tokenizer(f"within {budget}", add_special_tokens=False)["input_ids"]) == 2
  assert len(word_tokenizer("minimal", add_special_tokens=False)["input_ids"]) == 1
  other = synthetic.make_tokenizer(CFG, (3, 512), ("I will use {budget} tokens.", "Be brief."))
  assert other.decode(other("I will use 512 tokens. Be brief. 3")["input_ids"]) == "I will use 512 tokens. Be brief. 3"


def test_an_unknown_word_is_an_error(word_tokenizer):
  with pytest.raises(Exception, match="Missing \\[UNK\\]"):
    word_tokenizer("hello")


def test_built_in_grading_reads_the_decoded_response(word_tokenizer):
  grading = pytest.importorskip("hbpo_jax.grading")
  if not hasattr(grading, "grade"):
    pytest.skip("needs hbpo_jax.grading.grade")
  problem = synthetic.problems(CFG, 4, "train", 1)[0]
  text = synthetic.trace(CFG, problem, np.random.default_rng(0), 45)
  response = word_tokenizer.decode(word_tokenizer(text, add_special_tokens=False)["input_ids"])
  wrong = str((int(problem.answer) + 1) % 7)
  verdicts = grading.grade([response, response, text.split(" </think>")[0]], [problem.answer, wrong, problem.answer],
                           thinking_opened=True)
  assert [v.correct for v in verdicts] == [True, False, False]
