"""Generated text games through TextWorld."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from priorzero.types import GameState, UserError

FALLBACK_ACTIONS = ("look", "inventory")
_PROMPT = re.compile(r"\n>[^\n]*\Z")  # the prompt, and behind it the status line ("> ... -= Kitchen =-5/6")
_QUESTION = re.compile(r"\n\s*Would you like to RESTART, RESTORE[^\n]*\s*\Z")
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")


class TextWorldGame:
    """One game in this process. Equal commands give equal texts: these games have no random numbers of their own."""

    def __init__(
        self,
        path: str | Path,
        *,
        seed: int,
        max_episode_steps: int,
        look_and_inventory: bool,
        drop_inert_commands: bool,
    ) -> None:
        """Open a game.

        Args:
            path: the ``.z8`` file; TextWorld's ``.json`` must lie beside it.
            seed: of the emulator's random numbers.
            max_episode_steps: commands after which an episode is cut (``done`` and ``truncated``).
            look_and_inventory: fill ``GameState.look`` and ``GameState.inventory``.
            drop_inert_commands: leave out ``examine ...``, ``look`` and ``inventory``, which change nothing. Where
                reading something is part of the task (the cookbook of the cooking games), keep them.

        Raises:
            UserError: a file is missing.
            ValueError: a negative seed or an empty episode.
        """
        if seed < 0 or max_episode_steps < 1:
            raise ValueError(f"seed={seed} must be 0 or more, max_episode_steps={max_episode_steps} 1 or more")
        for file in (Path(path), Path(path).with_suffix(".json")):
            if not file.is_file():
                raise UserError(f"{str(file)!r} is missing: a TextWorld game is a .z8 file with its .json beside it.")
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
            # TextWorld reads score and commands in ways of its own, so what Jericho cannot do does not matter.
            warnings.filterwarnings("ignore", message="Game .* is not fully supported")
            self._env = textworld.start(str(path), infos)
        self._env.seed(seed + 1)  # Jericho takes 0 for "by the clock" in games without a seed of their own
        self._max_episode_steps = max_episode_steps
        self._look_and_inventory = look_and_inventory
        self._drop_inert_commands = drop_inert_commands
        self._state: GameState | None = None

    def reset(self) -> GameState:
        """Begin again from the very beginning."""
        self._state = self._observe(self._env.reset(), moves=0)
        return self._state

    def step(self, action: str) -> tuple[GameState, float]:
        """Give a command; return the new state and the points that it gained.

        Raises:
            ValueError: the episode is over or has not begun, or ``action`` is not one of the state's valid actions.
        """
        if self._state is None or self._state.done:
            raise ValueError(f"step({action!r}) after the end of an episode: call reset() first")
        if action not in self._state.valid_actions:
            raise ValueError(f"{action!r} is not among the valid actions {self._state.valid_actions}")
        raw, _, _ = self._env.step(action)
        before, self._state = self._state, self._observe(raw, moves=self._state.moves + 1)
        return self._state, self._state.score - before.score

    def close(self) -> None:
        """Free the emulator's memory. Nothing else may be called afterwards."""
        self._env.close()
        self._state = None

    def _observe(self, raw: dict[str, Any], *, moves: int) -> GameState:
        ended = bool(raw["won"] or raw["lost"])
        truncated = not ended and moves >= self._max_episode_steps
        actions = () if ended or truncated else self._filter(raw["admissible_commands"])
        is_fallback = not actions and not ended and not truncated
        shows = self._look_and_inventory and not ended  # after the end TextWorld repeats the last ones
        return GameState(
            feedback=clean_text(raw["feedback"]),
            valid_actions=FALLBACK_ACTIONS if is_fallback else actions,
            score=float(raw["score"]),
            max_score=float(raw["max_score"]),
            moves=moves,
            done=ended or truncated,
            won=bool(raw["won"]),
            look=clean_text(raw["description"]) if shows else "",
            inventory=clean_text(raw["inventory"]) if shows else "",
            goal=clean_text(raw["objective"] or ""),
            truncated=truncated,
            actions_are_fallback=is_fallback,
        )

    def _filter(self, commands: list[str]) -> tuple[str, ...]:
        commands = sorted(set(commands))
        active = [command for command in commands if not is_inert(command)]
        return tuple(active if self._drop_inert_commands and active else commands)


def is_inert(command: str) -> bool:
    """Whether a command only shows something."""
    return command in ("look", "inventory") or command.startswith("examine ")


def clean_text(text: str) -> str:
    """The words that a TextWorld game prints: without the ASCII-art title, prompt, status line and runs of blank lines.

    The statement of the task, which follows the title, is kept.
    """
    text = _QUESTION.sub("", _PROMPT.sub("", text))
    kept = [line.strip() for line in text.split("\n") if not line.strip() or any(map(str.isalnum, line))]
    return _BLANK_LINES.sub("\n\n", "\n".join(kept)).strip()
