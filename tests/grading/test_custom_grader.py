"""Graders of the user's own."""

import dataclasses
import sys

import numpy as np
import pytest

from hbpo_jax.grading import CustomGrader, Journal, Verdict, grade_step, load_custom

PROBLEMS = [{"id": "p1", "answer": "a"}, {"id": "p2", "answer": "b"}]


@dataclasses.dataclass
class Record:
  id: str
  answer: str


def share_of_answer(responses, problems):
  return [float(p["answer"] in r) for r, p in zip(responses, problems, strict=True)]


@pytest.fixture
def module(tmp_path, monkeypatch):
  code = "def score(responses, problems):\n  return [0.5 for _ in responses]\nLIMIT = 3\n"
  (tmp_path / "my_tasks_for_test.py").write_text(code)
  (tmp_path / "broken_for_test.py").write_text("import no_such_module_anywhere\n")
  monkeypatch.syspath_prepend(str(tmp_path))
  yield
  sys.modules.pop("my_tasks_for_test", None)


def test_a_dotted_path_is_loaded(module):
  for path in ("my_tasks_for_test.score", "my_tasks_for_test:score"):
    grader = load_custom(path)
    assert grader.grade_batch(["x", "y"], PROBLEMS, thinking_opened=False) == [Verdict(0.5, "wrong")] * 2
    assert grader.identity == path


@pytest.mark.parametrize(("path", "message"), [
    ("score", "not a dotted path"), ("no_such_package.score", "cannot import 'no_such_package'"),
    ("my_tasks_for_test.nothing", "has no function 'nothing'"), ("my_tasks_for_test.LIMIT", "has no function 'LIMIT'"),
    ("broken_for_test.score", "no_such_module_anywhere"),
])
def test_a_bad_path_is_refused(module, path, message):
  with pytest.raises(ValueError, match=message) as error:
    load_custom(path)
  assert f"reward.grader='{path}'" in str(error.value)


def test_a_function_that_fails_is_refused_when_it_is_tried():
  given = []
  CustomGrader(lambda r, p: given.append((r, p)) or [1], "t.f").try_on(PROBLEMS[0])
  [(responses, problems)] = given
  assert problems == [PROBLEMS[0]] and "</think>" in responses[0] and "\\boxed{0}" in responses[0]
  with pytest.raises(ValueError, match=r"reward.grader='t.f' failed .* AttributeError: .*; it gets .* id, answer "):
    CustomGrader(lambda r, p: [x.answer for x in p], "t.f").try_on(PROBLEMS[0])
  with pytest.raises(ValueError, match="returned 2 numbers for 1 responses"):
    CustomGrader(lambda r, p: [0, 1], "t.f").try_on(PROBLEMS[0])


def test_numbers_become_verdicts():
  for scores in ([1, 0.0], [True, False], np.array([1.0, 0.0], np.float32), (np.float64(1), np.int32(0))):
    grader = CustomGrader(lambda r, p, scores=scores: scores, "t.f")
    verdicts = grader.grade_batch(["x", "y"], PROBLEMS, thinking_opened=False)
    assert verdicts == [Verdict(1.0, "correct"), Verdict(0.0, "wrong")]
    assert [v.correct for v in verdicts] == [True, False] and all(v.finished for v in verdicts)


@pytest.mark.parametrize(("scores", "message"), [
    ([1.0], "returned 1 numbers for 2 responses"), ([1.0, 1.5], "returned 1.5 for response 1"),
    ([-0.1, 1.0], "returned -0.1 for response 0"),
    ([0.0, float("nan")], "returned nan for response 1"), ([0.0, "1"], "returned '1' for response 1"),
    (None, "returned NoneType"),
    ("ab", "returned str"), (0.5, "returned float"), ([0.0, None], "returned None for response 1"),
])
def test_bad_numbers_are_refused_with_the_name_of_the_function(scores, message):
  with pytest.raises(ValueError, match=message) as error:
    CustomGrader(lambda r, p: scores, "tasks.f").grade_batch(["x", "y"], PROBLEMS, thinking_opened=False)
  assert "'tasks.f'" in str(error.value)


def test_it_gets_whole_texts_and_problems_as_dicts():
  grader = CustomGrader(share_of_answer, "t.share")
  problems = [PROBLEMS[0], Record("p2", "b")]
  assert [v.score for v in grader.grade_batch(["<think> a", "c"], problems, thinking_opened=False)] == [1.0, 0.0]
  with pytest.raises(ValueError, match="give a dict"):
    grader.grade_batch(["x"], ["not a problem"], thinking_opened=False)


def test_it_works_with_the_journal(tmp_path):
  calls = []
  def flaky(responses, problems):
    calls.append(list(responses))
    return [0.1 * len(calls)] * len(responses)
  grader = CustomGrader(flaky, "t.flaky")
  problems = [Record("p1", "a"), Record("p2", "b")]
  first = grade_step(grader, Journal(tmp_path), 0, ["x", "y"], problems, True)
  assert grade_step(grader, Journal(tmp_path), 0, ["x", "y"], problems, True) == first
  assert calls == [["x", "y"]]
