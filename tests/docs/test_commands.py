"""Every command and every setting that the documentation names: it exists, is understood, and runs where it can."""

import dataclasses
import functools
import importlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from hbpo_jax import commands, config, flags, plan, regrade, user_code, validation
from hbpo_jax.planning import chips
from tests.docs import markdown
from tests.reporting import runs_fixture

# Words that stand for what the reader has.
PLACEHOLDERS = {
    "--config=CONFIG": "--config=smoke", "--topology=TOPOLOGY": "--topology=v5e:4x4",
    "--config.model.preset=PRESET": "--config.model.preset=qwen2p5_7b",
    "--config.reward.grader=my_package.my_module.score": "--config.reward.grader=examples/sort_words.py:score"}


@dataclasses.dataclass(frozen=True)
class Instead:
  """What a command is run with in place of what it says: flags that are set, and sections whose settings are dropped.

  A value with {tmp} is a path in the test's directory. slow: only among the slow tests.
  """
  set: tuple[str, ...]
  drop: tuple[str, ...] = ()
  slow: bool = True


_SMOKE = ("--config=smoke", "--config.model.path={tmp}/warm/export", "--config.log.tensorboard=false")
_OTHER_SIZES = (
    "data.", "prompt.", "rollout.", "eval.", "mesh.", "distributed.", "model.", "benchmarks", "max_new_tokens", "steps")
INSTEAD = {
    "preview": Instead(("--workdir={tmp}/preview",), slow=False),
    "plan": Instead((), ("--sweep",), slow=False),  # A sweep takes a minute.
    "report": Instead(("--out={tmp}/report", "{tmp}/made_up"), slow=False),
    "regrade": Instead(
        ("--config=smoke", "--workdir={tmp}/made_up/eval/trained", "--config.grading.workers=1"), slow=False),
    "sft": Instead(("--config=smoke", "--workdir={tmp}/warm"), (*_OTHER_SIZES, "sft.")),
    "train": Instead((*_SMOKE, "--workdir={tmp}/run"), _OTHER_SIZES),
    "evaluate": Instead(
        (*_SMOKE, "--workdir={tmp}/evaluation", "--config.benchmarks=synthetic", "--config.data.n_eval=4"),
        (*_OTHER_SIZES, "reward.")),
    "export": Instead(("--out={tmp}/exported", "{tmp}/base"), ("--push", "--private", "--revision")),
    "study": Instead(("--workdir={tmp}/study", "--list"), slow=False),
    "prove_resume": Instead(("--workdir={tmp}/proof", "--config.model.path={tmp}/warm/export")),
    "doctor": Instead((*_SMOKE, "--workdir={tmp}/doctor"), _OTHER_SIZES),
}
# Programs that need a network, an account or a device that the tests have not; how they are called is theirs to say.
OUTSIDE = ("gcloud", "git", "export", "xpk", "vllm", "hf")


@functools.cache
def all_commands() -> tuple[markdown.Command, ...]:
  return tuple(c for path in markdown.files() for block in markdown.blocks(path) for c in markdown.commands(block))


def of_package() -> list[markdown.Command]:
  return [c for c in all_commands() if c.module]


def name(command: markdown.Command) -> str:
  return f"{command.where} {command.module or command.argv[0]}"


def instead(command: markdown.Command) -> tuple[str, ...]:
  """The module and arguments with which a command is run."""
  table = INSTEAD[command.module]
  given = {flag.partition("=")[0] for flag in table.set}
  positional = any(not flag.startswith("--") for flag in table.set)
  kept = [
      a for a in filled_in(command.arguments)
      if a != "..." and a.partition("=")[0] not in given and not (positional and not a.startswith("--"))
      and not (table.drop and a.removeprefix("--config.").startswith(table.drop))]
  return (command.module, *table.set, *kept)


def filled_in(argv: list[str]) -> list[str]:
  return [PLACEHOLDERS.get(a, a) for a in argv]


def runs(slow: bool) -> list[tuple[str, ...]]:
  """What is run, each once. The warm start and a plain run come first, for the others use what they leave."""
  found = {instead(c): None for c in of_package() if c.module in INSTEAD and INSTEAD[c.module].slow == slow}
  order = list(INSTEAD)
  return sorted(found, key=lambda argv: (order.index(argv[0]), len(argv)))


@pytest.fixture
def at_the_top(monkeypatch):
  """Paths in commands count from the top of the repository."""
  monkeypatch.chdir(markdown.ROOT)


def test_there_are_commands_in_every_place_that_shows_some():
  files = {c.where.partition(":")[0] for c in all_commands()}
  assert files >= {
      "README.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/index.md", "docs/start.md", "docs/tpu.md",
      "docs/planning.md", "docs/own-task.md", "docs/evaluate.md"}
  assert len(of_package()) > 35
  assert {c.module for c in of_package()} >= set(INSTEAD)


@pytest.mark.parametrize("command", all_commands(), ids=name)
def test_a_command_is_run_by_a_test_or_says_what_it_needs(command):
  program = pathlib.PurePath(command.argv[0]).name
  known = command.module in INSTEAD or program in (*OUTSIDE, "make", "pip", "launch_tpu.sh", "hbpo")
  known |= program == "python" and command.argv[1] == "-c"
  known |= any(a.startswith("benchmarks/") for a in command.argv)
  known |= any(a in ("--help", "-m") for a in command.argv) and "pytest" in command.argv
  assert known or command.needs, "mark its block with <!-- needs: ... -->, or add the command to INSTEAD"


@pytest.mark.parametrize("command", of_package(), ids=name)
def test_a_command_of_the_package_is_understood(command, at_the_top):
  understand(command.module, command.arguments, partial="..." in command.arguments)


def understand(module: str, argv: list[str], *, partial: bool = False) -> None:
  """Raises unless a command would start: its flags, settings and values are as they must be."""
  argv = filled_in([a for a in argv if a != "..."])
  loaded = importlib.import_module(f"hbpo_jax.{module}")
  if module == "plan":
    options, argv = plan.split_options(argv)
    if options.topology:
      chips.parse_topology(options.topology)
  elif hasattr(loaded, "parse"):
    if not partial:
      loaded.parse(argv)
    return
  if "--help" in argv or (partial and not argv):
    return
  if partial:
    argv = ["--config=smoke"] * (not any(a.startswith("--config=") for a in argv)) + argv
  cfg = flags.parse(argv, name=module, needs_workdir=commands.COMMANDS[module].needs_workdir and not partial).cfg
  mesh = cfg.mesh
  n_devices = mesh.data * mesh.tensor * max(mesh.fsdp, 1) + mesh.rollout_devices
  if module == "evaluate":
    validation.validate_evaluation(cfg, n_devices=n_devices)
  elif module == "regrade":
    regrade.check(cfg)
  elif not (module == "plan" and "--sweep" in argv):
    validation.validate(cfg, n_devices=n_devices)
  if cfg.reward.grader.startswith("examples/"):
    user_code.load(cfg.reward.grader, "reward.grader")


@pytest.mark.parametrize("argv", runs(slow=False), ids=lambda argv: " ".join(argv).replace("{tmp}/", ""))
def test_a_quick_command_runs(argv, tmp_path, monkeypatch, capsys, at_the_top):
  runs_fixture.make_training_run(tmp_path / "made_up", steps=12)
  module, *arguments = [a.format(tmp=tmp_path) if "{tmp}" in a else a for a in argv]
  # What compiles for a TPU takes minutes where libtpu is installed, and is tested elsewhere.
  monkeypatch.setattr(plan.compile_lib, "available", lambda: False)
  try:
    importlib.import_module(f"hbpo_jax.{module}").cli(arguments)
  except SystemExit as ended:
    assert module == "plan" and ended.code == 1, "that a run does not fit is an answer, too"
  assert capsys.readouterr().out.strip()


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
  """A directory with a warm start and a run, for the commands that need them."""
  folder = tmp_path_factory.mktemp("smoke")
  runs_fixture.make_training_run(folder / "made_up", steps=12)
  start(("sft", *INSTEAD["sft"].set), folder)
  start(("train", *_SMOKE, "--workdir={tmp}/base"), folder)
  return folder


def start(argv: tuple[str, ...], folder: pathlib.Path) -> None:
  """Runs a command of the package in a process of its own, at the top of the repository."""
  module, *arguments = [a.format(tmp=folder) if "{tmp}" in a else a for a in argv]
  environment = os.environ | {
      "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1", "PYTHONPATH": str(markdown.ROOT)}
  done = subprocess.run(
      [sys.executable, "-m", f"hbpo_jax.{module}", *arguments], cwd=markdown.ROOT, env=environment, capture_output=True,
      text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("argv", runs(slow=True), ids=lambda argv: " ".join(argv).replace("{tmp}/", ""))
def test_a_long_command_runs_on_the_smoke_settings(argv, smoke, tmp_path):
  own = {f"--workdir={{tmp}}/{name}": f"--workdir={tmp_path}/{name}" for name in ("run", "evaluation", "doctor")}
  start(tuple(own.get(a, a) for a in argv), smoke)


@pytest.mark.parametrize("command", [c for c in all_commands() if c.argv[0] == "make"], ids=name)
def test_a_target_of_make_exists(command, repo_root):
  targets = re.findall(r"(?m)^([a-z-]+):", (repo_root / "Makefile").read_text())
  assert not [a for a in command.arguments if "=" not in a and a not in targets]


@pytest.mark.parametrize("command", [c for c in all_commands() if c.argv[0] == "pip"], ids=name)
def test_an_extra_exists(command, repo_root):
  project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
  asked = [e for a in command.arguments for found in re.findall(r"\[(.+)\]", a) for e in found.split(",")]
  assert set(asked) <= set(project["optional-dependencies"])


@pytest.mark.parametrize("command", [c for c in all_commands() if "-c" in c.argv[:2]], ids=name)
def test_a_line_of_python_runs(command, at_the_top, monkeypatch, capsys):
  monkeypatch.syspath_prepend(str(markdown.ROOT))
  exec(command.argv[2], {})
  assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("command", [c for c in all_commands() if c.argv[0].startswith(("python", ".venv")) and any(
    a.startswith("benchmarks/") for a in c.argv)], ids=name)
def test_a_benchmark_knows_its_flags(command, repo_root):
  script, *arguments = command.argv[1:]
  source = (repo_root / script).read_text()
  assert all(f'"{a.partition("=")[0]}"' in source for a in arguments if a.startswith("--"))


@pytest.mark.parametrize("command", [c for c in all_commands() if c.argv[0] == "./launch_tpu.sh"], ids=name)
def test_the_launcher_understands_its_flags(command, repo_root, tmp_path):
  if shutil.which("git") is None or not (repo_root / ".git").exists():
    pytest.skip("launch_tpu.sh needs a checkout and git")
  argv = command.arguments
  own = argv[:argv.index("--")] if "--" in argv else argv
  dry = ["--dry_run", "--yes", *(["--no_plan", "--allow_dirty"] if own[0] in ("run", "up") else [])]
  done = subprocess.run(
      ["./launch_tpu.sh", *own, *(dry if own[0] != "help" else []), *argv[len(own):]], cwd=repo_root,
      capture_output=True, text=True, timeout=60,
      env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HBPO_TPU_ZONE": "z"})
  assert done.returncode == 0, done.stdout + done.stderr
  if "--" in argv:
    understand("train", argv[argv.index("--") + 1:], partial=True)


# Settings in running text.

SECTIONS = {n.partition(".")[0] for n in config.field_table() if "." in n}
LATER = ("CHANGELOG.md",)  # Says what settings were called then.


def test_settings_in_running_text_exist(at_the_top):
  wrong = []
  for path in markdown.files():
    if markdown.relative(path) in LATER:
      continue
    for span in markdown.spans(path, skip_first_cells=path.name == "migration.md"):
      if problem := wrong_setting(span):
        wrong.append(f"{markdown.relative(path)}: `{span}`: {problem}")
  assert not wrong, "\n".join(wrong)


def wrong_setting(span: str) -> str:
  """What is wrong with a span that names a setting, a flag or a command; '' if nothing is, or it names none."""
  if re.match(r"(python -m hbpo_jax\.|hbpo [a-z_]+( |$))", span):
    try:
      for command in markdown.split(span, "text"):
        if command.module not in ("NAME", "CMD", "completion"):
          understand(command.module, [a for a in command.arguments if "field" not in a], partial=True)
    except (ValueError, ImportError, FileNotFoundError, SystemExit) as error:
      return repr(error)
    return ""
  found = re.fullmatch(r"(?:--(?:no)?(?:config\.)?)?([a-z_]+(?:\.[a-z_0-9]+)+|[a-z_]+)(\.\*)?(?:[= ](.*))?", span)
  is_file = span.endswith((".py", ".json", ".md", ".jsonl"))
  if not found or is_file or (span.startswith("--") and "config." not in span):
    return ""
  field, everything, value = found.groups()
  if field == "field" or (not span.startswith("--") and field.partition(".")[0] not in SECTIONS):
    return ""
  if "." not in field and not span.startswith("--config."):
    return ""
  if everything or field in SECTIONS:
    return "" if any(n.startswith(f"{field}.") for n in config.field_table()) else "no such section"
  if field not in config.field_table():
    return "no such setting"
  if value and "…" not in value and not re.fullmatch(r"VALUE|value|[A-Z]|\.\.\.", value):
    try:
      flags.parse(["--config=smoke", "--workdir=w", f"--config.{field}={value}"])
    except ValueError as error:
      return str(error)
    choices = validation.CHOICES.get(field)
    return f"choose one of {choices}" if choices and value not in map(str, choices) else ""
  return ""


@pytest.mark.parametrize("span,is_wrong", [
    ("rollout.budgets", False), ("rollout.budget", True), ("rollout.budgets=(1, 2)", False),
    ("rollout.queries=x", True), ("--config.steps=3", False), ("--config.stepps=3", True),
    ("--config.field=value", False), ("optimizer.*", False), ("model.remat=offload", False),
    ("model.remat=ofload", True), ("python -m hbpo_jax.nothing", True), ("a.b", False), ("data.jsonl", False),
    ("python -m hbpo_jax.train --config.stepps=3", True), ("python -m hbpo_jax.train ...", False)])
def test_a_wrong_setting_is_found(span, is_wrong):
  assert bool(wrong_setting(span)) == is_wrong
