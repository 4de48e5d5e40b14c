"""Tests of the transformers engine, of the prior builder, and of the choice of an engine."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import numpy as np
import pytest
import torch

from priorzero.llm.engine_choice import choose_engine
from priorzero.llm.engines import PriorBuilder, RetryingPrior, TransformersEngine
from priorzero.llm.prompts import prompt_style, render_prompt
from priorzero.settings import PriorSettings
from priorzero.types import EngineError, GameState, PriorRequest, UserError
from tests.helpers.models import SmallMemory, make_settings

STATE = GameState(
    "West of House\nYou are standing in an open field west of a white house. There is a small mailbox here.",
    ("open mailbox", "go north", "eat the white house", "throw mailbox at field"),
    0.0,
    350.0,
    0,
)


@pytest.fixture
def llm(tiny_llm):
    return tiny_llm


def make_engine(llm, *, mode="score", use_cot=False, rows_per_forward=4, **kwargs):
    style = prompt_style(make_settings({"prior": {"mode": mode, "use_cot": use_cot}}))
    return TransformersEngine(PriorBuilder(llm, style, **kwargs), rows_per_forward=rows_per_forward)


def make_request(engine, state=STATE):
    prompt = render_prompt(state, [], style=engine.builder.style, tokenizer=engine.builder.llm.tokenizer).text
    return PriorRequest(prompt, state.valid_actions)


def compute(engine, *requests):
    return asyncio.run(engine.priors(requests))


def change_parameters(llm):
    with torch.no_grad():
        for p in llm.model.parameters():
            p += 0.3 * torch.randn_like(p)


@pytest.mark.parametrize("use_cot", [False, True])
def test_transformers_engine_scores_are_the_models_log_probabilities(smollm2, use_cot):
    engine = make_engine(smollm2, use_cot=use_cot, temperature=2.0, generate_max_len=24)
    request = make_request(engine)
    prior = compute(engine, request)[0]
    context = request.prompt + prior.completion if use_cot else request.prompt
    assert not use_cot or (prior.completion.endswith("\nAnswer:\n") and len(prior.completion) > 30)
    prompt_ids = smollm2.tokenizer(context, add_special_tokens=False)["input_ids"]
    scores = []
    for action in STATE.valid_actions:  # the slow reference: one sequence for each action
        ids = [*smollm2.tokenizer(action, add_special_tokens=False)["input_ids"], smollm2.tokenizer.eos_token_id]
        with torch.no_grad():
            logits = smollm2.model(input_ids=torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
        token_logprobs = torch.log_softmax(logits, -1)[torch.arange(len(ids)), torch.tensor(ids)]
        scores.append(token_logprobs.mean().item())
    want = torch.log_softmax(torch.tensor(scores) / 2.0, 0).numpy()
    assert prior.logprobs == pytest.approx(want, abs=1e-4)
    assert prior.source == "score" and prior.version == 0


def test_transformers_engine_priors_do_not_depend_on_the_batch(llm):
    engine = make_engine(llm, rows_per_forward=3)
    states = [
        STATE,
        dataclasses.replace(STATE, feedback="Kitchen", valid_actions=("eat lunch",)),
        dataclasses.replace(STATE, feedback="Cellar " * 40),
    ]
    together = compute(engine, *(make_request(engine, s) for s in states))
    for state, prior in zip(states, together, strict=True):
        alone = compute(make_engine(llm), make_request(engine, state))[0]
        assert prior.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    assert together[1].logprobs.tolist() == [0.0]


def rows_per_forward_of(llm, requests, *, largest=1000, **arguments):
    """The number of rows in each forward pass, and the priors."""
    memory = SmallMemory(llm, largest=largest)
    engine = TransformersEngine(PriorBuilder(memory, prompt_style(make_settings())), **arguments)
    priors = asyncio.run(engine.priors(requests))
    return memory.num_rows, [prior.logprobs for prior in priors]


def test_transformers_engine_limits_the_tokens_and_logits_of_a_forward_pass(llm, monkeypatch):
    requests = [make_request(make_engine(llm), dataclasses.replace(STATE, feedback=f"Room {n}")) for n in range(7)]
    row = PriorBuilder(llm, prompt_style(make_settings())).row(requests[0])
    num_predicted = sum(map(len, row.completions))
    num_tokens = len(row.prompt_ids) + num_predicted
    together, want = rows_per_forward_of(llm, requests)
    assert together == [7]
    by_rows, _ = rows_per_forward_of(llm, requests, rows_per_forward=4)
    assert by_rows == [4, 3]
    by_tokens, got = rows_per_forward_of(llm, requests, tokens_per_forward=3 * num_tokens + 2)
    assert by_tokens == [3, 3, 1]
    assert np.allclose(got, want, atol=1e-4)
    assert rows_per_forward_of(llm, requests, tokens_per_forward=1)[0] == [1] * 7
    monkeypatch.setattr("priorzero.llm.engines.hf.LOGITS_PER_FORWARD", 2 * num_predicted * llm.model.config.vocab_size)
    assert rows_per_forward_of(llm, requests)[0] == [2, 2, 2, 1]


def test_transformers_engine_computes_fewer_priors_at_once_when_out_of_memory(llm):
    requests = [make_request(make_engine(llm), dataclasses.replace(STATE, feedback=f"Room {n}")) for n in range(7)]
    _, want = rows_per_forward_of(llm, requests)
    num_rows, got = rows_per_forward_of(llm, requests, largest=3)
    assert num_rows == [7, 3, 3, 1]
    assert np.allclose(got, want, atol=1e-4)
    with pytest.raises(EngineError, match=r"out of GPU memory while computing one prior, .*llm\.prompt_max_len=512"):
        rows_per_forward_of(llm, requests, largest=0)


def test_transformers_engine_caches_priors_until_the_next_sync(llm):
    engine = make_engine(llm)
    request = make_request(engine)
    first = compute(engine, request, request)[0]
    assert engine.take_statistics()["prior/remembered"] == 0.5
    change_parameters(llm)
    assert compute(engine, request)[0].logprobs.tolist() == first.logprobs.tolist()  # not synchronised yet
    asyncio.run(engine.sync_weights(1))
    later = compute(engine, request)[0]
    assert later.version == 1 and np.abs(later.logprobs - first.logprobs).max() > 1e-3


def test_transformers_engine_rank_pads_on_the_left(llm):
    engine = make_engine(llm, mode="rank", generate_max_len=12, rows_per_forward=2)
    other = dataclasses.replace(STATE, feedback="Kitchen " * 30)
    together = compute(engine, make_request(engine), make_request(engine, other))
    alone = compute(make_engine(llm, mode="rank", generate_max_len=12), make_request(engine))[0]
    assert together[0].completion == alone.completion


def test_transformers_engine_rank_ignores_the_models_repetition_penalty(llm):
    """Some chat models have one by default. vLLM ignores it as well."""
    request = PriorRequest("look look look look look", ("look", "wait"))
    without = compute(make_engine(llm, mode="rank", generate_max_len=12), request)[0].completion
    llm.model.generation_config.repetition_penalty = 5.0
    assert compute(make_engine(llm, mode="rank", generate_max_len=12), request)[0].completion == without


def generate_texts(llm, monkeypatch, *texts):
    """Let the model generate these texts, one for each prompt; returns the number of prompts of each call."""
    ids = [[*llm.tokenizer(text, add_special_tokens=False)["input_ids"], llm.tokenizer.eos_token_id] for text in texts]
    width, num_prompts = max(map(len, ids)), []

    def generate(input_ids, pad_token_id, **kwargs):
        num_prompts.append(len(input_ids))
        own = [row + [pad_token_id] * (width - len(row)) for row in ids[: len(input_ids)]]
        return torch.cat([input_ids, torch.tensor(own)], dim=1)

    monkeypatch.setattr(llm.model, "generate", generate)
    return num_prompts


@pytest.mark.parametrize(
    ("text", "completion", "has_heading"),
    [
        ("A mailbox can be opened.\nAnswer:\nopen mailbox", "A mailbox can be opened.\nAnswer:\n", True),
        ("I would first of all", "I would first of all\nAnswer:\n", False),
        ("", "Answer:\n", False),
    ],
)
def test_transformers_engine_scores_behind_the_thought(llm, monkeypatch, text, completion, has_heading):
    generate_texts(llm, monkeypatch, text)
    engine = make_engine(llm, use_cot=True)
    request = make_request(engine)
    retrying = RetryingPrior(engine, PriorSettings(attempts=1, backoff_s=0, timeout_s=60))
    (prior,) = asyncio.run(retrying.priors([request]))
    assert (prior.source, prior.completion, prior.parsed) == ("score", completion, has_heading)
    want = compute(make_engine(llm), PriorRequest(request.prompt + completion, STATE.valid_actions))[0]
    assert prior.logprobs == pytest.approx(want.logprobs, abs=1e-5)
    assert prior.rollout_logprobs == pytest.approx(want.rollout_logprobs, abs=1e-4)
    scalars = retrying.take_statistics()
    assert scalars["prior/parse_rate"] == has_heading and scalars["prior/fallbacks"] == 0


def test_transformers_engine_generates_all_thoughts_of_a_batch_and_then_scores_them(llm, monkeypatch):
    texts = ["Go.\nAnswer:\ngo north", "Open it.\nAnswer:\nopen mailbox", "I do not know"]
    num_prompts = generate_texts(llm, monkeypatch, *texts)
    memory = SmallMemory(llm, largest=2)
    style = prompt_style(make_settings({"prior": {"use_cot": True}}))
    engine = TransformersEngine(PriorBuilder(memory, style, generate_max_len=8))
    requests = [make_request(engine, dataclasses.replace(STATE, feedback=f"Room {n}")) for n in range(3)]
    priors = compute(engine, *requests)
    assert [prior.completion for prior in priors] == [
        "Go.\nAnswer:\n",
        "Open it.\nAnswer:\n",
        "I do not know\nAnswer:\n",
    ]
    assert num_prompts == [3]
    assert memory.num_rows[0] == 3 and sum(memory.num_rows[1:]) == 3  # the memory sufficed for two; none is repeated
    for request, prior in zip(requests, priors, strict=True):
        want = compute(make_engine(llm), PriorRequest(request.prompt + prior.completion, request.valid_actions))[0]
        assert prior.logprobs == pytest.approx(want.logprobs, abs=1e-4)
    again = compute(engine, *requests)  # from the cache
    assert num_prompts == [3] and [p.completion for p in again] == [p.completion for p in priors]


def test_transformers_engine_gives_a_uniform_prior_if_the_actions_do_not_fit_behind_the_thought(llm, monkeypatch):
    engine = make_engine(llm, use_cot=True, generate_max_len=8)  # the model has 1024 positions
    prompt = "word " * 1010
    generate_texts(llm, monkeypatch, *["One two three four five six seven"] * 2)
    priors = compute(engine, PriorRequest(prompt, ("go", "stay " * 6)), make_request(engine))
    assert [(prior.source, prior.completion is None) for prior in priors] == [("uniform", True), ("score", False)]
    assert engine.take_statistics()["prior/too_long"] == 1


@pytest.mark.parametrize("mode", ["score", "rank"])
def test_transformers_engine_gives_a_uniform_prior_to_a_prompt_that_is_too_long(llm, mode):
    engine = make_engine(llm, mode=mode, generate_max_len=8)  # the model has 1024 positions
    fitting, too_long = make_request(engine), PriorRequest("word " * 1100, ("go", "stay"))
    priors = compute(engine, fitting, too_long, fitting)
    assert [prior.source for prior in priors] == [mode, "uniform", mode]
    assert np.exp(priors[1].logprobs) == pytest.approx([0.5, 0.5])
    statistics = engine.take_statistics()
    assert statistics["prior/too_long"] == 1 and statistics["prior/tokens_per_s"] > 0
    assert engine.take_statistics()["prior/too_long"] == 0


class AsciiTokenizer:
    """A tokenizer that replaces all letters outside ASCII."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, texts, **kwargs):
        if isinstance(texts, str):
            return self._tokenizer(self._to_ascii(texts), **kwargs)
        return self._tokenizer([self._to_ascii(text) for text in texts], **kwargs)

    @staticmethod
    def _to_ascii(text):
        return text.encode("ascii", "replace").decode()


@pytest.mark.parametrize("mode", ["score", "rank"])
def test_transformers_engine_counts_actions_that_the_tokenizer_changes(llm, mode):
    """Every action has a probability. Actions that the tokenizer maps to the same tokens have the same one."""
    actions = ("wziąć żółwia", "wzięł żęćwia", "open door", "", "<|im_end|>", " a  b ,c")
    request = PriorRequest("What now?", actions)
    lossless = make_engine(llm, mode=mode, generate_max_len=4)
    compute(lossless, request)
    assert lossless.take_statistics()["prior/lossy_actions"] == 0  # SmolLM2's tokenizer encodes bytes
    llm = dataclasses.replace(llm, tokenizer=AsciiTokenizer(llm.tokenizer))
    engine = make_engine(llm, mode=mode, generate_max_len=4)
    prior = compute(engine, request)[0]
    assert engine.take_statistics()["prior/lossy_actions"] == 2
    assert engine.take_statistics()["prior/lossy_actions"] == 0
    assert np.exp(prior.logprobs).sum() == pytest.approx(1, abs=1e-5) and prior.logprobs[0] == prior.logprobs[1]


@pytest.mark.parametrize(
    ("text", "weights"),
    [("", (1, 1, 1)), ("no such\n\n1.\n", (1, 1, 1)), ("\x00\ufffd", (1, 1, 1)), ("1. wait\n2. open door", (3, 2, 6))],
)
def test_transformers_engine_rank_builds_a_prior_from_the_generated_text(llm, monkeypatch, text, weights):
    """The weight of rank r is 1/r. Without a ranking, the prior is uniform."""
    generate_texts(llm, monkeypatch, text)
    engine = RetryingPrior(make_engine(llm, mode="rank"), PriorSettings(attempts=1, backoff_s=0, timeout_s=60))
    (prior,) = asyncio.run(engine.priors([PriorRequest("What now?", ("open door", "", "wait"))]))
    assert prior.completion == text and prior.source == "rank" and prior.parsed == (max(weights) > 1)
    assert np.exp(prior.logprobs) == pytest.approx(np.array(weights) / sum(weights), abs=1e-6)
    scalars = engine.take_statistics()
    assert scalars["prior/parse_rate"] == prior.parsed and scalars["prior/fallbacks"] == 0


def slow_down(engine, monkeypatch, *, seconds):
    """Delay each forward pass that scores; returns the list of the prompts that have been computed."""
    score, computed = engine._completion_logprobs, []

    def slow_score(rows, stop):
        computed.extend(engine.builder.llm.tokenizer.decode(row.prompt_ids) for row in rows)
        time.sleep(seconds)
        return score(rows, stop)

    monkeypatch.setattr(engine, "_completion_logprobs", slow_score)
    return computed


async def test_transformers_engine_stops_after_a_cancelled_call(llm, monkeypatch):
    engine = make_engine(llm, rows_per_forward=1)
    computed = slow_down(engine, monkeypatch, seconds=0.1)
    requests = [PriorRequest(f"prompt {n}", ("go north", "go south")) for n in range(200)]

    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(engine.priors(requests), 0.25)
    num_computed = len(computed)
    (prior,) = await engine.priors([make_request(engine)])
    assert len(computed) == num_computed + 1  # the cancelled call computes nothing any more
    assert 1 <= num_computed < 20 and prior.source == "score"


@pytest.mark.parametrize("use_cot", [False, True])
def test_transformers_engine_keeps_the_priors_computed_before_a_timeout(llm, monkeypatch, use_cot):
    engine = make_engine(llm, rows_per_forward=1, use_cot=use_cot)
    generate_texts(llm, monkeypatch, "Answer:")
    computed = slow_down(engine, monkeypatch, seconds=0.1)
    requests = [PriorRequest(f"prompt {n}", ("go north", "go south")) for n in range(6)]
    prior = RetryingPrior(engine, PriorSettings(attempts=10, backoff_s=0, timeout_s=0.35))
    priors = asyncio.run(prior.priors(requests))
    assert [p.source for p in priors] == ["score"] * 6
    suffix = "Answer:\n" if use_cot else ""
    assert prior.statistics.timeouts >= 1 and sorted(computed) == [r.prompt + suffix for r in requests]


def choose(engine, device):
    return choose_engine(make_settings({"prior": {"engine": engine}}), device=device)


def test_choose_engine_takes_vllm_on_a_gpu_and_transformers_on_a_cpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", {"vllm": object()}.get)
    assert (choose("auto", "cpu"), choose("auto", "cuda")) == ("transformers", "vllm")
    assert (choose("vllm", "cpu"), choose("transformers", "cuda")) == ("vllm", "transformers")


def test_choose_engine_says_how_to_install_vllm(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", {}.get)
    assert choose("auto", "cpu") == "transformers"
    with pytest.raises(UserError, match=r"prior\.engine=auto: vLLM is not installed; type pip .*gpu\.txt, or use"):
        choose("auto", "cuda")
    with pytest.raises(UserError, match=r"type scripts/set_up\.sh test"):
        choose("vllm", "cpu")
