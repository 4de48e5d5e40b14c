"""The weight of the LLM's prior at the root of a search, by game; learned if ``prior.alpha=auto``.

The root mixes two predictions of the best action: the LLM's prior p and the world model's policy q, with the
probabilities ``alpha p + (1 - alpha) q``. For a decision with the target distribution t, the prior's responsibility is
``r = sum_a t(a) alpha p(a) / (alpha p(a) + (1 - alpha) q(a))``. Online EM for the weights of a mixture (Cappé and
Moulines 2009, "Online EM algorithm for latent data models") moves alpha towards r with a small step, so alpha maximises
the log-likelihood of recent targets under the mixture. There are two kinds of targets:

- **Search.** The visit counts, divided by the factor by which exploration noise has changed the root's probabilities.
  If the search does not prefer any action, this target is the mixture itself, r is alpha, and the weight stays.
- **Points.** When a command gains points, it and the commands before it are targets. Their weight is
  :data:`POINTS_WEIGHT`, times :data:`TRACE_DECAY` for each command of distance, times a truncated importance weight,
  ``min(1, mixture / probability with which the command was sampled)``. So a command counts less if exploration has made
  it more probable. ``go_explore`` chooses commands by the prior; the importance weight is given this choice.

The prior knows more than the policy in new states, and less in states that the policy has learned. So there is one
weight for each of :data:`NUM_BINS` equal intervals of the policy's entropy, relative to that of a uniform distribution.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from priorzero.search.root import NUM_BINS, entropy_bin, floored_probs
from priorzero.types import ActionPrior, Plain

if TYPE_CHECKING:
    from priorzero.play.player import Decision

INITIAL_WEIGHT = 0.5
INITIAL_COUNT = 20.0  # targets that the initial weight stands for
MEMORY = 200.0  # targets; older ones are forgotten
BOUNDS = (0.02, 0.98)
TRACE_LENGTH = 20  # commands before points that are targets
TRACE_DECAY = 0.9
POINTS_WEIGHT = 10.0  # of a command that gains points, relative to the visits of a decision; points are rare
MAX_STEP = 0.3


class Responsibility(NamedTuple):
    """A decision whose command may be a target later.

    Attributes:
        bin: interval of the policy's entropy.
        excess: responsibility of the prior for the command, minus the prior's weight.
        weight: truncated importance weight of the command.
    """

    bin: int
    excess: float
    weight: float


class PriorWeights:
    """The weights of all games, ``[NUM_BINS]`` each.

    Args:
        alpha: ``prior.alpha``. A number is used in all games and states.
        floor: ``prior.floor``.
    """

    def __init__(self, alpha: float | str, *, floor: float) -> None:
        self.learns = alpha == "auto"
        self._initial = INITIAL_WEIGHT if isinstance(alpha, str) else alpha
        self._floor = floor
        self._weights: dict[str, np.ndarray] = {}
        self._counts: dict[str, np.ndarray] = {}
        self._traces: dict[int, deque[Responsibility]] = defaultdict(lambda: deque(maxlen=TRACE_LENGTH))

    def of_game(self, game: str) -> np.ndarray:
        """The weights in a game, ``[NUM_BINS]``. In a game that was not trained on, they are the mean of the others."""
        if game in self._weights:
            return self._weights[game]
        known = list(self._weights.values())
        return np.mean(known, axis=0) if known else np.full(NUM_BINS, self._initial)

    def exploration_probs(self, game: str, prior: ActionPrior) -> np.ndarray:
        """The prior's probabilities for exploration, ``[K]``.

        If the weight is learned, a uniform distribution takes the rest of the weight that the prior has where the
        policy is nearly uniform. So a prior that is no better than chance does not guide the exploration.
        """
        probs = floored_probs(prior.logprobs, floor=self._floor)
        if not self.learns:
            return probs
        alpha = self.of_game(game)[-1]
        return np.asarray(alpha * probs + (1.0 - alpha) / len(probs))

    def begin_episode(self, env: int) -> None:
        """A new episode begins in environment ``env``."""
        self._traces.pop(env, None)

    def observe(self, env: int, game: str, decision: Decision, *, reward: float) -> None:
        """Learn from a decision in environment ``env``, which plays ``game``, and from the points that it gained.

        A decision is no target if it has one valid action only, or no prior of the LLM (also if all attempts to compute
        it failed).
        """
        if not self.learns:
            return
        has_prior = decision.prior is not None and decision.prior.source != "uniform"
        if has_prior and len(decision.action_indices) > 1:
            self._observe_decision(env, game, decision)
        if reward > 0:
            for distance, past in enumerate(reversed(self._traces.pop(env, deque()))):
                self._move(game, past.bin, past.excess, weight=POINTS_WEIGHT * past.weight * TRACE_DECAY**distance)

    def _observe_decision(self, env: int, game: str, decision: Decision) -> None:
        result, prior, chosen = decision.result, decision.prior, decision.chosen
        assert result is not None and prior is not None
        own_bin, alpha = entropy_bin(result.policy_logits), result.prior_weight
        mixture = np.exp(result.root_logits.astype(np.float64))
        # Responsibility of the prior for each action, [K].
        shares = alpha * floored_probs(prior.logprobs, floor=self._floor) / mixture
        if result.root_probs.min() > 0.0:  # with search.root_noise_weight=1, the visits follow the noise alone
            target = result.visit_counts * mixture / result.root_probs
            self._move(game, own_bin, float(target @ shares / target.sum()) - alpha, weight=1.0)
        importance = min(1.0, float(mixture[chosen]) / decision.behaviour_prob)
        self._traces[env].append(Responsibility(own_bin, float(shares[chosen]) - alpha, importance))

    def _move(self, game: str, own_bin: int, excess: float, *, weight: float) -> None:
        """A step of online EM: the first ones are those of a mean, later ones those of a mean with forgetting."""
        weights = self._weights.setdefault(game, np.full(NUM_BINS, self._initial))
        counts = self._counts.setdefault(game, np.zeros(NUM_BINS))
        counts[own_bin] += weight
        step = min(MAX_STEP, weight / min(MEMORY, INITIAL_COUNT + counts[own_bin]))
        weights[own_bin] = np.clip(weights[own_bin] + step * excess, *BOUNDS)

    def state_dict(self) -> Plain:
        return {
            "weights": {game: weights.tolist() for game, weights in self._weights.items()},
            "counts": {game: counts.tolist() for game, counts in self._counts.items()},
            "traces": {env: [tuple(past) for past in trace] for env, trace in self._traces.items()},
        }

    def load_state_dict(self, state: Plain) -> None:
        """The inverse of :meth:`state_dict`."""
        self._weights = {game: np.array(weights) for game, weights in state["weights"].items()}
        self._counts = {game: np.array(counts) for game, counts in state["counts"].items()}
        self._traces.clear()
        for env, trace in state["traces"].items():
            self._traces[env].extend(Responsibility(*past) for past in trace)
