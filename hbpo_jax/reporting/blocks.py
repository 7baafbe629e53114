"""What sections of a report are made of, for any of its forms."""

from collections.abc import Sequence
import dataclasses
from typing import ClassVar

from matplotlib.figure import Figure

from hbpo_jax.reporting import plots
from hbpo_jax.reporting.tables import Table


@dataclasses.dataclass(frozen=True)
class Words:
  """A paragraph."""
  kind: ClassVar[str] = "words"
  text: str


@dataclasses.dataclass(frozen=True)
class Heading:
  """A heading within a section."""
  kind: ClassVar[str] = "heading"
  text: str


@dataclasses.dataclass(frozen=True)
class Facts:
  """A list of sentences."""
  kind: ClassVar[str] = "facts"
  items: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Sheet:
  """A table. caption: below its title, or empty.  prose: whether its cells are text, to be wrapped and aligned left."""
  kind: ClassVar[str] = "sheet"
  table: Table
  caption: str = ""
  prose: bool = False


@dataclasses.dataclass(frozen=True)
class Picture:
  """A figure. name: of its file, without the ending.  data: PNG.  width, height: pixels.  alt: what it shows, for those
  who cannot see it."""
  kind: ClassVar[str] = "picture"
  name: str
  data: bytes
  alt: str
  caption: str

  @property
  def width(self) -> int:
    return int.from_bytes(self.data[16:20], "big")

  @property
  def height(self) -> int:
    return int.from_bytes(self.data[20:24], "big")


Block = Words | Heading | Facts | Sheet | Picture


@dataclasses.dataclass(frozen=True)
class Section:
  """key: its anchor.  blocks: in order; at least one."""
  key: str
  title: str
  blocks: Sequence[Block]


def picture(name: str, fig: Figure, alt: str, caption: str) -> Picture:
  """A figure drawn; `name` becomes fit for a file."""
  safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in name)
  return Picture(safe, plots.png(fig), alt, caption)
