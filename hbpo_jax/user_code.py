"""Functions of the user's own that a setting names: 'package.module.function', or 'FILE.py:function'."""

from collections.abc import Callable
import functools
import importlib
import importlib.util
import pathlib
import sys
import types
from typing import Any


def is_name(spec: str) -> bool:
  """Whether a text has the form of such a name; whether there is such a function shows when it is loaded."""
  if is_in_file(spec):
    return True
  parts = spec.replace(":", ".").split(".")
  return len(parts) > 1 and all(part.isidentifier() for part in parts)


def is_in_file(spec: str) -> bool:
  """Whether a text names a function of a file, 'FILE.py:function'."""
  file, _, function = spec.rpartition(":")
  return file.endswith(".py") and function.isidentifier()


def load(spec: str, field: str) -> Callable[..., Any]:
  """The function of that name. A file is run once in a process, however many of its functions are loaded.

  Args:
    spec: 'package.module.function', or 'FILE.py:function' with a path that counts from the working directory.
    field: the setting that names it, for errors.
  Raises:
    ValueError: when there is no such module, file or function, or the file fails; names the setting and the remedy.
  """
  where = f"{field}={spec!r}"
  if not is_name(spec):
    raise ValueError(f"{where} is not a dotted path; give 'package.module.function' or 'FILE.py:function'.")
  module_name, _, name = spec.rpartition(":") if is_in_file(spec) else spec.replace(":", ".").rpartition(".")
  module = _from_file(module_name, where) if is_in_file(spec) else _imported(module_name, where)
  if not callable(getattr(module, name, None)):
    raise ValueError(f"{where}: {module_name!r} has no function {name!r}; check the name.")
  return getattr(module, name)


def _imported(name: str, where: str) -> types.ModuleType:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ValueError(
        f"{where}: cannot import {name!r} ({error}); install it or put it on PYTHONPATH, or name its file, as in "
        "'FILE.py:function'.") from error


def _from_file(file: str, where: str) -> types.ModuleType:
  path = pathlib.Path(file).expanduser().resolve()
  if not path.is_file():
    raise ValueError(f"{where}: there is no file {str(path)!r}; give its path from the working directory.")
  try:
    return _run(path)
  except (ImportError, SyntaxError) as error:
    raise ValueError(f"{where}: the file fails ({type(error).__name__}: {error}); mend it.") from error


@functools.cache
def _run(path: pathlib.Path) -> types.ModuleType:
  name = f"hbpo_jax_user_code_{path.stem}_{len(sys.modules)}"
  spec = importlib.util.spec_from_file_location(name, path)
  if spec is None or spec.loader is None:
    raise ImportError(f"{path} is no Python file")
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module  # Dataclasses and pickle look their module up there.
  try:
    spec.loader.exec_module(module)
  except BaseException:
    del sys.modules[name]
    raise
  return module
