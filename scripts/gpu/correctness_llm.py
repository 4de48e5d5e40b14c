"""Checks of the language model: priors, packing, updates, and memory that does not suffice."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_prompts import COMMANDS, largest_difference, logprobs_one_prompt_per_action, numbered_prompt
from gpu_context import Context, Figures, Outcome, relative_difference

from priorzero.config import resolve_settings
from priorzero.llm.engines import PriorBuilder, TransformersEngine
from priorzero.llm.fine_tuning import LLMLearner, LLMSample
from priorzero.llm.models import LanguageModel
from priorzero.llm.packing import PromptRow, padded_logprobs, split_completions
from priorzero.llm.prompts import prompt_style
from priorzero.types import ActionPrior, GameState, PriorRequest, StepRecord, UserError

FLOAT32 = 1e-4  # largest difference of a log-probability, and of a gradient relative to its norm
# bfloat16 rounds to 8 binary digits, a relative error of up to 2^-9. A layer rounds the hidden state about four times.
# The errors of 30 layers add up like a random walk, to 2^-9 * sqrt(120) = 2% of the hidden state, and so of the
# logits, whose deviation is 1 with random weights and about 4 with SmolLM2. A log-probability thus differs by 0.06 on
# average (SmolLM2 on a CPU: 0.045), and the largest difference of some hundred tokens is several times as large (0.3,
# with one sequence for each action). A prior's log-probabilities are means over tokens; vLLM is allowed 0.3, too.
BFLOAT16_MEAN, BFLOAT16_MAX, BFLOAT16_PRIOR = 0.1, 0.5, 0.3
# The same errors in both directions give 5% of a gradient (measured on a CPU, with both models).
BFLOAT16_GRADIENT = 0.15
# The first step of AdamW moves each parameter by the learning rate in the direction of the gradient's sign. Few entries
# are so close to zero that rounding changes their sign.
FIRST_STEP = 0.05


# ---- inputs ----


@functools.cache
def shared_llm(context: Context, device: str, dtype: str) -> LanguageModel:
    """A model that no check may change."""
    return context.language_model(device, dtype=dtype)


def make_requests(context: Context, llm: LanguageModel) -> list[PriorRequest]:
    """Requests with prompts of different lengths, of which some continue others, and different numbers of actions."""
    lengths = (20, 35, 50) if context.quick else (100, 250, 400)
    return [
        PriorRequest(numbered_prompt(llm, max_tokens=length, number=number), COMMANDS[:count])
        for number in range(2)
        for length, count in zip(lengths, (3, 16, 7), strict=True)
    ]


def make_records(context: Context, llm: LanguageModel, *, tokens: int) -> list[StepRecord]:
    """Eight decisions with prompts of about ``tokens`` tokens, and random visit counts and values."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(8):
        actions = COMMANDS[: 4 + number]
        uniform = np.full(len(actions), -np.log(len(actions)), dtype=np.float32)
        records.append(
            StepRecord(
                state=GameState("", actions, 0.0, 10.0, number),
                features=np.zeros(1, dtype=np.float32),
                action_indices=np.arange(len(actions)),
                prompt=numbered_prompt(llm, max_tokens=tokens, number=number),
                prior=ActionPrior(uniform, "score", 0, rollout_logprobs=4 * uniform),
                visit_counts=rng.multinomial(25, rng.dirichlet(np.ones(len(actions)))),
                root_value=0.0,
                predicted_value=float(rng.normal()),
                chosen=int(rng.integers(len(actions))),
                reward=0.0,
                done=False,
                episode=0,
                step=number,
            )
        )
    return records


def perturb(model: torch.nn.Module) -> None:
    """Add the same noise on every device to the trained parameters, so that the KL penalty is not zero."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += (0.01 * torch.randn(p.shape, generator=generator)).to(p.device)


class Update:
    """A learner whose updates leave the parameters as they are, unless ``learning_rate`` is given.

    Attributes:
        learner: with all three losses.
        samples: eight decisions.
        gradient: of the last update, after the clipping, on the CPU.
    """

    def __init__(
        self,
        context: Context,
        device: torch.device | str,
        *,
        dtype: str = "float32",
        tokens: int | None = None,
        learning_rate: float = 0.0,
        **changes: Any,
    ) -> None:
        llm_settings = {"kl_weight": 0.1, "grad_clip": 1e9, "micro_batch_size": 8, **changes}
        torch.manual_seed(0)  # the same new adapters on every device
        self.llm = context.language_model(device, dtype=dtype, **llm_settings)
        perturb(self.llm.model)
        settings = context.settings({"llm": llm_settings})
        self.learner = LLMLearner(self.llm, settings.llm, style=prompt_style(settings))
        self.learner.optimizer.param_groups[0]["lr"] = learning_rate
        records = make_records(context, self.llm, tokens=tokens or (20 if context.quick else 100))
        returns = np.random.default_rng(1).normal(size=len(records))
        self.samples: list[LLMSample]
        self.samples, skipped = self.learner.samples(records, returns)
        assert not skipped
        self.gradient: list[torch.Tensor] = []
        self.learner.optimizer.register_step_pre_hook(self._keep_gradient)

    def _keep_gradient(self, *_: Any) -> None:
        self.gradient = [p.grad.cpu() for p in self.llm.trainable_parameters() if p.grad is not None]

    def run(self, *, micro_batch_size: int | None = None) -> tuple[dict[str, float], list[torch.Tensor]]:
        """One update: its losses and its gradient."""
        self.learner.micro_batch_size = micro_batch_size or self.learner.cfg.micro_batch_size
        return self.learner.learn(self.samples), self.gradient

    def parameters(self) -> list[torch.Tensor]:
        """Copies of the trained parameters on the CPU."""
        return [p.detach().cpu().clone() for p in self.llm.trainable_parameters()]


def loss_difference(one: dict[str, float], other: dict[str, float]) -> float:
    """The largest difference of the losses, in shares of the SFT loss: the RFT loss has terms of both signs."""
    return max(abs(one[name] - other[name]) for name in ("sft_loss", "rft_loss", "kl_loss")) / other["sft_loss"]


# ---- priors ----


def check_scoring(context: Context) -> Outcome:
    """The engine's priors, with several rows in a forward pass and with a prompt cache, against the CPU."""
    cpu = shared_llm(context, "cpu", "float32")
    requests = make_requests(context, cpu)
    reference = compute_priors(cpu, requests, rows_per_forward=1)
    figures: Figures = {}
    ways: dict[str, tuple[int | None, int]] = {
        "all_rows": (None, 0),
        "3_rows": (3, 0),
        "1_row": (1, 0),
        "prompt_cache": (1, 8192),
    }
    for name, (rows_per_forward, cache) in ways.items():
        llm = shared_llm(context, str(context.device), "float32")
        priors = compute_priors(llm, requests, rows_per_forward=rows_per_forward, prompt_cache_tokens=cache)
        figures[name] = prior_difference(priors, reference)
    ok = all(value < FLOAT32 for value in figures.values() if isinstance(value, float))
    llm = shared_llm(context, str(context.device), "bfloat16")
    for name, cache in {"bfloat16": 0, "bfloat16_prompt_cache": 8192}.items():
        priors = compute_priors(llm, requests, rows_per_forward=1 if cache else None, prompt_cache_tokens=cache)
        figures[name] = difference = prior_difference(priors, reference)
        ok = ok and difference < BFLOAT16_PRIOR
    return Outcome(ok, figures, "largest difference of a prior's log-probabilities")


def compute_priors(
    llm: LanguageModel, requests: Sequence[PriorRequest], *, rows_per_forward: int | None, prompt_cache_tokens: int = 0
) -> list[ActionPrior]:
    """The engine's priors with empty caches at the beginning; one request after the other with a prompt cache."""
    builder = PriorBuilder(llm, prompt_style(resolve_settings()))
    engine = TransformersEngine(builder, rows_per_forward=rows_per_forward, prompt_cache_tokens=prompt_cache_tokens)
    if not prompt_cache_tokens:
        return asyncio.run(engine.priors(requests))
    return [asyncio.run(engine.priors([request]))[0] for request in requests]


def prior_difference(priors: Sequence[ActionPrior], reference: Sequence[ActionPrior]) -> float:
    """The largest difference of a log-probability of an action, among the actions and by token of its text."""
    differences = []
    for a, b in zip(priors, reference, strict=True):
        assert a.rollout_logprobs is not None and b.rollout_logprobs is not None
        tokens = np.maximum(1.0, np.abs(b.rollout_logprobs) / 10)  # a token has about -10
        differences += [np.abs(a.logprobs - b.logprobs), np.abs(a.rollout_logprobs - b.rollout_logprobs) / tokens]
    return float(np.max(np.concatenate(differences)))


def check_packing(context: Context) -> Outcome:
    """The packed tree of several requests against one sequence for each action, both on this device."""
    reference = packing_logprobs(context, "float32", packed=False)
    figures: Figures = {
        "float32": largest_difference(packing_logprobs(context, "float32", packed=True), reference),
        "float32_padded": largest_difference(padded_rows(context), reference),
    }
    for name, packed in {"bfloat16_tree": True, "bfloat16_one_each": False}.items():
        logprobs = packing_logprobs(context, "bfloat16", packed=packed)
        figures[name] = largest_difference(logprobs, reference)
        figures[f"{name}_mean"] = mean_difference(logprobs, reference)
    ok = (
        figures["float32"] < FLOAT32
        and figures["float32_padded"] < FLOAT32
        and figures["bfloat16_tree"] < BFLOAT16_MAX
        and figures["bfloat16_tree_mean"] < BFLOAT16_MEAN
        # The tree must not be less exact than a sequence for each action.
        and figures["bfloat16_tree_mean"] < 1.5 * figures["bfloat16_one_each_mean"] + 1e-3
    )
    return Outcome(ok, figures, "differences of token log-probabilities from float32 with one sequence for each action")


@torch.inference_mode()
def packing_logprobs(context: Context, dtype: str, *, packed: bool) -> list[np.ndarray]:
    """The log-probabilities of the tokens of all actions."""
    llm = shared_llm(context, str(context.device), dtype)
    builder = PriorBuilder(llm, prompt_style(resolve_settings()))
    rows: list[PromptRow] = [builder.row(request) for request in make_requests(context, llm)[:3]]
    if packed:
        return split_completions(*llm.token_logprobs(rows))
    with llm.autocast():
        return [logprobs for row in rows for logprobs in logprobs_one_prompt_per_action(llm, row)]


@torch.inference_mode()
def padded_rows(context: Context) -> list[np.ndarray]:
    """The same with one padded sequence for each request, as in :mod:`priorzero.pretrain`."""
    llm = shared_llm(context, str(context.device), "float32")
    builder = PriorBuilder(llm, prompt_style(resolve_settings()))
    rows = [builder.row(request) for request in make_requests(context, llm)[:3]]
    return split_completions(*padded_logprobs(llm.model, rows, device=llm.device))


def mean_difference(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """The mean difference between the log-probabilities of two results."""
    return float(np.mean(np.abs(np.concatenate(one) - np.concatenate(other))))


def check_rank(context: Context) -> Outcome:
    """The lists that the LLM writes: several prompts of different lengths in one call, and on the CPU."""
    style = prompt_style(resolve_settings({"prior": {"mode": "rank"}}))
    texts = {}
    for device in ("cpu", str(context.device)):
        llm = shared_llm(context, device, "float32")
        engine = TransformersEngine(PriorBuilder(llm, style, generate_max_len=12), rows_per_forward=4)
        priors = asyncio.run(engine.priors(make_requests(context, llm)))
        assert all(np.isfinite(prior.logprobs).all() for prior in priors)
        texts[device] = [prior.completion for prior in priors]
    pairs = list(zip(texts["cpu"], texts[str(context.device)], strict=True))
    equal = sum(a == b for a, b in pairs)
    # Two tokens that are almost equally likely may be exchanged, after which the texts differ.
    return Outcome(equal >= 0.8 * len(pairs), {"equal": equal, "texts": len(pairs)})


# ---- updates ----


def check_gradient(context: Context, **changes: Any) -> Outcome:
    """The losses and the gradient of an update, against the CPU and against other sizes of the micro-batch."""
    cpu_losses, cpu_gradient = Update(context, "cpu", **changes).run()
    update = Update(context, context.device, **changes)
    losses, gradient = update.run()
    figures: Figures = {
        "losses": loss_difference(losses, cpu_losses),
        "gradient": relative_difference(gradient, cpu_gradient),
    }
    for size in (3, 1):
        other_losses, other = update.run(micro_batch_size=size)
        figures[f"losses_micro_{size}"] = loss_difference(other_losses, losses)
        figures[f"gradient_micro_{size}"] = relative_difference(other, gradient)
    figures["kl_loss"] = losses["kl_loss"]
    ok = all(value < FLOAT32 for name, value in figures.items() if name != "kl_loss") and losses["kl_loss"] > 0
    return Outcome(ok, figures, "relative differences")


def check_gradient_of_actions(context: Context) -> Outcome:
    """SFT, RFT with PPO's clipping, and KL on the prior over the valid actions."""
    return check_gradient(context, objective="actions", rft_clip=0.2)


def check_gradient_of_tokens(context: Context) -> Outcome:
    """SFT, REINFORCE and KL on the tokens of the actions."""
    return check_gradient(context, objective="tokens")


def check_update(context: Context, **changes: Any) -> Outcome:
    """The parameters after one step, against the CPU."""
    moved = {}
    learning_rate = 1e-4
    for device in ("cpu", str(context.device)):
        update = Update(context, device, learning_rate=learning_rate, **changes)
        before = update.parameters()
        update.run()
        moved[device] = [after - p for after, p in zip(update.parameters(), before, strict=True)], update.gradient
    (cpu_steps, cpu_gradient), (steps, gradient) = moved["cpu"], moved[str(context.device)]
    figures: Figures = {
        "gradient": relative_difference(gradient, cpu_gradient),
        "step": relative_difference(steps, cpu_steps),
        "tensors": len(steps),
    }
    ok = figures["gradient"] < FLOAT32 and figures["step"] < FIRST_STEP and all(step.any() for step in steps)
    return Outcome(ok, figures, "relative differences")


def check_lora_update(context: Context) -> Outcome:
    """An update of adapters; then the adapters are saved on this device, loaded on the CPU, and merged on both."""
    outcome = check_update(context, use_lora=True)
    update = Update(context, context.device, use_lora=True, learning_rate=1e-3)
    update.run()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        update.llm.save(Path(folder))
        expected = update.llm.token_logprobs([sample.row for sample in update.samples])[0].cpu()
        for device in ("cpu", context.device):
            for use_lora in (True, False):
                llm = context.language_model(device, path=folder, use_lora=use_lora)
                logprobs = llm.token_logprobs([sample.row for sample in update.samples])[0].cpu()
                name = f"{'loaded' if use_lora else 'merged'}_on_{torch.device(device).type}"
                outcome.figures[name] = float((logprobs - expected).abs().max())
    files_ok = all(v < FLOAT32 for name, v in outcome.figures.items() if name.startswith(("loaded", "merged")))
    return Outcome(bool(outcome.ok) and files_ok, outcome.figures, outcome.note)


def check_bfloat16_update(context: Context) -> Outcome:
    """An update whose forward pass is in bfloat16: its gradient against float32, and the parameters after the step."""
    _, exact = Update(context, context.device, objective="actions").run()
    update = Update(context, context.device, dtype="bfloat16", objective="actions", learning_rate=1e-5)
    before = update.parameters()
    losses, gradient = update.run()
    after = update.parameters()
    finite = all(p.isfinite().all() for p in after) and all(np.isfinite(list(losses.values())))
    moved = sum(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    figures: Figures = {
        "gradient": relative_difference(gradient, exact),
        "finite": bool(finite),
        "moved": moved,
        "tensors": len(after),
    }
    ok = bool(finite) and moved == len(after) and figures["gradient"] < BFLOAT16_GRADIENT
    return Outcome(ok, figures)


def check_priors_after_update(context: Context) -> Outcome:
    """The engine's priors follow the parameters: computed twice, after an update, and after the old ones were loaded.

    On a GPU the engine replays CUDA graphs, which contain the addresses of the parameters.
    """
    figures: Figures = {}
    for name, use_lora in {"all": False, "lora": True}.items():
        update = Update(context, context.device, use_lora=use_lora, learning_rate=1e-2)
        engine = TransformersEngine(PriorBuilder(update.llm, prompt_style(resolve_settings())))
        requests = make_requests(context, update.llm)
        before, again = (_priors_without_cache(engine, requests) for _ in range(2))
        with tempfile.TemporaryDirectory() as folder:
            update.llm.save(Path(folder))
            update.run()
            after = _priors_without_cache(engine, requests)
            expected = compute_directly(engine.builder, requests)
            update.llm.load(Path(folder))
            loaded = _priors_without_cache(engine, requests)
        figures |= {
            f"{name}_again": prior_difference(again, before),
            f"{name}_change": prior_difference(after, before),
            f"{name}_after": prior_difference(after, expected),
            f"{name}_loaded": prior_difference(loaded, before),
        }
    ok = all((value > 100 * FLOAT32) if "change" in name else value < FLOAT32 for name, value in figures.items())
    return Outcome(ok, figures, "differences of a prior's log-probabilities")


def _priors_without_cache(engine: TransformersEngine, requests: Sequence[PriorRequest]) -> list[ActionPrior]:
    asyncio.run(engine.clear_cache())
    return asyncio.run(engine.priors(requests))


@torch.no_grad()
def compute_directly(builder: PriorBuilder, requests: Sequence[PriorRequest]) -> list[ActionPrior]:
    """The priors by one forward pass for each request, without an engine."""
    rows = [builder.row(request) for request in requests]
    return [builder.from_logprobs(split_completions(*builder.llm.token_logprobs([row])), version=0) for row in rows]


# ---- memory ----


@contextlib.contextmanager
def memory_limit(device: torch.device, limit: float) -> Iterator[None]:
    """Let this process use at most ``limit`` bytes of the GPU's memory."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def peak_memory(device: torch.device, update: Callable[[], Any]) -> tuple[int, Any]:
    """The largest memory in bytes that an update reserves, and its result."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    result = update()
    return torch.cuda.max_memory_reserved(device), result


def check_out_of_memory(context: Context) -> Outcome:
    """If the memory does not suffice for a micro-batch, it is halved, and the gradient stays the same.

    The memory of this process is limited to what is between the needs of eight and of four decisions. With less than
    the need of four, the update ends with an error that says what to type.
    """
    device = context.device
    if device.type != "cuda":
        return Outcome(None, note="skipped: only a GPU raises torch.OutOfMemoryError")
    update = Update(context, device, tokens=400)
    update.run()  # creates AdamW's moments
    of_four, (_, gradient) = peak_memory(device, lambda: update.run(micro_batch_size=4))
    of_eight, _ = peak_memory(device, update.run)
    in_use = torch.cuda.memory_allocated(device)
    with memory_limit(device, (of_four + of_eight) / 2):
        _, halved = update.run()
    size = update.learner.micro_batch_size
    update.learner.micro_batch_size = 8
    update.learner.cfg.micro_batch_size = 16  # as if it had been halved already
    message = ""
    with memory_limit(device, in_use + (of_four - in_use) / 4):
        try:
            update.learner.learn(update.samples)
        except UserError as error:
            message = str(error)
    update.learner.cfg.micro_batch_size = 8
    _, again = update.run()
    gc.collect()
    figures: Figures = {
        "micro_batch": size,
        "gradient": relative_difference(halved, gradient),
        "gradient_afterwards": relative_difference(again, gradient),
        "gib_of_8": of_eight / 2**30,
        "gib_of_4": of_four / 2**30,
        "user_error": "llm.micro_batch_size=1" in message,
        "leaked_mb": (torch.cuda.memory_allocated(device) - in_use) / 1e6,
    }
    ok = size == 4 and bool(figures["user_error"]) and figures["leaked_mb"] < 1
    return Outcome(ok and figures["gradient"] < FLOAT32 and figures["gradient_afterwards"] < FLOAT32, figures)


CHECKS: dict[str, Callable[[Context], Outcome]] = {
    "scoring": check_scoring,
    "packing": check_packing,
    "rank": check_rank,
    "gradient_of_actions": check_gradient_of_actions,
    "gradient_of_tokens": check_gradient_of_tokens,
    "llm_update": check_update,
    "lora_update": check_lora_update,
    "bfloat16_update": check_bfloat16_update,
    "priors_after_update": check_priors_after_update,
    "out_of_memory": check_out_of_memory,
}
