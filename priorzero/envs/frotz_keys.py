"""Names of the keys that games of the Z-machine read where they wait for a key. This module needs no emulator."""

from __future__ import annotations

# The keys that are tried where the game waits for a key: the name of the action, and the command that presses the key.
KEY_COMMANDS = {
    "press space": " ",
    "press return": "",
    **{f"press {key}": key for key in "yn0123456789abcdefghijklmopqrstuvwxz"},
}


def is_key(action: str) -> bool:
    """Whether an action presses a key where the game waits for one."""
    return action in KEY_COMMANDS
