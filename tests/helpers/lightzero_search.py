"""LightZero's Python search tree over our world model: the reference for :mod:`priorzero.search`."""

from __future__ import annotations

import random

import numpy as np
import torch

from priorzero.policy import PriorZeroPolicy
from priorzero.runtime.quiet import quiet
from priorzero.search.base import Root
from priorzero.search.root import entropy_bin, mix_root_logits
from priorzero.search.tree import MIN_VALUE_RANGE

with quiet():
    from lzero.mcts.ptree import MinMaxStatsList, ptree_mz


@torch.no_grad()
def lightzero_search(policy: PriorZeroPolicy, root: Root, *, num_actions: int) -> tuple[list[int], float]:
    """Visit counts ``[K]`` and value of a root after a search with LightZero's tree.

    Args:
        policy: its world model and its settings are used.
        root: the state to search from.
        num_actions: actions with indices below this are expanded below the root.
    """
    policy.network.eval()
    cfg, model = policy.search_cfg, policy.inference
    contexts = model.root_contexts([root])  # by node index
    roots = _make_roots(policy, root, logits=model.predict(contexts)[0][0], num_actions=num_actions)
    stats = MinMaxStatsList(1)
    stats.set_delta(MIN_VALUE_RANGE)
    state = random.getstate()
    for simulation in range(cfg.num_simulations):
        random.seed(root.seed * cfg.num_simulations + simulation)  # breaks the ties
        path = ptree_mz.SearchResults(num=1)
        [parent], _, [action], to_play = ptree_mz.batch_traverse(
            roots, cfg.pb_c_base, cfg.pb_c_init, cfg.discount_factor, stats, path, [-1]
        )
        children, rewards = model.step([contexts[parent]], np.array([action]))
        logits, values = model.predict(children)
        contexts += children
        ptree_mz.batch_backpropagate(
            simulation + 1,
            cfg.discount_factor,
            [float(rewards[0])],
            [float(values[0])],
            [logits[0, :num_actions].tolist()],
            stats,
            path,
            to_play,
        )
    random.setstate(state)
    return roots.get_distributions()[0], roots.get_values()[0]


def _make_roots(policy: PriorZeroPolicy, root: Root, *, logits: np.ndarray, num_actions: int) -> ptree_mz.Roots:
    legal = root.legal_actions
    full = np.zeros(num_actions, dtype=np.float32)
    weight = 0.0 if root.prior_weights is None else root.prior_weights[entropy_bin(logits[legal])]
    full[legal] = mix_root_logits(logits[legal], root.prior_logprobs, alpha=weight, floor=policy.prior_cfg.floor)
    roots = ptree_mz.Roots(1, [legal.tolist()])
    if root.noise is None:
        roots.prepare_no_noise([0.0], [full.tolist()], [-1])
    else:
        roots.prepare(policy.search_cfg.root_noise_weight, [root.noise.tolist()], [0.0], [full.tolist()], [-1])
    return roots
