"""Time of an update of each model, compared with the straightforward implementation. Takes about four minutes.

    python scripts/bench_learner.py [llm|world_model]

Language model: one update (forward, backward, AdamW) of SmolLM2-135M in float32 on the visit counts of two states,
each with a prompt of 300 tokens and its 8 or 16 most visited actions (``llm.sft_top_actions``). The package packs the
actions of a state behind one copy of its prompt. The reference repeats the prompt for every action. It has as many rows
in a micro-batch as the package has states (``llm.micro_batch_size``, 2 as in the quick test), so that both process
similar numbers of tokens. The results are equal if the relative difference of the losses is below 1e-5, and the norm of
the difference of the gradients is below 1e-5 of the gradient's norm.

World model: one update of UniZero on 32 sequences of 10 steps, with embedding size 256, 2 layers, 256 actions and no
dropout. The package reads stored features of the frozen encoder (all-MiniLM-L6-v2, 22M parameters). The reference is
LightZero's own policy with ``obs_type='text'``: it reads token ids and encodes all observations in the model and again
in its target. It is changed in three points: the pretrained encoder is loaded again, because LightZero overwrites it
with random values; the encoder's dropout is off; and observations are padded to the longest one (about 160 tokens)
instead of 512 tokens, which is faster.

The world-model results are equal if the relative difference of the losses and the gradient norm is below 1e-4. They are
computed by a second policy of the package, with the parameters of the reference and its projection (one linear layer on
the output at the first token; the package uses two layers on the mean), from features that are encoded once.

The reference's update is run once, the package's several times. The second row adds the time to encode the texts of new
states to the package's time.

Two more tables show the seconds of the package's updates by the number of actions and by the number of layers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from bench_prompts import ROOM, numbered_prompt
from bench_tools import Row, report, seconds

from priorzero.config import PRESETS, resolve_settings
from priorzero.llm.fine_tuning import LLMLearner, LLMSample
from priorzero.llm.losses import gradient_norm, sft_loss
from priorzero.llm.model_files import resolve_model
from priorzero.llm.models import LanguageModel, load_language_model
from priorzero.llm.prompts import prompt_style
from priorzero.play.text_encoder import TextEncoder
from priorzero.policy import PriorZeroPolicy
from priorzero.runtime.quiet import quiet
from priorzero.settings import Settings
from priorzero.types import GameState, StepRecord
from priorzero.world_model.batch import ReplayBatch, SampledSequences
from priorzero.world_model.lightzero import unizero_config

with quiet():
    from lzero.policy.unizero import UniZeroPolicy

VERBS = ("take", "open", "examine", "push")
THINGS = ("brass lantern", "old brown sack", "trap door", "jewel-encrusted egg")
COMMANDS = tuple(f"{verb} the {thing}" for thing in THINGS for verb in VERBS)  # 16
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


# ---- language model ----


def make_learner(llm: LanguageModel, *, top: int) -> tuple[LLMLearner, list[torch.Tensor]]:
    """A learner with a learning rate of 0, and a list that holds the gradient of the last update."""
    layer = {"llm": {"objective": "tokens", "enable_rft": False, "sft_top_actions": top, "grad_clip": 1e9}}
    settings = resolve_settings(PRESETS["quick_test"], layer)
    learner = LLMLearner(llm, settings.llm, style=prompt_style(settings))
    learner.optimizer.param_groups[0]["lr"] = 0.0
    gradient: list[torch.Tensor] = []

    def copy_gradient(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        gradient[:] = [p.grad for p in llm.trainable_parameters() if p.grad is not None]

    learner.optimizer.register_step_pre_hook(copy_gradient)
    return learner, gradient


def make_records(llm: LanguageModel, *, states: int, tokens: int) -> list[StepRecord]:
    """Decisions with 16 valid actions. All of them have visits."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(states):
        visits = rng.permutation(len(COMMANDS)) + 1
        records.append(
            StepRecord(
                state=GameState(ROOM, COMMANDS, 0.0, 350.0, number),
                features=np.zeros(1, dtype=np.float32),
                action_indices=np.arange(len(COMMANDS)),
                prompt=numbered_prompt(llm, max_tokens=tokens - 30, number=number),
                prior=None,
                visit_counts=visits,
                root_value=0.0,
                predicted_value=0.0,
                chosen=int(visits.argmax()),
                reward=0.0,
                done=False,
                episode=0,
                step=number,
            )
        )
    return records


def learn_one_row_per_action(learner: LLMLearner, samples: Sequence[LLMSample]) -> float:
    """An update in which the model processes the whole prompt again for every action. Returns the SFT loss."""
    llm, cfg = learner.llm, learner.cfg
    rows = [
        (sample.row.prompt_ids, completion, float(share))
        for sample in samples
        for completion, share in zip(sample.row.completions, sample.target_probs, strict=True)
    ]
    total_tokens = sum(share * len(completion) for _, completion, share in rows)
    total = 0.0
    learner.optimizer.zero_grad(set_to_none=True)
    for start in range(0, len(rows), cfg.micro_batch_size):
        micro = rows[start : start + cfg.micro_batch_size]
        sequences = [torch.tensor([*prompt, *completion]) for prompt, completion, _ in micro]
        # A causal model does not attend to padding on the right. Without a mask the fastest attention can be used.
        input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        first = min(len(prompt) for prompt, _, _ in micro) - 1
        logits = llm.model(input_ids=input_ids, logits_to_keep=input_ids.shape[1] - first, use_cache=False).logits
        mask = torch.zeros(len(micro), input_ids.shape[1] - first - 1, dtype=torch.bool)
        for r, (prompt, completion, _) in enumerate(micro):
            mask[r, len(prompt) - first - 1 :][: len(completion)] = True
        logprobs = torch.log_softmax(logits[:, :-1], -1).gather(2, input_ids[:, first + 1 :, None])[:, :, 0]
        loss_sum, _ = sft_loss(logprobs, mask, torch.tensor([share for _, _, share in micro]))
        (cfg.llm_loss_weight * loss_sum / total_tokens).backward()
        total += loss_sum.item()
    gradient_norm(llm.trainable_parameters(), max_norm=cfg.grad_clip)
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    return total / total_tokens


def language_model_row(llm: LanguageModel, *, top: int, states: int, tokens: int) -> tuple[Row, dict[str, Any]]:
    """The comparison of one update, and the differences of its results."""
    learner, gradient = make_learner(llm, top=top)
    samples, _ = learner.samples(make_records(llm, states=states, tokens=tokens), np.zeros(states))
    learner.learn(samples)  # warm-up; it also creates AdamW's moments
    ours_s, ours = seconds(lambda: learner.learn(samples)["sft_loss"], repeats=2)
    ours_gradient = list(gradient)
    reference_s, reference = seconds(lambda: learn_one_row_per_action(learner, samples), repeats=1)
    details = {
        "top_actions": top,
        "prompt_tokens": len(samples[0].row.prompt_ids),
        "loss_difference": abs(ours - reference) / reference,
        "gradient_difference": relative_difference(ours_gradient, gradient),
    }
    equal = max(details["loss_difference"], details["gradient_difference"]) < 1e-5
    return Row(f"LLM update, {states} states, top {top} actions", ours_s, reference_s, 3, equal), details


def relative_difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Norm of the difference of two gradients, divided by the norm of the second."""
    difference = torch.stack([(a - b).double().norm() for a, b in zip(one, other, strict=True)]).norm()
    return float(difference / torch.stack([b.double().norm() for b in other]).norm())


def llm_update_times(llm: LanguageModel, *, numbers: Sequence[int], states: int, tokens: int) -> list[dict[str, float]]:
    """Seconds of the package's update for several numbers of actions."""
    table = []
    for top in numbers:
        learner, _ = make_learner(llm, top=top)
        samples, _ = learner.samples(make_records(llm, states=states, tokens=tokens), np.zeros(states))
        assert {len(sample.row.completions) for sample in samples} == {top}
        learner.learn(samples)
        step_s, _ = seconds(lambda: learner.learn(samples), repeats=2)  # noqa: B023
        table.append({"actions": top, "seconds": step_s})
    return table


# ---- world model ----


def world_model_settings(*, num_layers: int = 2) -> Settings:
    """Settings of UniZero without an LLM."""
    return resolve_settings(
        PRESETS["pure_unizero"],
        {
            "world_model": {"embed_dim": 256, "num_layers": num_layers, "dropout": 0.0},
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
    num_actions = settings.env.action_space_size
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
    encoder = TextEncoder(settings.encoder.path, with_look=True, max_moves=100)
    features = encoder.features(states).reshape(BATCH, steps, -1)
    reference_s, tokens, losses = compare_losses(settings, encoder, states)
    equal = all(abs(v["ours"] - v["reference"]) <= 1e-4 * abs(v["reference"]) for v in losses.values())
    ours_s = world_model_update_s(settings, make_batch(features, num_actions=settings.env.action_space_size))
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
        batch = make_batch(features, num_actions=settings.env.action_space_size)
        table.append({"layers": depth, "seconds": world_model_update_s(settings, batch)})
    return table


def main() -> int:
    """Returns the exit code: 0 if all results are equal, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", choices=("llm", "world_model"), help="measure one model (default: both)")
    model = parser.parse_args().model
    rows: list[Row] = []
    details: dict[str, Any] = {}
    if model != "llm":
        own_rows, details["world_model"] = world_model_rows()
        rows += own_rows
        details["world_model_update_by_layers"] = world_model_update_times(depths=(1, 2, 4))
    if model != "world_model":
        llm = load_language_model(resolve_settings(PRESETS["quick_test"]).llm, device=torch.device("cpu"))
        details["llm"] = []
        for top in (8, 16):
            row, differences = language_model_row(llm, top=top, states=2, tokens=300)
            rows.append(row)
            details["llm"].append(differences)
        details["llm_update_by_actions"] = llm_update_times(llm, numbers=(1, 4, 16), states=2, tokens=300)
    for name in ("world_model_update_by_layers", "llm_update_by_actions"):
        for line in details.get(name, []):
            print("  ".join([name, *(f"{key}={value:.3g}" for key, value in line.items())]))
    return report("learner", rows, **details, threads=torch.get_num_threads())


if __name__ == "__main__":
    sys.exit(main())
