"""PPO for the LLM: its arithmetic against a slow reference, what it learns from, and that it learns."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from priorzero.cluster.ppo.learner import PPOLearner
from priorzero.cluster.ppo.trajectories import Trajectory, credit_weights, newest, trajectories_from, turn_rewards
from priorzero.llm.prompts import prompt_style
from priorzero.runtime.process_group import ProcessGroup
from priorzero.types import ActionPrior
from priorzero.world_model.segment import SegmentWriter
from tests.helpers.advantages import advantages_by_definition
from tests.helpers.models import make_settings, make_tiny_llm
from tests.helpers.records import record
from tests.helpers.segments import demo_config, demo_episode

numbers = st.floats(-5, 5, allow_nan=False)


def test_a_segment_is_a_trajectory():
    config = demo_config(segment_length=4)

    def cut(length, **how):
        writer = SegmentWriter(config)
        return [s for r, f in demo_episode(length=length, **how) for s in writer.add(r, next_features=f)]

    whole, rest = trajectories_from(cut(7))
    assert [r.step for r in whole.records] == [0, 1, 2, 3] and whole.bootstrap_prompt == "prompt of episode 0, step 4"
    assert [r.step for r in rest.records] == [4, 5, 6] and rest.bootstrap_prompt is None
    assert all(len(r.features) == 0 for r in (*whole.records, *rest.records))
    # Cut by the move limit, or by a game that failed: the last decision stands for what came then.
    writer = SegmentWriter(config)
    segments = []
    for made, features in demo_episode(length=3, ends=False):
        segments += writer.add(made, next_features=features)
    (cut_short,) = trajectories_from(segments + writer.flush(final_features=features))
    assert [r.step for r in cut_short.records] == [0, 1] and cut_short.bootstrap_prompt.endswith("step 2")
    assert trajectories_from([]) == []


def test_the_newest_decisions_are_kept():
    def trajectory(e, n):
        return Trajectory(tuple(record(10 * e + t) for t in range(n)), None)

    three = [trajectory(0, 3), trajectory(1, 4), trajectory(2, 2)]
    assert newest(three, limit=0) == newest(three, limit=9) == three
    assert newest(three, limit=6) == three[1:] and newest(three, limit=2) == three[2:]
    cut, whole = newest(three, limit=4)
    assert whole == three[2] and [r.step for r in cut.records] == [10, 11] and cut.bootstrap_prompt == "Where to? 12"
    assert newest([], limit=4) == []


def test_rewards_and_what_is_added_to_them():
    records = [dataclasses.replace(record(), reward=r, shaping=s) for r, s in [(10.0, 0.5), (0.0, -2.0)]]
    plain = make_settings().ppo
    assert turn_rewards(records, cfg=plain).tolist() == [10.0, 0.0]
    shaped = make_settings({"ppo": {"reward_scale": 0.1, "shaping_weight": 1.0, "step_penalty": 0.5}}).ppo
    assert turn_rewards(records, cfg=shaped) == pytest.approx([1.0, -0.25])


def test_credit_is_the_truncated_importance_weight():
    prior = ActionPrior(np.log([0.1, 0.6, 0.2, 0.1]).astype(np.float32), "score", 0)
    records = [
        dataclasses.replace(record(chosen=0), prior=prior, behaviour_prob=0.5),  # the search's idea: 0.1 / 0.5
        dataclasses.replace(record(chosen=1), prior=prior, behaviour_prob=0.3),  # 2, cut to 1
        dataclasses.replace(record(chosen=1), prior=dataclasses.replace(prior, source="uniform")),  # nobody's
        dataclasses.replace(record(chosen=1), prior=None),
    ]
    settings = make_settings()
    assert credit_weights(records, cfg=settings.ppo) == pytest.approx([0.2, 1.0, 0.0, 0.0])
    settings.ppo.importance_cap = 1.5
    assert credit_weights(records, cfg=settings.ppo) == pytest.approx([0.2, 1.5, 0.0, 0.0])
    settings.ppo.credit = "none"
    assert credit_weights(records, cfg=settings.ppo).tolist() == [1.0, 1.0, 0.0, 0.0]


# ---- learning ----


def ppo_settings(**ppo):
    return make_settings(
        {
            "llm": {
                "learning_rate": 3e-3,
                "batch_size": 8,
                "micro_batch_size": 2,
                "kl_weight": ppo.pop("kl_weight", 0.0),
            },
            "search": {"discount_factor": 0.9},
        },
        {"ppo": {"critic_learning_rate": 3e-3, "critic_warmup_steps": 0, "value_clip": 0.0, "max_decisions": 0, **ppo}},
    )


def make_learner(tokenizer, settings):
    llm = make_tiny_llm(tokenizer)
    if settings.llm.kl_weight:
        llm = dataclasses.replace(llm, reference=make_tiny_llm(tokenizer).model.requires_grad_(False))
    return PPOLearner(llm, settings, style=prompt_style(settings), group=ProcessGroup())


def played(learner, choices, *, version=0):
    """One-step trajectories in which the LLM's own prior drew ``choices``; "go north" (1) earns a point."""
    samples, _ = learner.actor.prepare([record(t, rollout=np.zeros(4)) for t in range(len(choices))])
    with torch.no_grad():
        shares = [
            learner.actor.objective_logprobs([s], *learner.llm.token_logprobs([s.row]))[0][:, 0].numpy()
            for s in samples
        ]
    trajectories = []
    for t, (choice, logprobs) in enumerate(zip(choices, shares, strict=True)):
        prior = ActionPrior(logprobs, "score", version, rollout_logprobs=np.zeros(4))
        won = float(choice == 1)
        done = dataclasses.replace(
            record(t, chosen=choice), prior=prior, reward=won, done=True, behaviour_prob=float(np.exp(logprobs[choice]))
        )
        trajectories.append(Trajectory((done,), None))
    return trajectories


def logprobs_of_rewarded(learner, trajectories):
    samples, _ = learner.actor.prepare([t.records[0] for t in trajectories])
    with torch.no_grad():
        return [
            float(learner.actor.objective_logprobs([s], *learner.llm.token_logprobs([s.row]))[0][1, 0]) for s in samples
        ]


@pytest.mark.slow
def test_steps_raise_what_was_rewarded_and_lower_the_critics_loss(smollm2):
    learner = make_learner(smollm2.tokenizer, ppo_settings())
    first = played(learner, [1, 0, 1, 2, 1, 3, 0, 1])
    before, told = logprobs_of_rewarded(learner, first), []
    for step in range(1, 11):
        told.append(learner.step(played(learner, [1, 0, 1, 2, 1, 3, 0, 1], version=learner.version), step_id=step))
    after = logprobs_of_rewarded(learner, first)
    assert np.mean(after) > np.mean(before) + 0.2 and all(b > a for a, b in zip(before, after, strict=True))
    assert told[-1]["ppo/value_loss"] < 0.5 * told[0]["ppo/value_loss"]
    assert told[-1]["ppo/explained_variance"] > told[0]["ppo/explained_variance"]
    assert learner.version == 10 == told[-1]["train/llm_version"] and told[0]["ppo/samples"] == 8


def parameters(module):
    return torch.cat([p.detach().ravel().clone() for p in module.parameters()])


def test_advantages_follow_each_trajectory_to_its_own_end(smollm2):
    learner = make_learner(smollm2.tokenizer, ppo_settings(gae_lambda=0.8))
    torch.nn.init.normal_(learner.critic.head.weight)  # a new critic says 0 of everything

    def trajectory(steps, bootstrap_prompt):
        return Trajectory(tuple(dataclasses.replace(record(t), reward=float(t)) for t in steps), bootstrap_prompt)

    def value_of(prompt):
        return learner.critic([learner._ids(prompt)]).item()

    three = [trajectory([1, 2, 3], "Where to? 4"), trajectory([5, 6], None), trajectory([7], "Where to? 8")]
    values, ends = learner._values(three)
    assert ends == pytest.approx([value_of("Where to? 4"), 0.0, value_of("Where to? 8")], abs=1e-5)
    assert values == pytest.approx([value_of(r.prompt) for t in three for r in t.records], abs=1e-5)
    assert np.ptp(values) > 0.01
    advantages, returns = learner._advantages(three, values, ends)
    expected = [
        a
        for rewards, own, end in [
            ([1, 2, 3], values[:3], ends[0]),
            ([5, 6], values[3:5], 0.0),
            ([7], values[5:], ends[2]),
        ]
        for a in advantages_by_definition(rewards, [*own, end], 0.9, 0.8)
    ]
    assert advantages == pytest.approx(expected, abs=1e-5)
    assert returns == pytest.approx(advantages + values)  # lambda-returns


def test_at_first_only_the_critic_learns(smollm2):
    learner = make_learner(smollm2.tokenizer, ppo_settings(critic_warmup_steps=1))
    actor, critic = parameters(learner.llm.model), parameters(learner.critic)
    trajectories = played(learner, [1, 0, 1, 2])
    learner.step(trajectories, step_id=1)
    assert torch.equal(parameters(learner.llm.model), actor) and learner.version == 0
    assert not torch.equal(parameters(learner.critic), critic)
    learner.step(trajectories, step_id=2)
    assert not torch.equal(parameters(learner.llm.model), actor) and learner.version == 1


def test_a_repeated_step_is_harmless_and_a_missing_one_is_told(smollm2):
    learner = make_learner(smollm2.tokenizer, ppo_settings())
    trajectories = played(learner, [1, 0, 1, 2])
    told = learner.step(trajectories, step_id=1)
    actor = parameters(learner.llm.model)
    assert learner.step(trajectories, step_id=1) == told
    assert torch.equal(parameters(learner.llm.model), actor) and learner.version == 1
    with pytest.raises(ValueError, match="PPO step 3 after step 1"):
        learner.step(trajectories, step_id=3)


def test_stale_samples_and_those_without_prior_are_left_out_and_counted(smollm2):
    learner = make_learner(smollm2.tokenizer, ppo_settings(max_staleness=1))
    trajectories = played(learner, [1, 0, 1, 2])
    learner.version = 2  # the priors are of version 0
    (fresh,) = played(learner, [1], version=1)
    blind = Trajectory((dataclasses.replace(trajectories[0].records[0], prior=None),), None)
    told = learner.step([*trajectories, fresh, blind], step_id=1)
    assert (told["ppo/stale"], told["ppo/without_prior"], told["ppo/samples"], told["ppo/decisions"]) == (4, 1, 1, 6)
    actor = parameters(learner.llm.model)
    told = learner.step(trajectories, step_id=2)
    assert told["ppo/samples"] == 0 and torch.equal(parameters(learner.llm.model), actor) and learner.version == 3


def test_what_the_search_chose_against_the_llm_teaches_the_llm_little(smollm2):
    def moved(behaviour_prob, **ppo):
        learner = make_learner(smollm2.tokenizer, ppo_settings(**ppo))
        trajectories = [
            Trajectory((dataclasses.replace(t.records[0], behaviour_prob=behaviour_prob),), None)
            for t in played(learner, [1, 0, 1, 2])
        ]
        told = learner.step(trajectories, step_id=1)
        return told["train/llm_grad_norm"], told["ppo/credit_weight_mean"]

    (full, one), (little, weight) = moved(0.01), moved(1.0)  # the prior's shares lie between
    assert one == 1.0 and 0 < weight < 0.6 and little < 0.7 * full
    assert moved(1.0, credit="none") == pytest.approx((full, 1.0), rel=1e-4)


def test_the_kl_penalty_holds_the_actor_back(smollm2):
    def drift(kl_weight):
        learner = make_learner(smollm2.tokenizer, ppo_settings(kl_weight=kl_weight))
        before = logprobs_of_rewarded(learner, played(learner, [1, 0, 1, 2]))
        for step in range(1, 6):
            trajectories = played(learner, [1, 0, 1, 2], version=learner.version)
            learner.step(trajectories, step_id=step)
        return np.abs(np.array(logprobs_of_rewarded(learner, trajectories)) - before).mean()

    assert drift(100.0) < 0.7 * drift(0.0)


def test_the_clip_holds_the_critic_back(smollm2):
    def moved(value_clip):
        learner = make_learner(smollm2.tokenizer, ppo_settings(value_clip=value_clip, epochs=8))
        trajectories = played(learner, [1, 0, 1, 2])
        learner.step(trajectories, step_id=1)
        return np.abs(learner._values(trajectories)[0]).max()  # a new critic says 0 of everything

    assert moved(0.05) < 0.5 * moved(0.0)


def test_a_step_that_is_not_finite_is_left_out_and_said(smollm2):
    learner = make_learner(smollm2.tokenizer, ppo_settings())
    trajectories = played(learner, [1, 0, 1, 2])
    poisoned = Trajectory((dataclasses.replace(trajectories[0].records[0], reward=float("nan")),), None)
    actor, critic = parameters(learner.llm.model), parameters(learner.critic)
    told = learner.step([poisoned, *trajectories], step_id=1)
    assert told["left_out"].startswith("the critic's loss is nan")
    assert torch.equal(parameters(learner.llm.model), actor) and torch.equal(parameters(learner.critic), critic)
    assert learner.step(trajectories, step_id=2)["left_out"] == ""


def test_a_learner_goes_on_from_its_state_as_if_nothing_had_happened(smollm2):
    one, other = (make_learner(smollm2.tokenizer, ppo_settings()) for _ in range(2))
    trajectories = played(one, [1, 0, 1, 2])
    one.step(trajectories, step_id=1)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.step(trajectories, step_id=1) == one.step(trajectories, step_id=1)  # not made again
    assert one.step(trajectories, step_id=2) == other.step(trajectories, step_id=2)
    assert torch.equal(parameters(one.llm.model), parameters(other.llm.model))
    assert torch.equal(parameters(one.critic), parameters(other.critic))
    names = {name for name, p in one.llm.model.named_parameters()}
    assert names <= set(one.actor_state()) | {"lm_head.weight"}


def test_long_prompts_lose_their_beginning_for_the_critic(smollm2):
    learner = make_learner(smollm2.tokenizer, ppo_settings())
    ids = list(range(5, 1500))
    with torch.no_grad():
        learner.critic.head.weight.normal_()
        long, short = learner.critic([ids]), learner.critic([ids[-1024:]])
        padded = learner.critic([ids[-1024:], [7, 8, 9]])
    assert long.tolist() == short.tolist()
    assert padded[1].item() == pytest.approx(learner.critic([[7, 8, 9]]).item(), abs=1e-5)
