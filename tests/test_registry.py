"""Tests of games that packages and programs register."""

import json
import sys

import pytest
from loguru import logger

import priorzero
from priorzero.envs import make_game, registry, resolve_game, resolve_games
from priorzero.envs.games import is_z_machine_name
from priorzero.envs.limits import resolve_limits
from priorzero.envs.registry import check_parameters, parse_game_name, parse_number, read_parameter, registered_games
from priorzero.preflight import check_games
from priorzero.types import UserError
from tests.helpers import registered
from tests.helpers.models import make_settings
from tests.helpers.packages import EXAMPLE, install, write_package
from tests.helpers.runs import NO_LLM, short_settings, train

ARGUMENTS = {
    "seed": 0,
    "max_episode_steps": 9,
    "look_and_inventory": False,
    "drop_inert_commands": True,
    "valid_actions": "exact",
}


@pytest.fixture(scope="module")
def example_folder(tmp_path_factory):
    """The folder into which the example package is installed."""
    return install(EXAMPLE, tmp_path_factory.mktemp("packages") / "site")


@pytest.fixture
def example(example_folder, monkeypatch):
    """The example package is installed."""
    monkeypatch.syspath_prepend(str(example_folder))
    return example_folder


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """An empty folder for packages, on the import path."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch):
    """No game is registered by another test."""
    monkeypatch.setattr(registry, "_registered", {})
    registry._entry_points.cache_clear()


def error_of(env_id: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve_game(env_id)
    return str(caught.value)


# names --------------------------------------------------------------------------------------------------------------


def test_resolve_game_finds_a_game_of_an_installed_package(example, monkeypatch):
    monkeypatch.delitem(sys.modules, "example_game", raising=False)  # another test may have imported it
    spec = resolve_game("example:small?seed=7")
    assert (spec.kind, spec.path, spec.name) == ("registered", None, "example-small-seed7")
    assert spec.request is not None and spec.request.game.version == "1.0"
    assert "example_game" not in sys.modules, "the package is imported in the worker process only"
    game = make_game(spec, **ARGUMENTS)
    assert game.reset().goal == "Take all coins."
    assert game.step("go east")[0].moves == 1


def test_resolve_games_accepts_several_registered_games(example):
    first, second = resolve_games("example:small?seed=7, example:large")
    assert (first.name, second.name) == ("example-small-seed7", "example-large")
    with pytest.raises(UserError, match="occurs twice"):
        resolve_games("example:small,example:small")


def test_game_request_identity_depends_on_everything_that_changes_the_game(packages):
    write_package(packages, "mazes", code="", entry_points={"maze": "mazes:make", "other": "mazes:make"})
    names = ["maze:", "maze:a", "maze:b", "other:a", "maze:a?x=1", "maze:a?y=1", "maze:a?x=2", "maze:?x=1"]
    md5s = [resolve_game(name).md5 for name in names]
    assert len(set(md5s)) == len(names)
    assert resolve_game("maze:a?x=1&y=2").md5 == resolve_game("maze:a?y=2&x=1").md5
    (packages / "mazes-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mazes\nVersion: 1.1\n")
    registry._entry_points.cache_clear()
    assert not set(md5s) & {resolve_game(name).md5 for name in names}


def test_game_request_name_can_be_a_folder_and_is_unique(example):
    request = parse_game_name("example:a/b%20%2C?k=%26x&n=3")
    assert (request.level, request.parameters) == ("a/b ,", (("k", "&x"), ("n", "3")))
    names = [parse_game_name(f"example:{level}").name for level in ("a/b", "a b", "a_b", "x" * 300, "x" * 301)]
    assert len(set(names)) == 5
    for name in [request.name, *names]:
        assert len(name) <= 60 and not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789_-")


@pytest.mark.parametrize(
    ("env_id", "hint"),
    [
        ("exmple:small", "Did you mean 'example:'?"),
        ("exmple:a/b", "Did you mean 'example:'?"),
        ("example", "The registered game 'example' needs a colon after its name: type 'example:'."),
        ("Example:small", "Did you mean 'example:'?"),
        ("nothing:x", "Registered are: babyai, example, gymnasium"),
        ("example:small?seed", "bad query field: 'seed'"),
        ("example:small?seed=1&seed=2", "'seed' is given twice"),
    ],
)
def test_resolve_game_explains_wrong_names_of_registered_games(example, env_id, hint):
    assert hint in error_of(env_id)


def test_resolve_game_refuses_a_name_that_two_packages_register(packages):
    write_package(packages, "mazes", code="", entry_points={"maze": "mazes:make"})
    write_package(packages, "labyrinths", code="", entry_points={"maze": "labyrinths.games:open"}, version="2.1")
    message = error_of("maze:a")
    assert "registered twice: by labyrinths 2.1 (labyrinths.games:open) and by mazes 1.0 (mazes:make)" in message
    assert "pip uninstall mazes" in message
    assert [game.source for game in registered_games() if game.name == "maze"] == ["labyrinths", "mazes"]


def test_resolve_game_refuses_the_name_of_a_built_in_game_that_a_package_registers(packages):
    write_package(packages, "mazes", code="", entry_points={"babyai": "mazes:make"})
    message = error_of("babyai:GoToObj")
    assert "by mazes 1.0 (mazes:make) and by PriorZero itself (priorzero.envs.babyai_levels:make_babyai)" in message
    assert message.endswith("pip uninstall mazes")


def test_registered_games_leaves_out_names_that_cannot_be_used(packages):
    points = {"textworld": "mazes:make", "Big Maze": "mazes:make", "maze": "mazes:make"}
    write_package(packages, "mazes", code="", entry_points=points)
    messages: list[str] = []
    handler = logger.add(lambda message: messages.append(message.record["message"]), level="WARNING")
    found = [game.name for game in registered_games() if game.source == "mazes"]
    logger.remove(handler)
    assert found == ["maze"]
    assert len(messages) == 2 and all("the package mazes registers" in message for message in messages)


def test_resolve_game_prefers_a_file_whose_name_contains_a_colon(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example:small").write_bytes(b"no story")
    assert "story file" in error_of("example:small")


def test_is_z_machine_name_tells_story_files_by_name(example):
    names = ["zork1.z5", "./zork1.z5", "textworld:simple?seed=7", "example:small"]
    assert [is_z_machine_name(name) for name in names] == [True, True, False, False]


def test_resolve_limits_gives_registered_games_100_commands_and_256_actions(example):
    settings = make_settings({"env": {"max_episode_steps": "auto", "action_space_size": "auto"}})
    resolve_limits(settings.env, [resolve_game("example:small?seed=7"), resolve_game("example:large")])
    assert settings.env.max_episode_steps == "example-small-seed7=100, example-large=100"
    assert settings.env.action_space_size == 256


# register_game ------------------------------------------------------------------------------------------------------


def test_register_game_accepts_a_function_and_its_name():
    priorzero.register_game("counting", registered.make_counter, version="3")
    priorzero.register_game("counting", "tests.helpers.registered:make_counter", version="3")  # the same
    spec = resolve_game("counting:9")
    assert spec.request.game.version == "3"
    assert make_game(spec, **ARGUMENTS).reset().max_score == 9.0


def nested():
    def factory(level, parameters, **arguments): ...

    return factory


def in_main(level, parameters, **arguments): ...


in_main.__module__ = "__main__"


def replaced(level, parameters, **arguments): ...


original, replaced = replaced, None


@pytest.mark.parametrize(
    ("name", "factory", "hint"),
    [
        ("Maze", registered.make_counter, "a name consists of lower-case letters"),
        ("", registered.make_counter, "a name consists of lower-case letters"),
        ("textworld", registered.make_counter, "has a meaning in PriorZero"),
        ("maze", lambda level, parameters, **arguments: None, "not a lambda, a nested function or an object"),
        ("maze", nested(), "at the top level of a module"),
        ("maze", in_main, "does not run your script or notebook. Move in_main into a file of its own"),
        ("maze", original, "is another object"),
        ("maze", None, "give a function"),
        ("maze", "no colon", "its name as 'module:function'"),
        ("maze", "not_a_package.maze:make", "cannot import the module 'not_a_package.maze'"),
        (
            "maze",
            "tests.helpers.registered:missing",
            "'tests.helpers.registered:missing' cannot be imported (Attribute",
        ),
        ("maze", "tests.helpers.registered:NOT_A_FUNCTION", "is not a function but 3"),
    ],
)
def test_register_game_refuses_what_a_worker_process_cannot_import(name, factory, hint):
    with pytest.raises(UserError) as caught:
        priorzero.register_game(name, factory)
    assert hint in str(caught.value)


def test_register_game_refuses_a_name_that_is_taken(packages):
    priorzero.register_game("counting", registered.make_counter)
    with pytest.raises(UserError, match=r"already registered for 'tests.helpers.registered:make_counter'"):
        priorzero.register_game("counting", registered.make_broken)
    write_package(packages, "counters", code="", entry_points={"counting": "counters:make"})
    assert "registered twice: by counters 1.0" in error_of("counting:9")


@pytest.mark.parametrize(("name", "typed"), [("counting", "counting:"), ("counting?x=1", "counting:?x=1")])
def test_resolve_game_says_that_the_colon_of_a_registered_game_is_missing(name, typed):
    priorzero.register_game("counting", registered.make_counter)
    assert f"The registered game 'counting' needs a colon after its name: type '{typed}'." in error_of(name)


# factories ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "hint"),
    [
        ("make_broken", r"its factory 'tests.helpers.registered:make_broken' raised ZeroDivisionError: division by "),
        ("make_refusing", r"^The game 'counting:9': type another level$"),
        (
            "make_exiting",
            r"its factory 'tests.helpers.registered:make_exiting' raised SystemExit: 3 \(.*registered.py, ",
        ),
    ],
)
def test_make_game_reports_a_factory_that_fails(factory, hint):
    priorzero.register_game("counting", f"tests.helpers.registered:{factory}")
    with pytest.raises(UserError, match=hint):
        make_game(resolve_game("counting:9"), **ARGUMENTS)


def test_read_parameter_converts_to_the_type_of_the_default():
    parameters = {"n": "3", "x": "0.5", "flag": "yes", "text": "a"}
    assert [read_parameter(parameters, key, default) for key, default in [("n", 1), ("x", 1.0)]] == [3, 0.5]
    assert read_parameter(parameters, "flag", False) is True
    assert read_parameter(parameters, "text", "b") == "a"
    assert read_parameter(parameters, "absent", 7) == 7
    for key, default, allowed in [("x", 1, "a whole number"), ("text", 0.5, "a number"), ("n", False, "1 or 0")]:
        with pytest.raises(UserError, match=f"is not allowed. Allowed: {allowed}"):
            read_parameter(parameters, key, default)


@pytest.mark.parametrize(
    ("text", "number"),
    [("7", 7), ("-7", -7), ("0.5", 0.5), (".5", 0.5), ("2.", 2.0), ("1e3", 1000.0)]
    + [(text, None) for text in ("", "nan", "inf", "-infinity", "1e999", "1_000", "0x10", "\u0663", "9" * 400, " 7")],
)
def test_parse_number_accepts_finite_decimal_numbers_only(text, number):
    found = parse_number(text)
    assert found == number and type(found) is type(number)


@pytest.mark.parametrize(("text", "default"), [("1_000", 1), ("nan", 0.5), ("inf", 0.5), ("9" * 400, 0.5)])
def test_read_parameter_refuses_what_is_no_finite_decimal_number(text, default):
    with pytest.raises(UserError, match=r"is not allowed\. Allowed: a "):
        read_parameter({"n": text}, "n", default)


def test_check_parameters_suggests_the_right_key():
    check_parameters({"rooms": "3"}, ["rooms", "coins"])
    with pytest.raises(UserError, match=r"Unknown parameter 'room'. Did you mean 'rooms'\? The parameters are: rooms"):
        check_parameters({"room": "3"}, ["rooms", "coins"])
    with pytest.raises(UserError, match="There are no parameters"):
        check_parameters({"room": "3"}, [])


# runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factory", "hint"),
    [
        ("make_broken", "raised ZeroDivisionError: division by zero"),
        ("make_nothing", "NoneType has no method reset"),
        ("make_refusing", "type another level"),
        ("make_crashing", "cannot be played: .* the worker process died"),
        ("make_wrong_from_the_start", "reset.. gave score='0' of the type str. Allowed is a finite float or int"),
    ],
)
def test_check_games_reports_a_registered_game_that_fails_in_its_worker(factory, hint):
    priorzero.register_game("counting", f"tests.helpers.registered:{factory}")
    settings = make_settings({"run": {"env_id": "counting:9"}})
    with pytest.raises(UserError, match=hint):
        check_games(settings, games=[resolve_game("counting:9")], unseen=[])


@pytest.mark.slow
def test_run_training_plays_a_game_that_this_program_registers(tmp_path):
    priorzero.register_game("counting", registered.make_counter)
    settings = short_settings(tmp_path, NO_LLM, {"run": {"env_id": "counting:2", "max_iter": 2}})
    summary = train(settings)
    assert summary.rows["environment steps"] >= 20
    manifest = json.loads(next((tmp_path / "run" / "checkpoints").glob("*/manifest.json")).read_text())
    assert manifest["games"] == {"counting-2": resolve_game("counting:2").md5}


@pytest.mark.slow
def test_run_training_ends_with_one_message_if_a_game_violates_the_protocol(tmp_path):
    priorzero.register_game("counting", registered.make_wrong_later)
    settings = short_settings(tmp_path, NO_LLM, {"run": {"env_id": "counting:9", "max_iter": 2}})
    with pytest.raises(
        UserError, match=r"violates the protocol of games: step\('.*'\), command 3 of the episode, gave"
    ):
        train(settings)
