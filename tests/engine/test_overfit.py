"""Learning a few images by heart: what is trained on, what is evaluated, what is said."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT, run_python
from mmengine.config import Config
from mmengine.registry import DATASETS

from mmsvit.engine.overfit import judge, overfit_config

SHAPES = ROOT / 'configs' / 'svit_maskrcnn_shapes.py'


def shapes_config(shapes, first_is_empty: bool = False) -> Config:
    cfg = Config.fromfile(SHAPES)
    for split in ('train', 'val'):
        cfg[f'{split}_dataloader'].update(num_workers=0, persistent_workers=False)
        cfg[f'{split}_dataloader'].dataset.data_root = f'{shapes}/'
    if first_is_empty:
        file = shapes / 'annotations' / 'instances_train.json'
        content = json.loads(file.read_text())
        first = content['images'][0]['id']
        content['annotations'] = [a for a in content['annotations'] if a['image_id'] != first]
        changed = shapes / 'annotations' / 'first_is_empty.json'
        changed.write_text(json.dumps(content))
        cfg.train_dataloader.dataset.ann_file = 'annotations/first_is_empty.json'
    return cfg


def test_trains_and_evaluates_on_the_same_images_as_they_are(shapes):
    cfg = shapes_config(shapes, first_is_empty=True)
    assert cfg.train_dataloader.dataset.pipeline[3].type == 'RandomFlip'
    cfg.train_dataloader.dataset.pipeline[3].prob = 1.0
    overfit_config(cfg, 3, 60)
    with DATASETS.switch_scope_and_registry('mmdet') as registry:
        train, val = (registry.build(cfg[f'{s}_dataloader'].dataset) for s in ('train', 'val'))
    assert [train[i]['data_samples'].img_id for i in range(len(train))] == [
        val[i]['data_samples'].img_id for i in range(len(val))
    ]
    assert len(train) == 3 and cfg.val_evaluator.ann_file == str(
        shapes / 'annotations' / 'first_is_empty.json'
    )
    one = train[0]['data_samples'].gt_instances
    factor = train[0]['data_samples'].scale_factor[0]
    truth = val[0]['data_samples'].gt_instances.bboxes
    assert factor != 1 and one.masks.masks.shape[1:] == train[0]['inputs'].shape[1:]
    assert (one.bboxes.tensor - truth.tensor * factor).abs().max() < 1e-3


def test_a_segmentor_gets_whole_images_and_a_steady_learning_rate():
    cfg = Config.fromfile(ROOT / 'configs' / 'camvid' / 'svit-s_fpn_1xb8-4k_camvid.py')
    overfit_config(cfg, 4, 60)
    steps = [step['type'] for step in cfg.train_dataloader.dataset.pipeline]
    assert steps == ['LoadImageFromFile', 'LoadAnnotations', 'PackSegInputs']
    places = [cfg[f'{split}_dataloader'].dataset.data_prefix for split in ('train', 'val')]
    assert places[0] == places[1] and places[0].img_path == 'train'
    # Those of 480x360 would not fit into the 352x352 of a crop.
    assert cfg.model.data_preprocessor.size is None
    assert cfg.model.data_preprocessor.size_divisor == 32
    assert cfg.model.backbone.drop_path_rate == 0
    assert len(cfg.param_scheduler) == 1 and cfg.param_scheduler[0].end < 60


def test_what_it_is_not_for_is_refused():
    cfg = Config.fromfile(ROOT / 'configs' / 'svit' / 'svit-small_8xb128_in1k.py')
    with pytest.raises(ValueError, match='for detectors and segmentors'):
        overfit_config(cfg, 4, 60)
    cfg = Config.fromfile(SHAPES)
    cfg.val_dataloader = None
    with pytest.raises(ValueError, match='val_dataloader'):
        overfit_config(cfg, 4, 60)


@pytest.mark.parametrize(
    ('loss', 'score', 'learned', 'said'),
    [
        (0.2, 0.9, True, 'behave'),
        (0.2, 0.1, False, 'other labels or boxes'),
        (1.9, 0.9, False, 'learning rates'),
    ],
)
def test_says_what_behaves(loss, score, learned, said):
    for name, best in (('coco/bbox_mAP', 1), ('mIoU', 100)):
        verdict = judge({'loss': ([1, 9], [2.0, loss]), name: ([9], [score * best])})
        assert verdict.learned == learned and said in verdict.text
        assert f'{score:.1%}' in verdict.text


@pytest.mark.slow
def test_a_detector_is_judged(shapes, tmp_path):
    shapes_config(shapes).dump(tmp_path / 'config.py')
    arguments = ('tools/train.py', tmp_path / 'config.py', '--overfit', '2', '--overfit-iters')
    work = ('--work-dir', tmp_path / 'run')
    result = run_python(*arguments, '51', *work, check=False)
    said = result.stdout
    assert 'loss: ' in said and 'coco/bbox_mAP: ' in said and 'coco/segm_mAP: ' in said
    assert result.returncode == (0 if 'Learned' in said else 1)
    assert list((tmp_path / 'run').glob('iter_*.pth')) == [tmp_path / 'run' / 'iter_51.pth']
