"""Every config parses and fits together, and its settings are the published ones where there are some."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_python
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from mmsvit import SViT, config_path
from mmsvit.cli import GUARDS
from mmsvit.models.svit_arch import ARCHS

SHORT = sorted((ROOT / 'configs').glob('*.py'))
CONFIGS = [
    *SHORT,
    *(path for path in (ROOT / 'configs').glob('*/*.py') if path.parent.name != '_base_'),
]
# Keys of the 2.x generation that 3.x ignores without a word.
OLD_KEYS = {
    'data',
    'runner',
    'optimizer',
    'optimizer_config',
    'lr_config',
    'evaluation',
    'log_config',
}


SEGMENTORS = [
    *(path for path in CONFIGS if re.search(r'upernet|ade20k', path.name)),
    ROOT / 'examples' / 'upernet_own_data.py',
]
LOAD = 'LoadAnnotations'


@pytest.mark.promise(
    'Runs',
    'All of these hooks are on by default, and each can be switched off',
    'every config',
)
@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_fits_together(path):
    cfg = Config.fromfile(path)
    old = OLD_KEYS & set(cfg)
    if cfg.get('optimizer') == cfg.optim_wrapper.optimizer:
        old -= {'optimizer'}  # A variable, which MMSegmentation's Mask2Former leaves behind.
    assert not old
    backbone = cfg.model.backbone
    assert backbone.type == 'mmsvit.SViT'
    arch = ARCHS[backbone.arch] if isinstance(backbone.arch, str) else backbone.arch
    dims = [arch['embed_dims'][i] for i in backbone.get('out_indices', range(4))]
    after = cfg.model.get('neck') or cfg.model.decode_head
    assert after.in_channels in (dims, dims[-1])
    if 'auxiliary_head' in cfg.model:
        assert cfg.model.auxiliary_head.in_channels == dims[cfg.model.auxiliary_head.in_index]
    pretrained = backbone.get('init_cfg')
    if pretrained is not None and isinstance(backbone.arch, str):
        assert pretrained.checkpoint == f'checkpoints/stvit-{backbone.arch}-224.pth'
    assert cfg.auto_scale_lr.base_batch_size > 0 and not cfg.auto_scale_lr.get('enable')
    assert cfg.custom_imports.imports[0] == 'mmsvit.checkpoint'
    assert dict(type='mmsvit.CheckDatasetHook') in cfg.custom_hooks
    assert {name: cfg.default_hooks[name].type for name in GUARDS} == GUARDS
    assert cfg.default_hooks.checkpoint.type == 'mmsvit.SafeCheckpointHook'


@pytest.mark.parametrize('path', SHORT, ids=lambda path: path.stem)
def test_config_builds(path):
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    assert isinstance(MODELS.build(cfg.model).backbone, SViT)


def test_coco_config_is_the_published_setting():
    cfg = Config.fromfile(config_path('svit_maskrcnn_coco.py'))
    assert cfg.train_cfg.max_epochs == 12
    assert cfg.param_scheduler[-1].milestones == [8, 11]
    assert cfg.optim_wrapper.optimizer == dict(
        type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05
    )
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.train_pipeline[2].scale == (1333, 800)


@pytest.mark.parametrize(
    ('name', 'rate'),
    [
        ('svit_maskrcnn_coco', 1),
        ('svit_upernet_ade20k', 1),
        ('dino/dino-4scale_svit-s_8xb2-12e_coco', 0.1),
        ('mask2former/svit-s_mask2former_8xb2-160k_ade20k-512x512', 0.1),
    ],
)
def test_weight_decay_spares_norms_biases_and_layer_scale(name, rate):
    cfg = Config.fromfile(config_path(f'{name}.py'))
    scale = (None, None, 0.1, 0.1)
    cfg.model.backbone.update(arch={**ARCHS['small'], 'layer_scale': scale}, init_cfg=None)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    groups = {
        id(group['params'][0]): group
        for group in build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    }
    optimizer = cfg.optim_wrapper.optimizer
    for name, parameter in model.backbone.named_parameters():
        group = groups[id(parameter)]
        expected = 0 if parameter.ndim == 1 else optimizer.weight_decay
        assert group['weight_decay'] == expected, name
        assert group['lr'] == pytest.approx(rate * optimizer.lr), name


@pytest.mark.parametrize('path', SEGMENTORS, ids=lambda path: path.stem)
def test_multi_scale_testing_multiplies_the_size_of_single_scale_testing(path):
    cfg = Config.fromfile(path)
    init_default_scope('mmseg')

    def sizes(pipeline: list[dict]) -> list[list[int]]:
        """What the transforms make of a large image; loading is what needs files."""
        steps = [step for step in pipeline if step['type'] not in ('LoadImageFromFile', LOAD)]
        image = np.zeros((1500, 2000, 3), np.uint8)
        sample = dict(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])
        inputs = Compose(steps)(sample)['inputs']
        inputs = inputs if isinstance(inputs, list) else [inputs]
        return [list(each.shape[1:]) for each in inputs]

    (single,) = sizes(cfg.test_dataloader.dataset.pipeline)
    views = cfg.tta_pipeline[1]
    views.transforms = [each for each in views.transforms if each[0]['type'] != LOAD]
    ratios = (0.75, 1.0, 1.25) if 'shapes' in path.stem else (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    expected = [[round(side * ratio) for side in single] for ratio in ratios for _ in range(2)]
    np.testing.assert_allclose(sizes(cfg.tta_pipeline), expected, atol=1)


def test_config_path_lists_what_there_is():
    assert Path(config_path('svit_maskrcnn_shapes.py')).is_file()
    with pytest.raises(FileNotFoundError, match=r'svit_maskrcnn_coco\.py'):
        config_path('nothing.py')


def test_configs_are_in_the_wheel(site, tmp_path):
    code = (
        'import mmsvit; from mmengine.config import Config; '
        'path = mmsvit.config_path("svit_maskrcnn_shapes.py"); '
        f'assert path.startswith({str(site)!r}) and ".mim" in path, path; '
        'assert Config.fromfile(path).model.backbone.type == "mmsvit.SViT"'
    )
    run_python('-c', code, cwd=tmp_path, site=site)
    assert (site / 'mmsvit' / '.mim' / 'model-index.yml').is_file()


def test_config_path_finds_those_of_other_packages():
    path = Path(config_path('mmseg::_base_/datasets/ade20k.py'))
    assert path.is_file() and 'mmseg' in path.parts
    with pytest.raises(FileNotFoundError, match=r'mmseg has no config .*/ade20k\.py'):
        config_path('mmseg::_base_/datasets/nothing.py')
    with pytest.raises(FileNotFoundError, match="'nowhere' is not installed"):
        config_path('nowhere::x.py')
