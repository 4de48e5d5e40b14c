"""Time to compute priors in this process, compared with one prompt for each action. Takes about six minutes.

    python scripts/bench_prior.py            # with --every 1: about 15 minutes

The model is SmolLM2-135M in float32 on all cores. The results are equal if the log-probabilities of all tokens differ
by less than 1e-4.

The episode is one of TextWorld, played at random, with the default prompt settings (five past decisions) and with
twenty past decisions (about 600 tokens). Its states have 9 valid actions on average; more are added from a list until
there are 16.

Reference: the model processes the whole prompt again for every action. This takes half a minute for each step, so it is
measured on every fifth step and scaled by the number of tokens of all steps; ``--every 1`` measures all steps.

The lower bound is the time that the necessary tokens would take if every matrix product ran at the speed of a single
large one.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from bench_prompts import (
    ROOM,
    chat_prompt,
    forward_operations,
    largest_difference,
    logprobs_one_prompt_per_action,
    matmul_rate,
    play_at_random,
)
from bench_tools import SMALL_SETTINGS, Row, at_least, print_table, report, seconds

from priorzero.config import resolve_settings
from priorzero.llm.engines import PriorBuilder, TransformersEngine
from priorzero.llm.models import LanguageModel, load_language_model
from priorzero.llm.packing import PromptRow, pack
from priorzero.llm.prompts import PromptStyle, prompt_style, render_prompt
from priorzero.types import PriorRequest

VERBS = ("open", "take", "push", "examine", "enter", "read", "climb", "turn on")
THINGS = ("the mailbox", "the lantern", "the trap door", "a brown sack", "the window", "the sword", "an egg", "the rug")
COMMANDS = [f"{verb} {thing}" for thing in THINGS for verb in VERBS]
TOLERANCE = 1e-4  # of log-probabilities


# ---- inputs ----


def request_of_length(llm: LanguageModel, *, tokens: int, actions: int) -> PriorRequest:
    """A request with a chat prompt of about ``tokens`` tokens."""
    all_words = (ROOM * 40).split()

    def prompt(words: int) -> str:
        return chat_prompt(llm, " ".join(all_words[:words]))

    words = 1
    while len(llm.tokenizer(prompt(words), add_special_tokens=False)["input_ids"]) < tokens:
        words += 1
    return PriorRequest(prompt(words), tuple(COMMANDS[:actions]))


def episode_requests(llm: LanguageModel, *, steps: int, style: PromptStyle, min_actions: int = 0) -> list[PriorRequest]:
    """The requests of one episode that is played at random.

    Args:
        llm: its tokenizer renders the prompts.
        steps: length of the episode.
        style: of the prompts.
        min_actions: commands are added to the valid actions of a state until there are as many.
    """
    states, decisions = play_at_random(steps=steps, seed=0, drop_inert_commands=False)
    requests = []
    for t, state in enumerate(states):
        own = state.valid_actions
        added = [command for command in COMMANDS if command not in own][: max(0, min_actions - len(own))]
        state = dataclasses.replace(state, valid_actions=(*own, *added))
        prompt = render_prompt(state, decisions[:t], style=style, tokenizer=llm.tokenizer)
        requests.append(PriorRequest(prompt.text, state.valid_actions))
    return requests


# ---- the engine, and what it has to compute ----


class RecordingEngine:
    """The engine as in training. It also records the log-probabilities of all tokens."""

    def __init__(
        self, llm: LanguageModel, style: PromptStyle, *, prompt_cache_tokens: int, rows_per_forward: int = 1
    ) -> None:
        self.logprobs: list[list[np.ndarray]] = []
        recorded = self.logprobs

        class RecordingBuilder(PriorBuilder):
            def from_logprobs(self, logprobs: Sequence[np.ndarray], **arguments):
                recorded.append(list(logprobs))
                return super().from_logprobs(logprobs, **arguments)

        self.builder = RecordingBuilder(llm, style)
        self._engine = TransformersEngine(
            self.builder, rows_per_forward=rows_per_forward, prompt_cache_tokens=prompt_cache_tokens
        )

    def compute(self, requests: Sequence[PriorRequest]) -> list[list[np.ndarray]]:
        """Compute the priors one after the other, as in an episode, with empty caches at the beginning."""
        asyncio.run(self._engine.clear_cache())
        self.logprobs.clear()
        for request in requests:
            asyncio.run(self._engine.priors([request]))
        return list(self.logprobs)

    def compute_together(self, requests: Sequence[PriorRequest]) -> list[list[np.ndarray]]:
        """Compute the priors in one call, as of many games side by side, with empty caches at the beginning."""
        asyncio.run(self._engine.clear_cache())
        self.logprobs.clear()
        asyncio.run(self._engine.priors(requests))
        return list(self.logprobs)


def num_new_tokens(rows: Sequence[PromptRow]) -> int:
    """Number of tokens that the model must process if it keeps all prefixes of earlier prompts."""
    total, known = 0, set[tuple[int, ...]]()
    for row in rows:
        prefixes = [tuple(row.prompt_ids[: n + 1]) for n in range(len(row.prompt_ids))]
        total += max(1, sum(prefix not in known for prefix in prefixes))
        total += len(pack([row], dtype=torch.float32, device="cpu").predictors) - 1
        known.update(prefixes)
    return total


def num_reference_tokens(row: PromptRow) -> int:
    """Number of tokens that the reference processes."""
    return sum(len(row.prompt_ids) + len(completion) for completion in row.completions)


def num_operations(llm: LanguageModel, rows: Sequence[PromptRow]) -> float:
    """Floating point operations in matrix products with the parameters."""
    predictors = sum(len(pack([row], dtype=torch.float32, device="cpu").predictors) for row in rows)
    return forward_operations(llm, tokens=num_new_tokens(rows), predictors=predictors)


def token_counts(rows: Sequence[PromptRow]) -> dict[str, float]:
    """Numbers of tokens."""
    reference = sum(map(num_reference_tokens, rows))
    return {
        "new": num_new_tokens(rows),
        "reference": reference,
        "reference / new": reference / num_new_tokens(rows),
        "prompt mean": float(np.mean([len(row.prompt_ids) for row in rows])),
        "actions mean": float(np.mean([len(row.completions) for row in rows])),
    }


# ---- measurements ----


@dataclass(frozen=True)
class Case:
    """Requests to compare on.

    Attributes:
        name: of the row.
        requests: all different, since the engine caches the priors of equal requests.
        goal: the speed-up that is aimed at.
        every: the reference is measured on every N-th request.
    """

    name: str
    requests: list[PriorRequest]
    goal: float | None
    every: int


def make_cases(llm: LanguageModel, *, steps: int, every: int) -> list[Case]:
    """One decision, and one episode with a long and with the default history."""
    long = prompt_style(resolve_settings({"llm": {"history_length": 20}}))
    default = prompt_style(resolve_settings())
    name = f"{steps}-step episode, 16 actions"
    long_episode = episode_requests(llm, steps=steps, style=long, min_actions=16)
    default_episode = episode_requests(llm, steps=steps, style=default, min_actions=16)
    return [
        Case("one decision, 600 tokens, 16 actions", [request_of_length(llm, tokens=600, actions=16)], 12, 1),
        Case(f"{name}, 20 past decisions", long_episode, 30, every),
        Case(f"{name}, default history", default_episode, None, every),
    ]


def compare(case: Case, llm: LanguageModel, *, prompt_cache_tokens: int, rate: float) -> tuple[Row, dict[str, Any]]:
    """The comparison, and the numbers of tokens and the lower bound."""
    requests = case.requests
    assert len(set(requests)) == len(requests)
    engine = RecordingEngine(llm, prompt_style(resolve_settings()), prompt_cache_tokens=prompt_cache_tokens)
    rows = [engine.builder.row(request) for request in requests]
    engine.compute(requests[:1])  # warm-up
    ours_s, ours = seconds(lambda: engine.compute(requests), repeats=3 if len(requests) == 1 else 1)
    every = min(case.every, len(rows))
    measured = range(every - 1, len(rows), every)
    measured_s, reference = seconds(lambda: [logprobs_one_prompt_per_action(llm, rows[t]) for t in measured], repeats=1)
    equal = all(largest_difference(ours[t], own) < TOLERANCE for t, own in zip(measured, reference, strict=True))
    tokens = [num_reference_tokens(row) for row in rows]
    reference_s = measured_s * sum(tokens) / sum(tokens[t] for t in measured)
    details = token_counts(rows) | {"lower_bound_s": num_operations(llm, rows) / rate, "ours_s": ours_s}
    details |= {"steps": len(rows), "reference steps": len(measured)}
    return Row(case.name, ours_s, reference_s, case.goal, equal), details


def measure_growth(llm: LanguageModel, *, steps: int, prompt_cache_tokens: int) -> dict[str, dict[str, float]]:
    """Seconds for one decision, by the number of actions and by the length of the history."""
    growth = {}
    for actions in (1, 4, 16, 64):
        engine = RecordingEngine(llm, prompt_style(resolve_settings()), prompt_cache_tokens=prompt_cache_tokens)
        requests = [request_of_length(llm, tokens=600, actions=actions)]
        spent, _ = seconds(lambda: engine.compute(requests), repeats=2)  # noqa: B023
        growth[f"{actions} actions, 600 tokens"] = {"seconds": spent}
    for history_length in (0, 2, 5, 10):
        style = prompt_style(resolve_settings({"llm": {"history_length": history_length}}))
        requests = episode_requests(llm, steps=min(10, steps), style=style)
        for cached in (True, False):
            engine = RecordingEngine(llm, style, prompt_cache_tokens=prompt_cache_tokens if cached else 0)
            spent, _ = seconds(lambda: engine.compute(requests), repeats=1)  # noqa: B023
            name = f"history_length={history_length}, prompt cache {'on' if cached else 'off'}"
            growth[name] = {"seconds": spent / len(requests)}
    return growth


def main() -> int:
    """Returns the exit code: 0 if all results are equal, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=at_least(1), default=20, help="steps of the episode (default: 20)")
    parser.add_argument(
        "--every", type=at_least(1), default=5, help="measure the reference on every N-th step (default: 5)"
    )
    options = parser.parse_args()
    settings = resolve_settings(SMALL_SETTINGS)
    llm = load_language_model(settings.llm, device=torch.device("cpu"))
    prompt_cache_tokens, rate = settings.prior.prompt_cache_tokens, matmul_rate()
    rows, figures = [], {}
    for case in make_cases(llm, steps=options.steps, every=options.every):
        row, figures[case.name] = compare(case, llm, prompt_cache_tokens=prompt_cache_tokens, rate=rate)
        rows.append(row)
    style = prompt_style(resolve_settings())
    builder = PriorBuilder(llm, style)
    own_actions = [builder.row(request) for request in episode_requests(llm, steps=options.steps, style=style)]
    kinds = ("new", "reference", "reference / new", "prompt mean", "actions mean")
    counts = {name: {kind: own[kind] for kind in kinds} for name, own in figures.items()}
    print_table("tokens", counts | {f"{options.steps}-step episode, its own actions": token_counts(own_actions)})
    times = ("lower_bound_s", "ours_s", "steps", "reference steps")
    print_table("lower bound", {name: {key: own[key] for key in times} for name, own in figures.items()})
    growth = measure_growth(llm, steps=options.steps, prompt_cache_tokens=prompt_cache_tokens)
    print_table("seconds for one decision", growth)
    return report("prior", rows, figures=figures, growth=growth, matmul_gflops=rate / 1e9)


if __name__ == "__main__":
    sys.exit(main())
