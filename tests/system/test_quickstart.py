"""The shipped configs that run on a CPU, each through one command."""

import json
import subprocess
import sys

import pytest

from tests.system import runs


def run(name: str, workdir, *extra: str) -> dict:
  """The summary of the config's run, which begins with its warm start, as `make quickstart` runs it."""
  done = subprocess.run(
      [sys.executable, "-m", "hbpo_jax", "train", f"--config={name}", f"--workdir={workdir}", *extra],
      env=runs.environment(), capture_output=True, text=True, timeout=2400)
  assert done.returncode == 0, done.stderr
  return json.loads((workdir / "summary.json").read_text())


def test_smoke_runs_every_stage(tmp_path):
  summary = run("smoke", tmp_path)
  assert summary["measured_on"] == "evaluation" and summary["steps"] == 3
  assert {row["level"] for row in summary["base"]["by_level"]} == {1, 2}
  assert [row["step"] for row in runs.rows(tmp_path / "metrics.jsonl")] == [0, 1, 2]
  assert len(runs.rows(tmp_path / "eval" / "trained" / "responses" / "eval.jsonl")) == 16
  for file in ("run.json", "summary.md", "plots/difficulty.png", "plots/length_by_budget.png", "export/config.json"):
    assert (tmp_path / file).exists(), file
  assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_quickstart_learns(tmp_path, seed):
  """Far fewer tokens, no less accuracy, tokens that rise with difficulty; each seed with its own warm start."""
  summary = run("quickstart", tmp_path, f"--config.seed={seed}")
  base, trained = summary["base"], summary["trained"]
  assert trained["mean_tokens"] <= 0.6 * base["mean_tokens"]
  assert trained["accuracy"] >= base["accuracy"]
  tokens = [row["tokens"] for row in trained["by_level"]]
  assert tokens == sorted(tokens) and tokens[-1] > 2 * tokens[0]
