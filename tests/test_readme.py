"""The commands and settings that the README and the docs name exist."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from priorzero import ray_entry
from priorzero.entry import build_parser, settings_from
from priorzero.runs.checkpoint import FORMAT
from priorzero.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = "\n".join([README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))])


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.split("#")[0].strip()]


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python -m priorzero.entry")])
def test_readme_training_commands_are_valid(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = settings_from(build_parser().parse_args(command.split()[3:]))
    assert settings.prior.enabled == ("pure_unizero" not in command)


CLUSTER = re.findall(
    r"^((?:DEBUG_MODE=True )?)python -m priorzero\.ray_entry([^#\n]*)",
    PAGES.replace("\\\n", " "),
    re.MULTILINE,
)


@pytest.mark.parametrize(("debug", "flags"), CLUSTER)
def test_readme_cluster_commands_are_valid(debug, flags):
    environment = {"DEBUG_MODE": "True"} if debug else {}
    words = flags.split()
    settings = ray_entry.settings_from(ray_entry.build_parser().parse_args(words), environment)
    assert settings.run.env_id == ("zork1.z5" if not environment else "textworld:simple?seed=7")


def test_readme_settings_exist():
    named = set(re.findall(r"\b([a-z_]+\.[a-z_]+)=", PAGES)) - {
        "group.key",
        "llm.gradient_accumulation_steps",
    }  # a form, and an alias
    known = {f"{group}.{key}" for group, values in Settings().model_dump().items() for key in values}
    assert len(named) > 15 and named - known == set()


def test_readme_tests_exist():
    named = set(re.findall(r"`(test_\w+)`", PAGES))
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 50 and named - set(re.findall(r"def (test_\w+)\(", sources)) == set()


def test_readme_modules_exist():
    """Those that a command or the text runs with ``python -m``."""
    named = set(re.findall(r"python -m (priorzero[\w.]*)", PAGES))
    assert "priorzero.entry" in named
    assert [name for name in sorted(named) if not (ROOT / f"{name.replace('.', '/')}.py").is_file()] == []


def test_readme_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    typed = {command.split()[1] for command in commands() if command.startswith("make ")}
    assert {"quick-test", "test"} <= typed <= targets


@pytest.mark.slow
def test_docs_state_the_format_of_checkpoints():
    stated = re.findall(r"reads (?:and writes )?format (\w+)", PAGES)
    assert stated == [str(FORMAT)] * 2


def test_policy_import_leaves_logging_unchanged():
    code = (
        "import logging; logging.getLogger().setLevel(logging.WARNING); import priorzero.policy; "
        "print(logging.getLogger().level, logging.root.manager.disable)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == [str(logging.WARNING), "0"] and not done.stderr
