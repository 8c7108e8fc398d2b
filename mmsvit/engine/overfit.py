"""Learn a few images by heart, the first check of a config on new data (``tools/train.py --overfit``).

What cannot learn sixteen images will not learn a hundred thousand.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config
from mmengine.runner import Runner

from ..datasets.quick_checks import as_list, dataset_configs, type_name
from ..visualization.training_curves import Curve

WARM_UP = 50  # iterations
ENOUGH_LOSS = 0.5  # of that at the start; our choice, as the next
ENOUGH_SCORE = 0.5  # of a perfect one
MAIN_SCORES = ('bbox_mAP', 'segm_mAP', 'mIoU')


def overfit_config(cfg: Config, images: int, iterations: int) -> None:
    """Make a config train and evaluate on its first training images, without augmentation.

    Images go through the validation pipeline, the learning rate stays after a short warm-up, no
    path is dropped, and one checkpoint is written, at the end.

    Args:
        cfg: Complete, of a detector or segmentor; it is changed.
        images: How many, of those that the training data set keeps.
        iterations: How long.

    Raises:
        ValueError: The config has no validation, several data sets, or no annotations to load.
    """
    if not cfg.get('val_dataloader') or not cfg.get('val_evaluator'):
        raise ValueError('--overfit needs val_dataloader and val_evaluator in the config')
    parts = list(dataset_configs(cfg.train_dataloader.dataset))
    if len(parts) > 1:
        raise ValueError(f'--overfit is for one training data set, found {len(parts)}')
    load = next((step for step in parts[0].get('pipeline', ()) if _loads_annotations(step)), None)
    if load is None:
        raise ValueError(
            '--overfit is for detectors and segmentors: the train pipeline has no LoadAnnotations'
        )
    evaluation = list(next(dataset_configs(cfg.val_dataloader.dataset))['pipeline'])
    first, *others = (step for step in evaluation if not _loads_annotations(step))
    # Evaluation may load boxes after Resize, which training must resize.
    data = dict(parts[0], indices=images)
    cfg.train_dataloader.dataset = dict(data, pipeline=[first, load, *others])
    # Not as a test set, which would keep images that training leaves out.
    cfg.val_dataloader.dataset = copy.deepcopy(dict(data, pipeline=evaluation))
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    cfg.train_dataloader.pop('batch_sampler', None)
    for metric in as_list(cfg.val_evaluator):
        if metric.get('ann_file'):
            metric['ann_file'] = _annotation_file(data)

    preprocessor = cfg.model.get('data_preprocessor', {})
    preprocessor.pop('batch_augments', None)
    if preprocessor.get('size') is not None:  # Of a crop; images are whole now.
        preprocessor.update(size=None, size_divisor=32)
    if 'drop_path_rate' in cfg.model.backbone:
        cfg.model.backbone.drop_path_rate = 0.0

    cfg.train_cfg = dict(
        type='IterBasedTrainLoop', max_iters=iterations, val_interval=max(iterations // 4, 1)
    )
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=WARM_UP)
    ]
    cfg.log_processor = dict(cfg.get('log_processor') or {}, by_epoch=False, window_size=10)
    hooks = cfg.setdefault('default_hooks', {})
    hooks.logger = dict(hooks.get('logger') or dict(type='LoggerHook'), interval=10)
    hooks.logger.log_metric_by_epoch = False
    hooks.setdefault('checkpoint', dict(type='CheckpointHook')).update(
        interval=iterations, by_epoch=False, save_best=None
    )


def evaluate_only_these(runner: Runner) -> None:
    """Keep COCO's metrics from counting the other images of the annotation file as missed."""
    dataset = runner.val_loop.dataloader.dataset
    ids = [dataset.get_data_info(i).get('img_id') for i in range(len(dataset))]
    for metric in runner.val_loop.evaluator.metrics:
        if hasattr(metric, 'img_ids'):
            metric.img_ids = ids


class Verdict(NamedTuple):
    """Whether the images were learned, and what to say of it."""

    learned: bool
    text: str


def judge(curves: dict[str, Curve]) -> Verdict:
    """Whether the loss fell to half, and the last scores are half of perfect ones.

    Args:
        curves: Of the run, from :func:`mmsvit.visualization.training_curves.read_curves`.
    """
    losses = curves['loss'][1]
    fell = losses[-1] <= ENOUGH_LOSS * losses[0]
    lines = [f'loss: {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end']
    scores = {
        name: values[-1] / (100 if name == 'mIoU' else 1)
        for name, (_, values) in curves.items()
        if name.rpartition('/')[2] in MAIN_SCORES
    }
    lines += [
        f'{name}: {score:.1%} on the images of the training' for name, score in scores.items()
    ]
    found = all(score >= ENOUGH_SCORE for score in scores.values())
    if fell and found:
        lines.append('Learned: loss and scores behave.' if scores else 'Learned: the loss behaves.')
    elif fell:
        lines.append(
            'The loss fell to half, but a score is below 50 %: train longer (--overfit-iters); if it '
            'stays, the evaluation reads other labels or boxes than the training '
            '(tools/check_dataset.py)'
        )
    else:
        lines.append(
            'The loss did not fall to half: train longer (--overfit-iters), try other learning rates '
            '(optim_wrapper.optimizer.lr), look whether weights were loaded, and at the '
            'annotations (tools/check_dataset.py)'
        )
    return Verdict(fell and found, '\n'.join(lines))


def _loads_annotations(step: dict) -> bool:
    name = type_name(step)
    return name.startswith('Load') and name.endswith('Annotations')


def _annotation_file(dataset: dict) -> str:
    """As MMEngine's data sets join it with their root."""
    root, file = dataset.get('data_root') or '', dataset['ann_file']
    return file if '://' in file else str(Path(root, file))
