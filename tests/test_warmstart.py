"""The warm start that `train` makes where the settings name no model: when, where, once, and of which settings."""

import json

import numpy as np
import pytest

from hbpo_jax import config, flags, sft, train
from hbpo_jax.learning.learner import Learner
from tests.system import runs

WIDE = {"mesh.data": 8}  # for the eight devices of the tests


def settings(**changes):
  """Those of smoke."""
  return flags.build(flags.load_config("smoke"), WIDE | {k.replace("__", "."): v for k, v in changes.items()})


@pytest.fixture
def trained(monkeypatch):
  """The folders of the warm starts, which only write what tells that they are complete."""
  folders = []

  def fake(cfg, root, note):
    folders.append(root)
    assert "model.path is empty" in note and str(root) in note
    (root / "export").mkdir(parents=True)
    (root / "export" / "config.json").write_text("{}")
    (root / "run.json").write_text(json.dumps({"config": config.to_json_dict(sft.supervised_config(cfg))}))

  monkeypatch.setattr(sft, "train", fake)
  return folders


def test_a_model_of_ones_own_is_kept(tmp_path, trained):
  for cfg in (settings(model__path="/a/model"), settings(sft__path="/a/model"), settings(data__source="a.jsonl")):
    assert sft.with_model(cfg, tmp_path) is cfg
  assert not trained and not list(tmp_path.iterdir())


def test_without_a_model_one_is_trained_once(tmp_path, trained):
  cfg = sft.with_model(settings(), tmp_path)
  assert cfg.model.path == str(tmp_path / "warmstart" / "export")
  assert config.differences(cfg, settings()) == [("model.path", cfg.model.path, "")]
  assert sft.with_model(settings(), tmp_path) == cfg
  assert trained == [tmp_path / "warmstart"]


def test_one_that_was_stopped_is_trained_again(tmp_path, trained):
  (tmp_path / "warmstart" / ".export.partial").mkdir(parents=True)
  (tmp_path / "warmstart" / "run.json").write_text("{}")
  sft.with_model(settings(), tmp_path)
  assert len(trained) == 1


def test_settings_of_later_training_may_change(tmp_path, trained):
  sft.with_model(settings(), tmp_path)
  sft.with_model(settings(optimizer__learning_rate=1.0, data__n_eval=8, eval__every=3, steps=9), tmp_path)
  assert len(trained) == 1


@pytest.mark.parametrize("change, said", [
    ({"seed": 1}, "config.seed=1, but the warm start in .*warmstart was trained with 0"),
    ({"sft__steps": 11}, "config.sft.steps=11"), ({"sft__learning_rate": 1.0}, "config.optimizer.learning_rate|sft"),
    ({"rollout__budgets": (8, 12)}, r"config.rollout.budgets=\(8, 12\)"),
    ({"data__synthetic__modulus": 5}, "config.data.synthetic.modulus=5"),
    ({"prompt__budget_sentence": "in {budget}"}, "config.prompt.budget_sentence"),
])
def test_a_warm_start_of_other_settings_is_refused(tmp_path, trained, change, said):
  sft.with_model(settings(), tmp_path)
  with pytest.raises(ValueError, match=said):
    sft.with_model(settings(**change), tmp_path)


def test_a_model_put_there_is_taken(tmp_path, trained):
  (tmp_path / "warmstart" / "export").mkdir(parents=True)
  (tmp_path / "warmstart" / "export" / "config.json").write_text("{}")
  assert sft.with_model(settings(seed=5), tmp_path).model.path and not trained


def test_settings_that_train_would_refuse_are_refused_before(tmp_path, trained, capsys):
  with pytest.raises(SystemExit):
    flags.run(train.main, name="train", argv=[
        "--config=smoke", f"--workdir={tmp_path}", "--config.mesh.data=8", "--config.optimizer.warmup_updates=1000"])
  assert "config.optimizer.warmup_updates=1000" in capsys.readouterr().err and not trained


@pytest.mark.parametrize("change, said", [
    ({"lora__rank": 2, "lora__targets": ("q_prj",)}, "'q_prj', which is no projection"),
    ({"rollout__length_buckets": (2,)}, "rollout.length_buckets"),
    ({"sft__rows": 12, "learner__pack": False}, r"sft.rows=12 does not divide over mesh.data x mesh.fsdp = 8"),
])
def test_settings_that_only_a_model_shows_to_be_wrong_are_refused_before(tmp_path, monkeypatch, change, said):
  monkeypatch.setattr(Learner, "sft_update", lambda *_: pytest.fail("an update was made"))
  with pytest.raises(ValueError, match=said):
    sft.with_model(settings(**change), tmp_path)


@pytest.mark.parametrize("change", [{"rollout__count_prefix_tokens": False}, {"eval__max_new_tokens": 99}])
def test_the_new_model_is_long_enough(change):
  cfg = settings(**change)
  model, tokenizer = sft.new_model(cfg)
  n_opening = len(tokenizer(cfg.prompt.budget_sentence.format(budget=8))["input_ids"])
  longest = cfg.reward.max_response_tokens + n_opening * (not cfg.rollout.count_prefix_tokens)
  assert model.arch.max_context == cfg.data.max_prompt_tokens + max(longest, cfg.eval.max_new_tokens)


# For real.

@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """smoke, in one command."""
  workdir = tmp_path_factory.mktemp("run") / "run"
  done = runs.run("train", overrides(), workdir)
  assert done.returncode == 0, done.stderr
  return workdir


def overrides():
  base = config.from_config_dict(config.new("hbpo"))
  return {name: value for name, _, value in config.differences(base, settings(mesh__data=1))}


@pytest.mark.slow
def test_the_same_bits_as_two_commands(run, tmp_path):
  (tmp_path / "run").mkdir()
  assert runs.run("sft", overrides(), tmp_path / "run" / "warmstart").returncode == 0
  warm = tmp_path / "run" / "warmstart" / "export"
  assert same(runs.exported(tmp_path / "run" / "warmstart"), runs.exported(run / "warmstart"))
  done = runs.run("train", overrides() | {"model.path": warm}, tmp_path / "run")
  assert done.returncode == 0, done.stderr
  assert same(runs.exported(tmp_path / "run"), runs.exported(run))


@pytest.mark.slow
def test_a_resumed_run_finds_it_again(run):
  made = (run / "warmstart" / "run.json").read_bytes()
  again = runs.run("train", overrides(), run)
  assert again.returncode == 0 and "resuming: 3 of 3" in again.stdout and "warm start" not in again.stdout, again.stderr
  assert (run / "warmstart" / "run.json").read_bytes() == made
  refused = runs.run("train", overrides() | {"seed": 1}, run)
  assert refused.returncode == 2 and "config.seed=1" in refused.stderr


@pytest.mark.slow
def test_two_processes_share_one(tmp_path):
  done = runs.run_hosts("train", overrides(), tmp_path / "run", 2, 1)
  assert [d.returncode for d in done] == [0, 0], [d.stderr for d in done]
  assert done[0].stdout.count("exported to") == 1 and "mesh {'data': 1, 'fsdp': 2" in done[0].stdout
  assert (tmp_path / "run" / "summary.json").exists() and (tmp_path / "run" / "warmstart" / "export").is_dir()


def same(a, b):
  return a.keys() == b.keys() and all(np.array_equal(a[k].view(np.uint8), b[k].view(np.uint8)) for k in a)
