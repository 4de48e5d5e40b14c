"""The search: what the prior does to it, and what must not do anything to it."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from easydict import EasyDict

from priorzero.config import resolve_settings
from priorzero.policy import PriorZeroPolicy
from priorzero.runtime.quiet import quiet
from priorzero.search.base import Root
from tests.helpers.segments import FEATURE_SIZE

with quiet():
    from lzero.mcts.ptree import ptree_mz

NUM_ACTIONS = 12


def make_policy(seed=0, **search):
    settings = resolve_settings(
        {
            "env": {"action_space_size": 16},
            "world_model": {
                "embed_dim": 32,
                "num_heads": 2,
                "num_unroll_steps": 4,
                "context_length": 8,
                "dropout": 0.1,
            },
            "search": {"num_simulations": 16, **search},
            "prior": {"enabled": False, "floor": 0.0, "alpha": 0.5},
            "train": {"batch_size": 4, "td_steps": 2},
            "eval": {"modes": ["world_model"]},
        }
    )
    torch.manual_seed(seed)
    policy = PriorZeroPolicy(settings, feature_size=FEATURE_SIZE, device="cpu", llm=None)
    generator = torch.Generator().manual_seed(seed)
    for p in policy._model.parameters():  # LightZero starts its heads at zero; a search needs differences
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return policy


@pytest.fixture(scope="module")
def policy():
    return make_policy()


def make_root(seed=0, *, length=1, legal=(0, 3, 5, 9), prior=None, noise=False):
    rng = np.random.default_rng(seed)
    return Root(
        features=rng.normal(size=(length, FEATURE_SIZE)).astype(np.float32),
        actions=rng.integers(NUM_ACTIONS, size=length - 1),
        legal=np.array(legal),
        prior_logprobs=None if prior is None else np.log(np.array(prior)).astype(np.float32),
        noise=rng.dirichlet(np.ones(len(legal))) if noise else None,
        seed=seed,
    )


def assert_same(a, b):
    assert a.visit_counts.tolist() == b.visit_counts.tolist()
    assert a.root_value == pytest.approx(b.root_value, abs=1e-5)
    assert a.predicted_value == pytest.approx(b.predicted_value, abs=1e-5)
    assert a.root_logits == pytest.approx(b.root_logits, abs=1e-5)


def test_a_search_does_not_depend_on_its_neighbours(policy):
    roots = [make_root(s, length=1 + s % 4, legal=range(2 + s), noise=s % 2 == 0) for s in range(6)]
    together = policy.search(roots, num_actions=NUM_ACTIONS)
    for i in (5, 0, 3, 1):
        assert_same(policy.search([roots[i]], num_actions=NUM_ACTIONS)[0], together[i])
    backwards = policy.search(roots[::-1], num_actions=NUM_ACTIONS)
    for a, b in zip(together, backwards[::-1], strict=True):
        assert_same(a, b)
    assert len({tuple(r.visit_counts) for r in together}) > 1


def test_the_same_parameters_give_the_same_search_whatever_came_between(policy):
    root = make_root(1, length=3)
    first = policy.search([root], num_actions=NUM_ACTIONS)[0]
    state = {name: tensor.clone() for name, tensor in policy.world_model_state().items()}
    for s in range(5):
        policy.search([make_root(s, length=2)], num_actions=NUM_ACTIONS)
    with torch.no_grad():
        for p in policy._model.parameters():
            p += 0.5
    random.seed(123)
    other = policy.search([root], num_actions=NUM_ACTIONS)[0]
    policy.load_world_model_state(state)
    again = policy.search([root], num_actions=NUM_ACTIONS)[0]
    assert_same(first, again)
    assert first.root_value != pytest.approx(other.root_value, abs=1e-3)


def test_commands_given_before_are_proposed_less():
    policy, plain = make_policy(tries_exponent=0.5), make_policy()
    tries = np.array([99, 0, 3, 0])
    before = make_root(2, prior=[0.7, 0.1, 0.1, 0.1])
    root = dataclasses.replace(before, tries=tries)
    fresh, worn = (policy.search([r], num_actions=NUM_ACTIONS)[0] for r in (before, root))
    assert worn.root_logits == pytest.approx(fresh.root_logits - np.log([10, 1, 2, 1]), abs=1e-5)
    assert worn.visit_counts[0] < fresh.visit_counts[0]
    assert_same(*(plain.search([r], num_actions=NUM_ACTIONS)[0] for r in (before, root)))


def test_ties_are_drawn_from_the_roots_own_seed():
    policy = make_policy()
    with torch.no_grad():  # all priors and values alike: every choice is a tie
        for head in ("head_policy", "head_value", "head_rewards"):
            last = getattr(policy._model.world_model, head).head_module[-1]
            last.weight.zero_()
            last.bias.zero_()
    root = make_root(7, legal=range(10))
    other = Root(root.features, root.actions, root.legal, seed=8)
    runs = [policy.search([r], num_actions=NUM_ACTIONS)[0].visit_counts.tolist() for r in (root, root, other)]
    assert runs[0] == runs[1] != runs[2]


def test_random_is_left_as_it_was(policy):
    random.seed(5)
    want = random.Random(5).random()
    policy.search([make_root()], num_actions=NUM_ACTIONS)
    assert random.random() == want


def test_visits_are_counted_over_the_legal_actions(policy):
    result = policy.search([make_root(legal=(2, 7, 11))], num_actions=NUM_ACTIONS)[0]
    assert result.visit_counts.shape == result.policy_logits.shape == result.root_logits.shape == (3,)
    assert result.visit_counts.sum() == 16


def test_below_the_root_only_actions_that_exist_are_taken(policy, monkeypatch):
    taken = []
    step = policy.inference.step

    def watched(contexts, actions):
        taken.extend(actions.tolist())
        return step(contexts, actions)

    monkeypatch.setattr(policy.inference, "step", watched)
    policy.search([make_root(s, legal=(0, 1, 2)) for s in range(4)], num_actions=6)
    assert len(taken) == 4 * 16 and set(taken) <= set(range(6)) and max(taken) > 2


@pytest.mark.parametrize("combine", ["replace", "mix"])
def test_the_prior_draws_the_visits(combine):
    policy = make_policy(num_simulations=32)
    policy.search_cfg.combine = combine
    policy.search_cfg.floor = 0.0
    with torch.no_grad():  # no value differences: visits follow the root logits
        for head in ("head_value", "head_rewards"):
            for p in getattr(policy._model.world_model, head).parameters():
                p.zero_()
    for favourite in range(4):
        prior = np.full(4, 0.01)
        prior[favourite] = 0.97
        result = policy.search([make_root(prior=prior)], num_actions=NUM_ACTIONS)[0]
        assert result.visit_counts.argmax() == favourite
        if combine == "replace":
            assert np.exp(result.root_logits) == pytest.approx(prior, rel=1e-3)
            assert result.visit_counts[favourite] > 25


def test_prior_order_is_that_of_the_legal_actions(policy):
    """The prior of the k-th valid action reaches the k-th valid action, whatever its index in the vocabulary."""
    policy.search_cfg.combine = "replace"
    try:
        prior = [0.1, 0.2, 0.3, 0.4]
        for legal in ((0, 3, 5, 9), (9, 5, 3, 0), (11, 0, 10, 1)):
            result = policy.search([make_root(legal=legal, prior=prior)], num_actions=NUM_ACTIONS)[0]
            assert np.exp(result.root_logits) == pytest.approx(prior, rel=1e-3)
    finally:
        policy.search_cfg.combine = "mix"


def test_visits_follow_actions_not_places(policy):
    """Listing the valid actions in another order permutes the result and changes nothing else."""
    order = [2, 0, 3, 1]
    legal, prior = np.array([0, 3, 5, 9]), np.array([0.1, 0.2, 0.3, 0.4])
    a = policy.search([make_root(legal=legal, prior=prior)], num_actions=NUM_ACTIONS)[0]
    b = policy.search([make_root(legal=legal[order], prior=prior[order])], num_actions=NUM_ACTIONS)[0]
    assert a.visit_counts[order].tolist() == b.visit_counts.tolist()


def test_inference_equals_lightzeros_training_forward(policy):
    """Values, policies, rewards and latents of a context against the sequence forward that the losses use."""
    policy._model.eval()
    wm = policy._model.world_model
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4, FEATURE_SIZE)).astype(np.float32)
    actions = rng.integers(NUM_ACTIONS, size=4)
    with torch.no_grad():
        embeddings = wm.tokenizer.encode_to_obs_embeddings(torch.from_numpy(features)[None])
        want = wm.forward(
            {"obs_embeddings_and_act_tokens": (embeddings, torch.from_numpy(actions)[None, :, None])},
            start_pos=torch.zeros(1, 4),
        )
        root = Root(features[:3], actions[:2], np.arange(4))
        contexts = policy.inference.root_contexts([root])
        logits, values = policy.inference.predict(contexts)
        assert logits[0] == pytest.approx(want.logits_policy[0, 2].numpy(), abs=1e-5)
        to_scalar = policy.inverse_scalar_transform_handle
        assert values[0] == pytest.approx(to_scalar(want.logits_value[0, 2:3]).item(), abs=1e-4)
        children, rewards = policy.inference.step(contexts, actions[2:3])
        assert rewards[0] == pytest.approx(to_scalar(want.logits_rewards[0, 2:3]).item(), abs=1e-4)
        assert children[0][-1].numpy() == pytest.approx(want.logits_observations[0, 2].numpy(), abs=1e-5)


def test_contexts_stay_within_their_length_and_begin_with_an_observation(policy):
    with torch.no_grad():
        contexts = policy.inference.root_contexts([make_root(length=4)])
        assert len(contexts[0]) == 7
        for _ in range(3):
            before = contexts[0]
            contexts, _ = policy.inference.step(contexts, np.array([1]))
            assert len(contexts[0]) == 7
            assert torch.equal(contexts[0][:5], before[2:])


@pytest.mark.parametrize("tree", ["python", "cpp"])
def test_the_search_finds_a_reward_behind_a_step(tree):
    """A hand-made model: action 1 leads to a reward of 5, then nothing; the others lead to nothing."""

    class Model:
        def root_contexts(self, roots):
            return [torch.zeros(1, 1) for _ in roots]

        def predict(self, contexts):
            return np.zeros((len(contexts), 3), dtype=np.float32), np.zeros(len(contexts), dtype=np.float32)

        def step(self, contexts, actions):
            new = [torch.cat([c, torch.full((1, 1), float(a))]) for c, a in zip(contexts, actions, strict=True)]
            return new, np.array(
                [5.0 if a == 1 and len(c) == 1 else 0.0 for c, a in zip(contexts, actions, strict=True)]
            )

    from priorzero.search.mcts import search

    cfg = EasyDict(
        num_simulations=40, tree=tree, pb_c_base=19652, pb_c_init=1.25, discount_factor=0.9, root_noise_weight=0.25,
        combine="mix", alpha=0.5, floor=0.0,
    )  # fmt: skip
    results = search(Model(), [make_root(legal=(0, 1, 2)), make_root(legal=(2, 1))], cfg=cfg, num_actions=3)
    assert results[0].visit_counts.argmax() == 1 and results[1].visit_counts.argmax() == 1
    assert results[0].visit_counts.sum() == 40 and results[0].root_value > 2


@pytest.mark.parametrize("ties", [False, True])
def test_the_tree_is_lightzeros_digit_for_digit(monkeypatch, ties):
    policy = make_policy(num_simulations=40)
    if ties:
        with torch.no_grad():
            for head in ("head_policy", "head_value", "head_rewards"):
                last = getattr(policy._model.world_model, head).head_module[-1]
                last.weight.zero_()
                last.bias.zero_()
    roots = [make_root(s, length=1 + s % 4, legal=range(11 - s, -1, -1), noise=s % 2 == 0) for s in range(10)]
    ours = policy.search(roots, num_actions=NUM_ACTIONS)
    monkeypatch.setattr("priorzero.search.mcts.python_tree", ptree_mz)
    for a, b in zip(ours, policy.search(roots, num_actions=NUM_ACTIONS), strict=True):
        assert a.visit_counts.tolist() == b.visit_counts.tolist()
        assert a.root_value == b.root_value
    assert len({tuple(r.visit_counts) for r in ours}) > 1
