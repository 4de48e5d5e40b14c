"""Trains the language model on the decisions of walkthroughs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch.utils.data import DataLoader

from priorzero.llm.fine_tuning import LLMLearner, LLMSample
from priorzero.llm.models import LanguageModel
from priorzero.llm.prompts import PromptStyle
from priorzero.pretraining.data import (
    Decision,
    Episode,
    PromptMaker,
    SampleKey,
    TrainingData,
    num_batches,
    searched_decisions,
    training_batches,
    unsearched_decisions,
)
from priorzero.pretraining.evaluation import figures_by_game, group_means, outcomes
from priorzero.pretraining.plan import PretrainingPlan
from priorzero.settings import LLMSettings
from priorzero.types import UserError

LOG_EVERY_S = 15.0
ROWS_PER_FORWARD = {"cpu": 2, "cuda": 16}  # of an evaluation

Rows = dict[str, dict[str, float]]


@dataclass
class Progress:
    """How far a training is. It is saved, and a resumed training continues from it.

    Attributes:
        step: number of batches that were learnt.
        seconds: time of the training so far.
        evaluations: for each evaluation its step, the seconds, and the figures of each game.
        skipped: number of samples whose prompt does not fit into the model.
    """

    step: int = 0
    seconds: float = 0.0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0


class Pretrainer:
    """Trains ``llm`` on some episodes and evaluates it on others.

    The gradient comes from :class:`~priorzero.llm.fine_tuning.LLMLearner`, with the correct action in the place of the
    visit counts.
    """

    def __init__(
        self,
        llm: LanguageModel,
        cfg: LLMSettings,
        *,
        style: PromptStyle,
        temperature: float,
        plan: PretrainingPlan,
        training: Sequence[Episode],
        evaluation: Sequence[Episode],
    ) -> None:
        """``cfg`` has the batch size, the learning rate and the objective; ``temperature`` is the prior's.

        Raises:
            UserError: there is nothing to learn from or to evaluate on.
        """
        self.llm, self.plan, self.progress = llm, plan, Progress()
        only_sft = {"enable_sft": True, "enable_rft": False, "llm_loss_weight": 1.0, "kl_weight": 0.0, "rft_clip": 0.0}
        self.cfg = cfg.model_copy(update=only_sft)
        self.learner = LLMLearner(llm, self.cfg, style=style, temperature=temperature)
        self.data = TrainingData(
            PromptMaker(llm, style, training), negatives=plan.negatives, seed=plan.seed, borrow=plan.borrow
        )
        searched = searched_decisions(training)
        # The valid actions of a state that was not searched are not known, so its prompt cannot list them.
        unsearched = [] if style.list_commands else unsearched_decisions(training)
        several = [d for d in searched if len(self.data.prompts.step(d).valid_actions or ()) > 1]
        borrowing = [d for d in unsearched if self.data.can_borrow(d)]
        alone = [d for d in unsearched if not self.data.can_borrow(d)]
        is_text = cfg.objective == "tokens"
        self._among_actions = [] if is_text else [*several, *borrowing]
        texts = {"none": [], "unsearched": alone, "all": [*unsearched, *searched]}
        self._as_text = texts["all" if is_text else plan.tokens]
        self.num_steps = plan.epochs * num_batches(
            len(self._among_actions), len(self._as_text), batch_size=cfg.batch_size
        )
        self._eval_prompts = PromptMaker(llm, style, evaluation)
        self._eval_decisions = searched_decisions(evaluation, per_game=plan.eval_states)
        if not self.num_steps or not self._eval_decisions:
            raise UserError(
                f"{len(training)} games with {len(searched)} states to learn from and {len(self._eval_decisions)} "
                "states to evaluate on: none may be 0; make the data again, or name more games"
            )

    # ---- the loop ----

    def run(self, *, save: Callable[[], None]) -> None:
        """Train to the end of the plan. ``save`` is called from time to time, when :attr:`progress` is up to date.

        Raises:
            UserError: a loss is not finite, or the GPU's memory does not suffice.
        """
        logger.info(
            f"{self.num_steps} batches of {self.cfg.batch_size}: {len(self._among_actions)} decisions among valid "
            f"actions and {len(self._as_text)} commands as text, {self.plan.epochs} epochs"
        )
        if not self.progress.evaluations:
            self.evaluate()
            save()
        started = last_log = last_save = time.monotonic()
        before, first_step = self.progress.seconds, self.progress.step
        losses = _Means()
        for samples in self._batches():
            now = time.monotonic()
            share = self._share(now - started)
            if share >= 1.0:
                break
            for group in self.learner.optimizer.param_groups:
                group["lr"] = self.cfg.learning_rate * self.plan.rate(share)
            if samples:
                losses.add(self._learn(samples), objective=self.learner.objective)
            self.progress.step += 1
            now = time.monotonic()
            self.progress.seconds = before + now - started
            if now - last_log > LOG_EVERY_S or self.progress.step == self.num_steps:
                last_log = now
                self._log(losses.take(), speed=(self.progress.step - first_step) / (now - started))
            if self._evaluation_is_due(share) or now - last_save > 60 * self.plan.save_every:
                if self._evaluation_is_due(share):
                    self.evaluate()
                save()
                paused = time.monotonic() - now
                started, last_save = started + paused, time.monotonic()
        self.evaluate()

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done."""
        return self.progress.step >= self.num_steps

    def _share(self, seconds: float) -> float:
        """The share of the training that is done: of the batches, or of the minutes if that is more."""
        share = self.progress.step / self.num_steps
        return max(share, seconds / (60 * self.plan.minutes)) if self.plan.minutes else share

    def _evaluation_is_due(self, share: float) -> bool:
        done = len(self.progress.evaluations) - 1  # without the one before the training
        return done < self.plan.evaluations and share >= (done + 1) / (self.plan.evaluations + 1)

    def _keys(self) -> Iterator[list[SampleKey]]:
        """The remaining batches of all epochs."""
        step = 0
        for epoch in range(self.plan.epochs):
            batches = training_batches(
                self._among_actions, self._as_text, batch_size=self.cfg.batch_size, epoch=epoch, seed=self.plan.seed
            )
            for batch in batches:
                if step >= self.progress.step:
                    yield batch
                step += 1

    def _batches(self) -> Iterator[list[LLMSample]]:
        """The samples of the remaining batches; sets the learner's objective."""
        keys = list(self._keys())
        loader: Any = DataLoader(
            self.data,
            batch_sampler=keys,
            collate_fn=list,
            num_workers=self.plan.num_workers,
            prefetch_factor=4 if self.plan.num_workers else None,
        )
        for batch, found in zip(keys, loader, strict=True):
            samples = [sample for sample in found if sample is not None]
            self.progress.skipped += len(found) - len(samples)
            self.learner.objective = batch[0].objective
            # Rows of similar length need little padding.
            yield sorted(samples, key=lambda sample: len(sample.row.prompt_ids))

    def _learn(self, samples: list[LLMSample]) -> float:
        return self.learner.learn(samples)["sft_loss"]

    def _log(self, losses: dict[str, float], *, speed: float) -> None:
        progress = self.progress
        means = ", ".join(f"{objective} {loss:.3f}" for objective, loss in losses.items())
        rate = self.learner.optimizer.param_groups[0]["lr"]
        logger.info(
            f"batch {progress.step} of {self.num_steps}, {progress.seconds / 60:.1f} min, loss: {means}; learning rate "
            f"{rate:.2g}, {speed * self.cfg.batch_size:.1f} samples/s"
        )

    # ---- evaluation ----

    def evaluate(self) -> Rows:
        """Evaluate the LLM, log the means and keep the figures of each game."""
        started = time.monotonic()
        rows = self.measure(self._eval_decisions)
        entry = {"step": self.progress.step, "seconds": self.progress.seconds, "games": rows}
        self.progress.evaluations.append(entry)
        for name, row in group_means(rows).items():
            logger.info(
                f"evaluation after {self.progress.step} batches, {name} ({row['states']:.0f} states, uniform in "
                f"brackets): place {row['place']:.2f} ({row['uniform_place']:.2f}), first {row['first']:.1%} "
                f"({row['uniform_first']:.1%}), log-probability {row['logprob']:.3f} ({row['uniform_logprob']:.3f}); "
                f"{time.monotonic() - started:.0f} s"
            )
        return rows

    def measure(self, decisions: Sequence[Decision]) -> Rows:
        """The figures of the LLM in some states of the evaluated episodes, by game."""
        return figures_by_game(
            outcomes(
                self.llm,
                self._eval_prompts,
                decisions,
                rows_per_forward=ROWS_PER_FORWARD[self.llm.device.type],
                num_workers=self.plan.num_workers,
            )
        )

    # ---- saving ----

    def state_dict(self) -> dict[str, Any]:
        """The state of the training: parameters that are trained, optimiser and progress."""
        trained = {name: p.detach().cpu() for name, p in self.llm.model.named_parameters() if p.requires_grad}
        return {
            "parameters": trained,
            "optimizer": self.learner.optimizer.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "num_steps": self.num_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`.

        Raises:
            UserError: it belongs to a training with other arguments or other data.
        """
        own = {name: p for name, p in self.llm.model.named_parameters() if p.requires_grad}
        saved = state["parameters"]
        if {n: p.shape for n, p in own.items()} != {n: p.shape for n, p in saved.items()}:
            raise UserError("--resume: the saved training has other parameters; give the same --config and --set")
        if state["num_steps"] != self.num_steps:
            raise UserError(
                f"--resume: the saved training has {state['num_steps']} batches, this one {self.num_steps}; give the "
                "same --data, --epochs and batch size"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved[name])
        self.learner.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])


class _Means:
    """Mean losses by objective since they were last taken."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, loss: float, *, objective: str) -> None:
        self._values.setdefault(objective, []).append(loss)

    def take(self) -> dict[str, float]:
        means = {objective: sum(values) / len(values) for objective, values in sorted(self._values.items())}
        self._values = {}
        return means


def save_training(folder: Path, pretrainer: Pretrainer) -> None:
    """Write the state of the training into ``folder``; see :func:`load_training`."""
    scratch = folder / ".training_state.new"
    torch.save(pretrainer.state_dict(), scratch)
    scratch.replace(folder / TRAINING_STATE)


def load_training(folder: Path, pretrainer: Pretrainer) -> None:
    """Continue the training whose state is in ``folder``.

    Raises:
        UserError: there is none, it is damaged, or it belongs to another training.
    """
    file = folder / TRAINING_STATE
    if not file.is_file():
        raise UserError(f"--resume: {file} does not exist, so there is nothing to resume; leave --resume out")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"--resume: {file} cannot be read ({error}); leave --resume out") from error
    pretrainer.load_state_dict(state)


TRAINING_STATE = "training_state.pt"
