"""Finding wrong data before any work is lost to it: cheap checks, made before every run.

:mod:`mmsvit.dataset_inspection` is the thorough look, on demand.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from pathlib import Path

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.fileio import list_from_file
from mmengine.hooks import Hook
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch import nn

from .coco_annotations import count_left_out
from .registry import HOOKS


def dataset_configs(cfg: dict) -> Iterator[dict]:
    """The innermost data sets of a data set config with its wrappers."""
    if 'dataset' in cfg:
        yield from dataset_configs(cfg['dataset'])
    elif 'datasets' in cfg:
        for inner in cfg['datasets']:
            yield from dataset_configs(inner)
    else:
        yield cfg


def check_data(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check the data that a config names, before anything is built.

    Every file and folder must be there, an evaluator must use the annotations of its data
    set, and COCO annotations must have the classes of the config, in that order.
    MMDetection by itself ends in "need at least one array to concatenate" where no class
    matches, trains without those that do not, and shows wrong names where the order
    differs. Paths on a storage service (``s3://...``, ``backend_args``) are left to its
    client.

    Args:
        cfg: A whole config.
        splits: Which of ``'train'``, ``'val'`` and ``'test'`` to check.

    Raises:
        FileNotFoundError: Something is not there; the message lists all that is not.
        ValueError: Annotations cannot be read, or do not match.
    """
    datasets = {
        split: [
            dataset
            for dataset in dataset_configs(cfg[f'{split}_dataloader']['dataset'])
            if not dataset.get('backend_args')
        ]
        for split in splits
        if cfg.get(f'{split}_dataloader')
    }
    missing = []
    for split, parts in datasets.items():
        for part in parts:
            missing += _missing_paths(split, part)
        files = {_local(part.get('data_root'), part.get('ann_file')) for part in parts}
        for evaluator in _as_list(cfg.get(f'{split}_evaluator')):
            file = _local(None, evaluator.get('ann_file'))
            if file is None or evaluator.get('backend_args'):
                continue
            if not file.exists():
                missing.append(f'{split}_evaluator.ann_file: {file.absolute()}')
            elif files - {None} and file.resolve() not in {f.resolve() for f in files if f}:
                raise ValueError(
                    f'{split}_evaluator.ann_file is {str(file)!r}, but the data set has '
                    f'{[str(f) for f in files if f]}: set both to the same file'
                )
    if missing:
        raise FileNotFoundError(
            'the config names data that is not there:\n  '
            + '\n  '.join(missing)
            + '\nPut the data there, or set data_root, ann_file and data_prefix of the data sets '
            'and ann_file of the evaluators to where it is.'
        )
    with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        for split, parts in datasets.items():
            for part in parts:
                kind = (
                    part['type'] if isinstance(part['type'], type) else registry.get(part['type'])
                )
                file = _local(part.get('data_root'), part.get('ann_file'))
                if file is not None and hasattr(kind, 'COCOAPI'):
                    classes = {**kind.METAINFO, **(part.get('metainfo') or {})}.get('classes')
                    check_classes(split, str(file), classes, kind)


def _as_list(value: dict | list | None) -> list[dict]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _local(root: str | None, path: str | None) -> Path | None:
    """A path below a data root, unless it is not given or not on this machine."""
    if not path or '://' in (root or '') + path:
        return None
    return Path(root or '') / path


def _missing_paths(split: str, dataset: dict) -> Iterator[str]:
    root = dataset.get('data_root')
    named = {'data_root': _local(None, root), 'ann_file': _local(root, dataset.get('ann_file'))}
    prefixes = dataset.get('data_prefix')
    kind = getattr(dataset['type'], '__name__', str(dataset['type'])).rpartition('.')[2]
    if kind == 'ImageNet' and not prefixes and dataset.get('split'):
        named['split'] = _local(root, dataset['split'])  # A folder of the name of the split.
    elif isinstance(prefixes, str):
        named['data_prefix'] = _local(root, prefixes)
    elif prefixes:
        named.update((f'data_prefix.{key}', _local(root, value)) for key, value in prefixes.items())
    for name, path in named.items():
        if path is not None and not path.exists():
            yield f'{split}_dataloader.dataset.{name}: {path.absolute()}'


@cache  # COCO's file takes seconds to read, and all checks want it.
def _read_coco(ann_file: str) -> tuple[list[str], Counter]:
    """Names of the categories, and how often what MMDetection leaves out without a word is there."""
    try:
        content = json.loads(Path(ann_file).read_text())
        names = [category['name'] for category in content['categories']]
        return names, count_left_out(content)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{ann_file!r} is not an annotation file in COCO format '
            f'({type(error).__name__}: {error})'
        ) from error


def check_classes(
    split: str, ann_file: str, classes: Sequence[str] | str | None, kind: type
) -> None:
    """Check the classes of a config against an annotation file in COCO format.

    Args:
        split: For the message.
        ann_file: The annotation file.
        classes: Those of the config: names, a text file of them, or None for any.
        kind: The class of the data set.

    Raises:
        ValueError: The file cannot be read, lacks some, or has them in another order.
    """
    if classes is None:
        return
    if isinstance(classes, str):
        classes = list_from_file(classes)
    names, _ = _read_coco(ann_file)
    absent = [name for name in classes if name not in names]
    if absent:
        raise ValueError(
            f'the {split} annotations {ann_file!r} do not have the classes {absent} that the '
            f'config names; they have {names}. Set metainfo.classes of the data set to names of '
            'the file (and num_classes of the heads to how many they are).'
        )
    in_file_order = [name for name in names if name in classes]
    # A subclass with its own way to load may order them by itself, as Objects365's do.
    plain = kind.load_data_list.__qualname__ == 'CocoDataset.load_data_list'
    if plain and in_file_order != list(classes):
        raise ValueError(
            f'metainfo.classes of the {split} data set is in another order than {ann_file!r}, '
            f'which decides the labels. Set it to {tuple(in_file_order)}'
        )


def built_datasets(dataset: object) -> Iterator[BaseDataset]:
    """The innermost data sets of a built data set with its wrappers."""
    if hasattr(dataset, 'datasets'):
        for inner in dataset.datasets:
            yield from built_datasets(inner)
    elif hasattr(dataset, 'dataset'):
        yield from built_datasets(dataset.dataset)
    elif isinstance(dataset, BaseDataset):
        yield dataset


def check_class_folders(datasets: dict[str, object]) -> None:
    """Check that folders of images, one for each class, mean the same labels everywhere.

    mmpretrain numbers the folders of each split by themselves, in alphabetical order.

    Args:
        datasets: Built data sets by split; those without such folders are left out.

    Raises:
        ValueError: Folders differ between the splits, or are in another order than the classes
            of the config.
    """
    parts = [
        (split, part)
        for split, dataset in datasets.items()
        for part in built_datasets(dataset)
        if getattr(part, 'folder_to_idx', None)
    ]
    if not parts:
        return
    first, expected = parts[0][0], list(parts[0][1].folder_to_idx)
    for split, part in parts:
        found = list(part.folder_to_idx)
        if found != expected:
            raise ValueError(
                f'the {split} data set numbers its classes by other folders than the {first} data '
                f'set: only {first} has {sorted(set(expected) - set(found))}, only {split} has '
                f'{sorted(set(found) - set(expected))}. Make the same folders, even if empty.'
            )
        classes = part.metainfo['classes']
        if sorted(classes) == sorted(found) and list(classes) != found:
            raise ValueError(
                f'metainfo.classes of the {split} data set is in another order than the folders, '
                f'which decide the labels. Set it to {tuple(found)}'
            )


@HOOKS.register_module()
class CheckDatasetHook(Hook):
    """Check built data sets before the first iteration, whichever tool started the run.

    The classes as :func:`check_data` does, those of image folders, that the first image and
    label map exist, and that a segmentor or classifier has as many classes (of a detector,
    MMDetection's ``NumClassCheckHook`` sees to it). (A stock tool fails by itself, if less
    clearly, where files are missing or no class matches.)
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Check training and validation data.

        Raises:
            ValueError, FileNotFoundError: What is wrong, and with which data set.
        """
        datasets = {'train': runner.train_dataloader.dataset}
        if runner.val_loop is not None:
            datasets['val'] = runner.val_dataloader.dataset
        check_class_folders(datasets)
        for split, dataset in datasets.items():
            self._check(split, dataset, runner)

    def before_test(self, runner: Runner) -> None:
        """Check test data.

        Raises:
            ValueError, FileNotFoundError: What is wrong, and with which data set.
        """
        check_class_folders({'test': runner.test_dataloader.dataset})
        self._check('test', runner.test_dataloader.dataset, runner)

    def _check(self, split: str, dataset: object, runner: Runner) -> None:
        model = runner.model
        for part in built_datasets(dataset):
            if getattr(part, 'backend_args', None):
                continue
            if hasattr(part, 'COCOAPI') and '://' not in part.ann_file:
                classes = part.metainfo.get('classes')
                check_classes(split, part.ann_file, classes, type(part))
                if classes is not None:
                    _warn_of_left_out(runner, split, part)
            if hasattr(part, 'reduce_zero_label'):
                _check_num_classes(split, part.metainfo['classes'], model)
            if getattr(part, 'folder_to_idx', None):
                _check_num_classes(split, part.folder_to_idx, model)
            first = part.get_data_info(0)
            for file in (first.get('img_path'), first.get('seg_map_path')):
                if file and '://' not in file and not Path(file).is_file():
                    raise FileNotFoundError(
                        f'{file!r}, the first one of the {split} data set {part.ann_file!r}, does '
                        f'not exist; is data_prefix right? It is {part.data_prefix}'
                    )


def _warn_of_left_out(runner: Runner, split: str, dataset: BaseDataset) -> None:
    for what, number in _read_coco(dataset.ann_file)[1].items():
        runner.logger.warning(f'{number:,} {what} in the {split} annotations {dataset.ann_file!r}')


def _check_num_classes(split: str, classes: Collection[str], model: nn.Module) -> None:
    for name, module in model.named_modules():
        count = getattr(module, 'num_classes', None)
        if isinstance(count, int) and count != len(classes):
            raise ValueError(
                f'{name}.num_classes is {count}, but the {split} data set has {len(classes)} '
                'classes: set num_classes of every head (decode_head, auxiliary_head), and of the '
                'data_preprocessor of a classifier, to that'
            )
