"""benchmarks/step.py: the lengths it imposes, its turns, its figures, and what it accepts as a step."""

import contextlib
import importlib
import math
import pathlib
import statistics
import types

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
  """The script as a module; its own folder is on the path while it is in use."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("step")


def test_mixed_lengths_have_their_mean_after_clipping(bench):
  for seed in range(20):
    lengths = bench.mixed_lengths(16, seed)
    assert statistics.fmean(lengths) == pytest.approx(0.4 * 256, abs=0.1)
    assert min(lengths) >= 1 and max(lengths) <= 256
    assert bench.mixed_lengths(16, seed) == lengths


def test_every_turn_has_other_lengths_and_full_has_the_cap(bench):
  assert bench.make_lengths("mix", 0, 1) != bench.make_lengths("mix", 0, 2)
  assert bench.make_lengths("mix", 0, 1) != bench.make_lengths("mix", 1, 1)
  assert bench.make_lengths("full", 0, 1) == [256] * 16


def test_turns_change_direction(bench):
  assert [s for turn in range(4) for s in bench.in_turn("AB", turn)] == list("ABBAABBA")


def _steps(*seconds):
  return [dict(step_s=s, cpu_s=2 * s, rollout_s=s / 4, update_s=s / 2, useful_tokens=10, compiles=0) for s in seconds]


def test_ratios_are_taken_within_a_turn(bench):
  figures = bench.account(_steps(1.0, 2.0, 4.0), _steps(3.0, 2.0, 8.0), [])
  assert figures["ratio_to_tunix"] == 2.0  # of 3, 1 and 2; the medians' ratio is 1.5
  assert (figures["ratio_to_tunix_min"], figures["ratio_to_tunix_max"]) == (1.0, 3.0)
  assert figures["step_s"] == 2.0 and figures["first_step_s"] is None


def test_targets_hold_or_fail_each_for_itself(bench):
  def cell(system, case, ratio, cold, warm):
    return dict(system=system, case=case, ratio_to_tunix=ratio, ratio_to_tunix_cpu=2.0, first_step_s=cold,
                first_step_cpu_s=cold, first_step_warm_s=warm, first_step_warm_cpu_s=10.0)

  found = bench.targets([
      cell("ours", "full", 1.5, 30.0, 6.0), cell("tunix", "full", 1.0, 10.0, 10.0),
      cell("ours", "mix", 2.9, None, None), cell("tunix", "mix", 1.0, None, None)])
  assert [(t["case"], t["measured"], t["measured_cpu"], t["met"]) for t in found] == [
      ("full", 1.5, 2.0, True), ("full", 3.0, 3.0, True), ("full", 0.6, 1.0, False), ("mix", 2.9, 2.0, False)]


def test_a_target_without_figures_is_left_out(bench):
  assert bench.targets([{"system": "ours", "case": "full", "error": "gone"}]) == []


def test_a_system_that_does_not_start_is_reported(bench, monkeypatch, tmp_path):
  monkeypatch.setenv("HBPO_TUNIX_PYTHON", str(tmp_path / "none"))
  contest = bench.Contest(
      systems=("tunix",), repeats=1, firsts=1, one_process=True, seed=0, timeout_s=60.0, caches=str(tmp_path))
  tunix, last = contest.cells(["full"])
  assert "does not start" in tunix["error"] and last["targets"] == []
  assert list(contest.errors) == ["tunix"]


def test_our_process_takes_steps_and_refuses_a_response_of_another_length(bench):
  sizes = bench.MODELS["small"] | dict(hidden=32, layers=1, heads=2, kv_heads=1, head_size=16, mlp=32, vocabulary=64)
  case = dict(prompts=[[2, 3, 4]], lengths=[[8] * 2], cap=8, room=11, slots=2, eos=bench.EOS, pad=bench.PAD)
  # One device, whatever the tests simulate.
  worker = bench.Worker("ours", bench.WORKERS["ours"], 300.0, {"XLA_FLAGS": ""})
  try:
    worker.ask("build", model=sizes, case=case)
    first = worker.ask("first", lengths=[8, 3], seed=0)
    assert first["n_loss"] == first["n_tokens"] == first["useful_tokens"] == 11 and first["compiles"] > 0
    second = worker.ask("step", lengths=[1, 8], seed=1)
    assert second["n_tokens"] == 9 and second["compiles"] == 0
    assert 0 < second["rollout_s"] + second["update_s"] <= second["step_s"]
    with pytest.raises(bench.Failed, match="response 0 has 8 tokens, not 10"):
      worker.ask("step", lengths=[10, 8], seed=2)
  finally:
    worker.close()


@pytest.mark.parametrize("change, loss, n_loss, error", [
    (0.0, 0.0, 7, "the weights changed by 0.0"), (1.0, 0.0, 7, "the weights changed by 1.0"),
    (1e-6, math.nan, 7, "loss nan"), (1e-6, 0.0, 4, "the loss is over 4 tokens of 7"), (1e-6, 0.0, 7, None)])
def test_only_a_whole_step_is_accepted(bench, change, loss, n_loss, error):
  stepping = importlib.import_module("contenders.stepping")
  done = stepping.Step(n_tokens=[3, 4], n_loss=n_loss, loss=loss, grad_norm=1.0, rollout_s=1.0, update_s=1.0)
  trainer = types.SimpleNamespace(last=lambda: done, weights=lambda: np.full(2, change))
  with pytest.raises(ValueError, match=error) if error else contextlib.nullcontext():
    assert stepping._checked(trainer, [3, 5], np.zeros(2))["useful_tokens"] == 8
