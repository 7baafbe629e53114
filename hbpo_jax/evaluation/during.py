"""The evaluations of a training run, in WORKDIR/eval, and its best checkpoint, in WORKDIR/best."""

from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from hbpo_jax import assemble, distributed
from hbpo_jax.config import CheckpointConfig, Config
from hbpo_jax.data.record import Problem
from hbpo_jax.evaluation import output, results
from hbpo_jax.evaluation.runner import TRAINING, Runner
from hbpo_jax.evaluation.store import Benchmark, Evaluated, set_aside_other
from hbpo_jax.files import atomic_write_text, json_value
from hbpo_jax.grading.judge import Judge
from hbpo_jax.learning import checkpoint
from hbpo_jax.models import weights
from hbpo_jax.reporting import tables
from hbpo_jax.reporting.console import Console
from hbpo_jax.structs import TrainState


class Evaluations:
  """Measures a training run before, during and after; a context manager. Without problems it measures nothing.

  Attributes:
    runner: answers the problems; None without any.
  """

  def __init__(
      self, cfg: Config, model: assemble.Model, whole: Callable[[Any], Any], problems: Sequence[Problem], judge: Judge,
      root: pathlib.Path, console: Console):
    """Args:
      whole: the network's params of what a TrainState calls params: `Learner.whole`.
    Raises:
      ValueError: when a prompt is longer than data.max_prompt_tokens.
    """
    self._cfg, self._model, self._whole, self._root, self._console = cfg, model, whole, root, console
    mode = cfg.eval.mode
    self._mode = str(int(mode)) if mode.isdecimal() else mode
    self.runner = Runner(
        cfg, model, [Benchmark(TRAINING, "Evaluation", tuple(problems))], judge, modes=(self._mode,),
        n_samples=cfg.eval.samples_per_problem, n_new=cfg.eval.max_new_tokens or cfg.reward.max_response_tokens,
        n_prompt_slots=cfg.data.max_prompt_tokens) if problems else None
    self._subset = frozenset(p.id for p in problems[:cfg.eval.n_during or None])
    self._base: dict[str, Any] | None = None  # Summary of the subset.
    self._best = checkpoint.Checkpointer(
        root / "best", CheckpointConfig(save_every=0, max_to_keep=1)) if self._keeps_best else None

  def __enter__(self) -> "Evaluations":
    return self

  def __exit__(self, *exc: object) -> None:
    if self._best is not None:
      self._best.close()

  @property
  def _keeps_best(self) -> bool:
    return self.runner is not None and self._cfg.eval.every > 0 and self._cfg.eval.best != "none"

  def due(self, step: int) -> bool:
    """Whether to measure once `step` steps are done."""
    return self.runner is not None and self._cfg.eval.every > 0 and step % self._cfg.eval.every == 0

  def before(self, start: int, state: TrainState) -> dict[str, Any] | None:
    """The evaluation of the base model: `tables.evaluation_summary`, or None without problems.

    Args:
      start: steps done; above 0 the state is not the base model's, whose weights are then read again if needed.
    """
    if self.runner is None:
      return None

    def load():
      if start == 0:
        return self._whole(state.params)
      model = self._model
      return weights.load(model.directory, model.arch, model.mesh, param_dtype=assemble.base_dtype(self._cfg))

    found = self._measure(self.runner, "base", self._model.identity, load)
    self._base = self._summary(found, self._subset)
    return self._summary(found)

  def after(self, state: TrainState) -> dict[str, Any] | None:
    """The evaluation of the trained model, on all problems; None without problems."""
    if self.runner is None:
      return None
    found = self._measure(self.runner, "trained", self._identity(state), lambda: self._whole(state.params))
    return self._summary(found)

  def during(self, step: int, state: TrainState, meta: Callable[[], dict[str, Any]]) -> dict[str, float]:
    """Measures the first eval.n_during problems after `step` steps, and keeps the state if it is the best so far.

    Args:
      meta: what a checkpoint saves beside the state.
    Returns:
      Metrics by tag: eval/accuracy, eval/tokens, eval/truncated, and eval/best, 1 where it is the best so far.
    """
    if self.runner is None:
      return {}
    found = self._measure(
        self.runner, f"step_{step:06d}", self._identity(state), lambda: self._whole(state.params), len(self._subset))
    summary = self._summary(found)
    accuracy, tokens = summary["accuracy"], summary["mean_tokens"]
    is_best = self._keep_if_best(step, state, meta, accuracy, tokens)
    self._console.message(
        f"evaluation after step {step}: accuracy {tables.percent(accuracy)}, {tables.number(tokens)} tokens on "
        f"{summary['n']} problems" + ("; the best so far" if is_best else ""))
    return {"eval/accuracy": accuracy, "eval/tokens": tokens, "eval/truncated": summary["truncated"],
            "eval/best": float(is_best)}

  def _measure(
      self, runner: Runner, name: str, model_id: dict[str, Any], load: Callable[[], Any], limit: int = 0
  ) -> Evaluated | None:
    folder = self._root / "eval" / name
    if distributed.from_writer(f"evaluation {name}", lambda: set_aside_other(folder, model_id)):
      self._console.message(f"{folder} was of other weights; it is kept under another name and made anew")
    found = runner.measure(folder, model_id, load, self._console, f"evaluation {name}", limit)
    if found is not None:
      output.write_results(found)
    return found

  def _summary(self, found: Evaluated | None, ids: frozenset[str] | None = None) -> dict[str, Any]:
    """`tables.evaluation_summary` of the problems of these ids; of all, where None. Only the writer has `found`."""
    rows = [] if found is None else found.rows[TRAINING]
    return distributed.from_writer("an evaluation's summary", lambda: results.summary([
        row for row in rows if row["mode"] == self._mode and (ids is None or row["id"] in ids)]))

  def _identity(self, state: TrainState) -> dict[str, Any]:
    sums = json.dumps(checkpoint.fingerprint(state.params), sort_keys=True)
    return {"path": str(self._root), "step": int(state.step), "fingerprint": hashlib.sha256(sums.encode()).hexdigest()}

  def _keep_if_best(
      self, step: int, state: TrainState, meta: Callable[[], dict[str, Any]], accuracy: float, tokens: float) -> bool:
    if self._best is None or self._base is None:
      return False
    limits = Limits.of(self._cfg, self._base["accuracy"], self._base["mean_tokens"])
    path = self._root / "best" / "best.json"
    before = distributed.from_writer(
        "the best step", lambda: json.loads(path.read_text(encoding="utf-8")) if path.exists() else None)
    if before is not None and before["step"] == step:
      return True  # Measured before a kill, and now again.
    if not limits.better(accuracy, tokens, before):
      return False
    self._best.save(step, state, meta())
    self._best.wait()
    if distributed.is_writer():
      atomic_write_text(path, json.dumps(json_value({
          "step": step, "accuracy": accuracy, "tokens": tokens, "chosen_by": dataclasses.asdict(limits)})) + "\n")
    return True


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a best step is: the highest accuracy within max_tokens, or the fewest tokens with min_accuracy."""
  by: str
  max_tokens: float
  min_accuracy: float

  @classmethod
  def of(cls, cfg: Config, base_accuracy: float, base_tokens: float) -> "Limits":
    """Those of the settings; the base model's numbers where a setting is None."""
    e = cfg.eval
    return cls(e.best, base_tokens if e.best_max_tokens is None else e.best_max_tokens,
               base_accuracy if e.best_min_accuracy is None else e.best_min_accuracy)

  def better(self, accuracy: float, tokens: float, before: dict[str, Any] | None) -> bool:
    """Whether a step is admitted and beats the one before (None = there is none); ties go to the other number."""
    if self.by == "accuracy":
      admitted, score = tokens <= self.max_tokens, lambda a, t: (a, -t)
    else:
      admitted, score = accuracy >= self.min_accuracy, lambda a, t: (-t, a)
    return admitted and (before is None or score(accuracy, tokens) > score(before["accuracy"], before["tokens"]))
