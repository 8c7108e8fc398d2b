"""One run in a work folder, which knows itself when it is resumed."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, TypeVar

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import IterBasedTrainLoop, Runner

from ...checkpoint.files import RUN_FILE, AtomicLocalBackend, read_run_file, run_checkpoints
from ...registry import HOOKS
from ..run_record import compare, settings_of

T = TypeVar('T')
MAX_LISTED = 20


def _by_main_process(work: Callable[[], T]) -> T:
    """Let rank 0 do something, and give its result, or its refusal, to all ranks."""
    outcome: list = [None, None]
    if is_main_process():
        try:
            outcome[0] = work()
        except (OSError, ValueError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    result, refusal = outcome
    if refusal is not None:
        raise refusal
    return result


def _listed(lines: list[str]) -> str:
    more = [f'and {len(lines) - MAX_LISTED} more'] if len(lines) > MAX_LISTED else []
    # Some come from a file, which could hold a terminal's control characters.
    shown = [line.encode('unicode_escape').decode() for line in lines[:MAX_LISTED]]
    return '\n  '.join(['', *shown, *more])


@HOOKS.register_module()
class RunRecordHook(Hook):
    """Keep one run in a work folder, and compare a resumed run with what it was.

    - ``run.json`` in the work folder, and ``meta['run']`` of each checkpoint, say what the run is:
      an identity, its settings, data, ranks and versions (:func:`mmsvit.engine.run_record.settings_of`).
    - A resumed run names each setting that it changes, and refuses those that it would ignore or
      that would put its schedule out of step (``REFUSED`` in :mod:`mmsvit.engine.run_record`).
    - One process at a time trains in a folder; the lock goes with the process, however it ends.
    - A new run does not begin in a folder with checkpoints of another.
    - An evaluation that was due when the run was killed is made up for.

    Args:
        overwrite: Whether to begin, or go on, in a folder with checkpoints of another run.
        force_resume: Whether to go on although settings differ that cannot be changed.
    """

    priority = 'LOWEST'  # After CheckpointHook, and with the signal handlers of StopSignalHook.

    def __init__(self, overwrite: bool = False, force_resume: bool = False) -> None:
        self.overwrite, self.force_resume = overwrite, force_resume
        self._run: dict = {}
        self._lock: IO[str] | None = None

    def before_run(self, runner: Runner) -> None:
        """Lock the work folder.

        Raises:
            ValueError: Another process trains in it.
        """
        _by_main_process(lambda: self._take_lock(runner))

    def _take_lock(self, runner: Runner) -> None:
        path = Path(runner.work_dir, '.lock')
        path.parent.mkdir(parents=True, exist_ok=True)
        # Of POSIX: data workers do not inherit it, and no killed process leaves it behind.
        self._lock = lock = path.open('a+')
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            raise ValueError(
                f'another run is training in {runner.work_dir!r}: {lock.read(200).strip()}. '
                'End it first, or choose another folder with --work-dir'
            ) from None
        except OSError as error:
            runner.logger.warning(f'{path} cannot be locked ({error}): start one run at a time.')
            return
        lock.truncate(0)
        lock.write(f'process {os.getpid()} on {os.uname().nodename}, since {time.ctime()}')
        lock.flush()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare the settings of the resumed run, and take over its identity.

        Raises:
            ValueError: The config has other settings, with which the run cannot be resumed.
        """
        if not runner._resume:
            return
        meta = checkpoint['meta']
        old = meta.get('run') if isinstance(meta, dict) else None
        if not isinstance(old, dict) or not isinstance(old.get('settings'), dict):
            runner.logger.info(
                'The checkpoint has no record of its run: settings are not compared.'
            )
            return
        self._run = dict(id=str(old.get('id')), begun=str(old.get('begun')))
        before = {str(key): str(value) for key, value in old['settings'].items()}
        refused, used = compare(before, settings_of(runner))
        if refused and not self.force_resume:
            raise ValueError(
                f'{runner._load_from} cannot be continued with other settings of its optimizer, '
                'schedule or steps, whose state it brings back:'
                f'{_listed(refused)}\nSet them as they were; or start a new run from its weights '
                f'(--cfg-options load_from={runner._load_from}, without --resume); or go on '
                'nevertheless with --force-resume (default_hooks.run_record.force_resume=True)'
            )
        if refused:
            runner.logger.warning(f'The state of the checkpoint is used despite:{_listed(refused)}')
        if used:
            runner.logger.warning(f'The run continues with changed settings:{_listed(used)}')
        self._restore_best(runner, checkpoint)

    def _restore_best(self, runner: Runner, checkpoint: dict) -> None:
        """The best result is known after the evaluation, which follows the checkpoint."""
        done = checkpoint['meta'].get('iter')
        best = _by_main_process(lambda: self._evaluations(runner).get(str(done), {}))
        info = (checkpoint.get('message_hub') or {}).get('runtime_info')
        if isinstance(info, dict):
            info.update(best)

    def _evaluations(self, runner: Runner) -> dict[str, dict[str, float | str]]:
        """What was best after each evaluation of this run in this folder, by its iterations."""
        stored = read_run_file(runner.work_dir)
        if stored.get('id') != self._run.get('id') or not isinstance(stored.get('evaluated'), dict):
            return {}
        return {
            done: {
                key: value
                for key, value in best.items()
                if key.startswith(('best_score', 'best_ckpt')) and isinstance(value, (float, str))
            }
            for done, best in stored['evaluated'].items()
            if isinstance(best, dict)
        }

    def before_train(self, runner: Runner) -> None:
        """Write ``run.json``, and make the evaluation that is due if the run was killed in it.

        Raises:
            ValueError: The folder holds checkpoints of another run.
        """
        new = dict(id=uuid.uuid4().hex, begun=time.strftime('%Y-%m-%d %H:%M:%S'))
        self._run = _by_main_process(lambda: self._begin(runner, {**new, **self._run}))
        done = str(runner.iter)
        if runner._resume and self._is_due(runner) and done not in self._run['evaluated']:
            runner.logger.warning(f'The evaluation after {done} iterations is missing: it is made.')
            runner.val_loop.run()

    def _begin(self, runner: Runner, run: dict) -> dict:
        hook = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
        if hook is None:
            raise ValueError(
                'default_hooks.checkpoint is None, and mmsvit records runs with their checkpoints: '
                'leave the hook, with an interval beyond the end if nothing is to be saved, or set '
                'default_hooks.run_record=None too'
            )
        names = re.sub(r'\{[^}]*\}', '*', hook.filename_tmpl)
        mine = read_run_file(runner.work_dir).get('id') in (run['id'], None)
        found = {path for name in (names, 'best_*.pth') for path in Path(hook.out_dir).glob(name)}
        found |= set(run_checkpoints(runner.work_dir))
        others = [] if mine and runner._resume else sorted(found)
        if others and not self.overwrite:
            raise ValueError(
                f'{runner.work_dir!r} holds checkpoints of another run, such as {others[0].name}. '
                'Continue that run with --resume; or choose another folder with --work-dir; or '
                'let this run replace them, name by name, with --overwrite '
                '(default_hooks.run_record.overwrite=True)'
            )
        self._run = run
        evaluated = self._evaluations(runner)
        record = dict(
            **run,
            settings=settings_of(runner),
            checkpoints=dict(folder=self._place(runner, hook), pattern=names),
            evaluated=evaluated,
        )
        self._write(runner, record)
        return record

    def _place(self, runner: Runner, hook: CheckpointHook) -> str:
        """The folder of the checkpoints; as seen from the work folder, which may move, if in it."""
        folder, work_dir = Path(hook.out_dir).resolve(), Path(runner.work_dir).resolve()
        inside = folder.is_relative_to(work_dir)
        return str(folder.relative_to(work_dir) if inside else folder)

    def _write(self, runner: Runner, record: dict) -> None:
        AtomicLocalBackend().put_text(json.dumps(record, indent=1), Path(runner.work_dir, RUN_FILE))

    def _is_due(self, runner: Runner) -> bool:
        """Whether the training loop evaluates at the present iteration, as MMEngine's do."""
        loop = runner.train_loop
        if runner.val_loop is None or not hasattr(loop, 'val_interval'):
            return False
        by_epoch = not isinstance(loop, IterBasedTrainLoop)
        done, end = (loop.epoch, loop.max_epochs) if by_epoch else (loop.iter, loop.max_iters)
        if by_epoch and runner.iter != done * len(loop.dataloader):
            return False  # in the middle of an epoch
        due = done % loop.val_interval == 0 or done == end
        return done > 0 and done >= loop.val_begin and due

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Note what is evaluated."""
        if not self._run or not is_main_process():
            return
        info = runner.message_hub.runtime_info
        best = {key: info[key] for key in info if key.startswith(('best_score', 'best_ckpt'))}
        done = self._run.setdefault('evaluated', {})
        done[str(runner.iter)] = {
            key: value if isinstance(value, str) else float(value) for key, value in best.items()
        }
        try:
            self._write(runner, self._run)
        except OSError as error:  # A full disk is fatal when a checkpoint is due.
            runner.logger.warning(f'{error.strerror}: a resumed run would repeat this evaluation.')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Store what the run is."""
        if self._run:
            record = {key: self._run[key] for key in ('id', 'begun', 'settings')}
            checkpoint['meta']['run'] = record

    def after_run(self, runner: Runner) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
