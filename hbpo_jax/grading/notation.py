r"""One way to write an answer: spelling variants of LaTeX, Unicode and plain text made equal. No mathematics here."""

import re

_UNICODE = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "∕": "/",
    "⁄": "/", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ ", "º": r"^\circ ",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∠": r"\angle ", "≈": r"\approx ",
    "\u2011": "-",
    "≤": r"\le ", "≥": r"\ge ",
    "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "∓": r"\mp ",
    "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "ε": r"\epsilon ", "θ": r"\theta ",
    "λ": r"\lambda ",
    "μ": r"\mu ", "ρ": r"\rho ", "σ": r"\sigma ", "τ": r"\tau ", "φ": r"\phi ", "ω": r"\omega ", "Δ": r"\Delta ",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "²": "^{2}", "³": "^{3}", "⁴": "^{4}", "€": "$", "£": "$", "¥": "$", "¢": r"\text{ cents}", "。": ".", "、": ",",
    "′": "'", "’": "'",
    "“": '"', "”": '"', "⟨": r"\langle ", "⟩": r"\rangle ", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u3000": " ",
    "\u200b": "", "\u2060": "", "\ufeff": "", "\t": " ", "\n": " ", "\r": " ",
} | {chr(c): chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)}
_TRANSLATE = str.maketrans(_UNICODE)

_END = r"(?![a-zA-Z])"  # the end of a TeX command
_UNTEXT = r"\\(?:text|textrm|textnormal|mathrm|mbox|mathop)\s*"

_FONT = r"\\(?:math(?:bf|it|sf|tt|normal)|boldsymbol|bm|text(?:bf|it|sf|tt)|emph|underline)\s*"
# What TeX takes without braces.
_ARGUMENT = (
    r"\d|[a-zA-Z]|\\sqrt\{[^{}]*\}|\\(?:pi|theta|alpha|beta|gamma|delta|lambda|mu|phi|psi|omega|sigma|tau|rho)"
    r"(?![a-zA-Z])")

# Applied in this order.
_RULES = [(re.compile(pattern), new) for pattern, new in [
    # What Unicode's root covers: a number or a letter.
    (r"√\s*(\d+(?:\.\d+)?|[a-zA-Z])", r"\\sqrt{\1}"),
    (r"√", r"\\sqrt "),
    # Thousands separators that can be nothing else; a plain comma may also separate two numbers.
    (r"(?<=\d)(?<![^\\],\d{3})(?:\\[,;:! ]|\{,\}|,\s*\\!\s*|~| )(?=\d{3}(?!\d))", ""),
    (r"(?<=\d)(?:\\[,;:! ]|\{,\}|,\\!|,\\,|~| )(?=\d{3}(?!\d))", ","),
    # Math delimiters and currency.
    (r"(?<![a-zA-Z])US\s*(?=\\?\$)", ""),
    (r"\\\$|\$|(?<!\\)\\[()\[\]]", ""),
    (r"\\(?:text)?color\s*\{[^{}]*\}", " "),
    (r"\\(?:small|large|Large|LARGE|huge|Huge|checkmark)" + _END, " "),
    (r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|boldmath|rm|bf|it)" + _END, " "),
    # Space; the row break of a matrix keeps its two backslashes.
    (r"\\\\\s*\[[^\]]*(?:ex|em|pt)\]", r"\\\\"),
    (r"(?<!\\)\\!", ""),
    (r"(?<!\\)\\[,;: ]|(?<!\\)~|\\(?:quad|qquad|thinspace|hspace\{[^{}]*\}|enspace)" + _END, " "),
    # \left. is an invisible bracket.
    (r"\\(?:left|right|[bB]igg?[lrm]?)" + _END + r"\s*\.?", ""),
    (r"\\[dtc]frac" + _END, r"\\frac"),
    (r"\\(?:tbinom|dbinom)" + _END, r"\\binom"),
    (r"\\(?:leq|leqslant)" + _END, r"\\le "),
    (r"\\(?:geq|geqslant)" + _END, r"\\ge "),
    (r"\\neq" + _END + r"|\\not\s*=|!=", r"\\ne "),
    (r"\\lt" + _END, "<"),
    (r"\\gt" + _END, ">"),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"\\varnothing" + _END + r"|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\lbrace" + _END, r"\\{"),
    (r"\\rbrace" + _END, r"\\}"),
    (r"\\lbrack" + _END, "["),
    (r"\\rbrack" + _END, "]"),
    (r"\\backslash" + _END, r"\\setminus "),
    (r"\\infin" + _END, r"\\infty "),
    (r"\\(?:l?dots|cdots)" + _END, "..."),
    (r"\\colon" + _END, ":"),
    (r"\\langle" + _END, "("),
    (r"\\rangle" + _END, ")"),
    (r"(?<=\d)\s*x\s*(?=10\s*\^)", r"\\times "),
    (r"\*\*", "^"),
    (r"\*", r"\\cdot "),
    (r"\\operatorname\*?\s*\{(arc(?:sin|cos|tan)|sin|cos|tan|cot|sec|csc|ln|log|lcm|gcd|max|min)\}", r"\\\1 "),
    # Fonts say nothing.
    (_FONT + r"\{((?:[^{}]|\{[^{}]*\})*)\}", r"{\1}"),
    (_UNTEXT + r"\{\s*([ied]|[^a-zA-Z{}\\]*)\s*\}", r"\1"),
    (_UNTEXT + r"\{\s*([+-]?[\d.,]+)\s*([a-zA-Z ]+)\}", r"\1\\text{\2}"),
    (_UNTEXT + r"\{\s*\\?%\s*\}", "%"),
    # Degrees.
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ" + _END + r")|\\degree" + _END + r"|(?<=\d)\^\s*(?:\{\s*o\s*\}|o\b)",
     "{DEG}"),
    # Plain-text mathematics: names of functions and constants without their backslash.
    (r"(?<![\\a-zA-Z{])(sqrt|infinity|infty|pi|arc(?:sin|cos|tan)|sin|cos|tan|cot|sec|csc|log|ln|exp)" + _END,
     r"\\\1 "),
    (r"\\infinity" + _END, r"\\infty "),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt\s*(\[[^\[\]]*\])?\s*(\d|[a-zA-Z]|\\pi" + _END + ")", r"\\sqrt\1{\2}"),
    # 10^-3 and 10^12, whose exponents TeX would end after one sign or digit.
    (r"\^\s*(-\s*(?:\d+|[a-zA-Z](?![a-zA-Z])))", r"^{\1}"),
    (r"(?<=10\^)(\d{2,})", r"{\1}"),
    (r"\{([^{}]*)\\choose" + _END + r"([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"\\(frac|binom)\s*(" + _ARGUMENT + ")", r"\\\1{\2}"),
    (r"\\(frac|binom)(\s*\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})\s*(" + _ARGUMENT + ")", r"\\\1\2{\3}"),
    (r"\s+", " "),
]]
# What stands around all of an answer and says nothing.
_AROUND = re.compile(
    r"\A\s*(?:\$+|\\\(|\\displaystyle(?![a-zA-Z]))?\s*(.*?)\s*(?:(?<!\\)\$+|\\\))?(?<!\.)\.?\s*\Z", re.DOTALL)
# Markdown's bold, and a list of words as one text.
_SHORT = r"(?:\d+|[^\s{}\\]{1,3})"
_WHOLE = re.compile(
    r"\A(?:\*\*([^*]+)\*\*"
    rf"|\\(?:text|mbox|mathrm)\s*\{{([^{{}}\\]*,[^{{}}\\]*|\s*{_SHORT}\s+(?:and|or)\s+{_SHORT}\s*)\}})\Z")
_ANSWER_IS = re.compile(
    r"\A(\\(?:text|mbox|mathrm)\s*\{)?\s*(?:the\s+)?(?:final\s+)?answer(?:\s+is\b\s*:?|\s*[:=])\s*", re.IGNORECASE)
_DEGREES = re.compile(r"\{DEG\}")
_SEPARATOR_WORD = re.compile(
    r"\s*,?\s*(?:\\(?:text|textrm|mathrm|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}"
    r"|(?<![\\a-zA-Z])(?:and|or)(?![a-zA-Z])|\\(?:lor|vee)(?![a-zA-Z]))\s*")
_INEQUALITY = re.compile(r"<|>|\\[lg]e(?![a-zA-Z])")
_PART = re.compile(r"[,;]|\b(?:and|or)\b")
_COMMAND_SPACE = re.compile(r"(\\[a-zA-Z]+)\s+(?![a-zA-Z\s])")
_TIGHT = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")


def clean(text: str) -> str:
  """The text with one spelling for what has several; degree signs are gone, separating words are commas."""
  text = _ANSWER_IS.sub(r"\1", _AROUND.sub(r"\1", text))
  text = _WHOLE.sub(lambda m: m[1] or m[2], text).translate(_TRANSLATE)
  for pattern, new in _RULES:
    text = pattern.sub(new, text)
  text = _DEGREES.sub(" ", text)
  text = _SEPARATOR_WORD.sub(_separator, text)
  text = text.strip()
  while text and text[-1] in ".,;:" and not text.endswith("..."):
    text = text[:-1].rstrip()
  return strip_group(text.removeprefix("=").strip())


def _separator(m: re.Match) -> str:
  r"""A comma for 'and' or 'or', but \land between two inequalities that both hold."""
  if "and" not in m.group():
    return ", "
  before, after = _PART.split(m.string[:m.start()])[-1], _PART.split(m.string[m.end():], maxsplit=1)[0]
  return r" \land " if _INEQUALITY.search(before) and _INEQUALITY.search(after) else ", "


def strip_group(text: str) -> str:
  """The text without TeX braces that wrap it whole."""
  while text.startswith("{") and closing(text, 0) == len(text) - 1:
    text = text[1:-1].strip()
  return text


def tight(text: str) -> str:
  """The text without the spaces that cannot change its meaning (those between two letters or digits stay)."""
  return _TIGHT.sub("", _COMMAND_SPACE.sub(r"\1", text))


def closing(text: str, start: int) -> int:
  """Index of the bracket that closes the one at `start`, or -1. All kinds nest; a half-open interval closes too."""
  depth = 0
  for i in range(start, len(text)):
    if text[i] in "([{":
      depth += 1
    elif text[i] in ")]}":
      depth -= 1
      if depth == 0:
        return i
  return -1


def depth(text: str) -> int:
  """How many brackets of all kinds are open at once at most."""
  deepest = now = 0
  for c in text:
    if c in "([{":
      now += 1
      deepest = max(deepest, now)
    elif c in ")]}":
      now = max(0, now - 1)
  return deepest


def split(text: str, separators: str) -> list[str]:
  """The parts of the text between the separators that stand outside all brackets and environments."""
  parts, depth, last = [], 0, 0
  for i, c in enumerate(text):
    if c in "([{" or text.startswith("\\begin", i):
      depth += 1
    elif c in ")]}" or text.startswith("\\end", i):
      depth -= 1
    elif c in separators and depth <= 0:
      parts.append(text[last:i].strip())
      last = i + 1
  parts.append(text[last:].strip())
  return parts


def split_command(text: str, command: str) -> list[str]:
  r"""Like `split`, at a TeX command such as \cup."""
  marker = "\x1f"
  return split(re.sub(re.escape(command) + _END, lambda _: marker, text), marker)


_WORDS = re.compile(r"\\(?:text|textrm|textnormal|mathrm|mbox|operatorname)\s*\{([^{}]*)\}")
_TEXT_COMMAND = re.compile(
    r"\\(?:text|textrm|textnormal|mathrm|mbox)\s*\{[^{}]*[a-zA-Z]{2}[^{}]*\}|\\text\s*\{[^{}]*[a-zA-Z][^{}]*\}")
_LONG_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{5,}")
_CHOICE = re.compile(r"\(\s*([a-zA-Z])\s*\)")


def is_wordy(text: str) -> bool:
  r"""Whether an answer is words rather than mathematics: \text{...} with letters, or a word of five letters or more."""
  return bool(_TEXT_COMMAND.search(text) or _LONG_WORD.search(text))


_LETTER_RUN = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")


def fold_words(text: str) -> str:
  """The text with every run of two letters or more in lower case; single letters are symbols and keep theirs."""
  return _LETTER_RUN.sub(lambda m: m.group().lower(), text)


def words(text: str) -> str:
  r"""A worded answer for comparison: no \text, brackets of a choice such as (C), case, quotes or final dot."""
  text = _WORDS.sub(r"\1", text).strip(" .,;:!\"'`{}")
  choice = _CHOICE.fullmatch(text)
  text = choice.group(1) if choice else text
  text = re.sub(r"[\s\-]+", " ", text).strip()
  return text.casefold() if len(text) > 1 else text


def split_rows(text: str) -> list[str]:
  r"""The rows of a matrix body, between its \\; without empty ones."""
  marker = "\x1f"
  return [row for row in split(text.replace("\\\\", marker), marker) if row]
