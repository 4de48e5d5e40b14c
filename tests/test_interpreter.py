"""Tests of the compiled Z-machine's parts with hand-made memory, and of single instructions.

The instructions are executed by Jericho's emulator, too. The expected values follow from the standard.
"""

import numpy as np
import pytest

from priorzero.envs.frotz_files import FilelessFrotzEnv
from priorzero.envs.interpreter import MEMORY_SIZE, Story
from tests.helpers.plain_interpreter import ALPHABET, execute, plain_interpreter
from tests.helpers.tiny_story import CODE, GLOBALS, OBJECTS, PARSE_BUFFER, STATIC, TEXT_BUFFER, tiny_story

# The stories are made by the tests.
pytestmark = pytest.mark.filterwarnings("ignore::jericho.jericho.UnsupportedGameWarning")

plain = plain_interpreter()
VERSIONS = [3, 4, 5, 8]
ABBREVIATIONS, TEXT, TABLE = 0x600, 0x700, 0x800
DICTIONARY = 0x900


def make_story(version: int, **changes: int) -> Story:
    parts = {
        "size": 0x2000, "dynamic_size": 0x1000, "global_table": GLOBALS, "object_table": OBJECTS,
        "dictionary": DICTIONARY, "abbreviations": ABBREVIATIONS,
    }  # fmt: skip
    return Story(version, **{**parts, **changes})


def make_memory(**contents: bytes) -> np.ndarray:
    """Memory with bytes at addresses: ``make_memory(at_0x40=b"...")``."""
    memory = np.zeros(MEMORY_SIZE, np.uint8)
    for name, data in contents.items():
        put(memory, int(name.removeprefix("at_"), 16), data)
    return memory


def put(memory: np.ndarray, address: int, data: bytes) -> None:
    memory[address : address + len(data)] = np.frombuffer(data, np.uint8)


def pack(*chars: int) -> bytes:
    """Z-characters, three in a word (section 3.2)."""
    chars = (*chars, *[5] * (-len(chars) % 3))
    words = [chars[n] << 10 | chars[n + 1] << 5 | chars[n + 2] for n in range(0, len(chars), 3)]
    words[-1] |= 0x8000
    return b"".join(word.to_bytes(2, "big") for word in words)


def word_at(memory: np.ndarray, address: int) -> int:
    return int(memory[address]) << 8 | int(memory[address + 1])


# Text ----------------------------------------------------------------------------------------------------------------


def decode(memory: np.ndarray, address: int = TEXT) -> tuple[str, int, bool]:
    """The decoded text, the address behind it, and whether it failed."""
    out, io = np.zeros(100, np.uint8), np.array([0, -1, 1, 0])
    end = plain._put_string(memory, make_story(3), ALPHABET, out, io, np.zeros(16, np.int64), np.int64(address))
    return out[: io[0]].tobytes().decode("latin-1"), int(end), bool(io[3])


def test_interpreter_decodes_text():
    # h e l, l o and a padding: 13 10 17, 17 20 5
    hello = make_memory(at_0x700=bytes.fromhex("3551c685"))
    assert decode(hello) == ("hello", TEXT + 4, False)
    # 4 shifts to capital letters and 5 to punctuation, for one character; 0 is a space
    assert decode(make_memory(at_0x700=pack(4, 13, 14, 5, 19, 0, 30, 20, 26)))[0] == "Hi, you"
    assert decode(make_memory(at_0x700=pack(5, 8, 5, 17, 5, 7, 5, 31)))[0] == "09\n)"
    # 5 and 6 begin a character in two halves: "@" is 64, or 2 and 0
    assert decode(make_memory(at_0x700=pack(6, 5, 6, 2, 0, 6)))[0] == "a@a"


def test_interpreter_decodes_abbreviations():
    memory = make_memory(at_0x700=pack(1, 2, 0, 3, 31, 6), at_0xa00=pack(25, 13, 10), at_0xb00=pack(4, 31))
    put(memory, ABBREVIATIONS + 2 * 2, (0xA00 // 2).to_bytes(2, "big"))  # the addresses are those of words
    put(memory, ABBREVIATIONS + 2 * (64 + 31), (0xB00 // 2).to_bytes(2, "big"))
    assert decode(memory) == ("the Za", TEXT + 4, False)
    put(memory, 0xA00, pack(1, 2, 6))  # an abbreviation in an abbreviation
    assert decode(memory)[2]


def test_interpreter_text_must_end_inside_the_story():
    memory = make_memory()
    assert decode(memory, 0x1FFC)[2]
    put(memory, 0x1FFE, pack(6, 7, 8))
    assert decode(memory, 0x1FFC) == ("   abc", 0x2000, False)


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (7, "7"), (120, "120"), (0xFFFF, "-1"), (0x8000, "-32768")])
def test_interpreter_prints_numbers(number, text):
    out, io = np.zeros(100, np.uint8), np.array([0, -1, 1, 0])
    plain._put_number(make_memory(), make_story(3), out, io, np.zeros(16, np.int64), np.int64(number))
    assert out[: io[0]].tobytes().decode() == text


def test_interpreter_prints_to_tables():
    memory, story, tables, out, io = (
        make_memory(),
        make_story(5),
        np.zeros(16, np.int64),
        np.zeros(9),
        np.array([0, -1, 1, 0]),
    )
    assert plain._output_stream(memory, story, 3, TABLE, 2, io, tables)
    plain._put_number(memory, story, out, io, tables, np.int64(42))
    assert memory[TABLE : TABLE + 4].tobytes() == b"\x00\x0242"
    assert plain._output_stream(memory, story, 3, TABLE + 20, 2, io, tables)  # a table inside a table
    plain._put(memory, story, out, io, tables, 65)
    assert plain._output_stream(memory, story, 0xFFFD, 0, 1, io, tables)  # -3 ends the inner table
    plain._put(memory, story, out, io, tables, 66)
    assert memory[TABLE + 20 : TABLE + 23].tobytes() == b"\x00\x01A"
    assert memory[TABLE : TABLE + 5].tobytes() == b"\x00\x0342B"
    assert io.tolist() == [0, 0, 1, 0]  # nothing was printed on the screen
    assert not plain._output_stream(memory, story, 2, 0, 1, io, tables)  # the transcript is a file


# Dictionary ----------------------------------------------------------------------------------------------------------


def encode(text: str, num_chars: int) -> list[str]:
    memory, codes = make_memory(at_0x700=text.encode("latin-1")), np.zeros(3, np.int64)
    plain._encode(memory, ALPHABET, TEXT, len(text), num_chars, codes)
    return [f"{code:04x}" for code in codes[: num_chars // 3]]


def test_interpreter_encodes_words():
    assert encode("hello", 6) == ["3551", "c685"]
    assert encode("hello", 9) == ["3551", "4685", "94a5"]  # padded with 5
    assert encode("hellothere", 6) == ["3551", "c699"]  # cut after six: h e l, l o t (25)
    # "x-1": x is 29; "-" is 5 and 28 in the third alphabet; 1 is 5 and 9; then a padding
    assert encode("x-1", 6) == [f"{29 << 10 | 5 << 5 | 28:04x}", f"{0x8000 | 5 << 10 | 9 << 5 | 5:04x}"]
    # "@" is in no alphabet: 5, 6 and two halves; the second half of the second one is cut
    assert encode("a@", 6) == [f"{6 << 10 | 5 << 5 | 6:04x}", f"{0x8000 | 2 << 10 | 0 << 5 | 5:04x}"]
    assert encode("aaaa@", 6) == [f"{6 << 10 | 6 << 5 | 6:04x}", f"{0x8000 | 6 << 10 | 5 << 5 | 6:04x}"]


def make_dictionary(version: int, words: list[str], *, is_sorted: bool = True) -> tuple[np.ndarray, dict[str, int]]:
    """Memory with a dictionary with the separators "," and ".", and the address of each word's entry."""
    num_chars, entry_size = (6, 7) if version <= 3 else (9, 9)
    entries = {}
    for word in words:
        chars = [ord(letter) - ord("a") + 6 for letter in word][:num_chars]
        entries[word] = pack(*chars, *[5] * (num_chars - len(chars)))
    ordered = sorted(entries, key=entries.__getitem__) if is_sorted else words
    count = len(words) if is_sorted else -len(words) & 0xFFFF
    data = b"\x02,." + bytes([entry_size]) + count.to_bytes(2, "big")
    addresses = {}
    for word in ordered:
        addresses[word] = DICTIONARY + len(data)
        data += entries[word].ljust(entry_size, b"\0")
    return make_memory(at_0x900=data), addresses


@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("version", VERSIONS)
def test_interpreter_finds_words_in_the_dictionary(version, is_sorted):
    words = ["take", "lamp", "lookinglass", "a", "zoo", "go", "open"]
    memory, addresses = make_dictionary(version, words, is_sorted=is_sorted)

    def look_up(word):
        put(memory, TEXT, word.encode())
        return plain._look_up(memory, make_story(version), ALPHABET, TEXT, len(word), DICTIONARY)

    assert {word: look_up(word) for word in words} == addresses
    assert [look_up(word) for word in ("tak", "takes", "b", "zz", "lamp1")] == [0] * 5
    cut = {"lookin": version <= 3, "lookingla": True, "lookingglass": version <= 3}  # only 6 or 9 letters count
    assert {word: look_up(word) != 0 for word in cut} == cut


@pytest.mark.parametrize("version", VERSIONS)
def test_interpreter_splits_a_line_into_words(version):
    memory, addresses = make_dictionary(version, ["take", "lamp", "go"])
    put(memory, TABLE, bytes([60, 0]))
    parse = 0xC00
    memory[parse] = 6
    line = np.frombuffer(b"Take LAMP,go  xyzzy.", np.uint8)
    assert plain._read_line(memory, make_story(version), ALPHABET, TABLE, parse, line)
    first = 1 if version <= 4 else 2
    assert memory[TABLE + first : TABLE + first + 20].tobytes() == b"take lamp,go  xyzzy."
    assert memory[TABLE + 1] == (ord("t") if version <= 4 else 20)
    if version <= 4:
        assert memory[TABLE + 21] == 0
    tokens = [(word_at(memory, at), int(memory[at + 2]), int(memory[at + 3])) for at in range(parse + 2, parse + 26, 4)]
    words = [addresses["take"], addresses["lamp"], 0, addresses["go"], 0, 0]
    assert memory[parse + 1] == 6
    assert tokens == list(zip(words, [4, 4, 1, 2, 5, 1], [first + n for n in (0, 5, 9, 10, 14, 19)], strict=True))
    memory[parse] = 2  # room for two words
    plain._tokenise(memory, make_story(version), ALPHABET, TABLE, parse, np.int64(0), False)
    assert memory[parse + 1] == 2


def test_interpreter_skips_unknown_words_if_told():
    memory, addresses = make_dictionary(5, ["take", "lamp"])
    put(memory, TABLE, bytes([60, 9]) + b"take xyz ")
    put(memory, 0xC00, b"\x04\x00" + b"\xee" * 16)
    plain._tokenise(memory, make_story(5), ALPHABET, TABLE, 0xC00, np.int64(0), True)
    assert word_at(memory, 0xC02) == addresses["take"]
    assert memory[0xC01] == 2
    assert memory[0xC06:0xC0A].tobytes() == b"\xee" * 4


@pytest.mark.parametrize("line", ["a" * 60, "caf\u00e9", "back\\slash", "tab\t", "\x7f"])
@pytest.mark.parametrize("version", VERSIONS)
def test_interpreter_does_not_read_other_lines(version, line):
    memory, _ = make_dictionary(version, ["take"])
    put(memory, TABLE, bytes([60 if version <= 4 else 59, 0]))
    encoded = np.frombuffer(line.encode(), np.uint8)
    assert not plain._read_line(memory, make_story(version), ALPHABET, TABLE, 0, encoded)
    assert plain._read_line(memory, make_story(version), ALPHABET, TABLE, 0, np.frombuffer(b"a" * 59, np.uint8))


# Objects -------------------------------------------------------------------------------------------------------------


def make_objects(version: int, links: dict[int, tuple[int, int, int]]) -> np.ndarray:
    """Memory with objects; ``links`` has the parent, sibling and child of each."""
    memory = make_memory()
    for number, relatives in links.items():
        if version <= 3:
            put(memory, OBJECTS + 62 + 9 * (number - 1) + 4, bytes(relatives))
        else:
            data = b"".join(each.to_bytes(2, "big") for each in relatives)
            put(memory, OBJECTS + 126 + 14 * (number - 1) + 6, data)
    return memory


def links_of(memory: np.ndarray, version: int, numbers: range) -> dict[int, tuple[int, ...]]:
    story = make_story(version)
    return {n: tuple(int(plain._relative(memory, story, n, which)) for which in range(3)) for n in numbers}


FAMILY = {1: (0, 0, 2), 2: (1, 3, 0), 3: (1, 4, 5), 4: (1, 0, 0), 5: (3, 0, 0)}  # 1 contains 2, 3 and 4; 3 contains 5


@pytest.mark.parametrize("version", VERSIONS)
def test_interpreter_removes_objects(version):
    story = make_story(version)
    memory = make_objects(version, FAMILY)
    assert links_of(memory, version, range(1, 6)) == FAMILY
    assert plain._unlink(memory, story, 3)  # in the middle; its contents stay
    assert links_of(memory, version, range(1, 6)) == {**FAMILY, 2: (1, 4, 0), 3: (0, 0, 5)}
    assert plain._unlink(memory, story, 2)  # the first one
    assert links_of(memory, version, range(1, 5)) == {1: (0, 0, 4), 2: (0, 0, 0), 3: (0, 0, 5), 4: (1, 0, 0)}
    before = memory.copy()
    assert plain._unlink(memory, story, 2)  # it has no parent
    assert (memory == before).all()


@pytest.mark.parametrize("version", VERSIONS)
def test_interpreter_inserts_objects(version):
    story = make_story(version)
    memory = make_objects(version, FAMILY)
    assert plain._insert(memory, story, 4, 3)  # the last one of 1 becomes the first one of 3
    assert links_of(memory, version, range(1, 6)) == {**FAMILY, 3: (1, 0, 4), 4: (3, 5, 0)}
    assert plain._insert(memory, story, 2, 1)  # it is in 1 already, as the first one
    assert links_of(memory, version, range(1, 3)) == {1: (0, 0, 2), 2: (1, 3, 0)}


def test_interpreter_notices_a_damaged_object_tree():
    memory = make_objects(3, {**FAMILY, 2: (1, 0, 0)})  # 3 is not among the children of its parent
    assert not plain._unlink(memory, make_story(3), 3)
    memory = make_objects(3, {**FAMILY, 3: (1, 2, 0)})  # 2 and 3 are each other's siblings
    assert not plain._unlink(memory, make_story(3), 4)


@pytest.mark.parametrize("version", VERSIONS)
def test_interpreter_changes_attributes(version):
    story = make_story(version)
    memory = make_memory()
    address = OBJECTS + (62 + 9 if version <= 3 else 126 + 14)  # object 2
    plain._change_attribute(memory, story, 2, 0, True)
    plain._change_attribute(memory, story, 2, 13, True)
    assert memory[address : address + 2].tolist() == [0x80, 0x04]
    assert [n for n in range(32) if plain._test_attribute(memory, story, 2, n)] == [0, 13]
    plain._change_attribute(memory, story, 2, 0, False)
    assert memory[address : address + 2].tolist() == [0, 0x04]
    assert not plain._test_attribute(memory, story, 0, 13)


def properties_of(version: int) -> tuple[np.ndarray, dict[int, int]]:
    """Object 1 with properties of 1, 2 and 6 bytes, and the addresses of their data."""
    memory = make_memory()
    entry = OBJECTS + (62 + 7 if version <= 3 else 126 + 12)
    put(memory, entry, TABLE.to_bytes(2, "big"))
    name = b"\x01" + pack(6, 7, 8)
    if version <= 3:  # 32 * (size - 1) + number
        rest = bytes([1 * 32 + 18, 1, 2]) + bytes([5 * 32 + 11, *range(6)]) + bytes([0 * 32 + 4, 77, 0])
        data = {18: TABLE + 4, 11: TABLE + 7, 4: TABLE + 14}
    else:  # a bit for two bytes, or the size in a second byte
        rest = bytes([0x40 + 18, 1, 2]) + bytes([0x80 + 11, 0x80 + 6, *range(6)]) + bytes([4, 77, 0])
        data = {18: TABLE + 4, 11: TABLE + 8, 4: TABLE + 15}
    put(memory, TABLE, name + rest)
    put(memory, OBJECTS + 2 * (9 - 1), b"\x12\x34")  # the default value of property 9
    return memory, data


@pytest.mark.parametrize("version", VERSIONS)
def test_interpreter_finds_properties(version):
    memory, data = properties_of(version)
    story = make_story(version)
    found = {prop: int(plain._property_address(memory, story, 1, prop)) for prop in (18, 11, 9, 4)}
    assert found == {**data, 9: 0}
    assert {prop: int(plain._property_length(memory, story, data[prop])) for prop in data} == {18: 2, 11: 6, 4: 1}
    assert [int(plain._get_property(memory, story, 1, prop)) for prop in (18, 4, 9)] == [0x0102, 77, 0x1234]
    assert [int(plain._next_property_number(memory, story, 1, prop)) for prop in (0, 18, 11, 4)] == [18, 11, 4, 0]
    assert plain._next_property_number(memory, story, 1, 9) == -1  # the object does not have it
    assert plain._property_address(memory, story, 0, 18) == plain._get_property(memory, story, 0, 18) == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_interpreter_sets_properties(version):
    memory, data = properties_of(version)
    story = make_story(version)
    assert plain._put_property(memory, story, 1, 18, np.int64(0xABCD))
    assert plain._put_property(memory, story, 1, 4, np.int64(0x0102))
    assert memory[data[18] : data[18] + 2].tolist() == [0xAB, 0xCD]
    assert memory[data[4] : data[4] + 2].tolist() == [2, 0]  # of one byte, so only the lower half
    assert not plain._put_property(memory, story, 1, 9, np.int64(1))


def test_interpreter_property_of_64_bytes():
    memory = make_memory(at_0x800=bytes([0, 0x80 + 12, 0x80]))
    put(memory, OBJECTS + 126 + 12, TABLE.to_bytes(2, "big"))
    address = plain._property_address(memory, make_story(5), 1, 12)
    assert plain._property_length(memory, make_story(5), address) == 64  # the size 0 means 64


# Numbers -------------------------------------------------------------------------------------------------------------


def test_interpreter_random_numbers_are_those_of_frotz():
    random = np.array([1, 0, 0])
    # 1 * 0x015A4E35 + 1 = 0x015A4E36, whose upper half is 346; 346 % 10 = 6
    assert plain._random(random, np.int64(10)) == 7
    assert random[0] == 0x015A4E36
    # 0x015A4E36 * 0x015A4E35 + 1 = 0x1D4ACC6B2652F, bits 16 to 30: 0x46B2
    state = 0x015A4E36 * 0x015A4E35 + 1
    assert plain._random(random, np.int64(0x7FFF)) == (state >> 16 & 0x7FFF) % 0x7FFF + 1
    assert random[0] == state


def test_interpreter_random_numbers_can_be_predictable():
    random = np.array([5, 0, 0])
    assert plain._random(random, np.int64(-3 & 0xFFFF)) == 0
    assert [int(plain._random(random, np.int64(100))) for _ in range(5)] == [1, 2, 3, 1, 2]
    assert [int(plain._random(random, np.int64(2))) for _ in range(3)] == [1, 1, 2]  # 2 % 2 + 1, 0 + 1, 1 + 1
    assert plain._random(random, np.int64(-1000 & 0xFFFF)) == 0  # -1000 and below seed the numbers
    assert random.tolist()[:2] == [1000, 0]


# Branch at 0x40, and its offset, from the byte behind it.
@pytest.mark.parametrize(
    ("data", "size", "offset", "is_taken"),
    [
        ("c5", 1, 5, True),  # if the condition holds
        ("45", 1, 5, False),  # if it does not hold
        ("8105", 2, 0x105, True),  # 14 bits
        ("bffe", 2, -2, True),
        ("3ffe", 2, -2, False),
        ("a000", 2, -0x2000, True),
    ],
)
def test_interpreter_reads_branches(data, size, offset, is_taken):
    memory = make_memory(at_0x40=bytes.fromhex(data))
    assert tuple(map(int, plain._branch(memory, 0x40, True))) == (0x40 + size, offset, is_taken)
    assert tuple(map(int, plain._branch(memory, 0x40, False))) == (0x40 + size, offset, not is_taken)


# Instructions --------------------------------------------------------------------------------------------------------

ROUTINE = CODE + 0x80  # a multiple of 8
ANSWER = GLOBALS + 2  # the second global variable, which has the number 0x11


def packed(version: int) -> str:
    return f"{ROUTINE // {3: 2, 4: 4, 5: 4, 8: 8}[version]:04x}"


# The code between two inputs, and the value of variable 0x11 afterwards; both can depend on the version.
PROGRAMS = {
    "add": ("d4 0f 7fff 0002 11", 0x8001),
    "sub": ("15 03 05 11", 0xFFFE),
    "mul": ("d6 0f fffe 0003 11", 0xFFFA),
    "div of a negative number rounds towards zero": ("d7 0f fff9 0002 11", 0xFFFD),
    "div by a negative number": ("d7 0f 0007 fffe 11", 0xFFFD),
    "mod has the sign of the dividend": ("d8 0f fff9 0002 11", 0xFFFF),
    "mod by a negative number": ("d8 0f 0007 fffe 11", 1),
    "or": ("c8 0f 0f00 00f1 11", 0x0FF1),
    "and": ("c9 0f 0ff0 00ff 11", 0x00F0),
    "store": ("0d 11 07", 7),
    "inc and dec": ("0d 11 07 95 11 95 11 96 11", 8),
    "inc of -1": ("cd 4f 11 ffff 95 11", 0),
    "push and pull": ("e8 3f 1234 e8 7f 05 e9 7f 11 e9 7f 11", 0x1234),
    "store changes the top of the stack": ("e8 7f 05 cd 4f 00 0102 e9 7f 11", 0x0102),
    "load does not pop": ("e8 7f 05 9e 00 11 e9 7f 12", 5),
    "loadw": ("cf 1f 0501 00 11", 0xE40F),  # the first "read" of the story
    "loadb": ("d0 1f 0501 01 11", 0x0F),
    "storew": ("e1 13 0180 01 4321", 0x4321),
    "storeb": ("e2 17 0180 03 ab", 0x00AB),
    # The branch leaps over "store 0x11 9", unless it is not taken.
    "je": ("0d 11 01 01 05 05 c5 0d 11 09", 1),
    "je with more values": ("0d 11 01 c1 55 05 06 07 05 c5 0d 11 09", 1),
    "je without an equal value": ("0d 11 01 c1 55 05 06 07 08 c5 0d 11 09", 9),
    "jl compares with signs": ("0d 11 01 c2 0f ffff 0001 c5 0d 11 09", 1),
    "jg compares with signs": ("0d 11 01 c3 0f ffff 0001 c5 0d 11 09", 9),
    "a branch if the condition does not hold": ("0d 11 01 02 05 03 45 0d 11 09", 1),
    "jz": ("0d 11 01 90 00 c5 0d 11 09", 1),
    "test": ("0d 11 01 07 07 05 c5 0d 11 09", 1),
    "test needs all bits": ("0d 11 01 07 06 05 c5 0d 11 09", 9),
    "dec_chk": ("0d 11 00 04 11 00 c5 0d 11 09", 0xFFFF),
    "inc_chk": ("0d 11 05 05 11 06 c5 0d 11 09", 9),
    "jump": ("0d 11 01 8c 0005 0d 11 09", 1),
    "a loop": ("0d 11 00 95 11 42 11 05 bf fb", 5),
    "random": ("e7 7f 01 11", 1),  # of the range 1 to 1
    "attributes": ("0b 01 05 0d 11 01 0a 01 05 c5 0d 11 09 0c 01 05 0a 01 05 45 0d 11 09", 1),
    "print": ("b2 b5 c5 0d 11 01", 1),
    "not": (lambda v: "9f 00 11" if v <= 4 else "f8 7f 00 11", 0xFFFF),
}


def run_program(tmp_path, version: int, code: str, *, routine: str = ""):
    """Execute code between two inputs, in Jericho's emulator and in the plain interpreter, and compare them.

    Returns:
        The result of ``execute``.
    """
    data = bytearray(tiny_story(version).ljust(0x800, b"\0"))
    data[0x1A:0x1C] = (len(data) // {3: 2, 4: 4, 5: 4, 8: 8}[version]).to_bytes(2, "big")
    data[0x40:0x47] = b"\x02,.\x09\x00\x00\x00"  # a dictionary without words; Frotz needs a separator
    read = b"\xe4\x0f" + TEXT_BUFFER.to_bytes(2, "big") + PARSE_BUFFER.to_bytes(2, "big") + b"\x1f" * (version >= 5)
    program = b"\xbb" + read + bytes.fromhex(code) + read  # Jericho does not notice a "read" at the beginning
    data[CODE : CODE + 0x100] = program.ljust(0x100, b"\xb4")
    data[ROUTINE : ROUTINE + len(bytes.fromhex(routine))] = bytes.fromhex(routine)
    path = tmp_path / f"program.z{version}"
    path.write_bytes(data)
    env = FilelessFrotzEnv(str(path), seed=7)
    env.reset()
    state = env.get_state()
    memory = np.zeros(MEMORY_SIZE, np.uint8)
    memory[: len(data)] = np.frombuffer(bytes(data), np.uint8)
    story = Story(version, len(data), STATIC, GLOBALS, OBJECTS, 0x40, 0)
    result = execute(story, memory, state, "Go")
    if result.known:
        env.step("Go")
        check_equal(result, env.get_state())
    env.close()
    return result


def check_equal(result, state) -> None:
    ram, stack, counter, stack_pointer, frame_pointer, frame_count, _, random, _ = state
    assert np.flatnonzero(result.ram != ram).tolist() == []
    registers = (counter - 1, stack_pointer, frame_pointer, frame_count, *random)
    assert tuple(result.registers) == tuple(map(int, registers))
    assert result.stack[stack_pointer:].tolist() == stack.view(np.uint16)[stack_pointer:].tolist()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_interpreter_executes_instructions(tmp_path, name, version):
    code, expected = PROGRAMS[name]
    result = run_program(tmp_path, version, code(version) if callable(code) else code)
    assert result.known
    assert word_at(result.ram, ANSWER) == expected


def adding_routine(version: int) -> str:
    """It returns the sum of its local variables. Before version 5 their default values are 0x0102 and 0x0304."""
    return f"02 {'0102 0304' if version <= 4 else ''} 74 01 02 00 b8"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("arguments", "expected_before_5", "expected_from_5"),
    [("3f", 0x0406, 0), ("1f", 7 + 0x0304, 7), ("17", 16, 16)],  # no argument, 7, 7 and 9
)
def test_interpreter_calls_routines(tmp_path, version, arguments, expected_before_5, expected_from_5):
    values = {"3f": "", "1f": "07", "17": "07 09"}[arguments]
    code = f"e0 {arguments} {packed(version)} {values} 11"
    result = run_program(tmp_path, version, code, routine=adding_routine(version))
    assert word_at(result.ram, ANSWER) == (expected_before_5 if version <= 4 else expected_from_5)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("b0", 1),  # rtrue
        ("b1", 0),  # rfalse
        ("9b 2a", 42),  # ret
        ("b3 b5 c5", 1),  # print_ret
        ("90 00 c1 b1", 1),  # a branch with the offset 1 returns true
        ("90 00 c0 b0", 0),  # and with the offset 0 false
    ],
)
def test_interpreter_returns_from_routines(tmp_path, version, body, expected):
    result = run_program(tmp_path, version, f"0d 11 63 e0 3f {packed(version)} 11", routine=f"00 {body}")
    assert result.known
    assert word_at(result.ram, ANSWER) == expected


@pytest.mark.parametrize("version", VERSIONS)
def test_interpreter_calling_address_0_gives_0(tmp_path, version):
    assert word_at(run_program(tmp_path, version, "0d 11 63 e0 3f 0000 11").ram, ANSWER) == 0


@pytest.mark.parametrize("version", [5, 8])
def test_interpreter_discards_results_and_counts_arguments(tmp_path, version):
    # check_arg_count 1, else store 0x11 9
    routine = "01 0d 11 01 ff 7f 01 c5 0d 11 09 b0"
    code = f"f9 1f {packed(version)} 05"
    assert word_at(run_program(tmp_path, version, code, routine=routine).ram, ANSWER) == 1
    code = f"f9 3f {packed(version)}"
    assert word_at(run_program(tmp_path, version, code, routine=routine).ram, ANSWER) == 9


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("be 02 0f 8000 ffff 11", 0x4000),  # log_shift by -1
        ("be 03 0f 8000 ffff 11", 0xC000),  # art_shift keeps the sign
        ("be 02 1f 4001 01 11", 0x8002),
        ("be 09 ff 11", 0xFFFF),  # save_undo is not possible
        ("f7 07 e40f 0501 02 11 c5 0d 11 09", 0x0501),  # scan_table finds the first word
        ("fd 07 0501 0182 02", 0xE40F),  # copy_table
    ],
)
def test_interpreter_executes_instructions_of_version_5(tmp_path, code, expected):
    result = run_program(tmp_path, 5, code)
    assert result.known
    assert word_at(result.ram, ANSWER) == expected


@pytest.mark.parametrize(
    ("version", "code"),
    [
        (3, "b5 c5"), (4, "b5 11"), (3, "b6 c5"),  # save, restore
        (3, "b7"), (3, "ba"), (3, "bd c5"),  # restart, quit, verify
        (5, "be 00 ff 11"), (5, "be 0a ff 11"),  # save, restore_undo
        (3, "d7 0f 0007 0000 11"), (3, "f3 7f 02"),  # a division by zero, the transcript
        (3, "e2 17 0480 00 05"),  # storeb in static memory
        (3, "0b 01 3f"),  # an attribute that does not exist
    ],
)  # fmt: skip
def test_interpreter_leaves_other_instructions_to_jerichos_emulator(tmp_path, version, code):
    assert not run_program(tmp_path, version, code).known


def test_interpreter_prints_text(tmp_path):
    # print "hi", new_line, print_char "!", print_num -5, print_paddr 0x580
    code = "b2 b5 c5 bb e5 7f 21 e6 3f fffb 8d 02c0"
    result = run_program(tmp_path, 3, code, routine="3551 c685")
    assert result.text == "hi\n!-5hello"
    # "hi" is 13 14 5: 0x35C5 with the bit that ends the text
    assert pack(13, 14).hex() == "b5c5"
