"""TPU generations and topologies: what one device has, and what connects it."""

import dataclasses
import math
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One generation of TPU. Numbers are per chip, decimal units, unless they say otherwise.

  name: as in "v5e:4x4".
  dims: dimensions of its topologies, 2 or 3.
  devices: JAX devices per chip.
  hbm_gib: memory of a device that the compiler lets a program use, GiB.
  tflops: peak bfloat16, 10^12 FLOP/s.
  hbm_gb_s: memory bandwidth, 10^9 bytes/s.
  link_gb_s: one interconnect link in one direction, 10^9 bytes/s; a chip has 2 * dims of them.
  closed: length of a topology's side from which on its links close to a ring; see `Topology.links`.
  options: arguments for JAX's `get_topology_desc`, as (name, value).
  """
  name: str
  dims: int
  devices: int
  hbm_gib: float
  tflops: float
  hbm_gb_s: float
  link_gb_s: float
  closed: int
  options: tuple[tuple[str, str], ...] = ()


# Peaks and bandwidths: the "System architecture" tables of cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. These give
# the interconnect of a chip over all its ports in both directions (v5e 400, v6e 800, v5p and tpu7x 1,200 GB/s), or in
# one (v4 2,400, v5e 1,600 Gbit/s); over the ports (4 in two dimensions, 6 in three) that is, in one direction, what
# link_gb_s says. hbm_gib is what libtpu 0.0.42 calls available where a program asks for more: the memory of a device
# (v4 and v6e 32, v5e 16, v5p 95, tpu7x 96 GiB) without what the runtime keeps.
CHIPS = {chip.name: chip for chip in (
    # With both cores as one device, as JAX shows a v4.
    Chip("v4", 3, 1, 30.75, 275, 1228, 50, 4, (("chip_config_name", "megacore"),)),
    Chip("v5e", 2, 1, 15.75, 197, 819, 50, 16),
    Chip("v5p", 3, 1, 95.74, 459, 2765, 100, 4),
    Chip("v6e", 2, 1, 31.25, 918, 1640, 100, 16),
    Chip("tpu7x", 3, 2, 94.75, 2307, 7380, 100, 4),
)}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Some chips of one generation in a grid.

  chip: the generation.
  shape: chips along each dimension.
  """
  chip: Chip
  shape: tuple[int, ...]

  def __str__(self) -> str:
    return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

  @property
  def n_chips(self) -> int:
    """Chips, which is what is paid for."""
    return math.prod(self.shape)

  @property
  def n_devices(self) -> int:
    """JAX devices."""
    return self.n_chips * self.chip.devices

  @property
  def links(self) -> int:
    """Links of the chip that has the fewest, which bounds a collective over all chips.

    A side of 1 has none and of 2 one. On a longer one, the chip at its end has one, or two where the side closes to a
    ring: a full side of a 2-dimensional generation (16), and multiples of 4 in a 3-dimensional one.
    """
    count = 0
    for length in self.shape:
      is_ring = length % self.chip.closed == 0 and (self.chip.dims == 2 or all(n % 4 == 0 for n in self.shape))
      count += 0 if length == 1 else 2 if is_ring else 1
    return count

  @property
  def flops_s(self) -> float:
    """Peak bfloat16 FLOP/s of a device."""
    return self.chip.tflops * 1e12 / self.chip.devices

  @property
  def hbm_bytes_s(self) -> float:
    """Memory bandwidth of a device, bytes/s."""
    return self.chip.hbm_gb_s * 1e9 / self.chip.devices

  @property
  def network_bytes_s(self) -> float:
    """Bytes/s that reach a device of the worst connected chip; infinite for a single chip."""
    return self.links * self.chip.link_gb_s * 1e9 / self.chip.devices if self.links else math.inf

  @property
  def hbm_bytes(self) -> int:
    """Memory of a device that a program may use, bytes."""
    return int(self.chip.hbm_gib * GIB)


def parse_topology(text: str) -> Topology:
  """The Topology of a text such as v5e:4x4 or v5p:2x2x2.

  Raises:
    ValueError: when the generation or the shape is not understood; names what there is.
  """
  name, _, sides = text.partition(":")
  if name not in CHIPS:
    raise ValueError(f"--topology={text!r} names no TPU that is known; choose one of {', '.join(CHIPS)}: v5e:4x4.")
  chip = CHIPS[name]
  example = "x".join("2" * chip.dims)
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sides):
    raise ValueError(f"--topology={text!r} has no shape; write chips along each side, such as {name}:{example}.")
  shape = tuple(int(n) for n in sides.split("x"))
  if len(shape) != chip.dims:
    raise ValueError(
        f"--topology={text!r} has {len(shape)} sides, but a {name} has {chip.dims}; write {name}:{example}.")
  return Topology(chip, shape)
