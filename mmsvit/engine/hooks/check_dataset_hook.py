"""Check built data sets before the first iteration."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmengine.dataset import BaseDataset
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from ...datasets.quick_checks import (
    built_datasets,
    check_batch,
    check_class_folders,
    check_classes,
    read_coco,
)
from ...models.mm_models import check_channels, unwrap
from ...registry import HOOKS


@HOOKS.register_module()
class CheckDatasetHook(Hook):
    """Check built data sets before the first iteration, whichever tool started the run.

    It checks the classes as :func:`check_data` does, those of image folders, that the first image
    and label map exist, and the number of classes of a segmentor or classifier (MMDetection's
    ``NumClassCheckHook`` checks that of a detector). Before training also that neck or heads take the
    backbone's channels.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Check training and validation data.

        Raises:
            ValueError, FileNotFoundError: What is wrong, and with which data set.
        """
        check_channels(unwrap(runner.model))
        datasets = {'train': runner.train_dataloader.dataset}
        if runner.val_loop is not None:
            datasets['val'] = runner.val_dataloader.dataset
        _check(runner, datasets)
        if runner.val_loop is not None:
            _check_batches(runner, 'val', runner.val_dataloader)

    def before_test(self, runner: Runner) -> None:
        """Check test data.

        Raises:
            ValueError, FileNotFoundError: What is wrong, and with which data set.
        """
        _check(runner, {'test': runner.test_dataloader.dataset})
        _check_batches(runner, 'test', runner.test_dataloader)


def _check_batches(runner: Runner, split: str, loader: DataLoader) -> None:
    """Check the first batch now, and each before it is evaluated."""
    dataset: Any = loader.dataset
    size = getattr(loader, 'batch_size', None) or 1
    if size == 1 or not hasattr(unwrap(runner.model), 'data_preprocessor'):
        return

    def check(module: nn.Module, arguments: tuple) -> None:
        if not module.training and isinstance(arguments[0].get('inputs'), list):
            check_batch(split, size, dataset, arguments[0]['inputs'])

    unwrap(runner.model).data_preprocessor.register_forward_pre_hook(check)
    with suppress(
        OSError, KeyError, AttributeError, RuntimeError, TypeError
    ):  # Named when evaluated.
        first = [dataset[i]['inputs'] for i in range(min(size, len(dataset)))]
        check_batch(split, size, dataset, first)


def _check(runner: Runner, datasets: dict[str, object]) -> None:
    check_class_folders(datasets)
    for split, dataset in datasets.items():
        for part in built_datasets(dataset):
            if not getattr(part, 'backend_args', None):
                _check_part(runner, split, part)


def _check_part(runner: Runner, split: str, part: BaseDataset) -> None:
    if hasattr(part, 'COCOAPI') and '://' not in part.ann_file:
        classes = part.metainfo.get('classes')
        check_classes(split, part.ann_file, classes, type(part))
        if classes is not None:
            for what, number in read_coco(part.ann_file).left_out.items():
                if number == 1:
                    what = what.replace('boxes', 'box').replace('images', 'image')
                runner.logger.warning(f'{split} annotations {part.ann_file!r}: {number:,} {what}')
    if hasattr(part, 'reduce_zero_label'):
        _check_num_classes(split, part.metainfo['classes'], runner.model)
    if getattr(part, 'folder_to_idx', None):
        _check_num_classes(split, part.folder_to_idx, runner.model)
    first = part.get_data_info(0)
    for file in (first.get('img_path'), first.get('seg_map_path')):
        if file and '://' not in file and not Path(file).is_file():
            raise FileNotFoundError(
                f'{file!r}, the first file of the {split} data set {part.ann_file!r}, does not '
                f'exist; is data_prefix right? It is {part.data_prefix}'
            )


def _check_num_classes(split: str, classes: Collection[str], model: nn.Module) -> None:
    _, *parts = unwrap(model).named_modules()  # Without the model itself, which repeats a head's.
    for name, module in parts:
        count = getattr(module, 'num_classes', None)
        if isinstance(count, int) and count != len(classes):
            raise ValueError(
                f'{name}.num_classes is {count}, but the {split} data set has {len(classes)} '
                'classes: set num_classes of every head (decode_head, auxiliary_head), and of a '
                f"classifier's data_preprocessor, to {len(classes)}"
            )
