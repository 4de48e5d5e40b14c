"""Tests of telling a command's effect from what every command changes, with hand-made memory."""

import numpy as np
import pytest

from priorzero.envs.world_changes import MIN_CHANGES, UsualChanges
from priorzero.envs.zmachine import WorldReader

OBJECTS, GLOBALS, COUNTER = 0x40, 0x200, 0x1234
FIRST = OBJECTS + 62  # the first object of a story of version 3
NUM_OBJECTS = 4


def memory(*, parents: dict[int, int] | None = None, attributes: tuple = (), variables: dict[int, int] | None = None):
    """The memory of a story with four objects, given as changes of an empty world."""
    content = bytearray(0x400)
    content[0] = 3
    content[0x0A:0x0C], content[0x0C:0x0E] = OBJECTS.to_bytes(2, "big"), GLOBALS.to_bytes(2, "big")
    for number in range(NUM_OBJECTS):
        start = FIRST + 9 * number
        content[start + 7 : start + 9] = (FIRST + 9 * NUM_OBJECTS).to_bytes(2, "big")
    for number, parent in (parents or {}).items():
        content[FIRST + 9 * (number - 1) + 4] = parent
    for number in attributes:  # the first attribute
        content[FIRST + 9 * (number - 1)] = 0x80
    for number, value in (variables or {}).items():
        content[GLOBALS + 2 * number : GLOBALS + 2 * number + 2] = value.to_bytes(2, "big")
    return np.frombuffer(bytes(content), dtype=np.uint8)


@pytest.fixture
def usual() -> UsualChanges:
    start = memory()
    return UsualChanges(WorldReader(start), (start, None, COUNTER))


def test_usual_changes_reports_what_a_command_changes(usual):
    assert usual.is_unchanged(memory())
    after = memory(parents={2: 3}, variables={7: 5})
    assert not usual.is_unchanged(after)
    assert usual.changed_objects(after) == ((1, 3),)
    assert usual.changed_globals(after) == ((7, 5),)
    assert usual.changed_objects(memory(attributes=(1,))) == ((NUM_OBJECTS, 1),)


def test_usual_changes_excludes_what_waiting_changes(usual):
    usual.add([(memory(parents={1: 2}, variables={7: 5}), COUNTER + 1)])
    assert usual.objects_changed
    assert usual.counters == {COUNTER, COUNTER + 1}
    assert usual.changed_objects(memory(parents={1: 2})) == ()
    assert usual.changed_objects(memory(parents={1: 3})) == ((0, 3),)  # not where waiting moves it
    assert usual.changed_globals(memory(variables={7: 6, 8: 1})) == ((8, 1),)


def test_usual_changes_ignores_what_changes_by_chance(usual):
    for parent in (2, 3):
        usual.add([(memory(parents={1: parent}), COUNTER)])
    assert usual.changed_objects(memory(parents={1: 4, 2: 4})) == ((1, 4),)


def test_usual_changes_ignores_variables_and_frequent_attributes_of_absurd_commands(usual):
    absurd = memory(parents={1: 2}, attributes=(3,), variables={9: 9})
    for _ in range(MIN_CHANGES - 1):
        usual.add_absurd([(absurd, COUNTER)])
    assert usual.changed_objects(absurd) == ((0, 2), (NUM_OBJECTS + 2 * 32, 1))
    assert usual.changed_globals(absurd) == ()
    usual.add_absurd([(absurd, COUNTER)])
    assert usual.changed_objects(absurd) == ((0, 2),)
    assert not usual.objects_changed
