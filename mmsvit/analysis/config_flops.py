"""Counting the parameters and multiply-adds of the model of a config, without data or weights."""

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
"""Height and width of the paper's counts, by ``default_scope``."""


@dataclass(frozen=True)
class ConfigFlopCounts:
    """What :func:`count_config` found.

    Attributes:
        workload: What the figures are for: size of the image (height x width), proposals, masks.
        model: FlopCounts of the whole model.
        backbone: FlopCounts of its backbone.
        uncounted: What multiplies, or may, and is not in the figures; how often it ran.
    """

    workload: str
    model: FlopCounts
    backbone: FlopCounts
    uncounted: Counter[str]


def count_config(cfg: Config, shape: tuple[int, int] | None = None) -> ConfigFlopCounts:
    """Build the model of a config and count what inference on one image multiplies.

    Two-stage detectors run their box heads on as many proposals, and their mask heads on as many
    detections, as ``test_cfg`` allows (1000 and 100 by default), whatever the image. Segmentors
    take the image as a whole, without auxiliary heads; these do not count as parameters either,
    which is how the published numbers come about. Post-processing multiplies nothing.

    Shapes are all that is computed, unless the model has modules of ``mmcv.ops`` outside of its
    RoI head: compiled functions need values, and then the model runs on the CPU.

    Args:
        cfg: A config of MMDetection, MMSegmentation or MMPretrain.
        shape: Height and width of the image. None stands for :data:`DEFAULT_SHAPES`, and for
            classifiers, what the test pipeline crops or resizes to.

    Raises:
        ValueError: There is no shape to count at, or the RoI head is of a kind with parts that
            this does not know.
    """
    scope = cfg.get('default_scope') or 'mmengine'
    shape = shape or DEFAULT_SHAPES.get(scope) or _test_size(cfg)
    init_default_scope(scope)
    model_cfg = copy.deepcopy(cfg.model)
    if scope == 'mmseg':
        model_cfg.pop('auxiliary_head', None)
        model_cfg.test_cfg = dict(mode='whole')
    model = MODELS.build(model_cfg)
    if _needs_values(model):
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
    """A config that a metafile lists, with the results and the paper's figures that it has.

    Attributes:
        config: The file.
        collection: What the metafile calls its models.
        parameters: The paper's.
        flops: The paper's, multiply-adds.
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
        path: A file in OpenMMLab's model-index format, beside its configs, or one that
            imports others. Of each entry of
            ``Models``, these are read: ``Config``, ``In Collection``, in ``Metadata`` the
            optional ``Parameters (paper)`` and ``FLOPs (paper)`` (multiply-adds), plain
            numbers, and the ``Metrics`` of ``Results``, which are the paper's if their names
            end in ``(paper)``.

    Raises:
        ValueError: It imports a file that is not below its own folder: the configs of a
            metafile are programs, and whoever names one has seen that folder at most.
    """
    folder = Path(path).resolve().parent
    content = yaml.safe_load(Path(path).read_text())  # MMEngine's load would run code from it.
    entries = []
    for imported in content.get('Import', []):
        if folder not in (folder / imported).resolve().parents:
            raise ValueError(f'{path} imports {imported!r}, which is not below its folder {folder}')
        entries += read_metafile(Path(path).parent / imported)
    for model in content.get('Models', []):
        metadata = model.get('Metadata', {})
        metrics = {}
        for result in model.get('Results', []):
            metrics.update(result['Metrics'])
        entries.append(
            MetafileEntry(
                Path(path).parent / Path(model['Config']).name,
                model['In Collection'],
                metadata.get(f'Parameters{PAPER}'),
                metadata.get(f'FLOPs{PAPER}'),
                {k.removesuffix(PAPER): v for k, v in metrics.items() if k.endswith(PAPER)},
                {k: v for k, v in metrics.items() if not k.endswith(PAPER)},
            )
        )
    return entries


def _test_size(cfg: Config) -> tuple[int, int]:
    """Height and width that the test pipeline of a classifier crops or resizes to."""
    for transform in reversed(
        cfg.get('test_dataloader', {}).get('dataset', {}).get('pipeline', [])
    ):
        size = transform.get('crop_size', transform.get('scale'))
        if size is not None:
            return (size, size) if isinstance(size, int) else (size[1], size[0])
    raise ValueError(
        f'no shape to count at: default_scope is {cfg.get("default_scope")!r}, not one of '
        f'{list(DEFAULT_SHAPES)}, and the test pipeline has no crop_size or scale; give a shape'
    )


def _needs_values(model: BaseModel) -> bool:
    return any(
        type(module).__module__.startswith('mmcv.ops.') and not name.startswith('roi_head.')
        for name, module in model.named_modules()
    )


def _count_model(model: BaseModel, scope: str, shape: tuple[int, int]) -> tuple[Count, str]:
    """The count, and what it is for."""
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
    """Run a two-stage detector with its RoI heads on features that no proposals are needed for."""
    from mmdet.models import CascadeRoIHead, StandardRoIHead

    roi_head = model.roi_head
    if type(roi_head) not in (StandardRoIHead, CascadeRoIHead):
        raise ValueError(
            'of two-stage detectors, those with a StandardRoIHead or CascadeRoIHead can be '
            f'counted, not with a {type(roi_head).__name__}, which has parts of its own'
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
    """The stages of a cascade, or the only one."""
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def _run_one_stage(model: BaseModel, image: Tensor) -> None:
    from mmdet.structures import DetDataSample

    shape = tuple(image.shape[2:])
    meta = dict(img_shape=shape, ori_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0))
    model(image, [DetDataSample(metainfo=meta)], mode='tensor')
