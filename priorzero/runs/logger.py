"""What every training loop tells: scalars, ``episodes.jsonl``, ``evaluations.jsonl``, and how far it is."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loguru import logger

from priorzero.play.collector import Episode
from priorzero.play.evaluator import Evaluation, together
from priorzero.runs.metrics import MetricsWriter, Progress
from priorzero.settings import Settings
from priorzero.types import Plain


class Teller:
    """Writes what happens into a run's folder and to the terminal.

    Args:
        folder: the run's.
        settings: all settings.
        told: what a run that goes on had told before (:meth:`state_dict`); None for a new one.
    """

    def __init__(self, folder: Path, settings: Settings, *, told: Plain | None = None) -> None:
        run = settings.run
        self.folder = folder
        self.writer = MetricsWriter(folder)
        spent = 0.0
        if told is not None:
            self.writer.last, spent = told["last"], told["seconds"]
        self.progress = Progress(
            max_iter=run.max_iter, max_env_step=max(1, run.max_env_step), every=run.log_every, spent_s=spent
        )
        self._started = time.monotonic() - spent

    @property
    def seconds(self) -> float:
        """Of the run so far."""
        return time.monotonic() - self._started

    def state_dict(self) -> Plain:
        """What was told so far."""
        lines = {path.name: path.stat().st_size for path in self.folder.glob("e*.jsonl") if _synced(path)}
        return {"last": dict(self.writer.last), "seconds": self.seconds, "sizes": {**lines, **self.writer.sizes()}}

    def show(self, counters: Mapping[str, int]) -> None:
        """The progress line."""
        self.progress.show(
            iteration=counters["iteration"],
            env_step=counters["env_step"],
            episode_return=self.writer.last.get("collector_iter/reward_mean"),
            loss=self.writer.last.get("train/total_loss"),
        )

    def tell_prior(self, scalars: Mapping[str, float], *, iteration: int) -> None:
        """What the LLM was asked."""
        self.writer.write(scalars, step=iteration)
        short = ", ".join(f"{name.split('/')[-1]} {value:.4g}" for name, value in scalars.items())
        logger.bind(topic="prior").info(f"iteration {iteration}: {short}")

    def tell_episodes(self, episodes: Iterable[Episode]) -> None:
        """Training episodes that have ended."""
        self._append("episodes.jsonl", [dataclasses.asdict(episode) for episode in episodes])

    def tell_evaluations(
        self, played: dict[tuple[str, bool], dict[str, Evaluation]], *, env_step: int
    ) -> dict[str, Evaluation]:
        """What :func:`priorzero.train.evaluate_all` returned; gives it back by mode, over all games.

        Games that were not trained on are ``unseen_MODE``.
        The first played of world model with prior, world model, prior is the run's own figure.
        """
        evaluations, scalars = {}, {}
        for (mode, unseen), of_games in played.items():
            self._append(
                "evaluations.jsonl",
                [
                    {"env_step": env_step, "game": game, "unseen": unseen, **dataclasses.asdict(evaluation)}
                    for game, evaluation in of_games.items()
                ],
            )
            name = f"unseen_{mode}" if unseen else mode
            evaluations[name] = evaluation = together(list(of_games.values()))
            logger.info(
                f"evaluation at {env_step} env steps, {name}: scores {evaluation.scores} of {evaluation.max_score:g}"
            )
            scalars[f"evaluator_step/{name}_reward_mean"] = evaluation.mean_return
            scalars[f"evaluator_step/{name}_score_mean"] = evaluation.mean_score
        for main in ("world_model_with_prior", "world_model", *evaluations):
            if main in evaluations:
                scalars["evaluator_step/reward_mean"] = evaluations[main].mean_return
                break
        self.writer.write(scalars, step=env_step)
        return evaluations

    def _append(self, name: str, lines: Sequence[dict[str, Any]]) -> None:
        seconds = round(self.seconds, 1)
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({**line, "wall_s": seconds}) + "\n" for line in lines)


def _synced(path: Path) -> bool:
    """True once the file is on the disk as far as it was written."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return True
