"""The decisions of walkthroughs as prompts for the language model, and as training samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from priorzero.envs.frotz_keys import is_key
from priorzero.envs.walkthrough_steps import WalkthroughStep, read_steps
from priorzero.llm.fine_tuning import LLMSample
from priorzero.llm.models import LanguageModel
from priorzero.llm.packing import PromptRow
from priorzero.llm.prompts import PromptStyle, completion_text, render_prompt
from priorzero.pretraining.games import Split
from priorzero.types import HistoryStep, PriorRequest, PromptTooLongError, UserError

Objective = Literal["actions", "tokens"]


@dataclass(frozen=True)
class Episode:
    """The walkthrough of a game, and its decisions as later prompts show them."""

    game: str
    split: Split
    steps: tuple[WalkthroughStep, ...]
    history: tuple[HistoryStep, ...]


class Decision(NamedTuple):
    """A state of an episode, by the position of the episode in a list and the number of the step."""

    episode: int
    step: int


def load_episodes(folder: Path, splits: Sequence[Split]) -> list[Episode]:
    """The episodes of some splits in a folder that :func:`~priorzero.pretraining.collect.collect` wrote.

    Raises:
        UserError: there is no file of one of the splits, or a file cannot be read.
    """
    episodes = []
    for split in splits:
        files = sorted((folder / split).glob("*.jsonl"))
        if not files:
            raise UserError(
                f"{folder / split} contains no games; type python -m priorzero.pretrain --data {folder} "
                "--collect_only, with PRIORZERO_GAMES=FOLDER for the story files"
            )
        for file in files:
            steps = tuple(read_steps(file))
            episodes.append(Episode(file.stem, split, steps, tuple(step.history_step() for step in steps)))
    return episodes


def searched_decisions(episodes: Sequence[Episode], *, per_game: int | None = None) -> list[Decision]:
    """The decisions among whose valid actions the correct one is known, at most ``per_game`` evenly spread ones."""
    found = []
    for number, episode in enumerate(episodes):
        steps = [n for n, step in enumerate(episode.steps) if step.correct is not None]
        count = len(steps) if per_game is None else min(per_game, len(steps))
        chosen = [steps[len(steps) * (2 * part + 1) // (2 * count)] for part in range(count)]
        found += [Decision(number, step) for step in chosen]
    return found


def unsearched_decisions(episodes: Sequence[Episode]) -> list[Decision]:
    """The decisions of which only the command is known, without commands that change neither room nor inventory.

    Such commands, most of them "examine" and "wait", are rarely valid actions.
    """
    return [
        Decision(number, n)
        for number, episode in enumerate(episodes)
        for n, step in enumerate(episode.steps)
        if step.correct is None and not is_key(step.action) and _changes(episode, n)
    ]


def _changes(episode: Episode, step: int) -> bool:
    """Whether the next state is another place, or the command gained points."""
    own, following = episode.history[step], episode.history[step + 1 : step + 2]
    return bool(own.reward) or not following or following[0].place != own.place


@dataclass(frozen=True)
class PromptMaker:
    """Renders the prompts of episodes in one style, for the tokenizer of ``llm``."""

    llm: LanguageModel
    style: PromptStyle
    episodes: Sequence[Episode]

    def request(self, decision: Decision) -> PriorRequest:
        """The request for a prior, as an agent makes it in this state."""
        episode = self.episodes[decision.episode]
        state = episode.steps[decision.step].state()
        history = episode.history[: decision.step]
        prompt = render_prompt(state, history, style=self.style, tokenizer=self.llm.tokenizer)
        return PriorRequest(prompt.text, state.valid_actions)

    def step(self, decision: Decision) -> WalkthroughStep:
        """The state and its command."""
        return self.episodes[decision.episode].steps[decision.step]

    def row(self, prompt: str, actions: Sequence[str]) -> PromptRow:
        """The token ids of a prompt and of actions; raises PromptTooLongError as :meth:`LanguageModel.row`."""
        completions = [completion_text(action, style=self.style) for action in actions]
        return self.llm.row(prompt, completions, end_of_turn=self.style.ends_turn)


class SampleKey(NamedTuple):
    """Which sample to make: a decision, what is trained, and the epoch, on which the sampled negatives depend."""

    decision: Decision
    objective: Objective
    epoch: int


class TrainingData(Dataset[LLMSample | None]):
    """Makes training samples: ``data[SampleKey]``; None if a prompt does not fit into the model.

    Objective ``actions``: the correct action among at most ``negatives`` other valid actions, drawn anew in each epoch.
    Objective ``tokens``: the text of the command. ``borrow`` is that of the plan.
    """

    def __init__(self, prompts: PromptMaker, *, negatives: int, seed: int, borrow: int = 0) -> None:
        self.prompts = prompts
        self._negatives = negatives
        self._seed = seed
        self._borrow = borrow

    def can_borrow(self, decision: Decision) -> bool:
        """Whether there are other actions that the decision can borrow."""
        return len(self._actions(decision)[0]) > 1

    def _actions(self, decision: Decision) -> tuple[list[str], int]:
        """The valid actions of a decision, which may be borrowed, and the position of the correct one."""
        step = self.prompts.step(decision)
        if step.valid_actions is not None and step.correct is not None:
            return list(step.valid_actions), step.correct
        pool = {step.action: None}
        if self._borrow:
            steps = self.prompts.episodes[decision.episode].steps
            for other in steps[max(0, decision.step - self._borrow) : decision.step + self._borrow + 1]:
                pool |= dict.fromkeys([*(other.valid_actions or ()), other.action])
        return [action for action in pool if action == step.action or not is_key(action)], 0

    def __getitem__(self, key: SampleKey) -> LLMSample | None:
        decision, objective, epoch = key
        step = self.prompts.step(decision)
        actions, correct = [step.action], 0
        if objective == "actions":
            valid, own = self._actions(decision)
            rng = np.random.default_rng([self._seed, epoch, *decision])
            others = [k for k in range(len(valid)) if k != own]
            kept = sorted([*rng.permutation(others)[: self._negatives].tolist(), own])
            actions, correct = [valid[k] for k in kept], kept.index(own)
        try:
            row = self.prompts.row(self.prompts.request(decision).prompt, actions)
        except PromptTooLongError:
            return None
        target = np.zeros(len(actions), np.float32)
        target[correct] = 1.0
        return LLMSample(row, target, correct, advantage=0.0, rollout_logprob=math.nan)


class EvaluationData(Dataset[PromptRow | None]):
    """Makes the rows of decisions with all their valid actions: ``data[Decision]``; None if a prompt does not fit."""

    def __init__(self, prompts: PromptMaker) -> None:
        self.prompts = prompts

    def __getitem__(self, decision: Decision) -> PromptRow | None:
        request = self.prompts.request(decision)
        try:
            return self.prompts.row(request.prompt, request.valid_actions)
        except PromptTooLongError:
            return None


def training_batches(
    searched: Sequence[Decision],
    unsearched: Sequence[Decision],
    *,
    batch_size: int,
    epoch: int,
    seed: int,
) -> list[list[SampleKey]]:
    """The batches of an epoch in random order. All samples of a batch have the same objective.

    Args:
        searched: decisions for the objective ``actions``.
        unsearched: decisions for the objective ``tokens``.
        batch_size: samples of a batch; the last one of each objective may be smaller.
        epoch: number of the epoch.
        seed: of the order.
    """
    rng = np.random.default_rng([seed, epoch])
    batches = []
    objectives: tuple[Objective, Objective] = ("actions", "tokens")
    for objective, decisions in zip(objectives, (searched, unsearched), strict=True):
        order = rng.permutation(len(decisions))
        keys = [SampleKey(decisions[n], objective, epoch) for n in order]
        batches += [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    return [batches[n] for n in rng.permutation(len(batches))]


def num_batches(num_searched: int, num_unsearched: int, *, batch_size: int) -> int:
    """The number of batches of an epoch."""
    return -(-num_searched // batch_size) - (-num_unsearched // batch_size)


def describe(episodes: Sequence[Episode]) -> Iterator[dict[str, Any]]:
    """For each episode: the game, its commands, the states with valid actions, and those with the correct action."""
    for episode in episodes:
        yield {
            "game": episode.game,
            "split": episode.split,
            "commands": len(episode.steps),
            "searched": sum(step.valid_actions is not None for step in episode.steps),
            "correct": sum(step.correct is not None for step in episode.steps),
        }
