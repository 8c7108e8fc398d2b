"""The form of SViT for inference: batch norms and layer scale folded into the layers beside them.

:meth:`mmsvit.SViT.switch_to_deploy` does it, once the weights are loaded; outputs stay the
same to float rounding, and the model cannot be trained any more. The batch norms of the stem
stand before convolutions with zero padding, for which no weights give the same at the border:
they become one multiplication and addition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .. import ops
from ..ops.standard_layers import is_watched

_NORM_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


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


def check_layer(name: str, layer: object, *kinds: type[nn.Module]) -> None:
    """Refuse a layer that does more than its weights say.

    Raises:
        TypeError: It is of none of the classes ``kinds``; subclasses do not count.
        ValueError: It has hooks or a patched method, which would not run any more.
    """
    if type(layer) not in kinds:
        raise TypeError(
            f'{name} cannot be folded: expected {" or ".join(kind.__name__ for kind in kinds)}, found '
            f'{type(layer).__name__}. Merge adapters into their layers before switch_to_deploy'
        )
    if is_watched(cast(nn.Module, layer)):
        raise ValueError(
            f'{name} has a hook or a patched method, which would not run any more: remove it before '
            'switch_to_deploy (pruning and weight norms have functions that make them permanent)'
        )


def check_linear(name: str, layer: object) -> None:
    """Refuse a layer into which a norm or scale cannot be folded; raises as :func:`check_layer`."""
    check_layer(name, layer, nn.Linear)
    if cast(nn.Linear, layer).bias is None:
        raise ValueError(f'{name} has no bias, into which to fold')


def check_norm(name: str, norm: object) -> None:
    """Refuse what is no batch norm with fixed statistics; raises as :func:`check_layer`."""
    if not isinstance(norm, _BatchNorm) or type(norm).forward not in _NORM_FORWARDS:
        raise TypeError(f'{name}: only batch norms can be folded, found {type(norm).__name__}')
    check_layer(name, norm, type(norm))
    if norm.running_mean is None:
        raise ValueError(
            f'{name} is a batch norm without running statistics (norm_cfg.track_running_stats='
            'False), which depends on the batch: run this model without switch_to_deploy'
        )


def check_stem(stem: nn.Sequential) -> None:
    """Refuse a stem whose batch norms do not all follow a GELU; raises as :func:`check_layer`."""
    layers = list(stem)
    for i, layer in enumerate(layers):
        if isinstance(layer, _BatchNorm):
            check_norm(f'stem.{i}', layer)
            before = layers[i - 1]
            check_layer(f'stem.{i - 1}', before, nn.GELU)
            if cast(nn.GELU, before).approximate != 'none':
                raise ValueError(f'stem.{i - 1} is an approximate GELU, which cannot be folded')


def check_conv_and_norm(name: str, layers: nn.Sequential) -> None:
    """Refuse what is not a convolution and a batch norm; raises as :func:`check_layer`."""
    check_layer(name, layers, nn.Sequential)
    if len(layers) != 2:
        raise TypeError(f'{name} has {len(layers)} layers, expected 2')
    check_layer(f'{name}.0', layers[0], nn.Conv2d)
    check_norm(f'{name}.1', layers[1])


def check_unshared(parameters: Sequence[nn.Parameter]) -> None:
    """Refuse a parameter that two layers share, as it would be folded into twice.

    Raises:
        ValueError: One is shared.
    """
    if len(set(map(id, parameters))) < len(parameters):
        raise ValueError('blocks that share layers or weights cannot be folded')


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
