"""Atomic writes, strict JSON, and the resume rule of step logs."""

import errno
import json
import math
import os

import jax.numpy as jnp
import numpy as np
import pytest

from hbpo_jax import files, flags


def test_atomic_write_replaces_and_leaves_nothing_aside(tmp_path):
  path = tmp_path / "new" / "a.txt"
  files.atomic_write_text(path, "old")
  files.atomic_write_text(path, "é \ud800")
  assert path.read_text(encoding="utf-8") == "é ?"
  assert os.listdir(path.parent) == ["a.txt"]


def test_failed_atomic_write_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "a.txt"
  files.atomic_write_text(path, "old")

  def refuse(*_):
    raise OSError("disk full")

  monkeypatch.setattr(os, "fsync", refuse)
  with pytest.raises(OSError, match="disk full"):
    files.atomic_write_text(path, "new")
  assert path.read_text() == "old"
  assert os.listdir(tmp_path) == ["a.txt"]


def test_json_value_is_strict():
  row = {
      "nan": math.nan, "inf": np.float32(np.inf), "array": np.array([1.5, np.nan]), "jax": jnp.float32(2.5),
      "tuple": (1, True, None), "text": "a\ud800b\x1b[31m", 3: np.int64(7)
  }
  line = files.json_line(row)
  assert line.isascii() and line.endswith("}\n") and line.count("\n") == 1

  def refuse(constant):
    raise AssertionError(constant)

  assert json.loads(line, parse_constant=refuse) == {
      "nan": None, "inf": None, "array": [1.5, None], "jax": 2.5, "tuple": [1, True, None],
      "text": "a\ufffdb\x1b[31m", "3": 7
  }
  with pytest.raises(TypeError, match="set"):
    files.json_line({"a": {1}})


def test_resume_drops_later_rows_and_the_cut_off_line(tmp_path):
  path = tmp_path / "log.jsonl"
  log = files.StepFile(path)
  for step in range(6):
    log.write(step, [{"attempt": 1}])
  log.close()
  with open(path, "a") as f:
    f.write('{"step": 6, "att')  # Killed in the middle of a row.
  assert [row["step"] for row in files.read_rows(path)] == list(range(6))

  log = files.StepFile(path, resume_step=4)
  for step in range(4, 7):
    log.write(step, [{"attempt": 2}])
  log.close()
  log.close()
  rows = files.read_rows(path)
  assert [(row["step"], row["attempt"]) for row in rows] == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]


def test_cut_off_line_goes_even_when_every_row_stays(tmp_path):
  path = tmp_path / "log.jsonl"
  path.write_text('{"step": 0}\n{"step": 1')
  log = files.StepFile(path, resume_step=1)
  log.write(1, [{}])
  log.close()
  assert path.read_text() == '{"step": 0}\n{"step": 1}\n'


def test_a_fresh_start_drops_everything(tmp_path):
  path = tmp_path / "log.jsonl"
  path.write_text('{"step": 0}\n{"step": 1}\n')
  files.StepFile(path).close()
  assert path.read_text() == ""


def test_rows_are_on_disk_at_once(tmp_path, monkeypatch):
  synced, fsync = [], os.fsync
  monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), fsync(fd)))
  log = files.StepFile(tmp_path / "log.jsonl")
  log.write(0, [{"a": 1}, {"a": 2}])
  assert len(files.read_rows(tmp_path / "log.jsonl")) == 2
  assert synced == [(tmp_path / "log.jsonl").stat().st_size]
  log.close()


def test_step_log_refuses_repeats_and_step_fields(tmp_path):
  log = files.StepFile(tmp_path / "log.jsonl")
  log.write(3, [{}])
  with pytest.raises(ValueError, match="step=3"):
    log.write(3, [{}])
  with pytest.raises(ValueError, match="'step'"):
    log.write(4, [{"step": 1}])
  log.close()


@pytest.mark.parametrize("line", ["not json", "[1]", '{"a": 1}', '{"step": "1"}', '{"step": true}'])
def test_damaged_line_is_named(tmp_path, line):
  path = tmp_path / "log.jsonl"
  path.write_text('{"step": 0}\n' + line + "\n")
  with pytest.raises(ValueError, match="line 2"):
    files.StepFile(path, resume_step=1)


def test_a_row_that_was_left_open_is_completed(tmp_path):
  path = tmp_path / "log.jsonl"
  log = files.StepFile(path)
  log.write(0, [{"a": 1}])
  log.write(1, [{"a": 2.5}])
  log.close()
  log = files.StepFile(path, resume_step=2)
  for _ in range(2):  # Once more, where the run was killed after it.
    log.amend(1, {"b": 3.0})
  log.write(2, [{"a": 4}])
  with pytest.raises(ValueError, match="does not end with step 1"):
    log.amend(1, {"b": 3.0})
  log.close()
  assert path.read_text() == '{"step": 0, "a": 1}\n{"step": 1, "a": 2.5, "b": 3.0}\n{"step": 2, "a": 4}\n'


@pytest.mark.parametrize("code, words", [
    (errno.ENOSPC, "No space left on device; free space there"), (errno.EROFS, "make it writable"),
    (errno.EDQUOT, "free space there"), (errno.EIO, "mend the disk")])
def test_trouble_with_the_disk_names_file_and_remedy(tmp_path, monkeypatch, capsys, code, words):
  log = files.StepFile(tmp_path / "log.jsonl")

  def fail(*_):
    raise OSError(code, os.strerror(code))

  def main(cfg, workdir):
    log.write(0, [{"a": 1}])

  monkeypatch.setattr(os, "fsync", fail)
  with pytest.raises(SystemExit) as end:
    flags.run(main, name="x", description="", argv=["--config=smoke", f"--workdir={tmp_path}"])
  error = capsys.readouterr().err
  assert end.value.code == 2 and error.startswith(f"error: {tmp_path / 'log.jsonl'}: ") and error.count("\n") == 1
  assert words in error and "goes on from there" in error


def test_other_errors_are_no_trouble_with_the_disk(tmp_path):
  for error in (OSError(errno.ECONNRESET, "gone"), ValueError("x"), OSError("no number")):
    assert files.storage_trouble(error) == ""
  with pytest.raises(OSError) as raised, files.naming(tmp_path):
    raise OSError(errno.ENOSPC, "full", "other")
  assert raised.value.filename == "other"
