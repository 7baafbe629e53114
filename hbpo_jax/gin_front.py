"""The gin front end: the same settings as --config.field, under the names of the dataclasses in hbpo_jax/config.py.

`RolloutConfig.budgets = (16, 32)` in a gin file means `--config.rollout.budgets=16,32`, and `Config.seed = 1`
means `--config.seed=1`. Needs the extra `gin`.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import difflib
import functools
import pathlib
import re
import tokenize
from typing import Any

from hbpo_jax import config


def sections(cls: type = config.Config, prefix: str = "") -> dict[str, tuple[type, str]]:
  """The settings dataclasses by class name: (class, dotted prefix of its fields, such as 'rollout.')."""
  found = {cls.__name__: (cls, prefix)}
  for f in dataclasses.fields(cls):
    if dataclasses.is_dataclass(f.type):
      found |= sections(f.type, f"{prefix}{f.name}.")  # pyright: ignore[reportArgumentType]
  return found


def read(files: Sequence[str], params: Sequence[str]) -> dict[str, Any]:
  """The settings that gin files and bindings give, by dotted field name.

  Args:
    files: paths of gin files, read in order.
    params: bindings such as "RolloutConfig.queries = 8", applied after the files.
  Returns:
    {dotted field name: value}, only what was bound; later bindings win.
  Raises:
    ValueError: when gin-config is not installed, or a name or value is not understood.
    FileNotFoundError: when a file does not exist.
  """
  try:
    import gin
  except ImportError as error:
    raise ValueError(
        "--gin_file and --gin_param need gin-config, which is missing; run: pip install 'hbpo_jax[gin]'.") from error
  paths = [pathlib.Path(path).expanduser() for path in files]  # No shell expands the ~ of --gin_file=~/my.gin.
  for path in paths:
    if not path.is_file():
      raise FileNotFoundError(f"--gin_file={path} does not exist; give the path of a gin file.")
  _register()
  gin.clear_config()
  try:
    for path in paths:
      with _named(f"--gin_file={path}: "):
        gin.parse_config_file(str(path))
    with _named(""):
      gin.parse_config(list(params))
      _refuse_scopes(gin.config_str())
      return _bound(gin)
  finally:
    gin.clear_config()


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
  """A context in which gin's errors become one line of ours."""
  try:
    yield
  except (ValueError, SyntaxError, TypeError, OSError, ImportError, tokenize.TokenError) as error:
    text = error.args[0] if isinstance(error, tokenize.TokenError) else _one_line(error)
    raise ValueError(f"gin: {where}{text}; {_hint(str(error))}") from error


@functools.cache
def _register() -> None:
  import gin
  for cls, _ in sections().values():
    gin.external_configurable(cls, module="hbpo_jax.config")


def _bound(gin: Any) -> dict[str, Any]:
  table = config.field_table()
  values = {}
  for name, (_, prefix) in sections().items():
    for field, value in gin.get_bindings(f"hbpo_jax.config.{name}").items():
      if prefix + field not in table:
        raise ValueError(f"{name}.{field} is a section, not a setting")
      values[prefix + field] = value
  return values


def _refuse_scopes(text: str) -> None:
  # A scoped binding would parse and then have no effect.
  if scoped := re.search(r"^(\S+/\S+\.\w+) =", text, flags=re.MULTILINE):
    raise ValueError(f"{scoped[1]} is scoped, and settings have no scopes")


def _one_line(error: BaseException) -> str:
  return re.sub(r"\s*\n\s*", " ", str(error)).rstrip(". ^")


def _hint(text: str) -> str:
  known = {f"{name}.{f.name}": None for name, (cls, _) in sections().items() for f in dataclasses.fields(cls)}
  if parameter := re.search(r"Configurable '(\w+)' doesn't have a parameter named '(\w+)'", text):
    near = difflib.get_close_matches(f"{parameter[1]}.{parameter[2]}", known, n=3)
  elif name := re.search(r"No configurable matching '(\w+)'", text):
    near = difflib.get_close_matches(name[1], sections(), n=3)
  else:
    near = []
  return f"did you mean {' or '.join(near)}?" if near else "the names are those of hbpo_jax/config.py."
