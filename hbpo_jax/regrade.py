"""Grades the responses of an evaluation again, without the model.

  python -m hbpo_jax.regrade --config=CONFIG --workdir=DIR [--config.reward.grader=my_package.my_module.score]

DIR is an evaluation's directory. Every stored response is graded by the built-in grader or `reward.grader`, with the
reward that the settings give it where its budget is known; what was stored stays as it is. The new verdicts go to
DIR/regraded/GRADER/, and a table tells where they differ from the stored ones.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import json
import os
import pathlib
import re
from typing import Any

import numpy as np

import hbpo_jax
from hbpo_jax import flags, validation
from hbpo_jax.config import Config
from hbpo_jax.data.record import Problem
from hbpo_jax.evaluation import store
from hbpo_jax.evaluation.store import Evaluated
from hbpo_jax.files import atomic_write_text, json_line, json_value
from hbpo_jax.grading import Grader, Verdict, load_custom
from hbpo_jax.objective import forms
from hbpo_jax.reporting import tables
from hbpo_jax.reporting.console import Console
from hbpo_jax.reporting.text import plain

FORMAT = 1
SHOWN = 10  # Disagreements printed,
SHOWN_CHARACTERS = 240  # and characters of the end of each response.


class Regrader:
  """The grader of the settings, applied to stored responses; a context manager."""

  def __init__(self, cfg: Config):
    """Loads the user's grader, if `reward.grader` names one.

    Raises:
      ValueError: when it cannot be imported.
    """
    self._is_custom = bool(cfg.reward.grader)
    self._grader = load_custom(cfg.reward.grader) if self._is_custom else Grader(cfg.grading)
    self._reward = cfg.reward

  def __enter__(self) -> "Regrader":
    return self

  def __exit__(self, *_: object) -> None:
    self._grader.close()

  @property
  def identity(self) -> str:
    """'math' for the built-in grader, else the dotted path."""
    return self._grader.identity

  def grade(self, problems: Sequence[Problem], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """New verdicts on the stored responses of one benchmark, in order.

    Args:
      problems: of the benchmark.
      rows: as stored; they follow an opened `<think>` unless one says "thinking_opened": false.
    Returns:
      For each row id, mode, sample, score, reason, given, reward (None where the reward needs a budget and the mode
      has none, or more than one response says), stored_score, stored_reason.
    """
    by_id = {p.id: p for p in problems}
    for i, row in enumerate(rows):
      problem = by_id[row["id"]]
      # The built-in grader wants the accepted answers, a user's function the whole problem.
      answer: Any = dataclasses.asdict(problem) if self._is_custom else problem.answers
      self._grader.submit(i, row["response"], answer, thinking_opened=row.get("thinking_opened", True))
    graded = self._grader.collect()
    verdicts = [graded[i] for i in range(len(rows))]
    rewards = self._rewards(rows, verdicts)
    return [{
        "id": row["id"], "mode": row["mode"], "sample": row["sample"], "score": verdict.score,
        "reason": verdict.reason, "given": verdict.answer, "reward": reward, "stored_score": row["score"],
        "stored_reason": row["reason"],
    } for row, verdict, reward in zip(rows, verdicts, rewards, strict=True)]

  def _rewards(self, rows: Sequence[dict[str, Any]], verdicts: Sequence[Verdict]) -> list[float | None]:
    rewards: list[float | None] = [None] * len(rows)
    form = forms.FORMS[self._reward.form]
    if not form.stands_alone:
      return rewards
    for mode in dict.fromkeys(row["mode"] for row in rows):
      if not mode.isdecimal() and form.reads_budget:
        continue
      from hbpo_jax.objective import reward  # JAX, which nothing else here needs.

      own = [i for i, row in enumerate(rows) if row["mode"] == mode]
      column = lambda values: np.array(values)[None, None, :]
      reward_BGJ = reward.compute(
          column([rows[i]["n_gen"] for i in own]), column([verdicts[i].score for i in own]),
          np.array([int(mode) if mode.isdecimal() else 0]), cfg=self._reward,
          finished_BGJ=column([verdicts[i].finished for i in own]))
      for i, value in zip(own, np.asarray(reward_BGJ).ravel(), strict=True):
        rewards[i] = float(value)
    return rewards


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """The numbers of one benchmark and mode.

  Args:
    rows: of `Regrader.grade`, at least one.
  Returns:
    n (problems), n_responses, accuracy_stored and accuracy (mean over problems of their mean score), disagreements
    (responses whose score changed), reason_changes (whose score stayed, but not its reason), mean_reward or None.
  """
  rewards = [row["reward"] for row in rows if row["reward"] is not None]
  return {
      "n": len({row["id"] for row in rows}), "n_responses": len(rows),
      "accuracy_stored": _accuracy(rows, "stored_score"), "accuracy": _accuracy(rows, "score"),
      "disagreements": sum(map(disagrees, rows)),
      "reason_changes": sum(not disagrees(row) and row["reason"] != row["stored_reason"] for row in rows),
      "mean_reward": float(np.mean(rewards)) if rewards else None,
  }


def disagrees(row: dict[str, Any]) -> bool:
  """Whether a response has another score than was stored."""
  return row["score"] != row["stored_score"]


def table(summary: dict[str, Any]) -> tables.Table:
  """The table of what `main` writes to summary.json."""
  percent = tables.percent
  lines, total, changed = [], 0, 0
  for benchmark in summary["benchmarks"].values():
    for mode, s in benchmark["modes"].items():
      total, changed = total + s["n_responses"], changed + s["disagreements"]
      lines.append((
          benchmark["title"], mode, f"{s['n_responses']:,}", percent(s["accuracy_stored"]), percent(s["accuracy"]),
          f"{s['disagreements']:,}", "-" if s["mean_reward"] is None else f"{s['mean_reward']:.3f}"))
  return tables.Table(
      title=f"Graded again by {summary['grader']}",
      columns=("benchmark", "mode", "n", "accuracy stored", "accuracy regraded", "disagreements", "mean reward"),
      rows=(*lines, ("all", "", f"{total:,}", "", "", f"{changed:,}", "")))


def describe(benchmark: str, row: dict[str, Any], problem: Problem, response: str) -> str:
  """A disagreement for people: where, answers, both verdicts and the end of the response; safe to print."""
  end = response if len(response) <= SHOWN_CHARACTERS else "..." + response[-SHOWN_CHARACTERS:]
  verdict = lambda prefix: f"{row[prefix + 'score']:g} ({row[prefix + 'reason']})"
  given = f" for {row['given']!r}" if row["given"] else ""
  head = (f"{benchmark}: {row['id']}  {row['mode']}  sample {row['sample']}: answer {problem.answer!r}, "
          f"stored {verdict('stored_')}, now {verdict('')}{given}")
  return plain(head) + "\n  " + plain(end.strip()).replace("\n", "\n  ")


def label(identity: str) -> str:
  """A grader's identity as the name of a directory."""
  return re.sub(r"[^A-Za-z0-9_.-]+", "_", identity).strip(".") or "grader"


def find(workdir: str | os.PathLike) -> Evaluated:
  """The evaluation of a directory.

  Raises:
    ValueError: when there is none, it has stored no graded response, or one belongs to no problem; names the files.
  """
  root = pathlib.Path(workdir)
  if not store.is_evaluation(root):
    inside = sorted(path.parent for path in root.glob(f"eval/*/{store.MANIFEST}"))
    hint = f"it is a run, with the evaluations {', '.join(map(str, inside))}; give one of them" if inside else (
        "give the --workdir of an evaluation")
    raise ValueError(f"--workdir={root} holds no evaluation ({root / store.MANIFEST} does not exist); {hint}.")
  evaluated = store.open_existing(root)
  if not any(evaluated.rows.values()):
    files = ", ".join(str(root / "responses" / f"{name}.jsonl") for name in evaluated.manifest["benchmarks"])
    raise ValueError(f"--workdir={root} has no graded response yet (looked in {files}); run the evaluation first.")
  for name, rows in evaluated.rows.items():
    ids = {p.id for p in evaluated.problems[name]}
    if strays := [row["id"] for row in rows if row["id"] not in ids]:
      raise ValueError(
          f"{root / 'responses' / f'{name}.jsonl'} holds a response to {strays[0]!r}, which is not in "
          f"{root / 'problems' / f'{name}.jsonl'}; restore the problems, or remove the line.")
  return evaluated


def check(cfg: Config) -> None:
  """Raises ValueError on settings that cannot work; those of devices and of advantages do not matter here."""
  alone = dataclasses.replace(cfg, advantage=dataclasses.replace(cfg.advantage, intra_coef=0.0))
  validation.validate(alone, n_devices=cfg.mesh.data * cfg.mesh.tensor * max(cfg.mesh.fsdp, 1))


def _accuracy(rows: Sequence[dict[str, Any]], field: str) -> float:
  by_problem: dict[str, list[float]] = {}
  for row in rows:
    by_problem.setdefault(row["id"], []).append(row[field])
  return float(np.mean([np.mean(scores) for scores in by_problem.values()]))


def _by_mode(rows: Sequence[dict[str, Any]], modes: Sequence[str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
  for mode in dict.fromkeys([*modes, *(row["mode"] for row in rows)]):
    if own := [row for row in rows if row["mode"] == mode]:
      yield mode, own


def main(cfg: Config, workdir: str) -> None:
  """Grades, writes WORKDIR/regraded/GRADER/, prints the table and the first disagreements.

  Raises:
    ValueError: when there is nothing to grade, or the settings are wrong.
  """
  check(cfg)
  evaluated = find(workdir)
  summary: dict[str, Any] = {"format": FORMAT, "hbpo_jax": hbpo_jax.__version__}
  shown: list[str] = []
  with Console(dataclasses.replace(cfg.log, live=False), 1) as console, Regrader(cfg) as regrader:
    for note in evaluated.notes:
      console.message(note)
    target = evaluated.directory / "regraded" / label(regrader.identity)
    summary |= {"grader": regrader.identity, "reward": dataclasses.asdict(cfg.reward),
                "grading": dataclasses.asdict(cfg.grading), "benchmarks": {}}
    for name, stored in evaluated.rows.items():
      if not stored:
        continue
      console.message(f"{name}: grading {len(stored):,} responses")
      rows = regrader.grade(evaluated.problems[name], stored)
      atomic_write_text(target / f"{name}.jsonl", "".join(map(json_line, rows)))
      by_id = {p.id: p for p in evaluated.problems[name]}
      shown += [describe(name, row, by_id[row["id"]], before["response"])
                for row, before in zip(rows, stored, strict=True) if disagrees(row)][:SHOWN - len(shown)]
      modes = _by_mode(rows, evaluated.manifest["modes"])
      summary["benchmarks"][name] = {
          "title": evaluated.manifest["benchmarks"][name]["title"],
          "modes": {mode: summarise(own) for mode, own in modes}}
    atomic_write_text(target / "summary.json", json.dumps(json_value(summary), indent=2) + "\n")
    console.table(table(summary))
    for text in shown:
      console.message(text + "\n")
    console.message(f"see {target}")


def cli(argv: Sequence[str] | None = None) -> None:
  """Runs the command with these arguments; None means the process's."""
  os.environ.setdefault("JAX_PLATFORMS", "cpu")  # A training run may hold the accelerator; a reward needs none.
  flags.run(main, name="regrade", argv=argv)


if __name__ == "__main__":
  cli()
