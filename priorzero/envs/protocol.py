"""Checks what a game returns against the protocol :class:`~priorzero.types.TextGame`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from priorzero.envs.validation import check_action
from priorzero.runtime.paths import shown
from priorzero.types import GameState, TextGame, UserError

TOLERANCE = 1e-6  # of sums of rewards, in points
TEXTS = ("feedback", "look", "inventory", "goal")
FLAGS = ("done", "won", "truncated", "actions_are_fallback")


class CheckedGame:
    """A game whose states and rewards are checked. A violation is a UserError, so it ends a run with one message."""

    def __init__(self, game: TextGame, *, name: str, max_episode_steps: int) -> None:
        """``name``: for messages. ``max_episode_steps``: the argument with which the game was created.

        Raises:
            UserError: ``game`` lacks a method of a game.
        """
        self._game = game
        self._where = f"The game {shown(name)!r} violates the protocol of games"
        self._max_episode_steps = max_episode_steps
        self._state: GameState | None = None
        check_methods(game, where=self._where)

    def reset(self) -> GameState:
        state = self._game.reset()
        check_first_state(state, where=f"{self._where}: reset()", max_episode_steps=self._max_episode_steps)
        self._state = state
        return state

    def step(self, action: str) -> tuple[GameState, float]:
        before = check_action(self._state, action)
        outcome = self._game.step(action)
        where = f"{self._where}: step({shown(action)!r}), command {before.moves + 1} of the episode,"
        check_outcome(outcome, before, where=where, max_episode_steps=self._max_episode_steps)
        self._state = outcome[0]
        return outcome

    def close(self) -> None:
        self._game.close()
        self._state = None


def check_methods(game: Any, *, where: str) -> None:
    """Raise a UserError that begins with ``where`` unless ``game`` has the methods of a game."""
    missing = [name for name in ("reset", "step", "close") if not callable(getattr(game, name, None))]
    if missing:
        raise UserError(
            f"{where}: {type(game).__name__} has no method {missing[0]}(). A game has the methods reset(), "
            "step(action) and close()"
        )


def check_first_state(state: Any, *, where: str, max_episode_steps: int | None) -> None:
    """Check what ``reset`` returned.

    Args:
        state: what it returned.
        where: the beginning of a message.
        max_episode_steps: the argument with which the game was created; None: not known.

    Raises:
        UserError: the first violation: what was returned, and what is allowed.
    """
    check_state(state, where=where, max_episode_steps=max_episode_steps)
    if state.moves != 0:
        raise _violation(where, f"moves={state.moves!r}", "0 at the beginning of an episode")
    if state.done:
        raise _violation(where, "done=True", "False, since an episode has at least one command")


def check_outcome(outcome: Any, before: GameState, *, where: str, max_episode_steps: int | None) -> None:
    """Check what ``step`` returned in the state ``before``; see :func:`check_first_state`."""
    if not isinstance(outcome, tuple) or len(outcome) != 2:
        raise _violation(where, shown(repr(outcome)), "a tuple of the new GameState and the reward", verb="returned")
    state, reward = outcome
    check_state(state, where=where, max_episode_steps=max_episode_steps)
    _check_number("the reward", reward, where=where)
    if state.moves != before.moves + 1:
        raise _violation(where, f"moves={state.moves}", f"{before.moves + 1}, one more than before")
    if abs(state.score - before.score - reward) > TOLERANCE:
        raise _violation(
            where,
            f"the reward {reward:g}, while the score changed from {before.score:g} to {state.score:g}",
            f"{state.score - before.score:g}: the reward is the number of points that the command gained",
        )
    for name in ("max_score", "max_moves"):
        if getattr(state, name) != getattr(before, name):
            raise _violation(
                where,
                f"{name}={getattr(state, name)!r}, which was {getattr(before, name)!r} before",
                "the same value in all states of an episode",
            )


def check_state(state: Any, *, where: str, max_episode_steps: int | None) -> None:
    """Check one state by itself; see :func:`check_first_state`."""
    if not isinstance(state, GameState):
        raise _violation(where, f"a {type(state).__name__}", "a priorzero.types.GameState", verb="returned")
    for name in TEXTS:
        _check_text(name, getattr(state, name), where=where)
    for name in FLAGS:
        if not isinstance(getattr(state, name), bool):
            raise _violation(where, f"{name}={getattr(state, name)!r}", "True or False")
    for name in ("moves", "max_moves"):
        number = getattr(state, name)
        if type(number) is not int or number < 0:
            raise _violation(where, f"{name}={number!r}", "an int that is at least 0")
    _check_scores(state, where=where)
    _check_end(state, where=where, max_episode_steps=max_episode_steps)
    _check_actions(state.valid_actions, done=state.done, where=where)


def _check_scores(state: GameState, *, where: str) -> None:
    for name in ("score", "max_score"):
        _check_number(name, getattr(state, name), where=where)
    if state.max_score < 0:
        raise _violation(where, f"max_score={state.max_score:g}", "the largest possible score, or 0 if it is not known")
    if state.max_score and state.score > state.max_score + TOLERANCE:
        raise _violation(
            where,
            f"score={state.score:g} with max_score={state.max_score:g}",
            "a score of at most max_score, or max_score=0 if the largest possible score is not known",
        )


def _check_end(state: GameState, *, where: str, max_episode_steps: int | None) -> None:
    if state.won and not state.done:
        raise _violation(where, "won=True with done=False", "done=True, since a win ends the episode")
    if state.truncated and not state.done:
        raise _violation(where, "truncated=True with done=False", "done=True, since truncation ends the episode")
    if state.truncated and state.won:
        raise _violation(where, "truncated=True with won=True", "truncated=False if the game itself ended the episode")
    limit = state.max_moves or max_episode_steps  # the game's own limit may be smaller
    if max_episode_steps and state.max_moves > max_episode_steps:
        raise _violation(
            where, f"max_moves={state.max_moves}", f"0, or at most the argument max_episode_steps={max_episode_steps}"
        )
    if limit and state.moves >= limit and not state.done:
        raise _violation(
            where, f"moves={state.moves} with done=False", f"done=True and truncated=True after {limit} commands"
        )


def _check_actions(actions: Any, *, done: bool, where: str) -> None:
    if not isinstance(actions, tuple):
        raise _violation(where, f"valid_actions of the type {type(actions).__name__}", "a tuple of texts")
    for action in actions:
        _check_text("a valid action", action, where=where)
        if not action or action != action.strip() or not action.isprintable():
            raise _violation(
                where,
                f"the valid action {action!r}",
                "a text of at least one character, in one line, without spaces at its ends",
            )
    twice = next((action for n, action in enumerate(actions) if action in actions[:n]), None)
    if twice is not None:
        raise _violation(where, f"the valid action {twice!r} twice", "valid actions without duplicates")
    if not actions and not done:
        raise _violation(
            where,
            "no valid actions with done=False",
            "at least one. If the game offers none, give a short list and set actions_are_fallback=True",
        )


def _check_text(name: str, text: Any, *, where: str) -> None:
    if type(text) is not str:
        raise _violation(where, f"{name}={shown(repr(text))} of the type {type(text).__name__}", "a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _violation(where, f"{name}={shown(text)}", "text that can be encoded as UTF-8") from error


def _check_number(name: str, number: Any, *, where: str) -> None:
    # Checkpoints contain plain Python values only, so numbers of numpy are refused.
    if type(number) not in (int, float) or not math.isfinite(number):
        raise _violation(where, f"{name}={number!r} of the type {type(number).__name__}", "a finite float or int")


def _violation(where: str, got: str, allowed: str, *, verb: str = "gave") -> UserError:
    return UserError(f"{where} {verb} {got}. Allowed is {allowed}.")


def first_difference(one: GameState, other: GameState, *, names: Sequence[str]) -> str:
    """The first of the fields ``names`` that differs between two states, with both values; "" if none differs."""
    for name in names:
        if getattr(one, name) != getattr(other, name):
            return f"{name}={shown(repr(getattr(other, name)))}, and {shown(repr(getattr(one, name)))} before"
    return ""
