"""Jobs of a tiny network on the CPU's simulated devices."""

import jax

from hbpo_jax.config import Config, DataConfig, LearnerConfig, MeshConfig, ModelConfig, RewardConfig, RolloutConfig
from hbpo_jax.models import sharding
from hbpo_jax.planning.chips import parse_topology
from hbpo_jax.planning.job import Job
from hbpo_jax.rollout.shape import Shape, make_layout, make_plan
from tests.rollout import tiny

N_PREFIX = (2, 3)


def make_cfg(**sections):
  """B 8, G 2, J 4: 64 rows of 10 + 14 columns."""
  settings = dict(
      model=ModelConfig(compute_dtype="float32"), data=DataConfig(max_prompt_tokens=10),
      rollout=RolloutConfig(
          queries=8, rollouts_per_query=8, budgets=(6, 12), caps=(8, 14), slots=16, segment_steps=2,
          length_buckets=(14,)),
      reward=RewardConfig(max_response_tokens=14), learner=LearnerConfig(minibatches=2, logprob_chunk=1024))
  return Config(**(settings | sections))


def make_job(cfg=None, arch=tiny.ARCH, n_devices=1, **mesh_sizes):
  """A Job whose mesh is of CPU devices, so that its engine and its learner really run."""
  cfg = cfg or make_cfg()
  mesh = sharding.make_mesh(MeshConfig(**mesh_sizes), jax.devices()[:n_devices])
  shape = Shape(
      n_queries=cfg.rollout.queries, n_prompt_slots=cfg.data.max_prompt_tokens, n_rollouts=cfg.rollouts_per_budget,
      caps=cfg.caps, n_prefix=N_PREFIX, count_prefix=True, prefix_has_loss=True)
  layout = make_layout(cfg.rollout, mesh, cfg.model.compute_dtype)
  plan = make_plan(shape, mesh.size // mesh.shape["tensor"], cfg.rollout, layout)
  return Job(cfg, arch, parse_topology(f"v5e:1x{n_devices}"), mesh, N_PREFIX, layout, shape, plan)
