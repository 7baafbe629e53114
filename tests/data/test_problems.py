"""Problems: JSON Lines with validation, held-out evaluation, the shared sets."""

import json

from hypothesis import given
from hypothesis import strategies as st
import pytest

from hbpo_jax.config import DataConfig
from hbpo_jax.data import problems
from hbpo_jax.data.problems import Problem

ROW = {"id": "a", "problem": "1 + 1", "answer": "2", "source": "me"}


def write(path, *rows):
  path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
  return str(path)


def test_reads_all_fields(tmp_path):
  file = write(
      tmp_path / "p.jsonl", ROW, "",
      ROW | {"id": "b", "level": 3, "answers": ["2.0", "two"], "solution": "Add.", "year": 2024})
  first, second = problems.load(file)
  assert first == Problem("a", "1 + 1", "2", "me", None, ("2",), None)
  assert second == Problem("b", "1 + 1", "2", "me", 3, ("2", "2.0", "two"), {"solution": "Add.", "year": 2024})
  assert problems.load(file, n=1) == [first]


def test_a_line_separator_inside_a_text_does_not_split_the_line(tmp_path):
  file = write(tmp_path / "p.jsonl", json.dumps(ROW | {"problem": "a\u2028b\x85c"}, ensure_ascii=False))
  assert problems.load(file)[0].problem == "a\u2028b\x85c"


@pytest.mark.parametrize("bad, message", [
    ('{"id": "b", ', r"p.jsonl:2 is not JSON .*write one JSON object a line"),
    ("[1]", r"p.jsonl:2 holds a list"),
    *[({k: v for k, v in (ROW | {"id": "b"}).items() if k != f}, rf"p.jsonl:2 has no field '{f}'") for f in ROW],
    (ROW | {"id": "b", "answer": 2}, r"p.jsonl:2: answer=2 must be a text"),
    (ROW | {"id": "b", "problem": " "}, r"p.jsonl:2: problem=' ' must be a text that is not empty"),
    (ROW | {"id": "b", "level": "3"}, r"p.jsonl:2: level='3' must be an integer"),
    (ROW | {"id": "b", "level": True}, r"p.jsonl:2: level=True must be an integer"),
    (ROW | {"id": "b", "answers": "2"}, r"p.jsonl:2: answers='2' must be a list"),
    (ROW | {"id": "b", "answers": []}, r"p.jsonl:2: answers=\[\] must be a list"),
    (ROW, r"p.jsonl:2: id='a' was used in line 1; make the ids unique"),
])
def test_a_bad_line_is_named(tmp_path, bad, message):
  with pytest.raises(ValueError, match=message):
    problems.load(write(tmp_path / "p.jsonl", ROW, bad))


def test_unreadable_files_are_named(tmp_path):
  with pytest.raises(ValueError, match=r"nowhere.jsonl' does not exist; give 'synthetic'"):
    problems.load(str(tmp_path / "nowhere.jsonl"))
  with pytest.raises(ValueError, match=r"cannot be read"):
    problems.load(str(tmp_path))
  (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}')
  with pytest.raises(ValueError, match=r"latin.jsonl' cannot be read.*UTF-8"):
    problems.load(str(tmp_path / "latin.jsonl"))
  (tmp_path / "empty.jsonl").write_text("\n\n")
  with pytest.raises(ValueError, match=r"empty.jsonl' holds no problem"):
    problems.load(str(tmp_path / "empty.jsonl"))
  with pytest.raises(ValueError, match=r"data.source='' is empty"):
    problems.load("")


@given(st.integers(2, 40), st.data())
def test_split_eval_partitions(n, data):
  n_eval = data.draw(st.integers(0, n - 1))
  seed = data.draw(st.integers(0, 2**31))
  made = [Problem(str(i), f"p{i}", "1", "me") for i in range(n)]
  train, held_out = problems.split_eval(made, n_eval, seed)
  assert len(held_out) == n_eval
  assert sorted(train + held_out, key=lambda p: int(p.id)) == made
  assert (train, held_out) == problems.split_eval(made, n_eval, seed)


def test_split_eval_depends_on_the_seed_and_refuses_all():
  made = [Problem(str(i), f"p{i}", "1", "me") for i in range(100)]
  assert problems.split_eval(made, 10, 0) != problems.split_eval(made, 10, 1)
  with pytest.raises(ValueError, match=r"data.n_eval=100 does not leave a problem of 100"):
    problems.split_eval(made, 100, 0)


def test_held_out_from_the_training_file(tmp_path):
  file = write(tmp_path / "p.jsonl", *[ROW | {"id": str(i), "problem": f"p{i}"} for i in range(20)])
  train, held_out = problems.load_train_and_eval(DataConfig(source=file, n_eval=5, limit=10), 0)
  assert len(train) == 10 and len(held_out) == 5
  assert not {p.problem for p in train} & {p.problem for p in held_out}
  train, held_out = problems.load_train_and_eval(DataConfig(source=file), 0)
  assert len(train) == 20 and held_out == []


def test_evaluation_file_is_kept_out_of_training(tmp_path):
  train_file = write(tmp_path / "t.jsonl", *[ROW | {"id": str(i), "problem": f"p{i}"} for i in range(6)])
  eval_file = write(tmp_path / "e.jsonl", *[ROW | {"id": str(i), "problem": f"p{i}"} for i in range(4, 9)])
  train, held_out = problems.load_train_and_eval(DataConfig(source=train_file, eval_source=eval_file, n_eval=9), 0)
  assert [p.problem for p in train] == ["p0", "p1", "p2", "p3"] and len(held_out) == 5
  _, three = problems.load_train_and_eval(DataConfig(source=train_file, eval_source=eval_file, n_eval=3), 0)
  assert len(three) == 3 and set(three) <= set(held_out)
  with pytest.raises(ValueError, match=r"holds no problem outside the evaluation"):
    problems.load_train_and_eval(DataConfig(source=eval_file, eval_source=eval_file, n_eval=9), 0)


def test_synthetic_source():
  train, held_out = problems.load_train_and_eval(DataConfig(n_eval=50, limit=200), 3)
  assert len(train) == 200 and len(held_out) == 50
  assert not {p.problem for p in train} & {p.problem for p in held_out}


@pytest.mark.parametrize("name, n", [
    ("gsm8k_train", 7473), ("gsm8k_test", 1319), ("math500", 500), ("olympiadbench", 675), ("aime24", 30),
    ("aime25", 30), ("amc", 83), ("minerva", 272), ("math_train", 7470), ("aime_train", 975),
    ("deepscaler_subset", 2763),
])
def test_real_sets(shared_dir, name, n):
  found = problems.load(str(shared_dir / "data" / f"{name}.jsonl"))
  assert len(found) == n
  assert all(p.answer in p.answers for p in found)
  if name == "math500":
    assert {p.level for p in found} == {1, 2, 3, 4, 5}
  if name == "minerva":
    assert sum(len(p.answers) > 1 for p in found) == 40
