"""The completion scripts, in real shells on a terminal, and that they say all that the commands know."""

import os
import re
import select
import shutil
import subprocess
import sys
import time

import pytest

from hbpo_jax import commands, completion, config, flags

# Each makes `hbpo` a function that prints its arguments, so that Enter shows what Tab has written.
START = {
    "bash": (["bash", "--norc", "--noprofile", "-i"],
             "bind 'set bell-style none'; source {script}; hbpo() {{ printf '<%s>' \"$@\"; echo; }}"),
    "zsh": (["zsh", "-f", "-i"],
            "autoload -U compinit; compinit -u -D; source {script}; hbpo() {{ printf '<%s>' \"$@\"; echo }}"),
    "fish": (["fish", "--no-config", "-i"],
             "source {script}; function hbpo; printf '<%s>' $argv; echo; end"),
}
SHELLS = [
    pytest.param(s, marks=pytest.mark.skipif(not shutil.which(s), reason=f"needs {s}")) for s in completion.SHELLS]


def completed(shell, typed, folder):
  """The arguments that the shell passes on after `hbpo TYPED` and Enter; tabs in `typed` are the Tab key."""
  program, start = START[shell]
  script = folder / f"completion.{shell}"
  script.write_text(completion.script(shell))
  environment = {k: v for k, v in os.environ.items() if k not in ("PROMPT_COMMAND", "ENV", "BASH_ENV")}
  # A process of its own gives the shell its terminal: this one has threads, and must not fork.
  with subprocess.Popen(
      [sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])", *program], cwd=folder, stdin=subprocess.PIPE,
      stdout=subprocess.PIPE, env=environment | {"TERM": "dumb", "HOME": str(folder), "PS1": "$ "}) as terminal:
    said = ""
    for line, wanted in ((start.format(script=script) + "; printf 'rea''dy\\n'", "ready"),
                         (f"hbpo {typed}; printf 'do''ne\\n'", "done")):
      terminal.stdin.write(line.encode() + b"\n")
      terminal.stdin.flush()
      deadline, said = time.monotonic() + 60, ""
      while f"{wanted}\r\n" not in said:
        assert time.monotonic() < deadline, said
        if select.select([terminal.stdout], [], [], 1)[0]:
          said += os.read(terminal.stdout.fileno(), 65536).decode(errors="replace")
    terminal.kill()
  return re.findall(r"<([^<>]*)>", said)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("typed, expected", [
    ("trai\t", ["train"]),
    ("train --config=quick\t", ["train", "--config=quickstart"]),
    ("train --config=quickstart --config.reward.fo\tpiec\t", [
        "train", "--config=quickstart", "--config.reward.form=piecewise"]),
    ("train --config.log.live=f\t", ["train", "--config.log.live=false"]),
    ("sft --workd\tdeep\t", ["sft", "--workdir=deeper"]),
    ("plan --topo\tv5e:4x4", ["plan", "--topology=v5e:4x4"]),
    ("report --o\tdeep\t", ["report", "--out=deeper"]),
    ("completion fi\t", ["completion", "fish"]),
])
def test_a_shell_completes(shell, typed, expected, tmp_path):
  (tmp_path / "deeper").mkdir()
  # A fish writes a flag and its value as two words; a zsh takes the last slash away again.
  joined = lambda words: " ".join(words).replace("=", " " if shell == "fish" else "=")
  assert joined(completed(shell, typed, tmp_path)).rstrip("/") == joined(expected)


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_script_knows_every_command_flag_setting_config_and_choice(shell):
  """Also where the shell is not installed."""
  said = set(re.findall(r"[\w./]+", completion.script(shell)))
  known = {*commands.COMMANDS, *flags.config_names(), *completion.SHELLS}
  known |= {f"config.{name}" for name in config.field_table()}
  for command in commands.COMMANDS.values():
    for option in command.options:
      known |= {option.name, *(option.values if isinstance(option.values, tuple) else ())}
  for texts in completion.choices().values():
    known |= set(texts)
  assert known <= said


def bash(tmp_path, line, breaks=" \t\n\"'><=;|&(:"):
  """What bash offers for a line, without a terminal."""
  script = tmp_path / "completion.bash"
  script.write_text(completion.script("bash"))
  done = subprocess.run(
      ["bash", "--norc", "-c", f'source "{script}"; COMP_WORDBREAKS=$2; COMP_LINE=$1; COMP_POINT=${{#1}}; _hbpo; '
       'printf "%s\\n" "${COMPREPLY[@]}"', "bash", line, breaks],
      capture_output=True, text=True, cwd=tmp_path, timeout=60, check=True)
  assert not done.stderr
  return done.stdout.split()


def test_bash_offers_every_command_setting_config_and_choice(tmp_path):
  assert set(bash(tmp_path, "hbpo ")) == {*commands.COMMANDS, "completion", "--help", "--version"}
  assert set(bash(tmp_path, "hbpo train --config.")) == {f"--config.{name}=" for name in config.field_table()}
  assert set(bash(tmp_path, "hbpo train --config=")) >= set(flags.config_names())
  assert set(bash(tmp_path, "hbpo train --config ")) >= set(flags.config_names())
  for name, texts in completion.choices().items():
    assert bash(tmp_path, f"hbpo train --config.{name}=") == list(texts)
  for name, command in commands.COMMANDS.items():
    assert {f"--{o.name}{'=' * bool(o.metavar)}" for o in command.options} <= set(bash(tmp_path, f"hbpo {name} --"))
  assert not bash(tmp_path, "hbpo report --config.")


def test_bash_where_words_do_not_break_at_the_equals_sign(tmp_path):
  (tmp_path / "deeper").mkdir()
  assert bash(tmp_path, "hbpo train --config.log.live=", breaks=" \t\n") == [
      "--config.log.live=true", "--config.log.live=false"]
  assert bash(tmp_path, "hbpo train --workdir=d", breaks=" \t\n") == ["--workdir=deeper"]


def test_bash_offers_config_files_and_directories(tmp_path):
  (tmp_path / "mine.py").write_text("")
  (tmp_path / "notes.txt").write_text("")
  (tmp_path / "two words").mkdir()
  assert "mine.py" in bash(tmp_path, "hbpo train --config=m") and not bash(tmp_path, "hbpo train --config=n")
  assert bash(tmp_path, "hbpo train --workdir=tw") == ["two", "words"]  # one reply, split by this helper


def test_the_script_comes_without_jax(repo_root):
  code = ("import sys; from hbpo_jax import cli; cli.cli(['completion', 'bash']); "
          "sys.exit(bool({'jax', 'transformers', 'flax', 'orbax'} & set(sys.modules)))")
  done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, timeout=60)
  assert done.returncode == 0 and done.stdout == completion.script("bash"), done.stderr
