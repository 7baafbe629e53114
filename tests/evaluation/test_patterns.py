"""Reflection words, the share of thinking, and stated budgets."""

import pytest

from hbpo_jax.evaluation import patterns

SENTENCE = "I will answer the question within {budget} tokens."
PATTERN = patterns.budget_pattern(SENTENCE)


def row(response, *, id="a", level=None, n_gen=10, n_think=5):
  return {"id": id, "level": level, "response": response, "n_gen": n_gen, "n_think": n_think}


def counts(**words):
  return tuple(words.get(word, 0) for word in patterns.REFLECTION_WORDS)


def test_words_are_whole_and_of_any_case():
  got = patterns.read("Wait, WAIT! await waiting; but butter, rebut. Check-in, checked, wait_for", None)
  assert got.inside == counts(wait=2, but=1, check=1) and got.outside == counts()


def test_every_word_of_the_method_is_counted():
  text = "wait alternatively but remember check verify"
  assert patterns.read(text, None).inside == (1,) * 6


def test_thinking_ends_at_the_first_close():
  got = patterns.read("but wait</think>check</think>verify", None)
  assert got == patterns.ResponsePatterns(True, counts(but=1, wait=1), counts(check=1, verify=1))


def test_thinking_that_never_ends_is_all_inside():
  got = patterns.read("but then \\boxed{1}, wait", None)
  assert got == patterns.ResponsePatterns(False, counts(but=1, wait=1), counts())


@pytest.mark.parametrize("response, budget", [
    ("I will answer the question within 512 tokens. So", 512),
    ("\n I will  answer the\nquestion within 1,024 tokens.", 1024),
    ("I will answer the question within 1,234,567 tokens.", 1234567),
    ("I will answer the question within 12,34 tokens.", None),
    ("I will answer the question within many tokens.", None),
    ("I will answer the question within -5 tokens.", None),
    ("I will answer the question within 512 tokensx", None),
    ("I will answer the question within512 tokens.", None),
    ("So I will answer the question within 512 tokens.", None),
    ("</think>I will answer the question within 512 tokens.", None),
    ("I will answer the question with minimal tokens.", None),
    # int() refuses this many digits; a model may write them.
    (f"I will answer the question within {'9' * 5000} tokens.", None),
    ("", None),
])
def test_budget_in_the_opening(response, budget):
  assert patterns.read(response, PATTERN).budget == budget


def test_budget_sentence_is_no_pattern_of_its_own():
  pattern = patterns.budget_pattern("(Budget: {budget}? [yes].*)")
  assert patterns.read("(Budget: 7? [yes].*) x", pattern).budget == 7
  assert patterns.read("(Budget: 7 [yes].*)", pattern).budget is None
  assert patterns.read("(Budget: 7? yyy)", pattern).budget is None


def test_budget_sentence_with_the_number_at_an_end_or_twice():
  assert patterns.read("42 tokens", patterns.budget_pattern("{budget} tokens")).budget == 42
  last = patterns.budget_pattern("Budget {budget}")
  assert patterns.read("Budget 42. So", last).budget == 42
  assert patterns.read("Budget " + "9" * 19, last).budget is None  # Not its first digits.
  twice = patterns.budget_pattern("{budget} of {budget} tokens")
  assert patterns.read("42 of 42 tokens", twice).budget == 42
  assert patterns.read("42 of 43 tokens", twice).budget is None


def test_budget_sentence_needs_a_place():
  with pytest.raises(ValueError, match="prompt.budget_sentence='within tokens' does not contain {budget}"):
    patterns.budget_pattern("within tokens")


def test_summary_by_hand():
  rows = [
      row("I will answer the question within 512 tokens. wait</think>but", id="a", level=1, n_gen=10, n_think=8),
      row("I will answer the question within 512 tokens. wait wait", id="a", level=1, n_gen=4, n_think=4),
      row("I will answer the question within 64 tokens.</think>", id="b", level=2, n_gen=10, n_think=2),
      row("check</think>", id="c", level=2, n_gen=10, n_think=1)]
  got = patterns.summarise(rows, PATTERN, [1, 2])
  assert got["think_share"] == pytest.approx((0.8 + 1 + 0.2 + 0.1) / 4)
  assert got["reflection_inside"] == {
      "wait": 0.75, "alternatively": 0, "but": 0, "remember": 0, "check": 0.25, "verify": 0}
  assert got["reflection_outside"]["but"] == 0.25 and got["reflection_outside"]["wait"] == 0
  assert got["reflection_inside_all"] == 1.0 and got["reflection_outside_all"] == 0.25
  assert got["states_budget"] == 0.75
  assert list(got["budgets_stated"].items()) == [("64", 0.25), ("512", 0.5)]
  assert got["by_level"] == [
      {"level": 1, "n": 1, "think_share": 0.9, "reflection_inside_all": 1.5, "states_budget": 1.0,
       "budget_mean": 512.0},
      {"level": 2, "n": 2, "think_share": pytest.approx(0.15), "reflection_inside_all": 0.5, "states_budget": 0.5,
       "budget_mean": 64.0}]


def test_forced_opening_says_nothing_about_the_model():
  got = patterns.summarise([row("I will answer the question within 512 tokens.", level=3)], None, [3])
  assert got["states_budget"] is None and got["budgets_stated"] == {}
  assert got["by_level"][0]["states_budget"] is None and got["by_level"][0]["budget_mean"] is None


def test_summary_of_nothing():
  got = patterns.summarise([], PATTERN, [])
  assert got["think_share"] is None and got["states_budget"] is None and got["reflection_inside_all"] is None
  assert got["reflection_inside"] == dict.fromkeys(patterns.REFLECTION_WORDS)
  assert got["budgets_stated"] == {} and got["by_level"] == []


def test_response_without_tokens_has_no_share():
  rows = [row("", n_gen=0, n_think=0), row("x</think>", n_gen=4, n_think=2)]
  assert patterns.summarise(rows, PATTERN, [None])["think_share"] == 0.5
