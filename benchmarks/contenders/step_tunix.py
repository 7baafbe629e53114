"""A training step of google-tunix: its GRPOLearner on an RLCluster with the vanilla rollout engine."""

from collections.abc import Callable, Iterator
import queue
import threading
import time
from typing import Any

from flax import nnx
import jax
import numpy as np
import optax
from tunix.rl import rl_cluster as rl_cluster_lib
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from contenders import stepping, tunix
from contenders.common import Case, Model


def make_cluster(case: Case, net: tunix.StoppingQwen2) -> rl_cluster_lib.RLCluster:
  """Actor and sampler on one mesh, so that they share their weights; no reference, since beta is 0."""
  mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), (jax.sharding.AxisType.Auto,) * 2)
  adamw = optax.adamw(
      stepping.LEARNING_RATE, b1=stepping.B1, b2=stepping.B2, eps=stepping.EPS, weight_decay=stepping.WEIGHT_DECAY)
  role = rl_cluster_lib.Role
  return rl_cluster_lib.RLCluster(
      actor=net, tokenizer=tunix.Tokenizer(case), cluster_config=rl_cluster_lib.ClusterConfig(
          role_to_mesh={role.ACTOR: mesh, role.REFERENCE: mesh, role.ROLLOUT: mesh},
          rollout_engine="vanilla",
          training_config=rl_cluster_lib.RLTrainingConfig(
              actor_optimizer=optax.chain(optax.clip_by_global_norm(stepping.CLIP_NORM), adamw),
              eval_every_n_steps=1_000_000, max_steps=1_000_000),
          rollout_config=base_rollout.RolloutConfig(
              max_tokens_to_generate=case.cap, max_prompt_length=case.n_prompt, kv_cache_size=case.room,
              temperature=1.0, top_p=1.0)))


class Trainer:
  """See contenders.stepping.Trainer. One call of `GRPOLearner.train` makes all steps; its data set holds it up."""

  def __init__(self, model: Model, case: Case, net: tunix.StoppingQwen2):
    del model
    self.tuned = {"remat": "none", "shared_weights": True}
    self._case = case
    self._cluster = make_cluster(case, net)
    self._seconds: dict[str, float] = {}
    self._seen: dict[str, Any] = {}
    # What a user of the learner calls, with a clock around it.
    self._cluster.generate = self._timed("rollout_s", self._cluster.generate)
    self._cluster.update_actor = self._timed("update_actor_s", self._cluster.update_actor)
    self._learner = grpo_learner.GRPOLearner(
        self._cluster, grpo_learner.GRPOConfig(
            num_generations=len(case.lengths[0]), num_iterations=1, beta=0.0, epsilon=stepping.CLIP),
        reward_fns=lambda prompts, completions, **_: stepping.rewards(len(completions)))
    if self._learner.should_sync_weights:
      raise ValueError("the sampler has weights of its own; they were to be shared.")
    self._go: queue.Queue[bool] = queue.Queue()
    self._ready: queue.Queue[BaseException | None] = queue.Queue()
    self._thread = threading.Thread(target=self._train, daemon=True)
    self._thread.start()
    self._wait()

  def prepare(self, lengths: list[int], seed: int) -> None:
    """The stop positions, an input of the compiled programs, and a seed, without which every step draws the same."""
    case, stop_at = self._case, self._cluster.actor_trainer.model.stop_at
    # Position P + n - 2 is fed to predict the n-th new token.
    at = np.array([case.n_prompt + n - 2 if n < case.cap else -1 for n in lengths], np.int32)
    stop_at[...] = jax.device_put(at, stop_at[...].sharding)
    self._cluster.cluster_config.rollout_config.seed = jax.random.PRNGKey(seed)

  def step(self) -> None:
    """Lets the learner have one question; the step is over when it asks for the next."""
    start = time.perf_counter()
    self._go.put(True)
    self._wait()
    jax.block_until_ready(nnx.state(self._cluster.actor_trainer.model))
    self._seconds["step_s"] = time.perf_counter() - start

  def last(self) -> stepping.Step:
    """From what went through the cluster, and the trainer's buffer of metrics."""
    metrics = self._cluster.actor_trainer._prev_buffered_train_metrics
    examples, *_ = self._seen["update_actor_s"][0]
    return stepping.Step(
        n_tokens=[len(row) for row in self._seen["rollout_s"][1].tokens],
        n_loss=sum(int(np.sum(example.completion_mask)) for example in examples), loss=float(metrics.loss),
        grad_norm=float(metrics.additional_metrics["grad_norm"][0][-1]), rollout_s=self._seconds["rollout_s"],
        update_s=self._seconds["step_s"] - self._seconds["rollout_s"])

  def weights(self) -> np.ndarray:
    """The output head, as the sampler has it."""
    return np.array(self._cluster.rollout.model().lm_head.w[...]).ravel()

  def close(self) -> None:
    """Ends the data set, and with it the training."""
    self._go.put(False)
    self._thread.join(10)

  def _questions(self) -> Iterator[dict[str, np.ndarray]]:
    while True:
      self._ready.put(None)
      if not self._go.get():
        return
      yield {"prompts": np.array(["0"])}

  def _train(self) -> None:
    try:
      self._learner.train(self._questions())
    except BaseException as error:  # It belongs to the step that waits.
      self._ready.put(error)

  def _wait(self) -> None:
    if (error := self._ready.get()) is not None:
      raise error

  def _timed(self, name: str, method: Callable) -> Callable:
    def call(*args, **kwargs):
      start = time.perf_counter()
      result = method(*args, **kwargs)
      self._seconds[name] = time.perf_counter() - start
      self._seen[name] = args, result
      return result
    return call


def build(model: Model, case: Case) -> tunix.StoppingQwen2:
  """The network with the common weights."""
  return tunix.build_model(model, len(case.rows), case.eos)


if __name__ == "__main__":
  stepping.serve(build, Trainer, tunix.score, ("google-tunix", "jax", "jaxlib", "flax", "optax"))
