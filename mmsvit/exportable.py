"""Models of configs as plain functions from RGB images to named tensors, ready to be exported.

What mm* models do with lists of data samples is left out: an exported file takes a batch of
images and returns tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import load_state_dict
from torch import Tensor, nn

from .checkpoint import load_pretrained, model_state_dict, read_checkpoint
from .deploy import switch_to_deploy
from .stock_models import build_model, takes_rgb

PARTS = ('model', 'neck', 'backbone')

# What each way of running a model needs of it; a file would carry the rest's weights.
_USED = {
    '_backbone': ('backbone',),
    '_neck': ('backbone', 'neck'),
    '_segmentor': ('backbone', 'neck', 'decode_head'),
    '_classifier': ('backbone', 'neck', 'head'),
    '_dense_head': ('backbone', 'neck', 'bbox_head'),
    '_proposals': ('backbone', 'neck', 'rpn_head'),
}


class AdaptivePooling(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as two matrix products, for maps whose size is not known yet."""

    def __init__(self, output_size: int | tuple[int, int]) -> None:
        super().__init__()
        square = isinstance(output_size, int)
        self.output_size = (output_size, output_size) if square else tuple(output_size)

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
                setattr(parent, name, AdaptivePooling(child.output_size))


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

    def __init__(self, model: nn.Module, part: str = 'model', normalize: bool = True) -> None:
        super().__init__()
        self.model, self.part = model, part
        self.run = {'backbone': self._backbone, 'neck': self._neck}.get(part) or self._whole()
        preprocessor = model.data_preprocessor
        for name, _ in list(model.named_children()):
            if name not in (*_USED[self.run.__name__], 'data_preprocessor'):
                delattr(model, name)
        self.normalize = normalize and getattr(preprocessor, '_enable_normalize', False)
        if self.normalize:
            self.register_buffer('mean', preprocessor.mean.reshape(-1, 1, 1))
            self.register_buffer('std', preprocessor.std.reshape(-1, 1, 1))
        # mm* read images as BGR, and some models want them so.
        self.to_bgr = normalize and not takes_rgb(preprocessor)

    @property
    def input_description(self) -> str:
        """What the images have to be, for people to read."""
        if not (self.normalize or self.to_bgr):
            return "images as the model's data_preprocessor makes them, float32 (N, 3, H, W)"
        return 'RGB images of values from 0 to 255, float32 (N, 3, H, W)'

    def _whole(self) -> Callable[[Tensor], dict[str, Tensor]]:
        model = self.model
        if hasattr(model, 'encode_decode'):
            heads = model.decode_head  # Of a cascade there are several.
            head = heads[-1] if isinstance(heads, nn.ModuleList) else heads
            if not hasattr(head, 'cls_seg'):
                raise ValueError(
                    f'a {type(model).__name__} with a {type(head).__name__} cannot be exported '
                    "whole: it classifies masks and not pixels. Export its 'neck' or 'backbone'"
                )
            return self._segmentor
        if hasattr(model, 'bbox_head') and not hasattr(model, 'encoder'):
            return self._dense_head
        if hasattr(model, 'rpn_head'):
            return self._proposals
        if hasattr(model, 'head'):
            return self._classifier
        raise ValueError(
            f'a {type(model).__name__} cannot be exported whole; classifiers, segmentors, '
            'one-stage detectors and two-stage detectors up to their RPN can. Export its '
            "'neck' or 'backbone'"
        )

    def _backbone(self, images: Tensor) -> dict[str, Tensor]:
        features = self.model.backbone(images)
        return {f'stage{i}': x for i, x in zip(self.model.backbone.out_indices, features)}

    def _neck(self, images: Tensor) -> dict[str, Tensor]:
        return _name('level', self.model.extract_feat(images))

    def _segmentor(self, images: Tensor) -> dict[str, Tensor]:
        model = self.model
        logits = model.encode_decode(images, [dict(img_shape=images.shape[2:])])
        if logits.shape[1] > 1:
            labels = logits.argmax(dim=1)
        else:
            labels = (logits[:, 0].sigmoid() > model.decode_head.threshold).long()
        return dict(logits=logits, labels=labels)

    def _classifier(self, images: Tensor) -> dict[str, Tensor]:
        return dict(logits=self.model(images, mode='tensor'))

    def _dense_head(self, images: Tensor) -> dict[str, Tensor]:
        return _name_outputs(self.model.bbox_head(self.model.extract_feat(images)))

    def _proposals(self, images: Tensor) -> dict[str, Tensor]:
        features = self.model.extract_feat(images)
        return {**_name('level', features), **_name_outputs(self.model.rpn_head(features))}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Run the model on images as :attr:`input_description` says."""
        if self.to_bgr:
            images = images.flip(1)
        if self.normalize:
            images = (images - self.mean) / self.std
        return self.run(images)


def _name(name: str, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f'{name}{i}': tensor for i, tensor in enumerate(tensors)}


def _name_outputs(outputs: tuple[list[Tensor], ...]) -> dict[str, Tensor]:
    """What a dense head returns: scores, boxes and maybe more, each a list with all levels."""
    names = ('cls_score', 'bbox_pred', 'extra')
    if len(outputs) > len(names):
        raise ValueError(f'a dense head with {len(outputs)} kinds of output cannot be exported')
    found: dict[str, Tensor] = {}
    for name, tensors in zip(names, outputs):
        found.update(_name(name, tensors))
    return found


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
