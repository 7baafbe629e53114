"""Checkpoints of the training state, written by Orbax in the background; a damaged one is noticed and passed over.

A checkpoint holds two items, `state` (the arrays of TrainState) and `meta` (JSON of the caller's), and two kinds of
checksums: of every file, written before Orbax renames the finished directory into place, and of every array, taken
on the devices at the moment of `save`. Random keys are functions of (seed, step), so numbers are all their state.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp

import hbpo_jax
from hbpo_jax import distributed
from hbpo_jax.config import CheckpointConfig
from hbpo_jax.files import naming
from hbpo_jax.learning import survey
from hbpo_jax.structs import TrainState

ITEMS = ("state", "meta")
FOLDERS = ("checkpoints", "best")  # of a run, which hold one folder per step
CHECKSUMS = "checksums.json"
FORMAT = 1  # Of what lies in `meta`; checkpoints without it are of format 1.
_log = logging.getLogger(__name__)


def locate(path: str | os.PathLike) -> tuple[pathlib.Path, int] | None:
  """(the run's directory, the step) where a path is RUN/checkpoints/STEP or RUN/best/STEP, a checkpoint; else None."""
  folder = pathlib.Path(path).expanduser()
  known = folder.name.isdecimal() and folder.parent.name in FOLDERS and (folder / ITEMS[0]).is_dir()
  return (folder.parent.parent, int(folder.name)) if known else None


class DamagedCheckpointError(ValueError):
  """A checkpoint's files or arrays are not what was saved."""


class Checkpointer:
  """Saves to and restores from one directory. A context manager: leaving it waits for the last save."""

  def __init__(self, directory: str | os.PathLike, cfg: CheckpointConfig, *, must_exist: bool = False):
    """Opens, and unless must_exist creates, the directory; removes what a killed save has left.

    Args:
      directory: of the checkpoints, one folder per step.
      cfg: save_every and max_to_keep are read.
      must_exist: True = refuse a directory without checkpoints.
    Raises:
      FileNotFoundError: when must_exist and there is no checkpoint.
      ValueError: when max_to_keep is below 1.
    """
    self.directory = pathlib.Path(directory).absolute()
    self._cfg = cfg
    self._saving = -1
    _leave_telling_to_wait()
    if cfg.max_to_keep < 1:
      raise ValueError(f"checkpoint.max_to_keep={cfg.max_to_keep} keeps nothing; set it to at least 1.")
    if must_exist and not any(path.name.isdecimal() for path in self.directory.glob("*")):
      raise FileNotFoundError(f"{self.directory} holds no checkpoint; give the directory of a run that saved one.")
    self._manager = ocp.CheckpointManager(
        self.directory, item_names=ITEMS, options=ocp.CheckpointManagerOptions(
            max_to_keep=cfg.max_to_keep, cleanup_tmp_directories=True, enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums)))

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def steps(self) -> list[int]:
    """Steps with a finished checkpoint, oldest first."""
    return sorted(self._manager.all_steps())

  def due(self, step: int, *, last: int) -> bool:
    """Whether to save once `step` steps are done: every save_every, and always the last."""
    return step == last or (self._cfg.save_every > 0 and step % self._cfg.save_every == 0)

  def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> bool:
    """Starts saving and returns once the arrays are copied; the state may then be donated.

    Waits first for a save that is still on its way to disk.

    Args:
      step: steps done.
      state: the training state.
      meta: what else a resumed run needs, such as the data iterator's state; plain JSON values.
    Returns:
      False when a checkpoint of this step is there already; nothing is written then.
    Raises:
      ValueError: when meta is not JSON.
    """
    self.wait()
    if step in self._manager.all_steps():
      return False
    self._set_aside_incomplete()
    try:
      content = json.loads(json.dumps(
          {"format": FORMAT, "hbpo_jax": hbpo_jax.__version__, "step": step, "meta": meta, "arrays": _kinds(state),
           "sums": fingerprint(state)}, allow_nan=False))
    except (TypeError, ValueError) as error:
      raise ValueError(f"the checkpoint's meta is not plain JSON ({error}); convert its values first.") from error
    self._saving = step
    items = ocp.args.Composite(state=ocp.args.StandardSave(_stored(state)), meta=ocp.args.JsonSave(content))
    with self._storage_errors():
      return self._manager.save(step, args=items, force=True)

  def restore_latest(
      self, abstract_state: TrainState, *, check: Callable[[dict[str, Any]], Any] | None = None,
      scheduled_first: bool = False) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest good checkpoint, or None where there is none at all.

    A damaged checkpoint is logged and passed over for the one before it. Once an older one is found good, the
    damaged ones are moved to a sibling directory `..._damaged`, so that their steps can be saved again.

    Args:
      abstract_state: `Learner.abstract_state()`; its shardings may be of another mesh than the one that saved.
      check: called with meta before the arrays are read; may raise to refuse the checkpoint (another model, another
        seed), which ends the search.
      scheduled_first: whether those of every save_every steps go before newer ones, which a stop has left.
    Returns:
      (state, meta as given to `save`).
    Raises:
      ValueError: when there are checkpoints but all are damaged (names the directory and each one's fault), or when a
        good one does not fit abstract_state.
    """
    faults: dict[int, str] = {}
    scheduled = lambda step: scheduled_first and self.due(step, last=-1)
    for step in sorted(self.steps(), key=lambda step: (scheduled(step), step), reverse=True):
      try:
        self._check_files(step)
        content = self._read_meta(step)
        if check is not None:
          check(content["meta"])
        self._check_fit(step, abstract_state, content["arrays"])
        state = self._read_state(step, abstract_state, content["sums"])
      except (DamagedCheckpointError, OSError) as error:
        faults[step] = str(error)
        _log.warning("skipping the damaged checkpoint of step %d in %s: %s.", step, self.directory, error)
        continue
      self._move_away(list(faults))
      return state, content["meta"]
    if faults:
      listed = "; ".join(f"step {step}: {fault}" for step, fault in faults.items())
      raise ValueError(
          f"all checkpoints in {self.directory} are damaged ({listed}); restore the files, or delete the directory or "
          "give another --workdir to start over.")
    return None

  def restore_params(self, step: int, abstract_params: Any) -> Any:
    """The params of one checkpoint, without what else its state holds.

    Args:
      step: one of `steps()`.
      abstract_params: shapes, dtypes and shardings; the mesh may be another than the one that saved.
    Raises:
      ValueError: when the checkpoint is damaged or does not fit; names it.
    """
    folder = self.directory / str(step)
    try:
      self._check_files(step)
      content = self._read_meta(step)
      wanted = {f".params{name}": kind for name, kind in _kinds(abstract_params).items()}
      saved = {name: kind for name, kind in content["arrays"].items() if name.startswith(".params")}
      if wanted != saved:
        raise ValueError(
            f"{folder} holds params of another model ({len(saved)} arrays; here {len(wanted)}, or of other shapes or "
            "dtypes); its run.json and the base checkpoint do not belong together.")
      with ocp.PyTreeCheckpointer() as reader:
        params = reader.restore(folder / "state", args=ocp.args.PyTreeRestore(
            item={"params": abstract_params}, partial_restore=True,
            restore_args=ocp.checkpoint_utils.construct_restore_args({"params": abstract_params})))["params"]
      for name, value in fingerprint(params).items():
        if content["sums"].get(f".params{name}") != value:
          raise DamagedCheckpointError(f"array .params{name} does not match its checksum")
    except (DamagedCheckpointError, OSError) as error:
      raise ValueError(f"{folder} is damaged ({error}); give another step.") from error
    return params

  def wait(self) -> None:
    """Returns when all saves are on disk.

    Raises:
      OSError: when one could not be written; names the directory.
    """
    with self._storage_errors():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the saves and releases the background threads."""
    with self._storage_errors():
      self._manager.close()

  @contextlib.contextmanager
  def _storage_errors(self) -> Iterator[None]:
    """A context in which trouble with the disk is an OSError with a path; Orbax hides it in a ValueError."""
    try:
      with naming(self.directory):
        yield
    except ValueError as error:
      found = re.search(r"os_error_code='(\d+)'", str(error))
      if found is None:
        raise
      raise OSError(int(found[1]), os.strerror(int(found[1])), str(self.directory)) from error

  def _write_checksums(self) -> None:
    """Orbax's background thread calls this when a checkpoint's files are complete, before it gets its final name."""
    if not distributed.is_writer():
      return
    step = str(self._saving)
    folders = [p for p in self.directory.iterdir() if p.name == step or p.name.startswith(step + ".")]
    if len(folders) != 1:
      found = [p.name for p in folders]
      raise FileNotFoundError(f"{self.directory}: expected one folder of step {step}, found {found}.")
    sums = _file_checksums(folders[0])
    listed = {name: {"sha256": value, "bytes": (folders[0] / name).stat().st_size} for name, value in sums.items()}
    (folders[0] / CHECKSUMS).write_text(json.dumps(listed))

  def _set_aside_incomplete(self) -> None:
    """Moves checkpoints away that have lost a file or a part of one, so that none counts among max_to_keep.

    Else a save could remove the last good one. Only sizes are looked at: reading all would take minutes.
    """
    def is_incomplete(step: int) -> bool:
      folder = self.directory / str(step)
      try:
        listed = json.loads((folder / CHECKSUMS).read_text())
        return any(
            isinstance(row, dict) and (folder / name).stat().st_size != row["bytes"] for name, row in listed.items())
      except (ValueError, OSError):
        return True

    incomplete = distributed.from_writer(
        "the checkpoints' sizes", lambda: [step for step in self.steps() if is_incomplete(step)])
    for step in incomplete:
      _log.warning("the checkpoint of step %d in %s has lost a part; it is moved away.", step, self.directory)
    self._move_away(incomplete)

  def _check_files(self, step: int) -> None:
    """Finds damage before Orbax does, whose answer to it is pages of traceback. One process reads for all."""
    def fault():
      try:
        self._compare_files(step)
      except (DamagedCheckpointError, OSError) as error:
        return str(error)
      return None

    if found := distributed.from_writer(f"the files of checkpoint {step}", fault):
      raise DamagedCheckpointError(found)

  def _compare_files(self, step: int) -> None:
    folder = self.directory / str(step)
    try:
      expected = json.loads((folder / CHECKSUMS).read_text())
    except (ValueError, FileNotFoundError) as error:
      raise DamagedCheckpointError(f"{CHECKSUMS} is missing or not readable") from error
    found = _file_checksums(folder)
    if not isinstance(expected, dict) or not expected:
      raise DamagedCheckpointError(f"{CHECKSUMS} is not a list of files")
    # A version before the sizes wrote the bare sum.
    expected = {name: row.get("sha256") if isinstance(row, dict) else row for name, row in expected.items()}
    for name in sorted(expected):
      if name not in found:
        raise DamagedCheckpointError(f"{name} is missing")
      if found[name] != expected[name]:
        raise DamagedCheckpointError(f"{name} does not match its checksum")

  def _read_meta(self, step: int) -> dict[str, Any]:
    try:
      content = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    except (ValueError, RecursionError) as error:
      raise DamagedCheckpointError(f"its meta is not JSON ({error})") from error
    # Checksums that fit do not make it ours.
    if not isinstance(content, dict) or not all(isinstance(content.get(k), dict) for k in ("meta", "arrays", "sums")):
      raise DamagedCheckpointError("its meta is not that of a checkpoint")
    if (version := content.get("format", 1)) != FORMAT:
      raise ValueError(
          f"the checkpoint of step {step} in {self.directory} is of format {version!r}, written by hbpo_jax "
          f"{content.get('hbpo_jax', '?')}; this version reads format {FORMAT}. Use that version, or give another "
          "--workdir.")
    if content.get("step") != step:
      raise DamagedCheckpointError(f"its content is of step {content.get('step')!r}")
    return content

  def _check_fit(self, step: int, abstract_state: TrainState, saved: dict[str, str]) -> None:
    wanted = _kinds(abstract_state)
    for name in sorted(wanted.keys() | saved):
      if wanted.get(name) != saved.get(name):
        raise ValueError(
            f"the checkpoint of step {step} in {self.directory} does not fit this model or optimizer: {name} is "
            f"{saved.get(name, 'absent')} there, {wanted.get(name, 'absent')} here; use the settings that it was saved "
            "with, or give another --workdir.")

  def _read_state(self, step: int, abstract_state: TrainState, expected: dict[str, int]) -> TrainState:
    stored = self._manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(_stored(abstract_state))))["state"]
    state = abstract_state.replace(**stored)
    found = fingerprint(state)
    if wrong := sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name)):
      raise DamagedCheckpointError(f"array {wrong[0]} does not match its checksum")
    return state

  def _move_away(self, steps: list[int]) -> None:
    if not steps:
      return
    if distributed.is_writer():
      target = self.directory.with_name(self.directory.name + "_damaged")
      target.mkdir(exist_ok=True)
      for step in steps:
        n = sum(1 for _ in target.glob(f"{step}.*"))
        (self.directory / str(step)).rename(target / f"{step}.{n}")
    distributed.barrier("damaged checkpoints moved away")
    self._manager.reload()


def _stored(state: Any) -> dict[str, Any]:
  """The fields of a state that hold something, by name.

  An empty memory is left out, so that checkpoints from before there was one are read as they are.
  """
  fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
  return {name: value for name, value in fields.items() if name != "memory" or value}


def _leave_telling_to_wait() -> None:
  """Keeps the tracebacks from the terminal that Orbax and TensorStore print of a save that fails in the background."""
  for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(_is_news)
  if sys.unraisablehook is not _quiet_unraisable:
    _hooks.append(sys.unraisablehook)
    sys.unraisablehook = _quiet_unraisable


_hooks: list[Callable[[Any], Any]] = []  # The one before `_quiet_unraisable`.


def _quiet_unraisable(unraisable: Any) -> None:
  # The writes that were on their way with the one that failed end after the loop that waited for them.
  if unraisable.exc_type is not RuntimeError or str(unraisable.exc_value) != "Event loop is closed":
    _hooks[-1](unraisable)


def _is_news(record: logging.LogRecord) -> bool:
  """False for the tracebacks that Orbax logs of a save which failed in the background: `wait` raises what they tell."""
  told = "orbax" in record.pathname or "orbax-checkpoint-tmp" in record.getMessage()
  return record.levelno < logging.ERROR or not told


def fingerprint(tree: Any) -> dict[str, int]:
  """A checksum of every array by its path in the tree: an integer in [0, 2^32) that no sharding changes.

      sum_i mix(bits_i + 0x9E3779B9 * (i + 1)) mod 2^32      i = position in row-major order

  `mix` is a bijection of 32-bit words (MurmurHash3's last step), so a change of any single element changes the sum.
  """
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  sums = jax.device_get(_checksums(jax.tree.leaves(tree)))
  return {path: int(value) for path, value in zip(paths, sums, strict=True)}


@jax.jit
def _checksums(arrays: list[jax.Array]) -> list[jax.Array]:
  return [survey.checksum(x) for x in arrays]


def fingerprint_files(folder: str | os.PathLike) -> str:
  """What tells the weights of two checkpoints apart, hex: SHA-256 of the list of checksums.

  Raises:
    FileNotFoundError: when the list is missing, as the checkpoint was never finished.
  """
  return hashlib.sha256((pathlib.Path(folder) / CHECKSUMS).read_bytes()).hexdigest()


def _file_checksums(folder: pathlib.Path) -> dict[str, str]:
  """SHA-256 of every file of the items. Orbax still touches its own files beside them, and its commit markers."""
  sums = {}
  for item in ITEMS:
    for path in sorted((folder / item).rglob("*")):
      if path.is_file() and not path.name.startswith("commit_success"):
        with path.open("rb") as file:
          sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
  return sums


def _kinds(tree: Any) -> dict[str, str]:
  """dtype and shape of every (abstract) array, by its path."""
  return {
      jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in jax.tree_util.tree_leaves_with_path(tree)}
