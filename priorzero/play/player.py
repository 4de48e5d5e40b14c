"""How a decision is made: prompt, prior, search. Collection and evaluation both play through this."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from loguru import logger

from priorzero.llm.engines import RobustPrior
from priorzero.llm.prompts import Prompt, PromptStyle, render_prompt
from priorzero.play.action_vocabulary import ActionIndexer
from priorzero.play.exploration import CommandMemory
from priorzero.play.text_encoder import TextEncoder
from priorzero.policy import PriorZeroPolicy
from priorzero.runtime.concurrency import OwnerThread
from priorzero.runtime.timeline import Timeline
from priorzero.search.base import Root, SearchResult
from priorzero.search.root import floored_probs
from priorzero.settings import Settings
from priorzero.types import ActionPrior, GameState, HistoryStep, Plain, PriorRequest

# Where the run knows what leads on, actions are drawn with this share of search.temperature (0.5: visits squared).
KNOWN_WAY_TEMPERATURE = 0.5


@dataclass
class Lane:
    """One game being played: its state now and what the next decision needs to know of the past.

    Attributes:
        state: what the game shows.
        features: features of the latest observations, this one last.
        actions: indices of the actions between them.
        history: all earlier decisions of the episode.
        memory: of the commands given in the run; exploration looks at it.
        detour: commands of this episode after which exploration no longer follows known ways, and those after which it
            does again; None: it always follows them.
        ahead: points earned since it left by commands that no known way to more has, less those lost. As soon as they
            are more than none, it follows the known ways again.
        rng: draws this lane's noise and actions, so that lanes do not disturb one another.
    """

    state: GameState
    features: deque[np.ndarray]
    actions: deque[int]
    rng: np.random.Generator
    history: list[HistoryStep] = field(default_factory=list)
    memory: CommandMemory = field(default_factory=CommandMemory)
    detour: tuple[int, int] | None = None
    ahead: float = 0.0
    total_reward: float = 0.0

    def leading(self, state: GameState) -> np.ndarray:
        """Which of the valid actions are on a way that exploration follows from here, ``[K]`` of bool."""
        if self.detour is not None and self.detour[0] <= len(self.history) < self.detour[1] and self.ahead <= 0:
            return np.zeros(len(state.valid_actions), dtype=bool)
        leads, _ = self.memory.way_on(state, ahead=self.ahead)
        return leads

    def promised(self, state: GameState, chosen: int) -> float:
        """Points still to come by the known way that a valid action follows, whether or not exploration does; 0 if it
        follows none."""
        leads, to_come = self.memory.way_on(state, ahead=self.ahead)
        return to_come if leads[chosen] else 0.0

    def state_dict(self) -> Plain:
        """All but ``rng`` and ``memory``, which outlive the lane."""
        return {
            "state": dataclasses.astuple(self.state),
            "features": [torch.from_numpy(features.copy()) for features in self.features],
            "actions": list(self.actions),
            "history": [dataclasses.astuple(step) for step in self.history],
            "detour": self.detour,
            "ahead": self.ahead,
            "total_reward": self.total_reward,
        }

    def load_state_dict(self, state: Plain) -> None:
        """The inverse of :meth:`state_dict`, into a lane at the beginning of an episode."""
        self.state = GameState(*state["state"])
        self.features.clear()
        self.features.extend(features.numpy() for features in state["features"])
        self.actions.extend(state["actions"])
        self.history = [HistoryStep(*step) for step in state["history"]]
        self.detour = state["detour"]
        self.ahead = state["ahead"]
        self.total_reward = state["total_reward"]

    def advance(
        self,
        *,
        action_text: str,
        action_index: int,
        reward: float,
        state: GameState,
        features: np.ndarray,
        promised: float = 0.0,
    ) -> None:
        """Take note of what an action led to; ``promised``: :meth:`promised` of it when it was chosen."""
        if self.detour is not None and len(self.history) >= self.detour[0] and promised <= max(reward, 0.0):
            self.ahead += reward
        self.history.append(
            HistoryStep(self.state.feedback, action_text, reward, self.state.place, self.state.standing)
        )
        self.actions.append(action_index)
        self.features.append(features)
        self.total_reward += reward
        self.state = state


@dataclass(frozen=True)
class Decision:
    """A decision before the game has answered.

    Attributes:
        state: the state it was made in, with the valid actions that were considered.
        action_indices: ``[K]``.
        prompt: None when no LLM took part.
        prior: None when no LLM took part.
        result: None when no search took part.
        chosen: position of the action in the valid actions.
        behaviour_prob: probability with which it was drawn; 1 if it was not.
        promised: :meth:`Lane.promised` of it, while exploring.
    """

    state: GameState
    action_indices: np.ndarray
    prompt: Prompt | None
    prior: ActionPrior | None
    result: SearchResult | None
    chosen: int
    behaviour_prob: float
    promised: float = 0.0

    @property
    def action_text(self) -> str:
        return self.state.valid_actions[self.chosen]


class Player:
    """Makes decisions for lanes.

    Args:
        settings: all settings.
        policy: searches.
        encoder: makes features.
        indexer: numbers the actions.
        prior: asks the LLM; None for plain UniZero.
        style: of the prompt.
        tokenizer: the LLM's; None without one.
        world_model_thread: where searches run.
        timeline: takes note of what runs.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        policy: PriorZeroPolicy,
        encoder: TextEncoder,
        indexer: ActionIndexer,
        prior: RobustPrior | None,
        style: PromptStyle,
        tokenizer: Any,
        world_model_thread: OwnerThread,
        timeline: Timeline,
    ) -> None:
        self.settings = settings
        self.policy = policy
        self.encoder = encoder
        self.indexer = indexer
        self.prior = prior
        self.style = style
        self.tokenizer = tokenizer
        self.world_model_thread = world_model_thread
        self.timeline = timeline
        self._told_of_length = False

    def new_lane(self, state: GameState, rng: np.random.Generator) -> Lane:
        """A lane at the beginning of an episode."""
        observations = self.settings.world_model.context_length // 2
        features = deque([self.features(state)], maxlen=observations)
        return Lane(state=state, features=features, actions=deque(maxlen=observations - 1), rng=rng)

    def features(self, state: GameState) -> np.ndarray:
        """The frozen encoder's features of a state, ``[F]``."""
        with self.timeline.span("text encoder"):
            return self.encoder.features([state])[0]

    async def decide(
        self, lanes: Sequence[Lane], *, explore: bool, use_prior: bool = True, use_search: bool = True
    ) -> list[Decision]:
        """One decision a lane.

        Args:
            lanes: none of them at the end of an episode.
            explore: add noise to the search and draw from its visits (collection), or draw from the prior where there
                is no search; otherwise take the best, which depends on the parameters and the lane's past alone.
            use_prior: let the LLM take part, if there is one.
            use_search: search; otherwise the prior alone decides, and without one all valid actions are alike.
        """
        states = [
            dataclasses.replace(lane.state, valid_actions=self.indexer.keep(lane.state.valid_actions)) for lane in lanes
        ]
        indices = [self.indexer.indices(state.valid_actions) for state in states]
        prompts: list[Prompt | None] = [None] * len(lanes)
        priors: list[ActionPrior | None] = [None] * len(lanes)
        if use_prior and self.prior is not None:
            rendered = [
                render_prompt(state, lane.history, style=self.style, tokenizer=self.tokenizer)
                for state, lane in zip(states, lanes, strict=True)
            ]
            if not self._told_of_length and any(prompt.over_length for prompt in rendered):
                self._told_of_length = True
                logger.warning(
                    f"prompts longer than llm.prompt_max_len={self.style.max_tokens} even without history are used as "
                    "they are; prior/over_length_prompts counts them"
                )
            requests = [PriorRequest(p.text, s.valid_actions) for p, s in zip(rendered, states, strict=True)]
            prompts, priors = list(rendered), list(await self.prior.priors(requests))
        results: Sequence[SearchResult | None] = [None] * len(lanes)
        if use_search:
            roots = [self._root(*parts, explore=explore) for parts in zip(lanes, states, indices, priors, strict=True)]
            results = await self.world_model_thread.run(
                "search", self.policy.search, roots, num_actions=self.indexer.num_used
            )
        decisions = []
        for lane, state, index, prompt, prior, result in zip(
            lanes, states, indices, prompts, priors, results, strict=True
        ):
            chosen, prob = self._choose(lane, state, prior, result, explore=explore)
            promised = lane.promised(state, chosen) if explore else 0.0
            decisions.append(Decision(state, index, prompt, prior, result, chosen, prob, promised))
        return decisions

    def _root(
        self, lane: Lane, state: GameState, indices: np.ndarray, prior: ActionPrior | None, *, explore: bool
    ) -> Root:
        tries, noise, seed = None, None, 0
        if explore:
            leading = lane.leading(state)
            tries = np.where(leading, 0, lane.memory.tries(state.standing, state.valid_actions))
            noise = self._noise(lane, leading, tries, prior)
            seed = int(lane.rng.integers(2**31))
        return Root(
            features=np.stack(lane.features),
            actions=np.array(lane.actions, dtype=np.int64),
            legal=indices,
            prior_logprobs=prior.logprobs if prior is not None else None,
            tries=tries,
            noise=noise,
            seed=seed,
        )

    def _noise(self, lane: Lane, leading: np.ndarray, tries: np.ndarray, prior: ActionPrior | None) -> np.ndarray:
        """What exploration mixes into the root's prior, a distribution ``[K]``: a draw from Dirichlet's.

        With ``search.return_first`` it is evenly over the commands that lead on; where none does, on one command: drawn
        with a probability in proportion to the LLM's with its floor (evenly without one) over (1 + tries) squared.
        """
        if leading.any():
            return leading / leading.sum()
        num_actions = len(leading)
        if not self.settings.search.return_first:
            return lane.rng.dirichlet(np.full(num_actions, self.settings.search.root_dirichlet_alpha))
        weights = np.ones(num_actions)
        if prior is not None:
            weights = floored_probs(prior.logprobs, floor=self.settings.prior.floor)
        weights /= (1.0 + tries) ** 2
        return np.eye(num_actions)[lane.rng.choice(num_actions, p=weights / weights.sum())]

    def _choose(
        self, lane: Lane, state: GameState, prior: ActionPrior | None, result: SearchResult | None, *, explore: bool
    ) -> tuple[int, float]:
        """The action's position and the probability with which it was drawn."""
        if result is not None:
            shares = result.visit_counts / result.visit_counts.max()  # at most 1: a small temperature cannot overflow
            temperature = self.settings.search.temperature
            if lane.leading(state).any():
                temperature *= KNOWN_WAY_TEMPERATURE
            weights = shares ** (1.0 / temperature)
        elif prior is not None:
            weights = np.exp(prior.logprobs.astype(np.float64))
        else:
            weights = np.ones(len(state.valid_actions))
        if not explore:
            return int((result.visit_counts if result is not None else weights).argmax()), 1.0
        probs = weights / weights.sum()
        chosen = int(lane.rng.choice(len(probs), p=probs))
        return chosen, float(probs[chosen])
