"""Losses, advantages and returns, against values computed by hand or by a slow reference."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from priorzero.cluster.ppo.learner import clipped_value_loss, shuffled_runs
from priorzero.cluster.ppo.trajectories import generalised_advantages
from priorzero.llm.losses import action_logprobs, gradient_norm, kl_loss, normalised_advantages, rft_loss, sft_loss
from priorzero.world_model.returns import returns_to_go

numbers = st.floats(-5, 5, allow_nan=False)
LOG2, LOG4, LOG10 = math.log(0.5), math.log(0.25), math.log(0.1)


def test_sft_loss_of_three_actions_by_hand():
    # Visits 6, 3, 1 of 10; action 1 has one token of probability 1/2, action 2 two of 1/4, action 3 one of 1/10.
    logprobs = torch.tensor([[LOG2, -1e9], [LOG4, LOG4], [LOG10, 7.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, True], [True, False]])
    loss_sum, tokens = sft_loss(logprobs, mask, torch.tensor([0.6, 0.3, 0.1]))
    assert loss_sum.item() == pytest.approx(0.6 * math.log(2) + 0.3 * 2 * math.log(4) + 0.1 * math.log(10))
    assert tokens.item() == pytest.approx(0.6 + 0.3 * 2 + 0.1)
    loss_sum.backward()
    assert torch.allclose(logprobs.grad, torch.tensor([[-0.6, 0.0], [-0.3, -0.3], [-0.1, 0.0]]))


def test_rft_loss_by_hand():
    logprobs = torch.tensor([[LOG2, LOG4], [LOG10, -1e9]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    loss_sum, tokens = rft_loss(logprobs, mask, torch.tensor([2.0, -1.0]))
    assert loss_sum.item() == pytest.approx(-(2 * (LOG2 + LOG4) - LOG10), rel=1e-5)
    assert tokens.item() == 3
    loss_sum.backward()
    assert torch.equal(logprobs.grad, torch.tensor([[-2.0, -2.0], [1.0, 0.0]]))


def test_rft_loss_with_clip_by_hand():
    # Two tokens each, and one; ratios are geometric means: log-ratio (sum - rollout) / number of tokens.
    logprobs = torch.tensor([[LOG2, LOG2]] * 4 + [[LOG2, 9.0]], requires_grad=True)
    mask = torch.tensor([[True, True]] * 4 + [[True, False]])
    ratios, lengths = torch.tensor([1.1, 1.5, 1.5, 0.5, 1.0]), torch.tensor([2, 2, 2, 2, 1])
    rollout, advantages = lengths * (LOG2 - ratios.log()), torch.tensor([1.0, 1.0, -1.0, 1.0, 3.0])
    loss_sum, tokens = rft_loss(logprobs, mask, advantages, rollout_logprobs=rollout, clip=0.2)
    # In the clip range: 1.1. Above it, positive advantage: 1.2, no gradient. Above it, negative: -1.5. Below it: 0.5.
    # At ratio 1, the gradient is that of the loss without a clip.
    assert loss_sum.item() == pytest.approx(-2 * (1.1 + 1.2 - 1.5 + 0.5) - 3.0, rel=1e-5)
    assert tokens.item() == 9
    loss_sum.backward()
    assert torch.allclose(logprobs.grad[:, 0], torch.tensor([-1.1, 0.0, 1.5, -0.5, -3.0]), atol=1e-5)


def test_rft_loss_and_kl_loss_are_finite_for_huge_log_ratios():
    logprobs = torch.tensor([[-1.0], [-5000.0]], requires_grad=True)
    mask = torch.ones(2, 1, dtype=torch.bool)
    other = torch.tensor([-5000.0, -1.0])
    rft_sum, _ = rft_loss(logprobs, mask, torch.tensor([-1.0, -1.0]), rollout_logprobs=other, clip=0.2)
    kl_sum, _ = kl_loss(logprobs, other[:, None], mask)
    (rft_sum + kl_sum).backward()
    assert torch.isfinite(rft_sum) and torch.isfinite(kl_sum) and torch.isfinite(logprobs.grad).all()


def test_action_logprobs_by_hand():
    # Prompt 1: completions of probability 1/2 and 1/4 * 1/4, with means 1/2 and 1/4. Prompt 2: a single completion.
    logprobs = torch.tensor([[LOG2, 9.0], [LOG4, LOG4], [LOG10, 9.0]])
    mask = torch.tensor([[True, False], [True, True], [True, False]])
    logprobs = action_logprobs(logprobs, mask, [2, 1], temperature=0.5)
    assert logprobs.exp().tolist() == pytest.approx([4 / 5, 1 / 5, 1.0])  # (1/2)^2 to (1/4)^2


def test_kl_loss_by_hand():
    logprobs = torch.tensor([[LOG2, LOG4], [LOG10, 7.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    reference = torch.tensor([[LOG2, LOG2], [LOG2, 0.0]])
    kl_sum, tokens = kl_loss(logprobs, reference, mask)
    # d = 0, log 2, log 5: e^d - d - 1.
    assert kl_sum.item() == pytest.approx((2 - math.log(2) - 1) + (5 - math.log(5) - 1), rel=1e-5)
    assert tokens.item() == 3
    kl_sum.backward()
    assert torch.allclose(logprobs.grad, torch.tensor([[0.0, -1.0], [-4.0, 0.0]]), atol=1e-5)
    weighted, _ = kl_loss(logprobs, reference, mask, weights=torch.tensor([3.0, 0.5]))
    assert weighted.item() == pytest.approx(3 * (2 - math.log(2) - 1) + 0.5 * (5 - math.log(5) - 1), rel=1e-5)


def test_normalised_advantages_by_hand():
    # Differences 1, 3: mean 2, deviation 1.
    assert normalised_advantages(np.array([2.0, 5.0]), np.array([1.0, 2.0])) == pytest.approx([-1.0, 1.0])
    assert normalised_advantages(np.array([3.0, 4.0]), np.array([1.0, 2.0])).tolist() == [0.0, 0.0]


def test_gradient_norm_clips_and_returns_the_norm_before():
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    assert gradient_norm([p], max_norm=1.0) == pytest.approx(5.0)
    assert p.grad.norm().item() == pytest.approx(1.0, abs=1e-5)


def advantages_by_definition(rewards, values, gamma, lam):
    """For each step the weighted sum of all later one-step errors."""
    n = len(rewards)
    deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8), numbers, st.floats(0, 1), st.floats(0, 1))
def test_generalised_advantages_equals_the_definition(turns, end, gamma, lam):
    rewards, values = [r for r, _ in turns], [*(v for _, v in turns), end]
    found = generalised_advantages(np.array(rewards), np.array(values), discount=gamma, lam=lam)
    assert found == pytest.approx(advantages_by_definition(rewards, values, gamma, lam), abs=1e-6)


@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=6), st.floats(0, 2))
def test_clipped_value_loss_is_the_larger_error(triples, clip):
    loss, n = clipped_value_loss(*(torch.tensor(column) for column in zip(*triples, strict=True)), clip=clip)
    expected = 0.0
    for value, old, target in triples:
        clipped = min(max(value, old - clip), old + clip) if clip else value
        expected += 0.5 * max((value - target) ** 2, (clipped - target) ** 2)
    assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-4) and float(n) == len(triples)


def test_clipped_value_loss_has_no_gradient_beyond_the_clip_range():
    value = torch.tensor([2.0, 0.1], requires_grad=True)
    loss, _ = clipped_value_loss(value, torch.zeros(2), torch.tensor([3.0, 3.0]), clip=0.5)
    loss.backward()
    # The first value is beyond 0.5 and close to the target, so the clipped value's error is the larger one.
    assert value.grad.tolist() == pytest.approx([0.0, -2.9])


def test_returns_to_go_by_hand():
    assert returns_to_go([1.0, 0.0, 2.0], discount=0.5) == pytest.approx([1.5, 1.0, 2.0])
    assert returns_to_go([1.0, 0.0, 2.0], discount=0.5, bootstrap_value=4.0) == pytest.approx([2.0, 2.0, 4.0])
    assert returns_to_go([], discount=0.5, bootstrap_value=4.0).shape == (0,)


def test_shuffled_runs_keeps_runs_together():
    order = shuffled_runs(11, run_length=4, rng=np.random.default_rng(0)).tolist()
    runs = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert order in [a + b + c for a, b, c in itertools.permutations(runs)] and order != list(range(11))
    assert sorted(shuffled_runs(50, run_length=1, rng=np.random.default_rng(0))) == list(range(50))
