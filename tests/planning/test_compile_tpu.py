"""The whole command with TPU's compiler, for chips that are not there.

    /tmp/tpu/bin/python -m pytest -m slow tests/planning/test_compile_tpu.py

in an environment with libtpu (tests/models/test_kernels_tpu.py says how to make one). What is not slow takes part in
`make test`, too, where libtpu is.
"""

import dataclasses
import json
import re

import pytest

from hbpo_jax import flags
from hbpo_jax.models import presets
from hbpo_jax.planning import chips, decoding, estimate, job, memory, programs
from hbpo_jax.planning import compile as compile_lib
from hbpo_jax.planning.estimate import Lengths
from tests import tpu

pytestmark = tpu.quick


def small(topology="v5e:2x4", **fields):
  """Two layers of the 1.5B model, short rows."""
  overrides = {
      "data.max_prompt_tokens": 128, "reward.max_response_tokens": 512, "rollout.budgets": (128, 256, 384, 512),
      "rollout.slots": 64, "rollout.queries": 16, "data.n_eval": 0, "learner.microbatch_rows": 16}
  overrides |= {name.replace("__", "."): value for name, value in fields.items()}
  cfg = flags.build(flags.load_config("r1_distill_qwen_1p5b"), overrides)
  arch = dataclasses.replace(presets.preset("r1_distill_qwen_1p5b"), n_layers=2, vocab_size=8192)
  return job.make_job(cfg, arch, chips.parse_topology(topology), (12, 13, 13, 13))


def faults(planned, said):
  """What the compiled update or scoring must not do, as sentences."""
  arch, found = planned.arch, [f"{said.name}: {text}" for text in (said.error, *said.warnings) if text]
  entries = {arch.vocab_size, arch.vocab_size // planned.tensor}
  widths = {arch.hidden_size, arch.hidden_size // planned.mesh.shape["fsdp"]}
  for c in said.collectives:
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", c.shape):
      sizes = {int(d) for d in dims.split(",") if d}
      if not sizes & entries:
        continue
      is_logits = not sizes & widths
      is_whole_head = dtype == "f32" and arch.hidden_size in sizes and c.kind in ("all-gather", "all-reduce")
      if is_logits or is_whole_head:
        found.append(f"{said.name}: {c.kind} of {dtype}[{dims}], {c.times} times, from {c.source}")
  share = f"f32[{arch.vocab_size // planned.tensor // 2},{arch.hidden_size // planned.mesh.shape['fsdp']}]"
  if said.name == "update" and ("collective-permute", share) not in {(c.kind, c.shape) for c in said.collectives}:
    found.append(f"update: the head's gradient does not go around in shares {share}")
  wanted = {"score": ["fwd"], "update": ["fwd", "dkv", "dq"]}[said.name]
  return found + [
      f"{said.name}: no splash kernel {part}" for part in wanted
      if not any(name.startswith(f"splash_mha_{part}") for name in said.kernels)]


def learning_faults(planned):
  """Of scoring and of an update."""
  said = compile_lib.compile_all(planned, {"score": 1, "update": 1})
  assert all(c.ok for c in said.values()), said
  return [fault for c in said.values() for fault in faults(planned, c)]


@pytest.mark.parametrize("tensor", [1, 2])
def test_scoring_and_updates_move_no_logits_and_no_whole_head(tensor):
  planned = small(mesh__tensor=tensor)
  arch = dataclasses.replace(planned.arch, hidden_size=512, mlp_size=1024, n_heads=4)
  assert not learning_faults(job.make_job(planned.cfg, arch, planned.topology, planned.n_prefix))


@pytest.mark.slow
def test_nor_do_those_of_the_paper():
  cfg = flags.build(flags.load_config("r1_distill_qwen_1p5b"), {})
  planned = job.make_job(
      cfg, presets.preset("r1_distill_qwen_1p5b"), chips.parse_topology("v5e:4x4"), (12, 13, 13, 13))
  assert not learning_faults(planned)


@pytest.mark.slow
def test_every_program_compiles_and_says_what_it_needs():
  planned = small(loss__kl_coef=0.1)
  said = compile_lib.compile_all(planned, programs.turns(planned, decoding.simulate(
      planned, mean_tokens=None, mean_prompt=64)))
  assert all(c.ok for c in said.values()), [c for c in said.values() if not c.ok]
  for name, c in said.items():
    known = memory.arguments(planned, name)
    assert 0.98 * known <= c.argument <= 1.3 * known + 4e6, (name, known, c.argument)
    assert c.temporary > 0 and not c.warnings
  params = 4 * 2 * planned.state.params["layers"]["gate"].size  # float32, gate of all layers twice over
  moved = {name: sum(x.total_bytes for x in c.collectives) for name, c in said.items()}
  assert moved["update"] > params / 2 and moved["decode"] < 1e6
  # Of micro-batches the run decides how many there are.
  assert all(x.exact for name in ("publish", "prefill") for x in said[name].collectives)
  assert not all(x.exact for x in said["update"].collectives)
  made = estimate.estimate(planned, Lengths(None, 64), said)
  assert made.fits and json.dumps(made.to_json())


@pytest.mark.slow
def test_out_of_memory_is_an_answer():
  planned = small(
      learner__microbatch_rows=0, learner__pack=False, reward__max_response_tokens=8192, rollout__queries=64)
  said = compile_lib.compile_all(planned, {"update": 1})["update"]
  assert said.needed > planned.topology.hbm_bytes and not said.error and not said.ok
  assert not estimate.estimate(planned, Lengths(None, 64), {"update": said}).fits


@pytest.mark.slow
def test_single_chips_and_v4_with_both_cores():
  for topology in ("v5e:1x1", "v4:2x2x1"):
    planned = small(topology)
    said = compile_lib.compile_all(planned, {"decode": 1})["decode"]
    assert said.ok, said
