"""The front end: config files and names, overrides, profiles, gin, help, and errors of one line."""

import os
import pathlib
import subprocess
import sys

import pytest

from hbpo_jax import config, flags

BASE = ("--config=quickstart", "--workdir=/w")


def parse(*argv):
  return flags.parse([*BASE, *argv]).cfg


def write(folder: pathlib.Path, body: str) -> str:
  path = folder / "mine.py"
  start = "from hbpo_jax import config\ndef get_config():\n  cfg = config.new('paper')\n"
  path.write_text(f"{start}  {body}\n  return cfg\n")
  return str(path)


def fail(capsys, *argv, main=lambda cfg, workdir: None) -> str:
  """The one line that a command ends with, after checking exit code 2 and silence otherwise."""
  with pytest.raises(SystemExit) as stop:
    flags.run(main, name="cmd", description="d", argv=argv)
  out, err = capsys.readouterr()
  assert stop.value.code == 2 and not out
  assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
  return err


# Finding configs.

def test_name_and_path_give_the_same_config(repo_root):
  by_path = flags.parse([f"--config={repo_root}/configs/quickstart.py", "--workdir=/w"])
  assert by_path.cfg == parse() and by_path.workdir == "/w"
  assert parse().rollout.budgets == (8, 16, 24, 32)


def test_arguments_may_be_separated_by_a_space_and_come_in_any_order():
  line = flags.parse(["--config.steps", "7", "--workdir", "/w", "--config", "quickstart", "--config.eval.top_p", "0.5"])
  assert (line.cfg.steps, line.cfg.eval.top_p, line.workdir) == (7, 0.5, "/w")


def test_unknown_name_lists_the_shipped_ones(capsys):
  err = fail(capsys, "--config=quickstrat", "--workdir=/w")
  assert "did you mean quickstart?" in err and "deepscaler_1p5b" in err


@pytest.mark.parametrize("body,message", [
    ("cfg.rollout.budget = 3", "at line 4: .*budget"),
    ("cfg.steps = 'many'", "at line 4: TypeError"),
    ("import nowhere_to_be_found", "nowhere_to_be_found"),
    ("return 3", "returned int"),
    ("cfg = (", "at line 4: SyntaxError"),
    ("cfg.profile = 'nope'", "profile='nope' does not exist"),
])  # fmt: skip
def test_faulty_config_file_is_named_with_its_line(tmp_path, body, message):
  path = write(tmp_path, body)
  with pytest.raises(ValueError, match=message):
    flags.parse([f"--config={path}", "--workdir=/w", "--config.profile=hbpo"])


# Overrides.

@pytest.mark.parametrize("argument,field,value", [
    ("--config.steps=3", "steps", 3),
    ("--config.rollout.budgets=4,8", "rollout.budgets", (4, 8)),
    ("--config.rollout.budgets=(4, 8)", "rollout.budgets", (4, 8)),
    ("--config.rollout.budgets=[4,8]", "rollout.budgets", (4, 8)),
    ("--config.rollout.budgets=4", "rollout.budgets", (4,)),
    ("--config.rollout.caps=()", "rollout.caps", ()),
    ("--config.log.live=false", "log.live", False),
    ("--noconfig.log.live", "log.live", False),
    ("--config.data.synthetic.modulus=11", "data.synthetic.modulus", 11),
    ("--config.loss.dual_clip=3", "loss.dual_clip", 3.0),
    ("--config.loss.dual_clip=none", "loss.dual_clip", None),
    ("--config.model.path=a=b,c", "model.path", "a=b,c"),
    ("--config.prompt.instruction=", "prompt.instruction", ""),
    ("--config.eval.mode=1024", "eval.mode", "1024"),
    ("--config.benchmarks=gsm8k,../a(1).jsonl", "eval.benchmarks", ("gsm8k", "../a(1).jsonl")),
    ("--config.eval.benchmarks=gsm8k", "eval.benchmarks", ("gsm8k",)),
    ("--config.eval.modes=('natural', '512')", "eval.modes", ("natural", "512")),
    ("--config.eval.modes=natural, 512,", "eval.modes", ("natural", "512")),
    ("--config.eval.benchmarks=", "eval.benchmarks", ()),
    ("--config.max_new_tokens=64", "eval.max_new_tokens", 64),
])  # fmt: skip
def test_override(argument, field, value):
  got = config.get(parse(argument), field)
  assert got == value and type(got) is type(value)


def test_last_override_wins():
  assert parse("--config.loss.dual_clip=none", "--config.loss.dual_clip=2").loss.dual_clip == 2.0
  assert parse("--config.loss.dual_clip=2", "--config.loss.dual_clip=none").loss.dual_clip is None
  assert parse("--config.steps=1", "--config.steps=2").steps == 2


def test_a_repeated_tuple_override_appends():
  assert parse("--config.rollout.budgets=1,2", "--config.rollout.budgets=3").rollout.budgets == (1, 2, 3)


@pytest.mark.parametrize("argument,words", [
    ("--config.rollout.budgts=4", "config.rollout.budgts is not a setting; did you mean config.rollout.budgets"),
    ("--config.budgets=4", "config.budgets is not a setting; did you mean config.rollout.budgets"),
    ("--config.rollout=4", "config.rollout is not a setting; did you mean config.rollout.queries"),
    ("--config.rollout.budgets.0=4", "config.rollout.budgets.0 is not a setting"),
    ("--config.steps=abc", "config.steps='abc' has the wrong type; give an integer"),
    ("--config.steps=1.5", "config.steps='1.5' has the wrong type; give an integer"),
    ("--config.loss.clip_low=x", "config.loss.clip_low='x' has the wrong type; give a number"),
    ("--config.loss.dual_clip=x", "config.loss.dual_clip='x' has the wrong type; give a number or none"),
    ("--config.loss.clip_low=none", "config.loss.clip_low='none' has the wrong type"),
    ("--config.log.live=maybe", "config.log.live='maybe' has the wrong type; give true or false"),
    ("--config.rollout.budgets=a,b", "config.rollout.budgets='a,b' has the wrong type; give integers such as"),
    ("--config.rollout.budgets=1.5,2", "config.rollout.budgets=(1.5, 2) has the wrong type"),
    ("--config.steps", "--config.steps has no value"),
    ("--noconfig.steps", "negates a setting that is not true or false"),
    ("--config.profile=best", "'best' does not exist; choose one of"),
    ("--workdri=/w", "Unknown command line flag 'workdri'. Did you mean: workdir"),
    ("train", "argument 'train' is not understood"),
    ("--config=smoke", "--config is given twice"),
    ("--gin_file=/no/such.gin", "--gin_file=/no/such.gin does not exist"),
])  # fmt: skip
def test_bad_argument_is_one_clear_error(capsys, argument, words):
  assert words in fail(capsys, *BASE, argument)


def test_missing_config_and_workdir_are_named(capsys):
  assert "--config is missing" in fail(capsys, "--workdir=/w")
  assert "--workdir is missing" in fail(capsys, "--config=quickstart")


# Profiles.

def test_profile_override_sets_what_the_profile_governs():
  cfg = flags.parse(["--config=deepscaler_1p5b", "--workdir=/w", "--config.profile=released"]).cfg
  assert {f: config.get(cfg, f) for f in config.PROFILES["released"]} == config.PROFILES["released"]


def test_profile_override_spares_the_files_own_edits_and_other_overrides(tmp_path):
  path = write(tmp_path, "cfg.advantage.intra_coef = 0.5")
  cfg = flags.parse([f"--config={path}", "--workdir=/w", "--config.profile=released", "--config.loss.dual_clip=5",
                     "--gin_param=RewardConfig.form = 'cosine'"]).cfg
  assert cfg.profile == "released" and cfg.reward.unfinished_reward == -1.0
  assert (cfg.advantage.intra_coef, cfg.loss.dual_clip, cfg.reward.form) == (0.5, 5.0, "cosine")


def test_profile_override_undoes_the_row_of_the_files_profile():
  assert parse().reward.curve == "log"
  assert parse("--config.profile=paper").reward.curve == "cosine"


def test_profile_through_gin():
  assert parse("--gin_param=Config.profile = 'released'").loss.dual_clip == 3.0


def test_naming_the_files_own_profile_changes_nothing():
  assert parse("--config.profile=hbpo") == parse()


# Gin.

def test_gin_file_and_flags_are_one_table(tmp_path):
  gin_file = tmp_path / "a.gin"
  gin_file.write_text("N = 32\nRolloutConfig.queries = %N\nRolloutConfig.budgets = [4, 8]\n"
                      "SyntheticConfig.modulus = 5\nLossConfig.dual_clip = 2\n")
  by_gin = parse(f"--gin_file={gin_file}", "--gin_param=Config.seed = 4")
  by_flags = parse("--config.rollout.queries=32", "--config.rollout.budgets=4,8", "--config.data.synthetic.modulus=5",
                   "--config.seed=4", "--config.loss.dual_clip=2")
  assert by_gin == by_flags


def test_every_setting_can_be_bound_by_gin():
  from hbpo_jax import gin_front
  names = {prefix + f for cls, prefix in gin_front.sections().values() for f in cls.__dataclass_fields__}
  assert set(config.field_table()) <= names
  default = config.Config()
  for cls, prefix in gin_front.sections().values():
    for field in (f for f in cls.__dataclass_fields__ if prefix + f in config.field_table()):
      value = config.get(default, prefix + field)
      assert gin_front.read([], [f"{cls.__name__}.{field} = {value!r}"]) == {prefix + field: value}


def test_precedence_file_gin_flag(tmp_path):
  gin_file = tmp_path / "a.gin"
  gin_file.write_text("Config.steps = 5\nConfig.seed = 5\nLogConfig.every = 5\n")
  cfg = parse(f"--gin_file={gin_file}", "--gin_param=Config.seed=6", "--gin_param=LogConfig.every=6",
              "--config.log.every=7")
  assert (cfg.steps, cfg.seed, cfg.log.every, cfg.rollout.queries) == (5, 6, 7, 32)


def test_later_gin_files_win_and_may_include_others(tmp_path):
  first, second = tmp_path / "first.gin", tmp_path / "second.gin"
  first.write_text("Config.steps = 1\nConfig.seed = 1\n")
  second.write_text("Config.steps = 2\n")
  both = parse(f"--gin_file={first}", f"--gin_file={second}")
  assert (both.steps, both.seed) == (2, 1)
  second.write_text(f"include '{first}'\nConfig.steps = 2\n")
  assert parse(f"--gin_file={second}") == both


def test_a_gin_file_in_the_home_directory(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "mine.gin").write_text("Config.steps = 2\n")
  assert parse("--gin_file=~/mine.gin").steps == 2


@pytest.mark.parametrize("text,words", [
    ("Config.seed = 1\nConfig.steps = (2\n", "mine.gin: EOF in multi-line statement"),
    ("Config.steps = 1 2\n", "mine.gin: Expected newline"),
    ("include 'nowhere.gin'\n", "Unable to open file: nowhere.gin"),
    ("import no_such_module_of_mine\n", "No module named 'no_such_module_of_mine'"),
    ("Config.step = 1\n", "did you mean Config.steps"),
])  # fmt: skip
def test_bad_gin_file_is_one_clear_error(capsys, tmp_path, text, words):
  (tmp_path / "mine.gin").write_text(text)
  err = fail(capsys, *BASE, f"--gin_file={tmp_path / 'mine.gin'}")
  assert words in err and f"--gin_file={tmp_path / 'mine.gin'}" in err


def test_gin_alone_starts_from_the_default_profile():
  line = flags.parse(["--gin_param=Config.steps = 5", "--workdir=/w"])
  assert [n for n, _, _ in config.differences(line.cfg, config.from_config_dict(config.new()))] == ["steps"]


def test_gin_bindings_do_not_outlive_the_command_line():
  parse("--gin_param=Config.steps = 5")
  assert parse("--gin_param=Config.seed = 5").steps == parse().steps
  import gin
  assert not gin.config_str()


@pytest.mark.parametrize("binding,words", [
    ("RolloutConfig.budget = 4", "'budget'"),
    ("RolloutConfig.budget = 4", "did you mean RolloutConfig.budgets"),
    ("Rollout.budgets = (4,)", "did you mean RolloutConfig"),
    ("Config.rollout = 4", "Config.rollout is a section"),
    ("eval/Config.seed = 4", "scoped"),
    ("Config.seed = oops", "oops"),
    ("Config.seed = 'a'", "config.seed='a' has the wrong type; give an integer"),
    ("Config.seed = True", "config.seed=True has the wrong type"),
    ("Config.profile = 3", "config.profile=3 has the wrong type; give text"),
    ("RolloutConfig.budgets = 'a'", "config.rollout.budgets='a' has the wrong type"),
    ("Config.seed = %UNBOUND", "UNBOUND"),
])  # fmt: skip
def test_bad_gin_is_one_clear_error(capsys, binding, words):
  assert words in fail(capsys, *BASE, f"--gin_param={binding}")


def test_missing_gin_names_the_extra(capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "gin", None)
  assert "pip install 'hbpo_jax[gin]'" in fail(capsys, *BASE, "--gin_param=Config.seed = 4")
  assert parse().steps  # and without gin flags nothing needs it


# Running a command.

def test_a_bucket_is_no_working_directory_of_commands_that_are_not_made_for_it(capsys):
  with pytest.raises(SystemExit) as end:
    flags.run(lambda *_: None, name="x", description="", argv=["--config=smoke", "--workdir=gs://b/run"])
  error = capsys.readouterr().err
  assert end.value.code == 2 and "--workdir=gs://b/run" in error and "gcsfuse" in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["train", "sft", "evaluate", "regrade"])
def test_a_bucket_is_a_working_directory(name):
  line = flags.parse(["--config=smoke", "--workdir=gs://b/run"], name=name)
  assert line.workdir == "gs://b/run"
  with pytest.raises(ValueError, match="--workdir=ftp://b/run is no directory"):
    flags.parse(["--config=smoke", "--workdir=ftp://b/run"], name=name)


def test_main_gets_config_and_workdir():
  got = []
  flags.run(lambda cfg, workdir: got.append((cfg.steps, workdir)), name="c", description="d",
            argv=[*BASE, "--config.steps=3"])
  assert got == [(3, "/w")]


def test_refusals_of_the_package_are_one_line(capsys):
  from hbpo_jax import validation

  def main(cfg, workdir):
    validation.validate(cfg, n_devices=1)

  assert "config.rollout.budgets=(8, 8)" in fail(capsys, *BASE, "--config.rollout.budgets=8,8", main=main)


def test_missing_file_is_one_line(capsys):
  assert "nowhere.json" in fail(capsys, *BASE, main=lambda cfg, workdir: pathlib.Path("/nowhere.json").read_text())


def test_a_defect_keeps_its_traceback():
  def raises_outside_the_package(cfg, workdir):
    raise ValueError("a caller's own")

  # A ValueError that a line of the package causes without meaning to: its first line, here, is no `raise`.
  inside = {}
  exec(compile("def by_accident(cfg, workdir): int('x')", config.__file__, "exec"), inside)

  for defect in (raises_outside_the_package, inside["by_accident"], lambda cfg, workdir: [][1]):
    with pytest.raises((ValueError, IndexError)):
      flags.run(defect, name="c", description="d", argv=BASE)


def test_traceback_flag_shows_where(capsys):
  with pytest.raises(SystemExit) as stop:
    flags.run(lambda cfg, workdir: None, name="c", description="d", argv=[*BASE, "--traceback", "--config.nope=1"])
  err = capsys.readouterr().err
  assert stop.value.code == 2 and "Traceback" in err and "flags.py" in err and "error: config.nope" in err


@pytest.mark.parametrize("argument", ["--help", "-h", "--helpfull", "-helpfull"])
def test_help_of_a_command_without_a_row_exits_0_and_lists_configs(capsys, argument):
  with pytest.raises(SystemExit) as stop:
    flags.run(lambda *_: pytest.fail("ran"), name="python -m cmd", description="Does things.", argv=[argument])
  out = capsys.readouterr().out
  assert stop.value.code == 0 and "Does things." in out and "python -m cmd" in out
  for name, f in config.field_table().items():
    if "full" in argument:
      assert f"--config.{name}=" in out and f.metadata["help"] in " ".join(out.split())
  assert "--config.model.path=" in out and all(name in out for name in flags.config_names())


def test_as_a_program(tmp_path, repo_root):
  script = tmp_path / "command.py"
  script.write_text("from hbpo_jax import flags\n"
                    "flags.run(lambda cfg, workdir: print(cfg.steps, workdir), name='command', description='d')\n")

  def call(*argv):
    return subprocess.run([sys.executable, script, *argv], capture_output=True, text=True, timeout=120, check=False,
                          cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(repo_root)})

  done = call("--config=quickstart", "--config.steps=3", "--workdir=out")
  assert (done.returncode, done.stdout, done.stderr) == (0, "3 out\n", "")
  failed = call("--config=quickstart", "--config.step=3", "--workdir=out")
  assert (failed.returncode, failed.stdout) == (2, "")
  assert failed.stderr == "error: config.step is not a setting; did you mean config.steps?\n"
  assert call("--help").returncode == 0
