"""Colab's secrets and storage, with Colab's modules played."""

import os
import stat
import sys
import types

import pytest

from hbpo_jax import colab


class NotebookAccessError(Exception):
  pass


class SecretNotFoundError(Exception):
  pass


@pytest.fixture
def played(monkeypatch, tmp_path):
  """Colab's modules; `calls` is what was asked of them."""
  calls = []

  def get(name):
    if name == "MISSING":
      raise SecretNotFoundError(f"Secret {name} does not exist.")
    if name == "REFUSED":
      raise NotebookAccessError(f"Notebook does not have access to secret {name}")
    return f"value of {name}"

  modules = {
      "userdata": dict(get=get, NotebookAccessError=NotebookAccessError, SecretNotFoundError=SecretNotFoundError),
      "drive": dict(mount=lambda path: calls.append(("drive", path))),
      "auth": dict(authenticate_user=lambda: calls.append(("auth",)))}
  for name in ("google", "google.colab"):
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
  for name, content in modules.items():
    module = types.ModuleType(f"google.colab.{name}")
    module.__dict__.update(content)
    monkeypatch.setitem(sys.modules, module.__name__, module)
  monkeypatch.setattr(colab, "_DRIVE", tmp_path / "drive")
  monkeypatch.setattr(colab, "_BUCKETS", tmp_path / "gcs")
  monkeypatch.chdir(tmp_path)
  return calls


@pytest.fixture
def gcsfuse(monkeypatch, tmp_path):
  """A gcsfuse that writes down its arguments, and fails for the bucket `theirs`."""
  program = tmp_path / "bin" / "gcsfuse"
  program.parent.mkdir()
  program.write_text(
      f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/arguments\n'
      'case "$*" in *theirs*) echo first >&2; echo "403 Forbidden" >&2; exit 1;; esac\n')
  program.chmod(program.stat().st_mode | stat.S_IEXEC)
  monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
  return tmp_path / "arguments"


def test_a_secret_is_set_and_not_printed(played, monkeypatch, capsys):
  monkeypatch.delenv("HF_TOKEN", raising=False)
  monkeypatch.setenv("HF_TOKEN", "before")
  colab.use_secret("HF_TOKEN")
  assert os.environ["HF_TOKEN"] == "value of HF_TOKEN"
  assert capsys.readouterr().out == "HF_TOKEN is set\n"


@pytest.mark.parametrize("name, reason", [("MISSING", "does not exist"), ("REFUSED", "does not have access")])
def test_a_secret_that_is_not_there_leaves_the_environment(played, monkeypatch, capsys, name, reason):
  monkeypatch.delenv(name, raising=False)
  colab.use_secret(name)
  assert name not in os.environ
  out = capsys.readouterr().out
  assert out.startswith(f"{name} is not set (") and reason in out and "Secrets are under the key" in out
  monkeypatch.setenv(name, "from elsewhere")
  colab.use_secret(name)
  assert os.environ[name] == "from elsewhere" and capsys.readouterr().out == f"{name} is set\n"


def test_outside_colab_the_environment_stays(monkeypatch, capsys):
  monkeypatch.setenv("HF_TOKEN", "mine")
  colab.use_secret("HF_TOKEN")
  monkeypatch.delenv("HF_TOKEN")
  colab.use_secret("HF_TOKEN")
  assert capsys.readouterr().out == "HF_TOKEN is set\nHF_TOKEN is not set\n"


def test_workdir_on_this_machine(monkeypatch, tmp_path, capsys):
  monkeypatch.chdir(tmp_path)
  assert colab.open_workdir("mine") == str(tmp_path / "runs" / "mine")
  assert (tmp_path / "runs" / "mine").is_dir() and "GiB free" in capsys.readouterr().out


def test_workdir_in_drive(played, tmp_path):
  workdir = colab.open_workdir("mine", "Google Drive")
  assert workdir == str(tmp_path / "drive" / "MyDrive" / "hbpo_jax" / "mine")
  assert played == [("drive", str(tmp_path / "drive"))]


@pytest.mark.parametrize("storage, folder", [
    ("gs://ours", ""), ("gs://ours/", ""), ("gs://ours/a/b", "a/b"), ("gs://ours//a", "a")])
def test_workdir_in_a_bucket(played, gcsfuse, tmp_path, storage, folder):
  mount = tmp_path / "gcs" / "ours"
  assert colab.open_workdir("mine", storage) == str(mount / folder / "mine")
  assert played == [("auth",)]
  arguments = gcsfuse.read_text().splitlines()
  assert arguments[-2:] == ["ours", str(mount)] and "--enable-streaming-writes=false" in arguments


def test_a_bucket_that_cannot_be_mounted_is_named(played, gcsfuse):
  with pytest.raises(ValueError, match=r"gs://theirs cannot be mounted.*objectUser.*\(403 Forbidden\)"):
    colab.open_workdir("mine", "gs://theirs")


@pytest.mark.parametrize("storage", ["Google Drive", "gs://ours"])
def test_what_needs_colab_says_so(monkeypatch, tmp_path, storage):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=f"{storage}.*needs Google Colab.*this machine"):
    colab.open_workdir("mine", storage)


@pytest.mark.parametrize("storage", ["", "drive", "gs://", "gs:///x", "s3://ours", "gs://MY-BUCKET", "gs://my bucket"])
def test_another_storage_is_refused(played, storage):
  with pytest.raises(ValueError, match="is not understood; give 'this machine', 'Google Drive' or gs://BUCKET"):
    colab.open_workdir("mine", storage)
