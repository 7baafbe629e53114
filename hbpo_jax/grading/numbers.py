r"""Plain numbers in all their spellings, read exactly. Never evaluates text: a small grammar of regular expressions."""

from fractions import Fraction
import re
from typing import NamedTuple

from hbpo_jax.grading.notation import strip_group, tight

# Numbers beyond this many digits are left to the symbolic comparison, which runs under a limit.
_MAX_DIGITS = 1300
# Digits from which a decimal may stand for a number that it only rounds: 0.333333 for 1/3, but not 0.33.
_ROUNDING_DIGITS = 6


class Number(NamedTuple):
  """value: exact. decimals: digits after the point as written, None for an integer, a fraction or a power."""
  value: Fraction
  decimals: int | None = None


_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
_DECIMAL = re.compile(_UNSIGNED)
_SPACED_COMMA = re.compile(r",\s")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\{(\d+)\}")
_E_NOTATION = re.compile(rf"({_UNSIGNED})[eE]([+-]?\d{{1,4}})")
_SCIENTIFIC = re.compile(rf"(?:({_UNSIGNED})\\(?:times|cdot))?10\^(?:\{{([+-]?\d{{1,4}})\}}|(\d))")
_POWER = re.compile(r"(\d+)\^(?:\{(-?\d{1,4})\}|(\d))")
_FRACTION = re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}")
_SLASH = re.compile(rf"\(?([+-]?{_UNSIGNED})\)?/\(?([+-]?{_UNSIGNED})\)?")
_MIXED = re.compile(r"(\d+)(?:\s*\\frac\{(\d+)\}\{(\d+)\}|\s+(\d+)/(\d+))")


def parse(text: str) -> Number | None:
  r"""The number that a cleaned text writes, or None where it is anything else.

  Integers, decimals, thousands separators, repeating decimals, a/b, \frac{a}{b}, mixed numbers, a \times 10^{n}, 1e-9,
  and powers of integers, each with a sign. A value beyond about 1300 digits is None.
  """
  if _SPACED_COMMA.search(text):
    return None  # A list.
  text = tight(strip_group(text))
  sign = 1
  while text[:1] in ("+", "-") and text[1:2] not in ("+", "-"):
    sign = -sign if text[0] == "-" else sign
    text = strip_group(text[1:].lstrip())
    if not text.startswith("("):
      break
    text = _unbracket(text)
  text = _unbracket(text)
  if text[:1] in ("+", "-") and sign == 1:
    sign, text = (-1 if text[0] == "-" else 1), text[1:].lstrip()
  if len(text) > _MAX_DIGITS:
    return None
  number = _unsigned(text)
  return None if number is None else Number(sign * number.value, number.decimals)


def _unbracket(text: str) -> str:
  inner = text[1:-1] if text.startswith("(") and text.endswith(")") else text
  return text if "(" in inner or ")" in inner else inner.strip()


def _decimal(text: str) -> Number:
  whole, dot, part = text.replace(",", "").partition(".")
  return Number(Fraction(int((whole + part) or "0"), 10 ** len(part)), len(part) if dot else None)


def _unsigned(text: str) -> Number | None:
  if _DECIMAL.fullmatch(text):
    return _decimal(text)
  if m := _REPEATING.fullmatch(text):
    lead, fixed, cycle = m.groups()
    tail = Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed))
    return Number(Fraction(int((lead + fixed) or "0"), 10 ** len(fixed)) + tail)
  if m := _E_NOTATION.fullmatch(text):
    return _scaled(m[1], int(m[2]))
  if m := _SCIENTIFIC.fullmatch(text):
    return _scaled(m[1] or "1", int(m[2] or m[3]))
  if m := _POWER.fullmatch(text):
    base, exponent = int(m[1]), int(m[2] or m[3])
    too_long = len(m[1]) * abs(exponent) > _MAX_DIGITS
    return None if too_long or (base == 0 and exponent < 0) else Number(Fraction(base) ** exponent)
  if m := _FRACTION.fullmatch(text) or _SLASH.fullmatch(text):
    if m[1].startswith("\\frac") or m[2].startswith("\\frac"):
      return None
    top, bottom = parse(m[1]), parse(m[2])
    return None if top is None or bottom is None or bottom.value == 0 else Number(top.value / bottom.value)
  if m := _MIXED.fullmatch(text):
    top, bottom = int(m[2] or m[4]), int(m[3] or m[5])
    return None if bottom == 0 else Number(int(m[1]) + Fraction(top, bottom))
  return None


def _scaled(mantissa: str, exponent: int) -> Number | None:
  if abs(exponent) > _MAX_DIGITS:
    return None
  return Number(_decimal(mantissa).value * Fraction(10) ** exponent)


def significant_digits(number: Number) -> int:
  """Significant digits of a number written as a decimal; 0 for one that is not."""
  if number.decimals is None:
    return 0
  return len(str(abs(number.value.numerator) * 10 ** number.decimals // number.value.denominator))


def is_rounding(rough: Number, value: Fraction) -> bool:
  """Whether a decimal of at least six significant digits is `value` rounded to the digits written."""
  if rough.decimals is None or significant_digits(rough) < _ROUNDING_DIGITS:
    return False
  return abs(rough.value - value) * 2 * 10 ** rough.decimals <= 1


def equal(a: Number, b: Number) -> bool:
  """Equal exactly, or one is a decimal that rounds the other to at least six significant digits.

  Relative by construction: 2.88e-19 and 8.22e-19 differ, however close both are to 0.
  """
  return a.value == b.value or is_rounding(a, b.value) or is_rounding(b, a.value)
