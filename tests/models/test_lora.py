"""Low-rank adapters: against merged weights, against PEFT, on a mesh, and what is refused."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import peft
import pytest
import torch
import transformers

from hbpo_jax.config import LoraConfig, MeshConfig
from hbpo_jax.models import architecture, decoder, lora, parameters, presets, sharding, tensorfile, weights
from tests.checkpoints import make_checkpoint

CFG = LoraConfig(rank=4, alpha=8.0)
SCALE = lora.scale(CFG)
BATCH = (np.random.default_rng(0).integers(0, 512, (4, 12)).astype(np.int32), np.ones((4, 12), np.int32),
         np.tile(np.arange(12, dtype=np.int32), (4, 1)))


@functools.lru_cache
def make(preset="tiny_qwen2"):
  """(arch, params with biases and norms that are not at their initial value)."""
  arch = presets.preset(preset)
  params = jax.jit(decoder.init, static_argnums=0)(arch, jax.random.key(0))
  return arch, jax.tree.map(lambda w: w + 0.1 * np.random.default_rng(w.size).normal(size=w.shape), params)


def random_adapters(arch, cfg=CFG, seed=0):
  """Adapters that matter: b is random too."""
  rng = np.random.default_rng(seed)
  return parameters.nest({row.path: jnp.asarray(0.1 * rng.normal(size=row.shape), jnp.float32)
                          for row in lora.table(arch, cfg)})


@functools.partial(jax.jit, static_argnames=("arch", "dtype"))
def logits_of(params, arch, batch, dtype="float32"):
  hidden = decoder.forward(params, arch, *batch, compute_dtype=dtype)
  return decoder.logits(params, arch, hidden)


merge = jax.jit(lora.merge)
attach = jax.jit(lora.attach)


@functools.partial(jax.jit, static_argnames=("arch", "combine", "remat"))
def adapter_grads(adapters, params, arch, batch, combine=lora.attach, remat="none"):
  def loss(adapters):
    hidden = decoder.forward(combine(params, adapters, SCALE), arch, *batch, compute_dtype="float32", remat=remat)
    score = jax.nn.log_softmax(decoder.logits(params, arch, hidden[:, :-1]))
    return -jnp.take_along_axis(score, batch[0][:, 1:, None], axis=-1).mean()

  return jax.grad(loss)(adapters)


def test_new_adapters_change_nothing_and_a_is_drawn_as_peft_draws_it():
  arch, params = make()
  adapters = jax.jit(lora.init, static_argnums=(0, 1))(arch, CFG, jax.random.key(1))
  assert {(name, k): (v.shape, v.dtype) for name, ab in adapters.items() for k, v in ab.items()} == {
      row.path: (row.shape, jnp.float32) for row in lora.table(arch, CFG)}
  assert set(adapters) == {"query", "key", "value", "output", "gate", "up", "down"}
  for name, adapter in adapters.items():
    assert not adapter["b"].any(), name
    bound = np.prod(adapter["a"].shape[2:])**-0.5
    assert 0.9 * bound < np.abs(adapter["a"]).max() <= bound, name
    np.testing.assert_allclose(np.std(adapter["a"]), bound / 3**0.5, rtol=0.1, err_msg=name)
  assert len({np.asarray(adapter["a"]).flat[0] for adapter in adapters.values()}) == 7
  for dtype in ("float32", "bfloat16"):
    np.testing.assert_array_equal(
        logits_of(attach(params, adapters, SCALE), arch, BATCH, dtype), logits_of(params, arch, BATCH, dtype))
  jax.tree.map(np.testing.assert_array_equal, merge(params, adapters, SCALE), params)


def test_rank_zero_is_no_adapter():
  arch, params = make()
  assert lora.table(arch, LoraConfig()) == () and lora.init(arch, LoraConfig(), jax.random.key(0)) == {}
  assert jax.tree.structure(lora.attach(params, {}, 1.0)) == jax.tree.structure(params)


@pytest.mark.parametrize("targets", [LoraConfig().targets, ("q_proj", "down_proj"), ("o_proj",)], ids=len)
def test_attached_equals_merged(targets):
  arch, params = make("tiny_qwen3")
  adapters = random_adapters(arch, LoraConfig(rank=4, targets=targets))
  merged = merge(params, adapters, SCALE)
  changed = {name for name, w in merged["layers"].items() if (w != params["layers"][name]).any()}
  assert changed == set(adapters) and len(adapters) == len(targets)
  attached = logits_of(attach(params, adapters, SCALE), arch, BATCH)
  np.testing.assert_allclose(attached, logits_of(merged, arch, BATCH), atol=1e-5)
  assert np.abs(attached - logits_of(params, arch, BATCH)).max() > 0.1


def test_merge_is_the_product_in_float32_rounded_to_the_weights_dtype():
  arch, params = make()
  adapters = random_adapters(arch)
  rough = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
  merged = merge(rough, adapters, SCALE)
  for name, adapter in adapters.items():
    weight = np.asarray(rough["layers"][name], np.float64)
    layers = weight.shape[0]
    a = np.asarray(adapter["a"], np.float64).reshape(layers, CFG.rank, -1)
    b = np.asarray(adapter["b"], np.float64).reshape(layers, -1, CFG.rank)
    expected = weight + SCALE * (b @ a).reshape(weight.shape)
    assert merged["layers"][name].dtype == jnp.bfloat16
    # Half a unit in the last of bfloat16's 8 bits, and float32's error.
    np.testing.assert_allclose(
        np.asarray(merged["layers"][name], np.float64), expected, rtol=2**-8, atol=1e-6, err_msg=name)
  assert merged["embed"].dtype == jnp.bfloat16


def test_bfloat16_is_near_float32_and_casting_ahead_changes_nothing():
  arch, params = make()
  adapters = random_adapters(arch)
  exact = logits_of(attach(params, adapters, SCALE), arch, BATCH)
  rough = logits_of(attach(params, adapters, SCALE), arch, BATCH, "bfloat16")
  gap = np.abs(rough - exact).mean() / np.abs(exact).mean()
  assert 1e-3 < gap < 0.05
  cast = jax.tree.map(lambda w: w.astype(jnp.bfloat16), (params, adapters))
  assert attach(*cast, SCALE)["layers"]["query_lora_b"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(logits_of(attach(*cast, SCALE), arch, BATCH, "bfloat16"), rough)


@functools.lru_cache
def merged_grads():
  arch, params = make()
  return adapter_grads(random_adapters(arch), params, arch, BATCH, lora.merge)


@pytest.mark.parametrize("remat", decoder.REMAT)
def test_gradients_equal_those_through_the_merged_weights(remat):
  arch, params = make()
  found = adapter_grads(random_adapters(arch), params, arch, BATCH, remat=remat)
  assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(found))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, merged_grads())


def test_remat_dots_keeps_no_outputs_of_adapters_apart(capsys):
  arch, params = make()

  def total(adapters):
    attached = lora.attach(params, adapters, SCALE)
    return decoder.forward(attached, arch, *BATCH, compute_dtype="float32", remat="dots").sum()

  jax.ad_checkpoint.print_saved_residuals(total, random_adapters(arch))
  kept = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
  assert kept.count(f"f32[4,12,{arch.mlp_size}]") == 2 * arch.n_layers  # gate and up


def test_four_devices_give_the_values_and_gradients_of_one():
  arch, params = make()
  adapters = random_adapters(arch)
  expected = logits_of(attach(params, adapters, SCALE), arch, BATCH)
  expected_grads = adapter_grads(adapters, params, arch, BATCH)
  expected_merged = merge(params, adapters, SCALE)
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
  shardings = lora.shardings(arch, CFG, mesh)
  assert jax.tree.structure(shardings) == jax.tree.structure(adapters)
  assert shardings["query"]["a"].spec == P(None, None, "fsdp")
  assert shardings["query"]["b"].spec == P(None, "tensor")
  assert shardings["output"]["a"].spec == P(None, None, "tensor")
  assert shardings["output"]["b"].spec == P(None, "fsdp")
  params = sharding.put(params, sharding.param_shardings(arch, mesh))
  adapters = sharding.put(adapters, shardings)
  batch = jax.device_put(BATCH, sharding.batch_sharding(mesh, 2))
  with jax.set_mesh(mesh):
    np.testing.assert_allclose(logits_of(attach(params, adapters, SCALE), arch, batch), expected, atol=1e-5)
    merged = merge(params, adapters, SCALE)
    np.testing.assert_allclose(logits_of(merged, arch, batch), expected, atol=1e-5)
    found = adapter_grads(adapters, params, arch, batch, remat="full")
  assert jax.tree.map(lambda w: w.sharding, merged) == sharding.param_shardings(arch, mesh)
  check = lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5)
  jax.tree.map(check, merged, expected_merged)
  jax.tree.map(check, found, expected_grads)


def test_decoding_equals_forward_and_unrolling_refuses():
  arch, params = make()
  attached = attach(params, random_adapters(arch), SCALE)
  tokens, segment, position = BATCH
  full = decoder.forward(attached, arch, *BATCH, compute_dtype="float32")
  hidden, prompts = decoder.prefill(
      attached, arch, tokens[:, :-1], segment[:, :-1], position[:, :-1], compute_dtype="float32")
  np.testing.assert_allclose(hidden, full[:, -2], atol=1e-5)
  hidden, _ = decoder.decode_step(
      attached, arch, tokens[:, -1:], position[:, -1:], prompts, segment[:, :-1] == 1,
      decoder.new_cache(arch, 4, 1, 1, "float32"), np.int32(0), compute_dtype="float32")
  np.testing.assert_allclose(hidden[:, 0], full[:, -1], atol=1e-5)
  with pytest.raises(ValueError, match=r"hold down_lora_a, which unrolled layers cannot; use lora\.merge"):
    decoder.unroll(attached, arch)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_peft_reads_an_export_and_computes_the_same(family, tie, tmp_path):
  base = make_checkpoint(tmp_path / "base", family, tie=tie, tokenizer=False)
  arch = architecture.from_hf_config(base)
  params = weights.load(base, arch, sharding.make_mesh(MeshConfig(), jax.devices()[:1]), param_dtype="float32")
  adapters = random_adapters(arch)
  assert lora.export(adapters, arch, CFG, str(base), tmp_path / "adapter") == tmp_path / "adapter"
  model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
  assert model.active_peft_config.base_model_name_or_path == str(base)
  with torch.no_grad():
    theirs = model(torch.tensor(BATCH[0].astype(np.int64))).logits.numpy()
    merged = model.merge_and_unload()(torch.tensor(BATCH[0].astype(np.int64))).logits.numpy()
  assert np.abs(theirs - logits_of(params, arch, BATCH)).max() > 0.5
  np.testing.assert_allclose(logits_of(attach(params, adapters, SCALE), arch, BATCH), theirs, atol=1e-4, rtol=0)
  np.testing.assert_allclose(logits_of(merge(params, adapters, SCALE), arch, BATCH), merged, atol=1e-4, rtol=0)


def test_an_adapter_made_by_peft_is_read(tmp_path):
  base = make_checkpoint(tmp_path / "base", "qwen2", tokenizer=False)
  targets = ("q_proj", "o_proj", "up_proj")
  model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(
      r=3, lora_alpha=9, target_modules=list(targets), task_type="CAUSAL_LM", init_lora_weights=False))
  model.save_pretrained(tmp_path / "adapter")
  arch = architecture.from_hf_config(base)
  params = weights.load(base, arch, sharding.make_mesh(MeshConfig(), jax.devices()[:1]), param_dtype="float32")
  adapters = lora.load(tmp_path / "adapter", arch, LoraConfig(rank=3, alpha=9.0, targets=targets))
  with torch.no_grad():
    expected = model(torch.tensor(BATCH[0].astype(np.int64))).logits.numpy()
  assert np.abs(expected - logits_of(params, arch, BATCH)).max() > 0.5
  np.testing.assert_allclose(logits_of(attach(params, adapters, 3.0), arch, BATCH), expected, atol=1e-4, rtol=0)


@pytest.fixture
def exported(tmp_path):
  """(directory of an adapter of the tiny preset, arch, adapters)."""
  arch, _ = make()
  adapters = random_adapters(arch)
  return lora.export(adapters, arch, CFG, "some/base", tmp_path / "adapter"), arch, adapters


def test_an_export_is_read_back_bit_for_bit_also_from_a_mesh(exported, tmp_path):
  directory, arch, adapters = exported
  assert jax.tree.structure(lora.load(directory, arch, CFG)) == jax.tree.structure(adapters)
  jax.tree.map(np.testing.assert_array_equal, lora.load(directory, arch, CFG), adapters)
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
  lora.export(sharding.put(adapters, lora.shardings(arch, CFG, mesh)), arch, CFG, "some/base", tmp_path / "again")
  for file in directory.iterdir():
    assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
  settings = json.loads((directory / "adapter_config.json").read_text())
  assert (settings["r"], settings["lora_alpha"], type(settings["lora_alpha"])) == (4, 8, int)


def test_a_failed_export_leaves_the_earlier_one(exported, monkeypatch):
  directory, arch, adapters = exported
  before = {file.name: file.read_bytes() for file in directory.iterdir()}
  doubled = jax.tree.map(lambda x: 2 * x, adapters)
  with monkeypatch.context() as patch:
    patch.setattr(tensorfile.Writer, "close", lambda self: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
      lora.export(doubled, arch, CFG, "some/base", directory)
  assert {file.name: file.read_bytes() for file in directory.iterdir()} == before
  lora.export(doubled, arch, CFG, "some/base", directory)
  jax.tree.map(np.testing.assert_array_equal, lora.load(directory, arch, CFG), doubled)
  assert [path.name for path in directory.parent.iterdir()] == ["adapter"]


def test_export_refuses_foreign_directories_and_other_shapes(exported, tmp_path):
  _, arch, adapters = exported
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match=r"other exists and holds no adapter; choose another"):
    lora.export(adapters, arch, CFG, "some/base", tmp_path / "other")
  with pytest.raises(ValueError, match=r"\(2, 4, 64\).*with their own lora settings"):
    lora.export(adapters, arch, LoraConfig(rank=5), "some/base", tmp_path / "new")
  assert not (tmp_path / "new").exists()


def set_in_config(**changes):
  def edit(directory: pathlib.Path):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

  return edit


@pytest.mark.parametrize("spoil, cfg, error, message", [
    (set_in_config(peft_type="IA3"), CFG, ValueError, r"peft_type='IA3' is not supported"),
    (set_in_config(use_rslora=True), CFG, ValueError, r"use_rslora=True is not supported; give a plain LoRA adapter"),
    (set_in_config(alpha_pattern={"q_proj": 1}), CFG, ValueError, r"alpha_pattern=\{'q_proj': 1\} is not supported"),
    (None, LoraConfig(rank=8, alpha=8.0), ValueError, r"r=4 is not lora\.rank=8; set that to the adapter's"),
    (None, LoraConfig(rank=4), ValueError, r"lora_alpha=8 is not lora\.alpha=32\.0"),
    (None, LoraConfig(rank=4, alpha=8.0, targets=("q_proj",)), ValueError,
     r"tensor base_model\.model\.model\.layers\.0\.mlp\.down_proj\.lora_A\.weight is unknown \(24 in all\)"),
    (lambda directory: (directory / "adapter_model.safetensors").unlink(), CFG, FileNotFoundError,
     r"holds no adapter_model\.safetensors; give the directory of a PEFT adapter"),
    (lambda directory: (directory / "adapter_config.json").write_text("{"), CFG, ValueError, r"is not valid JSON"),
])
def test_load_refuses_what_is_not_this_adapter(spoil, cfg, error, message, exported):
  directory, arch, _ = exported
  if spoil is not None:
    spoil(directory)
  with pytest.raises(error, match=message):
    lora.load(directory, arch, cfg)


def test_load_names_missing_and_misshaped_tensors(exported, tmp_path):
  _, arch, adapters = exported
  cfg = LoraConfig(rank=4, alpha=8.0, targets=("q_proj",))
  lora.export({"query": adapters["query"]}, arch, cfg, "some/base", tmp_path / "query")
  with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj\.lora_A\.weight is missing \(24 in all\)"):
    lora.load(tmp_path / "query", arch, CFG)
  other, _ = make("tiny_qwen3")
  assert other.n_layers == arch.n_layers and other.head_size != arch.head_size
  with pytest.raises(ValueError, match=r"q_proj\.lora_B\.weight has shape \(64, 4\), and .* asks for \(128, 4\)"):
    lora.load(tmp_path / "query", other, cfg)


@pytest.mark.parametrize("cfg, message", [
    (LoraConfig(rank=-1), r"lora\.rank=-1 is negative; give at least 1, or 0"),
    (LoraConfig(rank=4, alpha=0.0), r"lora\.alpha=0\.0 is not a positive number"),
    (LoraConfig(rank=4, alpha=float("inf")), r"lora\.alpha=inf is not a positive number"),
    (LoraConfig(rank=4, targets=()), r"lora\.targets=\(\) leaves nothing to train; .*or set lora\.rank=0"),
    (LoraConfig(rank=4, targets=("q_proj", "lm_head")), r"holds 'lm_head', which is no projection; choose among"),
    (LoraConfig(rank=4, targets=("q_proj", "q_proj")), r"holds a name twice"),
])
def test_impossible_settings_are_refused(cfg, message):
  with pytest.raises(ValueError, match=message):
    lora.check(cfg, make()[0])


def test_possible_settings_are_not():
  for cfg in (LoraConfig(), CFG, LoraConfig(rank=1, targets=("down_proj",))):
    lora.check(cfg, make()[0])
