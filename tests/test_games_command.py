"""``python -m priorzero.games``: the games that are found and those that can be fetched."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os

import pytest

from priorzero import games
from priorzero.envs.babyai_levels import level_ids
from priorzero.envs.games import supported_games
from priorzero.envs.story_files import find_stories


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    """An empty working folder, folder of games, and cache folder."""
    for name in ("work", "games", "cache"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PRIORZERO_GAMES", str(tmp_path / "games"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def section(text, title):
    """The lines of a section, as one line."""
    return " ".join(text.split(title, 1)[1].split("\n\n", 1)[0].split())


def test_games_lists_files_by_their_contents_with_their_folders(capsys, monkeypatch, folders):
    (folders / "games" / "ours.z5").write_bytes(b"supported")
    (folders / "work" / "zork1.z5").write_bytes(b"another release")
    (folders / "work" / "notes.txt").write_text("no story")
    (folders / "work" / "empty.z5").touch()
    supported = {"theirs.z5": hashlib.md5(b"supported").hexdigest(), "zork1.z5": "another"}
    for module in ("priorzero.games", "priorzero.envs.story_files"):
        monkeypatch.setattr(f"{module}.supported_games", lambda: supported)
    assert games.main([]) == 0
    text = capsys.readouterr().out
    found = section(text, "Story files that were found")
    assert f"in {folders}/work: zork1.z5 (not supported by Jericho; played with a general grammar; Jericho" in found
    assert f"in {folders}/games: ours.z5" in found and f"in {folders}/cache/priorzero/games: none" in found
    assert "notes.txt" not in text and "empty.z5" not in text
    assert section(text, "can be downloaded: python scripts/fetch_games.py NAME") == "zork1.z5"


def test_games_lists_all_supported_games_and_textworld_challenges(capsys):
    assert games.main([]) == 0
    text = capsys.readouterr().out
    assert section(text, "scripts/fetch_games.py NAME") == ", ".join(sorted(supported_games()))
    assert "textworld:cooking" in text and "recipe: a whole number from 1 to 20 (default 1)" in text
    assert "level: 1 to 100 (no dead ends), 101 to 150 (one dead end at each room), 201 to 233 (two) (def" in text
    assert "    textworld:file=PATH: a game that you made" in text
    assert max(map(len, text.splitlines())) <= 130


def test_games_lists_entry_points_of_packages_without_importing_them(capsys, monkeypatch, folders):
    package = folders / "site" / "mazes-1.2.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: mazes\nVersion: 1.2\n")
    (package / "entry_points.txt").write_text("[priorzero.games]\nmaze = no_such_module:make\n")
    monkeypatch.syspath_prepend(str(folders / "site"))
    importlib.invalidate_caches()
    assert games.main([]) == 0
    text = capsys.readouterr().out
    assert "    maze: of mazes 1.2 (no_such_module:make)" in text
    assert "of priorzero" not in text


def test_games_lists_levels_of_babyai_and_the_packages_of_built_in_games(capsys):
    assert games.main([]) == 0
    text = capsys.readouterr().out
    listed = section(text, f"babyai: built in, with minigrid {importlib.metadata.version('minigrid')}")
    assert listed.split(" gymnasium: ")[0] == ", ".join(level_ids())
    assert f"\n    gymnasium: built in, with gymnasium {importlib.metadata.version('gymnasium')}" in text


def test_games_says_how_to_install_the_levels_of_babyai(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "minigrid" else find(name))
    level_ids.cache_clear()
    assert games.main([]) == 0
    text = section(capsys.readouterr().out, "babyai: built in, but minigrid is missing")
    assert "pip install" in text and "minigrid==3.2.0" in text


def test_games_refuses_a_folder_that_cannot_be_used(capsys, monkeypatch):
    monkeypatch.setenv("PRIORZERO_GAMES", "$PRIORZERO_NOT_SET/x")
    assert games.main([]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: PRIORZERO_GAMES=") and captured.out == ""


def test_games_refuses_arguments(capsys):
    with pytest.raises(SystemExit) as caught:
        games.main(["zork1"])
    assert caught.value.code == 2 and "unrecognized arguments: zork1" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every folder")
def test_find_stories_notes_a_folder_that_cannot_be_read(folders):
    (folders / "games").chmod(0o100)
    _, notes, stories = find_stories()
    (folders / "games").chmod(0o700)
    assert stories == [] and any("cannot be read" in note for note in notes)
