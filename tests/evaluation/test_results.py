"""The numbers of an evaluation by hand, of one that is unfinished, and difficulty by pass rate."""

import json
import subprocess
import sys
import types

import numpy as np
import pytest

import hbpo_jax
from hbpo_jax.evaluation import results

SENTENCE = "I will answer the question within {budget} tokens."
NONE = {"value": None, "low": None, "high": None}


def row(id, sample, score, n_gen, *, mode="natural", level=None, **more):
  return {
      "id": id, "mode": mode, "sample": sample, "answer": "1", "level": level, "response": "so</think>1",
      "n_gen": n_gen, "n_think": n_gen // 2, "truncated": False, "score": score,
      "reason": "correct" if score >= 1 else "wrong", "given": "1"} | more


def evaluated(rows, *, modes=("natural",), n_samples=2, n_problems=None):
  """An evaluation in memory; `rows` by benchmark, of 2 problems each where `n_problems` says nothing."""
  n_problems = dict.fromkeys(rows, 2) | (n_problems or {})
  return types.SimpleNamespace(
      manifest={
          "format": 1, "hbpo_jax": "0.0.9", "model": {"path": "m", "fingerprint": "f"}, "modes": list(modes),
          "samples_per_problem": n_samples, "settings": {},
          "benchmarks": {name: {"title": name.upper(), "n_problems": n_problems[name]} for name in rows}},
      problems={name: [] for name in rows}, rows=rows)


ROWS = [
    row("a", 0, 1, 10, level=1), row("a", 1, 0, 20, level=1, truncated=True, reason="unfinished"),
    row("b", 0, 1, 30, level=2), row("b", 1, 1, 60, level=2, response=SENTENCE.format(budget=64) + " Wait</think>"),
    row("a", 0, 0, 700, mode="512", level=1, reason="no_answer"),
]


def test_numbers_by_hand():
  got = results.compute(evaluated({"x": ROWS}, modes=("natural", "512")), budget_sentence=SENTENCE)
  assert got["format"] == 1 and got["hbpo_jax"] == hbpo_jax.__version__ and got["modes"] == ["natural", "512"]
  assert got["model"] == {"path": "m", "fingerprint": "f"} and got["samples_per_problem"] == 2
  assert got["benchmarks"]["x"]["title"] == "X" and got["benchmarks"]["x"]["n_problems"] == 2
  stats = got["benchmarks"]["x"]["modes"]["natural"]
  assert (stats["n"], stats["n_responses"], stats["n_expected"]) == (2, 4, 4)
  assert stats["accuracy"] == {"value": 0.75, "low": 0.5, "high": 1.0}
  assert stats["pass_at_k"] == {"1": 0.75, "2": 1.0}
  assert {k: stats["tokens"][k] for k in NONE} == {"value": 30.0, "low": 15.0, "high": 45.0}
  assert stats["tokens"]["quantiles"] == {
      "0.1": 13.0, "0.25": 17.5, "0.5": 25.0, "0.75": 37.5, "0.9": pytest.approx(51.0), "0.99": pytest.approx(59.1)}
  assert stats["truncated"] == 0.25
  assert stats["reasons"] == {"correct": 0.75, "wrong": 0.0, "no_answer": 0.0, "unfinished": 0.25, "timeout": 0.0}
  assert stats["by_level"] == [
      {"level": 1, "n": 1, "accuracy": 0.5, "tokens": 15.0}, {"level": 2, "n": 1, "accuracy": 1.0, "tokens": 45.0}]
  assert stats["level_correlation"] == pytest.approx(1.0)
  assert stats["patterns"]["states_budget"] == 0.25 and stats["patterns"]["budgets_stated"] == {"64": 0.25}
  assert [part["level"] for part in stats["patterns"]["by_level"]] == [1, 2]


def test_each_mode_has_its_own_rows_and_a_forced_budget_is_not_stated():
  rows = [*ROWS, row("a", 1, 0, 500, mode="512", response=SENTENCE.format(budget=512))]
  got = results.compute(evaluated({"x": rows}, modes=("natural", "512")), budget_sentence=SENTENCE)
  stats = got["benchmarks"]["x"]["modes"]["512"]
  assert stats["n"] == 1 and stats["tokens"]["value"] == 600.0 and stats["reasons"]["no_answer"] == 0.5
  assert stats["patterns"]["states_budget"] is None and stats["patterns"]["budgets_stated"] == {}


def test_average_is_unweighted_over_benchmarks():
  rows = {"x": ROWS, "y": [row(str(i), 0, float(i < 1), 1000) for i in range(4)]}
  got = results.compute(evaluated(rows, modes=("natural", "512")), budget_sentence=SENTENCE)
  natural = got["average"]["natural"]
  assert natural["accuracy"]["value"] == (0.75 + 0.25) / 2 and natural["tokens"]["value"] == (30 + 1000) / 2
  assert natural["benchmarks"] == ["x", "y"]
  assert natural["accuracy"]["low"] < 0.5 < natural["accuracy"]["high"]
  assert natural["tokens"]["low"] == 507.5 and natural["tokens"]["high"] == 522.5
  assert got["average"]["512"]["benchmarks"] == ["x"] and got["average"]["512"]["accuracy"]["value"] == 0.0


def test_average_of_one_benchmark_is_its_own():
  rows = {"x": [row(str(i), 0, 0, 10 + i) for i in range(30)]}
  got = results.compute(evaluated(rows), budget_sentence=SENTENCE)
  stats = got["benchmarks"]["x"]["modes"]["natural"]
  assert got["average"]["natural"]["accuracy"] == stats["accuracy"] and stats["accuracy"]["high"] > 0.1
  assert got["average"]["natural"]["tokens"] == {k: stats["tokens"][k] for k in NONE}


def test_unfinished_evaluation_gives_what_there_is():
  rows = {"x": [row("a", s, s % 2, 10 * (s + 1)) for s in range(4)] + [row("b", s, 1, 100) for s in range(3)], "y": []}
  got = results.compute(evaluated(rows, n_samples=4, n_problems={"x": 5, "y": 7}), budget_sentence=SENTENCE)
  stats = got["benchmarks"]["x"]["modes"]["natural"]
  assert (stats["n"], stats["n_responses"], stats["n_expected"]) == (2, 7, 20)
  assert stats["accuracy"]["value"] == 0.75 and stats["tokens"]["value"] == (25 + 100) / 2
  # k up to the 3 responses of b; a has 2 right of 4: of pairs 5 of 6 hold one, of triples all.
  assert stats["pass_at_k"] == {"1": 0.75, "2": pytest.approx((5 / 6 + 1) / 2), "3": 1.0}
  none = got["benchmarks"]["y"]["modes"]["natural"]
  assert (none["n"], none["n_responses"], none["n_expected"]) == (0, 0, 28)
  assert none["accuracy"] == NONE
  assert none["tokens"] == NONE | {"quantiles": dict.fromkeys(stats["tokens"]["quantiles"])}
  assert none["pass_at_k"] == {} and none["truncated"] is None and none["by_level"] == []
  assert none["level_correlation"] is None and set(none["reasons"].values()) == {None}
  assert none.keys() == stats.keys() and none["patterns"].keys() == stats["patterns"].keys()
  assert got["average"]["natural"]["benchmarks"] == ["x"]
  nothing = results.compute(evaluated({"y": []}), budget_sentence=SENTENCE)
  assert nothing["average"]["natural"] == {"accuracy": NONE, "tokens": NONE, "benchmarks": []}


def test_fraction_of_a_users_grader_counts_for_accuracy_not_for_pass_at_k():
  rows = [row("a", 0, 0.5, 10), row("a", 1, 0.9, 10), row("b", 0, 1.0, 10), row("b", 1, 0.0, 10)]
  stats = results.mode_statistics(rows, None)
  assert stats["accuracy"]["value"] == pytest.approx(0.6) and stats["pass_at_k"] == {"1": 0.25, "2": 0.5}


@pytest.mark.parametrize("n_samples, ks", [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_pass_at_k_is_at_powers_of_two_and_at_k(n_samples, ks):
  stats = results.mode_statistics([row("a", s, 1, 10) for s in range(n_samples)], None)
  assert stats["pass_at_k"] == {str(k): 1.0 for k in ks}


def test_results_are_plain_json_and_repeat():
  rows = {"x": ROWS, "y": [row(str(i), 0, float(i % 3 == 0), int(n), level="hard" if i % 2 else None)
                           for i, n in enumerate(np.random.default_rng(0).integers(10, 900, 40))]}
  compute = lambda: results.compute(evaluated(rows, modes=("natural", "512")), budget_sentence=SENTENCE)
  text = json.dumps(compute(), allow_nan=False)
  assert json.loads(text) == compute() and json.dumps(compute(), allow_nan=False) == text


def test_budget_sentence_needs_a_place():
  with pytest.raises(ValueError, match="prompt.budget_sentence"):
    results.compute(evaluated({"x": ROWS}), budget_sentence="no place")


def test_per_problem():
  assert results.per_problem(ROWS, "natural") == {"a": (0.5, 15.0), "b": (1.0, 45.0)}
  assert results.per_problem(ROWS, "512") == {"a": (0.0, 700.0)} and results.per_problem(ROWS, "efficiency") == {}


def with_rates(rates, tokens, n_samples=10, score=None):
  return [row(f"p{i}", s, score if score is not None else float(s < round(rate * n_samples)), n)
          for i, (rate, n) in enumerate(zip(rates, tokens)) for s in range(n_samples)]


def test_difficulty_by_pass_rate():
  base = with_rates([0.0, 0.1, 0.2, 0.6, 0.8, 1.0], [900, 700, 600, 400, 300, 100])
  got = results.by_pass_rate(base, None, "natural")
  assert [(b["low"], b["high"], b["n"], b["tokens"]) for b in got] == [
      (0.0, 0.2, 2, 800.0), (0.2, 0.4, 1, 600.0), (0.4, 0.6, 0, None), (0.6, 0.8, 1, 400.0), (0.8, 1.0, 2, 200.0)]
  assert [b["accuracy"] for b in got] == [0.05, 0.2, None, 0.6, 0.9]


def test_difficulty_of_another_model_is_binned_by_the_base():
  base = with_rates([0.0, 1.0, 1.0], [900, 100, 100])
  other = with_rates([0, 0], [50, 10], score=1.0) + [row("new", 0, 1.0, 5)]  # Answers p0 and p1 and one of its own.
  hard, easy = results.by_pass_rate(base, other, "natural", n_bins=2)
  assert (hard["n"], hard["tokens"], hard["accuracy"]) == (1, 50.0, 1.0)
  assert (easy["n"], easy["tokens"], easy["accuracy"]) == (1, 10.0, 1.0)


@pytest.mark.parametrize("n", [3, 5, 7, 10, 49, 100])
def test_rate_on_an_edge_belongs_to_the_bin_above(n):
  base = with_rates([i / n for i in range(n + 1)], [1] * (n + 1), n_samples=n)
  assert [b["n"] for b in results.by_pass_rate(base, None, "natural", n_bins=n)] == [1] * (n - 1) + [2]


def test_difficulty_correlation():
  base = with_rates([0.0, 0.5, 1.0], [900, 500, 100])
  assert results.difficulty_correlation(base, None, "natural") == pytest.approx(1.0)
  assert results.difficulty_correlation(base, with_rates([1] * 3, [1, 2, 3]), "natural") == pytest.approx(-1.0)
  assert results.difficulty_correlation(base, with_rates([1] * 3, [7, 7, 7]), "natural") is None
  assert results.difficulty_correlation(base, None, "efficiency") is None


def test_bins_must_exist():
  with pytest.raises(ValueError, match="n_bins=0"):
    results.by_pass_rate(ROWS, None, "natural", n_bins=0)


def test_numbers_and_tables_come_without_jax(repo_root):
  code = "import sys, hbpo_jax.evaluation.results, hbpo_jax.reporting.paper_tables; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], cwd=repo_root, check=False).returncode == 0
