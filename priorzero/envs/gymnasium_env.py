"""The games of PriorZero as environments of Gymnasium.

>>> env = TextGameEnv("zork1.z5")
>>> observation, info = env.reset(seed=1)
>>> observation, reward, terminated, truncated, info = env.step(info["valid_actions"][0])

``gymnasium.make("priorzero.envs.gymnasium_env:priorzero/TextGame-v0", game="zork1.z5")`` makes the same environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import gymnasium
import numpy as np
from gymnasium import spaces

from priorzero.envs.games import make_game, resolve_game
from priorzero.runtime.paths import shown
from priorzero.types import GameState, TextGame, UserError, ValidActionsMode

ENV_ID = "priorzero/TextGame-v0"
MAX_TEXT = 100_000  # characters of an observation; longer ones are cut
MAX_COMMAND = 1000  # characters
MAX_SEED = 2**31
ActionSpace = Literal["text", "index"]


class AnyText(spaces.Text):
    """Texts of any characters, up to a length. Gymnasium's own space allows a fixed set of characters."""

    def __init__(self, max_length: int, *, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(max_length, min_length=0, seed=seed)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length


class CommandSpace(AnyText):
    """Commands: any text. ``sample`` draws one of ``commands``, the valid actions of the present state."""

    commands: Sequence[str] = ()

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        if mask is None and probability is None and self.commands:
            return self.commands[int(self.np_random.integers(len(self.commands)))]
        return super().sample(mask, probability)


class TextGameEnv(gymnasium.Env[str, Any]):
    """A text game: observations and actions are texts, and ``info`` lists the valid actions.

    - The observation is the game's reply, then the room description and the inventory.
    - An action that is not valid does not reach the game. The observation says so, the reward is 0, ``info`` has
      ``invalid_action=True``, and it counts as a command of the episode.
    - ``info`` has ``valid_actions`` (a list; empty after the end), ``score``, ``max_score`` (0: not known), ``moves``,
      ``won``, ``look``, ``inventory``, ``goal`` and ``invalid_action``. With ``actions="index"`` it also has
      ``action_mask`` ``[max_actions]``, int8, for ``env.action_space.sample(mask)``.
    - ``reset(seed=N)`` opens the game with the seed N. ``reset()`` begins another episode with the same seed, which has
      the same random numbers: equal commands give equal episodes.

    The game runs in this process.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012 (Gymnasium declares it so)

    def __init__(
        self,
        game: str,
        *,
        actions: ActionSpace = "text",
        max_actions: int = 256,
        max_commands: int = 100,
        seed: int = 0,
        look_and_inventory: bool = True,
        drop_inert_commands: bool = True,
        valid_actions: ValidActionsMode = "exact",
        render_mode: str | None = None,
    ) -> None:
        """The game is opened by the first ``reset``.

        Args:
            game: the name of a game, as for ``--env_id``.
            actions: ``"text"``: an action is a command; ``"index"``: its position in ``info["valid_actions"]``.
            max_actions: size of the action space with ``"index"``; further valid actions are left out.
            max_commands: the episode is truncated after this many commands. (``max_episode_steps`` of
                ``gymnasium.make`` is another limit, which Gymnasium itself applies.)
            seed: the game's seed until ``reset`` gets one.
            look_and_inventory: as ``drop_inert_commands`` and ``valid_actions``, see :class:`GameArguments`.
            render_mode: ``"ansi"``: ``render`` returns the last observation; or None.

        Raises:
            UserError: the game cannot be found, or an argument is not allowed.
        """
        if actions not in get_args(ActionSpace):
            raise UserError(f"actions={actions!r} must be one of {', '.join(get_args(ActionSpace))}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UserError(f"render_mode={render_mode!r} must be 'ansi' or None")
        if max_actions < 1 or max_commands < 1:
            raise UserError(f"max_actions={max_actions} and max_commands={max_commands} must be at least 1")
        self._game_spec = resolve_game(game)
        self._arguments: dict[str, Any] = {
            "max_episode_steps": max_commands,
            "look_and_inventory": look_and_inventory,
            "drop_inert_commands": drop_inert_commands,
            "valid_actions": valid_actions,
        }
        self._max_commands = max_commands
        self._max_actions = max_actions if actions == "index" else None
        self._seed = seed
        self._game: TextGame | None = None
        self._state: GameState | None = None
        self._num_invalid = 0
        self._observation = ""
        self.render_mode = render_mode
        self.observation_space = AnyText(MAX_TEXT)
        self.action_space = spaces.Discrete(max_actions) if actions == "index" else CommandSpace(MAX_COMMAND)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None and seed % MAX_SEED != self._seed:
            self.close()
            self._seed = seed % MAX_SEED
        if self._game is None:
            self._game = make_game(self._game_spec, seed=self._seed, **self._arguments)
        self._num_invalid = 0
        self._state = self._game.reset()
        return self._observe(self._state)

    def step(self, action: Any) -> tuple[str, float, bool, bool, dict[str, Any]]:
        state = self._state
        if self._game is None or state is None or state.done:
            raise UserError("step() outside of an episode: call reset() first")
        command = self._command(action, state)
        reward = 0.0
        if command is None:
            self._num_invalid += 1
        else:
            state, reward = self._game.step(command)
            self._state = state
        observation, info = self._observe(state, invalid=action if command is None else None)
        truncated = state.truncated or (not state.done and state.moves + self._num_invalid >= self._max_commands)
        if truncated:
            info["valid_actions"] = []
        return observation, float(reward), state.terminated, truncated, info

    def render(self) -> str | None:
        """The last observation with the render mode ``"ansi"``; else None."""
        return self._observation if self.render_mode == "ansi" else None

    def close(self) -> None:
        if self._game is not None:
            self._game.close()
        self._game = self._state = None

    def _command(self, action: Any, state: GameState) -> str | None:
        """The valid action that ``action`` means; None if it is not valid."""
        if self._max_actions is None:
            return action if action in state.valid_actions else None
        offered = state.valid_actions[: self._max_actions]
        return offered[int(action)] if 0 <= int(action) < len(offered) else None

    def _observe(self, state: GameState, *, invalid: Any = None) -> tuple[str, dict[str, Any]]:
        text = state.raw_obs_text
        if invalid is not None:
            text = f"{shown(str(invalid))} is not a valid action.\n{text}"
        self._observation = text[:MAX_TEXT]
        offered = state.valid_actions[: self._max_actions]
        info: dict[str, Any] = {
            "valid_actions": list(offered),
            "score": float(state.score),
            "max_score": float(state.max_score),
            "moves": state.moves + self._num_invalid,
            "won": state.won,
            "look": state.look,
            "inventory": state.inventory,
            "goal": state.goal,
            "invalid_action": invalid is not None,
        }
        if self._max_actions is not None:
            info["action_mask"] = (np.arange(self._max_actions) < len(offered)).astype(np.int8)
        elif isinstance(self.action_space, CommandSpace):
            self.action_space.commands = state.valid_actions
        return self._observation, info


gymnasium.register(id=ENV_ID, entry_point=f"{__name__}:TextGameEnv")
