"""The vanilla sampler of google-tunix, with a Qwen2 that stops each row at its length."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from tunix.generate import sampler as sampler_lib
from tunix.models.qwen2 import model as qwen2

from contenders import common
from contenders.common import Case, Model, Output, Prepared


class StopAt(nnx.Variable):
  """int32 [R], the input position whose prediction is forced to be EOS.

  An input of the compiled programs and no constant of theirs, so that other lengths compile nothing.
  """


class StoppingQwen2(qwen2.Qwen2):
  """Qwen2 that, while it samples, predicts EOS with probability 1 at each row's position, and nowhere else."""

  def __init__(self, config: qwen2.ModelConfig, n_rows: int, eos: int, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    self.stop_at = StopAt(jnp.zeros(n_rows, jnp.int32))
    self.eos = eos

  def __call__(self, input_tokens, positions, cache, attention_mask=None, **kwargs):
    samples = cache is not None
    logits, cache = super().__call__(input_tokens, positions, cache, attention_mask, **kwargs)
    if not samples:  # An update: log-probabilities of -inf would make its loss nan.
      return logits, cache
    stops = (positions == self.stop_at[...][:, None])[..., None]
    is_eos = jnp.arange(logits.shape[-1]) == self.eos
    return jnp.where(is_eos != stops, -jnp.inf, logits), cache


class Tokenizer:
  """Texts are decimal numbers of prompts. Reading and writing text is no part of the comparison."""

  def __init__(self, case: Case):
    self._prompts, self._eos, self._pad = case.prompts, case.eos, case.pad

  def encode(self, text: str) -> list[int]:
    """The prompt of that number."""
    return list(self._prompts[int(text)])

  def decode(self, ids: list[int]) -> str:
    """Nothing."""
    del ids
    return ""

  def bos_id(self) -> int:
    """0, which Tunix takes for none."""
    return 0

  def eos_id(self) -> int:
    """The EOS."""
    return self._eos

  def pad_id(self) -> int:
    """An id that no prompt holds."""
    return self._pad


def build_model(model: Model, n_rows: int, eos: int) -> StoppingQwen2:
  """The network with the common weights; the MLPs would otherwise be zeros."""
  config = qwen2.ModelConfig(
      num_layers=model.layers, vocab_size=model.vocabulary, embed_dim=model.hidden, hidden_dim=model.mlp,
      num_heads=model.heads, head_dim=model.head_size, num_kv_heads=model.kv_heads, rope_theta=model.rope_theta,
      norm_eps=model.rms_eps, use_tied_embedding=False, dtype=jnp.float32, param_dtype=jnp.float32)
  net = StoppingQwen2(config, n_rows, eos, rngs=nnx.Rngs(0))
  table = common.weights(model)

  def fill(variable, name):
    value = table.pop(name)
    value = value.T if value.ndim == 2 and name != "model.embed_tokens.weight" else value
    variable[...] = jnp.asarray(value.reshape(variable[...].shape))

  fill(net.embedder.input_embedding, "model.embed_tokens.weight")
  fill(net.final_norm.w, "model.norm.weight")
  fill(net.lm_head.w, "lm_head.weight")
  for i, layer in enumerate(net.layers):
    at = f"model.layers.{i}."
    fill(layer.input_layernorm.w, at + "input_layernorm.weight")
    fill(layer.post_attention_layernorm.w, at + "post_attention_layernorm.weight")
    for name in "qkv":
      fill(getattr(layer.attn, f"{name}_proj").w, f"{at}self_attn.{name}_proj.weight")
      fill(getattr(layer.attn, f"{name}_bias"), f"{at}self_attn.{name}_proj.bias")
    fill(layer.attn.o_proj.w, at + "self_attn.o_proj.weight")
    for name in ("gate_proj", "up_proj", "down_proj"):
      fill(getattr(layer.mlp, name).kernel, f"{at}mlp.{name}.weight")
  if table:
    raise ValueError(f"weights without a place: {sorted(table)}")
  return net


def prepare(model: Model, case: Case) -> Prepared:
  """Batches of `slots` rows, or of all rows where that takes fewer CPU-seconds."""
  sizes = dict.fromkeys((case.slots, len(case.rows)))
  return common.fastest({f"batch {n}": lambda n=n: _prepare(model, case, n) for n in sizes}, case, model.seed)


def _prepare(model: Model, case: Case, batch: int) -> Prepared:
  net = build_model(model, batch, case.eos)
  sampler = sampler_lib.Sampler(net, Tokenizer(case), sampler_lib.CacheConfig(
      cache_size=case.room, num_layers=model.layers, num_kv_heads=model.kv_heads, head_dim=model.head_size))
  numbers = [str(b) for b, lengths in enumerate(case.lengths) for _ in lengths]
  lengths = [n for _, n in case.rows]

  def state(lengths):
    # Position P + n - 2 is fed to predict the n-th new token.
    net.stop_at[...] = jnp.asarray(lengths, jnp.int32) + (case.n_prompt - 2)
    # A copy: the variables of a state are the model's own, and would follow it to the next batch's lengths.
    return jax.tree.map(jnp.copy, nnx.variables(net))

  starts = range(0, len(lengths), batch)
  states = [state(lengths[i:i + batch]) for i in starts]

  def sample(state, prompts, seed):
    sampler.transformer_state = state
    return sampler(
        prompts, max_generation_steps=case.cap, max_prompt_length=case.n_prompt, echo=False, return_logprobs=True,
        temperature=1.0, top_p=1.0, seed=seed)

  def run(seed):
    tokens, logps, slot_steps = [], [], 0
    for i, state in zip(starts, states):
      output = sample(state, numbers[i:i + batch], seed * len(states) + i)
      tokens += output.tokens  # NumPy, without the EOS
      logps += [np.asarray(row) for row in output.logprobs]
      # The loop ends when every row is done. It has made the EOS too.
      slot_steps += batch * (max(map(len, output.tokens)) + 1)
    return Output(tokens, logps, slot_steps)

  # The first call compiles the programs of all lengths, the second what compares its arguments with the first's.
  for _ in range(2):
    sample(state([1] * batch), numbers[:batch], model.seed)
  return Prepared(run, {"batch": batch, "cache_size": sampler.cache_config.cache_size, "layout": _layout(sampler)})


def _layout(sampler: sampler_lib.Sampler) -> str:
  """Shape of a layer's keys as the sampler allocates them, to show that the cache has the room it was asked for."""
  net = sampler.transformer
  rows = net.stop_at[...].shape[0]
  state = sampler.init_sample_state(
      jnp.ones((rows, 1), jnp.int32), total_sampling_steps=2, include_logits=False, forbidden_token_ids=None,
      temperature=1.0, top_p=1.0, top_k=None, seed=jax.random.PRNGKey(0), beam_size=None, include_logprobs=True)
  return str(list(state.cache["layer_0"]["k"].shape))


def score(model: Model, prompt: list[int]) -> float:
  """See common.serve."""
  net = build_model(model, 1, eos=model.vocabulary)
  net.stop_at[...] = jnp.full(1, -1, jnp.int32)
  n = len(prompt)
  logits, _ = net(jnp.asarray([prompt]), jnp.arange(n)[None], None, jnp.tril(jnp.ones((1, n, n), bool)))
  return common.mean_logp(np.asarray(logits[0]), prompt)


if __name__ == "__main__":
  common.serve(prepare, score, ("google-tunix", "jax", "jaxlib", "flax"), common.count_compiles())
