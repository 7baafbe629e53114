"""What runs past a person's eyes: a live view on a terminal, plain lines anywhere else."""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import sys
import time
from typing import Any, TextIO

import rich.console
import rich.live
import rich.progress_bar
import rich.rule
import rich.table
import rich.text

from hbpo_jax.config import LogConfig
from hbpo_jax.reporting.alarms import Alarm
from hbpo_jax.reporting.tables import Table
from hbpo_jax.reporting.text import duration, plain

# Shown columns of the per-budget table: heading, tag, format.
_PANEL = (
    ("tokens", "tokens_mean", "{:,.1f}"),
    ("std", "tokens_std", "{:,.1f}"),
    ("accuracy", "accuracy", "{:.1%}"),
    ("reward", "reward", "{:.3f}"),
    ("overrun", "overrun", "{:.0%}"),
    ("truncated", "truncated", "{:.0%}"),
    ("A_intra", "intra", "{:+.3f}"),
    ("P(sentence)", "sentence_probability", "{:.2g}"),
)
_WINDOW = 20  # Steps whose mean duration predicts the time left.


class Console:
  """The view of a run; a context manager, made on the first process only.

  On a terminal with `log.live`: a progress bar with the time left, the step's numbers and a table per budget, below
  everything else that is printed. Otherwise one line per step.

  Args:
    log: settings of the logs.
    total_steps: steps of the whole run.
    start_step: first step of this attempt (above 0 after a resume).
    file: where to write; None means the standard output.
    clock: seconds, never going back.
  """

  def __init__(
      self, log: LogConfig, total_steps: int, start_step: int = 0, *, file: TextIO | None = None,
      clock: Callable[[], float] = time.monotonic):
    self._file = sys.stdout if file is None else file
    self._total = total_steps
    self._done = self._start = start_step
    self._clock = clock
    self._times: collections.deque[float] = collections.deque(maxlen=_WINDOW + 1)
    self._metrics: Mapping[str, Any] = {}
    self._alarms: tuple[Alarm, ...] = ()
    self._rich = rich.console.Console(file=self._file, markup=False, highlight=False, emoji=False)
    self._is_live = log.live and self._rich.is_terminal and not self._rich.is_dumb_terminal
    self._live: rich.live.Live | None = None

  def __enter__(self) -> "Console":
    self._times.append(self._clock())
    if self._is_live:
      self._live = rich.live.Live(get_renderable=self._view, console=self._rich, refresh_per_second=2)
      self._live.start()
    return self

  def __exit__(self, *exc: object) -> None:
    if self._live is not None:
      self._live.stop()
      self._live = None

  def header(self, lines: Iterable[str]) -> None:
    """Prints lines, such as the settings of the run, with a rule below."""
    lines = [plain(line) for line in lines]
    for line in lines:
      self._print(line)
    if self._is_live:
      self._rich.print(rich.rule.Rule(style="dim"))

  def step(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Shows a finished step.

    Args:
      step: the step, from 0.
      metrics: numbers by tag as `step_metrics` gives them, and `tokens_per_s`; a number that is missing shows as `-`.
    """
    self._done = step + 1
    self._times.append(self._clock())
    self._metrics = {**metrics}
    if self._live is not None:
      self._live.refresh()  # Else a message in the next half second would be printed over the step before.
    elif not self._is_live:
      self._print(self._line())

  def alarm(self, alarm: Alarm) -> None:
    """Prints an alarm above the view, in red on a terminal."""
    self._print(plain(f"! {alarm.kind} (step {alarm.step + 1}): {alarm.text}"), style="bold red")

  def set_alarms(self, active: Sequence[Alarm]) -> None:
    """The alarms that last: shown below the live view, named on each step's line, from the next `step` on."""
    self._alarms = tuple(active)

  def message(self, text: str) -> None:
    """Prints text above the view."""
    self._print(plain(text))

  def table(self, table: Table) -> None:
    """Prints a table above the view."""
    if self._is_live:
      self._rich.print(table.to_rich())
    else:
      self._print(table.to_text())

  def sample(self, row: Mapping[str, Any], limit: int = 400) -> None:
    """Prints a sample response, a row of `SampleLog.write`, cut to `limit` characters."""
    head = f"sample  budget {row['budget']}  {row['n_gen']} tokens  {row['verdict']}  reward {row['reward']:.3f}"
    body = f"{plain(str(row['problem']), limit)}\n=> {plain(str(row['response']), limit)}"
    self._print(plain(head) + "\n  " + body.replace("\n", "\n  "))

  @property
  def time_left_s(self) -> float | None:
    """Seconds to the end at the mean pace of the last steps; None before the first step is done.

    The first step of an attempt compiles, so it counts only while there is no other.
    """
    times = list(self._times)
    if len(times) < 2:
      return None
    if self._done - self._start == len(times) - 1 and len(times) > 2:
      times = times[1:]
    return (times[-1] - times[0]) / (len(times) - 1) * max(self._total - self._done, 0)

  def _print(self, text: str, style: str = "") -> None:
    if self._is_live:
      self._rich.print(rich.text.Text(text, style=style), soft_wrap=True)
      return
    # A log may be in an encoding that lacks a character of the text; that must not end the run.
    encoding = getattr(self._file, "encoding", None) or "utf-8"
    self._file.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    self._file.flush()

  def _left(self) -> str:
    left = self.time_left_s
    return "-" if left is None else duration(left)

  def _value(self, tag: str, form: str) -> str:
    return form.format(float(self._metrics[tag])) if tag in self._metrics else "-"

  def _budgets(self) -> list[str]:
    names = (tag.split("/")[0] for tag in self._metrics if tag.startswith("budget_"))
    return list(dict.fromkeys(names))

  def _ledger(self) -> list[rich.text.Text]:
    """Where the step's decoding went, as shares of its slot-steps, and its seconds; nothing without a ledger."""
    total = float(self._metrics.get("rollout/slot_steps", 0.0))
    if not total:
      return []
    text = rich.text.Text("  ")
    for name in ("useful", "truncated", "overrun", "idle"):
      text.append(f"{name} ", style="dim").append(f"{self._metrics[f'rollout/{name}'] / total:.0%}").append("   ")
    for stage in ("prefill", "decode", "host"):
      text.append(f"{stage} ", style="dim").append(self._value(f"time/rollout_{stage}_s", "{:.2f} s")).append("   ")
    return [text]

  def _line(self) -> str:
    parts = [
        f"step {self._done}/{self._total}",
        f"reward {self._value('reward', '{:.3f}')}",
        f"accuracy {self._value('accuracy', '{:.1%}')}",
        f"tokens {self._value('mean_tokens', '{:,.1f}')}",
        f"{self._value('tokens_per_s', '{:,.0f}')} tokens/s",
        f"slots {self._value('rollout/utilisation', '{:.0%}')}",
    ]
    if budgets := self._budgets():
      panels = (f"{b.removeprefix('budget_')}:{self._value(f'{b}/tokens_mean', '{:,.1f}')}" for b in budgets)
      parts.append("tokens by budget " + " ".join(panels))
    marks = [f"! {plain(alarm.kind)}" for alarm in self._alarms]
    return "  ".join([*parts, f"left {self._left()}", *marks])

  def _view(self) -> rich.console.Group:
    bar = rich.table.Table.grid(padding=(0, 1), expand=True)
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True)
    bar.add_row(
        f"step {self._done}/{self._total}",
        rich.progress_bar.ProgressBar(total=max(self._total, 1), completed=self._done),
        f"left {self._left()}")
    numbers = rich.text.Text("  ")
    for name, tag, form in (
        ("reward", "reward", "{:.3f}"), ("accuracy", "accuracy", "{:.1%}"), ("tokens", "mean_tokens", "{:,.1f}"),
        ("truncated", "truncated", "{:.1%}"), ("tokens/s", "tokens_per_s", "{:,.0f}")):
      numbers.append(f"{name} ", style="dim").append(self._value(tag, form), style="bold").append("   ")
    parts: list[Any] = [bar, numbers, *self._ledger()]
    if budgets := self._budgets():
      table = rich.table.Table(box=None, padding=(0, 1), header_style="dim")
      table.add_column("budget", justify="right")
      for heading, _, _ in _PANEL:
        table.add_column(heading, justify="right", no_wrap=True)
      for b in budgets:
        table.add_row(b.removeprefix("budget_"), *(self._value(f"{b}/{tag}", form) for _, tag, form in _PANEL))
      parts.append(table)
    for alarm in self._alarms:  # One line each; the whole sentence was printed when it was raised.
      line = plain(f"! {alarm.kind}, since step {alarm.step + 1}: {alarm.text}")
      parts.append(rich.text.Text(line, style="bold red", no_wrap=True, overflow="ellipsis"))
    return rich.console.Group(*parts)
