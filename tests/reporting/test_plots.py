"""What the figures draw, read back from their axes, and that the PNG files are real."""

import json

from matplotlib.colors import to_rgba
import numpy as np
import pytest

from hbpo_jax.reporting import plots, tables

ROWS = [
    {"step": s, "reward": 1.0 + s, "accuracy": 0.5 + 0.1 * s, "mean_tokens": 50.0 - s,
     "budget_32/tokens_mean": 30.0 - s, "budget_32/tokens_std": 2.0 * s,
     "budget_128/tokens_mean": 90.0 + s, "budget_128/tokens_std": None if s == 1 else 5.0}
    for s in range(4)]
BASE = tables.evaluation_summary([1, 2, 3], [1, 1, 0], [100, 200, 300], [0, 0, 0])
TRAINED = tables.evaluation_summary([1, 2, 3], [1, 1, 1], [30, 90, 150], [0, 0, 0])


def line(ax, label):
  found = [item for item in ax.lines if item.get_label() == label]
  assert len(found) == 1, label
  return np.asarray(found[0].get_xdata(), float), np.asarray(found[0].get_ydata(), float)


def test_length_by_budget():
  fig = plots.length_by_budget_figure(ROWS, window=1)
  assert [ax.get_title() for ax in fig.axes] == ["budget 32", "budget 128"]
  small, large = fig.axes
  np.testing.assert_allclose(line(small, "mean"), [[0, 1, 2, 3], [30, 29, 28, 27]])
  np.testing.assert_allclose(line(large, "mean")[1], [90, 91, 92, 93])
  assert set(line(small, "budget")[1]) == {32} and set(line(large, "budget")[1]) == {128}
  band = small.collections[0].get_paths()[0].vertices
  top, bottom = (choose(band[band[:, 0] == 3][:, 1]) for choose in (max, min))
  assert (top, bottom) == (33, 21)
  other = [item for item in small.lines if item.get_label().startswith("_")]
  np.testing.assert_allclose(other[0].get_ydata(), [90, 91, 92, 93])
  assert small.get_ylim() == large.get_ylim() and small.get_ylim()[0] == 0 and small.get_ylim()[1] > 128
  assert small.get_ylabel() == "response length (tokens)" and small.get_xlabel() == "training step"


def test_running_mean_is_centred_and_leaves_gaps():
  smooth = plots.smooth(np.array([1.0, 2.0, np.nan, 4.0, 9.0]), 3)
  np.testing.assert_allclose(smooth, [1.5, 1.5, np.nan, 6.5, 6.5])
  assert plots.centred_window(ROWS, None) == 1
  assert plots.centred_window(ROWS * 50, None) == 5 and plots.centred_window(ROWS, 4) == 5


@pytest.mark.parametrize("n", [1, 2, 4, 6, 8])
def test_one_panel_per_budget_and_labels_under_the_lowest(n):
  budgets = [100 * (i + 1) for i in range(n)]
  rows = [{"step": 0} | {f"budget_{b}/tokens_{k}": 10.0 for b in budgets for k in ("mean", "std")}]
  fig = plots.length_by_budget_figure(rows)
  visible = [ax for ax in fig.axes if ax.get_visible()]
  assert [ax.get_title() for ax in visible] == [f"budget {b:,}" for b in budgets]
  assert sum(bool(ax.get_xlabel()) for ax in visible) == min(n, 4 if n <= 4 else n // 2)


def test_difficulty():
  fig = plots.difficulty_figure(BASE, TRAINED)
  tokens, accuracy = fig.axes
  np.testing.assert_allclose(line(tokens, "before")[1], [100, 200, 300])
  np.testing.assert_allclose(line(tokens, "after")[1], [30, 90, 150])
  np.testing.assert_allclose(line(accuracy, "before")[1], [100, 100, 0])
  np.testing.assert_allclose(line(accuracy, "after")[1], [100, 100, 100])
  assert tokens.get_title() == "Tokens: 200.0 → 90.0 (-55.0 %)"
  assert [label.get_text() for label in tokens.get_xticklabels()] == ["1", "2", "3"]
  assert tokens.get_ylabel() == "response length (tokens)" and accuracy.get_ylabel() == "accuracy (%)"
  with pytest.raises(ValueError, match="levels"):
    plots.difficulty_figure(BASE, tables.evaluation_summary([1, 2], [1, 1], [1, 1], [0, 0]))


def test_difficulty_without_levels_keeps_the_points_apart():
  result = tables.evaluation_summary(None, [1], [10], [0])
  tokens = plots.difficulty_figure(result, result).axes[0]
  assert line(tokens, "before")[0] < line(tokens, "after")[0]
  assert [label.get_text() for label in tokens.get_xticklabels()] == ["all"]


def test_training():
  fig = plots.training_figure(ROWS, window=3)
  reward, accuracy, tokens = fig.axes
  np.testing.assert_allclose(line(reward, "step")[1], [1, 2, 3, 4])
  np.testing.assert_allclose(line(reward, "mean")[1], [1.5, 2, 3, 3.5])
  np.testing.assert_allclose(line(accuracy, "step")[1], [50, 60, 70, 80])
  np.testing.assert_allclose(line(tokens, "step")[1], [50, 49, 48, 47])
  assert "3 rows" in fig.get_suptitle()


def test_reward_curves():
  n = np.arange(1, 11)
  fig = plots.reward_curves_figure(n, np.stack([10.0 - n, 12.0 - n]), (3, 6))
  ax = fig.axes[0]
  np.testing.assert_allclose(line(ax, "6"), [n, 12.0 - n])
  dots = [(item.get_xdata()[0], item.get_ydata()[0]) for item in ax.lines if item.get_marker() == "o"]
  assert dots == [(3, 7.0), (6, 6.0)]
  with pytest.raises(ValueError, match="reward_GN"):
    plots.reward_curves_figure(n, np.zeros((1, 10)), (3, 6))


def test_budget_colours_differ_and_are_dark_enough_to_read():
  colours = np.array([to_rgba(c)[:3] for c in plots.ordered_colors(8)])
  luminance = colours @ [0.2126, 0.7152, 0.0722]
  assert (np.diff(luminance) > 0.01).all() and luminance.max() < 0.75


def test_write_plots(tmp_path):
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
  written = plots.write_plots(tmp_path, BASE, TRAINED)
  assert [path.relative_to(tmp_path).as_posix() for path in written] == [
      "plots/length_by_budget.png", "plots/difficulty.png", "plots/training.png"]
  for path in written:
    data = path.read_bytes()
    width, height = (int.from_bytes(data[at:at + 4], "big") for at in (16, 20))
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and 600 <= width <= 3000 and 300 <= height <= 2000
    assert 10_000 < len(data) < 500_000
  before = written[0].read_bytes()
  plots.write_plots(tmp_path, None, None)
  assert written[0].read_bytes() == before


def test_only_what_there_is_data_for(tmp_path):
  assert plots.write_plots(tmp_path, None, None) == []
  (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 1.0}\n')
  assert [path.stem for path in plots.write_plots(tmp_path, None, None)] == ["training"]
  with pytest.raises(ValueError, match="budget"):
    plots.length_by_budget_figure([])
  with pytest.raises(ValueError, match="row"):
    plots.training_figure([])
