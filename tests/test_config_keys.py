"""Settings that nothing reads are refused, and what is meant is named; all others pass."""

from __future__ import annotations

import argparse

import pytest
from conftest import ROOT
from mmengine.config import Config

from mmsvit import cli
from mmsvit.config_keys import check_keys, check_options

MASKRCNN = ROOT / 'configs' / 'svit_maskrcnn_coco.py'
CONFIGS = [
    path
    for folder in ('configs', 'examples')
    for path in sorted((ROOT / folder).rglob('*.py'))
    if '_base_' not in path.parts and path.stem != 'retinanet_onnx_boxes'
]


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_passes(path):
    check_keys(Config.fromfile(path))


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        (
            'train_cgf.max_epochs',
            r"nothing reads it, 'train_cgf' is no setting; did you mean 'train_cfg'",
        ),
        ('optim_wraper.optimizer.lr', r"did you mean 'optim_wrapper'"),
        (
            'vis_backends.0.type',
            r'is a variable of the config file.*set visualizer\.vis_backends instead',
        ),
        ('data_root', r"'data_root' is a variable of the config file, used before"),
        ('something', r"'something' is no setting"),
        (
            'env_cfg.cudnn_benchmarks',
            r"'cudnn_benchmarks' of env_cfg, which has .*; did you mean 'cudnn_benchmark'",
        ),
        (
            'auto_scale_lr.enabled',
            r"'enabled' of auto_scale_lr, which has base_batch_size, enable; did you mean 'enable'",
        ),
        ('optim_wrapper.paramwise_cfg.norm_decay', r"did you mean 'norm_decay_mult'"),
        (
            'model.test_cfg.rcnn.score_thresh',
            r"has no 'score_thresh' so far; did you mean 'score_thr'",
        ),
        ('model.train_cfg.rpn_proposals.nms_pre', r"did you mean 'rpn_proposal'"),
    ],
)
def test_options_that_nothing_reads_are_refused(option, message):
    with pytest.raises(
        ValueError, match=f'--cfg-options {option}.*{message}.*--allow-unknown-keys'
    ):
        check_options(Config.fromfile(MASKRCNN), {option: 1})


@pytest.mark.parametrize(
    'option',
    [
        'train_cfg.max_epochs',
        'optim_wrapper.accumulative_counts',
        'optim_wrapper.clip_grad.max_norm',
        'model.backbone.with_cp',
        'model.backbone.init_cfg',
        'model.neck.norm_cfg.type',
        'model.test_cfg.rcnn.mask_thr_binary',
        'model.roi_head.bbox_head.num_classes',
        'train_dataloader.dataset.pipeline.0.imdecode_backend',
        'default_hooks.checkpoint.max_keep_ckpts',
        'custom_hooks.2.type',
        'visualizer.vis_backends.1.type',
        'load_from',
        'compile',
        'randomness.seed',
        'work_dir',
    ],
)
def test_options_that_are_read_pass(option):
    check_options(Config.fromfile(MASKRCNN), {option: 1})


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('optim_wraper = dict()', r"'optim_wraper' of the config; did you mean 'optim_wrapper'"),
        ('val_dataloder = dict()', "did you mean 'val_dataloader'"),
        ('default_hook = dict()', "did you mean 'default_hooks'"),
        ('env_cfg = dict(cudnn_benchmak=True)', "did you mean 'cudnn_benchmark'"),
        (
            'optim_wrapper = dict(paramwise_cfg=dict(custom_key=dict()))',
            "'custom_key' of optim_wrapper.paramwise_cfg; did you mean 'custom_keys'",
        ),
    ],
)
def test_misspelt_settings_of_a_config_file_are_refused(tmp_path, text, message):
    (tmp_path / 'config.py').write_text(text)
    args = argparse.Namespace(cfg_options=None, allow_unknown_keys=False)
    with pytest.raises(ValueError, match=message):
        cli.read_config(tmp_path / 'config.py', args)
    args.allow_unknown_keys = True
    cli.read_config(tmp_path / 'config.py', args)


def test_a_variable_is_set_where_it_is_used(tmp_path):
    (tmp_path / 'config.py').write_text(
        "steps = [dict(type='Flip')]\ntrain_dataloader = dict(dataset=dict(pipeline=steps))"
    )
    with pytest.raises(ValueError, match=r'set train_dataloader\.dataset\.pipeline instead'):
        check_options(Config.fromfile(tmp_path / 'config.py'), {'steps.0.type': 'Crop'})


def test_variables_and_settings_of_other_constructors_pass(tmp_path):
    (tmp_path / 'config.py').write_text(
        'train_pipeline = []\nval_evaluator_small = dict()\nnum_epochs = 3\n'
        "optim_wrapper = dict(constructor='Mine', paramwise_cfg=dict(anything=1))"
    )
    check_keys(Config.fromfile(tmp_path / 'config.py'))


@pytest.mark.parametrize('base', ['mmsvit::svit_maskrcnn_coco.py', 'mmsvit::mask_rcnn/x.py'])
def test_a_base_that_mmengine_does_not_find_is_told_the_form_that_works(tmp_path, base):
    (tmp_path / 'config.py').write_text(f'_base_ = {base!r}')
    args = argparse.Namespace(cfg_options=None, allow_unknown_keys=False)
    with pytest.raises(ValueError, match=r"config_path\('svit_maskrcnn_coco\.py'\)"):
        cli.read_config(tmp_path / 'config.py', args)
