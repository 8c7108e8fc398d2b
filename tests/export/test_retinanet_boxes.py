"""The NumPy post-processing of an exported RetinaNet, beside MMDetection's own."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT, import_tool
from mmdet.models.task_modules import AnchorGenerator
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData


@pytest.fixture(scope='module')
def example() -> ModuleType:
    return import_tool('retinanet_onnx_boxes', 'examples')


@pytest.fixture(scope='module')
def head():
    cfg = Config.fromfile(ROOT / 'configs' / 'retinanet' / 'retinanet_svit-s_fpn_1x_coco.py')
    init_default_scope('mmdet')
    return MODELS.build(dict(cfg.model.bbox_head, test_cfg=cfg.model.test_cfg)), cfg


def random_outputs(size: tuple[int, int], seed: int) -> dict[str, torch.Tensor]:
    """Of a head that has learned something: a few scores above the threshold, moderate deltas."""
    generator = torch.Generator().manual_seed(seed)
    outputs = {}
    for level, stride in enumerate((8, 16, 32, 64, 128)):
        shape = [-(-side // stride) for side in size]
        logits = torch.randn(1, 9 * 80, *shape, generator=generator) * 2 - 7
        outputs[f'cls_score{level}'] = logits
        outputs[f'bbox_pred{level}'] = torch.randn(1, 36, *shape, generator=generator) * 2
    return outputs


def test_anchors_are_those_of_the_config(example, head):
    generator = head[0].prior_generator
    assert isinstance(generator, AnchorGenerator)
    shapes = [(5, 7), (3, 4), (2, 2), (1, 1), (1, 1)]
    for shape, stride, expected in zip(
        shapes, example.STRIDES, generator.grid_priors(shapes, device='cpu')
    ):
        np.testing.assert_allclose(
            example.anchors_of(*shape, stride), expected, rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize(('size', 'seed'), [((256, 320), 0), ((224, 480), 1), ((128, 128), 2)])
def test_boxes_are_mmdetections(example, head, size, seed):
    outputs = random_outputs(size, seed)
    height, width = size[0] - 13, size[1] - 5  # The rest is padding.
    meta = dict(img_shape=(height, width), scale_factor=(1.0, 1.0), ori_shape=(height, width))
    scores, boxes = (
        [outputs[f'{name}{level}'] for level in range(5)] for name in ('cls_score', 'bbox_pred')
    )
    (expected,) = head[0].predict_by_feat(scores, boxes, batch_img_metas=[meta])
    assert isinstance(expected, InstanceData) and len(expected) > 20
    test_cfg = head[1].model.test_cfg
    found = example.find_boxes(
        {name: value.numpy() for name, value in outputs.items()},
        height,
        width,
        threshold=test_cfg.score_thr,
        iou=test_cfg.nms.iou_threshold,
        candidates=test_cfg.nms_pre,
        most=test_cfg.max_per_img,
    )
    np.testing.assert_array_equal(found[2], expected.labels)
    np.testing.assert_allclose(found[1], expected.scores, rtol=1e-5)
    np.testing.assert_allclose(found[0], expected.bboxes, rtol=1e-4, atol=1e-2)
    defaults = example.find_boxes.__defaults__
    assert defaults == (0.05, 0.5, 1000, 100)
    assert defaults == (
        test_cfg.score_thr,
        test_cfg.nms.iou_threshold,
        test_cfg.nms_pre,
        test_cfg.max_per_img,
    )
