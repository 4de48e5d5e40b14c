"""Tests of the prompt cache, alone and in the transformers engine."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from priorzero.llm.engines import PriorBuilder, TransformersEngine
from priorzero.llm.engines.prompt_cache import PromptCache
from priorzero.llm.models import add_lora
from priorzero.llm.packing import PromptRow, pack
from priorzero.llm.prompts import prompt_style, render_prompt
from priorzero.types import GameState, HistoryStep, PriorRequest
from tests.helpers.models import make_settings, make_tiny_llm

ids = st.lists(st.integers(0, 2), min_size=1, max_size=12)  # only three tokens, so that prompts share prefixes


@pytest.fixture(scope="module")
def llm(smollm2):
    return make_tiny_llm(smollm2.tokenizer)


def score(llm, row, cache):
    past = cache.lookup(row.prompt_ids)
    with torch.inference_mode():
        logprobs, _ = llm.token_logprobs([row], past=past)
    cache.store(row.prompt_ids, past)
    return logprobs


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(ids, min_size=1, max_size=6),
    completions=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=4),
    max_tokens=st.integers(0, 30),
)
def test_prompt_cache_does_not_change_scores(llm, prompts, completions, max_tokens):
    cache = PromptCache(max_tokens)
    for prompt in prompts:
        row = PromptRow(prompt, completions)
        with torch.inference_mode():
            want, _ = llm.token_logprobs([row])
        torch.testing.assert_close(score(llm, row, cache), want, atol=1e-4, rtol=0)
        assert cache.num_tokens == sum(map(len, cache._prompts)) <= max_tokens


def test_prompt_cache_leaves_only_new_tokens_to_compute(llm):
    cache = PromptCache(100)
    num_columns = []
    hook = llm.model.register_forward_pre_hook(
        lambda module, args, kwargs: num_columns.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for prompt in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 9], [8, 8]):
        score(llm, PromptRow(prompt, [[5, 6], [5, 7]]), cache)
    hook.remove()
    # One column is the "5" that both completions begin with. Of a known prompt only the last token is computed.
    assert num_columns == [6 + 1, 1 + 1, 2 + 1, 1 + 1, 2 + 1]
    assert cache.take_hit_rate() == pytest.approx((0 + 5 + 6 + 2 + 0) / (6 + 6 + 8 + 3 + 2))
    assert cache.take_hit_rate() == 0


def test_prompt_cache_drops_the_least_recently_stored_prompt(llm):
    cache = PromptCache(9)
    for prompt in ([1, 1, 1], [2, 2, 2], [3, 3, 3], [1, 1, 1], [4, 4, 4]):
        score(llm, PromptRow(prompt, [[5]]), cache)
    assert [cache.lookup(p).get_seq_length() for p in ([1] * 4, [2] * 4, [3] * 4, [4] * 4)] == [3, 0, 3, 3]
    score(llm, PromptRow([7] * 10, [[5]]), cache)  # exceeds the cache size: it is not stored
    assert cache.num_tokens == 9


def test_prompt_cache_serves_several_growing_prompts(llm):
    games, length = 4, 20
    cache = PromptCache(int(1.5 * games * (length + 5)))  # one and a half prompts for each game
    for step in range(6):
        for game in range(games):
            prompt = [10 + game] * (length + step)
            num_cached = cache.lookup(prompt).get_seq_length()
            assert num_cached == (length + step - 1 if step else 0)
            score(llm, PromptRow(prompt, [[5]]), cache)


def test_prompt_cache_frees_the_memory_of_completions(llm):
    cache = PromptCache(100)
    score(llm, PromptRow([1, 2, 3], [[5] * 50]), cache)
    [layers] = cache._prompts.values()
    assert {t.untyped_storage().nbytes() for layer in layers for t in layer} == {3 * 2 * 8 * 4}  # tokens, heads, size


def test_pack_with_num_cached_needs_one_row_with_a_longer_prompt():
    row = PromptRow([1, 2, 3], [[4]])
    with pytest.raises(ValueError, match="num_cached=3"):
        pack([row], dtype=torch.float32, device="cpu", num_cached=3)
    with pytest.raises(ValueError, match="num_cached=1"):
        pack([row, row], dtype=torch.float32, device="cpu", num_cached=1)


@pytest.mark.parametrize("kind", ["lora", "bfloat16"])
def test_prompt_cache_works_with_adapters_and_bfloat16(smollm2, kind):
    llm = make_tiny_llm(smollm2.tokenizer)
    if kind == "lora":
        model = add_lora(llm.model, r=2, alpha=8)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p) * p.requires_grad  # adapters are initialised to zero
        llm = dataclasses.replace(llm, model=model)
    else:
        llm = dataclasses.replace(llm, compute_dtype=torch.bfloat16)
    cache = PromptCache(100)
    for prompt in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7], [1, 2, 8, 9]):
        row = PromptRow(prompt, [[5, 6], [5, 7, 2], [4]])
        with torch.inference_mode():
            want, _ = llm.token_logprobs([row])
        tolerance = 0.1 if kind == "bfloat16" else 1e-4  # bfloat16 has a precision of 8 bits
        torch.testing.assert_close(score(llm, row, cache), want, atol=tolerance, rtol=0)
    assert cache.take_hit_rate() > 0.3


def make_engine(llm, *, tokens, use_cot=False):
    style = prompt_style(make_settings({"prior": {"use_cot": use_cot}}))
    builder = PriorBuilder(llm, style, generate_max_len=12)
    return TransformersEngine(builder, rows_per_forward=1, prompt_cache_tokens=tokens)


def episode(llm, *, steps):
    """Requests of one episode."""
    style = dataclasses.replace(prompt_style(make_settings()), history_length=6, history_chars=200)
    history, requests = [], []
    for t in range(steps):
        state = GameState(f"Room {t * 7 % 5}. There is a lamp here.", ("go north", "take lamp"), float(t), 10.0, t)
        prompt = render_prompt(state, history, style=style, tokenizer=llm.tokenizer)
        requests.append(PriorRequest(prompt.text, state.valid_actions))
        history.append(HistoryStep(state.feedback, state.valid_actions[t % 2], float(t % 3 == 0)))
    return requests


@pytest.mark.parametrize("use_cot", [False, True])
def test_transformers_engine_finds_most_of_each_prompt_in_the_cache(llm, use_cot):
    with_cache, without = (make_engine(llm, tokens=tokens, use_cot=use_cot) for tokens in (4096, 0))
    for request in episode(llm, steps=6):
        got, want = (asyncio.run(engine.priors([request]))[0] for engine in (with_cache, without))
        assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4) and got.completion == want.completion
    assert with_cache.take_statistics()["prior/prefix_cache_hit_rate"] > 0.5  # short prompts, and a new one first
    assert without.take_statistics()["prior/prefix_cache_hit_rate"] == 0


def test_transformers_engine_does_not_use_keys_of_earlier_parameters(smollm2):
    llm = make_tiny_llm(smollm2.tokenizer)
    engine = make_engine(llm, tokens=4096)
    first, second = episode(llm, steps=2)
    asyncio.run(engine.priors([first]))
    with torch.no_grad():
        for p in llm.model.parameters():
            p += 0.3 * torch.randn_like(p)
    asyncio.run(engine.sync_weights(1))
    assert engine.prompt_cache.num_tokens == 0
    got = asyncio.run(engine.priors([second]))[0]
    want = asyncio.run(make_engine(llm, tokens=0).priors([second]))[0]
    assert got.version == 1 and got.logprobs == pytest.approx(want.logprobs, abs=1e-4)


def test_transformers_engine_prompt_cache_needs_one_row_per_forward(llm):
    with pytest.raises(ValueError, match="rows_per_forward=1"):
        TransformersEngine(PriorBuilder(llm, prompt_style(make_settings())), rows_per_forward=4, prompt_cache_tokens=10)
