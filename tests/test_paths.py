"""Paths that a user gives, and the cache folder, also of a user without a home folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from priorzero.envs import action_cache
from priorzero.envs.games import resolve_game, resolve_games
from priorzero.preflight import check_models
from priorzero.runtime.paths import shown, user_cache_dir, user_path
from priorzero.types import UserError
from tests.helpers.game_files import story
from tests.helpers.models import make_settings

ROOT = Path(__file__).parent.parent


@pytest.fixture
def zork1() -> bytes:
    return story("zork1.z5").read_bytes()


@pytest.fixture
def no_home(monkeypatch):
    """A user without a home folder, such as a container's, whose number is not in /etc/passwd."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    for name in ("HOME", "XDG_CACHE_HOME", "PRIORZERO_ACTION_CACHE"):
        monkeypatch.delenv(name, raising=False)


# ---- paths ----


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("data", "data"),
        ("data/", "data"),
        ("~", "/home/me"),
        ("~/x y", "/home/me/x y"),
        ("a~", "a~"),
        ("$HOME/x", "/home/me/x"),
        ("${HOME}x", "/home/mex"),
        ("costs $", "costs $"),
        ("$5", None),
        ("$HOME/$PRIORZERO_NOT_SET", None),
        ("日本/ü", "日本/ü"),
        ("a'b\"c\nd", "a'b\"c\nd"),
        ("..", ".."),
    ],
)
def test_user_path_expands_home_and_variables(monkeypatch, given, expected):
    monkeypatch.setenv("HOME", "/home/me")
    if expected is None:
        with pytest.raises(UserError, match="is not set"):
            user_path(given, what="--config ")
    else:
        assert user_path(given, what="--config ") == Path(expected)


def test_user_path_is_expanded_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "$HOME").mkdir()
    for given in ("./~", "./~/x", "$HOME"):  # a folder of this name exists
        path = user_path(given, what="")
        assert path.absolute() == tmp_path / given and user_path(str(path), what="") == path


def test_user_path_reports_what_cannot_be_accessed(tmp_path, monkeypatch):
    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", denied)
    with pytest.raises(UserError, match=r"--resume /data/x: cannot be accessed \(Permission denied\)"):
        user_path("/data/x", what="--resume ")


def test_user_path_in_a_working_folder_that_was_deleted(tmp_path, monkeypatch):
    (tmp_path / "deleted").mkdir()
    monkeypatch.chdir(tmp_path / "deleted")
    (tmp_path / "deleted").rmdir()
    with pytest.raises(UserError, match="--resume x: the working folder does not exist any more"):
        user_path("x", what="--resume ")
    with pytest.raises(UserError, match="the working folder does not exist any more"):
        resolve_game("zork1.z5")
    assert user_path(str(tmp_path), what="") == tmp_path


def test_shown_is_short_and_printable():
    assert shown("a b ü") == "a b ü" and shown("a\nb\udcff") == "'a\\nb\\udcff'"
    assert len(shown("x" * 10_000)) < 250 and "(10000 characters)" in shown("x" * 10_000)


def test_resolve_game_expands_the_home_folder(zork1, tmp_path, monkeypatch):
    (tmp_path / "my, games").mkdir()
    (tmp_path / "my, games" / "zork1.z5").write_bytes(zork1)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("~/my, games/zork1.z5", "$HOME/my, games/zork1.z5"):
        assert [game.name for game in resolve_games(given)] == ["zork1"]
    monkeypatch.chdir("/")
    monkeypatch.setenv("PRIORZERO_GAMES", "~/my, games")
    assert resolve_game("zork1.z5").path == tmp_path / "my, games" / "zork1.z5"


# ---- without a home folder ----


def test_user_cache_dir_without_a_home_folder(no_home, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"HOME is not set.*export XDG_CACHE_HOME="):
        user_cache_dir()
    with pytest.raises(UserError, match="~ is not known, since HOME is not set"):
        user_path("~/data", what="--resume ")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_dir() == tmp_path / "priorzero"


def test_resolve_game_without_a_home_folder(zork1, no_home, monkeypatch, tmp_path):
    """The cache is needed only if the story is in no other folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PRIORZERO_GAMES", raising=False)
    with pytest.raises(UserError, match=r"There is no story file 'zork1.z5'.*HOME is not set"):
        resolve_game("zork1.z5")
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        resolve_game("textworld:simple?seed=7")
    (tmp_path / "zork1.z5").write_bytes(zork1)
    assert resolve_game("zork1.z5").name == "zork1"


def test_action_cache_is_disabled_without_a_home_folder(no_home, monkeypatch, caplog):
    assert action_cache.cache_file() is None and "HOME is not set" in caplog.text
    monkeypatch.setenv("PRIORZERO_ACTION_CACHE", "~/x")
    assert action_cache.cache_file() is None and "PRIORZERO_ACTION_CACHE=~/x" in caplog.text


def test_check_models_needs_a_cache_for_vllm(no_home, monkeypatch, tiny_llm_folder):
    monkeypatch.setattr("priorzero.preflight.choose_engine", lambda *_, **__: "vllm")
    settings = make_settings({"prior": {"engine": "vllm"}, "llm": {"path": str(tiny_llm_folder)}})
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        check_models(settings)


def test_command_line_of_a_user_without_an_entry_in_passwd(tmp_path):
    """A real one. It may read what is in the folders of root, where Python may be installed."""
    become = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
    become += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    code = "import os, pathlib; print(os.getuid(), os.path.expanduser('~'))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("HOME", "XDG_CACHE_HOME"):
        environment.pop(name, None)

    def run(*words):
        command = [*become, sys.executable, *words]
        return subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, check=False)

    try:
        probe = run("-c", code)
    except FileNotFoundError:
        pytest.skip("there is no setpriv")
    if probe.stdout != "54321 ~\n":
        pytest.skip("this user cannot start a process of another user")
    done = run("-m", "priorzero.entry", "--quick_test", "--set", f"run.output_dir={tmp_path}")
    assert done.returncode == 2 and f"{tmp_path} is not a writable folder (Permission denied)" in done.stderr
    done = run("-m", "priorzero.entry", "--quick_test", "--set", "run.output_dir=/tmp/priorzero-of-54321")
    assert done.returncode == 2 and "there is no folder for cached files: HOME is not set" in done.stderr
