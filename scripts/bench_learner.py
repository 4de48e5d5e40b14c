"""Learning steps of both models, each against the straightforward way. Takes about four minutes.

    python scripts/bench_learner.py [llm|world_model]

Language model: one learning step (forward, backward, AdamW) of SmolLM2-135M in float32 on the visits of two states,
with a prompt of 300 tokens and the top 8 of its actions each (`llm.sft_top_actions`), or 16. Ours packs a state's
actions behind one copy of its prompt; the plain way repeats the prompt for every action, in as many rows at a time as
ours has states (`llm.micro_batch_size`, 2 as in the quick test), so that both hold about as many tokens. Equal means
the losses within 1e-5 relative, and the gradients of all parameters within 1e-5 of the whole gradient's norm.

World model: one learning step of UniZero, 32 sequences of 10 steps, embed 256, 2 layers, 256 actions, without dropout.
Ours reads stored features of the frozen encoder (all-MiniLM-L6-v2, 22M), as the default settings make them: feedback,
room and inventory apart. The plain way is LightZero's own policy with `obs_type='text'`: it reads the token ids of an
observation and encodes all of them in the model and again in its target. Two changes, and one in its favour: LightZero
overwrites the pretrained encoder with random values when it builds the model, so it is loaded back; the encoder's
dropout is off; and observations are padded to the longest (some 160 tokens), where LightZero's Jericho environment pads
to 512. Equal means that a second world model of ours, with the plain one's parameters and its projection (one linear
layer behind the first token's output, where ours has two layers behind the mean), gives the same losses and gradient
norm, within 1e-4 relative, from features that were encoded once, one text at a time.

The plain step is run once and is its policy's first; ours is the best of several. The second row adds to our side what
it pays elsewhere: encoding the texts of new states.

What grows: seconds of our learning step with the number of actions, and with the depth of the world model.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import numpy as np
import torch
from bench_tools import Row, report, seconds

from priorzero.config import PRESETS, resolve_settings
from priorzero.llm.fine_tuning import LLMLearner, LLMSample
from priorzero.llm.losses import gradient_norm, sft_loss
from priorzero.llm.models import LanguageModel, load_language_model, resolve_model
from priorzero.play.text_encoder import TextEncoder
from priorzero.llm.prompts import prompt_style
from priorzero.policy import PriorZeroPolicy
from priorzero.runtime.quiet import quiet
from priorzero.types import GameState, StepRecord
from priorzero.world_model.batch import ReplayBatch, SampledSequences
from priorzero.world_model.lightzero import unizero_config

with quiet():
    from lzero.policy.unizero import UniZeroPolicy

VERBS = ("take", "open", "examine", "push")
THINGS = ("brass lantern", "old brown sack", "trap door", "jewel-encrusted egg")
COMMANDS = tuple(f"{verb} the {thing}" for thing in THINGS for verb in VERBS)  # 16
ROOM = (
    "You are standing in an open field west of a white house, with a boarded front door. There is a small mailbox "
    "here. A path leads around the house, and the forest begins not far from it. "
)
LOSSES = ("wm_total_loss", "wm_latent_loss", "wm_reward_loss", "wm_policy_loss", "wm_value_loss", "wm_grad_norm")
BATCH = 32
FEATURE_SIZE = 3 * 384 + 128  # of the default encoder
STOCK_LOSSES = (
    "weighted_total_loss", "obs_loss", "reward_loss", "policy_loss", "value_loss", "total_grad_norm_before_clip_wm"
)  # fmt: skip


# ---- language model ----


def make_learner(llm: LanguageModel, *, top: int) -> tuple[LLMLearner, list[torch.Tensor]]:
    """A learner whose steps cost what they cost and leave the parameters alone; the list holds the last gradient."""
    layer = {"llm": {"objective": "tokens", "enable_rft": False, "sft_top_actions": top, "grad_clip": 1e9}}
    settings = resolve_settings(PRESETS["quick_test"], layer)
    learner = LLMLearner(llm, settings.llm, style=prompt_style(settings))
    learner.optimizer.param_groups[0]["lr"] = 0.0
    gradient: list[torch.Tensor] = []

    def take(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        gradient[:] = [p.grad for p in llm.trainable_parameters() if p.grad is not None]

    learner.optimizer.register_step_pre_hook(take)
    return learner, gradient


def make_records(llm: LanguageModel, *, states: int, tokens: int) -> list[StepRecord]:
    """Decisions over 16 valid actions, all of them visited."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(states):
        visits = rng.permutation(len(COMMANDS)) + 1
        ids = llm.tokenizer(f"Move {number}. " + ROOM * 20, add_special_tokens=False)["input_ids"][: tokens - 30]
        messages = [{"role": "user", "content": llm.tokenizer.decode(ids) + "\nWhat is the next command?"}]
        records.append(
            StepRecord(
                state=GameState(ROOM, COMMANDS, 0.0, 350.0, number),
                features=np.zeros(1, dtype=np.float32),
                action_indices=np.arange(len(COMMANDS)),
                prompt=llm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
                prior=None,
                visit_counts=visits,
                root_value=0.0,
                predicted_value=0.0,
                chosen=int(visits.argmax()),  # among the top actions, however few
                reward=0.0,
                done=False,
                episode=0,
                step=number,
            )
        )
    return records


def one_row_an_action(learner: LLMLearner, samples: Sequence[LLMSample]) -> float:
    """The straightforward learning step: the whole prompt again for every action. Returns the SFT loss."""
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
        # Padding on the right is out of a causal model's sight: no mask, so that its fastest attention can be used.
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
    """Both ways of one learning step, and by how much they differ."""
    learner, gradient = make_learner(llm, top=top)
    samples, _ = learner.samples(make_records(llm, states=states, tokens=tokens), np.zeros(states))
    learner.learn(samples)  # the first step also makes AdamW's moments
    ours_s, ours = seconds(lambda: learner.learn(samples)["sft_loss"], repeats=2)
    ours_gradient = list(gradient)
    plain_s, plain = seconds(lambda: one_row_an_action(learner, samples), repeats=1)
    details = {
        "top_actions": top,
        "prompt_tokens": len(samples[0].row.prompt_ids),
        "loss_difference": abs(ours - plain) / plain,
        "gradient_difference": relative_difference(ours_gradient, gradient),
    }
    equal = max(details["loss_difference"], details["gradient_difference"]) < 1e-5
    return Row(f"LLM step, {states} states, top {top} actions", ours_s, plain_s, 3, equal), details


def relative_difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Norm of the difference of two gradients, as a share of the second one's norm."""
    difference = torch.stack([(a - b).double().norm() for a, b in zip(one, other, strict=True)]).norm()
    return float(difference / torch.stack([b.double().norm() for b in other]).norm())


def llm_steps(llm: LanguageModel, *, numbers: Sequence[int], states: int, tokens: int) -> list[dict[str, float]]:
    """Seconds of our learning step for several numbers of actions."""
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


def world_model_settings(*, num_layers: int = 2) -> Any:
    return resolve_settings(
        {
            "prior": {"enabled": False},
            "world_model": {"embed_dim": 256, "num_layers": num_layers, "dropout": 0.0},
            "train": {"batch_size": BATCH},
            "llm": {"batch_size": BATCH},
            "eval": {"modes": ["world_model"]},
        }
    )


def make_states(*, count: int) -> list[GameState]:
    """Different observations, in some twenty rooms and with some twenty things carried."""
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
    """A batch of observations ``[B, U + 1, O]`` with random targets."""
    rng = np.random.default_rng(seed)
    size, steps = len(observations), observations.shape[1] - 1
    visits = np.zeros((size, steps + 1, num_actions), dtype=np.float32)
    visits[:, :, :20] = rng.dirichlet(np.ones(20), size=(size, steps + 1))
    mask = np.ones((size, steps + 1))
    mask[: size // 8, steps // 2 :] = 0  # some sequences reach the end of their episode
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
        sequences=SampledSequences([], np.zeros(0, dtype=np.int64)),
    )


def make_stock_policy(settings: Any, *, encoder_folder: str, tokens: int) -> Any:
    """LightZero's policy on token ids, with the pretrained encoder where LightZero left random values."""
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
            if "encoder.model" not in name:  # LightZero starts its heads at zero, where many mistakes do not show
                p += 0.02 * torch.randn(p.shape, generator=generator)
    model.tokenizer.encoder.model.load_state_dict(pretrained)
    target.load_state_dict(model.state_dict())
    for module in (*model.modules(), *target.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return policy


def make_twin(settings: Any, stock: Any) -> PriorZeroPolicy:
    """Our policy on the encoder's output, with all parameters and the projection of LightZero's."""
    source = stock._model._orig_mod
    projection = source.tokenizer.encoder.embed_proj_head
    twin = PriorZeroPolicy(settings, feature_size=projection.in_features, device="cpu", llm=None)
    rest = {k: v for k, v in source.world_model.state_dict().items() if not k.startswith("tokenizer.")}
    for model in (twin.network, twin.target_network):
        missing, unexpected = model.world_model.load_state_dict(rest, strict=False)
        assert not unexpected and all(name.startswith("tokenizer.") for name in missing)
        copied = torch.nn.Linear(projection.in_features, projection.out_features)
        copied.load_state_dict(projection.state_dict())
        model.tokenizer.encoder.fc_representation = copied
    return twin


@torch.inference_mode()
def first_token_outputs(encoder: TextEncoder, texts: Sequence[str]) -> np.ndarray:
    """The frozen encoder's output at the first token, one text at a time, ``[n, D]``."""
    rows = []
    for text in texts:
        inputs = encoder._tokenizer(text, return_tensors="pt", truncation=True)
        rows.append(encoder._model(**inputs).last_hidden_state[0, 0].numpy())
    return np.stack(rows)


def world_model_rows() -> tuple[list[Row], dict[str, Any]]:
    settings = world_model_settings()
    num_actions, steps = settings.env.action_space_size, settings.world_model.num_unroll_steps
    shape = (BATCH, steps + 1)
    states = make_states(count=BATCH * (steps + 1))
    texts = [state.raw_obs_text for state in states]
    encoder = TextEncoder(settings.encoder.path, cache_size=20_000, with_look=True, max_moves=100)
    features = encoder.features(states)
    batch = make_batch(features.reshape(*shape, -1), num_actions=num_actions)

    folder = resolve_model(settings.encoder.path, setting="encoder.path")
    ids = encoder._tokenizer(texts, truncation=True, padding=True)["input_ids"]
    stock = make_stock_policy(settings, encoder_folder=folder, tokens=len(ids[0]))
    stock_batch = make_batch(np.array(ids).reshape(*shape, -1), num_actions=num_actions)
    twin = make_twin(settings, stock)
    twin_batch = make_batch(first_token_outputs(encoder, texts).reshape(*shape, -1), num_actions=num_actions)
    plain_s, plain = seconds(lambda: stock._forward_learn([*stock_batch.to_lightzero(), 0]), repeats=1)
    ours = twin.learn_world_model(twin_batch, train_iter=0)
    losses = {
        name: {"ours": ours[f"train/{name}"], "plain": plain[stock_name]}
        for name, stock_name in zip(LOSSES, STOCK_LOSSES, strict=True)
    }
    equal = all(abs(v["ours"] - v["plain"]) <= 1e-4 * abs(v["plain"]) for v in losses.values())

    ours_s = world_model_step(settings, batch)
    # What our way pays elsewhere: each new state's texts, once. The default settings collect 20 states for 10 updates.
    fresh = [state_with(number) for number in range(10)]
    encode_s = seconds(lambda: encoder.features(fresh), repeats=1)[0] / len(fresh)
    new_states = settings.train.collect_env_steps / settings.train.update_per_collect
    with_encoding_s = ours_s + new_states * encode_s
    rows = [
        Row("world-model step: features | text", ours_s, plain_s, 100, equal),
        Row("the same, and encoding the new states of an update", with_encoding_s, plain_s, None, equal),
    ]
    return rows, {
        "losses": losses,
        "tokens_an_observation": len(ids[0]),
        "encode_a_new_state_s": encode_s,
        "new_states_an_update": new_states,
    }


def state_with(number: int) -> GameState:
    """A state of which no text has been seen before."""
    return GameState(
        feedback=f"Something new: {number}. " + ROOM,
        valid_actions=COMMANDS,
        score=0.0,
        max_score=350.0,
        moves=0,
        look=f"New room {number}\n" + ROOM * 2,
        inventory=f"You are carrying {number} new things.",
    )


def world_model_step(settings: Any, batch: ReplayBatch) -> float:
    """Seconds of our learning step."""
    size = batch.features.shape[1] // (settings.world_model.num_unroll_steps + 1)
    policy = PriorZeroPolicy(settings, feature_size=size, device="cpu", llm=None)
    policy.learn_world_model(batch, train_iter=0)  # the first step also makes AdamW's moments
    return seconds(lambda: policy.learn_world_model(batch, train_iter=1), repeats=3)[0]


def world_model_steps(*, depths: Sequence[int]) -> list[dict[str, float]]:
    """Seconds of our learning step for several depths of the transformer."""
    table = []
    for depth in depths:
        settings = world_model_settings(num_layers=depth)
        shape = (BATCH, settings.world_model.num_unroll_steps + 1, FEATURE_SIZE)
        observations = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        batch = make_batch(observations, num_actions=settings.env.action_space_size)
        table.append({"layers": depth, "seconds": world_model_step(settings, batch)})
    return table


def main(arguments: list[str]) -> int:
    which = arguments[0] if arguments else "both"
    if len(arguments) > 1 or which not in ("both", "llm", "world_model"):
        sys.exit("usage: python scripts/bench_learner.py [llm|world_model]")
    rows: list[Row] = []
    details: dict[str, Any] = {}
    if which in ("both", "world_model"):
        made, details["world_model"] = world_model_rows()
        rows += made
        details["world_model_step_by_layers"] = world_model_steps(depths=(1, 2, 4))
    if which in ("both", "llm"):
        llm = load_language_model(resolve_settings(PRESETS["quick_test"]).llm, device=torch.device("cpu"))
        details["llm"] = []
        for top in (8, 16):
            row, differences = language_model_row(llm, top=top, states=2, tokens=300)
            rows.append(row)
            details["llm"].append(differences)
        details["llm_step_by_actions"] = llm_steps(llm, numbers=(1, 4, 16), states=2, tokens=300)
    for name in ("world_model_step_by_layers", "llm_step_by_actions"):
        for line in details.get(name, []):
            print("  ".join([name, *(f"{key}={value:.3g}" for key, value in line.items())]))
    return report("learner", rows, **details, threads=torch.get_num_threads())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
