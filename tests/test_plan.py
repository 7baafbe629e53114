"""The command: what it prints and writes, its exit codes, and what it refuses."""

import functools
import json
import subprocess
import sys

import pytest

from hbpo_jax import flags, plan
from hbpo_jax.models import architecture, presets
from hbpo_jax.planning import compile as compile_lib
from hbpo_jax.planning import hlo
from hbpo_jax.planning.compile import Compiled


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch):
  monkeypatch.setattr(compile_lib, "available", lambda: False)


def run(tmp_path, *arguments):
  own, others = plan.split_options([*([f"--workdir={tmp_path}"] if tmp_path else []), *arguments])
  try:
    flags.run(
        functools.partial(plan.main, options=own), name="plan", description="", argv=others, needs_workdir=False)
  except SystemExit as stopped:
    return stopped.code
  return 0


# Of its checkpoint there is a preset.
PAPER = ("--config=r1_distill_qwen_1p5b", "--topology=v5e:4x4")


def test_a_run_that_fits(tmp_path, capsys):
  assert run(tmp_path, *PAPER, "--config.learner.microbatch_rows=16") == 0
  out = capsys.readouterr().out
  assert 'python -m pip install "hbpo_jax[tpu-aot]"' in out and "fits: at most" in out and "NOT COMPILED" in out
  content = json.loads((tmp_path / "plan.json").read_text())
  assert content["fits"] and content["topology"] == "v5e:4x4"
  assert content["mesh"] == {"data": 1, "fsdp": 16, "tensor": 1}
  assert content["knobs"] == [] and content["steps"] == 629
  assert content["tpu_hours"] == pytest.approx(16 * 629 * content["step_s"] / 3600)
  programs = content["programs"]
  assert [p["name"] for p in programs] == ["publish", "prefill", "decode", "score", "update"]
  assert all(p["compiled"] is None and p["peak_bytes"] >= content["resident_bytes"] for p in programs)
  assert max(p["peak_bytes"] for p in programs) == max(content["peak_bytes"].values()) < content["hbm_bytes"]
  assert content["step_s"] == pytest.approx(sum(p["predicted_s"] for p in programs))
  text = (tmp_path / "plan.md").read_text()
  assert text.startswith("# Plan\n") and "| sampler's copy (publish) | 3.31 |" in text and "log-normal" in text


def test_json_is_all_that_standard_output_gets(monkeypatch, tmp_path, capsys):
  moved = (hlo.Collective("all-gather", "f32[8]", 28, 3, True), hlo.Collective("all-gather", "f32[4]", 14, 1, True))
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(compile_lib, "available", lambda: True)
  monkeypatch.setattr(compile_lib, "compile_all", lambda job, names, **_: {
      name: Compiled(name, seconds=3, temporary=10, collectives=moved) for name in names})
  small = "--config.learner.microbatch_rows=16"
  assert run("", *PAPER, small, "--json", "--config.learner.minibatches=1") == 0
  out, err = capsys.readouterr()
  content = json.loads(out)
  assert content["topology"] == "v5e:4x4" and content["fits"] is True and "fits: at most" in err
  assert [p["name"] for p in content["programs"]] == ["publish", "prefill", "decode", "update"], "no scoring pass"
  update = content["programs"][-1]
  assert update["collectives"] == {"all-gather": {"times": 4, "bytes": 98}} and update["temporary_bytes"] == 10
  assert update["peak_bytes"] == update["resident_bytes"] + 10 and update["flops"] > 0 and update["bytes"] > 0
  assert not list(tmp_path.iterdir()), "no files without a workdir"
  assert run("", *PAPER[:1], "--topology=v5e:2x2", "--json") == 1
  assert json.loads(capsys.readouterr().out)["fits"] is False


def test_one_that_does_not_fit_says_what_would_help(tmp_path, capsys):
  assert run(tmp_path, *PAPER, "--config.learner.microbatch_rows=256") == 1
  out = capsys.readouterr().out
  assert "DOES NOT FIT" in out and "it fits with --config.learner.microbatch_rows=" in out
  content = json.loads((tmp_path / "plan.json").read_text())
  assert not content["fits"] and content["knobs"][0]["saved"] > 0


def test_the_compilers_word_counts(tmp_path, capsys, monkeypatch):
  asked = []

  def compile_all(job, names, *, n_processes, progress):
    asked.append((tuple(names), n_processes))
    error = lambda name: "crashed" if name == "update" else ""
    said = {name: Compiled(name, seconds=3, temporary=10, error=error(name)) for name in names}
    for c in said.values():
      progress(c)
    return said

  monkeypatch.setattr(compile_lib, "available", lambda: True)
  monkeypatch.setattr(compile_lib, "compile_all", compile_all)
  assert run(tmp_path, *PAPER, "--config.learner.microbatch_rows=16", "--jobs=2") == 1
  assert asked == [(("publish", "prefill", "decode", "score", "update"), 2)]
  out = capsys.readouterr().out
  assert "score: compiled after 3 s" in out and "update did not compile: crashed" in out and "DOES NOT COMPILE" in out
  assert "NOT COMPILED" not in out


def test_a_sweep(tmp_path, capsys):
  assert run(tmp_path, *PAPER, "--sweep") == 0
  out = capsys.readouterr().out
  assert "combinations counted" in out and "sweep: the best and the compiled of" in out
  content = json.loads((tmp_path / "plan.json").read_text())
  assert content["sweep"][0]["fits"] and content["sweep"][0]["mesh"] == content["mesh"]


def test_mean_tokens_makes_it_longer(tmp_path):
  times = []
  for option in ("--mean_tokens=500", "--mean_tokens=3000"):
    assert run(tmp_path, *PAPER, "--config.learner.microbatch_rows=16", option, "--mean_prompt_tokens", "100") == 0
    content = json.loads((tmp_path / "plan.json").read_text())
    times.append(next(p["bound_s"] for p in content["programs"] if p["name"] == "decode"))
    assert any("100 tokens in decoding" in line for line in content["assumed"])
  assert times[1] > 2 * times[0]


def test_a_checkpoints_config_comes_before_the_preset(tmp_path):
  model = tmp_path / "model"
  model.mkdir()
  arch = presets.preset("qwen3_0p6b")
  (model / "config.json").write_text(json.dumps(architecture.to_hf_config(arch, "bfloat16")))
  # With four times the key/value heads of the 1.5B model, it takes a quarter of the slots.
  smaller = ("--config.learner.microbatch_rows=16", "--config.rollout.slots=128")
  assert run(tmp_path, PAPER[0], PAPER[1], *smaller, f"--config.model.path={model}") == 0
  assert json.loads((tmp_path / "plan.json").read_text())["architecture"]["hidden_size"] == 1024


@pytest.mark.parametrize("arguments, words", [
    (PAPER[:1], "--topology is missing; give chips and shape, such as v5e:4x4"),
    ((*PAPER[:1], "--topology=v5e:4"), "has 1 sides, but a v5e has 2"),
    (("--config=r1_distill_qwen_1p5b", "--topology=v5e:4x4", "--config.model.path=someone/model"),
     "model.path='someone/model' has no config.json on this machine, and model.preset=''"),
    ((*PAPER, "--config.model.preset=qwen9"), "model.preset='qwen9' does not exist"),
    ((*PAPER, "--mean_tokens=many"), "--mean_tokens='many' is not a number of at least 1"),
    ((*PAPER, "--mean_tokens=0"), "--mean_tokens='0' is not a number of at least 1"),
    ((*PAPER, "--mean_prompt_tokens=2000"), "--mean_prompt_tokens=2000 exceeds config.data.max_prompt_tokens=1024"),
    ((*PAPER, "--jobs=none"), "--jobs='none' is not a number"),
    ((*PAPER, "--config.mesh.fsdp=3"), "config.mesh.fsdp=3 makes a mesh of 3 devices where there are 16"),
    ((*PAPER, "--topologi=v5e:4x4"), "topologi"),
    ((*PAPER[:1], "--topology=v5e:3x1", "--sweep"), "divisible")])
def test_refusals(tmp_path, capsys, arguments, words):
  assert run(tmp_path, *arguments) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ") and words in error and error.count("\n") == 1
  assert not (tmp_path / "plan.json").exists()


@pytest.mark.slow
def test_from_the_command_line(tmp_path, repo_root):
  command = [sys.executable, "-m", "hbpo_jax.plan"]
  done = subprocess.run([*command, "--help"], cwd=repo_root, capture_output=True, text=True, check=True)
  assert "--topology=NAME" in done.stdout and "--config.rollout.slots" in done.stdout
  done = subprocess.run(
      [*command, *PAPER[:1], f"--workdir={tmp_path}"], cwd=repo_root, capture_output=True, text=True, check=False)
  assert done.returncode == 2 and done.stderr.startswith("error: --topology is missing")
