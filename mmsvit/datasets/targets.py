"""Draw the targets of training samples, as the pipeline gives them to the model."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.registry import VISUALIZERS
from mmengine.visualization import Visualizer


def build_visualizer(cfg: dict, dataset: BaseDataset) -> Visualizer:
    """The visualizer of a config, which writes nothing.

    Args:
        cfg: ``visualizer`` of a config of MMDetection, MMSegmentation or MMPretrain.
        dataset: Its classes and their colours.
    """
    visualizer = VISUALIZERS.build({**cfg, 'vis_backends': [], 'name': 'targets'})
    visualizer.dataset_meta = dict(dataset.metainfo)
    return visualizer


def draw_targets(visualizer: Visualizer, sample: dict) -> np.ndarray:
    """Draw boxes, masks, the label map or the label over the image.

    Args:
        visualizer: From :func:`build_visualizer`.
        sample: From the data set: ``inputs``, ``(C, H, W)`` in BGR, and ``data_samples``.

    Returns:
        RGB, uint8, ``(H, W, 3)``.
    """
    image = sample['inputs'].numpy().transpose(1, 2, 0)
    if image.shape[2] != 3:  # Of other sensors, the first channel in grey.
        image = image[..., :1].repeat(3, axis=2)
    if image.dtype != np.uint8:
        low, high = image.min(), image.max()
        image = (255.0 * (image - low) / max(high - low, 1e-6)).astype(np.uint8)
    image = np.ascontiguousarray(image[..., ::-1])
    truth: Any = copy.deepcopy(sample['data_samples'])
    if hasattr(visualizer, 'visualize_cls'):
        visualizer.visualize_cls(image, truth, draw_pred=False)
        return visualizer.get_image()
    if 'gt_instances' in truth:
        boxes = truth.gt_instances.get('bboxes')
        truth.gt_instances.bboxes = getattr(boxes, 'tensor', boxes)
        masks = truth.gt_instances.get('masks')
        if masks is not None:
            truth.gt_instances.masks = masks.to_ndarray().astype(bool)
    visualizer.add_datasample('targets', image, truth, draw_pred=False)
    return visualizer.get_image()
