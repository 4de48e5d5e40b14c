"""The settings: their defaults, types and bounds, and the messages about wrong values."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from priorzero.config import PRESETS, differences, parse_assignments, resolve_settings, settings_page
from priorzero.settings import Settings
from priorzero.types import UserError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ("run.max_iter=-1", "run.max_iter=-1 must be a whole number, at least 1"),
        ("run.max_iter=many", "run.max_iter=many must be a whole number, at least 1"),
        ("run.max_iter=true", "run.max_iter=true must be a whole number, at least 1"),
        ("run.max_iter=2.5", "run.max_iter=2.5 must be a whole number"),
        ("run.max_iter=", "run.max_iter='' must be a whole number"),
        ("llm.learning_rate=.nan", "llm.learning_rate=.nan must be a finite number greater than 0"),
        ("llm.learning_rate=.inf", "must be a finite number"),
        ("llm.learning_rate=fast", "llm.learning_rate=fast must be a finite number greater than 0"),
        ("llm.learning_rate=true", "llm.learning_rate=true must be a finite number"),
        ("llm.learning_rate=1" + "0" * 400, "must be a finite number"),
        ("llm.use_lora=1", "llm.use_lora=1 must be true or false"),
        ("run.seed=2000000001", "must be a whole number between 0 and 2000000000"),
        ("run.max_iter=9223372036854775808", "must be a whole number, at least 1 (it needs more than 64 bits)"),
        ("prior.alpha=1.5", "prior.alpha=1.5 must be auto, or a number between 0 and 1"),
        ("prior.alpha=learned", "prior.alpha=learned must be auto, or a number between 0 and 1"),
        ("env.valid_actions=quick", "env.valid_actions=quick must be one of exact, fast"),
        ("world_model.embed_dim=1000000", "must be a whole number between 8 and 16384"),
        ("world_model.num_unroll_steps=2", "must be a whole number, at least 4"),
        ("env.max_episode_steps=1", "env.max_episode_steps=1 must be auto, a whole number of at least 2, or one for"),
        ("env.max_episode_steps=2.5", "env.max_episode_steps=2.5 must be auto"),
        ("env.max_episode_steps=long", "env.max_episode_steps=long must be auto"),
        ("env.max_episode_steps=true", "env.max_episode_steps=true must be auto"),
        ("env.max_episode_steps=zork1=1", "('zork1=1' is not NAME=NUMBER with a number of at least 2)"),
        ("env.max_episode_steps=zork1=400,100", "('100' is not NAME=NUMBER"),
        ("env.max_episode_steps=zork1=9,zork1=8", "(zork1 occurs twice)"),
        ("env.action_space_size=1", "env.action_space_size=1 must be auto, or a whole number between 2 and 100000"),
        ("env.action_space_size=100001", "must be auto, or a whole number between 2 and 100000"),
        ("env.action_space_size=", "env.action_space_size='' must be auto"),
        ("eval.modes=everything", "must be one or more of world_model, world_model_with_prior, prior, prior_sampled"),
        ("eval.modes=[]", "must be one or more of world_model"),
        # Settings that do not go together.
        ("world_model.num_heads=3", "world_model.embed_dim=512 must be a multiple of 8 and of world_model.num_heads=3"),
        ("world_model.context_length=7", "world_model.context_length=7 must be even and at most twice"),
        ("llm.micro_batch_size=6", "llm.micro_batch_size=6 must divide llm.batch_size=32; try 4 or 8"),
        ("llm.batch_size=512", "llm.batch_size=512 must be at most train.batch_size * llm.run_length = 256"),
        ("llm.use_lora=true llm.trained_layers=2", "llm.trained_layers=2 needs llm.use_lora=false"),
        ("cluster.num_learners=3", "cluster.num_learners=3 must divide llm.batch_size=32"),
        ("replay.buffer_size=100", "must be at least train.batch_size + replay.segment_length = 264"),
        ("prior.use_cot=true llm.prompt_layout=walkthrough", "prior.use_cot=true needs llm.prompt_layout=transcript"),
        ("llm.rft_clip=0.2 prior.mode=rank", "llm.rft_clip=0.2 needs prior.mode=score"),
        ("llm.imitation_share=0.1 llm.enable_sft=false", "llm.imitation_share=0.1 needs llm.enable_sft=true"),
        ("llm.imitation_share=0.1 llm.llm_loss_weight=0", "and a positive llm.llm_loss_weight: SFT"),
        ("llm.objective=actions prior.mode=rank", "llm.objective=actions needs prior.mode=score"),
        ("llm.prompt_layout=walkthrough prior.mode=rank", "llm.prompt_layout=walkthrough needs prior.mode=score"),
        ("prior.enabled=false", "need an LLM, but prior.enabled is false; type --set eval.modes=world_model"),
        ("vllm.sync_every=3", "vllm.max_staleness=1 must be at least 2: with vllm.sync_every=3"),
        ("vllm.sleep=true train.overlap=always", "type --set train.overlap=never"),
        ("vllm.max_model_len=500", "must be at least llm.prompt_max_len + llm.generate_max_len = 2304, or 0"),
    ],
)  # fmt: skip
def test_settings_that_are_wrong_are_refused_with_what_is_allowed(assignments, message):
    with pytest.raises(UserError) as caught:
        resolve_settings(parse_assignments(assignments.split(" ")))
    assert message in str(caught.value)


def test_settings_that_are_not_text_are_refused():
    for value in ([1], {"a": 1}, True):
        with pytest.raises(UserError, match="must be text"):
            resolve_settings({"llm": {"path": value}})


@pytest.mark.parametrize(
    "assignments", ["vllm.sync_every=3 vllm.max_staleness=2", "train.overlap=always", "prior.use_cot=true"]
)
def test_settings_that_go_together_are_accepted(assignments):
    layer = parse_assignments(assignments.split(" "))
    assert differences(resolve_settings(layer)) == layer


def test_settings_values_are_converted_only_where_nothing_is_lost():
    layer = {
        "run": {"max_iter": 8.0, "exp_name": 2024},
        "search": {"temperature": 2},
        "eval": {"modes": "prior, random"},
    }
    settings = resolve_settings(layer)
    assert settings.run.max_iter == 8 and isinstance(settings.run.max_iter, int)
    assert settings.search.temperature == 2.0 and isinstance(settings.search.temperature, float)
    assert settings.run.exp_name == "2024" and settings.eval.modes == ["prior", "random"]
    assert resolve_settings({"eval": {"unseen": None}}).eval.unseen == ""


def test_settings_of_the_quick_test_train_both_models_and_compare():
    q = resolve_settings(PRESETS["quick_test"])
    assert q.llm.enable_sft and q.llm.enable_rft and q.eval.at_start and q.prior.enabled
    assert set(q.eval.modes) == {"world_model", "world_model_with_prior", "prior"}
    assert q.llm.micro_batch_size % q.llm.run_length == 0  # a run is computed in one forward pass
    assert q.run.env_id not in [f"textworld:simple?seed={seed}" for seed in range(101, 105)]  # for choosing settings


def test_settings_are_all_read_somewhere():
    """A setting that nothing reads would be accepted and ignored."""
    read = {
        node.attr
        for path in (ROOT / "priorzero").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    unread = [
        f"{group}.{key}" for group, values in Settings().model_dump().items() for key in values if key not in read
    ]
    assert unread == []


def test_settings_page_is_up_to_date():
    page = ROOT / "docs" / "settings.md"
    assert page.is_file() and page.read_text() == settings_page(), (
        "docs/settings.md is not what priorzero/settings.py says; type "
        "python -m priorzero.config --markdown > docs/settings.md"
    )
