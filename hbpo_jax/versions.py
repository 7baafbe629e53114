"""Versions of what decides a run's numbers."""

import importlib.metadata
import platform

_PACKAGES = ("hbpo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tokenizers",
             "numpy", "ml_collections", "math-verify", "libtpu")


def installed() -> dict[str, str]:
  """Python and the installed packages by name; one that is not installed is left out."""
  found = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue  # libtpu off TPUs; our own package, run from a checkout that is not installed.
  return found
