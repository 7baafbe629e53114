"""Topologies: what is parsed, how many devices, and how well the worst chip is connected."""

import math

import pytest

from hbpo_jax.planning import chips


@pytest.mark.parametrize("text, n_chips, n_devices, links", [
    ("v5e:4x4", 16, 16, 2), ("v5e:1x1", 1, 1, 0), ("v5e:16x16", 256, 256, 4), ("v5e:8x16", 128, 128, 3),
    ("v6e:2x4", 8, 8, 2), ("v4:2x2x1", 4, 4, 2), ("v5p:2x2x2", 8, 8, 3), ("v5p:4x4x4", 64, 64, 6),
    ("v5p:4x4x2", 32, 32, 3), ("tpu7x:2x2x1", 4, 8, 2)])
def test_topologies(text, n_chips, n_devices, links):
  topology = chips.parse_topology(text)
  assert (topology.n_chips, topology.n_devices, topology.links) == (n_chips, n_devices, links)
  assert str(topology) == text


def test_a_device_of_a_chip_with_two_has_half_of_it():
  topology = chips.parse_topology("tpu7x:2x2x1")
  assert topology.flops_s == 2307e12 / 2 and topology.hbm_bytes_s == 7380e9 / 2
  assert topology.network_bytes_s == 2 * 100e9 / 2
  assert chips.parse_topology("v5e:1x1").network_bytes_s == math.inf


@pytest.mark.parametrize("text, words", [
    ("v7:2x2", "choose one of v4, v5e"), ("v5e", "has no shape; write chips along each side, such as v5e:2x2"),
    ("v5e:4", "has 1 sides, but a v5e has 2"), ("v5p:2x2", "has 2 sides, but a v5p has 3; write v5p:2x2x2"),
    ("v5e:0x4", "has no shape"), ("v5e:4x", "has no shape"), ("", "names no TPU that is known")])
def test_refusals_name_what_there_is(text, words):
  with pytest.raises(ValueError, match=words):
    chips.parse_topology(text)
