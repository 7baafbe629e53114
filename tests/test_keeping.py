"""What a stop saves, and what it must not."""

import types

import pytest

from hbpo_jax import bucket, config, keeping, preemption
from hbpo_jax.clocks import WallClock
from hbpo_jax.rollout import shelf
from tests.rollout.test_shelf import LEDGER, make_rollouts


class Checkpoints:
  """Remembers what is saved."""

  def __init__(self, *steps):
    self.saved = dict.fromkeys(steps)

  def steps(self):
    return sorted(self.saved)

  def wait(self):
    pass

  def due(self, step, *, last):
    return False

  def save(self, step, state, meta):
    if step not in self.saved:
      self.saved[step] = meta


def make_keeper(folder, checkpoints, *, finite=True, evaluations=None):
  nothing = lambda *_, **__: None
  guard = types.SimpleNamespace(in_a_row=2, limit_reached=False, check_save=lambda *_, **__: finite)
  return keeping.Keeper(
      config.Config(steps=9), folder, checkpoints, evaluations or types.SimpleNamespace(due=lambda step: False),
      types.SimpleNamespace(forget_before=nothing), guard, types.SimpleNamespace(flush=nothing, annotate=nothing),
      WallClock())


def stop(keeper, step, ahead=None):
  with pytest.raises(preemption.Stopped) as stopped:
    keeper.stop(step, "state", {"at": step}, ahead, LEDGER)
  return str(stopped.value)


def test_a_stop_saves_the_state_with_the_position_of_the_data(tmp_path):
  checkpoints = Checkpoints(3)
  assert stop(make_keeper(tmp_path, checkpoints), 5).startswith("the state after 5 of 9 steps is saved, in ")
  assert checkpoints.saved[5]["data_state"] == {"at": 5} and checkpoints.saved[5]["nonfinite_in_a_row"] == 2
  assert not (tmp_path / shelf.FOLDER).exists()


def test_nothing_is_saved_before_the_first_step_or_of_a_state_that_is_not_finite(tmp_path):
  checkpoints = Checkpoints()
  assert stop(make_keeper(tmp_path, checkpoints), 0) == "no step was done yet"
  assert "is not finite and was not saved" in stop(make_keeper(tmp_path, checkpoints, finite=False), 4)
  assert checkpoints.saved == {}


def test_rollouts_from_older_weights_are_kept_beside_the_state(tmp_path):
  checkpoints = Checkpoints(3)
  stop(make_keeper(tmp_path, checkpoints), 5, make_rollouts())
  rollouts, ledger = shelf.load(shelf.path_of(tmp_path, 5), checkpoints.saved[5]["ahead"])
  assert ledger == LEDGER and (rollouts.n_gen_BGJ == make_rollouts().n_gen_BGJ).all()
  before = shelf.path_of(tmp_path, 5).stat().st_mtime_ns
  stop(make_keeper(tmp_path, checkpoints), 5, make_rollouts())  # Told so again, before it got any further.
  assert shelf.path_of(tmp_path, 5).stat().st_mtime_ns == before


def test_a_stop_in_an_evaluation_leaves_it_to_the_resumed_run(tmp_path):
  asked = []

  def during(step, state, meta):
    asked.append(step)
    if len(asked) == 1:
      raise preemption.Stopped("half of it is stored")
    return {"eval/accuracy": 0.5}

  evaluations = types.SimpleNamespace(due=lambda step: step == 4, during=during)
  checkpoints, rows = Checkpoints(), []
  keeper = make_keeper(tmp_path, checkpoints, evaluations=evaluations)
  keeper.log.amend = lambda step, metrics: rows.append((step, metrics))
  with pytest.raises(preemption.Stopped, match="the state after 4 of 9 steps"):
    keeper.after(3, "state", {"at": 4})
  assert checkpoints.saved[4]["unmeasured"]
  keeper.catch_up(4, "state", checkpoints.saved[4])
  assert rows == [(3, {"eval/accuracy": 0.5})] and asked == [4, 4]
  keeper.catch_up(4, "state", {"data_state": {}})
  assert asked == [4, 4]


def test_a_checkpoint_waits_until_the_bucket_has_the_one_before_it(tmp_path, monkeypatch):
  checkpoints, order = Checkpoints(3), []
  monkeypatch.setattr(bucket, "settle", lambda: order.append(checkpoints.steps()))
  checkpoints.due = lambda step, *, last: step == 6
  keeper = make_keeper(tmp_path, checkpoints)
  keeper.after(4, "state", {"at": 5})
  keeper.after(5, "state", {"at": 6})
  assert order == [[3]] and checkpoints.steps() == [3, 6]
  stop(keeper, 7)
  assert order == [[3]], "whoever is told to stop has no time to lose; the end of the run waits for the bucket"
