"""The in-process engine on a real model, and what stands between an engine and the search."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from priorzero.llm.engines import PriorBuilder, RetryingPrior, TransformersEngine, VLLMEngine
from priorzero.llm.prompts import render_prompt
from priorzero.llm.prompts import prompt_style
from priorzero.types import ActionPrior, EngineError, GameState, PriorRequest
from tests.helpers.models import make_settings, make_tiny_llm

STATE = GameState(
    "West of House\nYou are standing in an open field west of a white house. There is a small mailbox here.",
    ("open mailbox", "go north", "eat the white house", "throw mailbox at field"),
    0.0,
    350.0,
    0,
)


def make_engine(llm, **changes):
    prior = {"mode": "score", **changes.pop("prior", {})}
    engine_changes = {key: changes.pop(key) for key in ("rows_per_forward", "cache_size") if key in changes}
    return TransformersEngine(
        PriorBuilder(llm, prompt_style(make_settings({"prior": prior})), **changes), **engine_changes
    )


def request(engine, state=STATE):
    prompt = render_prompt(state, [], style=engine.builder.style, tokenizer=engine.builder.llm.tokenizer).text
    return PriorRequest(prompt, state.valid_actions)


def ask(engine, *requests):
    return asyncio.run(engine.priors(requests))


@pytest.mark.parametrize("normalise", ["sum", "mean"])
def test_scores_are_the_models_own_log_probabilities(smollm2, normalise):
    engine = make_engine(smollm2, normalise=normalise, temperature=2.0)
    asked = request(engine)
    prior = ask(engine, asked)[0]
    scores = []
    for action in STATE.valid_actions:  # the plain way: the whole prompt again for every action
        prompt_ids = smollm2.tokenizer(asked.prompt, add_special_tokens=False)["input_ids"]
        answer_ids = [*smollm2.tokenizer(action, add_special_tokens=False)["input_ids"], smollm2.tokenizer.eos_token_id]
        with torch.no_grad():
            logits = smollm2.model(input_ids=torch.tensor([prompt_ids + answer_ids])).logits[
                0, len(prompt_ids) - 1 : -1
            ]
        token_logprobs = torch.log_softmax(logits, -1)[torch.arange(len(answer_ids)), torch.tensor(answer_ids)]
        scores.append(token_logprobs.sum().item() / (len(answer_ids) if normalise == "mean" else 1))
    want = torch.log_softmax(torch.tensor(scores) / 2.0, 0).numpy()
    assert prior.logprobs == pytest.approx(want, abs=1e-4)
    assert prior.source == "score" and prior.version == 0


def test_the_order_is_that_of_the_valid_actions(smollm2):
    engine = make_engine(smollm2)
    asked = request(engine)
    order = [2, 0, 3, 1]
    shuffled = PriorRequest(asked.prompt, tuple(asked.valid_actions[k] for k in order))
    one, other = ask(engine, asked, shuffled)
    assert other.logprobs == pytest.approx(one.logprobs[order], abs=1e-4)
    assert one.logprobs.argmax() in (0, 1)  # a sensible command


def test_questions_in_one_batch_do_not_disturb_one_another(smollm2):
    engine = make_engine(smollm2, rows_per_forward=3)
    states = [
        STATE,
        dataclasses.replace(STATE, feedback="Kitchen", valid_actions=("eat lunch",)),
        dataclasses.replace(STATE, feedback="Cellar " * 40),
    ]
    together = ask(engine, *(request(engine, s) for s in states))
    for state, got in zip(states, together, strict=True):
        alone = ask(make_engine(smollm2), request(engine, state))[0]
        assert got.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    assert together[1].logprobs.tolist() == [0.0]


def test_the_same_question_is_computed_once_until_the_parameters_change(smollm2):
    engine = make_engine(make_tiny_llm(smollm2.tokenizer))
    asked = request(engine)
    first = ask(engine, asked, asked)[0]
    assert engine.take_statistics()["prior/remembered"] == 0.5
    with torch.no_grad():
        for p in engine.builder.llm.model.parameters():
            p += 0.3 * torch.randn_like(p)
    assert ask(engine, asked)[0].logprobs.tolist() == first.logprobs.tolist()  # not told of it yet
    asyncio.run(engine.sync_weights(1))
    later = ask(engine, asked)[0]
    assert later.version == 1 and np.abs(later.logprobs - first.logprobs).max() > 1e-3


def test_ranking_by_a_real_model(smollm2):
    engine = make_engine(smollm2, prior={"mode": "rank"}, generate_max_len=40)
    prior = ask(engine, request(engine))[0]
    assert prior.source == "rank" and prior.completion
    assert np.exp(prior.logprobs).sum() == pytest.approx(1, abs=1e-5)
    assert prior.parsed == (len(set(prior.logprobs.tolist())) > 1)


def test_ranking_pads_on_the_left(smollm2):
    engine = make_engine(smollm2, prior={"mode": "rank"}, generate_max_len=12, rows_per_forward=2)
    other = dataclasses.replace(STATE, feedback="Kitchen " * 30)
    together = ask(engine, request(engine), request(engine, other))
    alone = ask(make_engine(smollm2, prior={"mode": "rank"}, generate_max_len=12), request(engine))[0]
    assert together[0].completion == alone.completion


@pytest.mark.parametrize("mode", ["score", "rank"])
def test_a_prompt_that_does_not_fit_into_the_model_costs_only_its_own_prior(smollm2, mode):
    engine = make_engine(make_tiny_llm(smollm2.tokenizer), prior={"mode": mode}, generate_max_len=8)  # 1024 positions
    good, too_long = request(engine), PriorRequest("word " * 1100, ("go", "stay"))
    answers = ask(engine, good, too_long, good)
    assert [a.source for a in answers] == [mode, "uniform", mode]
    assert np.exp(answers[1].logprobs) == pytest.approx([0.5, 0.5])
    statistics = engine.take_statistics()
    assert statistics["prior/too_long"] == 1 and statistics["prior/tokens_per_s"] > 0
    assert engine.take_statistics()["prior/too_long"] == 0


class Asciiser:
    """A tokenizer that knows no letters but English ones."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, texts, **how):
        ascii_only = [
            text.encode("ascii", "replace").decode() for text in ([texts] if isinstance(texts, str) else texts)
        ]
        return self._tokenizer(ascii_only[0] if isinstance(texts, str) else ascii_only, **how)


@pytest.mark.parametrize("mode", ["score", "rank"])
def test_actions_that_the_tokenizer_does_not_give_back_are_counted(smollm2, mode):
    """Each still gets a share; what the tokenizer cannot tell apart is alike."""
    llm = make_tiny_llm(smollm2.tokenizer)
    actions = ("wziąć żółwia", "wzięł żęćwia", "open door", "", "<|im_end|>", " a  b ,c")
    asked = PriorRequest("What now?", actions)
    whole = make_engine(llm, prior={"mode": mode}, generate_max_len=4)
    ask(whole, asked)
    assert whole.take_statistics()["prior/lossy_actions"] == 0  # SmolLM2's tokenizer works on bytes
    engine = make_engine(
        dataclasses.replace(llm, tokenizer=Asciiser(llm.tokenizer)), prior={"mode": mode}, generate_max_len=4
    )
    prior = ask(engine, asked)[0]
    assert engine.take_statistics()["prior/lossy_actions"] == 2
    assert engine.take_statistics()["prior/lossy_actions"] == 0
    assert np.exp(prior.logprobs).sum() == pytest.approx(1, abs=1e-5) and prior.logprobs[0] == prior.logprobs[1]


@pytest.mark.parametrize("written", ["", "no such thing\n\n1.\n", "\x00\ufffd"], ids=["nothing", "garbage", "bytes"])
def test_an_answer_that_is_no_ranking_leaves_all_actions_alike_and_is_counted(smollm2, monkeypatch, written):
    llm = make_tiny_llm(smollm2.tokenizer)
    ids = [*llm.tokenizer(written, add_special_tokens=False)["input_ids"], llm.tokenizer.eos_token_id]

    def generate(input_ids, **how):
        return torch.cat([input_ids, torch.tensor([ids] * len(input_ids))], dim=1)

    monkeypatch.setattr(llm.model, "generate", generate)
    prior = RetryingPrior(make_engine(llm, prior={"mode": "rank"}), attempts=1, backoff_s=0, timeout_s=60)
    (answer,) = asyncio.run(prior.priors([PriorRequest("What now?", ("open door", "", "wait"))]))
    assert not answer.parsed and answer.completion == written
    assert np.exp(answer.logprobs) == pytest.approx([1 / 3] * 3)
    scalars = prior.take_statistics()
    assert scalars["prior/parse_rate"] == 0 and scalars["prior/fallbacks"] == 0


def test_a_cancelled_question_lets_go_of_the_model(smollm2):
    engine = make_engine(smollm2)
    many = [PriorRequest(f"prompt number {n} " * 60, ("go north", "go south")) for n in range(200)]

    async def run():
        started = time.monotonic()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(engine.priors(many), 0.3)
        waited = time.monotonic() - started
        answers = await engine.priors([request(engine)])
        return waited, answers

    waited, answers = asyncio.run(run())
    assert waited < 10 and len(answers) == 1  # one forward pass, not two hundred


def test_what_was_computed_before_the_time_ran_out_is_not_lost(smollm2, monkeypatch):
    engine = make_engine(make_tiny_llm(smollm2.tokenizer))
    engine.rows_per_forward = 1
    many = [PriorRequest(f"prompt {n}", ("go north", "go south")) for n in range(6)]
    score, computed = engine._score, []

    def slow(chunk, rows, stop):
        computed.extend(chunk)
        time.sleep(0.1)
        return score(chunk, rows, stop)

    monkeypatch.setattr(engine, "_score", slow)
    prior = RetryingPrior(engine, attempts=10, backoff_s=0, timeout_s=0.35)
    answers = asyncio.run(prior.priors(many))
    assert [a.source for a in answers] == ["score"] * 6
    assert prior.statistics.timeouts >= 1 and sorted(r.prompt for r in computed) == [r.prompt for r in many]


class Failing:
    """Fails as told: one entry an attempt, an exception to raise, seconds to hang, or an answer."""

    version = 5
    exclusive = False

    def __init__(self, *behaviour):
        self.behaviour, self.calls, self.checks = list(behaviour), 0, 0

    async def ready(self): ...

    async def check(self):
        self.checks += 1

    async def priors(self, requests):
        self.calls += 1
        what = self.behaviour.pop(0)
        if isinstance(what, Exception):
            raise what
        if isinstance(what, float):
            await asyncio.sleep(what)
        return what

    async def suspend(self): ...

    async def sync_weights(self, version): ...

    def take_statistics(self):
        return {"prior/own": 1.0}

    async def close(self): ...


ASKED = [PriorRequest("p", ("a", "b")), PriorRequest("q", ("a", "b", "c"))]
GOOD = [ActionPrior(np.log(np.full(k, 1 / k)), "score", 5) for k in (2, 3)]
BAD = [
    GOOD[:1],
    [GOOD[0], GOOD[0]],
    [GOOD[0], ActionPrior(np.array([0.0, math.nan, 0.0]), "score", 5)],
]


def robust(engine):
    prior = RetryingPrior(engine, attempts=3, backoff_s=0.01, timeout_s=0.2)
    return prior, asyncio.run(prior.priors(ASKED))


@pytest.mark.parametrize("bad", [RuntimeError("boom"), 5.0, *BAD], ids=["raises", "hangs", "few", "shape", "nan"])
def test_a_failure_is_tried_again(bad):
    engine = Failing(bad, bad, GOOD)
    prior, answers = robust(engine)
    assert answers == GOOD and engine.calls == 3
    scalars = prior.take_statistics()
    assert (scalars["prior/retries"], scalars["prior/fallbacks"]) == (2, 0)
    assert scalars["prior/timeouts"] == (2 if bad == 5.0 else 0) and scalars["prior/own"] == 1
    assert prior.take_statistics()["prior/requests"] == 0


@pytest.mark.parametrize("bad", [RuntimeError("boom"), 5.0, BAD[2]], ids=["raises", "hangs", "nan"])
def test_when_all_fail_every_action_is_alike_and_it_is_counted(bad):
    engine = Failing(bad, bad, bad)
    prior, answers = robust(engine)
    assert [a.source for a in answers] == ["uniform", "uniform"] and answers[0].version == 5
    assert np.exp(answers[1].logprobs) == pytest.approx([1 / 3] * 3)
    scalars = prior.take_statistics()
    assert (scalars["prior/fallbacks"], scalars["prior/retries"]) == (2, 2)


@pytest.mark.parametrize(
    ("behaviour", "checks"),
    [
        ([5.0, 5.0, 5.0], 1),
        ([5.0, 5.0, GOOD], 0),
        ([5.0, RuntimeError("boom"), 5.0], 0),  # it does answer
        ([RuntimeError("boom")] * 3, 0),
    ],
    ids=["always late", "late", "once an error", "errors"],
)
def test_an_engine_that_is_always_late_is_to_find_out_whether_it_hangs(behaviour, checks):
    engine = Failing(*behaviour)
    robust(engine)
    assert engine.checks == checks


def test_an_engine_that_is_lost_is_not_papered_over():
    engine = Failing(GOOD)

    async def lost():
        raise EngineError("gone for good")

    engine.ready = lost
    with pytest.raises(EngineError, match="gone for good"):
        robust(engine)


class Versioned:
    """Answers after a moment with the version it served when it was asked; takes a moment to take a new one over."""

    def __init__(self, *, exclusive):
        self.version, self.exclusive, self.log, self.asked = 0, exclusive, [], 0

    async def ready(self): ...

    async def priors(self, requests):
        self.asked += 1
        self.log.append("ask")
        version = self.version
        await asyncio.sleep(0.02)
        self.log.append("answer")
        return [ActionPrior(np.zeros(1, np.float32), "score", version) for _ in requests]

    async def suspend(self):
        self.log.append("suspend")

    async def sync_weights(self, version):
        self.log.append("sync")
        await asyncio.sleep(0.02)
        self.version = version
        self.log.append("synced")

    def take_statistics(self):
        return {}


ONE = [PriorRequest("p", ("a",))]


def run_beside(*, exclusive, updates=4, **changes):
    """Ask all the time while an LLM is updated several times."""
    engine, learner = Versioned(exclusive=exclusive), [0]
    prior = RetryingPrior(engine, attempts=1, backoff_s=0, timeout_s=1, learner_version=lambda: learner[0], **changes)
    used = []

    async def ask_on(stop):
        while not stop.is_set():
            (answer,) = await prior.priors(ONE)
            used.append(learner[0] - answer.version)

    async def update():
        engine.log.append("update")
        await asyncio.sleep(0.03)
        learner[0] += 1
        engine.log.append("updated")
        return learner[0]

    async def run():
        stop = asyncio.Event()
        asking = asyncio.gather(ask_on(stop), ask_on(stop))
        for _ in range(updates):
            await prior.learn(update)
        stop.set()
        await asking

    asyncio.run(run())
    return engine, prior, used


@pytest.mark.parametrize("exclusive", [False, True])
def test_nobody_asks_while_parameters_are_taken_over(exclusive):
    engine, _, used = run_beside(exclusive=exclusive)
    inside = 0
    changing = False
    for event in engine.log:
        inside += {"ask": 1, "answer": -1}.get(event, 0)
        if event in ("suspend", "sync"):
            changing = True
        assert not (changing and inside), engine.log
        if event == "synced":
            changing = False
    assert engine.log.count("synced") == 4 and engine.version == 4 and len(used) > 4
    during_updates = "update,ask" in ",".join(engine.log) or "ask,update" in ",".join(engine.log)
    assert during_updates == (not exclusive)
    assert engine.log.count("suspend") == (4 if exclusive else 0)


@pytest.mark.parametrize(("sync_every", "max_staleness"), [(1, 0), (1, 1), (2, 1), (3, 4)])
def test_no_prior_is_staler_than_allowed(sync_every, max_staleness):
    engine, prior, used = run_beside(exclusive=False, updates=6, sync_every=sync_every, max_staleness=max_staleness)
    assert max(used) <= max_staleness
    assert engine.log.count("synced") == 6 // sync_every
    scalars = prior.take_statistics()
    assert scalars["prior/staleness_max"] == max(used) and scalars["prior/staleness_mean"] == pytest.approx(
        np.mean(used)
    )
    if max_staleness == 0:
        assert scalars["prior/outdated"] > 0  # some answers were too old and were asked for again


@pytest.mark.slow
def test_on_a_shared_gpu_vllm_sleeps_while_the_llm_learns(smollm2, tmp_path):
    """The order of calls, on a double: sleep mode needs a GPU."""
    settings = make_settings({"prior": {"engine": "vllm"}, "vllm": {"sleep": True}})
    builder = PriorBuilder(make_tiny_llm(smollm2.tokenizer), prompt_style(settings))
    engine = VLLMEngine(builder, model="base", cfg=settings.vllm, max_model_len=512, log_file=tmp_path / "vllm.log")
    calls = []

    class Double:
        errored = False

        def __getattr__(self, name):
            async def call(*args, **kwargs):
                calls.append((name, *args, *kwargs.values()))
                return True

            return call

        def shutdown(self):
            calls.append(("shutdown",))

    async def same_as_the_training_copy(row):
        return engine._published.reference

    engine._engine, engine._alive = Double(), True
    engine._row_logprobs = same_as_the_training_copy
    prior = RetryingPrior(engine, attempts=1, backoff_s=0, timeout_s=1)

    async def update():
        calls.append(("update",))
        for p in builder.llm.trainable_parameters():
            p.data += 0.01
        return 1

    async def run():
        await prior.learn(update)
        await engine.close()

    asyncio.run(run())
    names = [call if call[0] == "wake_up" else call[0] for call in calls]
    assert names == [
        "sleep", "update", ("wake_up", ["weights"]), "collective_rpc", "collective_rpc", ("wake_up", ["kv_cache"]),
        "reset_prefix_cache", "shutdown",
    ]  # fmt: skip
    assert calls[0] == ("sleep", 2) and calls[3][:2] == ("collective_rpc", "reload_weights")
    assert engine.version == 1 and not engine._scratch.exists()


class Process:
    """What vLLM's side looks like from here: writes a token after ``seconds``."""

    errored = False

    def __init__(self, seconds):
        self.seconds, self.aborted, self.ended = seconds, 0, False

    async def generate(self, prompt, sampling, request_id, *, lora_request):
        await asyncio.sleep(self.seconds)
        written = SimpleNamespace(token_ids=[1])
        yield SimpleNamespace(outputs=[written], num_cached_tokens=0, metrics=None)

    async def abort(self, request_id):
        self.aborted += 1

    def shutdown(self):
        self.ended = True


@pytest.fixture
def vllm_engine(smollm2, tmp_path, monkeypatch):
    """An engine without vLLM's processes; ``processes`` are those that were started, which answer at once."""
    import vllm.v1.engine.exceptions  # now, for it takes longer than the engine is given below
    from vllm import SamplingParams

    assert SamplingParams and vllm.v1.engine.exceptions

    settings = make_settings({"prior": {"engine": "vllm"}})
    builder = PriorBuilder(make_tiny_llm(smollm2.tokenizer), prompt_style(settings))
    engine = VLLMEngine(builder, model="base", cfg=settings.vllm, max_model_len=512, log_file=tmp_path / "vllm.log")
    engine.processes = []

    def start(model):
        engine._engine = Process(0)
        engine.processes.append(engine._engine)

    async def same_as_the_training_copy(row):
        await asyncio.sleep(0.01)
        return engine._published.reference

    monkeypatch.setattr(engine, "_start_process", start)
    monkeypatch.setattr(engine, "_row_logprobs", same_as_the_training_copy)
    monkeypatch.setattr("priorzero.llm.engines.vllm.CHECK_TIMEOUT_S", 0.5)
    return engine


@pytest.mark.slow
def test_a_vllm_that_hangs_is_started_again_and_a_slow_one_is_left_alone(vllm_engine):
    engine = vllm_engine

    async def run():
        await engine.check()  # nothing runs yet
        await engine.ready()
        (first,) = engine.processes
        first.seconds = 0.05
        await engine.check()
        await engine.ready()
        assert engine.processes == [first] and engine.restarts == 0
        first.seconds = 60
        await engine.check()
        await engine.ready()
        engine._give_up(first)  # by another question, which learns of it when the restart has been seen to already
        await engine.ready()
        assert len(engine.processes) == 2 and first.ended and engine.restarts == 1
        assert engine.take_statistics()["prior/engine_restarts"] == 1
        engine.processes[1].seconds = 60
        await asyncio.gather(engine.check(), engine.check())
        assert engine.processes[1].aborted > 0 and not engine.processes[1].ended
        with pytest.raises(EngineError, match="restarted 1 times already"):
            await engine.ready()
        assert engine.processes[1].ended
        await engine.close()

    asyncio.run(run())


@pytest.mark.slow
def test_a_vllm_that_hangs_while_it_takes_over_is_started_again_with_the_new_parameters(vllm_engine, monkeypatch):
    engine = vllm_engine
    engine.cfg.sync_timeout_s = 1.0

    async def never(published):
        await asyncio.sleep(60)

    async def run():
        await engine.ready()
        monkeypatch.setattr(engine, "_load", never)
        await engine.sync_weights(1)
        first, second = engine.processes
        assert first.ended and not second.ended and engine.restarts == 1
        assert engine.version == 1 and engine._first_model() == str(engine._published.folder)
        await engine.close()

    asyncio.run(run())


def test_rankings_are_the_models_own_text(smollm2):
    """Some models come with a repetition penalty for chats; vLLM is told to leave it out, and so is transformers."""
    llm = make_tiny_llm(smollm2.tokenizer)
    asked = PriorRequest("look look look look look", ("look", "wait"))
    plain = ask(make_engine(llm, prior={"mode": "rank"}, generate_max_len=12), asked)[0].completion
    llm.model.generation_config.repetition_penalty = 5.0
    assert ask(make_engine(llm, prior={"mode": "rank"}, generate_max_len=12), asked)[0].completion == plain


def test_after_a_failed_takeover_whoever_asks_is_told():
    engine, learner = Versioned(exclusive=False), [0]
    prior = RetryingPrior(
        engine, attempts=1, backoff_s=0, timeout_s=1, max_staleness=0, learner_version=lambda: learner[0]
    )

    async def fails(version):
        raise EngineError("not taken over")

    async def update():
        learner[0] += 1
        return learner[0]

    async def run():
        engine.sync_weights = fails
        with pytest.raises(EngineError):
            await prior.learn(update)
        async with asyncio.timeout(1):
            await prior.priors(ONE)

    with pytest.raises(EngineError, match="not taken over"):
        asyncio.run(run())
