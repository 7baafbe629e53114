"""The program `hbpo`: its commands and their help, unknown ones, versions, and output that nobody reads."""

import argparse
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import hbpo_jax
from hbpo_jax import cli, commands, config, flags, plan, report, usage


@pytest.fixture(autouse=True)
def called_as_hbpo(monkeypatch):
  monkeypatch.setattr(sys, "argv", ["/usr/bin/hbpo"])


def ends(capsys, *argv, code=0) -> str:
  """What `hbpo ARGV` prints, after checking its exit code; on stderr where that is 2."""
  try:
    cli.cli(argv)
    ended = 0
  except SystemExit as stop:
    ended = stop.code
  out, err = capsys.readouterr()
  assert ended == code, err
  assert not (out if code == 2 else err)
  return err if code == 2 else out


def call(repo_root, *argv, interpreter=(), unbuffered="", **options):
  """The finished process of `python ARGV`."""
  environment = os.environ | {
      "PYTHONPATH": str(repo_root), "JAX_PLATFORMS": "cpu", "COLUMNS": "100", "PYTHONUNBUFFERED": unbuffered}
  return subprocess.run(
      [sys.executable, *interpreter, *argv], **{"capture_output": True, "text": True} | options, env=environment,
      timeout=300, check=False)


# The table of commands.

def test_every_module_that_is_a_command_is_in_the_table(repo_root):
  modules = {p.stem: p.read_text() for p in (repo_root / "hbpo_jax").glob("*.py")}
  run = {name for name, text in modules.items() if '\nif __name__ == "__main__":\n  cli()\n' in text}
  assert run - {"cli"} == set(commands.COMMANDS)
  for name in commands.COMMANDS:
    assert "\ndef cli(argv: Sequence[str] | None = None) -> None:\n" in modules[name], name


def test_the_settings_that_help_shows_exist():
  for name, command in commands.COMMANDS.items():
    assert set(command.settings) <= set(config.field_table()), name
    assert command.summary.endswith(".") and "\n" not in command.summary


def test_options_are_those_that_the_commands_read(monkeypatch):
  options = lambda name: {o.name for o in commands.COMMANDS[name].options}
  assert options("plan") == {f.name for f in dataclasses.fields(plan.Options)}
  parsers = []
  monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda parser, argv: parsers.append(parser))
  report.parse([])
  flags_read = [a for a in parsers[0]._actions if a.option_strings]
  assert {s.removeprefix("--") for a in flags_read for s in a.option_strings} == options("report")
  samples, = (a for a in flags_read if a.dest == "samples")
  told = {o.name: o.help for o in commands.COMMANDS["report"].options}
  assert f"default: {samples.default}." in told["samples"]


def test_the_program_is_installed(repo_root):
  project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
  module, _, function = project["scripts"]["hbpo"].partition(":")
  assert getattr(sys.modules[module], function) is cli.cli


# Help.

@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",)])
def test_overview_says_what_each_command_does(capsys, argv):
  out = " ".join(ends(capsys, *argv).split())
  for name, command in commands.COMMANDS.items():
    assert f" {name} {command.summary}" in out
  assert "hbpo COMMAND --help" in out and " completion Print" in out


def test_version(capsys):
  assert ends(capsys, "--version") == f"hbpo_jax {hbpo_jax.__version__}\n"


@pytest.mark.parametrize("name", list(commands.COMMANDS))
def test_help_comes_without_jax_and_says_how_it_was_called(repo_root, name):
  for start in (("-m", f"hbpo_jax.{name}"), ("-m", "hbpo_jax", name)):
    done = call(repo_root, *start, "--help", interpreter=("-X", "importtime"))
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and all("import time:" in line for line in done.stderr.splitlines())
    assert not loaded & {"jax", "flax", "transformers", "orbax", "tensorflow_datasets", "matplotlib", "scipy"}
    assert f"usage: python {' '.join(start)} " in done.stdout
    assert " ".join(commands.COMMANDS[name].summary.split()) in " ".join(done.stdout.split())
    assert max(map(len, done.stdout.splitlines())) <= 110
    for option in commands.COMMANDS[name].options:
      assert f"--{option.name}" in done.stdout


def test_help_shows_the_settings_that_are_changed_most_and_where_the_others_are(capsys):
  out = ends(capsys, "train", "--help")
  shown = re.findall(r"^  --config\.([a-z][\w.]*)=", out, flags=re.MULTILINE)
  assert tuple(shown) == commands.COMMANDS["train"].settings
  assert "usage: hbpo train --config=NAME_OR_FILE --workdir=DIR" in out and "hbpo train --helpfull" in out
  for section in usage.sections():
    assert f"\n  {section} " in out


def test_helpfull_shows_every_setting_by_section_with_its_type_and_choices(capsys):
  out = ends(capsys, "sft", "--helpfull")
  assert re.findall(r"^  --config\.([a-z][\w.]*)=", out, flags=re.MULTILINE) == [
      name for _, names in usage.sections().values() for name in names]
  assert ("\n\nreward: The reward of a response (Section 3.2).\n\n"
          "  --config.reward.form=piecewise  (piecewise | min | length | classic |") in out
  for text in ("--config.log.live=true  (true or false)", "--config.loss.dual_clip=none  (a number or none)",
               "--config.rollout.caps=()  (integers such as 512,1024)", "--config.seed=0  (an integer)"):
    assert f"\n  {text}\n" in out
  joined = " ".join(out.split())
  assert all(f.metadata["help"] in joined for f in config.field_table().values())


@pytest.mark.parametrize("argv", [("--help=reward",), ("--help", "reward"), ("--help", "config.reward.")])
def test_help_of_a_section(capsys, argv):
  out = ends(capsys, "train", *argv)
  assert re.findall(r"--config\.([\w.]+)=", out) == [n for n in config.field_table() if n.startswith("reward.")]
  assert out.startswith("reward: The reward of a response")
  top = re.findall(r"--config\.([\w.]+)=", ends(capsys, "train", "--help=run"))
  assert top == [n for n in config.field_table() if "." not in n]


def test_help_of_a_setting_and_of_a_nested_section(capsys):
  assert re.findall(r"--config\.([\w.]+)=", ends(capsys, "train", "--help=rollout.budgets")) == ["rollout.budgets"]
  assert "--config.data.synthetic.modulus=7" in ends(capsys, "train", "--help=data.synthetic")
  assert "did you mean rollout" in ends(capsys, "train", "--help=rolout", code=2)
  assert "did you mean rollout.budgets" in ends(capsys, "train", "--help=budgets", code=2)


def test_help_shows_the_values_of_a_config(capsys):
  out = ends(capsys, "train", "--config=quickstart", "--help")
  assert "--config.rollout.budgets=8,16,24,32" in out and "those of --config=quickstart" in out
  assert "--config.steps=3 " in ends(capsys, "train", "--help", "--config", "smoke", "--nonsense")
  assert "did you mean quickstart" in ends(capsys, "train", "--config=quickstrat", "--help", code=2)


def test_help_is_no_wider_than_the_terminal(capsys, monkeypatch):
  for columns in (60, 80):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = [line for line in ends(capsys, "plan", "--helpfull").splitlines() if not line.startswith("  --config.")]
    assert max(map(len, text)) <= columns


# Running.

def test_a_command_gets_its_arguments(capsys):
  assert "--workdir is missing" in ends(capsys, "regrade", "--config=quickstart", code=2)
  assert "config.step is not a setting" in ends(capsys, "regrade", "--config=quickstart", "--config.step=1", code=2)
  assert "holds no evaluation" in ends(capsys, "regrade", "--config=quickstart", "--workdir=/nowhere", code=2)


@pytest.mark.parametrize("argv, said", [
    (["trian"], "'trian' is not a command; did you mean train?"),
    (["quux"], f"the commands are {', '.join(commands.COMMANDS)}, completion."),
    (["--workdir=x"], "'--workdir=x' is not a command"),
    (["completion"], "give one of bash, zsh, fish"), (["completion", "tcsh"], "not tcsh; give one of bash, zsh, fish"),
])
def test_unknown_commands(capsys, argv, said):
  assert said in ends(capsys, *argv, code=2)


@pytest.mark.parametrize("argv, unbuffered", [
    (("hbpo_jax", "train", "--helpfull"), ""), (("hbpo_jax.train", "--help"), ""), (("hbpo_jax", "--help"), ""),
    (("hbpo_jax", "--help"), "1"), (("hbpo_jax", "completion", "bash"), ""),
    (("hbpo_jax", "preview", "--config=quickstart", "--workdir=preview"), "")])
def test_output_that_nobody_reads_is_no_traceback(repo_root, tmp_path, argv, unbuffered):
  read, write = os.pipe()
  os.close(read)
  done = call(repo_root, "-m", *argv, unbuffered=unbuffered, capture_output=False, stdout=write,
              stderr=subprocess.PIPE, cwd=tmp_path)
  os.close(write)
  assert (done.returncode, done.stderr) == (141, "")


def test_another_pipe_that_breaks_is_a_defect():
  with pytest.raises(BrokenPipeError):
    with flags.one_line_errors([]):
      raise BrokenPipeError


def test_help_of_a_module(monkeypatch):
  assert commands.called("train") == "hbpo train"
  monkeypatch.setattr(sys, "argv", [str(pathlib.Path(hbpo_jax.__file__).with_name("train.py"))])
  assert commands.called("train") == "python -m hbpo_jax.train"
