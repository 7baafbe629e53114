"""What a notebook's cells call: a command that is watched while it runs, and its tables, plots and responses inline.

A command runs as a process of its own (`hbpo_jax.jobs`), so that the notebook's kernel never holds the accelerator, and
a cell that is interrupted ends the view and not the run. The same cell again watches what runs, or continues what
stopped.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
import html
import json
import os
import pathlib
import statistics
import sys
import time
from typing import Any

from IPython import display

from hbpo_jax import jobs, preemption
from hbpo_jax.evaluation import output
from hbpo_jax.files import read_rows
from hbpo_jax.reporting import plots, runs, sample_view, summary, tables
from hbpo_jax.reporting.text import duration, plain
from hbpo_jax.reporting.writers import METRICS

# A kernel names its own plot backend, which other processes lack.
_ENVIRONMENT = {"MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}
_PACE = 20  # Steps whose median duration predicts the time left.
_LINES = 4  # Last lines of the log below the curves.
_NUMBERS = (  # Shown beside the bar: heading, tag, format.
    ("reward", "reward", "{:.3f}"), ("accuracy", "accuracy", "{:.1%}"), ("tokens", "mean_tokens", "{:,.1f}"),
    ("tokens/s", "tokens_per_s", "{:,.0f}"))


class CellError(RuntimeError):
  """Ends a cell, and with it "run all", with one sentence in place of a traceback."""

  def _render_traceback_(self) -> list[str]:  # IPython's hook.
    return [str(self)]


def run(command: str, *arguments: str, workdir: str | os.PathLike, poll_s: float = 0.5) -> None:
  """Runs `python -m hbpo_jax.COMMAND ARGUMENTS --workdir=WORKDIR` and prints what it prints.

  Args:
    command: such as plan, doctor, sft or evaluate.
    arguments: as on a command line, one text each.
    workdir: of the command; its output is kept in WORKDIR/logs/COMMAND.log.
    poll_s: seconds between two looks.
  Raises:
    CellError: when the command fails, or the cell is interrupted; then the command goes on.
    ValueError: when it runs already, with other arguments.
  """
  _print_output(_start(command, [*arguments, f"--workdir={workdir}"], workdir), poll_s)


def train(*arguments: str, workdir: str | os.PathLike, poll_s: float = 2.0) -> None:
  """Runs `python -m hbpo_jax.train ARGUMENTS --workdir=WORKDIR` and shows how far it is, its curves and its last lines.

  Where it runs already, only the view starts; where it stopped, it continues from its newest good checkpoint.

  Args:
    arguments: as on a command line, one text each.
    workdir: of the run; its output is kept in WORKDIR/logs/train.log.
    poll_s: seconds between two looks.
  Raises:
    CellError: when the run fails, or the cell is interrupted; then the run goes on.
    ValueError: when it runs already, with other arguments.
  """
  job = _start("train", [*arguments, f"--workdir={workdir}"], workdir)
  root = pathlib.Path(workdir)
  handle = display.DisplayHandle()
  handle.display(display.HTML("starting ..."))
  shown, drawn, picture = "", [], ""

  def show() -> None:
    nonlocal shown, drawn, picture
    rows = read_rows(root / METRICS) if (root / METRICS).is_file() else []
    if rows and rows != drawn:
      drawn, picture = rows, _image(plots.png(plots.training_figure(rows)), "reward, accuracy and tokens by step")
    view = progress(rows, _total_steps(root), job.output(), job.age_s) + picture
    if view != shown:
      shown = view
      handle.update(display.HTML(view))

  _watch(job, show, poll_s)
  if (root / preemption.STOPPED).is_file():  # Asked by someone else to stop, it saved its state and ended well.
    raise CellError(f"{job.argv[2]} was stopped. Run this cell again to continue it. Its output is in {job.log}.")


def stop(workdir: str | os.PathLike, command: str = "train", grace_s: float = 300.0) -> None:
  """Ends a command that an earlier cell started; the same cell as before continues it.

  Args:
    workdir: of the command.
    command: such as train.
    grace_s: seconds that it has to end its step and save; then it is killed.
  """
  job = jobs.find(workdir, command)
  was_running = job.is_running
  job.stop(grace_s)
  print(f"{command} in {workdir} {'is stopped' if was_running else 'was not running'}")


def push(workdir: str | os.PathLike, repository: str, *, is_private: bool = True) -> None:
  """Pushes a run's export, and its adapter if there is one, to the Hugging Face hub; with '' it only says where it is.

  Args:
    workdir: of a training run that has ended.
    repository: ORG/NAME; made if it does not exist. The environment holds HF_TOKEN.
    is_private: whether a repository that is made is hidden from others.
  Raises:
    CellError: when the hub refuses.
  """
  export = pathlib.Path(workdir) / "export"
  if not repository:
    print(f"the trained model is in {export}; nothing is pushed")
    return
  private = ["--private"] if is_private else []
  _print_output(_start("export", [str(export), f"--push={repository}", *private], workdir), 0.5)


def progress(rows: Sequence[Mapping[str, Any]], total: int | None, output: str, age_s: float) -> str:
  """HTML of a training run at this moment: bar, time left, numbers, tokens by budget, alarms and last lines.

  The time left is the median duration of the last steps times the steps to go, without evaluations.

  Args:
    rows: of metrics.jsonl, so far.
    total: steps of the whole run; None where they are not known yet.
    output: what this attempt has printed.
    age_s: seconds since this attempt started.
  """
  parts, done = [], rows[-1]["step"] + 1 if rows else 0
  times = [row["time/step_s"] for row in rows[-_PACE:] if row.get("time/step_s") is not None]
  head = [f"step {done:,} of {total:,}" if total else f"step {done:,}", f"{duration(age_s)} since the start"]
  if times and total and done < total:
    head.append(f"about {duration(statistics.median(times) * (total - done))} left")
  parts.append(
      f'<p><progress value="{done}" max="{total or 1}" style="width:24em"></progress> {" &middot; ".join(head)}</p>')
  if rows:
    last = rows[-1]
    numbers = [f"{name} <b>{form.format(last[tag])}</b>" for name, tag, form in _NUMBERS if last.get(tag) is not None]
    budgets = [(b, last.get(f"budget_{b}/tokens_mean")) for b in plots.logged_budgets(rows)]
    by_budget = ", ".join(f"{b:,}: {mean:,.1f}" for b, mean in budgets if mean is not None)
    parts.append(f"<p>{' &middot; '.join(numbers)}{f' &middot; tokens by budget {by_budget}' if by_budget else ''}</p>")
  lines = [line for line in output.replace("\r", "\n").splitlines() if line.strip()]
  parts += [f'<p style="color:#c00">{_text(line)}</p>' for line in lines if line.startswith("! ")]
  parts.append(f"<pre>{_text(chr(10).join(lines[-_LINES:]))}</pre>")
  return "".join(parts)


def show_summary(workdir: str | os.PathLike) -> None:
  """Shows what training changed: one sentence, and the table by difficulty where there were evaluations."""
  path = pathlib.Path(workdir) / "summary.json"
  if not path.is_file():
    raise FileNotFoundError(f"{path} is missing: the run has not ended. Run the cell that trains again.")
  content = json.loads(path.read_text(encoding="utf-8"))
  shown = f"<p><b>{_text(summary.headline(content))}</b></p>"
  if content["measured_on"] == "evaluation":
    shown += _table(tables.before_after(content["base"], content["trained"]))
  display.display(display.HTML(shown))


def show_plots(workdir: str | os.PathLike) -> None:
  """Shows the figures that a run has drawn, those of WORKDIR/plots."""
  found = sorted((pathlib.Path(workdir) / "plots").glob("*.png"))
  if not found:
    raise FileNotFoundError(f"{workdir}/plots holds no figure: the run has not ended. Run the cell that trains again.")
  for path in found:
    display.display(display.HTML(_image(path.read_bytes(), path.stem)))


def show_samples(workdir: str | os.PathLike, n: int = 3) -> None:
  """Shows responses to the same problems before and after training side by side.

  Args:
    workdir: of a training run, or of an evaluation.
    n: problems, evenly spaced over those that were evaluated.
  """
  found = sample_view.collect([runs.read(workdir, "run", alone=True)], most=10**9)
  if found is None:
    raise FileNotFoundError(f"{workdir} holds no response yet. Run the cell that trains again.")
  n = min(n, len(found.entries))
  entries = [found.entries[(2 * i + 1) * len(found.entries) // (2 * n)] for i in range(n)]
  display.display(display.HTML("".join(_sample(entry, found.columns) for entry in entries)))


def show_results(workdir: str | os.PathLike) -> None:
  """Shows the tables of an evaluation, one made by `evaluate`."""
  for assessed in runs.read(workdir, "evaluation", alone=True).main:
    for table in output.tables(assessed.evaluated, assessed.results, patterns=False):
      display.display(display.HTML(f"<p><b>{_text(table.title)}</b></p>{_table(table)}"))


def show_report(workdir: str | os.PathLike, height: int = 800) -> None:
  """Makes WORKDIR/report and shows its page, which is one file, in a frame.

  Args:
    workdir: of a training run, or of an evaluation.
    height: of the frame, pixels.
  Raises:
    CellError: when the report cannot be made.
  """
  out = pathlib.Path(workdir) / "report"
  _print_output(_start("report", [str(workdir), f"--out={out}"], workdir), 0.5)
  page = html.escape((out / "index.html").read_text(encoding="utf-8"))
  display.display(display.HTML(
      f'<iframe srcdoc="{page}" sandbox="allow-scripts" style="width:100%;height:{height}px;border:0"></iframe>'))


def _start(command: str, arguments: Sequence[str], workdir: str | os.PathLike) -> jobs.Job:
  return jobs.start([sys.executable, "-m", f"hbpo_jax.{command}", *arguments], workdir, command, _ENVIRONMENT)


def _print_output(job: jobs.Job, poll_s: float) -> None:
  printed = 0

  def show() -> None:
    nonlocal printed
    is_over = not job.is_running  # Asked first: what it wrote before it ended is all there.
    text = job.output()
    end = len(text) if is_over else text.rfind("\n") + 1  # A line that is being written may change.
    print(plain(text[printed:end].replace("\r", "\n")), end="", flush=True)
    printed = max(end, printed)

  _watch(job, show, poll_s)


def _watch(job: jobs.Job, show: Callable[[], None], poll_s: float) -> None:
  """Calls `show` until the job is over, and once more; raises CellError where it did not end well."""
  name = job.argv[2]
  try:
    while job.is_running:
      show()
      time.sleep(poll_s)
    show()
  except KeyboardInterrupt:
    raise CellError(
        f"Only the view is stopped: {name} goes on. Run this cell again to watch it; notebook.stop ends it.") from None
  if job.exit_code is None:
    raise CellError(f"{name} was stopped. Run this cell again to continue it. Its output is in {job.log}.")
  if job.exit_code:
    last = ([line for line in job.output().splitlines() if line.strip()] or ["no output"])[-1]
    raise CellError(f"{name} ended with exit code {job.exit_code}: {plain(last)}\nIts output is in {job.log}.")


def _total_steps(root: pathlib.Path) -> int | None:
  path = root / "run.json"
  return json.loads(path.read_text(encoding="utf-8"))["config"]["steps"] if path.is_file() else None


def _sample(entry: Mapping[str, Any], columns: Sequence[str]) -> str:
  level = "" if entry["level"] is None else f", level {entry['level']}"
  heads, bodies = "", ""
  for name, response in zip(columns, entry["responses"]):
    if response is not None:
      heads += f"<th>{_text(name)}: {response['tokens']} tokens, {_text(response['verdict'])}</th>"
      bodies += (
          '<td style="vertical-align:top;text-align:left"><pre style="white-space:pre-wrap;max-height:24em;'
          f'overflow:auto">{_text(response["text"])}</pre></td>')
  return (
      f"<p><b>{_text(entry['id'])}{_text(level)}</b>: {_text(entry['problem'])} "
      f"(answer: {_text(entry['answer'])})</p><table style=\"width:100%;table-layout:fixed\"><tr>{heads}</tr>"
      f"<tr>{bodies}</tr></table>")


def _table(table: tables.Table) -> str:
  def line(cells: Sequence[str], tag: str) -> str:
    aligned = ["left"] + ["right"] * (len(cells) - 1)
    return "<tr>" + "".join(
        f'<{tag} style="text-align:{side}">{_text(cell)}</{tag}>' for cell, side in zip(cells, aligned)) + "</tr>"

  return f"<table>{line(table.columns, 'th')}{''.join(line(row, 'td') for row in table.rows)}</table>"


def _image(data: bytes, alt: str) -> str:
  text = base64.b64encode(data).decode("ascii")
  return f'<img src="data:image/png;base64,{text}" alt="{_text(alt)}" style="max-width:100%">'


def _text(value: Any) -> str:
  """Text as it is, in HTML: neither markup nor mathematics, which notebooks find between dollar signs."""
  return html.escape(plain(str(value))).replace("$", "&#36;")
