"""The table of reward forms: where each comes from and what it has to be given. No JAX here: validation reads it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Form:
  """One value of `reward.form`.

  paper: where it comes from.
  reads_budget: whether the reward of a response depends on its subgroup's budget.
  has_baseline: whether there is f2(b), which A_intra subtracts.
  reads_group: whether it depends on the other responses, so that one response alone has no reward.
  reads_mode: whether it asks if a response thinks.
  has_stages: whether it changes at given steps.
  has_memory: whether it keeps numbers from one step to the next, in `TrainState.memory`.
  wrong_pays: whether a wrong answer, too, earns less the longer it is.
  alpha: what `reward.alpha=None` means; None where that is 1 / reward.max_response_tokens.
  delta: what `reward.delta=None` means.
  """
  paper: str
  reads_budget: bool = False
  has_baseline: bool = False
  reads_group: bool = False
  reads_mode: bool = False
  has_stages: bool = False
  has_memory: bool = False
  wrong_pays: bool = False
  alpha: float | None = None
  delta: float = 0.0

  @property
  def stands_alone(self) -> bool:
    """Whether length, correctness and budget of one response say its reward."""
    return not (self.reads_group or self.reads_mode or self.has_stages or self.has_memory)


_HBPO = "HBPO (arXiv 2507.15844)"
FORMS = {
    "piecewise": Form(_HBPO, reads_budget=True, has_baseline=True),
    "min": Form(_HBPO, reads_budget=True, has_baseline=True),
    "length": Form(_HBPO, reads_budget=True, has_baseline=True),
    "classic": Form(_HBPO),
    "cosine": Form(_HBPO),
    "l1_exact": Form("L1-Exact (arXiv 2503.04697)", reads_budget=True, wrong_pays=True, alpha=3e-4),
    "l1_max": Form("L1-Max (arXiv 2503.04697)", reads_budget=True, alpha=3e-4, delta=0.5),
    "efficient": Form("Training Language Models to Reason Efficiently (arXiv 2502.04463)", reads_group=True, alpha=0.2),
    "alp": Form("ALP (arXiv 2506.05256)", reads_group=True, wrong_pays=True, alpha=1e-7),
    "grpo_lambda": Form("GRPO-lambda (arXiv 2505.18086)", reads_group=True, alpha=0.2),
    "adlp": Form("A-DLP (arXiv 2505.18298)", has_memory=True, wrong_pays=True),
    "hmpo": Form("HMPO (arXiv 2606.01934)", reads_group=True),
    "thinkprune": Form("ThinkPrune (arXiv 2504.01296)", has_stages=True),
    "adaptthink": Form("AdaptThink (arXiv 2505.13417)", reads_mode=True, delta=0.05),
    "autothink": Form("AutoThink (arXiv 2505.10832)", reads_group=True, reads_mode=True),
}
# The forms of `objective.reward` itself; the others are those of `objective.rivals`.
OWN = tuple(name for name, form in FORMS.items() if form.paper == _HBPO)
WITH_BASELINE = tuple(name for name, form in FORMS.items() if form.has_baseline)
