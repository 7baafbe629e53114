"""Accuracy and tokens of a checkpoint on benchmarks, in natural, efficiency and fixed-budget modes.

  python -m hbpo_jax.evaluate --config=eval --config.model.path=DIR --config.benchmarks=gsm8k,math500 --workdir=OUT

Running the same command again continues where it stopped, after a kill, SIGTERM or Ctrl-C: no stored response is
generated again.
"""

from hbpo_jax import flags

if __name__ == "__main__":
  flags.show_help("evaluate")  # Before the imports below, which take seconds.

from collections.abc import Sequence
import dataclasses
import pathlib

import jax

from hbpo_jax import assemble, distributed, preemption
from hbpo_jax.config import Config
from hbpo_jax.evaluation import benchmarks as benchmarks_lib
from hbpo_jax.evaluation import output
from hbpo_jax.evaluation.runner import Runner
from hbpo_jax.evaluation.store import RESULTS, Benchmark
from hbpo_jax.grading.judge import Judge, try_custom
from hbpo_jax.reporting.console import Console


def modes_of(cfg: Config) -> tuple[str, ...]:
  """The modes of `eval.modes`, each once; 'budgets' becomes the budgets of rollout.budgets."""
  found: dict[str, None] = {}
  for mode in cfg.eval.modes:
    for one in map(str, cfg.rollout.budgets) if mode == "budgets" else [mode]:
      found[str(int(one)) if one.isdecimal() else one] = None
  return tuple(found)


@distributed.on_every_host
@preemption.stoppable
def main(cfg: Config, workdir: str) -> None:
  """Evaluates, stores every response, and prints the tables."""
  root = pathlib.Path(workdir)
  assemble.keep_compiled_programs()
  model = assemble.open_for_evaluation(cfg)
  benchmarks = benchmarks_lib.load_all(cfg.eval.benchmarks, cfg.data, cfg.seed, limit=cfg.eval.limit)
  try_custom(cfg, benchmarks[0].problems[0])
  modes = modes_of(cfg)
  log = dataclasses.replace(cfg.log, live=False)
  with Judge(cfg, root / "verdicts") as judge, Console(log, 1, file=distributed.output()) as console:
    runner = Runner(
        cfg, model, benchmarks, judge, modes=modes, n_samples=cfg.eval.samples_per_problem,
        n_new=cfg.eval.max_new_tokens or cfg.reward.max_response_tokens,
        context=min(cfg.eval.max_context, model.arch.max_context))
    console.header(_header(cfg, model, benchmarks, modes))
    if cfg.model.compute_dtype == "bfloat16" and jax.default_backend() == "cpu":
      console.message("a CPU emulates bfloat16: --config.model.compute_dtype=float32 is several times faster here")
    evaluated = runner.measure(
        root, model.identity, lambda: assemble.load_params(cfg, model), console, "evaluation")
    if runner.ledger.slot_steps:
      console.message(
          f"{runner.ledger.useful + runner.ledger.truncated:,} tokens sampled; slots in use "
          f"{runner.ledger.utilisation:.0%}")
    if evaluated is None:
      return
    for note in evaluated.notes:
      console.message(note)
    results = output.write_results(evaluated)
    for table in output.tables(evaluated, results, patterns=False):
      console.table(table)
    console.message(f"see {root / 'results.md'}, {root / RESULTS} and {root / 'responses'}")


def _header(cfg: Config, model: assemble.Model, benchmarks: Sequence[Benchmark], modes: Sequence[str]) -> list[str]:
  listed = ", ".join(f"{b.title} ({len(b.problems):,})" for b in benchmarks)
  return [
      f"model: {model.identity['path']} ({model.arch.family}, {model.arch.n_layers} layers, width "
      f"{model.arch.hidden_size})",
      f"benchmarks: {listed}",
      f"modes: {', '.join(modes)}; {cfg.eval.samples_per_problem} responses per problem and mode, at most "
      f"{cfg.eval.max_new_tokens or cfg.reward.max_response_tokens:,} tokens, T {cfg.eval.temperature:g}, top-p "
      f"{cfg.eval.top_p:g}"]


def cli(argv: Sequence[str] | None = None) -> None:
  """Runs the command with these arguments; None means the process's."""
  flags.run(main, name="evaluate", argv=argv)


if __name__ == "__main__":
  cli()
