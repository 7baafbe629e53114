"""Reads the repository's Markdown: code blocks with their commands, spans of code, links, headings."""

from collections.abc import Iterator
import dataclasses
import functools
import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHELL = ("shell", "bash", "sh", "console")
# What a line of a block without a language starts with, where the block holds commands and not their output.
PROGRAMS = (
    "python", ".venv/bin/python", "make", "pip", "hbpo", "./launch_tpu.sh", "gcloud", "git", "export", "xpk", "vllm",
    "hf", "taskset")
_ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=.*", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Block:
  """A block of code. lang: '' where none is given.  needs: of the comment `<!-- needs: ... -->` before it, or ''."""
  file: str
  line: int
  lang: str
  text: str
  needs: str


@dataclasses.dataclass(frozen=True)
class Command:
  """One command. where: FILE:LINE of its block.  argv: without assignments in front.  needs: as of its block."""
  where: str
  argv: tuple[str, ...]
  needs: str

  @property
  def module(self) -> str:
    """The command of this package that it runs, such as 'train'; '' for anything else."""
    words = [pathlib.PurePath(self.argv[0]).name, *self.argv[1:]]
    if words[:2] == ["python", "-m"] and words[2].startswith("hbpo_jax."):
      return words[2].removeprefix("hbpo_jax.")
    return words[1] if words[0] == "hbpo" and len(words) > 1 and not words[1].startswith("-") else ""

  @property
  def arguments(self) -> list[str]:
    """What follows the program, and for a command of this package, its name."""
    return list(self.argv[2 if self.argv[0] == "hbpo" else 3:] if self.module else self.argv[1:])


def files() -> list[pathlib.Path]:
  """The Markdown that is part of the repository, the site's pages included."""
  folders = ("docs", "benchmarks", "colab", "examples", "configs")
  return sorted([*ROOT.glob("*.md"), *(p for f in folders for p in (ROOT / f).glob("**/*.md"))])


def relative(path: pathlib.Path) -> str:
  """The path from the top of the repository."""
  return path.relative_to(ROOT).as_posix()


@functools.cache
def blocks(path: pathlib.Path) -> tuple[Block, ...]:
  """The fenced and indented blocks of a file, in order."""
  return tuple(_read(path)[0])


@functools.cache
def prose(path: pathlib.Path) -> str:
  """The file without its blocks."""
  return _read(path)[1]


def commands(block: Block) -> Iterator[Command]:
  """The commands of a block; none where it holds something else.

  Raises:
    ValueError: when only some lines of a block without a language are commands, or one cannot be read.
  """
  lines = [line.strip() for line in block.text.replace("\\\n", " ").split("\n")]
  lines = [line for line in lines if line and not line.startswith("#")]
  are_commands = [_program(line) in PROGRAMS or bool(_ASSIGNMENT.fullmatch(line.split()[0])) for line in lines]
  if block.lang not in SHELL and (block.lang or not any(are_commands)):
    return
  where = f"{block.file}:{block.line}"
  if not all(are_commands):
    raise ValueError(f"{where}: {lines[are_commands.index(False)]!r} starts with no program of tests/docs/markdown.py")
  for line in lines:
    yield from split(line, where, block.needs)


def split(line: str, where: str, needs: str = "") -> Iterator[Command]:
  """The commands of a line, and those inside the arguments of others (`--command="cd x && python -m ..."`)."""
  words: list[str] = []
  for word in [*shlex.split(line, comments=True), "&&"]:
    if word not in ("&&", "|", ";"):
      words.append(word)
      continue
    while words and _ASSIGNMENT.fullmatch(words[0]):
      del words[0]
    if words and words[0] != "cd":
      yield Command(where, tuple(words), needs)
    for inside in words[1:]:
      if "-m hbpo_jax." in inside:
        yield from split(inside.partition("=")[2], where, needs)
    words = []


def spans(path: pathlib.Path, *, skip_first_cells: bool = False) -> Iterator[str]:
  """The spans of code outside blocks.

  Args:
    skip_first_cells: leave out the first cell of every row of a table.
  """
  for line in prose(path).split("\n"):
    if skip_first_cells and line.startswith("|"):
      line = line.split("|", 2)[2]
    for found in re.finditer(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", line):
      yield found[2].strip().replace("\\|", "|")


def links(path: pathlib.Path) -> Iterator[str]:
  """The targets of links and pictures outside blocks."""
  text = re.sub(r"`[^`\n]*`", "", prose(path))
  yield from re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(text: str) -> set[str]:
  """The anchors of a Markdown text: of its headings as mkdocs and GitHub make them, and of `<a id>`."""
  text = re.sub(r"(?ms)^```.*?^```", "", text)
  headings = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", h) for h in re.findall(r"(?m)^#+ +(.+?) *$", text)]
  made = {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", h.lower()).strip()) for h in headings}
  return made | set(re.findall(r'<a id="([^"]+)"', text))


def _program(line: str) -> str:
  words = [w for w in line.split() if not _ASSIGNMENT.fullmatch(w)]
  return words[0] if words else ""


def _read(path: pathlib.Path) -> tuple[list[Block], str]:
  name, found, rest = relative(path), [], []
  lines = path.read_text(encoding="utf-8").split("\n")
  needs, i = "", 0
  while i < len(lines):
    line = lines[i]
    if fence := re.match(r" {0,3}(```+|~~~+) *(\w*)", line):
      end = next(j for j in range(i + 1, len(lines)) if lines[j].strip() == fence[1])
      found.append(Block(name, i + 1, fence[2], "\n".join(lines[i + 1:end]), needs))
      i = end
    elif line.startswith("    ") and (i == 0 or not lines[i - 1].strip()):
      end = i
      while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
        end += 1
      found.append(Block(name, i + 1, "", "\n".join(text[4:] for text in lines[i:end]).rstrip(), needs))
      i = end - 1
    else:
      rest.append(line)
    if line.strip():
      marked = re.fullmatch(r"\s*<!-- needs: (.+) -->", line)
      needs = marked[1] if marked else ""
    i += 1
  return found, "\n".join(rest)
