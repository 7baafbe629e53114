"""Peaks, bounds, cost and advice of the 1.5B run, and a sweep; nothing is compiled."""

import dataclasses

import pytest

from hbpo_jax import flags
from hbpo_jax.models import presets
from hbpo_jax.planning import advice, chips, estimate, hlo, job, memory, show, sweep
from hbpo_jax.planning.compile import Compiled
from hbpo_jax.planning.estimate import Lengths

LENGTHS = Lengths(None, 256)
GIB = chips.GIB


def paper(topology="v5e:4x4", preset="r1_distill_qwen_1p5b", **fields):
  overrides = {name.replace("__", "."): value for name, value in fields.items()}
  cfg = flags.build(flags.load_config("r1_distill_qwen_1p5b"), overrides)
  return job.make_job(cfg, presets.preset(preset), chips.parse_topology(topology), (12, 13, 13, 13))


@pytest.fixture(scope="module")
def too_large():
  return estimate.estimate(paper(learner__microbatch_rows=128), LENGTHS)


def test_the_paper_on_16_chips_of_v5e_needs_small_micro_batches(too_large):
  assert not too_large.fits and too_large.peak[0] == "update"
  assert too_large.phase_peaks["update"] == too_large.totals["update"] > 15.75 * GIB
  assert too_large.phase_peaks["rollout"] < 15.75 * GIB
  small = estimate.estimate(paper(learner__microbatch_rows=16), LENGTHS)
  assert small.fits and small.totals["decode"] == too_large.totals["decode"]


def test_bounds_are_rooflines(too_large):
  cost, bounds = too_large.costs["decode"], too_large.bounds("decode")
  assert bounds == pytest.approx({
      "compute": cost.flops / 197e12, "memory": cost.hbm_bytes / 819e9, "network": cost.network_bytes / 100e9})
  assert too_large.bound_s("decode") == max(bounds.values()) == bounds["memory"]
  waiting = too_large.decoding.n_segments * estimate.SEGMENT_S
  assert too_large.predicted_s("decode") == pytest.approx(bounds["memory"] / 0.7 + waiting)
  assert too_large.step_s == pytest.approx(sum(too_large.predicted_s(p) for p in too_large.costs))
  assert too_large.tpu_hours(36) == pytest.approx(16 * 629 * 36 / 3600)
  # 28 layers x 2 heads x 128 x keys and values in bfloat16 are 28 KiB a token.
  rows = too_large.job.plan.row_buckets[0] // 16
  assert too_large.resident.cache == pytest.approx(rows * (1088 + 4096) * 28 * 1024, rel=1e-3)


def test_the_compilers_numbers_take_the_place_of_estimates():
  made = estimate.estimate(paper(), LENGTHS)
  known = memory.arguments(made.job, "decode")
  said = {
      "decode": Compiled("decode", argument=known + 1000, output=50, alias=40, temporary=700, code=3, collectives=(
          hlo.Collective("all-gather", "f32[8]", 28, 3, True),)),
      "score": Compiled("score", needed=40 * GIB)}
  then = estimate.estimate(made.job, LENGTHS, said)
  assert then.beyond["decode"] == 700 + 50 - 40 + 3 + 1000, "padded arguments count"
  assert then.costs["decode"].network_bytes == 28 * 3 * then.decoding.n_segments
  assert then.totals["score"] == made.resident.beside("score") + 40 * GIB and not then.fits
  assert then.beyond["update"] == made.beyond["update"]
  lost = estimate.estimate(paper(learner__microbatch_rows=16), LENGTHS, {"score": Compiled("score", error="crashed")})
  assert not lost.fits and lost.failed and "score did not compile: crashed" in show.verdict(lost)


def test_advice_names_the_knobs_and_what_they_save(too_large):
  found = {k.change: k for k in advice.knobs(too_large)}
  rows = found["--config.learner.microbatch_rows=64"]
  assert rows.program == "update" and rows.saved > 4 * GIB
  halved = estimate.estimate(paper(learner__microbatch_rows=64), LENGTHS)
  assert rows.total == halved.totals["update"] and rows.saved == too_large.totals["update"] - rows.total
  assert rows.fits == halved.fits
  assert {"--topology=v5e:4x8", "--config.data.max_prompt_tokens=512"} <= set(found)
  assert not any("slots" in change for change in found), "slots do not help an update"


def test_advice_for_the_sampler():
  made = estimate.estimate(paper(topology="v5e:2x4", rollout__slots=1024, learner__microbatch_rows=8), LENGTHS)
  assert made.peak[0] == "decode"
  found = {k.change: k for k in advice.knobs(made) if k.program == "decode"}
  slots = found["--config.rollout.slots=512"]
  assert slots.saved == pytest.approx(made.resident.cache / 2, rel=0.05)
  split = found["--config.rollout.gather_weights=false"]
  assert split.saved > 0 and "fetches the weights" in split.cost
  assert "--config.rollout.caps=2560,2560,2560,2560" in found


@pytest.mark.parametrize("fields, expected", [
    (dict(model__remat="none", learner__microbatch_rows=16), "--config.model.remat=full"),
    (dict(mesh__data=16, mesh__fsdp=1, learner__microbatch_rows=16), "--config.mesh.data=1")])
def test_more_knobs(fields, expected):
  made = estimate.estimate(paper(**fields), LENGTHS)
  assert not made.fits
  assert expected in [k.change for k in advice.knobs(made)]


def test_together_they_fit(too_large):
  then = advice.together(too_large)
  assert then is not None and then.changes[0].startswith("--config.learner.microbatch_rows=")
  fields = dict(change.removeprefix("--config.").split("=") for change in then.changes)
  made = estimate.estimate(paper(**{name.replace(".", "__"): int(value) for name, value in fields.items()}), LENGTHS)
  assert made.fits and made.peak == (then.program, then.total)
  assert then.changes[0] in show.together_line(then)


def test_no_combination_may_help():
  made = estimate.estimate(paper(topology="v5e:1x1", preset="qwen3_4b", learner__microbatch_rows=1), LENGTHS)
  assert not made.fits and advice.together(made) is None
  assert "more chips" in show.together_line(None)


def test_a_sweep_ranks_what_fits_by_speed():
  ranked = sweep.rank(paper(learner__microbatch_rows=16), LENGTHS)
  meshes = {tuple(e.job.mesh.shape.values()) for e in ranked}
  assert (1, 16, 1) in meshes and (2, 4, 2) in meshes and all(d * f * t == 16 for d, f, t in meshes)
  assert not any(t == 4 for _, _, t in meshes), "two key/value heads do not split over four devices"
  fitting = [e.step_s for e in ranked if e.fits]
  assert 0 < len(fitting) < len(ranked) and fitting == sorted(fitting)
  assert [e.fits for e in ranked] == sorted((e.fits for e in ranked), reverse=True)
  assert {e.job.cfg.rollout.slots // e.job.shards for e in ranked} >= {16, 32, 64}


@pytest.mark.slow
def test_a_sweep_compiles_the_best_few_and_sorts_again(monkeypatch):
  asked = []

  def compile_all(planned, names, **_):
    asked.append(planned)
    error = "crashed" if len(asked) == 1 else ""
    moved = hlo.Collective("all-gather", "f32[8]", 10**13, 1, True)  # More than any estimate.
    return {name: Compiled(name, error=error, temporary=1, collectives=() if error else (moved,)) for name in names}

  monkeypatch.setattr(sweep.compile_lib, "compile_all", compile_all)
  ranked = sweep.rank(paper(learner__microbatch_rows=16), LENGTHS)
  found = sweep.compile_best(ranked, n_processes=1)
  assert [e.job for e in ranked[:3]] == asked and len(found) == len(ranked)
  assert {id(e.job) for e in found[:2]} == {id(asked[1]), id(asked[2])}, "what is known to fit comes first"
  assert found[2].fits and not found[2].compiled and found[2].step_s < found[0].step_s
  assert not next(e for e in found if e.job is asked[0]).fits
  assert len(show.sweep_table(found).rows) == 13, "the one that failed is shown behind the first twelve"


def test_every_number_of_a_plan_is_said(too_large):
  text = "\n".join([
      *show.header(too_large, "somewhere"), *show.assumptions(too_large, "assumed"), *show.verdict(too_large),
      show.memory_table(too_large).to_text(), show.programs_table(too_large).to_text(),
      show.phases_table(too_large).to_text()])
  for words in ("v5e:4x4: 16 chips", "'fsdp': 16", "512 slots", "DOES NOT FIT", "TPU-hours", "NOT COMPILED",
                "log-normal", "50% of peak", "not measured", "optimizer state", "peak of the update phase",
                "at least s"):
    assert words in text, words
  assert show.collectives_table(too_large) is None and show.kinds_table(too_large) is None
  moved = hlo.Collective("all-gather", "f32[8]", 10**9, 3, False)
  said = Compiled("decode", warnings=("involuntary x",), collectives=(moved,))
  measured = dataclasses.replace(too_large, compiled={"decode": said})
  table = show.collectives_table(measured)
  assert table is not None and table.rows == (("decode", "all-gather", "f32[8]", "about 3", "3.000"),)
  assert "decode: involuntary x" in show.verdict(measured)
