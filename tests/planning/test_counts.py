"""FLOPs against every matmul of the traced programs, and against XLA's own count where no loop hides any."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from hbpo_jax.config import LearnerConfig, LossConfig, ModelConfig
from hbpo_jax.models import decoder, slots
from hbpo_jax.planning import counts, decoding
from hbpo_jax.planning.counts import Cost
from hbpo_jax.rollout import sampler, sampling
from tests.planning.tiny_jobs import N_PREFIX, make_cfg, make_job
from tests.rollout import tiny


def matmul_flops(jaxpr, turns=1):
  """2 m k n of every product in a traced program, in every turn of its loops; `turns` of a while loop."""
  total = 0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      depth = math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * depth
    times = eqn.params["length"] if name == "scan" else turns if name == "while" else 1
    for value in jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        total += times * matmul_flops(inner, turns)
  return total


def traced(function, *arguments):
  return matmul_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


@pytest.mark.parametrize("micro", [0, 16])
def test_scoring(micro):
  job = make_job(make_cfg(learner=LearnerConfig(minibatches=2, microbatch_rows=micro, logprob_chunk=32)))
  counted = counts.learn(job, job.n_rows, backward=False).flops
  batch = job.batch(job.n_rows, scored=False)
  chunked = traced(job.learner._score_traced, job.state.params, batch, 1.0)
  # A chunk's last rows are padding.
  assert counted == pytest.approx(chunked, rel=0.02) and counted <= chunked


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_an_update(remat):
  cfg = make_cfg(model=ModelConfig(compute_dtype="float32", remat=remat))
  job = make_job(cfg, arch=dataclasses.replace(tiny.ARCH, n_layers=3))
  rows = job.n_rows // 2
  program = job.learner._update.trace(job.state, job.batch(rows, scored=True), 1.0).jaxpr.jaxpr
  assert counts.learn(job, rows, backward=True).flops == pytest.approx(matmul_flops(program), rel=1e-9)


def test_prefill():
  job = make_job()
  plan, G, F = job.plan, len(N_PREFIX), max(N_PREFIX)
  b, P = plan.prefill_queries, job.shape.n_prompt_slots
  of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  program = traced(
      lambda *a: slots.prefill(*a, arch=job.arch, layout=job.layout), job.sampler, job.pool(), of(b, P), of(b), of(b),
      of(G, F), of(G), jnp.float32(1))
  assert counts.prefill(job).flops == pytest.approx(program * (job.shape.n_queries // b), rel=1e-9)


def test_a_segment_of_decoding():
  job = make_job()
  rows, steps = job.plan.row_buckets[0], job.plan.segment_steps
  cache, hidden = job.live()
  columns = slots.n_columns(cache) + steps  # XLA's attention multiplies all of them.
  draws = sampling.make_sampling(1.0, 1.0, 0, (3,))
  program = jax.make_jaxpr(lambda *a: sampler.decode(*a, arch=job.arch, layout=job.layout, n_steps=steps))(
      job.sampler, job.pool(), sampler.Live(cache, hidden), jax.ShapeDtypeStruct((8, rows), jnp.int32), draws)
  one = decoding.Decoding(
      mean_tokens=0, truncated=0, n_tokens=0, n_segments=1, n_steps=steps, row_steps=rows * steps,
      column_steps=rows * steps * columns, utilisation=1)
  counted = counts.decode(job, one)
  assert counted.flops == pytest.approx(matmul_flops(program.jaxpr, turns=steps), rel=1e-2)
  weights = sum(x.size for x in jax.tree.leaves(job.sampler)) - job.arch.vocab_size * job.arch.hidden_size
  keys_and_values = rows * steps * columns * 2 * 2 * 2 * 8 * 4  # layers, k and v, heads, size, float32
  assert steps * weights * 4 + keys_and_values <= counted.hbm_bytes <= 2 * (steps * weights * 4 + keys_and_values)


def test_the_forward_pass_against_xla():
  arch = dataclasses.replace(
      tiny.ARCH, n_layers=1, hidden_size=256, mlp_size=512, n_heads=4, n_kv_heads=2, head_size=64)
  params = jax.eval_shape(lambda key: decoder.init(arch, key), jax.random.key(0))
  tokens = jax.ShapeDtypeStruct((4, 128), jnp.int32)
  compiled = jax.jit(lambda p, t: decoder.forward(p, arch, t, t, t, compute_dtype=jnp.float32)).lower(
      params, tokens).compile()
  assert counts.layers_flops(arch, 4 * 128, 4 * 128 * 128) == pytest.approx(compiled.cost_analysis()["flops"], rel=0.06)


def test_devices_share_the_work():
  one, eight = make_job(), make_job(n_devices=8)
  d = decoding.simulate(one, mean_tokens=None, mean_prompt=5)
  cost_1, cost_8 = counts.step(one, d), counts.step(eight, decoding.simulate(eight, mean_tokens=None, mean_prompt=5))
  assert list(cost_1) == ["publish", "prefill", "decode", "score", "update"]
  for name in ("prefill", "score", "update"):
    assert cost_8[name].flops == pytest.approx(cost_1[name].flops / 8)
  assert all(c.network_bytes == 0 for c in cost_1.values())
  params = sum(x.size for x in jax.tree.leaves(one.state.params))
  # Every weight is gathered by each of two updates forward and backward; every gradient is scattered once.
  assert cost_8["update"].network_bytes == pytest.approx(2 * (2 + 1) * params * 4 * 7 / 8)
  split = make_job(n_devices=8, fsdp=4, tensor=2)
  d = decoding.simulate(split, mean_tokens=None, mean_prompt=5)
  assert counts.step(split, d)["update"].flops == pytest.approx(cost_1["update"].flops / 8)
  assert counts.step(split, d)["decode"].network_bytes > 0


def test_the_reference_model_scores_too():
  job = make_job(make_cfg(loss=LossConfig(kl_coef=0.1)))
  phases = counts.step(job, decoding.simulate(job, mean_tokens=None, mean_prompt=5))
  assert phases["reference"] == phases["score"] != Cost()
