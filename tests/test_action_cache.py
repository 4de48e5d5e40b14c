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

from priorzero.envs import action_cache, jericho_game, make_worker, resolve_game
from priorzero.envs.action_cache import ActionCache, cache_file
from priorzero.envs.cache import digest
from priorzero.envs.jericho_game import JerichoGame
from tests.helpers.game_files import story

ACTIONS = ("open mailbox", "say ünïcode; 'quoted'", "west")


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "folder" / "valid_actions.sqlite3"


@pytest.fixture
def warnings(caplog):
    """The warnings so far, as texts."""
    caplog.set_level(logging.WARNING, logger="priorzero.envs.action_cache")
    return lambda: [record.getMessage() for record in caplog.records]


def key(number: int) -> bytes:
    return digest(str(number).encode())


def actions_of(number: int) -> tuple[str, ...]:
    """Other ones for each number."""
    return tuple(f"put thing {number} in box {n}" for n in range(number % 7))


def fill(path: Path, count: int) -> None:
    with closing(ActionCache(path)) as cache:
        for number in range(count):
            cache.put(key(number), actions_of(number))


def change(path: Path, statement: str, *values) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement, values)


# The file ------------------------------------------------------------------------------------------------------------


def test_what_one_object_stores_another_finds(path, warnings):
    one, other = ActionCache(path), ActionCache(path)
    assert not path.parent.exists()  # opened at the first use, not before
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


def test_without_a_file():
    cache = ActionCache(None)
    cache.put(key(0), ACTIONS)
    assert cache.get(key(0)) is None
    cache.close()


def test_the_oldest_make_room(path):
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
import logging, random, sys, time
from pathlib import Path
logging.basicConfig()
from priorzero.envs.action_cache import ActionCache
sys.path.insert(0, sys.argv[1])
from test_action_cache import actions_of, key
start, numbers = float(sys.argv[3]), list(range(int(sys.argv[4])))
cache = ActionCache(Path(sys.argv[2]), busy_timeout_s=60)
random.shuffle(numbers)
time.sleep(max(0, start - time.time()))  # all at once
print("began", flush=True)
for number in numbers:
    if (found := cache.get(key(number))) is None:
        cache.put(key(number), actions_of(number))
    else:
        assert found == actions_of(number), (number, found)
"""


def start_writer(path: Path, *, begin: float, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITE, str(Path(__file__).parent), str(path), str(begin), str(count)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_many_processes_make_and_fill_the_file_together(path, warnings):
    begin = time.time() + 4
    writers = [start_writer(path, begin=begin, count=300) for _ in range(5)]
    for writer in writers:
        output, errors = writer.communicate(timeout=120)
        assert (writer.returncode, output, errors) == (0, "began\n", "")  # no warning, either
    with closing(ActionCache(path)) as cache:
        assert all(cache.get(key(number)) == actions_of(number) for number in range(300))
    assert warnings() == []


def test_waits_while_another_process_makes_the_file(path, warnings):
    path.parent.mkdir()
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("CREATE TABLE half_made (something)")
        other.execute("BEGIN IMMEDIATE")  # here SQLite tells others "locked" at once, whatever their time limit
        other.execute("INSERT INTO half_made VALUES (1)")
        threading.Timer(0.3, other.execute, ["COMMIT"]).start()
        with closing(ActionCache(path)) as cache:
            cache.put(key(0), ACTIONS)
            assert cache.get(key(0)) == ACTIONS
    assert warnings() == []


@pytest.mark.slow
def test_a_killed_process_leaves_a_file_that_can_be_used(path, warnings):
    writer = start_writer(path, begin=0, count=1_000_000)
    assert writer.stdout.readline() == "began\n"
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


# What must not be served ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE valid_actions SET value = CAST(replace(CAST(value AS TEXT), 'west', 'east') AS BLOB) WHERE key = ?",
        "UPDATE valid_actions SET value = substr(value, 1, length(value) - 1) WHERE key = ?",
        "UPDATE valid_actions SET value = x'' WHERE key = ?",
        "UPDATE valid_actions SET value = 'text' WHERE key = ?",
        "UPDATE valid_actions SET value = (SELECT value FROM valid_actions WHERE number = 1) WHERE key = ?",
    ],
    ids=["changed", "cut", "empty", "text", "of another key"],
)
def test_a_damaged_entry_is_not_served(path, warnings, statement):
    with closing(ActionCache(path)) as cache:
        cache.put(key(0), ("up",))
        cache.put(key(1), ("east", "west"))
        change(path, statement, key(1))
        assert cache.get(key(1)) is None
        assert cache.get(key(1)) is None
        assert len(warnings()) == 1  # once
        assert "Damaged entries" in warnings()[0]
        assert str(path) in warnings()[0]
        assert cache.get(key(0)) == ("up",)
        cache.put(key(1), ("east", "west"))  # found again
        assert cache.get(key(1)) == ("east", "west")


def test_no_damage_to_the_file_raises_or_serves_a_wrong_entry(path, tmp_path):
    fill(path, 60)
    good = path.read_bytes()
    damaged = tmp_path / "damaged.sqlite3"
    player = random.Random(0)
    missing = 0
    for trial in range(200):
        content = bytearray(good)
        for _ in range(trial + 1):
            content[player.randrange(len(content))] = player.randrange(256)
        damaged.write_bytes(content if trial % 4 else content[: player.randrange(len(content))])
        with closing(ActionCache(damaged, busy_timeout_s=0.05)) as cache:
            for number in range(60):
                found = cache.get(key(number))
                assert found in (None, actions_of(number)), (trial, number)
                missing += found is None
            cache.put(key(60), ACTIONS)
            assert cache.get(key(60)) in (None, ACTIONS)
        for left in damaged.parent.glob("damaged*"):
            left.unlink()
    assert missing > 2000  # the damage was real


def test_moving_bytes_between_fields_makes_another_key():
    fields = [(b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"abc", b""), (b"", b"abc"), (b"c", b"ab")]
    assert len({digest(*some) for some in fields}) == len(fields)
    assert digest(b"ab", b"c") == digest(b"ab", b"c")
    assert len(digest()) == 32


# Files that cannot be used -------------------------------------------------------------------------------------------


def a_text(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("this is no database" * 1000)


def half_of_it(path: Path) -> None:
    fill(path, 500)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def a_folder(path: Path) -> None:
    path.mkdir(parents=True)


def a_file_in_place_of_the_folder(path: Path) -> None:
    path.parent.write_text("")


def another_table(path: Path) -> None:
    path.parent.mkdir()
    change(path, "CREATE TABLE valid_actions (something INTEGER)")


@pytest.mark.parametrize("spoil", [a_text, half_of_it, a_folder, a_file_in_place_of_the_folder, another_table])
def test_one_warning_and_on_without(path, warnings, spoil):
    spoil(path)
    with closing(ActionCache(path)) as cache:
        for number in range(500):
            assert cache.get(key(number)) in (None, actions_of(number))
            cache.put(key(number), actions_of(number))
        assert cache.get(key(0)) is None  # it stepped aside
    assert len(warnings()) == 1
    assert f"without the cache of valid actions {path}" in warnings()[0]
    assert "PRIORZERO_ACTION_CACHE=off" in warnings()[0]


def test_a_file_that_stays_locked(path, warnings):
    fill(path, 3)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        cache = ActionCache(path, busy_timeout_s=0.2)
        assert cache.get(key(2)) == actions_of(2)  # who writes does not keep others from reading
        began = time.monotonic()
        cache.put(key(3), ACTIONS)
        cache.put(key(4), ACTIONS)  # does not wait again
        assert 0.15 < time.monotonic() - began < 2
        assert cache.get(key(2)) is None
        other.execute("ROLLBACK")
    assert len(warnings()) == 1
    assert "locked" in warnings()[0]
    with closing(ActionCache(path)) as cache:
        assert cache.get(key(2)) == actions_of(2)
        assert cache.get(key(3)) is None


def test_a_full_disk(path, warnings):
    fill(path, 3)
    cache = ActionCache(path)
    assert cache.get(key(2)) == actions_of(2)
    cache._connection.execute("PRAGMA max_page_count=1")  # SQLite's own words for a full disk follow
    for number in range(3, 200):
        cache.put(key(number), actions_of(number))
    assert len(warnings()) == 1
    assert "full" in warnings()[0]
    with closing(ActionCache(path)) as cache:
        assert cache.get(key(2)) == actions_of(2)  # what was there is still there
        assert cache.get(key(199)) is None


# Where it is ---------------------------------------------------------------------------------------------------------


def test_place_of_the_file(monkeypatch, tmp_path, warnings):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/somebody")
    usual = tmp_path / "priorzero" / "games" / "valid_actions.sqlite3"
    for value, place in (
        ("off", None),
        ("", usual),
        (str(tmp_path / "mine"), tmp_path / "mine"),
        ("~/mine", Path("/home/somebody/mine")),
    ):
        monkeypatch.setenv(action_cache.CACHE_VARIABLE, value)
        assert cache_file() == place
    monkeypatch.delenv(action_cache.CACHE_VARIABLE)
    assert cache_file() == usual
    assert warnings() == []


def test_a_user_without_a_home_folder(monkeypatch, warnings):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(action_cache.CACHE_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    assert cache_file() is None
    assert len(warnings()) == 1
    assert "Could not determine home directory." in warnings()[0]


# Real games ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_game(path, monkeypatch):
    """Opens a game that uses the cache in ``path``."""
    monkeypatch.setenv(action_cache.CACHE_VARIABLE, str(path))
    games = []

    def make(name: str = "zork1.z5", **changes) -> JerichoGame:
        arguments = {"seed": 0, "max_episode_steps": 100, "look_and_inventory": False, "drop_inert_commands": True}
        games.append(JerichoGame(story(name), **{**arguments, **changes}))
        return games[-1]

    yield make
    for game in games:
        game.close()


def asked(game: JerichoGame) -> list[None]:
    """Grows by one whenever Jericho looks for valid actions."""
    calls = []
    find = game._env.get_valid_actions

    def counted(**arguments):
        calls.append(None)
        return find(**arguments)

    game._env.get_valid_actions = counted
    return calls


ROUTE = ["open mailbox", "south", "east", "open window", "west"]


def play(game: JerichoGame) -> list[tuple[str, ...]]:
    return [game.reset().valid_actions, *(game.step(command)[0].valid_actions for command in ROUTE)]


def test_another_game_object_finds_what_the_first_one_found(open_game, path):
    first, second = open_game(), open_game()
    calls = asked(first), asked(second)
    found = play(first)
    assert path.exists()
    assert play(second) == found
    assert (len(calls[0]), len(calls[1])) == (len(ROUTE) + 1, 0)
    second._cache.put = second._cache.get = None  # what came from the file is in memory now
    assert play(second) == found


def test_off(open_game, path, monkeypatch):
    monkeypatch.setenv(action_cache.CACHE_VARIABLE, "off")
    game = open_game()
    calls = asked(game)
    play(game)
    assert len(calls) == len(ROUTE) + 1
    assert not path.parent.exists()


def test_not_for_another_story(open_game, monkeypatch):
    monkeypatch.setattr(jericho_game, "state_digest", lambda state: b"the same state")
    zork1 = open_game().reset().valid_actions
    game = open_game("detective.z5")
    calls = asked(game)
    detective = game.reset().valid_actions
    assert len(calls) == 1
    assert detective != zork1
    assert open_game().reset().valid_actions == zork1
    assert open_game("detective.z5").reset().valid_actions == detective


@pytest.mark.parametrize(
    "target", ["jericho.__version__", "spacy.__version__", "priorzero.envs.frotz.ALGORITHM_VERSION"]
)
def test_not_for_another_version(open_game, monkeypatch, target):
    open_game().reset()
    monkeypatch.setattr(target, "another")
    game = open_game()
    calls = asked(game)
    game.reset()
    assert len(calls) == 1


def test_not_for_another_language_model(open_game, monkeypatch):
    game = open_game()
    game.reset()
    jericho_util = sys.modules["jericho.util"]
    with jericho_util.spacy_nlp.select_pipes(disable=["attribute_ruler"]):
        assert open_game()._fingerprint != game._fingerprint
    assert open_game()._fingerprint == game._fingerprint
    monkeypatch.setitem(jericho_util.spacy_nlp._meta, "version", "9.9")
    assert open_game()._fingerprint != game._fingerprint


def test_not_for_another_state(open_game):
    game = open_game()
    play(game)
    stored = game._env.get_state()
    ram, stack, *registers = stored

    def changed(array, index):
        other = array.copy()
        other[index] ^= 1
        return other

    where = next(n for n, value in enumerate(registers) if isinstance(value, tuple))
    for state in (
        (changed(ram, len(ram) - 1), stack, *registers),
        (changed(ram, 100), stack, *registers),
        (ram, changed(stack, -1), *registers),
        (ram, stack, *registers[:where], (registers[where][0] + 1, *registers[where][1:]), *registers[where + 1 :]),
    ):
        fresh = open_game()
        fresh._env.get_state = lambda state=state: state
        fresh._find_valid_actions = lambda: ("asked",)
        assert fresh._valid_actions() == ("asked",)
    fresh = open_game()
    fresh._env.get_state = lambda: stored
    fresh._find_valid_actions = lambda: ("asked",)
    assert fresh._valid_actions() == game._state.valid_actions  # the stored state itself is found


def test_a_damaged_file_does_not_stop_a_game(open_game, path, warnings):
    path.parent.mkdir()
    path.write_text("no database" * 1000)
    damaged = play(open_game())
    assert len(warnings()) == 1
    path.unlink()
    assert play(open_game()) == damaged
    assert len(warnings()) == 1


@pytest.mark.slow
def test_worker_processes_share_the_file(open_game, path):
    async def first_actions():
        spec = resolve_game(str(story("zork1.z5")))
        worker = make_worker(
            spec, seed=0, max_episode_steps=9, look_and_inventory=False, drop_inert_commands=True, timeout_s=60
        )
        try:
            return (await worker.reset()).valid_actions
        finally:
            await worker.close()

    found = asyncio.run(first_actions())
    game = open_game()
    calls = asked(game)
    assert game.reset().valid_actions == found
    assert calls == []  # this process got it from the worker's
    game._cache.put(next(iter(game._known_actions)), ("from the file",))
    assert asyncio.run(first_actions()) == ("from the file",)  # and the worker from this one's


def test_nothing_is_opened_on_import(path):
    code = "import sys, priorzero.envs.jericho_game; print('spacy' in sys.modules)"
    environment = {**os.environ, action_cache.CACHE_VARIABLE: str(path), "PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout == "False\n"
    assert not path.parent.exists()
