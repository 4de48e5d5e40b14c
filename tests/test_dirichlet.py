"""Dirichlet noise at the root."""

from __future__ import annotations

import numpy as np
import pytest

from priorzero.play.exploration import Dirichlet
from tests.helpers.exploring import at


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_dirichlet_noise_has_the_distributions_mean_and_variance(alpha):
    """Each of K components has the mean 1/K and the variance (1/K) (1 - 1/K) / (alpha K + 1)."""
    dirichlet, rng, state = Dirichlet(alpha), np.random.default_rng(0), at("a", 0.0, ("go", "up", "wait", "sit"))
    noises = [dirichlet.root_noise(0, state, None, rng=rng) for _ in range(4000)]
    assert {noise.temperature_scale for noise in noises} == {1.0}
    probs = np.array([noise.probs for noise in noises])
    assert probs.sum(axis=1) == pytest.approx(1.0)
    assert probs.mean(axis=0) == pytest.approx(0.25, abs=0.02)
    assert probs.var(axis=0) == pytest.approx(0.25 * 0.75 / (4 * alpha + 1), rel=0.1)


def test_dirichlet_noise_depends_on_the_generator_only():
    dirichlet, other = Dirichlet(1.0), Dirichlet(1.0)
    state = at("a", 0.0, ("go", "up"))
    dirichlet.root_noise(0, state, None, rng=np.random.default_rng(3))
    noises = [
        d.root_noise(e, state, None, rng=np.random.default_rng(5)).probs for e, d in enumerate((dirichlet, other))
    ]
    assert np.array_equal(noises[0], noises[1])
