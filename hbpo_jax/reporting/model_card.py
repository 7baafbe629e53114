"""README.md of an export: what was trained from what, what it is worth, how to use it, and how it was made."""

from collections.abc import Mapping
import dataclasses
import os
import pathlib
from typing import Any

import huggingface_hub
import yaml

from hbpo_jax import config, hub, versions
from hbpo_jax.files import atomic_write_text
from hbpo_jax.reporting import summary as summary_lib
from hbpo_jax.reporting import tables

FILE = "README.md"
UNNAMED = "ORG/NAME"  # Stands for the repository until the export is pushed to one.
_PAPER = "[Hierarchical Budget Policy Optimization (HBPO)](https://arxiv.org/abs/2507.15844)"
_TAGS = ("hbpo", "reinforcement-learning", "reasoning", "efficient-reasoning", "jax", "arxiv:2507.15844")
_SFT_TAGS = ("sft", "reasoning", "jax")
_VERSIONS = ("hbpo_jax", "jax", "flax", "optax", "transformers", "python")


@dataclasses.dataclass(frozen=True)
class Base:
  """The model that training began with.

  name: ORG/NAME, or '' where it is not known to the hub.  commit: '' likewise.
  license: entries of a card's header, such as {'license': 'mit'}.
  """
  name: str = ""
  commit: str = ""
  license: Mapping[str, str] = dataclasses.field(default_factory=dict)


def base_of(directory: str | os.PathLike) -> Base:
  """The base that a checkpoint directory stands for: the hub's, or of an earlier export the base that its card names.

  Raises:
    ValueError: when its README.md has a damaged header.
  """
  directory = pathlib.Path(directory)
  header = _header(directory / FILE)
  own = {key: str(header[key]) for key in ("license", "license_name", "license_link") if header.get(key)}
  if origin := hub.origin(directory):
    return Base(origin["repo"], origin["commit"], own)
  named = header.get("base_model")
  named = named[0] if isinstance(named, list) and named else named
  return Base(named if isinstance(named, str) and hub.is_hub_id(named) else "", "", own)


def make(
    settings: Mapping[str, Any], base: Base, *, steps: int, name: str = "", summary: Mapping[str, Any] | None = None,
    note: str = "", git: Mapping[str, Any] | None = None, stage: str = "hbpo", adapter: bool = False,
    own_tokenizer: bool = False) -> str:
  """The text of a model card.

  Args:
    settings: of the run, nested (`config.to_json_dict`, or the `config` of its run.json).
    base: of `base_of`.
    steps: done by these weights.
    name: ORG/NAME that it goes to; '' where it is not known.
    summary: what `summary.write_summary` returned for these weights, or None.
    note: one more sentence on what was measured.
    git: commit of the code, of `run_info.git_state`.
    stage: 'hbpo', or 'sft' for the warm start.
    adapter: whether this is the card of a LoRA adapter alone.
    own_tokenizer: whether the tokenizer was made with the model, so that only the generic class reads it.
  """
  flat = config.flatten(settings)
  name = name or UNNAMED
  parts = [
      _yaml(base, stage, adapter),
      f"# {name.partition('/')[2] if name != UNNAMED else _title(base, stage)}\n",
      _opening(base, flat, stage, adapter),
      "## Results\n", _results(summary, note, str(flat["eval.mode"]), stage),
      "## Use\n", _usage(name, base, flat, adapter, own_tokenizer),
      "## Training\n", _training(flat, base, steps, stage),
      _versions(git),
  ]
  return "\n".join(parts)


def update(directory: str | os.PathLike, text: str) -> None:
  """Replaces the card of a finished export, whole or not at all."""
  atomic_write_text(pathlib.Path(directory) / FILE, text)


def put_name(directory: str | os.PathLike, name: str) -> None:
  """Writes ORG/NAME into the card of an export that was made before it had one; other cards stay as they are."""
  path = pathlib.Path(directory) / FILE
  text = path.read_text(encoding="utf-8") if path.is_file() else ""
  if UNNAMED in text:
    atomic_write_text(path, text.replace(UNNAMED, name))


def _header(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    found = huggingface_hub.metadata_load(path)
  except (ValueError, yaml.YAMLError) as error:
    fault = " ".join(str(error).split())
    raise ValueError(f"{path} has a header that is not YAML ({fault}); mend it, or remove the file.") from error
  return found or {}


def _yaml(base: Base, stage: str, adapter: bool) -> str:
  data: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
  if base.name:
    data |= {"base_model": base.name, "base_model_relation": "adapter" if adapter else "finetune"}
  data |= dict(base.license)
  data |= {"pipeline_tag": "text-generation", "tags": list(_TAGS if stage == "hbpo" else _SFT_TAGS)}
  return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n"


def _title(base: Base, stage: str) -> str:
  of = base.name.partition("/")[2] or "Model"
  return f"{of} trained with HBPO" if stage == "hbpo" else f"{of} after a warm start"


def _opening(base: Base, flat: Mapping[str, Any], stage: str, adapter: bool) -> str:
  of = f"[{base.name}](https://huggingface.co/{base.name})" if base.name else "a model that is not on the hub"
  what = f"A LoRA adapter of {of}" if adapter else f"{of[0].upper()}{of[1:]}"
  if stage == "sft":
    return f"{what}, trained on worked responses: the warm start before {_PAPER}.\n"
  return (
      f"{what}, trained with {_PAPER}: reinforcement learning that teaches a reasoning model to spend few tokens on "
      f"easy problems and many on hard ones. In training, responses opened with sentences such as "
      f"\"{_sentence(flat)}\"; in use none is needed.\n")


def _sentence(flat: Mapping[str, Any]) -> str:
  return str(flat["prompt.budget_sentence"]).replace("{budget}", str(flat["rollout.budgets"][0]))


def _results(summary: Mapping[str, Any] | None, note: str, mode: str, stage: str) -> str:
  lines = [f"{note}\n"] if note else []
  if summary is not None and summary["measured_on"] == "evaluation":
    how = {"natural": "with no budget given", "efficiency": "asked for minimal tokens"}
    lines += [f"**{summary_lib.headline(summary)}**\n",
              tables.before_after(summary["base"], summary["trained"]).to_markdown(),
              f"Held-out problems, {how.get(mode, f'under a budget of {mode} tokens')}.\n"]
  if not lines:
    lines = ["This run was not evaluated.\n" if stage == "hbpo" else "The warm start is not evaluated by itself.\n"]
  return "\n".join(lines)


def _usage(name: str, base: Base, flat: Mapping[str, Any], adapter: bool, own_tokenizer: bool) -> str:
  longest = flat["reward.max_response_tokens"]
  instruction = f" + {' ' + flat['prompt.instruction']!r}" if flat["prompt.instruction"] else ""
  system = f'{{"role": "system", "content": {flat["prompt.system"]!r}}}, ' if flat["prompt.system"] else ""
  tokenizer = "PreTrainedTokenizerFast" if own_tokenizer else "AutoTokenizer"
  hint = "  # or the directory of these files" if name == UNNAMED else ""
  loads = f'name = "{name}"{hint}\ntokenizer = {tokenizer}.from_pretrained(name)\n' + (
      'model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")')
  imports = f"from transformers import AutoModelForCausalLM, {tokenizer}"
  if adapter:
    of = base.name or "DIRECTORY_OF_THE_BASE"
    imports = f"from peft import PeftModel\n{imports}"
    loads = (f'name = "{name}"{hint}\ntokenizer = {tokenizer}.from_pretrained("{of}")\n'
             f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{of}", dtype="auto"), name)')
  problem = "3 +4 *2" if flat["data.source"] == "synthetic" else "What is 12 + 7?"
  python = f"""```python
{imports}

{loads}
problem = "{problem}"
messages = [{system}{{"role": "user", "content": problem{instruction}}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
if not prompt.rstrip().endswith("<think>"):
  prompt += "<think>\\n"  # The prompts of its training ended inside the thought.
inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens={longest}, do_sample=True, temperature=0.6, top_p=0.95)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```
"""
  if adapter:
    return python
  return f"""{python}
With vLLM, from the same `prompt`:

```python
from vllm import LLM, SamplingParams

llm = LLM(name)
sampling = SamplingParams(temperature=0.6, top_p=0.95, max_tokens={longest})
tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
print(llm.generate({{"prompt_token_ids": tokens}}, sampling)[0].outputs[0].text)
```
"""


def _training(flat: Mapping[str, Any], base: Base, steps: int, stage: str) -> str:
  rows = [("base", f"{base.name or 'a local checkpoint'}{f' at commit `{base.commit}`' if base.commit else ''}")]
  source = str(flat["data.source"])
  # A path of somebody's machine says nothing to others.
  rows.append(("problems", source if source.startswith(("synthetic", "tfds:")) else pathlib.PurePath(source).name))
  if stage == "sft":
    rows += [("updates", f"{steps:,}, each {flat['sft.rows']} responses"),
             ("learning rate", f"{flat['sft.learning_rate']:g}")]
  else:
    each = f"{flat['rollout.queries']} queries x {flat['rollout.rollouts_per_query']} responses"
    grader = f", graded by `{flat['reward.grader']}`" if flat["reward.grader"] else ""
    rows += [
        ("steps", f"{steps:,}, each {each}"),
        ("budgets", ", ".join(map(str, flat["rollout.budgets"])) + " tokens"),
        ("L_max", f"{flat['reward.max_response_tokens']:,} tokens"),
        ("profile", f"`{flat['profile']}`"),
        ("reward", f"`{flat['reward.form']}`{grader}"),
        ("optimizer", f"AdamW, {flat['learner.minibatches']} updates per step, learning rate "
                      f"{flat['optimizer.learning_rate']:g} ({flat['optimizer.schedule']})"),
        ("clip, KL", f"{flat['loss.clip_low']:g} / {flat['loss.clip_high']:g}, {flat['loss.kl_coef']:g}")]
  if flat["lora.rank"]:
    rows.append(("LoRA", f"rank {flat['lora.rank']}, alpha {flat['lora.alpha']:g}, {', '.join(flat['lora.targets'])}"))
  rows.append(("seed", str(flat["seed"])))
  escape = lambda text: text.replace("|", "\\|")
  return "| | |\n|:--|:--|\n" + "".join(f"| {key} | {escape(value)} |\n" for key, value in rows)


def _versions(git: Mapping[str, Any] | None) -> str:
  found = versions.installed()
  listed = ", ".join(f"{key} {found[key]}" for key in _VERSIONS if key in found)
  commit = ""
  if git is not None:
    commit = f" Code at commit `{git['commit']}`{' with uncommitted changes' if git['dirty'] else ''}."
  return f"Made with {listed}.{commit}\n"
