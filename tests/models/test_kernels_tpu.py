"""The Pallas kernels compile for a TPU that is not there.

Needs libtpu (684 MB), which the tests' environment does not have:

    python3 -m venv /tmp/tpu && /tmp/tpu/bin/pip install "jax[tpu]==0.10.2" chex flax ml_collections pytest
    /tmp/tpu/bin/python -m pytest -m slow tests/models/test_kernels_tpu.py

The compiler runs in another process, whose environment says what TPU to imagine: 8 chips of v5e.
"""

import json
import re
import time

import pytest

from tests import tpu

N_LAYERS = 4
CASES = (
    "splash, E 64", "splash, E 128", "splash, E 64, mask", "splash, E 128, mask", "splash, E 64, gradient",
    "splash, E 128, gradient, float32", "decode, E 64", "decode, E 128", "decode, E 128, float32",
    "decode, two by four", "layers, E 64", "layers, E 128")

pytestmark = tpu.marks


@pytest.fixture(scope="module")
def compiled():
  """Case -> its report."""
  return {report["case"]: report for report in tpu.reports(__file__, timeout=900)}


@pytest.mark.parametrize("case", CASES)
def test_compiles(compiled, case):
  report = compiled[case]
  assert report["error"] is None
  n_parts = 1 if case.startswith("splash") else 3
  assert report["n_kernels"] == (3 if "gradient" in case else n_parts)  # forward, and one each for the two gradients


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("layers")])
def test_no_layer_is_copied(compiled, case):
  """The kernels read the stacks where they lie; a layer that is picked out first is copied, seen or not."""
  report = compiled[case]
  assert report["layers_of_a_chunk"] == 0
  assert report["temporary_bytes"] < report["argument_bytes"] / N_LAYERS / 2


def main():
  """Prints a report of each case, one JSON object a line."""
  import jax
  from jax.experimental import topologies
  import jax.numpy as jnp
  from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
  import numpy as np

  from hbpo_jax.models import kernels

  devices = np.array(topologies.get_topology_desc("v5e:2x4", platform="tpu").devices)
  rows = ("data", "fsdp")

  def shape(mesh, dims, dtype, *spec):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

  def splash(mesh, E, dtype, mask, gradient):
    R, T, H, K = 8, 640 if mask else 500, 12, 2
    mask_TT = np.tril(np.ones((T, T), bool))
    mask_TT[T // 2:, T // 4:T // 2] = False

    def attend(query, key, value, segment):
      return kernels.attend_splash(query, key, value, segment, mask=mask_TT if mask else None)

    total = lambda *args: attend(*args).astype(jnp.float32).sum()
    query, key = (shape(mesh, (R, T, heads, E), dtype, rows) for heads in (H, K))
    return jax.jit(jax.grad(total, (0, 1, 2)) if gradient else attend).lower(
        query, key, key, shape(mesh, (R, T), jnp.int32, rows))

  def decode(mesh, E, dtype):
    R, K, G = 64, 2, 6
    heads = "tensor" if mesh.shape["tensor"] > 1 else None
    cache = lambda S: shape(mesh, (R, K, S, E), dtype, rows, heads)
    ends = shape(mesh, (R,), jnp.int32, rows)
    parts = [(cache(S), cache(S), ends, ends) for S in (32, 256, 2048)]
    return jax.jit(lambda query, parts: kernels.decode_parts(query, parts, kernel="pallas_tpu")).lower(
        shape(mesh, (R, K, G, E), dtype, rows, heads), parts)

  def layers(mesh, E):
    """Tokens through the layers, as in decoding: what is seen are two stacks, and one that each token is written to."""
    R, K, G = 64, 2, 6
    stack = lambda S: (shape(mesh, (N_LAYERS, R, K, S, E), jnp.bfloat16, None, rows),) * 2

    def run(query, context, chunk, newest, first, length, slot):
      def layer(index, carry):
        query, *newest = carry
        newest = [jax.lax.dynamic_update_slice(a, query[None, :, :, :1], (index, 0, 0, slot, 0)) for a in newest]
        zero = jnp.zeros_like(first)
        parts = [(*context, first, length), (*chunk, zero, length - 512), (*newest, zero, zero + slot + 1)]
        out = kernels.decode_parts(query, parts, kernel="pallas_tpu", layer=index)
        return out.astype(query.dtype), *newest

      return jax.lax.fori_loop(0, 8, lambda _, carry: jax.lax.fori_loop(0, N_LAYERS, layer, carry), (query, *newest))

    ends = shape(mesh, (R,), jnp.int32, rows)
    return jax.jit(run, donate_argnums=3).lower(
        shape(mesh, (R, K, G, E), jnp.bfloat16, rows), stack(576), stack(2048), stack(32), ends, ends,
        shape(mesh, (), jnp.int32))

  for case in CASES:
    sizes = (1, 4, 2) if "two by four" in case else (1, 8, 1)
    mesh = Mesh(devices.reshape(sizes), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    E = 64 if "E 64" in case else 128
    dtype = jnp.float32 if "float32" in case else jnp.bfloat16
    report = {"case": case, "error": None}
    start = time.time()
    try:
      with jax.set_mesh(mesh):
        if case.startswith("splash"):
          lowered = splash(mesh, E, dtype, "mask" in case, "gradient" in case)
        else:
          lowered = decode(mesh, E, dtype) if case.startswith("decode") else layers(mesh, E)
        executable = lowered.compile()
      text, memory = executable.as_text(), executable.memory_analysis()
      report |= {
          "n_kernels": text.count('custom_call_target="tpu_custom_call"'),
          # A device's 8 rows and 2 heads of one layer, in the fast memory too, which `temporary_bytes` does not count.
          "layers_of_a_chunk": len(re.findall(r"bf16\[(?:1,)?(?:8,2|16),(?:2048,\d+|\d+,2048)\]", text)),
          "temporary_bytes": memory.temp_size_in_bytes, "argument_bytes": memory.argument_size_in_bytes}
    except Exception as error:  # the test shows it
      report["error"] = f"{type(error).__name__}: {str(error)[:2000]}"
    print(json.dumps(report | {"seconds": round(time.time() - start, 1)}), flush=True)


if __name__ == "__main__":
  main()
