"""Our TFDS builders: download from a local server, write and read array_record, all without TensorFlow."""

import functools
import http.server
import json
import socket
import sys
import threading
import time

import pyarrow
import pyarrow.parquet
import pytest

from hbpo_jax.data import problems

pytest.importorskip("tensorflow_datasets")

OLYMPIAD = "datasets/Hothan/OlympiadBench/resolve/main/OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet"
# name -> (path below the endpoint, rows as the hub has them, split, expected (id, problem, answer, level) by id)
HUB = {
    "deepscaler_preview": (
        "datasets/agentica-org/DeepScaleR-Preview-Dataset/resolve/main/deepscaler.json",
        [{"problem": "What is $2+2$?", "answer": "4", "solution": "So 4."},
         {"problem": "Größe?\u2028Zwei Zeilen", "answer": "-\\frac{1}{2}", "solution": ""}],
        "train",
        {"deepscaler/0": ("What is $2+2$?", "4", None),
         "deepscaler/1": ("Größe?\u2028Zwei Zeilen", "-\\frac{1}{2}", None)}),
    "math500": (
        "datasets/HuggingFaceH4/MATH-500/resolve/main/test.jsonl",
        [{"problem": "P", "solution": "S", "answer": "\\frac{3}{2}", "subject": "Algebra", "level": 5,
          "unique_id": "test/algebra/7.json"}],
        "test", {"math500/test/algebra/7": ("P", "\\frac{3}{2}", 5)}),
    "olympiadbench": (
        OLYMPIAD,
        [{"id": 1606, "question": "Q1", "final_answer": ["$\\frac{1}{2 n+2}$"], "solution": ["s"]},
         {"id": 1610, "question": "Q2", "final_answer": ["$2$", "$3$"], "solution": ["s"]}],
        "test",
        {"olympiadbench/1606": ("Q1", "$\\frac{1}{2 n+2}$", None), "olympiadbench/1610": ("Q2", "$2$,$3$", None)}),
    "aime24": (
        "datasets/HuggingFaceH4/aime_2024/resolve/main/data/train-00000-of-00001.parquet",
        [{"id": 60, "problem": "A", "answer": "033", "solution": "", "url": "", "year": "2024"}],
        "test", {"aime24/60": ("A", "33", None)}),
    "aime25": (
        "datasets/math-ai/aime25/resolve/main/test.jsonl",
        [{"id": "0", "problem": "B", "answer": "70"}, {"id": "1", "problem": "C", "answer": "588.0"}],
        "test", {"aime25/0": ("B", "70", None), "aime25/1": ("C", "588", None)}),
}


class _Quiet(http.server.SimpleHTTPRequestHandler):

  def log_message(self, *args):
    pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """A folder served at 127.0.0.1, which HF_ENDPOINT names."""
  root = tmp_path / "hub"
  root.mkdir()
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(root)))
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
  for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  yield root
  server.shutdown()
  server.server_close()
  thread.join()


def put(hub, path, rows):
  file = hub / path
  file.parent.mkdir(parents=True, exist_ok=True)
  if path.endswith(".parquet"):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
  elif path.endswith(".json"):
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
  else:
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


@pytest.mark.parametrize("name", HUB)
def test_downloads_writes_and_reads(hub, tmp_path, name):
  had_tensorflow = "tensorflow" in sys.modules
  path, rows, split, expected = HUB[name]
  put(hub, path, rows)
  found = problems.load(f"tfds:{name}", split=split, data_dir=str(tmp_path / "tfds"))
  assert {p.id: (p.problem, p.answer, p.level) for p in found} == expected
  assert all(p.source == name and p.answers == (p.answer,) for p in found)
  assert list((tmp_path / "tfds" / name).rglob("*.array_record*"))
  assert ("tensorflow" in sys.modules) == had_tensorflow


def test_prepared_data_is_not_downloaded_again(hub, tmp_path):
  path, rows, split, _ = HUB["aime25"]
  put(hub, path, rows)
  first = problems.load("tfds:aime25", split=split, data_dir=str(tmp_path / "tfds"))
  (hub / path).unlink()
  assert problems.load("tfds:aime25", split=split, data_dir=str(tmp_path / "tfds")) == first
  assert len(problems.load("tfds:aime25", split="test[:1]", data_dir=str(tmp_path / "tfds"))) == 1


def test_missing_file_unknown_name_and_split_are_refused(hub, tmp_path):
  with pytest.raises(ValueError, match=r"aime25.*cannot be downloaded.*HF_ENDPOINT"):
    problems.load("tfds:aime25", split="test", data_dir=str(tmp_path / "tfds"))
  with pytest.raises(ValueError, match=r"tfds:no_such_set.*does not exist"):
    problems.load("tfds:no_such_set", data_dir=str(tmp_path / "tfds"))
  put(hub, *HUB["aime25"][:2])
  with pytest.raises(ValueError, match=r"split='train' is not a split.*\['test'\]"):
    problems.load("tfds:aime25", split="train", data_dir=str(tmp_path / "tfds"))


def test_an_unreachable_hub_is_refused_at_once(hub, tmp_path, monkeypatch):
  with socket.socket() as closed:
    closed.bind(("127.0.0.1", 0))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
  start = time.monotonic()
  with pytest.raises(ValueError, match=r"aime25.*cannot be downloaded"):
    problems.load("tfds:aime25", split="test", data_dir=str(tmp_path / "tfds"))
  assert time.monotonic() - start < 20


def test_damaged_download_is_refused(hub, tmp_path):
  file = hub / HUB["math500"][0]
  file.parent.mkdir(parents=True)
  file.write_text('{"problem": "cut o')
  with pytest.raises(ValueError, match=r"test.jsonl cannot be parsed"):
    problems.load("tfds:math500", split="test", data_dir=str(tmp_path / "tfds"))


def test_gsm8k_of_the_catalogue(tmp_path, monkeypatch):
  """The catalogue's builder with its download replaced by a local file: its fields, and array_record."""
  from tensorflow_datasets.text.gsm8k import gsm8k

  row = {"question": "How much?", "answer": "2*600=<<2*600=1200>>1200\n#### 1,200"}
  file = tmp_path / "train.jsonl"
  file.write_text(json.dumps(row) + "\n")
  monkeypatch.setattr(
      gsm8k.Gsm8k, "_split_generators", lambda self, dl_manager: {"train": self._generate_examples(file)})
  found = problems.load("tfds:gsm8k", split="train", data_dir=str(tmp_path / "tfds"))
  assert [(p.problem, p.answer, p.source) for p in found] == [("How much?", "1200", "gsm8k")]


@pytest.mark.parametrize(
    "worked, answer", [("a\n#### 72", "72"), ("#### 1 #### -1,234,567", "-1234567"), ("#### $5 ", "$5")])
def test_gsm8k_answer(worked, answer):
  assert problems.gsm8k_answer(worked) == answer


@pytest.mark.parametrize("worked", ["72", "a ####", ""])
def test_gsm8k_answer_missing(worked):
  with pytest.raises(ValueError, match=r"no final answer"):
    problems.gsm8k_answer(worked)
