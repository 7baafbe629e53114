"""Files that lie: each is read or refused in one sentence for its reader, and none leads elsewhere or runs anything."""

import functools
import json
import re
import resource
import struct

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from hbpo_jax import assemble, config, files, flags, regrade
from hbpo_jax.config import Config, MeshConfig
from hbpo_jax.data import problems, prompts
from hbpo_jax.evaluation import store
from hbpo_jax.models import architecture, sharding, tensorfile, weights
from hbpo_jax.reporting import runs
from tests.checkpoints import make_checkpoint
from tests.hostile_files import JUNK, places, refusal, replaced
from tests.reporting import runs_fixture

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=8)


# JSON.

@pytest.mark.parametrize("text, message", [
    ("NaN", "the number NaN is not finite"), ("[-Infinity]", "not finite"), ('{"a": 1e999}', "1e999 is not finite"),
    ('{"a": 1, "a": 2}', "'a' stands twice"), ("[" * 100_000, "nested too deep"),
    ('{"a":' * 100_000, "nested too deep"),
    ("9" * 10_000, "digits"), (b"\xff\xfe1\x00", "utf-8"), (b"\xed\xa0\x80", "utf-8"), ("", "Expecting value"),
    ("{} {}", "Extra data"), ('"\x00"', "control character"), ("\ufeff{}", "BOM"), ("'a'", "Expecting value"),
])  # fmt: skip
def test_json_is_strict(text, message):
  with pytest.raises(ValueError, match=message):
    files.parse_json(text)


@given(st.one_of(st.binary(max_size=60), st.text(max_size=60), _JSON.map(json.dumps)))
def test_any_text_is_json_or_a_value_error(text):
  try:
    value = files.parse_json(text)
  except ValueError:
    return
  assert json.loads(json.dumps(value, allow_nan=False)) == value


# Problems.

_ROW = {"id": "a", "problem": "1 + 1", "answer": "2", "source": "me", "level": 1, "answers": ["2"], "solution": "Add."}


@pytest.mark.parametrize("data, message", [
    (b"", "holds no problem"), (b"\n\r\n \n", "holds no problem"), (b"\x00" * 100, ":1 is not JSON"),
    (b"\xff\xfe{\x00}\x00", "UTF-8"), (b'{"id": "\xc3\x28"}', "UTF-8"), (b"[" * 100_000, ":1 is not JSON .*too deep"),
    (json.dumps(_ROW)[:-1].encode() + b', "id": "b"}', "'id' stands twice"),
    (json.dumps(_ROW).replace("1,", "NaN,").encode(), "NaN is not finite"),
    (json.dumps(_ROW | {"level": 10**12}).encode(), "level=1000000000000 must be"),
    (json.dumps(_ROW | {"level": 1e3}).encode(), "level=1000.0 must be"),
    (json.dumps(_ROW).replace('"level": 1', '"level": ' + "9" * 5000).encode(), ":1 is not JSON"),
    (json.dumps(_ROW | {"problem": "\ud800"}).encode(), "surrogates not allowed"),
    (json.dumps(_ROW | {"extra": {"deep": ["\udfff"]}}).encode(), "surrogates not allowed"),
    (json.dumps(_ROW | {"choices": "abc"}).encode(), "choices='abc' must be"),
    (json.dumps(_ROW | {"choices": []}).encode(), ":1"), (json.dumps(_ROW | {"choices": ["2"] * 500}).encode(), ":1"),
])  # fmt: skip
def test_hostile_problems_are_refused(tmp_path, data, message):
  path = tmp_path / "p.jsonl"
  path.write_bytes(data)
  said = refusal(lambda: problems.load(str(path)))
  assert said and re.search(message, said) and "\n" not in said


def test_marks_and_line_ends_of_other_systems_are_read(tmp_path):
  path = tmp_path / "p.jsonl"
  path.write_bytes(b"\xef\xbb\xbf" + json.dumps(_ROW).encode() + b"\r\n\r\n" + json.dumps(_ROW | {"id": "b"}).encode())
  assert [p.id for p in problems.load(str(path))] == ["a", "b"]


def test_a_line_of_a_gigabyte_is_not_read(tmp_path):
  path = tmp_path / "p.jsonl"
  with open(path, "wb") as file:
    file.truncate(1 << 30)  # Sparse: no disk is used.
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  said = refusal(lambda: problems.load(str(path)))
  assert said and "p.jsonl:1 has more than 16 MiB" in said
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_every_value_of_a_problem_may_be_anything(tmp_path):
  path, n_read = tmp_path / "p.jsonl", 0
  for place in places(_ROW):
    for junk in JUNK:
      if place or junk is not ...:
        path.write_text(json.dumps(replaced(_ROW, place, junk)))
        n_read += refusal(lambda: problems.load(str(path))) is None
  assert n_read > 20


# The command line.

_FIELDS = sorted(config.field_table())
_VALUES = st.one_of(
    st.text(max_size=12), st.integers().map(str), st.floats().map(str), _JSON.map(repr),
    st.sampled_from(["", "()", "[", "1,2", "(1,", "None", "none", "true", "nan", "inf", "1e400", "--", "=", "'", '"',
        "\x00", "__import__('os')", "9" * 5000,
                     "(" * 300, "[1" * 50, "-1", "1_0", "\u0661", "a\nb"]))
_FLAGS = st.one_of(
    st.tuples(st.sampled_from(_FIELDS), _VALUES).map(lambda t: f"--config.{t[0]}={t[1]}"),
    st.tuples(st.sampled_from(_FIELDS), _VALUES).map(lambda t: f"-config.{t[0]}={t[1]}"),
    st.sampled_from(_FIELDS).map("--config.{}".format), st.sampled_from(_FIELDS).map("--noconfig.{}".format),
    st.text(max_size=20), st.text(max_size=20).map("--{}".format), st.text(max_size=20).map("--config.{}".format),
    st.text(max_size=12).map("--config={}".format), st.just("--"), st.just("--config"), st.just("--workdir"))


@settings(max_examples=250, deadline=None)
@given(st.lists(_FLAGS, max_size=4), st.booleans())
def test_any_command_line_is_understood_or_refused(arguments, complete):
  line = [*(["--config=quickstart", "--workdir=/w"] if complete else []), *arguments]
  said = refusal(lambda: flags.parse(line))
  assert said is None or len(said) < 12_000


@pytest.mark.parametrize("argument", ["--config.F}\n", "--config.steps\n=3", "--noconfig.\n", "--config\n=x"])
def test_a_line_break_in_a_flag_is_refused(argument):
  assert refusal(lambda: flags.parse(["--config=quickstart", "--workdir=/w", argument]))


@settings(max_examples=250, deadline=None)
@given(st.dictionaries(st.sampled_from(_FIELDS), _JSON | _VALUES, max_size=3))
def test_any_overrides_are_built_or_refused(overrides):
  refusal(lambda: flags.build(config.new(), overrides))


def test_an_error_cannot_steer_the_terminal(capsys):
  with pytest.raises(SystemExit):
    flags.run(lambda *_: None, name="cmd", description="d", argv=["--config=\x1b[31m\u202e\n", "--workdir=/w"])
  err = capsys.readouterr().err
  assert err.count("\n") == 1 and "\\x1b[31m" in err and "\\u202e" in err


# Checkpoints.

def _tensors(path, header, data=b"\0" * 16, length=None):
  raw = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
  return path


def _one(**changes):
  return {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}


_GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
         "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}, "__metadata__": {"format": "pt"}}


@pytest.mark.parametrize("header, length, message", [
    (_one(), 2**63, "do not hold its header"), (_one(), 200, "do not hold its header"),
    (_one(), 10, "not a safetensors header"),
    (b"", 0, "not a safetensors header"), (b"[]", None, "not a safetensors"), (b"{" * 9000, None, "not a safetensors"),
    (b"\xff\xfe", None, "not a safetensors"), (b'{"a": 1, "a": 2}', None, "'a' stands twice"),
    (_one(data_offsets=[0, 1 << 40]), None, "do not fit its shape"), (_one(data_offsets=[-8, 8]), None, "data_offsets"),
    (_one(data_offsets=[16, 0]), None, "data_offsets"), (_one(data_offsets=[0, 16.0]), None, "data_offsets"),
    (_one(data_offsets=[0]), None, "data_offsets"), (_one(data_offsets="ab"), None, "data_offsets"),
    (_one(data_offsets=[8, 24]), None, "does not start where"), (_one(data_offsets=[True, 16]), None, "data_offsets"),
    (_one(shape=[-2, -2]), None, "shape"), (_one(shape=[1 << 60]), None, "shape"), (_one(shape="ab"), None, "shape"),
    (_one(shape=[2.0, 2]), None, "shape"), (_one(shape=None), None, "shape"),
    (_one(shape=[5]), None, "do not fit its shape"),
    (_one(shape=[1 << 30, 1 << 30, 1 << 30]), None, "do not fit its shape"),
    (_one(dtype=["F32"]), None, "dtype"), (_one(dtype=None), None, "dtype"), (_one(dtype="F64", data_offsets=[0, 8]),
     None, "has 8?"),
    ({**_GOOD, "b": _GOOD["b"] | {"data_offsets": [4, 12]}}, None, "does not start where"),
    ({**_GOOD, "b": _GOOD["b"] | {"data_offsets": [0, 8]}}, None, "does not start where"),
    ({"a": 5}, None, "not a safetensors"),
    ({}, None, "corrupt or truncated"), ({"__metadata__": []}, None, "corrupt or truncated"),
])  # fmt: skip
def test_lying_tensor_headers_are_refused(tmp_path, header, length, message):
  said = refusal(lambda: tensorfile.read_header(_tensors(tmp_path / "m.safetensors", header, length=length)))
  assert said and "m.safetensors" in said and re.search(message, said)


def test_a_header_beyond_the_formats_limit_is_not_read(tmp_path):
  path = tmp_path / "m.safetensors"
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", 1 << 30))
    file.truncate(2 << 30)
  said = refusal(lambda: tensorfile.read_header(path))
  assert said and "do not hold its header" in said


def test_an_unknown_dtype_is_named(tmp_path):
  path = _tensors(tmp_path / "m.safetensors", _one(dtype="PICKLE"))
  said = refusal(lambda: tensorfile.read_header(path)["a"].rows((4,), 0, 4))
  assert said and "dtype PICKLE" in said


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_tensor_header_is_read_whole_or_refused(tmp_path_factory, data):
  path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
  header = replaced(_GOOD, data.draw(st.sampled_from(list(places(_GOOD))[1:])), data.draw(
      st.sampled_from(JUNK) | st.integers(-20, 40) | st.lists(st.integers(-20, 40), max_size=3)))
  raw = bytearray(json.dumps(header).encode())
  if data.draw(st.booleans()):
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
  _tensors(path, bytes(raw))
  found = {}
  if refusal(lambda: found.update(tensorfile.read_header(path))) is None:
    for tensor in found.values():  # What is accepted lies within the data, whatever the header says.
      if tensor.dtype_name in ("F32", "F16", "BF16"):
        shape = tensor.shape or (1,)
        assert tensor.rows(shape, 0, shape[0]).tobytes() == b"\0" * int(np.prod(shape)) * tensor.dtype.itemsize


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return make_checkpoint(tmp_path_factory.mktemp("good"), "qwen2")


@pytest.fixture
def copied(checkpoint, tmp_path):
  """A copy of a good checkpoint to spoil."""
  folder = tmp_path / "model"
  folder.mkdir()
  for file in checkpoint.iterdir():
    (folder / file.name).write_bytes(file.read_bytes())
  return folder


def _load(folder):
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  return weights.load(folder, architecture.from_hf_config(folder), mesh, param_dtype="float32")


@pytest.mark.parametrize("name", [
    "../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "",
    "model.safetensors/../../x.safetensors",
    "..\\x.safetensors", "model.bin", 5, None, ["a"], "\x00.safetensors"])
def test_an_index_cannot_lead_elsewhere(copied, name):
  (copied.parent / "model.safetensors").write_bytes((copied / "model.safetensors").read_bytes())
  (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
  said = refusal(lambda: _load(copied))
  assert said and "not the name of a safetensors file" in said


def test_an_export_carries_no_file_along_that_a_link_points_to(copied, tmp_path):
  params = _load(copied)
  (tmp_path / "secret").write_text("hf_token")
  (copied / "added_tokens.json").symlink_to(tmp_path / "secret")
  arch = architecture.from_hf_config(copied)
  said = refusal(lambda: weights.export(params, arch, copied, tmp_path / "out"))
  assert said and "outside the checkpoint" in said
  assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "secret" and not p.is_symlink()
              and b"hf_token" in p.read_bytes()]
  # As the hub's cache lays a checkpoint out.
  cache = tmp_path / "models--a--b"
  (cache / "blobs").mkdir(parents=True)
  (cache / "snapshots" / "0").mkdir(parents=True)
  for i, file in enumerate(f for f in copied.iterdir() if not f.is_symlink()):
    file.rename(cache / "blobs" / str(i))
    (cache / "snapshots" / "0" / file.name).symlink_to(f"../../blobs/{i}")
  weights.export(params, arch, cache / "snapshots" / "0", tmp_path / "out")
  assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_every_value_of_a_config_may_be_anything(checkpoint):
  good = json.loads((checkpoint / "config.json").read_text()) | {
      "rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 64}}
  n_read = 0
  for place in list(places(good))[1:]:
    for junk in (*JUNK, float("nan"), float("inf"), "1e-6", "28", 10**9, [[]]):
      content = replaced(good, place, junk)
      n_read += refusal(functools.partial(architecture.from_hf_config, content)) is None
  assert n_read > 50


@pytest.mark.parametrize("change, message", [
    ({"num_hidden_layers": 10**9}, "n_layers=1e\\+09 is above"), ({"num_hidden_layers": "2"}, "n_layers='2' must be"),
    ({"vocab_size": 10**12}, "vocab_size=1e\\+12 is above"), ({"vocab_size": -5}, "vocab_size=-5 must be"),
    ({"num_attention_heads": 0}, "num_attention_heads=0 must be"), ({"hidden_size": "%d%d"},
     "hidden_size='%d%d' must be"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6' must be a number"), ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0"),
    ({"rope_theta": [1]}, "rope_theta=\\[1\\]"), ({"tie_word_embeddings": "false"},
     "tie_word_embeddings='false' must be"),
    ({"layer_types": 5}, "layer_types=5"), ({"vocab_size": 10**9}, "has shape"),
])  # fmt: skip
def test_sizes_that_cannot_be_are_refused(copied, change, message):
  content = json.loads((copied / "config.json").read_text())
  if "rope_theta" in change:
    content.pop("rope_parameters", None)
  (copied / "config.json").write_text(json.dumps(content | change))
  said = refusal(lambda: _load(copied))
  assert said and re.search(message, said)


_CANARY = (
    "import pathlib\npathlib.Path({!r}).touch()\nclass Evil:\n  pass\nEvilConfig = EvilModel = EvilTokenizer = Evil\n")


@pytest.mark.parametrize("has_json", [True, False])
def test_no_code_of_a_checkpoint_runs(copied, tmp_path, has_json, monkeypatch):
  monkeypatch.setattr("builtins.input", lambda *_: "y")  # Nobody is asked; whoever would be, says yes.
  canary = tmp_path / "canary"
  for name in ("evil.py", "tokenization_evil.py", "configuration_evil.py", "modeling_evil.py", "__init__.py",
      "setup.py"):
    (copied / name).write_text(_CANARY.format(str(canary)))
  own = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel",
      "AutoTokenizer": ["evil.EvilTokenizer"] * 2}
  for name in ("config.json", "tokenizer_config.json"):
    content = json.loads((copied / name).read_text())
    (copied / name).write_text(json.dumps(content | {
        "auto_map": own, "trust_remote_code": True, "tokenizer_class": "EvilTokenizer", "custom_pipelines": own}))
  if not has_json:
    (copied / "tokenizer.json").rename(copied / "vocab.json")
  arch = architecture.from_hf_config(copied)
  said = refusal(lambda: assemble.load_tokenizer(copied, arch))
  assert (said is None) == has_json
  _load(copied)
  assert not canary.exists()


def test_any_damage_to_a_tokenizer_is_refused(copied):
  arch = architecture.from_hf_config(copied)
  for name, values in {
      "tokenizer.json": ["", "{}", "[]", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "null",
          "[" * 5000],
      "tokenizer_config.json": ["", "[]", '{"model_max_length": "x", "eos_token": 5}',
          '{"extra_special_tokens": 3}']}.items():
    good = (copied / name).read_bytes()
    for text in values:
      (copied / name).write_text(text)
      said = refusal(lambda: assemble.load_tokenizer(copied, arch))
      assert said is None or "transformers cannot read the tokenizer" in said
    (copied / name).write_bytes(good)


def test_a_vocabulary_beyond_the_embedding_is_refused(copied):
  content = json.loads((copied / "tokenizer.json").read_text())
  content["model"]["vocab"] |= {f"extra{i}": 10_000 + i for i in range(500)}
  (copied / "tokenizer.json").write_text(json.dumps(content))
  said = refusal(lambda: assemble.load_tokenizer(copied, architecture.from_hf_config(copied)))
  assert said and "rows; put the tokenizer there" in said


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os.system('touch canary') }}", "{{ 1 / 0 }}",
    "{% for i in range(10 ** 9) %}x{% endfor %}", "{{ messages[99].content }}{{ nothing.more }}", "{{ 'x' + 5 }}",
    "{% if %}",
    "{{ messages.append(1) }}", "{% include '/etc/passwd' %}", "{{ raise_exception('no') }}", "no problem at all"])
def test_a_template_that_attacks_is_refused(copied, template, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  tokenizer = assemble.load_tokenizer(copied, architecture.from_hf_config(copied))
  tokenizer.chat_template = template
  said = refusal(lambda: prompts.PromptBuilder(tokenizer, Config(), str(copied)).render("1 + 1"))
  assert said and "chat template" in said and not (tmp_path / "canary").exists()


def test_every_value_of_a_generation_config_may_be_anything(copied):
  tokenizer = assemble.load_tokenizer(copied, architecture.from_hf_config(copied))
  for text in [json.dumps({"eos_token_id": junk}) for junk in JUNK if junk is not ...] + ["", "5", "[]", "NaN", "{}"]:
    (copied / "generation_config.json").write_text(text)
    refusal(lambda: prompts.eos_ids(tokenizer, str(copied)))


# Directories of runs.

@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
  return runs_fixture.make_evaluation(tmp_path_factory.mktemp("runs") / "ev", n_problems=3, k=1,
      modes=("natural", "512"))


@pytest.mark.parametrize("name", ["eval.json", "problems/math500.jsonl", "responses/math500.jsonl"])
def test_every_value_of_an_evaluation_may_be_anything(evaluation, name):
  path = evaluation / name
  good = path.read_text()
  lines = good.splitlines() if path.suffix == ".jsonl" else [good]
  value = json.loads(lines[-1])
  n_read = 0
  try:
    for place in places(value):
      for junk in JUNK:
        if place or junk is not ...:
          path.write_text("\n".join([*lines[:-1], json.dumps(replaced(value, place, junk))]) + "\n")
          said = refusal(lambda: runs.read_all([str(evaluation)]))
          n_read += said is None
          if said is None:
            refusal(lambda: regrade.find(evaluation))
  finally:
    path.write_text(good)
  assert n_read > 10


@pytest.mark.parametrize("name", ["../../../escaped", "/tmp/escaped", "a/b", "..", ".hidden", "", "a\x00b", "a\\b",
    "a\nb"])
def test_a_benchmark_cannot_name_files_elsewhere(evaluation, tmp_path, name):
  manifest = json.loads((evaluation / "eval.json").read_text())
  (tmp_path / "eval.json").write_text(json.dumps(manifest | {"benchmarks": {name: {"title": "t", "n_problems": 1}}}))
  said = refusal(lambda: store.open_existing(tmp_path))
  assert said and "cannot name a benchmark" in said


@pytest.mark.parametrize("damage", [b"\x00" * 64, b"{\n", b"\xff\xfe\n", b"[]\n", b'{"step": NaN}\n',
    b"[" * 100_000 + b"\n", b'{"step": 1, "step": 2}\n'])
@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "samples.jsonl"])
def test_a_damaged_log_is_refused_or_cut(tmp_path, name, damage):
  run = runs_fixture.make_training_run(tmp_path / "run", evaluate=False, steps=3)
  path = run / name
  path.write_bytes(damage + path.read_bytes())
  said = refusal(lambda: runs.read_all([str(run)]))
  assert said and name in said and "\n" not in said


# Everywhere.

def test_nothing_unpickles(repo_root):
  modules = "pickle|cPickle|_pickle|dill|joblib|shelve|marshal|cloudpickle"
  forbidden = re.compile(
      rf"^\s*(?:import|from)\s+(?:{modules})\b|\b(?:{modules})\.\w|allow_pickle\s*=\s*True|torch\.load"
      r"|trust_remote_code\s*=\s*True|\byaml\.(?:unsafe_)?load\(|(?<![\w.])eval\(|(?<![\w.])exec\(")
  sources = sorted((repo_root / "hbpo_jax").rglob("*.py"))
  found = [f"{path.name}:{i}: {line.strip()}" for path in sources
           for i, line in enumerate(path.read_text().splitlines(), start=1) if forbidden.search(line)]
  assert len(sources) > 80 and not found
