"""The whole loop on a real game with a real language model, and the parts that tell about it."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from priorzero.runs.metrics import MetricsWriter, Progress, count_moved, fingerprint

from priorzero.config import read_config_file, resolve_settings
from priorzero.llm.engines.make import choose_engine
from priorzero.llm.models import load_language_model
from priorzero.play.action_vocabulary import make_action_indexer
from priorzero.policy import PriorZeroPolicy
from priorzero.runs.checkpoint import load_world_model, read_checkpoint
from priorzero.train import run_training
from priorzero.types import UserError
from tests.helpers.models import make_settings, make_tiny_llm
from tests.helpers.runs import read_events

SMALL = {
    "run": {"max_iter": 4, "num_threads": 2, "checkpoint_every": 2},
    "env": {"max_episode_steps": 6},
    "search": {"num_simulations": 4},
    "train": {"collect_env_steps": 12, "batch_size": 8, "update_per_collect": 2},
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


def train(tmp_path, *layers):
    threads = torch.get_num_threads()
    try:
        return run_training(make_settings(SMALL, {"run": {"output_dir": str(tmp_path)}}, *layers))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_run_from_end_to_end(tmp_path):
    summary = train(tmp_path)
    scalars = read_events(summary.folder)
    for tag in TAGS:
        assert scalars.get(tag), f"{tag} is missing"
        assert all(math.isfinite(value) for value in scalars[tag])
    assert summary.rows["environment steps"] == 48 and summary.rows["LLM updates"] == 4
    for name in ("world model", "LLM"):
        moved, _, of = summary.rows[f"{name} tensors moved"].split()
        assert moved == of and int(of) > 10
    assert set(summary.evaluations) == {"world_model", "world_model_with_prior", "prior"}

    logs = {path.name: path.read_text() for path in (summary.folder / "log").iterdir()}
    assert "latency_mean_s" in logs["llm_prior.log"] and "decisions" in logs["segments.log"]
    assert "iteration 4/4" in logs["run.log"] and "done:" in logs["run.log"]

    # The configuration that was saved gives the same settings again.
    saved = resolve_settings(read_config_file(summary.folder / "config.yaml"))
    assert saved.search.num_simulations == 4 and saved.run.exp_name == ""

    # Checkpoints: two, whole, loadable, and different from one another.
    first, last = (summary.folder / "checkpoints" / f"iteration_{n}" for n in (2, 4))
    assert sorted(p.name for p in (summary.folder / "checkpoints").iterdir()) == ["iteration_2", "iteration_4"]
    llms = [
        load_language_model(make_settings({"llm": {"path": str(c / "llm")}}).llm, device=torch.device("cpu"))
        for c in (first, last)
    ]
    prints = [fingerprint(dict(llm.model.named_parameters())) for llm in llms]
    assert count_moved(*prints) > 200
    settings = make_settings(SMALL)
    policy = PriorZeroPolicy(settings, feature_size=384 * 3 + 128, device="cpu", llm=None)
    before = fingerprint(dict(policy.trained_world_model_parameters()))
    indexer = make_action_indexer("vocabulary", 256)
    load_world_model(last, policy=policy, indexer=indexer)
    assert count_moved(before, fingerprint(dict(policy.trained_world_model_parameters()))) == len(before)
    assert indexer.num_used > 3
    assert read_checkpoint(last).manifest["counters"] == {
        "iteration": 4, "env_step": 48, "train_iter": 8, "llm_version": 4,
    }  # fmt: skip

    with pytest.raises(UserError, match="exists and is left as it is"):
        train(tmp_path, {"run": {"exp_name": summary.folder.name}})


@pytest.mark.slow
def test_without_an_llm(tmp_path):
    summary = train(tmp_path, {"prior": {"enabled": False}, "eval": {"modes": ["world_model"]}})
    scalars = read_events(summary.folder)
    assert "train/wm_total_loss" in scalars and not [tag for tag in scalars if "llm" in tag or tag.startswith("prior/")]
    assert not (summary.folder / "checkpoints" / "iteration_4" / "llm").exists()


@pytest.mark.slow
def test_one_seed_one_run(tmp_path):
    """Everything but the times repeats itself."""

    def figures(name):
        plain = {"prior": {"enabled": False}, "eval": {"modes": ["world_model"]}, "run": {"exp_name": name}}
        metrics = train(tmp_path, plain).metrics
        return {tag: value for tag, value in metrics.items() if not tag.startswith("time/")}

    first, again = figures("a"), figures("b")
    assert first == again and len(first) > 20


@pytest.mark.slow
def test_ranking_with_adapters(tmp_path):
    summary = train(
        tmp_path,
        {
            "run": {"max_iter": 2},
            "prior": {"mode": "rank"},
            "llm": {"use_lora": True, "generate_max_len": 24, "history_length": 1},
            "eval": {"modes": ["world_model"]},
        },
    )
    moved, _, of = summary.rows["LLM tensors moved"].split()
    assert int(of) == 2 * 210 and int(moved) > 0
    checkpoint = summary.folder / "checkpoints" / "iteration_2" / "llm"
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 20e6


@pytest.mark.slow
def test_each_model_learns_when_it_is_its_turn(tmp_path, smollm2):
    """The LLM also in iterations in which the world model does not: it has a draw of its own then."""
    make_tiny_llm(smollm2.tokenizer).save(tmp_path / "llm")
    settings = make_settings(
        {
            "run": {"max_iter": 12, "num_threads": 1, "output_dir": str(tmp_path), "exp_name": "run"},
            "env": {"max_episode_steps": 5},
            "search": {"num_simulations": 4},
            "world_model": {"embed_dim": 64, "num_heads": 2},
            "train": {"collect_env_steps": 4, "batch_size": 8, "update_per_collect": 1, "update_every": 2},
            "llm": {"path": str(tmp_path / "llm"), "batch_size": 2, "micro_batch_size": 1, "update_every": 3},
            "replay": {"segment_length": 5},
            "eval": {"every": 1000, "modes": ["world_model"]},
        }
    )
    summary = run_training(settings)
    stored = read_events(summary.folder)["buffer/decisions"]
    ready = [n for n, decisions in enumerate(stored, start=1) if decisions >= 8]
    assert summary.rows["world-model updates"] == sum(n % 2 == 0 for n in ready) > 2
    assert summary.rows["LLM updates"] == sum(n % 3 == 0 for n in ready) > 1
    assert any(n % 3 == 0 and n % 2 for n in ready)


def test_values_that_are_not_finite_are_counted_and_left_out(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write({"a": 1.0, "b": math.nan, "c": math.inf}, step=1)
    writer.close()
    assert writer.num_not_finite == 2 and writer.last == {"a": 1.0}
    assert read_events(tmp_path) == {"a": [1.0]}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_is_one_line():
    terminal = Terminal()
    progress = Progress(max_iter=10, max_env_step=1000, every=2, terminal=terminal)
    for iteration in range(1, 5):
        progress.show(iteration=iteration, env_step=20 * iteration, episode_return=None, loss=1.5)
    text = terminal.getvalue()
    assert text.count("\r") == 2 and "\n" not in text
    assert "iteration 4/10" in text and "env steps 80" in text and "return -" in text and "loss 1.500" in text
    progress.end()
    assert terminal.getvalue().endswith("\n")


def test_fingerprints_see_a_change_anywhere():
    tensors = {"w": torch.arange(6.0).reshape(2, 3), "v": torch.ones(3)}
    before = fingerprint(tensors)
    assert count_moved(before, fingerprint(tensors)) == 0
    swapped = {"w": tensors["w"].flip(0), "v": tensors["v"]}
    assert count_moved(before, fingerprint(swapped)) == 1


def test_the_engine_that_is_used(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    found = {"vllm": object()}
    monkeypatch.setattr("importlib.util.find_spec", found.get)
    assert choose_engine("auto", device=cpu) == "transformers" and choose_engine("auto", device=gpu) == "vllm"
    assert choose_engine("vllm", device=cpu) == "vllm" and choose_engine("transformers", device=gpu) == "transformers"
    found.clear()
    assert choose_engine("auto", device=cpu) == "transformers"
    with pytest.raises(UserError, match=r"prior\.engine=auto: vLLM is not installed; type pip .*gpu\.txt, or --engine"):
        choose_engine("auto", device=gpu)
    with pytest.raises(UserError, match=r"type scripts/set_up\.sh test"):
        choose_engine("vllm", device=cpu)


@pytest.mark.slow
def test_overlap_without_an_llm_learns_as_often(tmp_path):
    """The same updates, though collection goes on beside them; the timeline shows it."""
    plain = {"prior": {"enabled": False}, "eval": {"modes": ["world_model"]}}
    # 24 steps of 4 games: the faster group ends its episodes of 6, so there is enough to learn from at once.
    more = {"run": {"max_iter": 8}, "env": {"collector_env_num": 4}, "train": {"collect_env_steps": 24}}
    apart = train(tmp_path, plain, more)
    together = train(tmp_path, plain, more, {"train": {"overlap": "always"}})
    assert together.rows["world-model updates"] == apart.rows["world-model updates"] == 16
    assert together.rows["world model tensors moved"] == apart.rows["world model tensors moved"]
    assert apart.metrics["time/overlap_share"] < 0.01 < together.metrics["time/overlap_share"]
    assert (apart.folder / "trace.json").stat().st_size > 1000
    saved = read_checkpoint(together.folder / "checkpoints" / "iteration_8").manifest["counters"]
    assert saved["train_iter"] == 16


@pytest.mark.slow
def test_several_games_are_trained_on_and_others_evaluated_on(tmp_path):
    summary = train(
        tmp_path,
        {
            "run": {"env_id": "textworld:coin-collector?level=1&seed=1,textworld:coin-collector?level=1&seed=2"},
            "prior": {"enabled": False},
            "eval": {"modes": ["world_model", "random"], "unseen": "textworld:coin-collector?level=1&seed=3"},
        },
    )
    assert summary.folder.name.startswith("textworld-coin-collector-seed1_and_1_more_seed0_")
    assert set(summary.evaluations) == {"world_model", "random", "unseen_world_model", "unseen_random"}
    assert len(summary.evaluations["random"].scores) == 2 * len(summary.evaluations["unseen_random"].scores) == 2
    lines = [json.loads(line) for line in (summary.folder / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["game"], line["mode"], line["unseen"]) for line in lines] == [
        (f"textworld-coin-collector-seed{n}", mode, n == 3)
        for games in ((1, 2), (3,))
        for mode in ("world_model", "random")
        for n in games
    ]
    assert {line["env_step"] for line in lines} == {48}
    episodes = [json.loads(line) for line in (summary.folder / "episodes.jsonl").read_text().splitlines()]
    assert len(episodes) == summary.rows["episodes finished"] > 0
    assert [e["env_step"] for e in episodes] == sorted(e["env_step"] for e in episodes)
    assert read_events(summary.folder)["evaluator_step/unseen_random_score_mean"]


@pytest.mark.slow
def test_no_environment_steps_only_evaluate(tmp_path):
    summary = train(tmp_path, {"run": {"max_env_step": 0}, "prior": {"enabled": False}, "eval": {"modes": ["random"]}})
    assert summary.rows["environment steps"] == 0 and list(summary.evaluations) == ["random"]
    assert not (summary.folder / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run": {"env_id": ""}}, "run.env_id is empty"),
        (
            {"run": {"env_id": "textworld:simple?seed=7,textworld:simple?seed=1,textworld:coin-collector"}},
            "env.collector_env_num=2 must be a multiple of the 3 games",
        ),
        ({"eval": {"unseen": "textworld:simple?seed=7"}}, "textworld:simple[?]seed=7 is trained on"),
    ],
)
def test_games_that_do_not_fit_are_refused(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        train(tmp_path, changes)
    assert not list(tmp_path.iterdir())
