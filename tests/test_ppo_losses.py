"""Tests of PPO's losses and advantages against slow references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from priorzero.cluster.ppo.learner import clipped_value_loss
from priorzero.cluster.ppo.trajectories import generalised_advantages
from priorzero.llm.losses import rft_loss
from tests.helpers.advantages import advantages_by_definition

numbers = st.floats(-5, 5, allow_nan=False)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8), numbers, st.floats(0, 1), st.floats(0, 1))
def test_generalised_advantages_equals_the_definition(turns, end, gamma, lam):
    rewards, values = [r for r, _ in turns], [*(v for _, v in turns), end]
    found = generalised_advantages(np.array(rewards), np.array(values), discount=gamma, lam=lam)
    assert found == pytest.approx(advantages_by_definition(rewards, values, gamma, lam), abs=1e-6)


def test_generalised_advantages_for_lambda_0_and_1():
    rewards, values = np.array([0.0, 0.0, 1.0]), np.array([0.5, 0.5, 0.5, 0.0])
    # 1: returns minus values. 0: one-step errors.
    assert generalised_advantages(rewards, values, discount=0.5, lam=1.0) == pytest.approx([-0.25, 0.0, 0.5])
    assert generalised_advantages(rewards, values, discount=0.5, lam=0.0) == pytest.approx([-0.25, -0.25, 0.5])


@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=6), st.floats(0, 2))
def test_clipped_value_loss_is_the_larger_error(triples, clip):
    loss, n = clipped_value_loss(*(torch.tensor(column) for column in zip(*triples, strict=True)), clip=clip)
    expected = 0.0
    for value, old, target in triples:
        clipped = min(max(value, old - clip), old + clip) if clip else value
        expected += 0.5 * max((value - target) ** 2, (clipped - target) ** 2)
    assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-4) and float(n) == len(triples)


@given(st.lists(st.tuples(st.floats(-4, 0), st.floats(-4, 0), numbers), min_size=1, max_size=6))
def test_rft_loss_is_the_clipped_surrogate(decisions):
    new, old, advantages = (torch.tensor(column) for column in zip(*decisions, strict=True))
    mask = torch.ones(len(new), 1, dtype=torch.bool)
    loss, _ = rft_loss(new[:, None], mask, advantages, rollout_logprobs=old, clip=0.2)
    expected = 0.0
    for a, b, advantage in decisions:
        ratio = np.exp(a - b)
        expected -= min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    assert float(loss) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_clipped_value_loss_has_no_gradient_beyond_the_clip_range():
    value = torch.tensor([2.0, 0.1], requires_grad=True)
    loss, _ = clipped_value_loss(value, torch.zeros(2), torch.tensor([3.0, 3.0]), clip=0.5)
    loss.backward()
    # The first value is beyond 0.5 and close to the target, so the clipped value's error is the larger one.
    assert value.grad.tolist() == pytest.approx([0.0, -2.9])
