"""The command ``priorzero``: it runs the modules, and its help imports none of them."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from priorzero import cli

ROOT = Path(__file__).parent.parent


def test_main_passes_the_arguments_on_and_returns_the_exit_code(monkeypatch):
    for name, command in cli.COMMANDS.items():
        calls = []
        fake = SimpleNamespace(main=lambda argv, calls=calls: calls.append(argv) or 7)
        monkeypatch.setitem(sys.modules, command.module, fake)
        assert cli.main([name, "RUN", "--flag", "--help"]) == 7
        assert calls == [["RUN", "--flag", "--help"]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quick_test", "--env_id", "a b"], "--quick_test: the command is missing; to train, type priorzero train"),
        (["--quick_test", "--env_id", "a b"], "priorzero train --quick_test --env_id 'a b'"),
        (["trian"], "'trian' is not a command; the commands are train, evaluate, watch"),
        (["trian"], "did you mean priorzero train?"),
        (["xyz"], "type priorzero --help"),
        ([""], "'' is not a command"),
    ],
)
def test_main_refuses_what_is_not_a_command(capsys, arguments, words):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and words in captured.err and captured.out == ""


def test_main_without_arguments_shows_the_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "usage: priorzero" in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_main_names_the_command_as_it_was_typed(capsys, command):
    module = importlib.import_module(cli.COMMANDS[command].module)
    for main, program in (
        (lambda: cli.main([command, "--help"]), f"priorzero {command}"),
        (lambda: cli.main(["help", command]), f"priorzero {command}"),
        (lambda: module.main(["--help"]), f"python -m {module.__name__}"),
    ):
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: {program} ")


def test_main_help_shows_the_help(capsys):
    assert cli.main(["help"]) == cli.main(["--help"]) == 0
    first, second = capsys.readouterr().out.split("usage: priorzero ")[1:]
    assert first == second
    assert cli.main(["help", "trian"]) == 2
    assert "'trian' is not a command" in capsys.readouterr().err


def test_main_shows_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"priorzero {importlib.metadata.version('priorzero')}\n"


def test_help_names_all_commands_and_imports_no_other_module_of_the_package():
    code = (
        "import sys; from priorzero import cli; code = cli.main(['--help'])\n"
        "print(code, sorted(name for name in sys.modules if name.startswith('priorzero.')), 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 ['priorzero.cli'] False"
    assert all(
        f"    {name}" in done.stdout and command.purpose in done.stdout for name, command in cli.COMMANDS.items()
    )


def test_console_script_is_the_command_line():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"priorzero": "priorzero.cli:main"}


@pytest.mark.parametrize(("line", "expected"), [("priorzero re", "report"), ("priorzero report --he", "--help")])
def test_shell_completion(tmp_path, line, expected):
    request = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    environment = {**os.environ, **request, "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "answer")}
    subprocess.run([sys.executable, "-m", "priorzero.cli"], env=environment, check=False)
    assert expected in (tmp_path / "answer").read_text().replace("\v", " ").split()
