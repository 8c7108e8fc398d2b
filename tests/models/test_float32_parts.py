"""Detectors in mixed precision: what has to stay in float32 does."""

from __future__ import annotations

import sys
from functools import partial

import mmengine.runner.amp
import pytest
import torch
from conftest import small_arch
from mmengine.config import Config, ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmsvit import config_path

HALVES = (torch.bfloat16, torch.float16)
DETECTORS = (
    'mask_rcnn/mask-rcnn_svit-s_fpn_1x_coco',
    'mask_rcnn/mask-rcnn_svit-l_fpn_fsdp-1x_coco',
    'cascade_mask_rcnn/cascade-mask-rcnn_svit-s_fpn_ms-crop-3x_coco',
    'retinanet/retinanet_svit-s_fpn_1x_coco',
    'dino/dino-4scale_svit-s_8xb2-12e_coco',
)


def build(name: str) -> tuple[nn.Module, Config]:
    """A detector's config around a small backbone."""
    cfg = Config.fromfile(config_path(f'{name}.py'))
    arch = small_arch()
    cfg.model.backbone.update(arch=arch, super_token_sizes=None, init_cfg=None)
    stages = cfg.model.backbone.get('out_indices', range(4))
    cfg.model.neck.in_channels = [arch['embed_dims'][i] for i in stages]
    if 'num_queries' in cfg.model:
        cfg.model.num_queries = 30
    if 'roi_head' in cfg.model:  # CPUs are slow in float16.
        cfg.model.test_cfg.rpn.max_per_img = cfg.model.train_cfg.rpn_proposal.max_per_img = 30
        stages = cfg.model.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 8
    text = cfg.model.to_dict()
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(Config(without_sync_bn(text)))
    model.init_weights()
    return model, cfg


def without_sync_bn(node: object) -> object:
    """SyncBN trains on GPUs alone."""
    if isinstance(node, dict):
        return {k: without_sync_bn(v) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(map(without_sync_bn, node))
    return 'BN' if node == 'SyncBN' else node


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """MMEngine allows mixed precision on GPUs alone."""
    import mmcv.ops  # noqa: F401

    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(amp_optimizer_wrapper, 'GradScaler', partial(torch.amp.GradScaler, 'cpu'))
    # Its autocast refuses float16 on a CPU, which torch has.
    monkeypatch.setattr(mmengine.runner.amp, 'autocast', partial(torch.autocast, 'cpu'))
    # MMCV's compiled NMS takes scores of any dtype on GPUs, and float32 alone on CPUs; the box
    # heads of MMDetection give others.
    nms = sys.modules['mmcv.ops.nms'].ext_module.nms
    monkeypatch.setattr(
        sys.modules['mmcv.ops.nms'].ext_module,
        'nms',
        lambda boxes, scores, *args, **kwargs: nms(boxes, scores.float(), *args, **kwargs),
    )


@pytest.mark.slow
@pytest.mark.parametrize('dtype', HALVES, ids=str)
@pytest.mark.parametrize('name', DETECTORS)
def test_detectors_train_in_mixed_precision(name, dtype, on_a_cpu):
    from mmdet.testing import demo_mm_inputs

    model, cfg = build(name)
    wrapper = dict(cfg.optim_wrapper, type='AmpOptimWrapper', dtype=str(dtype).split('.')[1])
    wrapper['loss_scale'] = dict(init_scale=8.0) if dtype == torch.float16 else dict(enabled=False)
    optim_wrapper = build_optim_wrapper(model, wrapper)
    before = {name: p.clone() for name, p in model.named_parameters()}
    # Features are in the half type: it is mixed precision that is tried.
    dtypes, sampled = [], []
    for module in model.modules():
        if type(module).__name__ == 'MultiScaleDeformableAttention':
            module.value_proj.register_forward_hook(lambda _, __, y: sampled.append(y.dtype))
    model.neck.register_forward_hook(lambda _, __, maps: dtypes.append(maps[0].dtype))
    data = demo_mm_inputs(2, [[3, 96, 96]] * 2, with_mask='mask' in name, use_box_type=False)
    losses = model.train_step(data, optim_wrapper)
    assert dtypes == [dtype]
    assert set(sampled) == ({torch.float32} if 'dino' in name else set())
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in losses.values()), losses
    moved = [name for name, p in model.named_parameters() if not torch.equal(before[name], p)]
    assert any('backbone' in name for name in moved) and any('head' in name for name in moved)
    model.eval()
    with torch.no_grad(), torch.autocast('cpu', dtype):
        (result, _) = model.test_step(data)
    assert result.pred_instances.bboxes.isfinite().all()


@pytest.mark.parametrize('dtype', HALVES, ids=str)
def test_regions_are_pooled_at_their_exact_corners(dtype):
    init_default_scope('mmdet')
    settings = dict(
        roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=2),
        out_channels=8,
        featmap_strides=[4, 8],
    )
    exact = MODELS.build(dict(type='mmdet.SingleRoIExtractor', **settings))
    extractor = MODELS.build(dict(type='mmsvit.Float32RoIExtractor', **settings))
    assert extractor.num_inputs == 2 and extractor.featmap_strides == [4, 8]
    assert not list(extractor.state_dict())
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 8, 200 // s, 336 // s, generator=generator) for s in (1, 2)]
    halves = [each.to(dtype).requires_grad_() for each in maps]
    rois = torch.tensor([[0, 401.37, 301.11, 533.33, 377.77], [0, 3.3, 5.7, 1201.9, 793.3]])
    corners = []
    extractor.roi_layers[0].register_forward_pre_hook(lambda _, inputs: corners.append(inputs[1]))
    with torch.autocast('cpu', dtype):
        pooled = extractor(halves, rois)
    assert (torch.cat(corners)[0] - rois[0]).abs().max() < 0.01
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, exact([each.float() for each in halves], rois))
    pooled.sum().backward()
    assert all(each.grad.dtype == dtype and each.grad.isfinite().all() for each in halves)


@pytest.mark.parametrize('dtype', HALVES, ids=str)
@pytest.mark.parametrize('name', [DETECTORS[0], DETECTORS[3]])
def test_boxes_are_decoded_from_exact_anchors(name, dtype):
    """With the same offsets, boxes differ by less than a hundredth of a pixel from float32's."""
    model, _ = build(name)
    head = (model.rpn_head if 'mask' in name else model.bbox_head).eval()
    for parameter in head.parameters():
        nn.init.zeros_(parameter)  # Boxes are the anchors, in both dtypes.
    # Wide: far from the origin, halves are coarse.
    maps = [torch.zeros(1, 256, max(8 // s, 1), 336 // s) for s in (1, 2, 4, 8, 16)]
    if 'retina' in name:
        maps = [*maps[1:], maps[-1]]
    meta = dict(img_shape=(64, 1344), scale_factor=(1.0, 1.0))
    boxes = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast('cpu', dtype, enabled=enabled):
            outputs = head(maps)
            assert {each.dtype for kind in outputs for each in kind} == {torch.float32}
            cfg = ConfigDict(model.test_cfg.get('rpn', model.test_cfg), score_thr=0.0)
            cfg.max_per_img = 1000
            (found,) = head.predict_by_feat(*outputs, batch_img_metas=[meta], cfg=cfg)
        boxes.append(found.bboxes)
    assert len(boxes[0]) == len(boxes[1]) > 50
    assert (boxes[0] - boxes[1]).abs().max() < 0.01
