"""Tests of the root's logits."""

from __future__ import annotations

import numpy as np
import pytest

from priorzero.search.root import LOGIT_FLOOR, floored_probs, mix_root_logits, root_probs

LOGITS, PRIOR = np.log(np.array([0.5, 0.25, 0.25])), np.log(np.array([0.1, 0.1, 0.8]))


def test_mix_root_logits_by_hand():
    mixed = mix_root_logits(LOGITS + 7, PRIOR, combine="mix", alpha=0.25, floor=0.0)
    assert np.exp(mixed) == pytest.approx([0.4, 0.2125, 0.3875])
    assert np.exp(mix_root_logits(LOGITS, PRIOR, combine="replace", alpha=0.25, floor=0.0)) == pytest.approx(
        np.exp(PRIOR)
    )
    assert np.exp(mix_root_logits(LOGITS, None, combine="mix", alpha=0.25, floor=0.5)) == pytest.approx(np.exp(LOGITS))
    floored = mix_root_logits(LOGITS, PRIOR, combine="replace", alpha=0.25, floor=0.3)
    assert np.exp(floored) == pytest.approx(0.7 * np.exp(PRIOR) + 0.1)


def test_mix_root_logits_has_a_lower_bound():
    prior = np.array([0.0, -1e9, -np.inf])
    mixed = mix_root_logits(np.zeros(3), prior, combine="replace", alpha=1.0, floor=0.0)
    assert mixed.tolist() == [0.0, LOGIT_FLOOR, LOGIT_FLOOR]


def test_floored_probs_by_hand():
    assert floored_probs(PRIOR, floor=0.3) == pytest.approx([0.17, 0.17, 0.66])
    assert floored_probs(PRIOR, floor=0.0) == pytest.approx([0.1, 0.1, 0.8])


def test_root_probs_mixes_in_noise():
    logits = LOGITS.astype(np.float32)
    assert root_probs(logits, None, noise_weight=0.4) == pytest.approx([0.5, 0.25, 0.25])
    noise = np.array([0.0, 1.0, 0.0])
    assert root_probs(logits, noise, noise_weight=0.4) == pytest.approx([0.3, 0.55, 0.15])
