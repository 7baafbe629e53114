r"""Whether an answer equals the true one: exact text and exact numbers first, then the parts of lists, intervals and
matrices, then units and words, and last the symbolic comparison of `symbolic` (math-verify).

Pure functions of two strings. Model output is never evaluated as code: it goes through regular expressions and
math-verify's LaTeX grammar only. `quick` is cheap enough for the parent process; `equal` may compute for long and
runs in a worker under a limit.
"""

import re

from hbpo_jax.grading import notation, numbers, structure, units
from hbpo_jax.grading.structure import Node

# A longer answer is compared as text only. No true answer of the usual sets is half as long.
MAX_ANSWER = 512
MAX_TRUTH = 1024
# Brackets within brackets. Deeper answers are compared as text only.
MAX_DEPTH = 32

_CODE = re.compile("|".join([
    r"__|`|==|\$\{|#|;\s*\w+\s+\w+",
    r"(?<!\\)\b(?:import|lambda|return|def|exec|eval)\b|\bfor\s+\w+\s+in\b|\bif\b.*\belse\b",
    r"\\(?:write|input|include|immediate|openout|openin|read|catcode|def|csname|expandafter|loop|newcommand|usepackage)",
    # A call of a named function, a method or an attribute, a quoted number.
    # Of three letters, the built-in ones: abc(a + b) is a product.
    r"(?<![\\a-zA-Z{])(?:[a-zA-Z_]{4,}|abs|bin|chr|dir|hex|int|len|map|max|min|oct|ord|pow|set|str|sum|zip)\s*\(|"
    r"\.[a-zA-Z_]{2,}\s*\(|[a-zA-Z_]\w+\.[a-zA-Z_]\w+|[\"']\s*\d|\d\s*[\"']\s*\)",
]))
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_APPROXIMATELY = re.compile(r"\A\s*\$?\s*\\approx(?![a-zA-Z])")
_CLOCK = re.compile(r"0?(\d{1,2}):(\d\d)(?::(\d\d))?\s*(?:([ap])\.?\s?m)?")
_INITIALS = re.compile(r"[A-Z]{3,}")
_ADJACENT = re.compile(r"(?<![_^])\d\s+\d")
_BASED = re.compile(r"(-?[0-9A-Z][0-9A-Z,]*(?:\.[0-9A-Z]+)?)_(?:\{((?:[^{}]|\{[^{}]*\})*)\}|(\d))")
_BASE_NAMES = {
    "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9",
    "ten": "10", "twelve": "12", "sixteen": "16"}
_EQUALS = re.compile(r"(?<![<>!\\])=|\\approx(?![a-zA-Z])")
_GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|varphi|omega|Delta|ell"
# What may stand before '=' when only the right side is the answer: one name, such as x, x_1, f(x), P(A \cap B),
# \angle ABC, AB, \text{Area}, or a tuple of letters.
_NAME = re.compile(
    r"\([a-zA-Z](?:\s*,\s*[a-zA-Z])+\)|(?:\\(?:angle|overline|vec|hat|bar|widehat|mathcal|mathbf)\s*)?"
    rf"(?:[a-zA-Z]|\\(?:{_GREEK})|[A-Z]{{2,3}}|\{{[a-zA-Z]{{1,3}}\}}"
    r"|\\(?:text|mathrm|mbox)\s*\{[^{}0-9]*\}|[a-zA-Z]{3,})"
    r"'*(?:_(?:\w|\{[^{}]*\}))?(?:\^\{?(?:-1|\\prime|\*|')\}?)?(?:\([^()=]*\))?")

# Or a measure of something named: a function of it, its length, its area, its mean.
_MEASURE = re.compile(
    r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc|log|ln|gcd|lcm|max|min|det|dim|deg|arg)(?![a-zA-Z])"
    rf"(?:\s*(?:[a-zA-Z]|\\(?:{_GREEK}|angle|operatorname)(?![a-zA-Z])|\([^()=]*\)|[_^](?:\w|\{{[^{{}}]*\}})))+"
    r"|m?\s*\\angle\s*(?:[A-Z][_{}0-9'\s]*)+|\\?\|[a-zA-Z_{}\\\s0-9]*\\?\||\[[A-Z]{3,}\]"
    r"|(?:\\mathbb\s*\{E\}|E|\\Pr)\s*(?:\[[^\[\]()=]*\]|\([^\[\]()=]*\))")
_FUNCTIONS = re.compile(
    r"\\(?:frac|sqrt|binom|pi|cdot|times|div|pm|log|ln|exp|(?:arc)?(?:sin|cos|tan|cot|sec|csc)|overline|lfloor|rfloor"
    r"|lceil|rceil|infty)(?![a-zA-Z])")


def quick(answer: str, truth: str) -> bool | None:
  """The verdict where exact text or exact numbers decide it, else None. Cheap: for the parent process.

  Args:
    answer: the answer of a response; one of more than `MAX_ANSWER` characters or `MAX_DEPTH` levels is compared as
      text only.
    truth: the true answer, likewise of `MAX_TRUTH`.
  """
  truth = _unrounded(truth, answer)
  if answer.strip() == truth.strip():
    return True
  if len(answer) > MAX_ANSWER or len(truth) > MAX_TRUTH or not truth.strip():
    return False
  given, true = notation.clean(answer), notation.clean(truth)
  if notation.tight(given) == notation.tight(true):
    return bool(given)
  if notation.depth(given) > MAX_DEPTH:
    return False
  a, b = numbers.parse(given), numbers.parse(true)
  if a is not None and b is not None:
    return True if numbers.equal(a, b) else _other_readings(given, true)
  return False if is_code(given) or not given.isprintable() else None


def equal(answer: str, truth: str) -> bool:
  """Whether an answer equals the true one. May take long: run it under a limit."""
  verdict = quick(answer, truth)
  if verdict is not None:
    return verdict
  return _equal(structure.read(notation.clean(answer)), structure.read(notation.clean(_unrounded(truth, answer))))


def _unrounded(truth: str, answer: str) -> str:
  """A true answer without the sign in front that it is rounded, unless the given one has it, too."""
  return truth if _APPROXIMATELY.match(answer) else _APPROXIMATELY.sub("", truth)


def is_code(text: str) -> bool:
  """Whether a cleaned answer looks like a program or a TeX attack rather than an answer."""
  return bool(_CODE.search(re.sub(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}", " ", text)))


def _other_readings(given: str, true: str) -> bool | None:
  # '1,200' may also be the list of 1 and 200.
  if structure.is_grouped_number(given) and structure.is_grouped_number(true):
    return None
  return False


def _equal(a: Node, b: Node) -> bool:
  """Whether two answers are equal; `a` was given, `b` is the true one."""
  if notation.tight(a.text) == notation.tight(b.text):
    return True
  a, b = structure.conditions(a), structure.conditions(b)
  if "leaf" in (a.kind, b.kind) and (structure.is_grouped_number(a.text) or structure.is_grouped_number(b.text)):
    x, y = numbers.parse(units.split(a.text).number), numbers.parse(units.split(b.text).number)
    if x is not None and y is not None:
      return numbers.equal(x, y)
    # Beside an expression, '1,236' can only be the number.
    a, b = _ungrouped(a, b), _ungrouped(b, a)
  if a.kind != "leaf" and b.kind != "leaf" and _named(a) and _named(b):
    return _equal_named(a, b)
  a, b = _unnamed(a), _unnamed(b)
  if r"\land" in a.text + b.text:
    a, b = structure.as_interval(a), structure.as_interval(b)
  if (a.kind == "list") != (b.kind == "list"):
    a, b = _joined(a), _joined(b)
  if a.kind == b.kind == "leaf":
    return _equal_leaves(a, b)
  a, b = structure.as_interval(a), structure.as_interval(b)
  if a.kind == b.kind == "leaf":
    return _equal_leaves(a, b)
  # A set of one is its element.
  if a.kind == "set" and len(a.parts) == 1 and b.kind != "set":
    return _equal(a.parts[0], b)
  if b.kind == "set" and len(b.parts) == 1 and a.kind != "set":
    return _equal(a, b.parts[0])
  if "leaf" in (a.kind, b.kind):
    return _equal_mixed(a, b)
  return _equal_parts(a, b)


def _ungrouped(a: Node, beside: Node) -> Node:
  is_number = beside.kind == "leaf" and structure.is_grouped_number(a.text)
  return Node("leaf", (), a.text.replace(",", "")) if is_number else a


def _joined(a: Node) -> Node:
  """A list that is no list where commas between three digits each belong to numbers: '70,000 dollars'."""
  joined = structure.read(_THOUSANDS.sub(lambda m: m.group().replace(",", ""), a.text)) if a.kind == "list" else a
  return a if joined.kind == "list" else joined


def _equal_parts(a: Node, b: Node) -> bool:
  if len(a.parts) != len(b.parts):
    return False
  kinds = {a.kind, b.kind}
  if kinds == {"tuple"}:
    return a.brackets == b.brackets and _equal_in_order(a, b)
  if kinds == {"matrix"}:
    return all(len(r.parts) == len(s.parts) and _equal_in_order(r, s) for r, s in zip(a.parts, b.parts, strict=True))
  if kinds == {"tuple", "list"}:
    # Forgotten brackets: '1, 2' for '(1, 2)'. The order still counts.
    return "()" in (a.brackets, b.brackets) and _equal_in_order(a, b)
  if kinds <= {"list", "set"} or kinds == {"union"}:
    return _equal_in_any_order(a, b)
  return False


def _equal_in_order(a: Node, b: Node) -> bool:
  return all(_equal_elements(x, y) for x, y in zip(a.parts, b.parts, strict=True))


def _equal_elements(a: Node, b: Node) -> bool:
  # A set of one is its element where it is the whole answer, but {{1}, 2} is not {1, 2}.
  return (a.kind == "set") == (b.kind == "set") and _equal(a, b)


def _equal_in_any_order(a: Node, b: Node) -> bool:
  left = list(b.parts)
  for x in a.parts:
    match = next((i for i, y in enumerate(left) if _equal_elements(x, y)), None)
    if match is None:
      return False
    del left[match]
  return True


def _split_equation(text: str) -> tuple[str, str]:
  """('name', 'value') of 'name = value' where one name stands on the left; else ('', text)."""
  parts = [part for _, part in _sides(text)]
  if len(parts) == 2 and parts[1] and _NAME.fullmatch(parts[0]):
    return parts[0], parts[1]
  return "", text


def _named(node: Node) -> dict[str, Node] | None:
  """The values by name of a list such as 'x = 1, y = 2'; None where a name is missing or stands twice."""
  pairs = [_split_equation(part.text) for part in node.parts]
  if len(pairs) < 2 or any(not name for name, _ in pairs) or len({name for name, _ in pairs}) < len(pairs):
    return None
  return {notation.tight(name): structure.read(value) for name, value in pairs}


def _equal_named(a: Node, b: Node) -> bool:
  x, y = _named(a), _named(b)
  return x is not None and y is not None and x.keys() == y.keys() and all(_equal(x[k], y[k]) for k in x)


def _unnamed(node: Node) -> Node:
  r"""'x = (1, 2)' as the tuple, 'x = 1 \text{ or } x = 2' needs nothing: its parts are read one by one."""
  if node.kind == "matrix" or not _EQUALS.search(node.text):
    return node
  if node.kind == "list":
    name, value = _split_equation(node.text)
    # 'x = 1, 2' reads as 'x = 1', '2'; 'y = x, z = 2' never gets here with a name.
    return structure.read(value) if name else node
  return node


def _equal_mixed(a: Node, b: Node) -> bool:
  """One is a leaf, the other is not: equal only as a name with a value, or as sets that math-verify knows."""
  for x, y, flip in ((a, b, False), (b, a, True)):
    if x.kind != "leaf":
      continue
    name, value = _split_equation(x.text)
    if name:
      inner = structure.read(value)
      return _equal(y, inner) if flip else _equal(inner, y)
  if re.search(r"\\(?:setminus|mathbb|cap|ne)(?![a-zA-Z])", a.text + b.text):
    return _symbolic(a.text, b.text)
  return False


def _equal_leaves(a: Node, b: Node) -> bool:
  given, true = _unequated(a.text, b.text)
  if given is None:
    return False
  if (given, true) != (a.text, b.text):
    x, y = structure.read(given), structure.read(true)
    if "leaf" not in (x.kind, y.kind) or x.kind != y.kind:
      return _equal(x, y)
    given, true = x.text, y.text
  if notation.tight(given) == notation.tight(true):
    return True
  if notation.tight(notation.fold_words(given)) == notation.tight(notation.fold_words(true)):
    return True
  if _same_time(given, true):
    return True
  if _INITIALS.fullmatch(given) and _INITIALS.fullmatch(true):
    return False  # No product: the letters stand in an order.
  x, y = units.split(given), units.split(true)
  x, y = units.split_same(x, y), units.split_same(y, x)
  if (decided := _equal_quantities(x, y)) is not None:
    return decided
  if (decided := _equal_in_base(given, true)) is not None:
    return decided
  given, true = x.number, y.number
  if notation.is_wordy(given) or notation.is_wordy(true):
    return notation.words(given) == notation.words(true)
  if structure.as_interval(Node("leaf", (), given)).kind != structure.as_interval(Node("leaf", (), true)).kind:
    return False
  return units.agree(x.unit, y.unit) and _symbolic(given, true)


def _same_time(given: str, true: str) -> bool:
  """Whether both are one time of the day; which half of it is compared where both say so."""
  x, y = (_CLOCK.fullmatch(notation.words(text).lower()) for text in (given, true))
  return bool(x and y and x.groups()[:3] == y.groups()[:3] and (x[4] == y[4] or None in (x[4], y[4])))


def _unequated(given: str, true: str) -> tuple[str | None, str]:
  """Both sides without 'name =', where that is not part of the answer; None refuses the given one."""
  name, value = _split_equation(given)
  true_name, true_value = _split_equation(true)
  if name and true_name:
    return (value, true_value) if notation.tight(name) == notation.tight(true_name) else (given, true)
  true_sides = _sides(true)
  is_sum = len(true_sides) > 1 and all(_is_closed(part) for _, part in true_sides)  # 1 = 1 says nothing of 2 + 3 = 5.
  if (len(_sides(given)) > 1) == (len(true_sides) > 1) and not is_sum:
    return given, true
  given_value, true_value = _value(given), _value(true)
  return (None, true) if true_value is None else (given_value, true_value)


def _value(text: str) -> str | None:
  r"""What a chain of equations says that something is: the text itself where it has no '=', None where it says nothing.

  'x = y = 2', '\sin\theta = \frac{1}{2}', '0.56 = 56\%' and '2 + 3 = 5' do; 'x^2 + x = 5' and '3 = 5' do not.
  """
  values = _sides(text)
  while len(values) > 1 and (_NAME.fullmatch(values[0][1]) or _MEASURE.fullmatch(values[0][1])):
    del values[0]
  (_, value), *others = values
  if others and not all(_is_closed(part) for _, part in values):
    return None
  for sign, other in others:
    if sign == "=" and not _equal(structure.read(other), structure.read(value)):
      return None
  return value or None


def _sides(text: str) -> list[tuple[str, str]]:
  r"""The parts between the equality signs outside braces, each with the sign before it: not those of \sum_{k=1}."""
  depth, sides, last, sign = 0, [], 0, ""
  ends = {m.start(): m for m in _EQUALS.finditer(text)}
  for i, c in enumerate(text):
    depth += (c == "{") - (c == "}")
    if depth == 0 and (m := ends.get(i)):
      sides.append((sign, text[last:i].strip()))
      last, sign = m.end(), m.group()
  return [*sides, (sign, text[last:].strip())]


def _is_closed(text: str) -> bool:
  """Whether a text may be a value without free letters."""
  number = _FUNCTIONS.sub(" ", units.split(text).number)
  return bool(re.search(r"\d|\\pi", text)) and not re.search(r"[a-zA-Z]", number)


def _equal_quantities(a: units.Quantity, b: units.Quantity) -> bool | None:
  x, y = numbers.parse(a.number), numbers.parse(b.number)
  if x is None or y is None:
    return None
  if not units.agree(a.unit, b.unit):
    return False
  if numbers.equal(x, y):
    return True
  if a.percent != b.percent:
    # 75 % is also 0.75.
    x = x._replace(value=x.value / 100) if a.percent else x
    y = y._replace(value=y.value / 100) if b.percent else y
    return x.value == y.value
  return False


def _equal_in_base(given: str, true: str) -> bool | None:
  """Numerals with a base, such as 4210_5: same digits, and the same base unless one leaves it out."""
  x, y = _based(given), _based(true)
  if x is None or y is None or not (x[1] or y[1]):
    return None
  return x[0] == y[0] and (x[1] == y[1] or not (x[1] and y[1]))


def _based(text: str) -> tuple[str, str] | None:
  text = notation.tight(text)
  if m := _BASED.fullmatch(text):
    name = notation.words(m[2] or m[3]).strip("()")
    return m[1].replace(",", "").lstrip("0"), _BASE_NAMES.get(name, name) or "?"
  return (text.lstrip("0"), "") if re.fullmatch(r"[0-9A-Z]+", text) else None


def _symbolic(given: str, true: str) -> bool:
  if (_ADJACENT.search(given) and not _ADJACENT.search(true)) or given.endswith("\\"):
    return False
  # Here and not above: math-verify takes half a second to import, and only workers need it.
  from hbpo_jax.grading import symbolic
  return symbolic.equal(given, true)
