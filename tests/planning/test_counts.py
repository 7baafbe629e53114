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


def matmul_flops(jaxpr, turns=(1,)):
  """2 m k n of every product in a traced program, in every turn of its loops; `turns` of nested while loops."""
  total = 0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      depth = math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * depth
    times = eqn.params["length"] if name == "scan" else turns[0] if name == "while" else 1
    for value in jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        total += times * matmul_flops(inner, (turns[1:] or (1,)) if name == "while" else turns)
  return total


def loops(job, n_micro):
  """Turns of the loops over micro-batches and, in each, over chunks of tokens, if every token carries loss."""
  local, chunk = job.micro_rows * job.n_targets, job.cfg.learner.logprob_chunk
  return n_micro, math.ceil(local / min(chunk, local))


def traced(function, *arguments):
  return matmul_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("micro", [0, 16])
def test_scoring(micro, pack):
  job = make_job(make_cfg(learner=LearnerConfig(
      minibatches=2, microbatch_rows=micro, logprob_chunk=32, pack=pack)))
  n_micro = 2 * job.most_micro_batches
  assert (n_micro, job.micro_rows) == {(0, False): (2, 32), (0, True): (32, 2)}.get((micro, pack), (4, 16))
  counted = counts.learn(job, n_micro, backward=False).flops
  batch = job.batch(2 * job.minibatch_rows, scored=False)
  program = jax.make_jaxpr(job.learner._score_traced)(job.state.params, batch, 1.0, None).jaxpr
  chunked = matmul_flops(program, loops(job, n_micro))
  # A chunk's last rows are padding.
  assert counted == pytest.approx(chunked, rel=0.05) and counted <= chunked


@pytest.mark.parametrize("remat", ["none", "dots", "full", "offload"])
def test_an_update(remat):
  cfg = make_cfg(model=ModelConfig(compute_dtype="float32", remat=remat))
  job = make_job(cfg, arch=dataclasses.replace(tiny.ARCH, n_layers=3))
  program = job.learner._update.trace(job.state, job.batch(job.minibatch_rows, scored=True), 1.0, None, 0.0).jaxpr.jaxpr
  counted = counts.learn(job, 3, backward=True).flops
  assert counted == pytest.approx(matmul_flops(program, loops(job, 3)), rel=1e-9)


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
  assert counted.flops == pytest.approx(matmul_flops(program.jaxpr, turns=(steps,)), rel=1e-2)
  # What each kind of work reads and writes, by doubling one after the other.
  more = lambda **fields: counts.decode(job, dataclasses.replace(one, **fields)).hbm_bytes - counted.hbm_bytes
  weights = sum(x.size for x in jax.tree.leaves(job.sampler)) - job.arch.vocab_size * job.arch.hidden_size
  token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, size, float32
  assert more(n_steps=2 * steps) == pytest.approx(steps * weights * 4)
  assert more(column_steps=2 * one.column_steps) == pytest.approx(one.column_steps * token)
  assert more(n_segments=2) == pytest.approx(rows * 14 * token * 3), "the contexts of 10 + 3 columns, in whole segments"


def test_an_updates_traffic():
  job = make_job()
  counted = lambda n, **fields: counts.learn(dataclasses.replace(job, **fields), n, backward=True).hbm_bytes
  params = sum(x.size for x in jax.tree.leaves(job.state.params))
  fixed = 2 * counted(1) - counted(2)
  # The optimizer's, once for each of two updates: float32 weights and moments read and written, and the gradient.
  assert fixed == pytest.approx(2 * params * 28, rel=1e-4)
  rows, T, H, L = job.micro_rows, job.n_columns, 4, 2
  scores = counted(2) - counted(1)
  assert scores > L * H * rows * T * T * (2 * counts.SCORE_BYTES[0] + counts.SCORE_BYTES[1])
  assert scores > 4 * params * 4 + counts.ACCUMULATE_BYTES * params, "weights twice written and read, and gradients"


def test_the_forward_pass_against_xla():
  arch = dataclasses.replace(
      tiny.ARCH, n_layers=1, hidden_size=256, mlp_size=512, n_heads=4, n_kv_heads=2, head_size=64)
  params = jax.eval_shape(lambda key: decoder.init(arch, key), jax.random.key(0))
  tokens = jax.ShapeDtypeStruct((4, 128), jnp.int32)
  compiled = jax.jit(lambda p, t: decoder.forward(p, arch, t, t, t, compute_dtype=jnp.float32)).lower(
      params, tokens).compile()
  assert counts.layers_flops(arch, 4 * 128, 4 * 128 * 128) == pytest.approx(compiled.cost_analysis()["flops"], rel=0.06)


def test_devices_share_the_work():
  cfg = make_cfg(learner=LearnerConfig(minibatches=2, microbatch_rows=0, pack=False))
  one, eight = make_job(cfg), make_job(cfg, n_devices=8)
  d = decoding.simulate(one, mean_tokens=None, mean_prompt=5)
  d_8 = decoding.simulate(eight, mean_tokens=None, mean_prompt=5)
  cost_1, cost_8 = counts.step(one, d), counts.step(eight, d_8)
  assert list(cost_1) == ["publish", "prefill", "decode", "score", "update"]
  for name in ("prefill", "score", "update"):
    assert cost_8[name].flops == pytest.approx(cost_1[name].flops / 8)
  assert all(c.network_bytes == 0 for c in cost_1.values())
  params = sum(x.size for x in jax.tree.leaves(one.state.params))
  # Every weight is gathered by each of two updates forward and backward; every gradient is scattered once.
  assert cost_8["update"].network_bytes == pytest.approx(2 * (2 + 1) * params * 4 * 7 / 8)
  split = make_job(cfg, n_devices=8, fsdp=4, tensor=2)
  d = decoding.simulate(split, mean_tokens=None, mean_prompt=5)
  assert counts.step(split, d)["update"].flops == pytest.approx(cost_1["update"].flops / 8)
  assert counts.step(split, d)["decode"].network_bytes > 0


def test_the_reference_model_scores_too():
  job = make_job(make_cfg(loss=LossConfig(kl_coef=0.1)))
  phases = counts.step(job, decoding.simulate(job, mean_tokens=None, mean_prompt=5))
  assert phases["reference"] == phases["score"] != Cost()
