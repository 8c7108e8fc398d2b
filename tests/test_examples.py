"""Projects that inherit from an installed mmsvit, with everybody's tools and without ours."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT, run_python

# A checkout of mmsvit is not where these run, and its tools are those of the wheel.
LIBRARY = {'maskrcnn_own_data': 'mmdet', 'upernet_own_data': 'mmseg'}
SMALL = {
    'maskrcnn_own_data': [
        'model.backbone.norm_eval=False',
        'train_dataloader.dataset.pipeline.2.scale=(96,96)',
        'test_dataloader.dataset.pipeline.1.scale=(96,96)',
        'val_dataloader.dataset.pipeline.1.scale=(96,96)',
        'train_cfg.max_epochs=1',
    ],
    'upernet_own_data': [
        'model.data_preprocessor.size=(64,64)',
        'train_dataloader.dataset.pipeline.2.scale=(128,64)',
        'train_dataloader.dataset.pipeline.3.crop_size=(64,64)',
        'test_dataloader.dataset.pipeline.1.scale=(128,64)',
        'val_dataloader.dataset.pipeline.1.scale=(128,64)',
        'train_cfg.max_iters=2',
        'train_cfg.val_interval=2',
        'default_hooks.checkpoint.interval=2',
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize('tools', ['theirs', 'ours'])
@pytest.mark.parametrize('name', LIBRARY)
def test_downstream_project(name, tools, site, shapes, tmp_path):
    shutil.copy(ROOT / 'examples' / f'{name}.py', tmp_path)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'shapes').symlink_to(shapes)
    package = Path(find_spec(LIBRARY[name]).origin).parent
    if tools == 'ours':
        package = site / 'mmsvit'
    folder = package / '.mim' / 'tools'
    options = ['--cfg-options', 'model.backbone.init_cfg=None', *SMALL[name]]
    options += [f'{split}_dataloader.num_workers=0' for split in ('train', 'val', 'test')]
    options += [
        f'{split}_dataloader.persistent_workers=False' for split in ('train', 'val', 'test')
    ]
    tool = [folder / 'train.py', f'{name}.py', '--work-dir', 'work']
    result = run_python(*tool, *options, cwd=tmp_path, site=site)
    metric = {'mmdet': 'coco/segm_mAP', 'mmseg': 'mIoU'}[LIBRARY[name]]
    assert metric in result.stdout + result.stderr
