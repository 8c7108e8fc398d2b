"""Checkpoint files: atomic writing, and the latest valid one of a work folder."""

from __future__ import annotations

import json
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
RUN_FILE = 'run.json'  # what the run of a work folder is; RunRecordHook writes it


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


def read_run_file(folder: str | Path) -> dict:
    """What the run of a work folder is; empty if it does not say, or not so that it can be read."""
    path = Path(folder, RUN_FILE)
    try:
        run = json.loads(path.read_text())
        if not isinstance(run, dict):
            raise ValueError(f'expected an object, found {type(run).__name__}')
        return run
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        print_log(f'{path} is ignored: {error}'[:300], *WARN)
        return {}


def run_checkpoints(folder: str | Path) -> list[Path]:
    """The numbered checkpoints of a work folder, and of the folder that its run writes them to."""
    found = {path for pattern in NUMBERED for path in Path(folder).glob(pattern)}
    place = read_run_file(folder).get('checkpoints')
    if isinstance(place, dict):
        try:
            names = Path(str(place.get('pattern'))).name
            found |= set(Path(folder, str(place.get('folder'))).glob(names))
        except (OSError, ValueError, NotImplementedError) as error:
            print_log(f'checkpoints in {Path(folder, RUN_FILE)} is ignored: {error}'[:300], *WARN)
    return sorted(found)


def newest_valid_checkpoint(folder: str | Path) -> str | None:
    """The valid checkpoint of a work folder's run with the most iterations.

    ``last_checkpoint`` does not decide: it is outdated if a run died right after writing a
    checkpoint, and the folder may have been moved or copied. Its path is used only if there is no
    other. Checkpoints of another run than ``run.json`` names do not count.

    Args:
        folder: The work folder of a run.

    Returns:
        Its path; None if there is no checkpoint, valid or not.

    Raises:
        UnsafeCheckpointError: One of them, however old, needs code to be run to be read: that is
            no damage, and what put it there should be found.
        ValueError: There are checkpoints, but none can be used.
    """
    folder = Path(folder)
    candidates = set(run_checkpoints(folder))
    candidates |= set(_named_as_last(folder / 'last_checkpoint', bool(candidates)))
    run = read_run_file(folder).get('id')
    problems, iterations = {}, {}
    for path in candidates:
        try:
            progress, belongs_to = _progress_and_run(path)
            if run is not None and belongs_to not in (run, None):
                print_log(f'{path} is of another run, and is not resumed from', *WARN)
            else:
                iterations[path] = progress
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


def _progress_and_run(path: Path) -> tuple[tuple[int, int], str | None]:
    """Iterations and epochs at which a checkpoint was saved, and the run's identity, if it has one.

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
    run = meta.get('run')
    return progress, run.get('id') if isinstance(run, dict) else None
