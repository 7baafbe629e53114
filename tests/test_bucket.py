"""The mirror of a working directory: what the bucket holds at any kill, what a start makes of it, what goes wrong."""

import base64
import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from hbpo_jax import bucket, distributed
from hbpo_jax.bucket import mirror, objects
from hbpo_jax.config import DistributedConfig
from tests import gcs_server

URL = "gs://b/runs/mine"


class Killed(BaseException):
  """The machine is gone."""


class Client:
  """The part of fsspec that is used, over a dict; `before(operation, name)` is called first and may raise."""

  def __init__(self):
    self.files: dict[str, bytes] = {}
    self.done: list[tuple[str, str]] = []
    self.before = lambda operation, name: None

  def _do(self, operation, path):
    name = path.removeprefix("b/runs/mine/")
    self.before(operation, name)
    self.done.append((operation, name))
    return name

  def invalidate_cache(self):
    pass

  def find(self, root, detail):
    self._do("list", root)
    assert root == "b/runs/mine" and detail
    found = {f"{root}/{n}": {"size": len(c), "type": "file", "md5Hash": gcs_md5(c)} for n, c in self.files.items()}
    return found | {f"{root}2/of/another/run": {"size": 1, "type": "file"}}

  def cat_file(self, path):
    name = self._do("read", path)
    if name not in self.files:
      raise FileNotFoundError(path)
    return self.files[name]

  def pipe_file(self, path, content):
    self.files[self._do("write", path)] = content

  def put_file(self, local, path):
    name = self._do("write", path)
    with open(local, "rb") as file:
      self.files[name] = file.read()

  def get_file(self, path, local):
    name = self._do("get", path)
    with open(local, "wb") as file:
      file.write(self.files[name])

  def rm_file(self, path):
    if self.files.pop(self._do("delete", path), None) is None:
      raise FileNotFoundError(path)

  def ordinary(self):
    """Objects that are no marks of the mirror."""
    return {n: c for n, c in self.files.items() if not n.startswith(".mirror/")}

  def written(self):
    """Files written since the last call, without the mirror's own."""
    found = sorted(n for o, n in self.done if o == "write" and not n.startswith(".mirror/"))
    self.done.clear()
    return found


def gcs_md5(content):
  return base64.b64encode(hashlib.md5(content).digest()).decode()


@pytest.fixture
def client(monkeypatch, tmp_path):
  """The bucket; retries do not wait, and passes come only when they are asked for."""
  made = Client()
  monkeypatch.setattr(objects, "_client", lambda *_: made)
  monkeypatch.setattr(objects, "WAITS_S", (0.0, 0.0, 0.0))
  monkeypatch.setattr(mirror, "_LOOK_S", 1e6)
  monkeypatch.setattr(mirror, "_THREADS", 1)
  monkeypatch.setenv(bucket.SCRATCH, str(tmp_path / "scratch"))
  return made


def new_machine(monkeypatch, tmp_path, name="other"):
  monkeypatch.setenv(bucket.SCRATCH, str(tmp_path / name))


def write(root, files):
  for name, content in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())


def read(root):
  return {p.relative_to(root).as_posix(): p.read_bytes().decode() for p in root.rglob("*")
          if p.is_file() and ".mirror" not in p.parts}


def saved(step, folder="checkpoints"):
  return {f"{folder}/{step}/{name}": f"{folder} {step} {name}" for name in ("meta/m", "state/a", "state/d/b", "sums")}


# What a run has on its disk when its steps 3 and 6 are saved; what only the second has is written after the first.
FIRST = {
    "metrics.jsonl": "0\n1\n2\n", "run.json": "first", "verdicts/verdicts-2.json": "v2", **saved(3),
    **saved(2, "best"), "best/best.json": '{"step": 2}', "dumps/step_1/meta.json": "{}", "dumps/step_1/batch.npz": "b"}
SECOND = {
    "metrics.jsonl": "0\n1\n2\n3\n4\n5\n", "run.json": "first", "verdicts/verdicts-5.json": "v5",
    "ahead/rollouts-6.npz": "r", **saved(6), **saved(4, "best"), "best/best.json": '{"step": 4}',
    "dumps/step_1/meta.json": "{}", "dumps/step_1/batch.npz": "b", "export/config.json": "{}",
    "export/model.safetensors": "w"}


@contextlib.contextmanager
def opened(**options):
  with bucket.opened(URL, **options) as workdir:
    yield pathlib.Path(workdir)


def leave(root, state):
  """Makes a directory hold exactly this."""
  for name in set(read(root)) - set(state):
    (root / name).unlink()
  write(root, {name: content for name, content in state.items() if read(root).get(name) != content})


def test_a_pass_that_is_cut_off_anywhere_leaves_a_state_to_go_on_from(client, tmp_path, monkeypatch):
  with opened() as root:
    write(root, FIRST)
  # An upload of that checkpoint was cut off before, of other bytes under the same names.
  first = client.files | {name: b"?" * len(content) for name, content in saved(6).items()}

  def attempt(cut):
    """The objects after a second pass whose writes and deletions end before that of this number."""
    new_machine(monkeypatch, tmp_path, f"cut{cut}")
    client.files, left = dict(first), [cut]
    with contextlib.suppress(Killed), opened() as root:
      leave(root, SECOND)

      def before(operation, name):
        if operation in ("write", "delete"):
          left[0] -= 1
          if left[0] < 0:
            raise Killed

      client.before = before
      bucket.settle()
      client.before = lambda *_: None
      return True
    client.before = lambda *_: None
    return False

  outcomes = set()
  for cut in range(100):
    is_whole = attempt(cut)
    new_machine(monkeypatch, tmp_path, f"after{cut}")
    with opened() as root:
      found = read(root)
    for step, folder in ((3, "checkpoints"), (6, "checkpoints"), (2, "best"), (4, "best")):
      there = {n: c for n, c in found.items() if n.startswith(f"{folder}/{step}/")}
      assert there in ({}, saved(step, folder)), (cut, there)
    steps = {s for s in (3, 6) if f"checkpoints/{s}/sums" in found}
    assert steps, cut
    if 6 in steps:
      assert found["metrics.jsonl"] == SECOND["metrics.jsonl"] and {
          "ahead/rollouts-6.npz", "verdicts/verdicts-5.json"} <= found.keys(), cut
    if 3 in steps and "verdicts/verdicts-5.json" not in found:
      assert "verdicts/verdicts-2.json" in found
    assert f"best/{json.loads(found['best/best.json'])['step']}/sums" in found, cut
    assert ("export/config.json" in found) == ("export/model.safetensors" in found), cut
    assert all(content in (FIRST.get(name), SECOND.get(name)) for name, content in found.items()), cut
    outcomes.add(tuple(sorted(steps)))
    if is_whole:
      assert found == SECOND
      break
  assert is_whole and outcomes == {(3,), (3, 6), (6,)} and cut > 20


def test_only_what_changed_is_written(client):
  with opened() as root:
    write(root, FIRST)
    bucket.settle()
    assert client.written() == sorted(FIRST)
    bucket.settle()
    assert client.written() == []
    with open(root / "metrics.jsonl", "a") as file:
      file.write("3\n")
    (root / "run.json").unlink()
    write(root, {"run.json": "later", **saved(6)})
    bucket.settle()
    assert client.written() == sorted(["metrics.jsonl", "run.json", *saved(6)])
    (root / "export").mkdir()
    write(root, {"export/config.json": "{}", "export/README.md": "card"})
    bucket.settle()
    write(root, {"export/README.md": "with results"})
    client.done.clear()
    bucket.settle()
    # Whoever looks in between must not take the old marker for that of the new files.
    assert [(o, n) for o, n in client.done if "export" in n] == [
        ("delete", ".mirror/units/export.json"), ("write", "export/README.md"), ("write", ".mirror/units/export.json")]
  assert client.files["metrics.jsonl"] == b"0\n1\n2\n3\n" and "checkpoints/6/sums" in client.files


def test_what_is_gone_from_the_disk_goes_from_the_bucket_last(client):
  with opened() as root:
    write(root, FIRST)
    bucket.settle()
    client.files["notes/mine.txt"] = b"of somebody else"
    client.done.clear()
    leave(root, SECOND)
  assert client.ordinary() == {n: c.encode() for n, c in SECOND.items()} | {"notes/mine.txt": b"of somebody else"}
  changes = [(o, n) for o, n in client.done if o in ("write", "delete") and n != ".mirror/owner.json"]
  kinds = [o for o, n in changes if n not in [f".mirror/units/{u}.json" for u in ("dumps/step_1",)]]
  assert kinds == sorted(kinds, reverse=True), "writes, then deletions"
  deleted = [n for o, n in changes if o == "delete"]
  assert deleted.index(".mirror/units/checkpoints/3.json") < deleted.index("checkpoints/3/sums")


def test_the_best_step_may_change_during_a_pass(client, monkeypatch):
  walk, todo = mirror.Mirror._files, [SECOND]

  def walking(self):
    if todo and self._sent:
      leave(self.scratch, todo.pop())
    return walk(self)

  with opened() as root:
    write(root, FIRST)
    bucket.settle()
    monkeypatch.setattr(mirror.Mirror, "_files", walking)
    bucket.settle()
    # The list of units came later than best.json was read.
    assert client.files["best/best.json"] == FIRST["best/best.json"].encode() and "best/4/sums" in client.files
    bucket.settle()
    assert client.files["best/best.json"] == SECOND["best/best.json"].encode()


def test_a_full_disk_does_not_hide_what_the_command_says(client, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device", "session.json")

  with pytest.raises(ValueError, match="of the command"), opened() as root:
    write(root, FIRST)
    failing(client)
    monkeypatch.setattr(mirror, "atomic_write_text", full)
    raise ValueError("of the command")


def test_what_is_being_written_is_not_uploaded(client):
  half = {
      ".metrics.jsonl.12.tmp": "x", ".export.partial/model.safetensors": "x", "dumps/.step_2.tmp/meta.json": "x",
      "checkpoints/6.orbax-checkpoint-tmp/state/a": "x", "warmstart/unfinished/5.orbax-checkpoint-tmp-1/x": "x"}
  with opened() as root:
    write(root, half | {"run.json": "r", "warmstart/unfinished/5/a": "x"})
  assert client.ordinary().keys() == {"run.json", "warmstart/unfinished/5/a"}
  assert ".mirror/units/warmstart/unfinished/5.json" in client.files


@pytest.mark.parametrize("what", ["goes", "changes"])
def test_a_checkpoint_that_is_not_what_it_was_once_it_is_uploaded_gets_no_marker(client, what):
  changed = {name: f"{content} anew" for name, content in saved(3).items()}
  with opened() as root:
    write(root, saved(3) | saved(6))

    def before(operation, name):
      if (operation, name) == ("write", "checkpoints/3/state/d/b") and client.before is before:
        client.before = lambda *_: None
        for path in saved(3):
          (root / path).unlink()
        write(root, changed if what == "changes" else {})

    client.before = before
    bucket.settle()
    markers = [name for operation, name in client.done if operation == "write" and name.startswith(".mirror/units/")]
    assert markers == [".mirror/units/checkpoints/6.json"]
  found = {name: content.decode() for name, content in client.files.items() if name.startswith("checkpoints/3/")}
  assert found == (changed if what == "changes" else {})


def test_the_bucket_wins_over_the_local_directory_by_few_downloads(client):
  with opened() as root:
    write(root, FIRST)
  write(root, {"run.json": "other", "stray.txt": "x", "checkpoints/9/state/a": "x", ".half.tmp": "x"})
  (root / "metrics.jsonl").unlink()
  client.done.clear()
  with opened() as again:
    assert again == root and read(root) == FIRST and not (root / "checkpoints" / "9").exists()
  assert sorted(n for o, n in client.done if o == "get") == ["metrics.jsonl", "run.json"]
  assert not [n for o, n in client.done if o in ("write", "delete") and not n.startswith(".mirror/")]


@pytest.mark.parametrize("torn", [
    "no marker", "damaged marker", "empty marker", "a file is missing", "a file is cut", "a file is longer"])
def test_a_torn_checkpoint_is_none(client, tmp_path, monkeypatch, torn):
  with opened() as root:
    write(root, FIRST | saved(6))
  marker, file = ".mirror/units/checkpoints/6.json", "checkpoints/6/state/d/b"
  if torn.endswith("marker"):
    client.files[marker] = b"{]" if torn == "damaged marker" else b'{"files": {}}'
    if torn == "no marker":
      del client.files[marker]
  elif torn == "a file is missing":
    del client.files[file]
  else:
    client.files[file] = client.files[file][:-1] if torn == "a file is cut" else client.files[file] + b"x"
  new_machine(monkeypatch, tmp_path)
  with opened() as root:
    assert read(root) == FIRST
  assert not any(name.startswith(("checkpoints/6", ".mirror/units/checkpoints/6")) for name in client.files)


def failing(client, n=10**9, error=None):
  left = [n]

  def before(operation, name):
    if operation == "write" and not name.startswith(".mirror/") and left[0] > 0:
      left[0] -= 1
      raise error or ConnectionError("the line is dead")

  client.before = before


def test_an_upload_that_fails_three_times_is_tried_again(client, caplog):
  with opened() as root:
    write(root, FIRST)
    failing(client, 3)
  assert client.ordinary() == {n: c.encode() for n, c in FIRST.items()}
  assert caplog.text.count("trying again") == 3 and "the line is dead" in caplog.text


def test_uploads_that_fail_for_good_lose_nothing(client, capsys, caplog):
  with pytest.raises(bucket.BucketError) as failed, opened() as root:
    write(root, FIRST)
    failing(client)
    bucket.settle()  # A warning: the run goes on.
    bucket.settle()
    write(root, saved(6))
  text = str(failed.value)
  assert f"--workdir={URL}" in text and "the line is dead" in text and f"all that was computed is in {root}" in text
  assert caplog.text.count("the run goes on in") == 1
  assert read(root) == FIRST | saved(6) and client.ordinary() == {}

  # The same command on this machine goes on from there.
  client.before = lambda *_: None
  client.done.clear()
  with opened() as again:
    assert again == root and read(root) == FIRST | saved(6)
  assert client.ordinary() == {n: c.encode() for n, c in (FIRST | saved(6)).items()}
  assert not [n for o, n in client.done if o == "get"] and "could not be uploaded" in capsys.readouterr().out


def test_what_could_not_be_uploaded_is_set_aside_when_another_machine_has_gone_on(
    client, tmp_path, monkeypatch, capsys):
  with opened() as root:
    write(root, FIRST)
  with pytest.raises(bucket.BucketError), opened():
    write(root, saved(6))
    failing(client)
  client.before = lambda *_: None
  new_machine(monkeypatch, tmp_path)
  with opened() as other:
    write(other, {"run.json": "other"})
  new_machine(monkeypatch, tmp_path, "scratch")
  capsys.readouterr()
  with opened() as again:
    assert again == root and read(root) == FIRST | {"run.json": "other"}
  aside = root.with_name(f"{root.name}.unsent-1")
  assert read(aside) == FIRST | saved(6) and str(aside) in capsys.readouterr().out


def test_an_error_of_the_command_is_uploaded_and_keeps_its_own_words(client, capsys):
  with pytest.raises(ValueError, match="of the command"), opened() as root:
    write(root, {"dumps/step_2/meta.json": "{}"})
    raise ValueError("of the command")
  assert ".mirror/units/dumps/step_2.json" in client.files
  with pytest.raises(ValueError, match="of the command"), opened() as root:
    write(root, {"incidents.jsonl": "x"})
    failing(client)
    raise ValueError("of the command")
  assert f"all that was computed is in {root}" in capsys.readouterr().err


def test_a_second_start_takes_over(client, tmp_path, monkeypatch):
  with pytest.raises(bucket.BucketError, match="another start of it, on .*, has taken over"), opened() as root:
    write(root, FIRST)
    bucket.settle()
    new_machine(monkeypatch, tmp_path)
    first = bucket.workdir._Open.mirror
    with opened() as other:
      write(other, {"run.json": "other"})
    bucket.workdir._Open.mirror = first
    write(root, {"run.json": "of the first"})
    client.done.clear()
    with pytest.raises(bucket.BucketError, match="taken over"):
      bucket.settle()
  assert client.files["run.json"] == b"other" and client.written() == []


def test_a_local_directory_that_was_removed_does_not_empty_the_bucket(client):
  with pytest.raises(bucket.BucketError, match="was removed or replaced while the run used it"), opened() as root:
    write(root, FIRST)
    bucket.settle()
    shutil.rmtree(root)
    with pytest.raises(bucket.BucketError):
      bucket.settle()
    write(root, {"metrics.jsonl": "6\n"})
  assert client.ordinary() == {n: c.encode() for n, c in FIRST.items()}


def test_two_commands_do_not_share_a_local_directory(client):
  with opened(), pytest.raises(ValueError, match=f"--workdir={URL} is in use by another command"):
    with opened():
      pass


def test_the_background_uploads_a_new_checkpoint_by_itself(client, monkeypatch):
  monkeypatch.setattr(mirror, "_LOOK_S", 0.01)
  there = {3: threading.Event(), 6: threading.Event()}
  client.before = lambda o, n: n.startswith(".mirror/units/checkpoints/") and there[int(n[-6])].set()
  with opened() as root:
    write(root, FIRST)
    assert there[3].wait(20)  # The first pass comes at once, those after it once a minute.
    write(root / "..", {f"{root.name}/{name}": content for name, content in saved(6).items()})
    assert there[6].wait(20)


def test_sigterm_does_not_cut_off_the_last_upload(client):
  told = []
  ask = lambda number, _: told.append(number)
  before = signal.signal(signal.SIGTERM, ask)
  try:
    client.before = lambda o, n: os.kill(os.getpid(), signal.SIGTERM) if n == "run.json" else None
    with opened() as root:
      write(root, FIRST)
    assert client.files["run.json"] == b"first" and told == [] and signal.getsignal(signal.SIGTERM) == ask
  finally:
    signal.signal(signal.SIGTERM, before)


def test_ctrl_c_breaks_off_the_last_upload_and_says_where_all_is(client):
  def interrupt(operation, name):
    if name == "run.json":
      raise KeyboardInterrupt

  with pytest.raises(bucket.BucketError, match="the upload was broken off. Nothing is lost"), opened() as root:
    write(root, FIRST)
    client.before = interrupt
  client.before = lambda *_: None
  with opened() as again:
    assert again == root and read(root) == FIRST
  assert client.files["run.json"] == b"first"


# Refusals, before anything is computed.

@pytest.mark.parametrize("error, words", [
    (FileNotFoundError("b"), "there is no such bucket"), (OSError("Forbidden: b\nno"), "roles/storage.objectUser"),
    (PermissionError("no"), "no permission"), (ConnectionError("no route"), "see to the network"),
])
def test_a_bucket_that_cannot_be_used(client, error, words):
  def before(operation, name):
    raise error

  client.before = before
  with pytest.raises(bucket.BucketError, match=words) as refused, opened():
    pytest.fail("the command was started")
  assert f"--workdir={URL}" in str(refused.value) and "\n" not in str(refused.value)


def test_a_bucket_whose_objects_cannot_be_replaced(client):
  def before(operation, name):
    if operation == "write" and name in client.files:
      raise OSError("Forbidden: storage.objects.delete")

  client.before = before
  with pytest.raises(bucket.BucketError, match="no permission"), opened():
    pytest.fail("the command was started")


@pytest.mark.parametrize("url", ["gs://b", "gs://b/", "gs:///x", "gs://b/a/../c", "gs://b//a", "gs://b/a\n"])
def test_not_the_place_of_a_run(client, url):
  with pytest.raises(ValueError, match="name a folder in it"), bucket.opened(url):
    pass


def test_schemes_of_no_bucket():
  with pytest.raises(ValueError, match=r"--workdir=http://b/run is no directory; .*gs://, s3://, az://.*gcsfuse"):
    bucket.check("--workdir", "http://b/run")


def test_a_missing_package_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  with pytest.raises(bucket.BucketError, match=r"--workdir=gs://b/run needs gcsfs.*pip install 'hbpo_jax\[gcs\]'"):
    objects.Store("gs://b/run")


def test_several_processes_are_refused(client, monkeypatch):
  monkeypatch.setattr(distributed, "start", lambda cfg: None)
  monkeypatch.setattr(distributed, "n_processes", lambda: 4)
  with pytest.raises(ValueError, match=f"--workdir={URL} serves a job of one process, and this one has 4.*gcsfuse"):
    with opened(distributed_cfg=DistributedConfig()):
      pass
  assert client.done == []


def test_a_directory_on_a_disk_is_left_alone_and_costs_no_import():
  with bucket.opened("runs/x", DistributedConfig()) as workdir, bucket.reading("runs/y", "RUN") as path:
    assert (workdir, path) == ("runs/x", "runs/y")
    bucket.settle()
  code = ("import sys, hbpo_jax.bucket\nwith hbpo_jax.bucket.opened('x'): pass\n"
          "print(sorted({'fsspec', 'gcsfs', 'aiohttp', 'jax', 'etils'} & set(sys.modules)))")
  assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# Google Cloud Storage, through gcsfs.

def test_gcs_objects_by_page_part_and_retry(monkeypatch, tmp_path):
  pytest.importorskip("gcsfs", reason="needs the extra gcs")
  with gcs_server.serve() as storage:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", storage.address)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    check_gcs_objects(storage, tmp_path)


def check_gcs_objects(storage, tmp_path):
  store = objects.Store("gs://b/run")
  assert store.list() == {} and store.read("a/x") is None
  contents = {f"many/{i:03}": b"%d" % i for i in range(gcs_server.PAGE + 5)} | {"a/x": b"hello", "empty": b""}
  for name, content in contents.items():
    store.write(name, content)
  storage.buckets["b"]["run2/y"] = b"of another run"
  assert store.list() == {n: objects.Entry(len(c), hashlib.md5(c).hexdigest()) for n, c in contents.items()}
  assert objects.Store("gs://b/ru").list() == {}
  (tmp_path / "big").write_bytes(os.urandom(51 * 2**20))  # In two parts.
  storage.faults.append(gcs_server.Fault("PART run/big", 503, left=1, after=1))
  store.put("big", tmp_path / "big")
  store.get("big", tmp_path / "back")
  store.get("empty", tmp_path / "nothing")
  assert (tmp_path / "back").read_bytes() == (tmp_path / "big").read_bytes()
  assert storage.requests.count("PART run/big") == 3
  assert (tmp_path / "nothing").read_bytes() == b"" and store.read("a/x") == b"hello" and store.read("empty") == b""
  store.delete(["a/x", "a/x"])
  assert store.read("a/x") is None
