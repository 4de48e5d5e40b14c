"""Tests of finding story files and generating TextWorld games by name."""

import dataclasses
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger

from priorzero.envs import games, textworld_files
from priorzero.envs.games import GameSpec, check_max_score, check_names, make_game, resolve_game, resolve_games
from priorzero.envs.textworld_files import CHALLENGES, get_or_make, parse_request
from priorzero.types import UserError
from tests.helpers.game_files import session_cache, story
from tests.helpers.tiny_story import tiny_story

ZORK1_MD5 = "b732a93a6244ddd92a9b9a3e3a46c687"


@pytest.fixture
def zork1() -> bytes:
    return story("zork1.z5").read_bytes()


@pytest.fixture
def empty_folders(tmp_path, monkeypatch):
    """An empty working folder, games folder and cache folder."""
    folders = [tmp_path / name for name in ("here", "games", "cache/priorzero/games")]
    for folder in folders:
        folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PRIORZERO_GAMES", str(tmp_path / "games"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folders


@pytest.fixture
def warnings_of():
    """The warnings that are logged."""
    games._warn_of_unsupported.cache_clear()
    messages: list[str] = []
    handler = logger.add(lambda message: messages.append(message.record["message"]), level="WARNING")
    yield messages
    logger.remove(handler)


def error_of(env_id: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve_game(env_id)
    return str(caught.value)


# Jericho ------------------------------------------------------------------------------------------------------------


def test_resolve_game_lists_the_searched_folders_and_how_to_download_a_missing_game(empty_folders, monkeypatch):
    message = error_of("zork1.z5")
    for folder in empty_folders:
        assert str(folder / "zork1.z5") in message
    assert ZORK1_MD5 in message
    assert "python scripts/fetch_games.py zork1.z5" in message
    assert "not set" not in message
    monkeypatch.delenv("PRIORZERO_GAMES")
    assert "$PRIORZERO_GAMES is not set" in error_of("zork1.z5")


def test_resolve_game_searches_folders_in_order(zork1, empty_folders):
    for folder in empty_folders:
        (folder / "zork1.z5").write_bytes(zork1)
    for folder in empty_folders:
        spec = resolve_game("zork1.z5")
        assert spec.path == folder / "zork1.z5"
        assert (spec.kind, spec.md5, spec.name) == ("jericho", ZORK1_MD5, "zork1")
        spec.path.unlink()


def test_resolve_game_accepts_a_path_with_any_file_name(tmp_path, zork1):
    copy = tmp_path / "my story.z5"
    copy.write_bytes(zork1)
    spec = resolve_game(str(copy))
    assert (spec.env_id, spec.path, spec.name) == (str(copy), copy, "zork1")


def test_resolve_game_refuses_a_file_with_the_name_of_a_game_that_is_no_story(empty_folders):
    (empty_folders[0] / "zork1.z5").write_bytes(b"another release")
    message = error_of("zork1.z5")
    assert "is not a Z-machine story" in message
    assert hashlib.md5(b"another release").hexdigest() in message
    assert ZORK1_MD5 in message
    assert "fetch_games.py zork1.z5" in message


def test_resolve_game_accepts_another_release_with_a_warning(empty_folders, warnings_of):
    content = tiny_story(3)
    (empty_folders[0] / "zork1.z5").write_bytes(content)
    spec = resolve_game("zork1.z5")
    assert (spec.kind, spec.name, spec.path) == ("story", "zork1.z5", empty_folders[0] / "zork1.z5")
    assert spec.md5 == hashlib.md5(content).hexdigest()
    resolve_game("zork1.z5")
    (message,) = warnings_of  # once
    assert "Jericho does not support the story file" in message and "played with a general grammar" in message
    assert (
        "Rewards: the status line; the game does not state the maximum score (--set env.max_score=N sets it)" in message
    )
    assert message.endswith("Jericho supports a game of this name: python scripts/fetch_games.py zork1.z5.")


def test_resolve_game_says_what_is_known_of_a_story(warnings_of):
    spec = resolve_game(str(story("zork1.z3")))
    assert (spec.kind, spec.name) == ("story", "zork1.z3")
    (message,) = warnings_of
    assert "684 words in its dictionary" in message
    assert "Rewards: the status line; the game states the maximum score 350" in message
    assert message.endswith("python scripts/fetch_games.py zork1.z5.")


@pytest.mark.parametrize("suffix", ["z3", "gblorb", "ulx", "zblorb", "z6"])
def test_resolve_game_suggests_no_other_game_for_a_file_that_exists(tmp_path, suffix):
    file = tmp_path / f"lgop.{suffix}"
    file.write_bytes(b"another release")
    message = error_of(str(file))
    assert "is not a Z-machine story" in message
    assert "--list" in message
    assert "lurking" not in message and "Did you mean" not in message


def test_resolve_game_refuses_a_file_that_is_too_large_without_reading_it(tmp_path, monkeypatch):
    file = tmp_path / "film.z5"
    with file.open("wb") as opened:
        opened.truncate(1 << 34)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read"))
    assert "it has 17179869184 bytes, and a story has at most 1048576" in error_of(str(file))


def test_resolve_games_refuses_two_stories_with_the_same_file_name(tmp_path, warnings_of):
    files = [tmp_path / str(version) / "my.z5" for version in (3, 5)]
    for file, version in zip(files, (3, 5), strict=True):
        file.parent.mkdir()
        file.write_bytes(tiny_story(version))
    with pytest.raises(UserError, match=r"have the same file name\. Rename one"):
        resolve_games(",".join(map(str, files)))


def test_resolve_game_makes_a_name_for_folders(tmp_path, warnings_of):
    file = tmp_path / "-Мой дом & co.z5"
    file.write_bytes(tiny_story(5))
    assert resolve_game(str(file)).name == "co.z5"


def test_check_max_score_accepts_one_game_whose_maximum_is_not_known(tmp_path, warnings_of):
    file = tmp_path / "tiny.z3"
    file.write_bytes(tiny_story(3))
    game = resolve_game(str(file))
    check_max_score(9, games=[game], unseen=[])
    check_max_score(0, games=[game], unseen=[game])
    with pytest.raises(UserError, match=r"env\.max_score=9 is the maximum score of one game, but .* name several"):
        check_max_score(9, games=[game], unseen=[game])
    supported = GameSpec("zork1.z5", "jericho", file, ZORK1_MD5, "zork1")
    with pytest.raises(UserError, match=r"the maximum score of zork1\.z5 is known: it is a supported game\. Leave"):
        check_max_score(9, games=[supported], unseen=[])


def test_check_max_score_refuses_a_game_that_states_its_maximum(warnings_of):
    with pytest.raises(UserError, match="is known: the game states 350"):
        check_max_score(9, games=[resolve_game(str(story("zork1.z3")))], unseen=[])


@pytest.mark.parametrize("name", ["lgop.z3", "zzz.z5", "hitchhiker.z3"])
def test_resolve_game_suggests_only_names_that_are_spelled_similarly(empty_folders, name):
    message = error_of(name)
    assert "is not a story file that Jericho supports. To list all supported games" in message


@pytest.mark.parametrize(
    ("env_id", "reason"),
    [
        ("x" * 300 + ".z5", "has 303 bytes, but at most 255"),
        ("./" + "x" * 5000, "has 5000 bytes, but at most 255"),
        ("./\0", "contains a NUL character"),
    ],
)
def test_resolve_game_refuses_names_that_no_file_can_have(empty_folders, env_id, reason):
    assert reason in error_of(env_id)


def test_resolve_game_refuses_a_path_that_is_not_utf8(tmp_path, zork1):
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.z5"))
    file.write_bytes(zork1)
    assert "it is not UTF-8 text" in error_of(str(file))


def test_check_names_and_resolve_games_accept_lists_that_are_too_long_for_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(textworld_files, "_run_generator", fake_generator())
    names = [f"textworld:simple?seed={seed}" for seed in range(300)]
    check_names(",".join(names))
    assert [game.env_id for game in resolve_games(",".join(names[:20]))] == names[:20]


@pytest.mark.parametrize("env_ids", [",", "textworld:simple,", "textworld:simple,,textworld:simple?seed=1"])
def test_check_names_and_resolve_games_refuse_a_list_with_a_missing_name(env_ids):
    for check in (check_names, resolve_games):
        with pytest.raises(UserError, match="contains an empty name"):
            check(env_ids)


def test_resolve_game_refuses_a_name_without_extension(tmp_path, zork1):
    (tmp_path / "zork1").write_bytes(zork1)  # Jericho's emulator would crash
    assert "has no extension. Rename it to zork1.z5" in error_of(str(tmp_path / "zork1"))


ARGUMENTS = {
    "seed": 0,
    "max_episode_steps": 9,
    "look_and_inventory": False,
    "drop_inert_commands": True,
    "valid_actions": "exact",
}


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_make_game_refuses_a_story_file_that_was_changed(tmp_path, zork1, change):
    file = tmp_path / "zork1.z5"
    file.write_bytes(zork1)
    spec = resolve_game(str(file))
    game = make_game(spec, **ARGUMENTS)
    game._valid_actions = lambda state: ("wait",)
    game.reset()
    file.touch()  # the contents are the same
    game.step("wait")
    file.unlink()
    if change == "replaced":
        file.write_bytes(story("zork2.z5").read_bytes())
    for use in (lambda: game.step("wait"), game.reset, lambda: make_game(spec, **ARGUMENTS)):
        with pytest.raises(UserError, match="was changed or deleted during the run"):
            use()


@pytest.mark.parametrize(
    ("env_id", "hint"),
    [
        ("zork1", "Did you mean 'zork1.z5'?"),
        ("Zork1.z6", "Did you mean 'zork1.z5'?"),
        ("zork", "Did you mean 'zork1.z5'?"),  # not zork3.z5, which is as similar
        ("zork.z5", "Did you mean 'zork1.z5'?"),
        ("zork3x.z5", "Did you mean 'zork3.z5'?"),
        ("zork2", "named with its extension. Did you mean 'zork2.z5'?"),
        ("./zork2", "named with its extension. Did you mean 'zork2.z5'?"),
        ("https://x.y/zork1.z5", "is a URL, which is not read"),
        ("https://x.y/zork1.z5", "type: python scripts/fetch_games.py zork1.z5"),
        ("FILE:///tmp/unknown.z5?raw=1", "give its path"),
        ("textworld-simple", "Did you mean 'textworld:simple'?"),
        ("", "textworld:simple?seed=7"),
        ("./nowhere/zork1.z5", "does not exist"),
        ("./nowhere/zork1.z5", "fetch_games.py zork1.z5"),
        ("/", "is not a file"),
    ],
)
def test_resolve_game_explains_bad_names(empty_folders, env_id, hint):
    assert hint in error_of(env_id)


def test_resolve_game_suggests_the_extension_of_a_file_that_exists(empty_folders):
    for folder in empty_folders:
        (folder / "lgop.z3").write_bytes(b"not supported")
        for env_id in ("lgop", str(folder / "lgop")):
            assert "A story file is named with its extension. Did you mean 'lgop.z3'?" in error_of(env_id)
        (folder / "lgop.z3").unlink()
    assert "Did you mean" not in error_of("lgop")


def test_resolve_game_and_lists_accept_a_path_object(tmp_path, zork1):
    file = tmp_path / "zork1.z5"
    file.write_bytes(zork1)
    assert resolve_game(file) == resolve_game(str(file))
    assert resolve_games(file) == [resolve_game(file)]


@pytest.mark.parametrize("env_id", [None, 3, b"zork1.z5", ["zork1.z5"]])
def test_resolve_game_and_lists_refuse_other_types(env_id):
    for function in (resolve_game, resolve_games, check_names):
        with pytest.raises(ValueError, match="is not the name of a game; give a text"):
            function(env_id)


def test_check_names_refuses_a_game_that_occurs_twice_before_it_is_generated(monkeypatch):
    monkeypatch.setattr(textworld_files, "_run_generator", lambda *_: pytest.fail("generated"))
    with pytest.raises(UserError, match="occurs twice"):
        check_names("textworld:simple,textworld:simple?seed=0&goal=detailed")
    assert list(check_names("textworld:simple, textworld:simple?seed=1").values()) == [
        "textworld:simple",
        "textworld:simple?seed=1",
    ]


def test_resolve_game_refuses_a_folder_and_an_empty_file(empty_folders):
    (empty_folders[0] / "zork1.z5").mkdir()
    assert "is not a file" in error_of("zork1.z5")
    (empty_folders[0] / "zork2.z5").touch()
    message = error_of("zork2.z5")
    assert "is empty" in message
    assert "fetch_games.py zork2.z5" in message


def test_resolve_game_reports_an_unreadable_file(empty_folders, monkeypatch):
    (empty_folders[0] / "zork1.z5").write_bytes(b"x")

    def refuse(_):
        raise PermissionError(13, "Permission denied")  # root could read a file without permissions

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "Permission denied" in error_of("zork1.z5")


# TextWorld: names ---------------------------------------------------------------------------------------------------


def test_parse_request_fills_in_defaults_and_names_games():
    request = parse_request("textworld:simple")
    assert (request.seed, request.settings) == (0, {"rewards": "dense", "goal": "detailed", "test": False})
    assert request.name == "textworld-simple-seed0"
    assert parse_request("textworld:simple?seed=7&rewards=dense").name == "textworld-simple-seed7"
    assert parse_request("textworld:simple?rewards=sparse&test=1").name == "textworld-simple-rewards-sparse-test-seed0"
    for level in (100, 150, 233):  # the largest games of each mode
        assert parse_request(f"textworld:coin-collector?level={level}").settings == {"level": level}
    assert parse_request("textworld:coin-collector?level=5&seed=1").name == "textworld-coin-collector-level5-seed1"
    cooking = parse_request("textworld:cooking?recipe=2&take=1&cut=yes&recipe-seed=3")
    assert cooking.name == "textworld-cooking-recipe2-take1-cut-recipe_seed3-seed0"
    assert cooking.settings["cook"] is False


@pytest.mark.parametrize(
    ("env_id", "hints"),
    [
        ("textworld:simpel", ["Did you mean 'simple'?", "treasure-hunter"]),
        ("textworld:", ["coin-collector"]),
        ("textworld:simple?sed=7", ["Did you mean 'seed'?", "rewards"]),
        ("textworld:simple?seed=x", ["seed='x'", "from 0 to 4294967295"]),
        ("textworld:simple?seed=-1", ["seed='-1'"]),
        ("textworld:simple?seed=7&seed=8", ["twice"]),
        ("textworld:simple?rewards=many", ["dense, balanced, sparse"]),
        ("textworld:simple?rewards", ["Example: 'textworld:simple?"]),
        ("textworld:simple?test=maybe", ["1 or 0"]),
        ("textworld:coin-collector?level=0", ["Allowed: 1 to 100 (no dead ends), 101 to 150"]),
        ("textworld:coin-collector?level=151", ["102 rooms", "at most 100", "101 to 150"]),
        ("textworld:coin-collector?level=234", ["102 rooms", "201 to 233"]),
        ("textworld:treasure-hunter?level=31", ["from 1 to 30"]),
        ("textworld:cooking?go=5", ["1, 6, 9, 12"]),
        ("textworld:cooking?take=2", ["at most recipe=1", "Try recipe=2"]),
    ],
)
def test_parse_request_explains_bad_names(env_id, hints):
    message = error_of(env_id)
    for hint in [*hints, env_id]:
        assert hint in message


@given(st.sampled_from(sorted(CHALLENGES)), st.text(max_size=30))
def test_parse_request_accepts_any_text_or_raises_a_user_error(challenge, query):
    try:
        request = parse_request(f"textworld:{challenge}?{query}")
    except UserError:
        return
    assert set(request.settings) == set(CHALLENGES[challenge])
    assert "/" not in request.name


def values_of(parameter):
    if isinstance(parameter.default, bool):
        return st.booleans()
    return st.sampled_from(parameter.allowed)


@given(st.data())
def test_request_names_are_unique(data):
    def draw():
        challenge = data.draw(st.sampled_from(sorted(CHALLENGES)))
        values = {key: data.draw(values_of(parameter)) for key, parameter in CHALLENGES[challenge].items()}
        if challenge == "cooking":
            values["take"] = min(values["take"], values["recipe"])
        values["seed"] = data.draw(st.integers(0, 3))
        query = "&".join(f"{key}={int(value) if isinstance(value, bool) else value}" for key, value in values.items())
        return parse_request(f"textworld:{challenge}?{query}")

    try:
        one, other = draw(), draw()
    except UserError:  # too many rooms
        return
    assert (one == other) == (one.name == other.name)


# TextWorld: files ---------------------------------------------------------------------------------------------------


def test_erase_date_changes_six_bytes_of_the_header(tmp_path):
    header = bytearray(range(64))
    (tmp_path / "g.z8").write_bytes(header)
    textworld_files._erase_date(tmp_path / "g.z8")
    header[18:24] = b"000000"
    assert (tmp_path / "g.z8").read_bytes() == header


@pytest.mark.slow
def test_resolve_game_generates_a_textworld_game_once(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(session_cache(tmp_path_factory)))
    spec = resolve_game("textworld:simple?seed=7")
    assert (spec.kind, spec.name) == ("textworld", "textworld-simple-seed7")
    assert spec.path.is_relative_to(session_cache(tmp_path_factory) / "priorzero" / "games" / "textworld")
    assert spec.path.with_suffix(".json").is_file()
    assert spec.path.read_bytes()[18:24] == b"000000"  # not the date of today
    assert spec.md5 == hashlib.md5(spec.path.read_bytes()).hexdigest()

    def must_not_run(*_):
        raise AssertionError("the game was generated again")

    monkeypatch.setattr(textworld_files, "_run_generator", must_not_run)
    assert resolve_game("textworld:simple?seed=7&goal=detailed").path == spec.path


@pytest.mark.slow
def test_get_or_make_generates_equal_files_when_called_twice_at_once(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "1")  # the generator must not depend on it
    request = parse_request("textworld:simple?seed=7")
    with ThreadPoolExecutor() as executor:  # each call starts a process
        stories = list(executor.map(lambda _: get_or_make(request, tmp_path), range(2)))
    assert stories[0] == stories[1]
    (home,) = tmp_path.glob("*/*")  # one game and no temporary files
    files = {file.name: file.read_bytes() for file in home.iterdir()}
    assert sorted(files) == ["md5sums.txt", *(f"textworld-simple-seed7{suffix}" for suffix in (".json", ".ni", ".z8"))]
    # The files are the same as in another folder, generated at another time with another hash seed.
    monkeypatch.setenv("PYTHONHASHSEED", "2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(session_cache(tmp_path_factory)))
    other = resolve_game("textworld:simple?seed=7").path
    assert {file.name: file.read_bytes() for file in other.parent.iterdir()} == files


def fake_generator(contents: bytes | None = None):
    """A generator whose files contain ``contents``, or the name of the game."""

    def run(request, output: Path) -> None:
        output.parent.mkdir()
        for suffix in (".z8", ".json"):
            output.with_suffix(suffix).write_bytes(contents or request.name.encode())

    return run


def test_get_or_make_replaces_an_incomplete_game(tmp_path, monkeypatch):
    request = parse_request("textworld:simple")
    monkeypatch.setattr(textworld_files, "_run_generator", fake_generator(b"first"))
    story_file = get_or_make(request, tmp_path)
    monkeypatch.setattr(textworld_files, "_run_generator", fake_generator(b"second"))
    assert get_or_make(request, tmp_path).read_bytes() == b"first"
    story_file.with_suffix(".json").unlink()
    assert get_or_make(request, tmp_path) == story_file
    assert story_file.read_bytes() == b"second"
    assert [path.name for path in story_file.parent.parent.iterdir()] == [request.name]


@pytest.mark.parametrize("suffix", [".z8", ".json"])
def test_get_or_make_replaces_a_damaged_game(tmp_path, monkeypatch, suffix):
    request = parse_request("textworld:simple")
    monkeypatch.setattr(textworld_files, "_run_generator", fake_generator(b"a game"))
    story_file = get_or_make(request, tmp_path)
    story_file.with_suffix(suffix).write_bytes(b"a ga")
    assert get_or_make(request, tmp_path) == story_file
    assert story_file.with_suffix(suffix).read_bytes() == b"a game"


def test_get_or_make_uses_the_game_of_a_faster_process(tmp_path, monkeypatch):
    request = parse_request("textworld:simple")

    def slow(request, output):
        monkeypatch.setattr(textworld_files, "_run_generator", fake_generator(b"fast"))
        get_or_make(request, tmp_path)  # another process finishes first
        fake_generator(b"slow")(request, output)

    monkeypatch.setattr(textworld_files, "_run_generator", slow)
    assert get_or_make(request, tmp_path).read_bytes() == b"fast"


@pytest.mark.slow
def test_get_or_make_shows_the_output_of_a_failed_generator(tmp_path):
    request = parse_request("textworld:coin-collector?level=100")
    request = dataclasses.replace(request, settings={**request.settings, "level": 200})  # parse_request refuses it
    with pytest.raises(UserError, match="games with more than 100 rooms are not supported"):
        get_or_make(request, tmp_path)
    assert not list(tmp_path.glob("*/*"))


def test_get_or_make_reports_a_cache_folder_that_is_not_writable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "XDG_CACHE_HOME" in error_of("textworld:simple")


def test_resolve_games_accepts_a_list_without_duplicates(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(textworld_files, "_run_generator", fake_generator())
    first, second = "textworld:simple?seed=7", "textworld:coin-collector?level=1&seed=2"
    assert [game.env_id for game in resolve_games(f"{first}, {second}")] == [first, second]
    assert resolve_games("") == []
    with pytest.raises(UserError, match="occurs twice"):
        resolve_games(f"{first},{first}&goal=detailed")


def test_make_game_refuses_an_unknown_kind():
    spec = GameSpec("maze", "minigrid", Path("maze"), "0" * 32, "maze")
    with pytest.raises(ValueError, match="unknown kind 'minigrid'"):
        make_game(spec, **ARGUMENTS)
