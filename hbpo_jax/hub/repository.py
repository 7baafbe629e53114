"""A repository on the Hugging Face hub: its addresses, its list of files, and what a refusal of the hub means."""

from collections.abc import Callable
import dataclasses
import os
import re
import sys
import time
from typing import Any, TypeVar
from urllib.parse import quote

import huggingface_hub
import requests
import requests.auth

DEFAULT_ENDPOINT = "https://huggingface.co"
WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # Before each further try; one more failure than these ends the attempt.
TIMEOUT_S = 30  # Longest silence of the hub.
_LONGEST_REASON = 200
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
T = TypeVar("T")


class HubError(FileNotFoundError):
  """What was asked for is not here, and the hub did not give it; the text says why and what to do."""


class GatedError(HubError):
  """The repository is open only to those who accepted its terms.

  Attributes:
    status: of the hub's answer, 401 or 403.
  """

  def __init__(self, text: str, status: int):
    super().__init__(text)
    self.status = status


class Interrupted(Exception):
  """A try that may succeed when it is repeated: no connection, one that broke, or a server in trouble."""


class Token(requests.auth.AuthBase):
  """The reader's hub token, if there is one, as a header of a request to the hub.

  As an `auth` and not a plain header: requests then sends it to no other host that the hub redirects to, nor lets a
  .netrc file replace it.
  """

  def __init__(self, used: bool = True):
    self._used = used

  def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
    token = huggingface_hub.get_token() if self._used else None
    if token:  # HF_TOKEN, or what `hf auth login` stored.
      request.headers["Authorization"] = f"Bearer {token}"
    return request


@dataclasses.dataclass(frozen=True)
class Remote:
  """One file of a repository.

  size: bytes.
  digest: hex, SHA-256 of a file in large file storage, else git's SHA-1 of it; also its name in the cache.
  """
  path: str
  size: int
  digest: str


@dataclasses.dataclass(frozen=True)
class Repository:
  """ORG/NAME at a revision (a branch, tag or commit; empty = the default branch).

  kind: 'model' or 'dataset'.  anonymous: whether the token stays here even if there is one.
  """
  name: str
  revision: str = ""
  kind: str = "model"
  anonymous: bool = False

  def __str__(self) -> str:
    return f"model.path={self.name!r}" if self.kind == "model" else f"data set {self.name!r}"

  @property
  def page(self) -> str:
    """Where people read about it."""
    return f"{endpoint()}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

  def address(self, commit: str, path: str) -> str:
    """Where a file is downloaded."""
    return f"{self.page}/resolve/{commit}/{quote(path)}"

  def listing(self, say: Callable[[str], None], *, patient: bool = True) -> tuple[str, list[Remote]]:
    """(the commit that the revision stands for, its files).

    Args:
      say: is told of each try that fails and will be repeated.
      patient: False = try once.
    Raises:
      HubError: when the hub refuses.
      Interrupted: when it cannot be reached.
    """
    url = f"{endpoint()}/api/{self.kind}s/{self.name}"
    url += f"/revision/{quote(self.revision, safe='')}" if self.revision else ""
    answer = retried(lambda: self.get(f"{url}?blobs=true").json(), say, WAITS_S if patient else ())
    try:
      files = [_remote(entry) for entry in answer["siblings"]]
      commit = answer["sha"]
    except (KeyError, TypeError, ValueError) as error:
      raise HubError(
          f"{endpoint()} answers for {self.name} with something else than a list of files ({error!r}); check "
          "HF_ENDPOINT.") from error
    if not _COMMIT.fullmatch(str(commit)):
      raise HubError(f"{endpoint()} names no commit for {self.name} ({commit!r}); check HF_ENDPOINT.")
    return commit, files

  def get(self, url: str, *, first_byte: int = 0, stream: bool = False) -> requests.Response:
    """The hub's answer to one GET, from a byte on.

    Raises:
      HubError: when the hub refuses.
      Interrupted: when the same request may succeed later.
    """
    headers = {"Accept-Encoding": "identity", "User-Agent": "hbpo_jax"}
    if first_byte:
      headers["Range"] = f"bytes={first_byte}-"
    try:
      response = requests.get(url, headers=headers, auth=Token(not self.anonymous), stream=stream, timeout=TIMEOUT_S)
    except requests.RequestException as error:
      raise Interrupted(shorten(error)) from error
    if response.status_code == 416 or response.ok:
      return response
    with response:
      raise self._refusal(response)

  def _refusal(self, response: requests.Response) -> Exception:
    status, code = response.status_code, response.headers.get("X-Error-Code", "")
    text = response.headers.get("X-Error-Message", "")
    token = "your token does not open it" if huggingface_hub.get_token() else "there is no hub token"
    if code == "GatedRepo":
      return GatedError(
          f"{self} is gated, and {token} (HTTP {status}); accept its terms at {self.page}, and set HF_TOKEN or run "
          "'hf auth login'.", status)
    if code == "RevisionNotFound":
      field = "model.revision" if self.kind == "model" else "revision"
      return HubError(
          f"{field}={self.revision!r} does not exist in {self.page}; give one of its branches, tags or commits.")
    if code == "EntryNotFound":
      return HubError(f"{self}: {response.url} does not exist; the repository may have changed: try again.")
    if status == 401 and "invalid" in text.lower() and huggingface_hub.get_token():
      return HubError(
          f"{self}: the hub does not accept your token ({text}); make a new one at {endpoint()}/settings/tokens and "
          "set HF_TOKEN or run 'hf auth login'.")
    if code == "RepoNotFound" or status in (401, 404):
      hidden = "or your token does not open it" if huggingface_hub.get_token() else "or it is private"
      return HubError(
          f"{self} is neither a directory here nor a repository at {self.page}, {hidden} (HTTP {status}); correct the "
          "name, or set HF_TOKEN to a token that may read it."
          if self.kind == "model" else
          f"{self} does not exist at {self.page}, {hidden} (HTTP {status}); set HF_TOKEN to a token that may read it.")
    if status in (408, 425, 429) or status >= 500:
      return Interrupted(f"HTTP {status} {response.reason}")
    return HubError(f"{self}: {response.url} answers HTTP {status} {text or response.reason}; see {self.page}.")


def endpoint() -> str:
  """The address of the hub; HF_ENDPOINT names another."""
  return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def is_offline() -> bool:
  """Whether HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids to ask the hub."""
  return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in
             ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def is_hub_id(text: str) -> bool:
  """Whether a text has the form ORG/NAME."""
  return bool(_HUB_ID.fullmatch(text)) and ".." not in text and "--" not in text


def is_commit(text: str) -> bool:
  """Whether a text is the full hash of a commit."""
  return bool(_COMMIT.fullmatch(text))


def say(text: str) -> None:
  """A line for the reader, on stderr."""
  print(text, file=sys.stderr, flush=True)


def shorten(error: BaseException) -> str:
  """An error in some words: its first cause, for HTTP clients wrap it in addresses and objects at length."""
  if isinstance(error, requests.Timeout):
    return f"silence for {TIMEOUT_S} s"
  while cause := error.__cause__ or error.__context__:
    error = cause
  words = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
  text = " ".join(words.split())
  return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."


def retried(attempt: Callable[[], T], say: Callable[[str], None], waits_s: tuple[float, ...]) -> T:
  """What `attempt` returns, which is called again after each Interrupted and wait; the last one is raised."""
  for wait_s in waits_s:
    try:
      return attempt()
    except Interrupted as error:
      say(f"the hub does not answer ({error}); next try in {wait_s:g} s")
      time.sleep(wait_s)
  return attempt()


def _remote(entry: dict[str, Any]) -> Remote:
  lfs = entry.get("lfs") or {}
  digest = lfs.get("sha256") or entry["blobId"]
  if not _DIGEST.fullmatch(digest):
    raise ValueError(f"{entry['rfilename']} has the digest {digest!r}")
  return Remote(entry["rfilename"], int(lfs.get("size", entry["size"])), digest)
