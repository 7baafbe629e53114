"""Reads the collectives out of a compiled program's text, and how often each runs."""

from collections.abc import Iterator
import dataclasses
import functools
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}
_SHAPE = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OP = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_COLLECTIVE = re.compile(rf"({'|'.join(KINDS)})(-start)?")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?(%?[\w.\-]+(?:, *%?[\w.\-]+)*)")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%?[\w.\-]+))")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program.

  kind: one of KINDS.
  shape: of the result, as in the text, without its layout.
  bytes: bytes that reach each device in one run.
  times: runs in one execution of the program.
  exact: whether every loop around it has a known number of turns.
  source: the operation of the traced program that it comes from; '' where the text does not say.
  """
  kind: str
  shape: str
  bytes: int
  times: int
  exact: bool
  source: str = ""

  @property
  def total_bytes(self) -> int:
    """Bytes that reach each device in one execution of the program."""
    return self.bytes * self.times


@dataclasses.dataclass(frozen=True)
class _Op:
  name: str
  result: str
  kind: str
  rest: str  # operands and attributes
  is_root: bool

  @functools.cached_property
  def operands(self) -> tuple[str, ...]:
    depth, end = 1, len(self.rest)
    for i, c in enumerate(self.rest):
      depth += (c in "([{") - (c in ")]}")
      if depth == 0:
        end = i
        break
    # Some printers repeat the operands' shapes.
    return tuple(re.findall(r"%([\w.\-]+)", self.rest[:end])) or tuple(
        part.split()[-1] for part in self.rest[:end].split(", ") if part.strip())

  def attribute(self, name: str) -> str | None:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
    return found[1] if found else None


def collectives(text: str, *, turns_if_unknown: int = 1) -> list[Collective]:
  """The collectives of a compiled program, each with how often it runs.

  The turns of a loop come from its own annotation, or from a counter that is compared with a constant.

  Args:
    text: of `compiled.as_text()`.
    turns_if_unknown: assumed of a loop whose number of turns the text does not tell.
  """
  computations = _parse(text)
  found: dict[tuple, Collective] = {}
  for order, (op, times, exact, scope) in enumerate(_walk(computations, turns_if_unknown)):
    matched = _COLLECTIVE.fullmatch(op.kind)
    if matched is None:
      continue
    # The parts of an asynchronous collective that is fused with its neighbours repeat it under one channel, and those
    # that go on inside another loop also in each of its turns.
    channel = op.attribute("channel_id")
    key = (matched[1], channel) if channel and scope else (order,)
    kind, n_bytes = _traffic(op, matched[1], scattered="all-reduce-scatter" in scope)
    source = re.search(r'op_name="([^"]*)"', op.rest)
    shapes = _SHAPE.findall(op.result)
    one = Collective(
        kind, "+".join(f"{dtype}[{dims}]" for dtype, dims in shapes[:1 if matched[2] else None]), n_bytes, times, exact,
        source[1] if source else "")
    if key not in found or found[key].times > times:
      found[key] = one
  return list(found.values())


def kernels(text: str) -> tuple[str, ...]:
  """The names of a compiled program's own kernels for TPU, each once, in alphabetical order."""
  target = r'^\s+(?:ROOT )?%?([\w\-]+)[\w.\-]* = .* custom-call\(.*custom_call_target="tpu_custom_call"'
  found = re.findall(target, text, re.MULTILINE)
  return tuple(sorted(set(found)))


def _parse(text: str) -> dict[str, dict[str, _Op]]:
  """{computation: {operation name: operation}}; the entry is also under ''."""
  computations: dict[str, dict[str, _Op]] = {}
  current: dict[str, _Op] | None = None
  for line in text.splitlines():
    if current is None:
      if head := _HEAD.match(line):
        current = computations.setdefault(head[2], {})
        if head[1]:
          computations[""] = current
    elif line.rstrip() == "}":  # A kernel's attributes may hold lines that begin with one.
      current = None
    elif op := _OP.match(re.sub(r"/\*.*?\*/", "", line)):
      current[op[2]] = _Op(op[2], op[3], op[4], op[5], bool(op[1]))
  return computations


def _walk(computations: dict, unknown: int) -> Iterator[tuple[_Op, int, bool, str]]:
  """Every operation that runs: (operation, runs, whether these are known, names of the fusions around it)."""
  def visit(name: str, times: int, exact: bool, scope: str) -> Iterator[tuple[_Op, int, bool, str]]:
    for op in computations.get(name, {}).values():
      yield op, times, exact, scope
      if op.kind == "while":
        turns = _turns(op, computations, name)
        yield from visit(
            op.attribute("body") or "-", times * (unknown if turns is None else turns), exact and turns is not None,
            scope)
        continue
      inside = scope
      called = [c.strip(" %") for group in _CALLED.findall(op.rest) for c in group.split(",")]
      for branches, branch in _BRANCHES.findall(op.rest):
        called += [c.strip(" %") for c in (branches or branch).split(",")]
      for c in called:
        yield from visit(c, times, exact, f"{inside} {c}".strip())

  yield from visit("", 1, True, "")


def _turns(loop: _Op, computations: dict, where: str) -> int | None:
  """How often a loop's body runs; None where it is not a counter with a constant step and limit."""
  if known := re.search(r'known_trip_count[^\d]*(\d+)', loop.rest):
    return int(known[1])
  condition = computations.get(loop.attribute("condition") or "-", {})
  body = computations.get(loop.attribute("body") or "-", {})
  root = next((op for op in condition.values() if op.is_root), None)
  if root is None or root.kind != "compare" or "direction=LT" not in root.rest or len(root.operands) != 2:
    return None
  counter, limit = condition.get(root.operands[0]), _constant(condition, root.operands[1])
  if counter is None or counter.kind != "get-tuple-element" or limit is None:
    return None
  index = int(counter.attribute("index") or 0)
  first = _constant(computations[where], _entry(computations[where], loop.operands[0], index)) or 0
  step = _step(body, index)
  return None if step is None or step < 1 else max(0, math.ceil((limit - first) / step))


def _step(body: dict[str, _Op], index: int) -> int | None:
  """What the body adds to entry `index` of the loop's state."""
  root = next((op for op in body.values() if op.is_root), None)
  if root is None or root.kind != "tuple" or index >= len(root.operands):
    return None
  total, op = 0, body.get(root.operands[index])
  while op is not None and op.kind in ("add", "copy", "bitcast"):
    if op.kind == "add":
      constants = [_constant(body, name) for name in op.operands]
      if (constants[0] is None) == (constants[1] is None):
        return None
      total += next(c for c in constants if c is not None)
      op = body.get(op.operands[0 if constants[0] is None else 1])
    else:
      op = body.get(op.operands[0])
  is_counter = op is not None and op.kind == "get-tuple-element" and op.attribute("index") == str(index)
  return total if is_counter else None


def _entry(computation: dict[str, _Op], name: str, index: int) -> str:
  """The name of entry `index` of a tuple; '' where it is not made here."""
  op = computation.get(name)
  return op.operands[index] if op is not None and op.kind == "tuple" and index < len(op.operands) else ""


def _constant(computation: dict[str, _Op], name: str) -> int | None:
  """The whole number that an operation always gives."""
  op = computation.get(name)
  while op is not None and op.kind in ("copy", "bitcast", "convert") and op.operands:
    op = computation.get(op.operands[0])
  found = re.match(r"(-?\d+)\)", op.rest) if op is not None and op.kind == "constant" else None
  return int(found[1]) if found else None


def _traffic(op: _Op, kind: str, *, scattered: bool) -> tuple[str, int]:
  """(kind, bytes that reach each device in one run).

  Of n devices and a whole of S bytes: all-gather, all-to-all and reduce-scatter S (n - 1) / n, all-reduce twice that,
  collective-permute S.
  """
  shapes = _SHAPE.findall(op.result)
  sizes = [_BYTES.get(dtype, 4) * math.prod(int(d) for d in dims.split(",") if d) for dtype, dims in shapes]
  n = _group_size(op.rest)
  if kind == "collective-permute":
    return kind, int(sizes[0] if op.kind.endswith("-start") else sum(sizes))
  if op.kind == "all-gather-start":  # (operands, results)
    sizes = sizes[len(sizes) // 2:]
  whole = sum(sizes) * (n if kind == "reduce-scatter" else 1)
  if kind == "all-reduce" and scattered:  # followed at once by a slice, in one kernel
    kind = "reduce-scatter"
  return kind, int(whole * (n - 1) / n * (2 if kind == "all-reduce" else 1))


def _group_size(rest: str) -> int:
  """Devices that take part in one group of a collective."""
  if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
    return len(found[1].split(","))
  if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
    return int(found[2])
  if found := re.search(r"replica_groups=\S*?mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
    sizes = dict(re.findall(r"'([^']*)'=(\d+)", found[1]))
    return math.prod(int(part or sizes[name]) for name, part in re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", found[2]))
  return 1
