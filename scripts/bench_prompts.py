"""What the benchmarks of the language model share: prompts, episodes, lower bounds, one prompt for each action.

Everything runs on the device of the model that is given.
"""

from __future__ import annotations

import numpy as np
import torch
from bench_tools import seconds

from priorzero.envs import make_game, resolve_game
from priorzero.llm.chat_template import render_messages
from priorzero.llm.models import LanguageModel
from priorzero.llm.packing import PromptRow
from priorzero.types import GameState, HistoryStep

GAME = "textworld:simple?seed=7"
VERBS = ("take", "open", "examine", "push")
THINGS = ("brass lantern", "old brown sack", "trap door", "jewel-encrusted egg")
COMMANDS = tuple(f"{verb} the {thing}" for thing in THINGS for verb in VERBS)  # 16
ROOM = (
    "You are standing in an open field west of a white house, with a boarded front door. There is a small mailbox "
    "here. A path leads around the house, and the forest begins not far from it. "
)


def chat_prompt(llm: LanguageModel, text: str) -> str:
    """A chat prompt that asks for the next command after ``text``."""
    messages = [{"role": "user", "content": f"{text}\nWhat is the next command?"}]
    return render_messages(llm.tokenizer, messages)


def numbered_prompt(llm: LanguageModel, *, max_tokens: int, number: int) -> str:
    """A chat prompt whose text has at most ``max_tokens`` tokens. Different numbers give different first words."""
    ids = llm.tokenizer(f"Move {number}. " + ROOM * 40, add_special_tokens=False)["input_ids"][:max_tokens]
    return chat_prompt(llm, llm.tokenizer.decode(ids))


def play_at_random(*, steps: int, seed: int, drop_inert_commands: bool) -> tuple[list[GameState], list[HistoryStep]]:
    """Play an episode of :data:`GAME` at random.

    Args:
        steps: largest length of the episode.
        seed: seed of the actions.
        drop_inert_commands: as ``env.drop_inert_commands``.

    Returns:
        The states in which an action was taken, and the decisions that were taken there.
    """
    game = make_game(
        resolve_game(GAME),
        seed=0,
        max_episode_steps=steps + 1,
        look_and_inventory=True,
        drop_inert_commands=drop_inert_commands,
        valid_actions="exact",
    )
    rng = np.random.default_rng(seed)
    state, states, decisions = game.reset(), list[GameState](), list[HistoryStep]()
    while len(states) < steps and not state.done:
        action = state.valid_actions[rng.integers(len(state.valid_actions))]
        next_state, reward = game.step(action)
        states.append(state)
        decisions.append(HistoryStep(state.feedback, action, reward, state.place, state.room, state.score))
        state = next_state
    game.close()
    return states, decisions


def synthetic_episode(*, steps: int, num_actions: int, number: int) -> tuple[list[GameState], list[HistoryStep]]:
    """An episode without a game. Its texts are about as long as those of a game.

    Args:
        steps: number of decisions.
        num_actions: valid actions of each state, at most ``len(COMMANDS)``.
        number: appears in all texts, so that different episodes have different states.

    Returns:
        The states, and the decisions that were taken there, as from :func:`play_at_random`.
    """
    states, decisions = [], []
    for t in range(steps):
        actions = tuple(COMMANDS[(t + k) % len(COMMANDS)] for k in range(num_actions))
        state = GameState(
            feedback=f"Game {number}, move {t}. " + ROOM,
            valid_actions=actions,
            score=float(t // 3),
            max_score=350.0,
            moves=t,
            look=f"Room {t % 5} of game {number}\n" + ROOM * 2,
            inventory=f"You are carrying {1 + t} coins, a brass lantern and a leaflet.",
        )
        action = actions[t % num_actions]
        states.append(state)
        decisions.append(HistoryStep(state.feedback, action, float(t % 3 == 2), state.place, state.room, state.score))
    return states, decisions


def forward_operations(llm: LanguageModel, *, tokens: int, predictors: int) -> float:
    """Floating point operations of a forward pass in matrix products with the parameters: 2 per parameter and token.

    The input embedding is a table and needs none.

    Args:
        llm: the model.
        tokens: number of tokens that pass through the layers.
        predictors: number of tokens for which the output layer is computed.
    """
    embedding, output = llm.model.get_input_embeddings().weight, llm.model.get_output_embeddings().weight
    all_parameters = sum(p.numel() for p in llm.model.parameters())
    inner = all_parameters - output.numel() - (0 if embedding is output else embedding.numel())
    return 2.0 * (inner * tokens + output.numel() * predictors)


def matmul_rate(size: int = 1536) -> float:
    """Floating point operations a second of one large float32 matrix product on all of torch's threads."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    spent, _ = seconds(lambda: a @ b, repeats=5)
    return 2 * size**3 / spent


@torch.inference_mode()
def logprobs_one_prompt_per_action(llm: LanguageModel, row: PromptRow) -> list[np.ndarray]:
    """The token log-probabilities of each action. The model processes the whole prompt again for every action."""
    result = []
    for completion in row.completions:
        ids = torch.tensor([[*row.prompt_ids, *completion]], device=llm.device)
        with llm.autocast():
            logits = llm.model(input_ids=ids, logits_to_keep=len(completion) + 1, use_cache=False).logits[0, :-1]
        logprobs = torch.log_softmax(logits.float(), -1)[range(len(completion)), completion]
        result.append(logprobs.cpu().numpy())
    return result


def largest_difference(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """The largest difference between the log-probabilities of two results."""
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))
