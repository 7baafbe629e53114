"""Studies: their cells, settings and refusals."""

import dataclasses
import json
import pathlib

import pytest

from hbpo_jax import study as command
from hbpo_jax import validation
from hbpo_jax.files import atomic_write_text
from hbpo_jax.studies import cell as cell_lib
from hbpo_jax.studies import plan
from hbpo_jax.studies.plan import Method, Study

STUDY = Study(
    config="miniature/task",
    methods=(Method("a", "A", {"reward.form": "cosine", "advantage.intra_coef": 0.0}),
             Method("b", "B", {"profile": "paper"}, rate_of="a", group="ablation"),
             Method("c", "C", {"rollout.queries": 8}, group="rival")),
    seeds=(0, 1), rival_seeds=(1,), tune_seed=9, rates=(1e-4, 3e-4), n_eval=600, n_modes=60, n_tune=90,
    forced=("say:work",), modes=("8",))


def test_cells_come_after_what_they_need_and_only_where_they_should():
  cells = plan.cells(STUDY)
  names = [c.name for c in cells]
  assert names == [
      "warm_start/seed_9", "warm_start/seed_0", "warm_start/seed_1", "tune/a/0.0001", "tune/a/0.0003", "tune/c/0.0001",
      "tune/c/0.0003", "a/seed_0", "b/seed_0", "a/seed_1", "b/seed_1", "c/seed_1"]
  for i, c in enumerate(cells):
    assert set(c.after) <= set(names[:i])
  assert cells[-2].after == ("warm_start/seed_1", "tune/a/0.0001", "tune/a/0.0003")  # b takes the rate of a
  assert [c.name for c in plan.cells(STUDY, ["b"])] == [
      "warm_start/seed_9", "warm_start/seed_0", "warm_start/seed_1", "tune/a/0.0001", "tune/a/0.0003", "b/seed_0",
      "b/seed_1"]
  assert [c.name for c in plan.cells(plan.quick(STUDY))] == ["warm_start/seed_0", "a/seed_0"]
  with pytest.raises(ValueError, match="--only=z is no method of the study"):
    plan.cells(STUDY, ["z"])


def test_rivals_may_have_fewer_learning_rates():
  cells = {c.name: c for c in plan.cells(dataclasses.replace(STUDY, rival_rates=(3e-4,)))}
  assert [n for n in cells if n.startswith("tune/c")] == ["tune/c/0.0003"]
  assert cells["c/seed_1"].after == ("warm_start/seed_1", "tune/c/0.0003") and "tune/a/0.0001" in cells
  assert not any(n.startswith("tune") for n in (c.name for c in plan.cells(plan.quick(dataclasses.replace(
      STUDY, rival_rates=(3e-4,))))))


def test_a_warm_start_that_is_left_out_is_made_all_the_same():
  extra = {c.name for c in plan.cells(dataclasses.replace(STUDY, left_out=(5,)))} - {c.name for c in plan.cells(STUDY)}
  assert extra == {"warm_start/seed_5"}


def test_settings_of_a_cell():
  cells = {c.name: c for c in plan.cells(STUDY)}
  root = pathlib.Path("out")
  warm = plan.settings(STUDY, cells["warm_start/seed_1"], root)
  assert warm.seed == 1 and not warm.model.path
  cfg = plan.settings(STUDY, cells["tune/a/0.0003"], root, 3e-4)
  assert (cfg.seed, cfg.optimizer.learning_rate, cfg.reward.form) == (9, 3e-4, "cosine")
  assert cfg.model.path == "out/runs/warm_start/seed_9/export"
  assert plan.settings(STUDY, cells["b/seed_0"], root).advantage.center_intra is False


def test_a_warm_start_whose_model_is_gone_is_made_again_for_who_needs_it(tmp_path):
  names = lambda: [c.name for c in command.to_do(plan.cells(STUDY), tmp_path)]
  cells = [c.name for c in plan.cells(STUDY)]
  assert names() == cells
  for name in cells[:-1]:
    atomic_write_text(cell_lib.path_of(tmp_path, name), "{}")
  assert names() == ["warm_start/seed_1", "c/seed_1"]  # Of three warm starts the one that is needed.
  (tmp_path / "runs/warm_start/seed_1/export").mkdir(parents=True)
  assert names() == ["c/seed_1"]
  atomic_write_text(cell_lib.path_of(tmp_path, cells[-1]), "{}")
  assert names() == []


def test_a_cell_that_was_made_otherwise_is_refused(tmp_path):
  cells = {c.name: c for c in plan.cells(STUDY)}

  def store(name, study=STUDY, **content):
    made = cell_lib.as_asked(study, cells[name], plan.settings(study, cells[name], tmp_path, cells[name].rate))
    atomic_write_text(cell_lib.path_of(tmp_path, name), json.dumps({"settings": made} | content))

  def check(name, study=STUDY):
    cell_lib.check(study, cells[name], tmp_path)

  for rate, accuracy in ((1e-4, 0.5), (3e-4, 0.9)):
    store(f"tune/a/{rate:g}", learning_rate=rate, modes={"natural": {"accuracy": accuracy, "tokens": 9.0}})
  store("warm_start/seed_0")
  for name in ("tune/a/0.0001", "tune/a/0.0003", "warm_start/seed_0", "a/seed_0"):  # The last does not exist.
    check(name)
  # Made before 3e-4 was tried and chosen.
  atomic_write_text(cell_lib.path_of(tmp_path, "a/seed_0"), json.dumps({"settings": cell_lib.as_asked(
      STUDY, cells["a/seed_0"], plan.settings(STUDY, cells["a/seed_0"], tmp_path, 1e-4))}))
  with pytest.raises(ValueError, match=r"a/seed_0.json was made otherwise \(optimizer.learning_rate was 0.0001, now "
                     r"0.0003\); delete it"):
    check("a/seed_0")
  with pytest.raises(ValueError, match=r"n_eval was 600, now 200"):
    check("warm_start/seed_0", plan.quick(STUDY))
  # A warm start does not depend on what is learnt from it.
  check("warm_start/seed_0", dataclasses.replace(STUDY, methods=STUDY.methods[:1]))


@pytest.mark.parametrize("change, message", [
    (dict(tune_seed=1), "tune_seed=1 is also one of the seeds"),
    (dict(left_out=(7, 1)), r"left_out=\(7, 1\) holds seed 1, which the study uses"),
    (dict(rates=(), rival_rates=(1e-4,)), r"rival_rates=\(0.0001,\), but no rates"),
    (dict(rival_seeds=(4,)), r"rival_seeds=\(4,\) are not all among"),
    (dict(methods=STUDY.methods + STUDY.methods[:1]), "'a' occurs twice"),
    (dict(methods=(Method("a", "A", {"reward.frm": 1}),)), "'a' sets 'reward.frm', which is no setting"),
    (dict(methods=(Method("a", "A", {}, rate_of="q"),)), "takes the learning rate of 'q'"),
    (dict(methods=(Method("a", "A", {}, group="best"),)), "is of group 'best'"),
])
def test_contradictions_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    plan.check(dataclasses.replace(STUDY, **change))


def test_the_shipped_study_is_sound():
  study = plan.load("miniature/study")
  cells = plan.cells(study)
  for cell in cells:
    validation.validate(plan.settings(study, cell, pathlib.Path("out"), cell.rate), n_devices=1)
  assert {"classic", "cosine", "paper", "released", "hbpo"} <= {c.method for c in cells}
  hard = 2 / 6 * study.n_eval
  assert len(study.seeds) >= 3 and hard >= 3000
  with pytest.raises(ValueError, match="has no get_study"):
    plan.load("miniature/task")
