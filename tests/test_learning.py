"""It learns: each part that should make the agent better does, with real games and models. ``make learn-check``."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import make_settings
from easydict import EasyDict

from priorzero.engines import PriorMaker, TransformersEngine
from priorzero.envs import make_game, resolve_game
from priorzero.llm_learner import LLMLearner
from priorzero.models import LanguageModel, load_language_model
from priorzero.policy import prompt_style
from priorzero.prompts import render_prompt
from priorzero.train import run_training
from priorzero.types import ActionPrior, GameState, HistoryStep, PriorRequest, StepRecord

pytestmark = [pytest.mark.slow, pytest.mark.learn]

GAME = "textworld:simple?seed=7"
# How that game is won. The LLM's tests take it for what a good search would find.
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
    """Three rooms to the coin, with dead ends."""
    summary = train(
        tmp_path,
        {
            "run": {"env_id": "textworld:coin-collector?level=3&seed=2", "max_env_step": 300},
            "prior": {"enabled": False},
            "eval": {"modes": ["world_model", "random"], "episodes": 1},
        },
    )
    lines = (summary.folder / "episodes.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line)["steps"] for line in lines]
    print("commands an episode:", steps)
    assert np.mean(steps[:20]) > 6 and np.mean(steps[-20:]) < 4.5
    assert summary.evaluations["world_model"].wins == 1


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


@dataclass(frozen=True)
class Question:
    """A state of the walkthrough, and the place of the right command among its valid actions."""

    state: GameState
    request: PriorRequest
    right: int


@pytest.fixture
def llm() -> LanguageModel:
    """A copy to be trained."""
    return load_language_model(SETTINGS.llm, device=torch.device("cpu"))


def walk(llm: LanguageModel) -> list[Question]:
    game = make_game(
        resolve_game(GAME), seed=0, max_episode_steps=30, look_and_inventory=True, drop_inert_commands=True
    )
    state, history, questions = game.reset(), [], []
    for command in WALKTHROUGH:
        prompt = render_prompt(state, history, style=STYLE, tokenizer=llm.tokenizer)
        right = state.valid_actions.index(command)
        questions.append(Question(state, PriorRequest(prompt.text, state.valid_actions), right))
        following, reward = game.step(command)
        history.append(HistoryStep(state.feedback, command, reward))
        state = following
    assert state.won
    game.close()
    return questions


def priors(llm: LanguageModel, questions: list[Question]) -> list[ActionPrior]:
    engine = TransformersEngine(PriorMaker(llm, STYLE), rows_per_forward=1, prompt_cache_tokens=4096)
    return asyncio.run(engine.priors([question.request for question in questions]))


def decision(question: Question, prior: ActionPrior, *, chosen: int, visit_counts: np.ndarray) -> StepRecord:
    return StepRecord(
        state=question.state,
        features=np.zeros(1),
        action_indices=np.arange(len(visit_counts)),
        prompt=question.request.prompt,
        prior=prior,
        visit_counts=visit_counts,
        root_value=0.0,
        predicted_value=0.0,
        chosen=chosen,
        reward=float(chosen == question.right),
        done=False,
        episode=0,
        step=0,
    )


def right_probs(questions: list[Question], answers: list[ActionPrior]) -> np.ndarray:
    return np.exp([answer.logprobs[q.right] for q, answer in zip(questions, answers, strict=True)])


def learner(llm: LanguageModel, **changes: bool | float) -> LLMLearner:
    return LLMLearner(llm, EasyDict({**SETTINGS.llm, **changes}), style=STYLE)


def test_sft_makes_the_llm_say_what_the_search_visits(llm):
    """Visits as of a good search, most of them but not all on the right command; afterwards the LLM does."""
    questions = walk(llm)[2:6]
    before = priors(llm, questions)
    made, rng = learner(llm, enable_rft=False), np.random.default_rng(0)
    for _ in range(3):
        records = []
        for question, prior in zip(questions, before, strict=True):
            counts = rng.multinomial(4, np.full(len(prior.logprobs), 1 / len(prior.logprobs)))
            counts[question.right] += 12
            records.append(decision(question, prior, chosen=int(rng.integers(len(counts))), visit_counts=counts))
        made.learn(made.samples(records, np.zeros(len(records)))[0])
    was, becomes = right_probs(questions, before), right_probs(questions, priors(llm, questions))
    print("probability of the right command:", was.round(2), becomes.round(2))
    assert becomes.mean() > was.mean() + 0.2


def test_rft_makes_the_llm_say_what_is_rewarded(llm):
    """In each state the right command was played once, and rewarded, and the LLM's favourite wrong one once."""
    walked = walk(llm)
    questions = [walked[k] for k in (3, 6, 7)]
    before = priors(llm, questions)
    made = learner(llm, enable_sft=False)
    for _ in range(3):
        records = []
        for question, prior in zip(questions, before, strict=True):
            evenly = np.ones(len(prior.logprobs), dtype=np.int64)  # the visits say nothing
            wrong = next(int(k) for k in np.argsort(-prior.logprobs) if k != question.right)
            records += [decision(question, prior, chosen=k, visit_counts=evenly) for k in (question.right, wrong)]
        made.learn(made.samples(records, np.array([r.reward for r in records]))[0])
    was, becomes = right_probs(questions, before), right_probs(questions, priors(llm, questions))
    print("probability of the right command:", was.round(2), becomes.round(2))
    assert becomes.mean() > was.mean() + 0.2
