"""What the tests of whole runs share."""

import pytest

from tests.system import runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  """A directory with a model and problems; see `runs.make_inputs`."""
  folder = tmp_path_factory.mktemp("inputs")
  runs.make_inputs(folder)
  return folder
