"""Training adapters beside a frozen base: the same scores to begin with, only adapters move, whole exports."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from hbpo_jax import assemble, train
from hbpo_jax.config import LoraConfig
from hbpo_jax.learning.learner import policy_loss
from hbpo_jax.models import lora, weights
from tests.learning import tiny
from tests.system import runs

LORA = LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"))


def learners(n_devices=1, mesh_sizes=None, **changes):
  make = lambda **more: tiny.make_learner(n_devices, mesh_sizes=mesh_sizes, **changes, **more)
  return make(), make(lora=LORA)


@pytest.mark.parametrize("n_devices, mesh_sizes", [(1, None), (4, {"tensor": 2})])
def test_new_adapters_change_nothing_and_trained_ones_are_what_whole_gives(n_devices, mesh_sizes):
  plain, adapted = learners(n_devices, mesh_sizes)
  params, batch = tiny.make_params(plain), tiny.make_batch()
  before = tiny.host(params)
  state = adapted.new_state(params)
  assert set(state.params) == {"query", "value", "down"}
  np.testing.assert_array_equal(adapted.score(state.params, batch), plain.score(params, batch))

  batch = tiny.with_own_logps(plain, params, batch)
  for _ in range(3):
    state, metrics = adapted.update(state, batch)
  assert float(metrics["grad_norm"]) > 0 and int(state.update) == 3
  assert all(np.abs(np.asarray(x)).max() > 0 for x in jax.tree.leaves(state.params))
  tiny.assert_trees_equal(adapted._base, before)
  whole = adapted.whole(state.params)
  moved = np.asarray(plain.score(whole, batch))
  np.testing.assert_allclose(adapted.score(state.params, batch), moved, atol=2e-5)
  assert np.abs(moved - np.asarray(plain.score(params, batch))).max() > 1e-3


def test_the_gradient_is_that_of_the_merged_weights():
  plain, adapted = learners()
  params = tiny.make_params(plain)
  state = adapted.new_state(params)
  noise = lambda x, key: x + 0.1 * jax.random.normal(key, x.shape)
  adapters = jax.tree.map(noise, state.params, jax.tree.unflatten(
      jax.tree.structure(state.params), list(jax.random.split(jax.random.key(1), len(jax.tree.leaves(state.params))))))
  batch = tiny.with_own_logps(plain, params, tiny.make_batch())
  n_tokens = jnp.sum(batch.completion_mask_RC, dtype=jnp.float32)
  loss = lambda join, adapters: policy_loss(
      join(params, adapters, lora.scale(LORA)), batch, n_tokens, 1.0, arch=tiny.ARCH, cfg=plain.cfg)[0]
  gradients = [jax.jit(jax.grad(lambda a, join=join: loss(join, a)))(adapters) for join in (lora.attach, lora.merge)]
  tiny.assert_trees_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_whole_run(tmp_path, monkeypatch):
  """Export, adapter and checkpoint hold the same network; only adapters were saved, and a resume repeats the run."""
  runs.make_inputs(tmp_path)
  monkeypatch.setattr(jax, "devices", lambda *a, devices=jax.devices()[:1]: devices)
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  settings = runs.settings(tmp_path, steps=3, lora__rank=4, optimizer__learning_rate=1e-2, loss__kl_coef=0.1,
                           learner__minibatches=1)
  train.main(runs.make_config(settings | {"steps": 2}), str(tmp_path / "run"))
  train.main(runs.make_config(settings), str(tmp_path / "run"))
  train.main(runs.make_config(settings), str(tmp_path / "whole"))
  expected, got = runs.exported(tmp_path / "whole"), runs.exported(tmp_path / "run")
  for name in expected:
    np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
  rows = runs.rows(tmp_path / "whole" / "metrics.jsonl")
  assert rows[0]["update/kl_ref"] < 1e-4 < rows[2]["update/kl_ref"]
  assert all(row["sampler/sampler_gap_max"] < 1e-4 for row in rows)

  base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
  adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
  merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export", dtype=torch.float32)
  tokens = torch.arange(3, 20)[None]
  with torch.no_grad():
    torch.testing.assert_close(adapted(tokens).logits, merged(tokens).logits, atol=1e-4, rtol=1e-4)
    with adapted.disable_adapter():
      assert (adapted(tokens).logits - merged(tokens).logits).abs().max() > 1e-2

  cfg = runs.make_config(settings | {"model.path": str(tmp_path / "run" / "checkpoints" / "3"),
                                     "eval.benchmarks": ("synthetic",)})
  model = assemble.open_for_evaluation(cfg)
  from_export = weights.load(tmp_path / "run" / "export", model.arch, model.mesh, param_dtype="float32")
  tiny.assert_trees_close(assemble.load_params(cfg, model), from_export, rtol=0, atol=0)
