"""Tests of the discounted returns."""

from __future__ import annotations

import pytest

from priorzero.world_model.returns import returns_to_go


def test_returns_to_go_by_hand():
    assert returns_to_go([1.0, 0.0, 2.0], discount=0.5) == pytest.approx([1.5, 1.0, 2.0])
    assert returns_to_go([1.0, 0.0, 2.0], discount=0.5, bootstrap_value=4.0) == pytest.approx([2.0, 2.0, 4.0])
    assert returns_to_go([], discount=0.5, bootstrap_value=4.0).shape == (0,)
