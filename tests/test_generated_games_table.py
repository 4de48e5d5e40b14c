"""scripts/generated_games_table.py: the levels, what is measured, the page, and wrong arguments."""

from __future__ import annotations

import json
from pathlib import Path

import generated_games_table as table
import pytest

from priorzero.envs.textworld_files import parse_request


def test_generated_games_table_names_levels_that_exist():
    env_ids = [env_id for levels in table.LEVELS.values() for env_id in levels.values()]
    assert len(env_ids) == len(set(env_ids)) > 20
    for env_id in env_ids:
        if env_id.startswith("textworld:"):
            parse_request(env_id)
    games = (table.ROOT / "docs" / "games.md").read_text()
    assert "textworld:cooking?recipe=1&take=1&cut=1&open=1&split=train" in games


def test_generated_games_table_measures_and_keeps_results(tmp_path, monkeypatch, capsys):
    pytest.importorskip("minigrid")
    monkeypatch.setattr(table, "LEVELS", {"babyai": {"small": "babyai:GoToObjS4", "open": "babyai:GoToLocalS5N2"}})
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    flags = ["--episodes", "4", "--out", str(page), "--results", str(results)]
    assert table.main(flags) == 0
    played = json.loads(results.read_text())["babyai:GoToObjS4"]["played"]
    assert len(played["scores"]) == 4 and played["max_score"] == 1 and 2 <= played["mean_actions"] <= 6
    assert played["wins"] == sum(score > 0 for score in played["scores"])  # a level is won or gives nothing
    assert len(set(played["scores"])) > 1  # the layouts differ
    [row] = [line for line in page.read_text().splitlines() if line.startswith("| small |")]
    assert row.startswith("| small | `babyai:GoToObjS4` | 1 | - | 16 |") and row.endswith(f"| {played['wins']} of 4 |")
    capsys.readouterr()
    assert table.main(flags) == 0
    assert capsys.readouterr().out == f"written to {page}\n"  # nothing was measured again


def test_generated_games_table_refuses_wrong_arguments(tmp_path, capsys):
    flags = ["--out", str(tmp_path / "page.md"), "--results", str(tmp_path / "results.json")]
    assert table.main(["--families", "chess", *flags]) == 2
    assert "chess" in capsys.readouterr().err
    (tmp_path / "results.json").write_text("{")
    assert table.main(flags) == 2
    assert "cannot be read" in capsys.readouterr().err and not Path(tmp_path / "page.md").exists()
