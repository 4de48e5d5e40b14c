"""The world model: importance weights, priorities, updates that are not finite, and inference for the search."""

from __future__ import annotations

import copy
import dataclasses
import sys

import numpy as np
import pytest
import torch

from priorzero.search.base import Root
from priorzero.types import NonFiniteError
from priorzero.world_model.inference import WorldModelInference
from tests.helpers.segments import FEATURE_SIZE, demo_segments
from tests.helpers.world_models import make_policy_and_buffer, make_root, make_search_policy


def parameters(policy):
    return torch.cat([p.detach().ravel().clone() for _, p in policy.trained_world_model_parameters()])


def gradient(weights):
    """Gradient of the world model's loss of one fixed batch under the given importance weights."""
    policy, buffer = make_policy_and_buffer()
    batch = dataclasses.replace(buffer.sample(8, policy), weights=np.asarray(weights, dtype=np.float64))
    gradients = {}
    for name, p in policy.trained_world_model_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: gradients.__setitem__(name, p.grad.clone()))
    policy.learn_world_model(batch, train_iter=0)
    return torch.cat([gradients[name].ravel() for name in sorted(gradients)])


def test_learn_world_model_weights_the_gradient_of_each_sequence():
    whole = gradient(np.ones(8))
    assert whole.norm() > 1e-3
    assert (gradient(np.full(8, 0.5)) - 0.5 * whole).norm() / whole.norm() < 1e-5
    first, rest = gradient(np.eye(8)[0]), gradient(1 - np.eye(8)[0])
    assert (first + rest - whole).norm() / whole.norm() < 1e-4
    assert first.norm() > 1e-4
    assert gradient(np.zeros(8)).norm() == 0


def test_learn_world_model_lowers_the_loss_and_returns_the_errors_of_the_first_values_as_priorities():
    policy, buffer = make_policy_and_buffer()
    batch = buffer.sample(8, policy)
    # The value head is initialised with zeros, where all values are the same.
    losses = [policy.learn_world_model(batch, train_iter=n)["train/wm_total_loss"] for n in range(60)]
    assert losses[40] < 0.7 * losses[0]
    world_model = policy.network.world_model.train()
    observations = torch.as_tensor(batch.features.reshape(8, -1, FEATURE_SIZE)[:, :-1])
    actions = torch.as_tensor(batch.actions)[:, :, None]
    with torch.no_grad():
        embeddings = world_model.tokenizer.encode_to_obs_embeddings(observations)
        output = world_model.forward(
            {"obs_embeddings_and_act_tokens": (embeddings, actions)}, start_pos=torch.zeros(8, 4)
        )
        values = policy.inverse_scalar_transform_handle(output.logits_value[:, 0]).reshape(-1).numpy()
    metrics = policy.learn_world_model(batch, train_iter=5)
    assert metrics["priorities"] == pytest.approx(np.abs(values - batch.value_targets[:, 0]), rel=1e-3, abs=1e-3)
    assert np.std(values) > 0.02


def test_learn_world_model_accepts_episodes_of_one_decision():
    policy, buffer = make_policy_and_buffer()
    buffer.push(demo_segments(policy._cfg, lengths=[1] * 300))
    buffer.game_pos_priorities[:31] = 1e-300
    batch = buffer.sample(8, policy)
    assert {len(segment.records) for segment in batch.sequences.segments} == {1}
    metrics = policy.learn_world_model(batch, train_iter=0)
    assert np.isfinite(metrics["train/wm_total_loss"]) and metrics["train/wm_total_loss"] > 0


def complete_state(policy):
    """Parameters and running statistics of both networks, and the optimiser's moments."""
    state = policy.training_state()
    moments = [m[key] for m in state["optimizer"]["state"].values() for key in ("exp_avg", "exp_avg_sq", "step")]
    tensors = [*policy.world_model_state().values(), *state["target"].values(), *moments]
    return [t.detach().clone() for t in tensors]


def is_unchanged(policy, before):
    return all(torch.equal(a, b) for a, b in zip(complete_state(policy), before, strict=True))


@pytest.mark.parametrize("name", ["features", "rewards", "value_targets"])
def test_learn_world_model_rejects_a_batch_that_is_not_finite(name):
    policy, buffer = make_policy_and_buffer()
    policy.learn_world_model(buffer.sample(8, policy), train_iter=0)
    before = complete_state(policy)
    batch = buffer.sample(8, policy)
    values = np.array(getattr(batch, name), dtype=np.float32)
    values.flat[3] = np.inf
    words = name.replace("_", " ")
    with pytest.raises(NonFiniteError, match=f"the world model's {words} are not finite in update 7"):
        policy.learn_world_model(dataclasses.replace(batch, **{name: values}), train_iter=7)
    assert is_unchanged(policy, before)


def test_learn_world_model_names_the_loss_that_is_not_finite():
    policy, buffer = make_policy_and_buffer()
    policy.learn_world_model(buffer.sample(8, policy), train_iter=0)
    batch = buffer.sample(8, policy)
    with torch.no_grad():
        policy.network.world_model.head_value.head_module[-1].bias.fill_(float("nan"))
    before = complete_state(policy)
    with pytest.raises(NonFiniteError, match=r"value loss .* update 3; lower train\.learning_rate"):
        policy.learn_world_model(batch, train_iter=3)
    after = complete_state(policy)
    assert all(torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5)) for a, b in zip(after, before, strict=True))


def test_learn_world_model_does_not_apply_a_gradient_that_is_not_finite():
    policy, buffer = make_policy_and_buffer()
    policy.learn_world_model(buffer.sample(8, policy), train_iter=0)
    before = complete_state(policy)
    parameter = policy.network.world_model.head_rewards.head_module[0].weight
    hook = parameter.register_hook(lambda gradient: gradient * float("nan"))
    # The message names the first parameter in the model's order, since clipping makes all gradients NaN.
    with pytest.raises(NonFiniteError, match=r"the gradient of .* is not finite in update 5"):
        policy.learn_world_model(buffer.sample(8, policy), train_iter=5)
    assert is_unchanged(policy, before)
    hook.remove()
    policy.learn_world_model(buffer.sample(8, policy), train_iter=5)
    assert not is_unchanged(policy, before)


def test_policy_is_inconsistent_after_an_optimiser_step_that_failed_halfway(monkeypatch):
    policy, buffer = make_policy_and_buffer()
    policy.learn_world_model(buffer.sample(8, policy), train_iter=0)
    assert policy.is_consistent

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[torch.optim.Adam.__module__], "adam", fail)  # of which AdamW is a subclass
        with pytest.raises(torch.OutOfMemoryError):
            policy.learn_world_model(buffer.sample(8, policy), train_iter=1)
    assert not policy.is_consistent
    policy.learn_world_model(buffer.sample(8, policy), train_iter=1)
    assert policy.is_consistent


def test_learn_world_model_raises_other_errors_of_lightzero_as_they_are(monkeypatch):
    policy, buffer = make_policy_and_buffer()

    def fail(*_):
        raise ValueError("wrong shape")

    monkeypatch.setattr(policy.network.world_model, "compute_loss", fail)
    with pytest.raises(ValueError, match="wrong shape"):
        policy.learn_world_model(buffer.sample(8, policy), train_iter=0)


def test_world_model_state_restores_the_world_model_and_the_standardisation():
    policy, buffer = make_policy_and_buffer()
    policy.fit_features(buffer.features())
    policy.learn_world_model(buffer.sample(8, policy), train_iter=0)
    state = policy.world_model_state()
    assert not any("_orig_mod" in name for name in state)
    other, _ = make_policy_and_buffer(seed=1)
    assert not torch.equal(parameters(other), parameters(policy))
    other.load_world_model_state(state)
    assert torch.equal(parameters(other), parameters(policy))
    root = make_root(length=2, num_actions=8)
    assert torch.equal(*(p.inference.root_contexts([root])[0].tokens for p in (policy, other)))


def test_fit_features_standardises_the_input_of_both_networks():
    policy, buffer = make_policy_and_buffer()
    features = buffer.features()
    assert len(features) == 31 and not policy.features_are_fitted
    features[:, 2] = 7.0  # without variation: only shifted
    plain, _ = make_policy_and_buffer()
    policy.fit_features(features)
    assert policy.features_are_fitted
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    deviation[2] = 1.0
    standardised = (features[:5] - mean) / deviation
    for name in ("network", "target_network"):
        fitted, unfitted = (getattr(p, name).eval().world_model.tokenizer for p in (policy, plain))
        with torch.no_grad():
            embedded = fitted.encode_to_obs_embeddings(torch.as_tensor(features[:5]))
            expected = unfitted.encode_to_obs_embeddings(torch.as_tensor(standardised))
            not_standardised = unfitted.encode_to_obs_embeddings(torch.as_tensor(features[:5]))
        assert torch.allclose(embedded, expected, atol=1e-5)
        assert not torch.allclose(embedded, not_standardised, atol=1e-3)


@pytest.fixture(scope="module")
def search_policy():
    policy = make_search_policy()
    policy.network.eval()
    return policy


def test_inference_equals_the_forward_pass_of_lightzeros_losses(search_policy):
    """Values, policies, rewards and latent states of one context against the pass over the whole sequence."""
    world_model, inference = search_policy.network.world_model, search_policy.inference
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4, FEATURE_SIZE)).astype(np.float32)
    actions = rng.integers(12, size=4)
    to_scalar = search_policy.inverse_scalar_transform_handle
    with torch.no_grad():
        embeddings = world_model.tokenizer.encode_to_obs_embeddings(torch.from_numpy(features)[None])
        expected = world_model.forward(
            {"obs_embeddings_and_act_tokens": (embeddings, torch.from_numpy(actions)[None, :, None])},
            start_pos=torch.zeros(1, 4),
        )
        contexts = inference.root_contexts([Root(features[:3], actions[:2], np.arange(4))])
        logits, values = inference.predict(contexts)
        children, rewards = inference.step(contexts, actions[2:3])
        assert logits[0] == pytest.approx(expected.logits_policy[0, 2].numpy(), abs=1e-5)
        assert values[0] == pytest.approx(to_scalar(expected.logits_value[0, 2:3]).item(), abs=1e-4)
        assert rewards[0] == pytest.approx(to_scalar(expected.logits_rewards[0, 2:3]).item(), abs=1e-4)
        child = children[0].tokens[children[0].length - 1]
        assert child.numpy() == pytest.approx(expected.logits_observations[0, 2].numpy(), abs=1e-5)


def test_inference_drops_the_oldest_step_of_a_full_context(search_policy):
    with torch.no_grad():
        contexts = search_policy.inference.root_contexts([make_root(length=4)])
        assert contexts[0].length == 7
        for _ in range(3):
            before = contexts[0].tokens
            contexts, _ = search_policy.inference.step(contexts, np.array([1]))
            assert contexts[0].length == 7
            assert torch.equal(contexts[0].tokens[:5], before[2:7])
            assert not contexts[0].tokens[7:].any()


def test_inference_reads_no_result_in_a_forward_pass(search_policy):
    """A CUDA graph cannot record a pass that does. On the device ``meta``, reading a value fails."""
    network = copy.deepcopy(search_policy.network).to("meta")
    inference = WorldModelInference(network)
    tokens = torch.zeros(3, 8, 32, device="meta")
    lengths, actions = torch.ones(2, 3, dtype=torch.long, device="meta")
    with torch.no_grad():
        policy_logits, values = inference.predict_tensors(tokens, lengths)
        followed, rewards = inference.step_tensors(tokens, lengths, actions)
    assert (policy_logits.shape, values.shape) == ((3, 16), (3,))
    assert (followed.shape, rewards.shape) == ((3, 8, 32), (3,))
