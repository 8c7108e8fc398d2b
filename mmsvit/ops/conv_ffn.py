"""The convolutional FFN as one operation, which on a CPU never holds its wide hidden map whole.

The hidden map is four times as wide as the tokens. Computed layer by layer, it goes through
memory five times, and training keeps three copies of it. On a CPU the rows of the map are
worked on a few at a time instead, so that their hidden part stays in the cache, and the
backward pass computes it again. (That gradient cannot be differentiated once more.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .torch_backend import under_autocast

# What one piece of the hidden map may have: about a core's cache, or more where the weights,
# which every piece reads again, are larger than that.
PIECE_BYTES = 2**21
PIECE_PER_WEIGHT = 4


def conv_ffn(
    x: Tensor,
    fc1: tuple[Tensor, Tensor],
    dwconv: tuple[Tensor, Tensor],
    fc2: tuple[Tensor, Tensor],
) -> Tensor:
    """Linear, GELU, ``h + dwconv(h)`` with a depthwise 3x3 convolution, linear (paper, Sec. 3.3).

    Args:
        x: ``(N, H, W, C)``.
        fc1: Weight ``(D, C)`` and bias ``(D,)``.
        dwconv: Weight ``(D, 1, 3, 3)`` and bias ``(D,)``.
        fc2: Weight ``(C', D)`` and bias ``(C',)``.

    Returns:
        ``(N, H, W, C')``.
    """
    if _is_half(x, dwconv[0]) or _rows_of_a_piece(x, *fc1) >= x.shape[1]:
        hidden = F.gelu(F.linear(x, *fc1))
        return F.linear(convolve_and_add(hidden, *dwconv), *fc2)
    return _ByRows.apply(x, *fc1, _add_identity(dwconv[0]), dwconv[1], *fc2)


def convolve_and_add(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """``x + dwconv(x)`` with a depthwise 3x3 convolution, in one pass in float32.

    In half precision, or under autocast, 1 + w would round the weight to the precision of 1 and
    x to that of the convolution: there it is a sum.

    Args:
        x: ``(N, H, W, C)``.
        kernel: ``(C, 1, 3, 3)``.
        bias: ``(C,)``.

    Returns:
        ``(N, H, W, C)``.
    """
    if _is_half(x, kernel):
        return x + _convolve(x, kernel, bias, pad_rows=1)
    return _convolve(x, _add_identity(kernel), bias, pad_rows=1)


def _is_half(x: Tensor, kernel: Tensor) -> bool:
    return under_autocast(x.device) or kernel.dtype.itemsize < 4


def _add_identity(kernel: Tensor) -> Tensor:
    return kernel + F.pad(kernel.new_ones(1, 1, 1, 1), (1, 1, 1, 1))


def _rows_of_a_piece(x: Tensor, w1: Tensor, *rest: Tensor) -> int:
    """How many rows to work on at a time; all of them where there is nothing to gain."""
    in_one_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if x.device.type != 'cpu' or in_one_graph:
        return x.shape[1]
    row_bytes = x.shape[2] * w1.shape[0] * x.element_size()
    budget = max(PIECE_BYTES, PIECE_PER_WEIGHT * w1.numel() * w1.element_size())
    return max(2, budget // row_bytes)


def _convolve(hidden: Tensor, kernel: Tensor, bias: Tensor, pad_rows: int) -> Tensor:
    hidden = hidden.permute(0, 3, 1, 2)
    convolved = F.conv2d(hidden, kernel, bias, padding=(pad_rows, 1), groups=kernel.shape[0])
    return convolved.permute(0, 2, 3, 1)


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *parameters):
        x = x.contiguous()
        ctx.save_for_backward(x, *parameters)
        rows = _rows_of_a_piece(x, *parameters)
        output = x.new_empty(*x.shape[:3], parameters[-1].shape[0])
        for image, out in zip(x, output):
            _forward_by_rows(image, out, rows, *parameters)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, *parameters = ctx.saved_tensors
        rows = _rows_of_a_piece(x, *parameters)
        height = x.shape[1]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        totals = [torch.zeros_like(tensor) for tensor in (x, *parameters)]
        for n in range(x.shape[0]):
            for first in range(0, height, rows):
                last = min(first + rows, height)
                above, below = int(first > 0), int(last < height)
                part = slice(first - above, last + below)
                inputs = [tensor.detach() for tensor in (x[n : n + 1, part], *parameters)]
                for i in wanted:
                    inputs[i].requires_grad_()
                with torch.enable_grad():
                    out = _part(*inputs, missing_above=1 - above, missing_below=1 - below)
                grads = torch.autograd.grad(
                    out, [inputs[i] for i in wanted], grad[n : n + 1, first:last]
                )
                for i, one in zip(wanted, grads):
                    total = totals[i] if i else totals[0][n : n + 1, part]
                    total += one
        return tuple(
            total if needed else None for total, needed in zip(totals, ctx.needs_input_grad)
        )


def _part(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    kernel: Tensor,
    bias: Tensor,
    w2: Tensor,
    b2: Tensor,
    missing_above: int,
    missing_below: int,
) -> Tensor:
    """Some rows of the result from these and a row above and below, or zeros at the border."""
    hidden = F.gelu(F.linear(x, w1, b1))
    hidden = F.pad(hidden, (0, 0, 0, 0, missing_above, missing_below))
    return F.linear(_convolve(hidden, kernel, bias, pad_rows=0), w2, b2)


def _forward_by_rows(
    x: Tensor,
    output: Tensor,
    rows: int,
    w1: Tensor,
    b1: Tensor,
    kernel: Tensor,
    bias: Tensor,
    w2: Tensor,
    b2: Tensor,
) -> None:
    """Write the result for one image ``(H, W, C)`` into ``output``, ``rows`` at a time."""
    height, width, _ = x.shape
    x, output = x.flatten(0, 1), output.flatten(0, 1)
    # A row above those that are worked on and one below.
    hidden = x.new_zeros(1, rows + 2, width, w1.shape[0])
    flat = hidden[0].flatten(0, 1)
    for first in range(0, height, rows):
        last = min(first + rows, height)
        known = 1  # The row above the image is zero.
        if first > 0:
            hidden[:, :2] = hidden[:, rows:]
            known = 2
        start, stop = first - 1 + known, min(last + 1, height)
        new = flat[known * width : (known + stop - start) * width]
        if stop > start:
            torch.addmm(b1, x[start * width : stop * width], w1.t(), out=new)
            torch.ops.aten.gelu_(new)
        end = last - first + 2
        if last == height:
            hidden[:, end - 1] = 0
        convolved = _convolve(hidden[:, :end], kernel, bias, pad_rows=0)
        into = output[first * width : last * width]
        torch.addmm(b2, convolved.flatten(0, 2), w2.t(), out=into)
