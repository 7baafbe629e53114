"""TFDS builders of maths problem sets that read and write array_record without TensorFlow.

Importing this package registers them with TFDS; `prepare` is what the rest of the library calls.
"""

import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered
from tensorflow_datasets.text import gsm8k as gsm8k  # TFDS knows this one of its own only once it is imported.

from hbpo_jax import hub
from hbpo_jax.data.tfds_builders import math_sets as math_sets  # Registers the builders.
from hbpo_jax.data.tfds_builders.base import HubProblems as HubProblems

FILE_FORMAT = "array_record"


def prepare(name: str, data_dir: str = "") -> tfds.core.DatasetBuilder:
  """The TFDS builder of a data set that lies in `data_dir`; downloads and writes it first if it is not there.

  Args:
    name: 'NAME' or 'NAME/CONFIG', ours or of the TFDS catalogue.
    data_dir: where data sets are stored; empty means the TFDS default.
  Raises:
    ValueError: when there is no such data set, it cannot be downloaded or parsed, or it was stored in a format that
      needs TensorFlow.
  """
  try:
    builder = tfds.builder(name, data_dir=data_dir or None, file_format=FILE_FORMAT)
  except registered.DatasetNotFoundError as error:
    raise ValueError(f"data.source='tfds:{name}' does not exist; see tfds.list_builders(), or give a file.") from error
  try:
    builder.download_and_prepare(file_format=FILE_FORMAT)
  except hub.GatedError as error:
    raise ValueError(f"'tfds:{name}': {error} Or give its file, or a JSON Lines file, as data.source.") from error
  except (requests.RequestException, tfds.download.DownloadError, OSError) as error:
    raise ValueError(_unreachable(name, error)) from error
  return builder


def _unreachable(name: str, error: Exception) -> str:
  return (
      f"'tfds:{name}' cannot be downloaded ({error}); check the network, choose a mirror of the hub with HF_ENDPOINT,"
      " or give a JSON Lines file as data.source.")
