"""Scores of actions on a GPU with CUDA graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from loguru import logger
from torch import Tensor

from priorzero.llm.models import LanguageModel
from priorzero.llm.packing import (
    MAX_SINGLE_BLOCK,
    AttentionBlock,
    PackedBatch,
    PromptRow,
    completion_logprobs,
    pack,
    predicted_logprobs,
    scatter_logprobs,
)
from priorzero.runtime.cuda_graphs import CudaGraphs, RecordingError

MIN_SIZE = 64  # sizes below are padded to it


class GraphScorer:
    """Computes :meth:`LanguageModel.token_logprobs` without gradients, with a CUDA graph for each size that occurs.

    A forward pass of a small LLM consists of more than a thousand kernels, and starting these one by one takes several
    times as long as running them. Batches are padded, so that few sizes occur. Larger batches than
    :data:`~priorzero.llm.packing.MAX_SINGLE_BLOCK` tokens keep a GPU busy and are computed without a graph.
    """

    def __init__(self, llm: LanguageModel) -> None:
        self._llm = llm
        self._graphs: CudaGraphs | None = CudaGraphs(self._forward)

    def token_logprobs(self, rows: Sequence[PromptRow]) -> tuple[Tensor, Tensor]:
        """As :meth:`LanguageModel.token_logprobs`."""
        batch = pack(rows, dtype=self._llm.compute_dtype, device=self._llm.device)
        if self._graphs is not None and batch.input_ids.shape[1] <= MAX_SINGLE_BLOCK:
            padded = pad_batch(batch)
            try:
                [logprobs] = self._graphs(
                    *(padded.input_ids, padded.position_ids, padded.blocks[0].mask),
                    *(padded.predictors, padded.index, padded.target),
                )
            except RecordingError as error:
                self._graphs = None
                logger.warning(f"the LLM's forward pass cannot be recorded as a CUDA graph, so it is slower ({error})")
            else:
                logprobs = logprobs[: len(batch.target)]
                return scatter_logprobs(logprobs, batch.slots, batch.completion_mask), batch.completion_mask
        with self._llm.autocast():
            return completion_logprobs(self._llm.model, batch), batch.completion_mask

    def _forward(self, *tensors: Tensor) -> tuple[Tensor]:
        input_ids, position_ids, mask, predictors, index, target = tensors
        batch = PackedBatch(
            input_ids=input_ids,
            position_ids=position_ids,
            blocks=[AttentionBlock(slice(0, input_ids.shape[1]), None, mask)],
            predictors=predictors,
            index=index,
            target=target,
            slots=target,  # not used, like the next
            completion_mask=target,
        )
        with self._llm.autocast():
            return (predicted_logprobs(self._llm.model, batch),)


def padded_size(size: int) -> int:
    """The next power of two, or the one between it and the last, three quarters of it; at least :data:`MIN_SIZE`."""
    power = max(MIN_SIZE, 1 << (size - 1).bit_length())
    return power * 3 // 4 if power > MIN_SIZE and size <= power * 3 // 4 else power


def pad_batch(batch: PackedBatch) -> PackedBatch:
    """A batch of one block with padded numbers of nodes, predictors and completion tokens.

    No other node sees a node of the padding, and such a node sees only the first one. ``slots`` and
    ``completion_mask`` are not changed.
    """
    [block] = batch.blocks
    length, size = batch.input_ids.shape[1], padded_size(batch.input_ids.shape[1])
    mask = torch.full(
        (1, 1, size, size), torch.finfo(block.mask.dtype).min, dtype=block.mask.dtype, device=block.mask.device
    )
    mask[..., :length, :length] = block.mask
    mask[..., length:, 0] = 0
    return dataclasses.replace(
        batch,
        input_ids=_pad(batch.input_ids),
        position_ids=_pad(batch.position_ids),
        blocks=[AttentionBlock(slice(0, size), None, mask)],
        predictors=_pad(batch.predictors),
        index=_pad(batch.index),
        target=_pad(batch.target),
    )


def _pad(tensor: Tensor) -> Tensor:
    """Zeros at the end of the last axis up to :func:`padded_size`."""
    return torch.nn.functional.pad(tensor, (0, padded_size(tensor.shape[-1]) - tensor.shape[-1]))
