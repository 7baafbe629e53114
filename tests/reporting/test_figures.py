"""The report's figures, read back from their axes, and the numbers behind them."""

import math

import numpy as np
import pytest

from hbpo_jax.reporting import dynamics, figures, plots
from hbpo_jax.reporting.figures import Curve, Point
from tests.reporting import runs_fixture

POINTS = [
    Point("a", "natural", 1000.0, 0.8, (900.0, 1100.0), (0.7, 0.9)), Point("a", "efficiency", 500.0, 0.6),
    Point("b", "natural", 600.0, 0.5), Point("b", "512", 400.0, 0.4), Point("b", "1024", 800.0, 0.8)]
PATTERNS = {"think_share": 0.75, "reflection_inside_all": 4.0, "reflection_outside_all": 1.0}


def rows(steps: int = 60) -> list[dict]:
  draw = np.random.default_rng(0)
  return [runs_fixture.metrics_row(draw, step, steps) for step in range(steps)]


def line(ax, label):
  found = [item for item in ax.lines if item.get_label() == label]
  assert len(found) == 1, label
  return np.asarray(found[0].get_xdata(), float), np.asarray(found[0].get_ydata(), float)


def panel(fig, title):
  return next(ax for ax in fig.axes if ax.get_title() == title)


def test_front_leaves_out_what_another_point_beats():
  assert [p.tokens for p in figures.pareto_front(POINTS)] == [400.0, 500.0, 800.0]
  equal = [Point("a", "natural", 10.0, 0.5), Point("b", "natural", 10.0, 0.7), Point("c", "natural", 20.0, 0.7)]
  assert [p.run for p in figures.pareto_front(equal)] == ["b"]


def test_area_under_the_front_by_hand():
  # 400..500 at .4, 500..800 at .6, 800..1000 at .8, nothing below 400.
  assert figures.front_area(POINTS) == pytest.approx((100 * 0.4 + 300 * 0.6 + 200 * 0.8) / 1000)
  assert figures.front_area(POINTS, 2000.0) == pytest.approx((100 * 0.4 + 300 * 0.6 + 1200 * 0.8) / 2000)
  assert figures.front_area(POINTS, 450.0) == pytest.approx(50 * 0.4 / 450)
  cheaper = [*POINTS, Point("c", "natural", 100.0, 0.4)]
  assert figures.front_area(cheaper) > figures.front_area(POINTS)
  with pytest.raises(ValueError, match="at least one"):
    figures.front_area([])
  with pytest.raises(ValueError, match="most_tokens"):
    figures.front_area(POINTS, 0.0)


def test_front_figure():
  fig = figures.pareto_figure(POINTS)
  ax = fig.axes[0]
  x, y = line(ax, "front")
  np.testing.assert_allclose(x, [400, 500, 800, 1000])
  np.testing.assert_allclose(y, [40, 60, 80, 80])
  marks = {(float(item.get_xdata()[0]), float(item.get_ydata()[0])) for item in ax.lines if len(item.get_xdata()) == 1}
  assert marks == {(p.tokens, 100 * p.accuracy) for p in POINTS}
  assert {"512", "1,024"} <= {t.get_text() for t in ax.texts} and ax.get_xlim()[0] == 0
  labels = [t.get_text() for t in fig.legends[0].get_texts()]
  assert labels == ["a", "b", "natural", "efficiency", "fixed budget (number)", "front"]
  with pytest.raises(ValueError, match="points"):
    figures.pareto_figure([])


def test_difficulty_figure_keeps_the_order_of_groups():
  levels = [Curve("a", ("1", "2", "10"), (1.0, math.nan, 3.0), 0.5), Curve("b", ("1", "2", "10"), (2.0, 2.0, 2.0))]
  fig = figures.difficulty_figure(levels, [Curve("a", ("80–100 %", "0–20 %"), (5.0, 9.0), -0.25)])
  by_level, by_rate = fig.axes
  np.testing.assert_allclose(line(by_level, "a")[1], [1, math.nan, 3])
  assert [t.get_text() for t in by_level.get_xticklabels()] == ["1", "2", "10"]
  assert [t.get_text() for t in by_rate.get_xticklabels()] == ["80–100 %", "0–20 %"]
  assert [t.get_text() for t in by_level.texts] == ["ρ = +0.50", "ρ: n/a"]
  assert [t.get_text() for t in by_rate.texts] == ["ρ = -0.25"]
  assert by_level.get_ylim()[0] == 0
  assert len(figures.difficulty_figure([], levels).axes) == 1
  with pytest.raises(ValueError, match="no curve"):
    figures.difficulty_figure([], [])


def test_patterns_figures():
  thinking, words = figures.patterns_figure([("a", PATTERNS), ("b", PATTERNS | {"think_share": 0.5})]).axes
  assert [bar.get_width() for bar in thinking.patches] == [75.0, 50.0]
  assert [bar.get_width() for bar in words.patches] == [4.0, 4.0, 1.0, 1.0]
  assert [bar.get_x() for bar in words.patches][2:] == [4.0, 4.0]
  by_level = [{"level": 1, "think_share": 0.5, "reflection_inside_all": 2.0},
              {"level": 2, "think_share": 0.25, "reflection_inside_all": 6.0}]
  share, inside = figures.patterns_by_level_figure([("a", by_level)]).axes
  np.testing.assert_allclose(line(share, "a")[1], [50, 25])
  np.testing.assert_allclose(line(inside, "a")[1], [2, 6])
  for draw in (figures.patterns_figure, figures.patterns_by_level_figure):
    with pytest.raises(ValueError, match="rows"):
      draw([])


@pytest.mark.parametrize("lengths", [[1], [3, 7], [999.0, 1000.0], [0.0], [10, 4096], range(33000)])
def test_length_bins_hold_every_length(lengths):
  edges = figures.length_bins(list(lengths))
  assert edges[0] == 0 and edges[-1] > max(lengths) and 2 <= len(edges) <= 26
  assert np.allclose(np.diff(edges), edges[1]) and float(edges[1]).is_integer()
  assert figures.shares(list(lengths), edges).sum() == pytest.approx(1.0)


def test_heatmap_marks_the_budget_and_numbers_the_shares():
  edges = np.array([0.0, 100.0, 200.0])
  fig = figures.budget_heatmap([("a", 50, np.array([0.996, 0.004])), ("a", 150, np.array([0.25, 0.75]))], edges)
  ax = fig.axes[0]
  np.testing.assert_allclose(ax.collections[0].get_array(), [[99.6, 0.4], [25, 75]])
  assert [t.get_text() for t in ax.texts] == ["100", "25", "75"]
  assert [(item.get_xdata()[0], *item.get_ydata()[[0, -1]]) for item in ax.lines] == [(50, 0, 1), (150, 1, 2)]
  assert [t.get_text() for t in ax.get_yticklabels()] == ["50", "150"] and ax.yaxis_inverted()
  several = figures.budget_heatmap([("a", 50, np.ones(2) / 2), ("b", 50, np.ones(2) / 2)], edges).axes[0]
  assert [t.get_text() for t in several.get_yticklabels()] == ["a, 50", "b, 50"]
  with pytest.raises(ValueError, match="edges"):
    figures.budget_heatmap([("a", 50, np.ones(3))], edges)


def test_course_has_a_panel_for_what_was_logged():
  fig = dynamics.course_figure(rows(), {0: (0.5, 2000.0), 60: (0.75, 900.0)}, window=1)
  titles = [ax.get_title() for ax in fig.axes if ax.get_visible()]
  assert titles == [
      "mean reward", "accuracy (%)", "response length (tokens)", "A_intra, mean by budget", "A_inter, mean by budget",
      "|A_inter|, mean by budget", "entropy (nats per sampled token)", "spread of lengths within a query (tokens)",
      "clipped tokens (%)"]
  np.testing.assert_allclose(line(panel(fig, "accuracy (%)"), "evaluation"), [[0, 60], [50, 75]])
  np.testing.assert_allclose(line(panel(fig, "response length (tokens)"), "evaluation")[1], [2000, 900])
  intra = panel(fig, "A_intra, mean by budget")
  np.testing.assert_allclose(line(intra, "1,024")[1], [row["budget_1024/intra"] for row in rows()])
  assert panel(fig, "response length (tokens)").get_ylim()[0] == 0
  clip = panel(fig, "clipped tokens (%)")
  assert {item.get_label() for item in clip.lines} == {"low", "high"}  # dual is 0 throughout
  np.testing.assert_allclose(line(clip, "low")[1], [100 * row["update/clip_fraction_low"] for row in rows()])


def test_course_of_little_and_of_nothing():
  fig = dynamics.course_figure([{"step": 3, "reward": 1.0, "accuracy": None}], {})
  assert [ax.get_title() for ax in fig.axes if ax.get_visible()] == ["mean reward"]
  assert panel(fig, "mean reward").lines[0].get_marker() == "o"
  with pytest.raises(ValueError, match="no row"):
    dynamics.course_figure([], {})


def test_compared_runs():
  fig = dynamics.compared_figure([("a", rows()), ("b", [{"step": 0, "reward": 1.0}])], window=1)
  assert [ax.get_title() for ax in fig.axes] == [
      "mean reward", "accuracy (%)", "response length (tokens)", "entropy (nats per token)"]
  np.testing.assert_allclose(line(fig.axes[0], "a")[1], [row["reward"] for row in rows()])
  with pytest.raises(ValueError, match="runs"):
    dynamics.compared_figure([])


def test_waste_is_stacked_shares_and_seconds():
  fig = dynamics.waste_figure(rows())
  slots, seconds = panel(fig, "slot-steps (%)"), panel(fig, "seconds per step")
  tops = [area.get_paths()[0].vertices[:, 1].max() for area in slots.collections]
  assert tops == sorted(tops) and tops[-1] == pytest.approx(100) and slots.get_ylim() == (0, 100)
  assert [area.get_label() for area in slots.collections] == ["useful", "truncated", "overrun", "idle"]
  total = [row["time/step_s"] for row in rows()]
  assert seconds.collections[-1].get_paths()[0].vertices[:, 1].max() == pytest.approx(max(total))
  assert seconds.get_ylim()[1] >= max(total) and not seconds.texts


def test_a_first_step_that_compiles_does_not_flatten_the_rest():
  slow = rows(10)
  slow[0] = slow[0] | {"time/update_s": 900.0}
  ax = panel(dynamics.waste_figure(slow), "seconds per step")
  assert ax.get_ylim()[1] < 100 and "off the scale" in ax.texts[0].get_text() and "step 0" in ax.texts[0].get_text()


def test_waste_without_a_ledger_or_times():
  assert [ax.get_title() for ax in dynamics.waste_figure([{"step": 0, "rollout/slot_steps": 4.0, "rollout/useful": 4.0}]
                                                         ).axes] == ["slot-steps (%)"]
  with pytest.raises(ValueError, match="rollout/slot_steps"):
    dynamics.waste_figure([{"step": 0}])


def test_the_same_data_give_the_same_bytes():
  assert plots.png(figures.pareto_figure(POINTS)) == plots.png(figures.pareto_figure(POINTS))
  assert plots.png(dynamics.course_figure(rows(), {})) == plots.png(dynamics.course_figure(rows(), {}))


def test_names_are_never_read_as_mathematics():
  names = ("cost $1_{ and $", "b" * 99)
  plots.png(figures.pareto_figure([Point(name, "natural", 5.0, 0.5) for name in names]))
  assert len(figures.short("b" * 99)) == 34
