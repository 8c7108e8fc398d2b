"""Predictions and pictures for the page of ``tools/demo_app.py``."""

from __future__ import annotations

import os
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..models.super_token_attention import SuperTokenAttention
from ..visualization.drawing import (
    SMALLEST_PICTURE,
    AttentionPoint,
    draw_attention_from,
    draw_ring,
    draw_super_tokens,
    fit,
)
from ..visualization.super_token_maps import SuperTokenMap, attention_layers
from .image_files import read_image
from .inference import ImageModel

LARGEST_PICTURE = 960  # pixels of the longer side


def drop_gradio_settings() -> None:
    """Remove gradio's environment variables, which could expose files of the server, or its visitors.

    gradio reads some of them when it is imported, so this comes before.
    """
    for name in [name for name in os.environ if name.startswith('GRADIO_')]:
        del os.environ[name]


@dataclass(frozen=True)
class DemoResult:
    """Predictions and super tokens of one image.

    Attributes:
        prediction: The image with the prediction drawn on it.
        found: See :meth:`ImageModel.describe_prediction`.
        seen: The input of the backbone, see :meth:`ImageModel.super_tokens`.
        maps: Super tokens of the last block of each stage.
    """

    prediction: np.ndarray
    found: list[tuple[str, str]]
    seen: np.ndarray
    maps: list[SuperTokenMap]


class Demo:
    """The model behind a page; safe to call from several threads.

    Args:
        model: The model, with its weights loaded.
        max_bytes: See :func:`read_image`.
        max_pixels: See :func:`read_image`.
    """

    def __init__(self, model: ImageModel, max_bytes: int, max_pixels: int) -> None:
        self.model = model
        self.max_bytes = max_bytes
        self.max_pixels = max_pixels
        self._lock = threading.Lock()

    @property
    def attentions(self) -> list[SuperTokenAttention]:
        """The last attention layer of each stage."""
        return [layers[-1] for layers in attention_layers(self.model.backbone)]

    def look(self, path: str | Path) -> DemoResult:
        """Run the model on a file.

        Raises:
            ImageError: See :func:`read_image`.
        """
        image = read_image(path, self.max_bytes, self.max_pixels)
        with tempfile.TemporaryDirectory() as folder, self._lock:
            file = Path(folder, 'image.png')
            image.save(file, compress_level=1)
            data = self.model.prepare(file)
            sample = self.model.predict(data)
            seen, maps = self.model.super_tokens(data, range(len(self.attentions)))
            prediction = self.model.draw_prediction(np.asarray(image), sample)
        found = self.model.describe_prediction(sample)
        return DemoResult(fit(prediction, _size(prediction)), found, seen, maps)

    def tessellations(self, look: DemoResult) -> list[list[np.ndarray]]:
        """For each stage, borders and mean colours of its super tokens if it has any."""
        size = _size(look.seen)
        return [
            [*draw_super_tokens(look.seen, each, size)] if each.has_super_tokens else []
            for each in look.maps
        ]

    def attention(
        self, look: DemoResult, pixel: tuple[float, float] | None = None
    ) -> list[np.ndarray]:
        """Attention from a point.

        Args:
            look: From :meth:`look`.
            pixel: Row and column in the first picture; by default the middle.

        Returns:
            The input of the backbone with a ring around the point, and attention in each stage.
        """
        picture = fit(look.seen, _size(look.seen))
        size = picture.shape[:2]
        point = AttentionPoint()
        if pixel is not None:
            y, x = (min(max(p / max(n - 1, 1), 0), 1) for p, n in zip(pixel, size))
            point = AttentionPoint(x, y)
        draw_ring(picture, point.pixel(size))
        stages = [
            draw_attention_from(look.seen, stage_map, point, max(size))[0]
            for stage_map in look.maps
        ]
        return [picture, *stages]


def _size(image: np.ndarray) -> int:
    return min(max(SMALLEST_PICTURE, *image.shape[:2]), LARGEST_PICTURE)
