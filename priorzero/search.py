"""MCTS over UniZero's world model, starting from root logits that the language model had a say in.

The model and its losses are LightZero's, and so are the tree's rules. Three things are done differently here:

* LightZero keeps key-value caches that are looked up by a hash of the latent state and the place in the batch; they
  outlive learning steps and episodes, and padding to a longer neighbour changes attention and positions. Here every
  node knows its own context (the last few observation and action tokens), which is passed through the transformer as
  a whole. Sequences are padded on the right, where a causal model cannot see it, so a search does not depend on its
  neighbours and nothing has to be reset.
* Below the root LightZero expands all A actions; here only those that have been given out by the vocabulary.
* LightZero's C++ tree breaks ties with a clock. Its Python tree draws them from ``random``, which is seeded here root
  by root, so that the same parameters give the same search; :mod:`priorzero.tree` computes the same much faster.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from priorzero import tree as python_tree
from priorzero.lightzero import quiet
from priorzero.priors import mix_root_logits
from priorzero.types import UserError

with quiet():
    from lzero.mcts.ctree.ctree_muzero import mz_tree
    from lzero.mcts.ptree import MinMaxStatsList


@dataclass(frozen=True)
class Root:
    """What a search starts from.

    Attributes:
        features: the last observations of the episode, oldest first, ``[n, F]`` with ``1 <= n <= context_length / 2``.
        actions: the actions between them, ``[n - 1]``.
        legal: indices of the valid actions, ``[K]``.
        prior_logprobs: the LLM's log-distribution over them, ``[K]``; None if it has no say.
        tries: how often each was given before in such a state, ``[K]``; None for never.
        noise: mixed into the root's prior with ``search.root_noise_weight``, a distribution ``[K]``: a draw from
            Dirichlet's, or what ``search.return_first`` puts in its place; None for nothing.
        seed: breaks ties.
    """

    features: np.ndarray
    actions: np.ndarray
    legal: np.ndarray
    prior_logprobs: np.ndarray | None = None
    tries: np.ndarray | None = None
    noise: np.ndarray | None = None
    seed: int = 0


@dataclass(frozen=True)
class SearchResult:
    """Outcome for one root, over its K valid actions in their order.

    Attributes:
        visit_counts: ``[K]`` int64, sums to the number of simulations.
        root_value: searched value.
        predicted_value: the network's value before the search.
        policy_logits: the world model's, ``[K]``.
        root_logits: what the search started from (before noise), ``[K]``.
    """

    visit_counts: np.ndarray
    root_value: float
    predicted_value: float
    policy_logits: np.ndarray
    root_logits: np.ndarray


class WorldModelInference:
    """Inference with UniZero's world model in which every node carries its own context.

    A context is a sequence of token embeddings ``[t, E]``, observation, action, ..., observation, at most
    ``context_length - 1`` of them; positions count from its start, as in training.

    Args:
        model: LightZero's ``UniZeroModel``.
        to_scalar: turns categorical logits ``[n, support]`` into scalars ``[n, 1]``.
    """

    def __init__(self, model: Any, *, to_scalar: Any) -> None:
        self._world_model = model.world_model
        self._to_scalar = to_scalar
        self.context_length = int(self._world_model.context_length)

    def encode(self, features: np.ndarray) -> Tensor:
        """Observation features ``[n, F]`` as token embeddings ``[n, E]``."""
        inputs = torch.as_tensor(features, dtype=torch.float32, device=self._world_model.device)
        return self._world_model.tokenizer.encode_to_obs_embeddings(inputs)[:, 0]

    def embed_actions(self, actions: np.ndarray) -> Tensor:
        """Action indices ``[n]`` as token embeddings ``[n, E]``."""
        return self._world_model.act_embedding_table(torch.as_tensor(actions, device=self._world_model.device))

    def root_contexts(self, roots: Sequence[Root]) -> list[Tensor]:
        """Token sequences of the roots' histories."""
        embeddings = self.encode(np.concatenate([root.features for root in roots])).split(
            [len(r.features) for r in roots]
        )
        contexts = []
        for root, observations in zip(roots, embeddings, strict=True):
            tokens = observations.new_empty(2 * len(observations) - 1, observations.shape[1])
            tokens[0::2] = observations
            if len(observations) > 1:
                tokens[1::2] = self.embed_actions(root.actions)
            contexts.append(tokens)
        return contexts

    def _last_hidden(self, contexts: Sequence[Tensor]) -> Tensor:
        """Transformer output at the last token of each sequence, ``[n, E]``."""
        lengths = torch.tensor([len(tokens) for tokens in contexts])
        padded = torch.nn.utils.rnn.pad_sequence(list(contexts), batch_first=True)  # (n, T, E)
        positions = self._world_model.pos_emb(torch.arange(padded.shape[1], device=padded.device))
        hidden = self._world_model.transformer(padded + positions)
        return hidden[torch.arange(len(contexts)), lengths - 1]

    def predict(self, contexts: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Policy logits ``[n, A]`` and values ``[n]`` of contexts that end in an observation."""
        hidden = self._last_hidden(contexts)
        policy_logits = self._world_model.head_policy.head_module(hidden)
        values = self._to_scalar(self._world_model.head_value.head_module(hidden))
        return policy_logits.cpu().numpy(), values.reshape(-1).cpu().numpy()

    def step(self, contexts: Sequence[Tensor], actions: np.ndarray) -> tuple[list[Tensor], np.ndarray]:
        """Take one action in each context.

        Args:
            contexts: n contexts that end in an observation.
            actions: ``[n]``.

        Returns:
            The contexts that follow, and the predicted rewards ``[n]``.
        """
        embedded = self.embed_actions(actions)
        extended = [torch.cat([tokens, embedded[i : i + 1]]) for i, tokens in enumerate(contexts)]
        hidden = self._last_hidden(extended)
        rewards = self._to_scalar(self._world_model.head_rewards.head_module(hidden)).reshape(-1).cpu().numpy()
        observations = self._world_model.head_observations.head_module(hidden)  # (n, E)
        followed = [torch.cat([tokens, observations[i : i + 1]]) for i, tokens in enumerate(extended)]
        # Two tokens a step leave together, so that a context still begins with an observation.
        return [tokens[2:] if len(tokens) > self.context_length - 1 else tokens for tokens in followed], rewards


@torch.no_grad()
def search(inference: WorldModelInference, roots: Sequence[Root], *, cfg: Any, num_actions: int) -> list[SearchResult]:
    """Run ``cfg.num_simulations`` simulations from each root; the network sees all roots in one batch.

    Args:
        inference: the world model, in eval mode.
        roots: where to start.
        cfg: settings with the fields of the ``search`` group and ``combine``, ``alpha`` and ``floor`` of ``prior``.
        num_actions: indices below this may be taken below the root.
    """
    tree: Any = python_tree if cfg.tree == "python" else mz_tree
    new_results = tree.SearchResults if cfg.tree == "python" else tree.ResultsWrapper
    new_statistics = MinMaxStatsList if cfg.tree == "python" else tree.MinMaxStatsList
    contexts = [[tokens] for tokens in inference.root_contexts(roots)]  # per root, by node number
    policy_logits, values = inference.predict([nodes[0] for nodes in contexts])
    if not (np.isfinite(policy_logits).all() and np.isfinite(values).all()):
        raise UserError("the world model's outputs are not finite; lower train.learning_rate or train.grad_clip")
    trees, statistics, starts = [], [], []
    for root, logits in zip(roots, policy_logits, strict=True):
        root_logits = mix_root_logits(
            logits[root.legal], root.prior_logprobs, combine=cfg.combine, alpha=cfg.alpha, floor=cfg.floor
        )
        if root.tries is not None:
            root_logits = root_logits - cfg.tries_exponent * np.log1p(root.tries)
        full = np.zeros(num_actions, dtype=np.float32)
        full[root.legal] = root_logits
        node = tree.Roots(1, [root.legal.tolist()])
        if root.noise is None:
            node.prepare_no_noise([0.0], [full.tolist()], [-1])
        else:
            node.prepare(cfg.root_noise_weight, [root.noise.tolist()], [0.0], [full.tolist()], [-1])
        stats = new_statistics(1)
        stats.set_delta(0.01)  # LightZero's value_delta_max: smaller ranges of values are not stretched
        trees.append(node)
        statistics.append(stats)
        starts.append(root_logits)

    ties = random.getstate()
    try:
        for simulation in range(cfg.num_simulations):
            paths, parents, actions, players = [], [], [], []
            for e, root in enumerate(roots):
                random.seed(root.seed * cfg.num_simulations + simulation)
                path = new_results(num=1)
                # Selection: down to an action that has not been taken yet.
                node, _, action, player = tree.batch_traverse(
                    trees[e], cfg.pb_c_base, cfg.pb_c_init, cfg.discount_factor, statistics[e], path, [-1]
                )
                paths.append(path)
                parents.append(contexts[e][node[0]])
                actions.append(action[0])
                players.append(player)
            # Expansion: the network says what the action leads to.
            children, rewards = inference.step(parents, np.array(actions))
            child_logits, child_values = inference.predict(children)
            for e, child in enumerate(children):
                contexts[e].append(child)
                # Backup: the new node's value flows up its path.
                tree.batch_backpropagate(
                    simulation + 1,
                    cfg.discount_factor,
                    [float(rewards[e])],
                    [float(child_values[e])],
                    [child_logits[e, :num_actions].tolist()],
                    statistics[e],
                    paths[e],
                    players[e],
                )
    finally:
        random.setstate(ties)
    return [
        SearchResult(
            visit_counts=np.array(trees[e].get_distributions()[0], dtype=np.int64),
            root_value=float(trees[e].get_values()[0]),
            predicted_value=float(values[e]),
            policy_logits=policy_logits[e, root.legal],
            root_logits=starts[e],
        )
        for e, root in enumerate(roots)
    ]
