"""UperNet the whole way through the stock runner: train, resume, test, infer."""

from __future__ import annotations

import json
import pickle
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT, RUN, WITHOUT_COMPILED, run_python

from mmsvit.compat.mmcv_ext import is_stand_in

CONFIG = ROOT / 'configs' / 'svit_upernet_shapes.py'
MMSEG_TOOLS = Path(find_spec('mmseg').origin).parent / '.mim' / 'tools'


def options(shapes: Path, *more: str) -> list[str]:
    """The example config on the small data set: two iterations of four images at a time."""
    loaders = ('train', 'val', 'test')
    return [
        '--cfg-options',
        *(f'{split}_dataloader.dataset.data_root={shapes}/' for split in loaders),
        *(f'{split}_dataloader.num_workers=0' for split in loaders),
        *(f'{split}_dataloader.persistent_workers=False' for split in loaders),
        'train_dataloader.batch_size=4',
        'model.data_preprocessor.size=(64,64)',
        'train_cfg.val_interval=2',
        'default_hooks.checkpoint.interval=2',
        'default_hooks.logger.interval=1',
        *more,
    ]


@pytest.fixture(scope='module', params=['mmseg', 'mmsvit', 'without compiled ops'])
def trained(request, shapes, tmp_path_factory):
    """Two iterations and two more after resuming, by mmseg's own tool and by ours."""
    folder = MMSEG_TOOLS if request.param == 'mmseg' else ROOT / 'tools'
    start = ['-c', WITHOUT_COMPILED + RUN] if request.param.startswith('without') else []
    work_dir = tmp_path_factory.mktemp('upernet')
    arguments = [*start, folder / 'train.py', CONFIG, '--work-dir', work_dir]
    # In a folder from which mmsvit cannot be imported by accident.
    run_python(*arguments, *options(shapes, 'train_cfg.max_iters=2'), cwd=work_dir)
    longer = ('train_cfg.max_iters=4', 'default_hooks.run_record.force_resume=True')
    result = run_python(*arguments, '--resume', *options(shapes, *longer), cwd=work_dir)
    return start, folder, work_dir, result.stdout + result.stderr


@pytest.mark.slow
def test_trains_resumes_and_evaluates(trained):
    _, _, work_dir, output = trained
    assert 'resumed epoch: 0, iter: 2' in output and 'mIoU' in output
    first, second = (torch.load(work_dir / f'iter_{i}.pth', weights_only=False) for i in (2, 4))
    weight = 'backbone.stages.0.blocks.0.attn.attend.qkv.weight'
    assert not torch.equal(first['state_dict'][weight], second['state_dict'][weight])


@pytest.mark.slow
def test_tests_a_checkpoint(trained, shapes, tmp_path):
    start, folder, work_dir, _ = trained
    (tmp_path / 'out').mkdir()
    out = tmp_path / 'out' / ('labels' if folder == MMSEG_TOOLS else 'labels.pkl')
    run_python(
        *(*start, folder / 'test.py', CONFIG, work_dir / 'iter_4.pth', '--work-dir', tmp_path),
        *('--out', out, '--show-dir', tmp_path / 'shown', '--tta'),
        *options(shapes),
        cwd=tmp_path,
    )
    if folder == MMSEG_TOOLS:  # which writes label maps, and draws one image in 50
        assert len(list(out.glob('*.png'))) == 4
    else:
        assert len(list((tmp_path / 'shown').rglob('*.png'))) == 4
        labels = pickle.loads(out.read_bytes())[0]['pred_sem_seg']['data']
        assert labels.shape == (1, 64, 64) and labels.max() < 6
    (metrics,) = tmp_path.glob('*/*.json')
    assert 0 <= json.loads(metrics.read_text())['mIoU'] <= 100


SEGMENTOR = """
import sys
import numpy as np
from mmseg.apis import MMSegInferencer, inference_model, init_model
config, checkpoint, image, out = sys.argv[1:]
model = init_model(config, checkpoint, device='cpu')
assert type(model.backbone).__module__ == 'mmsvit.models.svit'
single = inference_model(model, image).pred_sem_seg.data
assert single.shape == (1, 64, 64)
wide = inference_model(model, np.zeros((47, 95, 3), np.uint8)).pred_sem_seg.data
assert wide.shape == (1, 47, 95)
inferencer = MMSegInferencer(config, checkpoint, device='cpu')
found = inferencer([image, image], out_dir=out)['predictions']
assert len(found) == 2 and (found[0] == single[0].numpy()).all()
"""


@pytest.mark.slow
def test_inference_apis(trained, shapes, tmp_path):
    start, _, work_dir, _ = trained
    code = SEGMENTOR
    if is_stand_in():  # Without compiled ops, mmsvit must be imported before the others.
        code = f'import mmsvit\n{code}'
    if start:
        code = WITHOUT_COMPILED + 'import mmsvit\nwarnings.resetwarnings()\n' + code
    image = shapes / 'val' / '000001.jpg'
    run_python('-c', code, CONFIG, work_dir / 'iter_4.pth', image, tmp_path, cwd=tmp_path)
    assert list(tmp_path.rglob('*.jpg')) and list(tmp_path.rglob('*.png'))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ('model.auxiliary_head.num_classes=5', 'auxiliary_head.num_classes is 5'),
        ('train_dataloader.dataset.data_prefix.seg_map_path=nowhere', 'nowhere'),
    ],
)
def test_bad_settings_end_before_training(change, message, shapes, tmp_path):
    arguments = [CONFIG, '--work-dir', tmp_path, *options(shapes, change)]
    result = run_python(ROOT / 'tools' / 'train.py', *arguments, cwd=tmp_path, check=False)
    assert result.returncode != 0 and message in result.stderr, result.stderr[-2000:]
    assert 'Iter(train)' not in result.stdout + result.stderr
