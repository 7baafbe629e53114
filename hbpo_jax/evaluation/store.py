"""The directory of an evaluation: its problems, its responses as they finished, and what it was made with.

    eval.json                 the manifest: format, model, modes, samples per problem, benchmarks, settings
    problems/NAME.jsonl       the problems of a benchmark, in order
    responses/NAME.jsonl      one response a line with its verdict, appended as it finishes
    results.json, results.md  the numbers, once all is answered

A line that a kill cut in half is dropped and its response generated again. Of two lines on one response the later
counts, so that a verdict can be added to a response that was stored without.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

import hbpo_jax
from hbpo_jax import distributed
from hbpo_jax.data.record import Problem
from hbpo_jax.files import atomic_write_bytes, atomic_write_text, json_line, json_value, naming, parse_json

FORMAT = 1
MANIFEST, RESULTS = "eval.json", "results.json"
ASIDE = ".other-"  # In the name of an evaluation that was set aside.

Key = tuple[str, str, int]  # problem id, mode, sample

_FIELDS: dict[str, Any] = {
    "id": str, "mode": str, "sample": int, "response": str, "n_gen": int, "n_think": int, "truncated": bool,
    "score": int | float | None, "reason": str | None, "given": str,
}
_LEVEL = int | float | str | None
# () stands for a field that is left out.
_PROBLEM_FIELDS: dict[str, Any] = {
    "id": str | tuple, "problem": str | tuple, "answer": str | tuple, "source": str | tuple,
    "level": int | float | str | None | tuple, "answers": list | tuple, "extra": dict | None | tuple,
}
_MOST = 10**8  # problems, or samples of one


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """Problems under one name.

  name: unique within an evaluation, fit for a file name.  title: as tables write it.
  """
  name: str
  title: str
  problems: tuple[Problem, ...]


@dataclasses.dataclass(frozen=True)
class Evaluated:
  """What lies in an evaluation's directory.

  manifest: of eval.json.  problems: by benchmark, in order.
  rows: by benchmark, the graded responses in order of problem, mode and sample.
  notes: sentences on what was left out, such as a line cut in half.
  """
  directory: pathlib.Path
  manifest: dict[str, Any]
  problems: dict[str, list[Problem]]
  rows: dict[str, list[dict[str, Any]]]
  notes: tuple[str, ...] = ()


def is_evaluation(directory: str | os.PathLike) -> bool:
  """Whether an evaluation's manifest lies there."""
  return (pathlib.Path(directory) / MANIFEST).is_file()


def set_aside_other(directory: str | os.PathLike, model: Mapping[str, Any]) -> bool:
  """Renames an evaluation of other weights to `NAME.other-1` (or -2 ...), if one lies there; whether it did."""
  root = pathlib.Path(directory)
  if not is_evaluation(root) or _read_manifest(root)["model"].get("fingerprint") == model["fingerprint"]:
    return False
  number = 1
  while (aside := root.with_name(f"{root.name}{ASIDE}{number}")).exists():
    number += 1
  root.rename(aside)
  return True


def open_existing(directory: str | os.PathLike) -> Evaluated:
  """What an evaluation has stored so far; responses without a verdict are left out.

  Raises:
    FileNotFoundError: when the directory holds no evaluation.
    ValueError: when the manifest is of another format, or a file is damaged; names file, line and remedy.
  """
  root = pathlib.Path(directory)
  manifest = _read_manifest(root)
  problems, rows, notes = {}, {}, []
  for name in manifest["benchmarks"]:
    problems[name] = _read_problems(root / "problems" / f"{name}.jsonl")
    path = root / "responses" / f"{name}.jsonl"
    found, cut = _read_responses(path)
    if cut:
      notes.append(f"{path} ends in half a line; that response is left out.")
    graded = {key: row for key, row in found.items() if row["score"] is not None}
    if open_rows := len(found) - len(graded):
      notes.append(f"{path} holds {open_rows} responses without a verdict, which are left out.")
    rows[name] = sorted(graded.values(), key=_order(problems[name], manifest["modes"]))
  return Evaluated(root, manifest, problems, rows, tuple(notes))


class Store:
  """An evaluation's directory, open for writing; a context manager.

  Every process of a job makes one: the writer's holds the files, the others' know what is in them.

  Attributes:
    ungraded: by benchmark, stored responses that still lack their verdict, by key.
  """

  def __init__(
      self, directory: str | os.PathLike, benchmarks: Sequence[Benchmark], *, modes: Sequence[str], n_samples: int,
      model: Mapping[str, Any], settings: Mapping[str, Any]):
    """Creates the directory, or opens it to go on.

    Benchmarks, modes, samples and problems may have been added since; what decides a response or its verdict may not
    have changed.

    Args:
      benchmarks: all that will be answered.
      model: what identifies the weights, plain JSON values.
      settings: settings by dotted name that decide responses and verdicts, plain JSON values.
    Raises:
      ValueError: when an evaluation of another model, other settings or other problems lies there, or a file is
        damaged.
    """
    self.directory = pathlib.Path(directory)
    self._files: dict[str, Any] = {}
    found = distributed.from_writer(
        "the stored evaluation", lambda: self._open(benchmarks, modes, n_samples, model, settings))
    self._held = {name: {(id_, mode, sample) for id_, mode, sample in keys} for name, (keys, _) in found.items()}
    self.ungraded: dict[str, dict[Key, dict[str, Any]]] = {
        name: {_key(row): row for row in rows} for name, (_, rows) in found.items()}

  def _open(self, benchmarks, modes, n_samples, model, settings) -> dict[str, tuple[list[Key], list[dict[str, Any]]]]:
    """Opens the files; by benchmark, the keys of what is stored, and the responses without a verdict."""
    before = _read_manifest(self.directory) if is_evaluation(self.directory) else None
    if before is not None:
      self._check_same(before, json_value(dict(model)), json_value(dict(settings)))
    problems = {b.name: _join_problems(self.directory, b) for b in benchmarks}
    rows = {b.name: self._recover(b.name) for b in benchmarks}
    self._write_manifest(before, benchmarks, problems, modes, n_samples, model, settings)
    for b in benchmarks:
      path = self.directory / "responses" / f"{b.name}.jsonl"
      path.parent.mkdir(exist_ok=True)
      self._files[b.name] = open(path, "a", encoding="ascii")  # noqa: SIM115 (open until close)
    return {name: ([*some], [row for row in some.values() if row["score"] is None]) for name, some in rows.items()}

  def __enter__(self) -> "Store":
    return self

  def __exit__(self, *exc: object) -> None:
    self.close()

  def holds(self, name: str, key: Key) -> bool:
    """Whether a response is stored, with its verdict or without."""
    return key in self._held[name]

  def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Stores responses of one benchmark; they outlast a kill of the process when this returns.

    Args:
      rows: with the fields of the module's docstring; score and reason None where there is no verdict yet.
    """
    rows = [dict(row) for row in rows]
    if distributed.is_writer():
      with naming(self._files[name].name):
        self._files[name].write("".join(map(json_line, rows)))
        self._files[name].flush()
    for row in rows:
      self._held[name].add(_key(row))
      self.ungraded[name].pop(_key(row), None)
      if row["score"] is None:
        self.ungraded[name][_key(row)] = row

  def close(self) -> None:
    """Closes all files; calling it again does nothing."""
    for file in self._files.values():
      file.close()

  def _recover(self, name: str) -> dict[Key, dict[str, Any]]:
    path = self.directory / "responses" / f"{name}.jsonl"
    rows, cut = _read_responses(path)
    if cut:
      atomic_write_bytes(path, path.read_bytes()[:-cut])
    return rows

  def _check_same(self, before: dict[str, Any], model: dict[str, Any], settings: dict[str, Any]) -> None:
    for name in sorted(settings.keys() | before["settings"].keys()):
      here, there = settings.get(name), before["settings"].get(name)
      if here != there:
        raise ValueError(
            f"config.{name}={here!r}, but the evaluation in {self.directory} was made with {there!r}; set it back, or "
            "give another --workdir.")
    if before["model"].get("fingerprint") != model.get("fingerprint"):
      raise ValueError(
          f"the evaluation in {self.directory} is of other weights ({before['model'].get('path')}); give another "
          "--workdir.")

  def _write_manifest(self, before, benchmarks, problems, modes, n_samples, model, settings) -> None:
    before = before or {"modes": [], "samples_per_problem": 0, "benchmarks": {}}
    listed = before["benchmarks"] | {
        b.name: {"title": b.title, "n_problems": len(problems[b.name])} for b in benchmarks}
    content = {
        "format": FORMAT, "hbpo_jax": hbpo_jax.__version__, "model": dict(model),
        "modes": list(dict.fromkeys([*before["modes"], *modes])),
        "samples_per_problem": max(n_samples, before["samples_per_problem"]), "benchmarks": listed,
        "settings": dict(settings)}
    atomic_write_text(self.directory / MANIFEST, json.dumps(json_value(content), indent=2) + "\n")


def _key(row: Mapping[str, Any]) -> Key:
  return row["id"], row["mode"], row["sample"]


def _order(problems: Sequence[Problem], modes: Sequence[str]):
  place = {p.id: i for i, p in enumerate(problems)}
  turn = {mode: i for i, mode in enumerate(modes)}
  return lambda row: (place.get(row["id"], len(place)), turn.get(row["mode"], len(turn)), row["sample"])


def _read_manifest(root: pathlib.Path) -> dict[str, Any]:
  path = root / MANIFEST
  if not root.is_dir():
    raise FileNotFoundError(f"{root} does not exist; give the directory of an evaluation.")
  if not path.is_file():
    raise FileNotFoundError(f"{root} holds no evaluation ({MANIFEST} is missing); give the --workdir of one.")
  try:
    manifest = parse_json(path.read_bytes())
    version = manifest["format"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is damaged ({error!r}); restore it, or evaluate again in another directory.") from error
  if version != FORMAT:
    raise ValueError(
        f"{path} is of format {version!r}, written by hbpo_jax {manifest.get('hbpo_jax', '?')}; this version reads "
        f"format {FORMAT}. Use that version, or evaluate again.")
  if missing := [f for f in ("model", "modes", "samples_per_problem", "benchmarks", "settings") if f not in manifest]:
    raise ValueError(f"{path} has no entry {missing[0]!r}; restore it, or evaluate again in another directory.")
  if fault := _fault(manifest):
    raise ValueError(f"{path} is damaged ({fault}); restore it, or evaluate again in another directory.")
  return manifest


def _fault(manifest: Mapping[str, Any]) -> str:
  """What is wrong with the entries of a manifest, or ''. A directory may come from anywhere."""
  for name, kind in (("model", dict), ("modes", list), ("benchmarks", dict), ("settings", dict)):
    if not isinstance(manifest[name], kind) or (not manifest[name] and name in ("modes", "benchmarks")):
      return f"{name} is not a {kind.__name__} with entries"
  if bad := [mode for mode in manifest["modes"] if not _is_mode(mode)]:
    return f"modes has {bad[0]!r}"
  if type(manifest["samples_per_problem"]) is not int or not 0 < manifest["samples_per_problem"] <= _MOST:
    return f"samples_per_problem is {manifest['samples_per_problem']!r}"
  for name, about in manifest["benchmarks"].items():
    # It names files, which must not lie elsewhere.
    if not name or name.startswith(".") or set(name) & set("/\\\0") or not name.isprintable():
      return f"{name!r} cannot name a benchmark"
    if not isinstance(about, dict) or not isinstance(about.get("title"), str):
      return f"benchmark {name!r} has no title"
    if type(about.get("n_problems")) is not int or not 0 <= about["n_problems"] <= _MOST:
      return f"benchmark {name!r} has n_problems={about.get('n_problems')!r}"
  return ""


def _is_mode(mode: Any) -> bool:
  """Whether a value can be the name of a mode; a budget is one, in at most nine digits."""
  return isinstance(mode, str) and 0 < len(mode) < 64 and (not mode.isdecimal() or (mode.isascii() and len(mode) < 10))


def _join_problems(root: pathlib.Path, benchmark: Benchmark) -> list[Problem]:
  """The stored problems and those that are new, stored; refuses a problem that has changed."""
  path = root / "problems" / f"{benchmark.name}.jsonl"
  stored = _read_problems(path) if path.exists() else []
  known = {p.id: p for p in stored}
  for p in benchmark.problems:
    before = known.get(p.id)
    if before is not None and (before.problem, before.answers) != (p.problem, p.answers):
      raise ValueError(
          f"{path}: problem {p.id!r} of benchmark {benchmark.name!r} has another text or answer than when it was "
          "answered; give another --workdir.")
  joined = stored + [p for p in benchmark.problems if p.id not in known]
  if len(joined) > len(stored):
    atomic_write_text(path, "".join(json_line(dataclasses.asdict(p)) for p in joined))
  return joined


def _read_problems(path: pathlib.Path) -> list[Problem]:
  names = {f.name for f in dataclasses.fields(Problem)}
  found = []
  for number, row in _objects(path)[0]:
    try:
      if bad := [k for k, kind in _PROBLEM_FIELDS.items() if not isinstance(row.get(k, ()), kind)]:
        raise TypeError(f"{bad[0]}={row[bad[0]]!r}")
      fields: dict[str, Any] = {k: tuple(map(str, v)) if k == "answers" else v for k, v in row.items() if k in names}
      found.append(Problem(**fields))
    except TypeError as error:
      raise ValueError(f"{path}:{number} is no problem ({error}); restore the file, or evaluate again.") from error
  return found


def _read_responses(path: pathlib.Path) -> tuple[dict[Key, dict[str, Any]], int]:
  """(responses by key, bytes of a last line that was cut in half); nothing where there is no file."""
  if not path.exists():
    return {}, 0
  rows = {}
  lines, cut = _objects(path)
  for number, row in lines:
    for field, kind in _FIELDS.items():
      if field not in row or not isinstance(row[field], kind):
        raise ValueError(
            f"{path}:{number}: {field}={row.get(field)!r} is missing or of the wrong type; remove the line, and its "
            "response is generated again.")
    if not _is_mode(row["mode"]) or not isinstance(row.setdefault("level", None), _LEVEL):
      raise ValueError(
          f"{path}:{number}: mode={row['mode']!r} or level={row['level']!r} cannot be; remove the line, and its "
          "response is generated again.")
    rows[_key(row)] = row
  return rows, cut


def _objects(path: pathlib.Path) -> tuple[list[tuple[int, dict[str, Any]]], int]:
  """((line number, object) of every whole line, bytes of a last line that has no end)."""
  lines = path.read_bytes().split(b"\n")
  cut = len(lines.pop())
  found = []
  for number, line in enumerate(lines, start=1):
    try:
      row = parse_json(line)
    except ValueError as error:
      raise ValueError(f"{path}:{number} is not JSON ({error}); remove the line and run again.") from error
    if not isinstance(row, dict):
      raise ValueError(f"{path}:{number} is no JSON object; remove the line and run again.")
    found.append((number, row))
  return found, cut
