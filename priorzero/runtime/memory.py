"""Frees the GPU's memory after an error."""

from __future__ import annotations

import traceback

import torch


def release_memory(error: BaseException) -> None:
    """Free the GPU memory that an error holds, if it comes from too little memory, so that a run can be saved.

    The frames of a traceback keep their variables, such as the activations of a forward pass. They are cleared.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    if any(isinstance(each, torch.OutOfMemoryError) for each in chain):
        for each in chain:
            traceback.clear_frames(each.__traceback__)
        torch.cuda.empty_cache()
