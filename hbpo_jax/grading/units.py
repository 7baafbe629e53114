"""Units, percent signs and scale words at the end of a quantity: split off, and compared where both sides have one."""

from fractions import Fraction
import re
from typing import NamedTuple

from hbpo_jax.grading import numbers


class Quantity(NamedTuple):
  """number: LaTeX without the unit. unit: lower-case words, '' for none. percent: it had a percent sign."""
  number: str
  unit: str = ""
  percent: bool = False


# Spellings of one unit, first the name that stands for all. A unit that is not here agrees with every other.
_ALIASES = [
    "mm millimeter millimetre", "cm centimeter centimetre", "dm decimeter decimetre", "m meter metre",
    "km kilometer kilometre", "nm nanometer", "in inch inche", "ft foot feet", "yd yard", "mi mile",
    "g gram gm", "mg milligram", "kg kilogram", "lb pound", "oz ounce", "l liter litre", "ml milliliter millilitre",
    "ms millisecond", "s sec second", "min minute", "h hr hour", "day", "week", "month", "yr year", "mph", "kmh kph",
    "hz hertz", "j joule", "kj kilojoule", "n newton", "w watt", "v volt", "k kelvin", "pa pascal", "mol mole", "ev",
    "usd dollar", "cent", "degree deg", "radian rad",
]
_CANONICAL = {alias: row.split()[0] for row in _ALIASES for alias in row.split()}
# Those that need no \\text around them; the longest first, for the pattern. Single letters may be symbols.
_BARE = "|".join(sorted(
    {a for a in _CANONICAL if len(a) > 1} | {"unit", "people", "square", "cubic", "sq", "cu", "time", "point"},
    key=len, reverse=True))
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}

# A unit never says how much, so a text with one of these is not a unit.
_NO_UNIT = re.compile(
    r"\b(?:or|and|not|to|than|less|more|least|most|plus|minus|times|over|divided|about|approximately|between|if|where"
    r"|for|mod|dozen|half|quarter|i|e|pi)\b")

# One way only to read each space: two ways for one of n would make 2^n for the whole.
_POWER = r"(?:\s*\^\s*\{?\s*-?[0-9]\s*\}?)?"
_TEXT = (
    r"\\(?:text|textrm|textnormal|mathrm|mbox|operatorname)\s*"
    r"\{(?:[^{}0-9^_]|\^(?:-?[0-9]|\{-?[0-9]\})|_\{\\?[a-zA-Z]+\})*\}")
_SYMBOL = rf"\\(?:Omega|AA)(?![a-zA-Z])|\\mu\s*(?:{_TEXT}|[a-zA-Z](?![a-zA-Z]))"
_FRACTION = rf"\\frac\s*\{{{_TEXT}{_POWER}\}}\s*\{{{_TEXT}{_POWER}\}}"
_WORDED = rf"(?:{_TEXT}|{_SYMBOL}|{_FRACTION}){_POWER}"
_TEXT_UNIT = re.compile(
    rf"(?P<number>.*[0-9)}}\]a-zA-Z](?<!\\mu))\s*(?P<unit>{_WORDED}(?:(?:\s*(?:/|\\cdot))?\s*{_WORDED})*)")
_PER_UNIT = re.compile(rf"(?P<number>[^a-zA-Z]*[0-9])\s*/\s*(?P<unit>{_WORDED})")
_BARE_WORD = rf"(?:{_BARE})(?:e?s)?\b"
_BARE_UNIT = re.compile(
    rf"(?P<number>.*[0-9)}}])\s*(?P<unit>{_BARE_WORD}(?:(?:\s*(?:/|per))?\s*{_BARE_WORD}|/[a-z]{{1,3}}\b)*{_POWER}"
    r"|k?m/s(?:\s*\^\s*\{?2\}?)?|m\s*\^\s*\{?[23]\}?"
    r"|(?<=\s)[a-zA-Z]{3,}(?:\s+[a-zA-Z]{3,})?)")
_PERCENT = re.compile(r"(?P<number>.*[0-9)}])\s*(?:\\?%|\\(?:text|mathrm|mbox)\s*\{\s*per\s?cent\s*\}|per\s?cent)")
_COMMAND = re.compile(r"\\(?:text|textrm|textnormal|mathrm|mbox|operatorname)")


def split(text: str) -> Quantity:
  """The quantity in a cleaned text; a text without a unit comes back whole."""
  if m := _PERCENT.fullmatch(text):
    return Quantity(m["number"].strip(), percent=True)
  m = _TEXT_UNIT.fullmatch(text) or _PER_UNIT.fullmatch(text) or _BARE_UNIT.fullmatch(text)
  if not m:
    return Quantity(text)
  number = m["number"].strip()
  while m := _TEXT_UNIT.fullmatch(number):  # The pattern takes the last of '5 \text{ m}^2 \text{s}^{-1}'.
    number = m["number"].strip()
  unit = re.sub(r"[\s{}^\\]+", " ", _COMMAND.sub(" ", text.removeprefix(number))).strip().lower()
  scale = unit.split()[0] if unit else ""
  if scale in _SCALES:
    inner = numbers.parse(number)
    if inner is None:
      return Quantity(text)
    scaled: Fraction = inner.value * 10 ** _SCALES[scale]
    return Quantity(f"\\frac{{{scaled.numerator}}}{{{scaled.denominator}}}", unit.removeprefix(scale).strip())
  if _NO_UNIT.search(unit):
    return Quantity(text)
  return Quantity(number, unit)


def split_same(a: Quantity, b: Quantity) -> Quantity:
  r"""`a` with the unit of `b` split off, where `a` writes that unit as a bare symbol: '10 m' beside '10\text{ m}'."""
  number = a.number.removesuffix(b.unit).rstrip() if b.unit and not a.unit else a.number
  return Quantity(number, b.unit) if number and number != a.number else a


def agree(a: str, b: str) -> bool:
  """Whether two units may be the same: False only for two that are both known and differ, such as cm and m."""
  x, y = _known(a), _known(b)
  return x is None or y is None or x == y


def _known(unit: str) -> str | None:
  word = unit.strip(". ")
  for form in (word, word.removesuffix("s"), word.removesuffix("es")):
    if form in _CANONICAL:
      return _CANONICAL[form]
  return None
