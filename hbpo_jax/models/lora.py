"""Low-rank adapters (LoRA): trained beside frozen weights, merged into them, and stored as PEFT stores them.

An adapted projection computes y = x W^T + scale (x a^T) b^T, scale = alpha / rank. `adapters` is a pytree of its own:

    {name: {"a": float32 [L, r, inputs...], "b": float32 [L, outputs..., r]}}

for the adapted names among query, key, value, output, gate, up and down; the axes are those of the weight of that name
(`hbpo_jax.models.decoder`).

Source: arXiv 2106.09685.
"""

import functools
import math
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np

from hbpo_jax.config import LoraConfig
from hbpo_jax.models import architecture, attention, decoder, parameters, sharding, tensorfile, weights
from hbpo_jax.models.architecture import Architecture
from hbpo_jax.models.parameters import Parameter

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_HF_PREFIX = "base_model.model."
# Settings of PEFT under which the same tensors would mean another function; each is off where it is absent or false.
_UNSUPPORTED = ("use_rslora", "use_dora", "alpha_pattern", "alora_invocation_tokens")


def check(cfg: LoraConfig, arch: Architecture) -> None:
  """Raises unless the settings make adapters of this network, or rank=0 turns them off.

  Raises:
    ValueError: names the field, its value and the remedy.
  """
  if cfg.rank < 0:
    raise ValueError(f"lora.rank={cfg.rank} is negative; give at least 1, or 0 to train the weights themselves.")
  if cfg.rank == 0:
    return
  if not (cfg.alpha > 0 and math.isfinite(cfg.alpha)):
    raise ValueError(f"lora.alpha={cfg.alpha} is not a positive number; give one, such as twice lora.rank.")
  known = [_target(row) for row in _projections(arch)]
  if not cfg.targets:
    raise ValueError(f"lora.targets=() leaves nothing to train; name some of {known}, or set lora.rank=0.")
  if unknown := [name for name in cfg.targets if name not in known]:
    raise ValueError(f"lora.targets={cfg.targets} holds {unknown[0]!r}, which is no projection; choose among {known}.")
  if len(set(cfg.targets)) < len(cfg.targets):
    raise ValueError(f"lora.targets={cfg.targets} holds a name twice; remove one.")


def scale(cfg: LoraConfig) -> float:
  """alpha / rank, the factor of the adapters' product."""
  return cfg.alpha / cfg.rank


@functools.lru_cache
def table(arch: Architecture, cfg: LoraConfig) -> tuple[Parameter, ...]:
  """All factors in a fixed order, with paths into `adapters` and PEFT's names and shapes; none for rank 0."""
  rows = []
  for row in _projections(arch) if cfg.rank else ():
    if _target(row) not in cfg.targets:
      continue
    name, first_input = row.path[-1], len(row.shape) - row.n_inputs
    n_outputs, n_inputs = row.hf_shape
    stem = _HF_PREFIX + row.hf_name.removesuffix("weight")
    rows += [
        # PEFT's initial values: uniform within 1/sqrt(inputs), whose standard deviation is a sqrt(3)-th of that.
        Parameter((name, "a"), stem + "lora_A.weight", (cfg.rank, n_inputs),
                  (arch.n_layers, cfg.rank, *row.shape[first_input:]), ("layers", "none", *row.axes[first_input:]),
                  (3 * n_inputs)**-0.5),
        Parameter((name, "b"), stem + "lora_B.weight", (n_outputs, cfg.rank),
                  (*row.shape[:first_input], cfg.rank), (*row.axes[:first_input], "none"), None),
    ]
  return tuple(rows)


def init(arch: Architecture, cfg: LoraConfig, key: jax.Array) -> dict:
  """New adapters, which change nothing yet: a uniform in +-1/sqrt(inputs), b zero. Jit it (arch and cfg static)."""
  sizes = [math.prod(row.shape) if row.init_std is not None else 0 for row in table(arch, cfg)]
  # One draw serves all, as in parameters.initial.
  noise = jax.random.uniform(key, (sum(sizes),), jnp.float32, -math.sqrt(3), math.sqrt(3))
  adapters, start = {}, 0
  for row, size in zip(table(arch, cfg), sizes):
    if row.init_std is None:
      adapters[row.path] = jnp.zeros(row.shape, jnp.float32)
    else:
      adapters[row.path] = (row.init_std * noise[start:start + size]).reshape(row.shape)
    start += size
  return parameters.nest(adapters)


def shardings(arch: Architecture, cfg: LoraConfig, mesh: Mesh) -> dict:
  """NamedSharding of every factor, in the structure of `adapters`; ranks stay whole, other axes lie as the weights'."""
  return parameters.nest({
      row.path: NamedSharding(mesh, sharding.partition_spec(row.axes, row.shape, mesh)) for row in table(arch, cfg)})


def attach(params: dict, adapters: dict, scale: float) -> dict:
  """Params with adapters beside the weights, for every function of `decoder` but `init` and `unroll`.

  x a^T is rounded to the compute dtype, like the operand of any other matmul. Differentiable in `adapters`.

  Args:
    params: with stacked layers, any dtype.
    scale: of `scale`.
  """
  factors = {}
  for name, adapter in adapters.items():
    factors[name + decoder.LORA_A] = adapter["a"]
    factors[name + decoder.LORA_B] = scale * adapter["b"]
  return params | {"layers": params["layers"] | factors}


def merge(params: dict, adapters: dict, scale: float) -> dict:
  """Params with W + scale b a in place of W, computed in float32 and rounded to W's dtype; jit it.

  Args:
    params: with stacked layers.
    scale: of `scale`.
  """
  def one(weight, adapter):
    n_out = adapter["b"].ndim - 2
    axes = "xyz"[:weight.ndim - 1]
    spec = f"{axes[:n_out]}r,r{axes[n_out:]}->{axes}"

    def layer(factors):
      w, a, b = factors
      return (w.astype(jnp.float32) + scale * attention.product(spec, b, a)).astype(w.dtype)

    # Layer by layer, because all layers' products in float32 are as large as a stack of master weights.
    return jax.lax.map(layer, (weight, adapter["a"], adapter["b"]))

  layers = {name: one(params["layers"][name], adapter) for name, adapter in adapters.items()}
  return params | {"layers": params["layers"] | layers}


def export(
    adapters: dict, arch: Architecture, cfg: LoraConfig, base_name: str, directory: str | os.PathLike, *,
    card: str = "") -> pathlib.Path:
  """Writes the adapters as peft.PeftModel.from_pretrained reads them, in float32.

  Written beside `directory` and renamed at the end: a partial export never looks complete. An earlier export there is
  replaced.

  Args:
    adapters: of `init` or `load`.
    base_name: directory or hub id of the frozen weights, for whoever loads the adapters.
    card: text of README.md; '' writes none.
  Returns:
    directory.
  Raises:
    ValueError: when the adapters are not of these settings, or `directory` holds something that is not an adapter.
  """
  directory = pathlib.Path(directory)
  is_export = (directory / _CONFIG).is_file() or (directory.is_dir() and not any(directory.iterdir()))
  if directory.exists() and not is_export:
    raise ValueError(f"export directory {directory} exists and holds no adapter; choose another, or empty it.")
  rows = table(arch, cfg)
  found = {(name, factor): value.shape for name, adapter in adapters.items() for factor, value in adapter.items()}
  if found != (expected := {row.path: row.shape for row in rows}):
    raise ValueError(f"adapters have the shapes {found}, not {expected}; export them with their own lora settings.")
  aside = directory.with_name(f".{directory.name}.partial")
  pieces = [(row, layer) for row in rows for layer in range(arch.n_layers)]
  writer = None
  if jax.process_index() == 0:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    writer = tensorfile.Writer(aside / _WEIGHTS, [
        (row.hf_name.format(layer=layer), row.hf_shape, np.dtype(np.float32)) for row, layer in pieces])
  for row, layer in pieces:
    values = weights.fetch(parameters.at(adapters, row.path), layer)  # a collective where several processes run
    if writer is not None:
      writer.write(values.reshape(row.hf_shape))
  if writer is not None:
    writer.close()
    weights.write_json(aside / _CONFIG, _peft_config(cfg, base_name))
    if card:
      (aside / weights.CARD).write_text(card, encoding="utf-8")
    weights.swap(aside, directory)
  return directory


def load(directory: str | os.PathLike, arch: Architecture, cfg: LoraConfig) -> dict:
  """The adapters of a PEFT directory, float32 on the host; `sharding.put` them on the mesh.

  Raises:
    FileNotFoundError: when there is no such adapter.
    ValueError: when it is of another kind, rank or alpha, or a tensor is missing, unknown or of another shape.
  """
  directory = pathlib.Path(directory)
  for name in (_CONFIG, _WEIGHTS):
    if not (directory / name).is_file():
      raise FileNotFoundError(f"{directory} holds no {name}; give the directory of a PEFT adapter.")
  _check_peft_config(directory / _CONFIG, cfg)
  rows, file = table(arch, cfg), directory / _WEIGHTS
  tensors = tensorfile.read_header(file)
  expected = {row.hf_name.format(layer=layer): row.hf_shape for row in rows for layer in range(arch.n_layers)}
  for names, verdict in ((expected.keys() - tensors.keys(), "missing"), (tensors.keys() - expected.keys(), "unknown")):
    if names:
      raise ValueError(
          f"{file}: tensor {min(names)} is {verdict} ({len(names)} in all) with lora.targets={cfg.targets} and "
          f"{arch.n_layers} layers; set lora.targets to the adapter's, or give an adapter of this model.")
  for name, shape in expected.items():
    if tensors[name].shape != shape:
      raise ValueError(
          f"{file}: tensor {name} has shape {tensors[name].shape}, and the model asks for {shape}; give an adapter of "
          "this model.")

  def read(row):
    layers = [tensors[row.hf_name.format(layer=layer)].rows(row.shape[1:], 0, row.shape[1])
              for layer in range(arch.n_layers)]
    return np.stack(layers).astype(np.float32)

  return parameters.nest({row.path: read(row) for row in rows})


def _projections(arch: Architecture) -> list[Parameter]:
  """The rows of the layers' matrices."""
  return [row for row in parameters.table(arch) if row.stacked and row.n_inputs]


def _target(row: Parameter) -> str:
  """Hugging Face's name of a projection, such as q_proj."""
  return row.hf_name.split(".")[-2]


def _peft_config(cfg: LoraConfig, base_name: str) -> dict[str, Any]:
  alpha = int(cfg.alpha) if cfg.alpha == int(cfg.alpha) else cfg.alpha  # PEFT and vLLM declare a whole number.
  return {
      "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": cfg.rank,
      "lora_alpha": alpha, "target_modules": list(cfg.targets), "lora_dropout": 0.0, "bias": "none",
      "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "modules_to_save": None,
      "use_dora": False, "use_rslora": False}


def _check_peft_config(path: pathlib.Path, cfg: LoraConfig) -> None:
  found = architecture.read_json(path)
  if found.get("peft_type") != "LORA":
    raise ValueError(f"{path}: peft_type={found.get('peft_type')!r} is not supported; give an adapter of type 'LORA'.")
  if on := [key for key in _UNSUPPORTED if found.get(key)]:
    raise ValueError(f"{path}: {on[0]}={found[on[0]]!r} is not supported; give a plain LoRA adapter.")
  for key, field, value in (("r", "rank", cfg.rank), ("lora_alpha", "alpha", cfg.alpha)):
    if found.get(key) != value:
      raise ValueError(f"{path}: {key}={found.get(key)!r} is not lora.{field}={value}; set that to the adapter's.")
