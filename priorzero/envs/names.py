"""Names that users type: a suggestion for a wrong one, and the name of a story file without its extension."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

SIMILAR = 0.75  # ratio of equal letters from which a name is suggested; names of other games have less


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the known name that is spelled nearly as ``name``; "" if there is none.

    Extensions of story files are ignored. Of names that are equally similar, such as zork1.z5 and zork2.z5, it is the
    one with the smallest number.
    """
    by_stem = {without_extension(other.lower()): other for other in reversed(list(known))}
    if not by_stem:
        return ""
    matches = difflib.get_close_matches(without_extension(name.lower()), by_stem, n=len(by_stem), cutoff=SIMILAR)
    if not matches:
        return ""

    def similarity(stem: str) -> float:  # as in get_close_matches
        return difflib.SequenceMatcher(None, stem, without_extension(name.lower())).ratio()

    best = max(sorted(matches, key=_natural_order), key=similarity)  # the first of equal ones
    return f" Did you mean {by_stem[best]!r}?"


def _natural_order(name: str) -> list[str | int]:
    """A sort key by which ``zork2`` is before ``zork10``."""
    return [int(part) if n % 2 else part for n, part in enumerate(re.split("([0-9]+)", name))]


def without_extension(name: str) -> str:
    """``zork1`` for ``zork1.z5``."""
    return re.sub(r"\.z\d\Z", "", name)
