"""The training loop in one process: once on a real game with a real language model, else on toy games."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from priorzero.config import resolve_settings
from priorzero.llm.models import load_language_model
from priorzero.play.action_vocabulary import ActionVocabulary
from priorzero.policy import PriorZeroPolicy
from priorzero.run_state import RunState, load_world_model_state
from priorzero.runs.checkpoint import read_checkpoint
from priorzero.runs.resume import newest_checkpoint
from priorzero.runs.summary import count_moved, fingerprint
from priorzero.train import run_training, run_training_async
from priorzero.types import UserError
from tests.helpers.models import make_settings
from tests.helpers.runs import NO_LLM, lines, read_events, short_settings, train
from tests.helpers.toy_game import toy_games

REAL = {
    "run": {"max_iter": 1, "num_threads": 2},
    "env": {"max_episode_steps": 4},
    "search": {"num_simulations": 4},
    "train": {"collect_env_steps": 8, "batch_size": 8, "update_per_collect": 2},
    "llm": {"batch_size": 2, "micro_batch_size": 1},
    "replay": {"segment_length": 20},
}
TAGS = [
    "train/wm_total_loss",
    "train/llm_sft_loss",
    "train/llm_rft_loss",
    "train/total_loss",
    "train/wm_grad_norm",
    "train/llm_grad_norm",
    "collector_iter/reward_mean",
    "collector_iter/visit_entropy_mean",
    "evaluator_step/reward_mean",
    "prior/latency_mean_s",
    "prior/retries",
    "prior/fallbacks",
    "prior/parse_rate",
    "prior/entropy_mean",
    "prior/agreement",
]

# ---- a real game and a real language model ----


@pytest.mark.slow
def test_train_writes_metrics_logs_and_a_summary(tmp_path):
    """A run of TextWorld with SmolLM2."""
    real_run = train(make_settings(REAL, {"run": {"output_dir": str(tmp_path)}}))
    scalars = read_events(real_run.folder)
    for tag in TAGS:
        assert scalars.get(tag), f"{tag} is missing"
        assert all(math.isfinite(value) for value in scalars[tag])
    assert real_run.rows["environment steps"] == 8 and real_run.rows["LLM updates"] == 1
    for name in ("world model", "LLM"):
        moved, _, of = real_run.rows[f"{name} tensors moved"].split()
        assert moved == of and int(of) > 10
    assert set(real_run.evaluations) == {"world_model", "world_model_with_prior", "prior"}
    assert not real_run.stopped
    logs = {path.name: path.read_text() for path in (real_run.folder / "log").iterdir()}
    assert "latency_mean_s" in logs["llm_prior.log"] and "decisions" in logs["segments.log"]
    assert "iteration 1/1" in logs["run.log"] and "done:" in logs["run.log"]
    assert (real_run.folder / "trace.json").stat().st_size > 1000


# ---- toy games ----


def test_train_writes_checkpoints_that_can_be_loaded(tmp_path, tiny_llm_folder):
    layer = {"run": {"max_iter": 4, "checkpoint_every": 2}, "llm": {"path": str(tiny_llm_folder)}, "eval": {"every": 9}}
    with toy_games():
        run = train(short_settings(tmp_path, layer))
    first, last = (run.folder / "checkpoints" / f"iteration_{n}" for n in (2, 4))
    assert sorted(p.name for p in (run.folder / "checkpoints").iterdir()) == ["iteration_2", "iteration_4"]
    llms = [
        load_language_model(make_settings({"llm": {"path": str(c / "llm")}}).llm, device=torch.device("cpu"))
        for c in (first, last)
    ]
    fingerprints = [fingerprint(dict(llm.model.named_parameters())) for llm in llms]
    assert count_moved(*fingerprints) > 15
    policy = PriorZeroPolicy(short_settings(tmp_path), feature_size=384 * 3 + 128, device="cpu", llm=None)
    before = fingerprint(dict(policy.trained_world_model_parameters()))
    indexer = ActionVocabulary(256)
    load_world_model_state(last, policy=policy, indexer=indexer)
    assert count_moved(before, fingerprint(dict(policy.trained_world_model_parameters()))) == len(before)
    assert indexer.num_used > 3
    assert read_checkpoint(last).manifest["counters"] == {
        "iteration": 4, "env_step": run.rows["environment steps"], "train_iter": 6, "llm_version": 3,
    }  # fmt: skip


@pytest.mark.parametrize("prior", [{"mode": "rank"}, {"mode": "score", "use_cot": True}])
def test_train_with_generated_text_and_adapters(tmp_path, tiny_llm_folder, prior):
    layer = {
        "run": {"max_iter": 3},
        "prior": prior,
        "llm": {"path": str(tiny_llm_folder), "use_lora": True, "generate_max_len": 16},
        "eval": {"modes": ["world_model"]},
    }
    with toy_games():
        run = train(short_settings(tmp_path, layer))
    moved, _, of = run.rows["LLM tensors moved"].split()
    assert int(of) == 2 * 14 and int(moved) > 0  # two matrices for each of seven linear maps in two layers
    assert sorted(path.name for path in (run.folder / "checkpoints" / "iteration_3" / "llm").glob("*.safetensors")) == [
        "adapter_model.safetensors"
    ]


def test_train_updates_each_model_in_its_turn(tmp_path, tiny_llm_folder):
    """The LLM also learns in iterations in which the world model does not. It has a sample of its own then."""
    changes = {
        "run": {"max_iter": 12, "checkpoint_every": 0},
        "env": {"max_episode_steps": 5},
        "train": {"collect_env_steps": 4, "update_per_collect": 1, "update_every": 2},
        "llm": {"path": str(tiny_llm_folder), "update_every": 3},
        "eval": {"every": 1000, "modes": ["world_model"]},
    }
    with toy_games():
        summary = train(short_settings(tmp_path, changes))
    stored = read_events(summary.folder)["buffer/decisions"]
    ready = [n for n, decisions in enumerate(stored, start=1) if decisions >= 8]
    assert summary.rows["world-model updates"] == sum(n % 2 == 0 for n in ready) > 2
    assert summary.rows["LLM updates"] == sum(n % 3 == 0 for n in ready) > 1
    assert any(n % 3 == 0 and n % 2 for n in ready)


def test_train_with_overlap_makes_the_same_number_of_updates(tmp_path):
    """Collection continues during the updates, and the timeline shows it."""
    # 24 steps of 4 games: the faster group finishes its episodes of 6 steps, so there is a batch from the beginning on.
    changes = {
        "run": {"max_iter": 4, "checkpoint_every": 0},
        "env": {"max_episode_steps": 6, "collector_env_num": 4},
        "train": {"collect_env_steps": 24},
        "eval": {"every": 1000},
    }
    with toy_games():
        apart, overlapping = (
            train(short_settings(tmp_path / overlap, NO_LLM, changes, {"train": {"overlap": overlap}}))
            for overlap in ("never", "always")
        )
    assert overlapping.rows["world-model updates"] == apart.rows["world-model updates"] == 8
    assert overlapping.rows["world model tensors moved"] == apart.rows["world model tensors moved"]
    shares = [max(read_events(summary.folder)["time/overlap_share"]) for summary in (apart, overlapping)]
    assert shares[0] < 0.01 < shares[1]
    assert read_checkpoint(overlapping.folder / "checkpoints" / "iteration_4").manifest["counters"]["train_iter"] == 8


def test_train_on_several_games_evaluates_each_and_unseen_ones(tmp_path):
    changes = {
        "run": {"env_id": "toy1,toy2", "exp_name": "", "max_iter": 4},
        "eval": {"modes": ["world_model", "random"], "unseen": "toy3", "every": 1000},
    }
    with toy_games():
        summary = train(short_settings(tmp_path, NO_LLM, changes))
    assert summary.folder.name.startswith("toy1_and_1_more_seed0_")
    assert set(summary.evaluations) == {"world_model", "random", "unseen_world_model", "unseen_random"}
    assert len(summary.evaluations["random"].scores) == 2 * len(summary.evaluations["unseen_random"].scores) == 2
    evaluations = lines(summary.folder, "evaluations.jsonl")
    assert {line["env_step"] for line in evaluations} == {summary.rows["environment steps"]}


def test_train_with_no_environment_steps_only_evaluates(tmp_path):
    with toy_games():
        summary = train(short_settings(tmp_path, NO_LLM, {"run": {"max_env_step": 0}, "eval": {"modes": ["random"]}}))
    assert summary.rows["environment steps"] == 0 and list(summary.evaluations) == ["random"]
    assert len(lines(summary.folder, "evaluations.jsonl")) == 1 and not summary.stopped
    assert not (summary.folder / "checkpoints").exists()


def test_train_evaluates_at_the_start_without_an_effect_on_training(tmp_path, tiny_llm_folder):
    """Episodes, losses and parameters are equal to the last digit."""
    changes = {"run": {"max_iter": 4}, "llm": {"path": str(tiny_llm_folder)}, "eval": {"every": 1000}}
    with toy_games():
        plain, compared = (
            train(short_settings(tmp_path / str(at_start), changes, {"eval": {"at_start": at_start}}))
            for at_start in (False, True)
        )
        evaluated = [line["env_step"] for line in lines(compared.folder, "evaluations.jsonl")]
        resumed = train(
            short_settings(tmp_path / "True", changes, {"eval": {"at_start": True}, "run": {"max_iter": 5}}),
            checkpoint=newest_checkpoint(compared.folder),
        )
    steps = plain.rows["environment steps"]
    assert evaluated == [0, 0, 0, steps, steps, steps] and plain.rows["LLM updates"] > 0
    again = [line["env_step"] for line in lines(resumed.folder, "evaluations.jsonl")]
    assert again[:6] == evaluated and again[6:] == 3 * [resumed.rows["environment steps"]] and again[6] > steps
    log = (resumed.folder / "log" / "run.log").read_text()
    assert log.count("before     after") == 2  # also in the summary of the resumed run

    def trained(run):
        folder = run.folder / "checkpoints" / "iteration_4"
        return [
            fingerprint(torch.load(folder / "world_model.pt", weights_only=True)),
            (folder / "llm" / "model.safetensors").read_bytes(),
        ]

    assert (
        lines(plain.folder, "episodes.jsonl")
        == lines(compared.folder, "episodes.jsonl")[: plain.rows["episodes finished"]]
    )
    assert trained(plain) == trained(compared)
    names = ("train/", "prior/entropy_mean", "prior/remembered", "prior/prefix_cache_hit_rate")
    events = [
        {name: values for name, values in read_events(run.folder).items() if name.startswith(names)}
        for run in (plain, compared)
    ]
    assert {"prior/remembered", "prior/prefix_cache_hit_rate", "train/llm_loss"} <= events[0].keys()
    assert all(events[1][name][: len(values)] == values for name, values in events[0].items())


# ---- in a running event loop, as in a notebook, and in a thread ----

ENDLESS = {"run": {"max_iter": 100_000, "checkpoint_every": 0, "exp_name": ""}, "eval": {"every": 10**6}}


async def after_iterations(folder, count):
    """Wait until a run under ``folder`` has logged this many iterations."""
    async with asyncio.timeout(60):
        while not any(f"iteration {count}," in log.read_text() for log in folder.glob("*/log/run.log")):
            await asyncio.sleep(0.01)


async def test_run_training_async_runs_repeatedly_in_one_event_loop(tmp_path):
    settings = short_settings(tmp_path, NO_LLM, {"run": {"max_iter": 2, "exp_name": ""}})
    with toy_games():
        with pytest.raises(UserError, match=r"type: await run_training_async\(settings\)"):
            run_training(settings)
        first, second = [await run_training_async(settings) for _ in range(2)]
        both = await asyncio.gather(*(run_training_async(settings) for _ in range(2)), return_exceptions=True)
    assert first.rows["iterations"] == second.rows["iterations"] == 2 and first.folder != second.folder
    assert lines(first.folder, "episodes.jsonl") == lines(second.folder, "episodes.jsonl")
    (refused,) = [result for result in both if isinstance(result, UserError)]
    assert "a run is in progress in this process" in str(refused)


async def test_run_training_async_saves_when_it_is_cancelled_and_can_be_resumed(tmp_path):
    with toy_games():
        task = asyncio.create_task(run_training_async(short_settings(tmp_path, NO_LLM, ENDLESS)))
        await after_iterations(tmp_path, 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (folder,) = tmp_path.iterdir()
        checkpoint = newest_checkpoint(folder)
        assert checkpoint.manifest["counters"]["iteration"] >= 3 and (folder / "report.html").is_file()
        last = checkpoint.manifest["counters"]["iteration"] + 1
        settings = resolve_settings(checkpoint.settings, {"run": {"max_iter": last}})
        resumed = await run_training_async(settings, checkpoint=checkpoint)
    assert resumed.rows["iterations"] == last


async def test_run_training_async_returns_when_it_is_interrupted(tmp_path):
    """A notebook interrupts its cell with SIGINT."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    with toy_games():
        task = asyncio.create_task(run_training_async(short_settings(tmp_path, NO_LLM, ENDLESS)))
        await after_iterations(tmp_path, 2)
        os.kill(os.getpid(), signal.SIGINT)
        summary = await task
    assert signal.signal(signal.SIGINT, handler) is signal.default_int_handler
    assert summary.stopped and newest_checkpoint(summary.folder).manifest["counters"]["iteration"] >= 2


def test_train_saves_when_the_gpu_has_too_little_memory(tmp_path, monkeypatch):
    """The activations of the update that failed are freed first, so that saving has memory."""
    alive = []

    class Activations:
        pass

    def fail(policy, *_, **__):
        activations = Activations()
        alive.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def write(state, folder, **keywords):
        assert alive[0]() is None
        own_write(state, folder, **keywords)

    own_write = RunState.write
    monkeypatch.setattr("priorzero.learning.update_world_model", fail)
    monkeypatch.setattr(RunState, "write", write)
    with toy_games(), pytest.raises(UserError, match=r"out of GPU memory \(CUDA out of .*train\.batch_size=4"):
        train(short_settings(tmp_path, NO_LLM))
    assert newest_checkpoint(tmp_path / "run").manifest["counters"]["iteration"] >= 1


def test_run_training_runs_in_a_thread(tmp_path):
    with toy_games(), ThreadPoolExecutor(1) as executor:
        settings = short_settings(tmp_path, NO_LLM, {"run": {"max_iter": 1}})
        summary = executor.submit(train, settings).result()
    assert summary.rows["iterations"] == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run": {"env_id": ""}}, "run.env_id is empty"),
        ({"run": {"env_id": "toy1,toy2,toy3"}}, "env.collector_env_num=2 must be a multiple of the 3 games"),
        ({"eval": {"unseen": "toy"}}, "eval.unseen contains games of run.env_id: toy;"),
    ],
)
def test_train_refuses_games_that_do_not_fit_and_writes_nothing(tmp_path, changes, words):
    with toy_games(), pytest.raises(UserError, match=words):
        train(short_settings(tmp_path, changes))
    assert not list(tmp_path.iterdir())
