"""hbpo_jax's engine."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from contenders import common
from contenders.common import Case, Model, Output, Prepared
from hbpo_jax.config import MeshConfig, RolloutConfig
from hbpo_jax.models import decoder, parameters, sharding
from hbpo_jax.models.architecture import Architecture
from hbpo_jax.rollout import engine, sampling
from hbpo_jax.structs import Prompts, Rollouts


def architecture(model: Model) -> Architecture:
  """The Architecture of a benchmark's model."""
  return Architecture(
      family="qwen2", n_layers=model.layers, hidden_size=model.hidden, mlp_size=model.mlp, n_heads=model.heads,
      n_kv_heads=model.kv_heads, head_size=model.head_size, vocab_size=model.vocabulary, rope_theta=model.rope_theta,
      rope_scaling=None, rms_eps=model.rms_eps, tie_embeddings=False, qkv_bias=True, qk_norm=False, max_context=4096)


def build_params(model: Model) -> dict:
  """The common weights as params."""
  table = common.weights(model)

  def value(row):
    layers = range(model.layers) if row.stacked else [0]
    return jnp.asarray(np.stack([table.pop(row.hf_name.format(layer=i)) for i in layers]).reshape(row.shape))

  params = parameters.nest({row.path: value(row) for row in parameters.table(architecture(model))})
  if table:
    raise ValueError(f"weights without a place: {sorted(table)}")
  return params


def make_engine(model: Model, case: Case, cfg: RolloutConfig) -> engine.Engine:
  """The engine of one subgroup without a budget sentence."""
  shape = engine.Shape(
      n_queries=len(case.prompts), n_prompt_slots=case.n_prompt, n_rollouts=len(case.lengths[0]),
      caps=(response_room(case),), n_prefix=(0,), count_prefix=True, prefix_has_loss=True)
  # `stop_BGJ` ends the rollouts; the EOS is an id that is never drawn.
  drawn = sampling.make_sampling(1.0, 1.0, 0, (model.vocabulary,))
  return engine.Engine(
      architecture(model), sharding.make_mesh(MeshConfig()), shape, drawn, compute_dtype="float32", cfg=cfg)


def sample(eng: engine.Engine, params: Any, prompts: Prompts, key: jax.Array, case: Case) -> tuple[Rollouts, int]:
  """Rollouts on the host, and the slot-steps they took."""
  generation = eng.start(params, prompts, key, stop_BGJ=np.array(case.lengths, np.int32)[:, None, :])
  for _ in generation:
    pass
  return generation.rollouts, generation.ledger.slot_steps


def response_room(case: Case) -> int:
  """New tokens the cache has room for: the engine's cap."""
  return case.room - case.n_prompt


def make_prompts(case: Case) -> Prompts:
  """The prompts of the case, without prefixes."""
  B = len(case.prompts)
  return Prompts(
      tokens_BP=np.array(case.prompts, np.int32), n_prompt_B=np.full(B, case.n_prompt, np.int32),
      prefix_GF=np.zeros((1, 0), np.int32), n_prefix_G=np.zeros(1, np.int32), query_B=np.arange(B, dtype=np.int32))


def prepare(model: Model, case: Case) -> Prepared:
  """The compiled engine, with the slots of the case and otherwise its own defaults."""
  eng = make_engine(model, case, RolloutConfig(slots=case.slots))
  params = eng.publish(build_params(model))
  prompts = make_prompts(case)

  def run(seed):
    rollouts, slot_steps = sample(eng, params, prompts, jax.random.key(seed), case)
    n_R = rollouts.n_tokens_BGJ.reshape(-1)
    tokens = rollouts.tokens[0].reshape(len(n_R), -1)
    logps = rollouts.logp_sampler[0].reshape(len(n_R), -1)
    cut = lambda rows: [row[:n] for row, n in zip(rows, n_R)]
    return Output(cut(tokens), cut(logps), slot_steps)

  run(model.seed)
  return Prepared(run, {"cap": response_room(case), "plan": dataclasses.asdict(eng.plan)})


def score(model: Model, prompt: list[int]) -> float:
  """See common.serve."""
  arch, params = architecture(model), build_params(model)
  tokens = jnp.asarray([prompt])
  hidden = decoder.forward(
      params, arch, tokens, jnp.ones_like(tokens), jnp.arange(len(prompt))[None], compute_dtype=jnp.float32)
  return common.mean_logp(np.asarray(decoder.logits(params, arch, hidden)[0]), prompt)


if __name__ == "__main__":
  common.serve(prepare, score, ("jax", "jaxlib", "flax"), common.count_compiles())
