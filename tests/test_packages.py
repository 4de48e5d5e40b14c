"""The commands that install optional packages agree with the extras in pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from priorzero.runtime.packages import INSTALL

ROOT = Path(__file__).parent.parent
EXTRAS = {"babyai": "minigrid", "ray": "ray", "wandb": "wandb"}


def test_install_commands_have_the_versions_of_the_extras():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    expected = {package: f"pip install {pinned}" for name, package in EXTRAS.items() for pinned in extras[name]}
    assert expected == INSTALL and all("==" in command for command in INSTALL.values())


def test_documentation_has_the_versions_of_the_extras():
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    found = {
        match
        for page in pages
        for match in re.findall(rf"pip install '?(?:{'|'.join(INSTALL)})==[^\s`']*", page.read_text(encoding="utf-8"))
    }
    assert {command.replace("'", "") for command in found} == set(INSTALL.values())
