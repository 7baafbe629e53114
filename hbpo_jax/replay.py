"""Repeats an update that was not finite, from its dump alone, and shows where it goes wrong.

  python -m hbpo_jax.replay runs/mine/dumps/step_000012_m1
  python -m hbpo_jax.train --config=... --workdir=runs/mine --replay=runs/mine/dumps/step_000012_m1   (the same)

Exit code 0 when every number is that of the dump bit for bit, 1 when one differs, 2 when the dump cannot be read. The
settings are the dump's; --config.field=value changes one, for example model.compute_dtype=float32, to see what helps.
"""

from hbpo_jax import flags

if __name__ == "__main__":
  flags.show_help("replay")  # Before the imports below, which take seconds.

from collections.abc import Mapping, Sequence
import dataclasses
import math
import sys
from typing import Any

from absl import flags as absl_flags
import jax
from ml_collections import config_flags
import numpy as np

from hbpo_jax import assemble, config, hub, run_info, validation, versions
from hbpo_jax.config import Config, MeshConfig
from hbpo_jax.learning import dumps, guards, survey
from hbpo_jax.learning.learner import Learner
from hbpo_jax.models import sharding, weights
from hbpo_jax.models.architecture import Architecture, RopeScaling
from hbpo_jax.structs import TrainState

_N_WORST = 8  # Tokens that are listed.


def facts(cfg: Config, model: assemble.Model) -> dict[str, Any]:
  """What a dump holds of its run, plain JSON: all that `run` needs besides the minibatch and the state."""
  return {
      "config": config.to_json_dict(cfg), "architecture": dataclasses.asdict(model.arch),
      "model": str(model.directory), "mesh": {axis: int(size) for axis, size in model.mesh.shape.items()},
      "device": model.mesh.devices.flat[0].device_kind, "processes": jax.process_count(),
      "git": run_info.git_state(flags.configs_dir().parent / "hbpo_jax"), "versions": versions.installed()}


def run(path: str, overrides: Sequence[str] = (), source: str | None = None) -> bool:
  """Repeats the update of a dump and prints what it finds; whether all of it is that of the dump, bit for bit.

  Args:
    path: directory of the dump.
    overrides: arguments such as --config.model.compute_dtype=float32.
    source: a config whose differences from the dump's are listed; its values are not used.
  Raises:
    FileNotFoundError, ValueError: when the dump cannot be read, or does not fit the devices.
  """
  dump = dumps.read(path)
  recorded, missing = _read_config(dump)
  cfg = _override(recorded, overrides)
  print(f"{dump.path}: step {dump.step}, minibatch {dump.minibatch}")
  for line in _differences(recorded, cfg, missing, source):
    print(line)
  learner = _make_learner(dump, cfg)
  for line in _surroundings(dump, learner):
    print(line)
  state = dump.state(learner.abstract_state())
  batch = learner.place(dump.batch)
  # The data that the host refused are not in the minibatch; they are taken over.
  entries = [e for e in dump.entries if e.name in guards.OF_THE_HOST] + guards.examine(learner, state, batch)
  worst = _worst_tokens(learner, state, dump)
  # Consumes the state.
  _, metrics = learner.update(state, batch, np.float32(dump.forced))
  metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
  same = [*_compare_metrics(dump.metrics, metrics), *_compare_entries(dump.entries, entries)]
  print("lowest log-probabilities under the trainer:")
  for line in worst:
    print(f"  {line}")
  print("reproduced bit for bit" if all(same) else f"not reproduced: {same.count(False)} of {len(same)} numbers differ")
  return all(same)


def is_asked(argv: Sequence[str]) -> bool:
  """Whether a command line of `train` asks for a replay."""
  return any(a.partition("=")[0] in ("--replay", "-replay") for a in argv)


def parse(argv: Sequence[str]) -> tuple[str, list[str], str | None]:
  """(dump, overrides, config) of a command line of this command, or of `train` with --replay.

  Raises:
    ValueError: when it is not understood.
  """
  values, overrides, todo = {}, [], [a for a in argv if not flags.wants_traceback([a])]
  while todo:
    argument = todo.pop(0)
    flag, equals, text = argument.partition("=")
    name = flag.lstrip("-")
    if flag.startswith("-") and name in ("replay", "config", "workdir"):
      if not equals and (not todo or todo[0].startswith("-")):
        raise ValueError(f"{flag} has no value; write {flag}=value.")
      values[name] = text if equals else todo.pop(0)
    elif flag.startswith("-") and name.removeprefix("no").startswith("config."):
      overrides.append(argument)
    elif not flag.startswith("-") and "replay" not in values:
      values["replay"] = argument
    else:
      raise ValueError(f"argument {argument!r} is not understood; write python -m hbpo_jax.replay RUN/dumps/NAME.")
  if "replay" not in values:
    raise ValueError("no dump is named; write python -m hbpo_jax.replay RUN/dumps/NAME.")
  return values["replay"], overrides, values.get("config")


def _read_config(dump: dumps.Dump) -> tuple[Config, list[str]]:
  """(the dump's settings, names of those that did not exist when it was written and have their default)."""
  cd, table = config.to_config_dict(Config()), config.field_table()
  flat = config.flatten(dump.meta["config"])
  if unknown := sorted(flat.keys() - table.keys()):
    written = dump.meta["versions"].get("hbpo_jax", "that wrote it")
    raise ValueError(
        f"{dump.path} has the setting config.{unknown[0]}, which this version does not know; use version {written}.")
  for name, value in flat.items():
    parent, _, leaf = name.rpartition(".")
    (config.get(cd, parent) if parent else cd)[leaf] = tuple(value) if isinstance(value, list) else value
  return config.from_config_dict(cd), sorted(table.keys() - flat.keys())


def _override(cfg: Config, overrides: Sequence[str]) -> Config:
  values = absl_flags.FlagValues()
  config_flags.DEFINE_config_dict(
      "config", config.to_config_dict(cfg), flag_values=values, sys_argv=["replay", *overrides])
  try:
    values(["replay", *overrides])
  except (absl_flags.Error, AttributeError, TypeError, ValueError) as error:
    raise ValueError(f"{' '.join(overrides)} is not understood ({error}); write --config.field=value.") from error
  changed: Any = values["config"].value
  return config.from_config_dict(changed)


def _differences(recorded: Config, used: Config, missing: Sequence[str], source: str | None) -> list[str]:
  lines = [f"config.{name} is newer than the dump; its default is used" for name in missing]
  lines += [
      f"config.{name}={new!r} instead of the dump's {old!r}" for name, old, new in config.differences(recorded, used)]
  if source is not None:
    there = config.from_config_dict(flags.load_config(source))
    lines += [f"config.{name}={old!r} as in the dump; --config={source} has {other!r}"
              for name, old, other in config.differences(recorded, there)]
  return lines


def _make_learner(dump: dumps.Dump, cfg: Config) -> Learner:
  """The dump's learner, on a mesh like its own if there are devices for it; with adapters, its base is read again."""
  fields: dict[str, Any] = dict(dump.meta["architecture"])
  scaling = fields.pop("rope_scaling")
  arch = Architecture(**fields, rope_scaling=RopeScaling(**scaling) if scaling else None)
  shape = dump.meta["mesh"]
  n = math.prod(shape.values())
  if n <= jax.device_count():
    mesh = sharding.make_mesh(MeshConfig(**shape), jax.devices()[:n])
  else:
    validation.validate(cfg, n_devices=jax.device_count(), arch=arch)
    mesh = sharding.make_mesh(cfg.mesh)
  learner = Learner(arch, cfg, mesh)
  if cfg.lora.rank:
    directory = hub.checkpoint(cfg.model.path, cfg.model.revision)
    learner.freeze(weights.load(directory, arch, mesh, param_dtype=assemble.base_dtype(cfg)))
  return learner


def _surroundings(dump: dumps.Dump, learner: Learner) -> list[str]:
  """Lines on what is not as it was when the dump was written: bits may differ with it."""
  mesh = learner.mesh
  there = {**dump.meta["versions"], "device": dump.meta["device"], "mesh": dump.meta["mesh"],
           "processes": dump.meta["processes"]}
  here = {**versions.installed(), "device": mesh.devices.flat[0].device_kind,
          "mesh": {axis: int(size) for axis, size in mesh.shape.items()}, "processes": jax.process_count()}
  return [f"{name}: {here.get(name, 'absent')} here, {there.get(name, 'absent')} where the dump was written"
          for name in sorted(there.keys() | here) if there.get(name) != here.get(name)]


def _compare_metrics(recorded: Mapping[str, float], found: Mapping[str, float]) -> list[bool]:
  same = []
  for name in sorted(recorded.keys() | found.keys()):
    old, new = recorded.get(name), found.get(name)
    same.append(old is not None and new is not None and (old == new or (math.isnan(old) and math.isnan(new))))
    if name in ("loss", "grad_norm") or not same[-1]:
      print(f"{name}: {new}" + (", as recorded" if same[-1] else f", recorded as {old}"))
  return same


def _compare_entries(recorded: Sequence[survey.Entry], found: Sequence[survey.Entry]) -> list[bool]:
  """Whether each array is the recorded one, bit for bit; prints all gradients, and what is not finite or differs."""
  before = {e.name: e for e in recorded}
  if bad := survey.nonfinite(list(found)):
    print(f"first tensor that is not finite: {bad[0]}")
  print("elements that are not finite:")
  same = []
  for entry in found:
    same.append(before.get(entry.name) == entry)
    if entry.n_nonfinite or not same[-1] or entry.name.startswith("gradient"):
      note = "" if same[-1] else ", not as recorded"
      print(f"  {entry.name}: {entry.n_nonfinite:,} of {entry.n:,}, largest of the others {entry.largest:g}{note}")
  gone = before.keys() - {e.name for e in found}
  for name in sorted(gone):
    print(f"  {name}: absent, but recorded")
  return same + [False] * len(gone)


def _worst_tokens(learner: Learner, state: TrainState, dump: dumps.Dump) -> list[str]:
  """Lines on the tokens with the lowest log-probability, those that are not finite first."""
  batch = dump.batch
  logp_RC = np.asarray(jax.device_get(learner.score(state.params, learner.place(batch))))
  keys_RC = np.where(batch.completion_mask_RC, np.where(np.isfinite(logp_RC), logp_RC, -np.inf), np.inf)
  prompt = batch.tokens_RT.shape[1] - batch.completion_mask_RC.shape[1]
  lines, advantage_RC = [], np.broadcast_to(np.asarray(batch.advantage_RC), logp_RC.shape)
  for flat in np.argsort(keys_RC, axis=None, kind="stable")[:_N_WORST]:
    r, c = np.unravel_index(int(flat), keys_RC.shape)
    if not batch.completion_mask_RC[r, c]:
      break
    others = {"old": batch.logp_old_RC, "sampler": batch.logp_sampler_RC, "reference": batch.logp_ref_RC}
    more = "".join(f", {name} {x[r, c]:g}" for name, x in others.items() if x is not None)
    lines.append(
        f"row {r}, column {prompt + c}: token {batch.tokens_RT[r, prompt + c]}, log-probability "
        f"{logp_RC[r, c]:g}{more}, advantage {advantage_RC[r, c]:g}")
  return lines


def cli(argv: Sequence[str] | None = None) -> None:
  """Runs the command with these arguments; None means the process's.

  Raises:
    SystemExit: 0 when the update was reproduced bit for bit, 1 when not, 2 after an error of the user's.
  """
  arguments = list(sys.argv[1:] if argv is None else argv)
  flags.show_help("replay", arguments)
  with flags.one_line_errors(arguments):
    assemble.keep_compiled_programs()
    same = run(*parse(arguments))
  sys.exit(0 if same else 1)


if __name__ == "__main__":
  cli()
