"""The dual-model policy: one call updates both models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from priorzero.search.base import Root
from priorzero.types import UserError
from tests.helpers.models import make_tiny_llm
from tests.helpers.segments import FEATURE_SIZE, demo_record
from tests.helpers.world_models import make_policy_and_buffer


def copies(parameters):
    return [p.detach().clone() for p in parameters]


def world_model_parameters(policy):
    return [p for _, p in policy.trained_world_model_parameters()]


def test_policy_is_registered_with_di_engine_as_priorzero():
    from ding.utils import POLICY_REGISTRY

    from priorzero.policy import PriorZeroPolicy

    assert POLICY_REGISTRY.get("priorzero") is PriorZeroPolicy


def test_forward_learn_updates_both_models(smollm2):
    policy, buffer = make_policy_and_buffer(make_tiny_llm(smollm2.tokenizer))
    llm_parameters = list(policy.llm_learner.llm.model.parameters())
    wm, llm = copies(world_model_parameters(policy)), copies(llm_parameters)
    metrics = policy._forward_learn((buffer.sample(8, policy), 0, True))
    assert any(not torch.equal(a, b) for a, b in zip(world_model_parameters(policy), wm, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(llm_parameters, llm, strict=True))
    assert policy.llm_version == 1
    assert metrics["train/total_loss"] == pytest.approx(metrics["train/wm_total_loss"] + metrics["train/llm_loss"])
    assert metrics["train/llm_loss"] == pytest.approx(
        0.5 * metrics["train/llm_sft_loss"] + 0.3 * metrics["train/llm_rft_loss"]
    )


def test_forward_learn_leaves_the_llm_alone_when_not_asked_for(smollm2):
    policy, buffer = make_policy_and_buffer(make_tiny_llm(smollm2.tokenizer))
    llm_parameters = list(policy.llm_learner.llm.model.parameters())
    llm = copies(llm_parameters)
    metrics = policy._forward_learn((buffer.sample(8, policy), 0, False))
    assert all(torch.equal(a, b) for a, b in zip(llm_parameters, llm, strict=True))
    assert policy.llm_version == 0 and "train/llm_sft_loss" not in metrics
    assert metrics["train/total_loss"] == metrics["train/wm_total_loss"]


def test_forward_learn_reports_no_llm_loss_if_no_decision_can_be_used(smollm2, monkeypatch):
    policy, buffer = make_policy_and_buffer(make_tiny_llm(smollm2.tokenizer))
    monkeypatch.setattr(policy.llm_learner, "samples", lambda records, returns, **_: ([], len(records)))
    metrics = policy._forward_learn((buffer.sample(8, policy), 0, True))
    assert metrics["train/llm_samples_skipped"] == 4 and "train/llm_loss" not in metrics
    assert metrics["train/total_loss"] == metrics["train/wm_total_loss"] and policy.llm_version == 0


def test_forward_collect_and_forward_eval_search():
    policy, _ = make_policy_and_buffer()
    root = Root(np.ones((1, FEATURE_SIZE), np.float32), np.zeros(0, np.int64), np.arange(3))
    results = [f([root], num_actions=4)[0] for f in (policy.search, policy._forward_collect, policy._forward_eval)]
    assert {tuple(result.visit_counts) for result in results} == {tuple(results[0].visit_counts)}


def test_search_says_which_setting_to_lower_if_the_world_model_is_not_finite():
    policy, _ = make_policy_and_buffer()
    with torch.no_grad():
        policy.network.world_model.head_value.head_module[-1].bias.fill_(float("nan"))
    root = Root(np.zeros((1, FEATURE_SIZE), np.float32), np.zeros(0, np.int64), np.arange(3))
    with pytest.raises(UserError, match=r"not finite; lower train\.learning_rate"):
        policy.search([root], num_actions=3)


def test_training_state_restores_optimisers_and_counters_but_not_the_learning_rates(smollm2):
    policy, buffer = make_policy_and_buffer(make_tiny_llm(smollm2.tokenizer))
    policy.fit_features(buffer.features())
    policy._forward_learn((buffer.sample(8, policy), 0, True))
    state = policy.training_state()
    for optimizer in (state["optimizer"], state["llm_optimizer"]):
        optimizer["param_groups"][0]["lr"] = 123.0
    other, _ = make_policy_and_buffer(make_tiny_llm(smollm2.tokenizer), seed=1)
    other.load_world_model_state(policy.world_model_state())
    other.load_training_state(state)
    again = other.training_state()
    assert again["llm_version"] == 1 and again["features_are_fitted"]
    assert all(torch.equal(tensor, again["target"][name]) for name, tensor in state["target"].items())
    for name in ("optimizer", "llm_optimizer"):
        assert {group["lr"] for group in again[name]["param_groups"]} == {1e-2}
        moments = zip(again[name]["state"].values(), state[name]["state"].values(), strict=True)
        assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in moments)


@pytest.mark.parametrize("num_imitated", [0, 1, 4])
def test_llm_decisions_are_those_of_the_sample_and_the_imitated_ones(smollm2, num_imitated):
    """``llm.batch_size`` is 4. The imitated decisions replace the last ones of the sample."""
    policy, buffer = make_policy_and_buffer(make_tiny_llm(smollm2.tokenizer))
    sequences = buffer.sample(8, policy).sequences
    imitated = [demo_record(step, episode=99) for step in range(num_imitated)]
    decisions = policy.llm_decisions(sequences, imitated)
    count = 4 - num_imitated
    assert decisions.num_imitated == num_imitated
    assert [record.episode == 99 for record in decisions.records] == [False] * count + [True] * num_imitated
    assert len(decisions.returns) == len(decisions.weights) == 4
    assert decisions.weights[count:].tolist() == [1.0] * num_imitated
    if count:
        own = sequences.decisions(count, run_length=policy.llm_cfg.run_length)
        assert decisions.records[:count] == own.records
        assert decisions.returns[:count].tolist() == own.returns.tolist()
        assert decisions.weights[:count].tolist() == own.weights.tolist()
    metrics = policy.learn_llm(decisions)
    assert metrics["train/llm_samples_skipped"] == 0 and metrics["train/llm_sft_loss"] > 0
    assert (metrics["train/llm_rft_loss"] == 0) == (count == 0)
