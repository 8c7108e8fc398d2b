"""Check the structure of a torch file before torch reads it: bounded work, no surprises.

torch verifies neither checksums nor the pickle's own size: a small file may claim gigabytes, or hold
tuples of tuples whose hash takes for ever.
"""

from __future__ import annotations

import mmap
import pickletools
import struct
import zipfile
import zlib
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

# Elements of all tuples, those inside of each other counted each time. torch's own files have less
# than one for each byte.
TUPLE_ELEMENTS_PER_BYTE = 8
TUPLE_ELEMENTS_ANYWAY = 1_000_000
LOCAL_HEADER = struct.Struct('<26xHH')  # lengths of name and extra field, before a record
LEGACY_PICKLES = 5  # magic number, protocol, system, content and keys of storages


class UnsafeStructureError(ValueError):
    """A file whose structure torch would never write."""


def check_structure(file: str | Path) -> None:
    """Check a torch file of either format: a zip archive, or before torch 1.6 pickles.

    Raises:
        UnsafeStructureError: torch would never write such a file.
        ValueError, OSError, zipfile.BadZipFile: It is corrupt or incomplete.
    """
    size = Path(file).stat().st_size
    if not zipfile.is_zipfile(file):
        # Mapped: a file would allocate what a damaged length says.
        with (
            Path(file).open('rb') as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            for _ in range(LEGACY_PICKLES):
                check_pickle(cast(IO[bytes], content), size)
        return
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise UnsafeStructureError('compressed records')
        if sum(entry.file_size for entry in entries) > size:
            raise UnsafeStructureError('records that are larger than the file')
        if len({entry.filename for entry in entries}) < len(entries):
            raise UnsafeStructureError('several records of one name')
        for entry in entries:
            if PurePosixPath(entry.filename).name == 'data.pkl':
                check_pickle(BytesIO(archive.read(entry)), entry.file_size)


def check_sums(file: str | Path) -> None:
    """Verify the checksums of a zip archive whose structure is checked.

    Raises:
        ValueError: A record is damaged.
    """
    if not zipfile.is_zipfile(file):
        return
    # Mapped: zipfile's own testzip copies every record.
    with (
        zipfile.ZipFile(file) as archive,
        Path(file).open('rb') as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as view,
    ):
        for entry in archive.infolist():
            header = entry.header_offset + LOCAL_HEADER.size
            name, extra = LOCAL_HEADER.unpack(view[entry.header_offset : header])
            first = header + name + extra
            with view[first : first + entry.file_size] as record:
                if zlib.crc32(record) != entry.CRC:
                    raise ValueError(f'checksum of {entry.filename}')


def _may_allocate(called: str) -> bool:
    """Whether numbers as arguments of a global say how much memory it takes."""
    return called.endswith(('bytearray', 'Tensor', 'Storage'))


def check_pickle(stream: IO[bytes], num_bytes: int) -> None:
    """Follow a pickle without building anything, and refuse one that needs unbounded work.

    Args:
        stream: Where the pickle begins.
        num_bytes: What bounds its work: the length of the pickle, or of the file around it.

    Raises:
        UnsafeStructureError: It does.
        ValueError: It is no pickle.
    """
    limit = TUPLE_ELEMENTS_ANYWAY + TUPLE_ELEMENTS_PER_BYTE * num_bytes
    # Of each object the elements of a tuple, all levels together, and of a global the name.
    stack: list[tuple[int, str]] = []
    marks: list[int] = []
    memo: dict[int, tuple[int, str]] = {}
    total = 0
    try:
        argument: Any
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
            if name == 'MARK':
                marks.append(len(stack))
            elif name in ('TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3'):
                first = marks.pop() if name == 'TUPLE' else len(stack) - int(name[-1])
                elements = 1 + sum(one for one, _ in stack[first:])
                numbers = all(kind == 'number' for _, kind in stack[first:])
                stack[first:] = [(elements, 'numbers' if numbers else '')]
            elif name in ('APPENDS', 'SETITEMS', 'ADDITEMS'):
                del stack[marks.pop() :]
            elif name in ('APPEND', 'BUILD'):
                del stack[-1]
            elif name == 'SETITEM':
                del stack[-2:]
            elif name in ('REDUCE', 'NEWOBJ'):
                (elements, kind), (_, called) = stack.pop(), stack[-1]
                if kind == 'numbers' and _may_allocate(called):
                    raise UnsafeStructureError(f'a call of {called.replace(" ", ".")}')
                stack[-1] = (elements, '')
            elif name in ('BINPUT', 'LONG_BINPUT'):
                memo[argument] = stack[-1]
            elif name in ('BINGET', 'LONG_BINGET'):
                stack.append(memo[argument])
            elif name == 'BINPERSID':
                stack[-1] = (1, '')
            elif name == 'GLOBAL':
                stack.append((1, argument))
            elif name not in ('PROTO', 'STOP'):
                stack.append((1, 'number' if isinstance(argument, int) else ''))
            total += stack[-1][0] if stack else 0
            if total > limit:
                raise UnsafeStructureError('tuples inside of each other without end')
    except (IndexError, KeyError, MemoryError, OverflowError) as error:
        raise ValueError(f'the pickle is damaged ({type(error).__name__})') from error
