"""Whole runs in which numbers stop being finite: what they say, what they keep, and that a resume repeats it all."""

import contextlib
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hbpo_jax import flags, replay, train
from hbpo_jax.learning import guards
from tests.system import runs


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda *a, devices=jax.devices()[:1]: devices)
  monkeypatch.setattr(jax, "device_count", lambda: 1)


def run(inputs, workdir, **changes):
  """The rows of the run's metrics."""
  settings = runs.settings(inputs, steps=5, checkpoint__save_every=2, learner__max_dumps=1) | {
      name.replace("__", "."): value for name, value in changes.items()}
  train.main(runs.make_config(settings), str(workdir))
  return runs.rows(workdir / "metrics.jsonl")


def stable(rows):
  volatile = ("time/", "tokens_per_s", "learn/", "memory/")
  return [{k: v for k, v in row.items() if not k.startswith(volatile)} for row in rows]


@contextlib.contextmanager
def fault(kind, step, minibatch=1):
  """In the named step: an advantage of NaN, a rollout's log-probability of NaN, or a parameter of infinity."""
  update, generate = guards.Guard.update, train.Trainer._generate

  def faulty_update(self, at, state, minibatches, bad_data):
    if at == step and kind == "advantage":
      minibatches = list(minibatches)
      batch = minibatches[minibatch]
      minibatches[minibatch] = batch.replace(advantage_RC=batch.advantage_RC.at[0].set(jnp.nan))
    if at == step and kind == "parameter":
      norm = state.params["norm"].at[3].set(jnp.inf)
      state = state.replace(params=state.params | {"norm": norm})
    return update(self, at, state, minibatches, bad_data)

  def faulty_generate(self, at, *args):
    generated = generate(self, at, *args)
    if at == step and kind == "sampler":
      logp = [x.copy() for x in generated.rollouts.logp_sampler]
      logp[1][3, 0, 5] = np.nan  # Query 3 is in minibatch 1.
      generated = dataclasses.replace(generated, rollouts=generated.rollouts.replace(logp_sampler=tuple(logp)))
    return generated

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(guards.Guard, "update", faulty_update)
    patch.setattr(train.Trainer, "_generate", faulty_generate)
    yield


@pytest.mark.parametrize("kind, first", [
    ("advantage", "batch.advantage_RC"), ("sampler", "sampler's log-probability")])
def test_a_fault_costs_one_update_and_its_dump_replays_bit_for_bit(inputs, tmp_path, capsys, kind, first):
  with fault(kind, 2):
    rows = run(inputs, tmp_path / "run")
  assert [row["update/nonfinite"] for row in rows] == [0, 0, 1, 0, 0]
  (incident,) = runs.rows(tmp_path / "run" / "incidents.jsonl")
  assert (incident["step"], incident["minibatch"], incident["first"]) == (2, 1, first)
  assert all(np.isfinite(x).all() for x in runs.exported(tmp_path / "run").values())
  assert f"nonfinite: step 2, minibatch 1: {'loss nan' if kind == 'advantage' else 'loss '}" in capsys.readouterr().out

  # The dump alone is enough, wherever it lies.
  shutil.copytree(incident["dump"], tmp_path / "moved")
  shutil.rmtree(tmp_path / "run")
  assert replay.run(str(tmp_path / "moved"))
  out = capsys.readouterr().out
  assert "reproduced bit for bit" in out and f"first tensor that is not finite: {first}" in out
  assert out.count("row ") >= 8 and "gradient.embed" in out

  if kind == "sampler":
    return
  # Another setting is another update.
  assert not replay.run(str(tmp_path / "moved"), ["--config.rollout.temperature=0.7"])
  assert "instead of the dump's 1.0" in (out := capsys.readouterr().out) and "not reproduced" in out
  meta = json.loads((tmp_path / "moved" / "meta.json").read_text())
  meta["metrics"]["policy_loss"] = "0.125"
  (tmp_path / "moved" / "meta.json").write_text(json.dumps(meta))
  with pytest.raises(SystemExit) as stop:
    train.cli([f"--replay={tmp_path / 'moved'}", "--config=smoke", "--workdir=elsewhere"])
  out = capsys.readouterr().out
  assert stop.value.code == 1 and "recorded as 0.125" in out
  assert "--config=smoke has 3" in out, "the config of the command line is compared, not used"


# A_intra is the mean of rewards minus f2, and their sum is no float32 any more.
OVERFLOWS = {"reward__beta": 3e38, "reward__curve": "cosine", "advantage__intra_coef": 1.0}


def test_a_reward_that_overflows_is_named(inputs, tmp_path):
  run(inputs, tmp_path, steps=1, **OVERFLOWS)
  first, second = runs.rows(tmp_path / "incidents.jsonl")
  assert first["first"] in ("reward", "advantage") and second["dump"] is None, "one dump was asked for"


@pytest.mark.slow
def test_a_rollback_goes_on_with_other_data_and_a_resume_repeats_it(inputs, tmp_path, monkeypatch):
  with fault("parameter", 3):
    rows = run(inputs, tmp_path / "whole", learner__nonfinite="rollback")
    assert [row.get("guard/restored_step") for row in rows] == [None, None, None, 2.0, None]
    assert [row["update/nonfinite"] for row in rows] == [0, 0, 0, 1, 0]
    assert all(np.isfinite(x).all() for x in runs.exported(tmp_path / "whole").values())

    # Ended after the fault, with the checkpoint of step 2 as the newest.
    keep = train.Trainer._keep

    def killed(self, step, *args):
      self.log.flush()
      if step == 3:
        raise KeyboardInterrupt
      keep(self, step, *args)

    with monkeypatch.context() as patch:
      patch.setattr(train.Trainer, "_keep", killed)
      with pytest.raises(KeyboardInterrupt):
        run(inputs, tmp_path / "cut", learner__nonfinite="rollback")
    assert len(runs.rows(tmp_path / "cut" / "metrics.jsonl")) == 4
    again = run(inputs, tmp_path / "cut", learner__nonfinite="rollback")
  assert stable(again) == stable(rows)
  expected, got = runs.exported(tmp_path / "whole"), runs.exported(tmp_path / "cut")
  for name in expected:
    np.testing.assert_array_equal(got[name].view(np.uint8), expected[name].view(np.uint8), err_msg=name)
  incidents = [
      [{k: v for k, v in row.items() if k != "dump"} for row in runs.rows(tmp_path / name / "incidents.jsonl")]
      for name in ("whole", "cut")]
  assert incidents[0] == incidents[1] and incidents[0][0]["action"] == "went back to the state of step 2"
  # The data of the bad step do not come again.
  problems = [row["problem"] for row in runs.rows(tmp_path / "whole" / "samples.jsonl")]
  assert len(problems) > 4


def test_the_limit_ends_a_run_with_one_sentence_and_the_state_saved(inputs, tmp_path, capsys):
  problems = {}
  for pipeline in ("on_policy", "one_step_off"):
    workdir = tmp_path / pipeline
    overrides = runs.settings(
        inputs, steps=5, checkpoint__save_every=0, learner__max_nonfinite=3, pipeline=pipeline, **OVERFLOWS,
        loss__importance_cap=2.0, log__samples_every=1, log__n_samples=16, learner__max_dumps=0)
    # Two bad updates a step: the limit is reached in the second step, and then at once.
    for step in (1, 2):
      with pytest.raises(SystemExit) as stop:
        flags.run(train.main, name="train", description="", argv=runs.arguments(overrides, workdir))
      error = capsys.readouterr().err.strip().splitlines()[-1]
      assert stop.value.code == 2 and "learner.max_nonfinite=3 updates in a row" in error
      assert f"after step {step} is saved" in error
      assert str(step + 1) in [p.name for p in (workdir / "checkpoints").iterdir()]
    assert [row["step"] for row in runs.rows(workdir / "metrics.jsonl")] == [0, 1, 2], "one step more, and none twice"
    problems[pipeline] = [(row["step"], row["problem"]) for row in runs.rows(workdir / "samples.jsonl")]
  # What was drawn ahead when the run ended is drawn again.
  assert problems["on_policy"] == problems["one_step_off"]


def test_weights_that_are_not_finite_end_a_run_that_only_skips_and_spoil_no_checkpoint(inputs, tmp_path):
  with fault("parameter", 3), pytest.raises(guards.NonfiniteError, match="params.norm .*rollback"):
    run(inputs, tmp_path)
  assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal()] == ["2"]
