"""Configs of small data sets, and what the thorough check says of them."""

from __future__ import annotations

import copy
import io
import json
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from conftest import ROOT
from mmengine.config import Config
from rich.console import Console

from mmsvit.datasets.report import DatasetReport

CONFIG = ROOT / 'configs' / 'svit_maskrcnn_shapes.py'


SPLITS = ('train', 'val', 'test')


def data_options(folder: Path) -> dict:
    ann_file = f'{folder}/annotations/instances_val.json'
    options = {f'{split}_dataloader.dataset.data_root': f'{folder}/' for split in SPLITS}
    return {**options, 'val_evaluator.ann_file': ann_file, 'test_evaluator.ann_file': ann_file}


@cache
def example_config() -> Config:
    return Config.fromfile(CONFIG)


def detection_config(folder: Path, **options: object) -> Config:
    cfg = copy.deepcopy(example_config())
    cfg.merge_from_dict({**data_options(folder), **options})
    return cfg


def found(report: DatasetReport) -> dict[tuple[str, str], list[str]]:
    """Examples by level and kind."""
    examples: dict[tuple[str, str], list[str]] = {}
    for problem in [*report.problems('error'), *report.problems('warning')]:
        examples.setdefault((problem.level, problem.kind), []).extend(problem.examples)
    return examples


def printed(report: DatasetReport) -> str:
    stream = io.StringIO()
    report.print(Console(file=stream, width=120))
    return stream.getvalue()


def edit(folder: Path, change) -> None:
    file = folder / 'annotations' / 'instances_train.json'
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def change_val(folder: Path, change) -> None:
    file = folder / 'annotations' / 'instances_val.json'
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


CLASSES = ('road', 'tree', 'sky')


def write_labels(folder: Path, i: int, label_map: np.ndarray, dtype: type = np.uint8) -> None:
    cv2.imwrite(str(folder / 'labels' / f'{i}.png'), label_map.astype(dtype))


def segmentation_config(folder: Path, **dataset: object) -> Config:
    dataset = dict(
        type='BaseSegDataset',
        data_root=str(folder),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        metainfo=dict(classes=CLASSES),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
        **dataset,
    )
    model = dict(decode_head=dict(num_classes=3), auxiliary_head=[dict(num_classes=3)])
    return Config(dict(train_dataloader=dict(dataset=dataset), model=model, default_scope='mmseg'))


LINE, TRIANGLE = [1, 1, 5, 5], [1, 1, 9, 1, 9, 9]
