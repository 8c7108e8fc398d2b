"""Pictures of super tokens: which part of an image each of them stands for."""

from __future__ import annotations

from contextlib import ExitStack

import cv2
import numpy as np
import torch
from torch import Tensor

from .super_token_attention import SuperTokenAttention
from .svit import SViT

SHEET_CAPTION = 28
"""Height in pixels of the caption above each row of a super token sheet."""


def hard_assignment(attention: SuperTokenAttention, tokens: Tensor) -> Tensor:
    """The super token that each token belongs to most.

    Args:
        attention: A layer that samples super tokens.
        tokens: Its input, ``(N, H, W, C)``.

    Returns:
        Numbers of super tokens, counted row by row over the grid, int64 ``(N, H, W)``.
    """
    _, association = attention.sample(tokens)
    n, grid_h, grid_w, _, _ = association.shape
    h, w = attention.super_token_size
    around = torch.arange(-1, 2, device=tokens.device)
    rows = torch.arange(grid_h, device=tokens.device)[:, None, None] + around.repeat_interleave(3)
    columns = torch.arange(grid_w, device=tokens.device)[:, None] + around.repeat(3)
    inside = (rows >= 0) & (rows < grid_h) & (columns >= 0) & (columns < grid_w)
    numbers = (rows * grid_w + columns).expand(n, -1, -1, -1)
    nearest = association.masked_fill(~inside[None, ..., None], -1).argmax(dim=3)
    labels = numbers.gather(-1, nearest).reshape(n, grid_h, grid_w, h, w)
    labels = labels.transpose(2, 3).reshape(n, grid_h * h, grid_w * w)
    return labels[:, : tokens.shape[1], : tokens.shape[2]]


@torch.no_grad()
def tessellate(backbone: SViT, images: Tensor) -> dict[int, Tensor]:
    """Run the backbone and see how its stages divide the images into super tokens.

    Args:
        backbone: In evaluation mode.
        images: Normalised images, ``(N, C, H, W)``.

    Returns:
        For each stage (counted from 0) with super tokens, :func:`hard_assignment` of its
        last block.
    """
    labels: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for i, stage in enumerate(backbone.stages):
            attention = stage.blocks[-1].attn
            if attention.samples:

                def record(module, inputs, i=i):
                    labels[i] = hard_assignment(module, inputs[0])

                hooks.callback(attention.register_forward_pre_hook(record).remove)
        backbone(images)
    return labels


def draw_tessellation(image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw super tokens over an image.

    Args:
        image: uint8 ``(H, W, 3)``.
        labels: The super token of each pixel, integers ``(H, W)``.

    Returns:
        Two uint8 pictures of ``(H, W, 3)``: the image with the borders between super
        tokens, and every super token in the mean colour of its pixels.
    """
    _, flat = np.unique(labels, return_inverse=True)
    flat = flat.ravel()
    counts = np.bincount(flat)
    means = np.stack(
        [np.bincount(flat, image[..., c].ravel()) / counts for c in range(image.shape[2])], axis=1
    )
    mosaic = means[flat].reshape(image.shape).round().astype(np.uint8)
    border = np.zeros(labels.shape, bool)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    outlined = image.copy()
    outlined[border] = 255
    return outlined, mosaic


def super_token_sheet(
    image: np.ndarray, labels: dict[int, Tensor], image_size: tuple[int, int], height: int = 360
) -> np.ndarray:
    """One picture of an image's super tokens: a row for each stage.

    Args:
        image: uint8 ``(H, W, 3)``.
        labels: Of one image, from :func:`tessellate`, each ``(tokens high, tokens wide)``.
        image_size: Height and width of the input that the labels are of, in pixels of
            ``image``: with the padding at its bottom and right.
        height: Height of each image in the sheet, in pixels.

    Returns:
        uint8 ``(height of the sheet, width, 3)``: image, borders, mean colours.
    """
    width = round(image.shape[1] * height / image.shape[0])
    large = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    scale = height / image.shape[0]
    rows = []
    for stage, stage_labels in sorted(labels.items()):
        padded = (round(image_size[1] * scale), round(image_size[0] * scale))
        pixels = cv2.resize(
            stage_labels.cpu().numpy().astype(np.int32).astype(np.float32),
            padded,
            interpolation=cv2.INTER_NEAREST,
        ).astype(np.int64)[:height, :width]
        outlined, mosaic = draw_tessellation(large, pixels)
        caption = np.full((SHEET_CAPTION, 3 * width, 3), 255, np.uint8)
        text = f'stage {stage + 1}: {len(np.unique(pixels))} super tokens'
        cv2.putText(
            caption, text, (6, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (40, 40, 40), 1, cv2.LINE_AA
        )
        rows += [caption, np.hstack([large, outlined, mosaic])]
    return np.vstack(rows)
