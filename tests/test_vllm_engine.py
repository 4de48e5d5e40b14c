"""The vLLM engine, for real: one engine and SmolLM2 for most of the tests, which build on one another in file order."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from priorzero.envs import make_game, resolve_game
from priorzero.llm.engines import RetryingPrior, TransformersEngine
from priorzero.llm.engines.make import make_engine
from priorzero.llm.losses import sft_loss
from priorzero.llm.models import load_language_model
from priorzero.llm.prompts import prompt_style, render_prompt
from priorzero.runs.checkpoint import newest_checkpoint
from priorzero.train import run_training
from priorzero.types import EngineError, HistoryStep, PriorRequest, UserError
from tests.helpers.models import make_settings

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Unclosed context <zmq:ResourceWarning"),  # vLLM's, when it has crashed
]

SETTINGS = {"prior": {"engine": "vllm"}, "llm": {"generate_max_len": 24}, "vllm": {"cpu_kv_cache_gib": 0.5}}


def vllm_processes():
    """Our descendants, but for Python's own helper."""
    return [
        p
        for p in psutil.Process().children(recursive=True)
        if p.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(p.cmdline())
    ]


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def llm():
    """A copy of its own, since these tests train it."""
    return load_language_model(make_settings().llm, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def engine(runner, llm, tmp_path_factory):
    before = {p.pid for p in vllm_processes()}
    made = make_engine(make_settings(SETTINGS), llm=llm, log_file=tmp_path_factory.mktemp("log") / "vllm.log")
    runner.run(made.ready())
    yield made
    runner.run(made.close())
    left = [p for p in vllm_processes() if p.pid not in before]
    assert not left, left
    assert not made._scratch.exists()


@pytest.fixture(scope="module")
def requests(llm):
    """Questions about 20 states of a real game, played along its walkthrough and then at random."""
    settings = make_settings(SETTINGS)
    game = make_game(
        resolve_game("textworld:simple?seed=7"),
        seed=0,
        max_episode_steps=100,
        look_and_inventory=True,
        drop_inert_commands=True,
    )
    rng, history, asked = np.random.default_rng(0), [], []
    state = game.reset()
    while len(asked) < 20:
        prompt = render_prompt(state, history, style=prompt_style(settings), tokenizer=llm.tokenizer)
        if all(prompt.text != other.prompt for other in asked):
            asked.append(PriorRequest(prompt.text, state.valid_actions))
        action = state.valid_actions[rng.integers(len(state.valid_actions))]
        following, reward = game.step(action)
        history.append(HistoryStep(state.feedback, action, reward))
        if following.done:
            following, history = game.reset(), []
        state = following
    game.close()
    return asked


def in_process(engine, requests):
    """The training copy's own answers."""
    return asyncio.run(TransformersEngine(engine.builder).priors(requests))


def largest_difference(one, other):
    return max(float(np.abs(a.logprobs - b.logprobs).max()) for a, b in zip(one, other, strict=True))


def test_scores_agree_with_the_in_process_engine_on_twenty_states(runner, engine, requests):
    answers = runner.run(engine.priors(requests))
    assert {(a.source, a.version) for a in answers} == {("score", 0)}
    assert largest_difference(answers, in_process(engine, requests)) < 1e-3
    statistics = engine.take_statistics()
    assert statistics["prior/prefix_cache_hit_rate"] > 0.7  # the prompt is computed once for all of its commands
    assert statistics["prior/tokens_per_s"] > 0 and statistics["prior/queue_max_s"] > 0
    assert statistics["prior/parity"] < 2e-4 and statistics["prior/remembered"] == 0


def test_what_was_answered_is_remembered(runner, engine, requests):
    runner.run(engine.priors(requests[:3]))
    statistics = engine.take_statistics()
    assert statistics["prior/remembered"] == 1 and statistics["prior/tokens_per_s"] == 0


def test_log_probabilities_that_the_cache_would_hide_are_computed(runner, engine):
    """The second of two questions finds the blocks of the first one's command, which hold no log-probabilities."""
    command = "take the long golden key from the wooden chest and put it on the table " * 4  # several blocks
    question = PriorRequest("You are in a room. What now?", (command + "now", "wait"))
    first = runner.run(engine.priors([question]))
    engine.cache.clear()
    engine.take_statistics()
    again = runner.run(engine.priors([question]))
    assert engine.take_statistics()["prior/rescored"] == 1
    assert largest_difference(first, again) < 1e-4
    assert largest_difference(again, in_process(engine, [question])) < 1e-3


def test_a_prompt_that_does_not_fit_costs_only_its_own_prior(runner, engine, requests):
    too_long = PriorRequest("word " * 5000, ("go", "stay"))
    answers = runner.run(engine.priors([requests[0], too_long]))
    assert [a.source for a in answers] == ["score", "uniform"]
    assert engine.take_statistics()["prior/too_long"] == 1


def test_rankings_are_the_greedy_text_of_the_model(runner, engine, requests, llm, monkeypatch):
    import dataclasses

    style = prompt_style(make_settings(SETTINGS, {"prior": {"mode": "rank"}}))
    monkeypatch.setattr(engine, "builder", dataclasses.replace(engine.builder, style=style))
    asked = [PriorRequest(r.prompt.replace("Answer with", "Write"), r.valid_actions) for r in requests[:4]]
    answers = runner.run(engine.priors(asked))
    for answer, other in zip(answers, in_process(engine, asked), strict=True):
        assert answer.source == "rank" and answer.completion == other.completion
        assert answer.logprobs == pytest.approx(other.logprobs)


def test_running_out_of_time_aborts_and_the_next_question_is_answered(runner, engine, requests):
    engine.cache.clear()
    prior = RetryingPrior(engine, attempts=2, backoff_s=0.01, timeout_s=0.05)
    answers = runner.run(prior.priors(requests))
    assert {a.source for a in answers} == {"uniform"}
    statistics = prior.take_statistics()
    assert statistics["prior/timeouts"] == 2 and statistics["prior/aborted"] > 10
    assert engine._engine.get_num_unfinished_requests() == 0
    patient = RetryingPrior(engine, attempts=1, backoff_s=0, timeout_s=60)
    answers = runner.run(patient.priors(requests[:2]))
    assert largest_difference(answers, in_process(engine, requests[:2])) < 1e-3


def train_a_step(llm, request, *, learning_rate=1e-4):
    """A real optimiser step towards the last command of a question."""
    optimizer = torch.optim.AdamW(llm.trainable_parameters(), lr=learning_rate)
    tokens, mask = llm.token_logprobs([llm.row(request.prompt, request.valid_actions, end_of_turn=True)])
    target = torch.zeros(len(request.valid_actions))
    target[-1] = 1.0
    loss, num_tokens = sft_loss(tokens, mask, target)
    (loss / num_tokens).backward()
    optimizer.step()


def test_after_an_optimiser_step_priors_come_from_the_new_parameters(runner, engine, requests, llm):
    requests = requests[:5]
    before = runner.run(engine.priors(requests))
    train_a_step(llm, requests[0])
    runner.run(engine.sync_weights(1))
    answers = runner.run(engine.priors(requests))
    assert {a.version for a in answers} == {1} and engine.version == 1
    assert largest_difference(answers, before) > 0.05
    assert largest_difference(answers, in_process(engine, requests)) < 1e-3
    assert answers[0].logprobs[-1] > before[0].logprobs[-1]  # it has learned what it was taught
    statistics = engine.take_statistics()
    assert statistics["prior/parity"] < 2e-4 < statistics["prior/parity_moved"] and statistics["prior/sync_s"] > 0
    # One copy on disk, for a restart; older ones are gone.
    assert [p.name for p in engine._scratch.iterdir() if p.is_dir()] == ["version-1"]


@pytest.mark.parametrize("learning_rate", [1e-6, 1e-3], ids=["a small update", "a large one"])
def test_parameters_that_did_not_arrive_are_noticed(runner, engine, requests, llm, monkeypatch, learning_rate):
    version = engine._published.version + 1

    async def lost(published): ...

    train_a_step(llm, requests[1], learning_rate=learning_rate)
    with monkeypatch.context() as patched:
        patched.setattr(engine, "_load", lost)
        with pytest.raises(EngineError, match=f"version {version} of the LLM but still computes with"):
            runner.run(engine.sync_weights(version))
    runner.run(engine.sync_weights(version + 1))  # arrives


def test_a_part_that_did_not_arrive_is_noticed(runner, engine, llm, monkeypatch):
    """What vLLM itself forgets: its packed copy of an output layer that shares its weights with the embedding."""
    rpc = engine._engine.collective_rpc

    async def without_repacking(method, **kwargs):
        if method != "repack_output_layers":
            await rpc(method, **kwargs)

    with torch.no_grad():
        embedding = llm.model.get_input_embeddings().weight
        embedding += 0.02 * embedding.std() * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
    with monkeypatch.context() as patched:
        patched.setattr(engine._engine, "collective_rpc", without_repacking)
        with pytest.raises(EngineError, match=r"more than 0\.0002|still computes"):
            runner.run(engine.sync_weights(8))
    runner.run(engine.sync_weights(9))


def test_parameters_that_cannot_be_read_end_in_a_message(runner, engine, monkeypatch):
    publish = engine._publish

    async def garbled(version):
        published = await publish(version)
        (published.folder / "model.safetensors").write_bytes(b"garbage")
        return published

    with monkeypatch.context() as patched:
        patched.setattr(engine, "_publish", garbled)
        with pytest.raises(EngineError, match=r"could not take over version 10 of the LLM .*vllm\.log"):
            runner.run(engine.sync_weights(10))
    runner.run(engine.sync_weights(11))


def core():
    return next(p for p in vllm_processes() if "EngineCore" in " ".join(p.cmdline()))


def test_a_slow_engine_is_left_alone_and_one_that_hangs_is_started_again(runner, engine, requests, monkeypatch):
    engine.cache.clear()
    impatient = RetryingPrior(engine, attempts=1, backoff_s=0, timeout_s=0.01)
    assert {a.source for a in runner.run(impatient.priors(requests[:2]))} == {"uniform"}
    assert engine._alive

    monkeypatch.setattr("priorzero.llm.engines.vllm.CHECK_TIMEOUT_S", 5)
    stopped = vllm_processes()
    core().send_signal(signal.SIGSTOP)
    prior = RetryingPrior(engine, attempts=2, backoff_s=0.1, timeout_s=60)
    prior.timeout_s = 1
    assert {a.source for a in runner.run(prior.priors(requests[:2]))} == {"uniform"}
    assert not engine._alive and prior.statistics.timeouts == 2
    prior.timeout_s = 60
    answers = runner.run(prior.priors(requests[:2]))
    assert not [p for p in stopped if p in vllm_processes()]
    assert {(a.source, a.version) for a in answers} == {("score", engine._published.version)}
    assert largest_difference(answers, in_process(engine, requests[:2])) < 1e-3
    statistics = prior.take_statistics()
    assert statistics["prior/engine_restarts"] == 1 and statistics["prior/fallbacks"] == 2


def test_an_engine_that_is_killed_too_often_is_given_up_with_a_reason(runner, engine, requests):
    """Whoever asks and whoever waits for parameters to be taken over are both told."""
    engine.cache.clear()
    prior = RetryingPrior(engine, attempts=3, backoff_s=2, timeout_s=60)

    async def ask_and_kill():
        asking = asyncio.ensure_future(prior.priors(requests[:8]))
        syncing = asyncio.ensure_future(engine._while_alive(asyncio.sleep(60)))  # what vLLM never answers
        await asyncio.sleep(0.3)
        assert not asking.done()
        core().send_signal(signal.SIGKILL)
        with pytest.raises(RuntimeError, match="vLLM has died"):
            await asyncio.wait_for(syncing, 10)
        await asking

    with pytest.raises(EngineError, match=r"restarted 1 times already .*vllm\.log"):
        runner.run(ask_and_kill())
    assert prior.statistics.retries == 1 and prior.statistics.fallbacks == 0


SMALL = {
    "run": {"max_iter": 3, "checkpoint_every": 0},
    "env": {"max_episode_steps": 6, "collector_env_num": 4, "evaluator_env_num": 1},
    "search": {"num_simulations": 4},
    "train": {"collect_env_steps": 12, "batch_size": 8, "update_per_collect": 2},
    "llm": {"batch_size": 2, "micro_batch_size": 1, "use_lora": True},
    "replay": {"segment_length": 20},
    "eval": {"modes": ["world_model_with_prior"]},
}


def test_a_whole_run_with_adapters_goes_on_when_its_engine_is_killed_and_is_resumed(tmp_path, monkeypatch):
    """Overlapped; the worker of vLLM is killed when the first update of the LLM has been taken over."""
    from priorzero.llm.engines.vllm import VLLMEngine

    sync = VLLMEngine.sync_weights

    async def sync_then_kill(self, version):
        await sync(self, version)
        if version == 1:
            assert self._parity["prior/parity_moved"] > 0
            worker = next(p for p in vllm_processes() if "Worker" in " ".join(p.cmdline()))
            worker.send_signal(signal.SIGKILL)
            while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)

    def train(*layers, **how):
        threads = torch.get_num_threads()
        try:
            return run_training(make_settings(SETTINGS, SMALL, {"run": {"output_dir": str(tmp_path)}}, *layers), **how)
        finally:
            torch.set_num_threads(threads)
            assert not vllm_processes()

    with monkeypatch.context() as patched:
        patched.setattr(VLLMEngine, "sync_weights", sync_then_kill)
        summary = train()
    metrics = summary.metrics
    assert summary.rows["LLM updates"] >= 2 and summary.rows["environment steps"] >= 36
    assert metrics["prior/engine_restarts"] == 1 and metrics["prior/fallbacks"] == 0
    assert metrics["prior/parity"] < 2e-4 and metrics["prior/staleness_max"] <= 1
    assert metrics["time/overlap_share"] > 0 and metrics["time/LLM_prior_s"] > 0
    log = (summary.folder / "log" / "run.log").read_text()
    assert "vLLM has crashed; starting it again" in log and "vLLM serves LLM version 2" in log
    assert (summary.folder / "log" / "vllm.log").stat().st_size > 1000
    assert (summary.folder / "trace.json").stat().st_size > 1000

    # Going on, vLLM begins with the adapter that was saved; the base model's answers would differ by far more.
    version = summary.rows["LLM updates"]
    again = train({"run": {"max_iter": 4}}, checkpoint=newest_checkpoint(summary.folder))
    assert again.rows["iterations"] == 4 and again.rows["LLM updates"] == version + 1
    assert again.metrics["prior/engine_restarts"] == 0 and again.metrics["prior/parity"] < 2e-4
    log = (summary.folder / "log" / "run.log").read_text().split("goes on from iteration_3", 1)[1]
    assert log.index(f"vLLM serves LLM version {version} after") < log.index(f"since version {version}")
    assert f"vLLM serves LLM version {version + 1} after" in log


REAPER = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)  # orphans come to this process, as they do to a session manager
worker = (
    "import os, time; os.environ['PRIORZERO_VLLM_OWNER'] = f'{os.getppid()} /nonexistent'; "
    "import priorzero.llm.engines.vllm_worker; print('watching', flush=True); time.sleep(60)"
)
owner = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(60)"
process = subprocess.Popen([sys.executable, "-c", owner, worker], stdout=subprocess.PIPE, text=True)
process.stdout.readline()
process.kill()
process.wait()
pid, status = os.waitpid(-1, 0)  # the worker, which had come to us
print("survived", os.WTERMSIG(status))
"""


def test_only_vllm_itself_ends_with_its_owner():
    """On one GPU the worker runs within the engine, whose next parent is none of our business."""
    done = subprocess.run(
        [sys.executable, "-c", REAPER],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.split() == ["survived", str(int(signal.SIGKILL))], done.stderr


def test_nothing_outlives_a_killed_owner(tmp_path):
    """Neither vLLM's processes, which would hold a GPU's memory for ever, nor the folder with the parameters."""
    command = [sys.executable, "-m", "priorzero.entry", "--quick_test", "--engine", "vllm"]
    with subprocess.Popen(
        [*command, "--set", f"run.output_dir={tmp_path}", "--set", "vllm.cpu_kv_cache_gib=0.5"],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "vLLM serves LLM version 0" in line:
                break
        descendants = psutil.Process(process.pid).children(recursive=True)
        assert sum("VLLM" in " ".join(p.cmdline()) for p in descendants) == 2
        assert list(tmp_path.glob("priorzero-vllm-*"))
        process.kill()
        psutil.wait_procs(descendants, timeout=30)
    assert not [p for p in descendants if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not list(tmp_path.glob("priorzero-vllm-*"))


def test_an_engine_that_cannot_start_ends_in_a_message(tmp_path):
    before = dict(os.environ)
    settings = make_settings(
        SETTINGS, SMALL, {"vllm": {"cpu_kv_cache_gib": 900.0}, "run": {"output_dir": str(tmp_path)}}
    )
    message = r"vLLM did not start: ValueError: Available memory .*vllm\.cpu_kv_cache_gib=900; --engine transformers"
    with pytest.raises(UserError, match=message):
        run_training(settings)
    assert not vllm_processes() and "VLLM_LOGGING_CONFIG_PATH" not in before.keys() | os.environ.keys()
    (folder,) = tmp_path.iterdir()
    assert "Available memory" in (folder / "log" / "vllm.log").read_text()


@pytest.mark.parametrize(
    ("vllm", "message"),
    [({"max_model_len": 100_000}, "more than the 8192 tokens"), ({"sleep": True}, "frees a GPU's memory")],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, vllm, message):
    with pytest.raises(UserError, match=message):
        run_training(make_settings(SETTINGS, SMALL, {"vllm": vllm, "run": {"output_dir": str(tmp_path)}}))
    assert not list(tmp_path.iterdir())
