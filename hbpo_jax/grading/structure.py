"""The shape of an answer: list, set, tuple or interval, union, matrix, inequality; or a leaf, one expression."""

import re
from typing import NamedTuple

from hbpo_jax.grading import notation


class Node(NamedTuple):
  """One part of an answer.

  kind: 'leaf', 'list', 'set', 'tuple' (also an interval), 'union' or 'matrix'.
  parts: its elements, in order; a matrix has its rows, each a 'list'. () for a leaf.
  text: the text of the part, cleaned.
  brackets: of a tuple or interval, such as '(]'; '' otherwise.
  """
  kind: str
  parts: tuple["Node", ...]
  text: str
  brackets: str = ""


_MATRIX = re.compile(r"[(\[]?\s*\\begin\{([pbB]?matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}\s*[)\]]?", re.DOTALL)
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_RELATION = re.compile(r"(\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|\\ne(?![a-zA-Z])|<|>)")
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
_VARIABLE = re.compile(r"(?:[a-zA-Z]|\\[a-zA-Z]+)(?:_(?:\w|\{\w+\}))?(?:\([a-zA-Z]\))?")
# Names that the pattern of a variable would also take, but that are values.
_CONSTANTS = {r"\pi", r"\infty", r"\emptyset", "e", "i"}


def read(text: str) -> Node:
  """The structure of a cleaned answer."""
  text = notation.strip_group(text.strip())
  if m := _MATRIX.fullmatch(text):
    rows = tuple(
        Node("list", tuple(read(cell) for cell in notation.split(row, "&")), row)
        for row in notation.split_rows(m[2]) if row)
    return Node("matrix", rows, text)
  pieces = notation.split_command(text, r"\cup")
  if len(pieces) > 1:
    return Node("union", tuple(read(p) for p in pieces), text)
  if inner := _braced_set(text):
    return Node("set", _elements(inner), text)
  if len(notation.split(text, ",;")) > 1:
    return Node("list", _elements(text), text)
  if len(both := _plus_minus(text)) > 1:
    return Node("list", tuple(read(t) for t in both), text)
  if text[:1] in ("(", "[") and notation.closing(text, 0) == len(text) - 1:
    inner = text[1:-1].strip()
    if len(notation.split(inner, ",;")) > 1:
      return Node("tuple", _elements(inner), text, text[0] + text[-1])
    if text[0] == "(" and text[-1] == ")" and inner:
      return read(inner)
  return Node("leaf", (), text)


def is_grouped_number(text: str) -> bool:
  """Whether the text may be one number with thousands separators rather than a list, such as '16,200'."""
  return bool(_GROUPED.fullmatch(text.strip()))


_SET_BUILDER = re.compile(
    r"\\\{\s*([a-zA-Z])\s*(?:\\in\s*\\mathbb\s*\{?R\}?)?\s*(?:\\mid(?![a-zA-Z])|\||:)\s*(.+?)\s*\\\}")


def as_interval(node: Node) -> Node:
  r"""An inequality in one variable as an interval or a union of them; any other node unchanged.

  '2 \le x < 5' -> '[2,5)'; 'x > 3' -> '(3,\infty)'; 'x \ne 0' -> '(-\infty,0) \cup (0,\infty)'; a list of
  inequalities ('x < 1 or x > 2') -> their union; 'x \in [2,5]' -> '[2,5]'.
  """
  if node.kind in ("list", "union"):
    parts = tuple(as_interval(p) for p in node.parts)
    changed = any(new is not old for new, old in zip(parts, node.parts, strict=True))
    if changed and all(p.kind in ("tuple", "union") for p in parts):
      flat = [q for p in parts for q in (p.parts if p.kind == "union" else (p,))]
      return Node("union", tuple(flat), node.text)
    return node
  inside = notation.split_command(node.text, r"\in")
  if len(inside) == 2 and is_variable(inside[0]):
    return as_interval(read(inside[1]))
  return _bounds(node) if node.kind == "leaf" else node


def conditions(node: Node) -> Node:
  r"""The interval or union that '\{x \mid 2 < x < 3\}' describes; any other node unchanged."""
  builder = _SET_BUILDER.fullmatch(node.text.strip())
  if builder is None:
    return node
  inner = read(builder[2])
  made = as_interval(inner)
  own = [variable_of(part) for part in (inner.parts if inner.kind == "list" else (inner,))]
  return made if made.kind in ("tuple", "union") and set(own) == {builder[1]} else node


def is_variable(text: str) -> bool:
  r"""Whether the text is one symbol: x, x_1, \theta, f(x)."""
  return bool(_VARIABLE.fullmatch(text)) and text not in _CONSTANTS


def variable_of(node: Node) -> str:
  """The variable of an inequality leaf, or ''."""
  return next((p.strip() for p in _RELATION.split(node.text) if is_variable(p.strip())), "")


def _bounds(node: Node) -> Node:
  parts = [p.strip() for p in _RELATION.split(node.text)]
  if len(parts) not in (3, 5) or not all(parts) or (len(parts) == 5 and r"\ne" in parts):
    return node
  if len(parts) == 5:
    left, first, variable, second, right = parts
    sides = [(left, first), (right, _FLIPPED[second])]
  else:
    left, op, right = parts
    variable, bound, op = (left, right, _FLIPPED.get(op, op)) if is_variable(left) else (right, left, op)
    sides = [(bound, op)]
  if not is_variable(variable) or any(is_variable(bound) for bound, _ in sides):
    return node
  low, high = (r"-\infty", "("), (r"\infty", ")")
  seen = set()
  for bound, op in sides:  # Each reads: bound op variable.
    if op == r"\ne":
      return Node("union", (_tuple("(", low[0], bound, ")"), _tuple("(", bound, high[0], ")")), node.text)
    below = op in ("<", r"\le")
    seen.add(below)
    if below:
      low = (bound, "(" if op == "<" else "[")
    else:
      high = (bound, ")" if op == ">" else "]")
  # Infinite ends are open however they are written.
  low, high = (low[0], "(" if "infty" in low[0] else low[1]), (high[0], ")" if "infty" in high[0] else high[1])
  return _tuple(low[1], low[0], high[0], high[1]) if len(seen) == len(sides) else node


def _tuple(left: str, low: str, high: str, right: str) -> Node:
  return Node("tuple", (read(low), read(high)), f"{left}{low},{high}{right}", left + right)


def _elements(text: str) -> tuple[Node, ...]:
  parts = [p for p in notation.split(text, ",;") if p]
  return tuple(read(half) for p in parts for half in _plus_minus(p))


def _braced_set(text: str) -> str:
  if not (text.startswith("\\{") and text.endswith("\\}") and notation.closing(text, 1) == len(text) - 1):
    return ""
  inner = text[2:-2].strip()
  return "" if re.search(r"\\mid|\||:", inner) else inner


def _plus_minus(text: str) -> list[str]:
  r"""'a \pm b' -> ['a + b', 'a - b'] where the sign stands outside all brackets or in a fraction; else [text]."""
  if len(re.findall(r"\\pm(?![a-zA-Z])", text)) != 1:
    return [text]
  return [_signed(text, "+", "-"), _signed(text, "-", "+")]


def _signed(text: str, plus: str, minus: str) -> str:
  text = re.sub(r"\\pm(?![a-zA-Z])", lambda _: plus, text)
  text = re.sub(r"\\mp(?![a-zA-Z])", lambda _: minus, text).strip()
  # '= + 3' and a leading plus would only confuse what follows.
  return re.sub(r"(^|[=(,{]\s*)\+\s*", r"\1", text)
