"""A training step of hbpo_jax: its engine, its reward and advantage, its learner, as `hbpo_jax.train` runs them."""

from typing import Any

import jax
import numpy as np

from contenders import ours, stepping
from contenders.common import Case, Model
from hbpo_jax import config, train, validation
from hbpo_jax.config import Config
from hbpo_jax.learning.learner import Learner
from hbpo_jax.models import sharding


def make_config(case: Case) -> Config:
  """GRPO as a case of HBPO: one budget, the group's own baseline, one update per batch."""
  cd = config.new("paper")
  cd.model.update(compute_dtype="float32", param_dtype="float32", remat="none")  # Tunix keeps activations too.
  cd.data.max_prompt_tokens = case.n_prompt
  cd.rollout.update(
      queries=len(case.prompts), rollouts_per_query=len(case.lengths[0]), budgets=(case.cap,), slots=case.slots)
  cd.reward.update(form="classic", max_response_tokens=case.cap)
  cd.advantage.intra_coef = 0.0
  cd.loss.update(clip_low=stepping.CLIP, clip_high=stepping.CLIP)
  cd.optimizer.update(
      learning_rate=stepping.LEARNING_RATE, b1=stepping.B1, b2=stepping.B2, eps=stepping.EPS,
      weight_decay=stepping.WEIGHT_DECAY, clip_norm=stepping.CLIP_NORM)
  cd.learner.minibatches = 1
  cfg = config.from_config_dict(cd)
  validation.validate(cfg, n_devices=jax.device_count(), arch=None)
  return cfg


class Trainer:
  """See contenders.stepping.Trainer."""

  def __init__(self, model: Model, case: Case, params: Any):
    self._cfg = cfg = make_config(case)
    self._engine = ours.make_engine(model, case, cfg.rollout)
    self._learner = Learner(ours.architecture(model), cfg, sharding.make_mesh(cfg.mesh))
    self._state = self._learner.new_state(params)
    self._prompts = ours.make_prompts(case)
    self.tuned = {"microbatch_rows": self._learner.micro_rows, "pack": cfg.learner.pack, "remat": cfg.model.remat}

  def prepare(self, lengths: list[int], seed: int) -> None:
    """Lengths as if an EOS had been drawn, and the step's key."""
    self._stop_BGJ = np.array(lengths, np.int32)[None, None]
    self._key = jax.random.fold_in(train.training_key(self._cfg.seed), seed)

  def step(self) -> None:
    """What `train.Trainer._step` does, with a score that is known and without a log."""
    cfg, learner, clock = self._cfg, self._learner, train.Stopwatch()
    generation = self._engine.start(
        self._engine.publish(self._state.params), self._prompts, self._key, stop_BGJ=self._stop_BGJ)
    for _ in generation:
      pass
    rollouts = generation.rollouts
    clock.lap("rollout_s")

    shape = rollouts.n_gen_BGJ.shape
    score_BGJ = np.array(stepping.rewards(shape[2]), np.float32)[None, None]
    _, advantage = train.rewards_and_advantages(rollouts.n_gen_BGJ, score_BGJ, np.ones(shape, bool), cfg=cfg)
    batch, _ = learner.make_batch(self._prompts, rollouts, advantage.total_BGJ)
    batch, _ = learner.score_old(self._state.params, batch)
    for minibatch in learner.split_minibatches(batch):
      self._state, metrics = learner.update(self._state, minibatch)
    self._state = self._state.replace(step=self._state.step + 1)
    self._metrics = jax.device_get(metrics)
    jax.block_until_ready(self._state)
    clock.lap("update_s")
    self._engine.warm_up()  # What the first step left to the background; training waits for it, too.
    self._n_tokens, self._laps = rollouts.n_tokens_BGJ.reshape(-1).tolist(), clock.laps

  def last(self) -> stepping.Step:
    """From the learner's metrics."""
    value = {name: float(self._metrics[name]) for name in ("loss", "grad_norm", "tokens")}
    return stepping.Step(
        n_tokens=self._n_tokens, n_loss=round(value["tokens"]), loss=value["loss"], grad_norm=value["grad_norm"],
        **self._laps)

  def weights(self) -> np.ndarray:
    """The output head."""
    return np.array(self._engine.publish(self._state.params)["lm_head"]).ravel()

  def close(self) -> None:
    """Nothing to end."""


if __name__ == "__main__":
  stepping.serve(lambda model, case: ours.build_params(model), Trainer, ours.score, ("jax", "jaxlib", "flax"))
