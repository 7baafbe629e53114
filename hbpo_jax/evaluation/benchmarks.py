"""The benchmarks that evaluations know by name, and those that a file or a TFDS data set makes."""

from collections.abc import Sequence
import dataclasses
import difflib
import pathlib
import re

from hbpo_jax import user_code
from hbpo_jax.config import DataConfig
from hbpo_jax.data import choices
from hbpo_jax.data import problems as problems_lib
from hbpo_jax.evaluation.store import Benchmark

__all__ = ["NAMES", "Benchmark", "Known", "load", "load_all"]

_TFDS = "tfds:"
SYNTHETIC_PROBLEMS = 512  # Of the synthetic benchmark, where data.n_eval is 0.


@dataclasses.dataclass(frozen=True)
class Known:
  """title: as papers write it.  source: as data.source.  split: TFDS split, or that of the synthetic task."""
  title: str
  source: str
  split: str = "test"


NAMES: dict[str, Known] = {
    "gsm8k": Known("GSM8K", "tfds:gsm8k"),
    "math500": Known("MATH500", "tfds:math500"),
    "olympiadbench": Known("OlympiadBench", "tfds:olympiadbench"),
    "aime24": Known("AIME24", "tfds:aime24"),
    "aime25": Known("AIME25", "tfds:aime25"),
    "amc": Known("AMC", "tfds:amc"),
    "minerva": Known("Minerva", "tfds:minerva"),
    "gpqa_diamond": Known("GPQA-Diamond", "tfds:gpqa_diamond"),
    "synthetic": Known("Synthetic", "synthetic", "eval"),
}

# Other names under which the sets are passed around, letters and digits only.
_ALIASES = {"aime2024": "aime24", "aime2025": "aime25", "minervamath": "minerva"}


def load(name_or_file: str, data_cfg: DataConfig, seed: int) -> Benchmark:
  """One benchmark.

  Args:
    name_or_file: one of NAMES, 'tfds:NAME[/CONFIG][@SPLIT]' (data.eval_split where there is no split), a JSON Lines
      file, 'FILE.py:function', or a CSV file of GPQA.
    data_cfg: TFDS directory, and the synthetic task, of which data.n_eval problems are made (0 = 512).
    seed: of the synthetic task.
  Raises:
    ValueError: when it is none of these, or cannot be read; names it and the remedy.
  """
  name, title = _identify(name_or_file)
  if name_or_file in NAMES:
    known = NAMES[name_or_file]
    n = (data_cfg.n_eval or SYNTHETIC_PROBLEMS) if known.source == "synthetic" else 0
    found = problems_lib.load(
        known.source, split=known.split, data_dir=data_cfg.data_dir, synthetic_cfg=data_cfg.synthetic, seed=seed, n=n)
  elif name_or_file.startswith(_TFDS):
    data_set, _, split = name_or_file.removeprefix(_TFDS).partition("@")
    found = problems_lib.load_tfds(data_set, split or data_cfg.eval_split, data_cfg.data_dir)
  elif name_or_file.endswith(".csv"):
    found = choices.load_gpqa(pathlib.Path(name_or_file).expanduser())
  elif user_code.is_in_file(name_or_file):
    found = problems_lib.load_function(name_or_file)
  else:
    found = problems_lib.load_jsonl(pathlib.Path(name_or_file).expanduser())
  return Benchmark(name, title, tuple(found))


def load_all(names: Sequence[str], data_cfg: DataConfig, seed: int, limit: int = 0) -> list[Benchmark]:
  """The benchmarks of a list, each with its first `limit` problems (0 = all).

  Raises:
    ValueError: when the list is empty, one cannot be loaded, or two have the same name; before anything is loaded,
      where the names tell.
  """
  if not names:
    raise ValueError(f"config.benchmarks is empty; give one or more of {', '.join(NAMES)}, or files.")
  if limit < 0:
    raise ValueError(f"config.eval.limit={limit} is negative; give a number of problems, or 0 for all.")
  given_as: dict[str, str] = {}
  for given in names:
    name, _ = _identify(given)
    before = given_as.setdefault(name, given)
    if list(names).count(given) > 1:
      raise ValueError(f"config.benchmarks names {given!r} more than once; give it once.")
    if before != given:
      raise ValueError(
          f"config.benchmarks: {before!r} and {given!r} would both be called {name!r}; rename a file.")
  loaded = [load(given, data_cfg, seed) for given in names]
  return [dataclasses.replace(b, problems=b.problems[:limit or None]) for b in loaded]


def _identify(given: str) -> tuple[str, str]:
  """(name, title) of what config.benchmarks lists; refuses what is no benchmark, without reading it."""
  if given in NAMES:
    return given, NAMES[given].title
  if given.startswith(_TFDS):
    return _named(given.removeprefix(_TFDS))
  if user_code.is_in_file(given):
    return _named(pathlib.Path(given.rpartition(":")[0]).stem)
  path = pathlib.Path(given).expanduser()
  if not path.is_file():
    near = difflib.get_close_matches(given.lower(), NAMES, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"config.benchmarks: {given!r} is neither a known benchmark nor a file; {hint}give one of "
        f"{', '.join(NAMES)}, tfds:NAME[@SPLIT], or a JSON Lines file.")
  if path.suffix not in (".jsonl", ".csv"):
    raise ValueError(
        f"config.benchmarks: {given!r} ends neither in .jsonl nor in .csv; give problems as JSON Lines, or GPQA's "
        "CSV file.")
  return _named(path.stem)


def _named(text: str) -> tuple[str, str]:
  """(name, title) of a file's stem or a data set; a well-known one gets its title."""
  name = re.sub(r"[^a-z0-9_.-]+", "_", text.lower()).strip("._-")
  plain = _plain(re.sub(r"[-_@]test$", "", text.lower()))
  known = {_plain(n): n for n in NAMES} | _ALIASES
  return name or "benchmark", NAMES[known[plain]].title if plain in known else text


def _plain(text: str) -> str:
  return re.sub(r"[^a-z0-9]+", "", text)
