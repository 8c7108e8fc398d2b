"""Parts of detectors that stay in float32, whatever mixed precision does around them.

MMDetection makes anchors in the dtype of a head's scores, and rounds the corners of RoIs to that of
the features before it pools them: in bfloat16 by up to 4 pixels, in float16 by half a pixel. MMCV's
RoI pooling, NMS, focal loss and deformable attention have no bfloat16 at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..registry import MODELS


def _to_float32(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_to_float32, value))
    return value


@MODELS.register_module()
class Float32RoIExtractor(BaseModule):
    """MMDetection's ``SingleRoIExtractor``, with the same arguments, which pools in float32."""

    def __init__(
        self,
        roi_layer: dict,
        out_channels: int,
        featmap_strides: Sequence[int],
        finest_scale: int = 56,
        init_cfg: dict | None = None,
    ) -> None:
        settings = dict(roi_layer=roi_layer, out_channels=out_channels, finest_scale=finest_scale)
        settings.update(type='mmdet.SingleRoIExtractor', featmap_strides=featmap_strides)
        super().__init__(init_cfg)
        self.extractor = MODELS.build(settings)
        # What heads of MMDetection ask for.
        self.num_inputs: int = self.extractor.num_inputs
        self.out_channels, self.featmap_strides = out_channels, featmap_strides

    @property
    def roi_layers(self) -> nn.ModuleList:
        """The pooling of each stride."""
        return self.extractor.roi_layers

    def forward(
        self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None
    ) -> Tensor:
        """Pool regions.

        Args:
            feats: Maps ``(N, C, H, W)`` of each stride, of any floating dtype.
            rois: Index of the image and corners in pixels, ``(R, 5)``.
            roi_scale_factor: By which RoIs grow around their centre.

        Returns:
            ``(R, C, h, w)``, float32.
        """
        with torch.autocast(rois.device.type, enabled=False):
            return self.extractor(_to_float32(feats), rois.float(), roi_scale_factor)


def _return_float32(head: nn.Module, inputs: tuple, outputs: Any) -> Any:
    return _to_float32(outputs)


def _build_head(kind: str, settings: dict) -> nn.Module:
    head = MODELS.build(dict(settings, type=kind))
    head.register_forward_hook(_return_float32)
    return head


@MODELS.register_module()
def Float32RPNHead(**settings: Any) -> nn.Module:
    """MMDetection's ``RPNHead``, with the same arguments, that gives scores and offsets in float32."""
    return _build_head('mmdet.RPNHead', settings)


@MODELS.register_module()
def Float32RetinaHead(**settings: Any) -> nn.Module:
    """MMDetection's ``RetinaHead``, with the same arguments, that gives its outputs in float32."""
    return _build_head('mmdet.RetinaHead', settings)


@MODELS.register_module()
def Float32DINO(**settings: Any) -> nn.Module:
    """MMDetection's ``DINO``, with the same arguments, whose deformable attention samples in float32.

    MMCV's compiled operation has no bfloat16, and takes the dtype of what it samples.
    """
    model = MODELS.build(dict(settings, type='mmdet.DINO'))
    for module in model.modules():
        if type(module).__name__ == 'MultiScaleDeformableAttention':
            module.value_proj.register_forward_hook(_return_float32)
    return model
