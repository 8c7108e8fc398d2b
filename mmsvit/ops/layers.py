"""The public operations of a block beside super token sampling: FFN, convolution, layout.

Layers that a backend cannot compute from their weights alone
(:func:`mmsvit.ops.standard_layers.is_standard`) are called, whatever the backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import torch_backend
from .backend import backend_for
from .modes import is_tracing, under_autocast, without_autocast
from .standard_layers import is_standard


def conv_ffn(
    x: Tensor,
    fc1: nn.Module,
    act: nn.Module,
    dwconv: nn.Module | None,
    fc2: nn.Module,
    drop: nn.Module,
    residual: bool = False,
    recompute: bool = False,
    backend: str = 'auto',
) -> Tensor:
    """Linear, GELU, ``h + dwconv(h)`` with a depthwise 3x3 convolution, linear (paper, Sec. 3.3).

    Args:
        x: ``(N, H, W, C)``, any floating dtype.
        fc1: From C channels to D.
        act: The activation.
        dwconv: The convolution of D channels, ``(N, D, H, W)`` to the same; None for none.
        fc2: From D channels to C.
        drop: Dropout, after ``act`` and after ``fc2``.
        residual: Whether to add ``x``. The sum may be written into ``x`` where no gradient is
            needed.
        recompute: Whether the backward pass computes all maps of D channels again, to save memory.
            Otherwise ``triton`` saves one, and ``cpu`` none that do not fit into the cache.
        backend: See :func:`choose_backend`.

    Returns:
        ``(N, H, W, C)``.

    Raises:
        ValueError, RuntimeError: See :func:`choose_backend`.
    """
    channels = getattr(fc1, 'out_features', 0)
    chosen, layers = backend_for(x, backend, 'conv_ffn', channels), (fc1, act, dwconv, fc2, drop)
    if chosen is not torch_backend and not all(map(is_standard, layers)):
        chosen = torch_backend
    return chosen.conv_ffn(x, *layers, residual, recompute)


def add_depthwise_conv(x: Tensor, conv: nn.Module, backend: str = 'auto') -> Tensor:
    """``x + conv(x)`` with a depthwise 3x3 convolution of ``(N, C, H, W)``, for ``x`` of ``(N, H, W, C)``.

    See :func:`conv_ffn` for ``backend`` and what is raised.
    """
    chosen = backend_for(x, backend, 'add_depthwise_conv', x.shape[3])
    if chosen is torch_backend or not is_standard(conv):
        return torch_backend.add_depthwise_conv(x, conv)
    return chosen.add_depthwise_conv(x, conv)


def layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """``norm(x)`` of ``(N, H, W, C)``. Of a half ``x`` under CUDA's autocast, no float32 copy is saved.

    Autocast computes layer norms in float32, and saves the float32 copy of ``x``.
    """
    half = x.dtype in (torch.float16, torch.bfloat16)
    if half and x.is_cuda and under_autocast(x.device) and is_standard(norm) and not is_tracing():
        assert isinstance(norm, nn.LayerNorm)
        return _LayerNormOfHalf.apply(x, norm.weight, norm.bias, norm.eps)
    return norm(x)


class _LayerNormOfHalf(torch.autograd.Function):
    """What autocast computes, bit for bit; the backward pass makes the float32 copy again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        with without_autocast(x.device):
            output, mean, inverse = torch.native_layer_norm(
                x.float(), x.shape[-1:], weight, bias, eps
            )
        ctx.save_for_backward(x, mean, inverse, weight, bias)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse, weight, bias = ctx.saved_tensors
        x_grad, weight_grad, bias_grad = torch.ops.aten.native_layer_norm_backward(
            grad, x.float(), x.shape[-1:], mean, inverse, weight, bias, ctx.needs_input_grad[:3]
        )
        return x_grad if x_grad is None else x_grad.to(x.dtype), weight_grad, bias_grad, None


def gelu_affine(x: Tensor, scale: Tensor, shift: Tensor, backend: str = 'auto') -> Tensor:
    """``gelu(x) * scale + shift``, written into ``x`` where no gradient is needed.

    Args:
        x: ``(N, H, W, C)``, any floating dtype.
        scale: ``(C,)``.
        shift: ``(C,)``.
        backend: See :func:`choose_backend`.

    Returns:
        ``(N, H, W, C)`` in the dtype of ``x``.
    """
    return backend_for(x, backend).gelu_affine(x, scale, shift)


def channels_first(x: Tensor, backend: str = 'auto') -> Tensor:
    """The contiguous map that necks and heads expect, ``(N, H, W, C)`` to ``(N, C, H, W)``.

    See :func:`choose_backend` for ``backend``.
    """
    return backend_for(x, backend).channels_first(x)
