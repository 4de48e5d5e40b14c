"""Which games the language model learns from, and which are held out. They are split by series.

A game that agents are evaluated on is never learnt from, and neither is a game of the same series.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from priorzero.envs.games import supported_games, walkthrough_lengths
from priorzero.envs.names import without_extension
from priorzero.types import UserError

Split = Literal["train", "validation", "held_out"]

# Evaluated only, in the order of their cost.
HELD_OUT = (
    "pentari", "detective", "zork1", "inhumane", "zork3", "zork2", "snacktime", "acorncourt", "ztuu", "balances",
    "temple", "omniquest", "library", "ludicorp", "deephome",
)  # fmt: skip
# Kept for later evaluations; neither learnt from nor measured here.
RESERVED = (
    "karn", "reverb", "planetfall", "murdac", "night", "adventureland", "huntdark", "moonlit", "enchanter", "sorcerer",
    "spellbrkr",
)  # fmt: skip
# Settings are chosen on these. The final training learns from them, too.
VALIDATION = ("awaken", "enter", "cutthroat", "wishbringer")

TRAIN_SEED, HELD_OUT_SEED = 5001, 6001  # of generated games


@dataclass(frozen=True, slots=True)
class PretrainingGame:
    """A game: its ``env_id``, its short name, and what its states are used for."""

    env_id: str
    split: Split


def jericho_games() -> list[PretrainingGame]:
    """The games with Jericho's walkthroughs; first the held-out ones, then by the length of the walkthrough."""
    lengths = walkthrough_lengths()
    roms = {without_extension(rom): rom for rom in supported_games()}
    held_out = [PretrainingGame(roms[name], "held_out") for name in HELD_OUT]
    others = sorted(
        lengths.keys() - {roms[name] for name in (*HELD_OUT, *RESERVED)}, key=lambda rom: (lengths[rom], rom)
    )
    return held_out + [
        PretrainingGame(rom, "validation" if without_extension(rom) in VALIDATION else "train") for rom in others
    ]


def textworld_games(*, train: int = 20, held_out: int = 2) -> list[PretrainingGame]:
    """Generated games of all families: ``train`` and ``held_out`` games of each of :data:`FAMILIES`."""
    parts: list[tuple[Split, int, int]] = [("held_out", HELD_OUT_SEED, held_out), ("train", TRAIN_SEED, train)]
    return [
        PretrainingGame(f"textworld:{family.format(level=LEVELS[number % len(LEVELS)])}seed={seed + number}", split)
        for split, seed, count in parts
        for family in FAMILIES
        for number in range(count)
    ]


LEVELS = (3, 5, 10, 15)
FAMILIES = (
    "simple?goal=detailed&",
    "simple?goal=brief&",
    "simple?goal=none&",
    "coin-collector?level={level}&",
    "treasure-hunter?level={level}&",
    "cooking?recipe=2&take=1&go=6&open=1&cook=1&cut=1&",
)


def check_trainable(name: str) -> None:
    """Raise UserError if the game with this short name must not be learnt from."""
    if name in HELD_OUT or name in RESERVED:
        raise UserError(
            f"{name} is a game that agents are evaluated on, so it is not learnt from; leave it out, or name one of "
            "the other games"
        )
