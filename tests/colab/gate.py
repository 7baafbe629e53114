"""A grader that holds a run at a known place, so that a test can interrupt it there whatever the machine's speed."""

import os
import pathlib
import time


def score_by_length(responses, problems):
  """Parity of the length; waits while $HBPO_TEST_GATE exists and the run beside it has a checkpoint."""
  gate = os.environ.get("HBPO_TEST_GATE", "")
  while gate and pathlib.Path(gate).exists() and has_checkpoint(pathlib.Path(gate).with_suffix("")):
    time.sleep(0.02)
  return [float(len(response) % 2) for response in responses]


def has_checkpoint(workdir: pathlib.Path) -> bool:
  """Whether a run has a finished checkpoint."""
  return any(p.name.isdecimal() for p in (workdir / "checkpoints").glob("[0-9]*"))
