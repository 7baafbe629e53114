r"""What keeps the promises of docs/reliability.md, and the tests that fail without it.

  python -m tests.guards               # all
  python -m tests.guards bucket grad   # those whose row or test contains one of these texts

takes one guard after the other out of a copy of the repository, runs its test there, and prints a line for each:
`caught` if the test failed, and passes again with the guard in its place; `survived` if it passed without; `error` if
it did not run to its end, or fails with the guard, too. Exit code 0 means that all are caught. All of them take an hour
or more on two busy cores, most of it for whole runs.
"""

from collections.abc import Sequence
import dataclasses
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from xml.etree import ElementTree

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "hbpo_jax"
LIMIT_S = 600.0  # Of one test.

_FAULTS, _BUCKETS = "tests/system/test_faults.py", "tests/system/test_bucket.py"
_FIVE = f"{_FAULTS}::test_five_random_kills_and_a_stop_in_a_row_end_bit_identical"
_CUT_OFF = "tests/test_bucket.py::test_a_pass_that_is_cut_off_anywhere_leaves_a_state_to_go_on_from"
_FUZZ, _HOSTILE_WORKER = "tests/grading/test_fuzz.py", "tests/grading/test_hostile_worker.py"
_HOSTILE_FILES = "tests/test_hostile_files.py"


@dataclasses.dataclass(frozen=True)
class Guard:
  """A piece of code without which a promise would be broken.

  row: how the first column of its row begins.  file: within the package.  guard: text that stands once in the file.
  without: what stands there when the guard is gone.  test: pytest's node id of what fails then.
  """
  row: str
  file: str
  guard: str
  without: str
  test: str


GUARDS = (
    # ---- runs ----
    Guard(
        "SIGKILL at random, five", "train.py",
        '  batches.set_state(meta["data_state"])\n',
        "", _FIVE),
    Guard(
        "SIGKILL at random, five", "files.py",
        "      break  # The writer was killed in the middle of this line.\n",
        "      pass\n",
        "tests/test_files.py::test_resume_drops_later_rows_and_the_cut_off_line"),
    Guard(
        "SIGKILL at random, fifty", "learning/checkpoint.py",
        "cleanup_tmp_directories=True", "cleanup_tmp_directories=False",
        "tests/learning/test_checkpoint.py::test_what_a_killed_save_left_is_removed"),
    Guard(
        "SIGKILL at random, fifty", "files.py",
        '      atomic_write_bytes(self._path, b"".join(line for line, _ in kept))\n',
        '      if dropped:\n        atomic_write_bytes(self._path, b"".join(line for line, _ in kept))\n',
        "tests/test_files.py::test_cut_off_line_goes_even_when_every_row_stays"),
    Guard(
        "SIGKILL in rollouts", "keeping.py",
        "    self.log.flush()  # A saved step is a logged step: a resumed run leaves no gap.\n",
        "", f"{_FAULTS}::test_killed_at[checkpoint_done:3]"),
    Guard(
        "SIGKILL in rollouts", "files.py",
        """    with naming(path), open(aside, "wb") as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
    os.replace(aside, path)
""",
        """    with naming(path), open(path, "wb") as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
""",
        "tests/test_files.py::test_failed_atomic_write_keeps_the_old_file"),
    Guard(
        "SIGTERM during rollouts", "train.py",
        "              step, state, data_state, generated and generated.rollouts,",
        "              step, state, self.batches.get_state(), generated and generated.rollouts,", _FIVE),
    Guard(
        "SIGTERM during rollouts", "keeping.py",
        "    self._save(step, state, meta())\n    self.checkpoints.wait()\n    raise preemption.Stopped(",
        "    raise preemption.Stopped(",
        "tests/test_keeping.py::test_a_stop_saves_the_state_with_the_position_of_the_data"),
    Guard(
        "SIGTERM elsewhere", "preemption.py",
        "  if _Request.by:\n    return  # Supervisors repeat themselves.\n",
        "", "tests/test_preemption.py::test_a_signal_stops_at_the_next_safe_point_and_nowhere_else[signals3]"),
    Guard(
        "SIGTERM elsewhere", "preemption.py",
        "  if _Request.by and number == signal.SIGINT:",
        "  if False:", "tests/test_preemption.py::test_a_second_interrupt_ends_at_once"),
    Guard(
        "SIGTERM elsewhere", "train.py",
        '    generated = self._from_shelf(start, meta["ahead"]) if meta.get("ahead") else None\n',
        "    generated = None\n", f"{_FAULTS}::test_rollouts_ahead_survive_a_stop[rollout:1:0]"),
    Guard(
        "SIGTERM to one of two", "preemption.py",
        "bool(_Request.by) if alone else distributed.reached_preemption(_Request.n_checks)",
        "bool(_Request.by)",
        "tests/test_preemption.py::test_one_of_several_processes_stops_where_all_do"),
    Guard(
        "a peer process dies", "distributed.py",
        "there is no sign of {missing} at",
        "there is no sign of a process at",
        "tests/test_distributed.py::test_a_missing_process_is_named_with_its_host"),
    Guard(
        "a peer process dies", "distributed.py",
        "    if not (lost := _lost()):\n", "    if not (lost := ''):\n",
        "tests/test_distributed.py::test_where_devices_fail_the_process_that_died_is_named"),
    Guard(
        "a full or read-only disk", "files.py",
        """    if error.errno is not None and error.filename is None:
      error.filename = os.fspath(path)
""",
        "", "tests/test_files.py::test_trouble_with_the_disk_names_file_and_remedy"),
    Guard(
        "a full or read-only disk", "learning/checkpoint.py",
        "      raise OSError(int(found[1]), os.strerror(int(found[1])), str(self.directory)) from error\n",
        "      raise\n",
        "tests/learning/test_checkpoint.py::test_a_full_disk_is_an_error_of_the_disk_wherever_it_is_met"),
    Guard(
        "between two starts", "train.py",
        """  return {"data.source": data.digest} | (""", "  return {} | (",
        "tests/system/test_train.py::test_a_changed_setting_is_refused_on_resume"),
    Guard(
        "between two starts", "run_info.py",
        "    differs = [n for n in self.contents if n in there and there[n] != self.contents[n]]\n",
        "    differs = []\n", "tests/test_run_info.py::test_other_contents_under_the_same_setting_are_refused"),
    Guard(
        "the newest checkpoint is cut short", "learning/checkpoint.py",
        """      if found[name] != expected[name]:
        raise DamagedCheckpointError(f"{name} does not match its checksum")
""",
        "",
        "tests/learning/test_checkpoint.py::test_a_damaged_checkpoint_is_passed_over_and_can_be_saved_again"
        "[flip_one_bit_of_the_data_position]"),
    Guard(
        "the newest checkpoint is cut short", "learning/checkpoint.py",
        "    self._set_aside_incomplete()\n",
        "", "tests/learning/test_checkpoint.py::test_the_good_one_outlives_a_new_save_beside_a_damaged_one"),
    Guard(
        "a checkpoint lies about itself", "learning/checkpoint.py",
        "    if wrong := sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name)):",
        "    if wrong := []:",
        "tests/learning/test_checkpoint.py::test_a_checkpoint_that_lies_about_itself_is_passed_over"),
    Guard(
        "a checkpoint lies about itself", "learning/checkpoint.py",
        """    if content.get("step") != step:
      raise DamagedCheckpointError(f"its content is of step {content.get('step')!r}")
""",
        "", "tests/learning/test_checkpoint.py::test_a_checkpoint_that_lies_about_itself_is_passed_over"),
    Guard(
        "a grading worker is killed, hangs", "grading/pool.py",
        "  for _ in range(_ATTEMPTS):", "  for _ in range(1):",
        "tests/grading/test_grader_pool.py::test_a_killed_worker_is_replaced"),
    Guard(
        "`--workdir=gs://...`", "keeping.py",
        "      bucket.settle()  # The checkpoint before this one, too, is where it outlasts the machine.\n", "",
        "tests/test_keeping.py::test_a_checkpoint_waits_until_the_bucket_has_the_one_before_it"),
    Guard(
        "`--workdir=gs://...`", "bucket/mirror.py",
        " or (not self._is_failing and self._has_new_checkpoint())", "",
        "tests/test_bucket.py::test_the_background_uploads_a_new_checkpoint_by_itself"),
    Guard(
        "`--workdir=gs://...`", "bucket/mirror.py",
        "is None or unit in marked)}", "is None or True)}", f"{_BUCKETS}::test_killed_at[bucket_unit:6-3]"),
    Guard(
        "the same, an upload cut off", "bucket/mirror.py",
        "    try:\n      self._all(put, changed)\n",
        "    self._mark(unit, files)\n    try:\n      self._all(put, changed)\n", _CUT_OFF),
    Guard(
        "the same, an upload cut off", "bucket/mirror.py",
        "        for unit in sorted(units, key=_turn):", """        self._remove_gone()
        for unit in sorted(units, key=_turn):""", _CUT_OFF),
    Guard(
        "the same, an upload cut off", "bucket/mirror.py",
        """        for unit in sorted(units, key=_turn):
          self._send_unit(unit, units[unit])
        for name, (key, content) in late.items():
          self._send(name, key, content)
""",
        """        for name, (key, content) in late.items():
          self._send(name, key, content)
        for unit in sorted(units, key=_turn):
          self._send_unit(unit, units[unit])
""", _CUT_OFF),
    Guard(
        "the same, SIGTERM", "bucket/workdir.py",
        "    else:\n      mirror.end(thread)\n",
        "", f"{_BUCKETS}::test_a_stop_has_uploaded_its_checkpoint_when_the_command_ends"),
    Guard(
        "the same, SIGTERM", "bucket/mirror.py",
        "  return {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGHUP)}",
        "  return {}", "tests/test_bucket.py::test_sigterm_does_not_cut_off_the_last_upload"),
    Guard(
        "a checkpoint in the bucket has lost", "bucket/mirror.py",
        "found[name].size == size", "True", "tests/test_bucket.py::test_a_torn_checkpoint_is_none[a file is cut]"),
    Guard(
        "a checkpoint in the bucket has lost", "bucket/mirror.py",
        "is None or unit in marked)}", "is None or True)}",
        "tests/test_bucket.py::test_a_torn_checkpoint_is_none[no marker]"),
    Guard(
        "requests to the bucket fail", "bucket/objects.py",
        "    for wait_s in WAITS_S:", "    for wait_s in ():",
        "tests/test_bucket.py::test_an_upload_that_fails_three_times_is_tried_again"),
    Guard(
        "requests to the bucket fail", "bucket/mirror.py",
        "          self._note(unsent=True)\n", "          pass\n",
        "tests/test_bucket.py::test_uploads_that_fail_for_good_lose_nothing"),
    Guard(
        "no such bucket, no permission", "bucket/mirror.py",
        "for _ in range(2):", "for _ in range(1):",
        "tests/test_bucket.py::test_a_bucket_whose_objects_cannot_be_replaced"),
    Guard(
        "no such bucket, no permission", "bucket/mirror.py",
        '    if owner.get("session") != self._session:', "    if False:",
        "tests/test_bucket.py::test_a_second_start_takes_over"),
    Guard(
        "no such bucket, no permission", "bucket/mirror.py",
        '    if _json(self._local(_SESSION)).get("session") != self._session:', "    if False:",
        "tests/test_bucket.py::test_a_local_directory_that_was_removed_does_not_empty_the_bucket"),
    Guard(
        "no such bucket, no permission", "bucket/objects.py",
        """  if isinstance(error, FileNotFoundError) or code == "404":
    return "there is no such bucket", "create it, or mend the name", True
""",
        "", "tests/test_bucket_commands.py::test_gcs_refusals_are_one_line"),
    Guard(
        "TensorBoard or W&B", "reporting/writers.py",
        "        self._file.flush()\n    except OSError as e:\n",
        "        self._file.flush()\n    except EOFError as e:\n",
        "tests/reporting/test_writers.py::test_tensorboard_lost_disk_never_stops_the_run"),
    Guard(
        "TensorBoard or W&B", "reporting/writers.py",
        "    self._failures = (errors.Error, OSError)\n", "    self._failures = (errors.Error,)\n",
        "tests/reporting/test_writers.py::test_wandb_lost_connection_never_stops_the_run"),
    Guard(
        "the clock jumps", "clocks.py",
        """    self._last = time.perf_counter()

  def lap(self, name: str) -> None:
    \"\"\"Ends the stage `name`.\"\"\"
    now = time.perf_counter()
""",
        """    self._last = time.time()

  def lap(self, name: str) -> None:
    now = time.time()
""", "tests/test_clocks.py::test_no_time_is_negative_where_the_date_goes_back"),
    Guard(
        "an evaluation or a warm start", "evaluation/store.py",
        "        self._files[name].flush()\n", "",
        f"{_FAULTS}::test_an_evaluation_that_is_stopped_keeps_every_response"),
    Guard(
        "an evaluation or a warm start", "evaluation/store.py",
        "    if cut:\n      atomic_write_bytes(path, path.read_bytes()[:-cut])\n", "",
        "tests/evaluation/test_store.py::test_a_line_cut_in_half_is_dropped_and_said"),
    Guard(
        "an evaluation or a warm start", "sft.py",
        '  return restored[0], restored[1]["updates"]\n', "  return learner.new_state(params), 0\n",
        f"{_FAULTS}::test_a_warm_start_that_is_stopped_goes_on"),
    Guard(
        "a loss, gradient", "learning/learner.py",
        "lambda new, old: jnp.where(finite, new, old)", "lambda new, old: new",
        "tests/system/test_nonfinite.py"
        "::test_a_fault_costs_one_update_and_its_dump_replays_bit_for_bit[advantage-batch.advantage_RC]"),
    Guard(
        "a loss, gradient", "learning/guards.py",
        "    return state.replace(step=sharding.put(jnp.asarray(step, jnp.int32), whole)), at\n",
        "    return state.replace(step=sharding.put(jnp.asarray(at, jnp.int32), whole)), at\n",
        "tests/learning/test_guards.py"
        "::test_a_rollback_takes_the_newest_checkpoint_or_the_first_weights_and_leaves_the_rest_of_the_step"),
    Guard(
        "a loss, gradient", "learning/guards.py",
        "  return {name: bad for name, bad in found.items() if bad.any()}\n", "  return {}\n",
        "tests/learning/test_guards.py"
        "::test_data_that_are_not_finite_skip_their_minibatch_although_its_loss_is_finite"),
    # ---- texts and files of others ----
    Guard(
        "an answer attacks the grader", "grading/equivalence.py",
        "  if notation.depth(given) > MAX_DEPTH:\n    return False\n", "", f"{_FUZZ}::test_what_the_fuzz_found"),
    Guard(
        "an answer attacks the grader", "grading/equivalence.py",
        '  return (a.kind == "set") == (b.kind == "set") and _equal(a, b)\n', "  return _equal(a, b)\n",
        f"{_FUZZ}::test_what_the_fuzz_found"),
    Guard(
        "a grading worker spins", "grading/pool.py",
        "        os.killpg(self._popen.pid, signal.SIGKILL)\n", "        self._popen.kill()\n",
        f"{_HOSTILE_WORKER}::test_a_bad_worker_costs_its_item_only[starts many processes]"),
    Guard(
        "a grading worker spins", "grading/pool.py",
        "    if _wait_for(self._output.fileno(), select.POLLIN, 0.0):\n", "    if False:\n",
        f"{_HOSTILE_WORKER}::test_a_reply_that_was_not_asked_for_is_not_taken"),
    Guard(
        "a grading worker spins", "grading/pool.py",
        "    fresh = True\n", "", f"{_HOSTILE_WORKER}::test_what_earlier_items_left_does_not_decide"),
    Guard(
        "a grading worker tries to write", "grading/worker.py",
        "  sys.addaudithook(_refuse)\n", "",
        "tests/grading/test_grader_pool.py::test_a_worker_may_not_write_start_or_connect"
        "[import os; os.mkdir('canary')]"),
    Guard(
        "a grading worker tries to write", "grading/worker.py",
        '"os.symlink", ', "",
        f"{_HOSTILE_WORKER}::test_more_that_a_worker_may_not_do[import os; os.symlink('a', 'canary')]"),
    Guard(
        "a grading worker tries to write", "grading/worker.py",
        "  resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n", "",
        f"{_HOSTILE_WORKER}::test_workers_get_no_secrets_and_work_nowhere"),
    Guard(
        "a response of megabytes", "grading/extraction.py",
        """    if mark == "{":
      stack.append(-1)
    elif mark == "}":
      opened = stack.pop() if stack else -1
      if opened > start:
        start, end = opened, token.start()
    elif mark.startswith("\\\\boxed"):
      stack.append(token.end())
""",
        # Looks for the end of each box from its start.
        """    if mark.startswith("\\\\boxed"):
      depth = 1
      for inner in _TOKEN.finditer(text, token.end()):
        depth += -1 if inner.group() == "}" else inner.group()[-1] == "{"
        if depth == 0:
          start, end = token.end(), inner.start()
          break
""",
        f"{_FUZZ}::test_a_response_of_megabytes_takes_linear_time"),
    Guard(
        "a model's text in the report", "reporting/page.py",
        "autoescape=True", "autoescape=False", "tests/reporting/test_page.py::test_hostile_texts_stay_texts"),
    Guard(
        "a model's text in the report", "reporting/sample_view.py",
        '    return text.replace("<", "\\\\u003c").replace(">", "\\\\u003e").replace("&", "\\\\u0026")\n',
        "    return text\n",
        "tests/reporting/test_page.py::test_hostile_texts_stay_texts"),
    Guard(
        "a model's text in the report", "reporting/text.py",
        "  return plain(text).translate(_MARKDOWN)\n", "  return plain(text)\n",
        "tests/reporting/test_page.py::test_hostile_names_stay_texts_in_markdown_and_latex"),
    Guard(
        "a model's text in the report", "reporting/paper_tables.py",
        '  escaped = " ".join(plain(text).split()).translate(_LATEX)\n', '  escaped = " ".join(plain(text).split())\n',
        "tests/reporting/test_page.py::test_hostile_names_stay_texts_in_markdown_and_latex"),
    Guard(
        "a model's text in the report", "reporting/text.py",
        'unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp")', "True",
        "tests/reporting/test_console.py::test_no_escape_sequence_of_the_model_reaches_the_terminal"),
    Guard(
        "problems with bad UTF-8", "files.py",
        "object_pairs_hook=_object, ", "", f"{_HOSTILE_FILES}::test_hostile_problems_are_refused"),
    Guard(
        "problems with bad UTF-8", "data/problems.py",
        '    if "\\\\ud" in line.lower():\n', "    if False:\n",
        f"{_HOSTILE_FILES}::test_hostile_problems_are_refused"),
    Guard(
        "problems with bad UTF-8", "data/problems.py",
        "      for number in itertools.count(1):\n        line = file.readline(_MAX_LINE + 1)\n",
        "      for number in itertools.count(1):\n        line = file.readline()\n",
        f"{_HOSTILE_FILES}::test_a_line_of_a_gigabyte_is_not_read"),
    Guard(
        "a checkpoint with lying safetensors", "models/tensorfile.py",
        "if tensor.dtype_name in _DTYPES and stop - tensor.offset != math.prod(tensor.shape) * tensor.dtype.itemsize:",
        "if False:",
        f"{_HOSTILE_FILES}::test_lying_tensor_headers_are_refused[header21-None-do not fit its shape]"),
    Guard(
        "a checkpoint with lying safetensors", "models/weights.py",
        r'''if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", file):''',
        'if not isinstance(file, str) or not file.endswith(".safetensors"):',
        f"{_HOSTILE_FILES}::test_an_index_cannot_lead_elsewhere[../model.safetensors]"),
    Guard(
        "a checkpoint with lying safetensors", "models/weights.py",
        "      _check_inside(source, name)\n", "",
        f"{_HOSTILE_FILES}::test_an_export_carries_no_file_along_that_a_link_points_to"),
    Guard(
        "a checkpoint with lying safetensors", "assemble.py",
        "trust_remote_code=False", "trust_remote_code=True",
        f"{_HOSTILE_FILES}::test_no_code_of_a_checkpoint_runs[False]"),
    Guard(
        "any command line", "flags.py",
        "    except (TypeError, ValueError) as error:\n      raise ValueError(\n          f\"config.{name}",
        "    except KeyError as error:\n      raise ValueError(\n          f\"config.{name}",
        f"{_HOSTILE_FILES}::test_any_overrides_are_built_or_refused"),
    Guard(
        "any command line", "flags.py",
        "    text = plain(files.storage_trouble(error) or str(error))",
        "    text = (files.storage_trouble(error) or str(error))",
        f"{_HOSTILE_FILES}::test_an_error_cannot_steer_the_terminal"),
)


# ---- the runner ------------------------------------------------------------------------------------------------------


def copy_to(folder: pathlib.Path) -> None:
  """The tracked files of the repository, as they are in the working tree."""
  listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
  for name in filter(None, listed.split("\0")):
    if (ROOT / name).is_file():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(ROOT / name, folder / name)


def outcome(code: int | None, report: pathlib.Path) -> tuple[str, str]:
  """(`caught`, `survived` or `error`, why) of pytest's exit code, None where time was over, and its JUnit report."""
  if code is None:
    return "error", f"not done after {LIMIT_S:.0f} s"
  try:
    cases = list(ElementTree.parse(report).iter("testcase"))
  except (OSError, ElementTree.ParseError):
    return "error", f"pytest ended with code {code} and no report"
  found = {kind: [e for case in cases for e in case.iter(kind)] for kind in ("failure", "error", "skipped")}
  if code == 1 and found["failure"]:
    return "caught", _line(found["failure"][0])
  if code == 0 and len(cases) > len(found["skipped"]):
    return "survived", ""
  told = [*found["error"], *found["skipped"]]
  return "error", f"pytest ended with code {code}{': ' if told else ''}{_line(told[0]) if told else ''}"


def _line(element: ElementTree.Element) -> str:
  return " ".join((element.get("message") or "").split())[:200]


def run(test: str, repository: pathlib.Path) -> tuple[str, str]:
  """`outcome` of one test in a copy of the repository; what it has started ends with it."""
  report = repository.parent / "report.xml"
  report.unlink(missing_ok=True)
  process = subprocess.Popen(
      [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "slow or not slow",
       f"--junitxml={report}", test], cwd=repository, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL, start_new_session=True,
      # Most programs are the same without a guard.
      env=os.environ | {"PYTHONPATH": str(repository), "JAX_COMPILATION_CACHE_DIR": str(repository.parent / "xla")})
  try:
    code = process.wait(timeout=LIMIT_S)
  except subprocess.TimeoutExpired:
    code = None
  finally:
    if process.returncode is None:
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()
  return outcome(code, report)


def main(texts: Sequence[str]) -> int:
  """The exit code; texts: as in the module."""
  chosen = [g for g in GUARDS if not texts or any(text in g.row or text in g.test for text in texts)]
  counts = dict.fromkeys(("caught", "survived", "error"), 0)
  with_guard: dict[str, tuple[str, str]] = {}  # Outcomes by test.
  began = time.monotonic()
  with tempfile.TemporaryDirectory(prefix="hbpo_jax_guards_") as folder:
    repository = pathlib.Path(folder) / "repository"
    copy_to(repository)
    # Python takes a compiled file for that of a source by size and time.
    clock = itertools.count(1)
    for g in chosen:
      path = repository / PACKAGE / g.file
      whole = path.read_text(encoding="utf-8")
      path.write_text(whole.replace(g.guard, g.without), encoding="utf-8")
      os.utime(path, times=(tick := next(clock), tick))
      started = time.monotonic()
      what, why = run(g.test, repository)
      path.write_text(whole, encoding="utf-8")
      os.utime(path, times=(tick := next(clock), tick))
      if what == "caught":
        with_guard[g.test] = with_guard.get(g.test) or run(g.test, repository)
        if with_guard[g.test][0] != "survived":
          what, why = "error", f"with the guard, too: {with_guard[g.test][1]}"
      counts[what] += 1
      print(f"{what:8} {time.monotonic() - started:4.0f} s  {g.row} | {g.file} | {g.test} | {why}", flush=True)
  print(f"{', '.join(f'{n} {what}' for what, n in counts.items())}, {time.monotonic() - began:.0f} s")
  return 0 if chosen and counts["caught"] == len(chosen) else 1


if __name__ == "__main__":
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # So that no test lives on alone.
  sys.exit(main(sys.argv[1:]))
