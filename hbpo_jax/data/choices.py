r"""Multiple-choice problems, such as GPQA-Diamond: the choices under letters, the letter as the answer.

What the built-in grader makes of a box when the true answer is B: `B`, `(B)`, `\text{B}`, `\mathbf{(B)}`, `[B]` and
`B.` are equal to `B` already; `b`, `B)` and a letter with the choice behind it are not, and are accepted forms here.
"""

from collections.abc import Mapping, Sequence
import csv
import hashlib
import io
import os
import pathlib
import re
import string
from typing import Any, NamedTuple

from hbpo_jax.data.record import Problem

LETTERS = string.ascii_uppercase
REMARK = "The answer is the letter of the right choice."

GPQA_COLUMNS = (
    "Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "Record ID")


class Lettered(NamedTuple):
  """problem: the question with its choices and the remark. answer: a letter. answers: its accepted forms."""
  problem: str
  answer: str
  answers: tuple[str, ...]


def order(name: str, choices: Sequence[str]) -> list[str]:
  """The choices by a hash of each with the problem's id: the same anywhere, and no hint at which is right."""
  return sorted(choices, key=lambda text: hashlib.sha256(f"{name}\0{text}".encode("utf-8", "replace")).digest())


def lettered(question: str, choices: Sequence[str], right: int) -> Lettered:
  """A question and its choices, in the order given, as a problem whose answer is a letter.

  Args:
    question: without choices.
    choices: 2 to 26 texts.
    right: index of the right one.
  Raises:
    ValueError: when there are too few or too many choices, one is blank, or the right one stands twice.
  """
  choices = _checked(choices)
  if choices.count(choices[right]) > 1:
    raise ValueError(f"choices holds the right one, {choices[right]!r}, more than once; make them different.")
  lines = [f"{letter}) {text}" for letter, text in zip(LETTERS, choices)]
  problem = "\n".join([question.strip(), "", *lines, "", REMARK])
  return Lettered(problem, LETTERS[right], _forms(choices, right))


def from_gpqa(row: Mapping[str, Any], where: str) -> Problem:
  """The problem of one row of GPQA's CSV files.

  Raises:
    ValueError: when a column is missing or empty; names `where`, the column and the remedy.
  """
  cells = {}
  for column in GPQA_COLUMNS:
    if not isinstance(row.get(column), str) or not row[column].strip():
      raise ValueError(
          f"{where}: column {column!r} is {row.get(column)!r}; every row needs {', '.join(GPQA_COLUMNS)}.")
    cells[column] = row[column].strip()
  question, correct, *wrong, record = (cells[column] for column in GPQA_COLUMNS)
  name = f"gpqa/{record}"
  choices = order(name, [correct, *wrong])
  try:
    made = lettered(question, choices, choices.index(correct))
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error
  return Problem(name, made.problem, made.answer, "gpqa_diamond", None, made.answers, {"choices": choices})


def load_gpqa(path: str | os.PathLike) -> list[Problem]:
  """The problems of one of GPQA's CSV files.

  Raises:
    ValueError: when it cannot be read, holds no problem, lacks a column, or repeats a record; names the place.
  """
  path = pathlib.Path(path)
  try:
    rows = read_csv(path.read_text(encoding="utf-8-sig"))
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise ValueError(f"{path} cannot be read as CSV ({error}); give GPQA's CSV file in UTF-8.") from error
  if not rows:
    raise ValueError(f"{path} holds no problem; give GPQA's CSV file, with the columns {', '.join(GPQA_COLUMNS)}.")
  found = [from_gpqa(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]
  first: dict[str, int] = {}
  for number, problem in enumerate(found, start=1):
    if first.setdefault(problem.id, number) != number:
      raise ValueError(
          f"{path}, row {number}: 'Record ID' {problem.id.removeprefix('gpqa/')!r} was used in row "
          f"{first[problem.id]}; make them unique.")
  return found


def read_csv(text: str) -> list[dict[str, Any]]:
  """The rows of a CSV text with a header; a missing cell is None.

  Raises:
    csv.Error: when it is malformed, such as cut in the middle of a quoted cell.
  """
  return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


def right_choice(answer: str, choices: Sequence[str]) -> tuple[int, bool]:
  """(index of the right choice, whether `answer` names it by its letter) of a problem that lists its choices.

  Raises:
    ValueError: when the answer is neither a letter of a choice nor the text of one, or is both, of different choices;
      a choice stands twice; or the choices are not fit for `lettered`.
  """
  texts = _checked(choices)
  if twice := [text for text in texts if texts.count(text) > 1]:
    raise ValueError(f"choices holds {twice[0]!r} more than once; make the choices different.")
  by_letter = LETTERS[:len(texts)].find(answer) if len(answer) == 1 else -1
  by_text = texts.index(answer) if answer in texts else -1
  if by_letter < 0 and by_text < 0:
    raise ValueError(
        f"answer={answer!r} is neither a letter from A to {LETTERS[len(texts) - 1]} nor the text of a choice; give "
        "one.")
  if by_letter >= 0 and by_text >= 0 and by_letter != by_text:
    raise ValueError(
        f"answer={answer!r} is the letter of one choice and the text of another; write the text of choice {answer} "
        "otherwise.")
  return (by_letter, True) if by_letter >= 0 else (by_text, False)


def _checked(choices: Sequence[str]) -> list[str]:
  """The choices, stripped; refuses too few or too many, and a blank one."""
  texts = [text.strip() for text in choices]
  if not 2 <= len(texts) <= len(LETTERS):
    raise ValueError(f"choices holds {len(texts)} texts; give 2 to {len(LETTERS)}.")
  if "" in texts:
    raise ValueError("choices holds an empty text; write or remove it.")
  return texts


def _forms(choices: Sequence[str], right: int) -> tuple[str, ...]:
  """The letter, and the other forms of it that the built-in grader would not read as the letter."""
  letter, text = LETTERS[right], choices[right]
  others = [other for i, other in enumerate(choices) if i != right]
  forms = [letter, f"{letter})", f"{letter}) {text}", f"{letter}. {text}"]
  if all(_core(other) != letter.lower() for other in others):
    forms.append(letter.lower())
  if _is_told_apart(text, others, LETTERS[:len(choices)]):
    forms += [f"({letter}) {text}", text]
  return tuple(forms)


def _is_told_apart(text: str, others: Sequence[str], letters: str) -> bool:
  """Whether the grader takes the text neither for another choice's nor for another letter.

  The grader drops units, folds the case of words and multiplies in any order: to it, 1 GeV is 1 MeV, AaBb is AABB, and
  'x = C' is C. So texts of the same digits, or of the same letters in another order, count as alike, even where a
  grader could tell them.
  """
  alone = rf"(?<![a-zA-Z])[{letters}{letters[1:].lower()}](?![a-zA-Z])"  # 'a' is a word.
  if _core(text) == "a" or re.search(alone, text):
    return False
  if _digits(text) and _digits(text) in map(_digits, others):
    return False
  return _core(text) not in map(_core, others)


def _core(text: str) -> str:
  text = re.sub(r"\\(?:text|math)[a-z]*", "", text)  # Fonts say nothing.
  return "".join(sorted(c for c in text.casefold() if c.isalnum()))


def _digits(text: str) -> str:
  return "".join(sorted(c for c in text if c in "123456789"))  # 2 is also 2.0.
