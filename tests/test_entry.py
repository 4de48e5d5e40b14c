"""The command line: wrong input gets one clear message and exit code 2, and nothing is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from priorzero import entry, ray_entry
from priorzero.config import PRESETS, resolve_settings
from priorzero.types import UserError

ROOT = Path(__file__).parent.parent


def run(*arguments, cwd):
    """The command line in a new interpreter; returns the exit code and stderr."""
    code = f"import sys; sys.argv[1:] = {list(arguments)!r}; from priorzero import entry; sys.exit(entry.main())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, env=environment(), check=False
    )
    return done.returncode, done.stderr


def environment():
    kept = {k: v for k, v in os.environ.items() if k != "PRIORZERO_GAMES"}
    return {**kept, "PYTHONPATH": str(ROOT)}


@pytest.fixture(autouse=True)
def game_cache(monkeypatch, tmp_path_factory):
    """One cache for all of these tests: TextWorld takes seconds to generate a game."""
    folder = tmp_path_factory.getbasetemp() / "entry-cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))


def check(capsys, monkeypatch, tmp_path, arguments, *words):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert entry.main(arguments) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and "Traceback" not in stderr
    for word in words:
        assert word in stderr
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written


def settings(*arguments):
    return entry.settings_from(entry.build_parser().parse_args(arguments))


QUICK = ["--quick_test"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--env_id", "zork9.z5"], ["zork9.z5"]),
        (["--env_id", "textworld:sample"], ["simple"]),
        (["--env_id", "nonsense"], ["nonsense"]),
        (["--max_iter", "-1"], ["run.max_iter=-1 must be a whole number, at least 1"]),
        (["--seed", "-1"], ["run.seed=-1 must be a whole number, at least 0"]),
        (["--set", "llm.bach_size=3"], ["did you mean 'llm.batch_size'?"]),
        (["--set", "llm.micro_batch_size=3"], ["llm.micro_batch_size=3 must divide llm.batch_size=8; try 2 or 4"]),
        (["--set", "nonsense"], ["group.key=value"]),
        (["--config", "missing.yaml"], ["missing.yaml", "cannot be read"]),
        (["--exp_name", ""], ["--exp_name ''"]),
        (["--exp_name", "../up"], ["letters, digits"]),
        (["--exp_name", "a/b"], ["letters, digits"]),
        (["--set", "llm.path=./no/such/folder"], ["llm.path=./no/such/folder", "no such folder"]),
        (["--set", "llm.path=package:no-such-model"], ["not installed", "pip install"]),
        (["--set", "encoder.path=./nowhere"], ["encoder.path=./nowhere"]),
        (["--set", "encoder.path=package:a.b.c"], ["not installed"]),
        (["--set", "llm.path="], ["llm.path is empty"]),
        (["--set", "run.device=cuda"], ["torch sees no GPU"]),
        (["--exp_name", "x" * 300], ["at most 100 letters"]),
        (["--set", "run.output_dir=/dev/null/sub"], ["run.output_dir=/dev/null/sub", "give another one"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_entry_refuses_wrong_input(capsys, monkeypatch, tmp_path, arguments, words):
    import torch

    monkeypatch.delenv("PRIORZERO_GAMES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check(capsys, monkeypatch, tmp_path, QUICK + arguments, *words)


def test_entry_says_where_it_searched_for_a_missing_story_file(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("PRIORZERO_GAMES", raising=False)
    words = [str(tmp_path), "b732a93a6244ddd92a9b9a3e3a46c687", "scripts/fetch_games.py"]
    check(capsys, monkeypatch, tmp_path, ["--env_id", "zork1.z5"], *words)


def test_entry_refuses_a_story_file_with_another_md5(capsys, monkeypatch, tmp_path):
    (tmp_path / "zork1.z5").write_bytes(b"not zork at all")
    check(capsys, monkeypatch, tmp_path, ["--env_id", "zork1.z5"], "b732a93a6244ddd92a9b9a3e3a46c687", "MD5")


def test_entry_refuses_a_file_that_is_not_yaml(capsys, monkeypatch, tmp_path):
    (tmp_path / "x.yaml").write_text("llm: [1, 2")
    check(capsys, monkeypatch, tmp_path, ["--config", "x.yaml"], "x.yaml", "is not valid YAML")


def test_entry_leaves_an_existing_run_unchanged(capsys, monkeypatch, tmp_path):
    run_folder = tmp_path / "data_priorzero" / "mine"
    run_folder.mkdir(parents=True)
    (run_folder / "config.yaml").write_text("precious")
    check(capsys, monkeypatch, tmp_path, [*QUICK, "--exp_name", "mine"], "exists already", "give another name")
    assert (run_folder / "config.yaml").read_text() == "precious"


def test_entry_command_exits_with_code_2_and_a_message(tmp_path):
    code, stderr = run("--quick_test", "--set", "llm.micro_batch_size=3", cwd=tmp_path)
    assert code == 2 and stderr.startswith("error: ") and "Traceback" not in stderr
    code, stderr = run("--no_such_flag", cwd=tmp_path)
    assert code == 2 and "unrecognized arguments: --no_such_flag" in stderr


def test_entry_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({"run": {"seed": 5, "max_iter": 50}, "search": {"num_simulations": 33}}))
    assert settings("--quick_test").search.num_simulations == 10  # preset over default
    both = settings("--quick_test", "--config", str(path))
    assert (both.search.num_simulations, both.run.seed) == (33, 5)  # file over preset
    assert settings("--config", str(path), "--set", "search.num_simulations=44").search.num_simulations == 44
    assert settings("--config", str(path), "--seed", "7").run.seed == 7  # flag over file
    assert settings("--quick_test", "--env_id", "zork1.z5").run.env_id == "zork1.z5"


@pytest.mark.parametrize("preset", PRESETS)
def test_entry_preset_flag_selects_a_preset(preset):
    assert settings("--preset", preset) == resolve_settings(PRESETS[preset])


def test_entry_quick_test_flag_is_a_preset():
    assert settings("--quick_test") == settings("--preset", "quick_test") != settings()
    assert settings() == settings("--preset", "standard")


def test_entry_refuses_unknown_and_contradicting_presets(capsys):
    for arguments, words in (
        (["--preset", "quick"], "invalid choice: 'quick' (choose from 'standard', 'quick_test', 'pure_unizero'"),
        (["--quick_test", "--preset", "lora"], "argument --preset: not allowed with argument --quick_test"),
    ):
        with pytest.raises(SystemExit) as stopped:
            entry.main(arguments)
        assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_entry_of_the_cluster_takes_the_same_presets():
    def cluster_settings(*arguments, **environment):
        return ray_entry.settings_from(ray_entry.build_parser().parse_args(arguments), environment)

    assert cluster_settings("--preset", "lora") == settings("--preset", "lora")
    assert cluster_settings("--preset", "lora", DEBUG_MODE="True").run.env_id == settings("--quick_test").run.env_id


def test_entry_help_names_flags_and_games(capsys):
    with pytest.raises(SystemExit) as stopped:
        entry.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for word in (
        "--quick_test",
        "--preset",
        "pure_unizero",
        "--env_id",
        "zork1.z5",
        "textworld:simple",
        "configs/",
        "--set",
    ):
        assert word in text
    assert entry.main(["--help_config"]) == 0
    assert "llm.micro_batch_size = 4" in capsys.readouterr().out


def test_entry_reports_user_errors_and_raises_others(monkeypatch):
    monkeypatch.setattr(entry, "settings_from", lambda _: (_ for _ in ()).throw(RuntimeError("bug")))
    with pytest.raises(RuntimeError, match="bug"):
        entry.main(["--quick_test"])
    monkeypatch.setattr(entry, "settings_from", lambda _: (_ for _ in ()).throw(UserError("yours")))
    assert entry.main(["--quick_test"]) == 2
