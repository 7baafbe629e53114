"""The tables and sentences of a plan."""

from collections import defaultdict
from collections.abc import Sequence

from hbpo_jax.planning import advice, counts
from hbpo_jax.planning.chips import GIB
from hbpo_jax.planning.decoding import SPREAD
from hbpo_jax.planning.estimate import EFFICIENCY, SEGMENT_S, Estimate
from hbpo_jax.reporting.tables import Table

_RESIDENT = {
    "params": "parameters of the trainer", "optimizer": "optimizer state", "sampler": "sampler's copy (publish)",
    "cache": "cache of the slots", "pool": "prompts and budget sentences", "batch": "rows of the step",
    "reference": "reference model, while it scores"}
_SHOWN = 12
_TIGHT = 0.95


def gib(n_bytes: float) -> str:
  """Bytes in GiB."""
  return f"{n_bytes / GIB:,.2f}"


def memory_table(made: Estimate) -> Table:
  """What stays on a device between programs."""
  rows = tuple((text, gib(getattr(made.resident, name))) for name, text in _RESIDENT.items()
               if getattr(made.resident, name) or name in ("params", "optimizer", "sampler"))
  return Table("memory of a device", ("between programs", "GiB"), rows, has_total=False)


def programs_table(made: Estimate) -> Table:
  """What lies on a device while each program runs."""
  hbm = made.job.topology.hbm_bytes
  rows = []
  for name, total in made.totals.items():
    c = made.compiled.get(name)
    how = "estimated" if c is None else f"{c.seconds:.0f} s" if c.ok else "out of memory" if c.needed else "failed"
    rows.append((name, gib(made.resident.beside(name)), gib(made.beyond[name]), gib(total), f"{total / hbm:.0%}", how))
  for phase, total in made.phase_peaks.items():
    rows.append((f"peak of the {phase} phase", "", "", gib(total), f"{total / hbm:.0%}", ""))
  return Table(
      f"GiB of a device while a program runs, of {gib(hbm)}",
      ("program", "arrays", "temporaries", "together", "of the device", "compiled"), tuple(rows), has_total=False)


def phases_table(made: Estimate) -> Table:
  """One step: FLOPs, bytes, bounds and the prediction of each phase."""
  n = made.job.topology.n_devices
  rows = []
  for name, cost in made.costs.items():
    bounds = made.bounds(name)
    rows.append((
        name, f"{cost.flops * n / 1e12:,.0f}", f"{cost.hbm_bytes / 1e9:,.0f}", f"{cost.network_bytes / 1e9:,.1f}",
        *(f"{bounds[kind]:,.2f}" for kind in ("compute", "memory", "network")), f"{made.bound_s(name):,.1f}",
        f"{made.predicted_s(name):,.1f}"))
  total = sum(made.costs.values(), counts.Cost())
  rows.append((
      "step", f"{total.flops * n / 1e12:,.0f}", f"{total.hbm_bytes / 1e9:,.0f}", f"{total.network_bytes / 1e9:,.1f}",
      "", "", "", f"{made.step_bound_s:,.1f}", f"{made.step_s:,.1f}"))
  return Table(
      "one step: TFLOP of all devices, GB and seconds of a device",
      ("phase", "TFLOP", "memory GB", "network GB", "compute s", "memory s", "network s", "at least s", "predicted s"),
      tuple(rows))


def collectives_table(made: Estimate) -> Table | None:
  """What the compiled programs exchange, the largest first; None where nothing was compiled."""
  merged: dict[tuple[str, str, str], list] = defaultdict(lambda: [0, 0, True])
  for name, c in made.compiled.items():
    for x in c.collectives:
      row = merged[name, x.kind, x.shape]
      row[0], row[1], row[2] = row[0] + x.times, row[1] + x.total_bytes, row[2] and x.exact
  if not merged:
    return None
  largest = sorted(merged.items(), key=lambda item: -item[1][1])[:_SHOWN]
  rows = tuple(
      (name, kind, shape if len(shape) < 50 else shape[:47] + "...", f"{'' if exact else 'about '}{times:,}",
       f"{n_bytes / 1e9:,.3f}") for (name, kind, shape), (times, n_bytes, exact) in largest)
  return Table(
      "collectives of a program's run that bring most to a device", ("program", "kind", "result", "times", "GB"), rows,
      has_total=False)


def kinds_table(made: Estimate) -> Table | None:
  """The compiled programs' collectives by kind."""
  merged: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
  for name, c in made.compiled.items():
    for x in c.collectives:
      merged[name, x.kind][0] += x.times
      merged[name, x.kind][1] += x.total_bytes
  rows = tuple((name, kind, f"{n:,}", f"{b / 1e9:,.3f}") for (name, kind), (n, b) in merged.items())
  return Table(
      "collectives of a program's run, by kind", ("program", "kind", "times", "GB to a device"), rows,
      has_total=False) if rows else None


def knobs_table(found: Sequence[advice.Knob]) -> Table | None:
  """What each knob would save; None without any."""
  rows = tuple((k.change, k.program, gib(k.saved), gib(k.total), "yes" if k.fits else "no", k.cost) for k in found)
  return Table(
      "what would save memory", ("change", "program", "GiB saved", "GiB then", "all fits", "but"), rows,
      has_total=False) if rows else None


def sweep_table(ranked: Sequence[Estimate]) -> Table:
  """A sweep's first candidates, and all that were compiled, in its order."""
  rows = []
  # Those that compiling moved down, too.
  for e in [*ranked[:_SHOWN], *(e for e in ranked[_SHOWN:] if e.compiled)]:
    sizes = e.job.mesh.shape
    rows.append((
        f"data {sizes['data']} x fsdp {sizes['fsdp']} x tensor {sizes['tensor']}",
        str(e.job.cfg.learner.microbatch_rows), e.job.cfg.model.remat, str(e.job.cfg.rollout.slots), f"{e.step_s:,.1f}",
        f"{e.step_bound_s:,.1f}", gib(e.peak[1]), e.peak[0], "yes" if e.fits else "no", "yes" if e.compiled else "no"))
  return Table(
      f"sweep: the best and the compiled of {len(ranked)}",
      ("mesh", "microbatch_rows", "remat", "slots", "predicted s", "at least s", "peak GiB", "at", "fits", "compiled"),
      tuple(rows), has_total=False)


def header(made: Estimate, where: str) -> list[str]:
  """What is planned."""
  job, d = made.job, made.decoding
  packed = "packed into" if job.cfg.learner.pack else "in"
  return [
      f"{job.topology}: {job.topology.n_chips} chips, {job.topology.n_devices} devices of "
      f"{gib(job.topology.hbm_bytes)} GiB, mesh {dict(job.mesh.shape)}",
      f"model: {where} ({job.arch.family}, {job.arch.n_layers} layers, width {job.arch.hidden_size})",
      f"step: {job.shape.n_queries} queries x {job.cfg.rollout.rollouts_per_query} responses, {packed} rows of "
      f"{job.n_columns:,} tokens; {job.n_minibatches} updates, together {d.n_micro} micro-batches of "
      f"{job.micro_rows} row{'s' * (job.micro_rows > 1)} on each device, {d.real_share:.0%} of it real tokens",
      f"decoding: {job.plan.row_buckets[0]} slots, {d.n_segments} segments of up to {job.plan.segment_steps} tokens, "
      f"{d.n_steps:,} steps; slots busy {d.utilisation:.0%}; "
      f"{d.column_steps / max(d.row_steps, 1):,.0f} cache columns read per slot and step",
      ""]


def assumptions(made: Estimate, prefix: str) -> list[str]:
  """Everything that the numbers rest on and that nothing here measured."""
  means = "its budget" if made.lengths.mean_tokens is None else f"{made.lengths.mean_tokens:g} tokens (--mean_tokens)"
  d = made.decoding
  lines = [
      f"lengths: log-normal, mean {means} before the cap, spread {SPREAD:g} in the logarithm; {d.mean_tokens:,.0f} "
      f"tokens on average, {d.truncated:.0%} at their cap. Early in training they may be longer: try --mean_tokens",
      f"prompts: {made.lengths.mean_prompt} tokens in decoding (--mean_prompt_tokens), the longest bucket in prefill",
      f"budget sentences: {made.job.n_prefix} tokens, {prefix}",
      f"speed: {EFFICIENCY['compute']:.0%} of peak FLOP/s, {EFFICIENCY['memory']:.0%} of memory and "
      f"{EFFICIENCY['network']:.0%} of network bandwidth, all three overlapping; round numbers, not measured",
      f"network: a collective runs at the {made.job.topology.links} links of the worst connected chip, "
      f"{made.job.topology.chip.link_gb_s:g} GB/s each way, without a latency of its own (which decoding split over "
      "tensor would feel most)",
      f"{SEGMENT_S * 1e3:g} ms of the host between segments; grading, data, checkpoints and evaluations are left out",
      counts.ASSUMED,
      "scoring and updates take every row of a micro-batch that is not empty to its last column"]
  if not made.compiled:
    lines.append("NOT COMPILED: temporaries and network bytes are estimates")
  return ["assumed:", *(f"  {line}" for line in lines)]


def verdict(made: Estimate) -> list[str]:
  """Whether it fits, what it costs, and what to do."""
  job, (program, total) = made.job, made.peak
  hbm, lines = job.topology.hbm_bytes, []
  for c in made.failed:
    lines.append(f"{c.name} did not compile: {c.error}")
  for c in made.compiled.values():
    lines += [f"{c.name}: {text}" for text in c.warnings]
    if c.needed:
      lines.append(f"{c.name}: out of memory: the compiler needs at least {gib(c.needed)} GiB besides its arguments")
  at = f"{gib(total)} of {gib(hbm)} GiB at {program}"
  if total > hbm:
    lines.append(f"DOES NOT FIT: {at}.")
  elif not made.fits:
    lines.append("DOES NOT COMPILE.")
  else:
    tight = ", tight: what the runtime and other programs need is not counted" if total > _TIGHT * hbm else ""
    lines.append(f"fits: at most {at}{tight}{'' if made.compiled else ' (not compiled)'}.")
  low, high = (made.tpu_hours(s) for s in (made.step_bound_s, made.step_s))
  lines.append(
      f"a step: about {made.step_s:,.0f} s, at least {made.step_bound_s:,.0f} s; {job.cfg.steps} steps on "
      f"{job.topology.n_chips} chips: about {high:,.0f} TPU-hours, at least {low:,.0f}.")
  return lines


def together_line(then: advice.Together | None) -> str:
  """The sentence about what would make it fit."""
  if then is None:
    return "No combination of these settings fits by these estimates; take a topology with more chips."
  return (
      f"By these estimates it fits with {' '.join(then.changes)} ({gib(then.total)} GiB at {then.program}, about "
      f"{then.step_s:,.0f} s a step); run the plan with them.")


def markdown(lines: Sequence[str], tables: Sequence[Table | None]) -> str:
  """plan.md."""
  parts = ["# Plan\n"]
  for table in tables:
    if table is not None:
      parts.append(f"## {table.title[:1].upper()}{table.title[1:]}\n\n{table.to_markdown()}")
  text = "\n".join(f"- {line.strip()}" for line in lines if line.strip())
  return "\n".join([parts[0], text + "\n", *parts[1:]])


