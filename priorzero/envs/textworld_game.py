"""Generated text games, played with TextWorld."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from priorzero.envs.validation import check_action, check_arguments
from priorzero.types import GameState, UserError, ValidActionsMode

FALLBACK_ACTIONS = ("look", "inventory")
_PROMPT = re.compile(r"\n>[^\n]*\Z")  # the prompt and the status line after it ("> ... -= Kitchen =-5/6")
_QUESTION = re.compile(r"\n\s*Would you like to RESTART, RESTORE[^\n]*\s*\Z")
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")


class TextWorldGame:
    """A TextWorld game. These games use no random numbers."""

    def __init__(
        self,
        path: str | Path,
        *,
        seed: int,
        max_episode_steps: int,
        look_and_inventory: bool,
        drop_inert_commands: bool,
        valid_actions: ValidActionsMode = "exact",
    ) -> None:
        """Open a ``.z8`` file, which has TextWorld's ``.json`` file next to it; see :class:`GameArguments`.

        The inert commands are ``examine ...``, ``look`` and ``inventory``. Games in which something must be read, such
        as the cookbook of the cooking games, need them. ``valid_actions`` has no effect, because TextWorld lists the
        valid actions itself.

        Raises:
            UserError: a file is missing.
            ValueError: an argument has another type or is too small.
        """
        check_arguments(
            seed=seed,
            max_episode_steps=max_episode_steps,
            look_and_inventory=look_and_inventory,
            drop_inert_commands=drop_inert_commands,
            valid_actions=valid_actions,
        )
        for file in (Path(path), Path(path).with_suffix(".json")):
            if not file.is_file():
                raise UserError(
                    f"{str(file)!r} is missing. A TextWorld game needs a .z8 and a .json file of the same name."
                )
        import textworld

        infos = textworld.EnvInfos(
            feedback=True,
            admissible_commands=True,
            score=True,
            max_score=True,
            won=True,
            lost=True,
            objective=True,
            description=look_and_inventory,
            inventory=look_and_inventory,
        )
        with warnings.catch_warnings():
            # TextWorld does not use Jericho to read the score and the valid actions.
            warnings.filterwarnings("ignore", message="Game .* is not fully supported")
            self._env = textworld.start(str(path), infos)
        self._env.seed(seed + 1)  # with 0, Jericho uses the time of day for games that it does not know
        self._path = Path(path)
        self._max_episode_steps = max_episode_steps
        self._look_and_inventory = look_and_inventory
        self._drop_inert_commands = drop_inert_commands
        self._state: GameState | None = None

    def reset(self) -> GameState:
        """Begin a new episode.

        Raises:
            UserError: the ``.json`` file does not belong to the story.
        """
        raw = self._env.reset()
        if _letters(raw["objective"] or "") not in _letters(raw["feedback"]):  # the story states it at the beginning
            data = self._path.with_suffix(".json")
            raise UserError(
                f"The files {str(self._path)!r} and {str(data)!r} do not belong together: the story does not state the "
                "objective of the data. Use the two files that tw-make wrote together."
            )
        self._state = self._observe(raw, moves=0)
        return self._state

    def step(self, action: str) -> tuple[GameState, float]:
        before = check_action(self._state, action)
        raw, _, _ = self._env.step(action)
        self._state = self._observe(raw, moves=before.moves + 1)
        return self._state, self._state.score - before.score

    def close(self) -> None:
        self._env.close()
        self._state = None

    def _observe(self, raw: dict[str, Any], *, moves: int) -> GameState:
        ended = bool(raw["won"] or raw["lost"])
        truncated = not ended and moves >= self._max_episode_steps
        actions = () if ended or truncated else self._filter(raw["admissible_commands"])
        is_fallback = not actions and not ended and not truncated
        observe = self._look_and_inventory and not ended  # after the end, TextWorld repeats the previous texts
        return GameState(
            feedback=clean_text(raw["feedback"]),
            valid_actions=FALLBACK_ACTIONS if is_fallback else actions,
            score=float(raw["score"]),
            max_score=float(raw["max_score"]),
            moves=moves,
            done=ended or truncated,
            won=bool(raw["won"]),
            look=clean_text(raw["description"]) if observe else "",
            inventory=clean_text(raw["inventory"]) if observe else "",
            goal=clean_text(raw["objective"] or ""),
            truncated=truncated,
            actions_are_fallback=is_fallback,
            max_moves=self._max_episode_steps,
        )

    def _filter(self, commands: list[str]) -> tuple[str, ...]:
        commands = sorted(set(commands))
        active = [command for command in commands if not is_inert(command)]
        return tuple(active if self._drop_inert_commands and active else commands)


def _letters(text: str) -> str:
    """The ASCII letters and digits of a text. The story may have other quotes and line breaks than the data."""
    return "".join(character for character in text.lower() if character.isascii() and character.isalnum())


def is_inert(command: str) -> bool:
    """Whether a command only prints information and cannot change the world."""
    return command in ("look", "inventory") or command.startswith("examine ")


def clean_text(text: str) -> str:
    """Remove the ASCII-art title, the prompt, the status line and repeated blank lines from the output of a game.

    The statement of the task, which follows the title, is kept.
    """
    text = _QUESTION.sub("", _PROMPT.sub("", text))
    kept = [line.strip() for line in text.split("\n") if not line.strip() or any(map(str.isalnum, line))]
    return _BLANK_LINES.sub("\n\n", "\n".join(kept)).strip()
