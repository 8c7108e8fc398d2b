"""UperNet trains on images and label maps that have everything wrong that a run should survive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.runner import Runner
from one_step import shrink
from PIL import Image

GOOD = ('good', 'wide')
SIZES = {'pixel': (1, 1), 'wide': (20000, 200)}
# MMSegmentation squeezes label maps: of one pixel, nothing is left that could be resized.
BAD_IMAGES = ('corrupt', 'cut', 'pixel')
BAD_LABELS = ('label_corrupt', 'label_cut', 'label_missing')


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    file.unlink()
    if how == 'cut':
        file.write_bytes(content[: len(content) // 2])
    elif how == 'corrupt':
        file.write_bytes(b'no image')
    else:
        file.symlink_to('nowhere')


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In train two pairs that can be used and six that cannot, in val and wide one each."""
    folder, rng = tmp_path_factory.mktemp('damaged'), np.random.default_rng(0)
    for split, names in (
        ('train', (*GOOD, *BAD_IMAGES, *BAD_LABELS)),
        ('val', ('good',)),
        ('wide', ('wide',)),
    ):
        images, labels = folder / split, folder / 'annotations' / f'semantic_{split}'
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for name in names:
            width, height = SIZES.get(name, (64, 64))
            pixels = rng.integers(0, 255, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(images / f'{name}.jpg')
            Image.fromarray(pixels[..., 0] % 6).save(labels / f'{name}.png')
            if name in BAD_IMAGES and name not in SIZES:
                damage(images / f'{name}.jpg', name)
            elif name in BAD_LABELS:
                damage(labels / f'{name}.png', name.removeprefix('label_'))
    return folder


def runner(data: Path, work_dir: Path, **changes: object) -> Runner:
    """The shapes config with ADE20K's pipelines at an eighth of their size."""
    cfg = Config.fromfile(ROOT / 'configs' / 'svit_upernet_shapes.py')
    ade20k = Config.fromfile(ROOT / 'configs' / 'svit_upernet_ade20k.py')
    for split in ('train', 'val'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = f'{data}/'
        loader.dataset.pipeline = shrink(ade20k[f'{split}_dataloader'].dataset.pipeline)
        for step in loader.dataset.pipeline:
            step.pop('reduce_zero_label', None)  # The shapes have a background.
    cfg.merge_from_dict(
        {
            'work_dir': str(work_dir),
            'experiment_name': work_dir.parent.name,
            'model.data_preprocessor.size': (64, 64),
            'train_dataloader.batch_size': 2,
            # Ten samples: each of the eight, and two again.
            'train_cfg': dict(max_iters=5, val_interval=5),
            'default_hooks.checkpoint': dict(interval=5, save_best=None),
            **changes,
        }
    )
    return Runner.from_cfg(cfg)


@pytest.mark.promise(
    'Runs',
    'UperNet trains on damaged images and label maps, and on images of 1x1 and 20000x200 '
    'pixels; evaluation skips nothing',
    '6 of 8 samples skipped and counted, weights finite',
)
def test_upernet_trains_and_is_evaluated_on_it(data, tmp_path):
    runner(data, tmp_path / 'run').train()
    log = ''.join(path.read_text() for path in (tmp_path / 'run').glob('*/*.log'))
    assert '6 training samples could not be loaded' in log
    for name in BAD_IMAGES:
        assert f'train/{name}.jpg' in log
    for name in BAD_LABELS:
        assert f'semantic_train/{name}.png' in log
    assert 'mIoU' in log
    weights = torch.load(tmp_path / 'run' / 'iter_5.pth')['state_dict']
    assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.promise(
    'Runs',
    'UperNet trains on damaged images and label maps, and on images of 1x1 and 20000x200 '
    'pixels; evaluation skips nothing',
)
@pytest.mark.parametrize(
    ('split', 'error', 'message'),
    [
        ('train', RuntimeError, r'a validation sample cannot be loaded: .*corrupt\.jpg'),
        ('wide', ValueError, '32x32 pixels or more, found 3x256'),
    ],
)
def test_evaluation_leaves_out_nothing(split, error, message, data, tmp_path):
    folders = dict(img_path=split, seg_map_path=f'annotations/semantic_{split}')
    changes = {'val_dataloader.dataset.data_prefix': folders}
    changes['train_cfg'] = dict(max_iters=1, val_interval=1)
    with pytest.raises(error, match=message):
        runner(data, tmp_path / 'run', **changes).train()
