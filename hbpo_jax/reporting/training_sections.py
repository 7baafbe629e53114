"""The sections of a report that show training, budgets, settings and how it was made."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
from typing import Any

import numpy as np

import hbpo_jax
from hbpo_jax import config, versions
from hbpo_jax.evaluation import results as results_lib
from hbpo_jax.reporting import alarms as alarms_lib
from hbpo_jax.reporting import comparison, curve_findings, curves, dynamics, figures, plots
from hbpo_jax.reporting.blocks import Block, Facts, Heading, Section, Sheet, Words, picture
from hbpo_jax.reporting.runs import Run, different_settings
from hbpo_jax.reporting.tables import Table

_NO_METRICS = "no run has rows in metrics.jsonl"
# Settings without which a run's rewards are not known; all others of the objective are younger, and off by default.
_DECIDE_REWARDS = ("rollout.budgets", "reward.form", "reward.alpha", "reward.beta", "reward.max_response_tokens",
                   "reward.unfinished_reward", "advantage.intra_coef", "advantage.std_ddof", "advantage.std_eps",
                   "advantage.center_intra")
_LAST = 10  # Most rows of the training curve that stand for its end.


def of_training(runs: Sequence[Run]) -> list[Section | tuple[str, str]]:
  """The sections on training, in order; for one without data (title, why)."""
  return _made(runs, [
      ("Training", course), ("Budgets and lengths", budgets), ("Reward curves", rewards),
      ("Where decoding and time went", waste), ("Alarms", alarms)])


def of_settings(runs: Sequence[Run]) -> list[Section | tuple[str, str]]:
  """The sections that close a report, in order; for one without data (title, why)."""
  return _made(runs, [("Settings that differ", settings), ("How this was made", made)])


def course(runs: Sequence[Run]) -> Section | str:
  """Training over steps: runs beside each other, then each run by budget and with its evaluations."""
  trained = [run for run in runs if run.metrics]
  if not trained:
    return _NO_METRICS
  blocks: list[Block] = []
  if len(trained) > 1:
    blocks.append(picture(
        "training_compared", dynamics.compared_figure([(run.name, run.metrics) for run in trained]),
        "Line plots over training steps, one line per run.", "Runs beside each other; running means."))
  for run in trained:
    if len(trained) > 1:
      blocks.append(Heading(run.name))
    checks = evaluations_by_step(run)
    if plots.logged_budgets(run.metrics):
      blocks.append(picture(
          f"lengths_{run.name}", plots.length_by_budget_figure(run.metrics, n_columns=2),
          f"{run.name}: response length over steps, one panel per budget.",
          "Mean response length under each budget, with one standard deviation; the dashed line is the budget."))
    diamonds = (" Diamonds are evaluations: other problems and another temperature than in training, and in mid-run "
                "maybe fewer problems (eval.n_during).") if checks else ""
    blocks.append(picture(
        f"training_{run.name}", dynamics.course_figure(run.metrics, checks),
        f"{run.name}: line plots of the metrics of training over steps.",
        f"{len(run.metrics):,} logged steps; thin lines are steps, thick ones running means. Only the axes of lengths "
        f"and of clip shares start at 0.{diamonds}"))
  return Section("training", "Training", blocks)


def evaluations_by_step(run: Run) -> dict[int, tuple[float, float]]:
  """(accuracy, tokens) of a run's evaluations by training step: those it logged, and those it keeps."""
  # The row of step k, counted from 0, is annotated once k + 1 steps are done.
  found = {row["step"] + 1: (row["eval/accuracy"], row["eval/tokens"]) for row in run.metrics
           if row.get("eval/accuracy") is not None and row.get("eval/tokens") is not None}
  last = max((row["step"] for row in run.metrics), default=-1) + 1
  for e in run.evaluations:
    step = {"base": 0, "trained": last}.get(e.stage, e.step)
    average = e.results["average"][comparison.first_mode([e.results])]
    if step is not None and average["accuracy"]["value"] is not None:
      found[step] = (average["accuracy"]["value"], average["tokens"]["value"])
  return dict(sorted(found.items()))


def budgets(runs: Sequence[Run]) -> Section | str:
  """Shares of response lengths by budget: of fixed-budget modes, or, without any, as training logged them."""
  asked = [
      (e.name, int(mode), [row["n_gen"] for rows in e.evaluated.rows.values() for row in rows if row["mode"] == mode])
      for run in runs for e in run.main for mode in e.results["modes"] if results_lib.is_budget(mode)]
  rows = sorted(((n, b, lengths) for n, b, lengths in asked if lengths), key=lambda r: r[1])
  caption = "Share of responses, in percent, by the budget that was asked for (rows) and their length; all benchmarks."
  if not rows:
    rows = [(run.name, b, curve_findings.lengths_of_moments(mean, std).tolist())
            for run in runs for b, mean, std in _last_moments(run.metrics)]
    caption = (
        "Approximate. No evaluation has a fixed-budget mode and training keeps no lengths of single responses, so each "
        "row is the log-normal distribution with the mean and deviation that training logged under this budget, over "
        f"its last {_LAST} rows or fewer.")
  if not rows:
    return "no evaluation has a fixed-budget mode, and no run logged lengths by budget"
  names = list(dict.fromkeys(name for name, _, _ in rows))
  rows = sorted(rows, key=lambda r: (names.index(r[0]), r[1]))
  edges = figures.length_bins([n for _, _, lengths in rows for n in lengths])
  fig = figures.budget_heatmap([(name, b, figures.shares(lengths, edges)) for name, b, lengths in rows], edges)
  return Section("budgets", "Budgets and lengths", [picture(
      "budgets", fig, "Heat map: share of responses by budget and length.",
      f"{caption} The black line marks the budget; a row adds up to 100.")])


def rewards(runs: Sequence[Run]) -> Section | str:
  """The reward of a correct answer by length and budget, and what the configuration favours, by configuration."""
  blocks: list[Block] = []
  groups: dict[str, list[tuple[Run, config.Config]]] = {}
  for run in runs:
    if run.info is not None and (cfg := config_of(run)) is not None:
      groups.setdefault(repr((cfg.reward, cfg.advantage, cfg.rollout.budgets, cfg.caps)), []).append((run, cfg))
  for members in groups.values():
    cfg = members[0][1]
    names = ", ".join(run.name for run, _ in members)
    if len(groups) > 1:
      blocks.append(Heading(names))
    if nothing := curves.nothing_to_draw(cfg):
      blocks.append(Words(f"{names}: {nothing}"))
      continue
    n_gen_N, reward_GN = curves.reward_curves(cfg)
    blocks.append(picture(
        f"rewards_{members[0][0].name}", plots.reward_curves_figure(n_gen_N, reward_GN, cfg.rollout.budgets),
        f"{names}: line plot of the reward of a correct answer against its length, one line per budget.",
        f"reward.form={cfg.reward.form}, L_max {cfg.reward.max_response_tokens:,} tokens. A dot marks each budget."))
    if warnings := curves.check(cfg).warnings:
      blocks.append(Facts(tuple(w.text for w in warnings)))
  if not blocks:
    return "no run has a run.json with rollout.budgets and the reward's settings"
  return Section("rewards", "Reward curves", blocks)


def waste(runs: Sequence[Run]) -> Section | str:
  """What slots decoded and what a step's seconds were spent on."""
  blocks: list[Block] = []
  for run in runs:
    if not any(row.get("rollout/slot_steps") or row.get("time/rollout_s") is not None for row in run.metrics):
      continue
    if len([r for r in runs if r.metrics]) > 1:
      blocks.append(Heading(run.name))
    blocks.append(picture(
        f"waste_{run.name}", dynamics.waste_figure(run.metrics),
        f"{run.name}: stacked areas over steps of what decoding was spent on, and of the seconds of a step.",
        "Left: of all slot-steps, those that gave a token that counts (useful), a token of a response that was cut off "
        "(truncated), a wait after a response had ended (overrun), or nothing (idle). Right: seconds in rollouts, in "
        "grading that did not overlap with them, and in learning."))
  if not blocks:
    return "no run logged rollout/slot_steps or time/rollout_s"
  return Section("waste", "Where decoding and time went", blocks)


def alarms(runs: Sequence[Run]) -> Section | str:
  """What a run's metrics gave alarm about, found again from its log and the limits of its settings."""
  logged = [run for run in runs if run.metrics]
  if not logged:
    return _NO_METRICS
  rows = []
  for run in logged:
    known = dataclasses.fields(config.AlarmConfig)
    limits = config.AlarmConfig(**{f.name: run.settings.get(f"alarms.{f.name}", f.default) for f in known})
    found = alarms_lib.history(run.metrics, limits, plots.logged_budgets(run.metrics))
    rows += [(run.name, a.kind, str(a.step), "lasts" if a.cleared_step is None else str(a.cleared_step), a.text)
             for a in found]
  if not rows:
    return Section("alarms", "Alarms", [Words("No alarm was raised.")])
  table = Table("Alarms, by the step of their row", ("run", "kind", "raised", "cleared", "what, and what helps"),
                tuple(rows))
  return Section("alarms", "Alarms", [Sheet(table, prose=True)])


def settings(runs: Sequence[Run]) -> Section | str:
  """Every setting in which the runs differ."""
  if len(runs) < 2:
    return "there is one run"
  rows = different_settings(runs)
  if not rows:
    return "the runs have the same settings"
  table = Table("Settings that differ", ("setting", *(run.name for run in runs)),
                tuple((name, *map(_value, values)) for name, values in rows))
  return Section("settings", "Settings that differ", [Sheet(table, "A dash: the run does not know it.", prose=True)])


def made(runs: Sequence[Run]) -> Section | str:
  """Where each run lies and what made it, and what made this report."""
  facts = [(run, _facts(run)) for run in runs]
  names = dict.fromkeys(name for _, of_run in facts for name in of_run)
  table = Table("Runs", ("", *(run.name for run in runs)),
                tuple((name, *(of_run.get(name, "-") for _, of_run in facts)) for name in names))
  blocks: list[Block] = [Sheet(table, prose=True)]
  for run in runs:
    if lines := (run.info or {}).get("profile_differences"):
      blocks.append(Words(f"{run.name}: {' '.join(str(lines[0]).split())}"))
      blocks += [Facts(tuple(" ".join(str(line).split()) for line in lines[1:]))] if lines[1:] else []
  if notes := tuple(note for run in runs for note in run.notes):
    blocks += [Heading("Left out"), Facts(notes)]
  of_report = ", ".join(f"{name} {version}" for name, version in versions.installed().items())
  blocks.append(Words(
      f"This report was made by python -m hbpo_jax.report, hbpo_jax {hbpo_jax.__version__}, from the responses and "
      f"logs in the directories above; with {of_report}."))
  return Section("made", "How this was made", blocks)


def config_of(run: Run) -> config.Config | None:
  """A run's settings, those that are newer than the run at their default; None where it lacks what decides rewards."""
  table, known = config.field_table(), run.settings
  if not all(name in known for name in _DECIDE_REWARDS):
    return None
  cd = config.to_config_dict(config.Config())
  for name in table:
    if name in known:
      parent, _, leaf = name.rpartition(".")
      value = tuple(known[name]) if isinstance(known[name], list) else known[name]
      try:
        (config.get(cd, parent) if parent else cd)[leaf] = value
      except TypeError as error:
        raise ValueError(
            f"{run.path / 'run.json'}: config.{name}={value!r} has the wrong type; restore the file.") from error
  return config.from_config_dict(cd)


def _made(
    runs: Sequence[Run],
    makers: Sequence[tuple[str, Callable[[Sequence[Run]], Section | str]]]) -> list[Section | tuple[str, str]]:
  found = [(title, make(runs)) for title, make in makers]
  return [(title, section) if isinstance(section, str) else section for title, section in found]


def _last_moments(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, float]]:
  """(budget, mean, deviation) of lengths over the last rows."""
  n = min(_LAST, max(1, len(rows) // 5))
  found = []
  for b in plots.logged_budgets(rows):
    mean, std = (plots.column(rows, f"budget_{b}/tokens_{what}")[-n:] for what in ("mean", "std"))
    if np.isfinite(mean).any() and np.isfinite(std).any():
      found.append((b, float(np.nanmean(mean)), float(np.nanmean(std))))
  return found


def _facts(run: Run) -> dict[str, str]:
  found = {"directory": str(run.path)}
  if run.info is None:
    manifest = run.evaluations[0].evaluated.manifest
    return found | {"kind": "evaluation", "hbpo_jax": _value(manifest.get("hbpo_jax")),
                    "model": _value(manifest["model"].get("path")), "modes": ", ".join(manifest["modes"]),
                    "samples per problem": str(manifest["samples_per_problem"])}
  info, devices, git = run.info, run.info.get("devices") or {}, run.info.get("git") or {}
  found |= {"kind": "training", "hbpo_jax": _value(info.get("hbpo_jax")), "started": _value(info.get("started")),
            "model": _value(run.settings.get("model.path") or None), "profile": _value(run.settings.get("profile")),
            "command": _value(info.get("command")), "steps logged": f"{len(run.metrics):,}"}
  if git.get("commit"):
    found["commit"] = str(git["commit"])[:12] + (" with changes" if git.get("dirty") else "")
  if devices:
    found["devices"] = f"{devices.get('used')} x {devices.get('kind')}"
  return found | {"versions": ", ".join(f"{k} {v}" for k, v in (info.get("versions") or {}).items()) or "-"}


def _value(value: Any) -> str:
  if value is None:
    return "-"
  return value if isinstance(value, str) and value else json.dumps(value)
