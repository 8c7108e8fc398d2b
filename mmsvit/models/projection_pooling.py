"""What the published classifier has between the backbone and its linear layer, as a neck."""

from __future__ import annotations

from collections.abc import Sequence

from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..registry import MODELS


@MODELS.register_module()
class ProjectionPooling(BaseModule):
    """Project a feature map to more channels, then average it over the image.

    A 1x1 convolution, a norm, Swish and the mean over all positions: together with
    mmpretrain's ``LinearClsHead`` the classifier that the authors of SViT published
    (``proj``, ``norm`` and ``head`` of https://github.com/hhb072/STViT).

    Args:
        in_channels: Channels of the last map that the backbone returns.
        out_channels: Length of the vector for each image.
        norm_cfg: The norm after the convolution.
        norm_eval: Keep the running statistics of batch norm as they are in training.
        init_cfg: See MMEngine's ``BaseModule``. By default PyTorch's own initialisation,
            as in the published model.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 1024,
        norm_cfg: dict = dict(type='BN'),
        norm_eval: bool = False,
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.norm_eval = norm_eval
        self.proj = nn.Conv2d(in_channels, out_channels, 1)
        _, self.norm = build_norm_layer(norm_cfg, out_channels)

    def train(self, mode: bool = True) -> ProjectionPooling:
        """Set training mode, except for what ``norm_eval`` holds fast."""
        super().train(mode)
        if self.norm_eval and isinstance(self.norm, _BatchNorm):
            self.norm.eval()
        return self

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor]:
        """Compute one vector for each image.

        Args:
            inputs: Maps of a backbone; the last, ``(N, in_channels, H, W)``, is used.

        Returns:
            A tuple, as mmpretrain's heads want it, of one tensor ``(N, out_channels)``.
        """
        x = F.silu(self.norm(self.proj(inputs[-1])))
        return (x.mean(dim=(2, 3)),)
