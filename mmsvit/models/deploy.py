"""The form of SViT for inference: batch norms and layer scale folded into the layers beside them.

:meth:`mmsvit.SViT.switch_to_deploy` does it, once the weights are loaded; outputs stay the
same to float rounding, and the model cannot be trained any more. The batch norms of the stem
stand before convolutions with zero padding, for which no weights give the same at the border:
they become one multiplication and addition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .. import ops


class GELUAndAffine(nn.Module):
    """GELU, then what a batch norm with fixed statistics does: a factor and a shift a channel.

    Without gradients the result is written into the input.

    Args:
        norm: The batch norm.
        ops_backend: See :func:`mmsvit.ops.choose_backend`.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: _BatchNorm, ops_backend: str = 'auto') -> None:
        super().__init__()
        scale, shift = scale_and_shift(norm)
        self.register_buffer('scale', scale)
        self.register_buffer('shift', shift)
        self.ops_backend = ops_backend

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        pixels = x.permute(0, 2, 3, 1)
        pixels = ops.gelu_affine(pixels, self.scale, self.shift, self.ops_backend)
        return pixels.permute(0, 3, 1, 2)


def fuse_activations_and_norms(layers: nn.Sequential, ops_backend: str = 'auto') -> nn.Sequential:
    """Make each GELU and the batch norm behind it one layer."""
    fused: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, _BatchNorm):
            fused[-1] = GELUAndAffine(layer, ops_backend)
        else:
            fused.append(layer)
    return nn.Sequential(*fused)


def check_foldable(norm: nn.Module, *layers: nn.Module) -> None:
    """Refuse what cannot be folded, before anything is changed.

    Args:
        norm: To be folded.
        layers: Linear layers that norms or scales are to be folded into.

    Raises:
        TypeError: The norm is no batch norm, or a layer is not ``nn.Linear``.
        ValueError: The norm keeps no running statistics, so that it depends on the batch.
    """
    if not isinstance(norm, _BatchNorm):
        raise TypeError(f'only batch norms can be folded, found {type(norm).__name__}')
    if norm.running_mean is None:
        raise ValueError(
            'a batch norm without running statistics (norm_cfg.track_running_stats=False) cannot '
            'be folded into other layers: run this model without switch_to_deploy'
        )
    for layer in layers:
        if type(layer) is not nn.Linear:
            raise TypeError(
                f'norms and scales can be folded into nn.Linear only, found {type(layer).__name__}: '
                'merge adapters into their layers before switch_to_deploy'
            )


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Factor and shift, ``(C,)`` each, of a batch norm in evaluation mode."""
    statistics = dict(norm.named_buffers())
    scale = torch.rsqrt(statistics['running_var'] + cast(float, norm.eps))
    shift = torch.zeros_like(scale)
    if norm.affine:
        scale, shift = scale * cast(Tensor, norm.weight), cast(Tensor, norm.bias)
    return scale, shift - statistics['running_mean'] * scale


def fold_norm_into_linear(norm: nn.Module, linear: nn.Linear) -> None:
    """Change ``linear`` so that it computes what ``linear(norm(x))`` did, over channels."""
    scale, shift = scale_and_shift(norm)
    linear.bias.add_(linear.weight @ shift)
    linear.weight.mul_(scale)


def fold_scale_into_linear(linear: nn.Linear, scale: Tensor) -> None:
    """Change ``linear`` so that it computes what ``scale * linear(x)`` did."""
    linear.weight.mul_(scale[:, None])
    linear.bias.mul_(scale)


def fuse_conv_and_norm(layers: nn.Sequential) -> nn.Conv2d:
    """One convolution for a convolution and the batch norm behind it."""
    conv, norm = cast(tuple[nn.Conv2d, _BatchNorm], tuple(layers))
    return fuse_conv_bn_eval(conv.eval(), norm.eval())


def refuse_weights(module: nn.Module, *_: object) -> None:
    """Keep weights of a trained model out of one into which norms were folded.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(
        f'this {type(module).__name__} was switched to its form for inference, in which weights '
        'mean something else: load them before switch_to_deploy()'
    )


def switch_to_deploy(model: nn.Module) -> int:
    """Switch every part of a model that can to its form for inference, and count them."""
    modules = [module for module in model.modules() if hasattr(module, 'switch_to_deploy')]
    for module in modules:
        cast(Callable, module.switch_to_deploy)()
    return len(modules)
