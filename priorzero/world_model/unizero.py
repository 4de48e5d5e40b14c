"""UniZero's world model: its networks, its updates and its state (Pu et al. 2024, arXiv 2406.10667)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from priorzero.runtime.quiet import quiet
from priorzero.settings import Settings
from priorzero.types import NonFiniteError, Plain
from priorzero.world_model.batch import ReplayBatch
from priorzero.world_model.imports import lightzero_imports, without_compile
from priorzero.world_model.inference import WorldModelInference
from priorzero.world_model.lightzero import unizero_config

with lightzero_imports():
    from lzero.policy.unizero import UniZeroPolicy

BATCH_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
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

    Attributes:
        lightzero_config: the policy configuration, also for segments and the replay buffer.
        network: LightZero's ``UniZeroModel``.
        target_network: its moving average, which computes the targets of values and latent states.
        inference: the network as the search uses it.
        features_are_fitted: :meth:`fit_features` has been called.
        is_consistent: False if an optimiser step failed halfway, so that parameters are partly updated.
    """

    def __init__(self, settings: Settings, *, feature_size: int, device: str) -> None:
        self.lightzero_config = unizero_config(settings, feature_size=feature_size, device=device)
        with quiet(), without_compile():
            super().__init__(self.lightzero_config)
        self.network: Any = self._model
        self.target_network: Any = self._target_model._model  # inside DI-engine's wrapper for target networks
        self.inference = WorldModelInference(self.network)
        self.features_are_fitted = False
        self.is_consistent = True
        for encoder in self._encoders():  # buffers, so that checkpoints contain them
            encoder.register_buffer("feature_mean", torch.zeros(feature_size, device=device))
            encoder.register_buffer("feature_deviation", torch.ones(feature_size, device=device))
            encoder.register_forward_pre_hook(_standardise)
        self._sequence_weights = SequenceWeights(self.network.world_model)
        self._optimizer_world_model.register_step_pre_hook(self._before_step)
        self._optimizer_world_model.register_step_post_hook(self._after_step)

    def fit_features(self, features: np.ndarray) -> None:
        """Standardise the input of both networks by the mean and the deviation of ``features``, ``[n, F]``.

        Features without variation are only shifted. Rows that are not finite are left out.
        """
        features = features[np.isfinite(features).all(axis=1)]
        deviation = features.std(axis=0)
        deviation[deviation < 1e-4] = 1.0
        mean = torch.as_tensor(features.mean(axis=0))
        for encoder in self._encoders():
            encoder.feature_mean.copy_(mean)
            encoder.feature_deviation.copy_(torch.as_tensor(deviation))
        self.features_are_fitted = True

    def learn_world_model(self, batch: ReplayBatch, *, train_iter: int) -> dict[str, Any]:
        """Update the world model once. ``train_iter`` is the number of updates before this one.

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
        networks = (self.network, self.target_network)
        buffers = [b for net in networks for name, b in net.named_buffers() if name.endswith(BATCH_NORM_BUFFERS)]
        copies = [buffer.clone() for buffer in buffers]
        weights = torch.as_tensor(batch.weights, dtype=torch.float32, device=self._cfg.device)
        try:
            with self._sequence_weights.applied(weights):
                # LightZero's method; PriorZeroPolicy overrides it with one that calls `learn_world_model`.
                log: dict[str, Any] = super()._forward_learn([*batch.to_lightzero(), train_iter])
        except (AssertionError, ValueError, NonFiniteError) as error:
            reason = _nonfinite_reason(error)
            if reason is None:
                raise
            for buffer, copy in zip(buffers, copies, strict=True):  # the forward pass has changed them
                buffer.copy_(copy)
            raise NonFiniteError(
                f"the world model: {reason} in update {train_iter}; lower "
                f"train.learning_rate={self._cfg.learning_rate:g} or train.grad_clip={self._cfg.grad_clip_value:g}"
            ) from error
        return log

    def _before_step(self, *_: Any) -> None:
        """Runs before the optimiser step, which would apply gradients that are not finite."""
        gradients = {name: p.grad for name, p in self.trained_world_model_parameters() if p.grad is not None}
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients.values()]).tolist()  # waits once
        wrong = [name for name, is_finite in zip(gradients, finite, strict=True) if not is_finite]
        if wrong:
            raise NonFiniteError(f"the gradient of {wrong[0]} and {len(wrong) - 1} other parameters is not finite")
        self.is_consistent = False

    def _after_step(self, *_: Any) -> None:
        self.is_consistent = True

    def trained_world_model_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that an update changes, by name.

        LightZero's model also has a decoder for one of its own environments, which no loss reaches.
        """
        return [
            (name, p)
            for name, p in self.network.world_model.named_parameters()
            if p.requires_grad and "decoder_network" not in name
        ]

    def world_model_state(self) -> dict[str, Tensor]:
        """The network's parameters and buffers, by name."""
        state: dict[str, Tensor] = self.network.state_dict()
        return state

    def load_world_model_state(self, state: dict[str, Tensor]) -> None:
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


def _standardise(encoder: Any, inputs: tuple[Tensor]) -> Tensor:
    standardised: Tensor = (inputs[0] - encoder.feature_mean) / encoder.feature_deviation
    return standardised


class SequenceWeights:
    """Weights the loss of each sequence of a batch, since LightZero's loss ignores importance weights.

    All terms of the loss are sums over the outputs of four heads. Scaling the gradients of these outputs by the weight
    of their sequence is the same as scaling the sequence's loss.

    Attributes:
        value_logits: the value head's last output under :meth:`applied`, ``[B, U, support]``.
    """

    HEADS = ("head_observations", "head_rewards", "head_policy", "head_value")

    def __init__(self, world_model: nn.Module) -> None:
        self._weights: Tensor | None = None
        self.value_logits: Tensor | None = None
        for name in self.HEADS:
            world_model.get_submodule(name).register_forward_hook(self._scale_gradient)
        world_model.get_submodule("head_value").register_forward_hook(self._keep_value_logits)

    @contextmanager
    def applied(self, weights: Tensor) -> Iterator[None]:
        """Apply weights ``[B]`` to the forward and backward passes within the block."""
        self._weights = weights
        try:
            yield
        finally:
            self._weights = None

    def _scale_gradient(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self._weights is not None and output.requires_grad:
            weights = self._weights.view(-1, *[1] * (output.dim() - 1))
            output.register_hook(lambda gradient: gradient * weights)

    def _keep_value_logits(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self._weights is not None:
            self.value_logits = output.detach()


def _nonfinite_reason(error: Exception) -> str | None:
    """What was not finite in an update that failed; None if the error is about something else.

    LightZero reports a loss that is not finite as an ``AssertionError`` or a ``ValueError``, whose text names the loss.
    """
    if isinstance(error, NonFiniteError):
        return str(error)
    if "NaN" not in str(error) and "Inf" not in str(error):
        return None
    loss = re.search(r"element '(\w+)'", str(error))
    return f"{loss.group(1) if loss else 'total'} loss is not finite"
