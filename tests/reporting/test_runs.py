"""Reading run directories, and what is said of those that cannot be read."""

import json

import pytest

from hbpo_jax.reporting import runs
from tests.reporting import runs_fixture


def test_training_run(tmp_path):
  run = runs.read(runs_fixture.make_training_run(tmp_path / "r"), "r", alone=True)
  assert [(e.name, e.stage, e.step) for e in run.evaluations] == [
      ("before", "base", None), ("step 30", "step", 30), ("after", "trained", None)]
  assert [e.name for e in run.main] == ["before", "after"]
  assert len(run.metrics) == runs_fixture.STEPS and run.samples[0]["budget"] == 512 and run.notes == ()
  assert run.settings["rollout.budgets"] == [512, 1024, 2048, 2560] and run.settings["reward.curve"] == "log"
  assert run.main[0].results["benchmarks"]["eval"]["modes"]["natural"]["n"] == 40


def test_evaluation_on_its_own(tmp_path):
  run = runs.read(runs_fixture.make_evaluation(tmp_path / "e"), "mine")
  assert run.info is None and [e.name for e in run.evaluations] == ["mine"]
  assert run.settings["eval.temperature"] == 0.6


def test_evaluations_carry_the_name_of_their_run_where_there_are_several(tmp_path):
  for name in ("a", "b"):
    runs_fixture.make_training_run(tmp_path / name)
  found = runs.read_all([str(tmp_path / "a"), f"second={tmp_path / 'b'}"])
  assert [run.name for run in found] == ["a", "second"]
  assert [e.name for e in found[1].main] == ["second: before", "second: after"]


def test_names_are_made_unique(tmp_path):
  paths = [runs_fixture.make_evaluation(tmp_path / folder / "e", n_problems=2) for folder in ("x", "y", "z")]
  assert [run.name for run in runs.read_all(list(map(str, paths)))] == ["e", "e (2)", "e (3)"]
  assert [run.name for run in runs.read_all([str(paths[0]), f"e={paths[1]}"])] == ["e (2)", "e"]
  with pytest.raises(ValueError, match="'e' is given to two runs"):
    runs.read_all([f"e={paths[0]}", f"e={paths[1]}"])


def test_a_path_may_hold_an_equals_sign(tmp_path):
  folder = runs_fixture.make_evaluation(tmp_path / "lr=1e-6", n_problems=2)
  assert runs.read_all([str(folder)])[0].name == "lr=1e-6"
  with pytest.raises(ValueError, match="has no path; write NAME=PATH"):
    runs.read_all(["name="])


def test_no_such_directory(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"nowhere is not a directory; give that of a training run"):
    runs.read_all([str(tmp_path / "nowhere")])
  (tmp_path / "file").write_text("")
  with pytest.raises(FileNotFoundError, match="file is not a directory"):
    runs.read(tmp_path / "file", "f")
  with pytest.raises(ValueError, match="no run is given"):
    runs.read_all([])


def test_an_empty_directory_says_what_was_looked_for(tmp_path):
  with pytest.raises(ValueError, match=r"holds no run: there is no run.json, metrics.jsonl or eval/\*/eval.json"):
    runs.read(tmp_path, "r")


def test_other_formats_are_refused(tmp_path):
  evaluation = runs_fixture.make_evaluation(tmp_path / "e", n_problems=2)
  manifest = json.loads((evaluation / "eval.json").read_text())
  (evaluation / "eval.json").write_text(json.dumps(manifest | {"format": 7, "hbpo_jax": "9.9"}))
  with pytest.raises(ValueError, match=r"eval.json is of format 7, written by hbpo_jax 9.9"):
    runs.read(evaluation, "e")
  run = runs_fixture.make_training_run(tmp_path / "r", evaluate=False, steps=2)
  info = json.loads((run / "run.json").read_text())
  (run / "run.json").write_text(json.dumps(info | {"format": 2}))
  with pytest.raises(ValueError, match=r"run.json is of format 2, written by hbpo_jax 0.1.0; this version reads"):
    runs.read(run, "r")


@pytest.mark.parametrize("text", ["{", "[]", '{"config": 3}', "{}"])
def test_a_damaged_run_json(tmp_path, text):
  run = runs_fixture.make_training_run(tmp_path / "r", evaluate=False, steps=2)
  (run / "run.json").write_text(text)
  with pytest.raises(ValueError, match=r"run.json is not"):
    runs.read(run, "r")


def test_lines_cut_in_half_are_left_out_and_mentioned(tmp_path):
  root = runs_fixture.make_training_run(tmp_path / "r", steps=5)
  files = [root / "metrics.jsonl", root / "samples.jsonl", root / "eval" / "base" / "responses" / "eval.jsonl"]
  for file in files:
    file.write_bytes(file.read_bytes()[:-20])
  run = runs.read(root, "r", alone=True)
  assert [row["step"] for row in run.metrics] == [0, 1, 2, 3]
  assert run.main[0].results["benchmarks"]["eval"]["modes"]["natural"]["n"] == 39
  for file in files:
    assert any(str(file) in note and "half a line" in note for note in run.notes), file


@pytest.mark.parametrize("file", ["metrics.jsonl", "samples.jsonl", "eval/base/responses/eval.jsonl",
                                  "eval/base/problems/eval.jsonl"])
def test_a_damaged_line_is_named(tmp_path, file):
  root = runs_fixture.make_training_run(tmp_path / "r", steps=3)
  lines = (root / file).read_text().splitlines(keepends=True)
  lines[1] = '{"step": \n'
  (root / file).write_text("".join(lines))
  with pytest.raises(ValueError, match=rf"{file.rpartition('/')[2]}(:| line )2 is not JSON .*; (remove|restore)"):
    runs.read(root, "r")


def test_an_evaluation_of_an_older_version_is_mentioned(tmp_path):
  root = runs_fixture.make_training_run(tmp_path / "r", evaluate=False, steps=3)
  (root / "eval").mkdir()
  (root / "eval" / "base.jsonl").write_text("{}\n")
  run = runs.read(root, "r")
  assert run.evaluations == () and "base.jsonl is an evaluation of an older version" in run.notes[0]


def test_a_run_without_run_json_still_has_its_curves(tmp_path):
  root = runs_fixture.make_training_run(tmp_path / "r", evaluate=False, steps=3)
  (root / "run.json").unlink()
  run = runs.read(root, "r")
  assert len(run.metrics) == 3 and run.settings == {} and "run.json is missing" in run.notes[0]


def test_settings_that_differ(tmp_path):
  changes = {"optimizer.learning_rate": 2e-6, "rollout.budgets": (512, 2560)}
  paths = [runs_fixture.make_training_run(tmp_path / "a", evaluate=False, steps=1),
           runs_fixture.make_training_run(tmp_path / "b", evaluate=False, steps=1, changes=changes),
           runs_fixture.make_evaluation(tmp_path / "e", n_problems=2)]
  found = dict(runs.different_settings(runs.read_all(list(map(str, paths)))))
  assert found == {"rollout.budgets": [[512, 1024, 2048, 2560], [512, 2560], None],
                   "optimizer.learning_rate": [1e-6, 2e-6, None]}
