"""The thorough check of a config's data, on demand (``tools/check_dataset.py``).

It starts with the cheap checks before every run (:mod:`mmsvit.datasets.quick_checks`), then checks
every annotation, looks for every file, decodes a sample of the images, and runs a few samples
through the config's pipeline.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.fileio import get, list_dir_or_file, load
from mmengine.registry import DATASETS, Registry
from PIL import ExifTags, Image, UnidentifiedImageError
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.status import Status
from torch import Tensor

from ..atomic_file import atomic_file
from .coco_annotations import check_coco_annotations, check_use, read_annotations
from .label_maps import check_all_pixels, check_label_map
from .quick_checks import (
    built_datasets,
    check_batch,
    check_data,
    dataset_configs,
    evaluated_kinds,
    metrics_with_file,
)
from .report import Counts, DatasetReport, printable
from .targets import build_visualizer, draw_targets
from .truth_evaluation import build_evaluator, score_truth, shortfalls

PIPELINE_SAMPLES = 8
NEARLY_PERFECT = 0.99  # COCO itself has a few objects that MMDetection drops.
LOOKED_AT = 200  # images, one by one, for those at fault


def inspect_data(
    cfg: Config,
    splits: Sequence[str] = ('train', 'val', 'test'),
    samples: int | None = 200,
    seed: int = 0,
    console: Console | None = None,
    show_dir: Path | None = None,
) -> DatasetReport:
    """Check the data of a config of MMDetection, MMSegmentation or MMPretrain.

    Missing and unreadable data do not raise; the report lists them.

    Args:
        cfg: A complete config.
        splits: Which of ``'train'``, ``'val'`` and ``'test'``; absent ones are skipped.
        samples: How many images of each data set to decode; None for all.
        seed: Of the choice of images.
        console: Where to show progress; standard error by default.
        show_dir: Where to draw training samples with their targets; by default nowhere.

    Raises:
        ValueError: The config has none of the splits.
    """
    present = [split for split in splits if cfg.get(f'{split}_dataloader')]
    if not present:
        raise ValueError(f'the config has no data loader for any of {list(splits)}')
    report, console = DatasetReport(), console or Console(stderr=True)
    rng = np.random.default_rng(seed)
    inspected: dict[str, _SplitInspection] = {}
    with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        for split in present:
            inspection = _SplitInspection(cfg, split, registry, report, samples, rng, console)
            inspection.show_dir = show_dir if split == 'train' else None
            if not inspection.check_paths_and_classes():
                continue
            others = inspected.values()
            same = [other.split for other in others if inspection.dataset_cfg == other.dataset_cfg]
            if same:
                report.counts.append(Counts(split, f'same as {same[0]}'))
                continue
            inspection.check_contents()
            for other in others:
                inspection.compare_classes(other)
            inspected[split] = inspection
    return report


def head_num_classes(model: object, name: str = 'model') -> Iterator[tuple[str, int]]:
    """The number of classes of each head of a model config.

    Backbones, region proposal heads and HTC's semantic head are skipped: theirs are not the
    classes of the data set.

    Args:
        model: ``cfg.model`` or a part of it.
        name: Its name.

    Yields:
        The name of the setting, for example ``'model.roi_head.bbox_head.num_classes'``,
        and its value.
    """
    if isinstance(model, (list, tuple)):
        for i, part in enumerate(model):
            yield from head_num_classes(part, f'{name}[{i}]')
    elif isinstance(model, dict) and model.get('type') != 'FusedSemanticHead':
        if isinstance(model.get('num_classes'), int):
            yield f'{name}.num_classes', model['num_classes']
        if 'num_things_classes' in model:
            things_and_stuff = model['num_things_classes'] + model.get('num_stuff_classes', 0)
            yield f'{name}.num_things_classes + num_stuff_classes', things_and_stuff
        for key, part in model.items():
            if key not in ('backbone', 'rpn_head'):
                yield from head_num_classes(part, f'{name}.{key}')


class _SplitInspection:
    """The inspection of one split."""

    def __init__(
        self,
        cfg: Config,
        split: str,
        registry: Registry,
        report: DatasetReport,
        samples: int | None,
        rng: np.random.Generator,
        console: Console,
    ) -> None:
        self.cfg, self.split, self.registry, self.report = cfg, split, registry, report
        self.samples, self.rng, self.console = samples, rng, console
        self.dataset_cfg = cfg[f'{split}_dataloader'].dataset
        self.classes: Sequence[str] | None = None  # known once the data set is built
        self.show_dir: Path | None = None
        self.all_are_files = True

    def error(self, kind: str, example: str) -> None:
        self.report.error(self.split, kind, example)

    def warning(self, kind: str, example: str) -> None:
        self.report.warning(self.split, kind, example)

    def track(self, items: Iterable, what: str) -> Iterable:
        return track(
            items,
            f'{self.split}: {what}',
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def status(self, what: str) -> Status:
        return self.console.status(escape(printable(f'{self.split}: {what}')))

    def check_paths_and_classes(self) -> bool:
        """Whether all files and folders exist, so that their contents can be checked."""
        try:
            with self.status('files, folders and classes'):
                check_data(self.cfg, (self.split,))
        except FileNotFoundError as error:
            self.error('missing files or folders', str(error))
            return False
        except ValueError as error:
            self.error('annotations that do not fit the config', str(error))
        return True

    def check_contents(self) -> None:
        """Check annotations, data sets, images and pipeline."""
        parts = list(dataset_configs(self.dataset_cfg))
        counts = [Counts(self.split, _type_name(part)) for part in parts]
        self.report.counts += counts
        for part, part_counts in zip(parts, counts):
            self.check_annotation_file(part, part_counts)
        try:
            with self.status('building the data set'), redirect_stdout(StringIO()):
                dataset = self.registry.build(self.dataset_cfg)
        except Exception as error:  # Data sets raise anything.
            # MMEngine's error for a data set that is empty after its filter.
            if str(error) == 'need at least one array to concatenate':
                for part in parts:
                    self.error('data sets without images', _sources(part))
            else:
                self.error('data sets that cannot be built', _describe(error))
            return
        for built, part_counts in zip(built_datasets(dataset), counts):
            self.check_dataset(built, part_counts)
        self.classes = dataset.metainfo.get('classes')
        self.check_heads()
        if not self.all_are_files:
            return  # A pipe would be read for ever.
        counts[0].loaded = self.check_pipeline(dataset)
        if self.cfg.get(f'{self.split}_evaluator') and hasattr(dataset, 'get_data_info'):
            self.check_evaluator(dataset)

    def check_annotation_file(self, part: dict, counts: Counts) -> None:
        """Check an annotation file in COCO format, before a data set fails on it."""
        kind = part['type'] if isinstance(part['type'], type) else self.registry.get(part['type'])
        if not hasattr(kind, 'COCOAPI'):
            return
        try:
            # For the paths and classes of the data set, without loading anything.
            dataset = self.registry.build({**part, 'pipeline': [], 'lazy_init': True})
            with self.status(f'reading {dataset.ann_file}'):
                content = self.read(dataset)
            check_coco_annotations(
                self.report,
                self.split,
                content,
                dataset.metainfo.get('classes'),
                any(step.get('with_mask') for step in part.get('pipeline', ())),
                {
                    kind
                    for metric in metrics_with_file(self.cfg, self.split)
                    for kind in evaluated_kinds(metric)
                },
                lambda annotations: self.track(annotations, 'annotations'),
            )
            counts.images = len(content['images'])
            counts.labels = len(content.get('annotations', ()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            self.error('annotation files that are not COCO format', _describe(error))

    def read(self, dataset: BaseDataset) -> dict:
        """The annotation file of a data set in COCO format."""
        if dataset.backend_args or '://' in dataset.ann_file:
            return load(dataset.ann_file, file_format='json', backend_args=dataset.backend_args)
        return read_annotations(dataset.ann_file)

    def check_objects(self, info: dict) -> Iterator[int]:
        """Check the boxes of an image of another format than COCO's; yield their labels."""
        for instance in info.get('instances', ()):
            x1, y1, x2, y2 = instance['bbox']
            if not (np.isfinite((x1, y1, x2, y2)).all() and x1 < x2 and y1 < y2):
                name = info.get('img_path')
                self.error('boxes without area', f'{name}: corners {[x1, y1, x2, y2]}')
            yield instance['bbox_label']

    def check_dataset(self, dataset: BaseDataset, counts: Counts) -> None:
        """Check the files and labels of one data set without its wrappers."""
        classes = dataset.metainfo.get('classes')
        counts.used, counts.classes = len(dataset), classes and len(classes)
        if counts.images is None:
            counts.images = len(dataset)
        infos = (
            dataset.get_data_info(i) for i in self.track(range(len(dataset)), 'list of images')
        )
        # Only what is needed, as there may be millions of samples.
        of_coco = hasattr(dataset, 'COCOAPI')  # Its file has been checked.
        names = dict(enumerate(classes or ()))
        rows, objects = [], Counter[str]()
        for info in infos:
            rows.append([info.get(key) for key in ('img_path', 'seg_map_path', 'gt_label')])
            if not of_coco:
                objects.update(names.get(i, str(i)) for i in self.check_objects(info))
        images, maps, labels = zip(*rows)

        if images[0] is None:
            self.warning('data sets whose images were not checked', 'samples have no img_path')
            return
        local = not getattr(dataset, 'backend_args', None) and '://' not in images[0]
        there = self.check_files('images', images) if local else np.ones(len(images), bool)
        if maps[0] is not None:
            counts.labels = len(maps)
            if local:
                there &= self.check_files('label maps', maps)
                self.check_maps_without_image(dataset, maps)
        if not of_coco and 'instances' in dataset.get_data_info(0):
            counts.labels = objects.total()
            check_use(self.report, self.split, objects, {*names.values(), *objects}, classes)
        if labels[0] is not None:
            counts.labels = len(labels)
            self.check_labels(images, labels, classes)

        chosen = np.flatnonzero(there)
        if self.samples is not None and self.samples < len(chosen):
            chosen = np.sort(self.rng.choice(chosen, self.samples, replace=False))
        counts.decoded = len(chosen)
        pixels: Counter = Counter()
        for i in self.track(chosen, 'decoding images'):
            pixels += self.check_image(dataset, dataset.get_data_info(int(i)))
        if pixels:
            complete = len(chosen) == len(dataset)
            check_all_pixels(self.report, self.split, pixels, dataset, complete)

    def check_files(self, what: str, paths: Sequence[str | None]) -> np.ndarray:
        """Which files exist, bool ``(len(paths),)``; folders are listed, files not touched."""
        listed: dict[str, set[str]] = {}
        there = np.zeros(len(paths), bool)
        for i, path in enumerate(self.track(paths, what)):
            folder, name = os.path.split(path)
            if folder not in listed:
                listed[folder] = _files_in(folder)
            there[i] = name in listed[folder]
            if not there[i] and Path(path).exists():
                self.error(f'{what} that are no files, but pipes, devices or folders', path)
                self.all_are_files = False
            elif not there[i]:
                self.error(f'missing {what}', path)
        return there

    def check_maps_without_image(self, dataset: BaseDataset, maps: Sequence[str]) -> None:
        """Warn of label maps that no image uses, unless a file lists the images."""
        folder = dataset.data_prefix.get('seg_map_path')
        if dataset.ann_file or not folder or not hasattr(dataset, 'seg_map_suffix'):
            return
        known = set(maps)
        for name in list_dir_or_file(folder, False, True, dataset.seg_map_suffix, recursive=True):
            if os.path.join(folder, name) not in known:  # noqa: PTH118 (as the data set does)
                self.warning('label maps without an image', name)

    def check_labels(
        self,
        images: Sequence[str],
        labels: Sequence[int | Sequence[int]],
        classes: Sequence[str] | None,
    ) -> None:
        """Check the labels of images."""
        labels_of: dict[str, int | Sequence[int]] = {}
        for image, label in zip(images, labels):
            if labels_of.setdefault(image, label) != label:
                both = f'{image}: {labels_of[image]} and {label}'
                self.error('images with two labels', both)
        if len(labels_of) < len(images):
            repeated = f'{len(images) - len(labels_of):,} of {len(images):,} entries'
            self.warning('lists that repeat an image', repeated)
        if classes is None:
            return
        found: Counter = Counter()
        for image, label in zip(images, labels):
            for value in np.atleast_1d(label).tolist():
                found[value] += 1
                if not 0 <= value < len(classes):
                    which = f'{image}: {value}, with {len(classes)} classes'
                    self.error('labels out of range', which)
        for label, name in enumerate(classes):
            if not found[label]:
                self.warning('classes without images', str(name))

    def check_image(self, dataset: BaseDataset, info: dict) -> Counter:
        """Decode an image and its label map; return the number of pixels of each value."""
        backend_args = getattr(dataset, 'backend_args', None)
        loader = next(iter(getattr(dataset.pipeline, 'transforms', ())), None)
        image, content = self.decode('images', info['img_path'], 'color', backend_args, loader)
        height, width = info.get('height'), info.get('width')
        if image is not None and height and image.shape[:2] != (height, width):
            found = f'is {image.shape[1]}x{image.shape[0]}, annotated as {width}x{height}'
            self.error('images of another size than annotated', f'{info["img_path"]} {found}')
        if image is not None and image.shape[2] == 3:
            self.check_orientation(dataset, info, content)
        path = info.get('seg_map_path')
        if not path or not hasattr(dataset, 'reduce_zero_label'):
            return Counter()
        label_map, _ = self.decode('label maps', path, 'unchanged', backend_args)
        if label_map is None:
            return Counter()
        size = None if image is None else image.shape[:2]
        return check_label_map(self.report, self.split, path, label_map, size, dataset)

    def check_orientation(self, dataset: BaseDataset, info: dict, content: bytes) -> None:
        """Report an image that MMCV turns by its tag, unlike its label map, boxes or masks."""
        first = next(iter(getattr(dataset.pipeline, 'transforms', ())), None)
        if 'ignore_orientation' in getattr(first, 'color_type', ''):
            return
        with Image.open(BytesIO(content)) as image:
            tag = image.getexif().get(ExifTags.Base.Orientation, 1)
        if tag == 1:
            return
        example = f'{info["img_path"]}: orientation {tag}'
        if info.get('seg_map_path'):
            self.error(
                'images that are turned by their orientation tag, their label maps not: load them '
                "with color_type='color_ignore_orientation', or write them turned",
                example,
            )
        elif info.get('instances'):
            self.warning(
                'images that are turned by their orientation tag: were they when they were annotated?',
                example,
            )

    def decode(
        self,
        what: str,
        path: str,
        flag: str,
        backend_args: dict | None,
        loader: Any = None,
    ) -> tuple[np.ndarray | None, bytes]:
        """Decode a file, or report an error and return None; also the bytes of the file.

        What Pillow does not know, such as images of five channels, ``loader`` loads, the first of the
        data set's own pipeline.
        """
        content = b''
        try:
            # Pillow refuses truncated files; OpenCV fills them up with grey.
            content = get(path, backend_args=backend_args)
            if getattr(loader, 'imdecode_backend', None) == 'tifffile':
                return loader(dict(img_path=path))['img'], content
            return mmcv.imfrombytes(content, flag=flag, backend='pillow'), content
        except Exception as error:  # Decoders raise anything.
            if isinstance(error, UnidentifiedImageError):
                with suppress(Exception):
                    return loader(dict(img_path=path))['img'], content
            why = _describe(error)
            if content.startswith(b'version https://git-lfs'):
                why = 'a pointer of Git LFS in place of the file, which "git lfs pull" brings'
            self.error(f'{what} that cannot be decoded', f'{path}: {why}')
            return None, content

    def check_heads(self) -> None:
        """Compare ``num_classes`` of all heads with the data."""
        heads = [
            *head_num_classes(self.cfg.get('model')),
            *head_num_classes(self.cfg.get('data_preprocessor'), 'data_preprocessor'),
        ]
        for name, num_classes in heads:
            if self.classes and num_classes != len(self.classes):
                self.error(
                    'num_classes that do not fit the data',
                    f'{name} is {num_classes}, the data set has {len(self.classes)} classes',
                )

    def compare_classes(self, other: _SplitInspection) -> None:
        """Report classes that differ from those of another split."""
        if self.classes and other.classes and list(self.classes) != list(other.classes):
            pairs = zip([*other.classes, None], [*self.classes, None])
            first = next(f'{theirs!r} and {mine!r}' for theirs, mine in pairs if theirs != mine)
            self.error(
                'classes that differ between splits', f'{other.split} and {self.split}: {first}'
            )

    def check_pipeline(self, dataset: BaseDataset) -> int:
        """Load a few samples with the pipeline; return how many succeed."""
        number, images = min(PIPELINE_SAMPLES, len(dataset)), []
        chosen = np.sort(self.rng.choice(len(dataset), number, replace=False))
        loaded = 0
        for i in self.track(chosen, 'pipeline'):
            try:
                sample = dataset[int(i)]
            except Exception as error:  # Pipelines raise anything.
                where = f'sample {i}, {_image_of(dataset, int(i))}: {_describe(error)}'
                self.error('samples that the pipeline cannot load', where)
                continue
            loaded += 1
            if self.show_dir is not None:
                self.draw(dataset, int(i), sample)
            if not isinstance(sample, dict) or 'inputs' not in sample:
                self.error(
                    "samples without 'inputs': end the pipeline with one such as PackDetInputs",
                    f'{i}: {list(sample) if isinstance(sample, dict) else type(sample).__name__}',
                )
            elif isinstance(sample['inputs'], Tensor):
                images.append(sample['inputs'])
        if self.split != 'train':
            try:
                batch_size = self.cfg[f'{self.split}_dataloader'].get('batch_size', 1)
                check_batch(self.split, batch_size, dataset, images)
            except ValueError as error:
                self.error('batches that cannot be evaluated', str(error))
        return loaded

    def draw(self, dataset: BaseDataset, i: int, sample: dict) -> None:
        """Draw a sample with its targets."""
        try:
            visualizer = build_visualizer(self.cfg.visualizer, dataset)
            picture = draw_targets(visualizer, sample)
            _, encoded = cv2.imencode('.png', np.ascontiguousarray(picture[..., ::-1]))
        except Exception as error:  # Visualizers raise anything.
            self.warning('samples that cannot be drawn', f'sample {i}: {_describe(error)}')
            return
        with atomic_file(Path(self.show_dir or '', f'{self.split}_{i}.png')) as part:
            part.write_bytes(encoded.tobytes())

    def check_evaluator(self, dataset: BaseDataset) -> None:
        """Evaluate the truth itself on a sample, and name images on which it is not perfect."""
        cfg = self.cfg[f'{self.split}_evaluator']
        number = len(dataset) if self.samples is None else min(self.samples, len(dataset))
        chosen = np.sort(self.rng.choice(len(dataset), number, replace=False)).tolist()
        if not chosen:
            return
        try:
            evaluator = build_evaluator(cfg, dataset)
            if evaluator is None:
                self.warning('evaluators not tried on the truth', str(cfg))
                return
            with self.status(f'evaluating the truth of {number} images'):
                short = shortfalls(score_truth(evaluator, dataset, chosen))
        except Exception as error:  # Metrics raise anything.
            self.error('evaluators that fail on the truth', _describe(error))
            return
        if not short:
            return
        worst = min(short.values())
        add = self.error if worst < NEARLY_PERFECT else self.warning
        kind = 'evaluations in which a perfect prediction is not perfect'
        add(kind, ', '.join(f'{key} {score:.1%}' for key, score in short.items()))
        for index in self.track(chosen[:LOOKED_AT], 'images at fault'):
            if shortfalls(score_truth(evaluator, dataset, [index])):
                add(kind, f'by {_image_of(dataset, index)}')


def _files_in(folder: str) -> set[str]:
    if not Path(folder).is_dir():
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}


def _type_name(part: dict) -> str:
    return part['type'].__name__ if isinstance(part['type'], type) else part['type']


def _sources(part: dict) -> str:
    """Where a data set looks for images."""
    keys = ('data_root', 'data_prefix', 'ann_file', 'img_suffix', 'seg_map_suffix', 'filter_cfg')
    return ', '.join(f'{key}={part[key]!r}' for key in keys if part.get(key))


def _image_of(dataset: BaseDataset, i: int) -> str:
    if not hasattr(dataset, 'get_data_info'):
        return 'of several images'  # Such as MultiImageMixDataset's.
    return str(dataset.get_data_info(i).get('img_path'))


def _describe(error: Exception) -> str:
    return f'{type(error).__name__}: {error}'.strip()
