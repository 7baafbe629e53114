"""The worked example, for real on a tiny model; and from the same run, that the pages name every metric and file."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest

from hbpo_jax import flags, user_code
from tests import checkpoints
from tests.docs import markdown

EXAMPLE = markdown.ROOT / "examples" / "sort_words.py"
SMALL = {
    "steps": 2, "model.compute_dtype": "float32", "data.limit": 64, "data.n_eval": 4, "rollout.budgets": "24,32",
    "rollout.queries": 2, "rollout.rollouts_per_query": 2, "rollout.slots": 1, "rollout.length_buckets": "64",
    "reward.max_response_tokens": 40, "learner.microbatch_rows": 0, "eval.batch_queries": 2, "eval.every": 1,
    "eval.n_during": 2, "log.samples_every": 1,
    # Nothing that a random model writes is right, so that all rewards are alike: only A_intra, then -f2, moves it.
    "advantage.intra_coef": 1.0}
# Metrics that this run has not: of devices that report more, and of what is off.
ELSEWHERE = {
    "learn/mfu", "memory/peak_gib", "guard/restored_step", "objective/intra_gate", "objective/penalty",
    "objective/gate_share", "objective/limit", "objective/think_share"}
# Files that it has not.
NOT_HERE = {"adapter/", "warmstart/", "dumps/", "incidents.jsonl", "stopped.json", "ahead/", "digests.jsonl"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The directory of a training run of the example, two steps on a tiny model."""
  folder = tmp_path_factory.mktemp("example")
  checkpoints.make_checkpoint(folder / "model", "qwen3", hidden=32, n_layers=1)
  done = subprocess.run(
      [sys.executable, "-m", "hbpo_jax.train", "--config=examples/sort_words.py", f"--workdir={folder / 'run'}",
       f"--config.model.path={folder / 'model'}", *(f"--config.{name}={value}" for name, value in SMALL.items())],
      cwd=markdown.ROOT, capture_output=True, text=True, timeout=600, env=os.environ | {
          "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
          "PYTHONPATH": str(markdown.ROOT)})
  assert done.returncode == 0, done.stderr[-3000:]
  return folder / "run"


def test_it_is_20_lines():
  source = EXAMPLE.read_text()
  docstrings = {
      line for node in ast.walk(ast.parse(source))
      if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
      for line in range(node.lineno, node.end_lineno + 1)}
  lines = [text for number, text in enumerate(source.splitlines(), 1)
           if text.strip() and not text.strip().startswith("#") and number not in docstrings]
  assert len(lines) <= 20


def test_its_problems():
  make = user_code.load(f"{EXAMPLE}:problems", "data.source")
  rows = list(make())
  assert rows == list(make()), "a run could not be resumed"
  assert {row["level"] for row in rows} == set(range(2, 11))
  for row in rows[:50]:
    assert row["answer"].split() == sorted(row["answer"].split())
    assert sorted(re.findall(r"[a-z]+", row["problem"].partition(":")[2])) == row["answer"].split()


@pytest.mark.parametrize("response,expected", [
    ("hm</think>\namber birch cloud", 1.0), ("hm</think>\nAmber, Birch, Cloud.", 1.0), ("amber birch cloud", 1.0),
    ("hm</think>\nSorted:\namber birch cloud\n", 1.0), ("hm</think>\namber cloud birch", 1 / 3),
    ("hm</think>\ncloud birch amber", 1 / 3), ("hm</think>\namber birch", 2 / 3), ("hm</think>\n", 0.0), ("", 0.0),
    ("hm</think>\namber birch cloud delta", 3 / 4), ("amber birch cloud</think>no idea", 0.0),
    ("a</think>wrong</think>amber birch cloud", 1.0)])
def test_its_reward(response, expected):
  score = user_code.load(f"{EXAMPLE}:score", "reward.grader")
  assert score([response, "x"], [{"answer": "amber birch cloud"}, {"answer": "x"}]) == pytest.approx([expected, 1.0])


def test_its_settings():
  cfg = flags.parse([f"--config={EXAMPLE}", "--workdir=w"]).cfg
  assert cfg.data.source == f"{EXAMPLE}:problems" and cfg.reward.grader == f"{EXAMPLE}:score"
  assert not cfg.data.eval_source and cfg.data.n_eval > 0


def test_it_trains(run):
  rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [0, 1] and all(row["update/nonfinite"] == 0 for row in rows)
  assert any(row["update/grad_norm"] > 0 for row in rows)
  samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
  assert all(s["problem"].startswith("Sort these words") and s["verdict"] in ("correct", "wrong") for s in samples)
  summary = json.loads((run / "summary.json").read_text())
  assert {level["level"] for level in summary["trained"]["by_level"]} <= set(range(2, 11))
  asked = json.loads((run / "run.json").read_text())["config"]
  assert asked["data"]["source"] == "examples/sort_words.py:problems"


def documented(page: str) -> set[str]:
  """What the first cells of a page's tables name."""
  text = (markdown.ROOT / "docs" / page).read_text()
  return {name for row in re.findall(r"(?m)^\|([^|]+)\|", text) for name in re.findall(r"`([^`]+)`", row)}


def test_every_metric_has_its_row(run):
  rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  logged = {re.sub(r"^budget_\d+/", "budget_B/", name) for row in rows for name in row}
  known = documented("metrics.md")
  assert not logged - known, "docs/metrics.md has no row for these"
  assert known - logged == ELSEWHERE, "docs/metrics.md has rows of metrics that no longer exist"


def test_every_file_has_its_row(run):
  there = {p.name + "/" * p.is_dir() for p in run.iterdir()}
  text = (markdown.ROOT / "docs" / "files.md").read_text().split("\n## evaluate\n")[0]
  known = {name for row in re.findall(r"(?m)^\|([^|]+)\|", text) for name in re.findall(r"`([^`]+)`", row)}
  known -= {"--workdir"}
  assert not there - known, "docs/files.md has no row for these"
  assert known - there == NOT_HERE, "docs/files.md has rows of files that no longer exist"
  evaluation = {p.name for p in (run / "eval" / "trained").iterdir()}
  assert evaluation == {"eval.json", "problems", "responses", "results.md", "results.json"}
