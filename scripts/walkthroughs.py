"""States along the solutions of generated games, and the language model's priors in them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from priorzero.envs import make_game, resolve_game
from priorzero.llm.engines import PriorBuilder, TransformersEngine
from priorzero.llm.prompts import PromptStyle, render_prompt
from priorzero.types import ActionPrior, GameState, HistoryStep, PriorRequest, UserError


@dataclass(frozen=True)
class WalkthroughState:
    """A state of a solution.

    Attributes:
        state: the state.
        request: the request for a prior in this state.
        correct: position of the solution's command in the valid actions.
    """

    state: GameState
    request: PriorRequest
    correct: int


def solution(game: str) -> list[str]:
    """The commands that win a generated game. TextWorld writes them into a file beside the game."""
    path = resolve_game(game).story.with_suffix(".json")
    commands: list[str] = json.loads(path.read_text(encoding="utf-8"))["metadata"]["walkthrough"]
    return commands


def walkthrough_states(game: str, *, style: PromptStyle, tokenizer: Any) -> list[WalkthroughState]:
    """The states of a game's solution. The history in each prompt is the solution up to there.

    Raises:
        UserError: the solution does not win the game.
    """
    commands = solution(game)
    played = make_game(
        resolve_game(game),
        seed=0,
        max_episode_steps=len(commands) + 1,
        look_and_inventory=True,
        drop_inert_commands=True,
        valid_actions="exact",
    )
    state, history, states = played.reset(), list[HistoryStep](), []
    for command in commands:
        if command not in state.valid_actions:
            continue  # a command that changes nothing
        prompt = render_prompt(state, history, style=style, tokenizer=tokenizer)
        request = PriorRequest(prompt.text, state.valid_actions)
        states.append(WalkthroughState(state, request, state.valid_actions.index(command)))
        next_state, reward = played.step(command)
        history.append(HistoryStep(state.feedback, command, reward, state.place, state.room, state.score))
        state = next_state
    played.close()
    if not state.won:
        raise UserError(f"{game}: TextWorld's solution does not win this game; name another game")
    return states


def compute_priors(builder: PriorBuilder, states: Sequence[WalkthroughState]) -> list[ActionPrior]:
    """The priors of the language model with its present parameters."""
    engine = TransformersEngine(builder, rows_per_forward=1, prompt_cache_tokens=4096)
    return asyncio.run(engine.priors([state.request for state in states]))


def correct_logprobs(states: Sequence[WalkthroughState], priors: Sequence[ActionPrior]) -> np.ndarray:
    """The log-probability of the correct command in each state, ``[n]``."""
    return np.array([prior.logprobs[state.correct] for state, prior in zip(states, priors, strict=True)])
