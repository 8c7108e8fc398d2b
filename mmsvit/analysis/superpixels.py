"""Do regions follow the borders of things? The measures of the superpixel literature.

Stutz, Hermans, Leibe: Superpixels: An Evaluation of the State-of-the-Art, CVIU 2018.
"""

from __future__ import annotations

import cv2
import numpy as np


def borders(labels: np.ndarray, ignore: int | None = None) -> np.ndarray:
    """Pixels with another label to the right of or below them, or to the left of or above.

    Args:
        labels: Integers, ``(H, W)``.
        ignore: A label whose own borders do not count.

    Returns:
        Bool, ``(H, W)``.
    """
    found = np.zeros(labels.shape, bool)
    for one, other in (
        (np.s_[:, :-1], np.s_[:, 1:]),
        (np.s_[:-1], np.s_[1:]),
    ):
        differ = labels[one] != labels[other]
        if ignore is not None:
            differ &= (labels[one] != ignore) & (labels[other] != ignore)
        found[one] |= differ
        found[other] |= differ
    return found


def boundary_recall(regions: np.ndarray, truth: np.ndarray, ignore: int) -> float:
    """The share of the truth's border pixels with a region's border nearby.

    Nearby is within 0.25 % of the image's diagonal, rounded, in rows and columns.

    Args:
        regions: The region of each pixel, integers, ``(H, W)``.
        truth: The label of each pixel, integers, ``(H, W)``.
        ignore: The label that means nothing.

    Returns:
        From 0 to 1; NaN if the truth has no borders.
    """
    radius = round(0.0025 * float(np.hypot(*truth.shape)))
    wanted = borders(truth, ignore)
    kernel = np.ones((2 * radius + 1,) * 2, np.uint8)
    near = cv2.dilate(borders(regions).astype(np.uint8), kernel)
    return float(near[wanted].mean()) if wanted.any() else float('nan')


def achievable_accuracy(regions: np.ndarray, truth: np.ndarray, ignore: int) -> float:
    """The accuracy of giving each region the label that most of its pixels have.

    Args:
        regions: The region of each pixel, integers from 0, ``(H, W)``.
        truth: The label of each pixel, integers from 0, ``(H, W)``.
        ignore: The label that means nothing; its pixels do not count.

    Returns:
        From 0 to 1; NaN if all pixels are ignored.
    """
    known = truth != ignore
    if not known.any():
        return float('nan')
    size = int(truth.max()) + 1
    pairs = regions[known].astype(np.int64) * size + truth[known]
    counts = np.bincount(pairs, minlength=(int(regions.max()) + 1) * size).reshape(-1, size)
    return float(counts.max(1).sum() / known.sum())


def grid(shape: tuple[int, int], cell: tuple[int, int]) -> np.ndarray:
    """Plain cells in place of regions.

    Args:
        shape: Height and width of the image.
        cell: Height and width of a cell in pixels.
    """
    rows, columns = (np.arange(n) // side for n, side in zip(shape, cell))
    return rows[:, None] * (columns[-1] + 1) + columns


def grid_of(shape: tuple[int, int], number: int) -> np.ndarray:
    """A grid of about as many cells, nearly squares.

    Args:
        shape: Height and width of the image.
        number: How many cells; the grid has the nearest number that rows and columns give.
    """
    height, width = shape
    rows = max(round((number * height / width) ** 0.5), 1)
    columns = max(round(number / rows), 1)
    return grid(shape, (-(-height // rows), -(-width // columns)))
