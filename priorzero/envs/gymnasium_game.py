"""Text environments of Gymnasium as games: ``gymnasium:ENV_ID?KEY=VALUE&...``."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any, Unpack

from priorzero.envs.registry import parse_number, read_parameter
from priorzero.envs.validation import check_action
from priorzero.runtime.paths import shown
from priorzero.types import GameArguments, GameState, UserError

# The keys of ``info`` under which environments list their commands.
COMMAND_KEYS = ("valid_actions", "admissible_commands")
EXAMPLE = "gymnasium:my_package:MyText-v0?commands=admissible_commands"


def make_gymnasium_game(level: str, parameters: Mapping[str, str], **arguments: Unpack[GameArguments]) -> GymnasiumGame:
    """The factory of ``gymnasium:ENV_ID?...``.

    Args:
        level: the environment's id, as for ``gymnasium.make``: ``Namespace/Name-v0``, or ``module:Name-v0`` if a module
            must be imported to register it.
        parameters: ``commands``: the key of ``info`` that lists the commands; ``seed``: of ``reset``, default 0;
            ``max_score``: the largest possible sum of rewards, default: ``info["max_score"]``, or not known. All others
            are passed to the environment: whole numbers, numbers, ``true`` and ``false`` as such, else as texts.
        arguments: see :class:`GameArguments`. The seed is not used, since it selects the level in many environments.

    Raises:
        UserError: the environment does not exist or cannot be made.
    """
    import gymnasium

    if not level:
        raise UserError(f"the environment is missing. Name it, such as {EXAMPLE!r}")
    own = ("commands", "seed", "max_score")
    options: dict[str, Any] = {key: _plain(value) for key, value in parameters.items() if key not in own}
    seed, max_score = read_parameter(parameters, "seed", 0), read_parameter(parameters, "max_score", 0.0)
    if seed < 0 or max_score < 0:
        raise UserError(f"seed={seed} and max_score={max_score:g} must be at least 0")
    try:
        env = gymnasium.make(level, disable_env_checker=True, **options)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise UserError(
            f"there is no Gymnasium environment {level!r} ({error}). Give its id, such as 'Name-v0'. If a module "
            f"registers it, name the module first: {EXAMPLE!r}"
        ) from error
    return GymnasiumGame(
        env,
        commands=parameters.get("commands", ""),
        seed=seed,
        max_score=max_score,
        max_episode_steps=arguments["max_episode_steps"],
    )


class GymnasiumGame:
    """A Gymnasium environment whose observations are texts and whose ``info`` lists the commands.

    The score is the sum of the rewards. ``info["won"]`` and ``info["goal"]`` are used if they exist. If the action
    space is discrete, the position of the command in the list of ``info`` is sent, else the command itself.
    """

    def __init__(self, env: Any, *, commands: str, seed: int, max_score: float, max_episode_steps: int) -> None:
        """
        Args:
            env: the environment. It is closed with the game.
            commands: the key of ``info``; "": the first of :data:`COMMAND_KEYS` that exists.
            seed: of every ``reset``.
            max_score: the largest possible score; 0: ``info["max_score"]``, if it exists.
            max_episode_steps: the episode is truncated after this many commands, or earlier by the environment.
        """
        from gymnasium.spaces import Discrete

        self._env = env
        self._key = commands
        self._seed = seed
        self._given_max_score = self._max_score = max_score
        own_limit = env.spec.max_episode_steps if env.spec is not None else None
        self._max_moves = min(max_episode_steps, own_limit or max_episode_steps)
        self._sends_position = isinstance(env.action_space, Discrete)
        self._actions: dict[str, Any] = {}  # what is sent for each valid action
        self._state: GameState | None = None

    def reset(self) -> GameState:
        observation, info = self._env.reset(seed=self._seed)
        self._max_score = self._given_max_score or self._read_max_score(info)
        self._state = self._observe(observation, info, score=0.0, moves=0, terminated=False, truncated=False)
        return self._state

    def step(self, action: str) -> tuple[GameState, float]:
        before = check_action(self._state, action)
        observation, reward, terminated, truncated, info = self._env.step(self._actions[action])
        self._state = self._observe(
            observation,
            info,
            score=before.score + float(reward),
            moves=before.moves + 1,
            terminated=bool(terminated),
            truncated=bool(truncated),
        )
        return self._state, float(reward)

    def close(self) -> None:
        self._env.close()
        self._state = None

    def _observe(
        self, observation: Any, info: Mapping[str, Any], *, score: float, moves: int, terminated: bool, truncated: bool
    ) -> GameState:
        if not isinstance(observation, str):
            raise UserError(
                f"{self._label()}: the observation is a {type(observation).__name__}, not a text. Only environments "
                "with texts can be played. A gymnasium.ObservationWrapper can turn other observations into texts"
            )
        truncated = not terminated and (truncated or moves >= self._max_moves)
        done = terminated or truncated
        self._actions = {} if done else self._read_commands(info)
        goal = info.get("goal", "")
        return GameState(
            feedback=str(observation).strip(),
            valid_actions=tuple(self._actions),
            score=score,
            max_score=self._max_score,
            moves=moves,
            done=done,
            won=terminated and bool(info.get("won", False)),
            goal=str(goal) if isinstance(goal, str) else "",
            truncated=truncated,
            max_moves=self._max_moves,
        )

    def _read_max_score(self, info: Mapping[str, Any]) -> float:
        """``info["max_score"]``; 0 if it is None or does not exist.

        Raises:
            UserError: it is not a number.
        """
        given = info.get("max_score")
        if given is None:
            return 0.0
        if not isinstance(given, numbers.Real):
            raise UserError(f"{self._label()}: info['max_score'] is {shown(repr(given))}. Allowed is a number, or None")
        return float(given)

    def _read_commands(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """What is sent for each valid action, sorted by the action.

        Raises:
            UserError: ``info`` does not list the commands.
        """
        keys = [self._key] if self._key else [key for key in COMMAND_KEYS if key in info]
        if not keys or keys[0] not in info:
            wanted = repr(self._key) if self._key else " or ".join(map(repr, COMMAND_KEYS))
            raise UserError(
                f"{self._label()}: info has no {wanted}, so the commands are not known. It has: "
                f"{', '.join(map(repr, info)) or 'nothing'}. Name the key that lists the commands with ?commands=KEY"
            )
        listed = info[keys[0]]
        if isinstance(listed, str) or not all(isinstance(command, str) for command in listed):
            raise UserError(f"{self._label()}: info[{keys[0]!r}] is {shown(repr(listed))}. Allowed is a list of texts")
        if not len(listed):
            raise UserError(f"{self._label()}: info[{keys[0]!r}] is empty, although the episode has not ended")
        sent: dict[str, Any] = {}
        for position, command in enumerate(listed):
            sent.setdefault(str(command).strip(), position if self._sends_position else str(command))
        return dict(sorted(sent.items()))

    def _label(self) -> str:
        return f"the Gymnasium environment {self._env.spec.id if self._env.spec is not None else self._env}"


def _plain(text: str) -> int | float | bool | str:
    """The value of a parameter: a finite number, True or False if it reads so, else the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    number = parse_number(text)
    return text if number is None else number
