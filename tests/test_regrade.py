"""Grading an evaluation again: the golden cases through the stored files, changed verdicts, rewards, own graders."""

import dataclasses
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from hbpo_jax import flags, regrade
from hbpo_jax.config import Config
from hbpo_jax.data.record import Problem
from hbpo_jax.evaluation import store
from hbpo_jax.files import json_value
from hbpo_jax.grading import grade

CFG = Config()
PROBLEMS = (Problem("p/1", "1 + 1", "2", "me", 1, ("2", "two")), Problem("p/2", "2 + 2", "4", "me"))
RIGHT, WRONG = "so.</think>\\boxed{2}", "so.</think>\\boxed{3}"


def row(problem="p/1", response=RIGHT, score=1.0, reason="correct", mode="natural", sample=0, n_gen=10, **more):
  return {"id": problem, "mode": mode, "sample": sample, "answer": "2", "level": None, "response": response,
          "n_gen": n_gen, "n_think": 3, "truncated": False, "score": score, "reason": reason, "given": "", **more}


def evaluation(directory, rows, problems=PROBLEMS, modes=("natural",)):
  """A stored evaluation; `rows` by benchmark."""
  made = [store.Benchmark(name, name.upper(), tuple(problems)) for name in rows]
  with store.Store(directory, made, modes=modes, n_samples=1, model={"path": "m", "fingerprint": "f"},
                   settings={}) as opened:
    for name, own in rows.items():
      opened.append(name, own)
  return directory


def digests(directory):
  return {str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest()
          for f in directory.rglob("*") if f.is_file() and "regraded" not in f.parts}


def regraded(directory, name="math"):
  folder = directory / "regraded" / name
  rows = {f.stem: [json.loads(line) for line in f.read_text().splitlines()] for f in sorted(folder.glob("*.jsonl"))}
  return json.loads((folder / "summary.json").read_text()), rows


def with_reward(**fields):
  return dataclasses.replace(CFG, reward=dataclasses.replace(CFG.reward, **fields))


@pytest.fixture(scope="module")
def golden(shared_dir, tmp_path_factory):
  """(directory, expected verdicts): the golden cases, graded, as a stored evaluation."""
  with (shared_dir / "golden" / "grader_cases_public.jsonl").open(encoding="utf-8") as file:
    cases = [json.loads(line) for line in file]
  for case in cases:
    # What a file holds of it: a lone surrogate becomes U+FFFD.
    case["response"] = json_value(case.get("response") or "".join(t * n for t, n in case["response_parts"]))
  verdicts = grade([c["response"] for c in cases], [c["answer"] for c in cases], thinking_opened=False)
  problems = [Problem(c["id"], "p", c["answer"], "golden") for c in cases]
  rows = [row(c["id"], c["response"], v.score, v.reason, thinking_opened=False)
          for c, v in zip(cases, verdicts, strict=True)]
  directory = evaluation(tmp_path_factory.mktemp("golden"), {"golden": rows}, problems)
  assert [v.correct for v in verdicts] == [c["correct"] for c in cases] and len(cases) > 200
  return directory, verdicts


def test_golden_cases_give_exactly_the_graders_verdicts(golden, capsys):
  directory, verdicts = golden
  before = digests(directory)
  regrade.main(CFG, str(directory))
  summary, rows = regraded(directory)
  assert [(r["score"], r["reason"], r["given"]) for r in rows["golden"]] == [
      (v.score, v.reason, json_value(v.answer)) for v in verdicts]
  numbers = summary["benchmarks"]["golden"]["modes"]["natural"]
  assert numbers["n_responses"] == len(verdicts) and numbers["disagreements"] == numbers["reason_changes"] == 0
  assert numbers["accuracy"] == numbers["accuracy_stored"] == pytest.approx(np.mean([v.score for v in verdicts]))
  assert digests(directory) == before
  assert "GOLDEN" in capsys.readouterr().out


def test_a_changed_verdict_is_the_one_disagreement(tmp_path, capsys):
  rows = [row(), row("p/2", WRONG, 1.0, "correct"), row("p/2", WRONG, 0.0, "timeout", sample=1)]
  evaluation(tmp_path, {"one": rows})
  regrade.main(CFG, str(tmp_path))
  summary, found = regraded(tmp_path)
  assert found["one"][1] == {
      "id": "p/2", "mode": "natural", "sample": 0, "score": 0.0, "reason": "wrong", "given": "3", "reward": None,
      "stored_score": 1.0, "stored_reason": "correct"}
  assert [regrade.disagrees(r) for r in found["one"]] == [False, True, False]
  # Means of problems: (1 + 1/2) / 2 stored, (1 + 0) / 2 now.
  assert summary["benchmarks"]["one"] == {"title": "ONE", "modes": {"natural": {
      "n": 2, "n_responses": 3, "accuracy_stored": 0.75, "accuracy": 0.5, "disagreements": 1, "reason_changes": 1,
      "mean_reward": None}}}
  out = capsys.readouterr().out
  assert "one: p/2  natural  sample 0: answer '4', stored 1 (correct), now 0 (wrong) for '3'\n  so.</think>" in out
  assert "sample 1" not in out
  assert [line.split() for line in out.splitlines() if line.startswith(("ONE", "all"))] == [
      ["ONE", "natural", "3", "75.0", "%", "50.0", "%", "1", "-"], ["all", "3", "1"]]


def test_ten_disagreements_are_printed_at_most_and_long_ones_from_their_end(tmp_path, capsys):
  long = "x" * 5000 + "END"
  evaluation(tmp_path, {name: [row(response=long, sample=i) for i in range(7)] for name in ("one", "two")})
  regrade.main(CFG, str(tmp_path))
  out = capsys.readouterr().out
  assert out.count("stored 1 (correct), now 0 (unfinished)") == 10 and regraded(tmp_path)[0]["benchmarks"]["two"]
  assert out.count("  ..." + "x" * 237 + "END\n") == 10 and "x" * 238 not in out


def test_nothing_that_a_model_wrote_reaches_the_terminal(tmp_path, capsys):
  nasty = "\x1b]0;owned\x07\x9b2J\u202e</think>\\boxed{\x1b[31m3}\x1b[0m"
  evaluation(tmp_path, {"one": [row(response=nasty), row("p/2", "so\n\x1b[2Jsee elsewhere\r", sample=1)]})
  regrade.main(CFG, str(tmp_path))
  out = capsys.readouterr().out
  assert not set("\x1b\x07\x9b\u202e\r") & set(out) and "\\x1b]0;owned" in out
  assert "\n  \\x1b[2Jsee elsewhere" in out  # Indented, so that it is no line of ours.
  given = {**regraded(tmp_path)[1]["one"][0], "id": "\x1b]8"}
  assert "\x1b" not in regrade.describe("one", given, PROBLEMS[0], nasty)  # Whoever prints it.


@pytest.mark.parametrize("opened, reason", [({}, "unfinished"), ({"thinking_opened": False}, "correct")])
def test_rows_follow_an_opened_thought_unless_they_say_otherwise(tmp_path, opened, reason):
  evaluation(tmp_path, {"one": [row(response="\\boxed{two}", **opened)]})
  regrade.main(CFG, str(tmp_path))
  assert regraded(tmp_path)[1]["one"][0]["reason"] == reason


def test_rewards_of_budget_modes(tmp_path):
  rows = [row(mode="512", n_gen=500), row(mode="512", n_gen=1024, sample=1), row(mode="natural"),
          row(mode="512", n_gen=5000, sample=2), row(mode="512", response="no end", n_gen=600, sample=3)]
  evaluation(tmp_path, {"one": rows}, modes=("natural", "512"))
  cos = lambda n: 4.0 * np.cos(np.pi * n / 8192)
  regrade.main(with_reward(unfinished_reward=-1.0), str(tmp_path))
  summary, found = regraded(tmp_path)
  by_key = {(r["mode"], r["sample"]): r["reward"] for r in found["one"]}
  assert by_key.pop(("natural", 0)) is None
  expected = {0: cos(512), 1: cos(1024) - 0.125, 2: 0.0, 3: -1.0}
  assert {k[1]: v for k, v in by_key.items()} == pytest.approx(expected, abs=1e-5)
  modes = summary["benchmarks"]["one"]["modes"]
  assert list(modes) == ["natural", "512"] and modes["natural"]["mean_reward"] is None
  assert modes["512"]["mean_reward"] == pytest.approx(np.mean(list(expected.values())), abs=1e-5)


@pytest.mark.parametrize("form, expected", [
    ("cosine", 4.0 * np.cos(np.pi * 10 / 8192)), ("classic", 1.0), ("piecewise", None), ("min", None),
    ("l1_max", None), ("hmpo", None), ("adlp", None)])
def test_other_modes_get_the_rewards_that_need_no_budget(tmp_path, form, expected):
  evaluation(tmp_path, {"one": [row(mode="efficiency")]}, modes=("efficiency",))
  regrade.main(with_reward(form=form), str(tmp_path))  # intra_coef is that of the paper.
  found = regraded(tmp_path)[1]["one"][0]["reward"]
  assert found == (None if expected is None else pytest.approx(expected, abs=1e-5))


def test_a_grader_of_the_users_own(tmp_path, monkeypatch):
  (tmp_path / "regrade_test_grader.py").write_text(
      "def score(responses, problems):\n"
      "  return [0.5 if p['problem'] in r else 0.0 for r, p in zip(responses, problems)]\n")
  monkeypatch.syspath_prepend(tmp_path)
  directory = evaluation(tmp_path / "eval", {"one": [row(response="1 + 1"), row("p/2", "1 + 1")]})
  before = digests(directory)
  regrade.main(CFG, str(directory))
  regrade.main(with_reward(grader="regrade_test_grader.score", form="classic"), str(directory))
  summary, found = regraded(directory, "regrade_test_grader.score")
  assert [(r["id"], r["score"], r["reward"]) for r in found["one"]] == [("p/1", 0.5, 0.5), ("p/2", 0.0, 0.0)]
  assert summary["grader"] == "regrade_test_grader.score"
  assert summary["benchmarks"]["one"]["modes"]["natural"]["accuracy"] == 0.25
  assert regraded(directory)[0]["grader"] == "math" and digests(directory) == before


def test_twice_gives_the_same_files(tmp_path):
  evaluation(tmp_path, {"one": [row(), row("p/2", WRONG)]})
  read = lambda: [(f.name, f.read_bytes()) for f in sorted((tmp_path / "regraded").rglob("*")) if f.is_file()]
  regrade.main(CFG, str(tmp_path))
  first = read()
  regrade.main(CFG, str(tmp_path))
  assert read() == first and [name for name, _ in first] == ["one.jsonl", "summary.json"]


def test_errors_name_the_files(tmp_path):
  with pytest.raises(ValueError, match=r"holds no evaluation \(.*none/eval.json does not exist\); give the --workdir"):
    regrade.main(CFG, str(tmp_path / "none"))
  evaluation(tmp_path / "eval" / "base", {"one": []})
  with pytest.raises(ValueError, match=r"it is a run, with the evaluations .*eval/base; give one of them"):
    regrade.main(CFG, str(tmp_path))
  with pytest.raises(ValueError, match=r"no graded response yet \(looked in .*responses/one.jsonl\)"):
    regrade.main(CFG, str(tmp_path / "eval" / "base"))
  evaluation(tmp_path / "stray", {"one": [row(), row("p/9")]})
  with pytest.raises(ValueError, match=r"responses/one.jsonl holds a response to 'p/9', which is not in .*problems"):
    regrade.main(CFG, str(tmp_path / "stray"))
  with pytest.raises(ValueError, match=r"reward.form='mean' does not exist"):
    regrade.main(with_reward(form="mean"), str(tmp_path / "stray"))
  with pytest.raises(ValueError, match=r"reward.grader='no_such_module.score': cannot import"):
    regrade.main(with_reward(grader="no_such_module.score"), str(evaluation(tmp_path / "ok", {"one": [row()]})))


@pytest.mark.parametrize("identity, name", [("math", "math"), ("a.b.c", "a.b.c"), ("../x", "_x"), ("..", "grader")])
def test_label(identity, name):
  assert regrade.label(identity) == name


def test_the_command_needs_no_jax_for_natural_responses(tmp_path, repo_root):
  evaluation(tmp_path, {"one": [row(), row("p/2", WRONG, 0.0, "wrong")]})
  program = (
      "import sys; from hbpo_jax import flags, regrade; "
      f"flags.run(regrade.main, name='x', description='', argv=['--config=quickstart', '--workdir={tmp_path}']); "
      "print('loaded:', sorted({'jax', 'flax', 'transformers', 'orbax', 'tensorflow_datasets'} & set(sys.modules)))")
  run = subprocess.run([sys.executable, "-c", program], cwd=repo_root, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  assert "loaded: []" in run.stdout and "Graded again by math" in run.stdout


def test_the_command_line(tmp_path, capsys):
  evaluation(tmp_path, {"one": [row()]})
  arguments = ["--config=quickstart", f"--workdir={tmp_path}", "--config.reward.form=cosine"]
  flags.run(regrade.main, name="x", description="", argv=arguments)
  assert regraded(tmp_path)[0]["reward"]["form"] == "cosine"
  with pytest.raises(SystemExit) as ended:
    flags.run(regrade.main, name="x", description="", argv=["--config=quickstart", f"--workdir={tmp_path / 'none'}"])
  assert ended.value.code == 2 and "error: --workdir=" in capsys.readouterr().err
