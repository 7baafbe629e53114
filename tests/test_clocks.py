"""Times of a run are those of clocks that do not go back."""

import itertools
import time

from hbpo_jax import clocks


def test_no_time_is_negative_where_the_date_goes_back(monkeypatch):
  dates = itertools.count(86400.0, -3600.0)
  monkeypatch.setattr(time, "time", lambda: next(dates))
  watch, wall_s = clocks.Stopwatch(), clocks.WallClock()
  wall_s.earlier_s = 5.0
  watch.lap("one")
  watch.lap("two")
  assert watch.laps.keys() == {"one", "two"} and min(watch.laps.values()) >= 0 and wall_s() >= 5.0
