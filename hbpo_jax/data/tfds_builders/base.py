"""The part that our TFDS builders share: fetch files from the Hugging Face hub, read them, write one schema."""

from collections.abc import Iterator
import csv
import json
import os
from typing import Any, ClassVar

from etils import epath
import huggingface_hub
import numpy as np
import pyarrow.parquet
import requests
import requests.auth
import tensorflow_datasets as tfds

from hbpo_jax.data import choices
from hbpo_jax.files import atomic_write_bytes

DEFAULT_ENDPOINT = "https://huggingface.co"
_TIMEOUT_S = 30


def hub_url(repo: str, path: str) -> str:
  """Download address of one file of a hub data set; the hub's own HF_ENDPOINT variable chooses a mirror."""
  endpoint = os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT
  return f"{endpoint.rstrip('/')}/datasets/{repo}/resolve/main/{path}"


class HubToken(requests.auth.AuthBase):
  """The reader's hub token, if there is one, as a header of a request to the hub.

  As an `auth` and not a plain header: requests then sends it to no other host that the hub redirects to, nor lets a
  .netrc file replace it.
  """

  def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
    if token := huggingface_hub.get_token():  # HF_TOKEN, or what `hf auth login` stored.
      request.headers["Authorization"] = f"Bearer {token}"
    return request


class HubProblems(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Problems of one hub data set, in array_record files that are written and read without TensorFlow.

  A subclass names REPO and FILES and turns one row of a file into the schema with `convert`.
  """

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}
  REPO: ClassVar[str]  # 'owner/name' on the hub
  FILES: ClassVar[dict[str, str]]  # split -> path in the repository; .json, .jsonl, .csv or .parquet
  GATED: ClassVar[bool] = False  # Whether the hub gives it only to readers who accepted its terms.

  def convert(self, row: dict[str, Any], index: int) -> dict[str, Any]:
    """id, problem, answer, and where the source has them level and answers, of row `index` of a file."""
    raise NotImplementedError

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text
    return self.dataset_info_from_configs(
        description=f"Problems with final answers of {self.REPO} on the Hugging Face hub.",
        homepage=f"{DEFAULT_ENDPOINT}/datasets/{self.REPO}",
        features=tfds.features.FeaturesDict({
            "id": text(), "problem": text(), "answer": text(), "source": text(),
            "level": tfds.features.Scalar(np.int32),  # 0 = the source has none
            "answers": tfds.features.Sequence(text()),
        }))

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    urls = {split: hub_url(self.REPO, path) for split, path in self.FILES.items()}
    paths: Any  # The same dictionary, with a path for each address.
    if self.GATED:
      paths = {split: self._download_gated(url, dl_manager.download_dir) for split, url in urls.items()}
    else:
      for url in urls.values():
        # TFDS tries for minutes before it reports a server that cannot be reached.
        requests.head(url, allow_redirects=True, timeout=_TIMEOUT_S).raise_for_status()
      paths = dl_manager.download(urls)
    return {split: self._generate_examples(paths[split], self.FILES[split]) for split in self.FILES}

  def _download_gated(self, url: str, directory: epath.Path) -> epath.Path:
    """Where a file now lies; TFDS's own downloads cannot carry a token."""
    path = epath.Path(directory) / f"{self.name}_{url.rpartition('/')[2]}"
    with requests.get(url, timeout=_TIMEOUT_S, auth=HubToken()) as response:
      response.raise_for_status()
      atomic_write_bytes(path, response.content)
    return path

  def _generate_examples(self, path: epath.Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, row in enumerate(read_rows(path, name)):
      example = {"level": 0, **self.convert(row, index), "source": self.name}
      # TFDS orders examples by a hash of their key.
      yield example["id"], {"answers": [example["answer"]], **example}


def read_rows(path: epath.Path, name: str) -> list[dict[str, Any]]:
  """The rows of a downloaded file.

  Args:
    path: where it lies; TFDS gives downloads names of its own.
    name: its name at the source, which tells the format.
  Raises:
    ValueError: when it cannot be parsed, or its format is not known.
  """
  try:
    if name.endswith(".parquet"):
      return pyarrow.parquet.read_table(os.fspath(path)).to_pylist()
    text = epath.Path(path).read_text(encoding="utf-8")
    if name.endswith(".jsonl"):
      return [json.loads(line) for line in text.split("\n") if line.strip()]
    if name.endswith(".json"):
      return json.loads(text)
    if name.endswith(".csv"):
      return choices.read_csv(text.removeprefix("\ufeff"))
  except (ValueError, csv.Error, pyarrow.ArrowException) as error:
    raise ValueError(
        f"The download {name} cannot be parsed ({error}); delete {path} and prepare the data again.") from error
  raise ValueError(f"The format of {name} is not known; use .json, .jsonl, .csv or .parquet.")
