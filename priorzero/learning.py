"""The updates of an iteration: the world model's, then the LLM's if it has its turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from priorzero.agent import Agent
from priorzero.policy import PriorZeroPolicy, add_total_loss
from priorzero.runs.counters import Counters
from priorzero.runs.nonfinite import NonFiniteUpdates
from priorzero.runtime.activity import announced
from priorzero.settings import Settings
from priorzero.types import NonFiniteError, StepRecord
from priorzero.world_model.batch import ReplayBatch, SampledDecisions, SampledSequences
from priorzero.world_model.replay import PriorZeroGameBuffer


class Learner:
    """Learns in a background task, so that collection can continue.

    Searches may run between two updates. The prior engine receives the LLM's new parameters as soon as no request is
    in progress.

    Args:
        counters: ``train_iter`` and ``llm_version`` are updated.
        log: is called with the metrics of an iteration and ``train_iter``.
    """

    def __init__(
        self,
        agent: Agent,
        settings: Settings,
        *,
        counters: Counters,
        nonfinite: NonFiniteUpdates,
        log: Callable[[Mapping[str, float], int], None],
    ) -> None:
        self._agent = agent
        self._settings = settings
        self._counters = counters
        self._nonfinite = nonfinite
        self._log = log
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the updates of an iteration, if the replay buffer holds a batch."""
        if self._agent.buffer.get_num_of_transitions() >= self._settings.train.batch_size:
            self._task = asyncio.create_task(self._learn())

    async def wait(self) -> None:
        """Wait for the updates that were started. Their errors are raised here."""
        if self._task is not None:
            await self._task
            self._task = None

    async def stop(self) -> None:
        """Finish the update that is running, so that the parameters are consistent, and close the models' threads."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            if not self._task.cancelled():
                self._task.exception()  # the run ends because of this error or of another one, raised elsewhere
        self._agent.world_model_thread.close()
        self._agent.llm_thread.close()

    async def _learn(self) -> None:
        settings, counters = self._settings, self._counters
        metrics: dict[str, float] = {}
        batch: ReplayBatch | None = None
        if counters.is_due(settings.train.update_every):
            with announced("learning: world model"):
                for _ in range(settings.train.update_per_collect):
                    batch, update_metrics = await self._agent.world_model_thread.run(
                        "world-model update", self._update_world_model
                    )
                    metrics.update(update_metrics)
        prior, llm_learner = self._agent.prior, self._agent.policy.llm_learner
        if prior is not None and llm_learner and llm_learner.learns and counters.is_due(settings.llm.update_every):
            first = None if batch is None else batch.sequences

            async def update_llm() -> int:
                metrics.update(await self._update_llm(first))
                return self._counters.llm_version

            with announced("learning: LLM"):
                await prior.learn(update_llm)
        add_total_loss(metrics)
        metrics["train/updates_left_out"] = float(self._nonfinite.total)
        self._log(metrics, self._counters.train_iter)

    def _update_world_model(self) -> tuple[ReplayBatch, dict[str, float]]:
        batch, metrics = update_world_model(
            self._agent.policy,
            self._agent.buffer,
            self._nonfinite,
            batch_size=self._settings.train.batch_size,
            train_iter=self._counters.train_iter,
        )
        if metrics:
            self._counters.train_iter += 1
        return batch, metrics

    async def _update_llm(self, first: SampledSequences | None) -> dict[str, float]:
        """A turn of the LLM. Its first update uses the world model's last sample, each further one a new sample."""
        agent, metrics = self._agent, dict[str, float]()
        for n in range(self._settings.llm.updates_per_turn):
            if n == 0 and first is not None:
                sequences = first
            else:
                sequences = await agent.world_model_thread.run(
                    "replay", lambda: agent.buffer.sample(self._settings.train.batch_size, agent.policy).sequences
                )
            decisions = agent.policy.llm_decisions(sequences, self._imitated())
            metrics.update(
                await agent.llm_thread.run("LLM update", update_llm, agent.policy, decisions, self._nonfinite)
            )
        self._counters.llm_version = agent.policy.llm_version
        return metrics

    def _imitated(self) -> list[StepRecord]:
        """Decisions of best episodes for the next LLM update: ``llm.imitation_share`` of its batch, at least one."""
        best, cfg = self._agent.best_episodes, self._settings.llm
        return [] if best is None else best.sample(max(1, round(cfg.imitation_share * cfg.batch_size)))


def update_world_model(
    policy: PriorZeroPolicy,
    buffer: PriorZeroGameBuffer,
    nonfinite: NonFiniteUpdates,
    *,
    batch_size: int,
    train_iter: int,
) -> tuple[ReplayBatch, dict[str, float]]:
    """One update of the world model from one sample.

    Returns:
        The sample, and the metrics; no metrics if the update was skipped.

    Raises:
        UserError: too many updates in a row were skipped.
    """
    if not policy.features_are_fitted:
        policy.fit_features(buffer.features())
    batch = buffer.sample(batch_size, policy)
    try:
        metrics = policy.learn_world_model(batch, train_iter=train_iter)
    except NonFiniteError as error:
        nonfinite.skipped("world model", error, records=batch.sequences.records(), arrays=batch.arrays())
        return batch, {}
    nonfinite.applied("world model")
    buffer.update_priority(batch, metrics.pop("priorities"))
    return batch, metrics


def update_llm(policy: PriorZeroPolicy, decisions: SampledDecisions, nonfinite: NonFiniteUpdates) -> dict[str, float]:
    """One update of the LLM; returns the metrics, none if the update was skipped.

    Raises:
        UserError: too many updates in a row were skipped.
    """
    try:
        metrics = policy.learn_llm(decisions)
    except NonFiniteError as error:
        nonfinite.skipped("LLM", error, records=decisions.records, arrays={})
        return {}
    nonfinite.applied("LLM")
    return metrics
