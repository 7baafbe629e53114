"""Every setting of a run: frozen dataclasses, the profiles, and the way from and to a ConfigDict.

This is the only place with defaults. A dataclass default is the paper's value
(arXiv 2507.15844) where the paper has one; `PROFILES` says what differs in the
authors' release and in our own default. The front ends (command-line flags and
gin, `hbpo_jax.flags`) are generated from these dataclasses.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from ml_collections import config_dict

# The kinds of settings that hold several values: type of an item, and words for an error.
TUPLES: dict[Any, tuple[type, str]] = {
    tuple[int, ...]: (int, "integers, such as (512, 1024)"), tuple[str, ...]: (str, "texts, such as ('a', 'b')")}


def setting(default: Any, help: str) -> Any:
  """A dataclass field with a default and the sentence that documents it."""
  return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The checkpoint, and how it computes."""
  path: str = setting(
      "", "Directory of a Hugging Face checkpoint, or a hub id; empty: train makes a new model for the synthetic task.")
  revision: str = setting("", "Hub branch, tag or commit; empty means the default branch.")
  preset: str = setting("", "Architecture preset (hbpo_jax.models.presets); compared with the checkpoint at load.")
  compute_dtype: str = setting("bfloat16", "dtype of activations and matmuls: bfloat16 or float32.")
  param_dtype: str = setting("float32", "dtype of the master weights: float32 or bfloat16.")
  remat: str = setting(
      "full", "What training keeps of each layer for the backward pass: none (rematerialise nothing), dots (matmul "
      "outputs), full (the layer's input), or offload (that input, in the host's memory).")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adapters, trained in place of the weights (arXiv 2106.09685)."""
  rank: int = setting(0, "Rank of the adapters; 0 trains the weights themselves.")
  alpha: float = setting(32.0, "An adapter's product is multiplied by alpha / rank.")
  targets: tuple[str, ...] = setting(
      ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
      "Projections with an adapter, by their Hugging Face names.")


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
  """The arithmetic task that needs no download."""
  min_level: int = setting(1, "Fewest operations of a synthetic problem.")
  max_level: int = setting(8, "Most operations of a synthetic problem.")
  modulus: int = setting(7, "All arithmetic is modulo this prime.")
  n_problems: int = setting(4096, "Size of the generated training set.")
  operations: tuple[int, ...] = setting(
      (), "Operations of the problems of each level, from level 1 on; () means that level K has K.")
  traces: str = setting(
      "verbose", "Worked responses of the warm start: verbose (long at every level), or modes (guess, skim, work and "
      "check, which differ in length and in how often they are right).")
  mode_shares: tuple[int, ...] = setting(
      (5, 5, 10, 80), "With traces=modes, percentages of the traces without a budget sentence that guess, skim, work "
      "and check.")
  budget_mode_shares: tuple[int, ...] = setting(
      (10, 40, 30, 20), "The same of the traces that open with a budget sentence.")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Problems to train on and to evaluate with."""
  source: str = setting(
      "synthetic", "'synthetic', a JSON Lines file, 'tfds:NAME[/CONFIG]', or FILE.py:function, which returns the rows.")
  split: str = setting("train", "TFDS split.")
  data_dir: str = setting("", "TFDS data directory; empty means the TFDS default.")
  eval_source: str = setting("", "Problems of the before/after evaluation; empty means held out from `source`.")
  eval_split: str = setting("test", "TFDS split of eval_source.")
  n_eval: int = setting(0, "Number of evaluation problems; 0 turns the evaluation off.")
  max_prompt_tokens: int = setting(1024, "Prompt slots P; longer prompts are dropped and counted.")
  limit: int = setting(0, "Use only the first `limit` training problems; 0 means all.")
  synthetic: SyntheticConfig = dataclasses.field(default_factory=SyntheticConfig)


@dataclasses.dataclass(frozen=True)
class PromptConfig:
  """The text around a problem, and the budget sentences."""
  instruction: str = setting(
      "Let's think step by step and output the final answer within \\boxed{}.",
      "Sentence appended to every problem; empty for none.")
  system: str = setting("", "System message; empty for none.")
  budget_sentence: str = setting(
      "I will answer the question within {budget} tokens.",
      "Budget sentence; must contain {budget}. The release says 'with'. Empty forces nothing: for a single budget, "
      "which the model is then not told.")
  openings: tuple[str, ...] = setting(
      (), "Texts that responses are forced to open with in place of the budget sentence, one per budget ({budget} is "
      "its number); 'natural' forces nothing; () means the budget sentence for all.")
  efficiency_sentence: str = setting(
      "I will answer the question with minimal tokens.", "Sentence of the efficiency mode.")
  prefix_role: str = setting(
      "action",
      "'action': the budget sentence belongs to the response and gets loss; 'context': it belongs to the prompt.")
  prefix_weight: float = setting(
      1.0, "With prefix_role=action, factor on the policy loss of the forced tokens, 0 to 1. If it or the next is not "
      "1, their advantage is the mean of their budget's responses.")
  prefix_weight_negative: float | None = setting(
      None, "The same where that mean is negative; None means prefix_weight. With 0, forced tokens, which nobody "
      "sampled, are only ever made likelier.")

  @property
  def prefix_weights(self) -> tuple[float, float]:
    """Factors of `structs.forced_advantage`: where it is positive, where it is negative."""
    negative = self.prefix_weight_negative
    return self.prefix_weight, self.prefix_weight if negative is None else negative

  def opening(self, subgroup: int, budget: int) -> str:
    """What a response of a subgroup is forced to open with in training; empty for nothing."""
    text = self.openings[subgroup] if self.openings else self.budget_sentence
    return "" if text == "natural" else text.replace("{budget}", str(budget))


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """How many responses, under which budgets and caps, drawn how (Section 3.1)."""
  queries: int = setting(64, "Queries per step (B).")
  rollouts_per_query: int = setting(16, "Responses per query (N = G x J).")
  budgets: tuple[int, ...] = setting((512, 1024, 2048, 2560), "Token budgets b_i, strictly increasing; G of them.")
  caps: tuple[int, ...] = setting((), "Most counted tokens of a response, per budget; () means L_max for each.")
  count_prefix_tokens: bool = setting(True, "Whether the budget sentence counts in n_gen (and in the cap).")
  temperature: float = setting(1.0, "Sampling temperature in training; also divides the trainer's logits.")
  top_p: float = setting(1.0, "Nucleus mass; 1 turns it off.")
  top_k: int = setting(0, "Keep the k likeliest tokens; 0 turns it off.")
  slots: int = setting(0, "Responses that decode at once, over all devices; 0 means 64 per data-parallel device.")
  segment_steps: int = setting(
      0, "Tokens decoded between two looks of the host; 0 means a 64th of the longest response, 8 to 64.")
  length_buckets: tuple[int, ...] = setting(
      (), "Sampled tokens up to which attention may stop reading, ascending; () means powers of two.")
  layers: str = setting("auto", "The sampler's layers: stacked (a loop), unrolled, or auto (unrolled except on TPU).")
  prefill_kernel: str = setting("auto", "Attention over prompts: auto, xla, splash (TPU) or cudnn (GPU).")
  decode_kernel: str = setting("auto", "Attention of a decoded token: auto, xla, pallas_tpu or pallas_gpu.")
  gather_weights: bool = setting(
      True, "Whether each data-parallel device holds the sampler's weights whole; false splits them over fsdp.")


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """The reward of a response (Section 3.2)."""
  form: str = setting(
      "piecewise", "piecewise (paper, Eq. 1), min (release), length, classic, cosine; or another method's: l1_exact, "
      "l1_max, efficient, alp, grpo_lambda, adlp, hmpo, thinkprune, adaptthink, autothink (objective.rivals).")
  alpha: float | None = setting(
      None, "Weight of the length penalty; None means 1 / max_response_tokens, or that of another method's paper.")
  distance_weight: float = setting(
      1.0, "Multiplies alpha: how much the distance to the budget counts beside the curve (piecewise, min, length).")
  beta: float = setting(4.0, "Scale of the curve.")
  curve: str = setting(
      "cosine", "How the reward falls from beta to 0 at L_max: cosine (paper), or log, where a doubled length costs "
      "the same for short and for long responses (piecewise, min, length, cosine).")
  max_response_tokens: int = setting(4096, "L_max: a longer response earns nothing.")
  unfinished_reward: float = setting(0.0, "Reward without '</think>' or box; the release uses -1.")
  floor: float | None = setting(None, "Least reward of a correct response up to L_max; None means none.")
  bonus: float = setting(
      0.0, "Added to the reward of a correct response up to L_max, and to f2(b): what being right is worth beside "
      "being short (piecewise, min, length, classic, cosine).")
  delta: float | None = setting(
      None, "l1_max: reward at the budget; adaptthink: bonus of not thinking; None means their papers' 0.5 and 0.05.")
  gate_share: float = setting(0.2, "grpo_lambda: share of a step's queries, the most solved, with length penalty.")
  gate_accuracy: float = setting(0.0, "grpo_lambda: least accuracy of a query with length penalty.")
  penalty_start: float = setting(1e-3, "adlp: penalty per token at the start.")
  penalty_rate: float = setting(1e-3, "adlp: change of the penalty per step and unit of accuracy.")
  target_accuracy: float = setting(0.62, "adlp: accuracy above which the penalty grows: that of the first model.")
  limits: tuple[int, ...] = setting((), "thinkprune: most tokens of an answer that earns anything, descending.")
  limit_steps: tuple[int, ...] = setting((), "thinkprune: step from which the second of limits holds, the third, ...")
  balance: float = setting(0.5, "autothink: share of responses in a mode above which its rewards fall.")
  balance_slope: float = setting(2.0, "autothink: how fast they fall; 0 leaves them.")
  grader: str = setting(
      "", "Function (responses, problems) -> numbers in [0, 1], as package.module.function or FILE.py:function; empty "
      "means built-in maths grading.")


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
  """The advantage within and across budgets (Section 3.3)."""
  form: str = setting(
      "group", "A_inter: group (reward minus the query's mean, over its standard deviation), leave_one_out (minus the "
      "mean of the others), or reference (minus the mean of those that think: adaptthink).")
  intra_coef: float = setting(1.0, "Weight of A_intra; the release adds it twice (2).")
  std_ddof: int = setting(1, "Divisor n - ddof in the standard deviation of A_inter: 0 or 1.")
  std_eps: float = setting(1e-6, "Added to the standard deviation.")
  center_intra: bool = setting(False, "Subtract from A_intra its mean over a query's subgroups.")
  intra_form: str = setting(
      "baseline", "A_intra: baseline (mean reward minus the expected one), or within (each reward minus its subgroup's "
      "mean, over its standard deviation).")
  intra_baseline: str = setting(
      "budget", "Expected reward: budget (f2 of the budget), or correct_length (f2 of the mean length of the query's "
      "correct responses; 0 where it has none).")
  intra_scale: str = setting("none", "A_intra's divisor: none, or std (that of A_inter; 0 where rewards are equal).")
  intra_clip: float | None = setting(None, "Bound on |A_intra|, before intra_coef; None means none.")
  intra_gate: str = setting(
      "none", "Factor on A_intra: none, solved (0 where the query has no correct response), or rate (its solve rate).")


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """The clipped policy loss (Eq. 6)."""
  clip_low: float = setting(0.2, "Ratio clip below: 1 - clip_low.")
  clip_high: float = setting(0.28, "Ratio clip above: 1 + clip_high.")
  dual_clip: float | None = setting(
      None, "Bound c > 1 on the loss of negative advantages; the release uses 3; None turns it off.")
  kl_coef: float = setting(0.0, "Weight of the KL term; above 0 keeps a frozen reference model.")
  kl_estimator: str = setting("k3", "k1, k2 or k3.")
  importance_cap: float | None = setting(
      None, "Truncated importance sampling of pi_old / pi_sampler at this value; None turns it off.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW and its learning rate; defaults are the release's."""
  learning_rate: float = setting(1e-6, "Peak learning rate.")
  schedule: str = setting("constant", "constant, linear or cosine (decay to final_fraction over the run).")
  final_fraction: float = setting(0.0, "Final over peak learning rate for linear and cosine.")
  warmup_updates: int = setting(0, "Updates of linear warm-up; the first update already uses a rate above 0.")
  b1: float = setting(0.9, "AdamW first-moment decay.")
  b2: float = setting(0.999, "AdamW second-moment decay.")
  eps: float = setting(1e-8, "AdamW epsilon.")
  weight_decay: float = setting(0.01, "AdamW decoupled weight decay.")
  clip_norm: float = setting(1.0, "Global gradient-norm clip.")
  first_moment_dtype: str = setting("float32", "dtype in which AdamW keeps the first moment: float32 or bfloat16.")
  second_moment: str = setting(
      "full", "AdamW's second moment: full, or factored (of a matrix only row and column means are kept).")


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
  """How a rollout batch becomes updates."""
  minibatches: int = setting(4, "Updates per rollout batch; divides rollout.queries.")
  pack: bool = setting(
      True, "Whether several responses share a row, so that padding is not computed. No effect on the result.")
  row_tokens: int = setting(
      0, "Tokens of a packed row; 0 means the longest prompt and response, and where these are at most 512, a second "
      "response. No effect on the result.")
  microbatch_rows: int = setting(
      0, "Rows per forward-backward; 0 means a sixteenth of a minibatch's packed rows, or all of its unpacked ones. "
      "No effect on the result.")
  logprob_chunk: int = setting(256, "Tokens per chunk of the log-probability computation.")
  attention_kernel: str = setting("auto", "Attention in scoring and updates: auto, xla, splash (TPU) or cudnn (GPU).")
  nonfinite: str = setting(
      "skip", "On an update that is not finite: 'skip' it, 'rollback' to the newest checkpoint and go on with the data "
      "that follow, or 'stop'.")
  max_nonfinite: int = setting(20, "Stop, with the state saved, after so many bad updates in a row; 0 means never.")
  max_dumps: int = setting(
      3, "Most minibatches, each with the training state that it met, kept in WORKDIR/dumps for hbpo_jax.replay.")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis."""
  data: int = setting(1, "Data-parallel devices.")
  fsdp: int = setting(-1, "Fully-sharded devices; -1 means all that remain.")
  tensor: int = setting(1, "Tensor-parallel devices.")
  rollout_tensor: int = setting(
      0, "Tensor-parallel devices of the rollouts, which may be split otherwise than the updates; 0 means mesh.tensor.")
  rollout_devices: int = setting(
      0, "Devices set aside for rollouts, the last ones, with pipeline=one_step_off; 0 means none.")


@dataclasses.dataclass(frozen=True)
class GradingConfig:
  """Limits of the built-in grading."""
  workers: int = setting(0, "Grading processes; 0 means one per core, at most 8.")
  cpu_seconds: float = setting(1.0, "CPU time that decides a timeout verdict.")
  memory_mib: int = setting(1024, "Memory limit of a worker.")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """What is saved, and when."""
  save_every: int = setting(50, "Steps between checkpoints; 0 keeps only the last step's.")
  max_to_keep: int = setting(3, "Newest checkpoints kept.")
  export: bool = setting(True, "Write a Hugging Face export to WORKDIR/export at the end.")
  push: str = setting("", "Hub repository ORG/NAME that train pushes its export to at the end; empty means none.")
  push_private: bool = setting(True, "Whether a repository that the push makes is hidden from others.")
  allow_changes: tuple[str, ...] = setting(
      (), "Settings that may differ from the checkpoint's although they change what is learnt: dotted names, or 'all'.")


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """What is logged, and when."""
  every: int = setting(1, "Steps between metric rows.")
  samples_every: int = setting(10, "Steps between logged sample responses; 0 turns them off.")
  n_samples: int = setting(4, "Responses per sample log.")
  tensorboard: bool = setting(True, "Write TensorBoard event files.")
  wandb_project: str = setting("", "Weights & Biases project; empty turns it off (extra: wandb).")
  live: bool = setting(True, "Live terminal view where the output is a terminal.")
  digests: bool = setting(
      False, "Write hashes of each step's data, rollouts, verdicts and state to WORKDIR/digests.jsonl (prove_resume).")


@dataclasses.dataclass(frozen=True)
class AlarmConfig:
  """When a run raises an alarm. All values are running means over logged rows."""
  window: int = setting(10, "Logged rows in the running means that alarms look at.")
  reference: int = setting(20, "First logged rows, whose mean is the start that a run is compared with.")
  margin: float = setting(0.1, "Relative distance that a value has to come back from its limit to end an alarm.")
  length_spread: float = setting(
      0.3, "Alarm when the spread of lengths within a query falls below this share of its start; 0 turns it off.")
  sentence_drop: float = setting(
      4.0, "Alarm when log P(any budget sentence) falls this many nats below its highest; 0 turns it off.")
  solved: float = setting(
      0.95, "Accuracy above which little spread or entropy is no alarm: nothing is left to explore; 1: it always is.")
  entropy_low: float = setting(0.2, "Alarm when the entropy falls below this share of its start; 0 turns it off.")
  entropy_high: float = setting(3.0, "Alarm when the entropy exceeds its start by this factor; 0 turns it off.")
  clip_share: float = setting(0.3, "Alarm when more than this share of tokens is clipped; 0 turns it off.")
  truncated: float = setting(0.25, "Alarm when more than this share of responses is truncated; 0 turns it off.")
  timeouts: float = setting(0.01, "Alarm when more than this share of gradings times out; 0 turns it off.")
  zero_variance: float = setting(
      0.9, "Alarm when more than this share of queries earns the same reward throughout; 0 turns it off.")
  ratio_max: float = setting(
      100.0, "Alarm when the largest ratio of a token's probability to its old one exceeds this; 0 turns it off.")
  grad_spike: float = setting(
      10.0, "Alarm when the gradient norm exceeds the median of the rows before by this factor; 0 turns it off.")
  sampler_gap: float = setting(
      0.1, "Alarm when for more than this share of tokens sampler and trainer differ beyond the clip; 0 turns it off.")
  nonfinite: bool = setting(True, "Whether an update with a non-finite loss or gradient raises an alarm.")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Evaluations: those of training (before, in between, after), and the command `evaluate` (Section 4)."""
  temperature: float = setting(0.6, "Sampling temperature (Section 4).")
  top_p: float = setting(0.95, "Nucleus mass (Section 4).")
  top_k: int = setting(0, "Keep the k likeliest tokens; 0 turns it off.")
  samples_per_problem: int = setting(1, "Responses per problem and mode.")
  batch_queries: int = setting(64, "Problems per batch.")
  max_new_tokens: int = setting(0, "Longest response; 0 means reward.max_response_tokens.")
  max_context: int = setting(
      32768, "evaluate: most tokens of prompt and response together; the model's own limit, where that is less.")
  mode: str = setting("natural", "Training's evaluations: natural, efficiency, a budget number, or say:TEXT.")
  modes: tuple[str, ...] = setting(
      ("natural",), "evaluate: natural, efficiency, budget numbers, 'budgets' for each of rollout.budgets, or say:TEXT "
      "to force any other opening.")
  benchmarks: tuple[str, ...] = setting(
      (), "evaluate: names such as gsm8k,math500,olympiadbench,aime25, 'synthetic', or JSON Lines files.")
  limit: int = setting(0, "evaluate: the first problems of each benchmark; 0 means all.")
  every: int = setting(0, "Steps between evaluations during training; 0 turns them off.")
  n_during: int = setting(0, "Problems of an evaluation during training, the first of data.n_eval; 0 means all.")
  best: str = setting(
      "accuracy",
      "Which evaluated step's checkpoint is kept in WORKDIR/best: 'accuracy' (highest within best_max_tokens), "
      "'tokens' (fewest with at least best_min_accuracy), or 'none'.")
  best_max_tokens: float | None = setting(
      None, "Most mean tokens of a best step; None means those of the evaluation before training.")
  best_min_accuracy: float | None = setting(
      None, "Least accuracy (0 to 1) of a best step; None means that of the evaluation before training.")


@dataclasses.dataclass(frozen=True)
class SftConfig:
  """The supervised warm start."""
  path: str = setting("", "Checkpoint to start from; empty makes a small model with the synthetic task's tokenizer.")
  steps: int = setting(400, "Updates of the supervised warm start.")
  rows: int = setting(64, "Traces per update.")
  learning_rate: float = setting(3e-3, "Peak learning rate; cosine decay, 5 % warm-up.")
  weight_decay: float = setting(0.0, "AdamW decoupled weight decay.")
  budget_share: float = setting(0.5, "Share of traces that open with a budget sentence.")
  stated_budgets: tuple[int, ...] = setting(
      (), "Budgets that traces may state, and a new model's tokenizer knows; () means rollout.budgets.")
  stated_share: float = setting(
      1.0, "Share of these whose budget sentence carries loss, so that the model learns to state it unasked.")
  hidden_size: int = setting(128, "Width of the new model.")
  n_layers: int = setting(2, "Layers of the new model.")
  n_heads: int = setting(4, "Query heads of the new model.")
  n_kv_heads: int = setting(2, "Key/value heads of the new model.")
  mlp_size: int = setting(384, "MLP width of the new model.")


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
  """The processes of one job, each with the devices of its host. Empty settings: see hbpo_jax.distributed.start."""
  coordinator_address: str = setting(
      "", "HOST:PORT of process 0; empty means automatic on a Cloud TPU slice of several hosts, else one process.")
  num_processes: int = setting(0, "Processes of the job; 0 means those of the slice or cluster.")
  process_id: int = setting(-1, "This process, from 0; -1 means as the slice or cluster numbers it.")
  timeout_s: int = setting(600, "Longest wait of the processes for each other, at the start and at any later meeting.")


@dataclasses.dataclass(frozen=True)
class Config:
  """One run. `profile` names the row of PROFILES that was applied."""
  profile: str = setting("paper", "paper, released or hbpo; sets the fields listed in PROFILES.")
  seed: int = setting(0, "Seed of everything random in the run.")
  steps: int = setting(629, "Rollout batches; 629 = one epoch of DeepScaleR at 64 queries.")
  pipeline: str = setting(
      "on_policy", "on_policy, or one_step_off: the next batch decodes while this one is learnt from, so that it comes "
      "from the weights before this step's updates. The first batch after a checkpoint or an evaluation does not.")
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  prompt: PromptConfig = dataclasses.field(default_factory=PromptConfig)
  rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
  reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
  advantage: AdvantageConfig = dataclasses.field(default_factory=AdvantageConfig)
  loss: LossConfig = dataclasses.field(default_factory=LossConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  learner: LearnerConfig = dataclasses.field(default_factory=LearnerConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  grading: GradingConfig = dataclasses.field(default_factory=GradingConfig)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  log: LogConfig = dataclasses.field(default_factory=LogConfig)
  alarms: AlarmConfig = dataclasses.field(default_factory=AlarmConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  sft: SftConfig = dataclasses.field(default_factory=SftConfig)
  distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)

  @property
  def n_subgroups(self) -> int:
    """G, the number of budgets."""
    return len(self.rollout.budgets)

  @property
  def rollouts_per_budget(self) -> int:
    """J, the responses per query and budget."""
    return self.rollout.rollouts_per_query // self.n_subgroups

  @property
  def caps(self) -> tuple[int, ...]:
    """Most counted tokens per subgroup, [G]: rollout.caps or L_max for each."""
    return self.rollout.caps or (self.reward.max_response_tokens,) * self.n_subgroups


# What each profile sets, by dotted field name. Dataclass defaults are the paper's, so `paper` is empty.
PROFILES: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {
        "prompt.budget_sentence": "I will answer the question with {budget} tokens.",
        "reward.form": "min",
        "reward.unfinished_reward": -1.0,
        "advantage.intra_coef": 2.0,
        "loss.dual_clip": 3.0,
    },
    # Chosen in the study of docs/miniature.md. A_intra is left out: never positive, it drags every token of a failing
    # group down. Being right outweighs being short, a token costs least where a problem needs most, and overrunning a
    # budget costs much, so that short ways stay in use until they are good.
    "hbpo": {
        "reward.curve": "log",
        "reward.beta": 2.0,
        "reward.distance_weight": 4.0,
        "reward.bonus": 2.0,
        "advantage.intra_coef": 0.0,
        "advantage.std_eps": 2.0,
    },
}


def field_table(cls: Any = Config, prefix: str = "") -> dict[str, dataclasses.Field]:
  """All settings by dotted name, in order: the one table behind flags, gin and the reference."""
  table = {}
  for f in dataclasses.fields(cls):
    if dataclasses.is_dataclass(f.type):
      table |= field_table(f.type, f"{prefix}{f.name}.")
    else:
      table[prefix + f.name] = f
  return table


def get(cfg: Any, name: str) -> Any:
  """The value of a dotted field of a Config or a ConfigDict."""
  for part in name.split("."):
    cfg = cfg[part] if isinstance(cfg, config_dict.ConfigDict) else getattr(cfg, part)
  return cfg


def new(profile: str = "hbpo") -> config_dict.ConfigDict:
  """A locked ConfigDict of all defaults with one profile applied; what a file in configs/ edits.

  Raises:
    ValueError: when the profile does not exist.
  """
  cd = to_config_dict(Config())
  apply_profile(cd, profile)
  return cd


def apply_profile(cd: config_dict.ConfigDict, profile: str, *, keep: frozenset[str] = frozenset()) -> None:
  """Sets, in place, every field that any profile governs to the profile's value, except those in `keep`."""
  if profile not in PROFILES:
    raise ValueError(f"profile={profile!r} does not exist; choose one of {sorted(PROFILES)}.")
  table = field_table()
  governed = {name for row in PROFILES.values() for name in row}
  cd.profile = profile
  for name in sorted(governed - keep):
    value = PROFILES[profile].get(name, table[name].default)
    parent, _, leaf = name.rpartition(".")
    get(cd, parent)[leaf] = value


def to_config_dict(cfg: Any) -> config_dict.ConfigDict:
  """The locked ConfigDict of a (nested) settings dataclass; an optional field that is None is a placeholder."""
  cd = config_dict.ConfigDict()
  for f in dataclasses.fields(cfg):
    value = getattr(cfg, f.name)
    if dataclasses.is_dataclass(value):
      cd[f.name] = to_config_dict(value)
    elif f.type == float | None:
      cd[f.name] = config_dict.placeholder(float)
      cd[f.name] = value
    else:
      cd[f.name] = value
  return cd.lock()


def from_config_dict(cd: config_dict.ConfigDict) -> Config:
  """The frozen Config of a ConfigDict.

  Raises:
    ValueError: when a field is unknown, missing, or of the wrong type; names field, value and remedy.
  """
  table = field_table()
  flat = flatten(cd.to_dict())
  if unknown := sorted(set(flat) - set(table)):
    raise ValueError(f"config.{unknown[0]} is not a setting; remove it (see hbpo_jax/config.py for all settings).")
  if missing := sorted(set(table) - set(flat)):
    raise ValueError(f"config.{missing[0]} is missing; start the config from hbpo_jax.config.new().")
  return _build(Config, {k: _typed(k, v, table[k].type) for k, v in flat.items()})


def differences(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
  """(field, value in a, value in b) for every setting in which two configs differ."""
  return [(n, get(a, n), get(b, n)) for n in field_table() if get(a, n) != get(b, n)]


def to_json_dict(cfg: Config) -> dict[str, Any]:
  """A nested dict of plain JSON values with every setting."""
  return dataclasses.asdict(cfg)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """A nested mapping by dotted name; one that is flat stays as it is."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def _build(cls: Any, flat: dict[str, Any], prefix: str = "") -> Any:
  return cls(**{
      f.name: _build(f.type, flat, f"{prefix}{f.name}.") if dataclasses.is_dataclass(f.type) else flat[prefix + f.name]
      for f in dataclasses.fields(cls)
  })


def _typed(name: str, value: Any, kind: Any) -> Any:
  def refuse(expected: str):
    raise ValueError(f"config.{name}={value!r} has the wrong type; give {expected}.")

  if kind == float | None:
    return None if value is None else _typed(name, value, float)
  if kind in TUPLES:
    item, example = TUPLES[kind]
    if not isinstance(value, (tuple, list)) or not all(type(v) is item for v in value):
      refuse(f"a tuple of {example}")
    return tuple(value)
  if kind is float and type(value) is int:
    return float(value)
  if type(value) is not kind:
    refuse(f"a value of type {kind.__name__}")
  return value
