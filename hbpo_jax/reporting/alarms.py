"""Alarms of a training run: what has gone wrong in its metrics, and what helps.

Functions of the rows of metrics.jsonl and of nothing else, so that a run that was resumed, and a report written later,
find the same alarms at the same steps.

    watch = Watch(thresholds, budgets)
    watch.replay(rows)                       # after a resume
    for alarm in watch.observe(step, row):   # each logged row
      ...
"""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import math
import statistics
from typing import Any

from hbpo_jax.config import AlarmConfig


@dataclasses.dataclass(frozen=True)
class Alarm:
  """kind: its name.  step: where it was raised.  value: what was seen, against the limit.
  text: one sentence: what was seen, against what, which remedy.  cleared_step: None while it lasts.
  """
  kind: str
  step: int
  value: float
  limit: float
  text: str
  cleared_step: int | None = None


class Watch:
  """The alarms of one run, row by row. A missing tag or a null leaves its alarms as they are.

  Args:
    thresholds: the limits.
    budgets: token budgets of the run, whose sentences are watched.
  """

  def __init__(self, thresholds: AlarmConfig, budgets: Sequence[int]):
    self._signals: list[_Signal | _SpikeSignal | _NonfiniteSignal] = [
        _Signal(rule, thresholds, budgets) for rule in _RULES if getattr(thresholds, rule.threshold)]
    if thresholds.grad_spike:
      self._signals.append(_SpikeSignal(thresholds.window, thresholds.grad_spike))
    if thresholds.nonfinite:
      self._signals.append(_NonfiniteSignal(thresholds.window))
    self._alarms: list[Alarm] = []

  def observe(self, step: int, metrics: Mapping[str, Any]) -> list[Alarm]:
    """The alarms that this row raises.

    Args:
      step: of the row; rows come in order.
      metrics: a row as metrics.jsonl holds it; call it for the rows that are logged and for no others.
    """
    raised = []
    for signal in self._signals:
      verdict = signal.observe(metrics)
      if verdict is None:
        continue
      open_at = next((i for i, a in enumerate(self._alarms) if a.kind == signal.kind and a.cleared_step is None), None)
      if verdict.beyond and open_at is None:
        raised.append(Alarm(signal.kind, int(step), verdict.value, verdict.limit, verdict.text))
      elif verdict.back and open_at is not None:
        self._alarms[open_at] = dataclasses.replace(self._alarms[open_at], cleared_step=int(step))
    self._alarms += raised
    return raised

  def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
    """Observes earlier rows, each with its `step`."""
    for row in rows:
      self.observe(row["step"], row)

  @property
  def active(self) -> list[Alarm]:
    """The alarms that last, in the order in which they were raised."""
    return [alarm for alarm in self._alarms if alarm.cleared_step is None]

  @property
  def alarms(self) -> list[Alarm]:
    """All alarms so far, in the order in which they were raised."""
    return list(self._alarms)


def history(rows: Iterable[Mapping[str, Any]], thresholds: AlarmConfig, budgets: Sequence[int]) -> list[Alarm]:
  """All alarms of a run, in the order in which they were raised.

  Args:
    rows: of metrics.jsonl.
    thresholds: the limits.
    budgets: token budgets of the run.
  """
  watch = Watch(thresholds, budgets)
  watch.replay(rows)
  return watch.alarms


@dataclasses.dataclass(frozen=True)
class _Limit:
  """at: (threshold, what the mean is compared with, margin) -> limit; margin 0 raises an alarm, more ends it.

  below: whether values below it are bad; else values above.  against: 'start' (the mean of the first rows), 'highest'
  (the highest running mean so far), or '' where it is absolute.
  """
  at: Callable[[float, float, float], float]
  below: bool = False
  against: str = ""


_ABOVE = _Limit(lambda threshold, compared, margin: threshold * (1 - margin))
_ABOVE_LOGARITHM = _Limit(lambda threshold, compared, margin: math.log(threshold * (1 - margin)))
_ABOVE_FACTOR = _Limit(lambda threshold, compared, margin: threshold * compared * (1 - margin), against="start")
_BELOW_SHARE = _Limit(
    lambda threshold, compared, margin: threshold * compared * (1 + margin), below=True, against="start")
_BELOW_HIGHEST = _Limit(
    lambda threshold, compared, margin: compared - threshold * (1 - margin), below=True, against="highest")


@dataclasses.dataclass(frozen=True)
class _Rule:
  """threshold: its field of AlarmConfig, which also turns it off.  read: (row, budgets) -> number, or None.
  unless_solved: whether it is no alarm where nearly all answers are right.
  text: a format string of value, limit, threshold, compared, over (which rows), start (which first rows).
  """
  kind: str
  threshold: str
  read: Callable[[Mapping[str, Any], Sequence[int]], float | None]
  limit: _Limit
  text: str
  unless_solved: bool = False


@dataclasses.dataclass(frozen=True)
class _Verdict:
  """beyond: past the limit.  back: past its margin on the good side; between the two, nothing changes."""
  beyond: bool
  back: bool
  value: float
  limit: float
  text: str


class _Signal:
  """The running mean that one rule watches."""

  def __init__(self, rule: _Rule, thresholds: AlarmConfig, budgets: Sequence[int]):
    self.kind = rule.kind
    self._rule, self._thresholds, self._budgets = rule, thresholds, budgets
    self._recent: collections.deque[float] = collections.deque(maxlen=thresholds.window)
    self._accuracy: collections.deque[float] = collections.deque(maxlen=thresholds.window)
    self._first: list[float] = []
    self._highest = -math.inf

  def observe(self, row: Mapping[str, Any]) -> _Verdict | None:
    """The verdict on the running mean; None while there is too little to tell, or where the row lacks the number."""
    t, rule = self._thresholds, self._rule
    value = rule.read(row, self._budgets)
    if value is None:
      return None
    self._recent.append(value)
    if (accuracy := _number(row, "accuracy")) is not None:
      self._accuracy.append(accuracy)
    if len(self._first) < t.reference:
      self._first.append(value)
    if len(self._recent) < t.window:
      return None
    mean = sum(self._recent) / t.window
    self._highest = max(self._highest, mean)
    compared = 0.0
    if rule.limit.against == "start":
      compared = sum(self._first) / len(self._first)
      if len(self._first) < t.reference or compared <= 0:
        return None
    elif rule.limit.against == "highest":
      compared = self._highest
    threshold = getattr(t, rule.threshold)
    limit, back = (rule.limit.at(threshold, compared, margin) for margin in (0.0, t.margin))
    text = rule.text.format(
        value=mean, limit=limit, threshold=threshold, compared=compared, over=f"mean of {t.window} rows",
        start=f"the first {t.reference} rows")
    if rule.limit.below:
      solved = rule.unless_solved and self._accuracy and sum(self._accuracy) / len(self._accuracy) > t.solved
      return _Verdict(mean < limit and not solved, mean > back, mean, limit, text)
    return _Verdict(mean > limit, mean < back, mean, limit, text)


class _SpikeSignal:
  """The gradient norm against the median of the window before: above it by the factor raises the alarm at once, a whole
  window without ends it. The median does not follow a spike, and follows a new level."""
  kind = "grad_spike"

  def __init__(self, window: int, factor: float):
    self._factor, self._window = factor, window
    self._recent: collections.deque[float] = collections.deque(maxlen=window)
    self._beyond: collections.deque[bool] = collections.deque(maxlen=window)

  def observe(self, row: Mapping[str, Any]) -> _Verdict | None:
    """The verdict on this row; None while the window is not full, or where the row lacks the number."""
    value = _number(row, "update/grad_norm")
    if value is None:
      return None
    before = list(self._recent)
    self._recent.append(value)
    if len(before) < self._window or not (median := statistics.median(before)):
      return None
    limit = self._factor * median
    self._beyond.append(value > limit)
    return _Verdict(value > limit, not any(self._beyond), value, limit, (
        f"The gradient norm jumped to {value:.3g}, more than {self._factor:g} times {median:.3g}, the median of the "
        f"{self._window} rows before; the update was clipped to optimizer.clip_norm, and if this comes again, lower "
        "optimizer.learning_rate or look at those responses in samples.jsonl."))


class _NonfiniteSignal:
  """Updates with a non-finite loss or gradient: any raises the alarm at once, a whole window without ends it."""
  kind = "nonfinite"

  def __init__(self, window: int):
    self._recent: collections.deque[float] = collections.deque(maxlen=window)

  def observe(self, row: Mapping[str, Any]) -> _Verdict | None:
    """The verdict on this row and the window before it."""
    value = _number(row, "update/nonfinite")
    if value is None:
      return None
    self._recent.append(value)
    return _Verdict(value > 0, sum(self._recent) == 0, value, 0.0, (
        f"{value:.0f} updates of this step were not finite, where there should be none; incidents.jsonl says in which "
        "tensor it began: lower optimizer.learning_rate, or set model.compute_dtype=float32 to see whether precision "
        "is the cause."))


def _number(row: Mapping[str, Any], tag: str) -> float | None:
  """The row's finite number of that tag, or None."""
  value = row.get(tag)
  return float(value) if value is not None and math.isfinite(value) else None


def _clip_share(row: Mapping[str, Any], budgets: Sequence[int]) -> float | None:
  low, high = (_number(row, f"update/clip_fraction_{side}") for side in ("low", "high"))
  return None if low is None or high is None else low + high


def _log_ratio_max(row: Mapping[str, Any], budgets: Sequence[int]) -> float | None:
  """A logarithm, so that one row does not outweigh a window of others."""
  value = _number(row, "update/ratio_max")
  return math.log(value) if value is not None and value > 0 else None


def _sampler_gap(row: Mapping[str, Any], budgets: Sequence[int]) -> float | None:
  return _number(row, "sampler/sampler_outside_clip")


def _sentence_logp(row: Mapping[str, Any], budgets: Sequence[int]) -> float | None:
  """log P(a response opens with any of the budget sentences), nats; None where the row does not say.

  The sum over budgets: a model that learns to choose a budget for each problem drops the sentences of the others.
  """
  p = [_number(row, f"budget_{b}/sentence_probability") for b in budgets]
  logp = [_number(row, f"budget_{b}/sentence_logp") for b in budgets]
  if total := sum(x for x in p if x is not None):
    return math.log(total)
  known = [x for x in logp if x is not None]
  if not known:
    return None
  # Below what a float holds; the mean of the logarithms is at least a lower bound.
  top = max(known)
  return top + math.log(sum(math.exp(x - top) for x in known))


def _tag(tag: str) -> Callable[[Mapping[str, Any], Sequence[int]], float | None]:
  return lambda row, budgets: _number(row, tag)


_RULES = (
    _Rule("exploration", "length_spread", _tag("length_spread"), _BELOW_SHARE, (
        "Lengths are no longer explored: within a query they differ by {value:.1f} tokens (standard deviation, "
        "{over}), less than {threshold:.0%} of the {compared:.1f} of {start}; raise rollout.temperature, lower "
        "optimizer.learning_rate, or set advantage.center_intra=true."), unless_solved=True),
    _Rule("sentence", "sentence_drop", _sentence_logp, _BELOW_HIGHEST, (
        "The budget sentences are dying out: log P(any of them) is {value:.1f} nats ({over}), more than {threshold:g} "
        "below its highest, {compared:.1f}; set advantage.center_intra=true, lower advantage.intra_coef or "
        "optimizer.learning_rate, or set prompt.prefix_role=context.")),
    _Rule("entropy_low", "entropy_low", _tag("entropy"), _BELOW_SHARE, (
        "The entropy is {value:.3g} nats per token ({over}), less than {threshold:.0%} of the {compared:.3g} of "
        "{start}: sampling has become all but certain; raise rollout.temperature or loss.clip_high, or lower "
        "optimizer.learning_rate."), unless_solved=True),
    _Rule("entropy_high", "entropy_high", _tag("entropy"), _ABOVE_FACTOR, (
        "The entropy is {value:.3g} nats per token ({over}), more than {threshold:g} times the {compared:.3g} of "
        "{start}: responses are coming apart; lower optimizer.learning_rate or advantage.intra_coef, or set "
        "loss.kl_coef above 0.")),
    _Rule("clipping", "clip_share", _clip_share, _ABOVE, (
        "{value:.0%} of the tokens are clipped ({over}), more than {limit:.0%}: updates go further than the loss can "
        "follow; lower optimizer.learning_rate, learner.minibatches or advantage.intra_coef.")),
    _Rule("ratio", "ratio_max", _log_ratio_max, _ABOVE_LOGARITHM, (
        "Some tokens became e^{value:.1f} times as likely within a step ({over}), more than {threshold:g} times: "
        "updates leave the policy that their data come from; lower optimizer.learning_rate or learner.minibatches.")),
    _Rule("sampler_gap", "sampler_gap", _sampler_gap, _ABOVE, (
        "For {value:.0%} of the tokens sampler and trainer differ by more than the clip ({over}), more than "
        "{limit:.0%}: the data are those of another policy; set loss.importance_cap=2.0, or "
        "model.compute_dtype=float32 to see whether precision is the cause.")),
    _Rule("truncation", "truncated", _tag("truncated"), _ABOVE, (
        "{value:.0%} of the responses are truncated ({over}), more than {limit:.0%}, and count as wrong; raise "
        "rollout.caps or reward.max_response_tokens.")),
    _Rule("timeouts", "timeouts", _tag("timeout"), _ABOVE, (
        "{value:.1%} of the gradings timed out ({over}), more than {limit:.1%}, and count as wrong; raise "
        "grading.cpu_seconds, or look at those responses in samples.jsonl.")),
    _Rule("no_signal", "zero_variance", _tag("zero_variance"), _ABOVE, (
        "{value:.0%} of the queries earn the same reward throughout ({over}), more than {limit:.0%}, so that A_inter "
        "is 0; take problems of another difficulty (data.source), or a larger rollout.rollouts_per_query.")),
)
