"""Why the sampler's and the trainer's log-probabilities differ: one small function per hypothesis.

Each hypothesis scores the batch again with one thing changed. What makes the gap vanish 'explains' it; what has its
size without proof 'fits'. `hbpo_jax.doctor` is the command around this.
"""

from collections.abc import Callable, Iterator
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hbpo_jax.config import Config
from hbpo_jax.learning import learner as learner_lib
from hbpo_jax.learning.learner import Learner
from hbpo_jax.structs import Batch, Prompts, Rollouts, make_batch


@dataclasses.dataclass(frozen=True)
class Tolerance:
  """Largest healthy |dlogp| in nats: the mean over tokens, and a single token's."""
  mean: float
  max: float

  def holds(self, mean: float | None, top: float | None) -> bool:
    """Whether a gap is healthy; False for NaN and for None."""
    return mean is not None and top is not None and mean <= self.mean and top <= self.max


# float32: the two sides sum in another order, and no more. bfloat16: a mean of 0.01 to 0.03 is usual in large models,
# and single tokens of small probability reach 1 and above, so the maximum tells little.
TOLERANCES = {"float32": Tolerance(1e-5, 1e-3), "bfloat16": Tolerance(0.05, 2.0)}
TYPICAL_BFLOAT16 = 0.03
_TEMPERATURES = tuple(round(0.1 * i, 1) for i in range(2, 17))
_REFINEMENTS = 14  # Golden-section steps: a grid step of 0.1 shrinks to 1e-4.


@dataclasses.dataclass(frozen=True)
class Finding:
  """What one hypothesis or check came to.

  verdict: of hypotheses 'explains', 'fits' or 'no'; of checks 'fault', 'fine' or 'note'.
  text: what it means and where to look.  tried: what was changed, in a few words.
  mean, max: |dlogp| that is left under the hypothesis; None where nothing was scored.
  """
  name: str
  verdict: str
  text: str = ""
  tried: str = ""
  mean: float | None = None
  max: float | None = None


class Scorer:
  """The trainer's log-probabilities, as training computes them or with one thing changed."""

  def __init__(self, learner: Learner, params: Any, published: Any, publish: Callable[[Any], Any]):
    """Compiles nothing yet.

    Args:
      learner: of the run.
      params: the trainer's.
      published: the sampler's copy, the one that the rollouts were generated with.
      publish: makes such a copy.
    """
    self.params, self.published, self._publish = params, published, publish
    self._learners = {learner.cfg.model.compute_dtype: learner}
    self._learner = learner

  def __call__(
      self, batch: Batch, *, temperature: float | None = None, dtype: str | None = None, sampler_weights: bool = False,
  ) -> np.ndarray:
    """float32 [R, C] on the host; None means as in training."""
    learner = self._in(dtype or self._learner.cfg.model.compute_dtype)
    # The sampler's copy may be spread over the devices otherwise.
    params = jax.device_put(self.published, learner.param_shardings) if sampler_weights else self.params
    return np.asarray(jax.device_get(learner.score(params, batch, temperature)))

  def scores_published(self) -> bool:
    """Whether the sampler's weights lie as the trainer's do, so that the trainer can score with them."""
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    return jax.tree.structure(self.params) == jax.tree.structure(self.published) and (
        shapes(self.params) == shapes(self.published))

  def changed_weights(self) -> list[str]:
    """Names of the arrays in which the sampler's weights are not the trainer's, rounded to the sampler's dtype."""
    expected = self.params if self.scores_published() else self._publish(self.params)
    pairs = zip(jax.tree_util.tree_leaves_with_path(self.published), jax.tree.leaves(expected), strict=True)
    return [
        jax.tree_util.keystr(path, simple=True, separator=".") for (path, used), own in pairs
        if bool(jnp.any(jax.device_put(own.astype(used.dtype), used.sharding) != used))]

  def _in(self, dtype: str) -> Learner:
    if dtype not in self._learners:
      cfg = self._learner.cfg
      cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, compute_dtype=dtype))
      self._learners[dtype] = Learner(self._learner.arch, cfg, self._learner.mesh)
    return self._learners[dtype]


@dataclasses.dataclass(frozen=True)
class Case:
  """A batch with both sides' log-probabilities, on the host, and the means to score it otherwise.

  batch: logp_old_RC is the trainer's, logp_sampler_RC the sampler's.  gap: of `learner.sampler_gap`.
  """
  cfg: Config
  prompts: Prompts
  rollouts: Rollouts
  batch: Batch
  score: Scorer
  gap: dict[str, float]

  @property
  def tolerance(self) -> Tolerance:
    """What is healthy in the run's compute dtype."""
    return TOLERANCES[self.cfg.model.compute_dtype]

  @property
  def agrees(self) -> bool:
    """Whether the gap is healthy; never with a number that is not finite."""
    return self.tolerance.holds(self.gap["sampler_gap_mean"], self.gap["sampler_gap_max"])

  def log_ratio(self, logp_RC: np.ndarray | None = None) -> np.ndarray:
    """float32 [R, C], trainer (None: as it is) minus sampler, 0 where no loss is carried."""
    logp_RC = np.asarray(self.batch.logp_old_RC if logp_RC is None else logp_RC)
    return np.where(self.batch.completion_mask_RC, logp_RC - np.asarray(self.batch.logp_sampler_RC), 0.0)

  def by_row(self, x_B: Any) -> np.ndarray:
    """[R, ...] of [B, ...]: each query's value for all its rollouts."""
    return np.repeat(np.asarray(x_B), len(self.batch.tokens_RT) // len(x_B), axis=0)

  def left(self, logp_RC: np.ndarray) -> dict[str, float]:
    """The gap if the trainer had these log-probabilities."""
    return measure(self.batch.replace(logp_old_RC=logp_RC), self.cfg)

  def try_score(self, name: str, tried: str, text: str, batch: Batch | None = None, **how: Any) -> Finding:
    """The finding of scoring `batch` (None: as it is) with one thing changed."""
    gap = self.left(self.score(self.batch if batch is None else batch, **how))
    return self.judge(name, tried, text, gap["sampler_gap_mean"], gap["sampler_gap_max"])

  def judge(self, name: str, tried: str, text: str, mean: float, top: float) -> Finding:
    """'explains' where what is left is healthy and clearly smaller, or a tenth of the gap."""
    before = self.gap["sampler_gap_mean"]
    explains = mean <= (before / 2 if self.tolerance.holds(mean, top) else before / 10)
    return Finding(name, "explains" if explains else "no", text, tried, mean, top)


def compare(prompts: Prompts, rollouts: Rollouts, score: Scorer, cfg: Config) -> Case:
  """Both sides' log-probabilities of the same tokens.

  Args:
    prompts: what the sampler was given, on the host.
    rollouts: what it made of them, on the host.
    score: the trainer's side.
    cfg: the run's.
  """
  batch = jax.device_get(make_batch(prompts, rollouts))
  batch = batch.replace(logp_old_RC=score(batch))
  return Case(cfg, prompts, rollouts, batch, score, measure(batch, cfg))


def measure(batch: Batch, cfg: Config) -> dict[str, float]:
  """The numbers that every training step logs, of `learner.sampler_gap`."""
  return {name: float(value) for name, value in learner_lib.sampler_gap(batch, cfg.loss).items()}


def diagnose(case: Case) -> list[Finding]:
  """The findings of all hypotheses, the best explanation first."""
  if not math.isfinite(case.gap["sampler_gap_mean"]):
    return [_not_finite(case)]
  findings = [f for hypothesis in HYPOTHESES for f in hypothesis(case)]
  if any(f.verdict == "explains" and case.tolerance.holds(f.mean, f.max) for f in findings):
    # Beside an explanation that leaves nothing, one that leaves a tenth is only similar to it.
    findings = [f if f.verdict != "explains" or case.tolerance.holds(f.mean, f.max) else
                dataclasses.replace(f, verdict="fits") for f in findings]
  order = ("explains", "fits", "no")
  return sorted(findings, key=lambda f: (order.index(f.verdict), math.inf if f.mean is None else f.mean))


def locate(case: Case) -> str:
  """Where in the rows the gap lies, for a gap that nothing explains."""
  d_RC, mask_RC = np.abs(case.log_ratio()), case.batch.completion_mask_RC
  _, G, J = case.rollouts.n_tokens_BGJ.shape
  forced_G = np.asarray(case.prompts.n_prefix_G)
  forced_R = np.tile(np.repeat(forced_G, J), len(d_RC) // (G * J))
  slot_C = np.arange(d_RC.shape[1])
  parts = {
      "the forced budget sentence": mask_RC & (slot_C < forced_R[:, None]),
      "the first sampled token": mask_RC & (slot_C == forced_R[:, None]),
      "later tokens": mask_RC & (slot_C > forced_R[:, None])}
  means = [f"{d_RC[m].mean():.2g} in {name}" for name, m in parts.items() if m.any()]
  return f"Mean |dlogp| is {', '.join(means)}; compare attention, rotary positions and cache of the two sides there."


def _not_finite(case: Case) -> Finding:
  sides = (("trainer", case.batch.logp_old_RC), ("sampler", case.batch.logp_sampler_RC))
  bad = [f"the {name} gives {n:,}" for name, x in sides if (n := int((~np.isfinite(np.asarray(x))).sum()))]
  text = (f"{' and '.join(bad)} log-probabilities that are not finite; check the weights for overflow, and try "
          "model.compute_dtype=float32.")
  return Finding("not finite", "explains", text, "as it is")


# ---- Hypotheses: (case) -> findings. The trainer's score is computed again with one thing changed.


def temperature(case: Case) -> Iterator[Finding]:
  """The sampler draws at another temperature than the trainer divides by."""
  configured = case.cfg.rollout.temperature
  likely = (1.0, configured, configured**2, 1 / configured, case.cfg.eval.temperature or 1.0)
  at = lambda t: case.left(case.score(case.batch, temperature=t))["sampler_gap_mean"]
  curve = {t: at(t) for t in sorted({*_TEMPERATURES, *likely})}
  best = min(curve, key=curve.__getitem__)
  if case.tolerance.mean < curve[best] < case.gap["sampler_gap_mean"] / 2:
    grid = list(curve)
    i = grid.index(best)
    best = _golden(at, grid[max(i - 1, 0)], grid[min(i + 1, len(grid) - 1)])
  text = (
      f"the trainer does not divide its logits by rollout.temperature={configured:g}; told to, it agrees."
      if best == configured else
      f"the sampler draws at temperature {best:.4g}, the trainer divides its logits by rollout.temperature="
      f"{configured:g}; look for a temperature that is set twice, applied twice, or left out on one side.")
  yield case.try_score("temperature", f"the trainer divided by {best:.4g}", text, temperature=best)


def sampling_filter(case: Case) -> Iterator[Finding]:
  """Top-p or top-k: the sampler renormalises over the tokens it keeps, the trainer does not.

  Then log pi_trainer - log pi_sampler is the logarithm of the kept mass: in [log(top_p), 0] at every token (below 0
  with top-k), whatever the model. What is left of the gap is what lies outside.
  """
  run, ev = case.cfg.rollout, case.cfg.eval
  purpose = (f"rollout.top_p={run.top_p:g}, rollout.top_k={run.top_k} make the two differ on purpose: the sampler "
             "renormalises over the tokens it keeps, the trainer does not. Turn them off, or set loss.importance_cap.")
  mixed = (f"the sampler draws with the evaluation's eval.top_p={ev.top_p:g}, eval.top_k={ev.top_k} at temperature "
           "{t:g}; training asks for other settings.")
  candidates = {(run.temperature, run.top_p, run.top_k): purpose}
  for t in (run.temperature, ev.temperature or 1.0):
    candidates.setdefault((t, ev.top_p, ev.top_k), mixed.format(t=t))
  for (t, top_p, top_k), text in candidates.items():
    if top_p == 1 and top_k == 0:
      continue
    logp_RC = case.score(case.batch, temperature=t)
    alone = case.left(logp_RC)
    if case.tolerance.holds(alone["sampler_gap_mean"], alone["sampler_gap_max"]):
      continue  # The temperature alone explains it.
    d_RC = case.log_ratio(logp_RC)
    lowest = -math.inf if top_k else math.log(top_p)
    excess_RC = np.maximum(d_RC, 0) + np.maximum(lowest - d_RC, 0)
    n_tokens = case.batch.completion_mask_RC.sum()
    yield case.judge("sampling filter", f"top-p {top_p:g}, top-k {top_k}, temperature {t:g} in the sampler", text,
                     float(excess_RC.sum() / n_tokens), float(excess_RC.max()))


def positions(case: Case) -> Iterator[Finding]:
  """Rotary positions of prompt and response do not join, or the trainer's batch is not as documented.

  Only the distance between prompt and response matters to rotary positions: rows that count the padding throughout are
  harmless, and leave no gap.
  """
  batch, right = case.batch, _documented(case)
  if not (np.array_equal(batch.position_RT, right.position_RT) and np.array_equal(batch.segment_RT, right.segment_RT)):
    yield case.try_score(
        "trainer's batch", "positions and segments as in structs.Batch",
        "the trainer's rows have positions or segments other than structs.Batch says (0 at the first real token, "
        "padding in segment 0); look at structs.make_batch.", right)
  T, C = batch.tokens_RT.shape[1], batch.completion_mask_RC.shape[1]
  padding_R = T - C - case.by_row(case.prompts.n_prompt_B)
  is_response_T = np.arange(T) >= T - C
  counts = ("the {0} counts the prompt's padding in the positions of the response (P + slot instead of n_prompt + "
            "slot), or the {1} in those of the prompt alone; positions start at the first real token.")
  shifted = ("the response's positions are off by one {0} in the sampler, measured by the trainer's; look at where "
             "decoding takes over from the prompt.")
  for tried, shift_R, text in (
      ("response positions + padding", padding_R, counts.format("sampler", "trainer")),
      ("response positions - padding", -padding_R, counts.format("trainer", "sampler")),
      ("response positions + 1", np.ones_like(padding_R), shifted.format("upwards")),
      ("response positions - 1", -np.ones_like(padding_R), shifted.format("downwards"))):
    if shift_R.any():
      moved_RT = batch.position_RT + (shift_R[:, None] * is_response_T).astype(np.int32)
      yield case.try_score("positions", tried, text, batch.replace(position_RT=moved_RT))


def padding(case: Case) -> Iterator[Finding]:
  """The sampler attends to the prompt's padding."""
  batch = case.batch
  T, C = batch.tokens_RT.shape[1], batch.completion_mask_RC.shape[1]
  prompt_RP = case.by_row(case.prompts.tokens_BP)
  is_padding_RT = (np.arange(T) < T - C) & (batch.segment_RT == 0)
  if not is_padding_RT.any():
    return
  tokens_RT = np.concatenate([prompt_RP, batch.tokens_RT[:, T - C:]], axis=1)
  seen = batch.replace(tokens_RT=tokens_RT, segment_RT=np.where(is_padding_RT, 1, batch.segment_RT).astype(np.int32))
  text = "the sampler attends to the padding before the prompt; look at the prompt's mask in prefill and decoding."
  yield case.try_score("padding", "padding attended, at position 0", text, seen)
  columns_RT = np.broadcast_to(np.arange(T, dtype=np.int32), tokens_RT.shape)
  yield case.try_score("padding", "padding attended, positions by column", text, seen.replace(position_RT=columns_RT))


def stale_weights(case: Case) -> Iterator[Finding]:
  """The sampler's weights are not the trainer's."""
  changed = case.score.changed_weights()
  if not changed:
    yield Finding("weights", "no", "the sampler's weights are the trainer's.", "sampler's weights compared: equal")
    return
  text = describe_changed(changed)
  if case.score.scores_published():
    yield case.try_score("weights", "the trainer scored with the sampler's weights", text, sampler_weights=True)
  else:
    yield Finding("weights", "fits", text, "sampler's weights compared: different")


def describe_changed(names: list[str]) -> str:
  """The sentence about weights that differ."""
  more = f" and {len(names) - 3} more" if len(names) > 3 else ""
  return (f"the sampler's weights are not the trainer's in {', '.join(names[:3])}{more}: stale, or changed on the way; "
          "publish the params anew before each step's rollouts.")


def precision(case: Case) -> Iterator[Finding]:
  """One side, or both, is rougher than the other: measured against a float32 score of the trainer."""
  exact_RC, rough_RC = (case.score(case.batch, dtype=d) for d in ("float32", "bfloat16"))
  rounding, trainer_off, sampler_off = (
      float(np.abs(logp_RC - exact_RC)[case.batch.completion_mask_RC].mean())
      for logp_RC in (rough_RC, case.batch.logp_old_RC, case.batch.logp_sampler_RC))
  size = (f"against the trainer in float32 the sampler is off by {sampler_off:.2g}, the trainer by {trainer_off:.2g}; "
          f"bfloat16 rounding alone makes {rounding:.2g} on these tokens (typical: {TYPICAL_BFLOAT16:g})")
  comparable = rounding / 3 <= sampler_off <= 3 * rounding
  if case.cfg.model.compute_dtype == "float32":
    text = f"the sampler computes in bfloat16 although model.compute_dtype is float32: {size}."
    yield _fit(case.try_score("precision", "the trainer computed in bfloat16", text, dtype="bfloat16"), comparable)
    return
  exact = case.try_score("precision", "the trainer computed in float32", "", dtype="float32")
  if exact.verdict == "explains" or sampler_off <= trainer_off / 2:
    yield _fit(dataclasses.replace(exact, text=f"the trainer is the rough side: {size}."), True)
  elif comparable and trainer_off <= 3 * rounding:
    yield _fit(dataclasses.replace(
        exact, text=f"both sides round like bfloat16, to which this model is unusually sensitive: {size}. "
        "Set model.compute_dtype=float32, or loss.importance_cap."), True)
  else:
    yield dataclasses.replace(exact, text=f"the sampler is the side that is off, by more than bfloat16 does: {size}.")


HYPOTHESES = (temperature, sampling_filter, positions, padding, stale_weights, precision)


def _fit(finding: Finding, fits: bool) -> Finding:
  return dataclasses.replace(finding, verdict="fits") if fits and finding.verdict == "no" else finding


def _documented(case: Case) -> Batch:
  """The batch with segments and positions computed here, from what structs.Batch says of them."""
  C = case.batch.completion_mask_RC.shape[1]
  column_T = np.arange(case.batch.tokens_RT.shape[1])
  P = len(column_T) - C
  first_R1 = P - case.by_row(case.prompts.n_prompt_B)[:, None]
  end_R1 = P + np.asarray(case.rollouts.n_tokens_BGJ).reshape(-1, 1)
  real_RT = (column_T >= first_R1) & (column_T < end_R1)
  return case.batch.replace(
      segment_RT=real_RT.astype(np.int32), position_RT=np.where(real_RT, column_T - first_R1, 0).astype(np.int32))


def _golden(function: Callable[[float], float], low: float, high: float) -> float:
  """Where a function with one valley is smallest, by golden section."""
  ratio = (math.sqrt(5) - 1) / 2
  a, b = high - ratio * (high - low), low + ratio * (high - low)
  at_a, at_b = function(a), function(b)
  for _ in range(_REFINEMENTS):
    if at_a < at_b:
      high, b, at_b = b, a, at_a
      a = high - ratio * (high - low)
      at_a = function(a)
    else:
      low, a, at_a = a, b, at_b
      b = low + ratio * (high - low)
      at_b = function(b)
  return a if at_a < at_b else b

