"""Where problems come from: JSON Lines files, TFDS, functions of the user's, and the synthetic task."""

import codecs
from collections.abc import Iterable, Iterator, Mapping
import itertools
import json
import pathlib
import re
from typing import Any

import numpy as np

from hbpo_jax import user_code
from hbpo_jax.config import DataConfig, SyntheticConfig
from hbpo_jax.data import choices as choices_lib
from hbpo_jax.data import synthetic
from hbpo_jax.data.record import Problem
from hbpo_jax.files import parse_json

__all__ = ["Problem", "load", "load_function", "load_jsonl", "load_tfds", "load_train_and_eval", "split_eval"]

_REQUIRED = ("id", "problem", "answer", "source")
_KNOWN = (*_REQUIRED, "level", "answers")
_MAX_LINE = 16 << 20  # bytes
_MAX_LEVEL = 10**6


def load(
    source: str, *, split: str = "train", data_dir: str = "", synthetic_cfg: SyntheticConfig = SyntheticConfig(),
    seed: int = 0, n: int = 0,
) -> list[Problem]:
  """All problems of a source.

  Args:
    source: 'synthetic', 'tfds:NAME[/CONFIG]', 'FILE.py:function', or the path of a JSON Lines file.
    split: TFDS split; 'train' or 'eval' for the synthetic task; a file has none.
    data_dir: TFDS data directory; empty means the TFDS default.
    synthetic_cfg: levels and modulus of the synthetic task.
    seed: of the synthetic task.
    n: problems to make, for the synthetic task (0 = synthetic_cfg.n_problems); for the others, how many of the first
      are kept (0 = all).
  Returns:
    At least one problem; ids are unique.
  Raises:
    ValueError: when the source cannot be read, naming it and the remedy.
  """
  if source == "synthetic":
    return synthetic.problems(synthetic_cfg, seed, split, n or synthetic_cfg.n_problems)
  if source.startswith("tfds:"):
    found = load_tfds(source.removeprefix("tfds:"), split, data_dir)
  elif user_code.is_in_file(source):
    found = load_function(source)
  elif not source:
    raise ValueError("data.source='' is empty; give 'synthetic', a JSON Lines file, or 'tfds:NAME'.")
  else:
    found = load_jsonl(source)
  return found[:n] if n else found


def load_train_and_eval(cfg: DataConfig, seed: int) -> tuple[list[Problem], list[Problem]]:
  """Training problems (after data.limit) and the evaluation problems of a run, which share no problem text.

  Evaluation problems come from data.eval_source; where that is empty, from the synthetic task's own evaluation split
  or, for other sources, out of the training problems. From a larger evaluation source n_eval are drawn by the seed.

  Raises:
    ValueError: when a source cannot be read or holds too few problems.
  """
  common = {"data_dir": cfg.data_dir, "synthetic_cfg": cfg.synthetic}
  if cfg.eval_source == "synthetic" or (not cfg.eval_source and cfg.source == "synthetic"):
    held_out = load("synthetic", split="eval", seed=seed, n=cfg.n_eval, **common) if cfg.n_eval else []
  elif cfg.eval_source:
    held_out = load(cfg.eval_source, split=cfg.eval_split, **common) if cfg.n_eval else []
    if len(held_out) > cfg.n_eval:
      _, held_out = split_eval(held_out, cfg.n_eval, seed)
  else:
    held_out = None
  train = load(cfg.source, split=cfg.split, seed=seed, **common)
  if held_out is None:
    train, held_out = split_eval(train, cfg.n_eval, seed)
  texts = {p.problem for p in held_out}
  train = [p for p in train if p.problem not in texts]
  if cfg.limit:
    train = train[:cfg.limit]
  if not train:
    raise ValueError(
        f"data.source={cfg.source!r} holds no problem outside the evaluation; lower data.n_eval={cfg.n_eval}.")
  return train, held_out


def split_eval(problems: list[Problem], n_eval: int, seed: int) -> tuple[list[Problem], list[Problem]]:
  """(the others, n_eval drawn by the seed), both in the order of `problems`.

  Raises:
    ValueError: when fewer than n_eval + 1 problems are there, so that none would remain.
  """
  if n_eval >= len(problems) and n_eval:
    raise ValueError(
        f"data.n_eval={n_eval} does not leave a problem of {len(problems)}; lower it or set data.eval_source.")
  drawn = set(np.random.default_rng([seed, 1]).permutation(len(problems))[:n_eval].tolist())
  return ([p for i, p in enumerate(problems) if i not in drawn], [p for i, p in enumerate(problems) if i in drawn])


def load_jsonl(path: str | pathlib.Path) -> list[Problem]:
  """The problems of a JSON Lines file, one object a line; empty lines are skipped.

  Fields: `id`, `problem`, `answer`, `source` (texts); optional `level` (integer), `answers` (list of accepted forms)
  and `choices` (list of texts); everything else is kept in `Problem.extra`. With `choices`, the problem's text gets
  them under letters and the answer is a letter. `answer` is either that letter, and the choices keep their order, or
  the text of the right choice, and they are put in an order that only depends on the id and the texts.

  Raises:
    ValueError: naming file, line and remedy, when the file cannot be read, holds no problem, or a line is no JSON
      object, lacks a field, has one of the wrong type, or repeats an id.
  """
  path = pathlib.Path(path)
  found, line_of_id = [], {}
  for number, line in _lines(path):
    where = f"{path}:{number}"
    problem = _from_object(_parse(line, where), where)
    if problem.id in line_of_id:
      raise ValueError(f"{where}: id={problem.id!r} was used in line {line_of_id[problem.id]}; make the ids unique.")
    line_of_id[problem.id] = number
    found.append(problem)
  if not found:
    raise ValueError(f"data.source={str(path)!r} holds no problem; give a file with one JSON object a line.")
  return found


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  """(number, text) of every line that is not empty; a byte order mark at the start is no part of the first."""
  try:
    with open(path, "rb") as file:
      # Lines end at \\n only: other separators may stand inside a JSON text.
      for number in itertools.count(1):
        line = file.readline(_MAX_LINE + 1)
        if not line:
          return
        if len(line) > _MAX_LINE:
          raise ValueError(f"{path}:{number} has more than {_MAX_LINE >> 20} MiB; write one JSON object a line.")
        text = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode("utf-8")
        if text.strip():
          yield number, text
  except FileNotFoundError as error:
    raise ValueError(
        f"data.source={str(path)!r} does not exist; give 'synthetic', a JSON Lines file, or 'tfds:NAME'.") from error
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(
        f"data.source={str(path)!r} cannot be read ({error}); give a readable JSON Lines file in UTF-8.") from error


def load_function(spec: str) -> list[Problem]:
  """The problems that a function of the user's returns, which must be the same in every process and attempt of a run.

  Args:
    spec: 'FILE.py:function'; the function takes nothing and returns the rows of a JSON Lines file as dicts, in a list
      or one by one.
  Raises:
    ValueError: when there is no such function, it returns no rows, or a row is not as in `load_jsonl`; names it.
  """
  rows = user_code.load(spec, "data.source")()
  if not isinstance(rows, Iterable) or isinstance(rows, (str, bytes, Mapping)):
    raise ValueError(f"data.source={spec!r} returned {type(rows).__name__}; return a list of dicts, or yield them.")
  found, row_of_id = [], {}
  for number, row in enumerate(rows):
    where = f"data.source={spec!r}, row {number}"
    if not isinstance(row, dict):
      raise ValueError(f"{where} is a {type(row).__name__}; return a dict for each problem.")
    problem = _from_object(row, where)
    if problem.id in row_of_id:
      raise ValueError(f"{where}: id={problem.id!r} was used in row {row_of_id[problem.id]}; make the ids unique.")
    row_of_id[problem.id] = number
    found.append(problem)
  if not found:
    raise ValueError(f"data.source={spec!r} returned no problem; return at least one.")
  return found


def load_tfds(name: str, split: str, data_dir: str = "") -> list[Problem]:
  """The problems of a TFDS data set that lies in `data_dir`, or is downloaded now; read without TensorFlow.

  Any data set whose records have `problem` and `answer` will do (`hbpo_jax.data.tfds_builders` has such), and the
  catalogue's `gsm8k`, whose answer is what follows '####', thousands commas removed.

  Args:
    name: 'NAME' or 'NAME/CONFIG'.
    split: TFDS split, slices such as 'train[:100]' included.
    data_dir: where data sets are stored; empty means the TFDS default.
  Raises:
    ValueError: when the data set or the split does not exist, cannot be downloaded, or has other fields.
  """
  # TFDS is slow to import, and only this source needs it.
  from hbpo_jax.data import tfds_builders

  builder: Any = tfds_builders.prepare(name, data_dir)  # TFDS's annotations do not fit its decorated methods.
  features = set(builder.info.features)
  if {"question", "answer"} <= features:
    convert = _from_gsm8k
  elif {"problem", "answer"} <= features:
    convert = _from_record
  else:
    raise ValueError(
        f"data.source='tfds:{name}' has the fields {sorted(features)}, not problem and answer; convert it to JSON"
        " Lines.")
  if split.split("[")[0] not in builder.info.splits:
    raise ValueError(
        f"data.split={split!r} is not a split of 'tfds:{name}'; choose from {sorted(builder.info.splits)}.")
  plain = re.split(r"[/:]", name)[0]
  records = builder.as_data_source(split=split)
  found = [convert(record, f"{plain}/{split}/{i}", plain) for i, record in enumerate(records)]
  if not found:
    raise ValueError(f"'tfds:{name}' holds no problem in split={split!r}; choose another.")
  return found


def gsm8k_answer(worked: str) -> str:
  """What follows the last '####' of a GSM8K answer, without thousands commas.

  Raises:
    ValueError: when there is none.
  """
  _, mark, final = worked.rpartition("####")
  if not mark or not final.strip():
    raise ValueError(f"The GSM8K answer {worked[-80:]!r} has no final answer after '####'; prepare the data set again.")
  return final.strip().replace(",", "")


def _from_gsm8k(record: Mapping[str, Any], name: str, source: str) -> Problem:
  worked = _text(record["answer"])
  return Problem(name, _text(record["question"]), gsm8k_answer(worked), source)


def _from_record(record: Mapping[str, Any], name: str, source: str) -> Problem:
  answer = _text(record["answer"])
  return Problem(
      id=_text(record["id"]) if "id" in record else name,
      problem=_text(record["problem"]), answer=answer,
      source=_text(record["source"]) if "source" in record else source,
      level=int(record["level"]) or None if "level" in record else None,
      answers=tuple(_text(a) for a in record["answers"]) if "answers" in record else (answer,))


def _text(value: str | bytes) -> str:
  return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _parse(line: str, where: str) -> dict[str, Any]:
  try:
    row = parse_json(line)
    if "\\ud" in line.lower():
      json.dumps(row, ensure_ascii=False).encode("utf-8")  # Half a surrogate pair is no text that a tokenizer takes.
  except ValueError as error:
    raise ValueError(f"{where} is not JSON ({error}); write one JSON object a line.") from error
  if not isinstance(row, dict):
    raise ValueError(f"{where} holds a {type(row).__name__}; write one JSON object a line.")
  return row


def _from_object(row: dict[str, Any], where: str) -> Problem:
  for field in _REQUIRED:
    if field not in row:
      raise ValueError(f"{where} has no field {field!r}; every line needs {', '.join(_REQUIRED)}.")
    if not isinstance(row[field], str) or not row[field].strip():
      raise ValueError(f"{where}: {field}={row[field]!r} must be a text that is not empty; put it in quotes.")
  level = row.get("level")
  if level is not None and (type(level) is not int or abs(level) > _MAX_LEVEL):
    raise ValueError(f"{where}: level={level!r} must be an integer; correct or remove it.")
  answers = row["answers"] if "answers" in row else [row["answer"]]
  if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
    raise ValueError(f"{where}: answers={answers!r} must be a list of texts; correct or remove it.")
  if row["answer"] not in answers:
    answers = [row["answer"], *answers]
  extra = {k: v for k, v in row.items() if k not in _KNOWN}
  if "choices" in row:
    return _from_choices(row, level, answers, extra, where)
  return Problem(row["id"], row["problem"], row["answer"], row["source"], level, tuple(answers), extra or None)


def _from_choices(row: dict[str, Any], level: int | None, answers: list[str], extra: dict[str, Any],
                  where: str) -> Problem:
  shown = row["choices"]
  if not isinstance(shown, list) or not all(isinstance(text, str) for text in shown):
    raise ValueError(f"{where}: choices={shown!r} must be a list of texts; correct or remove it.")
  try:
    right, is_letter = choices_lib.right_choice(row["answer"].strip(), shown)
    shown, text = [choice.strip() for choice in shown], shown[right].strip()
    if not is_letter:
      shown = choices_lib.order(row["id"], shown)
    made = choices_lib.lettered(row["problem"], shown, shown.index(text))
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error
  more = [a for a in answers if a != row["answer"] and a not in made.answers]
  return Problem(
      row["id"], made.problem, made.answer, row["source"], level, (*made.answers, *more), extra | {"choices": shown})
