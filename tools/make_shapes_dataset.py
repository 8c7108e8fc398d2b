"""Generate a small data set for any of the tasks, with nothing to download.

Circles, squares, triangles, stars and rings of any size and angle on textured backgrounds.
Each class keeps to a range of hues. They overlap; the masks are those of the visible parts.
Annotations are a COCO file and label maps (0 is the background). The same seed gives the same
files.

    python tools/make_shapes_dataset.py data/shapes
    python tools/make_shapes_dataset.py data/shapes_classification --task classification
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from rich.progress import track

CLASSES = ('circle', 'square', 'triangle', 'star', 'ring')
ALL_LABELS = range(len(CLASSES))
FORMAT = 2  # of the files; one more when they change
MIN_VISIBLE_PIXELS = 40
MIN_VISIBLE_SHARE = 0.3
SUPERSAMPLING = 4


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('out', type=Path, help='folder to write, for example data/shapes')
    parser.add_argument(
        '--task',
        choices=['detection', 'classification'],
        default='detection',
        help='detection: a COCO file and label maps, for segmentation as well; classification: '
        'a folder of images for each class, with one shape in an image',
    )
    parser.add_argument('--num-train', type=int, default=800, help='training images')
    parser.add_argument('--num-val', type=int, default=100, help='validation images')
    parser.add_argument('--size', type=int, default=160, help='image height and width in pixels')
    parser.add_argument('--max-shapes', type=int, default=6, help='most shapes in an image')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--overwrite', action='store_true', help='replace a data set that is already there'
    )
    args = parser.parse_args()
    for name, least in (('num_train', 1), ('num_val', 1), ('size', 48), ('max_shapes', 1)):
        if getattr(args, name) < least:
            parser.error(f'--{name.replace("_", "-")} must be {least} or more')
    return args


def shape_mask(name: str, center: np.ndarray, radius: float, angle: float, size: int) -> np.ndarray:
    """Coverage of each pixel by a shape, float32 in [0, 1], shape (size, size)."""
    canvas = np.zeros((size * SUPERSAMPLING, size * SUPERSAMPLING), np.uint8)
    center, radius = center * SUPERSAMPLING, radius * SUPERSAMPLING
    if name in ('circle', 'ring'):
        point = tuple(int(v) for v in center.round())
        cv2.circle(canvas, point, round(radius), 255, thickness=-1)
        if name == 'ring':
            cv2.circle(canvas, point, round(radius * 0.55), 0, thickness=-1)
    else:
        count = {'triangle': 3, 'square': 4, 'star': 10}[name]
        angles = np.arange(count) * 2 * np.pi / count
        radii = np.where(np.arange(count) % 2, 0.42, 1.0) if name == 'star' else 1.0
        corners = np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)
        cos, sin = np.cos(angle), np.sin(angle)
        corners = corners @ np.array([[cos, sin], [-sin, cos]]) * radius + center
        cv2.fillPoly(canvas, [corners.round().astype(np.int32)], 255)
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth noise between two dull colours, with stripes or without, float32 (size, size, 3)."""
    cells = int(rng.integers(2, 9))
    noise = rng.random((cells, cells)).astype(np.float32)
    field = cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    if rng.random() < 0.5:
        y, x = np.mgrid[:size, :size]
        angle, period = rng.uniform(0, np.pi), rng.uniform(6, 24)
        stripes = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period)
        field = 0.6 * field + 0.2 * (stripes + 1)
    field = np.clip(field, 0, 1)[..., None].astype(np.float32)
    grey = rng.uniform(30, 225)
    first, second = grey + rng.uniform(-35, 35, (2, 3)).astype(np.float32)
    return first * field + second * (1 - field)


def class_colour(rng: np.random.Generator, label: int) -> np.ndarray:
    """A strong colour around the hue of a class, as things of a kind look alike; BGR (3,)."""
    hue = (label * 360 / len(CLASSES) + rng.uniform(-18, 18)) % 360
    hsv = np.array([[[hue, rng.uniform(0.5, 1.0), rng.uniform(0.55, 1.0)]]], np.float32)
    return 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0]


def draw_image(
    rng: np.random.Generator, size: int, max_shapes: int, labels: Sequence[int] = ALL_LABELS
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Draw one image, with shapes of the classes ``labels``.

    Returns:
        The image, uint8 ``(size, size, 3)`` in BGR, and for each visible shape its class
        index and boolean mask of ``(size, size)``, from back to front.
    """
    image = texture(rng, size)
    shapes: list[tuple[int, np.ndarray, int]] = []
    for _ in range(rng.integers(1, max_shapes + 1)):
        label = int(labels[rng.integers(len(labels))])
        radius = size * rng.uniform(0.11, 0.22)
        center = rng.uniform(radius * 0.5, size - radius * 0.5, 2)
        coverage = shape_mask(CLASSES[label], center, radius, rng.uniform(0, 2 * np.pi), size)
        paint = class_colour(rng, label)
        if rng.random() < 0.5:
            paint = 0.7 * paint + 0.3 * texture(rng, size)
        image = image * (1 - coverage[..., None]) + paint * coverage[..., None]
        mask = coverage >= 0.5
        shapes = [(other, visible & ~mask, area) for other, visible, area in shapes]
        shapes.append((label, mask, int(mask.sum())))
    image += rng.normal(0, rng.uniform(2, 8), image.shape)
    visible = [
        (label, mask)
        for label, mask, area in shapes
        if mask.sum() >= max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE * area)
    ]
    return np.clip(image, 0, 255).astype(np.uint8), visible


def generators(args: argparse.Namespace, split: str) -> Iterator[tuple[int, np.random.Generator]]:
    """The number of each image of a split and a generator for it, with a progress bar.

    No image is in both splits, and none depends on how many others there are.
    """
    count = {'train': args.num_train, 'val': args.num_val}[split]
    for i in track(range(count), description=f'{split:>5}'):
        yield i, np.random.default_rng((args.seed, ('train', 'val').index(split), i))


def write_image(file: Path, image: np.ndarray) -> None:
    """Write a JPEG; raise OSError if that fails."""
    if not cv2.imwrite(str(file), image, [cv2.IMWRITE_JPEG_QUALITY, 95]):
        raise OSError(f'cannot write {file}')


def make_split(args: argparse.Namespace, split: str) -> None:
    """Write the images, label maps and COCO file of one split."""
    label_maps = args.out / 'annotations' / f'semantic_{split}'
    for folder in (args.out / split, label_maps):
        folder.mkdir(parents=True)
    images, annotations = [], []
    for i, rng in generators(args, split):
        image, shapes = draw_image(rng, args.size, args.max_shapes)
        name = f'{i:06d}.jpg'
        write_image(args.out / split / name, image)
        images.append(dict(id=i + 1, file_name=name, height=args.size, width=args.size))
        label_map = np.zeros((args.size, args.size), np.uint8)
        for label, mask in shapes:
            label_map[mask] = label + 1
            rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotation = dict(
                id=len(annotations) + 1,
                image_id=i + 1,
                category_id=label + 1,
                segmentation=dict(size=rle['size'], counts=rle['counts'].decode()),
                area=int(coco_mask.area(rle)),
                bbox=coco_mask.toBbox(rle).tolist(),  # x, y, width, height
                iscrowd=0,
            )
            annotations.append(annotation)
        cv2.imwrite(str(label_maps / f'{i:06d}.png'), label_map)
    data = dict(
        info=dict(description='generated shapes', seed=args.seed),
        images=images,
        annotations=annotations,
        categories=[dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)],
    )
    (args.out / 'annotations' / f'instances_{split}.json').write_text(json.dumps(data))


def make_class_folders(args: argparse.Namespace, split: str) -> None:
    """Write the images of one split for classification, as many of each class as of another."""
    for name in CLASSES:  # All, even if one stays empty: the folders number the classes.
        (args.out / split / name).mkdir(parents=True)
    for i, rng in generators(args, split):
        label, shapes = i % len(CLASSES), []
        while not shapes:  # A shape too small to count is drawn again.
            image, shapes = draw_image(rng, args.size, max_shapes=1, labels=[label])
        write_image(args.out / split / CLASSES[label] / f'{i:06d}.jpg', image)


def main() -> None:
    args = parse_args()
    settings = {key: value for key, value in vars(args).items() if key not in ('out', 'overwrite')}
    settings['format'] = FORMAT
    settings_file = args.out / 'settings.json'
    if settings_file.is_file() and json.loads(settings_file.read_text()) == settings:
        print(f'{args.out} is there already, with the same settings')
        return
    if args.out.exists() and any(args.out.iterdir()):
        if not args.overwrite:
            raise SystemExit(
                f'{args.out} is not empty and was not made with these settings; '
                'name another folder, or --overwrite to replace it'
            )
        shutil.rmtree(args.out)
    make = {'detection': make_split, 'classification': make_class_folders}[args.task]
    make(args, 'train')
    make(args, 'val')
    # Written last: a run that was broken off does not pass for a whole data set.
    settings_file.write_text(json.dumps(settings))
    print(f'wrote {args.num_train} training and {args.num_val} validation images to {args.out}')


if __name__ == '__main__':
    main()
