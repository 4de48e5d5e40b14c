"""Time to compute priors in this process and with vLLM, each compared with the straightforward way. Takes five minutes.

    python scripts/bench_engines.py

The model is SmolLM2-135M in float32 on the CPU, with prompts of 600 tokens and 16 commands. The results are equal if
the log-probabilities differ by less than 1e-3. In this process torch uses all cores; vLLM uses half of them, as in
training.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_prompts import largest_difference, logprobs_one_prompt_per_action, numbered_prompt
from bench_tools import SMALL_SETTINGS, Row, report, seconds

from priorzero.config import resolve_settings
from priorzero.llm.engines.make import make_engine
from priorzero.llm.models import LanguageModel, load_language_model
from priorzero.llm.packing import PromptRow
from priorzero.llm.prompts import prompt_style
from priorzero.settings import Settings
from priorzero.types import ActionPrior, PriorRequest

COMMANDS = (
    "open mailbox", "read leaflet", "go north", "go south", "go west", "go around house", "climb tree", "take egg",
    "open window", "enter house", "take brown sack", "open the trap door", "turn on lantern", "move rug",
    "put sword in trophy case", "attack troll with sword",
)  # fmt: skip
TOLERANCE = 1e-3  # of log-probabilities


def make_settings(*, engine: str = "vllm", mode: str = "score") -> Settings:
    """Settings of small models with one engine."""
    layer = {"prior": {"engine": engine, "mode": mode}, "llm": {"generate_max_len": 32}}
    return resolve_settings(SMALL_SETTINGS, layer)


@torch.inference_mode()
def packed_logprobs(llm: LanguageModel, row: PromptRow) -> list[np.ndarray]:
    """The token log-probabilities of each command, from one forward pass."""
    logprobs, mask = llm.token_logprobs([row])
    return [logprobs[r, : int(n)].numpy() for r, n in enumerate(mask.sum(1))]


async def uncached_logprobs(engine: Any, row: PromptRow) -> list[np.ndarray]:
    """One request for each command. By default vLLM does not read its prefix cache for prompt log-probabilities."""

    async def logprobs(completion: Sequence[int]) -> np.ndarray:
        output = await engine._generate(
            [*row.prompt_ids, *completion], max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=0,
            flat_logprobs=True,
        )  # fmt: skip
        found, n = output.prompt_logprobs, len(completion)
        return np.array([found[len(found) - n + i][token].logprob for i, token in enumerate(completion)])

    return await asyncio.gather(*map(logprobs, row.completions))


async def logprobs_one_request_per_token(engine: Any, row: PromptRow) -> list[np.ndarray]:
    """For each prefix of a command, a request for the log-probabilities of the next token."""
    prefixes = sorted({tuple(c[:n]) for c in row.completions for n in range(len(c))})
    next_tokens = {p: sorted({c[len(p)] for c in row.completions if tuple(c[: len(p)]) == p}) for p in prefixes}

    async def next_token_logprobs(prefix: tuple[int, ...]) -> dict[int, float]:
        output = await engine._generate(
            [*row.prompt_ids, *prefix], max_tokens=1, temperature=0.0, detokenize=False,
            logprob_token_ids=next_tokens[prefix],
        )  # fmt: skip
        return {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}

    results = await asyncio.gather(*map(next_token_logprobs, prefixes))
    found = dict(zip(prefixes, results, strict=True))
    return [np.array([found[tuple(c[:n])][c[n]] for n in range(len(c))]) for c in row.completions]


class Benchmark:
    """Both engines, and the event loop in which they run.

    Args:
        runner: the event loop.
        llm: the language model.
        vllm: the vLLM engine, which is ready.
        local: the engine in this process.
    """

    def __init__(self, runner: asyncio.Runner, *, llm: LanguageModel, vllm: Any, local: Any) -> None:
        self._runner = runner
        self._llm = llm
        self._vllm = vllm
        self._local = local
        prompts = [numbered_prompt(llm, max_tokens=560, number=n) for n in range(4)]
        self._requests = [PriorRequest(prompt, COMMANDS) for prompt in prompts]

    def score_rows(self) -> list[Row]:
        """Ways to score the commands of one state."""
        llm, vllm = self._llm, self._vllm
        row = vllm.builder.row(self._requests[0])
        reference_s, reference = seconds(lambda: logprobs_one_prompt_per_action(llm, row), repeats=1)
        packed_s, packed = seconds(lambda: packed_logprobs(llm, row))
        uncached_s, uncached = seconds(lambda: self._runner.run(uncached_logprobs(vllm, row)), repeats=1)
        tokens_s, tokens = self._time_cold(lambda: logprobs_one_request_per_token(vllm, row))
        vllm_s, ours = self._time_cold(lambda: vllm._row_logprobs(row))
        comparisons = (
            ("in process, packed | one prompt for each command", packed_s, packed, reference_s, reference, 12),
            ("vLLM, cache read | vLLM's default", vllm_s, ours, uncached_s, uncached, None),
            ("vLLM, one request for each command | for each token", vllm_s, ours, tokens_s, tokens, None),
            ("vLLM | in process, packed", vllm_s, ours, packed_s, packed, None),
        )
        return [
            Row(
                f"score, 600 tokens, 16 commands: {name}",
                ours_s=one_s,
                reference_s=other_s,
                goal=goal,
                equal=largest_difference(one, other) < TOLERANCE,
            )
            for name, one_s, one, other_s, other, goal in comparisons
        ]

    def mode_row(self, mode: str) -> Row:
        """The priors of four states from both engines."""
        for engine in (self._vllm, self._local):
            engine.builder = dataclasses.replace(engine.builder, style=prompt_style(make_settings(mode=mode)))
        vllm_s, one = self._time_cold(lambda: self._priors(self._vllm))
        local_s, other = seconds(lambda: self._runner.run(self._priors(self._local)), repeats=2)
        unit = "16 commands each" if mode == "score" else "32 generated tokens each"
        equal = all(
            np.abs(a.logprobs - b.logprobs).max() < TOLERANCE and a.completion == b.completion
            for a, b in zip(one, other, strict=True)
        )
        return Row(f"{mode}, 4 states of 600 tokens, {unit}: vLLM | in process", vllm_s, local_s, None, equal)

    async def _priors(self, engine: Any) -> list[ActionPrior]:
        await engine.clear_cache()
        return await engine.priors(self._requests)

    def _time_cold(self, work: Callable[[], Awaitable[Any]]) -> tuple[float, Any]:
        """Seconds and result of ``work``. vLLM's prefix cache is emptied before each run."""

        async def run() -> Any:
            await self._vllm._engine.reset_prefix_cache()
            return await work()

        return seconds(lambda: self._runner.run(run()))


def main() -> int:
    """Returns the exit code: 0 if all results are equal, 1 otherwise."""
    settings = make_settings()
    llm = load_language_model(settings.llm, device=torch.device("cpu"))
    cores = len(os.sched_getaffinity(0))
    with asyncio.Runner() as runner, tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "vllm.log"
        vllm = make_engine(settings, llm=llm, vllm_log=log)
        local = make_engine(make_settings(engine="transformers"), llm=llm, vllm_log=log)
        start_s, _ = seconds(lambda: runner.run(vllm.ready()), repeats=1)
        try:
            torch.set_num_threads(cores)
            benchmark = Benchmark(runner, llm=llm, vllm=vllm, local=local)
            rows = [*benchmark.score_rows(), *map(benchmark.mode_row, ("score", "rank"))]
        finally:
            runner.run(vllm.close())
    return report("engines", rows, vllm_start_s=start_s, threads_in_process=cores)


if __name__ == "__main__":
    sys.exit(main())
