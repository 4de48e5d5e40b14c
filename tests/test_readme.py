"""What the README prints can be typed."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from priorzero import ray_entry
from priorzero.entry import build_parser, settings_from

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.split("#")[0].strip()]


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python -m priorzero.entry")])
def test_training_commands_are_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = settings_from(build_parser().parse_args(command.split()[3:]))
    assert settings.prior.enabled == ("pure_unizero" not in command)


SCALING = (ROOT / "docs" / "scaling.md").read_text()


CLUSTER = re.findall(
    r"^((?:DEBUG_MODE=True )?)python -m priorzero\.ray_entry([^#\n]*)",
    (README + SCALING).replace("\\\n", " "),
    re.MULTILINE,
)


@pytest.mark.parametrize(("debug", "flags"), CLUSTER)
def test_cluster_commands_are_understood(debug, flags):
    environment = {"DEBUG_MODE": "True"} if debug else {}
    words = flags.split()
    settings = ray_entry.settings_from(ray_entry.build_parser().parse_args(words), environment)
    assert settings.run.env_id == ("zork1.z5" if not environment else "textworld:simple?seed=7")


def test_settings_that_are_named_exist():
    from priorzero.config import OPTIONS

    named = set(re.findall(r"\b([a-z_]+\.[a-z_]+)=", README + SCALING))
    known = {f"{group}.{key}" for group, keys in OPTIONS.items() for key in keys}
    assert len(named) > 15 and named <= known


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("python -m priorzero.config", "llm.micro_batch_size = 4"),
        ("python -m priorzero.demo segment", "segment of 4 decisions"),
        ("python -m priorzero.demo buffer", "54 decisions in 8 segments"),
    ],
)
def test_component_checks_work_as_printed(command, words):
    assert any(c == command for c in commands())
    done = subprocess.run(
        [sys.executable, *command.split()[1:]],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert words in done.stdout


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    typed = {command.split()[1] for command in commands() if command.startswith("make ")}
    assert {"quick-test", "test"} <= typed <= targets


@pytest.mark.slow
def test_importing_lightzero_leaves_logging_alone():
    code = (
        "import logging; logging.getLogger().setLevel(logging.WARNING); import priorzero.policy; "
        "print(logging.getLogger().level, logging.root.manager.disable)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == [str(logging.WARNING), "0"] and not done.stderr
