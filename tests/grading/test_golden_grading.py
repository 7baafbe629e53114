"""The golden cases: every certain one, every one of convention, and the hostile ones against the clock."""

import collections
import json
import pathlib
import time

import pytest

from hbpo_jax.grading import Grader, grade


@pytest.fixture(scope="module")
def cases(shared_dir):
  with (shared_dir / "golden" / "grader_cases_public.jsonl").open(encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
  for row in rows:
    if "response" not in row:
      row["response"] = "".join(text * times for text, times in row["response_parts"])
  return rows


@pytest.fixture(scope="module")
def verdicts(cases):
  return grade([c["response"] for c in cases], [c["answer"] for c in cases], thinking_opened=False)


@pytest.mark.parametrize("tier", ["must", "should"])
def test_all_cases(cases, verdicts, tier):
  chosen = [(c, v) for c, v in zip(cases, verdicts, strict=True) if c["tier"] == tier]
  wrong = [(c["id"], c["category"], c["answer"], v) for c, v in chosen if v.correct != c["correct"]]
  assert len(chosen) >= 40 and not wrong


def test_reasons(cases, verdicts):
  reasons = collections.defaultdict(set)
  for case, verdict in zip(cases, verdicts, strict=True):
    reasons[case["category"]].add(verdict.reason)
  assert reasons["identity"] == {"correct"}
  assert reasons["near-miss"] == {"wrong"}
  assert reasons["no-box"] == {"no_answer"}
  assert reasons["think-unclosed"] == {"unfinished"}


def test_hostile_cases_end_soon_and_leave_nothing(cases, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  hostile = [c for c in cases if c["category"] == "hostile"]
  with Grader() as grader:
    grader.grade_batch([r"\boxed{\sqrt{4}}"], ["3"], thinking_opened=False)  # The pool of a run is warm.
    for case in hostile:
      start = time.monotonic()
      verdict, = grader.grade_batch([case["response"]], [case["answer"]], thinking_opened=False)
      assert not verdict.correct, case["id"]
      assert time.monotonic() - start < 5.0, case["id"]
    pids = grader.worker_pids()
  assert pids and not any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids)
  assert not list(tmp_path.iterdir())
