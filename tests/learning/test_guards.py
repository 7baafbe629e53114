"""Numbers that are not finite: noticed, named, dumped with the state they met, and kept from the weights."""

import errno
import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hbpo_jax.config import CheckpointConfig
from hbpo_jax.learning import checkpoint, dumps, guards, survey
from hbpo_jax.learning.checkpoint import Checkpointer
from hbpo_jax.structs import Rollouts
from tests.learning import tiny

N, Q = 4, 2  # Minibatches of a step, queries of each.
BAD = (1, 3)


class Run:
  """A Guard with all that it needs, in a directory of its own. `said`: what it printed."""

  def __init__(self, folder, **settings):
    self.cfg = tiny.make_cfg(learner={"minibatches": N, **settings})
    self.learner = tiny.make_learner(learner={"minibatches": N})
    self.checkpoints = Checkpointer(folder / "checkpoints", CheckpointConfig(max_to_keep=3))
    self.dumps = dumps.Dumps(folder / "dumps", self.cfg.learner.max_dumps, {"versions": {}})
    self.folder, self.said = folder, []
    self.guard = self.make_guard()
    self.state = self.fresh()

  def fresh(self):
    return self.learner.new_state(tiny.make_params(self.learner))

  def make_guard(self, start=0):
    return guards.Guard(
        self.cfg, self.learner, self.checkpoints, self.dumps, self.fresh, self.said.append, self.folder, start)

  def step(self, number, batches, bad_data=None):
    self.state, updates, further = self.guard.update(number, self.state, batches, bad_data or {})
    return updates, further

  def incidents(self):
    path = self.folder / guards.INCIDENTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def run(tmp_path):
  made = []

  def make(**settings):
    made.append(Run(tmp_path, **settings))
    return made[-1]

  yield make
  for one in made:
    one.guard.close()
    one.checkpoints.close()


@pytest.fixture(scope="module")
def good():
  """The minibatches of a step, in which nothing is wrong."""
  learner = tiny.make_learner(learner={"minibatches": N})
  params = tiny.make_params(learner)
  return [
      learner.place(tiny.with_own_logps(learner, params, tiny.make_batch(seed, rows=8), seed)) for seed in range(N)]


def spoil(batch, field="advantage_RC", value=jnp.nan):
  return batch.replace(**{field: getattr(batch, field).at[0].set(value)})


def spoilt(good, **how):
  return [spoil(batch, **how) if m in BAD else batch for m, batch in enumerate(good)]


def test_bad_updates_are_skipped_and_all_others_are_done_in_order(run, good):
  this = run()
  updates, further = this.step(5, spoilt(good))
  assert [int(u["nonfinite"]) for u in updates] == [0, 1, 0, 1] and further == {}
  expected = this.fresh()
  for m in (0, 2):
    expected, metrics = this.learner.update(expected, good[m])
    assert updates[m]["loss"] == float(metrics["loss"])
  tiny.assert_trees_equal(this.state, expected)
  assert this.guard.in_a_row == 1
  rows = this.incidents()
  assert [(r["step"], r["minibatch"], r["action"], r["first"]) for r in rows] == [
      (5, m, "skipped", "batch.advantage_RC") for m in BAD]
  assert "step 5, minibatch 1: loss nan" in this.said[0] and "hbpo_jax.replay" in this.said[0]


def test_a_healthy_step_costs_one_look_of_the_host(run, good, monkeypatch):
  this = run()
  looks, get = [], jax.device_get
  monkeypatch.setattr(jax, "device_get", lambda x: looks.append(x) or get(x))
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  waits, wait = [], jax.block_until_ready
  monkeypatch.setattr(jax, "block_until_ready", lambda x: waits.append(x) or wait(x))
  this.step(0, good)
  assert len(looks) == 1 and not waits and this.said == []
  assert not (this.folder / guards.INCIDENTS).exists() and not (this.folder / "dumps").exists()


def test_the_dump_holds_the_state_that_the_bad_minibatch_met(run, good):
  this = run()
  before, _ = this.learner.update(this.fresh(), good[0])
  expected = [checkpoint.fingerprint(before)]
  before, _ = this.learner.update(before, good[2])
  expected.append(checkpoint.fingerprint(before))
  bad = spoilt(good)
  this.step(7, bad)
  for m, sums in zip(BAD, expected, strict=True):
    dump = dumps.read(this.folder / "dumps" / f"step_000007_m{m}")
    assert (dump.step, dump.minibatch, dump.forced) == (7, m, False)
    assert checkpoint.fingerprint(dump.state(this.learner.abstract_state())) == sums
    for name in ("tokens_RT", "completion_mask_RC", "advantage_RC", "logp_old_RC"):
      np.testing.assert_array_equal(getattr(dump.batch, name), tiny.host(getattr(bad[m], name)))
    assert math.isnan(dump.metrics["loss"]) and dump.metrics["nonfinite"] == 1


FAULTS = {
    "advantage": (dict(), "batch.advantage_RC"),
    "old": (dict(field="logp_old_RC"), "batch.logp_old_RC"),
    # Every element of the gradient is finite; the sum of their squares is not.
    "overflow": (dict(value=1e30), None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_tensor_that_is_not_finite_is_named(run, good, fault):
  this = run()
  how, expected = FAULTS[fault]
  this.step(0, [good[0], spoil(good[1], **how)])
  (row,) = this.incidents()
  assert row["first"] == expected
  if expected is None:
    assert row["nonfinite"] == {} and row["grad_norm"] == "inf"
    assert re.search("every tensor is finite, but sums .*largest gradient is .*e\\+.*, in gradient", this.said[0])
    return
  assert row["nonfinite"][expected] > 0
  # Counts are of the tokens that carry loss; the first is where it is.
  dump = dumps.read(row["dump"])
  (entry,) = [e for e in dump.entries if e.name == row["first"]]
  assert entry.first[0] == 0 and entry.n_nonfinite == int(dump.batch.completion_mask_RC[0].sum())
  assert {e.name for e in survey.nonfinite(dump.entries) if e.name.startswith("gradient")} == {
      e.name for e in dump.entries if e.name.startswith("gradient")}


def test_a_parameter_that_is_not_finite_is_named_and_ends_a_run_that_only_skips(run, good):
  this = run()
  kernel = this.state.params["layers"]["up"]
  this.state = this.state.replace(params=this.state.params | {
      "layers": this.state.params["layers"] | {"up": kernel.at[1, 2, 3].set(jnp.inf)}})
  with pytest.raises(guards.NonfiniteError, match=(
      r"step 3, minibatch 0: .* is params.layers.up \(1 of [\d,]+ elements, the first at \[1, 2, 3\]\).*Dump: .*"
      "set learner.nonfinite='rollback'|Set learner.nonfinite='rollback'")):
    this.step(3, good)
  assert [r["action"] for r in this.incidents()] == ["stopped"]


@pytest.mark.parametrize("name", guards.OF_THE_HOST)
def test_data_that_are_not_finite_skip_their_minibatch_although_its_loss_is_finite(run, good, name):
  logp = np.zeros((N * Q, 2, 3), np.float32)
  rollouts = lambda bad: Rollouts((), (), (bad, logp), None, None, None)
  values = {n: np.zeros((N * Q, 2, 2)) for n in guards.OF_THE_HOST}
  assert guards.suspects(rollouts(logp), *(values[n] for n in guards.OF_THE_HOST[1:])) == {}
  spoilt_logp = logp.copy()
  if name == guards.OF_THE_HOST[0]:
    spoilt_logp[5, 1, 2] = -np.inf
  else:
    values[name][5, 0, 1] = np.inf
  bad_data = guards.suspects(rollouts(spoilt_logp), *(values[n] for n in guards.OF_THE_HOST[1:]))
  assert list(bad_data) == [name]

  this = run()
  updates, _ = this.step(0, good, bad_data)
  assert [int(u["nonfinite"]) for u in updates] == [0, 0, 1, 0], "query 5 is in minibatch 2"
  assert math.isfinite(updates[2]["loss"])
  expected = this.fresh()
  for m in (0, 1, 3):
    expected, _ = this.learner.update(expected, good[m])
  tiny.assert_trees_equal(this.state, expected)
  (row,) = this.incidents()
  assert row["first"] == name and dumps.read(row["dump"]).forced


def test_stop_ends_at_the_first(run, good):
  this = run(nonfinite="stop")
  with pytest.raises(guards.NonfiniteError, match="step 2, minibatch 1: loss nan.*batch.advantage_RC.*learning_rate"):
    this.step(2, spoilt(good))
  assert (this.folder / "dumps" / "step_000002_m1").is_dir()
  assert [(r["minibatch"], r["action"]) for r in this.incidents()] == [(1, "stopped")]


@pytest.mark.parametrize("limit, reached", [(0, False), (2, True), (3, False)])
def test_the_limit_counts_bad_updates_in_a_row_over_steps(run, good, limit, reached):
  this = run(max_nonfinite=limit)
  this.step(0, [*good[:3], spoil(good[3])])
  this.guard.check_limit(0)
  assert this.guard.in_a_row == 1
  this.step(1, [spoil(good[0]), *good[1:]])  # Two in a row, then one that is applied.
  assert this.guard.limit_reached == reached and this.guard.in_a_row == 0
  if reached:
    with pytest.raises(guards.NonfiniteError, match=(
        r"max_nonfinite=2 updates in a row .* step 1, minibatch 0: .*after step 1 is saved")):
      this.guard.check_limit(1)
  else:
    this.guard.check_limit(1)


def test_a_rollback_takes_the_newest_checkpoint_or_the_first_weights_and_leaves_the_rest_of_the_step(run, good):
  this = run(nonfinite="rollback")
  updates, further = this.step(2, spoilt(good))
  assert len(updates) == 2 and further == {"guard/restored_step": 0.0}
  tiny.assert_trees_equal(this.state.replace(step=0), this.fresh().replace(step=0))
  assert int(this.state.step) == 2, "the count goes on, and with it the data"

  this.step(3, good)
  this.state = this.state.replace(step=this.state.step + 1)
  kept = tiny.host(this.state)
  this.checkpoints.save(3, this.state.replace(step=jnp.asarray(3, jnp.int32)), {})
  this.step(4, good)
  _, further = this.step(5, spoilt(good))
  assert further == {"guard/restored_step": 3.0} and int(this.state.step) == 5
  tiny.assert_trees_equal(this.state.params, kept.params)
  tiny.assert_trees_equal(this.state.opt_state, kept.opt_state)
  assert int(this.state.update) == int(kept.update) == 4
  assert [r["action"] for r in this.incidents()] == [f"went back to the state of step {n}" for n in (0, 3)]
  this.step(6, good)
  assert int(this.state.update) == 8


def test_a_rollback_to_weights_that_are_not_finite_ends_the_run(run, good):
  this = run(nonfinite="rollback")

  def bad_weights():
    state = this.fresh()
    return state.replace(params=state.params | {"embed": state.params["embed"].at[0, 0].set(jnp.nan)})

  this.guard._fresh = bad_weights
  with pytest.raises(guards.NonfiniteError, match=r"state of step 0, which is not finite itself: params.embed \(1 of"):
    this.step(0, spoilt(good))


def test_a_state_that_is_not_finite_is_not_saved(run):
  this = run()
  assert this.guard.check_save(4, this.state, last=False)
  moment = lambda path, x: x.at[0].set(jnp.inf) if ".mu" in jax.tree_util.keystr(path) and x.ndim else x
  bad = this.state.replace(opt_state=jax.tree_util.tree_map_with_path(moment, this.state.opt_state))
  with pytest.raises(guards.NonfiniteError, match=r"after step 3, opt_state.*mu.* not finite.*nothing was saved"):
    this.guard.check_save(4, bad, last=False)
  this = run(nonfinite="rollback")
  assert not this.guard.check_save(4, bad, last=False) and "will go back" in this.said[0]
  with pytest.raises(guards.NonfiniteError):
    this.guard.check_save(4, bad, last=True)


def test_no_more_dumps_than_asked_for_and_none_twice(run, good):
  this = run(max_dumps=1)
  this.step(0, spoilt(good))
  folder = this.folder / "dumps"
  assert [p.name for p in folder.iterdir()] == ["step_000000_m1"]
  stamp = (folder / "step_000000_m1" / "meta.json").stat().st_mtime_ns
  this.state, said = this.fresh(), this.said
  this.guard.close()
  this.guard = this.make_guard()
  this.step(0, spoilt(good))  # As a resumed run repeats the step.
  assert [p.name for p in folder.iterdir()] == ["step_000000_m1"]
  assert (folder / "step_000000_m1" / "meta.json").stat().st_mtime_ns == stamp
  assert len([line for line in said if "step_000000_m1" in line]) == 2
  shutil.rmtree(folder)
  none = run(max_dumps=0)  # Starts at 0, so that the rows before are dropped.
  none.step(1, spoilt(good))
  assert not folder.exists() and "batch.advantage_RC" in none.said[0]


@pytest.mark.parametrize("fault", ["save", "rename", "space"])
def test_a_full_disk_costs_the_dump_and_nothing_else(run, good, monkeypatch, caplog, fault):
  this = run()

  def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")

  if fault == "save":
    monkeypatch.setattr(Checkpointer, "save", full)
  elif fault == "rename":
    monkeypatch.setattr(dumps.os, "replace", full)
  else:
    size = sum(x.nbytes for x in jax.tree.leaves(this.state))
    monkeypatch.setattr(dumps.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 2 * size))
  this.step(0, spoilt(good))
  assert "went on" not in caplog.text and caplog.text.count("the run goes on without it") == 2
  assert list((this.folder / "dumps").iterdir()) == []
  assert [r["dump"] for r in this.incidents()] == [None, None]


def test_incidents_that_cannot_be_written_cost_the_row(run, good, monkeypatch, caplog):
  this = run(max_dumps=0)

  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(guards, "StepFile", full)
  this.step(0, spoilt(good))
  assert "incidents.jsonl could not be written" in caplog.text


def test_a_resumed_run_writes_its_incidents_once(run, good):
  this = run(max_dumps=0)
  this.step(3, spoilt(good))
  this.step(4, spoilt(good))
  this.guard.close()
  this.guard = this.make_guard(start=4)
  assert [r["step"] for r in this.incidents()] == [3, 3]
  this.step(4, spoilt(good))
  assert [(r["step"], r["minibatch"]) for r in this.incidents()] == [(3, 1), (3, 3), (4, 1), (4, 3)]


@pytest.mark.parametrize("damage, message", [
    (lambda d: shutil.rmtree(d / "state"), "state does not exist"),
    (lambda d: (d / "meta.json").write_text("{"), "meta.json is damaged"),
    (lambda d: (d / "batch.npz").write_bytes(b"PK"), "is damaged"),
    (lambda d: np.savez(d / "batch.npz", tokens_RT=np.array([{}], object)), "is damaged"),
    (lambda d: _edit(d, schema=99), "schema 99, and this version of hbpo_jax reads schema 1"),
])
def test_a_dump_that_cannot_be_read_is_refused_in_one_sentence(run, good, damage, message):
  this = run(max_dumps=1)
  this.step(0, spoilt(good))
  folder = this.folder / "dumps" / "step_000000_m1"
  damage(folder)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    dumps.read(folder)


def _edit(folder, **changes):
  meta = json.loads((folder / "meta.json").read_text())
  (folder / "meta.json").write_text(json.dumps(meta | changes))


def test_a_survey_is_the_same_on_any_mesh():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(8, 6, 4)).astype(np.float32)
  x[5, 2, 1], x[7, 0, 0] = np.nan, -np.inf
  mesh = tiny.make_mesh(8)
  split = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp")))
  (one,), (many,) = survey.take("x", x), survey.take("x", split)
  assert one == many and one.first == (5, 2, 1) and (one.n, one.n_nonfinite) == (192, 2)
  assert one.largest == np.abs(x[np.isfinite(x)]).max()
  assert survey.from_json(json.loads(json.dumps(survey.to_json([one])))) == [one]
  (count,) = survey.take("n", np.arange(5, dtype=np.int32))
  assert (count.n_nonfinite, count.first, count.largest) == (0, (), 4.0)
