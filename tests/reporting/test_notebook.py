"""What a notebook shows: a command's output and progress, tables, responses, and how a cell ends."""

import json
import pathlib
import threading
import time

import pytest

pytest.importorskip("IPython", reason="needs the extra test")

from hbpo_jax import jobs
from hbpo_jax.files import json_line
from hbpo_jax.reporting import notebook
from tests.reporting import runs_fixture

HOSTILE = "<script>alert(1)</script> $x$ & \x1b[2J"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "jobs"))


@pytest.fixture
def shown(monkeypatch):
  """The HTML of each display, the newest of one that is updated."""
  found = []

  class Handle:
    def display(self, html):
      self.i = len(found)
      found.append(html.data)

    def update(self, html):
      found[self.i] = html.data

  monkeypatch.setattr(notebook.display, "display", lambda html: found.append(html.data))
  monkeypatch.setattr(notebook.display, "DisplayHandle", Handle)
  return found


@pytest.fixture
def program(tmp_path, monkeypatch):
  """Makes shell code stand for Python, so that any command is what a test wants."""
  def make(code: str):
    path = tmp_path / "program"
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)
    monkeypatch.setattr(notebook.sys, "executable", str(path))

  return make


def row(step: int, **more) -> dict:
  return {"step": step, "reward": 1.5, "accuracy": 0.5, "mean_tokens": 30.0, "tokens_per_s": 1234.0,
          "time/step_s": 2.0, "budget_8/tokens_mean": 20.0, "budget_16/tokens_mean": 40.0} | more


def test_run_prints_what_the_command_prints(program, tmp_path, capsys):
  program('printf "%s\\n" "$@"; printf "\\033[2Jhalf a \\317"; sleep 0.3; printf "\\200\\n"; echo end >&2')
  notebook.run("plan", "--config=smoke", workdir=tmp_path / "it", poll_s=0.02)
  assert capsys.readouterr().out.splitlines() == [
      "-m", "hbpo_jax.plan", "--config=smoke", f"--workdir={tmp_path}/it", "\\x1b[2Jhalf a π", "end"]
  assert (tmp_path / "it" / "logs" / "plan.log").is_file()


def test_a_command_that_fails_ends_the_cell_with_its_last_line(program, tmp_path):
  program("echo working; echo 'error: config.steps=0 is wrong' >&2; echo; exit 2")
  with pytest.raises(notebook.CellError, match="plan ended with exit code 2: error: config.steps=0 is wrong") as caught:
    notebook.run("plan", workdir=tmp_path, poll_s=0.02)
  assert str(tmp_path / "logs" / "plan.log") in str(caught.value)
  assert caught.value._render_traceback_() == [str(caught.value)]


def test_a_command_that_is_stopped_ends_the_cell(program, tmp_path, capsys):
  program("echo started; exec sleep 600")
  def stop():
    until(lambda: "started" in (tmp_path / "logs" / "train.log").read_text())
    notebook.stop(tmp_path)
  thread = threading.Thread(target=stop)
  with pytest.raises(notebook.CellError, match="train was stopped. Run this cell again to continue it"):
    jobs.start(notebook_argv("train", tmp_path), tmp_path, "train")
    thread.start()
    notebook.run("train", workdir=tmp_path, poll_s=0.02)
  thread.join()
  assert f"train in {tmp_path} is stopped\n" in capsys.readouterr().out
  notebook.stop(tmp_path)
  assert f"train in {tmp_path} was not running\n" in capsys.readouterr().out


def test_an_interrupt_stops_the_view_and_not_the_command(program, tmp_path, monkeypatch):
  program("echo started; exec sleep 600")
  sleeps, sleep = [], time.sleep

  def interrupted(seconds):
    sleeps.append(seconds)
    if len(sleeps) == 1:
      raise KeyboardInterrupt
    sleep(seconds)

  monkeypatch.setattr(notebook.time, "sleep", interrupted)
  with pytest.raises(notebook.CellError, match="Only the view is stopped: hbpo_jax.train goes on"):
    notebook.run("train", workdir=tmp_path, poll_s=7.0)
  monkeypatch.undo()
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "jobs"))
  assert sleeps == [7.0]
  job = jobs.find(tmp_path, "train")
  assert job.is_running
  job.stop(grace_s=10)


def test_train_shows_steps_curves_and_the_end(program, tmp_path, shown):
  (tmp_path / "run.json").write_text(json.dumps({"config": {"steps": 10}}))
  rows = "".join(json_line(row(i)) for i in range(4))
  program(f"echo 'first line'; printf '%s' '{rows}' > {tmp_path}/metrics.jsonl; echo 'step 4/10'; "
          "echo '! clipping (step 3): too much'")
  notebook.train("--config=smoke", workdir=tmp_path, poll_s=0.02)
  assert len(shown) == 1
  for text in ("step 4 of 10", "about 0:00:12 left", "data:image/png;base64,", "tokens by budget 8: 20.0, 16: 40.0",
               "accuracy <b>50.0%</b>", "! clipping (step 3)", "first line"):
    assert text in shown[0], text


def test_a_run_that_was_asked_to_stop_ends_the_cell_though_it_ended_well(program, tmp_path, shown):
  program(f"echo '{{}}' > {tmp_path}/stopped.json")
  with pytest.raises(notebook.CellError, match="hbpo_jax.train was stopped. Run this cell again to continue it"):
    notebook.train("--config=smoke", workdir=tmp_path, poll_s=0.02)
  program(f"rm {tmp_path}/stopped.json")
  notebook.train("--config=smoke", workdir=tmp_path, poll_s=0.02)


def test_a_view_from_before_the_first_step(program, tmp_path, shown):
  program("echo compiling")
  notebook.train("--config=smoke", workdir=tmp_path, poll_s=0.02)
  assert "step 0" in shown[0] and "compiling" in shown[0] and "left" not in shown[0] and "<img" not in shown[0]


def test_the_time_left_is_of_the_last_steps_and_passes_over_one_that_compiles():
  rows = [row(i, **{"time/step_s": 100.0}) for i in range(30)] + [row(30 + i) for i in range(19)]
  rows.append(row(49, **{"time/step_s": 500.0}))
  assert "about 0:01:40 left" in notebook.progress(rows, 100, "", 5.0)
  assert "left" not in notebook.progress(rows, 50, "", 5.0)
  assert "step 50 &middot; 0:00:05 since the start" in notebook.progress(rows, None, "", 5.0)


def test_numbers_that_a_row_lacks_are_left_out():
  text = notebook.progress([{"step": 0, "reward": None}], 2, "", 0.0)
  assert "reward" not in text and "step 1 of 2" in text


def test_only_the_last_lines_and_the_alarms_are_shown():
  lines = ["! early alarm", *(f"line {i}" for i in range(50)), "bar 10%\rbar 90%\n\n"]
  text = notebook.progress([], 2, "\n".join(lines), 0.0)
  assert "! early alarm" in text
  assert "line 48" in text and "line 49" in text and "line 47" not in text and "bar 90%" in text


def test_nothing_that_is_shown_is_markup_or_mathematics(tmp_path, shown):
  text = notebook.progress([], 2, f"! {HOSTILE}\n{HOSTILE}", 0.0)
  runs_fixture.make_evaluation(tmp_path, texts=[HOSTILE] * 200, problem_texts=[HOSTILE] * 40, n_problems=4, k=1)
  notebook.show_samples(tmp_path, n=2)
  for html in (text, *shown):
    assert "<script" not in html and "$" not in html and "\x1b" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &#36;x&#36; &amp; \\x1b[2J" in html


def test_samples_are_spread_over_the_problems_and_stand_side_by_side(tmp_path, shown):
  runs_fixture.make_training_run(tmp_path, steps=2)
  notebook.show_samples(tmp_path, n=2)
  ids = [part.partition(",")[0] for part in shown[0].split("<p><b>")[1:]]
  assert ids == ["eval/10", "eval/30"]  # Of 40: the middles of both halves.
  assert shown[0].count("before: ") == shown[0].count("after: ") == 2 and shown[0].count("<td ") == 4
  notebook.show_samples(tmp_path, n=1000)
  assert shown[1].count("before: ") == 40


def test_results_are_the_tables_of_the_evaluation(tmp_path, shown):
  runs_fixture.make_evaluation(tmp_path, n_problems=6, k=1)
  notebook.show_results(tmp_path)
  text = "".join(shown)
  for name in ("MATH500", "GSM8K", "natural", "efficiency", "512"):
    assert name in text, name


@pytest.mark.parametrize("call", [notebook.show_summary, notebook.show_plots])
def test_a_run_that_has_not_ended_says_what_to_do(tmp_path, call):
  with pytest.raises(FileNotFoundError, match="has not ended. Run the cell that trains again"):
    call(tmp_path)


def test_a_summary_of_training_rows_has_no_table(tmp_path, shown):
  ends = {"accuracy": 0.5, "mean_tokens": 20.0, "by_level": []}
  (tmp_path / "summary.json").write_text(json.dumps({
      "base": ends, "trained": ends | {"mean_tokens": 10.0}, "measured_on": "training", "tokens_change": -0.5,
      "accuracy_change": 0.0}))
  notebook.show_summary(tmp_path)
  assert shown == ["<p><b>Tokens per response fell by 50.0 % (20.0 to 10.0); accuracy stayed at 50.0 %.</b></p>"]


def test_push_without_a_repository_only_says_where_the_model_is(tmp_path, capsys):
  notebook.push(tmp_path, "")
  assert capsys.readouterr().out == f"the trained model is in {tmp_path}/export; nothing is pushed\n"


@pytest.mark.parametrize("is_private", [True, False])
def test_push_is_the_command_export(program, tmp_path, capsys, is_private):
  program('echo "$@"')
  notebook.push(tmp_path, "me/it", is_private=is_private)
  assert capsys.readouterr().out == f"-m hbpo_jax.export {tmp_path}/export --push=me/it{' --private' * is_private}\n"


def notebook_argv(command: str, workdir: pathlib.Path) -> list[str]:
  return [notebook.sys.executable, "-m", f"hbpo_jax.{command}", f"--workdir={workdir}"]


def until(condition, limit_s: float = 60.0) -> None:
  deadline = time.monotonic() + limit_s
  while not condition():
    assert time.monotonic() < deadline, "it did not come"
    time.sleep(0.01)
