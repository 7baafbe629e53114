"""Commands on a bucket, through gcsfs; whole runs are in tests/system/test_bucket.py."""

import json
import pathlib
import shutil

import pytest

from hbpo_jax import bucket, export, flags, regrade, report
from tests import gcs_server, test_export, test_regrade
from tests.checkpoints import make_checkpoint
from tests.reporting import runs_fixture


@pytest.fixture
def storage(monkeypatch, tmp_path):
  pytest.importorskip("gcsfs", reason="needs the extra gcs")
  with gcs_server.serve() as found:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", found.address)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv(bucket.SCRATCH, str(tmp_path / "scratch"))
    yield found


def upload(url, root):
  """Puts a directory in place as a run would have left it."""
  with bucket.opened(url) as workdir:
    shutil.copytree(root, pathlib.Path(workdir), dirs_exist_ok=True)


def test_gcs_refusals_are_one_line(storage, capsys):
  for url, fault, words in [("gs://nowhere/run", None, "there is no such bucket"),
                            ("gs://b/run", gcs_server.Fault("POST ", 403), "no permission"),
                            ("gs://b/run", gcs_server.Fault("POST ", 401), "no permission")]:
    storage.faults[:] = [fault] if fault else []
    with pytest.raises(SystemExit) as ended:
      flags.run(lambda *_: pytest.fail("started"), name="evaluate", argv=["--config=smoke", f"--workdir={url}"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and f"error: --workdir={url}: {words}" in error and error.count("\n") == 1, error


def test_regrade_in_a_bucket(storage, tmp_path, monkeypatch, capsys):
  rows = {"gsm": [test_regrade.row(), test_regrade.row("p/2", response=test_regrade.WRONG)]}
  upload("gs://b/run", test_regrade.evaluation(tmp_path / "on_disk", rows))
  monkeypatch.setenv(bucket.SCRATCH, str(tmp_path / "other"))
  flags.run(regrade.main, name="regrade", argv=["--config=eval", "--workdir=gs://b/run"])
  assert json.loads(storage.buckets["b"]["run/regraded/math/summary.json"])["grader"] == "math"
  assert "disagreements" in capsys.readouterr().out


def test_report_of_a_run_in_a_bucket(storage, tmp_path, capsys):
  root = runs_fixture.make_training_run(tmp_path / "mine", steps=12)
  (root / "checkpoints" / "3").mkdir(parents=True)
  (root / "checkpoints" / "3" / "large").write_bytes(b"x")
  upload("gs://b/runs/mine", root)
  storage.requests.clear()
  report.main(["first=gs://b/runs/mine", f"--out={tmp_path / 'out'}"])
  assert "first" in (tmp_path / "out" / "report.md").read_text()
  assert not [r for r in storage.requests if "checkpoints/3/" in r and "units" not in r]
  assert not list((tmp_path / "scratch").glob("read-*"))
  for argv, words in [(["gs://b/nothing", f"--out={tmp_path / 'out'}"], "gs://b/nothing holds nothing"),
                      (["gs://b/runs/mine", "--out=gs://b/out"], "--out=gs://b/out is no directory")]:
    with pytest.raises(SystemExit):
      report.main(argv)
    assert words in capsys.readouterr().err


def test_export_of_a_run_in_a_bucket(storage, tmp_path):
  base = make_checkpoint(tmp_path / "base", "qwen2", hidden=32)
  test_export.make_run(tmp_path / "run", base, best=2)
  upload("gs://b/runs/mine", tmp_path / "run")
  norms = {}
  for source, unwanted in (("", "best/2"), ("/checkpoints/1", "checkpoints/2")):
    storage.requests.clear()
    export.cli([f"gs://b/runs/mine{source}", f"--out={tmp_path / 'out'}"])
    norms[source] = test_export.norm(tmp_path / "out")
    assert not [r for r in storage.requests if f"GET runs/mine/{unwanted}/" in r]
  assert abs(norms[""] - norms["/checkpoints/1"] - 0.02).max() < 1e-5  # As make_run has made them.
