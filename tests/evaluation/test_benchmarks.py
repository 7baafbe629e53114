"""Benchmarks by name, from files and from TFDS, and what their list may hold."""

import dataclasses
import json
import re

import pytest

from hbpo_jax.config import DataConfig
from hbpo_jax.data import choices, problems
from hbpo_jax.data.problems import Problem
from hbpo_jax.evaluation import benchmarks, store

CFG = DataConfig()


def write(path, n=3):
  rows = [{"id": str(i), "problem": f"p{i}", "answer": "1", "source": "me"} for i in range(n)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


@pytest.fixture
def tfds_calls(monkeypatch):
  """Calls of load_tfds, (name, split, data_dir), which gives two problems instead of downloading."""
  calls = []

  def load(name, split, data_dir=""):
    calls.append((name, split, data_dir))
    return [Problem("a", "p", "1", name), Problem("b", "q", "2", name)]

  monkeypatch.setattr(problems, "load_tfds", load)
  return calls


def test_known_names_are_those_of_the_papers():
  assert {name: known.title for name, known in benchmarks.NAMES.items()} == {
      "gsm8k": "GSM8K", "math500": "MATH500", "olympiadbench": "OlympiadBench", "aime24": "AIME24", "aime25": "AIME25",
      "amc": "AMC", "minerva": "Minerva", "gpqa_diamond": "GPQA-Diamond", "synthetic": "Synthetic"}


@pytest.mark.parametrize("name", [name for name in benchmarks.NAMES if name != "synthetic"])
def test_a_known_name_is_a_data_set_that_exists(name, tfds_calls):
  tfds = pytest.importorskip("tensorflow_datasets")
  from hbpo_jax.data import tfds_builders

  found = benchmarks.load(name, DataConfig(data_dir="/data", eval_split="validation"), 0)
  assert (found.name, found.title, len(found.problems)) == (name, benchmarks.NAMES[name].title, 2)
  assert tfds_calls == [(name, "test", "/data")]
  builder = tfds.builder_cls(name)
  assert issubclass(builder, tfds_builders.HubProblems) == (name != "gsm8k")  # That one is of the catalogue.
  assert name == "gsm8k" or "test" in builder.FILES


def test_synthetic():
  found = benchmarks.load("synthetic", CFG, 3)
  assert len(found.problems) == 512 and isinstance(found, store.Benchmark)
  train, held_out = problems.load_train_and_eval(dataclasses.replace(CFG, n_eval=40), 3)
  assert list(benchmarks.load("synthetic", dataclasses.replace(CFG, n_eval=40), 3).problems) == held_out
  assert not {p.problem for p in train} & {p.problem for p in found.problems}


@pytest.mark.parametrize("given, call, name, title", [
    ("tfds:aime25", ("aime25", "validation", ""), "aime25", "AIME25"),
    ("tfds:aime25@test", ("aime25", "test", ""), "aime25_test", "AIME25"),
    ("tfds:gsm8k@test[:100]", ("gsm8k", "test[:100]", ""), "gsm8k_test_100", "gsm8k@test[:100]"),
    ("tfds:My_Set/small", ("My_Set/small", "validation", ""), "my_set_small", "My_Set/small"),
])
def test_tfds(tfds_calls, given, call, name, title):
  found = benchmarks.load(given, dataclasses.replace(CFG, eval_split="validation"), 0)
  assert tfds_calls == [call] and (found.name, found.title) == (name, title)


@pytest.mark.parametrize("file, name, title", [
    ("gsm8k_test.jsonl", "gsm8k_test", "GSM8K"), ("MATH-500.jsonl", "math-500", "MATH500"),
    ("aime2025.jsonl", "aime2025", "AIME25"), ("olympiad_bench_test.jsonl", "olympiad_bench_test", "OlympiadBench"),
    ("gsm8k_train.jsonl", "gsm8k_train", "gsm8k_train"), ("My set (2).jsonl", "my_set_2", "My set (2)"),
    ("..jsonl.jsonl", "jsonl", "..jsonl"), ("Ü.jsonl", "benchmark", "Ü"),
])
def test_files(tmp_path, file, name, title):
  found = benchmarks.load(write(tmp_path / file), CFG, 0)
  assert (found.name, found.title) == (name, title) and re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", found.name)
  assert found.problems == tuple(problems.load_jsonl(tmp_path / file))


def test_a_gpqa_file(tmp_path):
  cells = ["Which?", "p", "q", "r", "s", "recA"]
  (tmp_path / "gpqa_diamond.csv").write_text(f"{','.join(choices.GPQA_COLUMNS)}\n{','.join(cells)}\n")
  found = benchmarks.load(str(tmp_path / "gpqa_diamond.csv"), CFG, 0)
  assert (found.name, found.title) == ("gpqa_diamond", "GPQA-Diamond")
  assert [p.id for p in found.problems] == ["gpqa/recA"]


def test_limit_keeps_the_first(tmp_path, tfds_calls):
  file = write(tmp_path / "a.jsonl", 5)
  whole, part = (benchmarks.load_all([file, "synthetic", "aime25"], CFG, 0, limit=n) for n in (0, 2))
  assert [len(b.problems) for b in whole] == [5, 512, 2] and [b.name for b in whole] == ["a", "synthetic", "aime25"]
  assert [b.problems for b in part] == [b.problems[:2] for b in whole]


@pytest.mark.parametrize("names, message", [
    ([], r"config.benchmarks is empty; give one or more of gsm8k, math500, .*synthetic, or files"),
    (["aime25", "synthetic", "aime25"], r"config.benchmarks names 'aime25' more than once; give it once"),
    (["aime25", "tfds:aime25"], r"'aime25' and 'tfds:aime25' would both be called 'aime25'; rename a file"),
    (["aime25", "math50"], r"'math50' is neither a known benchmark nor a file; did you mean math500\? give one of "
                           r"gsm8k, .*, tfds:NAME\[@SPLIT\], or a JSON Lines file"),
    (["aime25", "nowhere.jsonl"], r"'nowhere.jsonl' is neither a known benchmark nor a file; give one of"),
    (["aime25", "FOLDER"], r"is neither a known benchmark nor a file"),
    (["aime25", "FOLDER/p.json"], r"ends neither in .jsonl nor in .csv; give problems as JSON Lines"),
])
def test_a_bad_list_is_refused_before_anything_is_loaded(tmp_path, tfds_calls, names, message):
  write(tmp_path / "p.json")
  with pytest.raises(ValueError, match=message):
    benchmarks.load_all([name.replace("FOLDER", str(tmp_path)) for name in names], CFG, 0)
  assert tfds_calls == []


def test_two_files_of_one_name_are_refused(tmp_path):
  (tmp_path / "other").mkdir()
  files = [write(tmp_path / "a.jsonl"), write(tmp_path / "other" / "A.jsonl")]
  with pytest.raises(ValueError, match=r"would both be called 'a'; rename a file"):
    benchmarks.load_all(files, CFG, 0)
  with pytest.raises(ValueError, match=r"config.eval.limit=-1 is negative"):
    benchmarks.load_all(files[:1], CFG, 0, limit=-1)


def test_shared_sets(shared_dir):
  files = [str(shared_dir / "data" / f"{name}.jsonl") for name in ("gsm8k_test", "math500", "olympiadbench", "aime25")]
  found = benchmarks.load_all(files, CFG, 0)
  assert [(b.title, len(b.problems)) for b in found] == [
      ("GSM8K", 1319), ("MATH500", 500), ("OlympiadBench", 675), ("AIME25", 30)]
