"""Tells changes that a command makes to the world from those that every command makes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from priorzero.envs.zmachine import WorldReader

MIN_CHANGES = 10  # a cell that so many absurd commands change says nothing about the world
Memory = tuple[np.ndarray, int]  # the dynamic memory, and the program counter
Changes = tuple[tuple[int, int], ...]  # cells, with their new values


class UsualChanges:
    """The changes of the world that commands without effect make: the passing of time, chance, the parser's variables.

    Attributes:
        counters: program counters at which the game reads a command.
        time_passes: objects change while the player waits; set by the caller.
    """

    def __init__(self, world: WorldReader, state: tuple[Any, ...]) -> None:
        """Nothing usually changes in ``state``, until :meth:`add`."""
        self._world = world
        self._raw = world.raw(state[0])
        self._before = world.cells(state[0])
        self._other = self._before.copy()  # the value that a cell gets, if it is always the same
        self._ignored = np.zeros(len(self._before), dtype=bool)  # cells that get several values
        self._num_changes = np.zeros(len(self._before), dtype=np.int64)  # by commands that are absurd
        self.counters = {int(state[2])}
        self.time_passes = False

    @property
    def objects_changed(self) -> bool:
        """Some objects change."""
        return bool(self._changed(self._other)[: self._world.num_object_cells].any())

    def add(self, memories: Iterable[Memory]) -> None:
        """Note the changes of a command that has no effect: what the game's memory contains after it."""
        objects = slice(None, self._world.num_object_cells)
        for memory, counter in memories:
            cells = self._world.cells(memory)
            changed = cells != self._before
            self._ignore_globals(changed)
            self.counters.add(counter)
            is_new = self._other == self._before
            self._ignored[objects] |= (changed & ~is_new & (cells != self._other))[objects]
            self._other[objects] = np.where(changed & is_new, cells, self._other)[objects]

    def add_absurd(self, memories: Iterable[Memory]) -> None:
        """Note the changes of a command that sets the parser's variables, but may have an effect on objects."""
        for memory, _ in memories:
            changed = self._world.cells(memory) != self._before
            self._ignore_globals(changed)
            self._num_changes += changed
        # Such commands may take an object first, so parents count in any case.
        attributes = slice(self._world.num_objects, self._world.num_object_cells)
        self._ignored[attributes] |= (self._num_changes >= MIN_CHANGES)[attributes]

    def _ignore_globals(self, changed: np.ndarray) -> None:
        first = self._world.num_object_cells
        self._ignored[first:] |= changed[first:]

    def is_unchanged(self, memory: np.ndarray) -> bool:
        """Whether all cells have the values of the state before."""
        return self._world.raw(memory) == self._raw

    def changed_objects(self, memory: np.ndarray) -> Changes:
        """The unusual changes of parents and attributes; empty if there are none."""
        return self._describe(memory, slice(None, self._world.num_object_cells))

    def changed_globals(self, memory: np.ndarray) -> Changes:
        """The unusual changes of global variables; empty if there are none."""
        return self._describe(memory, slice(self._world.num_object_cells, None))

    def _describe(self, memory: np.ndarray, part: slice) -> Changes:
        cells = self._world.cells(memory)
        (places,) = (self._changed(cells) & (cells != self._other))[part].nonzero()
        return tuple(zip(places.tolist(), cells[part][places].tolist(), strict=True))

    def _changed(self, cells: np.ndarray) -> np.ndarray:
        return (cells != self._before) & ~self._ignored
