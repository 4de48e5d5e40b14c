"""Fine-tuning of the language model on decisions: SFT on visit counts and RFT on rewards, in micro-batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from loguru import logger

from priorzero.llm.losses import action_logprobs, gradient_norm, kl_loss, normalised_advantages, rft_loss, sft_loss
from priorzero.llm.models import LanguageModel
from priorzero.llm.packing import PromptRow
from priorzero.llm.prompts import PromptStyle, completion_text, training_context
from priorzero.runtime.process_group import ProcessGroup
from priorzero.settings import LLMSettings
from priorzero.types import NonFiniteError, StepRecord, UserError


@dataclass(frozen=True)
class LLMSample:
    """One decision as the language model is trained on it. C is the number of actions that take part.

    ``rollout_logprob`` is the log-probability of the chosen action when it was taken: of its text (objective
    ``tokens``) or among the valid actions (objective ``actions``). It is NaN if it is unknown (``rank``). ``weight``
    multiplies the decision's losses.
    """

    row: PromptRow  # the context and the C completions
    target_probs: np.ndarray  # [C], share of the visits of each action, sums to one
    chosen: int  # index of the completion of the action that was taken
    advantage: float  # of that action
    rollout_logprob: float
    weight: float = 1.0


def select_actions(record: StepRecord, *, top: int) -> tuple[list[int], np.ndarray]:
    """Select the actions of a decision that the LLM is trained on: the ``top`` most visited ones and the chosen one.

    Returns positions in the valid actions, and the target probabilities: shares of the visits, normalised over the top
    actions, and zero for a chosen action that is not among them.
    """
    counts = record.visit_counts
    order = np.argsort(-counts, kind="stable")[:top]
    positions = [int(k) for k in order if counts[k] > 0]
    probs = counts[positions] / max(1, counts[positions].sum())
    if record.chosen not in positions:
        positions.append(record.chosen)
        probs = np.append(probs, 0.0)
    return positions, probs.astype(np.float32)


def _with_taken_action(record: StepRecord) -> StepRecord:
    """The decision as it is imitated: all visits are those of the action that was taken."""
    visit_counts = np.zeros_like(record.visit_counts)
    visit_counts[record.chosen] = 1
    return dataclasses.replace(record, visit_counts=visit_counts)


class _Scorer(torch.nn.Module):
    """``LanguageModel.token_logprobs`` as a module, which a :class:`ProcessGroup` can wrap (DDP, FSDP)."""

    def __init__(self, llm: LanguageModel) -> None:
        super().__init__()
        self.model = llm.model
        self._llm: Any = llm

    def forward(self, rows: Sequence[PromptRow]) -> tuple[torch.Tensor, torch.Tensor]:
        return self._llm.token_logprobs(rows)


class LLMLearner:
    """Trains ``llm``, which the prior engine shares. The gradient of a batch does not depend on the micro-batch size.

    ``style`` determines how an action is written as a completion, and ``temperature`` is the prior's (objective
    ``actions``). Every learner of a ``group`` gets its own part of the samples; None for a single learner.
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
        self.micro_batch_size = cfg.micro_batch_size  # halved once if the GPU's memory does not suffice
        self.is_consistent = True  # False if an optimiser step failed halfway, so that parameters are partly updated
        self._needs_rollout_logprobs = cfg.enable_rft and cfg.rft_clip > 0
        self._loss_weights = {
            "sft_loss": cfg.llm_loss_weight if cfg.enable_sft else 0.0,
            "rft_loss": cfg.rft_loss_weight if cfg.enable_rft else 0.0,
            "kl_loss": cfg.kl_weight,
        }
        # No weight decay: a batch with zero gradient must not change the parameters.
        self.optimizer = torch.optim.AdamW(llm.trainable_parameters(), lr=cfg.learning_rate, weight_decay=0.0)

    @property
    def learns(self) -> bool:
        """Whether any loss has a positive weight."""
        return any(weight > 0 for weight in self._loss_weights.values())

    def samples(
        self,
        records: Sequence[StepRecord],
        returns: np.ndarray,
        *,
        weights: np.ndarray | None = None,
        num_imitated: int = 0,
    ) -> tuple[list[LLMSample], int]:
        """Convert n decisions, their discounted returns ``[n]`` and their importance weights ``[n]`` to samples.

        The last ``num_imitated`` decisions are imitated: SFT's target is the action that was taken, the advantage is 0,
        and their returns have no influence on the advantages of the others.

        Also returns the number of decisions that cannot be used: no prompt, no thought (chain of thought), too long
        for the model, or no log-probability of the chosen action although ``rft_clip`` needs it.
        """
        own = len(records) - num_imitated
        samples, kept = self.prepare([*records[:own], *map(_with_taken_action, records[own:])])
        if not samples:
            return [], len(records)
        by_return = [i for i in kept if i < own]
        values = [records[i].predicted_value if self.cfg.rft_baseline == "value" else 0.0 for i in by_return]
        advantages = np.zeros(len(samples))
        if by_return:
            advantages[: len(by_return)] = normalised_advantages(np.asarray(returns)[by_return], np.array(values))
        samples = self.with_advantages(samples, advantages)
        if weights is not None:
            samples = [dataclasses.replace(s, weight=float(w)) for s, w in zip(samples, weights[kept], strict=True)]
        return samples, len(records) - len(samples)

    @staticmethod
    def with_advantages(samples: Sequence[LLMSample], advantages: np.ndarray) -> list[LLMSample]:
        """Copies of the samples with the given advantages, ``[n]``."""
        return [dataclasses.replace(s, advantage=float(a)) for s, a in zip(samples, advantages, strict=True)]

    def prepare(self, records: Sequence[StepRecord]) -> tuple[list[LLMSample], list[int]]:
        """Samples whose advantages are 0, and the index in ``records`` of each sample's decision."""
        samples, kept = [], []
        for i, record in enumerate(records):
            sample = self._sample(record)
            if sample is not None:
                samples.append(sample)
                kept.append(i)
        return samples, kept

    def _sample(self, record: StepRecord) -> LLMSample | None:
        """The sample of a decision with advantage 0; None if the decision cannot be used."""
        completion = record.prior.completion if record.prior is not None else None
        context = training_context(record.prompt, completion, style=self.style) if record.prompt else None
        rollout = self._rollout_logprobs(record)
        if context is None or (rollout is None and self._needs_rollout_logprobs):
            return None
        if self.objective == "actions":
            positions, probs = list(range(len(record.visit_counts))), record.visit_probs()
        else:
            positions, probs = select_actions(record, top=self.cfg.sft_top_actions if self.cfg.enable_sft else 0)
        completions = [completion_text(record.state.valid_actions[k], style=self.style) for k in positions]
        try:
            row = self.llm.row(context, completions, end_of_turn=self.style.ends_turn)
        except ValueError:
            return None
        logprob = math.nan if rollout is None else float(rollout[record.chosen])
        return LLMSample(row, probs, positions.index(record.chosen), advantage=0.0, rollout_logprob=logprob)

    def _rollout_logprobs(self, record: StepRecord) -> np.ndarray | None:
        prior = record.prior
        if prior is None or prior.source != "score":
            return None
        return prior.logprobs if self.objective == "actions" else prior.rollout_logprobs

    def objective_logprobs(
        self, samples: Sequence[LLMSample], token_logprobs: torch.Tensor, completion_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities that the losses are computed from, and their mask.

        Objective ``tokens``: the arguments, ``[R, T]`` for R completions in total. Objective ``actions``: ``[R, 1]``,
        the prior over the valid actions.
        """
        if self.objective == "tokens":
            return token_logprobs, completion_mask
        num_completions = [len(s.row.completions) for s in samples]
        logprobs = action_logprobs(token_logprobs, completion_mask, num_completions, temperature=self.temperature)
        return logprobs[:, None], torch.ones_like(completion_mask[:, :1])

    def _denominators(self, samples: Sequence[LLMSample]) -> dict[str, float]:
        """What each summed loss is divided by, over the samples of all learners: tokens, or decisions.

        Decisions and their tokens count with the weight of the decision. In the SFT loss, the tokens of a completion
        also count with its target probability.
        """
        if self.objective == "actions":
            sft = rft = sum(s.weight for s in samples)
        else:
            sft = sum(s.weight * float(s.target_probs @ [len(c) for c in s.row.completions]) for s in samples)
            rft = sum(s.weight * len(s.row.completions[s.chosen]) for s in samples)
        totals = self.group.sum({"sft_loss": sft, "rft_loss": rft, "kl_loss": rft})
        return {name: max(1.0, total) for name, total in totals.items()}

    def learn(self, samples: Sequence[LLMSample]) -> dict[str, float]:
        """Make one optimiser step on at least one sample.

        The losses are means over tokens, or over decisions (objective ``actions``). If a GPU's memory does not suffice,
        the micro-batch is halved, once in a run; this does not change the gradient.

        Returns:
            ``sft_loss``, ``rft_loss`` and ``kl_loss`` (unweighted; the last is 0 if ``kl_weight`` is 0), ``loss``
            (weighted sum) and ``grad_norm`` (before the clipping).

        Raises:
            NonFiniteError: a loss or the gradient is not finite; the parameters are unchanged.
            UserError: the memory does not suffice for half a micro-batch either.
        """
        try:
            result = self._gradient(samples)
        except torch.OutOfMemoryError as error:
            self.optimizer.zero_grad(set_to_none=True)
            halved = self.micro_batch_size < self.cfg.micro_batch_size
            # The learners of a group must run the same number of forward passes, so none may halve alone.
            if halved or self.micro_batch_size == 1 or self.group.size > 1:
                raise UserError(
                    f"out of GPU memory in an LLM update with {self.micro_batch_size} decisions at a time; type --set "
                    "llm.micro_batch_size=1, then --set llm.prompt_max_len=512, then --set llm.use_lora=true"
                ) from error
        else:
            self._step()
            return result
        self.micro_batch_size //= 2
        torch.cuda.empty_cache()
        logger.warning(f"out of GPU memory in an LLM update; the micro-batch size is now {self.micro_batch_size}")
        return self.learn(samples)

    def _step(self) -> None:
        self.is_consistent = False
        try:
            self.optimizer.step()
        except torch.OutOfMemoryError as error:
            raise UserError(
                "out of GPU memory in the LLM's optimiser, during its step; type --set llm.use_lora=true"
            ) from error
        self.is_consistent = True
        self.optimizer.zero_grad(set_to_none=True)

    def _gradient(self, samples: Sequence[LLMSample]) -> dict[str, float]:
        """Accumulate the gradient of the batch and clip it; returns the same as :meth:`learn`."""
        denominators = self._denominators(samples)
        device_totals = {name: torch.zeros((), dtype=torch.float64, device=self.llm.device) for name in denominators}
        self.optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(samples), self.micro_batch_size):
            micro_batch = samples[start : start + self.micro_batch_size]
            last = start + self.micro_batch_size >= len(samples)
            with self.group.accumulate(self.scorer, last=last):
                sums = self._losses(micro_batch)
                terms = (self._loss_weights[name] * value / denominators[name] for name, value in sums.items())
                loss = sum(terms, start=torch.zeros((), device=self.llm.device))
                # A group averages the gradients of its learners, but the denominators are over all learners.
                (self.group.size * loss).backward()
            for name, value in sums.items():
                device_totals[name] += value.detach()
        # Read after the last micro-batch, since a GPU is waited for here.
        totals = self.group.sum({name: total.item() for name, total in device_totals.items()})
        norm = gradient_norm(self.llm.trainable_parameters(), max_norm=self.cfg.grad_clip)
        for name, total in {**totals, "gradient norm": norm}.items():
            if not math.isfinite(total):
                self._raise_nonfinite(f"{name} is {total}")
        losses = {name: total / denominators[name] for name, total in totals.items()}
        return {**losses, "loss": sum(self._loss_weights[name] * losses[name] for name in losses), "grad_norm": norm}

    def _losses(self, micro_batch: Sequence[LLMSample]) -> dict[str, torch.Tensor]:
        """Summed losses of a micro-batch of M samples with R completions."""
        rows = [s.row for s in micro_batch]
        # Copied before the forward pass starts, since a GPU that computes is waited for.
        target_probs = torch.cat([s.weight * torch.as_tensor(s.target_probs) for s in micro_batch]).to(self.llm.device)
        firsts = np.cumsum([0, *(len(s.row.completions) for s in micro_batch[:-1])])
        chosen = torch.as_tensor(firsts + [s.chosen for s in micro_batch], device=self.llm.device)  # (M,)
        scalars = [[s.weight for s in micro_batch], [s.advantage for s in micro_batch]]
        scalars.append([s.rollout_logprob for s in micro_batch])
        weights, advantages, rollout = torch.tensor(scalars, device=self.llm.device)  # (M,) each
        token_logprobs, completion_mask = self.scorer(rows)  # (R, T)
        logprobs, mask = self.objective_logprobs(micro_batch, token_logprobs, completion_mask)  # (R, T) or (R, 1)
        sums = {"sft_loss": sft_loss(logprobs, mask, target_probs)[0]}  # target_probs: (R,)
        sums["rft_loss"], _ = rft_loss(
            logprobs[chosen], mask[chosen], weights * advantages, rollout_logprobs=rollout, clip=self.cfg.rft_clip
        )
        if self.cfg.kl_weight > 0:
            reference, _ = self.objective_logprobs(micro_batch, self.llm.reference_logprobs(rows), completion_mask)
            sums["kl_loss"], _ = kl_loss(logprobs[chosen], reference[chosen], mask[chosen], weights=weights)
        return sums

    def _raise_nonfinite(self, problem: str) -> NoReturn:
        self.optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(
            f"the LLM's {problem} in an update, which was not applied; lower llm.learning_rate="
            f"{self.cfg.learning_rate:g} or llm.grad_clip={self.cfg.grad_clip:g}"
        )
