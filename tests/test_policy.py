"""The dual-model policy: one call learns both models; importance weights and priorities do what they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from priorzero.config import resolve_settings
from priorzero.policy import PriorZeroPolicy
from priorzero.search.base import Root
from priorzero.types import NonFiniteError, UserError
from priorzero.world_model.lightzero import unizero_config
from priorzero.world_model.replay import PriorZeroGameBuffer
from tests.helpers.models import make_tiny_llm
from tests.helpers.segments import FEATURE_SIZE, demo_segments


def setup(llm=None, *, dropout=0.0, seed=0):
    settings = resolve_settings(
        {
            "env": {"action_space_size": 8},
            "world_model": {
                "embed_dim": 16, "num_heads": 2, "num_unroll_steps": 4, "context_length": 4, "dropout": dropout,
            },
            "replay": {"segment_length": 6},
            "train": {"batch_size": 8, "td_steps": 2, "learning_rate": 1e-2, "grad_clip": 1e9},
            "llm": {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2},
        }
    )  # fmt: skip
    torch.manual_seed(seed)
    policy = PriorZeroPolicy(settings, feature_size=FEATURE_SIZE, device="cpu", llm=llm)
    config = unizero_config(settings, feature_size=FEATURE_SIZE, device="cpu")
    buffer = PriorZeroGameBuffer(config, rng=np.random.default_rng(seed))
    buffer.push(demo_segments(config, lengths=[5, 17, 9]))
    return policy, buffer


def world_model(policy):
    return torch.cat([p.detach().ravel().clone() for _, p in policy.trained_world_model_parameters()])


def gradient(weights):
    """Gradient of the world model's loss for one fixed batch under the given importance weights."""
    policy, buffer = setup()
    batch = buffer.sample(8, policy)
    batch[0][5] = np.asarray(weights, dtype=np.float64)
    taken = {}
    for name, p in policy.trained_world_model_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: taken.__setitem__(name, p.grad.clone()))
    policy.learn_world_model(batch, train_iter=0)
    return torch.cat([taken[name].ravel() for name in sorted(taken)])


def test_importance_weights_weigh_the_gradient():
    whole = gradient(np.ones(8))
    assert whole.norm() > 1e-3
    assert (gradient(np.full(8, 0.5)) - 0.5 * whole).norm() / whole.norm() < 1e-5
    first, rest = np.eye(8)[0], 1 - np.eye(8)[0]
    assert (gradient(first) + gradient(rest) - whole).norm() / whole.norm() < 1e-4
    assert gradient(first).norm() > 1e-4
    assert gradient(np.zeros(8)).norm() == 0


def test_priorities_are_the_errors_of_the_first_values():
    policy, buffer = setup()
    batch = buffer.sample(8, policy)
    for train_iter in range(60):  # the value head starts at zero, where all values are alike
        policy.learn_world_model(batch, train_iter=train_iter)
    world_model = policy._model.world_model.train()
    observations = torch.as_tensor(batch[0][0].reshape(8, -1, FEATURE_SIZE)[:, :-1])
    actions = torch.as_tensor(batch[0][1])[:, :, None]
    with torch.no_grad():
        embeddings = world_model.tokenizer.encode_to_obs_embeddings(observations)
        output = world_model.forward(
            {"obs_embeddings_and_act_tokens": (embeddings, actions)}, start_pos=torch.zeros(8, 4)
        )
        values = policy.inverse_scalar_transform_handle(output.logits_value[:, 0]).reshape(-1).numpy()
    metrics = policy.learn_world_model(batch, train_iter=5)
    assert metrics["priorities"] == pytest.approx(np.abs(values - batch[1][1][:, 0]), rel=1e-3, abs=1e-3)
    assert np.std(values) > 0.02


def test_one_call_learns_both_models(smollm2):
    policy, buffer = setup(make_tiny_llm(smollm2.tokenizer))
    llm_parameters = list(policy.llm_learner.llm.model.parameters())
    wm, llm = world_model(policy), [p.detach().clone() for p in llm_parameters]
    metrics = policy._forward_learn([*buffer.sample(8, policy), 0, True])
    assert not torch.equal(world_model(policy), wm)
    assert all(not torch.equal(a, b) for a, b in zip(llm_parameters, llm, strict=True))
    assert policy.llm_version == 1
    assert metrics["train/total_loss"] == pytest.approx(metrics["train/wm_total_loss"] + metrics["train/llm_loss"])
    assert metrics["train/llm_loss"] == pytest.approx(
        0.5 * metrics["train/llm_sft_loss"] + 0.3 * metrics["train/llm_rft_loss"]
    )


def test_the_llm_rests_when_it_is_not_its_turn(smollm2):
    policy, buffer = setup(make_tiny_llm(smollm2.tokenizer))
    llm = [p.detach().clone() for p in policy.llm_learner.llm.model.parameters()]
    metrics = policy.learn_world_model(buffer.sample(8, policy), train_iter=0)
    assert all(torch.equal(a, b) for a, b in zip(policy.llm_learner.llm.model.parameters(), llm, strict=True))
    assert policy.llm_version == 0 and "train/llm_sft_loss" not in metrics


def everything(policy):
    """Parameters and running statistics, of the model and its target, and the optimiser's moments."""
    state = policy.training_state()
    moments = [m[key] for m in state["optimizer"]["state"].values() for key in ("exp_avg", "exp_avg_sq", "step")]
    tensors = [*policy.world_model_state().values(), *state["target"].values(), *moments]
    return [t.detach().clone() for t in tensors]


def unchanged(policy, before):
    return all(torch.equal(a, b) for a, b in zip(everything(policy), before, strict=True))


def test_parameters_that_are_not_finite_end_in_a_message():
    policy, buffer = setup()
    batch = buffer.sample(8, policy)
    with torch.no_grad():
        policy._model.world_model.head_value.head_module[-1].bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"value loss .* update 3; lower train\.learning_rate"):
        policy.learn_world_model(batch, train_iter=3)
    root = Root(np.zeros((1, FEATURE_SIZE), np.float32), np.zeros(0, np.int64), np.arange(3))
    with pytest.raises(UserError, match=r"not finite; lower train\.learning_rate"):
        policy.search([root], num_actions=3)


@pytest.mark.parametrize(
    ("part", "index", "words"),
    [(0, 0, "world model's features"), (1, 0, "world model's rewards"), (1, 1, "world model's value targets")],
)
def test_a_batch_that_is_not_finite_is_not_learned_from(part, index, words):
    policy, buffer = setup()
    policy.learn_world_model(buffer.sample(8, policy), train_iter=0)
    before = everything(policy)
    batch = buffer.sample(8, policy)
    batch[part][index] = np.array(batch[part][index], dtype=np.float32)
    batch[part][index].flat[3] = np.inf
    with pytest.raises(NonFiniteError, match=f"{words} are not finite in update 7"):
        policy.learn_world_model(batch, train_iter=7)
    assert unchanged(policy, before)


def test_a_gradient_that_is_not_finite_is_not_applied():
    policy, buffer = setup()
    policy.learn_world_model(buffer.sample(8, policy), train_iter=0)
    before = everything(policy)
    parameter = policy._model.world_model.head_rewards.head_module[0].weight
    hook = parameter.register_hook(lambda gradient: gradient * float("nan"))
    # The name in the message is the first in the model's order: clipping spreads it over all of them.
    with pytest.raises(NonFiniteError, match=r"the gradient of .* is not finite in update 5"):
        policy.learn_world_model(buffer.sample(8, policy), train_iter=5)
    assert unchanged(policy, before)
    hook.remove()
    policy.learn_world_model(buffer.sample(8, policy), train_iter=5)
    assert not unchanged(policy, before)


def test_decisions_that_teach_the_llm_nothing_are_said_and_leave_no_loss(smollm2, monkeypatch):
    policy, buffer = setup(make_tiny_llm(smollm2.tokenizer))
    monkeypatch.setattr(policy.llm_learner, "samples", lambda records, returns: ([], len(records)))
    metrics = policy._forward_learn([*buffer.sample(8, policy), 0, True])
    assert metrics["train/llm_samples_skipped"] == 4 and "train/llm_loss" not in metrics
    assert metrics["train/total_loss"] == metrics["train/wm_total_loss"] and policy.llm_version == 0


def test_learning_lowers_the_loss():
    policy, buffer = setup()
    batch = buffer.sample(8, policy)
    losses = [policy.learn_world_model(batch, train_iter=i)["train/wm_total_loss"] for i in range(40)]
    assert losses[-1] < 0.7 * losses[0]


def test_state_goes_out_and_in():
    policy, buffer = setup()
    policy.learn_world_model(buffer.sample(8, policy), train_iter=0)
    state = policy.world_model_state()
    assert not any("_orig_mod" in name for name in state)
    other, _ = setup(seed=1)
    assert not torch.equal(world_model(other), world_model(policy))
    other.load_world_model_state(state)
    assert torch.equal(world_model(other), world_model(policy))


def test_standardised_features_enter_the_model_and_its_target():
    policy, buffer = setup()
    features = buffer.features()
    assert len(features) == 31 and not policy.features_are_fitted
    features[:, 2] = 7.0  # does not vary: shifted only
    plain, _ = setup()
    policy.fit_features(features)
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    deviation[2] = 1.0
    policy._model.eval(), plain._model.eval()
    with torch.no_grad():
        got = policy.inference.encode(features[:5])
        want = plain.inference.encode((features[:5] - mean) / deviation)
        assert torch.allclose(got, want, atol=1e-5)
        assert not torch.allclose(got, plain.inference.encode(features[:5]), atol=1e-3)
    for encoder in policy._encoders():
        assert encoder.feature_mean.tolist() == pytest.approx(mean.tolist())
    again, _ = setup(seed=1)
    again.load_world_model_state(policy.world_model_state())
    assert all(torch.equal(e.feature_deviation, policy._encoders()[0].feature_deviation) for e in again._encoders())


def test_games_of_one_command_can_be_learned_from():
    policy, buffer = setup()
    buffer.push(demo_segments(policy._cfg, lengths=[1] * 300))  # more than the buffer keeps of the others
    buffer.game_pos_priorities[:31] = 1e-300
    batch = buffer.sample(8, policy)
    assert {len(segment.records) for segment in batch[2].segments} == {1}
    metrics = policy.learn_world_model(batch, train_iter=0)
    assert np.isfinite(metrics["train/wm_total_loss"]) and metrics["train/wm_total_loss"] > 0
