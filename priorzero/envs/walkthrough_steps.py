"""Records of the states and commands of a walkthrough, and their files. This module needs no emulator."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from priorzero.types import GameState, HistoryStep, UserError


@dataclass(frozen=True, slots=True)
class WalkthroughStep:
    """A state of a walkthrough and the command that is given there.

    Attributes:
        game: the game's short name, as :attr:`GameSpec.name`.
        step: number of commands before this one.
        goal, feedback, look, inventory, score, max_score, moves: those of the :class:`GameState`.
        reward: points that the command gained.
        command: the command as the walkthrough has it.
        action: the command written out: the valid action with its effect if there is one.
        valid_actions: the valid actions of the state; None if they were not searched.
        correct: position in ``valid_actions`` of the action that leads to the same world; None if there is none.
    """

    game: str
    step: int
    goal: str
    feedback: str
    look: str
    inventory: str
    score: float
    max_score: float
    moves: int
    reward: float
    command: str
    action: str
    valid_actions: tuple[str, ...] | None = None
    correct: int | None = None

    def state(self) -> GameState:
        """The state of the game. Without searched valid actions, the only one is the command."""
        return GameState(
            feedback=self.feedback,
            valid_actions=self.valid_actions or (self.action,),
            score=self.score,
            max_score=self.max_score,
            moves=self.moves,
            look=self.look,
            inventory=self.inventory,
            goal=self.goal,
        )

    def history_step(self) -> HistoryStep:
        """The decision as later prompts show it."""
        state = self.state()
        return HistoryStep(state.feedback, self.action, self.reward, state.place, state.room, state.score)


def write_steps(file: Path, steps: Iterable[WalkthroughStep]) -> None:
    """Write one line of JSON for each step. The file is complete, or it is not there."""
    scratch = file.with_name(f".{file.name}.new")
    with scratch.open("w", encoding="utf-8") as out:
        for step in steps:
            out.write(json.dumps(dataclasses.asdict(step), ensure_ascii=False) + "\n")
    scratch.replace(file)


def read_steps(file: Path) -> Iterator[WalkthroughStep]:
    """The steps that :func:`write_steps` wrote.

    Raises:
        UserError: the file is not such a file.
    """
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            actions = entry.pop("valid_actions")
            yield WalkthroughStep(**entry, valid_actions=None if actions is None else tuple(actions))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: is not a file of walkthrough steps ({error}); delete it to make it again") from error
