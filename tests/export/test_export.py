"""Exported files: what is recorded, for which sizes it runs, and that a wrong one is refused."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from conftest import ROOT, run_python, small_arch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import BaseDataElement
from torch import nn

from mmsvit import SViT
from mmsvit.export import ExportError, build_exportable, export
from mmsvit.export.exportable import AdaptivePooling
from mmsvit.export.writer import compare, difference

CONFIGS = ROOT / 'configs'
SHAPES = ((1, 64, 96), (2, 65, 131), (3, 33, 257))


def small_config(name: str, **changes: object) -> Config:
    """An example config around a backbone that is recorded in seconds."""
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    cfg.model.backbone.arch = small_arch(depths=(1, 1, 1, 1), num_iters=(1, 1, 1, 1))
    if 'upernet' in name:
        cfg.model.decode_head.update(in_channels=[8, 12, 16, 24], channels=8)
        cfg.model.auxiliary_head.in_channels = 16
    elif 'maskrcnn' in name:
        cfg.model.neck.in_channels = [8, 12, 16, 24]
    else:
        cfg.model.neck.in_channels = 24
    cfg.merge_from_dict(changes)
    return cfg


def exportable(name: str, part: str = 'model', **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    return build_exportable(small_config(name), None, part, **arguments)


def retinanet() -> nn.Module:
    cfg = Config.fromfile(CONFIGS / 'retinanet' / 'retinanet_svit-s_fpn_1x_coco.py')
    cfg.model.backbone.update(arch=small_arch(), super_token_sizes=None, init_cfg=None)
    cfg.model.neck.update(in_channels=[12, 16, 24], out_channels=8)
    cfg.model.bbox_head.update(in_channels=8, feat_channels=8, num_classes=3)
    cfg.model.test_cfg.score_thr = 0.0  # An untrained head is sure of nothing.
    torch.manual_seed(0)
    return build_exportable(cfg)


# --- what is recorded ------------------------------------------------------------------


def test_segmentor_gives_what_mmseg_predicts():
    model = exportable('svit_upernet_shapes')
    bgr = torch.randint(0, 256, (1, 3, 97, 131), dtype=torch.uint8)
    stock = model.model.data_preprocessor
    # The stock way pads to a fixed size; here the image as it is.
    inputs = stock(dict(inputs=[bgr[0]], data_samples=[BaseDataElement()]), False)['inputs']
    assert inputs.shape == (1, 3, 97, 131)
    logits = model.model.encode_decode(inputs, [dict(img_shape=(97, 131))])
    found = model(bgr.flip(1).float())
    assert difference(found['logits'], logits) <= 1e-5
    assert (found['labels'] == logits.argmax(1)).all()


def test_classifier_gives_what_mmpretrain_predicts():
    model = exportable('svit_classifier_shapes')
    bgr = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    scores = torch.stack([s.pred_score for s in model.model.test_step(dict(inputs=bgr))])
    assert difference(model(bgr.flip(1).float())['logits'].softmax(1), scores) <= 1e-5


def test_detector_heads_give_what_mmdet_makes_boxes_of():
    model = retinanet()
    images = torch.rand(1, 3, 65, 97) * 255
    found = model(images)
    head, metas = model.model.bbox_head, [dict(img_shape=(65, 97), scale_factor=(1.0, 1.0))]
    normalised = (images - model.mean) / model.std
    stock = head.predict_by_feat(
        *head(model.model.extract_feat(normalised)), batch_img_metas=metas
    )[0]
    levels = [[found[f'{kind}{i}'] for i in range(5)] for kind in ('cls_score', 'bbox_pred')]
    ours = head.predict_by_feat(*levels, batch_img_metas=metas)[0]
    assert len(stock) and torch.equal(ours.labels, stock.labels)
    torch.testing.assert_close(ours.bboxes, stock.bboxes)


def test_two_stage_detector_goes_as_far_as_its_rpn():
    outputs = exportable('svit_maskrcnn_shapes')(torch.rand(1, 3, 64, 96))
    assert list(outputs) == [
        *(f'level{i}' for i in range(5)),
        *(f'{kind}{i}' for kind in ('cls_score', 'bbox_pred') for i in range(5)),
    ]


def test_images_as_the_model_sees_them_without_normalisation():
    torch.manual_seed(0)
    model = build_exportable(small_config('svit_upernet_shapes'), None, 'backbone', normalize=False)
    images = torch.randn(1, 3, 64, 64)
    outputs = model(images)
    assert list(outputs) == ['stage0', 'stage1', 'stage2', 'stage3']
    for found, expected in zip(outputs.values(), model.model.backbone(images)):
        assert torch.equal(found, expected)
    assert 'data_preprocessor' in model.input_description
    # No weights of heads travel with a backbone.
    assert not [name for name, _ in model.named_parameters() if 'backbone' not in name]


def test_bgr_models_get_bgr():
    cfg = small_config('svit_classifier_shapes')
    cfg.data_preprocessor.to_rgb = False
    model = build_exportable(cfg)
    bgr = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    scores = model.model.test_step(dict(inputs=bgr))[0].pred_score
    assert difference(model(bgr.flip(1).float())['logits'][0].softmax(0), scores) <= 1e-5


def test_a_model_without_an_exportable_whole_names_what_there_is():
    cfg = Config.fromfile(CONFIGS / 'dino' / 'dino-4scale_svit-s_8xb2-12e_coco.py')
    cfg.model.backbone.update(
        arch=small_arch(), super_token_sizes=None, init_cfg=None, out_indices=(1, 2, 3)
    )
    cfg.model.neck.in_channels = [12, 16, 24]
    with pytest.raises(
        ValueError, match=r"DINO cannot be exported as 'model'.*'neck' or 'backbone'"
    ):
        build_exportable(cfg)


def test_a_segmentor_of_masks_and_not_of_pixels_is_not_exported_whole():
    """Its head's outputs are no logits."""
    cfg = Config.fromfile(
        CONFIGS / 'mask2former' / 'svit-s_mask2former_8xb2-160k_ade20k-512x512.py'
    )
    cfg.model.backbone.update(arch=small_arch(), super_token_sizes=None, init_cfg=None)
    cfg.model.decode_head.in_channels = [8, 12, 16, 24]
    with pytest.raises(ValueError, match=r"EncoderDecoder with a Mask2FormerHead .*'backbone'"):
        build_exportable(cfg)
    outputs = build_exportable(cfg, part='neck')(torch.rand(1, 3, 64, 64))
    assert list(outputs) == [f'level{i}' for i in range(4)]


def test_weights_load_strictly(tmp_path):
    cfg = small_config('svit_upernet_shapes')
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model)
    weights = {k: v for k, v in model.state_dict().items() if 'conv_seg' not in k}
    torch.save(dict(state_dict=weights), tmp_path / 'headless.pth')
    with pytest.raises(RuntimeError, match=r'decode_head\.conv_seg\.weight'):
        build_exportable(cfg, tmp_path / 'headless.pth')
    backbone = build_exportable(cfg, tmp_path / 'headless.pth', 'backbone', deploy=False)
    for name, value in backbone.model.backbone.state_dict().items():
        assert torch.equal(value, weights[f'backbone.{name}'])


@pytest.mark.parametrize('size', [(7, 11), (12, 12), (3, 40)])
def test_adaptive_pooling_is_that_of_torch(size):
    x = torch.randn(2, 3, *size)
    for bins in (1, 2, 3, 6, (2, 5)):
        expected = nn.AdaptiveAvgPool2d(bins)(x)
        torch.testing.assert_close(AdaptivePooling(bins)(x), expected)


# --- for which sizes it runs -----------------------------------------------------------


@pytest.mark.parametrize(
    ('file_format', 'deploy'),
    [
        ('onnx', False),  # Deployed it is in the segmentor below, and the exporter is slow.
        *(('torchscript', deploy) for deploy in (True, False)),
        *(('torch-export', deploy) for deploy in (True, False)),
    ],
)
def test_backbone_for_all_sizes(file_format, deploy, tmp_path):
    if file_format == 'onnx':
        for package in ('onnx', 'onnxscript', 'onnxruntime'):
            pytest.importorskip(package)
    model = exportable('svit_maskrcnn_shapes', 'backbone', deploy=deploy)
    file = tmp_path / 'backbone'
    checks = export(model, file, file_format, check_shapes=SHAPES)
    assert file.is_file() and [f.name for f in tmp_path.iterdir()] == ['backbone']
    assert {check.shape for check in checks} == set(SHAPES) and len(checks) == 4 * len(SHAPES)
    assert all(check.error <= 1e-5 for check in checks)


@pytest.mark.parametrize('name', ['svit_upernet_shapes', 'svit_classifier_shapes'])
def test_torchscript_of_whole_models(name, tmp_path):
    export(exportable(name), tmp_path / 'model.pt', 'torchscript', check_shapes=SHAPES)
    file = torch.jit.load(tmp_path / 'model.pt')
    kinds = {node.kind() for node in file.inlined_graph.nodes()}
    assert not [kind for kind in kinds if 'mmsvit' in kind or 'PythonOp' in kind]


def test_onnx_of_a_segmentor_for_all_sizes(tmp_path):
    onnx = pytest.importorskip('onnx')
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    file = tmp_path / 'upernet.onnx'
    export(exportable('svit_upernet_shapes'), file, check_shapes=SHAPES)
    graph = onnx.load(file)
    assert {node.domain for node in graph.graph.node} == {''}
    assert 'RGB' in graph.doc_string
    assert not [node for node in graph.graph.node if 'Scatter' in node.op_type]
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    (images,) = session.get_inputs()
    assert images.name == 'images' and images.shape == ['batch', 3, 'height', 'width']
    assert [output.name for output in session.get_outputs()] == ['logits', 'labels']


# --- a wrong one is refused ------------------------------------------------------------


class Specialised(nn.Module):
    """Right at the size that it is recorded at and nowhere else."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(sums=images.sum(dim=(2, 3)) / int(images.shape[2]))


class OfRange(nn.Module):
    """What the images are that it is compared at."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(low=images.amin(), high=images.amax(), mean=images.mean())


@pytest.mark.parametrize('normalised', [True, False])
def test_images_are_such_as_the_file_takes(normalised):
    seen = []

    def run(images: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(images)
        return OfRange()(images)

    assert all(check.passed for check in compare(OfRange(), run, SHAPES, 1e-4, normalised))
    pixels = torch.cat([images.flatten() for images in seen])
    assert abs(pixels.mean() - (0 if normalised else 127.5)) < 1
    assert 3 < pixels.max() < 7 if normalised else 250 < pixels.max() <= 255


class Unsteady(nn.Module):
    """Never gives the same numbers twice."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(map=torch.rand_like(images))


@pytest.mark.parametrize(
    ('model', 'message'),
    [
        (Specialised(), r'wrong in 2 of 3 comparisons and was removed; the error of sums at '),
        (Unsteady(), r'map at \(\d, \d+, \d+\) is .*, at most 0.0001 is allowed'),
    ],
)
def test_a_file_that_differs_is_not_kept(model, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        # The second is the size of the recording.
        export(model, tmp_path / 'f.pt', 'torchscript', (65, 131), check_shapes=SHAPES)
    assert not list(tmp_path.iterdir())


def test_an_older_file_stays_and_is_not_taken_for_the_new_one(tmp_path):
    (tmp_path / 'f.pt').write_text('older')
    with pytest.raises(FileExistsError, match='exists already'):
        export(Unsteady(), tmp_path / 'f.pt', 'torchscript')
    assert (tmp_path / 'f.pt').read_text() == 'older'


def test_what_cannot_be_exported_leaves_no_file(tmp_path):
    class Branches(nn.Module):
        def forward(self, images):
            return dict(x=images if images.sum() > 0 else -images)

    with pytest.raises(ExportError, match='torch-export export failed'):
        export(Branches(), tmp_path / 'f.pt2', 'torch-export')
    assert not list(tmp_path.iterdir())


def test_too_small_images_and_unknown_formats(tmp_path):
    with pytest.raises(ValueError, match='33x33 pixels or more'):
        export(Unsteady(), tmp_path / 'f', check_shapes=[(1, 32, 64)])
    with pytest.raises(ValueError, match="'tensorrt' is unknown; use one of"):
        export(Unsteady(), tmp_path / 'f', 'tensorrt')


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ImportError, match='pip install onnx onnxscript onnxruntime'):
        export(Unsteady(), tmp_path / 'f.onnx')


@pytest.mark.parametrize(
    ('found', 'expected', 'error'),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]), 0.5),
        (torch.tensor([1, 2]), torch.tensor([1, 4]), 0.5),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 4.0]), float('inf')),
        (torch.ones(2), torch.ones(1), float('inf')),
        (torch.ones(2), torch.ones(2).double(), float('inf')),
    ],
)
def test_difference(found, expected, error):
    assert difference(found, expected) == error


# --- the tool, and mmsvit without mm* --------------------------------------------------


def test_tool(tmp_path):
    file = tmp_path / 'sub' / 'svit.pt'
    tool = ['tools/export.py', CONFIGS / 'svit_upernet_shapes.py', '--part', 'backbone']
    tool += ['--format', 'torchscript', '--output', file, '--check-shapes', '1x64x96', '2x35x77']
    result = run_python(*tool)
    assert '2x35x77' in result.stdout and 'stage3' in result.stdout
    assert 'RGB images' in result.stdout and 'untrained' in result.stdout
    assert torch.jit.load(file)(torch.rand(1, 3, 40, 50))['stage3'].shape == (1, 128, 2, 2)
    assert 'exists already' in run_python(*tool, check=False).stderr

    tool[tool.index(file)] = tmp_path / 'strict.pt'
    result = run_python(*tool, '--tolerance', '1e-12', check=False)
    assert result.returncode != 0 and 'was removed' in result.stderr
    assert not (tmp_path / 'strict.pt').exists()


WITHOUT_MM = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'torchvision'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Absent())
"""
THEN = """
assert [tuple(x.shape) for x in maps] == [
    (1, 64, 56, 80), (1, 128, 28, 40), (1, 320, 14, 20), (1, 512, 7, 10)
]
import sys
assert float(backbone.stages[0].blocks[0].norm1.bias[0]) == 7  # as in the file
backbone.requires_grad_(True).train()
sum(x.sum() for x in backbone(torch.randn(2, 3, 32, 32))).backward()
assert backbone.stem[0].weight.grad.abs().sum() > 0
backbone.eval()
maps = backbone(torch.ones(1, 3, 33, 40))
backbone.switch_to_deploy()
for one, other in zip(backbone(torch.ones(1, 3, 33, 40)), maps):
    assert (one - other).abs().max() <= 1e-4 * other.abs().max()
"""


def test_features_without_mm(tmp_path):
    """The example in the documentation, with torch, numpy, mmengine and what that needs."""
    (example,) = re.findall(
        r'```python\n(import torch\n.*?)```', (ROOT / 'docs' / 'export.md').read_text(), re.DOTALL
    )
    weights = SViT('small').state_dict()
    weights['stages.0.blocks.0.norm1.bias'][0] = 7
    (tmp_path / 'checkpoints').mkdir()
    torch.save(weights, tmp_path / 'checkpoints' / 'stvit-small-224.pth')
    (tmp_path / 'run.py').write_text(WITHOUT_MM + example + THEN)
    # From a folder where mmsvit is not to be found by accident.
    run_python(tmp_path / 'run.py', cwd=tmp_path)


def test_every_module_of_the_backbone_imports_without_mm():
    modules = ('models', 'models.deploy', 'checkpoint', 'ops', 'registry', 'export')
    imports = ''.join(f'import mmsvit.{name}\n' for name in modules)
    run_python('-c', WITHOUT_MM + imports)
