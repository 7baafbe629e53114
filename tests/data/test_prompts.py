"""Prompts: the chat template, `<think>` exactly once, forced openings, reading responses back."""

import json

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
import transformers

from hbpo_jax.config import Config
from hbpo_jax.data import prompts, synthetic
from hbpo_jax.data.prompts import PromptBuilder

GOOD_TEMPLATES = ("chatml", "llama", "r1", "qwen3", "never_thinks", "opens_without_newline", "no_system")


@pytest.mark.parametrize("template", GOOD_TEMPLATES)
def test_think_is_opened_exactly_once_and_last(make_bpe, template):
  tokenizer = make_bpe(template)
  builder = PromptBuilder(tokenizer, Config())
  text = builder.render("What is 1 + 1?")
  assert text.count("<think>") == 1 and "</think>" not in text
  assert text.rstrip("\n").endswith("<think>")
  assert "What is 1 + 1? Let's think step by step and output the final answer within \\boxed{}." in text
  ids = builder.encode("What is 1 + 1?")
  assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
  think = tokenizer.convert_tokens_to_ids("<think>")
  assert ids.count(think) == 1


@pytest.mark.parametrize("template, ending", [
    ("chatml", "<|im_start|>assistant\n<think>\n"),
    ("r1", "<|Assistant|><think>\n"),
    ("qwen3", "<|im_start|>assistant\n<think>\n"),
    ("never_thinks", "<|im_start|>assistant\n<think>\n"),
    ("opens_without_newline", "<|im_start|>assistant\n<think>"),
])
def test_generation_prompt_by_hand(make_bpe, template, ending):
  assert PromptBuilder(make_bpe(template), Config()).render("1 + 1").endswith(ending)


def test_thinking_is_switched_on(make_bpe):
  assert "Answer at once." not in PromptBuilder(make_bpe("thinking_switch"), Config()).render("1 + 1")


def test_a_template_that_asks_for_the_date_always_gets_the_same(make_bpe):
  tokenizer = make_bpe("chatml")
  tokenizer.chat_template = "Today Date: {{ strftime_now('%d %b %Y') }}\n" + tokenizer.chat_template
  assert PromptBuilder(tokenizer, Config()).render("1 + 1").startswith("Today Date: 26 Jul 2024\n")


@pytest.mark.parametrize("template, n_bos", [("llama", 1), ("r1", 1), ("chatml", 0)])
def test_no_second_bos(make_bpe, template, n_bos):
  tokenizer = make_bpe(template)
  ids = PromptBuilder(tokenizer, Config()).encode("1 + 1")
  assert ids.count(tokenizer.bos_token_id) == n_bos
  assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id  # It would be added otherwise.


@pytest.mark.parametrize("template", ["chatml", "r1"])
def test_a_problem_that_speaks_of_think_is_kept(make_bpe, template):
  text = PromptBuilder(make_bpe(template), Config()).render("What do <think> and </think> mean?")
  assert "What do <think> and </think> mean?" in text
  assert text.rstrip().endswith("<think>") and text.count("<think>") == 2


@pytest.mark.parametrize("template", ["own_words", "opens_twice"])
def test_a_template_with_its_own_thought_is_refused(make_bpe, template):
  with pytest.raises(ValueError, match=r"must open <think> at most once"):
    PromptBuilder(make_bpe(template), Config()).render("1 + 1")


def test_a_template_that_drops_the_problem_is_refused(make_bpe):
  with pytest.raises(ValueError, match=r"does not keep the problem"):
    PromptBuilder(make_bpe("drops_problem"), Config()).render("1 + 1")


def test_no_template_no_eos_no_budget_place(make_bpe, change):
  with pytest.raises(ValueError, match=r"no chat template; use an instruction-tuned"):
    PromptBuilder(make_bpe(None), Config())
  with pytest.raises(ValueError, match=r"no end-of-sequence token; set `eos_token`"):
    PromptBuilder(make_bpe(eos_token=None, pad_token=None), Config())
  with pytest.raises(ValueError, match=r"prompt.budget_sentence='short'"):
    PromptBuilder(make_bpe(), change(Config(), prompt={"budget_sentence": "short"}))


def test_system_message(make_bpe, change):
  cfg = change(Config(), prompt={"system": "Be terse.", "instruction": ""})
  text = PromptBuilder(make_bpe("chatml"), cfg).render("1 + 1")
  assert text == (
      "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\n1 + 1<|im_end|>\n<|im_start|>assistant\n<think>\n")
  with pytest.raises(ValueError, match=r"System role not supported.*prompt.system=''"):
    PromptBuilder(make_bpe("no_system"), cfg).render("1 + 1")


def test_budget_sentences(make_bpe):
  tokenizer = make_bpe()
  builder = PromptBuilder(tokenizer, Config())
  prefix_GF, n_prefix_G = builder.prefix((512, 1024, 2048))
  assert prefix_GF.dtype == n_prefix_G.dtype == np.int32
  assert prefix_GF.shape == (3, n_prefix_G.max())
  for row, n, budget in zip(prefix_GF, n_prefix_G, (512, 1024, 2048), strict=True):
    assert tokenizer.decode(row[:n]) == f"I will answer the question within {budget} tokens."
    assert not row[n:].any()
    assert tokenizer.bos_token_id not in row[:n]


def test_prefix_follows_think_as_the_whole_text_would_be_tokenized(make_bpe):
  tokenizer = make_bpe()
  builder = PromptBuilder(tokenizer, Config())
  prefix_GF, n_prefix_G = builder.prefix(512)
  whole = tokenizer(builder.render("1 + 1") + "I will answer the question within 512 tokens.", add_special_tokens=False)
  assert builder.encode("1 + 1") + prefix_GF[0, :n_prefix_G[0]].tolist() == whole["input_ids"]


def test_evaluation_modes(make_bpe):
  tokenizer = make_bpe()
  builder = PromptBuilder(tokenizer, Config())
  natural, n_natural = builder.prefix("natural")
  assert natural.shape == (1, 0) and n_natural.tolist() == [0]
  efficiency, n_efficiency = builder.prefix("efficiency")
  assert tokenizer.decode(efficiency[0, :n_efficiency[0]]) == "I will answer the question with minimal tokens."
  for fixed in (512, "512"):
    np.testing.assert_array_equal(builder.prefix(fixed)[0], builder.prefix((512,))[0])
  with pytest.raises(ValueError, match=r"eval.mode='fast' does not exist; choose natural, efficiency"):
    builder.prefix("fast")
  with pytest.raises(ValueError, match=r"rollout.budgets=\(\)"):
    builder.prefix(())


def test_decode_drops_the_last_eos_only(make_bpe):
  tokenizer = make_bpe()  # Its pad token is its EOS.
  builder = PromptBuilder(tokenizer, Config())
  text = "so <|im_end|> 2.\n</think>\n\n\\boxed{42} ."
  ids = builder.encode_response(text)
  assert ids[-1] == tokenizer.eos_token_id
  assert builder.decode(ids) == text
  assert builder.decode(np.array(ids[:-1], np.int32)) == text
  assert builder.decode([tokenizer.eos_token_id, *ids]) == "<|end|>" + text
  assert builder.decode([]) == ""


def test_eos_of_the_generation_config(make_bpe, tmp_path, change):
  tokenizer = make_bpe()
  own, turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
  assert prompts.eos_ids(tokenizer) == (own,)
  assert prompts.eos_ids(tokenizer, str(tmp_path)) == (own,)
  file = tmp_path / "generation_config.json"
  for listed, expected in (([turn, own], (own, turn)), (turn, (own, turn)), (None, (own,))):
    file.write_text(json.dumps({"eos_token_id": listed}))
    assert prompts.eos_ids(tokenizer, str(tmp_path)) == tuple(sorted(expected))
  file.write_text("{}")
  assert prompts.eos_ids(tokenizer, str(tmp_path)) == (own,)
  file.write_text(json.dumps({"eos_token_id": [turn]}))
  for builder in (PromptBuilder(tokenizer, Config(), str(tmp_path)),
                  PromptBuilder(tokenizer, change(Config(), model={"path": str(tmp_path)}))):
    assert set(builder.eos_ids) == {own, turn}
    assert builder.decode([turn]) == ""
  for bad, message in (("{", "cannot be read"), ('{"eos_token_id": "x"}', "must be an integer or a list")):
    file.write_text(bad)
    with pytest.raises(ValueError, match=message):
      prompts.eos_ids(tokenizer, str(tmp_path))


@given(st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=9), min_size=1, max_size=5), st.integers(0, 99))
def test_batch_is_left_padded(rows, first):
  builder = PromptBuilder(synthetic.make_tokenizer(Config().data.synthetic, (8,)), Config())
  batch = builder.batch(rows, (np.zeros((1, 0), np.int32), np.zeros(1, np.int32)), 9, first_query=first)
  assert batch.tokens_BP.shape == (len(rows), 9) and batch.tokens_BP.dtype == np.int32
  for b, row in enumerate(rows):
    assert batch.n_prompt_B[b] == len(row)
    assert batch.tokens_BP[b, 9 - len(row):].tolist() == row
    assert not batch.tokens_BP[b, :9 - len(row)].any()
  assert batch.query_B.tolist() == list(range(first, first + len(rows)))


def test_batch_refuses_what_does_not_fit(make_bpe):
  builder = PromptBuilder(make_bpe(), Config())
  prefix = builder.prefix("natural")
  for row in ([], [1] * 10):
    with pytest.raises(ValueError, match=r"data.max_prompt_tokens=9"):
      builder.batch([[1], row], prefix, 9)


@pytest.mark.parametrize("template", GOOD_TEMPLATES)
def test_saved_tokenizer_gives_the_same_prompt(make_bpe, tmp_path, template):
  tokenizer = make_bpe(template)
  tokenizer.save_pretrained(tmp_path)
  again = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert PromptBuilder(again, Config()).encode("1 + 1") == PromptBuilder(tokenizer, Config()).encode("1 + 1")


def test_no_budget_sentence_forces_nothing(make_bpe, change):
  builder = PromptBuilder(make_bpe(), change(Config(), prompt={"budget_sentence": ""}))
  prefix_GF, n_prefix_G = builder.training_prefix((4096,))
  assert prefix_GF.shape == (1, 0) and n_prefix_G.tolist() == [0]


def test_openings_take_the_place_of_the_budget_sentence_in_training_only(make_bpe, change):
  tokenizer = make_bpe()
  cfg = change(Config(), prompt={"openings": ("natural", "</think>", "at most {budget}")})
  builder = PromptBuilder(tokenizer, cfg)
  prefix_GF, n_prefix_G = builder.training_prefix((8, 16, 32))
  texts = [tokenizer.decode(row[:n]) for row, n in zip(prefix_GF, n_prefix_G, strict=True)]
  assert texts == ["", "</think>", "at most 32"]
  assert tokenizer.decode(builder.budget_tokens(16)) == "I will answer the question within 16 tokens."
  plain = PromptBuilder(tokenizer, Config())
  for ours, theirs in zip(plain.training_prefix((8, 16)), plain.prefix((8, 16)), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_which_responses_think(make_bpe, change):
  cfg = change(Config(), prompt={"openings": ("natural", "</think>", "...")})
  builder = PromptBuilder(make_bpe(), cfg)
  # By hand, two responses to each opening: thinks, does not.
  responses = ["So 1 + 1. </think> 2", "\n\n</think> 2",
               "</think> 2", "</think> It is 2. <think> Sure? </think>",
               "...\nSo 1 + 1. </think> 2", "...\n</think> 2"]
  thinks = builder.which_think(responses, (1, 3, 2), (8, 16, 32))
  assert thinks.tolist() == [[[True, False], [False, False], [True, False]]]
  # A thought that is never closed is one.
  never_closed = ["So 1", "", "</think>", "</think> 2", "... 1", "..."]
  assert builder.which_think(never_closed, (1, 3, 2), (8, 16, 32)).tolist() == thinks.tolist()
