"""Fine-tuning of the language model on decisions: SFT on visit counts and RFT on rewards, in micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from priorzero.completions import PromptRow
from priorzero.losses import gradient_norm, kl_loss, normalised_advantages, rft_loss, sft_loss
from priorzero.models import LanguageModel
from priorzero.prompts import PromptStyle, answer_text, learning_context
from priorzero.types import StepRecord, UserError


@dataclass(frozen=True)
class LLMSample:
    """One decision as the language model learns from it. All lists are over the C actions that take part.

    Attributes:
        row: token ids of the context and of the C answers.
        target_probs: share of the visits of each answer's action, ``[C]``, sums to one.
        played: index of the answer whose action was played.
        advantage: of the played action.
        rollout_logprob: of the whole played answer when it was played; NaN if not known (``rank``).
    """

    row: PromptRow
    target_probs: np.ndarray
    played: int
    advantage: float
    rollout_logprob: float


def choose_answers(record: StepRecord, *, top: int) -> tuple[list[int], np.ndarray]:
    """Which actions of a decision the LLM learns from.

    Args:
        record: the decision.
        top: at most this many of the visited actions, the most visited ones; 0 leaves the played one alone.

    Returns:
        Positions in the valid actions, the played one always among them, and their shares of the visits: renormalised
        over the top, zero for a played action that is not among them.
    """
    counts = record.visit_counts
    order = np.argsort(-counts, kind="stable")[:top]
    positions = [int(k) for k in order if counts[k] > 0]
    probs = counts[positions] / max(1, counts[positions].sum())
    if record.chosen not in positions:
        positions.append(record.chosen)
        probs = np.append(probs, 0.0)
    return positions, probs.astype(np.float32)


class LLMLearner:
    """One optimiser step a call, with the gradient of the whole batch whatever the micro-batch.

    Args:
        llm: the language model, shared with the prior engine.
        cfg: the ``llm`` group of the settings.
        style: how answers are written.
    """

    def __init__(self, llm: LanguageModel, cfg: Any, *, style: PromptStyle) -> None:
        self.llm = llm
        self.cfg = cfg
        self.style = style
        self._clips = cfg.enable_rft and cfg.rft_clip > 0
        # No weight decay: a batch that teaches nothing must move nothing.
        self.optimizer = torch.optim.AdamW(llm.trainable_parameters(), lr=cfg.learning_rate, weight_decay=0.0)

    def samples(self, records: Sequence[StepRecord], returns: np.ndarray) -> tuple[list[LLMSample], int]:
        """Turn decisions into samples.

        Args:
            records: the decisions.
            returns: their discounted returns, ``[n]``.

        Returns:
            The samples, and how many decisions had nothing to teach (no prompt, no thought to answer after, too long
            for the model, or, where ``rft_clip`` needs one, no log-probability of what was played).
        """
        drafts, differences = [], []
        for record, value in zip(records, returns, strict=True):
            completion = record.prior.completion if record.prior is not None else None
            context = learning_context(record.prompt, completion, style=self.style) if record.prompt else None
            rollout = record.prior.rollout_logprobs if record.prior is not None else None
            if context is None or (rollout is None and self._clips):
                continue
            positions, probs = choose_answers(record, top=self.cfg.sft_top_actions if self.cfg.enable_sft else 0)
            answers = [answer_text(record.state.valid_actions[k], style=self.style) for k in positions]
            try:
                row = self.llm.row(context, answers, end_of_turn=self.style.ends_turn)
            except ValueError:
                continue
            drafts.append(
                (row, probs, positions.index(record.chosen), math.nan if rollout is None else rollout[record.chosen])
            )
            differences.append((value, record.predicted_value if self.cfg.rft_baseline == "value" else 0.0))
        if not drafts:
            return [], len(records)
        advantages = normalised_advantages(*np.array(differences).T)
        samples = [
            LLMSample(row, probs, played, advantage=float(advantage), rollout_logprob=float(rollout))
            for (row, probs, played, rollout), advantage in zip(drafts, advantages, strict=True)
        ]
        return samples, len(records) - len(samples)

    def learn(self, samples: Sequence[LLMSample]) -> dict[str, float]:
        """One optimiser step on at least one sample.

        The losses are means over tokens; ``llm_loss_weight``, ``rft_loss_weight`` and ``kl_weight`` scale their
        gradients.

        Returns:
            ``sft_loss``, ``rft_loss`` and ``kl_loss`` (unweighted; the last is 0 where ``kl_weight`` is), ``loss``
            (weighted sum) and ``grad_norm`` (before clipping).

        Raises:
            UserError: a loss or the gradient is not finite; the parameters are as they were.
        """
        cfg = self.cfg
        loss_weights = {
            "sft_loss": cfg.llm_loss_weight if cfg.enable_sft else 0.0,
            "rft_loss": cfg.rft_loss_weight if cfg.enable_rft else 0.0,
            "kl_loss": cfg.kl_weight,
        }
        # Totals first: every micro-batch is divided by the tokens of the whole batch.
        played_tokens = sum(len(s.row.completions[s.played]) for s in samples)
        tokens = {
            "sft_loss": max(1.0, sum(float(s.target_probs @ [len(c) for c in s.row.completions]) for s in samples)),
            "rft_loss": played_tokens,
            "kl_loss": played_tokens,
        }
        totals = dict.fromkeys(tokens, 0.0)
        self.optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(samples), cfg.micro_batch_size):
            micro = samples[start : start + cfg.micro_batch_size]
            logprobs, mask = self.llm.token_logprobs([s.row for s in micro])  # (R, T)
            target_probs = torch.cat([torch.as_tensor(s.target_probs) for s in micro]).to(logprobs.device)  # (R,)
            sums = {"sft_loss": sft_loss(logprobs, mask, target_probs)[0]}
            firsts = np.cumsum([0, *(len(s.row.completions) for s in micro[:-1])])
            played = torch.as_tensor(firsts + [s.played for s in micro], device=logprobs.device)  # (M,)
            advantages = torch.tensor([s.advantage for s in micro], device=logprobs.device)
            rollout = torch.tensor([s.rollout_logprob for s in micro], device=logprobs.device)
            sums["rft_loss"], _ = rft_loss(
                logprobs[played], mask[played], advantages, rollout_logprobs=rollout, clip=cfg.rft_clip
            )
            if cfg.kl_weight > 0:
                reference = self.llm.reference_logprobs(_played_only(micro))
                sums["kl_loss"], _ = kl_loss(
                    logprobs[played, : reference.shape[1]], reference, mask[played, : reference.shape[1]]
                )
            for name, value in sums.items():
                totals[name] += value.item()
                if not math.isfinite(totals[name]):
                    self._give_up(f"{name} is {totals[name]}")
            sum(loss_weights[name] * value / tokens[name] for name, value in sums.items()).backward()
        norm = gradient_norm(self.llm.trainable_parameters(), max_norm=cfg.grad_clip)
        if not math.isfinite(norm):
            self._give_up(f"the norm of the gradient is {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        losses = {name: total / tokens[name] for name, total in totals.items()}
        return {**losses, "loss": sum(loss_weights[name] * losses[name] for name in losses), "grad_norm": norm}

    def _give_up(self, problem: str) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        raise UserError(
            f"the LLM's {problem} in an update, which was not applied; lower llm.learning_rate="
            f"{self.cfg.learning_rate:g} or llm.grad_clip={self.cfg.grad_clip:g}"
        )


def _played_only(samples: Sequence[LLMSample]) -> list[PromptRow]:
    return [PromptRow(s.row.prompt_ids, [s.row.completions[s.played]]) for s in samples]
