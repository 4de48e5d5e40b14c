"""A compiled Z-machine that runs many commands from one state, several times as fast as Jericho's emulator.

It executes the same instructions as Jericho's emulator, but it draws no screen, and it stops a command as soon as the
game waits for input again. What it does not know, such as saving a game, it leaves to Jericho's emulator: the command
gets the status :data:`UNKNOWN`.

Source of the instructions, the text encoding and the memory layout: The Z-Machine Standards Document, version 1.1.
Where the standard leaves the behaviour open, this module follows Frotz, on which Jericho's emulator is based: the
layout of stack frames, the random numbers and the results of undefined operations.

Numba compiles the functions at their first use, which takes half a minute, and keeps the result in a cache on disk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from priorzero.runtime.compiling import cached_njit, compile_now

STACK_WORDS = 1024
STACK_MASK = 2 * STACK_WORDS - 1
ADDRESS_MASK = (1 << 20) - 1  # a story has at most 512 KiB
MEMORY_SIZE = ADDRESS_MASK + 2
MAX_INSTRUCTIONS = 20_000_000  # a command that runs longer has probably hung
MAX_EVENTS = 16  # of each kind; Jericho ignores later ones
MAX_OBJECT = 2000  # Frotz stops at larger numbers; from version 4 on
MAX_TEXT = 16_384  # bytes of text of a command
DIFF_WORDS = 128
READ_LINE, READ_KEY = 228, 246  # opcodes at which a command ends

# Operations, with the names of the standard: with two operands or a variable number of them, with one, without, and
# extended ones. The numbers of each kind follow one another, as in the opcodes.
(
    JE, JL, JG, DEC_CHK, INC_CHK, JIN, TEST, OR, AND, TEST_ATTR, SET_ATTR, CLEAR_ATTR, STORE, INSERT_OBJ, LOADW, LOADB,
    GET_PROP, GET_PROP_ADDR, GET_NEXT_PROP, ADD, SUB, MUL, DIV, MOD, CALL_2S, CALL_2N, SET_COLOUR,
) = range(1, 28)  # fmt: skip
(
    CALL_VS, STOREW, STOREB, PUT_PROP, READ, PRINT_CHAR, PRINT_NUM, RANDOM, PUSH, PULL, SPLIT_WINDOW, SET_WINDOW,
    CALL_VS2, ERASE_WINDOW, ERASE_LINE, SET_CURSOR, GET_CURSOR, SET_TEXT_STYLE, BUFFER_MODE, OUTPUT_STREAM,
    INPUT_STREAM, SOUND_EFFECT, READ_CHAR, SCAN_TABLE, NOT, CALL_VN, CALL_VN2, TOKENISE, ENCODE_TEXT, COPY_TABLE,
    PRINT_TABLE, CHECK_ARG_COUNT,
) = range(32, 64)  # fmt: skip
(
    JZ, GET_SIBLING, GET_CHILD, GET_PARENT, GET_PROP_LEN, INC, DEC, PRINT_ADDR, CALL_1S, REMOVE_OBJ, PRINT_OBJ, RET,
    JUMP, PRINT_PADDR, LOAD, NOT_OR_CALL_1N,
) = range(0x100, 0x110)  # fmt: skip
RTRUE, RFALSE, PRINT, PRINT_RET, NOP = range(0x200, 0x205)
RET_POPPED, POP_OR_CATCH, NEW_LINE, SHOW_STATUS = 0x208, 0x209, 0x20B, 0x20C
EXTENDED, LOG_SHIFT, ART_SHIFT, SAVE_UNDO = 0x300, 0x302, 0x303, 0x309

# Status of a command.
UNCHANGED, CHANGED, UNKNOWN = 0, 1, 2

# Indices of the output state `io`.
_LENGTH, _DEPTH, _SCREEN, _FAILED = 0, 1, 2, 3
# Indices of the counters `count`.
_MOVED, _SET, _CLEARED = 0, 1, 2
# What follows an instruction.
_STORE, _BRANCH, _CALL, _RETURN, _JUMP = 1, 2, 4, 8, 16
# Indices of the state of the random numbers.
_NUMBER, _INTERVAL, _COUNTER = 0, 1, 2


class Story(NamedTuple):
    """Constants of a story. All addresses are byte addresses."""

    version: int
    size: int
    dynamic_size: int
    global_table: int
    object_table: int
    dictionary: int
    abbreviations: int


class Registers(NamedTuple):
    """The registers of the Z-machine while it waits for input, as ``FrotzEnv.get_state`` gives them.

    ``stack_pointer`` and ``frame_pointer`` are indices of the stack, which grows downwards. ``random`` is the state of
    the random numbers, ``interval`` and ``counter`` those of the predictable mode.
    """

    counter: int
    stack_pointer: int
    frame_pointer: int
    frame_count: int
    random: int
    random_interval: int
    random_counter: int


class Watch(NamedTuple):
    """What is a change of the world.

    Attributes:
        ignored_set: whether setting an attribute of an object is ignored, ``[objects, 48]`` bool.
        ignored_cleared: the same for clearing.
        addresses: bytes whose changes are reported, ``[n]``.
        score_addresses: the bytes of the score, ``[m]``.
    """

    ignored_set: Any
    ignored_cleared: Any
    addresses: Any
    score_addresses: Any


class Results(NamedTuple):
    """The results of ``N`` commands.

    Attributes:
        status: ``[N]`` uint8.
        scored: the score has changed, ``[N]`` bool.
        num_moved: number of movements, ignored ones too, ``[N]`` uint8.
        changed: an attribute or a watched byte has changed, except for ignored ones, ``[N]`` bool.
        taken: the text contains "(Taken)", ``[N]`` bool.
        changes: objects that moved (all), attributes that were set and cleared (without ignored ones) and watched
            bytes, in the format of Jericho's ``get_cleaned_world_diff``, ``[N, 128]`` uint16.
        text: the texts of all commands, one after the other, uint8.
        text_ends: ``[N]`` int64.
        text_hashes: ``[N]`` int64.
    """

    status: Any
    scored: Any
    num_moved: Any
    changed: Any
    taken: Any
    changes: Any
    text: Any
    text_ends: Any
    text_hashes: Any


@njit(nogil=True, forceinline=True)
def _byte(mem, address):
    return np.int64(mem[address & ADDRESS_MASK])


@njit(nogil=True, forceinline=True)
def _word(mem, address):
    address &= ADDRESS_MASK
    return (np.int64(mem[address]) << 8) | np.int64(mem[address + 1])


@njit(nogil=True, forceinline=True)
def _set_word(mem, address, value):
    address &= ADDRESS_MASK
    mem[address] = (value >> 8) & 0xFF
    mem[address + 1] = value & 0xFF


@njit(nogil=True, forceinline=True)
def _signed(value):
    return ((value & 0xFFFF) ^ 0x8000) - 0x8000


# ---- variables and control flow ----


@njit(nogil=True, forceinline=True)
def _get_variable(mem, stack, story, variable, sp, fp):
    """Value of a variable, and the new stack pointer. Variable 0 is popped."""
    if variable == 0:
        return np.int64(stack[sp & STACK_MASK]), sp + 1
    if variable < 16:
        return np.int64(stack[(fp - variable) & STACK_MASK]), sp
    return _word(mem, story.global_table + 2 * (variable - 16)), sp


@njit(nogil=True, forceinline=True)
def _peek_variable(mem, stack, story, variable, sp, fp):
    """Value of a variable that an instruction names indirectly. Variable 0 is not popped."""
    if variable == 0:
        return np.int64(stack[sp & STACK_MASK])
    if variable < 16:
        return np.int64(stack[(fp - variable) & STACK_MASK])
    return _word(mem, story.global_table + 2 * (variable - 16))


@njit(nogil=True, forceinline=True)
def _poke_variable(mem, stack, story, variable, value, sp, fp):
    """Set a variable that an instruction names indirectly. Variable 0 is not pushed."""
    if variable == 0:
        stack[sp & STACK_MASK] = value & 0xFFFF
    elif variable < 16:
        stack[(fp - variable) & STACK_MASK] = value & 0xFFFF
    else:
        _set_word(mem, story.global_table + 2 * (variable - 16), value)


@njit(nogil=True, forceinline=True)
def _operand(mem, stack, story, kind, pc, sp, fp):
    """Value of an operand, the new program counter and the new stack pointer."""
    if kind == 1:
        return _byte(mem, pc), pc + 1, sp
    if kind == 2:
        value, sp = _get_variable(mem, stack, story, _byte(mem, pc), sp, fp)
        return value, pc + 1, sp
    return _word(mem, pc), pc + 2, sp


@njit(nogil=True, forceinline=True)
def _store(mem, stack, story, value, pc, sp, fp):
    """Store a result in the variable at ``pc``; return the new program counter and stack pointer."""
    variable = _byte(mem, pc)
    if variable == 0:
        sp -= 1
        stack[sp & STACK_MASK] = value & 0xFFFF
    elif variable < 16:
        stack[(fp - variable) & STACK_MASK] = value & 0xFFFF
    else:
        _set_word(mem, story.global_table + 2 * (variable - 16), value)
    return pc + 1, sp


@njit(nogil=True, forceinline=True)
def _return(mem, stack, story, value, fp, frames):
    """Return from a routine; the new program counter, stack pointer, frame pointer and frame count."""
    kind = np.int64(stack[fp & STACK_MASK]) >> 12
    new_fp = (np.int64(stack[(fp + 1) & STACK_MASK]) + 1) & 0xFFFF
    pc = np.int64(stack[(fp + 2) & STACK_MASK]) | (np.int64(stack[(fp + 3) & STACK_MASK]) << 9)
    sp = fp + 4
    if kind == 0:
        pc, sp = _store(mem, stack, story, value, pc, sp, new_fp)
    return pc, sp, new_fp, frames - 1


@njit(nogil=True, forceinline=True)
def _branch(mem, pc, holds):
    """The program counter behind the branch at ``pc``, its offset, and whether it is taken."""
    first = _byte(mem, pc)
    pc += 1
    offset = first & 0x3F
    if not first & 0x40:
        offset = (offset << 8) | _byte(mem, pc)
        pc += 1
        offset = (offset ^ 0x2000) - 0x2000
    return pc, offset, holds == ((first & 0x80) != 0)


@njit(nogil=True, forceinline=True)
def _unpack(story, address):
    """Byte address of a packed address."""
    if story.version <= 3:
        return address << 1
    if story.version <= 5:
        return address << 2
    return address << 3


@njit(nogil=True, forceinline=True)
def _call(mem, stack, story, args, num_args, kind, pc, sp, fp, frames):
    """Call the routine ``args[0]``; its result is stored (kind 0) or discarded (1). As ``_return``, and the success."""
    target = _unpack(story, args[0])
    if target >= story.size or sp < 24:
        return pc, sp, fp, frames, False
    num_locals = _byte(mem, target)
    if num_locals > 15:
        return pc, sp, fp, frames, False
    sp -= 4
    stack[(sp + 3) & STACK_MASK] = pc >> 9
    stack[(sp + 2) & STACK_MASK] = pc & 0x1FF
    stack[(sp + 1) & STACK_MASK] = (fp - 1) & 0xFFFF
    stack[sp & STACK_MASK] = (num_args - 1) | (kind << 12) | (num_locals << 8)
    fp = sp
    pc = target + 1
    for n in range(1, num_locals + 1):
        value = np.int64(0)
        if story.version <= 4:
            value = _word(mem, pc)
            pc += 2
        if n < num_args:
            value = args[n]
        sp -= 1
        stack[sp & STACK_MASK] = value & 0xFFFF
    return pc, sp, fp, frames + 1, True


# ---- text ----


@njit(nogil=True)
def _put(mem, story, out, io, tables, character):
    """Print a ZSCII character to the table of output stream 3, or else to the text of the command."""
    if character == 0:
        return
    if io[_DEPTH] >= 0:
        table = tables[io[_DEPTH]]
        size = _word(mem, table)
        if character >= 0x9B or table + 2 + size >= story.dynamic_size:
            io[_FAILED] = 1
            return
        mem[table + 2 + size] = character
        _set_word(mem, table, size + 1)
    elif io[_SCREEN] and io[_LENGTH] < out.size:
        out[io[_LENGTH]] = 10 if character == 13 else character
        io[_LENGTH] += 1


@njit(nogil=True)
def _put_number(mem, story, out, io, tables, value):
    value = _signed(value)
    if value < 0:
        _put(mem, story, out, io, tables, 45)
        value = -value
    divisor = 10_000
    while divisor > 1 and value < divisor:
        divisor //= 10
    while divisor > 0:
        _put(mem, story, out, io, tables, 48 + (value // divisor) % 10)
        divisor //= 10


@njit(nogil=True)
def _put_string(mem, story, alphabet, out, io, tables, address):
    """Print an encoded text (section 3 of the standard); return the address behind it."""
    shift, state, high = 0, 0, 0  # state 1: abbreviation, 2 and 3: halves of a ZSCII code
    outer_address, outer_word, outer_position = np.int64(-1), np.int64(0), 0
    word, position = np.int64(0), -1
    while True:
        if position < 0:
            if word & 0x8000:
                if outer_address < 0:
                    return address
                address, word, position = outer_address, outer_word, outer_position
                outer_address, shift, state = np.int64(-1), 0, 0
                continue
            if address + 1 >= story.size:
                io[_FAILED] = 1
                return address
            word, position = _word(mem, address), 10
            address += 2
        c = (word >> position) & 0x1F
        position -= 5
        if state == 1:
            if outer_address >= 0:
                io[_FAILED] = 1  # an abbreviation inside an abbreviation
                return address
            outer_address, outer_word, outer_position = address, word, position
            address = _word(mem, story.abbreviations + 64 * (high - 1) + 2 * c) << 1
            word, position, state = np.int64(0), -1, 0
        elif state == 2:
            high, state = c, 3
        elif state == 3:
            _put(mem, story, out, io, tables, (high << 5) | c)
            state = 0
        elif c >= 6:
            if shift == 2 and c == 6:
                state = 2
            elif shift == 2 and c == 7:
                _put(mem, story, out, io, tables, 13)
            else:
                _put(mem, story, out, io, tables, np.int64(alphabet[26 * shift + c - 6]))
            shift = 0
        elif c == 0:
            _put(mem, story, out, io, tables, 32)
            shift = 0
        elif c <= 3:
            high, state, shift = c, 1, 0
        else:
            shift = c - 3


@njit(nogil=True)
def _encode(mem, alphabet, address, length, num_chars, codes):
    """Encode a word for the dictionary into ``codes`` (16-bit words, ``num_chars // 3`` of them)."""
    chars = np.empty(16, np.int64)
    n = 0
    for i in range(num_chars + 1):
        if n >= num_chars:
            break
        if i >= length:
            chars[n] = 5
            n += 1
            continue
        c = mem[address + i]
        found = -1
        for k in range(78):
            if alphabet[k] == c:
                found = k
                break
        if found < 0:
            chars[n], chars[n + 1], chars[n + 2], chars[n + 3] = 5, 6, c >> 5, c & 0x1F
            n += 4
            continue
        if found >= 26:
            chars[n] = 3 + found // 26
            n += 1
        chars[n] = found % 26 + 6
        n += 1
    for k in range(num_chars // 3):
        codes[k] = (chars[3 * k] << 10) | (chars[3 * k + 1] << 5) | chars[3 * k + 2]
    codes[num_chars // 3 - 1] |= 0x8000


@njit(nogil=True)
def _look_up(mem, story, alphabet, address, length, dictionary):
    """Address of a word in the dictionary; 0 if it is not there."""
    num_chars = 6 if story.version <= 3 else 9
    codes = np.empty(3, np.int64)
    _encode(mem, alphabet, address, length, num_chars, codes)
    start = dictionary + 1 + _byte(mem, dictionary)
    entry_size, num_entries = _byte(mem, start), _signed(_word(mem, start + 1))
    is_sorted = num_entries >= 0
    lower, upper = np.int64(0), abs(num_entries) - 1
    while lower <= upper:
        middle = (lower + upper) // 2 if is_sorted else lower
        entry = start + 3 + middle * entry_size
        order = np.int64(0)
        for k in range(num_chars // 3):
            order = codes[k] - _word(mem, entry + 2 * k)
            if order != 0:
                break
        if order == 0:
            return entry
        if order > 0 or not is_sorted:
            lower = middle + 1
        else:
            upper = middle - 1
    return np.int64(0)


@njit(nogil=True)
def _add_token(mem, story, alphabet, text, start, length, parse, dictionary, skip_unknown):
    num_tokens = _byte(mem, parse + 1)
    if num_tokens >= mem[parse]:
        return
    mem[parse + 1] = num_tokens + 1
    entry = _look_up(mem, story, alphabet, text + start, length, dictionary)
    if entry != 0 or not skip_unknown:
        token = parse + 2 + 4 * num_tokens
        _set_word(mem, token, entry)
        mem[token + 2] = length & 0xFF
        mem[token + 3] = start & 0xFF


@njit(nogil=True)
def _tokenise(mem, story, alphabet, text, parse, dictionary, skip_unknown):
    """Split the input at ``text`` into words (section 13.6 of the standard)."""
    if dictionary == 0:
        dictionary = story.dictionary
    mem[parse + 1] = 0
    first = 2 if story.version >= 5 else 1
    end = first + _byte(mem, text + 1) if story.version >= 5 else np.int64(-1)
    position, word_start = np.int64(first), np.int64(0)
    while True:
        c = np.int64(0) if position == end else _byte(mem, text + position)
        is_separator = False
        if c != 0:
            for k in range(_byte(mem, dictionary)):
                if mem[dictionary + 1 + k] == c:
                    is_separator = True
        if is_separator or c == 32 or c == 0:
            if word_start:
                length = position - word_start
                _add_token(mem, story, alphabet, text, word_start, length, parse, dictionary, skip_unknown)
                word_start = np.int64(0)
            if is_separator:
                _add_token(mem, story, alphabet, text, position, np.int64(1), parse, dictionary, skip_unknown)
        elif word_start == 0:
            word_start = position
        if c == 0:
            return
        position += 1


@njit(nogil=True)
def _read_line(mem, story, alphabet, text, parse, line):
    """Enter a line in lower case (section 15, ``read``).

    Returns False if the line is too long, if part of it was entered, or if it contains characters other than printable
    ASCII, or a backslash: Frotz converts them in its own ways.
    """
    size = _byte(mem, text)
    if story.version <= 4:
        size -= 1
    start = text + (1 if story.version <= 4 else 2)
    if line.size > min(size, 199) or (story.version >= 5 and mem[text + 1] != 0):
        return False
    for n in range(line.size):
        c = line[n]
        if c < 32 or c > 126 or c == 92:
            return False
        mem[start + n] = c + 32 if c >= 65 and c <= 90 else c
    if story.version <= 4:
        mem[start + line.size] = 0
    else:
        mem[text + 1] = line.size
    if parse != 0:
        _tokenise(mem, story, alphabet, text, parse, np.int64(0), False)
    return True


# ---- objects ----


@njit(nogil=True, forceinline=True)
def _object(story, number):
    """Address of an object's entry in the object table."""
    if story.version <= 3:
        return story.object_table + 62 + 9 * (number - 1)
    return story.object_table + 126 + 14 * (number - 1)


@njit(nogil=True, forceinline=True)
def _relative(mem, story, number, which):
    """The parent (0), sibling (1) or child (2) of an object; 0 for object 0."""
    if number == 0:
        return np.int64(0)
    if story.version <= 3:
        return _byte(mem, _object(story, number) + 4 + which)
    return _word(mem, _object(story, number) + 6 + 2 * which)


@njit(nogil=True)
def _set_relative(mem, story, number, which, value):
    if story.version <= 3:
        mem[_object(story, number) + 4 + which] = value & 0xFF
    else:
        _set_word(mem, _object(story, number) + 6 + 2 * which, value)


@njit(nogil=True)
def _unlink(mem, story, number):
    """Remove an object from its parent. Returns False if the object tree is damaged."""
    parent = _relative(mem, story, number, 0)
    if parent == 0:
        return True
    sibling, child = _relative(mem, story, number, 1), _relative(mem, story, parent, 2)
    _set_relative(mem, story, number, 0, 0)
    _set_relative(mem, story, number, 1, 0)
    if child == number:
        _set_relative(mem, story, parent, 2, sibling)
        return True
    for _ in range(2001):
        following = _relative(mem, story, child, 1)
        if following == number:
            _set_relative(mem, story, child, 1, sibling)
            return True
        if following == 0:
            return False
        child = following
    return False


@njit(nogil=True)
def _insert(mem, story, number, parent):
    """Make an object the first child of ``parent``."""
    if not _unlink(mem, story, number):
        return False
    _set_relative(mem, story, number, 0, parent)
    _set_relative(mem, story, number, 1, _relative(mem, story, parent, 2))
    _set_relative(mem, story, parent, 2, number)
    return True


@njit(nogil=True, forceinline=True)
def _name_address(mem, story, number):
    return _word(mem, _object(story, number) + (7 if story.version <= 3 else 12))


@njit(nogil=True, forceinline=True)
def _first_property(mem, story, number):
    name = _name_address(mem, story, number)
    return (name + 1 + 2 * _byte(mem, name)) & 0xFFFF


@njit(nogil=True, forceinline=True)
def _next_property(mem, story, address):
    size = _byte(mem, address)
    if story.version <= 3:
        return (address + 2 + (size >> 5)) & 0xFFFF
    if not size & 0x80:
        return (address + 2 + (size >> 6)) & 0xFFFF
    size = _byte(mem, address + 1) & 0x3F
    return (address + 2 + (size if size else 64)) & 0xFFFF


@njit(nogil=True, forceinline=True)
def _find_property(mem, story, number, prop):
    """Address of a property's size byte; 0 if the object does not have it."""
    mask = 0x1F if story.version <= 3 else 0x3F
    address = _first_property(mem, story, number)
    while (_byte(mem, address) & mask) > prop:
        address = _next_property(mem, story, address)
    return address if (_byte(mem, address) & mask) == prop else np.int64(0)


@njit(nogil=True, forceinline=True)
def _property_data(mem, story, address):
    """Address and size of the data of the property whose size byte is at ``address``."""
    first = _byte(mem, address)
    if story.version <= 3:
        return address + 1, (first >> 5) + 1
    if not first & 0x80:
        return address + 1, (first >> 6) + 1
    size = _byte(mem, address + 1) & 0x3F
    return address + 2, size if size else np.int64(64)


@njit(nogil=True, forceinline=True)
def _get_property(mem, story, number, prop):
    if number == 0:
        return np.int64(0)
    address = _find_property(mem, story, number, prop)
    if address == 0:
        return _word(mem, story.object_table + 2 * (prop - 1))
    first = _byte(mem, address)
    if (story.version <= 3 and first < 0x20) or (story.version > 3 and first < 0x40):
        return _byte(mem, address + 1)
    return _word(mem, address + 1)


@njit(nogil=True, forceinline=True)
def _property_address(mem, story, number, prop):
    if number == 0:
        return np.int64(0)
    address = _find_property(mem, story, number, prop)
    return address if address == 0 else _property_data(mem, story, address)[0]


@njit(nogil=True)
def _property_length(mem, story, data):
    size = _byte(mem, (data - 1) & 0xFFFF)
    if story.version <= 3:
        return (size >> 5) + 1
    if not size & 0x80:
        return (size >> 6) + 1
    size &= 0x3F
    return size if size else np.int64(64)


@njit(nogil=True)
def _next_property_number(mem, story, number, prop):
    """The number of the property after ``prop``, or of the first one if it is 0; -1 after an error."""
    if number == 0:
        return np.int64(0)
    mask = 0x1F if story.version <= 3 else 0x3F
    address = _first_property(mem, story, number)
    if prop != 0:
        address = _find_property(mem, story, number, prop)
        if address == 0:
            return np.int64(-1)
        address = _next_property(mem, story, address)
    return _byte(mem, address) & mask


@njit(nogil=True)
def _put_property(mem, story, number, prop, value):
    """Returns False if the object does not have the property."""
    address = _find_property(mem, story, number, prop)
    if address == 0:
        return False
    first = _byte(mem, address)
    if (story.version <= 3 and first < 0x20) or (story.version > 3 and first < 0x40):
        mem[address + 1] = value & 0xFF
    else:
        _set_word(mem, address + 1, value)
    return True


@njit(nogil=True, forceinline=True)
def _test_attribute(mem, story, number, attribute):
    return number != 0 and (_byte(mem, _object(story, number) + (attribute >> 3)) & (0x80 >> (attribute & 7))) != 0


@njit(nogil=True)
def _change_attribute(mem, story, number, attribute, is_set):
    address = _object(story, number) + (attribute >> 3)
    if is_set:
        mem[address] |= 0x80 >> (attribute & 7)
    else:
        mem[address] &= ~(0x80 >> (attribute & 7)) & 0xFF


# ---- instructions ----


@njit(nogil=True, forceinline=True)
def _binary_value(mem, operation, a, b):
    """Result of an instruction with two operands that stores a value, and whether it is defined."""
    if operation == OR:
        return a | b, True
    if operation == AND:
        return a & b, True
    if operation == LOADW:
        return _word(mem, (a + 2 * b) & 0xFFFF), True
    if operation == LOADB:
        return _byte(mem, (a + b) & 0xFFFF), True
    if operation == ADD:
        return a + b, True
    if operation == SUB:
        return a - b, True
    if operation == MUL:
        return _signed(a) * _signed(b), True
    dividend, divisor = _signed(a), _signed(b)
    if divisor == 0:
        return np.int64(0), False
    quotient = abs(dividend) // abs(divisor)
    if (dividend < 0) != (divisor < 0):
        quotient = -quotient
    return (quotient, True) if operation == DIV else (dividend - quotient * divisor, True)


@njit(nogil=True)
def _scan_table(mem, value, address, args, num_args):
    form = args[3] if num_args >= 4 else np.int64(0x82)
    for _ in range(args[2]):
        found = _word(mem, address) if form & 0x80 else _byte(mem, address)
        if found == value:
            return address
        address = (address + (form & 0x7F)) & 0xFFFF
    return np.int64(0)


@njit(nogil=True)
def _copy_table(mem, story, first, second, size):
    """Copy or clear a table. Returns False if it is outside of dynamic memory."""
    length = abs(_signed(size))
    target = first if second == 0 else second
    if target + length > story.dynamic_size:
        return False
    if second == 0:
        for n in range(length):
            mem[first + n] = 0
    elif _signed(size) < 0 or first > second:
        for n in range(length):
            mem[second + n] = mem[(first + n) & 0xFFFF]
    else:
        for n in range(length - 1, -1, -1):
            mem[second + n] = mem[(first + n) & 0xFFFF]
    return True


@njit(nogil=True)
def _print_table(mem, story, out, io, tables, address, width, args, num_args):
    height = args[2] if num_args >= 3 else np.int64(1)
    skip = args[3] if num_args >= 4 else np.int64(0)
    for row in range(height):
        if row > 0:
            _put(mem, story, out, io, tables, 13)
        for _ in range(width):
            _put(mem, story, out, io, tables, _byte(mem, address & 0xFFFF))
            address += 1
        address += skip


@njit(nogil=True)
def _output_stream(mem, story, number, table, num_args, io, tables):
    """Select an output stream. Returns False if it is a file."""
    stream = _signed(number)
    if abs(stream) == 1:
        io[_SCREEN] = stream > 0
    elif stream == 3:
        if io[_DEPTH] >= 15 or num_args >= 3 or table + 2 > story.dynamic_size:
            return False
        io[_DEPTH] += 1
        tables[io[_DEPTH]] = table
        _set_word(mem, table, 0)
    elif stream == -3:
        io[_DEPTH] = max(io[_DEPTH] - 1, -1)
    elif stream == 2 or stream == 4:
        return False
    return True


@njit(nogil=True, forceinline=True)
def _store_byte(mem, story, address, value):
    """Returns False outside of dynamic memory, and for the header's flags, which have effects."""
    if address >= story.dynamic_size or (address == 0x11 and (value ^ mem[address]) & 1):
        return False
    mem[address] = value & 0xFF
    return True


@njit(nogil=True)
def _shift(value, places, is_arithmetic):
    if is_arithmetic:
        value = _signed(value)
    return value << places if places > 0 else value >> -places


@njit(nogil=True, forceinline=True)
def _store_word(mem, story, address, value):
    is_stored = _store_byte(mem, story, address, value >> 8)
    return _store_byte(mem, story, address + 1, value & 0xFF) and is_stored


@njit(nogil=True)
def _random(random, limit):
    """A random number from 1 to ``limit``; a limit that is not positive seeds the random numbers."""
    limit = _signed(limit)
    if limit <= 0:
        if limit > -1000:
            random[_INTERVAL], random[_COUNTER] = -limit, 0
        else:
            random[_INTERVAL], random[_NUMBER] = 0, -limit
        return np.int64(0)
    if random[_INTERVAL] == 0:
        random[_NUMBER] = 0x015A4E35 * random[_NUMBER] + 1
        return ((random[_NUMBER] >> 16) & 0x7FFF) % limit + 1
    number = random[_COUNTER]
    random[_COUNTER] = 0 if number + 1 == random[_INTERVAL] else number + 1
    return number % limit + 1


@njit(nogil=True)
def _add_event(events, count, kind, number, target):
    if count[kind] < MAX_EVENTS:
        events[kind, count[kind], 0], events[kind, count[kind], 1] = number, target
        count[kind] += 1


@njit(nogil=True, forceinline=True)
def _read_instruction(mem, stack, story, args, pc, sp, fp):
    """Read an instruction and its operands (section 4 of the standard).

    Returns:
        The operation, the number of operands, the first two of them, the program counter behind them, and the stack
        pointer. ``args`` gets all operands if they may be more than two.
    """
    a = b = np.int64(0)
    opcode = _byte(mem, pc)
    pc += 1
    if opcode < 0x80:
        a, b = _byte(mem, pc), _byte(mem, pc + 1)
        if opcode & 0x40:
            a, sp = _get_variable(mem, stack, story, a, sp, fp)
        if opcode & 0x20:
            b, sp = _get_variable(mem, stack, story, b, sp, fp)
        return opcode & 0x1F, 2, a, b, pc + 2, sp
    if opcode < 0xB0:
        a, pc, sp = _operand(mem, stack, story, (opcode >> 4) & 3, pc, sp, fp)
        return JZ + (opcode & 15), 1, a, b, pc, sp
    if opcode < 0xC0 and opcode != 0xBE:
        return RTRUE + (opcode & 15), 0, a, b, pc, sp
    operation = opcode - 0xC0
    if opcode == 0xBE:
        operation = EXTENDED + _byte(mem, pc)
        pc += 1
    kinds, last = _byte(mem, pc) << 8, 8
    pc += 1
    if opcode == 0xEC or opcode == 0xFA:  # up to eight operands
        kinds, last = kinds | _byte(mem, pc), 0
        pc += 1
    num_args = 0
    for position in range(14, last - 1, -2):
        kind = (kinds >> position) & 3
        if kind == 3:
            break
        args[num_args], pc, sp = _operand(mem, stack, story, kind, pc, sp, fp)
        num_args += 1
    return operation, num_args, args[0], args[1], pc, sp


# The following functions execute operations. They return what follows (a sum of _STORE, _BRANCH, ...), the
# value that is stored or returned, the condition of the branch, and whether the operation is known and defined.


@njit(nogil=True, forceinline=True)
def _execute_on_object(mem, story, operation, a, b, events, count):
    """An operation on the object ``a``."""
    max_object, max_attribute = (255, 31) if story.version <= 3 else (MAX_OBJECT, 47)
    if a > max_object:
        return 0, np.int64(0), False, False  # Frotz stops
    if operation == TEST_ATTR:
        return _BRANCH, np.int64(0), _test_attribute(mem, story, a, b), b <= max_attribute
    if operation == JIN:
        return _BRANCH, np.int64(0), _relative(mem, story, a, 0) == b, True
    if operation == GET_PROP:
        return _STORE, _get_property(mem, story, a, b), False, True
    if operation == GET_PROP_ADDR:
        return _STORE, _property_address(mem, story, a, b), False, True
    if operation == GET_NEXT_PROP:
        value = _next_property_number(mem, story, a, b)
        return _STORE, value, False, value >= 0
    if operation == INSERT_OBJ:
        _add_event(events, count, _MOVED, a, b)
        return 0, np.int64(0), False, b <= max_object and (a == 0 or b == 0 or _insert(mem, story, a, b))
    # SET_ATTR, CLEAR_ATTR
    _add_event(events, count, _SET if operation == SET_ATTR else _CLEARED, a, b)
    if a != 0 and b <= max_attribute:
        _change_attribute(mem, story, a, b, operation == SET_ATTR)
    return 0, np.int64(0), False, b <= max_attribute


@njit(nogil=True, forceinline=True)
def _execute_on_two(mem, stack, story, operation, num_args, args, a, b, sp, fp, events, count):
    """An operation that usually has two operands."""
    if operation == JE:
        holds = num_args > 1 and a == b
        for n in range(2, num_args):
            holds = holds or a == args[n]
        return _BRANCH, np.int64(0), holds, True
    if operation == JL:
        return _BRANCH, np.int64(0), _signed(a) < _signed(b), True
    if operation == JG:
        return _BRANCH, np.int64(0), _signed(a) > _signed(b), True
    if operation in (DEC_CHK, INC_CHK):
        value = _signed(_peek_variable(mem, stack, story, a, sp, fp) + (1 if operation == INC_CHK else -1))
        _poke_variable(mem, stack, story, a, value, sp, fp)
        return _BRANCH, value, value > _signed(b) if operation == INC_CHK else value < _signed(b), True
    if operation == TEST:
        return _BRANCH, np.int64(0), (a & b) == b, True
    if operation == STORE:
        _poke_variable(mem, stack, story, a, b, sp, fp)
        return 0, np.int64(0), False, True
    if operation == CALL_2S:
        return _CALL | _STORE, np.int64(0), False, True
    if operation == CALL_2N:
        return _CALL, np.int64(0), False, True
    if operation in (OR, AND, LOADW, LOADB) or (operation >= ADD and operation <= MOD):
        value, known = _binary_value(mem, operation, a, b)
        return _STORE, value, False, known
    if operation >= SET_COLOUR or operation < JE:  # throwing to a frame is not supported
        return 0, np.int64(0), False, operation == SET_COLOUR
    return _execute_on_object(mem, story, operation, a, b, events, count)


@njit(nogil=True, forceinline=True)
def _execute_on_memory(mem, stack, story, alphabet, operation, num_args, args, a, b, fp, out, io, tables, random):
    """An operation with a variable number of operands that does not change the stack."""
    if operation in (CALL_VS, CALL_VS2):
        return _CALL | _STORE, np.int64(0), False, True
    if operation in (CALL_VN, CALL_VN2):
        return _CALL, np.int64(0), False, True
    if operation == RANDOM:
        return _STORE, _random(random, a), False, a != 0
    if operation == NOT:
        return _STORE, ~a, False, True
    if operation == SCAN_TABLE:
        value = _scan_table(mem, a, b, args, num_args)
        return _STORE | _BRANCH, value, value != 0, True
    if operation == CHECK_ARG_COUNT:
        return _BRANCH, np.int64(0), (np.int64(stack[fp & STACK_MASK]) & 0xFF) >= a, True
    known = True
    if operation == STOREW:
        known = _store_word(mem, story, (a + 2 * b) & 0xFFFF, args[2])
    elif operation == STOREB:
        known = _store_byte(mem, story, (a + b) & 0xFFFF, args[2] & 0xFF)
    elif operation == PUT_PROP:
        is_object = a != 0 and a <= (255 if story.version <= 3 else MAX_OBJECT)
        known = is_object and _put_property(mem, story, a, b, args[2])
    elif operation == COPY_TABLE:
        known = _copy_table(mem, story, a, b, args[2])
    elif operation == OUTPUT_STREAM:
        known = _output_stream(mem, story, a, b, num_args, io, tables)
    elif operation == PRINT_CHAR:
        _put(mem, story, out, io, tables, a & 0xFF)
    elif operation == PRINT_NUM:
        _put_number(mem, story, out, io, tables, a)
    elif operation == PRINT_TABLE:
        _print_table(mem, story, out, io, tables, a, b, args, num_args)
    elif operation == TOKENISE:
        dictionary = args[2] if num_args >= 3 else np.int64(0)
        _tokenise(mem, story, alphabet, a, b, dictionary, num_args >= 4 and args[3] != 0)
    else:  # windows and sounds have no effect on the game
        known = operation in (
            SPLIT_WINDOW, SET_WINDOW, ERASE_WINDOW, ERASE_LINE, SET_CURSOR, SET_TEXT_STYLE, BUFFER_MODE, INPUT_STREAM,
            SOUND_EFFECT,
        )  # fmt: skip
    return 0, np.int64(0), False, known


@njit(nogil=True, forceinline=True)
def _execute_on_one(mem, stack, story, alphabet, operation, a, sp, fp, out, io, tables):
    """An operation with one operand."""
    if operation == JZ:
        return _BRANCH, np.int64(0), a == 0, True
    if operation == JUMP:
        return _JUMP, _signed(a) - 2, False, True
    if operation in (INC, DEC):
        value = _peek_variable(mem, stack, story, a, sp, fp) + (1 if operation == INC else -1)
        _poke_variable(mem, stack, story, a, value, sp, fp)
        return 0, np.int64(0), False, True
    if operation == RET:
        return _RETURN, a, False, True
    if operation == LOAD:
        return _STORE, _peek_variable(mem, stack, story, a, sp, fp), False, True
    if operation == CALL_1S:
        return _CALL | _STORE, np.int64(0), False, True
    if operation == NOT_OR_CALL_1N:
        return _STORE if story.version <= 4 else _CALL, ~a, False, True
    if operation == GET_PROP_LEN:
        return _STORE, _property_length(mem, story, a), False, True
    is_object = operation in (GET_SIBLING, GET_CHILD, GET_PARENT, REMOVE_OBJ, PRINT_OBJ)
    if is_object and a > (255 if story.version <= 3 else MAX_OBJECT):
        return 0, np.int64(0), False, False  # Frotz stops
    if operation in (GET_SIBLING, GET_CHILD):
        value = _relative(mem, story, a, operation - JZ)
        return _STORE | _BRANCH, value, value != 0, True
    if operation == GET_PARENT:
        return _STORE, _relative(mem, story, a, 0), False, True
    if operation == REMOVE_OBJ:
        return 0, np.int64(0), False, a != 0 and _unlink(mem, story, a)
    address = a  # PRINT_ADDR
    if operation == PRINT_PADDR:
        address = _unpack(story, a)
    elif operation == PRINT_OBJ:
        address = _name_address(mem, story, a) + 1
    if operation == PRINT_OBJ and a == 0:
        return 0, np.int64(0), False, False
    _put_string(mem, story, alphabet, out, io, tables, address)
    return 0, np.int64(0), False, True


@njit(nogil=True, forceinline=True)
def _execute_alone(mem, stack, story, operation, a, b, sp, frames, out, io, tables):
    """An operation without operands, except for those that print a text or pop the stack, or an extended operation."""
    if operation in (RTRUE, RFALSE):
        return _RETURN, np.int64(operation == RTRUE), False, True
    if operation == RET_POPPED:
        return _RETURN, np.int64(stack[sp & STACK_MASK]), False, True
    if operation == POP_OR_CATCH:
        return _STORE, np.int64(frames), False, True
    if operation == NEW_LINE:
        _put(mem, story, out, io, tables, 13)
        return 0, np.int64(0), False, True
    if operation in (LOG_SHIFT, ART_SHIFT):
        return _STORE, _shift(a, _signed(b), operation == ART_SHIFT), False, True
    if operation == SAVE_UNDO:  # Jericho's emulator keeps no states for "undo", so saving one fails
        return _STORE, np.int64(-1), False, True
    return 0, np.int64(0), False, operation in (NOP, SHOW_STATUS)


@njit(nogil=True, forceinline=True)
def _change_stack(mem, stack, story, operation, a, sp, fp):
    """Push, pull or pop a word; the new stack pointer."""
    if operation == PUSH:
        stack[(sp - 1) & STACK_MASK] = a
        return sp - 1
    if operation == PULL:
        _poke_variable(mem, stack, story, a, np.int64(stack[sp & STACK_MASK]), sp + 1, fp)
    return sp + 1


@njit(nogil=True, forceinline=True)
def _finish(mem, stack, story, then, value, holds, args, num_args, a, b, pc, sp, fp, frames):
    """Do what follows an operation; as ``_return``, and whether it succeeded."""
    known = True
    if then & _JUMP:
        pc += value
    if then & _CALL:
        if a != 0:
            args[0], args[1] = a, b
            kind = 0 if then & _STORE else 1
            pc, sp, fp, frames, known = _call(mem, stack, story, args, num_args, kind, pc, sp, fp, frames)
            then = 0
        value = np.int64(0)
    if then & _STORE:
        pc, sp = _store(mem, stack, story, value, pc, sp, fp)
    if then & _BRANCH:
        pc, offset, is_taken = _branch(mem, pc, holds)
        if is_taken and (offset == 0 or offset == 1):
            then, value = _RETURN, offset
        elif is_taken:
            pc += offset - 2
    if then & _RETURN:
        pc, sp, fp, frames = _return(mem, stack, story, value, fp, frames)
    return pc, sp, fp, frames, known


@njit(nogil=True)
def _run(mem, stack, story, alphabet, registers, line, events, count, out, io):
    """Execute one command. The operations are described in section 15 of the standard.

    Args:
        mem: the story; its dynamic memory changes.
        stack: the stack, which changes.
        line: the command, uint8.
        events: objects and destinations or attributes, ``[3, 16, 2]``; ``count`` has their numbers, ``[3]``.
        out: buffer of the text; ``io`` has its length.

    Returns:
        The registers at the next input, and whether all instructions are known.
    """
    pc, sp, fp, frames = registers.counter, registers.stack_pointer, registers.frame_pointer, registers.frame_count
    random = np.array([registers.random, registers.random_interval, registers.random_counter])
    args, tables = np.zeros(8, np.int64), np.zeros(16, np.int64)
    is_first = True
    for _ in range(MAX_INSTRUCTIONS):
        if _byte(mem, pc) in (READ_LINE, READ_KEY) and not is_first:
            return Registers(pc, sp, fp, frames, random[0], random[1], random[2]), io[_FAILED] == 0
        operation, num_args, a, b, pc, sp = _read_instruction(mem, stack, story, args, pc, sp, fp)
        then, value, holds, known = 0, np.int64(0), False, True
        if operation < CALL_VS:
            then, value, holds, known = _execute_on_two(
                mem, stack, story, operation, num_args, args, a, b, sp, fp, events, count
            )
        elif operation >= JZ and operation < RTRUE:
            then, value, holds, known = _execute_on_one(
                mem, stack, story, alphabet, operation, a, sp, fp, out, io, tables
            )
        elif operation in (PUSH, PULL) or (operation == POP_OR_CATCH and story.version <= 4):
            sp = _change_stack(mem, stack, story, operation, a, sp, fp)
        elif operation == READ:
            known = is_first and _read_line(mem, story, alphabet, a, b if num_args > 1 else 0, line)
            then, value = _STORE if story.version >= 5 else 0, np.int64(13)
        elif operation < JZ:
            then, value, holds, known = _execute_on_memory(
                mem, stack, story, alphabet, operation, num_args, args, a, b, fp, out, io, tables, random
            )
        elif operation in (PRINT, PRINT_RET):
            pc = _put_string(mem, story, alphabet, out, io, tables, pc)
            if operation == PRINT_RET:
                _put(mem, story, out, io, tables, 13)
                then, value = _RETURN, np.int64(1)
        else:
            then, value, holds, known = _execute_alone(mem, stack, story, operation, a, b, sp, frames, out, io, tables)
        if not known or sp > STACK_WORDS:
            break
        pc, sp, fp, frames, known = _finish(
            mem, stack, story, then, value, holds, args, num_args, a, b, pc, sp, fp, frames
        )
        is_first = False
        if not known or pc >= story.size:
            break
    return Registers(pc, sp, fp, frames, random[0], random[1], random[2]), False


@njit(nogil=True)
def _contains(text, start, end, pattern):
    for first in range(start, end - pattern.size + 1):
        n = 0
        while n < pattern.size and text[first + n] == pattern[n]:
            n += 1
        if n == pattern.size:
            return True
    return False


@njit(nogil=True)
def _hash(text, start, end):
    value = np.int64(-3750763034362895579)  # FNV-1a
    for n in range(start, end):
        value = (value ^ np.int64(text[n])) * np.int64(1099511628211)
    return value


@njit(nogil=True)
def _write_changes(row, events, count, watch):
    """Write the events of a command, without ignored attributes, into a row of ``Results.changes``.

    Returns the number of attributes that were set and cleared.
    """
    for n in range(count[_MOVED]):
        row[n], row[64 + n] = events[_MOVED, n, 0], events[_MOVED, n, 1]
    num = 0
    for kind in (_SET, _CLEARED):
        ignored = watch.ignored_set if kind == _SET else watch.ignored_cleared
        place = 16 * kind
        for n in range(count[kind]):
            number, attribute = events[kind, n, 0], events[kind, n, 1]
            if number >= ignored.shape[0] or attribute >= 48 or not ignored[number, attribute]:
                row[place], row[64 + place] = number, attribute
                place += 1
        num += place - 16 * kind
    return num


def run_commands(mem, ram, stack, story, alphabet, registers, watch, lines, line_ends):
    """Execute each command from the same state; :class:`Results`.

    Args:
        mem: a copy of the story that this function may change, uint8, ``[MEMORY_SIZE]``.
        ram: dynamic memory at the state, ``[story.dynamic_size]`` uint8.
        stack: the stack at the state, ``[1024]`` uint16.
        alphabet: the 78 characters of the three alphabets, uint8.
        registers: :class:`Registers` of the state.
        watch: :class:`Watch`.
        lines: the commands without separators, uint8; ``line_ends`` says where each ends, ``[N]``.
    """
    num = line_ends.size
    status, num_moved = np.zeros(num, np.uint8), np.zeros(num, np.uint8)
    scored, changed, taken = np.zeros(num, np.bool_), np.zeros(num, np.bool_), np.zeros(num, np.bool_)
    changes = np.zeros((num, DIFF_WORDS), np.uint16)
    text_ends, hashes = np.zeros(num, np.int64), np.zeros(num, np.int64)
    text = np.empty(256 * num + MAX_TEXT, np.uint8)
    pattern = np.array([40, 84, 97, 107, 101, 110, 41], np.uint8)  # "(Taken)"
    own_stack = np.zeros(STACK_MASK + 1, np.uint16)
    events, count, io = np.zeros((3, MAX_EVENTS, 2), np.int64), np.zeros(3, np.int64), np.zeros(4, np.int64)
    line_start = text_start = 0
    for n in range(num):
        mem[: story.dynamic_size] = ram
        own_stack[registers.stack_pointer : STACK_WORDS] = stack[registers.stack_pointer :]
        count[:] = 0
        io[_LENGTH], io[_DEPTH], io[_SCREEN], io[_FAILED] = 0, -1, 1, 0
        line = lines[line_start : line_ends[n]]
        line_start = line_ends[n]
        if text_start + MAX_TEXT > text.size:
            larger = np.empty(2 * text.size + MAX_TEXT, np.uint8)
            larger[:text_start] = text[:text_start]
            text = larger
        out = text[text_start : text_start + MAX_TEXT]
        _, known = _run(mem, own_stack, story, alphabet, registers, line, events, count, out, io)
        end = text_start + io[_LENGTH]
        text_ends[n], hashes[n] = end, _hash(text, text_start, end)
        taken[n] = _contains(text, text_start, end, pattern)
        text_start = end
        if not known or io[_LENGTH] == MAX_TEXT:
            status[n] = UNKNOWN
            continue
        num_attributes = _write_changes(changes[n], events, count, watch)
        place = 48
        for address in watch.addresses:
            if mem[address] != ram[address] and place < 64:
                changes[n, place], changes[n, 64 + place] = address, mem[address]
                place += 1
        for address in watch.score_addresses:
            scored[n] = scored[n] or mem[address] != ram[address]
        num_moved[n], changed[n] = count[_MOVED], num_attributes > 0 or place > 48
        status[n] = CHANGED if num_moved[n] or changed[n] or scored[n] else UNCHANGED
    return Results(status, scored, num_moved, changed, taken, changes, text[:text_start], text_ends, hashes)


run_commands = cached_njit(run_commands)


def compile_functions() -> str | None:
    """Compile the functions, or load them from Numba's cache. Takes half a minute; later calls take no time.

    Returns why the result cannot be kept on disk; None if it is there.
    """
    story = Story(5, 0, 0, 0, 0, 0, 0)
    bytes_, numbers = np.zeros(0, np.uint8), np.zeros(0, np.int64)
    watch = Watch(np.zeros((0, 48), np.bool_), np.zeros((0, 48), np.bool_), numbers, numbers)
    stack = np.zeros(STACK_WORDS, np.uint16)
    registers = Registers(0, 0, 0, 0, 0, 0, 0)
    return compile_now(run_commands, bytes_, bytes_, stack, story, bytes_, registers, watch, bytes_, numbers)
