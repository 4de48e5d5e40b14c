"""Fine-tuning of the language model on decisions: SFT on visit counts and RFT on rewards, in micro-batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from loguru import logger

from priorzero.llm.losses import action_logprobs, gradient_norm, kl_loss, normalised_advantages, rft_loss, sft_loss
from priorzero.llm.models import LanguageModel
from priorzero.llm.packing import PromptRow
from priorzero.llm.prompts import PromptStyle, completion_text, learning_context
from priorzero.runtime.process_group import ProcessGroup
from priorzero.settings import LLMSettings
from priorzero.types import NonFiniteError, StepRecord, UserError


@dataclass(frozen=True)
class LLMSample:
    """One decision as the language model learns from it. All lists are over the C actions that take part.

    Attributes:
        row: token ids of the context and of the C answers.
        target_probs: share of the visits of each answer's action, ``[C]``, sums to one.
        played: index of the answer whose action was played.
        advantage: of the played action.
        rollout_logprob: of the played answer when it was played, of its text or among the valid actions as the
            objective wants it; NaN if not known (``rank``).
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


class _Scorer(torch.nn.Module):
    """The forward pass that is learned through, as a module, which is what a group of learners wraps."""

    def __init__(self, llm: LanguageModel) -> None:
        super().__init__()
        self.model = llm.model
        self._llm: Any = llm

    def forward(self, rows: Sequence[PromptRow]) -> tuple[torch.Tensor, torch.Tensor]:
        return self._llm.token_logprobs(rows)


class LLMLearner:
    """One optimiser step a call, with the gradient of the whole batch whatever the micro-batch.

    Args:
        llm: the language model, shared with the prior engine.
        cfg: the ``llm`` group of the settings.
        style: how answers are written.
        temperature: of the prior (``objective="actions"``).
        group: the learners that share the work; each is given its part of the samples. Alone by default.
    """

    def __init__(
        self,
        llm: LanguageModel,
        cfg: LLMSettings,
        *,
        style: PromptStyle,
        temperature: float = 1.0,
        group: ProcessGroup | None = None,
    ) -> None:
        self.llm = llm
        self.group = group or ProcessGroup()
        self.scorer = self.group.wrap(_Scorer(llm))
        self.cfg = cfg
        self.style = style
        self.temperature = temperature
        auto = "actions" if style.mode == "score" else "tokens"
        self.objective = auto if cfg.objective == "auto" else cfg.objective
        self.micro_batch_size = cfg.micro_batch_size
        self.is_consistent = True  # False after an optimiser step that did not come to its end
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
        samples, kept = self.prepare(records)
        if not samples:
            return [], len(records)
        values = [records[i].predicted_value if self.cfg.rft_baseline == "value" else 0.0 for i in kept]
        advantages = normalised_advantages(np.asarray(returns)[kept], np.array(values))
        return self.with_advantages(samples, advantages), len(records) - len(samples)

    @staticmethod
    def with_advantages(samples: Sequence[LLMSample], advantages: np.ndarray) -> list[LLMSample]:
        """The samples with these advantages, ``[n]``."""
        return [dataclasses.replace(s, advantage=float(a)) for s, a in zip(samples, advantages, strict=True)]

    def prepare(self, records: Sequence[StepRecord]) -> tuple[list[LLMSample], list[int]]:
        """Samples without advantages (they are 0), and the positions of their decisions in ``records``."""
        samples, kept = [], []
        for i, record in enumerate(records):
            completion = record.prior.completion if record.prior is not None else None
            context = learning_context(record.prompt, completion, style=self.style) if record.prompt else None
            rollout = self._rollout_logprobs(record)
            if context is None or (rollout is None and self._clips):
                continue
            if self.objective == "actions":
                positions, probs = list(range(len(record.visit_counts))), record.visit_probs()
            else:
                positions, probs = choose_answers(record, top=self.cfg.sft_top_actions if self.cfg.enable_sft else 0)
            answers = [completion_text(record.state.valid_actions[k], style=self.style) for k in positions]
            try:
                row = self.llm.row(context, answers, end_of_turn=self.style.ends_turn)
            except ValueError:
                continue
            played = positions.index(record.chosen)
            logprob = math.nan if rollout is None else float(rollout[record.chosen])
            samples.append(LLMSample(row, probs, played, advantage=0.0, rollout_logprob=logprob))
            kept.append(i)
        return samples, kept

    def _rollout_logprobs(self, record: StepRecord) -> np.ndarray | None:
        prior = record.prior
        if prior is None or prior.source != "score":
            return None
        return prior.logprobs if self.objective == "actions" else prior.rollout_logprobs

    def objective_logprobs(self, samples: Sequence[LLMSample], logprobs: torch.Tensor, mask: torch.Tensor) -> Any:
        """What the losses are made of: tokens as they are, or one unit an action, its share among the valid ones."""
        if self.objective == "tokens":
            return logprobs, mask
        shares = action_logprobs(
            logprobs,
            mask,
            [len(s.row.completions) for s in samples],
            temperature=self.temperature,
        )
        return shares[:, None], torch.ones_like(mask[:, :1])

    def _num_units(self, samples: Sequence[LLMSample]) -> tuple[float, float]:
        """Units in the SFT loss, each answer's counted by its share of the visits, and units of what was played."""
        if self.objective == "actions":
            return float(len(samples)), float(len(samples))
        visited = sum(float(s.target_probs @ [len(c) for c in s.row.completions]) for s in samples)
        return max(1.0, visited), float(sum(len(s.row.completions[s.played]) for s in samples))

    def learn(self, samples: Sequence[LLMSample]) -> dict[str, float]:
        """One optimiser step on at least one sample.

        The losses are means over tokens, or over decisions (``objective="actions"``); ``llm_loss_weight``,
        ``rft_loss_weight`` and ``kl_weight`` scale their gradients.

        Returns:
            ``sft_loss``, ``rft_loss`` and ``kl_loss`` (unweighted; the last is 0 where ``kl_weight`` is), ``loss``
            (weighted sum) and ``grad_norm`` (before clipping).

        Where a GPU's memory does not suffice, the micro-batch is halved, once in a run: that changes no gradient.

        Raises:
            NonFiniteError: a loss or the gradient is not finite; the parameters are as they were.
            UserError: the memory does not suffice for half a micro-batch either.
        """
        try:
            result = self._gradient(samples)
        except torch.OutOfMemoryError as error:
            self.optimizer.zero_grad(set_to_none=True)
            halved = self.micro_batch_size < self.cfg.micro_batch_size
            if halved or self.micro_batch_size == 1 or self.group.size > 1:  # several must do the same
                raise UserError(
                    f"out of GPU memory in an LLM update with {self.micro_batch_size} decisions at a time; type --set "
                    "llm.micro_batch_size=1, then --set llm.prompt_max_len=512, then --set llm.use_lora=true"
                ) from error
        else:
            self._step()
            return result
        self.micro_batch_size //= 2
        torch.cuda.empty_cache()
        logger.warning(f"out of GPU memory in an LLM update: from now on {self.micro_batch_size} decisions at a time")
        return self.learn(samples)

    def _step(self) -> None:
        self.is_consistent = False
        try:
            self.optimizer.step()
        except torch.OutOfMemoryError as error:
            raise UserError(
                "out of GPU memory for the LLM's optimiser, in the middle of its step; type --set llm.use_lora=true"
            ) from error
        self.is_consistent = True
        self.optimizer.zero_grad(set_to_none=True)

    def _gradient(self, samples: Sequence[LLMSample]) -> dict[str, float]:
        """Accumulate it; returns what :meth:`learn` does."""
        cfg = self.cfg
        loss_weights = {
            "sft_loss": cfg.llm_loss_weight if cfg.enable_sft else 0.0,
            "rft_loss": cfg.rft_loss_weight if cfg.enable_rft else 0.0,
            "kl_loss": cfg.kl_weight,
        }
        # Totals first: every micro-batch is divided by the units of the whole batch.
        sft_units, played_units = self._num_units(samples)
        units = self.group.sum({"sft_loss": sft_units, "rft_loss": played_units, "kl_loss": played_units})
        units = {name: max(1.0, total) for name, total in units.items()}
        totals = dict.fromkeys(units, 0.0)
        self.optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(samples), self.micro_batch_size):
            micro = samples[start : start + self.micro_batch_size]
            last = start + self.micro_batch_size >= len(samples)
            with self.group.accumulate(self.scorer, last=last):
                sums = self._losses(micro)
                # The group averages gradients, and each divides by the units of all.
                loss = sum(loss_weights[name] * value / units[name] for name, value in sums.items())
                (self.group.size * loss).backward()
            for name, value in sums.items():
                totals[name] += value.item()
            if not all(map(math.isfinite, totals.values())) and self.group.size == 1:
                break  # the rest cannot mend it
        totals = self.group.sum(totals)
        for name, total in totals.items():
            if not math.isfinite(total):
                self._give_up(f"{name} is {total}")
        norm = gradient_norm(self.llm.trainable_parameters(), max_norm=cfg.grad_clip)
        if not math.isfinite(norm):
            self._give_up(f"the norm of the gradient is {norm}")
        losses = {name: total / units[name] for name, total in totals.items()}
        return {**losses, "loss": sum(loss_weights[name] * losses[name] for name in losses), "grad_norm": norm}

    def _losses(self, micro: Sequence[LLMSample]) -> dict[str, torch.Tensor]:
        """Summed losses of a micro-batch."""
        token_logprobs, completion_mask = self.scorer([s.row for s in micro])  # (R, T)
        logprobs, mask = self.objective_logprobs(micro, token_logprobs, completion_mask)  # (R, T) or (R, 1)
        target_probs = torch.cat([torch.as_tensor(s.target_probs) for s in micro]).to(logprobs.device)  # (R,)
        sums = {"sft_loss": sft_loss(logprobs, mask, target_probs)[0]}
        firsts = np.cumsum([0, *(len(s.row.completions) for s in micro[:-1])])
        played = torch.as_tensor(firsts + [s.played for s in micro], device=logprobs.device)  # (M,)
        advantages = torch.tensor([s.advantage for s in micro], device=logprobs.device)
        rollout = torch.tensor([s.rollout_logprob for s in micro], device=logprobs.device)
        sums["rft_loss"], _ = rft_loss(
            logprobs[played], mask[played], advantages, rollout_logprobs=rollout, clip=self.cfg.rft_clip
        )
        if self.cfg.kl_weight > 0:
            reference = self.llm.reference_logprobs([s.row for s in micro])
            reference, _ = self.objective_logprobs(micro, reference, completion_mask)
            sums["kl_loss"], _ = kl_loss(logprobs[played], reference[played], mask[played])
        return sums

    def _give_up(self, problem: str) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(
            f"the LLM's {problem} in an update, which was not applied; lower llm.learning_rate="
            f"{self.cfg.learning_rate:g} or llm.grad_clip={self.cfg.grad_clip:g}"
        )
