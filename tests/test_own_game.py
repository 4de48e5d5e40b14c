"""Tests of the example package through the command line, as an author of a game uses it."""

import json
import shutil

import pytest

from tests.helpers.packages import EXAMPLE, REPOSITORY, install, run_command, write_package

SHORT = ["--quick_test", "--set", "prior.enabled=false", "--set", "eval.modes=random"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which the example package is installed."""
    return install(EXAMPLE, tmp_path_factory.mktemp("packages") / "site")


def train(site, cwd, env_id, *arguments):
    return run_command("priorzero.entry", "--env_id", env_id, *SHORT, *arguments, packages=site, cwd=cwd)


@pytest.mark.parametrize(("file", "language"), [("example_game.py", "python"), ("pyproject.toml", "toml")])
def test_docs_show_the_example_as_it_is(file, language):
    text = (EXAMPLE / file).read_text()
    assert f"```{language}\n{text}```" in (REPOSITORY / "docs" / "own-games.md").read_text()


@pytest.mark.slow
def test_entry_trains_on_a_game_of_an_installed_package_and_resumes(site, tmp_path):
    games = "example:small?seed=7,example:large"
    arguments = ["--set", "eval.unseen=example:small?seed=8", "--exp_name", "run"]
    done = train(site, tmp_path, games, *arguments, "--max_iter", "2")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "data_priorzero" / "run"
    episodes = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    assert {episode["game"] for episode in episodes} <= {"example-small-seed7", "example-large"}
    assert (run / "checkpoints" / "iteration_2").is_dir()

    changed = tmp_path / "site"  # version 1.1 of the package
    shutil.copytree(site, changed)
    metadata = next(changed.glob("*.dist-info")) / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 1.0", "Version: 1.1"))
    refused = run_command("priorzero.entry", "--resume", str(run), "--max_iter", "3", packages=changed, cwd=tmp_path)
    assert refused.returncode == 2
    assert "the game files are" in refused.stderr and "cannot be resumed" in refused.stderr

    resumed = run_command("priorzero.entry", "--resume", str(run), "--max_iter", "3", packages=site, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert (run / "checkpoints" / "iteration_3").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env_id", "hint"),
    [
        ("exmple:small", "Did you mean 'example:'?"),
        ("example:huge", "The game 'example:huge': unknown level 'huge'. Allowed are: small, large"),
        ("example:small?sed=3", "Unknown parameter 'sed'. Did you mean 'seed'?"),
        ("example:small?seed=x", "seed='x' is not allowed. Allowed: a whole number"),
        ("broken:", "its factory 'broken:make' raised RuntimeError: out of coins"),
        ("missing:", "its factory 'broken:nothing' cannot be imported"),
        ("wrong:", "The game 'wrong:' violates the protocol of games: reset() returned a str. Allowed is"),
        ("twice:", "is registered twice: by broken 1.0 (broken:make) and by second 1.0 (second:make)"),
    ],
)
def test_entry_reports_what_is_wrong_with_a_registered_game_in_one_message(site, tmp_path, env_id, hint):
    packages = tmp_path / "site"
    shutil.copytree(site, packages)
    code = """
def make(level, parameters, **arguments):
    raise RuntimeError("out of coins")

class Wrong:
    def __init__(self, level, parameters, **arguments): ...
    def reset(self): return "You enter a corridor."
    def step(self, action): ...
    def close(self): ...
"""
    points = {"broken": "broken:make", "missing": "broken:nothing", "wrong": "broken:Wrong", "twice": "broken:make"}
    write_package(packages, "broken", code=code, entry_points=points)
    write_package(packages, "second", code="", entry_points={"twice": "second:make"})
    here = tmp_path / "here"
    here.mkdir()
    done = train(packages, here, env_id, "--max_iter", "1")
    assert (done.returncode, hint in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr
    assert list(here.iterdir()) == [], "nothing is written"
