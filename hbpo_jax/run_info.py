"""What a run is made of: run.json, and how its profile differs from the paper."""

from collections.abc import Mapping, Sequence
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from typing import Any

import jax

import hbpo_jax
from hbpo_jax import config, distributed, flags, versions
from hbpo_jax.files import atomic_write_text, parse_json

FORMAT = 1  # Of run.json.


def describe_profile(cfg: config.Config) -> list[str]:
  """Lines that say where the run leaves the paper: one heading, then one line per profile-governed field.

  A field is listed when its value is not the paper's, or not that of the named profile (the config or the command
  line changed it). Settings that no profile governs, such as budgets or learning rate, are not listed.
  """
  table = config.field_table()
  edited = flags.edited_from_profile(cfg)
  governed = {name for row in config.PROFILES.values() for name in row}
  lines = []
  for name in table:
    value, paper = config.get(cfg, name), table[name].default
    if name not in governed or (value == paper and name not in edited):
      continue
    named = config.PROFILES[cfg.profile].get(name, paper)
    also = f", profile {cfg.profile}: {named!r}" if name in edited and named != paper else ""
    lines.append(f"  {name} = {value!r} (paper: {paper!r}{also})")
  if not lines:
    return [f"profile {cfg.profile}: the paper's settings"]
  return [f"profile {cfg.profile}, differing from the paper in:", *lines]


def write_run_json(workdir: str | os.PathLike, cfg: config.Config, mesh: jax.sharding.Mesh,
                   extra: Mapping[str, Any] | None = None, changes: Sequence[Mapping[str, Any]] = ()) -> None:
  """Writes WORKDIR/run.json, whole or not at all: settings, versions, devices, mesh, git commit, command line.

  A rerun (a resumed run) replaces the file and keeps the starts before it under `earlier_starts`. In a run of several
  processes only the first writes.

  Args:
    workdir: existing or new directory.
    cfg: the settings.
    mesh: the device mesh of the run.
    extra: more entries of plain JSON values.
    changes: of `Changes.at`; those of earlier starts stay before them, under `changes`.
  Raises:
    ValueError: when `extra` repeats an entry, or an existing run.json cannot be read.
  """
  if jax.process_index() != 0:
    return
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / "run.json"
  now = datetime.datetime.now(datetime.UTC)
  entries = {
      "format": FORMAT,
      "hbpo_jax": hbpo_jax.__version__,
      "started": now.isoformat(timespec="seconds"),
      "command": shlex.join(sys.argv),
      "earlier_starts": _earlier_starts(path),
      "changes": _join_changes(path, changes),
      "git": git_state(pathlib.Path(__file__).resolve().parent),
      "profile_differences": describe_profile(cfg),
      "config": config.to_json_dict(cfg),
      "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
      "devices": _devices(mesh),
      "platform": platform.platform(),
      "versions": versions.installed(),
  }
  if repeated := sorted(set(entries) & set(extra or {})):
    raise ValueError(f"extra={repeated[0]!r} is already an entry of run.json; choose another name.")
  atomic_write_text(path, json.dumps(entries | dict(extra or {}), indent=2, allow_nan=False) + "\n")


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
  """The settings of a run, nested, as its run.json holds them.

  Raises:
    FileNotFoundError: when there is no run.json.
    ValueError: when it is damaged.
  """
  path = pathlib.Path(workdir) / "run.json"
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; give the directory of a training run.")
  found = _read(path).get("config")
  if not isinstance(found, dict):
    raise ValueError(f"{path} is damaged (it has no settings); restore it from a copy.")
  return found


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    found = parse_json(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path} is damaged ({error!r}); restore it from a copy.") from error
  if not isinstance(found, dict):
    raise ValueError(f"{path} is damaged (it is no JSON object); restore it from a copy.")
  return found


def read_origin(workdir: str | os.PathLike) -> dict[str, str] | None:
  """{"repo": ORG/NAME, "commit": hash} of a run's base model, as its run.json holds it; None if not of the hub."""
  path = pathlib.Path(workdir) / "run.json"
  return _read(path).get("model_origin") if path.is_file() else None


def first_revision(workdir: str | os.PathLike, cfg: config.Config) -> str:
  """The hub revision to load: the commit that this run began with, else model.revision.

  A branch may have moved since, and a resumed run goes on from what it began with.
  """
  def read() -> str:
    origin = read_origin(workdir)
    if origin is None or origin["repo"] != cfg.model.path:
      return cfg.model.revision
    asked = read_config(workdir)["model"]
    same = (asked["path"], asked["revision"]) == (cfg.model.path, cfg.model.revision)
    return origin["commit"] if same else cfg.model.revision

  return distributed.from_writer("the revision of the model", read)


def git_state(folder: pathlib.Path) -> dict[str, Any] | None:
  """The commit of the checkout that holds `folder`, and whether files differ from it; None outside a checkout."""
  def git(*arguments: str) -> subprocess.CompletedProcess:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)

  try:
    # An installed package may lie inside a checkout of something else, such as a virtual environment in a project.
    if git("ls-files", "--error-unmatch", "__init__.py").returncode != 0:
      return None
    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no")
  except (FileNotFoundError, subprocess.TimeoutExpired):
    return None
  if commit.returncode != 0:
    return None
  return {"commit": commit.stdout.strip(), "dirty": bool(changes.stdout.strip())}


def _earlier_starts(path: pathlib.Path) -> list[dict[str, str]]:
  if not path.exists():
    return []
  try:
    before = parse_json(path.read_bytes())
    return [*before["earlier_starts"], {"started": before["started"], "command": before["command"]}]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is not a run.json of this program; remove it or choose another --workdir.") from error


def _join_changes(path: pathlib.Path, changes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """Those of earlier starts and these, each once; `_earlier_starts` has found the file whole."""
  earlier = json.loads(path.read_text(encoding="utf-8")).get("changes", []) if path.exists() else []
  return [*earlier, *(c for c in json.loads(json.dumps(list(changes))) if c not in earlier)]


def _devices(mesh: jax.sharding.Mesh) -> dict[str, Any]:
  device = mesh.devices.flat[0]
  return {"platform": device.platform, "kind": device.device_kind, "used": int(mesh.devices.size),
          "present": jax.device_count(), "processes": jax.process_count()}


# Settings that may change between the attempts of one run without changing what it learns, by dotted prefix.
_FREE_ON_RESUME = (
    "model.path", "model.revision", "model.remat", "data.n_eval", "data.eval_", "data.data_dir", "eval.", "mesh.",
    "grading.", "checkpoint.", "distributed.", "log.", "alarms.", "sft.", "learner.microbatch_rows", "learner.pack",
    "learner.logprob_chunk", "learner.row_tokens", "learner.attention_kernel", "learner.nonfinite",
    "learner.max_nonfinite", "learner.max_dumps")


@dataclasses.dataclass(frozen=True)
class Change:
  """A setting that is not as in the checkpoint: its dotted name, the two values, whether it changes what is learnt."""
  name: str
  was: Any
  now: Any
  breaking: bool

  def __str__(self) -> str:
    return f"config.{self.name}={self.now!r} (was {self.was!r})"


def compare(cfg: config.Config, saved: Mapping[str, Any]) -> list[Change]:
  """The settings in which an attempt differs from a checkpoint, in the order of the settings.

  Args:
    cfg: the settings of this attempt.
    saved: nested dict of the settings that the checkpoint was saved under.
  """
  changes = []
  for name, field in config.field_table().items():
    here, there = config.get(cfg, name), _nested(saved, name, field.default)
    there = tuple(there) if isinstance(there, list) else there
    if here != there and name != "checkpoint.allow_changes":
      longer = name == "steps" and cfg.optimizer.schedule == "constant"
      changes.append(Change(name, there, here, breaking=not longer and not name.startswith(_FREE_ON_RESUME)))
  return changes


class Changes:
  """What differs from the checkpoint that a run goes on from; nothing, until `check` is called.

  Attributes:
    found: of the checkpoint that was checked last.
    contents: digest of what a setting stands for, by the setting's name: another one changes what is learnt, even where
      the setting is the same.
  """

  def __init__(self, cfg: config.Config, contents: Mapping[str, str] | None = None):
    self._cfg = cfg
    self.contents = dict(contents or {})
    self.found: list[Change] = []

  def check(self, saved: Mapping[str, Any], contents: Mapping[str, str] | None = None) -> None:
    """Compares with the settings of a checkpoint.

    Args:
      contents: of the checkpoint; what one of the two does not know is not compared.
    Raises:
      ValueError: when something differs that changes what is learnt and checkpoint.allow_changes does not name it;
        gives all of them with both values, and the remedy.
    """
    there = dict(contents or {})
    differs = [n for n in self.contents if n in there and there[n] != self.contents[n]]
    of = lambda value, digest: f"{value} (contents {digest})"
    self.found = [c for c in compare(self._cfg, saved) if c.name not in differs] + [
        Change(n, of(_nested(saved, n, ""), there[n]), of(config.get(self._cfg, n), self.contents[n]), breaking=True)
        for n in differs]
    allowed = self._cfg.checkpoint.allow_changes
    refused = [c for c in self.found if c.breaking and c.name not in allowed and "all" not in allowed]
    if refused:
      harmless = [str(c) for c in self.found if not c.breaking]
      also = f" ({', '.join(harmless)} would be harmless.)" if harmless else ""
      raise ValueError(
          f"{', '.join(map(str, refused))}: the checkpoint in this workdir was trained otherwise, and this changes "
          "what is learnt; set it back, give another --workdir to start a new run, or go on with the change by "
          f"--config.checkpoint.allow_changes={','.join(c.name for c in refused)}.{also}")

  def lines(self) -> list[str]:
    """For the reader: harmless changes, and those that were allowed."""
    kinds = {
        False: "settings changed since the checkpoint, harmless",
        True: "settings changed as allowed, which changes what is learnt"}
    by_kind = {kind: ", ".join(str(c) for c in self.found if c.breaking == kind) for kind in kinds}
    return [f"{text}: {by_kind[kind]}" for kind, text in kinds.items() if by_kind[kind]]

  def at(self, step: int) -> list[dict[str, Any]]:
    """For run.json: a row per change, with the steps that were done before it."""
    return [{"step": step, "setting": c.name, "was": c.was, "now": c.now, "breaking": c.breaking} for c in self.found]


def _nested(tree: Mapping[str, Any], name: str, default: Any) -> Any:
  """The entry of a dotted name; the default where it does not exist, as a setting newer than the checkpoint has none.

  A new setting's default is what runs did before there was a choice.
  """
  for part in name.split("."):
    if not isinstance(tree, Mapping) or part not in tree:
      return default
    tree = tree[part]
  return tree
