"""run.json: what it holds, that it is written whole, and where the git commit comes from."""

import json
import os
import pathlib
import subprocess

import jax
import pytest

import hbpo_jax
from hbpo_jax import config, run_info


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
  del saved["reward"]["floor"], saved["advantage"]["form"]
  assert run_info.check_resume(cfg, saved) == []
  cd = config.to_config_dict(cfg)
  cd.advantage.form = "leave_one_out"
  with pytest.raises(ValueError, match=r"config.advantage.form='leave_one_out', but .* was trained with 'group'"):
    run_info.check_resume(config.from_config_dict(cd), saved)
