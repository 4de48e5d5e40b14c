"""Records and protocols shared by every other module (floor 0: standard library and numpy only).

Letters in shapes: ``K`` valid actions of one state, ``A`` size of the action vocabulary, ``F`` feature size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class UserError(Exception):
    """Something a person can put right. The message says what was given, what is allowed and what to type.

    The command line prints the message without a stack trace and exits with code 2.
    """


class NotFinite(UserError):
    """Something in an update is NaN or infinite. The update was not applied: the parameters are as they were."""


class GameWorkerError(RuntimeError):
    """A game's worker process hung past its time limit, crashed or answered with an error."""


class EngineFailed(RuntimeError):
    """The prior engine is lost for the rest of the run, or does not answer from the parameters it was given."""


class PartFailed(RuntimeError):
    """A process of a run on a cluster died, or did not answer in time."""


class PromptTooLong(ValueError):
    """A prompt with its answers does not fit into the language model."""


@dataclass(frozen=True, slots=True)
class GameState:
    """What a game shows at one moment.

    Attributes:
        feedback: what the game printed in answer to the last command.
        valid_actions: commands that make sense here, without duplicates, in a reproducible order. Empty only when
            ``done``.
        score: points so far.
        max_score: the most points this game can give (0 if the game does not say).
        moves: commands given since the episode began.
        done: the episode has ended (won, lost, or the move limit was reached).
        won: the episode ended with a win.
        look: the room description, taken without spending a move ("" when not asked for).
        inventory: what the player carries, likewise.
        goal: the game's own statement of the task ("" if it has none).
        truncated: the episode was cut by the move limit rather than by the game.
        actions_are_fallback: the game offered no valid actions, so a fixed short list stands in.
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

    @property
    def place(self) -> tuple[str, ...]:
        """What tells states of the world apart: room and inventory where these are observed, else the last answer."""
        return (self.look, self.inventory) if self.look or self.inventory else (self.feedback,)

    @property
    def standing(self) -> tuple[str, float]:
        """How far the player has come: where (the first line of the room description, which names the room; of the last
        answer where rooms are not observed) and with how many points."""
        return (self.look or self.feedback).strip().split("\n", 1)[0], self.score

    @property
    def raw_obs_text(self) -> str:
        """Feedback, then the room and the inventory where they were asked for and say something new."""
        parts = [self.feedback.strip()]
        for extra in (self.look.strip(), self.inventory.strip()):
            if extra and extra not in parts[0]:
                parts.append(extra)
        return "\n".join(part for part in parts if part)


class TextGame(Protocol):
    """A text game in this process. ``step`` must only be called with one of the state's valid actions."""

    def reset(self) -> GameState: ...

    def step(self, action: str) -> tuple[GameState, float]:
        """Give a command; return the new state and the reward (points gained by this command)."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class HistoryStep:
    """One past decision as the prompt shows it.

    Attributes:
        feedback: what the game had said.
        action: what was done.
        reward: what it earned.
        place: :attr:`GameState.place` of the state it was done in.
        standing: its :attr:`GameState.standing`.
    """

    feedback: str
    action: str
    reward: float
    place: tuple[str, ...] = ()
    standing: tuple[str, float] = ("", 0.0)


@dataclass(frozen=True, slots=True)
class PriorRequest:
    """A question to a prior engine: the rendered prompt and the actions to spread probability over."""

    prompt: str
    valid_actions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ActionPrior:
    """A distribution over the valid actions of one state, in their order.

    Attributes:
        logprobs: normalised log-probabilities ``[K]``, float32; ``logsumexp == 0``.
        source: ``"score"``, ``"rank"`` or ``"uniform"`` (the engine failed, or the prompt is too long).
        version: how many LLM updates the parameters that made this prior had seen.
        completion: what the LLM wrote (``rank`` only).
        parsed: False if nothing usable could be read from the completion.
        rollout_logprobs: log-probability of each action's text, summed over its tokens, ``[K]`` (``score`` only).
    """

    logprobs: np.ndarray
    source: str
    version: int
    completion: str | None = None
    parsed: bool = True
    rollout_logprobs: np.ndarray | None = None


class PriorEngine(Protocol):
    """Turns prompts into action priors.

    Attributes:
        version: how many LLM updates the parameters that answer have seen.
        exclusive: nobody may ask while the LLM learns, because both use the same parameters or the same memory.
    """

    version: int
    exclusive: bool

    async def ready(self) -> None:
        """Start, or start again after a crash, and wait until questions can be asked. Does nothing if they can.

        Raises:
            EngineFailed: it cannot be brought (back) to life.
        """
        ...

    async def priors(self, requests: Sequence[PriorRequest]) -> list[ActionPrior]:
        """One prior per request, in order. Raises on failure; retries and fallbacks are the caller's.

        A prompt that does not fit into the model is no failure: its prior is uniform, and it is counted.
        """
        ...

    async def check(self) -> None:
        """Find out, after questions that were not answered in time, whether it still lives; if it does not, it counts
        as crashed, which :meth:`ready` sees to. One that is slow is left alone."""
        ...

    async def suspend(self) -> None:
        """Free what the learner needs; the next ``sync_weights`` ends it. Only if ``exclusive``."""
        ...

    async def sync_weights(self, version: int) -> None:
        """Make every later answer come from the current training parameters, and call them ``version``.

        Raises:
            EngineFailed: the engine does not compute what the training copy computes.
        """
        ...

    async def forget(self) -> None:
        """Drop what is kept of earlier questions: later answers depend on the parameters and the question alone."""
        ...

    def take_statistics(self) -> dict[str, float]:
        """Metrics under ``prior/`` since the last call."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Everything known about one decision, written once, when the reward of its action is known.

    The world model's arrays and the LLM's training samples are both derived from this record, so the reward, the
    prompt, the prior and the visits of a decision cannot come apart.

    Attributes:
        state: what the game showed before the action.
        features: frozen text-encoder features of ``state``, ``[F]`` float32.
        action_indices: vocabulary index of each valid action, ``[K]`` int64.
        prompt: the text the LLM was asked with ("" when no LLM took part).
        prior: the LLM's prior (None when no LLM took part).
        visit_counts: root visits per valid action, ``[K]`` int64.
        root_value: searched value of the root.
        predicted_value: the network's value of the root before the search.
        chosen: position in ``state.valid_actions`` of the action that was played.
        reward: points that the action earned.
        behaviour_prob: probability with which that action was drawn; 1 if it was not.
        shaping: what the world model's reward has on top, in points: ``train.novelty_bonus``, ``train.loss_penalty``.
        done: the episode ended with this action.
        episode: number of the episode this decision belongs to, unique within a run.
        step: index of the decision within its episode, from 0.
    """

    state: GameState
    features: np.ndarray
    action_indices: np.ndarray
    prompt: str
    prior: ActionPrior | None
    visit_counts: np.ndarray
    root_value: float
    predicted_value: float
    chosen: int
    reward: float
    done: bool
    episode: int
    step: int
    shaping: float = 0.0
    behaviour_prob: float = 1.0

    @property
    def action_text(self) -> str:
        return self.state.valid_actions[self.chosen]

    @property
    def action_index(self) -> int:
        return int(self.action_indices[self.chosen])

    def visit_probs(self) -> np.ndarray:
        """Visit counts as a distribution over the valid actions, ``[K]`` float32."""
        return (self.visit_counts / self.visit_counts.sum()).astype(np.float32)
