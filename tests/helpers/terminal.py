"""A terminal for tests: what a user sees of an output with control codes."""

from __future__ import annotations

import io
import re

CODES = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


class Terminal(io.StringIO):
    """A file that says that it is a terminal."""

    def isatty(self) -> bool:
        return True

    @property
    def shown(self) -> list[str]:
        """The lines that are seen at the moment."""
        return shown_lines(self.getvalue())


def shown_lines(output: str) -> list[str]:
    """The lines that a wide terminal shows after ``output``; the cursor is in the last one unless it was moved up."""
    lines, row, column = [""], 0, 0
    for numbers, command, control, text in CODES.findall(output):
        if control == "\r":
            column = 0
        elif control == "\n":
            row, column = row + 1, 0  # the terminal driver adds the carriage return
            lines += [""] * (row + 1 - len(lines))
        elif text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
        elif command == "A":
            row -= int(numbers or 1)
        elif command == "K":
            assert numbers == "2"
            lines[row] = ""
        else:
            assert command in "mhl", f"unknown control code {numbers}{command}"
    return lines
