"""Inputs that gave a wrong result, and nobody said so."""

from __future__ import annotations

import copy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import small_arch
from data_configs import (
    change_val,
    detection_config,
    found,
    segmentation_config,
    write_labels,
)
from mmengine.config import Config
from PIL import ExifTags, Image

from mmsvit import SViT
from mmsvit.checkpoint import load_pretrained
from mmsvit.datasets.inspection import inspect_data
from mmsvit.datasets.quick_checks import check_data


def test_annotation_ids_from_0(damaged):
    # cocodataset/cocoapi 507: pycocotools takes id 0 for "no match"
    def renumber(content: dict) -> None:
        for i, ann in enumerate(content['annotations']):
            ann['id'] = i

    change_val(damaged, renumber)
    cfg = detection_config(damaged)
    with pytest.raises(ValueError, match='1 annotations without a whole number above 0 as id'):
        check_data(cfg, ('val',))
    kinds = [kind for level, kind in found(inspect_data(cfg, ('val',))) if level == 'error']
    assert any('count from 1' in kind for kind in kinds)
    assert any('perfect prediction is not perfect' in kind for kind in kinds)


def test_joined_validation_sets_with_one_evaluator_are_refused(shapes):
    # open-mmlab/mmdetection 8785: AP50 of a perfect prediction is 0.835
    cfg = detection_config(shapes)
    part = cfg.val_dataloader.dataset
    cfg.val_dataloader.dataset = dict(type='ConcatDataset', datasets=[part, copy.deepcopy(part)])
    with pytest.raises(ValueError, match=r'instances_val.json.*joins.*MultiDatasetsEvaluator'):
        check_data(cfg, ('val',))


def test_objects_of_other_formats_are_counted(tmp_path):
    # open-mmlab/mmdetection 11592: a class spelt otherwise, a box whose corners are exchanged
    for folder in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (tmp_path / 'VOC2007' / folder).mkdir(parents=True)
    boxes = {'cat': (3, 3, 20, 20), 'dog': (30, 3, 9, 20), 'Horse': (3, 3, 20, 20)}
    for i, (name, box) in enumerate(boxes.items()):
        corners = ''.join(f'<{k}>{v}</{k}>' for k, v in zip(('xmin', 'ymin', 'xmax', 'ymax'), box))
        (tmp_path / 'VOC2007' / 'Annotations' / f'{i}.xml').write_text(
            '<annotation><size><width>64</width><height>64</height></size><object>'
            f'<name>{name}</name><difficult>0</difficult><bndbox>{corners}</bndbox></object>'
            '</annotation>'
        )
        cv2.imwrite(f'{tmp_path}/VOC2007/JPEGImages/{i}.jpg', np.zeros((64, 64, 3), np.uint8))
    (tmp_path / 'VOC2007' / 'ImageSets' / 'Main' / 'train.txt').write_text('0\n1\n2\n')
    dataset = dict(
        type='VOCDataset',
        data_root=f'{tmp_path}/',
        ann_file='VOC2007/ImageSets/Main/train.txt',
        data_prefix=dict(sub_data_root='VOC2007/'),
        metainfo=dict(classes=('cat', 'dog', 'horse')),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackDetInputs')],
    )
    cfg = Config(dict(default_scope='mmdet', train_dataloader=dict(dataset=dataset)))
    problems = found(inspect_data(cfg, ('train',)))
    assert problems['warning', 'classes without objects'] == ['horse']
    assert len(problems['error', 'boxes without area']) == 1


@pytest.mark.parametrize('orientation', [3, 6])
def test_images_with_an_orientation_tag_are_named(scenes, orientation):
    # facebookresearch/detectron2 788: the image is turned, its label map is not
    file = scenes / 'images' / '1.jpg'
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.open(file).save(file, exif=exif)
    cfg = segmentation_config(scenes)
    kinds = {p.kind: p.examples for p in inspect_data(cfg).problems('error')}
    (turned,) = [examples for kind, examples in kinds.items() if 'orientation tag' in kind]
    assert turned == [f'{file}: orientation {orientation}']
    cfg.train_dataloader.dataset.pipeline[0].color_type = 'color_ignore_orientation'
    kinds = [p.kind for p in inspect_data(cfg).problems('error')]
    assert not any('orientation tag' in kind for kind in kinds)


def test_one_class_beside_ignored_pixels_is_an_error(scenes):
    # open-mmlab/mmsegmentation 1609: binary masks of 0 and 255, mIoU 100 and nothing learned
    for i in range(4):
        label_map = np.zeros((24, 32), np.uint8)
        label_map[:6] = 255
        write_labels(scenes, i, label_map)
    (problem,) = inspect_data(segmentation_config(scenes)).problems('error')
    assert 'one class and ignored pixels' in problem.kind
    assert '25.0% ignored ([255])' in problem.examples[0]


def load(path: Path) -> SViT:
    model = SViT(small_arch())
    load_pretrained(model, path)
    return model


def spoil(weights, key, value):
    weights[key] = torch.full_like(weights[key], value)


@pytest.mark.promise(
    'Runs', 'Weights that nobody trained are refused: NaN, infinity, zeros, two of one name'
)
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda w: spoil(w, 'stem.0.weight', torch.nan), r'NaN or infinity in 1 .*stem\.0\.weight'),
        (lambda w: spoil(w, 'stem.2.running_var', torch.inf), r'NaN or .*stem\.2\.running_var'),
        (lambda w: spoil(w, 'stages.0.blocks.0.ffn.fc1.weight', 0), r'nothing but zeros in .*fc1'),
        (
            lambda w: w.update({'module.stem.0.weight': w['stem.0.weight'] + 1}),
            r'ambiguous.*with and without a prefix.*module\.stem\.0\.weight',
        ),
        (
            lambda w: w.update({'stem.0.bias': torch.ones(1).expand(4)}),
            r'corrupt: 1 weights repeat a few stored numbers: stem\.0\.bias',
        ),
    ],
)
def test_weights_that_nobody_trained_are_refused(tmp_path, change, message):
    weights = SViT(small_arch()).state_dict()
    change(weights)
    torch.save(dict(state_dict=weights), tmp_path / 'spoilt.pth')
    with pytest.raises(ValueError, match=message):
        load(tmp_path / 'spoilt.pth')


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', '_orig_mod.module.'])
def test_prefixes_of_wrappers_are_no_mismatch(tmp_path, prefix):
    expected = SViT(small_arch()).state_dict()
    weights = {f'{prefix}{key}': value for key, value in expected.items()}
    torch.save(dict(state_dict=weights), tmp_path / 'wrapped.pth')
    found = load(tmp_path / 'wrapped.pth').state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
