"""The guards fit the code, the tests and docs/reliability.md; that each test fails without its own takes a while."""

import ast
import re

import pytest

from tests import guards


def rows():
  """(first column, names of test files in the third) of the tables of faults in docs/reliability.md."""
  found, is_inside = [], False
  for line in (guards.ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines():
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    is_inside = line.startswith("|") and (is_inside or cells[:2] == ["fault", "what is promised"])
    if is_inside and cells[0] not in ("fault", "---"):
      found.append((cells[0], re.findall(r"`([\w/]*test_\w+\.py)`", cells[2])))
  return found


def test_every_row_with_a_test_has_a_guard_and_every_guard_a_row():
  for fault, files in rows():
    assert any(fault.startswith(g.row) for g in guards.GUARDS) == bool(files), fault
  for g in guards.GUARDS:
    assert sum(fault.startswith(g.row) for fault, _ in rows()) == 1, g.row
  assert len(rows()) > 25


@pytest.mark.parametrize("g", guards.GUARDS, ids=lambda g: f"{g.row}, {g.file}")
def test_a_guard_stands_once_in_its_file_and_its_test_is_there(g):
  source = (guards.ROOT / guards.PACKAGE / g.file).read_text(encoding="utf-8")
  assert source.count(g.guard) == 1 and g.guard != g.without
  compile(source.replace(g.guard, g.without), g.file, "exec")
  file, name = g.test.split("[")[0].split("::")
  tree = ast.parse((guards.ROOT / file).read_text(encoding="utf-8"))
  assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


REPORTS = {
    "caught": '<testsuite><testcase><failure message="E  1 != 2"/></testcase></testsuite>',
    "survived": "<testsuite><testcase/></testsuite>",
    "broken": '<testsuite><testcase><error message="no fixture"/></testcase></testsuite>',
    "skipped": '<testsuite><testcase><skipped message="needs a browser"/></testcase></testsuite>',
    "none": "<testsuite/>", "cut": "<testsuite><testc",
}


@pytest.mark.parametrize("code, report, expected", [
    (1, "caught", ("caught", "E 1 != 2")), (0, "survived", ("survived", "")), (1, "broken", ("error", "no fixture")),
    (0, "skipped", ("error", "needs a browser")), (5, "none", ("error", "code 5")), (4, "none", ("error", "code 4")),
    (2, "cut", ("error", "no report")), (-15, "missing", ("error", "no report")),
    (None, "caught", ("error", "not done")),
])
def test_only_a_test_that_ran_and_failed_counts(tmp_path, code, report, expected):
  path = tmp_path / "report.xml"
  if report in REPORTS:
    path.write_text(REPORTS[report])
  what, why = guards.outcome(code, path)
  assert what == expected[0] and expected[1] in why


@pytest.mark.skipif(not (guards.ROOT / ".git").exists(), reason="needs a checkout")
def test_the_copy_has_the_tracked_files(tmp_path):
  guards.copy_to(tmp_path / "copy")
  assert (tmp_path / "copy" / "hbpo_jax" / "files.py").is_file() and not (tmp_path / "copy" / ".git").exists()


def test_the_runner_tells_what_it_saw(monkeypatch, capsys):
  def copy_to(folder):
    (folder / guards.PACKAGE).mkdir(parents=True)
    (folder / guards.PACKAGE / "__init__.py").write_text("")
    (folder / guards.PACKAGE / "own.py").write_text("SAFE = True\n")
    (folder / "test_own.py").write_text(
        "from hbpo_jax import own\ndef test_sees(): assert own.SAFE\ndef test_is_blind(): assert own\n"
        "def test_always_fails(): assert 0\ndef test_breaks(absent): assert own.SAFE\n")

  names = {"sees": "caught", "is_blind": "survived", "always_fails": "error", "breaks": "error"}
  monkeypatch.setattr(guards, "copy_to", copy_to)
  monkeypatch.setattr(guards, "GUARDS", tuple(
      guards.Guard("a row", "own.py", "True", "False", f"test_own.py::test_{name}") for name in names))
  assert guards.main([]) == 1
  *lines, total = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines] == [*names.values()] and total.startswith("1 caught, 1 survived, 2 error")
  assert "with the guard, too" in lines[2]
  assert guards.main(["no such row"]) == 1
