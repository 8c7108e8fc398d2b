"""Draw super tokens: their borders, their mean colours, and attention from a point.

All pictures are RGB, uint8, ``(height, width, 3)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..models.mm_models import takes_rgb
from .super_token_maps import SuperTokenMap

SMALLEST_PICTURE = 640  # pixels of the longer side: smaller images are enlarged
TILE = 480  # pixels of the longer side of a picture on a sheet
COLUMN = 340  # minimum width in pixels of a picture's column, for the text below it
SUPERSAMPLING = 2  # smooths the borders
COLOUR_MAP = 'inferno'
TEXT = dict(family='DejaVu Sans', color='#222222', verticalalignment='center')
DPI = 100


@dataclass(frozen=True)
class AttentionPoint:
    """The point from which to draw attention, and which attention.

    Attributes:
        x: From the left edge (0) to the right edge (1) of the image.
        y: From the upper edge (0) to the lower edge (1).
        of: See :meth:`SuperTokenMap.attention_from`.
        head: See :meth:`SuperTokenMap.attention_from`.
    """

    x: float = 0.5
    y: float = 0.5
    of: str = 'pixel'
    head: int | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.x <= 1 and 0 <= self.y <= 1):
            raise ValueError(
                'x and y of a point must be fractions of width and height, from 0 to 1; found '
                f'x={self.x}, y={self.y}'
            )

    def pixel(self, image_size: tuple[int, int]) -> tuple[float, float]:
        """Row and column in an image of this height and width."""
        height, width = image_size
        return self.y * (height - 1), self.x * (width - 1)


def seen_image(preprocessor: nn.Module, normalised: Tensor, size: Sequence[int]) -> np.ndarray:
    """An input of the backbone as a picture, with its normalisation undone.

    Args:
        preprocessor: The model's ``data_preprocessor``.
        normalised: One image from the preprocessor, ``(3, H, W)``.
        size: Height and width of the image without its padding at the bottom and right.

    Raises:
        ValueError: The image does not have three channels.
    """
    if normalised.shape[0] != 3:
        raise ValueError(f'only images of 3 channels can be drawn, found {normalised.shape[0]}')
    image = normalised.detach().float().cpu()
    for name, combine in (('std', Tensor.mul), ('mean', Tensor.add)):
        if isinstance(getattr(preprocessor, name, None), Tensor):
            image = combine(image, getattr(preprocessor, name).reshape(3, 1, 1).cpu())
    pixels = image.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    if not takes_rgb(preprocessor):
        pixels = pixels[..., ::-1]
    return np.ascontiguousarray(pixels[: size[0], : size[1]])


def fit(image: np.ndarray, longer_side: int) -> np.ndarray:
    """Resize an image to a longer side of this many pixels."""
    scale = longer_side / max(image.shape[:2])
    size = [max(round(n * scale), 1) for n in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def draw_tessellation(image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw super tokens over an image.

    Args:
        image: The picture to draw on.
        labels: The super token of each pixel, integers, of an integer multiple of the image's
            size; a larger multiple gives smoother borders.

    Returns:
        The image with the borders of super tokens, and each super token in the mean colour of
        its pixels.
    """
    height, width = image.shape[:2]
    fine = cv2.resize(image, labels.shape[::-1], interpolation=cv2.INTER_LINEAR)
    _, flat = np.unique(labels, return_inverse=True)
    flat = flat.ravel()
    counts = np.bincount(flat)
    means = np.stack([np.bincount(flat, fine[..., c].ravel()) / counts for c in range(3)], axis=1)
    mosaic = means[flat].reshape(fine.shape).astype(np.float32)
    mosaic = cv2.resize(mosaic, (width, height), interpolation=cv2.INTER_AREA)

    border = np.zeros(labels.shape, np.uint8)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    # The shadow shows the borders on white.
    line = cv2.dilate(border, np.ones((2, 2), np.uint8)).astype(np.float32)
    shadow = cv2.GaussianBlur(line, (0, 0), 3)
    line, shadow = (
        cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA)[..., None]
        for mask in (line, shadow)
    )
    outlined = image * (1 - 0.45 * shadow)
    outlined = outlined * (1 - 0.9 * line) + 255 * 0.9 * line
    return outlined.round().astype(np.uint8), mosaic.round().astype(np.uint8)


def draw_attention(
    image: np.ndarray, weights: np.ndarray, point: tuple[float, float]
) -> tuple[np.ndarray, float]:
    """Draw attention over an image.

    Args:
        image: The picture to draw on.
        weights: Weight of each pixel, see :meth:`SuperTokenMap.attention_from`.
        point: Row and column of the ring to draw.

    Returns:
        The picture, and the weight of the brightest colour; black is 0.
    """
    top = max(float(np.quantile(weights, 0.998)), 1e-6)
    colours = matplotlib.colormaps[COLOUR_MAP](np.clip(weights / top, 0, 1))[..., :3] * 255
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    # Brightness shows the weights; the image only adds faint structure.
    picture = colours * (0.62 + 0.38 * grey / 255) + 0.16 * grey * (1 - colours / 255)
    picture = np.ascontiguousarray(picture.round().clip(0, 255).astype(np.uint8))
    draw_ring(picture, point)
    return picture, top


def draw_ring(picture: np.ndarray, point: tuple[float, float]) -> None:
    """Draw a ring around a point, (row, column), into a picture."""
    shift = 4  # fractional bits of a pixel
    centre = (round(point[1] * 2**shift), round(point[0] * 2**shift))
    radius = max(picture.shape[:2]) / 60
    for colour, width in (((20, 20, 20), radius / 1.6), ((255, 255, 255), radius / 3.6)):
        thickness = max(round(width), 1)
        cv2.circle(picture, centre, round(radius * 2**shift), colour, thickness, cv2.LINE_AA, shift)


def draw_super_tokens(
    image: np.ndarray, maps: SuperTokenMap, longer_side: int
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`draw_tessellation` of one layer's super tokens.

    Args:
        image: From :func:`seen_image`.
        maps: From :class:`SuperTokenRecorder`.
        longer_side: Longer side of the pictures in pixels.
    """
    picture = fit(image, longer_side)
    fine = tuple(SUPERSAMPLING * n for n in picture.shape[:2])
    labels = maps.hard_assignment(fine, image.shape[:2], smooth=True)
    return draw_tessellation(picture, labels.numpy())


def draw_attention_from(
    image: np.ndarray, maps: SuperTokenMap, point: AttentionPoint, longer_side: int
) -> tuple[np.ndarray, float]:
    """:func:`draw_attention` from a point; for arguments see :func:`draw_super_tokens`."""
    picture = fit(image, longer_side)
    image_size, size = image.shape[:2], picture.shape[:2]
    weights = maps.attention_from(point.pixel(image_size), point.of, point.head)
    weights = maps.to_pixels(weights, size, image_size)
    return draw_attention(picture, weights.numpy(), point.pixel(size))


def _caption(maps: SuperTokenMap) -> str:
    (h, w), (rows, columns), stride = maps.super_token_size, maps.grid, maps.stride
    if maps.has_super_tokens:
        what = f'{columns}x{rows} super tokens, each begun as {w}x{h} tokens ({w * stride}x'
        what += f'{h * stride} pixels)'
    else:
        what = f'each of {columns}x{rows} tokens is its own super token ({stride}x{stride} pixels)'
    return f'Stage {maps.stage + 1}, block {maps.block + 1} of {maps.num_blocks}: {what}'


class Sheet:
    """A white page with pictures and text at positions in pixels.

    Args:
        width: Width of the page in pixels.
        height: Height of the page in pixels.
    """

    def __init__(self, width: int, height: int) -> None:
        self.height = height
        self.figure = Figure((width / DPI, height / DPI), dpi=DPI, facecolor='white')
        self.canvas = FigureCanvasAgg(self.figure)

    def picture(self, picture: np.ndarray, x: int, y: int) -> None:
        """Place a picture with its upper left corner at x, y."""
        # figimage counts from the bottom.
        self.figure.figimage(picture, x, self.height - y - picture.shape[0], origin='upper')

    def text(self, text: str, x: int, y: int, size: float, **style: str) -> None:
        """Write a line that starts at x and is centred on y."""
        width = self.figure.get_figwidth() * DPI
        options: dict[str, Any] = {**TEXT, **style, 'fontsize': size}
        # A dollar in a file name does not start a formula.
        self.figure.text(x / width, 1 - y / self.height, text, parse_math=False, **options)

    def render(self) -> np.ndarray:
        """The page as a picture."""
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()


def super_token_sheet(
    image: np.ndarray,
    maps: Sequence[SuperTokenMap],
    point: AttentionPoint | None = AttentionPoint(),
    title: str = '',
    note: str = '',
) -> np.ndarray:
    """Draw the super tokens of an image on one sheet, with a row for each stage.

    Args:
        image: From :func:`seen_image`.
        maps: From :class:`SuperTokenRecorder`.
        point: The point from which to draw attention; None for no attention.
        title: First line.
        note: Second line, such as the name of the checkpoint.
    """
    margin, gap, head, caption, bar = 28, 14, 74, 40, 34
    tile = fit(image, TILE)
    if point is not None:
        draw_ring(tile, point.pixel(tile.shape[:2]))
    height, width = tile.shape[:2]
    row = caption + height + bar
    column = max(width, COLUMN)
    count = 3 if point is None else 4
    sheet = Sheet(
        2 * margin + count * column + (count - 1) * gap, head + len(maps) * row + margin // 2
    )
    sheet.text(title, margin, 30, 15, weight='bold')
    sheet.text(note, margin, 56, 9.5, color='#666666')
    columns = [margin + i * (column + gap) for i in range(count)]
    for i, stage_map in enumerate(maps):
        borders, colours = draw_super_tokens(image, stage_map, TILE)
        top = head + i * row
        sheet.text(_caption(stage_map), margin, top + caption // 2 + 2, 11)
        names = ('what the network sees', 'super tokens', 'their mean colours')
        for x, picture in zip(columns, (tile, borders, colours)):
            sheet.picture(picture, x, top + caption)
        for x, name in zip(columns, names):
            sheet.text(name, x, top + caption + height + bar // 2, 9.5, color='#666666')
        if point is not None:
            attention, most = draw_attention_from(image, stage_map, point, TILE)
            sheet.picture(attention, columns[3], top + caption)
            _colour_bar(sheet, columns[3], top + caption + height + bar // 2, column, most)
    return sheet.render()


def _colour_bar(sheet: Sheet, x: int, y: int, width: int, top: float) -> None:
    """Draw the legend of the colours of attention, in one line below the picture."""
    length, thickness, end = round(0.18 * width), 10, x + width - 88
    ramp = matplotlib.colormaps[COLOUR_MAP](np.linspace(0, 1, length))[None, :, :3] * 255
    ramp = np.repeat(ramp, thickness, axis=0).round().astype(np.uint8)
    sheet.text('attention from the marker', x, y, 9.5, color='#666666')
    sheet.text('0', end - length - 8, y, 9.5, color='#666666', ha='right')
    sheet.picture(ramp, end - length, y - thickness // 2)
    sheet.text(f'{top:.3g}x mean', end + 8, y, 9.5, color='#666666')
