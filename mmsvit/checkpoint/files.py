"""Checkpoint files: atomic writing, and the latest valid one of a work folder."""

from __future__ import annotations

import logging
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
from mmengine.fileio import LocalBackend
from mmengine.logging import print_log

from .archive import check_structure
from .reading import UnsafeCheckpointError, read_checkpoint
from .safe_globals import allow_runner_checkpoints

PARTIAL = '.partial'  # suffix while a file is being written
MAX_ITERATIONS = 10**12
WARN = ('current', logging.WARNING)
NUMBERED = ('epoch_*.pth', 'iter_*.pth')  # not best_*.pth, which have no optimizer state


class AtomicLocalBackend(LocalBackend):
    """MMEngine's access to local files, with atomic writing."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file completely, or leave the old one as it was.

        Raises:
            OSError: It cannot be written, for example because the disk is full.
        """
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: two runs may write into one folder.
        partial = path.with_name(f'{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}')
        try:
            with partial.open('xb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OSError(
                error.errno,
                f'cannot write {str(path)!r} ({len(obj):,} bytes): {error.strerror}. Nothing was '
                'replaced; free some space, then continue with --resume',
            ) from error
        _sync_folder(path.parent)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Write a text file; see :meth:`put`."""
        self.put(obj.encode(encoding), filepath)


def _sync_folder(folder: Path) -> None:
    """Make a new file name survive a power failure, where the file system supports it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # Some network file systems refuse; they sync by themselves.
    finally:
        os.close(descriptor)


def try_writing(folder: str | Path) -> None:
    """Create a folder if needed, and write a temporary file into it.

    Raises:
        OSError: It cannot be done.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b'\0' * 4096)


def check_writable(folder: str | Path) -> None:
    """Refuse a work folder that cannot be written to.

    Raises:
        OSError: It cannot; the message says why.
    """
    try:
        try_writing(folder)
    except OSError as error:
        raise OSError(
            error.errno,
            f'cannot write to the folder {str(folder)!r}: {error.strerror}. Logs and checkpoints '
            'go there; choose another with --work-dir',
        ) from error


def newest_valid_checkpoint(folder: str | Path) -> str | None:
    """The valid checkpoint of a work folder with the most iterations.

    ``last_checkpoint`` does not decide: it is outdated if a run died right after writing a
    checkpoint, and the folder may have been moved or copied. Its path is used only if the folder
    itself has no checkpoint, as with ``out_dir`` of the checkpoint hook.

    Args:
        folder: Where a runner left ``epoch_*.pth`` or ``iter_*.pth``.

    Returns:
        Its path; None if there is no checkpoint, valid or not.

    Raises:
        UnsafeCheckpointError: One of them, however old, needs code to be run to be read: that is
            no damage, and what put it there should be found.
        ValueError: There are checkpoints, but none can be used.
    """
    folder = Path(folder)
    candidates = {path for pattern in NUMBERED for path in folder.glob(pattern)}
    candidates |= set(_named_as_last(folder / 'last_checkpoint', bool(candidates)))
    problems, iterations = {}, {}
    for path in candidates:
        try:
            iterations[path] = _progress(path)
        except UnsafeCheckpointError as error:
            raise UnsafeCheckpointError(
                f'{error} Training saves such a file only if a hook of your own puts objects into '
                f'it. To resume from an older checkpoint, move it out of {str(folder)!r}.'
            ) from error
        except Exception as error:  # Damage shows in about any way.
            problems[path] = f'{type(error).__name__}: {error}'.splitlines()[0]
    for path in sorted(iterations, key=iterations.__getitem__, reverse=True):
        try:
            read_checkpoint(path)
        except ValueError as error:
            problems[path] = str(error)
            continue
        for broken, problem in problems.items():
            print_log(f'{broken} cannot be used: {problem}', *WARN)
        if problems:
            print_log(f'Resuming from {path}, the latest valid one.', *WARN)
        return str(path)
    if problems:
        raise ValueError(
            'no valid checkpoint to resume from:\n  '
            + '\n  '.join(f'{path}: {problem}' for path, problem in problems.items())
            + '\nRemove them (and last_checkpoint) to start a new run, or name another with '
            '--resume CHECKPOINT.'
        )
    return None


def _named_as_last(file: Path, has_others: bool) -> Iterator[Path]:
    """The checkpoint that ``last_checkpoint`` names, if it can be used; the log says if not."""
    try:
        text = file.read_text().strip()
        if not text:
            return
        last = Path(text)
        here = file.with_name(last.name)
        if here.is_file():
            yield here
        elif has_others:
            print_log(f'{last}, the last checkpoint, is not in {file.parent}', *WARN)
        else:
            print_log(f'{file} leads to {last}', *WARN)
            yield last
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # No text, a name that is too long, no file.
        print_log(f'{file} is ignored: it names no file ({error})'[:300], *WARN)


def _progress(path: Path) -> tuple[int, int]:
    """Iterations and epochs at which a checkpoint was saved.

    Raises:
        ValueError: They are not said, or cannot be.
    """
    allow_runner_checkpoints()
    try:
        check_structure(path)
        # Memory-mapped: only the metadata is read.
        meta = torch.load(path, map_location='cpu', weights_only=True, mmap=True)['meta']
    except Exception:  # read_checkpoint knows more formats, or says what is wrong.
        meta = read_checkpoint(path)['meta']
    progress = meta.get('iter'), meta.get('epoch')
    if not all(type(done) is int and 0 <= done <= MAX_ITERATIONS for done in progress):
        raise ValueError(f'meta.iter and meta.epoch must be whole numbers, found {progress}'[:200])
    return progress
