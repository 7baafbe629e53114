"""Which responses are shown, and what a row holds."""

import numpy as np
import pytest

from hbpo_jax import files
from hbpo_jax.config import LogConfig
from hbpo_jax.reporting import samples

B, G, J = 2, 2, 2


def arguments(**changes):
  count = np.arange(B * G * J).reshape(B, G, J)
  return {
      "problems": ["p0", "p1"], "answers": ["a0", "a1"], "budgets": (16, 32), "responses": [f"r{i}" for i in range(8)],
      "verdicts": ["correct", "wrong"] * 4, "n_gen_BGJ": 100 + count, "reward_BGJ": count / 10,
      "advantage_BGJ": -count / 10} | changes


def test_choice_is_deterministic_distinct_and_over_all_budgets():
  chosen = samples.choose(10, (8, 4, 4), 6)
  assert chosen == samples.choose(10, (8, 4, 4), 6)
  assert [g for _, g, _ in chosen] == [0, 1, 2, 3, 0, 1]
  assert len({b for b, _, _ in chosen[:4]}) == 1 and chosen[4][0] != chosen[0][0]
  assert chosen != samples.choose(20, (8, 4, 4), 6)


@pytest.mark.parametrize("step", [0, 7])
def test_every_response_can_be_asked_for_and_none_twice(step):
  shape = (3, 2, 4)
  chosen = samples.choose(step, shape, 1000)
  assert sorted(chosen) == sorted(np.ndindex(*shape))


def test_rows_hold_what_belongs_together(tmp_path):
  log = samples.SampleLog(tmp_path, LogConfig(samples_every=10, n_samples=3))
  rows = log.write(10, **arguments(responses=["x\ud800\x1b[2J"] + [f"r{i}" for i in range(1, 8)]))
  log.close()
  log.close()
  stored = files.read_rows(tmp_path / "samples.jsonl")
  # choose(10, ...) = (0, 0, 0), (0, 1, 0), (1, 0, 0): rows 0, 2, 4 of the responses.
  assert stored == [
      {"step": 10, "problem": "p0", "answer": "a0", "budget": 16, "response": "x\ufffd\x1b[2J", "n_gen": 100,
       "verdict": "correct", "reward": 0.0, "advantage": 0.0},
      {"step": 10, "problem": "p0", "answer": "a0", "budget": 32, "response": "r2", "n_gen": 102,
       "verdict": "correct", "reward": 0.2, "advantage": -0.2},
      {"step": 10, "problem": "p1", "answer": "a1", "budget": 16, "response": "r4", "n_gen": 104,
       "verdict": "correct", "reward": 0.4, "advantage": -0.4},
  ]
  assert [row["n_gen"] for row in rows] == [100, 102, 104]
  assert (tmp_path / "samples.jsonl").read_bytes().isascii()


def test_only_due_steps_and_the_resume_rule(tmp_path):
  log = samples.SampleLog(tmp_path, LogConfig(samples_every=2, n_samples=2))
  assert [len(log.write(step, **arguments())) for step in range(5)] == [2, 0, 2, 0, 2]
  log.close()
  log = samples.SampleLog(tmp_path, LogConfig(samples_every=2, n_samples=2), resume_step=3)
  log.write(4, **arguments())
  log.close()
  assert [row["step"] for row in files.read_rows(tmp_path / "samples.jsonl")] == [0, 0, 2, 2, 4, 4]
  assert not samples.SampleLog(tmp_path, LogConfig(samples_every=0)).due(0)


@pytest.mark.parametrize("name", ["problems", "answers", "budgets", "responses", "verdicts"])
def test_wrong_counts_are_refused(tmp_path, name):
  log = samples.SampleLog(tmp_path, LogConfig())
  with pytest.raises(ValueError, match=name):
    log.write(0, **arguments(**{name: ["1"]}))
  log.close()
