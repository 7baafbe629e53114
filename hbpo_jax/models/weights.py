"""Hugging Face checkpoints: import into sharded device arrays, and export.

`hbpo_jax.models.parameters` is the one table for both directions.
"""

from collections.abc import Callable
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from hbpo_jax.models import architecture, parameters, sharding, tensorfile
from hbpo_jax.models.architecture import Architecture
from hbpo_jax.models.parameters import Parameter
from hbpo_jax.models.tensorfile import Tensor

CARD, GENERATION = "README.md", "generation_config.json"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Files that travel with the weights; everything else in a checkpoint (weights, README, ...) stays behind.
_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", GENERATION)
_SAMPLE_BYTES = 2**20
_BLOCK_BYTES = 8 * 2**20  # host memory of one piece on its way to the devices


def load(path: str | os.PathLike, arch: Architecture, mesh: Mesh, *, param_dtype: Any) -> dict:
  """Params of a checkpoint, sharded over the mesh.

  Each device is sent its own part of each tensor in pieces of a few MiB, so that the host never holds a tensor.

  Args:
    path: checkpoint directory with model.safetensors or its shards and index.
    param_dtype: dtype of the params, whatever the file's (float32, bfloat16 or float16).
  Raises:
    FileNotFoundError: when there are no such files.
    ValueError: when a tensor is missing, unknown or of another shape, or a file is corrupt; names it.
  """
  directory = pathlib.Path(path)
  tensors = _inspect(directory)
  _check(directory, tensors, arch)
  return parameters.nest({
      row.path: _place(row, [tensors[name] for name in _names(row, arch)], mesh, jnp.dtype(param_dtype))
      for row in parameters.table(arch)})


def fingerprint(path: str | os.PathLike) -> str:
  """What tells the weights of two checkpoint directories apart, hex; reads some MiB of each file.

  SHA-256 of config.json and of each safetensors file's name, size, first, middle and last MiB.

  Raises:
    FileNotFoundError, ValueError: as `load`.
  """
  directory = pathlib.Path(path)
  digest = hashlib.sha256((directory / "config.json").read_bytes())
  for file in sorted({tensor.file for tensor in _inspect(directory).values()}):
    size = file.stat().st_size
    digest.update(f"{file.name} {size}".encode())
    with file.open("rb") as f:
      for start in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
        f.seek(start)
        digest.update(f.read(_SAMPLE_BYTES))
  return digest.hexdigest()


def _inspect(directory: pathlib.Path) -> dict[str, Tensor]:
  """All tensors of a checkpoint directory, by name; reads headers only."""
  index = directory / _INDEX
  if index.is_file():
    weight_map = architecture.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
      raise ValueError(f"{index} has no weight_map; download or export the checkpoint again.")
    for name, file in weight_map.items():
      # A path could lead anywhere.
      if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", file):
        raise ValueError(
            f"{index}: tensor {name!r} is said to be in {file!r}, which is not the name of a safetensors file beside "
            "it; download or export the checkpoint again.")
    files = sorted(set(weight_map.values()))
  elif (directory / _SINGLE).is_file():
    weight_map, files = {}, [_SINGLE]
  else:
    raise FileNotFoundError(
        f"{directory} holds neither {_SINGLE} nor {_INDEX}; give a checkpoint saved in safetensors format.")
  tensors: dict[str, Tensor] = {}
  for file in files:
    if not (directory / file).is_file():
      raise FileNotFoundError(
          f"{directory / file} is named by {_INDEX} and does not exist; download the checkpoint again.")
    found = tensorfile.read_header(directory / file)
    if twice := sorted(set(found) & set(tensors)):
      raise ValueError(
          f"{directory / file}: tensor {twice[0]} is also in {tensors[twice[0]].file.name}; keep one of them.")
    tensors |= found
  if absent := sorted(set(weight_map) - set(tensors)):
    raise ValueError(
        f"{directory}: tensor {absent[0]} is named by {_INDEX} and is in no file; download the checkpoint again.")
  return tensors


def _names(row: Parameter, arch: Architecture) -> list[str]:
  """Checkpoint names of one row: one per layer, or just one."""
  return [row.hf_name.format(layer=i) for i in range(arch.n_layers)] if row.stacked else [row.hf_name]


def _check(directory: pathlib.Path, tensors: dict[str, Tensor], arch: Architecture) -> None:
  """Raises unless the checkpoint holds exactly the architecture's tensors, each of its shape."""
  expected = {name: row.hf_shape for row in parameters.table(arch) for name in _names(row, arch)}
  if missing := sorted(set(expected) - set(tensors)):
    raise ValueError(
        f"{directory}: tensor {missing[0]} is missing ({len(missing)} in all); get the whole checkpoint.")
  unknown = sorted(n for n in set(tensors) - set(expected) if not n.endswith("rotary_emb.inv_freq"))
  if arch.tie_embeddings and "lm_head.weight" in unknown:
    unknown.remove("lm_head.weight")
    if not _equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]):
      raise ValueError(
          f"{directory}: lm_head.weight differs from the embedding, yet config.json says tie_word_embeddings=true; "
          "set it to false.")
  if unknown:
    raise ValueError(
        f"{directory}: tensor {unknown[0]} is unknown to a {arch.family} decoder ({len(unknown)} in all); remove it, "
        "or correct config.json.")
  for name, shape in expected.items():
    if tensors[name].shape != shape:
      raise ValueError(
          f"{directory}: tensor {name} has shape {tensors[name].shape}, and config.json asks for {shape}; "
          "correct config.json.")
    tensors[name].dtype  # noqa: B018 - raises when the decoder cannot use it


def _equal(a: Tensor, b: Tensor) -> bool:
  if a.shape != b.shape or a.dtype != b.dtype:
    return False
  step = max(1, _BLOCK_BYTES // max(1, math.prod(a.shape[1:]) * a.dtype.itemsize))
  spans = ((start, min(start + step, a.shape[0])) for start in range(0, a.shape[0], step))
  return all(a.rows(a.shape, *s).tobytes() == b.rows(b.shape, *s).tobytes() for s in spans)


@functools.lru_cache
def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, target: NamedSharding) -> Callable[[], jax.Array]:
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=target)


@functools.lru_cache
def _writer(target: NamedSharding) -> Callable[..., jax.Array]:
  """A jitted function by which every device writes its part of `block` into its part of `whole`, in place.

  The position is the same on all devices, in local terms.
  """
  def local(whole, block, start):
    return jax.lax.dynamic_update_slice(whole, block.astype(whole.dtype), tuple(start))

  spec = target.spec
  write = jax.shard_map(local, mesh=target.mesh, in_specs=(spec, spec, PartitionSpec()), out_specs=spec)
  return jax.jit(write, donate_argnums=0, out_shardings=target)


def _place(row: Parameter, tensors: list[Tensor], mesh: Mesh, dtype: jnp.dtype) -> jax.Array:
  """One parameter as a device array, written in blocks along the first axis of the weight.

  All devices advance together: block i holds the i-th rows of every device's part, so that each write is local.
  """
  target = NamedSharding(mesh, sharding.partition_spec(row.axes, row.shape, mesh))
  axis = 1 if row.stacked else 0  # the axis cut into blocks
  shape = row.shape[axis:]
  n_local = target.shard_shape(row.shape)[axis]
  n_shards = shape[0] // n_local
  row_bytes = max(1, math.prod(shape[1:]) * np.dtype(tensors[0].dtype).itemsize * n_shards)
  step = min(n_local, max(1, _BLOCK_BYTES // row_bytes))
  block_shape = (1,) * axis + (step * n_shards, *shape[1:])
  whole = _zeros(row.shape, dtype, target)()
  write = _writer(target)
  for layer, tensor in enumerate(tensors):
    for first in range(0, n_local, step):
      first = min(first, n_local - step)  # the last block overlaps the one before: one shape, one program
      read = functools.partial(_read, tensor, shape, axis, first, step, n_local)
      block = jax.make_array_from_callback(block_shape, target, read)
      start = np.array((layer,) * axis + (first,) + (0,) * (len(shape) - 1), np.int32)
      whole = write(whole, block, start)
      block.delete()
  return whole


def _read(tensor, shape, axis, first, step, n_local, index):
  """The values that a device's part `index` of a block stands for."""
  shard = (index[axis].start or 0) // step
  rows = tensor.rows(shape, shard * n_local + first, shard * n_local + first + step)
  part = rows[(slice(None), *index[axis + 1:])]
  return part[None] if axis else part


def export(
    params: dict,
    arch: Architecture,
    source: Any,
    out_dir: str | os.PathLike,
    *,
    dtype: Any = None,
    max_shard_bytes: int = 5 * 10**9,
    card: str = "",
) -> pathlib.Path:
  """Writes a checkpoint that transformers and vLLM load: safetensors, configurations, tokenizer, model card.

  Written beside `out_dir` and renamed at the end: a partial export never looks complete. An earlier export there is
  replaced.

  Args:
    params: of `load` or `decoder.init`.
    source: directory of the checkpoint that the params came from (its config and tokenizer files are copied), or the
      tokenizer of a model that was born here.
    dtype: of the exported tensors; None = each tensor's own in `source`, or the params' with a tokenizer.
    max_shard_bytes: largest file; more tensors go to further files, named by an index.
    card: text of README.md (`hbpo_jax.reporting.model_card`); '' writes none.
  Returns:
    out_dir.
  Raises:
    ValueError: when the dtype cannot be stored, `source` describes another architecture, or `out_dir` is the source or
      holds something that is not an export.
  """
  out_dir = pathlib.Path(out_dir)
  is_directory = isinstance(source, (str, os.PathLike))
  _check_target(out_dir, pathlib.Path(source) if is_directory else None)
  plan = _plan(params, arch, _source_dtypes(source, arch) if is_directory and dtype is None else {}, dtype)
  shards = _shards(plan, max_shard_bytes)
  aside = out_dir.with_name(f".{out_dir.name}.partial")
  writes = jax.process_index() == 0
  if writes:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
  for i, shard in enumerate(shards):
    name = _SINGLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
    writer = tensorfile.Writer(aside / name, [(p.name, p.row.hf_shape, p.dtype) for p in shard]) if writes else None
    for piece in shard:
      values = fetch(parameters.at(params, piece.row.path), piece.layer)  # a collective where several processes run
      if writer is not None:
        writer.write(values.astype(piece.dtype).reshape(piece.row.hf_shape))
    if writer is not None:
      writer.close()
  if writes:
    _write_index(aside, shards)
    config_dtype = np.dtype(plan[0].dtype).name
    if is_directory:
      _copy_files(pathlib.Path(source), aside, config_dtype)
    else:
      _write_new_files(source, arch, aside, config_dtype)
    _complete_generation_config(aside)
    if card:
      (aside / CARD).write_text(card, encoding="utf-8")
    swap(aside, out_dir)
  return out_dir


@dataclasses.dataclass(frozen=True)
class _Piece:
  """One tensor of an export: its name, row, layer (None if not stacked) and stored dtype."""
  name: str
  row: Parameter
  layer: int | None
  dtype: np.dtype


def _plan(params: dict, arch: Architecture, own: dict[str, np.dtype], dtype: Any) -> list[_Piece]:
  pieces = []
  for row in parameters.table(arch):
    array = parameters.at(params, row.path)
    if array.shape != row.shape:
      raise ValueError(
          f"params at {'.'.join(row.path)} have shape {array.shape}, not {row.shape}; export the model's own params.")
    for layer, name in enumerate(_names(row, arch)):
      stored = own[name] if name in own else np.dtype(array.dtype if dtype is None else jnp.dtype(dtype))
      tensorfile.dtype_name(stored)
      pieces.append(_Piece(name, row, layer if row.stacked else None, stored))
  return pieces


def _source_dtypes(source: Any, arch: Architecture) -> dict[str, np.dtype]:
  tensors = _inspect(pathlib.Path(source))
  _check(pathlib.Path(source), tensors, arch)
  return {name: tensor.dtype for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def _shards(plan: list[_Piece], max_bytes: int) -> list[list[_Piece]]:
  """The pieces in order, cut into files of at most max_bytes (or of one piece)."""
  shards: list[list[_Piece]] = [[]]
  size = 0
  for piece in plan:
    n_bytes = math.prod(piece.row.hf_shape) * piece.dtype.itemsize
    if shards[-1] and size + n_bytes > max_bytes:
      shards.append([])
      size = 0
    shards[-1].append(piece)
    size += n_bytes
  return shards


@functools.partial(jax.jit, static_argnames=("target",))
def _take_layer(array, layer, target):
  taken = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
  return taken if target is None else jax.lax.with_sharding_constraint(taken, target)


@functools.partial(jax.jit, static_argnames=("target",))
def _gather(array, target):
  return jax.lax.with_sharding_constraint(array, target)


def fetch(array: Any, layer: int | None) -> np.ndarray:
  """One tensor on the host of every process."""
  target = None
  if isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding):
    target = sharding.replicated(array.sharding.mesh)
  if layer is not None:
    return np.asarray(_take_layer(array, layer, target))
  return np.asarray(array if target is None or array.is_fully_addressable else _gather(array, target))


def _check_target(out_dir: pathlib.Path, source: pathlib.Path | None) -> None:
  if source is not None and out_dir.exists() and source.exists() and out_dir.samefile(source):
    raise ValueError(f"export directory {out_dir} is the checkpoint it came from; choose another directory.")
  is_export = (out_dir / "config.json").is_file() or (out_dir.is_dir() and not any(out_dir.iterdir()))
  if out_dir.exists() and not is_export:
    raise ValueError(f"export directory {out_dir} exists and holds no checkpoint; choose another, or empty it.")


def _write_index(directory: pathlib.Path, shards: list[list[_Piece]]) -> None:
  if len(shards) == 1:
    return
  weight_map = {p.name: f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i, s in enumerate(shards) for p in s}
  total = sum(math.prod(p.row.hf_shape) * p.dtype.itemsize for s in shards for p in s)
  write_json(directory / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: pathlib.Path, content: dict) -> None:
  """Writes an indented JSON file, as transformers does."""
  path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy_files(source: pathlib.Path, directory: pathlib.Path, dtype: str) -> None:
  """config.json with the dtype of the export, and the source's tokenizer files as they are."""
  config = architecture.read_json(source / "config.json")
  for key in {"dtype", "torch_dtype"} & set(config) or {"dtype"}:
    config[key] = dtype
  write_json(directory / "config.json", config)
  for name in _COPIED:
    if (source / name).is_file():
      _check_inside(source, name)
      shutil.copyfile(source / name, directory / name)


def _complete_generation_config(directory: pathlib.Path) -> None:
  """Where the source has no generation_config.json, one with the ids that config.json names."""
  if not (directory / GENERATION).is_file():
    config = architecture.read_json(directory / "config.json")
    ids = {key: config[key] for key in _TOKEN_IDS if config.get(key) is not None}
    write_json(directory / GENERATION, ids)


def _check_inside(directory: pathlib.Path, name: str) -> None:
  """Raises where a file is a link out of its checkpoint: an export may be published, and could carry any file along.

  The hub's cache links from snapshots/REVISION to blobs.
  """
  home, target = directory.resolve(), (directory / name).resolve()
  inside = [home] + ([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])
  if not any(target.is_relative_to(folder) for folder in inside):
    raise ValueError(
        f"{directory / name} is a link to {target}, outside the checkpoint, and would be copied into the export; "
        "put the file itself there.")


def _write_new_files(tokenizer: Any, arch: Architecture, directory: pathlib.Path, dtype: str) -> None:
  config = architecture.to_hf_config(arch, dtype)
  for key in _TOKEN_IDS:
    config[key] = getattr(tokenizer, key)
  write_json(directory / "config.json", config)
  tokenizer.save_pretrained(directory)


def swap(aside: pathlib.Path, out_dir: pathlib.Path) -> None:
  """Puts the finished directory in place of whatever was there."""
  old = out_dir.with_name(f".{out_dir.name}.old")
  shutil.rmtree(old, ignore_errors=True)
  if out_dir.exists():
    out_dir.rename(old)
  aside.rename(out_dir)
  shutil.rmtree(old, ignore_errors=True)
