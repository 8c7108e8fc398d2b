"""Checkpoints that a crash cannot break, and finding the newest one that is whole.

MMEngine's ``CheckpointHook`` writes a checkpoint in place, removes the one that falls out of
``max_keep_ckpts`` (and the previous best) before it writes the new one, and names the new one
in ``last_checkpoint``, in place as well: a run that dies in between leaves half a file, or
none. Here a file gets its name when it is whole and on the disk, ``last_checkpoint`` follows,
and only then is something removed.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import torch
from mmengine.dist import all_gather_object, broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import nn

from .checkpoint import UnsafeCheckpointError, allow_runner_checkpoints, read_checkpoint
from .registry import HOOKS

PARTIAL = '.partial'  # suffix of what is not whole yet
NUMBERED = ('epoch_*.pth', 'iter_*.pth')  # not best_*.pth, which have no optimizer state


class AtomicLocalBackend(LocalBackend):
    """MMEngine's access to local files; writing, it replaces a file as a whole or not at all."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file.

        Raises:
            OSError: It cannot be written, as on a full disk; what was there before is still
                there.
        """
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + PARTIAL)
        try:
            with partial.open('wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OSError(
                error.errno,
                f'cannot write {str(path)!r} ({len(obj):,} bytes): {error.strerror}. Nothing was '
                'replaced; make room, then go on from the last checkpoint with --resume',
            ) from error
        _sync_folder(path.parent)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Write a text file; see :meth:`put`."""
        self.put(obj.encode(encoding), filepath)


def _sync_folder(folder: Path) -> None:
    """Make a new name last through a power failure, where the file system knows how."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # Some network file systems refuse; they do it by themselves.
    finally:
        os.close(descriptor)


def try_writing(folder: str | Path) -> None:
    """Make a folder if need be, and write a file into it that is gone afterwards.

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


def newest_whole_checkpoint(folder: str | Path) -> str | None:
    """The checkpoint of a work folder that has most iterations, out of those that are whole.

    ``last_checkpoint`` does not decide: it is behind if a run died right after it wrote a
    checkpoint, and the folder may have been moved, or be a copy. The path in it counts only where
    the folder has no checkpoint itself, as with ``out_dir`` of the checkpoint hook.

    Args:
        folder: Where a runner left ``epoch_*.pth`` or ``iter_*.pth``.

    Returns:
        Its path; None if there is no checkpoint at all, whole or not.

    Raises:
        UnsafeCheckpointError: One of them, however old, needs code to be run to be read: that is
            no damage, and what put it there should be found.
        ValueError: There are checkpoints, but none can be used.
    """
    folder = Path(folder)
    candidates = {path for pattern in NUMBERED for path in folder.glob(pattern)}
    named = folder / 'last_checkpoint'
    if named.is_file() and named.read_text().strip():
        last = Path(named.read_text().strip())
        if (folder / last.name).is_file():
            candidates.add(folder / last.name)
        elif not candidates:
            print_log(f'{named} leads to {last}', 'current', logging.WARNING)
            candidates.add(last)
        else:
            print_log(
                f'{last}, the last checkpoint, is not in {folder}', 'current', logging.WARNING
            )
    problems, iterations = {}, {}
    for path in candidates:
        try:
            iterations[path] = _progress(path)
        except UnsafeCheckpointError as error:
            raise UnsafeCheckpointError(
                f'{error} Training saves such a file only if a hook of your own puts objects into '
                f'it. To go on from an older checkpoint, move it out of {str(folder)!r}.'
            ) from error
        except Exception as error:  # Damage shows in about any way.
            problems[path] = f'{type(error).__name__}: {error}'.splitlines()[0]
    for path in sorted(iterations, key=iterations.get, reverse=True):
        try:
            read_checkpoint(path)
        except ValueError as error:
            problems[path] = str(error)
            continue
        for broken, problem in problems.items():
            print_log(f'{broken} cannot be used: {problem}', 'current', logging.WARNING)
        if problems:
            print_log(f'Going on from {path}, the newest that can.', 'current', logging.WARNING)
        return str(path)
    if problems:
        raise ValueError(
            'there is no whole checkpoint to go on from:\n  '
            + '\n  '.join(f'{path}: {problem}' for path, problem in problems.items())
            + '\nRemove them (and last_checkpoint) to begin anew, or name another with '
            '--resume CHECKPOINT.'
        )
    return None


def _progress(path: Path) -> tuple[int, int]:
    """Iterations and epochs at which a checkpoint was saved."""
    allow_runner_checkpoints()
    try:
        # Mapped, not read: only the table of contents.
        meta = torch.load(path, map_location='cpu', weights_only=True, mmap=True)['meta']
    except Exception:  # Says what is wrong, or knows more formats.
        meta = read_checkpoint(path)['meta']
    return meta['iter'], meta['epoch']


def first_non_finite(model: nn.Module, statistics: bool = True) -> str | None:
    """Name of the first parameter, or running statistic, that is not finite."""
    values = list(model.named_parameters())
    if statistics:
        values += [(name, value) for name, value in model.named_buffers() if 'running_' in name]
    for name, value in values:
        if value.is_floating_point() and not torch.isfinite(value).all():
            return name
    return None


def _beginning(runner: Runner) -> str:
    """What a run goes on from, without the folder, which may be another on each machine."""
    source = runner._load_from
    if source is None:
        return 'goes on' if runner._resume else 'begins anew'
    if '://' not in source and not Path(source).expanduser().exists():
        return f'does not find {source!r}'
    return f'{"goes on from" if runner._resume else "begins with"} {Path(source).name!r}'


def _check_agreement(beginning: str) -> None:
    # A process that finds no checkpoint would otherwise train with others that do.
    seen = all_gather_object(beginning)
    if len(set(seen)) > 1:
        raise RuntimeError(
            'the processes do not begin at the same place: '
            + ', '.join(f'process {rank} {one}' for rank, one in enumerate(seen))
            + '. Put the work folder where all machines see it, or copy the checkpoint to each.'
        )


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """MMEngine's ``CheckpointHook``, with the same arguments, for runs that may die at any time.

    - A file of a local file system appears under its name when it is whole
      (:class:`AtomicLocalBackend`, for whatever this process writes through MMEngine).
    - What ``max_keep_ckpts`` or a better result makes superfluous is removed afterwards.
    - Automatic resumption takes the newest checkpoint that is whole, read in torch's
      weights-only mode.
    - Weights that are not finite are never saved.
    """

    saved_iter: int | None = None  # iterations done at the last checkpoint of this process

    def before_run(self, runner: Runner) -> None:
        """Choose what to go on from, where the run is to find that by itself.

        Raises:
            UnsafeCheckpointError, ValueError: See :func:`newest_whole_checkpoint`.
            RuntimeError: The processes of a distributed run would begin at different places.
        """
        if runner._resume is True and runner._load_from is None:
            found: list[str | None] = [None]
            if is_main_process():
                found[0] = newest_whole_checkpoint(runner.work_dir)
            broadcast_object_list(found)
            if found[0] is None:
                runner.logger.warning(
                    f'There is no checkpoint in {runner.work_dir} to go on from: a new run begins.'
                )
            runner._load_from, runner._resume = found[0], found[0] is not None
        _check_agreement(_beginning(runner))

    def before_train(self, runner: Runner) -> None:
        """Set everything up, and try whether the folder can be written to.

        Raises:
            OSError: It cannot.
        """
        register_backend('local', AtomicLocalBackend, force=True, prefixes='')
        super().before_train(runner)
        if is_main_process() and isinstance(self.file_backend, LocalBackend):
            check_writable(self.out_dir)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse to save weights that nobody can go on from.

        Raises:
            FloatingPointError: They are not finite.
        """
        name = first_non_finite(runner.model)
        if name is not None:
            raise FloatingPointError(
                f'{name} is not finite after {checkpoint["meta"]["iter"]} iterations: nothing is saved. The '
                f'last good checkpoint is {self.last_ckpt or "that of an earlier run, if any"}'
            )

    def save_between(self, runner: Runner) -> None:
        """Save a checkpoint ``iter_*.pth`` after an iteration, wherever in an epoch that is.

        The next checkpoint, regular or not, replaces it.
        """
        done = runner.iter + 1
        if self.saved_iter == done:
            return
        name = f'iter_{done}.pth'
        superfluous = self._forget_between(runner)
        # Without its folder: who goes on from it in another one must not remove it from this.
        runner.message_hub.update_info('checkpoint_between', name)
        self._save(runner, name, dict(epoch=runner.epoch, iter=done), by_epoch=False)
        self._remove(superfluous - {name})

    def _forget_between(self, runner: Runner) -> set[str]:
        """Name of the checkpoint that the next one replaces, if there is any."""
        return {runner.message_hub.pop_info('checkpoint_between')} - {None}

    def _save(self, runner: Runner, name: str, meta: dict, by_epoch: bool) -> None:
        path = self.file_backend.join_path(self.out_dir, name)
        # `meta` is filled up with what is not for the caller.
        saved_iter = meta['iter']
        runner.message_hub.update_info('last_ckpt', path)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        self.last_ckpt, self.saved_iter = path, saved_iter
        if is_main_process():
            AtomicLocalBackend().put_text(path, Path(runner.work_dir) / 'last_checkpoint')

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        name = self.filename_tmpl.format(step)
        superfluous = self._forget_between(runner)
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            ids = [*self.keep_ckpt_ids, step]
            # One too many, if need be: a run that dies before it removes that one does so later.
            runner.message_hub.update_info('keep_ckpt_ids', ids)
            self.keep_ckpt_ids.append(step)
            superfluous |= {
                self.filename_tmpl.format(old) for old in ids if old not in self.keep_ckpt_ids
            }
        self._save(runner, name, meta, self.by_epoch)
        self._remove(superfluous - {name})

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if not self.save_best:
            return
        # The base class removes the previous best before it saves the next: it is told of none.
        previous = self._best_paths()
        self._set_best_paths(dict.fromkeys(previous))
        super()._save_best_checkpoint(runner, metrics)
        current = self._best_paths()
        self._set_best_paths({key: path or previous.get(key) for key, path in current.items()})
        superfluous = {previous.get(key) for key, path in current.items() if path} - {None}
        self._remove({Path(path).name for path in superfluous})

    def _best_paths(self) -> dict[str, str | None]:
        if len(self.key_indicators) == 1:
            return {'': self.best_ckpt_path}
        return dict(self.best_ckpt_path_dict)

    def _set_best_paths(self, paths: dict[str, str | None]) -> None:
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = paths['']
        else:
            self.best_ckpt_path_dict = paths

    def _remove(self, names: set[str]) -> None:
        """Remove checkpoints of this run's own folder."""
        if not is_main_process():
            return
        for name in names:
            path = self.file_backend.join_path(self.out_dir, name)
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif self.file_backend.isdir(path):  # as DeepSpeed saves them
                self.file_backend.rmtree(path)
