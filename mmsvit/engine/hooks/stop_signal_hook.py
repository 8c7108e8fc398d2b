"""Save a checkpoint and stop on a signal."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...registry import HOOKS
from .non_finite_hook import in_accumulation
from .safe_checkpoint_hook import SafeCheckpointHook

# Seconds within which a signal is the same as before: torchrun passes on what all processes have got.
REPEATED = 2.0


class LeaveSignalsToMain:
    """Start a data worker that ignores signals to its process group.

    A signal that its main process sends, after the checkpoint, still ends it, and so does the end of
    its main process, whatever the worker is waiting for.

    Args:
        signals: Numbers of the signals.
        init: The data loader's own ``worker_init_fn``.
    """

    def __init__(self, signals: Sequence[int], init: Callable[[int], None] | None) -> None:
        self.signals, self.init = signals, init
        self.main = os.getpid()

    def __call__(self, worker_id: int) -> None:
        """Set up the worker."""
        # A signal that all threads block stays pending until one waits for it.
        signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)
        threading.Thread(target=self._wait, daemon=True).start()
        if self.init is not None:
            self.init(worker_id)

    def _wait(self) -> None:
        while os.getppid() == self.main:
            received = signal.sigtimedwait(self.signals, 1.0)
            if received is not None and received.si_pid == self.main:
                break
        os._exit(0)


@HOOKS.register_module()
class StopSignalHook(Hook):
    """Save a checkpoint and stop on a signal.

    The iteration is finished first, and with gradient accumulation the step. All ranks stop after
    the same iteration, whichever got the signal. The exit status is 128 plus the number of the
    signal, as shells report it: 143 for SIGTERM, 130 for SIGINT (Ctrl-C), 129 for SIGHUP (a closed
    terminal). A second Ctrl-C stops at once, and so does any second signal after two seconds, without a
    checkpoint, whatever the run is waiting for. Signals that are ignored when training starts, as
    under ``nohup``, stay ignored.

    A signal during evaluation stops at once if the weights have been saved, else after the next
    training iteration.

    Args:
        signals: Names of the signals, such as ``'SIGUSR1'``, which SLURM can send ahead of time.

    Raises:
        ValueError: There is no signal of that name.
    """

    priority = 'LOWEST'  # After all other work of an iteration.

    def __init__(self, signals: Sequence[str] = ('SIGTERM', 'SIGINT', 'SIGHUP')) -> None:
        unknown = [name for name in signals if not hasattr(signal, name)]
        if unknown:
            raise ValueError(f'unknown signals {unknown}, expected names such as SIGTERM')
        self.signals = [int(getattr(signal, name)) for name in signals]
        self._received = 0
        self._before: dict[int, Callable | int | None] = {}
        self._checkpoint_hook: SafeCheckpointHook | None = None
        self._wakeup: tuple[int, int] | None = None  # file descriptors: the one before, and ours

    def before_train(self, runner: Runner) -> None:
        """Install the signal handlers."""
        hooks = [hook for hook in runner.hooks if isinstance(hook, SafeCheckpointHook)]
        in_main = threading.current_thread() is threading.main_thread()
        if not hooks or not in_main:
            why = 'it has no mmsvit.SafeCheckpointHook' if in_main else 'not in the main thread'
            runner.logger.warning(f'Signals will stop this run without a checkpoint: {why}.')
            return
        self._checkpoint_hook = hooks[0]
        self.signals = [n for n in self.signals if signal.getsignal(n) is not signal.SIG_IGN]
        for number in self.signals:
            self._before[number] = signal.signal(number, self._receive)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self._wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False), writing
        threading.Thread(target=self._leave_at_second, args=(reading,), daemon=True).start()
        loaders = [runner.train_dataloader]
        if runner.val_loop is not None:
            loaders.append(runner.val_dataloader)
        for loader in loaders:
            loader.worker_init_fn = LeaveSignalsToMain(self.signals, loader.worker_init_fn)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def _leave_at_second(self, reading: int) -> None:
        """End the process at a second signal, from a thread: the main one may wait for ever."""
        first = None
        while received := os.read(reading, 1):
            number = received[0]
            if number not in self.signals:
                continue
            first = first or time.monotonic()
            ours = signal.getsignal(number) in (self._receive, signal.default_int_handler)
            if ours and time.monotonic() - first > REPEATED:
                name = signal.Signals(number).name
                os.write(2, f'second {name}: left without a checkpoint\n'.encode())
                os._exit(128 + number)
        os.close(reading)

    def _stop_watching(self) -> None:
        if self._wakeup is not None:
            before, ours = self._wakeup
            signal.set_wakeup_fd(before)
            os.close(ours)
            self._wakeup = None

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: object = None,
        outputs: dict | None = None,
    ) -> None:
        """Stop if any rank got a signal.

        Raises:
            SystemExit: With the exit status.
        """
        # No checkpoint holds accumulated gradients.
        if self._checkpoint_hook is None or in_accumulation(runner):
            return
        received = torch.tensor(self._received)
        all_reduce(received, 'max')
        if received:
            name = signal.Signals(int(received)).name
            runner.logger.warning(f'{name}: saving a checkpoint after {runner.iter + 1} iterations')
            self._checkpoint_hook.save_between(runner)
            self._leave(runner, int(received), self._checkpoint_hook.last_ckpt)

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: object = None,
        outputs: object = None,
    ) -> None:
        """Stop at once if the weights have been saved.

        Raises:
            SystemExit: With the exit status.
        """
        hook = self._checkpoint_hook
        if self._received and hook is not None and hook.saved_iter == runner.iter:
            self._leave(runner, self._received, hook.last_ckpt)

    def after_train(self, runner: Runner) -> None:
        """Restore the previous signal handlers."""
        self._stop_watching()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _leave(self, runner: Runner, number: int, checkpoint: str) -> None:
        runner.logger.warning(
            f'{signal.Signals(number).name}: saved {checkpoint} and stopped; continue with --resume'
        )
        self._stop_watching()
        raise SystemExit(128 + number)
