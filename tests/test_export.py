"""The export command, and what train does with the hub: every form of source, adapters, damage, pushes, refusals."""

import json
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from safetensors.torch import load_file
import torch
import transformers

from hbpo_jax import assemble, export, run_info, train
from hbpo_jax.config import MeshConfig
from hbpo_jax.data.prompts import PromptBuilder
from hbpo_jax.learning.checkpoint import Checkpointer
from hbpo_jax.learning.learner import Learner
from hbpo_jax.models import architecture, sharding, weights
from tests.checkpoints import make_checkpoint
from tests.system import runs


def make_run(folder, base, *, rank=0, steps=(1, 2), best=None):
  """A run's directory as train leaves it, with random steps in place of learnt ones; returns params by step."""
  cfg = runs.make_config(runs.settings(folder, model__path=str(base), lora__rank=rank, steps=steps[-1]))
  arch = architecture.from_hf_config(base)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  learner = Learner(arch, cfg, mesh)
  state = learner.new_state(weights.load(base, arch, mesh, param_dtype="float32"))
  run_info.write_run_json(folder, cfg, mesh, {"model_origin": None})
  saved = {}
  with Checkpointer(folder / "checkpoints", cfg.checkpoint) as checkpoints:
    for step in steps:
      state = state.replace(step=jnp.asarray(step), params=jax.tree.map(lambda x, by=step: x + 0.01 * by, state.params))
      checkpoints.save(step, state, {"config": {}})
      saved[step] = learner.whole(jax.tree.map(jnp.copy, state.params))
  if best:
    with Checkpointer(folder / "best", cfg.checkpoint) as checkpoints:
      checkpoints.save(best, state, {"config": {}})
    (folder / "best" / "best.json").write_text(json.dumps({"step": best, "accuracy": 0.5, "tokens": 321.0}))
  return saved


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  folder = make_checkpoint(tmp_path_factory.mktemp("base"), "qwen2", hidden=32)
  (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/first\n---\n# Base\n")
  return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  return folder, make_run(folder, base, best=2)


def norm(folder):
  return load_file(folder / "model.safetensors")["model.norm.weight"].float().numpy()


def fails(capsys, *arguments):
  with pytest.raises(SystemExit) as error:
    export.cli([*map(str, arguments)])
  assert error.value.code == 2
  text = capsys.readouterr().err
  assert text.startswith("error: ") and text.count("\n") == 1, text
  return text


@pytest.mark.parametrize("path, step", [
    ("", 2), ("checkpoints", 2), ("checkpoints/1", 1), ("checkpoints/2", 2), ("best", 2), ("best/2", 2)])
def test_every_form_of_source_gives_its_weights(run, tmp_path, capsys, path, step):
  folder, saved = run
  export.cli([str(folder / path), f"--out={tmp_path / 'out'}"])
  np.testing.assert_array_equal(norm(tmp_path / "out"), np.asarray(saved[step]["norm"]))
  assert f"exported step {step} of {folder}" in capsys.readouterr().out
  card = (tmp_path / "out" / "README.md").read_text()
  assert "base_model: org/first" in card and "license: apache-2.0" in card
  assert ("accuracy 50.0 %, 321.0 tokens" in card) == path.startswith("best")


def test_the_export_has_all_that_loaders_need(run, base, tmp_path):
  """transformers gives the logits of the params; vLLM reads the same files: architectures, dtype, names, one format."""
  folder, saved = run
  out = tmp_path / "out"
  export.cli([str(folder), f"--out={out}"])
  config = json.loads((out / "config.json").read_text())
  assert config["architectures"] == ["Qwen2ForCausalLM"] and config["model_type"] == "qwen2"
  assert config.get("dtype", config.get("torch_dtype")) == "float32"
  assert {p.name for p in out.iterdir()} == {
      "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
      "model.safetensors", "README.md"}
  names = set(load_file(out / "model.safetensors"))
  model = transformers.AutoModelForCausalLM.from_pretrained(out)
  assert names == set(model.state_dict()) - ({"lm_head.weight"} if config["tie_word_embeddings"] else set())
  header = (out / "model.safetensors").read_bytes()
  assert json.loads(header[8:8 + int.from_bytes(header[:8], "little")])["__metadata__"] == {"format": "pt"}
  arch = architecture.from_hf_config(out)
  direct = weights.export(saved[2], arch, base, tmp_path / "direct")
  tokens = torch.arange(20)[None]
  expected = transformers.AutoModelForCausalLM.from_pretrained(direct)(tokens).logits
  assert torch.equal(model(tokens).logits, expected)


def test_the_card_s_code_asks_as_training_did(run, tmp_path):
  """Its prompt has the tokens of training's prompts, though the template of the checkpoint opens no thought."""
  out = tmp_path / "out"
  export.cli([str(run[0]), f"--out={out}"])
  code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1]
  found = {}
  exec(code.replace("ORG/NAME", str(out)), found)  # What the card tells its readers to run.
  cfg = runs.make_config(run_info.read_config(run[0]))
  builder = PromptBuilder(found["tokenizer"], cfg, out)
  assert found["inputs"]["input_ids"][0].tolist() == builder.encode(found["problem"])
  assert found["output"].shape[1] > len(builder.encode(found["problem"]))


def test_the_dtype_of_the_tensors(run, tmp_path):
  export.cli([str(run[0]), f"--out={tmp_path / 'out'}", "--dtype=bfloat16"])
  assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
  assert transformers.AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_run_with_adapters_gives_the_merged_model_and_the_adapter(base, tmp_path):
  run, out = tmp_path / "run", tmp_path / "out"
  run.mkdir()
  make_run(run, base, rank=4)
  export.cli([str(run), f"--out={out}"])
  tokens = torch.arange(20)[None]
  merged = transformers.AutoModelForCausalLM.from_pretrained(out)(tokens).logits
  plain = transformers.AutoModelForCausalLM.from_pretrained(base)
  assert not torch.allclose(merged, plain(tokens).logits, atol=1e-3), "the adapters must do something"
  adapted = peft.PeftModel.from_pretrained(plain, out / "adapter")(tokens).logits
  torch.testing.assert_close(merged, adapted, atol=2e-4, rtol=1e-4)
  assert "library_name: peft" in (out / "adapter" / "README.md").read_text()
  assert "LoRA" in (out / "README.md").read_text()


def test_a_damaged_newest_checkpoint_is_passed_over(run, tmp_path, capsys):
  folder = tmp_path / "run"
  shutil.copytree(run[0], folder)
  files = [p for p in (folder / "checkpoints" / "2" / "state").rglob("*") if p.is_file()]
  victim = max(files, key=lambda p: p.stat().st_size)
  data = bytearray(victim.read_bytes())
  data[len(data) // 2] ^= 1
  victim.write_bytes(data)
  export.cli([str(folder), f"--out={tmp_path / 'out'}"])
  said = capsys.readouterr()
  assert "exported step 1" in said.out and "passed over" in said.err and "checkpoints/2 is damaged" in said.err
  assert "checkpoints/2 is damaged" in fails(capsys, folder / "checkpoints" / "2", f"--out={tmp_path / 'other'}")
  assert not (tmp_path / "other").exists()


def test_what_is_not_understood_is_refused(run, base, tmp_path, capsys):
  folder = run[0]
  (tmp_path / "empty").mkdir()
  assert "neither a run with a checkpoint" in fails(capsys, tmp_path / "empty", f"--out={tmp_path / 'x'}")
  assert "neither a run with a checkpoint" in fails(capsys, tmp_path / "nowhere", f"--out={tmp_path / 'x'}")
  assert "--out is missing" in fails(capsys, folder)
  assert "is an export already" in fails(capsys, base)
  assert "is an export already" in fails(capsys, base, "--out=x")
  assert "--private and --revision belong to a push" in fails(capsys, folder, "--out=x", "--private")
  assert "invalid choice: 'int8'" in fails(capsys, folder, "--out=x", "--dtype=int8")
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "notes.txt").write_text("keep")
  assert "holds no checkpoint" in fails(capsys, folder, f"--out={tmp_path / 'mine'}")


def test_export_and_push_in_one(run, hub, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("HF_TOKEN", "hf_writer")
  export.cli([str(run[0]), f"--out={tmp_path / 'out'}", "--push=me/mine", "--private", "--revision=first"])
  repo = hub.repos["models", "me/mine"]
  files = repo.commits[repo.refs["first"]]
  assert repo.private and "model.safetensors" not in repo.head
  assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
  assert b'name = "me/mine"' in files["README.md"]
  assert f"pushed: {hub.address}/me/mine/commit/" in capsys.readouterr().out


def test_a_refused_push_keeps_the_export_and_the_next_only_pushes(base, hub, tmp_path, monkeypatch, capsys):
  run, out = tmp_path / "run", tmp_path / "export"
  run.mkdir()
  make_run(run, base, rank=4)
  assert "needs a token" in fails(capsys, run, f"--out={out}", "--push=me/mine")
  assert not out.exists(), "refused before the work"
  monkeypatch.setenv("HF_TOKEN", "hf_reader")
  assert "may not write there" in fails(capsys, run, f"--out={out}", "--push=me/mine")
  assert (out / "model.safetensors").is_file()
  monkeypatch.setenv("HF_TOKEN", "hf_writer")
  export.cli([str(out), "--push=me/mine"])
  head = hub.repos["models", "me/mine"].head
  assert head["model.safetensors"] == (out / "model.safetensors").read_bytes()
  assert head["adapter/adapter_model.safetensors"] == (out / "adapter" / "adapter_model.safetensors").read_bytes()
  assert not hub.repos["models", "me/mine"].private


def test_a_run_keeps_the_commit_that_it_began_with(tmp_path):
  cfg = runs.make_config(runs.settings(tmp_path, model__path="org/first", model__revision="v1"))
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  assert run_info.first_revision(tmp_path, cfg) == "v1"
  run_info.write_run_json(tmp_path, cfg, mesh, {"model_origin": {"repo": "org/first", "commit": "c" * 40}})
  assert run_info.first_revision(tmp_path, cfg) == "c" * 40
  assert assemble.base_of(tmp_path) == ("org/first", "c" * 40)
  for change in ({"model__revision": "v2"}, {"model__path": "org/other"}):
    other = runs.make_config(runs.settings(tmp_path, **{"model__path": "org/first", "model__revision": "v1"} | change))
    assert run_info.first_revision(tmp_path, other) == other.model.revision
  run_info.write_run_json(tmp_path, cfg, mesh, {"model_origin": None})
  assert run_info.first_revision(tmp_path, cfg) == "v1" and assemble.base_of(tmp_path) == ("org/first", "v1")


def test_a_run_that_cannot_push_is_refused_before_it_begins_and_says_so_at_its_end(base, hub, tmp_path, monkeypatch):
  cfg = runs.make_config(runs.settings(tmp_path, checkpoint__push="me/mine", checkpoint__push_private=False))
  with pytest.raises(ValueError, match=r"config\.checkpoint\.push='me/mine' needs a token"):
    export.check_push(cfg)
  export.check_push(runs.make_config(runs.settings(tmp_path)))
  monkeypatch.setenv("HF_TOKEN", "hf_reader")
  export.check_push(cfg)
  shutil.copytree(base, tmp_path / "export")
  said = []
  console = types.SimpleNamespace(message=said.append)
  export.push_run(cfg, tmp_path, console)
  assert "may not write there" in said[-1]
  assert said[-1].endswith(f"python -m hbpo_jax.export {tmp_path / 'export'} --push=me/mine")
  monkeypatch.setenv("HF_TOKEN", "hf_writer")
  export.push_run(cfg, tmp_path, console)
  assert said[-1].startswith("pushed: ") and not hub.repos["models", "me/mine"].private


@pytest.mark.slow
def test_training_from_the_hub_and_back(hub, tmp_path, monkeypatch, capsys):
  """The commit is recorded and kept when the branch moves; the export is pushed; a refused push ends no run."""
  runs.make_inputs(tmp_path)
  repo = hub.add("org/first", {
      p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} | {"README.md": b"---\nlicense: mit\n---\n"})
  first = repo.refs["main"]
  monkeypatch.setattr(jax, "devices", lambda *a, devices=jax.devices()[:1]: devices)
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  monkeypatch.setenv("HF_TOKEN", "hf_reader")
  settings = runs.settings(tmp_path, steps=1, model__path="org/first", checkpoint__push="me/mine", lora__rank=2)
  workdir = tmp_path / "run"
  train.main(runs.make_config(settings), str(workdir))
  said = capsys.readouterr().out
  assert "me/mine was not pushed: your token may not write there" in said
  command = f"python -m hbpo_jax.export {workdir / 'export'} --push=me/mine --private"
  assert command in said
  assert json.loads((workdir / "run.json").read_text())["model_origin"] == {"repo": "org/first", "commit": first}

  monkeypatch.setenv("HF_TOKEN", "hf_writer")
  export.cli(command.split()[3:])
  head = hub.repos["models", "me/mine"].head
  assert b"base_model: org/first" in head["README.md"] and f"commit `{first}`".encode() in head["README.md"]
  assert b"library_name: peft" in head["adapter/README.md"] and b"me/mine" in head["adapter/README.md"]

  repo.commit({"config.json": b"{}"})  # The branch moves to something that no run could begin with.
  hub.requests.clear()
  train.main(runs.make_config(settings | {"steps": 2}), str(workdir))
  assert not any("org/first" in r.path for r in hub.requests)
  assert "pushed: " in capsys.readouterr().out
  assert json.loads((workdir / "run.json").read_text())["model_origin"]["commit"] == first
  exported = (workdir / "export" / "model.safetensors").read_bytes()
  assert hub.repos["models", "me/mine"].head["model.safetensors"] == exported
  export.cli([str(workdir), f"--out={tmp_path / 'again'}"])
  assert (tmp_path / "again" / "model.safetensors").read_bytes() == exported, "the command makes what training made"
