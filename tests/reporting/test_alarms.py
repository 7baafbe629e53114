"""Alarms: raised by what they are for, not by single rows or slow learning, and the same after a resume."""

import dataclasses
import json
import math
import re

import pytest

from hbpo_jax import config
from hbpo_jax.config import AlarmConfig
from hbpo_jax.reporting import alarms

BUDGETS = (8, 16)
SHORT = AlarmConfig(window=4, reference=6)


def rows(*values, tag="length_spread"):
  """Rows of metrics.jsonl with one tag."""
  return [{"step": step, tag: value} for step, value in enumerate(values)]


def spans(found):
  """(kind, first step, last step) of alarms."""
  return [(a.kind, a.step, a.cleared_step) for a in found]


def healthy(step, **changes):
  """A row of a run in which nothing is wrong."""
  row = {
      "step": step, "length_spread": 100.0, "entropy": 0.5, "update/clip_fraction_low": 0.05,
      "update/clip_fraction_high": 0.05, "truncated": 0.02, "timeout": 0.0, "update/nonfinite": 0.0,
      "zero_variance": 0.3, "update/ratio_max": 2.0, "update/grad_norm": 0.5, "sampler/sampler_outside_clip": 0.01}
  for b in BUDGETS:
    row |= {f"budget_{b}/sentence_probability": 0.3, f"budget_{b}/sentence_logp": -1.5}
  return row | changes


# kind -> what goes wrong from a row on, and the value and limit at the first alarm (window 4, so 4 rows later).
TROUBLE = {
    "exploration": ({"length_spread": 10.0}, 10.0, 30.0),
    "sentence": ({f"budget_{b}/{t}": v for b in BUDGETS for t, v in (
        ("sentence_probability", 0.3e-6), ("sentence_logp", -15.0))}, math.log(0.6e-6), math.log(0.6) - 4),
    "entropy_low": ({"entropy": 0.01}, 0.01, 0.1),
    "entropy_high": ({"entropy": 2.0}, 2.0, 1.5),
    "clipping": ({"update/clip_fraction_low": 0.2, "update/clip_fraction_high": 0.2}, 0.4, 0.3),
    "truncation": ({"truncated": 0.6}, 0.6, 0.25),
    "timeouts": ({"timeout": 0.05}, 0.05, 0.01),
    "no_signal": ({"zero_variance": 1.0}, 1.0, 0.9),
    "ratio": ({"update/ratio_max": 1e4}, math.log(1e4), math.log(100)),
    "sampler_gap": ({"sampler/sampler_outside_clip": 0.3}, 0.3, 0.1),
    "nonfinite": ({"update/nonfinite": 2.0}, 2.0, 0.0),
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_each_kind_is_raised_by_its_trouble_alone_and_ends_with_it(kind):
  changes, value, limit = TROUBLE[kind]
  run = [healthy(s, **(changes if 20 <= s < 40 else {})) for s in range(60)]
  found = alarms.history(run, SHORT, BUDGETS)
  assert [a.kind for a in found] == [kind]
  alarm = found[0]
  assert 20 <= alarm.step < 24 and 40 <= alarm.cleared_step < 44
  lasting = alarms.history([healthy(s, **(changes if s >= 20 else {})) for s in range(60)], SHORT, BUDGETS)
  assert spans(lasting) == [(kind, alarm.step, None)]
  # Where the window is full of trouble, the numbers are those of the trouble.
  watch = alarms.Watch(dataclasses.replace(SHORT, window=1), BUDGETS)
  watch.replay(run[:21])
  (at_once,) = watch.active
  assert at_once.step == 20 and (at_once.value, at_once.limit) == pytest.approx((value, limit))


@pytest.mark.parametrize("kind", TROUBLE)
def test_sentences_say_what_was_seen_against_what_and_name_a_setting(kind):
  run = [healthy(s, **(TROUBLE[kind][0] if s >= 20 else {})) for s in range(40)]
  (alarm,) = alarms.history(run, SHORT, BUDGETS)
  assert alarm.text.count(". ") == 0 and alarm.text.endswith(".") and len(re.findall(r"\d", alarm.text)) >= 2
  names = re.findall(r"\b[a-z]+\.[a-z_]+\b(?!\.)", re.sub(r"\w+\.jsonl", "", alarm.text))
  assert names and all(name in config.field_table() for name in names)
  assert "{" not in alarm.text


def test_a_healthy_run_and_one_that_learns_raise_nothing():
  assert alarms.history([healthy(s) for s in range(100)], AlarmConfig(), BUDGETS) == []
  # Lengths halve, entropy halves, the model comes to choose one budget and drops the other's sentence.
  learning = [healthy(s, length_spread=100 - s / 2, entropy=0.5 - s / 400, truncated=0.2, **{
      "budget_8/sentence_probability": 0.3 + s / 200, "budget_8/sentence_logp": -1.0,
      "budget_16/sentence_probability": 0.3 * math.exp(-s / 4), "budget_16/sentence_logp": -1.5 - s / 4})
              for s in range(100)]
  assert alarms.history(learning, AlarmConfig(), BUDGETS) == []


@pytest.mark.parametrize("kind", sorted(set(TROUBLE) - {"nonfinite"}))
def test_a_single_row_does_not_ring(kind):
  changes = {"timeout": 0.03} if kind == "timeouts" else TROUBLE[kind][0]
  assert alarms.history([healthy(s, **(changes if s == 25 else {})) for s in range(50)], SHORT, BUDGETS) == []


def test_a_value_near_its_limit_does_not_flicker():
  t = AlarmConfig(window=1)
  near = alarms.history(rows(0.2, 0.26, 0.24, 0.26, 0.23, 0.26, 0.224, 0.24, 0.2, tag="truncated"), t, ())
  assert spans(near) == [("truncation", 1, 6)]  # It ends below 0.9 x 0.25 = 0.225, and 0.24 does not raise it again.
  again = alarms.history(rows(0.26, 0.2, 0.26, tag="truncated"), t, ())
  assert spans(again) == [("truncation", 0, 1), ("truncation", 2, None)]
  t = dataclasses.replace(t, reference=2)
  low = alarms.history(rows(10, 10, 2.9, 3.1, 2.9, 3.2, 3.31, 3.1), t, ())
  assert spans(low) == [("exploration", 2, 6)]


def test_means_are_of_the_window_and_the_start():
  t = AlarmConfig(window=3, reference=4)
  found = alarms.history(rows(10, 20, 10, 20, 4, 4, 4, 4), t, ())
  # Start 15, limit 4.5; means over three rows: 11.3, 9.3, 4.0.
  assert spans(found) == [("exploration", 6, None)]
  assert (found[0].value, found[0].limit) == pytest.approx((4.0, 4.5))
  assert alarms.history(rows(10, 20, 10), t, ()) == []  # The start is not known yet.


def test_a_run_that_starts_truncated_is_told_so():
  found = alarms.history(rows(*[0.9] * 12, tag="truncated"), AlarmConfig(), ())
  assert spans(found) == [("truncation", 9, None)]


@pytest.mark.parametrize("kind", ["exploration", "entropy_low"])
def test_a_solved_task_has_nothing_left_to_explore(kind):
  def run(accuracy):
    return [healthy(s, accuracy=accuracy, **(TROUBLE[kind][0] if s >= 20 else {})) for s in range(40)]

  assert alarms.history(run(0.97), SHORT, BUDGETS) == []
  assert [a.kind for a in alarms.history(run(0.93), SHORT, BUDGETS)] == [kind]
  assert [a.kind for a in alarms.history(run(None), SHORT, BUDGETS)] == [kind]
  assert [a.kind for a in alarms.history(run(0.97), dataclasses.replace(SHORT, solved=1.0), BUDGETS)] == [kind]


@pytest.mark.parametrize("kind", sorted(set(TROUBLE) - {"exploration", "entropy_low"}))
def test_other_troubles_are_troubles_of_a_solved_task_too(kind):
  run = [healthy(s, accuracy=1.0, **(TROUBLE[kind][0] if s >= 20 else {})) for s in range(40)]
  assert [a.kind for a in alarms.history(run, SHORT, BUDGETS)] == [kind]


def test_sentences_that_were_never_said_are_not_dying():
  quiet = [healthy(s, **{f"budget_{b}/{t}": v for b in BUDGETS for t, v in (
      ("sentence_probability", 1e-9 * (1.5 if s % 2 else 0.5)), ("sentence_logp", -21.0))}) for s in range(60)]
  assert alarms.history(quiet, AlarmConfig(), BUDGETS) == []
  # Rises from nothing, then goes: compared with its highest, not with its start.
  level = [1e-9] * 20 + [0.4] * 20 + [1e-4] * 20
  risen = [healthy(s, **{f"budget_{b}/sentence_probability": p for b in BUDGETS}) for s, p in enumerate(level)]
  (alarm,) = alarms.history(risen, AlarmConfig(), BUDGETS)
  assert alarm.kind == "sentence" and 40 <= alarm.step < 50


def test_probabilities_below_what_a_float_holds():
  gone = [healthy(s, **{f"budget_{b}/{t}": v for b in BUDGETS for t, v in (
      ("sentence_probability", 0.0), ("sentence_logp", -800.0 if s < 20 else -900.0))}) for s in range(40)]
  (alarm,) = alarms.history(gone, SHORT, BUDGETS)
  assert alarm.kind == "sentence" and alarm.limit == pytest.approx(-800 + math.log(2) - 4)


def test_missing_tags_nulls_and_no_budgets_never_raise():
  run = [healthy(s) for s in range(30)]
  for tag in run[0]:
    if tag != "step":
      for value in (None, math.nan, math.inf):
        alarms.history([row | {tag: value} for row in run], SHORT, BUDGETS)
      alarms.history([{k: v for k, v in row.items() if k != tag} for row in run], SHORT, BUDGETS)
  assert alarms.history([{"step": 0}, {"step": 1}], SHORT, ()) == []
  # A gap does not end an alarm, and is no value.
  gap = alarms.history(rows(0.9, 0.9, 0.9, 0.9, None, math.nan, 0.9, tag="truncated"), SHORT, ())
  assert spans(gap) == [("truncation", 3, None)]
  assert alarms.history(rows(0, 0, 0, 0, math.inf, 0, tag="truncated"), SHORT, ()) == []
  (fallen,) = alarms.history(rows(math.nan, *[10] * 6, *[1] * 4), SHORT, ())
  assert (fallen.kind, fallen.step) == ("exploration", 10)


def test_a_non_finite_update_rings_at_once_and_until_a_window_without():
  found = alarms.history(rows(0, 1, 0, 0, 2, 0, 0, 0, 0, 0, 1, tag="update/nonfinite"), SHORT, ())
  assert spans(found) == [("nonfinite", 1, 8), ("nonfinite", 10, None)]


SPIKE = {"update/grad_norm": 30.0}


def test_a_gradient_spike_rings_at_once_against_the_median_before_it():
  run = [healthy(s, **(SPIKE if s in (20, 22) else {})) for s in range(60)]
  (alarm,) = alarms.history(run, SHORT, BUDGETS)
  assert (alarm.kind, alarm.step, alarm.cleared_step) == ("grad_spike", 20, 26)
  assert (alarm.value, alarm.limit) == (30.0, 5.0)
  assert "30, more than 10 times 0.5" in alarm.text and "optimizer.learning_rate" in alarm.text
  # Up to the factor nothing rings, nor with the threshold off, nor without a window to compare with.
  below = [healthy(s, **({"update/grad_norm": 5.0} if s == 20 else {})) for s in range(60)]
  assert alarms.history(below, SHORT, BUDGETS) == []
  assert alarms.history(run, dataclasses.replace(SHORT, grad_spike=0.0), BUDGETS) == []
  assert alarms.history([healthy(s, **(SPIKE if s == 3 else {})) for s in range(20)], SHORT, BUDGETS) == []


def test_the_median_follows_a_new_level_and_has_nothing_to_say_of_zeros():
  level = alarms.history([healthy(s, **(SPIKE if s >= 20 else {})) for s in range(60)], SHORT, BUDGETS)
  assert spans(level) == [("grad_spike", 20, 25)]
  zeros = [healthy(s, **{"update/grad_norm": 1.0 if s == 20 else 0.0}) for s in range(40)]
  assert alarms.history(zeros, SHORT, BUDGETS) == []


def test_a_resumed_watch_is_as_if_it_had_never_stopped(tmp_path):
  run = []
  for step in range(80):
    row = healthy(step, truncated=0.5 if 10 <= step < 30 or step > 60 else 0.0, length_spread=100.0 / (1 + step / 8))
    run.append(row | {"update/nonfinite": 1.0 if step in (33, 70) else None if step == 34 else 0.0})
  path = tmp_path / "metrics.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in run))
  read = [json.loads(line) for line in path.read_text().splitlines()]
  whole = alarms.history(read, SHORT, BUDGETS)
  assert {a.kind for a in whole} == {"truncation", "exploration", "nonfinite"} and len(whole) == 5
  for cut in (0, 1, 12, 35, 79):
    live = alarms.Watch(SHORT, BUDGETS)
    raised = []
    for row in run[:cut]:
      raised += live.observe(row["step"], row)
    again = alarms.Watch(SHORT, BUDGETS)
    again.replay(read[:cut])
    assert again.active == live.active and again.alarms == live.alarms
    raised += [alarm for row in read[cut:] for alarm in again.observe(row["step"], row)]
    assert again.alarms == whole
    assert [(a.kind, a.step) for a in raised] == [(a.kind, a.step) for a in whole]
    assert again.active == [a for a in whole if a.cleared_step is None]


@pytest.mark.parametrize("kind, off", [
    ("exploration", {"length_spread": 0.0}), ("sentence", {"sentence_drop": 0.0}),
    ("entropy_low", {"entropy_low": 0.0}), ("entropy_high", {"entropy_high": 0.0}),
    ("clipping", {"clip_share": 0.0}), ("truncation", {"truncated": 0.0}),
    ("ratio", {"ratio_max": 0.0}), ("sampler_gap", {"sampler_gap": 0.0}),
    ("timeouts", {"timeouts": 0.0}), ("no_signal", {"zero_variance": 0.0}), ("nonfinite", {"nonfinite": False})])
def test_each_can_be_turned_off(kind, off):
  run = [healthy(s, **(TROUBLE[kind][0] if s >= 20 else {})) for s in range(60)]
  assert alarms.history(run, dataclasses.replace(SHORT, **off), BUDGETS) == []


def test_every_threshold_is_documented():
  for field in dataclasses.fields(AlarmConfig):
    assert field.metadata["help"].endswith(".")
