"""What a run logs: metrics, episodes, evaluations with the last one's transcripts, the progress line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from loguru import logger

from priorzero.config import differences
from priorzero.play.episode import EpisodeResult
from priorzero.play.evaluator import Evaluation, Evaluations, merge
from priorzero.play.transcript import EvaluationTranscript, write_transcripts
from priorzero.runs.counters import Counters
from priorzero.runs.files import EPISODES, EVALUATIONS, LAST_EVALUATION, append_text, recording_path
from priorzero.runs.folder import truncate_files
from priorzero.runs.loggers import make_metrics_writer, metrics_files
from priorzero.runs.progress import Progress
from priorzero.runs.summary import peak_memory_mb
from priorzero.runtime.timeline import TimeUsage
from priorzero.settings import LLMSettings, Settings
from priorzero.types import Plain
from priorzero.world_model.segment import PriorZeroGameSegment

# The first of these modes that was evaluated is the run's main result.
MAIN_MODES = ("world_model_with_prior", "world_model")


def log_start(settings: Settings, *, games: str, where: str, folder: Path) -> None:
    """Log what is run where, and in ``run.log`` the settings that differ from the defaults."""
    logger.info(f"{games}, seed {settings.run.seed}, on {where}; the run's folder is {folder}")
    logger.info(
        f"env.max_episode_steps: {settings.env.max_episode_steps}; env.action_space_size: {settings.env.num_actions}"
    )
    if settings.prior.enabled:
        logger.info(_llm_text(settings.llm))
    changed = [f"{group}.{key}={value}" for group, own in differences(settings).items() for key, value in own.items()]
    logger.debug(f"settings that differ from the defaults: {', '.join(changed) or 'none'}")


def _llm_text(cfg: LLMSettings) -> str:
    if not cfg.adapter:
        return f"LLM: {cfg.path}, llm.adapter: none"
    return f"LLM: {cfg.path}, llm.adapter: {cfg.adapter}" + ("" if cfg.use_lora else ", merged (llm.use_lora=false)")


class RunLogger:
    """Logs a run into its folder, to the loggers of ``run.loggers``, and to the terminal.

    ``spent_s`` is the time in seconds that the run took before it was resumed.

    Args:
        folder: the run's.
        settings: all settings.
        state: :meth:`state_dict` of the run that is resumed; None for a new run.
        env_steps: returns the environment steps so far, also during an iteration.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        *,
        state: Plain | None = None,
        env_steps: Callable[[], int] | None = None,
    ) -> None:
        self.folder = folder
        run = settings.run
        self.spent_s = state["seconds"] if state is not None else 0.0
        self._started = time.monotonic() - self.spent_s
        self.writer = make_metrics_writer(
            folder, settings, last=state["last"] if state is not None else None, seconds=lambda: self.seconds
        )
        self.progress = Progress(
            max_iter=run.max_iter, max_env_step=max(1, run.max_env_step), every=run.log_every, env_steps=env_steps
        )

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken so far."""
        return time.monotonic() - self._started

    def state_dict(self) -> Plain:
        """The last metrics, the time, and the sizes of all files that are appended to."""
        for path in self._files():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sizes = {path.name: path.stat().st_size for path in self._files()}
        return {"last": dict(self.writer.last), "seconds": self.seconds, "sizes": sizes}

    def log_iteration(
        self,
        counters: Counters,
        *,
        scalars: Mapping[str, float],
        prior: Mapping[str, float] | None,
        time_usage: TimeUsage,
        episodes: Iterable[EpisodeResult],
        recordings: Iterable[EvaluationTranscript] = (),
    ) -> None:
        """Log an iteration: its metrics, the prior's (None without an LLM), and the episodes that ended in it.

        ``recordings`` are those of ``run.record_every``; each is written to a file of its own.
        """
        iteration = counters.iteration
        if prior is not None:
            self.writer.write(prior, step=iteration, axis="iteration")
            short = ", ".join(f"{name.split('/')[-1]} {value:.4g}" for name, value in prior.items())
            logger.bind(topic="prior").info(f"iteration {iteration}: {short}")
        timing = {**time_usage.scalars(), "time/run_s": self.seconds, "memory/peak_mb": peak_memory_mb()}
        self.writer.write({**scalars, **timing}, step=iteration, axis="iteration")
        logger.debug(f"iteration {iteration}, {time_usage.wall:.1f} s: {time_usage.describe()}")
        for recording in recordings:
            path = recording_path(self.folder, env_step=recording["env_step"], episode=recording["episode"])
            path.parent.mkdir(exist_ok=True)
            write_transcripts(path, [recording], env_step=recording["env_step"])
        self._append(EPISODES, [dataclasses.asdict(episode) for episode in episodes])
        self.progress.show(
            iteration=iteration,
            env_step=counters.env_step,
            episode_return=self.writer.last.get("collector_iter/reward_mean"),
            world_model_loss=self.writer.last.get("train/wm_total_loss"),
            llm_loss=self.writer.last.get("train/llm_loss"),
        )

    def log_evaluations(
        self, results: Evaluations, *, env_step: int, prior_fallbacks: float | None = None
    ) -> dict[str, Evaluation]:
        """Log evaluations.

        Args:
            results: by mode and game.
            env_step: environment steps of the run so far.
            prior_fallbacks: number of uniform priors in the evaluations; None without an LLM.

        Returns:
            The evaluations by mode, over all games; ``unseen_MODE`` for games that are not trained on.
        """
        evaluations, scalars, lines = {}, {}, []
        for (mode, unseen), of_games in results.items():
            lines += [
                {"env_step": env_step, "game": game, "unseen": unseen, **evaluation.results()}
                for game, evaluation in of_games.items()
            ]
            name = f"unseen_{mode}" if unseen else mode
            evaluations[name] = evaluation = merge(list(of_games.values()))
            maximum = f" of {evaluation.max_score:g}" if evaluation.max_score else ""
            logger.info(f"evaluation at {env_step} env steps, {name}: scores {evaluation.scores}{maximum}")
            scalars[f"evaluator_step/{name}_reward_mean"] = evaluation.mean_return
            scalars[f"evaluator_step/{name}_score_mean"] = evaluation.mean_score
        main = next((mode for mode in (*MAIN_MODES, *evaluations) if mode in evaluations), None)
        if main is not None:
            scalars["evaluator_step/reward_mean"] = evaluations[main].mean_return
        if prior_fallbacks is not None:
            scalars["evaluator_step/prior_fallbacks"] = prior_fallbacks
        transcripts = _first_episodes(results)
        sizes = {path.name: path.stat().st_size for path in self._files()}
        try:
            self.writer.write_evaluation(scalars, transcripts=transcripts, env_step=env_step)
            write_transcripts(self.folder / LAST_EVALUATION, transcripts, env_step=env_step)
            self._append(EVALUATIONS, lines)
        except OSError:  # the run ends and is saved; when it is resumed, the evaluation is repeated
            with contextlib.suppress(OSError):
                truncate_files(self.folder, sizes, env_step=env_step)
            raise
        return evaluations

    def close(self, *, failed: bool = False) -> None:
        """Close the loggers. ``failed``: an error has ended the run."""
        self.writer.close(failed=failed)

    def _files(self) -> list[Path]:
        """The files that are appended to."""
        own = [self.folder / EPISODES, self.folder / EVALUATIONS]
        return [*(path for path in own if path.exists()), *metrics_files(self.folder)]

    def _append(self, name: str, lines: Sequence[dict[str, Any]]) -> None:
        """Append all lines, or none if this raises OSError."""
        seconds = round(self.seconds, 1)
        append_text(self.folder / name, "".join(json.dumps({**line, "wall_s": seconds}) + "\n" for line in lines))


def _first_episodes(results: Evaluations) -> list[EvaluationTranscript]:
    """The first episode of each mode and game."""
    return [
        {"mode": mode, "game": game, "unseen": unseen, **evaluation.first_episode}
        for (mode, unseen), of_games in results.items()
        for game, evaluation in of_games.items()
        if evaluation.first_episode is not None
    ]


def log_segments(segments: Iterable[PriorZeroGameSegment], *, iteration: int) -> None:
    """A line in ``segments.log`` for each new game segment."""
    log = logger.bind(topic="segments")
    for segment in segments:
        records = segment.records
        log.info(
            f"iteration {iteration}: episode {records[0].episode}, steps {records[0].step}-{records[-1].step}, "
            f"{len(records)} decisions, reward {sum(r.reward for r in records):g}, "
            f"root value {np.mean([r.root_value for r in records]):.3f}, "
            f"predicted {np.mean([r.predicted_value for r in records]):.3f}, "
            f"with prompt {sum(bool(r.prompt) for r in records)}, ends episode {records[-1].done}"
        )
