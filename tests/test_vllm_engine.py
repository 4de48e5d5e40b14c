"""Tests of the vLLM engine with SmolLM2. They share one engine, since a start takes 20 seconds or more.

A test may leave the engine crashed or with old weights; the ``engine`` fixture repairs it before the next test.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
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
from priorzero.llm.engines import RetryingPrior, TransformersEngine, VLLMEngine
from priorzero.llm.engines.make import make_engine
from priorzero.llm.engines.vllm_process import adapted_layer_names
from priorzero.llm.losses import sft_loss
from priorzero.llm.models import load_language_model
from priorzero.llm.prompts import prompt_style, render_prompt
from priorzero.runs.resume import newest_checkpoint
from priorzero.settings import PriorSettings
from priorzero.types import EngineError, HistoryStep, PriorRequest, UserError
from tests.helpers.models import make_settings, make_tiny_llm
from tests.helpers.processes import send_stop_signals
from tests.helpers.runs import train

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Unclosed context <zmq:ResourceWarning"),  # vLLM's, after a crash
]

SETTINGS = {"prior": {"engine": "vllm"}, "llm": {"generate_max_len": 24}, "vllm": {"cpu_kv_cache_gib": 0.5}}
REPOSITORY = Path(__file__).parents[1]


def vllm_processes():
    """The descendants of this process, without multiprocessing's own: resource tracker and fork server."""
    return [
        p
        for p in psutil.Process().children(recursive=True)
        if p.status() != psutil.STATUS_ZOMBIE and not re.search("resource_tracker|forkserver", " ".join(p.cmdline()))
    ]


def find_process(name, *, exclude=()):
    return next(p for p in vllm_processes() if name in " ".join(p.cmdline()) and p.pid not in exclude)


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def llm():
    """A separate copy, since these tests train it."""
    return load_language_model(make_settings().llm, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def shared_engine(runner, llm, tmp_path_factory):
    before = {p.pid for p in vllm_processes()}
    engine = make_engine(make_settings(SETTINGS), llm=llm, vllm_log=tmp_path_factory.mktemp("log") / "vllm.log")
    yield engine
    runner.run(engine.close())
    remaining = [p for p in vllm_processes() if p.pid not in before]
    assert not remaining, remaining
    assert not engine._scratch.exists()


@pytest.fixture
def engine(runner, shared_engine):
    """The shared engine: running, with the parameters of ``llm``, an empty cache and no statistics."""
    shared_engine.restarts = 0
    runner.run(shared_engine.ready())
    if shared_engine.version != shared_engine._weights.version:  # the last weight sync failed
        runner.run(shared_engine.sync_weights(shared_engine._weights.version + 1))
    runner.run(shared_engine.clear_cache())
    shared_engine.take_statistics()
    return shared_engine


@pytest.fixture(scope="module")
def requests(llm):
    """Requests in 12 states of a game that is played at random."""
    style = prompt_style(make_settings(SETTINGS))
    game = make_game(
        resolve_game("textworld:simple?seed=7"),
        seed=0,
        max_episode_steps=100,
        look_and_inventory=True,
        drop_inert_commands=True,
        valid_actions="exact",
    )
    rng, history, requests = np.random.default_rng(0), [], []
    state = game.reset()
    while len(requests) < 12:
        prompt = render_prompt(state, history, style=style, tokenizer=llm.tokenizer)
        if all(prompt.text != request.prompt for request in requests):
            requests.append(PriorRequest(prompt.text, state.valid_actions))
        action = state.valid_actions[rng.integers(len(state.valid_actions))]
        following, reward = game.step(action)
        history.append(HistoryStep(state.feedback, action, reward))
        if following.done:
            following, history = game.reset(), []
        state = following
    game.close()
    return requests


def reference_priors(engine, requests):
    """The priors of the training copy."""
    return asyncio.run(TransformersEngine(engine.builder).priors(requests))


def max_difference(one, other):
    return max(float(np.abs(a.logprobs - b.logprobs).max()) for a, b in zip(one, other, strict=True))


def train_one_step(llm, request, *, learning_rate=1e-4):
    """An optimiser step that raises the last action of a request."""
    optimizer = torch.optim.AdamW(llm.trainable_parameters(), lr=learning_rate)
    tokens, mask = llm.token_logprobs([llm.row(request.prompt, request.valid_actions, end_of_turn=True)])
    target = torch.zeros(len(request.valid_actions))
    target[-1] = 1.0
    loss, num_tokens = sft_loss(tokens, mask, target)
    (loss / num_tokens).backward()
    optimizer.step()


# ---- requests ----


def test_vllm_engine_scores_agree_with_the_transformers_engine(runner, engine, requests):
    runner.run(engine._engine.reset_prefix_cache())
    priors = runner.run(engine.priors(requests))
    assert {(p.source, p.version) for p in priors} == {("score", engine.version)}
    assert max_difference(priors, reference_priors(engine, requests)) < 1e-3
    statistics = engine.take_statistics()
    assert statistics["prior/prefix_cache_hit_rate"] > 0.7  # the prompt is computed once for all of its actions
    assert statistics["prior/tokens_per_s"] > 0 and statistics["prior/queue_max_s"] > 0
    assert statistics["prior/remembered"] == 0


def test_vllm_engine_caches_priors(runner, engine, requests):
    first = runner.run(engine.priors(requests[:3]))
    engine.take_statistics()
    assert max_difference(runner.run(engine.priors(requests[:3])), first) == 0
    statistics = engine.take_statistics()
    assert statistics["prior/remembered"] == 1 and statistics["prior/tokens_per_s"] == 0


def test_vllm_engine_recomputes_logprobs_of_cached_completion_tokens(runner, engine):
    """The second request finds completion tokens in vLLM's prefix cache, which have no log-probabilities there."""
    action = "take the long golden key from the wooden chest and put it on the table " * 4  # several cache blocks
    request = PriorRequest("You are in a room. What now?", (action + "now", "wait"))
    first = runner.run(engine.priors([request]))
    runner.run(engine.clear_cache())
    engine.take_statistics()
    second = runner.run(engine.priors([request]))
    assert engine.take_statistics()["prior/rescored"] == 1
    assert max_difference(first, second) < 1e-4
    assert max_difference(second, reference_priors(engine, [request])) < 1e-3


def test_vllm_engine_gives_a_uniform_prior_to_a_prompt_that_is_too_long(runner, engine, requests):
    too_long = PriorRequest("word " * 5000, ("go", "stay"))
    priors = runner.run(engine.priors([requests[0], too_long]))
    assert [p.source for p in priors] == ["score", "uniform"]
    assert engine.take_statistics()["prior/too_long"] == 1


def test_vllm_engine_rank_generates_the_same_text_as_the_transformers_engine(runner, engine, requests, monkeypatch):
    style = prompt_style(make_settings(SETTINGS, {"prior": {"mode": "rank"}}))
    monkeypatch.setattr(engine, "builder", dataclasses.replace(engine.builder, style=style))
    priors = runner.run(engine.priors(requests[:3]))
    for prior, reference in zip(priors, reference_priors(engine, requests[:3]), strict=True):
        assert prior.source == "rank" and prior.completion == reference.completion
        assert prior.logprobs == pytest.approx(reference.logprobs)


def test_vllm_engine_scores_behind_the_same_thought_as_the_transformers_engine(runner, engine, requests, monkeypatch):
    style = prompt_style(make_settings(SETTINGS, {"prior": {"use_cot": True}}))
    monkeypatch.setattr(engine, "builder", dataclasses.replace(engine.builder, style=style))
    priors, references = runner.run(engine.priors(requests[:3])), reference_priors(engine, requests[:3])
    for prior, reference in zip(priors, references, strict=True):
        assert prior.source == "score" and prior.completion == reference.completion
        assert prior.completion.endswith("Answer:\n") and prior.parsed == reference.parsed
        assert prior.rollout_logprobs == pytest.approx(reference.rollout_logprobs, abs=1e-2)
    assert max_difference(priors, references) < 1e-3


def test_vllm_engine_aborts_requests_that_time_out(runner, engine, requests):
    prior = RetryingPrior(engine, PriorSettings(attempts=2, backoff_s=0.01, timeout_s=0.05))
    priors = runner.run(prior.priors(requests))
    assert {p.source for p in priors} == {"uniform"}
    statistics = prior.take_statistics()
    assert statistics["prior/timeouts"] == 2 and statistics["prior/aborted"] > 10
    assert engine._engine.get_num_unfinished_requests() == 0
    assert engine._running  # a slow engine does not count as crashed
    patient = RetryingPrior(engine, PriorSettings(attempts=1, backoff_s=0, timeout_s=120))
    priors = runner.run(patient.priors(requests[:2]))
    assert max_difference(priors, reference_priors(engine, requests[:2])) < 1e-3


# ---- weight syncs ----


def test_vllm_engine_serves_the_new_parameters_after_a_sync(runner, engine, requests, llm):
    requests, version = requests[:3], engine.version + 1
    before = runner.run(engine.priors(requests))
    train_one_step(llm, requests[0])
    runner.run(engine.sync_weights(version))
    priors = runner.run(engine.priors(requests))
    assert {p.version for p in priors} == {version} and engine.version == version
    assert max_difference(priors, before) > 0.05
    assert max_difference(priors, reference_priors(engine, requests)) < 1e-3
    assert priors[0].logprobs[-1] > before[0].logprobs[-1]
    statistics = engine.take_statistics()
    assert statistics["prior/parity"] < 2e-4 < statistics["prior/parity_moved"] and statistics["prior/sync_s"] > 0
    # Only the last version is kept on disk, for a restart. vLLM has temporary files of its own there.
    assert [p.name for p in engine._scratch.glob("version-*")] == [f"version-{version}"]


@pytest.mark.parametrize("learning_rate", [1e-6, 1e-3], ids=["small update", "large update"])
def test_vllm_engine_detects_stale_parameters(runner, engine, requests, llm, monkeypatch, learning_rate):
    version = engine.version + 1

    async def load_nothing(weights): ...

    train_one_step(llm, requests[1], learning_rate=learning_rate)
    monkeypatch.setattr(engine, "_load", load_nothing)
    with pytest.raises(EngineError, match=f"version {version} of the LLM but still computes with"):
        runner.run(engine.sync_weights(version))


def test_vllm_engine_detects_a_stale_output_layer(runner, engine, llm, monkeypatch):
    """vLLM itself does not update its packed copy of an output layer that shares its weights with the embedding."""
    rpc = engine._engine.collective_rpc

    async def without_repacking(method, **kwargs):
        if method != "repack_output_layers":
            await rpc(method, **kwargs)

    with torch.no_grad():
        embedding = llm.model.get_input_embeddings().weight
        embedding += 0.02 * embedding.std() * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(engine._engine, "collective_rpc", without_repacking)
    with pytest.raises(EngineError, match=r"more than 0\.0002|still computes"):
        runner.run(engine.sync_weights(engine.version + 1))


def test_vllm_engine_explains_unreadable_parameters(runner, engine, llm, requests, monkeypatch):
    export, version = engine._export, max(1, engine.version + 1)

    async def export_garbage(version):
        weights = await export(version)
        (weights.folder / "model.safetensors").write_bytes(b"garbage")
        return weights

    monkeypatch.setattr(engine, "_export", export_garbage)
    with pytest.raises(EngineError, match=rf"could not load version {version} of the LLM .*vllm\.log"):
        runner.run(engine.sync_weights(version))


# ---- signals and crashes ----


def test_vllm_engine_processes_do_not_react_to_stop_signals(runner, engine, requests):
    """A batch system may send its signal to all processes of a run."""
    before = vllm_processes()
    for process in before:
        send_stop_signals(process)
    time.sleep(1)
    priors = runner.run(engine.priors(requests[:2]))
    assert {p.source for p in priors} == {"score"} and engine._running
    assert vllm_processes() == before


def test_vllm_engine_restarts_after_a_hang_and_gives_up_after_the_next_crash(runner, engine, requests, monkeypatch):
    monkeypatch.setattr("priorzero.llm.engines.vllm.CHECK_TIMEOUT_S", 2)
    processes, requests = vllm_processes(), requests[:2]
    find_process("EngineCore").send_signal(signal.SIGSTOP)
    hanging = RetryingPrior(engine, PriorSettings(attempts=2, backoff_s=0.1, timeout_s=0.5))
    assert {p.source for p in runner.run(hanging.priors(requests))} == {"uniform"}
    assert not engine._running and hanging.statistics.timeouts == 2
    prior = RetryingPrior(engine, PriorSettings(attempts=3, backoff_s=1, timeout_s=120))
    priors = runner.run(prior.priors(requests))
    assert not [p for p in processes if p in vllm_processes()]
    assert {(p.source, p.version) for p in priors} == {("score", engine.version)}
    assert max_difference(priors, reference_priors(engine, requests)) < 1e-3
    statistics = prior.take_statistics()
    assert statistics["prior/engine_restarts"] == 1 and statistics["prior/fallbacks"] == 0

    async def kill_during_calls():
        """Requests and other calls to vLLM both fail."""
        await engine.clear_cache()
        requesting = asyncio.ensure_future(prior.priors(many))
        other_call = asyncio.ensure_future(engine._fail_if_dead(asyncio.sleep(60)))  # vLLM would never return
        await asyncio.sleep(0.1)
        assert not requesting.done()
        find_process("EngineCore").send_signal(signal.SIGKILL)
        with pytest.raises(RuntimeError, match="vLLM has died"):
            await asyncio.wait_for(other_call, 30)
        await requesting

    many = [PriorRequest(f"{n} {requests[0].prompt}", requests[0].valid_actions) for n in range(16)]
    with pytest.raises(EngineError, match=r"restarted 1 times already .*vllm\.log"):
        runner.run(kill_during_calls())
    assert prior.statistics.retries == 1 and prior.statistics.fallbacks == 0


# ---- starts of other engines ----


def test_vllm_engine_explains_a_failed_start(runner, llm, tmp_path):
    environment = dict(os.environ)
    before = {p.pid for p in vllm_processes()}
    settings = make_settings(SETTINGS, {"vllm": {"cpu_kv_cache_gib": 900.0}})
    log_file = tmp_path / "vllm.log"
    engine = make_engine(settings, llm=llm, vllm_log=log_file)
    message = r"vLLM did not start: ValueError: Available memory .*vllm\.cpu_kv_cache_gib=900; --engine transformers"
    with pytest.raises(EngineError, match=message):
        runner.run(engine.ready())
    runner.run(engine.close())
    assert {p.pid for p in vllm_processes()} == before
    assert "VLLM_LOGGING_CONFIG_PATH" not in environment.keys() | os.environ.keys()
    assert "Available memory" in log_file.read_text()


START_ENGINE = """
import asyncio, sys, torch
from pathlib import Path
from priorzero.llm.engines.make import make_engine
from priorzero.llm.engines.vllm_process import adapted_layer_names
from priorzero.llm.models import load_language_model
from tests.helpers.models import make_settings, make_tiny_llm

settings = make_settings({"prior": {"engine": "vllm"}, "vllm": {"cpu_kv_cache_gib": 0.5}})
llm = load_language_model(settings.llm, device=torch.device("cpu"))

async def run():
    await make_engine(settings, llm=llm, vllm_log=Path(sys.argv[1])).ready()
    print("ready", flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(run())
"""


def test_vllm_processes_end_with_a_killed_owner(tmp_path):
    """They would keep a GPU's memory. The folder with the parameters is deleted as well."""
    with subprocess.Popen(
        [sys.executable, "-c", START_ENGINE, str(tmp_path / "vllm.log")],
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert "ready" in process.stdout.read(6)
        descendants = psutil.Process(process.pid).children(recursive=True)
        assert sum("VLLM" in " ".join(p.cmdline()) for p in descendants) == 2
        assert list(tmp_path.glob("priorzero-vllm-*"))
        process.kill()
        psutil.wait_procs(descendants, timeout=30)
    assert not [p for p in descendants if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not list(tmp_path.glob("priorzero-vllm-*"))


KILL_OWNER = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans become children of this process
worker = (
    "import os, time; os.environ['PRIORZERO_VLLM_OWNER'] = f'{os.getppid()} /nonexistent'; "
    "import priorzero.llm.engines.vllm_worker; print('watching', flush=True); time.sleep(60)"
)
owner = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(60)"
process = subprocess.Popen([sys.executable, "-c", owner, worker], stdout=subprocess.PIPE, text=True)
process.stdout.readline()
process.kill()
process.wait()
pid, status = os.waitpid(-1, 0)  # the worker
print("survived", os.WTERMSIG(status))
"""


def test_end_with_owner_does_not_kill_the_workers_next_parent():
    """On one GPU the worker runs inside the engine's process, whose parent is the owner."""
    done = subprocess.run(
        [sys.executable, "-c", KILL_OWNER],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.split() == ["survived", str(int(signal.SIGKILL))], done.stderr


# ---- adapters ----


def test_vllm_engine_serves_the_adapters_of_all_layers(runner, llm, tmp_path):
    """A model with few layers, whose adapters change the log-probabilities by a whole nat."""
    before = vllm_processes()
    tiny = make_tiny_llm(llm.tokenizer, hidden_size=128, num_attention_heads=2, max_position_embeddings=8192)
    tiny.save(tmp_path / "model")
    settings = make_settings(SETTINGS, {"llm": {"path": str(tmp_path / "model"), "use_lora": True}})
    tiny = load_language_model(settings.llm, device=torch.device("cpu"))
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert adapted_layer_names(tiny.model) == names
    engine = make_engine(settings, llm=tiny, vllm_log=tmp_path / "vllm.log")
    engine._arguments["lora_target_modules"] = [name for name in names if name not in ("q_proj", "k_proj", "v_proj")]
    with pytest.raises(EngineError, match=r"ignores the adapters of 6 layers.* model\.layers\.0\.self_attn\.k_proj"):
        runner.run(engine.ready())
    runner.run(engine._shut_down())
    engine._arguments["lora_target_modules"] = names
    generator = torch.Generator().manual_seed(0)
    for version, scale in enumerate([0.01, 0.1], start=1):
        with torch.no_grad():
            for parameter in tiny.trainable_parameters():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        runner.run(engine.sync_weights(version))
    metrics = engine.take_statistics()
    assert metrics["prior/parity"] < 2e-5 and metrics["prior/parity_moved"] > 0.5
    started = [process for process in vllm_processes() if process not in before]
    runner.run(engine.close())
    _, alive = psutil.wait_procs(started, timeout=2)  # the workers end with their engine, which was killed
    # The parent of a process that has ended may not have read its exit code yet.
    assert len(started) == 2 and all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


# ---- runs ----

SMALL = {
    "run": {"max_iter": 3, "checkpoint_every": 0},
    "env": {"max_episode_steps": 6, "collector_env_num": 4, "evaluator_env_num": 1},
    "search": {"num_simulations": 4},
    "train": {"collect_env_steps": 12, "batch_size": 8, "update_per_collect": 2},
    "llm": {"batch_size": 2, "micro_batch_size": 1, "use_lora": True, "learning_rate": 1e-3},
    "replay": {"segment_length": 20},
    "eval": {"modes": ["world_model_with_prior"]},
}


def run_small(tmp_path, *layers, **kwargs):
    return train(make_settings(SETTINGS, SMALL, {"run": {"output_dir": str(tmp_path)}}, *layers), **kwargs)


def test_run_training_with_vllm_resumes_with_adapters_and_survives_a_killed_worker(tmp_path, monkeypatch):
    """The first iterations use the transformers engine. The resumed run starts vLLM with the saved adapter."""
    before = {p.pid for p in vllm_processes()}
    first = run_small(tmp_path, {"prior": {"engine": "transformers"}})
    version = first.rows["LLM updates"]
    assert version >= 1
    sync_weights = VLLMEngine.sync_weights

    async def sync_then_kill(self, new_version):
        await sync_weights(self, new_version)
        if new_version == version + 1:
            worker = find_process("Worker", exclude=before)
            worker.send_signal(signal.SIGKILL)
            while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)

    monkeypatch.setattr(VLLMEngine, "sync_weights", sync_then_kill)
    summary = run_small(tmp_path, {"run": {"max_iter": 5}}, checkpoint=newest_checkpoint(first.folder))
    metrics = summary.metrics
    assert summary.rows["iterations"] == 5 and summary.rows["LLM updates"] == version + 2
    assert metrics["prior/engine_restarts"] == 1 and metrics["prior/fallbacks"] == 0
    assert metrics["prior/parity"] < 2e-4 and metrics["prior/staleness_max"] <= 1
    assert metrics["time/overlap_share"] > 0 and metrics["time/LLM_prior_s"] > 0
    log = (summary.folder / "log" / "run.log").read_text()
    messages = [
        f"vLLM serves LLM version {version} after",
        f"vLLM serves LLM version {version + 1} after",
        "vLLM has crashed and is restarted",
        f"vLLM serves LLM version {version + 2} after",
    ]
    positions = [log.index(message) for message in messages]
    assert positions == sorted(positions)
    change = re.search(rf"change (\S+) since version {version}\n", log)
    assert change is not None and float(change[1]) > 0
    assert (summary.folder / "log" / "vllm.log").stat().st_size > 1000
    assert (summary.folder / "trace.json").stat().st_size > 1000
    assert {p.pid for p in vllm_processes()} == before


def test_run_training_reports_that_vllm_cannot_start(tmp_path, monkeypatch):
    def fail(self, model):
        raise ValueError("Available memory is too small")

    monkeypatch.setattr(VLLMEngine, "_start_process", fail)
    with pytest.raises(UserError, match=r"vLLM did not start: ValueError: Available memory"):
        run_small(tmp_path, {"llm": {"use_lora": False}})


@pytest.mark.parametrize(
    ("vllm", "message"),
    [({"max_model_len": 100_000}, "the model's 8192 tokens"), ({"sleep": True}, "needs a GPU")],
)
def test_run_training_refuses_vllm_settings_before_it_writes(tmp_path, vllm, message):
    with pytest.raises(UserError, match=message):
        run_small(tmp_path, {"vllm": vllm})
    assert not list(tmp_path.iterdir())
