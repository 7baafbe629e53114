"""Compiles a step's programs for TPUs that are not there, each in a process of its own.

    python -m hbpo_jax.planning.compile SPEC.json NAME

prints one line of JSON about the program NAME of the Job in SPEC.json. The parent process stays on the CPU, and a
compiler that crashes takes nothing with it.
"""

from collections.abc import Callable, Mapping
import concurrent.futures
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

from ml_collections import config_dict

from hbpo_jax import config
from hbpo_jax.files import atomic_write_text
from hbpo_jax.models.architecture import Architecture, RopeScaling
from hbpo_jax.planning import hlo, memory
from hbpo_jax.planning.chips import Topology, parse_topology
from hbpo_jax.planning.hlo import Collective
from hbpo_jax.planning.job import Job, make_job

# For libtpu to imagine devices; it asks nothing of the network, and several processes may load it.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
INSTALL = 'python -m pip install "hbpo_jax[tpu-aot]"'
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of one program; bytes per device.

  seconds: that compiling took.
  argument, output, alias, temporary, code: of its memory analysis; alias is the output that takes an argument's place.
  needed: at least what it asks for besides its arguments, where it does not fit a device by itself; 0 where it does.
  error: the message of another failure; '' without one.
  collectives: of its optimized text, empty where it did not compile.
  kernels: names of its Pallas kernels.
  warnings: of the partitioner, such as an involuntary full rematerialisation.
  """
  name: str
  seconds: float = 0.0
  argument: int = 0
  output: int = 0
  alias: int = 0
  temporary: int = 0
  code: int = 0
  needed: int = 0
  error: str = ""
  collectives: tuple[Collective, ...] = ()
  kernels: tuple[str, ...] = ()
  warnings: tuple[str, ...] = ()

  @property
  def ok(self) -> bool:
    """Whether it compiled."""
    return not self.needed and not self.error

  @property
  def beyond_arguments(self) -> int:
    """What it needs besides its arguments: temporaries, outputs that take no argument's place, and its code."""
    return self.temporary + self.output - self.alias + self.code


def available() -> bool:
  """Whether libtpu, TPU's compiler, is installed."""
  return importlib.util.find_spec("libtpu") is not None


def compile_all(
    job: Job, turns: Mapping[str, int], *, n_processes: int = 1, progress: Callable[[Compiled], Any] = lambda c: None,
) -> dict[str, Compiled]:
  """What the compiler says of the programs, by name.

  Args:
    turns: by program, the turns of its loop whose number the run decides, as `programs.turns` assumes them.
    n_processes: at a time.
    progress: called with each as it is done.
  """
  with tempfile.TemporaryDirectory(prefix="hbpo_jax_plan_") as folder:
    spec = pathlib.Path(folder) / "job.json"
    atomic_write_text(spec, json.dumps(_to_json(job) | {"turns": dict(turns)}))
    done = {}
    with concurrent.futures.ThreadPoolExecutor(max(1, n_processes)) as threads:
      running = [threads.submit(_in_process, spec, name) for name in turns]
      for future in concurrent.futures.as_completed(running):
        compiled = future.result()
        done[compiled.name] = compiled
        progress(compiled)
  return {name: done[name] for name in turns}


def parse_out_of_memory(message: str, n_arguments: int = 0) -> int | None:
  """Bytes that a program asked for besides its arguments, from the compiler's refusal; None if that is of other things.

  Args:
    n_arguments: bytes of the arguments, which one of the two forms of the message includes.
  """
  if "Ran out of memory" not in message:
    return None
  if found := re.search(r"\(([\d.]+)([KMGT]?)B?\) exceeds available HBM", message):
    return int(float(found[1]) * _UNITS[found[2]])
  if found := re.search(r"Used ([\d.]+)([KMGT]?)B? of [\d.]+[KMGT]?B? hbm", message):
    return max(1, int(float(found[1]) * _UNITS[found[2]]) - n_arguments)
  return None


def parse_warnings(text: str) -> tuple[str, ...]:
  """What the partitioner complains about, each operation once: tensors that it replicates to reshard them."""
  found = re.findall(r"\[SPMD\] (Involuntary full rematerialization)[^%]*(%[\w.\-]+ = \w+\[[\d,]*\])?", text)
  return tuple(dict.fromkeys(f"{kind.lower()}: {op or 'an operation'}" for kind, op in found))


def to_json(compiled: Compiled) -> dict[str, Any]:
  """The line of JSON that the process prints."""
  return dataclasses.asdict(compiled)


def _in_process(spec: pathlib.Path, name: str) -> Compiled:
  root = str(pathlib.Path(__file__).resolve().parents[2])
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | ENVIRONMENT
  environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
  started = time.perf_counter()
  done = subprocess.run(
      [sys.executable, "-m", "hbpo_jax.planning.compile", str(spec), name], env=environment, capture_output=True,
      text=True, check=False)
  seconds = time.perf_counter() - started
  warnings = parse_warnings(done.stderr)
  lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
  if done.returncode or not lines:
    last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:] or ["no message"]
    return Compiled(name, seconds, error=f"the compiler's process ended with {done.returncode}: {last[0][:400]}")
  row = json.loads(lines[-1])
  row["collectives"] = tuple(Collective(**c) for c in row["collectives"])
  return Compiled(**(row | {"seconds": seconds, "warnings": warnings, "kernels": tuple(row["kernels"])}))


def _to_json(job: Job) -> dict[str, Any]:
  return {
      "config": config.to_json_dict(job.cfg), "architecture": dataclasses.asdict(job.arch),
      "topology": str(job.topology), "n_prefix": job.n_prefix}


def _from_json(spec: dict[str, Any]) -> Job:
  """The Job on a mesh of imagined devices."""
  from jax.experimental import topologies

  from hbpo_jax.models import sharding

  cfg, arch, topology, n_prefix = read_spec(spec)
  devices = topologies.get_topology_desc(
      str(topology), platform="tpu", **dict(topology.chip.options), **_bounds(topology)).devices
  return make_job(cfg, arch, topology, n_prefix, sharding.make_mesh(cfg.mesh, devices))


def read_spec(spec: dict[str, Any]) -> tuple[config.Config, Architecture, Topology, tuple[int, ...]]:
  """(settings, network, topology, tokens of the budget sentences) of a Job's JSON."""
  scaling = spec["architecture"]["rope_scaling"]
  arch = Architecture(**(spec["architecture"] | {"rope_scaling": RopeScaling(**scaling) if scaling else None}))
  return (
      config.from_config_dict(config_dict.ConfigDict(spec["config"])), arch, parse_topology(spec["topology"]),
      tuple(spec["n_prefix"]))


def _bounds(topology: Topology) -> dict[str, tuple[int, ...]]:
  """Chips per host, where the usual 2 x 2 x 1 do not divide the shape."""
  if all(n % 2 == 0 for n in topology.shape[:2]):
    return {}
  return {"chips_per_host_bounds": (1, 1, 1)}


def report(job: Job, name: str, turns: int = 1) -> Compiled:
  """Compiles one program of a Job on a Mesh, here; `turns` of its loop whose number the run decides."""
  import jax

  from hbpo_jax.planning import programs

  try:
    compiled = programs.lower(job, name).compile()
  except jax.errors.JaxRuntimeError as error:
    needed = parse_out_of_memory(str(error), memory.arguments(job, name))
    return Compiled(name, needed=needed) if needed else Compiled(name, error=str(error)[:400])
  m = compiled.memory_analysis()
  text = compiled.as_text()
  found = hlo.collectives(text, turns_if_unknown=turns)
  return Compiled(
      name, argument=m.argument_size_in_bytes, output=m.output_size_in_bytes, alias=m.alias_size_in_bytes,
      temporary=m.temp_size_in_bytes, code=m.generated_code_size_in_bytes, collectives=tuple(found),
      kernels=hlo.kernels(text))


def main(spec: str, name: str) -> None:
  """Prints the report on one program."""
  content = json.loads(pathlib.Path(spec).read_text(encoding="utf-8"))
  print(json.dumps(to_json(report(_from_json(content), name, content["turns"][name]))))


if __name__ == "__main__":
  main(*sys.argv[1:])
