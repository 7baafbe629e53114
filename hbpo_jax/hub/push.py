"""Exports on their way to the hub, by huggingface_hub's own upload, which resumes when it is called again."""

import os
import pathlib

import huggingface_hub
from huggingface_hub import errors as hub_errors

from hbpo_jax.hub import repository
from hbpo_jax.hub.repository import HubError, shorten

# Weights of an earlier push, which may have been cut into other files.
_STALE = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
# The base of all errors of huggingface_hub's HTTP client, which is httpx or httpx2 by its version.
_CLIENT_ERROR: type[Exception] = hub_errors.HfHubHTTPError.__bases__[0]


def check_repository(field: str, name: str) -> None:
  """Raises unless `name`, the value of `field`, can be pushed to as far as is known without asking.

  Raises:
    ValueError: when it is no hub id, or there is no token.
  """
  if not repository.is_hub_id(name):
    raise ValueError(f"{field}={name!r} is not a hub id; write ORG/NAME, or leave it empty.")
  if repository.is_offline():
    raise ValueError(f"{field}={name!r} cannot be pushed to while HF_HUB_OFFLINE is set; unset it, or leave it empty.")
  if not huggingface_hub.get_token():
    raise ValueError(
        f"{field}={name!r} needs a token that may write; set HF_TOKEN (from {repository.endpoint()}/settings/tokens) "
        "or run 'hf auth login'.")


def push(
    directory: str | os.PathLike, name: str, *, folder: str = "", private: bool = True, revision: str = "",
    message: str = "") -> str:
  """Uploads a directory to the model repository ORG/NAME, which is made if it does not exist.

  Weights that are there and not in the directory are removed; other files stay. A second call sends only what is not
  there yet.

  Args:
    directory: with everything that is to be pushed; hidden files stay behind.
    name: ORG/NAME.
    folder: of the repository; '' is its top.
    private: whether a new repository is hidden from others.
    revision: branch, made if it does not exist; empty means the default branch.
    message: of the commit.
  Returns:
    The address of the commit.
  Raises:
    ValueError: as `check_repository`.
    HubError: when the hub refuses or the connection fails; the directory stays as it is.
  """
  check_repository("push", name)
  api = huggingface_hub.HfApi(endpoint=repository.endpoint())
  try:
    api.create_repo(name, private=private, exist_ok=True)
    if revision:
      api.create_branch(name, branch=revision, exist_ok=True)
    done = api.upload_folder(
        repo_id=name, folder_path=pathlib.Path(directory), path_in_repo=folder or None, revision=revision or None,
        commit_message=message or "Upload model with hbpo_jax", ignore_patterns=[".*"], delete_patterns=list(_STALE))
  except (_CLIENT_ERROR, hub_errors.OfflineModeIsEnabled, OSError, RuntimeError, ValueError) as error:
    raise HubError(_explain(name, error)) from error
  return str(done.commit_url)


def _explain(name: str, error: BaseException) -> str:
  while getattr(error, "response", None) is None and error.__cause__ is not None:
    error = error.__cause__  # A failed upload of one file hides the hub's answer.
  status = getattr(getattr(error, "response", None), "status_code", None)
  says = getattr(error, "server_message", None) or (f"HTTP {status}" if status else shorten(error))
  here = "what was exported stays"
  if status == 401:
    return (f"{name} was not pushed: the hub does not accept your token ({says}); make one that may write at "
            f"{repository.endpoint()}/settings/tokens and set HF_TOKEN or run 'hf auth login'; {here}.")
  if status == 403:
    return (f"{name} was not pushed: your token may not write there ({says}); take a name of your own account or "
            f"organisation, or a token with write permission; {here}.")
  if status == 404:
    return f"{name} was not pushed: it does not exist for your token ({says}); correct the name; {here}."
  return f"{name} was not pushed: {says}; {here}, and pushing it again sends only what is missing."
