"""What a prior costs in this process, against sending the whole prompt again for every action. Takes some six minutes.

    python scripts/bench_prior.py            # --every 1: a quarter of an hour

SmolLM2-135M in float32 on all cores. Equal means log-probabilities of every token within 1e-4. The episode is one of
TextWorld's, played at random, with the prompt that the defaults make (five past decisions), and with twenty past
decisions (about 600 tokens); its states have 9 valid actions on average and are given more from a list until they have
16. The plain way takes half a minute a step: it is run on every fifth step and its time scaled by the tokens of the
others (``--every 1`` runs it on all). The floor is what the tokens that must be computed would take if every matrix
product ran as fast as one large one alone.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import numpy as np
import torch
from bench_tools import Row, matmul_rate, print_table, report, seconds

from priorzero.config import PRESETS, resolve_settings
from priorzero.envs import resolve_game
from priorzero.envs.games import make_game
from priorzero.llm.engines import PriorBuilder, TransformersEngine
from priorzero.llm.models import LanguageModel, load_language_model
from priorzero.llm.packing import PromptRow, pack
from priorzero.llm.prompts import PromptStyle, render_prompt
from priorzero.llm.prompts import prompt_style
from priorzero.types import HistoryStep, PriorRequest

GAME = "textworld:simple?seed=7"
VERBS = ("open", "take", "push", "examine", "enter", "read", "climb", "turn on")
THINGS = ("the mailbox", "the lantern", "the trap door", "a brown sack", "the window", "the sword", "an egg", "the rug")
COMMANDS = [f"{verb} {thing}" for thing in THINGS for verb in VERBS]
ROOM = (
    "You are standing in an open field west of a white house, with a boarded front door. There is a small mailbox "
    "here. A path leads around the house, and the forest begins not far from it. "
)


def question(llm: LanguageModel, *, tokens: int, actions: int) -> PriorRequest:
    """A chat prompt of ``tokens`` tokens (give or take one or two) and as many commands."""

    def text(words: int) -> str:
        messages = [{"role": "user", "content": " ".join((ROOM * 40).split()[:words]) + "\nWhat is the next command?"}]
        return llm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    words = 1
    while len(llm.tokenizer(text(words), add_special_tokens=False)["input_ids"]) < tokens:
        words += 1
    return PriorRequest(text(words), tuple(COMMANDS[:actions]))


def episode(llm: LanguageModel, *, steps: int, style: PromptStyle, actions: int = 0) -> list[PriorRequest]:
    """The questions of one episode, played at random; states are given more commands until they have ``actions``."""
    game = make_game(
        resolve_game(GAME), seed=0, max_episode_steps=steps + 1, look_and_inventory=True, drop_inert_commands=False
    )
    rng = np.random.default_rng(0)
    state, history, asked = game.reset(), [], []
    for _ in range(steps):
        own = state.valid_actions
        more = [command for command in COMMANDS if command not in own][: max(0, actions - len(own))]
        state = dataclasses.replace(state, valid_actions=(*own, *more))
        prompt = render_prompt(state, history, style=style, tokenizer=llm.tokenizer)
        asked.append(PriorRequest(prompt.text, state.valid_actions))
        action = own[rng.integers(len(own))]
        following, reward = game.step(action)
        history.append(HistoryStep(state.feedback, action, reward))
        state = following
    game.close()
    return asked


@torch.inference_mode()
def one_prompt_an_action(llm: LanguageModel, row: PromptRow) -> np.ndarray:
    """The straightforward way: the whole prompt again for every action. Log-probabilities of all tokens in a row."""
    result = []
    for completion in row.completions:
        ids = torch.tensor([[*row.prompt_ids, *completion]])
        logits = llm.model(input_ids=ids, logits_to_keep=len(completion) + 1, use_cache=False).logits[0, :-1]
        result.append(torch.log_softmax(logits, -1)[range(len(completion)), completion])
    return torch.cat(result).numpy()


class Ours:
    """The engine as the loop uses it; notes the log-probabilities of all tokens and counts what it computed."""

    def __init__(self, llm: LanguageModel, style: PromptStyle, *, prompt_cache_tokens: int) -> None:
        self.logprobs: list[np.ndarray] = []
        outer = self

        class Builder(PriorBuilder):
            def from_logprobs(self, logprobs: Sequence[np.ndarray], *, version: int):
                outer.logprobs.append(np.concatenate(logprobs))
                return super().from_logprobs(logprobs, version=version)

        self.engine = TransformersEngine(Builder(llm, style), rows_per_forward=1, prompt_cache_tokens=prompt_cache_tokens)

    def ask(self, requests: Sequence[PriorRequest]) -> list[np.ndarray]:
        """One question after the other, as an episode brings them, from a standing start."""
        asyncio.run(self.engine.sync_weights(0))
        self.logprobs = []
        for request in requests:
            asyncio.run(self.engine.priors([request]))
        return self.logprobs


def tokens_computed(rows: Sequence[PromptRow]) -> int:
    """Tokens that have to go through the model when each prompt goes on from the longest beginning known so far."""
    total, known = 0, set()
    for row in rows:
        beginnings = [tuple(row.prompt_ids[: n + 1]) for n in range(len(row.prompt_ids))]
        total += max(1, sum(b not in known for b in beginnings))
        total += pack([row], dtype=torch.float32, device="cpu").num_logits - 1
        known.update(beginnings)
    return total


def operations(llm: LanguageModel, rows: Sequence[PromptRow]) -> float:
    """Floating point operations in matrix products with the parameters; the output layer reads few of the tokens."""
    output = llm.model.get_output_embeddings().weight.numel()
    inner = sum(p.numel() for p in llm.model.parameters()) - output
    predicting = sum(pack([row], dtype=torch.float32, device="cpu").num_logits for row in rows)
    return 2.0 * (inner * tokens_computed(rows) + output * predicting)


def tokens(rows: Sequence[PromptRow]) -> dict[str, float]:
    """What there is to compute, and what the plain way computes."""
    sent = sum(len(row.prompt_ids) + len(c) for row in rows for c in row.completions)
    return {
        "new": tokens_computed(rows),
        "plain": sent,
        "plain / new": sent / tokens_computed(rows),
        "prompt mean": float(np.mean([len(row.prompt_ids) for row in rows])),
        "actions mean": float(np.mean([len(row.completions) for row in rows])),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="steps of the episode")
    parser.add_argument("--every", type=int, default=5, help="the plain way is run on every N-th of them")
    args = parser.parse_args()
    settings = resolve_settings(PRESETS["quick_test"])
    defaults = prompt_style(resolve_settings())
    llm = load_language_model(settings.llm, device=torch.device("cpu"))
    tokens_kept = settings.prior.prompt_cache_tokens
    rate = matmul_rate()
    rows, floors = [], {}
    long = prompt_style(resolve_settings({"llm": {"history_length": 20}}))
    for name, requests, goal, every in (
        ("one decision, 600 tokens, 16 actions", [question(llm, tokens=600, actions=16)], 12, 1),
        (
            f"{args.steps}-step episode, 16 actions, 20 past decisions",
            episode(llm, steps=args.steps, style=long, actions=16),
            30,
            args.every,
        ),
        (
            f"{args.steps}-step episode, 16 actions, default history",
            episode(llm, steps=args.steps, style=defaults, actions=16),
            None,
            args.every,
        ),
    ):
        ours = Ours(llm, defaults, prompt_cache_tokens=tokens_kept)
        assert len(set(requests)) == len(requests), "a question that comes again is answered from memory"
        packed = [ours.engine.builder.row(request) for request in requests]
        ours.ask(requests[:1])  # warm
        ours_s, got = seconds(lambda: ours.ask(requests), repeats=3 if len(requests) == 1 else 1)  # noqa: B023
        every = min(every, len(packed))
        asked = range(every - 1, len(packed), every)
        asked_s, want = seconds(lambda: [one_prompt_an_action(llm, packed[t]) for t in asked], repeats=1)  # noqa: B023
        equal = all(np.abs(got[t] - a).max() < 1e-4 for t, a in zip(asked, want, strict=True))
        sent = [sum(len(row.prompt_ids) + len(c) for c in row.completions) for row in packed]
        rows.append(Row(name, ours_s, asked_s * sum(sent) / sum(sent[t] for t in asked), goal, equal))
        floors[name] = tokens(packed) | {"floor_s": operations(llm, packed) / rate, "ours_s": ours_s}
        floors[name] |= {"steps": len(packed), "plain steps run": len(asked)}
    builder = PriorBuilder(llm, defaults)
    kinds = ("new", "plain", "plain / new", "prompt mean", "actions mean")
    counts = {name: {kind: figures[kind] for kind in kinds} for name, figures in floors.items()}
    counts[f"{args.steps}-step episode, its own actions"] = tokens(
        [builder.row(request) for request in episode(llm, steps=args.steps, style=defaults)]
    )
    print_table("tokens", counts)
    print_table(
        "floor",
        {
            name: {k: figures[k] for k in ("floor_s", "ours_s", "steps", "plain steps run")}
            for name, figures in floors.items()
        },
    )
    growth = {}
    for actions in (1, 4, 16, 64):
        ours = Ours(llm, defaults, prompt_cache_tokens=tokens_kept)
        request = question(llm, tokens=600, actions=actions)
        growth[f"K={actions}, 600 tokens"] = {"seconds": seconds(lambda: ours.ask([request]), repeats=2)[0]}  # noqa: B023
    for history_length in (0, 2, 5, 10):
        style = prompt_style(resolve_settings({"llm": {"history_length": history_length}}))
        requests = episode(llm, steps=min(10, args.steps), style=style)
        for kept in (tokens_kept, 0):
            ours = Ours(llm, style, prompt_cache_tokens=kept)
            spent, _ = seconds(lambda: ours.ask(requests), repeats=1)  # noqa: B023
            what = f"history_length={history_length}, {'prompts kept' if kept else 'each prompt anew'}"
            growth[what] = {"seconds": spent / len(requests)}
    print_table("growth, a decision", growth)
    return report("prior", rows, floors=floors, growth=growth, matmul_gflops=rate / 1e9)


if __name__ == "__main__":
    sys.exit(main())
