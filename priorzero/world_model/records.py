"""What a run remembers, as plain data: tensors, numbers, texts, lists and dicts.

Checkpoints hold nothing else, so that ``torch.load(weights_only=True)`` reads them: no code in a file is ever run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from priorzero.types import ActionPrior, GameState, Plain, StepRecord


def pack_arrays(arrays: Sequence[np.ndarray | None]) -> Plain:
    """Vectors of one type, of any lengths, some of them missing, as one tensor and their lengths."""
    given = [array for array in arrays if array is not None]
    values = torch.from_numpy(np.concatenate(given)) if given else torch.zeros(0)
    return {"values": values, "lengths": [-1 if array is None else len(array) for array in arrays]}


def unpack_arrays(packed: Plain) -> list[np.ndarray | None]:
    """The inverse of :func:`pack_arrays`; the vectors are copies."""
    values, arrays, start = packed["values"].numpy(), [], 0
    for length in packed["lengths"]:
        arrays.append(None if length < 0 else values[start : start + length].copy())
        start += max(0, length)
    return arrays


class RecordTable:
    """Step records by number. A record that several segments share is kept once, and shared again when it is read."""

    def __init__(self) -> None:
        self._records: dict[tuple[int, int], tuple[int, StepRecord]] = {}

    def number(self, record: StepRecord) -> int:
        """The record's number in this table; new records are taken in."""
        return self._records.setdefault((record.episode, record.step), (len(self._records), record))[0]

    def state_dict(self) -> Plain:
        """All records, field by field."""
        records = [record for _, record in self._records.values()]
        priors = [record.prior for record in records]
        scalars = (
            *("prompt", "root_value", "predicted_value", "chosen", "reward", "done", "episode", "step", "shaping"),
            "behaviour_prob",
        )
        return {
            "states": [dataclasses.astuple(record.state) for record in records],
            "scalars": {name: [getattr(record, name) for record in records] for name in scalars},
            "arrays": {
                name: pack_arrays([getattr(record, name) for record in records])
                for name in ("features", "action_indices", "visit_counts")
            },
            "priors": [prior and (prior.source, prior.version, prior.completion, prior.parsed) for prior in priors],
            "prior_arrays": {
                name: pack_arrays([None if prior is None else getattr(prior, name) for prior in priors])
                for name in ("logprobs", "rollout_logprobs")
            },
        }


def read_records(state: Plain) -> list[StepRecord]:
    """The records of :meth:`RecordTable.state_dict`, by number."""
    arrays = {name: unpack_arrays(packed) for name, packed in state["arrays"].items()}
    logprobs, rollout = (unpack_arrays(state["prior_arrays"][name]) for name in ("logprobs", "rollout_logprobs"))
    records = []
    for n, game_state in enumerate(state["states"]):
        prior = None
        if state["priors"][n] is not None:
            source, version, completion, parsed = state["priors"][n]
            known = logprobs[n]
            assert known is not None
            prior = ActionPrior(known, source, version, completion, parsed, rollout[n])
        fields: dict[str, Any] = {name: values[n] for name, values in (*arrays.items(), *state["scalars"].items())}
        records.append(StepRecord(state=GameState(*game_state), prior=prior, **fields))
    return records
