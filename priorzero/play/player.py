"""Decisions: prompt, prior, search and choice of an action, for collection and for evaluation."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
from loguru import logger

from priorzero.llm.engines import RetryingPrior
from priorzero.llm.prompts import Prompt, PromptStyle, render_prompt
from priorzero.play.action_vocabulary import ActionVocabulary
from priorzero.play.episode import Episode
from priorzero.play.exploration import Exploration, RootNoise
from priorzero.play.memory import GameMemory
from priorzero.play.prior_weights import PriorWeights
from priorzero.play.text_encoder import TextEncoder
from priorzero.policy import PriorZeroPolicy
from priorzero.runtime.concurrency import OwnerThread
from priorzero.runtime.timeline import Timeline
from priorzero.search.base import Root, SearchResult
from priorzero.settings import Settings
from priorzero.types import ActionChoice, ActionPrior, GameState, PriorRequest, StepRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision(ActionChoice):
    """A decision, before its action is taken.

    Attributes (besides those of a choice):
        prompt: the LLM's prompt; None without an LLM.
        result: the search's result; None without a search.
        action_texts: the action of each vocabulary index at the time of the search; None unless the result has a tree.
    """

    prompt: Prompt | None
    result: SearchResult | None
    action_texts: Mapping[int, str] | None = None

    def record(self, episode: Episode, *, reward: float, shaping: float, done: bool) -> StepRecord:
        """The record of this decision and its outcome; ``episode`` has not advanced yet."""
        assert self.result is not None
        return StepRecord(
            state=self.state,
            features=episode.features[-1],
            action_indices=self.action_indices,
            prompt=self.prompt.text if self.prompt is not None else "",
            prior=self.prior,
            visit_counts=self.result.visit_counts,
            root_value=self.result.root_value,
            predicted_value=self.result.predicted_value,
            chosen=self.chosen,
            behaviour_prob=self.behaviour_prob,
            reward=reward,
            shaping=shaping,
            done=done,
            episode=episode.number,
            step=len(episode.history),
        )


@dataclass(eq=False)
class Player:
    """Makes decisions.

    Attributes:
        prior: computes the LLM's priors; None for UniZero alone.
        tokenizer: the LLM's tokenizer; None without an LLM.
        world_model_thread: the thread that searches run in.
        timeline: records the time of features, searches and games.
        prior_weights: weights of the prior at the root. The collector lets them learn.
    """

    settings: Settings
    _: KW_ONLY
    policy: PriorZeroPolicy
    encoder: TextEncoder
    indexer: ActionVocabulary
    prior: RetryingPrior | None
    style: PromptStyle
    tokenizer: Any
    world_model_thread: OwnerThread
    timeline: Timeline
    prior_weights: PriorWeights = field(init=False)
    _warned_of_length: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        cfg = self.settings.prior
        self.prior_weights = PriorWeights(cfg.alpha, floor=cfg.floor)

    def new_episode(
        self,
        env: int,
        state: GameState,
        *,
        game: str,
        rng: np.random.Generator,
        number: int = 0,
        memory: GameMemory | None = None,
    ) -> Episode:
        """An episode of ``game`` at its beginning in environment ``env``, whose generator is ``rng``."""
        num_observations = self.settings.world_model.context_length // 2
        features = deque(self.features([state]), maxlen=num_observations)
        return Episode(env, game, number, state, features, deque(maxlen=num_observations - 1), rng, memory=memory)

    def features(self, states: Sequence[GameState]) -> np.ndarray:
        """The text encoder's features of n states, ``[n, F]``."""
        with self.timeline.span("text encoder"):
            return self.encoder.features(states)

    async def decide(
        self,
        episodes: Sequence[Episode],
        *,
        exploration: Exploration | None = None,
        sample: bool = False,
        use_prior: bool = True,
        use_search: bool = True,
    ) -> list[Decision]:
        """One decision for each episode. None of the episodes has ended.

        Args:
            episodes: B of them.
            exploration: the strategy that adds noise at the roots of the searches; None in an evaluation: no noise, and
                ties are broken with the seed 0.
            sample: sample the action: from the visit counts, or without a search from the prior, or without either
                uniformly. False: take the action with the largest weight.
            use_prior: use the LLM's prior, if there is an LLM.
            use_search: search with the world model.
        """
        states = [
            dataclasses.replace(e.state, valid_actions=self.indexer.keep(e.state.valid_actions)) for e in episodes
        ]
        indices = [self.indexer.indices(state.valid_actions) for state in states]
        prompts: Sequence[Prompt | None] = [None] * len(episodes)
        priors: Sequence[ActionPrior | None] = [None] * len(episodes)
        if use_prior and self.prior is not None:
            prompts = rendered = self._render_prompts(episodes, states)
            requests = [PriorRequest(p.text, s.valid_actions) for p, s in zip(rendered, states, strict=True)]
            priors = await self.prior.priors(requests)
        noises: Sequence[RootNoise | None] = [None] * len(episodes)
        results: Sequence[SearchResult | None] = [None] * len(episodes)
        action_texts = None
        if use_search:
            roots, noises = self._make_roots(episodes, states, indices, priors, exploration=exploration)
            if any(root.with_tree for root in roots):
                action_texts = self.indexer.texts()
            results = await self.world_model_thread.run(
                "search", self.policy.search, roots, num_actions=self.indexer.num_used
            )
        decisions = []
        for b, episode in enumerate(episodes):
            weights = self._weights(states[b], priors[b], results[b], noises[b], sample=sample)
            chosen, prob = _choose(weights, rng=episode.rng if sample else None)
            decisions.append(
                Decision(
                    state=states[b],
                    action_indices=indices[b],
                    prompt=prompts[b],
                    prior=priors[b],
                    result=results[b],
                    action_texts=action_texts if episode.is_recorded else None,
                    chosen=chosen,
                    behaviour_prob=prob,
                )
            )
        return decisions

    def _render_prompts(self, episodes: Sequence[Episode], states: Sequence[GameState]) -> list[Prompt]:
        prompts = [
            render_prompt(
                state,
                episode.history,
                style=self.style,
                tokenizer=self.tokenizer,
                attempts=episode.memory.attempts(state, limit=self.settings.llm.memory_lines) if episode.memory else (),
            )
            for state, episode in zip(states, episodes, strict=True)
        ]
        if not self._warned_of_length and any(prompt.over_length for prompt in prompts):
            self._warned_of_length = True
            logger.warning(
                f"a prompt is longer than llm.prompt_max_len={self.style.max_tokens} even without history; such "
                "prompts are used as they are and counted in prior/over_length_prompts"
            )
        return prompts

    def _make_roots(
        self,
        episodes: Sequence[Episode],
        states: Sequence[GameState],
        indices: Sequence[np.ndarray],
        priors: Sequence[ActionPrior | None],
        *,
        exploration: Exploration | None,
    ) -> tuple[list[Root], list[RootNoise | None]]:
        """The roots of the searches, and the noise that the exploration strategy adds at each."""
        roots: list[Root] = []
        noises: list[RootNoise | None] = []
        for episode, state, own_indices, prior in zip(episodes, states, indices, priors, strict=True):
            noise, tie_seed = None, 0
            if exploration is not None:
                probs = None if prior is None else self.prior_weights.exploration_probs(episode.game, prior)
                noise = exploration.root_noise(episode.env, state, probs, rng=episode.rng)
                tie_seed = int(episode.rng.integers(2**31))
            roots.append(self._make_root(episode, own_indices, prior=prior, noise=noise, seed=tie_seed))
            noises.append(noise)
        return roots, noises

    def _make_root(
        self,
        episode: Episode,
        indices: np.ndarray,
        *,
        prior: ActionPrior | None,
        noise: RootNoise | None,
        seed: int,
    ) -> Root:
        return Root(
            features=np.stack(episode.features),
            actions=np.array(episode.actions, dtype=np.int64),
            legal_actions=indices,
            prior_logprobs=prior.logprobs if prior is not None else None,
            prior_weights=self.prior_weights.of_game(episode.game).copy() if prior is not None else None,
            noise=noise.probs if noise is not None else None,
            seed=seed,
            with_tree=episode.is_recorded,
        )

    def _weights(
        self,
        state: GameState,
        prior: ActionPrior | None,
        result: SearchResult | None,
        noise: RootNoise | None,
        *,
        sample: bool,
    ) -> np.ndarray:
        """Unnormalised probabilities of the valid actions, ``[K]``."""
        if result is not None:
            if not sample:
                return result.visit_counts
            visits = result.visit_counts
            if noise is not None and noise.only is not None:
                visits = visits * noise.only
                if not visits.any():
                    return noise.probs * noise.only
            shares = visits / visits.max()  # at most 1, so that no power overflows
            return np.asarray(shares ** (1.0 / self.settings.search.temperature))
        if prior is not None:
            return np.exp(prior.logprobs.astype(np.float64))
        return np.ones(len(state.valid_actions))


def _choose(weights: np.ndarray, *, rng: np.random.Generator | None) -> tuple[int, float]:
    """Sample a position in proportion to ``weights`` ``[K]``, or take the largest weight if ``rng`` is None.

    Returns the position and its probability, which is 1 without sampling.
    """
    if rng is None:
        return int(weights.argmax()), 1.0
    probs = weights / weights.sum()
    chosen = int(rng.choice(len(probs), p=probs))
    return chosen, float(probs[chosen])
