"""The study's command in processes of its own: cells, what a stop leaves, the write-up."""

import json
import signal
import subprocess
import sys
import time

import pytest

from hbpo_jax.studies import outcome
from tests.system import runs

CONFIG = """
from hbpo_jax import flags

def get_config():
  cfg = flags.load_config("miniature/task")
  cfg.steps = 2
  cfg.data.synthetic.n_problems = 512
  cfg.sft.steps, cfg.sft.rows, cfg.sft.hidden_size, cfg.sft.n_layers = SFT_STEPS, 8, 32, 1
  cfg.sft.n_heads, cfg.sft.n_kv_heads, cfg.sft.mlp_size = 2, 1, 64
  cfg.rollout.queries, cfg.learner.minibatches = 4, 1
  cfg.checkpoint.save_every = 1
  return cfg
"""
STUDY = """
from hbpo_jax.studies.plan import Method, Study

def get_study():
  return Study(
      config="CONFIG", methods=(Method("hbpo", "ours", {"profile": "hbpo"}),), seeds=(0, 1), rival_seeds=(),
      tune_seed=9, rates=(), n_eval=24, n_modes=12, n_tune=12, forced=("say:work",), modes=("8",))
"""


def write_study(folder, sft_steps):
  (folder / "task.py").write_text(CONFIG.replace("SFT_STEPS", str(sft_steps)))
  (folder / "study.py").write_text(STUDY.replace("CONFIG", str(folder / "task.py")))
  return folder / "study.py"


def command(name, *arguments):
  return [sys.executable, "-m", f"hbpo_jax.{name}", *map(str, arguments)]


@pytest.mark.slow
def test_a_study_runs_in_sittings_and_is_written_up(tmp_path):
  run = command("study", f"--study={write_study(tmp_path, 6)}", f"--workdir={tmp_path / 'w'}", "--jobs=1")
  first = subprocess.run(run, capture_output=True, text=True, check=True, env=runs.environment())
  assert "4 cells, 0 done before" in first.stdout and "hbpo/seed_1: accuracy" in first.stdout
  # The second sitting does what is left, to the same numbers.
  path = tmp_path / "w/cells/hbpo/seed_1.json"
  before = json.loads(path.read_text())
  assert before["modes"]["natural"]["n"] == 24 and before["modes"]["8"]["n"] == 12 and before["steps"] == 2
  path.unlink()
  second = subprocess.run(run, capture_output=True, text=True, check=True, env=runs.environment())
  assert "4 cells, 3 done before" in second.stdout
  after = json.loads(path.read_text())
  assert after["modes"] == before["modes"] and after["training"] == before["training"]
  report = command("report", f"miniature={tmp_path / 'w'}", f"--out={tmp_path / 'out'}")
  subprocess.run(report, check=True, env=runs.environment())
  page = (tmp_path / "out/miniature.md").read_text()
  assert "| hbpo |" in page and "| warm_start |" in page
  methods = json.loads((tmp_path / "out/miniature.json").read_text())["methods"]
  assert [m["method"] for m in methods] == ["warm_start", "hbpo"]
  cells = outcome.read(tmp_path / "w").cells
  assert methods[1]["tokens"]["mean"] == pytest.approx(
      sum(c["modes"]["natural"]["tokens"] for c in cells["hbpo"].values()) / 2)


@pytest.mark.slow
def test_a_cell_that_is_stopped_ends_without_numbers(tmp_path):
  study = write_study(tmp_path, 100_000)
  process = subprocess.Popen(
      command("studies.cell", study, "warm_start/seed_0", tmp_path / "w"), stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, text=True, env=runs.environment())
  for line in process.stdout:
    if line.startswith("update 1 "):
      break
  time.sleep(1)
  process.send_signal(signal.SIGTERM)
  said = process.communicate(timeout=120)[0]
  assert process.returncode == 1 and "stopped; running the cell again goes on" in said, said
  assert not (tmp_path / "w/cells").exists()
