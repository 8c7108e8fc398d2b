"""Skip training samples that cannot be loaded."""

from __future__ import annotations

import logging
import zlib
from ctypes import c_int64
from multiprocessing import Array
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path

from mmengine.dataset import Compose
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from ...datasets.image_files import refuse_truncated
from ...datasets.quick_checks import built_datasets
from ...datasets.report import printable
from ...registry import HOOKS


class GuardedPipeline(Compose):
    """The transforms of a data set; skips samples on which one fails, up to a limit.

    Args:
        pipeline: The transforms.
        limit: How many different samples may be skipped.
        seen: Checksums of skipped samples, shared by all data workers; the first entry is
            their number.
        split: For messages.
    """

    def __init__(self, pipeline: Compose, limit: int, seen: SynchronizedArray, split: str) -> None:
        self.transforms = pipeline.transforms
        self.limit, self.seen, self.split = limit, seen, split

    def __call__(self, data: dict) -> dict | None:
        """Run the transforms; None makes MMEngine's data set take another sample.

        Raises:
            RuntimeError: A transform failed, and the limit has been reached.
        """
        # Before the transforms, which write into `data`.
        files = [data.get(key) for key in ('img_path', 'seg_map_path')]
        # All files: many decoders' errors do not name the one that failed.
        name = ', '.join(map(str, filter(None, files))) or str(data.get('sample_idx', 'unknown'))
        try:
            for file in files:
                if isinstance(file, (str, Path)) and '://' not in str(file):
                    refuse_truncated(file)
            return super().__call__(data)
        except Exception as error:  # Decoders and transforms raise anything.
            self._skip(name, error)
            return None

    def _skip(self, name: str, error: Exception) -> None:
        why = printable(f'{name}: {type(error).__name__}: {error}')
        if not self.limit:
            raise RuntimeError(f'a {self.split} sample cannot be loaded: {why}') from error
        key = zlib.crc32(name.encode())
        with self.seen.get_lock():
            number = self.seen[0]
            if key in self.seen[1 : number + 1]:
                return
            if number < self.limit:
                self.seen[0] = number + 1
                self.seen[number + 1] = key
        if number >= self.limit:
            raise RuntimeError(
                f'another {self.split} sample cannot be loaded, after {self.limit} were skipped, '
                f'the limit (default_hooks.bad_samples.max_skipped): {why}'
            ) from error
        print_log(
            f'{self.split} sample skipped, number {number + 1} of at most {self.limit}: {why}',
            'current',
            logging.WARNING,
        )


@HOOKS.register_module()
class BadSamplesHook(Hook):
    """Skip training samples that cannot be loaded, with a counted warning, up to a limit.

    A sample is skipped if its image is missing, unreadable or truncated, or if a transform fails;
    another random one replaces it. Evaluation skips nothing, as that would change its numbers: it
    stops and names the file.

    Args:
        max_skipped: How many different samples a rank and its data workers may skip; the next one
            ends the run. 0: the first one does.

    Raises:
        ValueError: ``max_skipped`` is negative.
    """

    priority = 'VERY_LOW'  # After hooks that look at the data sets or exchange pipelines.

    def __init__(self, max_skipped: int = 10) -> None:
        if max_skipped < 0:
            raise ValueError(f'max_skipped must be 0 or more, found {max_skipped}')
        self.max_skipped = max_skipped
        self.seen = Array(c_int64, max_skipped + 1)

    def before_train(self, runner: Runner) -> None:
        """Guard the validation data before the data workers start."""
        if runner.val_loop is not None:
            self._guard(runner.val_dataloader.dataset, 0, 'validation')

    def before_train_epoch(self, runner: Runner) -> None:
        """Guard the training data, with a pipeline that a hook may just have put in place."""
        self._guard(runner.train_dataloader.dataset, self.max_skipped, 'training')

    def before_test(self, runner: Runner) -> None:
        """Guard the test data, of which no sample is skipped."""
        self._guard(runner.test_dataloader.dataset, 0, 'test')

    def after_train(self, runner: Runner) -> None:
        """Report how many samples were skipped."""
        if self.seen[0]:
            runner.logger.warning(
                f'{self.seen[0]} training samples could not be loaded and were skipped.'
            )

    def _guard(self, dataset: object, limit: int, split: str) -> None:
        for part in built_datasets(dataset):
            if not isinstance(part.pipeline, GuardedPipeline):
                part.pipeline = GuardedPipeline(part.pipeline, limit, self.seen, split)
