"""Our TFDS builders: download from a local server, write and read array_record, all without TensorFlow."""

import csv
import io
import json
import socket
import subprocess
import sys

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from hbpo_jax.data import choices, problems
from hbpo_jax.hub import repository

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


def put(hub, path, rows):
  """Rows as the hub has them: in the format that the path's ending names, in the data set that it begins with."""
  name, file = path.removeprefix("datasets/").split("/resolve/main/")
  if path.endswith(".parquet"):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    content = buffer.getvalue()
  elif path.endswith(".csv"):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, [*rows[0], "Canary"])
    writer.writeheader()
    writer.writerows({"Canary": "c", **row} for row in rows)
    content = out.getvalue().encode("utf-8-sig")
  elif path.endswith(".json"):
    content = json.dumps(rows, ensure_ascii=False).encode()
  else:
    content = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
  return hub.add(name, {file: content, "README.md": b"# Not fetched"}, "datasets")


@pytest.fixture
def gated_hub(hub):
  """A hub with GPQA, which wants a token."""
  put(hub, GPQA, GPQA_ROWS).gated = True
  return hub


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
  hub.repos.clear()
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


def test_an_unreachable_hub_is_asked_some_times_and_then_refused(hub, tmp_path, monkeypatch):
  with socket.socket() as closed:
    closed.bind(("127.0.0.1", 0))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
  waited = []
  monkeypatch.setattr(repository.time, "sleep", waited.append)
  with pytest.raises(ValueError, match=r"aime25.*cannot be downloaded.*cannot be reached"):
    problems.load("tfds:aime25", split="test", data_dir=str(tmp_path / "tfds"))
  assert waited == list(repository.WAITS_S)


def test_offline_takes_the_cached_files_or_says_what_is_missing(hub, tmp_path, monkeypatch, capfd):
  put(hub, *HUB["aime25"][:2])
  first = problems.load("tfds:aime25", split="test", data_dir=str(tmp_path / "tfds"))
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  assert problems.load("tfds:aime25", split="test", data_dir=str(tmp_path / "elsewhere")) == first
  assert "offline: math-ai/aime25 comes from the cache" in capfd.readouterr().err
  with pytest.raises(ValueError, match=r"math500.*cannot be downloaded.*HF_HUB_OFFLINE"):
    problems.load("tfds:math500", split="test", data_dir=str(tmp_path / "tfds"))


def test_a_moved_file_is_named(hub, tmp_path):
  hub.add("math-ai/aime25", {"other.jsonl": b""}, "datasets")
  with pytest.raises(ValueError, match=r"aime25.*has no file test\.jsonl at http.*its layout has changed"):
    problems.load("tfds:aime25", split="test", data_dir=str(tmp_path / "tfds"))


def test_damaged_download_is_refused(hub, tmp_path):
  hub.add("HuggingFaceH4/MATH-500", {"test.jsonl": b'{"problem": "cut o'}, "datasets")
  with pytest.raises(ValueError, match=r"test.jsonl cannot be parsed"):
    problems.load("tfds:math500", split="test", data_dir=str(tmp_path / "tfds"))


def test_gpqa_is_read_with_the_token_which_only_the_hub_sees(gated_hub, tmp_path, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "hf_reader")
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
  assert {r.authorization for r in gated_hub.requests if r.host == "hub"} == {"Bearer hf_reader"}
  assert len([r for r in gated_hub.requests if r.host == "storage"]) == 1
  assert not any("hf_reader" in str(r.authorization) for r in gated_hub.requests if r.host == "storage")
  assert not any(b"hf_reader" in file.read_bytes() for file in (tmp_path / "tfds").rglob("*") if file.is_file())


def test_gpqa_reads_the_stored_token(gated_hub, tmp_path, monkeypatch):
  (tmp_path / "token").write_text("hf_reader\n")
  monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
  assert len(problems.load("tfds:gpqa_diamond", split="test", data_dir=str(tmp_path / "tfds"))) == 2


@pytest.mark.parametrize("token, message", [
    (None, r"gated, and there is no hub token \(HTTP 401\)"),
    ("hf_stranger", r"gated, and your token does not open it \(HTTP 403\)"),
])
def test_gpqa_without_access_says_how_to_get_it(gated_hub, tmp_path, monkeypatch, token, message):
  if token:
    monkeypatch.setenv("HF_TOKEN", token)
  with pytest.raises(ValueError, match=message) as error:
    problems.load("tfds:gpqa_diamond", split="test", data_dir=str(tmp_path / "tfds"))
  text = str(error.value)
  assert f"{gated_hub.address}/datasets/Idavidrein/gpqa" in text and "HF_TOKEN" in text
  assert "give its file, or a JSON Lines file" in text and "hf_stranger" not in text


def test_no_token_goes_to_a_set_that_is_open(hub, tmp_path, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "hf_reader")
  put(hub, *HUB["aime25"][:2])
  problems.load("tfds:aime25", split="test", data_dir=str(tmp_path / "tfds"))
  assert hub.requests and {r.authorization for r in hub.requests} == {None}


def test_a_gpqa_file_without_a_column_is_refused(hub, tmp_path, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "hf_reader")
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
