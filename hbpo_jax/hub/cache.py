"""Checkpoints and data files of the hub as directories on this machine, in `huggingface_hub`'s cache."""

from collections.abc import Sequence
import fnmatch
import json
import os
import pathlib

from huggingface_hub import constants

from hbpo_jax import distributed
from hbpo_jax.files import atomic_write_text
from hbpo_jax.hub import download, repository
from hbpo_jax.hub.repository import HubError, Interrupted, Remote, Repository, say

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What a checkpoint needs beside its weights; README.md names its licence.
_PATTERNS = ("*.json", "*.jinja", "tokenizer.model", "spiece.model", "merges.txt", "vocab.txt", "README.md")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.safetensors")


def checkpoint(path: str | os.PathLike, revision: str = "") -> pathlib.Path:
  """The local directory of a checkpoint: `path` itself, or the snapshot of the hub id ORG/NAME, downloaded if need be.

  Of several processes all get the commit that the first one found.

  Args:
    path: model.path.
    revision: branch, tag or commit; empty means the default branch. Means nothing for a directory.
  Raises:
    HubError: a FileNotFoundError; when it is neither, or cannot be fetched: names the reason and the remedy.
  """
  directory = pathlib.Path(path).expanduser()
  if directory.is_dir():
    return directory
  if directory.exists() or not repository.is_hub_id(str(path)):
    raise HubError(
        f"model.path={str(path)!r} is not a directory; give a Hugging Face checkpoint directory or a hub id such as "
        "'Qwen/Qwen3-0.6B'.")
  if ".." in revision or revision.startswith("/"):
    raise HubError(f"model.revision={revision!r} is no branch, tag or commit; give one, or '' for the default branch.")
  source = Repository(str(path), revision)
  here = find_cached(source.name, revision)
  if here is not None and repository.is_commit(revision):
    return here  # A commit never changes.
  commit = distributed.from_writer(f"the commit of {source.name}", lambda: _commit_of(source, here))
  return _checkpoint_at(source, commit)


def data_files(name: str, paths: Sequence[str], *, anonymous: bool = False) -> list[pathlib.Path]:
  """Where files of the hub data set ORG/NAME lie, downloaded if need be.

  Args:
    paths: in the repository.
    anonymous: True = without a token, even if there is one.

  Raises:
    HubError: when one does not exist or cannot be fetched; names the reason and the remedy.
  """
  source = Repository(name, kind="dataset", anonymous=anonymous)
  cached = _read_ref(source)
  if repository.is_offline():
    snapshot = _folder(source) / "snapshots" / cached
    if cached and all((snapshot / path).exists() for path in paths):
      say(f"offline: {name} comes from the cache, commit {cached[:12]}")
      return [snapshot / path for path in paths]
    raise HubError(_offline(source))
  commit, files = _listing(source)
  by_path = {file.path: file for file in files}
  if absent := [path for path in paths if path not in by_path]:
    raise HubError(f"{source} has no file {absent[0]} at {source.page}; its layout has changed.")
  snapshot = _fetch(source, commit, [by_path[path] for path in paths])
  _set_ref(source, commit)
  return [snapshot / path for path in paths]


def find_cached(name: str, revision: str = "", *, whole: bool = True) -> pathlib.Path | None:
  """The cached directory of a checkpoint of the hub, or None; asks nobody.

  A commit means itself; a branch or a tag means the commit that it stood for when it was last asked for.

  Args:
    name: ORG/NAME.
    revision: as in `checkpoint`.
    whole: whether it has to be complete; False = config.json is enough.
  """
  source = Repository(name, revision)
  commit = revision if repository.is_commit(revision) else _read_ref(source)
  snapshot = _folder(source) / "snapshots" / commit
  is_there = _is_complete(snapshot) if whole else (snapshot / "config.json").is_file()
  return snapshot if commit and is_there else None


def origin(directory: str | os.PathLike) -> dict[str, str] | None:
  """{"repo": ORG/NAME, "commit": hash} of a directory in the cache; None for any other."""
  snapshot = pathlib.Path(directory)
  folder = snapshot.parent.parent
  if not (repository.is_commit(snapshot.name) and snapshot.parent.name == "snapshots"
          and folder.name.startswith("models--")):
    return None
  return {"repo": folder.name.removeprefix("models--").replace("--", "/", 1), "commit": snapshot.name}


def _commit_of(source: Repository, here: pathlib.Path | None) -> str:
  """The commit to use: what the hub says, or, where it cannot be asked, what the cache has."""
  if repository.is_offline():
    if here is None:
      raise HubError(_offline(source))
    say(f"offline: {source.name} comes from the cache, commit {here.name[:12]}")
    return here.name
  try:
    return _listing(source, patient=here is None)[0]
  except Unreachable as error:
    if here is None:
      raise
    say(f"the hub cannot be reached ({error.reason}): {source.name} comes from the cache, commit {here.name[:12]}")
    return here.name


def _checkpoint_at(source: Repository, commit: str) -> pathlib.Path:
  """The snapshot of a commit, complete."""
  at_commit = Repository(source.name, commit)
  if repository.is_offline() or (commit == _read_ref(source) and find_cached(source.name, commit)):
    here = find_cached(source.name, commit)
    if here is None:
      raise HubError(_offline(source))
    return here
  _, files = _listing(at_commit)
  top = {file.path: file for file in files if "/" not in file.path}
  wanted = [file for file in top.values() if any(fnmatch.fnmatch(file.path, p) for p in _PATTERNS)]
  if INDEX not in top and SINGLE not in top:
    raise HubError(_no_weights(source, files))
  snapshot = _fetch(source, commit, wanted)
  names = [SINGLE]
  if INDEX in top:
    names = _shards(snapshot / INDEX)
    if absent := [name for name in names if name not in top]:
      raise HubError(f"{source}: {INDEX} names {absent[0]}, which {source.page} does not have; tell its owners.")
  _fetch(source, commit, [top[name] for name in names])
  _set_ref(source, commit)
  return snapshot


class Unreachable(HubError):
  """The hub did not answer."""

  def __init__(self, text: str, reason: str):
    super().__init__(text)
    self.reason = reason


def _listing(source: Repository, *, patient: bool = True) -> tuple[str, list[Remote]]:
  try:
    return source.listing(say, patient=patient)
  except Interrupted as error:
    raise Unreachable(
        f"{source} is not here, and the hub at {repository.endpoint()} cannot be reached ({error}); check the network "
        "or HF_ENDPOINT and start the same command again, or give a directory.", str(error)) from error


def _fetch(source: Repository, commit: str, files: Sequence[Remote]) -> pathlib.Path:
  """Downloads what is missing of these files and enters them in the snapshot of the commit, which is returned."""
  folder = _folder(source)
  snapshot = folder / "snapshots" / commit
  blobs = folder / "blobs"
  missing = [file for file in files if not _is_entered(snapshot, file)]
  download.fetch(source, commit, missing, blobs)
  for file in missing:
    target = snapshot / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(os.path.relpath(blobs / file.digest, target.parent))
    aside.replace(target)
  return snapshot


def _set_ref(source: Repository, commit: str) -> None:
  """Notes which commit the revision stands for, once that commit is complete: an offline run goes by it."""
  if not repository.is_commit(source.revision) and _read_ref(source) != commit:
    atomic_write_text(_ref(source), commit)


def _is_entered(snapshot: pathlib.Path, file: Remote) -> bool:
  entry = snapshot / file.path
  return entry.is_file() and entry.stat().st_size == file.size


def _is_complete(snapshot: pathlib.Path) -> bool:
  """Whether config, tokenizer and all weights are there; another program may have fetched only a part."""
  if not (snapshot / "config.json").is_file() or not any((snapshot / name).is_file() for name in _TOKENIZERS):
    return False
  if not (snapshot / INDEX).is_file():
    return (snapshot / SINGLE).is_file()
  return all((snapshot / name).is_file() for name in _shards(snapshot / INDEX))


def _shards(index: pathlib.Path) -> list[str]:
  try:
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise HubError(f"{index} is not an index of weights ({error!r}); give another checkpoint.") from error
  if bad := [name for name in names if "/" in name or not name.endswith(".safetensors")]:
    raise HubError(f"{index} names {bad[0]!r}, which is no safetensors file beside it; give another checkpoint.")
  return names


def _no_weights(source: Repository, files: Sequence[Remote]) -> str:
  others = sorted(file.path for file in files if any(fnmatch.fnmatch(file.path, p) for p in _OTHER_WEIGHTS))
  has = f"it has {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}" if others else "it has no weights at all"
  hint = "give the base model and train from that" if "adapter_model.safetensors" in others else (
      "pickles and other formats are not read: give a repository, or a revision, that has safetensors")
  return f"{source} holds neither {SINGLE} nor {INDEX} at {source.page} ({has}); {hint}."


def _offline(source: Repository) -> str:
  at = f" at revision {source.revision!r}" if source.revision else ""
  return (
      f"{source}{at} is not complete in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to ask the hub; "
      "unset it, or copy the cache of a machine that has it and set HF_HOME.")


def _folder(source: Repository) -> pathlib.Path:
  return pathlib.Path(constants.HF_HUB_CACHE) / f"{source.kind}s--{source.name.replace('/', '--')}"


def _ref(source: Repository) -> pathlib.Path:
  return _folder(source) / "refs" / (source.revision or constants.DEFAULT_REVISION)


def _read_ref(source: Repository) -> str:
  """The commit that the revision last stood for; '' where it was never asked for."""
  path = _ref(source)
  text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
  return text if repository.is_commit(text) else ""
