"""The engine: what it returns, what it must not depend on, and its agreement with the plain sampler and the trainer."""

import dataclasses
import functools
import logging
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hbpo_jax import structs
from hbpo_jax.models import decoder, kernels, slots
from hbpo_jax.rollout import engine, programs, schedule, shape
from tests.rollout.tiny import (
  ARCH,
  CAPS,
  CFG,
  EOS,
  B,
  J,
  P,
  make_engine,
  make_mesh,
  make_params,
  make_prompts,
  make_shape,
  plain_rollouts,
  rows,
)

KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def run():
  """(engine, sampler's params, prompts, rollouts) of one generation; the engine is warm."""
  mesh = make_mesh()
  eng = make_engine(mesh)
  params = eng.publish(make_params(mesh))
  prompts = make_prompts()
  return eng, params, prompts, eng.generate(params, prompts, KEY)


def assert_same(got, expected, order=slice(None)):
  """Bitwise equality, with `got`'s queries in another order."""
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[order]), got, expected)


def test_shapes_are_the_subgroups_caps(run):
  rollouts = run[-1]
  assert [t.shape for t in rollouts.tokens] == [(B, J, cap) for cap in CAPS]
  assert rollouts.n_gen_BGJ.shape == rollouts.truncated_BGJ.shape == (B, 2, J)


def test_responses_open_with_their_prefix_and_end_with_eos_or_at_the_cap(run):
  rollouts = run[-1]
  finished = 0
  for g, (prefix, cap) in enumerate([((7, 8), 8), ((9, 10, 11), 14)]):
    for b, j in np.ndindex(B, J):
      n = rollouts.n_tokens_BGJ[b, g, j]
      real = rollouts.tokens[g][b, j, :n]
      assert tuple(real[: len(prefix)]) == prefix
      assert not set(real[:-1]) & set(EOS), "nothing follows an EOS"
      if rollouts.truncated_BGJ[b, g, j]:
        assert n == cap and real[-1] not in EOS
      else:
        assert real[-1] in EOS
        finished += 1
      assert rollouts.n_gen_BGJ[b, g, j] == n
      np.testing.assert_array_equal(rollouts.completion_mask[g][b, j], np.arange(cap) < n)
      assert np.all(rollouts.tokens[g][b, j, n:] == 0) and np.all(rollouts.logp_sampler[g][b, j, n:] == 0)
  assert 8 < finished < B * 2 * J, "the test must see both finished and truncated responses"


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_the_plain_sampler_makes_the_same(run, temperature):
  _, params, prompts, rollouts = run
  if not temperature:
    cold = make_engine(make_mesh(), temperature=0.0)
    rollouts = cold.generate(params, prompts, KEY)
  expected = plain_rollouts(make_params(make_mesh()), prompts, KEY, temperature)
  same = (rows(rollouts.tokens) == rows(expected.tokens)).all(axis=1)
  assert same.mean() >= 0.95, "other shapes round differently, but hardly ever change a token"
  np.testing.assert_allclose(rows(rollouts.logp_sampler)[same], rows(expected.logp_sampler)[same], atol=1e-5)
  whole = same.reshape(B, 2, J)
  for name in ("n_tokens_BGJ", "n_gen_BGJ", "truncated_BGJ"):
    np.testing.assert_array_equal(getattr(rollouts, name)[whole], getattr(expected, name)[whole])
  np.testing.assert_array_equal(rows(rollouts.completion_mask)[same], rows(expected.completion_mask)[same])


def test_forced_eos_in_a_prefix_does_not_finish_a_response(run):
  eng, params, _, _ = run
  prompts = make_prompts().replace(prefix_GF=np.array([[3, 8, 0], [9, 4, 11]], np.int32))
  rollouts = eng.generate(params, prompts, KEY)
  assert np.all(rollouts.n_tokens_BGJ[:, 0] > 2) and np.all(rollouts.n_tokens_BGJ[:, 1] > 3)


@pytest.mark.parametrize("count,action", [(False, True), (True, False), (False, False)])
def test_prefix_roles(run, count, action):
  _, params, prompts, counted = run
  got = make_engine(make_mesh(), count_prefix=count, prefix_has_loss=action).generate(params, prompts, KEY)
  for g, n_prefix in enumerate((2, 3)):
    uncounted = 0 if count else n_prefix
    assert got.tokens[g].shape[-1] == CAPS[g] + uncounted
    np.testing.assert_array_equal(got.n_gen_BGJ[:, g], got.n_tokens_BGJ[:, g] - uncounted)
    assert got.n_gen_BGJ[:, g].max() <= CAPS[g]
    slot = np.arange(CAPS[g] + uncounted)
    expected = (slot < got.n_tokens_BGJ[:, g, :, None]) & (slot >= (0 if action else n_prefix))
    np.testing.assert_array_equal(got.completion_mask[g], expected)
    # The same tokens, whatever the prefix counts as, up to the shorter cap.
    np.testing.assert_array_equal(got.tokens[g][..., : CAPS[g]], counted.tokens[g])


def test_log_probabilities_agree_with_the_trainers(run):
  _, _, prompts, rollouts = run
  params = make_params(make_mesh())
  batch = structs.make_batch(prompts, rollouts)
  hidden = decoder.forward(
      params, ARCH, batch.tokens_RT, batch.segment_RT, batch.position_RT, compute_dtype=jnp.float32, remat="none")
  logp = jax.nn.log_softmax(decoder.logits(params, ARCH, hidden))[:, P - 1 : -1]
  trainer = jnp.take_along_axis(logp, batch.tokens_RT[:, P:, None], axis=-1)[..., 0]
  mask = np.asarray(batch.completion_mask_RC)
  np.testing.assert_allclose(np.asarray(trainer)[mask], rows(rollouts.logp_sampler)[mask], atol=1e-4)
  assert np.all(rows(rollouts.logp_sampler)[~mask] == 0)


@pytest.mark.parametrize("temperature", [1.0, 0.0], ids=["sampled", "greedy"])
def test_a_rollout_depends_on_its_identity_only(run, temperature):
  eng, params, prompts, rollouts = run
  if not temperature:
    eng = make_engine(make_mesh(), temperature=0.0)
    rollouts = eng.generate(params, prompts, KEY)
  order = np.array([5, 0, 7, 2, 1, 6, 3, 4])
  moved = prompts.replace(
      tokens_BP=prompts.tokens_BP[order], n_prompt_B=prompts.n_prompt_B[order], query_B=prompts.query_B[order])
  assert_same(eng.generate(params, moved, KEY), rollouts, order)

  neighbours = make_prompts(seed=9)
  alone = neighbours.replace(
      tokens_BP=np.concatenate([prompts.tokens_BP[:1], neighbours.tokens_BP[1:]]),
      n_prompt_B=np.concatenate([prompts.n_prompt_B[:1], neighbours.n_prompt_B[1:]]))
  got = eng.generate(params, alone, KEY)
  assert_same(jax.tree.map(lambda x: x[:1], got), jax.tree.map(lambda x: x[:1], rollouts))
  assert not np.array_equal(rows(got.tokens), rows(rollouts.tokens))


def test_the_order_of_the_queue_changes_nothing(run, monkeypatch):
  eng, params, prompts, _ = run
  in_order = schedule.largest_limit_first

  def shuffled(*args, **options):
    work = in_order(*args, **options)
    order = np.random.default_rng(3).permutation(len(work))
    return schedule.Work(*(getattr(work, f.name)[order] for f in dataclasses.fields(work)))

  monkeypatch.setattr(schedule, "largest_limit_first", shuffled)
  # With compaction a rollout may meet other row counts, which round differently: without, all is equal.
  monkeypatch.setattr(schedule.Schedule, "shrink", lambda self: None)
  got = eng.generate(params, prompts, KEY)
  monkeypatch.setattr(schedule, "largest_limit_first", in_order)
  assert_same(got, eng.generate(params, prompts, KEY))


def test_rollouts_that_are_not_wanted_are_left_out_and_change_no_other(run, monkeypatch):
  eng, params, prompts, rollouts = run
  monkeypatch.setattr(schedule.Schedule, "shrink", lambda self: None)
  whole = eng.generate(params, prompts, KEY)
  wanted = np.random.default_rng(1).random(rollouts.n_tokens_BGJ.shape) < 0.7
  wanted[0] = False  # A query that nothing is wanted of is not even prefilled.
  assert eng.plan.row_buckets[0] <= wanted.sum() < wanted.size
  got = eng.generate(params, prompts, KEY, wanted_BGJ=wanted)
  for name in ("n_tokens_BGJ", "n_gen_BGJ", "truncated_BGJ"):
    np.testing.assert_array_equal(getattr(got, name), np.where(wanted, getattr(whole, name), 0))
  for g in range(wanted.shape[1]):
    for b, j in np.argwhere(wanted[:, g]):
      np.testing.assert_array_equal(got.response(b, g, j), whole.response(b, g, j))
    assert not got.completion_mask[g][~wanted[:, g]].any()
  with pytest.raises(ValueError, match="leaves no rollout"):
    eng.start(params, prompts, KEY, wanted_BGJ=np.zeros_like(wanted))


def test_single_queries_may_have_lower_limits(run):
  eng, params, prompts, rollouts = run
  limit = np.full(rollouts.n_tokens_BGJ.shape[:2], 99)
  limit[1] = 2
  got = eng.generate(params, prompts, KEY, limit_BG=limit)
  sampled = got.n_tokens_BGJ - np.array(eng.shape.n_prefix)[:, None]
  assert (sampled[1] <= 2).all() and (got.truncated_BGJ[1] | (sampled[1] <= 2)).all()
  assert got.truncated_BGJ[1].any() and (sampled[2:] > 2).any()
  for g in range(limit.shape[1]):
    for j in range(sampled.shape[2]):
      n = int(got.n_tokens_BGJ[1, g, j])
      np.testing.assert_array_equal(got.response(1, g, j), rollouts.tokens[g][1, j, :n])


@pytest.mark.parametrize("changes", [
    dict(slots=64), dict(slots=4), dict(segment_steps=1), dict(segment_steps=7, length_buckets=(14,)),
    dict(layers="stacked")], ids=str)
def test_other_row_counts_and_segments_keep_nearly_every_token(run, changes):
  _, _, prompts, rollouts = run
  mesh = make_mesh()
  other = make_engine(mesh, cfg=dataclasses.replace(CFG, **changes))
  got = other.generate(other.publish(make_params(mesh)), prompts, KEY)
  same = (rows(got.tokens) == rows(rollouts.tokens)).all(axis=1)
  assert same.mean() >= 0.95
  np.testing.assert_allclose(rows(got.logp_sampler)[same], rows(rollouts.logp_sampler)[same], atol=1e-5)


@pytest.mark.parametrize("prefill,decode,unrolled", [
    ("splash", "pallas_tpu", False), ("xla", "pallas_tpu", True), ("xla", "pallas_gpu", False)])
def test_the_kernels_of_other_platforms_make_the_same(run, monkeypatch, prefill, decode, unrolled):
  """In interpretation, with everything around them: layouts, stacks, columns seen, one bucket of rows and lengths."""
  _, _, prompts, rollouts = run
  for name in ("decode_parts", "attend_splash"):
    monkeypatch.setattr(kernels, name, functools.partial(getattr(kernels, name), interpret=True))
  layout = slots.Layout(unrolled, prefill, decode, jnp.dtype("float32"))
  monkeypatch.setattr(engine, "make_layout", lambda *_: layout)
  mesh = make_mesh()
  ragged = make_engine(mesh, cfg=dataclasses.replace(CFG, length_buckets=()))
  assert ragged.plan.row_buckets == (16,) and len(ragged.plan.length_buckets) == 1
  got = ragged.generate(ragged.publish(make_params(mesh)), prompts, KEY)
  same = (rows(got.tokens) == rows(rollouts.tokens)).all(axis=1)
  assert same.mean() >= 0.95
  np.testing.assert_allclose(rows(got.logp_sampler)[same], rows(rollouts.logp_sampler)[same], atol=1e-5)


def test_padding_ids_of_the_prompt_do_not_matter(run):
  eng, params, prompts, rollouts = run
  padding = np.arange(P) < P - prompts.n_prompt_B[:, None]
  other = prompts.replace(tokens_BP=np.where(padding, EOS[0], prompts.tokens_BP))
  assert_same(eng.generate(params, other, KEY), rollouts)


def test_steps_and_rollouts_draw_differently(run):
  eng, params, prompts, rollouts = run
  assert_same(eng.generate(params, prompts, KEY), rollouts)
  other = eng.generate(params, prompts, jax.random.key(2))
  assert (rows(other.tokens) != rows(rollouts.tokens)).any(axis=1).mean() > 0.9
  first = rollouts.tokens[1].reshape(-1, CAPS[1])
  assert len({tuple(row) for row in first}) > 0.9 * len(first), "rollouts of a query must differ"


def test_nothing_compiles_after_warm_up(run, caplog):
  eng, params, _, _ = run
  eng.warm_up()
  jax.block_until_ready(params)
  rng = np.random.default_rng(0)
  keys = [jax.random.key(i) for i in range(4)]
  prompts = [make_prompts(seed=s) for s in range(4)]
  # All at once, one by one, none before the cap: every row count and every number of chunks.
  stops = [np.full((B, 2, J), 1), rng.integers(1, 12, (B, 2, J)), np.full((B, 2, J), 99), None]
  stops[1][0, 1, 0] = 11
  with jax.log_compiles(True), caplog.at_level(logging.WARNING):
    for key, some, stop in zip(keys, prompts, stops, strict=True):
      eng.generate(params, some, key, stop_BGJ=stop)
    assert not [r.message for r in caplog.records if "ompil" in r.message]
    jax.jit(lambda x: x * 3)(np.arange(7))
    assert [r for r in caplog.records if "ompil" in r.message], "the log must show compilations"


def test_warm_up_reports_its_progress_and_compiles_once():
  eng, seen = make_engine(make_mesh(), cfg=dataclasses.replace(CFG, slots=4, length_buckets=(14,))), []
  eng.warm_up(lambda done, total: seen.append((done, total)))
  total = len(seen)
  assert seen == [(i + 1, total) for i in range(total)] and total >= 6
  eng.warm_up(lambda done, total: seen.append((done, total)))
  assert len(seen) == total


def test_imposed_stops_end_responses(run):
  _, params, prompts, _ = run
  stop = np.random.default_rng(1).integers(1, 14, (B, 2, J))
  free = make_engine(make_mesh(), eos=(60,))  # an EOS that is hardly ever drawn
  rollouts = free.generate(params, prompts, KEY, stop_BGJ=stop)
  sampled = rollouts.n_tokens_BGJ - np.array([2, 3])[:, None]
  limit = np.array([6, 11])[:, None]
  ended_by_itself = np.array([[[60 in rollouts.tokens[g][b, j] for j in range(J)] for g in range(2)] for b in range(B)])
  np.testing.assert_array_equal(sampled[~ended_by_itself], np.minimum(stop, limit)[~ended_by_itself])
  np.testing.assert_array_equal(rollouts.truncated_BGJ[~ended_by_itself], (stop > limit)[~ended_by_itself])


def test_generation_yields_each_rollout_once_and_complete(run):
  eng, params, prompts, expected = run
  generation = eng.start(params, prompts, KEY)
  seen, decoding, n_ended = [], [], []
  for index in generation:
    n_ended.append(len(index))
    decoding.append(generation._running is not None)
    for b, g, j in index:
      n = generation.rollouts.n_tokens_BGJ[b, g, j]
      np.testing.assert_array_equal(generation.rollouts.tokens[g][b, j, :n], expected.tokens[g][b, j, :n])
      seen.append((b, g, j))
  assert sorted(seen) == list(np.ndindex(B, 2, J))
  assert len(seen) == len(set(seen))
  assert len(decoding) > 3 and decoding == [True] * (len(decoding) - 1) + [False], "the next segment runs meanwhile"
  assert len(n_ended) == generation.ledger.n_segments and 0 in n_ended, "whoever drives it may stop after any segment"


def test_the_ledger_adds_up(run):
  eng, params, prompts, rollouts = run
  generation = eng.start(params, prompts, KEY)
  for _ in generation:
    pass
  ledger = generation.ledger
  sampled = rollouts.n_tokens_BGJ - np.array([2, 3])[:, None]
  assert ledger.slot_steps == ledger.useful + ledger.truncated + ledger.overrun + ledger.idle
  assert ledger.useful == sampled[~rollouts.truncated_BGJ].sum()
  assert ledger.truncated == sampled[rollouts.truncated_BGJ].sum()
  assert ledger.overrun > 0 and ledger.n_segments > 3
  metrics = ledger.metrics()
  assert metrics["rollout/slot_steps"] == ledger.slot_steps
  assert metrics["rollout/utilisation"] == pytest.approx(sampled.sum() / ledger.slot_steps)
  times = [metrics[f"time/rollout_{stage}_s"] for stage in ("prefill", "decode", "host")]
  assert min(times) > 0
  assert metrics["tokens_per_s_rollout"] == pytest.approx(sampled.sum() / sum(times))
  assert metrics["tokens_per_s_useful"] == pytest.approx(ledger.useful / sum(times))


def test_eight_devices_give_the_same_rollouts(run):
  _, _, prompts, rollouts = run
  mesh = make_mesh(8)
  sharded = make_engine(mesh)
  got = sharded.generate(sharded.publish(make_params(mesh)), prompts, KEY)
  same = (rows(got.tokens) == rows(rollouts.tokens)).all(axis=1)
  assert same.mean() >= 0.95
  np.testing.assert_allclose(rows(got.logp_sampler)[same], rows(rollouts.logp_sampler)[same], atol=1e-4)


def test_publish_casts_and_passes_through():
  mesh = make_mesh()
  params = make_params(mesh)
  stacked = make_engine(mesh, cfg=dataclasses.replace(CFG, layers="stacked"))
  assert stacked.publish(params) is params
  low = make_engine(mesh, dtype="bfloat16")
  assert {w.dtype for w in jax.tree.leaves(low.publish(params))} == {jnp.dtype("bfloat16")}


def test_a_cap_without_room_for_the_sentence_is_refused():
  with pytest.raises(ValueError, match=r"cap of 3 tokens.*budget_sentence"):
    make_shape(caps=(3, 14), n_prefix=(3, 3))


@pytest.mark.parametrize("changes,match", [
    (dict(length_buckets=(3, 12)), r"length_buckets=\(3, 12\) holds 3.*segment_steps=2"),
    (dict(length_buckets=(4, 8)), r"length_buckets=\(4, 8\) ends below the longest response of 11"),
])
def test_sizes_that_do_not_fit_are_refused(changes, match):
  with pytest.raises(ValueError, match=match):
    make_engine(make_mesh(), cfg=dataclasses.replace(CFG, **changes))


@pytest.mark.parametrize("field,kernel", [("prefill_kernel", "splash"), ("decode_kernel", "pallas_gpu")])
def test_a_kernel_of_another_platform_is_refused(field, kernel):
  with pytest.raises(ValueError, match=rf"config.rollout.{field}='{kernel}' runs on .PU only.*CPU; set it to auto"):
    make_engine(make_mesh(), cfg=dataclasses.replace(CFG, **{field: kernel}))


def test_prompts_of_another_shape_are_refused(run):
  eng, params, prompts, _ = run
  fewer = jax.tree.map(lambda x: x[:4], prompts).replace(prefix_GF=prompts.prefix_GF, n_prefix_G=prompts.n_prefix_G)
  with pytest.raises(ValueError, match="4 prompts.*8"):
    eng.start(params, fewer, KEY)
  with pytest.raises(ValueError, match="a prompt has 11 tokens, the engine 10"):
    eng.start(params, prompts.replace(n_prompt_B=np.full(B, 11)), KEY)


def test_plan_defaults_cover_the_paper():
  asked = shape.Shape(
      n_queries=64, n_prompt_slots=1024, n_rollouts=4, caps=(4096,) * 4, n_prefix=(9,) * 4, count_prefix=True,
      prefix_has_loss=True)
  cfg = dataclasses.replace(CFG, slots=0, segment_steps=0, length_buckets=())
  layout = shape.make_layout(cfg, make_mesh(), "bfloat16")
  plan = shape.make_plan(asked, 8, cfg, layout)
  assert plan.row_buckets == (512, 256, 128, 64, 32)
  assert plan.segment_steps == 64
  assert plan.length_buckets == (128, 256, 512, 1024, 2048, 4096)
  ragged = shape.make_plan(asked, 8, cfg, dataclasses.replace(layout, decode_kernel="pallas_tpu"))
  assert ragged.length_buckets == (4096,) and ragged.row_buckets == (512,)
  assert plan.prompt_buckets == (128, 256, 512, 1024) and plan.prefill_queries == 32


def test_what_is_needed_is_compiled_first_and_the_rest_in_the_background():
  """The thread is held up at its first program; one that is asked for does not wait for it."""
  jobs = {("decode", i): (lambda x, i=i: x + i, (jax.ShapeDtypeStruct((), jnp.int32),), (), None) for i in range(6)}
  gate, begun = threading.Event(), []

  class Slow(programs._Compiler):
    def _lower(self, name):
      begun.append(name)
      if threading.current_thread().name == "compiler":
        gate.wait(60)
      return jax.jit(jobs[name][0]).lower(*jobs[name][1])

  compiler = Slow(make_mesh(), jobs)
  assert int(compiler["decode", 5](jnp.int32(1))) == 6, "while the thread is held up"
  gate.set()
  seen = []
  compiler.wait(lambda done, total: seen.append((done, total)))
  assert seen[-1] == (6, 6) and sorted(begun) == sorted(jobs), "each once"
  compiler.stop()


def test_a_program_that_does_not_compile_fails_where_it_is_needed():
  def broken(x):
    raise TypeError("no such operation")

  compiler = programs._Compiler(make_mesh(), {
      ("decode", 0): (broken, (jax.ShapeDtypeStruct((), jnp.int32),), (), jax.ShapeDtypeStruct((), jnp.int32))})
  for _ in range(2):
    with pytest.raises(TypeError, match="no such operation"):
      compiler["decode", 0]
  with pytest.raises(TypeError, match="no such operation"):
    compiler.wait(lambda done, total: None)
