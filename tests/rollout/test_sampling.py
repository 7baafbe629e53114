"""Sampling: exact distributions, filters, edge uniforms; other settings compile nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hbpo_jax.rollout import sampling


def _frequencies(logits_V, setting, n=20_000):
  """Share of each token over a fine grid of uniforms: the exact distribution up to 1/n per token."""
  uniform = (np.arange(n, dtype=np.float32) + 0.5) / n
  draw = jax.jit(lambda u: sampling.draw(u, jnp.broadcast_to(logits_V, (len(u), len(logits_V))), setting)[0])
  tokens = np.concatenate([draw(u) for u in np.split(uniform, 10)])
  return np.bincount(tokens, minlength=logits_V.shape[0]) / n


def _reference(logits, temperature, top_p, top_k):
  """The distribution by a plain float64 loop: temperature, top-k, renormalise, top-p, renormalise."""
  prob = np.exp(np.asarray(logits, np.float64) / temperature)
  prob /= prob.sum()
  order = np.argsort(-prob)
  if top_k:
    prob[order[top_k:]] = 0
    prob /= prob.sum()
  kept, mass = np.zeros(len(prob), bool), 0.0
  for token in order:
    kept[token] = mass < top_p and prob[token] > 0
    mass += prob[token]
  prob = np.where(kept, prob, 0)
  return prob / prob.sum()


@pytest.mark.parametrize("V", [7, 128, 300])
@pytest.mark.parametrize("temperature,top_p,top_k", [(1.0, 1.0, 0), (0.6, 0.95, 0), (1.3, 1.0, 5), (0.8, 0.7, 4)])
def test_draw_has_the_filtered_distribution(V, temperature, top_p, top_k):
  logits = jax.random.normal(jax.random.key(V), (V,)) * 2
  got = _frequencies(logits, sampling.make_sampling(temperature, top_p, top_k, (0,)))
  expected = _reference(logits, temperature, top_p, top_k)
  np.testing.assert_allclose(got, expected, atol=1.1 / 20_000)
  assert np.all(got[expected == 0] == 0)


@pytest.mark.parametrize("temperature,top_p,top_k", [(1.0, 1.0, 0), (0.6, 0.9, 3)])
def test_log_probability_is_of_the_distribution_drawn_from(temperature, top_p, top_k):
  logits = jax.random.normal(jax.random.key(1), (64, 50)) * 3
  uniform = jax.random.uniform(jax.random.key(2), (64,))
  token, logp = sampling.draw(uniform, logits, sampling.make_sampling(temperature, top_p, top_k, (0,)))
  expected = [np.log(_reference(row, temperature, top_p, top_k)[t]) for row, t in zip(logits, token, strict=True)]
  np.testing.assert_allclose(logp, expected, atol=1e-5)


def test_temperature_zero_is_greedy_with_certainty():
  logits = jax.random.normal(jax.random.key(3), (16, 40))
  token, logp = sampling.draw(jnp.full(16, 0.99), logits, sampling.make_sampling(0.0, 1.0, 0, (0,)))
  np.testing.assert_array_equal(token, logits.argmax(-1))
  np.testing.assert_array_equal(logp, 0)


@pytest.mark.parametrize("uniform", [0.0, float(np.nextafter(np.float32(1), np.float32(0)))])
def test_extreme_uniforms_never_take_an_impossible_token(uniform):
  weight = np.zeros((1, 1000), np.float32)
  weight[0, [130, 517, 700]] = [1e-6, 3.0, 1e-6]
  token = int(sampling.inverse_cdf(jnp.array([uniform], jnp.float32), jnp.asarray(weight))[0][0])
  assert weight[0, token] > 0


def test_other_settings_compile_nothing_but_filters_turned_on():
  traces = []

  @jax.jit
  def draw(uniform, logits, setting):
    traces.append(1)
    return sampling.draw(uniform, logits, setting)

  logits, uniform = jnp.zeros((4, 30)), jnp.full(4, 0.3)
  for setting in [(1.0, 1.0, 0, (0,)), (0.0, 1.0, 0, (5,)), (2.0, 1.0, 0, (1, 2, 3))]:
    draw(uniform, logits, sampling.make_sampling(*setting))
  assert len(traces) == 1
  for setting in [(0.6, 0.95, 0, (1, 2)), (0.0, 1.0, 3, (5,)), (2.0, 0.1, 7, (1, 2, 3))]:
    draw(uniform, logits, sampling.make_sampling(*setting))
  assert len(traces) == 2


@pytest.mark.parametrize("temperature,top_p,top_k", [(1.0, 0.9, 0), (1.0, 1.0, 40), (0.7, 0.95, 300), (1.5, 0.999, 0)])
def test_candidates_and_the_full_sort_draw_the_same_distribution(temperature, top_p, top_k):
  """Sharp rows need few candidates, flat ones more than there are; each is as exact, alone or beside the other."""
  sharp, flat = jax.random.normal(jax.random.key(1), (2, 700)) * jnp.array([[4.0], [0.1]])
  setting = sampling.make_sampling(temperature, top_p, top_k, (0,))
  for logits in (sharp, flat):
    got = _frequencies(logits, setting)
    np.testing.assert_allclose(got, _reference(logits, temperature, top_p, top_k), atol=1.5 / 20_000)
  uniform = jnp.linspace(0, 0.999, 50)
  both = jnp.concatenate([jnp.broadcast_to(sharp, (50, 700)), jnp.broadcast_to(flat, (50, 700))])
  token, logp = jax.jit(sampling.draw)(jnp.tile(uniform, 2), both, setting)
  for part, logits in enumerate((sharp, flat)):
    alone = jax.jit(sampling.draw)(uniform, jnp.broadcast_to(logits, (50, 700)), setting)
    np.testing.assert_array_equal(token[50 * part:][:50], alone[0])
    np.testing.assert_allclose(logp[50 * part:][:50], alone[1], atol=1e-6)
    expected = np.log(_reference(logits, temperature, top_p, top_k)[np.asarray(alone[0])])
    np.testing.assert_allclose(alone[1], expected, atol=2e-5)


def test_ties_at_the_last_candidate_are_all_kept():
  logits = jnp.zeros(1000).at[:3].set(2.0)
  got = _frequencies(logits, sampling.make_sampling(1.0, 1.0, 50, (0,)))
  np.testing.assert_allclose(got, _reference_all(logits), atol=1.1 / 20_000)


def _reference_all(logits):
  prob = np.exp(np.asarray(logits, np.float64))
  return prob / prob.sum()


@pytest.mark.parametrize("eos", [(), tuple(range(17))])
def test_eos_set_must_fit(eos):
  with pytest.raises(ValueError, match="eos_ids"):
    sampling.make_sampling(1.0, 1.0, 0, eos)
