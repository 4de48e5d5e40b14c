"""Records and protocols that all modules share. This module needs numpy only.

Letters in shapes: ``K`` valid actions of one state, ``A`` size of the action vocabulary, ``F`` feature size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypedDict

import numpy as np

# Plain data: tensors, numbers, texts, lists and dicts. Checkpoints contain nothing else, so that
# ``torch.load(weights_only=True)`` reads them and no code in a file is ever run.
Plain = dict[str, Any]

Place = tuple[str, ...]  # see GameState.place

# How the valid actions of Jericho games are found; see GameArguments.
ValidActionsMode = Literal["exact", "fast"]


class UserError(Exception):
    """An error that the user can correct. The message says what was given, what is allowed and what to type.

    The command line prints the message without a stack trace and exits with code 2.
    """


class NonFiniteError(UserError):
    """Something in an update is NaN or infinite. The update was not applied, and the parameters are unchanged."""


class GameWorkerError(RuntimeError):
    """A game's worker process exceeded its time limit, crashed or replied with an error."""


class GameTimeoutError(GameWorkerError):
    """A game's worker process exceeded its time limit."""


class EngineError(RuntimeError):
    """The prior engine cannot be used for the rest of the run, or does not serve the parameters that it was given."""


class ProcessError(RuntimeError):
    """A process of a run on a cluster died, or did not reply in time."""


class PromptTooLongError(ValueError):
    """A prompt and its completions do not fit into the language model."""


@dataclass(frozen=True, slots=True)
class GameState:
    """The state of a game as the player sees it.

    Attributes:
        feedback: the game's reply to the last command.
        valid_actions: the valid commands, without duplicates, in a reproducible order. Empty only if ``done``.
        score: points so far.
        max_score: the largest possible score; 0 if the game does not say.
        moves: number of commands in the episode so far.
        done: the episode has ended: won, lost or truncated.
        won: the episode ended with a win.
        look: the room description, observed without spending a move; "" if it is not observed.
        inventory: the player's inventory, observed likewise.
        goal: the game's own statement of the task; "" if there is none.
        truncated: the episode was ended by the limit of moves, not by the game.
        actions_are_fallback: the game offered no valid actions, and ``valid_actions`` is a fixed short list.
        max_moves: the episode is truncated after this many commands; 0 if the game object does not say. States of runs
            that an earlier version saved have 0, so it is not compared.
    """

    feedback: str
    valid_actions: tuple[str, ...]
    score: float
    max_score: float
    moves: int
    done: bool = False
    won: bool = False
    look: str = ""
    inventory: str = ""
    goal: str = ""
    truncated: bool = False
    actions_are_fallback: bool = False
    max_moves: int = field(default=0, compare=False)

    @property
    def terminated(self) -> bool:
        """The game ended the episode, by a win or a loss."""
        return self.done and not self.truncated

    @property
    def place(self) -> Place:
        """Identifies the state of the world: room description and inventory if they are observed, else the feedback."""
        return (self.look, self.inventory) if self.look or self.inventory else (self.feedback,)

    @property
    def room(self) -> str:
        """The room's name: the first line of its description if it is observed, else of the feedback."""
        return (self.look or self.feedback).strip().split("\n", 1)[0]

    @property
    def raw_obs_text(self) -> str:
        """The feedback, then the room description and the inventory unless the feedback contains them."""
        parts = [self.feedback.strip()]
        for extra in (self.look.strip(), self.inventory.strip()):
            if extra and extra not in parts[0]:
                parts.append(extra)
        return "\n".join(part for part in parts if part)


class GameArguments(TypedDict):
    """The keyword arguments with which a game is created.

    Attributes:
        seed: seed of the game's random numbers, at least 0.
        max_episode_steps: number of commands after which an episode is truncated, at least 1.
        look_and_inventory: observe :attr:`GameState.look` and :attr:`GameState.inventory`.
        drop_inert_commands: exclude commands that cannot change the world from the valid actions.
        valid_actions: what tries the commands to find the valid actions of Jericho games. ``fast``: a compiled
            Z-machine; ``exact``: Jericho's emulator. The valid actions are the same.
    """

    seed: int
    max_episode_steps: int
    look_and_inventory: bool
    drop_inert_commands: bool
    valid_actions: ValidActionsMode


class TextGame(Protocol):
    """A text game in this process. A function creates it from :class:`GameArguments`; docs/own-games.md is for authors.

    - It is deterministic: equal seeds and equal commands since ``reset`` give equal states. A resumed run replays the
      commands of its episodes. Observing look, inventory and valid actions does not change the game.
    - It ends an episode after ``max_episode_steps`` commands by itself, with ``done`` and ``truncated``.
    - The reward of a command is the change of the score. ``max_score`` is the same in all states of an episode.
    - A state that is not ``done`` has at least one valid action. If the game offers none, the game object gives a short
      list of fallback actions and sets ``actions_are_fallback``.
    - It runs in a worker process, in which torch cannot be imported. The class can be imported there, and its
      arguments and its states are picklable.

    :mod:`priorzero.envs.validation` has the checks of arguments, and :func:`priorzero.envs.check_game` checks a game.
    """

    def reset(self) -> GameState:
        """Begin a new episode. All episodes of a game have the same random numbers."""

    def step(self, action: str) -> tuple[GameState, float]:
        """Take an action; return the new state and the reward: the points that the action gained.

        Raises:
            ValueError: the episode has ended or has not begun, or ``action`` is not a valid action of the state.
        """

    def close(self) -> None:
        """Free the game's resources. The game cannot be used afterwards."""


@dataclass(frozen=True, slots=True)
class HistoryStep:
    """One past decision of an episode: the action, the points that it gained, and the state in which it was taken."""

    feedback: str
    action: str
    reward: float
    place: Place = ()
    room: str = ""
    score: float = 0.0


@dataclass(frozen=True, slots=True)
class Attempt:
    """What an action led to in earlier episodes: the most points that it earned, and whether it lost the game."""

    action: str
    points: float = 0.0
    lost_game: bool = False


@dataclass(frozen=True, slots=True)
class PriorRequest:
    """A request for a prior: the rendered prompt and the valid actions."""

    prompt: str
    valid_actions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ActionPrior:
    """A distribution over the valid actions of one state, in their order.

    Attributes:
        logprobs: normalised log-probabilities ``[K]``, float32.
        source: ``"score"``, ``"rank"``, or ``"uniform"`` (the engine failed, or the prompt is too long).
        version: number of LLM updates of the parameters that computed the prior.
        completion: the text that the LLM generated (``rank``), or the chain of thought behind which the actions were
            scored (``score`` with ``prior.use_cot``); otherwise None.
        parsed: False if no valid action could be read from the completion, or if the LLM wrote no "Answer:" heading
            below its thought (``score`` with ``prior.use_cot``).
        rollout_logprobs: log-probability of each action's text, the sum over its tokens, ``[K]`` (``score`` only).
    """

    logprobs: np.ndarray
    source: str
    version: int
    completion: str | None = None
    parsed: bool = True
    rollout_logprobs: np.ndarray | None = None


class PriorEngine(Protocol):
    """Computes priors with a language model.

    Attributes:
        version: number of LLM updates of the parameters that are served.
        exclusive: no request may run while the LLM learns, since both use the same parameters or the same memory.
    """

    version: int
    exclusive: bool

    async def ready(self) -> None:
        """Start the engine, or restart it after a crash, and wait until it accepts requests.

        Raises:
            EngineError: it cannot be started.
        """

    async def priors(self, requests: Sequence[PriorRequest]) -> list[ActionPrior]:
        """One prior for each request, in order. Errors are raised; the caller retries.

        A prompt that does not fit into the model is not an error: its prior is uniform, and it is counted.
        """

    async def check(self) -> None:
        """Test, after requests that timed out, whether the engine still works.

        An engine that hangs is marked as crashed, and :meth:`ready` restarts it. A slow one is left alone.
        """

    async def suspend(self) -> None:
        """Free the memory that the learner needs, until the next :meth:`sync_weights`. Only if ``exclusive``."""

    async def sync_weights(self, version: int) -> None:
        """Serve the current training parameters from now on, as ``version``.

        Raises:
            EngineError: the engine's results differ from the training copy's.
        """

    async def clear_cache(self) -> None:
        """Drop cached results: later priors depend on the parameters and the request only."""

    def take_statistics(self) -> dict[str, float]:
        """Metrics under ``prior/`` since the last call."""

    async def close(self) -> None:
        """Free the engine's resources."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionChoice:
    """The choice of an action in a state.

    Attributes:
        state: the state before the action, with the valid actions that were considered.
        action_indices: vocabulary index of each valid action, ``[K]`` int64.
        prior: the LLM's prior; None without an LLM.
        chosen: position of the chosen action in ``state.valid_actions``.
        behaviour_prob: probability with which the action was sampled, among those that the exploration strategy
            allowed; 1 if it was not sampled.
    """

    state: GameState
    action_indices: np.ndarray
    prior: ActionPrior | None
    chosen: int
    behaviour_prob: float = 1.0

    @property
    def action_text(self) -> str:
        """The chosen action."""
        return self.state.valid_actions[self.chosen]

    @property
    def action_index(self) -> int:
        """Its index in the vocabulary."""
        return int(self.action_indices[self.chosen])


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord(ActionChoice):
    """Everything about one decision. It is written once, when the reward of the action is known.

    The training data of the world model and of the LLM are both derived from this record, so reward, prompt, prior and
    visit counts always belong to the same decision.

    Attributes (besides those of a choice):
        features: the text encoder's features of ``state``, ``[F]`` float32.
        prompt: the LLM's prompt; "" without an LLM.
        visit_counts: visit counts of the root's actions, ``[K]`` int64.
        root_value: value of the root after the search.
        predicted_value: the network's value of the root before the search.
        reward: points that the action gained.
        done: the episode ended with this action.
        episode: number of the episode, unique within a run.
        step: index of the decision in its episode, from 0.
        shaping: addition to the world model's reward, in points: ``train.novelty_bonus`` and ``train.loss_penalty``.
    """

    features: np.ndarray
    prompt: str
    visit_counts: np.ndarray
    root_value: float
    predicted_value: float
    reward: float
    done: bool
    episode: int
    step: int
    shaping: float = 0.0

    def visit_probs(self) -> np.ndarray:
        """Visit counts as a distribution over the valid actions, ``[K]`` float32."""
        return (self.visit_counts / self.visit_counts.sum()).astype(np.float32)
