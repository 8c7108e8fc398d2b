"""Run a config's evaluator on the truth: a perfect prediction must get a perfect score.

What an evaluation passes over or counts twice shows here before any training: annotation ids that
it takes for none, objects that the data set drops, label maps of another size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.evaluator import Evaluator
from mmengine.registry import TRANSFORMS
from mmengine.structures import BaseDataElement, InstanceData, PixelData

from .quick_checks import as_list, type_name

METRICS = {
    *('CocoMetric', 'LVISMetric', 'VOCMetric', 'IoUMetric'),
    *('Accuracy', 'SingleLabelMetric', 'MultiLabelMetric', 'AveragePrecision'),
}
"""Metrics whose best score is 1 or 100."""


def build_evaluator(cfg: dict | Sequence[dict], dataset: BaseDataset) -> Evaluator | None:
    """Build an evaluator that writes no files; None if it has other metrics than :data:`METRICS`.

    Args:
        cfg: ``val_evaluator`` or ``test_evaluator`` of a config.
        dataset: The data set it is for.
    """
    metrics = [dict(metric) for metric in as_list(cfg)]
    for metric in metrics:
        metric.pop('outfile_prefix', None)
        if type_name(metric) not in METRICS or metric.get('format_only'):
            return None
    with redirect_stdout(StringIO()):
        evaluator = Evaluator(metrics)
    evaluator.dataset_meta = dataset.metainfo
    return evaluator


def score_truth(
    evaluator: Evaluator, dataset: BaseDataset, indices: Sequence[int]
) -> dict[str, float]:
    """The scores of the truth itself on some samples.

    Args:
        evaluator: From :func:`build_evaluator`.
        dataset: Built as the runner does.
        indices: Of the samples.

    Returns:
        The scores that are numbers; what has no object (-1, NaN) is left out.
    """
    silent = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()):
            ids = []
            for i in indices:
                sample = dataset[i]['data_samples']
                _predict_truth(sample, dataset.get_data_info(i), dataset)
                ids.append(sample.metainfo.get('img_id'))
                evaluator.process([sample])
            for metric in evaluator.metrics:
                if hasattr(metric, 'img_ids'):  # Else COCO's counts all images of the file.
                    metric.img_ids = ids
            scores = evaluator.evaluate(len(ids))
    finally:
        logging.disable(silent)
    numbers = {k: float(v) for k, v in scores.items() if isinstance(v, (int, float, np.number))}
    return {key: v for key, v in numbers.items() if v >= 0}


def shortfalls(scores: dict[str, float]) -> dict[str, float]:
    """The scores that are not perfect, as shares of the best: 1, or 100 if any is above 1."""
    best = 100.0 if max(scores.values(), default=0) > 1 else 1.0
    return {key: score / best for key, score in scores.items() if score < best * (1 - 1e-6)}


def _predict_truth(sample: BaseDataElement, info: dict, dataset: BaseDataset) -> None:
    """Add to a sample the prediction that its annotations, read apart from the pipeline, ask for."""
    if 'instances' in info:
        sample.pred_instances = _true_instances(info, sample)
    elif 'seg_map_path' in info:
        load = TRANSFORMS.build(dict(type='mmseg.LoadAnnotations', imdecode_backend='pillow'))
        labels = torch.from_numpy(load(info)['gt_seg_map'].astype('int64'))
        sample.pred_sem_seg = PixelData(data=labels[None])
    else:
        score = torch.zeros(len(dataset.metainfo['classes']))
        score[torch.as_tensor(info['gt_label'])] = 1
        known: Any = sample
        known.set_pred_score(score).set_pred_label(info['gt_label'])


def _true_instances(info: dict, sample: BaseDataElement) -> InstanceData:
    info = {**info, 'ori_shape': sample.metainfo['ori_shape']}
    info['height'], info['width'] = info['ori_shape']
    with_mask = any('mask' in instance for instance in info['instances'])
    load = dict(type='mmdet.LoadAnnotations', with_bbox=True, with_mask=with_mask)
    loaded = TRANSFORMS.build(load)(info)
    counted = ~torch.from_numpy(loaded['gt_ignore_flags'])
    truth = InstanceData(
        bboxes=loaded['gt_bboxes'].tensor[counted],
        labels=torch.from_numpy(loaded['gt_bboxes_labels'])[counted],
        scores=torch.ones(int(counted.sum())),
    )
    if with_mask:
        truth.masks = loaded['gt_masks'].to_tensor(torch.bool, 'cpu')[counted]
    return truth
