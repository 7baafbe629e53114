"""The learner: training state, scoring, and updates, each compiled once for a mesh.

`grads` and `apply` are pure; `Learner` holds them jitted, with shardings and donation. With lora.rank above 0 it trains
adapters beside a frozen base: `params` of the state are then the adapters, and `Learner.whole` gives the network's.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from hbpo_jax import structs
from hbpo_jax.config import Config, LossConfig
from hbpo_jax.learning import optimizer, packing, scoring, survey
from hbpo_jax.learning.scoring import batch_logps, chunked_logps, score  # noqa: F401  (the room's front door)
from hbpo_jax.models import decoder, kernels, lora, sharding
from hbpo_jax.models.architecture import Architecture
from hbpo_jax.objective import loss
from hbpo_jax.objective import memory as memory_lib
from hbpo_jax.structs import Batch, Prompts, Rollouts, TrainState

_PARTS = 16  # Micro-batches of a packed minibatch, if all of its rows were used.
_NO = np.float32(0)
Metrics = dict[str, jax.Array]
# What one forward-backward returns: (token-mean loss [], its sums).
LossFunction = Callable[[Any, Batch, jax.Array], tuple[jax.Array, loss.LossSums]]


def policy_loss(
    params: Any, batch: Batch, n_tokens: jax.Array, temperature: jax.Array | float,
    *, arch: Architecture, cfg: Config, shards: int = 1, kernel: str = "xla",
) -> tuple[jax.Array, loss.LossSums]:
  """A micro-batch's share of the minibatch's loss: sum over its tokens / tokens of the whole minibatch.

  Args:
    batch: with advantage_RC and what cfg.loss needs; without logp_old_RC where `params` are those of pi_old.
    n_tokens: float32 [], tokens that carry loss in the whole minibatch.
    temperature: float [], of the sampler.
  Returns:
    (float32 [], LossSums of the micro-batch).
  Raises:
    ValueError: when an array that the loss needs is None.
  Source: Eq. 6.
  """
  if batch.advantage_RC is None:
    raise ValueError("batch.advantage_RC is None; compute the advantages before updating.")
  logp_RC = batch_logps(params, arch, cfg, batch, temperature, shards=shards, kernel=kernel)
  sums = loss.policy_sums(
      logp_RC, batch.logp_old_RC, batch.advantage_RC, batch.completion_mask_RC, cfg=cfg.loss,
      logp_ref_RC=batch.logp_ref_RC, logp_sampler_RC=batch.logp_sampler_RC, forced_RC=batch.forced_RC)
  return sums.loss / n_tokens, sums


def supervised_loss(
    params: Any, batch: Batch, n_tokens: jax.Array, *, arch: Architecture, cfg: Config, shards: int = 1,
    kernel: str = "xla",
) -> tuple[jax.Array, loss.LossSums]:
  """A micro-batch's share of the token-mean cross-entropy; of the sums only `loss` is set."""
  logp_RC = batch_logps(params, arch, cfg, batch, 1.0, shards=shards, kernel=kernel)
  total = loss.cross_entropy_sum(logp_RC, batch.completion_mask_RC)
  return total / n_tokens, loss.LossSums.zero().replace(loss=jax.lax.stop_gradient(total))


def grads(
    loss_fn: LossFunction, params: Any, batch: Batch, *, n_micro: int = 1, shards: int = 1, shardings: Any = None
) -> tuple[Any, loss.LossSums, jax.Array]:
  """Gradient of the minibatch's token-mean loss, added up over micro-batches in float32.

  Args:
    loss_fn: `policy_loss` or `supervised_loss`, with its settings bound.
    batch: the whole minibatch.
    n_micro: micro-batches; no effect on the result but rounding.
    shards: devices over which the rows are split.
    shardings: of the gradients, like params; None leaves them to the compiler.
  Returns:
    (float32 gradients like params, LossSums of the minibatch, float32 [] tokens that carry loss).
  """
  n_tokens = jnp.sum(batch.completion_mask_RC, dtype=jnp.float32)
  divisor = jnp.maximum(n_tokens, 1.0)

  def one(carry, _, micro):
    (_, sums), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, micro, divisor)
    total, total_sums = carry
    return pin(jax.tree.map(lambda a, g: a + g.astype(jnp.float32), total, gradient)), total_sums.add(sums)

  def pin(tree):
    return tree if shardings is None else jax.lax.with_sharding_constraint(tree, shardings)

  zeros = pin(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
  micro_batches = scoring.cut_micro_batches(batch, n_micro, shards)
  gradient, sums = scoring.fold_micro_batches(one, (zeros, loss.LossSums.zero()), micro_batches)
  return gradient, sums, n_tokens


def apply(
    state: TrainState, gradient: Any, mean_loss: jax.Array, tx: optax.GradientTransformation,
    skip: jax.Array | float = 0.0,
) -> tuple[TrainState, Metrics]:
  """One optimizer update; where the loss or the gradient norm is not finite, or with `skip`, the state as it was.

  Args:
    gradient: float32, like params.
    mean_loss: float32 [].
    skip: float32 [], 1 = skip the update, 0 = decide by the numbers.
  Returns:
    (state, metrics): grad_norm before clipping, and nonfinite, 1 if the update was skipped, else 0.
  """
  norm = optax.tree.norm(gradient)
  finite = jnp.isfinite(mean_loss) & jnp.isfinite(norm) & (skip == 0)
  # The optimizer works in float32 even when the weights are stored in bfloat16.
  master = jax.tree.map(lambda p: p.astype(jnp.float32), state.params)
  updates, opt_state = tx.update(gradient, state.opt_state, master)
  params = jax.tree.map(lambda p, m, u: (m + u).astype(p.dtype), state.params, master, updates)
  params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state))
  state = state.replace(params=params, opt_state=opt_state, update=state.update + finite.astype(jnp.int32))
  return state, {"grad_norm": norm, "nonfinite": 1.0 - finite.astype(jnp.float32)}


def sampler_gap(batch: Batch, cfg: LossConfig) -> Metrics:
  """The metrics of `loss.gap_sums` over the tokens of a batch that carry loss; float32 [] each, 0 without tokens.

  Args:
    batch: with logp_old_RC and logp_sampler_RC.
    cfg: its clip bounds are read.
  Raises:
    ValueError: when one of the two is None.
  """
  if batch.logp_old_RC is None or batch.logp_sampler_RC is None:
    raise ValueError("batch.logp_old_RC or logp_sampler_RC is None; score the batch and keep the sampler's values.")
  mask_RC = batch.completion_mask_RC
  n_tokens = jnp.maximum(jnp.sum(mask_RC, dtype=jnp.float32), 1.0)
  return loss.gap_sums(batch.logp_old_RC, batch.logp_sampler_RC, mask_RC, cfg).metrics(n_tokens)


class Learner:
  """Jitted scoring and updates on one mesh. All methods take and return global arrays.

  Attributes:
    kernel: of the attention in scoring and updates.
    micro_rows: rows of one forward-backward of a policy update.
    param_shardings: NamedSharding of everything that is trained: the parameters, or their adapters.
    state_shardings: TrainState of NamedShardings; the optimizer's moments lie like their parameters.
    shards: devices over which rows are split (data x fsdp).
    schedule: learning rate by update.
  """

  def __init__(
      self, arch: Architecture, cfg: Config, mesh: Mesh, *, total_updates: int | None = None,
      platform: str | None = None):
    """Builds the jitted functions; compiles nothing yet.

    Args:
      arch: the network.
      cfg: the run's settings.
      mesh: axes data, fsdp, tensor.
      total_updates: length of the learning-rate schedule; None means cfg.steps * cfg.learner.minibatches.
      platform: JAX's name of the devices; None means that of the mesh, which then has devices.
    Raises:
      ValueError: when optimizer.schedule does not exist, or the attention kernel does not run there.
    """
    self.kernel = kernels.resolve(
        "learner.attention_kernel", cfg.learner.attention_kernel, platform or mesh.devices.flat[0].platform)
    total = cfg.steps * cfg.learner.minibatches if total_updates is None else total_updates
    self.arch, self.cfg, self.mesh = arch, cfg, mesh
    self.shards = mesh.size // mesh.shape["tensor"]
    self.micro_rows = _micro_rows(
        cfg, cfg.rollout.queries // cfg.learner.minibatches * cfg.rollout.rollouts_per_query, self.shards)
    self._sft_micro_rows = _micro_rows(cfg, cfg.sft.rows, self.shards)
    self.schedule = optimizer.learning_rate(cfg.optimizer, total)
    self._tx = optimizer.make(cfg.optimizer, total)
    self._rows = sharding.batch_sharding(mesh, 1)  # of the leading axis, whatever follows it
    whole: Any = sharding.replicated(mesh)
    self._base: Any = None  # with adapters, the frozen params
    self._base_shardings = sharding.param_shardings(arch, mesh) if cfg.lora.rank else None
    self.param_shardings = (
        lora.shardings(arch, cfg.lora, mesh) if cfg.lora.rank else sharding.param_shardings(arch, mesh))
    self.state_shardings = TrainState(
        step=whole, update=whole, params=self.param_shardings,
        opt_state=optimizer.state_shardings(
            self._tx, _abstract_trained(arch, cfg, "float32"), self.param_shardings, whole),
        memory=dict.fromkeys(memory_lib.init(cfg.reward), whole))
    policy, supervised = (
        functools.partial(f, arch=arch, cfg=cfg, shards=self.shards, kernel=self.kernel)
        for f in (policy_loss, supervised_loss))
    jit_update = functools.partial(
        jax.jit, donate_argnums=0, in_shardings=(self.state_shardings, self._rows, None, self._base_shardings, whole),
        out_shardings=(self.state_shardings, whole))
    self._init_opt = jax.jit(self._init_opt_traced, out_shardings=self.state_shardings.opt_state)
    self._score = jax.jit(
        self._score_traced, in_shardings=(self.param_shardings, self._rows, None, self._base_shardings),
        out_shardings=self._rows)
    self._merge = jax.jit(
        lambda base, adapters: lora.merge(base, adapters, lora.scale(cfg.lora)), out_shardings=self._base_shardings)
    self._update = jit_update(functools.partial(self._update_traced, policy, self.micro_rows))
    self._sft_update = jit_update(functools.partial(
        self._update_traced, lambda p, b, n, _: supervised(p, b, n), self._sft_micro_rows))
    self._survey = jax.jit(
        functools.partial(self._survey_traced, policy),
        in_shardings=(self.param_shardings, self._rows, None, self._base_shardings), out_shardings=whole)
    self._split = jax.jit(self._split_traced, in_shardings=self._rows, out_shardings=self._rows)
    self._gap = jax.jit(functools.partial(sampler_gap, cfg=cfg.loss), in_shardings=self._rows, out_shardings=whole)

  def new_state(self, params: Any) -> TrainState:
    """Step 0 with fresh optimizer moments. The state takes over `params`: `update` consumes these very arrays.

    With adapters, they are the base, which stays, and the state gets new adapters.
    """
    if self.cfg.lora.rank:
      self.freeze(params)
      draw = jax.jit(lora.init, static_argnums=(0, 1), out_shardings=self.param_shardings)
      params = draw(self.arch, self.cfg.lora, jax.random.fold_in(jax.random.key(self.cfg.seed), 3))
    params = jax.device_put(params, self.param_shardings)
    zero = sharding.put(jnp.zeros((), jnp.int32), sharding.replicated(self.mesh))
    # Two buffers, because each is donated on its own.
    return TrainState(
        step=zero, update=jnp.copy(zero), params=params, opt_state=self._init_opt(params),
        memory=self.place_memory(memory_lib.init(self.cfg.reward)))

  def place_memory(self, memory: dict[str, Any]) -> dict[str, jax.Array]:
    """What the reward remembers, on all devices of the mesh."""
    return {name: sharding.put(value, sharding.replicated(self.mesh)) for name, value in memory.items()}

  def freeze(self, params: Any) -> None:
    """Takes the base of adapters; before anything is scored or updated, where `new_state` was not called."""
    self._base = jax.device_put(params, self._base_shardings)

  def whole(self, params: Any) -> Any:
    """The network's params: what is trained itself, or the base with the trained adapters merged into it."""
    return self._merge(self._base, params) if self.cfg.lora.rank else params

  def abstract_state(self) -> TrainState:
    """Shapes, dtypes and shardings of the state, for restoring a checkpoint."""
    def described(params):
      zero = jnp.zeros((), jnp.int32)
      return TrainState(
          step=zero, update=zero, params=params, opt_state=self._init_opt_traced(params),
          memory=memory_lib.init(self.cfg.reward))

    shapes = jax.eval_shape(described, _abstract_trained(self.arch, self.cfg, self.cfg.model.param_dtype))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.state_shardings)

  def place(self, batch: Batch) -> Batch:
    """The batch with its rows over data and fsdp.

    Raises:
      ValueError: when the rows do not divide over the devices.
    """
    rows = batch.tokens_RT.shape[0]
    if rows % self.shards:
      raise ValueError(
          f"a batch of {rows} rows does not divide over mesh.data x mesh.fsdp = {self.shards} devices; change "
          "rollout.queries, rollout.rollouts_per_query or learner.minibatches, or the mesh.")
    return sharding.put(batch, self._rows)

  def make_batch(self, prompts: Prompts, rollouts: Rollouts, advantage_BGJ: Any) -> tuple[Batch, float]:
    """The rows of a step for scoring and updates, packed or (learner.pack=False) one for each response.

    Args:
      prompts, rollouts: on the host.
      advantage_BGJ: float [B, G, J].
    Returns:
      (Batch on the devices, without logp_old_RC; the share of real tokens in what will be computed).
    """
    advantage_BGJ = jax.device_get(advantage_BGJ)
    if self.cfg.learner.pack:
      batch, share = packing.pack(
          prompts, rollouts, advantage_BGJ, n_minibatches=self.cfg.learner.minibatches, micro_rows=self.micro_rows,
          shards=self.shards, row_tokens=self.cfg.learner.row_tokens, share_prompts=self.kernel != "splash",
          prefix_weights=self.cfg.prompt.prefix_weights)
      return self.place(batch), share
    n_prompt_B = np.asarray(prompts.n_prompt_B)[:, None, None]
    batch = structs.make_batch(prompts, rollouts, advantage_BGJ, self.cfg.prompt.prefix_weights)
    return self.place(batch), float((n_prompt_B + rollouts.n_tokens_BGJ).sum()) / batch.tokens_RT.size

  def score(self, params: Any, batch: Batch, temperature: float | None = None) -> jax.Array:
    """float32 [R, C]: log-probability of every token that carries loss, 0 elsewhere.

    Args:
      temperature: divides the logits; None means the sampler's, rollout.temperature.
    """
    batch = self.place(scoring.forward_fields(batch))
    with jax.set_mesh(self.mesh):
      return self._score(
          params, batch, self.cfg.rollout.temperature if temperature is None else temperature, self._base)

  def score_old(self, params: Any, batch: Batch) -> tuple[Batch, Metrics]:
    """(the batch with logp_old_RC, `sampler_gap`); with one update per batch, (the batch as it is, nothing).

    That update's own forward pass gives pi_old, and its metrics hold the gap.
    """
    if self.cfg.learner.minibatches == 1:
      return batch, {}
    batch = batch.replace(logp_old_RC=self.score(params, batch))
    return batch, self.sampler_gap(batch)

  def sampler_gap(self, batch: Batch) -> Metrics:
    """As the function of that name; needs logp_old_RC and logp_sampler_RC."""
    return self._gap(self.place(batch))

  def split_minibatches(self, batch: Batch) -> tuple[Batch, ...]:
    """learner.minibatches batches of whole queries, in the queries' order.

    Raises:
      ValueError: when the minibatches do not divide the rows, or these not the devices.
    """
    rows, n = batch.tokens_RT.shape[0], self.cfg.learner.minibatches
    if rows % n or rows // n % self.shards:
      raise ValueError(
          f"learner.minibatches={n} does not cut {rows} rows into parts that divide over mesh.data x mesh.fsdp = "
          f"{self.shards} devices; choose minibatches that divide rollout.queries, and a smaller mesh or more queries.")
    with jax.set_mesh(self.mesh):
      return self._split(self.place(batch))

  def update(
      self, state: TrainState, batch: Batch, skip: jax.Array | np.float32 = _NO,
  ) -> tuple[TrainState, Metrics]:
    """One policy update from one minibatch. The given state is consumed (donated).

    Args:
      batch: advantage_RC and, with several updates per batch, logp_old_RC set; logp_ref_RC if kl_coef is not 0,
        logp_sampler_RC if importance_cap is or logp_old_RC is not.
      skip: float32 [], 1 = leave the state as it is. With the `nonfinite` of the update before, all that follow one
        that was skipped are skipped too, without a look of the host.
    Returns:
      (state, metrics), metrics on the device, float32 []: loss, policy_loss, kl_ref, clip_fraction_low, _high, _dual,
      ratio_mean, ratio_max, approx_kl, importance_mean, grad_norm (before clipping), lr, tokens, nonfinite; and those
      of `sampler_gap` where the update itself gave pi_old.
    Raises:
      ValueError: when an array that the settings need is None.
    """
    if batch.logp_old_RC is None and self.cfg.learner.minibatches > 1:
      raise ValueError("batch.logp_old_RC is None; score the batch before the first of its updates.")
    batch = self.place(self._policy_fields(batch))
    with jax.set_mesh(self.mesh):
      return self._update(state, batch, self.cfg.rollout.temperature, self._base, skip)

  def survey_gradient(self, params: Any, batch: Batch) -> Any:
    """`survey.arrays` of the gradient of `update`, like params; a program of its own, compiled when it is first asked.

    The gradient itself never leaves the program.
    """
    batch = self.place(self._policy_fields(batch))
    with jax.set_mesh(self.mesh):
      return self._survey(params, batch, self.cfg.rollout.temperature, self._base)

  def sft_update(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One supervised update on the tokens of completion_mask_RC. The given state is consumed (donated).

    Args:
      batch: one response to a row, on the host; its rows are packed here (learner.pack).
    Returns:
      (state, metrics), metrics on the device, float32 []: loss (nats per token), grad_norm, lr, tokens, nonfinite.
    """
    if self.cfg.learner.pack:
      batch = packing.pack_rows(
          batch, micro_rows=self._sft_micro_rows, shards=self.shards, row_tokens=self.cfg.learner.row_tokens)
    with jax.set_mesh(self.mesh):
      state, metrics = self._sft_update(state, self.place(scoring.forward_fields(batch)), 1.0, self._base, _NO)
    return state, {name: metrics[name] for name in ("loss", "grad_norm", "lr", "tokens", "nonfinite")}

  def _policy_fields(self, batch):
    """The batch without what a policy update does not read."""
    cfg = self.cfg.loss
    return batch.replace(
        logp_ref_RC=batch.logp_ref_RC if cfg.kl_coef != 0 else None,
        logp_sampler_RC=batch.logp_sampler_RC
        if batch.logp_old_RC is None or cfg.importance_cap is not None else None,
        forced_RC=batch.forced_RC if cfg.importance_cap is not None else None)

  def _init_opt_traced(self, params):
    return self._tx.init(jax.tree.map(lambda p: p.astype(jnp.float32), params))

  def _network(self, params, base):
    """What `decoder` takes: params, or the base with adapters attached."""
    return params if base is None else lora.attach(base, params, lora.scale(self.cfg.lora))

  def _score_traced(self, params, batch, temperature, base):
    rows = batch.tokens_RT.shape[0]
    # Without a micro-batch size, as many rows at once as an update takes.
    per_pass = self.micro_rows or max(rows // self.cfg.learner.minibatches, 1)
    n_micro = scoring.count_micro_batches(rows, per_pass, self.shards)
    return score(
        self._network(params, base), self.arch, self.cfg, batch, temperature, shards=self.shards, n_micro=n_micro,
        kernel=self.kernel)

  def _split_traced(self, batch):
    n = self.cfg.learner.minibatches
    rows = batch.tokens_RT.shape[0] // n
    return tuple(jax.tree.map(lambda x, i=i: x[i * rows:(i + 1) * rows], batch) for i in range(n))

  def _gradient(self, loss_fn, micro_rows, params, batch, temperature, base):
    n_micro = scoring.count_micro_batches(batch.tokens_RT.shape[0], micro_rows, self.shards)
    return grads(
        lambda params, micro, n: loss_fn(self._network(params, base), micro, n, temperature), params, batch,
        n_micro=n_micro, shards=self.shards, shardings=self.param_shardings)

  def _survey_traced(self, loss_fn, params, batch, temperature, base):
    return survey.arrays(self._gradient(loss_fn, self.micro_rows, params, batch, temperature, base)[0])

  def _update_traced(self, loss_fn, micro_rows, state, batch, temperature, base, skip):
    gradient, sums, n_tokens = self._gradient(loss_fn, micro_rows, state.params, batch, temperature, base)
    metrics = loss.mean_metrics(sums, jnp.maximum(n_tokens, 1.0)) | {
        "lr": self.schedule(state.update), "tokens": n_tokens}
    if batch.logp_old_RC is None and batch.logp_sampler_RC is not None:
      metrics |= sums.gap.metrics(jnp.maximum(n_tokens, 1.0))
    state, applied = apply(state, gradient, metrics["loss"], self._tx, skip)
    return state, metrics | applied


def _micro_rows(cfg: Config, rows: int, shards: int) -> int:
  """learner.microbatch_rows; where it is 0, the minibatch's `rows`, but of packed ones a sixteenth, in whole shards.

  Packed rows that stay empty are left out by whole micro-batches only.
  """
  if cfg.learner.microbatch_rows or not cfg.learner.pack:
    return cfg.learner.microbatch_rows
  return math.ceil(rows / _PARTS / shards) * shards


def _abstract_trained(arch: Architecture, cfg: Config, param_dtype: str) -> Any:
  if cfg.lora.rank:
    return jax.eval_shape(functools.partial(lora.init, arch, cfg.lora), jax.random.key(0))
  return jax.eval_shape(functools.partial(decoder.init, arch, param_dtype=jnp.dtype(param_dtype)), jax.random.key(0))


