r"""Symbolic comparison on math-verify: its LaTeX grammar reads both sides, values at fixed points decide where they
can, and its `verify` decides the rest.

Only the LaTeX reader of math-verify is used. Its reader of plain expressions hands text to Python's `eval`. Its time
limits (SIGALRM) are off; the worker that calls this has its own.
"""

import fractions
import logging
import math
import re
from typing import Any

from latex2sympy2_extended import NormalizationConfig
import math_verify
from mpmath.libmp import NoConvergence
import sympy
from sympy.polys.polyerrors import BasePolynomialError

from hbpo_jax.grading import numbers

# SymPy's classes are typed too loosely to be checked.
Expr = Any

# Digits carried, and the relative difference below which two values are equal. Algebraic answers of a line's length
# that differ by less than 1e-25 do not occur by accident.
_DIGITS = 50
_MAX_DIGITS = 1000
_TOLERANCE = sympy.Float("1e-25", _DIGITS)

# Digits from which a value is not written out to compare it with a smaller one.
_HUGE = 4e5

# Its own unit stripping would read '25 t' as 25 (tons); `units` has done that part.
_LATEX = (math_verify.LatexExtractionConfig(boxed_match_priority=-1, normalization_config=NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")),)
# What SymPy raises on expressions that it cannot evaluate. Anything else is a defect and ends the worker.
FAILURES = (
    ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, BasePolynomialError,
    NoConvergence)

# Where d is more than a letter: integrals, derivatives, names of environments such as aligned.
_NOT_PLAIN_D = re.compile(r"\\i*int(?![a-zA-Z])|\\begin(?![a-zA-Z])|\\frac\s*\{\s*d[^{}]*\}\s*\{\s*d|\bd/d")
_LETTER = re.compile(r"(\\mathbb\s*\{[A-Z]\}|\\[a-zA-Z]+)|([a-zA-Z])")

# Fixed points for the free symbols: symbol k of point j takes entry (k + 3 * j). Unrelated fractions, away from the
# zeros and poles that answers have.
_VALUES = tuple(sympy.Rational(p, q) for p, q in (
    (17, 11), (29, 13), (37, 31), (101, 23), (53, 41), (61, 19), (83, 47), (131, 37), (71, 59), (43, 29),
    (97, 53), (113, 67)))
_SIGNS = ((1, 1), (1, 1), (1, 1), (-1, -1), (-1, 1), (1, -1))

logging.getLogger("math_verify").setLevel(logging.ERROR)


def equal(given: str, true: str) -> bool:
  """Whether two cleaned LaTeX expressions are equal.

  Args:
    given: the answer of a response.
    true: the true answer.
  """
  if given.count("'") != true.count("'"):
    return False
  if (decimal := _compare_decimal(given, true)) is not None:
    return decimal
  given, true = _one_case(*_plain_gamma(*_plain_d(given, true)))
  a, b = _parse(given), _parse(true)
  if a is None or b is None:
    return False
  if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
    if (_digits(a) > _HUGE) != (_digits(b) > _HUGE):
      return False
    try:
      decided = _compare_values(_exact(a), _exact(b))
    except FAILURES:
      decided = None
    if decided is not None:
      return decided
  if math_verify.verify(b, a, timeout_seconds=0, allow_set_relation_comp=True):
    return True
  return isinstance(a, sympy.Eq) and isinstance(b, sympy.Eq) and _proportional(a, b)


def _parse(text: str) -> Expr:
  found = math_verify.parse(
      f"${text}$", extraction_config=_LATEX, fallback_mode="no_fallback", extraction_mode="first_match",
      parsing_timeout=0)
  if len(found) != 1 or isinstance(found[0], str):
    return None
  return found[0]


def _proportional(a: Expr, b: Expr) -> bool:
  """Whether one equation is the other times a number, as 2x^2 = 8 is x^2 = 4; one that is solved has one form."""
  if any(side.is_Symbol and not other.free_symbols for e in (a, b) for side, other in (e.args, e.args[::-1])):
    return False
  f, g = (_exact(e.lhs) - _exact(e.rhs) for e in (a, b))
  free: Any = f.free_symbols | g.free_symbols
  rank = {name: k for k, name in enumerate(sorted({s.name for s in free}))}
  if not rank or len(rank) > len(_VALUES):
    return False
  ratios = []
  for j in range(len(_SIGNS)):
    point = {s: _VALUES[(rank[s.name] + 3 * j) % len(_VALUES)] for s in free}
    try:
      top, bottom = (_value(x.xreplace(point).doit(), _DIGITS) for x in (f, g))
    except FAILURES:
      return False
    if top is None or bottom is None or abs(top) <= _TOLERANCE or abs(bottom) <= _TOLERANCE:
      return False
    ratios.append(top / bottom)
  return all(abs(r - ratios[0]) <= _TOLERANCE * abs(ratios[0]) for r in ratios)


def _one_case(given: str, true: str) -> tuple[str, str]:
  """Capital letters renamed to free small ones in both: math-verify reads R and r as one symbol."""
  both = [m.group(2) for text in (given, true) for m in _LETTER.finditer(text) if m.group(2)]
  capitals = sorted({c for c in both if c.isupper()})
  free = [c for c in "abcfghjklmnopqrstuvwxyz" if c not in both and c.upper() not in capitals]
  own = [c for c in capitals if c.lower() not in both and c not in "DEI"]
  new = {c: c.lower() for c in own}
  for c in capitals:
    if c not in new and free:
      new[c] = free.pop()

  def rename(m: re.Match) -> str:
    return m.group(1) or new.get(m.group(2), m.group(2))

  return _LETTER.sub(rename, given), _LETTER.sub(rename, true)


def _plain_d(given: str, true: str) -> tuple[str, str]:
  """The letter d renamed in both to a free one where nothing is integrated or derived: cd is a product like dc."""
  if _NOT_PLAIN_D.search(given + true):
    return given, true
  used = {m.group(2).lower() for text in (given, true) for m in _LETTER.finditer(text) if m.group(2)}
  free = [c for c in "abcfghjklmnopqrstuvwxyz" if c not in used]
  if "d" not in used or not free:
    return given, true
  rename = lambda m: free[-1] if m.group(2) == "d" else m.group()
  return _LETTER.sub(rename, given), _LETTER.sub(rename, true)


def _plain_gamma(given: str, true: str) -> tuple[str, str]:
  r"""\gamma and \Gamma renamed to free letters in both, but in front of a bracket: math-verify reads functions."""
  free = [letter for letter in ("\\omega", "\\tau", "\\rho", "\\mu", "\\eta") if letter not in given + true]
  for name in ("gamma", "Gamma"):
    pattern = re.compile(rf"\\{name}(?![a-zA-Z])(?!\s*\()")
    if free and (pattern.search(given) or pattern.search(true)):
      letter = free.pop().replace("\\", "\\\\") + " "
      given, true = pattern.sub(letter, given), pattern.sub(letter, true)
  return given, true


def _exact(expr: Expr) -> Expr:
  """The expression with its decimals as fractions and the letter i as the imaginary unit."""
  swap = {f: sympy.Rational(str(f)) for f in expr.atoms(sympy.Float) if f.is_finite}
  swap |= {s: sympy.I for s in expr.free_symbols if s.name == "i"}
  return expr.xreplace(swap) if swap else expr


def _compare_decimal(given: str, true: str) -> bool | None:
  """Where one side is a plain decimal and the other a closed form: whether it rounds it. None: not such a pair."""
  a, b = numbers.parse(given), numbers.parse(true)
  if (a is None) == (b is None):
    return None
  number, text = (a, true) if a is not None else (b, given)
  if number is None or number.decimals is None:
    return None
  other = _parse(text)
  if not isinstance(other, sympy.Expr) or other.free_symbols:
    return None
  if _digits(other) > _HUGE:
    return False
  try:
    value = sympy.N(_exact(other).doit(), _DIGITS)
  except FAILURES:
    return None
  if not (value.is_Float or value.is_Integer):
    return None
  exact = sympy.Rational(value)
  exact = fractions.Fraction(int(exact.p), int(exact.q))
  return abs(exact - number.value) <= abs(exact) / 10 ** 25 or numbers.is_rounding(number, exact)


def _compare_values(a: Expr, b: Expr) -> bool | None:
  """True or False where values at fixed points decide, else None.

  Expressions that agree at all points are equal; that differ at one with positive arguments are not. What differs
  only where a symbol is negative (such as sqrt(x^2) and x) is left to math-verify.
  """
  if a == b:
    return not a.has(sympy.nan, sympy.zoo)
  free: Any = a.free_symbols | b.free_symbols
  symbols: list[Expr] = list(free)
  # By name: math-verify may make x real in one expression and complex in the other.
  rank = {name: k for k, name in enumerate(sorted({s.name for s in symbols}))}
  if len(rank) > len(_VALUES):
    return None
  a, b = a.doit(), b.doit()
  if symbols and any(x.has(sympy.floor, sympy.ceiling, sympy.Mod) for x in (a, b)):
    return _compare_steps(a, b, symbols, rank)
  seen: list[bool] = []
  for j, signs in enumerate(_SIGNS if symbols else _SIGNS[:1]):
    point = {s: _VALUES[(rank[s.name] + 3 * j) % len(_VALUES)] * signs[rank[s.name] % 2] for s in symbols}
    same = _same_value(a.xreplace(point), b.xreplace(point))
    if same is None:
      continue
    if not same and 1 in signs and -1 not in signs:
      return False
    seen.append(same)
  enough = 1 if not symbols else 4
  return True if len(seen) >= enough and all(seen) else None


def _compare_steps(a: Expr, b: Expr, symbols: list[Expr], rank: dict[str, int]) -> bool | None:
  """As `_compare_values`, at whole numbers that follow each other: what is rounded differs at few of them."""
  seen = []
  for j in range(30):
    point = {s: sympy.Integer(40 + 31 * rank[s.name] + j * (1 + 2 * rank[s.name])) for s in symbols}
    same = _same_value(a.xreplace(point), b.xreplace(point))
    if same is False:
      return False
    seen.append(bool(same))
  return True if all(seen) else None


def _digits(expr: Expr) -> float:
  """About how many digits the exact value of a part of the expression has at most; inf where it cannot be written out.

  A power tower is recognised here in microseconds instead of being computed until the limit.
  """
  largest = 0.0
  sizes: dict[Expr, float] = {}
  part: Expr
  for part in sympy.postorder_traversal(expr):
    below = [sizes.get(arg, 0.0) for arg in part.args]
    size = 0.5  # of a symbol at one of the fixed points
    if part.is_Rational and part != 0:
      size = max(math.log10(abs(int(part.p))), math.log10(int(part.q)))
    elif isinstance(part, sympy.Pow):
      size = below[0] * _bound(part.exp, below[1])
    elif isinstance(part, (sympy.factorial, sympy.factorial2)):
      size = below[0] * _bound(part.args[0], below[0])
    elif part.is_Add or part.is_Mul:
      size = sum(below)
    sizes[part] = size
    largest = max(largest, size)
  return largest


def _bound(expr: Expr, digits: float) -> float:
  """About the largest absolute value of an expression of so many digits."""
  if expr.is_Rational:
    return float(abs(expr)) if digits < 300 else math.inf
  return 10.0 ** digits if digits < 300 else math.inf


def _same_value(a: Expr, b: Expr) -> bool | None:
  """Whether two expressions without symbols are equal, exactly where they are rational; None: no finite value."""
  a, b = a.doit(), b.doit()
  if a.is_Rational and b.is_Rational:
    return bool(a == b)
  x, y = _value(a, _DIGITS), _value(b, _DIGITS)
  if x is None or y is None:
    return None
  size = abs(x) + abs(y)
  if size > 1:
    # Digits behind the point count, so that a big number and its successor differ.
    digits = _DIGITS + min(int(sympy.log(size, 10)) + 1, _MAX_DIGITS)
    x, y = _value(a, digits), _value(b, digits)
  return x is not None and y is not None and bool(abs(x - y) <= _TOLERANCE * min(size, 1))


def _value(expr: Expr, digits: int) -> Expr:
  value = sympy.N(expr, digits)
  return value if value.is_number and value.is_finite and not value.has(sympy.nan, sympy.zoo, sympy.oo) else None
