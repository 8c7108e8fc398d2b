"""Boxes from a RetinaNet that tools/export.py wrote as ONNX, with NumPy alone: what the file leaves out.

    python tools/export.py configs/retinanet/retinanet_svit-s_fpn_1x_coco.py --checkpoint CHECKPOINT \
        --output retinanet.onnx
    python examples/retinanet_onnx_boxes.py retinanet.onnx photo.jpg

Needs onnxruntime, NumPy and Pillow. Anchors, decoding and NMS are those of the config, and give what
MMDetection's head gives for the same outputs (a test compares them). Copy this file and change it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np

STRIDES = (8, 16, 32, 64, 128)  # pixels
RATIOS = (0.5, 1.0, 2.0)  # height over width
SCALES = tuple(4 * 2 ** (octave / 3) for octave in range(3))  # in strides
LARGEST_CHANGE = np.log(1000 / 16)  # of the logarithm of width and height
SHORT_SIDE, LONG_SIDE = 800, 1333  # pixels


def anchors_of(height: int, width: int, stride: int) -> np.ndarray:
    """All anchors of a level, ``(height * width * 9, 4)`` as x1, y1, x2, y2 in pixels of the input."""
    root = np.sqrt(np.array(RATIOS))[:, None]
    half_w = (stride / root * np.array(SCALES) / 2).ravel()
    half_h = (stride * root * np.array(SCALES) / 2).ravel()
    base = np.stack([-half_w, -half_h, half_w, half_h], axis=1)
    y, x = np.mgrid[:height, :width].reshape(2, -1) * stride
    return (np.stack([x, y, x, y], axis=1)[:, None] + base).reshape(-1, 4)


def decode(anchors: np.ndarray, deltas: np.ndarray, height: int, width: int) -> np.ndarray:
    """Boxes ``(N, 4)`` from anchors and what the head predicts of them, within the image."""
    size = anchors[:, 2:] - anchors[:, :2]
    centre = (anchors[:, 2:] + anchors[:, :2]) / 2 + size * deltas[:, :2]
    size = size * np.exp(np.clip(deltas[:, 2:], -LARGEST_CHANGE, LARGEST_CHANGE))
    boxes = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
    return np.clip(boxes, 0, [width, height, width, height])


def suppress(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, iou: float) -> np.ndarray:
    """Indices that non-maximum suppression within each class keeps, best first."""
    boxes = boxes + labels[:, None] * (boxes.max(initial=0) + 1)  # Classes do not overlap.
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order, kept = np.argsort(-scores, kind='stable'), []
    while order.size:
        best, others = order[0], order[1:]
        kept.append(best)
        corner = np.minimum(boxes[best, 2:], boxes[others, 2:])
        sides = corner - np.maximum(boxes[best, :2], boxes[others, :2])
        shared = sides.clip(0).prod(axis=1)
        order = others[shared / (area[best] + area[others] - shared) <= iou]
    return np.array(kept, dtype=int)


def find_boxes(
    outputs: Mapping[str, np.ndarray],
    height: int,
    width: int,
    threshold: float = 0.05,
    iou: float = 0.5,
    candidates: int = 1000,
    most: int = 100,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes, scores and classes of one image.

    Args:
        outputs: Of the file: ``cls_score0``... ``(1, 9 * classes, h, w)`` and ``bbox_pred0``...
        height: Of the image in pixels, without padding.
        width: Of the image in pixels, without padding.
        threshold: The least score.
        iou: Overlap of two boxes of a class from which on the worse goes.
        candidates: Of each level, before suppression.
        most: Boxes, the best first.

    Returns:
        ``(N, 4)`` as x1, y1, x2, y2 in pixels of the input, ``(N,)`` and ``(N,)``.
    """
    boxes, scores, labels = [], [], []
    for level, stride in enumerate(STRIDES):
        logits, deltas = outputs[f'cls_score{level}'][0], outputs[f'bbox_pred{level}'][0]
        _, h, w = logits.shape
        classes = len(logits) // (len(RATIOS) * len(SCALES))
        score = 1 / (1 + np.exp(-logits.transpose(1, 2, 0).reshape(-1, classes).astype(float)))
        anchor, label = np.nonzero(score > threshold)
        score = score[anchor, label]
        best = np.argsort(-score, kind='stable')[:candidates]
        anchor, label = anchor[best], label[best]
        delta = deltas.transpose(1, 2, 0).reshape(-1, 4)[anchor]
        boxes.append(decode(anchors_of(h, w, stride)[anchor], delta, height, width))
        scores.append(score[best])
        labels.append(label)
    box, score, label = map(np.concatenate, (boxes, scores, labels))
    has_area = (box[:, 2:] > box[:, :2]).all(axis=1)  # Some lie outside the image.
    box, score, label = box[has_area], score[has_area], label[has_area]
    kept = suppress(box, score, label, iou)[:most]
    return box[kept], score[kept], label[kept]


def main() -> None:
    """Print the boxes of an image."""
    import onnxruntime
    from PIL import Image

    file, photo = sys.argv[1:]
    image = Image.open(photo).convert('RGB')
    scale = min(SHORT_SIDE / min(image.size), LONG_SIDE / max(image.size))
    width, height = (round(side * scale) for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    # To multiples of 32, as in training; MMDetection pads after normalising, with zeros.
    mean = np.array([123.675, 116.28, 103.53], np.float32)
    padded = np.broadcast_to(mean, (-(-height // 32) * 32, -(-width // 32) * 32, 3)).copy()
    padded[:height, :width] = pixels
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {'images': padded.transpose(2, 0, 1)[None]})
    for box, score, label in zip(*find_boxes(dict(zip(names, found)), height, width)):
        print(f'class {label}, score {score:.2f}, box {np.round(box / scale, 1).tolist()}')


if __name__ == '__main__':
    main()
