"""LightZero 0.2.0 and DI-engine: our settings in their terms, and work-arounds for what they lack.

The other modules of this folder derive their classes from LightZero's. Outside of this folder neither package is
imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from easydict import EasyDict
from torch import Tensor, nn

from priorzero.runtime.quiet import quiet
from priorzero.settings import Settings
from priorzero.types import NonFiniteError

with quiet():
    from ding.utils import POLICY_REGISTRY
    from lzero.policy.unizero import UniZeroPolicy

PolicyClass = TypeVar("PolicyClass", bound=type)


def register_policy(name: str) -> Callable[[PolicyClass], PolicyClass]:
    """A class decorator that registers a policy with DI-engine."""
    decorator: Callable[[PolicyClass], PolicyClass] = POLICY_REGISTRY.register(name)
    return decorator


def unizero_config(settings: Settings, *, feature_size: int, device: str) -> EasyDict:
    """LightZero's policy configuration for UniZero on vector observations.

    Args:
        settings: all settings, ``settings.group.key``.
        feature_size: ``F``, the size of an observation.
        device: ``"cpu"`` or ``"cuda"``.
    """
    wm, search, replay, train = settings.world_model, settings.search, settings.replay, settings.train
    actions = settings.env.action_space_size
    world_model_cfg = dict(
        continuous_action_space=False,
        obs_type="vector",
        tokens_per_block=2,
        max_blocks=wm.num_unroll_steps,
        max_tokens=2 * wm.num_unroll_steps,
        context_length=wm.context_length,
        action_space_size=actions,
        num_layers=wm.num_layers,
        num_heads=wm.num_heads,
        embed_dim=wm.embed_dim,
        embed_pdrop=wm.dropout,
        resid_pdrop=wm.dropout,
        attn_pdrop=wm.dropout,
        support_size=2 * wm.support_scale + 1,
        policy_entropy_weight=wm.policy_entropy_weight,
        env_num=1,
        num_simulations=1,  # sizes key-value pools that our inference does not use
        group_size=8,
        device=device,
        num_unroll_steps=wm.num_unroll_steps,
    )
    changes = dict(
        device=device,
        cuda=device == "cuda",
        multi_gpu=False,
        type="priorzero",
        model=dict(
            observation_shape=feature_size,
            action_space_size=actions,
            model_type="mlp",
            support_scale=wm.support_scale,
            reward_support_size=2 * wm.support_scale + 1,
            value_support_size=2 * wm.support_scale + 1,
            norm_type="BN",
            world_model_cfg=world_model_cfg,
        ),
        env_type="not_board_games",
        # Visit targets are stored over the whole vocabulary: the varied form breaks on padded segments.
        action_type="fixed_action_space",
        num_simulations=search.num_simulations,
        root_dirichlet_alpha=search.root_dirichlet_alpha,
        root_noise_weight=search.root_noise_weight,
        pb_c_base=search.pb_c_base,
        pb_c_init=search.pb_c_init,
        discount_factor=search.discount_factor,
        td_steps=train.td_steps,
        reward_scale=train.reward_scale,
        num_unroll_steps=wm.num_unroll_steps,
        game_segment_length=replay.segment_length,
        batch_size=train.batch_size,
        update_per_collect=train.update_per_collect,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        grad_clip_value=train.grad_clip,
        target_update_theta=train.target_update_theta,
        replay_buffer_size=replay.buffer_size,
        use_priority=replay.use_priority,
        priority_prob_alpha=replay.priority_prob_alpha,
        priority_prob_beta=replay.priority_prob_beta,
        reanalyze_ratio=0.0,
        collector_env_num=settings.env.collector_env_num,
        evaluator_env_num=settings.env.evaluator_env_num,
        cos_lr_scheduler=False,
        piecewise_decay_lr_scheduler=False,
        use_wandb=False,
        accumulation_steps=1,
    )
    config = UniZeroPolicy.default_config()
    _merge(config, changes)
    return config


def _merge(config: EasyDict, changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            _merge(config[key], value)
        else:
            config[key] = EasyDict(value) if isinstance(value, dict) else value


def without_compile(model: Any) -> Any:
    """The module inside the wrapper of ``torch.compile``, whose parameters have their own names."""
    return getattr(model, "_orig_mod", model)


def without_momentum(target_model: Any) -> Any:
    """The model inside DI-engine's wrapper for target networks."""
    return target_model._model


def add_standardisation(encoder: nn.Module, *, feature_size: int, device: str) -> None:
    """Let an encoder shift and scale its input, ``[n, F]``. Mean and deviation are buffers, so checkpoints have them.

    They are 0 and 1 until :func:`set_standardisation` is called.
    """
    encoder.register_buffer("feature_mean", torch.zeros(feature_size, device=device))
    encoder.register_buffer("feature_deviation", torch.ones(feature_size, device=device))
    encoder.register_forward_pre_hook(_standardise)


def set_standardisation(encoder: Any, *, mean: Tensor, deviation: Tensor) -> None:
    """Set the mean and the standard deviation that an encoder standardises with, ``[F]`` each."""
    encoder.feature_mean.copy_(mean)
    encoder.feature_deviation.copy_(deviation)


def _standardise(encoder: Any, inputs: tuple[Tensor]) -> Tensor:
    standardised: Tensor = (inputs[0] - encoder.feature_mean) / encoder.feature_deviation
    return standardised


class RunningStatistics:
    """A copy of batch normalisation's means and variances, to undo the effect of a forward pass on them."""

    NAMES = ("running_mean", "running_var", "num_batches_tracked")

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        buffers = [b for network in networks for name, b in network.named_buffers() if name.endswith(self.NAMES)]
        self._copies = [(buffer, buffer.clone()) for buffer in buffers]

    def restore(self) -> None:
        for buffer, copy in self._copies:
            buffer.copy_(copy)


class SequenceWeights:
    """Weights the loss of each sequence of a batch, since LightZero's loss ignores importance weights.

    All terms of the loss are sums over the outputs of four heads. Scaling the gradients of these outputs by the weight
    of their sequence is the same as scaling the sequence's loss.

    Args:
        world_model: LightZero's world model.

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


def nonfinite_reason(error: Exception) -> str | None:
    """What was not finite in an update that failed; None if the error is about something else.

    LightZero reports a loss that is not finite as an ``AssertionError`` or a ``ValueError``, whose text names the loss.
    """
    if isinstance(error, NonFiniteError):
        return str(error)
    if "NaN" not in str(error) and "Inf" not in str(error):
        return None
    loss = re.search(r"element '(\w+)'", str(error))
    return f"{loss.group(1) if loss else 'total'} loss is not finite"
