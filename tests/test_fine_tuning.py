"""Tests of the fine-tuning of the LLM."""

from __future__ import annotations

import asyncio
import copy
import dataclasses

import numpy as np
import pytest
import torch

from priorzero.llm import models
from priorzero.llm.engines import PriorBuilder, TransformersEngine
from priorzero.llm.fine_tuning import LLMLearner, select_actions
from priorzero.llm.losses import kl_loss
from priorzero.llm.packing import PromptRow, pack
from priorzero.llm.prompts import prompt_style
from priorzero.types import PriorRequest, UserError
from tests.helpers.models import SmallMemory, make_settings, make_tiny_llm
from tests.helpers.records import record


def make_learner(smollm2, *, seed=0, **llm):
    settings = make_settings({"llm": {"learning_rate": 1e-2, "grad_clip": 1e9, "objective": "tokens", **llm}})
    return LLMLearner(make_tiny_llm(smollm2.tokenizer, seed=seed), settings.llm, style=prompt_style(settings))


def parameters(learner):
    return torch.cat([p.detach().ravel().clone() for p in learner.llm.model.parameters()])


RECORDS = [record(t, visits=np.roll((6, 3, 1, 0), t), chosen=(t + t // 3) % 4) for t in range(8)]
RETURNS = np.array([3.0, -1.0, 0.5, 2.0, 0.0, 1.0, 4.0, -2.0])


def test_select_actions_takes_the_most_visited_and_the_chosen_one():
    positions, probs = select_actions(record(visits=(6, 3, 1, 0)), top=2)
    assert positions == [0, 1] and probs == pytest.approx([6 / 9, 3 / 9])
    positions, probs = select_actions(record(visits=(6, 3, 1, 0), chosen=2), top=2)
    assert positions == [0, 1, 2] and probs == pytest.approx([6 / 9, 3 / 9, 0.0])
    positions, probs = select_actions(record(visits=(0, 0, 5, 0), chosen=2), top=4)
    assert positions == [2] and probs == pytest.approx([1.0])


def gradient_of_step(smollm2, micro_batch_size, **llm):
    learner = make_learner(smollm2, micro_batch_size=micro_batch_size, **llm)
    gradients = {}
    for name, p in learner.llm.model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: gradients.__setitem__(name, p.grad.clone()))
    samples, skipped = learner.samples(RECORDS, RETURNS)
    assert len(samples) == 8 and skipped == 0
    losses = learner.learn(samples)
    return torch.cat([gradients[name].ravel() for name in sorted(gradients)]), losses


@pytest.mark.parametrize("objective", ["tokens", "actions"])
def test_learn_has_the_same_gradient_for_all_micro_batch_sizes(smollm2, objective):
    whole, whole_losses = gradient_of_step(smollm2, 8, objective=objective)
    assert whole.norm() > 1e-3
    for size in (1, 2, 4):
        gradient, losses = gradient_of_step(smollm2, size, objective=objective)
        assert (gradient - whole).norm() / whole.norm() < 1e-5, size
        assert losses == pytest.approx(whole_losses, rel=1e-4), size


@pytest.mark.parametrize(("size", "want"), [(1, [1] * 7), (2, [2, 2, 2, 1]), (4, [4, 3]), (8, [7])])
def test_learn_packs_at_most_a_micro_batch_in_a_forward_pass(smollm2, monkeypatch, size, want):
    """This bounds the memory, also with the KL penalty, whose reference has a forward pass of its own."""
    num_rows = []

    def count_rows(rows, **kwargs):
        num_rows.append(len(rows))
        return pack(rows, **kwargs)

    learner = make_learner(smollm2, micro_batch_size=size, kl_weight=0.1, objective="actions")
    learner.llm = learner.scorer._llm = dataclasses.replace(learner.llm, reference=copy.deepcopy(learner.llm.model))
    samples, _ = learner.samples(RECORDS[:7], RETURNS[:7])
    monkeypatch.setattr(models, "pack", count_rows)
    learner.learn(samples)
    assert num_rows == [n for n in want for _ in range(2)]


@pytest.mark.parametrize("objective", ["tokens", "actions"])
def test_learn_counts_a_decision_by_its_weight(smollm2, objective):
    def step(weights, times):
        learner = make_learner(smollm2, objective=objective, learning_rate=1e-3)
        samples, _ = learner.samples(RECORDS[:3], RETURNS[:3], weights=weights)
        samples = [sample for sample, n in zip(samples, times, strict=True) for _ in range(n)]
        return learner.learn(samples), parameters(learner)

    weighted, after_weighted = step(np.array([2.0, 1.0, 3.0]), [1, 1, 1])
    repeated, after_repeated = step(None, [2, 1, 3])
    plain, _ = step(None, [1, 1, 1])
    assert weighted == pytest.approx(repeated, rel=1e-4) and weighted != pytest.approx(plain, rel=1e-2)
    torch.testing.assert_close(after_weighted, after_repeated, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("objective", "num_actions"), [("tokens", 1), ("actions", 4)])
def test_samples_of_imitated_decisions_aim_at_the_taken_action_and_have_no_advantage(smollm2, objective, num_actions):
    learner = make_learner(smollm2, objective=objective)
    weights = np.arange(1.0, 9.0)
    samples, skipped = learner.samples(RECORDS, RETURNS, weights=weights, num_imitated=3)
    assert len(samples) == 8 and skipped == 0 and [s.weight for s in samples] == weights.tolist()
    plain, _ = learner.samples(RECORDS[:5], RETURNS[:5], weights=weights[:5])
    for sample, other in zip(samples[:5], plain, strict=True):  # the imitated ones do not influence the others
        assert sample.advantage == other.advantage != 0 and sample.target_probs == pytest.approx(other.target_probs)
    for sample, imitated in zip(samples[5:], RECORDS[5:], strict=True):
        assert sample.advantage == 0 and len(sample.target_probs) == num_actions
        assert sample.target_probs.tolist() == [float(k == sample.chosen) for k in range(num_actions)]
        assert sample.chosen == (0 if objective == "tokens" else imitated.chosen)
    assert all(r.chosen != int(r.visit_counts.argmax()) for r in RECORDS[5:])  # SFT on the visits has other targets
    only, _ = learner.samples(RECORDS[:2], RETURNS[:2], num_imitated=2)
    assert [s.advantage for s in only] == [0, 0]


def test_samples_keep_the_order_when_decisions_cannot_be_used(smollm2):
    learner = make_learner(smollm2, objective="actions")
    records = [RECORDS[0], record(prompt=""), RECORDS[2], record(prompt=""), RECORDS[4]]
    samples, skipped = learner.samples(records, RETURNS[:5], num_imitated=2)
    assert skipped == 2 and [s.advantage for s in samples] == [1.0, -1.0, 0.0]
    assert [s.target_probs.max() == 1.0 for s in samples] == [False, False, True]


def test_learn_scales_the_gradient_by_the_loss_weights(smollm2):
    def norm(**llm):
        learner = make_learner(smollm2, **llm)
        return learner.learn(learner.samples(RECORDS, RETURNS)[0])["grad_norm"]

    assert norm(enable_rft=False, llm_loss_weight=1.0) == pytest.approx(
        2 * norm(enable_rft=False, llm_loss_weight=0.5), rel=1e-4
    )
    assert norm(enable_sft=False, rft_loss_weight=0.9) == pytest.approx(
        3 * norm(enable_sft=False, rft_loss_weight=0.3), rel=1e-4
    )


@pytest.mark.parametrize("disabled", ["enable_rft", "enable_sft"])
def test_learn_raises_the_preferred_action(smollm2, disabled):
    """SFT raises the log-probability of the most visited action, RFT that of the action with the higher return."""
    learner = make_learner(smollm2, **{disabled: False})
    good, bad = record(visits=(9, 1, 0, 0), chosen=0), record(visits=(9, 1, 0, 0), chosen=1)
    samples, _ = learner.samples([good, bad], np.array([1.0, -1.0]))
    both = make_learner(smollm2).samples([good], np.array([1.0]))[0][0].row  # without SFT a row has one completion

    def gap():
        with torch.no_grad():
            logprobs, _ = learner.llm.token_logprobs([both])
        return (logprobs[0].sum() - logprobs[1].sum()).item()

    before = gap()
    for _ in range(5):
        learner.learn(samples)
    assert gap() > before + 0.1


def priors_of_records(learner):
    engine = TransformersEngine(PriorBuilder(learner.llm, learner.style), rows_per_forward=1)
    return asyncio.run(engine.priors([PriorRequest(r.prompt, r.state.valid_actions) for r in RECORDS]))


def test_learn_actions_sft_loss_is_the_cross_entropy_of_the_engines_prior(smollm2):
    learner = make_learner(smollm2, objective="actions", enable_rft=False)
    samples, _ = learner.samples(RECORDS, RETURNS)
    priors = priors_of_records(learner)
    want = -np.mean([r.visit_probs() @ prior.logprobs for r, prior in zip(RECORDS, priors, strict=True)])
    losses = learner.learn(samples)
    assert losses["sft_loss"] == pytest.approx(want, rel=1e-4)
    for _ in range(20):
        losses = learner.learn(samples)
    entropy = -np.mean([(p := r.visit_probs())[p > 0] @ np.log(p[p > 0]) for r in RECORDS])
    assert entropy - 1e-4 <= losses["sft_loss"] < entropy + 0.5 * (want - entropy)


def test_learn_actions_ratio_is_one_for_an_unchanged_prior(smollm2):
    """With a ratio of one, the clipped loss has the gradient of REINFORCE."""
    norms = []
    for clip in (0.0, 0.2):
        learner = make_learner(smollm2, objective="actions", enable_sft=False, rft_clip=clip)
        priors = priors_of_records(learner)
        records = [dataclasses.replace(r, prior=prior) for r, prior in zip(RECORDS, priors, strict=True)]
        samples, skipped = learner.samples(records, RETURNS)
        assert skipped == 0
        result = learner.learn(samples)
        norms.append(result["grad_norm"])
        if clip:  # the advantages have mean zero
            assert result["rft_loss"] == pytest.approx(0.0, abs=1e-4)
    assert norms[1] == pytest.approx(norms[0], rel=1e-3) and norms[0] > 1e-3


def test_objective_auto_is_actions_for_score_and_tokens_for_rank(smollm2):
    assert make_learner(smollm2, objective="auto").objective == "actions"
    settings = make_settings({"prior": {"mode": "rank"}})
    assert LLMLearner(smollm2, settings.llm, style=prompt_style(settings)).objective == "tokens"


def test_samples_with_clip_require_rollout_logprobs(smollm2):
    learner = make_learner(smollm2, rft_clip=0.2)
    with_rollout = record(1, rollout=np.array([-4.0, -8.0, -20.0, -2.0]), chosen=2)
    samples, skipped = learner.samples([record(0), with_rollout], np.array([0.0, 1.0]))
    assert skipped == 1 and [s.rollout_logprob for s in samples] == [-20.0]


def test_learn_with_clip_changes_nothing_beyond_the_clip_range(smollm2):
    """The chosen action is far more probable than at the time of the decision, and its advantage is positive."""
    learner = make_learner(smollm2, rft_clip=0.2, enable_sft=False)
    samples, _ = learner.samples([record(t, rollout=np.full(4, -500.0)) for t in range(2)], np.array([1.0, 0.0]))
    gaining = [s for s in samples if s.advantage > 0]
    before = parameters(learner)
    learner.learn(gaining)
    assert torch.equal(parameters(learner), before)
    with torch.no_grad():
        now = learner.llm.token_logprobs([s.row for s in gaining])[0].sum(dim=1).tolist()
    learner.learn([dataclasses.replace(s, rollout_logprob=logprob) for s, logprob in zip(gaining, now, strict=True)])
    assert not torch.equal(parameters(learner), before)


def test_learn_kl_penalty_is_zero_at_first_and_limits_the_change(smollm2):
    moved = {}
    for kl_weight in (0.0, 100.0):
        learner = make_learner(smollm2, kl_weight=kl_weight, learning_rate=1e-3)
        learner.llm = dataclasses.replace(learner.llm, reference=copy.deepcopy(learner.llm.model))
        samples, _ = learner.samples(RECORDS, RETURNS)
        first = learner.learn(samples)
        assert first["kl_loss"] == pytest.approx(0.0, abs=1e-6)
        for _ in range(10):
            last = learner.learn(samples)
        with torch.no_grad():
            rows = [PromptRow(s.row.prompt_ids, [s.row.completions[s.chosen]]) for s in samples]
            now, mask = learner.llm.token_logprobs(rows)
            moved[kl_weight] = kl_loss(now, learner.llm.reference_logprobs(rows), mask)[0].item()
        assert (last["kl_loss"] > 0) == (kl_weight > 0)
    assert moved[100.0] < 0.2 * moved[0.0]


def test_learn_refuses_a_nonfinite_loss_and_changes_nothing(smollm2):
    learner = make_learner(smollm2)
    samples, _ = learner.samples(RECORDS, RETURNS)
    before = parameters(learner)
    with pytest.raises(UserError, match=r"rft_loss is nan.*llm\.learning_rate"):
        learner.learn([dataclasses.replace(samples[0], advantage=float("nan")), *samples[1:]])
    with pytest.raises(UserError, match="sft_loss is nan"):
        learner.learn([dataclasses.replace(s, target_probs=np.full_like(s.target_probs, np.nan)) for s in samples])
    assert torch.equal(parameters(learner), before)


def test_learn_halves_the_micro_batch_once_when_out_of_memory(smollm2):
    updated = {}
    for largest in (4, 2):
        learner = make_learner(smollm2, batch_size=4, micro_batch_size=4)
        samples, _ = learner.samples([record(t) for t in range(4)], np.arange(4.0))
        learner.llm = learner.scorer._llm = SmallMemory(learner.llm, largest=largest)
        learner.learn(samples)
        updated[largest] = parameters(learner)
        assert learner.llm.num_rows == ([4] if largest == 4 else [4, 2, 2])
        learner.learn(samples)  # the smaller micro-batch is kept
        assert learner.llm.num_rows[-2:] == ([4, 4] if largest == 4 else [2, 2])
    torch.testing.assert_close(updated[4], updated[2], atol=1e-5, rtol=0)

    learner = make_learner(smollm2, batch_size=4, micro_batch_size=4)
    learner.llm = learner.scorer._llm = SmallMemory(learner.llm, largest=1)
    before = parameters(learner)
    with pytest.raises(UserError, match=r"with 2 decisions at a time; type --set llm\.micro_batch_size=1"):
        learner.learn(samples)
    assert torch.equal(parameters(learner), before)


def test_samples_normalise_advantages_over_the_usable_decisions(smollm2):
    records, returns = [record(0), record(1), record(prompt="")], np.array([1.0, 3.0, 1000.0])
    samples, skipped = make_learner(smollm2).samples(records, returns)
    assert [s.advantage for s in samples] == pytest.approx([-1.0, 1.0]) and skipped == 1
    assert make_learner(smollm2).samples([record(prompt="")], np.array([1.0])) == ([], 1)


@pytest.mark.parametrize("objective", ["actions", "tokens"])
def test_samples_have_the_log_probabilities_of_the_engine_behind_the_thought(smollm2, objective):
    settings = make_settings({"prior": {"use_cot": True}, "llm": {"objective": objective, "sft_top_actions": 4}})
    learner = LLMLearner(make_tiny_llm(smollm2.tokenizer), settings.llm, style=prompt_style(settings))
    builder = PriorBuilder(learner.llm, learner.style, generate_max_len=12)
    requests = [PriorRequest(r.prompt, r.state.valid_actions) for r in RECORDS]
    priors = asyncio.run(TransformersEngine(builder).priors(requests))
    records = [dataclasses.replace(r, prior=prior) for r, prior in zip(RECORDS, priors, strict=True)]
    samples, skipped = learner.samples(records, RETURNS)
    assert skipped == 0 and len({prior.completion for prior in priors}) > 1
    for made, prior, sample in zip(records, priors, samples, strict=True):
        assert smollm2.tokenizer.decode(sample.row.prompt_ids) == made.prompt + prior.completion
        with torch.no_grad():
            logprobs, _ = learner.objective_logprobs([sample], *learner.llm.token_logprobs([sample.row]))
        own = logprobs.sum(dim=1).numpy()[sample.chosen]  # the order of the others depends on the objective
        want = (prior.logprobs if objective == "actions" else prior.rollout_logprobs)[made.chosen]
        assert own == pytest.approx(want, abs=1e-4) and sample.rollout_logprob == pytest.approx(want, abs=1e-6)


def test_samples_with_chain_of_thought_need_an_answer_heading(smollm2):
    settings = make_settings({"prior": {"mode": "rank", "use_cot": True}})
    learner = LLMLearner(make_tiny_llm(smollm2.tokenizer), settings.llm, style=prompt_style(settings))
    thought = record(completion="The mailbox looks useful.\nAnswer:\n1. go north")
    samples, skipped = learner.samples([thought, record(completion="I cannot say.")], np.array([0.0, 1.0]))
    assert len(samples) == 1 and skipped == 1
    row = samples[0].row
    assert smollm2.tokenizer.decode(row.prompt_ids) == "Where to? 0The mailbox looks useful.\nAnswer:\n"
    assert smollm2.tokenizer.decode(row.completions[0]) == "1. open mailbox\n"
