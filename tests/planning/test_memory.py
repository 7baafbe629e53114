"""Sizes against arrays that really lie on devices."""

import dataclasses

import jax
import numpy as np
import pytest

from hbpo_jax.config import LossConfig, ModelConfig, RolloutConfig
from hbpo_jax.planning import memory
from hbpo_jax.rollout import engine, sampling
from tests.planning.tiny_jobs import make_cfg, make_job
from tests.rollout import tiny


def on_first_device(tree):
  """Bytes of the shards that lie on device 0."""
  first = jax.devices()[0]
  return sum(
      shard.data.nbytes for x in jax.tree.leaves(tree) for shard in x.addressable_shards if shard.device == first)


@pytest.fixture(params=[dict(), dict(fsdp=2, data=2, tensor=2)], ids=["fsdp 8", "2 x 2 x 2"])
def job(request):
  return make_job(n_devices=8, **request.param)


def test_what_stays_is_what_learner_and_engine_hold(job):
  params = tiny.make_params(job.mesh)
  state = job.learner.new_state(params)
  made = engine.Engine(
      job.arch, job.mesh, job.shape, sampling.make_sampling(1.0, 1.0, 0, (3,)), compute_dtype="float32",
      cfg=job.cfg.rollout)
  programs = made.warm_up()
  live = programs.new_live[job.plan.row_buckets[0]]()
  kept = memory.resident(job)
  assert kept.params == on_first_device(state.params)
  assert kept.optimizer == on_first_device(state.opt_state)
  assert kept.sampler == on_first_device(made.publish(state.params))
  assert kept.pool == on_first_device(programs.new_pool())
  assert kept.cache == on_first_device((live.cache, live.hidden_RD))
  batch = job.batch(2 * job.minibatch_rows, scored=True)
  rows = job.learner.place(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch))
  assert kept.batch == 2 * on_first_device(rows)
  assert kept.reference == 0


def test_bfloat16_weights_and_a_reference():
  plain = memory.resident(make_job(n_devices=8))
  cfg = make_cfg(model=ModelConfig(compute_dtype="bfloat16", param_dtype="bfloat16"), loss=LossConfig(kl_coef=0.1))
  kept = memory.resident(make_job(cfg, n_devices=8))
  assert kept.params == plain.params // 2 == kept.reference
  mixed = make_cfg(model=ModelConfig(compute_dtype="bfloat16"), loss=LossConfig(kl_coef=0.1))
  assert memory.resident(make_job(mixed, n_devices=8)).reference == plain.params // 2
  assert kept.optimizer == plain.optimizer, "moments are float32 whatever the weights are"
  assert kept.cache == plain.cache // 2


def test_weights_that_stay_split_need_no_copy():
  rollout = dataclasses.replace(make_cfg().rollout, gather_weights=False, layers="stacked")
  cfg = make_cfg(rollout=rollout)
  assert memory.resident(make_job(cfg, n_devices=8)).sampler == 0
  whole = make_cfg(rollout=dataclasses.replace(rollout, gather_weights=True))
  kept = memory.resident(make_job(whole, n_devices=8))
  assert kept.sampler == 4 * sum(x.size for x in jax.tree.leaves(make_job(whole).state.params))


def test_what_lies_beside_each_program():
  kept = memory.Resident(params=1, optimizer=2, sampler=4, pool=8, cache=16, batch=32, reference=64)
  assert {name: kept.beside(name) for name in memory.PHASE_OF} == {
      "publish": 3, "prefill": 15, "decode": 31, "score": 35, "reference": 99, "update": 35}


@pytest.mark.parametrize("program, change", [
    ("decode", dict(rollout=dataclasses.replace(make_cfg().rollout, slots=32))),
    ("prefill", dict(data=dataclasses.replace(make_cfg().data, max_prompt_tokens=20))),
    ("update", dict(learner=dataclasses.replace(make_cfg().learner, microbatch_rows=16))),
    ("update", dict(model=ModelConfig(compute_dtype="float32", remat="none")))])
def test_temporaries_grow_with_their_causes(program, change):
  assert memory.temporaries(make_job(make_cfg(**change)))[program] > memory.temporaries(make_job())[program]


def test_each_layer_keeps_its_input_for_the_backward_pass():
  two, four = (make_job(arch=dataclasses.replace(tiny.ARCH, n_layers=n)) for n in (2, 4))
  more = memory.temporaries(four)["update"] - memory.temporaries(two)["update"]
  weights = memory.resident(four).params - memory.resident(two).params
  assert more == 2 * two.micro_rows * two.n_columns * tiny.ARCH.hidden_size * 4 + 2 * weights


def test_arguments_are_those_of_the_compiled_programs():
  job = make_job(n_devices=8)
  batch = job.batch(job.minibatch_rows, scored=True)
  with jax.set_mesh(job.mesh):
    compiled = job.learner._update.lower(job.state, batch, 1.0, None, 0.0).compile()
  # The temperature and the step's counters.
  assert 0 <= compiled.memory_analysis().argument_size_in_bytes - memory.arguments(job, "update") <= 64


def test_rollout_config_is_read():
  assert RolloutConfig().gather_weights, "the sizes above assume the default"
