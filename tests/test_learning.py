"""Each part that should make the agent better does so, with real games and models (``make learn-check``)."""

from __future__ import annotations

import json

import check_world_model
import numpy as np
import pytest
import torch
from compare_llm_losses import good_visit_counts, make_record
from walkthroughs import WalkthroughState, compute_priors, correct_logprobs, walkthrough_states

from priorzero import pretrain
from priorzero.llm.engines import PriorBuilder
from priorzero.llm.fine_tuning import LLMLearner
from priorzero.llm.models import LanguageModel, load_language_model
from priorzero.llm.prompts import prompt_style
from priorzero.pretraining.collect import collect
from priorzero.pretraining.evaluation import group_means
from priorzero.pretraining.games import PretrainingGame
from priorzero.train import run_training
from priorzero.types import ActionPrior, StepRecord
from tests.helpers.models import make_settings
from tests.helpers.runs import lines

pytestmark = [pytest.mark.slow, pytest.mark.learn]

GAME = "textworld:simple?seed=7"
COIN_GAME = "textworld:coin-collector?level=3&seed=2"  # the coin is three rooms away; there are dead ends
PROMPT = {"prompt_layout": "walkthrough", "show_observation": False, "history_length": 20}
UNIZERO = {
    "run": {"checkpoint_every": 0, "log_every": 10, "max_iter": 1000},
    "env": {"max_episode_steps": 40},
    "world_model": {"context_length": 4, "num_unroll_steps": 8, "dropout": 0.0, "policy_entropy_weight": 0.05},
    "search": {
        "num_simulations": 16,
        "root_dirichlet_alpha": 1.0,
        "root_noise_weight": 0.4,
        "discount_factor": 0.93,
    },
    "train": {"update_per_collect": 15, "learning_rate": 5e-4, "reward_scale": 3.0},
    "replay": {"segment_length": 100},
}


def train(tmp_path, **changes):
    return run_training(make_settings(UNIZERO, {"run": {"output_dir": str(tmp_path)}}, changes))


def episode_lengths(summary) -> list[int]:
    lengths = [line["steps"] for line in lines(summary.folder, "episodes.jsonl")]
    print("actions of each episode:", lengths)
    return lengths


def test_world_model_learns_the_reward_and_the_shortest_path_to_it(tmp_path):
    """With Dirichlet noise, so that what improves is the world model, and not Go-Explore's archive."""
    summary = train(
        tmp_path,
        run={"env_id": COIN_GAME, "max_env_step": 300},
        prior={"enabled": False},
        search={"exploration": "dirichlet"},
        eval={"modes": ["world_model", "random"], "episodes": 1},
    )
    lengths = episode_lengths(summary)
    assert np.mean(lengths[:20]) > 6 and np.mean(lengths[-20:]) < 4.5
    assert summary.evaluations["world_model"].wins == 1
    figures = check_world_model.check(summary.folder, env_steps=60, seed=1)
    print("predicted rewards:", figures)
    assert figures["decisions_that_gained_points"] >= 8 and figures["of_these_predicted"] > 0.8
    assert figures["predicted_of_the_others"] < 0.1


def test_go_explore_returns_to_the_reward_after_few_episodes(tmp_path):
    """In the test above about 30 episodes are needed; with Go-Explore's archive 5 are enough."""
    summary = train(
        tmp_path,
        run={"env_id": COIN_GAME, "max_env_step": 100},
        prior={"enabled": False},
        eval={"modes": ["world_model"], "episodes": 1},
    )
    assert np.mean(episode_lengths(summary)[5:20]) < 4.5


def test_pretraining_on_generated_games_improves_the_prior_in_others(tmp_path):
    """Less than 50 decisions of four games, each learnt twice."""
    games = [PretrainingGame(f"textworld:simple?seed={seed}&goal=brief", "train") for seed in range(101, 105)]
    held_out = [PretrainingGame(f"textworld:simple?seed={seed}&goal=brief", "held_out") for seed in (7, 8)]
    collect([*games, *held_out], tmp_path / "data")
    arguments = ["--data", str(tmp_path / "data"), "--no_collect", "--out", str(tmp_path / "out"), "--device", "cpu"]
    arguments += ["--epochs", "2", "--evaluations", "0", "--set", "llm.batch_size=8", "--set", "llm.micro_batch_size=4"]
    assert pretrain.main(arguments) == 0
    first, last = json.loads((tmp_path / "out" / "figures.json").read_text())["evaluations"]
    before, after = (group_means(entry["games"])["TextWorld"] for entry in (first, last))
    print("before:", before, "after:", after)
    assert after["logprob"] > before["logprob"] + 0.2 and after["place"] < before["place"]
    assert after["logprob"] > after["uniform_logprob"] + 0.3


def test_prior_improves_a_search_with_an_untrained_world_model(tmp_path):
    """Nothing is trained, so the difference between the two scores is due to the LLM."""
    summary = train(
        tmp_path,
        run={"env_id": GAME, "max_env_step": 0},
        llm=PROMPT,
        eval={"modes": ["world_model", "world_model_with_prior"], "episodes": 1},
    )
    print(summary.rows)
    alone, with_prior = (summary.evaluations[mode].mean_score for mode in ("world_model", "world_model_with_prior"))
    assert with_prior >= alone + 2


# ---- the language model's losses, in some states of the solution of GAME ----

SETTINGS = make_settings({"llm": {**PROMPT, "learning_rate": 1e-5, "batch_size": 8, "micro_batch_size": 4}})
STYLE = prompt_style(SETTINGS)


@pytest.fixture
def llm() -> LanguageModel:
    """A language model that the test may train."""
    return load_language_model(SETTINGS.llm, device=torch.device("cpu"))


def make_learner(llm: LanguageModel, **changes) -> LLMLearner:
    return LLMLearner(llm, SETTINGS.llm.model_copy(update=changes), style=STYLE)


def solution_states(llm: LanguageModel, *positions: int) -> tuple[list[WalkthroughState], list[ActionPrior]]:
    """States of the game's solution, by the number of actions before them, and the priors in them."""
    states = walkthrough_states(GAME, style=STYLE, tokenizer=llm.tokenizer)
    assert len(states) == 8
    chosen = [states[k] for k in positions]
    return chosen, compute_priors(PriorBuilder(llm, STYLE), chosen)


def gain(llm: LanguageModel, states: list[WalkthroughState], before: list[ActionPrior]) -> float:
    """Mean gain in the probability of the correct action."""
    after = compute_priors(PriorBuilder(llm, STYLE), states)
    old, new = (np.exp(correct_logprobs(states, priors)) for priors in (before, after))
    print("probability of the correct action:", old.round(2), new.round(2))
    return float((new - old).mean())


def update(learner: LLMLearner, records: list[StepRecord], rewards: list[float]) -> None:
    samples, skipped = learner.samples(records, np.array(rewards))
    assert not skipped
    learner.learn(samples)


def test_sft_moves_the_prior_towards_the_visit_counts(llm):
    """The visit counts are those of a good search: most, but not all, are of the correct action."""
    states, before = solution_states(llm, 3, 4, 5)
    learner, rng = make_learner(llm, enable_rft=False), np.random.default_rng(0)
    for _ in range(3):
        records = []
        for state, prior in zip(states, before, strict=True):
            counts = good_visit_counts(state, rng)
            records.append(make_record(state, prior, chosen=int(rng.integers(len(counts))), visit_counts=counts))
        update(learner, records, [0.0] * len(records))
    assert gain(llm, states, before) > 0.2


def test_rft_moves_the_prior_towards_the_rewarded_actions(llm):
    """In each state, the correct action was taken once and rewarded, and the most probable wrong one once."""
    states, before = solution_states(llm, 3, 6)
    learner = make_learner(llm, enable_sft=False)
    records = []
    for state, prior in zip(states, before, strict=True):
        uniform = np.ones(len(prior.logprobs), dtype=np.int64)
        wrong = next(int(k) for k in np.argsort(-prior.logprobs) if k != state.correct)
        records += [make_record(state, prior, chosen=k, visit_counts=uniform) for k in (state.correct, wrong)]
    for _ in range(3):
        update(learner, records, [record.reward for record in records])
    assert gain(llm, states, before) > 0.2
