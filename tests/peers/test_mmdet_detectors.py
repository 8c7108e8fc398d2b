"""MMDetection's detectors with our backbone in place of theirs, and nothing else changed.

MMDetection does not publish its test suite, but what the suite is made of: the demonstration
inputs of ``mmdet.testing`` and the configs. These tests do with them what it asks of a detector.

    pytest -m peers tests/peers
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from mmdet import testing
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub
from mmengine.registry import init_default_scope
from torch import Tensor

pytestmark = pytest.mark.peers

# Config, and whether its inputs need masks and a map of classes. (Not QueryInst: untrained, it
# fails on these inputs with its own ResNet, too.)
DETECTORS = {
    'atss/atss_r50_fpn_1x_coco.py': (False, False),
    'autoassign/autoassign_r50-caffe_fpn_1x_coco.py': (False, False),
    'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py': (False, False),
    'foveabox/fovea_r50_fpn_4xb4-1x_coco.py': (False, False),
    'free_anchor/freeanchor_r50_fpn_1x_coco.py': (False, False),
    'fsaf/fsaf_r50_fpn_1x_coco.py': (False, False),
    'gfl/gfl_r50_fpn_1x_coco.py': (False, False),
    'nas_fcos/nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco.py': (False, False),
    'paa/paa_r50_fpn_1x_coco.py': (False, False),
    'reppoints/reppoints-moment_r50_fpn_1x_coco.py': (False, False),
    'retinanet/retinanet_r18_fpn_1x_coco.py': (False, False),
    'tood/tood_r50_fpn_1x_coco.py': (False, False),
    'yolof/yolof_r50-c5_8xb8-1x_coco.py': (False, False),
    'detr/detr_r50_8xb2-150e_coco.py': (False, False),
    'conditional_detr/conditional-detr_r50_8xb2-50e_coco.py': (False, False),
    'dab_detr/dab-detr_r50_8xb2-50e_coco.py': (False, False),
    'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py': (False, False),
    'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py': (False, False),
    'double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py': (False, False),
    'dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco.py': (False, False),
    'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py': (False, False),
    'libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco.py': (False, False),
    'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py': (False, False),
    'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py': (True, False),
    'ms_rcnn/ms-rcnn_r50_fpn_1x_coco.py': (True, False),
    'point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py': (True, False),
    'solo/solo_r50_fpn_1x_coco.py': (True, False),
    'panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py': (True, True),
}
RESNET_WIDTHS = {18: (64, 128, 256, 512), 50: (256, 512, 1024, 2048)}


def in_place_of(resnet: ConfigDict) -> ConfigDict:
    """An SViT with the outputs and arguments of a ResNet."""
    arch = dict(
        embed_dims=RESNET_WIDTHS[resnet.depth],
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 4, 8),
        super_token_sizes=(8, 4, 1, 1),
        num_iters=(1, 1, 1, 1),
        layer_scale=(None, None, None, None),
    )
    kept = {key: resnet[key] for key in ('out_indices', 'norm_eval') if key in resnet}
    frozen = resnet.get('frozen_stages', -1)
    return ConfigDict(type='mmsvit.SViT', arch=arch, mlp_ratio=0.5, frozen_stages=frozen, **kept)


@pytest.fixture(autouse=True)
def installed_configs(monkeypatch):
    folder = Path(testing.__file__).parent.parent / '.mim' / 'configs'
    monkeypatch.setattr(testing._utils, '_get_config_directory', lambda: str(folder))


def all_finite(losses: dict) -> bool:
    values = [
        v for value in losses.values() for v in (value if isinstance(value, list) else [value])
    ]
    return all(math.isfinite(float(value.detach().sum())) for value in values)


@pytest.mark.promise(
    'Numbers',
    "MMDetection's detectors train and predict with our backbone",
    '27 of 28 detectors; PAA skipped without scikit-learn',
)
@pytest.mark.parametrize('name', DETECTORS)
def test_detector(name):
    if name.startswith('paa/'):
        pytest.importorskip('sklearn', reason='PAA fits mixtures with scikit-learn')
    with_mask, with_semantic = DETECTORS[name]
    torch.manual_seed(0)
    init_default_scope('mmdet')
    # Some losses ask how far the training is.
    MessageHub.get_instance('peers').update_info_dict(dict(epoch=0, iter=0))
    cfg = testing.get_detector_cfg(name)
    cfg.backbone = in_place_of(cfg.backbone)
    detector = MODELS.build(cfg)
    detector.init_weights()
    sizes = [[3, 128, 128], [3, 125, 130]]
    kinds = dict(with_mask=with_mask, with_semantic=with_semantic)
    inputs = testing.demo_mm_inputs(2, sizes, num_classes=80, **kinds)

    detector.train()
    losses = detector(**detector.data_preprocessor(inputs, True), mode='loss')
    assert losses and all_finite(losses)
    total, _ = detector.parse_losses(losses)
    total.backward()
    assert all(
        parameter.grad is None or parameter.grad.isfinite().all()
        for parameter in detector.backbone.parameters()
    )
    assert detector.backbone.stages[-1].blocks[0].attn.attend.qkv.weight.grad.abs().sum() > 0

    detector.eval()
    with torch.no_grad():
        results = detector(**detector.data_preprocessor(inputs, False), mode='predict')
        assert len(results) == 2
        assert all(isinstance(result, DetDataSample) for result in results)
        outputs = detector(**detector.data_preprocessor(inputs, False), mode='tensor')
    assert isinstance(outputs, (tuple, dict, Tensor))
