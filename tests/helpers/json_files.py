"""JSON files of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def change_json(file: Path, **changes: Any) -> None:
    """Change entries of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
