"""Finding wrong data before any work is lost to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.fileio import get_local_path
from mmengine.hooks import Hook
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


def check_data_paths(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check that every file and folder that the data sets of a config name is there.

    Paths on a storage service (``s3://...``) are left to its client.

    Args:
        cfg: A whole config.
        splits: Which of ``'train'``, ``'val'`` and ``'test'`` to check.

    Raises:
        FileNotFoundError: Something is not there; the message lists all that is not.
    """
    missing = []
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        for dataset in _dataset_configs(loader['dataset']) if loader else ():
            root = dataset.get('data_root') or ''
            named = {'ann_file': dataset.get('ann_file')}
            prefixes = dataset.get('data_prefix')
            if isinstance(prefixes, str):
                named['data_prefix'] = prefixes
            elif prefixes:
                named.update((f'data_prefix.{key}', value) for key, value in prefixes.items())
            for name, value in named.items():
                if not value or '://' in root + value:
                    continue
                path = Path(root) / value
                if not path.exists():
                    missing.append(f'{split}_dataloader.dataset.{name}: {path.absolute()}')
    if missing:
        raise FileNotFoundError(
            'the config names data that is not there:\n  '
            + '\n  '.join(missing)
            + '\nPut the data there, or set data_root, ann_file and data_prefix of the data sets '
            '(val_evaluator.ann_file too) to where it is.'
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
    """Check the data sets before the first iteration.

    A data set must have images, the first of them must exist, and COCO annotations must
    have the classes of the config, in that order. MMDetection by itself trains on nothing
    where no class matches, and shows wrong names where the order differs.
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
            self._check_classes(split, part)
            if len(part) == 0:
                raise ValueError(
                    f'the {split} data set {part.ann_file!r} has no image with an annotation that '
                    'the config keeps; see its filter_cfg'
                )
            image = part.get_data_info(0).get('img_path')
            if image and '://' not in image and not Path(image).is_file():
                raise FileNotFoundError(
                    f'{image!r}, the first image of the {split} data set {part.ann_file!r}, does not '
                    f'exist; is data_prefix right? It is {part.data_prefix}'
                )

    @staticmethod
    def _check_classes(split: str, dataset: BaseDataset) -> None:
        classes = dataset.metainfo.get('classes')
        if not hasattr(dataset, 'cat_ids') or classes is None:
            return  # Not a data set in COCO format.
        with get_local_path(dataset.ann_file) as file:
            categories = json.loads(Path(file).read_text()).get('categories', [])
        names = [category['name'] for category in categories]
        absent = [name for name in classes if name not in names]
        if absent:
            raise ValueError(
                f'the {split} annotations {dataset.ann_file!r} do not have the classes {absent} that '
                f'the config names; they have {names}. Set metainfo.classes of the data set to '
                'names of the file (and num_classes of the heads to how many they are).'
            )
        in_file_order = [name for name in names if name in classes]
        if in_file_order != list(classes):
            raise ValueError(
                f'metainfo.classes of the {split} data set is in another order than '
                f'{dataset.ann_file!r}, which decides the labels. Set it to {tuple(in_file_order)}'
            )
