"""Step records as plain data (:data:`priorzero.types.Plain`), for checkpoints and for other processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from priorzero.types import ActionPrior, GameState, Plain, StepRecord


def pack_arrays(arrays: Sequence[np.ndarray | None]) -> Plain:
    """Vectors of one type, of any lengths, as one tensor and their lengths; None has length -1."""
    given = [array for array in arrays if array is not None]
    values = torch.from_numpy(np.concatenate(given)) if given else torch.zeros(0)
    return {"values": values, "lengths": [-1 if array is None else len(array) for array in arrays]}


def unpack_arrays(packed: Plain) -> list[np.ndarray | None]:
    """Copies of the vectors that were given to :func:`pack_arrays`."""
    values, arrays, start = packed["values"].numpy(), [], 0
    for length in packed["lengths"]:
        arrays.append(None if length < 0 else values[start : start + length].copy())
        start += max(0, length)
    return arrays


class RecordTable:
    """Numbers step records, so that a record that several segments share is stored once."""

    def __init__(self) -> None:
        self._records: dict[tuple[int, int], tuple[int, StepRecord]] = {}

    def number(self, record: StepRecord) -> int:
        """The number of a record in the table, which it is added to if it is new."""
        return self._records.setdefault((record.episode, record.step), (len(self._records), record))[0]

    def state_dict(self) -> Plain:
        """All records as plain data, one list or array for each field."""
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
    """The records of a :meth:`RecordTable.state_dict`; the position in the list is the number."""
    arrays = {name: unpack_arrays(packed) for name, packed in state["arrays"].items()}
    logprobs, rollout = (unpack_arrays(state["prior_arrays"][name]) for name in ("logprobs", "rollout_logprobs"))
    records = []
    for n, game_state in enumerate(state["states"]):
        prior = None
        if state["priors"][n] is not None:
            source, version, completion, parsed = state["priors"][n]
            prior_logprobs = logprobs[n]
            assert prior_logprobs is not None
            prior = ActionPrior(prior_logprobs, source, version, completion, parsed, rollout[n])
        fields: dict[str, Any] = {name: values[n] for name, values in (*arrays.items(), *state["scalars"].items())}
        records.append(StepRecord(state=GameState(*game_state), prior=prior, **fields))
    return records
