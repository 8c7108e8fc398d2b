"""Count parameters and multiply-adds of a config's model, without data or weights."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import yaml
from mmengine.config import Config
from mmengine.model import BaseModel, BaseModule
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from .flops import Count, FlopCounts, count

DEFAULT_SHAPES = {'mmdet': (800, 1280), 'mmseg': (512, 2048)}
"""Image height and width of the paper's counts, by ``default_scope``."""


@dataclass(frozen=True)
class ConfigFlopCounts:
    """Result of :func:`count_config`.

    Attributes:
        workload: What was run: image size (height x width), number of proposals and masks.
        model: Counts of the model.
        backbone: Counts of its backbone.
        uncounted: See :class:`Count`.
    """

    workload: str
    model: FlopCounts
    backbone: FlopCounts
    uncounted: Counter[str]


def count_config(cfg: Config, shape: tuple[int, int] | None = None) -> ConfigFlopCounts:
    """Build a config's model and count parameters and multiply-adds of inference on one image.

    In two-stage detectors, box heads run on the maximum number of proposals in ``test_cfg`` and
    mask heads on the maximum number of detections (1000 and 100 by default). Segmentors run on
    the uncropped image, without their auxiliary heads and those heads' parameters, as in the
    published numbers. Post-processing is not counted.

    Only shapes are computed, unless the model has modules of ``mmcv.ops`` outside its RoI head:
    their compiled functions need values, so that model runs on the CPU.

    Args:
        cfg: A config of MMDetection, MMSegmentation or MMPretrain.
        shape: Height and width of the image; by default that of :data:`DEFAULT_SHAPES`, or for
            classifiers the size to which the test pipeline crops or resizes.

    Raises:
        ValueError: No shape is given or found, or the type of RoI head is not supported.
    """
    scope = cfg.get('default_scope') or 'mmengine'
    shape = shape or DEFAULT_SHAPES.get(scope) or _test_size(cfg)
    init_default_scope(scope)
    model_cfg = copy.deepcopy(cfg.model)
    if scope == 'mmseg':
        model_cfg.pop('auxiliary_head', None)
        model_cfg.test_cfg = dict(mode='whole')
    model = MODELS.build(model_cfg)
    needs_values = any(
        type(module).__module__.startswith('mmcv.ops.') and not name.startswith('roi_head.')
        for name, module in model.named_modules()
    )
    if needs_values:
        found, workload = _count_model(model, scope, shape)
    else:
        mode = FakeTensorMode()
        with FakeCopyMode(mode):
            model = copy.deepcopy(model)
        with mode:
            found, workload = _count_model(model, scope, shape)
    return ConfigFlopCounts(workload, found.of(), found.of('backbone'), found.uncounted)


@dataclass(frozen=True)
class MetafileEntry:
    """A config in a metafile, with its results and the paper's figures.

    Attributes:
        config: The config file.
        collection: The collection in the metafile.
        parameters: Parameters in the paper.
        flops: Multiply-adds in the paper.
        paper: The paper's results, by metric.
        ours: Results of our own runs, by metric.
    """

    config: Path
    collection: str = ''
    parameters: float | None = None
    flops: float | None = None
    paper: dict[str, float] = field(default_factory=dict)
    ours: dict[str, float] = field(default_factory=dict)


PAPER = ' (paper)'


def read_metafile(path: str | Path) -> list[MetafileEntry]:
    """Read configs, results and the paper's figures from a metafile.

    Args:
        path: A file in OpenMMLab's model-index format, in the folder of its configs, or one
            that imports such files. Read from each entry of ``Models``: ``Config``,
            ``In Collection``, the optional numbers ``Parameters (paper)`` and ``FLOPs (paper)``
            (multiply-adds) in ``Metadata``, and the ``Metrics`` of ``Results``, which are the
            paper's if their names end in ``(paper)``.

    Raises:
        ValueError: It imports a file or links to a config outside its folder. Configs are
            programs, and the user has trusted no more than that folder.
    """
    folder = Path(path).resolve().parent
    content = yaml.safe_load(Path(path).read_text())  # MMEngine's load would run code in it.
    entries = []
    for imported in content.get('Import', []):
        if folder not in (folder / imported).resolve().parents:
            raise ValueError(f'{path} imports {imported!r}, which is not below its folder {folder}')
        entries += read_metafile(Path(path).parent / imported)
    for model in content.get('Models', []):
        metadata = model.get('Metadata', {})
        results = model.get('Results', [])
        metrics = {k: v for result in results for k, v in result['Metrics'].items()}
        config = Path(path).parent / Path(model['Config']).name
        if config.exists() and folder not in config.resolve().parents:
            raise ValueError(f'{path} names {config}, a link out of its folder {folder}')
        entries.append(
            MetafileEntry(
                config,
                model['In Collection'],
                metadata.get(f'Parameters{PAPER}'),
                metadata.get(f'FLOPs{PAPER}'),
                {k.removesuffix(PAPER): v for k, v in metrics.items() if k.endswith(PAPER)},
                {k: v for k, v in metrics.items() if not k.endswith(PAPER)},
            )
        )
    return entries


def _test_size(cfg: Config) -> tuple[int, int]:
    """Height and width to which the test pipeline of a classifier crops or resizes."""
    pipeline = cfg.get('test_dataloader', {}).get('dataset', {}).get('pipeline', [])
    for transform in reversed(pipeline):
        size = transform.get('crop_size', transform.get('scale'))
        if size is not None:
            return (size, size) if isinstance(size, int) else (size[1], size[0])
    raise ValueError(
        f'no image shape is known: default_scope is {cfg.get("default_scope")!r}, not one of '
        f'{list(DEFAULT_SHAPES)}, and the test pipeline has no crop_size or scale; pass a shape'
    )


def _count_model(model: BaseModel, scope: str, shape: tuple[int, int]) -> tuple[Count, str]:
    """The count and its workload, see :class:`ConfigFlopCounts`."""
    image = torch.zeros(1, 3, *shape)
    workload = '{}x{}'.format(*shape)
    if hasattr(model, 'roi_head'):
        proposals = model.test_cfg.rpn.max_per_img
        masks = model.test_cfg.rcnn.max_per_img if model.roi_head.with_mask else 0
        found = count(model, partial(_run_two_stage, model, image, proposals, masks))
        return found, f'{workload}, {proposals} proposals, {masks} masks'
    if scope == 'mmdet':
        run = partial(_run_one_stage, model, image)
    else:
        run = partial(model, image, mode='predict' if scope == 'mmseg' else 'tensor')
    return count(model, run), workload


def _run_two_stage(model: BaseModel, image: Tensor, proposals: int, masks: int) -> None:
    """Run a two-stage detector, its RoI heads on zeros instead of features of proposals."""
    from mmdet.models import CascadeRoIHead, StandardRoIHead

    roi_head = model.roi_head
    if type(roi_head) not in (StandardRoIHead, CascadeRoIHead):
        raise ValueError(
            'only two-stage detectors with a StandardRoIHead or CascadeRoIHead can be counted, '
            f'found a {type(roi_head).__name__}'
        )
    features = model.extract_feat(image)
    if model.with_rpn:
        model.rpn_head(features)
    _run_heads(roi_head.bbox_roi_extractor, roi_head.bbox_head, image, proposals)
    if masks:
        _run_heads(roi_head.mask_roi_extractor, roi_head.mask_head, image, masks)


def _run_heads(extractor: BaseModule, head: BaseModule, image: Tensor, number: int) -> None:
    for each, its_head in zip(_as_list(extractor), _as_list(head)):
        size = each.roi_layers[0].output_size
        its_head(image.new_zeros(number, each.out_channels, *size))


def _as_list(module: BaseModule) -> list[BaseModule]:
    """The stages of a cascade, or the only stage."""
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def _run_one_stage(model: BaseModel, image: Tensor) -> None:
    from mmdet.structures import DetDataSample

    shape = tuple(image.shape[2:])
    meta = dict(img_shape=shape, ori_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0))
    model(image, [DetDataSample(metainfo=meta)], mode='tensor')
