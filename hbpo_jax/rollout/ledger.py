"""Where a step's decoding went."""

import dataclasses


@dataclasses.dataclass
class Ledger:
  """Where the slot-steps of a step went, and its time. A slot-step is one row of one decoding step.

  slot_steps = useful + truncated + overrun + idle.
  useful: tokens of finished responses.  truncated: tokens of responses that hit their limit, which earn nothing.
  overrun: a finished row waited for the segment's end.  idle: nothing sat in the row.
  n_segments: transfers to the host.
  prefill_s; decode_s: from the start of a segment to its result, with what the host did meanwhile; host_s: from a
    result to the next segment's start, while the devices wait.
  """
  slot_steps: int = 0
  useful: int = 0
  truncated: int = 0
  overrun: int = 0
  idle: int = 0
  n_segments: int = 0
  prefill_s: float = 0.0
  decode_s: float = 0.0
  host_s: float = 0.0

  def add(self, other: "Ledger") -> None:
    """Adds the entries of another."""
    for field in dataclasses.fields(self):
      setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

  @property
  def utilisation(self) -> float:
    """Share of the slot-steps that decided a token."""
    return (self.useful + self.truncated) / self.slot_steps if self.slot_steps else 0.0

  def metrics(self) -> dict[str, float]:
    """All of it by tag: counts and utilisation under `rollout/`, seconds under `time/`, and the rollouts' tokens/s."""
    total_s = self.prefill_s + self.decode_s + self.host_s
    per_s = lambda n: n / total_s if total_s else 0.0
    values = dataclasses.asdict(self)
    seconds = {name: values.pop(name) for name in ("prefill_s", "decode_s", "host_s")}
    return (
        {f"rollout/{name}": float(n) for name, n in values.items()}
        | {f"time/rollout_{name}": s for name, s in seconds.items()}
        | {"rollout/utilisation": self.utilisation, "tokens_per_s_useful": per_s(self.useful),
           "tokens_per_s_rollout": per_s(self.useful + self.truncated)})
