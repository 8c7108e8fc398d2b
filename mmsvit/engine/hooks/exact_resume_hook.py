"""A resumed run gives the same results as an uninterrupted one.

MMEngine restores weights, optimizer, schedules and counters, but no random states: drop path,
sampled proposals and augmentation differ after resuming, and without a seed in the config also the
order of the data. Instead of saving the states of all ranks and data workers, we seed by position:
the model by ``(seed, rank, iteration, 0)``, a sample by ``(..., 1 + index in the batch)``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import torch
from mmengine.dist import broadcast_object_list, get_rank
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.data import BatchSampler, DataLoader, Sampler

from ...registry import HOOKS


def seed_everything(*position: int) -> None:
    """Seed Python, NumPy and torch (all devices) by a position in a run.

    All positions need the same length: NumPy pads them with zeros.
    """
    state = np.random.SeedSequence(position).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(state[1])
    torch.manual_seed(int(state[2]))


@dataclass
class SeededBatch:
    """Indices of a batch; iterating seeds the random generators for each sample.

    The data loader does so with ``[dataset[i] for i in batch]``, in a data worker or not.
    """

    indices: Sequence[int]
    position: tuple[int, ...]

    def __iter__(self) -> Iterator[int]:
        for place, index in enumerate(self.indices):
            seed_everything(*self.position, 1 + place)
            yield index

    def __len__(self) -> int:
        return len(self.indices)


class SeededBatchSampler:
    """Wrap a batch sampler: seed each batch, and start anywhere in a run.

    Args:
        sampler: Gives indices.
        batch_size: Samples in a batch.
        batch_sampler: Config of another batch sampler, such as MMDetection's for aspect ratios.
        drop_last: Whether to drop an incomplete last batch; ignored with ``batch_sampler``, which
            has its own setting.
        seed: The run's.
        done: Batches of the run that are done.
        skip: Batches to skip first.
        endless: Whether to continue with the next epoch after each.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch_size: int,
        batch_sampler: dict | None,
        drop_last: bool,
        seed: int,
        done: int,
        skip: int,
        endless: bool,
    ) -> None:
        self.sampler, self.batch_size = sampler, batch_size  # MMEngine reads both.
        if batch_sampler is None:
            self.batch_sampler = BatchSampler(sampler, batch_size, drop_last)
        else:
            self.batch_sampler = DATA_SAMPLERS.build(
                batch_sampler, default_args=dict(sampler=sampler, batch_size=batch_size)
            )
        self.seed, self.rank = seed, get_rank()
        self.number, self.skip, self.endless = done, skip, endless

    def __iter__(self) -> Iterator[SeededBatch]:
        batches = islice(self._epochs() if self.endless else self.batch_sampler, self.skip, None)
        self.skip = 0
        for batch in batches:
            position = (self.seed, self.rank, self.number)
            self.number += 1
            yield SeededBatch(batch, position)

    def _epochs(self) -> Iterator[list[int]]:
        for epoch in count():
            if hasattr(self.sampler, 'set_epoch'):
                self.sampler.set_epoch(epoch)
            empty = True
            for batch in self.batch_sampler:
                empty = False
                yield batch
            if empty:  # Otherwise this would loop for ever.
                raise RuntimeError(
                    f'{type(self.sampler).__name__} gives no samples: the training data are empty, '
                    'or an earlier loop over the data loader ended an endless sampler; build the '
                    'data loader again'
                )

    def __len__(self) -> int:
        return len(self.batch_sampler)


class EndlessBatches:
    """Batches for an iteration-based loop, from where the run is.

    Args:
        dataloader: One that never ends and has skipped the batches before.
        taken: How many batches the loop takes only to skip them, as OpenMMLab's MMEngine does;
            it gets None.
    """

    def __init__(self, dataloader: DataLoader, taken: int) -> None:
        self._dataloader, self._taken = dataloader, taken
        self._iterator: Iterator | None = None  # Workers start with it.

    def skip_iter(self, num_iters: int) -> None:
        """Do nothing: the newer MMEngine skips so, but the batches have been skipped."""

    def close(self) -> None:
        """Stop the data workers."""
        self._iterator = None

    def __next__(self) -> object:
        if self._taken > 0:
            self._taken -= 1
            return None
        if self._iterator is None:
            self._iterator = iter(self._dataloader)
        return next(self._iterator)


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Make all randomness depend only on the seed and the position in the run.

    Resuming from any checkpoint, also one from the middle of an epoch (:class:`.StopSignalHook`),
    then gives the same weights as an uninterrupted run on as many ranks and CPU threads, for any
    ``num_workers``. Not covered: state of a transform or module (earlier images in MMDetection's
    ``CachedMosaic``, generators of its own), and gradients accumulated when a checkpoint is saved
    in the middle of ``accumulative_counts``.
    """

    priority = 'VERY_HIGH'  # Other hooks change the data loader that this one builds.

    def __init__(self) -> None:
        self._seed = 0
        self._progress: tuple[int, int] = (0, 0)
        self._epoch_began_at: int | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Read how much of the epoch is done."""
        if runner._resume:
            self._progress = tuple(checkpoint['meta'].get('epoch_progress', (0, 0)))

    def before_train(self, runner: Runner) -> None:
        """Rebuild the data loader with the resumed seed, from where the run is."""
        shared = [runner.seed]
        broadcast_object_list(shared)  # They differ with diff_rank_seed.
        self._seed = shared[0]
        cfg, loop = runner.cfg.get('train_dataloader'), runner.train_loop
        if not isinstance(cfg, dict):
            runner.logger.warning(
                'The training data loader was not built from a config: the order and augmentation '
                'of the data will differ after resuming.'
            )
            return
        endless = isinstance(loop, IterBasedTrainLoop)
        skip = runner.iter if endless else self._batches_to_skip(runner)
        loop.dataloader = self._build(runner, dict(cfg), skip, endless)
        if endless:
            takes = 0 if hasattr(loop, 'fast_forward_on_resume') else runner.iter
            loop.dataloader_iterator = EndlessBatches(loop.dataloader, takes)

    def _batches_to_skip(self, runner: Runner) -> int:
        done, length = self._progress
        if done and length != len(runner.train_dataloader):
            runner.logger.warning(
                f'The checkpoint was saved after {done} of {length} iterations of an epoch, which '
                f'has {len(runner.train_dataloader)} now: the epoch starts again.'
            )
            return 0
        return done

    def _build(self, runner: Runner, cfg: dict, skip: int, endless: bool) -> DataLoader:
        dataset = runner.train_dataloader.dataset
        # A function, because MMEngine deep-copies the config, with any data set in it.
        cfg['dataset'] = dict(type=lambda: dataset)
        cfg.pop('num_batch_per_epoch', None)  # The built data set has been cut already.
        cfg['batch_sampler'] = dict(
            type=SeededBatchSampler,
            batch_sampler=cfg.get('batch_sampler'),
            drop_last=cfg.pop('drop_last', False),
            seed=self._seed,
            done=runner.iter,
            skip=skip,
            endless=endless,
        )
        return runner.build_dataloader(cfg, seed=self._seed)

    def before_train_epoch(self, runner: Runner) -> None:
        """Note the iteration at which the epoch began, maybe before resuming."""
        self._epoch_began_at = runner.iter - self._progress[0]
        self._progress = (0, 0)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Seed the model's randomness."""
        seed_everything(self._seed, get_rank(), runner.iter, 0)  # Samples have 1 or more.

    def after_train_epoch(self, runner: Runner) -> None:
        """Forget where the epoch began."""
        self._epoch_began_at = None

    def after_train(self, runner: Runner) -> None:
        """Stop endless data workers."""
        batches = getattr(runner.train_loop, 'dataloader_iterator', None)
        if isinstance(batches, EndlessBatches):
            batches.close()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Store how much of the epoch is done."""
        if self._epoch_began_at is None or isinstance(runner.train_loop, IterBasedTrainLoop):
            return
        meta = checkpoint['meta']
        done = meta['iter'] - self._epoch_began_at
        meta['epoch_progress'] = [done, len(runner.train_dataloader)]
