"""Which answers are equal: small cases of every kind, by hand."""

import json
import os
import random
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from hbpo_jax.grading import equivalence, extraction, notation, numbers

# (answer of the response, true answer), by kind.
EQUAL = {
    "number": [
        ("5.", "5"), (".5", "0.5"), ("-.5", "-0.5"), ("+5", "5"), ("08", "8"), ("-0", "0"), ("82.500", "82.50"),
        ("4.5e33", r"4.5 \times 10^{33}"), (r"3.3 \cdot 10^{-10}", r"3.3 \times 10^{-10}"), ("10^{-3}", "0.001"),
        (r"0.\overline{3}", r"\frac13"), ("0.333333333", r"\frac13"), ("3.14159265", r"\pi"), ("{5}", "5"),
        ("(5)", "5"),
        ("1e400", "10^{400}")],
    "fraction": [
        (r"\frac12", "0.5"), (r"\dfrac{150}{37}", "150/37"), (r"\frac{-7}{10}", r"-\frac{7}{10}"), ("2/4", "1/2"),
        ("½", "0.5"),
        (r"1\frac{1}{4}", r"\frac54"), ("1 1/2", r"\frac{3}{2}"), (r"-2\frac{1}{3}", r"-\frac73"),
        (r"\frac{a}{b}", "a/b"),
        (r"\frac{\frac{1}{2}}{3}", r"\frac16")],
    "thousands": [
        ("16,200", "16200"), ("2{,}014", "2014"), (r"12\,000", "12000"), (r"\$32,\!348", "32348"),
        ("1 000 000", "1000000"),
        ("1,234.50", "1234.5"), ("3 million", r"3{,}000{,}000"), (r"1.5\text{ million}", "1500000")],
    "units": [
        (r"5\text{ cm}", "5"), ("5", r"5\text{ cm}"), ("5 cm", r"5\text{ centimeters}"), (r"10\ \mathrm{m/s}", "10"),
        (r"5\text{ cm}^2", "5"), ("20 hours", "20"), (r"25\pi \text{ square feet}", r"25\pi"), ("10 m", r"10\text{ m}"),
        (r"\text{5 cm}", "5"), ("50 km/h", "50")],
    "signs": [
        (r"\$100", "100"), ("€5", "5"), ("5 dollars", r"\$5"), ("45°", "45"), ("45", r"45^{\circ}"),
        (r"60 \text{ degrees}", r"60^\circ"), ("75%", "75"), ("75", r"75\%"), ("75 percent", r"75\%"),
        (r"7.5\%", "7.5"),
        (r"75\%", "0.75")],
    "roots": [
        (r"8i\sqrt3", r"8\sqrt{3}i"), (r"25\sqrt 3", r"25\sqrt{3}"), (r"\sqrt{12}", r"2\sqrt3"), ("2√3", r"2\sqrt3"),
        (r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}"), (r"\sqrt[3]{54}", r"3\sqrt[3]{2}"),
        ("sqrt(3)/2", r"\frac{\sqrt3}{2}"),
        (r"4+2\sqrt3", r"(1+\sqrt{3})^2")],
    "symbols": [
        ("(x+1)(x-1)", "x^2-1"), ("yx^2", "x^{2}y"), ("ab", "ba"), (r"\frac{1}{x}+1", r"\frac{x+1}{x}"),
        ("2(l+w)", "2l+2w"),
        ("R^2-r^2", "(R-r)(R+r)"), (r"\sqrt{x^2}", "|x|"), ("n(n+1)/2", r"\sum_{k=1}^n k"), (r"(n+1)!", r"(n+1) n!"),
        ("(x+1)^{100}", "(x+1)^{50}(x+1)^{50}")],
    "functions": [
        (r"\ln 4", r"2\ln 2"), (r"\log_2 8", "3"), (r"\tan^{-1}(2)", r"\arctan 2"), (r"\sin(2x)", r"2\sin x\cos x"),
        ("cos x", r"\cos(x)"), (r"\binom{10}{3}", "120"), ("5!", "120"), (r"\frac{10!}{8!}", "90"), ("2π", r"2\pi")],
    "powers": [
        ("2^{10}", "1024"), ("2**10", "1024"), (r"3^{-2}", r"\frac19"), ("2^{89}-1", str(2 ** 89 - 1)),
        ("8^{2/3}", "4"),
               (r"4^{500}", "2^{1000}")],
    "complex": [
        ("4i+3", "3+4i"), ("(1+i)^2", "2i"), (r"\frac{2}{1+i}", "1-i"), (r"e^{i\pi}", "-1"), (r"\sqrt{-4}", "2i")],
    "bases": [("1011_2", "1011_{2}"), ("1011", "1011_2"), (r"1011_{\text{two}}", "1011_2"), ("2A_{16}", "2A_{16}")],
    "lists": [
        ("2, 1", "1,2"), ("3, 1 and 2", "1,2,3"), (r"1 \text{ and } 2", "1,2"), (r"x = 1 \text{ or } x = 2", "1,2"),
        (r"\pm 3", "-3,3"),
        (r"1\pm\sqrt{2}", r"1-\sqrt2, 1+\sqrt2"), ("x=1,y=2", "y=2, x=1"), ("(2,1),(1,2)", "(1,2), (2,1)"),
        ("1,200", "200, 1")],
    "sets": [(r"\{2,1\}", r"\{1,2\}"), ("2,4,6", r"\{6,4,2\}"), (r"\varnothing", r"\emptyset"), (r"\{7\}", "7"),
             (r"\mathbb{R}\setminus\{0\}", r"(-\infty,0)\cup(0,\infty)")],
    "tuples": [
        ("(0.5, 4)", r"\left(\frac{1}{2},4\right)"), (r"\langle 1,2\rangle", "(1,2)"), ("(2;3)", "(2,3)"),
        (r"(x,y)=(1,2)", "(1,2)")],
    "intervals": [
        (r"2 \le x \le 5", "[2,5]"), ("x>3", r"(3,\infty)"), (r"3 \le x", r"[3,+\infty)"),
        (r"(0,1)\cup(2,3)", r"(2,3)\cup(0,1)"),
        (r"x<-1 \text{ or } x>2", r"(-\infty,-1)\cup(2,\infty)"), (r"x\in[2,5]", "[2,5]"),
        (r"x \in (-\infty,2)", "x<2"),
        (r"x\ne0", r"(-\infty,0)\cup(0,\infty)"), ("[0.5,2]", r"[\frac{1}{2},2]"), ("1 < x", "x > 1")],
    "matrices": [
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
        (r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        (r"\begin{pmatrix}0.5\\1\end{pmatrix}", r"\begin{pmatrix}\frac12\\1\end{pmatrix}")],
    "equations": [
        ("x = 5", "5"), ("x+1", "f(x)=x+1"), ("2x+3", "y=2x+3"), ("2x-y+3=0", "y=2x+3"), ("x^2+y^2-4=0", "x^2+y^2=4"),
        ("P(A)=0.5", "1/2"), (r"\angle ABC = 30^\circ", "30"), (r"\text{Area}=12", "12")],
    "text": [
        ("evelyn", r"\text{Evelyn}"), ("YES", "yes"), (r"\text{(C)}", "C"), ("(B)", r"\text{(B)}"),
        (r"\textbf{(B)}", "B"), ("B.", "B"),
        (r"\text{13}", "13"), (r"\mathbf{5}", "5"), ("6:00 PM", "6:00 pm")],
    "thousands with more": [
        (r"70,000 \text{ dollars}", "70000"), (r"70{,}000 \text{ dollars}", "70000"), ("$70,000 dollars", "70000"),
        (r"1,200\text{ cm}^2", "1200"), (r"1,200\%", "1200"), ("x = 1,200", "1200"), (r"2{,}000\pi", r"2000\pi"),
        (r"1{,}000\frac12", "1000.5"), ("320,000 acres", r"320000 \mbox{ acres}"), ("1000, 2000", "1{,}000, 2{,}000"),
        (r"1,000\,000", "1000000"), (r"1\,234\,567", "1234567"), (r"11,\! 111,\! 111", "11111111"),
        ("100,200", "200, 100"), ("120, 240", "240,120")],
    "greek": [
        (r"\lambda = 5", "5"), (r"\frac12\lambda", r"\frac{\lambda}{2}"), (r"\frac\pi6", r"\frac{\pi}{6}"),
        (r"\frac\pi{12}", r"\frac{\pi}{12}"), (r"-\frac\pi4", r"-\frac{\pi}{4}"), (r"\frac\theta2", r"\theta/2"),
        (r"2007+\frac{\pi}{2}", r"2007 + \frac\pi 2"), (r"\frac{\sqrt{3}}2", r"\frac{\sqrt3}{2}")],
    "products": [("abc(a+b+c)", "a^2bc+ab^2c+abc^2"), ("xyz(x+y+z)", "xyz(z+y+x)"), ("mgh(1+k)", "mgh+mghk")],
    "degrees in braces": [
        (r"\frac{360^\circ}{n}", r"\frac{360}{n}"), (r"\frac{90^\circ}{2}", "45"), (r"{45^\circ}", "45"),
        (r"\mathbf{45^\circ}", "45"), (r"45^{\circ}", "45")],
    "roots in unicode": [("√13", r"\sqrt{13}"), ("2√10", r"2\sqrt{10}"), ("1 ± √19", r"1 \pm \sqrt{19}")],
    "exponents": [
        ("10^-3", "0.001"), ("2^-1", "0.5"), ("e^-x", "e^{-x}"), ("x^-1", r"\frac1x"), (r"2\times10^12", "2e12"),
        ("4.5 x 10^33", "4.5e33"), ("exp(2x)", "e^{2x}")],
    "plain text": [
        (r"\sqrt[3]2", r"\sqrt[3]{2}"), (r"3\sqrt[3]4", r"3\sqrt[3]{4}"), ("pi/2", r"\frac{\pi}{2}"),
        ("2pi/3", r"\frac{2\pi}{3}"), ("25pi-4", r"25\pi-4"), ("x ≈ 5", "5")],
    "fonts": [
        (r"\textbf{\text{(C)}}", "C"), (r"\mathbf{\text{C}}", "C"), (r"\texttt{Evelyn}", r"\text{Evelyn}"),
        ("**C**", "C"), ("A, D, F", r"\text{A, D, F}"), (r"\text{E, H}", r"\text{H, E}"),
        (r"\text{B and C}", r"\text{B,C}"), (r"\text{9 and -7}", "9 and -7")],
    "steps": [(r"\lfloor\frac{n}{2}\rfloor+1", r"\lfloor\frac{n+2}{2}\rfloor"),
              (r"\lfloor(n+1)/2\rfloor", r"\lceil n/2\rceil")],
    "gamma": [(r"\alpha+\gamma", r"\gamma+\alpha"), (r"\gamma+1", r"1+\gamma"), (r"\Gamma+1", r"1 + \Gamma")],
    "sets by condition": [
        (r"\{x \mid x \le 0\}", r"(-\infty,0]"), (r"\{x : x\le0\}", r"(-\infty,0]"), ("(2,3)", r"\{x \mid 2 < x < 3\}"),
        (r"\{x\in\mathbb{R}\mid x\le 0\}", r"(-\infty,0]"), ("2<x<3", r"\{x \mid 2 < x < 3\}"),
        (r"\{x : 2<x<3\}", r"\{x \mid 2 < x < 3\}")],
    "times": [
        (r"3:30 \text{ PM}", "3:30 PM"), ("3:30 p.m.", "3:30 PM"),
        ("8:34 PM", r"8\!:\!34 \text{ p.m.}"), ("5:00", "05:00")],
    "rounded truths": [("8.24", r"\approx 8.24 \text{ mph}"), ("5", r"$\approx 5$")],
    "the letter d": [("cd", "dc"), (r"\frac{ad}{b}", r"\frac{da}{b}"), ("(a+b)d", "ad+bd")],
    "names of sums": [(r"S=\sum_{k=1}^n k", r"\frac{n(n+1)}{2}"), (r"\frac{n(n+1)}{2}", r"S = \sum_{k=1}^n k")],
    "compound units": [
        (r"9.8\ \mathrm{m/s^2}", "9.8"), (r"60 \frac{\text{miles}}{\text{hour}}", "60"),
        (r"3\ \mathrm{m\,s^{-2}}", "3"),
        (r"6.4 \times 10^{16}\ \mathrm{cm^{-3}}", r"6.4 \times 10^{16} \text{ cm}^{-3}"),
        (r"100\,\text{m}^2/\text{s}", "100"),
        (r"15000 \text{ kcal m}^{-2} \text{yr}^{-1}", "15000"), (r"5\,\mathrm{N\cdot m}", "5"), (r"10\,\Omega", "10"),
        (r"25\ \mu m", "25"), (r"10\ \mu\text{m}", "10"),
        (r"2\,\mathrm{M_{\odot}}", "2"), ("12 m^2", "12"), ("3 m/s", "3"),
        (r"\$18/\text{day}", "18"), (r"US\$18", r"\$18"), ("5.4¢", r"5.4 \text{ cents}"), ("75^o", r"75^\circ")],
    "exclusions": [
        (r"x\ne 1, x\ne 2", r"x\ne 1,2"), (r"(-\infty,1)\cup(1,2)\cup(2,\infty)", r"x\ne 2 \text{ and } x\ne 1"),
        (r"x \ne \pm2", r"(-\infty,-2)\cup(-2,2)\cup(2,\infty)")],
    "both hold": [("2<x<3", r"x>2 \text{ and } x<3"), (r"[2,3)", r"x \ge 2 \text{ and } x<3")],
    "factors of matrices": [
        (r"\frac{1}{2}\begin{pmatrix}2\\4\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"-\begin{pmatrix}1&0\\0&1\end{pmatrix}", r"\begin{pmatrix}-1&0\\0&-1\end{pmatrix}")],
    "multiples of equations": [("2x^2-20x+18=0", "x^2-10x+9=0"), (r"\frac{x^2}{4}+\frac{y^2}{9}=1", "9x^2+4y^2=36")],
    "several signs": [(r"\pm 1 \pm i", "1+i, 1-i, -1+i, -1-i"), (r"(\pm3, 2)", "(3,2),(-3,2)")],
    "chains": [
        ("0.56", r"0.56 = 56\%"), (r"56\%", r"0.56 = 56\%"), (r"\frac23 \approx 0.67", r"\frac23"), ("2+3=5", "5"),
        ("x=y=2", "2"), (r"\binom52 = 10", "10"), ("x = 2+3 = 5", "5")],
    "measures": [
        (r"\sin\theta=\frac12", r"\frac12"), ("|AB|=5", "5"), (r"\log_2 x=3", "3"), (r"m\angle ABC = 30^\circ", "30"),
        ("[ABC]=6", "6"), (r"\mathbb{E}[X]=3", "3"), (r"\gcd(a,b)=6", "6"),
        (r"90^\circ, 90^\circ", r"$\angle B E A_{1}=90$,$\angle A E B_{1}=90$")],
    "around": [(r"$\text{A,B}$", "A, B"), (r"\(\text{B, A}\).", r"\text{A,B}"), (r"\displaystyle \text{A,B}", "A,B"),
               (r"\text{2002 and 2003}", "2002 and 2003"), (r"5\$", "5"), ("1, 2, ...", r"1, 2, \ldots")],
    "announced": [("The answer is 5", "5"), (r"\text{The final answer is: }5", "5"), ("Answer: 5", "5")],
    "looks": [(r"\large 5", "5"), (r"\color{blue}5", "5"), (r"\textcolor{red}{5}", "5"), (r"5 \checkmark", "5")],
    "numerals": [("111111_2", "111111_{(2)}"), ("-37_8", "-37_{8}")],
}
DIFFERENT = {
    "number": [
        (r"2.88\times10^{-19}", r"8.224\times 10^{-19}"), ("3.001", "3"), ("0.33", r"\frac13"), ("1.414", r"\sqrt2"),
        ("6.28", r"2\pi"),
        ("1000001", "1000000"), ("1000000.5", "1000000"), ("41 42", "83"), ("1 2", "12"), ("3,5", "3.5"),
        ("-5", "5"), ("5+", "5"),
        (r"\frac{1}{0}", "0"), ("1e400", "10^{401}")],
    "equation": [
        ("x^2+x=5", "5"), ("3 = 5", "5"), ("1=2=3=4=5", "5"), ("x+y=5", "5"), ("y=2x-3", "y=2x+3"), ("x=2", "y=2"),
        (r"\approx 5", "5")],
    "list": [
        ("5,5", "5"), ("5 or 7", "5"), ("1,2,3", "1,2"), ("12", "1,2"), ("2", "2,2"), ("x=1,y=2", "x=2,y=1"),
        (r"1+\sqrt2", r"1\pm\sqrt2")],
    "tuple": [("(2,1)", "(1,2)"), ("(1.2)", "(1,2)"), (r"\{1,2\}", "(1,2)"), ("(1,1)", "(1,1),(3,2)")],
    "interval": [
        ("(0,1)", "[0,1)"), ("x<3", "x>3"), (r"x\ge3", "x>3"), ("2<x<5", "[2,5]"), ("4<x<6", "5"), ("a>1", "x>1"),
        ("(0,2)", r"(0,1)\cup(1,2)")],
    "base": [("4201_5", "4210_5"), ("11_2", "11_3"), ("3", "11_2")],
    "symbols": [
        (r"\sqrt{x^2}", "x"), ("y+1", "x+1"), ("r^2-R^2", "R^2-r^2"), ("0", "R-r"), ("x^2+1", "(x+1)^2"),
        ("25t", "25"), ("5x", "5"), ("x'", "x"),
        (r"10^{40}+\sqrt2+1", r"10^{40}+\sqrt2"), (r"\frac{2\pi}{10^{40}}", r"\frac{\pi}{10^{40}}"),
        ("2^{89}+1", "2^{89}-1"), ("(x+y+z+w)^{300}", "(x+y+z+w)^{300}+1"), ("4+3i", "3+4i"), (r"\cos x", r"\sin x")],
    "units": [
        ("5 cm", "5 m"), (r"5\text{ million}", "5"), ("5%", "50%"), (r"\text{about }5", "5"),
        (r"5\text{ or maybe 7}", "5")],
    "text": [
        ("listen", "silent"), ("No", r"\text{Yes}"), ("B", "C"), (r"\text{None}", "0"),
        (r"\text{five point one}", "5"), (r"\ldots", "5"), ("?", "5")],
    "matrix": [
        (r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}")],
    "code": [
        ("eval('6*7')", "42"), ("max(42,1)", "42"), ("int('42')", "42"), ("sum([42])", "42"),
        ("42 if True else 1", "42"), ("print(42)", "42"),
        ("__import__('os')", "42"), ("(lambda: 42)()", "42"), ("42; touch x", "42"), ("42\x00", "42"),
        ("42\ud800", "42")],
    "unicode root": [("√19", "9")],
    "spaced lists": [("1, 200", "1200"), ("100, 200", "100200"), ("27, 720", "27720")],
    "steps": [
        (r"\lfloor\frac{2n+1}{5}\rfloor", r"\lfloor\frac{2 n-1}{5}\rfloor"),
        (r"\lfloor n/5\rfloor", r"\lfloor n/6\rfloor"),
        (r"\lceil n/2\rceil+1", r"\lfloor n/2\rfloor+2")],
    "sets by condition": [(r"\{x \mid x < 0\}", r"(-\infty,0]"), (r"\{x \mid y < 0\}", r"(-\infty,0)")],
    "times": [("3:30 AM", "3:30 PM"), ("3:35 PM", "3:30 PM")],
    "compound units": [("12 m^2", "24"), (r"9.8\ \mathrm{m/s^2}", "9.81"), (r"5 \text{ million} \text{ dollars}", "5")],
    "both hold": [("x<2 or x>3", r"x<2 \text{ and } x>3"), (r"(-\infty,2)\cup(3,\infty)", r"x<2 \text{ and } x>3"),
                  (r"x\ne 1", r"x\ne 1,2"), (r"x\ne 1,3", r"x\ne 1,2")],
    "factors of matrices": [
        (r"2\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"1+\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}")],
    "multiples of equations": [("2x^2-20x+19=0", "x^2-10x+9=0"), ("2x=4", "x=2"), ("x(x-2)=0", "x-2=0")],
    "sides of equations": [("10", "b+c=10"), ("0", "x+y=0"), ("x^y", "y^x=x^y"), ("4", "x^2=4")],
    "chains": [("2+2=5", "5"), ("1=2", r"0.56 = 56\%"), ("1=1", "2+3=5"), ("2", "1=2"), ("0.57", r"0.56 = 56\%")],
    "letters in order": [("XSQL", "LQSX"), ("ABC", "ACB")],
    "sign of a numeral": [("-37_9", "-37_8"), ("37_8", "-37_8")],
    "huge": [
        ("9^{9^{9^9}}", "42"), ("(10^{9})!", "42"), ("10**1000000000", "42"), ("5!!!!!!!!!!", "42"),
        ("7^{10000000}", "42")],
}


def _flat(cases):
  return [pytest.param(a, b, id=f"{kind}-{i}") for kind, pairs in cases.items() for i, (a, b) in enumerate(pairs)]


@pytest.mark.parametrize(("answer", "truth"), _flat(EQUAL))
def test_equal(answer, truth):
  assert equivalence.equal(answer, truth)


@pytest.mark.parametrize(("answer", "truth"), _flat(DIFFERENT))
def test_different(answer, truth):
  assert not equivalence.equal(answer, truth)


def test_the_parent_decides_only_what_is_certain():
  assert equivalence.quick("5", "5.0") is True
  assert equivalence.quick("6", "5") is False
  assert equivalence.quick("print(5)", "5") is False
  assert equivalence.quick(r"\sqrt{25}", "5") is None
  assert equivalence.quick("1,200", "200,1") is None


def test_a_long_answer_counts_only_as_text():
  long_sum = "+".join(["1"] * 400)
  assert not equivalence.equal(long_sum, "400")
  assert equivalence.equal(long_sum, long_sum)
  assert equivalence.equal("+".join(["1"] * 100), "100")


def test_an_empty_truth_is_never_met():
  assert not equivalence.equal("5", "")
  assert not equivalence.equal("$$", "$")


@settings(max_examples=200, deadline=None)
@given(st.integers(-10**12, 10**12), st.integers(1, 10**6), st.integers(0, 6))
def test_numbers_are_read_exactly(top, bottom, places):
  assert numbers.parse(f"\\frac{{{top}}}{{{bottom}}}").value * bottom == top
  assert numbers.parse(f"{top:,}").value == top
  written = f"{top / 1000:.{places}f}"
  longer = written + ("0" if "." in written else ".0")
  assert numbers.equal(numbers.parse(notation.clean(written)), numbers.parse(longer))
  assert not numbers.equal(numbers.parse(str(top)), numbers.parse(str(top + 1)))


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_reading_any_text_raises_nothing(text):
  # `quick` runs in the training process, on whatever a model writes.
  assert equivalence.quick(text, "5") in (True, False, None)
  assert equivalence.quick("5", text) in (True, False, None)


def test_no_expression_is_compiled_as_code(repo_root):
  # SymPy makes a number from its text through `eval`. The digits that math-verify's lexer has cut out are harmless;
  # nothing else of an answer may get there.
  answers = ["7919+1", "(7919*2)", "7919/3", "2*(7919-1)", "7919**2", "x=7919+1", "7919 + x",
             "7919.5 x", "f(7919)", "a_{7919+b}"]
  script = f"""
import re, sys
from hbpo_jax.grading import equivalence
seen = []
sys.addaudithook(lambda event, args: seen.append(args) if event == "compile" else None)
for answer in {answers!r}:
  equivalence.equal(answer, "x^2 + 15838")
text = [s.decode() if isinstance(s, bytes) else str(s) for s, file in seen if file == "<string>"]
of_answers = [t for t in text if "7919" in t]
assert of_answers
assert all(re.fullmatch(r"(Integer|Float) \\('?[0-9.]+'? \\)", t) for t in of_answers), of_answers
"""
  subprocess.run(
      [sys.executable, "-c", script], cwd=repo_root, check=True, env=os.environ | {"PYTHONPATH": str(repo_root)})


FILES = [
    "gsm8k_test", "math500", "olympiadbench", "aime24", "aime25", "amc", "minerva", "math_train", "deepscaler_subset"]
# Marks of answers that are more than one expression.
COMPOUND = (",", "=", "<", ">", "text", "matrix", "circ", "%", "_", "$", ":", "\\le", "\\ge")


@pytest.mark.parametrize("name", FILES)
def test_true_answers_equal_themselves_and_not_others(shared_dir, name):
  with (shared_dir / "data" / f"{name}.jsonl").open(encoding="utf-8") as file:
    answers = [json.loads(line)["answer"] for line in file]
  for answer in answers:
    box = extraction.last_box(f"The answer is $\\boxed{{{answer}}}$.")
    assert box is not None and equivalence.quick(box, answer), answer
  rng = random.Random(0)
  pairs = [rng.sample(answers, 2) for _ in range(25)]
  agreeing = [(a, b) for a, b in pairs if a != b and equivalence.equal(a, b)]
  assert not agreeing


@pytest.mark.parametrize("name", FILES)
def test_true_answers_rewritten_stay_equal_and_changed_do_not(shared_dir, name):
  with (shared_dir / "data" / f"{name}.jsonl").open(encoding="utf-8") as file:
    answers = [json.loads(line)["answer"].strip("$") for line in file]
  scalar = [a for a in answers if not any(mark in a for mark in COMPOUND)]
  for answer in random.Random(1).sample(scalar, min(15, len(scalar))):
    assert equivalence.equal(f"\\left({answer}\\right)+0", answer), answer
    assert not equivalence.equal(f"{answer}+1", answer), answer
