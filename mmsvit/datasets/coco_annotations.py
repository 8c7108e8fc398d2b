"""Check annotation files in COCO format."""

from __future__ import annotations

import gc
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .report import DatasetReport

OUTSIDE_TOLERANCE = 1.0  # pixels: annotation tools round, also those of COCO
LARGEST = 2.0**53  # Beyond, floats, and so pycocotools, do not know every whole number.
POLYGONS = re.compile(rb'("segmentation"\s*:\s*)\[\s*(?:\[[-+0-9.eE,\s]+\][\s,]*)+\]')


def check_coco_annotations(
    report: DatasetReport,
    split: str,
    content: dict,
    classes: Sequence[str] | None,
    with_mask: bool,
    evaluated: Collection[str] = (),
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Check every image, category and annotation of a file.

    Args:
        report: Takes what is wrong.
        split: For the report.
        content: The file as read, with lists ``images``, ``categories``, ``annotations``.
        classes: Those of the config; None for all of the file.
        with_mask: Whether the pipeline loads masks, which every object then needs.
        evaluated: What is evaluated against this file, such as ``'bbox'`` and ``'segm'``.
        progress: Wraps the loop over the annotations.
    """
    absent = [key for key in ('images', 'categories') if not content.get(key)]
    if absent:
        report.error(split, 'annotation files with an empty list', ', '.join(absent))
        return
    images = _check_images(report, split, content['images'])
    for key in ('id', 'name'):
        for value in _repeated(category[key] for category in content['categories']):
            report.error(split, f'categories with the same {key}', str(value))
    names = {category['id']: category['name'] for category in content['categories']}
    if 'annotations' not in content and split == 'test':
        return  # as for COCO's test-dev
    annotations = content.get('annotations', [])
    if any('segments_info' in ann for ann in annotations[:1]):
        return  # panoptic: the objects are in label maps
    for value in _repeated(ann.get('id') for ann in annotations):
        report.error(split, 'annotations with the same id', f'id {value}')

    objects: Counter = Counter()
    occupied, off = set(), 0
    for ann in progress(annotations):
        image = images.get(ann.get('image_id'))
        objects[names.get(ann.get('category_id'))] += 1
        occupied.add(ann.get('image_id'))
        for kind in evaluation_problems(ann, evaluated):
            report.error(split, kind, _describe(ann, image))
        for level, kind in _annotation_problems(ann, image, names, with_mask):
            off += kind in (NO_AREA, OUTSIDE, REACHES_OUT)
            add = report.error if level == 'error' else report.warning
            add(split, kind, _describe(ann, image))
    if off > len(annotations) / 2:
        report.error(
            split,
            'wrong formats of boxes',
            f'{off:,} of {len(annotations):,} boxes have no area or exceed their image: a box must '
            'be [x, y, width, height] in pixels, not two corners and not relative to the image',
        )
    check_use(report, split, objects, set(names.values()), classes)
    for key, image in images.items():
        if key not in occupied:
            report.warning(split, 'images without objects', image.get('file_name', f'image {key}'))


def evaluation_problems(ann: dict, evaluated: Collection[str]) -> Iterator[str]:
    """What pycocotools fails on, or passes over, when it evaluates against an annotation.

    Args:
        ann: One annotation.
        evaluated: Kinds of evaluation, such as ``'bbox'`` and ``'segm'``.
    """
    if not evaluated:
        return
    if type(ann.get('id')) is not int or not 0 < abs(ann['id']) < LARGEST:
        yield (
            'annotations without a whole number above 0 as id: pycocotools counts a match with id 0 '
            'as none, so count from 1'
        )
    if ann.get('iscrowd') not in (0, 1):
        yield 'annotations without iscrowd, which evaluation reads: set it to 0'
    if 'segm' not in evaluated:
        return
    mask = ann.get('segmentation')
    if isinstance(mask, dict):
        good = bool(mask.get('counts')) and bool(mask.get('size'))
    else:
        # pycocotools takes four numbers for a box, and looks at the first polygon alone.
        parts = mask if isinstance(mask, list) else []
        good = bool(parts) and all(isinstance(part, list) for part in parts) and len(parts[0]) >= 6
    if not good:
        yield (
            'segmentations that evaluation cannot read: it needs RLE with counts and size, or '
            'polygons, the first of three points or more'
        )


def read_annotations(ann_file: str | Path, with_polygons: bool = True) -> dict:
    """Read a file in COCO format as pycocotools does, and refuse what it would fail on.

    Args:
        ann_file: A file on this machine.
        with_polygons: Whether to read polygons, or only that there are some (as ``[1]``), which takes
            half the time and memory.

    Raises:
        ValueError: It is no JSON, or none in UTF-8; the message does not name the file.
        OSError: It cannot be read.
    """
    content = Path(ann_file).read_bytes()
    if content.startswith((b'\xef\xbb\xbf', b'\xff\xfe', b'\xfe\xff')):
        raise ValueError(
            'it begins with a byte order mark, which pycocotools does not read: save it as UTF-8 '
            'without one'
        )
    if not with_polygons:
        content = POLYGONS.sub(rb'\1[1]', content)
    text = content.decode()
    del content
    collects = gc.isenabled()
    gc.disable()  # Millions of small objects, none of them garbage: to look for it doubles the time.
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError('its lists are nested too deeply') from None
    finally:
        if collects:
            gc.enable()
    if not isinstance(found, dict):
        raise ValueError(f'expected an object, found {type(found).__name__}')
    return found


@dataclass
class CocoSummary:
    """What the checks before a run need to know of a file in COCO format.

    Attributes:
        names: Of the categories.
        annotations: Their number.
        left_out: The number of boxes that MMDetection skips, and of images without objects, by kind.
        without_mask: The number of objects that are used and have no segmentation.
        bad_truth: By kind of evaluation, ``'bbox'`` and ``'segm'``, what it would fail on or pass
            over: kind of problem, and the ids of the annotations with it.
    """

    names: list[str]
    annotations: int
    left_out: Counter[str] = field(default_factory=Counter)
    without_mask: int = 0
    bad_truth: dict[str, dict[str, list]] = field(default_factory=dict)


def summarise(content: dict, evaluated: bool = True) -> CocoSummary:
    """Look at every annotation, quickly.

    Args:
        content: A file in COCO format, as :func:`read_annotations` gives it.
        evaluated: Whether to look for what an evaluation would fail on, which needs polygons.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: It is not in that format.
    """
    images = {image['id']: image for image in content['images']}
    names = [category['name'] for category in content['categories']]
    summary = CocoSummary(names, len(content.get('annotations', ())))
    for name in (*names, *(image['file_name'] for image in images.values())):
        if not name.isascii():
            _check_text(name)
    occupied = set()
    for ann in content.get('annotations', ()):
        image_id = ann['image_id']
        for kind in ('bbox', 'segm') if evaluated else ():
            for what in evaluation_problems(ann, (kind,)):
                summary.bad_truth.setdefault(kind, {}).setdefault(what, []).append(ann.get('id'))
        if not _is_used(ann, images.get(image_id), summary.left_out):
            continue
        occupied.add(image_id)
        if not ann.get('segmentation') and not ann.get('ignore'):
            summary.without_mask += 1
    if len(images) > len(occupied):
        summary.left_out[WITHOUT_OBJECTS] = len(images) - len(occupied)
    return summary


def _check_text(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f'{name!r} is no valid text, so no file or class has that name') from None


def _is_used(ann: dict, image: dict | None, left_out: Counter[str]) -> bool:
    """Whether MMDetection uses a box; those that it leaves out are counted."""
    if image is None or not image.get('width'):
        return False
    box: Any = ann.get('bbox')
    area = ann.get('area', 1)
    try:
        x, y, width, height = box
        in_image = 0 <= x < image['width'] and 0 <= y < image['height']
        if in_image and 1 <= width < LARGEST and 1 <= height < LARGEST and area > 0:
            return True  # Nearly all.
    except (TypeError, ValueError):
        return False
    if not _is_box(box):
        return False
    kinds = {kind for _, kind in _box_problems(box, area, image)} & {NO_AREA, OUTSIDE}
    left_out.update(kinds)
    return not kinds


WITHOUT_OBJECTS = 'images without objects; used only if filter_empty_gt=False'
NO_AREA = 'boxes without area, skipped by MMDetection'
OUTSIDE = 'boxes outside the image, skipped by MMDetection'
REACHES_OUT = 'boxes partly outside the image'


def _repeated(values: Iterable) -> list:
    return [value for value, count in Counter(values).items() if count > 1]


def _check_images(report: DatasetReport, split: str, images: list[dict]) -> dict:
    """Check the list of images, and return the valid ones by id."""
    for value in _repeated(image['id'] for image in images if 'id' in image):
        report.error(split, 'images with the same id', f'id {value}')
    for value in _repeated(image['file_name'] for image in images if 'file_name' in image):
        report.warning(split, 'images with the same file_name', value)
    by_id = {}
    for image in images:
        size = (image.get('width'), image.get('height'))
        if 'id' not in image or not all(isinstance(v, (int, float)) and v > 0 for v in size):
            name = image.get('file_name', image.get('id'))
            report.error(split, 'images without id, width or height', f'{name}: {size}')
        else:
            by_id[image['id']] = image
    return by_id


def _annotation_problems(
    ann: dict, image: dict | None, names: dict, with_mask: bool
) -> Iterator[tuple[str, str]]:
    """Level and kind of each problem of one annotation."""
    if ann.get('category_id') not in names:
        yield 'error', 'annotations of unknown categories'
    if image is None:
        yield 'error', 'annotations of unknown images'
        return
    box: Any = ann.get('bbox')
    if not _is_box(box) or not isinstance(ann.get('area'), (int, float)):
        yield 'error', 'annotations whose bbox is not four numbers, or without area'
        return
    yield from _box_problems(box, ann['area'], image)
    if with_mask:
        yield from _mask_problems(ann.get('segmentation'), image)


def _is_box(box: object) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(v, (int, float)) and abs(v) < LARGEST for v in box)
    )


def _box_problems(box: list[float], area: float, image: dict) -> Iterator[tuple[str, str]]:
    # As CocoDataset.parse_data_info of MMDetection, which skips the first two silently.
    x, y, width, height = box
    if width < 1 or height < 1 or area <= 0:
        yield 'warning', NO_AREA
    elif x >= image['width'] or y >= image['height'] or x + width <= 0 or y + height <= 0:
        yield 'warning', OUTSIDE
    elif (
        min(x, y) < -OUTSIDE_TOLERANCE
        or x + width > image['width'] + OUTSIDE_TOLERANCE
        or y + height > image['height'] + OUTSIDE_TOLERANCE
    ):
        yield 'warning', REACHES_OUT


def _mask_problems(segmentation: Any, image: dict) -> Iterator[tuple[str, str]]:
    if not segmentation:
        yield 'error', 'annotations without segmentation, which the pipeline loads'
    elif isinstance(segmentation, dict):
        if not segmentation.get('counts'):
            yield 'error', 'segmentations as RLE without counts'
        elif segmentation.get('size') != [image['height'], image['width']]:
            yield 'error', 'segmentations as RLE of another size than their image'
    elif not all(isinstance(polygon, list) for polygon in segmentation):
        yield 'error', 'segmentations that are neither RLE nor a list of polygons'
    elif not any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in segmentation):
        yield 'warning', 'segmentations without a polygon of three points, which are ignored'


def _describe(ann: dict, image: dict | None) -> str:
    where = f'annotation {ann.get("id")}'
    if image is None:
        return f'{where}: image_id {ann.get("image_id")}'
    name = image.get('file_name', f'image {image["id"]}')
    return (
        f'{name} ({image["width"]}x{image["height"]}): {where}, category_id '
        f'{ann.get("category_id")}, bbox {ann.get("bbox")}'
    )


def check_use(
    report: DatasetReport,
    split: str,
    objects: Counter,
    names: set[str],
    classes: Sequence[str] | None,
) -> None:
    """Check which classes have objects, and which objects have a class.

    Args:
        report: Takes what is wrong.
        split: For the report.
        objects: Their number by class name.
        names: All classes of the data.
        classes: Those of the config; None for all.
    """
    used = names if classes is None else names & set(classes)
    if not any(objects[name] for name in used):
        report.error(split, 'data sets without objects', f'none of {len(used)} classes has one')
        return
    for name in sorted(used):
        if not objects[name]:
            report.warning(split, 'classes without objects', name)
    for name in sorted(names - used):
        report.warning(
            split,
            'categories that are no classes of the config, so skipped',
            f'{name}: {objects[name]:,} annotations',
        )
