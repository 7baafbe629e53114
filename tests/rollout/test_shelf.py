"""Rollouts come back from the shelf as they were, or not at all."""

import dataclasses

import numpy as np
import pytest

from hbpo_jax.rollout import shelf
from hbpo_jax.structs import Rollouts

LEDGER = {"rollout/useful": 12.0, "time/rollout_decode_s": 0.1}


def make_rollouts():
  rng = np.random.default_rng(0)
  widths = (3, 5)
  return Rollouts(
      tokens=tuple(rng.integers(0, 99, (2, 2, w), np.int32) for w in widths),
      completion_mask=tuple(rng.random((2, 2, w)) < 0.5 for w in widths),
      logp_sampler=tuple(rng.standard_normal((2, 2, w)).astype(np.float32) for w in widths),
      n_tokens_BGJ=rng.integers(1, 3, (2, 2, 2), np.int32), n_gen_BGJ=rng.integers(1, 3, (2, 2, 2), np.int32),
      truncated_BGJ=rng.random((2, 2, 2)) < 0.5)


def test_what_was_put_there_comes_back_bit_for_bit(tmp_path):
  rollouts = make_rollouts()
  found, ledger = shelf.load(shelf.path_of(tmp_path, 3), shelf.save(shelf.path_of(tmp_path, 3), rollouts, LEDGER))
  assert ledger == LEDGER
  for field in dataclasses.fields(Rollouts):
    one, other = getattr(rollouts, field.name), getattr(found, field.name)
    for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (one, other)), strict=True):
      assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), field.name


def test_damage_is_one_error_with_the_remedy(tmp_path):
  path = shelf.path_of(tmp_path, 3)
  sha = shelf.save(path, make_rollouts(), LEDGER)
  body = path.read_bytes()
  for damaged in (body[:-1], body[:40] + bytes([body[40] ^ 1]) + body[41:], b""):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="rollouts-00000003.npz.*delete that checkpoint"):
      shelf.load(path, sha)
  path.unlink()
  with pytest.raises(ValueError, match="rollouts-00000003.npz.*missing"):
    shelf.load(path, sha)


def test_old_ones_are_forgotten(tmp_path):
  shelf.forget_before(tmp_path, 3)
  for step in (2, 3, 12):
    shelf.save(shelf.path_of(tmp_path, step), make_rollouts(), LEDGER)
  shelf.forget_before(tmp_path, 3)
  assert sorted(p.name for p in (tmp_path / "ahead").iterdir()) == ["rollouts-00000003.npz", "rollouts-00000012.npz"]
