"""Checkpoints that come from a hub: whole, checked, resumed, from the cache, and refused in one clear sentence."""

import hashlib
import os
import pathlib
import pty
import shutil
import subprocess
import sys
import threading
import time

import huggingface_hub
import pytest
import transformers

from hbpo_jax import hub as hub_lib
from hbpo_jax.hub import download, repository
from tests.checkpoints import make_checkpoint

NAME = "org/tiny"
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
  return make_checkpoint(tmp_path_factory.mktemp("sharded"), max_shard_size="200KB")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
  monkeypatch.setattr(repository, "WAITS_S", (0.01, 0.02))


def same_files(found: pathlib.Path, expected: pathlib.Path) -> bool:
  return {p.name: p.read_bytes() for p in found.iterdir()} == {p.name: p.read_bytes() for p in expected.iterdir()}


def blobs() -> pathlib.Path:
  return pathlib.Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--org--tiny" / "blobs"


def test_a_directory_is_itself_and_anything_else_is_refused(tiny, tmp_path):
  assert hub_lib.checkpoint(tiny) == tiny
  (tmp_path / "file").write_text("")
  for path in ("/nowhere/at/all", "name", str(tmp_path / "file"), "a/b/c", "../x"):
    with pytest.raises(hub_lib.HubError, match="is not a directory; give"):
      hub_lib.checkpoint(path)
  with pytest.raises(hub_lib.HubError, match=r"model\.revision='\.\./\.\./x' is no branch"):
    hub_lib.checkpoint(NAME, "../../x")


def test_a_checkpoint_comes_whole_and_once(hub, sharded, capfd):
  repo = hub.add(NAME, sharded)
  found = hub_lib.checkpoint(NAME)
  assert same_files(found, sharded) and hub_lib.origin(found) == {"repo": NAME, "commit": repo.refs["main"]}
  said = capfd.readouterr().err
  total = sum(p.stat().st_size for p in sharded.glob("*.safetensors"))
  assert f"downloading {NAME} (commit {found.name[:12]})" in said and download.size_text(total) in said
  before = len(hub.requests)
  assert hub_lib.checkpoint(NAME) == found
  assert [r.path for r in hub.requests[before:]] == [f"/api/models/{NAME}?blobs=true"]
  assert hub_lib.checkpoint(NAME, found.name) == found
  assert len(hub.requests) == before + 1, "a commit that is here needs no hub"


def test_huggingface_hub_finds_what_came_and_its_files_are_not_fetched_again(hub, tiny, monkeypatch):
  hub.add(NAME, tiny)
  found = hub_lib.checkpoint(NAME)
  assert pathlib.Path(huggingface_hub.snapshot_download(NAME, local_files_only=True)) == found
  assert transformers.AutoConfig.from_pretrained(NAME, local_files_only=True).hidden_size == 64
  shutil.rmtree(blobs().parent)
  theirs = pathlib.Path(huggingface_hub.snapshot_download(NAME, endpoint=hub.address))
  before = len(hub.downloads())
  assert hub_lib.checkpoint(NAME) == theirs
  assert len(hub.downloads()) == before


def test_only_what_is_needed_is_fetched(hub, tiny):
  extra = {"pytorch_model.bin": b"pickle", "consolidated.safetensors": b"twice", "modeling_tiny.py": b"code",
           "original/params.json": b"{}", "onnx/model.onnx": b"other", "README.md": b"---\nlicense: mit\n---\n"}
  hub.add(NAME, {p.name: p.read_bytes() for p in tiny.iterdir()} | extra)
  found = hub_lib.checkpoint(NAME)
  assert {p.name for p in found.rglob("*")} == {p.name for p in tiny.iterdir()} | {"README.md"}


@pytest.mark.parametrize("which", ["branch", "tag/with/slash", "commit"])
def test_a_revision_is_what_it_names(hub, tiny, sharded, which):
  repo = hub.add(NAME, tiny)
  old = repo.refs["main"]
  repo.commit({p.name: p.read_bytes() for p in sharded.iterdir()})
  repo.refs[which] = old
  found = hub_lib.checkpoint(NAME, old if which == "commit" else which)
  assert found.name == old and same_files(found, tiny)
  newest = hub_lib.checkpoint(NAME)
  assert newest.name == repo.refs["main"] and same_files(newest, sharded)


def test_cut_connections_resume_and_only_the_rest_is_sent(hub, tiny, capfd):
  hub.add(NAME, tiny)
  size, piece = (tiny / FILE).stat().st_size, download._CHUNK_BYTES
  hub.cuts[FILE] = [piece, 3 * piece, 0]
  found = hub_lib.checkpoint(NAME)
  assert same_files(found, tiny)
  asked = [r for r in hub.requests if r.host == "storage"]
  assert [r.range for r in asked] == [
      None, f"bytes={piece}-", f"bytes={4 * piece}-", f"bytes={4 * piece}-"]
  assert sum(r.sent for r in asked) == size
  assert capfd.readouterr().err.count(f"{FILE}: connection lost at") == 3
  assert not list(blobs().glob("*.part"))


def test_a_download_that_breaks_off_again_and_again_is_resumed_by_the_same_command(hub, tiny):
  hub.add(NAME, tiny)
  size, piece = (tiny / FILE).stat().st_size, download._CHUNK_BYTES
  hub.cuts[FILE] = [piece + 1000, 0, 0, 0]
  with pytest.raises(hub_lib.HubError, match=r"model\.path='org/tiny'.*model\.safetensors broke off again and again at "
                     r"65\.5 kB.*the same command resumes"):
    hub_lib.checkpoint(NAME)
  assert [p.stat().st_size for p in blobs().glob("*.part")] == [piece]
  assert hub_lib.find_cached(NAME) is None
  hub.requests.clear()
  assert same_files(hub_lib.checkpoint(NAME), tiny)
  (rest,) = [r for r in hub.requests if r.host == "storage"]
  assert (rest.range, rest.sent) == (f"bytes={piece}-", size - piece)


def test_a_storage_that_knows_no_ranges_sends_it_all(hub, tiny):
  hub.add(NAME, tiny)
  hub.ignores_range = True
  hub.cuts[FILE] = [2 * download._CHUNK_BYTES]
  assert same_files(hub_lib.checkpoint(NAME), tiny)


def test_a_busy_hub_is_asked_again(hub, tiny, capfd):
  hub.add(NAME, tiny)
  hub.refusals = [503, 429]
  assert same_files(hub_lib.checkpoint(NAME), tiny)
  assert "HTTP 503" in capfd.readouterr().err


@pytest.mark.parametrize("name", [FILE, "tokenizer.json"])
def test_another_content_than_promised_is_refused_and_named(hub, tiny, name):
  hub.add(NAME, tiny)
  right = (tiny / name).read_bytes()
  hub.wrong[name] = right[:-1] + bytes([right[-1] ^ 1])
  with pytest.raises(hub_lib.HubError, match=rf"{name} came with another content .* and was removed"):
    hub_lib.checkpoint(NAME)
  assert hub_lib.find_cached(NAME) is None
  hub.wrong.clear()
  assert same_files(hub_lib.checkpoint(NAME), tiny)


def test_a_longer_content_than_promised_is_refused(hub, tiny):
  hub.add(NAME, tiny)
  hub.wrong[FILE] = (tiny / FILE).read_bytes() + b"more"
  with pytest.raises(hub_lib.HubError, match=r"model\.safetensors"):
    hub_lib.checkpoint(NAME)
  assert hub_lib.find_cached(NAME) is None


def test_a_damaged_part_of_an_earlier_attempt_is_no_trap(hub, tiny):
  hub.add(NAME, tiny)
  blobs().mkdir(parents=True)
  part = blobs() / f"{hashlib.sha256((tiny / FILE).read_bytes()).hexdigest()}.part"
  part.write_bytes(b"\0" * 5000)
  with pytest.raises(hub_lib.HubError, match="another content"):
    hub_lib.checkpoint(NAME)
  assert same_files(hub_lib.checkpoint(NAME), tiny)


def test_offline_takes_the_cache_and_says_so(hub, tiny, monkeypatch, capfd):
  hub.add(NAME, tiny)
  found = hub_lib.checkpoint(NAME)
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  hub.requests.clear()
  assert hub_lib.checkpoint(NAME) == found
  assert f"offline: {NAME} comes from the cache, commit {found.name[:12]}" in capfd.readouterr().err
  (found / FILE).unlink()
  for name, revision in ((NAME, ""), ("org/other", ""), (NAME, "v2")):
    with pytest.raises(hub_lib.HubError, match=rf"'{name}'.*is not complete in the cache .*HF_HUB_OFFLINE"):
      hub_lib.checkpoint(name, revision)
  assert not hub.requests


def test_a_hub_that_is_away_is_replaced_by_the_cache_or_named(hub, tiny, monkeypatch, capfd):
  hub.add(NAME, tiny)
  found = hub_lib.checkpoint(NAME)
  monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
  assert hub_lib.checkpoint(NAME) == found
  assert "cannot be reached (Connection refused): org/tiny comes from the cache, commit" in capfd.readouterr().err
  with pytest.raises(hub_lib.HubError, match=r"'org/other' is not here, and the hub at http://127\.0\.0\.1:9 cannot be "
                     r"reached .*start the same command again"):
    hub_lib.checkpoint("org/other")
  assert "next try in 0.01 s" in capfd.readouterr().err


def test_an_interrupted_update_leaves_the_older_commit_for_offline_runs(hub, tiny, sharded, monkeypatch):
  repo = hub.add(NAME, tiny)
  old = hub_lib.checkpoint(NAME)
  repo.commit({p.name: p.read_bytes() for p in sharded.iterdir()})
  hub.cuts[sorted(sharded.glob("*.safetensors"))[1].name] = [0] * 3
  with pytest.raises(hub_lib.HubError, match="again and again"):
    hub_lib.checkpoint(NAME)
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  assert hub_lib.checkpoint(NAME) == old


@pytest.mark.parametrize("token, message", [
    (None, r"'org/tiny' is neither a directory here nor a repository at http.*/tiny, or it is private \(HTTP 401\)"),
    ("hf_reader", r"nor a repository at .*, or your token does not open it \(HTTP 404\)"),
    ("hf_wrong", r"the hub does not accept your token \(Invalid credentials.*settings/tokens"),
])
def test_an_unknown_repository_and_a_wrong_token(hub, monkeypatch, token, message):
  if token:
    monkeypatch.setenv("HF_TOKEN", token)
  with pytest.raises(hub_lib.HubError, match=message) as error:
    hub_lib.checkpoint(NAME)
  assert "hf_" not in str(error.value)


def test_a_private_repository_opens_with_the_token_which_only_the_hub_sees(hub, tiny, monkeypatch):
  hub.add(NAME, tiny).private = True
  monkeypatch.setenv("HF_TOKEN", "hf_reader")
  assert same_files(hub_lib.checkpoint(NAME), tiny)
  assert {r.authorization for r in hub.requests if r.host == "hub"} == {"Bearer hf_reader"}
  assert {r.authorization for r in hub.requests if r.host == "storage"} == {None}


def test_an_unknown_revision(hub, tiny):
  hub.add(NAME, tiny)
  for revision in ("v9", "f" * 40):
    with pytest.raises(hub_lib.HubError, match=rf"model\.revision='{revision}' does not exist in http.*/tiny; give"):
      hub_lib.checkpoint(NAME, revision)


@pytest.mark.parametrize("token, status", [(None, 401), ("hf_stranger", 403)])
def test_a_gated_repository_says_where_to_accept_its_terms(hub, tiny, monkeypatch, token, status):
  repo = hub.add(NAME, tiny)
  repo.gated = True
  if token:
    monkeypatch.setenv("HF_TOKEN", token)
  with pytest.raises(hub_lib.GatedError) as error:
    hub_lib.checkpoint(NAME)
  text = str(error.value)
  assert "is gated" in text and f"accept its terms at {hub.address}/{NAME}" in text and "HF_TOKEN" in text
  assert error.value.status == status
  monkeypatch.setenv("HF_TOKEN", "hf_reader")
  assert same_files(hub_lib.checkpoint(NAME), tiny)


@pytest.mark.parametrize("files, message", [
    (["pytorch_model.bin"], r"holds neither model\.safetensors nor .*\(it has pytorch_model\.bin\); pickles"),
    (["adapter_model.safetensors"], r"\(it has adapter_model\.safetensors\); give the base model"),
    (["model-q4.gguf", "a.gguf", "b.gguf", "c.gguf"], r"\(it has a\.gguf, b\.gguf, c\.gguf, \.\.\.\)"),
    ([], r"it has no weights at all"),
])
def test_a_repository_without_safetensors(hub, files, message):
  hub.add(NAME, {"config.json": b"{}"} | dict.fromkeys(files, b"x"))
  with pytest.raises(hub_lib.HubError, match=message):
    hub_lib.checkpoint(NAME)
  assert not hub.downloads(), "nothing was fetched for it"


@pytest.mark.parametrize("index, message", [
    (b"{}", "is not an index of weights"), (b'{"weight_map": {"a": "../x.safetensors"}}', "no safetensors file beside"),
    (b'{"weight_map": {"a": "model-9.safetensors"}}', r"names model-9\.safetensors, which")])
def test_a_bad_index(hub, index, message):
  hub.add(NAME, {"config.json": b"{}", "model.safetensors.index.json": index})
  with pytest.raises(hub_lib.HubError, match=message):
    hub_lib.checkpoint(NAME)


def test_a_disk_without_room_is_named_before_a_byte_comes(hub, tiny, monkeypatch):
  hub.add(NAME, tiny)
  usage = shutil.disk_usage(tiny)
  monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=1000))
  with pytest.raises(hub_lib.HubError, match=r"are to come and .*blobs has 1\.0 kB left; free some space, or set HF_"):
    hub_lib.checkpoint(NAME)
  assert not hub.downloads()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_fills_up_is_named(hub, tiny):
  hub.add(NAME, tiny)
  blobs().mkdir(parents=True)
  (blobs() / f"{hashlib.sha256((tiny / FILE).read_bytes()).hexdigest()}.part").symlink_to("/dev/full")
  with pytest.raises(hub_lib.HubError, match=r"blobs is full; free some space.*the same command resumes"):
    hub_lib.checkpoint(NAME)


def test_a_directory_that_cannot_be_written_is_named(hub, tiny, monkeypatch, tmp_path):
  hub.add(NAME, tiny)
  (tmp_path / "file").write_text("")
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "file"))
  with pytest.raises(hub_lib.HubError, match=r"the cache .* cannot be made \(Not a directory\); set HF_HOME"):
    hub_lib.checkpoint(NAME)


def test_of_several_processes_one_downloads(hub, tiny):
  hub.add(NAME, tiny)
  script = "import sys; from hbpo_jax import hub; print(hub.checkpoint(sys.argv[1]))"
  running = [subprocess.Popen([sys.executable, "-c", script, NAME], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True) for _ in range(3)]
  outputs = [p.communicate(timeout=120) for p in running]
  assert all(p.returncode == 0 for p in running), outputs
  assert len({out for out, _ in outputs}) == 1 and same_files(pathlib.Path(outputs[0][0].strip()), tiny)
  assert [r.sent for r in hub.requests if r.host == "storage"] == [(tiny / FILE).stat().st_size]


def test_one_that_waits_says_so(hub, tiny, capfd):
  hub.add(NAME, tiny)
  blobs().mkdir(parents=True)
  waits = threading.Thread(target=hub_lib.checkpoint, args=(NAME,))
  with download._alone(blobs() / ".lock", ""):
    waits.start()
    text, deadline = "", time.monotonic() + 30
    while "another process" not in text and time.monotonic() < deadline:
      text += capfd.readouterr().err
    assert not hub.downloads()
  waits.join()
  assert "another process on this machine downloads it; waiting" in text
  assert hub_lib.find_cached(NAME) is not None


def test_progress_is_lines_without_a_terminal(hub, tiny, monkeypatch, capfd):
  monkeypatch.setattr(download, "_LINE_S", 0.0)
  monkeypatch.setattr(download, "_CHUNK_BYTES", 100_000)
  hub.add(NAME, tiny)
  hub_lib.checkpoint(NAME)
  said = capfd.readouterr().err
  assert "(100%)" in said and "a second" in said and "\r" not in said


def test_progress_is_a_bar_on_a_terminal(hub, tiny):
  hub.add(NAME, tiny)
  script = "import sys; from hbpo_jax import hub; hub.checkpoint(sys.argv[1])"
  main, side = pty.openpty()
  with subprocess.Popen([sys.executable, "-c", script, NAME], stdout=side, stderr=side,
                        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"}) as process:
    os.close(side)
    shown = b""
    while True:
      try:
        piece = os.read(main, 4096)
      except OSError:
        break
      if not piece:
        break
      shown += piece
  os.close(main)
  assert process.returncode == 0, shown
  text = shown.decode()
  assert "downloading org/tiny" in text and "━" in text and "kB" in text and "connection lost" not in text
