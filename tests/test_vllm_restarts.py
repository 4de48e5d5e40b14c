"""Tests of the vLLM engine's restarts and weight syncs with a double in place of vLLM's processes."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from priorzero.llm.engines import PriorBuilder, RetryingPrior, VLLMEngine
from priorzero.llm.engines.vllm_process import engine_arguments, process_environment
from priorzero.llm.prompts import prompt_style
from priorzero.settings import PriorSettings
from priorzero.types import EngineError
from tests.helpers.models import make_settings

pytestmark = pytest.mark.slow  # vLLM is imported


class VLLMDouble:
    """A double of vLLM's ``AsyncLLM``: generates a token after ``delay_s`` and records all other calls."""

    errored = False

    def __init__(self):
        self.delay_s, self.num_aborted, self.is_shut_down, self.calls = 0.0, 0, False, []

    async def generate(self, prompt, sampling, request_id, *, lora_request):
        await asyncio.sleep(self.delay_s)
        yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1])], num_cached_tokens=0, metrics=None)

    async def abort(self, request_id):
        self.num_aborted += 1

    def shutdown(self, *, timeout):
        self.is_shut_down = True
        self.calls.append(("shutdown",))

    def __getattr__(self, name):
        async def call(*args, **kwargs):
            self.calls.append((name, *args, *kwargs.values()))
            return True

        return call


@pytest.fixture
def make_vllm_engine(tiny_llm, tmp_path, monkeypatch):
    """Makes an engine whose starts append a double to ``engine.doubles``. The parity check passes."""
    import vllm.v1.engine.exceptions  # imported before the short timeouts below begin
    from vllm import SamplingParams

    assert SamplingParams and vllm.v1.engine.exceptions

    def make(**vllm_settings):
        settings = make_settings({"prior": {"engine": "vllm"}, "vllm": {"max_model_len": 2048, **vllm_settings}})
        engine = VLLMEngine(
            PriorBuilder(tiny_llm, prompt_style(settings)),
            model="base",
            cfg=settings.vllm,
            log_file=tmp_path / "vllm.log",
        )
        engine.doubles = []
        engine.loaded = []

        def start_process(model):
            engine.loaded.append(model)
            engine._engine = VLLMDouble()
            engine.doubles.append(engine._engine)

        async def reference_logprobs(row):
            await asyncio.sleep(0.01)
            return engine._weights.reference

        monkeypatch.setattr(engine, "_start_process", start_process)
        monkeypatch.setattr(engine, "_row_logprobs", reference_logprobs)
        return engine

    monkeypatch.setattr("priorzero.llm.engines.vllm.CHECK_TIMEOUT_S", 0.2)
    return make


def test_vllm_engine_with_sleep_frees_the_gpu_during_an_update(make_vllm_engine, tiny_llm, monkeypatch):
    engine = make_vllm_engine(sleep=True)
    # The training process must return the memory of the update before vLLM takes it again.
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: [d.calls.append(("empty_cache",)) for d in engine.doubles])
    prior = RetryingPrior(engine, PriorSettings(attempts=1, backoff_s=0, timeout_s=1))

    async def update():
        engine.doubles[0].calls.append(("update",))
        for p in tiny_llm.trainable_parameters():
            p.data += 0.01
        return 1

    async def run():
        await engine.ready()
        await prior.learn(update)
        await engine.close()

    asyncio.run(run())
    (double,) = engine.doubles
    assert [call if call[0] == "wake_up" else call[0] for call in double.calls] == [
        "sleep", "update", "empty_cache", ("wake_up", ["weights"]), "collective_rpc", "collective_rpc",
        ("wake_up", ["kv_cache"]), "reset_prefix_cache", "shutdown",
    ]  # fmt: skip
    assert double.calls[0] == ("sleep", 2) and double.calls[4][:2] == ("collective_rpc", "reload_weights")
    assert engine.version == 1 and not engine._scratch.exists()


async def test_vllm_engine_reads_the_log_probabilities_from_the_end_of_the_sequence(make_vllm_engine, monkeypatch):
    """On a GPU, vLLM's model runner leaves out those of tokens from the prefix cache; on a CPU they are undefined."""
    from vllm.logprobs import Logprob

    engine = make_vllm_engine()
    await engine.ready()
    prompts = []

    async def generate(self, prompt, sampling, request_id, *, lora_request):
        prompts.append((prompt["prompt_token_ids"], sampling.skip_reading_prefix_cache))
        all_positions = [None, *({token: Logprob(-float(token))} for token in prompt["prompt_token_ids"][1:])]
        cached = 0 if sampling.skip_reading_prefix_cache else 4
        outputs = [SimpleNamespace(token_ids=[1])]
        positions = [None, *all_positions[1 + cached :]]
        yield SimpleNamespace(outputs=outputs, num_cached_tokens=cached, metrics=None, prompt_logprobs=positions)

    monkeypatch.setattr(VLLMDouble, "generate", generate)
    got = await engine._completion_logprobs([10, 11, 12, 13, 14], [15, 16], read_cache=True)
    assert got.tolist() == [-15.0, -16.0] and prompts == [([10, 11, 12, 13, 14, 15, 16], False)]
    prompts.clear()  # here a token of the completion would come from the cache
    got = await engine._completion_logprobs([10, 11, 12, 13], [15, 16], read_cache=True)
    assert got.tolist() == [-15.0, -16.0] and [skips for _, skips in prompts] == [False, True]
    await engine.close()


def test_engine_arguments_on_a_gpu_are_those_of_vllm(tiny_llm, tmp_path):
    from vllm.engine.arg_utils import AsyncEngineArgs

    llm = SimpleNamespace(device=torch.device("cuda"), compute_dtype=torch.bfloat16, model=tiny_llm.model)
    cfg = make_settings({"vllm": {"max_model_len": 4096, "sleep": True}}).vllm
    arguments = engine_arguments(llm, cfg, tokenizer=str(tmp_path), trust_remote_code=False)
    assert (arguments["dtype"], arguments["gpu_memory_utilization"]) == ("bfloat16", 0.3)
    assert arguments["enable_sleep_mode"] and arguments["enable_prefix_caching"]
    assert not {"enforce_eager", "kv_cache_memory_bytes", "block_size"} & set(arguments)  # those of a CPU
    AsyncEngineArgs(model=str(tmp_path), **arguments)  # it knows all of them
    with process_environment(log_file=tmp_path / "vllm.log", scratch=tmp_path):
        assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"  # CUDA cannot be used after a fork


async def test_vllm_engine_check_restarts_an_engine_that_hangs_and_keeps_a_slow_one(make_vllm_engine):
    engine = make_vllm_engine()
    await engine.check()  # not started yet
    await engine.ready()
    (first,) = engine.doubles
    first.delay_s = 0.05
    await engine.check()
    await engine.ready()
    assert engine.doubles == [first] and engine.restarts == 0
    first.delay_s = 60
    late_check = asyncio.ensure_future(engine.check())
    await asyncio.sleep(0.1)
    await engine.check()
    assert late_check.done() and first.num_aborted > 0 and not first.is_shut_down
    await engine.ready()
    assert len(engine.doubles) == 2 and first.is_shut_down and engine.restarts == 1
    assert engine.take_statistics()["prior/engine_restarts"] == 1
    engine.doubles[1].delay_s = 60
    await asyncio.gather(engine.check(), engine.check())
    with pytest.raises(EngineError, match="restarted 1 times already"):
        await engine.ready()
    assert engine.doubles[1].is_shut_down
    await engine.close()


async def test_vllm_engine_check_does_not_end_an_engine_that_was_restarted_meanwhile(make_vllm_engine):
    engine = make_vllm_engine()
    await engine.ready()
    engine.doubles[0].delay_s = 60
    late_check = asyncio.ensure_future(engine.check())
    await asyncio.sleep(0.05)
    engine._mark_crashed()  # another request has noticed it
    await engine.ready()
    await late_check
    await engine.ready()
    assert len(engine.doubles) == 2 and not engine.doubles[1].is_shut_down and engine.restarts == 1
    await engine.close()


async def test_vllm_engine_restarts_with_the_new_weights_if_it_hangs_during_a_sync(make_vllm_engine, monkeypatch):
    engine = make_vllm_engine(sync_timeout_s=0.5)

    async def hang(weights):
        await asyncio.sleep(60)

    await engine.ready()
    monkeypatch.setattr(engine, "_load", hang)
    await engine.sync_weights(1)
    first, second = engine.doubles
    assert first.is_shut_down and not second.is_shut_down and engine.restarts == 1
    assert engine.version == 1 and engine.loaded == ["base", str(engine._scratch / "version-1")]
    await engine.close()


# ---- vLLM's processes ----


def test_process_environment_keeps_files_and_messages_of_vllm_out_of_the_way(tmp_path, capfd):
    """Spawned processes log to the file from their first line on, and their temporary files are deleted with ours."""
    scratch = Path(tempfile.mkdtemp(prefix="scratch-"))
    context = multiprocessing.get_context("spawn")
    environment = process_environment(log_file=tmp_path / "vllm.log", scratch=scratch)
    with environment, ProcessPoolExecutor(1, mp_context=context) as pool:
        temporary = pool.submit(tempfile.gettempdir).result(timeout=60)
        pool.submit(logging.getLogger("vllm.triton_utils").warning, "Triton is installed").result(timeout=60)
    assert temporary == str(scratch) != tempfile.gettempdir()
    assert os.environ.get("TMPDIR") != str(scratch)
    assert "Triton is installed" in (tmp_path / "vllm.log").read_text()
    assert "Triton" not in "".join(capfd.readouterr())
    shutil.rmtree(scratch)
    logger = logging.getLogger("vllm")
    for handler in [*logger.handlers]:
        logger.removeHandler(handler)
        handler.close()
