"""Our TFDS builders: download from a local server, write and read array_record, all without TensorFlow."""

import contextlib
import csv
import functools
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from hbpo_jax.data import choices, problems

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
    "amc": (
        "datasets/AI-MO/aimo-validation-amc/resolve/main/data/train-00000-of-00001.parquet",
        [{"id": 0, "problem": "D", "answer": 142.0, "url": "u"}, {"id": 1, "problem": "E", "answer": 0.5, "url": "u"}],
        "test", {"amc/0": ("D", "142", None), "amc/1": ("E", "0.5", None)}),
    "minerva": (
        "datasets/math-ai/minervamath/resolve/main/test.jsonl",
        [{"question": "How far?", "answer": "9.6"}, {"question": "How fast?", "answer": " 1.4e-9 "}],
        "test", {"minerva/0": ("How far?", "9.6", None), "minerva/1": ("How fast?", "1.4e-9", None)}),
}
GPQA = "datasets/Idavidrein/gpqa/resolve/main/gpqa_diamond.csv"
GPQA_ROWS = [
    dict(zip(choices.GPQA_COLUMNS, ["Which,\n\"one\"?", "1 eV", "2 eV", "3 eV", " 4 eV\n", "recA"], strict=True)),
    dict(zip(choices.GPQA_COLUMNS, ["Größe?", "p", "q", "r", "s", "recB"], strict=True))]


class _Quiet(http.server.SimpleHTTPRequestHandler):

  def log_message(self, *args):
    pass


@contextlib.contextmanager
def served(handler):
  """The address of a server at 127.0.0.1."""
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  yield f"http://127.0.0.1:{server.server_port}"
  server.shutdown()
  server.server_close()
  thread.join()


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """A folder served at 127.0.0.1, which HF_ENDPOINT names."""
  root = tmp_path / "hub"
  root.mkdir()
  for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  with served(functools.partial(_Quiet, directory=str(root))) as address:
    monkeypatch.setenv("HF_ENDPOINT", f"{address}/")
    yield root


@pytest.fixture
def gated_hub(hub, monkeypatch):
  """A hub in front of `hub`: it wants the token 'hf_right' and redirects to `hub`, where the file lies.

  The value is the list of (host, Authorization) of all requests, host 'hub' or 'storage'.
  """
  requests_seen = []
  storage = os.environ["HF_ENDPOINT"].rstrip("/")

  class Gate(_Quiet):

    def do_GET(self):
      sent = self.headers.get("Authorization")
      requests_seen.append(("hub", sent))
      self.send_response(401 if sent is None else 302 if sent == "Bearer hf_right" else 403)
      self.send_header("Location", storage + self.path)
      self.send_header("Content-Length", "0")
      self.end_headers()

    do_HEAD = do_GET

  def storage_get(self):
    requests_seen.append(("storage", self.headers.get("Authorization")))
    http.server.SimpleHTTPRequestHandler.do_GET(self)

  monkeypatch.setattr(_Quiet, "do_GET", storage_get, raising=False)
  monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
  monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(hub / "no_token"))
  put(hub, GPQA, GPQA_ROWS)
  with served(Gate) as address:
    monkeypatch.setenv("HF_ENDPOINT", address)
    yield requests_seen


def put(hub, path, rows):
  file = hub / path
  file.parent.mkdir(parents=True, exist_ok=True)
  if path.endswith(".parquet"):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
  elif path.endswith(".csv"):
    with open(file, "w", encoding="utf-8-sig", newline="") as out:
      writer = csv.DictWriter(out, [*rows[0], "Canary"])
      writer.writeheader()
      writer.writerows({"Canary": "c", **row} for row in rows)
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


def test_gpqa_is_read_with_the_token_which_only_the_hub_sees(gated_hub, tmp_path, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "hf_right")
  netrc = tmp_path / "netrc"  # Must not replace the token.
  netrc.write_text("machine 127.0.0.1 login me password other\n")
  netrc.chmod(0o600)
  monkeypatch.setenv("NETRC", str(netrc))
  found = problems.load("tfds:gpqa_diamond", split="test", data_dir=str(tmp_path / "tfds"))
  by_id = {p.id: p for p in found}
  expected = [choices.from_gpqa(row, "row") for row in GPQA_ROWS]
  assert by_id.keys() == {"gpqa/recA", "gpqa/recB"}
  for p in expected:
    stored = by_id[p.id]
    assert (stored.problem, stored.answer, stored.answers) == (p.problem, p.answer, p.answers)
    assert stored.source == "gpqa_diamond" and stored.level is None
  assert {sent for host, sent in gated_hub if host == "hub"} == {"Bearer hf_right"}
  assert [host for host, _ in gated_hub].count("storage") == 1
  assert not any("hf_right" in str(sent) for host, sent in gated_hub if host == "storage")
  assert not any(b"hf_right" in file.read_bytes() for file in (tmp_path / "tfds").rglob("*") if file.is_file())


def test_gpqa_reads_the_stored_token(gated_hub, tmp_path, monkeypatch):
  monkeypatch.delenv("HF_TOKEN", raising=False)
  (tmp_path / "token").write_text("hf_right\n")
  monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
  assert len(problems.load("tfds:gpqa_diamond", split="test", data_dir=str(tmp_path / "tfds"))) == 2


@pytest.mark.parametrize("token, message", [
    (None, r"gated, and there is no hub token \(HTTP 401\)"),
    ("hf_wrong", r"gated, and the hub token does not open it \(HTTP 403\)"),
])
def test_gpqa_without_access_says_how_to_get_it(gated_hub, tmp_path, monkeypatch, token, message):
  monkeypatch.delenv("HF_TOKEN", raising=False)
  if token:
    monkeypatch.setenv("HF_TOKEN", token)
  with pytest.raises(ValueError, match=message) as error:
    problems.load("tfds:gpqa_diamond", split="test", data_dir=str(tmp_path / "tfds"))
  text = str(error.value)
  assert "https://huggingface.co/datasets/Idavidrein/gpqa" in text and "HF_TOKEN" in text
  assert "CSV file or a JSON Lines file" in text and "hf_wrong" not in text


def test_no_token_goes_to_a_set_that_is_open(hub, tmp_path, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "hf_right")
  sent = []
  monkeypatch.setattr(_Quiet, "send_head", lambda self: sent.append(self.headers.get("Authorization"))
                      or http.server.SimpleHTTPRequestHandler.send_head(self), raising=False)
  put(hub, *HUB["aime25"][:2])
  problems.load("tfds:aime25", split="test", data_dir=str(tmp_path / "tfds"))
  assert sent and set(sent) == {None}


def test_a_gpqa_file_without_a_column_is_refused(gated_hub, hub, tmp_path, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "hf_right")
  put(hub, GPQA, [{k: v for k, v in row.items() if k != "Question"} for row in GPQA_ROWS])
  with pytest.raises(ValueError, match=r"gpqa_diamond.csv, row 1: column 'Question' is None"):
    problems.load("tfds:gpqa_diamond", split="test", data_dir=str(tmp_path / "tfds"))


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


def test_gsm8k_is_found_in_a_fresh_process(tmp_path, repo_root):
  program = (
      "import sys; from hbpo_jax.data import tfds_builders; import tensorflow_datasets as tfds; "
      f"print(tfds.builder('gsm8k', data_dir={str(tmp_path)!r}).name, 'tensorflow' in sys.modules)")
  run = subprocess.run([sys.executable, "-c", program], cwd=repo_root, capture_output=True, text=True)
  assert run.stdout.split() == ["gsm8k", "False"], run.stderr


@pytest.mark.parametrize(
    "worked, answer", [("a\n#### 72", "72"), ("#### 1 #### -1,234,567", "-1234567"), ("#### $5 ", "$5")])
def test_gsm8k_answer(worked, answer):
  assert problems.gsm8k_answer(worked) == answer


@pytest.mark.parametrize("worked", ["72", "a ####", ""])
def test_gsm8k_answer_missing(worked):
  with pytest.raises(ValueError, match=r"no final answer"):
    problems.gsm8k_answer(worked)
