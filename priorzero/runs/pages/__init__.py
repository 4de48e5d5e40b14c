"""Pages that a browser shows without a network: what the report and the pages of episodes share."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

FOLDER = Path(__file__).parent


def make_environment(*folders: Path) -> Environment:
    """Jinja's environment for the templates of ``folders`` and of this one. Everything is escaped.

    ``style`` and ``script`` are the style sheet and the script of all pages, to be inserted into them.
    """
    environment = Environment(
        loader=FileSystemLoader([*folders, FOLDER]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["style"] = Markup((FOLDER / "style.css").read_text(encoding="utf-8"))
    environment.globals["script"] = Markup((FOLDER / "player.js").read_text(encoding="utf-8"))
    return environment
