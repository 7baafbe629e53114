"""Does the run fit on a TPU, how long would a step take, and what would the run cost? Asked without a TPU.

  python -m hbpo_jax.plan --config=r1_distill_qwen_1p5b --topology=v5e:4x4

Compiles publish, prefill, decode, scoring and update for the topology's chips with libtpu, for the configuration's
model, mesh, batch and lengths, without weights and without device time; where libtpu is missing it estimates instead.
Prints what lies in a device's memory, what each phase of a step costs at least and probably, and, where it does not
fit, which setting saves how much. With --workdir it also writes WORKDIR/plan.json and WORKDIR/plan.md; with --json the
contents of plan.json are all that standard output gets. With --sweep it tries splits of the mesh, micro-batches,
slots and model.remat, and compiles the best few. Exit code 0 if it fits, 1 if not, 2 if the settings cannot be planned.
"""

from hbpo_jax import flags

if __name__ == "__main__":
  flags.show_help("plan")  # Before the imports below, which take seconds.

from collections.abc import Sequence
import dataclasses
import functools
import json
import math
import pathlib
import sys
from typing import Any

import jax

from hbpo_jax import commands
from hbpo_jax.config import Config
from hbpo_jax.files import atomic_write_text, json_value
from hbpo_jax.planning import advice, chips, estimate, job, programs, show, sweep
from hbpo_jax.planning import compile as compile_lib
from hbpo_jax.planning.estimate import Estimate, Lengths
from hbpo_jax.reporting.console import Console

_OPTIONS = {o.name: bool(o.metavar) for o in commands.COMMANDS["plan"].options}  # and whether they take a value


@dataclasses.dataclass(frozen=True)
class Options:
  """The command's own flags, as text; '' where not given."""
  topology: str = ""
  mean_tokens: str = ""
  mean_prompt_tokens: str = ""
  jobs: str = "1"
  sweep: bool = False
  json: bool = False


def split_options(argv: Sequence[str]) -> tuple[Options, list[str]]:
  """(the command's own flags, all other arguments)."""
  found: dict[str, str | bool] = {}
  rest, todo = [], list(argv)
  while todo:
    argument = todo.pop(0)
    name, equals, text = argument.lstrip("-").partition("=")
    if argument.startswith("-") and _OPTIONS.get(name) is False:
      found[name] = text.lower() not in ("false", "0")
    elif argument.startswith("-") and _OPTIONS.get(name):
      found[name] = text if equals or not todo or todo[0].startswith("-") else todo.pop(0)
    else:
      rest.append(argument)
  return Options(**found), rest  # pyright: ignore[reportArgumentType]


def make_lengths(options: Options, cfg: Config) -> Lengths:
  """The assumed lengths.

  Raises:
    ValueError: when a flag is not a positive number.
  """
  mean_tokens = _positive("mean_tokens", options.mean_tokens) if options.mean_tokens else None
  mean_prompt = int(_positive("mean_prompt_tokens", options.mean_prompt_tokens or str(
      max(1, cfg.data.max_prompt_tokens // 4))))
  if mean_prompt > cfg.data.max_prompt_tokens:
    raise ValueError(
        f"--mean_prompt_tokens={mean_prompt} exceeds config.data.max_prompt_tokens={cfg.data.max_prompt_tokens}; "
        "give at most that.")
  return Lengths(mean_tokens, mean_prompt)


def _positive(name: str, text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not (value >= 1 and math.isfinite(value)):
    raise ValueError(f"--{name}={text!r} is not a number of at least 1; write --{name}=1000, for example.")
  return value


def main(cfg: Config, workdir: str, options: Options = Options()) -> None:
  """Plans, prints, and writes WORKDIR/plan.json and WORKDIR/plan.md, where a workdir is given.

  Raises:
    SystemExit: 1 when it does not fit.
    ValueError: when the settings or the flags cannot be planned.
  """
  jax.config.update("jax_platforms", "cpu")  # Also where there is a TPU: planning leaves it alone.
  if not options.topology:
    raise ValueError(f"--topology is missing; give chips and shape, such as v5e:4x4 ({', '.join(chips.CHIPS)}).")
  topology = chips.parse_topology(options.topology)
  lengths, n_processes = make_lengths(options, cfg), int(_positive("jobs", options.jobs))
  arch, where, directory = job.find_architecture(cfg)
  n_prefix, how = job.find_prefix(cfg, arch, directory)
  planned = job.make_job(cfg, arch, topology, n_prefix)
  with Console(dataclasses.replace(cfg.log, live=False), 1, file=sys.stderr if options.json else None) as console:
    can_compile = compile_lib.available()
    if not can_compile:
      console.message(f"libtpu, TPU's compiler, is not installed; to compile, run {compile_lib.INSTALL}\n")
    ranked: list[Estimate] = []
    if options.sweep:
      ranked = _swept(planned, lengths, n_processes if can_compile else 0, console)
      made = ranked[0]
    else:
      made = estimate.estimate(planned, lengths)
      if can_compile:
        made = estimate.estimate(planned, lengths, compile_lib.compile_all(
            planned, programs.turns(planned, made.decoding), n_processes=n_processes,
            progress=functools.partial(_progress, console)))
    content = _write(made, ranked, where, how, workdir, console)
  if options.json:
    print(json.dumps(content))
  if not made.fits:
    sys.exit(1)


def _swept(planned: job.Job, lengths: Lengths, n_processes: int, console: Console) -> list[Estimate]:
  """The sweep's ranking; nothing is compiled with 0 processes."""
  ranked = sweep.rank(planned, lengths)
  if not ranked:
    raise ValueError(
        f"--sweep: no split of the {planned.topology.n_devices} devices of {planned.topology} goes with "
        f"config.rollout.queries={planned.cfg.rollout.queries}; change it, or the topology.")
  console.message(f"sweep: {len(ranked)} combinations counted, {sum(e.fits for e in ranked)} fit by estimate")
  if n_processes:
    ranked = sweep.compile_best(
        ranked, n_processes=n_processes, progress=lambda j, c: _progress(console, c, f"{dict(j.mesh.shape)}: "))
  return ranked


def _progress(console: Console, compiled: compile_lib.Compiled, prefix: str = "") -> None:
  said = "compiled" if compiled.ok else "out of memory" if compiled.needed else "failed"
  console.message(f"{prefix}{compiled.name}: {said} after {compiled.seconds:.0f} s")


def _write(
    made: Estimate, ranked: list[Estimate], where: str, how: str, workdir: str, console: Console) -> dict[str, Any]:
  """Prints the plan, and writes it where there is a workdir; returns the contents of plan.json."""
  tables = [
      show.memory_table(made), show.programs_table(made), show.phases_table(made), show.kinds_table(made),
      show.collectives_table(made)]
  if ranked:
    tables.insert(0, show.sweep_table(ranked))
  header, assumed, verdict = show.header(made, where), show.assumptions(made, how), show.verdict(made)
  knobs = [] if made.fits else advice.knobs(made)
  if not made.fits and not made.failed:
    tables.append(show.knobs_table(knobs))
    verdict.append(show.together_line(advice.together(made)))
  console.message("")
  console.header(header)
  for table in tables:
    if table is not None:
      console.table(table)
  for line in [*assumed, "", *verdict]:
    console.message(line)
  content = made.to_json() | {
      "assumed": [line.strip() for line in assumed[1:]], "verdict": verdict,
      "knobs": [dataclasses.asdict(k) for k in knobs],
      "sweep": [{
          "mesh": dict(e.job.mesh.shape), "microbatch_rows": e.job.cfg.learner.microbatch_rows,
          "remat": e.job.cfg.model.remat, "slots": e.job.cfg.rollout.slots, "fits": e.fits,
          "compiled": bool(e.compiled), "step_s": e.step_s,
          "peak_bytes": e.phase_peaks} for e in ranked]}
  content = json_value(content)
  if workdir:
    root = pathlib.Path(workdir)
    atomic_write_text(root / "plan.json", json.dumps(content, indent=2) + "\n")
    atomic_write_text(root / "plan.md", show.markdown([*header, *verdict, *assumed], tables))
    console.message(f"see {root / 'plan.md'}")
  return content


def cli(argv: Sequence[str] | None = None) -> None:
  """Runs the command with these arguments; None means the process's."""
  own, others = split_options(sys.argv[1:] if argv is None else argv)
  flags.run(functools.partial(main, options=own), name="plan", argv=others, needs_workdir=False)


if __name__ == "__main__":
  cli()
