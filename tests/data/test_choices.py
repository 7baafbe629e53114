"""Multiple-choice problems: order, text, accepted forms as the grader reads them, and where they are loaded from."""

import collections
import csv
import json
import pathlib
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st
import pytest

from hbpo_jax.data import choices, problems
from hbpo_jax.grading import Grader

QUESTION = "Which energy is it?"
TEXTS = ["$10^{-4}$ eV", "the decay is forbidden", "\\frac{3}{2}", "12-10-11-4"]
# Texts that differ, though the grader takes the second for the first: it drops units, folds words, commutes.
ALIKE = [
    ("1 \\, \\text{GeV}", "1 \\, \\text{MeV}"), ("6.6 MeV", "6.6 keV"), ("2.0 MeV", "2 GeV"), ("AaBb", "AABb"),
    ("Fe", "FE"), ("xyz", "zxy"), ("2, 4", "4, 2"), ("2 apples", "2 oranges"), ("50 %", "50"), ("A+B", "B+A")]


@pytest.fixture(scope="module")
def is_correct():
  """is_correct(contents, answers): for each content of a box, whether the built-in grader takes it for the answer."""
  with Grader() as grader:
    def ask(contents, answers):
      responses = [f"so it is.</think>\n\n\\boxed{{{content}}}" for content in contents]
      verdicts = grader.grade_batch(responses, [answers] * len(contents), thinking_opened=True)
      return dict(zip(contents, (v.correct for v in verdicts), strict=True))

    yield ask


def write_gpqa(path, *rows, columns=choices.GPQA_COLUMNS):
  with open(path, "w", encoding="utf-8", newline="") as file:
    writer = csv.DictWriter(file, ["Subdomain", *columns], extrasaction="ignore")
    writer.writeheader()
    writer.writerows({"Subdomain": "Optics", **row} for row in rows)
  return str(path)


def gpqa_row(record="recA", question=QUESTION, texts=TEXTS):
  return dict(zip(choices.GPQA_COLUMNS, [question, *texts, record], strict=True))


def test_text_and_answer():
  made = choices.lettered(f" {QUESTION}\n", [" one", "two ", "three"], 1)
  assert made.problem == f"{QUESTION}\n\nA) one\nB) two\nC) three\n\nThe answer is the letter of the right choice."
  assert made.answer == "B" and made.answers[0] == "B"


def test_the_grader_reads_what_a_box_may_hold(is_correct):
  text = TEXTS[1]
  made = choices.lettered(QUESTION, TEXTS, 1)
  right = [
      "B", "(B)", "\\text{B}", "\\text{(B)}", "(\\text{B})", "\\mathrm{B}", "\\mathbf{B}", "\\textbf{(B)}", "[B]", "B.",
      "$B$", "b", "(b)", "\\text{b}", "B)", "\\text{B)}", f"B) {text}", f"(B) {text}", f"B. {text}", f"B)\\ {text}",
      f"\\text{{B) {text}}}", f"\\text{{B) }}{text}", text, f"\\text{{{text}}}", text.capitalize()]
  wrong = [
      "A", "C", "D", "(A)", "\\text{C}", "d", "a", "E", "A)", "A, B", "A or B", "AB", "BB", "2", "none",
      f"A) {TEXTS[0]}", *TEXTS[::2], TEXTS[3], f"C) {text}"]
  found = is_correct(right + wrong, made.answers)
  assert [c for c in right if not found[c]] == []
  assert [c for c in wrong if found[c]] == []


def test_every_accepted_form_is_needed(is_correct):
  """Without any one form, some box that shows the right choice would count as wrong."""
  made = choices.lettered(QUESTION, TEXTS, 0)
  for form in made.answers:
    others = [other for other in made.answers if other != form]
    assert not is_correct([form], others)[form], form


@pytest.mark.parametrize("right", range(4))
def test_no_other_choice_is_accepted(is_correct, right):
  letter, others = choices.LETTERS[right], [c for c in "ABCD" if c != choices.LETTERS[right]]
  sets = [order for a, b in ALIKE for order in ([a, b, "x", "y"], ["v", b, "w", a])]
  for texts in [*sets, ["A", "x = C", "1 D", "\\text{B}"], ["b", "a", "d", "c"], ["K \\approx D", "2C", "{A}", "B^1"]]:
    answers = choices.lettered(QUESTION, texts, right).answers
    labelled = [f"{other}) {text}" for other, text in zip("ABCD", texts) if other != letter]
    boxes = [*others, *(f"({other})" for other in others), *labelled, *texts[:right], *texts[right + 1:]]
    # A choice whose text is a letter, or like one: the letter is meant.
    meant = is_correct(boxes, [letter, letter.lower()] if letter.lower() in answers else [letter])
    found = is_correct(boxes, answers)
    assert [c for c in boxes if found[c] and not meant[c]] == [], texts
    assert not any(found[other] for other in others), texts


def test_a_small_letter_is_accepted_unless_it_is_another_choice():
  assert "b" in choices.lettered(QUESTION, ["c", "d"], 1).answers
  assert "b" not in choices.lettered(QUESTION, ["\\text{b}", "d"], 1).answers


def test_the_alike_texts_are_alike_to_the_grader(is_correct):
  """Else the test above would check nothing."""
  assert all(is_correct([second], [first])[second] for first, second in ALIKE)


@given(st.lists(st.text(min_size=1), min_size=2, max_size=6, unique=True), st.text(), st.randoms())
def test_order_depends_on_the_id_and_the_texts_only(texts, name, random):
  ordered = choices.order(name, texts)
  assert sorted(ordered) == sorted(texts)
  again = list(texts)
  random.shuffle(again)
  assert choices.order(name, again) == ordered


def test_order_is_the_same_in_every_process_and_puts_the_right_one_anywhere(repo_root):
  program = "from hbpo_jax.data import choices; print(*choices.order('gpqa/x', ['p', 'q', 'r', 's']))"
  for seed in ("1", "2"):
    run = subprocess.run([sys.executable, "-c", program], cwd=repo_root, env={"PYTHONHASHSEED": seed, "PATH": ""},
                         capture_output=True, text=True, check=True)
    assert run.stdout.split() == choices.order("gpqa/x", ["p", "q", "r", "s"]) == ["s", "p", "q", "r"]
  places = collections.Counter(choices.order(f"gpqa/{i}", TEXTS).index(TEXTS[0]) for i in range(400))
  assert min(places[i] for i in range(4)) > 70


@pytest.mark.parametrize("texts, message", [
    (["one"], "choices holds 1 texts; give 2 to 26"),
    ([str(i) for i in range(27)], "choices holds 27 texts; give 2 to 26"),
    (["one", " "], "choices holds an empty text"),
    (["one", "two", "one "], "choices holds the right one, 'one', more than once"),
])
def test_choices_that_are_none_are_refused(texts, message):
  with pytest.raises(ValueError, match=message):
    choices.lettered(QUESTION, texts, 0)


def test_gpqa_file(tmp_path):
  texts = ["a\ncomma, and \"quotes\"", " second\n", "third", "fourth"]
  file = write_gpqa(tmp_path / "gpqa_diamond.csv", gpqa_row(), gpqa_row("recB", "Größe?\nTwo lines", texts))
  first, second = choices.load_gpqa(file)
  assert first.id == "gpqa/recA" and first.source == "gpqa_diamond" and first.level is None
  assert first.extra == {"choices": choices.order("gpqa/recA", TEXTS)}
  assert first.extra["choices"]["ABCD".index(first.answer)] == TEXTS[0]
  assert first.problem.startswith(f"{QUESTION}\n\nA) {first.extra['choices'][0]}\nB) ")
  assert second.problem.startswith("Größe?\nTwo lines\n\nA) ")
  assert second.extra["choices"]["ABCD".index(second.answer)] == texts[0] and "second" in second.extra["choices"]


@pytest.mark.parametrize("rows, columns, message", [
    ([gpqa_row()], choices.GPQA_COLUMNS[:-1], r"g.csv, row 1: column 'Record ID' is None; every row needs Question"),
    ([gpqa_row(), gpqa_row("recB", " ")], choices.GPQA_COLUMNS, r"g.csv, row 2: column 'Question' is ' '"),
    ([gpqa_row(), gpqa_row("recB"), gpqa_row()], choices.GPQA_COLUMNS, r"row 3: 'Record ID' 'recA' was used in row 1"),
    ([gpqa_row(texts=["p", "q", "p", "r"])], choices.GPQA_COLUMNS, r"row 1: choices holds the right one, 'p', more"),
    ([], choices.GPQA_COLUMNS, r"g.csv holds no problem"),
])
def test_a_bad_gpqa_file_is_named(tmp_path, rows, columns, message):
  file = write_gpqa(tmp_path / "g.csv", *rows, columns=columns)
  with pytest.raises(ValueError, match=message):
    choices.load_gpqa(file)


def test_gpqa_rows_whose_wrong_answers_are_the_same_are_kept(tmp_path):
  found, = choices.load_gpqa(write_gpqa(tmp_path / "g.csv", gpqa_row(texts=["p", "q", "q", "r"])))
  assert found.extra["choices"]["ABCD".index(found.answer)] == "p"


def test_a_gpqa_file_that_is_cut_or_missing_is_named(tmp_path):
  file = pathlib.Path(write_gpqa(tmp_path / "g.csv", gpqa_row(texts=["p, q", "r", "s", "t, u"])))
  file.write_text(file.read_text()[:-8])
  with pytest.raises(ValueError, match=r"g.csv cannot be read as CSV \(unexpected end of data\)"):
    choices.load_gpqa(file)
  with pytest.raises(ValueError, match=r"nowhere.csv cannot be read as CSV"):
    choices.load_gpqa(tmp_path / "nowhere.csv")


def load_row(tmp_path, **fields):
  row = {"id": "mc/1", "problem": QUESTION, "source": "me", "choices": TEXTS} | fields
  file = tmp_path / "p.jsonl"
  file.write_text(json.dumps({"id": "a", "problem": "1 + 1", "answer": "2", "source": "me"}) + "\n"
                  + json.dumps(row) + "\n")
  return problems.load_jsonl(file)[1]


def test_json_lines_with_a_letter_keep_their_order(tmp_path):
  found = load_row(tmp_path, answer="C", level=2, year=2024)
  assert found.problem == choices.lettered(QUESTION, TEXTS, 2).problem
  assert (found.answer, found.answers) == ("C", choices.lettered(QUESTION, TEXTS, 2).answers)
  assert found.level == 2 and found.extra == {"year": 2024, "choices": TEXTS}


def test_json_lines_with_a_text_are_ordered(tmp_path):
  found = load_row(tmp_path, answer=TEXTS[0], answers=[TEXTS[0], "100 microelectronvolts"])
  ordered = choices.order("mc/1", TEXTS)
  assert ordered != TEXTS and found.extra == {"choices": ordered}
  assert found.answer == "ABCD"[ordered.index(TEXTS[0])]
  assert found.answers == (*choices.lettered(QUESTION, ordered, ordered.index(TEXTS[0])).answers,
                           "100 microelectronvolts")


def test_a_text_like_another_choice_is_no_answer(tmp_path):
  found = load_row(tmp_path, answer="6.6 MeV", choices=["6.6 MeV", "6.6 keV", "6 MeV"])
  assert "6.6 MeV" not in found.answers and f"{found.answer}) 6.6 MeV" in found.answers


@pytest.mark.parametrize("fields, message", [
    ({"answer": "E"}, r"p.jsonl:2: answer='E' is neither a letter from A to D nor the text of a choice; give one"),
    ({"answer": "b"}, r"p.jsonl:2: answer='b' is neither"),
    ({"answer": "A", "choices": ["B", "A", "C", "D"]}, r"p.jsonl:2: answer='A' is the letter of one choice and"),
    ({"answer": "A", "choices": "one"}, r"p.jsonl:2: choices='one' must be a list of texts; correct or remove it"),
    ({"answer": "A", "choices": ["one", 2]}, r"p.jsonl:2: choices=\['one', 2\] must be a list of texts"),
    ({"answer": "A", "choices": []}, r"p.jsonl:2: choices holds 0 texts; give 2 to 26"),
    ({"answer": "A", "choices": ["one", "one"]}, r"p.jsonl:2: choices holds 'one' more than once"),
])
def test_bad_json_lines_are_named(tmp_path, fields, message):
  with pytest.raises(ValueError, match=message):
    load_row(tmp_path, **fields)


def test_a_letter_that_is_also_the_text_of_its_choice(tmp_path):
  assert load_row(tmp_path, answer="B", choices=["A", "B"]).answer == "B"
