"""The sample responses of a report's page: which, and as what JSON."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
from typing import Any

from hbpo_jax.reporting.runs import Assessed, Run
from hbpo_jax.reporting.text import plain

MOST = 200  # Default of the comparisons that a page holds.
HEAD, TAIL = 12_000, 8_000  # Characters of a response that are kept where it is longer; answers stand at the end.


@dataclasses.dataclass(frozen=True)
class Samples:
  """columns: names of the evaluations.  entries: one per problem and mode, with a response or None per column, as the
  page reads them.  note: what was left out, in a sentence."""
  columns: tuple[str, ...]
  entries: tuple[dict[str, Any], ...]
  note: str

  def to_json(self) -> str:
    """ASCII JSON that can stand in an HTML script element: nothing in it can end the element or open another."""
    text = json.dumps({"columns": self.columns, "entries": self.entries}, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def collect(runs: Sequence[Run], most: int = MOST) -> Samples | None:
  """The responses to show: of the evaluations before and after, or else those that training logged.

  The first response to a problem in a mode stands for the others. Entries are chosen by their place only: first those
  whose verdict changed, then the rest, each evenly over the problems.

  Args:
    runs: of each benchmark, the first evaluation is what the others are compared with.
    most: entries, at least 1.
  Returns:
    None where there is no response.
  Raises:
    ValueError: when `most` is below 1.
  """
  if most < 1:
    raise ValueError(f"--samples={most} leaves nothing to show; give at least 1.")
  evaluations = [e for run in runs for e in run.main]
  columns = tuple(e.name for e in evaluations)
  entries = list(_compared(evaluations)) if evaluations else []
  if not entries:
    columns = ("training",)
    entries = [_of_training(run, row) for run in runs for row in run.samples]
  if not entries:
    return None
  changed = [i for i, e in enumerate(entries) if {"fixed", "broken"} & set(e["change"])]
  rest = [i for i, e in enumerate(entries) if not {"fixed", "broken"} & set(e["change"])]
  kept = _evenly(changed, most)
  kept += _evenly(rest, most - len(kept))
  note = f"All {len(entries):,} pairs of problem and mode are here."
  if len(kept) < len(entries):
    shown = min(len(changed), most)
    note = f"{len(kept):,} of {len(entries):,} pairs of problem and mode are here, evenly spaced."
    if changed:
      note = (f"{len(kept):,} of {len(entries):,} pairs of problem and mode are here: {shown:,} of the "
              f"{len(changed):,} with a changed verdict, and {len(kept) - shown:,} of the {len(rest):,} others, evenly "
              "spaced.")
  return Samples(columns, tuple(_whole(entries[i]) for i in sorted(kept)), note)


def visible(text: str) -> str:
  """Text in which control, format and unpaired surrogate characters show as escapes; fast where there is none."""
  if "\n" not in text:
    return text if text.isprintable() else plain(text)
  return "\n".join(line if line.isprintable() else plain(line) for line in text.split("\n"))


def _compared(evaluations: Sequence[Assessed]) -> Iterator[dict[str, Any]]:
  """Per benchmark, an entry for each problem and mode that its first evaluation shares with another, or has alone."""
  for name in dict.fromkeys(name for e in evaluations for name in e.evaluated.problems):
    members = [e for e in evaluations if name in e.evaluated.problems]
    rows = [_first_responses(e, name) for e in evaluations]
    texts = [{p.id: p.problem for p in e.evaluated.problems.get(name, [])} for e in evaluations]
    title = members[0].results["benchmarks"][name]["title"]
    for problem in members[0].evaluated.problems[name]:
      for mode in members[0].results["modes"]:
        found = [of.get((problem.id, mode)) if text.get(problem.id) == problem.problem else None
                 for of, text in zip(rows, texts)]
        if found[evaluations.index(members[0])] is None or sum(map(bool, found)) < min(2, len(members)):
          continue
        yield {"benchmark": title, "mode": mode, "level": problem.level, "id": problem.id, "problem": problem.problem,
               "answer": problem.answer, "responses": found, "change": _changes([r for r in found if r])}


def _first_responses(e: Assessed, name: str) -> dict[tuple[str, str], dict[str, Any]]:
  found: dict[tuple[str, str], dict[str, Any]] = {}
  scores: dict[tuple[str, str], list[float]] = {}
  for row in e.evaluated.rows.get(name, []):
    key = row["id"], row["mode"]
    scores.setdefault(key, []).append(row["score"])
    found.setdefault(key, row)
  return {key: _response(row, scores[key]) for key, row in found.items()}


def _response(row: Mapping[str, Any], scores: Sequence[float]) -> dict[str, Any]:
  return {
      "text": row["response"], "tokens": row["n_gen"], "think": row["n_think"], "verdict": row["reason"],
      "right": row["score"] >= 1, "given": row["given"], "truncated": row["truncated"],
      "others": f"{sum(s >= 1 for s in scores)} of {len(scores)} correct" if len(scores) > 1 else ""}


def _of_training(run: Run, row: Mapping[str, Any]) -> dict[str, Any]:
  right = row.get("verdict") == "correct"
  text = f"step {row['step']}, reward {row.get('reward') or 0.0:.3f}, advantage {row.get('advantage') or 0.0:+.3f}"
  return {
      "benchmark": run.name, "mode": f"budget {row.get('budget')}", "level": None, "id": f"step {row['step']}",
      "problem": str(row.get("problem", "")), "answer": str(row.get("answer", "")),
      "change": ["right" if right else "wrong"], "responses": [{
          "text": str(row.get("response", "")), "tokens": row.get("n_gen"), "think": None,
          "verdict": str(row.get("verdict")), "right": right, "given": "", "truncated": False, "others": text}]}


def _changes(found: Sequence[Mapping[str, Any]]) -> list[str]:
  """How the verdicts differ from the first; of a single response, the verdict itself."""
  first = found[0]["right"]
  if len(found) == 1:
    return ["right" if first else "wrong"]
  changes = {"same" if r["right"] == first else "fixed" if r["right"] else "broken" for r in found[1:]}
  return sorted(changes) if changes == {"same"} else sorted(changes - {"same"})


def _evenly(items: Sequence[int], most: int) -> list[int]:
  if len(items) <= most:
    return list(items)
  return [items[i * len(items) // most] for i in range(most)]


def _whole(entry: Mapping[str, Any]) -> dict[str, Any]:
  """An entry as the page gets it: visible text, long responses without their middle."""
  responses = [r and {**r, "text": visible(_cut(r["text"])), "given": visible(r["given"])} for r in entry["responses"]]
  texts = {name: visible(_cut(str(entry[name]))) for name in ("benchmark", "mode", "id", "problem", "answer")}
  return {**entry, **texts, "responses": responses}


def _cut(text: str) -> str:
  if len(text) <= HEAD + TAIL:
    return text
  left_out = len(text) - HEAD - TAIL
  return f"{text[:HEAD]}\n[... {left_out:,} characters are not on this page ...]\n{text[-TAIL:]}"
