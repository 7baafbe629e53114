"""Do the sampler and the trainer compute the same probabilities? If not, why?

  python -m hbpo_jax.doctor --config=r1_distill_qwen_1p5b --workdir=runs/doctor

Generates rollouts of the first training step with the training engine, scores the same tokens with the trainer's
forward pass, and compares the log-probabilities token by token. Where they differ, the trainer's score is computed
again under each hypothesis (`hbpo_jax.diagnosis`), and what makes the gap vanish is named. Prompts and responses are
checked in any case: a doubled BOS harms both sides alike and leaves no gap. Nothing is trained; the weights are those
of model.path. Exit code 0 if healthy, 1 if not, 2 if the settings do not let it begin.
"""

from hbpo_jax import flags

if __name__ == "__main__":
  flags.show_help("doctor")  # Before the imports below, which take seconds.

from collections.abc import Sequence
import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from hbpo_jax import assemble, diagnosis
from hbpo_jax.config import Config, LoraConfig
from hbpo_jax.data import problems as problems_lib
from hbpo_jax.data.pipeline import Pipeline
from hbpo_jax.data.prompts import THINK_CLOSE, THINK_OPEN
from hbpo_jax.data.record import Problem
from hbpo_jax.diagnosis import Case, Finding
from hbpo_jax.files import atomic_write_text, json_value
from hbpo_jax.learning.learner import Learner
from hbpo_jax.models import weights
from hbpo_jax.reporting import tables
from hbpo_jax.reporting.console import Console
from hbpo_jax.structs import Prompts, Rollouts
from hbpo_jax.train import training_key

QUERIES = 8  # Enough rows to tell; a whole step would only take longer.
SHOWN_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Report:
  """What the doctor found.

  healthy: the gap is within the tolerance, and nothing is wrong with prompts and responses.
  verdict: the finding in words, for people.
  rows: one per rollout, largest mean |dlogp| first; see `row_gaps`.
  findings: of the hypotheses (none for a gap within the tolerance) and of the checks of prompts and responses.
  """
  healthy: bool
  verdict: str
  case: Case
  rows: list[dict[str, Any]]
  findings: list[Finding]

  def to_json(self) -> dict[str, Any]:
    """The contents of doctor.json."""
    cfg, tolerance = self.case.cfg, self.case.tolerance
    return {
        "healthy": self.healthy, "verdict": self.verdict, **self.case.gap,
        "tokens": int(self.case.batch.completion_mask_RC.sum()), "rollouts": len(self.rows),
        "compute_dtype": cfg.model.compute_dtype, "tolerance": dataclasses.asdict(tolerance),
        "clip_interval": [1 - cfg.loss.clip_low, 1 + cfg.loss.clip_high],
        "findings": [dataclasses.asdict(f) for f in self.findings], "rows": self.rows,
    }


def examine(case: Case, problems: list[Problem], model: assemble.Model) -> Report:
  """The report on one compared batch.

  Args:
    case: of `diagnosis.compare`.
    problems: the B problems of its prompts.
    model: whose tokenizer made the prompts.
  """
  tokenizer = assemble.load_tokenizer(model.directory, model.arch)
  checks = [
      *check_prompts(
          [p.problem for p in problems], case.prompts, model.builder, tokenizer, case.cfg.prompt.instruction),
      *check_responses(case.rollouts, model.builder, tokenizer)]
  if case.agrees and (changed := case.score.changed_weights()):  # A difference too small to see in bfloat16.
    checks.append(Finding("weights", "fault", diagnosis.describe_changed(changed)))
  tried = [] if case.agrees else diagnosis.diagnose(case)
  return Report(
      healthy=case.agrees and not any(f.verdict == "fault" for f in checks), verdict=_verdict(case, tried, checks),
      case=case, rows=row_gaps(case, problems, tokenizer), findings=tried + checks)


def row_gaps(case: Case, problems: list[Problem], tokenizer: Any) -> list[dict[str, Any]]:
  """One dict per rollout, largest mean |dlogp| first: query, budget, rollout, tokens, mean, max, first, token, text.

  `first` is the first slot of the response whose |dlogp| exceeds the tolerance of a token, None without one; `token`
  and `text` are the token there.
  """
  mask_RC, d_RC = case.batch.completion_mask_RC, np.abs(case.log_ratio())
  P = case.batch.tokens_RT.shape[1] - mask_RC.shape[1]
  _, G, J = case.rollouts.n_tokens_BGJ.shape
  rows = []
  for r, (mask_C, d_C) in enumerate(zip(mask_RC, d_RC, strict=True)):
    n = int(mask_C.sum())
    beyond = np.flatnonzero(~(d_C <= case.tolerance.max))  # NaN, too.
    first = int(beyond[0]) if len(beyond) else None
    token = None if first is None else int(case.batch.tokens_RT[r, P + first])
    rows.append({
        "query": problems[r // (G * J)].id, "budget": case.cfg.rollout.budgets[r // J % G], "rollout": r % J,
        "tokens": n, "mean": float(d_C.sum()) / max(n, 1), "max": float(d_C.max()), "first": first, "token": token,
        "text": None if token is None else tokenizer.decode([token])})
  return sorted(rows, key=lambda row: -np.nan_to_num(row["mean"], nan=np.inf))


def check_prompts(
    texts: Sequence[str], prompts: Prompts, builder: Any, tokenizer: Any, instruction: str = "") -> list[Finding]:
  """Whether the sampler was given what the chat template writes: one BOS, one opened thought, nothing else.

  Args:
    texts: the B problems.
    prompts: what the sampler was given, on the host.
    builder: the PromptBuilder that renders them.
    tokenizer: its tokenizer.
    instruction: prompt.instruction.
  """
  encode = lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])
  faults: dict[str, str] = {}
  for text, tokens_P, n in zip(texts, prompts.tokens_BP, prompts.n_prompt_B, strict=True):
    given = [int(t) for t in tokens_P[len(tokens_P) - n:]]
    expected = encode(builder.render(text))
    bos = tokenizer.bos_token_id
    if bos is not None and given[:2] == [bos, bos]:
      faults.setdefault("BOS", (
          f"prompts begin with {tokenizer.bos_token!r} twice; the template writes it, so the tokenizer must not add it "
          "again (add_special_tokens=False)." if expected[:2] != [bos, bos] else
          f"prompts begin with {tokenizer.bos_token!r} twice; mend the chat template, which writes both."))
    if given != expected:
      at = next((i for i, (a, b) in enumerate(zip(given, expected)) if a != b), min(len(given), len(expected)))
      faults.setdefault("template", (
          f"prompts are not what the chat template writes: from token {at} on the sampler was given "
          f"{tokenizer.decode(given[at:at + 8])!r} instead of {tokenizer.decode(expected[at:at + 8])!r}."))
    # Behind the question only: a system message or an instruction may speak of the tags.
    _, found, behind = tokenizer.decode(given).rpartition(
        tokenizer.decode(encode(f"{text.strip()} {instruction}".strip())).strip())
    if found and (behind.count(THINK_OPEN), behind.count(THINK_CLOSE)) != (1, 0):
      faults.setdefault("thought", (
          f"prompts end with {behind[-60:]!r}: {THINK_OPEN} must be opened once, and stay open."))
  return [Finding(name, "fault", text) for name, text in faults.items()] or [
      Finding("prompts", "fine", f"as the chat template writes them, inside one {THINK_OPEN}, no doubled BOS.")]


def check_responses(rollouts: Rollouts, builder: Any, tokenizer: Any) -> list[Finding]:
  """Whether responses end where an EOS id says so; for information, whether their text gives their tokens again."""
  n_again, wrong = 0, []
  B, G, J = rollouts.n_tokens_BGJ.shape
  for b, g, j in np.ndindex(B, G, J):
    tokens = rollouts.tokens[g][b, j, :rollouts.n_tokens_BGJ[b, g, j]].tolist()
    ends = [i for i, t in enumerate(tokens) if t in builder.eos_ids]
    if ends != ([] if rollouts.truncated_BGJ[b, g, j] else [len(tokens) - 1]):
      wrong.append((b, g, j))
    text = builder.decode(tokens)
    n_again += [t for t in tokens if t not in builder.eos_ids] == tokenizer(text, add_special_tokens=False)["input_ids"]
  name = lambda i: f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})"
  others = [name(i) for i in builder.eos_ids if i != tokenizer.eos_token_id]
  if wrong:
    ends = Finding("EOS", "fault", (
        f"{len(wrong)} responses do not end at the first of the ids {builder.eos_ids} (first: query, budget, rollout "
        f"{wrong[0]}); the sampler stops at other ids than the tokenizer and generation_config.json name."))
  else:
    ends = Finding("EOS", "fine", f"responses end at {name(tokenizer.eos_token_id)}" + (
        f" and, of generation_config.json, {', '.join(others)}." if others else
        "; generation_config.json names no other."))
  again = Finding("round trip", "note", (
      f"{tables.percent(n_again / (B * G * J))} of the responses keep their tokens when decoded and encoded again; "
      "training keeps the sampled tokens, so any share is harmless here."))
  return [ends, again]


def _verdict(case: Case, tried: list[Finding], checks: list[Finding]) -> str:
  """What a person reads last."""
  gap, tolerance = case.gap, case.tolerance
  size = f"mean |dlogp| {gap['sampler_gap_mean']:.2g}, max {gap['sampler_gap_max']:.2g}"
  allowed = f"{case.cfg.model.compute_dtype} allows {tolerance.mean:g} and {tolerance.max:g}"
  lines = []
  for fault in (f for f in checks if f.verdict == "fault"):
    lines.append(f"NOT HEALTHY: {fault.name}: {fault.text}")
  if case.agrees:
    lines.append(f"{'The gap is fine' if lines else 'healthy: sampler and trainer agree'}: {size} ({allowed}).")
    return "\n".join(lines)
  lines.append(f"NOT HEALTHY: sampler and trainer differ: {size} ({allowed}).")
  causes = [f for f in tried if f.verdict == "explains"] or [f for f in tried if f.verdict == "fits"]
  if not causes:
    return "\n".join([*lines, f"No hypothesis explains it. {diagnosis.locate(case)}"])
  for i, f in enumerate(causes):
    lines.append(f"{'Cause' if not i else 'Or'}{'' if f.verdict == 'explains' else ' (likely)'}: {f.name}: {f.text}")
  return "\n".join(lines)


def show(report: Report, console: Console) -> None:
  """Prints the tables and the verdict."""
  case, gap, loss = report.case, report.case.gap, report.case.cfg.loss
  sizes = lambda *values: tuple("-" if v is None else f"{v:.2e}" for v in values)
  total = sizes(gap["sampler_gap_mean"], gap["sampler_gap_max"])

  def row(r: dict[str, Any]) -> tuple[str, ...]:
    first = ("-", "-") if r["first"] is None else (str(r["first"]), repr(r["text"]))
    return (r["query"], str(r["budget"]), str(r["rollout"]), str(r["tokens"]), *sizes(r["mean"], r["max"]), *first)

  console.table(tables.Table(
      title="|dlogp|, trainer against sampler: the rollouts that differ most",
      columns=("query", "budget", "rollout", "tokens", "mean", "max", f"first > {case.tolerance.max:g}", "token"),
      rows=(*map(row, report.rows[:SHOWN_ROWS]),
            (f"all {len(report.rows)}", "", "", f"{case.batch.completion_mask_RC.sum():,}", *total, "", ""))))
  console.message(
      f"KL(sampler || trainer) {gap['sampler_kl']:.2e} nats per token; ratio outside the clip interval "
      f"[{1 - loss.clip_low:g}, {1 + loss.clip_high:g}] at {tables.percent(gap['sampler_outside_clip'])} of tokens\n")
  if tried := [f for f in report.findings if f.verdict in ("explains", "fits", "no")]:
    console.table(tables.Table(
        title="what would remain of |dlogp| if ...", columns=("hypothesis", "mean", "max", "verdict"),
        rows=(*((f"{f.name}: {f.tried}", *sizes(f.mean, f.max), f.verdict) for f in tried), ("as it is", *total, ""))))
  for f in report.findings:
    if f.verdict in ("fine", "note"):
      console.message(f"{f.name}: {f.text}")
  console.message("\n" + report.verdict)


def part_of_batch(
    problems: list[Problem], prompts: Prompts, cfg: Config, n_shards: int, wanted: int = QUERIES,
) -> tuple[list[Problem], Prompts]:
  """The first queries of a batch: about `wanted`, at most rollout.queries, a multiple of the shards."""
  n = min(-(-wanted // n_shards) * n_shards, cfg.rollout.queries)
  return problems[:n], prompts.replace(
      tokens_BP=prompts.tokens_BP[:n], n_prompt_B=prompts.n_prompt_B[:n], query_B=prompts.query_B[:n])


def main(cfg: Config, workdir: str) -> None:
  """Compares, diagnoses, prints, and writes WORKDIR/doctor.json.

  Raises:
    SystemExit: 1 when something is wrong.
  """
  assemble.keep_compiled_programs()
  cfg = dataclasses.replace(cfg, lora=LoraConfig())  # New adapters change nothing.
  model = assemble.open_model(cfg)
  problems, _ = problems_lib.load_train_and_eval(cfg.data, cfg.seed)
  data = Pipeline(problems, model.builder, cfg)
  learner = Learner(model.arch, cfg, model.mesh)
  problems, prompts = part_of_batch(*next(iter(data)), cfg, learner.shards)
  # The training engine but for its number of queries.
  part = dataclasses.replace(cfg, rollout=dataclasses.replace(cfg.rollout, queries=len(problems)))
  engine = assemble.training_engine(part, model)
  params = weights.load(model.directory, model.arch, model.mesh, param_dtype=cfg.model.param_dtype)

  with Console(dataclasses.replace(cfg.log, live=False), 1) as console:
    console.header([
        f"model: {model.directory} ({model.arch.family}), computing in {cfg.model.compute_dtype}",
        f"rollouts: {len(problems)} queries x {cfg.rollout.rollouts_per_query}, budgets {cfg.rollout.budgets}, "
        f"temperature {cfg.rollout.temperature:g}", ""])
    published = engine.publish(params)
    key = jax.random.fold_in(training_key(cfg.seed), 0)
    rollouts = jax.device_get(engine.generate(published, prompts, key))
    score = diagnosis.Scorer(learner, params, published, engine.publish)
    report = examine(diagnosis.compare(prompts, rollouts, score, cfg), problems, model)
    show(report, console)
    path = pathlib.Path(workdir) / "doctor.json"
    atomic_write_text(path, json.dumps(json_value(report.to_json()), indent=2) + "\n")
    console.message(f"see {path}")
  if not report.healthy:
    sys.exit(1)


def cli(argv: Sequence[str] | None = None) -> None:
  """Runs the command with these arguments; None means the process's."""
  flags.run(main, name="doctor", argv=argv)


if __name__ == "__main__":
  cli()
