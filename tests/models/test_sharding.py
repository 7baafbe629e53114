"""Mesh sizes, their errors, and where each weight lies."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest

from hbpo_jax.config import MeshConfig
from hbpo_jax.models import decoder, parameters, presets, sharding, slots
from hbpo_jax.models.publish import Publisher
from tests.learning import tiny


def test_fsdp_takes_the_rest():
  assert dict(sharding.make_mesh(MeshConfig(data=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert dict(sharding.make_mesh(MeshConfig(), jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("cfg, message", [
    (MeshConfig(tensor=3), r"mesh\.tensor=3 does not divide the 8 devices"),
    (MeshConfig(data=2, fsdp=2, tensor=1), r"= 4 devices, but there are 8; set mesh\.fsdp=-1"),
    (MeshConfig(data=0), r"mesh\.data=0"),
    (MeshConfig(data=-1), r"mesh\.data=-1"),
    (MeshConfig(fsdp=-2), r"mesh\.fsdp=-2"),
])
def test_impossible_meshes_are_refused(cfg, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(cfg)


def test_params_and_shardings_have_one_structure_and_split_as_the_table_says():
  arch = presets.preset("tiny_qwen2")
  mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
  shardings = sharding.param_shardings(arch, mesh)
  shapes = jax.eval_shape(lambda: decoder.init(arch, jax.random.key(0)))
  assert jax.tree.structure(shardings) == jax.tree.structure(shapes)
  assert {row.path: row.shape for row in parameters.table(arch)}[("layers", "query")] == shapes["layers"]["query"].shape
  assert shardings["layers"]["query"].spec == P(None, "tensor", None, "fsdp")
  assert shardings["layers"]["down"].spec == P(None, "fsdp", "tensor")
  assert shardings["embed"].spec == P("tensor", "fsdp")


def test_an_axis_that_does_not_divide_stays_whole():
  arch = presets.preset("tiny_qwen2")  # 2 key/value heads
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=4))
  specs = jax.tree.map(lambda s: s.spec, sharding.param_shardings(arch, mesh))
  assert specs["layers"]["key"] == P(None, None, None, "fsdp")
  assert specs["layers"]["query"] == P(None, "tensor", None, "fsdp")


@pytest.mark.parametrize("name, millions", [
    ("r1_distill_qwen_1p5b", 1777), ("qwen2p5_0p5b", 494), ("qwen3_0p6b", 596), ("qwen3_4b", 4022),
    ("llama3p2_1b", 1236), ("llama3p2_3b", 3213)])
def test_presets_have_their_published_number_of_parameters(name, millions):
  assert round(parameters.count(presets.preset(name)) / 1e6) == millions


def test_rollouts_may_be_split_otherwise_than_updates():
  devices = jax.devices()[:4]
  mesh = sharding.make_mesh(MeshConfig(), devices)
  assert sharding.make_rollout_mesh(MeshConfig(), mesh, devices) is mesh
  split = sharding.make_rollout_mesh(MeshConfig(rollout_tensor=2), mesh, devices)
  assert dict(split.shape) == {"data": 1, "fsdp": 2, "tensor": 2}
  assert list(split.devices.flat) == list(mesh.devices.flat)
  apart = sharding.make_rollout_mesh(MeshConfig(rollout_devices=2), mesh, devices)
  assert list(apart.devices.flat) == devices[2:]
  with pytest.raises(ValueError, match="mesh.rollout_tensor=3 does not divide the 4 devices"):
    sharding.make_rollout_mesh(MeshConfig(rollout_tensor=3), mesh, devices)


@pytest.mark.parametrize("unrolled", [True, False])
@pytest.mark.parametrize("cfg", [MeshConfig(rollout_tensor=2), MeshConfig(rollout_devices=2)])
def test_weights_reach_the_mesh_of_the_rollouts(cfg, unrolled):
  arch, devices = tiny.ARCH, jax.devices()[:4]
  mesh = sharding.make_mesh(cfg, devices[:4 - cfg.rollout_devices])
  target = sharding.make_rollout_mesh(cfg, mesh, devices)
  layout = slots.Layout(unrolled=unrolled, prefill_kernel="xla", decode_kernel="xla", dtype=jnp.dtype("float32"))
  params = decoder.init(arch, jax.random.key(0))
  published = Publisher(arch, target, layout, gather=True)(sharding.put(params, sharding.param_shardings(arch, mesh)))
  expected = decoder.unroll(params, arch) if unrolled else params
  assert all(x.sharding.mesh == target for x in jax.tree.leaves(published))
  tiny.assert_trees_equal(published, expected)
