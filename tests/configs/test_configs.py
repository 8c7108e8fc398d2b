"""Every config parses and fits together, and its settings are the published ones where there are some."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_python
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

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


def without_decay(model: nn.Module, wrapper: OptimWrapper) -> set[str]:
    """What has no weight decay, in words; a kind of which only a part has none counts as neither."""
    decay = {
        id(p): group['weight_decay'] for group in wrapper.param_groups for p in group['params']
    }
    kinds: dict[str, set[bool]] = defaultdict(set)
    for owner_name, owner in model.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if isinstance(owner, (_BatchNorm, nn.LayerNorm, nn.GroupNorm)):
                kind = 'norms'
            elif name.startswith('gamma_'):
                kind = 'layer scale'
            elif name == 'bias':
                kind = 'biases'
            elif name == 'in_proj_bias':
                kind = 'biases of packed projections'
            elif isinstance(owner, nn.Embedding):
                kind = owner_name.rpartition('.')[2]
            else:
                kind = 'weights'
            if parameter.requires_grad:
                kinds[kind].add(decay[id(parameter)] == 0)
    return {kind for kind, spared in kinds.items() if spared == {True}}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_weight_decay_spares_what_the_recipe_says(path):
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    if isinstance(cfg.model.backbone.arch, str):  # S has no layer scale.
        arch = dict(ARCHS[cfg.model.backbone.arch], layer_scale=(None, None, 0.1, 0.1))
        cfg.model.backbone.update(arch=arch, super_token_sizes=None, num_iters=None)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    expected = {'norms', 'biases', 'layer scale'}
    if cfg.default_scope == 'mmpretrain':
        expected.remove('layer scale')  # as in the authors' script
    if 'mask2former' in path.stem:
        expected |= {'query_embed', 'query_feat', 'level_embed'}
    if isinstance(cfg.model.backbone.arch, dict) and not any(cfg.model.backbone.arch.layer_scale):
        expected.discard('layer scale')
    cfg.optim_wrapper.type = 'OptimWrapper'  # The groups are the same; AMP needs a GPU.
    for key in ('dtype', 'loss_scale'):
        cfg.optim_wrapper.pop(key, None)
    assert without_decay(model, build_optim_wrapper(model, cfg.optim_wrapper)) == expected


@pytest.mark.parametrize(
    'name',
    [
        'dino/dino-4scale_svit-s_8xb2-12e_coco',
        'mask2former/svit-s_mask2former_8xb2-160k_ade20k-512x512',
    ],
)
def test_query_based_models_train_the_backbone_at_a_tenth(name):
    cfg = Config.fromfile(config_path(f'{name}.py'))
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    ids = {id(parameter) for parameter in model.backbone.parameters()}
    for group in build_optim_wrapper(model, cfg.optim_wrapper).param_groups:
        rate = 0.1 if id(group['params'][0]) in ids else 1
        assert group['lr'] == pytest.approx(rate * cfg.optim_wrapper.optimizer.lr)


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
