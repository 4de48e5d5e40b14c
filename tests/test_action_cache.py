"""Tests of the valid-action cache: sharing, damaged files, and the cache key."""

import asyncio
import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from priorzero.envs import action_cache, make_worker, resolve_game
from priorzero.envs.action_cache import ActionCache, cache_file, digest
from priorzero.envs.frotz import EmulatorState
from priorzero.envs.jericho_game import JerichoGame
from priorzero.types import GameWorkerError
from tests.helpers.game_files import story

ACTIONS = ("open mailbox", "say ünïcode; 'quoted'", "west")


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "folder" / "valid_actions.sqlite3"


@pytest.fixture
def warnings(caplog):
    """A function that returns the messages of the warnings so far."""
    caplog.set_level(logging.WARNING, logger="priorzero.envs.action_cache")
    return lambda: [record.getMessage() for record in caplog.records]


def key(number: int) -> bytes:
    return digest(str(number).encode())


def actions_of(number: int) -> tuple[str, ...]:
    """Different actions for each number."""
    return tuple(f"put thing {number} in box {n}" for n in range(number % 7))


def fill(path: Path, count: int) -> None:
    with closing(ActionCache(path)) as cache:
        for number in range(count):
            cache.put(key(number), actions_of(number))


def change(path: Path, statement: str, *values) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement, values)


# The file ------------------------------------------------------------------------------------------------------------


def test_action_cache_shares_entries_between_objects(path, warnings):
    one, other = ActionCache(path), ActionCache(path)
    assert not path.parent.exists()  # the file is opened at the first use
    assert one.get(key(0)) is None
    one.put(key(0), ACTIONS)
    one.put(key(1), ())
    assert other.get(key(0)) == ACTIONS
    assert other.get(key(1)) == ()
    assert other.get(key(2)) is None
    other.put(key(0), ("north",))
    assert one.get(key(0)) == ("north",)
    one.close()
    one.close()
    assert one.get(key(0)) == ("north",)  # opened again
    assert warnings() == []


def test_action_cache_without_a_path_is_disabled():
    cache = ActionCache(None)
    cache.put(key(0), ACTIONS)
    assert cache.get(key(0)) is None
    cache.close()


def test_action_cache_deletes_the_oldest_entries(path):
    with closing(ActionCache(path, max_rows=5)) as cache:
        for number in range(12):
            cache.put(key(number), actions_of(number))
        cache.put(key(8), ("again",))  # now the newest
        cache.put(key(12), actions_of(12))
        kept = {number for number in range(13) if cache.get(key(number)) is not None}
    assert kept <= {8, 9, 10, 11, 12}
    assert {8, 10, 11, 12} <= kept
    with pytest.raises(ValueError, match="max_rows=0"):
        ActionCache(path, max_rows=0)


WRITE = """
import logging, random, sys
from pathlib import Path
logging.basicConfig()
from priorzero.envs.action_cache import ActionCache
sys.path.insert(0, sys.argv[1])
from test_action_cache import actions_of, key
numbers = list(range(int(sys.argv[3])))
cache = ActionCache(Path(sys.argv[2]), busy_timeout_s=60)
random.shuffle(numbers)
print("ready", flush=True)
sys.stdin.readline()  # all processes start writing at the same time
for number in numbers:
    if (found := cache.get(key(number))) is None:
        cache.put(key(number), actions_of(number))
    else:
        assert found == actions_of(number), (number, found)
"""


def start_writers(path: Path, *, num_writers: int, count: int) -> list[subprocess.Popen[str]]:
    """Processes that write ``count`` entries each, in random order; they have started when this returns."""
    command = [sys.executable, "-c", WRITE, str(Path(__file__).parent), str(path), str(count)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    writers = [subprocess.Popen(command, env=environment, text=True, **pipes) for _ in range(num_writers)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("start\n")
        writer.stdin.flush()
    return writers


@pytest.mark.slow
def test_action_cache_is_created_and_filled_by_many_processes_at_once(path, warnings):
    for writer in start_writers(path, num_writers=5, count=300):
        output, errors = writer.communicate(timeout=120)
        assert (writer.returncode, output, errors) == (0, "", "")  # errors would contain warnings too
    with closing(ActionCache(path)) as cache:
        assert all(cache.get(key(number)) == actions_of(number) for number in range(300))
    assert warnings() == []


def test_action_cache_waits_while_another_process_creates_the_file(path, warnings):
    path.parent.mkdir()
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("CREATE TABLE half_made (something)")
        other.execute("BEGIN IMMEDIATE")  # now SQLite raises "locked" elsewhere without waiting for the timeout
        other.execute("INSERT INTO half_made VALUES (1)")
        threading.Timer(0.3, other.execute, ["COMMIT"]).start()
        with closing(ActionCache(path)) as cache:
            cache.put(key(0), ACTIONS)
            assert cache.get(key(0)) == ACTIONS
    assert warnings() == []


@pytest.mark.slow
def test_action_cache_is_usable_after_a_process_was_killed(path, warnings):
    (writer,) = start_writers(path, num_writers=1, count=1_000_000)
    deadline = time.monotonic() + 30
    with closing(ActionCache(path)) as cache:
        while not any(cache.get(key(number)) for number in range(1, 5000, 7)) and time.monotonic() < deadline:
            pass
        writer.send_signal(signal.SIGKILL)
        writer.communicate(timeout=30)
        assert cache.get(key(0)) in (None, actions_of(0))
    with closing(ActionCache(path)) as cache:
        cache.put(key(3), ACTIONS)
        assert cache.get(key(3)) == ACTIONS
        found = {number: cache.get(key(number)) for number in range(4, 5000)}
    assert any(found.values())
    assert all(actions in (None, actions_of(number)) for number, actions in found.items())
    assert warnings() == []


# Damaged entries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE valid_actions SET value = CAST(replace(CAST(value AS TEXT), 'west', 'east') AS BLOB) WHERE key = ?",
        "UPDATE valid_actions SET value = substr(value, 1, length(value) - 1) WHERE key = ?",
        "UPDATE valid_actions SET value = x'' WHERE key = ?",
        "UPDATE valid_actions SET value = 'text' WHERE key = ?",
        "UPDATE valid_actions SET value = (SELECT value FROM valid_actions WHERE number = 1) WHERE key = ?",
    ],
    ids=["changed", "truncated", "empty", "text", "of another key"],
)
def test_action_cache_ignores_a_damaged_entry(path, warnings, statement):
    with closing(ActionCache(path)) as cache:
        cache.put(key(0), ("up",))
        cache.put(key(1), ("east", "west"))
        change(path, statement, key(1))
        assert cache.get(key(1)) is None
        assert cache.get(key(1)) is None
        assert len(warnings()) == 1 and "damaged entries" in warnings()[0] and str(path) in warnings()[0]
        assert cache.get(key(0)) == ("up",)
        cache.put(key(1), ("east", "west"))
        assert cache.get(key(1)) == ("east", "west")


def test_action_cache_never_raises_or_returns_wrong_actions_for_a_damaged_file(path, tmp_path):
    fill(path, 60)
    good = path.read_bytes()
    damaged = tmp_path / "damaged.sqlite3"
    rng = random.Random(0)
    missing = 0
    for trial in range(200):
        content = bytearray(good)
        for _ in range(trial + 1):
            content[rng.randrange(len(content))] = rng.randrange(256)
        damaged.write_bytes(content if trial % 4 else content[: rng.randrange(len(content))])
        with closing(ActionCache(damaged, busy_timeout_s=0.05)) as cache:
            for number in range(60):
                found = cache.get(key(number))
                assert found in (None, actions_of(number)), (trial, number)
                missing += found is None
            cache.put(key(60), ACTIONS)
            assert cache.get(key(60)) in (None, ACTIONS)
        for file in damaged.parent.glob("damaged*"):
            file.unlink()
    assert missing > 2000  # many entries were damaged


def test_digest_depends_on_where_fields_end():
    fields = [(b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"abc", b""), (b"", b"abc"), (b"c", b"ab")]
    assert len({digest(*some) for some in fields}) == len(fields)
    assert digest(b"ab", b"c") == digest(b"ab", b"c")
    assert len(digest()) == 32


# Files that cannot be used -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["text", "truncated", "a folder", "in no folder", "of another table"])
def test_action_cache_disables_itself_with_one_warning_if_the_file_is_unusable(path, warnings, file):
    if file == "in no folder":
        path.parent.write_text("")
    elif file == "a folder":
        path.mkdir(parents=True)
    else:
        fill(path, 500)
        path.write_bytes(b"not a database" * 1000 if file == "text" else path.read_bytes()[: path.stat().st_size // 2])
    if file == "of another table":
        path.unlink()
        change(path, "CREATE TABLE valid_actions (something INTEGER)")
    with closing(ActionCache(path)) as cache:
        for number in range(500):
            assert cache.get(key(number)) in (None, actions_of(number))
            cache.put(key(number), actions_of(number))
        assert cache.get(key(0)) is None
    assert len(warnings()) == 1 and f"{path} is disabled" in warnings()[0]
    assert "PRIORZERO_ACTION_CACHE=off" in warnings()[0]


def test_action_cache_disables_itself_if_the_file_stays_locked(path, warnings):
    fill(path, 3)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        cache = ActionCache(path, busy_timeout_s=0.2)
        assert cache.get(key(2)) == actions_of(2)  # a writer does not block readers
        began = time.monotonic()
        cache.put(key(3), ACTIONS)
        cache.put(key(4), ACTIONS)  # this does not wait again
        assert 0.15 < time.monotonic() - began < 2
        assert cache.get(key(2)) is None
        other.execute("ROLLBACK")
    assert len(warnings()) == 1 and "locked" in warnings()[0]
    with closing(ActionCache(path)) as cache:
        assert cache.get(key(2)) == actions_of(2)
        assert cache.get(key(3)) is None


def test_action_cache_disables_itself_if_the_disk_is_full(path, warnings):
    fill(path, 3)
    cache = ActionCache(path)
    assert cache.get(key(2)) == actions_of(2)
    cache._connection.execute("PRAGMA max_page_count=1")  # SQLite raises the same error as for a full disk
    for number in range(3, 200):
        cache.put(key(number), actions_of(number))
    assert len(warnings()) == 1 and "full" in warnings()[0]
    with closing(ActionCache(path)) as cache:
        assert cache.get(key(2)) == actions_of(2)  # existing entries are kept
        assert cache.get(key(199)) is None


# The path of the file ------------------------------------------------------------------------------------------------


def test_cache_file_follows_the_environment_variable(monkeypatch, tmp_path, warnings):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/somebody")
    default = tmp_path / "priorzero" / "games" / "valid_actions.sqlite3"
    mine, home = tmp_path / "mine", Path("/home/somebody/mine")
    for value, expected in (("off", None), ("", default), (str(mine), mine), ("~/mine", home)):
        monkeypatch.setenv(action_cache.CACHE_VARIABLE, value)
        assert cache_file() == expected
    monkeypatch.delenv(action_cache.CACHE_VARIABLE)
    assert cache_file() == default
    assert warnings() == []


def test_cache_file_is_disabled_without_a_home_folder(monkeypatch, warnings):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(action_cache.CACHE_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    assert cache_file() is None
    assert len(warnings()) == 1 and "there is no folder for cached files" in warnings()[0]


# Real games ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_game(path, monkeypatch):
    """A function that opens a game which uses the cache in ``path``."""
    monkeypatch.setenv(action_cache.CACHE_VARIABLE, str(path))
    games = []

    def make(name: str = "zork1.z5", **changes) -> JerichoGame:
        arguments = {"seed": 0, "max_episode_steps": 100, "look_and_inventory": False, "drop_inert_commands": True}
        games.append(JerichoGame(story(name), **{**arguments, "valid_actions": "exact", **changes}))
        return games[-1]

    yield make
    for game in games:
        game.close()


def count_searches(game: JerichoGame) -> list[None]:
    """A list that grows by one element whenever valid actions are searched."""
    calls = []
    find = game._probe.find_actions

    def counted(state):
        calls.append(None)
        return find(state)

    game._probe.find_actions = counted
    return calls


ROUTE = ["open mailbox", "south", "east", "open window", "west"]


def play(game: JerichoGame) -> list[tuple[str, ...]]:
    return [game.reset().valid_actions, *(game.step(command)[0].valid_actions for command in ROUTE)]


def test_jericho_game_uses_actions_that_another_object_found(open_game, path):
    first, second = open_game(), open_game()
    calls = count_searches(first), count_searches(second)
    found = play(first)
    assert path.exists()
    assert play(second) == found
    assert (len(calls[0]), len(calls[1])) == (len(ROUTE) + 1, 0)
    second._cache.put = second._cache.get = None  # the entries are in memory now
    assert play(second) == found


def test_cache_key_depends_on_the_story(open_game, monkeypatch):
    monkeypatch.setattr(EmulatorState, "digest", lambda state: b"the same state")
    zork1 = open_game().reset().valid_actions
    game = open_game("detective.z5")
    calls = count_searches(game)
    detective = game.reset().valid_actions
    assert len(calls) == 1
    assert detective != zork1
    assert open_game().reset().valid_actions == zork1
    assert open_game("detective.z5").reset().valid_actions == detective


@pytest.mark.parametrize(
    "target", ["jericho.__version__", "spacy.__version__", "priorzero.envs.frotz.ALGORITHM_VERSION"]
)
def test_cache_key_depends_on_versions(open_game, monkeypatch, target):
    open_game().reset()
    monkeypatch.setattr(target, "another")
    game = open_game()
    calls = count_searches(game)
    game.reset()
    assert len(calls) == 1


def test_cache_key_depends_on_the_language_model(open_game, monkeypatch):
    game = open_game()
    game.reset()
    jericho_util = sys.modules["jericho.util"]
    with jericho_util.spacy_nlp.select_pipes(disable=["attribute_ruler"]):
        assert open_game()._fingerprint != game._fingerprint
    assert open_game()._fingerprint == game._fingerprint
    monkeypatch.setitem(jericho_util.spacy_nlp._meta, "version", "9.9")
    assert open_game()._fingerprint != game._fingerprint


@pytest.mark.slow
async def test_worker_processes_play_a_jericho_game_and_share_the_cache(open_game, path):
    game = open_game()
    searches = count_searches(game)
    arguments = {"seed": 0, "max_episode_steps": 9, "look_and_inventory": False, "drop_inert_commands": True}
    spec = resolve_game(str(story("zork1.z5")))
    one, other = (make_worker(spec, **arguments, valid_actions="exact", timeout_s=60) for _ in range(2))
    try:
        await asyncio.gather(one.start(), other.start())
        found = (await one.reset()).valid_actions
        assert "leaflet" in (await one.step("open mailbox"))[0].feedback
        with pytest.raises(GameWorkerError, match="ValueError: 'dance' is not among the valid actions"):
            await one.step("dance")
        assert game.reset().valid_actions == found
        assert searches == []  # this process used the entry of the worker
        game._cache.put(next(iter(game._known_actions)), ("from the file",))
        assert (await other.reset()).valid_actions == ("from the file",)
    finally:
        await asyncio.gather(one.close(), other.close())
