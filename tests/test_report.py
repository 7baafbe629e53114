"""The command that makes a report: what it writes, and how it ends on a mistake."""

import os
import subprocess
import sys

import pytest

from hbpo_jax import report
from tests.reporting import runs_fixture


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A small training run with its evaluations."""
  return runs_fixture.make_training_run(tmp_path_factory.mktemp("run") / "mine", steps=12)


def fails(capsys, *argv) -> str:
  """What the command says on stderr when it ends with 2."""
  with pytest.raises(SystemExit) as ended:
    report.main(list(map(str, argv)))
  assert ended.value.code == 2
  said = capsys.readouterr()
  assert said.err.startswith("error: ") and said.err.count("\n") == 1
  return said.err


def test_files(run, tmp_path, capsys):
  report.main([str(run), f"--out={tmp_path / 'deep' / 'out'}", "--title=T & <t>", "--samples=7"])
  out = tmp_path / "deep" / "out"
  assert sorted(p.name for p in out.iterdir()) == ["index.html", "plots", "report.md", "tables.tex"]
  text = (out / "index.html").read_text()
  assert text.startswith("<!DOCTYPE html>") and "<title>T &amp; &lt;t&gt;</title>" in text and "7 of 40 pairs" in text
  markdown = (out / "report.md").read_text()
  linked = {line.rpartition("(plots/")[2].rstrip(")") for line in markdown.splitlines() if line.startswith("![")}
  assert linked == {p.name for p in (out / "plots").iterdir()} and len(linked) >= 8
  assert all(p.read_bytes().startswith(b"\x89PNG") for p in (out / "plots").iterdir())
  said = capsys.readouterr().out.splitlines()
  assert said[0].startswith("Tokens per response fell by") and said[1] == f"see {out / 'index.html'}"


def test_the_same_command_writes_the_same_bytes(run, tmp_path):
  for name in ("a", "b"):
    report.main([str(run), f"--out={tmp_path / name}"])
  for path in sorted((tmp_path / "a").rglob("*.*")):
    other = tmp_path / "b" / path.relative_to(tmp_path / "a")
    assert other.read_bytes() == path.read_bytes(), path


def test_a_run_that_cannot_be_read_leaves_nothing(run, tmp_path, capsys):
  assert "nowhere is not a directory" in fails(capsys, run, tmp_path / "nowhere", f"--out={tmp_path / 'out'}")
  (tmp_path / "empty").mkdir()
  assert "holds no run" in fails(capsys, tmp_path / "empty", f"--out={tmp_path / 'out'}")
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv, said", [
    ([], "--out"), (["--out=x"], "RUN"), (["RUN"], "--out"), (["RUN", "--out=x", "--nonsense"], "--nonsense"),
    (["RUN", "--out=x", "--samples=many"], "--samples"), (["RUN", "--out=x", "--samples=0"], "--samples=0"),
    (["RUN", "--out=RUN"], "is the directory of the run 'mine'")])
def test_mistakes_in_the_command_line(run, tmp_path, monkeypatch, capsys, argv, said):
  monkeypatch.chdir(tmp_path)
  assert said in fails(capsys, *(a.replace("RUN", str(run)) for a in argv))
  assert not (tmp_path / "x").exists()


def test_out_is_a_file(run, tmp_path, capsys):
  (tmp_path / "file").write_text("")
  assert "is a file; give a directory" in fails(capsys, run, f"--out={tmp_path / 'file'}")


def test_a_defect_keeps_its_traceback(run, tmp_path, monkeypatch):
  def broken(*arguments):
    return int("no number")

  monkeypatch.setattr(report.page, "make", broken)
  with pytest.raises(ValueError, match="no number"):
    report.main([str(run), f"--out={tmp_path}"])


def test_command_line_of_its_own_process(repo_root, tmp_path):
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repo_root)}
  command = [sys.executable, "-m", "hbpo_jax.report"]
  shown = subprocess.run([*command, "-h"], env=environment, capture_output=True, text=True, timeout=300)
  assert shown.returncode == 0 and "[NAME=]RUN" in shown.stdout and "--samples" in shown.stdout and not shown.stderr
  failed = subprocess.run([*command, str(tmp_path / "no"), "--out=x", "--traceback"], env=environment,
                          capture_output=True, text=True, timeout=300, cwd=tmp_path)
  assert failed.returncode == 2 and "Traceback" in failed.stderr
  assert failed.stderr.splitlines()[-1].startswith("error: ")


def test_the_template_is_part_of_the_package(repo_root):
  assert (repo_root / "hbpo_jax" / "reporting" / "report.html.jinja").is_file()
  assert 'packages = ["hbpo_jax"]' in (repo_root / "pyproject.toml").read_text()
