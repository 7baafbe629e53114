"""Working directories in a bucket, as the commands open them; see `mirror` for how they are kept."""

from collections.abc import Iterator
import contextlib
import fcntl
import hashlib
import os
import pathlib
import re
import tempfile
import threading
from typing import Any

from hbpo_jax.bucket import objects
from hbpo_jax.bucket.mirror import Mirror
from hbpo_jax.files import naming

COMMANDS = ("train", "sft", "evaluate", "regrade")  # Those whose --workdir may be a bucket.
SCRATCH = "HBPO_SCRATCH"  # Environment variable: where the local directories lie.
_INSIDE = re.compile(r"(?P<root>.+?)/(?P<inside>(?:checkpoints|best)(?:/\d+)?|export)")  # Of what `export` is given.


class _Open:
  """The mirror of this process's run."""
  mirror: Mirror | None = None


@contextlib.contextmanager
def opened(workdir: str, distributed_cfg: Any = None, *, with_units: bool = True) -> Iterator[str]:
  """A context with the local directory of a command's --workdir, which may also be local itself.

  Leaving it returns once the bucket has everything, also after an error.

  Args:
    distributed_cfg: Config.distributed of a command that may run in several processes.
    with_units: whether checkpoints and exports are fetched, too.
  Raises:
    ValueError: when a job has several processes, or the scratch is in use.
    BucketError: when the bucket cannot be used, before anything is computed, or could not be written at the end; that
      one names the directory where all is.
  """
  if not objects.is_url(workdir):
    yield workdir
    return
  objects.check("--workdir", workdir)
  if distributed_cfg is not None:
    _refuse_several(workdir, distributed_cfg)
  store = objects.Store(workdir)
  scratch = scratch_of(store.url)
  with _alone_in(scratch, store.url):
    mirror = Mirror(store, scratch, lambda unit: with_units)
    mirror.begin()
    _Open.mirror = mirror
    thread = threading.Thread(target=mirror.work, daemon=True)
    thread.start()
    try:
      yield str(scratch)
    except (Exception, SystemExit):
      mirror.end(thread, failed=True)
      raise
    else:
      mirror.end(thread)
    finally:
      _Open.mirror = None


def settle() -> None:
  """Returns once the bucket has what is on the disk now; does nothing where the working directory is no bucket.

  Called before a checkpoint, so that one at most is not in the bucket yet. A bucket that cannot be written is a
  warning, and the next pass tries again.

  Raises:
    BucketError: when another start of the run has taken the bucket over.
  """
  if _Open.mirror is not None:
    _Open.mirror.settle()


@contextlib.contextmanager
def reading(path: str, option: str, *, with_units: bool = False) -> Iterator[str]:
  """A context with a local copy of what a path names in a bucket, which goes when it is left; a local path as it is.

  Args:
    path: of a run or an evaluation; with_units also RUN/checkpoints, RUN/checkpoints/STEP, the same of best, and
      RUN/export.
    option: what gave the path, as errors name it.
    with_units: whether checkpoints and exports are wanted: those that the path names, or of a run all checkpoints.
  Raises:
    FileNotFoundError: when nothing lies there.
    BucketError: when the bucket cannot be read.
  """
  if not objects.is_url(path):
    yield path
    return
  objects.check(option, path)
  inside = _INSIDE.fullmatch(path.rstrip("/")) if with_units else None
  root, wanted = (inside["root"], inside["inside"]) if inside else (path.rstrip("/"), "checkpoints")
  needed = (wanted, "warmstart/export", "adapter") if with_units else ()
  is_needed = lambda unit: any(f"{unit}/".startswith(f"{name}/") for name in needed)
  store = objects.Store(root, option)
  base = scratch_of(store.url).parent
  base.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix="read-", dir=base) as folder:
    copy = Mirror(store, pathlib.Path(folder) / store.url.rpartition("/")[2], is_needed)
    if not copy.fetch(once=True):
      raise FileNotFoundError(f"{option}={path} holds nothing; give the URL of a run or an evaluation.")
    yield str(copy.scratch / inside["inside"] if inside else copy.scratch)


def scratch_of(url: str) -> pathlib.Path:
  """The local directory of a URL: in $HBPO_SCRATCH, or else in ~/.cache/hbpo_jax/buckets."""
  base = pathlib.Path(os.environ.get(SCRATCH) or "~/.cache/hbpo_jax/buckets").expanduser().absolute()
  name = re.sub(r"[^A-Za-z0-9.-]+", "_", url.partition("://")[2])[-60:].strip("._")
  return base / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def _refuse_several(workdir: str, cfg: Any) -> None:
  from hbpo_jax import distributed

  distributed.start(cfg)
  if distributed.n_processes() > 1:
    raise ValueError(
        f"--workdir={workdir} serves a job of one process, and this one has {distributed.n_processes()}, which need a "
        "directory that all of them see; mount the bucket (gcsfuse, as launch_tpu.sh does) and give its place.")


@contextlib.contextmanager
def _alone_in(scratch: pathlib.Path, url: str) -> Iterator[None]:
  """A context in which no other process of this machine uses the scratch."""
  scratch.parent.mkdir(parents=True, exist_ok=True)
  path = scratch.with_name(f"{scratch.name}.lock")
  with naming(path):
    lock = open(path, "a")  # noqa: SIM115 (naming is for this alone)
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(
          f"--workdir={url} is in use by another command on this machine; wait for it, or end it.") from None
    yield


