"""What cells say together: intervals, paired differences, claims, the write-up."""

import json
import math

import pytest

from hbpo_jax.studies import outcome, writeup

LEVELS = (1, 2, 3)


def cell(method, seed, accuracy, tokens, *, spread=(8.0, 4.0), kind="method", correlation=0.6):
  """A cell whose accuracy falls by 0.1, and whose tokens rise by 10, from level to level."""
  natural = {
      "n": 30, "accuracy": accuracy, "tokens": tokens, "truncated": 0.0,
      "by_level": [{"level": k, "n": 10, "accuracy": accuracy - 0.1 * (k - 2), "tokens": tokens + 10 * (k - 2),
                    "spread": 1.0} for k in LEVELS],
      "level_correlation": 0.5, "states_budget": 0.25, "budget_correlation": correlation,
      "budgets": {str(k): {"8": 2} for k in LEVELS},
      "openings": {str(k): {"guess": 1, "work": 3} for k in LEVELS}, "opening_correlation": correlation}
  return {
      "format": 1, "cell": f"{method}/seed_{seed}", "kind": kind, "method": method, "seed": seed,
      "learning_rate": 1e-4, "cpu_s": 60.0, "modes": {"natural": natural, "8": natural},
      "training": {"step": list(range(20)), "length_spread": [spread[0]] * 10 + [spread[1]] * 10,
                   "accuracy": [0.5] * 20}}


def cells_of(**methods):
  return {m: {s: cell(m, s, a, t, spread=spread) for s, (a, t) in enumerate(values)}
          for m, (values, spread) in methods.items()}


CELLS = cells_of(
    warm_start=([(0.80, 60.0), (0.82, 61.0), (0.81, 62.0)], (8.0, 8.0)),
    classic=([(0.90, 40.0), (0.91, 41.0), (0.92, 42.0)], (8.0, 6.0)),
    cosine=([(0.80, 12.0), (0.81, 13.0), (0.83, 12.5)], (8.0, 1.0)),
    paper=([(0.85, 21.0), (0.86, 22.0), (0.87, 20.5)], (8.0, 4.0)),
    hbpo=([(0.90, 19.0), (0.92, 20.0), (0.92, 19.0)], (8.0, 4.0)))


def test_intervals_by_hand():
  # Mean 2, deviation 1, t(0.975, 2) = 4.302653: half a width of 4.302653 / sqrt(3) = 2.484138.
  found = outcome.estimate([1.0, 2.0, 3.0])
  assert (found.mean, found.seeds) == (2.0, 3)
  assert found.low == pytest.approx(2 - 2.484138, abs=1e-6) and found.high == pytest.approx(2 + 2.484138, abs=1e-6)
  assert outcome.estimate([5.0, None, math.nan]) == outcome.Estimate(5.0, None, None, 1)
  assert outcome.estimate([]) == outcome.Estimate(None, None, None, 0)


def test_differences_are_paired_by_seed():
  tokens = outcome.natural("tokens")
  found = outcome.difference(CELLS, "hbpo", "paper", tokens)  # -2, -2, -1.5
  assert found.mean == pytest.approx(-5.5 / 3) and found.high < 0
  shifted = {"hbpo": {1: CELLS["hbpo"][1]}, "paper": CELLS["paper"]}
  assert outcome.difference(shifted, "hbpo", "paper", tokens) == outcome.Estimate(-2.0, None, None, 1)


def test_the_hardest_third_and_the_spread_that_is_left():
  one = cell("m", 0, 0.8, 30.0, spread=(8.0, 2.0))
  assert outcome.hardest_third("accuracy")(one) == pytest.approx(0.7)  # level 3 of 1, 2, 3
  assert outcome.hardest_third("tokens")(one) == pytest.approx(40.0)
  assert outcome.kept_spread(one) == pytest.approx(0.25)


def test_the_best_mode_of_each_level_by_hand():
  at = lambda *pairs: {"by_level": [{"accuracy": a, "tokens": t} for a, t in pairs]}
  warm = {"modes": {
      "natural": at((0.0, 99.0), (0.0, 99.0), (0.0, 99.0)),
      "say:short": at((0.99, 5.0), (0.90, 6.0), (0.50, 7.0)),
      "say:long": at((1.0, 10.0), (0.95, 20.0), (0.9, 30.0))}}
  assert outcome.best_modes(warm, 0.0) == pytest.approx({"accuracy": 2.85 / 3, "hard": 0.9, "tokens": 20.0})
  assert outcome.best_modes(warm, 0.02) == pytest.approx({"accuracy": 2.84 / 3, "hard": 0.9, "tokens": 55 / 3})
  assert outcome.best_modes(warm, 0.5) == pytest.approx({"accuracy": 2.39 / 3, "hard": 0.5, "tokens": 6.0})
  assert outcome.best_modes({"modes": {"natural": at((1.0, 1.0))}}, 0.0) == {}


def verdicts(cells):
  return {c.claim: c.verdict for c in outcome.claims(cells)}


def test_claims_follow_the_intervals():
  found = verdicts(CELLS)
  assert found["Fewer tokens than the warm start"] == "shown"
  assert found["No less accuracy than the warm start"] == "shown"
  assert next(v for c, v in found.items() if c.startswith("Cosine collapses")) == "shown"
  assert next(v for c, v in found.items() if c.startswith("`hbpo` beats")) == "shown"
  assert next(v for c, v in found.items() if "eight beat four" in c) == "open"
  worse = CELLS | cells_of(hbpo=([(0.70, 59.0), (0.69, 63.0), (0.70, 60.0)], (8.0, 1.0)))
  found = verdicts(worse)
  assert found["Fewer tokens than the warm start"] == "not shown"
  assert found["No less accuracy than the warm start"] == "not shown"
  assert next(v for c, v in found.items() if c.startswith("`hbpo` saves")) == "not shown"
  assert set(verdicts({"warm_start": CELLS["warm_start"]}).values()) == {"open"}


def test_the_write_up_is_made_from_the_cells(tmp_path):
  for method, of in CELLS.items():
    for seed, content in of.items():
      path = tmp_path / "cells" / method / f"seed_{seed}.json"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(json.dumps(content | {"kind": "warm_start" if method == "warm_start" else "method"}))
  tuned = tmp_path / "cells" / "tune" / "hbpo" / "0.0001.json"
  tuned.parent.mkdir(parents=True)
  tuned.write_text(json.dumps(cell("hbpo", 100, 0.5, 33.0, kind="tune")))
  extra = tmp_path / "cells" / "warm_start" / "seed_100.json"  # of the learning rates' choice
  extra.write_text(json.dumps(cell("warm_start", 100, 0.1, 99.0, kind="warm_start")))
  weak = tmp_path / "cells" / "warm_start" / "seed_7.json"  # that no method was trained from
  weak.write_text(json.dumps(cell("warm_start", 7, 0.2, 98.0, kind="warm_start")))
  written = writeup.write(tmp_path, "mini", tmp_path / "out")
  assert [p.name for p in written] == [
      "mini.json", "mini_pareto.png", "mini_difficulty.png", "mini_dynamics.png", "mini.md"]
  methods = {row["method"]: row for row in json.loads(written[0].read_text())["methods"]}
  assert set(methods) == set(CELLS)
  assert methods["warm_start"]["tokens"]["mean"] == pytest.approx(61.0)
  assert methods["warm_start"]["tokens"]["seeds"] == 3
  assert methods["hbpo"]["accuracy_hardest_third"]["mean"] == pytest.approx(0.8133, abs=1e-4)
  assert [part["level"] for part in methods["hbpo"]["tokens_by_level"]] == list(LEVELS)
  text = written[-1].read_text()
  assert "| hbpo | 91.3 (88.5 to 94.2) |" in text and "| hbpo | 0.0001 | 50.0 | 33.0 | yes |" in text
  assert "| hbpo | 90.0 / 80.0 / 19.0 | 92.0 / 82.0 / 20.0 | 92.0 / 82.0 / 19.0 |" in text
  assert "| 2 | comparison | 81.0 % / 62.0 |" in text and "| 7 | left out | 20.0 % / 98.0 |" in text
  assert "| 100 | learning rates | 10.0 % / 99.0 |" in text
  assert list(methods) == sorted(CELLS, key=lambda m: (m != "warm_start", m))  # No study.json gives another order.
  about = {"methods": [{"name": "paper", "title": "HBPO, paper", "overrides": {"profile": "paper"}},
                       {"name": "hbpo", "title": "ours", "overrides": {}}], "notes": "## Next\n\nA pod.\n"}
  (tmp_path / "study.json").write_text(json.dumps(about))
  found = outcome.read(tmp_path)
  assert list(found.cells) == ["warm_start", "paper", "hbpo", "classic", "cosine"]
  text = writeup.to_markdown(found, "mini")
  assert '| paper | HBPO, paper | profile="paper" |' in text and text.endswith("## Next\n\nA pod.\n")
  (tmp_path / "cells" / "hbpo" / "seed_0.json").write_text("{")
  with pytest.raises(ValueError, match=r"seed_0\.json is damaged"):
    writeup.write(tmp_path, "mini", tmp_path / "out")
  with pytest.raises(FileNotFoundError, match="holds no cell"):
    outcome.read(tmp_path / "nowhere")
