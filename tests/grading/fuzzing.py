"""Random items for the grader whose right verdict is known without it: by construction, or by exact rationals.

An item is (response, truth, expected, family): expected True = must be correct, False = must not be, None = either, but
it must not crash, hang or leave anything. Everything follows from one seed.
"""

from collections.abc import Callable, Iterator
import fractions
import random
from typing import NamedTuple

from tests.grading import corpus

Fraction = fractions.Fraction


class Item(NamedTuple):
  response: str
  truth: str
  expected: bool | None
  family: str


def items(seed: int, n: int) -> Iterator[Item]:
  """n items; the families take turns by chance, the costly one rarely."""
  draw = random.Random(seed)
  families, weights = zip(*_FAMILIES.items(), strict=True)
  for family in draw.choices(families, weights, k=n):
    answer, truth, expected = family(draw)
    yield Item(_boxed(draw, answer), truth, expected, family.__name__.strip("_"))


def _boxed(draw: random.Random, answer: str) -> str:
  """A response with the answer in its last box."""
  before = draw.choice(["", "so ", r"\boxed{1} no, ", "<think>x \\boxed{2}</think>", r"{\boxed{ {", "\x1b[31m",
      "\u202e"])
  return before + rf"\boxed{{{answer}}}" + draw.choice(["", ".", " $", r" \boxed{", "</s>", "\x00"])


# Numbers: every spelling of one rational equals it, and no spelling of another does.

def _spelling(draw: random.Random, x: Fraction) -> str:
  sign = "-" if x < 0 else ""
  p, q, k = abs(x.numerator), x.denominator, draw.randint(2, 9)
  forms = [rf"{sign}\frac{{{p * k}}}{{{q * k}}}", rf"\frac{{{sign}{p}}}{{{q}}}", f"{sign}{p}/{q}",
      rf"{sign}\dfrac{{{p}}}{{{q}}}",
           rf"-\left(-\frac{{{sign}{p}}}{{{q}}}\right)", rf"{sign}\frac{{{p}}}{{{q}}} + 0",
           rf"{sign}\frac{{{p}}}{{2}} \cdot \frac{{2}}{{{q}}}",
           rf"\frac{{{x.numerator * k + q * k * k}}}{{{q * k}}} - {k}"]
  if q == 1:
    forms += [f"{sign}{p}", f"{sign}{p:,}", f"{sign}{p}.0", rf"{sign}{p}.\,", f"${sign}{p}$", f"{sign}0{p}".replace("0",
        "", 1)]
  if q in (1, 2, 4, 5, 8, 10, 16, 20, 25, 40, 50, 100):
    forms.append(_decimal(x))
  return draw.choice(forms)


def _decimal(x: Fraction) -> str:
  scaled, digits = abs(x), 0
  while scaled.denominator != 1:
    scaled, digits = scaled * 10, digits + 1
  text = str(scaled.numerator).zfill(digits + 1)
  return ("-" if x < 0 else "") + (f"{text[:-digits]}.{text[-digits:]}" if digits else text)


def _rational(draw: random.Random) -> Fraction:
  top = draw.choice([draw.randint(-20, 20), draw.randint(-10**4, 10**4), draw.randint(-10**12, 10**12)])
  return Fraction(top, draw.choice([1, 1, 2, 4, 5, 8, 10, 25, draw.randint(1, 30), draw.randint(1, 10**4)]))


def _equal_rationals(draw: random.Random) -> tuple[str, str, bool | None]:
  x = _rational(draw)
  return _spelling(draw, x), _spelling(draw, x), True


def _other_rationals(draw: random.Random) -> tuple[str, str, bool | None]:
  x = _rational(draw)
  y = draw.choice([
      -x, x + 1, x - 1, x * 10, x / 10, x + Fraction(1, draw.randint(2, 30)), 1 / x if x else x + 1, x * 2, x * x,
      Fraction(x.denominator, abs(x.numerator) + 1), x + Fraction(x.numerator, 1000), _rational(draw)])
  given, truth = _spelling(draw, y), _spelling(draw, x)
  # A decimal of six digits or more may stand for what it rounds.
  if x == y or abs(x - y) <= Fraction(1, 10**4) * abs(x):
    return given, truth, True if x == y else None
  return given, truth, False


def _great_integers(draw: random.Random) -> tuple[str, str, bool | None]:
  x = draw.randint(10**20, 10**draw.randint(21, 300))
  y = x + draw.choice([0, 0, 1, -1, 10, 10**9])
  return draw.choice([f"{y}", f"{y:,}", f"{y} + 0", f"{y - 1} + 1"]), draw.choice([f"{x}", f"{x:,}"]), x == y


# Expressions in nested radicals and powers, valued with exact integers a + b sqrt(n).

def _surds(draw: random.Random) -> tuple[str, str, bool | None]:
  n, m = draw.choice([2, 3, 5, 6, 7, 10, 11]), draw.randint(2, 12)
  a, b = draw.randint(-30, 30), draw.choice([-1, 1]) * draw.randint(1, 12)
  c, d = draw.choice([(a, b), (a, b), (a, -b), (-a, b), (a + 1, b), (a, b + 1), (b, a or 1)])
  plain = f"{a} + {b}\\sqrt{{{n}}}".replace("+ -", "- ")
  other = draw.choice([
      f"{d}\\sqrt{{{n}}} + {c}", f"\\frac{{{c * m} + {d}\\sqrt{{{n * m * m}}}}}{{{m}}}",
      f"{c} + {d} \\cdot {n}^{{1/2}}",
      f"{c} - {-d}\\sqrt{{{n}}}", f"{c} + \\frac{{{d * n}}}{{\\sqrt{{{n}}}}}"])
  return other.replace("+ -", "- ").replace("- -", "+ "), plain, (a, b) == (c, d)


# Polynomials by coefficients: factored against expanded.

def _polynomials(draw: random.Random) -> tuple[str, str, bool | None]:
  r, s, k = draw.randint(-9, 9), draw.randint(-9, 9), draw.choice([1, 1, 2, 3, -1])
  x = draw.choice("xytn")
  true = [k, -k * (r + s), k * r * s]
  given = list(true)
  if not (same := draw.random() < 0.5):
    given[draw.randrange(3)] += draw.choice([-2, -1, 1, 2])
  factored = f"{k if k != 1 else ''}({x} - {r})({x} - {s})".replace("- -", "+ ").replace("-1(", "-(")
  terms = [f"{given[0]}{x}^2", f"{given[1]}{x}", f"{given[2]}"]
  draw.shuffle(terms)
  expanded = " + ".join(terms).replace("+ -", "- ")
  return (expanded, factored, same) if draw.random() < 0.5 else (factored, expanded, same)


# Lists, sets, tuples, intervals, matrices: of one element, another; of another order, another if order counts.

def _collections(draw: random.Random) -> tuple[str, str, bool | None]:
  values = draw.sample(range(-50, 50), draw.randint(2, 5))
  kind = draw.choice(["set", "list", "tuple"])
  left, right = {"set": (r"\{", r"\}"), "list": ("", ""), "tuple": ("(", ")")}[kind]
  join = lambda v: left + ", ".join(_spelling(draw,
      Fraction(t)) if draw.random() < 0.3 and kind != "list" else str(t) for t in v) + right
  given = list(values)
  what = draw.choice(["same", "permuted", "changed", "longer", "shorter"])
  if what == "permuted":
    given.reverse()
  elif what == "changed":
    given[draw.randrange(len(given))] += 100
  elif what == "longer":
    given.append(77)
  elif what == "shorter" and len(given) > 2:
    given.pop()
  else:
    what = "same"
  a, b = join(given), join(values)
  if "," in f"{max(map(abs, given)):,}":
    return a, b, None
  return a, b, what == "same" or (what == "permuted" and kind != "tuple")


def _intervals(draw: random.Random) -> tuple[str, str, bool | None]:
  a, b = sorted(draw.sample(range(-40, 40), 2))
  left, right = draw.choice("(["), draw.choice(")]")
  what = draw.choice(["same", "left", "right", "bound"])
  left2 = {"(": "[", "[": "("}[left] if what == "left" else left
  right2 = {")": "]", "]": ")"}[right] if what == "right" else right
  b2 = b + 1 if what == "bound" else b
  first, second = "<" if left2 == "(" else r"\le", "<" if right2 == ")" else r"\leq"
  given = draw.choice([
      rf"\left{left2}{a}, {b2}\right{right2}", f"{left2}{a},{b2}{right2}", f"{a} {first} x {second} {b2}"])
  return given, rf"x \in {left}{a},{b}{right}" if draw.random() < 0.3 else f"{left}{a},{b}{right}", what == "same"


def _matrices(draw: random.Random) -> tuple[str, str, bool | None]:
  rows, columns = draw.randint(1, 3), draw.randint(2, 3)
  values = [[draw.randint(-9, 9) for _ in range(columns)] for _ in range(rows)]
  given = [list(row) for row in values]
  if changed := draw.random() < 0.6:
    given[draw.randrange(rows)][draw.randrange(columns)] += draw.choice([-1, 1, 20])
  text = lambda m, kind: rf"\begin{{{kind}}}" + r"\\ ".join(" & ".join(map(str, row)) for row in m) + rf"\end{{{kind}}}"
  return text(given, draw.choice(["pmatrix", "bmatrix"])), text(values, "pmatrix"), not changed


def _quantities(draw: random.Random) -> tuple[str, str, bool | None]:
  units = ("cm", "m", "km", "kg", "g", "hours", "seconds", "dollars", "degrees")
  unit, x = draw.choice(units), draw.randint(2, 5000)
  y, other = draw.choice([(x, unit), (x, unit), (x + 1, unit), (x, draw.choice(units)), (x * 10, unit)])
  form = draw.choice([r"{}\text{{ {}}}", r"{} \text{{{}}}", r"{}\,\mathrm{{{}}}"])
  return form.format(y, other), rf"{x}\text{{ {unit}}}", (x, unit) == (y, other)


# Near the truth, but not it.

def _near(draw: random.Random) -> tuple[str, str, bool | None]:
  truth = draw.choice(["17", "-23", r"\frac{3}{7}", r"5\sqrt{2}", "x^2+1", r"\pi", "0.4375", r"\sin x"])
  form = draw.choice([
      "{}+1", "1+{}", "-({})", "2({})", r"\frac{{{}}}{{2}}", "({})^2+3", "{},9", "9,{}", r"\{{{},9\}}", "{}=99",
      r"{}\text{{ or }}99", "{}!+1",
      "({})^{{-1}}", r"\sqrt{{{}}}+2", "{}>0", r"{}\pm 1", "not {}", "{} or more", r"\neg {}", "{}/3", "{}i",
      r"{}\cdot 10^3", "e^{{{}}}", r"\log({})",
      "[{},{}+1]", "({},0)", "x={}+1", "{}\u200b+1", "{}\u202e+1", "\u202e{}+4", "{} <b>+1</b>", "{}; import os",
      "{}\x00+1"])
  return form.format(truth, truth), truth, False


# Noise: pieces of the corpus cut, joined, nested; against truths that none of them makes.

def _noise(draw: random.Random) -> tuple[str, str, bool | None]:
  parts = [piece if len(piece) < 40 else piece[:draw.randint(1, 40)] for piece in draw.choices(corpus.ALL,
      k=draw.randint(1, 4))]
  glue = draw.choice(["", " ", ",", "+", "^", "_", r"\\", "{", "}", "=", r"\frac", "\n", "\u200b"])
  answer = glue.join(parts)
  if draw.random() < 0.3:
    answer = "".join(chr(draw.choice([draw.randrange(32, 127), draw.randrange(0xd800),
        draw.randrange(0xd800, 0x11000)])) for _ in range(30)) + answer
  return answer, draw.choice([r"\frac{7919}{104729}", "86028121", r"8191\sqrt{127}", r"x^7-131x+524287",
      "(613, 1021)"]), False


def _attack(draw: random.Random) -> tuple[str, str, bool | None]:
  return draw.choice(corpus.ALL), draw.choice(corpus.TRUTHS), False


_FAMILIES: dict[Callable[[random.Random], tuple[str, str, bool | None]], float] = {
    _equal_rationals: 14, _other_rationals: 18, _great_integers: 5, _surds: 8, _polynomials: 8, _collections: 10,
    _intervals: 7,
    _matrices: 6, _quantities: 6, _near: 10, _noise: 12, _attack: 0.6}
