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
pytestmark = pytest.mark.slow


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
    self._cloud, self._nursery, self.inputs, self._folder, self._name = cloud, nursery, inputs, folder, name
    self.url = f"gs://b/runs/{name}"
    self.scratch = bucket.scratch_of(self.url)

  def start(self, *points, new_machine=True, module="train", **changes):
    """The command to its end; a new machine has nothing of the run."""
    if new_machine:
      shutil.rmtree(self.scratch, ignore_errors=True)
    return self._nursery.run(
        module, runs.settings(self.inputs) | SETTINGS | PLAIN | changes, self._folder / self._name, *points,
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


@pytest.mark.parametrize("point, resumed", [
    ("bucket_unit:3", 0), ("bucket_marker:3", 3), ("bucket_unit:6", 3), ("bucket_file:0:30", None),
    ("update:4:1", None), ("log:4", None), ("export:0:3", None)])
def test_killed_at(run, on_disk, point, resumed):
  """resumed: the step from which a new machine goes on, where no timing decides it."""
  assert run.start(point).code == -signal.SIGKILL
  done = run.start()
  assert done.code == 0, done.text
  if resumed is not None:
    assert (f"resuming: {resumed} of {STEPS}" in done.text) == (resumed > 0), done.text
  assert faults.differences(on_disk(), run.copied()) == [] and run.marked() == [3, 6]


def test_evaluations_and_the_best_checkpoint_survive_kills(run, on_disk):
  measured = {"data.n_eval": 2, "eval.every": 2, "eval.max_new_tokens": 16}
  for point in ("evaluation:0:3", "checkpoint:6", "bucket_file:0:40", "evaluation:0:6"):
    assert run.start(point, **measured).code in (-signal.SIGKILL, 0)
  assert run.start(**measured).code == 0
  assert faults.differences(on_disk(**measured), run.copied()) == []
  assert json.loads(run.objects["best/best.json"])["step"] and any(
      name.startswith(".mirror/units/best/") for name in run.objects)


def test_a_torn_checkpoint_is_passed_over(run, on_disk):
  assert run.start().code == 0
  run.delete(".mirror/units/checkpoints/6.json")
  done = run.start()
  assert done.code == 0 and f"resuming: 3 of {STEPS}" in done.text, done.text
  assert faults.differences(on_disk(), run.copied()) == [] and run.marked() == [3, 6]


def test_requests_that_fail_are_made_again(run, on_disk, cloud):
  cloud.faults += [gcs_server.Fault("POST ", 503, left=4, after=15), gcs_server.Fault("GET .", 500, left=2)]
  done = run.start()
  assert done.code == 0, done.text
  assert [f.left for f in cloud.faults] == [0, 0] and faults.differences(on_disk(), run.copied()) == []


def test_a_bucket_that_nobody_may_write_any_more_loses_nothing(run, on_disk, cloud):
  cloud.faults.append(gcs_server.Fault("POST ", 403, after=10))
  done = run.start()
  assert done.code == 2 and done.text.count("error: ") == 1 and done.text.count("the run goes on in") == 1, done.text
  assert f"error: --workdir={run.url}: no permission" in done.error and str(run.scratch) in done.error
  assert faults.differences(on_disk(), run.scratch) == []
  cloud.faults.clear()
  again = run.start(new_machine=False)
  assert again.code == 0 and f"resuming: {STEPS} of {STEPS}" in again.text, again.text
  assert faults.differences(on_disk(), run.copied()) == [] and run.marked() == [3, 6]


def test_an_evaluation_in_a_bucket_goes_on_on_a_new_machine(run):
  overrides = {
      "eval.benchmarks": str(run.inputs / "problems.jsonl"), "eval.batch_queries": 2, "eval.max_new_tokens": 24}
  responses = lambda: [c for n, c in run.objects.items() if n.startswith("responses/")]
  stopped = run.start("evaluation:0:0:term", module="evaluate", **overrides)
  assert stopped.code == 0 and "are stored" in stopped.text and len(responses()[0].splitlines()) < 6, stopped.text
  before = responses()[0]
  done = run.start(module="evaluate", **overrides)
  assert done.code == 0 and responses()[0].startswith(before) and len(responses()[0].splitlines()) == 6, done.text
  assert "results.json" in run.objects
