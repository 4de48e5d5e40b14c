"""The dual-model policy: UniZero's world model and the language model, searched with and trained together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from loguru import logger

from priorzero.llm.fine_tuning import LLMLearner
from priorzero.llm.models import LanguageModel
from priorzero.llm.prompts import prompt_style
from priorzero.runtime.quiet import quiet
from priorzero.search.base import Root, SearchResult
from priorzero.search.mcts import search
from priorzero.search.root import mix_root_logits, root_probs
from priorzero.settings import Settings
from priorzero.types import NonFiniteError, UserError
from priorzero.world_model.inference import WorldModelInference
from priorzero.world_model.lightzero import unizero_config
from priorzero.world_model.replay import SampledSegments

with quiet():
    from ding.utils import POLICY_REGISTRY
    from lzero.policy.unizero import UniZeroPolicy


@POLICY_REGISTRY.register("priorzero")
class PriorZeroPolicy(UniZeroPolicy):
    """UniZero's policy with an LLM in the root and a learning step for both models.

    Args:
        settings: all settings, ``settings.group.key``.
        feature_size: ``F``.
        device: ``"cpu"`` or ``"cuda"``.
        llm: the language model; None for plain UniZero.
    """

    def __init__(self, settings: Settings, *, feature_size: int, device: str, llm: LanguageModel | None) -> None:
        with quiet():
            super().__init__(unizero_config(settings, feature_size=feature_size, device=device))
        self.search_cfg, self.prior_cfg = settings.search, settings.prior
        self.inference = WorldModelInference(self._model, to_scalar=self.inverse_scalar_transform_handle)
        self.llm_learner: LLMLearner | None = None
        if llm is not None:
            self.llm_learner = LLMLearner(
                llm,
                settings.llm,
                style=prompt_style(settings),
                temperature=settings.prior.temperature,
            )
        self.llm_batch_size = settings.llm.batch_size
        self.llm_version = 0
        self.features_are_fitted = False
        self._is_weights: torch.Tensor | None = None
        self._value_logits: torch.Tensor | None = None
        for encoder in self._encoders():
            encoder.register_buffer("feature_mean", torch.zeros(feature_size, device=device))
            encoder.register_buffer("feature_deviation", torch.ones(feature_size, device=device))
            encoder.register_forward_pre_hook(_standardise)
        self._optimizer_world_model.register_step_pre_hook(self._check_gradients)
        for name in ("head_observations", "head_rewards", "head_policy", "head_value"):
            getattr(self._model.world_model, name).register_forward_hook(self._weigh_gradient)
        self._model.world_model.head_value.register_forward_hook(self._remember_values)

    # LightZero's loss ignores importance weights and returns no priorities. All of its terms are sums over the outputs
    # of these four heads, so scaling the gradient that reaches them by a sequence's weight weighs its loss.
    def _weigh_gradient(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        if self._is_weights is not None and output.requires_grad:
            weights = self._is_weights.view(-1, *[1] * (output.dim() - 1))
            output.register_hook(lambda gradient: gradient * weights)

    def _remember_values(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        if self._is_weights is not None:
            self._value_logits = output.detach()

    def _check_gradients(self, *_: Any) -> None:
        wrong = [
            n for n, p in self.trained_world_model_parameters() if p.grad is not None and not p.grad.isfinite().all()
        ]
        if wrong:
            raise NonFiniteError(f"the gradient of {wrong[0]} and {len(wrong) - 1} other parameters is not finite")

    def _running_statistics(self) -> list[torch.Tensor]:
        """What a forward pass alone changes: batch normalisation's means and variances, of the model and its target."""
        models = (self._uncompiled(self._model), self._uncompiled(self._target_model._model))
        names = ("running_mean", "running_var", "num_batches_tracked")
        return [b for model in models for name, b in model.named_buffers() if name.endswith(names)]

    def fit_features(self, features: np.ndarray) -> None:
        """From now on shift and scale each feature by its mean and deviation over ``features``, ``[n, F]``.

        Features that did not vary are only shifted. Replay holds them as they are; the models, and their checkpoints,
        hold the shift and the scale.
        """
        features = features[np.isfinite(features).all(axis=1)]
        deviation = features.std(axis=0)
        deviation[deviation < 1e-4] = 1.0
        for encoder in self._encoders():
            encoder.feature_mean.copy_(torch.as_tensor(features.mean(axis=0)))
            encoder.feature_deviation.copy_(torch.as_tensor(deviation))
        self.features_are_fitted = True

    def _encoders(self) -> list[Any]:
        """What observations enter the world model and its target through."""
        models = (self._uncompiled(self._model), self._uncompiled(self._target_model._model))
        return [model.world_model.tokenizer.encoder for model in models]

    @torch.no_grad()
    def search(self, roots: Sequence[Root], *, num_actions: int) -> list[SearchResult]:
        """MCTS from some roots; the result of one does not depend on the others.

        Args:
            roots: where to start.
            num_actions: indices below this have been given out by the vocabulary.
        """
        self._model.eval()
        contexts = self.inference.root_contexts(roots)
        policy_logits, values = self.inference.predict(contexts)
        if not (np.isfinite(policy_logits).all() and np.isfinite(values).all()):
            raise UserError("the world model's outputs are not finite; lower train.learning_rate or train.grad_clip")
        own_logits = [logits[root.legal_actions] for root, logits in zip(roots, policy_logits, strict=True)]
        prior = self.prior_cfg
        root_logits = [
            mix_root_logits(logits, root.prior_logprobs, combine=prior.combine, alpha=prior.alpha, floor=prior.floor)
            for root, logits in zip(roots, own_logits, strict=True)
        ]
        trees = search(
            self.inference,
            contexts,
            legal_actions=[root.legal_actions for root in roots],
            priors=[
                root_probs(logits, root.noise, noise_weight=self.search_cfg.root_noise_weight)
                for root, logits in zip(roots, root_logits, strict=True)
            ],
            seeds=[root.seed for root in roots],
            cfg=self.search_cfg,
            num_actions=num_actions,
        )
        return [
            SearchResult(
                visit_counts=tree.visit_counts,
                root_value=tree.root.value,
                predicted_value=float(value),
                policy_logits=own,
                root_logits=logits,
            )
            for tree, value, own, logits in zip(trees, values, own_logits, root_logits, strict=True)
        ]

    def _forward_collect(self, roots: Sequence[Root], *, num_actions: int) -> list[SearchResult]:
        return self.search(roots, num_actions=num_actions)

    def _forward_eval(self, roots: Sequence[Root], *, num_actions: int) -> list[SearchResult]:
        return self.search(roots, num_actions=num_actions)

    def _forward_learn(self, data: Sequence[Any]) -> dict[str, Any]:
        """One learning step of the world model on the full batch and, if asked for, one of the LLM on part of it.

        Args:
            data: ``[current_batch, target_batch, game_segments, train_iter, update_llm]``; the first three as
                :meth:`PriorZeroGameBuffer.sample` returns them.

        Returns:
            What :meth:`learn_world_model` and :meth:`learn_llm` return, and ``train/total_loss``, their sum.
        """
        *batch, train_iter, update_llm = data
        metrics = self.learn_world_model(batch, train_iter=train_iter)
        metrics["train/total_loss"] = metrics["train/wm_total_loss"]
        if update_llm:
            metrics.update(self.learn_llm(batch[2]))
            metrics["train/total_loss"] += metrics.get("train/llm_loss", 0.0)
        return metrics

    def learn_world_model(self, batch: Sequence[Any], *, train_iter: int) -> dict[str, Any]:
        """One learning step of the world model on what :meth:`PriorZeroGameBuffer.sample` returned.

        Returns:
            Scalars under ``train/``, and ``priorities`` ``[B]``: the absolute error of each sequence's first value.

        Raises:
            NonFiniteError: what is not, of the sample, the losses and the gradients; nothing has changed.
        """
        current_batch, target_batch = batch[0], batch[1]
        sampled = {"features": current_batch[0], "rewards": target_batch[0], "value targets": target_batch[1]}
        for name, values in sampled.items():
            if not np.isfinite(np.asarray(values, dtype=np.float64)).all():
                raise NonFiniteError(f"the world model's {name} are not finite in update {train_iter}")
        statistics = [(b, b.clone()) for b in self._running_statistics()]
        self._is_weights = torch.as_tensor(current_batch[5], dtype=torch.float32, device=self._cfg.device)
        try:
            log = super()._forward_learn([current_batch, target_batch, train_iter])
        except (
            AssertionError,
            ValueError,
            NonFiniteError,
        ) as error:  # the first two are what LightZero raises for a loss
            if not isinstance(error, NonFiniteError) and "NaN" not in str(error) and "Inf" not in str(error):
                raise
            for buffer, before in statistics:
                buffer.copy_(before)
            named = re.search(r"element '(\w+)'", str(error))  # what LightZero calls the head whose loss it is
            loss = f"{named.group(1) if named else 'total'} loss is not finite"
            raise NonFiniteError(
                f"the world model: {error if isinstance(error, NonFiniteError) else loss} in update {train_iter}; lower "
                f"train.learning_rate={self._cfg.learning_rate:g} or train.grad_clip={self._cfg.grad_clip_value:g}"
            ) from error
        finally:
            self._is_weights = None
        assert self._value_logits is not None
        predicted = self.inverse_scalar_transform_handle(self._value_logits[:, 0]).reshape(-1).cpu().numpy()
        self._value_logits = None
        priorities = np.abs(predicted - np.asarray(target_batch[1])[:, 0].reshape(-1)) + 1e-6
        metrics: dict[str, Any] = {
            "train/wm_total_loss": log["weighted_total_loss"],
            "train/wm_grad_norm": log["total_grad_norm_before_clip_wm"],
            "train/wm_value_loss": log["value_loss"],
            "train/wm_policy_loss": log["policy_loss"],
            "train/wm_reward_loss": log["reward_loss"],
            "train/wm_latent_loss": log["obs_loss"],
            "train/wm_policy_entropy": log["policy_entropy"],
            "train/target_value_mean": log["target_value"],
            "train/priority_mean": float(priorities.mean()),
            "priorities": priorities,
        }
        return metrics

    def learn_llm(self, game_segments: SampledSegments) -> dict[str, float]:
        """One learning step of the LLM on the first ``llm.batch_size`` decisions of a sample.

        Returns:
            Scalars under ``train/``.
        """
        assert self.llm_learner is not None
        records = game_segments.records()[: self.llm_batch_size]
        samples, skipped = self.llm_learner.samples(records, game_segments.returns()[: self.llm_batch_size])
        if not samples:
            logger.warning(
                f"none of {skipped} decisions could teach the LLM: no prompt, no answer heading, or too long"
            )
            return {"train/llm_samples_skipped": float(skipped)}
        result = self.llm_learner.learn(samples)
        self.llm_version += 1
        return {
            "train/llm_sft_loss": result["sft_loss"],
            "train/llm_rft_loss": result["rft_loss"],
            "train/llm_kl_loss": result["kl_loss"],
            "train/llm_loss": result["loss"],
            "train/llm_grad_norm": result["grad_norm"],
            "train/llm_samples_skipped": float(skipped),
            "train/llm_version": float(self.llm_version),
        }

    def trained_world_model_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The parameters that a learning step moves, by name.

        LightZero's model also carries a decoder for one of its own environments, which no loss reaches.
        """
        return [
            (name, p)
            for name, p in self._model.world_model.named_parameters()
            if p.requires_grad and "decoder_network" not in name
        ]

    def world_model_state(self) -> dict[str, torch.Tensor]:
        """The world model's parameters under their own names (without those that ``torch.compile`` adds)."""
        return self._uncompiled(self._model).state_dict()

    def load_world_model_state(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of :meth:`world_model_state`, for the model and its target alike."""
        self._uncompiled(self._model).load_state_dict(state)
        self._uncompiled(self._target_model._model).load_state_dict(state)  # inside DI-engine's momentum wrapper

    def training_state(self) -> dict[str, Any]:
        """What learning goes on from, beside both models' parameters: target, optimisers and counters."""
        learner = self.llm_learner
        return {
            "target": self._uncompiled(self._target_model._model).state_dict(),
            "optimizer": self._optimizer_world_model.state_dict(),
            "llm_optimizer": None if learner is None else learner.optimizer.state_dict(),
            "features_are_fitted": self.features_are_fitted,
            "llm_version": self.llm_version,
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`training_state`, but for the learning rates, which are the settings'.

        Call it after :meth:`load_world_model_state`.
        """
        self._uncompiled(self._target_model._model).load_state_dict(state["target"])
        self._optimizer_world_model.load_state_dict(state["optimizer"])
        if self.llm_learner is not None:
            self.llm_learner.optimizer.load_state_dict(state["llm_optimizer"])
            _set_learning_rate(self.llm_learner.optimizer, self.llm_learner.cfg.learning_rate)
        _set_learning_rate(self._optimizer_world_model, self._cfg.learning_rate)
        self.features_are_fitted = state["features_are_fitted"]
        self.llm_version = state["llm_version"]

    @staticmethod
    def _uncompiled(model: Any) -> Any:
        return getattr(model, "_orig_mod", model)


def _set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The settings', where a state that was loaded brought another."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _standardise(encoder: Any, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    return (inputs[0] - encoder.feature_mean) / encoder.feature_deviation
