"""The thorough check of data: each kind of damage is named, and is an error or a warning."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import run_python
from data_configs import (
    CONFIG,
    change_val,
    data_options,
    detection_config,
    edit,
    found,
    printed,
    segmentation_config,
    write_labels,
)
from mmengine.config import Config
from mmengine.registry import DATASETS

from mmsvit.datasets.inspection import head_num_classes, inspect_data
from mmsvit.datasets.truth_evaluation import build_evaluator, score_truth, shortfalls


# --- detection ----------------------------------------------------------------------------
def test_good_data_has_no_errors(shapes):
    report = inspect_data(detection_config(shapes))
    assert not report.problems('error'), printed(report)
    train, val, test = report.counts
    content = json.loads((shapes / 'annotations' / 'instances_train.json').read_text())
    assert (train.images, train.classes, train.decoded, train.loaded) == (8, 5, 8, 8)
    assert train.labels == len(content['annotations'])
    assert (val.images, val.decoded) == (4, 4)
    assert test.data_set == 'same as val' and test.decoded is None
    assert 'CocoDataset' in printed(report)


def test_samples_are_as_many_as_asked_for_and_always_the_same(damaged):
    edit(damaged, lambda content: [image.update(width=63) for image in content['images']])
    reports = [
        inspect_data(detection_config(damaged), ['train'], samples=3, seed=seed)
        for seed in (0, 0, 1, 2, 3)
    ]
    kind = ('error', 'images of another size than annotated')
    samples = [found(report)[kind] for report in reports]
    assert all(
        len(sample) == 3 == report.counts[0].decoded for sample, report in zip(samples, reports)
    )
    assert samples[0] == samples[1] and any(sample != samples[0] for sample in samples[2:])
    everything = inspect_data(detection_config(damaged), ['train'], samples=None)
    assert everything.counts[0].decoded == 8


def change_annotation(**values: object):
    return lambda content: content['annotations'][0].update(values)


def repeat_image(content: dict) -> None:
    content['images'].append({**content['images'][0], 'file_name': 'other.jpg'})


def remove_objects_of_first_image(content: dict) -> None:
    first = content['images'][0]['id']
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] != first]


def corner_boxes(content: dict) -> None:
    for ann in content['annotations']:
        x, y, width, height = ann['bbox']
        ann['bbox'] = [x + 30, y + 30, x + width + 30, y + height + 30]


SKIPPED = 'skipped by MMDetection'
ANNOTATION_DAMAGES = {
    'zero area': (
        change_annotation(bbox=[5, 5, 0, 9]),
        'warning',
        f'boxes without area, {SKIPPED}',
    ),
    'negative': (
        change_annotation(bbox=[5, 5, 9, -4]),
        'warning',
        f'boxes without area, {SKIPPED}',
    ),
    'outside': (
        change_annotation(bbox=[70, 5, 9, 9]),
        'warning',
        f'boxes outside the image, {SKIPPED}',
    ),
    'reaches out': (
        change_annotation(bbox=[60, 5, 9, 9]),
        'warning',
        'boxes partly outside the image',
    ),
    'not numbers': (
        change_annotation(bbox=[1, 2, float('nan'), 3]),
        'error',
        'annotations whose bbox is not four numbers, or without area',
    ),
    'unknown image': (change_annotation(image_id=999), 'error', 'annotations of unknown images'),
    'unknown category': (
        change_annotation(category_id=77),
        'error',
        'annotations of unknown categories',
    ),
    'no mask': (
        change_annotation(segmentation=[]),
        'error',
        'annotations without segmentation, which the pipeline loads',
    ),
    'two points': (
        change_annotation(segmentation=[[1, 1, 5, 5]]),
        'warning',
        'segmentations without a polygon of three points, which are ignored',
    ),
    'flat polygon': (
        change_annotation(segmentation=[1, 1, 5, 5, 1, 5]),
        'error',
        'segmentations that are neither RLE nor a list of polygons',
    ),
    'RLE size': (
        change_annotation(segmentation=dict(size=[32, 64], counts=[2048])),
        'error',
        'segmentations as RLE of another size than their image',
    ),
    'annotation twice': (
        lambda content: content['annotations'].append(content['annotations'][0]),
        'error',
        'annotations with the same id',
    ),
    'image twice': (repeat_image, 'error', 'images with the same id'),
    'no size': (
        lambda content: content['images'][0].pop('width'),
        'error',
        'images without id, width or height',
    ),
    'category twice': (
        lambda content: content['categories'].append(dict(id=9, name='star')),
        'error',
        'categories with the same name',
    ),
    'no objects in an image': (remove_objects_of_first_image, 'warning', 'images without objects'),
    'no objects': (
        lambda content: content['annotations'].clear(),
        'error',
        'data sets without objects',
    ),
    'corners': (corner_boxes, 'error', 'wrong formats of boxes'),
    'no images': (
        lambda content: content['images'].clear(),
        'error',
        'annotation files with an empty list',
    ),
}


@pytest.fixture(scope='module')
def undamaged(shapes):
    return found(inspect_data(detection_config(shapes), ['train']))


@pytest.mark.parametrize('name', ANNOTATION_DAMAGES)
def test_damaged_annotations_are_named(damaged, undamaged, name):
    damage, level, kind = ANNOTATION_DAMAGES[name]
    edit(damaged, damage)
    report = inspect_data(detection_config(damaged), ['train'])
    assert (level, kind) not in undamaged
    assert (level, kind) in found(report)
    if level == 'warning':
        assert not report.problems('error'), printed(report)
    assert re.search(rf'{level}: train: {kind} \(\d+\)', printed(report))


NOT_PERFECT = 'evaluations in which a perfect prediction is not perfect'


def test_an_object_that_the_data_set_drops_is_not_found_by_a_perfect_prediction(damaged):
    change_val(damaged, lambda content: content['annotations'][0].update(bbox=[5, 5, 0.5, 9]))
    examples = found(inspect_data(detection_config(damaged), ('val',)))['error', NOT_PERFECT]
    assert re.match(r'coco/bbox_mAP \d\d\.\d%', examples[0])
    assert len(examples) == 2 and examples[1].endswith('.jpg')


def test_the_truth_is_evaluated_as_the_config_says(shapes):
    cfg = detection_config(shapes, **{'val_evaluator.metric': ['bbox', 'proposal_slow']})
    (error,) = inspect_data(cfg, ('val',)).problems('error')
    assert (
        error.kind == 'evaluators that fail on the truth' and 'proposal_slow' in error.examples[0]
    )


def test_examples_name_image_and_annotation(damaged):
    edit(damaged, change_annotation(bbox=[70, 5, 9, 9]))
    content = json.loads((damaged / 'annotations' / 'instances_train.json').read_text())
    ann = content['annotations'][0]
    file_name = next(i['file_name'] for i in content['images'] if i['id'] == ann['image_id'])
    text = printed(inspect_data(detection_config(damaged), ['train']))
    assert f'{file_name} (64x64): annotation {ann["id"]}' in text and '[70, 5, 9, 9]' in text


def test_only_the_first_of_many_are_shown(damaged):
    for image in sorted((damaged / 'train').glob('*.jpg'))[:7]:
        image.unlink()
    report = inspect_data(detection_config(damaged), ['train'])
    text = printed(report)
    assert 'missing images (7)' in text and 'and 2 more' in text


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def replace_by_text(file: Path) -> None:
    file.write_text('<html>404 Not Found</html>')


def shrink(file: Path) -> None:
    cv2.imwrite(str(file), cv2.imread(str(file))[:50])


@pytest.mark.parametrize(
    ('damage', 'kind', 'detail'),
    [
        (Path.unlink, 'missing images', ''),
        (truncate, 'images that cannot be decoded', 'truncated'),
        (replace_by_text, 'images that cannot be decoded', 'cannot identify'),
        (shrink, 'images of another size than annotated', 'is 64x50, annotated as 64x64'),
    ],
)
def test_damaged_images_are_named(damaged, damage, kind, detail):
    file = sorted((damaged / 'train').glob('*.jpg'))[3]
    damage(file)
    report = inspect_data(detection_config(damaged), ['train'])
    (example,) = found(report)['error', kind]
    assert str(file) in example and detail in example


def test_missing_folders_and_classes_are_named(damaged):
    cfg = detection_config(damaged, **{'train_dataloader.dataset.data_prefix.img': 'nowhere/'})
    report = inspect_data(cfg, ['train', 'val'])
    assert f'{damaged}/nowhere' in found(report)['error', 'missing files or folders'][0]
    assert [counts.split for counts in report.counts] == ['val']  # The others are looked at still.

    edit(damaged, lambda content: content['categories'].pop())
    report = inspect_data(detection_config(damaged), ['train'])
    assert 'ring' in found(report)['error', 'annotations that do not fit the config'][0]

    (damaged / 'annotations' / 'instances_train.json').write_text('[1, 2]')
    cfg = detection_config(
        damaged, **{'train_dataloader.dataset.ann_file': 'annotations/copy.json'}
    )
    (damaged / 'annotations' / 'copy.json').write_text('{"images": [')
    errors = [kind for level, kind in found(inspect_data(cfg, ['train'])) if level == 'error']
    assert 'annotation files that are not COCO format' in errors


def test_heads_must_have_the_classes_of_the_data(shapes):
    cfg = detection_config(shapes, **{'model.roi_head.mask_head.num_classes': 80})
    (example,) = found(inspect_data(cfg, ['train']))[
        'error', 'num_classes that do not fit the data'
    ]
    assert example == 'model.roi_head.mask_head.num_classes is 80, the data set has 5 classes'


def test_heads_are_found_in_lists_and_others_left_out():
    model = dict(
        backbone=dict(num_classes=1000),
        rpn_head=dict(num_classes=1),
        roi_head=dict(
            bbox_head=[dict(num_classes=3), dict(num_classes=4)],
            semantic_head=dict(type='FusedSemanticHead', num_classes=183),
        ),
        panoptic_head=dict(num_things_classes=80, num_stuff_classes=53),
    )
    assert dict(head_num_classes(model)) == {
        'model.roi_head.bbox_head[0].num_classes': 3,
        'model.roi_head.bbox_head[1].num_classes': 4,
        'model.panoptic_head.num_things_classes + num_stuff_classes': 133,
    }


def test_splits_must_have_the_same_classes(shapes):
    cfg = detection_config(shapes)
    cfg.val_dataloader.dataset.metainfo.classes = ('circle', 'square', 'triangle', 'star')
    report = inspect_data(cfg, ['train', 'val'])
    (example,) = found(report)['error', 'classes that differ between splits']
    assert example == "train and val: 'ring' and None"
    assert any(
        'ring: ' in example
        for example in found(report)[
            'warning', 'categories that are no classes of the config, so skipped'
        ]
    )


def test_broken_pipelines_are_named(shapes):
    cfg = detection_config(shapes)
    cfg.train_dataloader.dataset.pipeline[2].scale = (0, 0)
    assert ('error', 'samples that the pipeline cannot load') in found(inspect_data(cfg, ['train']))

    cfg = detection_config(shapes)
    cfg.train_dataloader.dataset.pipeline.pop()
    kinds = [kind for _, kind in found(inspect_data(cfg, ['train']))]
    assert any(kind.startswith("samples without 'inputs'") for kind in kinds)

    cfg = detection_config(shapes)
    cfg.train_dataloader.dataset.pipeline[2].type = 'Rezise'
    (example,) = found(inspect_data(cfg, ['train']))['error', 'data sets that cannot be built']
    assert 'Rezise' in example


def test_data_sets_in_wrappers_are_looked_at(shapes):
    cfg = detection_config(shapes)
    inner = cfg.train_dataloader.dataset
    other = {**inner, 'ann_file': 'annotations/instances_val.json', 'data_prefix': dict(img='val/')}
    parts = dict(type='ConcatDataset', datasets=[inner, other])
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=parts)
    report = inspect_data(cfg, ['train'])
    assert not report.problems('error'), printed(report)
    assert [counts.decoded for counts in report.counts] == [8, 4]


def test_a_config_without_data_is_refused():
    with pytest.raises(ValueError, match='no data loader'):
        inspect_data(Config(dict(model=dict())))


@pytest.mark.slow
def test_command_line(damaged):
    options = [f'{key}={value}' for key, value in data_options(damaged).items()]
    command = ['tools/check_dataset.py', CONFIG, '--splits', 'train', '--cfg-options', *options]
    good = run_python(*command)
    assert '0 kinds of error' in good.stdout
    file = sorted((damaged / 'train').glob('*.jpg'))[0]
    truncate(file)
    bad = run_python(*command, check=False)
    assert bad.returncode == 1 and 'images that cannot be decoded (1)' in bad.stdout
    assert str(file) in bad.stdout and 'Traceback' not in bad.stderr


# --- segmentation -------------------------------------------------------------------------


def test_good_label_maps(scenes):
    report = inspect_data(segmentation_config(scenes))
    assert not found(report), printed(report)
    (counts,) = report.counts
    assert (counts.images, counts.labels, counts.classes) == (4, 4, 3)
    assert (counts.decoded, counts.loaded) == (4, 4)


def test_label_maps_that_are_resized_before_evaluation(scenes):
    cfg = segmentation_config(scenes)
    cfg.val_dataloader, cfg.val_evaluator = cfg.train_dataloader, dict(type='IoUMetric')
    assert not found(inspect_data(cfg, ('val',)))
    cfg.val_dataloader.dataset.pipeline.insert(2, dict(type='Resize', scale=(16, 16)))
    (error,) = inspect_data(cfg, ('val',)).problems('error')
    assert error.kind == 'evaluators that fail on the truth' and 'shape' in error.examples[0]


def test_label_maps_that_count_from_1(scenes):
    for i in range(4):
        write_labels(scenes, i, np.arange(24 * 32).reshape(24, 32) % 4)
    examples = found(inspect_data(segmentation_config(scenes)))
    assert len(examples['error', 'label maps with values of no class']) == 4
    assert 'reduce_zero_label' in examples['warning', 'label maps that may count from 1'][0]
    assert not found(inspect_data(segmentation_config(scenes, reduce_zero_label=True)))


@pytest.mark.parametrize('reduce_zero_label', [False, True])
def test_values_of_no_class(scenes, reduce_zero_label):
    for i in range(4):
        write_labels(scenes, i, np.arange(24 * 32).reshape(24, 32) % 3 + reduce_zero_label)
    labels = np.ones((24, 32))
    labels[0, 0] = 3 + reduce_zero_label
    write_labels(scenes, 2, labels)
    cfg = segmentation_config(scenes, reduce_zero_label=reduce_zero_label)
    (example,) = found(inspect_data(cfg))['error', 'label maps with values of no class']
    assert example.startswith(f'{scenes}/labels/2.png has [{3 + reduce_zero_label}]')


def test_values_that_eight_bits_do_not_hold(scenes):
    # LoadAnnotations would take 257 for 1.
    write_labels(scenes, 1, np.full((24, 32), 257), np.uint16)
    (example,) = found(inspect_data(segmentation_config(scenes)))[
        'error', 'label maps with values of no class'
    ]
    assert '[257]' in example


def test_some_classes_of_a_data_set_with_more(scenes):
    """As with ``metainfo.classes`` of three out of ADE20K's: other values are ignored, not wrong."""
    for i in range(4):
        write_labels(scenes, i, np.arange(24 * 32).reshape(24, 32) % 151)
    cfg = segmentation_config(scenes)
    dataset = cfg.train_dataloader.dataset
    dataset.type, dataset.metainfo.classes = 'ADE20KDataset', ('sky', 'wall', 'tree')
    assert not found(inspect_data(cfg))
    write_labels(scenes, 0, np.full((24, 32), 151))
    assert list(found(inspect_data(cfg))) == [('error', 'label maps with values of no class')]


@pytest.mark.parametrize(
    ('damage', 'level', 'kind', 'detail'),
    [
        (
            lambda folder: (folder / 'labels' / '1.png').unlink(),
            'error',
            'missing label maps',
            'labels/1.png',
        ),
        (
            lambda folder: (folder / 'images' / '1.jpg').unlink(),
            'warning',
            'label maps without an image',
            '1.png',
        ),
        (
            lambda folder: write_labels(folder, 1, np.ones((24, 30))),
            'error',
            'label maps of another size than their image',
            '30x24, its image 32x24',
        ),
        (
            lambda folder: write_labels(folder, 1, np.ones((24, 32, 3))),
            'error',
            'label maps in colour: a pixel must be the index of a class',
            '3 channels',
        ),
        (
            lambda folder: write_labels(folder, 1, np.full((24, 32), 255)),
            'warning',
            'label maps without any class',
            'labels/1.png',
        ),
        (
            lambda folder: truncate(folder / 'labels' / '1.png'),
            'error',
            'label maps that cannot be decoded',
            'labels/1.png',
        ),
    ],
)
def test_damaged_label_maps_are_named(scenes, damage, level, kind, detail):
    damage(scenes)
    report = inspect_data(segmentation_config(scenes))
    assert detail in found(report)[level, kind][0]
    assert level == 'error' or not report.problems('error'), printed(report)


@pytest.mark.parametrize(
    ('reduce_zero_label', 'absent'),
    [(False, ['tree (value 1)', 'sky (value 2)']), (True, ['tree (value 2)', 'sky (value 3)'])],
)
def test_classes_without_pixels_are_told_only_of_all_label_maps(scenes, reduce_zero_label, absent):
    for i in range(4):
        write_labels(scenes, i, np.full((24, 32), int(reduce_zero_label)))
    cfg = segmentation_config(scenes, reduce_zero_label=reduce_zero_label)
    assert found(inspect_data(cfg)) == {('warning', 'classes without pixels'): absent}
    assert not found(inspect_data(cfg, samples=2))


def test_images_of_another_suffix_are_no_data(scenes):
    cfg = segmentation_config(scenes, img_suffix='.png')
    (example,) = found(inspect_data(cfg))['error', 'data sets without images']
    assert f"data_root='{scenes}'" in example and "img_suffix='.png'" in example


# --- classification -----------------------------------------------------------------------
@pytest.fixture
def animals(tmp_path):
    """A folder of three images for each of two classes, and its list as a file."""
    pytest.importorskip('mmpretrain')
    lines = []
    for label, name in enumerate(('cat', 'dog')):
        (tmp_path / 'train' / name).mkdir(parents=True)
        for i in range(3):
            image = np.full((16, 20, 3), 40 * i + label, np.uint8)
            cv2.imwrite(str(tmp_path / 'train' / name / f'{i}.jpg'), image)
            lines.append(f'{name}/{i}.jpg {label}')
    (tmp_path / 'train.txt').write_text('\n'.join(lines))
    return tmp_path


def classification_config(folder: Path, **dataset: object) -> Config:
    dataset = dict(
        type='CustomDataset',
        data_root=str(folder),
        data_prefix='train',
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
        **dataset,
    )
    return Config(
        dict(
            train_dataloader=dict(dataset=dataset),
            model=dict(head=dict(num_classes=2)),
            data_preprocessor=dict(num_classes=2),
            default_scope='mmpretrain',
        )
    )


def listed(folder: Path, **dataset: object) -> Config:
    metainfo = dict(classes=('cat', 'dog'))
    return classification_config(folder, ann_file='train.txt', metainfo=metainfo, **dataset)


@pytest.mark.parametrize('config', [classification_config, listed])
def test_good_image_folders(animals, config):
    report = inspect_data(config(animals))
    assert not found(report), printed(report)
    (counts,) = report.counts
    assert (counts.images, counts.labels, counts.classes, counts.loaded) == (6, 6, 2, 6)


def test_the_truth_of_images_is_evaluated(animals):
    cfg = classification_config(animals)
    dataset = cfg.train_dataloader.dataset
    evaluator = [dict(type='Accuracy', topk=(1, 2)), dict(type='SingleLabelMetric')]
    with DATASETS.switch_scope_and_registry('mmpretrain') as registry:
        built = registry.build(dataset)
        scores = score_truth(build_evaluator(evaluator, built), built, range(len(built)))
        assert build_evaluator(dict(type='RetrievalRecall'), built) is None
    assert scores['accuracy/top1'] == scores['single-label/recall'] == 100
    assert not shortfalls(scores)


def test_empty_class_folder(animals):
    (animals / 'train' / 'emu').mkdir()
    cfg = classification_config(animals)
    cfg.model.head.num_classes = cfg.data_preprocessor.num_classes = 3
    examples = found(inspect_data(cfg))
    assert examples == {('warning', 'classes without images'): ['emu']}


def test_folders_are_compared_with_heads_and_splits(animals):
    shutil.copytree(animals / 'train' / 'dog', animals / 'val' / 'dog')
    cfg = classification_config(animals)
    cfg.data_preprocessor.num_classes = 1000
    cfg.val_dataloader = dict(dataset={**cfg.train_dataloader.dataset, 'data_prefix': 'val'})
    examples = found(inspect_data(cfg))
    assert examples['error', 'num_classes that do not fit the data'] == [
        'data_preprocessor.num_classes is 1000, the data set has 2 classes',  # train
        'model.head.num_classes is 2, the data set has 1 classes',  # val
        'data_preprocessor.num_classes is 1000, the data set has 1 classes',
    ]
    (example,) = examples['error', 'classes that differ between splits']
    assert example == "train and val: 'cat' and 'dog'"


def test_unreadable_image(animals):
    replace_by_text(animals / 'train' / 'dog' / '1.jpg')
    examples = found(inspect_data(classification_config(animals)))
    (example,) = examples['error', 'images that cannot be decoded']
    assert 'dog/1.jpg' in example


def test_lists_of_images(animals):
    with (animals / 'train.txt').open('a') as file:
        file.write('\ncat/0.jpg 1\ncat/1.jpg 0\ncat/2.jpg 2\ndog/9.jpg 1')
    examples = found(inspect_data(listed(animals)))
    both = examples['error', 'images with two labels']
    assert [example.rsplit('/', 1)[1] for example in both] == ['0.jpg: 0 and 1', '2.jpg: 0 and 2']
    assert examples['warning', 'lists that repeat an image'] == ['3 of 10 entries']
    assert 'cat/2.jpg: 2, with 2' in examples['error', 'labels out of range'][0]
    assert 'dog/9.jpg' in examples['error', 'missing images'][0]


def test_missing_split_folder_of_imagenet(animals):
    cfg = classification_config(animals)
    cfg.train_dataloader.dataset = dict(
        type='ImageNet', data_root=str(animals), split='val', pipeline=[]
    )
    (example,) = found(inspect_data(cfg))['error', 'missing files or folders']
    assert str(animals / 'val') in example
