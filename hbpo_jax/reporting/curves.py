"""What a configuration's reward and advantage favour, in words: warnings with numbers and a remedy each.

    findings = curves.check(cfg)        # numbers and warnings
    curves.brief(cfg)                   # a few lines for the start of a run
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses

from hbpo_jax.config import Config
from hbpo_jax.objective.forms import FORMS
from hbpo_jax.reporting import curve_findings
from hbpo_jax.reporting.curve_findings import BudgetFindings, Group, Lengths, Shape, reward_curves

__all__ = ["BudgetFindings", "Caution", "Findings", "Group", "Lengths", "Shape", "brief", "check", "reward_curves"]

_MOST_LINES = 6  # Of `brief`.
_LONG = 0.02  # Of L_max: a flat stretch of the reward that is worth a word.


@dataclasses.dataclass(frozen=True)
class Caution:
  """kind: its name.  brief: one short line.  text: what holds, with numbers, and which setting changes it."""
  kind: str
  brief: str
  text: str


@dataclasses.dataclass(frozen=True)
class Findings:
  """What `check` found.

  intra_coef: weight of A_intra; 0 where there is none.
  lengths: where measured lengths came from; None without.
  shape: the numbers; None where there is nothing to draw.
  warnings: most severe first.
  nothing: why there is nothing to draw, or empty.
  """
  form: str
  max_response_tokens: int
  intra_coef: float
  center_intra: bool
  lengths: str | None
  shape: Shape | None
  warnings: tuple[Caution, ...]
  nothing: str = ""

  def brief(self) -> list[str]:
    """At most six short lines: the reward, then the warnings."""
    if self.shape is None:
      return [f"reward {self.form}, L_max {self.max_response_tokens:,}; {self.nothing}"]
    budgets = _few(self.shape.budgets, lambda b: f"{b.budget:,}")
    line = f"reward {self.form}, budgets {budgets}, L_max {self.max_response_tokens:,}"
    if self.shape.switches:
      line += f"; the best budget changes at {_few(self.shape.switches, lambda s: f'{s.n_gen:,}')} tokens"
    left = _MOST_LINES - 1
    shown = self.warnings if len(self.warnings) <= left else self.warnings[:left - 1]
    lines = [line, *(f"warning: {w.brief}" for w in shown)]
    return lines + ([f"and {more} more"] if (more := len(self.warnings) - len(shown)) else [])


def check(cfg: Config, lengths: Lengths | None = None) -> Findings:
  """The findings on a configuration.

  Args:
    cfg: valid settings (`hbpo_jax.validation`).
    lengths: of responses that were measured, if there are any.
  """
  if nothing := nothing_to_draw(cfg):
    return Findings(
        form=cfg.reward.form, max_response_tokens=cfg.reward.max_response_tokens, intra_coef=cfg.advantage.intra_coef,
        center_intra=cfg.advantage.center_intra, lengths=None, shape=None, warnings=(), nothing=nothing)
  shape = curve_findings.measure(cfg, lengths)
  source = lengths.source if lengths else None
  found = [
      _below_wrong(cfg, shape, source), _below_unfinished(shape), _unfinished_pays(shape), _only_down(cfg, shape),
      _centred_away(cfg, shape), _cut_off(cfg, shape, source), _no_overrun(cfg, shape), _sentence_in_cap(cfg),
      _never_best(shape), _longer_pays(shape), _flat(cfg, shape), _same_for_all(cfg, shape)]
  return Findings(
      form=cfg.reward.form, max_response_tokens=cfg.reward.max_response_tokens, intra_coef=cfg.advantage.intra_coef,
      center_intra=cfg.advantage.center_intra, lengths=source, shape=shape,
      warnings=tuple(w for w in found if w is not None))


def nothing_to_draw(cfg: Config) -> str:
  """Why a form has no reward curve, in a sentence; empty where it has one.

  Of forms that change from step to step the curve is that of the first, and all responses think.
  """
  if not FORMS[cfg.reward.form].reads_group:
    return ""
  return (f"there is no reward curve to draw: with reward.form={cfg.reward.form} a response's reward depends on the "
          "other responses of the step.")


def brief(cfg: Config) -> list[str]:
  """At most six short lines on a configuration, for the start of a run."""
  return check(cfg).brief()


def _below_wrong(cfg: Config, shape: Shape, source: str | None) -> Caution | None:
  hit = [b for b in shape.budgets if b.below_wrong_from is not None and b.below_wrong_from <= b.cap]
  if not hit or FORMS[cfg.reward.form].wrong_pays:
    return None
  others = "a wrong one" if _differ(hit[0], shape) else "a wrong or unfinished one"
  low = min(hit, key=lambda b: b.lowest)
  text = [
      f"From {_all(hit, lambda b: f'{b.below_wrong_from:,}')} tokens on ({_budgets(hit)}) a correct answer scores "
      f"below {others}, which scores {hit[0].wrong:g}; the lowest, {low.lowest:.3f}, is under budget {low.budget:,}. "
      "Training then prefers a wrong answer to a right one of that length."]
  if source and all(b.responses_below_wrong is not None for b in hit):
    text.append(f"Of the measured responses ({source}), {_all(hit, lambda b: _percent(b.responses_below_wrong))} are "
                "that long.")
  remedies = ["a smaller reward.alpha (or distance_weight) or a larger reward.max_response_tokens moves the point out"]
  if all(b.unfinished >= b.wrong - shape.tolerance for b in hit):
    caps = [min(b.cap, (b.below_wrong_from or b.cap + 1) - 1) for b in shape.budgets]
    remedies.insert(0, f"rollout.caps={','.join(map(str, caps))} ends responses before it")
  text.append(f"What helps: {'; '.join(remedies)}.")
  if cfg.reward.grader:
    text.append("The score of reward.grader scales the loss too: a half-right answer of that length scores above a "
                "right one.")
  lengths = _few(hit, lambda b: f"{b.below_wrong_from:,}")
  return Caution("below_wrong", f"from {lengths} tokens a correct answer scores below {others}", " ".join(text))


def _below_unfinished(shape: Shape) -> Caution | None:
  """Only where an unfinished answer scores otherwise than a wrong one; else `_below_wrong` says it."""
  hit = [b for b in shape.budgets
         if _differ(b, shape) and b.below_unfinished_from is not None and b.below_unfinished_from <= b.cap]
  if not hit:
    return None
  score, say = f"{hit[0].unfinished:g}", lambda b: f"{b.below_unfinished_from:,}"
  return Caution(
      "below_unfinished", f"from {_few(hit, say)} tokens a correct answer scores below an unfinished one ({score})",
      f"From {_all(hit, say)} tokens on ({_budgets(hit)}) a correct answer scores below an unfinished one, which "
      f"scores {score}: being cut off is then better than being right. A reward.unfinished_reward below "
      f"{min(b.lowest for b in hit):.3f}, the lowest reward of a correct answer, avoids it.")


def _unfinished_pays(shape: Shape) -> Caution | None:
  b = shape.budgets[0]
  if b.unfinished <= b.wrong + shape.tolerance:
    return None
  return Caution(
      "unfinished_pays", f"an unfinished answer scores {b.unfinished:g}, a wrong one {b.wrong:g}",
      f"An unfinished answer scores {b.unfinished:g}, more than a finished wrong one ({b.wrong:g}): not answering "
      f"pays. Set reward.unfinished_reward to at most {b.wrong:g}.")


def _only_down(cfg: Config, shape: Shape) -> Caution | None:
  coef, all_wrong = cfg.advantage.intra_coef, shape.groups[0]
  highest = max(b.intra_high for b in shape.budgets)
  lowest = min(b.intra_low for b in shape.budgets)
  if coef == 0 or highest > shape.tolerance or lowest >= -shape.tolerance:
    return None
  size = lambda v: f"{abs(v):.2f}"
  text = [
      f"A_intra is never positive: 0 at best, {lowest:.2f} at worst, times advantage.intra_coef={coef:g}. Where all "
      f"answers to a question are wrong, A_inter is 0 and every token is pushed down by {_all(all_wrong.total, size)} "
      f"({_budgets(shape.budgets)})."]
  right = [v for v in shape.groups[2].total if v is not None]
  if max(right) < 0:
    text.append(
        f"Where half are right, even the right ones are pushed down, by {-max(right):.2f} to {-min(right):.2f}.")
  text.append(
      f"The largest push up is {max(b.push_up for b in shape.budgets):.2f}, the largest down "
      f"{-min(b.push_down for b in shape.budgets):.2f}.")
  text.append(
      "advantage.center_intra=true takes away what all budgets have in common; a smaller advantage.intra_coef weakens "
      "it." if cfg.n_subgroups > 1 else "A smaller advantage.intra_coef weakens it; 0 turns it off.")
  return Caution(
      "only_down", "A_intra is never positive: a question answered wrong throughout is pushed down by "
      f"{_few(all_wrong.total, size)}",
      " ".join(text))


def _centred_away(cfg: Config, shape: Shape) -> Caution | None:
  reach = max(max(abs(b.intra_low), abs(b.intra_high)) for b in shape.budgets)
  if not (FORMS[cfg.reward.form].has_baseline and cfg.advantage.intra_coef and reach <= shape.tolerance):
    return None
  return Caution(
      "centred_away", "A_intra is always 0: it is centred over a single budget",
      f"A_intra is always 0, although advantage.intra_coef={cfg.advantage.intra_coef:g}: advantage.center_intra=true "
      "subtracts its mean over the budgets, and there is one. Set advantage.center_intra=false, or add to "
      "rollout.budgets.")


def _cut_off(cfg: Config, shape: Shape, source: str | None) -> Caution | None:
  hit = [b for b in shape.budgets if b.forfeits is not None]
  if not hit:
    return None
  beyond = _all(hit, lambda b: _percent(b.beyond_cap))
  if source is not None and all(b.responses_beyond_cap is not None for b in hit):
    say = lambda b: _percent(b.responses_beyond_cap)
    short = f"{_few(hit, say)} of the measured responses are longer"
    share = f"Of the measured responses ({source}), {_all(hit, say)} are longer than the cap."
  else:
    short = "how many responses that cuts is not known"
    share = (
        f"How many responses are that long is not known. Of the possible lengths, 1 to "
        f"{cfg.reward.max_response_tokens:,}, the caps leave out {beyond}, which says nothing on the share of "
        "responses; a --workdir with the metrics.jsonl of a run, or with an evaluation, does.")
  text = (
      f"rollout.caps end responses at {_all(hit, lambda b: f'{b.cap:,}')} tokens ({_budgets(hit)}). A correct answer "
      f"of {_all(hit, lambda b: f'{b.forfeits[0]:,} to {b.forfeits[1]:,}')} tokens forfeits its reward there, up to "
      f"{_all(hit, lambda b: f'{b.forfeited:.2f}')} above what the truncated one scores. {share} Higher caps forfeit "
      "less; rollout.caps=() lets every budget run to L_max.")
  return Caution("cut_off", f"caps end responses at {_few(hit, lambda b: f'{b.cap:,}')} tokens: {short}", text)


def _no_overrun(cfg: Config, shape: Shape) -> Caution | None:
  hit = [b for b in shape.budgets if b.cap == b.budget and b.cap < cfg.reward.max_response_tokens]
  if not hit or not shape.budgets_matter:
    return None
  return Caution(
      "no_overrun", f"the cap is the budget itself ({_budgets(hit)}): no response can overrun it",
      f"The cap is the budget itself ({_budgets(hit)}): no response overruns it, the falling part of its reward is "
      "never seen, and what would overrun is truncated instead. Raise those of rollout.caps above the budget.")


def _sentence_in_cap(cfg: Config) -> Caution | None:
  if not cfg.rollout.count_prefix_tokens or min(cfg.caps) >= cfg.reward.max_response_tokens:
    return None
  words = len((cfg.prompt.openings or (cfg.prompt.budget_sentence,))[0].split())
  if not any(cfg.prompt.opening(g, b) for g, b in enumerate(cfg.rollout.budgets)):
    return None
  return Caution(
      "sentence_in_cap", "the budget sentence counts in the caps",
      f"The budget sentence ({words} {'word' if words == 1 else 'words'}) counts as part of the response: a response "
      f"has its cap, from {min(cfg.caps):,} tokens on, less those of the sentence. rollout.count_prefix_tokens=false "
      "leaves it out, of n_gen too.")


def _never_best(shape: Shape) -> Caution | None:
  if not shape.never_best:
    return None
  names, few = (say(shape.never_best, lambda b: f"{b:,}") for say in (_all, _few))
  one = len(shape.never_best) == 1
  return Caution(
      "never_best", f"{'budget' if one else 'budgets'} {few} never {'has' if one else 'have'} the best reward",
      f"At no length does {'budget' if one else 'any of the budgets'} {names} reward a correct answer above all "
      f"others, so comparing budgets never speaks for {'it' if one else 'them'}. Take {'it' if one else 'them'} out of "
      "rollout.budgets, or change reward.alpha and rollout.caps.")


def _longer_pays(shape: Shape) -> Caution | None:
  hit = [b for b in shape.budgets if b.best_lengths[0] > 1]
  if not hit:
    return None
  lengths, few = (say(hit, lambda b: f"{b.best_lengths[0]:,}") for say in (_all, _few))
  return Caution(
      "longer_pays", f"below {few} tokens a shorter answer scores less",
      f"Below {lengths} tokens ({_budgets(hit)}) a correct answer scores less the shorter it is. reward.form=piecewise "
      "rewards every length within the budget alike.")


def _flat(cfg: Config, shape: Shape) -> Caution | None:
  first = shape.budgets[0]
  start, end = first.best_lengths
  if end - start + 1 < _LONG * cfg.reward.max_response_tokens:
    return None
  no_budget = " with advantage.intra_coef=0" if cfg.advantage.intra_coef else ""
  if start == 1 and end == cfg.reward.max_response_tokens:
    return Caution(
        "flat", "the reward is the same at every length: nothing rewards a shorter answer",
        f"A correct answer scores {first.highest:g} at every length up to L_max: nothing rewards a shorter one. "
        "reward.form=piecewise or cosine does.")
  return Caution(
      "flat", f"up to {end:,} tokens nothing rewards a shorter answer",
      f"From {start:,} to {end:,} tokens a correct answer scores the same under budget {first.budget:,}, the smallest: "
      f"nothing there rewards a shorter answer. A smaller first budget in rollout.budgets, "
      f"or reward.form=cosine{no_budget}, does.")


def _same_for_all(cfg: Config, shape: Shape) -> Caution | None:
  if shape.budgets_matter or cfg.n_subgroups == 1 or FORMS[cfg.reward.form].reads_mode:  # Its openings differ.
    return None
  return Caution(
      "same_for_all", "the reward does not depend on the budget",
      f"With reward.form={cfg.reward.form} the reward does not depend on the budget: the {cfg.n_subgroups} budgets "
      "differ in their sentence only. reward.form=piecewise or min makes a difference between them.")


def _differ(b: BudgetFindings, shape: Shape) -> bool:
  """Whether an unfinished answer scores otherwise than a wrong one."""
  return abs(b.unfinished - b.wrong) > shape.tolerance


def _all(items: Iterable, say: Callable) -> str:
  """The items in words; said once where they are all alike."""
  words = [say(item) for item in items]
  return words[0] if len(set(words)) == 1 else " / ".join(words)


def _few(items: Iterable, say: Callable) -> str:
  """The same, shortened to the first and the last where they are many."""
  words = _all(items, say).split(" / ")
  return " / ".join(words) if len(words) <= 4 else f"{words[0]} ... {words[-1]}"


def _budgets(hit: Sequence[BudgetFindings]) -> str:
  return ("budget " if len(hit) == 1 else "budgets ") + " / ".join(f"{b.budget:,}" for b in hit)


def _percent(share: float) -> str:
  return f"{100 * share:.1f} %" if 0 < share < 0.1 else f"{100 * share:.0f} %"
