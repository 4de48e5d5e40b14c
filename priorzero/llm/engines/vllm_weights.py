"""Export of the training copy's parameters to vLLM, and the parity check after vLLM has loaded them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from loguru import logger

from priorzero.llm.chat_template import render_messages
from priorzero.llm.models import LanguageModel, save_parameters
from priorzero.llm.packing import PromptRow, split_completions
from priorzero.types import EngineError

# Largest allowed mean absolute difference between token log-probabilities of vLLM and of the training copy, in nats.
# Rounding causes a tenth to a half of it. Wrong parameters cause more (docs/engines.md).
PARITY_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.3}

PARITY_MESSAGES = [
    {"role": "system", "content": "You are an expert player of text adventure games."},
    {"role": "user", "content": "You are in a kitchen. A brown sack lies on the table. What is the next command?"},
]
PARITY_COMPLETIONS = ["open sack", "take the sack and go west", "look"]


def parity_row(llm: LanguageModel) -> PromptRow:
    """The fixed prompt and completions of the parity check."""
    context = render_messages(llm.tokenizer, PARITY_MESSAGES)
    return llm.row(context, PARITY_COMPLETIONS, end_of_turn=True)


@dataclass(frozen=True)
class ExportedWeights:
    """Parameters that vLLM is to serve.

    Attributes:
        version: number of LLM updates.
        folder: checkpoint or adapter; None for the files from which the training copy was loaded.
        reference: the training copy's log-probabilities of the parity completions' tokens, one array for each.
    """

    version: int
    folder: Path | None
    reference: list[np.ndarray]


@torch.inference_mode()
def export_weights(llm: LanguageModel, version: int, *, scratch: Path) -> ExportedWeights:
    """Save the parameters to a folder in ``scratch``, in the type that vLLM computes in; only the adapters if any.

    Raises OSError if the files cannot be written.
    """
    reference = split_completions(*llm.token_logprobs([parity_row(llm)]))
    uses_lora = hasattr(llm.model, "peft_config")
    if not version and not uses_lora and not llm.has_merged_adapter:
        return ExportedWeights(version, None, reference)
    folder = scratch / f"version-{version}"
    state = {}
    if not uses_lora and llm.compute_dtype != torch.float32:
        casts: dict[int, torch.Tensor] = {}  # by address, so that tied parameters stay tied
        state["state_dict"] = {
            name: casts.setdefault(p.data_ptr(), p.to(llm.compute_dtype)) for name, p in llm.model.state_dict().items()
        }
    save_parameters(llm.model, folder, **state)
    return ExportedWeights(version, folder, reference)


class ParityCheck:
    """Compares vLLM's log-probabilities of the parity completions with those of the training copy.

    ``tolerance`` is the largest allowed mean absolute difference, in nats a token.
    """

    def __init__(self, *, tolerance: float) -> None:
        self._tolerance = tolerance
        self._rounding_error = 0.0  # largest difference of a check that passed
        self._last_served: Sequence[np.ndarray] = []
        self._metrics: dict[str, float] = {}

    def check(
        self,
        served: Sequence[np.ndarray],
        weights: ExportedWeights,
        *,
        previous: ExportedWeights | None,
        seconds: float,
    ) -> None:
        """Check that vLLM computes with ``weights``, which it has loaded in ``seconds``; raise EngineError otherwise.

        ``served`` are its token log-probabilities of the parity completions. ``previous`` are the parameters that it
        served before; None after a start.
        """
        parity = _mean_difference(served, weights.reference)
        self._metrics = {"prior/parity": parity, "prior/sync_s": seconds}
        message = (
            f"vLLM serves LLM version {weights.version} after {seconds:.1f} s; parity {parity:.2g} nats per token "
            f"(at most {self._tolerance:g} allowed)"
        )
        if previous is not None:
            change = _mean_difference(previous.reference, weights.reference)
            self._metrics["prior/parity_moved"] = change
            message += f", change {change:.2g} since version {previous.version}"
        logger.info(message)
        if previous is not None:
            self._check_not_stale(served, weights, previous=previous)
        if not parity <= self._tolerance:  # True also for NaN
            raise EngineError(
                f"vLLM and the trained LLM differ by {parity:.3g} nats per token, more than "
                f"{self._tolerance:g} (vllm.parity_tolerance); vLLM does not use version {weights.version}"
            )
        self._last_served = served
        self._rounding_error = max(self._rounding_error, parity)

    def _check_not_stale(
        self, served: Sequence[np.ndarray], weights: ExportedWeights, *, previous: ExportedWeights
    ) -> None:
        """Raise EngineError if vLLM is closer to the previous parameters, or if its results have not changed at all.

        An update can change the log-probabilities by less than the tolerance, above all in bfloat16.
        """
        change = _mean_difference(previous.reference, weights.reference)
        to_new = _mean_difference(served, weights.reference)
        to_previous = _mean_difference(served, previous.reference)
        closer_to_previous = change > 4 * self._rounding_error and to_previous < to_new
        unchanged = change > 0.5 * self._rounding_error and _mean_difference(served, self._last_served) == 0
        if closer_to_previous or unchanged:
            raise EngineError(
                f"vLLM was given version {weights.version} of the LLM but still computes with version "
                f"{previous.version}: it differs by {to_new:.2g} nats per token from the new version and by "
                f"{to_previous:.2g} from the old one"
            )

    def take_metrics(self) -> dict[str, float]:
        """Metrics of the checks since the last call."""
        metrics, self._metrics = self._metrics, {}
        return metrics


def _mean_difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    return float(np.abs(np.concatenate(a) - np.concatenate(b)).mean())
