"""The convolutional FFN on a CPU, without its wide hidden map in memory.

The hidden map is four times as wide as the tokens. Computed layer by layer, it goes through
memory five times, and training keeps three copies of it. Here a few rows of the map are
computed at a time, so that their hidden part stays in the cache, and the
backward pass computes it again. (That gradient cannot be differentiated once more.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import torch_backend
from .cpu_cache import rows_in_cache
from .modes import needs_grad, under_autocast, without_autocast

# A piece of the hidden map may be larger than the cache where the weights, which every piece reads
# again, are large.
PIECE_PER_WEIGHT = 4


def conv_ffn(
    x: Tensor,
    fc1: nn.Module,
    act: nn.Module,
    dwconv: nn.Module,
    fc2: nn.Module,
    drop: nn.Module,
    residual: bool,
    recompute: bool,
) -> Tensor:
    """See :func:`mmsvit.ops.conv_ffn`."""
    weights = (*_weights(fc1), *_weights(dwconv), *_weights(fc2))
    differentiable = needs_grad(x, *weights)
    # Computing the hidden map again pays only where it does not fit into the cache.
    in_one_piece = differentiable and _rows_of_a_piece(x, weights[0]) >= x.shape[1]
    if in_one_piece or _is_half(x, weights[2]):
        layers = fc1, act, dwconv, fc2, drop
        return torch_backend.conv_ffn(x, *layers, residual, recompute, add_depthwise_conv)
    parameters = (*weights[:2], _add_identity(weights[2]), *weights[3:])
    if differentiable:
        output = _ByRows.apply(x, *parameters)
        return x + output if residual else output
    x = x.contiguous()
    output = x if residual else x.new_empty(*x.shape[:3], len(weights[5]))
    _infer_by_rows(x, output, *parameters)
    return output


def add_depthwise_conv(x: Tensor, conv: nn.Module) -> Tensor:
    """See :func:`mmsvit.ops.add_depthwise_conv`; in float32 one pass, with ``x`` in the kernel.

    In half precision, or under autocast, 1 + w would round the weight to the precision of 1 and
    x to that of the convolution: there it is a sum.
    """
    kernel, bias = _weights(conv)
    if _is_half(x, kernel):
        return torch_backend.add_depthwise_conv(x, conv)
    return _convolve(x, _add_identity(kernel), bias, pad_rows=1)


def _weights(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias, which every standard layer has."""
    return cast(Tensor, layer.weight), cast(Tensor, layer.bias)


def _is_half(x: Tensor, kernel: Tensor) -> bool:
    return under_autocast(x.device) or kernel.dtype.itemsize < 4


def _add_identity(kernel: Tensor) -> Tensor:
    return kernel + F.pad(kernel.new_ones(1, 1, 1, 1), (1, 1, 1, 1))


def _rows_of_a_piece(x: Tensor, w1: Tensor) -> int:
    """How many rows to work on at a time; two at least, for there are rows between pieces."""
    row_bytes = x.shape[2] * w1.shape[0] * x.element_size()
    return max(2, rows_in_cache(row_bytes, PIECE_PER_WEIGHT * w1.numel() * w1.element_size()))


def _convolve(hidden: Tensor, kernel: Tensor, bias: Tensor, pad_rows: int) -> Tensor:
    hidden = hidden.permute(0, 3, 1, 2)
    convolved = F.conv2d(hidden, kernel, bias, padding=(pad_rows, 1), groups=kernel.shape[0])
    return convolved.permute(0, 2, 3, 1)


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *parameters):
        x = x.contiguous()
        ctx.save_for_backward(x, *parameters)
        output = x.new_empty(*x.shape[:3], parameters[-1].shape[0])
        _infer_by_rows(x, output, *parameters)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        with without_autocast(grad.device):
            return _gradients(ctx.needs_input_grad, grad.contiguous(), *ctx.saved_tensors)


def _gradients(
    needed: Sequence[bool], grad: Tensor, x: Tensor, *parameters: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of those of ``x`` and the parameters that need one."""
    w1, b1, kernel, bias, w2, _ = parameters
    height, width = x.shape[1:3]
    dims = w1.shape[0]
    rows = min(_rows_of_a_piece(x, w1), height)
    # Each piece writes over the one before: nothing new comes into the cache.
    linear = x.new_empty((rows + 2) * width, dims)
    hidden = x.new_empty(1, rows + 2, width, dims)
    convolved_grad = x.new_empty(1, rows, width, dims)
    totals = [
        torch.zeros_like(tensor) if wanted else None
        for tensor, wanted in zip((x, *parameters), needed)
    ]
    x_total, w1_total, b1_total, kernel_total, bias_total, w2_total, b2_total = totals
    for n in range(x.shape[0]):
        for first in range(0, height, rows):
            last = min(first + rows, height)
            # A row above and one below, where the image has them, or else zeros.
            above, below = int(first > 0), int(last < height)
            tokens = x[n, first - above : last + below].flatten(0, 1)
            before = linear[: tokens.shape[0]]
            torch.mm(tokens, w1.t(), out=before).add_(b1)
            map_in = hidden[:, : last - first + 2]
            map_in[:, 0] = map_in[:, -1] = 0
            inside = slice(1 - above, last - first + 1 + below)
            torch.ops.aten.gelu.out(before, out=map_in[0, inside].flatten(0, 1))
            output_grad = grad[n, first:last].flatten(0, 1)
            if w2_total is not None:
                convolved = _convolve(map_in, kernel, bias, pad_rows=0).flatten(0, 2)
                w2_total.addmm_(output_grad.t(), convolved)
            if b2_total is not None:
                b2_total += output_grad.sum(0)
            map_grad = convolved_grad[:, : last - first]
            torch.mm(output_grad, w2, out=map_grad.flatten(0, 2))
            hidden_grad, *grads = torch.ops.aten.convolution_backward(
                map_grad.permute(0, 3, 1, 2),
                map_in.permute(0, 3, 1, 2),
                kernel,
                bias_sizes=[dims],
                stride=[1, 1],
                padding=[0, 1],
                dilation=[1, 1],
                transposed=False,
                output_padding=[0, 0],
                groups=dims,
                output_mask=[True, kernel_total is not None, bias_total is not None],
            )
            for total, one in zip((kernel_total, bias_total), grads):
                if total is not None:
                    total += one
            hidden_grad = hidden_grad.permute(0, 2, 3, 1)[0, inside].flatten(0, 1)
            torch.ops.aten.gelu_backward.grad_input(hidden_grad, before, grad_input=hidden_grad)
            if x_total is not None:
                x_total[n, first - above : last + below].flatten(0, 1).addmm_(hidden_grad, w1)
            if w1_total is not None:
                w1_total.addmm_(hidden_grad.t(), tokens)
            if b1_total is not None:
                b1_total += hidden_grad.sum(0)
    return tuple(totals)


def _infer_by_rows(x: Tensor, output: Tensor, *parameters: Tensor) -> None:
    """Write the result for ``x`` of (N, H, W, C) into ``output``, or add it if that is ``x``."""
    w1, b1, kernel, bias, w2, b2 = parameters
    height, width = x.shape[1:3]
    rows = min(_rows_of_a_piece(x, w1), height)
    # A row above those that are worked on and one below.
    hidden = x.new_empty(1, rows + 2, width, w1.shape[0])
    flat = hidden[0].flatten(0, 1)
    for image, out in zip(x.flatten(1, 2), output.flatten(1, 2)):
        hidden[:, 0] = 0  # The row above the image.
        for first in range(0, height, rows):
            last = min(first + rows, height)
            known = 1
            if first > 0:
                hidden[:, :2] = hidden[:, rows:]
                known = 2
            start, stop = first - 1 + known, min(last + 1, height)
            new = flat[known * width : (known + stop - start) * width]
            if stop > start:
                torch.mm(image[start * width : stop * width], w1.t(), out=new)
                torch.ops.aten.gelu_(new.add_(b1))
            end = last - first + 2
            if last == height:
                hidden[:, end - 1] = 0
            convolved = _convolve(hidden[:, :end], kernel, bias, pad_rows=0).flatten(0, 2)
            # What is in these rows of the image is not needed any more.
            into = out[first * width : last * width]
            if output is x:
                torch.addmm(into, convolved, w2.t(), out=into)
            else:
                torch.mm(convolved, w2.t(), out=into)
            into.add_(b2)
