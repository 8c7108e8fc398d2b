"""Check the structure of a torch file before torch reads it: bounded work, no surprises.

torch verifies neither checksums nor the pickle's own size: a small file may claim gigabytes, or hold
tuples of tuples whose hash takes for ever.
"""

from __future__ import annotations

import mmap
import pickle
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

# Elements of all objects, those inside of each other counted each time. torch's own files have less
# than one for each byte.
ELEMENTS_PER_BYTE = 8
ELEMENTS_ANYWAY = 1_000_000
MAX_DEPTH = 500  # Python itself follows a thousand.
LOCAL_HEADER = struct.Struct('<26xHH')  # lengths of name and extra field, before a record
ZIP, ZIP64 = b'PK\x03\x04', 1  # the first bytes; the kind of the extra field for large files
FIELD = struct.Struct('<HH')  # kind and size, before an extra field
# Signature, and size and offset of the directory, at the end of an archive and of a large one.
END, END_SIGNATURE = struct.Struct('<4s8xIIH'), b'PK\x05\x06'  # and the length of a comment
END64, END64_SIGNATURE = struct.Struct('<4s36xQQ'), b'PK\x06\x06'
LOCATOR, LOCATOR_SIGNATURE = struct.Struct('<8xQ4x'), b'PK\x06\x07'  # where a large one's end is
LEGACY_PICKLES = 5  # magic number, protocol, system, content and keys of storages

# The opcodes that torch's weights-only mode knows; it stops at any other.
APPEND, APPENDS, SETITEM, SETITEMS, BUILD = b'aesub'
MARK, TUPLE, TUPLE1, LONG1, EMPTY_TUPLE = b'(t\x85\x8a)'
REDUCE, NEWOBJ, BINPERSID, GLOBAL, STOP, PROTO = b'R\x81Qc.\x80'
PUTS, GETS = frozenset(b'qr'), frozenset(b'hj')
STRINGS = frozenset(b'XU\x8a')  # LONG1 has a length, as strings
CONSTANTS, EMPTY = frozenset(b'JKMNG\x88\x89)'), frozenset(b']}\x8f')
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
    # As torch decides it, by the first bytes: zipfile alone would accept anything in front.
    with Path(file).open('rb') as stream:
        is_zip = stream.read(len(ZIP)) == ZIP
    if not is_zip:
        if zipfile.is_zipfile(file):
            raise UnsafeStructureError('a zip archive behind other content')
        with suppress(tarfile.TarError), tarfile.open(file, 'r:'):  # torch tries that, too.
            raise UnsafeStructureError('a tar archive')
        return []
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    _check_end(file)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UnsafeStructureError('compressed records')
    for entry in entries:
        # Of torch's own records: no other name, offset or size than in the directory itself.
        if entry.orig_filename != entry.filename or _fields(entry.extra) not in ([], [ZIP64]):
            raise UnsafeStructureError('records with more than torch notes of them')
        if entry.compress_size != entry.file_size:
            raise UnsafeStructureError('records of two sizes')
    if sum(entry.file_size for entry in entries) > information.st_size:
        raise UnsafeStructureError('records that are larger than the file')
    # torch finds records without regard to case.
    if len({entry.filename.lower() for entry in entries}) < len(entries):
        raise UnsafeStructureError('several records of one name')
    return entries


def _fields(extra: bytes) -> list[int]:
    """The kinds of the extra fields of a record."""
    kinds, at = [], 0
    while at < len(extra):
        kind, size = FIELD.unpack(extra[at : at + FIELD.size].ljust(FIELD.size, b'\0'))
        kinds.append(kind)
        at += FIELD.size + size
    return kinds


def _check_end(file: str | Path) -> None:
    """Check that there is one way to find the directory of an archive: nothing before, nothing between.

    Python takes what lies in front of an archive into account, and torch does not.

    Raises:
        UnsafeStructureError: There are several.
    """
    with _mapped(file) as content:
        at = len(content) - END.size
        signature, size, offset, comment = END.unpack(content[at:])
        locator = at - LOCATOR.size
        if content[locator : locator + 4] == LOCATOR_SIGNATURE:
            at = locator - END64.size
            (begins,) = LOCATOR.unpack(content[locator : locator + LOCATOR.size])
            signature64, size, offset = END64.unpack(content[at:locator])
            if begins != at or signature64 != END64_SIGNATURE:
                raise UnsafeStructureError('an archive with several ends')
        if signature != END_SIGNATURE or comment or offset + size != at:
            raise UnsafeStructureError('an archive whose directory is not where its end says')


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
            if PurePosixPath(entry.filename.lower()).name == 'data.pkl':
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


# What makes tensors of the files that torch writes of a model: the others, for quantized, sparse, nested
# and other tensors, believe what a file says of sizes, and read memory that is not theirs.
REBUILDS = frozenset(
    f'torch._utils._rebuild_{what}'
    for what in ('tensor', 'tensor_v2', 'tensor_v3', 'parameter', 'parameter_with_state')
)
FROM_TYPE = 'torch._tensor._rebuild_from_type_v2'  # It calls its first argument.


def _check_global(name: str) -> str:
    """Refuse a function that rebuilds what no checkpoint of a model holds; else its name."""
    if name.startswith('torch.') and '._rebuild_' in name and name not in {*REBUILDS, FROM_TYPE}:
        raise pickle.UnpicklingError(f'{name} is not allowed in a checkpoint')
    return name


def _may_call(called: str, arguments: _Object) -> bool:
    """Whether a global may be called: not where arguments can say how much memory it takes."""
    if called.endswith('bytearray'):
        return arguments.kind == 'texts'
    if called == FROM_TYPE:
        return arguments.first in REBUILDS
    return not called.endswith(('Tensor', 'Storage'))


class _Object:
    """What is known of an object that a pickle would build.

    Attributes:
        elements: Of the object and all inside of it, counted as often as a walk meets them.
        depth: Levels inside of each other.
        kind: ``'text'``, ``'texts'`` (a tuple of nothing else), or the name of a global.
        first: The kind of the first object of a tuple.
        is_used: Whether it is inside of another.
    """

    __slots__ = ('depth', 'elements', 'first', 'is_used', 'kind')

    def __init__(self, kind: str = '', elements: int = 1, depth: int = 0) -> None:
        self.kind, self.elements, self.depth, self.is_used = kind, elements, depth, False
        self.first = ''

    def add(self, parts: list[_Object]) -> None:
        """Put objects into this one."""
        for part in parts:
            self.elements += part.elements
            if part.depth >= self.depth:
                self.depth = part.depth + 1
            if self.kind == 'texts' and part.kind != 'text':
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
    text, no_texts, other = _Object('text'), _Object('texts'), _Object()
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
            if code in CONSTANTS:
                stack.append(no_texts if code == EMPTY_TUPLE else other)
                continue
            if code in STRINGS:
                at += argument
                stack.append(other if code == LONG1 else text)
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
                built = _Object('texts')
                built.first = parts[0].kind if parts else ''
                built.add(parts)
                stack[first:] = [built]
                total += built.elements
            elif code in FILLS:
                first = marks.pop() if code in (APPENDS, SETITEMS) else len(stack) - FILLS[code]
                parts, container = stack[first:], stack[first - 1]
                del stack[first:]
                if first < 1 or container in (text, no_texts, other):
                    raise IndexError
                if container.is_used:
                    raise UnsafeStructureError('lists that grow where they are used')
                container.add(parts)
                total = max(total, container.elements)
            elif code in (REDUCE, NEWOBJ):
                arguments, called = stack.pop(), stack[-1].kind
                if not _may_call(called, arguments):
                    raise UnsafeStructureError(f'a call of {called}')
                # Bytes are pickled as a text and its encoding.
                kind = 'text' if called == '_codecs.encode' and arguments.kind == 'texts' else ''
                stack[-1] = _Object(kind, arguments.elements, arguments.depth)
            elif code == BINPERSID:
                stack[-1] = other
            elif code == GLOBAL:
                module = data.find(b'\n', at)
                end = data.find(b'\n', module + 1)
                if module < 0 or end < 0:
                    raise IndexError
                stack.append(_Object(_check_global(data[at:end].decode().replace('\n', '.'))))
                at = end + 1
            elif code == STOP:
                return at
            elif code != PROTO:
                raise pickle.UnpicklingError(f'opcode {code}')
            if total > limit:
                raise UnsafeStructureError('objects inside of each other without end')
    except (IndexError, KeyError, MemoryError, OverflowError) as error:
        raise ValueError(f'the pickle is damaged ({type(error).__name__})') from error
