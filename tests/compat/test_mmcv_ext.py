"""torchvision's kernels in place of mmcv's compiled ones give the same."""

from __future__ import annotations

import importlib
import itertools
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RUN, WITHOUT_COMPILED, run_python
from mmengine.config import Config

from mmsvit import config_path
from mmsvit.compat import mmcv_ext, torchvision_ops

needs_compiled = pytest.mark.skipif(
    mmcv_ext.is_stand_in(), reason='there are no compiled ops to compare with'
)


@pytest.fixture
def compiled():
    return importlib.import_module('mmcv._ext')


def random_boxes(rng: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    corners = rng.uniform(0, 60, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0, 40, (count, 2))], axis=1)
    kind = rng.integers(4)
    if kind == 1:  # Ties, of scores and of whole boxes.
        boxes = boxes.round(-1)
    if kind == 2 and count:  # Degenerate: a line, a point, corners the wrong way round.
        boxes[rng.integers(count), 2:] = boxes[rng.integers(count), :2]
    scores = rng.uniform(0, 1, count).round(int(rng.integers(1, 8)))
    return torch.tensor(boxes, dtype=torch.float32), torch.tensor(scores, dtype=torch.float32)


@needs_compiled
def test_nms_keeps_the_same_on_a_thousand_cases(compiled):
    rng = np.random.default_rng(0)
    for case in range(1000):
        count = (0, 1, 2)[case] if case < 3 else int(rng.integers(1, 200))
        boxes, scores = random_boxes(rng, count)
        for offset in (0, 1):
            threshold = float(rng.uniform(0.1, 0.9))
            arguments = dict(iou_threshold=threshold, offset=offset)
            expected = compiled.nms(boxes, scores, **arguments) if count else torch.empty(0).long()
            kept = torchvision_ops.nms(boxes, scores, **arguments)
            assert torch.equal(kept, expected), (case, offset, kept, expected)


@needs_compiled
@pytest.mark.parametrize('kind', ['nms', 'soft_nms'])
@pytest.mark.parametrize('class_agnostic', [False, True])
@pytest.mark.parametrize('split_thr', [10000, 50])  # more boxes than that: class by class
def test_class_wise_nms_is_the_same(kind, class_agnostic, split_thr, monkeypatch):
    from mmcv.ops import batched_nms

    module = importlib.import_module('mmcv.ops.nms')
    rng = np.random.default_rng(0)
    cfg = dict(type=kind, iou_threshold=0.5, split_thr=split_thr)
    for _ in range(50):
        boxes, scores = random_boxes(rng, int(rng.integers(1, 120)))
        classes = torch.tensor(rng.integers(0, 5, len(boxes)))
        results = []
        for ops in (module.ext_module, torchvision_ops):
            with monkeypatch.context() as patched:
                patched.setattr(module, 'ext_module', ops)
                results.append(batched_nms(boxes, scores, classes, dict(cfg), class_agnostic))
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0, equal_nan=True)


@needs_compiled
@pytest.mark.parametrize('method', [0, 1, 2])
def test_soft_nms_is_the_same(compiled, method):
    rng = np.random.default_rng(method)
    for _ in range(100):
        boxes, scores = random_boxes(rng, int(rng.integers(0, 60)))
        results = []
        for ops in (compiled, torchvision_ops):
            dets = torch.zeros(len(boxes), 5)
            arguments = dict(iou_threshold=0.3, sigma=0.5, min_score=1e-3, method=method, offset=0)
            indices = ops.softnms(boxes, scores, dets, **arguments)
            results.append((indices, dets[: len(indices)]))
        torch.testing.assert_close(results[1], results[0], equal_nan=True)


def rois(rng: np.random.Generator, count: int) -> torch.Tensor:
    corners = rng.uniform(-8, 60, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0, 50, (count, 2))], axis=1)
    images = rng.integers(0, 2, (count, 1))
    return torch.tensor(np.concatenate([images, boxes], axis=1), dtype=torch.float32)


@needs_compiled
@pytest.mark.parametrize(
    ('aligned', 'sampling_ratio', 'scale', 'size'),
    itertools.product([True, False], [0, 2], [1.0, 0.25], [(7, 7), (14, 5)]),
)
def test_roi_align_is_the_same(compiled, aligned, sampling_ratio, scale, size):
    rng = np.random.default_rng(0)
    maps = torch.tensor(rng.normal(size=(2, 5, 33, 47)), dtype=torch.float32)
    boxes = rois(rng, 20)
    arguments = dict(
        aligned_height=size[0],
        aligned_width=size[1],
        spatial_scale=scale,
        sampling_ratio=sampling_ratio,
        pool_mode=1,
        aligned=aligned,
    )
    gradient = torch.tensor(rng.normal(size=(20, 5, *size)), dtype=torch.float32)
    results = []
    for ops in (compiled, torchvision_ops):
        output, argmax, back = torch.zeros(20, 5, *size), torch.empty(0), torch.zeros_like(maps)
        ops.roi_align_forward(maps, boxes, output, argmax, argmax, **arguments)
        ops.roi_align_backward(gradient, boxes, argmax, argmax, back, **arguments)
        results.append((output, back))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5)
    scattered = torch.zeros_like(results[0][0])
    channels_last = maps.contiguous(memory_format=torch.channels_last)
    torchvision_ops.roi_align_forward(channels_last, boxes, scattered, argmax, argmax, **arguments)
    torch.testing.assert_close(scattered, results[0][0], rtol=0, atol=1e-5)


def test_max_pooling_is_refused():
    empty = torch.empty(0)
    with pytest.raises(NotImplementedError, match="pool_mode='max'"):
        torchvision_ops.roi_align_forward(
            empty, empty, empty, empty, empty, 7, 7, 1.0, 0, pool_mode=0, aligned=True
        )


def test_what_is_missing_says_so():
    with pytest.raises(NotImplementedError, match=r"'carafe_forward' needs mmcv's compiled ops"):
        torchvision_ops.carafe_forward(1, 2)
    assert not hasattr(torchvision_ops, '__path__')


def test_focal_loss_is_the_published_one():
    logits = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.tensor([0, 3, 4, 1, 4, 2, 0])  # 4 is background.
    output, grad = torch.zeros_like(logits), torch.zeros_like(logits)
    torchvision_ops.sigmoid_focal_loss_forward(
        logits, target, logits.new_empty(0), output, 2.0, 0.25
    )
    torchvision_ops.sigmoid_focal_loss_backward(
        logits, target, logits.new_empty(0), grad, 2.0, 0.25
    )
    logits.requires_grad_()
    p = logits.sigmoid()
    hit = target[:, None] == torch.arange(4)
    expected = torch.where(hit, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())
    torch.testing.assert_close(output, expected.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), logits)[0])


def test_deformable_attention_has_the_gradients_of_its_pytorch_form():
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    torch.manual_seed(0)
    shapes = torch.tensor([[4, 5], [2, 3]])
    value = torch.randn(2, 26, 2, 3, dtype=torch.float64, requires_grad=True)
    places = torch.rand(2, 6, 2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 6, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    starts = torch.tensor([0, 20])
    expected = multi_scale_deformable_attn_pytorch(value, shapes, places, weights)
    given = (value, shapes, starts, places, weights)
    torch.testing.assert_close(
        torchvision_ops.ms_deform_attn_forward(*given, im2col_step=64), expected
    )
    gradient = torch.randn_like(expected)
    found = [torch.zeros_like(tensor) for tensor in (value, places, weights)]
    torchvision_ops.ms_deform_attn_backward(*given, gradient, *found, im2col_step=64)
    for one, other in zip(found, torch.autograd.grad(expected, (value, places, weights), gradient)):
        torch.testing.assert_close(one, other)


@needs_compiled
@pytest.mark.parametrize('modulated', [False, True])
def test_deformable_convolution_is_the_same(modulated, monkeypatch):
    from mmcv.ops import deform_conv2d, modulated_deform_conv2d

    deform_conv, modulated_deform_conv = (
        importlib.import_module(f'mmcv.ops.{name}')
        for name in ('deform_conv', 'modulated_deform_conv')
    )
    results = []
    for stand_in in (False, True):
        if stand_in:
            for module in (deform_conv, modulated_deform_conv):
                monkeypatch.setattr(module, 'ext_module', torchvision_ops)
        torch.manual_seed(0)
        x, weight = torch.randn(2, 4, 9, 11), torch.randn(6, 2, 3, 3)  # two groups
        offset, mask, bias = torch.randn(2, 36, 5, 6), torch.rand(2, 18, 5, 6), torch.randn(6)
        if modulated:
            tensors = [t.requires_grad_() for t in (x, offset, mask, weight, bias)]
            output = modulated_deform_conv2d(*tensors, 2, 1, 1, 2, 2)
        else:
            tensors = [t.requires_grad_() for t in (x, offset, weight)]
            output = deform_conv2d(*tensors, 2, 1, 1, 2, 2)
        results.append([output, *torch.autograd.grad((output**2).sum(), tensors)])
    for one, other in zip(*results):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-3)


def test_stand_in_is_found_without_compiled_ops():
    code = WITHOUT_COMPILED + (
        'import mmsvit; assert "mmcv" not in sys.modules; warnings.resetwarnings(); '
        'import torch, mmcv.ops; assert mmcv._ext.__file__.endswith("torchvision_ops.py"); '
        'boxes = torch.tensor([[0., 0, 9, 9], [0, 0, 9, 8], [20, 20, 30, 30]]); '
        'assert mmcv.ops.nms(boxes, torch.tensor([.5, .9, .1]), .5)[1].tolist() == [1, 2]'
    )
    run_python('-c', code)


@needs_compiled
def test_compiled_ops_go_first(tmp_path):
    code = 'import mmsvit, mmcv.ops; assert mmcv._ext.__file__.endswith(".so")'
    run_python('-W', 'error::UserWarning:mmsvit', '-c', code, cwd=tmp_path)


def test_too_late_is_said():
    # As in an environment where Python does not start with it.
    forget = (
        'for name in [name for name in sys.modules if name.partition(".")[0] == "mmsvit"]:\n'
        '    del sys.modules[name]\n'
        'sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "StandInFinder"]\n'
    )
    code = WITHOUT_COMPILED + (
        f'{forget}sys.modules["mmdet.structures"] = sys\ntry:\n    import mmsvit\n'
        'except UserWarning as w:\n    assert "Import mmsvit first" in str(w)\nelse:\n    raise SystemExit(1)'
    )
    run_python('-c', code)
    assert 'mmsvit' in sys.modules


def detector_config(model: str, shapes: Path, folder: Path) -> Path:
    """One of MMDetection's stock models around a small SViT, for one epoch of the small data."""
    cfg = Config.fromfile(config_path('svit_maskrcnn_shapes.py'))
    small = cfg.model
    if model != 'mask-rcnn_r50_fpn':
        stock = (
            Path(find_spec('mmdet').origin).parent / '.mim/configs/_base_/models' / f'{model}.py'
        )
        cfg.model = Config.fromfile(stock).model
        cfg.model.backbone = small.backbone
        cfg.model.neck.in_channels = small.neck.in_channels
        for head in _dicts(cfg.model):
            if 'num_classes' in head:
                head['num_classes'] = 5
    if model.startswith('retinanet'):
        cfg.val_evaluator.metric = cfg.test_evaluator.metric = 'bbox'
        cfg.default_hooks.checkpoint.save_best = 'coco/bbox_mAP'
        cfg.model.test_cfg.score_thr = 0.0  # It begins with scores near 0.01.
    for split, name in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = f'{shapes}/'
        if split != 'train':
            cfg[f'{split}_evaluator'].ann_file = f'{shapes}/annotations/instances_{name}.json'
    if model.startswith('cascade'):  # Fewer regions for its three large heads.
        cfg.model.test_cfg.rpn.max_per_img = 50
        for stage in cfg.model.train_cfg.rcnn:
            stage.sampler.num = 16
    cfg.train_cfg.max_epochs = 1
    cfg.dump(folder / f'{model}.py')
    return folder / f'{model}.py'


def _dicts(value: object):
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from _dicts(inner)


@pytest.mark.slow
@pytest.mark.parametrize(
    'model', ['mask-rcnn_r50_fpn', 'cascade-mask-rcnn_r50_fpn', 'retinanet_r50_fpn']
)
def test_stock_detectors_train_and_infer_without_compiled_ops(model, shapes, tmp_path):
    config = detector_config(model, shapes, tmp_path)
    tool = ['tools/train.py', config, '--work-dir', tmp_path / 'work']
    result = run_python('-c', WITHOUT_COMPILED + RUN, *tool)
    assert 'coco/bbox_mAP' in result.stdout + result.stderr
    image = shapes / 'val' / '000001.jpg'
    outputs = []
    for name, prefix in (('stand-in', WITHOUT_COMPILED), ('as installed', 'import warnings')):
        code = f"""{prefix}
import mmsvit, sys
warnings.resetwarnings()
import torch
from mmdet.apis import inference_detector, init_detector
model = init_detector(sys.argv[1], sys.argv[2], device='cpu')
found = inference_detector(model, sys.argv[3]).pred_instances
torch.save({{key: found[key] for key in ('bboxes', 'scores', 'labels')}}, sys.argv[4])
"""
        given = [config, tmp_path / 'work' / 'epoch_1.pth', image, tmp_path / name]
        run_python('-c', code, *given)
        outputs.append(torch.load(tmp_path / name))
    for key, value in outputs[0].items():
        torch.testing.assert_close(value, outputs[1][key], rtol=1e-4, atol=1e-4)
    assert len(outputs[0]['scores'])
