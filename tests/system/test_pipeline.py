"""Rollouts of the next batch while this one is learnt from: what is stale, what is not, and the same after a resume."""

import jax
import numpy as np
import pytest

from hbpo_jax import train
from tests.system import runs

ONE_STEP_OFF = {"pipeline": "one_step_off", "loss.importance_cap": 2.0}


def run(monkeypatch, inputs, workdir, n_devices=1, **changes):
  """The run's metric rows, in this process."""
  monkeypatch.setattr(jax, "devices", lambda *a, devices=jax.devices()[:n_devices]: devices)
  monkeypatch.setattr(jax, "device_count", lambda: n_devices)
  train.main(runs.make_config(runs.settings(inputs) | changes), str(workdir))
  return runs.rows(workdir / "metrics.jsonl")


def assert_same_export(one, other):
  expected, got = runs.exported(one), runs.exported(other)
  assert expected.keys() == got.keys()
  for name in expected:
    np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def test_with_a_checkpoint_after_every_step_it_is_the_on_policy_run(inputs, tmp_path, monkeypatch):
  on_policy = {"loss.importance_cap": 2.0, "steps": 2}
  run(monkeypatch, inputs, tmp_path / "on", **on_policy)
  run(monkeypatch, inputs, tmp_path / "off", **(on_policy | ONE_STEP_OFF))
  assert_same_export(tmp_path / "on", tmp_path / "off")


@pytest.mark.parametrize("n_devices", [1, 2])
def test_batches_are_one_update_old_but_after_a_checkpoint_and_a_resume_repeats_them(
    inputs, tmp_path, monkeypatch, n_devices):
  settings = ONE_STEP_OFF | {
      "steps": 6, "checkpoint.save_every": 3, "optimizer.learning_rate": 1e-2, "mesh.rollout_devices": n_devices - 1}
  rows = run(monkeypatch, inputs, tmp_path / "whole", n_devices, **settings)
  for row in rows:
    fresh = row["step"] in (0, 3)
    assert (row["sampler/sampler_gap_max"] < 1e-4) == fresh, row["step"]
    assert (abs(row["update/importance_mean"] - 1) < 1e-5) == fresh, row["step"]
    assert row["time/step_s"] >= row["time/score_s"] + row["time/update_s"]

  run(monkeypatch, inputs, tmp_path / "cut", n_devices, **(settings | {"steps": 3}))
  run(monkeypatch, inputs, tmp_path / "cut", n_devices, **settings)
  assert_same_export(tmp_path / "whole", tmp_path / "cut")
