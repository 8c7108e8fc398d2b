"""Checkpoints that survive crashes, and automatic resumption from the latest valid one.

MMEngine's ``CheckpointHook`` removes the oldest checkpoint (and the previous best), then writes the
new one and ``last_checkpoint`` in place. A run that dies in between leaves an incomplete file, or
none. This hook writes the new file completely, then updates ``last_checkpoint``, and only then
removes an old file.
"""

from __future__ import annotations

import re
from pathlib import Path

from mmengine.dist import (
    all_gather_object,
    broadcast,
    broadcast_object_list,
    is_distributed,
    is_main_process,
)
from mmengine.evaluator import Evaluator
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.runner import Runner

from ...checkpoint.files import AtomicLocalBackend, check_writable, newest_valid_checkpoint
from ...registry import HOOKS
from .non_finite_hook import first_non_finite


def _check_agreement(runner: Runner) -> None:
    """Compare what the ranks start from; by file name, as folders may differ between machines."""
    source = runner._load_from
    if source is None:
        start = 'resumes' if runner._resume else 'starts from scratch'
    elif '://' not in source and not Path(source).expanduser().exists():
        start = f'does not find {source!r}'
    else:
        start = f'{"resumes from" if runner._resume else "starts from"} {Path(source).name!r}'
    starts = all_gather_object(start)
    if len(set(starts)) > 1:
        raise RuntimeError(
            'ranks disagree on the checkpoint to resume from: '
            + ', '.join(f'rank {rank} {one}' for rank, one in enumerate(starts))
            + '. Put the work folder where all machines see it, or copy the checkpoint to each.'
        )


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """MMEngine's ``CheckpointHook``, with the same arguments, for runs that may die at any time.

    - Local files are written atomically (:class:`AtomicLocalBackend`, for all that this process
      writes through MMEngine).
    - Files that ``max_keep_ckpts`` or a better result replaces are removed afterwards.
    - Automatic resumption uses the latest valid checkpoint, read in torch's weights-only mode.
    - Weights that are not finite are never saved.
    - Ranks that have batch norm statistics of their own all evaluate those that are saved, which
      are rank 0's, as in torch's ``DistributedDataParallel``.
    """

    saved_iter: int | None = None  # iterations done at the last checkpoint of this process

    def before_run(self, runner: Runner) -> None:
        """Choose the checkpoint to resume from.

        Raises:
            UnsafeCheckpointError, ValueError: See :func:`newest_valid_checkpoint`.
            RuntimeError: The ranks of a distributed run disagree on the checkpoint.
        """
        if runner._resume is True and runner._load_from is None:
            found: list[str | None] = [None]
            if is_main_process():
                found[0] = newest_valid_checkpoint(runner.work_dir)
            broadcast_object_list(found)
            if found[0] is None:
                runner.logger.warning(
                    f'There is no checkpoint in {runner.work_dir}: a new run starts.'
                )
            runner._load_from, runner._resume = found[0], found[0] is not None
        _check_agreement(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Drop names of files to remove later that are not names of checkpoints."""
        hub = checkpoint.get('message_hub')
        info = hub.get('runtime_info') if isinstance(hub, dict) else None
        if not isinstance(info, dict):
            return
        between, ids = info.get('checkpoint_between'), info.get('keep_ckpt_ids')
        valid = {
            'checkpoint_between': re.fullmatch(r'iter_\d+\.pth', str(between)),
            'keep_ckpt_ids': isinstance(ids, list) and all(type(i) is int for i in ids),
        }
        for key in valid:
            if info.get(key) is not None and not valid[key]:
                found = info.pop(key)
                runner.logger.warning(
                    f'{key} of the checkpoint is ignored: it names no checkpoint, found {found!r:.100}'
                )

    def before_train(self, runner: Runner) -> None:
        """Set up atomic writing, and check that the folder is writable.

        Raises:
            OSError: It is not.
        """
        register_backend('local', AtomicLocalBackend, force=True, prefixes='')
        super().before_train(runner)
        if runner._resume:  # A signal in a first evaluation can end the run at once.
            self.saved_iter, self.last_ckpt = runner.iter, runner._load_from
        self._check_save_best(runner)
        if self.save_best:  # Of the resumed run: only files of this folder count.
            self._set_best_paths({k: self._own(path) for k, path in self._best_paths().items()})
        if is_main_process() and isinstance(self.file_backend, LocalBackend):
            check_writable(self.out_dir)

    def _check_save_best(self, runner: Runner) -> None:
        """Refuse a metric whose prefix none of the evaluator's metrics has."""
        if not self.save_best or runner.val_loop is None:
            return
        evaluator = runner.val_loop.evaluator
        prefixes = [metric.prefix for metric in evaluator.metrics]
        if type(evaluator) is not Evaluator or not all(prefixes):
            return
        for key in self.key_indicators:
            if key != 'auto' and not key.startswith(tuple(f'{prefix}/' for prefix in prefixes)):
                raise ValueError(
                    f'default_hooks.checkpoint.save_best={key!r} names no metric of '
                    f'val_evaluator; its metrics begin with {", ".join(map("{}/".format, prefixes))}'
                )

    def before_val(self, runner: Runner) -> None:
        """Let all ranks evaluate what is saved, with the batch norm statistics of rank 0.

        MMEngine's ``SyncBuffersHook`` averages them, after epochs alone, and a run that a signal
        stops in between would resume with others.
        """
        if not is_distributed():
            return
        averages = [hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook)]
        for model in (runner.model, *averages):
            for buffer in model.buffers():
                broadcast(buffer)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse to save weights that are not finite.

        Raises:
            FloatingPointError: They are not finite.
        """
        name = first_non_finite(runner.model)
        if name is not None:
            raise FloatingPointError(
                f'{name} is not finite after {checkpoint["meta"]["iter"]} iterations: nothing is '
                f'saved. The last good checkpoint is {self.last_ckpt or "from an earlier run, if any"}'
            )

    def save_between(self, runner: Runner) -> None:
        """Save ``iter_*.pth`` after any iteration; the next checkpoint replaces it."""
        done = runner.iter + 1
        if self.saved_iter == done:
            return
        name = f'iter_{done}.pth'
        superfluous = self._forget_between(runner)
        # Without the folder: a run resumed in another folder must not remove this file.
        runner.message_hub.update_info('checkpoint_between', name)
        self._save(runner, name, dict(epoch=runner.epoch, iter=done), by_epoch=False)
        self._remove(superfluous - {name})

    def _forget_between(self, runner: Runner) -> set[str]:
        """The name of the checkpoint that the next one replaces, if any."""
        return {runner.message_hub.pop_info('checkpoint_between')} - {None}

    def _save(self, runner: Runner, name: str, meta: dict, by_epoch: bool) -> None:
        path = self.file_backend.join_path(self.out_dir, name)
        saved_iter = meta['iter']  # The runner changes `meta`.
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
            # Maybe one too many: a run that dies before removing it does so once resumed.
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
        unknown = [key for key in self.key_indicators if key not in (*metrics, 'auto')]
        if unknown:
            raise ValueError(
                f'default_hooks.checkpoint.save_best={unknown[0]!r} names no metric of this '
                f'evaluation, which has {sorted(metrics)}'
            )
        # The base class removes the previous best before it saves the next: hide it.
        previous = self._best_paths()
        self._set_best_paths(dict.fromkeys(previous))
        super()._save_best_checkpoint(runner, metrics)
        current = self._best_paths()
        self._set_best_paths({key: path or previous.get(key) for key, path in current.items()})
        superfluous = [previous.get(key) for key, path in current.items() if path]
        self._remove({Path(path).name for path in superfluous if path})

    def _best_paths(self) -> dict[str, str | None]:
        if len(self.key_indicators) == 1:
            return {'': self.best_ckpt_path}
        return dict(self.best_ckpt_path_dict)

    def _own(self, path: object) -> str | None:
        """The file of that name in this run's folder, if any."""
        if not isinstance(path, str) or '\0' in path:
            return None
        own = self.file_backend.join_path(self.out_dir, Path(path).name)
        return own if self.file_backend.exists(own) else None

    def _set_best_paths(self, paths: dict[str, str | None]) -> None:
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = paths['']
        else:
            self.best_ckpt_path_dict = paths

    def _remove(self, names: set[str]) -> None:
        """Remove checkpoints from this run's folder."""
        if not is_main_process():
            return
        for name in names:
            path = self.file_backend.join_path(self.out_dir, name)
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif self.file_backend.isdir(path):  # as DeepSpeed saves them
                self.file_backend.rmtree(path)
