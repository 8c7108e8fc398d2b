"""Cheap checks of the data before every run.

:mod:`mmsvit.datasets.inspection` is the thorough check, on demand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.fileio import list_from_file
from mmengine.registry import DATASETS
from torch import Tensor

from .coco_annotations import CocoSummary, read_annotations, summarise


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

    Every file and folder must exist, an evaluator must use the annotations of its data set, and
    COCO annotations must have the classes of the config, in that order. MMDetection fails with
    "need at least one array to concatenate" if no class matches, silently trains without classes
    that do not, and shows wrong names if the order differs. Paths on a storage service
    (``s3://...``, ``backend_args``) are not checked.

    Args:
        cfg: A complete config.
        splits: Which of ``'train'``, ``'val'`` and ``'test'`` to check.

    Raises:
        FileNotFoundError: Files or folders are missing; the message lists all.
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
    missing: list[str] = []
    evaluators: dict[str, list[dict]] = {}
    for split, parts in datasets.items():
        evaluators[split] = [
            metric for metric in metrics_with_file(cfg, split) if not metric.get('backend_args')
        ]
        for part in parts:
            missing += _missing_paths(split, part)
        files = {_local(part.get('data_root'), part.get('ann_file')) for part in parts}
        for evaluator in evaluators[split]:
            file = _local(None, evaluator['ann_file'])
            if file is None:
                continue
            if not file.is_file():
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
            of_coco = []
            for part in parts:
                kind: Any = part['type']
                if not isinstance(kind, type):
                    kind = registry.get(kind)
                file = _local(part.get('data_root'), part.get('ann_file'))
                if file is not None and hasattr(kind, 'COCOAPI'):
                    of_coco.append(str(file))
                    classes = {**kind.METAINFO, **(part.get('metainfo') or {})}.get('classes')
                    check_classes(split, str(file), classes, kind)
                    check_masks(split, str(file), part.get('pipeline', ()))
            for evaluator in evaluators[split]:
                if len(of_coco) > 1:
                    raise ValueError(
                        f'{split}_evaluator compares with {evaluator["ann_file"]!r} alone, but the '
                        f'data set joins {of_coco}, whose image ids may be the same: merge the files '
                        "into one, or use MMDetection's MultiDatasetsEvaluator"
                    )
                ann_file = evaluator['ann_file']
                problem = of_coco and _evaluation_problem(ann_file, evaluated_kinds(evaluator))
                if problem:
                    raise ValueError(f'{ann_file!r} of {split}_evaluator has {problem}')


def metrics_with_file(cfg: Config, split: str) -> list[dict]:
    """The metrics of a split that read an annotation file of their own."""
    return [metric for metric in as_list(cfg.get(f'{split}_evaluator')) if metric.get('ann_file')]


def evaluated_kinds(metric: dict) -> tuple[str, ...]:
    """What a metric for COCO's format evaluates, such as ``'bbox'`` and ``'segm'``."""
    return tuple(str(kind) for kind in as_list(metric.get('metric', 'bbox')))


def type_name(cfg: dict) -> str:
    """The name of a config's ``type``, a string or a class, without its scope."""
    return getattr(cfg.get('type'), '__name__', str(cfg.get('type'))).rpartition('.')[2]


def as_list(value: Any) -> list:
    """A setting that may be None, one thing or several, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _local(root: str | None, path: str | None) -> Path | None:
    """A path below a data root; None if there is none or it is not on this machine."""
    if not path or '://' in (root or '') + path:
        return None
    return Path(root or '') / path


def _missing_paths(split: str, dataset: dict) -> Iterator[str]:
    root = dataset.get('data_root')
    named = {'data_root': _local(None, root), 'ann_file': _local(root, dataset.get('ann_file'))}
    prefixes = dataset.get('data_prefix')
    if type_name(dataset) == 'ImageNet' and not prefixes and dataset.get('split'):
        named['split'] = _local(root, dataset['split'])  # A folder named like the split.
    elif isinstance(prefixes, str):
        named['data_prefix'] = _local(root, prefixes)
    elif prefixes:
        named.update((f'data_prefix.{key}', _local(root, value)) for key, value in prefixes.items())
    for name, path in named.items():
        if path is not None and not (path.is_file() or path.is_dir()):  # nor a pipe or device
            yield f'{split}_dataloader.dataset.{name}: {path.absolute()}'


@cache  # COCO's file takes seconds to read, and several checks need it.
def read_coco(ann_file: str, evaluated: bool = False) -> CocoSummary:
    """What an annotation file in COCO format holds.

    Args:
        ann_file: The file.
        evaluated: Whether to look for what an evaluation would fail on; slower.

    Raises:
        ValueError: It is none, or cannot be read; the message names the file.
    """
    try:
        return summarise(read_annotations(ann_file, with_polygons=evaluated), evaluated)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f'{ann_file!r} is not an annotation file in COCO format '
            f'({type(error).__name__}: {error})'
        ) from error


def check_masks(split: str, ann_file: str, pipeline: Sequence[dict]) -> None:
    """Check that objects have the masks that a pipeline loads.

    Raises:
        ValueError: Some have none; the message says what to do.
    """
    if not any(step.get('with_mask') for step in pipeline if isinstance(step, dict)):
        return
    summary = read_coco(ann_file)
    if summary.without_mask:
        raise ValueError(
            f'{summary.without_mask:,} of {summary.annotations:,} {split} annotations in {ann_file!r} '
            'have no segmentation, which the pipeline loads (with_mask=True). To train on boxes alone, '
            'take a config without masks, such as configs/retinanet/retinanet_svit-s_fpn_1x_coco.py; '
            "or set with_mask=False in the pipelines, metric='bbox' in the evaluators, and "
            'mask_head=None and mask_roi_extractor=None in model.roi_head'
        )


def _evaluation_problem(ann_file: str, kinds: Sequence[str]) -> str | None:
    """On what an evaluation would fail, or which objects it would pass over; None for nothing."""
    for kind in kinds:
        for what, ids in read_coco(ann_file, evaluated=True).bad_truth.get(kind, {}).items():
            return f'{len(ids):,} {what}; the first is annotation {ids[0]!r}'
    return None


def check_classes(
    split: str, ann_file: str, classes: Sequence[str] | str | None, kind: type[BaseDataset]
) -> None:
    """Check the classes of a config against an annotation file in COCO format.

    Args:
        split: For the message.
        ann_file: The annotation file.
        classes: Those of the config: names, a text file of them, or None for any.
        kind: The class of the data set.

    Raises:
        ValueError: The file cannot be read, lacks classes, or has them in another order.
    """
    if classes is None:
        return
    if isinstance(classes, str):
        if '://' not in classes and not Path(classes).is_file():
            raise ValueError(
                f'metainfo.classes of the {split} data set is the text {classes!r}, but there is no '
                f'such file of class names. A tuple of one name needs a comma: ({classes!r},)'
            )
        classes = list_from_file(classes)
    names = read_coco(ann_file).names
    absent = [name for name in classes if name not in names]
    if absent:
        raise ValueError(
            f'the {split} annotations {ann_file!r} do not have the classes {absent} that the '
            f'config names; they have {names}. Set metainfo.classes of the data set to names of '
            'the file, and num_classes of the heads to their number.'
        )
    in_file_order = [name for name in names if name in classes]
    # A subclass that loads differently may sort them itself, as Objects365's do.
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


def check_batch(split: str, batch_size: int, dataset: object, inputs: Sequence[Tensor]) -> None:
    """Check that images of label maps can be evaluated in batches.

    Args:
        split: For the message.
        batch_size: Of the data loader.
        dataset: Built, with its wrappers.
        inputs: Some images as the pipeline gives them, ``(C, H, W)``.

    Raises:
        ValueError: They have several sizes, which MMSegmentation does not evaluate in one batch.
    """
    sizes = sorted({tuple(image.shape[-2:]) for image in inputs})
    of_maps = any(hasattr(part, 'reduce_zero_label') for part in built_datasets(dataset))
    if of_maps and batch_size > 1 and len(sizes) > 1:
        raise ValueError(
            f'{split} images have several sizes after the pipeline, such as '
            f'{" and ".join(f"{width}x{height}" for height, width in sizes[:2])}, which MMSegmentation '
            f'does not evaluate in batches of {batch_size}: set {split}_dataloader.batch_size=1'
        )


def check_class_folders(datasets: dict[str, object]) -> None:
    """Check that all splits have the same folders of images, one for each class.

    MMPretrain numbers the folders of each split separately, in alphabetical order.

    Args:
        datasets: Built data sets by split; those without such folders are skipped.

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
                f'the {split} data set has other class folders than the {first} data set: only '
                f'{first} has {sorted(set(expected) - set(found))}, only {split} has '
                f'{sorted(set(found) - set(expected))}. Make the same folders, even if empty.'
            )
        classes = part.metainfo['classes']
        if sorted(classes) == sorted(found) and list(classes) != found:
            raise ValueError(
                f'metainfo.classes of the {split} data set is in another order than the folders, '
                f'which decide the labels. Set it to {tuple(found)}'
            )
