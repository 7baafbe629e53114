"""The objects below one URL of a bucket, such as gs://BUCKET/DIR: whole reads and writes, tried again where that helps.

It goes through fsspec, as etils.epath does, whose clients are imported where a bucket is opened, and not above. What a
client raises becomes one sentence with the URL and the remedy.
"""

import base64
from collections.abc import Callable, Iterable
import contextlib
import dataclasses
import importlib
import logging
import os
import pathlib
import re
import time
from typing import Any, TypeVar

from hbpo_jax import files

# Of the schemes that etils.epath knows, those of buckets: the package that fsspec needs, and how to install it.
SCHEMES = {"gs": ("gcsfs", "'hbpo_jax[gcs]'"), "s3": ("s3fs", "s3fs"), "az": ("adlfs", "adlfs")}
WAITS_S = (2.0, 10.0, 30.0)  # Between attempts of ours; gcsfs makes six of its own in each, over half a minute.
_TIMEOUT_S = 300.0  # Of one request, which sends at most 50 MB.
_log = logging.getLogger(__name__)
T = TypeVar("T")


class BucketError(ValueError):
  """A bucket that cannot be read or written; its text names the URL and the remedy.

  Attributes:
    brief: the text without the remedy.
    is_final: whether trying again cannot help, as nobody may write there.
  """

  def __init__(self, brief: str, remedy: str, *, is_final: bool = False):
    super().__init__(f"{brief}; {remedy}.")
    self.brief, self.is_final = brief, is_final


@dataclasses.dataclass(frozen=True)
class Entry:
  """An object. size: bytes.  md5: of its content, hex; '' where the store does not say."""
  size: int
  md5: str = ""


def is_url(path: str) -> bool:
  """Whether a path names something that is not on a disk."""
  return "://" in path


def check(option: str, url: str) -> None:
  """Raises ValueError unless a URL can be the place of a run; names the option. Nothing is asked of the bucket yet."""
  scheme, _, rest = url.partition("://")
  if scheme not in SCHEMES:
    known = ", ".join(f"{s}://" for s in SCHEMES)
    raise ValueError(
        f"{option}={url} is no directory; give one, or a bucket: by {known}, or mounted (gcsfuse, as launch_tpu.sh "
        "does).")
  name, _, folder = rest.partition("/")
  parts = folder.rstrip("/").split("/")
  if not name or not all(part not in ("", ".", "..") for part in parts) or not rest.isprintable():
    raise ValueError(f"{option}={url} is a whole bucket or no clean path; name a folder in it, as {scheme}://BUCKET/DIR.")


class Store:
  """The objects below a URL, by their names relative to it."""

  def __init__(self, url: str, option: str = "--workdir"):
    """Opens the client; nothing is asked of the bucket yet.

    Args:
      option: what gave the URL, as errors name it.
    Raises:
      ValueError: when the URL cannot be used, or the client is not installed.
      BucketError: when the client finds no credentials.
    """
    check(option, url)
    self.url, self._option = url.rstrip("/"), option
    scheme, _, root = self.url.partition("://")
    self._root = "/".join(part for part in root.split("/") if part)
    self._fs = self._once("open it", lambda: _client(scheme, self.url, option))

  def list(self, *, once: bool = False) -> dict[str, Entry]:
    """All objects by name; once: as of `write`."""
    def find() -> dict[str, Any]:
      self._fs.invalidate_cache()
      return self._fs.find(self._root, detail=True)

    found = (self._once if once else self._trying)("list", find)
    prefix = self._root + "/"
    return {
        name.removeprefix(prefix): Entry(int(info["size"]), _md5(info)) for name, info in found.items()
        if name.startswith(prefix) and info.get("type") == "file" and not name.endswith("/")}

  def read(self, name: str) -> bytes | None:
    """The content of an object, None where there is none."""
    def cat() -> bytes | None:
      try:
        return self._fs.cat_file(self._path(name))
      except FileNotFoundError:
        return None

    return self._trying(f"read {name}", cat)

  def write(self, name: str, content: bytes, *, once: bool = False) -> None:
    """Puts an object in place, whole.

    Args:
      once: whether to give up at the first failure of the client.
    """
    attempt = self._once if once else self._trying
    attempt(f"write {name}", lambda: self._fs.pipe_file(self._path(name), content))

  def put(self, name: str, path: pathlib.Path) -> None:
    """Puts an object in place with the content of a file that does not change.

    Raises:
      FileNotFoundError: when the file has gone.
    """
    self._trying(f"write {name}", lambda: self._fs.put_file(str(path), self._path(name)), path)

  def get(self, name: str, path: pathlib.Path) -> None:
    """Writes an object to a file, whole or not at all."""
    aside = path.with_name(f".{path.name}.fetched")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      with files.naming(path):
        self._trying(f"read {name}", lambda: self._fs.get_file(self._path(name), str(aside)))
      os.replace(aside, path)
    finally:
      aside.unlink(missing_ok=True)

  def delete(self, names: Iterable[str]) -> None:
    """Removes objects, in this order; one that is not there is no error."""
    for name in names:
      def remove(path: str = self._path(name)) -> None:
        with contextlib.suppress(FileNotFoundError):  # An attempt that came through, though its answer did not.
          self._fs.rm_file(path)

      self._trying(f"delete {name}", remove)

  def _path(self, name: str) -> str:
    return f"{self._root}/{name}"

  def _trying(self, what: str, call: Callable[[], T], path: pathlib.Path | None = None) -> T:
    """What `call` returns, tried again after WAITS_S; `path` is the local file that it reads."""
    for wait_s in WAITS_S:
      try:
        return self._once(what, call, path)
      except BucketError as error:
        if error.is_final:
          raise
        _log.warning("%s; trying again in %g s.", error.brief, wait_s)
        time.sleep(wait_s)
    return self._once(what, call, path)

  def _once(self, what: str, call: Callable[[], T], path: pathlib.Path | None = None) -> T:
    try:
      return call()
    except BucketError:
      raise
    except Exception as error:  # The clients raise what the libraries below them do.
      if files.storage_trouble(error) or (path is not None and not path.exists()):
        raise
      reason, remedy, is_final = _explain(error)
      raise BucketError(f"{self._option}={self.url}: {reason} ({what})", remedy, is_final=is_final) from error


def _client(scheme: str, url: str, option: str) -> Any:
  """The file system of fsspec."""
  package, install = SCHEMES[scheme]
  try:
    importlib.import_module(package)
    import fsspec
  except ImportError as error:
    raise BucketError(
        f"{option}={url} needs {package}, which is not installed", f"pip install {install}", is_final=True) from error
  options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
  if scheme != "gs":
    return fsspec.filesystem(scheme, **options)
  from gcsfs import core

  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # It prints the traceback of what it raises.
  if os.environ.get("STORAGE_EMULATOR_HOST"):
    options["token"] = "anon"  # Else it looks for credentials that no emulator asks for.
  # Not the class for zonal buckets, which speaks gRPC.
  return core.GCSFileSystem(consistency="md5", requests_timeout=_TIMEOUT_S, **options)


def _md5(info: dict[str, Any]) -> str:
  value = info.get("md5Hash")
  return base64.b64decode(value).hex() if value else ""


def _explain(error: Exception) -> tuple[str, str, bool]:
  """(what is wrong, the remedy, whether trying again cannot help) of what a client raised."""
  text, code = " ".join(str(error).split()), str(getattr(error, "code", ""))
  if isinstance(error, FileNotFoundError) or code == "404":
    return "there is no such bucket", "create it, or mend the name", True
  if isinstance(error, PermissionError) or code in ("401", "403") or "Forbidden" in text or "redential" in text:
    return ("no permission", "sign in (gcloud auth application-default login) or give this account "
            "roles/storage.objectUser on the bucket", True)
  short = re.sub(r"https?://\S+", "", text)[:160].strip()
  return (f"it does not answer as it should: {type(error).__name__}{': ' if short else ''}{short}",
          "see to the network and the bucket, and try again", code == "400")
