"""The evaluate command and the evaluations of a training run, as whole processes: killed, rerun, compared."""

import json
import signal
import subprocess
import time

import pytest

from hbpo_jax.evaluation.store import open_existing
from tests.system import runs

EVERY, STEPS = 2, 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("inputs")
  runs.make_inputs(folder)
  rows = [{"id": f"q{i}", "problem": f"What is {i} plus {i + 1}?", "answer": str(2 * i + 1), "source": "test",
           "level": 1 + i % 3} for i in range(24)]
  (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return folder


def settings(inputs, **changes):
  return {
      "model.path": str(inputs / "model"), "model.compute_dtype": "float32", "prompt.instruction": "",
      "eval.benchmarks": f"{inputs / 'sums.jsonl'},{inputs / 'problems.jsonl'}",
      "eval.modes": "natural,efficiency,budgets", "rollout.budgets": (24, 48), "eval.max_new_tokens": 64,
      "eval.batch_queries": 8, "rollout.slots": 8, "grading.workers": 1, "mesh.data": 1,
  } | {name.replace("__", "."): value for name, value in changes.items()}


@pytest.fixture(scope="module")
def evaluated(inputs, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("evaluated")
  done = runs.run("evaluate", settings(inputs), workdir)
  assert done.returncode == 0, done.stderr
  return workdir, done.stdout


def test_one_command_prints_the_table_and_stores_every_response(evaluated):
  workdir, printed = evaluated
  found = open_existing(workdir)
  assert {name: len(rows) for name, rows in found.rows.items()} == {"sums": 24 * 4, "problems": 6 * 4}
  assert found.manifest["modes"] == ["natural", "efficiency", "24", "48"]
  results = json.loads((workdir / "results.json").read_text())
  for mode in found.manifest["modes"]:
    rows = [r for r in found.rows["sums"] if r["mode"] == mode]
    stats = results["benchmarks"]["sums"]["modes"][mode]
    assert stats["tokens"]["value"] == pytest.approx(sum(r["n_gen"] for r in rows) / 24)
    assert stats["accuracy"]["value"] == pytest.approx(sum(r["score"] for r in rows) / 24)
  assert "sums" in printed and "natural" in printed and "efficiency" in printed
  assert (workdir / "results.md").read_text().count("|") > 50


def test_killed_half_way_and_rerun_nothing_is_made_again(inputs, evaluated, tmp_path):
  workdir = tmp_path / "e"
  file = workdir / "responses" / "sums.jsonl"
  process = subprocess.Popen(
      runs.command("evaluate", settings(inputs), workdir), env=runs.environment(), stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL)
  deadline = time.monotonic() + 300
  while time.monotonic() < deadline and not (file.exists() and file.read_bytes().count(b"\n") >= 20):
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  stored = {p.name: p.read_bytes() for p in file.parent.iterdir()}
  kept = {name: data[:data.rfind(b"\n") + 1] for name, data in stored.items()}
  assert 20 <= sum(data.count(b"\n") for data in kept.values()) < 30 * 4, "it was not killed half-way"
  done = runs.run("evaluate", settings(inputs), workdir)
  assert done.returncode == 0, done.stderr
  for name, data in kept.items():
    assert (file.parent / name).read_bytes().startswith(data)
  found = open_existing(workdir)
  assert found.rows == open_existing(evaluated[0]).rows, "stopping changes no response"
  assert sum(p.read_bytes().count(b"\n") for p in file.parent.iterdir()) == 30 * 4
  again = runs.run("evaluate", settings(inputs), workdir)
  assert again.returncode == 0 and "responses to generate" not in again.stdout, again.stderr
  assert again.stdout.splitlines()[-5:] == done.stdout.splitlines()[-5:]


@pytest.mark.parametrize("changes,words", [
    ({"eval.benchmarks": "/no/such/file.jsonl"}, "/no/such/file.jsonl"),
    ({"eval.benchmarks": "gsm8"}, "gsm8k"),
    ({"eval.modes": "quick"}, "config.eval.modes"),
    ({"eval.temperature": 0.5}, "config.eval.temperature=0.5, but the evaluation in"),
])
def test_what_cannot_be_evaluated_is_refused_in_one_line(inputs, evaluated, changes, words):
  done = runs.run("evaluate", settings(inputs) | changes, evaluated[0])
  assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr, done.stderr
  assert done.stderr.count("\n") == 1


def training(inputs, **changes):
  return runs.settings(
      inputs, steps=STEPS, data__source=str(inputs / "sums.jsonl"), data__n_eval=8, eval__every=EVERY,
      eval__n_during=4, eval__best_max_tokens=64.0, eval__batch_queries=8, checkpoint__save_every=3, **changes)


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("trained")
  done = runs.run("train", training(inputs), workdir)
  assert done.returncode == 0, done.stderr
  return workdir


def test_training_measures_itself_and_keeps_its_best_step(trained):
  rows = runs.rows(trained / "metrics.jsonl")
  measured = {row["step"] + 1: row for row in rows if "eval/accuracy" in row}
  assert list(measured) == [2, 4, 6]
  assert sorted(p.name for p in (trained / "eval").iterdir()) == [
      "base", "step_000002", "step_000004", "step_000006", "trained"]
  for step, row in measured.items():
    found = open_existing(trained / "eval" / f"step_{step:06d}").rows["eval"]
    assert len(found) == 4 and row["eval/tokens"] == pytest.approx(sum(r["n_gen"] for r in found) / 4)
  assert len(open_existing(trained / "eval" / "trained").rows["eval"]) == 8
  best = json.loads((trained / "best" / "best.json").read_text())
  score = lambda step: (measured[step]["eval/accuracy"], -measured[step]["eval/tokens"])
  assert score(best["step"]) == max(map(score, measured))
  assert (trained / "best" / str(best["step"]) / "state").is_dir()


@pytest.mark.slow
def test_a_killed_training_run_measures_the_same(inputs, trained, tmp_path):
  workdir = tmp_path / "run"
  process = subprocess.Popen(
      runs.command("train", training(inputs), workdir), env=runs.environment(), stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL)
  marker = workdir / "eval" / "step_000004" / "eval.json"
  deadline = time.monotonic() + 300
  while time.monotonic() < deadline and not marker.exists():
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  done = runs.run("train", training(inputs), workdir)
  assert done.returncode == 0, done.stderr
  pick = lambda folder: [
      {k: v for k, v in row.items() if k.startswith("eval/")} for row in runs.rows(folder / "metrics.jsonl")]
  assert pick(workdir) == pick(trained) and not list((workdir / "eval").glob("*other*"))
  for name in ("base", "step_000004", "trained"):
    assert open_existing(workdir / "eval" / name).rows == open_existing(trained / "eval" / name).rows
  assert (workdir / "best" / "best.json").read_text() == (trained / "best" / "best.json").read_text()


@pytest.mark.slow
def test_a_checkpoint_of_a_run_is_evaluated_like_its_export(inputs, trained, tmp_path):
  found = {}
  for name, path in (("checkpoint", trained / "checkpoints" / str(STEPS)), ("export", trained / "export")):
    short = settings(inputs, model__path=str(path), eval__modes="natural", eval__limit=4)
    done = runs.run("evaluate", short, tmp_path / name)
    assert done.returncode == 0, done.stderr
    found[name] = open_existing(tmp_path / name).rows
  assert found["checkpoint"] == found["export"]
  base = runs.run("evaluate", settings(inputs, eval__modes="natural", eval__limit=4), tmp_path / "base")
  assert base.returncode == 0 and open_existing(tmp_path / "base").rows != found["export"]
