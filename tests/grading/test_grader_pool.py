"""The pool: what decides a verdict, what a worker may do, and what is left when it ends."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from hbpo_jax.config import GradingConfig
from hbpo_jax.grading import Grader, Verdict, grade
from hbpo_jax.grading import pool as pool_module

# Needs a worker (no exact text or number), and is right.
HARD, TRUTH = r"so \boxed{\sqrt{12}}", r"2\sqrt{3}"
# SymPy works on this integral for many seconds.
ENDLESS = r"\boxed{\int_0^1 \frac{\sin x}{x^5+e^x} dx}"


def _gone(pids, within_s=20.0):
  deadline = time.monotonic() + within_s
  while time.monotonic() < deadline:
    if not any(_alive(p) for p in pids):
      return True
    time.sleep(0.05)
  return False


def _alive(pid):
  stat = pathlib.Path(f"/proc/{pid}/stat")
  try:
    return stat.read_text().rpartition(")")[2].split()[0] != "Z"
  except (FileNotFoundError, ProcessLookupError):
    return False


@pytest.fixture
def grader():
  with Grader(GradingConfig(workers=1, cpu_seconds=0.4)) as g:
    yield g


def test_reasons_and_finished():
  responses = [r"a</think>\boxed{5}", r"a</think>\boxed{6}", "a</think>5", r"a \boxed{5}", r"a</think>\boxed{}"]
  verdicts = grade(responses, ["5"] * 5, thinking_opened=True)
  assert [v.reason for v in verdicts] == ["correct", "wrong", "no_answer", "unfinished", "no_answer"]
  assert [v.score for v in verdicts] == [1.0, 0.0, 0.0, 0.0, 0.0]
  assert [v.finished for v in verdicts] == [True, True, False, False, False]
  assert [v.answer for v in verdicts] == ["5", "6", "", "", ""]
  # The same text, where the prompt did not open the thinking.
  assert grade([r"a \boxed{5}"], ["5"], thinking_opened=False)[0] == Verdict(1.0, "correct", "5")


def test_any_accepted_answer_counts(grader):
  answers = [["7", TRUTH], ("7", "8"), ["x", "3.46"]]
  assert [v.correct for v in grader.grade_batch([HARD] * 3, answers, thinking_opened=False)] == [True, False, False]


def test_easy_items_start_no_process(grader):
  grader.grade_batch([r"\boxed{5}", r"\boxed{1/2}", "x"], ["5", "0.25", "5"], thinking_opened=False)
  assert grader.worker_pids() == []


def test_submit_and_collect_in_parts(grader):
  grader.submit("a", HARD, TRUTH, thinking_opened=False)
  grader.submit(("b", 1), r"\boxed{5}", "5", thinking_opened=False)
  with pytest.raises(ValueError, match="'a' was submitted already"):
    grader.submit("a", HARD, TRUTH, thinking_opened=False)
  assert list(grader.collect()) == ["a", ("b", 1)]
  assert grader.collect() == {}
  grader.submit("a", HARD, "7", thinking_opened=False)
  assert not grader.collect()["a"].correct


def test_text_that_is_no_unicode_survives_the_pipe(grader):
  responses = ["\\boxed{\\text{a\ud800\x00}}", "\\boxed{\\sqrt{x}\x00}", "\\boxed{\\sqrt{4}}"]
  verdicts = grader.grade_batch(responses, ["\\text{a\ud800\x00}", "5", "\ud800\x00 z"], thinking_opened=False)
  assert [v.reason for v in verdicts] == ["correct", "wrong", "wrong"]


def test_cpu_time_ends_an_item(grader):
  verdicts = grader.grade_batch([ENDLESS, HARD], ["42", TRUTH], thinking_opened=False)
  assert [v.reason for v in verdicts] == ["timeout", "correct"]
  assert verdicts[0].finished and not verdicts[0].correct


def test_wall_time_does_not(grader):
  grader.grade_batch([HARD], ["1"], thinking_opened=False)
  pid, = grader.worker_pids()
  os.kill(pid, signal.SIGSTOP)
  grader.submit(0, HARD, TRUTH, thinking_opened=False)
  time.sleep(3 * 0.4)
  os.kill(pid, signal.SIGCONT)
  assert grader.collect()[0].reason == "correct"
  assert grader.worker_pids() == [pid]


def test_a_sleeping_worker_is_replaced():
  with Grader(GradingConfig(workers=1), wall_seconds=2.0) as grader:
    grader.grade_batch([HARD], ["1"], thinking_opened=False)
    pid, = grader.worker_pids()
    os.kill(pid, signal.SIGSTOP)
    assert grader.grade_batch([HARD], [TRUTH], thinking_opened=False)[0].correct
    assert grader.worker_pids() != [pid] and not _alive(pid)


def test_a_killed_worker_is_replaced(grader):
  grader.grade_batch([HARD], ["1"], thinking_opened=False)
  pid, = grader.worker_pids()
  os.kill(pid, signal.SIGSTOP)
  grader.submit(0, HARD, TRUTH, thinking_opened=False)
  os.kill(pid, signal.SIGKILL)
  assert grader.collect()[0].reason == "correct"
  assert grader.worker_pids() not in ([], [pid])


def test_verdicts_do_not_depend_on_order_or_company():
  items = [(rf"\boxed{{\sqrt{{{n * n * m}}}}}", rf"{n}\sqrt{{{m}}}") for n in range(2, 6) for m in (2, 3, 5)]
  items += [(r"\boxed{x^2-1}", "(x+1)(x-1)"), (r"\boxed{x^2+1}", "(x+1)(x-1)"), (r"\boxed{\sin^2 x}", r"1-\cos^2 x")]
  with Grader(GradingConfig(workers=2)) as grader:
    straight = grader.grade_batch(*zip(*items, strict=True), thinking_opened=False)
    order = list(range(len(items)))
    random.Random(0).shuffle(order)
    mixed = grader.grade_batch(*zip(*(items[i] for i in order), strict=True), thinking_opened=False)
    # SymPy's order of work follows the order of sets, so their hashes are fixed.
    environment = pathlib.Path(f"/proc/{grader.worker_pids()[0]}/environ").read_bytes()
  assert [mixed[order.index(i)] for i in range(len(items))] == straight
  assert b"PYTHONHASHSEED=0" in environment.split(b"\0")
  assert sum(v.correct for v in straight) == len(items) - 1


def test_close_ends_all_processes_even_busy_ones():
  with Grader(GradingConfig(workers=2, cpu_seconds=30.0)) as grader:
    for key in range(2):
      grader.submit(key, ENDLESS.replace("^5", f"^{key + 5}"), "42", thinking_opened=False)
    deadline = time.monotonic() + 60
    while len(grader.worker_pids()) < 2 and time.monotonic() < deadline:
      time.sleep(0.05)
    pids = grader.worker_pids()
  assert len(pids) == 2 and _gone(pids, within_s=1.0)
  with pytest.raises(RuntimeError, match="the grader is closed"):
    grader.grade_batch([HARD], [TRUTH], thinking_opened=False)


def test_workers_end_with_a_parent_that_is_killed(repo_root, tmp_path):
  script = f"""
import os, signal
from hbpo_jax.grading import Grader
grader = Grader()
assert grader.grade_batch([{HARD!r}], [{TRUTH!r}], thinking_opened=False)[0].correct
print(*grader.worker_pids(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
  # Without the guard against a main module: a worker must not run this script again.
  path = tmp_path / "parent.py"
  path.write_text(script)
  done = subprocess.run(
      [sys.executable, str(path)], cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=120, check=False,
      env=os.environ | {"PYTHONPATH": str(repo_root)})
  assert done.returncode == -signal.SIGKILL
  pids = [int(p) for p in done.stdout.split()]
  assert pids and _gone(pids)


def _in_worker(body, repo_root, tmp_path):
  """Runs `body` as a worker would be after it has restricted itself."""
  script = f"from hbpo_jax.grading import worker\nworker._restrict(1024)\n{body}"
  return subprocess.run([sys.executable, "-B", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False,
                        env=os.environ | {"PYTHONPATH": str(repo_root)})


@pytest.mark.parametrize("body", [
    "open('canary', 'w')", "import os; os.system('touch canary')", "import os; os.mkdir('canary')",
    "import subprocess; subprocess.run(['touch', 'canary'])", "import socket; socket.socket()", "import os; os.fork()",
])
def test_a_worker_may_not_write_start_or_connect(repo_root, tmp_path, body):
  done = _in_worker(body, repo_root, tmp_path)
  assert "PermissionError: a grading worker may not do" in done.stderr
  assert not list(tmp_path.iterdir())


def test_a_worker_may_not_fill_the_memory(repo_root, tmp_path):
  assert "MemoryError" in _in_worker("bytearray(2 << 30)", repo_root, tmp_path).stderr


def test_workers_and_parent_do_not_import_jax(repo_root):
  script = (
      "import sys, hbpo_jax.grading.worker, hbpo_jax.grading.symbolic; "
      "assert not {'jax', 'flax', 'numpy'} & set(sys.modules)")
  subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": str(repo_root)})


def test_a_worker_that_cannot_start_is_an_error(monkeypatch):
  monkeypatch.setattr(pool_module, "_BOOTSTRAP", "raise SystemExit(3)")
  with Grader(GradingConfig(workers=1)) as grader:
    with pytest.raises(RuntimeError, match="ended at its start with status 3"):
      grader.grade_batch([HARD], [TRUTH], thinking_opened=False)


@pytest.mark.parametrize(("cfg", "message"), [
    (GradingConfig(workers=-1), "grading.workers=-1"),
    (GradingConfig(cpu_seconds=0.0), "grading.cpu_seconds=0.0"),
    (GradingConfig(memory_mib=8), "grading.memory_mib=8"),
])
def test_bad_limits_are_refused(cfg, message):
  with pytest.raises(ValueError, match=message):
    Grader(cfg)


def test_bad_items_are_refused(grader):
  with pytest.raises(ValueError, match="2 responses but 1 answers"):
    grader.grade_batch(["a", "b"], ["a"], thinking_opened=False)
  with pytest.raises(ValueError, match="lists of texts"):
    grader.grade_batch("a", "a", thinking_opened=False)
  with pytest.raises(ValueError, match="answer=5 of item 0"):
    grader.grade_batch(["a"], [5], thinking_opened=False)
  with pytest.raises(ValueError, match=r"answer=\[\] of item 0"):
    grader.grade_batch(["a"], [[]], thinking_opened=False)
