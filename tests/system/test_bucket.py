"""Runs whose working directory is a bucket end as those on a disk do, also on a machine that never saw them before."""

import json
import pathlib
import shutil
import signal

import pytest

from hbpo_jax import bucket
from tests import gcs_server
from tests.system import faults, runs
from tests.system.test_faults import PLAIN, SETTINGS, STEPS

pytest.importorskip("gcsfs", reason="needs the extra gcs")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("inputs")
  runs.make_inputs(folder)
  return folder


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
  """A storage that all commands find, and local directories for this machine."""
  with gcs_server.serve() as storage, pytest.MonkeyPatch.context() as patch:
    patch.setenv("STORAGE_EMULATOR_HOST", storage.address)
    patch.setenv(bucket.SCRATCH, str(tmp_path_factory.mktemp("scratch")))
    patch.setenv("no_proxy", "127.0.0.1")
    yield storage


@pytest.fixture(scope="module")
def nursery(cloud, tmp_path_factory):
  with faults.Nursery(tmp_path_factory.mktemp("logs")) as nursery:
    yield nursery


class Run:
  """A run of this name in the bucket."""

  def __init__(self, cloud, nursery, inputs, folder, name):
    self._cloud, self._nursery, self._inputs, self._folder, self._name = cloud, nursery, inputs, folder, name
    self.url = f"gs://b/runs/{name}"
    self.scratch = bucket.scratch_of(self.url)

  def start(self, *points, new_machine=True, module="train", **changes):
    """The command to its end; a new machine has nothing of the run."""
    if new_machine:
      shutil.rmtree(self.scratch, ignore_errors=True)
    return self._nursery.run(
        module, runs.settings(self._inputs) | SETTINGS | PLAIN | changes, self._folder / self._name, *points,
        url=self.url)

  @property
  def objects(self):
    """Contents by name."""
    prefix = f"runs/{self._name}/"
    return {n.removeprefix(prefix): c for n, c in self._cloud.buckets["b"].items() if n.startswith(prefix)}

  def delete(self, name):
    del self._cloud.buckets["b"][f"runs/{self._name}/{name}"]

  def marked(self):
    """Steps of the checkpoints that are complete in the bucket."""
    return sorted(int(n.split("/")[-1][:-5]) for n in self.objects if n.startswith(".mirror/units/checkpoints/"))

  def copied(self) -> pathlib.Path:
    """A directory with what the bucket holds, without the marks of the mirror."""
    root = self._folder / f"{self._name}_copy"
    shutil.rmtree(root, ignore_errors=True)
    for name, content in self.objects.items():
      if not name.startswith(".mirror/"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def run(cloud, nursery, inputs, tmp_path, request):
  cloud.faults.clear()
  cloud.requests.clear()
  yield Run(cloud, nursery, inputs, tmp_path, "".join(c if c.isalnum() else "_" for c in request.node.name))
  cloud.faults.clear()


@pytest.fixture(scope="module")
def on_disk(nursery, inputs, tmp_path_factory):
  """on_disk(**changes): the working directory of the same run on a disk, without any fault."""
  found = {}

  def get(**changes):
    key = json.dumps(changes, sort_keys=True)
    if key not in found:
      found[key] = tmp_path_factory.mktemp("disk") / "run"
      done = nursery.run("train", runs.settings(inputs) | SETTINGS | PLAIN | changes, found[key])
      assert done.code == 0, done.text
    return found[key]

  return get


def files(root):
  return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


def stable(names):
  """Names of files without the random parts of those that Orbax writes."""
  return {n if "/d/" not in n else n.rpartition("/")[0] for n in names}


def test_a_run_in_a_bucket_leaves_what_one_on_a_disk_does(run, on_disk):
  done = run.start()
  assert done.code == 0, done.text
  assert f"all is in {run.url}" in done.error
  whole, copy = on_disk(), run.copied()
  assert faults.differences(whole, copy) == []
  assert stable(files(copy)) == stable(files(whole))
  assert run.marked() == [3, 6]


def test_a_run_that_is_killed_goes_on_from_its_newest_checkpoint_on_a_new_machine(run, on_disk):
  assert run.start("checkpoint:6").code == -signal.SIGKILL
  assert run.marked() == [3]
  done = run.start()
  assert done.code == 0 and f"resuming: 3 of {STEPS}" in done.text, done.text
  assert faults.differences(on_disk(), run.copied()) == []


def test_a_stop_has_uploaded_its_checkpoint_when_the_command_ends(run, on_disk):
  stopped = run.start("rollout:4:0:term")
  assert stopped.code == 0, stopped.text
  assert json.loads(run.objects["stopped.json"])["by"] == "SIGTERM" and run.marked() == [3, 4]
  done = run.start()
  assert done.code == 0 and f"resuming: 4 of {STEPS}" in done.text, done.text
  assert "stopped.json" not in run.objects and faults.differences(on_disk(), run.copied()) == []
