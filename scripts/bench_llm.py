"""Time of an update of the language model, compared with straightforward implementations. Takes about ten minutes.

    python scripts/bench_llm.py     # needs 8 GB of memory; with --float64 10 GB, and ten minutes more

An update is forward pass, backward pass and AdamW of SmolLM2-135M in float32. Results are equal if the difference of
each loss is below 1e-5 of the SFT loss, and the norm of the difference of the gradients is below 1e-5 of the gradient's
norm (5e-5 if the reference repeats the prompt for every action, because its own rounding error is 2e-5). ``--float64``
also compares both with an update in float64. The RFT loss is not divided by itself: its terms have both signs and
almost cancel.

Eight decisions: two runs of four consecutive decisions (``llm.run_length``) of two episodes of TextWorld, played at
random, with three kinds of prompts: the list of past commands that the quick test and configs/learning_textworld.yaml
use (walkthrough), a short transcript (``SMALL_SETTINGS``), and the default. Prompts, actions and rewards are those of
the game. Visit counts and values are random numbers. Both losses, SFT and RFT, train the prior over all valid actions.
The package packs all decisions into one token tree. The reference is the same learner with one decision in a
micro-batch: the actions of a decision share its prompt, but the decisions share nothing.

Two states: SFT on the tokens of the 8 or 16 most visited actions of two states with prompts of 300 tokens. The
reference repeats the prompt for every action. It has as many rows in a micro-batch as the package has states.

Further tables:

- tokens: the nodes of the tree, the tokens of the reference, those with one prompt for every action, the ratio of the
  first two for this batch and on average over 20 batches, and the lower bound: 6 operations for each parameter and
  node, without the input embedding, and with the output layer only for the nodes that predict a token, at the speed of
  one large matrix product.
- micro-batches: the tokens of a forward pass in batches of 32 decisions, by ``llm.micro_batch_size``.
- trained parameters: updates of all parameters, of adapters and of the last third of the layers, on the same eight
  decisions with the default prompts. The memory is what the process uses beyond the model's parameters: gradients,
  AdamW's moments and activations.
- number of actions: seconds of an update of two states.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import dataclasses
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_prompts import COMMANDS, ROOM, forward_operations, matmul_rate, numbered_prompt, play_at_random
from bench_tools import SMALL_SETTINGS, Row, print_table, report, seconds

from priorzero.config import PRESETS, resolve_settings
from priorzero.llm.fine_tuning import LLMLearner, LLMSample
from priorzero.llm.losses import gradient_norm, sft_loss
from priorzero.llm.models import LanguageModel, load_language_model
from priorzero.llm.packing import PackedBatch, pack
from priorzero.llm.prompts import prompt_style, render_prompt
from priorzero.settings import Settings
from priorzero.types import GameState, HistoryStep, StepRecord
from priorzero.world_model.batch import SampledSequences
from priorzero.world_model.lightzero import unizero_config
from priorzero.world_model.segment import PriorZeroGameSegment

Update = tuple[dict[str, float], list[torch.Tensor]]  # its losses and its gradient

CPU = torch.device("cpu")
TOLERANCE = 1e-5  # of losses and gradients, relative
TOLERANCE_ROWS = 5e-5  # the same, if the reference repeats the prompt for every action
DECISIONS = 8
RUN_LENGTH = 4
NUM_EPISODES = 8
EPISODE_STEPS = 20
VARIANTS: dict[str, dict[str, Any]] = {
    "all parameters": {},
    "LoRA, r=8": {"use_lora": True, "lora_r": 8},
    "last 10 of 30 layers": {"trained_layers": 10},
}


# ---- learner and gradient ----


def make_learner(llm: LanguageModel, settings: Settings, **changes: Any) -> tuple[LLMLearner, list[torch.Tensor]]:
    """A learner with a learning rate of 0, and a list that holds the gradient of the last update.

    Args:
        llm: the model.
        settings: of the prompts, the prior and the losses.
        changes: settings of the group ``llm`` that differ.
    """
    settings = resolve_settings(settings, {"llm": {"grad_clip": 1e9, **changes}})
    learner = LLMLearner(llm, settings.llm, style=prompt_style(settings), temperature=settings.prior.temperature)
    learner.optimizer.param_groups[0]["lr"] = 0.0
    return learner, record_gradient(learner)


def record_gradient(learner: LLMLearner) -> list[torch.Tensor]:
    """A list that holds the gradient of the learner's last update from now on."""
    gradient: list[torch.Tensor] = []

    def copy_gradient(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        gradient[:] = [p.grad for p in learner.llm.trainable_parameters() if p.grad is not None]

    learner.optimizer.register_step_pre_hook(copy_gradient)
    return gradient


def relative_difference(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Norm of the difference of two gradients, divided by the norm of the second."""
    difference = torch.stack([(a - b).double().norm() for a, b in zip(one, other, strict=True)]).norm()
    return float(difference / torch.stack([b.double().norm() for b in other]).norm())


def differences(
    learner: LLMLearner, samples: Sequence[LLMSample], ours: Update, reference: Update, *, float64: bool
) -> dict[str, float]:
    """Relative differences of two updates of ``learner`` on ``samples``; with ``float64`` also those from float64."""
    sft_loss = reference[0]["sft_loss"]
    result = {
        "losses": max(abs(ours[0][name] - value) for name, value in reference[0].items()) / sft_loss,
        "gradient": relative_difference(ours[1], reference[1]),
    }
    if float64:
        exact = float64_gradient(learner, samples)
        result["ours | float64"] = relative_difference(ours[1], exact)
        result["ref. | float64"] = relative_difference(reference[1], exact)
    return result


def float64_gradient(learner: LLMLearner, samples: Sequence[LLMSample]) -> list[torch.Tensor]:
    """The gradient of the same update with a copy of the model in float64, one decision at a time."""
    model = copy.deepcopy(learner.llm.model).double()
    llm = dataclasses.replace(learner.llm, model=model, compute_dtype=torch.float64)
    exact = LLMLearner(llm, learner.cfg, style=learner.style, temperature=learner.temperature)
    exact.micro_batch_size = 1
    exact.optimizer = torch.optim.SGD(llm.trainable_parameters(), lr=0.0)  # without AdamW's moments, to save memory
    gradient = record_gradient(exact)
    exact.learn(samples)
    return gradient


# ---- decisions of episodes ----


def prompt_cases() -> dict[str, Settings]:
    """The settings whose prompts are compared."""
    return {
        # The prompt of configs/learning_textworld.yaml.
        "walkthrough": resolve_settings(PRESETS["quick_test"], {"llm": {"adapter": "", "show_observation": False}}),
        "short": resolve_settings(SMALL_SETTINGS),
        "default": resolve_settings(
            {"env": {"action_space_size": 256}, "llm": {"path": SMALL_SETTINGS["llm"]["path"]}},
        ),
    }


def episode_records(settings: Settings, tokenizer: Any, *, seed: int) -> list[StepRecord]:
    """The decisions of an episode that is played at random. Visit counts and values are random numbers."""
    states, decisions = play_at_random(
        steps=EPISODE_STEPS, seed=seed, drop_inert_commands=settings.env.drop_inert_commands
    )
    return records_of(states, decisions, settings, tokenizer, seed=seed)


def records_of(
    states: Sequence[GameState],
    decisions: Sequence[HistoryStep],
    settings: Settings,
    tokenizer: Any,
    *,
    seed: int,
) -> list[StepRecord]:
    """The decisions of an episode as records. Visit counts and values are random numbers from ``seed``."""
    rng = np.random.default_rng(seed)
    records = []
    for t, (state, decision) in enumerate(zip(states, decisions, strict=True)):
        num_actions = len(state.valid_actions)
        prompt = render_prompt(state, decisions[:t], style=prompt_style(settings), tokenizer=tokenizer)
        records.append(
            StepRecord(
                state=state,
                features=np.zeros(1, dtype=np.float32),
                action_indices=np.arange(num_actions),
                prompt=prompt.text,
                prior=None,
                visit_counts=rng.multinomial(settings.search.num_simulations, rng.dirichlet(np.ones(num_actions))),
                root_value=float(rng.normal()),
                predicted_value=float(rng.normal()),
                chosen=state.valid_actions.index(decision.action),
                reward=decision.reward,
                done=False,
                episode=seed,
                step=t,
            )
        )
    return records


def make_segments(settings: Settings, tokenizer: Any, *, count: int) -> list[PriorZeroGameSegment]:
    """One segment for each episode."""
    config = unizero_config(settings, feature_size=1, device="cpu")
    segments = []
    for seed in range(count):
        records = episode_records(settings, tokenizer, seed=seed)
        segments.append(PriorZeroGameSegment(records, [], final_features=None, terminated=False, config=config))
    return segments


def draw_samples(
    learner: LLMLearner, segments: Sequence[PriorZeroGameSegment], *, count: int, rng: np.random.Generator
) -> list[LLMSample]:
    """A batch of ``count`` decisions as in training, with one run of ``RUN_LENGTH`` decisions for each segment."""
    sizes = [len(segment.records) for segment in segments]
    sequences = SampledSequences(
        list(segments), rng.integers(sizes), [np.full(n, 1 / n) for n in sizes], rng.random(len(segments))
    )
    drawn = sequences.decisions(count, run_length=RUN_LENGTH)
    samples, skipped = learner.samples(drawn.records, drawn.returns, weights=drawn.weights)
    assert len(samples) == count and skipped == 0
    return samples


def packed(samples: Sequence[LLMSample]) -> PackedBatch:
    """The token tree of some samples."""
    return pack([sample.row for sample in samples], dtype=torch.float32, device="cpu")


def num_tokens(samples: Sequence[LLMSample], *, micro_batch_size: int) -> list[int]:
    """The number of tokens of each forward pass."""
    starts = range(0, len(samples), micro_batch_size)
    return [packed(samples[start : start + micro_batch_size]).input_ids.numel() for start in starts]


def token_figures(samples: Sequence[LLMSample], batches: Sequence[Sequence[LLMSample]]) -> dict[str, float]:
    """Numbers of tokens of a batch, and their ratio on average over several batches."""

    def ratio(batch: Sequence[LLMSample]) -> float:
        return sum(num_tokens(batch, micro_batch_size=1)) / sum(num_tokens(batch, micro_batch_size=len(batch)))

    return {
        "tree": sum(num_tokens(samples, micro_batch_size=len(samples))),
        "one at a time": sum(num_tokens(samples, micro_batch_size=1)),
        "row per action": sum(len(s.row.prompt_ids) + len(c) for s in samples for c in s.row.completions),
        "ratio": ratio(samples),
        "mean ratio": float(np.mean([ratio(batch) for batch in batches])),
        "prompt mean": float(np.mean([len(sample.row.prompt_ids) for sample in samples])),
        "actions mean": float(np.mean([len(sample.row.completions) for sample in samples])),
    }


def decisions_row(
    name: str, learner: LLMLearner, gradient: list[torch.Tensor], samples: Sequence[LLMSample], *, float64: bool
) -> tuple[Row, dict[str, float]]:
    """The comparison of one update on consecutive decisions, and the differences of its results."""

    def update() -> Update:
        losses = learner.learn(samples)
        return {key: losses[key] for key in ("sft_loss", "rft_loss")}, list(gradient)

    update()  # warm-up; it also creates AdamW's moments
    ours_s, ours = seconds(update, repeats=2)
    learner.micro_batch_size = 1
    reference_s, reference = seconds(update, repeats=2)
    learner.micro_batch_size = len(samples)
    found = differences(learner, samples, ours, reference, float64=float64)
    equal = max(found["losses"], found["gradient"]) < TOLERANCE
    return Row(f"LLM update, {len(samples)} decisions, {name} prompts", ours_s, reference_s, 3, equal), found


def decisions_rows(
    llm: LanguageModel, *, rate: float, float64: bool = False
) -> tuple[list[Row], dict[str, dict[str, dict[str, float]]]]:
    """The comparisons on consecutive decisions for each prompt, and the tables that belong to them.

    Args:
        llm: the model.
        rate: of :func:`matmul_rate`, for the lower bound.
        float64: also compare with float64.
    """
    rows, tokens, micro_batches, found = [], {}, {}, {}
    for name, settings in prompt_cases().items():
        segments = make_segments(settings, llm.tokenizer, count=NUM_EPISODES)
        learner, gradient = make_learner(llm, settings, micro_batch_size=DECISIONS, objective="actions")
        rng = np.random.default_rng(0)
        pairs = [segments[i : i + 2] for i in range(0, NUM_EPISODES, 2)]
        batches = [draw_samples(learner, pairs[i % len(pairs)], count=DECISIONS, rng=rng) for i in range(20)]
        samples = batches[0]
        row, found[name] = decisions_row(name, learner, gradient, samples, float64=float64)
        rows.append(row)
        tree = packed(samples)
        operations = forward_operations(llm, tokens=tree.input_ids.numel(), predictors=len(tree.predictors))
        bound_s = 3 * operations / rate  # the backward pass has two products for each one of the forward pass
        tokens[name] = token_figures(samples, batches)
        tokens[name] |= {"lower bound (s)": bound_s, "ours (s)": row.ours_s, "share": bound_s / row.ours_s}
        batch = draw_samples(learner, segments, count=NUM_EPISODES * RUN_LENGTH, rng=rng)
        for size in (1, 2, 4, 8):
            counts = num_tokens(batch, micro_batch_size=size)
            micro_batches[f"{name}, micro_batch_size={size}"] = {
                "forward passes": len(counts),
                "mean": float(np.mean(counts)),
                "largest": max(counts),
                "sum": sum(counts),
            }
    return rows, {"tokens": tokens, "tokens of a forward pass": micro_batches, "relative differences": found}


# ---- trained parameters ----


def trained_parameters(settings: Settings) -> dict[str, dict[str, float]]:
    """Seconds and memory of an update of all parameters, of adapters, and of the last layers."""
    table = {name: update_figures(settings, changes) for name, changes in VARIANTS.items()}
    first = next(iter(table.values()))["seconds"]
    return {name: {**figures, "relative": figures["seconds"] / first} for name, figures in table.items()}


def update_figures(settings: Settings, changes: dict[str, Any]) -> dict[str, float]:
    """Seconds and memory of an update with changed settings of the group ``llm``."""
    settings = resolve_settings(settings, {"llm": {"micro_batch_size": DECISIONS, **changes}})
    llm = load_language_model(settings.llm, device=CPU)
    learner = LLMLearner(llm, settings.llm, style=prompt_style(settings))
    samples = draw_samples(
        learner, make_segments(settings, llm.tokenizer, count=2), count=DECISIONS, rng=np.random.default_rng(0)
    )
    before = resident_memory()
    learner.learn(samples)
    reset_largest_memory()
    spent, _ = seconds(lambda: learner.learn(samples), repeats=2)
    return {
        "parameters (M)": sum(p.numel() for p in llm.trainable_parameters()) / 1e6,
        "memory (MB)": (memory_status("VmHWM") - before) / 1e6,
        "seconds": spent,
    }


def resident_memory() -> int:
    """Bytes of memory that this process uses, without freed memory that is kept for later (Linux with glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return memory_status("VmRSS")


def reset_largest_memory() -> None:
    """Let the kernel measure ``VmHWM``, the largest resident set of this process, anew."""
    Path("/proc/self/clear_refs").write_text("5")


def memory_status(name: str) -> int:
    """A value in bytes from ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


# ---- one row for each action ----


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


def make_sft_learner(llm: LanguageModel, *, top: int) -> tuple[LLMLearner, list[torch.Tensor]]:
    """A learner with SFT on the tokens of the most visited actions, and the list that holds its gradient."""
    settings = resolve_settings(SMALL_SETTINGS)
    return make_learner(llm, settings, objective="tokens", enable_rft=False, sft_top_actions=top)


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


def actions_row(
    llm: LanguageModel, *, top: int, states: int, tokens: int, float64: bool
) -> tuple[Row, dict[str, float]]:
    """The comparison of one update with one row for each action, and the differences of its results."""
    learner, gradient = make_sft_learner(llm, top=top)
    samples, _ = learner.samples(make_records(llm, states=states, tokens=tokens), np.zeros(states))
    learner.learn(samples)  # warm-up; it also creates AdamW's moments
    ours_s, loss = seconds(lambda: learner.learn(samples)["sft_loss"], repeats=2)
    ours = {"sft_loss": loss}, list(gradient)
    reference_s, loss = seconds(lambda: learn_one_row_per_action(learner, samples), repeats=1)
    reference = {"sft_loss": loss}, list(gradient)
    found = differences(learner, samples, ours, reference, float64=float64)
    equal = max(found["losses"], found["gradient"]) < TOLERANCE_ROWS
    return Row(f"LLM update, {states} states, top {top} actions", ours_s, reference_s, 3, equal), found


def update_times_by_actions(
    llm: LanguageModel, *, numbers: Sequence[int], states: int, tokens: int
) -> dict[str, dict[str, float]]:
    """Seconds of the package's update for several numbers of actions."""
    table = {}
    for top in numbers:
        learner, _ = make_sft_learner(llm, top=top)
        samples, _ = learner.samples(make_records(llm, states=states, tokens=tokens), np.zeros(states))
        assert {len(sample.row.completions) for sample in samples} == {top}
        learner.learn(samples)
        step_s, _ = seconds(lambda: learner.learn(samples), repeats=2)  # noqa: B023
        table[f"{top} actions"] = {"seconds": step_s}
    return table


def main() -> int:
    """Returns the exit code: 0 if all results are equal, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--float64", action="store_true", help="also compare the gradients with float64")
    float64 = parser.parse_args().float64
    rate = matmul_rate()
    llm = load_language_model(resolve_settings(SMALL_SETTINGS).llm, device=CPU)
    rows, tables = decisions_rows(llm, rate=rate, float64=float64)
    for top in (8, 16):
        row, found = actions_row(llm, top=top, states=2, tokens=300, float64=float64)
        rows.append(row)
        tables["relative differences"][f"2 states, top {top} actions"] = found
    tables["number of actions"] = update_times_by_actions(llm, numbers=(1, 4, 16), states=2, tokens=300)
    del llm
    tables["trained parameters"] = trained_parameters(prompt_cases()["default"])
    for title, table in tables.items():
        print_table(title, table)
    return report("llm", rows, tables=tables, matmul_gflops=rate / 1e9, threads=torch.get_num_threads())


if __name__ == "__main__":
    sys.exit(main())
