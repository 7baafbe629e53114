"""The part that our TFDS builders share: fetch files from the Hugging Face hub, read them, write one schema."""

from collections.abc import Iterator
import csv
import json
import os
from typing import Any, ClassVar

from etils import epath
import numpy as np
import pyarrow.parquet
import tensorflow_datasets as tfds

from hbpo_jax import hub
from hbpo_jax.data import choices


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
        homepage=f"{hub.DEFAULT_ENDPOINT}/datasets/{self.REPO}",
        features=tfds.features.FeaturesDict({
            "id": text(), "problem": text(), "answer": text(), "source": text(),
            "level": tfds.features.Scalar(np.int32),  # 0 = the source has none
            "answers": tfds.features.Sequence(text()),
        }))

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    del dl_manager  # Its downloads carry no token, do not resume, and try for minutes to reach a hub that is not there.
    splits = list(self.FILES)
    paths = hub.data_files(self.REPO, [self.FILES[split] for split in splits], anonymous=not self.GATED)
    return {split: self._generate_examples(epath.Path(path), self.FILES[split])
            for split, path in zip(splits, paths, strict=True)}

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
