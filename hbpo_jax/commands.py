"""The commands, each a module of this package with a function `cli`: the table behind `hbpo`, --help and completion.

A new command is a row here. No command is imported, so that help and completion come at once.
"""

import dataclasses
import pathlib
import sys


@dataclasses.dataclass(frozen=True)
class Option:
  """A flag, --name=METAVAR, or a switch where there is no metavar.

  values: what a shell completes: 'directory', 'file', 'config', or a list of texts.
  """
  name: str
  metavar: str
  help: str
  values: str | tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Command:
  """What `hbpo NAME` does.

  summary: a sentence.
  settings: those that --help shows, and its sections have all; without any, the command takes no --config.
  options: its own flags.
  arguments: what follows the flags in the usage line.
  needs_workdir: whether --workdir must be given.
  """
  summary: str
  settings: tuple[str, ...] = ()
  options: tuple[Option, ...] = ()
  arguments: str = ""
  needs_workdir: bool = True


# Of every command that takes settings.
COMMON = (
    Option("config", "NAME_OR_FILE", "A shipped config by its name, or a Python file with get_config().", "config"),
    Option("workdir", "DIR", "Directory of everything the command writes; of train, sft, evaluate and regrade also "
           "gs://BUCKET/DIR.", "directory"),
    Option("gin_file", "FILE", "Gin file with the same settings, as RolloutConfig.queries = 8 (repeatable).", "file"),
    Option("gin_param", "BINDING", "One gin binding (repeatable). The order is: config file, gin, --config.FIELD."),
    Option("traceback", "", "Show where an error was raised."),
)

_BUDGETS = ("rollout.queries", "rollout.rollouts_per_query", "rollout.budgets", "reward.max_response_tokens")
COMMANDS: dict[str, Command] = {
    "train": Command(
        "Train a Hugging Face checkpoint with HBPO; the same command again continues a run that stopped.",
        ("profile", "seed", "steps", "model.path", "lora.rank", "data.source", "data.n_eval", *_BUDGETS,
         "reward.grader", "optimizer.learning_rate", "learner.minibatches", "learner.microbatch_rows", "mesh.data",
         "mesh.fsdp", "mesh.tensor", "checkpoint.save_every", "eval.every", "log.wandb_project")),
    "sft": Command(
        "Train on worked responses before HBPO, from a checkpoint or from a small new model.",
        ("seed", "data.source", "sft.path", "sft.steps", "sft.rows", "sft.learning_rate", "sft.budget_share",
         "sft.hidden_size", "sft.n_layers")),
    "evaluate": Command(
        "Measure accuracy and tokens of a checkpoint on benchmarks; the same command again continues.",
        ("model.path", "eval.benchmarks", "eval.modes", "eval.samples_per_problem", "eval.max_new_tokens", "eval.limit",
         "eval.temperature", "eval.top_p", "rollout.budgets", "rollout.slots")),
    "regrade": Command(
        "Grade the responses of an evaluation again, without the model, and say where the verdicts differ.",
        ("reward.grader", "reward.form", "reward.max_response_tokens", "grading.workers", "grading.cpu_seconds")),
    "report": Command(
        "Make one self-contained page, with Markdown, LaTeX tables and figures, from training runs and evaluations; or "
        "write up a study.",
        options=(
            Option("out", "DIR", "Where index.html, report.md, tables.tex and plots/ go, or of a study NAME.md, "
                   "NAME.json and NAME_*.png, in place of earlier ones.", "directory"),
            Option("title", "TEXT", "Heading of the report; default: the runs' names."),
            Option("samples", "N", "Most pairs of problem and mode whose responses are on the page; default: 200."),
            Option("traceback", "", "Show where an error was raised.")),
        arguments="[NAME=]RUN ... --out=DIR"),
    "export": Command(
        "Make a Hugging Face checkpoint of a training run, and push it to the hub.",
        options=(
            Option("out", "DIR", "Where the export goes, in place of an earlier one.", "directory"),
            Option("dtype", "DTYPE", "bfloat16 or float32; default: as in the model that the run began with.",
                   ("bfloat16", "float32")),
            Option("push", "ORG/NAME", "Hub repository to push to; it is made if need be."),
            Option("private", "", "A repository that is made is hidden from others."),
            Option("revision", "BRANCH", "Branch to push to; default: the main one."),
            Option("traceback", "", "Show where an error was raised.")),
        arguments="RUN_OR_CHECKPOINT [--out=DIR] [--push=ORG/NAME]"),
    "preview": Command(
        "Show what a configuration rewards, and warn of what it rewards by accident.",
        ("profile", *_BUDGETS, "rollout.caps", "reward.form", "reward.alpha", "reward.unfinished_reward",
         "advantage.intra_coef", "advantage.center_intra")),
    "plan": Command(
        "Say whether a run fits on a TPU topology, how long a step takes and what the run costs, without a TPU.",
        ("model.path", "model.preset", "model.remat", *_BUDGETS, "rollout.slots", "learner.microbatch_rows",
         "mesh.data", "mesh.fsdp", "mesh.tensor"),
        (Option("topology", "NAME", "Chips to plan for, such as v5e:4x4, v6e:2x4, v5p:2x2x2."),
         Option("sweep", "", "Try splits of the mesh, micro-batches, slots and model.remat, and rank them."),
         Option("json", "", "Write one JSON object to standard output, everything else to standard error."),
         Option("mean_tokens", "N", "Assumed mean length of a response; default: each budget's own."),
         Option("mean_prompt_tokens", "N",
                "Assumed mean length of a prompt; default: a quarter of data.max_prompt_tokens."),
         Option("jobs", "N", "Programs compiled at a time; default: 1.")),
        needs_workdir=False),
    "replay": Command(
        "Repeat an update that was not finite, from its dump alone, and show where it goes wrong.",
        options=(Option("config.FIELD", "VALUE", "Change one of the dump's settings, to see what helps."),
                 Option("traceback", "", "Show where an error was raised.")),
        arguments="RUN/dumps/NAME"),
    "study": Command(
        "Compare methods over seeds at equal compute; the same command again does what is left.",
        options=(
            Option("study", "NAME_OR_FILE", "The study; default: miniature/study.", "file"),
            Option("workdir", "DIR", "Where cells/, runs/ and logs/ go; `report DIR` writes them up.", "directory"),
            Option("jobs", "N", "Cells at once, each on its share of the cores; default: one per core."),
            Option("only", "METHOD,...", "Methods to run; default: all."),
            Option("quick", "", "The main methods with one seed, without a choice of learning rates."),
            Option("list", "", "Print the cells and which of them are done, and stop."),
            Option("traceback", "", "Show where an error was raised.")),
        arguments="--workdir=DIR"),
    "doctor": Command(
        "Compare the sampler's log-probabilities with the trainer's, and say what is wrong.",
        ("model.path", "model.compute_dtype", "data.source", "rollout.budgets", "rollout.temperature",
         "rollout.prefill_kernel", "rollout.decode_kernel", "learner.attention_kernel")),
    "prove_resume": Command(
        "Prove that a training run which is killed and started again ends bit for bit as one that is not.",
        ("profile", "seed", "model.path", "data.source", *_BUDGETS, "checkpoint.save_every"),
        (Option("steps", "N", "Steps of the run."),
         Option("cut", "K[,K...]", "Steps done when it is killed; several: it is killed several times."),
         Option("at", "PLACE", "Where in the step after them: rollout, update, grading or checkpoint.",
                ("rollout", "update", "grading", "checkpoint")),
         Option("stop", "", "Ask it to stop (SIGTERM) instead of killing it."))),
}


def called(name: str) -> str:
  """How a command was started: as `hbpo NAME`, `python -m hbpo_jax NAME` or `python -m hbpo_jax.NAME`."""
  program = pathlib.Path(sys.argv[0])
  if program.name == f"{name}.py":
    return f"python -m hbpo_jax.{name}"
  return f"python -m hbpo_jax {name}" if program.name == "__main__.py" else f"hbpo {name}"
