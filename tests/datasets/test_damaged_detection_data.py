"""A detector trains on a COCO file that has everything wrong with it that a run should survive."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_python
from PIL import Image

from mmsvit.datasets.coco_annotations import summarise

CLASSES = ['circle', 'square', 'triangle', 'star', 'ring']


def write_damaged(folder: Path) -> Path:
    """Eight images: good, 1x1, 20000x200, without objects, bad boxes only, corrupt, cut, missing."""
    rng = np.random.default_rng(0)
    names = ('good', 'pixel', 'wide', 'empty', 'boxes', 'corrupt', 'cut', 'missing')
    sizes = {'pixel': (1, 1), 'wide': (20000, 200)}
    images, annotations = [], []
    (folder / 'train').mkdir(parents=True)

    def annotate(image: int, box: list[float]) -> None:
        x, y, w, h = box
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        annotations.append(
            dict(id=len(annotations) + 1, image_id=image, category_id=1, bbox=box, area=w * h)
            | dict(iscrowd=0, segmentation=[polygon])
        )

    for i, name in enumerate(names):
        width, height = sizes.get(name, (64, 64))
        file = folder / 'train' / f'{name}.jpg'
        pixels = rng.integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(file)
        images.append(dict(id=i, file_name=file.name, width=width, height=height))
        if name == 'boxes':
            annotate(i, [10, 10, 0, 20])
            annotate(i, [100, 100, 20, 20])
        elif name != 'empty':
            annotate(i, [0.25 * width, 0.25 * height, 0.5 * width, 0.5 * height])
    (folder / 'train' / 'corrupt.jpg').write_bytes(b'no image')
    content = (folder / 'train' / 'cut.jpg').read_bytes()
    (folder / 'train' / 'cut.jpg').write_bytes(content[: len(content) // 2])
    (folder / 'train' / 'missing.jpg').unlink()
    categories = [dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)]
    file = folder / 'train.json'
    file.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    return file


@pytest.mark.promise(
    'Runs',
    'A detector trains on boxes without area or outside the image, images without objects, '
    'images of 1x1 and 20000x200 pixels',
    'all counted; weights finite',
)
def test_what_is_left_out_is_counted(tmp_path):
    counts = summarise(json.loads(write_damaged(tmp_path).read_text())).left_out
    assert counts == {
        # A box of half a pixel as well, in the image of one.
        'boxes without area, skipped by MMDetection': 2,
        'boxes outside the image, skipped by MMDetection': 1,
        'images without objects; used only if filter_empty_gt=False': 3,
    }


@pytest.mark.promise(
    'Runs',
    'A detector trains on boxes without area or outside the image, images without objects, '
    'images of 1x1 and 20000x200 pixels',
)
@pytest.mark.slow
def test_a_detector_trains_on_it(tmp_path):
    file = write_damaged(tmp_path / 'data')
    result = run_python(
        *('tools/train.py', ROOT / 'configs' / 'svit_maskrcnn_shapes.py'),
        *('--work-dir', tmp_path / 'run', '--cfg-options'),
        f'train_dataloader.dataset.data_root={file.parent}/',
        f'train_dataloader.dataset.ann_file={file}',
        'train_dataloader.dataset.filter_cfg=None',  # Else the smallest and empty ones go.
        'train_dataloader.num_workers=2',
        'train_dataloader.persistent_workers=False',
        'train_dataloader.batch_size=2',
        *('val_cfg=None', 'val_dataloader=None', 'val_evaluator=None'),
        *('default_hooks.checkpoint.save_best=None', 'train_cfg.max_epochs=1'),
    )
    log = result.stdout + result.stderr
    for counted in ('2 boxes without area', '1 box outside', '3 images without objects'):
        assert counted in log
    assert '3 training samples could not be loaded' in log
    for name in ('corrupt.jpg', 'cut.jpg', 'missing.jpg'):
        assert name in log
    weights = torch.load(tmp_path / 'run' / 'epoch_1.pth', weights_only=False)['state_dict']
    assert all(torch.isfinite(value).all() for value in weights.values())
