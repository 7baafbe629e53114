"""The pipeline: coverage per epoch, shards, dropped prompts, exact resumption."""

import collections
import dataclasses
import itertools
import json

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from hbpo_jax.data import problems as problems_lib
from hbpo_jax.data import synthetic
from hbpo_jax.data.pipeline import Pipeline
from hbpo_jax.data.prompts import PromptBuilder


@pytest.fixture(scope="module")
def builder(word_tokenizer, tiny_cfg):
  return PromptBuilder(word_tokenizer, tiny_cfg)


@pytest.fixture(scope="module")
def train(tiny_cfg):
  return synthetic.problems(tiny_cfg.data.synthetic, 0, "train", 48)


def flat(lists):
  return list(itertools.chain.from_iterable(lists))


def ids_of(iterator, n):
  return [[p.id for p in next(iterator)[0]] for _ in range(n)]


def test_batches_hold_the_prompts_of_their_problems(builder, tiny_cfg, train):
  iterator = iter(Pipeline(train, builder, tiny_cfg))
  for _ in range(3):
    problems, prompts = next(iterator)
    assert len(problems) == 8
    assert prompts.tokens_BP.shape == (8, 20) and prompts.tokens_BP.dtype == np.int32
    assert prompts.prefix_GF.shape == (4, 2) and prompts.n_prefix_G.tolist() == [2, 2, 2, 2]
    assert prompts.query_B.tolist() == list(range(8))
    for p, row, n in zip(problems, prompts.tokens_BP, prompts.n_prompt_B, strict=True):
      assert row[20 - n:].tolist() == builder.encode(p.problem)


def test_the_digest_tells_other_problems(builder, tiny_cfg, train):
  digest = lambda problems: Pipeline(problems, builder, tiny_cfg).digest
  assert digest(train) == digest(list(train))
  other = dataclasses.replace(train[3], answer=train[3].answer + "0", answers=())
  assert len({digest(train), digest(train[:-1]), digest(train[::-1]), digest([*train[:3], other, *train[4:]])}) == 4


def test_every_epoch_is_another_order_of_all_problems(builder, tiny_cfg, train):
  iterator = iter(Pipeline(train, builder, tiny_cfg))
  epochs = [flat(ids_of(iterator, 6)) for _ in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == sorted(p.id for p in train)
    assert epoch != [p.id for p in train]
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_order_depends_on_the_seed_alone(builder, tiny_cfg, train, change):
  first = ids_of(iter(Pipeline(train, builder, tiny_cfg)), 4)
  assert ids_of(iter(Pipeline(train, builder, tiny_cfg)), 4) == first
  assert ids_of(iter(Pipeline(train, builder, change(tiny_cfg, seed=1))), 4) != first


def test_a_batch_reaches_over_the_end_of_an_epoch(builder, tiny_cfg, train):
  iterator = iter(Pipeline(train[:20], builder, tiny_cfg))
  seen = collections.Counter(flat(ids_of(iterator, 5)))  # 40 draws of 20 problems
  assert set(seen.values()) == {2}


def test_fewer_problems_than_queries(builder, tiny_cfg, train):
  iterator = iter(Pipeline(train[:3], builder, tiny_cfg))
  seen = collections.Counter(flat(ids_of(iterator, 3)))  # 24 draws of 3
  assert set(seen.values()) == {8}


@pytest.mark.parametrize("process_count", [1, 2, 4, 8])
def test_processes_take_disjoint_parts_of_the_global_batch(builder, tiny_cfg, train, process_count):
  whole = ids_of(iter(Pipeline(train, builder, tiny_cfg)), 7)
  parts, queries = [], []
  for p in range(process_count):
    iterator = iter(Pipeline(train, builder, tiny_cfg, process_index=p, process_count=process_count))
    taken = [next(iterator) for _ in range(7)]
    parts.append([[q.id for q in problems] for problems, _ in taken])
    queries += taken[0][1].query_B.tolist()
  assert [flat(part[i] for part in parts) for i in range(7)] == whole
  assert queries == list(range(8))


@given(st.integers(0, 20), st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_resumed_is_the_same_as_uninterrupted(builder, tiny_cfg, train, n_before, n_after):
  pipeline = Pipeline(train[:30], builder, tiny_cfg)  # 30 is no multiple of 8: epochs end inside batches.
  iterator = iter(pipeline)
  for _ in range(n_before):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = [next(iterator) for _ in range(n_after)]
  resumed = iter(Pipeline(train[:30], builder, tiny_cfg))
  resumed.set_state(state)
  for problems, prompts in expected:
    again_problems, again = next(resumed)
    assert again_problems == problems
    for field in ("tokens_BP", "n_prompt_B", "prefix_GF", "n_prefix_G", "query_B"):
      np.testing.assert_array_equal(getattr(again, field), getattr(prompts, field))
  assert resumed.get_state() == iterator.get_state()


def test_iterators_do_not_disturb_each_other(builder, tiny_cfg, train):
  pipeline = Pipeline(train, builder, tiny_cfg)
  a = iter(pipeline)
  first = ids_of(a, 2)
  b = iter(pipeline)
  assert ids_of(b, 1) == first[:1]
  assert ids_of(a, 1) == [ids_of(b, 2)[1]]


def test_long_prompts_are_dropped_and_counted(builder, tiny_cfg, train, change):
  cfg = change(tiny_cfg, data={"max_prompt_tokens": 8})  # K + 4 tokens: levels 1 to 4 fit.
  pipeline = Pipeline(train, builder, cfg)
  assert [p.id for p in pipeline.problems] == [p.id for p in train if p.level <= 4]
  assert pipeline.n_dropped == sum(p.level > 4 for p in train) > 0
  kept = set(flat(ids_of(iter(pipeline), 20)))
  assert kept == {p.id for p in pipeline.problems}
  message = r"data.max_prompt_tokens=4 drops all 48 problems \(the shortest prompt has 5 tokens\)"
  with pytest.raises(ValueError, match=message):
    Pipeline(train, builder, change(tiny_cfg, data={"max_prompt_tokens": 4}))


def test_impossible_shards_are_refused(builder, tiny_cfg, train):
  with pytest.raises(ValueError, match=r"rollout.queries=8 does not divide over 3 processes"):
    Pipeline(train, builder, tiny_cfg, process_count=3)
  with pytest.raises(ValueError, match=r"process_index=2 must lie in 0..1"):
    Pipeline(train, builder, tiny_cfg, process_index=2, process_count=2)


def test_real_problems_through_a_bpe_tokenizer(shared_dir, make_bpe, tiny_cfg, change):
  cfg = change(tiny_cfg, data={"max_prompt_tokens": 400, "source": str(shared_dir / "data" / "gsm8k_train.jsonl"),
                               "n_eval": 20, "limit": 200})
  train, held_out = problems_lib.load_train_and_eval(cfg.data, 0)
  assert len(train) == 200 and len(held_out) == 20
  tokenizer = make_bpe("chatml")
  pipeline = Pipeline(train, PromptBuilder(tokenizer, cfg), cfg)
  assert 0 < pipeline.n_dropped < 150
  problems, prompts = next(iter(pipeline))
  text = tokenizer.decode(prompts.tokens_BP[0, 400 - prompts.n_prompt_B[0]:], clean_up_tokenization_spaces=False)
  assert problems[0].problem.strip() in text and text.endswith("<think>\n")
