"""Tests of the retries, the fallback and the staleness limit around a prior engine."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest

from priorzero.llm.engines import RetryingPrior
from priorzero.settings import PriorSettings
from priorzero.types import ActionPrior, EngineError, PriorEngine, PriorRequest


class FailingEngine(PriorEngine):
    """Each entry of ``behaviour`` is one attempt: an exception to raise, seconds to wait, or the priors to return."""

    version = 5
    exclusive = False

    def __init__(self, *behaviour):
        self.behaviour, self.num_calls, self.num_checks = list(behaviour), 0, 0

    async def check(self):
        self.num_checks += 1

    async def priors(self, requests):
        self.num_calls += 1
        behaviour = self.behaviour.pop(0)
        if isinstance(behaviour, Exception):
            raise behaviour
        if isinstance(behaviour, float):
            await asyncio.sleep(behaviour)
        return behaviour

    def take_statistics(self):
        return {"prior/own": 1.0}


REQUESTS = [PriorRequest("p", ("a", "b")), PriorRequest("q", ("a", "b", "c"))]
GOOD = [ActionPrior(np.log(np.full(k, 1 / k)), "score", 5) for k in (2, 3)]
TOO_FEW = GOOD[:1]
WRONG_SHAPE = [GOOD[0], GOOD[0]]
NAN = [GOOD[0], ActionPrior(np.array([0.0, math.nan, 0.0]), "score", 5)]
ERROR = RuntimeError("boom")
HANG = 5.0


def failing(error):
    """A method of an engine that raises ``error``."""

    async def method(*_):
        raise error

    return method


def request_priors(engine):
    prior = RetryingPrior(engine, PriorSettings(attempts=3, backoff_s=0.01, timeout_s=0.1))
    return prior, asyncio.run(prior.priors(REQUESTS))


@pytest.mark.parametrize(
    "failure", [ERROR, HANG, TOO_FEW, WRONG_SHAPE, NAN], ids=["error", "hang", "too few", "wrong shape", "nan"]
)
def test_retrying_prior_retries_after_a_failure(failure):
    engine = FailingEngine(failure, failure, GOOD)
    prior, priors = request_priors(engine)
    assert priors == GOOD and engine.num_calls == 3
    scalars = prior.take_statistics()
    assert (scalars["prior/retries"], scalars["prior/fallbacks"]) == (2, 0)
    assert scalars["prior/timeouts"] == (2 if failure == HANG else 0) and scalars["prior/own"] == 1
    assert prior.take_statistics()["prior/requests"] == 0


def test_retrying_prior_returns_a_uniform_prior_if_all_attempts_fail():
    prior, priors = request_priors(FailingEngine(ERROR, HANG, NAN))
    assert [p.source for p in priors] == ["uniform", "uniform"] and priors[0].version == 5
    assert np.exp(priors[1].logprobs) == pytest.approx([1 / 3] * 3)
    scalars = prior.take_statistics()
    assert (scalars["prior/fallbacks"], scalars["prior/retries"]) == (2, 2)


@pytest.mark.parametrize(
    ("behaviour", "num_checks"),
    [
        ([HANG, HANG, HANG], 1),
        ([HANG, HANG, GOOD], 0),
        ([HANG, ERROR, HANG], 0),  # an error shows that the engine responds
        ([ERROR, ERROR, ERROR], 0),
    ],
    ids=["only timeouts", "success after timeouts", "timeouts and an error", "only errors"],
)
def test_retrying_prior_checks_an_engine_whose_attempts_all_time_out(behaviour, num_checks):
    engine = FailingEngine(*behaviour)
    request_priors(engine)
    assert engine.num_checks == num_checks


def test_retrying_prior_raises_if_the_engine_cannot_be_used_any_more():
    engine = FailingEngine(GOOD)
    engine.ready = failing(EngineError("restarted too often"))
    with pytest.raises(EngineError, match="restarted too often"):
        request_priors(engine)


class VersionedEngine(PriorEngine):
    """Returns priors of the version that it serves when the request begins. Records the order of all calls in ``log``.

    Requests and weight syncs take a moment, so that they would overlap without a lock.
    """

    def __init__(self, *, exclusive):
        self.version, self.exclusive, self.log = 0, exclusive, []

    async def priors(self, requests):
        self.log.append("request")
        version = self.version
        await asyncio.sleep(0.02)
        self.log.append("response")
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


ONE_REQUEST = [PriorRequest("p", ("a",))]


def request_during_updates(*, exclusive, num_updates=4, **kwargs):
    """Two tasks request priors all the time while the LLM is updated several times.

    Returns:
        The engine, the RetryingPrior, and the staleness of all priors.
    """
    engine, learner = VersionedEngine(exclusive=exclusive), [0]
    prior = RetryingPrior(
        engine, PriorSettings(attempts=1, backoff_s=0, timeout_s=1), learner_version=lambda: learner[0], **kwargs
    )
    staleness = []

    async def request(stop):
        while not stop.is_set():
            (result,) = await prior.priors(ONE_REQUEST)
            staleness.append(learner[0] - result.version)

    async def update():
        engine.log.append("update")
        await asyncio.sleep(0.03)
        learner[0] += 1
        engine.log.append("updated")
        return learner[0]

    async def run():
        stop = asyncio.Event()
        requesting = asyncio.gather(request(stop), request(stop))
        for _ in range(num_updates):
            await prior.learn(update)
        stop.set()
        await requesting

    asyncio.run(run())
    return engine, prior, staleness


@pytest.mark.parametrize("exclusive", [False, True])
def test_retrying_prior_runs_no_request_during_a_weight_sync(exclusive):
    engine, _, staleness = request_during_updates(exclusive=exclusive)
    num_running = 0
    syncing = False
    for event in engine.log:
        num_running += {"request": 1, "response": -1}.get(event, 0)
        if event in ("suspend", "sync"):
            syncing = True
        assert not (syncing and num_running), engine.log
        if event == "synced":
            syncing = False
    assert engine.log.count("synced") == 4 and engine.version == 4 and len(staleness) > 4
    during_updates = "update,request" in ",".join(engine.log) or "request,update" in ",".join(engine.log)
    assert during_updates == (not exclusive)
    assert engine.log.count("suspend") == (4 if exclusive else 0)


@pytest.mark.parametrize(("sync_every", "max_staleness"), [(1, 0), (1, 1), (2, 1), (3, 4)])
def test_retrying_prior_limits_the_staleness(sync_every, max_staleness):
    engine, prior, staleness = request_during_updates(
        exclusive=False, num_updates=6, sync_every=sync_every, max_staleness=max_staleness
    )
    assert max(staleness) <= max_staleness
    assert engine.log.count("synced") == 6 // sync_every
    scalars = prior.take_statistics()
    assert scalars["prior/staleness_max"] == max(staleness)
    assert scalars["prior/staleness_mean"] == pytest.approx(np.mean(staleness))
    if max_staleness == 0:
        assert scalars["prior/outdated"] > 0  # some priors were too old and were requested again


async def test_retrying_prior_raises_in_every_request_after_a_failed_weight_sync():
    engine, learner = VersionedEngine(exclusive=False), [0]
    prior = RetryingPrior(
        engine, PriorSettings(attempts=1, backoff_s=0, timeout_s=1), max_staleness=0, learner_version=lambda: learner[0]
    )

    async def update():
        learner[0] += 1
        return learner[0]

    engine.sync_weights = failing(EngineError("not loaded"))
    with pytest.raises(EngineError):
        await prior.learn(update)
    with pytest.raises(EngineError, match="not loaded"):
        await asyncio.wait_for(prior.priors(ONE_REQUEST), 1)
