"""BabyAI's levels as text games (Chevalier-Boisvert et al. 2019), played with minigrid."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
from typing import Any

from priorzero.envs.babyai_text import NOTHING, describe_carried, describe_view
from priorzero.envs.validation import check_action, check_arguments
from priorzero.runtime.packages import INSTALL
from priorzero.types import GameState, UserError, ValidActionsMode

# minigrid's seventh action, "done", has no effect in these levels.
ACTIONS = {"turn left": 0, "turn right": 1, "go forward": 2, "pick up": 3, "drop": 4, "toggle": 5}
TURNS = (0, 1)  # always change something
MAX_SCORE = 1.0


class BabyAIGame:
    """A level of BabyAI with one layout. It uses no random numbers apart from those that make the layout.

    - The observation is the view of the agent in BabyAI-Text's wording, followed by the mission in a line of its own.
      The mission is also :attr:`GameState.goal`. The carried object is :attr:`GameState.inventory`.
    - The score is minigrid's reward: 0 until the mission is fulfilled, then ``1 - 0.9 * moves / limit``, where the
      limit is the level's own limit of moves (64 for a room of 8 x 8 cells). A mission that is fulfilled at once has
      nearly 1, the last possible move 0.1.
    - The episode is won if the mission is fulfilled, and lost if it can no longer be fulfilled (levels that forbid the
      wrong object or door). It is truncated by the level's limit or by ``max_episode_steps``, whichever is smaller.
    """

    def __init__(
        self,
        level_id: str,
        *,
        layout: int | None = None,
        seed: int,
        max_episode_steps: int,
        look_and_inventory: bool,
        drop_inert_commands: bool,
        valid_actions: ValidActionsMode = "exact",
    ) -> None:
        """Open a level; see :class:`GameArguments`.

        Inert commands are those that change nothing and do not advance the mission, such as "drop" with empty hands.
        Without ``drop_inert_commands``, all six commands are valid in each state. ``valid_actions`` has no effect.

        Args:
            level_id: minigrid's name of the level, such as ``BabyAI-GoToLocal-v0``.
            layout: the seed of the layout; None: ``seed``, so that games with different seeds have different layouts.

        Raises:
            UserError: minigrid is not installed.
            ValueError: an argument has another type or is too small, or there is no such level.
        """
        check_arguments(
            seed=seed,
            max_episode_steps=max_episode_steps,
            look_and_inventory=look_and_inventory,
            drop_inert_commands=drop_inert_commands,
            valid_actions=valid_actions,
        )
        self._env = make_env(level_id)
        self._layout = seed if layout is None else layout
        self._max_episode_steps = max_episode_steps
        self._look_and_inventory = look_and_inventory
        self._drop_inert_commands = drop_inert_commands
        self._state: GameState | None = None

    def reset(self) -> GameState:
        reset_env(self._env, self._layout)
        self._state = self._observe(moves=0, score=0.0)
        return self._state

    def step(self, action: str) -> tuple[GameState, float]:
        before = check_action(self._state, action)
        _, reward, ended, _, _ = self._env.step(ACTIONS[action])
        self._state = self._observe(
            moves=before.moves + 1, score=before.score + float(reward), ended=ended, won=ended and reward > 0
        )
        return self._state, self._state.score - before.score

    def close(self) -> None:
        self._env.close()
        self._state = None

    def _observe(self, *, moves: int, score: float, ended: bool = False, won: bool = False) -> GameState:
        env = self._env
        limit = min(self._max_episode_steps, env.max_steps)
        truncated = not ended and moves >= limit
        seen = ", ".join(describe_view(env.gen_obs()["image"])) or NOTHING
        carried = describe_carried(env.carrying.type, env.carrying.color) if env.carrying else ""
        # The view is the first line, so that it identifies the room. The mission is part of the text, because one world
        # model may play layouts with different missions.
        text = f"{seen}\n{env.mission}"
        return GameState(
            feedback=f"{carried}, {text}" if carried else text,
            valid_actions=() if ended or truncated else self._valid_actions(),
            score=score,
            max_score=MAX_SCORE,
            moves=moves,
            done=ended or truncated,
            won=won,
            look=text if self._look_and_inventory else "",
            inventory=carried if self._look_and_inventory else "",
            goal=env.mission,
            truncated=truncated,
            max_moves=limit,
        )

    def _valid_actions(self) -> tuple[str, ...]:
        if not self._drop_inert_commands:
            return tuple(ACTIONS)
        now = _progress(self._env)
        return tuple(action for action, number in ACTIONS.items() if self._has_effect(number, now))

    def _has_effect(self, number: int, now: tuple[Any, ...]) -> bool:
        """Try an action on a copy. A level may accept one that changes nothing: "go to the ball" in front of it."""
        if number in TURNS:
            return True
        trial = copy.deepcopy(self._env)
        ended = trial.step(number)[2]
        return bool(ended) or _progress(trial) != now


def _progress(env: Any) -> tuple[Any, ...]:
    """All that an action can change, but the number of moves: the world, the agent, and the parts of the mission."""
    carried = env.carrying and env.carrying.encode()
    return env.grid.encode().tobytes(), tuple(map(int, env.agent_pos)), env.agent_dir, carried, _done_parts(env.instrs)


def _done_parts(instruction: Any) -> tuple[Any, ...]:
    """Which parts of a mission such as "open the door, then go to the ball" are done."""
    if not hasattr(instruction, "instr_a"):
        return ()
    parts = _done_parts(instruction.instr_a), _done_parts(instruction.instr_b)
    return (getattr(instruction, "a_done", False), getattr(instruction, "b_done", False), *parts)


def check_installed() -> None:
    """Raise a UserError if minigrid is not installed."""
    if importlib.util.find_spec("minigrid") is None:
        raise UserError(
            f"BabyAI's levels need the package minigrid, which is not installed. Type: {INSTALL['minigrid']} "
            "(the extra [babyai] of priorzero contains it)"
        )


def make_env(level_id: str) -> Any:
    """The environment of a level, without gymnasium's wrappers.

    Raises:
        UserError: minigrid is not installed.
        ValueError: there is no such level.
    """
    check_installed()
    import gymnasium
    import minigrid  # noqa: F401  registers the levels

    if level_id not in gymnasium.registry:
        raise ValueError(f"{level_id!r} is not a level of minigrid")
    return gymnasium.make(level_id, disable_env_checker=True).unwrapped


def reset_env(env: Any, layout: int) -> None:
    """Begin an episode with a layout."""
    with contextlib.redirect_stdout(io.StringIO()):  # minigrid prints the layouts that it rejects
        env.reset(seed=layout)
