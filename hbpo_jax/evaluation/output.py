"""What an evaluation ends with: results.json for programs, results.md and tables for people."""

import json
import pathlib
from typing import Any

from hbpo_jax.evaluation import results as results_lib
from hbpo_jax.evaluation.store import RESULTS, Evaluated
from hbpo_jax.files import atomic_write_text, json_value
from hbpo_jax.reporting import paper_tables
from hbpo_jax.reporting.tables import Table
from hbpo_jax.reporting.text import markdown


def write_results(evaluated: Evaluated) -> dict[str, Any]:
  """Writes results.json and results.md beside the responses, and returns what results.json holds."""
  results = json_value(results_lib.compute(
      evaluated, budget_sentence=evaluated.manifest["settings"]["prompt.budget_sentence"]))
  text = "\n".join(f"## {markdown(t.title)}\n\n{t.to_markdown()}" for t in tables(evaluated, results))
  atomic_write_text(evaluated.directory / RESULTS, json.dumps(results, indent=2) + "\n")
  atomic_write_text(evaluated.directory / pathlib.Path(RESULTS).with_suffix(".md"), text)
  return results


def tables(evaluated: Evaluated, results: dict[str, Any], *, patterns: bool = True) -> list[Table]:
  """The tables of one evaluation: each benchmark's details, the reasoning patterns, and last the paper's Table 1.

  Args:
    patterns: False leaves the reasoning patterns out, whose table is wider than a terminal.
  """
  run = paper_tables.Measured(evaluated.directory.resolve().name, results, evaluated, {})
  details = [paper_tables.details_table([run], benchmark) for benchmark in results["benchmarks"]]
  return [*details, *([paper_tables.patterns_table([run])] if patterns else []), paper_tables.main_table([run])]
