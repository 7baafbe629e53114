"""The compiler's process: what is sent, what comes back, and what is made of its refusals and complaints."""

import json
import pathlib
import subprocess

import jax
import pytest

from hbpo_jax.config import LossConfig
from hbpo_jax.models import presets
from hbpo_jax.planning import chips, decoding, hlo, programs
from hbpo_jax.planning import compile as compile_lib
from tests.planning.tiny_jobs import make_cfg, make_job

GIB = chips.GIB


@pytest.mark.parametrize("message, n_arguments, expected", [
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.25G) exceeds "
     "available HBM (15.75G).", 3 * GIB, int(16.25 * GIB)),
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.50G of "
     "15.75G hbm. Exceeded hbm capacity by 2.75G.", 3 * GIB, int(15.5 * GIB)),
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (2.5T) exceeds "
     "available HBM (15.75G).", 0, int(2.5 * 1024 * GIB)),
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. It should not be possible to run out.", 0, None),
    ("INTERNAL: Mosaic failed to compile TPU kernel", 0, None)])
def test_refusals(message, n_arguments, expected):
  assert compile_lib.parse_out_of_memory(message, n_arguments) == expected


def test_complaints_of_the_partitioner():
  line = ("E0000 00:00:1764.5 spmd_partitioner.cc:613] [SPMD] Involuntary full rematerialization. The compiler was not "
          "able to go from sharding {a} to {b} without doing a full rematerialization of the tensor for HLO operation: "
          "%gather.3 = f32[16,1024,96]{2,1,0} gather(%p0, %p1), offset_dims={2}\n")
  text = "W0000 harmless\n" + line + line
  assert compile_lib.parse_warnings(text) == ("involuntary full rematerialization: %gather.3 = f32[16,1024,96]",)
  assert compile_lib.parse_warnings("W0000 harmless\n") == ()


def test_a_job_survives_the_way_to_the_process():
  made = make_job(make_cfg(), arch=presets.preset("llama3p2_1b"))
  spec = json.loads(json.dumps(compile_lib._to_json(made)))
  cfg, arch, topology, n_prefix = compile_lib.read_spec(spec)
  assert (cfg, arch, str(topology), n_prefix) == (made.cfg, made.arch, "v5e:1x1", made.n_prefix)


def test_what_the_process_says_comes_back(monkeypatch):
  said = compile_lib.Compiled(
      "decode", argument=7, temporary=5, output=4, alias=3, code=2,
      collectives=(hlo.Collective("all-gather", "f32[8]", 28, 3, True, "jit(f)/x"),))
  environments = []

  def run(command, env, **_):
    environments.append(env)
    spec = json.loads(pathlib.Path(command[-2]).read_text())
    assert (command[-1], spec["topology"], spec["turns"]) == ("decode", "v5e:1x1", {"decode": 2})
    return subprocess.CompletedProcess(
        command, 0, "a line of libtpu\n" + json.dumps(compile_lib.to_json(said)) + "\n", "")

  monkeypatch.setattr(subprocess, "run", run)
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
  seen = []
  made = compile_lib.compile_all(make_job(), {"decode": 2}, progress=seen.append)["decode"]
  assert made == seen[0] and made.ok and made.beyond_arguments == 5 + 4 - 3 + 2
  assert made.collectives == said.collectives and made.collectives[0].total_bytes == 84
  assert environments[0]["JAX_PLATFORMS"] == "cpu" and environments[0]["TPU_SKIP_MDS_QUERY"] == "1"
  assert "XLA_FLAGS" not in environments[0]


def test_a_crash_is_reported_and_takes_nothing_along(monkeypatch):
  def run(command, **_):
    if command[-1] == "score":
      return subprocess.CompletedProcess(command, -6, "", "Check failed: something\n")
    return subprocess.CompletedProcess(command, 0, json.dumps(compile_lib.to_json(compile_lib.Compiled("update"))), "")

  monkeypatch.setattr(subprocess, "run", run)
  made = compile_lib.compile_all(make_job(), {"score": 1, "update": 1})
  assert made["update"].ok and not made["score"].ok
  assert made["score"].error == "the compiler's process ended with -6: Check failed: something"


@pytest.mark.parametrize("name", ["publish", "prefill", "decode", "score", "update"])
def test_programs_lower_for_the_cpu_as_well(name):
  made = make_job(n_devices=8)
  said = compile_lib.report(made, name, turns=3)
  assert said.ok and said.temporary > 0 and said.argument > 0
  assert all(isinstance(c, hlo.Collective) for c in said.collectives)
  if name == "update":
    assert said.alias > 0, "the state is donated"
    params = sum(x.size for x in jax.tree.leaves(made.state.params))
    assert sum(c.total_bytes for c in said.collectives) >= 3 * params * 4 * 7 / 8, "in each micro-batch"
    open_ended = [c.times for c in said.collectives if not c.exact]
    assert open_ended and all(times % 3 == 0 for times in open_ended)
  if name == "decode":
    assert sum(c.total_bytes for c in said.collectives) < 10_000, "rows are independent"


def test_which_programs():
  assert make_job().programs == ("publish", "prefill", "decode", "score", "update")
  with_kl = make_cfg(loss=LossConfig(kl_coef=0.1))
  made = make_job(with_kl)
  assert made.programs == ("publish", "prefill", "decode", "score", "reference", "update")
  d = decoding.simulate(made, mean_tokens=None, mean_prompt=5)
  assert programs.turns(made, d) == {
      "publish": 1, "prefill": 1, "decode": 2, "score": d.n_micro, "reference": d.n_micro,
      "update": round(d.n_micro / 2)}
