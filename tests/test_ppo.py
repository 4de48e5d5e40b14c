"""Tests of PPO for the LLM: its training data, its learner, and learners in several processes."""

from __future__ import annotations

import dataclasses
import io
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

from priorzero.cluster.ppo.learner import PPOLearner
from priorzero.cluster.ppo.trajectories import (
    Trajectory,
    credit_weights,
    generalised_advantages,
    newest,
    scaled_rewards,
    trajectories_from,
)
from priorzero.llm.models import load_language_model
from priorzero.llm.prompts import prompt_style
from priorzero.runtime.process_group import ProcessGroup
from priorzero.types import ActionPrior
from tests.helpers.models import make_settings, make_tiny_llm
from tests.helpers.ppo import train_in_group
from tests.helpers.records import record
from tests.helpers.segments import demo_config, demo_segments


def test_trajectories_from_makes_one_of_each_segment():
    config = demo_config(segment_length=4)
    whole, rest = trajectories_from(demo_segments(config, lengths=[7]))
    assert [r.step for r in whole.records] == [0, 1, 2, 3] and whole.bootstrap_prompt == "prompt of episode 0, step 4"
    assert [r.step for r in rest.records] == [4, 5, 6] and rest.bootstrap_prompt is None
    assert all(len(r.features) == 0 for r in (*whole.records, *rest.records))
    # Truncated, by the move limit or because the game failed: the state of the last decision bootstraps.
    (cut_short,) = trajectories_from(demo_segments(config, lengths=[3], ends=False))
    assert [r.step for r in cut_short.records] == [0, 1] and cut_short.bootstrap_prompt.endswith("step 2")
    assert trajectories_from([]) == []


def test_newest_keeps_the_last_decisions():
    def trajectory(e, n):
        return Trajectory(tuple(record(10 * e + t) for t in range(n)), None)

    three = [trajectory(0, 3), trajectory(1, 4), trajectory(2, 2)]
    assert newest(three, limit=0) == newest(three, limit=9) == three
    assert newest(three, limit=6) == three[1:] and newest(three, limit=2) == three[2:]
    cut, whole = newest(three, limit=4)
    assert whole == three[2] and [r.step for r in cut.records] == [10, 11] and cut.bootstrap_prompt == "Where to? 12"
    assert newest([], limit=4) == []


def test_scaled_rewards_are_points_times_the_scale():
    records = [dataclasses.replace(record(), reward=10.0, shaping=0.5), dataclasses.replace(record(), reward=0.0)]
    assert scaled_rewards(records, cfg=make_settings().ppo).tolist() == [10.0, 0.0]
    scaled = make_settings({"ppo": {"reward_scale": 0.1}}).ppo
    assert scaled_rewards(records, cfg=scaled) == pytest.approx([1.0, 0.0])


def test_credit_weights_are_truncated_importance_weights():
    prior = ActionPrior(np.log([0.1, 0.6, 0.2, 0.1]).astype(np.float32), "score", 0)
    records = [
        dataclasses.replace(record(chosen=0), prior=prior, behaviour_prob=0.5),  # 0.1 / 0.5
        dataclasses.replace(record(chosen=1), prior=prior, behaviour_prob=0.3),  # 2, truncated to 1
        dataclasses.replace(record(chosen=1), prior=dataclasses.replace(prior, source="uniform")),  # not the LLM's
        dataclasses.replace(record(chosen=1), prior=None),
    ]
    settings = make_settings()
    assert credit_weights(records, cfg=settings.ppo) == pytest.approx([0.2, 1.0, 0.0, 0.0])
    settings.ppo.credit = "none"
    assert credit_weights(records, cfg=settings.ppo).tolist() == [1.0, 1.0, 0.0, 0.0]


# ---- learning ----


def ppo_settings(*, kl_weight=0.0, **ppo):
    return make_settings(
        {
            "llm": {"learning_rate": 3e-3, "batch_size": 8, "micro_batch_size": 2, "kl_weight": kl_weight},
            "search": {"discount_factor": 0.9},
            "ppo": {"critic_learning_rate": 3e-3, "critic_warmup_steps": 0, "value_clip": 0.0, "max_decisions": 0},
        },
        {"ppo": ppo},
    )


def make_learner(tokenizer, settings):
    llm = make_tiny_llm(tokenizer)
    if settings.llm.kl_weight:
        llm = dataclasses.replace(llm, reference=make_tiny_llm(tokenizer).model.requires_grad_(False))
    return PPOLearner(llm, settings, style=prompt_style(settings), group=ProcessGroup())


def prior_logprobs(learner, records):
    """The LLM's prior ``[4]`` of each record."""
    samples, _ = learner.actor.prepare(records)
    with torch.no_grad():
        rows = [learner.actor.objective_logprobs([s], *learner.llm.token_logprobs([s.row]))[0] for s in samples]
    return [row[:, 0].numpy() for row in rows]


def make_episodes(learner, choices, *, version=0):
    """Episodes of one step in which the LLM's prior chose ``choices``; "go north" (1) gains a point."""
    priors = prior_logprobs(learner, [record(t, rollout=np.zeros(4)) for t in range(len(choices))])
    trajectories = []
    for t, (choice, logprobs) in enumerate(zip(choices, priors, strict=True)):
        prior = ActionPrior(logprobs, "score", version, rollout_logprobs=np.zeros(4))
        decision = dataclasses.replace(
            record(t, chosen=choice),
            prior=prior,
            reward=float(choice == 1),
            done=True,
            behaviour_prob=float(np.exp(logprobs[choice])),
        )
        trajectories.append(Trajectory((decision,), None))
    return trajectories


def logprobs_of_rewarded(learner, trajectories):
    return [float(logprobs[1]) for logprobs in prior_logprobs(learner, [t.records[0] for t in trajectories])]


@pytest.mark.slow
def test_ppo_steps_make_rewarded_actions_more_probable_and_lower_the_value_loss(smollm2):
    learner = make_learner(smollm2.tokenizer, ppo_settings())
    first = make_episodes(learner, [1, 0, 1, 2, 1, 3, 0, 1])
    before, metrics = logprobs_of_rewarded(learner, first), []
    for step in range(1, 11):
        episodes = make_episodes(learner, [1, 0, 1, 2, 1, 3, 0, 1], version=learner.version)
        metrics.append(learner.step(episodes, step_id=step).metrics)
    after = logprobs_of_rewarded(learner, first)
    assert np.mean(after) > np.mean(before) + 0.2 and all(b > a for a, b in zip(before, after, strict=True))
    assert metrics[-1]["ppo/value_loss"] < 0.5 * metrics[0]["ppo/value_loss"]
    assert metrics[-1]["ppo/explained_variance"] > metrics[0]["ppo/explained_variance"]
    assert learner.version == 10 == metrics[-1]["train/llm_version"] and metrics[0]["ppo/samples"] == 8


def parameters(module):
    return torch.cat([p.detach().ravel().clone() for p in module.parameters()])


def test_ppo_learner_estimates_advantages_along_each_trajectory(smollm2):
    learner = make_learner(smollm2.tokenizer, ppo_settings(gae_lambda=0.8))
    torch.nn.init.normal_(learner.critic.head.weight)  # at first all values are 0

    def trajectory(steps, bootstrap_prompt):
        return Trajectory(tuple(dataclasses.replace(record(t), reward=float(t)) for t in steps), bootstrap_prompt)

    def value_of(prompt):
        return learner.critic([learner._token_ids(prompt)]).item()

    three = [trajectory([1, 2, 3], "Where to? 4"), trajectory([5, 6], None), trajectory([7], "Where to? 8")]
    values, ends = learner._values(three)
    assert ends == pytest.approx([value_of("Where to? 4"), 0.0, value_of("Where to? 8")], abs=1e-5)
    assert values == pytest.approx([value_of(r.prompt) for t in three for r in t.records], abs=1e-5)
    assert np.ptp(values) > 0.01
    advantages, returns = learner._advantages(three, values, ends)
    parts = ([1, 2, 3], values[:3], ends[0]), ([5, 6], values[3:5], 0.0), ([7], values[5:], ends[2])
    expected = [
        generalised_advantages(np.array(rewards), np.array([*own, end]), discount=0.9, lam=0.8)
        for rewards, own, end in parts
    ]
    assert advantages == pytest.approx(np.concatenate(expected), abs=1e-5)
    assert returns == pytest.approx(advantages + values)  # lambda-returns


def test_ppo_learner_trains_only_the_critic_while_it_warms_up(smollm2):
    learner = make_learner(smollm2.tokenizer, ppo_settings(critic_warmup_steps=1))
    actor, critic = parameters(learner.llm.model), parameters(learner.critic)
    trajectories = make_episodes(learner, [1, 0, 1, 2])
    learner.step(trajectories, step_id=1)
    assert torch.equal(parameters(learner.llm.model), actor) and learner.version == 0
    assert not torch.equal(parameters(learner.critic), critic)
    learner.step(trajectories, step_id=2)
    assert not torch.equal(parameters(learner.llm.model), actor) and learner.version == 1


def test_ppo_learner_ignores_a_repeated_step_and_refuses_a_gap(smollm2):
    learner = make_learner(smollm2.tokenizer, ppo_settings())
    trajectories = make_episodes(learner, [1, 0, 1, 2])
    result = learner.step(trajectories, step_id=1)
    actor = parameters(learner.llm.model)
    assert learner.step(trajectories, step_id=1) == result
    assert torch.equal(parameters(learner.llm.model), actor) and learner.version == 1
    with pytest.raises(ValueError, match="PPO step 3 after step 1"):
        learner.step(trajectories, step_id=3)


def test_ppo_learner_skips_and_counts_stale_decisions_and_those_without_prior(smollm2):
    learner = make_learner(smollm2.tokenizer, ppo_settings(max_staleness=1))
    trajectories = make_episodes(learner, [1, 0, 1, 2])
    learner.version = 2  # the priors are of version 0
    (fresh,) = make_episodes(learner, [1], version=1)
    no_prior = Trajectory((dataclasses.replace(trajectories[0].records[0], prior=None),), None)
    metrics = learner.step([*trajectories, fresh, no_prior], step_id=1).metrics
    names = ("ppo/stale", "ppo/without_prior", "ppo/samples", "ppo/decisions")
    assert [metrics[name] for name in names] == [4, 1, 1, 6]
    actor = parameters(learner.llm.model)
    metrics = learner.step(trajectories, step_id=2).metrics
    assert metrics["ppo/samples"] == 0 and torch.equal(parameters(learner.llm.model), actor) and learner.version == 3


def test_ppo_credit_reduces_the_gradient_of_actions_that_the_prior_finds_improbable(smollm2):
    def gradient_norm_and_weight(behaviour_prob, **ppo):
        learner = make_learner(smollm2.tokenizer, ppo_settings(**ppo))
        trajectories = [
            Trajectory((dataclasses.replace(t.records[0], behaviour_prob=behaviour_prob),), None)
            for t in make_episodes(learner, [1, 0, 1, 2])
        ]
        metrics = learner.step(trajectories, step_id=1).metrics
        return metrics["train/llm_grad_norm"], metrics["ppo/credit_weight_mean"]

    # The prior's probabilities of the actions are between these two.
    (full, one), (reduced, weight) = gradient_norm_and_weight(0.01), gradient_norm_and_weight(1.0)
    assert one == 1.0 and 0 < weight < 0.6 and reduced < 0.7 * full
    assert gradient_norm_and_weight(1.0, credit="none") == pytest.approx((full, 1.0), rel=1e-4)


def test_ppo_kl_penalty_keeps_the_actor_close_to_the_loaded_llm(smollm2):
    def drift(kl_weight):
        learner = make_learner(smollm2.tokenizer, ppo_settings(kl_weight=kl_weight))
        before = logprobs_of_rewarded(learner, make_episodes(learner, [1, 0, 1, 2]))
        for step in range(1, 4):
            trajectories = make_episodes(learner, [1, 0, 1, 2], version=learner.version)
            learner.step(trajectories, step_id=step)
        return np.abs(np.array(logprobs_of_rewarded(learner, trajectories)) - before).mean()

    assert drift(100.0) < 0.7 * drift(0.0)


def test_ppo_value_clip_limits_the_change_of_the_values(smollm2):
    def largest_value(value_clip):
        learner = make_learner(smollm2.tokenizer, ppo_settings(value_clip=value_clip, epochs=5))
        trajectories = make_episodes(learner, [1, 0, 1, 2])
        learner.step(trajectories, step_id=1)
        return np.abs(learner._values(trajectories)[0]).max()  # at first all values are 0

    assert largest_value(0.05) < 0.5 * largest_value(0.0)


def test_ppo_learner_skips_a_non_finite_step(smollm2):
    learner = make_learner(smollm2.tokenizer, ppo_settings())
    trajectories = make_episodes(learner, [1, 0, 1, 2])
    poisoned = Trajectory((dataclasses.replace(trajectories[0].records[0], reward=float("nan")),), None)
    actor, critic = parameters(learner.llm.model), parameters(learner.critic)
    result = learner.step([poisoned, *trajectories], step_id=1)
    assert result.nonfinite.startswith("the critic's loss is nan")
    assert torch.equal(parameters(learner.llm.model), actor) and torch.equal(parameters(learner.critic), critic)
    assert learner.step(trajectories, step_id=2).nonfinite == ""


def test_ppo_learner_continues_from_its_state_dict(smollm2):
    one, other = (make_learner(smollm2.tokenizer, ppo_settings()) for _ in range(2))
    trajectories = make_episodes(one, [1, 0, 1, 2])
    one.step(trajectories, step_id=1)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.step(trajectories, step_id=1) == one.step(trajectories, step_id=1)  # returned from the state
    assert one.step(trajectories, step_id=2) == other.step(trajectories, step_id=2)
    assert torch.equal(parameters(one.llm.model), parameters(other.llm.model))
    assert torch.equal(parameters(one.critic), parameters(other.critic))
    names = {name for name, p in one.llm.model.named_parameters()}
    assert names <= set(one.actor_state()) | {"lm_head.weight"}


def test_critic_truncates_long_prompts_at_their_beginning_and_ignores_padding(smollm2):
    learner = make_learner(smollm2.tokenizer, ppo_settings())
    ids = list(range(5, 1500))
    with torch.no_grad():
        learner.critic.head.weight.normal_()
        long, short = learner.critic([ids]), learner.critic([ids[-1024:]])
        padded = learner.critic([ids[-1024:], [7, 8, 9]])
    assert long.tolist() == short.tolist()
    assert padded[1].item() == pytest.approx(learner.critic([[7, 8, 9]]).item(), abs=1e-5)


# ---- several processes ----


@pytest.mark.slow
def test_torch_group_of_two_learners_trains_as_one_learner_does(tmp_path, smollm2):
    """DDP and FSDP with two processes against one process, on the same trajectories."""
    make_tiny_llm(smollm2.tokenizer).save(tmp_path / "llm")

    def settings_for(num_learners, sharding):
        return make_settings(
            {
                "run": {"num_threads": 1, "seed": 3},
                "llm": {
                    "path": str(tmp_path / "llm"),
                    "batch_size": 4,
                    "micro_batch_size": 1,
                    "learning_rate": 1e-3,
                    "kl_weight": 0.1,
                },
                "ppo": {"critic_warmup_steps": 0, "epochs": 2, "max_decisions": 0, "sharding": sharding},
                "cluster": {"num_learners": num_learners},
            }
        )

    context = multiprocessing.get_context("forkserver")
    # Imported once for all processes:
    context.set_forkserver_preload(
        ["tests.helpers.ppo", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama"]
    )
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        futures = [
            pool.submit(
                train_in_group, settings_for(2, sharding), rank, tmp_path / sharding, restore=sharding == "fsdp"
            )
            for sharding in ("ddp", "fsdp")
            for rank in (0, 1)
        ]
        one, one_state = train_in_group(settings_for(1, "ddp"), 0, tmp_path / "one", restore=False)
        (ddp, ddp_state), _, (fsdp, fsdp_state), _ = (future.result(timeout=300) for future in futures)

    first, again, second = fsdp
    assert first == again  # a learner that has loaded the state does not repeat the step
    for results in (one, ddp, [first, second]):
        assert [result.nonfinite for result in results] == ["", ""]
        for expected, result in zip(one, results, strict=True):
            assert expected.metrics["ppo/samples"] == 10
            assert result.metrics == pytest.approx(expected.metrics, rel=2e-3, abs=1e-4)
    llm = load_language_model(settings_for(1, "ddp").llm, device=torch.device("cpu"))
    initial = {name: tensor.numpy() for name, tensor in llm.model.state_dict().items()}
    norm = np.linalg.norm
    for name, array in one_state.items():
        change = norm(array - initial[name])
        for other in (ddp_state, fsdp_state):
            assert norm(other[name] - array) <= 2e-3 * change + 1e-6, name
    assert all(norm(one_state[name] - initial[name]) > 1e-3 for name in ("lm_head.weight", "model.norm.weight"))
    exported = make_settings({"llm": {"path": str(tmp_path / "ddp" / "exported")}})
    parameters = load_language_model(exported.llm, device=llm.device).model.state_dict()
    assert np.allclose(parameters["model.norm.weight"].numpy(), ddp_state["model.norm.weight"])
