"""The dual-model policy: UniZero's world model and the language model, searched with and trained together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from loguru import logger

from priorzero.llm.fine_tuning import LLMLearner
from priorzero.llm.models import LanguageModel
from priorzero.llm.prompts import prompt_style
from priorzero.search import mcts
from priorzero.search.base import Root, SearchResult
from priorzero.search.root import entropy_bin, mix_root_logits, root_probs
from priorzero.search.tree import compile_functions
from priorzero.settings import Settings
from priorzero.types import Plain, StepRecord, UserError
from priorzero.world_model.batch import ReplayBatch, SampledDecisions, SampledSequences
from priorzero.world_model.lightzero import register_policy
from priorzero.world_model.unizero import UniZeroLearner, set_learning_rate


@register_policy("priorzero")
class PriorZeroPolicy(UniZeroLearner):
    """UniZero's policy with an LLM's prior at the root and a learning step for each model.

    Attributes:
        llm_learner: fine-tunes the language model; None for plain UniZero.
        llm_version: number of LLM updates.
    """

    def __init__(self, settings: Settings, *, feature_size: int, device: str, llm: LanguageModel | None) -> None:
        super().__init__(settings, feature_size=feature_size, device=device)
        self.search_cfg, self.prior_cfg = settings.search, settings.prior
        compile_functions()
        self.llm_learner: LLMLearner | None = None
        if llm is not None:
            self.llm_learner = LLMLearner(
                llm, settings.llm, style=prompt_style(settings), temperature=settings.prior.temperature
            )
        self.llm_cfg = settings.llm
        self.llm_version = 0

    @torch.no_grad()
    def search(self, roots: Sequence[Root], *, num_actions: int) -> list[SearchResult]:
        """Run MCTS from each root. The result of a root does not depend on the others.

        Only actions with indices below ``num_actions`` are expanded below the root.

        Raises:
            UserError: the world model's outputs are not finite.
        """
        self.network.eval()
        contexts = self.inference.root_contexts(roots)
        all_logits, values = self.inference.predict(contexts)
        if not (np.isfinite(all_logits).all() and np.isfinite(values).all()):
            raise UserError("the world model's outputs are not finite; lower train.learning_rate or train.grad_clip")
        policy_logits = [logits[root.legal_actions] for root, logits in zip(roots, all_logits, strict=True)]
        weights = [
            0.0 if root.prior_weights is None else float(root.prior_weights[entropy_bin(logits)])
            for root, logits in zip(roots, policy_logits, strict=True)
        ]
        root_logits = [
            mix_root_logits(logits, root.prior_logprobs, alpha=weight, floor=self.prior_cfg.floor)
            for root, logits, weight in zip(roots, policy_logits, weights, strict=True)
        ]
        probs = [
            root_probs(logits, root.noise, noise_weight=self.search_cfg.root_noise_weight)
            for root, logits in zip(roots, root_logits, strict=True)
        ]
        trees = mcts.search(
            self.inference,
            contexts,
            legal_actions=[root.legal_actions for root in roots],
            priors=probs,
            seeds=[root.seed for root in roots],
            cfg=self.search_cfg,
            num_actions=num_actions,
        )
        searched = mcts.root_statistics(trees, discount=self.search_cfg.discount_factor)
        return [
            SearchResult(
                visit_counts=found.visit_counts,
                root_value=found.value,
                predicted_value=float(value),
                policy_logits=policy_logits[b],
                prior_weight=weights[b],
                root_logits=root_logits[b],
                root_probs=probs[b],
                action_values=found.action_values,
                tree=mcts.search_tree(
                    trees, b, legal_actions=root.legal_actions, discount=self.search_cfg.discount_factor
                )
                if root.with_tree
                else None,
            )
            for b, (root, found, value) in enumerate(zip(roots, searched, values, strict=True))
        ]

    def llm_decisions(self, sequences: SampledSequences, imitated: Sequence[StepRecord] = ()) -> SampledDecisions:
        """The ``llm.batch_size`` decisions that the LLM learns from: ``imitated`` and, in runs, those of a sample."""
        count = self.llm_cfg.batch_size - len(imitated)
        return sequences.decisions(count, run_length=self.llm_cfg.run_length).with_imitated(imitated)

    def learn_llm(self, decisions: SampledDecisions) -> dict[str, float]:
        """Update the LLM once; returns metrics under ``train/``.

        Raises:
            NonFiniteError: a loss or a gradient is not finite. The LLM is unchanged.
        """
        assert self.llm_learner is not None
        samples, skipped = self.llm_learner.samples(
            decisions.records, decisions.returns, weights=decisions.weights, num_imitated=decisions.num_imitated
        )
        if not samples:
            logger.warning(
                f"skipped an LLM update: none of its {skipped} decisions can be used, because each has no prompt, "
                'no "Answer:" heading, or too long a prompt'
            )
            return {"train/llm_samples_skipped": float(skipped)}
        result = self.llm_learner.learn(samples)
        self.llm_version += 1
        return {
            **{f"train/llm_{name}": value for name, value in result.items()},
            "train/llm_samples_skipped": float(skipped),
            "train/llm_version": float(self.llm_version),
        }

    def training_state(self) -> Plain:
        """What further updates depend on besides the models' parameters."""
        learner = self.llm_learner
        return {
            **super().training_state(),
            "llm_optimizer": None if learner is None else learner.optimizer.state_dict(),
            "llm_version": self.llm_version,
        }

    def load_training_state(self, state: Plain) -> None:
        super().load_training_state(state)
        if self.llm_learner is not None:
            self.llm_learner.optimizer.load_state_dict(state["llm_optimizer"])
            set_learning_rate(self.llm_learner.optimizer, self.llm_learner.cfg.learning_rate)
        self.llm_version = state["llm_version"]

    # ---- the methods that DI-engine calls ----

    _forward_collect = _forward_eval = search

    def _forward_learn(self, data: tuple[ReplayBatch, int, bool]) -> dict[str, Any]:
        """Update the world model on the whole batch and, if requested, the LLM on a part of it.

        Args:
            data: the batch, ``train_iter``, and whether to update the LLM.

        Returns:
            The results of :meth:`learn_world_model` and :meth:`learn_llm`, and ``train/total_loss``.
        """
        batch, train_iter, update_llm = data
        metrics = self.learn_world_model(batch, train_iter=train_iter)
        if update_llm:
            metrics.update(self.learn_llm(self.llm_decisions(batch.sequences)))
        add_total_loss(metrics)
        return metrics


def add_total_loss(metrics: dict[str, Any]) -> None:
    """Add ``train/total_loss``, the sum of the losses of the models that were updated, if any was."""
    losses = [metrics[name] for name in ("train/wm_total_loss", "train/llm_loss") if name in metrics]
    if losses:
        metrics["train/total_loss"] = sum(losses)
