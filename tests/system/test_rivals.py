"""Whole runs of other methods: no budget sentence, a reward with memory that resumes bit for bit, forced openings."""

import shutil

import jax
import numpy as np
import pytest

from hbpo_jax import train
from tests.system import runs

PLAIN = {"prompt.budget_sentence": "", "rollout.budgets": (48,), "rollout.caps": (48,), "advantage.intra_coef": 0.0,
         "reward.bonus": 0.0, "reward.curve": "cosine", "log.samples_every": 1, "log.n_samples": 16}


@pytest.fixture
def run(inputs, monkeypatch):
  """Trains on one of the test devices and returns the logged rows."""
  monkeypatch.setattr(jax, "devices", lambda *a, devices=jax.devices()[:1]: devices)
  monkeypatch.setattr(jax, "device_count", lambda: 1)

  def run(workdir, changes):
    train.main(runs.make_config(runs.settings(inputs) | changes), str(workdir))
    return runs.rows(workdir / "metrics.jsonl")

  return run


def stable(rows):
  volatile = ("time/", "tokens_per_s", "learn/", "memory/")
  return [{k: v for k, v in row.items() if not k.startswith(volatile)} for row in rows]


def test_a_reward_with_memory_resumes_bit_for_bit(run, tmp_path):
  changes = PLAIN | {"steps": 3, "reward.form": "adlp", "reward.penalty_start": 1e-3, "reward.penalty_rate": 0.01,
                     "reward.target_accuracy": 0.25, "learner.minibatches": 1}
  whole = run(tmp_path / "whole", changes)
  # lambda_t+1 = max(0, lambda_t + .01 * (accuracy - .25)), from the accuracies that were logged.
  penalty = np.float32(1e-3)
  for row in whole:
    assert row["objective/penalty"] == pytest.approx(penalty, rel=1e-5)
    penalty = max(0.0, penalty + 0.01 * (row["accuracy"] - 0.25))
  assert whole[-1]["objective/penalty"] != whole[0]["objective/penalty"]
  # No sentence: nothing was forced, so there is none to watch, and the responses begin as the model likes.
  assert not any("sentence" in name for name in whole[0])
  texts = [row["response"] for row in runs.rows(tmp_path / "whole" / "samples.jsonl")]
  assert not any(text.startswith("within") for text in texts)

  # As if killed after the first step.
  shutil.copytree(tmp_path / "whole", tmp_path / "again")
  shutil.rmtree(tmp_path / "again" / "export")
  for step in (2, 3):
    shutil.rmtree(tmp_path / "again" / "checkpoints" / str(step))
  assert stable(run(tmp_path / "again", changes)) == stable(whole)
  expected, got = runs.exported(tmp_path / "whole"), runs.exported(tmp_path / "again")
  for name in expected:
    np.testing.assert_array_equal(got[name].view(np.uint8), expected[name].view(np.uint8), err_msg=name)


@pytest.mark.slow
def test_half_of_the_responses_are_forced_not_to_think(run, tmp_path):
  rows = run(tmp_path, PLAIN | {
      "steps": 2, "prompt.openings": ("natural", "</think>"), "rollout.budgets": (24, 48), "rollout.caps": (32, 48),
      "prompt.prefix_weight": 0.5, "reward.form": "adaptthink", "advantage.form": "reference",
      "checkpoint.save_every": 0, "checkpoint.export": False})
  texts = {24: [], 48: []}
  for row in runs.rows(tmp_path / "samples.jsonl"):
    texts[row["budget"]].append(row["response"])
  assert texts[24] and texts[48] and all(text.startswith("</think>") for text in texts[48])
  assert not any(text.startswith("</think>") for text in texts[24])
  # A random model does not close its thoughts: the other half all think.
  assert [row["objective/think_share"] for row in rows] == [0.5, 0.5]
  assert all("budget_48/sentence_probability" in row and "budget_24/sentence_probability" not in row for row in rows)
  for row in rows:  # The bonus is half of the responses' .05.
    assert row["reward"] == pytest.approx(row["accuracy"] + 0.025, abs=1e-6)
