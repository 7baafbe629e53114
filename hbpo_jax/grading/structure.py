"""The shape of an answer: list, set, tuple or interval, union, matrix, inequality; or a leaf, one expression."""

import itertools
import re
from typing import NamedTuple

from hbpo_jax.grading import notation, numbers


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
_BRACKETED = re.compile(r"\{[^{}]*\}|\([^()]*\)")
_SCALED_MATRIX = re.compile(r"([^&]*?[^&(\[\s])\s*([(\[]?\s*\\begin\{(?:[pbB]?matrix|array)\}.*)", re.DOTALL)
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_RELATION = re.compile(r"(\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|\\ne(?![a-zA-Z])|<|>)")
_PLUS_MINUS = re.compile(r"\\pm(?![a-zA-Z])")
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
  if scaled := _scaled_matrix(text):
    return scaled
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


def _scaled_matrix(text: str) -> Node | None:
  """What a matrix with one factor in front of it, or a minus, comes to; None for anything else."""
  m = _SCALED_MATRIX.fullmatch(text)
  if m is None:
    return None
  factor, matrix = m[1].removesuffix(r"\cdot").strip(), read(m[2])
  # A sum, a list or an equation is no factor, but may stand within one.
  outside = _BRACKETED.sub("", factor.removeprefix("-"))
  if matrix.kind != "matrix" or re.search(r"[-+=<>,;&()\[\]{}]", outside):
    return None
  times = lambda cell: read(f"-({cell.text})" if factor == "-" else f"({factor})({cell.text})")
  return Node("matrix", tuple(Node("list", tuple(map(times, row.parts)), row.text) for row in matrix.parts), text)


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
  if node.kind == "list" and (excluded := _excluded(node)):
    return excluded
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


def _excluded(node: Node) -> Node | None:
  r"""The union of intervals between the numbers of 'x \ne 1, 2' or 'x \ne 1, x \ne 2'; None for another list."""
  name, values = "", []
  for part in node.parts:
    sides = [s.strip() for s in _RELATION.split(part.text)]
    if len(sides) == 3 and sides[1] == r"\ne" and is_variable(sides[0]) and name in ("", sides[0]):
      name = sides[0]
    elif len(sides) > 1 or not name:
      return None
    value = numbers.parse(sides[-1])
    if value is None:
      return None
    values.append((value.value, sides[-1]))
  ends = [r"-\infty", *(text for _, text in sorted(values)), r"\infty"]
  return Node("union", tuple(_tuple("(", low, high, ")") for low, high in itertools.pairwise(ends)), node.text)


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


def _both(node: Node, parts: list[str]) -> Node:
  r"""The interval between the bounds of 'x > 2 \land x < 3'; the node itself where it is not of that form."""
  sides = [as_interval(read(part)) for part in parts]
  lower, upper = ([s for s in sides if s.kind == "tuple" and s.parts[end].text == text]
                  for end, text in ((1, r"\infty"), (0, r"-\infty")))
  if len(sides) != 2 or len(lower) != 1 or len(upper) != 1 or len({variable_of(read(part)) for part in parts}) != 1:
    return node
  (low, _), (_, high) = lower[0].parts, upper[0].parts
  a, b = numbers.parse(low.text), numbers.parse(high.text)
  if a is not None and b is not None and a.value >= b.value:
    return node  # At most one point; no interval.
  return _tuple(lower[0].brackets[0], low.text, high.text, upper[0].brackets[1])


def _bounds(node: Node) -> Node:
  if len(both := notation.split_command(node.text, r"\land")) > 1:
    return _both(node, both)
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
  r"""'a \pm b' -> ['a + b', 'a - b']; several signs are independent unless one is \mp. Beyond three: [text]."""
  n_signs = len(_PLUS_MINUS.findall(text))
  if n_signs == 1:
    return [_signed(text, "+", "-"), _signed(text, "-", "+")]
  if not 1 < n_signs <= 3 or r"\mp" in text:
    return [text]
  halves = (_PLUS_MINUS.sub(sign, text, count=1) for sign in "+-")
  return [one for half in halves for one in _plus_minus(half)]


def _signed(text: str, plus: str, minus: str) -> str:
  text = _PLUS_MINUS.sub(plus, text)
  text = re.sub(r"\\mp(?![a-zA-Z])", lambda _: minus, text).strip()
  # '= + 3' and a leading plus would only confuse what follows.
  return re.sub(r"(^|[=(,{]\s*)\+\s*", r"\1", text)
