"""Time of an update of the world model, compared with LightZero's text path. Takes about two minutes.

    python scripts/bench_world_model.py

One update of UniZero on 32 sequences of 10 steps, with embedding size 256, 2 layers, 256 actions and no dropout. The
package reads stored features of the frozen encoder (all-MiniLM-L6-v2, 22M parameters). The reference is LightZero's own
policy with ``obs_type='text'``: it reads token ids and encodes all observations in the model and again in its target.
It is changed in three points: the pretrained encoder is loaded again, because LightZero overwrites it with random
values; the encoder's dropout is off; and observations are padded to the longest one (about 160 tokens) instead of 512
tokens, which is faster.

The results are equal if the relative difference of the losses and the gradient norm is below 1e-4. They are computed by
a second policy of the package, with the parameters of the reference and its projection (one linear layer on the output
at the first token; the package uses two layers on the mean), from features that are encoded once.

The reference's update is run once, the package's several times. The second row adds the time to encode the texts of new
states to the package's time. A table shows the seconds of the package's update by the number of layers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from bench_prompts import COMMANDS, ROOM
from bench_tools import Row, print_table, report, seconds

from priorzero.config import PRESETS, resolve_settings
from priorzero.llm.model_files import resolve_model
from priorzero.play.text_encoder import TextEncoder
from priorzero.policy import PriorZeroPolicy
from priorzero.runtime.quiet import quiet
from priorzero.settings import Settings
from priorzero.types import GameState
from priorzero.world_model.batch import ReplayBatch, SampledSequences
from priorzero.world_model.lightzero import unizero_config

with quiet():
    from lzero.policy.unizero import UniZeroPolicy

BATCH = 32
FEATURE_SIZE = 3 * 384 + 128  # of the default encoder: feedback, room and inventory, then score and moves
# the package's metric -> LightZero's name for it
WORLD_MODEL_LOSSES = {
    "wm_total_loss": "weighted_total_loss",
    "wm_latent_loss": "obs_loss",
    "wm_reward_loss": "reward_loss",
    "wm_policy_loss": "policy_loss",
    "wm_value_loss": "value_loss",
    "wm_grad_norm": "total_grad_norm_before_clip_wm",
}


def world_model_settings(*, num_layers: int = 2) -> Settings:
    """Settings of UniZero without an LLM."""
    return resolve_settings(
        PRESETS["pure_unizero"],
        {
            "world_model": {"embed_dim": 256, "num_layers": num_layers, "dropout": 0.0},
            "env": {"action_space_size": 256},
            "train": {"batch_size": BATCH},
            "llm": {"batch_size": BATCH},
        },
    )


def make_states(*, count: int) -> list[GameState]:
    """States with different feedback, in 20 rooms and with 19 inventories."""
    return [
        GameState(
            feedback=f"You take step number {n}. " + ROOM,
            valid_actions=COMMANDS,
            score=float(n % 7),
            max_score=350.0,
            moves=n % 100,
            look=f"Room {n % 20}\n" + ROOM * 2,
            inventory=f"You are carrying {1 + n % 19} coins, a brass lantern and a leaflet.",
        )
        for n in range(count)
    ]


def make_batch(observations: np.ndarray, *, num_actions: int, seed: int = 0) -> ReplayBatch:
    """A batch with random targets.

    Args:
        observations: features or token ids, ``[B, U + 1, F]``.
        num_actions: A.
        seed: seed of the targets.
    """
    rng = np.random.default_rng(seed)
    size, steps = len(observations), observations.shape[1] - 1
    visits = np.zeros((size, steps + 1, num_actions), dtype=np.float32)
    visits[:, :, :20] = rng.dirichlet(np.ones(20), size=(size, steps + 1))
    mask = np.ones((size, steps + 1))
    mask[: size // 8, steps // 2 :] = 0  # these sequences contain the end of their episode
    actions = rng.integers(num_actions, size=(size, steps))
    return ReplayBatch(
        features=observations.reshape(size, -1),
        actions=actions,
        bootstrap_actions=actions,
        mask=mask,
        indices=np.arange(size),
        weights=np.ones(size),
        make_times=np.zeros(size),
        timesteps=np.tile(np.arange(steps), (size, 1)),
        rewards=rng.normal(size=(size, steps + 1)),
        value_targets=5 * rng.normal(size=(size, steps + 1)),
        policy_targets=visits,
        sequences=SampledSequences([], np.zeros(0, dtype=np.int64), [], np.zeros(0)),
    )


def make_reference_policy(settings: Settings, *, encoder_folder: str, tokens: int) -> Any:
    """LightZero's policy on token ids, with the parameters of the pretrained encoder."""
    from transformers import AutoModel

    config = unizero_config(settings, feature_size=tokens, device="cpu")
    config.model.world_model_cfg.obs_type = "text"
    config.model.encoder_url = encoder_folder
    with quiet():
        policy = UniZeroPolicy(config)
    pretrained = AutoModel.from_pretrained(encoder_folder, dtype=torch.float32).state_dict()
    generator = torch.Generator().manual_seed(0)
    model, target = policy._model._orig_mod, policy._target_model._model._orig_mod
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "encoder.model" not in name:  # LightZero initialises its heads with zeros, which would hide errors
                p += 0.02 * torch.randn(p.shape, generator=generator)
    model.tokenizer.encoder.model.load_state_dict(pretrained)
    target.load_state_dict(model.state_dict())
    for module in (*model.modules(), *target.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return policy


def make_twin(settings: Settings, reference: Any) -> PriorZeroPolicy:
    """The package's policy on the encoder's output, with the parameters and the projection of the reference."""
    source = reference._model._orig_mod
    projection = source.tokenizer.encoder.embed_proj_head
    twin = PriorZeroPolicy(settings, feature_size=projection.in_features, device="cpu", llm=None)
    parameters = {k: v for k, v in source.world_model.state_dict().items() if not k.startswith("tokenizer.")}
    for model in (twin.network, twin.target_network):
        missing, unexpected = model.world_model.load_state_dict(parameters, strict=False)
        assert not unexpected and all(name.startswith("tokenizer.") for name in missing)
        copied = torch.nn.Linear(projection.in_features, projection.out_features)
        copied.load_state_dict(projection.state_dict())
        model.tokenizer.encoder.fc_representation = copied
    return twin


@torch.inference_mode()
def first_token_outputs(encoder: TextEncoder, texts: Sequence[str]) -> np.ndarray:
    """The encoder's output at the first token of each text, ``[n, D]``."""
    rows = []
    for text in texts:
        inputs = encoder._tokenizer(text, return_tensors="pt", truncation=True)
        rows.append(encoder._model(**inputs).last_hidden_state[0, 0].numpy())
    return np.stack(rows)


def compare_losses(
    settings: Settings, encoder: TextEncoder, states: Sequence[GameState]
) -> tuple[float, int, dict[str, dict[str, float]]]:
    """Run the reference's update and that of its twin.

    Returns:
        The seconds of the reference, its tokens for each observation, and the losses of both.
    """
    num_actions = settings.env.num_actions
    shape = (BATCH, settings.world_model.num_unroll_steps + 1, -1)
    texts = [state.raw_obs_text for state in states]
    ids = encoder._tokenizer(texts, truncation=True, padding=True)["input_ids"]
    folder = resolve_model(settings.encoder.path, setting="encoder.path")
    reference_policy = make_reference_policy(settings, encoder_folder=folder, tokens=len(ids[0]))
    twin = make_twin(settings, reference_policy)
    text_batch = make_batch(np.array(ids).reshape(shape), num_actions=num_actions)
    twin_batch = make_batch(first_token_outputs(encoder, texts).reshape(shape), num_actions=num_actions)
    reference_s, reference = seconds(
        lambda: reference_policy._forward_learn([*text_batch.to_lightzero(), 0]), repeats=1
    )
    ours = twin.learn_world_model(twin_batch, train_iter=0)
    losses = {
        name: {"ours": ours[f"train/{name}"], "reference": reference[lightzero_name]}
        for name, lightzero_name in WORLD_MODEL_LOSSES.items()
    }
    return reference_s, len(ids[0]), losses


def world_model_rows() -> tuple[list[Row], dict[str, Any]]:
    """The comparisons of the world model, and further figures."""
    settings = world_model_settings()
    steps = settings.world_model.num_unroll_steps + 1
    states = make_states(count=BATCH * steps)
    encoder = TextEncoder(settings.encoder.path, with_look=True)
    features = encoder.features(states).reshape(BATCH, steps, -1)
    reference_s, tokens, losses = compare_losses(settings, encoder, states)
    equal = all(abs(v["ours"] - v["reference"]) <= 1e-4 * abs(v["reference"]) for v in losses.values())
    ours_s = world_model_update_s(settings, make_batch(features, num_actions=settings.env.num_actions))
    # The package encodes each new state once. With the default settings, 20 states are collected for 10 updates.
    new_states = settings.train.collect_env_steps / settings.train.update_per_collect
    unknown = [unknown_state(number) for number in range(10)]
    encode_s = seconds(lambda: encoder.features(unknown), repeats=1)[0] / len(unknown)
    rows = [
        Row("world-model update: features | text", ours_s, reference_s, 100, equal),
        Row("the same, with encoding the new states", ours_s + new_states * encode_s, reference_s, None, equal),
    ]
    return rows, {
        "losses": losses,
        "tokens_per_observation": tokens,
        "encode_new_state_s": encode_s,
        "new_states_per_update": new_states,
    }


def unknown_state(number: int) -> GameState:
    """A state whose texts the encoder has not seen before."""
    return GameState(
        feedback=f"Something new: {number}. " + ROOM,
        valid_actions=COMMANDS,
        score=0.0,
        max_score=350.0,
        moves=0,
        look=f"New room {number}\n" + ROOM * 2,
        inventory=f"You are carrying {number} new things.",
    )


def world_model_update_s(settings: Settings, batch: ReplayBatch) -> float:
    """Seconds of the package's update."""
    size = batch.features.shape[1] // (settings.world_model.num_unroll_steps + 1)
    policy = PriorZeroPolicy(settings, feature_size=size, device="cpu", llm=None)
    policy.learn_world_model(batch, train_iter=0)  # warm-up; it also creates AdamW's moments
    return seconds(lambda: policy.learn_world_model(batch, train_iter=1))[0]


def world_model_update_times(*, depths: Sequence[int]) -> list[dict[str, float]]:
    """Seconds of the package's update for several numbers of layers."""
    table = []
    for depth in depths:
        settings = world_model_settings(num_layers=depth)
        shape = (BATCH, settings.world_model.num_unroll_steps + 1, FEATURE_SIZE)
        features = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        batch = make_batch(features, num_actions=settings.env.num_actions)
        table.append({"layers": depth, "seconds": world_model_update_s(settings, batch)})
    return table


def main() -> int:
    """Returns the exit code: 0 if all results are equal, 1 otherwise."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows, details = world_model_rows()
    table = world_model_update_times(depths=(1, 2, 4))
    print_table("seconds", {f"{line['layers']} layers": {"update": line["seconds"]} for line in table})
    return report("world_model", rows, **details, update_by_layers=table, threads=torch.get_num_threads())


if __name__ == "__main__":
    sys.exit(main())
