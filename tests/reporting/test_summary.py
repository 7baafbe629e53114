"""summary.json and summary.md: numbers, the run without evaluation, and refusals."""

import json

import pytest

from hbpo_jax import config
from hbpo_jax.reporting import plots, summary, tables

BASE = tables.evaluation_summary([1, 2], [1, 0], [100, 300], [0, 1])
TRAINED = tables.evaluation_summary([1, 2], [1, 1], [50, 110], [0, 0])
CONFIG = config.to_json_dict(config.Config(steps=7, profile="hbpo"))


def rows(n):
  return "".join(
      json.dumps({"step": s, "reward": 1.0, "accuracy": s / 100, "mean_tokens": 200.0 - s}) + "\n" for s in range(n))


def test_numbers(tmp_path):
  got = summary.write_summary(tmp_path, BASE, TRAINED, CONFIG, 3725.4, {"export": tmp_path / "export"})
  stored = json.loads((tmp_path / "summary.json").read_text())
  assert stored == got
  assert stored["base"]["accuracy"] == 0.5 and stored["base"]["mean_tokens"] == 200.0
  assert stored["base"]["by_level"] == [
      {"level": 1, "n": 1, "accuracy": 1.0, "tokens": 100.0}, {"level": 2, "n": 1, "accuracy": 0.0, "tokens": 300.0}]
  assert stored["trained"]["mean_tokens"] == 80.0 and stored["trained"]["accuracy"] == 1.0
  assert stored["tokens_change"] == pytest.approx(-0.6) and stored["accuracy_change"] == 0.5
  assert stored["wall_s"] == 3725.4 and stored["profile"] == "hbpo" and stored["steps"] == 7
  assert stored["measured_on"] == "evaluation" and stored["export"] == str(tmp_path / "export")
  assert {"python", "jax", "flax", "numpy"} <= set(stored["versions"])


def test_text(tmp_path):
  (tmp_path / "metrics.jsonl").write_text(rows(3))
  plots.write_plots(tmp_path, BASE, TRAINED)
  summary.write_summary(tmp_path, BASE, TRAINED, CONFIG, 3725.4)
  text = (tmp_path / "summary.md").read_text()
  assert "**Tokens per response fell by 60.0 % (200.0 to 80.0); accuracy rose from 50.0 % to 100.0 %.**" in text
  assert "| 2 | 1 | 0.0 % | 100.0 % | 300.0 | 110.0 | -63.3 % |" in text
  assert "](plots/difficulty.png)" in text and "](plots/training.png)" in text
  assert "length_by_budget" not in text  # No budget in these rows, so no such plot.
  assert "7 steps, profile `hbpo`, wall time 1:02:05" in text
  assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "plots", "summary.json", "summary.md"]


def test_without_evaluation_the_ends_of_training_stand_in_and_it_says_so(tmp_path):
  (tmp_path / "metrics.jsonl").write_text(rows(20))
  got = summary.write_summary(tmp_path, None, None, CONFIG, 1.0)
  assert got["measured_on"] == "training"
  assert got["base"] == {"accuracy": pytest.approx(0.015), "mean_tokens": 198.5, "by_level": []}  # Steps 0 to 3.
  assert got["trained"] == {"accuracy": pytest.approx(0.175), "mean_tokens": 182.5, "by_level": []}  # 16 to 19.
  text = (tmp_path / "summary.md").read_text()
  assert "There was no evaluation" in text and "steps 0 to 3 against steps 16 to 19" in text
  assert "| level |" not in text


def test_without_anything(tmp_path):
  got = summary.write_summary(tmp_path, None, None, CONFIG, 1.0)
  assert got["measured_on"] == "nothing" and got["base"] is None and got["tokens_change"] is None
  assert "Nothing was measured" in (tmp_path / "summary.md").read_text()


def test_one_row_and_null_rows(tmp_path):
  (tmp_path / "metrics.jsonl").write_text(rows(1) + '{"step": 1, "accuracy": null, "mean_tokens": 3}\n')
  got = summary.write_summary(tmp_path, None, None, CONFIG, 1.0)
  assert got["base"] == got["trained"] == {"accuracy": 0.0, "mean_tokens": 200.0, "by_level": []}
  assert "step 0 against step 0" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize("before, after, said", [
    ((0.5, 100.0), (0.5, 100.0), "Tokens per response stayed at 100.0; accuracy stayed at 50.0 %."),
    ((0.5, 100.0), (0.4, 2500.0),
     "Tokens per response rose by 2400.0 % (100.0 to 2,500); accuracy fell from 50.0 % to 40.0 %."),
    ((0.5, 0.0), (0.6, 10.0), "Tokens per response cannot be compared; accuracy rose from 50.0 % to 60.0 %."),
])
def test_headline(before, after, said):
  base, trained = ({"accuracy": a, "mean_tokens": t} for a, t in (before, after))
  assert summary.headline({
      "base": base, "trained": trained, "tokens_change": tables.change(before[1], after[1]),
      "accuracy_change": after[0] - before[0]}) == said


def test_refusals_write_nothing(tmp_path):
  other = tables.evaluation_summary([1], [1], [1], [0])
  for arguments in ((BASE, None, CONFIG, 1.0), (None, BASE, CONFIG, 1.0), (BASE, other, CONFIG, 1.0),
                    (BASE, TRAINED, CONFIG, 1.0, {"wall_s": 2})):
    with pytest.raises(ValueError):
      summary.write_summary(tmp_path, *arguments)
  assert list(tmp_path.iterdir()) == []
