"""LightZero 0.2.0 and DI-engine: our settings in their terms.

The other modules of this folder derive their classes from LightZero's. Outside of this folder neither package is
imported. UniZero, its losses and the rules of the tree are LightZero's. These are all differences and work-arounds:

- ``search/mcts.py``: each node has its own context, so a search depends neither on other roots nor on earlier searches;
  LightZero's key-value caches outlive learning steps and episodes. Below the root only actions of the vocabulary are
  expanded. Ties are broken with the root's seed. The C++ tree is not used.
- ``world_model/inference.py``: the softmax over a categorical value is never left out. LightZero leaves it out if the
  logits of all rows sum to one.
- ``world_model/segment.py``: all arrays have the same length; LightZero pads only some. A terminal state has one
  absorbing step.
- ``world_model/replay.py``: sequences never begin in padding; priorities, evictions, masks and policy targets are
  corrected; terminal states have zero value. The samples have their own generator.
- ``world_model/unizero.py``: importance weights of sequences; updates that are not finite change nothing; features are
  standardised; the networks are not compiled; the decoder that no loss reaches is not counted as trained.
- ``world_model/imports.py``: packages that are imported but not used here are left out, which saves seconds.
- ``world_model/lightzero.py``: visit targets are over the whole vocabulary (``action_type``).
- ``world_model/batch.py``: the arrays of a batch have names.
- ``play/text_encoder.py``: the text encoder is not a part of the network, which would re-initialise its weights.
- ``runtime/quiet.py``: prints, warnings and log levels. ``runtime/random_state.py``: the global generators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from easydict import EasyDict

from priorzero.settings import Settings
from priorzero.world_model.imports import lightzero_imports

with lightzero_imports():
    from ding.utils import POLICY_REGISTRY
    from lzero.policy.unizero import UniZeroPolicy

PolicyClass = TypeVar("PolicyClass", bound=type)


def register_policy(name: str) -> Callable[[PolicyClass], PolicyClass]:
    """A class decorator that registers a policy with DI-engine."""
    decorator: Callable[[PolicyClass], PolicyClass] = POLICY_REGISTRY.register(name)
    return decorator


def unizero_config(settings: Settings, *, feature_size: int, device: str) -> EasyDict:
    """LightZero's policy configuration for UniZero on vector observations of size ``F``; the rest are its defaults."""
    wm, search, replay, train = settings.world_model, settings.search, settings.replay, settings.train
    actions = settings.env.num_actions
    world_model_cfg = dict(
        obs_type="vector",
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
        device=device,
        num_unroll_steps=wm.num_unroll_steps,
    )
    changes = dict(
        device=device,
        cuda=device == "cuda",
        type="priorzero",
        model=dict(
            observation_shape=feature_size,
            action_space_size=actions,
            model_type="mlp",
            support_scale=wm.support_scale,
            reward_support_size=2 * wm.support_scale + 1,
            value_support_size=2 * wm.support_scale + 1,
            world_model_cfg=world_model_cfg,
        ),
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
