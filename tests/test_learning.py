"""It learns: each part that should make the agent better does, with real games and models. ``make learn-check``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from easydict import EasyDict

from priorzero.llm.engines import PriorBuilder
from priorzero.llm.fine_tuning import LLMLearner
from priorzero.llm.models import LanguageModel, load_language_model
from priorzero.llm.prompts import prompt_style
from priorzero.train import run_training
from priorzero.types import ActionPrior
from tests.helpers.models import make_settings

sys.path.append(str(Path(__file__).parent.parent / "scripts"))
import check_world_model
from compare_llm_losses import Question, decision, good_visits, priors, questions_of, right_probs

pytestmark = [pytest.mark.slow, pytest.mark.learn]

GAME = "textworld:simple?seed=7"
# How that game is won: what TextWorld wrote down. The LLM's tests take it for what a good search would find.
WALKTHROUGH = (
    "open chest drawer", "take old key from chest drawer", "unlock wooden door with old key", "open wooden door",
    "go east", "open refrigerator", "take apple from refrigerator", "put apple on stove",
)  # fmt: skip
SETTINGS = make_settings(
    {
        "llm": {
            "prompt_layout": "walkthrough", "show_observation": False, "history_length": 20, "learning_rate": 1e-5,
            "batch_size": 8, "micro_batch_size": 4,
        }
    }
)  # fmt: skip
STYLE = prompt_style(SETTINGS)


UNIZERO = {
    "run": {"checkpoint_every": 0, "log_every": 10},
    "env": {"max_episode_steps": 40},
    "world_model": {
        "context_length": 4, "num_unroll_steps": 8, "dropout": 0.0, "policy_entropy_weight": 0.05,
    },
    "search": {
        "num_simulations": 16, "root_dirichlet_alpha": 1.0, "root_noise_weight": 0.4, "discount_factor": 0.93,
    },
    "train": {"update_per_collect": 15, "learning_rate": 5e-4, "reward_scale": 3.0},
    "replay": {"segment_length": 100},
}  # fmt: skip


def train(tmp_path, *layers):
    return run_training(make_settings(UNIZERO, {"run": {"output_dir": str(tmp_path), "max_iter": 1000}}, *layers))


def test_unizero_finds_the_coin_and_the_short_way_to_it(tmp_path):
    """Three rooms to the coin, with dead ends; by what the world model learns, not by the run's memory of ways."""
    summary = train(
        tmp_path,
        {
            "run": {"env_id": "textworld:coin-collector?level=3&seed=2", "max_env_step": 300},
            "prior": {"enabled": False},
            "search": {"return_first": False},
            "eval": {"modes": ["world_model", "random"], "episodes": 1},
        },
    )
    lines = (summary.folder / "episodes.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line)["steps"] for line in lines]
    print("commands an episode:", steps)
    assert np.mean(steps[:20]) > 6 and np.mean(steps[-20:]) < 4.5
    assert summary.evaluations["world_model"].wins == 1
    known = check_world_model.check(summary.folder, env_steps=60, seed=1)
    print("what it expects:", known)
    assert known["decisions_that_earned"] >= 8 and known["of_these_expected"] > 0.8
    assert known["expected_of_the_others"] < 0.1


def test_what_was_found_once_is_found_again_by_going_back(tmp_path):
    """The same game; what takes the test above some 30 episodes takes a handful with the memory of ways."""
    summary = train(
        tmp_path,
        {
            "run": {"env_id": "textworld:coin-collector?level=3&seed=2", "max_env_step": 100},
            "prior": {"enabled": False},
            "eval": {"modes": ["world_model"], "episodes": 1},
        },
    )
    lines = (summary.folder / "episodes.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line)["steps"] for line in lines]
    print("commands an episode:", steps)
    assert np.mean(steps[5:20]) < 4.5


def test_the_prior_leads_a_search_that_knows_nothing(tmp_path):
    """Nothing is trained: what the agent scores beyond the world model alone is the LLM's doing."""
    summary = train(
        tmp_path,
        {
            "run": {"env_id": GAME, "max_env_step": 0},
            "llm": {key: SETTINGS.llm[key] for key in ("prompt_layout", "show_observation", "history_length")},
            "eval": {"modes": ["world_model", "world_model_with_prior"], "episodes": 1},
        },
    )
    print(summary.rows)
    alone, guided = (summary.evaluations[mode].mean_score for mode in ("world_model", "world_model_with_prior"))
    assert guided >= alone + 2


@pytest.fixture
def llm() -> LanguageModel:
    """A copy to be trained."""
    return load_language_model(SETTINGS.llm, device=torch.device("cpu"))


def walk(llm: LanguageModel) -> list[Question]:
    questions = questions_of(GAME, style=STYLE, tokenizer=llm.tokenizer)
    assert tuple(question.state.valid_actions[question.right] for question in questions) == WALKTHROUGH
    return questions


def answers_of(llm: LanguageModel, questions: list[Question]) -> list[ActionPrior]:
    return priors(PriorBuilder(llm, STYLE), questions)


def learner(llm: LanguageModel, **changes: bool | float) -> LLMLearner:
    return LLMLearner(llm, EasyDict({**SETTINGS.llm, **changes}), style=STYLE)


def test_sft_makes_the_llm_say_what_the_search_visits(llm):
    """Visits as of a good search, most of them but not all on the right command; afterwards the LLM does."""
    questions = walk(llm)[2:6]
    before = answers_of(llm, questions)
    made, rng = learner(llm, enable_rft=False), np.random.default_rng(0)
    for _ in range(3):
        records = []
        for question, prior in zip(questions, before, strict=True):
            counts = good_visits(question, rng)
            records.append(decision(question, prior, chosen=int(rng.integers(len(counts))), visit_counts=counts))
        made.learn(made.samples(records, np.zeros(len(records)))[0])
    was, becomes = right_probs(questions, before), right_probs(questions, answers_of(llm, questions))
    print("probability of the right command:", was.round(2), becomes.round(2))
    assert becomes.mean() > was.mean() + 0.2


def test_rft_makes_the_llm_say_what_is_rewarded(llm):
    """In each state the right command was played once, and rewarded, and the LLM's favourite wrong one once."""
    walked = walk(llm)
    questions = [walked[k] for k in (3, 6, 7)]
    before = answers_of(llm, questions)
    made = learner(llm, enable_sft=False)
    for _ in range(3):
        records = []
        for question, prior in zip(questions, before, strict=True):
            evenly = np.ones(len(prior.logprobs), dtype=np.int64)  # the visits say nothing
            wrong = next(int(k) for k in np.argsort(-prior.logprobs) if k != question.right)
            records += [decision(question, prior, chosen=k, visit_counts=evenly) for k in (question.right, wrong)]
        made.learn(made.samples(records, np.array([r.reward for r in records]))[0])
    was, becomes = right_probs(questions, before), right_probs(questions, answers_of(llm, questions))
    print("probability of the right command:", was.round(2), becomes.round(2))
    assert becomes.mean() > was.mean() + 0.2
