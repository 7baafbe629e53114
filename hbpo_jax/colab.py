"""What only Google Colab has: its secrets, and storage that stays when the machine goes."""

import importlib
import os
import pathlib
import re
import shutil
import subprocess
from typing import Any

MACHINE, DRIVE = "this machine", "Google Drive"
_DRIVE, _BUCKETS = pathlib.Path("/content/drive"), pathlib.Path("/content/gcs")
_BUCKET = re.compile(r"gs://([a-z0-9][a-z0-9._-]+)(?:/+(.*))?")
_INSTALL_GCSFUSE = """
set -e
site=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
curl -fsS --retry 5 $site/doc/apt-key.gpg > $key
echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main" > /etc/apt/sources.list.d/gcsfuse.list
apt-get -qq update && apt-get -qq install --yes gcsfuse
"""
# As on Cloud TPU VMs: without streaming, so that fsync reaches the bucket; a checkpoint is put in place by a rename.
_MOUNT = ("gcsfuse", "--implicit-dirs", "--enable-streaming-writes=false", "--rename-dir-limit=1000000")


def use_secret(name: str) -> None:
  """Puts a secret of Colab's into the environment, where there is one; says whether it is set, and never prints it.

  Outside Colab, and where the secret is missing or this notebook may not see it, the environment stays as it is.

  Args:
    name: of the secret and of the variable, such as HF_TOKEN.
  """
  userdata, reason = _module("userdata"), ""
  if userdata is not None:
    try:
      os.environ[name] = userdata.get(name)
    except (userdata.SecretNotFoundError, userdata.NotebookAccessError) as error:
      reason = f" ({error}; Secrets are under the key at the left)"
  print(f"{name} is {'set' if os.environ.get(name) else 'not set' + reason}")


def open_workdir(name: str, storage: str = MACHINE) -> str:
  """The working directory of a run on the storage asked for, which is mounted if needed; says what room is left.

  Args:
    name: of the run.
    storage: 'this machine' (gone with it), 'Google Drive', or a bucket as gs://BUCKET or gs://BUCKET/FOLDER.
  Raises:
    ValueError: when the storage is none of these, Drive is asked for outside Colab, or a bucket cannot be mounted.
  """
  if storage == MACHINE:
    root = pathlib.Path("runs").absolute()
  elif storage == DRIVE:
    _needed("drive", storage).mount(str(_DRIVE))
    root = _DRIVE / "MyDrive" / "hbpo_jax"
  elif found := _BUCKET.fullmatch(storage):
    root = _mount_bucket(found[1]) / (found[2] or "")
  else:
    raise ValueError(f"storage={storage!r} is not understood; give {MACHINE!r}, {DRIVE!r} or gs://BUCKET.")
  workdir = root / name
  workdir.mkdir(parents=True, exist_ok=True)
  room = "" if storage.startswith("gs://") else f", {shutil.disk_usage(workdir).free / 1024**3:.1f} GiB free"
  print(f"working directory: {workdir}{room}")
  return str(workdir)


def _mount_bucket(bucket: str) -> pathlib.Path:
  """Where a bucket is mounted."""
  mount = _BUCKETS / bucket
  if mount.is_mount():
    return mount
  _needed("auth", f"gs://{bucket}").authenticate_user()
  if shutil.which("gcsfuse") is None:
    _run(["bash", "-c", _INSTALL_GCSFUSE], "gcsfuse cannot be installed")
  mount.mkdir(parents=True, exist_ok=True)
  _run([*_MOUNT, bucket, str(mount)], f"gs://{bucket} cannot be mounted; you need roles/storage.objectUser on it")
  return mount


def _run(argv: list[str], complaint: str) -> None:
  done = subprocess.run(argv, capture_output=True, text=True)
  if done.returncode:
    last = (done.stderr or done.stdout).strip().splitlines()[-1:]
    raise ValueError(f"{complaint} ({' '.join(last) or f'exit code {done.returncode}'}).")


def _needed(module: str, storage: str) -> Any:
  found = _module(module)
  if found is None:
    raise ValueError(f"storage={storage!r} needs Google Colab; elsewhere mount it yourself and give {MACHINE!r}.")
  return found


def _module(name: str) -> Any:
  """google.colab.NAME, or None outside Colab."""
  try:
    return importlib.import_module(f"google.colab.{name}")
  except ModuleNotFoundError:
    return None
