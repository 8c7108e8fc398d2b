"""Inputs that ended in a traceback, or in a hang, where a sentence does."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, import_tool, small_arch
from data_configs import (
    change_val,
    detection_config,
    edit,
    found,
    segmentation_config,
    write_labels,
)
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.runner import set_random_seed
from PIL import Image
from rich.console import Console

from mmsvit import SViT
from mmsvit.checkpoint import read_checkpoint
from mmsvit.checkpoint.files import newest_valid_checkpoint
from mmsvit.datasets.image_files import refuse_truncated
from mmsvit.datasets.inspection import inspect_data
from mmsvit.datasets.quick_checks import check_batch, check_classes, check_data
from mmsvit.datasets.report import DatasetReport, printable


def test_classes_that_lack_a_comma_are_named(shapes):
    """('circle') is a text, which MMEngine takes for a file of names."""
    file = str(shapes / 'annotations' / 'instances_train.json')
    with pytest.raises(ValueError, match=r"the text 'circle'.*needs a comma: \('circle',\)"):
        check_classes('train', file, 'circle', CocoDataset)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_masks_that_the_data_do_not_have_are_named_before_training(split, damaged):
    file = damaged / 'annotations' / f'instances_{split}.json'
    content = json.loads(file.read_text())
    for ann in content['annotations']:
        del ann['segmentation']
    file.write_text(json.dumps(content))
    cfg = detection_config(damaged)
    with pytest.raises(ValueError, match=r'no segmentation.*configs/retinanet/.*mask_head=None'):
        check_data(cfg, (split,))
    cfg[f'{split}_dataloader'].dataset.pipeline[1].with_mask = False
    if split == 'train':
        check_data(cfg, (split,))


def test_images_of_five_channels_are_decoded_as_training_does(scenes, tmp_path):
    tifffile = pytest.importorskip('tifffile')
    for i in range(4):
        bands = np.full((24, 32, 5), 40 * i, np.uint8)
        tifffile.imwrite(scenes / 'images' / f'{i}.tif', bands, planarconfig='contig')
    cfg = segmentation_config(scenes, img_suffix='.tif')
    cfg.train_dataloader.dataset.pipeline[0].update(
        imdecode_backend='tifffile', color_type='unchanged'
    )
    cfg.visualizer = dict(type='SegLocalVisualizer')
    report = inspect_data(cfg, show_dir=tmp_path / 'targets')
    assert not found(report) and report.counts[0].decoded == 4
    assert cv2.imread(f'{tmp_path}/targets/train_3.png').shape == (24, 32, 3)


def test_evaluation_in_batches_of_different_sizes_is_named(scenes):
    Image.new('RGB', (40, 24)).save(scenes / 'images' / '1.jpg')
    Image.new('L', (40, 24)).save(scenes / 'labels' / '1.png')
    cfg = segmentation_config(scenes)
    cfg.val_dataloader = dict(cfg.train_dataloader, batch_size=2)
    (error,) = found(inspect_data(cfg, ('val',)))['error', 'batches that cannot be evaluated']
    assert '32x24 and 40x24' in error and 'val_dataloader.batch_size=1' in error
    cfg.val_dataloader.batch_size = 1
    assert not found(inspect_data(cfg, ('val',)))
    check_batch('val', 2, None, [torch.ones(3, 8, 8), torch.ones(3, 9, 8)])  # no label maps


def drawn(cfg: Config, folder: Path) -> list[np.ndarray]:
    """The pictures of the training samples with their targets."""
    set_random_seed(0)
    inspect_data(cfg, ('train',), samples=0, show_dir=folder)
    return [cv2.imread(str(folder / f'train_{i}.png')) for i in range(4)]


def test_boxes_are_drawn_where_the_pipeline_puts_them(damaged, tmp_path):
    def keep_one(content: dict) -> None:
        for ann in content['annotations']:
            ann.update(bbox=[10, 20, 30, 20], segmentation=[[10, 20, 40, 20, 40, 40, 10, 40]])

    edit(damaged, keep_one)
    cfg = detection_config(damaged)
    cfg.train_dataloader.dataset.pipeline[3].prob = 0.0  # no flip
    pictures = drawn(cfg, tmp_path / 'targets')
    for i, picture in enumerate(pictures):
        plain = cv2.imread(str(damaged / 'train' / f'{i:06}.jpg'))
        plain = cv2.resize(plain, (160, 160))  # The pipeline makes 160 pixels of 64.
        changed = np.abs(picture.astype(int) - plain).max(2) > 20
        assert changed[100, 30:95].mean() > 0.5 and not changed[110:, :].any()


def test_label_maps_are_drawn_on_what_the_pipeline_gives(scenes, tmp_path):
    cfg = segmentation_config(scenes)
    cfg.visualizer = dict(type='SegLocalVisualizer')
    pictures = drawn(cfg, tmp_path / 'before')
    write_labels(scenes, 2, np.ones((24, 32)))
    others = drawn(cfg, tmp_path / 'after')
    same = [np.array_equal(*pair) for pair in zip(pictures, others)]
    assert same == [True, True, False, True]


PURE = """
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs
from mmdet.engine.hooks import DetVisualizationHook
from mmdet.evaluation import CocoMetric
from mmdet.models.detectors import RetinaNet
from mmdet.visualization import DetLocalVisualizer
from mmsvit.models.svit import SViT

pipeline = [
    dict(type=LoadImageFromFile),
    dict(type=LoadAnnotations, with_bbox=True),
    dict(type=PackDetInputs),
]
model = dict(type=RetinaNet, backbone=dict(type=SViT, arch='small'))
train_dataloader = dict(
    dataset=dict(
        type=CocoDataset,
        data_root={root!r},
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val/'),
        metainfo=dict(classes=('circle', 'square', 'triangle', 'star', 'ring')),
        pipeline=pipeline,
    )
)
val_dataloader = train_dataloader
val_evaluator = dict(type=CocoMetric, ann_file={root!r} + 'annotations/instances_val.json')
test_evaluator = val_evaluator
visualizer = dict(type=DetLocalVisualizer)
default_hooks = dict(visualization=dict(type=DetVisualizationHook))
"""


def test_configs_in_pure_python(shapes, tmp_path):
    (tmp_path / 'pure.py').write_text(PURE.format(root=f'{shapes}/'))
    cfg = Config.fromfile(tmp_path / 'pure.py')
    report = inspect_data(cfg, ('train', 'val'), show_dir=tmp_path / 'targets')
    assert not report.problems('error') and (tmp_path / 'targets' / 'train_0.png').exists()
    tool = import_tool('test')
    tool.draw_into(cfg, str(tmp_path / 'shown'))
    assert cfg.default_hooks.visualization.test_out_dir == str(tmp_path / 'shown')
    tool.dump_into(cfg, 'found.pkl')
    assert cfg.test_evaluator[-1]['type'] == 'mmdet.DumpDetResults'


def first_name(content: dict, name: str) -> None:
    content['images'][0]['file_name'] = name


JSON_DAMAGES = {
    'nested': (lambda text: '[' * 10**6 + ']' * 10**6, 'nested too deeply'),
    'nested in an annotation': (
        lambda text: text.replace(
            '"bbox": ', '"extra": ' + '[' * 10**5 + ']' * 10**5 + ', "bbox": '
        ),
        'nested too deeply',
    ),
    'a list': (lambda text: '[]', 'expected an object, found list'),
    'a byte order mark': (lambda text: '\ufeff' + text, 'byte order mark'),
    'annotations of text': (
        lambda text: json.dumps({**json.loads(text), 'annotations': ['x']}),
        'not an annotation file in COCO format',
    ),
    'half a letter': (
        lambda text: text.replace('"file_name": "', '"file_name": "\\ud800', 1),
        'no valid text',
    ),
}


@pytest.mark.parametrize('name', JSON_DAMAGES)
def test_strange_json_is_a_sentence(name, damaged):
    change, message = JSON_DAMAGES[name]
    file = damaged / 'annotations' / 'instances_train.json'
    file.write_text(change(file.read_text()))
    cfg = detection_config(damaged)
    with pytest.raises(ValueError, match=message) as error:
        check_data(cfg, ('train',))
    assert str(file) in str(error.value) and len(str(error.value)) < 500
    report = inspect_data(cfg, ('train',), samples=0)
    assert report.problems('error')
    report.print(Console(file=io.TextIOWrapper(io.BytesIO(), 'utf-8')))


@pytest.mark.parametrize('key', ['bbox', 'area', 'id', 'image_id', 'category_id'])
def test_numbers_of_400_digits(key, damaged):
    number = 10**400
    value = [number, 2, number, 3] if key == 'bbox' else number
    edit(damaged, lambda content: content['annotations'][0].update({key: value}))
    change_val(damaged, lambda content: content['annotations'][0].update({key: value}))
    cfg = detection_config(damaged)
    if key == 'id':
        with pytest.raises(ValueError, match='as id'):
            check_data(cfg, ('train', 'val'))
    else:
        check_data(cfg, ('train', 'val'))
    report = inspect_data(cfg, ('train', 'val'), samples=0)
    assert key == 'area' or report.problems('error')


@pytest.mark.parametrize('meta', ['text', ['a', 'list'], 3, None])
def test_a_checkpoint_whose_meta_is_no_dict(meta, tmp_path, monkeypatch):
    torch.save(dict(state_dict=SViT(small_arch()).state_dict(), meta=meta), tmp_path / 'a.pth')
    assert read_checkpoint(tmp_path / 'a.pth')['meta'] == {}
    monkeypatch.setattr(sys, 'argv', ['convert', f'{tmp_path}/a.pth', f'{tmp_path}/b.pth'])
    import_tool('convert_checkpoint').main()
    assert read_checkpoint(tmp_path / 'b.pth')['meta'] == dict(source='a.pth')


@pytest.mark.parametrize('classes', ['text', 3, dict(a=1), None])
def test_a_checkpoint_whose_classes_are_no_list(classes, tmp_path, monkeypatch):
    weights = {f'backbone.{key}': value for key, value in SViT(small_arch()).state_dict().items()}
    meta = dict(dataset_meta=dict(classes=classes))
    torch.save(dict(state_dict=weights, meta=meta), tmp_path / 'a.pth')
    argv = ['convert', f'{tmp_path}/a.pth', f'{tmp_path}/b.pth', '--whole']
    monkeypatch.setattr(sys, 'argv', argv)
    import_tool('convert_checkpoint').main()
    assert 'dataset_meta' not in read_checkpoint(tmp_path / 'b.pth')['meta']


@pytest.fixture(params=['pipe', 'socket', 'folder', 'device'])
def no_file(request, tmp_path) -> Iterator[Path]:
    """What has a name, but is no file."""
    path = tmp_path / 'epoch_1.pth'
    server = socket.socket(socket.AF_UNIX)
    if request.param == 'pipe':
        os.mkfifo(path)
    elif request.param == 'socket':
        server.bind(os.path.relpath(path))  # Names of sockets are short.
    elif request.param == 'folder':
        path.mkdir()
    else:
        path.symlink_to('/dev/zero')
    yield path
    server.close()


def test_what_is_no_file_is_named_as_a_checkpoint(no_file):
    with pytest.raises(ValueError, match=r"epoch_1\.pth' is a folder, pipe or device"):
        read_checkpoint(no_file)
    with pytest.raises(ValueError, match='no valid checkpoint to resume from'):
        newest_valid_checkpoint(no_file.parent)


def test_what_is_no_file_is_named_as_an_image(no_file, damaged):
    with pytest.raises(OSError, match='is a folder, pipe or device'):
        refuse_truncated(no_file)
    image = sorted((damaged / 'train').glob('*.jpg'))[2]
    image.unlink()
    no_file.rename(image)
    examples = found(inspect_data(detection_config(damaged), ['train']))
    kind = 'images that are no files, but pipes, devices or folders'
    assert examples['error', kind] == [str(image)]


def test_what_is_no_file_is_named_as_annotations(no_file, damaged):
    file = damaged / 'annotations' / 'instances_train.json'
    file.unlink()
    no_file.rename(file)
    with pytest.raises((FileNotFoundError, ValueError, OSError), match='instances_train'):
        check_data(detection_config(damaged), ('train',))


HARMFUL = '\x1b[2J\x1b]0;title\x07[red]name[/blue]\u202e\ud800\r'


def test_names_of_others_do_not_control_a_terminal(capsys):
    report = DatasetReport()
    report.error('train', f'kind {HARMFUL}', f'example {HARMFUL}')
    stream = io.StringIO()
    report.print(Console(file=stream, width=200, force_terminal=False))
    text = stream.getvalue()
    assert '[red]name[/blue]' in text
    assert text.isprintable() or not set(text) & set('\x1b\x07\u202e\ud800\r')


def test_class_and_file_names_with_escape_codes_are_reported(damaged):
    name = '\x1b[31m[/bold]circle'

    def rename(content: dict) -> None:
        content['categories'][0]['name'] = name
        first_name(content, f'{name}.jpg')

    edit(damaged, rename)
    cfg = detection_config(damaged)
    names = [name, 'square', 'triangle', 'star', 'ring']
    cfg.train_dataloader.dataset.metainfo = dict(classes=names)
    stream = io.StringIO()
    inspect_data(cfg, ['train'], console=Console(file=stream, force_terminal=True)).print(
        Console(file=stream, width=200)
    )
    assert '\x1b[31m[/bold]' not in stream.getvalue()
    assert r'\x1b[31m[/bold]circle.jpg' in stream.getvalue()


def test_a_refusal_of_a_tool_does_not_control_a_terminal(tmp_path):
    tool = [sys.executable, ROOT / 'tools' / 'check_dataset.py', f'{tmp_path}/\x1b[2Jx.py']
    result = subprocess.run(tool, capture_output=True, text=True, check=False)
    assert (
        result.returncode == 1 and '\x1b' not in result.stderr and r'\x1b[2Jx.py' in result.stderr
    )
    assert printable('täglich 日本\n\t') == 'täglich 日本\n\t'
