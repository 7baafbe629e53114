"""The paper's tables by hand, what they say of what is missing, and LaTeX that cannot be broken by a name."""

import re
import types

import pytest

from hbpo_jax.data.record import Problem
from hbpo_jax.evaluation import results, statistics
from hbpo_jax.reporting import paper_tables
from hbpo_jax.reporting.paper_tables import Measured
from hbpo_jax.reporting.tables import Table

SENTENCE = "I will answer the question within {budget} tokens."
TITLES = {"gsm8k": "GSM8K", "aime25": "AIME25"}


def run(name, numbers, *, settings=None, text="problem", keep=True, n_samples=1, missing=0, response="so</think>1"):
  """A run; `numbers` by benchmark and mode: one (score, tokens) per problem. `missing`: problems left unanswered."""
  modes = list(dict.fromkeys(mode for by_mode in numbers.values() for mode in by_mode))
  rows, problems = {}, {}
  for benchmark, by_mode in numbers.items():
    rows[benchmark] = [{
        "id": f"p{i}", "mode": mode, "sample": s, "answer": "1", "level": None, "response": response, "n_gen": tokens,
        "n_think": tokens // 2, "truncated": i == 0, "score": score, "reason": "correct" if score else "no_answer",
        "given": ""} for mode, pairs in by_mode.items() for i, (score, tokens) in enumerate(pairs)
        for s in range(n_samples)]
    n = max(map(len, by_mode.values())) + missing
    problems[benchmark] = [Problem(f"p{i}", f"{text} {i}", "1", "made") for i in range(n)]
  evaluated = types.SimpleNamespace(
      manifest={"format": 1, "model": {}, "modes": modes, "samples_per_problem": n_samples, "settings": {},
                "benchmarks": {b: {"title": TITLES[b], "n_problems": len(problems[b])} for b in numbers}},
      problems=problems, rows=rows)
  got = results.compute(evaluated, budget_sentence=SENTENCE)
  return Measured(name, got, evaluated if keep else None, settings or {})


BASE = run("base", {
    "gsm8k": {"natural": [(1, 1000), (1, 2000), (0, 3000), (0, 4000)], "efficiency": [(1, 500)] * 2 + [(0, 1000)] * 2},
    "aime25": {"natural": [(0, 9000), (1, 11000)]}})
HBPO = run("hbpo", {
    "gsm8k": {"natural": [(1, 500), (1, 1000), (1, 1500), (0, 2000)], "512": [(1, 400)] * 4},
    "aime25": {"natural": [(0, 4500), (1, 5500)], "512": [(0, 600)] * 2}})


def column(table, name):
  i = table.columns.index(name)
  return [row[i] for row in table.rows]


def test_main_table():
  table = paper_tables.main_table([BASE, HBPO], modes=["natural"])
  assert table.columns == (
      "run", "mode", "GSM8K accuracy (%)", "GSM8K tokens", "AIME25 accuracy (%)", "AIME25 tokens",
      "average accuracy (%)", "average tokens", "accuracy change (points)", "tokens change (%)")
  assert table.rows == (
      ("base", "natural", "50.0", "2,500", "50.0", "10,000", "50.0", "6,250", "-", "-"),
      ("hbpo", "natural", "75.0", "1,250", "50.0", "5,000", "62.5", "3,125", "+12.5", "-50.0"))


def test_main_table_has_a_row_for_each_run_and_mode():
  table = paper_tables.main_table([BASE, HBPO])
  assert [row[:2] for row in table.rows] == [
      (name, mode) for mode in ("natural", "efficiency", "512") for name in ("base", "hbpo")]
  assert table.rows[2] == ("base", "efficiency", "50.0", "750.0", "-", "-", "50.0 (1 of 2)", "750.0 (1 of 2)", "-", "-")
  assert table.rows[3] == ("hbpo", "efficiency") + ("-",) * 8
  assert table.rows[5][-2:] == ("-", "-")  # The first run was not evaluated at 512.


def test_main_table_with_intervals():
  table = paper_tables.main_table([BASE, HBPO], modes=["natural"], with_intervals=True)
  # Paired: every response is half as long, so nothing is uncertain about the change.
  assert column(table, "tokens change (%)") == ["-", "-50.0 [-50.0, -50.0]"]
  low_high = re.fullmatch(r"\+12\.5 \[\+0\.0, \+(\d+\.\d)\]", column(table, "accuracy change (points)")[1])
  assert low_high and 25 <= float(low_high[1]) <= 50
  interval = statistics.mean_interval([1000, 2000, 3000, 4000])
  assert column(table, "GSM8K tokens")[0] == f"2,500 [{interval['low']:,.0f}, {interval['high']:,.0f}]"
  assert column(table, "GSM8K accuracy (%)")[0] == "50.0 [0.0, 100.0]"


def test_comparison_is_of_the_problems_of_both():
  after = run("after", {"gsm8k": {"natural": [(0, 100), (1, 200)]}}, missing=2)
  got = paper_tables.compare(BASE, after, "natural")
  assert got.n_benchmarks == 1 and got.accuracy["value"] == -0.5 and got.tokens["value"] == pytest.approx(-0.9)
  row = paper_tables.main_table([BASE, after], modes=["natural"]).rows[1]
  assert row[2:] == (
      "50.0*", "150.0*", "-", "-", "50.0* (1 of 2)", "150.0* (1 of 2)", "-50.0 (1 of 2)", "-90.0 (1 of 2)")


def test_equal_ids_with_other_texts_are_not_paired():
  other = run("other", {"gsm8k": {"natural": [(1, 10)] * 4}}, text="another problem")
  assert paper_tables.compare(BASE, other, "natural").n_benchmarks == 0
  assert paper_tables.main_table([BASE, other], modes=["natural"]).rows[1][-2:] == ("-", "-")


def test_without_responses_a_comparison_has_no_interval():
  after = run("after", {"gsm8k": {"natural": [(1, 250), (1, 500), (1, 750), (0, 1000)]}}, keep=False)
  got = paper_tables.compare(BASE, after, "natural")
  assert got.accuracy == {"value": 0.25, "low": None, "high": None}
  assert got.tokens == {"value": -0.75, "low": None, "high": None}
  table = paper_tables.main_table([BASE, after], modes=["natural"], with_intervals=True)
  assert column(table, "tokens change (%)") == ["-", "-75.0 (1 of 2)"]


def test_averages_of_results_give_the_change_of_the_averages():
  base, hbpo = (Measured(r.name, r.results) for r in (BASE, HBPO))
  got = paper_tables.compare(base, hbpo, "natural")
  assert got.n_benchmarks == 2
  # Two benchmarks are no sample of problems: no interval.
  assert got.accuracy == {"value": 0.125, "low": None, "high": None}
  assert got.tokens == {"value": -0.5, "low": None, "high": None}


def test_efficiency_table():
  table = paper_tables.efficiency_table([BASE, HBPO])
  assert table.columns[0] == "run" and table.rows == (
      ("base", "50.0", "6,250", "50.0 (1 of 2)", "750.0 (1 of 2)", "+0.0 (1 of 2)", "-70.0 (1 of 2)"),
      ("hbpo", "62.5", "3,125", "-", "-", "-", "-"))


def test_budget_table():
  more = run("more", {"gsm8k": {"2048": [(1, 1500)], "512": [(1, 450)], "natural": [(1, 5)]}})
  table = paper_tables.budget_table([HBPO, more])
  assert table.columns == (
      "run", "budget", "GSM8K accuracy (%)", "GSM8K tokens", "AIME25 accuracy (%)", "AIME25 tokens",
      "average accuracy (%)", "average tokens")
  assert table.rows == (
      ("hbpo", "512", "100.0", "400.0", "0.0", "600.0", "50.0", "500.0"), ("hbpo", "2048") + ("-",) * 6,
      ("more", "512", "100.0", "450.0", "-", "-", "100.0 (1 of 2)", "450.0 (1 of 2)"),
      ("more", "2048", "100.0", "1,500", "-", "-", "100.0 (1 of 2)", "1,500 (1 of 2)"))
  assert paper_tables.budget_table([BASE]).rows == ()


def test_ablation_table():
  numbers = {"gsm8k": {"natural": [(1, 100), (0, 300)]}}
  runs = [run("one", numbers, settings={"reward.form": "piecewise", "rollout.budgets": [512, 2560]}),
          run("two", numbers, settings={"reward.form": "cosine"})]
  table = paper_tables.ablation_table(runs)
  assert table.columns[1:3] == ("reward.form", "rollout.budgets")
  assert table.rows == (
      ("one", "piecewise", "512, 2560", "50.0", "200.0", "-", "-"),
      ("two", "cosine", "-", "50.0", "200.0", "+0.0", "+0.0"))
  assert paper_tables.ablation_table(runs, fields=["seed"]).columns[:2] == ("run", "seed")


def test_details_table():
  four = run("four", {"gsm8k": {"natural": [(1, 100), (0, 300)]}}, n_samples=4, missing=1)
  table = paper_tables.details_table([four, HBPO], "gsm8k")
  assert table.columns == (
      "run", "mode", "n", "pass@1 (%)", "pass@2 (%)", "pass@4 (%)", "tokens", "p10", "p25", "median", "p75", "p90",
      "p99", "truncated (%)", "unfinished (%)", "no answer (%)")
  first = dict(zip(table.columns, table.rows[0]))
  assert first["n"] == "2 of 3*" and first["pass@1 (%)"] == "50.0 [0.0, 100.0]" and first["pass@4 (%)"] == "50.0"
  assert first["tokens"] == "200.0 [100.0, 300.0]" and first["median"] == "200.0" and first["p99"] == "300.0"
  assert first["truncated (%)"] == "50.0" and first["no answer (%)"] == "50.0" and first["unfinished (%)"] == "0.0"
  second = dict(zip(table.columns, table.rows[1]))
  assert second["n"] == "4" and second["pass@2 (%)"] == "-"
  assert table.rows[2] == ("four", "512") + ("-",) * 14  # Never evaluated at 512.
  with pytest.raises(ValueError, match="benchmark='gsm'.*gsm8k"):
    paper_tables.details_table([HBPO], "gsm")


def test_patterns_table():
  text = SENTENCE.format(budget=512) + " Wait, but wait</think>check"
  table = paper_tables.patterns_table([
      run("base", {"gsm8k": {"natural": [(1, 100)]}}),
      run("hbpo", {"gsm8k": {"natural": [(1, 100)], "512": [(1, 100)]}}, response=text)])
  assert [row[:3] for row in table.rows] == [
      ("base", "GSM8K", "natural"), ("hbpo", "GSM8K", "natural"), ("hbpo", "GSM8K", "512")]
  assert column(table, "thinking (%)") == ["50.0"] * 3
  assert column(table, "reflection inside") == ["0.00", "3.00", "3.00"]
  assert column(table, "outside") == ["0.00", "1.00", "1.00"]
  assert column(table, "wait (in / out)") == ["0.00 / 0.00", "2.00 / 0.00", "2.00 / 0.00"]
  assert column(table, "check (in / out)")[1] == "0.00 / 1.00"
  assert column(table, "states a budget (%)") == ["0.0", "100.0", "-"]
  assert column(table, "most stated (%)") == ["-", "512: 100.0", "-"]


def test_patterns_table_lists_the_budgets_stated_most():
  rows = [(1, 100)] * 10
  one = run("one", {"gsm8k": {"natural": rows}})
  for row, budget in zip(one.evaluated.rows["gsm8k"], [2048, 2048, 2048, 512, 512, 512, 1024, 1024, 64]):
    row["response"] = SENTENCE.format(budget=budget) + " so</think>1"
  measured = Measured("one", results.compute(one.evaluated, budget_sentence=SENTENCE))
  table = paper_tables.patterns_table([measured])
  assert column(table, "states a budget (%)") == ["90.0"]
  assert column(table, "most stated (%)") == ["512: 30.0, 2048: 30.0, 1024: 20.0"]


def test_no_zero_has_a_minus_sign():
  one = run("one", {"gsm8k": {"natural": [(1, 100_000)]}})
  two = run("two", {"gsm8k": {"natural": [(1, 99_999)]}})
  assert paper_tables.main_table([one, two]).rows[1][-1] == "+0.0"


def test_names_stay_in_their_cells():
  named = Measured("a\n| b", BASE.results)
  table = paper_tables.main_table([named])
  assert table.rows[0][0] == "a | b"
  assert len(table.to_markdown().splitlines()) == 2 + len(table.rows)


@pytest.mark.parametrize("make", [
    paper_tables.main_table, paper_tables.efficiency_table, paper_tables.budget_table, paper_tables.ablation_table,
    paper_tables.patterns_table, lambda runs: paper_tables.details_table(runs, "gsm8k")])
def test_tables_need_a_run(make):
  with pytest.raises(ValueError, match="runs is empty"):
    make([])


def test_latex():
  table = Table("not shown", ("run", "tokens (%)"), (("base", "-"), ("hbpo", "-60.6 [-62.0, +1.5]")))
  assert paper_tables.to_latex(table, "50 % fewer") == "\n".join([
      r"\begin{table}", r"  \centering", r"  \caption{50 \% fewer}", r"  \begin{tabular}{lr}", r"    \toprule",
      r"    run & tokens (\%) \\", r"    \midrule", r"    base & - \\",
      r"    hbpo & $-$60.6 [$-$62.0, $+$1.5] \\", r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""])


@pytest.mark.parametrize("text, latex", [
    (r"\input{x}", r"\textbackslash{}input\{x\}"),
    ("a_b & c % d $e$ #f", r"a\_b \& c \% d \$e\$ \#f"),
    ("x^2 ~ <think> | `", r"x\textasciicircum{}2 \textasciitilde{} \textless{}think\textgreater{} \textbar{} "
     r"\textasciigrave{}"),
    ("two\n\nlines\t.", "two lines ."),
    ("5 ± 1, −3", r"5 $\pm$ 1, $-$3"),
    ("hbpo-1.5b --steps=3 ---", "hbpo-1.5b -{}-steps=3 -{}-{}-"),
    ("\x1b[31m", r"\textbackslash{}x1b[31m"),
])
def test_latex_reads_nothing_in_text(text, latex):
  lines = paper_tables.to_latex(Table("", (text, "b"), ((text, "c"),)), text).splitlines()
  assert lines[2] == rf"  \caption{{{latex}}}"
  assert lines[5] == rf"    {latex} & b \\" and lines[7] == rf"    {latex} & c \\"


@pytest.mark.parametrize("first", ["[2pt]", "*"])
def test_latex_row_is_no_argument_of_the_row_before(first):
  lines = paper_tables.to_latex(Table("", ("a",), (("b",), (first,))), "").splitlines()
  assert lines[8] == rf"    {{}}{first} \\"
