"""Exports that go to a hub: what arrives, what a second push sends, and what a refusal says."""

import warnings

import huggingface_hub
import pytest

from hbpo_jax import hub as hub_lib
from tests.checkpoints import make_checkpoint

NAME = "me/tiny"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  folder = make_checkpoint(tmp_path_factory.mktemp("export"))
  (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
  (folder / "adapter").mkdir()
  (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"small")
  return folder


@pytest.fixture
def writer(hub, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "hf_writer")
  return hub


def content(folder):
  return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_push_makes_the_repository_and_brings_every_file(writer, exported):
  address = hub_lib.push(exported, NAME, message="Weights of a run")
  repo = writer.repos["models", NAME]
  assert {k: v for k, v in repo.head.items() if k != ".gitattributes"} == content(exported)
  assert repo.private and repo.messages[-1] == "Weights of a run"
  assert address == f"{writer.address}/{NAME}/commit/{repo.refs['main']}"


def test_what_was_pushed_is_a_checkpoint_again(writer, exported):
  hub_lib.push(exported, NAME, private=False)
  assert not writer.repos["models", NAME].private
  found = hub_lib.checkpoint(NAME)
  assert content(found) == {k: v for k, v in content(exported).items() if "/" not in k}


def test_a_second_push_sends_nothing_again_and_removes_stale_weights(writer, exported, tmp_path):
  sharded = make_checkpoint(tmp_path / "sharded", seed=1, max_shard_size="200KB")
  hub_lib.push(sharded, NAME)
  repo = writer.repos["models", NAME]
  repo.commit(repo.head | {"notes.md": b"mine", "original/model.safetensors": b"theirs"})
  hub_lib.push(exported, NAME)
  assert {k for k in repo.head if k.endswith((".safetensors", "index.json"))} == {
      "model.safetensors", "adapter/adapter_model.safetensors", "original/model.safetensors"}
  assert repo.head["notes.md"] == b"mine"
  n_commits, before = len(repo.commits), len(writer.requests)
  hub_lib.push(exported, NAME)
  assert len(repo.commits) == n_commits
  assert not any(r.method == "PUT" for r in writer.requests[before:])


def test_a_branch_and_a_folder(writer, exported):
  hub_lib.push(exported, NAME)
  repo = writer.repos["models", NAME]
  before = repo.refs["main"]
  hub_lib.push(exported / "adapter", NAME, folder="other", revision="step-500")
  hub_lib.push(exported / "adapter", NAME, folder="other", revision="step-500")  # The branch is there already.
  assert repo.refs["main"] == before
  assert repo.commits[repo.refs["step-500"]].keys() - repo.head.keys() == {"other/adapter_model.safetensors"}


@pytest.mark.parametrize("token, name, message", [
    (None, NAME, r"push='me/tiny' needs a token that may write; set HF_TOKEN .*settings/tokens.* or run 'hf auth"),
    ("hf_writer", "tiny", r"push='tiny' is not a hub id; write ORG/NAME"),
    ("hf_writer", "me/../x", r"is not a hub id"),
    ("hf_wrong", NAME, r"me/tiny was not pushed: the hub does not accept your token \(.*HF_TOKEN.*exported stays"),
    ("hf_reader", NAME, r"me/tiny was not pushed: your token may not write there .*write permission.*exported stays"),
])
def test_a_push_that_is_refused_says_why(hub, exported, monkeypatch, token, name, message):
  if token:
    monkeypatch.setenv("HF_TOKEN", token)
  before = content(exported)
  with pytest.raises((ValueError, hub_lib.HubError), match=message) as error:
    hub_lib.push(exported, name)
  assert "hf_w" not in str(error.value) and "hf_r" not in str(error.value)
  assert content(exported) == before and not hub.repos


def test_offline_there_is_no_push(writer, exported, monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  with pytest.raises(ValueError, match="cannot be pushed to while HF_HUB_OFFLINE is set"):
    hub_lib.push(exported, NAME)


def test_a_connection_that_fails_is_no_defect(writer, exported, monkeypatch):
  monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
  with pytest.raises(hub_lib.HubError, match=r"me/tiny was not pushed: Connection refused.*sends only what is missing"):
    hub_lib.push(exported, NAME)


def test_a_failed_upload_of_a_large_file_names_the_hubs_answer(writer, exported, monkeypatch):
  storage = writer.storage_address
  writer.storage_address = writer.address + "/nowhere"
  monkeypatch.setattr(huggingface_hub.utils._http, "_DEFAULT_RETRY_ON_STATUS_CODES", ())
  with warnings.catch_warnings(), pytest.raises(hub_lib.HubError, match=r"me/tiny was not pushed"):
    hub_lib.push(exported, NAME)
  writer.storage_address = storage
  hub_lib.push(exported, NAME)
  assert "model.safetensors" in writer.repos["models", NAME].head
