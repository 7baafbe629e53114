"""The proof sees every difference, and reads its command line as documented."""

import json

import pytest

from hbpo_jax import killpoints, prove_resume
from tests.system import runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("inputs")
  runs.make_inputs(folder)
  return folder


def parse(*arguments, workdir="/tmp/proof"):
  return prove_resume.parse(["--config=smoke", f"--workdir={workdir}", *arguments])


def test_the_command_line():
  plan = parse("--steps=9", "--cut=4,7", "--config.seed=3")
  assert (plan.steps, plan.cuts, plan.at, plan.stop) == (9, (4, 7), "rollout", False)
  assert (plan.cfg.steps, plan.cfg.seed, plan.cfg.checkpoint.save_every, plan.cfg.log.digests) == (9, 3, 2, True)
  assert str(plan.workdir) == "/tmp/proof" and not any("workdir" in a for a in plan.arguments)
  assert parse("--steps=9", "--cut=4", "--config.checkpoint.save_every=5").cfg.checkpoint.save_every == 5


@pytest.mark.parametrize("arguments, message", [
    (["--cut=1"], "--steps= is no number"), (["--steps=4"], "--cut= is no number"),
    (["--steps=4", "--cut=x"], "--cut=x is no number"), (["--steps=4", "--cut=4"], "numbers from 1 to 3"),
    (["--steps=9", "--cut=4,2"], "ascending"), (["--steps=4", "--cut=0"], "numbers from 1 to 3"),
    (["--steps=4", "--cut=1", "--at=lunch"], "--at=lunch"),
])
def test_wrong_use_is_one_clear_error(capsys, arguments, message):
  with pytest.raises(SystemExit) as end:
    prove_resume.cli(["--config=smoke", "--workdir=/tmp/proof", *arguments])
  error = capsys.readouterr().err
  assert end.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("arguments, point", [
    ([], "rollout:3:0:kill"), (["--at=update"], "update:3:1:kill"), (["--at=grading", "--stop"], "grading:3:0:term"),
    (["--at=checkpoint", "--config.checkpoint.save_every=2"], "checkpoint_written:4:0:kill"),
    (["--at=checkpoint", "--config.checkpoint.save_every=0"], "checkpoint_written:6:0:kill")])
def test_the_places_are_kill_points(arguments, point):
  assert prove_resume._point(parse("--steps=6", "--cut=3", *arguments), 3) == point
  assert point.split(":")[0] in killpoints.POINTS


@pytest.mark.parametrize("text", ["", "lunch:1", "rollout", "rollout:x", "rollout:1:2:3", "rollout:1:0:hug"])
def test_a_kill_point_that_is_not_understood_is_refused(text):
  with pytest.raises(ValueError, match="is not understood; write NAME:STEP"):
    killpoints.arm(text)


def test_a_fuse_burns_once_at_its_place():
  burnt = []
  fuse = killpoints.Fuse(step=3, count=1, action=lambda: burnt.append(1))
  for step, expected in ((2, 0), (3, 0), (3, 1), (3, 1), (None, 1)):
    fuse.at(step)
    assert len(burnt) == expected


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ["--cut=2,3", "--at=update"], ["--cut=2", "--at=checkpoint"], ["--cut=2", "--stop"]])
def test_a_proof_and_what_it_sees(inputs, tmp_path, capsys, monkeypatch, options):
  for name, value in runs.environment().items():
    monkeypatch.setenv(name, value)
  workdir = tmp_path / "proof"
  arguments = [*runs.arguments(runs.settings(inputs, log__samples_every=1), workdir), "--steps=4", *options]
  with pytest.raises(SystemExit) as end:
    prove_resume.cli([a for a in arguments if "save_every" not in a and "config.steps" not in a])
  out = capsys.readouterr().out
  assert end.value.code == 0 and "the same run, bit for bit" in out and "DIFFERS" not in out
  for item in json.loads((workdir / "proof.json").read_text())["items"]:
    expects_none = item["name"] in ("evaluations", "best checkpoint")
    assert (item["count"] == 0) == expects_none and not item["difference"], item

  one, other = workdir / "uninterrupted", workdir / "cut"
  for file, old, new, seen in (
      ("digests.jsonl", '"key": "', '"key": "f', "random keys"),
      ("metrics.jsonl", '"reward": ', '"reward": 1', "metrics"),
      ("samples.jsonl", '"n_gen": ', '"n_gen": 1', "samples"), ("export/config.json", "{", "{ ", "export")):
    text = (other / file).read_text()
    (other / file).write_text(text.replace(old, new, 1))
    wrong = [item for item in prove_resume.compare(one, other) if item.difference]
    assert [item.name for item in wrong] == [seen]
    (other / file).write_text(text)
  lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
  (other / "metrics.jsonl").write_text("".join(lines[:-1]))
  wrong = [item for item in prove_resume.compare(one, other) if item.difference]
  assert wrong[0].name == "metrics" and "nothing in the one that was cut" in wrong[0].difference
  capsys.readouterr()
  with pytest.raises(SystemExit) as end:
    prove_resume.cli(arguments)
  assert end.value.code == 2 and "earlier proof" in capsys.readouterr().err
