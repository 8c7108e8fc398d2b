"""Models of configs as plain functions from RGB images to named tensors, ready for export.

An exported file takes a batch of images and returns tensors; the data samples of mm* models are
left out.
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
    """``nn.AdaptiveAvgPool2d`` as two matrix products, for maps of dynamic size."""

    def __init__(self, output_size: int | tuple[int, int]) -> None:
        super().__init__()
        if isinstance(output_size, int):
            output_size = (output_size, output_size)
        self.output_size = output_size

    @staticmethod
    def _weights(bins: int, like: Tensor, dim: int) -> Tensor:
        """Weight of each position in the mean of each bin, ``(bins, size)``."""
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
                size = cast(int | tuple[int, int], child.output_size)  # None is rare, and fails.
                setattr(parent, name, AdaptivePooling(size))


class Exportable(nn.Module):
    """A model or a part of it, from images to a dict of tensors.

    Args:
        model: An mm* model in evaluation mode; children that the part does not use are deleted.
        part: ``'backbone'``, ``'neck'`` (backbone and neck) or ``'model'``.
        normalize: Whether to normalise the images as the model's data preprocessor does.

    Raises:
        ValueError: The model cannot be exported; the message names the parts that can.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: BaseModel, part: str = 'model', normalize: bool = True) -> None:
        super().__init__()
        self.model, self.part = model, part
        if part not in PARTS:
            raise ValueError(f'part must be one of {PARTS}, found {part!r}')
        self.run, uses = RUNNERS[part if part != 'model' else _kind_of(model)]
        preprocessor = model.data_preprocessor
        for name, _ in list(model.named_children()):
            if name not in (*uses, 'data_preprocessor'):
                delattr(model, name)
        self.normalize = normalize and getattr(preprocessor, '_enable_normalize', False)
        if self.normalize:
            self.register_buffer('mean', preprocessor.mean.reshape(-1, 1, 1))
            self.register_buffer('std', preprocessor.std.reshape(-1, 1, 1))
        # mm* read images as BGR, and some models take BGR.
        self.to_bgr = normalize and not takes_rgb(preprocessor)

    @property
    def input_description(self) -> str:
        """The expected images, in words."""
        if not (self.normalize or self.to_bgr):
            return "images from the model's data_preprocessor, float32 (N, 3, H, W)"
        return 'RGB images of values from 0 to 255, float32 (N, 3, H, W)'

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Run the model on images, see :attr:`input_description`."""
        if self.to_bgr:
            images = images.flip(1)
        if self.normalize:
            images = (images - self.mean) / self.std
        return self.run(self.model, images)


def _kind_of(model: BaseModel) -> str:
    """The key of :data:`RUNNERS` for ``part='model'``."""
    if hasattr(model, 'encode_decode'):
        heads = model.decode_head  # A cascade has several.
        head = heads[-1] if isinstance(heads, nn.ModuleList) else heads
        if not hasattr(head, 'cls_seg'):
            raise ValueError(
                f'a {type(model).__name__} with a {type(head).__name__} cannot be exported as '
                "'model': it classifies masks, not pixels. Export its 'neck' or 'backbone'"
            )
        return 'segmentor'
    if hasattr(model, 'bbox_head') and not hasattr(model, 'encoder'):
        return 'one-stage detector'
    if hasattr(model, 'rpn_head'):
        return 'two-stage detector'
    if hasattr(model, 'head'):
        return 'classifier'
    raise ValueError(
        f"a {type(model).__name__} cannot be exported as 'model'; supported are classifiers, "
        'segmentors, one-stage detectors, and two-stage detectors up to their RPN. Export its '
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
    """Name the outputs of a dense head: scores, boxes and maybe more, each a list of levels."""
    names = ('cls_score', 'bbox_pred', 'extra')
    if len(outputs) > len(names):
        raise ValueError(
            f'a dense head with {len(outputs)} kinds of output cannot be exported; at most '
            f'{len(names)} are supported'
        )
    return {f'{name}{i}': x for name, xs in zip(names, outputs) for i, x in enumerate(xs)}


# How each part and each kind of model runs, and the children that it uses: the weights of others
# would enlarge the file.
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
        checkpoint: A checkpoint of the model, or for the backbone any that
            :func:`mmsvit.checkpoint.load_pretrained` supports. By default weights are initialised
            from ``init_cfg``, so heads are untrained.
        part: See :class:`Exportable`.
        normalize: See :class:`Exportable`.
        deploy: Whether to call ``switch_to_deploy`` of the modules that have it.

    Raises:
        ValueError, RuntimeError: The weights do not fit, or the part cannot be exported.
        FileNotFoundError: The checkpoint does not exist.
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
