"""Go on where a log cannot be written."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...registry import HOOKS


@HOOKS.register_module()
class LogErrorsHook(Hook):
    """Go on where a line of the log, a scalar or a picture cannot be written, as on a full disk.

    The first error is logged; the run ends only where a checkpoint cannot be written.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._is_said = False

    def before_run(self, runner: Runner) -> None:
        """Guard the log and what the visualizer writes."""
        # Not the runner: loggers and visualizers live on, and would keep its model and process group.
        logger = runner.logger
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                guarded: Any = functools.partial(self._handle_error, logger, handler.handleError)
                handler.handleError = guarded  # type: ignore[method-assign]
        for backend in runner.visualizer._vis_backends.values():
            for name in ('add_image', 'add_scalar', 'add_scalars'):
                setattr(backend, name, self._guard(logger, getattr(backend, name)))

    def _handle_error(
        self,
        logger: logging.Logger,
        default: Callable[[logging.LogRecord], None],
        record: logging.LogRecord,
    ) -> None:
        """What logging calls in place of raising an error."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._say(logger, error)
        else:
            default(record)

    def _guard(self, logger: logging.Logger, write: Callable) -> Callable:
        @functools.wraps(write)
        def guarded(*arguments: object, **named: object) -> None:
            try:
                write(*arguments, **named)
            except OSError as error:
                self._say(logger, error)

        return guarded

    def _say(self, logger: logging.Logger, error: OSError) -> None:
        if not self._is_said:
            self._is_said = True
            logger.warning(
                f'The log cannot be written ({error}). Training goes on; lines, scalars and pictures '
                'are lost until it can be written again. Free some space before a checkpoint is due.'
            )
