"""Wall time of a run and of the stages of its steps."""

import time


class Stopwatch:
  """Wall seconds between laps, by name."""

  def __init__(self):
    self.laps: dict[str, float] = {}
    self._last = time.perf_counter()

  def lap(self, name: str) -> None:
    """Ends the stage `name`."""
    now = time.perf_counter()
    self.laps[name], self._last = now - self._last, now


class WallClock:
  """Seconds that the run took so far, earlier attempts included."""

  def __init__(self):
    self.earlier_s, self._start = 0.0, time.monotonic()

  def __call__(self) -> float:
    return self.earlier_s + time.monotonic() - self._start
