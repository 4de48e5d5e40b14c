"""Reads Z-machine story files and the memory of a running one, as the Z-Machine Standards Document 1.1 describes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from priorzero.types import UserError

HEADER_BYTES = 64
MAX_STORY_BYTES = 1 << 20  # a story has at most 512 KiB; a copy of a disk may be padded
NUM_GLOBALS = 240
SCORE_GLOBAL = 1  # the second global variable (variable number 17) is the score of the status line
_LENGTH_UNIT = {1: 2, 2: 2, 3: 2, 4: 4, 5: 4, 6: 8, 7: 8, 8: 8}  # of the header's file length, in bytes
_OTHER_FORMATS = {
    b"FORM": "a Blorb file",
    b"Glul": "a Glulx story",
    b"TADS": "a TADS story",
    b"PK\x03\x04": "a ZIP file",
}
# Version 6 has graphics, several windows and menus. Jericho's emulator shows text only.
UNPLAYABLE_VERSIONS = {6}


@dataclass(frozen=True, slots=True)
class StoryHeader:
    """The fields of a story's header (section 11) that are used here. Addresses are in bytes."""

    version: int
    flags1: int
    dictionary: int
    objects: int
    globals: int
    static_memory: int
    length: int
    checksum: int

    @classmethod
    def read(cls, content: bytes) -> StoryHeader:
        """The header of a story file, or of the memory of a running one, of at least 64 bytes."""

        def word(address: int) -> int:
            return int.from_bytes(content[address : address + 2], "big")

        version = content[0]
        return cls(
            version=version,
            flags1=content[1],
            dictionary=word(0x08),
            objects=word(0x0A),
            globals=word(0x0C),
            static_memory=word(0x0E),
            length=word(0x1A) * _LENGTH_UNIT.get(version, 1),
            checksum=word(0x1C),
        )

    @property
    def has_status_line_score(self) -> bool:
        """The emulator prints a status line with the score (section 8.2), not with the time."""
        return self.version < 3 or (self.version == 3 and not self.flags1 & 0b10)


def check_story(content: bytes) -> StoryHeader:
    """The header of a story file that Jericho's emulator can play.

    Raises:
        UserError: the contents are no Z-machine story, or a damaged one, or of a version that cannot be played. The
            text is a part of a sentence: "is not a Z-machine story: ...".
    """
    for magic, name in _OTHER_FORMATS.items():
        if content.startswith(magic):
            raise UserError(f"is {name}, not a Z-machine story")
    if len(content) < HEADER_BYTES:
        raise UserError(
            f"is not a Z-machine story: it has {len(content)} bytes, and the header alone has {HEADER_BYTES}"
        )
    if not 1 <= content[0] <= 8:
        raise UserError(f"is not a Z-machine story: its first byte is {content[0]}, not a version from 1 to 8")
    header = StoryHeader.read(content)
    if len(content) > MAX_STORY_BYTES or not _addresses_are_sane(header, size=max(len(content), header.length)):
        raise UserError("is not a Z-machine story: the sizes and addresses in its header are impossible")
    if header.version in UNPLAYABLE_VERSIONS:
        raise UserError(
            f"is a Z-machine story of version {header.version}, which has graphics and menus and cannot be played here"
        )
    if header.length > len(content):
        raise UserError(f"is truncated: it has {len(content)} of {header.length} bytes. Copy or download it again")
    if header.length and header.checksum:
        checksum = sum(content[HEADER_BYTES : header.length]) % 0x10000
        if checksum != header.checksum:
            raise UserError(
                f"is damaged: its checksum is {checksum}, and its header says {header.checksum}. Copy or download it "
                "again"
            )
    return header


def _addresses_are_sane(header: StoryHeader, *, size: int) -> bool:
    tables = (header.objects, header.globals)  # in dynamic memory
    return (
        HEADER_BYTES <= header.static_memory <= size
        and all(HEADER_BYTES <= address < header.static_memory for address in tables)
        and HEADER_BYTES <= header.dictionary < size
        and header.globals + 2 * 16 <= size
    )


class WorldReader:
    """Reads the state of the world from a story's dynamic memory: the object table and the global variables.

    A *cell* is one part of the state that changes as a whole: the parent of an object, one of its attributes, or a
    global variable.
    """

    def __init__(self, memory: bytes | np.ndarray) -> None:
        """``memory``: the dynamic memory of the story that starts at address 0, or the whole story."""
        memory = np.frombuffer(bytes(memory), dtype=np.uint8)
        header = StoryHeader.read(bytes(memory[:HEADER_BYTES]))
        self._globals = header.globals
        self._num_globals = max(0, min(NUM_GLOBALS, (len(memory) - header.globals) // 2))
        # Sections 12.2 and 12.3: the default properties, then the objects.
        if header.version <= 3:
            self._first, self._size, self._attribute_bytes, self._link_bytes = header.objects + 31 * 2, 9, 4, 1
        else:
            self._first, self._size, self._attribute_bytes, self._link_bytes = header.objects + 63 * 2, 14, 6, 2
        self.num_objects = self._count_objects(memory, max_objects=255 if header.version <= 3 else 65_535)

    @property
    def num_object_cells(self) -> int:
        """The number of cells of the objects. The cells of the global variables follow them."""
        return self.num_objects * (1 + 8 * self._attribute_bytes)

    @property
    def num_global_cells(self) -> int:
        """The number of global variables."""
        return self._num_globals

    def _count_objects(self, memory: np.ndarray, *, max_objects: int) -> int:
        """The objects end where the first property table begins; no field states their number (section 12.3)."""
        end, count = len(memory), 0
        while count < max_objects:
            start = self._first + count * self._size
            if start + self._size > end:
                break
            properties = int.from_bytes(memory[start + self._size - 2 : start + self._size].tobytes(), "big")
            if properties > start:  # a damaged table may have any value
                end = min(end, properties)
            count += 1
        return count

    def _object_table(self, memory: np.ndarray) -> np.ndarray:
        return memory[self._first : self._first + self.num_objects * self._size].reshape(self.num_objects, self._size)

    def parents(self, memory: np.ndarray) -> np.ndarray:
        """The number of each object's parent, ``[num_objects]``. Objects are numbered from 1; 0 means no parent."""
        start = self._attribute_bytes
        links = self._object_table(memory)[:, start : start + self._link_bytes].astype(np.uint16)
        return links[:, 0] if self._link_bytes == 1 else links[:, 0] << 8 | links[:, 1]

    def attributes(self, memory: np.ndarray) -> np.ndarray:
        """The attributes of each object, ``[num_objects, 32 or 48]``, 0 or 1."""
        return np.unpackbits(self._object_table(memory)[:, : self._attribute_bytes], axis=1)

    def globals(self, memory: np.ndarray) -> np.ndarray:
        """The global variables, ``[num_global_cells]``, unsigned."""
        return memory[self._globals : self._globals + 2 * self._num_globals].view(">u2").astype(np.uint16)

    def score(self, memory: np.ndarray) -> int:
        """The score of the status line, which is signed."""
        return int(self.globals(memory)[SCORE_GLOBAL : SCORE_GLOBAL + 1].astype(np.int16)[0])

    def cells(self, memory: np.ndarray) -> np.ndarray:
        """All cells, ``[num_object_cells + num_global_cells]``: parents, attributes, global variables."""
        return np.concatenate(
            [self.parents(memory), self.attributes(memory).ravel(), self.globals(memory)], dtype=np.uint16
        )

    def raw(self, memory: np.ndarray) -> bytes:
        """The bytes that the cells are read from. They can be compared fast."""
        table = self._object_table(memory)[:, : self._attribute_bytes + self._link_bytes]
        return table.tobytes() + memory[self._globals : self._globals + 2 * self._num_globals].tobytes()
