"""Finding wrong data before any work is lost to it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.fileio import get_local_path
from mmengine.hooks import Hook
from mmengine.registry import DATASETS
from mmengine.runner import Runner

from .registry import HOOKS


def _dataset_configs(cfg: dict) -> Iterator[dict]:
    """The innermost data sets of a data set config with its wrappers."""
    if 'dataset' in cfg:
        yield from _dataset_configs(cfg['dataset'])
    elif 'datasets' in cfg:
        for inner in cfg['datasets']:
            yield from _dataset_configs(inner)
    else:
        yield cfg


def check_data(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check the data that a config names, before anything is built.

    Every file and folder must be there, and COCO annotations must have the classes of the
    config, in that order. MMDetection by itself ends in "need at least one array to
    concatenate" where no class matches, trains without those that do not, and shows wrong
    names where the order differs. Paths on a storage service (``s3://...``) are left to its
    client.

    Args:
        cfg: A whole config.
        splits: Which of ``'train'``, ``'val'`` and ``'test'`` to check.

    Raises:
        FileNotFoundError: Something is not there; the message lists all that is not.
        ValueError: Classes do not match; the message names them.
    """
    named = [
        (split, dataset)
        for split in splits
        if cfg.get(f'{split}_dataloader')
        for dataset in _dataset_configs(cfg[f'{split}_dataloader']['dataset'])
    ]
    missing = [line for split, dataset in named for line in _missing_paths(split, dataset)]
    if missing:
        raise FileNotFoundError(
            'the config names data that is not there:\n  '
            + '\n  '.join(missing)
            + '\nPut the data there, or set data_root, ann_file and data_prefix of the data sets '
            '(val_evaluator.ann_file too) to where it is.'
        )
    with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        for split, dataset in named:
            kind = registry.get(dataset['type'])
            path = (dataset.get('data_root') or '') + (dataset.get('ann_file') or '')
            if hasattr(kind, 'COCOAPI') and '://' not in path:
                metainfo = {**kind.METAINFO, **(dataset.get('metainfo') or {})}
                ann_file = Path(dataset.get('data_root') or '') / dataset['ann_file']
                check_classes(split, str(ann_file), metainfo.get('classes'))


def _missing_paths(split: str, dataset: dict) -> Iterator[str]:
    root = dataset.get('data_root') or ''
    named = {'ann_file': dataset.get('ann_file')}
    prefixes = dataset.get('data_prefix')
    if isinstance(prefixes, str):
        named['data_prefix'] = prefixes
    elif prefixes:
        named.update((f'data_prefix.{key}', value) for key, value in prefixes.items())
    for name, value in named.items():
        if value and '://' not in root + value and not (Path(root) / value).exists():
            yield f'{split}_dataloader.dataset.{name}: {(Path(root) / value).absolute()}'


@cache  # COCO's file takes seconds to read, and both checks want it.
def _category_names(ann_file: str) -> list[str]:
    with get_local_path(ann_file) as file:
        annotations = json.loads(Path(file).read_text())
    return [category['name'] for category in annotations.get('categories', [])]


def check_classes(split: str, ann_file: str, classes: Sequence[str] | None) -> None:
    """Check the classes of a config against an annotation file in COCO format.

    Args:
        split: For the message.
        ann_file: The annotation file.
        classes: Those of the config; None if it names none.

    Raises:
        ValueError: The file lacks some, or has them in another order.
    """
    if classes is None:
        return
    names = _category_names(ann_file)
    absent = [name for name in classes if name not in names]
    if absent:
        raise ValueError(
            f'the {split} annotations {ann_file!r} do not have the classes {absent} that the '
            f'config names; they have {names}. Set metainfo.classes of the data set to names of '
            'the file (and num_classes of the heads to how many they are).'
        )
    in_file_order = [name for name in names if name in classes]
    if in_file_order != list(classes):
        raise ValueError(
            f'metainfo.classes of the {split} data set is in another order than {ann_file!r}, '
            f'which decides the labels. Set it to {tuple(in_file_order)}'
        )


def _datasets(dataset: object) -> Iterator[BaseDataset]:
    """The innermost data sets of a built data set with its wrappers."""
    if hasattr(dataset, 'datasets'):
        for inner in dataset.datasets:
            yield from _datasets(inner)
    elif hasattr(dataset, 'dataset'):
        yield from _datasets(dataset.dataset)
    elif isinstance(dataset, BaseDataset):
        yield dataset


@HOOKS.register_module()
class CheckDatasetHook(Hook):
    """Check the data sets before the first iteration, whichever tool started the run.

    The classes as :func:`check_data` does, and that the first image exists.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Check training and validation data.

        Raises:
            ValueError, FileNotFoundError: What is wrong, and with which data set.
        """
        self._check('train', runner.train_dataloader.dataset)
        if runner.val_loop is not None:
            self._check('val', runner.val_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        """Check test data.

        Raises:
            ValueError, FileNotFoundError: What is wrong, and with which data set.
        """
        self._check('test', runner.test_dataloader.dataset)

    def _check(self, split: str, dataset: object) -> None:
        for part in _datasets(dataset):
            if hasattr(part, 'COCOAPI'):
                check_classes(split, part.ann_file, part.metainfo.get('classes'))
            image = part.get_data_info(0).get('img_path')
            if image and '://' not in image and not Path(image).is_file():
                raise FileNotFoundError(
                    f'{image!r}, the first image of the {split} data set {part.ann_file!r}, does not '
                    f'exist; is data_prefix right? It is {part.data_prefix}'
                )
