"""Functions of the user's own: how a setting names one, and what a wrong name says."""

import dataclasses

import pytest

from hbpo_jax import config, user_code, validation
from hbpo_jax.data import problems as problems_lib
from hbpo_jax.evaluation import benchmarks

ROW = "{'id': 'a', 'problem': 'p', 'answer': 'b', 'source': 's'}"


@pytest.fixture
def write(tmp_path):
  """Writes a file of the user's; returns its path."""
  def written(text, name="task.py"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)
  return written


@pytest.mark.parametrize("name,is_one", [
    ("a.b", True), ("a.b.c", True), ("a.b:c", True), ("x/y-z.py:f", True), ("a", False), ("a.b-c", False), ("", False),
    ("x/y.py", False), ("x/y.py:", False), ("x/y.py:f()", False), ("x/y:f", False)])
def test_what_has_the_form_of_a_name(name, is_one):
  assert user_code.is_name(name) == is_one
  cfg = dataclasses.replace(config.Config(), reward=dataclasses.replace(config.Config().reward, grader=name))
  if is_one or not name:
    validation.validate(cfg, n_devices=1)
  else:
    with pytest.raises(ValueError, match=r"config\.reward\.grader=.*FILE\.py:function"):
      validation.validate(cfg, n_devices=1)


def test_a_file_is_run_once_for_all_its_functions(write):
  path = write("import dataclasses\n@dataclasses.dataclass\nclass C:\n  n: int\nseen = []\n"
               "def f():\n  seen.append(1)\n  return seen\ndef g():\n  return seen\n")
  user_code.load(f"{path}:f", "x")()
  assert user_code.load(f"{path}:g", "x")() == [1]


@pytest.mark.parametrize("text,name,message", [
    (None, "f", "there is no file '.*task.py'; give its path"), ("g = 1", "f", "has no function 'f'; check"),
    ("f = 1", "f", "has no function 'f'; check"), ("import nowhere_to_be_found", "f", r"\(ModuleNotFoundError: .*mend"),
    ("def f(:", "f", "SyntaxError")])
def test_a_function_that_cannot_be_loaded_is_named(write, tmp_path, text, name, message):
  path = str(tmp_path / "task.py") if text is None else write(text)
  with pytest.raises(ValueError, match=message) as error:
    user_code.load(f"{path}:{name}", "reward.grader")
  assert str(error.value).startswith(f"reward.grader='{path}:{name}'")


def test_problems_of_a_function(write):
  path = write(f"def rows():\n  yield {ROW}\n  yield {ROW} | {{'id': 'c', 'level': 3}}\n")
  found = problems_lib.load(f"{path}:rows")
  assert [(p.id, p.answer, p.level) for p in found] == [("a", "b", None), ("c", "b", 3)]
  assert problems_lib.load(f"{path}:rows", n=1) == found[:1]
  made = benchmarks.load_all([f"{path}:rows"], config.DataConfig(), 0)
  assert [(b.name, b.problems) for b in made] == [("task", tuple(found))]


@pytest.mark.parametrize("returned,message", [
    ("3", "returned int; return a list of dicts"), ("[]", "returned no problem"), ("[3]", "row 0 is a int"),
    ("{'id': 1}", "returned dict"), (f"[{ROW}, {ROW}]", "row 1: id='a' was used in row 0"),
    (f"[{ROW} | {{'answer': ''}}]", "row 0: answer='' must be a text")])
def test_wrong_rows_of_a_function_are_named(write, returned, message):
  path = write(f"def rows():\n  return {returned}\n")
  with pytest.raises(ValueError, match=message) as error:
    problems_lib.load_function(f"{path}:rows")
  assert "data.source=" in str(error.value)
