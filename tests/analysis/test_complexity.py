"""Multiply-adds are counted right, and what cannot be counted is named."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_python, small_arch
from mmengine.config import Config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry, register_flop_formula

from mmsvit import SViT, config_path
from mmsvit.analysis.config_flops import MetafileEntry, count_config, read_metafile
from mmsvit.analysis.flops import count


def figures(model: nn.Module, *inputs: torch.Tensor) -> tuple[int, int]:
    """Layers and products of a run of ``model``, all of which have a formula."""
    found = count(model, lambda: model(*inputs))
    assert not found.uncounted
    return found.of().layers, found.of().products


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def test_layers():
    x = torch.rand(2, 6, 9, 11)
    assert figures(nn.Conv2d(6, 4, 3, padding=1), x) == (2 * 4 * 6 * 9 * 9 * 11, 0)
    assert figures(nn.Conv2d(6, 12, 3, stride=2, groups=3), x) == (2 * 12 * 2 * 9 * 4 * 5, 0)
    assert figures(nn.ConvTranspose2d(6, 4, 2, stride=2), x) == (2 * 4 * 6 * 4 * 9 * 11, 0)
    assert figures(nn.Linear(11, 5), x) == (2 * 6 * 9 * 11 * 5, 0)
    assert figures(nn.Linear(6, 5, bias=False), x.permute(0, 2, 3, 1)) == (2 * 9 * 11 * 6 * 5, 0)
    assert figures(
        nn.Sequential(
            nn.BatchNorm2d(6), nn.GELU(), nn.AvgPool2d(3), nn.Upsample(None, 2, 'bilinear')
        ),
        x,
    ) == (0, 0)


def test_weights_make_a_layer_whatever_operator_multiplies_them():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(5, 11))

        def forward(self, x):
            return torch.bmm(x, self.weight.t().expand(len(x), 11, 5))

    assert figures(Mixer(), torch.rand(2, 6, 11)) == (2 * 6 * 11 * 5, 0)


def test_products_of_activations():
    a, b = torch.rand(7, 4), torch.rand(5, 4)
    assert figures(Function(lambda a, b: a @ b.t()), a, b) == (0, 7 * 5 * 4)
    assert figures(Function(lambda a, b: torch.addmm(a.new_zeros(5), a, b.t())), a, b) == (0, 140)
    a, b = torch.rand(2, 3, 7, 4), torch.rand(2, 3, 5, 4)
    assert figures(Function(lambda a, b: torch.einsum('nhqc,nhkc->nhqk', a, b)), a, b) == (0, 840)
    bias = nn.Parameter(torch.rand(6, 7, 5))
    biased = Function(lambda a, b: torch.baddbmm(bias, a.flatten(0, 1), b.flatten(0, 1).mT))
    biased.bias = bias  # A bias of the logits is a weight, but not one that is multiplied.
    assert figures(biased, a, b) == (0, 840)


@pytest.mark.parametrize(
    'device',
    [
        'cpu',
        'meta',
        pytest.param(
            'cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
        ),
    ],
)
@pytest.mark.parametrize(
    'kernel',
    [
        None,
        SDPBackend.MATH,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
    ],
)
def test_fused_attention_is_not_missed(device, kernel):
    query, key, value = (torch.rand(1, 3, n, 8, device=device) for n in (7, 5, 5))
    if device == 'cuda':
        query, key, value = query.half(), key.half(), value.half()
    attention = 2 * 3 * 7 * 5 * 8
    fused = Function(F.scaled_dot_product_attention)
    explicit = Function(lambda q, k, v: (q @ k.mT).softmax(-1) @ v)
    assert figures(explicit, query, key, value) == (0, attention)
    with contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel):
        try:
            fused(query, key, value)
        except RuntimeError:
            pytest.skip(f'PyTorch has no {kernel} here')
        assert figures(fused, query, key, value) == (0, attention)


@pytest.mark.parametrize('grad_mode', [torch.no_grad, torch.inference_mode])
def test_attention_layer_without_its_fast_path(grad_mode):
    layer = nn.MultiheadAttention(12, 3, batch_first=True)
    x = torch.rand(2, 7, 12)
    run = grad_mode()(lambda: layer(x, x, x, need_weights=False))
    found = count(layer, run)
    assert not found.uncounted
    assert (found.of().layers, found.of().products) == (2 * 7 * 4 * 12 * 12, 2 * 2 * 7 * 7 * 12)
    assert torch.backends.mha.get_fastpath_enabled()


def test_operators_without_formula_are_named():
    found = count(nn.Identity(), lambda: torch.mv(torch.rand(3, 4), torch.rand(4)))
    assert found.of().total == 0
    assert found.uncounted == {'aten::mv': 1}


def test_custom_operator_is_named_until_it_has_a_formula():
    @torch.library.custom_op('mmsvit_test::product', mutates_args=())
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b

    a, b = torch.rand(3, 4), torch.rand(4, 5)
    model = Function(product)
    found = count(model, lambda: model(model(a, b), torch.rand(5, 5)))
    assert found.of().total == 0
    assert found.uncounted == {'mmsvit_test::product': 2}

    packet = torch.ops.mmsvit_test.product
    register_flop_formula(packet)(lambda a, b, out_shape=None: 2 * a[0] * a[1] * b[1])
    try:
        assert figures(model, a, b) == (0, 60)
    finally:
        del flop_registry[packet]


def test_modules_of_mmcv_ops_are_named():
    from mmcv.ops import RoIAlign

    model = nn.Sequential(nn.Conv2d(3, 4, 1), RoIAlign(2, use_torchvision=True))
    boxes = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])
    found = count(model, lambda: model[1](model[0](torch.rand(1, 3, 8, 8)), boxes))
    assert found.uncounted['mmcv.ops.RoIAlign'] == 1
    assert found.of().layers == 3 * 4 * 8 * 8


def test_figures_of_a_part():
    model = nn.ModuleDict(dict(head=nn.Linear(4, 2), head_2=nn.Linear(4, 8)))
    model.head_2.bias.requires_grad = False
    x = torch.rand(3, 4)
    found = count(model, lambda: [module(x) for module in model.values()])
    part, whole = found.of('head'), found.of()
    assert (part.parameters, part.trainable, part.layers) == (10, 10, 24)
    assert (whole.parameters, whole.trainable, whole.layers) == (50, 42, 24 + 96)


def expected_of_backbone(arch: dict, height: int, width: int) -> tuple[int, int]:
    """Layers and products of SViT, from the description of the architecture alone."""

    def halve(size):
        return tuple(-(-side // 2) for side in size)

    dims = arch['embed_dims']
    half = dims[0] // 2
    size = halve((height, width))
    layers = 9 * (3 * half + half * half) * size[0] * size[1]
    size = halve(size)
    layers += 9 * (half * dims[0] + dims[0] ** 2) * size[0] * size[1]
    products = 0
    for i, (c, depth, cell) in enumerate(zip(dims, arch['depths'], arch['super_token_sizes'])):
        h, w = cell if isinstance(cell, tuple) else (cell, cell)
        tokens = size[0] * size[1]
        super_tokens = -(-size[0] // h) * -(-size[1] // w)
        # Position embedding, FFN with its convolution; query, key, value and output projections.
        layers += depth * tokens * (9 * c + 2 * c * 4 * c + 9 * 4 * c)
        layers += depth * super_tokens * 4 * c * c
        products += depth * 2 * super_tokens**2 * c
        if (h, w) != (1, 1):
            # Nine dot products for each token, padding included: to associate in each iteration,
            # to aggregate after each, and to distribute.
            steps = 2 * arch['num_iters'][i] + 1
            products += depth * steps * super_tokens * h * w * 9 * c
        if i < 3:
            size = halve(size)
            layers += 9 * c * dims[i + 1] * size[0] * size[1]
    return layers, products


@pytest.mark.parametrize('shape', [(64, 96), (68, 100)], ids=['whole cells', 'padded'])
def test_backbone(shape):
    model = SViT(small_arch())
    assert figures(model, torch.rand(1, 3, *shape)) == expected_of_backbone(small_arch(), *shape)


def test_backbone_without_computing():
    with FakeTensorMode():
        model = SViT('small')
        found = figures(model, torch.zeros(1, 3, 800, 1280))
    assert found == expected_of_backbone(model.arch, 800, 1280)


def test_training_and_checkpointing_change_nothing():
    model = SViT(small_arch(), with_cp=True, norm_eval=True, drop_path_rate=0.5).train()
    modes = {name: module.training for name, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = figures(model, torch.rand(2, 3, 64, 96, requires_grad=True))
    assert found == tuple(2 * n for n in expected_of_backbone(small_arch(), 64, 96))
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


BASE = dict(type='mmsvit.SViT', arch='base')


def mask_rcnn() -> Config:
    return Config.fromfile(config_path('svit_maskrcnn_coco.py'))


def cascade_mask_rcnn() -> Config:
    name = 'cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py'
    cfg = Config.fromfile(config_path(f'mmdet::convnext/{name}'), import_custom_modules=False)
    cfg.model.backbone = BASE
    cfg.model.neck.in_channels = [96, 192, 384, 512]
    return cfg


def upernet() -> Config:
    cfg = Config.fromfile(config_path('mmseg::_base_/models/upernet_swin.py'))
    cfg.default_scope = 'mmseg'
    cfg.model.backbone = BASE
    cfg.model.decode_head.update(in_channels=[96, 192, 384, 512], num_classes=150)
    cfg.model.auxiliary_head.update(in_channels=384, num_classes=150)
    cfg.model.test_cfg = dict(mode='slide', crop_size=(512, 512), stride=(341, 341))
    return cfg


@pytest.mark.parametrize(
    ('make', 'workload', 'parameters', 'flops'),
    [
        (mask_rcnn, '800x1280, 1000 proposals, 100 masks', 44e6, 252e9),
        (cascade_mask_rcnn, '800x1280, 1000 proposals, 100 masks', 108e6, 837e9),
        (upernet, '512x2048', 80e6, 1036e9),
    ],
)
def test_published_detectors_and_segmentors(make, workload, parameters, flops):
    cfg = make()
    before = cfg.pretty_text
    found = count_config(cfg)
    assert cfg.pretty_text == before
    assert found.workload == workload
    assert found.model.parameters == pytest.approx(parameters, rel=0.01)
    assert found.model.layers == pytest.approx(flops, rel=0.015)
    assert found.model.products == found.backbone.products > 0
    assert not found.uncounted


@pytest.mark.parametrize(('size', 'flops'), [(224, 4.4e9), (384, 14.1e9)])
def test_published_classifier(size, flops):
    with FakeTensorMode():
        head = nn.Sequential(nn.Conv2d(512, 1024, 1, bias=False), nn.AdaptiveAvgPool2d(1))
        head += nn.Sequential(nn.Flatten(), nn.Linear(1024, 1000))
        model = nn.ModuleList([SViT('small'), head])
        found = count(model, lambda: head(model[0](torch.zeros(1, 3, size, size))[-1])).of()
    assert found.parameters == pytest.approx(25.5e6, rel=0.01)
    assert found.total == pytest.approx(flops, rel=0.015)
    assert found.layers < 0.95 * flops  # Without products it would not be the published figure.


def test_mask_rcnn_counts_as_if_it_had_found_its_maximum():
    cfg = mask_rcnn()
    fewer = mask_rcnn()
    fewer.model.test_cfg.rpn.max_per_img = 400
    fewer.model.test_cfg.rcnn.max_per_img = 30
    box_head = 256 * 7 * 7 * 1024 + 1024 * 1024 + 1024 * (81 + 320)
    mask_head = 14 * 14 * (4 * 9 * 256 * 256 + 4 * 256 * 256 + 4 * 256 * 80)
    shape = (64, 96)
    difference = count_config(cfg, shape).model.layers - count_config(fewer, shape).model.layers
    assert difference == 600 * box_head + 70 * mask_head


def test_models_with_compiled_functions_run():
    cfg = Config.fromfile(config_path('mmdet::_base_/models/retinanet_r50_fpn.py'))
    cfg.default_scope = 'mmdet'
    cfg.model.backbone = dict(type='mmsvit.SViT', arch=small_arch())
    cfg.model.neck.in_channels = list(small_arch()['embed_dims'])
    plain = count_config(cfg, (64, 96))
    cfg.model.bbox_head = dict(
        cfg.model.bbox_head, conv_cfg=dict(type='DCNv2'), norm_cfg=dict(type='GN', num_groups=32)
    )
    with_ops = count_config(cfg, (64, 96))
    assert not plain.uncounted
    assert any('DeformConv' in name for name in with_ops.uncounted)


def test_unknown_roi_head_is_refused():
    cfg = mask_rcnn()
    cfg.model.backbone = dict(type='mmsvit.SViT', arch=small_arch())
    cfg.model.neck.in_channels = list(small_arch()['embed_dims'])
    cfg.model.roi_head.type = 'DoubleHeadRoIHead'
    cfg.model.roi_head.update(reg_roi_scale_factor=1.3)
    with pytest.raises(ValueError, match=r'StandardRoIHead or CascadeRoIHead .* DoubleHeadRoIHead'):
        count_config(cfg, (64, 96))


def test_classifiers_are_counted_at_the_size_of_their_test_pipeline():
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            model=dict(
                type='ImageClassifier',
                backbone=dict(type='mmsvit.SViT', arch=small_arch(), out_indices=(3,)),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='LinearClsHead', num_classes=10, in_channels=24),
            ),
        )
    )
    with pytest.raises(ValueError, match=r"'mmpretrain'.*no crop_size or scale"):
        count_config(cfg)
    steps = [dict(type='ResizeEdge', scale=256), dict(type='CenterCrop', crop_size=96)]
    cfg.test_dataloader = dict(dataset=dict(pipeline=[*steps, dict(type='PackInputs')]))
    found = count_config(cfg)
    assert found.workload == '96x96'
    assert found.model.layers == expected_of_backbone(small_arch(), 96, 96)[0] + 240
    assert count_config(cfg, (64, 96)).workload == '64x96'


def published_entries() -> list[MetafileEntry]:
    metafiles = sorted((ROOT / 'configs').glob('*/metafile.yml'))
    entries = [entry for metafile in metafiles for entry in read_metafile(metafile)]
    return [entry for entry in entries if entry.flops is not None]


@pytest.mark.parametrize('entry', published_entries(), ids=lambda entry: entry.config.stem)
def test_published_configs(entry):
    cfg = Config.fromfile(entry.config)
    found = count_config(cfg).model
    flops = found.total if cfg.default_scope == 'mmpretrain' else found.layers
    assert flops == pytest.approx(entry.flops, rel=0.015)
    assert found.parameters == pytest.approx(entry.parameters, rel=0.01)


def test_tool_writes_terminal_tables_and_markdown(tmp_path):
    (tmp_path / 'tiny.py').write_text(
        f'_base_ = [{str(ROOT / "configs/svit_maskrcnn_shapes.py")!r}]\n'
    )
    (tmp_path / 'metafile.yml').write_text(
        'Models:\n'
        '  - Name: tiny\n'
        '    In Collection: Tiny ones\n'
        '    Config: configs/somewhere/tiny.py\n'
        '    Metadata: {Parameters (paper): 4.0e+6, FLOPs (paper): 8.0e+9}\n'
        '    Results: [{Metrics: {box AP (paper): 40.5, box AP50 (paper): 60.5, mask AP: 30.5}}]\n'
    )
    page = tmp_path / 'page.md'
    options = ['--shape', '160', '160', '--cfg-options', 'model.test_cfg.rpn.max_per_img=100']
    zoo = tmp_path / 'readme.md'
    zoo.write_text('before\n<!-- zoo: begin -->\nold\n<!-- zoo: end -->\nafter\n')
    files = ['--markdown', page, '--zoo', zoo]
    result = run_python('tools/get_flops.py', tmp_path / 'metafile.yml', *options, *files)
    text = zoo.read_text()
    assert text.startswith('before\n') and text.endswith('\nafter\n') and 'old' not in text
    assert '**Tiny ones**' in text and '| box AP 40.5 | mask AP 30.5 |' in text
    assert '160x160, 100 proposals, 30 masks' in result.stdout
    assert 'backbone' in result.stdout
    text = page.read_text()
    assert 'tools/get_flops.py' in text.splitlines()[2]
    (row,) = (line for line in text.splitlines() if line.startswith('| tiny |'))
    cells = [cell.strip() for cell in row.split('|')]
    assert cells[2] == '160x160, 100 proposals, 30 masks'
    assert cells[4] == '4' and cells[7] == '8'
    assert '%' in cells[3] and '%' in cells[5] and '%' in cells[6]


def test_tool_refuses_a_config_that_is_not_there():
    result = run_python('tools/get_flops.py', 'nothing.py', check=False)
    assert result.returncode == 2
    assert 'no such file: nothing.py' in result.stderr
