"""Reads what a story of unknown origin prints: its score, and whether the game has ended. English texts only."""

from __future__ import annotations

import re
from typing import NamedTuple

# The emulator prints the status line of the versions 1 to 3 before the reply, padded with spaces, and the status line
# of later versions after the prompt.
_STATUS_LINE = re.compile(r"^>? [^\n]*? {10,}(?:Score: *-?\d+ +Moves: *\d+|Time: *\d+:\d+ [ap]m) *\n?", re.MULTILINE)
_PROMPT = re.compile(r"\n[^\n]{0,30}>(?: {40,}[^\n]*)?\s*\Z")
_ECHOED_PROMPT = re.compile(r"\A\s*>[ \n]")
_GAP = re.compile(r" {10,}")  # of a text in a box
_BLANK_LINES = re.compile(r"\n[ \t]*\n(?:[ \t]*\n)+")

_SCORE_AND_MAXIMUM = re.compile(
    r"(-?\d+)(?: points?)?,? \(?(?:out of|of|total of) (?:an? )?(?:(?:total|possible|maximum) )*(?:of )?(\d+)",
    re.IGNORECASE,
)
_SCORE = re.compile(r"\bscored?\b[^.!?\d\n-]{0,40}(-?\d+)", re.IGNORECASE)

_MAX_QUESTION = 400  # characters
_WON = re.compile(r"\*{2,}\s*(?:you (?:have )?won|you've won|you win|congratulations)\b[^*\n]*\*{2,}", re.IGNORECASE)


class Score(NamedTuple):
    """A score that a text states, with the largest possible one; None if the text does not say."""

    points: int
    maximum: int | None


def clean_text(text: str) -> str:
    """The text without the status line, the prompt and repeated blank lines."""
    text = _STATUS_LINE.sub("", text)
    text = _PROMPT.sub("", _ECHOED_PROMPT.sub("", text))
    return _BLANK_LINES.sub("\n\n", _GAP.sub("\n", text)).strip()


def read_score(text: str) -> Score | None:
    """The score in a reply to the command "score"; None if there is none."""
    text = " ".join(text.split())
    if found := _SCORE_AND_MAXIMUM.search(text):
        return Score(int(found[1]), int(found[2]))
    if found := _SCORE.search(text):
        return Score(int(found[1]), None)
    return None


def says_won(text: str) -> bool:
    """Whether the reply to a command says that the player has won: in asterisks, or by a complete score.

    Games print the score at their end. "score" itself, whose reply is the same, is not played.
    """
    score = read_score(text)
    is_complete = score is not None and score.points == score.maximum and score.points > 0
    return _WON.search(text) is not None or is_complete


def says_ended(text: str) -> bool:
    """Whether the reply to a command says that the player has won, or asks what to do after the end of the game.

    A death alone is not the end: some games bring the player back to life.
    """
    end = text[-_MAX_QUESTION:].lower()
    return all(word in end for word in ("restart", "restore", "quit")) or says_won(text)
