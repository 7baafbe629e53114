"""Checkpoints: bit for bit, in the background, on another mesh, and past damaged ones."""

import errno
import hashlib
import json
import logging
import threading
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hbpo_jax
from hbpo_jax.config import CheckpointConfig, RewardConfig
from hbpo_jax.learning.checkpoint import Checkpointer, fingerprint
from hbpo_jax.models.architecture import Architecture
from tests.learning import tiny

META = {"data_state": {"epoch": 1, "position": 37}, "config": {"seed": 3, "model": {"path": "x"}}, "wall_s": 1.25}
CFG = CheckpointConfig(max_to_keep=3)


def make_state(learner, step=0):
  """A state whose every array depends on `step`."""
  state = learner.new_state(tiny.make_params(learner, seed=step))
  moved = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), (state.opt_state, state.step, state.update))
  return state.replace(opt_state=moved[0], step=moved[1], update=moved[2])


@pytest.fixture(scope="module")
def learner():
  return tiny.make_learner()


def save(directory, learner, *steps, cfg=CFG):
  with Checkpointer(directory, cfg) as checkpoints:
    for step in steps:
      assert checkpoints.save(step, make_state(learner, step), META | {"at": step})


def restore(directory, learner, **kwargs):
  with Checkpointer(directory, CFG) as checkpoints:
    return checkpoints.restore_latest(learner.abstract_state(), **kwargs)


def biggest_file(directory):
  return max((p for p in (directory / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder):
  path = biggest_file(folder)
  path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def flip_one_bit(folder):
  path = biggest_file(folder)
  content = bytearray(path.read_bytes())
  content[len(content) // 3] ^= 1
  path.write_bytes(bytes(content))


def flip_one_bit_of_the_data_position(folder):
  path = folder / "meta" / "metadata"
  content = path.read_bytes()
  at = content.index(b"37", content.index(b'"position"')) + 1
  path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])


def lose_a_file(folder):
  biggest_file(folder).unlink()


def spoil_meta(folder):
  (folder / "meta" / "metadata").write_text("{}")


def lose_the_checksums(folder):
  (folder / "checksums.json").unlink()


DAMAGES = [truncate, flip_one_bit, flip_one_bit_of_the_data_position, lose_a_file, spoil_meta, lose_the_checksums]


def test_what_was_saved_comes_back_bit_for_bit(tmp_path, learner):
  save(tmp_path, learner, 4, 7)
  state, meta = restore(tmp_path, learner)
  tiny.assert_trees_equal(state, make_state(learner, 7))
  assert jax.tree.structure(state) == jax.tree.structure(make_state(learner, 7))
  assert meta == META | {"at": 7}


def test_nothing_saved_is_none(tmp_path, learner):
  assert restore(tmp_path / "new", learner) is None


def test_a_restored_run_goes_on_as_the_uninterrupted_one(tmp_path, learner):
  batch = learner.place(tiny.make_batch())
  state = learner.new_state(tiny.make_params(learner))
  with Checkpointer(tmp_path, CFG) as checkpoints:
    for step in range(4):
      if step == 2:
        checkpoints.save(step, state, META)
      state, _ = learner.sft_update(state, batch)
  resumed, _ = restore(tmp_path, learner)
  for _ in range(2):
    resumed, _ = learner.sft_update(resumed, batch)
  tiny.assert_trees_equal(resumed, state)


def test_another_mesh(tmp_path, learner):
  save(tmp_path, learner, 1)
  eight = tiny.make_learner(8, learner={"microbatch_rows": 8})
  state, _ = restore(tmp_path, eight)
  tiny.assert_trees_equal(state, make_state(learner, 1))
  assert jax.tree.map(lambda x: x.sharding, state) == eight.state_shardings
  assert fingerprint(state) == fingerprint(make_state(learner, 1))


def test_saving_is_asynchronous_and_safe_from_donation(tmp_path, learner, monkeypatch):
  """While the files are held back, `save` has returned and an update has consumed the saved arrays."""
  gate = threading.Event()
  write = Checkpointer._write_checksums

  def held_back(self):
    assert gate.wait(60)
    write(self)

  monkeypatch.setattr(Checkpointer, "_write_checksums", held_back)
  with Checkpointer(tmp_path, CFG) as checkpoints:
    state = make_state(learner, 2)
    before = tiny.host(state)
    checkpoints.save(2, state, META)
    assert not (tmp_path / "2").exists()
    learner.sft_update(state, tiny.make_batch())
    gate.set()
    checkpoints.wait()
    assert (tmp_path / "2").is_dir()
    restored, _ = checkpoints.restore_latest(learner.abstract_state())
  tiny.assert_trees_equal(restored, before)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_passed_over_and_can_be_saved_again(tmp_path, learner, damage, caplog):
  directory = tmp_path / "checkpoints"
  save(directory, learner, 1, 2, 3)
  damage(directory / "3")
  with Checkpointer(directory, CFG) as checkpoints, caplog.at_level(logging.WARNING):
    state, meta = checkpoints.restore_latest(learner.abstract_state())
    assert meta["at"] == 2
    tiny.assert_trees_equal(state, make_state(learner, 2))
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("hbpo_jax")]
    assert len(messages) == 1 and "damaged checkpoint of step 3" in messages[0] and str(directory) in messages[0]
    assert checkpoints.steps() == [1, 2]
    assert (tmp_path / "checkpoints_damaged" / "3.0").is_dir()
    assert checkpoints.save(3, make_state(learner, 3), META | {"at": 3})
  assert restore(directory, learner)[1]["at"] == 3


def test_all_damaged_is_one_error_and_nothing_is_moved(tmp_path, learner):
  directory = tmp_path / "checkpoints"
  save(directory, learner, 1, 2)
  truncate(directory / "1")
  spoil_meta(directory / "2")
  message = "all checkpoints in .*checkpoints are damaged.*step 2: meta.*step 1: .*another --workdir"
  with pytest.raises(ValueError, match=message):
    restore(directory, learner)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints"]


def test_arrays_that_are_not_those_of_save_are_damage(tmp_path, learner):
  """A file that is whole but holds other numbers, as if memory had changed before it was written."""
  save(tmp_path, learner, 1)
  path = tmp_path / "1" / "meta" / "metadata"
  content = json.loads(path.read_text())
  content["sums"][".params['embed']"] ^= 1
  path.write_text(json.dumps(content))
  with Checkpointer(tmp_path, CFG) as checkpoints:
    checkpoints._saving = 1
    checkpoints._write_checksums()
    with pytest.raises(ValueError, match=r"step 1: array .params\['embed'\] does not match"):
      checkpoints.restore_latest(learner.abstract_state())


def test_another_model_is_one_error_and_not_damage(tmp_path, learner):
  save(tmp_path, learner, 1)
  wider = tiny.make_learner(arch=Architecture(**(vars(tiny.ARCH) | {"mlp_size": 64})))
  with pytest.raises(ValueError, match=r"step 1 .* does not fit this model.*down.* is float32\[2, 32, 48\] there"):
    restore(tmp_path, wider)


def test_check_may_refuse_and_ends_the_search(tmp_path, learner):
  save(tmp_path, learner, 1, 2)
  def check(meta):
    raise ValueError(f"seed {meta['config']['seed']} at {meta['at']}")
  with pytest.raises(ValueError, match="^seed 3 at 2$"):
    restore(tmp_path, learner, check=check)


def test_only_the_newest_are_kept_and_a_step_is_saved_once(tmp_path, learner):
  save(tmp_path, learner, 1, 2, 3, 4, cfg=CheckpointConfig(max_to_keep=2))
  with Checkpointer(tmp_path, CheckpointConfig(max_to_keep=2)) as checkpoints:
    assert checkpoints.steps() == [3, 4]
    assert not checkpoints.save(4, make_state(learner, 4), META)


def test_what_a_killed_save_left_is_removed(tmp_path, learner):
  save(tmp_path, learner, 1)
  (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
  assert restore(tmp_path, learner)[1]["at"] == 1
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1"]


def test_a_save_that_fails_removes_no_older_checkpoint(tmp_path, learner, monkeypatch):
  """The newest is damaged on disk and the next save fails: the one good checkpoint is still there."""
  cfg = CheckpointConfig(max_to_keep=2)
  save(tmp_path, learner, 1, 2, 3, cfg=cfg)
  flip_one_bit(tmp_path / "3")

  def fail(self):
    raise OSError(errno.ENOSPC, "No space left on device")

  with monkeypatch.context() as patched:
    patched.setattr(Checkpointer, "_write_checksums", fail)
    checkpoints = Checkpointer(tmp_path, cfg)
    checkpoints.save(4, make_state(learner, 4), META)
    with pytest.raises(OSError) as raised:
      checkpoints.wait()
  assert raised.value.errno == errno.ENOSPC and str(tmp_path) in raised.value.filename
  assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdecimal()) == ["2", "3"]
  with Checkpointer(tmp_path, cfg) as checkpoints:
    state, _ = checkpoints.restore_latest(learner.abstract_state())
  tiny.assert_trees_equal(state, make_state(learner, 2))


def test_the_good_one_outlives_a_new_save_beside_a_damaged_one(tmp_path, learner):
  cfg = CheckpointConfig(max_to_keep=2)
  save(tmp_path, learner, 1, 2, cfg=cfg)
  truncate(tmp_path / "2")
  save(tmp_path, learner, 3, cfg=cfg)
  truncate(tmp_path / "3")
  with Checkpointer(tmp_path, cfg) as checkpoints:
    state, _ = checkpoints.restore_latest(learner.abstract_state())
  tiny.assert_trees_equal(state, make_state(learner, 1))


def test_scheduled_checkpoints_may_go_before_those_of_a_stop(tmp_path, learner):
  """A rollback must find what it finds in a run that was not stopped."""
  cfg = CheckpointConfig(save_every=2, max_to_keep=9)
  save(tmp_path, learner, 2, 4, 5, cfg=cfg)
  with Checkpointer(tmp_path, cfg) as checkpoints:
    newest = lambda **options: checkpoints.restore_latest(learner.abstract_state(), **options)[1]["at"]
    assert (newest(), newest(scheduled_first=True)) == (5, 4)
    flip_one_bit(tmp_path / "2")
    flip_one_bit(tmp_path / "4")
    assert newest(scheduled_first=True) == 5


def test_a_checkpoint_has_its_name_only_when_it_is_whole(tmp_path, learner, monkeypatch):
  """Killed at any moment before, and there is none; the checksums are in it when it gets its name."""
  seen = []
  write = Checkpointer._write_checksums

  def watched(self):
    seen.append(not (tmp_path / "1").exists())
    write(self)
    seen.append(not (tmp_path / "1").exists())

  monkeypatch.setattr(Checkpointer, "_write_checksums", watched)
  save(tmp_path, learner, 1)
  assert seen == [True, True] and (tmp_path / "1" / "checksums.json").exists()


def test_a_newer_format_is_refused_and_an_older_one_read(tmp_path, learner):
  save(tmp_path, learner, 1, 2)
  path = tmp_path / "2" / "meta" / "metadata"
  content = json.loads(path.read_text())
  assert content["format"] == 1 and content["hbpo_jax"] == hbpo_jax.__version__

  def rewrite(changed):
    path.write_text(json.dumps(changed))
    with Checkpointer(tmp_path, CFG) as checkpoints:
      checkpoints._saving = 2
      checkpoints._write_checksums()

  rewrite(content | {"format": 2, "hbpo_jax": "9.1"})
  with pytest.raises(ValueError, match="step 2 in .* is of format 2, written by hbpo_jax 9.1; this .* reads format 1"):
    restore(tmp_path, learner)
  del content["format"], content["hbpo_jax"]
  rewrite(content)
  tiny.assert_trees_equal(restore(tmp_path, learner)[0], make_state(learner, 2))


def test_due():
  every_two, only_last = (object.__new__(Checkpointer) for _ in range(2))
  every_two._cfg, only_last._cfg = CheckpointConfig(save_every=2), CheckpointConfig(save_every=0)
  assert [s for s in range(1, 8) if every_two.due(s, last=7)] == [2, 4, 6, 7]
  assert [s for s in range(1, 8) if only_last.due(s, last=7)] == [7]


def test_refusals(tmp_path, learner):
  with pytest.raises(FileNotFoundError, match="nowhere holds no checkpoint"):
    Checkpointer(tmp_path / "nowhere", CFG, must_exist=True)
  with pytest.raises(ValueError, match="checkpoint.max_to_keep=0"):
    Checkpointer(tmp_path, CheckpointConfig(max_to_keep=0))
  with Checkpointer(tmp_path, CFG) as checkpoints:
    with pytest.raises(ValueError, match="not plain JSON"):
      checkpoints.save(1, make_state(learner), {"data_state": b"bytes"})
  assert not list(tmp_path.glob("1*"))


def test_a_failure_in_the_background_is_raised(tmp_path, learner, monkeypatch):
  def fail(self):
    raise OSError("disk full")
  monkeypatch.setattr(Checkpointer, "_write_checksums", fail)
  checkpoints = Checkpointer(tmp_path, CFG)
  checkpoints.save(1, make_state(learner), META)
  with pytest.raises(OSError, match="disk full"):
    checkpoints.wait()
  assert not (tmp_path / "1").exists()


@pytest.mark.parametrize("where", ["save", "wait_until_finished", "close"])
def test_a_full_disk_is_an_error_of_the_disk_wherever_it_is_met(tmp_path, learner, monkeypatch, where):
  def fail(*_, **__):
    raise ValueError("RESOURCE_EXHAUSTED: Error writing \"x\": No space left on device [os_error_code='28']")

  checkpoints = Checkpointer(tmp_path, CFG)
  monkeypatch.setattr(checkpoints._manager, where, fail)
  with pytest.raises(OSError) as raised:
    checkpoints.save(1, make_state(learner), META)
    checkpoints.close()
  assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path))


def test_fingerprint_sees_one_bit_in_any_dtype():
  tree = {"a": jnp.arange(12, dtype=jnp.float32).reshape(3, 4), "b": jnp.ones((2, 3), jnp.bfloat16),
          "c": jnp.zeros((), jnp.int32), "d": jnp.array([True, False])}
  before = fingerprint(tree)
  assert before == fingerprint(jax.tree.map(jnp.copy, tree))
  swapped = tree | {"a": tree["a"].at[0, 1].set(2.0).at[0, 2].set(1.0)}
  for changed in (swapped, tree | {"b": tree["b"].at[1, 2].set(1.0078125)}, tree | {"c": jnp.int32(1)},
                  tree | {"d": jnp.array([True, True])}, tree | {"a": -tree["a"]}):
    assert sum(before[k] != v for k, v in fingerprint(changed).items()) == 1
  words = np.arange(12, dtype=np.float32).view(np.uint32)
  assert before["['a']"] == sum(mix((int(b) + 0x9E3779B9 * (i + 1)) % 2**32) for i, b in enumerate(words)) % 2**32


def mix(h):
  h = ((h ^ h >> 16) * 0x85EBCA6B) % 2**32
  h = ((h ^ h >> 13) * 0xC2B2AE35) % 2**32
  return h ^ h >> 16


ADLP = RewardConfig(form="adlp", penalty_start=0.125)


def test_what_a_reward_remembers_is_saved_and_comes_back(tmp_path):
  learner = tiny.make_learner(8, reward=ADLP)
  state = make_state(learner, 3)
  assert float(state.memory["penalty"]) == 0.125 and state.memory["penalty"].dtype == jnp.float32
  state = state.replace(memory=learner.place_memory({"penalty": np.float32(0.3)}))
  with Checkpointer(tmp_path, CFG) as checkpoints:
    checkpoints.save(3, state, META)
    checkpoints.wait()
    restored, _ = checkpoints.restore_latest(learner.abstract_state())
  tiny.assert_trees_equal(restored, state)
  assert restored.memory["penalty"].sharding == learner.state_shardings.memory["penalty"]


def test_a_checkpoint_without_memory_is_refused_where_the_reward_needs_one(tmp_path, learner):
  save(tmp_path, learner, 1)
  with pytest.raises(ValueError, match=r"\.memory\['penalty'\] is absent there, float32\[\] here"):
    restore(tmp_path, tiny.make_learner(reward=ADLP))


def test_a_checkpoint_from_before_there_was_a_memory(tmp_path, learner):
  new = make_state(learner, 2)
  old = StateBeforeMemory(new.step, new.update, new.params, new.opt_state)
  with Checkpointer(tmp_path, CFG) as checkpoints:
    checkpoints.save(2, old, META)
  state, _ = restore(tmp_path, learner)
  tiny.assert_trees_equal(state, new)


@struct.dataclass
class StateBeforeMemory:
  step: Any
  update: Any
  params: Any
  opt_state: Any


def _lie(folder, text):
  """Another meta, with checksums that fit it."""
  path = folder / "meta" / "metadata"
  path.write_text(text)
  sums = json.loads((folder / "checksums.json").read_text())
  sums["meta/metadata"] = hashlib.sha256(path.read_bytes()).hexdigest()
  (folder / "checksums.json").write_text(json.dumps(sums))


@pytest.mark.parametrize("change", [
    lambda c: "", lambda c: "[]", lambda c: "5", lambda c: "[" * 100_000, lambda c: json.dumps(c | {"step": 1}),
    lambda c: json.dumps(c | {"step": None}), lambda c: json.dumps({k: v for k, v in c.items() if k != "sums"}),
    lambda c: json.dumps(c | {"meta": []}), lambda c: json.dumps(c | {"arrays": None}),
    lambda c: json.dumps(c | {"sums": dict.fromkeys(c["sums"], 0)}), lambda c: json.dumps(c | {"sums": {}})])
def test_a_checkpoint_that_lies_about_itself_is_passed_over(tmp_path, learner, change):
  folder = tmp_path / "checkpoints"
  save(folder, learner, 1, 2)
  _lie(folder / "2", change(json.loads((folder / "2" / "meta" / "metadata").read_text())))
  assert restore(folder, learner)[1]["at"] == 1
  assert (tmp_path / "checkpoints_damaged" / "2.0").is_dir()
