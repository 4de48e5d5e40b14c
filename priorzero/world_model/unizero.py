"""UniZero's world model: its networks, its updates and its state (Pu et al. 2024, arXiv 2406.10667)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from priorzero.runtime.quiet import quiet
from priorzero.settings import Settings
from priorzero.types import NonFiniteError, Plain
from priorzero.world_model.batch import ReplayBatch
from priorzero.world_model.inference import WorldModelInference
from priorzero.world_model.lightzero import (
    RunningStatistics,
    SequenceWeights,
    add_standardisation,
    nonfinite_reason,
    set_standardisation,
    unizero_config,
    without_compile,
    without_momentum,
)

with quiet():
    from lzero.policy.unizero import UniZeroPolicy

# The metrics of an update, and LightZero's names for them.
METRICS = {
    "train/wm_total_loss": "weighted_total_loss",
    "train/wm_grad_norm": "total_grad_norm_before_clip_wm",
    "train/wm_value_loss": "value_loss",
    "train/wm_policy_loss": "policy_loss",
    "train/wm_reward_loss": "reward_loss",
    "train/wm_latent_loss": "obs_loss",
    "train/wm_policy_entropy": "policy_entropy",
    "train/target_value_mean": "target_value",
}


class UniZeroLearner(UniZeroPolicy):
    """LightZero's UniZero policy with importance weights, priorities and standardised features.

    Args:
        settings: all settings.
        feature_size: ``F``.
        device: ``"cpu"`` or ``"cuda"``.

    Attributes:
        network: LightZero's ``UniZeroModel``.
        target_network: its moving average, which computes the targets of values and latent states.
        inference: the network as the search uses it.
        features_are_fitted: :meth:`fit_features` has been called.
    """

    def __init__(self, settings: Settings, *, feature_size: int, device: str) -> None:
        with quiet():
            super().__init__(unizero_config(settings, feature_size=feature_size, device=device))
        self.network = without_compile(self._model)
        self.target_network = without_compile(without_momentum(self._target_model))
        self.inference = WorldModelInference(self.network, to_scalar=self.inverse_scalar_transform_handle)
        self.features_are_fitted = False
        for encoder in self._encoders():
            add_standardisation(encoder, feature_size=feature_size, device=device)
        self._sequence_weights = SequenceWeights(self.network.world_model)
        self._optimizer_world_model.register_step_pre_hook(self._check_gradients)

    def fit_features(self, features: np.ndarray) -> None:
        """Standardise the input of both networks by the mean and the deviation of ``features``, ``[n, F]``.

        Features without variation are only shifted. Rows that are not finite are left out.
        """
        features = features[np.isfinite(features).all(axis=1)]
        deviation = features.std(axis=0)
        deviation[deviation < 1e-4] = 1.0
        mean = torch.as_tensor(features.mean(axis=0))
        for encoder in self._encoders():
            set_standardisation(encoder, mean=mean, deviation=torch.as_tensor(deviation))
        self.features_are_fitted = True

    def learn_world_model(self, batch: ReplayBatch, *, train_iter: int) -> dict[str, Any]:
        """Update the world model once.

        Args:
            batch: a batch of ``train.batch_size`` sequences.
            train_iter: number of updates before this one.

        Returns:
            Metrics under ``train/``, and ``priorities`` ``[B]``: the absolute error of each sequence's first value.

        Raises:
            NonFiniteError: the batch, a loss or a gradient is not finite. The world model is unchanged.
        """
        inputs = {"features": batch.features, "rewards": batch.rewards, "value targets": batch.value_targets}
        for name, values in inputs.items():
            if not np.isfinite(np.asarray(values, dtype=np.float64)).all():
                raise NonFiniteError(f"the world model's {name} are not finite in update {train_iter}")
        log = self._update(batch, train_iter=train_iter)
        value_logits = self._sequence_weights.value_logits
        assert value_logits is not None
        predicted = self.inverse_scalar_transform_handle(value_logits[:, 0]).reshape(-1).cpu().numpy()
        priorities = np.abs(predicted - np.asarray(batch.value_targets)[:, 0].reshape(-1)) + 1e-6
        metrics: dict[str, Any] = {name: log[lightzero_name] for name, lightzero_name in METRICS.items()}
        return {**metrics, "train/priority_mean": float(priorities.mean()), "priorities": priorities}

    def _update(self, batch: ReplayBatch, *, train_iter: int) -> dict[str, Any]:
        """LightZero's learning step with importance weights; returns its log."""
        statistics = RunningStatistics((self.network, self.target_network))
        weights = torch.as_tensor(batch.weights, dtype=torch.float32, device=self._cfg.device)
        try:
            with self._sequence_weights.applied(weights):
                log: dict[str, Any] = super()._forward_learn([*batch.to_lightzero(), train_iter])
        except (AssertionError, ValueError, NonFiniteError) as error:
            reason = nonfinite_reason(error)
            if reason is None:
                raise
            statistics.restore()
            raise NonFiniteError(
                f"the world model: {reason} in update {train_iter}; lower "
                f"train.learning_rate={self._cfg.learning_rate:g} or train.grad_clip={self._cfg.grad_clip_value:g}"
            ) from error
        return log

    def _check_gradients(self, *_: Any) -> None:
        """Runs before the optimiser step, which would apply the gradients."""
        wrong = [
            name
            for name, p in self.trained_world_model_parameters()
            if p.grad is not None and not p.grad.isfinite().all()
        ]
        if wrong:
            raise NonFiniteError(f"the gradient of {wrong[0]} and {len(wrong) - 1} other parameters is not finite")

    def trained_world_model_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The parameters that an update changes, by name.

        LightZero's model also has a decoder for one of its own environments, which no loss reaches.
        """
        return [
            (name, p)
            for name, p in self.network.world_model.named_parameters()
            if p.requires_grad and "decoder_network" not in name
        ]

    def world_model_state(self) -> dict[str, torch.Tensor]:
        """The network's parameters and buffers, by name."""
        state: dict[str, torch.Tensor] = self.network.state_dict()
        return state

    def load_world_model_state(self, state: dict[str, torch.Tensor]) -> None:
        """Load the result of :meth:`world_model_state` into the network and the target network."""
        self.network.load_state_dict(state)
        self.target_network.load_state_dict(state)

    def training_state(self) -> Plain:
        """What further updates depend on besides :meth:`world_model_state`: target network and optimiser."""
        return {
            "target": self.target_network.state_dict(),
            "optimizer": self._optimizer_world_model.state_dict(),
            "features_are_fitted": self.features_are_fitted,
        }

    def load_training_state(self, state: Plain) -> None:
        """Load the result of :meth:`training_state`, except for the learning rate, which the settings give.

        Call :meth:`load_world_model_state` first, since it overwrites the target network.
        """
        self.target_network.load_state_dict(state["target"])
        self._optimizer_world_model.load_state_dict(state["optimizer"])
        set_learning_rate(self._optimizer_world_model, self._cfg.learning_rate)
        self.features_are_fitted = state["features_are_fitted"]

    def _encoders(self) -> list[Any]:
        """The modules that embed observations, of the network and the target network."""
        return [network.world_model.tokenizer.encoder for network in (self.network, self.target_network)]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of all parameter groups, after a state with another one was loaded."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
