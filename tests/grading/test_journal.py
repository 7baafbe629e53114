"""Verdicts on disk: a resumed run repeats them."""

import json
import logging

import pytest

from hbpo_jax.grading import Grader, Journal, StepGrading, Verdict, grade_step
from hbpo_jax.grading import journal as journal_module
from hbpo_jax.grading.journal import digest

VERDICTS = {"a": Verdict(1.0, "correct", "5"), "b": Verdict(0.25, "wrong", "\ud800\x00"), "c": Verdict(0.0, "timeout")}


class Scripted:
  """Grades by a script and remembers what it was asked."""

  identity = "scripted"

  def __init__(self, score):
    self.score, self.asked, self._waiting = score, [], {}

  def submit(self, key, response, answer, *, thinking_opened):
    self.asked.append(response)
    self._waiting[key] = Verdict(self.score, "correct" if self.score == 1 else "wrong", response)

  def collect(self):
    waiting, self._waiting = self._waiting, {}
    return waiting


def test_read_gives_what_was_written(tmp_path):
  journal = Journal(tmp_path / "verdicts")
  assert journal.read(3) is None
  journal.write(3, VERDICTS)
  assert Journal(tmp_path / "verdicts").read(3) == VERDICTS
  journal.write(3, {"a": VERDICTS["a"]})
  assert journal.read(3) == {"a": VERDICTS["a"]}
  assert [p.name for p in (tmp_path / "verdicts").iterdir()] == ["verdicts-00000003.json"]


def _signed(rows):
  return json.dumps({"sum": journal_module._checksum(rows), "verdicts": rows}).encode()


@pytest.mark.parametrize("damage", [
    lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b.replace(b"correct", b"wrong", 1), lambda b: b"[]",
    lambda b: b"\xff" + b, lambda b: b"[" * 100_000, lambda b: _signed({"x": [1e9, "correct", ""]}),
    lambda b: _signed({"x": [float("nan"), "correct", ""]}), lambda b: _signed({"x": ["1", "correct", ""]}),
    lambda b: b'{"sum": null, "verdicts": null}'])
def test_a_damaged_file_is_reported_graded_again_and_rewritten(tmp_path, caplog, damage):
  journal = Journal(tmp_path)
  grade_step(Scripted(1.0), journal, 7, ["r"], ["t"], False)
  path = journal.path(7)
  path.write_bytes(damage(path.read_bytes()))
  with caplog.at_level(logging.WARNING):
    assert journal.read(7) is None
  assert "step 7" in caplog.text
  again = Scripted(0.5)
  assert grade_step(again, journal, 7, ["r"], ["t"], False)[0].score == 0.5
  assert again.asked == ["r"]
  assert [v.score for v in journal.read(7).values()] == [0.5]


def test_a_resumed_step_repeats_its_verdicts_and_grades_only_what_is_new(tmp_path):
  first, second = Scripted(1.0), Scripted(0.0)
  grade_step(first, Journal(tmp_path), 0, ["x", "y"], ["1", "2"], True)
  verdicts = grade_step(second, Journal(tmp_path), 0, ["x", "z", "y"], ["1", "3", "2"], True)
  assert [v.score for v in verdicts] == [1.0, 0.0, 1.0]
  assert [v.answer for v in verdicts] == ["x", "z", "y"]
  assert second.asked == ["z"]
  # Another step, answer, state of thinking or grader is another item.
  third = Scripted(0.5)
  grade_step(third, Journal(tmp_path), 1, ["x"], ["1"], True)
  grade_step(third, Journal(tmp_path), 0, ["x"], ["2"], True)
  assert third.asked == ["x", "x"]


def test_digests_tell_items_apart():
  items = [("m", "a", "b", True), ("m", "a", "b", False), ("n", "a", "b", True), ("m", "ab", "", True),
  ("m", "a", ["b"], True),
           ("m", "a", {"answer": "b"}, True), ("m", "\ud800", "b", True), ("m", "\\ud800", "b", True)]
  assert len({digest(*i) for i in items}) == len(items)
  assert digest("m", "a", {"p": 1, "q": 2}, True) == digest("m", "a", {"q": 2, "p": 1}, True)


def test_prune_keeps_the_newest(tmp_path):
  journal = Journal(tmp_path)
  journal.prune(5)
  for step in (1, 4, 5, 12):
    journal.write(step, VERDICTS)
  (tmp_path / "verdicts-old.json").write_text("not ours")
  journal.prune(5)
  assert [journal.read(s) is not None for s in (1, 4, 5, 12)] == [False, False, True, True]
  assert (tmp_path / "verdicts-old.json").exists()


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
  journal = Journal(tmp_path)
  journal.write(1, VERDICTS)
  def crash(*_):
    raise OSError("disk is gone")
  monkeypatch.setattr("hbpo_jax.grading.journal.os.fsync", crash)
  with pytest.raises(OSError, match="disk is gone"):
    journal.write(1, {})
  assert journal.read(1) == VERDICTS


def test_step_grading_with_the_real_grader(tmp_path):
  journal = Journal(tmp_path)
  for _ in range(2):
    with Grader() as grader:
      grading = StepGrading(grader, journal, 2, thinking_opened=True)
      grading.submit((0, 1), r"a</think>\boxed{\sqrt{8}}", [r"2\sqrt2"])
      grading.submit((0, 0), "a", "5")
      with pytest.raises(ValueError, match="submitted already in step 2"):
        grading.submit((0, 0), "b", "5")
      assert {k: v.reason for k, v in grading.collect().items()} == {(0, 1): "correct", (0, 0): "unfinished"}
      started = grader.worker_pids()
  assert started == []  # The second time, the journal knew all.


def test_one_answer_per_response(tmp_path):
  with pytest.raises(ValueError, match="1 responses but 2 answers"):
    grade_step(Scripted(1.0), None, 0, ["a"], ["b", "c"], False)
