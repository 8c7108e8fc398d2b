"""Models of configs as plain functions from RGB images to named tensors, ready to be exported.

What mm* models do with lists of data samples is left out: an exported file takes a batch of
images and returns tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import load_state_dict
from torch import Tensor, nn

from ..checkpoint.loading import load_pretrained
from ..checkpoint.published import model_state_dict
from ..checkpoint.reading import read_checkpoint
from ..models.deploy import switch_to_deploy
from ..models.mm_models import build_model, takes_rgb

PARTS = ('model', 'neck', 'backbone')


class AdaptivePooling(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as two matrix products, for maps whose size is not known yet."""

    def __init__(self, output_size: int | tuple[int, int]) -> None:
        super().__init__()
        if isinstance(output_size, int):
            output_size = (output_size, output_size)
        self.output_size = output_size

    @staticmethod
    def _weights(bins: int, like: Tensor, dim: int) -> Tensor:
        """What each position has in the mean of each bin, ``(bins, size)``."""
        size = like.shape[dim]
        place = torch.arange(size, device=like.device)
        number = torch.arange(bins, device=like.device)[:, None]
        first, end = number * size // bins, ((number + 1) * size + bins - 1) // bins
        inside = ((place >= first) & (place < end)).to(like.dtype)
        return inside / inside.sum(dim=1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, *output_size)."""
        rows, columns = (self._weights(n, x, d) for n, d in zip(self.output_size, (2, 3)))
        return rows @ x @ columns.t()


def _replace_adaptive_pooling(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d):
                size = cast(int | tuple[int, int], child.output_size)  # None is rare, and refused.
                setattr(parent, name, AdaptivePooling(size))


class Exportable(nn.Module):
    """A model or a part of it, from images to a dict of tensors.

    Args:
        model: An mm* model in evaluation mode; what the part does not need is taken off it.
        part: ``'backbone'``, ``'neck'`` (backbone and neck) or ``'model'``.
        normalize: Whether to begin with what the model's data preprocessor does to pixels.

    Raises:
        ValueError: The model has no such part that can be exported; the message names those
            that can.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: BaseModel, part: str = 'model', normalize: bool = True) -> None:
        super().__init__()
        self.model, self.part = model, part
        self.run, uses = RUNNERS[part if part != 'model' else _kind_of(model)]
        preprocessor = model.data_preprocessor
        for name, _ in list(model.named_children()):
            if name not in (*uses, 'data_preprocessor'):
                delattr(model, name)
        self.normalize = normalize and getattr(preprocessor, '_enable_normalize', False)
        if self.normalize:
            self.register_buffer('mean', preprocessor.mean.reshape(-1, 1, 1))
            self.register_buffer('std', preprocessor.std.reshape(-1, 1, 1))
        # mm* read images as BGR, and some models want them so.
        self.to_bgr = normalize and not takes_rgb(preprocessor)

    @property
    def input_description(self) -> str:
        """What the images must be, in words."""
        if not (self.normalize or self.to_bgr):
            return "images as the model's data_preprocessor makes them, float32 (N, 3, H, W)"
        return 'RGB images of values from 0 to 255, float32 (N, 3, H, W)'

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Run the model on images as :attr:`input_description` says."""
        if self.to_bgr:
            images = images.flip(1)
        if self.normalize:
            images = (images - self.mean) / self.std
        return self.run(self.model, images)


def _kind_of(model: BaseModel) -> str:
    """Which of RUNNERS runs a whole model."""
    if hasattr(model, 'encode_decode'):
        heads = model.decode_head  # Of a cascade there are several.
        head = heads[-1] if isinstance(heads, nn.ModuleList) else heads
        if not hasattr(head, 'cls_seg'):
            raise ValueError(
                f'a {type(model).__name__} with a {type(head).__name__} cannot be exported '
                "whole: it classifies masks and not pixels. Export its 'neck' or 'backbone'"
            )
        return 'segmentor'
    if hasattr(model, 'bbox_head') and not hasattr(model, 'encoder'):
        return 'one-stage detector'
    if hasattr(model, 'rpn_head'):
        return 'two-stage detector'
    if hasattr(model, 'head'):
        return 'classifier'
    raise ValueError(
        f'a {type(model).__name__} cannot be exported whole; classifiers, segmentors, '
        'one-stage detectors and two-stage detectors up to their RPN can. Export its '
        "'neck' or 'backbone'"
    )


def _run_segmentor(model: BaseModel, images: Tensor) -> dict[str, Tensor]:
    logits = model.encode_decode(images, [dict(img_shape=images.shape[2:])])
    if logits.shape[1] > 1:
        labels = logits.argmax(dim=1)
    else:
        labels = (logits[:, 0].sigmoid() > model.decode_head.threshold).long()
    return dict(logits=logits, labels=labels)


def _run_two_stage(model: BaseModel, images: Tensor) -> dict[str, Tensor]:
    features = model.extract_feat(images)
    return {**_name('level', features), **_name_outputs(model.rpn_head(features))}


def _name(
    name: str, tensors: Sequence[Tensor], numbers: Sequence[int] | None = None
) -> dict[str, Tensor]:
    return {f'{name}{i}': x for i, x in zip(numbers or range(len(tensors)), tensors)}


def _name_outputs(outputs: tuple[list[Tensor], ...]) -> dict[str, Tensor]:
    """What a dense head returns: scores, boxes and maybe more, each a list with all levels."""
    names = ('cls_score', 'bbox_pred', 'extra')
    if len(outputs) > len(names):
        raise ValueError(f'a dense head with {len(outputs)} kinds of output cannot be exported')
    found: dict[str, Tensor] = {}
    for name, tensors in zip(names, outputs):
        found.update(_name(name, tensors))
    return found


# How each part, and each kind of a whole model, runs, and the children of the model that it needs: a
# file would carry the weights of all others.
RUNNERS: dict[str, tuple[Callable[[BaseModel, Tensor], dict[str, Tensor]], tuple[str, ...]]] = {
    'backbone': (
        lambda model, images: _name('stage', model.backbone(images), model.backbone.out_indices),
        ('backbone',),
    ),
    'neck': (
        lambda model, images: _name('level', model.extract_feat(images)),
        ('backbone', 'neck'),
    ),
    'segmentor': (_run_segmentor, ('backbone', 'neck', 'decode_head')),
    'classifier': (
        lambda model, images: dict(logits=model(images, mode='tensor')),
        ('backbone', 'neck', 'head'),
    ),
    'one-stage detector': (
        lambda model, images: _name_outputs(model.bbox_head(model.extract_feat(images))),
        ('backbone', 'neck', 'bbox_head'),
    ),
    'two-stage detector': (_run_two_stage, ('backbone', 'neck', 'rpn_head')),
}


def build_exportable(
    cfg: Config,
    checkpoint: str | Path | None = None,
    part: str = 'model',
    normalize: bool = True,
    deploy: bool = True,
) -> Exportable:
    """Build the model of a config, load its weights strictly, and prepare it for export.

    Args:
        cfg: A config of MMDetection, MMSegmentation or MMPretrain.
        checkpoint: Of the whole model, or for the backbone of any that
            :func:`mmsvit.checkpoint.load_pretrained` takes. By default the weights are those
            that ``init_cfg`` says, which leaves heads as they are before training.
        part: See :class:`Exportable`.
        normalize: See :class:`Exportable`.
        deploy: Whether to call ``switch_to_deploy`` of what has it.

    Raises:
        ValueError, RuntimeError: The weights do not fit, or there is no such part.
        FileNotFoundError: There is no such checkpoint.
    """
    model = build_model(cfg)
    if checkpoint is None:
        model.init_weights()
    elif part == 'backbone':
        load_pretrained(model.backbone, checkpoint)
    else:
        load_state_dict(model, model_state_dict(read_checkpoint(checkpoint)), strict=True)
    model.eval()
    if deploy:
        switch_to_deploy(model)
    _replace_adaptive_pooling(model)
    return Exportable(model, part, normalize).requires_grad_(False).eval()
