"""Slow, plain float64 loops for what the objective computes; the tests compare the kernels with them.

Nothing here imports the package or JAX: formulas are written out again from the method's definitions.
"""

import math

import numpy as np


def reward(
    n_gen, correct, budgets, *, form, alpha, beta, L_max, unfinished_reward=0.0, finished=None, curve="cosine"):
  """Rewards as nested loops; arrays [B, G, J], budgets [G]. Returns float64 [B, G, J]."""
  n_gen, correct = np.asarray(n_gen), np.asarray(correct, dtype=np.float64)
  out = np.zeros(n_gen.shape, np.float64)
  for q, g, j in np.ndindex(*n_gen.shape):
    n, b, c = int(n_gen[q, g, j]), int(budgets[g]), correct[q, g, j]
    if finished is not None and not finished[q, g, j] and c == 0:
      out[q, g, j] = unfinished_reward
      continue
    if c == 0 or n > L_max:
      continue
    f1 = beta * fall(n, L_max, curve) - alpha * L_max * abs(share(n, L_max, curve) - share(b, L_max, curve))
    f2 = beta * fall(b, L_max, curve)
    if form == "piecewise":
      value = f1 if n > b else f2
    elif form == "min":
      value = min(f1, f2)
    elif form == "length":
      value = f1
    elif form == "classic":
      value = 1.0
    else:
      value = beta * fall(n, L_max, curve)
    out[q, g, j] = c * value
  return out


def fall(n, L_max, curve):
  """From 1 at no token to 0 at L_max."""
  u = share(n, L_max, curve)
  return math.cos(math.pi * u / 2) if curve == "cosine" else 1 - u


def share(n, L_max, curve):
  """From 0 at no token to 1 at L_max."""
  return n / L_max if curve == "cosine" else math.log(1 + n) / math.log(1 + L_max)


def baseline(budgets, *, beta, L_max, curve="cosine"):
  """f2 of each budget, float64 [G]."""
  return np.array([beta * fall(int(b), L_max, curve) for b in budgets])


def advantage(rewards, baselines, *, intra_coef, center_intra, std_ddof, std_eps):
  """(intra [B, G], inter [B, G, J], total [B, G, J]) in float64."""
  rewards = np.asarray(rewards, np.float64)
  B, G, J = rewards.shape
  intra, inter = np.zeros((B, G)), np.zeros((B, G, J))
  for q in range(B):
    for g in range(G):
      intra[q, g] = 0.0 if baselines is None else sum(rewards[q, g]) / J - baselines[g]
    if center_intra:
      intra[q] = intra[q] - sum(intra[q]) / G
    flat = [float(r) for r in rewards[q].reshape(-1)]
    if all(r == flat[0] for r in flat):
      continue
    mean = math.fsum(flat) / len(flat)
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in flat) / (len(flat) - std_ddof))
    for g in range(G):
      for j in range(J):
        inter[q, g, j] = (rewards[q, g, j] - mean) / (std + std_eps)
  return intra, inter, intra_coef * intra[:, :, None] + inter


def policy_loss(logp, logp_old, advantages, mask, *, clip_low, clip_high, dual_clip=None, kl_coef=0.0,
                kl_estimator="k3", importance_cap=None, logp_ref=None, logp_sampler=None):
  """Dict of sums over the masked tokens: loss, policy, kl, clipped_low, clipped_high, dual_clipped, ratio, ..."""
  sums = dict.fromkeys(
      ("loss", "policy", "kl", "clipped_low", "clipped_high", "dual_clipped", "ratio", "approx_kl", "importance"), 0.0)
  sums["ratio_max"] = 0.0
  for r, c in np.ndindex(*np.shape(logp)):
    if not mask[r, c]:
      continue
    a = float(advantages[r])
    log_ratio = float(logp[r, c]) - float(logp_old[r, c])
    ratio = math.exp(log_ratio)
    clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
    surrogate = min(ratio * a, clipped * a)
    dual = False
    if dual_clip is not None and a < 0:
      dual = surrogate < dual_clip * a
      surrogate = max(surrogate, dual_clip * a)
    weight = 1.0
    if importance_cap is not None:
      weight = min(math.exp(float(logp_old[r, c]) - float(logp_sampler[r, c])), importance_cap)
    kl = 0.0
    if kl_coef:
      d = float(logp_ref[r, c]) - float(logp[r, c])
      kl = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[kl_estimator]
    sums["policy"] += -weight * surrogate
    sums["kl"] += kl
    sums["loss"] += -weight * surrogate + kl_coef * kl
    sums["clipped_low"] += a < 0 and ratio < 1 - clip_low
    sums["clipped_high"] += a > 0 and ratio > 1 + clip_high
    sums["dual_clipped"] += dual
    sums["ratio"] += ratio
    sums["approx_kl"] += ratio - 1 - log_ratio
    sums["importance"] += weight
    sums["ratio_max"] = max(sums["ratio_max"], ratio)
  return sums


def policy_loss_gradient(logp, *args, step=1e-6, **kwargs):
  """d loss / d logp by central differences, float64 [R, C]."""
  logp = np.asarray(logp, np.float64)
  gradient = np.zeros_like(logp)
  for r, c in np.ndindex(*logp.shape):
    up, down = logp.copy(), logp.copy()
    up[r, c] += step
    down[r, c] -= step
    rise = policy_loss(up, *args, **kwargs)["loss"] - policy_loss(down, *args, **kwargs)["loss"]
    gradient[r, c] = rise / (2 * step)
  return gradient


def log_probabilities(hidden, head, targets, temperature):
  """log softmax(hidden @ head / temperature)[target], float64; hidden [R, C, D], head [D, V], targets [R, C]."""
  hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
  out = np.zeros(np.shape(targets))
  for r, c in np.ndindex(*out.shape):
    logits = [float(hidden[r, c] @ head[:, v]) / temperature for v in range(head.shape[1])]
    top = max(logits)
    out[r, c] = logits[targets[r, c]] - top - math.log(math.fsum(math.exp(x - top) for x in logits))
  return out
