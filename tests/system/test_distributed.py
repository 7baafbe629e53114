"""Whole runs of two processes with four simulated devices each, beside the same run of one process with eight."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from hbpo_jax.config import CheckpointConfig
from hbpo_jax.evaluation.store import open_existing
from hbpo_jax.learning.checkpoint import Checkpointer, fingerprint
from hbpo_jax.learning.learner import Learner
from hbpo_jax.models import architecture, sharding
from tests.system import runs

# Weights are split over all processes, heads within each.
MESH = {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2}
OTHER_MESH = {"mesh.data": 2, "mesh.fsdp": 4, "mesh.tensor": 1}


def settings(inputs, **changes):
  """A short run with evaluations before, during and after; few programs, as two cores compile them for two."""
  return runs.settings(
      inputs, rollout__queries=4, rollout__slots=8, rollout__length_buckets=(48,), log__samples_every=1,
      log__n_samples=16, data__n_eval=2, eval__every=2, eval__max_new_tokens=16, distributed__timeout_s=240,
      **{"steps": 2} | changes) | MESH


@pytest.fixture(scope="module")
def one(inputs, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("one") / "run"
  done = runs.run("train", settings(inputs), workdir, n_devices=8)
  assert done.returncode == 0, done.stderr
  return workdir


@pytest.fixture(scope="module")
def two(inputs, tmp_path_factory):
  """(workdir, output of each process)."""
  workdir = tmp_path_factory.mktemp("two") / "run"
  done = runs.run_hosts("train", settings(inputs), workdir, n_processes=2, n_devices=4)
  assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
  return workdir, [spoken(process.stdout) for process in done]


def spoken(text: str) -> list[str]:
  """What a command says; the CPU's library of collectives speaks too, from several threads at once."""
  return [line for line in text.splitlines() if line and "[Gloo]" not in line and "peer ranks" not in line]


def assert_same_training(got: pathlib.Path, expected: pathlib.Path):
  """The same responses, and the same numbers but for the order in which devices add."""
  samples = [runs.rows(workdir / "samples.jsonl") for workdir in (got, expected)]
  words = lambda rows: [(row["step"], row["budget"], row["response"], row["verdict"], row["n_gen"]) for row in rows]
  assert words(samples[0]) == words(samples[1])
  rows, expected_rows = (runs.rows(workdir / "metrics.jsonl") for workdir in (got, expected))
  assert [row["step"] for row in rows] == [row["step"] for row in expected_rows]
  for row, other in zip(rows, expected_rows):
    for name in ("update/loss", "update/grad_norm", "reward", "accuracy", "mean_tokens", "entropy"):
      np.testing.assert_allclose(row[name], other[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_two_processes_train_as_one_does(two, one):
  workdir, _ = two
  assert_same_training(workdir, one)
  got, expected = runs.exported(workdir), runs.exported(one)
  assert got.keys() == expected.keys()
  for name in expected:
    np.testing.assert_allclose(got[name], expected[name], atol=2e-5, err_msg=name)
  assert len({row["update/loss"] for row in runs.rows(one / "metrics.jsonl")}) == 2, "the losses must tell steps apart"


def test_only_the_first_process_writes_and_speaks(two, one):
  workdir, (first, second) = two
  assert second == []
  assert any(line.startswith("processes: 2 (0 ") for line in first)
  files = lambda root: {
      p.relative_to(root) for p in root.rglob("*") if p.is_file() and not {"state", "meta"} & set(p.parts)}
  assert files(workdir) == files(one)
  assert json.loads((workdir / "run.json").read_text())["devices"]["processes"] == 2


def test_evaluations_are_as_those_of_one_process(two, one):
  for name in ("base", "step_000002", "trained"):
    got, expected = (open_existing(workdir / "eval" / name) for workdir in (two[0], one))
    words = lambda found: [(r["id"], r["response"], r["score"]) for rows in found.rows.values() for r in rows]
    assert words(got) == words(expected) and len(words(got)) == 2 and not got.notes
  rows = [runs.rows(workdir / "metrics.jsonl")[-1] for workdir in (two[0], one)]
  assert rows[0]["eval/best"] == rows[1]["eval/best"] and rows[0]["eval/accuracy"] == rows[1]["eval/accuracy"]


def test_a_checkpoint_of_two_processes_is_read_by_one(two, one, inputs):
  cfg = runs.make_config(settings(inputs) | OTHER_MESH)
  learner = Learner(architecture.from_hf_config(inputs / "model"), cfg, sharding.make_mesh(cfg.mesh))
  states = []
  for workdir in (two[0], one):
    with Checkpointer(workdir / "checkpoints", CheckpointConfig(), must_exist=True) as checkpoints:
      assert checkpoints.steps() == [1, 2]
      state, meta = checkpoints.restore_latest(learner.abstract_state())
      states.append(state)
      assert meta["data_state"] and int(state.step) == 2
  assert len(fingerprint(states[0])) > 10
  for got, expected in zip(jax.tree.leaves(states[0]), jax.tree.leaves(states[1]), strict=True):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=2e-5)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes_and_another_mesh(two, one, inputs, tmp_path):
  whole = tmp_path / "whole"
  longer = settings(inputs, steps=3)
  assert runs.run("train", longer, whole, n_devices=8).returncode == 0
  shutil.copytree(two[0], tmp_path / "to_one")
  shutil.copytree(one, tmp_path / "to_two")
  done = runs.run("train", longer | OTHER_MESH, tmp_path / "to_one", n_devices=8)
  assert done.returncode == 0 and "resuming: 2 of 3" in done.stdout, done.stderr
  both = runs.run_hosts("train", longer | OTHER_MESH, tmp_path / "to_two", n_processes=2, n_devices=4)
  assert [p.returncode for p in both] == [0, 0] and "resuming: 2 of 3" in both[0].stdout, both[0].stderr
  for name in ("to_one", "to_two"):
    assert_same_training(tmp_path / name, whole)
