"""Tests of the check for authors of games: on games that keep the protocol, and on one broken game for each check."""

import dataclasses
import itertools
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

import priorzero
from priorzero.envs import check_game, make_game, registry, resolve_game
from priorzero.envs.protocol import CheckedGame
from priorzero.types import UserError
from tests.helpers import registered
from tests.helpers.game_files import session_cache, story
from tests.helpers.packages import EXAMPLE
from tests.helpers.registered import CountingGame

LIMIT = 12


@pytest.mark.parametrize("level", ["small", "large"])
@pytest.mark.parametrize("parameters", ["", "?seed=7"])
def test_check_game_accepts_the_example(level, parameters, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.setattr(registry, "_registered", {})
    priorzero.register_game("corridor", "example_game:make")
    check_game(f"corridor:{level}{parameters}")


def test_check_game_accepts_textworld(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(session_cache(tmp_path_factory)))
    check_game("textworld:simple?seed=7")


@pytest.mark.slow
def test_check_game_accepts_jericho():
    game = make_game(
        resolve_game(str(story("detective.z5"))),
        seed=1,
        max_episode_steps=8,
        look_and_inventory=True,
        drop_inert_commands=True,
        valid_actions="exact",
    )
    check_game(game, num_episodes=2)
    game.close()


def test_check_game_accepts_a_game_object_and_leaves_it_open():
    game = CountingGame(5, max_episode_steps=LIMIT)
    check_game(game)
    assert game.reset().moves == 0


def always(**changes):
    """A game whose states all have these values."""
    return changed(lambda state, game: changes)


def later(**changes):
    """A game whose states have these values from the first command on."""
    return changed(lambda state, game: changes if state.moves else {})


def changed(changes):
    class Changed(CountingGame):
        def state(self, score, *, moves, lost=False):
            state = super().state(score, moves=moves, lost=lost)
            return dataclasses.replace(state, **changes(state, self))

        def step(self, action):  # the state of the unchanged game decides which commands are valid
            before = self.now
            if before is None or before.done or action not in ("add one", "stop", "wait"):
                raise ValueError(action)
            after = self.state(self.count + (action == "add one"), moves=self.moves + 1, lost=action == "stop")
            self.now, self.count, self.moves = after, self.count + (action == "add one"), self.moves + 1
            return after, float(action == "add one")

        def reset(self):
            self.count, self.moves = 0.0, 0
            return super().reset()

    return Changed(5, max_episode_steps=LIMIT)


def replaced_method(name, method):
    game = CountingGame(5, max_episode_steps=LIMIT)
    bound = getattr(game, name)
    setattr(game, name, lambda *arguments: method(game, bound, *arguments))
    return game


def step_with(change):
    """A game whose ``step`` returns ``change(state, reward)``."""
    return replaced_method("step", lambda game, step, action: change(*step(action)))


def accepts_everything():
    def step(game, original, action):
        return original(action if action in game.now.valid_actions else "wait")

    return replaced_method("step", step)


def raises_type_error():
    def step(game, original, action):
        if action not in game.now.valid_actions:
            raise TypeError("no such command")
        return original(action)

    return replaced_method("step", step)


def changed_by_a_refusal():
    """A refused command turns the game's next reply into another one."""
    game = CountingGame(5, max_episode_steps=LIMIT)
    original, begin, game.refused = game.step, game.reset, False

    def reset():
        game.refused = False
        return begin()

    def step(action):
        if action not in game.now.valid_actions:
            game.refused = True
        state, reward = original(action)
        if game.refused:
            state = dataclasses.replace(state, feedback="What?")
            game.refused = False
        return state, reward

    game.step, game.reset = step, reset
    return game


def continues_after_the_end():
    def step(game, original, action):
        if game.now.done and action != "no game has this command":
            return game.now, 0.0
        return original(action)

    return replaced_method("step", step)


def crashes_on_wait():
    def step(game, original, action):
        if action == "wait":
            raise KeyError("clock")
        return original(action)

    return replaced_method("step", step)


def random_replies():
    numbers = itertools.count()
    return changed(lambda state, game: {"feedback": f"Reply {next(numbers)}."} if state.moves else {})


def random_beginnings():
    numbers = itertools.count()
    return changed(lambda state, game: {} if state.moves else {"feedback": f"Reply {next(numbers)}."})


def keeps_the_score():
    """``reset`` keeps the number of the episode before."""
    game = CountingGame(50, max_episode_steps=LIMIT)

    def reset():
        game.now = game.state(game.now.score if game.now is not None else 0.0, moves=0)
        return game.now

    game.reset = reset
    return game


class Unequal(tuple):
    """Valid actions that differ from what they are after pickling."""

    def __reduce__(self):
        return (tuple, (["other"],))


class Unpicklable(tuple):
    """Valid actions that cannot be pickled."""

    def __reduce__(self):
        raise pickle.PicklingError("no")


BROKEN = {
    "no close": (lambda: SimpleNamespace(reset=print, step=print), r"has no method close\(\)"),
    "state type": (lambda: replaced_method("reset", lambda *_: {}), "returned a dict. Allowed is a priorzero.types"),
    "begins late": (lambda: always(moves=1), "gave moves=1. Allowed is 0 at the beginning"),
    "begins at the end": (lambda: always(done=True), "gave done=True. Allowed is False, since an episode has at least"),
    "text type": (lambda: always(look=None), "look=None of the type NoneType. Allowed is a str"),
    "surrogate": (lambda: always(feedback="\ud800"), "Allowed is text that can be encoded as UTF-8"),
    "flag": (lambda: always(won=np.bool_(False)), "won=.*False.*. Allowed is True or False"),
    "moves type": (lambda: always(moves=0.0), "moves=0.0. Allowed is an int"),
    "numpy score": (lambda: always(score=np.float64(0)), "of the type float64. Allowed is a finite float or int"),
    "infinite score": (lambda: later(score=float("inf")), "score=inf of the type float. Allowed is a finite"),
    "negative maximum": (lambda: always(max_score=-1.0), "max_score=-1. Allowed is the largest possible score, or 0"),
    "above the maximum": (lambda: always(max_score=0.5), "score=1 with max_score=0.5. Allowed is a score of at most"),
    "changing maximum": (lambda: later(max_score=99.0), "max_score=99.0, which was 5.0 before"),
    "changing limit": (lambda: later(max_moves=99), "max_moves=99, which was 12 before"),
    "list of actions": (lambda: always(valid_actions=["wait"]), "of the type list. Allowed is a tuple of texts"),
    "action type": (lambda: always(valid_actions=(3,)), "a valid action=3 of the type int. Allowed is a str"),
    "empty action": (lambda: always(valid_actions=("wait", "")), "the valid action ''. Allowed is a text of at least"),
    "space": (lambda: always(valid_actions=("wait ",)), "the valid action 'wait '. Allowed is a text of at least one"),
    "two lines": (lambda: always(valid_actions=("wait\nstop",)), r"the valid action 'wait\\nstop'. Allowed is"),
    "duplicate": (lambda: always(valid_actions=("wait", "stop", "wait")), "the valid action 'wait' twice"),
    "no actions": (lambda: always(valid_actions=()), "no valid actions with done=False. Allowed is at least one"),
    "won, not done": (lambda: always(won=True), "won=True with done=False. Allowed is done=True"),
    "truncated, not done": (lambda: always(truncated=True), "truncated=True with done=False. Allowed is done=True"),
    "won and truncated": (
        lambda: later(won=True, truncated=True, done=True),
        "truncated=True with won=True. Allowed is truncated=False",
    ),
    "never truncated": (
        lambda: changed(lambda state, game: {"max_moves": 2}),
        "moves=2 with done=False. Allowed is done=True and truncated=True after 2 commands",
    ),
    "step type": (
        lambda: step_with(lambda state, reward: state),
        "returned .*. Allowed is a tuple of the new GameState",
    ),
    "reward type": (lambda: step_with(lambda state, reward: (state, None)), "the reward=None of the type NoneType"),
    "reward": (
        lambda: step_with(lambda state, reward: (state, 2 * reward)),
        "the reward 2, while the score changed from . to .. Allowed is 1: the reward is the number of points",
    ),
    "moves": (
        lambda: step_with(lambda state, reward: (dataclasses.replace(state, moves=7), reward)),
        "gave moves=7. Allowed is 1, one more than before",
    ),
    "accepts everything": (accepts_everything, "which is not a valid action, raised nothing. Allowed is a ValueError"),
    "refuses by another error": (
        raises_type_error,
        r"raised TypeError: no such command \(.*, in step\). Allowed is a Value",
    ),
    "changed by a refusal": (changed_by_a_refusal, "gave feedback=.*, and 'What\\?' before. Equal seeds and equal"),
    "continues after the end": (continues_after_the_end, "after the end of the episode raised nothing"),
    "error": (crashes_on_wait, r"step\('wait'\).* raised KeyError: 'clock' \(.*, in step\). A valid action raises no"),
    "random replies": (random_replies, "gave feedback='Reply .*', and 'Reply .*' before. Equal seeds and equal"),
    "random beginnings": (random_beginnings, r"reset\(\) gave feedback='Reply 1.', and 'Reply 0.' before"),
    "keeps the score": (keeps_the_score, r"reset\(\) gave feedback='The number is .*', and 'The number is 0.' before"),
    "not picklable": (
        lambda: later(valid_actions=Unpicklable(("add one", "stop", "wait"))),
        "gave a state that cannot be pickled",
    ),
    "changed by pickling": (
        lambda: later(valid_actions=Unequal(("add one", "stop", "wait"))),
        "gave a state that changes when it is pickled",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_check_game_names_the_first_violation(name):
    make, hint = BROKEN[name]
    with pytest.raises(UserError, match=hint):
        check_game(make())


def test_check_game_names_the_commands_that_led_to_a_violation():
    game = changed(lambda state, game: {"look": None} if state.score == 2 else {})
    with pytest.raises(UserError, match=r"Changed: step\('add one'\) after '.*add one'.* gave look=None"):
        check_game(game, num_episodes=20)


def test_check_game_compares_two_game_objects_of_a_name(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    priorzero.register_game("counting", registered.make_different_each_time)
    with pytest.raises(UserError, match=r"a second game object with the same seed: reset.. gave max_score="):
        check_game("counting:")


def test_check_game_sees_what_the_checks_of_a_run_would_hide(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    priorzero.register_game("counting", registered.make_accepting)
    with pytest.raises(UserError, match="which is not a valid action, raised nothing"):
        check_game("counting:")


@pytest.mark.parametrize("max_commands", [20, 200])
def test_check_game_knows_the_limit_of_a_named_game(monkeypatch, max_commands):
    monkeypatch.setattr(registry, "_registered", {})
    priorzero.register_game("counting", registered.make_endless)
    hint = r"moves=50 with done=False. Allowed is done=True and truncated=True after 50 commands"
    with pytest.raises(UserError, match=hint):
        check_game("counting:", max_commands=max_commands)


def test_checked_game_uses_the_limit_that_the_game_was_given():
    game = CheckedGame(CountingGame(50, max_episode_steps=LIMIT), name="counting", max_episode_steps=2)
    with pytest.raises(UserError, match=r"'counting' violates .* max_moves=12. Allowed is 0, or at most .*steps=2"):
        game.reset()
    silent = CheckedGame(always(max_moves=0), name="counting", max_episode_steps=2)
    silent.reset()
    silent.step("wait")
    with pytest.raises(UserError, match=r"moves=2 with done=False. Allowed is done=True and truncated=True after 2"):
        silent.step("wait")


def test_checked_game_uses_the_limit_that_the_game_states_if_it_is_smaller():
    game = CheckedGame(always(max_moves=1), name="counting", max_episode_steps=2)
    game.reset()
    with pytest.raises(UserError, match=r"moves=1 with done=False. Allowed is done=True and truncated=True after 1"):
        game.step("wait")


def test_checked_game_refuses_invalid_commands_itself():
    game = CheckedGame(accepts_everything(), name="counting", max_episode_steps=LIMIT)
    game.reset()
    with pytest.raises(ValueError, match="is not among the valid actions"):
        game.step("sing")


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("make_nothing", r"^counting:: NoneType has no method reset\(\)"),
        ("make_exiting", r"its factory 'tests.helpers.registered:make_exiting' raised SystemExit: 3"),
    ],
)
def test_check_game_reports_a_factory_without_a_game(monkeypatch, factory, words):
    monkeypatch.setattr(registry, "_registered", {})
    priorzero.register_game("counting", f"tests.helpers.registered:{factory}")
    with pytest.raises(UserError, match=words):
        check_game("counting:")


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("reset", r"reset\(\) raised SystemExit: 3 \(.*test_conformance.py, line \d+, in leave\). reset\(\) raises no"),
        ("step", r"step\('no game has this command'\), .* raised SystemExit: 3 \(.*\). Allowed is a ValueError"),
    ],
)
def test_check_game_reports_a_game_that_exits(method, words):
    def leave(*_):
        raise SystemExit(3)

    with pytest.raises(UserError, match=words):
        check_game(replaced_method(method, leave))
