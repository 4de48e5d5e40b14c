"""Ways to get a prior: in this process and in vLLM, each against the straightforward way. Takes some five minutes.

    python scripts/bench_engines.py

SmolLM2-135M in float32 on the CPU, a prompt of 600 tokens, 16 commands; equal means log-probabilities within 1e-3. In
this process torch uses all cores; vLLM uses the half that it gets in training.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import numpy as np
import torch
from bench_tools import Row, report, seconds

from priorzero.config import PRESETS, resolve_settings
from priorzero.llm.engines.make import make_engine
from priorzero.llm.models import LanguageModel, load_language_model
from priorzero.llm.packing import PromptRow
from priorzero.llm.prompts import prompt_style
from priorzero.types import PriorRequest

COMMANDS = (
    "open mailbox", "read leaflet", "go north", "go south", "go west", "go around house", "climb tree", "take egg",
    "open window", "enter house", "take brown sack", "open the trap door", "turn on lantern", "move rug",
    "put sword in trophy case", "attack troll with sword",
)  # fmt: skip
ROOM = (
    "You are standing in an open field west of a white house, with a boarded front door. There is a small mailbox "
    "here. A path leads around the house, and the forest begins not far from it. "
)


def prompt(llm: LanguageModel, *, tokens: int, number: int) -> str:
    """A chat prompt of about ``tokens`` tokens; each number makes another one from its first words on."""
    text = f"Move {number}. " + ROOM * 40
    ids = llm.tokenizer(text, add_special_tokens=False)["input_ids"][: tokens - 40]
    messages = [{"role": "user", "content": llm.tokenizer.decode(ids) + "\nWhat is the next command?"}]
    return llm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def close(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.abs(a - b).max() < 1e-3 for a, b in zip(one, other, strict=True))


@torch.inference_mode()
def one_row_an_action(llm: LanguageModel, row: PromptRow) -> list[np.ndarray]:
    """The straightforward way: the whole prompt again for every action."""
    result = []
    for completion in row.completions:
        ids = torch.tensor([[*row.prompt_ids, *completion]])
        logits = llm.model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1].float()
        result.append(torch.log_softmax(logits, -1)[range(len(completion)), completion].numpy())
    return result


@torch.inference_mode()
def packed(llm: LanguageModel, row: PromptRow) -> list[np.ndarray]:
    logprobs, mask = llm.token_logprobs([row])
    return [logprobs[r, : int(n)].numpy() for r, n in enumerate(mask.sum(1))]


async def one_request_a_token(engine, row: PromptRow) -> list[np.ndarray]:
    """Each beginning of each command is a request that writes one token and says how likely the next one was."""
    beginnings = sorted({tuple(c[:n]) for c in row.completions for n in range(len(c))})
    following = {b: sorted({c[len(b)] for c in row.completions if tuple(c[: len(b)]) == b}) for b in beginnings}

    async def ask(beginning):
        output = await engine._generate(
            [*row.prompt_ids, *beginning], max_tokens=1, temperature=0.0, detokenize=False,
            logprob_token_ids=following[beginning],
        )  # fmt: skip
        return {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}

    found = dict(zip(beginnings, await asyncio.gather(*(ask(b) for b in beginnings)), strict=True))
    return [np.array([found[tuple(c[:n])][c[n]] for n in range(len(c))]) for c in row.completions]


def main() -> int:
    settings = resolve_settings(PRESETS["quick_test"], {"prior": {"engine": "vllm"}, "llm": {"generate_max_len": 32}})
    llm = load_language_model(settings.llm, device=torch.device("cpu"))
    cores = len(os.sched_getaffinity(0))
    requests = [PriorRequest(prompt(llm, tokens=600, number=n), COMMANDS) for n in range(4)]
    rows = []
    with asyncio.Runner() as runner, tempfile.TemporaryDirectory() as log:
        engine = make_engine(settings, llm=llm, vllm_log=Path(log) / "vllm.log")
        settings.prior.engine = "transformers"
        local = make_engine(settings, llm=llm, vllm_log=Path(log) / "vllm.log")
        start_s, _ = seconds(lambda: runner.run(engine.ready()), repeats=1)
        torch.set_num_threads(cores)
        row = engine.builder.row(requests[0])

        def cold(work):
            """``work()`` with an empty prefix cache."""

            def run():
                runner.run(engine._engine.reset_prefix_cache())
                return runner.run(work())

            return seconds(run)

        async def uncached():
            return await asyncio.gather(
                *(engine._completion_logprobs(row.prompt_ids, c, read_cache=False) for c in row.completions)
            )

        plain_s, plain = seconds(lambda: one_row_an_action(llm, row), repeats=1)
        packed_s, packed_result = seconds(lambda: packed(llm, row))
        uncached_s, uncached_result = seconds(lambda: runner.run(uncached()), repeats=1)
        tokens_s, tokens_result = cold(lambda: one_request_a_token(engine, row))
        ours_s, ours = cold(lambda: engine._row_logprobs(row))
        name = "score, 600 tokens, 16 commands"
        rows += [
            Row(f"{name}: in process, packed | one row a command", packed_s, plain_s, 12, close(plain, packed_result)),
            Row(
                f"{name}: vLLM, cache read | vLLM's own default", ours_s, uncached_s, None, close(uncached_result, ours)
            ),
            Row(
                f"{name}: vLLM, request a command | request a token", ours_s, tokens_s, None, close(tokens_result, ours)
            ),
            Row(f"{name}: vLLM | in process, packed", ours_s, packed_s, None, close(packed_result, ours)),
        ]

        def ask(which):
            which.cache.clear()
            local.prompt_cache.clear()
            return runner.run(which.priors(requests))

        def vllm_cold():
            runner.run(engine._engine.reset_prefix_cache())
            return ask(engine)

        for mode in ("score", "rank"):
            for which in (engine, local):
                which.builder = dataclasses.replace(
                    which.builder,
                    style=prompt_style(resolve_settings(PRESETS["quick_test"], {"prior": {"mode": mode}})),
                )
            vllm_s, one = seconds(vllm_cold)
            local_s, other = seconds(lambda: ask(local), repeats=2)
            what = "16 commands each" if mode == "score" else "32 tokens written each"
            equal = all(
                np.abs(a.logprobs - b.logprobs).max() < 1e-3 and a.completion == b.completion
                for a, b in zip(one, other, strict=True)
            )
            rows.append(Row(f"{mode}, 4 states of 600 tokens, {what}: vLLM | in process", vllm_s, local_s, None, equal))
        runner.run(engine.close())
    return report("engines", rows, vllm_start_s=start_s, threads_in_process=cores)


if __name__ == "__main__":
    sys.exit(main())
