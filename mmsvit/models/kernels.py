"""Which Triton kernels a model would run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..ops.proofs import Kernel
from .super_token_attention import SuperTokenAttention
from .svit import ConvFFN, SuperTokenBlock, SViT


def kernels_of(model: nn.Module, dtypes: Iterable[torch.dtype]) -> dict[Kernel, int]:
    """The kernels of all SViT backbones in a model.

    Args:
        model: On any device, the meta device included.
        dtypes: In which the model computes.

    Returns:
        The kernels, and the stride of the maps that they read, in pixels.
    """
    dtypes = tuple(dtypes)
    return {
        Kernel(operation, dtype, channels, cell): stride
        for backbone in model.modules()
        if isinstance(backbone, SViT) and backbone.ops_backend == 'auto'
        for stride, stage in zip((4, 8, 16, 32), backbone.stages)
        for operation, channels, cell in _operations(stage)
        for dtype in dtypes
    }


def _operations(stage: nn.Module) -> Iterator[tuple[str, int, tuple[int, int]]]:
    for module in stage.modules():
        if isinstance(module, SuperTokenBlock) and isinstance(module.pos_embed, nn.Conv2d):
            yield 'add_depthwise_conv', module.pos_embed.in_channels, (1, 1)
        elif isinstance(module, ConvFFN) and module.dwconv is not None:
            yield 'conv_ffn', module.fc1.out_features, (1, 1)
        elif (
            isinstance(module, SuperTokenAttention)
            and module.associates
            and module.has_super_tokens
        ):
            yield 'sample', module.attend.qkv.in_features, module.super_token_size
