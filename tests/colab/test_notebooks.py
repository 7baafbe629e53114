"""The notebooks of colab/: as they lie in the repository, and as they run."""

import ast
import fcntl
import json
import os
import re
import shlex
import signal
import sys
import threading
import time

import nbformat
import pytest

from hbpo_jax import flags, jobs
from hbpo_jax.evaluation import results
from hbpo_jax.reporting import plots, summary
from hbpo_jax.reporting import runs as runs_lib
from tests import checkpoints
from tests.colab import gate, notebooks
from tests.reporting import runs_fixture
from tests.system import runs

REPOSITORY = "hbpo-jax/hbpo_jax"
BADGE = "https://colab.research.google.com/github/{}/blob/main/colab/{}"
ALLOWED = {"hbpo_jax", "IPython", "google"} | sys.stdlib_module_names
LOGIC = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.With, ast.FunctionDef, ast.Lambda, ast.ListComp)
GSM8K = [
    ("Tom has 3 bags of 4 apples and eats 2. How many apples are left?", "10"),
    ("A pen costs $2. What do 6 cost?", "12"), ("Ann reads 5 pages a day. How many in a week?", "35"),
    ("Half of 18 eggs broke. How many are whole?", "9"), ("A train goes 60 km in an hour. How far in 3 hours?", "180"),
    ("Ben had $10 and spent $4. What is left?", "6"),
    ("Two dozen eggs are how many?", "24"), ("7 boxes hold 8 balls each. How many balls?", "56")]


@pytest.fixture(params=notebooks.PATHS, ids=lambda p: p.stem)
def path(request):
  return request.param


@pytest.fixture(autouse=True)
def no_job_outlives_its_test(tmp_path):
  """Jobs outlive their kernel by design, and would outlive a test that fails."""
  yield
  for lock in tmp_path.glob("hbpo_jax_jobs_*/*/lock"):
    with open(lock, "a") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        os.killpg(int((lock.parent / "pid").read_text()), signal.SIGKILL)


def code_cells(path):
  """(cell, its source without IPython's magics) of every code cell."""
  cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
  return [(c, re.sub(r"^(\s*)%.*$", r"\1pass", c.source, flags=re.MULTILINE)) for c in cells]


def test_both_notebooks_are_there():
  assert [p.stem for p in notebooks.PATHS] == ["quickstart", "train_qwen3_tpu"]


def test_is_stripped_and_valid(path):
  content = json.loads(path.read_text())
  nbformat.validate(content)
  assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
  assert content["metadata"]["kernelspec"]["name"] == "python3"
  for cell in content["cells"]:
    assert set(cell["metadata"]) <= {"tags"}, cell["id"]
    if cell["cell_type"] == "code":
      assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]
  ids = [cell["id"] for cell in content["cells"]]
  assert len(set(ids)) == len(ids)
  assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", i) for i in ids), "ids are words, so that they stay"
  assert [c["id"] for c in content["cells"] if "parameters" in c["metadata"].get("tags", [])] == ["parameters"]


def test_links_point_into_the_repository(path):
  text = path.read_text()
  assert BADGE.format(REPOSITORY, path.name) in json.loads(text)["cells"][0]["source"][0]
  for address in re.findall(r"https?://[^\s)\\\"}]+", text):
    if "colab.research.google.com/github" in address:
      name = address.rpartition("/")[2]
      assert address == BADGE.format(REPOSITORY, name) and (notebooks.ROOT / "colab" / name).is_file(), address
    elif "github.com" in address:
      assert address == f"https://github.com/{REPOSITORY}", address


def test_the_readme_links_both():
  text = (notebooks.ROOT / "colab" / "README.md").read_text()
  for path in notebooks.PATHS:
    assert BADGE.format(REPOSITORY, path.name) in text and f"]({path.name})" in text


def test_cells_only_call_the_package(path):
  """No foreign import, and no logic but the choice of what to install."""
  for cell, source in code_cells(path):
    tree = ast.parse(source)
    for node in ast.walk(tree):
      names = [a.name for a in node.names] if isinstance(node, ast.Import) else (
          [node.module] if isinstance(node, ast.ImportFrom) else [])
      assert {name.partition(".")[0] for name in names} <= ALLOWED, (cell.id, names)
      if cell.id != "install":
        assert not isinstance(node, LOGIC), cell.id
    assert "!" not in {line.lstrip()[:1] for line in cell.source.splitlines()}, "a failing shell command would not stop"


def test_every_command_line_is_understood(path, tmp_path, monkeypatch):
  """Runs the cells on commands that are only recorded, and parses what they were given."""
  pytest.importorskip("IPython", reason="needs the extra test")
  from hbpo_jax import colab
  from hbpo_jax.reporting import notebook
  calls = []
  record = lambda name: lambda *arguments, workdir, **_: calls.append((name, list(arguments), str(workdir)))
  monkeypatch.setattr(notebook, "run", lambda name, *arguments, workdir: record(name)(*arguments, workdir=workdir))
  monkeypatch.setattr(notebook, "train", record("train"))
  for name in ("show_summary", "show_plots", "show_samples", "show_report", "show_results"):
    monkeypatch.setattr(notebook, name, lambda workdir, **_: None)
  monkeypatch.setattr(colab, "open_workdir", lambda name, storage: str(tmp_path / name))
  variables = {}
  for cell, source in code_cells(path):
    exec(compile(source, cell.id, "exec"), variables)
  names = [name for name, _, _ in calls]
  assert names == (["train"] if path.stem == "quickstart" else ["plan", "doctor", "train", "evaluate"])
  for name, arguments, workdir in calls:
    others = [a for a in arguments if not a.startswith("--topology=")]
    cfg = flags.parse([*others, f"--workdir={workdir}"]).cfg
    assert "MORE" not in shlex.join(arguments)
    if name == "evaluate":
      assert cfg.eval.modes == ("natural", "efficiency", "budgets") and cfg.model.path.endswith("/export")
    if name == "train" and path.stem != "quickstart":
      assert (cfg.steps, cfg.lora.rank, cfg.optimizer.learning_rate) == (200, 32, 1e-5)
      assert cfg.data.source == "tfds:gsm8k"


def test_what_the_cells_show_of_a_finished_run(path, tmp_path):
  """All cells in a real kernel, on a run that is made up; only `report` is the real command."""
  pytest.importorskip("nbclient", reason="needs the extra test")
  workdir = tmp_path / "runs" / "it"
  make_finished_run(workdir)
  runs_fixture.make_evaluation(workdir / "evaluation", n_problems=6, k=1)
  player = tmp_path / "python"
  player.write_text(
      f'#!/bin/sh\ncase "$2" in hbpo_jax.report) exec {sys.executable} "$@";; esac\necho "played $2"\n')
  player.chmod(0o755)
  of = {"quickstart": {"WORKDIR": "runs/it"}, "train_qwen3_tpu": {"RUN": "it", "STORAGE": "this machine"}}[path.stem]
  notebook = notebooks.with_parameters(notebooks.read(path.stem), **of)
  next(c for c in notebook.cells if c.id == "parameters").source += f"\nimport sys\nsys.executable = {str(player)!r}"
  notebook.cells.append(nbformat.v4.new_code_cell(
      "from jax._src import xla_bridge\nprint(xla_bridge.backends_are_initialized())", id="holds"))
  with notebooks.Kernel(notebook, tmp_path, notebooks.environment(tmp_path)) as kernel:
    kernel.run()
  assert kernel.shown("install") == "", "what is installed is left alone"
  for name in {"plan", "doctor", "evaluate"} & {c.id for c in notebook.cells}:
    assert f"played hbpo_jax.{name}\n" in kernel.shown(name)
  assert "played hbpo_jax.train" in kernel.shown("train")
  assert "step 6 of 6" in kernel.shown("train") and "data:image/png;base64," in kernel.shown("train")
  assert "Tokens per response fell" in kernel.shown("summary") and ">all</td>" in kernel.shown("summary")
  assert kernel.shown("plots").count("<img ") == 3
  samples = kernel.shown("samples")
  assert samples.count("before: ") == samples.count("after: ") == (3 if path.stem == "quickstart" else 4)
  assert "srcdoc=" in kernel.shown("report") and (workdir / "report" / "index.html").is_file()
  assert kernel.shown("holds").strip() == "False", "the kernel must leave the accelerator to the runs"


def make_finished_run(workdir):
  """A made-up run with what `train` leaves at its end."""
  runs_fixture.make_training_run(workdir, steps=6, budgets=(128, 256))
  rows = [runs_lib.read(workdir, "it", alone=True).main[i].evaluated.rows["eval"] for i in (0, 1)]
  base, trained = map(results.summary, rows)
  plots.write_plots(workdir, base, trained)
  summary.write_summary(workdir, base, trained, {"profile": "hbpo", "steps": 6}, 60.0)


@pytest.mark.slow
def test_the_quickstart_runs_in_small(tmp_path):
  pytest.importorskip("nbclient", reason="needs the extra test")
  notebook = notebooks.with_parameters(notebooks.read("quickstart"), CONFIG="smoke", WORKDIR="runs/it")
  with notebooks.Kernel(notebook, tmp_path, notebooks.environment(tmp_path)) as kernel:
    kernel.run()
  workdir = tmp_path / "runs" / "it"
  assert json.loads((workdir / "summary.json").read_text())["measured_on"] == "evaluation"
  assert "update 10 of 10" in (workdir / "logs" / "train.log").read_text(), "the warm start"
  assert "step 3 of 3" in kernel.shown("train") and "data:image/png;base64," in kernel.shown("train")
  assert "Tokens per response" in kernel.shown("summary") and ">all</td>" in kernel.shown("summary")
  assert kernel.shown("plots").count("<img ") == 3
  samples = kernel.shown("samples")
  assert samples.count("before: ") == 3 and samples.count("after: ") == 3
  assert "srcdoc=" in kernel.shown("report") and (workdir / "report" / "index.html").is_file()


@pytest.mark.slow
def test_the_quickstart_learns(tmp_path):
  """As it is, with nothing replaced."""
  pytest.importorskip("nbclient", reason="needs the extra test")
  with notebooks.Kernel(notebooks.read("quickstart"), tmp_path, notebooks.environment(tmp_path)) as kernel:
    kernel.run()
  found = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())
  assert found["tokens_change"] < -0.4 and found["accuracy_change"] >= 0
  assert "Tokens per response fell" in kernel.shown("summary")


@pytest.mark.slow
def test_the_tpu_notebook_survives_interrupt_and_loss_of_the_machine(tmp_path, monkeypatch):
  """A tiny Qwen3 on a few problems: interrupted, its process killed, and all cells run again in a new kernel."""
  pytest.importorskip("nbclient", reason="needs the extra test")
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # Where the kernel's jobs are known.
  checkpoints.make_checkpoint(tmp_path / "model", "qwen3", hidden=32, tie=True)
  for name, opening in (("train", ""), ("test", "Think. ")):  # Problems of the evaluation are not trained on.
    rows = [{"id": f"{name}/{i}", "problem": opening + p, "answer": a, "source": "made up"}
            for i, (p, a) in enumerate(GSM8K)]
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  more = runs.settings(tmp_path) | {
      "data.source": tmp_path / "train.jsonl", "data.eval_source": tmp_path / "test.jsonl", "data.n_eval": 8,
      "eval.batch_queries": 8, "reward.grader": "tests.colab.gate.score_by_length", "rollout.caps": "()"}
  more = [f"--config.{name}={value}"
          for name, value in more.items() if name not in ("steps", "checkpoint.save_every", "optimizer.learning_rate")]
  parameters = dict(
      RUN="it", STORAGE="this machine", STEPS=6, SAVE_EVERY=1, LORA_RANK=4, BENCHMARK=str(tmp_path / "test.jsonl"),
      MORE=more)
  workdir, closed = tmp_path / "runs" / "it", tmp_path / "runs" / "it.gate"
  closed.parent.mkdir()
  closed.touch()
  env = notebooks.environment(tmp_path, HBPO_TEST_GATE=str(closed), HF_TOKEN="hf_do_not_show")

  def interrupt_at_the_gate(kernel):
    deadline = time.monotonic() + 600
    while not gate.has_checkpoint(workdir) and time.monotonic() < deadline:
      time.sleep(0.05)
    kernel.interrupt()

  first = notebooks.with_parameters(notebooks.read("train_qwen3_tpu"), **parameters)
  with notebooks.Kernel(first, tmp_path, env) as kernel:
    kernel.run("install", "parameters", "settings", "storage", "plan", "doctor")
    assert kernel.shown("storage").splitlines()[0] == "HF_TOKEN is set"
    assert "\nfits: " in kernel.shown("plan") and "\nhealthy: " in kernel.shown("doctor")
    thread = threading.Thread(target=interrupt_at_the_gate, args=(kernel,))
    thread.start()
    with pytest.raises(Exception, match="Only the view is stopped"):
      kernel.run("train")
    thread.join()
    job = jobs.find(workdir, "train")
    assert job.is_running, "an interrupt must not reach the run"
  assert job.is_running, "nor must the end of the kernel"
  os.killpg(int((job.folder / "pid").read_text()), signal.SIGKILL)
  assert not (workdir / "summary.json").exists()
  closed.unlink()

  second = notebooks.with_parameters(notebooks.read("train_qwen3_tpu"), **parameters)
  with notebooks.Kernel(second, tmp_path, env) as kernel:
    kernel.run()
  log = (workdir / "logs" / "train.log").read_text()
  assert re.search(r"resuming: [1-5] of 6 steps are done", log)
  assert [row["step"] for row in runs.rows(workdir / "metrics.jsonl")] == list(range(6))
  assert "step 6 of 6" in kernel.shown("train") and "Tokens per response" in kernel.shown("summary")
  assert kernel.shown("samples").count("after: ") == 4
  assert "efficiency" in kernel.shown("evaluate") and "48" in kernel.shown("evaluate")
  assert "srcdoc=" in kernel.shown("report")
  assert "nothing is pushed" in kernel.shown("push")
  assert (workdir / "export" / "config.json").is_file() and (workdir / "adapter" / "adapter_config.json").is_file()
  kept = [nbformat.writes(notebook) for notebook in (first, second)] + [p.read_text(errors="replace") for p in (
      p for p in workdir.rglob("*") if p.suffix in (".log", ".json", ".jsonl", ".md", ".html"))]
  assert not any("hf_do_not_show" in text for text in kept)
