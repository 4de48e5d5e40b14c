"""Fine-tuning of the LLM: which decisions teach what, and that micro-batches change nothing."""

from __future__ import annotations

import asyncio
import copy
import dataclasses

import numpy as np
import pytest
import torch

from priorzero.llm.engines import PriorBuilder, TransformersEngine
from priorzero.llm.fine_tuning import LLMLearner, choose_answers
from priorzero.llm.losses import kl_loss
from priorzero.llm.packing import PromptRow
from priorzero.llm.prompts import prompt_style
from priorzero.types import PriorRequest, UserError
from tests.helpers.models import make_settings, make_tiny_llm
from tests.helpers.records import record


def learner(smollm2, *, seed=0, **llm):
    settings = make_settings({"llm": {"learning_rate": 1e-2, "grad_clip": 1e9, "objective": "tokens", **llm}})
    return LLMLearner(make_tiny_llm(smollm2.tokenizer, seed=seed), settings.llm, style=prompt_style(settings))


def parameters(made):
    return torch.cat([p.detach().ravel().clone() for p in made.llm.model.parameters()])


RECORDS = [record(t, visits=np.roll((6, 3, 1, 0), t), chosen=(t + t // 3) % 4) for t in range(8)]
RETURNS = np.array([3.0, -1.0, 0.5, 2.0, 0.0, 1.0, 4.0, -2.0])


def test_top_answers_are_renormalised_and_hold_the_played_one():
    positions, probs = choose_answers(record(visits=(6, 3, 1, 0)), top=2)
    assert positions == [0, 1] and probs == pytest.approx([6 / 9, 3 / 9])
    positions, probs = choose_answers(record(visits=(6, 3, 1, 0), chosen=2), top=2)
    assert positions == [0, 1, 2] and probs == pytest.approx([6 / 9, 3 / 9, 0.0])
    positions, probs = choose_answers(record(visits=(0, 0, 5, 0), chosen=2), top=4)
    assert positions == [2] and probs == pytest.approx([1.0])


def gradient_of_one_step(smollm2, micro_batch_size, **llm):
    made = learner(smollm2, micro_batch_size=micro_batch_size, **llm)
    gradients = {}
    for name, p in made.llm.model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: gradients.__setitem__(name, p.grad.clone()))
    samples, skipped = made.samples(RECORDS, RETURNS)
    assert len(samples) == 8 and skipped == 0
    losses = made.learn(samples)
    return torch.cat([gradients[name].ravel() for name in sorted(gradients)]), losses


@pytest.mark.parametrize("objective", ["tokens", "actions"])
def test_micro_batches_of_1_2_and_8_give_one_gradient(smollm2, objective):
    whole, whole_losses = gradient_of_one_step(smollm2, 8, objective=objective)
    assert whole.norm() > 1e-3
    for size in (1, 2, 4):
        cut, losses = gradient_of_one_step(smollm2, size, objective=objective)
        assert (cut - whole).norm() / whole.norm() < 1e-5, size
        assert losses == pytest.approx(whole_losses, rel=1e-4), size


def test_loss_weights_act_on_the_gradient(smollm2):
    def norm(**llm):
        made = learner(smollm2, **llm)
        return made.learn(made.samples(RECORDS, RETURNS)[0])["grad_norm"]

    assert norm(enable_rft=False, llm_loss_weight=1.0) == pytest.approx(
        2 * norm(enable_rft=False, llm_loss_weight=0.5), rel=1e-4
    )
    assert norm(enable_sft=False, rft_loss_weight=0.9) == pytest.approx(
        3 * norm(enable_sft=False, rft_loss_weight=0.3), rel=1e-4
    )


def test_rft_without_advantage_moves_nothing(smollm2):
    made = learner(smollm2, enable_sft=False)
    before = parameters(made)
    # Equal differences between return and baseline: nothing was better than expected.
    records = [dataclasses.replace(r, predicted_value=float(t)) for t, r in enumerate(RECORDS)]
    samples, _ = made.samples(records, np.arange(8.0) + 1.0)
    assert [s.advantage for s in samples] == [0.0] * 8
    made.learn(samples)
    assert torch.equal(parameters(made), before)
    made.learn(made.samples(records, RETURNS)[0])
    assert not torch.equal(parameters(made), before)


@pytest.mark.parametrize("disabled", ["enable_rft", "enable_sft"])
def test_learning_raises_what_it_should(smollm2, disabled):
    """SFT raises the log-probability of the most visited action, RFT that of the action with the higher return."""
    made = learner(smollm2, **{disabled: False})
    good, bad = record(visits=(9, 1, 0, 0), chosen=0), record(visits=(9, 1, 0, 0), chosen=1)
    samples, _ = made.samples([good, bad], np.array([1.0, -1.0]))
    both = learner(smollm2).samples([good], np.array([1.0]))[0][0].row  # without SFT a row holds what was played

    def gap():
        with torch.no_grad():
            logprobs, _ = made.llm.token_logprobs([both])
        return (logprobs[0].sum() - logprobs[1].sum()).item()

    before = gap()
    for _ in range(5):
        made.learn(samples)
    assert gap() > before + 0.1


def test_the_objective_over_actions_is_the_cross_entropy_of_the_prior(smollm2):
    """Against the prior that the engine makes of the same question."""
    made = learner(smollm2, objective="actions", enable_rft=False)
    samples, _ = made.samples(RECORDS, RETURNS)
    builder = PriorBuilder(made.llm, made.style)
    engine = TransformersEngine(builder, rows_per_forward=1)
    priors = asyncio.run(engine.priors([PriorRequest(r.prompt, r.state.valid_actions) for r in RECORDS]))
    want = -np.mean([r.visit_probs() @ prior.logprobs for r, prior in zip(RECORDS, priors, strict=True)])
    losses = made.learn(samples)
    assert losses["sft_loss"] == pytest.approx(want, rel=1e-4)
    for _ in range(20):
        losses = made.learn(samples)
    entropy = -np.mean([(p := r.visit_probs())[p > 0] @ np.log(p[p > 0]) for r in RECORDS])
    assert entropy - 1e-4 <= losses["sft_loss"] < entropy + 0.5 * (want - entropy)


def test_the_ratio_over_actions_is_that_of_the_prior(smollm2):
    """Equal to the stored prior means a ratio of one: clipped and plain give one gradient."""
    norms = []
    for clip in (0.0, 0.2):
        made = learner(smollm2, objective="actions", enable_sft=False, rft_clip=clip)
        engine = TransformersEngine(PriorBuilder(made.llm, made.style), rows_per_forward=1)
        priors = asyncio.run(engine.priors([PriorRequest(r.prompt, r.state.valid_actions) for r in RECORDS]))
        records = [dataclasses.replace(r, prior=prior) for r, prior in zip(RECORDS, priors, strict=True)]
        samples, skipped = made.samples(records, RETURNS)
        assert skipped == 0
        result = made.learn(samples)
        norms.append(result["grad_norm"])
        if clip:  # advantages are centred, so a ratio of one everywhere gives zero
            assert result["rft_loss"] == pytest.approx(0.0, abs=1e-4)
    assert norms[1] == pytest.approx(norms[0], rel=1e-3) and norms[0] > 1e-3


def test_scores_are_learned_as_actions_and_lists_as_tokens(smollm2):
    assert learner(smollm2, objective="auto").objective == "actions"
    settings = make_settings({"prior": {"mode": "rank"}})
    assert LLMLearner(smollm2, settings.llm, style=prompt_style(settings)).objective == "tokens"


def test_clipping_needs_to_know_what_was_said_when_it_was_played(smollm2):
    made = learner(smollm2, rft_clip=0.2)
    known = record(1, rollout=np.array([-4.0, -8.0, -20.0, -2.0]), chosen=2)
    samples, skipped = made.samples([record(0), known], np.array([0.0, 1.0]))
    assert skipped == 1 and [s.rollout_logprob for s in samples] == [-20.0]


def test_what_has_moved_out_of_the_clip_moves_no_further(smollm2):
    """The played command is already far likelier than when it was played, so its gain pulls no longer."""
    made = learner(smollm2, rft_clip=0.2, enable_sft=False)
    samples, _ = made.samples([record(t, rollout=np.full(4, -500.0)) for t in range(2)], np.array([1.0, 0.0]))
    gaining = [s for s in samples if s.advantage > 0]
    before = parameters(made)
    made.learn(gaining)
    assert torch.equal(parameters(made), before)
    with torch.no_grad():
        now = made.llm.token_logprobs([s.row for s in gaining])[0].sum(dim=1).tolist()
    made.learn([dataclasses.replace(s, rollout_logprob=said) for s, said in zip(gaining, now, strict=True)])
    assert not torch.equal(parameters(made), before)


def test_the_kl_penalty_is_nothing_at_first_and_holds_the_model_back(smollm2):
    moved = {}
    for kl_weight in (0.0, 100.0):
        made = learner(smollm2, kl_weight=kl_weight, learning_rate=1e-3)
        made.llm = dataclasses.replace(made.llm, reference=copy.deepcopy(made.llm.model))
        samples, _ = made.samples(RECORDS, RETURNS)
        first = made.learn(samples)
        assert first["kl_loss"] == pytest.approx(0.0, abs=1e-6)
        for _ in range(10):
            last = made.learn(samples)
        with torch.no_grad():
            rows = [PromptRow(s.row.prompt_ids, [s.row.completions[s.played]]) for s in samples]
            now, mask = made.llm.token_logprobs(rows)
            moved[kl_weight] = kl_loss(now, made.llm.reference_logprobs(rows), mask)[0].item()
        assert (last["kl_loss"] > 0) == (kl_weight > 0)
    assert moved[100.0] < 0.2 * moved[0.0]


def test_a_loss_that_is_not_finite_is_named_and_changes_nothing(smollm2):
    made = learner(smollm2)
    samples, _ = made.samples(RECORDS, RETURNS)
    before = parameters(made)
    with pytest.raises(UserError, match=r"rft_loss is nan.*llm\.learning_rate"):
        made.learn([dataclasses.replace(samples[0], advantage=float("nan")), *samples[1:]])
    with pytest.raises(UserError, match="sft_loss is nan"):
        made.learn([dataclasses.replace(s, target_probs=np.full_like(s.target_probs, np.nan)) for s in samples])
    assert torch.equal(parameters(made), before)


class SmallMemory:
    """A language model on a GPU with memory for some decisions at a time.

    Attributes:
        largest: decisions that fit.
        asked: decisions of each attempt.
    """

    def __init__(self, llm, *, largest):
        self._llm = llm
        self.largest = largest
        self.asked = []

    def __getattr__(self, name):
        return getattr(self._llm, name)

    def token_logprobs(self, rows, **how):
        self.asked.append(len(rows))
        if len(rows) > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._llm.token_logprobs(rows, **how)


def test_out_of_memory_halves_the_micro_batch_once_and_changes_no_gradient(smollm2):
    rooms = {}
    for largest in (4, 2):
        made = learner(smollm2, batch_size=4, micro_batch_size=4)
        samples, _ = made.samples([record(t) for t in range(4)], np.arange(4.0))
        made.llm = made.scorer._llm = SmallMemory(made.llm, largest=largest)
        made.learn(samples)
        rooms[largest] = parameters(made)
        assert made.llm.asked == ([4] if largest == 4 else [4, 2, 2])
        made.learn(samples)  # it is not tried in vain a second time
        assert made.llm.asked[-2:] == ([4, 4] if largest == 4 else [2, 2])
    torch.testing.assert_close(rooms[4], rooms[2], atol=1e-5, rtol=0)

    made = learner(smollm2, batch_size=4, micro_batch_size=4)
    made.llm = made.scorer._llm = SmallMemory(made.llm, largest=1)
    before = parameters(made)
    with pytest.raises(UserError, match=r"with 2 decisions at a time; type --set llm\.micro_batch_size=1"):
        made.learn(samples)
    assert torch.equal(parameters(made), before)


def test_decisions_without_prompt_teach_nothing_and_are_counted(smollm2):
    made = learner(smollm2)
    samples, skipped = made.samples([record(prompt=""), record(1)], np.array([0.0, 1.0]))
    assert len(samples) == 1 and skipped == 1


def test_advantages_are_normalised_over_what_is_learned_from(smollm2):
    records, returns = [record(0), record(1), record(prompt="")], np.array([1.0, 3.0, 1000.0])
    samples, skipped = learner(smollm2).samples(records, returns)
    assert [s.advantage for s in samples] == pytest.approx([-1.0, 1.0]) and skipped == 1
    assert learner(smollm2).samples([record(prompt="")], np.array([1.0])) == ([], 1)


def test_chain_of_thought_is_context_and_a_missing_answer_line_is_counted(smollm2):
    settings = make_settings({"prior": {"mode": "rank", "use_cot": True}})
    made = LLMLearner(make_tiny_llm(smollm2.tokenizer), settings.llm, style=prompt_style(settings))
    thought = record(completion="The mailbox looks useful.\nAnswer:\n1. go north")
    samples, skipped = made.samples([thought, record(completion="I cannot say.")], np.array([0.0, 1.0]))
    assert len(samples) == 1 and skipped == 1
    row = samples[0].row
    assert smollm2.tokenizer.decode(row.prompt_ids) == "Where to? 0The mailbox looks useful.\nAnswer:\n"
    assert smollm2.tokenizer.decode(row.completions[0]) == "1. open mailbox\n"
