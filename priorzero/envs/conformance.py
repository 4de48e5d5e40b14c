"""A check for the authors of games: does a game keep the protocol :class:`~priorzero.types.TextGame`?"""

from __future__ import annotations

import dataclasses
import pickle
import random
from collections import Counter
from collections.abc import Sequence

from priorzero.envs.games import make_game, resolve_game
from priorzero.envs.protocol import check_first_state, check_methods, check_outcome, first_difference
from priorzero.envs.registered_game import call_factory, location
from priorzero.runtime.paths import shown
from priorzero.types import GameArguments, GameState, TextGame, UserError

INVALID_ACTION = "no game has this command"
NAMED_EPISODE_STEPS = 50  # of a game that is given by name
FIELDS = tuple(field.name for field in dataclasses.fields(GameState))


def check_game(game: TextGame | str, *, num_episodes: int = 5, max_commands: int = 200, seed: int = 0) -> None:
    """Play random commands and check that a game does what :class:`~priorzero.types.TextGame` demands.

    Commands that were tried less often are preferred.

    The checks, in this order: the methods exist; the types of the first state; an invalid command is refused with a
    ValueError and changes nothing; in each episode the types of all states, unique and stripped valid actions, the
    reward equals the change of the score, the score is at most the maximum, ``done``, ``won`` and ``truncated`` agree,
    the episode is truncated in time, states can be pickled; after the end a command is refused; ``reset`` begins the
    same episode again; the same commands lead to the same states.

    Args:
        game: a game; it is not closed. Or its name, such as ``"example:small"``: it is opened in this process with a
            limit of 50 commands an episode and closed at the end, and a second game object with the same seed must
            behave as the first one.
        num_episodes: number of episodes.
        max_commands: at most this many commands are played in each; at least 50 if the game is given by name.
        seed: of the random commands, and of a game that is given by name.

    Raises:
        UserError: the first violation: the commands that led to it, what the game returned, and what is allowed.
    """
    if isinstance(game, str):
        _check_named_game(game, num_episodes=num_episodes, max_commands=max_commands, seed=seed)
        return
    play = _Play(game, type(game).__name__, choose=_Chooser(seed), max_commands=max_commands, max_episode_steps=None)
    _check(play, num_episodes=num_episodes)


def _check_named_game(name: str, *, num_episodes: int, max_commands: int, seed: int) -> None:
    spec = resolve_game(name)
    arguments = GameArguments(
        seed=seed,
        max_episode_steps=NAMED_EPISODE_STEPS,
        look_and_inventory=True,
        drop_inert_commands=True,
        valid_actions="exact",
    )
    games: list[TextGame] = []
    try:
        for _ in range(2):
            # Without CheckedGame, which refuses invalid commands itself.
            game = call_factory(spec.request, **arguments) if spec.request is not None else make_game(spec, **arguments)
            check_methods(game, where=name)  # before it is closed below
            games.append(game)
        max_commands = max(max_commands, NAMED_EPISODE_STEPS)  # otherwise a missing end could not be seen
        play = _Play(
            games[0],
            name,
            choose=_Chooser(seed),
            max_commands=max_commands,
            max_episode_steps=NAMED_EPISODE_STEPS,
        )
        _check(play, num_episodes=num_episodes)
        episode = dataclasses.replace(play, choose=_Chooser(seed)).episode()
        _check_replay(games[1], f"{name}: a second game object with the same seed:", episode)
    finally:
        for opened in games:
            opened.close()


def _check(play: _Play, *, num_episodes: int) -> None:
    game, name = play.game, play.name
    check_methods(game, where=name)
    first = _reset(game, where=f"{name}: reset()")
    check_first_state(first, where=f"{name}: reset()", max_episode_steps=play.max_episode_steps)
    _check_refusal(game, f"{name}: step({INVALID_ACTION!r}), which is not a valid action,", INVALID_ACTION)
    for number in range(num_episodes):
        # The first episode continues after the refusal, so that a refused command that changed the game is noticed.
        episode = play.episode(first if number == 0 else None)
        if episode.states[-1].done:
            action = (*episode.states[-1].valid_actions, *episode.commands)[0]
            _check_refusal(game, f"{name}: step({action!r}) after the end of the episode", action)
        _check_replay(game, f"{name}: the second time,", episode)


@dataclasses.dataclass(frozen=True)
class _Episode:
    commands: Sequence[str]
    states: Sequence[GameState]  # one more than commands
    rewards: Sequence[float]


class _Chooser:
    """Chooses a random command, with equal probabilities from all valid ones or from those that were tried least."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._tried: Counter[str] = Counter()

    def __call__(self, actions: Sequence[str]) -> str:
        if self._rng.random() < 0.5:
            least = min(self._tried[action] for action in actions)
            actions = [action for action in actions if self._tried[action] == least]
        action = self._rng.choice(actions)
        self._tried[action] += 1
        return action


@dataclasses.dataclass(frozen=True)
class _Play:
    """Plays random episodes of a game and checks all states.

    Attributes:
        game: the game.
        name: what it is called in messages.
        choose: chooses the commands.
        max_commands: at most this many commands are played in an episode.
        max_episode_steps: the limit with which the game was created; None if it is not known.
    """

    game: TextGame
    name: str
    choose: _Chooser
    max_commands: int
    max_episode_steps: int | None

    def episode(self, first: GameState | None = None) -> _Episode:
        """An episode from ``reset`` on, or from the state ``first`` that it returned."""
        if first is None:
            where = f"{self.name}: reset() after another episode"
            first = _reset(self.game, where=where)
            check_first_state(first, where=where, max_episode_steps=self.max_episode_steps)
        states, commands, rewards = [first], list[str](), list[float]()
        while not states[-1].done and len(commands) < self.max_commands:
            action = self.choose(states[-1].valid_actions)
            where = f"{self.name}: step({action!r}){_after(commands)}"
            outcome = _step(self.game, action, where=where)
            check_outcome(outcome, states[-1], where=where, max_episode_steps=self.max_episode_steps)
            commands.append(action)
            states.append(outcome[0])
            rewards.append(float(outcome[1]))
            _check_picklable(outcome[0], where=where)
        return _Episode(commands, states, rewards)


def _reset(game: TextGame, *, where: str) -> GameState:
    try:
        return game.reset()
    except (Exception, SystemExit) as error:
        raise UserError(f"{where} {_raised(error)}. reset() raises no error.") from error


def _step(game: TextGame, action: str, *, where: str) -> tuple[GameState, float]:
    try:
        return game.step(action)
    except (Exception, SystemExit) as error:
        raise UserError(f"{where} {_raised(error)}. A valid action raises no error.") from error


def _raised(error: BaseException) -> str:
    return f"raised {type(error).__name__}: {error}{location(error)}"


def _check_replay(game: TextGame, where: str, episode: _Episode) -> None:
    """Check that the commands of an episode lead to its states and rewards."""
    rule = "Equal seeds and equal commands since reset() give equal states, since a resumed run replays its episodes."
    difference = first_difference(episode.states[0], _reset(game, where=f"{where} reset()"), names=FIELDS)
    if difference:
        raise UserError(f"{where} reset() gave {difference}. {rule}")
    for n, command in enumerate(episode.commands):
        step = f"{where} step({command!r}){_after(episode.commands[:n])}"
        state, reward = _step(game, command, where=step)
        difference = first_difference(episode.states[n + 1], state, names=FIELDS)
        if not difference and reward != episode.rewards[n]:
            difference = f"the reward {reward:g}, and {episode.rewards[n]:g} before"
        if difference:
            raise UserError(f"{step} gave {difference}. {rule}")


def _check_refusal(game: TextGame, where: str, action: str) -> None:
    try:
        game.step(action)
    except ValueError:
        return
    except (Exception, SystemExit) as error:
        raise UserError(f"{where} {_raised(error)}. Allowed is a ValueError.") from error
    raise UserError(f"{where} raised nothing. Allowed is a ValueError; priorzero.envs.check_action raises it.")


def _check_picklable(state: GameState, *, where: str) -> None:
    try:
        same = pickle.loads(pickle.dumps(state)) == state
    except Exception as error:  # any error of a class that a field has
        raise UserError(f"{where} gave a state that cannot be pickled ({type(error).__name__}: {error}).") from error
    if not same:
        raise UserError(f"{where} gave a state that changes when it is pickled and loaded. Use plain values only.")


def _after(commands: Sequence[str]) -> str:
    return f" after {shown(', '.join(map(repr, commands)))}" if commands else ""
