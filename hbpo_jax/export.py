"""Makes a Hugging Face checkpoint of a training run, and pushes it to the hub.

  python -m hbpo_jax.export runs/r1 --out=exported                    the newest good checkpoint of a run
  python -m hbpo_jax.export runs/r1/best --out=exported               the best step that was evaluated
  python -m hbpo_jax.export runs/r1/checkpoints/500 --out=exported --dtype=bfloat16
  python -m hbpo_jax.export exported --push=ORG/NAME                  pushes what was exported

A run with `lora.rank` gives the merged model, and its adapter for `peft` in DIR/adapter. It works on the CPU, unless
JAX_PLATFORMS says otherwise.
"""

from hbpo_jax import flags

if __name__ == "__main__":
  flags.show_help("export")  # Before the imports below, which take seconds.

import argparse
from collections.abc import Mapping, Sequence
from concurrent import futures
import dataclasses
import json
import os
import pathlib
import shlex
import sys
from typing import Any

import jax

from hbpo_jax import assemble, bucket, distributed, hub, run_info
from hbpo_jax import config as config_lib
from hbpo_jax.config import Config, LoraConfig, MeshConfig, ModelConfig
from hbpo_jax.learning import checkpoint
from hbpo_jax.models import architecture, lora, sharding, weights
from hbpo_jax.reporting import model_card, tables
from hbpo_jax.reporting.console import Console

ADAPTER = "adapter"  # Folder beside, and in a repository below, the merged model.
_PACKAGE = pathlib.Path(__file__).resolve().parent
_LOOK_S = 20.0  # How often the processes of a job meet while one of them pushes.


def cards(
    settings: Mapping[str, Any], base: model_card.Base, **facts: Any) -> dict[str, str]:
  """README.md of the export, under '', and with `lora.rank` of the adapter, under 'adapter'.

  Args:
    settings: nested, of the run.
    base: what it began with.
    facts: as `model_card.make` takes them.
  """
  facts = {"git": run_info.git_state(_PACKAGE)} | facts
  made = {"": model_card.make(settings, base, **facts)}
  if settings["lora"]["rank"]:
    made[ADAPTER] = model_card.make(settings, base, **facts, adapter=True)
  return made


def cards_of_run(cfg: Config, directory: pathlib.Path | None, steps: int, **facts: Any) -> dict[str, str]:
  """`cards` of a run that is under way, whose model began as the checkpoint in `directory`, or (None) anew."""
  base = model_card.Base() if directory is None else model_card.base_of(directory)
  return cards(config_lib.to_json_dict(cfg), base, steps=steps, name=cfg.checkpoint.push, **facts)


def check_push(cfg: Config) -> None:
  """Raises ValueError unless `checkpoint.push` is empty or can work; asked before anything is loaded."""
  if cfg.checkpoint.push and distributed.is_writer():
    hub.check_repository("config.checkpoint.push", cfg.checkpoint.push)


def update_cards(root: pathlib.Path, made: Mapping[str, str]) -> None:
  """Puts new cards into WORKDIR/export and WORKDIR/adapter."""
  model_card.update(root / "export", made[""])
  if ADAPTER in made:
    model_card.update(root / ADAPTER, made[ADAPTER])


def push_run(cfg: Config, root: pathlib.Path, console: Console) -> None:
  """Pushes WORKDIR/export, and the adapter if there is one, to `checkpoint.push`; a failure is a message only.

  Every process calls it; the first one pushes, and the others do not tire of waiting.
  """
  if not (name := cfg.checkpoint.push):
    return
  console.message(f"pushing {root / 'export'} to {name}")
  with futures.ThreadPoolExecutor(1) as thread:
    running = thread.submit(_push_all, root / "export", root / ADAPTER, name, private=cfg.checkpoint.push_private) if (
        distributed.is_writer()) else None
    while not distributed.from_writer("the push", lambda: running is None or bool(
        futures.wait([running], timeout=_LOOK_S).done)):
      pass
  if running is None:
    return
  try:
    console.message(f"pushed: {running.result()}")
  except (hub.HubError, ValueError) as error:
    command = [*["python", "-m", "hbpo_jax.export"], str(root / "export"), f"--push={name}"]
    command += ["--private"] if cfg.checkpoint.push_private else []
    console.message(f"{error}\nThe run is complete. To push it again:\n  {shlex.join(command)}")


def _push_all(directory: pathlib.Path, adapter: pathlib.Path, name: str, **options: Any) -> str:
  address = hub.push(directory, name, **options)
  if (adapter / "adapter_config.json").is_file() and adapter.parent != directory:
    address = hub.push(adapter, name, folder=ADAPTER, **options)
  return address


@dataclasses.dataclass(frozen=True)
class Source:
  """What is to be exported.

  run: its directory.  steps: of the checkpoints to try, the wanted one first.  folder: that holds them.
  """
  run: pathlib.Path
  folder: pathlib.Path
  steps: tuple[int, ...]


def find(path: str) -> Source | None:
  """The checkpoints that a path means; None for a finished export.

  Args:
    path: RUN, RUN/checkpoints, RUN/best, RUN/checkpoints/STEP, RUN/best/STEP, or an export.
  Raises:
    FileNotFoundError: when it is none of these, or a run without a checkpoint.
  """
  given = pathlib.Path(path).expanduser()
  if found := checkpoint.locate(given):
    return Source(found[0], given.parent, (found[1],))
  if _is_export(given):
    return None
  folder = given if given.name in checkpoint.FOLDERS else given / checkpoint.FOLDERS[0]
  steps = sorted((int(p.name) for p in folder.glob("*") if checkpoint.locate(p)), reverse=True)
  if not steps:
    raise FileNotFoundError(
        f"{path!r} is neither a run with a checkpoint, nor RUN/best, RUN/checkpoints/STEP or RUN/best/STEP, nor an "
        f"export; give one of them{_listed(folder)}.")
  return Source(folder.parent, folder, tuple(steps))


def export(source: Source, out: pathlib.Path, *, dtype: str = "", name: str = "") -> pathlib.Path:
  """Writes the checkpoint of a run as a Hugging Face model to `out`, which is returned.

  Args:
    source: of `find`; a damaged checkpoint is said and passed over for the next of its steps.
    out: new directory, or an export that is replaced.
    dtype: of the tensors; '' = each one's in the model that the run began with.
    name: ORG/NAME that the card speaks of; '' where it is not known.
  Raises:
    FileNotFoundError, ValueError: when a file is missing, every checkpoint is damaged, or `out` holds something else.
  """
  settings = run_info.read_config(source.run)
  directory = hub.checkpoint(*assemble.base_of(source.run))
  arch = architecture.from_hf_config(directory)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  # What training froze is merged and stored as precisely as it was read.
  cfg = Config(model=ModelConfig(compute_dtype=settings["model"]["compute_dtype"]))
  learner, params, step = _restore(source, cfg, directory, arch, mesh)
  base = model_card.base_of(directory)
  made = cards(settings, base, steps=step, name=name, **_measured(source, step, settings))
  weights.export(learner.whole(params), arch, directory, out, dtype=dtype or None, card=made[""])
  if ADAPTER in made:
    adapters: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings["lora"].items()}
    lora.export(params, arch, LoraConfig(**adapters), base.name or settings["model"]["path"], out / ADAPTER,
                card=made[ADAPTER])
  print(f"exported step {step} of {source.run} to {out}")
  return out


def _restore(source: Source, cfg: Config, directory: pathlib.Path, arch: Any, mesh: Any) -> tuple[Any, Any, int]:
  faults = []
  for step in source.steps:
    try:
      return *assemble.load_trained(cfg, source.folder / str(step), directory, arch, mesh), step
    except ValueError as error:
      if not isinstance(error.__cause__, (checkpoint.DamagedCheckpointError, OSError)) or len(source.steps) == 1:
        raise
      print(f"passed over: {error}", file=sys.stderr)
      faults.append(step)
  raise ValueError(f"all checkpoints in {source.folder} are damaged (steps {faults}); restore the files.")


def _measured(source: Source, step: int, settings: Mapping[str, Any]) -> dict[str, Any]:
  """What is known of the worth of these weights: the summary of a finished run, or the numbers of its best step."""
  summary = source.run / "summary.json"
  if summary.is_file() and step == settings["steps"]:
    return {"summary": json.loads(summary.read_text(encoding="utf-8"))}
  best = source.run / "best" / "best.json"
  if source.folder.name == "best" and best.is_file():
    found = json.loads(best.read_text(encoding="utf-8"))
    if found["step"] == step:
      return {"note": f"The best step that was evaluated, {step}: accuracy {tables.percent(found['accuracy'])}, "
                      f"{tables.number(found['tokens'])} tokens per response."}
  return {}


def _is_export(path: pathlib.Path) -> bool:
  return (path / "config.json").is_file() and any(
      (path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))


def _listed(folder: pathlib.Path) -> str:
  exports = [p for p in (folder.parent / "export",) if _is_export(p)]
  return f", such as {exports[0]}" if exports else ""


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """The arguments: source, out, dtype, push, private, revision, traceback; what they mean is in `commands.COMMANDS`.

  Raises:
    ValueError: when they are not understood.
  """
  parser = flags.Parser("export")
  parser.add_argument("source", metavar="RUN_OR_CHECKPOINT")
  parser.add_argument("--out", default="", metavar="DIR")
  parser.add_argument("--dtype", default="", choices=["bfloat16", "float32"])
  parser.add_argument("--push", default="", metavar="ORG/NAME")
  parser.add_argument("--private", action="store_true")
  parser.add_argument("--revision", default="", metavar="BRANCH")
  arguments = parser.parse_args(argv)
  if (arguments.private or arguments.revision) and not arguments.push:
    raise ValueError("--private and --revision belong to a push; give --push=ORG/NAME, or leave them out.")
  return arguments


def main(arguments: argparse.Namespace) -> None:
  """Exports and pushes as the arguments say.

  Raises:
    FileNotFoundError, ValueError: when something is missing or damaged, or the hub refuses; names the remedy.
  """
  if bucket.is_url(arguments.out):
    raise ValueError(f"--out={arguments.out} is no directory; give one, and copy it to the bucket.")
  if arguments.push:
    hub.check_repository("--push", arguments.push)  # Before an hour of work.
  source = find(arguments.source)
  if source is None:
    if arguments.out or arguments.dtype or not arguments.push:
      raise ValueError(
          f"{arguments.source!r} is an export already: give --push=ORG/NAME without --out and --dtype, or a run.")
    directory = pathlib.Path(arguments.source).expanduser()
    adapter = (directory.parent if directory.name == "export" else directory) / ADAPTER  # WORKDIR holds both
    for folder in (directory, adapter):
      model_card.put_name(folder, arguments.push)
  else:
    if not arguments.out:
      raise ValueError("--out is missing; give the directory that the export goes to.")
    directory = export(source, pathlib.Path(arguments.out).expanduser(), dtype=arguments.dtype, name=arguments.push)
    adapter = directory / ADAPTER
  if arguments.push:
    address = _push_all(directory, adapter, arguments.push, private=arguments.private, revision=arguments.revision)
    print(f"pushed: {address}")


def cli(argv: Sequence[str] | None = None) -> None:
  """Runs the command with these arguments; None means the process's.

  Raises:
    SystemExit: 0 after --help, 2 after an error of the user's.
  """
  arguments = list(sys.argv[1:] if argv is None else argv)
  flags.show_help("export", arguments)
  if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")  # A training run may hold the accelerator.
  with flags.one_line_errors(arguments):
    parsed = parse(arguments)
    with bucket.reading(parsed.source, "RUN_OR_CHECKPOINT", with_units=True) as parsed.source:
      main(parsed)


if __name__ == "__main__":
  cli()
