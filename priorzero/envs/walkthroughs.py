"""The states and commands of a game's walkthrough: Jericho's solutions, and those of generated games."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from priorzero.envs.child import run_in_fork
from priorzero.envs.frotz import EmulatorState, RestorableFrotzEnv
from priorzero.envs.frotz_keys import KEY_COMMANDS, is_key
from priorzero.envs.games import GameSpec, make_game
from priorzero.envs.jericho_game import JerichoGame
from priorzero.envs.walkthrough_steps import WalkthroughStep
from priorzero.types import GameState, UserError

NEVER = 10**9  # the walkthrough ends the episode
COMPARE_TIMEOUT_S = 60.0
# Commands that Jericho's walkthroughs abbreviate.
WHOLE_COMMANDS = {
    "n": "north", "s": "south", "e": "east", "w": "west", "ne": "northeast", "nw": "northwest", "se": "southeast",
    "sw": "southwest", "u": "up", "d": "down", "l": "look", "i": "inventory", "inv": "inventory", "z": "wait",
    "y": "yes",
}  # fmt: skip
FIRST_WORDS = {"x": "examine", "l": "look", "get": "take"}
MOVEMENTS = ("in", "into", "on", "onto", "off", "out", "up", "down")  # "get out" does not mean "take out"
AGAIN = ("g", "again")


def collect_walkthrough(
    spec: GameSpec,
    *,
    max_states: int | None = None,
    seconds: float | None = None,
    num_threads: int | None = None,
) -> list[WalkthroughStep]:
    """Play the walkthrough of a game and search the valid actions of its states.

    Args:
        spec: the game.
        max_states: search the valid actions of at most this many states, evenly spread; None: of all states.
        seconds: begin no further search of valid actions after this time. The states that were searched until then are
            evenly spread, too. None: no limit. TextWorld lists valid actions by itself, so it needs no limit.
        num_threads: of the search; see :class:`~priorzero.envs.frotz.ReproducibleFrotzEnv`.

    Raises:
        UserError: the game has no walkthrough.
    """
    if spec.kind == "textworld":
        return _collect_textworld(spec)
    game = _RecordedGame(
        spec.story,
        seed=0,  # the walkthrough is for it
        max_episode_steps=NEVER,
        look_and_inventory=True,
        valid_actions="fast",
        num_threads=num_threads,
    )
    try:
        steps = _play(game, spec)
        deadline = None if seconds is None else time.monotonic() + seconds
        chosen = spread(len(steps)) if max_states is None else evenly(len(steps), count=max_states)
        for position in chosen:
            if deadline is not None and time.monotonic() > deadline:
                break
            steps[position] = _with_valid_actions(steps[position], game, game.states[position])
    finally:
        game.close()
    return [_written_out(step, steps[:position]) for position, step in enumerate(steps)]


class _RecordedGame(JerichoGame):
    """Keeps the emulator's state before each command. While it is played, no valid actions are searched."""

    def __init__(self, path: Path, **arguments: Any) -> None:
        super().__init__(path, **arguments)
        self.states: list[EmulatorState] = []

    def _valid_actions(self, state: EmulatorState) -> tuple[str, ...]:
        self.states.append(state)
        return ("wait",)

    def search(self, state: EmulatorState) -> tuple[str, ...]:
        """The valid actions of ``state``."""
        return super()._valid_actions(state)

    def waits_for_key(self) -> bool:
        """Whether the game waits for a key now."""
        return self._env.waits_for_key()

    def worlds(self, state: EmulatorState, commands: Sequence[str]) -> list[str] | None:
        """A hash of the world in ``state``, and after each command there; None if a command crashes the emulator."""
        compute = functools.partial(_worlds, self._env, state, commands)
        return run_in_fork(compute, otherwise=None, timeout_s=COMPARE_TIMEOUT_S)  # the episode is not disturbed


def _worlds(env: RestorableFrotzEnv, state: EmulatorState, commands: Sequence[str]) -> list[str]:
    env.restore(state)
    hashes = [str(env.get_world_state_hash())]
    for command in commands:
        env.restore(state)
        env.step(command)
        hashes.append(f"halted by {command}" if env._emulator_halted() else str(env.get_world_state_hash()))
    return hashes


def _play(game: _RecordedGame, spec: GameSpec) -> list[WalkthroughStep]:
    """The steps of the walkthrough without valid actions. A key is named as an action that presses it."""
    commands = game.walkthrough()
    if not commands:
        raise UserError(f"{spec.env_id}: Jericho has no walkthrough of this game; name another game")
    steps: list[WalkthroughStep] = []
    state = game.reset()
    for command in commands:
        if state.done:
            break
        key_is_read = game.waits_for_key()
        before, (state, reward) = state, game.step_unchecked(command)
        action = _key_name(command) if key_is_read else command
        steps.append(_step(spec, len(steps), before, reward=reward, command=command, action=action))
    return steps


def _step(
    spec: GameSpec, number: int, state: GameState, *, reward: float, command: str, action: str
) -> WalkthroughStep:
    """The step with this number, without valid actions."""
    return WalkthroughStep(
        game=spec.name,
        step=number,
        goal=state.goal,
        feedback=state.feedback,
        look=state.look,
        inventory=state.inventory,
        score=state.score,
        max_score=state.max_score,
        moves=state.moves,
        reward=reward,
        command=command,
        action=action,
    )


def _key_name(command: str) -> str:
    """The action that presses the first key of a command."""
    pressed = command[:1].lower()
    return next((name for name, key in KEY_COMMANDS.items() if key == pressed), "press space")


def _with_valid_actions(step: WalkthroughStep, game: _RecordedGame, state: EmulatorState) -> WalkthroughStep:
    actions = game.search(state)
    if not actions:
        return step
    return dataclasses.replace(step, valid_actions=actions, correct=_find_correct(step, actions, game, state))


def _find_correct(
    step: WalkthroughStep, actions: Sequence[str], game: _RecordedGame, state: EmulatorState
) -> int | None:
    """The position of the valid action that is the command, or that leads to the same world."""
    for text in (step.action, write_out(step.command)):
        if text in actions:
            return actions.index(text)
    if is_key(step.action):
        return None
    worlds = game.worlds(state, [step.command, *actions])
    if worlds is None:
        return None
    before, wanted, *reached = worlds
    # A command that changes nothing, such as "listen", is not the same as another one of which the hash sees nothing.
    return reached.index(wanted) if wanted != before and wanted in reached else None


def _written_out(step: WalkthroughStep, earlier: Sequence[WalkthroughStep]) -> WalkthroughStep:
    """The step with its action written out."""
    if step.valid_actions is not None and step.correct is not None:
        return dataclasses.replace(step, action=step.valid_actions[step.correct])
    if is_key(step.action):
        return step
    command = step.command
    for before in reversed(earlier):  # "again" repeats the last command that is not "again"
        if command.strip().lower() not in AGAIN:
            break
        command = before.command
    return dataclasses.replace(step, action=write_out(command))


def write_out(command: str) -> str:
    """A command without abbreviations, in lower case: ``examine lamp`` for ``x lamp``."""
    words = command.lower().split()
    whole = " ".join(words)
    if whole in WHOLE_COMMANDS:
        return WHOLE_COMMANDS[whole]
    if words[:2] == ["pick", "up"] and len(words) > 2:
        return " ".join(["take", *words[2:]])
    if len(words) > 1 and words[0] in FIRST_WORDS and not (words[0] == "get" and words[1] in MOVEMENTS):
        return " ".join([FIRST_WORDS[words[0]], *words[1:]])
    return whole


def _collect_textworld(spec: GameSpec) -> list[WalkthroughStep]:
    data: dict[str, Any] = json.loads(spec.story.with_suffix(".json").read_text(encoding="utf-8"))
    commands: list[str] = data["metadata"].get("walkthrough") or []
    if not commands:
        raise UserError(f"{spec.env_id}: TextWorld has no walkthrough of this game; name another game")
    game = make_game(
        spec,
        seed=0,
        max_episode_steps=NEVER,
        look_and_inventory=True,
        drop_inert_commands=not any(command.startswith("examine ") for command in commands),
        valid_actions="exact",
    )
    steps: list[WalkthroughStep] = []
    state = game.reset()
    for command in commands:
        if state.done:
            break
        if command not in state.valid_actions:
            continue  # a command that changes nothing
        before, (state, reward) = state, game.step(command)
        step = _step(spec, len(steps), before, reward=reward, command=command, action=command)
        correct = before.valid_actions.index(command)
        steps.append(dataclasses.replace(step, valid_actions=before.valid_actions, correct=correct))
    game.close()
    return steps


# ---- which states ----


def evenly(num_states: int, *, count: int) -> list[int]:
    """At most ``count`` numbers below ``num_states``, evenly spread: the middles of equal parts."""
    count = min(count, num_states)
    return [num_states * (2 * part + 1) // (2 * count) for part in range(count)]


def spread(num_states: int) -> list[int]:
    """All numbers below ``num_states``, in an order whose every beginning is evenly spread (bit reversal)."""
    bits = max(1, (num_states - 1).bit_length())
    reversed_bits = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(1 << bits))
    return [number for number in reversed_bits if number < num_states]
