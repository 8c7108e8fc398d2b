"""Check the label maps of an MMSegmentation data set."""

from __future__ import annotations

from collections import Counter

import numpy as np
from mmengine.dataset import BaseDataset

from .report import DatasetReport


def check_label_map(
    report: DatasetReport,
    split: str,
    path: str,
    label_map: np.ndarray,
    image_size: tuple[int, int] | None,
    dataset: BaseDataset,
) -> Counter[int]:
    """Check one label map.

    Args:
        report: Takes what is wrong.
        split: For the report.
        path: File of the label map, for the report.
        label_map: As in the file, integers of shape ``(H, W)``.
        image_size: Height and width of its image; None if that could not be decoded.
        dataset: A ``BaseSegDataset``.

    Returns:
        The number of pixels of each value.
    """
    if label_map.squeeze().ndim != 2:
        shape = f'{path}: {label_map.shape[2]} channels'
        report.error(split, 'label maps in colour: a pixel must be the index of a class', shape)
        return Counter()
    height, width = label_map.shape[:2]
    if image_size is not None and image_size != (height, width):
        sizes = f'{path} is {width}x{height}, its image {image_size[1]}x{image_size[0]}'
        report.error(split, 'label maps of another size than their image', sizes)
    values, numbers = np.unique(label_map, return_counts=True)
    pixels = Counter(dict(zip(values.tolist(), numbers.tolist())))
    of_class, ignored = _meaning(dataset)
    if not of_class:
        return pixels
    wrong = sorted(pixels.keys() - of_class.keys() - ignored)
    if wrong:
        found = f'{path} has {wrong[:10]}, classes are {min(of_class)} to {max(of_class)}'
        also = f'ignored {sorted(ignored)}, reduce_zero_label={dataset.reduce_zero_label}'
        report.error(split, 'label maps with values of no class', f'{found}; {also}')
    elif not pixels.keys() & of_class.keys():
        report.warning(split, 'label maps without any class', path)
    return pixels


def check_all_pixels(
    report: DatasetReport, split: str, pixels: Counter[int], dataset: BaseDataset, complete: bool
) -> None:
    """Check the values of many label maps together.

    Args:
        report: Takes what is wrong.
        split: For the report.
        pixels: The number of pixels of each value, in all of them.
        dataset: A ``BaseSegDataset``.
        complete: Whether these are all label maps of the data set.
    """
    of_class, ignored = _meaning(dataset)
    if not of_class:
        return
    beyond = max(of_class) + 1
    if pixels[beyond] and beyond not in ignored and not dataset.reduce_zero_label:
        report.warning(
            split,
            'label maps that may count from 1',
            f'{len(of_class)} classes count from 0, but some pixels are {beyond}: if 0 is no '
            'class, set reduce_zero_label=True in the data set and in LoadAnnotations',
        )
    present = [name for value, name in of_class.items() if pixels[value]]
    left_out = sum(pixels[value] for value in ignored)
    if len(of_class) > 1 and len(present) == 1 and left_out:
        report.error(
            split,
            'label maps in which one class and ignored pixels are all there is',
            f'{present[0]}, and {left_out / pixels.total():.1%} ignored ({sorted(ignored)}): with one '
            'class nothing is learned; are other classes written as ignored values?',
        )
    if complete:
        for value, name in of_class.items():
            if not pixels[value]:
                report.warning(split, 'classes without pixels', f'{name} (value {value})')


def _meaning(dataset: BaseDataset) -> tuple[dict[int, str], set[int]]:
    """The class names by value in the files, and the ignored values."""
    classes = dataset.metainfo.get('classes') or ()
    # The data set has a label_map if the config names only some of its classes.
    label_map = dataset.label_map or {label: label for label in range(len(classes))}
    first = 1 if dataset.reduce_zero_label else 0
    of_class = {
        value + first: classes[label]
        for value, label in label_map.items()
        if label in range(len(classes))
    }
    ignored = {value + first for value in label_map} - of_class.keys() | {dataset.ignore_index}
    return of_class, ignored | {0} if dataset.reduce_zero_label else ignored
