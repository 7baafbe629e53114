"""A gcloud that has no cloud: it plays one TPU VM and its queue from a file, and writes down what it was asked.

$FAKE_CLOUD/world.json is the state of the world; $FAKE_CLOUD/calls.jsonl gets a line {kind, argv, stdin} per call.
  vm            state of the VM, or null;  type, workers: what `describe` says of it
  queue         state of the queued resource, or null; queue_states: the ones it takes at each later look
  fail          by kind of call, answers {"code", "err"} to give before it works
  created       states that the VM has after the next creations, READY when used up
  job           what the next looks at the job find, such as "exited 3"; "preempted" takes the VM away; the last stays
  really        whether ssh and scp run on this machine, with $FAKE_CLOUD/worker_N as the home of worker N
"""

import json
import os
import sys

ROOT = os.environ["FAKE_CLOUD"]


def option(name: str, argv: list[str]) -> str:
  return next((a.partition("=")[2] for a in argv if a.startswith(f"--{name}=")), "")


def finish(world: dict, out: str = "", err: str = "", code: int = 0) -> None:
  with open(f"{ROOT}/world.json", "w") as f:
    json.dump(world, f)
  sys.stdout.write(out)
  sys.stderr.write(err)
  sys.exit(code)


def missing(world: dict, what: str) -> None:
  finish(world, err=f"ERROR: NOT_FOUND: Resource '{what}' was not found\n", code=1)


def workers(world: dict, argv: list[str]) -> list[int]:
  chosen = option("worker", argv)
  return list(range(world["workers"])) if chosen == "all" else [int(chosen or 0)]


def ssh(world: dict, argv: list[str], stdin: str) -> None:
  command = option("command", argv)
  if world["really"]:
    import subprocess  # only where it is needed: this file starts hundreds of times

    codes = []
    for n in workers(world, argv):
      home = f"{ROOT}/worker_{n}"
      os.makedirs(home, exist_ok=True)
      env = {k: v for k, v in os.environ.items() if k not in ("WANDB_API_KEY", "HF_TOKEN")}
      env |= {"HOME": home, "TMUX_TMPDIR": home}
      codes.append(subprocess.run(["bash", "-c", command], cwd=home, env=env, input=stdin, text=True).returncode)
    finish(world, code=next((c for c in codes if c), 0))
  if "hbpo-missing" in command:
    finish(world, out="" if world["set_up"] else "hbpo-missing\n")
  if command.endswith(" setup; }"):
    world["set_up"] = True
  if command.endswith("worker.sh state"):
    job = world["job"].pop(0) if len(world["job"]) > 1 else world["job"][0]
    if job == "preempted":
      world["vm"], world["set_up"] = "PREEMPTED", False
      finish(world, err="Connection refused\n", code=255)
    finish(world, out="".join(f"hbpo-state {job} worker-{n}\n" for n in range(world["workers"])))
  finish(world, out="the worker's answer\n")


def scp(world: dict, argv: list[str], words: list[str]) -> None:
  source, target = words[4:6]
  if world["really"]:
    import shutil

    for n in workers(world, argv):
      os.makedirs(f"{ROOT}/worker_{n}", exist_ok=True)
      shutil.copy(source, f"{ROOT}/worker_{n}/{target.partition(':')[2]}")
  finish(world)


def vm(world: dict, verb: str, name: str, argv: list[str]) -> None:
  if verb == "describe":
    if world["vm"] is None:
      missing(world, name)
    finish(world, out=f"{world['vm']},{world['type']},{world['workers']}\n")
  if verb == "create":
    world["vm"] = world["created"].pop(0) if world["created"] else "READY"
    world["type"] = option("accelerator-type", argv)
  if verb == "delete":
    world["vm"] = None
  finish(world)


def queue(world: dict, verb: str, name: str, argv: list[str]) -> None:
  if verb == "describe":
    if world["queue"] is None:
      missing(world, name)
    if world["queue_states"]:
      world["queue"] = world["queue_states"].pop(0)
    if world["queue"] == "ACTIVE" and world["vm"] is None:
      world["vm"] = "READY"
    finish(world, out=f"{world['queue']},{world['queue_error']}\n")
  if verb == "create":
    world["queue"], world["type"] = "WAITING_FOR_RESOURCES", option("accelerator-type", argv)
  if verb == "delete":
    world["queue"] = world["vm"] = None
  finish(world)


def main() -> None:
  argv, stdin = sys.argv[1:], sys.stdin.read()
  with open(f"{ROOT}/world.json") as f:
    world = json.load(f)
  words = [a for a in argv if not a.startswith("-")]
  kind = " ".join(words[2:4] if words[:2] == ["compute", "tpus"] else words[:2])
  with open(f"{ROOT}/calls.jsonl", "a") as f:
    f.write(json.dumps({"kind": kind, "argv": argv, "stdin": stdin}) + "\n")
  if world["fail"].get(kind):
    answer = world["fail"][kind].pop(0)
    finish(world, err=answer["err"] + "\n", code=answer["code"])
  if kind == "tpu-vm ssh":
    ssh(world, argv, stdin)
  elif kind == "tpu-vm scp":
    scp(world, argv, words)
  elif kind.startswith("tpu-vm "):
    vm(world, words[3], words[4], argv)
  elif kind.startswith("queued-resources "):
    queue(world, words[3], words[4], argv)
  elif kind == "storage cat":
    finish(world, out='{"step": 6, "reward": 0.25}\n{"step": 7, "reward": 0.5}\n')
  elif kind != "storage rsync":
    finish(world, err=f"the fake knows no {kind}\n", code=2)
  finish(world)


if __name__ == "__main__":
  main()
