"""The generated data set, and the checks that keep wrong data out of a run."""

from __future__ import annotations

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import run_python
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch import nn

from mmsvit.datasets.quick_checks import check_data
from mmsvit.engine.hooks.check_dataset_hook import CheckDatasetHook

CLASSES = ('circle', 'square', 'triangle', 'star', 'ring')
SIZES = ['--num-train', '3', '--num-val', '2', '--size', '64', '--max-shapes', '8']


def generate(folder, *options, check=True):
    return run_python('tools/make_shapes_dataset.py', folder, *SIZES, *options, check=check)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_annotations_are_true(shapes, split):
    coco = COCO(shapes / 'annotations' / f'instances_{split}.json')
    assert [category['name'] for category in coco.cats.values()] == list(CLASSES)
    assert coco.anns
    for image in coco.imgs.values():
        pixels = cv2.imread(str(shapes / split / image['file_name']))
        assert pixels.shape == (image['height'], image['width'], 3)
        masks = []
        for ann in coco.imgToAnns[image['id']]:
            mask = coco.annToMask(ann).astype(bool)
            rows, columns = np.nonzero(mask)
            x, y, width, height = ann['bbox']
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
            assert ann['area'] == mask.sum() == coco_mask.area(coco.annToRLE(ann)) >= 40
            masks.append(mask)
        # Masks are of the visible parts: no pixel belongs to two.
        assert not masks or np.sum(masks, axis=0).max() <= 1


@pytest.mark.parametrize('split', ['train', 'val'])
def test_label_maps_are_the_masks(shapes, split):
    coco = COCO(shapes / 'annotations' / f'instances_{split}.json')
    for image in coco.imgs.values():
        file = shapes / 'annotations' / f'semantic_{split}' / f'{image["id"] - 1:06d}.png'
        label_map = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        assert label_map.shape == (64, 64) and label_map.dtype == np.uint8
        expected = np.zeros((64, 64), np.uint8)
        for annotation in coco.imgToAnns[image['id']]:
            expected[coco.annToMask(annotation) == 1] = annotation['category_id']
        assert (label_map == expected).all() and (label_map == 0).any()


def test_seed_decides_everything(tmp_path):
    for name, seed in (('a', '1'), ('b', '1'), ('c', '2')):
        generate(tmp_path / name, '--seed', seed)
    files = sorted(p.relative_to(tmp_path / 'a') for p in (tmp_path / 'a').rglob('*.*'))
    assert len(files) == 2 * (3 + 2) + 2 + 1  # images and label maps, annotations, settings
    for file in files:
        assert (tmp_path / 'a' / file).read_bytes() == (tmp_path / 'b' / file).read_bytes()
    image = 'train/000000.jpg'
    assert (tmp_path / 'a' / image).read_bytes() != (tmp_path / 'c' / image).read_bytes()


def test_train_and_val_are_disjoint(shapes):
    train, val = (
        {path.read_bytes() for path in (shapes / split).glob('*.jpg')} for split in ('train', 'val')
    )
    assert len(train) == 8 and len(val) == 4 and not train & val


def test_existing_data_is_kept(tmp_path):
    generate(tmp_path / 'data')
    assert 'there already' in generate(tmp_path / 'data').stdout
    refused = generate(tmp_path / 'data', '--seed', '5', check=False)
    assert refused.returncode != 0 and '--overwrite' in refused.stderr
    generate(tmp_path / 'data', '--seed', '5', '--overwrite')
    bad = generate(tmp_path / 'other', '--num-val', '0', check=False)
    assert bad.returncode != 0 and '--num-val must be 1 or more' in bad.stderr


def test_missing_paths_are_all_named(shapes):
    dataset = dict(
        type='CocoDataset',
        data_root=f'{shapes}/',
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        metainfo=dict(classes=CLASSES),
    )
    loader = dict(dataset=dict(type='RepeatDataset', dataset=dataset))
    cfg = Config(dict(train_dataloader=loader, default_scope='mmdet'))
    check_data(cfg, ('train', 'val'))
    inner = cfg.train_dataloader.dataset.dataset
    inner.metainfo.classes = ('hexagon',)
    with pytest.raises(ValueError, match='hexagon'):
        check_data(cfg, ('train', 'val'))
    inner.ann_file, inner.data_prefix.img = 'annotations/none.json', 'nowhere/'
    with pytest.raises(FileNotFoundError) as error:
        check_data(cfg, ('train', 'val'))
    assert f'{shapes}/annotations/none.json' in str(error.value)
    assert f'train_dataloader.dataset.data_prefix.img: {shapes}/nowhere' in str(error.value)
    inner.backend_args = dict(backend='petrel')
    check_data(cfg, ('train', 'val'))
    inner.pop('backend_args')
    inner.data_root = 's3://bucket/'
    check_data(cfg, ('train', 'val'))


def check(shapes, classes=CLASSES, ann_file='annotations/instances_val.json', prefix='val/'):
    dataset = CocoDataset(
        data_root=str(shapes),
        ann_file=ann_file,
        data_prefix=dict(img=prefix),
        metainfo=dict(classes=classes),
    )
    loader = SimpleNamespace(dataset=dataset)
    runner = SimpleNamespace(test_dataloader=loader, model=nn.Identity())
    CheckDatasetHook().before_test(runner)


def test_classes_must_match(shapes):
    check(shapes)
    check(shapes, classes=('circle', 'star'))
    with pytest.raises(ValueError, match=r"do not have the classes \['hexagon'\].*'triangle'"):
        check(shapes, classes=(*CLASSES, 'hexagon'))
    with pytest.raises(ValueError, match=r"order.*\('circle', 'star'\)"):
        check(shapes, classes=('star', 'circle'))


def test_images_must_be_there(shapes):
    with pytest.raises(FileNotFoundError, match='data_prefix'):
        check(shapes, prefix='elsewhere/')


def validation(shapes, **changes):
    dataset = dict(
        type=CocoDataset,
        data_root=f'{shapes}/',
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val/'),
        metainfo=dict(classes=CLASSES),
    )
    evaluator = dict(type='CocoMetric', ann_file=f'{shapes}/annotations/instances_val.json')
    evaluator.update(changes.pop('evaluator', {}))
    dataset.update(changes)
    loader = dict(dataset=dataset)
    return dict(val_dataloader=loader, val_evaluator=[evaluator], default_scope='mmdet')


def test_evaluator_must_use_the_same_annotations(shapes):
    check_data(Config(validation(shapes)), ('val',))
    other = dict(ann_file=f'{shapes}/annotations/instances_train.json')
    with pytest.raises(ValueError, match=r'val_evaluator\.ann_file.*same file'):
        check_data(Config(validation(shapes, evaluator=other)), ('val',))
    with pytest.raises(FileNotFoundError, match=r'val_evaluator\.ann_file: .*none\.json'):
        check_data(Config(validation(shapes, evaluator=dict(ann_file='none.json'))), ('val',))


def test_classes_may_be_a_file(shapes, tmp_path):
    (tmp_path / 'classes.txt').write_text('\n'.join(CLASSES))
    metainfo = dict(classes=str(tmp_path / 'classes.txt'))
    check_data(Config(validation(shapes, metainfo=metainfo)), ('val',))


def test_data_sets_that_sort_classes_by_themselves_are_left_to_it(shapes):
    metainfo = dict(classes=('star', 'circle'))
    check_data(Config(validation(shapes, type='Objects365V1Dataset', metainfo=metainfo)), ('val',))


def test_annotations_in_another_format_are_named(shapes, tmp_path):
    (tmp_path / 'list.json').write_text('[1, 2]')
    (tmp_path / 'cut.json').write_text('{"images": [')
    for name in ('list.json', 'cut.json'):
        changes = dict(ann_file=str(tmp_path / name), data_root='', data_prefix={})
        cfg = Config(validation(shapes, **changes, evaluator=dict(ann_file=None)))
        with pytest.raises(ValueError, match=f'{name}.*not an annotation file in COCO format'):
            check_data(cfg, ('val',))
