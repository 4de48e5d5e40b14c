"""Tests of reading story files and the world of a running story, with hand-made memory."""

import numpy as np
import pytest

from priorzero.envs.frotz_files import FilelessFrotzEnv
from priorzero.envs.zmachine import StoryHeader, WorldReader, check_story
from priorzero.types import UserError
from tests.helpers.game_files import story
from tests.helpers.tiny_story import tiny_story

OBJECTS, GLOBALS = 0x80, 0x200


def memory_with_two_objects(version: int) -> bytearray:
    """Object 2 is in object 1 and has the attributes 0 and 9; the second global variable is -3."""
    memory = bytearray(0x400)
    memory[0] = version
    memory[0x0A:0x0C], memory[0x0C:0x0E] = OBJECTS.to_bytes(2, "big"), GLOBALS.to_bytes(2, "big")
    defaults, size, attributes = (31, 9, 4) if version <= 3 else (63, 14, 6)
    first = OBJECTS + 2 * defaults
    second, properties = first + size, first + 2 * size
    for start in (first, second):
        memory[start + size - 2 : start + size] = properties.to_bytes(2, "big")
    memory[second], memory[second + 1] = 0x80, 0x40
    memory[second + attributes + (0 if version <= 3 else 1)] = 1  # the low byte of the parent
    memory[GLOBALS + 2 : GLOBALS + 4] = (-3 & 0xFFFF).to_bytes(2, "big")
    return memory


@pytest.mark.parametrize(("version", "num_attributes"), [(1, 32), (3, 32), (4, 48), (5, 48), (8, 48)])
def test_world_reader_reads_parents_attributes_and_globals(version, num_attributes):
    memory = np.frombuffer(bytes(memory_with_two_objects(version)), dtype=np.uint8)
    world = WorldReader(memory)
    assert world.num_objects == 2
    assert world.parents(memory).tolist() == [0, 1]
    attributes = world.attributes(memory)
    assert attributes.shape == (2, num_attributes)
    assert [row.nonzero()[0].tolist() for row in attributes] == [[], [0, 9]]
    assert world.score(memory) == -3
    assert len(world.cells(memory)) == world.num_object_cells + world.num_global_cells
    assert world.num_object_cells == 2 * (1 + num_attributes)


def test_world_reader_reads_parents_of_two_bytes():
    memory = memory_with_two_objects(5)
    memory[OBJECTS + 126 + 14 + 6] = 2
    assert WorldReader(memory).parents(np.frombuffer(bytes(memory), dtype=np.uint8)).tolist() == [0, 0x201]


@pytest.mark.parametrize("change", ["parent", "attribute", "global", "property"])
def test_world_reader_raw_bytes_change_with_the_cells(change):
    before = memory_with_two_objects(3)
    after = bytearray(before)
    first = OBJECTS + 62
    place = {"parent": first + 4, "attribute": first, "global": GLOBALS + 9, "property": first + 30}[change]
    after[place] ^= 1
    world = WorldReader(before)
    old, new = (np.frombuffer(bytes(each), dtype=np.uint8) for each in (before, after))
    assert (world.raw(old) == world.raw(new)) == (change == "property")
    assert (world.cells(old) != world.cells(new)).sum() == (change != "property")


@pytest.mark.parametrize("name", ["zork1.z5", "trinity.z4", "detective.z5", "lostpig.z8"])  # versions 3, 4, 5, 8
def test_world_reader_agrees_with_jericho(name):
    env = FilelessFrotzEnv(str(story(name)), seed=1)
    env.reset()
    for command in [None, *env.get_walkthrough()[:12]]:
        if command is not None:
            env.step(command)
        memory = env._get_ram()
        world = WorldReader(memory)
        known = [each for each in env.get_world_objects() if each.num > 0]  # Jericho leaves out the noise of some games
        assert known[-1].num == world.num_objects
        parents, attributes = world.parents(memory), world.attributes(memory)
        wrong = [
            each.num
            for each in known
            if (parents[each.num - 1], *attributes[each.num - 1][:32]) != (each.parent, *each.attr)
        ]
        assert wrong == []
        if name == "zork1.z5":
            assert world.score(memory) == env.get_score()


def test_world_reader_survives_any_memory():
    random = np.random.default_rng(0)
    for version in (1, 3, 4, 5, 8):
        for _ in range(50):
            memory = random.integers(0, 256, size=2000, dtype=np.uint8)
            memory[0] = version
            memory[0x0A], memory[0x0C] = 1, 2  # within the memory
            world = WorldReader(memory)
            assert len(world.cells(memory)) == world.num_object_cells + world.num_global_cells


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 7, 8])
def test_check_story_accepts_a_story(version):
    header = check_story(tiny_story(version))
    assert (header.version, header.length) == (version, len(tiny_story(version)))
    assert header.has_status_line_score == (version <= 3)


def test_header_distinguishes_score_games_from_time_games():
    content = bytearray(tiny_story(3))
    content[1] |= 0b10
    assert not StoryHeader.read(bytes(content)).has_status_line_score


def changed(version: int, **fields: int) -> bytes:
    """A story with other bytes: ``b26=255`` sets byte 26."""
    content = bytearray(tiny_story(version))
    for name, value in fields.items():
        content[int(name[1:])] = value
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"This is a text.\n" * 9, "not a Z-machine story: its first byte is 84"),
        (b"\x05" * 40, "it has 40 bytes"),
        (b"FORM" + bytes(100), "is a Blorb file"),
        (b"Glul" + bytes(100), "is a Glulx story"),
        (b"PK\x03\x04" + bytes(100), "is a ZIP file"),
        (bytes(100), "its first byte is 0"),
        (b"\x05" * 500, "sizes and addresses in its header are impossible"),
        (changed(5, b0=6), "version 6, which has graphics"),
        (tiny_story(5)[:-100], "is truncated: it has 1436 of 1536 bytes"),
        (changed(5, b1400=1), "is damaged: its checksum"),
        (tiny_story(5) + bytes(1 << 20), "sizes and addresses"),
    ],
)
def test_check_story_refuses_other_files(content, reason):
    with pytest.raises(UserError, match=reason):
        check_story(content)


def test_check_story_accepts_padding_and_a_missing_checksum():
    assert check_story(tiny_story(5) + bytes(512)).version == 5
    assert check_story(changed(5, b28=0, b29=0, b1400=1)).checksum == 0
