"""Names of the files in a run's folder, its checkpoints and exported agents. This module imports no model."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from pathlib import Path

CONFIG = "config.yaml"  # in a run's folder, a checkpoint and an exported agent
LOGS = "log"
LOCK = ".lock"
EPISODES = "episodes.jsonl"
EVALUATIONS = "evaluations.jsonl"
LAST_EVALUATION = "last_evaluation.json"
METRICS_CSV = "metrics.csv"
WANDB = "wandb.json"  # the identifier of the W&B run
REPORT = "report.html"
RECORDINGS = "recordings"
RECORDING = re.compile(r"step(\d+)_episode\d+\.(json|html)")  # a recording, or the page that shows it
ERROR = f"{LOGS}/error.txt"  # the error that ended the run
CHECKPOINTS = "checkpoints"

# In a checkpoint and in an exported agent.
MANIFEST = "manifest.json"
ACTIONS = "actions.json"  # the action vocabulary
LLM_FOLDER = "llm"
# In a checkpoint.
WORLD_MODEL = "world_model.pt"
TRAINING_STATE = "training.pt"
# In an exported agent.
EXPORTED_WORLD_MODEL = "world_model.safetensors"
PLAY_STATE = "play.json"


def recording_path(folder: Path, *, env_step: int, episode: int) -> Path:
    """The file of a recorded training episode in the run's ``folder``, such as ``step0000120_episode000006.json``.

    ``env_step`` are the environment steps of the run when it ended, ``episode`` is its number.
    """
    return folder / RECORDINGS / f"step{env_step:07d}_episode{episode:06d}.json"


def recordings_after(folder: Path, env_step: int) -> list[Path]:
    """The recordings of a run of episodes that ended after ``env_step``, and the pages that show them."""
    found = [(path, RECORDING.fullmatch(path.name)) for path in (folder / RECORDINGS).glob("*")]
    return sorted(path for path, match in found if match is not None and int(match[1]) > env_step)


def is_locked(folder: Path) -> bool:
    """Whether a process is running the run in this folder. False if that cannot be found out."""
    try:
        with (folder / LOCK).open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock file, or a file system without locks
        return False
    return False


def append_text(path: Path, text: str) -> None:
    """Append a text to a file as a whole.

    Raises:
        OSError: it cannot be written. The file is unchanged if possible.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise
