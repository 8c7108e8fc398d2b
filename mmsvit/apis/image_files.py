"""Find images named on the command line, and read untrusted ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
LONGEST = 20  # maximum aspect ratio; a config's resizing would leave no shorter side
FORMATS = ('JPEG', 'PNG', 'BMP', 'TIFF', 'WEBP', 'GIF')


class ImageError(ValueError):
    """An image is not accepted; the message is for its user."""


def find_images(names: Sequence[str]) -> dict[Path, Path]:
    """The images named by files, folders and glob patterns, each once, in order.

    Args:
        names: Paths of files, of folders (the images directly in them), or patterns such as
            ``'photos/**/*.jpg'``.

    Returns:
        Each image, with its path relative to its folder or to the fixed start of its pattern.

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
            fixed = list(itertools.takewhile(lambda part: not set(part) & set('*?['), path.parts))
            folder = Path(*fixed)
            pattern = str(path.relative_to(folder))
            paths = list(folder.glob(pattern)) if pattern != '.' else []
        images = [file for file in sorted(paths) if file == path or file.suffix.lower() in SUFFIXES]
        if not images:
            raise FileNotFoundError(
                f'{name!r} is not an image and not a folder or pattern with images of supported '
                f'suffixes: {", ".join(SUFFIXES)}'
            )
        for image in images:
            found.setdefault(image.resolve(), (image, image.relative_to(folder)))
    return dict(found.values())


def read_image(path: str | Path, max_bytes: int, max_pixels: int) -> Image.Image:
    """Read an untrusted image as RGB, upright.

    Its size is read from its header, before memory is allocated for its pixels.

    Args:
        path: The file, with any suffix.
        max_bytes: Maximum size of the file.
        max_pixels: Maximum number of pixels.

    Raises:
        ImageError: The file is not an image, corrupt or incomplete, over a limit, too long and
            narrow, or has values of more than 16 bits.
    """
    size = Path(path).stat().st_size
    if size > max_bytes:
        raise ImageError(
            f'The file has {size / 1e6:.1f} MB. At most {max_bytes / 1e6:g} MB are allowed.'
        )
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    f'The image has {width} x {height} pixels, {width * height / 1e6:.1f} million. '
                    f'At most {max_pixels / 1e6:g} million are allowed: make it smaller.'
                )
            if max(width, height) > LONGEST * min(width, height):
                raise ImageError(
                    f'The image has {width} x {height} pixels. One side may be at most {LONGEST} '
                    'times as long as the other: crop it.'
                )
            return _eight_bits(ImageOps.exif_transpose(image)).convert('RGB')
    except Image.DecompressionBombError as error:
        raise ImageError(
            f'The image is too large: at most {max_pixels / 1e6:g} million pixels are allowed.'
        ) from error
    except (OSError, SyntaxError, EOFError) as error:
        raise ImageError(
            f'The file is not an image, or corrupt or incomplete. Supported formats: '
            f'{", ".join(FORMATS)}.'
        ) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """The upper 8 of 16 bits; PIL alone would clip nearly all values to white."""
    if image.mode.startswith('I;16'):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ('I', 'F'):
        raise ImageError(
            'The image has values of 32 bits, whose range is unknown. Save it with 8 or 16 bits.'
        )
    return image
