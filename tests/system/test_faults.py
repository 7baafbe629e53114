"""Runs that are killed, stopped, starved of disk or hurt otherwise end as one that was not, or say what is wrong."""

import json
import os
import signal
import subprocess

import pytest

from tests.system import faults, runs

STEPS = 6
SETTINGS = {
    "steps": STEPS, "checkpoint.save_every": 3, "log.digests": True, "data.n_eval": 2, "eval.every": 2,
    "eval.batch_queries": 1, "eval.max_new_tokens": 16, "eval.best_max_tokens": 1000.0}
PLAIN = {"data.n_eval": 0, "eval.every": 0}  # Fewer programs, those of the other whole runs.
KILLS = int(os.environ.get("HBPO_KILLS", "50"))


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
  with faults.Nursery(tmp_path_factory.mktemp("logs")) as nursery:
    yield nursery


@pytest.fixture(scope="module")
def start(nursery, inputs):
  """start(workdir, *faults, **changes): the training run, to its end. at: where its config file goes."""
  return lambda workdir, *faults, at=None, **changes: nursery.run(
      "train", runs.settings(inputs) | SETTINGS | changes, workdir, *faults, at=at)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
  """The uninterrupted run."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  done = start(workdir)
  assert done.code == 0, done.text
  return workdir


@pytest.fixture(scope="module")
def plain(start, tmp_path_factory):
  """The uninterrupted run without evaluations."""
  workdir = tmp_path_factory.mktemp("plain") / "run"
  done = start(workdir, **PLAIN)
  assert done.code == 0, done.text
  return workdir


def finish(start, workdir, whole, *faults_, **changes):
  """Starts a run again, without what ended it, and compares it with the uninterrupted one."""
  done = start(workdir, *faults_, **changes)
  assert done.code == 0, done.text
  assert faults.differences(whole, workdir) == []
  assert not list(workdir.rglob("*.tmp")) + list(workdir.glob("checkpoints/*tmp*")), "nothing half-written stays"
  return done


def test_five_random_kills_and_a_stop_in_a_row_end_bit_identical(start, plain, tmp_path):
  workdir = tmp_path / "run"
  points = faults.random_points(281, 5, STEPS, save_every=3)
  codes = [start(workdir, point, **PLAIN).code for point in points]
  assert codes == [-signal.SIGKILL] * 5, points

  # Told to stop during the rollouts of step 4, it saves what that step started from.
  stopped = start(workdir, "rollout:4:0:term", **PLAIN)
  assert stopped.code == 0 and "stops at the next safe point" in stopped.text, stopped.text
  assert f"stopped by SIGTERM: the state after 4 of {STEPS} steps is saved, in " in stopped.error
  assert "s after SIGTERM. The same command goes on" in stopped.error
  assert faults.checkpoints(workdir) == [3, 4] and not (workdir / "export").exists()
  note = json.loads((workdir / "stopped.json").read_text())
  assert note["by"] == "SIGTERM" and "after 4 of" in note["what"]
  done = finish(start, workdir, plain, **PLAIN)
  assert f"resuming: 4 of {STEPS}" in done.text and not (workdir / "stopped.json").exists()


@pytest.mark.slow
def test_fifty_random_kills_in_a_row_end_bit_identical(start, tmp_path):
  steps = KILLS + 2
  settings = {"steps": steps, "eval.every": 25, "checkpoint.save_every": 1}
  assert start(tmp_path / "whole", **settings).code == 0
  points = faults.random_points(2, KILLS, steps, save_every=1)
  codes = [start(tmp_path / "run", point, **settings).code for point in points]
  assert codes == [-signal.SIGKILL] * KILLS, list(zip(points, codes))
  finish(start, tmp_path / "run", tmp_path / "whole", **settings)


@pytest.mark.slow
@pytest.mark.parametrize("point", [
    "rollout:4:0", "rollout:4:1", "grading:4", "verdicts:4", "update:4:0", "update:4:1", "checkpoint:3",
    "checkpoint_writing:3", "checkpoint_written:3", "checkpoint_summed:3", "checkpoint_done:3", "log:4", "export:0:3",
    "evaluation:0:0", "evaluation:0:3", "checkpoint_written:6",
])
def test_killed_at(start, whole, tmp_path, point):
  assert start(tmp_path / "run", point).code == -signal.SIGKILL
  finish(start, tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("point, saved", [
    ("rollout:0:0", []), ("grading:1", [1]), ("update:1:0", [2]), ("update:4:1", [3, 5]), ("checkpoint_writing:3", [3]),
    ("log:4", [3, 5]), ("evaluation:0:1", []), ("evaluation:0:2", [2]), ("evaluation:0:6", [3, 6]),
    ("export:0:3", [3, 6]),
])
def test_told_to_stop_at(start, whole, tmp_path, point, saved):
  """evaluation: 0 and 1 are the base model's responses, 2 and 3 those after step 2, 6 is one after the last step."""
  stopped = start(tmp_path / "run", f"{point}:term")
  assert stopped.code == 0 and "stopped by SIGTERM" in stopped.error, stopped.text
  assert faults.checkpoints(tmp_path / "run") == saved
  finish(start, tmp_path / "run", whole)


@pytest.mark.slow
def test_stopped_again_and_again(start, whole, tmp_path):
  for point in ("evaluation:0:0", "rollout:0:1", "rollout:1:0", "evaluation:0:0", "grading:2", "update:3:1"):
    stopped = start(tmp_path / "run", f"{point}:term")
    assert stopped.code == 0 and "stopped by SIGTERM" in stopped.error, stopped.text
  finish(start, tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["rollout:1:0", "update:1:0"])
def test_rollouts_ahead_survive_a_stop(start, tmp_path, point):
  """pipeline=one_step_off: a resumed run has no older weights, so the rollouts that came from them are kept."""
  changes = {"pipeline": "one_step_off", "checkpoint.save_every": 6, "eval.every": 0, "optimizer.learning_rate": 1e-2,
             "loss.importance_cap": 2.0}
  assert start(tmp_path / "whole", **changes).code == 0
  stopped = start(tmp_path / "run", f"{point}:term", **changes)
  assert stopped.code == 0 and "stopped by SIGTERM" in stopped.error, stopped.text
  assert len(list((tmp_path / "run" / "ahead").iterdir())) == 1
  finish(start, tmp_path / "run", tmp_path / "whole", **changes)


@pytest.mark.slow
def test_two_interrupts(start, whole, tmp_path):
  """The first Ctrl-C asks, the second ends the run at once; nothing saved is lost."""
  assert start(tmp_path / "run", "rollout:4:0:int", "update:4:1:int").code == 0  # Over before the second one.
  assert start(tmp_path / "run", "update:4:0:int", "update:4:1:int").code == -signal.SIGINT
  finish(start, tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("fault, path", [
    ("checkpoint_written:6:0:full", "checkpoints"), ("checkpoint_written:6:0:readonly", "checkpoints"),
    ("full:metrics.jsonl:4:ENOSPC", "metrics.jsonl"), ("full:metrics.jsonl:4:EROFS", "metrics.jsonl"),
    ("full:verdicts:4:ENOSPC", "verdicts"), ("full:run.json:0:ENOSPC", "run.json"), ("export:0:3:full", "export"),
])
def test_a_full_or_read_only_disk_is_one_clear_line(start, whole, tmp_path, fault, path):
  workdir = tmp_path / "run"
  failed = start(workdir, fault)
  assert failed.code == 2 and "Traceback" not in failed.text, failed.text
  assert failed.error.startswith(f"error: {workdir}/") and path in failed.error
  assert ("Read-only" in failed.error) == ("EROFS" in fault or "readonly" in fault)
  assert "the same command goes on from there" in failed.error
  finish(start, workdir, whole)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["600k", "1200k", "2m", "3m"])
def test_on_a_disk_that_is_really_full_what_was_saved_is_whole(start, whole, tmp_path, size):
  disk = tmp_path / "disk"
  disk.mkdir()
  mount = lambda *arguments: subprocess.run(["mount", *arguments, disk], capture_output=True).returncode == 0
  if os.geteuid() != 0 or not mount("-t", "tmpfs", "-o", f"size={size}", "none"):
    pytest.skip("only root may mount a small disk")
  try:
    workdir = disk / "run"
    (tmp_path / "copy").mkdir()
    failed = start(workdir, at=tmp_path / "copy")
    assert failed.code == 2 and "Traceback" not in failed.text, failed.text
    assert failed.error.startswith(f"error: {workdir}/") and "No space left on device; free space" in failed.error
    assert mount("-o", "remount,ro")
    refused = start(workdir, at=tmp_path / "copy")
    assert refused.code == 2 and "Read-only file system; make it writable" in refused.error, refused.text
    assert "Traceback" not in refused.text
    assert mount("-o", "remount,rw,size=50m")
    finish(start, workdir, whole, at=tmp_path / "copy")
  finally:
    subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncate", "flip"])
def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(start, whole, tmp_path, how):
  workdir = tmp_path / "run"
  assert start(workdir, "checkpoint_done:6").code == -signal.SIGKILL
  assert faults.damage_newest(workdir, how) == 6
  done = finish(start, workdir, whole)
  assert "skipping the damaged checkpoint of step 6" in done.text and f"resuming: 3 of {STEPS}" in done.text


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGKILL", "SIGSTOP", "SIGTERM"])
def test_grading_workers_that_die_or_hang_are_replaced(start, tmp_path, number):
  changes = {"reward.grader": "", "grading.workers": 2}
  assert start(tmp_path / "whole", "boxed", **changes).code == 0
  hurt = start(tmp_path / "run", "boxed", f"workers:70:{number}", **changes)
  assert hurt.code == 0 and f"{number} to 2 grading workers" in hurt.text, hurt.text
  assert faults.differences(tmp_path / "whole", tmp_path / "run") == []
  rows = runs.rows(tmp_path / "run" / "metrics.jsonl")
  assert 0 < sum(row["accuracy"] for row in rows) < len(rows) and all(row["timeout"] == 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("fault, said", [
    ("tensorboard:200", "TensorBoard's files failed"), ("tensorboard:0", "TensorBoard's files failed"),
    ("wandb:2", "W&B failed"), ("full:events:0:ENOSPC", ""),
])
def test_a_metrics_backend_that_dies_does_not_end_the_run(start, whole, tmp_path, fault, said):
  changes = {"log.tensorboard": True} | ({"log.wandb_project": "p"} if "wandb" in fault else {})
  done = finish(start, tmp_path / "run", whole, fault, **changes)
  assert not said or done.text.count(said) == 1, done.text


@pytest.mark.slow
@pytest.mark.parametrize("count", [50, 2000])
def test_a_clock_that_jumps_changes_nothing(start, whole, tmp_path, count):
  finish(start, tmp_path / "run", whole, f"clock:{count}")


@pytest.mark.slow
def test_an_evaluation_that_is_stopped_keeps_every_response(nursery, inputs, tmp_path):
  overrides = runs.settings(inputs) | {
      "eval.benchmarks": str(inputs / "problems.jsonl"), "eval.batch_queries": 2, "eval.max_new_tokens": 24}
  assert nursery.run("evaluate", overrides, tmp_path / "whole").code == 0
  for fault in ("evaluation:0:0:term", "evaluation:0:0:kill", "evaluation:0:0:int"):
    before = _responses(tmp_path / "cut")
    done = nursery.run("evaluate", overrides, tmp_path / "cut", fault)
    assert done.code == (-signal.SIGKILL if "kill" in fault else 0), done.text
    assert "kill" in fault or "of 6 responses of the evaluation are stored" in done.error
    assert len(_responses(tmp_path / "cut")) > len(before)
  assert nursery.run("evaluate", overrides, tmp_path / "cut").code == 0
  key = lambda row: json.dumps(row, sort_keys=True)
  assert sorted(map(key, _responses(tmp_path / "cut"))) == sorted(map(key, _responses(tmp_path / "whole")))


def _responses(workdir):
  files = list((workdir / "responses").glob("*.jsonl"))
  return runs.rows(files[0]) if files else []


@pytest.mark.slow
def test_a_warm_start_that_is_stopped_goes_on(nursery, tmp_path):
  overrides = {
      "data.source": "synthetic", "sft.steps": 12, "sft.rows": 4, "sft.hidden_size": 32, "sft.mlp_size": 64,
      "sft.n_heads": 2, "sft.n_kv_heads": 1, "data.synthetic.n_problems": 32, "model.compute_dtype": "float32",
      "data.max_prompt_tokens": 48, "reward.max_response_tokens": 64, "rollout.budgets": (24, 48),
      "rollout.rollouts_per_query": 4, "prompt.instruction": "", "mesh.data": 1, "log.tensorboard": False}
  assert nursery.run("sft", overrides, tmp_path / "whole").code == 0
  stopped = nursery.run("sft", overrides, tmp_path / "cut", "full:metrics.jsonl:5:TERM")
  assert stopped.code == 0 and "the state after 5 of 12 updates is saved" in stopped.error, stopped.text
  refused = nursery.run("sft", overrides | {"sft.rows": 8}, tmp_path / "cut")
  assert refused.code == 2 and "config.sft.rows=8 (was 4)" in refused.error
  done = nursery.run("sft", overrides, tmp_path / "cut")
  assert done.code == 0 and "resuming: 5 of 12" in done.text
  assert not (tmp_path / "cut" / "unfinished").exists()
  one, other = (runs.exported(tmp_path / name) for name in ("whole", "cut"))
  assert one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)
  loss = lambda name: [row["update/loss"] for row in runs.rows(tmp_path / name / "metrics.jsonl")]
  assert loss("cut") == loss("whole") and len(loss("cut")) == 12


def _one_of_two_hurt(overrides, workdir, whom, fault):
  """(Exit codes, outputs) of a training run of two processes, one of which has the fault."""
  job = {"distributed.coordinator_address": f"127.0.0.1:{runs.free_port()}", "distributed.num_processes": 2}
  running = []
  for i in range(2):
    command = runs.command("train", overrides | job | {"distributed.process_id": i}, workdir)
    if i == whom:
      command[2:3] = ["hbpo_jax.killpoints", fault, "train"]
    running.append(subprocess.Popen(
        command, env=runs.environment(1), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
  texts = [p.communicate(timeout=400)[0] for p in running]
  return [p.returncode for p in running], texts


@pytest.mark.slow
@pytest.mark.parametrize("whom", [0, 1])
def test_two_processes_stop_together(inputs, tmp_path, whom):
  """SIGTERM to one of them; both save at the same step, and the same command goes on."""
  overrides = runs.settings(inputs, steps=8, checkpoint__save_every=0, distributed__timeout_s=120)
  overrides |= {"mesh.data": 2, "rollout.slots": 8, "rollout.length_buckets": (48,), "log.digests": True}
  assert [p.returncode for p in runs.run_hosts("train", overrides, tmp_path / "whole", 2, 1)] == [0, 0]
  codes, texts = _one_of_two_hurt(overrides, tmp_path / "run", whom, "rollout:2:0:term")
  assert codes == [0, 0], texts
  steps = faults.checkpoints(tmp_path / "run")
  assert len(steps) == 1 and 0 < steps[0] < 8 and f"the state after {steps[0]} of 8 steps is saved" in texts[0]
  assert [p.returncode for p in runs.run_hosts("train", overrides, tmp_path / "run", 2, 1)] == [0, 0]
  assert faults.differences(tmp_path / "whole", tmp_path / "run") == []


@pytest.mark.slow
def test_a_peer_that_dies_ends_the_other_with_its_name_and_the_job_goes_on(inputs, tmp_path):
  overrides = runs.settings(inputs, steps=4, distributed__timeout_s=20) | {
      "mesh.data": 2, "rollout.slots": 8, "rollout.length_buckets": (48,), "log.digests": True}
  assert [p.returncode for p in runs.run_hosts("train", overrides, tmp_path / "whole", 2, 1)] == [0, 0]
  codes, texts = _one_of_two_hurt(overrides, tmp_path / "run", 1, "update:2:0:kill")
  assert codes == [2, -signal.SIGKILL] and "Traceback" not in texts[0], texts[0]
  assert f"error: there is no sign of life of process 1 (host {os.uname().nodename})" in texts[0], texts[0]
  assert [p.returncode for p in runs.run_hosts("train", overrides, tmp_path / "run", 2, 1)] == [0, 0]
  assert faults.differences(tmp_path / "whole", tmp_path / "run") == []
