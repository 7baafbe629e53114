"""Evaluation numbers and the before/after table."""

import io
import json
import math

import numpy as np
import pytest
import rich.console

from hbpo_jax import files
from hbpo_jax.reporting import tables

BASE = tables.evaluation_summary([1, 2, 2, 1], [1, 1, 0, 0], [10, 40, 60, 30], [0, 0, 1, 0])
TRAINED = tables.evaluation_summary([1, 2, 2, 1], [1, 1, 0, 1], [5, 20, 30, 15], [0, 0, 0, 0])


def test_summary_by_hand():
  assert {
      "accuracy": 0.5, "mean_tokens": 35.0, "n": 4, "truncated": 0.25, "level_correlation": pytest.approx(4 / 20**0.5),
      "by_level": [
          {"level": 1, "n": 2, "accuracy": 0.5, "tokens": 20.0}, {"level": 2, "n": 2, "accuracy": 0.5, "tokens": 50.0}]
  } == BASE
  json.loads(files.json_line(BASE))


def test_several_responses_per_problem():
  got = tables.evaluation_summary([3, 1], [[1, 0], [1, 1]], [[10, 20], [2, 4]], [[0, 1], [0, 0]])
  assert got["accuracy"] == 0.75 and got["mean_tokens"] == 9.0 and got["n"] == 2 and got["truncated"] == 0.25
  assert [(row["level"], row["accuracy"], row["tokens"]) for row in got["by_level"]] == [(1, 1.0, 3.0), (3, 0.5, 15.0)]


def test_levels_may_be_missing_or_mixed():
  got = tables.evaluation_summary(None, [1, 0], [10, 20], [0, 0])
  assert got["by_level"] == [{"level": None, "n": 2, "accuracy": 0.5, "tokens": 15.0}]
  assert got["level_correlation"] is None
  mixed = tables.evaluation_summary([None, "hard", 10, np.int64(2)], [1] * 4, [1, 2, 3, 4], [0] * 4)
  assert [row["level"] for row in mixed["by_level"]] == [2, 10, "hard", None]
  assert mixed["level_correlation"] == -1.0


@pytest.mark.parametrize("arguments", [
    (None, [], [], []), (None, [1], [1, 2], [0]), ([1], [1, 0], [1, 2], [0, 0]), (None, [1, 0], [1, 2], [0]),
    (None, 1, 2, 0)])
def test_summary_refuses_what_does_not_fit(arguments):
  with pytest.raises(ValueError):
    tables.evaluation_summary(*arguments)


def test_rank_correlation():
  assert tables.rank_correlation([1, 2, 3], [10, 100, 1000]) == pytest.approx(1.0)
  assert tables.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
  assert math.isnan(tables.rank_correlation([1, 1], [1, 2]))
  # Ranks 1.5, 1.5, 3, 4 and 1, 2, 3.5, 3.5.
  assert tables.rank_correlation([1, 1, 5, 9], [2, 3, 7, 7]) == pytest.approx(4 / 4.5)
  with pytest.raises(ValueError):
    tables.rank_correlation([1, 2], [1])


def test_table_rows_and_total():
  table = tables.before_after(BASE, TRAINED)
  assert table.rows == (
      ("1", "2", "50.0 %", "100.0 %", "20.0", "10.0", "-50.0 %"),
      ("2", "2", "50.0 %", "50.0 %", "50.0", "25.0", "-50.0 %"),
      ("all", "4", "50.0 %", "75.0 %", "35.0", "17.5", "-50.0 %"))


def test_table_without_levels_is_the_total_only():
  result = tables.evaluation_summary(None, [1], [2345], [0])
  assert tables.before_after(result, result).rows == (("all", "1", "100.0 %", "100.0 %", "2,345", "2,345", "+0.0 %"),)


def test_table_refuses_two_problem_sets():
  with pytest.raises(ValueError, match="same set"):
    tables.before_after(BASE, tables.evaluation_summary([1, 2, 3, 1], [1] * 4, [1] * 4, [0] * 4))


def test_forms_of_a_table():
  table = tables.Table("t [x]", ("level", "n"), (("[red]a|b[/red]", "1"), ("all", "22")))
  assert table.to_markdown() == "| level | n |\n|:--|--:|\n| \\[red]a\\|b\\[/red] | 1 |\n| all | 22 |\n"
  lines = table.to_text().splitlines()
  assert lines[0] == "t [x]" and lines[3] == "[red]a|b[/red]   1" and lines[4] == "all             22"
  out = io.StringIO()
  rich.console.Console(file=out, width=60).print(table.to_rich())
  assert "[red]a|b[/red]" in out.getvalue() and "t [x]" in out.getvalue()


def test_change_from_nothing():
  assert tables.change(0, 3) is None and tables.signed_percent(None) == "n/a"
  assert tables.change(40, 30) == -0.25
