"""Reads the file that W&B writes in offline mode: records in the log format of LevelDB."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADER = 7  # bytes, of the file and of each chunk
BLOCK = 32 * 1024


@dataclass
class WandbRun:
    """What was logged in one process.

    Attributes:
        run_id, project, config: of the run.
        rows: what each call of ``log`` wrote.
        step_metrics: name of a metric to the name of its x axis.
        exit_code: None if the run was not finished.
    """

    run_id: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    step_metrics: dict[str, str] = field(default_factory=dict)
    exit_code: int | None = None


def read_wandb_runs(run_folder: Path) -> list[WandbRun]:
    """The offline runs in the folder of a run, the oldest first."""
    return [_read(path) for path in sorted(run_folder.glob("wandb/offline-run-*/*.wandb"))]


def _read(path: Path) -> WandbRun:
    from wandb.proto.wandb_internal_pb2 import Record

    run = WandbRun()
    for content in _records(path.read_bytes()):
        record = Record.FromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id, run.project = record.run.run_id, record.run.project
            run.config.update({item.key: json.loads(item.value_json) for item in record.run.config.update})
        elif kind == "history":
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            run.rows.append(items)
        elif kind == "metric" and record.metric.step_metric:
            run.step_metrics[record.metric.name] = record.metric.step_metric
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _records(data: bytes) -> list[bytes]:
    """A record is one chunk (type 1), or a first (2), middle (3) and last (4) one. No chunk crosses a block."""
    position, records, parts = HEADER, [], b""
    while position + HEADER <= len(data):
        rest = BLOCK - position % BLOCK
        if rest < HEADER:
            position += rest
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        parts += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):
            records.append(parts)
            parts = b""
    return records
