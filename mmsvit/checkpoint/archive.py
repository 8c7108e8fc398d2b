"""Check the structure of a torch file before torch reads it: bounded work, no surprises.

torch verifies neither checksums nor the pickle's own size: a small file may claim gigabytes, or hold
tuples of tuples whose hash takes for ever.
"""

from __future__ import annotations

import mmap
import pickle
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

# Elements of all objects, those inside of each other counted each time. torch's own files have less
# than one for each byte.
ELEMENTS_PER_BYTE = 8
ELEMENTS_ANYWAY = 1_000_000
MAX_DEPTH = 500  # Python itself follows a thousand.
LOCAL_HEADER = struct.Struct('<26xHH')  # lengths of name and extra field, before a record
LEGACY_PICKLES = 5  # magic number, protocol, system, content and keys of storages

# The opcodes that torch's weights-only mode knows; it stops at any other.
APPEND, APPENDS, SETITEM, SETITEMS, BUILD = b'aesub'
MARK, TUPLE, TUPLE1, LONG1 = b'(t\x85\x8a'
REDUCE, NEWOBJ, BINPERSID, GLOBAL, STOP, PROTO = b'R\x81Qc.\x80'
PUTS, GETS = frozenset(b'qr'), frozenset(b'hj')
NUMBERS, STRINGS = frozenset(b'JKM'), frozenset(b'XU\x8a')  # LONG1 has a length, as strings
CONSTANTS, EMPTY = frozenset(b'NG\x88\x89)'), frozenset(b']}\x8f')
TUPLES = frozenset(b't\x85\x86\x87')
FILLS = {APPEND: 1, APPENDS: 0, SETITEM: 2, SETITEMS: 0, BUILD: 1}
ARGUMENT_SIZES = [0] * 256
for _code, _size in zip(b'qrhjJKMXU\x8aG\x80', (1, 4, 1, 4, 4, 1, 2, 4, 1, 1, 8, 1)):
    ARGUMENT_SIZES[_code] = _size


class UnsafeStructureError(ValueError):
    """A file whose structure torch would never write."""


def check_structure(file: str | Path) -> None:
    """Check a torch file of either format: a zip archive, or before torch 1.6 pickles.

    Raises:
        UnsafeStructureError: torch would never write such a file.
        pickle.UnpicklingError: It has what torch does not read.
        ValueError, OSError, zipfile.BadZipFile: It is corrupt or incomplete, or no regular file.
    """
    check_pickles(file, check_records(file))


def check_records(file: str | Path) -> list[zipfile.ZipInfo]:
    """Check the records of a zip archive but not what is in them; of another file, that it can be read.

    Returns:
        The records; of another file, none.

    Raises:
        UnsafeStructureError, ValueError, OSError, zipfile.BadZipFile: See :func:`check_structure`.
    """
    information = Path(file).stat()
    if not stat.S_ISREG(information.st_mode):  # To open a pipe would wait for its other end.
        raise ValueError('it is no regular file')
    if not zipfile.is_zipfile(file):
        return []
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UnsafeStructureError('compressed records')
    if sum(entry.file_size for entry in entries) > information.st_size:
        raise UnsafeStructureError('records that are larger than the file')
    if len({entry.filename for entry in entries}) < len(entries):
        raise UnsafeStructureError('several records of one name')
    return entries


def check_pickles(file: str | Path, entries: list[zipfile.ZipInfo]) -> None:
    """Check the pickles of a file by :func:`check_pickle`.

    Args:
        file: A torch file of either format.
        entries: From :func:`check_records`.

    Raises:
        UnsafeStructureError, pickle.UnpicklingError, ValueError: See :func:`check_structure`.
    """
    with _mapped(file) as content:
        if not entries:
            at = 0
            for _ in range(LEGACY_PICKLES):
                at = check_pickle(content, at, len(content))
        for entry in entries:
            if PurePosixPath(entry.filename).name == 'data.pkl':
                first = _first_byte(content, entry)
                data = content[first : first + entry.file_size]
                check_pickle(data, 0, len(data))


@contextmanager
def _mapped(file: str | Path) -> Iterator[mmap.mmap]:
    """A file's bytes, without reading those that are not needed."""
    with (
        Path(file).open('rb') as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        yield content


def _first_byte(content: mmap.mmap, entry: zipfile.ZipInfo) -> int:
    """Where a record begins, after its header."""
    header = entry.header_offset + LOCAL_HEADER.size
    lengths = content[entry.header_offset : header]
    if len(lengths) < LOCAL_HEADER.size:
        raise ValueError(f'no header of {entry.filename}')
    return header + sum(LOCAL_HEADER.unpack(lengths))


def check_sums(file: str | Path, entries: list[zipfile.ZipInfo]) -> None:
    """Verify the checksums of records.

    Args:
        file: A torch file.
        entries: From :func:`check_records`.

    Raises:
        ValueError: A record is damaged.
    """
    # Mapped: zipfile's own testzip copies every record.
    with _mapped(file) as content, memoryview(content) as view:
        for entry in entries:
            first = _first_byte(content, entry)
            with view[first : first + entry.file_size] as record:
                if zlib.crc32(record) != entry.CRC:
                    raise ValueError(f'checksum of {entry.filename}')


def _may_allocate(called: str) -> bool:
    """Whether numbers as arguments of a global say how much memory it takes."""
    return called.endswith(('bytearray', 'Tensor', 'Storage'))


class _Object:
    """What is known of an object that a pickle would build.

    Attributes:
        elements: Of the object and all inside of it, counted as often as a walk meets them.
        depth: Levels inside of each other.
        kind: ``'number'``, ``'numbers'`` (a tuple of them), or the name of a global.
        is_used: Whether it is inside of another.
    """

    __slots__ = ('depth', 'elements', 'is_used', 'kind')

    def __init__(self, kind: str = '', elements: int = 1, depth: int = 0) -> None:
        self.kind, self.elements, self.depth, self.is_used = kind, elements, depth, False

    def add(self, parts: list[_Object]) -> None:
        """Put objects into this one."""
        for part in parts:
            self.elements += part.elements
            if part.depth >= self.depth:
                self.depth = part.depth + 1
            if self.kind == 'numbers' and part.kind != 'number':
                self.kind = ''
            part.is_used = True
        if self.depth > MAX_DEPTH:
            raise UnsafeStructureError(f'more than {MAX_DEPTH} levels inside of each other')


def check_pickle(data: bytes | mmap.mmap, at: int, num_bytes: int) -> int:
    """Follow a pickle without building anything, and refuse one that needs unbounded work.

    Args:
        data: What holds the pickle.
        at: Where it begins.
        num_bytes: What bounds its work: the length of the pickle, or of the file around it.

    Returns:
        Where it ends.

    Raises:
        UnsafeStructureError: It needs unbounded work, or to walk what it builds does.
        pickle.UnpicklingError: It has an opcode that torch never writes, and does not read.
        ValueError: It is no pickle.
    """
    limit = ELEMENTS_ANYWAY + ELEMENTS_PER_BYTE * num_bytes
    number, other = _Object('number'), _Object()
    stack: list[_Object] = []
    marks: list[int] = []
    memo: dict[int, _Object] = {}
    total = 0
    try:
        while True:
            code = data[at]
            size = ARGUMENT_SIZES[code]
            at += 1
            if size == 1:
                argument = data[at]
            elif size:
                argument = int.from_bytes(data[at : at + size], 'little')
            at += size
            if code in PUTS:
                memo[argument] = stack[-1]
                continue
            if code in NUMBERS:
                stack.append(number)
                continue
            if code in CONSTANTS:
                stack.append(other)
                continue
            if code in STRINGS:
                at += argument
                stack.append(number if code == LONG1 else other)
                continue
            if code == MARK:
                marks.append(len(stack))
                continue
            if code in GETS:
                stack.append(memo[argument])
                total += stack[-1].elements
            elif code in EMPTY:
                stack.append(_Object())
            elif code in TUPLES:
                first = marks.pop() if code == TUPLE else len(stack) - (code - TUPLE1 + 1)
                if first < 0:
                    raise IndexError
                parts = stack[first:]
                built = _Object('numbers')
                built.add(parts)
                stack[first:] = [built]
                total += built.elements
            elif code in FILLS:
                first = marks.pop() if code in (APPENDS, SETITEMS) else len(stack) - FILLS[code]
                parts, container = stack[first:], stack[first - 1]
                del stack[first:]
                if first < 1 or container in (number, other):
                    raise IndexError
                if container.is_used:
                    raise UnsafeStructureError('lists that grow where they are used')
                container.add(parts)
                total = max(total, container.elements)
            elif code in (REDUCE, NEWOBJ):
                arguments, called = stack.pop(), stack[-1].kind
                if arguments.kind == 'numbers' and _may_allocate(called):
                    raise UnsafeStructureError(f'a call of {called}')
                stack[-1] = _Object('', arguments.elements, arguments.depth)
            elif code == BINPERSID:
                stack[-1] = other
            elif code == GLOBAL:
                module = data.find(b'\n', at)
                end = data.find(b'\n', module + 1)
                if module < 0 or end < 0:
                    raise IndexError
                stack.append(_Object(data[at:end].decode().replace('\n', '.')))
                at = end + 1
            elif code == STOP:
                return at
            elif code != PROTO:
                raise pickle.UnpicklingError(f'opcode {code}')
            if total > limit:
                raise UnsafeStructureError('objects inside of each other without end')
    except (IndexError, KeyError, MemoryError, OverflowError) as error:
        raise ValueError(f'the pickle is damaged ({type(error).__name__})') from error
