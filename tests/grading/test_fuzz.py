"""Many hostile answers: none crashes, hangs, leaves a file or process, is evaluated, or called correct wrongly."""

import json
import os
import pathlib
import re
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from hbpo_jax.config import GradingConfig
from hbpo_jax.grading import Grader, equivalence, extraction, notation
from tests.grading import corpus, fuzzing

_CHUNK = 1000
_SEED = 20250722


@pytest.fixture
def empty(tmp_path, monkeypatch):
  """The working directory, the home and the place of temporary files of everything that runs; must stay empty."""
  monkeypatch.chdir(tmp_path)
  for name in ("HOME", "TMPDIR"):
    monkeypatch.setenv(name, str(tmp_path))
  return tmp_path


def _memory(pids):
  """Resident MiB of the largest of some processes; 0 while all of them are being replaced."""
  page = os.sysconf("SC_PAGE_SIZE")
  sizes = (int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * page / 2**20 for pid in pids)
  return max(sizes, default=0.0)


def _grade(grader, items):
  """Grades and returns (wrong ones, reasons); memory and open files of the processes are looked at on the way."""
  wrong, reasons, memory = [], [], []
  for first in range(0, len(items), _CHUNK):
    part = items[first:first + _CHUNK]
    verdicts = grader.grade_batch([i.response for i in part], [i.truth for i in part], thinking_opened=False)
    # A right answer that a busy machine does not get to in time is a timeout, of which the tests allow a few.
    wrong += [(i, v) for i, v in zip(part, verdicts, strict=True)
              if i.expected not in (None, v.correct) and not (i.expected and v.reason == "timeout")]
    reasons += [v.reason for v in verdicts]
    memory.append((_memory([os.getpid()]), _memory(grader.worker_pids())))
    files = [os.readlink(fd) for pid in grader.worker_pids() for fd in pathlib.Path(f"/proc/{pid}/fd").iterdir()]
    assert not [name for name in files if name.startswith("socket:")]
  return wrong, reasons, memory


def _check(items, empty, caplog, cpu_seconds=0.5):
  descriptors = len(os.listdir("/proc/self/fd"))
  with Grader(GradingConfig(workers=2, cpu_seconds=cpu_seconds)) as grader:
    wrong, reasons, memory = _grade(grader, items)
    pids = grader.worker_pids()
  assert not wrong, wrong[:5]
  # A worker ends at a limit only: an exception would say so here.
  assert "is replaced" not in caplog.text
  assert 0 < len(pids) <= 2 and not any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids)
  assert not list(empty.iterdir()) and len(os.listdir("/proc/self/fd")) == descriptors
  return reasons, memory


def test_two_thousand_items(empty, caplog):
  reasons, _ = _check(list(fuzzing.items(_SEED, 2000)), empty, caplog)
  assert reasons.count("timeout") < 10 and 400 < reasons.count("correct") < 1000


def test_the_whole_corpus(empty, caplog):
  items = [fuzzing.Item(rf"\boxed{{{answer}}}", corpus.TRUTHS[i % len(corpus.TRUTHS)], False, "corpus")
           for i, answer in enumerate(corpus.ALL)]
  reasons, _ = _check(items, empty, caplog, 0.2)
  assert len(items) > 300 and reasons.count("timeout") < 20


@pytest.mark.slow
def test_a_hundred_thousand_items(empty, caplog):
  items = list(fuzzing.items(_SEED + 1, 100_000))
  reasons, memory = _check(items, empty, caplog)
  assert reasons.count("timeout") < 300
  # Flat: SymPy's caches are full after some thousand items.
  (parent, worker), (parent_end, worker_end) = memory[len(memory) // 5], memory[-1]
  print(json.dumps({"timeouts": reasons.count("timeout"), "correct": reasons.count("correct"), "parent_mib": [
      parent, parent_end], "worker_mib": [worker, worker_end], "worker_most": max(w for _, w in memory)}))
  assert parent_end < parent + 50 and max(w for _, w in memory) < worker + 150


@pytest.mark.slow
def test_every_attack_on_every_truth(empty, caplog):
  _check([fuzzing.Item(rf"\boxed{{{answer}}}", truth, False, "corpus")
          for answer in corpus.ALL for truth in corpus.TRUTHS], empty, caplog)


# math-verify makes SymPy read numbers and symbols one by one, which evaluates them as Python: nothing but these.
_EVALUATED = re.compile(
    r"from sympy import \*|def monomial_\w+\(A.*|(?:Integer|Symbol|Float|Rational) ?\([ '\w.,+-]*\)|[A-Za-z]\w*",
    re.DOTALL)
_WATCH = """
import json, signal, sys
from hbpo_jax.grading import equivalence, extraction, worker
from tests.grading import corpus, fuzzing
for pair in worker._WARM_UP: equivalence.equal(*pair)
import sympy.physics.units.systems
items = [i for seed in (1, 2) for i in fuzzing.items(seed, 400)]
items += [fuzzing.Item("\\\\boxed{" + a + "}", t, None, "") for a in corpus.CODE for t in corpus.TRUTHS[:12]]
seen, other = set(), set()
def hook(event, args):
  if event == "compile" and args[0] is not None:
    seen.add(args[0].decode() if isinstance(args[0], bytes) else str(args[0]))
  elif event.startswith(("os.", "socket.", "subprocess.", "ctypes.")) and event not in ("os.listdir", "os.scandir"):
    other.add(event)
sys.addaudithook(hook)
class Late(BaseException): pass
def late(*_): raise Late
signal.signal(signal.SIGPROF, late)
for item in items:
  answer = extraction.last_box(item.response)
  try:
    signal.setitimer(signal.ITIMER_PROF, 0.3)
    equivalence.equal(answer or "", item.truth)
    signal.setitimer(signal.ITIMER_PROF, 0)
  except Late: pass
json.dump([sorted(seen), sorted(other)], sys.stdout)
"""


def test_no_answer_is_evaluated_as_code(repo_root, empty):
  done = subprocess.run([sys.executable, "-B", "-c", _WATCH], capture_output=True, text=True, check=True, timeout=300,
                        env=os.environ | {"PYTHONPATH": str(repo_root), "PYTHONHASHSEED": "0"})
  evaluated, other = json.loads(done.stdout)
  assert len(evaluated) > 20 and not [text for text in evaluated if not _EVALUATED.fullmatch(text.strip())]
  assert not other and not list(empty.iterdir())


# The parent reads every response itself, so these must take any text.

_PIECES = st.one_of(st.sampled_from([piece[:60] for piece in corpus.ALL]), st.sampled_from(
    [r"\boxed{", "{", "}", r"\{", "\\", "</think>", "<think>", r"\frac", r"\text{", "1", ",", " ", "x", "^", "_", "$",
     "."]),
                    st.characters(), st.characters(categories=["Cs", "Cc", "Cf", "Nd", "No", "Mn"]))
_TEXTS = st.lists(_PIECES, max_size=30).map("".join)


@settings(max_examples=400, deadline=None)
@given(_TEXTS, _TEXTS, st.booleans())
def test_the_parent_takes_any_text(text, truth, opened):
  visible = extraction.visible(text, thinking_opened=opened)
  answer = extraction.last_box(visible or "")
  assert answer is None or answer in text
  decided = equivalence.quick(answer or text, truth)
  assert decided in (True, False, None)
  cleaned = notation.clean(text)
  assert notation.depth(text) <= len(text) and isinstance(notation.tight(cleaned), str)


@settings(max_examples=200, deadline=None)
@given(_TEXTS.filter(lambda text: text.strip()))
def test_a_text_equals_itself_and_never_an_unheard_of_number(text):
  assert equivalence.quick(text, text) is True
  assert equivalence.quick(text, "86028121.86028121") is not True


@settings(max_examples=100, deadline=None)
@given(st.lists(_TEXTS, min_size=1, max_size=4), st.text("0123456789", min_size=1, max_size=9))
def test_the_last_complete_box_counts(parts, number):
  noise = "".join(parts).replace("boxed", "").replace("think", "")
  assert extraction.last_box(rf"\boxed{{7}} \boxed{{{number}}}") == number
  assert extraction.last_box(noise.replace("{", "").replace("}", "").replace("\\",
      "") + rf"\boxed{{{number}}}") == number
  assert extraction.last_box(rf"\boxed{{ \boxed{{{number}}} ") == number
  assert extraction.last_box(rf"\boxed{{{{{number}}}") is None


@pytest.mark.parametrize("text", [
    r"\boxed{" * 400_000, "{" * 3_000_000, "}" * 3_000_000, "\\" * 3_000_001, r"\boxed" + " " * 3_000_000,
    r"\boxed{x}" * 300_000,
    "<think>" * 400_000, "</think>" * 400_000, "\u202e" * 1_000_000, r"\boxed{" + "9" * 3_000_000 + "}"],
    ids=lambda text: f"{text[:8]!r}*{len(text)}")
def test_a_response_of_megabytes_takes_linear_time(text, repo_root):
  script = ("import resource, sys; from hbpo_jax.grading import equivalence, extraction; text = sys.stdin.read()\n"
            "resource.setrlimit(resource.RLIMIT_CPU, (20, 20))\n"
            "answer = extraction.last_box(extraction.visible(text, thinking_opened=False) or '')\n"
            "equivalence.quick(answer or '', '42')")
  # The kernel counts CPU time; n * n characters would take hours.
  subprocess.run([sys.executable, "-c", script], input=text.encode(), check=True,
                 env=os.environ | {"PYTHONPATH": str(repo_root), "PYTHONUTF8": "1"})


@pytest.mark.parametrize("answer", [
    "9" + r"\text{cm} " * 45 + "!", "9 " + "cm " * 120 + "!", "9" + r"\text{m}/ " * 50 + "!"])
def test_units_are_read_in_one_way(answer, repo_root):
  script = ("import resource, sys; from hbpo_jax.grading import units\n"
            "resource.setrlimit(resource.RLIMIT_CPU, (20, 20)); units.split(sys.argv[1])")
  subprocess.run([sys.executable, "-c", script, answer], check=True, env=os.environ | {"PYTHONPATH": str(repo_root)})


@pytest.mark.parametrize("answer, truth, correct", [
    (r"\{\{1\},2,3\}", r"\{1,2,3\}", False), (r"(\{1\},2)", "(1,2)", False), (r"\{5\}", "5", True),
    ("5", r"\{5\}", True),
    (r"1235+1", "1,236", True), ("1,236", "1235+1", True), (r"\frac{7452}{6} - 6", "1,237", False),
    ("1,2", "12", False),
    ("(" * 33 + "2-1" + ")" * 33, "1", False), ("(" * 8 + "2-1" + ")" * 8, "1", True),
])
def test_what_the_fuzz_found(answer, truth, correct):
  assert equivalence.equal(answer, truth) is correct
