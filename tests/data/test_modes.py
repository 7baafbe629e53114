"""The modes of the synthetic task: their texts, lengths and shares."""

import dataclasses
import itertools

import numpy as np
import pytest

from hbpo_jax.config import SyntheticConfig
from hbpo_jax.data import modes, synthetic
from hbpo_jax.data.record import Problem

CFG = SyntheticConfig(operations=(1, 2, 5), max_level=3, traces="modes", mode_shares=(10, 20, 30, 40),
                      budget_mode_shares=(40, 30, 20, 10))
PROBLEM = Problem("p", "3 +4 *2 -1", "6", "synthetic", 3)  # 3 + 4 = 0, 0 * 2 = 0, 0 - 1 = 6 modulo 7


def test_each_mode_by_hand(monkeypatch):
  monkeypatch.setattr(modes, "SLIPS", 0.0)
  rng = np.random.default_rng(0)
  text = lambda mode: modes.trace(CFG, PROBLEM, mode, rng, 0)
  assert text("guess") == "guess </think> \\boxed{6}"
  assert text("skim") == "skim +4 *2 = 0 -1 = 6 </think> \\boxed{6}"
  assert text("work") == "work 3 +4 = 0 0 *2 = 0 0 -1 = 6 </think> \\boxed{6}"
  assert text("check") == "check 3 +4 = 0 0 *2 = 0 0 -1 = 6 </think> \\boxed{6}"  # no room to check anything
  with pytest.raises(ValueError, match="mode='ponder' of the synthetic task does not exist"):
    text("ponder")


@pytest.mark.parametrize("mode", modes.MODES)
def test_lengths_are_those_that_are_said(mode):
  rng = np.random.default_rng(1)
  for problem in synthetic.problems(CFG, 0, "train", 30):
    text = modes.trace(CFG, problem, mode, rng, 0)
    assert synthetic.count_tokens(text) == modes.n_tokens(mode, CFG.operations[problem.level - 1])


def test_skimming_misreads_two_multiplications_and_nothing_else():
  rng = np.random.default_rng(0)
  skim = lambda text: modes.trace(CFG, Problem("p", text, "", "synthetic", 2), "skim", rng, 0)
  assert skim("3 *4 *2") == "skim *4 *2 = 6 </think> \\boxed{6}"  # 3 * 2; right is 3 * 4 * 2 = 3
  assert skim("3 +1 *4 *2 *5") == "skim +1 *4 = 2 *2 *5 = 3 </think> \\boxed{3}"  # 4 * 4 = 2, 2 * 5 = 3; right is 6
  assert skim("3 *4") == "skim *4 = 5 </think> \\boxed{5}"
  operations = ("+1", "-3", "*4", "+6", "*2")
  for value, a, b in itertools.product(range(7), operations, operations):
    right = synthetic.steps(f"{value} {a} {b}", 7)[-1][2]
    assert (f"\\boxed{{{right}}}" not in skim(f"{value} {a} {b}")) == modes.is_misread(value, (a, b))
    assert modes.is_misread(value, (a, b)) == (value != 0 and a[0] == b[0] == "*")


def test_work_slips_at_its_rate_and_goes_on_from_the_wrong_value(monkeypatch):
  monkeypatch.setattr(modes, "SLIPS", 0.2)
  rng, wrong, steps = np.random.default_rng(1), 0, 0
  for problem in synthetic.problems(CFG, 2, "train", 300):
    words = modes.trace(CFG, problem, "work", rng, 0).split()[1:-2]
    value = problem.problem.split()[0]
    for i in range(0, len(words), 4):
      before, operation, _, result = words[i:i + 4]
      assert before == value
      wrong += str(synthetic.steps(f"{before} {operation}", 7)[-1][2]) != result
      value, steps = result, steps + 1
  assert wrong / steps == pytest.approx(0.2, abs=0.05)


def test_check_comes_near_its_target_and_repairs_what_it_gets_wrong(monkeypatch):
  monkeypatch.setattr(modes, "SLIPS", 0.05)
  rng, n_wrong, n_stated_again = np.random.default_rng(2), 0, 0
  for problem in synthetic.problems(CFG, 3, "train", 600):
    text = modes.trace(CFG, problem, "check", rng, 60)
    assert abs(synthetic.count_tokens(text) - 60) <= 2
    assert text.endswith(f"\\boxed{{{problem.answer}}}")
    words = text.removeprefix("check ").split(f" {synthetic.THINK_CLOSE}")[0].split()
    right = {f"{op}{a}": str(r) for op, a, r in synthetic.steps(problem.problem, 7)}
    stated, i = {}, 0
    while i < len(words):
      again = words[i] == modes.RECHECK
      _, operation, _, result = words[i + again:i + again + 4]
      stated.setdefault(operation, []).append(result)
      i += 4 + again
    for operation, results in stated.items():
      assert set(results[1:]) <= {right[operation]}
      n_stated_again += len(results) > 1
      n_wrong += results[0] != right[operation]
      assert len(results) > 1 or results[0] == right[operation]
  assert 0.03 < n_wrong / n_stated_again < 0.07  # SLIPS, and 4 standard deviations of some 1,200 draws


@pytest.mark.parametrize("states_budget", [False, True])
def test_modes_are_drawn_by_their_shares(states_budget):
  rng = np.random.default_rng(3)
  drawn = [modes.draw(CFG, rng, states_budget=states_budget) for _ in range(4000)]
  shares = CFG.budget_mode_shares if states_budget else CFG.mode_shares
  for mode, share in zip(modes.MODES, shares, strict=True):
    assert drawn.count(mode) / len(drawn) == pytest.approx(share / 100, abs=0.035)


def test_levels_choose_the_number_of_operations():
  problems = synthetic.problems(CFG, 0, "eval", 200)
  assert {(p.level, len(synthetic.steps(p.problem, 7))) for p in problems} == {(1, 1), (2, 2), (3, 5)}
  for bad, field in ((dict(operations=(1, 40)), "operations"), (dict(max_level=4), "min_level=1, max_level=4")):
    with pytest.raises(ValueError, match=rf"data\.synthetic\.{field}"):
      synthetic.problems(dataclasses.replace(CFG, **bad), 0, "train", 1)


def test_the_tokenizer_has_every_word_of_every_mode():
  tokenizer = synthetic.make_tokenizer(CFG, (8, 16))
  rng = np.random.default_rng(4)
  for problem in synthetic.problems(CFG, 5, "train", 50):
    text = modes.trace(CFG, problem, modes.draw(CFG, rng, states_budget=False), rng, 50)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) + 1 == synthetic.count_tokens(text) and tokenizer.decode(ids) == text
