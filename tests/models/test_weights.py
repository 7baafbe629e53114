"""Import and export of checkpoints: exact, complete, small in host memory, and clear when a file is wrong."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
import torch
import transformers

from hbpo_jax.config import MeshConfig
from hbpo_jax.models import architecture, decoder, parameters, presets, sharding, weights
from tests.checkpoints import make_checkpoint, make_tokenizer


def one_device():
  return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def tensors(directory):
  """Every tensor of a checkpoint by name, as torch holds it."""
  found = {}
  for file in sorted(pathlib.Path(directory).glob("*.safetensors")):
    found |= load_file(file)
  return found


def assert_same_bits(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  return make_checkpoint(tmp_path_factory.mktemp("plain"), "qwen2")


@pytest.fixture
def broken(plain, tmp_path):
  """A copy of the plain checkpoint to spoil, and a function that tries to load it."""
  for file in plain.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())

  def attempt():
    return weights.load(tmp_path, architecture.from_hf_config(tmp_path), one_device(), param_dtype="float32")

  return tmp_path, attempt


@pytest.mark.parametrize("family, tie, dtype", [
    ("qwen2", False, "float32"), ("qwen3", True, "bfloat16"), ("llama", False, "float16")])
def test_export_of_what_was_imported_is_bit_for_bit(family, tie, dtype, tmp_path):
  source = make_checkpoint(tmp_path / "in", family, tie=tie, dtype=dtype, max_shard_size="100KB")
  assert len(list(source.glob("model-*.safetensors"))) > 2
  arch = architecture.from_hf_config(source)
  params = weights.load(source, arch, sharding.make_mesh(MeshConfig(fsdp=2, tensor=4)), param_dtype="float32")
  out = weights.export(params, arch, source, tmp_path / "out", max_shard_bytes=100_000)
  assert_same_bits(tensors(source), tensors(out))
  again = weights.load(out, architecture.from_hf_config(out), one_device(), param_dtype="float32")
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), params, again)
  tokens = torch.arange(40)[None]
  ours, theirs = (
      transformers.AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32)(tokens).logits for d in (out, source))
  assert torch.equal(ours, theirs)
  assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())
  for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
    assert (out / name).read_bytes() == (source / name).read_bytes()
  index = json.loads((out / "model.safetensors.index.json").read_text())
  assert index["weight_map"].keys() == tensors(out).keys()


def test_every_param_is_the_tensor_the_table_names(plain):
  arch = architecture.from_hf_config(plain)
  params = weights.load(plain, arch, one_device(), param_dtype="float32")
  held = tensors(plain)
  for row in parameters.table(arch):
    array = np.asarray(parameters.at(params, row.path))
    for layer in range(arch.n_layers if row.stacked else 1):
      expected = held[row.hf_name.format(layer=layer)].numpy()
      np.testing.assert_array_equal((array[layer] if row.stacked else array).reshape(expected.shape), expected)


def test_many_small_blocks_on_many_devices_give_the_same_params(plain, monkeypatch):
  arch = architecture.from_hf_config(plain)
  whole = weights.load(plain, arch, one_device(), param_dtype="bfloat16")
  monkeypatch.setattr(weights, "_BLOCK_BYTES", 3000)  # 12 rows of 64 floats: no axis is a multiple of it
  for cfg in (MeshConfig(fsdp=4, tensor=2), MeshConfig(data=8, fsdp=1)):
    mesh = sharding.make_mesh(cfg)
    blocks = weights.load(plain, arch, mesh, param_dtype="bfloat16")
    assert jax.tree.map(lambda x: x.sharding, blocks) == sharding.param_shardings(arch, mesh)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), blocks, whole)


def test_export_in_another_dtype_says_so(plain, tmp_path):
  arch = architecture.from_hf_config(plain)
  params = weights.load(plain, arch, one_device(), param_dtype="float32")
  out = weights.export(params, arch, plain, tmp_path / "out", dtype="bfloat16")
  assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
  model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
  assert model.dtype == torch.bfloat16
  expected = np.asarray(params["embed"]).astype(ml_dtypes.bfloat16).astype(np.float32)
  np.testing.assert_array_equal(model.model.embed_tokens.weight.detach().float().numpy(), expected)
  with pytest.raises(ValueError, match="dtype 'int8' cannot be exported"):
    weights.export(params, arch, plain, tmp_path / "other", dtype="int8")


@pytest.mark.parametrize("name", ["tiny_qwen2", "tiny_qwen3", "tiny_llama"])
def test_a_model_born_here_exports_with_its_tokenizer(name, tmp_path):
  arch = presets.preset(name)
  params = jax.jit(decoder.init, static_argnums=0)(arch, jax.random.key(0))
  out = weights.export(params, arch, make_tokenizer(tmp_path / "tok"), tmp_path / "out")
  assert architecture.from_hf_config(out) == arch
  tokens = np.arange(30)[None]
  expected = transformers.AutoModelForCausalLM.from_pretrained(out)(torch.tensor(tokens)).logits.detach().numpy()
  ones = jnp.ones_like(tokens)
  hidden = decoder.forward(params, arch, tokens, ones, tokens, compute_dtype="float32")
  np.testing.assert_allclose(decoder.logits(params, arch, hidden), expected, atol=1e-4)
  assert transformers.AutoTokenizer.from_pretrained(out).eos_token_id == 2


def test_an_export_names_its_token_ids_and_carries_its_card(plain, tmp_path):
  """Also where the source has no generation_config.json; the index is what vLLM and transformers read shards by."""
  source = tmp_path / "source"
  shutil.copytree(plain, source)
  (source / "generation_config.json").unlink()
  (source / "README.md").write_text("of the source")
  arch = architecture.from_hf_config(source)
  params = weights.load(source, arch, one_device(), param_dtype="float32")
  out = weights.export(params, arch, source, tmp_path / "out", max_shard_bytes=200_000, card="mine")
  assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 2}
  assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == 2
  assert (out / "README.md").read_text() == "mine"
  index = json.loads((out / "model.safetensors.index.json").read_text())
  assert set(index["weight_map"].values()) == {p.name for p in out.glob("*.safetensors")}
  assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(out).values())
  assert all(p.stat().st_size <= 200_000 + 8192 for p in out.glob("*.safetensors") if len(load_file(p)) > 1)
  assert not (weights.export(params, arch, source, tmp_path / "plain") / "README.md").exists()


def test_a_failed_export_leaves_the_earlier_one(plain, tmp_path, monkeypatch):
  arch = architecture.from_hf_config(plain)
  params = weights.load(plain, arch, one_device(), param_dtype="float32")
  out = weights.export(params, arch, plain, tmp_path / "out")
  before = {f.name: f.read_bytes() for f in out.iterdir()}

  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr(weights, "_copy_files", fail)
  for target in (out, tmp_path / "new"):
    with pytest.raises(OSError, match="disk full"):
      weights.export(params, arch, plain, target)
  assert {f.name: f.read_bytes() for f in out.iterdir()} == before
  assert not (tmp_path / "new").exists()
  monkeypatch.undo()
  weights.export(params, arch, plain, out, dtype="bfloat16")
  assert sorted(f.name for f in tmp_path.iterdir() if f.name.endswith(".old")) == []
  assert tensors(out)["model.norm.weight"].dtype == torch.bfloat16


def test_export_refuses_its_source_and_foreign_directories(plain, tmp_path):
  arch = architecture.from_hf_config(plain)
  params = weights.load(plain, arch, one_device(), param_dtype="float32")
  with pytest.raises(ValueError, match="is the checkpoint it came from"):
    weights.export(params, arch, plain, plain)
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match="holds no checkpoint"):
    weights.export(params, arch, plain, tmp_path)
  assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_missing_tensor_is_named(broken):
  directory, attempt = broken
  held = tensors(directory)
  del held["model.layers.1.self_attn.k_proj.bias"]
  save_file(held, directory / "model.safetensors")
  with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.k_proj\.bias is missing"):
    attempt()


def test_an_unknown_tensor_is_named_and_rotary_buffers_are_not(broken):
  directory, attempt = broken
  held = tensors(directory)
  held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
  save_file(held, directory / "model.safetensors")
  attempt()
  held["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
  save_file(held, directory / "model.safetensors")
  with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_norm\.weight is unknown"):
    attempt()


def test_a_misshaped_tensor_is_named(broken):
  directory, attempt = broken
  config = json.loads((directory / "config.json").read_text())
  (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
  with pytest.raises(ValueError, match=r"mlp\.gate_proj\.weight has shape \(160, 64\)"):
    attempt()


def test_an_integer_tensor_is_named(broken):
  directory, attempt = broken
  held = tensors(directory)
  held["model.norm.weight"] = torch.ones(64, dtype=torch.int32)
  save_file(held, directory / "model.safetensors")
  with pytest.raises(ValueError, match=r"model\.norm\.weight has dtype I32"):
    attempt()


@pytest.mark.parametrize("spoil", [
    lambda b: b[:-100], lambda b: b[:5], lambda b: b"", lambda b: b + b"\0" * 8, lambda b: b[:2000],
    lambda b: b[:8] + b"\xff" * 50 + b[58:], lambda b: b"\xff" * 8 + b[8:], lambda b: b[:8] + b"[1]" + b" " * 5000,
    lambda b: b.replace(b'"shape":[64]', b'"shape":[63]', 1)])
def test_a_corrupt_file_is_named(spoil, broken):
  directory, attempt = broken
  file = directory / "model.safetensors"
  file.write_bytes(spoil(file.read_bytes()))
  with pytest.raises(ValueError, match=r"model\.safetensors is corrupt|model\.safetensors is truncated"):
    attempt()


def test_missing_files_are_named(broken, tmp_path):
  directory, attempt = broken
  (directory / "model.safetensors").rename(directory / "elsewhere")
  with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
    attempt()
  index = directory / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-1.safetensors"}}))
  with pytest.raises(FileNotFoundError, match=r"model-1\.safetensors is named by"):
    attempt()
  (directory / "elsewhere").rename(directory / "model-1.safetensors")
  index.write_text(json.dumps({"weight_map": {"ghost": "model-1.safetensors"}}))
  with pytest.raises(ValueError, match="tensor ghost is named by"):
    attempt()


def test_a_stored_tied_head_must_equal_the_embedding(tmp_path):
  directory = make_checkpoint(tmp_path, "qwen3", tie=True)
  arch = architecture.from_hf_config(directory)
  held = tensors(directory)
  assert "lm_head.weight" not in held
  held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
  save_file(held, directory / "model.safetensors", metadata={"format": "pt"})
  assert "head" not in weights.load(directory, arch, one_device(), param_dtype="float32")
  held["lm_head.weight"][511, 63] += 1
  save_file(held, directory / "model.safetensors", metadata={"format": "pt"})
  with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
    weights.load(directory, arch, one_device(), param_dtype="float32")


_MEASURE = """
import jax, sys
from hbpo_jax.config import MeshConfig
from hbpo_jax.models import architecture, sharding, weights
def peak():
  lines = open("/proc/self/status").read().splitlines()
  return next(int(l.split()[1]) for l in lines if l.startswith("VmHWM")) * 1024
small, big, n = sys.argv[1:]
mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:int(n)])
load = lambda d: jax.block_until_ready(weights.load(d, architecture.from_hf_config(d), mesh, param_dtype="float32"))
load(small)
before = peak()
params = load(big)
print(peak() - before - sum(x.nbytes for x in jax.tree.leaves(params)), max(x.nbytes for x in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
@pytest.mark.parametrize("n_devices", [1, 8])
def test_host_memory_of_an_import(n_devices, plain, tmp_path, repo_root):
  # On the CPU backend the params themselves stay on the host; what is above them is the import's own use.
  big = make_checkpoint(tmp_path, "qwen2", hidden=512, mlp=2048, vocab_size=60_000, n_layers=6, tokenizer=False)
  run = subprocess.run([sys.executable, "-c", _MEASURE, plain, big, str(n_devices)], cwd=repo_root, capture_output=True,
                       text=True, check=True)
  above, largest = map(int, run.stdout.split())
  assert largest == 60_000 * 512 * 4
  assert above < 1.3 * largest


def test_the_package_does_not_import_torch(repo_root):
  script = "import sys, hbpo_jax.models.weights, hbpo_jax.models.decoder; sys.exit('torch' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", script], cwd=repo_root).returncode == 0
