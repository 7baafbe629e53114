"""Collectives of a program's text: kinds, bytes, and how often they run; hand-written text, and a real program's."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import pytest

from hbpo_jax.config import MeshConfig
from hbpo_jax.models import sharding
from hbpo_jax.planning import hlo

LOOPS = """\
HloModule step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%inner_cond (p: (u32[], f32[8,4])) -> pred[] {
  %p = (u32[]{:T(128)}, f32[8,4]{1,0}) parameter(0)
  %limit = u32[] constant(9)
  %i = u32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%inner_body (p.1: (u32[], f32[8,4])) -> (u32[], f32[8,4]) {
  %p.1 = (u32[], f32[8,4]{1,0}) parameter(0)
  %two = u32[] constant(2)
  %i.1 = u32[] get-tuple-element(%p.1), index=0
  %x.1 = f32[8,4]{1,0} get-tuple-element(%p.1), index=1
  %moved = f32[8,4]{1,0} collective-permute(%x.1), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %next = u32[] add(%i.1, %two)
  ROOT %tuple.1 = (u32[], f32[8,4]{1,0}) tuple(%next, %moved)
}

%outer_body (p.2: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p.2 = (s32[], f32[8,4]{1,0}) parameter(0)
  %one = u32[] constant(1)
  %x.2 = f32[8,4]{1,0} get-tuple-element(%p.2), index=1
  %whole = bf16[32,4]{1,0} all-gather(%x.2), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %start = (u32[], f32[8,4]{1,0}) tuple(%one, /*index=1*/%x.2)
  %loop = (u32[], f32[8,4]{1,0}) while(%start), condition=%inner_cond, body=%inner_body
  ROOT %tuple.2 = (s32[], f32[8,4]{1,0}) tuple(%x.2, %x.2)
}

%outer_cond (p.3: (s32[], f32[8,4])) -> pred[] {
  %p.3 = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %unknown = pred[] custom-call(%p.3), custom_call_target="x"
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], f32[8,4]{1,0}) tuple(%zero, %x)
  %layers = (s32[], f32[8,4]{1,0}) while(%init), condition=%outer_cond, body=%outer_body%ANNOTATION%
  %y = f32[8,4]{1,0} get-tuple-element(%layers), index=1
  %reduced = (f32[8,4]{1,0}, f32[]) all-reduce(%y, %y), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%reduced), index=0
}
"""


def by_kind(text, **options):
  return {c.kind: c for c in hlo.collectives(text, **options)}


def test_loops_multiply():
  annotation = ', backend_config={"known_trip_count":{"n":"28"}}'
  found = by_kind(LOOPS.replace("%ANNOTATION%", annotation))
  gather, permute, reduce = found["all-gather"], found["collective-permute"], found["all-reduce"]
  # bfloat16 [32, 4] over 4 devices: 3 of its 4 parts come from others. 28 turns.
  assert (gather.times, gather.bytes, gather.exact) == (28, 32 * 4 * 2 * 3 // 4, True)
  # From 1 in steps of 2 while below 9: 4 turns in each of the 28.
  assert (permute.times, permute.bytes) == (28 * 4, 8 * 4 * 4)
  assert permute.total_bytes == 28 * 4 * 8 * 4 * 4
  # Two arrays, there and back.
  assert (reduce.times, reduce.bytes) == (1, int((8 * 4 + 1) * 4 * 2 * 3 / 4))
  assert gather.shape == "bf16[32,4]"


def test_a_loop_of_unknown_length_is_assumed_and_said():
  found = by_kind(LOOPS.replace("%ANNOTATION%", ""), turns_if_unknown=64)
  assert found["all-gather"].times == 64 and not found["all-gather"].exact
  assert found["collective-permute"].times == 4 * 64
  assert found["all-reduce"].exact


def entry(*lines):
  return "ENTRY %main (x: f32[8]) -> f32[8] {\n" + "\n".join(f"  {line}" for line in lines) + "\n}\n"


@pytest.mark.parametrize("groups, n", [
    ("{{0,1}}", 2), ("{{0,1,2,3},{4,5,6,7}}", 4), ("[1,8]<=[8]", 8), ("[4,2]<=[2,4]T(1,0)", 2),
    ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", 4), ("mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
    ("mesh['axis_0'=8] {'axis_0':(1)2}", 2)])
def test_the_forms_of_a_group(groups, n):
  (one,) = hlo.collectives(entry(
      f"%g = f32[16,4]{{1,0:T(8,128)}} all-gather(%x), channel_id=1, replica_groups={groups}, dimensions={{0}}"))
  assert one.bytes == 16 * 4 * 4 * (n - 1) // n


def test_scattered_and_asynchronous_forms():
  text = """\
%all-reduce-scatter.1 (a: f32[64]) -> f32[8] {
  %a = f32[64]{0} parameter(0)
  %r = f32[64]{0} all-reduce(%a), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
  ROOT %s = f32[8]{0} dynamic-slice(%r, %a), dynamic_slice_sizes={8}
}

%part.1 (b: f32[8]) -> f32[64] {
  %b = f32[8]{0} parameter(0)
  ROOT %g1 = f32[64]{0} all-gather(%b), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

%part.2 (c: f32[8]) -> f32[64] {
  %c = f32[8]{0} parameter(0)
  ROOT %g2 = f32[64]{0} all-gather(%c), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

""" + entry(
      "%x = f32[64]{0} parameter(0)",
      "%f = f32[8]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1",
      "%h1 = f32[64]{0} fusion(%f), kind=kCustom, calls=%part.1",
      "%h2 = f32[64]{0} fusion(%f), kind=kCustom, calls=%part.2",
      "%d = f32[2]{0} reduce-scatter(%f), channel_id=4, replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%sum",
      "%e = (f32[8]{0}, f32[64]{0}) all-gather-start(%f), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}",
      "%e2 = f32[64]{0} all-gather-done(%e)")
  found = hlo.collectives(text)
  assert [(c.kind, c.bytes) for c in found] == [
      ("reduce-scatter", 64 * 4 * 7 // 8),  # sum and slice in one kernel
      ("all-gather", 64 * 4 * 7 // 8),  # two parts of one
      ("reduce-scatter", 8 * 4 * 3 // 4), ("all-gather", 64 * 4 * 7 // 8)]


KERNEL = '''\
  %attend_forward.2 = (f32[8]{0:T(128)}) custom-call(%x.2), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/while/body/attend"}
'''


def test_a_kernel_in_a_loop_hides_nothing_of_it():
  annotation = ', backend_config={"known_trip_count":{"n":"28"}}'
  text = LOOPS.replace("%ANNOTATION%", annotation)
  assert hlo.kernels(text) == (), "a condition's custom call is none"
  with_kernel = text.replace("  %whole = bf16", KERNEL + "  %whole = bf16")
  assert hlo.collectives(with_kernel) == hlo.collectives(text), "the attributes' brace does not end the loop's body"
  assert hlo.kernels(with_kernel) == ("attend_forward",)


def test_a_compiled_program_of_eight_devices():
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:8])
  L, D = 5, 64
  place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  weights = jax.ShapeDtypeStruct((L, D, D), jnp.float32, sharding=place(None, None, "fsdp"))
  x = jax.ShapeDtypeStruct((16, D), jnp.float32, sharding=place("fsdp"))

  def network(weights, x):
    def layer(x, w):
      return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, place())), None
    return jax.lax.scan(layer, x, weights)[0].sum()

  found = hlo.collectives(jax.jit(network).lower(weights, x).compile().as_text())
  gathered = [c for c in found if c.kind == "all-gather"]
  assert sum(c.total_bytes for c in gathered) == L * D * D * 4 * 7 // 8
  assert all(c.exact for c in found)
  assert [c.kind for c in found if c not in gathered] == ["all-reduce"]
