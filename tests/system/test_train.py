"""Whole training runs on a tiny Hugging Face checkpoint: what they leave behind, kill and resume, no recompilation."""

import json
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
import transformers

from hbpo_jax import flags, train
from hbpo_jax.grading.verdict import Verdict
from tests.system import runs

STEPS = 8  # Enough that a run is killed long before its end.


@pytest.fixture(scope="module")
def uninterrupted(inputs, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("uninterrupted")
  done = runs.run("train", runs.settings(inputs, steps=STEPS), workdir)
  assert done.returncode == 0, done.stderr
  return workdir


def test_a_run_leaves_what_it_promises(uninterrupted):
  rows = runs.rows(uninterrupted / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(range(STEPS))
  for row in rows:
    assert row["update/loss"] is not None and row["update/nonfinite"] == 0
    for budget in (24, 48):
      assert 0 < row[f"budget_{budget}/sentence_probability"] < 1
    assert row["sampler/sampler_gap_max"] < 1e-4, "float32 sampler and trainer must agree"
  facts = json.loads((uninterrupted / "run.json").read_text())
  assert facts["config"]["profile"] == "hbpo" and facts["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
  assert (uninterrupted / "summary.json").exists() and (uninterrupted / "samples.jsonl").exists()


def test_the_export_loads_in_transformers_and_has_learnt(uninterrupted, inputs):
  model = transformers.AutoModelForCausalLM.from_pretrained(uninterrupted / "export")
  tokenizer = transformers.AutoTokenizer.from_pretrained(uninterrupted / "export")
  assert tokenizer.chat_template and model.config.model_type == "qwen2"
  start = transformers.AutoModelForCausalLM.from_pretrained(inputs / "model")
  moved = [not np.array_equal(a.detach().float().numpy(), b.detach().float().numpy())
           for a, b in zip(model.parameters(), start.parameters(), strict=True)]
  assert all(moved)


@pytest.mark.parametrize("kill_after_step", [1, 3])
def test_killed_and_rerun_ends_bit_identical(inputs, uninterrupted, tmp_path, kill_after_step):
  overrides = runs.settings(inputs, steps=STEPS)
  with subprocess.Popen(runs.command("train", overrides, tmp_path), env=runs.environment(),
                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
    # A step is logged before it is saved, and saved in the background: only a finished checkpoint can be resumed.
    deadline = time.monotonic() + 300
    while not any(int(p.name) >= kill_after_step for p in (tmp_path / "checkpoints").glob("[0-9]*")
                  if p.name.isdecimal()):
      assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
      time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
  assert not (tmp_path / "export").exists(), "killed too late to prove anything"

  again = runs.run("train", overrides, tmp_path)
  assert again.returncode == 0, again.stderr
  assert "resuming" in again.stdout
  expected, got = runs.exported(uninterrupted), runs.exported(tmp_path)
  assert expected.keys() == got.keys()
  for name in expected:
    np.testing.assert_array_equal(got[name].view(np.uint8), expected[name].view(np.uint8), err_msg=name)
  volatile = ("time/", "tokens_per_s", "learn/", "memory/")
  stable = lambda path: [{k: v for k, v in row.items() if not k.startswith(volatile)} for row in runs.rows(path)]
  assert stable(tmp_path / "metrics.jsonl") == stable(uninterrupted / "metrics.jsonl"), "no gap, no repeat"
  assert runs.rows(tmp_path / "samples.jsonl") == runs.rows(uninterrupted / "samples.jsonl")


def test_only_the_first_step_compiles(inputs, tmp_path, monkeypatch):
  """Counts JAX's own compile events per step; every later step must have none."""
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
      lambda event, duration, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None)
  before, per_step = [], []
  generate, learn = train.Trainer._generate, train.Trainer._learn

  def counted_generate(self, *args):
    before.append(len(compiled))
    return generate(self, *args)

  def counted_learn(self, *args):
    result = learn(self, *args)
    per_step.append(len(compiled) - before[-1])
    return result

  monkeypatch.setattr(train.Trainer, "_generate", counted_generate)
  monkeypatch.setattr(train.Trainer, "_learn", counted_learn)
  # Another seed changes lengths and prompts from step to step; the mesh is a part of the eight test devices.
  monkeypatch.setattr(jax, "devices", lambda *a, devices=jax.devices()[:1]: devices)
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  train.main(runs.make_config(runs.settings(inputs, steps=4, seed=5)), str(tmp_path))
  assert per_step[0] > 0, "the counter must see compilation"
  assert per_step[1:] == [0, 0, 0]


def test_a_damaged_newest_checkpoint_is_passed_over(inputs, uninterrupted, tmp_path):
  """Resumes from the one before, and still ends with the same params."""
  workdir = tmp_path / "run"
  shutil.copytree(uninterrupted, workdir)
  shutil.rmtree(workdir / "export")
  newest = max((workdir / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
  victim = max((newest / "state").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
  data = bytearray(victim.read_bytes())
  data[len(data) // 2] ^= 1
  victim.write_bytes(data)
  again = runs.run("train", runs.settings(inputs, steps=STEPS), workdir)
  assert again.returncode == 0, again.stderr
  assert "damaged" in again.stderr and f"resuming: {STEPS - 1} of {STEPS}" in again.stdout
  expected, got = runs.exported(uninterrupted), runs.exported(workdir)
  for name in expected:
    np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def test_a_changed_setting_is_refused_on_resume(inputs, uninterrupted, tmp_path, capsys):
  shutil.copytree(uninterrupted, tmp_path / "run")
  overrides = runs.settings(inputs, steps=STEPS) | EIGHT_DEVICES | {"loss.clip_high": 0.3}
  error = refused(overrides, tmp_path / "run", capsys)
  assert "config.loss.clip_high=0.3" in error and "0.28" in error
  # With other problems held out for evaluation, the same setting stands for other training problems.
  error = refused(runs.settings(inputs, steps=STEPS) | EIGHT_DEVICES | {"data.n_eval": 2}, tmp_path / "run", capsys)
  assert "problems.jsonl (contents " in error and "config.data.n_eval=2" in error and "would be harmless" in error


def test_one_and_eight_devices_train_alike(inputs, tmp_path):
  """The same responses in at least 95 % of rows, and params within float tolerance where all agree."""
  overrides = runs.settings(inputs, steps=1, log__n_samples=32, log__samples_every=1, rollout__queries=8)
  got = []
  for n, mesh in ((1, {}), (8, {"mesh.data": 2, "mesh.fsdp": 4})):
    done = runs.run("train", overrides | mesh, tmp_path / str(n), n_devices=n)
    assert done.returncode == 0, done.stderr
    got.append(tmp_path / str(n))
  samples = [[row["response"] for row in runs.rows(w / "samples.jsonl")] for w in got]
  same = np.mean([a == b for a, b in zip(*samples, strict=True)])
  assert len(samples[0]) == 32 and same >= 0.95
  if same == 1.0:
    first, second = (runs.rows(w / "metrics.jsonl")[0] for w in got)
    for name in ("update/loss", "update/grad_norm", "reward"):
      np.testing.assert_allclose(first[name], second[name], rtol=2e-4, atol=1e-6, err_msg=name)


# Settings that pass for the eight devices that this process sees.
EIGHT_DEVICES = {"mesh.data": 4, "mesh.fsdp": 1, "mesh.tensor": 2}


def refused(overrides, workdir, capsys):
  """The one line on stderr of a run that must be refused."""
  with pytest.raises(SystemExit) as stop:
    flags.run(train.main, name="train", description="", argv=runs.arguments(overrides, workdir))
  error = capsys.readouterr().err.strip()
  assert stop.value.code == 2 and "Traceback" not in error
  assert len(error.splitlines()) == 1 and error.startswith("error: ")
  return error


@pytest.mark.parametrize("change,message", [
    ({"rollout.budgets": (48, 24)}, "rollout.budgets"),
    ({"rollout.rollouts_per_query": 5}, "rollout.rollouts_per_query"),
    ({"rollout.caps": (16, 48)}, "rollout.caps"),
    ({"data.max_prompt_tokens": 10**6}, "data.max_prompt_tokens"),
    ({"model.path": "/nonexistent/model"}, "/nonexistent/model"),
    ({"data.source": "/nonexistent/problems.jsonl"}, "/nonexistent/problems.jsonl"),
    ({"reward.grader": "no.such.grader"}, "reward.grader"),
])
def test_bad_settings_end_with_one_clear_line(inputs, tmp_path, capsys, change, message):
  assert message in refused(runs.settings(inputs) | EIGHT_DEVICES | change, tmp_path / "run", capsys)


@pytest.mark.parametrize("what,message", [
    ("weights", "model.safetensors"), ("tokenizer", "tokenizer"), ("template", "chat template"),
    ("config", "config.json"), ("problems", "problems.jsonl:2"),
])
def test_bad_files_end_with_one_clear_line(inputs, tmp_path, capsys, what, message):
  shutil.copytree(inputs, tmp_path / "in")
  model, problems = tmp_path / "in" / "model", tmp_path / "in" / "problems.jsonl"
  if what == "weights":
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-100])
  elif what == "tokenizer":
    for file in model.glob("tokenizer*"):
      file.unlink()
  elif what == "template":
    for file in model.glob("chat_template*"):
      file.unlink()
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
  elif what == "config":
    (model / "config.json").write_text("{")
  else:
    problems.write_text(problems.read_text().replace('"answer": "42"', '"reply": "42"'))
  assert message in refused(runs.settings(tmp_path / "in") | EIGHT_DEVICES, tmp_path / "run", capsys)


def test_an_answer_in_a_text_that_was_cut_off_earns_nothing():
  verdicts = [Verdict(1.0, "correct", "5"), Verdict(1.0, "correct", "5"), Verdict(0.0, "wrong", "4")]
  truncated_BGJ = np.array([[[False, True, True]]])
  assert train.scores(verdicts, truncated_BGJ, is_custom=False).tolist() == [[[1, 0, 0]]]
  assert train.scores(verdicts, truncated_BGJ, is_custom=True).tolist() == [[[1, 1, 0]]]
