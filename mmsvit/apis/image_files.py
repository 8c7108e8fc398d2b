"""Finding images on the command line, and reading those of strangers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
LONGEST = 20  # times the other side; resizing by a config's pipeline leaves nothing of more
FORMATS = ('JPEG', 'PNG', 'BMP', 'TIFF', 'WEBP', 'GIF')


class ImageError(ValueError):
    """An image that is not worked on; the text is for whoever gave it."""


def find_images(names: Sequence[str]) -> dict[Path, Path]:
    """The images that files, folders and glob patterns name, each once, in order.

    Args:
        names: Paths of files, of folders (the images directly in them), or patterns such as
            ``'photos/**/*.jpg'``.

    Returns:
        Each image, and its path within the folder: of a pattern, the folder that it begins with.

    Raises:
        FileNotFoundError: One of them names no image.
    """
    found: dict[Path, tuple[Path, Path]] = {}
    for name in names:
        path = Path(name)
        if path.is_file():
            folder, paths = path.parent, [path]
        elif path.is_dir():
            folder, paths = path, list(path.iterdir())
        else:
            # Up to the first part with a wildcard.
            fixed = list(itertools.takewhile(lambda part: not set(part) & set('*?['), path.parts))
            folder = Path(*fixed)
            pattern = str(path.relative_to(folder))
            paths = list(folder.glob(pattern)) if pattern != '.' else []
        images = [file for file in sorted(paths) if file == path or file.suffix.lower() in SUFFIXES]
        if not images:
            raise FileNotFoundError(
                f'{name!r} is no image, no folder with images and no pattern that finds any; looked '
                f'for {", ".join(SUFFIXES)}'
            )
        for image in images:
            found.setdefault(image.resolve(), (image, image.relative_to(folder)))
    return dict(found.values())


def read_image(path: str | Path, max_bytes: int, max_pixels: int) -> Image.Image:
    """Read an image that may be anything, as RGB, upright.

    Its size is read from its head, before memory is spent on its pixels.

    Args:
        path: The file, whatever it is called.
        max_bytes: The largest file to open.
        max_pixels: The most pixels to decode.

    Raises:
        ImageError: It is no image, a broken one, larger than allowed, too long and narrow, or
            has values of more than 16 bits.
    """
    size = Path(path).stat().st_size
    if size > max_bytes:
        raise ImageError(
            f'The file has {size / 1e6:.1f} MB. At most {max_bytes / 1e6:g} MB are read.'
        )
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    f'The image has {width} x {height} pixels, {width * height / 1e6:.1f} million. '
                    f'At most {max_pixels / 1e6:g} million are read: make it smaller.'
                )
            if max(width, height) > LONGEST * min(width, height):
                raise ImageError(
                    f'The image has {width} x {height} pixels. One side may be {LONGEST} times as '
                    'long as the other: cut out a part of it.'
                )
            return _eight_bits(ImageOps.exif_transpose(image)).convert('RGB')
    except Image.DecompressionBombError as error:
        raise ImageError(
            f'The image is too large: at most {max_pixels / 1e6:g} million pixels are read.'
        ) from error
    except (OSError, SyntaxError, EOFError) as error:
        raise ImageError(
            f'This is not an image that can be read, or a part of it is missing. Kinds that can be '
            f'read: {", ".join(FORMATS)}.'
        ) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """The upper half of 16 bits; PIL by itself makes all but the darkest of them white."""
    if image.mode.startswith('I;16'):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ('I', 'F'):
        raise ImageError(
            'The image has values of 32 bits, whose range is not known. Save it with 8 or 16 bits.'
        )
    return image
