"""transformers' `generate` on PyTorch."""

import numpy as np
import torch
import transformers

from contenders import common
from contenders.common import Case, Model, Output, Prepared


class Stop(transformers.LogitsProcessor):
  """Forces each row's EOS, and keeps the log-probabilities of what was chosen.

  A log-probability is taken when its token is known, at the next call. This is cheaper than `output_scores` with
  `compute_transition_scores`, which keeps [R, V] scores of every step.
  """

  def __init__(self, lengths: list[int], n_prompt: int, eos: int):
    # Columns of input_ids when the n-th new token is due.
    self._stop_at_R = torch.tensor(lengths)[:, None] + (n_prompt - 1)
    self._n_prompt, self._eos = n_prompt, eos
    self._scores: torch.Tensor | None = None
    self._logps: list[torch.Tensor] = []

  def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
    """scores [R, V] with the EOS certain or impossible."""
    self._take(input_ids)
    stops = self._stop_at_R == input_ids.shape[1]
    eos = torch.where(stops, 0.0, -torch.inf)
    scores = scores.masked_fill(stops, -torch.inf)
    scores[:, self._eos] = eos[:, 0]
    self._scores = scores
    return scores

  def _take(self, ids: torch.Tensor) -> None:
    if self._scores is not None:
      chosen = self._scores.gather(1, ids[:, -1:])[:, 0]
      self._logps.append(chosen - self._scores.logsumexp(-1))

  def logps(self, sequences: torch.Tensor) -> np.ndarray:
    """float32 [R, new tokens] of the finished sequences."""
    self._take(sequences)
    return torch.stack(self._logps, dim=1).numpy()


def build_model(model: Model) -> transformers.Qwen2ForCausalLM:
  """The network with the common weights."""
  config = transformers.Qwen2Config(
      vocab_size=model.vocabulary, hidden_size=model.hidden, intermediate_size=model.mlp,
      num_hidden_layers=model.layers, num_attention_heads=model.heads, num_key_value_heads=model.kv_heads,
      head_dim=model.head_size, rms_norm_eps=model.rms_eps, tie_word_embeddings=False, max_position_embeddings=4096,
      rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta}, use_sliding_window=False)
  with torch.device("meta"):
    net = transformers.Qwen2ForCausalLM(config)
  net = net.to_empty(device="cpu")
  table = {name: torch.from_numpy(value) for name, value in common.weights(model).items()}
  net.load_state_dict(table, strict=True)
  # The rotary frequencies are no part of the state dict.
  net.model.rotary_emb = type(net.model.rotary_emb)(config)
  return net.eval()


def prepare(model: Model, case: Case) -> Prepared:
  """The faster cache, in batches of `slots` rows or of all rows."""
  net = build_model(model)
  sizes = dict.fromkeys((case.slots, len(case.rows)))
  candidates = {
      f"{cache} cache, batch {n}": lambda cache=cache, n=n: _prepare(net, case, cache, n)
      for cache in ("dynamic", "static") for n in sizes}
  return common.fastest(candidates, case, model.seed)


def _prepare(net: transformers.Qwen2ForCausalLM, case: Case, cache: str, batch: int) -> Prepared:
  prompts = torch.tensor([prompt for prompt, _ in case.rows])
  lengths = [n for _, n in case.rows]

  def sample(start, lengths, seed):
    torch.manual_seed(seed)
    stop = Stop(lengths, case.n_prompt, case.eos)
    # As `cache_implementation="static"`, which cannot be told the room.
    options = {"past_key_values": transformers.StaticCache(net.config, case.room)} if cache == "static" else {}
    ids = prompts[start:start + batch]
    sequences = net.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=case.cap, do_sample=True, temperature=1.0, top_k=0,
        top_p=1.0, eos_token_id=case.eos, pad_token_id=case.pad, logits_processor=[stop], use_cache=True, **options)
    return sequences, stop.logps(sequences)

  def run(seed):
    tokens, logps, slot_steps = [], [], 0
    for start in range(0, len(lengths), batch):
      mine = lengths[start:start + batch]
      sequences, logp = sample(start, mine, seed * len(lengths) + start)
      new = sequences[:, case.n_prompt:].numpy()
      found = (np.cumsum(new == case.eos, axis=1) == 0).sum(axis=1)  # before the first EOS
      tokens += [row[:n] for row, n in zip(new, found)]
      logps += [row[:n] for row, n in zip(logp, found)]
      slot_steps += new.size
    return Output(tokens, logps, slot_steps)

  with torch.inference_mode():
    sample(0, [2] * batch, 0)

  def inferring(seed):
    with torch.inference_mode():
      return run(seed)

  return Prepared(inferring, {"cache": cache, "batch": batch, "attention": net.config._attn_implementation})


def score(model: Model, prompt: list[int]) -> float:
  """See common.serve."""
  with torch.inference_mode():
    return common.mean_logp(build_model(model)(torch.tensor([prompt])).logits[0].numpy(), prompt)


if __name__ == "__main__":
  torch.set_num_threads(common.threads())
  common.serve(prepare, score, ("transformers", "torch"))
