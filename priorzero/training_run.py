"""A run of the single-process loop: its state and the operations that the loop is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loguru import logger

from priorzero.agent import Agent
from priorzero.envs import GameSpec
from priorzero.learning import Learner
from priorzero.llm.model_files import warn_of_other_prompt
from priorzero.llm.models import warn_of_long_prompts
from priorzero.play.collector import Collected, Collector
from priorzero.play.evaluator import Evaluation, Evaluators
from priorzero.run_state import RunState
from priorzero.runs.checkpoint import Checkpoint
from priorzero.runs.counters import Counters
from priorzero.runs.folder import create_files, truncate_files
from priorzero.runs.logger import RunLogger, log_segments, log_start
from priorzero.runs.nonfinite import NonFiniteUpdates
from priorzero.runs.report import report_at_end
from priorzero.runs.saver import Saver
from priorzero.runs.summary import (
    RunSummary,
    count_moved,
    fingerprint,
    format_table,
    peak_memory_text,
    summary_rows,
    summary_text,
    time_text,
)
from priorzero.runtime.activity import activities, announced
from priorzero.runtime.concurrency import StopRequest
from priorzero.settings import Settings
from priorzero.types import Plain


class TrainingRun:
    """Everything that :mod:`priorzero.train` works with.

    Args:
        checkpoint: the run is resumed from it; None for a new run.

    Attributes:
        counters: how far the run is.
        learner: updates both models in the background.
        stop: whether a signal requested a stop.
        evaluation_due: an evaluation is the next step. A new run begins with one if ``eval.at_start`` is set; a run
            with ``run.max_env_step=0`` consists of one.
        save_due: a checkpoint is the next step, after an evaluation that is due.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        games: Sequence[GameSpec],
        agent: Agent,
        collector: Collector,
        evaluators: Evaluators,
        folder: Path,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.settings, self.games, self.folder = settings, games, folder
        self.agent, self.collector, self.evaluators = agent, collector, evaluators
        self.counters = Counters()
        self.evaluation_due = settings.run.max_env_step == 0 or (settings.eval.at_start and checkpoint is None)
        self.save_due = False
        self.stop = StopRequest()
        self.saver = Saver(folder, keep=settings.run.keep_checkpoints)
        self.nonfinite = NonFiniteUpdates(folder / "not_finite", limit=settings.train.max_nonfinite_updates)
        self.learner = Learner(
            agent, settings, counters=self.counters, nonfinite=self.nonfinite, log=self._log_learning
        )
        self._state = RunState(settings, agent, collector)
        self._checkpoint = checkpoint
        self._initial_fingerprints = trained_fingerprints(agent)
        self._start_up_s = 0.0
        self._logger: RunLogger | None = None
        self._error: BaseException | None = None  # it ends the run
        self._evaluations: dict[str, Evaluation] = {}
        self._unstored: Collected | None = None  # not in the replay buffer yet
        self._unlogged: Collected | None = None

    @property
    def logger(self) -> RunLogger:
        """The run's logger, from :meth:`begin` on."""
        assert self._logger is not None
        return self._logger

    @property
    def is_finished(self) -> bool:
        """Whether the run has reached ``run.max_iter`` or ``run.max_env_step``."""
        return self.counters.is_finished(self.settings.run)

    @property
    def _env_steps(self) -> int:
        """Environment steps so far, also during an iteration."""
        return self.collector.env_steps + self.collector.collected.env_steps

    @property
    def games_text(self) -> str:
        """Names of the games."""
        return ", ".join(game.name for game in self.games)

    # ---- beginning ----

    async def begin(self) -> None:
        """Create the run's files, log the settings, restore the checkpoint, and start the prior engine.

        Raises:
            UserError: the files cannot be written, or the checkpoint belongs to models of another shape.
            EngineError: the engine cannot be started.
        """
        settings, agent = self.settings, self.agent
        create_files(settings, self.folder)
        log_start(settings, games=self.games_text, where=str(agent.device), folder=self.folder)
        if agent.llm is not None:
            warn_of_long_prompts(agent.llm, settings.llm)
            if self._checkpoint is None:  # a resumed run keeps its prompt
                warn_of_other_prompt(settings.llm)
        with announced("loading the checkpoint"):
            saved = None if self._checkpoint is None else await self._restore(self._checkpoint)
        self._logger = RunLogger(self.folder, settings, state=saved, env_steps=lambda: self._env_steps)
        with announced(f"starting {'vLLM' if settings.prior.engine == 'vllm' else 'the LLM'}"):
            if agent.engine is not None and agent.policy.llm_version:
                await agent.engine.sync_weights(agent.policy.llm_version)
            elif agent.engine is not None:
                await agent.engine.ready()
        agent.timeline.discard_interval()
        self._start_up_s = activities.elapsed_s

    async def _restore(self, checkpoint: Checkpoint) -> Plain:
        """Restore the run; returns the logger's state."""
        for note in checkpoint.notes:
            logger.warning(note)
        loop = await self._state.restore(checkpoint)
        for name, count in loop["counters"].items():
            setattr(self.counters, name, count)
        self.nonfinite.load_state_dict(loop["nonfinite"])
        self._initial_fingerprints = loop["initial_fingerprints"]
        self.saver.resumed_from(checkpoint.folder, about=self._about(loop["evaluation_due"]))
        truncate_files(self.folder, loop["logger"]["sizes"], env_step=self.counters.env_step)
        logger.info(f"resumed from {checkpoint.folder.name}: {self.counters.describe()}")
        if loop["evaluation_due"]:
            self.set_due()
        run = self.settings.run
        if self.is_finished:
            logger.warning(
                f"the run had already ended: iteration {self.counters.iteration} of run.max_iter={run.max_iter}, env "
                f"step {self.counters.env_step} of run.max_env_step={run.max_env_step}; raise them to continue"
            )
        saved: Plain = loop["logger"]
        return saved

    # ---- the steps of an iteration ----

    async def collect(self) -> Collected | None:
        """Collect the steps of an iteration; None if a stop is requested before the end."""
        num_steps = self.settings.train.collect_env_steps
        self.logger.progress.start(iteration=self.counters.iteration, env_step=self.counters.env_step)
        with announced("collecting"):
            collected = await self.collector.collect(num_steps, stop=lambda: self.stop.requested)
        self._unstored = self._unlogged = collected
        return collected

    def store(self, collected: Collected) -> None:
        """Put the collected segments into the replay buffer. The iteration counts from here on."""
        self.agent.buffer.push(collected.segments)
        self.counters.iteration += 1
        self.counters.env_step = self.collector.env_steps
        self._unstored = None

    def set_due(self) -> None:
        """Set ``evaluation_due`` and ``save_due`` for the present iteration."""
        self.evaluation_due = self.is_finished or self.counters.is_due(self.settings.eval.every)
        self.save_due = self.is_finished or self.counters.is_due(self.settings.run.checkpoint_every)

    def log(self, collected: Collected) -> None:
        """Log an iteration."""
        prior, best = self.agent.prior, self.agent.best_episodes
        self.logger.log_iteration(
            self.counters,
            scalars={
                **self.collector.scalars(collected),
                **self.agent.buffer.scalars(),
                **(best.scalars() if best is not None else {}),
            },
            prior=prior.take_statistics() if prior is not None else None,
            time_usage=self.agent.timeline.finish_interval(),
            episodes=collected.episodes,
            recordings=collected.recordings,
        )
        log_segments(collected.segments, iteration=self.counters.iteration)
        self._unlogged = None

    def _log_learning(self, metrics: Mapping[str, float], train_iter: int) -> None:
        self.logger.writer.write(metrics, step=train_iter, axis="train_iter")

    async def evaluate(self) -> None:
        """Evaluate. If a stop is requested, the evaluation is cancelled and remains due."""
        results = await self.stop.run_or_cancel(self.evaluators.evaluate(self.collector.memories))
        if results is None:
            await self.agent.world_model_thread.drain()  # a search may still run
            return
        prior = self.agent.prior
        fallbacks = prior.take_statistics()["prior/fallbacks"] if prior is not None else None
        self._evaluations = self.logger.log_evaluations(
            results, env_step=self.counters.env_step, prior_fallbacks=fallbacks
        )
        if self.agent.engine is not None and not self._env_steps:  # `eval.at_start` must not change what follows
            await self.agent.engine.clear_cache()
        self.evaluation_due = False
        self.agent.timeline.discard_interval()

    async def save(self) -> None:
        """Write a checkpoint, unless nothing was collected yet."""
        self.save_due = False
        begun = self.collector.collected.env_steps
        if self.counters.env_step + begun == 0:
            return
        if self.agent.engine is not None:  # a resumed run starts with an empty cache, so this one continues with one
            await self.agent.engine.clear_cache()
        self.counters.llm_version = self.agent.policy.llm_version
        name = f"iteration_{self.counters.iteration}" + (f"+{begun}" if begun else "")
        with announced("saving"):
            await self.saver.save(
                name,
                write=lambda folder: self._state.write(folder, loop=self._loop_state()),
                about=self._about(self.evaluation_due),
            )

    def _loop_state(self) -> Plain:
        """The state of the training loop. Raises OSError if the log files cannot be written to the disk."""
        return {
            "counters": self.counters.as_dict(),
            "evaluation_due": self.evaluation_due,
            "nonfinite": self.nonfinite.state_dict(),
            "initial_fingerprints": self._initial_fingerprints,
            "logger": self.logger.state_dict(),
        }

    def _about(self, evaluation_due: bool) -> dict[str, Any]:
        """The run's entries in a checkpoint's manifest."""
        return {
            "counters": self.counters.as_dict(),
            "evaluation_due": evaluation_due,
            "begun_env_steps": self.collector.collected.env_steps,
            "games": {game.name: game.md5 for game in self.games},
        }

    # ---- ending ----

    async def save_after(self, error: BaseException) -> None:
        """Save what was learned when an error ends the run. The iteration is completed without further updates."""
        self._error = error
        await self.learner.stop()
        if self._logger is None:  # the run has not begun
            return
        if isinstance(error, OSError) and self._unlogged is not None:
            return  # the iteration cannot be logged; the last checkpoint remains
        if self._unlogged is not None:
            if self._unstored is not None:
                self.store(self._unstored)
            self.log(self._unlogged)
            self.evaluation_due = False
        await self.save()
        self.saver.log_last()

    async def close(self) -> None:
        """Close the prior engine and the files, and write the trace and the report."""
        if self.agent.engine is not None:
            await self.agent.engine.close()
        if self._logger is not None:
            self._logger.close(failed=self._error is not None)
        try:
            self.agent.timeline.write_trace(self.folder / "trace.json")
        except OSError as error:
            logger.warning(f"trace.json could not be written ({error})")
        if self._logger is not None:
            report_at_end(self.folder, error=self._error)

    def summary(self) -> RunSummary:
        """Log and return the summary of the run.

        Raises:
            UserError: the last checkpoint could not be written.
        """
        self.logger.progress.end()
        self.saver.check()
        rows = self._rows()
        stopped = self.stop.requested and (self.evaluation_due or not self.is_finished)
        logger.debug("details:\n" + format_table(rows))
        logger.info(self._summary_text(stopped=stopped))
        return RunSummary(self.folder, rows, dict(self.logger.writer.last), self._evaluations, stopped)

    def _summary_text(self, *, stopped: bool) -> str:
        counters, llm_learner = self.counters, self.agent.policy.llm_learner
        updates = f"world model {counters.train_iter or self._no_update}"
        if llm_learner is not None:
            updates += f", LLM {counters.llm_version if llm_learner.learns else '0 (it is not trained)'}"
        return summary_text(
            counters,
            stopped=stopped,
            folder=self.folder,
            settings=self.settings,
            games=self.games_text,
            num_episodes=self.collector.num_episodes,
            updates=updates,
            time=time_text(
                activities.seconds,
                start_up_s=self._start_up_s,
                total_s=activities.elapsed_s,
                spent_s=self.logger.spent_s,
            ),
            checkpoint=self.saver.last,
            resumable=True,
        )

    @property
    def _no_update(self) -> str:
        """No update was made, and why."""
        stored, needed = self.agent.buffer.get_num_of_transitions(), self.settings.train.batch_size
        if self.counters.iteration == 0 or stored >= needed:
            return "0"
        return f"0 (complete game segments have {stored} decisions; an update needs train.batch_size={needed})"

    def _rows(self) -> dict[str, Any]:
        counters, agent = self.counters, self.agent
        now = trained_fingerprints(agent)
        return summary_rows(
            counters,
            settings=self.settings,
            games=self.games_text,
            num_episodes=self.collector.num_episodes,
            recent_returns=self.collector.recent_returns,
            updates={
                "world-model updates": counters.train_iter or self._no_update,
                "LLM updates": counters.llm_version if agent.llm is not None else "no LLM",
                **{
                    f"{name} tensors moved": f"{count_moved(before, now[name])} of {len(before)}"
                    for name, before in self._initial_fingerprints.items()
                },
            },
            evaluations=self._evaluations,
            resources={
                "time of the iterations": agent.timeline.total.describe(),
                "peak memory": peak_memory_text(),
                "wall time": f"{self.logger.seconds:.0f} s",
            },
            checkpoint=self.saver.last,
        )


def trained_fingerprints(agent: Agent) -> dict[str, dict[str, int]]:
    """Fingerprints of all parameters that are trained, by model. Buffers such as running means are left out."""
    fingerprints = {"world model": fingerprint(dict(agent.policy.trained_world_model_parameters()))}
    if agent.llm is not None:
        trained = {name: p for name, p in agent.llm.model.named_parameters() if p.requires_grad}
        fingerprints["LLM"] = fingerprint(trained)
    return fingerprints
