"""Every config trains and evaluates for a step, from an installed wheel.

One config of each method by default, all of them with ``-m all_configs``.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, run_python
from mmdet.datasets import CocoDataset

CONFIGS = sorted(
    str(path.relative_to(ROOT / 'configs'))
    for path in (ROOT / 'configs').glob('*/*.py')
    # Sharding has a test of its own in test_distributed.py, CamVid in test_camvid.py.
    if path.parent.name not in ('_base_', 'camvid') and 'fsdp' not in path.name
)
ONE_OF_EACH = (
    'cascade_mask_rcnn/cascade-mask-rcnn_svit-s_fpn_ms-crop-3x_coco.py',
    'dino/dino-4scale_svit-s_8xb2-12e_coco.py',
    'mask2former/svit-s_mask2former_8xb2-160k_ade20k-512x512.py',
    'mask_rcnn/mask-rcnn_svit-s_fpn_1x_coco.py',
    'retinanet/retinanet_svit-s_fpn_1x_coco.py',
    'sem_fpn/svit-s_fpn_8xb2-80k_ade20k-512x512.py',
    'svit/svit-small_8xb128_in1k.py',
    'upernet/svit-s_upernet_8xb2-160k_ade20k-512x512.py',
)


@pytest.fixture(scope='session')
def small_data(shapes, tmp_path_factory) -> Path:
    """The generated shapes, passed off as COCO, ADE20K and ImageNet."""
    folder = tmp_path_factory.mktemp('small') / 'data'
    shutil.copytree(shapes, folder)
    for split in ('train', 'val'):
        file = folder / 'annotations' / f'instances_{split}.json'
        annotations = json.loads(file.read_text())
        names = CocoDataset.METAINFO['classes']
        annotations['categories'] = [dict(id=i + 1, name=name) for i, name in enumerate(names)]
        count = 2  # images: one step
        annotations['images'] = annotations['images'][:count]
        known = {image['id'] for image in annotations['images']}
        annotations['annotations'] = [
            one for one in annotations['annotations'] if one['image_id'] in known
        ]
        file.write_text(json.dumps(annotations))
        images = sorted(path.name for path in (folder / split).glob('*.jpg'))[:count]
        (folder / f'{split}.txt').write_text(''.join(f'{image} 0\n' for image in images))
        for image in (folder / split).glob('*.jpg'):
            if image.name not in images:
                image.unlink()
    return folder


def step(name: str, site: Path, data: Path, work_dir: Path) -> None:
    script = ROOT / 'tests' / 'one_step.py'
    result = run_python(script, name, data, work_dir, cwd=work_dir, site=site)
    loss = result.stdout.rpartition('ONE STEP')[2]
    assert math.isfinite(float(loss))


@pytest.mark.slow
@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_one_of_each_method(name, site, small_data, tmp_path):
    step(name, site, small_data, tmp_path)


@pytest.mark.slow
@pytest.mark.all_configs
@pytest.mark.parametrize('name', CONFIGS)
def test_all_configs(name, site, small_data, tmp_path):
    step(name, site, small_data, tmp_path)
