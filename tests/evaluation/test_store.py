"""The evaluation directory: what may be added, what is refused, and what a kill leaves."""

import json

import pytest

from hbpo_jax.data.record import Problem
from hbpo_jax.evaluation import store
from hbpo_jax.evaluation.store import Benchmark, Store, open_existing

PROBLEMS = (Problem("p0", "1 + 1", "2", "test", 1), Problem("p1", "2 + 2", "4", "test", 2, ("4", "four")))
SETTINGS = {"seed": 0, "eval.temperature": 0.6, "prompt.budget_sentence": "within {budget}"}


def open_store(folder, problems=PROBLEMS, *, modes=("natural", "16"), n_samples=1, fingerprint="abc", **changed):
  return Store(
      folder, [Benchmark("set", "Set", tuple(problems))], modes=modes, n_samples=n_samples,
      model={"path": "m", "fingerprint": fingerprint},
      settings=SETTINGS | {k.replace("__", "."): v for k, v in changed.items()})


def row(id="p0", mode="natural", sample=0, **changed):
  return {"id": id, "mode": mode, "sample": sample, "answer": "2", "level": 1, "response": "x", "n_gen": 3,
          "n_think": 2, "truncated": False, "score": 1.0, "reason": "correct", "given": "2"} | changed


def responses(folder):
  return folder / "responses" / "set.jsonl"


def test_what_was_stored_comes_back_in_order_of_problem_mode_and_sample(tmp_path):
  rows = [row("p1", "16"), row("p0", "16"), row("p1", sample=1), row("p0"), row("p1")]
  with open_store(tmp_path, n_samples=2) as s:
    s.append("set", rows[:2])
    assert len(open_existing(tmp_path).rows["set"]) == 2, "stored when append returns, not when the store is closed"
    s.append("set", rows[2:])
    assert s.holds("set", ("p1", "natural", 1)) and not s.holds("set", ("p0", "natural", 1))
  found = open_existing(tmp_path)
  assert found.rows["set"] == [rows[3], rows[1], rows[4], rows[2], rows[0]]
  assert found.problems["set"] == list(PROBLEMS) and found.notes == ()
  assert found.manifest["benchmarks"] == {"set": {"title": "Set", "n_problems": 2}}


def test_a_line_cut_in_half_is_dropped_and_said(tmp_path):
  with open_store(tmp_path) as s:
    s.append("set", [row(), row("p1")])
  whole = responses(tmp_path).read_bytes()
  responses(tmp_path).write_bytes(whole + b'{"id": "p0", "mode": "16", "resp')
  found = open_existing(tmp_path)
  assert len(found.rows["set"]) == 2 and "half a line" in found.notes[0]
  with open_store(tmp_path) as s:
    assert not s.holds("set", ("p0", "16", 0))
    s.append("set", [row(mode="16")])
  assert responses(tmp_path).read_bytes().startswith(whole) and len(open_existing(tmp_path).rows["set"]) == 3


def test_a_verdict_may_come_later(tmp_path):
  with open_store(tmp_path) as s:
    s.append("set", [row(score=None, reason=None), row("p1")])
  half = open_existing(tmp_path)
  assert half.rows["set"] == [row("p1")] and "1 responses without a verdict" in half.notes[0]
  with open_store(tmp_path) as s:
    assert list(s.ungraded["set"]) == [("p0", "natural", 0)] and s.holds("set", ("p0", "natural", 0))
    s.append("set", [row()])
    assert not s.ungraded["set"]
  assert open_existing(tmp_path).rows["set"] == [row(), row("p1")]


def test_text_that_utf8_cannot_hold_survives(tmp_path):
  with open_store(tmp_path) as s:
    s.append("set", [row(response="a\ud800\u2028\x00\n</script>")])
  assert open_existing(tmp_path).rows["set"][0]["response"] == "a\ufffd\u2028\x00\n</script>"


@pytest.mark.parametrize("line,words", [
    ("no json", r"set.jsonl:2 is not JSON .*remove the line"),
    ("[1]", r"set.jsonl:2 is no JSON object"),
    (json.dumps(row() | {"n_gen": "3"}), r"set.jsonl:2: n_gen='3' is missing or of the wrong type; remove the line"),
    (json.dumps({k: v for k, v in row().items() if k != "mode"}), r"set.jsonl:2: mode=None is missing"),
])
def test_a_damaged_line_is_named(tmp_path, line, words):
  with open_store(tmp_path) as s:
    s.append("set", [row()])
  with responses(tmp_path).open("a") as f:
    f.write(line + "\n")
  with pytest.raises(ValueError, match=words):
    open_existing(tmp_path)
  with pytest.raises(ValueError, match=words):
    open_store(tmp_path)


def test_what_decides_a_response_may_not_change(tmp_path):
  open_store(tmp_path).close()
  with pytest.raises(ValueError, match=r"config.eval.temperature=1.0, but the evaluation in .* was made with 0.6"):
    open_store(tmp_path, eval__temperature=1.0)
  with pytest.raises(ValueError, match=r"is of other weights \(m\); give another --workdir"):
    open_store(tmp_path, fingerprint="abd")
  with pytest.raises(ValueError, match=r"problem 'p1' of benchmark 'set' has another text or answer"):
    open_store(tmp_path, problems=(PROBLEMS[0], Problem("p1", "2 + 2", "5", "test")))


def test_modes_samples_and_problems_may_be_added(tmp_path):
  open_store(tmp_path, PROBLEMS[:1], modes=("natural",)).close()
  open_store(tmp_path, PROBLEMS[1:], modes=("16",), n_samples=3).close()
  manifest = open_existing(tmp_path).manifest
  assert manifest["modes"] == ["natural", "16"] and manifest["samples_per_problem"] == 3
  assert open_existing(tmp_path).problems["set"] == list(PROBLEMS)
  open_store(tmp_path, PROBLEMS[:1], modes=("natural",)).close()
  assert open_existing(tmp_path).manifest == manifest, "asking for less forgets nothing"


def test_no_evaluation_and_another_format_are_told_apart(tmp_path):
  with pytest.raises(FileNotFoundError, match="does not exist"):
    open_existing(tmp_path / "nowhere")
  with pytest.raises(FileNotFoundError, match=r"holds no evaluation \(eval.json is missing\)"):
    open_existing(tmp_path)
  open_store(tmp_path).close()
  path = tmp_path / "eval.json"
  manifest = json.loads(path.read_text())
  path.write_text(json.dumps(manifest | {"format": 2, "hbpo_jax": "9.9"}))
  with pytest.raises(ValueError, match=r"of format 2, written by hbpo_jax 9.9; this version reads format 1"):
    open_existing(tmp_path)
  path.write_text("{")
  with pytest.raises(ValueError, match="is damaged"):
    open_store(tmp_path)
  path.write_text(json.dumps({k: v for k, v in manifest.items() if k != "modes"}))
  with pytest.raises(ValueError, match="has no entry 'modes'"):
    open_existing(tmp_path)


def test_an_evaluation_of_other_weights_is_set_aside_not_lost(tmp_path):
  folder = tmp_path / "trained"
  assert not store.set_aside_other(folder, {"fingerprint": "abc"})
  open_store(folder).close()
  assert not store.set_aside_other(folder, {"fingerprint": "abc"}) and folder.exists()
  assert store.set_aside_other(folder, {"fingerprint": "xyz"}) and not folder.exists()
  open_store(folder).close()
  assert store.set_aside_other(folder, {"fingerprint": "xyz"})
  assert sorted(p.name for p in tmp_path.iterdir()) == ["trained.other-1", "trained.other-2"]
