"""run.json: what it holds, that it is written whole, and where the git commit comes from."""

import dataclasses
import json
import os
import pathlib
import subprocess

import jax
import pytest

import hbpo_jax
from hbpo_jax import config, flags, run_info


@pytest.fixture
def mesh():
  return jax.sharding.Mesh([[[jax.devices()[0]]]], ("data", "fsdp", "tensor"))


def git(folder: pathlib.Path, *arguments: str) -> None:
  subprocess.run(["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True,
                 capture_output=True)


def read(folder):
  return json.loads((folder / "run.json").read_text())


def test_run_json_holds_what_a_run_is_made_of(tmp_path, mesh):
  cfg = config.from_config_dict(config.new("released"))
  run_info.write_run_json(tmp_path / "new", cfg, mesh, {"n_problems": 3})
  found = read(tmp_path / "new")
  assert found["config"] == json.loads(json.dumps(config.to_json_dict(cfg)))
  assert found["hbpo_jax"] == hbpo_jax.__version__ and found["versions"]["jax"] == jax.__version__
  assert found["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
  assert found["devices"]["platform"] == "cpu" and (found["devices"]["used"], found["devices"]["present"]) == (1, 8)
  assert found["profile_differences"] == run_info.describe_profile(cfg) and len(found["profile_differences"]) == 6
  assert found["n_problems"] == 3 and found["command"] and found["started"] and found["earlier_starts"] == []
  assert [p.name for p in (tmp_path / "new").iterdir()] == ["run.json"]


def test_rerun_keeps_the_starts_before_it(tmp_path, mesh):
  for steps in (1, 2, 3):
    cfg = config.Config(steps=steps)
    run_info.write_run_json(tmp_path, cfg, mesh)
  found = read(tmp_path)
  assert found["config"]["steps"] == 3 and len(found["earlier_starts"]) == 2
  assert set(found["earlier_starts"][0]) == {"started", "command"}


def changed(cfg, **settings):
  return run_info.compare(cfg, config.to_json_dict(flags.build(config.to_config_dict(cfg), {
      name.replace("__", "."): value for name, value in settings.items()})))


def test_changes_are_harmless_or_break_the_run():
  cfg = config.from_config_dict(config.new())
  saved = {
      "steps": 3, "log__every": 7, "rollout__budgets": (512, 1024), "loss__clip_high": 0.5, "grading__workers": 3,
      "mesh__fsdp": 2, "seed": 4}
  found = {c.name: (c.was, c.now, c.breaking) for c in changed(cfg, **saved)}
  assert found == {
      "steps": (3, 629, False), "log.every": (7, 1, False), "rollout.budgets": ((512, 1024), cfg.rollout.budgets, True),
      "loss.clip_high": (0.5, 0.28, True), "grading.workers": (3, 0, False), "mesh.fsdp": (2, -1, False),
      "seed": (4, 0, True)}
  decaying = dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, schedule="cosine"))
  assert [c.breaking for c in changed(decaying, steps=3)] == [True]  # The schedule reaches over the steps.


def test_breaking_changes_are_refused_together_unless_they_are_named():
  cfg = config.Config(seed=4, loss=config.LossConfig(clip_high=0.5), log=config.LogConfig(every=3))
  saved = config.to_json_dict(config.Config())
  changes = run_info.Changes(cfg)
  with pytest.raises(ValueError) as refused:
    changes.check(saved)
  for part in (
      "config.seed=4 (was 0)", "config.loss.clip_high=0.5 (was 0.28)", "another --workdir",
      "--config.checkpoint.allow_changes=seed,loss.clip_high.", "config.log.every=3 (was 1) would be harmless"):
    assert part in str(refused.value)
  half = dataclasses.replace(cfg, checkpoint=config.CheckpointConfig(allow_changes=("seed",)))
  with pytest.raises(ValueError, match="allow_changes=loss.clip_high"):
    run_info.Changes(half).check(saved)
  for names in (("all",), ("seed", "loss.clip_high")):
    allowed = run_info.Changes(dataclasses.replace(cfg, checkpoint=config.CheckpointConfig(allow_changes=names)))
    allowed.check(saved)
    harmless, breaking = allowed.lines()
    assert "harmless: " in harmless and "config.log.every=3 (was 1)" in harmless and "seed" not in harmless
    assert breaking.endswith("what is learnt: config.seed=4 (was 0), config.loss.clip_high=0.5 (was 0.28)")
  changes.check(config.to_json_dict(cfg))
  assert changes.lines() == [] and changes.at(3) == []


def test_other_contents_under_the_same_setting_are_refused():
  cfg = config.Config(data=config.DataConfig(source="a.jsonl", n_eval=5))
  saved = config.to_json_dict(config.Config(data=config.DataConfig(source="a.jsonl", n_eval=3)))
  changes = run_info.Changes(cfg, {"data.source": "22"})
  for known in ({}, {"data.source": "22"}, {"model.path": "1"}):
    changes.check(saved, known)
    assert [c.name for c in changes.found] == ["data.n_eval"] and not changes.found[0].breaking
  with pytest.raises(ValueError, match=r"config.data.source='a.jsonl \(contents 22\)' \(was 'a.jsonl \(contents 11\)'\)"
                                       r".*allow_changes=data.source.*data.n_eval=5 \(was 3\) would be harmless"):
    changes.check(saved, {"data.source": "11"})
  allowed = dataclasses.replace(cfg, checkpoint=config.CheckpointConfig(allow_changes=("data.source",)))
  run_info.Changes(allowed, {"data.source": "22"}).check(saved, {"data.source": "11"})


def test_changes_are_recorded_once_and_stay(tmp_path, mesh):
  rows = run_info.Changes(config.Config(seed=4, checkpoint=config.CheckpointConfig(allow_changes=("all",))))
  rows.check(config.to_json_dict(config.Config()))
  for given in ((), rows.at(7), rows.at(7), ()):
    run_info.write_run_json(tmp_path, config.Config(), mesh, changes=given)
  assert read(tmp_path)["changes"] == [{"step": 7, "setting": "seed", "was": 0, "now": 4, "breaking": True}]


def test_failed_write_leaves_the_old_file(tmp_path, mesh, monkeypatch):
  run_info.write_run_json(tmp_path, config.Config(), mesh)
  before = (tmp_path / "run.json").read_text()
  with pytest.raises(TypeError):
    run_info.write_run_json(tmp_path, config.Config(steps=2), mesh, {"bad": object()})
  with pytest.raises(ValueError, match="extra='config' is already an entry"):
    run_info.write_run_json(tmp_path, config.Config(steps=2), mesh, {"config": 1})
  with pytest.raises(ValueError, match="JSON"):
    run_info.write_run_json(tmp_path, config.Config(steps=2), mesh, {"bad": float("nan")})

  def full(source, target):
    raise OSError("no space left")

  monkeypatch.setattr(os, "replace", full)
  with pytest.raises(OSError, match="no space left"):
    run_info.write_run_json(tmp_path, config.Config(steps=2), mesh)
  assert (tmp_path / "run.json").read_text() == before
  assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_foreign_run_json_is_refused(tmp_path, mesh):
  (tmp_path / "run.json").write_text("[]")
  with pytest.raises(ValueError, match=r"run\.json is not a run\.json of this program; remove it"):
    run_info.write_run_json(tmp_path, config.Config(), mesh)
  assert (tmp_path / "run.json").read_text() == "[]"


def test_git_state_of_a_checkout(tmp_path):
  package = tmp_path / "package"
  package.mkdir()
  (package / "__init__.py").write_text("")
  assert run_info.git_state(package) is None  # no checkout
  git(tmp_path, "init")
  git(tmp_path, "add", ".")
  assert run_info.git_state(package) is None  # nothing committed yet
  git(tmp_path, "rm", "-r", "--cached", ".")
  git(tmp_path, "commit", "--allow-empty", "-m", "first")
  assert run_info.git_state(package) is None  # inside a checkout that does not hold it
  git(tmp_path, "add", ".")
  git(tmp_path, "commit", "-m", "second")
  clean = run_info.git_state(package)
  assert len(clean["commit"]) == 40 and clean["dirty"] is False
  (package / "__init__.py").write_text("changed = 1\n")
  assert run_info.git_state(package) == {"commit": clean["commit"], "dirty": True}


def test_a_setting_newer_than_the_checkpoint_had_its_default():
  cfg = config.from_config_dict(config.new("paper"))
  saved = config.to_json_dict(cfg)
  del saved["reward"]["floor"], saved["advantage"]["form"], saved["lora"]
  assert run_info.compare(cfg, saved) == []
  cd = config.to_config_dict(cfg)
  cd.advantage.form = "leave_one_out"
  with pytest.raises(ValueError, match=r"config.advantage.form='leave_one_out' \(was 'group'\)"):
    run_info.Changes(config.from_config_dict(cd)).check(saved)
