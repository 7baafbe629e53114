"""Every program of the sampler compiles for a TPU that is not there, at the paper's widths.

    /tmp/tpu/bin/python -m pytest -m slow tests/rollout/test_tpu.py

in an environment with libtpu (tests/models/test_kernels_tpu.py says how to make one). As a script it reports each
program; with --whole all 28 layers of the 1.5B model, for which two cores need a few minutes.
"""

import argparse
import json
import sys

from tests import tpu

pytestmark = tpu.marks


def test_the_sampler_compiles_for_v5e():
  reports = tpu.reports(__file__, timeout=1500)
  decode = [r for r in reports if r["kind"] == "decode"]
  assert [r["sizes"] for r in decode] == [[512, 0]], "the kernel is ragged: one number of rows, one length"
  assert len([r for r in reports if r["kind"] == "prefill"]) == 4
  for report in reports:
    if report["kind"] in ("decode", "prefill"):
      assert report["n_kernels"] > 0
      # Decoding neither fetches weights nor exchanges caches: rows are independent.
      if report["kind"] == "decode":
        assert report["gathered_bytes"] < 1e6
        assert report["temporary_bytes"] < report["argument_bytes"] / 20, "the cache is never copied"


def main():
  """Prints a report of each program, one JSON object a line."""
  import dataclasses
  import re

  import jax
  from jax.experimental import topologies
  import jax.numpy as jnp

  from hbpo_jax import config
  from hbpo_jax.models import presets, sharding
  from hbpo_jax.models.publish import Publisher
  from hbpo_jax.rollout import sampling
  from hbpo_jax.rollout.programs import Programs
  from hbpo_jax.rollout.shape import Shape, make_layout, make_plan

  parser = argparse.ArgumentParser()
  parser.add_argument("--whole", action="store_true")
  parser.add_argument("--topology", default="v5e:2x4")
  parser.add_argument("--slots", type=int, default=0)
  args = parser.parse_args()
  devices = topologies.get_topology_desc(args.topology, platform="tpu").devices
  mesh = sharding.make_mesh(config.MeshConfig(), devices)
  arch = presets.preset("r1_distill_qwen_1p5b")
  if not args.whole:
    arch = dataclasses.replace(arch, n_layers=3, vocab_size=8192)
  cfg = config.RolloutConfig(slots=args.slots)
  layout = make_layout(cfg, mesh, "bfloat16")
  shape = Shape(
      n_queries=64, n_prompt_slots=1024, n_rollouts=4, caps=(4096,) * 4, n_prefix=(10, 11, 11, 11), count_prefix=True,
      prefix_has_loss=True)
  plan = make_plan(shape, mesh.size, cfg, layout)
  whole = sharding.replicated(mesh)
  setting = jax.eval_shape(lambda: sampling.make_sampling(1.0, 1.0, 0, (1,)))
  setting = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), setting)
  programs = Programs(
      arch, mesh, layout, shape, plan, params=Publisher(arch, mesh, layout, gather=True).abstract(), sampling=setting,
      progress=lambda done, total: print(f"{done} of {total}", file=sys.stderr, flush=True))
  sizes = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}
  for kind in ("prefill", "decode", "compact"):
    for size, program in getattr(programs, kind).items():
      text, memory = program.as_text(), program.memory_analysis()
      gathered = re.findall(r"= (\w+)\[([\d,]*)\]\S* (?:all-gather|all-reduce|collective-permute|all-to-all)", text)
      print(json.dumps({
          "kind": kind, "sizes": [size] if isinstance(size, int) else list(size), "layout": str(layout.decode_kernel),
          "n_kernels": text.count("tpu_custom_call"),
          "gathered_bytes": sum(
              sizes.get(dtype, 4) * int(jnp.prod(jnp.array([int(n) for n in dims.split(",") if n] or [1])))
              for dtype, dims in gathered),
          "argument_bytes": memory.argument_size_in_bytes, "output_bytes": memory.output_size_in_bytes,
          "alias_bytes": memory.alias_size_in_bytes, "temporary_bytes": memory.temp_size_in_bytes}), flush=True)


if __name__ == "__main__":
  main()
