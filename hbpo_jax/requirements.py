"""What checks of settings are written with."""

from collections.abc import Sequence
import itertools

from hbpo_jax import config


def require(holds: bool, cfg: config.Config, field: str, problem: str, remedy: str) -> None:
  """Raises a ValueError that names a setting, its value, the problem and the remedy, unless `holds`."""
  if not holds:
    raise ValueError(f"config.{field}={config.get(cfg, field)!r} {problem}; {remedy}.")


def increasing(values: Sequence[int]) -> bool:
  """Whether each value is larger than the one before it."""
  return all(a < b for a, b in itertools.pairwise(values))
