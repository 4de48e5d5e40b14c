"""A Z-machine story that is assembled byte by byte, so that tests need no story file."""

from __future__ import annotations

PACKED_UNIT = {1: 2, 2: 2, 3: 2, 4: 4, 5: 4, 7: 4, 8: 8}
DICTIONARY, OBJECTS, GLOBALS, TEXT_BUFFER, PARSE_BUFFER = 0x40, 0x80, 0x180, 0x380, 0x400
STATIC, CODE = 0x480, 0x500


def tiny_story(version: int, *, stops: bool = False) -> bytes:
    """A story that prints "tick", reads a command and adds one to the second global variable, for ever.

    Args:
        version: of the Z-machine, 1 to 5, 7 or 8.
        stops: the story quits at once instead.
    """
    memory = bytearray(0x600)

    def word(address: int, value: int) -> None:
        memory[address : address + 2] = value.to_bytes(2, "big")

    for address, value in {
        0x04: STATIC, 0x06: CODE, 0x08: DICTIONARY, 0x0A: OBJECTS, 0x0C: GLOBALS, 0x0E: STATIC,
    }.items():  # fmt: skip
        word(address, value)
    memory[0] = version
    memory[DICTIONARY : DICTIONARY + 4] = bytes([0, 9, 0, 0])  # no separators, no words
    memory[TEXT_BUFFER], memory[PARSE_BUFFER] = 80, 10
    # The first global variable is the object whose name is printed in the status line.
    word(GLOBALS, 1)
    first = OBJECTS + 2 * (31 if version <= 3 else 63)
    size = 9 if version <= 3 else 14
    word(first + size - 2, first + size)  # its property table follows: an empty name and no properties
    code = bytearray()
    if stops:
        code += b"\xba"  # quit
    code += b"\xb2" + encode("tick") + b"\xbb"  # print, new_line
    code += b"\xe4\x0f" + TEXT_BUFFER.to_bytes(2, "big") + PARSE_BUFFER.to_bytes(2, "big")  # read
    if version >= 5:
        code += b"\x10"  # the result of read is stored in the first global variable
    code += b"\x95\x11"  # inc: variable 17
    code += b"\x8c" + (-(len(code) + 1) & 0xFFFF).to_bytes(2, "big")  # jump to the beginning
    memory[CODE : CODE + len(code)] = code
    size = len(memory) // PACKED_UNIT[version]
    word(0x1A, size if version < 6 else len(memory) // 8)
    word(0x1C, sum(memory[0x40:]) % 0x10000)
    return bytes(memory)


def encode(text: str) -> bytes:
    """A Z-string of lower-case letters (section 3)."""
    letters = [ord(letter) - ord("a") + 6 for letter in text]
    letters += [5] * (-len(letters) % 3)
    words = [letters[n] << 10 | letters[n + 1] << 5 | letters[n + 2] for n in range(0, len(letters), 3)]
    words[-1] |= 0x8000
    return b"".join(value.to_bytes(2, "big") for value in words)
