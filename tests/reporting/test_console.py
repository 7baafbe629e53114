"""The plain log, the live view, and text that must not steer the terminal."""

import io
import re

import pytest

from hbpo_jax.config import LogConfig
from hbpo_jax.reporting import console, tables, text
from hbpo_jax.reporting.alarms import Alarm

METRICS = {
    "reward": 3.1239, "accuracy": 0.8125, "mean_tokens": 312.46, "tokens_per_s": 1234.5, "truncated": 0.1,
    "budget_512/tokens_mean": 300.04, "budget_512/accuracy": 0.75, "budget_1024/tokens_mean": 1400.0,
    "rollout/utilisation": 0.9, "rollout/slot_steps": 1000.0, "rollout/useful": 850.0, "rollout/truncated": 50.0,
    "rollout/overrun": 30.0, "rollout/idle": 70.0, "time/rollout_prefill_s": 0.5, "time/rollout_decode_s": 12.25,
    "time/rollout_host_s": 0.125, "budget_1024/intra": -0.5, "budget_1024/sentence_probability": 1.5e-9,
}
HOSTILE = "a\x1b[2J\x1b]0;title\x07[bold red]b[/] [/nothing] \u202ec\x9bd\rz\ud800 \u2028:smile:"

ALARM = Alarm(
    "clipping", 9, 0.5, 0.3, "50% of the tokens are clipped (mean of 10 rows), more than 30%; lower the learning rate.")


class Terminal(io.StringIO):
  encoding = "utf-8"

  def isatty(self):
    return True


class Clock:

  def __init__(self, *times):
    self._times = list(times)

  def __call__(self):
    return self._times.pop(0)


@pytest.fixture
def terminal(monkeypatch):
  """An xterm of 100 columns."""
  for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "100"), ("LINES", "40")):
    monkeypatch.setenv(name, value)
  for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    monkeypatch.delenv(name, raising=False)
  return Terminal()


def test_one_plain_line_per_step():
  out = io.StringIO()
  with console.Console(LogConfig(), 200, 10, file=out, clock=Clock(0, 60, 62)) as view:
    view.step(10, METRICS)
    view.step(11, {"reward": 1.0})
  assert out.getvalue().splitlines() == [
      "step 11/200  reward 3.124  accuracy 81.2%  tokens 312.5  1,234 tokens/s  slots 90%  tokens by budget 512:300.0 "
      "1024:1,400.0  left 3:09:00",
      "step 12/200  reward 1.000  accuracy -  tokens -  - tokens/s  slots -  left 0:06:16",  # 188 steps of 2 s.
  ]


def test_time_left_uses_the_last_steps_and_not_the_first():
  view = console.Console(LogConfig(), 100, file=io.StringIO(), clock=Clock(0, 100, 101, 102, *range(200, 300)))
  with view:
    assert view.time_left_s is None
    view.step(0, {})
    assert view.time_left_s == 9900
    view.step(1, {})
    assert view.time_left_s == 98
    view.step(2, {})
    assert view.time_left_s == 97
    for step in range(3, 30):
      view.step(step, {})
    assert view.time_left_s == 70  # The pause between 102 and 200 has left the window.


@pytest.mark.parametrize("live", [True, False])
def test_no_escape_sequence_of_the_model_reaches_the_terminal(terminal, live):
  plain_file = io.StringIO()
  out = terminal if live else plain_file
  with console.Console(LogConfig(), 2, file=out) as view:
    view.header([HOSTILE])
    view.message(HOSTILE)
    view.sample({"problem": HOSTILE, "response": HOSTILE, "budget": 16, "n_gen": 3, "verdict": HOSTILE, "reward": 1.0})
    view.table(tables.Table(HOSTILE, ("a", "b"), (("[red]x[/]", "1"), ("all", "2"))))
  shown = out.getvalue()
  for bad in ("\x1b[2J", "\x1b]0;", "\x07", "\u202e", "\x9b", "\ud800", "\u2028"):
    assert bad not in shown
  assert "\\x1b[2J" in shown and "[bold red]b[/] [/nothing] \\u202ec" in shown and "[red]x[/]" in shown
  assert ":smile:" in shown
  if not live:
    assert "\x1b" not in shown and "\r" not in shown


def test_plain_keeps_ordinary_text_and_cuts_long_text():
  assert text.plain("été\n\t∑ 思考 😀") == "été\n\t∑ 思考 😀"
  assert text.plain("abcdef", 4) == "abcd [... 2 more characters]"


def test_a_log_in_a_narrow_encoding_does_not_end_the_run():
  out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
  console.Console(LogConfig(), 1, file=out).message("π")
  assert out.buffer.getvalue() == b"\\u03c0\n"


def test_live_view_shows_the_numbers(terminal):
  with console.Console(LogConfig(), 200, file=terminal, clock=Clock(0, 60)) as view:
    view.step(0, METRICS)
    view.message("between")
  view_text = terminal.getvalue()
  for number in ("step 1/200", "left 3:19:00", "3.124", "81.2%", "312.5", "1,234", "1,400.0", "-0.500", "1.5e-09"):
    assert number in view_text, number
  plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", view_text)
  assert "useful 85%   truncated 5%   overrun 3%   idle 7%   prefill 0.50 s   decode 12.25 s   host 0.12 s" in plain
  assert "between" in view_text
  assert view_text.count("\x1b[?25l") == view_text.count("\x1b[?25h") == 1  # The cursor is hidden, then back.


def test_the_cursor_is_back_after_an_error(terminal):
  with pytest.raises(RuntimeError), console.Console(LogConfig(), 2, file=terminal):
    raise RuntimeError
  assert "\x1b[?25h" in terminal.getvalue()


def test_live_can_be_turned_off(terminal):
  with console.Console(LogConfig(live=False), 2, file=terminal) as view:
    view.step(0, METRICS)
  assert "\x1b" not in terminal.getvalue() and terminal.getvalue().startswith("step 1/2  reward 3.124")


def test_alarms_are_lines_and_marks_without_a_terminal():
  out = io.StringIO()
  with console.Console(LogConfig(), 200, 9, file=out, clock=Clock(0, 1, 2, 3)) as view:
    view.alarm(ALARM)
    view.set_alarms([ALARM, Alarm("no_signal", 9, 1.0, 0.9, "")])
    view.step(9, {})
    view.set_alarms([ALARM])
    view.step(10, {})
    view.set_alarms([])
    view.step(11, {})
  first, *lines = out.getvalue().splitlines()
  assert first == "! clipping (step 10): " + ALARM.text
  assert [line.partition("left ")[2].partition("  ")[2] for line in lines] == [
      "! clipping  ! no_signal", "! clipping", ""]


def test_active_alarms_are_red_below_the_live_view(terminal):
  with console.Console(LogConfig(), 200, file=terminal, clock=Clock(0, 60, 61, 62)) as view:
    view.step(9, METRICS)
    assert "clipping" not in terminal.getvalue()
    view.set_alarms([ALARM])
    view.step(10, METRICS)
    raised = terminal.getvalue()
    view.set_alarms([])
    view.step(11, METRICS)
    after = terminal.getvalue()[len(raised):]
  marked = [line for line in re.split(r"\r?\n", raised) if "clipping" in line]
  assert len(marked) == 1 and "\x1b[1;31m! clipping, since step 10: 50% of the tokens" in marked[0]
  assert "…" in marked[0]  # One line, however long the sentence is.
  assert raised.rindex("clipping") > raised.rindex("1024")  # Below the table of budgets.
  assert "clipping" not in after


def test_an_alarm_cannot_steer_the_terminal(terminal):
  hostile = Alarm(HOSTILE, 0, 1.0, 0.0, HOSTILE)
  out = io.StringIO()
  for file in (terminal, out):
    with console.Console(LogConfig(), 2, file=file) as view:
      view.alarm(hostile)
      view.set_alarms([hostile])
      view.step(0, {})
    for bad in ("\x1b[2J", "\x1b]0;", "\x07", "\u202e", "\x9b", "\ud800"):
      assert bad not in file.getvalue()
    assert "\\x1b[2J" in file.getvalue() and "[bold red]b[/]" in file.getvalue()
