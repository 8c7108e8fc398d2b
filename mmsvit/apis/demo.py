"""What the page of ``tools/demo_app.py`` shows of an image, without the page."""

from __future__ import annotations

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


@dataclass(frozen=True)
class DemoResult:
    """What a model makes of an image.

    Attributes:
        prediction: The image with the prediction drawn.
        found: Names and figures, see :meth:`ImageModel.describe_prediction`.
        seen: The image as the backbone got it.
        maps: Of the last block of each stage.
    """

    prediction: np.ndarray
    found: list[tuple[str, str]]
    seen: np.ndarray
    maps: list[SuperTokenMap]


class Demo:
    """A model behind a page. Safe to be called from several threads.

    Args:
        model: With its weights loaded.
        max_bytes: The largest file to read.
        max_pixels: The largest image to read.
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
            ImageError: It is no image, or none that is allowed; see :func:`read_image`.
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
        """For each stage borders and mean colours of its super tokens, or nothing."""
        pictures: list[list[np.ndarray]] = []
        for stage_map in look.maps:
            pictures.append([])
            if stage_map.has_super_tokens:
                pictures[-1] += draw_super_tokens(look.seen, stage_map, _size(look.seen))
        return pictures

    def attention(
        self, look: DemoResult, pixel: tuple[float, float] | None = None
    ) -> list[np.ndarray]:
        """Attention from a point.

        Args:
            look: From :meth:`look`.
            pixel: Its row and column in the first picture; by default the middle.

        Returns:
            The image as the backbone got it with a ring, and attention in each stage.
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
